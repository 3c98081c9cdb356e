//! The broker's own access token: a JWT by RFC 9068 that one API accepts. Signed here, stored nowhere.
//! How it ends is the API's doing: one that asks the broker at each call sees the end at once, one that checks
//! offline accepts it until it expires, and this connector says so.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Away, Connector, Credential, Found, Gap, Gone, MintContext, MintError, Minted, Revocability, RevocabilityMode,
    RevokeError, SweepError,
};
use crate::config::{Problem, Resource, Target};
use crate::core::id::{AgentId, ConstraintName, ResourceName, Timestamp};
use crate::core::lease::{Evidence, Handle, Lease, LeaseIntent, LeaseState};
use crate::core::permission::{Constraint, Permission};
use crate::core::request::Confirmation;
use crate::keys::{SigningKeys, TOKEN_LIFE_SECS_MAX};

/// `typ` of these tokens (RFC 9068 section 2.1).
pub const ACCESS_TOKEN_TYP: &str = "at+jwt";
/// Longest audience, in bytes.
pub const AUDIENCE_BYTES_MAX: usize = 512;
/// Largest allowance for a resource server's clock, in seconds.
pub const SKEW_SECS_MAX: u64 = 600;
/// Above this life, `config check --live` speaks up about a token that can't be ended early, in seconds.
const OFFLINE_LIFE_SECS_ADVISED: u64 = 900;
/// Members of an `authorization_details` entry that a constraint can't be named after (RFC 9396 section 2.2).
const RESERVED: [&str; 6] = ["type", "identifier", "actions", "locations", "datatypes", "privileges"];

/// How the API finds out whether a token is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Checks {
    /// It asks the broker at each call (RFC 7662). One that keeps answers for a while is `offline`.
    Introspection,
    /// It verifies signature and expiry by itself.
    Offline,
}

/// `settings` of a target of kind `token`.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct TargetSettings {
    /// Longest life of a token, in seconds.
    life_secs_max: u64,
    /// Allowance for the clocks of resource servers, in seconds.
    skew_secs: u64,
}

impl Default for TargetSettings {
    fn default() -> Self {
        Self { life_secs_max: 3600, skew_secs: 60 }
    }
}

/// `settings` of a resource at such a target.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct ResourceSettings {
    /// `aud`: the API, as it knows itself.
    audience: String,
    /// How it finds out whether a token is good.
    checks: Checks,
    /// The identity (`spiffe://…` or `issuer#subject`) with which the API asks the broker about tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    resource_server: Option<AgentId>,
    /// Longest life of a token for it, in seconds, within the target's own.
    #[serde(default)]
    life_secs_max: Option<u64>,
    /// The constraints that the API itself enforces, from `authorization_details`.
    #[serde(default)]
    enforces: BTreeSet<ConstraintName>,
}

/// What the journal keeps of a token: all that its end needs, and nothing that a change of settings could move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenHandle {
    /// `exp`, in seconds since the epoch.
    exp: u64,
    /// How the API checked when the token was made.
    checks: Checks,
    /// Allowance for its clock, in seconds.
    skew_secs: u64,
}

/// `act` (RFC 8693 section 4.1): who acts, and who acted before.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Actor {
    /// An agent.
    pub sub: String,
    /// Who handed it the work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub act: Option<Box<Actor>>,
}

/// What a token says (RFC 9068 section 2.2). Introspection reads the same form back.
#[derive(Debug, Serialize, Deserialize)]
pub struct AccessTokenClaims {
    /// The broker.
    pub iss: String,
    /// The one API that it is for.
    pub aud: String,
    /// Expiry, seconds since the epoch.
    pub exp: u64,
    /// When it was made, seconds since the epoch.
    pub iat: u64,
    /// The lease: by this the token is revoked and looked up.
    pub jti: String,
    /// The agent that holds it.
    pub sub: String,
    /// The same: an agent is its own OAuth client.
    pub client_id: String,
    /// The grant (draft-ietf-oauth-transaction-tokens).
    pub txn: String,
    /// The chain of delegation, the holder outermost. Absent for a grant that nobody handed on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub act: Option<Actor>,
    /// The key that it is bound to (RFC 7800).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cnf: Option<Confirmation>,
    /// What may be done (RFC 9396): one entry.
    pub authorization_details: Vec<Value>,
    /// The person who answers for the agent. Never `sub`: the agent is not that person.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// The persons who approved.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub approvers: Vec<String>,
}

