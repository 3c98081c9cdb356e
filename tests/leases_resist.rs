//! "A few credentials that can't be ended don't keep the others alive, and none is forgotten."

#[path = "support/house.rs"]
mod house;
#[path = "support/mod.rs"]
mod support;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use countersign::broker::BrokerError;
use countersign::connector::Found;
use countersign::core::lease::{Absence, LeaseState};
use countersign::store::engine::{Engine, Keeper, Log, Receipt};
use countersign::store::memory::{self, MemoryArchive, MemoryLog};
use countersign::store::{StoreError, view::View};
use countersign::time::SystemClock;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use house::{House, Moved, Puppet, until};
use parking_lot::Mutex;
use serde_json::json;

/// In which a fresh ending is done, whatever else hangs.
const SOON: Duration = Duration::from_secs(3);

async fn house() -> House {
    House::open(memory::store(), Arc::new(Moved::default())).await
}

#[tokio::test]
async fn eight_that_resisted_and_hang_now_hold_up_nothing_and_are_tried_once_at_a_time() {
    let house = house().await;
    house.broker.drive();
    let mut stuck = Vec::new();
    for _ in 0..8 {
        let (id, lease) = house.holds("puppet/one", 600).await;
        house.puppet.refuses.lock().insert(lease);
        house.puppet.hangs.lock().insert(lease);
        house.complete(id).await;
        stuck.push((id, lease));
    }
    until("each is tried again, and hangs", async || stuck.iter().all(|(_, l)| house.puppet.tries(*l) == 2)).await;
    let (fresh, _) = house.holds("puppet/one", 600).await;
    house.complete(fresh).await;
    let took = until("the fresh one is over", async || house.word(fresh).await == "ended").await;
    assert!(took < SOON, "{took:?}");

    // What was handed out for two minutes comes back, and is still being worked on.
    house.clock.pass(Duration::from_secs(130));
    let (fresh, _) = house.holds("puppet/one", 300).await;
    house.complete(fresh).await;
    until("another fresh one is over", async || house.word(fresh).await == "ended").await;
    for (id, lease) in stuck {
        assert_eq!((house.puppet.tries(lease), house.word(id).await), (2, "ending"));
    }
}

#[tokio::test]
async fn eight_that_hang_at_first_cost_the_next_a_turn_and_other_resources_nothing() {
    let house = house().await;
    house.broker.drive();
    for _ in 0..8 {
        let (id, lease) = house.holds("puppet/one", 600).await;
        house.puppet.hangs.lock().insert(lease);
        house.complete(id).await;
        until("it hangs, or waits for its turn", async || house.word(id).await == "ending").await;
    }
    let (same, _) = house.holds("puppet/one", 600).await;
    let (other, _) = house.holds("puppet/two", 600).await;
    house.complete(same).await;
    house.complete(other).await;
    let took = until("the other resource's is over", async || house.word(other).await == "ended").await;
    assert!(took < SOON, "{took:?}");
    until("the same resource's is over", async || house.word(same).await == "ended").await;
}

#[tokio::test]
async fn one_of_a_group_that_hangs_does_not_hold_up_the_record_of_the_rest() {
    let house = house().await;
    let mut all = Vec::new();
    for _ in 0..6 {
        all.push(house.holds("puppet/one", 600).await);
    }
    house.puppet.hangs.lock().insert(all[2].1);
    for (id, _) in &all {
        house.complete(*id).await;
    }
    // All are due when the driver starts: one group.
    house.broker.drive();
    let rest = || all.iter().enumerate().filter(|(i, _)| *i != 2);
    until("the others are over", async || {
        let mut words = Vec::new();
        for (_, (id, _)) in rest() {
            words.push(house.word(*id).await);
        }
        words.iter().all(|w| *w == "ended")
    })
    .await;
    assert_eq!(house.word(all[2].0).await, "ending");
}

