//! Verifying SVIDs: a certificate chain or a JWT → a verified agent, by the bundle of its own trust domain alone.
//! A chain is verified again for every request; per generation of the bundles that costs one hash.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use aws_lc_rs::digest;
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use parking_lot::Mutex;
use rustls_pki_types::{CertificateDer, UnixTime};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::error::{IdentityError, Refusal, refuse};
use super::jwt::{Algorithm, Expected, Token, TokenKind};
use super::spiffe::{SpiffeName, parse_spiffe_id};
use super::trust::TrustStore;
use super::{Method, VerifiedAgent};
use crate::core::id::{AgentId, TierName, Timestamp};
use crate::core::request::Confirmation;

/// Most certificates in a chain.
pub const CHAIN_CERTS_MAX: usize = 8;
/// Largest chain, in bytes.
pub const CHAIN_BYTES_MAX: usize = 64 * 1024;
/// Most verified chains that are remembered.
pub const REMEMBERED_MAX: usize = 4096;
/// Longest life of a JWT-SVID, in seconds.
pub const JWT_SVID_LIFE_SECS_MAX: u64 = 24 * 3600;
/// The algorithms of JWT-SVIDs (JWT-SVID, section 2.1), as far as they are supported here.
pub const JWT_SVID_ALGORITHMS: [Algorithm; 4] =
    [Algorithm::Es256, Algorithm::Es384, Algorithm::Rs256, Algorithm::Ps256];

/// A chain that was verified under one generation of bundles, and from when to when that holds.
#[derive(Clone)]
struct Remembered {
    agent: VerifiedAgent,
    not_before_secs: i64,
    not_after_secs: i64,
}

#[derive(Default)]
struct Memory {
    generation: u64,
    chains: HashMap<[u8; 32], Remembered>,
}

/// Verifies SVIDs against the bundles as they are at that moment.
pub struct SpiffeVerifier {
    store: Arc<TrustStore>,
    audience: String,
    tier_max: Option<TierName>,
    memory: Mutex<Memory>,
}

impl std::fmt::Debug for SpiffeVerifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SpiffeVerifier").field("store", &self.store).finish_non_exhaustive()
    }
}

impl SpiffeVerifier {
    /// Verifies against `store`; JWT-SVIDs must be for `audience` alone.
    pub fn new(store: Arc<TrustStore>, audience: &str, tier_max: Option<TierName>) -> Result<Self, IdentityError> {
        if audience.is_empty() {
            return refuse(Refusal::Configuration, "spiffe.audience is empty");
        }
        Ok(Self { store, audience: audience.to_owned(), tier_max, memory: Mutex::default() })
    }

    /// The bundles.
    pub fn store(&self) -> &Arc<TrustStore> {
        &self.store
    }

