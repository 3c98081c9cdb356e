//! Does what is due: deadlines, endings, leases in doubt, missed heartbeats, sweeps.
//!
//! Reads only what is durable, and gives up on nothing: what fails is due again after a capped back-off. How endings
//! go on at a target is in `lanes.rs` and `turns.rs`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::connector::{Connector, Gone};
use crate::core::event::EndCause;
use crate::core::grant::GrantState;
use crate::core::id::{GrantId, LeaseId, ResourceName};
use crate::failpoint::{self, Point};
use crate::runtime::{Task, start, within};
use crate::store::Job;

use super::endings::What;
use super::lanes::{Lanes, Occasion};
use super::look_out::Watch;
use super::settle::RETRY_FIRST_MS;
use super::turns::{READ_AT_ONCE, ToEnd, UnderWay};
use super::{Broker, BrokerError};

/// Jobs taken at once.
const CLAIM_MAX: usize = 1024;
/// A job that was taken and not settled is taken again after this.
const CLAIM_FOR: Duration = Duration::from_secs(120);
/// Deadlines that are recorded one by one, at once.
const DEADLINES_AT_ONCE: usize = 16;
/// The driver looks around at least this often.
const LOOK_AROUND: Duration = Duration::from_millis(500);
/// A target that couldn't be swept is swept again after this at most.
const SWEEP_AGAIN: Duration = Duration::from_secs(5);
/// What the driver keeps between rounds.
pub struct DriverState {
    pub(super) lanes: Mutex<Lanes>,
    pub(super) under_way: UnderWay,
    pub(super) tracker: TaskTracker,
    /// Mints, which run to their end whoever goes away.
    pub(super) mints: TaskTracker,
    /// Ended at the target while the journal could not be written: not asked of the target again and again.
    pub(super) unrecorded: Mutex<HashMap<LeaseId, Gone>>,
    /// Attempts that failed, and that the journal didn't take.
    pub(super) unrecorded_tries: Mutex<HashMap<LeaseId, u32>>,
    /// Targets that are looked out for, because they are away or may be.
    pub(super) watch: Mutex<Watch>,
    /// A sweep is wanted before its time.
    pub(super) sweep_soon: Notify,
    /// What sweeps found that no lease explains.
    pub(super) strange: Mutex<HashMap<ResourceName, super::sweep::Strange>>,
    /// Events of sweeps that happened while the journal could not be written.
    pub(super) untold: Mutex<Vec<crate::core::event::BrokerEvent>>,
    stop: CancellationToken,
}

impl Default for DriverState {
    fn default() -> Self {
        Self {
            lanes: Mutex::default(),
            under_way: UnderWay::default(),
            tracker: TaskTracker::new(),
            mints: TaskTracker::new(),
            unrecorded: Mutex::default(),
            unrecorded_tries: Mutex::default(),
            watch: Mutex::default(),
            sweep_soon: Notify::new(),
            strange: Mutex::default(),
            untold: Mutex::default(),
            stop: CancellationToken::new(),
        }
    }
}

impl DriverState {
    /// Has it been ended at its target, though the journal doesn't say so yet?
    pub(super) fn is_proven(&self, lease: LeaseId) -> bool {
        self.unrecorded.lock().contains_key(&lease)
    }
}

impl Broker {
    /// Starts the driver. Call once, after [`Broker::start_up`].
    pub fn drive(self: &Arc<Self>) {
        let due = Arc::clone(self);
        self.spawn(async move { due.work_loop().await });
        let watchful = Arc::clone(self);
        self.spawn(async move { watchful.watch_loop().await });
        let sweeper = Arc::clone(self);
        self.spawn(async move { sweeper.sweep_loop().await });
    }

