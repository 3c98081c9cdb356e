//! What the journal adds up to, in memory: the grants that are not final, and the indexes that the broker
//! asks. Pure; both the embedded and the memory store are built around it.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::core::digest::Digest;
use crate::core::event::{BrokerEvent, Event, GrantEvent};
use crate::core::grant::{Grant, GrantState};
use crate::core::id::{AgentId, GrantId, LeaseId, TaskKey, Timestamp};

use super::due::Due;
use super::holdings::{HeldBy, Holding, HoldingKey, Holdings, WINDOW_SECS_MAX, held_by};
use super::{AgentHistory, Freeze, Freezes, StoreError};

/// How many of an agent's latest grants are remembered.
pub const RECENT_PER_AGENT_MAX: usize = 6;

/// A grant with the sequence numbers of its events.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// The grant.
    pub grant: Arc<Grant>,
    /// Its events' places in the journal, oldest first.
    pub seqs: Vec<u64>,
}

/// An agent's history and the last record that it contains.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownAgent {
    /// The history.
    pub history: AgentHistory,
    /// The sequence number of the record that changed it last.
    pub seq: u64,
}

/// What published batches changed.
#[derive(Debug, Default)]
pub struct Changed {
    /// Grants.
    pub grants: BTreeSet<GrantId>,
    /// Tasks that were completed.
    pub tasks: BTreeSet<TaskKey>,
    /// Holdings.
    pub holdings: BTreeSet<HoldingKey>,
    /// Agents whose history changed.
    pub agents: BTreeSet<AgentId>,
    /// True if there is new work that is due at some time.
    pub due: bool,
}

/// How many grants of an agent are not final.
#[derive(Debug, Default, Clone, Copy)]
struct Count {
    pending: usize,
    open: usize,
}

/// The view.
#[derive(Debug, Default)]
pub struct View {
    grants: HashMap<GrantId, Stored>,
    open: BTreeSet<GrantId>,
    finals: BTreeSet<GrantId>,
    by_task: HashMap<TaskKey, BTreeSet<GrantId>>,
    by_parent: HashMap<GrantId, BTreeSet<GrantId>>,
    /// Of each task, open grants that hang from another or that others have hung from.
    links: HashMap<TaskKey, BTreeSet<GrantId>>,
    by_idempotency: HashMap<Digest, GrantId>,
    by_lease_name: HashMap<String, (GrantId, LeaseId)>,
    counts: HashMap<AgentId, Count>,
    agents: HashMap<AgentId, KnownAgent>,
    tasks_completed: HashSet<TaskKey>,
    freezes: BTreeMap<u64, Freeze>,
    freeze_epoch: u64,
    last_run: Option<BrokerEvent>,
    last_at: Timestamp,
    holdings: Holdings,
    pub(super) due: Due,
}

impl View {
    /// Publishes a durable batch. `after` are the grants that it touches, as it left them.
    pub fn publish(
        &mut self,
        first_seq: u64,
        at: Timestamp,
        events: &[Event],
        after: &BTreeMap<GrantId, Arc<Grant>>,
        changed: &mut Changed,
    ) {
        for (event, seq) in events.iter().zip(first_seq..) {
            self.last_at = last_at(self.last_at, at, event);
            let Event::Grant { id, what, .. } = event else {
                self.publish_other(seq, at, event, changed);
                continue;
            };
            let Some(grant) = after.get(id) else { continue };
            // All of the batch at once with its first event on the grant; the others only add their places and what is known of the agent.
            if self.grants.get(id).is_none_or(|s| s.grant.version < grant.version) {
                self.put(grant, changed);
            }
            self.note(seq, *id, what, changed);
        }
    }

    /// Takes in one record that is read back from the journal. What is contained already changes nothing.
    pub fn replay(&mut self, seq: u64, at: Timestamp, event: &Event, changed: &mut Changed) -> Result<(), StoreError> {
        self.last_at = last_at(self.last_at, at, event);
        let Event::Grant { id, version, what } = event else {
            self.publish_other(seq, at, event, changed);
            return Ok(());
        };
        // In place: most of what a long journal tells is about grants that are there.
        let was = if let Some(stored) = self.grants.get_mut(id) {
            if stored.seqs.last().is_some_and(|last| *last >= seq) {
                changed.grants.insert(*id); // whoever has kept it may take it out of memory again
                return Ok(());
            }
            let was = Was::of(&stored.grant);
            Arc::make_mut(&mut stored.grant).advance(*id, what, at).map_err(impossible)?;
            Some(was)
        } else {
            let mut slot = None;
            Grant::apply(&mut slot, *id, what, at).map_err(impossible)?;
            self.grants.extend(slot.map(|grant| (*id, Stored { grant: Arc::new(grant), seqs: Vec::new() })));
            None
        };
        let grant = self.grants.get(id).map(|s| Arc::clone(&s.grant)).filter(|g| g.version == *version);
        let grant = grant.ok_or_else(|| impossible(format!("version {version} of {id} out of turn")))?;
        self.index(was.as_ref(), &grant, changed);
        drop(grant); // or the next one couldn't be in place
        self.note(seq, *id, what, changed);
        Ok(())
    }

