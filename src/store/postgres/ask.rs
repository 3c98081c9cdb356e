//! What is asked of the tables because it has left memory.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::load::stored;
use super::{Core, agent_key, task_key_bytes};
use crate::core::digest::Digest;
use crate::core::event::Event;
use crate::core::grant::Grant;
use crate::core::id::{AgentId, GrantId, TaskKey};
use crate::store::engine::facts::Facts;
use crate::store::engine::{Archive, Snapshot, read_record};
use crate::store::view::{KnownAgent, RECENT_PER_AGENT_MAX, Stored, requested};
use crate::store::{AgentHistory, Batch, Expect, Recorded, StoreError};

/// What the tables said about one batch.
#[derive(Default)]
struct Told {
    grants: HashMap<GrantId, Stored>,
    twins: HashMap<Digest, GrantId>,
    tasks: HashSet<Vec<u8>>,
}

impl Archive for Told {
    fn keep(&self, _: &Snapshot) -> Result<(), StoreError> {
        Ok(()) // the tables change with the record
    }
    fn grant(&self, id: GrantId) -> Result<Option<Stored>, StoreError> {
        Ok(self.grants.get(&id).cloned())
    }
    fn by_idempotency(&self, digest: &Digest) -> Result<Option<GrantId>, StoreError> {
        Ok(self.twins.get(digest).copied())
    }
    fn task_completed(&self, task: &TaskKey) -> Result<bool, StoreError> {
        Ok(self.tasks.contains(&task_key_bytes(task)))
    }
    fn agent(&self, _: &AgentId) -> Result<Option<KnownAgent>, StoreError> {
        Ok(None) // asked of the tables whenever somebody wants to know
    }
    fn decided(&self, _: usize) -> Result<Vec<Stored>, StoreError> {
        Ok(Vec::new())
    }
    fn figures(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// An append between its questions and the queue: what it asked about stays in memory.
pub(super) struct Asking<'a>(&'a Core);

impl<'a> Asking<'a> {
    pub(super) fn new(core: &'a Core) -> Self {
        core.state.lock().asking += 1;
        Self(core)
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.0.state.lock().asking -= 1;
    }
}

impl Core {
    /// Asks what a batch must know and memory doesn't.
    pub(super) async fn facts(&self, batch: &Batch) -> Result<Facts, StoreError> {
        let (known, completed) = {
            let state = self.state.lock();
            if let Some(error) = state.refuses() {
                return Err(error);
            }
            let completed = |t: &TaskKey| state.inner.view.task_completed(t);
            let open = batch.expect.iter().filter_map(|e| match e {
                Expect::TaskOpen(task) if !completed(task) => Some(task_key_bytes(task)),
                _ => None,
            });
            (state.inner.in_memory(batch).1, open.collect::<Vec<_>>())
        };
        let expected = batch.expect.iter().filter_map(|e| match e {
            Expect::Version(id, _) => Some(*id),
            _ => None,
        });
        let touched = batch.events.iter().filter_map(|e| match e {
            Event::Grant { id, .. } => Some(*id),
            _ => None,
        });
        let ids: BTreeSet<GrantId> = expected.chain(touched).filter(|id| !known.grants.contains(id)).collect();
        let ids: Vec<GrantId> = ids.into_iter().collect();
        let digests = batch.events.iter().filter_map(requested).filter_map(|(_, request)| request.idempotency);
        let digests: Vec<Digest> = digests.collect();
        let told = self.told(&ids, &digests, &completed).await?;
        Facts::of(batch, &told, 0, &known)
    }

    async fn told(&self, ids: &[GrantId], digests: &[Digest], tasks: &[Vec<u8>]) -> Result<Told, StoreError> {
        let mut told = Told::default();
        // Nothing is asked if there is nothing to ask about.
        if !ids.is_empty() {
            for body in self.tables.grants(ids).await? {
                let stored = stored(&body)?;
                told.grants.insert(stored.grant.id, stored);
            }
        }
        if !digests.is_empty() {
            told.twins = self.tables.twins(digests).await?.into_iter().collect();
        }
        if !tasks.is_empty() {
            told.tasks = self.tables.tasks(tasks).await?.into_iter().collect();
        }
        Ok(told)
    }

    /// A grant, from memory or the tables.
    pub(super) async fn grant(&self, id: GrantId) -> Result<Option<Arc<Grant>>, StoreError> {
        if let Some(stored) = self.state.lock().inner.view.get(id) {
            return Ok(Some(Arc::clone(&stored.grant)));
        }
        let bodies = self.tables.grants(&[id]).await?;
        bodies.first().map(|body| Ok(stored(body)?.grant)).transpose()
    }

    pub(super) async fn task_completed(&self, task: &TaskKey) -> Result<bool, StoreError> {
        if self.state.lock().inner.view.task_completed(task) {
            return Ok(true);
        }
        Ok(!self.tables.tasks(&[task_key_bytes(task)]).await?.is_empty())
    }

    pub(super) async fn twin(&self, digest: &Digest) -> Result<Option<GrantId>, StoreError> {
        Ok(self.tables.twins(&[*digest]).await?.first().map(|(_, id)| *id))
    }

    pub(super) async fn decided(&self, limit: usize) -> Result<Vec<Arc<Grant>>, StoreError> {
        self.tables.decided(limit).await?.iter().map(|body| Ok(stored(body)?.grant)).collect()
    }

    pub(super) async fn events(&self, id: GrantId) -> Result<Vec<Recorded>, StoreError> {
        let read = |(seq, payload): &(u64, Vec<u8>)| {
            let record = read_record(*seq, payload)?;
            Ok(Recorded { seq: *seq, at: record.at, event: record.event })
        };
        self.tables.records(id).await?.iter().map(read).collect()
    }

    pub(super) async fn history(&self, agent: &AgentId) -> Result<Option<AgentHistory>, StoreError> {
        let known = self.tables.history(&agent_key(agent), RECENT_PER_AGENT_MAX).await?;
        let history = |first_seen| AgentHistory {
            first_seen,
            recent: known.recent.iter().rev().copied().collect(),
            last_active: known.active,
        };
        Ok(known.first.map(history))
    }
}
