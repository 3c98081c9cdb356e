//! Finds at the targets what no lease explains, and ends it. Also how a run starts.

use std::collections::{BTreeSet, HashMap};

use crate::connector::{Connector, Found};
use crate::core::event::{BrokerEvent, Event};
use crate::core::id::ResourceName;
use crate::failpoint::{self, Point};
use crate::mutation::Mutation;
use crate::store::{BATCH_EVENTS_MAX, Batch};

use super::{Broker, BrokerError};

/// Events in one write.
const TOLD_AT_ONCE: usize = BATCH_EVENTS_MAX / 8;

/// What no lease explains: name at the target → since when (boot clock), and whether the record says so already.
pub(super) type Strange = HashMap<String, (u64, bool)>;

impl Broker {
    /// Sweeps one target once. `Err` says what is to be tried again soon.
    pub(super) async fn sweep(&self, target: &ResourceName, connector: &dyn Connector) -> Result<(), String> {
        if Mutation::NoSweep.is_on() {
            return Ok(());
        }
        // What can't be told now is told later: endings don't wait for it (guarantee 8).
        let mut again = self.tell_all().await.err();
        let first: BTreeSet<String> = self.unexplained(connector).await?.into_iter().map(|f| f.name).collect();
        failpoint::at(Point::SweepListed);
        // A lease that ended while the list was made looks strange too: look again before saying so.
        let mut strange = if first.is_empty() { Vec::new() } else { self.unexplained(connector).await? };
        strange.retain(|found| first.contains(&found.name));
        self.remember(target, &strange);
        for found in strange {
            // The ones before may have taken long, and what has a lease by now is somebody's (guarantee 13).
            if self.is_explained(connector, &found).await? {
                continue;
            }
            failpoint::at(Point::SweepFound);
            match connector.revoke_found(&found, self.clock.passed()).await {
                Ok(gone) => {
                    failpoint::at(Point::SweepEnded);
                    tracing::warn!(%target, name = %found.name, "no lease explained this at a target; it is ended");
                    let name = found.name.clone();
                    let gone = BrokerEvent::OrphanGone { target: target.clone(), name, evidence: gone.evidence };
                    again = self.tell(target, &found.name, Some(gone)).await.err().or(again);
                    failpoint::at(Point::SweepTold);
                }
                Err(error) => {
                    // So young that its mint may be on its way into the record, mostly. After the longest mint, it is told.
                    if self.strange_for_ms(target, &found.name) > connector.mint_deadline().as_millis() {
                        tracing::warn!(%target, name = %found.name, %error, "no lease explains this at a target, and it can't be ended yet");
                        // It stays among what is to be told.
                        let _ = self.tell(target, &found.name, None).await;
                    }
                    again = Some(error.to_string());
                }
            }
        }
        again.map_or(Ok(()), Err)
    }

    /// What is there and has no lease.
    async fn unexplained(&self, connector: &dyn Connector) -> Result<Vec<Found>, String> {
        let mut out = Vec::new();
        let found = connector.sweep().await.map_err(|e| e.0)?;
        // Read after the list: a mint that was recorded meanwhile is in it.
        let known =
            if found.is_empty() { BTreeSet::new() } else { self.explained(connector, None).await.map_err(text)? };
        for found in found {
            if !self.is_among(&known, connector, &found).await? {
                out.push(found);
            }
        }
        Ok(out)
    }

    /// Does a lease explain this, as things stand now?
    async fn is_explained(&self, connector: &dyn Connector, found: &Found) -> Result<bool, String> {
        let known = self.explained(connector, None).await.map_err(text)?;
        self.is_among(&known, connector, found).await
    }

    async fn is_among(
        &self,
        known: &BTreeSet<String>,
        connector: &dyn Connector,
        found: &Found,
    ) -> Result<bool, String> {
        if Mutation::SweepEverything.is_on() {
            return Ok(false);
        }
        Ok(known.contains(&found.name)
            || connector.keys(&found.handle).iter().any(|k| known.contains(k))
            || self.store.lease_named(&found.name).await.map_err(|e| e.to_string())?.is_some())
    }

    fn remember(&self, target: &ResourceName, strange: &[Found]) {
        let now = self.clock.clock().boot_ms();
        let mut all = self.driver.strange.lock();
        let known = all.entry(target.clone()).or_default();
        known.retain(|name, _| strange.iter().any(|f| f.name == *name));
        for found in strange {
            known.entry(found.name.clone()).or_insert((now, false));
        }
    }

    fn strange_for_ms(&self, target: &ResourceName, name: &str) -> u128 {
        let all = self.driver.strange.lock();
        let since = all.get(target).and_then(|known| known.get(name)).map(|(since, _)| *since);
        since.map_or(0, |since| u128::from(self.clock.clock().boot_ms().saturating_sub(since)))
    }

    /// Records that it was found, once a run, and what became of it. Endings don't wait for this record (guarantee 8).
    pub(super) async fn tell(
        &self,
        target: &ResourceName,
        name: &str,
        gone: Option<BrokerEvent>,
    ) -> Result<(), String> {
        let told = {
            let mut all = self.driver.strange.lock();
            let entry = all.get_mut(target).and_then(|known| known.get_mut(name));
            entry.is_some_and(|(_, told)| std::mem::replace(told, true))
        };
        let found = (!told).then(|| BrokerEvent::OrphanFound { target: target.clone(), name: name.to_owned() });
        self.driver.untold.lock().extend(found.into_iter().chain(gone));
        self.tell_all().await
    }

    /// Records what could not be recorded when it happened.
    async fn tell_all(&self) -> Result<(), String> {
        let untold = std::mem::take(&mut *self.driver.untold.lock());
        for (done, chunk) in untold.chunks(TOLD_AT_ONCE).enumerate() {
            let events = chunk.iter().map(|what| Event::Broker { what: what.clone() }).collect();
            let batch = Batch { expect: Vec::new(), events, at: self.now(), urgent: false };
            if let Err(error) = self.store.append(batch).await {
                self.driver.untold.lock().extend_from_slice(&untold[done * TOLD_AT_ONCE..]);
                return Err(error.to_string());
            }
        }
        Ok(())
    }
}

fn text(error: BrokerError) -> String {
    error.to_string()
}
