//! Votes: one reviewer's approve or deny, bound to the digest.

use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::id::{PersonId, Timestamp};

/// Longest reason given with a vote or an ending, in characters.
pub const REASON_CHARS_MAX: usize = 500;

/// What a reviewer decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Yes, exactly this.
    Approve,
    /// No.
    Deny,
}

/// One vote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vote {
    /// The person of the directory, not the account: two accounts of one person are one (regression D7).
    pub person: PersonId,
    /// The account that was used (`issuer#subject`).
    pub account: String,
    /// Where the vote came from: `browser`, or in `dev` and `tour` also `terminal`.
    pub via: String,
    /// What was decided.
    pub verdict: Verdict,
    /// What it was decided about.
    pub digest: Digest,
    /// Why, if the reviewer said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When.
    pub at: Timestamp,
}
