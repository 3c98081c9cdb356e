//! Due work: handed out in order, to one at a time, until it is done.

use std::time::Duration;

use super::House;
use super::kit::*;
use crate::core::decide::Command;
use crate::core::event::EndCause;
use crate::core::id::Timestamp;
use crate::store::{Job, Store};

const LEASE: Duration = Duration::from_secs(120);

fn deadline(n: u64) -> Job {
    Job::Deadline(grant_id(n))
}
fn lease(n: u64, lease: u64) -> Job {
    Job::Lease(grant_id(n), lease_id(lease))
}

async fn claim(store: &dyn Store, now: Timestamp) -> Vec<Job> {
    store.claim(now, LEASE, 100).await.unwrap()
}

fn two() -> Vec<crate::core::permission::Permission> {
    vec![permission("db"), permission("web")]
}

pub async fn due_in_order_and_once(house: &dyn House) {
    let store = house.open().await;
    for (n, life_secs) in [(1, 30), (2, 10), (3, 20), (4, 40)] {
        Ask { life_secs, ..ask(n) }.on(&*store).await;
    }
    assert!(claim(&*store, at(9)).await.is_empty());
    assert_eq!(store.claim(at(30), LEASE, 2).await.unwrap(), [deadline(2), deadline(3)]);
    assert_eq!(claim(&*store, at(30)).await, [deadline(1)], "the others are out");
    assert!(claim(&*store, at(30)).await.is_empty());
    // Also after a start: nothing is out then.
    store.close().await.unwrap();
    drop(store);
    let store = house.open().await;
    assert_eq!(claim(&*store, at(30)).await, [deadline(2), deadline(3), deadline(1)]);
    // One that waits for votes is due when nobody decided.
    pending(5).on(&*store).await;
    assert!(claim(&*store, at(39)).await.is_empty());
    assert_eq!(store.claim(at(600), LEASE, 1).await.unwrap(), [deadline(4)]);
}

pub async fn a_claim_comes_back(house: &dyn House) {
    let store = house.open().await;
    Ask { life_secs: 10, ..ask(1) }.on(&*store).await;
    assert_eq!(claim(&*store, at(10)).await, [deadline(1)]);
    house.passes(Duration::from_millis(119_999)).await;
    assert!(claim(&*store, at(10).plus_ms(119_999)).await.is_empty());
    house.passes(Duration::from_millis(1)).await;
    assert_eq!(claim(&*store, at(130)).await, [deadline(1)], "nobody settled it");
    house.passes(Duration::from_secs(10)).await;
    assert!(claim(&*store, at(140)).await.is_empty());
    store.release(deadline(1)).await;
    assert_eq!(claim(&*store, at(140)).await, [deadline(1)], "given back");
}

pub async fn a_claim_is_void_after_an_event(house: &dyn House) {
    let store = house.open().await;
    let grant = with_leases(&*store, ask(1), &[1]).await;
    assert!(claim(&*store, at(59)).await.is_empty(), "a live lease is not due");
    end(&*store, 1, at(20)).await;
    assert_eq!(claim(&*store, at(20)).await, [lease(1, 1)]);
    command(&*store, grant.id, &retry(1, at(25)), at(21)).await;
    assert!(claim(&*store, at(24)).await.is_empty());
    assert_eq!(claim(&*store, at(25)).await, [lease(1, 1)], "a new attempt, though the claim would last");
    // An attempt that fails at once, and is to be made again at the same moment, is a new one too.
    command(&*store, grant.id, &retry(1, at(25)), at(25)).await;
    assert_eq!(claim(&*store, at(25)).await, [lease(1, 1)]);
    // What the agent says changes nothing about it.
    command(&*store, grant.id, &report(), at(26)).await;
    assert!(claim(&*store, at(26)).await.is_empty());
    command(&*store, grant.id, &gone(1), at(27)).await;
    assert!(claim(&*store, at(1000)).await.is_empty(), "done");
}

fn report() -> Command {
    let invocation = crate::core::event::Invocation {
        tool: "psql".into(),
        arguments_digest: None,
        arguments: None,
        status: "ok".into(),
        started_at: None,
        ended_at: None,
    };
    Command::Report { invocation, max: 9 }
}

