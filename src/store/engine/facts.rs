//! What a batch must know from the archive. Looked up before the lock is taken: the archive may be slow.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::seams::Archive;
use crate::core::digest::Digest;
use crate::core::event::Event;
use crate::core::grant::Grant;
use crate::core::id::{AgentId, GrantId, TaskKey};
use crate::store::view::{KnownAgent, requested};
use crate::store::{Batch, Expect, StoreError};

/// What needn't be asked.
#[derive(Debug, Default)]
pub(in crate::store) struct InMemory {
    pub(in crate::store) grants: HashSet<GrantId>,
    pub(in crate::store) agents: HashSet<AgentId>,
}

/// What the archive says about a batch.
#[derive(Debug, Default)]
pub(in crate::store) struct Facts {
    /// How often something had left memory for the archive when it was asked.
    pub(in crate::store) evictions: u64,
    grants: HashMap<GrantId, Arc<Grant>>,
    completed: HashSet<TaskKey>,
    twins: HashSet<Digest>,
    pub(in crate::store) agents: Vec<(AgentId, KnownAgent)>,
}

impl Facts {
    /// Asks the archive what isn't in memory.
    pub(in crate::store) fn of<A: Archive>(
        batch: &Batch,
        archive: &A,
        evictions: u64,
        in_memory: &InMemory,
    ) -> Result<Self, StoreError> {
        let mut facts = Self { evictions, ..Self::default() };
        let mut asked = in_memory.grants.clone();
        for expect in &batch.expect {
            match expect {
                Expect::Version(id, _) => facts.ask(*id, archive, &mut asked)?,
                Expect::TaskOpen(task) => {
                    if archive.task_completed(task)? {
                        facts.completed.insert(task.clone());
                    }
                }
                // What counts here is open, so it is in memory.
                Expect::FreezeEpoch(_) | Expect::OpenBelow { .. } => {}
            }
        }
        for event in &batch.events {
            if let Event::Grant { id, .. } = event {
                facts.ask(*id, archive, &mut asked)?;
            }
            if let Some((_, request)) = requested(event) {
                if let Some(digest) = request.idempotency
                    && archive.by_idempotency(&digest)?.is_some()
                {
                    facts.twins.insert(digest);
                }
                if !in_memory.agents.contains(&request.agent.id)
                    && let Some(known) = archive.agent(&request.agent.id)?
                {
                    facts.agents.push((request.agent.id.clone(), known));
                }
            }
        }
        Ok(facts)
    }

    fn ask<A: Archive>(&mut self, id: GrantId, archive: &A, asked: &mut HashSet<GrantId>) -> Result<(), StoreError> {
        if asked.insert(id)
            && let Some(stored) = archive.grant(id)?
        {
            self.grants.insert(id, stored.grant);
        }
        Ok(())
    }

    pub(in crate::store) fn grant(&self, id: GrantId) -> Option<Arc<Grant>> {
        self.grants.get(&id).cloned()
    }
    pub(in crate::store) fn is_completed(&self, task: &TaskKey) -> bool {
        self.completed.contains(task)
    }
    pub(in crate::store) fn has_twin(&self, digest: &Digest) -> bool {
        self.twins.contains(digest)
    }
}
