//! Work that waits for a turn: whoever gets one takes along everybody who waits, and shares statements with them.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What waits, and the turns that there are.
pub struct Gather<J> {
    waiting: Mutex<Vec<J>>,
    turns: Arc<Semaphore>,
}

impl<J> Gather<J> {
    /// With so many turns at once.
    pub fn new(turns: usize) -> Self {
        Self { waiting: Mutex::new(Vec::new()), turns: Arc::new(Semaphore::new(turns)) }
    }

    /// Puts them behind all that wait. Somebody must take a [turn](Gather::turn) for them.
    pub fn put(&self, jobs: impl IntoIterator<Item = J>) {
        self.waiting.lock().extend(jobs);
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.waiting.lock().len()
    }

    /// Waits for a turn, and gets with it all that wait by then, at most `max`: none if somebody else took them along.
    /// The turn lasts until the permit is dropped.
    pub async fn turn(&self, max: usize) -> (Vec<J>, Option<OwnedSemaphorePermit>) {
        // Nobody closes it.
        let turn = Arc::clone(&self.turns).acquire_owned().await.ok();
        let mut waiting = self.waiting.lock();
        let count = waiting.len().min(max);
        (waiting.drain(..count).collect(), turn)
    }
}
