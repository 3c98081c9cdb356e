//! "A database is gone. What is to end there is ended when it is back, at once, and meanwhile nobody else notices."

#[path = "support/house.rs"]
mod house;
#[path = "support/mod.rs"]
mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use countersign::connector::{Away, Extent};
use countersign::core::event::Selector;
use countersign::core::id::{GrantId, LeaseId};
use countersign::store::memory;
use house::{House, Moved, until};

/// In which a fresh ending is done, and one whose target is back.
const SOON: Duration = Duration::from_secs(3);

fn away(extent: Extent) -> Away {
    Away { why: "can't connect".to_owned(), extent }
}

async fn many(house: &House, resource: &str, count: usize) -> Vec<(GrantId, LeaseId)> {
    let mut all = Vec::new();
    for _ in 0..count {
        all.push(house.holds(resource, 600).await);
    }
    all
}

async fn all_are(house: &House, word: &str, all: &[(GrantId, LeaseId)]) -> bool {
    for (id, _) in all {
        if house.word(*id).await != word {
            return false;
        }
    }
    true
}

#[tokio::test]
async fn l4_a_target_that_is_away_is_probed_and_its_leases_are_not_tried_until_it_is_back() {
    let house = House::open(memory::store(), Arc::new(Moved::default())).await;
    let all = many(&house, "puppet/one", 40).await;
    *house.puppet.away.lock() = Some(away(Extent::Silent));
    house.broker.drive();
    for (id, _) in &all {
        house.complete(*id).await;
    }
    until("each is told to resist", async || {
        let mut resisting = 0;
        for (id, _) in &all {
            resisting += usize::from(house.attempts(*id).await.0 > 0);
        }
        resisting == all.len()
    })
    .await;
    until("it counts as away", async || house.broker.target_figures().iter().any(|(_, f)| f.is_away)).await;
    let seen = house.broker.view(&*house.grant(all[0].0).await);
    assert_eq!(seen.leases[0].away.as_deref(), Some("can't connect"), "and that is told: {seen:?}");

    // From here on one probe a second, whatever is due: no lease is tried, and nothing is recorded.
    let (tried, probes) = (house.puppet.tried.lock().len(), house.puppet.probes.load(SeqCst));
    let mut versions = Vec::new();
    for (id, _) in &all {
        versions.push(house.grant(*id).await.version);
    }
    let late = house.holds("mirror/one", 600).await;
    house.complete(late.0).await;
    let took = until("another target's is over", async || house.word(late.0).await == "ended").await;
    assert!(took < SOON, "{took:?}");
    house.clock.pass(Duration::from_secs(200));
    until("some probes were made", async || house.puppet.probes.load(SeqCst) >= probes + 3).await;
    assert_eq!(house.puppet.tried.lock().len(), tried);
    for ((id, _), version) in all.iter().zip(versions) {
        assert!(house.grant(*id).await.version <= version + 1, "at most the first word about it");
    }

    *house.puppet.away.lock() = None;
    let took = until("all are over", async || all_are(&house, "ended", &all).await).await;
    assert!(took < SOON, "{took:?}");
    assert!(house.puppet.sweeps.load(SeqCst) > 0, "and what else came back is looked for");
    assert!(house.broker.target_figures().values().all(|f| !f.is_away));
}

#[tokio::test]
async fn a_target_that_answers_nothing_is_found_back_though_old_probes_never_return() {
    let house = House::open(memory::store(), Arc::new(Moved::default())).await;
    let (id, _) = house.holds("puppet/one", 600).await;
    *house.puppet.away.lock() = Some(away(Extent::Silent));
    house.broker.drive();
    house.complete(id).await;
    until("it is away", async || house.broker.target_figures().iter().any(|(_, f)| f.is_away)).await;
    house.puppet.mute.store(true, SeqCst);
    let probes = house.puppet.probes.load(SeqCst);
    until("some probes hang", async || house.puppet.probes.load(SeqCst) >= probes + 2).await;
    house.puppet.mute.store(false, SeqCst);
    *house.puppet.away.lock() = None;
    let took = until("it is over", async || house.word(id).await == "ended").await;
    assert!(took < SOON, "{took:?}");
}

