//! What an agent asked for, and what of it a reviewer approves.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::digest::{CanonicalError, Digest};
use super::id::{AgentId, GrantId, PersonId, ResourceName, TaskName, Timestamp};
use super::permission::Permission;
use super::revocability::Revocability;
use super::tier::Tier;

/// Shortest heartbeat interval, in seconds.
pub const HEARTBEAT_SECS_MIN: u64 = 5;
/// Longest heartbeat interval, in seconds.
pub const HEARTBEAT_SECS_MAX: u64 = 600;
/// Missed after so many intervals without a sign of life.
pub const HEARTBEATS_MISSED: u64 = 3;

/// The key that a grant is bound to (RFC 7800 `cnf`): only its holder collects.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Confirmation {
    /// SHA-256 of the client certificate, base64url (RFC 8705).
    #[serde(rename = "x5t#S256")]
    CertificateSha256(String),
    /// JWK thumbprint of a DPoP key, base64url (RFC 9449).
    #[serde(rename = "jkt")]
    JwkThumbprint(String),
}

/// An account at some issuer: of whom, only the people directory says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Account {
    /// The exact issuer.
    pub issuer: String,
    /// The immutable subject there.
    pub subject: String,
}

/// The verified facts about the agent that asked, as they were at that moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentFacts {
    /// Who it is.
    pub id: AgentId,
    /// As reviewers see it.
    pub name: String,
    /// The trust domain or OIDC issuer.
    pub issuer: String,
    /// How it proved itself (`x509-svid`, `jwt-svid`, `oidc`).
    pub method: String,
    /// Claims that matter, mapped from verified bytes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub attributes: BTreeMap<String, String>,
    /// Who launched it, where its issuer says so. That person can't vote (guarantee 6).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub launcher: Option<Account>,
    /// The person who answers for it; `None` reaches no tier that needs a vote.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<PersonId>,
    /// The team, from the operator's directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub team: Option<String>,
}

/// One request. Immutable once recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Who asks.
    pub agent: AgentFacts,
    /// The task it is for; the name belongs to this agent.
    pub task: TaskName,
    /// The agent's own words. Not verified, never part of a decision.
    pub intent: String,
    /// What it asks for, normalised against the catalogue: every bound is explicit.
    pub permissions: Vec<Permission>,
    /// How long it wants it, in seconds from activation.
    pub life_secs: u64,
    /// The grant that this one hangs from, if it was handed part of another agent's task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<GrantId>,
    /// The agents that handed it on, outermost first, without the asking one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub chain: Vec<AgentId>,
    /// Persons who may not vote: the owner, the launcher, the owners in the chain (guarantee 6).
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub excluded_voters: BTreeSet<PersonId>,
    /// Interval of signs of life, in seconds; missed, the agent counts as lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat_secs: Option<u64>,
    /// The key that the grant is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirmation: Option<Confirmation>,
    /// SHA-256 of agent and `Idempotency-Key`, if one was sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency: Option<Digest>,
    /// SHA-256 of the request's content: the same key with other content is refused.
    pub content: Digest,
}

/// Exactly what is approved. The digest is over the canonical JSON of this and nothing else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Approvable {
    /// The grant: a vote on its twin is none on this one (regression D14).
    pub grant: GrantId,
    /// The agent.
    pub agent: AgentId,
    /// Who answers for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<PersonId>,
    /// The delegation chain.
    pub chain: Vec<AgentId>,
    /// What will be minted.
    pub permissions: Vec<Permission>,
    /// Longest life, in seconds from activation.
    pub life_secs: u64,
    /// The latest end, whenever it is activated.
    pub latest_end: Timestamp,
    /// The tier, as it stood.
    pub tier: Tier,
    /// Resource → hash of its catalogue entry and of the target's configuration behind it (regression D11).
    pub targets: BTreeMap<ResourceName, Digest>,
    /// What ending each permission's credential does, in the order of the permissions.
    pub revocability: Vec<Revocability>,
    /// The sentence as rendered. Stored, never rendered again.
    pub sentence: String,
}

impl Approvable {
    /// The digest that votes are bound to.
    pub fn digest(&self) -> Result<Digest, CanonicalError> {
        Digest::of(self)
    }
    /// The worst residual window of all permissions, in seconds.
    pub fn residual_secs(&self) -> u64 {
        self.revocability.iter().map(|r| r.residual_secs).max().unwrap_or(0)
    }
}

/// One reason that policy gave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reason {
    /// The rule's `@id`.
    pub rule: String,
    /// Its words.
    pub says: String,
}

/// What policy said of a request that it permits, and what follows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Assessed {
    /// What may be approved.
    pub approvable: Approvable,
    /// Its digest.
    pub digest: Digest,
    /// Why this tier.
    pub reasons: Vec<Reason>,
    /// The version of the policies that said so. Recorded beside the digest, not in it.
    pub policy_version: String,
    /// Until when a decision is awaited.
    pub decide_by: Timestamp,
}
