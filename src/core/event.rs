//! Everything that can happen. An event in the journal is the only way state changes (guarantee 8).
//!
//! The form is for ever: a journal of years ago is read by today's code. Fields are added with
//! defaults, never renamed.

use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::id::{AgentId, GrantId, LeaseId, PersonId, ResourceName, TaskKey, TaskName, Timestamp};
use super::lease::{Absence, Evidence, Handle, LeaseIntent};
use super::request::{Assessed, Request};
use super::revocability::Observation;
use super::strict::no_fields;
use super::vote::Vote;

/// One event, as it stands in the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "of", rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// Something happened to a grant.
    Grant {
        /// Which.
        id: GrantId,
        /// The grant's version after this event; the first is 1.
        version: u64,
        /// What.
        what: Box<GrantEvent>,
    },
    /// A task was completed: no new requests under its name.
    TaskCompleted {
        /// Which.
        task: TaskKey,
    },
    /// Grants that match are ended, and new ones refused, until it is lifted.
    Frozen {
        /// Names this freeze.
        id: u64,
        /// What it covers.
        selector: Selector,
        /// Who did it.
        by: PersonId,
        /// Why.
        reason: String,
    },
    /// A freeze was lifted.
    Unfrozen {
        /// Which.
        id: u64,
        /// Who did it.
        by: PersonId,
    },
    /// Something about the broker itself.
    Broker {
        /// What.
        what: BrokerEvent,
    },
}

/// What can happen to a grant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case", deny_unknown_fields)]
pub enum GrantEvent {
    /// An agent asked.
    Requested {
        /// For what.
        request: Request,
    },
    /// Policy permits it at a tier. A second one replaces the first and voids its votes (guarantee 3).
    Assessed {
        /// What policy said.
        assessed: Assessed,
    },
    /// No, and final.
    Denied {
        /// Who said no.
        by: DeniedBy,
        /// Why, for the agent.
        reason: String,
    },
    /// A reviewer voted.
    Voted {
        /// The vote.
        vote: Vote,
    },
    /// It is in force.
    Activated {
        /// Until then. Never moves later.
        ends_at: Timestamp,
    },
    /// Nobody decided in time. Final.
    #[serde(deserialize_with = "no_fields")]
    Lapsed,
    /// The agent took it back before it was in force. Final.
    #[serde(deserialize_with = "no_fields")]
    Cancelled,
    /// Something else ended it before it was in force. Final.
    Withdrawn {
        /// What.
        cause: EndCause,
    },
    /// It is over for the agent.
    Ending {
        /// Why.
        cause: EndCause,
    },
    /// Every lease is proven gone, or a person attests that its target is. Final.
    #[serde(deserialize_with = "no_fields")]
    Ended,
    /// A credential is about to be minted (guarantee 1).
    LeaseIntended {
        /// What.
        intent: LeaseIntent,
    },
    /// The handle by which everything can be ended is known, before the secret is asked for.
    LeasePrepared {
        /// Which.
        lease: LeaseId,
        /// The handle.
        handle: Handle,
    },
    /// The target confirmed it (guarantee 2: durable before the secret leaves).
    LeaseLive {
        /// Which.
        lease: LeaseId,
        /// Where it is.
        handle: Handle,
        /// When it dies by itself (wall clock), where the target has native expiry.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        not_after: Option<Timestamp>,
        /// True if its secret leaves the broker with this event.
        released: bool,
    },
    /// It is not known whether it exists.
    LeaseUnknown {
        /// Which.
        lease: LeaseId,
        /// What happened.
        why: String,
        /// What was learned about where it may be.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        handle: Option<Handle>,
        /// Not looked for before this moment: until then the mint may still be under way at the target.
        not_before: Timestamp,
    },
    /// It is to be ended though the grant goes on (replaced, or never handed over).
    LeaseRevoking {
        /// Which.
        lease: LeaseId,
        /// Why.
        why: String,
    },
    /// An attempt to end it failed; there will be another.
    LeaseRetry {
        /// Which.
        lease: LeaseId,
        /// What happened.
        why: String,
        /// When it will be tried again.
        next_try: Timestamp,
    },
    /// It is proven gone (guarantee 5).
    LeaseRevoked {
        /// Which.
        lease: LeaseId,
        /// The proof.
        evidence: Evidence,
        /// What the target told on the way.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        seen: Vec<Observation>,
        /// Milliseconds from the start of the ending until access was cut, where that came first.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        access_cut_ms: Option<u64>,
    },
    /// It never was, or is gone without having been seen live.
    LeaseAbsent {
        /// Which.
        lease: LeaseId,
        /// How that is known.
        absence: Absence,
        /// What the target told on the way.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        seen: Vec<Observation>,
    },
    /// A person attests that its target no longer exists, and so nothing of it. Not a proof: nobody looked.
    LeaseAttestedAbsent {
        /// Which.
        lease: LeaseId,
        /// Who says so.
        by: PersonId,
        /// Why.
        reason: String,
    },
    /// Something was done with the grant.
    Invoked {
        /// What.
        invocation: Invocation,
    },
}

/// Who said no.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "who", rename_all = "snake_case", deny_unknown_fields)]
pub enum DeniedBy {
    /// A rule.
    Policy {
        /// Its id.
        rule: String,
        /// The version of the policies.
        policy_version: String,
    },
    /// A person.
    Person {
        /// Who.
        person: PersonId,
    },
}