#[tokio::test]
async fn a_lease_that_became_known_during_a_sweep_survives_it() {
    let house = house().await;
    let found = |name: &str, key: &str| Found { name: name.to_owned(), handle: json!({ "key": key }) };
    house.puppet.found.lock().extend([found("stranger", "?"), found("theirs", "key of puppet/one")]);
    house.broker.drive();
    until("the sweep ends the first", async || house.puppet.found_tried.lock().as_slice() == ["stranger"]).await;
    // While that takes long, what else was found becomes somebody's.
    let (id, _) = house.holds("puppet/one", 600).await;
    let sweeps = house.puppet.sweeps.load(SeqCst);
    house.puppet.found_endings.add_permits(100);
    until("the next sweep", async || house.puppet.sweeps.load(SeqCst) > sweeps).await;
    assert_eq!(house.puppet.found_tried.lock().as_slice(), ["stranger"]);
    assert!(matches!(house.lease(id).await, LeaseState::Live { .. }));
}

#[tokio::test]
async fn a_target_whose_sweep_hangs_holds_up_the_sweeps_of_no_other() {
    let house = house().await;
    let found = |name: &str| Found { name: name.to_owned(), handle: json!({ "key": name }) };
    house.puppet.found.lock().push(found("stuck"));
    house.broker.drive();
    until("one sweep hangs", async || house.puppet.found_tried.lock().as_slice() == ["stuck"]).await;
    // Neither the first sweep of the other nor any later one waits for it.
    house.mirror.found_endings.add_permits(2);
    for name in ["first", "later"] {
        house.mirror.found.lock().push(found(name));
        until("the neighbour is swept", async || house.mirror.found.lock().is_empty()).await;
    }
    assert_eq!(house.puppet.found.lock().len(), 1, "it hangs still");
    house.puppet.found_endings.add_permits(1);
}

#[tokio::test]
async fn a_caller_who_goes_away_and_a_stop_cut_no_mint() {
    let house = house().await;
    house.broker.drive();
    house.puppet.mints.forget_permits(1_000);
    let id = house.asked("puppet/one", 600).await;
    assert!(tokio::time::timeout(Duration::from_millis(50), house.collect(id)).await.is_err(), "it waits");
    until("it is intended", async || house.grant(id).await.leases.len() == 1).await;
    let stopping = tokio::spawn({
        let broker = Arc::clone(&house.broker);
        async move { broker.stop(Duration::from_secs(1)).await }
    });
    tokio::task::yield_now().await;
    assert!(matches!(house.lease(id).await, LeaseState::Intended));
    house.puppet.mints.add_permits(1);
    stopping.await.unwrap();
    assert!(matches!(house.lease(id).await, LeaseState::Live { .. }), "{:?}", house.lease(id).await);
}

/// A log that refuses a batch with such a record, once each, in this order.
struct Refusing {
    log: MemoryLog,
    refuses: Refusals,
    generation: AtomicU64,
}

impl Log for Refusing {
    fn enqueue(
        &self,
        payloads: Vec<Vec<u8>>,
        urgent: bool,
        rests_on: Option<u64>,
        open: usize,
    ) -> Result<BoxFuture<'static, Result<Receipt, StoreError>>, StoreError> {
        let mut refuses = self.refuses.lock();
        if let Some((word, _)) = refuses.front()
            && payloads.iter().any(|p| String::from_utf8_lossy(p).contains(word))
        {
            let (_, error) = refuses.pop_front().unwrap();
            self.generation.fetch_add(1, SeqCst);
            return Ok(async move { Err(error) }.boxed());
        }
        self.log.enqueue(payloads, urgent, rests_on, open)
    }
    fn generation(&self) -> u64 {
        self.generation.load(SeqCst)
    }
    fn read(&self, seqs: &[u64]) -> Result<Vec<(u64, Vec<u8>)>, StoreError> {
        self.log.read(seqs)
    }
    fn stopped(&self) -> Option<StoreError> {
        None
    }
    fn recover(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        async { Ok(()) }.boxed()
    }
    fn figures(&self) -> Vec<(&'static str, u64)> {
        self.log.figures()
    }
    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        self.log.close()
    }
}

