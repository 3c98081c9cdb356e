//! The use cases and the drivers: request, vote, mint, end, sweep. The only room that joins policy, store and
//! connectors.
//!
//! Each use case is the same five steps: read, ask policy, `decide`, append, answer. Effects at targets are made
//! by `mint.rs` (after the intent is durable) and by `driver.rs` (from what is durable), never by a decision.

pub mod attest;
mod budget;
mod doubt;
pub mod driver;
pub mod end;
mod endings;
pub mod error;
pub mod heartbeat;
pub mod introspect;
mod lanes;
mod look_out;
pub mod mint;
pub mod rates;
pub mod request;
pub mod review;
pub mod rules;
pub mod run_clock;
pub mod sentence;
mod settle;
pub mod started;
pub mod sweep;
pub mod told;
mod turns;
pub mod vote;

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::core::decide::{Command, decide};
use crate::core::event::{Event, GrantEvent};
use crate::core::grant::Grant;
use crate::core::id::{AgentId, GrantId, PersonId, Timestamp};
use crate::keys::random::Random;
use crate::keys::{NameKey, NamePrefix};
use crate::store::{Appended, Batch, Expect, Store, StoreError};

pub use crate::connector::build;
pub use error::BrokerError;
pub use rules::Rules;
pub use run_clock::RunClock;

/// How often a decision is made anew when somebody else was first.
const CONFLICT_TRIES_MAX: usize = 16;
/// So long an answer waits for what it rests on, in milliseconds.
const DURABLE_WAIT_MS: u64 = 5_000;

/// Where the broker stands: `Dev` for `dev` and `tour`, which listen on loopback only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The real thing.
    Serve,
    /// A broker to try things with: a vote may come from the terminal.
    Dev,
}

/// The broker.
pub struct Broker {
    /// Where events become durable.
    pub store: Arc<dyn Store>,
    /// Configuration, catalogue, policies, connectors: replaced as a whole.
    rules: arc_swap::ArcSwap<Rules>,
    /// The broker's time.
    pub clock: RunClock,
    /// Ids.
    pub random: Arc<dyn Random>,
    /// Names at targets.
    names: Arc<NameKey>,
    prefix: NamePrefix,
    /// Serve or dev.
    pub mode: Mode,
    flights: mint::Flights,
    heartbeats: heartbeat::Heartbeats,
    unfinished: endings::Unfinished,
    run: Mutex<started::Run>,
    refusals: Mutex<budget::RefusalBudget<AgentId>>,
    refused_votes: Mutex<budget::RefusalBudget<PersonId>>,
    rates: Mutex<rates::Rates>,
    introspections: Mutex<rates::Rates>,
    driver: driver::DriverState,
}

/// What a broker is made of.
pub struct Parts {
    /// Where events become durable.
    pub store: Arc<dyn Store>,
    /// Configuration, catalogue, policies, connectors.
    pub rules: Rules,
    /// The broker's time.
    pub clock: RunClock,
    /// Ids.
    pub random: Arc<dyn Random>,
    /// Names at targets.
    pub names: Arc<NameKey>,
    /// What all names at targets begin with.
    pub prefix: NamePrefix,
    /// Serve or dev.
    pub mode: Mode,
}

impl Broker {
    /// Puts the parts together. No request is taken before [`Broker::start_up`] is through.
    pub fn new(parts: Parts) -> Arc<Self> {
        let heartbeats = heartbeat::Heartbeats::since(parts.clock.now());
        Arc::new(Self {
            store: parts.store,
            rules: arc_swap::ArcSwap::from_pointee(parts.rules),
            clock: parts.clock,
            random: parts.random,
            names: parts.names,
            prefix: parts.prefix,
            mode: parts.mode,
            flights: mint::Flights::default(),
            heartbeats,
            unfinished: endings::Unfinished::default(),
            run: Mutex::new(started::Run::Unrecorded),
            refusals: Mutex::default(),
            refused_votes: Mutex::default(),
            rates: Mutex::default(),
            introspections: Mutex::default(),
            driver: driver::DriverState::default(),
        })
    }

    /// The rules that hold now.
    pub fn rules(&self) -> Arc<Rules> {
        self.rules.load_full()
    }

    /// The broker's time.
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Decides one command on one grant and appends what follows, again if somebody else was first.
    /// If a deadline had passed, its events are recorded first and the command is decided on what they made.
    pub async fn command(&self, id: GrantId, command: &Command, urgent: bool) -> Result<Arc<Grant>, BrokerError> {
        for _ in 0..CONFLICT_TRIES_MAX {
            let grant = self.store.head(id).await?.ok_or(BrokerError::NotFound)?;
            let now = self.now();
            let overdue = crate::core::decide::is_overdue(&grant, now);
            let events = match decide(&grant, command, now) {
                Ok(events) if events.is_empty() => return self.once_durable(&grant).await,
                Ok(events) => events,
                Err(refusal) => return Err(self.once_durable(&grant).await.err().unwrap_or(refusal.into())),
            };
            match self.append(&grant, events, Vec::new(), now, urgent || overdue).await {
                Ok(_) if overdue => {}
                Ok(_) => return self.store.grant(id).await?.ok_or(BrokerError::NotFound),
                Err(StoreError::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(BrokerError::Unavailable("too much happened at once; try again".to_owned()))
    }

    /// What is decided on may be ahead of what is durable, and may come to nothing: before it is there, nobody is told of it
    /// (guarantee 8), and no "no" and no "done already" rests on it.
    async fn once_durable(&self, seen: &Grant) -> Result<Arc<Grant>, BrokerError> {
        let until = self.now().plus_ms(DURABLE_WAIT_MS);
        let mut grant = self.store.grant(seen.id).await?;
        loop {
            let version = grant.as_ref().map_or(0, |g| g.version);
            match grant {
                Some(grant) if version >= seen.version => return Ok(grant),
                _ => {}
            }
            let left = Duration::from_millis(until.ms_since(self.now()));
            if left.is_zero() {
                return Err(BrokerError::Unavailable("what this rests on is not recorded yet; try again".to_owned()));
            }
            grant = self.store.changed(seen.id, version, left).await?;
        }
    }

    /// Appends events of one grant.
    async fn append(
        &self,
        grant: &Grant,
        events: Vec<GrantEvent>,
        expect: Vec<Expect>,
        at: Timestamp,
        urgent: bool,
    ) -> Result<Appended, StoreError> {
        let events = numbered(grant.id, grant.version, events);
        self.store.append(Batch { expect, events, at, urgent }).await
    }

    /// Records something about the broker itself.
    pub(crate) async fn note(&self, what: crate::core::event::BrokerEvent) -> Result<(), StoreError> {
        let batch = Batch { expect: Vec::new(), events: vec![Event::Broker { what }], at: self.now(), urgent: false };
        self.store.append(batch).await.map(|_| ())
    }
}

/// Events of one grant with the versions that follow on `version`.
pub(crate) fn numbered(id: GrantId, version: u64, events: Vec<GrantEvent>) -> Vec<Event> {
    events
        .into_iter()
        .zip(version + 1..)
        .map(|(what, version)| Event::Grant { id, version, what: Box::new(what) })
        .collect()
}
