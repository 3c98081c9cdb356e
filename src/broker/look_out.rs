//! Targets that are away: looked at once a second, so that their leases needn't be, and ended there as soon as they
//! serve again.
//!
//! While a target is away, no lease is tried there: the pauses of a thousand leases would cost it and the record more
//! than it can say, and the first of them could come a minute late. One cheap probe a second finds its return, which is
//! when endings are wanted most (regression L4).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;

use crate::connector::{Away, Connector, Extent};
use crate::core::id::ResourceName;
use crate::core::lease::LeaseState;

use super::lanes::Occasion;
use super::turns::ToEnd;
use super::{Broker, BrokerError};

/// How often a target that is away is looked at.
const LOOK_OUT: Duration = Duration::from_secs(1);
/// Probes that are out at once: one that gets no answer must not keep the next from finding that there is one now.
const PROBES_MAX: usize = 16;

/// What is known of one target.
#[derive(Debug, Default)]
pub(super) struct Watched {
    /// Somebody looks out for it.
    looked_out_for: bool,
    /// What the last probe that failed said, until it serves again.
    away: Option<Away>,
    /// Probes of this run.
    probes: u64,
    /// When the last one succeeded (boot clock, in milliseconds).
    served_ms: Option<u64>,
}

/// How a target stands, for `/metrics`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TargetFigures {
    /// True while it, or something behind it, is away.
    pub is_away: bool,
    /// Probes of this run.
    pub probes: u64,
}

/// What is known of targets that something didn't work at.
pub(super) type Watch = BTreeMap<ResourceName, Watched>;

impl Broker {
    /// Something didn't work at a target. If it is away, its return is awaited; if it serves, nothing more is done:
    /// what it refused is tried again after a pause.
    pub(super) fn look_out_for(self: &Arc<Self>, target: &ResourceName, connector: Arc<dyn Connector>) {
        if self.stopping() {
            return;
        }
        {
            let mut watch = self.driver.watch.lock();
            let watched = watch.entry(target.clone()).or_default();
            if std::mem::replace(&mut watched.looked_out_for, true) {
                return;
            }
        }
        let (broker, target) = (Arc::clone(self), target.clone());
        self.spawn(async move {
            if !broker.until_it_serves(&target, connector.as_ref()).await {
                return;
            }
            let was_away = {
                let mut watch = broker.driver.watch.lock();
                let watched = watch.entry(target.clone()).or_default();
                watched.looked_out_for = false;
                watched.served_ms = Some(broker.clock.clock().boot_ms());
                watched.away.take().is_some()
            };
            if was_away {
                tracing::info!(%target, "the target is back; what is due there is ended now");
                match broker.waiting_at(&target).await {
                    Ok(leases) => broker.end_at(&target, &connector, leases, Occasion::TargetIsBack),
                    Err(error) => tracing::error!(%target, %error, "can't read what is due at a target"),
                }
                // And whatever else it came back with: what was attested away, for one.
                broker.driver.sweep_soon.notify_waiters();
            }
        });
    }

    /// Why no lease is tried at this target now, if it is away.
    pub(super) fn away(&self, target: &ResourceName) -> Option<String> {
        let watch = self.driver.watch.lock();
        let away = watch.get(target).and_then(|w| w.away.as_ref())?;
        // What isn't behind it can be ended all the same.
        (away.extent != Extent::Behind).then(|| away.why.clone())
    }

    /// How each target stands.
    pub fn target_figures(&self) -> BTreeMap<ResourceName, TargetFigures> {
        let watch = self.driver.watch.lock();
        let figures = |target: &ResourceName| {
            let figures = |w: &Watched| TargetFigures { is_away: w.away.is_some(), probes: w.probes };
            watch.get(target).map(figures).unwrap_or_default()
        };
        self.rules().connectors.keys().map(|target| (target.clone(), figures(target))).collect()
    }

    /// Looks once a second. False if the broker stops before it serves.
    async fn until_it_serves(&self, target: &ResourceName, connector: &dyn Connector) -> bool {
        // However many leases resist there: one probe a second says that it isn't the target.
        let clock = self.clock.clock();
        let served = self.driver.watch.lock().get(target).and_then(|w| w.served_ms);
        if let Some(since) = served.map(|ms| Duration::from_millis(clock.boot_ms().saturating_sub(ms))) {
            self.or_stop(clock.sleep(LOOK_OUT.saturating_sub(since))).await;
        }
        let mut probes = FuturesUnordered::new();
        while !self.stopping() {
            if probes.len() < PROBES_MAX {
                probes.push(connector.probe());
                self.driver.watch.lock().entry(target.clone()).or_default().probes += 1;
            }
            let mut serves = false;
            {
                let answers = async {
                    while let Some(answer) = probes.next().await {
                        match answer {
                            Ok(()) => {
                                serves = true;
                                return;
                            }
                            Err(away) => self.note_away(target, away),
                        }
                    }
                    // Nothing is out: until the next one is.
                    std::future::pending::<()>().await;
                };
                let either = async {
                    tokio::select! {
                        biased;
                        () = answers => {}
                        () = clock.sleep(LOOK_OUT) => {}
                    }
                };
                self.or_stop(either).await;
            }
            if serves {
                return true;
            }
        }
        false
    }

    fn note_away(&self, target: &ResourceName, away: Away) {
        let mut watch = self.driver.watch.lock();
        let watched = watch.entry(target.clone()).or_default();
        if watched.away.is_none() {
            tracing::warn!(%target, why = %away, "the target is away; it is looked at every second");
        }
        watched.away = Some(away);
    }

    /// Leases at a target that are to be ended now, those that wait out a pause too.
    async fn waiting_at(&self, target: &ResourceName) -> Result<Vec<ToEnd>, BrokerError> {
        let now = self.now();
        let mut out = Vec::new();
        for grant in self.store.open_grants().await? {
            for lease in grant.open_leases() {
                let waits = match &lease.state {
                    LeaseState::Revoking { .. } => true,
                    // While its mint may still be under way, nothing can be concluded.
                    LeaseState::Unknown { not_before, .. } => *not_before <= now,
                    _ => false,
                };
                if waits && lease.intent.target == *target {
                    let urgency = grant.urgency();
                    out.push(ToEnd { grant: Arc::clone(&grant), lease: lease.intent.lease, urgency });
                }
            }
        }
        Ok(out)
    }
}
