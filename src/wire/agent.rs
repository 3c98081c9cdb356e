//! The agent API: `/v1/…`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::core::event::{EndCause, Invocation};
use crate::core::id::{GrantId, LeaseId, TaskName, Timestamp};
use crate::core::lease::Evidence;
use crate::core::secret::Secret;

/// `POST /v1/grants`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantRequest {
    /// The task that this is for, named by the agent.
    pub task: TaskName,
    /// The agent's own words: why. Shown to reviewers as unverified.
    pub intent: String,
    /// One entry for each permission: `{"type", "identifier", "actions", …constraints}` (RFC 9396).
    pub authorization_details: Vec<Value>,
    /// How long it is wanted, in seconds from activation.
    pub life_secs: u64,
    /// The grant that this hangs from, when another agent handed part of its task over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<GrantId>,
    /// Interval at which the agent will give signs of life, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat_secs: Option<u64>,
    /// True: only the certificate that makes this request may collect (mutual TLS).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bind: bool,
}

/// A grant, as its agent sees it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GrantView {
    /// Its name.
    pub id: GrantId,
    /// `pending`, `active`, `ending`, `ended`, `denied`, `lapsed`, `cancelled`, `withdrawn`.
    pub state: String,
    /// Changes with every event.
    pub version: u64,
    /// The task.
    pub task: TaskName,
    /// The grant that it hangs from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<GrantId>,
    /// What is granted, in the form in which it was asked for; perhaps narrower.
    pub authorization_details: Vec<Value>,
    /// The tier's name, unless policy said no.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tier: Option<String>,
    /// Approvals so far.
    pub approvals: u8,
    /// Approvals needed.
    pub approvals_needed: u8,
    /// Pending: lapses then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decide_by: Option<Timestamp>,
    /// Longest life, in seconds from activation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub life_secs: Option<u64>,
    /// In force: ends then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ends_at: Option<Timestamp>,
    /// Seconds left of what the state says, on the broker's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secs_left: Option<u64>,
    /// Where a person decides. Carries no authority.
    pub review_url: String,
    /// Why it is over, where a cause was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<EndCause>,
    /// Denied: why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Denied by policy: the rule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// The broker's sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sentence: Option<String>,
    /// Credentials under it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub leases: Vec<LeaseView>,
}

/// A lease, as its agent and reviewers see it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LeaseView {
    /// Its name.
    pub lease: LeaseId,
    /// The resource.
    pub resource: String,
    /// `intended`, `live`, `unknown`, `revoking`, `revoked`, `absent`.
    pub state: String,
    /// Its name at the target.
    pub name: String,
    /// Proof of its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<Evidence>,
    /// In place of a proof: a person's word that its target no longer exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attested: Option<Attested>,
    /// When that stood, on the broker's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<Timestamp>,
    /// Failed attempts to end it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub attempts: u32,
    /// The last failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// When it will be tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_try: Option<Timestamp>,
    /// Why its target is away, while it is: then the target is looked at every second, and the lease is tried as soon as
    /// it serves, whatever `next_try` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub away: Option<String>,
    /// What the target told on the way ("seen at the target").
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub seen: Vec<crate::core::revocability::Observation>,
}

/// A person's word that the target of a credential no longer exists. Nobody looked: it is no evidence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attested {
    /// Who says so.
    pub by: String,
    /// Why.
    pub reason: String,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
const fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// `POST /v1/grants/{id}/credentials`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CredentialsRequest {
    /// Mint anew and end what was handed over before.
    pub replace: bool,
}

/// The credentials of a grant: the only answer of the broker that holds secrets.
#[derive(Debug, Deserialize)]
pub struct Credentials {
    /// The grant.
    pub grant: GrantId,
    /// In force until then.
    pub ends_at: Timestamp,
    /// One for each permission.
    pub credentials: Vec<CredentialView>,
}

/// One credential.
#[derive(Debug, Deserialize)]
pub struct CredentialView {
    /// Its lease.
    pub lease: LeaseId,
    /// What it is for.
    pub resource: String,
    /// `token`, `postgres`, `vault`, `x509`, `ssh`.
    pub kind: String,
    /// Fields that are no secret.
    pub public: BTreeMap<String, String>,
    /// Fields that are.
    #[serde(deserialize_with = "secrets")]
    pub secret: BTreeMap<String, Secret>,
    /// When it dies by itself (wall clock), where the target has native expiry.
    #[serde(default)]
    pub not_after: Option<Timestamp>,
}

fn secrets<'de, D: serde::Deserializer<'de>>(d: D) -> Result<BTreeMap<String, Secret>, D::Error> {
    Ok(BTreeMap::<String, String>::deserialize(d)?.into_iter().map(|(k, v)| (k, Secret::new(v))).collect())
}

/// `POST /v1/grants/{id}/invocations`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InvocationReport {
    /// What was done.
    pub invocation: Invocation,
}

/// `POST /v1/tasks/{id}/complete`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TaskCompleted {
    /// The task.
    pub task: TaskName,
    /// The grants that this ended, children included.
    pub ended: Vec<GrantId>,
}

/// `GET /v1/catalogue`: what this agent may ask for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CatalogueView {
    /// One entry for each resource.
    pub resources: Vec<ResourceView>,
}

/// A resource, as an agent sees it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ResourceView {
    /// The `type` of its entries in `authorization_details`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its name.
    pub identifier: String,
    /// As reviewers call it.
    pub title: String,
    /// The environment.
    pub environment: String,
    /// Its verbs, with their effects.
    pub actions: BTreeMap<String, String>,
    /// Its bounds: name → every value, or the maximum.
    pub constraints: BTreeMap<String, Value>,
}
