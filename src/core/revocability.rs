//! What ending a credential does at its target, and what a target told on the way: plain data that
//! reviewers see and the journal keeps.

use serde::{Deserialize, Serialize};

/// `residual_secs` where nothing bounds it: the largest integer that the digest's canonical JSON has.
pub const RESIDUAL_UNBOUNDED_SECS: u64 = super::digest::INTEGER_MAX;

/// What ending a credential really does at its target. Shown to the reviewer before approval and part
/// of the digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revocability {
    /// How it ends.
    pub mode: RevocabilityMode,
    /// Worst case for which a stolen copy still works after the grant's end, in seconds.
    pub residual_secs: u64,
    /// The same, as one sentence for the reviewer.
    pub says: String,
}

/// How a credential ends at its target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RevocabilityMode {
    /// Access is cut when the grant ends, open sessions included.
    Immediate,
    /// New use is stopped when the grant ends; what is open may go on for the residual window.
    NewUseOnly,
    /// Nothing can be done before the credential's own expiry.
    ExpiryOnly,
}

/// What the target itself told while a credential was ended ("seen at the target").
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Observation {
    /// What was seen, for example `sessions_cut`.
    pub what: String,
    /// How many, or how much.
    pub count: u64,
    /// More, for an auditor. Never a secret, bounded by the connector.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}
