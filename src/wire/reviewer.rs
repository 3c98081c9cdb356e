//! The reviewer's API: the same facts for page, command line and script, so that they can't disagree.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::core::digest::Digest;
use crate::core::event::Selector;
use crate::core::id::{GrantId, LeaseId, ResourceName, TaskName, Timestamp};
use crate::core::tier::Tier;
use crate::core::vote::Verdict;

use super::agent::{GrantView, LeaseView};

/// One row of the queue, of the live grants, or of what was decided.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    /// The grant.
    pub id: GrantId,
    /// Its state's word.
    pub state: String,
    /// The broker's sentence.
    pub sentence: String,
    /// The tier; absent if policy said no.
    pub tier: Option<Tier>,
    /// Approvals so far.
    pub approvals: u8,
    /// When it was asked for.
    pub requested_at: Timestamp,
    /// Pending: `decide_by`. Active: `ends_at`. Else when it was over.
    pub until: Option<Timestamp>,
    /// Seconds from now to `until`; 0 when past.
    pub secs_left: u64,
    /// Leases that are being ended, and have failed at least once.
    pub stuck: u32,
    /// Leases that aren't proven gone: a person attests that their target no longer exists.
    #[serde(default)]
    pub attested: u32,
    /// True if the viewer may vote on it now.
    pub mine: bool,
}

/// The queue: mine, waiting on others, live, decided.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Queue {
    /// The viewer may vote on these.
    pub mine: Vec<Row>,
    /// Others may.
    pub others: Vec<Row>,
    /// In force or ending.
    pub live: Vec<Row>,
    /// Final ones, latest first, bounded.
    pub decided: Vec<Row>,
    /// Freezes that hold.
    pub freezes: Vec<FreezeView>,
}

/// A freeze that holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FreezeView {
    /// Its number.
    pub id: u64,
    /// What it covers.
    pub selector: Selector,
    /// Who did it.
    pub by: String,
    /// Why.
    pub reason: String,
    /// When.
    pub at: Timestamp,
}

/// One permission, told for a reviewer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PermissionFacts {
    /// The resource's name and title.
    pub resource: String,
    /// What reviewers call it.
    pub title: String,
    /// The environment.
    pub environment: String,
    /// What it can, one line each ("change rows of: invoices").
    pub can: Vec<String>,
    /// What it cannot: the resource's other actions and values, one line each.
    pub cannot: Vec<String>,
    /// Actions that can't be rolled back.
    pub irreversible: Vec<String>,
    /// What ending it does, as one sentence.
    pub ending: String,
    /// The residual window, in seconds.
    pub residual_secs: u64,
}

/// Everything that a reviewer sees of one grant, before and after the decision.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Review {
    /// The grant as its agent sees it (state, times, leases).
    pub grant: GrantView,
    /// The digest that a vote must carry.
    pub digest: Option<Digest>,
    /// The tier.
    pub tier: Option<Tier>,
    /// The broker's sentence.
    pub sentence: String,
    /// One entry for each permission.
    pub permissions: Vec<PermissionFacts>,
    /// What the task tree and the owner's agents already hold or held in the window, one line each.
    pub holds: Vec<String>,
    /// Difference from what this agent last had approved, one line each; `None` if it never had anything.
    pub difference: Option<Vec<String>>,
    /// The agent, as verified.
    pub identity: IdentityFacts,
    /// The agent's own words, made safe to show: control, bidi and zero-width characters visible.
    pub intent: String,
    /// Why this tier, and by which rules.
    pub reasons: Vec<String>,
    /// Who else may decide (names), bounded.
    pub deciders: Vec<String>,
    /// May the viewer vote? If not, why not.
    pub may_vote: Result<(), String>,
    /// May the viewer end it?
    pub may_revoke: bool,
    /// Votes so far.
    pub votes: Vec<VoteView>,
    /// Everything that happened, oldest first.
    pub timeline: Vec<TimelineEntry>,
    /// Leases with their proofs.
    pub leases: Vec<LeaseView>,
    /// What this agent asked for before, latest first, at most five: sentence and outcome.
    pub similar: Vec<Row>,
    /// The broker's time.
    pub now: Timestamp,
}

/// The agent, as verified.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct IdentityFacts {
    /// As reviewers see it.
    pub name: String,
    /// Who it is.
    pub id: String,
    /// The trust domain or issuer.
    pub issuer: String,
    /// How it proved itself.
    pub method: String,
    /// Claims that matter.
    pub attributes: BTreeMap<String, String>,
    /// The name of the person who answers for it.
    pub owner: Option<String>,
    /// The team.
    pub team: Option<String>,
    /// The delegation chain, outermost first.
    pub chain: Vec<String>,
    /// The task.
    pub task: TaskName,
    /// When this broker first saw it.
    pub first_seen: Option<Timestamp>,
}

/// One vote, told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VoteView {
    /// The person's name.
    pub person: String,
    /// What was decided.
    pub verdict: Verdict,
    /// Why.
    pub reason: Option<String>,
    /// When.
    pub at: Timestamp,
    /// From where.
    pub via: String,
}

/// One line of a grant's record.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TimelineEntry {
    /// The journal's sequence number.
    pub seq: u64,
    /// When.
    pub at: Timestamp,
    /// What happened, in words.
    pub says: String,
    /// More, in words: evidence, digest, reason.
    pub detail: Option<String>,
    /// `broker`, `agent` ("reported by the agent"), `target` ("seen at the target"), `person`.
    pub source: String,
}

/// `POST /api/grants/{id}/votes`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VoteRequest {
    /// What is decided.
    pub verdict: Verdict,
    /// About what: the digest as it was shown.
    pub digest: Digest,
    /// Why; goes to the agent with a deny.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// `POST /api/grants/{id}/revoke`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RevokeRequest {
    /// Why.
    pub reason: String,
}

/// `POST /api/attestations`: what an operator attests to be gone with its target.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttestRequest {
    /// Which credentials.
    pub of: AttestOf,
    /// Why: it stands in the record in place of a proof.
    pub reason: String,
}

/// Which credentials an attestation is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum AttestOf {
    /// All of one grant.
    Grant(GrantId),
    /// One.
    Lease(LeaseId),
    /// All at one target.
    Target(ResourceName),
}

/// What was attested, and what wasn't.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct AttestResult {
    /// Recorded as absent by the operator's word.
    pub attested: Vec<AttestedLease>,
    /// Left as they are, with why.
    pub left: Vec<AttestedLease>,
}

/// One credential that was to be attested.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AttestedLease {
    /// Its grant.
    pub grant: GrantId,
    /// It.
    pub lease: LeaseId,
    /// Its target.
    pub target: ResourceName,
    /// Left as it is: why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// `POST /api/freezes`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FreezeRequest {
    /// What to end and refuse.
    pub selector: Selector,
    /// Why.
    pub reason: String,
    /// True: only count, do nothing.
    #[serde(default)]
    pub dry_run: bool,
}

/// What a freeze did, or would do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FreezeResult {
    /// Its number; absent in a dry run.
    pub id: Option<u64>,
    /// Grants that it ended (or would).
    pub grants: Vec<GrantId>,
}

/// Who is looking.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Viewer {
    /// The person's id.
    pub person: String,
    /// The name.
    pub name: String,
    /// Groups that count now.
    pub groups: Vec<String>,
}
