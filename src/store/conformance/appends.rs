//! What `append` promises: all or nothing, nothing on what has changed, everything in order.

use std::sync::Arc;

use super::House;
use super::kit::*;
use crate::core::decide::Command;
use crate::core::digest::Digest;
use crate::core::event::{BrokerEvent, EndCause, Event, GrantEvent, Selector};
use crate::core::grant::Grant;
use crate::store::{Batch, Expect, StoreError};

fn is_conflict<T>(outcome: &Result<T, StoreError>) -> bool {
    matches!(outcome, Err(StoreError::Conflict))
}

fn note() -> Event {
    Event::Broker { what: BrokerEvent::RunEnded }
}

fn freeze(id: u64) -> Event {
    Event::Frozen { id, selector: Selector::All, by: person("eve"), reason: "enough".into() }
}

pub async fn all_or_nothing(house: &dyn House) {
    let store = house.open().await;
    let there = ask(1).on(&*store).await;
    let before = figure(&*store, "journal_records");
    // The second half can't be: nothing of the first is there.
    let mut events = ask(2).events();
    events.extend(numbered(there.id, there.version, vec![GrantEvent::Lapsed]));
    let outcome = append(&*store, events, START).await;
    assert!(matches!(&outcome, Err(StoreError::Impossible(_))), "{outcome:?}");
    let mut events = ask(2).events();
    events.extend(numbered(there.id, there.version + 1, vec![GrantEvent::Ending { cause: EndCause::Completed }]));
    assert!(is_conflict(&append(&*store, events, START).await));
    assert_eq!(store.grant(grant_id(2)).await.unwrap(), None);
    assert_eq!(store.head(grant_id(2)).await.unwrap(), None);
    assert_eq!(store.head(there.id).await.unwrap(), Some(there));
    assert_eq!(figure(&*store, "journal_records"), before);
    assert_eq!(figure(&*store, "store_on_its_way"), 0);
    ask(2).on(&*store).await;
}

pub async fn numbers_go_on_without_gaps(house: &dyn House) {
    let store = house.open().await;
    let first = append(&*store, ask(1).events(), START).await.unwrap();
    assert_eq!((first.first_seq, first.last_seq), (1, 3));
    let second = append(&*store, vec![note()], START).await.unwrap();
    assert_eq!((second.first_seq, second.last_seq), (4, 4));
    store.close().await.unwrap();
    drop(store);
    let store = house.open().await;
    assert_eq!(append(&*store, vec![note()], START).await.unwrap().first_seq, 5);
}

pub async fn versions_are_compared(house: &dyn House) {
    let store = house.open().await;
    let seen = ask(1).on(&*store).await;
    let end = events_of(&seen, &finish(), START);
    append(&*store, end.clone(), START).await.unwrap();
    assert!(is_conflict(&append(&*store, end.clone(), START).await), "twice");
    assert!(is_conflict(&append(&*store, ask(1).events(), START).await), "the same id again");
    archived(&*store).await;
    assert!(is_conflict(&append(&*store, end, START).await), "twice, after it left memory");
    assert!(is_conflict(&append(&*store, ask(1).events(), START).await), "the same id, after it left memory");
    // Final means final (guarantee 11), whatever the version.
    let over = store.grant(grant_id(1)).await.unwrap().unwrap();
    let again = numbered(over.id, over.version, vec![GrantEvent::Ending { cause: EndCause::Completed }]);
    assert!(matches!(append(&*store, again, START).await, Err(StoreError::Impossible(_))));
    assert_eq!(figure(&*store, "store_conflicts"), 4);
}

pub async fn grants_that_are_only_read_are_compared(house: &dyn House) {
    let store = house.open().await;
    let read = ask(1).on(&*store).await;
    let expect = || vec![Expect::Version(read.id, read.version)];
    append_if(&*store, expect(), ask(2).events()).await.unwrap();
    end(&*store, 1, START).await;
    assert!(is_conflict(&append_if(&*store, expect(), ask(3).events()).await));
    archived(&*store).await;
    assert!(is_conflict(&append_if(&*store, expect(), ask(3).events()).await));
    let over = store.grant(read.id).await.unwrap().unwrap();
    append_if(&*store, vec![Expect::Version(over.id, over.version)], ask(3).events()).await.unwrap();
    let unknown = vec![Expect::Version(grant_id(99), 1)];
    assert!(is_conflict(&append_if(&*store, unknown, ask(4).events()).await));
}

