//! The agent's side of `/v1`.

use std::path::PathBuf;
use std::time::Duration;

use reqwest::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::core::event::Invocation;
use crate::core::id::{GrantId, TaskName};
use crate::wire::agent::{
    CatalogueView, Credentials, CredentialsRequest, GrantRequest, GrantView, InvocationReport, TaskCompleted,
};

use super::proof::Proof;
use super::prover::Prover;
use super::{Call, ClientError};

/// The longest single long poll, in seconds.
const POLL_SECS: u64 = 30;

/// A broker, as one agent speaks to it.
pub struct AgentClient {
    base: String,
    prover: Prover,
}

impl AgentClient {
    /// To the broker at `base`. `audience` is what the proof must be issued for; default: `base`.
    pub fn new(
        base: &str,
        audience: Option<&str>,
        ca: Option<&std::path::Path>,
        proof: Proof,
    ) -> Result<Self, ClientError> {
        let base = base.trim_end_matches('/').to_owned();
        let audience = audience.map_or_else(|| base.clone(), str::to_owned);
        let prover = Prover::new(proof, audience, ca.map(std::path::Path::to_path_buf))?;
        Ok(Self { base, prover })
    }

    /// From `COUNTERSIGN_URL`, `COUNTERSIGN_CA`, `COUNTERSIGN_AUDIENCE` and what [`Proof::from_env`] finds.
    pub fn from_env() -> Result<Self, ClientError> {
        let base = std::env::var("COUNTERSIGN_URL").map_err(|_| {
            ClientError::Settings(
                "COUNTERSIGN_URL is not set: the broker's address, for example https://broker.corp:8443".to_owned(),
            )
        })?;
        let ca = std::env::var("COUNTERSIGN_CA").ok().map(PathBuf::from);
        let audience = std::env::var("COUNTERSIGN_AUDIENCE").ok();
        Self::new(&base, audience.as_deref(), ca.as_deref(), Proof::from_env()?)
    }

    async fn call<B: Serialize, T: DeserializeOwned>(
        &self,
        method: Method,
        path: String,
        body: Option<&B>,
        key: Option<&str>,
        wait: Duration,
    ) -> Result<T, ClientError> {
        let mut again = true;
        loop {
            let proven = self.prover.get().await?;
            let bearer = proven.bearer.map(|t| t.expose().to_owned());
            let call = Call {
                http: &proven.http,
                base: &self.base,
                method: method.clone(),
                path: path.clone(),
                bearer,
                key,
                wait,
            };
            match call.send(body).await {
                Ok((_, answer)) => return Ok(answer),
                Err(error) => {
                    let refused = matches!(&error, ClientError::Problem(p) if p.status == 401);
                    if refused || matches!(error, ClientError::Unreachable { .. }) {
                        self.prover.doubt().await;
                    }
                    // Refused is not done: the same call again, with what the source gives now.
                    if proven.fresh || !refused || !std::mem::take(&mut again) {
                        return Err(error);
                    }
                }
            }
        }
    }

    async fn post<T: DeserializeOwned>(&self, path: String, body: &impl Serialize) -> Result<T, ClientError> {
        self.call(Method::POST, path, Some(body), None, Duration::ZERO).await
    }

    /// Asks.
    pub async fn request(&self, wanted: &GrantRequest, key: &str) -> Result<GrantView, ClientError> {
        self.call(Method::POST, "/v1/grants".to_owned(), Some(wanted), Some(key), Duration::ZERO).await
    }

    /// Looks.
    pub async fn show(&self, id: GrantId) -> Result<GrantView, ClientError> {
        self.call(Method::GET, format!("/v1/grants/{id}"), None::<&()>, None, Duration::ZERO).await
    }

    /// Waits until the grant is no longer as it was seen, at most `wait`.
    pub async fn wait_change(&self, seen: &GrantView, wait: Duration) -> Result<GrantView, ClientError> {
        let secs = wait.as_secs().clamp(1, POLL_SECS);
        let path = format!("/v1/grants/{}?wait={secs}s&version={}", seen.id, seen.version);
        self.call(Method::GET, path, None::<&()>, None, Duration::from_secs(secs)).await
    }

