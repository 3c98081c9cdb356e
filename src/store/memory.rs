//! A store that forgets: the same engine on a log and an archive in memory. For tests and the simulator.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;

use super::StoreError;
use super::engine::{Archive, Engine, Keeper, Log, Receipt, Snapshot, over_at, read_record};
use super::view::{KnownAgent, Stored, View};
use crate::core::digest::Digest;
use crate::core::id::{AgentId, GrantId, TaskKey, Timestamp};
use crate::time::SystemClock;

/// A log in memory, durable at once. Clones share what is in it.
#[derive(Debug, Default, Clone)]
pub struct MemoryLog(Arc<Mutex<Vec<Vec<u8>>>>);

impl Log for MemoryLog {
    fn enqueue(
        &self,
        payloads: Vec<Vec<u8>>,
        _urgent: bool,
        _rests_on: Option<u64>,
        _open: usize,
    ) -> Result<BoxFuture<'static, Result<Receipt, StoreError>>, StoreError> {
        let mut log = self.0.lock();
        let first_seq = log.len() as u64 + 1;
        log.extend(payloads);
        Ok(async move { Ok(Receipt { first_seq, leaf: [0; 32] }) }.boxed())
    }
    fn generation(&self) -> u64 {
        0 // nothing is ever refused
    }
    fn read(&self, seqs: &[u64]) -> Result<Vec<(u64, Vec<u8>)>, StoreError> {
        let log = self.0.lock();
        seqs.iter()
            .map(|seq| {
                let index = usize::try_from(*seq).ok().and_then(|s| s.checked_sub(1));
                let bytes = index.and_then(|i| log.get(i)).cloned();
                Ok((*seq, bytes.ok_or_else(|| StoreError::Unreadable(format!("no record {seq}")))?))
            })
            .collect()
    }
    fn stopped(&self) -> Option<StoreError> {
        None
    }
    fn recover(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        async { Ok(()) }.boxed()
    }
    fn figures(&self) -> Vec<(&'static str, u64)> {
        vec![("journal_records", self.0.lock().len() as u64)]
    }
    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        async { Ok(()) }.boxed()
    }
}

/// An archive in memory.
#[derive(Debug, Default)]
pub struct MemoryArchive(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    grants: HashMap<GrantId, Stored>,
    decided: BTreeSet<(Reverse<Timestamp>, GrantId)>,
    by_idempotency: HashMap<Digest, GrantId>,
    tasks: HashSet<TaskKey>,
    agents: HashMap<AgentId, KnownAgent>,
}

impl Archive for MemoryArchive {
    fn keep(&self, snapshot: &Snapshot) -> Result<(), StoreError> {
        let mut kept = self.0.lock();
        for stored in &snapshot.grants {
            let grant = &stored.grant;
            if grant.state.is_final() {
                kept.decided.insert((Reverse(over_at(grant)), grant.id));
            }
            if let Some(digest) = grant.request.idempotency {
                kept.by_idempotency.insert(digest, grant.id);
            }
            kept.grants.insert(grant.id, stored.clone());
        }
        kept.tasks.extend(snapshot.tasks.iter().cloned());
        kept.agents.extend(snapshot.agents.iter().cloned());
        Ok(())
    }
    fn grant(&self, id: GrantId) -> Result<Option<Stored>, StoreError> {
        Ok(self.0.lock().grants.get(&id).cloned())
    }
    fn by_idempotency(&self, digest: &Digest) -> Result<Option<GrantId>, StoreError> {
        Ok(self.0.lock().by_idempotency.get(digest).copied())
    }
    fn task_completed(&self, task: &TaskKey) -> Result<bool, StoreError> {
        Ok(self.0.lock().tasks.contains(task))
    }
    fn agent(&self, agent: &AgentId) -> Result<Option<KnownAgent>, StoreError> {
        Ok(self.0.lock().agents.get(agent).cloned())
    }
    fn decided(&self, limit: usize) -> Result<Vec<Stored>, StoreError> {
        let kept = self.0.lock();
        Ok(kept.decided.iter().take(limit).filter_map(|(_, id)| kept.grants.get(id).cloned()).collect())
    }
    fn figures(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// An empty store in memory. Needs a running runtime.
pub fn store() -> Engine<MemoryLog, MemoryArchive> {
    Engine::start(
        Arc::new(SystemClock),
        MemoryLog::default(),
        MemoryArchive::default(),
        View::default(),
        Keeper::default(),
    )
}

/// A store in memory on what a log holds already. Needs a running runtime.
pub fn reopen(log: MemoryLog) -> Result<Engine<MemoryLog, MemoryArchive>, StoreError> {
    let (archive, mut view, mut keeper) = (MemoryArchive::default(), View::default(), Keeper::default());
    let records = log.0.lock().clone();
    for (bytes, seq) in records.iter().zip(1..) {
        let record = read_record(seq, bytes)?;
        view.replay(seq, record.at, &record.event, keeper.going_on(seq, [0; 32]))?;
    }
    keeper.keep_all(&mut view, &archive)?;
    Ok(Engine::start(Arc::new(SystemClock), log, archive, view, keeper))
}
