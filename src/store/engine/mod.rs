//! One process's store: decides under one lock, lets the log make it durable, publishes in order.
//!
//! Two states are kept apart. The *head* is what the next batch must follow from; the *view* is what is
//! durable. A reply, a page or a driver sees the view only, so a write that fails takes nothing back that
//! anybody saw: what it put on the head is taken out again (guarantees 2 and 8).

mod api;
mod ask;
pub(super) mod facts;
pub(super) mod head;
mod keeper;
mod publisher;
mod seams;
pub(super) mod watchers;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::view::{Changed, View};
use super::{Appended, Batch, StoreError};
use crate::core::event::BrokerEvent;
use crate::core::grant::Grant;
use crate::core::id::{GrantId, LeaseId, Timestamp};
use crate::core::lease::LeaseState;
use crate::failpoint::{self, Point};
use crate::runtime::{Runtime, Task, start};

use facts::Facts;
use head::{Head, No};
use publisher::InFlight;
use watchers::Watchers;

pub use keeper::{Keeper, Kept};
pub(super) use seams::write_record;
pub use seams::{Archive, Log, Receipt, Record, Snapshot, read_record};

/// What changed is given to the archive at most this late.
const ARCHIVE_EVERY: Duration = Duration::from_millis(500);

/// What the lock guards.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) view: View,
    pub(super) head: Head,
    keeper: Keeper,
    /// Batches that were queued.
    pub(super) queued: u64,
    pub(super) is_closed: bool,
}

/// The parts that the engine's own tasks need too.
struct Shared<L: Log, A: Archive> {
    runtime: Arc<dyn Runtime>,
    log: L,
    archive: A,
    inner: Mutex<Inner>,
    watchers: Watchers,
    due: Notify,
    dirty: Notify,
    /// Batches that were answered, and who waits for more of them. (A `watch` would wake its waiters in an order that it
    /// draws: a simulation could not be repeated.)
    answered: AtomicU64,
    was_answered: Notify,
}

/// The store of one process, around a log and an archive.
pub struct Engine<L: Log, A: Archive> {
    shared: Arc<Shared<L, A>>,
    /// As it was when the store was opened.
    last_run: (Option<BrokerEvent>, Timestamp),
    /// Leases that were intended then.
    left: Vec<(GrantId, LeaseId)>,
    queue: Mutex<Option<mpsc::UnboundedSender<InFlight>>>,
    tasks: Mutex<Vec<Task<()>>>,
    stop_archiving: CancellationToken,
    recovering: tokio::sync::Mutex<()>,
    conflicts: AtomicU64,
}

impl<L: Log, A: Archive> Engine<L, A> {
    /// Starts the store on a view that is already what the log says. `keeper` knows what of it the archive lacks.
    pub fn start(runtime: Arc<dyn Runtime>, log: L, archive: A, view: View, keeper: Keeper) -> Self {
        let (queue, rx) = mpsc::unbounded_channel();
        let last_run = view.last_run();
        let intended = |g: &Arc<Grant>| {
            let leases = g.leases.values().filter(|l| matches!(l.state, LeaseState::Intended));
            leases.map(|l| (g.id, l.intent.lease)).collect::<Vec<_>>()
        };
        let left = view.open().flat_map(intended).collect();
        let inner = Inner { keeper, ..Inner::on(view) };
        let shared = Arc::new(Shared {
            runtime: Arc::clone(&runtime),
            log,
            archive,
            inner: Mutex::new(inner),
            watchers: Watchers::default(),
            due: Notify::new(),
            dirty: Notify::new(),
            answered: AtomicU64::new(0),
            was_answered: Notify::new(),
        });
        let stop_archiving = CancellationToken::new();
        let publisher = start(runtime.as_ref(), publisher::run(Arc::clone(&shared), rx));
        let archiver = start(runtime.as_ref(), keeper::run(Arc::clone(&shared), stop_archiving.clone()));
        Self {
            shared,
            last_run,
            left,
            queue: Mutex::new(Some(queue)),
            tasks: Mutex::new(vec![publisher, archiver]),
            stop_archiving,
            recovering: tokio::sync::Mutex::new(()),
            conflicts: AtomicU64::new(0),
        }
    }

