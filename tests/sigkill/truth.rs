//! The oracle: adds up the journal by itself, and compares it with what agents were told and what is at the targets.
//! What it says is a violation is one whatever the broker was doing when it died.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::time::Duration;

use countersign::audit::reader::read_from;
use countersign::core::digest::Digest;
use countersign::core::event::{Event, GrantEvent};
use countersign::core::grant::{Grant, GrantState};
use countersign::core::id::{GrantId, LeaseId, Timestamp};
use countersign::core::lease::{Lease, LeaseState};
use countersign::store::engine::read_record;

use crate::agents::Ack;
use crate::targets::{Kind, Seen};

/// What is to end is gone once the broker has been up for so long, all its lives together. It takes tens of
/// milliseconds; the machine may be busy.
const ENDS_WITHIN: Duration = Duration::from_secs(10);

/// What the journal says, and what was seen before.
#[derive(Default)]
pub struct Truth {
    pub grants: BTreeMap<GrantId, Grant>,
    /// Sequence number of the last record that was read.
    pub seq: u64,
    leases: HashMap<LeaseId, GrantId>,
    /// Names at targets: roles, OpenBao's users and leases.
    names: HashMap<String, LeaseId>,
    requests: HashMap<Digest, GrantId>,
    /// Users and leases at OpenBao that the journal doesn't name, seen at an earlier kill.
    nameless: BTreeSet<String>,
    /// Roles that were counted as being in the window.
    in_window: BTreeSet<String>,
    /// For how long the broker was up while these were to end.
    overdue: HashMap<LeaseId, Duration>,
}

/// Credentials that existed at a target when the broker died, though the journal knew an intent at most.
#[derive(Debug, Default, Clone, Copy)]
pub struct Window {
    pub postgres: u64,
    pub openbao: u64,
}

impl Truth {
    /// Reads what was added. Only whole batches count, as the broker reads it at its start.
    pub fn read_on(&mut self, journal: &Path, wrong: &mut Vec<String>) {
        let mut records = match read_from(journal, self.seq + 1) {
            Ok(records) => records,
            Err(error) => return wrong.push(format!("the journal can't be read: {error}")),
        };
        loop {
            let record = match records.next_record() {
                Ok(Some(record)) => record,
                Ok(None) => return,
                Err(error) => return wrong.push(format!("the journal can't be read: {error}")),
            };
            let seq = record.meta.seq;
            let read = read_record(seq, record.payload).unwrap();
            self.seq = seq;
            if let Event::Grant { id, what, .. } = &read.event {
                self.apply(*id, what, read.at, wrong);
            }
        }
    }

    fn apply(&mut self, id: GrantId, what: &GrantEvent, at: Timestamp, wrong: &mut Vec<String>) {
        let mut slot = self.grants.remove(&id);
        if let Err(error) = Grant::apply(&mut slot, id, what, at) {
            wrong.push(format!("impossible story of {id}: {error}"));
        }
        let Some(grant) = slot else { return };
        match what {
            GrantEvent::Requested { request } => {
                if let Some(twin) = request.idempotency.and_then(|digest| self.requests.insert(digest, id)) {
                    wrong.push(format!("double grant: {id} and {twin} are one request"));
                }
            }
            GrantEvent::LeaseIntended { intent } => {
                self.leases.insert(intent.lease, id);
                if let Some(twin) = self.names.insert(intent.name.clone(), intent.lease) {
                    wrong.push(format!("the name of {} was that of {twin}", intent.lease));
                }
            }
            GrantEvent::LeaseLive { lease, handle, .. } => {
                let keys = [handle["lease_id"].as_str(), handle["username"].as_str()];
                self.names.extend(keys.into_iter().flatten().map(|name| (name.to_owned(), *lease)));
                let resource = &grant.leases[lease].intent.permission.resource;
                let live = |l: &&Lease| matches!(l.state, LeaseState::Live { .. });
                let live = grant.leases.values().filter(live).filter(|l| l.intent.permission.resource == *resource);
                if live.count() > 1 {
                    wrong.push(format!("double mint: {id} has two live credentials for {resource}"));
                }
            }
            _ => {}
        }
        self.grants.insert(id, grant);
    }

    fn lease(&self, id: LeaseId) -> Option<&Lease> {
        self.grants.get(self.leases.get(&id)?)?.leases.get(&id)
    }

    fn all_leases(&self) -> impl Iterator<Item = &Lease> {
        self.grants.values().flat_map(|g| g.leases.values())
    }

    /// Leases that are to be ended: their own ending began, or the time of their grant is up.
    pub fn to_end(&self, now: Timestamp) -> BTreeSet<LeaseId> {
        let is_due = |g: &Grant, l: &Lease| match &l.state {
            LeaseState::Revoking { .. } => true,
            LeaseState::Live { .. } => matches!(g.state, GrantState::Active { ends_at, .. } if ends_at < now),
            _ => false,
        };
        let due = |g: &Grant| g.leases.values().filter(|l| is_due(g, l)).map(|l| l.intent.lease).collect::<Vec<_>>();
        self.grants.values().filter(|g| !g.state.is_final()).flat_map(due).collect()
    }

