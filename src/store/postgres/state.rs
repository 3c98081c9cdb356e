//! What a node knows: the record up to where it has read it, and what is on its way from here. Pure.
//!
//! Every write is compared with the record's tail. If another node was first, what it wrote is taken in, and what is on
//! its way is decided anew on top of it ([`State::rebase`]): so each node decides on the whole record, as one process does.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use tokio::sync::oneshot;

use super::tables::{Row, WriteId};
use crate::audit::frame::leaf_of;
use crate::audit::merkle::{Frontier, Hash};
use crate::core::id::{GrantId, Timestamp};
use crate::mutation::Mutation;
use crate::store::engine::facts::Facts;
use crate::store::engine::head::{After, Head, No};
use crate::store::engine::{Inner, read_record};
use crate::store::view::{Changed, View};
use crate::store::{Appended, Batch, Job, StoreError};

/// What became final stays in memory so long if others are always under way, in milliseconds: longer than any append
/// takes.
const FINALS_MS: u64 = 60_000;
/// Most batches in one write.
const BATCHES_MAX: usize = 64;
/// Most bytes of events in one write.
const BYTES_MAX: usize = 2 << 20;
/// Most batches that wait.
pub(super) const QUEUE_MAX: usize = 10_000;
/// Holdings are looked through for what can be forgotten this often, in milliseconds of the broker's clock.
const PRUNE_EVERY_MS: u64 = 3_600_000;

type Reply = oneshot::Sender<Result<Appended, StoreError>>;

/// Where the record ends.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Tail {
    pub(super) seq: u64,
    pub(super) leaf: Hash,
    pub(super) tree: Frontier,
}

impl Tail {
    /// Goes on by one record. Returns its leaf hash.
    pub(super) fn push(&mut self, at: Timestamp, payload: &[u8]) -> Hash {
        self.seq += 1;
        self.leaf = leaf_of(self.seq, at.0, &self.leaf, payload);
        self.tree.push(self.leaf);
        self.leaf
    }
}

/// A batch that waits for its place in the record.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) batch: Batch,
    /// The events as they stand in the record, each with the moment that its leaf tells.
    pub(super) payloads: Vec<(Timestamp, Vec<u8>)>,
    pub(super) facts: Facts,
    pub(super) after: After,
    /// Taken once the caller was told something.
    pub(super) reply: Option<Reply>,
    /// Until then the caller waits, on the boot-time clock in milliseconds.
    pub(super) until_ms: u64,
}

/// A write whose answer is still out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pending {
    pub(super) id: WriteId,
    /// So many batches at the front of the queue.
    pub(super) count: usize,
}

/// Everything behind the lock.
#[derive(Debug)]
pub(super) struct State {
    pub(super) inner: Inner,
    pub(super) queue: VecDeque<Queued>,
    pub(super) tail: Tail,
    /// Why nothing can be written now.
    pub(super) down: Option<String>,
    /// Why nothing can be written by this process any more.
    pub(super) broken: Option<String>,
    /// What was handed out to this run, with the epoch of the claim.
    pub(super) claims: HashMap<Job, i64>,
    /// Appends that have asked the database something and aren't queued yet.
    pub(super) asking: usize,
    /// Told that they conflict, once what they conflict with can be read.
    losers: Vec<Reply>,
    finals: VecDeque<(u64, GrantId)>,
    pruned_at: Timestamp,
    /// Batches that were answered.
    pub(super) answered: u64,
    /// Times that another node was first.
    pub(super) lost_races: u64,
}

impl State {
    pub(super) fn new(view: View, tail: Tail) -> Self {
        let last_at = view.last_at();
        Self {
            inner: Inner::on(view),
            queue: VecDeque::new(),
            tail,
            down: None,
            broken: None,
            claims: HashMap::new(),
            asking: 0,
            losers: Vec::new(),
            finals: VecDeque::new(),
            pruned_at: last_at,
            answered: 0,
            lost_races: 0,
        }
    }

