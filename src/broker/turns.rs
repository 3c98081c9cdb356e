//! Endings at the targets: how a turn is spent. Who has one is in `lanes.rs`; what becomes of each in `settle.rs`.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::StreamExt;
use futures::channel::mpsc::UnboundedSender;
use parking_lot::Mutex;

use crate::connector::{Connector, Gone, Listener, RevokeError};
use crate::core::event::Urgency;
use crate::core::grant::Grant;
use crate::core::id::{LeaseId, ResourceName};
use crate::core::lease::Lease;

use super::lanes::{Kind, LaneName, Occasion, Turn};
use super::{Broker, BrokerError};
use crate::failpoint::{self, Point};

/// Outcomes of one group that are recorded at once: they share the journal's syncs.
const RECORDED_AT_ONCE: usize = 256;

/// Grants that are read at once.
pub(super) const READ_AT_ONCE: usize = 64;

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
pub(super) struct Mark {
    of: Option<UnderWay>,
    lease: LeaseId,
}

impl Mark {
    /// True if the lease was handed out again meanwhile.
    pub(super) fn lift(&mut self) -> bool {
        self.of.take().is_some_and(|of| of.0.lock().remove(&self.lease).unwrap_or(false))
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        self.lift();
    }
}

/// One ending that nobody else works on.
pub(super) struct Work {
    /// As it was when the work came in line.
    pub(super) grant: Arc<Grant>,
    pub(super) lease: LeaseId,
    pub(super) urgency: Urgency,
    pub(super) mark: Mark,
}

/// A lease that is to be ended, and how urgent that is.
pub(super) struct ToEnd {
    pub(super) grant: Arc<Grant>,
    pub(super) lease: LeaseId,
    pub(super) urgency: Urgency,
}

/// A turn that is given back once, however its task ends.
struct Held {
    broker: Arc<Broker>,
    lane: LaneName,
    is_over: AtomicBool,
}

impl Held {
    fn give_back(&self) {
        if !self.is_over.swap(true, Ordering::SeqCst) {
            self.broker.driver.lanes.lock().give_back(&self.lane);
            self.broker.start_turns(&self.lane.target);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// Hears of endings at the target: outcomes go where they are recorded, and once access is cut the turn is another's.
struct Hears<'a> {
    held: &'a Held,
    told: UnboundedSender<(usize, Result<Gone, RevokeError>)>,
}

impl Listener for Hears<'_> {
    fn settled(&self, place: usize, outcome: Result<Gone, RevokeError>) {
        // Whoever records lives as long as this.
        let _ = self.told.unbounded_send((place, outcome));
    }
    fn cut(&self) {
        self.held.give_back();
    }
}

impl Broker {
    /// Ends leases at one target, in tasks of their own. What is under way already is left to whoever is at it.
    pub(super) fn end_at(
        self: &Arc<Self>,
        target: &ResourceName,
        connector: &Arc<dyn Connector>,
        leases: Vec<ToEnd>,
        occasion: Occasion,
    ) {
        for ToEnd { grant, lease: id, urgency } in leases {
            let Some(lease) = grant.leases.get(&id) else { continue };
            let unrecorded = self.driver.unrecorded_tries.lock().get(&id).copied().unwrap_or(0);
            let (kind, resource) = (Kind::of(lease, occasion, unrecorded), lease.intent.permission.resource.clone());
            let Some(mark) = self.driver.under_way.begin(id, occasion) else { continue };
            let lane = LaneName { target: target.clone(), resource, kind };
            self.driver.lanes.lock().add(&lane, connector, Work { grant, lease: id, urgency, mark });
        }
        self.start_turns(target);
    }

    fn start_turns(self: &Arc<Self>, target: &ResourceName) {
        loop {
            let Some(turn) = self.driver.lanes.lock().next(target) else { return };
            let broker = Arc::clone(self);
            self.spawn(async move { broker.take_turn(turn).await });
        }
    }

    async fn take_turn(self: &Arc<Self>, turn: Turn) {
        let Turn { lane, connector, works } = turn;
        let held = Held { broker: Arc::clone(self), lane: lane.clone(), is_over: AtomicBool::new(false) };
        let mut ending = std::pin::pin!(self.end_group(&held, connector.as_ref(), works));
        let well = match lane.kind.turn() {
            None => ending.await,
            Some(longest) => {
                tokio::select! {
                    biased;
                    well = &mut ending => well,
                    () = self.clock.clock().sleep(longest) => {
                        held.give_back();
                        ending.await
                    }
                }
            }
        };
        if !well {
            self.look_out_for(&lane.target, Arc::clone(&connector));
        }
    }

