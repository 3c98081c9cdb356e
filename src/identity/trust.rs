//! Trust bundles by trust domain: what may sign for it, X.509 and JWT. From the Workload API or from files; a change
//! makes a new snapshot with a new generation, and whoever cached a verification sees that it must be done again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use parking_lot::Mutex;
use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::error::{IdentityError, Refusal, refuse};
use super::jwt::key::{JWKS_BYTES_MAX, jwks_entries};
use super::jwt::{KeySet, KeyUse, VerifyingKey};
use super::keyset::{FILE_STALE_SECS_MAX, Stamp};
use super::spiffe::parse_trust_domain;
use crate::time::Clock;

/// Most trust domains.
pub const TRUST_DOMAINS_MAX: usize = 256;
/// Most X.509 authorities of one trust domain.
pub const AUTHORITIES_MAX: usize = 32;
/// Largest certificate of an authority, in bytes.
pub const AUTHORITY_BYTES_MAX: usize = 16 * 1024;

/// One X.509 authority. Its own validity counts too: an expired root signs for nobody.
pub struct Authority {
    pub(super) verifier: Arc<dyn ClientCertVerifier>,
    pub(super) not_before_secs: i64,
    pub(super) not_after_secs: i64,
    der: CertificateDer<'static>,
}

impl Authority {
    fn new(der: CertificateDer<'static>) -> Result<Self, &'static str> {
        if der.len() > AUTHORITY_BYTES_MAX {
            return Err("an authority's certificate is larger than 16 KiB");
        }
        let Ok((rest, cert)) = X509Certificate::from_der(&der) else {
            return Err("an authority is no X.509 certificate");
        };
        let is_ca = matches!(cert.basic_constraints(), Ok(Some(b)) if b.value.ca);
        if !rest.is_empty() || !is_ca {
            return Err("an authority's certificate is not one of a CA");
        }
        let validity = cert.validity();
        let (not_before_secs, not_after_secs) = (validity.not_before.timestamp(), validity.not_after.timestamp());
        let mut roots = RootCertStore::empty();
        roots.add(der.clone()).map_err(|_| "an authority's certificate can't be a trust anchor")?;
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), super::crypto_provider())
            .build()
            .map_err(|_| "an authority's certificate can't be a trust anchor")?;
        Ok(Self { verifier, not_before_secs, not_after_secs, der })
    }

    pub(super) const fn is_valid_at(&self, now_secs: i64) -> bool {
        self.not_before_secs <= now_secs && now_secs <= self.not_after_secs
    }
}

/// What may sign for one trust domain.
#[derive(Default, Clone)]
pub struct TrustBundle {
    pub(super) authorities: Arc<Vec<Authority>>,
    pub(super) jwt: Arc<KeySet>,
}

impl TrustBundle {
    fn fingerprint(&self) -> Vec<u8> {
        let mut ders: Vec<&[u8]> = self.authorities.iter().map(|a| a.der.as_ref()).collect();
        ders.sort_unstable();
        let mut all = self.jwt.fingerprint();
        all.extend(ders.concat());
        all
    }
}

impl std::fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TrustBundle({} X.509, {} JWT)", self.authorities.len(), self.jwt.len())
    }
}

/// Builds the X.509 half of a bundle.
pub(super) fn authorities(
    ders: impl IntoIterator<Item = CertificateDer<'static>>,
) -> Result<Arc<Vec<Authority>>, &'static str> {
    let list: Vec<Authority> = ders.into_iter().map(Authority::new).collect::<Result<_, _>>()?;
    if list.len() > AUTHORITIES_MAX {
        return Err("a trust domain has more than 32 X.509 authorities");
    }
    Ok(Arc::new(list))
}

/// One state of all bundles. Never changes; the next state is another snapshot.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Counts the changes.
    pub generation: u64,
    by_domain: BTreeMap<String, TrustBundle>,
}

