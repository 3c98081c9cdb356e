//! The head: what the next batch must follow from, where that is ahead of what is durable.
//!
//! A batch that the log refuses takes what rested on it along: the log compares the *generation* that the first
//! batch in a chain read before it was queued. Until all of a broken chain is answered, nothing is added to it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::Inner;
use super::facts::Facts;
use crate::core::event::Event;
use crate::core::grant::{Grant, GrantState};
use crate::core::id::{AgentId, GrantId, TaskKey};
use crate::mutation::Mutation;
use crate::store::view::{requested, task_key};
use crate::store::{Batch, Expect, StoreError};

/// Grants as a batch leaves them.
pub(in crate::store) type After = BTreeMap<GrantId, Arc<Grant>>;

/// What is on its way.
#[derive(Debug, Default)]
pub(in crate::store) struct Head {
    grants: BTreeMap<GrantId, OnItsWay>,
    tasks: HashMap<TaskKey, u32>,
    freezes: u32,
    /// Agents whose requests are on their way: their histories stay in memory.
    agents: HashMap<AgentId, u32>,
}

#[derive(Debug)]
struct OnItsWay {
    grant: Arc<Grant>,
    /// Batches that are not answered yet.
    waiting: u32,
    /// Read from the log before the first of them was queued.
    generation: u64,
    /// One of them was refused: the others will be.
    is_broken: bool,
}

/// Why a batch can't be queued now.
#[derive(Debug)]
pub(in crate::store) enum No {
    /// Read again.
    Conflict,
    /// It depends on what is on its way: once that is answered, read again.
    Wait,
    /// Else.
    Error(StoreError),
}

impl From<StoreError> for No {
    fn from(error: StoreError) -> Self {
        Self::Error(error)
    }
}

impl Head {
    /// The grant, if it is ahead of what is durable.
    pub(in crate::store) fn get(&self, id: GrantId) -> Option<&Arc<Grant>> {
        self.grants.get(&id).filter(|g| !g.is_broken).map(|g| &g.grant)
    }
    /// All that are.
    pub(in crate::store) fn grants(&self) -> impl Iterator<Item = &Arc<Grant>> {
        self.grants.values().filter(|g| !g.is_broken).map(|g| &g.grant)
    }
    /// True if a request of the agent is on its way.
    pub(in crate::store) fn has_agent(&self, agent: &AgentId) -> bool {
        self.agents.contains_key(agent)
    }

    /// Takes in a batch that is queued.
    pub(in crate::store) fn push(&mut self, events: &[Event], after: &After, generation: u64) {
        for grant in after.values() {
            let slot = self.grants.entry(grant.id).or_insert_with(|| OnItsWay {
                grant: Arc::clone(grant),
                waiting: 0,
                generation,
                is_broken: false,
            });
            slot.grant = Arc::clone(grant);
            slot.waiting += 1;
            slot.generation = slot.generation.min(generation);
        }
        for event in events {
            match event {
                Event::TaskCompleted { task } => *self.tasks.entry(task.clone()).or_default() += 1,
                Event::Frozen { .. } | Event::Unfrozen { .. } => self.freezes += 1,
                event => {
                    if let Some((_, request)) = requested(event) {
                        *self.agents.entry(request.agent.id.clone()).or_default() += 1;
                    }
                }
            }
        }
    }

    /// Takes out a batch that is answered.
    pub(in crate::store) fn pop(&mut self, events: &[Event], after: &After, is_durable: bool) {
        for id in after.keys() {
            if let Some(slot) = self.grants.get_mut(id) {
                slot.waiting -= 1;
                slot.is_broken |= !is_durable;
                if slot.waiting == 0 {
                    self.grants.remove(id);
                }
            }
        }
        for event in events {
            match event {
                Event::TaskCompleted { task } => count_down(&mut self.tasks, task),
                Event::Frozen { .. } | Event::Unfrozen { .. } => self.freezes -= 1,
                event => {
                    if let Some((_, request)) = requested(event) {
                        count_down(&mut self.agents, &request.agent.id);
                    }
                }
            }
        }
    }

