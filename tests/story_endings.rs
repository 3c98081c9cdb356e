//! "It ends when I say so, when its person says so, when its time is up, and when nobody says anything any more."

#[path = "support/broker.rs"]
mod broker;

use std::time::{Duration, Instant};

use broker::agent::{Agent, customers, notes, request, sandbox};
use broker::{Plan, World, target, until_within};
use serde_json::{Value, json};

/// A reviewer's action reaches a waiting agent within this.
const AWAKE: Duration = Duration::from_secs(2);

async fn token(agent: &Agent, id: &str) -> String {
    agent.collect(id).await.ok()["credentials"][0]["secret"]["token"].as_str().unwrap().to_owned()
}

async fn works(world: &World, token: &str) -> bool {
    world.introspect("notes-api", token).await["active"] == true
}

#[tokio::test]
async fn a_task_ends_as_a_whole_and_its_name_is_used_up() {
    let Some(world) = Plan::default().start("story_endings").await else { return };
    let (ops, helper, other) = (world.agent("ops"), world.agent("helper"), world.agent("other"));
    let (first, second, elsewhere) =
        (ops.asked("T-1", notes()).await, ops.asked("T-1", notes()).await, ops.asked("T-2", notes()).await);
    let waiting = ops.asked("T-1", customers("read")).await;
    let mut child = request("handed-on", notes());
    child["parent"] = json!(first);
    let child = helper.post("/v1/grants", &child).await.ok()["id"].as_str().unwrap().to_owned();
    let theirs = other.asked("T-1", notes()).await;
    let tokens = [
        token(&ops, &first).await,
        token(&ops, &second).await,
        token(&helper, &child).await,
        token(&ops, &elsewhere).await,
        token(&other, &theirs).await,
    ];
    for token in &tokens {
        assert!(works(&world, token).await);
    }
    let mut ended: Vec<String> =
        serde_json::from_value(ops.post("/v1/tasks/T-1/complete", &json!({})).await.ok()["ended"].clone()).unwrap();
    let mut all = vec![first.clone(), second, waiting.clone(), child.clone()];
    ended.sort();
    all.sort();
    assert_eq!(ended, all);
    // At once, not when proofs are in.
    let alive: Vec<bool> = futures::future::join_all(tokens.iter().map(|t| works(&world, t))).await;
    assert_eq!(alive, [false, false, false, true, true]);
    let cause = |v: &Value| v["cause"]["cause"].clone();
    assert_eq!(cause(&ops.wait(&first, "ended").await), "task_completed");
    assert_eq!(cause(&helper.wait(&child, "ended").await), "parent_ended");
    assert_eq!(cause(&ops.wait(&waiting, "withdrawn").await), "task_completed");
    ops.ask("T-1", notes()).await.problem(409, "task-completed");
    // Twice is once, and the name is used up for its agent alone.
    assert_eq!(ops.post("/v1/tasks/T-1/complete", &json!({})).await.ok()["ended"], json!([]));
    ops.complete(&first).await.ok();
    other.ask("T-1", notes()).await.ok();
    // A name that needs escaping in a path.
    let odd = ops.asked("T/3?x=%2F#y", notes()).await;
    let done = ops.client().complete_task(&countersign::core::id::TaskName::new("T/3?x=%2F#y").unwrap()).await;
    assert_eq!(done.unwrap().ended.len(), 1);
    ops.wait(&odd, "ended").await;
}

