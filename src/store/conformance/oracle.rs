//! A store as naive as can be: it keeps every record, and reads all of them for every question.
#![allow(dead_code)] // each user has its part

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::kit::*;
use crate::core::digest::Digest;
use crate::core::event::{BrokerEvent, Event, GrantEvent};
use crate::core::grant::{Grant, GrantState};
use crate::core::id::{AgentId, GrantId, PersonId, TaskKey, Timestamp};
use crate::core::lease::LeaseState;
use crate::core::permission::Permission;
use crate::store::engine::over_at;
use crate::store::{AgentHistory, Freeze, Held, Job, Recorded, Store};

/// Everything that was recorded.
#[derive(Debug, Default, Clone)]
pub struct Oracle(pub Vec<Recorded>);

/// The names that questions are asked about.
#[derive(Debug, Clone)]
pub struct Names {
    pub grants: Vec<GrantId>,
    pub agents: Vec<AgentId>,
    pub owners: Vec<PersonId>,
    pub tasks: Vec<TaskKey>,
    pub digests: Vec<Digest>,
    pub leases: Vec<String>,
    pub moments: Vec<Timestamp>,
}

/// Every answer to every question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dump {
    grants: BTreeMap<GrantId, (Option<Grant>, Vec<Recorded>)>,
    trees: BTreeMap<GrantId, BTreeSet<GrantId>>,
    tasks: BTreeMap<TaskKey, (bool, BTreeSet<GrantId>)>,
    open: BTreeSet<GrantId>,
    agents: BTreeMap<AgentId, ((usize, usize), Option<AgentHistory>)>,
    decided: Vec<GrantId>,
    idempotency: Vec<Option<GrantId>>,
    held: Vec<Vec<Held>>,
    held_in_task: Vec<Vec<Permission>>,
    freezes: (u64, Vec<Freeze>),
    leases: Vec<Option<(GrantId, crate::core::id::LeaseId)>>,
}

const DECIDED: usize = 1000;

impl Names {
    fn held_in_task(&self) -> impl Iterator<Item = (&TaskKey, Timestamp, Option<GrantId>)> {
        let excepts = || self.grants.iter().take(6).map(|g| Some(*g)).chain([None]);
        let moments = move |task| self.moments.iter().flat_map(move |since| excepts().map(move |e| (task, *since, e)));
        self.tasks.iter().flat_map(moments)
    }

    /// Which questions about holdings are asked.
    fn held(&self) -> impl Iterator<Item = (&AgentId, Option<&PersonId>, Timestamp, Option<GrantId>)> {
        let owners = || self.owners.iter().map(Some).chain([None]);
        let excepts = || self.grants.iter().take(6).map(|g| Some(*g)).chain([None]);
        self.agents.iter().flat_map(move |agent| {
            owners().flat_map(move |owner| {
                self.moments.iter().flat_map(move |since| excepts().map(move |e| (agent, owner, *since, e)))
            })
        })
    }
}

/// Asks a store everything.
pub async fn dump(store: &dyn Store, names: &Names) -> Dump {
    let ids = |grants: Vec<Arc<Grant>>| grants.iter().map(|g| g.id).collect::<BTreeSet<_>>();
    let mut grants = BTreeMap::new();
    let mut trees = BTreeMap::new();
    for id in &names.grants {
        let grant = store.grant(*id).await.unwrap();
        assert_eq!(grant, store.head(*id).await.unwrap(), "nothing is on its way");
        grants.insert(*id, (grant.map(|g| (*g).clone()), store.events(*id).await.unwrap()));
        trees.insert(*id, ids(store.subtree(*id).await.unwrap()));
    }
    let mut tasks = BTreeMap::new();
    for task in &names.tasks {
        let completed = store.task_completed(task).await.unwrap();
        tasks.insert(task.clone(), (completed, ids(store.task_grants(task).await.unwrap())));
    }
    let mut agents = BTreeMap::new();
    for agent in &names.agents {
        let counts = store.open_counts(agent).await.unwrap();
        agents.insert(agent.clone(), (counts, store.history(agent).await.unwrap()));
    }
    let mut idempotency = Vec::new();
    for digest in &names.digests {
        idempotency.push(store.by_idempotency(digest).await.unwrap().map(|g| g.id));
    }
    let mut held = Vec::new();
    for (agent, owner, since, except) in names.held() {
        held.push(store.held(agent, owner, since, except).await.unwrap());
    }
    let mut held_in_task = Vec::new();
    for (task, since, except) in names.held_in_task() {
        held_in_task.push(store.held_in_task(task, since, except).await.unwrap());
    }
    let mut leases = Vec::new();
    for name in &names.leases {
        leases.push(store.lease_named(name).await.unwrap());
    }
    let freezes = store.freezes().await.unwrap();
    Dump {
        grants,
        trees,
        tasks,
        open: ids(store.open_grants().await.unwrap()),
        agents,
        decided: store.decided(DECIDED).await.unwrap().iter().map(|g| g.id).collect(),
        idempotency,
        held,
        held_in_task,
        freezes: (freezes.epoch, freezes.holding),
        leases,
    }
}

