//! What is due when, and what of it has been handed out. Pure.

use std::collections::{BTreeSet, HashMap};

use crate::core::grant::{Grant, GrantState};
use crate::core::id::{GrantId, Timestamp};
use crate::core::lease::LeaseState;

use super::Job;

/// Due work, earliest first. A job that is handed out stands in the queue at the moment when it comes back.
#[derive(Debug, Default)]
pub(super) struct Due {
    queue: BTreeSet<(Timestamp, Job)>,
    of: HashMap<GrantId, Vec<Entry>>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    job: Job,
    at: Timestamp,
    /// Tells one piece of work from the next of the same name: a claim on the earlier one is void.
    attempt: (bool, u32),
    claimed_until: Option<Timestamp>,
}

impl Entry {
    fn place(&self) -> (Timestamp, Job) {
        (self.claimed_until.unwrap_or(self.at), self.job)
    }
    fn is_same_work(&self, other: &Self) -> bool {
        (self.job, self.at, self.attempt) == (other.job, other.at, other.attempt)
    }
}

const fn grant_of(job: Job) -> GrantId {
    match job {
        Job::Deadline(id) | Job::Lease(id, _) => id,
    }
}

fn work_of(grant: &Grant) -> Vec<Entry> {
    let mut out = Vec::new();
    let mut push = |job, at, attempt| out.push(Entry { job, at, attempt, claimed_until: None });
    match grant.state {
        GrantState::Pending { decide_by } => push(Job::Deadline(grant.id), decide_by, (false, 0)),
        GrantState::Active { ends_at, .. } => push(Job::Deadline(grant.id), ends_at, (false, 0)),
        _ => {}
    }
    for lease in grant.leases.values() {
        let (is_unknown, since, progress) = match &lease.state {
            LeaseState::Revoking { progress, since } => (false, since, progress),
            LeaseState::Unknown { progress, since, .. } => (true, since, progress),
            _ => continue,
        };
        let at = progress.next_try.unwrap_or(*since);
        push(Job::Lease(grant.id, lease.intent.lease), at, (is_unknown, progress.attempts));
    }
    out
}

impl Due {
    /// Takes in what a grant has become. Claims on work that is still the same stay. True if there is new work.
    pub(super) fn update(&mut self, grant: &Grant) -> bool {
        let mut work = work_of(grant);
        let old = self.of.remove(&grant.id).unwrap_or_default();
        for entry in &old {
            match work.iter_mut().find(|w| w.is_same_work(entry)) {
                Some(same) => same.claimed_until = entry.claimed_until,
                None => _ = self.queue.remove(&entry.place()),
            }
        }
        let mut is_new = false;
        for entry in &work {
            is_new |= self.queue.insert(entry.place());
        }
        if !work.is_empty() {
            self.of.insert(grant.id, work);
        }
        is_new
    }

    /// Hands out what is due at `now`, at most `limit`, until `until`.
    pub(super) fn claim(&mut self, now: Timestamp, until: Timestamp, limit: usize) -> Vec<Job> {
        let due: Vec<_> = self.queue.iter().take_while(|(at, _)| *at <= now).take(limit).copied().collect();
        for place in &due {
            self.move_to(*place, Some(until));
        }
        due.into_iter().map(|(_, job)| job).collect()
    }

    /// Takes a job back. True if it had been handed out.
    pub(super) fn release(&mut self, job: Job) -> bool {
        let entry = self.of.get(&grant_of(job)).and_then(|all| all.iter().find(|e| e.job == job));
        let Some(place) = entry.filter(|e| e.claimed_until.is_some()).map(Entry::place) else { return false };
        self.move_to(place, None);
        true
    }

    fn move_to(&mut self, place: (Timestamp, Job), claimed_until: Option<Timestamp>) {
        let all = self.of.get_mut(&grant_of(place.1));
        if let Some(entry) = all.and_then(|all| all.iter_mut().find(|e| e.job == place.1)) {
            self.queue.remove(&place);
            entry.claimed_until = claimed_until;
            self.queue.insert(entry.place());
        }
    }

    /// When something may be due next.
    pub(super) fn next(&self) -> Option<Timestamp> {
        self.queue.first().map(|(at, _)| *at)
    }
}
