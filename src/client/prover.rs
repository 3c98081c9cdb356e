//! Proofs kept and renewed: a run may outlive many of them, and its source may be away for a while.
//! From half of its life on a proof is renewed; until it ends, the last one counts.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::Mutex;

use super::proof::{Fetched, Proof};
use super::{ClientError, tls};
use crate::core::secret::Secret;
use crate::time::{Clock, SystemClock};

/// How long a source may take while there is nothing else.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long it may take while the last proof still counts: no sign of life may be late for it.
const RENEWAL: Duration = Duration::from_secs(2);
/// Between two attempts to renew, in milliseconds.
const RETRY_MS: u64 = 1_000;

/// What one call proves itself with.
#[derive(Clone)]
pub struct Proven {
    /// Connections; by mutual TLS, if that is the proof.
    pub http: reqwest::Client,
    /// The token, if that is the proof.
    pub bearer: Option<Secret>,
    /// It was fetched for this very call.
    pub fresh: bool,
}

/// Times are of the boot-time clock: no step of the wall clock makes a proof older or younger.
struct Kept {
    proven: Proven,
    renew_ms: u64,
    ends_ms: u64,
}

/// One identity, towards one broker.
pub struct Prover {
    source: Proof,
    audience: String,
    ca: Option<PathBuf>,
    /// For tokens; a certificate has connections of its own.
    plain: Option<reqwest::Client>,
    kept: Mutex<Option<Kept>>,
}

impl Prover {
    /// For a broker whose certificate the CA signed.
    pub fn new(source: Proof, audience: String, ca: Option<PathBuf>) -> Result<Self, ClientError> {
        let plain = match source {
            Proof::X509(_) | Proof::X509Files { .. } | Proof::WorkloadX509 { .. } => None,
            _ => Some(tls::http(ca.as_deref(), None)?),
        };
        Ok(Self { source, audience, ca, plain, kept: Mutex::default() })
    }

    /// A proof that counts now.
    pub async fn get(&self) -> Result<Proven, ClientError> {
        let mut kept = self.kept.lock().await;
        let now_ms = SystemClock.boot_ms();
        let last = kept.as_mut().filter(|k| now_ms < k.ends_ms);
        if let Some(last) = &last
            && now_ms < last.renew_ms
        {
            return Ok(last.proven.clone());
        }
        let patience = if last.is_some() { RENEWAL } else { PATIENCE };
        let fetched = tokio::time::timeout(patience, self.fetch()).await.unwrap_or_else(|_| {
            Err(ClientError::Proof("the source of our identity gave no answer in time".to_owned()))
        });
        match (fetched, last) {
            (Ok(fresh), _) => Ok(Proven { fresh: true, ..kept.insert(fresh).proven.clone() }),
            (Err(_), Some(last)) => {
                last.renew_ms = now_ms + RETRY_MS;
                Ok(last.proven.clone())
            }
            (Err(error), None) => Err(error),
        }
    }

    /// The broker didn't take it, or can't be reached with it: the next call tries to renew it, whatever its age.
    pub async fn doubt(&self) {
        if let Some(kept) = self.kept.lock().await.as_mut() {
            kept.renew_ms = 0;
        }
    }

    async fn fetch(&self) -> Result<Kept, ClientError> {
        let fetched = self.source.fetch(&self.audience).await?;
        let left_ms = fetched.ends_at().map(|at| at.0.saturating_sub(SystemClock.wall().0));
        let now_ms = SystemClock.boot_ms();
        let (renew_ms, ends_ms) = match (&self.source, left_ms) {
            // Nobody gives another.
            (Proof::Token(_) | Proof::X509(_), _) => (u64::MAX, u64::MAX),
            // A file costs nothing: whatever was put there counts at once.
            (Proof::TokenFile(_), left) => (now_ms, now_ms + left.unwrap_or(0)),
            (_, Some(left)) => (now_ms + (left / 2).max(RETRY_MS), now_ms + left),
            // Its life can't be read: good for this call.
            (_, None) => (now_ms, now_ms),
        };
        let (http, bearer) = match (fetched, &self.plain) {
            (Fetched::Token(token), Some(http)) => (http.clone(), Some(token)),
            (Fetched::Token(token), None) => (tls::http(self.ca.as_deref(), None)?, Some(token)),
            (Fetched::Svid(svid), _) => (tls::http(self.ca.as_deref(), Some(&svid))?, None),
        };
        Ok(Kept { proven: Proven { http, bearer, fresh: false }, renew_ms, ends_ms })
    }
}
