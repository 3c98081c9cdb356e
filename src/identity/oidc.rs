//! OIDC issuers of agents' tokens: the allow-list, one verifier for each, and what the presets know of GitHub
//! Actions, GitLab and Kubernetes. Identity is issuer + subject, byte by byte.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::claims::{ClaimPath, Mapping, Rules};
use super::error::{IdentityError, Refusal, refuse};
use super::jwt::{Algorithm, Expected, Token, TokenKind};
use super::keyset::{IssuerKeys, Source};
use super::net::{Fetcher, Lookup, Reach};
use super::{Method, VerifiedAgent};
use crate::config::{IssuerConfig, IssuerPreset};
use crate::core::id::{AgentId, TierName, Timestamp};
use crate::core::request::Account;
use crate::time::Clock;

/// Most issuers in one configuration.
pub const ISSUERS_MAX: usize = 64;
/// A token's life can't be allowed to be longer, in seconds.
pub const TOKEN_LIFE_SECS_CAP: u64 = 7 * 24 * 3600;

type Preset = &'static [(&'static str, &'static [&'static str])];

const GITHUB: Preset = &[
    ("repository", &["repository"]),
    ("repository_id", &["repository_id"]),
    ("repository_owner", &["repository_owner"]),
    ("repository_owner_id", &["repository_owner_id"]),
    ("repository_visibility", &["repository_visibility"]),
    ("ref", &["ref"]),
    ("ref_type", &["ref_type"]),
    ("sha", &["sha"]),
    ("workflow_ref", &["workflow_ref"]),
    ("job_workflow_ref", &["job_workflow_ref"]),
    ("environment", &["environment"]),
    ("event_name", &["event_name"]),
    ("run_id", &["run_id"]),
    ("run_attempt", &["run_attempt"]),
    ("runner_environment", &["runner_environment"]),
    ("actor", &["actor"]),
    ("actor_id", &["actor_id"]),
];

const GITLAB: Preset = &[
    ("namespace_id", &["namespace_id"]),
    ("namespace_path", &["namespace_path"]),
    ("project_id", &["project_id"]),
    ("project_path", &["project_path"]),
    ("ref", &["ref"]),
    ("ref_type", &["ref_type"]),
    ("ref_protected", &["ref_protected"]),
    ("sha", &["sha"]),
    ("environment", &["environment"]),
    ("environment_protected", &["environment_protected"]),
    ("deployment_tier", &["deployment_tier"]),
    ("pipeline_id", &["pipeline_id"]),
    ("pipeline_source", &["pipeline_source"]),
    ("job_id", &["job_id"]),
    ("runner_environment", &["runner_environment"]),
    ("user_id", &["user_id"]),
    ("user_login", &["user_login"]),
];

const KUBERNETES: Preset = &[
    ("namespace", &["kubernetes.io", "namespace"]),
    ("service_account", &["kubernetes.io", "serviceaccount", "name"]),
    ("service_account_uid", &["kubernetes.io", "serviceaccount", "uid"]),
    ("pod", &["kubernetes.io", "pod", "name"]),
    ("pod_uid", &["kubernetes.io", "pod", "uid"]),
    ("node", &["kubernetes.io", "node", "name"]),
];

/// Where tokens say who launched the agent.
#[derive(Debug)]
struct Launcher {
    claim: ClaimPath,
    /// Whose id the claim holds.
    issuer: String,
}

impl Launcher {
    /// As configured, or else as the platform always has it.
    fn of(config: &IssuerConfig) -> Result<Option<Self>, IdentityError> {
        let own = || config.issuer.clone();
        Ok(match (&config.launcher, config.preset) {
            (Some(launcher), _) => Some(Self {
                claim: ClaimPath::parse(&launcher.claim).map_err(|e| e.at("launcher.claim"))?,
                issuer: launcher.issuer.clone().unwrap_or_else(own),
            }),
            (None, IssuerPreset::GithubActions) => Some(Self { claim: ClaimPath::of(&["actor_id"]), issuer: own() }),
            (None, IssuerPreset::Gitlab) => Some(Self { claim: ClaimPath::of(&["user_id"]), issuer: own() }),
            (None, IssuerPreset::Kubernetes | IssuerPreset::Generic) => None,
        })
    }

    /// Without it nobody could tell who must not vote: a token that doesn't say is refused (guarantees 6, 12).
    fn read(&self, claims: &Map<String, Value>) -> Result<Account, IdentityError> {
        match self.claim.scalar(claims)? {
            Some(subject) if !subject.is_empty() => Ok(Account { issuer: self.issuer.clone(), subject }),
            _ => refuse(Refusal::Claim, "the claim that says who launched the agent is absent"),
        }
    }
}