    /// Why nothing can be taken.
    pub(super) fn refuses(&self) -> Option<StoreError> {
        if self.inner.is_closed {
            return Some(crate::store::engine::closed());
        }
        if let Some(why) = &self.broken {
            return Some(StoreError::Unreadable(why.clone()));
        }
        if let Some(why) = &self.down {
            return Some(StoreError::Unavailable(why.clone()));
        }
        let is_full = self.queue.len() >= QUEUE_MAX;
        is_full.then(|| StoreError::Unavailable(format!("{QUEUE_MAX} writes wait already; try again")))
    }

    /// The database ends at `now` (the last record and its leaf), after this node had read up to `read`. If it has less, or
    /// something else in its place, nothing can be written by this process any more.
    pub(super) fn went_back(&mut self, read: (u64, Hash), now: (u64, Hash)) -> Result<(), StoreError> {
        if now.0 > read.0 || now == read {
            return Ok(());
        }
        let why = format!(
            "the database has lost acknowledged records: it ends at {}, and this node has read up to {}. A \
             fail-over or restore went back in time. Stop all nodes; bring the database back to what it was, or \
             start them again to go on from what is there (targets are swept for what it doesn't know of)",
            now.0, read.0
        );
        self.broken = Some(why.clone());
        Err(StoreError::Unreadable(why))
    }

    /// Checks a batch against all there is, and queues it.
    pub(super) fn enqueue(&mut self, mut queued: Queued) -> Result<(), No> {
        if let Some(error) = self.refuses() {
            return Err(error.into());
        }
        let (after, _) = self.inner.check(&queued.batch, &queued.facts)?;
        self.inner.head.push(&queued.batch.events, &after, 0);
        queued.after = after;
        self.inner.queued += 1;
        self.queue.push_back(queued);
        Ok(())
    }

    /// How many batches go into the next write.
    pub(super) fn group(&self) -> usize {
        let mut bytes = 0;
        let fits = |q: &&Queued| {
            bytes += q.payloads.iter().map(|(_, p)| p.len()).sum::<usize>();
            bytes <= BYTES_MAX
        };
        self.queue.iter().take(BATCHES_MAX).take_while(fits).count().max(usize::from(!self.queue.is_empty()))
    }

    /// The first `count` batches are durable.
    pub(super) fn publish(&mut self, count: usize, changed: &mut Changed) {
        for _ in 0..count {
            let Some(queued) = self.queue.pop_front() else { return };
            let Queued { batch, payloads, after, reply, .. } = queued;
            let first_seq = self.tail.seq + 1;
            for (at, payload) in &payloads {
                self.tail.push(*at, payload);
            }
            self.inner.head.pop(&batch.events, &after, true);
            self.inner.view.publish(first_seq, batch.at, &batch.events, &after, changed);
            self.answered += 1;
            if let Some(reply) = reply {
                // The caller may be gone; what it wanted is done all the same.
                let _ = reply.send(Ok(Appended { first_seq, last_seq: self.tail.seq }));
            }
        }
    }

    /// Takes in what others wrote. `pending` is ours: it may be among it. True if it was.
    pub(super) fn take_in(
        &mut self,
        rows: Vec<Row>,
        pending: Option<Pending>,
        changed: &mut Changed,
    ) -> Result<bool, StoreError> {
        let (mut is_ours_in, mut others) = (false, false);
        let mut skip_to = 0;
        for row in rows {
            if row.seq <= skip_to {
                continue;
            }
            if let Some(ours) = pending.filter(|p| p.id == row.write) {
                self.publish(ours.count, changed);
                (is_ours_in, skip_to) = (true, self.tail.seq);
                continue;
            }
            if row.seq != self.tail.seq + 1 || self.tail.push(row.at, &row.payload) != row.leaf {
                let why = format!(
                    "record {} in the database is not what was written, or one before it is missing: somebody changed \
                     the tables, or a restore or fail-over lost acknowledged records. Stop all nodes and run \
                     `countersign audit verify` against a checkpoint that is kept elsewhere",
                    row.seq
                );
                self.broken = Some(why.clone());
                return Err(StoreError::Unreadable(why));
            }
            let record = read_record(row.seq, &row.payload)?;
            self.inner.view.replay(row.seq, record.at, &record.event, changed)?;
            others = true;
        }
        if others {
            self.lost_races += u64::from(!self.queue.is_empty());
            self.rebase();
        }
        Ok(is_ours_in)
    }

