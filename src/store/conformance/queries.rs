//! What can be asked.

use std::sync::Arc;
use std::time::Duration;

use futures::poll;

use super::House;
use super::kit::*;
use crate::core::decide::Command;
use crate::core::digest::Digest;
use crate::core::event::{BrokerEvent, EndCause, Event, Selector};
use crate::core::grant::Grant;
use crate::core::id::{GrantId, Timestamp};
use crate::core::permission::Permission;
use crate::core::vote::Verdict;
use crate::store::Held;
use crate::store::holdings::TASKS_MAX;

const SHORT: Duration = Duration::from_millis(20);

fn ids(grants: &[Arc<Grant>]) -> Vec<GrantId> {
    grants.iter().map(|g| g.id).collect()
}

fn some(ns: impl IntoIterator<Item = u64>) -> Vec<GrantId> {
    ns.into_iter().map(grant_id).collect()
}

fn sorted(mut ids: Vec<GrantId>) -> Vec<GrantId> {
    ids.sort();
    ids
}

pub async fn the_head_is_ahead_of_what_is_durable(house: &dyn House) {
    let store = house.open().await;
    let parent = ask(1).on(&*store).await;
    let child = Ask { parent: Some(Arc::clone(&parent)), ..ask(2) };
    let held = house.hold().await;
    let mut coming = std::pin::pin!(append(&*store, child.events(), START));
    on_its_way(&*store, coming.as_mut()).await;
    assert!(store.head(grant_id(2)).await.unwrap().is_some());
    assert_eq!(ids(&store.subtree(parent.id).await.unwrap()), some([1, 2]));
    assert_eq!(ids(&store.task_grants(&task_key(1, "task")).await.unwrap()), some([1, 2]));
    assert_eq!(store.task_links(&task_key(1, "task")).await.unwrap(), some([1, 2]), "one below is coming");
    assert!(figure(&*store, "store_on_its_way") > 0);
    // Everything else shows what is durable.
    assert_eq!(store.grant(grant_id(2)).await.unwrap(), None);
    assert_eq!(ids(&store.open_grants().await.unwrap()), some([1]));
    assert_eq!(store.open_counts(&agent(1)).await.unwrap(), (0, 1));
    assert_eq!(store.history(&agent(1)).await.unwrap().unwrap().recent, some([1]));
    assert_eq!(store.held(&agent(1), None, START, Some(grant_id(1))).await.unwrap(), Vec::new());
    assert!(store.events(grant_id(2)).await.unwrap().is_empty());
    drop(held);
    coming.await.unwrap();
    assert_eq!(sorted(ids(&store.open_grants().await.unwrap())), some([1, 2]));
    assert_eq!(figure(&*store, "store_on_its_way"), 0);
}

pub async fn waiting_for_a_change(house: &dyn House) {
    let store = house.open().await;
    let grant = pending(1).on(&*store).await;
    // Nothing changes: it takes as long as was said, and gives the grant as it is.
    let started = tokio::time::Instant::now();
    let same = store.changed(grant.id, grant.version, SHORT).await.unwrap();
    assert!(started.elapsed() >= SHORT);
    assert_eq!(same.as_ref(), Some(&grant));
    // It has changed already.
    let now = store.changed(grant.id, grant.version - 1, PATIENCE).await.unwrap();
    assert_eq!(now.as_ref(), Some(&grant));
    // It changes meanwhile, for everybody who waits.
    let wait = |version| {
        let store = Arc::clone(&store);
        tokio::spawn(async move { store.changed(grant_id(1), version, PATIENCE).await.unwrap() })
    };
    let waiting = [wait(grant.version), wait(grant.version)];
    until("two wait", || figure(&*store, "store_watched") == 1).await;
    let active = command(&*store, grant.id, &vote(&grant, "eve", Verdict::Approve), START).await;
    for waiter in waiting {
        assert_eq!(waiter.await.unwrap(), Some(Arc::clone(&active)));
    }
    // Another grant's change wakes nobody for good.
    let other = wait(active.version);
    ask(2).on(&*store).await;
    let over = end(&*store, 1, START).await;
    assert_eq!(other.await.unwrap(), Some(over));
    // One that isn't there (version 0) may come.
    let coming = tokio::spawn({
        let store = Arc::clone(&store);
        async move { store.changed(grant_id(3), 0, PATIENCE).await.unwrap() }
    });
    until("one waits", || figure(&*store, "store_watched") == 1).await;
    let there = ask(3).on(&*store).await;
    assert_eq!(coming.await.unwrap(), Some(there));
    assert_eq!(store.changed(grant_id(4), 0, SHORT).await.unwrap(), None);
    assert_eq!(store.changed(grant_id(4), 1, PATIENCE).await.unwrap(), None, "what was seen is not there: at once");
}

