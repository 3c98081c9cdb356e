//! "What was ended stays ended, whoever went away in between and whatever the journal can take": the broker's own parts in
//! one process, with a journal that refuses on demand, and a real PostgreSQL.

#[path = "support/broker.rs"]
mod broker;
#[path = "support/inside.rs"]
mod inside;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use broker::agent::{Login, customers, notes, request, sandbox};
use broker::{Plan, until, until_within};
use countersign::broker::BrokerError;
use countersign::broker::mint::Issued;
use countersign::broker::vote::{Reviewer, Via};
use countersign::core::event::{BrokerEvent, EndCause, Event, GrantEvent, Invocation, Selector};
use countersign::core::grant::GrantState;
use countersign::core::id::{GrantId, TaskName};
use countersign::core::vote::Verdict;
use countersign::keys::random::{SystemRandom, grant_id};
use countersign::store::Store as _;
use countersign::wire::reviewer::VoteRequest;
use futures::poll;
use inside::{Inside, Takes, agent, person};
use serde_json::json;

/// From an ending that can't be recorded to no access.
const CUT: Duration = Duration::from_secs(10);

fn ana() -> Reviewer {
    person("ana", &["reviewers", "db-owners"])
}
fn chen() -> Reviewer {
    person("chen", &["security", "auditors", "operators"])
}
fn dora() -> Reviewer {
    person("dora", &[])
}

fn frozen(id: u64) -> Event {
    Event::Frozen { id, selector: Selector::All, by: chen().person, reason: "an incident".to_owned() }
}

async fn approving(one: &Inside, id: GrantId) -> VoteRequest {
    let digest = one.grant(id).await.assessed.as_ref().unwrap().digest;
    VoteRequest { verdict: Verdict::Approve, digest, reason: None }
}

fn cause(state: &GrantState) -> Option<&EndCause> {
    match state {
        GrantState::Ending { cause, .. } | GrantState::Ended { cause, .. } | GrantState::Withdrawn { cause, .. } => {
            Some(cause)
        }
        _ => None,
    }
}

fn login(issued: &Issued) -> Login {
    let one = &issued.credentials[0];
    Login {
        user: one.credential.public["user"].clone(),
        password: one.credential.secret["password"].expose().to_owned(),
        database: one.credential.public["dbname"].clone(),
        lease: one.lease.to_string(),
    }
}

#[tokio::test]
async fn a_freeze_that_was_only_recorded_is_enforced_by_the_next_start_and_by_each_round() {
    let mut one = Inside::new(Plan::default(), "broker_endings").await.unwrap();
    one.start_up().await.unwrap();
    let ops = agent("ops");
    let live = one.ask(&ops, request("T-1", notes())).await.unwrap().id;
    let waits = one.ask(&ops, request("T-1", customers("read"))).await.unwrap().id;
    let vote = approving(&one, waits).await;
    // The broker stopped between the two halves of the kill switch.
    one.write(vec![frozen(7)]).await;
    assert!(one.grant(live).await.ends_at().is_some());
    let refused = one.broker.vote(&ana(), waits, &vote).await;
    assert!(matches!(refused, Err(BrokerError::Frozen { .. })), "{refused:?}");

    one.stop_and_reopen().await;
    one.start_up().await.unwrap();
    for id in [live, waits] {
        let grant = one.grant(id).await;
        assert_eq!(cause(&grant.state), Some(&EndCause::Frozen { id: 7 }), "{:?}", grant.state);
    }
    // And one that was recorded while it runs, by a handler that went away.
    one.broker.unfreeze(&chen(), 7).await.unwrap();
    let live = one.ask(&ops, request("T-1", notes())).await.unwrap().id;
    one.broker.drive();
    one.write(vec![frozen(8)]).await;
    until("the room is emptied", async || one.grant(live).await.state.is_final()).await;
    assert_eq!(cause(&one.grant(live).await.state), Some(&EndCause::Frozen { id: 8 }));
}