/// Why a grant is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cause", rename_all = "snake_case", deny_unknown_fields)]
pub enum EndCause {
    /// The agent said that it is done.
    #[serde(deserialize_with = "no_fields")]
    Completed,
    /// The task was completed as a whole.
    #[serde(deserialize_with = "no_fields")]
    TaskCompleted,
    /// Its time was up.
    #[serde(deserialize_with = "no_fields")]
    Expired,
    /// A person took it away.
    Revoked {
        /// Who.
        by: PersonId,
        /// Why.
        reason: String,
    },
    /// Signs of life were missed.
    #[serde(deserialize_with = "no_fields")]
    AgentLost,
    /// The grant that it hangs from is over.
    #[serde(deserialize_with = "no_fields")]
    ParentEnded,
    /// A freeze covers it.
    Frozen {
        /// Which.
        id: u64,
    },
    /// Policy at mint asks for more than was approved, or says no (guarantee 3).
    TierRisen {
        /// What policy said.
        reason: String,
    },
    /// The catalogue or a target changed since it was approved (guarantee 3, regression D11).
    ApprovedThingChanged {
        /// What.
        resource: ResourceName,
    },
    /// The wall clock was set back while the broker was down: how much time is left can't be known.
    #[serde(deserialize_with = "no_fields")]
    ClockSetBack,
    /// The record was restored from a backup: what became of it since then isn't known.
    #[serde(deserialize_with = "no_fields")]
    Restored,
}

/// How urgent it is to end what a grant gave: most urgent first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Urgency {
    /// The kill switch was pulled.
    Frozen,
    /// It was taken away before its time.
    Taken,
    /// Its time came, or the agent is done with it.
    Over,
}

impl EndCause {
    /// How urgent the endings are.
    pub const fn urgency(&self) -> Urgency {
        match self {
            Self::Frozen { .. } => Urgency::Frozen,
            Self::Revoked { .. }
            | Self::AgentLost
            | Self::ParentEnded
            | Self::TierRisen { .. }
            | Self::ApprovedThingChanged { .. }
            | Self::ClockSetBack
            | Self::Restored => Urgency::Taken,
            Self::Completed | Self::TaskCompleted | Self::Expired => Urgency::Over,
        }
    }
}

/// What was done with a grant, as reported by the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Invocation {
    /// The tool or program.
    pub tool: String,
    /// A hash of program and arguments, hex, if given. The agent reports a SHA-256; the record has a hash of that with a
    /// key of the broker's, so that equal commands can be compared and none can be guessed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arguments_digest: Option<String>,
    /// The arguments themselves, only if the user asked for them to be recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arguments: Option<Vec<String>>,
    /// `started`, `ok`, `failed`, or `exit:N`.
    pub status: String,
    /// When it began, as reported (wall clock).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When it ended, as reported (wall clock).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
}

/// What a freeze covers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Selector {
    /// Everything.
    All,
    /// One agent.
    Agent(AgentId),
    /// All agents that one person answers for.
    Owner(PersonId),
    /// All grants that touch one resource.
    Resource(ResourceName),
    /// One task of one agent, with what hangs from it.
    Task(TaskKey),
    /// All tasks of that name, whichever agent named it.
    TaskName(TaskName),
    /// All grants that touch one target.
    Target(ResourceName),
}

/// What can happen to the broker itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case", deny_unknown_fields)]
pub enum BrokerEvent {
    /// A run began.
    RunStarted {
        /// The program's version.
        version: String,
        /// Names the boot.
        boot_id: String,
        /// The boot-time clock, in milliseconds.
        boot_ms: u64,
        /// The wall clock.
        wall: Timestamp,
        /// The broker's clock starts here.
        starts_at: Timestamp,
        /// True if the wall clock had been set back since the last run.
        clock_set_back: bool,
    },
    /// A run ended in good order.
    #[serde(deserialize_with = "no_fields")]
    RunEnded,
    /// Configuration, catalogue, policies or trust bundles were loaded.
    ConfigurationLoaded {
        /// Part → SHA-256.
        hashes: std::collections::BTreeMap<String, Digest>,
    },
    /// A sweep found something of ours that no lease explains.
    OrphanFound {
        /// Where.
        target: ResourceName,
        /// Its name there.
        name: String,
    },
    /// What a sweep had found is proven gone.
    OrphanGone {
        /// Where.
        target: ResourceName,
        /// Its name there.
        name: String,
        /// The proof.
        evidence: Evidence,
    },
    /// A request that never became a grant was refused.
    Refused {
        /// The identity that asked.
        agent: AgentId,
        /// Why: a problem's type.
        problem: String,
        /// How many like it this stands for.
        count: u64,
    },
    /// A reviewer's vote was refused.
    VoteRefused {
        /// On which grant.
        grant: GrantId,
        /// Whose.
        person: PersonId,
        /// Why.
        problem: String,
    },
    /// More votes of one person were refused than are recorded one by one.
    VotesRefused {
        /// Whose.
        person: PersonId,
        /// Why, in a word.
        problem: String,
        /// How many this stands for.
        count: u64,
    },
    /// The record was restored from a backup, into a new data folder. What was in force is ended right behind this.
    Restored {
        /// How many records the backup has.
        records: u64,
        /// The root of the Merkle tree over them, base64.
        root: String,
        /// When the backup was made (wall clock).
        made_at: Timestamp,
        /// The size of the newest checkpoint from elsewhere that it was compared with.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        newest_size: Option<u64>,
        /// Its root, base64.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        newest_root: Option<String>,
        /// True if the operator restored it though later records are lost, or may be.
        may_lack_records: bool,
    },
    /// A credential was asked for again after it had been handed over, and minted anew.
    Replaced {
        /// Under which grant.
        grant: GrantId,
    },
}
