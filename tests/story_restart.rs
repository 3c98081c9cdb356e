//! "The broker went down. What I was given still ends, what I asked for still waits, and nothing came back to life."

#[path = "support/broker.rs"]
mod broker;

use std::time::{Duration, Instant};

use broker::agent::{Login, app, customers, notes, request, sandbox};
use broker::{PATIENCE, Plan, World, target, until};
use rustix::process::Signal;
use serde_json::{Value, json};

/// From the moment when a target is back until what was due there is ended.
const BACK: Duration = Duration::from_secs(2);

/// So many attempts to end its credential have failed.
fn attempted(times: u64) -> impl Fn(&Value) -> bool {
    move |seen| seen["leases"][0]["attempts"].as_u64().is_some_and(|n| n >= times)
}

/// The processes of the target that serve the broker now.
struct Backends(Vec<i32>);

impl Backends {
    async fn of(world: &World) -> Self {
        let admin = world.cluster().admin("postgres").await;
        let pids = "SELECT pid FROM pg_stat_activity WHERE application_name = 'countersign'";
        Self(admin.query(pids, &[]).await.unwrap().iter().map(|r| r.get(0)).collect())
    }
    fn all(&self, signal: Signal) {
        for pid in &self.0 {
            rustix::process::kill_process(rustix::process::Pid::from_raw(*pid).unwrap(), signal).unwrap();
        }
    }
}

async fn world(postgres: bool, people: bool) -> Option<World> {
    Plan { postgres, people, ..Plan::default() }.start("story_restart").await
}

#[tokio::test]
async fn after_a_kill_everything_is_as_it_was_and_ends_as_it_would_have() {
    let Some(mut world) = world(true, true).await else { return };
    let ops = world.agent("ops");
    let pending = ops.asked("T-1", customers("read")).await;
    let (long, kept) = (ops.asked("T-1", sandbox()).await, ops.asked("T-1", notes()).await);
    let mut short = request("T-1", sandbox());
    short["life_secs"] = json!(4);
    let short = ops.post("/v1/grants", &short).await.ok()["id"].as_str().unwrap().to_owned();
    let (long_login, short_login) = (ops.login(&long).await, ops.login(&short).await);
    let before = ops.show(&long).await;

    world.kill_and_restart().await;
    let after = ops.show(&long).await;
    for field in ["state", "version", "ends_at", "leases", "authorization_details"] {
        assert_eq!(before[field], after[field], "{field}");
    }
    let session = world.cluster().login(&long_login.user, &long_login.password, &long_login.database).await.unwrap();
    ops.collect(&long).await.problem(409, "already-released");
    ops.collect(&kept).await.ok();
    // Sessions of people are over; the request still waits for them.
    world.browser("ana").await.approved(&pending).await;
    ops.collect(&pending).await.ok();
    // Its time ran on while nobody was there.
    let ended = ops.wait(&short, "ended").await;
    assert_eq!(ended["cause"]["cause"], "expired");
    assert!(world.cluster().login(&short_login.user, &short_login.password, &short_login.database).await.is_err());
    ops.complete(&long).await.ok();
    ops.wait(&long, "ended").await;
    assert!(session.is_closed());
    assert_eq!(target::leases(&world.cluster().admin("postgres").await).await, Vec::<String>::new());
}

#[tokio::test]
async fn l5_a_stop_in_mid_revoke_goes_on_at_the_next_start() {
    let Some(mut world) = world(true, false).await else { return };
    let ops = world.agent("ops");
    let id = ops.asked("T-1", sandbox()).await;
    let login = ops.login(&id).await;
    let admin = world.cluster().admin("sandbox").await;
    let oid = target::oid(&admin, &login.user).await;
    // The role can't be changed while somebody holds its row: the ending gets stuck half-way.
    let blocker = world.cluster().admin("sandbox").await;
    blocker.batch_execute(&format!("BEGIN; ALTER ROLE {} CONNECTION LIMIT 7", login.user)).await.unwrap();
    ops.complete(&id).await.ok();
    // One goes on for a while, with pauses of its own, before it counts as failed.
    ops.wait_until("an attempt has failed", Duration::from_secs(40), &id, attempted(1)).await;
    assert_eq!(ops.state(&id).await, "ending");
    let status = world.broker.stop().await;
    assert!(status.success(), "{status}");
    blocker.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(target::leases(&admin).await, std::slice::from_ref(&login.user), "it is still there");
    world.up().await;
    let back = Instant::now();
    let ended = ops.wait(&id, "ended").await;
    eprintln!("evidence {:?} after the start", back.elapsed());
    assert_eq!(ended["leases"][0]["evidence"]["kind"], "target_says_gone");
    assert_eq!(target::left(&admin, oid, &login.user).await, [0, 0, 0, 0, 0]);
}

