//! "Somebody set the clock, and set it back. Nothing lives longer for it, nothing is called dead that isn't, and the
//! broker works."

#[path = "support/house.rs"]
mod house;
#[path = "support/mod.rs"]
mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use countersign::broker::BrokerError;
use countersign::broker::mint::Issued;
use countersign::core::lease::{Evidence, LeaseState};
use countersign::store::memory::{self, MemoryLog};
use countersign::time::Clock;
use house::{House, Moved, Puppet, TEN_YEARS_MS, until};

async fn house() -> House {
    let house = House::open(memory::store(), Arc::new(Moved::default())).await;
    house.broker.drive();
    house
}

fn expires_at_secs(issued: &Issued) -> u64 {
    issued.credentials[0].credential.public["expires_at"].parse().unwrap()
}

#[tokio::test]
async fn no_token_is_minted_by_a_clock_that_was_set_and_once_it_is_right_again_they_are() {
    let house = house().await;
    let (id, other) = (house.asked("api/notes", 300).await, house.asked("puppet/one", 300).await);
    for step in [TEN_YEARS_MS, -TEN_YEARS_MS] {
        house.clock.step_wall(step);
        let BrokerError::NotNow { why, .. } = house.collect(id).await.unwrap_err() else { panic!("minted") };
        assert!(why.contains("restart the broker"), "{why}");
        assert!(house.grant(id).await.leases.is_empty(), "nothing was intended");
        house.clock.step_wall(-step);
    }
    // What ends by no clock of ours goes on.
    house.clock.step_wall(TEN_YEARS_MS);
    house.collect(other).await.unwrap();
    house.clock.step_wall(-TEN_YEARS_MS);
    // A small step is no reason to refuse, and lengthens nothing.
    house.clock.step_wall(100_000);
    let issued = house.collect(id).await.unwrap();
    let latest = house.broker.now().plus_secs(300).secs();
    assert!(expires_at_secs(&issued) <= latest, "{} > {latest}", expires_at_secs(&issued));
}

#[tokio::test]
async fn a_token_that_still_works_is_not_called_expired_by_a_clock_ahead() {
    let house = house().await;
    let (id, _) = house.holds("api/notes", 300).await;
    house.clock.step_wall(TEN_YEARS_MS);
    house.complete(id).await;
    until("it was looked at", async || house.attempts(id).await.0 > 0 || house.word(id).await == "ended").await;
    assert!(matches!(house.lease(id).await, LeaseState::Revoking { .. }), "{:?}", house.lease(id).await);
    house.clock.step_wall(-TEN_YEARS_MS);
    house.clock.pass(Duration::from_secs(400));
    until("it is over", async || house.word(id).await == "ended").await;
    let LeaseState::Revoked { at, evidence: Evidence::Expired { not_after, .. } } = house.lease(id).await else {
        panic!("{:?}", house.lease(id).await)
    };
    assert!(at > not_after);
}

#[tokio::test]
async fn a_clock_behind_for_a_moment_parks_no_ending() {
    let house = house().await;
    let (id, _) = house.holds("api/notes", 20).await;
    house.clock.step_wall(-TEN_YEARS_MS);
    house.complete(id).await;
    until("it was looked at", async || house.attempts(id).await.0 > 0).await;
    house.clock.step_wall(TEN_YEARS_MS);
    let (tries, next) = house.attempts(id).await;
    assert!(next.unwrap() <= house.broker.now().plus_secs(61), "{next:?}");
    house.clock.pass(Duration::from_secs(62));
    until("it is over", async || house.word(id).await == "ended").await;
    assert!(tries <= 3, "and costs few records: {tries}");
}

#[tokio::test]
async fn what_a_run_in_ten_years_put_off_is_due_once_the_clock_is_right() {
    let (log, clock) = (MemoryLog::default(), Arc::new(Moved::default()));
    clock.step_wall(TEN_YEARS_MS);
    let ahead = House::open(memory::reopen(log.clone()).unwrap(), Arc::clone(&clock)).await;
    let pending = ahead.asked("api/customers", 300).await;
    assert_eq!(ahead.word(pending).await, "pending");
    let (resisting, lease) = ahead.holds("puppet/one", 300).await;
    ahead.puppet.loses_mints.store(true, SeqCst);
    let doubtful = ahead.asked("puppet/two", 300).await;
    ahead.collect(doubtful).await.unwrap_err();
    ahead.puppet.refuses.lock().insert(lease);
    ahead.complete(resisting).await;
    ahead.complete(doubtful).await;
    ahead.broker.drive();
    until("an attempt has failed", async || ahead.attempts(resisting).await.0 == 1).await;
    ahead.puppet.hangs.lock().insert(lease);
    ahead.broker.stop(Duration::from_millis(10)).await;

    clock.step_wall(-TEN_YEARS_MS);
    let right = House::open(memory::reopen(log).unwrap(), Arc::clone(&clock)).await;
    assert!(right.broker.now() < Clock::wall(clock.as_ref()).plus_secs(60), "the run begins where the clock is");
    assert_eq!(right.word(pending).await, "withdrawn");
    right.broker.drive();
    until("what resisted is over", async || right.word(resisting).await == "ended").await;
    assert!(matches!(right.lease(doubtful).await, LeaseState::Unknown { .. }), "its mint may be under way");
    clock.pass(Puppet::MINT_DEADLINE);
    until("what was in doubt is over", async || right.word(doubtful).await == "ended").await;
}