    /// Decides anew, on what there is now, about everything that is on its way.
    fn rebase(&mut self) {
        self.inner.head = Head::default();
        for mut queued in std::mem::take(&mut self.queue) {
            if Mutation::NoCompareAndSet.is_on() {
                self.inner.head.push(&queued.batch.events, &queued.after, 0);
                self.queue.push_back(queued);
                continue;
            }
            match self.inner.check(&queued.batch, &queued.facts) {
                Ok((after, _)) => {
                    self.inner.head.push(&queued.batch.events, &after, 0);
                    queued.after = after;
                    self.queue.push_back(queued);
                }
                Err(No::Error(error)) => self.answer(queued, Err(error)),
                Err(No::Conflict) => self.answer(queued, Err(StoreError::Conflict)),
                Err(No::Wait) => {
                    self.answered += 1;
                    self.losers.extend(queued.reply.take());
                }
            }
        }
    }

    fn answer(&mut self, mut queued: Queued, outcome: Result<Appended, StoreError>) {
        self.answered += 1;
        if let Some(reply) = queued.reply.take() {
            let _ = reply.send(outcome);
        }
    }

    /// Refuses the first `count` batches: the database will never take them.
    pub(super) fn refuse(&mut self, count: usize, error: &StoreError) {
        for _ in 0..count {
            if let Some(queued) = self.queue.pop_front() {
                self.answer(queued, Err(error.clone()));
            }
        }
        self.rebase();
    }

    /// Tells those who have waited for long enough. What was not sent is taken back; of what was, the outcome isn't
    /// known, and it stays until it is.
    pub(super) fn expire(&mut self, pending: Option<Pending>, now_ms: u64, why: &str) {
        let sent = pending.map_or(0, |p| p.count);
        let mut is_taken_back = false;
        for (place, queued) in std::mem::take(&mut self.queue).into_iter().enumerate() {
            let mut queued = queued;
            if queued.until_ms > now_ms {
                self.queue.push_back(queued);
            } else if place < sent {
                let why = format!("whether this was recorded is not known yet: {why}");
                if let Some(reply) = queued.reply.take() {
                    let _ = reply.send(Err(StoreError::Unavailable(why)));
                }
                self.queue.push_back(queued);
            } else {
                self.answer(queued, Err(StoreError::Unavailable(why.to_owned())));
                is_taken_back = true;
            }
        }
        if is_taken_back {
            self.rebase();
        }
    }

    /// After a round: what can leave memory does, and those are told who had to wait for it.
    pub(super) fn settle(&mut self, changed: &Changed, now_ms: u64) {
        for reply in self.losers.drain(..) {
            let _ = reply.send(Err(StoreError::Conflict));
        }
        for id in &changed.grants {
            let Some(grant) = self.inner.view.get(*id).map(|s| Arc::clone(&s.grant)) else { continue };
            // What an agent did before is asked of the database.
            self.inner.view.forget_agent(&grant.request.agent.id);
            let still = |job: &Job| crate::store::due::work(&grant).any(|(j, ..)| j == *job);
            self.claims.retain(|job, _| super::grant_of(*job) != *id || still(job));
            if grant.state.is_final() {
                self.finals.push_back((now_ms, *id));
            }
        }
        let is_quiet = self.asking == 0 && self.queue.is_empty();
        while self.finals.front().is_some_and(|(since, _)| is_quiet || now_ms > since + FINALS_MS) {
            if let Some((_, id)) = self.finals.pop_front() {
                self.inner.view.evict(id);
            }
        }
        let last_at = self.inner.view.last_at();
        if last_at >= self.pruned_at.plus_ms(PRUNE_EVERY_MS) {
            self.pruned_at = last_at;
            self.inner.view.prune_holdings();
        }
    }
}
