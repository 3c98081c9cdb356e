//! One write: the events of some batches, and what they make of the tables. Pure; `tables.rs` says what is in it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::state::{State, Tail};
use super::tables::{DueRow, GrantRow, HoldingRow, Kind, NewRecord, NewTail, Run, Write, WriteId};
use super::task_key_bytes;
use crate::core::digest::Digest;
use crate::core::event::{BrokerEvent, Event, GrantEvent};
use crate::core::grant::Grant;
use crate::core::id::{GrantId, Timestamp};
use crate::core::lease::LeaseState;
use crate::store::engine::over_at;
use crate::store::view::{Stored, last_at};
use crate::store::{Job, StoreError, due};

/// What is due of a grant, by row: when, which attempt, whether it is a mint under way, and its rank.
type Rows = BTreeMap<Job, (Option<Timestamp>, i64, bool, i16)>;

fn rows_of(grant: Option<&Grant>) -> Rows {
    let mut rows = Rows::new();
    let Some(grant) = grant else { return rows };
    for (job, at, attempt, rank) in due::work(grant) {
        rows.insert(job, (Some(at), attempt, false, rank));
    }
    for lease in grant.leases.values().filter(|l| matches!(l.state, LeaseState::Intended)) {
        rows.insert(Job::Lease(grant.id, lease.intent.lease), (None, 0, true, 0));
    }
    rows
}

impl Write {
    /// Of the first `count` batches of the queue.
    pub(super) fn of(state: &State, count: usize, id: WriteId, run: Run) -> Result<Self, StoreError> {
        let base = &state.tail;
        let mut tail: Tail = base.clone();
        let mut records = Vec::new();
        let mut tasks = BTreeSet::new();
        let mut seqs: BTreeMap<GrantId, Vec<u64>> = BTreeMap::new();
        let mut active: BTreeMap<GrantId, u64> = BTreeMap::new();
        let mut after: BTreeMap<GrantId, Arc<Grant>> = BTreeMap::new();
        let mut steps: Vec<(Option<Arc<Grant>>, Arc<Grant>)> = Vec::new();
        let mut at = state.inner.view.last_at();
        for queued in state.queue.iter().take(count) {
            let many = queued.batch.events.len();
            for (n, (event, (stamp, payload))) in queued.batch.events.iter().zip(&queued.payloads).enumerate() {
                let leaf = tail.push(*stamp, payload);
                at = last_at(at, queued.batch.at, event);
                let mut grant = None;
                let mut kind = Kind::Other;
                match event {
                    Event::Grant { id, what, .. } => {
                        grant = Some(*id);
                        seqs.entry(*id).or_default().push(tail.seq);
                        if matches!(**what, GrantEvent::Activated { .. }) {
                            active.insert(*id, tail.seq);
                        }
                    }
                    Event::TaskCompleted { task } => _ = tasks.insert(task_key_bytes(task)),
                    Event::Frozen { .. } | Event::Unfrozen { .. } => kind = Kind::Freeze,
                    Event::Broker { what: BrokerEvent::RunStarted { .. } } => kind = Kind::Run,
                    Event::Broker { .. } => {}
                }
                records.push(NewRecord {
                    seq: tail.seq,
                    at: *stamp,
                    kind,
                    grant,
                    left: u32::try_from(many - 1 - n).unwrap_or(u32::MAX),
                    leaf,
                    payload: payload.clone(),
                });
            }
            for (id, grant) in &queued.after {
                let durable = || state.inner.view.get(*id).map(|s| Arc::clone(&s.grant));
                let before = after.get(id).cloned().or_else(durable);
                steps.push((before, Arc::clone(grant)));
                after.insert(*id, Arc::clone(grant));
            }
        }
        let (mut grants, mut due) = (Vec::new(), Vec::new());
        for (id, grant) in &after {
            let stored = state.inner.view.get(*id);
            let mut all = stored.map(|s| s.seqs.clone()).unwrap_or_default();
            all.extend(seqs.remove(id).unwrap_or_default());
            grants.push(GrantRow::of(grant, all, active.get(id).copied())?);
            push_due(&mut due, &rows_of(stored.map(|s| &*s.grant)), rows_of(Some(grant)));
        }
        let mut holdings = Vec::new();
        for (key, holding) in state.inner.view.holdings_after(&steps) {
            holdings.push(HoldingRow {
                key: Digest::of_bytes(&bytes(&key)?).as_bytes().to_vec(),
                until: holding.as_ref().and_then(|h| h.over.iter().map(|e| e.until).max()).unwrap_or(Timestamp(0)),
                body: holding.as_ref().map(bytes).transpose()?.unwrap_or_default(),
            });
        }
        Ok(Self {
            id,
            run,
            base: (base.seq, base.leaf),
            next: NewTail { seq: tail.seq, leaf: tail.leaf, tree: tail.tree.to_bytes(), at },
            records,
            grants,
            tasks: tasks.into_iter().collect(),
            holdings,
            due,
        })
    }
}

impl GrantRow {
    fn of(grant: &Arc<Grant>, seqs: Vec<u64>, active_seq: Option<u64>) -> Result<Self, StoreError> {
        Ok(Self {
            id: grant.id,
            version: grant.version,
            is_open: !grant.state.is_final(),
            over: over_at(grant),
            twin: grant.request.idempotency,
            agent: super::agent_key(&grant.request.agent.id),
            asked_seq: seqs.first().copied().unwrap_or(0),
            asked_at: grant.requested_at,
            active_seq,
            body: bytes(&Stored { grant: Arc::clone(grant), seqs })?,
        })
    }
}

/// Only what changes: an unchanged mint of another run stays that run's.
fn push_due(due: &mut Vec<DueRow>, before: &Rows, after: Rows) {
    let mut rows = after;
    for job in before.keys() {
        rows.entry(*job).or_insert((None, 0, false, 0));
    }
    for (job, row) in rows {
        if before.get(&job) != Some(&row) {
            let (at, attempt, is_intended, rank) = row;
            due.push(DueRow { job, at, attempt, is_intended, rank });
        }
    }
}

fn bytes<T: serde::Serialize>(value: &T) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(value).map_err(|e| StoreError::Impossible(e.to_string()))
}
