//! The keys of one issuer: from a file that is re-read when it changes, or by discovery. Cached, refreshed for an
//! unknown `kid` no oftener than the limit, one fetch at a time, and closed when they can't be had.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use serde_json::{Map, Value};

use super::error::{IdentityError, Refusal, refuse};
use super::jwt::key::JWKS_BYTES_MAX;
use super::jwt::{KeySet, KeyUse, json};
use super::net::Fetcher;
use crate::time::Clock;

/// Largest discovery document, in bytes.
pub const METADATA_BYTES_MAX: usize = 256 * 1024;
/// Fetched keys count as fresh for so long, in seconds; then they are fetched again in the background.
pub const FRESH_SECS: u64 = 300;
/// While fetching fails, the last keys count for so long, in seconds; then nothing is accepted.
pub const STALE_SECS_MAX: u64 = 3600;
/// Least time between two fetches, whatever the tokens say, in seconds.
pub const REFRESH_SECS_MIN: u64 = 10;
/// A key file is looked at no oftener, in seconds.
pub const FILE_CHECK_SECS: u64 = 1;
/// A key file that is there but can't be read (being written, perhaps): the last keys count for so long, in seconds.
pub const FILE_STALE_SECS_MAX: u64 = 10;

/// What an OIDC issuer says about itself (OpenID Connect Discovery 1.0, section 3), as far as it is used.
#[derive(Debug, Clone)]
pub struct Metadata {
    /// Where its keys are.
    pub jwks_uri: String,
    members: Map<String, Value>,
}

impl Metadata {
    /// A text member.
    pub fn text(&self, member: &str) -> Option<&str> {
        self.members.get(member)?.as_str()
    }
    /// True if a boolean member is there and true.
    pub fn is_true(&self, member: &str) -> bool {
        self.members.get(member) == Some(&Value::Bool(true))
    }
    /// True if a list member is absent, or holds the text.
    pub fn allows(&self, member: &str, text: &str) -> bool {
        self.members.get(member).is_none_or(|list| list.as_array().is_some_and(|l| l.iter().any(|v| v == text)))
    }
}

/// Fetches an issuer's discovery document; its `issuer` must be exactly the one configured.
pub async fn discover(fetcher: &Fetcher, issuer: &str) -> Result<Metadata, IdentityError> {
    let url = format!("{}/.well-known/openid-configuration", issuer.strip_suffix('/').unwrap_or(issuer));
    let document = fetcher.get(&url, METADATA_BYTES_MAX).await?;
    let Some(members) = json::strict_object(&document, json::JSON_DEPTH_MAX) else {
        return refuse(Refusal::KeysUnavailable, "the issuer's discovery document is not one JSON object");
    };
    if members.get("issuer").and_then(Value::as_str) != Some(issuer) {
        return refuse(Refusal::KeysUnavailable, "the discovery document names another issuer than the configured one");
    }
    let Some(jwks_uri) = members.get("jwks_uri").and_then(Value::as_str).map(str::to_owned) else {
        return refuse(Refusal::KeysUnavailable, "the issuer's discovery document has no `jwks_uri`");
    };
    Ok(Metadata { jwks_uri, members })
}

/// Where keys come from.
#[derive(Debug)]
pub enum Source {
    /// A JWKS file.
    File(PathBuf),
    /// Discovery.
    Discovery {
        /// The exact issuer.
        issuer: String,
        /// The client that reaches it.
        fetcher: Fetcher,
    },
}

/// What a file looked like when it was read: a change of any of these means that it is read again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp(std::time::SystemTime, u64, u64);

impl Stamp {
    /// Looks at the file.
    pub fn of(path: &Path) -> std::io::Result<Self> {
        use std::os::unix::fs::MetadataExt as _;
        let meta = std::fs::metadata(path)?;
        Ok(Self(meta.modified()?, meta.len(), meta.ino()))
    }
}

#[derive(Debug)]
struct Held {
    keys: Arc<KeySet>,
    metadata: Option<Arc<Metadata>>,
    at_ms: u64,
    stamp: Option<Stamp>,
}