pub async fn a_completed_task_takes_no_more(house: &dyn House) {
    let store = house.open().await;
    let open = || vec![Expect::TaskOpen(task_key(1, "task"))];
    append_if(&*store, open(), ask(1).events()).await.unwrap();
    let completed = || vec![Event::TaskCompleted { task: task_key(1, "task") }];
    assert!(is_conflict(&append(&*store, completed(), START).await), "one of its grants is in force");
    end(&*store, 1, START).await;
    let held = house.hold().await;
    let mut completing = std::pin::pin!(append(&*store, completed(), START));
    on_its_way(&*store, completing.as_mut()).await;
    assert!(!store.task_completed(&task_key(1, "task")).await.unwrap(), "not durable yet");
    drop(held);
    assert!(is_conflict(&append_if(&*store, open(), ask(2).events()).await), "on its way");
    assert!(store.task_completed(&task_key(1, "task")).await.unwrap(), "after a conflict it can be read");
    completing.await.unwrap();
    assert!(is_conflict(&append_if(&*store, open(), ask(2).events()).await), "in memory");
    archived(&*store).await;
    assert!(store.task_completed(&task_key(1, "task")).await.unwrap());
    assert!(is_conflict(&append_if(&*store, open(), ask(2).events()).await), "archived");
    // The same name of another agent is another task.
    assert!(!store.task_completed(&task_key(2, "task")).await.unwrap());
    append_if(&*store, vec![Expect::TaskOpen(task_key(2, "task"))], ask(2).events()).await.unwrap();
}

pub async fn a_task_is_completed_with_the_last_of_its_grants(house: &dyn House) {
    let store = house.open().await;
    let completed = || Event::TaskCompleted { task: task_key(1, "task") };
    let [first, second] = [ask(1).on(&*store).await, pending(2).on(&*store).await];
    let with = |grants: &[&Grant]| -> Vec<Event> {
        grants.iter().flat_map(|g| events_of(g, &finish(), START)).chain([completed()]).collect()
    };
    assert!(is_conflict(&append(&*store, with(&[&first]), START).await), "one still waits");
    // One that is on its way counts, and so does one of the same batch.
    let held = house.hold().await;
    let mut coming = std::pin::pin!(append(&*store, ask(3).events(), START));
    on_its_way(&*store, coming.as_mut()).await;
    assert!(is_conflict(&append(&*store, with(&[&first, &second]), START).await), "one is on its way");
    drop(held);
    coming.await.unwrap();
    let third = store.grant(grant_id(3)).await.unwrap().unwrap();
    let mut and_one_more = with(&[&first, &second, &third]);
    and_one_more.extend(ask(4).events());
    assert!(is_conflict(&append(&*store, and_one_more, START).await), "one is made by the same batch");
    assert_eq!(store.grant(first.id).await.unwrap().unwrap().version, first.version, "nothing of it is there");
    // Another task of the agent, the same name of another agent, and what only waits for proofs, are in nobody's way.
    Ask { task: "other", ..ask(5) }.on(&*store).await;
    Ask { agent: 2, ..ask(6) }.on(&*store).await;
    with_leases(&*store, ask(7), &[1]).await;
    end(&*store, 7, START).await;
    append(&*store, with(&[&first, &second, &third]), START).await.unwrap();
    assert!(store.task_completed(&task_key(1, "task")).await.unwrap());
}

pub async fn open_grants_are_counted_with_what_is_on_its_way(house: &dyn House) {
    let store = house.open().await;
    let below = |pending, open| vec![Expect::OpenBelow { agent: agent(1), pending, open }];
    append_if(&*store, below(1, 1), pending(1).events()).await.unwrap();
    assert!(is_conflict(&append_if(&*store, below(1, 9), pending(2).events()).await), "one is pending");
    assert!(is_conflict(&append_if(&*store, below(9, 1), ask(2).events()).await), "one is open");
    append_if(&*store, below(2, 2), ask(2).events()).await.unwrap();
    // Many at once: none sees the others, and no more than fit come in.
    let many = (10..30).map(|n| append_if(&*store, below(4, 9), pending(n).events()));
    let came_in = futures::future::join_all(many).await.iter().filter(|o| o.is_ok()).count();
    assert_eq!((came_in, store.open_counts(&agent(1)).await.unwrap()), (3, (4, 5)));
    // Other agents' don't count; what is over makes room.
    Ask { agent: 2, ..pending(31) }.on(&*store).await;
    assert!(is_conflict(&append_if(&*store, below(9, 5), ask(32).events()).await));
    end(&*store, 2, START).await;
    append_if(&*store, below(9, 5), ask(32).events()).await.unwrap();
}

