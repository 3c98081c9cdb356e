//! Gives the archive what changed, and takes out of memory what it keeps: final grants, completed tasks, and agents
//! that hold nothing open. Memory stays bounded by what is open, and what became final in the last moment.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::{ARCHIVE_EVERY, Archive, Inner, Log, Shared, Snapshot};
use crate::core::id::{GrantId, TaskKey, Timestamp};
use crate::failpoint::{self, Point};
use crate::runtime::blocking;
use crate::store::StoreError;
use crate::store::view::{Changed, View};

/// Holdings are looked through for what can be forgotten this often, in milliseconds of the broker's clock.
const PRUNE_EVERY_MS: u64 = 3_600_000;
/// So much is taken out of memory at once, that nobody waits long for the lock.
const EVICT_MAX: usize = 64;

/// Knows what the archive lacks.
#[derive(Debug, Default)]
pub struct Keeper {
    changed: Changed,
    seq: u64,
    leaf: [u8; 32],
    /// Up to here it has been kept.
    kept_seq: u64,
    evictions: u64,
    pruned_at: Timestamp,
}

impl Keeper {
    /// The archive has everything up to there.
    pub fn at(seq: u64, leaf: [u8; 32]) -> Self {
        Self { seq, leaf, kept_seq: seq, ..Self::default() }
    }

    /// The view has gone on to there.
    pub fn note(&mut self, changed: &mut Changed, seq: u64, leaf: [u8; 32]) {
        self.changed.grants.extend(changed.grants.iter().copied());
        // Not `append`, which goes through all that is there.
        self.changed.tasks.extend(std::mem::take(&mut changed.tasks));
        self.changed.holdings.extend(std::mem::take(&mut changed.holdings));
        self.changed.agents.extend(std::mem::take(&mut changed.agents));
        self.seq = seq;
        self.leaf = leaf;
    }

    /// The view goes on to there; what that changes is to be added.
    pub fn going_on(&mut self, seq: u64, leaf: [u8; 32]) -> &mut Changed {
        self.seq = seq;
        self.leaf = leaf;
        &mut self.changed
    }

    /// How often something was taken out of memory.
    pub const fn evictions(&self) -> u64 {
        self.evictions
    }

    /// How many changed things the archive lacks.
    pub fn waiting(&self) -> usize {
        self.changed.grants.len() + self.changed.tasks.len() + self.changed.holdings.len() + self.changed.agents.len()
    }

    fn prune(&mut self, view: &mut View) {
        let now = view.last_at();
        if now >= self.pruned_at.plus_ms(PRUNE_EVERY_MS) || now < self.pruned_at {
            self.pruned_at = now;
            self.changed.holdings.extend(view.prune_holdings());
        }
    }

    /// What the archive lacks, if it is anything but the position; with `whole`, if it is anything at all.
    fn snapshot(&mut self, view: &mut View, whole: bool) -> Option<Snapshot> {
        self.prune(view);
        if self.changed.is_empty() && !(whole && self.seq > self.kept_seq) {
            return None;
        }
        let changed = std::mem::take(&mut self.changed);
        let (run, last_at) = view.last_run();
        Some(Snapshot {
            seq: self.seq,
            leaf: self.leaf,
            grants: changed.grants.iter().filter_map(|id| view.get(*id).cloned()).collect(),
            tasks: changed.tasks.into_iter().collect(),
            holdings: changed
                .holdings
                .into_iter()
                .map(|key| {
                    let holding = view.holding(&key);
                    (key, holding)
                })
                .collect(),
            agents: changed
                .agents
                .into_iter()
                .filter_map(|agent| {
                    let known = view.agent(&agent)?.clone();
                    Some((agent, known))
                })
                .collect(),
            freezes: view.freezes(),
            run,
            last_at,
        })
    }

    /// The archive couldn't keep it: it is lacking still.
    fn take_back(&mut self, snapshot: Snapshot) {
        self.changed.grants.extend(snapshot.grants.iter().map(|s| s.grant.id));
        self.changed.tasks.extend(snapshot.tasks);
        self.changed.holdings.extend(snapshot.holdings.into_iter().map(|(key, _)| key));
        self.changed.agents.extend(snapshot.agents.into_iter().map(|(agent, _)| agent));
    }

    /// Keeps what a replay has brought, and takes out of memory what can go. For a start, before anybody else looks.
    pub fn keep_all<A: Archive>(&mut self, view: &mut View, archive: &A) -> Result<(), StoreError> {
        let Some(snapshot) = self.lacking(view) else { return Ok(()) };
        archive.keep(&snapshot)?;
        self.forget(view, &Kept::of(snapshot));
        Ok(())
    }

