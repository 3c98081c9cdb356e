//! A small SPIFFE authority for `dev`, `tour` and the tests: a CA and a JWT key of its own, which it can rotate.
//! `serve` has nothing to do with it and refuses its trust domain.

use std::sync::Arc;

use aws_lc_rs::digest;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use parking_lot::RwLock;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use serde_json::json;
use time::OffsetDateTime;
use tokio::sync::watch;

use super::error::{IdentityError, Refusal, refuse};
use super::spiffe::{Svid, parse_spiffe_id, parse_trust_domain};
use crate::time::Clock;

/// The trust domain of `dev` and `tour`. `serve` refuses it.
pub const DEV_TRUST_DOMAIN: &str = "dev.countersign.internal";
/// Life of an X.509-SVID, in seconds.
pub const X509_SVID_SECS: u64 = 3600;
/// Life of a JWT-SVID, in seconds.
pub const JWT_SVID_SECS: u64 = 300;
/// Life of the CA, in seconds.
const CA_SECS: u64 = 30 * 24 * 3600;
/// Certificates begin so much earlier, for clocks that differ, in seconds.
const BACKDATE_SECS: u64 = 30;
/// Generations of keys that stay in the bundles, the current one included.
const GENERATIONS_MAX: usize = 3;

struct Generation {
    ca: CertifiedIssuer<'static, KeyPair>,
    jwt_key: EcdsaKeyPair,
    jwk: serde_json::Value,
    kid: String,
}

/// The authority.
pub struct DevAuthority {
    trust_domain: String,
    clock: Arc<dyn Clock>,
    /// The current generation is the last one.
    generations: RwLock<Vec<Arc<Generation>>>,
    changes: watch::Sender<u64>,
}

impl std::fmt::Debug for DevAuthority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DevAuthority({})", self.trust_domain)
    }
}

fn failed(error: impl std::fmt::Display) -> IdentityError {
    IdentityError::new(Refusal::Configuration, format!("the development authority can't issue: {error}"))
}

impl DevAuthority {
    /// Makes new keys.
    pub fn new(trust_domain: &str, clock: Arc<dyn Clock>) -> Result<Self, IdentityError> {
        parse_trust_domain(trust_domain)?;
        let authority = Self {
            trust_domain: trust_domain.to_owned(),
            clock,
            generations: RwLock::default(),
            changes: watch::Sender::new(0),
        };
        authority.rotate()?;
        Ok(authority)
    }

    /// The trust domain's name.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// Counts rotations; whoever hands out SVIDs or bundles waits on it.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// The clock that it issues by.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// New keys sign from now on; the old ones stay in the bundles until [`Self::forget_old`].
    pub fn rotate(&self) -> Result<(), IdentityError> {
        let new = Arc::new(self.generation()?);
        let mut generations = self.generations.write();
        if generations.len() == GENERATIONS_MAX {
            generations.remove(0);
        }
        generations.push(new);
        drop(generations);
        self.changes.send_modify(|n| *n += 1);
        Ok(())
    }

    /// Takes all but the current keys out of the bundles: what they signed counts no more.
    pub fn forget_old(&self) {
        let mut generations = self.generations.write();
        let old = generations.len().saturating_sub(1);
        generations.drain(..old);
        drop(generations);
        self.changes.send_modify(|n| *n += 1);
    }