    fn publish_other(&mut self, seq: u64, at: Timestamp, event: &Event, changed: &mut Changed) {
        match event {
            Event::Grant { .. } => {}
            Event::TaskCompleted { task } => {
                self.tasks_completed.insert(task.clone());
                changed.tasks.insert(task.clone());
            }
            Event::Frozen { id, selector, by, reason } => {
                let freeze = Freeze { id: *id, selector: selector.clone(), by: by.clone(), reason: reason.clone(), at };
                self.freezes.insert(*id, freeze);
                self.freeze_epoch = seq;
            }
            Event::Unfrozen { id, .. } => {
                self.freezes.remove(id);
                self.freeze_epoch = seq;
            }
            Event::Broker { what } => {
                if matches!(what, BrokerEvent::RunStarted { .. }) {
                    self.last_run = Some(what.clone());
                }
            }
        }
    }

    /// Takes in what a grant has become.
    fn put(&mut self, grant: &Arc<Grant>, changed: &mut Changed) {
        let was = match self.grants.entry(grant.id) {
            Entry::Occupied(mut known) => {
                let was = Was::of(&known.get().grant);
                known.get_mut().grant = Arc::clone(grant);
                Some(was)
            }
            Entry::Vacant(place) => {
                place.insert(Stored { grant: Arc::clone(grant), seqs: Vec::new() });
                None
            }
        };
        self.index(was.as_ref(), grant, changed);
    }

    /// Keeps the indexes: of a grant that was so before, or not there.
    fn index(&mut self, was: Option<&Was>, grant: &Grant, changed: &mut Changed) {
        changed.grants.insert(grant.id);
        if was.is_none()
            && let Some(digest) = grant.request.idempotency
        {
            self.by_idempotency.insert(digest, grant.id);
        }
        self.count(was.is_some_and(|w| w.is_pending), grant);
        self.index_leases(grant);
        changed.holdings.extend(self.holdings.update(was.and_then(|w| w.held.as_ref()), grant));
        changed.due |= self.due.update(grant);
    }

    /// Keeps what counts open grants.
    fn count(&mut self, was_pending: bool, grant: &Grant) {
        let (id, agent) = (grant.id, &grant.request.agent.id);
        let (was_open, is_open) = (self.open.contains(&id), !grant.state.is_final());
        if !was_open && !is_open {
            self.finals.insert(id);
            return;
        }
        if was_open && is_open && was_pending == is_pending(grant) {
            return;
        }
        let count = self.counts.entry(agent.clone()).or_default();
        count.pending = count.pending + usize::from(is_pending(grant)) - usize::from(was_pending && was_open);
        count.open = count.open + usize::from(is_open) - usize::from(was_open);
        if count.open == 0 {
            self.counts.remove(agent);
        }
        if is_open && !was_open {
            self.open.insert(id);
            self.by_task.entry(task_key(grant)).or_default().insert(id);
            // In whatever order parent and child come.
            if grant.request.parent.is_some() || self.by_parent.contains_key(&id) {
                self.links.entry(task_key(grant)).or_default().insert(id);
            }
            if let Some(parent) = grant.request.parent {
                self.by_parent.entry(parent).or_default().insert(id);
                if let Some(above) = self.grants.get(&parent).filter(|_| self.open.contains(&parent)) {
                    self.links.entry(task_key(&above.grant)).or_default().insert(parent);
                }
            }
        } else if was_open && !is_open {
            self.open.remove(&id);
            self.finals.insert(id);
            drop_from(&mut self.by_task, &task_key(grant), id);
            drop_from(&mut self.links, &task_key(grant), id);
            if let Some(parent) = grant.request.parent {
                drop_from(&mut self.by_parent, &parent, id);
            }
        }
    }

    /// Adds the place of an event, and to what is known of the agent.
    fn note(&mut self, seq: u64, id: GrantId, what: &GrantEvent, changed: &mut Changed) {
        let Some(stored) = self.grants.get_mut(&id) else { return };
        stored.seqs.push(seq);
        if !matches!(what, GrantEvent::Requested { .. } | GrantEvent::Activated { .. }) {
            return;
        }
        let grant = &stored.grant;
        let agent = &grant.request.agent.id;
        let known = self.agents.entry(agent.clone()).or_insert_with(|| KnownAgent {
            history: AgentHistory { first_seen: grant.requested_at, recent: Vec::new(), last_active: None },
            seq: 0,
        });
        if known.seq >= seq {
            return; // what is read back is contained already
        }
        known.seq = seq;
        if matches!(what, GrantEvent::Activated { .. }) {
            known.history.last_active = Some(id);
        } else {
            known.history.recent.push(id);
            if known.history.recent.len() > RECENT_PER_AGENT_MAX {
                known.history.recent.remove(0);
            }
        }
        changed.agents.insert(agent.clone());
    }

