//! Endings at the targets: who waits for whom, and what becomes of each.
//!
//! Endings of one resource wait for one another and for no other's. Within a resource, what is tried for the first
//! time never waits for what resisted before, and what is in doubt waits apart: a credential that can be cut at once
//! is cut at once, whatever else hangs (guarantee 4).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::connector::{Connector, Gone, RevokeError};
use crate::core::decide::Command;
use crate::core::id::{GrantId, LeaseId, ResourceName, Timestamp};
use crate::core::lease::{Lease, LeaseState};
use crate::store::Job;

use super::{Broker, BrokerError};

/// First pause after a failed ending.
pub const RETRY_FIRST_MS: u64 = 250;
/// Longest pause after failed endings.
pub const RETRY_MS_MAX: u64 = 60_000;
/// Endings in one group.
const GROUP_MAX: usize = 64;
/// A group that is tried for the first time keeps its turn no longer than this: if it hangs, the next one comes.
const TURN: Duration = Duration::from_secs(2);
/// After the moment at which a credential ends by itself, in milliseconds: so that it is over when it is looked at.
const AFTER_MS: u64 = 50;

/// Endings that wait for one another.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Lane {
    target: ResourceName,
    resource: ResourceName,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Kind {
    /// Tried for the first time: what is due together goes together.
    First,
    /// Resisted before: each for itself.
    Again,
    /// In doubt, and looked for the first time.
    Doubtful,
    /// In doubt, and not settled when it was looked for before.
    DoubtfulAgain,
}

impl Kind {
    /// `unrecorded`: attempts that failed, and that the journal didn't take.
    fn of(lease: &Lease, occasion: Occasion, unrecorded: u32) -> Self {
        match &lease.state {
            LeaseState::Unknown { progress, .. } if progress.attempts == 0 && unrecorded == 0 => Self::Doubtful,
            LeaseState::Unknown { .. } => Self::DoubtfulAgain,
            // It was the target that was down: nothing is known of a lease that resists.
            _ if occasion == Occasion::TargetIsBack => Self::First,
            LeaseState::Revoking { progress, .. } if progress.attempts > 0 || unrecorded > 0 => Self::Again,
            _ => Self::First,
        }
    }
    const fn is_doubtful(self) -> bool {
        matches!(self, Self::Doubtful | Self::DoubtfulAgain)
    }
    /// Groups at once.
    const fn permits(self) -> usize {
        match self {
            Self::First | Self::Doubtful | Self::DoubtfulAgain => 4,
            Self::Again => 16,
        }
    }
    const fn together(self) -> usize {
        if matches!(self, Self::First) { GROUP_MAX } else { 1 }
    }
    /// How long a turn is kept while it goes on.
    const fn turn(self) -> Option<Duration> {
        match self {
            Self::First | Self::Doubtful => Some(TURN),
            Self::Again | Self::DoubtfulAgain => None,
        }
    }
}

/// Why leases are ended now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Occasion {
    /// The store handed them out as due.
    Due,
    /// Their target was down, and answers again.
    TargetIsBack,
}

/// What is being ended, and what of it was handed out again meanwhile.
#[derive(Debug, Default, Clone)]
pub(super) struct UnderWay(Arc<Mutex<HashMap<LeaseId, bool>>>);

impl UnderWay {
    /// Begins, unless somebody is at it. In that case, if it was handed out again, that is remembered.
    fn begin(&self, lease: LeaseId, occasion: Occasion) -> Option<Mark> {
        let mut all = self.0.lock();
        if let Some(again) = all.get_mut(&lease) {
            *again |= occasion == Occasion::Due;
            return None;
        }
        all.insert(lease, false);
        Some(Mark { of: Some(self.clone()), lease })
    }
}

/// Says that somebody is at a lease. However the task ends that holds it, others may come afterwards.
struct Mark {
    of: Option<UnderWay>,
    lease: LeaseId,
}

impl Mark {
    /// True if the lease was handed out again meanwhile.
    fn lift(&mut self) -> bool {
        self.of.take().is_some_and(|of| of.0.lock().remove(&self.lease).unwrap_or(false))
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        self.lift();
    }
}

/// One ending that nobody else works on.
struct Work {
    grant: GrantId,
    lease: Lease,
    mark: Mark,
}