type Refusals = Arc<Mutex<VecDeque<(&'static str, StoreError)>>>;

async fn house_that_refuses(what: impl IntoIterator<Item = (&'static str, StoreError)>) -> (House, Refusals) {
    let refuses: Refusals = Arc::new(Mutex::new(what.into_iter().collect()));
    let log = Refusing { log: MemoryLog::default(), refuses: Arc::clone(&refuses), generation: AtomicU64::new(0) };
    let store = Engine::start(Arc::new(SystemClock), log, MemoryArchive::default(), View::default(), Keeper::default());
    (House::open(store, Arc::new(Moved::default())).await, refuses)
}

/// As a full disk does, that has space for endings alone.
fn no_space_for(word: &'static str) -> impl Iterator<Item = (&'static str, StoreError)> {
    std::iter::repeat_with(move || (word, StoreError::Unavailable("no space".to_owned()))).take(10_000)
}

#[tokio::test]
async fn attempts_that_stay_off_the_record_wait_longer_each_time_and_in_no_ones_way() {
    let (house, refuses) = house_that_refuses(no_space_for("lease_retry")).await;
    let (stuck, lease) = house.holds("puppet/one", 600).await;
    house.puppet.resists.lock().insert(lease);
    house.broker.drive();
    house.complete(stuck).await;
    until("it was tried", async || house.puppet.tries(lease) >= 1).await;
    let took = until("it was tried four times", async || house.puppet.tries(lease) >= 4).await;
    // Half a second, one and two, each at most a quarter shorter; without a back-off it were a quarter of a second each.
    assert!(took >= Duration::from_millis(2_600), "{took:?}");
    let (fresh, _) = house.holds("puppet/one", 600).await;
    house.complete(fresh).await;
    let took = until("a fresh one is over", async || house.word(fresh).await == "ended").await;
    assert!(took < SOON, "{took:?}");
    refuses.lock().clear();
    house.puppet.resists.lock().clear();
    until("it is over too", async || house.word(stuck).await == "ended").await;
}

#[tokio::test]
async fn a_sweep_ends_every_orphan_though_none_can_be_told() {
    let (house, _refuses) = house_that_refuses(no_space_for("orphan")).await;
    let found = |name: &str| Found { name: name.to_owned(), handle: json!({ "key": name }) };
    house.puppet.found.lock().extend([found("one"), found("two")]);
    house.broker.drive();
    until("the first is being ended", async || house.puppet.found_tried.lock().as_slice() == ["one"]).await;
    let sweeps = house.puppet.sweeps.load(SeqCst);
    house.puppet.found_endings.add_permits(1);
    until("the second is being ended", async || house.puppet.found_tried.lock().as_slice() == ["one", "two"]).await;
    assert_eq!(house.puppet.sweeps.load(SeqCst), sweeps, "in the same sweep");
    house.puppet.found_endings.add_permits(1);
    until("both are ended", async || house.puppet.found.lock().is_empty()).await;
}

#[tokio::test]
async fn a_handle_that_could_not_be_recorded_leaves_a_lease_in_doubt_not_in_limbo() {
    let (house, refuses) = house_that_refuses([
        ("lease_prepared", StoreError::Unavailable("no space".to_owned())),
        ("lease_unknown", StoreError::Unreadable("a bad sector".to_owned())),
    ])
    .await;
    house.broker.drive();
    let id = house.asked("puppet/one", 600).await;
    let refused = house.collect(id).await.unwrap_err();
    assert!(matches!(refused, BrokerError::Unavailable(_)), "{refused:?}");
    until("it is in doubt", async || matches!(house.lease(id).await, LeaseState::Unknown { .. })).await;
    assert!(refuses.lock().is_empty(), "both were refused once");
    assert!(house.grant(id).await.leases.values().all(|l| l.handle.is_some()), "what was made is known");
    house.complete(id).await;
    house.clock.pass(Puppet::MINT_DEADLINE);
    until("the grant is over", async || house.word(id).await == "ended").await;
    assert!(matches!(house.lease(id).await, LeaseState::Absent { absence: Absence::Proven { .. }, .. }));
}
