//! The database of several nodes, in memory: what the statements of `store::postgres` mean, one after the other, each as
//! a whole. Its clock is the true time. What lies between it and the nodes is in `link.rs`.

use std::collections::{BTreeMap, BTreeSet};

use countersign::audit::frame::leaf_of;
use countersign::audit::merkle::{Frontier, Hash};
use countersign::core::digest::Digest;
use countersign::core::id::{GrantId, LeaseId, Timestamp};
use countersign::mutation::Mutation;
use countersign::store::Job;
use countersign::store::postgres::tables::{
    Claimed, DueRow, GrantRow, HoldingRow, Kind, KnownBy, NewRecord, NewTail, ROWS, Row, Run, Snapshot, Standing,
    Trouble, Write, WriteId,
};

use super::ground::Durable;

/// A record, with what the row says of its write.
struct Record {
    row: NewRecord,
    write: WriteId,
    run: Run,
    /// Was its run over when it was written?
    is_stale: bool,
}

struct Due {
    at: Option<Timestamp>,
    attempt: i64,
    rank: i16,
    intended_by: Option<Run>,
    owner: Option<Run>,
    epoch: i64,
    until_ms: Option<u64>,
}

struct RunRow {
    until_ms: u64,
    is_over: bool,
}

/// All tables.
pub struct Tables {
    tail: NewTail,
    records: Vec<Record>,
    grants: BTreeMap<GrantId, GrantRow>,
    twins: BTreeMap<Digest, GrantId>,
    tasks: BTreeSet<Vec<u8>>,
    holdings: BTreeMap<Vec<u8>, HoldingRow>,
    due: BTreeMap<Job, Due>,
    runs: BTreeMap<Run, RunRow>,
    life: BTreeMap<GrantId, u64>,
    checkpoints: BTreeMap<u64, String>,
    keys: Option<Digest>,
}

impl Default for Tables {
    fn default() -> Self {
        Self {
            tail: NewTail { seq: 0, leaf: Hash::ZERO, tree: Vec::new(), at: Timestamp(0) },
            records: Vec::new(),
            grants: BTreeMap::new(),
            twins: BTreeMap::new(),
            tasks: BTreeSet::new(),
            holdings: BTreeMap::new(),
            due: BTreeMap::new(),
            runs: BTreeMap::new(),
            life: BTreeMap::new(),
            checkpoints: BTreeMap::new(),
            keys: None,
        }
    }
}

impl Tables {
    pub fn has_keys(&mut self, keys: &Digest) -> bool {
        self.keys.get_or_insert(*keys) == keys
    }

    pub fn load(&self) -> Snapshot {
        let latest = self.records.iter().rposition(|r| r.row.kind == Kind::Run);
        let told = self.records.iter().enumerate().filter(|(n, r)| r.row.kind == Kind::Freeze || Some(*n) == latest);
        Snapshot {
            tail: self.tail.clone(),
            told: told.map(|(_, r)| (r.row.seq, r.row.payload.clone())).collect(),
            holdings: self.holdings.values().map(|h| h.body.clone()).filter(|body| !body.is_empty()).collect(),
            open: self.grants.values().filter(|g| g.is_open).map(|g| g.body.clone()).collect(),
            checkpoint_size: self.checkpoints.keys().next_back().copied().unwrap_or(0),
        }
    }

    pub fn is_over(&self, run: Run) -> bool {
        self.runs.get(&run).is_none_or(|r| r.is_over)
    }

    pub fn write(&mut self, write: &Write) -> Result<bool, Trouble> {
        let is_stale = self.is_over(write.run);
        let is_next = (self.tail.seq, self.tail.leaf) == write.base;
        if !is_next || is_stale && !Mutation::StaleRunWrites.is_on() {
            return Ok(false);
        }
        let is_taken = |g: &GrantRow| g.twin.is_some_and(|twin| self.twins.get(&twin).is_some_and(|id| *id != g.id));
        if write.grants.iter().any(is_taken) {
            return Err(Trouble::Refused("23505".into(), "two grants with one idempotency digest".into()));
        }
        self.tail = write.next.clone();
        let record = |row: &NewRecord| Record { row: row.clone(), write: write.id, run: write.run, is_stale };
        self.records.extend(write.records.iter().map(record));
        for new in &write.grants {
            let row = self.grants.entry(new.id).or_insert_with(|| new.clone());
            (row.version, row.is_open, row.over, row.body) = (new.version, new.is_open, new.over, new.body.clone());
            row.active_seq = new.active_seq.or(row.active_seq);
            self.twins.extend(row.twin.map(|twin| (twin, new.id)));
        }
        self.tasks.extend(write.tasks.iter().cloned());
        self.holdings.extend(write.holdings.iter().map(|h| (h.key.clone(), h.clone())));
        for new in &write.due {
            self.is_due(new, write.run);
        }
        Ok(true)
    }

