//! One role on its way out: what is known, what was done to it, and what proves its end.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::connector::{Gone, Observation};
use crate::core::lease::{Evidence, Handle};

/// Objects of others that are named in an observation; more are counted.
const NAMED_MAX: usize = 10;

/// One role on its way out.
#[derive(Debug)]
pub struct Ending {
    /// The role's name; names are never reused.
    pub name: String,
    /// Its OID, as saved when it was minted.
    pub saved: Option<u32>,
    /// The OID under that name, as last seen in this ending.
    pub found: Option<u32>,
    /// Whether the role was there when last looked for.
    pub present: bool,
    /// Whether a live role was seen, by the mint or by this ending.
    pub seen_live: bool,
    /// Groups, login and memberships are cut.
    pub cut: bool,
    /// Time between the two polls that found no session.
    pub quiet_for: Option<Duration>,
    /// When this ending was asked for.
    pub started: Instant,
    /// From there until access was cut.
    pub access_cut: Option<Duration>,
    /// What was done.
    pub tally: Tally,
    /// Why it can't go on now.
    pub stuck: Option<String>,
    /// True if what stands in the way is a server that can't be asked: nothing that is done to this role helps.
    pub away: bool,
    /// A role that was made so that what it owns can be dropped, until that is dropped itself.
    pub way: Option<String>,
    /// The proof.
    pub proof: Option<String>,
}

/// What was done to a role.
#[derive(Debug, Default)]
pub struct Tally {
    /// Sessions seen and terminated, by process.
    pub sessions: BTreeSet<i32>,
    /// Sessions that hid from `pg_stat_activity`.
    pub hidden: BTreeSet<i32>,
    /// Prepared transactions rolled back.
    pub prepared: u64,
    /// Objects it owned.
    pub owned: u64,
    /// Where they were.
    pub owned_in: BTreeSet<String>,
    /// Objects of others that depended on them and went with them.
    pub others: BTreeSet<String>,
    /// Sessions of other leases that stood in the way.
    pub blockers: BTreeSet<i32>,
}

impl Ending {
    /// Begins.
    pub fn new(name: &str, handle: Option<&Handle>, seen_live: bool) -> Self {
        Self {
            name: name.to_owned(),
            saved: handle.and_then(saved_oid),
            found: None,
            present: false,
            seen_live,
            cut: false,
            quiet_for: None,
            started: Instant::now(),
            access_cut: None,
            tally: Tally::default(),
            stuck: None,
            away: false,
            way: None,
            proof: None,
        }
    }

    /// True while there is something to do in this round.
    pub const fn is_open(&self) -> bool {
        self.stuck.is_none() && self.proof.is_none()
    }

    /// Every OID that stands for it.
    pub fn oids(&self) -> impl Iterator<Item = u32> {
        self.saved.into_iter().chain(self.found.filter(|found| Some(*found) != self.saved))
    }

    /// Forgets what the last round concluded, not what it did.
    pub fn again(&mut self) {
        self.cut = false;
        self.quiet_for = None;
        self.stuck = None;
        self.away = false;
    }

    /// What the journal gets, once there is proof.
    pub fn gone(self) -> Result<Gone, Box<Self>> {
        let Some(detail) = self.proof.clone() else { return Err(Box::new(self)) };
        let t = &self.tally;
        let mut seen = Vec::new();
        let mut note = |what: &str, count: usize, detail: Option<String>| {
            if count > 0 {
                seen.push(Observation { what: what.to_owned(), count: count as u64, detail });
            }
        };
        note("sessions_cut", t.sessions.len(), None);
        note("hidden_sessions_cut", t.hidden.len(), Some("sessions that hid by a start-up delay".to_owned()));
        note("prepared_transactions_rolled_back", usize::try_from(t.prepared).unwrap_or(usize::MAX), None);
        let places = t.owned_in.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        note("objects_dropped", usize::try_from(t.owned).unwrap_or(usize::MAX), Some(format!("in {places}")));
        let named = t.others.iter().take(NAMED_MAX).map(String::as_str).collect::<Vec<_>>().join("; ");
        note("objects_of_others_dropped", t.others.len(), Some(named));
        note("blocking_sessions_of_other_leases_cut", t.blockers.len(), None);
        Ok(Gone { evidence: Evidence::TargetSaysGone { detail }, seen, access_cut: self.access_cut })
    }
}

/// The handle of a role: journaled, so this form stays readable for ever.
pub fn handle(oid: u32) -> Handle {
    json!({ "oid": oid })
}

/// Shortest prefix of names that something else makes here: under a shorter one could be anybody's roles.
pub const FOREIGN_PREFIX_BYTES_MIN: usize = 4;

/// The handle of a role that something in front of this target made under a prefix of its own.
pub fn foreign_handle(oid: u32, prefix: &str) -> Handle {
    json!({ "oid": oid, "prefix": prefix })
}

/// The prefix in such a handle.
pub fn foreign_prefix(handle: &Handle) -> Option<&str> {
    handle.get("prefix").and_then(Value::as_str).filter(|p| p.len() >= FOREIGN_PREFIX_BYTES_MIN)
}

/// The OID in a handle.
pub fn saved_oid(handle: &Handle) -> Option<u32> {
    handle.get("oid").and_then(Value::as_u64).and_then(|oid| u32::try_from(oid).ok()).filter(|oid| *oid != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_round_trip_and_nonsense_is_no_oid() {
        assert_eq!(saved_oid(&handle(16_500)), Some(16_500));
        for bad in [json!(null), json!({"oid": 0}), json!({"oid": "1"}), json!({"oid": 4_294_967_296_u64})] {
            assert_eq!(saved_oid(&bad), None, "{bad}");
        }
    }

    #[test]
    fn l12_nothing_is_gone_without_proof() {
        assert!(Ending::new("lease_x", Some(&handle(1)), true).gone().is_err());
    }
}
