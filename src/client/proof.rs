//! How a process proves what it is, from what its surroundings give it. Tokens are fetched anew for each use.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

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
    /// An X.509-SVID (from the Workload API, or from files), by mutual TLS.
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
    pub async fn from_env() -> Result<Self, ClientError> {
        let proof = |e: crate::identity::IdentityError| ClientError::Proof(e.detail().to_owned());
        if let Some(token) = var("COUNTERSIGN_TOKEN") {
            return Ok(Self::Token(Secret::new(token)));
        }
        if let Some(path) = var("COUNTERSIGN_TOKEN_FILE") {
            return Ok(Self::TokenFile(path.into()));
        }
        if let (Some(cert), Some(key)) = (var("COUNTERSIGN_SVID_CERT"), var("COUNTERSIGN_SVID_KEY")) {
            let svid = Svid::from_pem_files(cert.as_ref(), key.as_ref()).map_err(proof)?;
            return Ok(Self::X509(Arc::new(svid)));
        }
        if let Some(endpoint) = var("SPIFFE_ENDPOINT_SOCKET") {
            if var("COUNTERSIGN_MTLS").is_some() {
                let api = WorkloadApi::connect(&endpoint).await.map_err(proof)?;
                return Ok(Self::X509(Arc::new(api.x509_svid().await.map_err(proof)?)));
            }
            return Ok(Self::WorkloadJwt { endpoint });
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

    /// The SVID for mutual TLS, if that is the proof.
    pub fn svid(&self) -> Option<&Svid> {
        match self {
            Self::X509(svid) => Some(svid),
            _ => None,
        }
    }

    /// A bearer token for the audience, if that is the proof.
    pub async fn bearer(&self, audience: &str) -> Result<Option<Secret>, ClientError> {
        match self {
            Self::X509(_) => Ok(None),
            Self::Token(token) => Ok(Some(token.clone())),
            Self::TokenFile(path) => {
                let text = tokio::fs::read_to_string(path)
                    .await
                    .map_err(|source| ClientError::File { path: path.clone(), source })?;
                Ok(Some(Secret::new(text.trim().to_owned())))
            }
            Self::WorkloadJwt { endpoint } => {
                let proof = |e: crate::identity::IdentityError| ClientError::Proof(e.detail().to_owned());
                let api = WorkloadApi::connect(endpoint).await.map_err(proof)?;
                Ok(Some(api.fetch_jwt_svid(audience).await.map_err(proof)?))
            }
            Self::GithubActions { url, token } => Ok(Some(github(url, token, audience).await?)),
        }
    }
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