    fn index_leases(&mut self, grant: &Grant) {
        for lease in grant.leases.values() {
            let (name, is_ours) = (&lease.intent.name, (grant.id, lease.intent.lease));
            let known = self.by_lease_name.get(name);
            if lease.is_gone() {
                if known == Some(&is_ours) {
                    self.by_lease_name.remove(name);
                }
            } else if known.is_none() {
                self.by_lease_name.insert(name.clone(), is_ours);
            }
        }
    }

    /// Forgets a final grant that somebody else keeps now.
    pub fn evict(&mut self, id: GrantId) -> Option<Stored> {
        if !self.finals.remove(&id) {
            return None;
        }
        let stored = self.grants.remove(&id)?;
        if let Some(digest) = stored.grant.request.idempotency
            && self.by_idempotency.get(&digest) == Some(&id)
        {
            self.by_idempotency.remove(&digest);
        }
        Some(stored)
    }
    /// Forgets completed tasks that somebody else keeps now.
    pub fn forget_tasks<'a>(&mut self, tasks: impl IntoIterator<Item = &'a TaskKey>) {
        for task in tasks {
            self.tasks_completed.remove(task);
        }
    }
    /// Forgets an agent that has no open grants and that somebody else keeps now.
    pub fn forget_agent(&mut self, agent: &AgentId) {
        if !self.counts.contains_key(agent) {
            self.agents.remove(agent);
        }
    }
    /// Forgets holdings that no question can reach any more. Returns them.
    pub fn prune_holdings(&mut self) -> Vec<HoldingKey> {
        self.holdings.prune(self.reach())
    }
    /// The moment from which on holdings are told.
    pub fn reach(&self) -> Timestamp {
        Timestamp(self.last_at.0.saturating_sub(WINDOW_SECS_MAX * 1000))
    }

    /// A grant in memory.
    pub fn get(&self, id: GrantId) -> Option<&Stored> {
        self.grants.get(&id)
    }
    /// Open grants.
    pub fn open(&self) -> impl Iterator<Item = &Arc<Grant>> {
        self.open.iter().filter_map(|id| self.grants.get(id)).map(|s| &s.grant)
    }
    /// How many grants are open.
    pub fn open_len(&self) -> usize {
        self.open.len()
    }
    /// Final grants still in memory.
    pub fn finals(&self) -> impl Iterator<Item = &Stored> {
        self.finals.iter().filter_map(|id| self.grants.get(id))
    }
    /// Open grants of a task.
    pub fn of_task(&self, task: &TaskKey) -> impl Iterator<Item = GrantId> {
        self.by_task.get(task).into_iter().flatten().copied()
    }
    /// Open grants of a task that hang from another or that others have hung from.
    pub fn links(&self, task: &TaskKey) -> impl Iterator<Item = GrantId> {
        self.links.get(task).into_iter().flatten().copied()
    }
    /// Open children.
    pub fn children(&self, id: GrantId) -> impl Iterator<Item = GrantId> {
        self.by_parent.get(&id).into_iter().flatten().copied()
    }
    /// Pending and open grants of an agent.
    pub fn counts(&self, agent: &AgentId) -> (usize, usize) {
        self.counts.get(agent).map_or((0, 0), |c| (c.pending, c.open))
    }
    /// By idempotency digest, among those in memory.
    pub fn by_idempotency(&self, digest: &Digest) -> Option<&Stored> {
        self.by_idempotency.get(digest).and_then(|id| self.grants.get(id))
    }
    /// By the lease's name at its target.
    pub fn lease_named(&self, name: &str) -> Option<(GrantId, LeaseId)> {
        self.by_lease_name.get(name).copied()
    }
    /// Was the task completed?
    pub fn task_completed(&self, task: &TaskKey) -> bool {
        self.tasks_completed.contains(task)
    }
    /// What is held or was, see [`super::Store::held`].
    pub fn held(
        &self,
        agent: &AgentId,
        owner: Option<&crate::core::id::PersonId>,
        since: Timestamp,
        except: Option<GrantId>,
    ) -> Vec<super::Held> {
        // The same answer whether or not what is older has been pruned.
        self.holdings.held(agent, owner, since.max(self.reach()), except)
    }
    /// What is held or was in a task, see [`super::Store::held_in_task`].
    pub fn held_in_task(
        &self,
        task: &TaskKey,
        since: Timestamp,
        except: Option<GrantId>,
    ) -> Vec<crate::core::permission::Permission> {
        self.holdings.held_in_task(task, since.max(self.reach()), except)
    }
    /// What will be kept of holdings once grants have changed so.
    pub fn holdings_after(&self, steps: &[(Option<Arc<Grant>>, Arc<Grant>)]) -> Vec<(HoldingKey, Option<Holding>)> {
        self.holdings.after(steps)
    }
    /// A holding.
    pub fn holding(&self, key: &HoldingKey) -> Option<Holding> {
        self.holdings.get(key)
    }
    /// How many holdings there are.
    pub fn holdings_len(&self) -> usize {
        self.holdings.len()
    }
    /// What is known of an agent, if it is in memory.
    pub fn agent(&self, agent: &AgentId) -> Option<&KnownAgent> {
        self.agents.get(agent)
    }
    /// How many agents are in memory.
    pub fn agents_len(&self) -> usize {
        self.agents.len()
    }
    /// The freezes.
    pub fn freezes(&self) -> Freezes {
        Freezes { epoch: self.freeze_epoch, holding: self.freezes.values().cloned().collect() }
    }
    /// The number that changes with the freezes.
    pub fn freeze_epoch(&self) -> u64 {
        self.freeze_epoch
    }
    /// The latest run and the latest moment since it started.
    pub fn last_run(&self) -> (Option<BrokerEvent>, Timestamp) {
        (self.last_run.clone(), self.last_at)
    }
    /// The latest moment since the latest run started.
    pub fn last_at(&self) -> Timestamp {
        self.last_at
    }

    /// Takes back what was kept: a grant.
    pub fn restore_grant(&mut self, stored: Stored) {
        let grant = Arc::clone(&stored.grant);
        if let Some(digest) = grant.request.idempotency {
            self.by_idempotency.insert(digest, grant.id);
        }
        self.count(false, &grant);
        self.index_leases(&grant);
        self.due.update(&grant);
        self.holdings.restore_grant(&grant);
        self.grants.insert(grant.id, stored);
    }
    /// Takes back what was kept: an agent that isn't in memory.
    pub fn restore_agent(&mut self, agent: AgentId, known: KnownAgent) {
        self.agents.entry(agent).or_insert(known);
    }
    /// Takes back what was kept: everything else.
    pub fn restore_rest(&mut self, rest: Rest) {
        for holding in rest.holdings {
            self.holdings.restore(holding);
        }
        self.freezes = rest.freezes.into_iter().map(|f| (f.id, f)).collect();
        self.freeze_epoch = rest.freeze_epoch;
        self.last_run = rest.last_run;
        self.last_at = rest.last_at;
    }
}