impl Broker {
    /// Ends leases at one target, in tasks of their own. What is under way already is left to whoever is at it.
    pub(super) fn end_at(
        self: &Arc<Self>,
        target: &ResourceName,
        connector: &Arc<dyn Connector>,
        leases: Vec<(GrantId, Lease)>,
        occasion: Occasion,
    ) {
        let mut lanes: BTreeMap<Lane, Vec<Work>> = BTreeMap::new();
        for (grant, lease) in leases {
            let Some(mark) = self.driver.under_way.begin(lease.intent.lease, occasion) else { continue };
            let unrecorded = self.driver.unrecorded_tries.lock().get(&lease.intent.lease).copied().unwrap_or(0);
            let (kind, resource) = (Kind::of(&lease, occasion, unrecorded), lease.intent.permission.resource.clone());
            let lane = Lane { target: target.clone(), resource, kind };
            lanes.entry(lane).or_default().push(Work { grant, lease, mark });
        }
        for (lane, mut works) in lanes {
            while !works.is_empty() {
                let group = works.drain(..works.len().min(lane.kind.together())).collect();
                let (broker, connector, lane) = (Arc::clone(self), Arc::clone(connector), lane.clone());
                self.driver.tracker.spawn(async move {
                    if !broker.take_turn(&lane, connector.as_ref(), group).await {
                        broker.look_out_for(&lane.target, connector);
                    }
                });
            }
        }
    }

    /// Ends a group when it is its turn. False if some have to be tried again.
    async fn take_turn(&self, lane: &Lane, connector: &dyn Connector, group: Vec<Work>) -> bool {
        let permits = {
            let mut permits = self.driver.permits.lock();
            let fresh = || Arc::new(Semaphore::new(lane.kind.permits()));
            Arc::clone(permits.entry(lane.clone()).or_insert_with(fresh))
        };
        let permit = permits.acquire_owned().await;
        let mut ending = std::pin::pin!(self.end_group(lane.kind, connector, group));
        let Some(turn) = lane.kind.turn() else { return ending.await };
        tokio::select! {
            well = &mut ending => return well,
            () = self.clock.clock().sleep(turn) => drop(permit),
        }
        ending.await
    }

    async fn end_group(&self, kind: Kind, connector: &dyn Connector, group: Vec<Work>) -> bool {
        let mut todo = Vec::with_capacity(group.len());
        for work in group {
            let known = self.driver.unrecorded.lock().get(&work.lease.intent.lease).cloned();
            match known {
                Some(gone) => _ = self.settle(work, Ok(gone)).await,
                None => todo.push(work),
            }
        }
        if kind == Kind::First {
            return self.end_together(connector, todo).await;
        }
        let mut well = true;
        for work in todo {
            let outcome = if kind.is_doubtful() {
                match self.explained(connector, Some(work.lease.intent.lease)).await {
                    Ok(known) => connector.revoke_unknown(&work.lease, &known, self.clock.passed()).await,
                    Err(error) => Err(RevokeError::Retry { why: error.to_string() }),
                }
            } else {
                connector.revoke(&work.lease, self.clock.passed()).await
            };
            well &= self.settle(work, outcome).await;
        }
        well
    }

    /// Ends leases in one call. Each is recorded as soon as it is known, while others are still being ended.
    async fn end_together(&self, connector: &dyn Connector, works: Vec<Work>) -> bool {
        if works.is_empty() {
            return true;
        }
        let leases: Vec<Lease> = works.iter().map(|w| w.lease.clone()).collect();
        let mut works: Vec<Option<Work>> = works.into_iter().map(Some).collect();
        let (told, outcomes) = futures::channel::mpsc::unbounded();
        let ending = async {
            let settled = |place, outcome| _ = told.unbounded_send((place, outcome));
            connector.revoke_all(&leases, self.clock.passed(), &settled).await;
            told.close_channel();
        };
        let recording = outcomes
            .filter_map(|(place, outcome): (usize, _)| {
                let work: Option<Work> = works.get_mut(place).and_then(Option::take);
                async move { Some((work?, outcome)) }
            })
            .map(|(work, outcome)| self.settle(work, outcome))
            .buffer_unordered(GROUP_MAX)
            .fold(true, |well, one| async move { well & one });
        let ((), mut well) = tokio::join!(ending, recording);
        for work in works.into_iter().flatten() {
            let why = "nothing was told of this ending; it is tried again".to_owned();
            well &= self.settle(work, Err(RevokeError::Retry { why })).await;
        }
        well
    }

    /// Records what became of an ending. False if it has to be tried again.
    async fn settle(&self, mut work: Work, outcome: Result<Gone, RevokeError>) -> bool {
        let (grant, lease) = (work.grant, &work.lease);
        let well = !matches!(outcome, Err(RevokeError::Retry { .. }));
        let is_proof = outcome.is_ok();
        let recorded = match outcome {
            Ok(gone) => self.proven(grant, lease, gone).await,
            Err(RevokeError::Retry { why }) => self.again(grant, lease, why).await,
            Err(RevokeError::EndsAt { at }) => {
                let why = "this target can't end it early; it ends by its own expiry".to_owned();
                let next = look_again(lease, at, self.clock.passed(), self.now());
                self.retry_at(grant, lease, why, next).await
            }
        };
        let id = lease.intent.lease;
        let handed_out_again = work.mark.lift();
        if recorded {
            self.driver.unrecorded_tries.lock().remove(&id);
            if handed_out_again {
                self.store.release(Job::Lease(grant, id)).await;
            }
        } else {
            self.release_later(grant, id, is_proof);
        }
        well
    }