#[tokio::test]
async fn a_reviewer_takes_it_away_and_the_agent_reads_why() {
    let Some(world) = Plan { people: true, postgres: true, ..Plan::default() }.start("story_endings").await else {
        return;
    };
    let ops = world.agent("ops");
    let id = ops.asked("T-1", sandbox()).await;
    let login = ops.login(&id).await;
    let session = world.cluster().login(&login.user, &login.password, &login.database).await.unwrap();
    // The owner may, a stranger may not even see it, a person without the right is told so.
    let (dora, eve) = (world.browser("dora").await, world.browser("eve").await);
    let path = format!("/grants/{id}/revoke");
    let csrf = eve.csrf().await;
    assert_eq!(eve.post(&path, &[("csrf", &csrf), ("reason", "mine")]).await.status, 404);
    let form = dora.form(&id).await;
    let done = dora.post(&path, &[("csrf", &form.csrf), ("reason", "it went astray")]).await;
    assert_eq!(done.status, 303, "{}", done.text());
    until_within(AWAKE, "the session is cut", async || session.is_closed()).await;
    let ended = ops.wait(&id, "ended").await;
    assert_eq!(ended["cause"], json!({ "cause": "revoked", "by": "dora", "reason": "it went astray" }));
    // Final is final: the agent's own word comes too late to change the cause.
    ops.complete(&id).await.ok();
    assert_eq!(ops.show(&id).await["cause"]["cause"], "revoked");
    ops.collect(&id).await.problem(409, "over");

    // In a hurry, without a reason, as the page offers it; and a request that still waits.
    let (live, waiting) = (ops.asked("T-2", notes()).await, ops.asked("T-2", customers("read")).await);
    for (id, state) in [(live, "ended"), (waiting, "withdrawn")] {
        let form = dora.form(&id).await;
        let done = dora.post(&format!("/grants/{id}/revoke"), &[("csrf", &form.csrf), ("reason", "")]).await;
        assert_eq!(done.status, 303, "{}", done.text());
        assert_eq!(ops.wait(&id, state).await["cause"]["by"], "dora");
    }
}

#[tokio::test]
async fn a_freeze_ends_what_it_covers_and_refuses_new_ones_until_it_is_lifted() {
    let Some(world) = Plan { people: true, ..Plan::default() }.start("story_endings").await else { return };
    let (ops, helper, other) = (world.agent("ops"), world.agent("helper"), world.agent("other"));
    let live = ops.asked("T-1", notes()).await;
    let waiting = ops.asked("T-1", customers("read")).await;
    let mut child = request("handed-on", notes());
    child["parent"] = json!(live);
    let child = helper.post("/v1/grants", &child).await.ok()["id"].as_str().unwrap().to_owned();
    let not_covered = other.asked("T-1", notes()).await;
    let held = token(&ops, &live).await;
    let (chen, ana) = (world.browser("chen").await, world.browser("ana").await);

    let fields = |csrf: &str, step: &str, typed: &str| -> Vec<(String, String)> {
        [
            ("csrf", csrf),
            ("kind", "agent"),
            ("value", ops.id.as_str()),
            ("reason", "an incident"),
            ("step", step),
            ("typed", typed),
        ]
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .to_vec()
    };
    let send = async |who: &broker::browser::Browser, step: &str, typed: &str| {
        let csrf = who.csrf().await;
        let fields = fields(&csrf, step, typed);
        let fields: Vec<(&str, &str)> = fields.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        who.post("/freeze", &fields).await
    };
    // Counted first; nothing happens before the word is typed, or by somebody who may not.
    assert!(send(&chen, "count", "").await.text().contains("ends 3 grants"));
    send(&chen, "confirm", "freez").await;
    assert!(!send(&ana, "confirm", "freeze").await.text().is_empty());
    assert_eq!(ops.state(&live).await, "active");
    assert!(works(&world, &held).await);

    let done = send(&chen, "confirm", "freeze").await;
    assert_eq!(done.status, 303, "{}", done.text());
    assert!(!works(&world, &held).await, "at once");
    for (agent, id, state) in [(&ops, &live, "ended"), (&ops, &waiting, "withdrawn"), (&helper, &child, "ended")] {
        assert_eq!(agent.wait(id, state).await["cause"]["cause"], "frozen", "{id}");
    }
    let why = ops.ask("T-2", notes()).await.problem(403, "frozen");
    assert!(why.contains("an incident"), "{why}");
    assert_eq!(other.state(&not_covered).await, "active");
    other.ask("T-2", notes()).await.ok();

    let page = chen.get("/freeze").await.text();
    let lift = page.split("action=\"/unfreeze/").nth(1).and_then(|r| r.split('"').next()).unwrap().to_owned();
    let csrf = chen.csrf().await;
    assert_eq!(ana.post(&format!("/unfreeze/{lift}"), &[("csrf", &ana.csrf().await)]).await.status, 403);
    ops.ask("T-2", notes()).await.problem(403, "frozen");
    assert_eq!(chen.post(&format!("/unfreeze/{lift}"), &[("csrf", &csrf)]).await.status, 303);
    ops.ask("T-2", notes()).await.ok();
    assert_eq!(ops.state(&live).await, "ended", "what it ended stays ended");
}

