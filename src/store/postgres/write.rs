//! One write: the events of some batches, and what they make of the tables. Pure; `sql.rs` has the statement.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tokio_postgres::types::ToSql;

use super::state::{State, Tail};
use super::{job_key, num, task_key_bytes};
use crate::core::digest::Digest;
use crate::core::event::{BrokerEvent, Event, GrantEvent};
use crate::core::grant::Grant;
use crate::core::id::{GrantId, LeaseId, Timestamp};
use crate::core::lease::LeaseState;
use crate::store::engine::over_at;
use crate::store::view::Stored;
use crate::store::{Job, StoreError, due};

/// Names a write, for whoever has to look up whether it came through.
pub(super) type WriteId = [u8; 16];

/// What kinds of events are looked for by their kind.
pub(super) mod kind {
    pub(in crate::store::postgres) const OTHER: i16 = 0;
    pub(in crate::store::postgres) const FREEZE: i16 = 1;
    pub(in crate::store::postgres) const RUN: i16 = 2;
}

/// Columns of the statement's arrays.
#[derive(Debug, Default)]
struct Events {
    seq: Vec<i64>,
    at: Vec<i64>,
    kind: Vec<i16>,
    grant: Vec<Option<Vec<u8>>>,
    left: Vec<i32>,
    leaf: Vec<Vec<u8>>,
    payload: Vec<Vec<u8>>,
}

#[derive(Debug, Default)]
struct Grants {
    id: Vec<Vec<u8>>,
    version: Vec<i64>,
    is_open: Vec<bool>,
    over: Vec<i64>,
    twin: Vec<Option<Vec<u8>>>,
    agent: Vec<Vec<u8>>,
    asked_seq: Vec<i64>,
    asked_at: Vec<i64>,
    active_seq: Vec<Option<i64>>,
    body: Vec<Vec<u8>>,
}

#[derive(Debug, Default)]
struct Holdings {
    key: Vec<Vec<u8>>,
    until: Vec<i64>,
    body: Vec<Vec<u8>>,
}

#[derive(Debug, Default)]
struct Due {
    grant: Vec<Vec<u8>>,
    lease: Vec<Vec<u8>>,
    at: Vec<Option<i64>>,
    attempt: Vec<i64>,
    is_intended: Vec<bool>,
    rank: Vec<i16>,
}

/// A write that can be sent, again and again until its outcome is known.
#[derive(Debug)]
pub(super) struct Write {
    id: Vec<u8>,
    run: i64,
    base: (i64, Vec<u8>),
    next: (i64, Vec<u8>, Vec<u8>, i64),
    events: Events,
    grants: Grants,
    tasks: Vec<Vec<u8>>,
    holdings: Holdings,
    due: Due,
}

/// What is due of a grant, by row: when, which attempt, whether it is a mint under way, and its rank.
type Rows = BTreeMap<Vec<u8>, (Option<i64>, i64, bool, i16)>;

fn rows_of(grant: Option<&Grant>) -> Rows {
    let mut rows = Rows::new();
    let Some(grant) = grant else { return rows };
    for (job, at, attempt, rank) in due::work(grant) {
        rows.insert(job_key(job).1, (Some(num(at.0)), attempt, false, rank));
    }
    for lease in grant.leases.values().filter(|l| matches!(l.state, LeaseState::Intended)) {
        rows.insert(lease.intent.lease.as_bytes().to_vec(), (None, 0, true, 0));
    }
    rows
}