    /// Hands a lease out again after a pause: what became of it could not be recorded. A proof only has to be written; an
    /// attempt that failed waits longer each time, as one that is on record does.
    fn release_later(&self, grant: GrantId, lease: LeaseId, is_proof: bool) {
        let pause = if is_proof {
            RETRY_FIRST_MS
        } else {
            let mut tries = self.driver.unrecorded_tries.lock();
            let tries = tries.entry(lease).or_default();
            *tries = tries.saturating_add(1);
            backoff_ms(*tries, self.random.as_ref())
        };
        let (store, clock) = (Arc::clone(&self.store), Arc::clone(self.clock.clock()));
        tokio::spawn(async move {
            clock.sleep(Duration::from_millis(pause)).await;
            store.release(Job::Lease(grant, lease)).await;
        });
    }

    /// Names and keys of everything that leases without proof of their end explain, but for one lease.
    pub(super) async fn explained(
        &self,
        connector: &dyn Connector,
        except: Option<LeaseId>,
    ) -> Result<BTreeSet<String>, BrokerError> {
        let mut known = BTreeSet::new();
        for grant in self.store.open_grants().await? {
            for lease in grant.open_leases().filter(|l| Some(l.intent.lease) != except) {
                known.insert(lease.intent.name.clone());
                if let Some(handle) = &lease.handle {
                    known.extend(connector.keys(handle));
                }
            }
        }
        Ok(known)
    }

    /// True if it is recorded.
    async fn proven(&self, id: GrantId, lease: &Lease, gone: Gone) -> bool {
        let command = Command::Gone {
            lease: lease.intent.lease,
            evidence: gone.evidence.clone(),
            seen: gone.seen.clone(),
            access_cut_ms: gone.access_cut.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
        };
        let recorded = self.command(id, &command, true).await;
        match &recorded {
            Ok(_) => _ = self.driver.unrecorded.lock().remove(&lease.intent.lease),
            Err(error) => {
                tracing::warn!(lease = %lease.intent.lease, %error, "a proof could not be recorded yet");
                self.driver.unrecorded.lock().insert(lease.intent.lease, gone);
            }
        }
        recorded.is_ok()
    }

    /// A lease whose target left the catalogue stays to be ended, visibly (regression L3).
    pub(super) async fn no_connector(&self, id: GrantId, lease: &Lease) {
        let why = format!(
            "the target {} is no longer in the catalogue: put it back until this lease is ended",
            lease.intent.target
        );
        if !self.again(id, lease, why).await {
            self.release_later(id, lease.intent.lease, false);
        }
    }

    async fn again(&self, id: GrantId, lease: &Lease, why: String) -> bool {
        let attempts = match &lease.state {
            LeaseState::Revoking { progress, .. } | LeaseState::Unknown { progress, .. } => progress.attempts,
            _ => 0,
        };
        let pause = backoff_ms(attempts, self.random.as_ref());
        self.retry_at(id, lease, why, self.now().plus_ms(pause)).await
    }

    /// True if it is recorded.
    async fn retry_at(&self, id: GrantId, lease: &Lease, why: String, next_try: Timestamp) -> bool {
        tracing::warn!(lease = %lease.intent.lease, %why, "an ending is not proven yet; it will be tried again");
        let command = Command::Retry { lease: lease.intent.lease, why, next_try };
        // Not urgent: an attempt that failed is no ending, and there may be many (guarantee 8).
        let recorded = self.command(id, &command, false).await;
        if let Err(error) = &recorded {
            tracing::warn!(lease = %lease.intent.lease, %error, "a failed ending could not be recorded yet");
        }
        recorded.is_ok()
    }
}

/// When to look again at a lease that ends by itself at `at`, on the broker's clock. Not much later than the end of
/// the life that it was minted with, whatever the wall clock says now: a step that is undone parks nothing
/// (guarantee 10). From then on at every longest pause.
fn look_again(lease: &Lease, at: Timestamp, passed: Timestamp, now: Timestamp) -> Timestamp {
    let life_left = lease.intent.intended_at.plus_secs(lease.intent.lifetime_secs).ms_since(now);
    let wait = at.ms_since(passed).min(life_left.max(RETRY_MS_MAX));
    now.plus_ms(wait.saturating_add(AFTER_MS))
}

/// Doubles from [`RETRY_FIRST_MS`] to [`RETRY_MS_MAX`], with up to a quarter taken off at random.
pub(super) fn backoff_ms(attempts: u32, random: &dyn crate::keys::random::Random) -> u64 {
    let full = RETRY_FIRST_MS.saturating_mul(1 << attempts.min(16)).min(RETRY_MS_MAX);
    let [byte] = crate::keys::random::random_bytes::<1>(random);
    full - full / 4 * u64::from(byte) / 255
}
