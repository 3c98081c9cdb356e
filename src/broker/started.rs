//! How a run starts: what the last one left is settled before anybody is served.

use std::collections::BTreeMap;

use crate::core::decide::Command;
use crate::core::digest::Digest;
use crate::core::event::{BrokerEvent, EndCause};
use crate::core::grant::GrantState;
use crate::core::lease::LeaseState;

use super::run_clock::Start;
use super::{Broker, BrokerError};

impl Broker {
    /// Records that a run started and with which configuration, and says of every lease that the last run left
    /// half-way that it is in doubt. One dead target delays nothing here: only the journal is written.
    pub async fn start_up(&self, start: Start, hashes: BTreeMap<String, Digest>) -> Result<(), BrokerError> {
        let clock = self.clock.clock();
        self.note(BrokerEvent::RunStarted {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: clock.boot_id(),
            boot_ms: clock.boot_ms(),
            wall: clock.wall(),
            starts_at: start.at,
            clock_set_back: start.clock_set_back,
        })
        .await?;
        self.note(BrokerEvent::ConfigurationLoaded { hashes }).await?;
        let rules = self.rules();
        let now = self.now();
        for grant in self.store.open_grants().await? {
            for lease in grant.leases.values() {
                let id = lease.intent.lease;
                match &lease.state {
                    LeaseState::Intended => {
                        let not_before = rules
                            .behind(&lease.intent.permission.resource)
                            .map_or(now, |(_, connector)| self.not_before(connector.as_ref()));
                        let why = "the broker stopped while it was being minted".to_owned();
                        let command = Command::Unknown { lease: id, why, handle: None, not_before };
                        self.command(grant.id, &command, true).await?;
                    }
                    LeaseState::Live { released_at: None, .. } => {
                        let why = "the broker stopped before it was handed over".to_owned();
                        self.command(grant.id, &Command::RevokeLease { lease: id, why }, true).await?;
                    }
                    _ => {}
                }
            }
            if matches!(grant.state, GrantState::Active { .. }) {
                if start.clock_set_back {
                    self.end(grant.id, EndCause::ClockSetBack).await?;
                } else if grant.request.heartbeat_secs.is_some() {
                    self.heartbeats.watch(grant.id, now);
                }
            } else if grant.request.heartbeat_secs.is_some() {
                self.heartbeats.watch(grant.id, now);
            }
        }
        Ok(())
    }

    /// Records that the run ended in good order.
    pub async fn run_ended(&self) {
        if let Err(error) = self.note(BrokerEvent::RunEnded).await {
            tracing::warn!(%error, "the end of the run could not be recorded");
        }
    }
}
