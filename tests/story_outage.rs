//! "PostgreSQL was away for a while, with two hundred credentials due. And that other one will never come back."

#[path = "support/broker.rs"]
mod broker;

use std::time::Duration;

use broker::agent::{Login, request, sandbox};
use broker::{PATIENCE, Plan, World, process, target, until, until_within};
use futures::StreamExt;
use serde_json::{Value, json};

/// Credentials that are due at once.
const DUE: usize = 200;
/// From the return of the target until the last login is refused: promised are 2 s, on a machine that does nothing else.
const REFUSED: Duration = Duration::from_secs(20);

async fn held(world: &World, names: &[&str], count: usize) -> Vec<(broker::agent::Agent, String, Login)> {
    let agents: Vec<_> = names.iter().map(|n| world.agent(n)).collect();
    futures::stream::iter(0..count)
        .map(|i| {
            let ops = agents[i % agents.len()].clone();
            async move {
                let mut wanted = request("T-1", sandbox());
                wanted["life_secs"] = json!(600);
                let id = ops.post("/v1/grants", &wanted).await.ok()["id"].as_str().unwrap().to_owned();
                let login = ops.login(&id).await;
                (ops, id, login)
            }
        })
        .buffer_unordered(4)
        .collect()
        .await
}

#[tokio::test]
async fn two_hundred_that_came_due_while_it_was_down_are_refused_once_it_is_back_and_proven() {
    let plan = Plan {
        postgres: true,
        limits: "requests_per_agent_per_sec = 1000\nrequests_per_agent_burst = 1000\nopen_grants_per_agent_max = 1000",
        ..Plan::default()
    };
    let Some(world) = plan.start("story_outage").await else { return };
    let all = held(&world, &["ops", "ops-two", "helper"], DUE).await;
    world.cluster().stop();
    for (agent, id, _) in &all {
        agent.complete(id).await.ok();
    }
    const PROBES: &str = "countersign_target_probes_total{target=\"db\"}";
    let before = world.metric(PROBES).await;
    until("it was looked at for some seconds", async || world.metric(PROBES).await >= before + 4.0).await;
    assert_eq!(world.metric("countersign_leases_revoking").await.to_string(), DUE.to_string());

    world.cluster().run(&target::settings());
    let admin = world.cluster().admin("sandbox").await;
    let could = "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'cslease%' AND rolcanlogin \
                 AND has_database_privilege(oid, 'sandbox', 'CONNECT')";
    let took = until_within(REFUSED, "no login works any more", async || {
        admin.query_one(could, &[]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
    eprintln!("{DUE} logins are refused {took:?} after PostgreSQL came back");
    for (_, _, login) in all.iter().step_by(20) {
        assert!(world.cluster().login(&login.user, &login.password, &login.database).await.is_err());
    }
    for (agent, id, _) in &all {
        let ended = agent.wait(id, "ended").await;
        assert_eq!(ended["leases"][0]["evidence"]["kind"], "target_says_gone", "{ended}");
    }
    assert_eq!(target::leases(&admin).await, Vec::<String>::new());
    assert!(world.metric("countersign_leases_revoking").await < 0.5);
}

/// `countersign revoke …` with the session of somebody who signed in.
fn revoke(world: &World, session: &str, args: &[&str]) -> std::process::Output {
    let kept = json!({ "url": world.ports.reviewer_url(), "ca": world.file("ca.pem"), "session": session });
    std::fs::write(world.file("session.json"), kept.to_string()).unwrap();
    let mut command = std::process::Command::new(process::binary());
    command.arg("revoke").args(args).env_clear().env("COUNTERSIGN_SESSION_FILE", world.file("session.json"));
    command.output().unwrap()
}

fn audit(world: &World, id: &str) -> String {
    let mut command = std::process::Command::new(process::binary());
    let out = command.args(["audit", "show", id, "--data-dir"]).arg(world.file("data")).output().unwrap();
    String::from_utf8(out.stdout).unwrap()
}

#[tokio::test]
async fn what_an_operator_attests_is_told_as_their_word_everywhere_and_ends_when_it_shows_up_after_all() {
    let Some(world) = Plan { postgres: true, people: true, ..Plan::default() }.start("story_outage").await else {
        return;
    };
    let ops = world.agent("ops");
    let (id, other) = (ops.asked("T-1", sandbox()).await, ops.asked("T-2", sandbox()).await);
    let login = ops.login(&id).await;
    ops.login(&other).await;
    let chen = world.browser("chen").await;
    let session = chen.cli_session().await;
    let ben = world.browser("ben").await.cli_session().await;
    let attest = |who: &str, more: &[&str]| {
        revoke(&world, who, &[&["--force-absent", "--reason", "it was deleted"], more].concat())
    };
    let stderr = |out: &std::process::Output| String::from_utf8_lossy(&out.stderr).into_owned();

    // It is in force, and its target answers.
    let refused = attest(&session, &[&id]);
    assert!(!refused.status.success() && stderr(&refused).contains("db answers"), "{}", stderr(&refused));
    world.cluster().stop();
    ops.complete(&id).await.ok();
    ops.wait_until("an attempt has failed", PATIENCE, &id, |seen: &Value| seen["leases"][0]["attempts"].is_u64()).await;
    let refused = attest(&ben, &[&id]);
    assert!(!refused.status.success() && stderr(&refused).contains("operate"), "{}", stderr(&refused));
    let done = attest(&session, &["--target", "db"]);
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{said}{}", stderr(&done));
    for part in
        ["1 credential recorded as absent by your word, without proof", &id, "1 credential left as before", &other]
    {
        assert!(said.contains(part), "{part}: {said}");
    }

    let ended = ops.wait(&id, "ended").await;
    let lease = &ended["leases"][0];
    assert_eq!((&lease["state"], &lease["attested"]["by"]), (&json!("absent"), &json!("chen")));
    assert!(lease["evidence"].is_null(), "{lease}");
    let page = chen.get(&format!("/grants/{id}")).await.text();
    for part in ["not every credential is proven gone", "chen attests that its target no longer exists", "by a person"]
    {
        assert!(page.contains(part), "{part}: {page}");
    }
    let record = audit(&world, &id);
    assert!(record.contains("not proven: chen attests that its target no longer exists: “it was deleted”"), "{record}");
    assert!(!record.contains("gone: ") && !record.contains("proven gone"), "{record}");

    // It comes back, with the role in it.
    world.cluster().run(&target::settings());
    let admin = world.cluster().admin("sandbox").await;
    until("a sweep has ended it", async || !target::leases(&admin).await.contains(&login.user)).await;
    assert!(world.cluster().login(&login.user, &login.password, &login.database).await.is_err());
    assert_eq!(target::leases(&admin).await.len(), 1, "the other one works on");
    assert_eq!(ops.show(&id).await["leases"][0]["state"], "absent", "final means final");
}
