//! How endings get into the record: a grant with everything below it (guarantee 7), in one write where it fits, and to
//! the end, whoever stops waiting. What the journal refuses is ended at its target all the same (guarantee 8).
//! Who may end what is in `end.rs`.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::core::decide::{Command, decide};
use crate::core::event::{EndCause, Event, Selector, Urgency};
use crate::core::grant::{Grant, GrantState};
use crate::core::id::{GrantId, LeaseId, ResourceName, TaskKey, Timestamp};
use crate::core::lease::LeaseState;
use crate::failpoint::{self, Point};
use crate::mutation::Mutation;
use crate::store::{Batch, Freeze, StoreError};

use super::lanes::Occasion;
use super::settle::backoff_ms;
use super::turns::ToEnd;
use super::{Broker, BrokerError, CONFLICT_TRIES_MAX, numbered, request};

/// Events of endings in one write. More are written one after the other, what is below first.
const EVENTS_AT_ONCE: usize = 1024;
/// Grants whose endings are tried together, so that what is wrong with one holds up few others.
pub(super) const ENDINGS_AT_ONCE: usize = 100;
/// The same of a freeze, as long as nothing is wrong: what is recorded together is cut together.
const FROZEN_AT_ONCE: usize = 1000;

/// Endings that are decided and not recorded as a whole yet. These grants are over: nothing is minted, voted or handed on
/// under them, and no token of theirs is good, whatever the record says so far.
#[derive(Debug, Default)]
pub struct Unfinished {
    causes: Mutex<BTreeMap<GrantId, EndCause>>,
    /// Freezes that were made and are not on record yet.
    freezes: Mutex<Vec<Event>>,
    /// Attempts at leases that the record still calls live: how many, and not again before.
    asked: Mutex<HashMap<LeaseId, (u32, Timestamp)>>,
}

impl Unfinished {
    /// Why a grant is over, if its end is not on record yet.
    pub(super) fn cause_of(&self, id: GrantId) -> Option<EndCause> {
        self.causes.lock().get(&id).cloned()
    }
    /// The first cause stands (guarantee 11).
    fn remember(&self, all: impl IntoIterator<Item = (GrantId, EndCause)>) {
        let mut causes = self.causes.lock();
        for (id, cause) in all {
            causes.entry(id).or_insert(cause);
        }
    }
    fn forget(&self, ids: &[GrantId]) {
        let mut causes = self.causes.lock();
        for id in ids {
            causes.remove(id);
        }
        if causes.is_empty() {
            self.asked.lock().clear();
        }
    }
    fn ids(&self) -> Vec<GrantId> {
        self.causes.lock().keys().copied().collect()
    }
    /// May the target be asked about this lease now? If so, this counts as an attempt.
    fn ask(&self, lease: LeaseId, now: Timestamp, random: &dyn crate::keys::random::Random) -> bool {
        let mut asked = self.asked.lock();
        let (attempts, next) = asked.entry(lease).or_insert((0, now));
        if now < *next {
            return false;
        }
        *next = now.plus_ms(backoff_ms(*attempts, random));
        *attempts = attempts.saturating_add(1);
        true
    }
}

