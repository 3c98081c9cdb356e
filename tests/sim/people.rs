//! Who uses the broker: agents that ask, collect, use, hand on and complete, some of them twice or not at all, and
//! reviewers that decide, take away and freeze. What they send and what they are told can get lost.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use countersign::broker::vote::{Reviewer, Via};
use countersign::broker::{Broker, BrokerError};
use countersign::core::event::Selector;
use countersign::core::grant::{Grant, GrantState};
use countersign::core::id::{GrantId, LeaseId, Timestamp};
use countersign::core::vote::Verdict;
use countersign::identity::{Method, VerifiedAgent};
use countersign::runtime::{Runtime as _, within};
use countersign::wire::reviewer::VoteRequest;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::oneshot;

use super::Choices;
use super::World;
use super::sched::WORLD;

/// A client gives up after this.
const PATIENCE: Duration = Duration::from_secs(40);

type Answer<T> = Option<Result<T, BrokerError>>;

impl World {
    pub fn choices(&self) -> Choices {
        Choices(self.forks.lock().next())
    }

    pub async fn sleep(&self, ms: u64) {
        self.sched.sleep_ms(ms).await;
    }

    /// Is there still time to begin something?
    pub fn is_day(&self) -> bool {
        self.sched.now_ms() < self.day_ends_ms
    }

    /// One call over the network, to a run that is there. `told` is what happens where the answer leaves the broker:
    /// from there on, somebody may know. `None`: lost on the way there or back, or nobody is there.
    async fn call<T: Send + 'static>(
        self: &Arc<Self>,
        choices: &mut Choices,
        ask: impl FnOnce(Arc<Broker>) -> BoxFuture<'static, Result<T, BrokerError>> + Send + 'static,
        told: impl FnOnce(&World, &Result<T, BrokerError>) + Send + 'static,
    ) -> Answer<T> {
        self.sleep(choices.between(0, 20)).await;
        let process = {
            let process = self.any_node(choices).process.lock();
            let open = process.as_ref().filter(|p| p.is_open.load(SeqCst));
            open.map(|p| (Arc::clone(&p.broker), Arc::clone(&p.runtime)))
        };
        let Some((broker, runtime)) = process else {
            self.sleep(300).await;
            return None;
        };
        if choices.chance(self.loses) {
            return None;
        }
        let (answer, answered) = oneshot::channel();
        // Whoever asked may go away before the answer.
        let patience = choices.chance(self.loses).then(|| Duration::from_millis(choices.between(0, 60)));
        let (world, of) = (Arc::clone(self), Arc::clone(&runtime));
        runtime.spawn(Box::pin(async move {
            // As the server does: what any node has acknowledged is known here, or else it goes on with what is.
            let work = async {
                let _ = broker.store.refresh().await;
                ask(broker).await
            };
            let done = match patience {
                Some(patience) => within(of.as_ref(), patience, work).await,
                None => Some(work.await),
            };
            if let Some(done) = done {
                told(&world, &done);
                let _ = answer.send(done);
            }
        }));
        let done = within(&self.outside(), PATIENCE, answered).await?.ok()?;
        if let Err(error) = &done {
            self.oracle.say(|| format!("somebody is told: {error}"));
        }
        self.sleep(choices.between(0, 20)).await;
        (!choices.chance(self.loses)).then_some(done)
    }
}

fn agent(id: &str) -> VerifiedAgent {
    VerifiedAgent {
        id: id.parse().unwrap(),
        issuer: "spiffe://corp.example".to_owned(),
        subject: id.to_owned(),
        method: Method::JwtSvid,
        attributes: std::collections::BTreeMap::new(),
        tier_max: None,
        launcher: None,
        confirmation: None,
        expires_at: Timestamp(u64::MAX),
    }
}

fn told_grant(world: &World, answer: &Result<Arc<Grant>, BrokerError>) {
    if let Ok(grant) = answer {
        world.oracle.acked(&grant.id.to_string(), grant.version);
    }
}