pub async fn waiters_leave_nothing_behind(house: &dyn House) {
    let store = house.open().await;
    let grant = pending(1).on(&*store).await;
    store.changed(grant.id, grant.version, SHORT).await.unwrap();
    for _ in 0..3 {
        let mut first = Box::pin(store.changed(grant.id, grant.version, PATIENCE));
        let mut second = Box::pin(store.changed(grant.id, grant.version, PATIENCE));
        assert!(poll!(first.as_mut()).is_pending());
        assert!(poll!(second.as_mut()).is_pending());
        assert_eq!(figure(&*store, "store_watched"), 1);
        drop(first);
        assert_eq!(figure(&*store, "store_watched"), 1, "the other still waits");
        drop(second); // its client hung up
    }
    assert_eq!(figure(&*store, "store_watched"), 0);
}

pub async fn a_tree_parents_first(house: &dyn House) {
    let store = house.open().await;
    let root = ask(9).on(&*store).await;
    let child = Ask { parent: Some(Arc::clone(&root)), ..ask(5) }.on(&*store).await;
    let other = Ask { parent: Some(Arc::clone(&root)), ..pending(7) }.on(&*store).await;
    let leaf = Ask { parent: Some(Arc::clone(&child)), ..ask(1) }.on(&*store).await;
    ask(2).on(&*store).await;
    let tree = ids(&store.subtree(root.id).await.unwrap());
    assert_eq!(sorted(tree.clone()), some([1, 5, 7, 9]));
    let place = |id| tree.iter().position(|t| *t == id).unwrap();
    assert!(place(root.id) < place(child.id) && place(root.id) < place(other.id) && place(child.id) < place(leaf.id));
    end(&*store, 1, START).await;
    assert_eq!(sorted(ids(&store.subtree(root.id).await.unwrap())), some([5, 7, 9]), "what is final is left out");
    assert_eq!(ids(&store.subtree(child.id).await.unwrap()), some([5]));
    assert_eq!(store.subtree(grant_id(99)).await.unwrap(), Vec::new());
}

pub async fn grants_of_a_task(house: &dyn House) {
    let store = house.open().await;
    ask(1).on(&*store).await;
    pending(2).on(&*store).await;
    Ask { task: "other", ..ask(3) }.on(&*store).await;
    Ask { agent: 2, ..ask(4) }.on(&*store).await;
    Ask { deny: true, ..ask(5) }.on(&*store).await;
    assert_eq!(sorted(ids(&store.task_grants(&task_key(1, "task")).await.unwrap())), some([1, 2]));
    end(&*store, 1, START).await;
    assert_eq!(ids(&store.task_grants(&task_key(1, "task")).await.unwrap()), some([2]));
    assert_eq!(ids(&store.task_grants(&task_key(2, "task")).await.unwrap()), some([4]));
    assert_eq!(store.task_links(&task_key(2, "task")).await.unwrap(), Vec::new(), "it stands alone");
    let parent = Ask { agent: 2, ..ask(6) }.on(&*store).await;
    Ask { parent: Some(parent), task: "other", ..ask(7) }.on(&*store).await;
    assert_eq!(store.task_links(&task_key(2, "task")).await.unwrap(), some([6]));
    assert_eq!(store.task_links(&task_key(1, "other")).await.unwrap(), some([7]));
}

