//! Short ways to say what happens in a test. Every event is decided by the production core. Used here and by
//! `tests/store_*.rs`.
#![allow(dead_code)] // each user has its part

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::poll;
use serde_json::json;

use crate::core::decide::{self, Command, PolicySaid, decide};
use crate::core::digest::Digest;
use crate::core::event::{EndCause, Event, GrantEvent, Selector};
use crate::core::grant::{Grant, GrantState};
use crate::core::id::{AgentId, GrantId, LeaseId, PersonId, TaskKey, TaskName, TierName, Timestamp};
use crate::core::lease::{Evidence, LeaseIntent};
use crate::core::permission::Permission;
use crate::core::request::{AgentFacts, Approvable, Assessed, Request};
use crate::core::revocability::{Revocability, RevocabilityMode};
use crate::core::tier::{Friction, Tier};
use crate::core::vote::{Verdict, Vote};
use crate::store::{Appended, Batch, Expect, Store, StoreError};

/// Nothing takes longer than this.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// When the tests begin.
pub const START: Timestamp = Timestamp(1_700_000_000_000);

pub fn at(secs: u64) -> Timestamp {
    START.plus_secs(secs)
}
pub fn grant_id(n: u64) -> GrantId {
    GrantId::from_bytes(u128::from(n).to_be_bytes())
}
pub fn lease_id(n: u64) -> LeaseId {
    LeaseId::from_bytes(u128::from(n).to_be_bytes())
}
pub fn agent(n: u64) -> AgentId {
    AgentId::new(&format!("spiffe://corp/agent/{n}")).expect("a plain id")
}
pub fn person(name: &str) -> PersonId {
    PersonId::new(name).expect("a plain name")
}
pub fn task(name: &str) -> TaskName {
    TaskName::new(name).expect("a plain name")
}
pub fn task_key(n: u64, name: &str) -> TaskKey {
    TaskKey { agent: agent(n), task: task(name) }
}
pub fn permission(resource: &str) -> Permission {
    serde_json::from_value(json!({"resource": resource, "actions": ["read"]})).expect("a plain permission")
}

/// What is asked for, with the usual answers filled in.
#[derive(Debug, Clone)]
pub struct Ask {
    pub id: GrantId,
    pub agent: u64,
    pub owner: Option<&'static str>,
    pub task: &'static str,
    pub permissions: Vec<Permission>,
    pub life_secs: u64,
    pub approvals: u8,
    pub deny: bool,
    pub parent: Option<Arc<Grant>>,
    pub idempotency: Option<Digest>,
    pub at: Timestamp,
}

/// An automatic grant of one minute for agent 1.
pub fn ask(n: u64) -> Ask {
    Ask {
        id: grant_id(n),
        agent: 1,
        owner: Some("ana"),
        task: "task",
        permissions: vec![permission("db")],
        life_secs: 60,
        approvals: 0,
        deny: false,
        parent: None,
        idempotency: None,
        at: START,
    }
}

/// One that waits for a vote.
pub fn pending(n: u64) -> Ask {
    Ask { approvals: 1, ..ask(n) }
}

impl Ask {
    fn request(&self) -> Request {
        Request {
            agent: AgentFacts {
                id: agent(self.agent),
                name: "agent".into(),
                issuer: "spiffe://corp".into(),
                method: "x509-svid".into(),
                attributes: BTreeMap::new(),
                launcher: None,
                owner: self.owner.map(person),
                team: None,
            },
            task: task(self.task),
            intent: "words of the agent".into(),
            permissions: self.permissions.clone(),
            life_secs: self.life_secs,
            parent: self.parent.as_ref().map(|p| p.id),
            chain: Vec::new(),
            excluded_voters: BTreeSet::new(),
            heartbeat_secs: None,
            confirmation: None,
            idempotency: self.idempotency,
            content: Digest::of_bytes(b"content"),
        }
    }

