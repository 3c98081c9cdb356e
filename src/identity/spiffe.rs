//! The only file that knows the `spiffe` crate: SPIFFE IDs, and the Workload API as a client of it
//! (bundles that are watched, SVIDs of our own). Its types stop here.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use spiffe::{JwtBundleSet, SpiffeId, TrustDomain, WorkloadApiClient, X509BundleSet};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::error::{IdentityError, Refusal, refuse};
use super::jwt::key::JWKS_KEYS_MAX;
use super::jwt::{KeySet, KeyUse, VerifyingKey, json};
use super::keyset::FILE_CHECK_SECS;
use super::trust::{TrustStore, authorities};
use crate::core::id::Timestamp;
use crate::core::secret::Secret;
use crate::time::Clock;

/// Without contact to the Workload API its bundles count for so long, in seconds; then they are dropped.
pub const CONTACT_SECS_MAX: u64 = 3600;
/// The Workload API must answer a call within, in seconds.
pub const ANSWER_SECS_MAX: u64 = 10;
/// Between the first two attempts to reach the Workload API, in milliseconds.
const RETRY_MS_MIN: u64 = 100;
/// Between two attempts to reach the Workload API, at most, in milliseconds.
pub const RETRY_MS_MAX: u64 = 5_000;
/// Longest SPIFFE ID, in bytes (SPIFFE-ID, section 2.3).
pub const SPIFFE_ID_BYTES_MAX: usize = 2048;

/// A SPIFFE ID in its one canonical spelling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpiffeName {
    /// All of it.
    pub id: String,
    /// The trust domain's name.
    pub trust_domain: String,
    /// The path; empty for the ID of a trust domain.
    pub path: String,
}

/// Reads a SPIFFE ID. Spellings that mean the same in the standard but differ in bytes (`SPIFFE://Corp`) are
/// refused, not normalised (regression A15).
pub fn parse_spiffe_id(text: &str) -> Result<SpiffeName, IdentityError> {
    if text.len() <= SPIFFE_ID_BYTES_MAX
        && let Ok(id) = SpiffeId::new(text)
        && id.to_string() == text
    {
        let trust_domain = id.trust_domain_name().to_owned();
        return Ok(SpiffeName { id: text.to_owned(), trust_domain, path: id.path().to_owned() });
    }
    refuse(Refusal::Claim, "the identity is not a SPIFFE ID (`spiffe://trust-domain/path`, lower-case trust domain)")
}

/// Checks the name of a trust domain as configured.
pub fn parse_trust_domain(name: &str) -> Result<(), IdentityError> {
    match TrustDomain::new(name) {
        Ok(domain) if domain.as_str() == name => Ok(()),
        _ => refuse(Refusal::Configuration, "a trust domain is a bare lower-case name such as `corp.example`"),
    }
}

fn unreachable_api(error: impl std::fmt::Display) -> IdentityError {
    IdentityError::new(Refusal::KeysUnavailable, format!("the SPIFFE Workload API: {error}"))
}

async fn within<T, E: std::fmt::Display>(call: impl Future<Output = Result<T, E>>) -> Result<T, IdentityError> {
    match tokio::time::timeout(Duration::from_secs(ANSWER_SECS_MAX), call).await {
        Ok(result) => result.map_err(unreachable_api),
        Err(_) => Err(unreachable_api(format!("no answer within {ANSWER_SECS_MAX} s"))),
    }
}

/// Keeps `store` true to its files and to the Workload API until `stop`. Returns the tasks' handles.
pub fn watch_bundles(
    store: &Arc<TrustStore>,
    workload_api: Option<&str>,
    clock: &Arc<dyn Clock>,
    stop: &CancellationToken,
) -> Vec<tokio::task::JoinHandle<()>> {
    let mut tasks = Vec::new();
    for problem in store.reload_files() {
        tracing::error!(%problem, "trust bundle");
    }
    if store.has_files() {
        let (store, clock, stop) = (Arc::clone(store), Arc::clone(clock), stop.clone());
        tasks.push(tokio::spawn(async move {
            while !stopped(&stop, clock.sleep(Duration::from_secs(FILE_CHECK_SECS))).await {
                for problem in store.reload_files() {
                    tracing::warn!(%problem, "trust bundle");
                }
            }
        }));
    }
    if let Some(endpoint) = workload_api {
        for kind in [Kind::X509, Kind::Jwt] {
            let follow = Follow {
                kind,
                endpoint: endpoint.to_owned(),
                store: Arc::clone(store),
                clock: Arc::clone(clock),
                stop: stop.clone(),
            };
            tasks.push(tokio::spawn(follow.run()));
        }
    }
    tasks
}

/// True if it was stopped before the future was done.
async fn stopped(stop: &CancellationToken, future: impl Future<Output = ()>) -> bool {
    tokio::select! {
        () = stop.cancelled() => true,
        () = future => false,
    }
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    X509,
    Jwt,
}

struct Follow {
    kind: Kind,
    endpoint: String,
    store: Arc<TrustStore>,
    clock: Arc<dyn Clock>,
    stop: CancellationToken,
}