pub async fn counts_of_an_agent(house: &dyn House) {
    let store = house.open().await;
    let counts = || async { store.open_counts(&agent(1)).await.unwrap() };
    assert_eq!(counts().await, (0, 0));
    let first = pending(1).on(&*store).await;
    pending(2).on(&*store).await;
    ask(3).on(&*store).await;
    Ask { agent: 2, ..pending(4) }.on(&*store).await;
    Ask { deny: true, ..ask(5) }.on(&*store).await;
    assert_eq!(counts().await, (2, 3));
    command(&*store, first.id, &vote(&first, "eve", Verdict::Approve), START).await;
    assert_eq!(counts().await, (1, 3));
    command(&*store, grant_id(2), &Command::Cancel, START).await;
    assert_eq!(counts().await, (0, 2));
    end(&*store, 1, START).await;
    end(&*store, 3, START).await;
    assert_eq!(counts().await, (0, 0));
    // Ending is not final.
    with_leases(&*store, ask(6), &[1]).await;
    end(&*store, 6, START).await;
    assert_eq!(counts().await, (0, 1));
    command(&*store, grant_id(6), &gone(1), START).await;
    assert_eq!(counts().await, (0, 0));
}

pub async fn decided_latest_first(house: &dyn House) {
    let store = house.open().await;
    for n in 1..=4 {
        ask(n).on(&*store).await;
    }
    end(&*store, 3, at(10)).await;
    end(&*store, 1, at(30)).await;
    archived(&*store).await;
    end(&*store, 4, at(20)).await;
    end(&*store, 2, at(20)).await;
    let decided = |limit| {
        let store = Arc::clone(&store);
        async move { ids(&store.decided(limit).await.unwrap()) }
    };
    assert_eq!(decided(10).await, some([1, 2, 4, 3]), "in memory and archived");
    archived(&*store).await;
    assert_eq!(decided(10).await, some([1, 2, 4, 3]), "archived");
    assert_eq!(decided(2).await, some([1, 2]));
    assert_eq!(decided(0).await, some([]));
}

pub async fn known_by_its_idempotency_digest(house: &dyn House) {
    let store = house.open().await;
    let (one, two) = (Digest::of_bytes(b"one"), Digest::of_bytes(b"two"));
    Ask { idempotency: Some(one), ..ask(1) }.on(&*store).await;
    ask(2).on(&*store).await;
    let known = |digest: Digest| {
        let store = Arc::clone(&store);
        async move { store.by_idempotency(&digest).await.unwrap().map(|g| (g.id, g.version)) }
    };
    assert_eq!(known(one).await, Some((grant_id(1), 3)));
    assert_eq!(known(two).await, None);
    let over = end(&*store, 1, START).await;
    archived(&*store).await;
    assert_eq!(known(one).await, Some((grant_id(1), over.version)));
}

fn held(n: u64, resource: &str, until: Timestamp) -> Held {
    Held { agent: agent(n), permission: permission(resource), until }
}

pub async fn what_is_held_within_the_window(house: &dyn House) {
    let store = house.open().await;
    let ask_all = |since| {
        let store = Arc::clone(&store);
        async move { store.held(&agent(1), None, since, None).await.unwrap() }
    };
    pending(1).on(&*store).await;
    Ask { deny: true, ..ask(2) }.on(&*store).await;
    assert_eq!(ask_all(START).await, Vec::new(), "what was never in force was never held");
    ask(3).on(&*store).await;
    assert_eq!(ask_all(START).await, [held(1, "db", at(60))]);
    assert_eq!(ask_all(at(1000)).await, [held(1, "db", at(60))], "it goes on until its end is recorded");
    end(&*store, 3, at(30)).await;
    assert_eq!(ask_all(at(30)).await, [held(1, "db", at(30))]);
    assert_eq!(ask_all(at(30).plus_ms(1)).await, Vec::new());
    archived(&*store).await;
    assert_eq!(ask_all(at(30)).await, [held(1, "db", at(30))]);
    // A credential that could not be ended yet is held.
    with_leases(&*store, Ask { at: at(40), ..ask(4) }, &[1]).await;
    end(&*store, 4, at(50)).await;
    assert_eq!(ask_all(at(500)).await, [held(1, "db", at(50))]);
    command(&*store, grant_id(4), &gone(1), at(600)).await;
    assert_eq!(ask_all(at(600)).await, [held(1, "db", at(600))]);
    assert_eq!(ask_all(at(601)).await, Vec::new());
}

