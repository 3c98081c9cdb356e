//! What callers may make the broker write down, however often they call: refusals are recorded one by one up to a
//! rate, and in sums beyond it (regression D9).

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

use crate::core::event::BrokerEvent;
use crate::core::id::Timestamp;
use crate::store::StoreError;

use super::Broker;

/// Identities whose refusals are counted at once; what comes beyond is not told apart.
const COUNTED_MAX: usize = 10_000;

/// How many refusals of one agent, or of one person, are recorded one by one; the rest is counted.
#[derive(Debug)]
pub struct RefusalBudget<W> {
    recorded: HashMap<W, (u64, u32)>,
    counted: BTreeMap<(W, &'static str), u64>,
}

impl<W> Default for RefusalBudget<W> {
    fn default() -> Self {
        Self { recorded: HashMap::new(), counted: BTreeMap::new() }
    }
}

impl<W: Clone + Hash + Ord> RefusalBudget<W> {
    /// May one more be recorded by itself?
    pub(super) fn may_record(&mut self, who: &W, now: Timestamp, per_min: u32) -> bool {
        let minute = now.0 / 60_000;
        if self.recorded.len() > COUNTED_MAX {
            self.recorded.retain(|_, (m, _)| *m == minute);
        }
        let entry = self.recorded.entry(who.clone()).or_insert((minute, 0));
        if entry.0 != minute {
            *entry = (minute, 0);
        }
        entry.1 = entry.1.saturating_add(1);
        entry.1 <= per_min
    }
    /// It is recorded in a sum.
    pub(super) fn count(&mut self, who: &W, problem: &'static str) {
        self.add(who, problem, 1);
    }
    fn add(&mut self, who: &W, problem: &'static str, more: u64) {
        let key = (who.clone(), problem);
        if self.counted.len() < COUNTED_MAX || self.counted.contains_key(&key) {
            *self.counted.entry(key).or_insert(0) += more;
        }
    }
    fn take(&mut self) -> Option<((W, &'static str), u64)> {
        self.counted.pop_first()
    }
}

impl Broker {
    /// Records the refusals that were counted since the last time.
    pub(super) async fn record_refusals(&self) -> Result<(), StoreError> {
        loop {
            let Some(((agent, problem), count)) = self.refusals.lock().take() else { break };
            let what = BrokerEvent::Refused { agent: agent.clone(), problem: problem.to_owned(), count };
            if let Err(error) = self.note(what).await {
                self.refusals.lock().add(&agent, problem, count);
                return Err(error);
            }
        }
        loop {
            let Some(((person, problem), count)) = self.refused_votes.lock().take() else { break };
            let what = BrokerEvent::VotesRefused { person: person.clone(), problem: problem.to_owned(), count };
            if let Err(error) = self.note(what).await {
                self.refused_votes.lock().add(&person, problem, count);
                return Err(error);
            }
        }
        Ok(())
    }
}