#[tokio::test]
async fn a_full_disk_at_the_start_stops_no_ending() {
    let mut one = Inside::new(Plan::default(), "broker_endings").await.unwrap();
    one.start_up().await.unwrap();
    let ops = agent("ops");
    let mut short = request("T-1", notes());
    short["life_secs"] = json!(60);
    let [first, second] = [one.ask(&ops, short.clone()).await.unwrap().id, one.ask(&ops, short).await.unwrap().id];
    one.stop_and_reopen().await;
    one.door.set(Takes::Endings);
    one.start_up().await.expect("its beginning may use what is reserved");
    one.broker.drive();
    assert!(matches!(one.ask(&ops, request("T-2", notes())).await, Err(BrokerError::Unavailable(_))));
    one.broker.complete(&ops, first).await.unwrap();

    // Not even that is left: it starts, serves nobody, and goes on by itself.
    one.stop_and_reopen().await;
    one.door.set(Takes::Nothing);
    assert!(matches!(one.start_up().await, Err(BrokerError::Unavailable(_))));
    one.broker.drive();
    one.broker.start_later(one.start, BTreeMap::new());
    for refused in [
        one.ask(&ops, request("T-2", notes())).await.map(|_| ()),
        one.broker.credentials(&ops, second, false, None).await.map(|_| ()),
    ] {
        let Err(BrokerError::Unavailable(why)) = &refused else { panic!("{refused:?}") };
        assert!(why.contains("its own start"), "{why}");
    }
    one.clock.0.fetch_add(61_000, Ordering::SeqCst);
    one.door.set(Takes::Everything);
    until("it has started", async || one.broker.has_started()).await;
    until("what was due is ended", async || one.grant(second).await.state.is_final()).await;
    one.ask(&ops, request("T-2", notes())).await.unwrap();
    let began = one.start.at;
    one.stop_and_reopen().await;
    let (Some(BrokerEvent::RunStarted { starts_at, .. }), _) = one.door.last_run().await.unwrap() else {
        panic!("the run is on record")
    };
    assert_eq!(starts_at, began);
}

#[tokio::test]
async fn while_the_journal_takes_nothing_endings_happen_all_the_same_and_are_recorded_afterwards() {
    let plan = Plan { postgres: true, ..Plan::default() };
    let Some(one) = Inside::driven(plan, "broker_endings").await else { return };
    let ops = agent("ops");
    let id = one.ask(&ops, request("T-1", sandbox())).await.unwrap().id;
    let login = login(&one.broker.credentials(&ops, id, false, None).await.unwrap());
    let token = one.ask(&ops, request("T-2", notes())).await.unwrap().id;
    let lease = one.broker.credentials(&ops, token, false, None).await.unwrap().credentials[0].lease;
    let cluster = one.pg.clone().unwrap();
    let opens = async || cluster.login(&login.user, &login.password, &login.database).await.is_ok();
    assert!(opens().await && one.broker.is_in_force(token, lease).await.unwrap());

    one.door.set(Takes::Nothing);
    let records = one.records();
    let revoked = one.broker.revoke(&dora(), id, "it went astray").await;
    assert!(matches!(revoked, Err(BrokerError::Unrecorded(_))), "{revoked:?}");
    until_within(CUT, "the login opens nothing", async || !opens().await).await;
    // The kill switch works too, and a token that is checked here is over at once.
    let freeze = one.broker.freeze(&chen(), Selector::Agent(ops.id.clone()), "an incident").await;
    assert!(matches!(freeze, Err(BrokerError::Unrecorded(_))), "{freeze:?}");
    assert!(!one.broker.is_in_force(token, lease).await.unwrap());
    assert_eq!(one.records(), records, "nothing was recorded");
    assert!(one.grant(id).await.ends_at().is_some() && one.grant(token).await.ends_at().is_some());

    one.door.set(Takes::Everything);
    until("all of it is on record", async || {
        one.grant(id).await.state.is_final() && one.door.freezes().await.unwrap().holding.len() == 1
    })
    .await;
    let grant = one.grant(id).await;
    let by_dora = EndCause::Revoked { by: dora().person, reason: "it went astray".to_owned() };
    assert_eq!(cause(&grant.state), Some(&by_dora));
    let events = one.door.events(id).await.unwrap();
    let told = |word: &str| events.iter().any(|r| matches!(&r.event, Event::Grant { what, .. } if what.word() == word));
    assert!(told("ending") && told("lease_revoked") && told("ended"), "{events:?}");
    until("the token's end is on record", async || cause(&one.grant(token).await.state).is_some()).await;
    let freeze = one.door.freezes().await.unwrap().holding[0].id;
    assert_eq!(cause(&one.grant(token).await.state), Some(&EndCause::Frozen { id: freeze }));
    assert!(matches!(one.ask(&ops, request("T-3", notes())).await, Err(BrokerError::Frozen { .. })));
}