pub async fn what_the_owners_agents_hold(house: &dyn House) {
    let store = house.open().await;
    let of = |n: u64, agent, owner, resource: &str| Ask {
        agent,
        owner,
        permissions: vec![permission(resource)],
        life_secs: 60 * n,
        ..ask(n)
    };
    of(1, 1, Some("ana"), "db").on(&*store).await;
    of(2, 2, Some("ana"), "web").on(&*store).await;
    of(3, 3, Some("ana"), "web").on(&*store).await;
    of(4, 4, Some("ben"), "kv").on(&*store).await;
    of(5, 5, None, "kv").on(&*store).await;
    let ask = |n, owner: Option<&'static str>, except: Option<u64>| {
        let store = Arc::clone(&store);
        async move {
            let owner = owner.map(person);
            store.held(&agent(n), owner.as_ref(), START, except.map(grant_id)).await.unwrap()
        }
    };
    assert_eq!(ask(1, None, None).await, [held(1, "db", at(60))]);
    // What two others hold alike is told once, as the one who holds it longest.
    assert_eq!(ask(1, Some("ana"), None).await, [held(1, "db", at(60)), held(3, "web", at(180))]);
    assert_eq!(ask(1, Some("ana"), Some(3)).await, [held(1, "db", at(60)), held(2, "web", at(120))]);
    assert_eq!(ask(9, Some("ben"), None).await, [held(4, "kv", at(240))]);
    // An agent's own is told beside the others'.
    assert_eq!(
        ask(2, Some("ana"), None).await,
        [held(2, "web", at(120)), held(1, "db", at(60)), held(3, "web", at(180))]
    );
    // An agent that changes hands: what it held for ana counts for ana, and for itself.
    of(6, 1, Some("ben"), "kv").on(&*store).await;
    assert_eq!(ask(1, None, None).await, [held(1, "db", at(60)), held(1, "kv", at(360))]);
    assert_eq!(ask(9, Some("ben"), None).await, [held(1, "kv", at(360))]);
    assert_eq!(ask(9, Some("ana"), None).await, [held(1, "db", at(60)), held(3, "web", at(180))]);
}

pub async fn what_only_one_grant_gave(house: &dyn House) {
    let store = house.open().await;
    let two = vec![permission("db"), permission("web")];
    Ask { permissions: two, ..ask(1) }.on(&*store).await;
    Ask { life_secs: 30, ..ask(2) }.on(&*store).await;
    let except = |n| {
        let store = Arc::clone(&store);
        async move { store.held(&agent(1), None, START, Some(grant_id(n))).await.unwrap() }
    };
    assert_eq!(except(1).await, [held(1, "db", at(30))]);
    assert_eq!(except(2).await, [held(1, "db", at(60)), held(1, "web", at(60))]);
}

pub async fn three_grants_of_one_permission(house: &dyn House) {
    let store = house.open().await;
    // The one with the shortest life stays, the others end early: it must not have been forgotten.
    for (n, life_secs) in [(1, 100), (2, 90), (3, 80), (4, 70)] {
        Ask { life_secs, ..ask(n) }.on(&*store).await;
    }
    end(&*store, 1, at(10)).await;
    end(&*store, 2, at(11)).await;
    end(&*store, 3, at(12)).await;
    assert_eq!(store.held(&agent(1), None, at(50), None).await.unwrap(), [held(1, "db", at(70))]);
    assert_eq!(store.held(&agent(1), None, at(50), Some(grant_id(4))).await.unwrap(), Vec::new());
    assert_eq!(store.held(&agent(1), None, at(5), Some(grant_id(4))).await.unwrap(), [held(1, "db", at(12))]);
    end(&*store, 4, at(13)).await;
    assert_eq!(store.held(&agent(1), None, at(5), Some(grant_id(4))).await.unwrap(), [held(1, "db", at(12))]);
}

