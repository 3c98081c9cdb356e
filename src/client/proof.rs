//! How a process proves what it is, from what its surroundings give it. Kept and renewed: `prover.rs`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;

use crate::core::id::Timestamp;
use crate::core::secret::Secret;
use crate::identity::spiffe::{Svid, WorkloadApi};

use super::ClientError;

/// Where the proof comes from.
#[derive(Clone)]
pub enum Proof {
    /// JWT-SVIDs from the SPIFFE Workload API.
    WorkloadJwt {
        /// The socket, for example `unix:///run/spire/agent.sock`.
        endpoint: String,
    },
    /// X.509-SVIDs from the SPIFFE Workload API, by mutual TLS.
    WorkloadX509 {
        /// The socket.
        endpoint: String,
    },
    /// An X.509-SVID in PEM files that somebody renews there.
    X509Files {
        /// The chain, the leaf first.
        cert: PathBuf,
        /// Its key.
        key: PathBuf,
    },
    /// An X.509-SVID as it is.
    X509(Arc<Svid>),
    /// A token in a file, read at each use (Kubernetes projects and renews it there).
    TokenFile(PathBuf),
    /// A token as it is.
    Token(Secret),
    /// GitHub Actions' own token endpoint.
    GithubActions {
        /// `ACTIONS_ID_TOKEN_REQUEST_URL`.
        url: String,
        /// `ACTIONS_ID_TOKEN_REQUEST_TOKEN`.
        token: Secret,
    },
}

fn var(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

impl Proof {
    /// From the environment, the most explicit first.
    pub fn from_env() -> Result<Self, ClientError> {
        if let Some(token) = var("COUNTERSIGN_TOKEN") {
            return Ok(Self::Token(Secret::new(token)));
        }
        if let Some(path) = var("COUNTERSIGN_TOKEN_FILE") {
            return Ok(Self::TokenFile(path.into()));
        }
        if let (Some(cert), Some(key)) = (var("COUNTERSIGN_SVID_CERT"), var("COUNTERSIGN_SVID_KEY")) {
            return Ok(Self::X509Files { cert: cert.into(), key: key.into() });
        }
        if let Some(endpoint) = var("SPIFFE_ENDPOINT_SOCKET") {
            return Ok(match var("COUNTERSIGN_MTLS") {
                Some(_) => Self::WorkloadX509 { endpoint },
                None => Self::WorkloadJwt { endpoint },
            });
        }
        if let (Some(url), Some(token)) = (var("ACTIONS_ID_TOKEN_REQUEST_URL"), var("ACTIONS_ID_TOKEN_REQUEST_TOKEN")) {
            return Ok(Self::GithubActions { url, token: Secret::new(token) });
        }
        Err(ClientError::Proof(
            "no identity: set SPIFFE_ENDPOINT_SOCKET (SPIRE, or `countersign dev`), or COUNTERSIGN_TOKEN_FILE (a projected \
             token), or COUNTERSIGN_SVID_CERT and COUNTERSIGN_SVID_KEY; in GitHub Actions add `permissions: id-token: write`"
                .to_owned(),
        ))
    }

    /// What its source gives now, for the audience.
    pub(super) async fn fetch(&self, audience: &str) -> Result<Fetched, ClientError> {
        let proof = |e: crate::identity::IdentityError| ClientError::Proof(e.detail().to_owned());
        let api = async |endpoint: &str| WorkloadApi::connect(endpoint).await.map_err(proof);
        Ok(match self {
            Self::X509(svid) => Fetched::Svid(Arc::clone(svid)),
            Self::X509Files { cert, key } => Fetched::Svid(Arc::new(Svid::from_pem_files(cert, key).map_err(proof)?)),
            Self::WorkloadX509 { endpoint } => {
                Fetched::Svid(Arc::new(api(endpoint).await?.x509_svid().await.map_err(proof)?))
            }
            Self::WorkloadJwt { endpoint } => {
                Fetched::Token(api(endpoint).await?.fetch_jwt_svid(audience).await.map_err(proof)?)
            }
            Self::Token(token) => Fetched::Token(token.clone()),
            Self::TokenFile(path) => {
                let text = tokio::fs::read_to_string(path)
                    .await
                    .map_err(|e| ClientError::Proof(format!("can't read the token in {}: {e}", path.display())))?;
                Fetched::Token(Secret::new(text.trim().to_owned()))
            }
            Self::GithubActions { url, token } => Fetched::Token(github(url, token, audience).await?),
        })
    }
}

/// What a source gave.
pub(super) enum Fetched {
    /// For mutual TLS.
    Svid(Arc<Svid>),
    /// To be sent with each call.
    Token(Secret),
}

impl Fetched {
    /// When it counts no more, if it says so. Only whoever checks it knows for sure.
    pub fn ends_at(&self) -> Option<Timestamp> {
        match self {
            Self::Svid(svid) => svid.ends_at(),
            Self::Token(token) => expiry(token.expose()),
        }
    }
}

/// `exp` of a JWT (RFC 7519, section 4.1.4), not verified: it is our own.
fn expiry(token: &str) -> Option<Timestamp> {
    #[derive(serde::Deserialize)]
    struct Payload {
        exp: u64,
    }
    let payload = BASE64_URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let Payload { exp } = serde_json::from_slice(&payload).ok()?;
    Some(Timestamp(exp.checked_mul(1000)?))
}

/// GitHub's documentation, "OpenID Connect in cloud providers": the audience is a query parameter.
async fn github(url: &str, token: &Secret, audience: &str) -> Result<Secret, ClientError> {
    #[derive(serde::Deserialize)]
    struct Answer {
        value: String,
    }
    let fail = |why: String| ClientError::Proof(format!("GitHub gave no token: {why}"));
    let mut url: url::Url = url.parse().map_err(|_| fail("its address can't be read".to_owned()))?;
    url.query_pairs_mut().append_pair("audience", audience);
    let http = reqwest::Client::builder().timeout(Duration::from_secs(15)).build().map_err(|e| fail(e.to_string()))?;
    let response =
        http.get(url).bearer_auth(token.expose()).send().await.map_err(|e| fail(e.without_url().to_string()))?;
    if !response.status().is_success() {
        return Err(fail(format!("HTTP {}", response.status())));
    }
    let answer: Answer = response.json().await.map_err(|e| fail(e.without_url().to_string()))?;
    Ok(Secret::new(answer.value))
}