impl Follow {
    async fn run(self) {
        // The last moment at which what we hold was known to be current.
        let mut current_ms = self.clock.boot_ms();
        let mut pause_ms = RETRY_MS_MIN;
        loop {
            let mut good = false;
            let outcome = tokio::select! {
                () = self.stop.cancelled() => return,
                outcome = self.follow(&mut good) => outcome,
            };
            if let Err(error) = outcome {
                tracing::warn!(kind = ?self.kind, %error, "trust bundles; trying again");
            }
            if good {
                current_ms = self.clock.boot_ms();
                pause_ms = RETRY_MS_MIN;
            }
            // The last bundles count on for a while, but not for ever: their removal could not reach us.
            if self.clock.boot_ms().saturating_sub(current_ms) > CONTACT_SECS_MAX * 1000 {
                match self.kind {
                    Kind::X509 => self.store.set_x509(BTreeMap::new()),
                    Kind::Jwt => self.store.set_jwt(BTreeMap::new()),
                }
            }
            if stopped(&self.stop, self.clock.sleep(Duration::from_millis(pause_ms))).await {
                return;
            }
            pause_ms = (pause_ms * 2).min(RETRY_MS_MAX);
        }
    }

    /// Follows one stream to its end. `good` is true once an update has come.
    async fn follow(&self, good: &mut bool) -> Result<(), IdentityError> {
        let client = within(WorkloadApiClient::connect_to(&self.endpoint)).await?;
        match self.kind {
            Kind::X509 => {
                let mut updates = within(client.stream_x509_bundles()).await?;
                while let Some(update) = updates.next().await {
                    let update = update.map_err(unreachable_api)?;
                    self.store.set_x509(x509_bundles(&update, &self.store));
                    *good = true;
                }
            }
            Kind::Jwt => {
                let mut updates = within(client.stream_jwt_bundles()).await?;
                while let Some(update) = updates.next().await {
                    self.store.set_jwt(jwt_bundles(&update.map_err(unreachable_api)?, &self.store));
                    *good = true;
                }
            }
        }
        Err(unreachable_api("the stream ended"))
    }
}

type X509Bundles = BTreeMap<String, Arc<Vec<super::trust::Authority>>>;

/// Each admitted domain on its own: what is wrong with one bundle (a partner's, say) takes nothing from the others,
/// and lets nothing that was taken out of them live on (regression A10). A bundle that can't be used is empty.
fn x509_bundles(set: &X509BundleSet, store: &TrustStore) -> X509Bundles {
    let admitted = set.iter().filter(|(domain, _)| store.admits(domain.as_str()));
    let mut bundles = BTreeMap::new();
    for (domain, bundle) in admitted {
        let ders = bundle.authorities().iter().map(|c| CertificateDer::from(c.as_bytes().to_vec()));
        let list = authorities(ders).unwrap_or_else(|problem| {
            tracing::warn!(%domain, problem, "trust bundle: nobody of this domain is believed until it is mended");
            Arc::default()
        });
        bundles.insert(domain.as_str().to_owned(), list);
    }
    bundles
}

fn jwt_bundles(set: &JwtBundleSet, store: &TrustStore) -> BTreeMap<String, Arc<KeySet>> {
    let keys = |bundle: &spiffe::JwtBundle| {
        KeySet::new(bundle.jwt_authorities().take(JWKS_KEYS_MAX).filter_map(|authority| {
            let jwk = json::strict_object(authority.jwk_json(), json::JSON_DEPTH_MAX)?;
            VerifyingKey::from_jwk(&jwk, KeyUse::JwtAuthority).filter(|key| key.kid().is_some())
        }))
    };
    set.iter()
        .filter(|(domain, _)| store.admits(domain.as_str()))
        .map(|(domain, bundle)| (domain.as_str().to_owned(), Arc::new(keys(bundle))))
        .collect()
}

/// An X.509-SVID of our own, with its key.
pub struct Svid {
    /// The SPIFFE ID.
    pub spiffe_id: String,
    /// The leaf, then the intermediates.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's private key.
    pub key: PrivateKeyDer<'static>,
}

impl Clone for Svid {
    fn clone(&self) -> Self {
        Self { spiffe_id: self.spiffe_id.clone(), chain: self.chain.clone(), key: self.key.clone_key() }
    }
}

impl std::fmt::Debug for Svid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Svid({}, key …)", self.spiffe_id)
    }
}

impl Svid {
    /// Reads an SVID from PEM files: a chain and its key.
    pub fn from_pem_files(chain: &std::path::Path, key: &std::path::Path) -> Result<Self, IdentityError> {
        let bad = |path: &std::path::Path, what: &dyn std::fmt::Display| {
            IdentityError::new(Refusal::Configuration, format!("can't use the SVID in {}: {what}", path.display()))
        };
        let certs: Vec<_> = CertificateDer::pem_file_iter(chain)
            .and_then(Iterator::collect)
            .map_err(|_| bad(chain, &"no PEM certificates can be read"))?;
        let key = PrivateKeyDer::from_pem_file(key).map_err(|_| bad(key, &"no PEM private key can be read"))?;
        let leaf = certs.first().ok_or_else(|| bad(chain, &"it holds no certificate"))?;
        let name = super::svid::leaf_name(leaf).map_err(|e| bad(chain, &e))?;
        Ok(Self { spiffe_id: name.id, chain: certs, key })
    }