    /// What a replay has brought that the archive lacks: to be kept while the replay goes on.
    pub fn lacking(&mut self, view: &mut View) -> Option<Snapshot> {
        self.snapshot(view, true)
    }

    /// Takes out of memory what is kept by now, and hasn't changed since.
    pub fn forget(&mut self, view: &mut View, kept: &Kept) {
        self.kept_seq = kept.seq;
        for id in &kept.finals {
            view.evict(*id); // nothing happens any more to what is final
        }
        view.forget_tasks(&kept.tasks);
        for agent in kept.agents.iter().filter(|agent| !self.changed.agents.contains(*agent)) {
            view.forget_agent(agent);
        }
    }
}

/// What may leave memory once a snapshot is kept.
pub struct Kept {
    seq: u64,
    finals: Vec<GrantId>,
    tasks: Vec<TaskKey>,
    agents: BTreeSet<crate::core::id::AgentId>,
}

impl Kept {
    /// Of a snapshot that is kept.
    pub fn of(snapshot: Snapshot) -> Self {
        let is_final = |s: &&crate::store::view::Stored| s.grant.state.is_final();
        let finals: Vec<_> = snapshot.grants.iter().filter(is_final).collect();
        // An agent is looked at when its history was kept, and again when a grant of it is over.
        let mut agents: BTreeSet<_> = finals.iter().map(|s| s.grant.request.agent.id.clone()).collect();
        agents.extend(snapshot.agents.iter().map(|(agent, _)| agent.clone()));
        Self { seq: snapshot.seq, finals: finals.iter().map(|s| s.grant.id).collect(), tasks: snapshot.tasks, agents }
    }
}

/// Runs until it is stopped.
pub(super) async fn run<L: Log, A: Archive>(shared: Arc<Shared<L, A>>, stop: CancellationToken) {
    let mut is_behind = false;
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = shared.dirty.notified(), if !is_behind => {}
            () = std::future::ready(()), if is_behind => {}
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = shared.runtime.sleep(ARCHIVE_EVERY) => {}
        }
        let keeping = Arc::clone(&shared);
        let kept = blocking(shared.runtime.as_ref(), move || keeping.keep(false)).await;
        // The archive is a cache: what it could not keep stays in memory and is tried again.
        is_behind = !matches!(kept, Ok(Ok(())));
        if is_behind {
            tracing::warn!(outcome = ?kept, "the view could not be written; it stays in memory and is tried again");
        }
    }
}

impl<L: Log, A: Archive> Shared<L, A> {
    /// Gives the archive what it lacks, and takes out of memory what it keeps.
    pub(super) fn keep(&self, whole: bool) -> Result<(), StoreError> {
        let snapshot = {
            let inner = &mut *self.inner.lock();
            inner.keeper.snapshot(&mut inner.view, whole)
        };
        let Some(snapshot) = snapshot else { return Ok(()) };
        failpoint::at(Point::ArchiveKeep);
        if let Err(error) = self.archive.keep(&snapshot) {
            self.inner.lock().keeper.take_back(snapshot);
            return Err(error);
        }
        failpoint::at(Point::ArchiveKept);
        let seq = snapshot.seq;
        let kept = Kept::of(snapshot);
        self.inner.lock().keeper.kept_seq = seq;
        for some in kept.finals.chunks(EVICT_MAX) {
            let gone: Vec<_> = {
                let inner = &mut *self.inner.lock();
                inner.keeper.evictions += 1;
                some.iter().filter_map(|id| inner.view.evict(*id)).collect()
            };
            drop(gone); // not under the lock: it is work
        }
        if !kept.tasks.is_empty() {
            let inner = &mut *self.inner.lock();
            inner.keeper.evictions += 1;
            inner.view.forget_tasks(&kept.tasks);
        }
        let agents: Vec<_> = kept.agents.into_iter().collect();
        for some in agents.chunks(EVICT_MAX) {
            let inner = &mut *self.inner.lock();
            inner.keeper.evictions += 1;
            for agent in some {
                inner.forget_agent(agent);
            }
        }
        failpoint::at(Point::ArchiveEvicted);
        Ok(())
    }
}

impl Inner {
    /// An agent leaves memory if nothing of it is open or on its way, and the archive knows all of it.
    fn forget_agent(&mut self, agent: &crate::core::id::AgentId) {
        if !self.head.has_agent(agent) && !self.keeper.changed.agents.contains(agent) {
            self.view.forget_agent(agent);
        }
    }
}