impl Snapshot {
    /// The bundle of a trust domain, by its exact name.
    pub fn bundle(&self, trust_domain: &str) -> Option<&TrustBundle> {
        self.by_domain.get(trust_domain)
    }
}

#[derive(Default)]
struct Parts {
    files: BTreeMap<String, TrustBundle>,
    stamps: BTreeMap<String, (Option<Stamp>, u64)>,
    x509: BTreeMap<String, Arc<Vec<Authority>>>,
    jwt: BTreeMap<String, Arc<KeySet>>,
    fingerprint: Vec<u8>,
}

/// The bundles as they are now.
pub struct TrustStore {
    snapshot: ArcSwap<Snapshot>,
    parts: Mutex<Parts>,
    files: BTreeMap<String, PathBuf>,
    trust_domains: BTreeSet<String>,
    clock: Arc<dyn Clock>,
}

impl std::fmt::Debug for TrustStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TrustStore").field("snapshot", &self.snapshot.load()).finish_non_exhaustive()
    }
}

impl TrustStore {
    /// Takes the trust domains that agents may come from, and their bundle files if they come from files. A domain
    /// with a file has that file alone: nothing from the Workload API is added to it.
    pub fn new(
        trust_domains: &[String],
        files: BTreeMap<String, PathBuf>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, IdentityError> {
        if trust_domains.is_empty() || trust_domains.len() > TRUST_DOMAINS_MAX {
            return refuse(Refusal::Configuration, format!("spiffe.trust_domains must name 1 to {TRUST_DOMAINS_MAX}"));
        }
        for name in trust_domains.iter().chain(files.keys()) {
            parse_trust_domain(name)?;
        }
        let trust_domains: BTreeSet<String> = trust_domains.iter().cloned().collect();
        if let Some(other) = files.keys().find(|name| !trust_domains.contains(*name)) {
            return refuse(
                Refusal::Configuration,
                format!("spiffe.bundles has a file for {other}, which is not among spiffe.trust_domains"),
            );
        }
        Ok(Self { snapshot: ArcSwap::default(), parts: Mutex::default(), files, trust_domains, clock })
    }

    /// The bundles as they are now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// True if agents may come from this trust domain.
    pub fn admits(&self, trust_domain: &str) -> bool {
        self.trust_domains.contains(trust_domain)
    }

    /// Looks at the bundle files. One that is gone empties its trust domain at once; one that can't be read (being
    /// written, perhaps) leaves it as it was for [`FILE_STALE_SECS_MAX`]. Gives the problems found.
    pub fn reload_files(&self) -> Vec<IdentityError> {
        let mut problems = Vec::new();
        let mut parts = self.parts.lock();
        let now_ms = self.clock.boot_ms();
        for (domain, path) in &self.files {
            let stamp = Stamp::of(path).ok();
            let (seen, read_ms) = parts.stamps.get(domain).copied().unwrap_or((None, now_ms));
            if stamp.is_some() && stamp == seen {
                parts.stamps.insert(domain.clone(), (stamp, now_ms));
                continue;
            }
            match stamp.map_or(Err("the file is gone or can't be looked at"), |_| read_bundle(path)) {
                Ok(bundle) => {
                    parts.files.insert(domain.clone(), bundle);
                    parts.stamps.insert(domain.clone(), (stamp, now_ms));
                }
                Err(what) => {
                    if stamp.is_none() || now_ms.saturating_sub(read_ms) > FILE_STALE_SECS_MAX * 1000 {
                        parts.files.remove(domain);
                    }
                    let detail = format!("can't use the trust bundle {} of {domain}: {what}", path.display());
                    problems.push(IdentityError::new(Refusal::KeysUnavailable, detail));
                }
            }
        }
        self.publish(&mut parts);
        problems
    }

    /// True if there are files to look at.
    pub fn has_files(&self) -> bool {
        !self.files.is_empty()
    }

    /// Takes all X.509 bundles of the Workload API; what is not among them any more is gone.
    pub(super) fn set_x509(&self, bundles: BTreeMap<String, Arc<Vec<Authority>>>) {
        let mut parts = self.parts.lock();
        parts.x509 = bundles;
        self.publish(&mut parts);
    }

    /// Takes all JWT bundles of the Workload API.
    pub(super) fn set_jwt(&self, bundles: BTreeMap<String, Arc<KeySet>>) {
        let mut parts = self.parts.lock();
        parts.jwt = bundles;
        self.publish(&mut parts);
    }

    fn publish(&self, parts: &mut Parts) {
        let mut by_domain = BTreeMap::new();
        for domain in &self.trust_domains {
            let bundle = if self.files.contains_key(domain) {
                parts.files.get(domain).cloned()
            } else {
                let (x509, jwt) = (parts.x509.get(domain).cloned(), parts.jwt.get(domain).cloned());
                (x509.is_some() || jwt.is_some())
                    .then(|| TrustBundle { authorities: x509.unwrap_or_default(), jwt: jwt.unwrap_or_default() })
            };
            if let Some(bundle) = bundle {
                by_domain.insert(domain.clone(), bundle);
            }
        }
        let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
        for (domain, bundle) in &by_domain {
            let print = bundle.fingerprint();
            context.update(&(domain.len() as u64).to_be_bytes());
            context.update(domain.as_bytes());
            context.update(&(print.len() as u64).to_be_bytes());
            context.update(&print);
        }
        let fingerprint = context.finish().as_ref().to_vec();
        if fingerprint != parts.fingerprint {
            parts.fingerprint = fingerprint;
            let generation = self.snapshot.load().generation + 1;
            tracing::info!(generation, domains = ?by_domain, "trust bundles changed");
            self.snapshot.store(Arc::new(Snapshot { generation, by_domain }));
        }
    }
}

/// Reads a bundle file: a SPIFFE bundle document (Trust Domain and Bundle, section 4) or PEM (X.509 only).
fn read_bundle(path: &Path) -> Result<TrustBundle, &'static str> {
    let size = std::fs::metadata(path).map_err(|_| "the file can't be read")?.len();
    if size > JWKS_BYTES_MAX as u64 {
        return Err("the file is larger than 512 KiB");
    }
    parse_bundle(&std::fs::read(path).map_err(|_| "the file can't be read")?)
}