pub async fn what_a_task_held(house: &dyn House) {
    let mut store = house.open().await;
    let of =
        |n: u64, task: &'static str, resource: &str| Ask { task, permissions: vec![permission(resource)], ..ask(n) };
    of(1, "one", "db").on(&*store).await;
    of(2, "two", "web").on(&*store).await;
    Ask { owner: Some("ben"), ..of(3, "one", "kv") }.on(&*store).await;
    Ask { agent: 2, ..of(4, "one", "mail") }.on(&*store).await;
    end(&*store, 1, at(10)).await;
    let names = |held: Vec<Permission>| held.iter().map(|p| p.resource.to_string()).collect::<Vec<_>>();
    for round in ["as it came", "reopened"] {
        let held = async |task: &str, since, except: Option<u64>| {
            names(store.held_in_task(&task_key(1, task), since, except.map(grant_id)).await.unwrap())
        };
        assert_eq!(held("one", at(10), None).await, ["db", "kv"], "{round}: over within the window, and in force");
        assert_eq!(held("one", at(11), None).await, ["kv"], "{round}: over before");
        assert_eq!(held("one", at(10), Some(3)).await, ["db"], "{round}");
        assert_eq!(held("two", at(10), None).await, ["web"], "{round}");
        assert_eq!(held("three", at(10), None).await, Vec::<String>::new(), "{round}");
        archived(&*store).await;
        store.close().await.unwrap();
        drop(store);
        store = house.open().await;
    }
    // More tasks than are remembered by name: what the earliest held counts for each of them, and is never forgotten.
    for n in 0..=TASKS_MAX as u64 {
        let name: &'static str = Box::leak(format!("many-{n}").into_boxed_str());
        of(100 + n, name, "db").on(&*store).await;
        end(&*store, 100 + n, at(100 + n)).await;
    }
    let held = async |task: &str| names(store.held_in_task(&task_key(1, task), at(10), None).await.unwrap());
    assert_eq!(held("many-100").await, ["db"]);
    assert_eq!(held("many-0").await, ["db"], "the earliest");
    assert_eq!(held("two").await, ["db", "web"], "more than it held, never less");
}

pub async fn history_of_an_agent(house: &dyn House) {
    let store = house.open().await;
    assert_eq!(store.history(&agent(1)).await.unwrap(), None);
    for n in 1..=8 {
        Ask { at: at(n), ..pending(n) }.on(&*store).await;
    }
    let history = |n| {
        let store = Arc::clone(&store);
        async move { store.history(&agent(n)).await.unwrap().unwrap() }
    };
    let now = history(1).await;
    assert_eq!((now.first_seen, now.recent, now.last_active), (at(1), some(3..=8), None));
    let fifth = store.grant(grant_id(5)).await.unwrap().unwrap();
    command(&*store, fifth.id, &vote(&fifth, "eve", Verdict::Approve), at(9)).await;
    assert_eq!(history(1).await.last_active, Some(grant_id(5)));
    for n in 1..=8 {
        end(&*store, n, at(10)).await;
    }
    Ask { agent: 2, ..ask(20) }.on(&*store).await;
    archived(&*store).await;
    until("the agent has left memory", || figure(&*store, "agents_in_memory") == 1).await;
    assert_eq!(history(1).await.last_active, Some(grant_id(5)), "archived");
    Ask { at: at(11), ..ask(9) }.on(&*store).await;
    let now = history(1).await;
    assert_eq!((now.first_seen, now.recent, now.last_active), (at(1), some(4..=9), Some(grant_id(9))), "goes on");
}

pub async fn freezes_that_hold(house: &dyn House) {
    let store = house.open().await;
    let freeze = |id, selector| Event::Frozen { id, selector, by: person("eve"), reason: "enough".into() };
    append(&*store, vec![freeze(9, Selector::All), freeze(3, Selector::Agent(agent(1)))], START).await.unwrap();
    let now = store.freezes().await.unwrap();
    let holding: Vec<_> = now.holding.iter().map(|f| (f.id, f.selector.clone(), f.at)).collect();
    assert_eq!(holding, [(3, Selector::Agent(agent(1)), START), (9, Selector::All, START)]);
    append(&*store, vec![Event::Unfrozen { id: 9, by: person("eve") }], START).await.unwrap();
    let later = store.freezes().await.unwrap();
    assert_eq!(later.holding.iter().map(|f| f.id).collect::<Vec<_>>(), [3]);
    assert!(later.epoch > now.epoch);
}