    /// Starts a task that [`Broker::stop`] waits for.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.clock.clock().spawn(Box::pin(self.driver.tracker.track_future(task)));
    }

    /// Starts a part of a mint: [`Broker::stop`] waits for it as long as the slowest target may take.
    pub(super) fn spawn_mint<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> Task<T> {
        start(self.clock.clock().as_ref(), self.driver.mints.track_future(task))
    }

    /// Stops taking new work and waits for what is under way: for mints as long as the slowest target may take, then
    /// for endings, at most so long. The rest is due at the next start.
    pub async fn stop(&self, wait: Duration) {
        self.driver.stop.cancel();
        self.driver.mints.close();
        self.driver.tracker.close();
        let longest = self.rules().connectors.values().map(|c| c.mint_deadline()).max().unwrap_or_default();
        let runtime = self.clock.clock().as_ref();
        if within(runtime, longest, self.driver.mints.wait()).await.is_none() {
            tracing::warn!("a mint is still under way; the next start looks for what it made");
        }
        if within(runtime, wait, self.driver.tracker.wait()).await.is_none() {
            tracing::warn!("some endings are still under way; the next start goes on with them");
        }
    }

    pub(super) fn stopping(&self) -> bool {
        self.driver.stop.is_cancelled()
    }

    pub(super) async fn or_stop(&self, until: impl Future<Output = ()>) {
        tokio::select! {
            biased;
            () = self.driver.stop.cancelled() => {}
            () = until => {}
        }
    }

    async fn work_loop(self: &Arc<Self>) {
        while !self.stopping() {
            self.or_stop(self.store.due(self.now(), LOOK_AROUND)).await;
            if !self.store.is_writable()
                && let Err(error) = self.store.recover().await
            {
                tracing::error!(%error, "the journal can't be written; endings go on, nothing is minted");
            }
            self.finish_unfinished().await;
            let jobs = match self.store.claim(self.now(), CLAIM_FOR, CLAIM_MAX).await {
                Ok(jobs) => jobs,
                Err(error) => {
                    tracing::error!(%error, "can't read what is due");
                    continue;
                }
            };
            self.take_on(jobs).await;
        }
    }

    async fn take_on(self: &Arc<Self>, jobs: Vec<Job>) {
        let mut deadlines = Vec::new();
        let mut by_target: BTreeMap<ResourceName, Vec<ToEnd>> = BTreeMap::new();
        let read = |job: Job| async move {
            let Job::Lease(id, _) = job else { return (job, None) };
            let grant = self.store.grant(id).await;
            if let Err(error) = &grant {
                tracing::error!(grant = %id, %error, "can't read a grant whose lease is to be ended");
            }
            (job, grant.ok().flatten())
        };
        let jobs: Vec<_> = futures::stream::iter(jobs).map(read).buffered(READ_AT_ONCE).collect().await;
        for (job, grant) in jobs {
            match job {
                Job::Deadline(id) => deadlines.push(id),
                Job::Lease(_, lease) => {
                    let target = grant.as_ref().and_then(|g| g.leases.get(&lease)).map(|l| l.intent.target.clone());
                    let (Some(grant), Some(target)) = (grant, target) else {
                        self.store.release(job).await;
                        continue;
                    };
                    let urgency = grant.urgency();
                    by_target.entry(target).or_default().push(ToEnd { grant, lease, urgency });
                }
            }
        }
        if !deadlines.is_empty() {
            let broker = Arc::clone(self);
            self.spawn(async move { broker.deadlines_came(deadlines).await });
        }
        let rules = self.rules();
        for (target, leases) in by_target {
            failpoint::at(Point::RevokeDue);
            match rules.connectors.get(&target) {
                Some(connector) => self.end_at(&target, connector, leases, Occasion::Due),
                None => {
                    for ToEnd { grant, lease, .. } in leases {
                        let broker = Arc::clone(self);
                        self.spawn(async move {
                            if let Some(lease) = grant.leases.get(&lease) {
                                broker.no_connector(grant.id, lease).await;
                            }
                        });
                    }
                }
            }
        }
    }

    /// Deadlines have come. What was in force ends in as few writes as possible: many end in one second.
    async fn deadlines_came(&self, ids: Vec<GrantId>) {
        let overdue = |id: GrantId| async move {
            let grant = self.store.head(id).await.ok().flatten()?;
            matches!(grant.state, GrantState::Active { ends_at, .. } if ends_at <= self.now()).then_some(id)
        };
        let heads = futures::stream::iter(ids.iter().copied()).map(overdue).buffered(READ_AT_ONCE);
        let in_force: Vec<GrantId> = heads.filter_map(std::future::ready).collect().await;
        if in_force.len() > 1
            && let Err(error) = self.end_all(What::Grants(&in_force), &EndCause::Expired).await
            && !matches!(error, BrokerError::Unrecorded(_))
        {
            tracing::warn!(grants = in_force.len(), %error, "deadlines could not be recorded together");
        }
        // Nothing is left to do for what is over by now.
        let tick = |id: GrantId| async move {
            let outcome = self.tick(id).await;
            if let Err(error) = &outcome {
                tracing::warn!(grant = %id, %error, "a deadline could not be recorded yet");
            }
            outcome.is_ok()
        };
        let well = futures::stream::iter(ids.iter().copied()).map(tick).buffer_unordered(DEADLINES_AT_ONCE);
        // Each to its end: `all` would leave off at the first that fails, and hold up those behind it.
        if !well.fold(true, |all, well| async move { all & well }).await {
            self.clock.clock().sleep(Duration::from_millis(RETRY_FIRST_MS)).await;
        }
        for id in ids {
            self.store.release(Job::Deadline(id)).await;
        }
    }

    async fn watch_loop(self: &Arc<Self>) {
        let mut rounds = 0u64;
        while !self.stopping() {
            self.or_stop(self.clock.clock().sleep(Duration::from_secs(1))).await;
            self.check_heartbeats().await;
            self.enforce_freezes().await;
            if self.has_started()
                && self.store.is_writable()
                && let Err(error) = self.settle_abandoned("the node that was minting it is gone").await
            {
                tracing::warn!(%error, "can't take up what another node left");
            }
            rounds += 1;
            if rounds.is_multiple_of(60)
                && let Err(error) = self.record_refusals().await
            {
                tracing::warn!(%error, "counted refusals could not be recorded");
            }
        }
    }

    async fn sweep_loop(self: &Arc<Self>) {
        let every = Duration::from_secs(self.rules().config.broker.sweep_every_secs.max(1));
        let unswept = Mutex::new(HashSet::new());
        let (mut turns, mut under_way) = (FuturesUnordered::new(), HashSet::new());
        while !self.stopping() {
            // Each for itself: one that is slow or hangs holds up no other.
            for (target, connector) in &self.rules().connectors {
                if under_way.insert(target.clone()) {
                    turns.push(self.sweep_turn(target.clone(), Arc::clone(connector), every, &unswept));
                }
            }
            let next = async {
                tokio::select! {
                    biased;
                    Some(target) = turns.next() => {
                        under_way.remove(&target);
                    }
                    // There may be new ones.
                    () = self.clock.clock().sleep(every) => {}
                }
            };
            self.or_stop(next).await;
        }
        // What was begun is told, too.
        turns.for_each(|_| std::future::ready(())).await;
    }

    /// Sweeps one target, and waits until it is its turn again.
    async fn sweep_turn(
        self: &Arc<Self>,
        target: ResourceName,
        connector: Arc<dyn Connector>,
        every: Duration,
        unswept: &Mutex<HashSet<ResourceName>>,
    ) -> ResourceName {
        // From here on: what asks for a sweep while this one goes on gets another one.
        let mut soon = std::pin::pin!(self.driver.sweep_soon.notified());
        soon.as_mut().enable();
        let outcome = match self.away(&target) {
            Some(why) => Err(why),
            None => self.sweep(&target, connector.as_ref()).await,
        };
        let pause = match outcome {
            Ok(()) => {
                unswept.lock().remove(&target);
                every
            }
            Err(error) => {
                if unswept.lock().insert(target.clone()) {
                    tracing::warn!(%target, %error, "a target can't be swept now");
                }
                self.look_out_for(&target, connector);
                every.min(SWEEP_AGAIN)
            }
        };
        let until = async {
            tokio::select! {
                biased;
                () = soon => {}
                () = self.clock.clock().sleep(pause) => {}
            }
        };
        self.or_stop(until).await;
        target
    }
}