impl Oracle {
    pub fn grants(&self) -> BTreeMap<GrantId, Grant> {
        let mut out: BTreeMap<GrantId, Option<Grant>> = BTreeMap::new();
        for record in &self.0 {
            if let Event::Grant { id, what, .. } = &record.event {
                Grant::apply(out.entry(*id).or_default(), *id, what, record.at).expect("what the store took, can be");
            }
        }
        out.into_iter().filter_map(|(id, grant)| Some((id, grant?))).collect()
    }

    fn of_grant(&self, grant: GrantId) -> Vec<Recorded> {
        let is_it = |r: &&Recorded| matches!(r.event, Event::Grant { id, .. } if id == grant);
        self.0.iter().filter(is_it).cloned().collect()
    }

    fn completed(&self, key: &TaskKey) -> bool {
        self.0.iter().any(|r| matches!(&r.event, Event::TaskCompleted { task } if task == key))
    }

    fn history(&self, agent: &AgentId) -> Option<AgentHistory> {
        let (mut asked, mut active) = (Vec::new(), None);
        let mut mine = BTreeSet::new();
        for record in &self.0 {
            let Event::Grant { id, what, .. } = &record.event else { continue };
            match &**what {
                GrantEvent::Requested { request } if request.agent.id == *agent => {
                    mine.insert(*id);
                    asked.push((record.at, *id));
                }
                GrantEvent::Activated { .. } if mine.contains(id) => active = Some(*id),
                _ => {}
            }
        }
        let recent = asked.iter().rev().take(6).rev().map(|(_, id)| *id).collect();
        asked.first().map(|(first, _)| AgentHistory { first_seen: *first, recent, last_active: active })
    }

    fn held(
        grants: &BTreeMap<GrantId, Grant>,
        agent: &AgentId,
        owner: Option<&PersonId>,
        since: Timestamp,
        except: Option<GrantId>,
    ) -> Vec<Held> {
        let mut own: BTreeMap<Permission, Timestamp> = BTreeMap::new();
        let mut others: BTreeMap<(Permission, AgentId), Timestamp> = BTreeMap::new();
        for grant in grants.values().filter(|g| Some(g.id) != except) {
            let (until, counts) = match grant.state {
                GrantState::Active { ends_at, .. } => (ends_at, true),
                GrantState::Ending { since, .. } => (since, true),
                GrantState::Ended { at, .. } => (at, at >= since),
                _ => continue,
            };
            let facts = &grant.request.agent;
            for permission in grant.assessed.iter().flat_map(|a| &a.approvable.permissions).filter(|_| counts) {
                let slot = if facts.id == *agent {
                    own.entry(permission.clone()).or_default()
                } else if owner.is_some() && facts.owner.as_ref() == owner {
                    others.entry((permission.clone(), facts.id.clone())).or_default()
                } else {
                    continue;
                };
                *slot = until.max(*slot);
            }
        }
        let mut longest: BTreeMap<Permission, (AgentId, Timestamp)> = BTreeMap::new();
        for ((permission, agent), until) in others {
            let slot = longest.entry(permission).or_insert_with(|| (agent.clone(), until));
            if until > slot.1 {
                *slot = (agent, until);
            }
        }
        let own = own.into_iter().map(|(permission, until)| Held { agent: agent.clone(), permission, until });
        let others = longest.into_iter().map(|(permission, (agent, until))| Held { agent, permission, until });
        own.chain(others).collect()
    }

    fn held_in_task(
        grants: &BTreeMap<GrantId, Grant>,
        task: &TaskKey,
        since: Timestamp,
        except: Option<GrantId>,
    ) -> Vec<Permission> {
        let counts = |g: &&Grant| match g.state {
            GrantState::Active { .. } | GrantState::Ending { .. } => true,
            GrantState::Ended { at, .. } => at >= since,
            _ => false,
        };
        let of = |g: &&Grant| g.request.agent.id == task.agent && g.request.task == task.task && Some(g.id) != except;
        let all = grants.values().filter(of).filter(counts).flat_map(|g| &g.assessed);
        all.flat_map(|a| a.approvable.permissions.clone()).collect::<BTreeSet<_>>().into_iter().collect()
    }