/// An agent, through a few tasks.
pub async fn an_agent(world: Arc<World>, id: &'static str, helper: &'static str) {
    let mut c = world.choices();
    while world.is_day() {
        world.sleep(c.between(100, 15_000)).await;
        let task = format!("T-{}", c.below(1000));
        let mine = a_grant(&world, &mut c, id, &task, None).await;
        let Some(mine) = mine else { continue };
        if c.chance(300) {
            // Part of it is handed to another agent, whose grant hangs from this one.
            let (world, task) = (Arc::clone(&world), task.clone());
            let sched = Arc::clone(&world.sched);
            sched.spawn(
                WORLD,
                Box::pin(async move {
                    let mut c = world.choices();
                    if let Some(grant) = a_grant(&world, &mut c, helper, &task, Some(mine)).await {
                        use_and_leave(&world, &mut c, helper, &task, grant).await;
                    }
                }),
            );
        }
        use_and_leave(&world, &mut c, id, &task, mine).await;
    }
}

/// Asks until there is an answer, and waits until it is in force.
async fn a_grant(
    world: &Arc<World>,
    c: &mut Choices,
    id: &'static str,
    task: &str,
    parent: Option<GrantId>,
) -> Option<GrantId> {
    let targets = ["tokens", "told", "chooses", "told", "chooses"];
    let parts = ["notes", "notes", "notes", "books", "vault"];
    let mut details = Vec::new();
    for _ in 0..=u64::from(c.chance(250)) {
        let (target, part) = (targets[c.below(5) as usize], parts[c.below(5) as usize]);
        let action = if part == "vault" { "erase" } else { "read" };
        let entry = json!({"type": "token", "identifier": format!("{target}/{part}"), "actions": [action]});
        if details.iter().all(|d: &serde_json::Value| d["identifier"] != entry["identifier"]) {
            details.push(entry);
        }
    }
    if let Some(parent) = parent {
        // As the parent has it, so that it is no wider.
        let broker = world.any_node(c).process.lock().as_ref().map(|p| Arc::clone(&p.store))?;
        let above = broker.grant(parent).await.ok()??;
        let p = above.request.permissions.first()?;
        details = vec![json!({"type": "token", "identifier": p.resource, "actions": p.actions})];
    }
    let mut wanted = json!({
        "task": task, "intent": "to see what happens", "life_secs": c.between(5, 150),
        "authorization_details": details,
    });
    if let Some(parent) = parent {
        wanted["parent"] = json!(parent);
    }
    if c.chance(200) {
        wanted["heartbeat_secs"] = json!(c.between(5, 20));
    }
    let key = format!("k-{}", c.next());
    let mut grant = None;
    for _ in 0..6 {
        let (wanted, key) = (serde_json::from_value(wanted.clone()).unwrap(), key.clone());
        let ask = move |broker: Arc<Broker>| -> BoxFuture<'static, _> {
            Box::pin(async move { broker.request(&agent(id), wanted, Some(&key)).await })
        };
        match world.call(c, ask, told_grant).await {
            Some(Ok(made)) => {
                grant = Some(made);
                break;
            }
            Some(Err(BrokerError::Unavailable(_) | BrokerError::InProgress)) | None => {
                world.sleep(c.between(200, 3_000)).await;
            }
            Some(Err(_)) => return None,
        }
    }
    let grant = grant?;
    for _ in 0..20 {
        let (of, seen) = (grant.id, grant.version);
        let look = move |broker: Arc<Broker>| -> BoxFuture<'static, _> {
            Box::pin(async move {
                broker.store.changed(of, seen, Duration::from_secs(10)).await?.ok_or(BrokerError::NotFound)
            })
        };
        match world.call(c, look, told_grant).await {
            Some(Ok(now)) if matches!(now.state, GrantState::Active { .. }) => return Some(now.id),
            Some(Ok(now)) if !matches!(now.state, GrantState::Pending { .. }) => return None,
            _ => {}
        }
        if c.chance(30) {
            let of = grant.id;
            let cancel = move |broker: Arc<Broker>| -> BoxFuture<'static, _> {
                Box::pin(async move { broker.cancel(&agent(id), of).await })
            };
            world.call(c, cancel, told_grant).await;
        }
        world.sleep(500).await;
    }
    None
}

type Collected = Vec<(LeaseId, String)>;

