//! How a run starts: what the last one left is settled before anybody is served.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::core::decide::Command;
use crate::core::digest::Digest;
use crate::core::event::{BrokerEvent, EndCause, Event};
use crate::core::grant::{Grant, GrantState};
use crate::core::id::{GrantId, Timestamp};
use crate::core::lease::{LeaseIntent, LeaseState};
use crate::failpoint::{self, Point};
use crate::mutation::Mutation;
use crate::store::Batch;

use super::endings::What;
use super::run_clock::Start;
use super::{Broker, BrokerError, Rules};

/// A start that could not be recorded is tried again after this.
const START_AGAIN: Duration = Duration::from_millis(500);

/// How far this run has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run {
    /// Its beginning is not on record.
    Unrecorded,
    /// Its beginning is; what the last run left isn't settled.
    Recorded,
    /// Requests may be taken.
    Started,
}

impl Broker {
    /// Records that a run started and with which configuration, and says of every lease that the last run left
    /// half-way that it is in doubt. One dead target delays nothing here: only the journal is written. After an error
    /// it can be called again: what is done isn't done twice.
    pub async fn start_up(&self, start: Start, hashes: &BTreeMap<String, Digest>) -> Result<(), BrokerError> {
        if *self.run.lock() == Run::Unrecorded {
            if let Err(error) = self.record_start(start, start.clock_set_back, hashes).await {
                if start.clock_set_back {
                    // Endings don't wait for the record (guarantee 8).
                    let open = self.store.open_grants().await?;
                    let active = |g: &&Arc<Grant>| matches!(g.state, GrantState::Active { .. });
                    let ids: Vec<_> = open.iter().filter(active).map(|g| g.id).collect();
                    self.end_later(What::Grants(&ids), &|_| EndCause::ClockSetBack).await?;
                }
                return Err(error);
            }
            failpoint::at(Point::StartRecorded);
            *self.run.lock() = Run::Recorded;
        }
        let rules = self.rules();
        let mut outcome = Ok(());
        self.settle_abandoned("the broker stopped while it was being minted").await?;
        for grant in self.store.open_grants().await? {
            match self.settle_left(&rules, &grant, start).await {
                // The others are settled all the same.
                Err(error @ (BrokerError::Unavailable(_) | BrokerError::Unrecorded(_))) => outcome = Err(error),
                other => other?,
            }
        }
        outcome?;
        self.enforce_freezes().await;
        if start.clock_set_back {
            // Said again, as settled: until this is on record, the next run does all of it once more (guarantee 10).
            self.record_start(start, false, hashes).await?;
        }
        failpoint::at(Point::StartSettled);
        *self.run.lock() = Run::Started;
        Ok(())
    }

    /// Goes on with a start that could not be recorded, in the background. Call after [`Broker::drive`]: endings go on
    /// meanwhile (guarantee 8), and nothing else does.
    pub fn start_later(self: &Arc<Self>, start: Start, hashes: BTreeMap<String, Digest>) {
        let broker = Arc::clone(self);
        self.spawn(async move {
            while !broker.stopping() {
                broker.or_stop(broker.clock.clock().sleep(START_AGAIN)).await;
                match broker.start_up(start, &hashes).await {
                    Ok(()) => return tracing::info!("the start is on record; requests are taken"),
                    Err(error) => tracing::error!(%error, "the start could not be recorded yet; no request is taken"),
                }
            }
        });
    }

    /// True once requests may be taken.
    pub fn has_started(&self) -> bool {
        *self.run.lock() == Run::Started
    }

    /// What the last run left must be settled before anything new is given.
    pub(super) fn require_started(&self) -> Result<(), BrokerError> {
        if self.has_started() {
            Ok(())
        } else {
            let why =
                "its own start is not on record yet; it tries again by itself, once there is disk space".to_owned();
            Err(BrokerError::Unavailable(why))
        }
    }

    /// Urgent: a full disk must not keep endings from going on after a restart (guarantee 8).
    async fn record_start(
        &self,
        start: Start,
        clock_set_back: bool,
        hashes: &BTreeMap<String, Digest>,
    ) -> Result<(), BrokerError> {
        let clock = self.clock.clock();
        let began = BrokerEvent::RunStarted {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: clock.boot_id(),
            boot_ms: clock.boot_ms(),
            wall: clock.wall(),
            starts_at: start.at,
            clock_set_back,
        };
        let events = [began, BrokerEvent::ConfigurationLoaded { hashes: hashes.clone() }];
        let events = events.map(|what| Event::Broker { what }).to_vec();
        self.store.append(Batch { expect: Vec::new(), events, at: self.now(), urgent: true }).await?;
        Ok(())
    }