    pub fn dump(&self, names: &Names) -> Dump {
        let all = self.grants();
        let is_open = |g: &&Grant| !g.state.is_final();
        let open = |like: &dyn Fn(&Grant) -> bool| -> BTreeSet<GrantId> {
            all.values().filter(is_open).filter(|g| like(g)).map(|g| g.id).collect()
        };
        let tree = |root: GrantId| {
            let mut tree: BTreeSet<GrantId> = all.contains_key(&root).then_some(root).into_iter().collect();
            loop {
                let below = open(&|g| g.request.parent.is_some_and(|p| tree.contains(&p)));
                let before = tree.len();
                tree.extend(below);
                if tree.len() == before {
                    return tree;
                }
            }
        };
        let mut decided: Vec<&Grant> = all.values().filter(|g| g.state.is_final()).collect();
        decided.sort_by_key(|g| (std::cmp::Reverse(over_at(g)), g.id));
        let mut freezes = (0, BTreeMap::new());
        for record in &self.0 {
            match &record.event {
                Event::Frozen { id, selector, by, reason } => {
                    let (selector, by, reason) = (selector.clone(), by.clone(), reason.clone());
                    freezes.1.insert(*id, Freeze { id: *id, selector, by, reason, at: record.at });
                    freezes.0 = record.seq;
                }
                Event::Unfrozen { id, .. } => {
                    freezes.1.remove(id);
                    freezes.0 = record.seq;
                }
                _ => {}
            }
        }
        let counts = |agent: &AgentId| {
            let mine = open(&|g| g.request.agent.id == *agent);
            (mine.iter().filter(|id| matches!(all[id].state, GrantState::Pending { .. })).count(), mine.len())
        };
        let lease = |name: &String| {
            let named =
                |g: &Grant| g.leases.values().find(|l| l.intent.name == *name && !l.is_gone()).map(|l| l.intent.lease);
            all.values().find_map(|g| Some((g.id, named(g)?)))
        };
        Dump {
            grants: names.grants.iter().map(|id| (*id, (all.get(id).cloned(), self.of_grant(*id)))).collect(),
            trees: names.grants.iter().map(|id| (*id, tree(*id))).collect(),
            tasks: names
                .tasks
                .iter()
                .map(|t| {
                    let of = |g: &Grant| g.request.agent.id == t.agent && g.request.task == t.task;
                    (t.clone(), (self.completed(t), open(&of)))
                })
                .collect(),
            open: open(&|_| true),
            agents: names.agents.iter().map(|a| (a.clone(), (counts(a), self.history(a)))).collect(),
            decided: decided.iter().take(DECIDED).map(|g| g.id).collect(),
            idempotency: names
                .digests
                .iter()
                .map(|d| all.values().find(|g| g.request.idempotency == Some(*d)).map(|g| g.id))
                .collect(),
            held: names.held().map(|(a, o, s, e)| Self::held(&all, a, o, s, e)).collect(),
            held_in_task: names.held_in_task().map(|(t, s, e)| Self::held_in_task(&all, t, s, e)).collect(),
            freezes: (freezes.0, freezes.1.into_values().collect()),
            leases: names.leases.iter().map(lease).collect(),
        }
    }

    /// All that is due at a moment.
    pub fn due(&self, now: Timestamp) -> BTreeSet<Job> {
        let mut out = BTreeSet::new();
        for grant in self.grants().values() {
            match grant.state {
                GrantState::Pending { decide_by: at } | GrantState::Active { ends_at: at, .. } if at <= now => {
                    out.insert(Job::Deadline(grant.id));
                }
                _ => {}
            }
            for lease in grant.leases.values() {
                if let LeaseState::Revoking { since, progress } | LeaseState::Unknown { since, progress, .. } =
                    &lease.state
                    && progress.next_try.unwrap_or(*since) <= now
                {
                    out.insert(Job::Lease(grant.id, lease.intent.lease));
                }
            }
        }
        out
    }

    /// The latest run, and the latest moment since it started.
    pub fn last_run(&self) -> (Option<BrokerEvent>, Timestamp) {
        let is_start = |r: &Recorded| matches!(&r.event, Event::Broker { what: BrokerEvent::RunStarted { .. } });
        let start = self.0.iter().rposition(is_start);
        let since = self.0[start.unwrap_or(0)..].iter().map(|r| r.at).max();
        let run = start.and_then(|i| match &self.0[i].event {
            Event::Broker { what } => Some(what.clone()),
            _ => None,
        });
        (run, since.unwrap_or(Timestamp(0)))
    }
}

impl Names {
    /// Those that the histories of the tests use.
    pub fn usual() -> Self {
        let agents: Vec<AgentId> = (1..=4).map(agent).collect();
        let tasks = (1..=4).flat_map(|n| ["task", "other"].map(|t| task_key(n, t)));
        Self {
            grants: (1..=60).map(grant_id).collect(),
            tasks: tasks.collect(),
            agents,
            owners: vec![person("ana"), person("ben")],
            digests: (1..=60u64).map(|n| Digest::of_bytes(&n.to_be_bytes())).collect(),
            leases: (1..=200).map(|n| format!("cs_{n}")).collect(),
            moments: vec![START, at(100), at(1000)],
        }
    }
}