pub async fn freezes_are_compared(house: &dyn House) {
    let store = house.open().await;
    let seen = store.freezes().await.unwrap().epoch;
    append_if(&*store, vec![Expect::FreezeEpoch(seen)], ask(1).events()).await.unwrap();
    let held = house.hold().await;
    let mut freezing = std::pin::pin!(append(&*store, vec![freeze(7)], START));
    on_its_way(&*store, freezing.as_mut()).await;
    drop(held);
    let outcome = append_if(&*store, vec![Expect::FreezeEpoch(seen)], ask(2).events()).await;
    assert!(is_conflict(&outcome), "on its way");
    assert_eq!(store.freezes().await.unwrap().holding.len(), 1, "after a conflict it can be read");
    freezing.await.unwrap();
    let frozen = store.freezes().await.unwrap().epoch;
    assert!(is_conflict(&append_if(&*store, vec![Expect::FreezeEpoch(seen)], ask(2).events()).await));
    append_if(&*store, vec![Expect::FreezeEpoch(frozen)], ask(2).events()).await.unwrap();
    append(&*store, vec![Event::Unfrozen { id: 7, by: person("eve") }], START).await.unwrap();
    for old in [seen, frozen] {
        assert!(is_conflict(&append_if(&*store, vec![Expect::FreezeEpoch(old)], ask(3).events()).await));
    }
}

pub async fn one_grant_for_one_idempotency_digest(house: &dyn House) {
    let store = house.open().await;
    let idempotency = Some(Digest::of_bytes(b"key"));
    let twin = |n| Ask { idempotency, ..ask(n) };
    twin(1).on(&*store).await;
    assert!(is_conflict(&append(&*store, twin(2).events(), START).await), "open");
    end(&*store, 1, START).await;
    archived(&*store).await;
    assert!(is_conflict(&append(&*store, twin(2).events(), START).await), "archived");
    assert_eq!(store.grant(grant_id(2)).await.unwrap(), None);
}

pub async fn two_twins_on_their_way(house: &dyn House) {
    let store = house.open().await;
    let idempotency = Some(Digest::of_bytes(b"key"));
    let twin = |n| Ask { idempotency, ..ask(n) };
    let held = house.hold().await;
    let mut first = std::pin::pin!(append(&*store, twin(1).events(), START));
    on_its_way(&*store, first.as_mut()).await;
    drop(held);
    assert!(is_conflict(&append(&*store, twin(2).events(), START).await));
    let known = store.by_idempotency(&Digest::of_bytes(b"key")).await.unwrap();
    assert_eq!(known.map(|g| g.id), Some(grant_id(1)), "after a conflict it can be read");
    first.await.unwrap();
    // And whoever only asks waits for what is on its way, and is told only what is durable.
    let other = Some(Digest::of_bytes(b"other"));
    let third = Ask { idempotency: other, ..ask(3) };
    let held = house.hold().await;
    let mut third = std::pin::pin!(append(&*store, third.events(), START));
    on_its_way(&*store, third.as_mut()).await;
    drop(held);
    let known = store.by_idempotency(&Digest::of_bytes(b"other")).await.unwrap().unwrap();
    assert_eq!(store.grant(known.id).await.unwrap(), Some(known));
    third.await.unwrap();
}