async fn collect(
    world: &Arc<World>,
    c: &mut Choices,
    id: &'static str,
    grant: GrantId,
    replace: bool,
    key: String,
) -> Answer<Collected> {
    let ask = move |broker: Arc<Broker>| -> BoxFuture<'static, _> {
        Box::pin(async move {
            let issued = broker.credentials(&agent(id), grant, replace, Some(&key)).await?;
            Ok(issued.credentials.iter().map(|c| (c.lease, c.resource.to_string())).collect::<Collected>())
        })
    };
    let told = move |world: &World, answer: &Result<Collected, BrokerError>| {
        for (lease, resource) in answer.iter().flatten() {
            world.oracle.handed_over(&grant.to_string(), &lease.to_string(), resource);
        }
    };
    world.call(c, ask, told).await
}

async fn use_and_leave(world: &Arc<World>, c: &mut Choices, id: &'static str, task: &str, grant: GrantId) {
    let key = format!("c-{}", c.next());
    if c.chance(150) {
        // Somebody else of the same agent collects at the same moment.
        let other = if c.coin() { key.clone() } else { format!("c-{}", c.next()) };
        let (world, sched) = (Arc::clone(world), Arc::clone(&world.sched));
        sched.spawn(
            WORLD,
            Box::pin(async move {
                let mut c = world.choices();
                collect(&world, &mut c, id, grant, false, other).await;
            }),
        );
    }
    let mut held = Vec::new();
    for turn in 0..8 {
        let replace = turn > 2 && c.chance(300);
        match collect(world, c, id, grant, replace, key.clone()).await {
            Some(Ok(leases)) => {
                held = leases;
                break;
            }
            Some(Err(BrokerError::Over { .. } | BrokerError::NotFound)) => break,
            // Handed over already, and the answer was lost; or not now.
            Some(Err(_)) | None => world.sleep(c.between(100, 4_000)).await,
        }
    }
    for _ in 0..c.below(6) {
        world.sleep(c.between(100, 20_000)).await;
        for (lease, resource) in held.clone() {
            if resource.starts_with("tokens/") {
                let (asked, told_id) = (world.sched.now_ms(), grant.to_string());
                let ask = move |broker: Arc<Broker>| -> BoxFuture<'static, _> {
                    Box::pin(async move { broker.is_in_force(grant, lease).await })
                };
                let told = move |world: &World, answer: &Result<bool, BrokerError>| {
                    if matches!(answer, Ok(true)) {
                        world.oracle.token_is_good(&told_id, asked);
                    }
                };
                world.call(c, ask, told).await;
            } else {
                world.oracle.used(&grant.to_string(), &lease.to_string());
            }
        }
        let beat = move |broker: Arc<Broker>| -> BoxFuture<'static, _> {
            Box::pin(async move { broker.heartbeat(&agent(id), grant).await })
        };
        if c.chance(700) {
            world.call(c, beat, told_grant).await;
        }
    }
    let over = move |world: &World, answer: &Result<Arc<Grant>, BrokerError>| {
        told_grant(world, answer);
        if answer.is_ok() {
            world.oracle.told_over(&grant.to_string());
        }
    };
    if c.chance(650) {
        for _ in 0..4 {
            let done = move |broker: Arc<Broker>| -> BoxFuture<'static, _> {
                Box::pin(async move { broker.complete(&agent(id), grant).await })
            };
            if world.call(c, done, over).await.is_some() {
                break;
            }
            world.sleep(c.between(100, 2_000)).await;
        }
    } else if c.chance(300) {
        let name = task.parse().unwrap();
        let done = move |broker: Arc<Broker>| -> BoxFuture<'static, _> {
            Box::pin(async move { broker.complete_task(&agent(id), &name).await })
        };
        let told = move |world: &World, answer: &Result<Vec<GrantId>, BrokerError>| {
            for grant in answer.iter().flatten() {
                world.oracle.told_over(&grant.to_string());
            }
        };
        world.call(c, done, told).await;
    }
}