    pub fn events(&self) -> Vec<Event> {
        let request = self.request();
        let says = Revocability { mode: RevocabilityMode::Immediate, residual_secs: 0, says: "cut at once".into() };
        let approvable = Approvable {
            grant: self.id,
            agent: request.agent.id.clone(),
            owner: request.agent.owner.clone(),
            chain: Vec::new(),
            permissions: self.permissions.clone(),
            life_secs: self.life_secs,
            latest_end: self.at.plus_secs(3600 + self.life_secs),
            tier: Tier {
                name: TierName::new("tier").expect("a plain name"),
                approvals: self.approvals,
                life_secs_max: 1 << 40,
                friction: Friction::One,
            },
            targets: self.permissions.iter().map(|p| (p.resource.clone(), Digest::of_bytes(b"target"))).collect(),
            revocability: vec![says; self.permissions.len()],
            sentence: "reads".into(),
        };
        let digest = approvable.digest().expect("a plain approvable");
        let said = if self.deny {
            PolicySaid::Denied { rule: "r".into(), policy_version: "v".into(), reason: "no".into() }
        } else {
            PolicySaid::Permitted(Box::new(Assessed {
                approvable,
                digest,
                reasons: Vec::new(),
                policy_version: "v".into(),
                decide_by: self.at.plus_secs(600),
            }))
        };
        let made = decide::request(self.id, request, self.parent.as_deref(), said, self.at).expect("it may be asked");
        numbered(self.id, 0, made)
    }

    pub async fn on(&self, store: &dyn Store) -> Arc<Grant> {
        append(store, self.events(), self.at).await.expect("nothing is in the way");
        store.grant(self.id).await.expect("readable").expect("there")
    }
}

pub fn numbered(id: GrantId, version: u64, events: Vec<GrantEvent>) -> Vec<Event> {
    let all = events.into_iter().zip(version + 1..);
    all.map(|(what, version)| Event::Grant { id, version, what: Box::new(what) }).collect()
}

pub fn batch(events: Vec<Event>, at: Timestamp) -> Batch {
    Batch { expect: Vec::new(), events, at, urgent: false }
}

pub async fn append(store: &dyn Store, events: Vec<Event>, at: Timestamp) -> Result<Appended, StoreError> {
    store.append(batch(events, at)).await
}

pub async fn append_if(store: &dyn Store, expect: Vec<Expect>, events: Vec<Event>) -> Result<Appended, StoreError> {
    store.append(Batch { expect, ..batch(events, START) }).await
}

/// The events of a command on a grant as it is.
pub fn events_of(grant: &Grant, command: &Command, at: Timestamp) -> Vec<Event> {
    numbered(grant.id, grant.version, decide(grant, command, at).expect("it may happen"))
}

/// Does a command on a grant as the head has it.
pub async fn command(store: &dyn Store, id: GrantId, command: &Command, at: Timestamp) -> Arc<Grant> {
    let grant = store.head(id).await.expect("readable").expect("there");
    append(store, events_of(&grant, command, at), at).await.expect("nothing is in the way");
    store.grant(id).await.expect("readable").expect("there")
}

pub fn finish() -> Command {
    Command::Finish { cause: EndCause::Completed }
}

pub async fn end(store: &dyn Store, n: u64, at: Timestamp) -> Arc<Grant> {
    command(store, grant_id(n), &finish(), at).await
}

/// Ends a grant with everything below it, in one write.
pub async fn end_tree(store: &dyn Store, n: u64, at: Timestamp) {
    let mut all = Vec::new();
    for grant in store.subtree(grant_id(n)).await.expect("readable") {
        all.extend(events_of(&grant, &Command::Finish { cause: EndCause::ParentEnded }, at));
    }
    append(store, all, at).await.expect("nothing is in the way");
}

pub fn vote(grant: &Grant, by: &str, verdict: Verdict) -> Command {
    let digest = grant.assessed.as_ref().expect("assessed").digest;
    let vote = Vote {
        person: person(by),
        account: format!("https://idp#{by}"),
        via: "browser".into(),
        verdict,
        digest,
        reason: None,
        at: START,
    };
    Command::Vote { vote, excluded: BTreeSet::new(), parent_ends_at: None }
}

