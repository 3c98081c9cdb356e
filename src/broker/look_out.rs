//! A target that was down and is back: what is due there is ended at once, not when its pause is over.
//!
//! The pauses between attempts grow to a minute, so that a target that refuses isn't hammered. To look out for one
//! that is down costs a connection attempt a second, and its return is when endings are wanted most (regression L4).

use std::sync::Arc;
use std::time::Duration;

use crate::connector::Connector;
use crate::core::id::{GrantId, ResourceName};
use crate::core::lease::{Lease, LeaseState};

use super::lanes::Occasion;
use super::{Broker, BrokerError};

/// How often a target that is down is looked at.
const LOOK_OUT: Duration = Duration::from_secs(1);

impl Broker {
    /// Something didn't work at a target. If it is down, its return is awaited; if it answers, nothing more is done:
    /// what it refused is tried again after a pause.
    pub(super) fn look_out_for(self: &Arc<Self>, target: &ResourceName, connector: Arc<dyn Connector>) {
        if self.stopping() || !self.driver.looked_out_for.lock().insert(target.clone()) {
            return;
        }
        let (broker, target) = (Arc::clone(self), target.clone());
        self.driver.tracker.spawn(async move {
            let mut was_down = false;
            while !broker.stopping() && connector.sweep().await.is_err() {
                was_down = true;
                broker.or_stop(broker.clock.clock().sleep(LOOK_OUT)).await;
            }
            broker.driver.looked_out_for.lock().remove(&target);
            if was_down && !broker.stopping() {
                tracing::info!(%target, "the target is back; what is due there is ended now");
                match broker.paused_at(&target).await {
                    Ok(leases) => broker.end_at(&target, &connector, leases, Occasion::TargetIsBack),
                    Err(error) => tracing::error!(%target, %error, "can't read what is due at a target"),
                }
            }
        });
    }

    /// Leases at a target that are to be ended and wait out a pause.
    async fn paused_at(&self, target: &ResourceName) -> Result<Vec<(GrantId, Lease)>, BrokerError> {
        let now = self.now();
        let mut out = Vec::new();
        for grant in self.store.open_grants().await? {
            for lease in grant.open_leases() {
                let paused = match &lease.state {
                    LeaseState::Revoking { progress, .. } => progress.next_try.is_some_and(|at| now < at),
                    // While its mint may still be under way, nothing can be concluded.
                    LeaseState::Unknown { not_before, progress, .. } => {
                        *not_before <= now && progress.next_try.is_some_and(|at| now < at)
                    }
                    _ => false,
                };
                if paused && lease.intent.target == *target {
                    out.push((grant.id, lease.clone()));
                }
            }
        }
        Ok(out)
    }
}