#[derive(Debug, Default)]
struct LastTry {
    at_ms: Option<u64>,
    error: Option<IdentityError>,
}

/// The keys of one issuer. Cloning shares them.
#[derive(Clone)]
pub struct IssuerKeys(Arc<Inner>);

struct Inner {
    source: Source,
    clock: Arc<dyn Clock>,
    held: ArcSwapOption<Held>,
    last: Mutex<LastTry>,
    flight: tokio::sync::Mutex<()>,
}

impl std::fmt::Debug for IssuerKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IssuerKeys").field("source", &self.0.source).finish_non_exhaustive()
    }
}

impl IssuerKeys {
    /// Fetches nothing yet.
    pub fn new(source: Source, clock: Arc<dyn Clock>) -> Self {
        Self(Arc::new(Inner {
            source,
            clock,
            held: ArcSwapOption::empty(),
            last: Mutex::default(),
            flight: tokio::sync::Mutex::default(),
        }))
    }

    /// The keys as they are known; fetched when none are, refused when they are too old.
    pub async fn current(&self) -> Result<Arc<KeySet>, IdentityError> {
        Ok(Arc::clone(&self.held().await?.keys))
    }

    /// The issuer's metadata; `None` for keys from a file.
    pub async fn metadata(&self) -> Result<Option<Arc<Metadata>>, IdentityError> {
        Ok(self.held().await?.metadata.clone())
    }

    /// Keys newer than `seen`, for a token whose `kid` those don't have. `None` if the rate limit or the issuer gives
    /// none: the token is refused then, and no flood of invented `kid`s becomes a flood of fetches.
    pub async fn newer_than(&self, seen: &Arc<KeySet>) -> Option<Arc<KeySet>> {
        let inner = &self.0;
        let newer = |held: &Held| (!Arc::ptr_eq(&held.keys, seen)).then(|| Arc::clone(&held.keys));
        if let Some(keys) = inner.held.load_full().as_deref().and_then(newer) {
            return Some(keys);
        }
        let _flight = inner.flight.lock().await;
        if let Some(keys) = inner.held.load_full().as_deref().and_then(newer) {
            return Some(keys);
        }
        if inner.must_wait() {
            return None;
        }
        inner.fetch().await.ok().as_deref().and_then(newer)
    }

    async fn held(&self) -> Result<Arc<Held>, IdentityError> {
        let inner = &self.0;
        if let Some(held) = inner.held.load_full() {
            let age_ms = inner.age_ms(&held);
            if age_ms <= inner.fresh_secs() * 1000 {
                return Ok(held);
            }
            if age_ms <= inner.stale_secs_max() * 1000 && matches!(inner.source, Source::Discovery { .. }) {
                self.refresh_in_background();
                return Ok(held);
            }
        }
        let _flight = inner.flight.lock().await;
        // Whoever held the flight before may have brought them.
        if let Some(held) = inner.held.load_full()
            && inner.age_ms(&held) <= inner.fresh_secs() * 1000
        {
            return Ok(held);
        }
        match &inner.source {
            Source::File(path) => inner.read_file(path),
            Source::Discovery { .. } => {
                if inner.must_wait() {
                    let last = inner.last.lock().error.clone();
                    let none = || IdentityError::new(Refusal::KeysUnavailable, "the issuer's keys are too old");
                    return Err(last.unwrap_or_else(none));
                }
                inner.fetch().await
            }
        }
    }

    fn refresh_in_background(&self) {
        let inner = Arc::clone(&self.0);
        if inner.must_wait() {
            return;
        }
        tokio::spawn(async move {
            let Ok(_flight) = inner.flight.try_lock() else { return };
            if !inner.must_wait()
                && let Err(error) = inner.fetch().await
            {
                tracing::warn!(source = ?inner.source, %error, "can't refresh an issuer's keys; the last ones count on");
            }
        });
    }
}

impl Inner {
    const fn fresh_secs(&self) -> u64 {
        match self.source {
            Source::File(_) => FILE_CHECK_SECS,
            Source::Discovery { .. } => FRESH_SECS,
        }
    }