    /// Everything that an agent was told is on record (guarantees 2 and 8).
    pub fn check_acks(&self, acks: &[Ack], wrong: &mut Vec<String>) {
        for ack in acks {
            let grant = self.grants.get(&ack.grant());
            let Some(grant) = grant else {
                wrong.push(format!("lost: {} was told of, and isn't in the journal", ack.grant()));
                continue;
            };
            match ack {
                Ack::Granted { version, .. } if grant.version < *version => {
                    wrong.push(format!("lost: {} was at version {version} and is at {}", grant.id, grant.version));
                }
                Ack::HandedOver { lease, .. } => {
                    let state = grant.leases.get(lease).map(|l| &l.state);
                    let was_released = match state {
                        Some(LeaseState::Live { released_at, .. }) => released_at.is_some(),
                        Some(LeaseState::Revoking { .. } | LeaseState::Revoked { .. }) => true,
                        _ => false,
                    };
                    if !was_released {
                        wrong.push(format!("released too early: {lease} was handed over and is {state:?}"));
                    }
                }
                Ack::Over { .. } if matches!(grant.state, GrantState::Active { .. } | GrantState::Pending { .. }) => {
                    wrong.push(format!("lost: the end of {} was told, and it is {}", grant.id, grant.state.word()));
                }
                Ack::Granted { .. } | Ack::Over { .. } => {}
            }
        }
    }

    /// These users and leases at OpenBao are there before a life of the broker begins.
    pub fn seen_before(&mut self, seen: &Seen) {
        self.nameless.extend(seen.users.iter().chain(&seen.leases).filter(|n| !self.names.contains_key(*n)).cloned());
    }

    /// What is at the targets is explained by a lease that isn't proven gone (guarantees 1, 4 and 5). `planted` was put
    /// there by somebody else. Call while the broker is down, after [`Truth::read_on`]: what was seen must be on record.
    pub fn check_seen(&mut self, seen: &Seen, planted: &BTreeSet<String>, wrong: &mut Vec<String>) -> Window {
        let mut window = Window::default();
        for name in seen.roles.difference(planted) {
            match self.names.get(name).and_then(|id| self.lease(*id)).map(|l| &l.state) {
                None => wrong.push(format!("orphan: the role {name} exists, and nothing of it is recorded")),
                Some(LeaseState::Revoked { .. } | LeaseState::Absent { .. }) => {
                    wrong.push(format!("orphan: the role {name} exists, and its end is on record"));
                }
                Some(LeaseState::Intended) => window.postgres += u64::from(self.in_window.insert(name.clone())),
                Some(_) => {}
            }
        }
        let mut nameless = BTreeSet::new();
        for name in seen.users.iter().chain(&seen.leases) {
            match self.names.get(name).and_then(|id| self.lease(*id)) {
                None => _ = nameless.insert(name.clone()),
                Some(lease) if lease.is_gone() => {
                    wrong.push(format!("orphan: {name} exists at OpenBao, and its end is on record"));
                }
                Some(_) => {}
            }
        }
        // OpenBao chooses names: those that no answer told of belong to leases in doubt, of which there are enough.
        let may_be = |l: &&Lease| {
            l.intent.target.as_str() == Kind::OpenBao.target()
                && matches!(l.state, LeaseState::Intended | LeaseState::Unknown { .. })
        };
        let doubtful = self.all_leases().filter(may_be).count();
        for (what, names) in [("users", &seen.users), ("leases", &seen.leases)] {
            let strange = names.intersection(&nameless).count();
            if strange > doubtful {
                wrong.push(format!("orphan: {strange} {what} at OpenBao for {doubtful} leases in doubt"));
            }
        }
        let fresh = |n: &&String| seen.users.contains(*n) && !self.nameless.contains(*n);
        window.openbao = nameless.iter().filter(fresh).count() as u64;
        self.nameless = nameless;
        window
    }

    /// The broker was up for so long. What was to end before that, and isn't proven gone, has used up that much time.
    pub fn check_ends(&mut self, before: &BTreeSet<LeaseId>, up: Duration, wrong: &mut Vec<String>) {
        let is_open = |id: &LeaseId| self.lease(*id).is_some_and(|l| !l.is_gone());
        let still: Vec<LeaseId> = before.iter().copied().filter(is_open).collect();
        self.overdue.retain(|id, _| still.contains(id));
        for id in &still {
            let overdue = self.overdue.entry(*id).or_default();
            *overdue += up;
            if *overdue > ENDS_WITHIN {
                *overdue = Duration::ZERO;
                wrong.push(format!("not ended: {id} was to end, and the broker was up for {ENDS_WITHIN:?} since"));
            }
        }
    }

    /// Leases of which the record knows the intent alone.
    pub fn intended(&self) -> BTreeSet<LeaseId> {
        let is_intended = |l: &&Lease| l.state == LeaseState::Intended;
        self.all_leases().filter(is_intended).map(|l| l.intent.lease).collect()
    }

    /// The broker took requests: what it found half-way at its start is settled, or in doubt by its own word.
    pub fn check_taken_up(&self, before: &BTreeSet<LeaseId>, wrong: &mut Vec<String>) {
        for id in self.intended().intersection(before) {
            wrong.push(format!("not ended: {id} was left half-way, and the next start passed it over"));
        }
    }

    /// Grants that are not final.
    pub fn open(&self) -> Vec<&Grant> {
        self.grants.values().filter(|g| !g.state.is_final()).collect()
    }
}