#[tokio::test]
async fn a_stop_answers_what_is_in_flight_and_takes_nothing_new() {
    let Some(mut world) = world(true, true).await else { return };
    let ops = world.agent("ops");
    let warm = ops.asked("T-0", sandbox()).await;
    ops.login(&warm).await;
    let id = ops.asked("T-1", sandbox()).await;
    let waiting = ops.asked("T-1", customers("read")).await;
    let version = ops.show(&waiting).await["version"].as_u64().unwrap();
    // A collection that the target answers late, and a long poll that nobody answers.
    let backends = Backends::of(&world).await;
    backends.all(Signal::STOP);
    let collecting = tokio::spawn({
        let (ops, id) = (ops.clone(), id.clone());
        async move { ops.collect(&id).await }
    });
    let polling = tokio::spawn({
        let ops = ops.clone();
        async move { ops.getting(&format!("/v1/grants/{waiting}?wait=30s&version={version}")).send().await }
    });
    ops.wait_until("the mint is intended", PATIENCE, &id, |seen| seen["leases"][0]["state"] == "intended").await;
    world.broker.signal(Signal::TERM);
    let ready = format!("http://127.0.0.1:{}/readyz", world.ports.metrics);
    until("it isn't ready any more", async || !world.http.get(&ready).send().await.is_ok_and(|r| r.status() == 200))
        .await;
    backends.all(Signal::CONT);
    let stopping = Instant::now();
    let login = Login::of(&collecting.await.unwrap().ok());
    let polled = polling.await.unwrap();
    let status = world.broker.ended().await;
    eprintln!(
        "stopped within {:?}; the long poll: {:?}",
        stopping.elapsed(),
        polled.as_ref().map(reqwest::Response::status)
    );
    assert!(status.success(), "{status}:\n{}", world.broker.stderr());
    assert!(stopping.elapsed() < Duration::from_secs(5), "a long poll doesn't hold up the end");
    assert!(polled.is_ok_and(|r| r.status() == 200), "and is answered");
    world.cluster().login(&login.user, &login.password, &login.database).await.unwrap();
    world.up().await;
    assert_eq!(ops.state(&id).await, "active");
    ops.complete(&id).await.ok();
    ops.wait(&id, "ended").await;
}

#[tokio::test]
async fn a_stop_waits_for_a_mint_whose_caller_went_away() {
    let Some(mut world) = world(true, false).await else { return };
    let ops = world.agent("ops");
    let warm = ops.asked("T-0", sandbox()).await;
    ops.login(&warm).await;
    let id = ops.asked("T-1", sandbox()).await;
    let backends = Backends::of(&world).await;
    backends.all(Signal::STOP);
    let collecting = tokio::spawn({
        let (ops, id) = (ops.clone(), id.clone());
        async move { ops.collect(&id).await }
    });
    ops.wait_until("the mint is intended", PATIENCE, &id, |seen| seen["leases"][0]["state"] == "intended").await;
    collecting.abort();
    world.broker.signal(Signal::TERM);
    let ready = format!("http://127.0.0.1:{}/readyz", world.ports.metrics);
    until("nobody is served any more", async || world.http.get(&ready).send().await.is_err()).await;
    backends.all(Signal::CONT);
    let status = world.broker.ended().await;
    assert!(status.success(), "{status}:\n{}", world.broker.stderr());
    world.up().await;
    // Its end is in the record: the next run has nothing to look for.
    let seen = ops.show(&id).await;
    assert_eq!(seen["leases"][0]["state"], "live", "{seen}");
    ops.complete(&id).await.ok();
    let ended = ops.wait(&id, "ended").await;
    assert_eq!(ended["leases"][0]["state"], "revoked", "{ended}");
    ops.complete(&warm).await.ok();
    ops.wait(&warm, "ended").await;
    assert_eq!(target::leases(&world.cluster().admin("postgres").await).await, Vec::<String>::new());
}

#[tokio::test]
async fn l3_what_was_minted_for_a_resource_that_left_the_catalogue_is_ended_all_the_same() {
    let Some(mut world) = world(true, false).await else { return };
    let ops = world.agent("ops");
    let id = ops.asked("T-1", sandbox()).await;
    let login = ops.login(&id).await;
    let admin = world.cluster().admin("sandbox").await;
    let oid = target::oid(&admin, &login.user).await;
    let catalogue = std::fs::read_to_string(world.file("catalogue.toml")).unwrap();
    let from = catalogue.find("[[resource]]\nname = \"postgres/sandbox\"").unwrap();
    let to = from + 1 + catalogue[from + 1..].find("[[resource]]").unwrap();
    world.change("catalogue.toml", &catalogue[from..to], "");
    world.restart().await;
    ops.ask("T-2", sandbox()).await.problem(400, "invalid-authorization-details");
    let asked = Instant::now();
    ops.complete(&id).await.ok();
    let ended = ops.wait(&id, "ended").await;
    eprintln!("evidence {:?} after complete", asked.elapsed());
    assert!(asked.elapsed() < Duration::from_secs(5));
    assert_eq!(ended["leases"][0]["evidence"]["kind"], "target_says_gone");
    assert_eq!(target::left(&admin, oid, &login.user).await, [0, 0, 0, 0, 0]);
}

