//! Bugs that others had in the life of a credential, by the numbers under which docs/regressions.md has them.

#[path = "support/house.rs"]
mod house;
#[path = "support/mod.rs"]
mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use countersign::broker::BrokerError;
use countersign::core::event::EndCause;
use countersign::core::grant::GrantState;
use countersign::core::lease::LeaseState;
use countersign::store::memory;
use house::{House, Moved, Puppet, until};
use serde_json::json;

async fn house() -> House {
    let house = House::open(memory::store(), Arc::new(Moved::default())).await;
    house.broker.drive();
    house
}

/// Nothing is renewed here: what comes nearest is a credential that is minted anew in the last moments of its grant.
#[tokio::test]
async fn l1_one_that_is_minted_anew_in_the_last_second_ends_with_its_grant() {
    let house = house().await;
    for ms_left in [2_500, 1_500, 900, 100] {
        let id = house.asked("api/notes", 60).await;
        house.collect(id).await.unwrap();
        let ends_at = house.grant(id).await.ends_at().unwrap();
        house.clock.pass(Duration::from_millis(ends_at.ms_since(house.broker.now()) - ms_left));
        match house.broker.credentials(&house.agent(), id, true, None).await {
            Ok(issued) => {
                let exp: u64 = issued.credentials[0].credential.public["expires_at"].parse().unwrap();
                assert!(exp * 1000 <= ends_at.0, "{ms_left} ms before the end: {exp} is after {}", ends_at.0);
            }
            Err(error) => assert!(ms_left < 2_000, "{ms_left}: {error:?}"),
        }
        let grant = house.grant(id).await;
        assert!(grant.leases.values().all(|l| l.not_after.is_none_or(|at| at <= ends_at)), "{:?}", grant.leases);
        house.clock.pass(Duration::from_secs(10));
        until("all of it is over", async || house.word(id).await == "ended").await;
    }
}

#[tokio::test]
async fn l2_a_child_never_outlives_its_parent() {
    let house = house().await;
    let child_of = async |parent, life_secs: u64| {
        let wanted = json!({
            "task": "T-1", "intent": "a part of it", "life_secs": life_secs, "parent": parent,
            "authorization_details": [{ "type": "token", "identifier": "puppet/one", "actions": ["read"] }],
        });
        house.broker.request(&house.agent(), serde_json::from_value(wanted).unwrap(), None).await.unwrap().id
    };
    let (parent, _) = house.holds("puppet/one", 100).await;
    house.clock.pass(Duration::from_secs(50));
    let child = child_of(parent, 600).await;
    let grandchild = child_of(child, 600).await;
    let ends_at = house.grant(parent).await.ends_at();
    for id in [child, grandchild] {
        assert!(house.grant(id).await.ends_at() <= ends_at);
        house.collect(id).await.unwrap();
    }
    house.complete(parent).await;
    for id in [child, grandchild] {
        let state = house.grant(id).await.state.clone();
        let (GrantState::Ending { cause, .. } | GrantState::Ended { cause, .. }) = state else { panic!("{state:?}") };
        assert_eq!(cause, EndCause::ParentEnded, "in the very same write");
        until("its credential is gone", async || house.word(id).await == "ended").await;
    }
}

#[tokio::test]
async fn l8_what_comes_with_an_error_is_not_released_and_is_ended() {
    let house = house().await;
    house.puppet.loses_mints.store(true, SeqCst);
    let id = house.asked("puppet/one", 600).await;
    let refused = house.collect(id).await.unwrap_err();
    assert!(matches!(refused, BrokerError::NotNow { .. }), "{refused:?}");
    assert!(matches!(house.lease(id).await, LeaseState::Unknown { .. }), "it may exist");
    assert!(house.puppet.tried.lock().is_empty(), "and may still be on its way");
    house.clock.pass(Puppet::MINT_DEADLINE + Duration::from_secs(1));
    until("it is ended, though its grant is in force", async || house.grant(id).await.open_leases().count() == 0).await;
    assert_eq!(house.puppet.tried.lock().len(), 1);
    assert_eq!(house.word(id).await, "active");
}