    /// The agent that a client certificate names. Call it for every request: a connection lives longer than a bundle
    /// (regression A10). `chain` is the leaf, then the intermediates, as the peer sent them.
    pub fn agent_from_certificate(
        &self,
        chain: &[CertificateDer<'_>],
        now: Timestamp,
    ) -> Result<VerifiedAgent, IdentityError> {
        let now_secs = i64::try_from(now.secs()).unwrap_or(i64::MAX);
        let key = chain_hash(chain)?;
        // The generation is read before the verification: what is remembered is never newer than its bundles.
        let snapshot = self.store.snapshot();
        {
            let mut memory = self.memory.lock();
            if memory.generation != snapshot.generation {
                *memory = Memory { generation: snapshot.generation, chains: HashMap::new() };
            }
            if let Some(known) = memory.chains.get(&key)
                && (known.not_before_secs..=known.not_after_secs).contains(&now_secs)
            {
                return Ok(known.agent.clone());
            }
        }
        let verified = self.verify_chain(chain, &snapshot, now)?;
        let mut memory = self.memory.lock();
        if memory.generation == snapshot.generation {
            if memory.chains.len() >= REMEMBERED_MAX {
                memory.chains.clear();
            }
            memory.chains.insert(key, verified.clone());
        }
        Ok(verified.agent)
    }

    fn verify_chain(
        &self,
        chain: &[CertificateDer<'_>],
        snapshot: &super::trust::Snapshot,
        now: Timestamp,
    ) -> Result<Remembered, IdentityError> {
        let [leaf_der, intermediates @ ..] = chain else {
            return refuse(Refusal::Malformed, "there is no client certificate");
        };
        let leaf = read_leaf(leaf_der)?;
        let bundle = self.bundle(&leaf.name.trust_domain, snapshot)?;
        let now_secs = i64::try_from(now.secs()).unwrap_or(i64::MAX);
        if now_secs > leaf.not_after_secs {
            return refuse(Refusal::Expired, "the client certificate has expired");
        }
        if now_secs < leaf.not_before_secs {
            return refuse(Refusal::NotYetValid, "the client certificate is not valid yet; check the clocks");
        }
        let at = UnixTime::since_unix_epoch(std::time::Duration::from_secs(now.secs()));
        let root = bundle
            .authorities
            .iter()
            .filter(|root| root.is_valid_at(now_secs))
            .find(|root| root.verifier.verify_client_cert(leaf_der, intermediates, at).is_ok());
        let Some(root) = root else {
            return refuse(
                Refusal::BadSignature,
                format!("no path from the client certificate to a valid authority of {}", leaf.name.trust_domain),
            );
        };
        let (mut from, mut until) =
            (leaf.not_before_secs.max(root.not_before_secs), leaf.not_after_secs.min(root.not_after_secs));
        for der in intermediates {
            if let Ok((_, cert)) = X509Certificate::from_der(der) {
                from = from.max(cert.validity().not_before.timestamp());
                until = until.min(cert.validity().not_after.timestamp());
            }
        }
        let thumbprint = BASE64_URL_SAFE_NO_PAD.encode(digest::digest(&digest::SHA256, leaf_der));
        let expires_ms = u64::try_from(until).unwrap_or(0).saturating_mul(1000);
        let agent = self.agent(
            &leaf.name,
            Method::X509Svid,
            Some(Confirmation::CertificateSha256(thumbprint)),
            Timestamp(expires_ms),
        )?;
        Ok(Remembered { agent, not_before_secs: from, not_after_secs: until })
    }

    /// The agent that a JWT-SVID names (JWT-SVID, section 5), by the JWT authorities of its own trust domain.
    pub fn agent_from_jwt(&self, text: &str, now: Timestamp) -> Result<VerifiedAgent, IdentityError> {
        let token = Token::parse(text)?;
        // Which bundle to ask, no more than that: the identity comes from the verified claims below.
        let claimed = parse_spiffe_id(token.unverified("sub").unwrap_or_default())?;
        let snapshot = self.store.snapshot();
        let bundle = self.bundle(&claimed.trust_domain, &snapshot)?;
        let expected = Expected {
            kind: TokenKind::JwtSvid,
            algorithms: &JWT_SVID_ALGORITHMS,
            issuer: None,
            audience: &self.audience,
            life_secs_max: JWT_SVID_LIFE_SECS_MAX,
        };
        let place = format!("trust domain {}", claimed.trust_domain);
        let claims = token.verify(&bundle.jwt, &expected, now).map_err(|e| e.at(&place))?;
        let name = parse_spiffe_id(&claims.subject)?;
        if name.trust_domain != claimed.trust_domain {
            return refuse(Refusal::Claim, "the verified subject is in another trust domain than its signer");
        }
        self.agent(&name, Method::JwtSvid, None, claims.expires_at())
    }

    fn bundle<'s>(
        &self,
        trust_domain: &str,
        snapshot: &'s super::trust::Snapshot,
    ) -> Result<&'s super::trust::TrustBundle, IdentityError> {
        if !self.store.admits(trust_domain) {
            return refuse(Refusal::UnknownIssuer, "the SPIFFE ID's trust domain is not among spiffe.trust_domains");
        }
        // From here on the name is one of the configuration, so it may be said.
        match snapshot.bundle(trust_domain) {
            Some(bundle) => Ok(bundle),
            None => refuse(
                Refusal::KeysUnavailable,
                format!("there is no trust bundle for {trust_domain}; check its file or the Workload API"),
            ),
        }
    }