/// The connector of one target of kind `token`.
#[derive(Debug)]
pub struct TokenConnector {
    issuer: String,
    keys: Arc<SigningKeys>,
    settings: TargetSettings,
    resources: BTreeMap<ResourceName, ResourceSettings>,
}

/// The entry of `authorization_details` that says this permission (PROTOCOLS, "Agent front doors").
pub fn authorization_detail(permission: &Permission) -> Value {
    let mut detail = json!({
        "type": "token",
        "identifier": permission.resource,
        "actions": permission.actions,
    });
    for (name, bound) in &permission.constraints {
        detail[name.as_str()] = match bound {
            Constraint::Set(values) | Constraint::Paths(values) => json!(values),
            Constraint::Max(most) => json!(most),
        };
    }
    detail
}

fn actors(agent: &str, chain: &[crate::core::id::AgentId]) -> Option<Actor> {
    if chain.is_empty() {
        return None;
    }
    // Outermost is who acts now; the least recent stands deepest (RFC 8693 section 4.1).
    let before = chain.iter().fold(None, |inner, a| Some(Box::new(Actor { sub: a.to_string(), act: inner })));
    Some(Actor { sub: agent.to_owned(), act: before })
}

impl TokenConnector {
    /// Checks the settings of a target and of the resources that name it. Says everything that is wrong.
    pub fn new(
        target: &Target,
        resources: &[&Resource],
        issuer: &str,
        keys: Arc<SigningKeys>,
    ) -> Result<Self, Vec<Problem>> {
        let mut problems = Vec::new();
        let mut wrong = |place: String, what: String| problems.push(Problem { place, what });
        let here = format!("target {}", target.name);
        let settings = target.settings.clone().try_into().unwrap_or_else(|e: toml::de::Error| {
            wrong(
                here.clone(),
                format!("settings of a `token` target are life_secs_max and skew_secs: {}", e.message()),
            );
            TargetSettings::default()
        });
        if settings.life_secs_max == 0 || settings.life_secs_max > TOKEN_LIFE_SECS_MAX {
            wrong(here.clone(), format!("life_secs_max must be 1 to {TOKEN_LIFE_SECS_MAX}"));
        }
        if settings.skew_secs > SKEW_SECS_MAX {
            wrong(here, format!("skew_secs must be at most {SKEW_SECS_MAX}"));
        }
        let mut checked = BTreeMap::new();
        for resource in resources {
            match check_resource(resource, &settings, issuer) {
                Ok(settings) => {
                    checked.insert(resource.name.clone(), settings);
                }
                Err(found) => {
                    for what in found {
                        wrong(format!("resource {}", resource.name), what);
                    }
                }
            }
        }
        if problems.is_empty() {
            Ok(Self { issuer: issuer.to_owned(), keys, settings, resources: checked })
        } else {
            Err(problems)
        }
    }

    /// How long a token lives that was asked for with this life, in seconds.
    fn life_secs(&self, resource: &ResourceSettings, asked: u64) -> u64 {
        asked.min(self.settings.life_secs_max).min(resource.life_secs_max.unwrap_or(u64::MAX))
    }

    /// What is known of a token: from the handle, else the worst that its intent allows.
    fn handle_of(&self, lease: &Lease) -> TokenHandle {
        if let Some(handle) = lease.handle.as_ref().and_then(|h| TokenHandle::deserialize(h).ok()) {
            return handle;
        }
        let latest = lease.intent.intended_at.plus_secs(lease.intent.lifetime_secs);
        let not_after = lease.not_after.map_or(latest, |t| t.max(latest));
        // Rounded up: a second too late is honest, a second too early is not.
        TokenHandle { exp: not_after.plus_ms(999).secs(), checks: Checks::Offline, skew_secs: self.settings.skew_secs }
    }
}