fn reviewer(person: &str) -> Reviewer {
    let groups: &[&str] = match person {
        "chen" => &["security", "auditors", "operators"],
        _ => &["reviewers", "db-owners"],
    };
    Reviewer {
        person: person.parse().unwrap(),
        account: format!("https://login.corp.example#{person}"),
        groups: groups.iter().map(|g| (*g).to_owned()).collect(),
        via: Via::Browser,
    }
}

/// Somebody who decides what waits, mostly well.
pub async fn a_reviewer(world: Arc<World>, person: &'static str) {
    let mut c = world.choices();
    let stale: Mutex<Option<countersign::core::digest::Digest>> = Mutex::new(None);
    while world.is_day() {
        world.sleep(c.between(200, 6_000)).await;
        let look = |broker: Arc<Broker>| -> BoxFuture<'static, _> {
            Box::pin(async move { Ok(broker.store.open_grants().await?) })
        };
        let Some(Ok(open)) = world.call(&mut c, look, |_, _| {}).await else { continue };
        let waiting: Vec<_> = open.iter().filter(|g| matches!(g.state, GrantState::Pending { .. })).collect();
        if waiting.is_empty() || c.chance(100) {
            takes_away(&world, &mut c, person, &open).await;
            continue;
        }
        let grant = waiting[c.below(waiting.len() as u64) as usize];
        let Some(assessed) = &grant.assessed else { continue };
        // They think; meanwhile things may change.
        world.sleep(c.between(100, 8_000)).await;
        let digest = match stale.lock().replace(assessed.digest) {
            Some(old) if c.chance(80) => old,
            _ => assessed.digest,
        };
        let verdict = if c.chance(850) { Verdict::Approve } else { Verdict::Deny };
        if digest == assessed.digest {
            let permissions = json!(assessed.approvable.permissions);
            world.oracle.votes(&grant.id.to_string(), person, json!(digest), permissions);
        }
        let (id, wanted) = (grant.id, VoteRequest { verdict, digest, reason: None });
        let vote = move |broker: Arc<Broker>| -> BoxFuture<'static, _> {
            Box::pin(async move { broker.vote(&reviewer(person), id, &wanted).await })
        };
        world.call(&mut c, vote, told_grant).await;
    }
}

async fn takes_away(world: &Arc<World>, c: &mut Choices, person: &'static str, open: &[Arc<Grant>]) {
    let Some(grant) = open.get(c.below(open.len() as u64 * 4 + 1) as usize) else { return };
    let id = grant.id;
    if person != "chen" || c.coin() {
        let told = move |world: &World, answer: &Result<Arc<Grant>, BrokerError>| {
            told_grant(world, answer);
            if answer.is_ok() {
                world.oracle.told_over(&id.to_string());
            }
        };
        let revoke = move |broker: Arc<Broker>| -> BoxFuture<'static, _> {
            Box::pin(async move { broker.revoke(&reviewer(person), id, "it looks odd").await })
        };
        world.call(c, revoke, told).await;
        return;
    }
    let selector = match c.below(3) {
        0 => Selector::Agent(grant.request.agent.id.clone()),
        1 => Selector::Target("told".parse().unwrap()),
        _ => Selector::All,
    };
    let freeze = move |broker: Arc<Broker>| -> BoxFuture<'static, _> {
        Box::pin(async move { broker.freeze(&reviewer(person), selector, "something is wrong").await })
    };
    let told = |world: &World, answer: &Result<(u64, Vec<GrantId>), BrokerError>| {
        for grant in answer.iter().flat_map(|(_, ended)| ended) {
            world.oracle.told_over(&grant.to_string());
        }
    };
    let frozen = world.call(c, freeze, told).await;
    world.sleep(c.between(1_000, 30_000)).await;
    // Whatever holds is lifted, so that there is work again.
    for _ in 0..10 {
        let lift = move |broker: Arc<Broker>| -> BoxFuture<'static, _> {
            Box::pin(async move {
                for freeze in broker.store.freezes().await?.holding {
                    broker.unfreeze(&reviewer(person), freeze.id).await?;
                }
                Ok(())
            })
        };
        if let Some(Ok(())) = world.call(c, lift, |_, _| {}).await {
            break;
        }
        world.sleep(1_000).await;
    }
    drop(frozen);
}