    /// False if some have to be tried again.
    async fn end_group(self: &Arc<Self>, held: &Held, connector: &dyn Connector, works: Vec<Work>) -> bool {
        let lane = &held.lane;
        let mut todo = Vec::with_capacity(works.len());
        // As they stand by now: while one waited, it may have come to its end otherwise.
        let read = |work: Work| async move {
            let now = self.store.grant(work.grant.id).await.ok().flatten();
            let lease = now.as_ref().unwrap_or(&work.grant).leases.get(&work.lease).cloned();
            lease.filter(|l| !l.is_gone()).map(|lease| (work, lease))
        };
        let works: Vec<_> = futures::stream::iter(works).map(read).buffered(READ_AT_ONCE).collect().await;
        for (work, lease) in works.into_iter().flatten() {
            let known = self.driver.unrecorded.lock().get(&work.lease).cloned();
            match known {
                Some(gone) => _ = self.settle(work, &lease, Ok(gone)).await,
                None => todo.push((work, lease)),
            }
        }
        if let Some(why) = self.away(&lane.target) {
            self.park(todo, &why).await;
            return true;
        }
        if lane.kind == Kind::First {
            return self.end_together(held, connector, todo).await;
        }
        let mut well = true;
        for (work, lease) in todo {
            let outcome = if lane.kind.is_doubtful() {
                failpoint::at(Point::RevokeDoubtful);
                match self.explained(connector, Some(work.lease)).await {
                    Ok(known) => connector.revoke_unknown(&lease, &known, self.clock.passed()).await,
                    Err(error) => Err(RevokeError::Retry { why: error.to_string() }),
                }
            } else {
                connector.revoke(&lease, self.clock.passed()).await
            };
            well &= self.settle(work, &lease, outcome).await;
        }
        well
    }

    /// Ends leases in one call. Each is recorded as soon as it is known, while others are still being ended.
    async fn end_together(&self, held: &Held, connector: &dyn Connector, todo: Vec<(Work, Lease)>) -> bool {
        if todo.is_empty() {
            return true;
        }
        failpoint::at(Point::RevokeAsk);
        // A turn is of equals.
        let urgency = todo.iter().map(|(work, _)| work.urgency).min().unwrap_or(Urgency::Over);
        let (works, leases): (Vec<Work>, Vec<Lease>) = todo.into_iter().unzip();
        let mut works: Vec<Option<Work>> = works.into_iter().map(Some).collect();
        let (told, outcomes) = futures::channel::mpsc::unbounded();
        let ending = async {
            let hears = Hears { held, told };
            connector.revoke_all(&leases, self.clock.passed(), urgency, &hears).await;
            hears.told.close_channel();
        };
        let leases = &leases;
        let recording = outcomes
            .filter_map(|(place, outcome): (usize, _)| {
                let work: Option<Work> = works.get_mut(place).and_then(Option::take);
                std::future::ready(work.map(|work| (place, work, outcome)))
            })
            .map(|(place, work, outcome)| async move { self.settle(work, &leases[place], outcome).await })
            .buffer_unordered(RECORDED_AT_ONCE)
            .fold(true, |well, one| async move { well & one });
        let ((), mut well) = tokio::join!(ending, recording);
        for (work, lease) in works.into_iter().zip(leases) {
            let Some(work) = work else { continue };
            let why = "nothing was told of this ending; it is tried again".to_owned();
            well &= self.settle(work, lease, Err(RevokeError::Retry { why })).await;
        }
        well
    }

    /// A target that is away is looked at, not each lease. What was never tried is told so, once; the rest of them all
    /// comes when the target is back (`look_out.rs`), or when its claim is over.
    async fn park(&self, todo: Vec<(Work, Lease)>, why: &str) {
        let fresh = todo.into_iter().filter(|(_, lease)| !lease.resists());
        let tell = |(work, lease): (Work, Lease)| async move {
            let why = format!("not tried: its target is away ({why})");
            self.settle(work, &lease, Err(RevokeError::Retry { why })).await
        };
        futures::stream::iter(fresh).map(tell).buffer_unordered(RECORDED_AT_ONCE).for_each(|_| async {}).await;
    }

    /// Names and keys of everything that leases without proof of their end explain, but for one lease.
    pub(super) async fn explained(
        &self,
        connector: &dyn Connector,
        except: Option<LeaseId>,
    ) -> Result<BTreeSet<String>, BrokerError> {
        // What another node has just made must not look strange here (guarantee 13).
        self.store.refresh().await?;
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
}
