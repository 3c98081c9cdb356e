//! Closed and opened again, everything is as it was.

use super::House;
use super::kit::*;
use super::oracle::{Names, dump};
use crate::core::decide::Command;
use crate::core::event::{Event, Selector};
use crate::store::{Expect, StoreError};

pub async fn everything_is_as_before(house: &dyn House) {
    let mut store = house.open().await;
    furnish(&*store).await;
    let names = Names::usual();
    let before = dump(&*store, &names).await;
    for _ in 0..2 {
        store.close().await.unwrap();
        drop(store);
        store = house.open().await;
        assert_eq!(dump(&*store, &names).await, before);
    }
    // And it goes on from there.
    command(&*store, grant_id(7), &gone(4), at(60)).await;
    end(&*store, 1, at(61)).await;
    assert_eq!(store.grant(grant_id(7)).await.unwrap().unwrap().state.word(), "ended");
}

pub async fn a_freeze_epoch_is_never_used_twice(house: &dyn House) {
    let mut seen = Vec::new();
    let freeze = |id| Event::Frozen { id, selector: Selector::All, by: person("eve"), reason: "enough".into() };
    let lift = |id| Event::Unfrozen { id, by: person("eve") };
    let mut n = 1;
    for _ in 0..3 {
        let store = house.open().await;
        // What somebody read before the restart still holds if nothing changed, and only then.
        if let Some(last) = seen.last() {
            let outcome = append_if(&*store, vec![Expect::FreezeEpoch(*last)], ask(n).events()).await;
            outcome.expect("nothing was frozen or lifted since");
            n += 1;
        }
        for event in [freeze(5), lift(5), freeze(2), lift(2)] {
            append(&*store, vec![event], START).await.unwrap();
            let epoch = store.freezes().await.unwrap().epoch;
            assert!(!seen.contains(&epoch), "{epoch} in {seen:?}");
            for old in &seen {
                let outcome = append_if(&*store, vec![Expect::FreezeEpoch(*old)], ask(n).events()).await;
                assert!(matches!(outcome, Err(StoreError::Conflict)), "{old} is long over");
            }
            seen.push(epoch);
        }
        store.close().await.unwrap();
    }
}

pub async fn closed_is_closed(house: &dyn House) {
    let store = house.open().await;
    let grant = ask(1).on(&*store).await;
    // What is on its way when it is closed is finished.
    let mut coming = Box::pin(append(&*store, ask(2).events(), START));
    on_its_way(&*store, coming.as_mut()).await;
    store.close().await.unwrap();
    coming.await.unwrap();
    assert!(!store.is_writable());
    assert!(matches!(append(&*store, ask(3).events(), START).await, Err(StoreError::Unavailable(_))));
    assert!(matches!(store.recover().await, Err(StoreError::Unavailable(_))));
    store.close().await.unwrap();
    assert_eq!(store.grant(grant.id).await.unwrap(), Some(grant), "it can still be read");
    drop(store);
    let store = house.open().await;
    assert!(store.grant(grant_id(2)).await.unwrap().is_some());
    assert!(store.grant(grant_id(3)).await.unwrap().is_none());
}

pub async fn what_a_run_left_half_way(house: &dyn House) {
    let store = house.open().await;
    for n in [1, 2] {
        let grant = ask(n).on(&*store).await;
        command(&*store, grant.id, &intend(&grant, &[n], START), START).await;
    }
    command(&*store, grant_id(2), &live(2), START).await;
    assert_eq!(store.abandoned().await.unwrap(), [], "it is at it");
    store.close().await.unwrap();
    drop(store);
    let store = house.open().await;
    assert_eq!(store.abandoned().await.unwrap(), [(grant_id(1), lease_id(1))]);
    let unknown = Command::Unknown { lease: lease_id(1), why: "left".into(), handle: None, not_before: at(1) };
    command(&*store, grant_id(1), &unknown, at(1)).await;
    assert_eq!(store.abandoned().await.unwrap(), [], "it was said what became of it");
}