fn check_resource(resource: &Resource, target: &TargetSettings, issuer: &str) -> Result<ResourceSettings, Vec<String>> {
    let settings: ResourceSettings = resource.settings.clone().try_into().map_err(|e: toml::de::Error| {
        vec![format!(
            "settings of a `token` resource are audience, checks = \"introspection\" or \"offline\", resource_server, \
             life_secs_max and enforces: {}",
            e.message()
        )]
    })?;
    let mut problems = Vec::new();
    let audience = &settings.audience;
    if audience.is_empty() || audience.len() > AUDIENCE_BYTES_MAX || audience.chars().any(|c| c <= ' ' || c == '\u{7f}')
    {
        problems
            .push(format!("audience must have 1 to {AUDIENCE_BYTES_MAX} bytes without spaces or control characters"));
    }
    if audience.trim_end_matches('/') == issuer.trim_end_matches('/') {
        problems.push("audience is the broker itself; name the API that accepts the token".to_owned());
    }
    // Introspection answers nobody else: without it, no token of this resource would ever be good.
    if settings.checks == Checks::Introspection && settings.resource_server.is_none() {
        problems.push(
            "checks = \"introspection\" needs resource_server: the identity (`spiffe://…` or `issuer#subject`) with which \
             the API asks the broker; without it the broker answers `inactive` for every token"
                .to_owned(),
        );
    }
    if settings.life_secs_max.is_some_and(|s| s == 0 || s > target.life_secs_max) {
        problems.push(format!("life_secs_max must be 1 to {}, the target's own", target.life_secs_max));
    }
    for name in resource.constraint.keys() {
        if RESERVED.contains(&name.as_str()) {
            problems.push(format!(
                "constraint {name} has the name of a member of authorization_details; name it otherwise"
            ));
        }
        // A bound that nobody holds is no bound (DESIGN section 8).
        if !settings.enforces.contains(name) {
            problems.push(format!(
                "constraint {name} is enforced by nobody; if the API reads it from authorization_details, add it to enforces, else remove it"
            ));
        }
    }
    for name in settings.enforces.iter().filter(|n| !resource.constraint.contains_key(*n)) {
        problems.push(format!("enforces names {name}, which is no constraint of this resource"));
    }
    for action in resource.action.iter().filter(|a| !a.settings.is_empty()) {
        problems.push(format!("action {} has settings; those of a `token` resource take none", action.name));
    }
    if problems.is_empty() { Ok(settings) } else { Err(problems) }
}