impl Write {
    /// Of the first `count` batches of the queue.
    pub(super) fn of(state: &State, count: usize, id: WriteId, run: i64) -> Result<Self, StoreError> {
        let base = &state.tail;
        let mut tail: Tail = base.clone();
        let mut events = Events::default();
        let mut tasks = BTreeSet::new();
        let mut seqs: BTreeMap<GrantId, Vec<u64>> = BTreeMap::new();
        let mut active: BTreeMap<GrantId, u64> = BTreeMap::new();
        let mut after: BTreeMap<GrantId, Arc<Grant>> = BTreeMap::new();
        let mut steps: Vec<(Option<Arc<Grant>>, Arc<Grant>)> = Vec::new();
        let mut at = Timestamp(0);
        for queued in state.queue.iter().take(count) {
            at = queued.batch.at;
            let many = queued.batch.events.len();
            for (n, (event, (stamp, payload))) in queued.batch.events.iter().zip(&queued.payloads).enumerate() {
                let leaf = tail.push(*stamp, payload);
                let mut grant = None;
                let mut what = kind::OTHER;
                match event {
                    Event::Grant { id, what, .. } => {
                        grant = Some(id.as_bytes().to_vec());
                        seqs.entry(*id).or_default().push(tail.seq);
                        if matches!(**what, GrantEvent::Activated { .. }) {
                            active.insert(*id, tail.seq);
                        }
                    }
                    Event::TaskCompleted { task } => _ = tasks.insert(task_key_bytes(task)),
                    Event::Frozen { .. } | Event::Unfrozen { .. } => what = kind::FREEZE,
                    Event::Broker { what: BrokerEvent::RunStarted { .. } } => what = kind::RUN,
                    Event::Broker { .. } => {}
                }
                events.seq.push(num(tail.seq));
                events.at.push(num(stamp.0));
                events.kind.push(what);
                events.grant.push(grant);
                events.left.push(i32::try_from(many - 1 - n).unwrap_or(i32::MAX));
                events.leaf.push(leaf.0.to_vec());
                events.payload.push(payload.clone());
            }
            for (id, grant) in &queued.after {
                let durable = || state.inner.view.get(*id).map(|s| Arc::clone(&s.grant));
                let before = after.get(id).cloned().or_else(durable);
                steps.push((before, Arc::clone(grant)));
                after.insert(*id, Arc::clone(grant));
            }
        }
        let (mut grants, mut due) = (Grants::default(), Due::default());
        for (id, grant) in &after {
            let stored = state.inner.view.get(*id);
            let mut all = stored.map(|s| s.seqs.clone()).unwrap_or_default();
            all.extend(seqs.remove(id).unwrap_or_default());
            grants.push(grant, all, active.get(id).copied())?;
            due.push(*id, &rows_of(stored.map(|s| &*s.grant)), rows_of(Some(grant)));
        }
        let mut holdings = Holdings::default();
        for (key, holding) in state.inner.view.holdings_after(&steps) {
            holdings.key.push(Digest::of_bytes(&bytes(&key)?).as_bytes().to_vec());
            let until = holding.as_ref().and_then(|h| h.over.iter().map(|e| e.until.0).max());
            holdings.until.push(num(until.unwrap_or(0)));
            holdings.body.push(holding.as_ref().map(bytes).transpose()?.unwrap_or_default());
        }
        Ok(Self {
            id: id.to_vec(),
            run,
            base: (num(base.seq), base.leaf.0.to_vec()),
            next: (num(tail.seq), tail.leaf.0.to_vec(), tail.tree.to_bytes(), num(at.0)),
            events,
            grants,
            tasks: tasks.into_iter().collect(),
            holdings,
            due,
        })
    }

    /// The statement's parameters, in its order.
    pub(super) fn params(&self) -> [&(dyn ToSql + Sync); 35] {
        let Self { id, run, base, next, events: e, grants: g, tasks, holdings: h, due: d } = self;
        [
            &base.0,
            &base.1,
            &next.0,
            &next.1,
            &next.2,
            &next.3,
            run,
            id, //
            &e.seq,
            &e.at,
            &e.kind,
            &e.grant,
            &e.left,
            &e.leaf,
            &e.payload, //
            &g.id,
            &g.version,
            &g.is_open,
            &g.over,
            &g.twin,
            &g.agent,
            &g.asked_seq,
            &g.asked_at,
            &g.active_seq,
            &g.body,
            tasks,
            &h.key,
            &h.until,
            &h.body, //
            &d.grant,
            &d.lease,
            &d.at,
            &d.attempt,
            &d.is_intended,
            &d.rank,
        ]
    }
}

impl Grants {
    fn push(&mut self, grant: &Arc<Grant>, seqs: Vec<u64>, active: Option<u64>) -> Result<(), StoreError> {
        self.id.push(grant.id.as_bytes().to_vec());
        self.version.push(num(grant.version));
        self.is_open.push(!grant.state.is_final());
        self.over.push(num(over_at(grant).0));
        self.twin.push(grant.request.idempotency.map(|d| d.as_bytes().to_vec()));
        self.agent.push(super::agent_key(&grant.request.agent.id));
        self.asked_seq.push(num(seqs.first().copied().unwrap_or(0)));
        self.asked_at.push(num(grant.requested_at.0));
        self.active_seq.push(active.map(num));
        self.body.push(bytes(&Stored { grant: Arc::clone(grant), seqs })?);
        Ok(())
    }
}

impl Due {
    /// Only what changes: an unchanged mint of another run stays that run's.
    fn push(&mut self, id: GrantId, before: &Rows, after: Rows) {
        let mut rows = after;
        for key in before.keys() {
            rows.entry(key.clone()).or_insert((None, 0, false, 0));
        }
        for (key, row) in rows {
            if before.get(&key) != Some(&row) {
                self.grant.push(id.as_bytes().to_vec());
                self.lease.push(key);
                self.at.push(row.0);
                self.attempt.push(row.1);
                self.is_intended.push(row.2);
                self.rank.push(row.3);
            }
        }
    }
}

fn bytes<T: serde::Serialize>(value: &T) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(value).map_err(|e| StoreError::Impossible(e.to_string()))
}

/// The job that a row stands for.
pub(super) fn job_of(grant: &[u8], lease: &[u8]) -> Option<Job> {
    let grant = GrantId::from_bytes(grant.try_into().ok()?);
    match lease {
        [] => Some(Job::Deadline(grant)),
        lease => Some(Job::Lease(grant, LeaseId::from_bytes(lease.try_into().ok()?))),
    }
}