pub async fn children_end_with_their_parent(house: &dyn House) {
    let store = house.open().await;
    let parent = ask(1).on(&*store).await;
    let child = |n| Ask { parent: Some(Arc::clone(&parent)), agent: 2, ..ask(n) };
    child(2).on(&*store).await;
    let alone = events_of(&parent, &finish(), START);
    assert!(is_conflict(&append(&*store, alone.clone(), START).await), "its child would stay in force");
    let with_first = |child: &crate::core::grant::Grant| {
        let mut all = alone.clone();
        all.extend(events_of(child, &Command::Finish { cause: EndCause::ParentEnded }, START));
        all
    };
    let first = store.head(grant_id(2)).await.unwrap().unwrap();
    // One that came after the list was made, and waits for a vote.
    let second = Ask { approvals: 1, ..child(3) };
    let held = house.hold().await;
    let mut coming = std::pin::pin!(append(&*store, second.events(), START));
    on_its_way(&*store, coming.as_mut()).await;
    assert!(is_conflict(&append(&*store, with_first(&first), START).await), "one is on its way");
    drop(held);
    coming.await.unwrap();
    end_tree(&*store, 1, START).await;
    assert!(store.open_grants().await.unwrap().is_empty());
    // When its time is up, that of its children is too: each may be recorded alone.
    let parent = ask(4).on(&*store).await;
    Ask { parent: Some(Arc::clone(&parent)), ..ask(5) }.on(&*store).await;
    append(&*store, events_of(&parent, &Command::Tick, at(60)), at(60)).await.unwrap();
}

pub async fn many_at_once_in_order(house: &dyn House) {
    let store = house.open().await;
    let grant = ask(1).on(&*store).await;
    let callers = (0..16u64).map(|caller| {
        let (store, id) = (Arc::clone(&store), grant.id);
        tokio::spawn(async move {
            let mut mine = Vec::new();
            for i in 0..20u64 {
                let n = 100 + caller * 100 + i;
                mine.push(append(&*store, ask(n).events(), START).await.unwrap().first_seq);
                // All of them on one grant, too: whoever is late reads again.
                loop {
                    let now = store.head(id).await.unwrap().unwrap();
                    let report = GrantEvent::Invoked { invocation: invocation(n) };
                    match append(&*store, numbered(id, now.version, vec![report]), START).await {
                        Ok(_) => break,
                        Err(StoreError::Conflict) => tokio::task::yield_now().await,
                        Err(other) => panic!("{other}"),
                    }
                }
            }
            assert!(mine.is_sorted());
        })
    });
    for caller in futures::future::join_all(callers).await {
        caller.unwrap();
    }
    let after = store.grant(grant.id).await.unwrap().unwrap();
    assert_eq!((after.version, after.invocations.len()), (grant.version + 320, 320));
    assert_eq!(figure(&*store, "store_on_its_way"), 0);
    let events = store.events(grant.id).await.unwrap();
    assert!(events.iter().map(|r| r.seq).is_sorted_by(|a, b| a < b));
    let versions: Vec<u64> = events.iter().filter_map(|r| version_of(&r.event)).collect();
    assert_eq!(versions, (1..=after.version).collect::<Vec<_>>());
}

fn version_of(event: &Event) -> Option<u64> {
    match event {
        Event::Grant { version, .. } => Some(*version),
        _ => None,
    }
}

fn invocation(n: u64) -> crate::core::event::Invocation {
    crate::core::event::Invocation {
        tool: format!("tool-{n}"),
        arguments_digest: None,
        arguments: None,
        status: "ok".into(),
        started_at: None,
        ended_at: None,
    }
}

pub async fn limits_of_a_batch(house: &dyn House) {
    let store = house.open().await;
    let impossible = |outcome: Result<_, StoreError>| matches!(outcome, Err(StoreError::Impossible(_)));
    assert!(impossible(append(&*store, Vec::new(), START).await));
    let most = crate::store::BATCH_EVENTS_MAX;
    assert!(impossible(append(&*store, vec![note(); most + 1], START).await));
    append(&*store, vec![note(); most], START).await.unwrap();
    assert!(store.is_writable());
}

pub async fn a_caller_that_goes_away_changes_nothing(house: &dyn House) {
    let store = house.open().await;
    {
        let urgent = Batch { urgent: true, ..batch(ask(1).events(), START) };
        let mut gone = Box::pin(store.append(urgent));
        on_its_way(&*store, gone.as_mut()).await;
    }
    let grant = store.changed(grant_id(1), 0, PATIENCE).await.unwrap().unwrap();
    assert_eq!(store.head(grant.id).await.unwrap(), Some(grant));
    assert_eq!(figure(&*store, "store_on_its_way"), 0);
}