    fn agent(
        &self,
        name: &SpiffeName,
        method: Method,
        confirmation: Option<Confirmation>,
        expires_at: Timestamp,
    ) -> Result<VerifiedAgent, IdentityError> {
        if name.path.is_empty() {
            return refuse(Refusal::Claim, "the SPIFFE ID names a trust domain, not a workload: it has no path");
        }
        let id = AgentId::new(&name.id).or_else(|e| refuse(Refusal::Claim, format!("the SPIFFE ID: {e}")))?;
        Ok(VerifiedAgent {
            id,
            issuer: format!("spiffe://{}", name.trust_domain),
            subject: name.id.clone(),
            method,
            attributes: BTreeMap::from([("trust_domain".to_owned(), name.trust_domain.clone())]),
            launcher: None,
            tier_max: self.tier_max.clone(),
            confirmation,
            expires_at,
        })
    }
}

fn chain_hash(chain: &[CertificateDer<'_>]) -> Result<[u8; 32], IdentityError> {
    let bytes: usize = chain.iter().map(|c| c.len()).sum();
    if chain.is_empty() || chain.len() > CHAIN_CERTS_MAX || bytes > CHAIN_BYTES_MAX {
        return refuse(
            Refusal::Malformed,
            format!("the client's chain is empty, longer than {CHAIN_CERTS_MAX} certificates or larger than 64 KiB"),
        );
    }
    let mut context = digest::Context::new(&digest::SHA256);
    for cert in chain {
        context.update(&(cert.len() as u64).to_be_bytes());
        context.update(cert);
    }
    let mut hash = [0; 32];
    hash.copy_from_slice(context.finish().as_ref());
    Ok(hash)
}

struct Leaf {
    name: SpiffeName,
    not_before_secs: i64,
    not_after_secs: i64,
}

/// The rules of a leaf (X.509-SVID, sections 2 to 4): one URI SAN and that a SPIFFE ID, no CA, `digitalSignature` and
/// neither `keyCertSign` nor `cRLSign`. An extension that is there twice or can't be read refuses the certificate.
fn read_leaf(der: &CertificateDer<'_>) -> Result<Leaf, IdentityError> {
    let malformed = |what: &str| IdentityError::new(Refusal::Malformed, format!("the client certificate {what}"));
    let (rest, cert) = X509Certificate::from_der(der).map_err(|_| malformed("is not X.509"))?;
    if !rest.is_empty() {
        return Err(malformed("has bytes after its end"));
    }
    let san = cert.subject_alternative_name().map_err(|_| malformed("has an unreadable subjectAltName"))?;
    let uris: Vec<&str> = san
        .iter()
        .flat_map(|san| &san.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    let [uri] = uris.as_slice() else {
        return Err(malformed("doesn't have exactly one URI in its subjectAltName"));
    };
    let unreadable = |_| malformed("has an unreadable extension");
    if cert.basic_constraints().map_err(unreadable)?.is_some_and(|b| b.value.ca) {
        return Err(malformed("is one of a CA"));
    }
    match cert.key_usage().map_err(unreadable)? {
        Some(usage) if usage.value.digital_signature() && !usage.value.key_cert_sign() && !usage.value.crl_sign() => {}
        _ => return Err(malformed("lacks the key usage digitalSignature, or has keyCertSign or cRLSign")),
    }
    Ok(Leaf {
        name: parse_spiffe_id(uri)?,
        not_before_secs: cert.validity().not_before.timestamp(),
        not_after_secs: cert.validity().not_after.timestamp(),
    })
}

/// The SPIFFE ID of a certificate that keeps the rules of a leaf. Nothing is verified.
pub(super) fn leaf_name(der: &CertificateDer<'_>) -> Result<SpiffeName, IdentityError> {
    Ok(read_leaf(der)?.name)
}