#[tokio::test]
async fn what_something_behind_a_target_holds_up_keeps_no_other_lease_from_being_tried() {
    let house = House::open(memory::store(), Arc::new(Moved::default())).await;
    let ((stuck, lease), (fresh, _)) = (house.holds("puppet/one", 600).await, house.holds("puppet/two", 600).await);
    house.puppet.resists.lock().insert(lease);
    *house.puppet.away.lock() = Some(away(Extent::Behind));
    house.broker.drive();
    house.complete(stuck).await;
    until("it is looked out for", async || house.broker.target_figures().iter().any(|(_, f)| f.is_away)).await;
    let seen = house.broker.view(&*house.grant(stuck).await);
    assert_eq!(seen.leases[0].away, None, "its own pauses count: {seen:?}");
    house.complete(fresh).await;
    let took = until("the other one is over", async || house.word(fresh).await == "ended").await;
    assert!(took < SOON, "{took:?}");
    house.puppet.resists.lock().clear();
    *house.puppet.away.lock() = None;
    until("what is behind is back", async || house.word(stuck).await == "ended").await;
}

/// A target that can end nothing just now holds as many as there are turns; the order of the rest is what counts.
async fn held_up(count: usize) -> (House, Vec<(GrantId, LeaseId)>) {
    let house = House::open_crowded(memory::store(), Arc::new(Moved::default())).await;
    let all = many(&house, "puppet/one", count).await;
    (house, all)
}

fn place(house: &House, lease: LeaseId) -> Option<usize> {
    house.puppet.tried.lock().iter().position(|l| *l == lease)
}

#[tokio::test]
async fn what_is_frozen_goes_before_what_merely_ended_though_that_waits_already() {
    let (house, all) = held_up(600).await;
    let mut frozen = Vec::new();
    for _ in 0..5 {
        frozen.push(house.holds_as("a", "T-2", "puppet/one").await);
    }
    let permits = house.puppet.endings.available_permits();
    house.puppet.endings.forget_permits(permits);
    house.broker.drive();
    for (id, _) in &all {
        house.complete(*id).await;
    }
    until("turns are taken", async || !house.puppet.tried.lock().is_empty()).await;
    let chen = house.person("chen", &["security"]);
    let selector = Selector::TaskName("T-2".parse().unwrap());
    let (_, ended) = house.broker.freeze(&chen, selector, "a drill").await.unwrap();
    assert_eq!(ended.len(), frozen.len());
    until("the frozen ones are tried", async || frozen.iter().all(|(_, l)| place(&house, *l).is_some())).await;
    let last = frozen.iter().filter_map(|(_, l)| place(&house, *l)).max().unwrap();
    house.puppet.endings.add_permits(permits);
    until("all are over", async || all_are(&house, "ended", &all).await).await;
    let after = all.iter().filter(|(_, l)| place(&house, *l).is_some_and(|p| p > last)).count();
    assert!(after >= 200, "only {after} of {} waited for what was frozen", all.len());
}

#[tokio::test]
async fn one_owners_many_are_not_all_before_anothers_one() {
    let (house, all) = held_up(600).await;
    let other = house.holds_as("ops/one", "T-9", "puppet/one").await;
    let permits = house.puppet.endings.available_permits();
    house.puppet.endings.forget_permits(permits);
    house.broker.drive();
    for (id, _) in &all {
        house.complete(*id).await;
    }
    until("turns are taken", async || !house.puppet.tried.lock().is_empty()).await;
    house.broker.complete(&house.agent_named("ops/one"), other.0).await.unwrap();
    until("the other owner's is tried", async || place(&house, other.1).is_some()).await;
    let at = place(&house, other.1).unwrap();
    house.puppet.endings.add_permits(permits);
    until("all are over", async || all_are(&house, "ended", &all).await).await;
    let after = all.iter().filter(|(_, l)| place(&house, *l).is_some_and(|p| p > at)).count();
    assert!(after >= 100, "only {after} of {} came after it", all.len());
}