    fn is_due(&mut self, new: &DueRow, run: Run) {
        let intended_by = new.is_intended.then_some(run);
        let fresh = Due { at: None, attempt: 0, rank: 0, intended_by: None, owner: None, epoch: 0, until_ms: None };
        let due = self.due.entry(new.job).or_insert(fresh);
        // Two that are unknown are not the same.
        let is_same = due.at.is_some() && due.at == new.at && due.attempt == new.attempt;
        if !is_same {
            (due.owner, due.until_ms) = (None, None);
        }
        (due.at, due.attempt, due.rank, due.intended_by) = (new.at, new.attempt, new.rank, intended_by);
    }

    pub fn since(&self, seq: u64) -> Vec<Row> {
        let behind = self.records.iter().skip(usize::try_from(seq).unwrap()).take(ROWS);
        let row = |r: &Record| Row {
            seq: r.row.seq,
            at: r.row.at,
            leaf: r.row.leaf,
            payload: r.row.payload.clone(),
            write: r.write,
        };
        behind.map(row).collect()
    }

    pub fn standing(&self, run: Run) -> Standing {
        Standing { seq: self.tail.seq, leaf: self.tail.leaf, is_over: self.is_over(run) }
    }

    pub fn grants(&self, ids: &[GrantId]) -> Vec<Vec<u8>> {
        ids.iter().filter_map(|id| self.grants.get(id)).map(|g| g.body.clone()).collect()
    }

    pub fn twins(&self, digests: &[Digest]) -> Vec<(Digest, GrantId)> {
        digests.iter().filter_map(|d| Some((*d, *self.twins.get(d)?))).collect()
    }

    pub fn tasks(&self, keys: &[Vec<u8>]) -> Vec<Vec<u8>> {
        keys.iter().filter(|key| self.tasks.contains(*key)).cloned().collect()
    }

    pub fn decided(&self, limit: usize) -> Vec<Vec<u8>> {
        let mut over: Vec<&GrantRow> = self.grants.values().filter(|g| !g.is_open).collect();
        over.sort_by_key(|g| (std::cmp::Reverse(g.over), g.id));
        over.into_iter().take(limit).map(|g| g.body.clone()).collect()
    }

    pub fn records(&self, id: GrantId) -> Vec<(u64, Vec<u8>)> {
        let of = self.records.iter().filter(|r| r.row.grant == Some(id));
        of.map(|r| (r.row.seq, r.row.payload.clone())).collect()
    }

    pub fn history(&self, agent: &[u8], recent: usize) -> KnownBy {
        let mut all: Vec<&GrantRow> = self.grants.values().filter(|g| g.agent == agent).collect();
        all.sort_by_key(|g| g.asked_seq);
        KnownBy {
            first: all.first().map(|g| g.asked_at),
            recent: all.iter().rev().take(recent).map(|g| g.id).collect(),
            active: all.iter().filter(|g| g.active_seq.is_some()).max_by_key(|g| g.active_seq).map(|g| g.id),
        }
    }

    pub fn claim(&mut self, at: Timestamp, limit: usize, run: Run, lease_ms: u64, now_ms: u64) -> Vec<Claimed> {
        if self.is_over(run) {
            return Vec::new();
        }
        let is_free =
            |d: &Due| d.until_ms.is_none_or(|until| until <= now_ms) || d.owner.is_none_or(|owner| self.is_over(owner));
        let due = self.due.iter().filter_map(|(job, d)| Some((d.rank, d.at.filter(|due| *due <= at)?, *job, d)));
        let mut free: Vec<(i16, Timestamp, Job)> =
            due.filter(|(.., d)| is_free(d)).map(|(rank, at, job, _)| (rank, at, job)).collect();
        free.sort_unstable();
        free.truncate(limit);
        let mut claimed = Vec::new();
        for (rank, at, job) in free {
            let Some(due) = self.due.get_mut(&job) else { continue };
            (due.owner, due.epoch, due.until_ms) = (Some(run), due.epoch + 1, Some(now_ms + lease_ms));
            claimed.push(Claimed { rank, at, job, epoch: due.epoch });
        }
        claimed
    }

