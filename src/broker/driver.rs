//! Does what is due: deadlines, endings, leases in doubt, missed heartbeats, sweeps.
//!
//! Reads only what is durable, and gives up on nothing: what fails is due again after a capped back-off. Each target
//! has its own permits, so one that hangs delays no other.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};
use tokio_util::task::TaskTracker;

use crate::connector::{Connector, Gone, RevokeError};
use crate::core::decide::Command;
use crate::core::grant::GrantState;
use crate::core::id::{GrantId, LeaseId, ResourceName, Timestamp};
use crate::core::lease::{Lease, LeaseState};
use crate::store::Job;

use super::{Broker, BrokerError};

/// Jobs taken at once.
const CLAIM_MAX: usize = 256;
/// A job that was taken and not settled is taken again after this.
const CLAIM_FOR: Duration = Duration::from_secs(120);
/// The driver looks around at least this often.
const LOOK_AROUND: Duration = Duration::from_millis(500);
/// First pause after a failed ending.
pub const RETRY_FIRST_MS: u64 = 250;
/// Longest pause after failed endings.
pub const RETRY_MS_MAX: u64 = 60_000;
/// Groups of endings at one target at once.
const GROUPS_PER_TARGET: usize = 4;
/// Endings in one group.
const GROUP_MAX: usize = 64;