/// Intends one lease for each permission, named `cs_N`.
pub fn intend(grant: &Grant, leases: &[u64], at: Timestamp) -> Command {
    let assessed = grant.assessed.as_ref().expect("assessed");
    let GrantState::Active { ends_at, .. } = grant.state else { panic!("in force") };
    let intents = leases
        .iter()
        .zip(&assessed.approvable.permissions)
        .map(|(n, permission)| LeaseIntent {
            lease: lease_id(*n),
            grant: grant.id,
            name: format!("cs_{n}"),
            target: "target".parse().expect("a name"),
            permission: permission.clone(),
            intended_at: at,
            lifetime_secs: ends_at.ms_since(at) / 1000,
        })
        .collect();
    Command::Intend { intents, digest: assessed.digest }
}

pub fn live(n: u64) -> Command {
    Command::Live { lease: lease_id(n), handle: json!({"oid": n}), not_after: None, release: true }
}

pub fn retry(n: u64, next_try: Timestamp) -> Command {
    Command::Retry { lease: lease_id(n), why: "no answer".into(), next_try }
}

pub fn gone(n: u64) -> Command {
    let evidence = Evidence::TargetSaysGone { detail: "no such role".into() };
    Command::Gone { lease: lease_id(n), evidence, seen: Vec::new(), access_cut_ms: Some(3) }
}

/// A grant in force with live leases, one for each permission.
pub async fn with_leases(store: &dyn Store, ask: Ask, leases: &[u64]) -> Arc<Grant> {
    let grant = ask.on(store).await;
    command(store, grant.id, &intend(&grant, leases, ask.at), ask.at).await;
    for n in leases {
        command(store, grant.id, &live(*n), ask.at).await;
    }
    store.grant(grant.id).await.expect("readable").expect("there")
}

pub fn figure(store: &dyn Store, name: &str) -> u64 {
    let found = store.figures().into_iter().find(|(n, _)| *n == name);
    found.unwrap_or_else(|| panic!("no figure {name}")).1
}

/// Goes on with an append until the store has queued it. To see it on its way, hold the house.
pub async fn on_its_way<F: Future>(store: &dyn Store, mut coming: Pin<&mut F>) {
    let before = figure(store, "store_queued");
    loop {
        assert!(poll!(coming.as_mut()).is_pending(), "it is through already");
        if figure(store, "store_queued") > before {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Waits until a condition holds.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "never so: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Waits until everything final has left memory.
pub async fn archived(store: &dyn Store) {
    until("archived", || figure(store, "view_waiting") == 0 && figure(store, "grants_final_in_memory") == 0).await;
}

/// Something of everything.
pub async fn furnish(store: &dyn Store) {
    let keyed = |n: u64| Some(Digest::of_bytes(&n.to_be_bytes()));
    let two = vec![permission("db"), permission("web")];
    with_leases(store, Ask { permissions: two, idempotency: keyed(1), ..ask(1) }, &[1, 2]).await;
    let voted = Ask { approvals: 2, agent: 2, owner: Some("ben"), ..ask(2) }.on(store).await;
    command(store, voted.id, &vote(&voted, "eve", Verdict::Approve), at(1)).await;
    let parent = Ask { task: "other", ..ask(3) }.on(store).await;
    with_leases(store, Ask { parent: Some(Arc::clone(&parent)), agent: 3, owner: None, ..ask(4) }, &[3]).await;
    Ask { deny: true, agent: 4, idempotency: keyed(5), ..ask(5) }.on(store).await;
    Ask { agent: 4, ..pending(6) }.on(store).await;
    command(store, grant_id(6), &Command::Cancel, at(2)).await;
    with_leases(store, Ask { agent: 2, owner: Some("ben"), ..ask(7) }, &[4]).await;
    end(store, 7, at(3)).await;
    command(store, grant_id(7), &retry(4, at(50)), at(4)).await;
    with_leases(store, Ask { idempotency: keyed(8), ..ask(8) }, &[5]).await;
    end(store, 8, at(5)).await;
    command(store, grant_id(8), &gone(5), at(6)).await;
    let freeze = |id, selector| Event::Frozen { id, selector, by: person("eve"), reason: "enough".into() };
    let all = vec![
        freeze(1, Selector::Agent(agent(9))),
        freeze(2, Selector::All),
        Event::Unfrozen { id: 2, by: person("eve") },
        Event::TaskCompleted { task: task_key(4, "task") },
    ];
    append(store, all, at(7)).await.unwrap();
}