/// One allowed issuer.
#[derive(Debug)]
pub struct OidcIssuer {
    issuer: String,
    audience: String,
    preset: IssuerPreset,
    algorithms: Vec<Algorithm>,
    keys: IssuerKeys,
    rules: Rules,
    mapping: Mapping,
    launcher: Option<Launcher>,
    tier_max: Option<TierName>,
    life_secs_max: u64,
}

/// Reads algorithm names as configured.
pub fn algorithms(names: &[String]) -> Result<Vec<Algorithm>, IdentityError> {
    let read: Result<Vec<Algorithm>, _> = names.iter().map(|n| n.parse()).collect();
    match read {
        Ok(list) if !list.is_empty() => Ok(list),
        Ok(_) => refuse(Refusal::Configuration, "`algorithms` is empty; leave it out for [\"RS256\"]"),
        Err(e) => refuse(Refusal::Configuration, format!("algorithms: {e}")),
    }
}

/// Checks the form of a configured issuer (OpenID Connect Discovery 1.0, section 3): HTTPS, no query, no fragment.
pub fn check_issuer(issuer: &str, reach: Reach) -> Result<(), IdentityError> {
    let plain_http = reach == Reach::Private && issuer.starts_with("http://");
    let form = (issuer.starts_with("https://") || plain_http) && !issuer.contains(['?', '#', ' ', '*']);
    let parsed = url::Url::parse(issuer).is_ok_and(|u| u.has_host() && u.username().is_empty());
    if form && parsed && issuer.len() <= 512 && issuer.is_ascii() {
        return Ok(());
    }
    refuse(
        Refusal::Configuration,
        "`issuer` must be an https URL without query, fragment or credentials, exactly as in `iss`",
    )
}

impl OidcIssuer {
    /// Checks the configuration and builds the verifier; fetches nothing. Relative files are looked for beside `base`.
    pub fn new(
        config: &IssuerConfig,
        base: &Path,
        clock: Arc<dyn Clock>,
        lookup: Lookup,
    ) -> Result<Self, IdentityError> {
        Self::build(config, base, clock, lookup).map_err(|e| e.at(&format!("issuer {}", config.issuer)))
    }

    fn build(config: &IssuerConfig, base: &Path, clock: Arc<dyn Clock>, lookup: Lookup) -> Result<Self, IdentityError> {
        let reach = if config.allow_private_network { Reach::Private } else { Reach::Public };
        check_issuer(&config.issuer, reach)?;
        if config.audience.is_empty() {
            return refuse(Refusal::Configuration, "`audience` is empty");
        }
        if config.token_life_secs_max == 0 || config.token_life_secs_max > TOKEN_LIFE_SECS_CAP {
            return refuse(Refusal::Configuration, format!("token_life_secs_max must be 1 to {TOKEN_LIFE_SECS_CAP}"));
        }
        let (preset, pins): (Preset, &[&str]) = match config.preset {
            IssuerPreset::GithubActions => (GITHUB, &["repository_id", "repository_owner_id"]),
            IssuerPreset::Gitlab => (GITLAB, &["project_id", "namespace_id"]),
            IssuerPreset::Kubernetes => (KUBERNETES, &[]),
            IssuerPreset::Generic => (&[], &[]),
        };
        // Names are given to others when they are free again; numbers are not (regression A13).
        if !pins.is_empty() && !pins.iter().any(|pin| config.require.contains_key(*pin)) {
            return refuse(
                Refusal::Configuration,
                format!("everybody on that platform gets tokens from it: `require` must pin {}", pins.join(" or ")),
            );
        }
        let source = if let Some(file) = &config.jwks_file {
            Source::File(base.join(file))
        } else {
            let ca = config.ca_file.as_ref().map(|f| base.join(f));
            let fetcher = Fetcher::new(reach, ca.as_deref(), lookup)?;
            fetcher.check_url(&config.issuer)?;
            Source::Discovery { issuer: config.issuer.clone(), fetcher }
        };
        Ok(Self {
            issuer: config.issuer.clone(),
            audience: config.audience.clone(),
            preset: config.preset,
            algorithms: algorithms(&config.algorithms)?,
            keys: IssuerKeys::new(source, clock),
            rules: Rules::parse(&config.require)?,
            mapping: Mapping::parse(preset, &config.attributes)?,
            launcher: Launcher::of(config)?,
            tier_max: config.tier_max.clone(),
            life_secs_max: config.token_life_secs_max,
        })
    }

