//! The reviewer's side of `/api`, and the session that the command line keeps.

use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::Duration;

use reqwest::Method;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::core::digest::Digest;
use crate::core::event::Selector;
use crate::core::id::GrantId;
use crate::core::secret::Secret;
use crate::core::vote::Verdict;
use crate::wire::agent::GrantView;
use crate::wire::reviewer::{
    AttestOf, AttestRequest, AttestResult, FreezeRequest, FreezeResult, Queue, Review, RevokeRequest, Viewer,
    VoteRequest,
};

use super::{Call, ClientError, tls};

/// A broker, as one reviewer's command line speaks to it.
pub struct ReviewerClient {
    http: reqwest::Client,
    base: String,
    session: Option<Secret>,
}

/// What `login` keeps, in a file of mode 0600.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    url: String,
    ca: Option<PathBuf>,
    session: String,
}

/// What a login was begun with.
#[derive(Debug, Deserialize)]
pub struct LoginBegun {
    /// To be compared in the browser.
    pub code: String,
    /// Where it is confirmed.
    pub url: String,
    poll: String,
    /// Seconds until it is over.
    pub secs: u64,
}

/// Where the session is kept: `$XDG_STATE_HOME/countersign/session.json`, by default below `~/.local/state`.
pub fn session_file() -> Result<PathBuf, ClientError> {
    if let Some(path) = std::env::var_os("COUNTERSIGN_SESSION_FILE") {
        return Ok(path.into());
    }
    let state = std::env::var_os("XDG_STATE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local").join("state")));
    let state =
        state.ok_or_else(|| ClientError::Settings("HOME is not set; set COUNTERSIGN_SESSION_FILE".to_owned()))?;
    Ok(state.join("countersign").join("session.json"))
}

impl ReviewerClient {
    /// To the broker at `base`, with or without a session.
    pub fn new(base: &str, ca: Option<&std::path::Path>, session: Option<Secret>) -> Result<Self, ClientError> {
        Ok(Self { http: tls::http(ca, None)?, base: base.trim_end_matches('/').to_owned(), session })
    }

    /// With the session that `login` kept.
    pub fn stored() -> Result<Self, ClientError> {
        let path = session_file()?;
        let text = std::fs::read_to_string(&path)
            .map_err(|_| ClientError::Settings("not signed in: run `countersign login --url https://…`".to_owned()))?;
        let kept: Kept = serde_json::from_str(&text).map_err(|_| {
            ClientError::Settings(format!("{} can't be read: run `countersign login` again", path.display()))
        })?;
        Self::new(&kept.url, kept.ca.as_deref(), Some(Secret::new(kept.session)))
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: String,
        body: Option<&Value>,
    ) -> Result<(u16, T), ClientError> {
        let bearer = self.session.as_ref().map(|s| s.expose().to_owned());
        let call =
            Call { http: &self.http, base: &self.base, method, path, bearer, key: None, wait: Duration::from_secs(30) };
        call.send(body).await
    }

    async fn post<T: DeserializeOwned>(&self, path: String, body: &impl Serialize) -> Result<T, ClientError> {
        let body = serde_json::to_value(body).map_err(|e| ClientError::Answer(e.to_string()))?;
        Ok(self.call(Method::POST, path, Some(&body)).await?.1)
    }

    async fn get<T: DeserializeOwned>(&self, path: String) -> Result<T, ClientError> {
        Ok(self.call(Method::GET, path, None).await?.1)
    }

    /// Begins a login.
    pub async fn begin_login(&self, from: &str) -> Result<LoginBegun, ClientError> {
        self.post("/api/cli-login".to_owned(), &json!({ "from": from })).await
    }

    /// Waits until somebody confirms it, and keeps the session.
    pub async fn finish_login(&self, begun: &LoginBegun, ca: Option<PathBuf>) -> Result<PathBuf, ClientError> {
        #[derive(Deserialize)]
        struct Given {
            #[serde(default)]
            session: Option<String>,
        }
        loop {
            let body = json!({ "poll": begun.poll });
            let (_, given): (u16, Given) =
                self.call(Method::POST, "/api/cli-login/poll".to_owned(), Some(&body)).await?;
            if let Some(session) = given.session {
                return keep(&Kept { url: self.base.clone(), ca, session });
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// Who is signed in.
    pub async fn me(&self) -> Result<Viewer, ClientError> {
        self.get("/api/me".to_owned()).await
    }
    /// The queue.
    pub async fn queue(&self) -> Result<Queue, ClientError> {
        self.get("/api/queue".to_owned()).await
    }
    /// Everything about one grant.
    pub async fn review(&self, id: GrantId) -> Result<Review, ClientError> {
        self.get(format!("/api/grants/{id}")).await
    }
    /// Votes on exactly that digest.
    pub async fn vote(
        &self,
        id: GrantId,
        verdict: Verdict,
        digest: Digest,
        reason: Option<String>,
    ) -> Result<GrantView, ClientError> {
        self.post(format!("/api/grants/{id}/votes"), &VoteRequest { verdict, digest, reason }).await
    }
    /// Takes a grant away.
    pub async fn revoke(&self, id: GrantId, reason: String) -> Result<GrantView, ClientError> {
        self.post(format!("/api/grants/{id}/revoke"), &RevokeRequest { reason }).await
    }
    /// Attests that the target of these credentials no longer exists.
    pub async fn attest_absent(&self, of: AttestOf, reason: String) -> Result<AttestResult, ClientError> {
        self.post("/api/attestations".to_owned(), &AttestRequest { of, reason }).await
    }
    /// Ends all that matches and refuses new, or only counts.
    pub async fn freeze(&self, selector: Selector, reason: String, dry_run: bool) -> Result<FreezeResult, ClientError> {
        self.post("/api/freezes".to_owned(), &FreezeRequest { selector, reason, dry_run }).await
    }
    /// Lifts a freeze.
    pub async fn lift(&self, id: u64) -> Result<(), ClientError> {
        let _: Value = self.post(format!("/api/freezes/{id}/lift"), &json!({})).await?;
        Ok(())
    }
}

fn keep(kept: &Kept) -> Result<PathBuf, ClientError> {
    let path = session_file()?;
    let fail = |source| ClientError::File { path: path.clone(), source };
    if let Some(folder) = path.parent() {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(fail)?;
    }
    let text = serde_json::to_string(kept).map(zeroize::Zeroizing::new);
    let text = text.map_err(|e| ClientError::Answer(e.to_string()))?;
    // A file of its own that then takes the place: an older one with other rights never holds the session.
    let fresh = path.with_extension(format!("new-{}", std::process::id()));
    let _ = std::fs::remove_file(&fresh);
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh).map_err(fail)?;
    std::io::Write::write_all(&mut file, text.as_bytes()).map_err(fail)?;
    std::fs::rename(&fresh, &path).map_err(fail)?;
    Ok(path)
}