    /// Says of every lease whose mint nobody goes on with that it is in doubt: what an earlier run left, or another node
    /// that is gone. A mint belongs to the run that intended it; what another node is at is left to it.
    pub(super) async fn settle_abandoned(&self, why: &str) -> Result<(), BrokerError> {
        let abandoned = self.store.abandoned().await?;
        if abandoned.is_empty() || Mutation::ForgetIntended.is_on() {
            return Ok(());
        }
        // What became of them may be on record by now, from another node.
        self.store.refresh().await?;
        let (rules, mut outcome) = (self.rules(), Ok(()));
        for (id, lease) in abandoned {
            let Some(grant) = self.store.head(id).await? else { continue };
            let Some(lease) = grant.leases.get(&lease).filter(|l| matches!(l.state, LeaseState::Intended)) else {
                continue;
            };
            match self.in_doubt(&rules, id, &lease.intent, why).await {
                // Somebody else said so meanwhile.
                Ok(()) | Err(BrokerError::Refused(_)) => {}
                // The others are settled all the same.
                Err(error @ (BrokerError::Unavailable(_) | BrokerError::Unrecorded(_))) => outcome = Err(error),
                Err(error) => return Err(error),
            }
        }
        outcome
    }

    async fn settle_left(&self, rules: &Rules, grant: &Grant, start: Start) -> Result<(), BrokerError> {
        let now = self.now();
        for lease in grant.leases.values() {
            let id = lease.intent.lease;
            match &lease.state {
                // What an earlier run put off until a moment that its clock had wrong is due now (guarantee 10).
                LeaseState::Unknown { since, .. } if start.clock_set_back && now < *since => {
                    let why = "the clock was set back; it is looked for as if that was noticed now";
                    self.in_doubt(rules, grant.id, &lease.intent, why).await?;
                }
                // Its mint may be under way still, though the clock says that the time for that is over (guarantee 5).
                LeaseState::Unknown { not_before, .. }
                    if start.may_have_leapt && *not_before < self.not_under_way(rules, &lease.intent) =>
                {
                    let why = "the clock may have leapt while the broker was down; it is looked for as if that was noticed now";
                    self.in_doubt(rules, grant.id, &lease.intent, why).await?;
                }
                // That it was noticed by a right clock says nothing of the one by which it was tried last.
                LeaseState::Revoking { since, progress } | LeaseState::Unknown { since, progress, .. }
                    if start.clock_set_back && now < progress.next_try.unwrap_or(*since) =>
                {
                    let why = "the clock was set back; it is tried again at once".to_owned();
                    let command = Command::Retry { lease: id, why, next_try: now };
                    self.command(grant.id, &command, true).await?;
                }
                LeaseState::Live { released_at: None, .. } => {
                    let why = "the broker stopped before it was handed over".to_owned();
                    self.command(grant.id, &Command::RevokeLease { lease: id, why }, true).await?;
                }
                _ => {}
            }
        }
        let latest = now.plus_secs(rules.config.broker.decide_within_secs);
        let must_end = match grant.state {
            GrantState::Active { .. } => true,
            // It would wait for a vote until a moment that nobody meant.
            GrantState::Pending { decide_by } => decide_by > latest,
            _ => false,
        };
        if start.clock_set_back && must_end {
            self.end(grant.id, EndCause::ClockSetBack).await?;
        }
        Ok(())
    }

    /// Says of a lease that its mint is in doubt, and looks for it once no mint can be under way any more.
    async fn in_doubt(&self, rules: &Rules, id: GrantId, intent: &LeaseIntent, why: &str) -> Result<(), BrokerError> {
        let not_before = self.not_under_way(rules, intent);
        let command = Command::Unknown { lease: intent.lease, why: why.to_owned(), handle: None, not_before };
        self.command(id, &command, true).await?;
        failpoint::at(Point::StartDoubted);
        Ok(())
    }

    /// After this moment, nothing of a mint that the last run began can be under way at its target.
    fn not_under_way(&self, rules: &Rules, intent: &LeaseIntent) -> Timestamp {
        let connector = rules.connectors.get(&intent.target);
        connector.map_or(self.now(), |c| self.not_before(c.as_ref()))
    }

    /// Records that the run ended in good order.
    pub async fn run_ended(&self) {
        if let Err(error) = self.note(BrokerEvent::RunEnded).await {
            tracing::warn!(%error, "the end of the run could not be recorded");
        }
    }
}
