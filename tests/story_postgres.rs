//! "When my agent is done, its database access is gone: sessions, login, role, whatever it built. And I can read the proof."

#[path = "support/broker.rs"]
mod broker;

use std::io::Write as _;
use std::time::{Duration, Instant};

use broker::agent::{Login, app, request, sandbox, workshop};
use broker::{Plan, World, target, until_within};
use serde_json::{Value, json};
use tokio_postgres::error::SqlState;

/// From `complete` to no access.
const CUT: Duration = Duration::from_secs(2);

async fn world(test: &str, people: bool) -> Option<World> {
    Plan { postgres: true, people, ..Plan::default() }.start(test).await
}

/// The login that an agent holds no longer opens anything.
async fn refused(world: &World, login: &Login) {
    let Err(error) = world.cluster().login(&login.user, &login.password, &login.database).await else {
        panic!("the login works still")
    };
    let code = error.code().cloned();
    assert_eq!(code, Some(SqlState::INVALID_PASSWORD), "{error:?}");
}

#[tokio::test]
async fn when_i_complete_my_sessions_are_cut_my_login_is_refused_and_the_record_shows_the_proof() {
    let Some(world) = world("story_postgres", true).await else { return };
    let (ops, ana) = (world.agent("ops"), world.browser("ana").await);
    let id = ops.asked("T-1", workshop()).await;
    ana.approved(&id).await;
    let login = ops.login(&id).await;
    let admin = world.cluster().admin("app").await;
    let oid = target::oid(&admin, &login.user).await;

    // An open psql in the middle of a statement, one session that idles, and one in a transaction.
    let mut psql = world.cluster().agent_psql(&login.user, &login.password, &login.database);
    psql.stdin.as_mut().unwrap().write_all(b"SELECT pg_sleep(600);\n").unwrap();
    let idle = world.cluster().login(&login.user, &login.password, &login.database).await.unwrap();
    let busy = world.cluster().login(&login.user, &login.password, &login.database).await.unwrap();
    // D3: what it owns would work for somebody if it stayed: a definer function for everybody, a trigger on a table that
    // others fill, a view, a table.
    idle.batch_execute(
        "CREATE TABLE workshop.mine (id int);
         CREATE VIEW workshop.seen AS SELECT id FROM workshop.bench;
         CREATE FUNCTION workshop.door() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
           'BEGIN INSERT INTO workshop.mine VALUES (1); RETURN NEW; END';
         CREATE TRIGGER door BEFORE INSERT ON workshop.bench FOR EACH ROW EXECUTE FUNCTION workshop.door();
         GRANT EXECUTE ON FUNCTION workshop.door() TO PUBLIC;",
    )
    .await
    .unwrap();
    admin.batch_execute("INSERT INTO workshop.bench VALUES (1)").await.unwrap();
    busy.batch_execute("BEGIN; LOCK TABLE workshop.mine; INSERT INTO workshop.mine VALUES (2)").await.unwrap();
    until_within(Duration::from_secs(10), "three sessions are there", async || {
        target::sessions(&admin, oid).await == 3
    })
    .await;

    let asked = Instant::now();
    let completed = ops.complete(&id).await.ok();
    assert!(matches!(completed["state"].as_str(), Some("ending" | "ended")), "{completed}");
    until_within(CUT, "no session is left", async || target::sessions(&admin, oid).await == 0).await;
    let cut = asked.elapsed();
    let status = psql.wait().unwrap();
    assert!(!status.success(), "psql was cut");
    assert!(idle.simple_query("SELECT 1").await.is_err() && busy.simple_query("SELECT 1").await.is_err());
    refused(&world, &login).await;
    let ended = ops.wait(&id, "ended").await;
    eprintln!("three sessions cut {cut:?} after complete, evidence {:?} after it", asked.elapsed());

    assert_eq!(target::left(&admin, oid, &login.user).await, [0, 0, 0, 0, 0]);
    // The superuser's insert fires nothing of theirs any more; nobody finds their function, view or table.
    admin.batch_execute("INSERT INTO workshop.bench VALUES (2)").await.unwrap();
    let found = "SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                 WHERE n.nspname = 'workshop' AND c.relname <> 'bench'";
    assert_eq!(admin.query_one(found, &[]).await.unwrap().get::<_, i64>(0), 0);
    let found = "SELECT (SELECT count(*) FROM pg_proc WHERE proname = 'door') + (SELECT count(*) FROM pg_trigger WHERE tgname = 'door')";
    assert_eq!(admin.query_one(found, &[]).await.unwrap().get::<_, i64>(0), 0);

    // The proof: to the agent, and on the record that people read.
    let lease = &ended["leases"][0];
    assert_eq!(lease["state"], "revoked", "{ended}");
    let evidence = lease["evidence"].to_string();
    assert!(evidence.contains("target_says_gone") && evidence.contains(&oid.to_string()), "{evidence}");
    let seen = lease["seen"].as_array().unwrap();
    let count = |what: &str| seen.iter().find(|o| o["what"] == what).map_or(0, |o| o["count"].as_u64().unwrap());
    assert_eq!(count("sessions_cut"), 3, "{seen:?}");
    assert!(count("objects_dropped") >= 3, "{seen:?}");
    let record = world.browser("chen").await.form(&id).await.page;
    for part in ["the target says that it is gone", &oid.to_string(), "seen at the target", "ana"] {
        assert!(record.contains(part), "no {part:?} in {record}");
    }
}

