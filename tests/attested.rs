//! "That cluster was deleted last week. Its credentials can never be proven gone, and I say so; nobody calls it a proof."

#[path = "support/house.rs"]
mod house;
#[path = "support/mod.rs"]
mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use countersign::broker::BrokerError;
use countersign::connector::{Away, Extent, Found};
use countersign::core::event::{BrokerEvent, Event};
use countersign::core::id::GrantId;
use countersign::core::lease::{Absence, LeaseState};
use countersign::store::memory::{self, MemoryLog};
use countersign::wire::reviewer::AttestOf;
use house::{House, Moved, until};
use serde_json::json;

fn away(extent: Extent) -> Away {
    Away { why: "can't connect".to_owned(), extent }
}

/// A grant whose credential can't be ended: its target is away.
async fn resisting(house: &House) -> GrantId {
    let (id, _) = house.holds("puppet/one", 600).await;
    house.complete(id).await;
    until("it was tried in vain", async || house.attempts(id).await.0 > 0).await;
    id
}

fn not_absent(error: BrokerError) -> String {
    let BrokerError::NotAbsent { why } = error else { panic!("{error:?}") };
    why
}

#[tokio::test]
async fn an_operators_word_ends_what_a_target_that_is_gone_holds_and_is_shown_as_that() {
    let house = House::open(memory::store(), Arc::new(Moved::default())).await;
    *house.puppet.away.lock() = Some(away(Extent::Silent));
    house.broker.drive();
    let id = resisting(&house).await;
    let operator = house.person("chen", &["operators"]);
    let of = AttestOf::Grant(id);

    let nobody = house.person("ana", &["reviewers", "security"]);
    let refused = house.broker.attest_absent(&nobody, &of, "deleted").await.unwrap_err();
    assert!(matches!(refused, BrokerError::NotAllowed(_)), "{refused:?}");
    for reason in ["", "two\u{7}bells"] {
        let refused = house.broker.attest_absent(&operator, &of, reason).await.unwrap_err();
        assert!(matches!(refused, BrokerError::Invalid { field: "reason", .. }), "{refused:?}");
    }

    let result = house.broker.attest_absent(&operator, &of, "cluster deleted, CHG-1204").await.unwrap();
    assert_eq!((result.attested.len(), result.left.len()), (1, 0));
    assert_eq!(house.word(id).await, "ended");
    let LeaseState::Absent { absence: Absence::Attested { by, reason }, .. } = house.lease(id).await else {
        panic!("{:?}", house.lease(id).await)
    };
    assert_eq!((by.as_str(), reason.as_str()), ("chen", "cluster deleted, CHG-1204"));
    let seen = house.broker.view(&*house.grant(id).await);
    let lease = &seen.leases[0];
    assert!(lease.state == "absent" && lease.evidence.is_none() && lease.attested.is_some(), "{lease:?}");
    let record = house.broker.store.events(id).await.unwrap();
    assert!(!serde_json::to_string(&record.iter().map(|r| &r.event).collect::<Vec<_>>()).unwrap().contains("evidence"));
    let told: Vec<_> = record
        .iter()
        .map(|r| countersign::wire::words::event(&r.event, &|_| "Chen Wei".to_owned()))
        .filter(|t| t.source == "person")
        .collect();
    let expected = "not proven: Chen Wei attests that its target no longer exists: “cluster deleted, CHG-1204”";
    assert!(told.iter().any(|t| t.says == expected), "{told:?}");
    // Once is enough.
    let why = not_absent(house.broker.attest_absent(&operator, &of, "again").await.unwrap_err());
    assert!(why.contains("no credential of it is open"), "{why}");
}