    const fn stale_secs_max(&self) -> u64 {
        match self.source {
            Source::File(_) => FILE_STALE_SECS_MAX,
            Source::Discovery { .. } => STALE_SECS_MAX,
        }
    }

    fn age_ms(&self, held: &Held) -> u64 {
        self.clock.boot_ms().saturating_sub(held.at_ms)
    }

    fn must_wait(&self) -> bool {
        if matches!(self.source, Source::File(_)) {
            return false;
        }
        let last = self.last.lock().at_ms;
        last.is_some_and(|at| self.clock.boot_ms().saturating_sub(at) < REFRESH_SECS_MIN * 1000)
    }

    /// Brings new keys. The caller holds the flight.
    async fn fetch(&self) -> Result<Arc<Held>, IdentityError> {
        let (issuer, fetcher) = match &self.source {
            Source::File(path) => return self.read_file(path),
            Source::Discovery { issuer, fetcher } => (issuer, fetcher),
        };
        *self.last.lock() = LastTry { at_ms: Some(self.clock.boot_ms()), error: None };
        let fetched = async {
            let metadata = discover(fetcher, issuer).await?;
            let document = fetcher.get(&metadata.jwks_uri, JWKS_BYTES_MAX).await?;
            Ok((metadata, read_jwks(&document)?))
        };
        let result: Result<_, IdentityError> = fetched.await;
        match result {
            Ok((metadata, keys)) => {
                let held = Held { keys, metadata: Some(Arc::new(metadata)), at_ms: self.clock.boot_ms(), stamp: None };
                Ok(self.keep(held))
            }
            Err(error) => {
                // Whatever went wrong on the way, to the token's bearer it means: not now.
                let error = IdentityError::new(Refusal::KeysUnavailable, error.detail());
                self.last.lock().error = Some(error.clone());
                Err(error)
            }
        }
    }

    fn read_file(&self, path: &Path) -> Result<Arc<Held>, IdentityError> {
        let old = self.held.load_full();
        let at_ms = self.clock.boot_ms();
        let unavailable = |what: &dyn std::fmt::Display| {
            IdentityError::new(Refusal::KeysUnavailable, format!("can't use the key file {}: {what}", path.display()))
        };
        // A file that is gone means: no keys, at once.
        let stamp = Stamp::of(path).map_err(|e| {
            self.held.store(None);
            unavailable(&e)
        })?;
        if let Some(held) = &old
            && held.stamp == Some(stamp)
        {
            return Ok(self.keep(Held { keys: Arc::clone(&held.keys), metadata: None, at_ms, stamp: Some(stamp) }));
        }
        let read = if stamp.1 > JWKS_BYTES_MAX as u64 {
            Err(unavailable(&"it is larger than 512 KiB"))
        } else {
            std::fs::read(path).map_err(|e| unavailable(&e)).and_then(|d| read_jwks(&d).map_err(|e| unavailable(&e)))
        };
        match (read, old) {
            (Ok(keys), _) => Ok(self.keep(Held { keys, metadata: None, at_ms, stamp: Some(stamp) })),
            (Err(error), Some(held)) if self.age_ms(&held) <= self.stale_secs_max() * 1000 => {
                tracing::warn!(%error, "the last keys count for a few seconds on");
                Ok(held)
            }
            (Err(error), _) => Err(error),
        }
    }

    fn keep(&self, held: Held) -> Arc<Held> {
        let held = Arc::new(held);
        self.held.store(Some(Arc::clone(&held)));
        held
    }
}

fn read_jwks(document: &[u8]) -> Result<Arc<KeySet>, IdentityError> {
    match KeySet::from_jwks(document, KeyUse::Signature) {
        Ok(keys) if keys.is_empty() => {
            refuse(Refusal::KeysUnavailable, "the issuer's key document holds no usable signature key")
        }
        Ok(keys) => Ok(Arc::new(keys)),
        Err(e) => refuse(Refusal::KeysUnavailable, format!("the issuer's keys: {e}")),
    }
}
