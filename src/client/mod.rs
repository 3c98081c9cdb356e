//! The typed client of the broker: what `exec`, the command line and helpers use. Knows the wire, not the broker.

pub mod agent;
pub mod exec;
pub mod handover;
pub mod proof;
pub mod prover;
pub mod reviewer;
pub mod signals;
pub mod tls;
pub mod waiting;

use std::path::PathBuf;
use std::time::Duration;

use reqwest::{Method, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::wire::Problem;
use crate::wire::visible::terminal_message;

pub use agent::AgentClient;
pub use proof::Proof;
pub use reviewer::ReviewerClient;

/// Largest answer that is read, in bytes.
pub const ANSWER_BYTES_MAX: usize = 4 << 20;
/// A call without a long poll takes at most this.
const CALL: Duration = Duration::from_secs(30);

/// Why a call did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The broker said no, and why. It goes to terminals: what others wrote into it can't do anything there.
    #[error("{}", terminal_message(&.0.to_string()))]
    Problem(Box<Problem>),
    /// The broker can't be reached.
    #[error("can't reach the broker at {url}: {why}")]
    Unreachable {
        /// Where.
        url: String,
        /// Why.
        why: String,
    },
    /// The answer is not what a broker says.
    #[error("the broker's answer can't be read: {0}")]
    Answer(String),
    /// No identity can be had, now.
    #[error("{0}")]
    Proof(String),
    /// The settings can't be used.
    #[error("{0}")]
    Settings(String),
    /// A file can't be used.
    #[error("can't use {path}: {source}", path = .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl ClientError {
    /// The problem's word (`not-found`, `denied`, …), if the broker said no.
    pub fn word(&self) -> Option<&str> {
        match self {
            Self::Problem(p) => p.kind.rsplit(':').next(),
            _ => None,
        }
    }
    /// True if trying again without any change may succeed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Proof(_) => true,
            Self::Problem(p) => p.status == 503 || p.status == 429,
            _ => false,
        }
    }
}

/// One call: JSON in, JSON out.
pub(crate) struct Call<'a> {
    pub http: &'a reqwest::Client,
    pub base: &'a str,
    pub method: Method,
    pub path: String,
    pub bearer: Option<String>,
    pub key: Option<&'a str>,
    pub wait: Duration,
}

impl Call<'_> {
    pub(crate) async fn send<B: Serialize, T: DeserializeOwned>(
        self,
        body: Option<&B>,
    ) -> Result<(u16, T), ClientError> {
        let url = format!("{}{}", self.base.trim_end_matches('/'), self.path);
        let mut request = self.http.request(self.method, &url).timeout(CALL + self.wait);
        if let Some(token) = &self.bearer {
            request = request.bearer_auth(token);
        }
        if let Some(key) = self.key {
            request = request.header("Idempotency-Key", key);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = request.send().await.map_err(|e| ClientError::Unreachable { url, why: chain(&e) })?;
        answer(response).await
    }
}

/// An error with its causes: `error sending request` alone helps nobody.
fn chain(error: &dyn std::error::Error) -> String {
    let mut out = String::new();
    let mut next = error.source();
    while let Some(cause) = next {
        if !out.is_empty() {
            out.push_str(": ");
        }
        out.push_str(&cause.to_string());
        next = cause.source();
    }
    if out.is_empty() { error.to_string() } else { out }
}

async fn answer<T: DeserializeOwned>(mut response: Response) -> Result<(u16, T), ClientError> {
    let status = response.status();
    let mut bytes = zeroize::Zeroizing::new(Vec::new());
    while let Some(chunk) = response.chunk().await.map_err(|e| ClientError::Answer(chain(&e)))? {
        if bytes.len() + chunk.len() > ANSWER_BYTES_MAX {
            return Err(ClientError::Answer(format!("it is larger than {ANSWER_BYTES_MAX} bytes")));
        }
        bytes.extend_from_slice(&chunk);
    }
    if status.is_success() {
        let value = serde_json::from_slice(&bytes).map_err(|e| ClientError::Answer(e.to_string()))?;
        return Ok((status.as_u16(), value));
    }
    match serde_json::from_slice::<Problem>(&bytes) {
        Ok(problem) => Err(ClientError::Problem(Box::new(problem))),
        Err(_) => Err(ClientError::Answer(format!("HTTP {status} without a problem: is this address a broker's?"))),
    }
}