#[tokio::test]
async fn nothing_is_attested_while_anything_answers_there_or_nothing_has_failed() {
    let house = House::open(memory::store(), Arc::new(Moved::default())).await;
    *house.puppet.away.lock() = Some(away(Extent::Silent));
    house.broker.drive();
    let id = resisting(&house).await;
    let (live, live_lease) = house.holds("puppet/two", 600).await;
    let operator = house.person("chen", &["operators"]);
    for extent in [Extent::Refuses, Extent::Behind] {
        *house.puppet.away.lock() = Some(away(extent));
        let error = house.broker.attest_absent(&operator, &AttestOf::Grant(id), "deleted").await.unwrap_err();
        let why = not_absent(error);
        assert!(why.contains("answers at the address of puppet"), "{why}");
    }
    *house.puppet.away.lock() = Some(away(Extent::Silent));
    let error = house.broker.attest_absent(&operator, &AttestOf::Lease(live_lease), "deleted").await.unwrap_err();
    assert!(not_absent(error).contains("no ending of this credential has failed"));
    // Of all at the target, only what was tried in vain.
    let of = AttestOf::Target("puppet".parse().unwrap());
    let result = house.broker.attest_absent(&operator, &of, "deleted").await.unwrap();
    assert_eq!((result.attested[0].grant, result.left[0].grant), (id, live));
    assert!(matches!(house.lease(live).await, LeaseState::Live { .. }));
    // It answers: what resists is for the broker.
    *house.puppet.away.lock() = None;
    let (stubborn, lease) = house.holds("puppet/one", 600).await;
    house.puppet.resists.lock().insert(lease);
    house.complete(stubborn).await;
    until("it resists", async || house.attempts(stubborn).await.0 > 0).await;
    let error = house.broker.attest_absent(&operator, &AttestOf::Lease(lease), "deleted").await.unwrap_err();
    assert!(not_absent(error).contains("puppet answers"));
    house.puppet.resists.lock().clear();
    until("it is over, by proof", async || house.word(stubborn).await == "ended").await;
    assert!(matches!(house.lease(stubborn).await, LeaseState::Revoked { .. }));
}

#[tokio::test]
async fn what_was_attested_away_and_shows_up_is_an_orphan_and_is_ended() {
    let house = House::open(memory::store(), Arc::new(Moved::default())).await;
    *house.puppet.away.lock() = Some(away(Extent::Silent));
    house.broker.drive();
    let id = resisting(&house).await;
    let name = house.grant(id).await.leases.values().next().unwrap().intent.name.clone();
    let operator = house.person("chen", &["operators"]);
    house.broker.attest_absent(&operator, &AttestOf::Grant(id), "deleted").await.unwrap();
    // It was not gone at all.
    house.puppet.found.lock().push(Found { name: name.clone(), handle: json!({ "key": "key of puppet/one" }) });
    house.puppet.found_endings.add_permits(1);
    *house.puppet.away.lock() = None;
    until("a sweep ends it", async || house.puppet.found.lock().is_empty()).await;
    assert_eq!(house.puppet.found_tried.lock().as_slice(), std::slice::from_ref(&name));
    assert!(matches!(house.lease(id).await, LeaseState::Absent { absence: Absence::Attested { .. }, .. }), "final");
}

#[tokio::test]
async fn a_target_that_left_the_catalogue_can_be_attested_gone() {
    let (log, clock) = (MemoryLog::default(), Arc::new(Moved::default()));
    let house = House::open(memory::reopen(log.clone()).unwrap(), Arc::clone(&clock)).await;
    let (id, lease) = house.holds("puppet/one", 600).await;
    house.puppet.resists.lock().insert(lease);
    house.complete(id).await;
    house.broker.stop(std::time::Duration::from_millis(10)).await;
    let house = House::open_without_puppet(memory::reopen(log).unwrap(), clock).await;
    house.broker.drive();
    until("it can't be asked", async || house.attempts(id).await.0 > 0).await;
    let LeaseState::Revoking { progress, .. } = house.lease(id).await else { panic!() };
    let error = progress.last_error.unwrap();
    assert!(
        error.contains("no longer in the catalogue") && error.contains("--force-absent --target puppet"),
        "{error}"
    );
    let operator = house.person("chen", &["operators"]);
    house.broker.attest_absent(&operator, &AttestOf::Lease(lease), "decommissioned").await.unwrap();
    assert_eq!(house.word(id).await, "ended");
    let evidence = |r: &Event| matches!(r, Event::Broker { what: BrokerEvent::OrphanGone { .. } });
    assert!(!house.broker.store.events(id).await.unwrap().iter().any(|r| evidence(&r.event)));
    assert_eq!(house.puppet.probes.load(SeqCst), 0);
}