    /// Waits while the grant is pending, at most `wait`.
    pub async fn wait_decision(&self, mut seen: GrantView, wait: Duration) -> Result<GrantView, ClientError> {
        let deadline = tokio::time::Instant::now() + wait;
        while seen.state == "pending" && tokio::time::Instant::now() < deadline {
            let left = deadline - tokio::time::Instant::now();
            seen = match self.wait_change(&seen, left).await {
                Ok(seen) => seen,
                // A broker that restarts meanwhile hasn't forgotten the request.
                Err(error) if error.is_transient() => {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    continue;
                }
                Err(error) => return Err(error),
            };
        }
        Ok(seen)
    }

    /// Waits until the state is one of `states`, at most `wait`.
    pub async fn wait_state(&self, id: GrantId, states: &[&str], wait: Duration) -> Result<GrantView, ClientError> {
        let deadline = tokio::time::Instant::now() + wait;
        let mut seen = self.show(id).await?;
        while !states.contains(&seen.state.as_str()) && tokio::time::Instant::now() < deadline {
            seen = self.wait_change(&seen, deadline - tokio::time::Instant::now()).await?;
        }
        Ok(seen)
    }

    /// Collects the credentials, once.
    pub async fn credentials(&self, id: GrantId, replace: bool, key: &str) -> Result<Credentials, ClientError> {
        let body = CredentialsRequest { replace };
        let path = format!("/v1/grants/{id}/credentials");
        self.call(Method::POST, path, Some(&body), Some(key), Duration::from_secs(60)).await
    }

    /// Done with a grant.
    pub async fn complete(&self, id: GrantId) -> Result<GrantView, ClientError> {
        self.post(format!("/v1/grants/{id}/complete"), &json!({})).await
    }

    /// Done with a task.
    pub async fn complete_task(&self, task: &TaskName) -> Result<TaskCompleted, ClientError> {
        let task = percent_encoding::utf8_percent_encode(task.as_str(), percent_encoding::NON_ALPHANUMERIC);
        self.post(format!("/v1/tasks/{task}/complete"), &json!({})).await
    }

    /// Takes a pending request back.
    pub async fn cancel(&self, id: GrantId) -> Result<GrantView, ClientError> {
        self.post(format!("/v1/grants/{id}/cancel"), &json!({})).await
    }

    /// A sign of life.
    pub async fn heartbeat(&self, id: GrantId) -> Result<GrantView, ClientError> {
        self.post(format!("/v1/grants/{id}/heartbeat"), &json!({})).await
    }

    /// Says what was done.
    pub async fn report(&self, id: GrantId, invocation: Invocation) -> Result<GrantView, ClientError> {
        self.post(format!("/v1/grants/{id}/invocations"), &InvocationReport { invocation }).await
    }

    /// What may be asked for.
    pub async fn catalogue(&self) -> Result<CatalogueView, ClientError> {
        self.call(Method::GET, "/v1/catalogue".to_owned(), None::<&()>, None, Duration::ZERO).await
    }

    /// The `type` that an entry for this resource must have.
    pub async fn details(&self, wants: &[(String, Vec<String>)]) -> Result<Vec<Value>, ClientError> {
        let catalogue = self.catalogue().await?;
        wants
            .iter()
            .map(|(resource, actions)| {
                let known = catalogue.resources.iter().find(|r| r.identifier == *resource);
                let kind = known.map(|r| r.kind.as_str()).ok_or_else(|| {
                    let names: Vec<&str> = catalogue.resources.iter().map(|r| r.identifier.as_str()).collect();
                    ClientError::Settings(format!(
                        "{resource} is not among what this identity may ask for: {}",
                        if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
                    ))
                })?;
                Ok(json!({ "type": kind, "identifier": resource, "actions": actions }))
            })
            .collect()
    }
}

/// A fresh `Idempotency-Key`.
pub fn fresh_key() -> String {
    hex::encode(crate::keys::random::random_bytes::<16>(&crate::keys::random::SystemRandom))
}