    /// How much is on its way.
    pub(in crate::store) fn len(&self) -> usize {
        self.grants.len() + self.tasks.len() + self.freezes as usize + self.agents.len()
    }
}

fn count_down<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, u32>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

impl Inner {
    /// Is everything as the batch expects it? Returns the grants as it leaves them, and the generation of what it
    /// rests on. Changes nothing.
    pub(in crate::store) fn check(&self, batch: &Batch, facts: &Facts) -> Result<(After, Option<u64>), No> {
        let mut rests_on = None;
        for expect in &batch.expect {
            match expect {
                Expect::Version(id, version) => {
                    if self.head_of(*id, facts, &mut rests_on)?.is_none_or(|g| g.version != *version) {
                        return Err(No::Conflict);
                    }
                }
                Expect::TaskOpen(task) => {
                    if self.view.task_completed(task) || facts.is_completed(task) {
                        return Err(No::Conflict);
                    }
                    if self.head.tasks.contains_key(task) {
                        return Err(No::Wait);
                    }
                }
                Expect::OpenBelow { agent, pending, open } => self.check_open(agent, *pending, *open)?,
                Expect::FreezeEpoch(epoch) => {
                    if self.head.freezes > 0 {
                        return Err(No::Wait);
                    }
                    if self.view.freeze_epoch() != *epoch {
                        return Err(No::Conflict);
                    }
                }
            }
        }
        let mut slots: BTreeMap<GrantId, Option<Grant>> = BTreeMap::new();
        for event in &batch.events {
            let Event::Grant { id, version, what } = event else { continue };
            if let Some((_, request)) = requested(event) {
                self.check_twins(*id, request.idempotency, facts, batch)?;
            }
            let slot = match slots.entry(*id) {
                std::collections::btree_map::Entry::Occupied(slot) => slot.into_mut(),
                std::collections::btree_map::Entry::Vacant(slot) => {
                    let now = self.head_of(*id, facts, &mut rests_on)?;
                    if now.as_ref().map_or(0, |g| g.version) + 1 != *version {
                        return Err(No::Conflict);
                    }
                    slot.insert(now.as_deref().cloned())
                }
            };
            Grant::apply(slot, *id, what, batch.at).map_err(|e| StoreError::Impossible(e.to_string()))?;
            if slot.as_ref().map(|g| g.version) != Some(*version) {
                return Err(StoreError::Impossible(format!("event {version} of {id} is out of turn")).into());
            }
        }
        let after: After = slots.into_iter().filter_map(|(id, g)| Some((id, Arc::new(g?)))).collect();
        if !Mutation::ChildrenLiveOn.is_on() {
            self.check_children(batch, &after, facts, &mut rests_on)?;
        }
        self.check_completed(batch, &after, facts, &mut rests_on)?;
        Ok((after, rests_on))
    }

    /// Fewer than so many, with what is on its way. Nothing is taken off for endings that are: they may be refused.
    fn check_open(&self, agent: &AgentId, pending_max: usize, open_max: usize) -> Result<(), No> {
        let is_pending = |g: &Grant| matches!(g.state, GrantState::Pending { .. });
        let (mut pending, mut open) = self.view.counts(agent);
        let mut is_coming = false;
        for grant in self.head.grants().filter(|g| g.request.agent.id == *agent) {
            let durable = self.view.get(grant.id).map(|s| &*s.grant);
            pending += usize::from(is_pending(grant) && !durable.is_some_and(is_pending));
            open += usize::from(!grant.state.is_final() && durable.is_none_or(|g| g.state.is_final()));
            is_coming = true;
        }
        match pending < pending_max && open < open_max {
            true => Ok(()),
            false if is_coming => Err(No::Wait),
            false => Err(No::Conflict),
        }
    }