/// What the driver keeps between rounds.
pub struct DriverState {
    permits: Mutex<HashMap<ResourceName, Arc<Semaphore>>>,
    pub(super) tracker: TaskTracker,
    /// Ended at the target while the journal could not be written: not asked of the target again and again.
    unrecorded: Mutex<HashMap<LeaseId, Gone>>,
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
            tracker: TaskTracker::new(),
            unrecorded: Mutex::default(),
            looked_out_for: Mutex::default(),
            strange: Mutex::default(),
            untold: Mutex::default(),
            stop: watch::channel(false).0,
        }
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

    /// Stops taking new work and waits for what is under way, at most so long. The rest is due at the next start.
    pub async fn stop(&self, wait: Duration) {
        self.driver.stop.send_replace(true);
        self.driver.tracker.close();
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
                            if matches!(error, BrokerError::Unavailable(_)) {
                                broker.end_unrecorded(id).await;
                            }
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
                    match rules.catalogue.resource(&lease.intent.permission.resource) {
                        Some(resource) => by_target.entry(resource.target.clone()).or_default().push((id, lease)),
                        None => self.no_connector(id, &lease).await,
                    }
                }
            }
        }
        for (target, leases) in by_target {
            match rules.connectors.get(&target) {
                Some(connector) => self.end_at(&target, connector, &leases),
                None => {
                    for (id, lease) in &leases {
                        self.no_connector(*id, lease).await;
                    }
                }
            }
        }
    }

    /// Ends leases at one target, in tasks of their own.
    pub(super) fn end_at(
        self: &Arc<Self>,
        target: &ResourceName,
        connector: &Arc<dyn Connector>,
        leases: &[(GrantId, Lease)],
    ) {
        let permits = {
            let mut permits = self.driver.permits.lock();
            let fresh = || Arc::new(Semaphore::new(GROUPS_PER_TARGET));
            Arc::clone(permits.entry(target.clone()).or_insert_with(fresh))
        };
        for group in leases.chunks(GROUP_MAX) {
            let (broker, connector, permits) = (Arc::clone(self), Arc::clone(connector), Arc::clone(&permits));
            let (target, group) = (target.clone(), group.to_vec());
            self.driver.tracker.spawn(async move {
                let Ok(_permit) = permits.acquire_owned().await else { return };
                if !broker.end_leases(connector.as_ref(), group).await {
                    broker.look_out_for(&target, connector);
                }
            });
        }
    }

    /// A lease whose resource left the catalogue stays to be ended, visibly (regression L3).
    async fn no_connector(&self, id: GrantId, lease: &Lease) {
        let why = format!(
            "{} is no longer in the catalogue: put it (or its target) back until this lease is ended",
            lease.intent.permission.resource
        );
        self.again(id, lease, why).await;
    }

    /// False if some have to be tried again.
    async fn end_leases(&self, connector: &dyn Connector, group: Vec<(GrantId, Lease)>) -> bool {
        let mut well = true;
        let mut todo = Vec::with_capacity(group.len());
        for (id, lease) in group {
            let known = self.driver.unrecorded.lock().get(&lease.intent.lease).cloned();
            match known {
                Some(gone) => self.proven(id, &lease, gone).await,
                None => todo.push((id, lease)),
            }
        }
        let (doubtful, todo): (Vec<_>, Vec<_>) =
            todo.into_iter().partition(|(_, l)| matches!(l.state, LeaseState::Unknown { .. }));
        for (id, lease) in doubtful {
            let outcome = match self.explained(connector, Some(lease.intent.lease)).await {
                Ok(known) => connector.revoke_unknown(&lease, &known, self.clock.wall()).await,
                Err(error) => Err(RevokeError::Retry { why: error.to_string() }),
            };
            well &= self.settle(id, &lease, outcome).await;
        }
        let leases: Vec<Lease> = todo.iter().map(|(_, l)| l.clone()).collect();
        if leases.is_empty() {
            return well;
        }
        let outcomes = connector.revoke_all(&leases, self.clock.wall()).await;
        let settled = todo.iter().zip(outcomes).map(|((id, lease), outcome)| self.settle(*id, lease, outcome));
        futures::future::join_all(settled).await.into_iter().fold(well, |well, one| well & one)
    }

    /// False if it has to be tried again.
    async fn settle(&self, id: GrantId, lease: &Lease, outcome: Result<Gone, RevokeError>) -> bool {
        match outcome {
            Ok(gone) => self.proven(id, lease, gone).await,
            Err(RevokeError::Retry { why }) => {
                self.again(id, lease, why).await;
                return false;
            }
            Err(RevokeError::EndsAt { at }) => {
                let wait = at.ms_since(self.clock.wall()).saturating_add(50);
                let why = "this target can't end it early; it ends by its own expiry".to_owned();
                self.retry_at(id, lease, why, self.now().plus_ms(wait)).await;
            }
        }
        true
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

    async fn proven(&self, id: GrantId, lease: &Lease, gone: Gone) {
        let command = Command::Gone {
            lease: lease.intent.lease,
            evidence: gone.evidence.clone(),
            seen: gone.seen.clone(),
            access_cut_ms: gone.access_cut.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
        };
        match self.command(id, &command, true).await {
            Ok(_) => {
                self.driver.unrecorded.lock().remove(&lease.intent.lease);
            }
            Err(error) => {
                tracing::warn!(lease = %lease.intent.lease, %error, "a proof could not be recorded yet");
                self.driver.unrecorded.lock().insert(lease.intent.lease, gone);
                self.clock.clock().sleep(Duration::from_millis(RETRY_FIRST_MS)).await;
                self.store.release(Job::Lease(id, lease.intent.lease)).await;
            }
        }
    }

    async fn again(&self, id: GrantId, lease: &Lease, why: String) {
        let attempts = match &lease.state {
            LeaseState::Revoking { progress, .. } | LeaseState::Unknown { progress, .. } => progress.attempts,
            _ => 0,
        };
        let pause = backoff_ms(attempts, self.random.as_ref());
        self.retry_at(id, lease, why, self.now().plus_ms(pause)).await;
    }

    async fn retry_at(&self, id: GrantId, lease: &Lease, why: String, next_try: Timestamp) {
        tracing::warn!(lease = %lease.intent.lease, %why, "an ending is not proven yet; it will be tried again");
        let command = Command::Retry { lease: lease.intent.lease, why, next_try };
        if let Err(error) = self.command(id, &command, true).await {
            tracing::warn!(lease = %lease.intent.lease, %error, "a failed ending could not be recorded yet");
            self.clock.clock().sleep(Duration::from_millis(RETRY_FIRST_MS)).await;
            self.store.release(Job::Lease(id, lease.intent.lease)).await;
        }
    }

    /// Guarantee 8: when even the reserved space is gone, durable leases whose time is up are ended all the same,
    /// verified, and recorded afterwards.
    async fn end_unrecorded(&self, id: GrantId) {
        let Ok(Some(grant)) = self.store.grant(id).await else { return };
        if !matches!(grant.state, GrantState::Active { .. }) {
            return;
        }
        let rules = self.rules();
        for lease in grant.open_leases() {
            let done = self.driver.unrecorded.lock().contains_key(&lease.intent.lease);
            if done || !matches!(lease.state, LeaseState::Live { .. }) {
                continue;
            }
            if let Some((_, connector)) = rules.behind(&lease.intent.permission.resource)
                && let Ok(gone) = connector.revoke(lease, self.clock.wall()).await
            {
                self.driver.unrecorded.lock().insert(lease.intent.lease, gone);
            }
        }
        self.clock.clock().sleep(Duration::from_millis(RETRY_FIRST_MS)).await;
    }

    async fn watch_loop(self: &Arc<Self>) {
        let mut rounds = 0u64;
        while !self.stopping() {
            self.or_stop(self.clock.clock().sleep(Duration::from_secs(1))).await;
            self.check_heartbeats().await;
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

/// Doubles from [`RETRY_FIRST_MS`] to [`RETRY_MS_MAX`], with up to a quarter taken off at random.
fn backoff_ms(attempts: u32, random: &dyn crate::keys::random::Random) -> u64 {
    let full = RETRY_FIRST_MS.saturating_mul(1 << attempts.min(16)).min(RETRY_MS_MAX);
    let [byte] = crate::keys::random::random_bytes::<1>(random);
    full - full / 4 * u64::from(byte) / 255
}