#[tokio::test]
async fn what_came_into_doubt_by_a_right_clock_and_was_put_off_by_a_wrong_one_is_looked_for_soon() {
    let (log, clock) = (MemoryLog::default(), Arc::new(Moved::default()));
    let house = House::open(memory::reopen(log.clone()).unwrap(), Arc::clone(&clock)).await;
    house.puppet.loses_mints.store(true, SeqCst);
    let doubtful = house.asked("puppet/one", 300).await;
    house.collect(doubtful).await.unwrap_err();
    let lease = *house.grant(doubtful).await.leases.keys().next().unwrap();
    house.complete(doubtful).await;
    house.broker.stop(Duration::from_millis(10)).await;

    clock.step_wall(TEN_YEARS_MS);
    let ahead = House::open(memory::reopen(log.clone()).unwrap(), Arc::clone(&clock)).await;
    ahead.puppet.resists.lock().insert(lease);
    ahead.broker.drive();
    clock.pass(Puppet::MINT_DEADLINE);
    until("an attempt has failed", async || ahead.attempts(doubtful).await.0 >= 1).await;
    ahead.broker.stop(Duration::from_millis(10)).await;

    clock.step_wall(-TEN_YEARS_MS);
    let right = House::open(memory::reopen(log).unwrap(), Arc::clone(&clock)).await;
    right.broker.drive();
    clock.pass(Puppet::MINT_DEADLINE);
    until("what was in doubt is over", async || right.word(doubtful).await == "ended").await;
}

#[tokio::test]
async fn l10_no_step_of_the_clock_moves_a_deadline_and_none_is_missed() {
    let house = house().await;
    let (id, _) = house.holds("puppet/one", 600).await;
    let ends_at = house.grant(id).await.ends_at().unwrap();
    for step in [TEN_YEARS_MS, -2 * TEN_YEARS_MS, TEN_YEARS_MS] {
        house.clock.step_wall(step);
        let (other, _) = house.holds("puppet/two", 600).await;
        house.complete(other).await;
        until("what is completed ends under any clock", async || house.word(other).await == "ended").await;
        assert_eq!((house.word(id).await, house.grant(id).await.ends_at()), ("active", Some(ends_at)));
    }
    house.clock.step_wall(-TEN_YEARS_MS);
    house.clock.pass(Duration::from_secs(600));
    until("its deadline comes all the same", async || house.word(id).await == "ended").await;
}

#[tokio::test]
async fn a_suspend_counts_and_what_came_due_in_it_ends_at_once() {
    let house = house().await;
    let (slept_through, _) = house.holds("puppet/one", 600).await;
    let (outlives, _) = house.holds("puppet/one", 3600).await;
    let waiting = house.asked("puppet/two", 600).await;
    house.clock.pass(Duration::from_secs(1800));
    let refused = house.collect(waiting).await.unwrap_err();
    assert!(matches!(refused, BrokerError::Over { .. }), "{refused:?}");
    let took = until("it is over", async || house.word(slept_through).await == "ended").await;
    assert!(took < Duration::from_secs(3), "{took:?}");
    assert_eq!(house.word(outlives).await, "active");
}

#[tokio::test]
async fn a_leap_second_lengthens_nothing_and_stops_nothing() {
    let house = house().await;
    let (id, _) = house.holds("puppet/one", 600).await;
    let ends_at = house.grant(id).await.ends_at().unwrap();
    // A second that comes twice, and one that is left out.
    for step in [-1_000, 1_000, 1_000] {
        house.clock.step_wall(step);
        let token = house.asked("api/notes", 300).await;
        let before = house.broker.now();
        let issued = house.collect(token).await.unwrap();
        assert!(expires_at_secs(&issued) <= before.plus_secs(301).secs(), "{step}");
        assert_eq!(house.grant(id).await.ends_at(), Some(ends_at));
    }
}

#[tokio::test]
async fn d13_ten_years_forward_at_a_start_and_back_at_the_next_leave_a_broker_that_works() {
    let (log, clock) = (MemoryLog::default(), Arc::new(Moved::default()));
    for step in [0, TEN_YEARS_MS, -TEN_YEARS_MS, -TEN_YEARS_MS, TEN_YEARS_MS] {
        clock.step_wall(step);
        let house = House::open(memory::reopen(log.clone()).unwrap(), Arc::clone(&clock)).await;
        house.broker.drive();
        let (id, _) = house.holds("puppet/one", 600).await;
        house.collect(house.asked("api/notes", 300).await).await.expect("a token, too");
        house.complete(id).await;
        until("it works", async || house.word(id).await == "ended").await;
        house.broker.stop(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_broker_that_was_down_past_a_deadline_gives_nothing_and_ends_it_at_once_whatever_else_is_away() {
    let (log, clock) = (MemoryLog::default(), Arc::new(Moved::default()));
    let before = House::open(memory::reopen(log.clone()).unwrap(), Arc::clone(&clock)).await;
    let (overdue, _) = before.holds("mirror/one", 600).await;
    let asked = before.asked("mirror/one", 600).await;
    let (dead, _) = before.holds("puppet/one", 600).await;
    before.broker.stop(Duration::from_millis(10)).await;
    clock.pass(Duration::from_secs(3600));

    let puppet = Arc::new(Puppet::default());
    puppet.mute.store(true, SeqCst);
    let begun = std::time::Instant::now();
    let after = House::open_with(memory::reopen(log).unwrap(), clock, puppet, |_| {}).await;
    assert!(after.broker.has_started() && begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    let refused = after.collect(asked).await.unwrap_err();
    assert!(matches!(refused, BrokerError::Over { .. }), "{refused:?}");
    after.broker.drive();
    let took = until("what is overdue elsewhere is over", async || after.word(overdue).await == "ended").await;
    assert!(took < Duration::from_secs(3), "{took:?}");
    let (new, _) = after.holds("mirror/one", 600).await;
    after.complete(new).await;
    until("and so is what is new", async || after.word(new).await == "ended").await;
    assert_eq!(after.word(dead).await, "ending");
}