    pub fn release(&mut self, job: Job, run: Run, epoch: i64) {
        if let Some(due) = self.due.get_mut(&job).filter(|d| d.owner == Some(run) && d.epoch == epoch) {
            (due.owner, due.until_ms) = (None, None);
        }
    }

    pub fn abandoned(&self) -> Vec<(GrantId, LeaseId)> {
        let left = |(job, due): (&Job, &Due)| match job {
            Job::Lease(grant, lease) if due.intended_by.is_some_and(|run| self.is_over(run)) => Some((*grant, *lease)),
            _ => None,
        };
        self.due.iter().filter_map(left).collect()
    }

    pub fn join(&mut self, lasts_ms: u64, now_ms: u64) -> Run {
        let run = self.runs.keys().next_back().map_or(1, |last| last + 1);
        self.runs.insert(run, RunRow { until_ms: now_ms + lasts_ms, is_over: false });
        run
    }

    pub fn renew(&mut self, run: Run, lasts_ms: u64, now_ms: u64) -> Option<(u64, Hash)> {
        let row = self.runs.get_mut(&run).filter(|r| !r.is_over)?;
        row.until_ms = now_ms + lasts_ms;
        Some((self.tail.seq, self.tail.leaf))
    }

    pub fn leave(&mut self, run: Run) {
        if let Some(row) = self.runs.get_mut(&run) {
            row.is_over = true;
        }
    }

    pub fn declare(&mut self, but: Run, now_ms: u64) -> Vec<Run> {
        let late = self.runs.iter_mut().filter(|(run, r)| **run != but && !r.is_over && r.until_ms < now_ms);
        let declared = late.map(|(run, r)| {
            r.is_over = true;
            *run
        });
        declared.collect()
    }

    pub fn beat(&mut self, grants: &[GrantId], now_ms: u64) {
        self.life.extend(grants.iter().map(|id| (*id, now_ms)));
    }

    pub fn silent_ms(&self, grants: &[GrantId], now_ms: u64) -> Vec<(GrantId, u64)> {
        grants.iter().filter_map(|id| Some((*id, now_ms - self.life.get(id)?))).collect()
    }

    pub fn checkpoint(&mut self, size: u64, leaf: &Hash, note: &str) {
        if self.records.iter().any(|r| r.row.seq == size && r.row.leaf == *leaf) {
            self.checkpoints.entry(size).or_insert_with(|| note.to_owned());
        }
    }

    pub fn prune(&mut self, reach: Timestamp) {
        self.due.retain(|_, d| d.at.is_some() || d.intended_by.is_some());
        self.holdings.retain(|_, h| h.until >= reach);
    }

    /// What the oracle reads.
    pub fn durable(&self, from: u64) -> Vec<Durable> {
        let behind = self.records.iter().skip(usize::try_from(from - 1).unwrap());
        let record =
            |r: &Record| Durable { seq: r.row.seq, payload: r.row.payload.clone(), run: r.run, is_stale: r.is_stale };
        behind.map(record).collect()
    }

    pub fn count(&self) -> u64 {
        self.records.len() as u64
    }

    /// What is wrong with the record as a Merkle log.
    pub fn wrong(&self) -> Option<String> {
        let (mut tree, mut leaf) = (Frontier::new(), Hash::ZERO);
        for (record, seq) in self.records.iter().zip(1u64..) {
            leaf = leaf_of(seq, record.row.at.0, &leaf, &record.row.payload);
            if (record.row.seq, record.row.leaf) != (seq, leaf) {
                return Some(format!("record {seq} of the database is not what its leaf says"));
            }
            tree.push(leaf);
        }
        let end = (self.tail.seq, self.tail.leaf, &self.tail.tree);
        (end != (tree.size(), leaf, &tree.to_bytes())).then(|| "the tail is not where the record ends".to_owned())
    }
}