#[tokio::test]
async fn l4_when_the_target_comes_back_what_is_due_there_is_ended_within_seconds() {
    let Some(mut world) = world(true, true).await else { return };
    let ops = world.agent("ops");
    let (first, second) = (ops.asked("T-1", sandbox()).await, ops.asked("T-2", sandbox()).await);
    let (one, two) = (ops.login(&first).await, ops.login(&second).await);
    world.cluster().stop();
    ops.complete(&first).await.ok();
    ops.complete(&second).await.ok();
    let shown = ops.wait_until("an attempt has failed", PATIENCE, &first, attempted(1)).await;
    assert_eq!(shown["state"], "ending");
    let error = shown["leases"][0]["last_error"].as_str().unwrap();
    assert!(error.contains("can't connect") && !error.contains("canary"), "{error}");
    assert!(world.metric("countersign_leases_revoking").await >= 2.0);
    // A restart in between, and then long enough for anybody's patience: the target is looked at, its leases aren't.
    world.kill_and_restart().await;
    assert_eq!(ops.state(&first).await, "ending");
    const PROBES: &str = "countersign_target_probes_total{target=\"db\"}";
    until("it is looked at again and again", async || world.metric(PROBES).await >= 5.0).await;
    assert!(world.metric("countersign_target_away{target=\"db\"}").await > 0.5);
    assert!(world.metric("countersign_leases_revoking_oldest_seconds").await >= 4.0);
    assert!(!world.metrics().await.contains("corp.test"), "no agent is named in a label");
    let browser = world.browser("chen").await;
    let page = browser.get("/").await.text();
    assert!(page.contains("not proven gone"), "people see it: {page}");
    let page = browser.get(&format!("/grants/{first}")).await.text();
    for part in ["failed attempt", "Target away", "as soon as its target serves"] {
        assert!(page.contains(part), "{part}: {page}");
    }

    let pause = ops.show(&first).await["leases"][0].clone();
    assert!(pause["away"].is_string() && pause["attempts"].as_u64().unwrap() <= 4, "{pause}");
    world.cluster().run(&target::settings());
    let back = Instant::now();
    for id in [&first, &second] {
        ops.wait_until("both are ended", Duration::from_secs(70), id, |seen| seen["state"] == "ended").await;
    }
    eprintln!("ended {:?} after PostgreSQL came back; the pause then: {pause}", back.elapsed());
    assert!(back.elapsed() < BACK, "{:?}", back.elapsed());
    let admin = world.cluster().admin("postgres").await;
    assert_eq!(target::leases(&admin).await, Vec::<String>::new());
    for login in [one, two] {
        assert!(world.cluster().login(&login.user, &login.password, &login.database).await.is_err());
    }
}

#[tokio::test]
async fn d11_what_was_changed_behind_an_approval_is_not_minted() {
    let Some(mut world) = world(true, true).await else { return };
    let ops = world.agent("ops");
    let ana = world.browser("ana").await;
    let (read, token, same) = (
        ops.asked("T-1", app("read")).await,
        ops.asked("T-1", customers("read")).await,
        ops.asked("T-1", app("write")).await,
    );
    let pending = ops.asked("T-1", app("read")).await;
    for id in [&read, &token, &same] {
        ana.approved(id).await;
    }
    let shown = ana.form(&pending).await.digest.unwrap();
    // Reading invoices becomes writing them; the token is for another API. What is behind `write` stays.
    world.change("catalogue.toml", "invoices = [\"app_invoices_read\"]", "invoices = [\"app_invoices_write\"]");
    world.change("catalogue.toml", "https://customers.test", "https://elsewhere.test");
    world.restart().await;
    let admin = world.cluster().admin("postgres").await;
    for (id, resource) in [(&read, "postgres/app"), (&token, "api/customers"), (&same, "postgres/app")] {
        let answer = ops.collect(id).await;
        let why = answer.problem(409, "over");
        assert!(why.contains(resource) && why.contains("changed since it was approved"), "{why}");
        let ended = ops.wait(id, "ended").await;
        assert_eq!(ended["cause"], json!({ "cause": "approved_thing_changed", "resource": resource }));
        assert!(ended["leases"].is_null(), "{ended}");
    }
    assert_eq!(target::leases(&admin).await, Vec::<String>::new(), "nothing was minted");
    // What waits is assessed anew: a vote on what was shown before is void.
    let ana = world.browser("ana").await;
    let form = ana.form(&pending).await;
    let answer = ana.vote(&pending, &form, &shown, "approve", "").await;
    assert_eq!(answer.status, 409, "{}", answer.text());
    let now = ana.form(&pending).await.digest.unwrap();
    assert_ne!(now, shown);
    ana.approved(&pending).await;
    let login = ops.login(&pending).await;
    assert_eq!(target::leases(&admin).await, [login.user]);
}