#[tokio::test]
async fn without_signs_of_life_it_ends_by_itself() {
    let Some(world) = Plan { postgres: true, ..Plan::default() }.start("story_endings").await else { return };
    let ops = world.agent("ops");
    let mut wanted = request("T-1", sandbox());
    wanted["heartbeat_secs"] = json!(4);
    ops.post("/v1/grants", &wanted).await.problem(400, "invalid-request");
    wanted["heartbeat_secs"] = json!(5);
    let asked = Instant::now();
    let silent = ops.post("/v1/grants", &wanted).await.ok()["id"].as_str().unwrap().to_owned();
    let alive = ops.post("/v1/grants", &wanted).await.ok()["id"].as_str().unwrap().to_owned();
    let login = ops.login(&silent).await;
    let session = world.cluster().login(&login.user, &login.password, &login.database).await.unwrap();
    let admin = world.cluster().admin("postgres").await;
    let oid = target::oid(&admin, &login.user).await;
    // Three intervals are missed before anybody is given up.
    let mut beaten: Option<Instant> = None;
    until_within(Duration::from_secs(20), "the silent one is cut", async || {
        if beaten.is_none_or(|at| at.elapsed() > Duration::from_secs(1)) {
            ops.post(&format!("/v1/grants/{alive}/heartbeat"), &json!({})).await.ok();
            beaten = Some(Instant::now());
        }
        session.is_closed()
    })
    .await;
    assert!(asked.elapsed() > Duration::from_secs(14), "{:?} is too early", asked.elapsed());
    assert_eq!(ops.wait(&silent, "ended").await["cause"]["cause"], "agent_lost");
    assert_eq!(target::left(&admin, oid, &login.user).await, [0, 0, 0, 0, 0]);
    assert_eq!(ops.state(&alive).await, "active");
    ops.post(&format!("/v1/grants/{silent}/heartbeat"), &json!({})).await.problem(409, "over");
}

#[tokio::test]
async fn who_waits_for_a_decision_hears_it_at_once_and_a_request_that_nobody_decides_lapses() {
    let plan = Plan { people: true, broker: "decide_within_secs = 12", ..Plan::default() };
    let Some(world) = plan.start("story_endings").await else { return };
    let ops = world.agent("ops");
    let ana = world.browser("ana").await;
    let forgotten = ops.asked("T-0", customers("read")).await;
    for (verdict, state) in [("approve", "active"), ("deny", "denied")] {
        let id = ops.asked("T-1", customers("read")).await;
        let version = ops.show(&id).await["version"].as_u64().unwrap();
        let waiting = tokio::spawn({
            let (ops, id) = (ops.clone(), id.clone());
            async move { (ops.poll(&id, version, Duration::from_secs(30)).await, Instant::now()) }
        });
        let form = ana.form(&id).await;
        assert!(!waiting.is_finished());
        let digest = form.digest.clone().unwrap();
        assert_eq!(ana.vote(&id, &form, &digest, verdict, "because").await.status, 303);
        let voted = Instant::now();
        let (answer, heard) = waiting.await.unwrap();
        assert_eq!(answer.ok()["state"], state);
        assert!(heard.saturating_duration_since(voted) < AWAKE);
        // Who asks with an old version, or about something decided, doesn't wait.
        let begun = Instant::now();
        ops.poll(&id, version, Duration::from_secs(30)).await.ok();
        ops.get(&format!("/v1/grants/{id}?wait=30s")).await.ok();
        assert!(begun.elapsed() < AWAKE);
    }
    for bad in ["wait=soon", "wait=-1", "wait=1h", "wait=99999999999999999999s", "version=x", "tier=none"] {
        ops.get(&format!("/v1/grants/{forgotten}?{bad}")).await.problem(400, "invalid-request");
    }
    // By the typed client, as `exec` waits.
    let seen = ops.client().show(forgotten.parse().unwrap()).await.unwrap();
    let seen = ops.client().wait_decision(seen, Duration::from_secs(30)).await.unwrap();
    assert_eq!(seen.state, "lapsed");
    let answer = ana.get(&format!("/grants/{forgotten}")).await;
    assert_eq!(answer.status, 200);
    ops.collect(&forgotten).await.problem(409, "over");
}
