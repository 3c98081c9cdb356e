//! Tiers: named levels of risk with their thresholds. The operator lists them mildest first.

use serde::{Deserialize, Serialize};

use super::id::TierName;

/// How much a decision costs the reviewer (CONSOLE.md).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Friction {
    /// Automatic.
    None,
    /// One click.
    One,
    /// One person, deliberately.
    High,
    /// Two persons, the target typed.
    Critical,
}

/// A named level of risk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tier {
    /// Its name.
    pub name: TierName,
    /// How many distinct persons must approve; 0 is automatic.
    pub approvals: u8,
    /// The longest life of a grant at this tier, in seconds from activation.
    pub life_secs_max: u64,
    /// What a decision costs the reviewer.
    pub friction: Friction,
}