    /// When the leaf counts no more.
    pub fn ends_at(&self) -> Option<Timestamp> {
        let (_, leaf) = x509_parser::parse_x509_certificate(self.chain.first()?).ok()?;
        u64::try_from(leaf.validity().not_after.timestamp()).ok().map(|secs| Timestamp(secs.saturating_mul(1000)))
    }

    fn of(svid: &spiffe::X509Svid) -> Self {
        Self {
            spiffe_id: svid.spiffe_id().to_string(),
            chain: svid.cert_chain().iter().map(|c| CertificateDer::from(c.as_bytes().to_vec())).collect(),
            key: PrivatePkcs8KeyDer::from(svid.private_key().as_bytes().to_vec()).into(),
        }
    }
}

/// The Workload API, asked for SVIDs of our own.
#[derive(Clone)]
pub struct WorkloadApi(WorkloadApiClient);

impl std::fmt::Debug for WorkloadApi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WorkloadApi")
    }
}

impl WorkloadApi {
    /// Connects, for example to `unix:///run/spire/agent.sock` (what `SPIFFE_ENDPOINT_SOCKET` holds).
    pub async fn connect(endpoint: &str) -> Result<Self, IdentityError> {
        Ok(Self(within(WorkloadApiClient::connect_to(endpoint)).await?))
    }

    /// The default X.509-SVID, now.
    pub async fn x509_svid(&self) -> Result<Svid, IdentityError> {
        Ok(Svid::of(&within(self.0.fetch_x509_svid()).await?))
    }

    /// The authorities (DER) of our own trust domain: what our peers there are verified with.
    pub async fn x509_authorities(&self) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
        let context = within(self.0.fetch_x509_context()).await?;
        let svid = context.default_svid().ok_or_else(|| unreachable_api("no SVID was given"))?;
        let bundle = context.bundle_set().get(svid.spiffe_id().trust_domain());
        let bundle = bundle.ok_or_else(|| unreachable_api("no bundle of our own trust domain was given"))?;
        Ok(bundle.authorities().iter().map(|c| CertificateDer::from(c.as_bytes().to_vec())).collect())
    }

    /// A JWT-SVID for one audience.
    pub async fn fetch_jwt_svid(&self, audience: &str) -> Result<Secret, IdentityError> {
        Ok(Secret::new(within(self.0.fetch_jwt_token([audience], None)).await?))
    }
}

/// Our own X.509-SVID, kept fresh until `stop`. The first value is `None` until one has arrived.
pub fn watch_svid(
    endpoint: &str,
    clock: Arc<dyn Clock>,
    stop: CancellationToken,
) -> watch::Receiver<Option<Arc<Svid>>> {
    let (sender, receiver) = watch::channel(None);
    let endpoint = endpoint.to_owned();
    tokio::spawn(async move {
        let follow = async || -> Result<(), IdentityError> {
            let client = within(WorkloadApiClient::connect_to(&endpoint)).await?;
            let mut updates = within(client.stream_x509_svids()).await?;
            while let Some(update) = updates.next().await {
                sender.send_replace(Some(Arc::new(Svid::of(&update.map_err(unreachable_api)?))));
            }
            Err(unreachable_api("the stream ended"))
        };
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Err(error) = follow() => tracing::warn!(%error, "own SVID; trying again"),
            }
            if stopped(&stop, clock.sleep(Duration::from_secs(1))).await {
                return;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a15_one_spelling_of_a_spiffe_id() {
        let name = parse_spiffe_id("spiffe://corp.example/agent/Ops-7").unwrap();
        assert_eq!((name.trust_domain.as_str(), name.path.as_str()), ("corp.example", "/agent/Ops-7"));
        for other in [
            "SPIFFE://corp.example/a",
            "spiffe://Corp.example/a",
            "spiffe://corp.example/a/",
            "spiffe://corp.example//a",
            "spiffe://corp.example/a/../b",
            "spiffe://corp.example/./a",
            "spiffe://corp.example/%61",
            "spiffe://corp.example:8443/a",
            "spiffe://user@corp.example/a",
            "spiffe://corp.example/a?b",
            "spiffe://corp.example/a#b",
            " spiffe://corp.example/a",
            "spiffe://corp.example/a ",
            "spiffe:///a",
            "spiffe://corp.ex\u{430}mple/a",
            "spiffe://corp.example/\u{e4}",
            "https://corp.example/a",
            "",
            "spiffe://",
        ] {
            assert!(parse_spiffe_id(other).is_err(), "{other:?}");
        }
        let long = format!("spiffe://corp/{}", "a".repeat(SPIFFE_ID_BYTES_MAX));
        assert!(parse_spiffe_id(&long).is_err());
        for bad in ["", "Corp", "spiffe://corp", "corp/", "corp:1", "c orp"] {
            assert!(parse_trust_domain(bad).is_err(), "{bad:?}");
        }
    }
}