/// What is to end.
#[derive(Clone, Copy)]
pub(super) enum What<'a> {
    /// These, with everything below them.
    Grants(&'a [GrantId]),
    /// All of a task, with everything below; and its name is used up.
    Task(&'a TaskKey),
}

/// Why each of the grants that are named ends. What is below them ends with them.
pub(super) type Causes<'a> = &'a (dyn Fn(GrantId) -> EndCause + Sync);

/// One grant's part of an ending.
struct Part {
    id: GrantId,
    cause: EndCause,
    events: Vec<Event>,
}

impl Broker {
    /// Ends a grant and everything below it. Over already: nothing happens, and that is success (guarantee 11).
    pub async fn end(&self, id: GrantId, cause: EndCause) -> Result<Arc<Grant>, BrokerError> {
        self.end_all(What::Grants(&[id]), &cause).await?;
        self.store.grant(id).await?.ok_or(BrokerError::NotFound)
    }

    /// Ends all of it. Returns what it ended. What can't be recorded now is remembered: the driver ends it at its
    /// target, and records it as soon as that works.
    pub(super) async fn end_all(&self, what: What<'_>, cause: &EndCause) -> Result<Vec<GrantId>, BrokerError> {
        let outcome = self.record_ends(what, &|_| cause.clone()).await;
        if let Err(BrokerError::Unavailable(why)) = outcome {
            self.end_later(what, &|_| cause.clone()).await?;
            return Err(BrokerError::Unrecorded(why));
        }
        outcome
    }

    /// A freeze that can't be recorded now: what it covers is over all the same, and it holds from the moment when it is
    /// on record.
    pub(super) async fn freeze_later(
        &self,
        id: u64,
        selector: &Selector,
        events: Vec<Event>,
    ) -> Result<(), BrokerError> {
        self.unfinished.freezes.lock().extend(events);
        let covered = self.covered(selector).await?;
        self.end_later(What::Grants(&covered), &|_| EndCause::Frozen { id }).await
    }

    /// These grants, and what is below them, are over from here on; the driver does the rest.
    pub(super) async fn end_later(&self, what: What<'_>, cause: Causes<'_>) -> Result<(), BrokerError> {
        let parts = self.parts(what, cause, self.now()).await?;
        self.unfinished.remember(parts.into_iter().map(|p| (p.id, p.cause)));
        Ok(())
    }

    async fn record_ends(&self, what: What<'_>, cause: Causes<'_>) -> Result<Vec<GrantId>, BrokerError> {
        let mut ended = Vec::new();
        for _ in 0..CONFLICT_TRIES_MAX {
            let now = self.now();
            let mut writes = in_writes(self.parts(what, cause, now).await?);
            if let What::Task(task) = what
                && !self.store.task_completed(task).await?
            {
                // With the last of its grants: the store takes it only when none is left.
                let completed = Event::TaskCompleted { task: task.clone() };
                match writes.last_mut() {
                    Some((_, events)) => events.insert(0, completed),
                    None => writes.push((Vec::new(), vec![completed])),
                }
            }
            if writes.len() > 1 {
                // Whoever asked for it may go away between two of them.
                self.end_later(what, cause).await?;
            }
            let mut is_done = true;
            for (part, events) in writes {
                failpoint::at(Point::EndDecided);
                match self.store.append(Batch { expect: Vec::new(), events, at: now, urgent: true }).await {
                    Ok(_) => {
                        failpoint::at(Point::EndRecorded);
                        self.unfinished.forget(&part);
                        ended.extend(part);
                    }
                    Err(StoreError::Conflict) => {
                        is_done = false;
                        break;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            if is_done {
                return Ok(ended);
            }
        }
        Err(BrokerError::Unavailable("too much happened at once; try again".to_owned()))
    }

    /// What is to happen to these grants and to all that is below them; what is below comes first. Nothing for what is
    /// over already.
    async fn parts(&self, what: What<'_>, cause: Causes<'_>, now: Timestamp) -> Result<Vec<Part>, BrokerError> {
        let ids: BTreeSet<GrantId> = match what {
            What::Grants(ids) => ids.iter().copied().collect(),
            What::Task(task) => self.store.task_grants(task).await?.iter().map(|g| g.id).collect(),
        };
        let mut all: BTreeMap<GrantId, Arc<Grant>> = BTreeMap::new();
        for id in &ids {
            // If it is there, all that is below it came along.
            if Mutation::ChildrenLiveOn.is_on() {
                all.extend(self.store.head(*id).await?.map(|g| (g.id, g)));
            } else if !all.contains_key(id) {
                all.extend(self.store.subtree(*id).await?.into_iter().map(|g| (g.id, g)));
            }
        }
        let depth = |grant: &Grant| {
            let above = |id: Option<GrantId>| id.and_then(|id| all.get(&id));
            std::iter::successors(above(grant.request.parent), |g| above(g.request.parent)).count()
        };
        let mut order: Vec<(Reverse<usize>, &Arc<Grant>)> = all.values().map(|g| (Reverse(depth(g)), g)).collect();
        order.sort_by_key(|(depth, _)| *depth);
        let mut parts = Vec::new();
        for (_, grant) in order {
            let cause = if ids.contains(&grant.id) { cause(grant.id) } else { EndCause::ParentEnded };
            let made = decide(grant, &Command::Finish { cause: cause.clone() }, now)?;
            if !made.is_empty() {
                parts.push(Part { id: grant.id, cause, events: numbered(grant.id, grant.version, made) });
            }
        }
        Ok(parts)
    }

    /// Goes on with the endings that are not on record yet. One round; the driver makes one after the other.
    pub(super) async fn finish_unfinished(self: &Arc<Self>) {
        self.record_freezes().await;
        let ids = self.unfinished.ids();
        for some in ids.chunks(ENDINGS_AT_ONCE) {
            let cause = |id| self.unfinished.cause_of(id).unwrap_or(EndCause::ParentEnded);
            match self.record_ends(What::Grants(some), &cause).await {
                // Whatever came to its end by itself needs nothing more, once that is durable.
                Ok(_) => self.forget_what_is_over(some).await,
                Err(error) => {
                    tracing::warn!(grants = some.len(), %error, "endings could not be recorded yet");
                    self.end_unrecorded(some).await;
                }
            }
        }
    }

    async fn forget_what_is_over(&self, ids: &[GrantId]) {
        let mut over = Vec::with_capacity(ids.len());
        for id in ids {
            if self.store.grant(*id).await.is_ok_and(|grant| grant.is_none_or(|g| !is_to_end(&g))) {
                over.push(*id);
            }
        }
        self.unfinished.forget(&over);
    }

    async fn record_freezes(&self) {
        loop {
            let Some(event) = self.unfinished.freezes.lock().first().cloned() else { return };
            let batch = Batch { expect: Vec::new(), events: vec![event], at: self.now(), urgent: true };
            if let Err(error) = self.store.append(batch).await {
                return tracing::error!(%error, "a freeze could not be recorded yet");
            }
            // The driver alone takes out; whoever adds, adds behind.
            self.unfinished.freezes.lock().remove(0);
        }
    }

    /// Guarantee 8: when even the reserved space is gone, durable leases are ended all the same. The proofs wait with
    /// the driver until the endings are on record.
    async fn end_unrecorded(self: &Arc<Self>, ids: &[GrantId]) {
        let (rules, now) = (self.rules(), self.now());
        let mut by_target: BTreeMap<ResourceName, Vec<ToEnd>> = BTreeMap::new();
        for id in ids {
            let Ok(Some(grant)) = self.store.grant(*id).await else { continue };
            for lease in grant.open_leases().filter(|l| matches!(l.state, LeaseState::Live { .. })) {
                if !self.driver.is_proven(lease.intent.lease)
                    && self.unfinished.ask(lease.intent.lease, now, self.random.as_ref())
                {
                    let urgency = self.unfinished.cause_of(*id).map_or(Urgency::Over, |c| c.urgency());
                    let to_end = ToEnd { grant: Arc::clone(&grant), lease: lease.intent.lease, urgency };
                    by_target.entry(lease.intent.target.clone()).or_default().push(to_end);
                }
            }
        }
        for (target, leases) in by_target {
            if let Some(connector) = rules.connectors.get(&target) {
                self.end_at(&target, connector, leases, Occasion::Due);
            }
        }
    }

    /// What a selector covers and is not over yet, with everything below.
    pub(super) async fn covered(&self, selector: &Selector) -> Result<Vec<GrantId>, BrokerError> {
        let rules = self.rules();
        let mut ids = BTreeSet::new();
        for grant in self.store.open_grants().await? {
            if is_to_end(&grant) && request::selects(&rules, selector, &grant.request) {
                ids.extend(self.store.subtree(grant.id).await?.iter().filter(|g| is_to_end(g)).map(|g| g.id));
            }
        }
        Ok(ids.into_iter().collect())
    }

    /// Empties the room whose door a freeze closed. Goes on past what can't be ended now: it is remembered, and
    /// [`Broker::enforce_freezes`] comes by again. Returns what it ended.
    pub(super) async fn enforce(&self, freeze: u64, selector: &Selector) -> Result<Vec<GrantId>, BrokerError> {
        let mut ended = Vec::new();
        let covered = self.covered(selector).await?;
        let mut chunks: Vec<&[GrantId]> = covered.rchunks(FROZEN_AT_ONCE).collect();
        while let Some(some) = chunks.pop() {
            match self.end_all(What::Grants(some), &EndCause::Frozen { id: freeze }).await {
                Ok(mut some) => ended.append(&mut some),
                // What is wrong with one holds up few others.
                Err(error) if some.len() > ENDINGS_AT_ONCE && !matches!(error, BrokerError::Unrecorded(_)) => {
                    chunks.extend(some.rchunks(ENDINGS_AT_ONCE));
                }
                Err(error) => tracing::error!(freeze, %error, "a freeze could not end all that it covers yet"),
            }
        }
        Ok(ended)
    }

    /// Ends what the freezes that hold still cover: whoever made one may have gone away, or the broker stopped, between
    /// the freeze and the endings.
    pub(super) async fn enforce_freezes(&self) {
        let holding = match self.store.freezes().await {
            Ok(freezes) => freezes.holding,
            Err(error) => return tracing::error!(%error, "can't read which freezes hold"),
        };
        for Freeze { id, selector, .. } in holding {
            if let Err(error) = self.enforce(id, &selector).await {
                tracing::error!(freeze = id, %error, "can't read what a freeze covers");
            }
        }
    }
}

fn is_to_end(grant: &Grant) -> bool {
    matches!(grant.state, GrantState::Pending { .. } | GrantState::Active { .. })
}

/// Whole grants, as many as fit into a write.
fn in_writes(parts: Vec<Part>) -> Vec<(Vec<GrantId>, Vec<Event>)> {
    let mut writes: Vec<(Vec<GrantId>, Vec<Event>)> = Vec::new();
    for part in parts {
        match writes.last_mut() {
            Some((ids, events)) if events.len() + part.events.len() <= EVENTS_AT_ONCE => {
                ids.push(part.id);
                events.extend(part.events);
            }
            _ => writes.push((vec![part.id], part.events)),
        }
    }
    writes
}