pub async fn leases_by_name(house: &dyn House) {
    let store = house.open().await;
    let named = |name: &'static str| {
        let store = Arc::clone(&store);
        async move { store.lease_named(name).await.unwrap() }
    };
    let grant = ask(1).on(&*store).await;
    assert_eq!(named("cs_1").await, None);
    let intended = events_of(&grant, &intend(&grant, &[1], START), START);
    let held = house.hold().await;
    let mut coming = std::pin::pin!(append(&*store, intended, START));
    on_its_way(&*store, coming.as_mut()).await;
    assert_eq!(named("cs_1").await, Some((grant.id, lease_id(1))), "a sweep must not take it for an orphan");
    drop(held);
    coming.await.unwrap();
    assert_eq!(named("cs_1").await, Some((grant.id, lease_id(1))));
    command(&*store, grant.id, &live(1), START).await;
    end(&*store, 1, START).await;
    assert_eq!(named("cs_1").await, Some((grant.id, lease_id(1))), "until there is proof");
    command(&*store, grant.id, &gone(1), START).await;
    assert_eq!(named("cs_1").await, None);
}

pub async fn events_of_a_grant(house: &dyn House) {
    let store = house.open().await;
    assert!(store.events(grant_id(1)).await.unwrap().is_empty());
    let asked = Ask { at: at(1), ..ask(1) };
    asked.on(&*store).await;
    ask(2).on(&*store).await;
    let over = end(&*store, 1, at(2)).await;
    let expected = store.events(over.id).await.unwrap();
    assert_eq!(expected.iter().map(|r| r.seq).collect::<Vec<_>>(), [1, 2, 3, 7, 8]);
    assert_eq!(expected.iter().map(|r| r.at).collect::<Vec<_>>(), [at(1), at(1), at(1), at(2), at(2)]);
    assert_eq!(expected[..3].iter().map(|r| r.event.clone()).collect::<Vec<_>>(), asked.events());
    archived(&*store).await;
    assert_eq!(store.events(over.id).await.unwrap(), expected, "archived");
}

pub async fn figures_and_the_last_run(house: &dyn House) {
    let store = house.open().await;
    assert_eq!(store.last_run().await.unwrap(), (None, Timestamp(0)));
    let run = BrokerEvent::RunStarted {
        version: "1".into(),
        boot_id: "boot".into(),
        boot_ms: 5,
        wall: START,
        starts_at: START,
        clock_set_back: false,
    };
    append(&*store, vec![Event::Broker { what: run.clone() }], at(1)).await.unwrap();
    ask(1).on(&*store).await;
    ask(2).on(&*store).await;
    end(&*store, 1, at(7)).await;
    assert_eq!(store.last_run().await.unwrap(), (None, Timestamp(0)), "as it was opened");
    assert_eq!((figure(&*store, "grants_open"), figure(&*store, "holdings")), (1, 1));
    assert_eq!(figure(&*store, "journal_records"), 9);
    let ended = Event::Broker { what: BrokerEvent::RunEnded };
    append(&*store, vec![ended.clone()], at(8)).await.unwrap();
    // Of a run whose clock was set back and whose start couldn't be recorded: that it was is seen by the next one.
    append(&*store, vec![ended.clone()], at(3)).await.unwrap();
    store.close().await.unwrap();
    drop(store);
    let store = house.open().await;
    assert_eq!(store.last_run().await.unwrap(), (Some(run.clone()), at(8)));
    // And of one whose start is on record.
    append(&*store, vec![Event::Broker { what: run.clone() }], at(4)).await.unwrap();
    append(&*store, vec![ended], at(2)).await.unwrap();
    store.close().await.unwrap();
    drop(store);
    let store = house.open().await;
    assert_eq!(store.last_run().await.unwrap(), (Some(run), at(4)));
    assert_eq!(figure(&*store, "grants_open"), 1);
    let _ = command(&*store, grant_id(2), &Command::Finish { cause: EndCause::AgentLost }, at(9)).await;
}
