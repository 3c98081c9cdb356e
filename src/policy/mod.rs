//! Who may ask for what and at which tier, in Cedar. The engine, the schema made from the catalogue, the
//! facts that policies see, tables of cases. Who the agent is and what it holds, the caller says.
//!
//! What can only be said in one way: the strictest tier of all matching permits wins, and no permit, a
//! `forbid` or any evaluation error is a denial (guarantee 12, regression A18).

mod engine;
mod facts;
mod load;
mod people;
mod reach;
mod schema;
mod summary;
pub mod table;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::core::id::{ActionName, AgentId, PersonId, ResourceName, TaskName, TierName};
use crate::core::permission::Permission;
use crate::core::tier::Tier;

pub use engine::Engine;
pub use summary::{Summary, SummaryRule};

/// Names of what the broker itself decides, beside the operator's rules. A rule's `@id` has no `:`.
pub mod builtin {
    /// No `permit` matched.
    pub const NO_PERMIT: &str = "countersign:no-permit";
    /// A rule, or the request's facts, could not be evaluated.
    pub const EVALUATION_ERROR: &str = "countersign:evaluation-error";
    /// The request names what the catalogue doesn't have, or nothing at all.
    pub const NOT_IN_CATALOGUE: &str = "countersign:not-in-catalogue";
    /// The tier is beyond what the agent's issuer may reach.
    pub const TIER_MAX: &str = "countersign:tier-max";
    /// The tier needs a vote and nobody answers for the agent.
    pub const NO_OWNER: &str = "countersign:no-owner";
    /// The resource isn't isolated, so it can't be exempt from approval.
    pub const NOT_ISOLATED: &str = "countersign:not-isolated";
}

/// What is known of the agent that asks. Verified facts and the operator's directory only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentFacts {
    /// Who it is.
    pub id: AgentId,
    /// The trust domain (`spiffe://corp`) or the OIDC issuer.
    pub issuer: String,
    /// How it proved that: `x509-svid`, `jwt-svid`, `oidc`.
    pub method: String,
    /// Mapped claims; tags of the principal (`principal.hasTag("repository")`).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub attributes: BTreeMap<String, String>,
    /// Who answers for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<PersonId>,
    /// Its team, from the directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub team: Option<String>,
    /// Its groups, from the directory.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub groups: BTreeSet<String>,
    /// The strictest tier that its issuer's identities may reach; `None`: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tier_max: Option<TierName>,
}

/// What is known of the task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskFacts {
    /// Its name.
    pub name: TaskName,
    /// How many agents handed it on before this one; 0: nobody.
    #[serde(default)]
    pub depth: u32,
    /// The life that is asked for, in seconds.
    pub life_secs: u64,
    /// How many requests this agent made lately (the broker's window).
    #[serde(default)]
    pub recent_requests: u32,
    /// Labels of the intent.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub intent_labels: BTreeSet<String>,
}

/// All that an assessment rests on. Recorded, so that a replay sees the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AssessInput {
    /// Who asks.
    pub agent: AgentFacts,
    /// What is asked for, normalised: every bound explicit.
    pub permissions: Vec<Permission>,
    /// For what.
    pub task: TaskFacts,
    /// What the task's tree holds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tree_holds: Vec<Permission>,
    /// What this agent and its owner's agents hold, or held within the window, over all tasks, ended ones
    /// too (regression D2).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held: Vec<Permission>,
}

/// What policy said of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Assessment {
    /// Permitted at a tier, or denied.
    pub outcome: Outcome,
    /// The rules that made it so, strictest first.
    pub reasons: Vec<Reason>,
    /// What could not be decided, for the operator.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub undecided: Vec<String>,
    /// Which policies said so: see [`Engine::version`].
    pub policy_version: String,
}

/// Permitted at a tier, or denied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case", deny_unknown_fields)]
pub enum Outcome {
    /// The tier as it was then, and the longest life.
    Permit {
        /// A snapshot: what the operator changes later doesn't change what was assessed.
        tier: Tier,
        /// Longest life in seconds from activation.
        life_secs: u64,
        /// The life that was asked for, if it was longer than the rules' tiers allow.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        capped_from_secs: Option<u64>,
    },
    /// Refused.
    Deny {
        /// The rule's `@id`, or one of [`builtin`].
        rule: String,
        /// For the agent: what it can do about it.
        reason: String,
    },
}

/// One rule that counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reason {
    /// The rule's `@id`, or one of [`builtin`].
    pub policy: String,
    /// Its tier.
    pub tier: TierName,
    /// Its `@reason`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What is known of a person.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PersonFacts {
    /// Who.
    pub id: PersonId,
    /// Groups, from the directory and from claims that are young enough.
    #[serde(default)]
    pub groups: BTreeSet<String>,
}

/// What is known of a grant that a person acts on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantFacts {
    /// Whose it is.
    pub agent: AgentId,
    /// Who answers for the agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<PersonId>,
    /// The agent's team.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub team: Option<String>,
    /// Its tier.
    pub tier: TierName,
    /// What it permits.
    pub permissions: Vec<Permission>,
}

/// What a person may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PersonAction {
    /// Vote on a request.
    Approve,
    /// See a request or grant.
    See,
    /// End a grant.
    Revoke,
    /// End all that matches, refuse new.
    Freeze,
    /// Read the record, of a grant or the whole journal.
    ReadRecord,
    /// Operate the broker (enrol passkeys, change settings).
    Operate,
}

impl PersonAction {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Approve, Self::See, Self::Revoke, Self::Freeze, Self::ReadRecord, Self::Operate];

    /// As it is written in policies.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Approve => "approve",
            Self::See => "see",
            Self::Revoke => "revoke",
            Self::Freeze => "freeze",
            Self::ReadRecord => "read_record",
            Self::Operate => "operate",
        }
    }

    /// True if it is done to one grant.
    pub const fn is_on_grant(self) -> bool {
        matches!(self, Self::Approve | Self::See | Self::Revoke | Self::ReadRecord)
    }

    /// True if it is done to the broker as a whole.
    pub const fn is_on_broker(self) -> bool {
        matches!(self, Self::Freeze | Self::ReadRecord | Self::Operate)
    }
}

/// What a person acts on.
#[derive(Debug, Clone, Copy)]
pub enum On<'a> {
    /// One grant.
    Grant(&'a GrantFacts),
    /// The broker as a whole.
    Broker,
}

/// Whether a person may. Guarantee 6 (separate persons) is held elsewhere, whatever this says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decision {
    /// The answer.
    pub allowed: bool,
    /// The rules that made it so, or one of [`builtin`].
    pub rules: Vec<String>,
    /// For the person, if refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What could not be decided, for the operator.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub undecided: Vec<String>,
}

/// One thing that an agent may ask for, for `GET /v1/catalogue`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Askable {
    /// The resource.
    pub resource: ResourceName,
    /// The action on it.
    pub action: ActionName,
    /// The tier if it were asked for alone, now, for a second, with nothing held.
    pub tier: TierName,
}
