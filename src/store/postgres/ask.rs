//! What is asked of the tables because it has left memory.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::connect::Trouble;
use super::load::stored;
use super::{Core, agent_key, num, task_key_bytes, unnum};
use crate::core::digest::Digest;
use crate::core::event::Event;
use crate::core::grant::Grant;
use crate::core::id::{AgentId, GrantId, TaskKey, Timestamp};
use crate::store::engine::facts::Facts;
use crate::store::engine::{Archive, Snapshot, read_record};
use crate::store::view::{KnownAgent, RECENT_PER_AGENT_MAX, Stored, requested};
use crate::store::{AgentHistory, Batch, Expect, Recorded, StoreError};

/// What the tables said about one batch.
#[derive(Default)]
struct Told {
    grants: HashMap<GrantId, Stored>,
    twins: HashMap<Vec<u8>, GrantId>,
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
        Ok(self.twins.get(&digest.as_bytes()[..]).copied())
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
        let ids: HashSet<GrantId> = expected.chain(touched).filter(|id| !known.grants.contains(id)).collect();
        let ids: Vec<Vec<u8>> = ids.iter().map(|id| id.as_bytes().to_vec()).collect();
        let digests = batch.events.iter().filter_map(requested).filter_map(|(_, request)| request.idempotency);
        let digests: Vec<Vec<u8>> = digests.map(|d| d.as_bytes().to_vec()).collect();
        let told = self.told(&ids, &digests, &completed).await?;
        Facts::of(batch, &told, 0, &known)
    }

    async fn told(&self, ids: &[Vec<u8>], digests: &[Vec<u8>], tasks: &[Vec<u8>]) -> Result<Told, StoreError> {
        let mut told = Told::default();
        for row in self.rows(&self.texts.grants, ids).await? {
            let stored = stored(row.get(0))?;
            told.grants.insert(stored.grant.id, stored);
        }
        for row in self.rows(&self.texts.twins, digests).await? {
            told.twins.extend(grant_id(row.get(1)).map(|id| (row.get(0), id)));
        }
        told.tasks = self.rows(&self.texts.tasks, tasks).await?.iter().map(|row| row.get(0)).collect();
        Ok(told)
    }

    /// Rows by their keys; nothing is asked if there are none.
    async fn rows(&self, sql: &str, keys: &[Vec<u8>]) -> Result<Vec<tokio_postgres::Row>, Trouble> {
        if keys.is_empty() { Ok(Vec::new()) } else { self.db.query(sql, &[&keys]).await }
    }

    /// A grant, from memory or the tables.
    pub(super) async fn grant(&self, id: GrantId) -> Result<Option<Arc<Grant>>, StoreError> {
        if let Some(stored) = self.state.lock().inner.view.get(id) {
            return Ok(Some(Arc::clone(&stored.grant)));
        }
        let rows = self.rows(&self.texts.grants, &[id.as_bytes().to_vec()]).await?;
        rows.first().map(|row| Ok(stored(row.get(0))?.grant)).transpose()
    }

    pub(super) async fn task_completed(&self, task: &TaskKey) -> Result<bool, StoreError> {
        if self.state.lock().inner.view.task_completed(task) {
            return Ok(true);
        }
        Ok(!self.rows(&self.texts.tasks, &[task_key_bytes(task)]).await?.is_empty())
    }

    pub(super) async fn twin(&self, digest: &Digest) -> Result<Option<GrantId>, StoreError> {
        let rows = self.rows(&self.texts.twins, &[digest.as_bytes().to_vec()]).await?;
        Ok(rows.first().and_then(|row| grant_id(row.get(1))))
    }

    pub(super) async fn decided(&self, limit: usize) -> Result<Vec<Arc<Grant>>, StoreError> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = self.db.query(&self.texts.decided, &[&limit]).await?;
        rows.iter().map(|row| Ok(stored(row.get(0))?.grant)).collect()
    }

    pub(super) async fn events(&self, id: GrantId) -> Result<Vec<Recorded>, StoreError> {
        let rows = self.db.query(&self.texts.events, &[&id.as_bytes().to_vec()]).await?;
        let read = |row: &tokio_postgres::Row| {
            let seq = unnum(row.get(0));
            let record = read_record(seq, row.get(1))?;
            Ok(Recorded { seq, at: record.at, event: record.event })
        };
        rows.iter().map(read).collect()
    }

    pub(super) async fn history(&self, agent: &AgentId) -> Result<Option<AgentHistory>, StoreError> {
        let most = num(RECENT_PER_AGENT_MAX as u64);
        let rows = self.db.query(&self.texts.history, &[&agent_key(agent), &most]).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let Some(first) = row.get::<_, Option<i64>>(0) else { return Ok(None) };
        let recent: Vec<Vec<u8>> = row.get(1);
        let active: Option<Vec<u8>> = row.get(2);
        Ok(Some(AgentHistory {
            first_seen: Timestamp(unnum(first)),
            recent: recent.iter().rev().filter_map(|id| grant_id(id)).collect(),
            last_active: active.and_then(|id| grant_id(&id)),
        }))
    }
}

pub(super) fn grant_id(bytes: &[u8]) -> Option<GrantId> {
    bytes.try_into().ok().map(GrantId::from_bytes)
}
