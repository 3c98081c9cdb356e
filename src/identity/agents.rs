//! The room's door for agents: a bearer token or a client certificate → a verified agent. What is unverified only
//! chooses the verifier; each verifier believes its own keys alone.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use rustls_pki_types::CertificateDer;
use tokio_util::sync::CancellationToken;

use super::VerifiedAgent;
use super::error::{IdentityError, Refusal, refuse};
use super::jwt::Token;
use super::net::{Lookup, system_lookup};
use super::oidc::{ISSUERS_MAX, OidcIssuer};
use super::spiffe::watch_bundles;
use super::svid::SpiffeVerifier;
use super::trust::TrustStore;
use crate::config::{IssuerConfig, SpiffeConfig};
use crate::core::id::Timestamp;
use crate::time::Clock;

/// Everybody who is believed.
pub struct Identities {
    spiffe: Option<Arc<SpiffeVerifier>>,
    workload_api: Option<String>,
    issuers: BTreeMap<String, OidcIssuer>,
    clock: Arc<dyn Clock>,
}

impl std::fmt::Debug for Identities {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identities")
            .field("spiffe", &self.spiffe)
            .field("issuers", &self.issuers)
            .finish_non_exhaustive()
    }
}

impl Identities {
    /// Checks the configuration and builds the verifiers; every problem is found in one pass. Relative files are
    /// looked for beside `base`. Nothing is fetched until [`Self::start`] or the first token.
    pub fn new(
        spiffe: Option<&SpiffeConfig>,
        issuers: &[IssuerConfig],
        base: &Path,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, Vec<IdentityError>> {
        Self::with_lookup(spiffe, issuers, base, clock, system_lookup())
    }

    /// As [`Self::new`], with names resolved by `lookup`.
    pub fn with_lookup(
        spiffe: Option<&SpiffeConfig>,
        issuers: &[IssuerConfig],
        base: &Path,
        clock: Arc<dyn Clock>,
        lookup: Lookup,
    ) -> Result<Self, Vec<IdentityError>> {
        let mut problems = Vec::new();
        let mut by_issuer = BTreeMap::new();
        if issuers.len() > ISSUERS_MAX {
            problems.push(IdentityError::new(Refusal::Configuration, format!("more than {ISSUERS_MAX} issuers")));
        }
        for config in issuers {
            match OidcIssuer::new(config, base, Arc::clone(&clock), Arc::clone(&lookup)) {
                Ok(issuer) => {
                    if by_issuer.insert(config.issuer.clone(), issuer).is_some() {
                        let what = format!("issuer {}: configured twice; merge the two", config.issuer);
                        problems.push(IdentityError::new(Refusal::Configuration, what));
                    }
                }
                Err(problem) => problems.push(problem),
            }
        }
        let verifier =
            spiffe.map(|config| spiffe_verifier(config, base, &clock)).transpose().unwrap_or_else(|problem| {
                problems.push(problem);
                None
            });
        if !problems.is_empty() {
            return Err(problems);
        }
        let workload_api = spiffe.and_then(|config| config.workload_api.clone());
        Ok(Self { spiffe: verifier, workload_api, issuers: by_issuer, clock })
    }

    /// Starts watching the trust bundles; they are kept true until `stop`. Needs a tokio runtime.
    pub fn start(&self, stop: &CancellationToken) -> Vec<tokio::task::JoinHandle<()>> {
        self.spiffe.as_ref().map_or_else(Vec::new, |verifier| {
            watch_bundles(verifier.store(), self.workload_api.as_deref(), &self.clock, stop)
        })
    }

    /// The SPIFFE side, if configured: the listener for client certificates is built from it.
    pub fn spiffe(&self) -> Option<&Arc<SpiffeVerifier>> {
        self.spiffe.as_ref()
    }

    /// Verifies a bearer token: an OIDC token of a configured issuer, or else a JWT-SVID.
    pub async fn authenticate_bearer(&self, token: &str, now: Timestamp) -> Result<VerifiedAgent, IdentityError> {
        let peeked = Token::parse(token)?;
        if let Some(issuer) = peeked.unverified("iss").and_then(|iss| self.issuers.get(iss)) {
            return issuer.verify(token, now).await;
        }
        let is_svid = peeked.unverified("sub").is_some_and(|sub| sub.starts_with("spiffe://"));
        match &self.spiffe {
            Some(verifier) if is_svid => verifier.agent_from_jwt(token, now),
            Some(_) => refuse(
                Refusal::UnknownIssuer,
                "the token's `iss` is none of the configured issuers, and its `sub` is no SPIFFE ID",
            ),
            None => refuse(Refusal::UnknownIssuer, "the token's `iss` is none of the configured issuers"),
        }
    }

    /// Verifies a client certificate's chain (leaf first). For every request, not once a connection: see
    /// [`SpiffeVerifier::agent_from_certificate`].
    pub fn authenticate_certificate(
        &self,
        chain: &[CertificateDer<'_>],
        now: Timestamp,
    ) -> Result<VerifiedAgent, IdentityError> {
        match &self.spiffe {
            Some(verifier) => verifier.agent_from_certificate(chain, now),
            None => refuse(Refusal::UnknownIssuer, "client certificates are not accepted: [spiffe] is not configured"),
        }
    }
}

fn spiffe_verifier(
    config: &SpiffeConfig,
    base: &Path,
    clock: &Arc<dyn Clock>,
) -> Result<Arc<SpiffeVerifier>, IdentityError> {
    if config.workload_api.is_none() && config.bundles.is_empty() {
        return refuse(
            Refusal::Configuration,
            "[spiffe] has neither workload_api nor bundles: nobody could be verified",
        );
    }
    let files = config.bundles.iter().map(|(domain, file)| (domain.clone(), base.join(file))).collect();
    let store = TrustStore::new(&config.trust_domains, files, Arc::clone(clock))?;
    Ok(Arc::new(SpiffeVerifier::new(Arc::new(store), &config.audience, config.tier_max.clone())?))
}