pub async fn other_leases_keep_their_claims(house: &dyn House) {
    let store = house.open().await;
    let grant = with_leases(&*store, Ask { permissions: two(), ..ask(1) }, &[1, 2]).await;
    end(&*store, 1, at(20)).await;
    assert_eq!(claim(&*store, at(20)).await, [lease(1, 1), lease(1, 2)]);
    command(&*store, grant.id, &retry(1, at(25)), at(21)).await;
    assert_eq!(claim(&*store, at(25)).await, [lease(1, 1)], "somebody is still at work on the other");
    command(&*store, grant.id, &gone(1), at(26)).await;
    assert!(claim(&*store, at(26)).await.is_empty());
    // A lease in doubt is not looked for before its mint is over for certain.
    let other = ask(2).on(&*store).await;
    command(&*store, other.id, &intend(&other, &[3], START), START).await;
    let unknown = Command::Unknown { lease: lease_id(3), why: "lost".into(), handle: None, not_before: at(30) };
    command(&*store, other.id, &unknown, at(10)).await;
    assert!(claim(&*store, at(29)).await.is_empty());
    assert_eq!(claim(&*store, at(30)).await, [lease(2, 3)]);
}

pub async fn what_was_frozen_goes_first(house: &dyn House) {
    let store = house.open().await;
    for n in 1..=6 {
        with_leases(&*store, ask(n), &[n]).await;
    }
    let over = |n, cause| {
        let store = std::sync::Arc::clone(&store);
        async move { command(&*store, grant_id(n), &Command::Finish { cause }, at(10 + n)).await }
    };
    for n in 1..=3 {
        over(n, EndCause::Completed).await;
    }
    over(4, EndCause::AgentLost).await;
    over(5, EndCause::Frozen { id: 1 }).await;
    // 6 is due by its deadline, later than all of them.
    let deadline_of_6 = store.grant(grant_id(6)).await.unwrap().unwrap().ends_at().unwrap();
    let first = store.claim(deadline_of_6, LEASE, 4).await.unwrap();
    assert_eq!(first, [lease(5, 5), lease(4, 4), deadline(6), lease(1, 1)]);
    // What is given back keeps its place among its like.
    assert_eq!(claim(&*store, deadline_of_6).await, [lease(2, 2), lease(3, 3)]);
    store.release(lease(2, 2)).await;
    store.release(lease(5, 5)).await;
    assert_eq!(claim(&*store, deadline_of_6).await, [lease(5, 5), lease(2, 2)]);
}

pub async fn waiting_for_what_is_due(house: &dyn House) {
    let store = house.open().await;
    let waited = |now, wait| {
        let store = std::sync::Arc::clone(&store);
        async move {
            let started = tokio::time::Instant::now();
            store.due(now, wait).await;
            started.elapsed()
        }
    };
    let short = Duration::from_millis(30);
    assert!(waited(START, short).await >= short, "nothing is due");
    Ask { life_secs: 10, ..ask(1) }.on(&*store).await;
    let _ = waited(START, short).await; // what was just made known may wake once
    assert!(waited(START, short).await >= short, "nothing is due yet");
    assert!(waited(at(10).plus_ms(0), PATIENCE).await < PATIENCE, "it is");
    let almost = Timestamp(at(10).0 - 20);
    assert!(waited(almost, PATIENCE).await < PATIENCE / 2, "it will be in 20 ms");
    // Handed out, it is due again when the claim ends, not now.
    assert_eq!(claim(&*store, at(10)).await, [deadline(1)]);
    assert!(waited(at(10), short).await >= short);
    assert!(waited(at(130), PATIENCE).await < PATIENCE / 2);
    // Work that comes meanwhile wakes, and so does what is given back.
    let wake = |store: std::sync::Arc<dyn Store>| {
        tokio::spawn(async move {
            let started = tokio::time::Instant::now();
            store.due(at(10), PATIENCE).await;
            started.elapsed()
        })
    };
    let waiting = wake(std::sync::Arc::clone(&store));
    tokio::task::yield_now().await;
    Ask { life_secs: 5, ..ask(2) }.on(&*store).await;
    assert!(waiting.await.unwrap() < PATIENCE / 2);
    assert_eq!(claim(&*store, at(10)).await, [deadline(2)]);
    let waiting = wake(std::sync::Arc::clone(&store));
    tokio::task::yield_now().await;
    store.release(deadline(1)).await;
    assert!(waiting.await.unwrap() < PATIENCE / 2);
}

pub async fn giving_back_what_is_not_claimed(house: &dyn House) {
    let store = house.open().await;
    Ask { life_secs: 10, ..ask(1) }.on(&*store).await;
    store.release(deadline(1)).await;
    store.release(deadline(9)).await;
    assert!(claim(&*store, at(9)).await.is_empty());
    assert_eq!(claim(&*store, at(10)).await, [deadline(1)]);
    end(&*store, 1, at(10)).await;
    store.release(deadline(1)).await;
    assert!(claim(&*store, at(1000)).await.is_empty());
}