/// See [`read_bundle`].
pub(super) fn parse_bundle(document: &[u8]) -> Result<TrustBundle, &'static str> {
    if document.trim_ascii_start().first() != Some(&b'{') {
        let ders: Vec<_> = CertificateDer::pem_slice_iter(document)
            .collect::<Result<_, _>>()
            .map_err(|_| "it is neither a SPIFFE bundle document nor PEM certificates")?;
        if ders.is_empty() {
            return Err("it is neither a SPIFFE bundle document nor PEM certificates");
        }
        return Ok(TrustBundle { authorities: authorities(ders)?, jwt: Arc::default() });
    }
    let (mut ders, mut keys) = (Vec::new(), Vec::new());
    for entry in jwks_entries(document).map_err(|_| "it is no SPIFFE bundle document within the limits")? {
        match entry.get("use").and_then(serde_json::Value::as_str) {
            Some("x509-svid") => {
                let chain = entry.get("x5c").and_then(serde_json::Value::as_array);
                let Some([serde_json::Value::String(one)]) = chain.map(Vec::as_slice) else {
                    return Err("an x509-svid key doesn't have exactly one certificate in `x5c`");
                };
                let der = BASE64_STANDARD.decode(one).map_err(|_| "an `x5c` is not base64")?;
                ders.push(CertificateDer::from(der));
            }
            Some("jwt-svid") => {
                keys.extend(VerifyingKey::from_jwk(&entry, KeyUse::JwtSvid).filter(|k| k.kid().is_some()));
            }
            // Other uses are not ours to read (section 4.2.2).
            _ => {}
        }
    }
    Ok(TrustBundle { authorities: authorities(ders)?, jwt: Arc::new(KeySet::new(keys)) })
}