    fn generation(&self) -> Result<Generation, IdentityError> {
        let mut params = self.params(CA_SECS)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, format!("{} development CA", self.trust_domain));
        params.subject_alt_names = vec![uri(&format!("spiffe://{}", self.trust_domain))?];
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().map_err(failed)?).map_err(failed)?;
        let jwt_key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).map_err(failed)?;
        let point = jwt_key.public_key().as_ref();
        let kid = hex::encode(&digest::digest(&digest::SHA256, point).as_ref()[..8]);
        let (x, y) = point[1..].split_at(32);
        let jwk = json!({
            "kty": "EC", "crv": "P-256", "use": "jwt-svid", "kid": kid,
            "x": BASE64_URL_SAFE_NO_PAD.encode(x), "y": BASE64_URL_SAFE_NO_PAD.encode(y),
        });
        Ok(Generation { ca, jwt_key, jwk, kid })
    }

    fn params(&self, life_secs: u64) -> Result<CertificateParams, IdentityError> {
        let now = self.clock.wall().secs();
        let date =
            |secs: u64| OffsetDateTime::from_unix_timestamp(i64::try_from(secs).unwrap_or(i64::MAX)).map_err(failed);
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.not_before = date(now.saturating_sub(BACKDATE_SECS))?;
        params.not_after = date(now.saturating_add(life_secs))?;
        params.use_authority_key_identifier_extension = true;
        Ok(params)
    }

    fn current(&self) -> Result<Arc<Generation>, IdentityError> {
        self.generations.read().last().cloned().ok_or_else(|| failed("no keys"))
    }

    fn check_id(&self, spiffe_id: &str) -> Result<(), IdentityError> {
        let name = parse_spiffe_id(spiffe_id)?;
        if name.trust_domain != self.trust_domain || name.path.is_empty() {
            return refuse(
                Refusal::Claim,
                format!("the development authority issues for spiffe://{}/…", self.trust_domain),
            );
        }
        Ok(())
    }

    /// An X.509-SVID with a fresh key. `names` are DNS names or addresses that its holder serves at, if any.
    pub fn x509_svid(&self, spiffe_id: &str, names: &[&str], life_secs: u64) -> Result<Svid, IdentityError> {
        self.check_id(spiffe_id)?;
        let generation = self.current()?;
        let mut params = self.params(life_secs)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.subject_alt_names = vec![uri(spiffe_id)?];
        for name in names {
            params.subject_alt_names.push(match name.parse() {
                Ok(ip) => SanType::IpAddress(ip),
                Err(_) => SanType::DnsName((*name).try_into().map_err(failed)?),
            });
        }
        let key = KeyPair::generate().map_err(failed)?;
        let cert = params.signed_by(&key, &generation.ca).map_err(failed)?;
        Ok(Svid {
            spiffe_id: spiffe_id.to_owned(),
            chain: vec![cert.der().clone()],
            key: PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
        })
    }

    /// A JWT-SVID.
    pub fn jwt_svid(&self, spiffe_id: &str, audience: &[&str], life_secs: u64) -> Result<String, IdentityError> {
        self.check_id(spiffe_id)?;
        let now = self.clock.wall().secs();
        let claims = json!({ "sub": spiffe_id, "aud": audience, "iat": now, "exp": now.saturating_add(life_secs) });
        let generation = self.current()?;
        let header = json!({ "alg": "ES256", "kid": generation.kid, "typ": "JWT" });
        let part = |value: serde_json::Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
        let input = format!("{}.{}", part(header), part(claims));
        let signature = generation.jwt_key.sign(&SystemRandom::new(), input.as_bytes()).map_err(failed)?;
        Ok(format!("{input}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature)))
    }

    /// The CA certificates, the current one last.
    pub fn x509_authorities(&self) -> Vec<CertificateDer<'static>> {
        self.generations.read().iter().map(|g| g.ca.der().clone()).collect()
    }

    /// The CA certificates as PEM, for whoever must trust the development broker (`COUNTERSIGN_CA`).
    pub fn x509_authorities_pem(&self) -> String {
        self.generations.read().iter().map(|g| g.ca.pem()).collect()
    }

    /// The JWT authorities as a JWKS.
    pub fn jwks(&self) -> String {
        let keys: Vec<_> = self.generations.read().iter().map(|g| g.jwk.clone()).collect();
        json!({ "keys": keys }).to_string()
    }

    /// The bundle document (SPIFFE Trust Domain and Bundle, section 4).
    pub fn bundle_document(&self) -> String {
        let generations = self.generations.read();
        let x509 = generations
            .iter()
            .map(|g| json!({ "kty": "EC", "use": "x509-svid", "x5c": [BASE64_STANDARD.encode(g.ca.der())] }));
        let keys: Vec<_> = x509.chain(generations.iter().map(|g| g.jwk.clone())).collect();
        json!({ "keys": keys, "spiffe_refresh_hint": 60 }).to_string()
    }
}

fn uri(text: &str) -> Result<SanType, IdentityError> {
    Ok(SanType::URI(text.try_into().map_err(failed)?))
}