#[tokio::test]
async fn nothing_is_given_under_a_grant_whose_end_waits_for_the_journal() {
    let one = Inside::new(Plan::default(), "broker_endings").await.unwrap();
    one.start_up().await.unwrap();
    let ops = agent("ops");
    let live = one.ask(&ops, request("T-1", notes())).await.unwrap().id;
    let waits = one.ask(&ops, request("T-1", customers("read"))).await.unwrap().id;
    let vote = approving(&one, waits).await;
    one.door.set(Takes::Nothing);
    for id in [live, waits] {
        assert!(matches!(one.broker.revoke(&dora(), id, "no").await, Err(BrokerError::Unrecorded(_))));
    }
    // It can be written again, and the driver has not come by yet.
    one.door.set(Takes::Everything);
    let mut child = request("T-1", notes());
    child["parent"] = json!(live);
    assert!(matches!(one.ask(&ops, child).await, Err(BrokerError::Parent)));
    assert!(matches!(one.broker.vote(&ana(), waits, &vote).await, Err(BrokerError::Over { .. })));
    let minted = one.broker.credentials(&ops, live, false, None).await;
    assert!(matches!(minted, Err(BrokerError::Over { .. })), "{minted:?}");
    let over = one.grant(live).await;
    assert!(matches!(cause(&over.state), Some(EndCause::Revoked { .. })), "with the cause that was given");
}

#[tokio::test]
async fn a_caller_that_goes_away_leaves_nothing_unwatched_and_nothing_of_a_completed_task() {
    let one = Inside::driven(Plan::default(), "broker_endings").await.unwrap();
    let ops = agent("ops");
    let mut watched = request("T-1", notes());
    watched["heartbeat_secs"] = json!(5);
    let open = async || one.door.open_grants().await.unwrap();
    {
        let mut asking = std::pin::pin!(one.ask(&ops, watched));
        assert!(poll!(asking.as_mut()).is_pending(), "it waits for the journal");
    }
    until("it is in force", async || !open().await.is_empty()).await;
    let id = open().await[0].id;
    one.clock.0.fetch_add(16_000, Ordering::SeqCst);
    until("its agent counts as lost", async || one.grant(id).await.state.is_final()).await;
    assert_eq!(cause(&one.grant(id).await.state), Some(&EndCause::AgentLost));

    // A request on its way while its task is completed.
    let mut asking = std::pin::pin!(one.ask(&ops, request("T-2", notes())));
    assert!(poll!(asking.as_mut()).is_pending());
    let ended = one.broker.complete_task(&ops, &TaskName::new("T-2").unwrap()).await.unwrap();
    assert_eq!(ended.len(), 1);
    assert!(one.broker.complete_task(&ops, &TaskName::new("T-2").unwrap()).await.unwrap().is_empty(), "twice is once");
    until("nothing of it is left", async || open().await.is_empty()).await;
    let late = one.ask(&ops, request("T-2", notes())).await;
    assert!(matches!(late, Err(BrokerError::TaskCompleted)), "{late:?}");
}

#[tokio::test]
async fn however_wide_a_tree_is_all_of_it_ends() {
    const CHILDREN: usize = 2100;
    let one = Inside::driven(Plan::default(), "broker_endings").await.unwrap();
    let ops = agent("ops");
    let parent = one.ask(&ops, request("T-1", notes())).await.unwrap().id;
    let mut child = request("T-1", notes());
    child["parent"] = json!(parent);
    let first = one.ask(&ops, child).await.unwrap().id;
    let mut children = vec![first];
    while children.len() < CHILDREN {
        let ids: Vec<GrantId> = (0..300).map(|_| grant_id(&SystemRandom)).collect();
        let mut events = Vec::new();
        for id in &ids {
            events.extend(one.again(first, *id, |_| {}).await);
        }
        one.write(events).await;
        children.extend(ids);
    }
    assert!(children.len() * 2 > countersign::store::BATCH_EVENTS_MAX);
    one.broker.revoke(&dora(), parent, "all of it").await.unwrap();
    for id in children {
        assert_eq!(cause(&one.grant(id).await.state), Some(&EndCause::ParentEnded));
    }
    assert!(matches!(cause(&one.grant(parent).await.state), Some(EndCause::Revoked { .. })));
}