    /// Whoever completes a task leaves none of its grants waiting or in force, also what came after the list was made.
    fn check_completed(
        &self,
        batch: &Batch,
        after: &After,
        facts: &Facts,
        rests_on: &mut Option<u64>,
    ) -> Result<(), No> {
        for event in &batch.events {
            let Event::TaskCompleted { task } = event else { continue };
            let coming = self.head.grants().filter(|g| task_key(g) == *task).map(|g| g.id);
            let made_here = after.values().filter(|g| task_key(g) == *task).map(|g| g.id);
            let all: BTreeSet<GrantId> = self.view.of_task(task).chain(coming).chain(made_here).collect();
            for id in all {
                let grant = match after.get(&id) {
                    Some(grant) => Some(Arc::clone(grant)),
                    None => self.head_of(id, facts, rests_on)?,
                };
                if grant.is_some_and(|g| matches!(g.state, GrantState::Pending { .. } | GrantState::Active { .. })) {
                    return Err(No::Conflict);
                }
            }
        }
        Ok(())
    }

    /// The grant as the next batch must find it, and the generation of what is on its way of it.
    fn head_of(&self, id: GrantId, facts: &Facts, rests_on: &mut Option<u64>) -> Result<Option<Arc<Grant>>, No> {
        if let Some(slot) = self.head.grants.get(&id) {
            if slot.is_broken {
                return Err(No::Wait);
            }
            *rests_on = Some(rests_on.map_or(slot.generation, |g| g.min(slot.generation)));
            return Ok(Some(Arc::clone(&slot.grant)));
        }
        Ok(self.view.get(id).map(|s| Arc::clone(&s.grant)).or_else(|| facts.grant(id)))
    }

    /// One grant for one idempotency digest.
    fn check_twins(
        &self,
        id: GrantId,
        digest: Option<crate::core::digest::Digest>,
        facts: &Facts,
        batch: &Batch,
    ) -> Result<(), No> {
        let Some(digest) = digest else { return Ok(()) };
        if self.view.by_idempotency(&digest).is_some() || facts.has_twin(&digest) {
            return Err(No::Conflict);
        }
        if self.head.grants.values().any(|g| g.grant.id != id && g.grant.request.idempotency == Some(digest)) {
            return Err(No::Wait);
        }
        let twins = batch.events.iter().filter_map(requested).filter(|(_, r)| r.idempotency == Some(digest));
        if twins.count() > 1 {
            return Err(StoreError::Impossible("two requests with one idempotency digest".to_owned()).into());
        }
        Ok(())
    }

    /// Guarantee 7: whoever takes a grant out of force before its time takes along what is below it, also what came
    /// after the list was made.
    fn check_children(
        &self,
        batch: &Batch,
        after: &After,
        facts: &Facts,
        rests_on: &mut Option<u64>,
    ) -> Result<(), No> {
        for parent in after.values().filter(|g| g.ends_at().is_none() && !matches!(g.state, GrantState::Pending { .. }))
        {
            let before = self.head_of(parent.id, facts, rests_on)?;
            if before.and_then(|g| g.ends_at()).is_none_or(|ends_at| ends_at <= batch.at) {
                continue; // it was not in force, or its time is up, and then that of its children is too
            }
            for child in self.children(parent.id) {
                let child = match after.get(&child) {
                    Some(child) => Some(Arc::clone(child)),
                    None => self.head_of(child, facts, rests_on)?,
                };
                if child.is_some_and(|c| matches!(c.state, GrantState::Pending { .. } | GrantState::Active { .. })) {
                    return Err(No::Conflict);
                }
            }
        }
        Ok(())
    }

    /// Children that are open, or were when they were last durable.
    pub(in crate::store) fn children(&self, parent: GrantId) -> BTreeSet<GrantId> {
        let coming = self.head.grants().filter(|g| g.request.parent == Some(parent)).map(|g| g.id);
        self.view.children(parent).chain(coming).collect()
    }
}