    /// Checks a batch and queues it, both under the lock: the order of checking is the order in the log.
    fn queue(
        &self,
        batch: Batch,
        payloads: Vec<Vec<u8>>,
    ) -> Result<oneshot::Receiver<Result<Appended, StoreError>>, No> {
        let shared = &*self.shared;
        let facts = {
            let (evictions, in_memory) = shared.inner.lock().in_memory(&batch);
            Facts::of(&batch, &shared.archive, evictions, &in_memory)?
        };
        let mut inner = shared.inner.lock();
        if inner.is_closed {
            return Err(closed().into());
        }
        let facts = if facts.evictions == inner.keeper.evictions() {
            facts
        } else {
            // Something left memory meanwhile. It is rare, so the archive is asked under the lock this once.
            let (evictions, in_memory) = inner.in_memory(&batch);
            Facts::of(&batch, &shared.archive, evictions, &in_memory)?
        };
        // Read before anything is queued: see `head.rs`.
        let generation = shared.log.generation();
        let (after, rests_on) = inner.check(&batch, &facts)?;
        // Too many rather than too few: what is on its way may be in the view already.
        failpoint::at(Point::AppendChecked);
        let open = inner.view.open_len() + inner.head.len() + after.len();
        let receipt = shared.log.enqueue(payloads, batch.urgent, rests_on, open)?;
        failpoint::at(Point::AppendQueued);
        let inner = &mut *inner;
        for (agent, known) in facts.agents {
            inner.view.restore_agent(agent, known);
        }
        inner.head.push(&batch.events, &after, rests_on.map_or(generation, |g| g.min(generation)));
        inner.queued += 1;
        let (reply, answer) = oneshot::channel();
        let in_flight = InFlight { receipt, at: batch.at, events: batch.events, after, reply };
        // Open as long as the store isn't closed, which was looked at above.
        if let Some(queue) = &*self.queue.lock() {
            let _ = queue.send(in_flight);
        }
        Ok(answer)
    }

    /// Waits until everything that is on its way now is answered.
    async fn settled(&self) {
        let target = self.shared.inner.lock().queued;
        loop {
            let mut more = std::pin::pin!(self.shared.was_answered.notified());
            more.as_mut().enable(); // before looking, so that none is missed
            if self.shared.answered.load(Ordering::Acquire) >= target {
                return;
            }
            more.await;
        }
    }

    /// The grant as the head has it.
    fn head_of(&self, id: GrantId) -> Result<Option<Arc<Grant>>, StoreError> {
        {
            let inner = self.shared.inner.lock();
            if let Some(grant) = inner.head.get(id) {
                return Ok(Some(Arc::clone(grant)));
            }
            if let Some(stored) = inner.view.get(id) {
                return Ok(Some(Arc::clone(&stored.grant)));
            }
        }
        Ok(self.shared.archive.grant(id)?.map(|s| s.grant))
    }
}

impl<L: Log, A: Archive> Drop for Engine<L, A> {
    fn drop(&mut self) {
        self.stop_archiving.cancel(); // the publisher ends with the queue
    }
}

impl Inner {
    /// On a view that is what the log says.
    pub(super) fn on(view: View) -> Self {
        Self { view, head: Head::default(), keeper: Keeper::default(), queued: 0, is_closed: false }
    }

    /// What of a batch needn't be asked of the archive, and as of when.
    pub(super) fn in_memory(&self, batch: &Batch) -> (u64, facts::InMemory) {
        let mut known = facts::InMemory::default();
        let expected = batch.expect.iter().filter_map(|e| match e {
            super::Expect::Version(id, _) => Some(*id),
            _ => None,
        });
        let touched = batch.events.iter().filter_map(|e| match e {
            crate::core::event::Event::Grant { id, .. } => Some(*id),
            _ => None,
        });
        for id in expected.chain(touched) {
            if self.head.get(id).is_some() || self.view.get(id).is_some() {
                known.grants.insert(id);
            }
        }
        for (_, request) in batch.events.iter().filter_map(super::view::requested) {
            if self.view.agent(&request.agent.id).is_some() {
                known.agents.insert(request.agent.id.clone());
            }
        }
        (self.keeper.evictions(), known)
    }
}

pub(super) fn closed() -> StoreError {
    StoreError::Unavailable("the store is closed: the broker is shutting down".to_owned())
}

/// When a final grant became final.
pub fn over_at(grant: &Grant) -> Timestamp {
    use crate::core::grant::GrantState as S;
    match &grant.state {
        S::Ended { at, .. }
        | S::Denied { at, .. }
        | S::Lapsed { at }
        | S::Cancelled { at }
        | S::Withdrawn { at, .. } => *at,
        S::Active { since, .. } | S::Ending { since, .. } => *since,
        S::Requested | S::Pending { .. } => grant.requested_at,
    }
}

impl Changed {
    fn is_empty(&self) -> bool {
        self.grants.is_empty() && self.tasks.is_empty() && self.holdings.is_empty() && self.agents.is_empty()
    }
}