#[tokio::test]
async fn a_login_ends_by_itself_when_its_time_is_up() {
    let Some(world) = world("story_postgres", false).await else { return };
    let ops = world.agent("ops");
    let mut short = request("T-1", sandbox());
    short["life_secs"] = json!(3);
    let asked = Instant::now();
    let id = ops.post("/v1/grants", &short).await.ok()["id"].as_str().unwrap().to_owned();
    let login = ops.login(&id).await;
    let admin = world.cluster().admin("sandbox").await;
    let oid = target::oid(&admin, &login.user).await;
    let session = world.cluster().login(&login.user, &login.password, &login.database).await.unwrap();
    assert_eq!(
        session.query_one("SELECT body FROM notes", &[]).await.unwrap().get::<_, String>(0),
        "nothing here is real"
    );
    // No call of the agent from here on: it is looked at from the outside.
    until_within(Duration::from_secs(8), "the session is cut", async || session.is_closed()).await;
    assert!(asked.elapsed() >= Duration::from_secs(3), "not before its time");
    until_within(CUT, "nothing is left", async || target::left(&admin, oid, &login.user).await == [0, 0, 0, 0, 0])
        .await;
    refused(&world, &login).await;
    let ended = ops.wait(&id, "ended").await;
    assert_eq!(ended["cause"], json!({ "cause": "expired" }), "{ended}");
}

#[tokio::test]
async fn l11_two_grants_for_one_thing_are_two_and_a_narrow_one_reaches_one_table() {
    let Some(world) = world("story_postgres", false).await else { return };
    let ops = world.agent("ops");
    let mut one_table = sandbox();
    one_table["tables"] = json!(["notes"]);
    let (first, second) = (ops.asked("T-1", sandbox()).await, ops.asked("T-1", one_table).await);
    let (one, two) = (ops.login(&first).await, ops.login(&second).await);
    assert_ne!(one.user, two.user);
    let narrow = world.cluster().login(&two.user, &two.password, &two.database).await.unwrap();
    narrow.query("SELECT * FROM notes", &[]).await.unwrap();
    let denied = narrow.query("SELECT * FROM drafts", &[]).await.unwrap_err();
    assert_eq!(denied.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE));

    ops.complete(&first).await.ok();
    ops.wait(&first, "ended").await;
    refused(&world, &one).await;
    narrow.query("SELECT * FROM notes", &[]).await.unwrap();
    world.cluster().login(&two.user, &two.password, &two.database).await.unwrap();
    assert_eq!(ops.state(&second).await, "active");
    let admin = world.cluster().admin("postgres").await;
    assert_eq!(target::leases(&admin).await, [two.user]);
}

