//! A lease: one credential minted under a grant, from before it exists until it is proven gone.
//!
//! ```text
//! Intended ─▶ Live ─▶ Revoking ─▶ Revoked(evidence)
//!     └─ error, crash, timeout ─▶ Unknown ─▶ Absent(evidence) | Revoking
//! ```
//!
//! Where a target no longer exists there is nobody left to ask: `Revoking` or `Unknown`, tried in vain, becomes
//! `Absent` by a person's attestation.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::id::{GrantId, LeaseId, PersonId, ResourceName, Timestamp};
use super::permission::{PERMISSIONS_MAX, Permission};
use super::strict::no_fields;

/// Most leases of one grant that are not proven gone: replacing again and again while a target can't end
/// anything must not pile up credentials.
pub const OPEN_LEASES_MAX: usize = 4 * PERMISSIONS_MAX;

/// Why the broker may say that a credential is gone (guarantee 5).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Evidence {
    /// The target, asked for an id that was seen live there before, says that it is gone.
    TargetSaysGone {
        /// What was asked and what was answered, for an auditor.
        detail: String,
    },
    /// The credential itself was tried and refused.
    TriedAndRefused {
        /// What was tried and what was answered.
        detail: String,
    },
    /// The credential's own expiry has passed, by more than the skew.
    Expired {
        /// Expiry, in wall-clock milliseconds since the epoch.
        not_after: Timestamp,
        /// Allowance for the target's clock, in seconds.
        skew_secs: u64,
    },
}

/// What a connector needs in order to find one credential at its target again. Non-secret.
///
/// Journaled, so its form is the connector's promise to its own future versions.
pub type Handle = Value;

/// What the broker is about to mint. Durable before the connector sees it (guarantee 1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseIntent {
    /// The lease.
    pub lease: LeaseId,
    /// The grant it belongs to.
    pub grant: GrantId,
    /// The name at the target: prefix and keyed hash, deterministic, ≤ 48 bytes of `[a-z0-9_]`.
    pub name: String,
    /// The target where it is minted. Fixed here: a lease is ended where it was made, whatever becomes of its
    /// resource in the catalogue (guarantee 4).
    pub target: ResourceName,
    /// What the credential may do: one permission of the grant.
    pub permission: Permission,
    /// When the intent was made (broker's clock).
    pub intended_at: Timestamp,
    /// How long the credential may live from `intended_at`, in seconds. Relative, so that a target
    /// (or a token) counts it on its own clock.
    pub lifetime_secs: u64,
}

/// What stands in the view of one lease: enough to end it without any other record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lease {
    /// What was to be minted.
    pub intent: LeaseIntent,
    /// Where the target's object can be found; grows as the connector learns more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handle: Option<Handle>,
    /// When the credential dies by itself (wall clock), where the target has native expiry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_after: Option<Timestamp>,
    /// Where the lease is in its life.
    pub state: LeaseState,
}

/// Where a lease is in its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case", deny_unknown_fields)]
pub enum LeaseState {
    /// Durable intent; the target may or may not have been reached yet.
    #[serde(deserialize_with = "no_fields")]
    Intended,
    /// The target confirmed it, and this is durable: its secret may leave the broker, once.
    Live {
        /// When.
        since: Timestamp,
        /// When its secret was handed over, if it was.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        released_at: Option<Timestamp>,
    },
    /// It is not known whether it exists: the call left, no clear answer came back.
    Unknown {
        /// When that was noticed.
        since: Timestamp,
        /// What is known, for an operator.
        why: String,
        /// Before this moment its absence proves nothing: the mint may still be under way at the target.
        not_before: Timestamp,
        /// How it is going.
        progress: Progress,
    },
    /// Being ended. Stays so, visibly, until there is evidence. There is no "gave up".
    Revoking {
        /// When the ending began.
        since: Timestamp,
        /// How it is going.
        progress: Progress,
    },
    /// Proven gone after it was live.
    Revoked {
        /// When it was proven.
        at: Timestamp,
        /// The proof.
        evidence: Evidence,
    },
    /// Never came into being, or is gone without having been seen live; or a person attests that its target is gone.
    Absent {
        /// When that was known.
        at: Timestamp,
        /// How it is known.
        absence: Absence,
    },
}

/// Why nothing of a lease is said to be at its target, other than a [revocation](LeaseState::Revoked).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Absence {
    /// The call was never sent, or the target refused it before any effect.
    NotMinted {
        /// What happened.
        why: String,
    },
    /// It was looked for, after the longest mint was over, and proven gone.
    Proven {
        /// The proof.
        evidence: Evidence,
    },
    /// A person attests that its target no longer exists. Nobody looked: this is no evidence.
    Attested {
        /// Who says so.
        by: PersonId,
        /// Why.
        reason: String,
    },
}

/// Attempts at something that is retried until it succeeds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Failed attempts so far.
    pub attempts: u32,
    /// The last failure, for an operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// Not before this moment (broker's clock).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_try: Option<Timestamp>,
}

impl LeaseState {
    /// Can a lease in doubt be said to be in doubt anew at this moment, to be looked for from `not_before` on?
    pub fn may_be_doubted_anew(&self, at: Timestamp, not_before: Timestamp) -> bool {
        match self {
            // Noticed in what is the future by now: the clock was set back, and so must the moment be from which on it is
            // looked for, or that is years away (guarantee 10). Else that moment moves later only: the clock leapt, and a
            // mint may be under way still (guarantee 5).
            Self::Unknown { since, not_before: until, .. } => at < *since || not_before > *until,
            _ => false,
        }
    }
}

impl Lease {
    /// True once there is evidence that nothing of it is left, or a person's attestation in its place.
    pub const fn is_gone(&self) -> bool {
        matches!(self.state, LeaseState::Revoked { .. } | LeaseState::Absent { .. })
    }
    /// True if an attempt to end it, or to look for it, has failed.
    pub const fn resists(&self) -> bool {
        match &self.state {
            LeaseState::Revoking { progress, .. } | LeaseState::Unknown { progress, .. } => progress.attempts > 0,
            _ => false,
        }
    }
    /// True if the target confirmed it at some time: only then does "unknown id" prove anything.
    pub const fn was_seen_live(&self) -> bool {
        matches!(self.state, LeaseState::Live { .. } | LeaseState::Revoking { .. } | LeaseState::Revoked { .. })
    }
}
