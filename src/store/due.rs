//! What is due when, and what of it has been handed out. Pure.

use std::collections::{BTreeSet, HashMap};

use crate::core::event::Urgency;
use crate::core::grant::{Grant, GrantState};
use crate::core::id::{GrantId, Timestamp};
use crate::core::lease::LeaseState;

use super::Job;

/// What is handed out before what. Within one of these, the earliest is first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// Leases that a freeze ends.
    Frozen,
    /// Deadlines, which cost a record and no target, and leases that were taken away.
    Soon,
    /// All other leases.
    Over,
}

impl Rank {
    const ALL: [Self; 3] = [Self::Frozen, Self::Soon, Self::Over];
}

type Place = (Timestamp, Job);

/// Due work. A job that is handed out stands in its queue at the moment when it comes back.
#[derive(Debug, Default)]
pub(super) struct Due {
    queues: [BTreeSet<Place>; Rank::ALL.len()],
    of: HashMap<GrantId, Vec<Entry>>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    job: Job,
    rank: Rank,
    at: Timestamp,
    /// Tells one piece of work from the next of the same name: a claim on the earlier one is void.
    attempt: (bool, u32),
    claimed_until: Option<Timestamp>,
}

impl Entry {
    fn place(&self) -> Place {
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
    let mut push = |job, rank, at, attempt| out.push(Entry { job, rank, at, attempt, claimed_until: None });
    match grant.state {
        GrantState::Pending { decide_by } => push(Job::Deadline(grant.id), Rank::Soon, decide_by, (false, 0)),
        GrantState::Active { ends_at, .. } => push(Job::Deadline(grant.id), Rank::Soon, ends_at, (false, 0)),
        _ => {}
    }
    let rank = match grant.urgency() {
        Urgency::Frozen => Rank::Frozen,
        Urgency::Taken => Rank::Soon,
        Urgency::Over => Rank::Over,
    };
    for lease in grant.leases.values() {
        let (is_unknown, since, progress) = match &lease.state {
            LeaseState::Revoking { progress, since } => (false, since, progress),
            LeaseState::Unknown { progress, since, .. } => (true, since, progress),
            _ => continue,
        };
        let at = progress.next_try.unwrap_or(*since);
        push(Job::Lease(grant.id, lease.intent.lease), rank, at, (is_unknown, progress.attempts));
    }
    out
}

/// The work that a grant makes: when it is due, what tells it from the next of the same name, and its rank: what is handed
/// out before what.
pub(super) fn work(grant: &Grant) -> impl Iterator<Item = (Job, Timestamp, i64, i16)> {
    let attempt = |(is_unknown, attempts): (bool, u32)| i64::from(attempts) * 2 + i64::from(is_unknown);
    work_of(grant).into_iter().map(move |e| (e.job, e.at, attempt(e.attempt), e.rank as i16))
}

impl Due {
    /// Takes in what a grant has become. Claims on work that is still the same stay. True if there is new work.
    pub(super) fn update(&mut self, grant: &Grant) -> bool {
        let mut work = work_of(grant);
        let old = self.of.remove(&grant.id).unwrap_or_default();
        for entry in &old {
            self.queues[entry.rank as usize].remove(&entry.place());
            if let Some(same) = work.iter_mut().find(|w| w.is_same_work(entry)) {
                same.claimed_until = entry.claimed_until;
            }
        }
        let is_new = work.iter().any(|w| old.iter().all(|o| o.place() != w.place()));
        for entry in &work {
            self.queues[entry.rank as usize].insert(entry.place());
        }
        if !work.is_empty() {
            self.of.insert(grant.id, work);
        }
        is_new
    }

    /// Hands out what is due at `now`, at most `limit`, until `until`.
    pub(super) fn claim(&mut self, now: Timestamp, until: Timestamp, limit: usize) -> Vec<Job> {
        let of_rank = |rank: Rank| self.queues[rank as usize].iter().take_while(|(at, _)| *at <= now);
        let due: Vec<Job> = Rank::ALL.into_iter().flat_map(of_rank).take(limit).map(|(_, job)| *job).collect();
        for job in &due {
            self.move_to(*job, Some(until));
        }
        due
    }

    /// Somebody else handed out these until `until`. With `later`, the rest that is due at `now` isn't looked at before.
    pub(super) fn handed_out(&mut self, now: Timestamp, jobs: &[Job], until: Timestamp, later: Option<Timestamp>) {
        let due = self.queues.iter().flat_map(|q| q.iter().take_while(|(at, _)| *at <= now));
        let due: Vec<Job> = due.map(|(_, job)| *job).collect();
        for job in due {
            let at = if jobs.contains(&job) { Some(until) } else { later };
            if at.is_some() {
                self.move_to(job, at);
            }
        }
    }

    /// Takes a job back. True if it had been handed out.
    pub(super) fn release(&mut self, job: Job) -> bool {
        let entry = self.of.get(&grant_of(job)).and_then(|all| all.iter().find(|e| e.job == job));
        if entry.is_none_or(|e| e.claimed_until.is_none()) {
            return false;
        }
        self.move_to(job, None);
        true
    }

    fn move_to(&mut self, job: Job, claimed_until: Option<Timestamp>) {
        let all = self.of.get_mut(&grant_of(job));
        if let Some(entry) = all.and_then(|all| all.iter_mut().find(|e| e.job == job)) {
            let queue = &mut self.queues[entry.rank as usize];
            queue.remove(&entry.place());
            entry.claimed_until = claimed_until;
            queue.insert(entry.place());
        }
    }

    /// When something may be due next.
    pub(super) fn next(&self) -> Option<Timestamp> {
        self.queues.iter().filter_map(BTreeSet::first).map(|(at, _)| *at).min()
    }
}