/// Everything kept that is neither grant nor task nor agent.
#[derive(Debug, Default)]
pub struct Rest {
    /// Holdings.
    pub holdings: Vec<Holding>,
    /// Freezes that hold.
    pub freezes: Vec<Freeze>,
    /// The number that changes with them.
    pub freeze_epoch: u64,
    /// The latest run.
    pub last_run: Option<BrokerEvent>,
    /// The latest moment since it started.
    pub last_at: Timestamp,
}

/// The task of a grant, fully named.
pub fn task_key(grant: &Grant) -> TaskKey {
    TaskKey { agent: grant.request.agent.id.clone(), task: grant.request.task.clone() }
}

/// The request that an event makes a grant of.
pub fn requested(event: &Event) -> Option<(GrantId, &crate::core::request::Request)> {
    match event {
        Event::Grant { id, what, .. } => match &**what {
            GrantEvent::Requested { request } => Some((*id, request)),
            _ => None,
        },
        _ => None,
    }
}

/// The moment that the next start compares its clock with, after an event. It goes back with a start that is on record, and
/// with nothing else: what a run writes whose own start couldn't be recorded says nothing about the time (guarantee 10).
pub fn last_at(before: Timestamp, at: Timestamp, event: &Event) -> Timestamp {
    match event {
        Event::Broker { what: BrokerEvent::RunStarted { .. } } => at,
        _ => before.max(at),
    }
}

/// What the indexes know of a grant as it was.
struct Was {
    is_pending: bool,
    held: Option<HeldBy>,
}

impl Was {
    fn of(grant: &Grant) -> Self {
        Self { is_pending: is_pending(grant), held: held_by(grant) }
    }
}

fn impossible(why: impl std::fmt::Display) -> StoreError {
    StoreError::Impossible(why.to_string())
}

fn is_pending(grant: &Grant) -> bool {
    matches!(grant.state, GrantState::Pending { .. })
}

fn drop_from<K: std::hash::Hash + Eq>(map: &mut HashMap<K, BTreeSet<GrantId>>, key: &K, id: GrantId) {
    if let Some(set) = map.get_mut(key) {
        set.remove(&id);
        if set.is_empty() {
            map.remove(key);
        }
    }
}