#[async_trait]
impl Connector for TokenConnector {
    fn kind(&self) -> &'static str {
        "token"
    }

    fn revocability(&self, permission: &Permission, lifetime_secs: u64) -> Revocability {
        let resource = self.resources.get(&permission.resource);
        if resource.is_some_and(|r| r.checks == Checks::Introspection) {
            return Revocability {
                mode: RevocabilityMode::Immediate,
                residual_secs: 0,
                says: "The API asks the broker about the token at each call: it is refused from the moment the grant ends."
                    .to_owned(),
            };
        }
        let life = resource.map_or(lifetime_secs, |r| self.life_secs(r, lifetime_secs));
        let residual_secs = life + self.settings.skew_secs;
        Revocability {
            mode: RevocabilityMode::ExpiryOnly,
            residual_secs,
            says: format!(
                "The API checks the token without asking the broker: a stolen copy works until it expires, up to {residual_secs} seconds after it was made, whenever the grant ends."
            ),
        }
    }

    fn fingerprint(&self, permission: &Permission) -> Value {
        json!({
            "kind": "token",
            "issuer": self.issuer,
            "target": {"life_secs_max": self.settings.life_secs_max, "skew_secs": self.settings.skew_secs},
            "resource": self.resources.get(&permission.resource),
        })
    }

    fn mints_locally(&self) -> bool {
        true
    }

    async fn mint(
        &self,
        intent: &LeaseIntent,
        _prepared: Option<&Handle>,
        context: &MintContext,
    ) -> Result<Minted, MintError> {
        // Nothing exists anywhere before this function returns: every error here is "not minted", for certain.
        let refused = |why: String| MintError::NotMinted { why, transient: false };
        let resource = self.resources.get(&intent.permission.resource).ok_or_else(|| {
            refused(format!("{} is no resource of this token target; check the catalogue", intent.permission.resource))
        })?;
        let iat = context.wall_now.secs();
        // From the start of the second: never a moment longer than the life that was approved.
        let exp = iat + self.life_secs(resource, intent.lifetime_secs);
        let agent = context.agent.to_string();
        let claims = AccessTokenClaims {
            iss: self.issuer.clone(),
            aud: resource.audience.clone(),
            exp,
            iat,
            jti: intent.lease.to_string(),
            act: actors(&agent, &context.chain),
            client_id: agent.clone(),
            sub: agent,
            txn: intent.grant.to_string(),
            cnf: context.confirmation.clone(),
            authorization_details: vec![authorization_detail(&intent.permission)],
            owner: context.owner.as_ref().map(ToString::to_string),
            approvers: context.approvers.iter().map(ToString::to_string).collect(),
        };
        let token = self.keys.sign_jwt(ACCESS_TOKEN_TYP, &claims).map_err(|e| refused(e.to_string()))?;
        let token_type = match context.confirmation {
            Some(Confirmation::JwkThumbprint(_)) => "DPoP",
            Some(Confirmation::CertificateSha256(_)) | None => "Bearer",
        };
        let handle = TokenHandle { exp, checks: resource.checks, skew_secs: self.settings.skew_secs };
        let public = [
            ("token_type", token_type.to_owned()),
            ("audience", resource.audience.clone()),
            ("expires_at", exp.to_string()),
            ("jti", claims.jti),
        ];
        Ok(Minted {
            credential: Credential {
                kind: "token",
                public: public.map(|(k, v)| (k.to_owned(), v)).into(),
                secret: [("token".to_owned(), token)].into(),
            },
            handle: json!(handle),
            not_after: Some(Timestamp(exp * 1000)),
        })
    }

    fn mint_deadline(&self) -> Duration {
        Duration::from_secs(1)
    }

    async fn revoke(&self, lease: &Lease, now: Timestamp) -> Result<Gone, RevokeError> {
        let gone = |evidence| Ok(Gone { evidence, seen: Vec::new(), access_cut: Some(Duration::ZERO) });
        if lease.handle.is_none() && !lease.was_seen_live() {
            // The token is made, recorded and released in this order (guarantees 1 and 2): without a record it never left.
            return gone(Evidence::TargetSaysGone {
                detail: format!(
                    "no token with jti {} was ever recorded as live, and none leaves the broker before that",
                    lease.intent.lease
                ),
            });
        }
        let TokenHandle { exp, checks, skew_secs } = self.handle_of(lease);
        if checks == Checks::Introspection {
            // Introspection answers from the lease's own record: what that says is what the API is told.
            if matches!(lease.state, LeaseState::Live { .. }) {
                return Err(RevokeError::Retry {
                    why: "the lease is still recorded as live, so introspection still answers active; record its end first"
                        .to_owned(),
                });
            }
            return gone(Evidence::TargetSaysGone {
                detail: format!(
                    "the broker's introspection, which the API asks at each call (catalogue: checks = \"introspection\"), answers inactive for jti {} since its end was recorded",
                    lease.intent.lease
                ),
            });
        }
        let not_after = Timestamp(exp.saturating_mul(1000));
        let at = not_after.plus_secs(skew_secs);
        if now < at {
            return Err(RevokeError::EndsAt { at });
        }
        // No telling when access was cut: the API decided that by itself.
        Ok(Gone { evidence: Evidence::Expired { not_after, skew_secs }, seen: Vec::new(), access_cut: None })
    }

    /// Always: how a token ends is between its API, the clock and the broker itself.
    async fn probe(&self) -> Result<(), Away> {
        Ok(())
    }

    /// Nothing, always: a token stands in no list at any target. Each one that can be good has its lease in the journal.
    async fn sweep(&self) -> Result<Vec<Found>, SweepError> {
        Ok(Vec::new())
    }

    async fn revoke_found(&self, found: &Found, _now: Timestamp) -> Result<Gone, RevokeError> {
        Err(RevokeError::Retry {
            why: format!("a sweep of a token target finds nothing, yet it is said to have found {}", found.name),
        })
    }

    async fn check(&self) -> Result<Vec<Gap>, SweepError> {
        let mut gaps = Vec::new();
        for (name, resource) in &self.resources {
            let life = self.life_secs(resource, u64::MAX);
            if resource.checks == Checks::Offline && life > OFFLINE_LIFE_SECS_ADVISED {
                gaps.push(Gap {
                    what: format!("{name} checks tokens offline, and they live up to {life} seconds"),
                    allows: "a stolen token works for all that time, also after its grant was revoked".to_owned(),
                    fix: format!(
                        "let the API ask the broker (checks = \"introspection\"), or set life_secs_max = {OFFLINE_LIFE_SECS_ADVISED} or less in its settings"
                    ),
                    fatal: false,
                });
            }
        }
        Ok(gaps)
    }
}

#[cfg(test)]
mod tests;
