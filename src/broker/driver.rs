//! Does what is due: deadlines, endings, leases in doubt, missed heartbeats, sweeps.
//!
//! Reads only what is durable, and gives up on nothing: what fails is due again after a capped back-off. How endings
//! go on at a target is in `lanes.rs`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};
use tokio_util::task::TaskTracker;

use crate::connector::Gone;
use crate::core::id::{GrantId, LeaseId, ResourceName};
use crate::core::lease::Lease;
use crate::store::Job;

use super::Broker;
use super::lanes::{Lane, Occasion, RETRY_FIRST_MS, UnderWay};

/// Jobs taken at once.
const CLAIM_MAX: usize = 256;
/// A job that was taken and not settled is taken again after this.
const CLAIM_FOR: Duration = Duration::from_secs(120);
/// The driver looks around at least this often.
const LOOK_AROUND: Duration = Duration::from_millis(500);
/// What the driver keeps between rounds.
pub struct DriverState {
    pub(super) permits: Mutex<HashMap<Lane, Arc<Semaphore>>>,
    pub(super) under_way: UnderWay,
    pub(super) tracker: TaskTracker,
    /// Mints, which run to their end whoever goes away.
    pub(super) mints: TaskTracker,
    /// Ended at the target while the journal could not be written: not asked of the target again and again.
    pub(super) unrecorded: Mutex<HashMap<LeaseId, Gone>>,
    /// Attempts that failed, and that the journal didn't take.
    pub(super) unrecorded_tries: Mutex<HashMap<LeaseId, u32>>,
    /// Targets that are looked out for, because they are down or may be.
    pub(super) looked_out_for: Mutex<HashSet<ResourceName>>,
    /// What sweeps found that no lease explains.
    pub(super) strange: Mutex<HashMap<ResourceName, super::sweep::Strange>>,
    /// Events of sweeps that happened while the journal could not be written.
    pub(super) untold: Mutex<Vec<crate::core::event::BrokerEvent>>,
    stop: watch::Sender<bool>,
}

impl Default for DriverState {
    fn default() -> Self {
        Self {
            permits: Mutex::default(),
            under_way: UnderWay::default(),
            tracker: TaskTracker::new(),
            mints: TaskTracker::new(),
            unrecorded: Mutex::default(),
            unrecorded_tries: Mutex::default(),
            looked_out_for: Mutex::default(),
            strange: Mutex::default(),
            untold: Mutex::default(),
            stop: watch::channel(false).0,
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
        self.driver.tracker.spawn(async move { due.work_loop().await });
        let watchful = Arc::clone(self);
        self.driver.tracker.spawn(async move { watchful.watch_loop().await });
        let sweeper = Arc::clone(self);
        self.driver.tracker.spawn(async move { sweeper.sweep_loop().await });
    }

    /// Stops taking new work and waits for what is under way: for mints as long as the slowest target may take, then
    /// for endings, at most so long. The rest is due at the next start.
    pub async fn stop(&self, wait: Duration) {
        self.driver.stop.send_replace(true);
        self.driver.mints.close();
        self.driver.tracker.close();
        let longest = self.rules().connectors.values().map(|c| c.mint_deadline()).max().unwrap_or_default();
        if tokio::time::timeout(longest, self.driver.mints.wait()).await.is_err() {
            tracing::warn!("a mint is still under way; the next start looks for what it made");
        }
        if tokio::time::timeout(wait, self.driver.tracker.wait()).await.is_err() {
            tracing::warn!("some endings are still under way; the next start goes on with them");
        }
    }

    pub(super) fn stopping(&self) -> bool {
        *self.driver.stop.borrow()
    }

    pub(super) async fn or_stop(&self, until: impl Future<Output = ()>) {
        let mut stop = self.driver.stop.subscribe();
        tokio::select! {
            () = until => {}
            _ = stop.wait_for(|s| *s) => {}
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
        let rules = self.rules();
        let mut by_target: BTreeMap<ResourceName, Vec<(GrantId, Lease)>> = BTreeMap::new();
        for job in jobs {
            match job {
                Job::Deadline(id) => {
                    let broker = Arc::clone(self);
                    self.driver.tracker.spawn(async move {
                        if let Err(error) = broker.tick(id).await {
                            tracing::warn!(grant = %id, %error, "a deadline could not be recorded yet");
                            broker.clock.clock().sleep(Duration::from_millis(RETRY_FIRST_MS)).await;
                        }
                        broker.store.release(job).await;
                    });
                }
                Job::Lease(id, lease) => {
                    let lease = match self.store.grant(id).await {
                        Ok(Some(grant)) => grant.leases.get(&lease).cloned(),
                        Ok(None) => None,
                        Err(error) => {
                            tracing::error!(grant = %id, %error, "can't read a grant whose lease is to be ended");
                            None
                        }
                    };
                    let Some(lease) = lease else {
                        self.store.release(job).await;
                        continue;
                    };
                    by_target.entry(lease.intent.target.clone()).or_default().push((id, lease));
                }
            }
        }
        for (target, leases) in by_target {
            match rules.connectors.get(&target) {
                Some(connector) => self.end_at(&target, connector, leases, Occasion::Due),
                None => {
                    for (id, lease) in leases {
                        let broker = Arc::clone(self);
                        self.driver.tracker.spawn(async move { broker.no_connector(id, &lease).await });
                    }
                }
            }
        }
    }

    async fn watch_loop(self: &Arc<Self>) {
        let mut rounds = 0u64;
        while !self.stopping() {
            self.or_stop(self.clock.clock().sleep(Duration::from_secs(1))).await;
            self.check_heartbeats().await;
            self.enforce_freezes().await;
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
        let mut unswept: HashSet<ResourceName> = HashSet::new();
        loop {
            let rules = self.rules();
            for (target, connector) in &rules.connectors {
                if self.stopping() {
                    return;
                }
                match self.sweep(target, connector.as_ref()).await {
                    Ok(()) => {
                        unswept.remove(target);
                    }
                    Err(error) => {
                        if unswept.insert(target.clone()) {
                            tracing::warn!(%target, %error, "a target can't be swept now");
                        }
                        self.look_out_for(target, Arc::clone(connector));
                    }
                }
            }
            let pause = if unswept.is_empty() { every } else { every.min(Duration::from_secs(5)) };
            self.or_stop(self.clock.clock().sleep(pause)).await;
            if self.stopping() {
                return;
            }
        }
    }
}