#[tokio::test]
async fn refused_votes_are_recorded_within_a_budget_and_never_about_what_one_cannot_see() {
    let plan = Plan { limits: "refusals_per_agent_per_min = 3", ..Plan::default() };
    let one = Inside::new(plan, "broker_endings").await.unwrap();
    one.start_up().await.unwrap();
    let id = one.ask(&agent("ops"), request("T-1", customers("read"))).await.unwrap().id;
    let vote = approving(&one, id).await;
    let (mut stored, mut eve) = (ana(), person("eve", &[]));
    (stored.via, eve.via) = (Via::StoredSession, Via::StoredSession);
    let before = one.records();
    // A made-up id, and one that this person can't see: there is none, and nothing to record.
    for (by, id) in [(&stored, grant_id(&SystemRandom)), (&eve, id)] {
        let refused = one.broker.vote(by, id, &vote).await;
        assert!(matches!(refused, Err(BrokerError::NotFound)), "{refused:?}");
    }
    assert_eq!(one.records(), before);
    // All within one minute of the broker's clock.
    let into_minute = one.broker.now().0 % 60_000;
    one.clock.0.fetch_add(60_000 - into_minute, Ordering::SeqCst);
    for _ in 0..10 {
        let refused = one.broker.vote(&stored, id, &vote).await;
        assert!(matches!(refused, Err(BrokerError::NotAllowed(_))), "{refused:?}");
    }
    assert_eq!(one.records(), before + 3);
    let other = one.broker.vote(&Reviewer { via: Via::StoredSession, ..chen() }, id, &vote).await;
    assert!(matches!(other, Err(BrokerError::NotAllowed(_))));
    assert_eq!(one.records(), before + 4, "another person has a budget of their own");
}

#[tokio::test]
async fn what_an_agent_reports_stays_within_its_bytes() {
    let one = Inside::new(Plan::default(), "broker_endings").await.unwrap();
    one.start_up().await.unwrap();
    let ops = agent("ops");
    let id = one.ask(&ops, request("T-1", notes())).await.unwrap().id;
    let report = |status: &str| Invocation {
        tool: "psql".to_owned(),
        arguments_digest: None,
        arguments: Some(vec!["x".repeat(256); 64]),
        status: status.to_owned(),
        started_at: None,
        ended_at: None,
    };
    // 16 KiB each.
    for _ in 0..20 {
        one.broker.report(&ops, id, report("ok")).await.unwrap();
    }
    let grant = one.grant(id).await;
    let kept = grant.invocations.iter().filter(|i| i.arguments.is_some()).count();
    assert_eq!((grant.invocations.len(), kept), (20, 16));
    let digests = grant.invocations.iter().filter_map(|i| i.arguments_digest.as_ref());
    assert!(digests.clone().count() == 4 && digests.clone().all(|d| d.len() == 64), "the others by their digest");
    let long = one.broker.report(&ops, id, report(&format!("exit:{}1", "0".repeat(1000)))).await;
    assert!(matches!(long, Err(BrokerError::Invalid { field: "status", .. })), "{long:?}");
}

#[tokio::test]
async fn limits_of_an_agent_hold_however_many_ask_at_once() {
    let plan = Plan { limits: "pending_per_agent_max = 5", ..Plan::default() };
    let one = Inside::new(plan, "broker_endings").await.unwrap();
    one.start_up().await.unwrap();
    let ops = agent("ops");
    let all = futures::future::join_all((0..50).map(|_| one.ask(&ops, request("T-1", customers("read"))))).await;
    let (came_in, refused): (Vec<_>, Vec<_>) = all.into_iter().partition(Result::is_ok);
    assert_eq!(one.door.open_counts(&ops.id).await.unwrap(), (5, 5));
    assert_eq!(came_in.len(), 5);
    for refused in refused {
        assert!(matches!(refused, Err(BrokerError::TooMany { max: 5, .. })), "{refused:?}");
    }
}

#[tokio::test]
async fn what_is_minted_is_compared_with_the_digest_anew() {
    let one = Inside::new(Plan::default(), "broker_endings").await.unwrap();
    one.start_up().await.unwrap();
    let ops = agent("ops");
    let asked = one.ask(&ops, request("T-1", notes())).await.unwrap().id;
    let [good, bad] = [grant_id(&SystemRandom), grant_id(&SystemRandom)];
    one.write(one.again(asked, good, |_| {}).await).await;
    let other_words = |what: &mut GrantEvent| {
        if let GrantEvent::Assessed { assessed } = what {
            assessed.approvable.sentence.push_str(" and more");
        }
    };
    one.write(one.again(asked, bad, other_words).await).await;
    one.broker.credentials(&ops, good, false, None).await.unwrap();
    let minted = one.broker.credentials(&ops, bad, false, None).await;
    assert!(matches!(minted, Err(BrokerError::Refused(countersign::core::decide::Refusal::NotApproved))), "{minted:?}");
}
