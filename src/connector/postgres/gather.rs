//! Work that waits for a turn: whoever gets one takes along everybody who waits, and shares statements with them.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::core::event::Urgency;

/// What waits, and the turns that there are.
pub struct Gather<J> {
    state: Mutex<State<J>>,
    turns: Arc<Semaphore>,
}

struct State<J> {
    /// The most urgent first, then as they came; each with how many roles it is about.
    waiting: BTreeMap<(Urgency, u64), (usize, J)>,
    count: u64,
    /// Roles in turns.
    at_work: usize,
}

/// A turn. It lasts until this is dropped.
pub struct Turn<'a, J> {
    /// Whose it is: none if somebody else took them along.
    pub jobs: Vec<J>,
    of: &'a Gather<J>,
    roles: usize,
    _permit: Option<OwnedSemaphorePermit>,
}

impl<J> Gather<J> {
    /// With so many turns at once.
    pub fn new(turns: usize) -> Self {
        let state = State { waiting: BTreeMap::new(), count: 0, at_work: 0 };
        Self { state: Mutex::new(state), turns: Arc::new(Semaphore::new(turns)) }
    }

    /// Puts one that is about so many roles behind all that are as urgent. Somebody must take a [turn](Gather::turn) for it.
    pub fn put(&self, urgency: Urgency, roles: usize, job: J) {
        let mut state = self.state.lock();
        state.count += 1;
        let count = state.count;
        state.waiting.insert((urgency, count), (roles, job));
    }

    /// How many roles are before one that comes now: they wait, or it is their turn.
    pub fn before(&self) -> usize {
        let state = self.state.lock();
        state.at_work + state.waiting.values().map(|(roles, _)| roles).sum::<usize>()
    }

    /// Waits for a turn, and gets with it all that wait by then, at most `max` roles (and one job in any case).
    pub async fn turn(&self, max: usize) -> Turn<'_, J> {
        // Nobody closes it.
        let turn = Arc::clone(&self.turns).acquire_owned().await.ok();
        let (mut jobs, mut roles) = (Vec::new(), 0);
        let mut state = self.state.lock();
        while let Some(next) = state.waiting.first_entry()
            && (jobs.is_empty() || roles + next.get().0 <= max)
        {
            let (more, job) = next.remove();
            roles += more;
            jobs.push(job);
        }
        state.at_work += roles;
        Turn { jobs, of: self, roles, _permit: turn }
    }

    /// Everybody who waits, without a turn.
    pub fn drain(&self) -> Vec<J> {
        std::mem::take(&mut self.state.lock().waiting).into_values().map(|(_, job)| job).collect()
    }
}

impl<J> Drop for Turn<'_, J> {
    fn drop(&mut self) {
        self.of.state.lock().at_work -= self.roles;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_most_urgent_go_first_and_as_many_as_fit_go_together() {
        let gather = Gather::new(1);
        for (urgency, roles, name) in [
            (Urgency::Over, 3, "expired"),
            (Urgency::Over, 2, "expired too"),
            (Urgency::Frozen, 1, "frozen"),
            (Urgency::Taken, 9, "revoked"),
        ] {
            gather.put(urgency, roles, name);
        }
        assert_eq!(gather.before(), 15);
        let first = gather.turn(10).await;
        assert_eq!(first.jobs, ["frozen", "revoked"]);
        assert_eq!(gather.before(), 15, "they are still before whoever comes now");
        drop(first);
        // More than fits goes alone.
        gather.put(Urgency::Frozen, 20, "many frozen");
        assert_eq!(gather.turn(10).await.jobs, ["many frozen"]);
        assert_eq!(gather.turn(4).await.jobs, ["expired"]);
        assert_eq!(gather.turn(4).await.jobs, ["expired too"]);
        assert!(gather.turn(4).await.jobs.is_empty());
        assert_eq!(gather.before(), 0);
    }
}