    /// The exact `iss`.
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// Verifies one of this issuer's tokens.
    pub async fn verify(&self, text: &str, now: Timestamp) -> Result<VerifiedAgent, IdentityError> {
        self.verified(text, now).await.map_err(|e| e.at(&format!("issuer {}", self.issuer)))
    }

    async fn verified(&self, text: &str, now: Timestamp) -> Result<VerifiedAgent, IdentityError> {
        let expected = Expected {
            kind: TokenKind::Workload,
            algorithms: &self.algorithms,
            issuer: Some(&self.issuer),
            audience: &self.audience,
            life_secs_max: self.life_secs_max,
        };
        let claims = verify_with(&self.keys, text, &expected, now).await?;
        self.rules.check(&claims.all)?;
        match self.preset {
            IssuerPreset::GithubActions => check_github(&claims.subject, &claims.all)?,
            IssuerPreset::Gitlab => check_gitlab(&claims.subject, &claims.all)?,
            IssuerPreset::Kubernetes => check_kubernetes(&claims.subject, &claims.all)?,
            IssuerPreset::Generic => {}
        }
        let id =
            AgentId::oidc(&self.issuer, &claims.subject).or_else(|e| refuse(Refusal::Claim, format!("`sub`: {e}")))?;
        Ok(VerifiedAgent {
            id,
            issuer: self.issuer.clone(),
            attributes: self.mapping.read(&claims.all)?,
            launcher: self.launcher.as_ref().map(|l| l.read(&claims.all)).transpose()?,
            method: Method::Oidc,
            tier_max: self.tier_max.clone(),
            confirmation: None,
            expires_at: claims.expires_at(),
            subject: claims.subject,
        })
    }
}

/// Verifies with the issuer's keys as they are known; an unknown `kid` is worth one look for newer ones.
pub(super) async fn verify_with(
    keys: &IssuerKeys,
    text: &str,
    expected: &Expected<'_>,
    now: Timestamp,
) -> Result<super::jwt::Claims, IdentityError> {
    let token = Token::parse(text)?;
    let set = keys.current().await?;
    match token.verify(&set, expected, now) {
        Err(e) if e.refusal() == Refusal::UnknownKey => match keys.newer_than(&set).await {
            Some(newer) => Token::parse(text)?.verify(&newer, expected, now),
            None => Err(e),
        },
        done => done,
    }
}

fn claim(claims: &Map<String, Value>, path: &[&str]) -> Result<String, IdentityError> {
    let absent = || IdentityError::new(Refusal::Claim, format!("the claim `{}` is absent", path.join(".")));
    ClaimPath::of(path).scalar(claims)?.ok_or_else(absent)
}

fn agree(same: bool) -> Result<(), IdentityError> {
    if same { Ok(()) } else { refuse(Refusal::Claim, "`sub` does not agree with the claims that it is made of") }
}

/// `repo:OWNER/REPO:…`, or with immutable ids `repo:OWNER@ID/REPO@ID:…`; what it says must be what the claims say.
/// Other forms come from an organisation's own subject template and are taken as they are.
fn check_github(subject: &str, claims: &Map<String, Value>) -> Result<(), IdentityError> {
    let repository = claim(claims, &["repository"])?;
    let Some((name, context)) = subject.strip_prefix("repo:").and_then(|rest| rest.split_once(':')) else {
        return Ok(());
    };
    let Some((owner, repo)) = name.split_once('/') else { return agree(false) };
    let plain = match (owner.split_once('@'), repo.split_once('@')) {
        (Some((owner, owner_id)), Some((repo, repo_id))) => {
            agree(owner_id == claim(claims, &["repository_owner_id"])?)?;
            agree(repo_id == claim(claims, &["repository_id"])?)?;
            format!("{owner}/{repo}")
        }
        (None, None) => name.to_owned(),
        _ => return agree(false),
    };
    agree(plain == repository && !context.is_empty())
}

/// `project_path:GROUP/PROJECT:ref_type:…:ref:…`.
fn check_gitlab(subject: &str, claims: &Map<String, Value>) -> Result<(), IdentityError> {
    let path = claim(claims, &["project_path"])?;
    match subject.strip_prefix("project_path:").and_then(|rest| rest.split_once(':')) {
        Some((project, _)) => agree(project == path),
        None => Ok(()),
    }
}

/// `system:serviceaccount:NAMESPACE:NAME`, always.
fn check_kubernetes(subject: &str, claims: &Map<String, Value>) -> Result<(), IdentityError> {
    let namespace = claim(claims, &["kubernetes.io", "namespace"])?;
    let name = claim(claims, &["kubernetes.io", "serviceaccount", "name"])?;
    agree(subject == format!("system:serviceaccount:{namespace}:{name}"))
}
