//! Who waits for a grant to change.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use crate::core::id::GrantId;

/// Everybody who waits, by grant, counted.
#[derive(Debug, Default)]
pub(in crate::store) struct Watchers(Mutex<HashMap<GrantId, (Arc<Notify>, usize)>>);

/// One who waits. Dropped (also when the waiting is given up), it leaves nothing behind.
pub(in crate::store) struct Watcher<'a> {
    all: &'a Watchers,
    id: GrantId,
    notify: Arc<Notify>,
}

impl Watchers {
    pub(in crate::store) fn watch(&self, id: GrantId) -> Watcher<'_> {
        let mut all = self.0.lock();
        let (notify, count) = all.entry(id).or_default();
        *count += 1;
        Watcher { all: self, id, notify: Arc::clone(notify) }
    }
    pub(in crate::store) fn wake(&self, changed: &BTreeSet<GrantId>) {
        let all = self.0.lock();
        if !all.is_empty() {
            for (notify, _) in changed.iter().filter_map(|id| all.get(id)) {
                notify.notify_waiters();
            }
        }
    }
    pub(in crate::store) fn len(&self) -> usize {
        self.0.lock().len()
    }
}

impl Watcher<'_> {
    /// Comes at the next change after it is enabled.
    pub(in crate::store) fn notified(&self) -> Notified<'_> {
        self.notify.notified()
    }
}

impl Drop for Watcher<'_> {
    fn drop(&mut self) {
        let mut all = self.all.0.lock();
        if let Some((_, count)) = all.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.id);
            }
        }
    }
}