#[tokio::test]
async fn g7_what_is_handed_on_is_less_and_ends_with_what_it_came_from() {
    let Some(world) = world("story_postgres", false).await else { return };
    let (ops, helper) = (world.agent("ops"), world.agent("helper"));
    let parent = ops.asked("T-1", sandbox()).await;
    let ops_login = ops.login(&parent).await;
    let child = |want: Value| {
        let mut child = request("T-1-part", want);
        child["parent"] = json!(parent);
        child["life_secs"] = json!(3000);
        child
    };
    let mut narrow = sandbox();
    narrow["tables"] = json!(["notes"]);

    // Wider: another table than the parent has, another resource.
    let narrow_parent = ops.asked("T-2", narrow.clone()).await;
    let mut wide = child(sandbox());
    wide["parent"] = json!(narrow_parent);
    helper.post("/v1/grants", &wide).await.problem(403, "not-narrower");
    helper.post("/v1/grants", &child(app("read"))).await.problem(403, "not-narrower");
    // Not handed to this agent; and no difference from one that isn't there.
    let stranger = world.agent("other");
    let not_yours = stranger.post("/v1/grants", &child(narrow.clone())).await;
    not_yours.problem(403, "parent");
    let mut nowhere = child(narrow.clone());
    nowhere["parent"] = json!("gr_00000000000000000000000000");
    assert_eq!(stranger.post("/v1/grants", &nowhere).await.text(), not_yours.text());

    let granted = helper.post("/v1/grants", &child(narrow)).await.ok();
    let id = granted["id"].as_str().unwrap().to_owned();
    let ends = |v: &Value| v["ends_at"].as_u64().unwrap();
    assert!(ends(&granted) <= ends(&ops.show(&parent).await), "it ends no later");
    let login = helper.login(&id).await;
    let session = world.cluster().login(&login.user, &login.password, &login.database).await.unwrap();
    session.query("SELECT * FROM notes", &[]).await.unwrap();
    let admin = world.cluster().admin("sandbox").await;
    let oid = target::oid(&admin, &login.user).await;

    ops.complete(&parent).await.ok();
    until_within(CUT, "the child's session is cut", async || session.is_closed()).await;
    let ended = helper.wait(&id, "ended").await;
    assert_eq!(ended["cause"], json!({ "cause": "parent_ended" }), "{ended}");
    assert_eq!(target::left(&admin, oid, &login.user).await, [0, 0, 0, 0, 0]);
    refused(&world, &login).await;
    refused(&world, &ops_login).await;
    // Nothing hangs from what is over.
    helper.post("/v1/grants", &child(sandbox())).await.problem(403, "parent");
    assert_eq!(ops.state(&narrow_parent).await, "active");
}

#[tokio::test]
async fn when_the_database_is_down_i_am_told_not_now_and_nothing_is_left_behind() {
    let Some(world) = world("story_postgres", false).await else { return };
    let ops = world.agent("ops");
    let id = ops.asked("T-1", sandbox()).await;
    // Once it worked, so the broker has sessions there that die with the server.
    let warm = ops.asked("T-1", sandbox()).await;
    let before = ops.login(&warm).await;
    ops.complete(&warm).await.ok();
    ops.wait(&warm, "ended").await;

    world.cluster().stop();
    for _ in 0..2 {
        let answer = ops.collect(&id).await;
        let detail = answer.problem(503, "target-unavailable");
        assert!(!answer.header("retry-after").is_empty(), "{:?}", answer.headers);
        assert!(!detail.contains(target::PASSWORD) && !detail.contains("canary"), "{detail}");
        assert!(answer.json()["next"].as_str().unwrap().contains("again"), "{}", answer.text());
    }
    let shown = ops.show(&id).await;
    assert_eq!(shown["state"], "active");
    for lease in shown["leases"].as_array().unwrap() {
        assert!(matches!(lease["state"].as_str(), Some("absent" | "unknown")), "{shown}");
    }

    world.cluster().run(&target::settings());
    let admin = world.cluster().admin("postgres").await;
    assert_eq!(target::leases(&admin).await, Vec::<String>::new());
    let login = ops.login(&id).await;
    assert_ne!(login.user, before.user);
    world.cluster().login(&login.user, &login.password, &login.database).await.unwrap();
    assert_eq!(target::leases(&admin).await, std::slice::from_ref(&login.user));
    ops.complete(&id).await.ok();
    let ended = ops.wait(&id, "ended").await;
    assert!(ended["leases"].as_array().unwrap().iter().all(|l| l["state"] == "absent" || l["state"] == "revoked"));
    assert_eq!(target::leases(&admin).await, Vec::<String>::new());
}
