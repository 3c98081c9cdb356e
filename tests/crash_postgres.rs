//! "The broker may die at any moment and leaves no login behind": SIGKILL while roles exist at a real PostgreSQL and the
//! journal knows their intents alone. An admin's connection counts what is there; the journal is read offline.

#[path = "support/crash_broker.rs"]
mod broker;
#[path = "support/gate.rs"]
mod gate;
#[path = "support/postgres.rs"]
mod postgres;

use std::collections::BTreeSet;
use std::time::Duration;

use broker::{PREFIX, Serving, Setup, until};
use countersign::audit::verify::Report;
use countersign::core::event::BrokerEvent;
use countersign::core::lease::{Absence, LeaseState};
use countersign::keys::{NameKey, NamePrefix};
use gate::Gate;
use postgres::Cluster;
use serde_json::{Value, json};

const PASSWORD: &str = "broker-secret";
/// What the broker sends to make a role, and nothing else.
const MINT: &str = "CREATE ROLE %I LOGIN";
/// Agents that mint at once: as many as the connector has sessions for.
const AGENTS: usize = 6;
/// Until nothing is left, after the last kill: the longest mint of this connector (43 s), and the ending.
const RECOVERY: Duration = Duration::from_secs(75);

fn kills() -> usize {
    std::env::var("COUNTERSIGN_KILLS").ok().map_or(30, |n| n.parse().expect("COUNTERSIGN_KILLS is a number"))
}

fn cluster() -> Cluster {
    let mut settings = postgres::THROW_AWAY.to_vec();
    settings.extend([("max_prepared_transactions", "0"), ("max_connections", "200")]);
    let cluster = Cluster::start(&settings);
    let run = |variables: &[(&str, &str)], sql: &str| {
        let out = cluster.psql("postgres", variables, sql);
        assert!(out.status.success(), "{sql:.80}: {}", String::from_utf8_lossy(&out.stderr));
    };
    let names = [("broker", "countersign"), ("group", "lease_conn"), ("leases", "on")];
    run(&names, include_str!("../config/postgres/10-broker-direct.sql"));
    run(&names, include_str!("../config/postgres/00-hardening.sql"));
    run(
        &[],
        &format!(
            "ALTER ROLE countersign PASSWORD '{PASSWORD}'; CREATE TABLE notes (body text); CREATE ROLE notes_read NOLOGIN; \
             GRANT SELECT ON notes TO notes_read; \
             CREATE ROLE nightly_report LOGIN PASSWORD 'nightly' IN ROLE lease_conn, notes_read; \
             CREATE ROLE cs_lease_lookalike LOGIN;"
        ),
    );
    cluster
}

fn catalogue(port: u16) -> String {
    format!(
        r#"
[[target]]
name = "db"
kind = "postgres"
[target.settings]
host = "127.0.0.1"
port = {port}
user = "countersign"
password = "file:pg.password"
sslmode = "disable"
connection_group = "lease_conn"

[[resource]]
name = "postgres/notes"
target = "db"
title = "notes database"
environment = "sandbox"
isolated = true
sensitivity = "none"
settings = {{ database = "postgres" }}
[[resource.action]]
name = "read"
effect = "read"
settings = {{ groups = ["notes_read"] }}
"#
    )
}

fn want() -> Value {
    json!({ "type": "postgres", "identifier": "postgres/notes", "actions": ["read"] })
}

async fn roles(admin: &tokio_postgres::Client) -> BTreeSet<String> {
    let sql = "SELECT rolname::text FROM pg_roles WHERE starts_with(rolname, $1)";
    admin.query(sql, &[&PREFIX]).await.unwrap().iter().map(|r| r.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_while_roles_exist_that_only_their_intents_tell_of() {
    if !postgres::available("killed_while_roles_exist_that_only_their_intents_tell_of") {
        return;
    }
    let cluster = cluster();
    let gate = Gate::start(cluster.port, &[MINT]).await;
    let mut serving = Serving::prepare(|_, folder| {
        std::fs::write(folder.join("pg.password"), PASSWORD).unwrap();
        Setup { catalogue: catalogue(gate.port), broker: "sweep_every_secs = 1".to_owned(), ..Setup::default() }
    });
    let admin = cluster.admin("postgres").await;
    // Somebody else's, at work all the time.
    let other = cluster.login("nightly_report", "nightly", "postgres").await.unwrap();

    let (kills, mut caught, mut roles_caught, mut round) = (kills(), 0, 0, 0);
    let mut seen = BTreeSet::new();
    while caught < kills {
        round += 1;
        assert!(round <= kills + 5, "{caught} of {round} kills came in the window");
        gate.close();
        serving.up().await;
        let mut mints = Vec::new();
        for n in 0..AGENTS {
            let agent = serving.agent(&format!("a{n}"));
            mints.push(tokio::spawn(async move {
                let id = agent.asked(&format!("T-{round}"), 900, want()).await;
                agent.try_call("POST", &format!("/v1/grants/{id}/credentials"), Some(json!({}))).await.map(|a| a.status)
            }));
        }
        // The observer, not the broker, says when.
        let mut fresh = BTreeSet::new();
        until("all roles exist at PostgreSQL", Duration::from_secs(20), async || {
            fresh = roles(&admin).await.difference(&seen).cloned().collect();
            fresh.len() >= AGENTS
        })
        .await;
        serving.kill();
        for mint in mints {
            let answer = mint.await.unwrap();
            assert!(!matches!(answer, Ok(200)), "no credential had left");
        }

        let record = serving.record();
        let there = roles(&admin).await;
        let in_window = fresh.iter().filter(|name| {
            let lease = record.leases().find(|l| l.intent.name == **name);
            let lease = lease.unwrap_or_else(|| panic!("{name} exists and its intent is not recorded (guarantee 1)"));
            there.contains(*name) && lease.state == LeaseState::Intended
        });
        let in_window = in_window.count();
        caught += usize::from(in_window > 0);
        roles_caught += in_window;
        seen.extend(fresh);
    }
    eprintln!("PostgreSQL: {caught} of {round} kills in the window, {roles_caught} roles without a live lease");

    gate.open();
    serving.up().await;
    let waited = until("nothing of ours is left", RECOVERY, async || roles(&admin).await.is_empty()).await;
    eprintln!("PostgreSQL: nothing left {} s after the last start", waited.as_secs());

    // What others have is as it was, the session that was open all the time too.
    assert_eq!(other.query("SELECT 1", &[]).await.unwrap().len(), 1);
    cluster.login("nightly_report", "nightly", "postgres").await.unwrap();
    let lookalike = admin.query("SELECT 1 FROM pg_roles WHERE rolname = 'cs_lease_lookalike'", &[]).await.unwrap();
    assert_eq!(lookalike.len(), 1);

    // What looks like ours and has no lease is ended by a sweep, and told.
    let prefix = NamePrefix::new(PREFIX.trim_end_matches('_')).unwrap();
    let orphan = NameKey::from_bytes(&[7; 32]).name(&prefix, &[b"orphan"]);
    admin.batch_execute(&format!("CREATE ROLE {orphan} LOGIN")).await.unwrap();
    until("the orphan is ended and told", Duration::from_secs(20), async || {
        let told = serving.record().broker;
        let of = |name: &str| *name == orphan;
        told.iter().any(|e| matches!(e, BrokerEvent::OrphanFound { name, .. } if of(name)))
            && told.iter().any(|e| matches!(e, BrokerEvent::OrphanGone { name, .. } if of(name)))
            && roles(&admin).await.is_empty()
    })
    .await;

    // And the broker is in order: it goes on, and its record says what happened to each.
    let agent = serving.agent("a0");
    let id = agent.asked("T-after", 900, want()).await;
    let credential = agent.collected(&id).await;
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    let (user, password) = (text(&credential["public"]["user"]), text(&credential["secret"]["password"]));
    cluster.login(&user, &password, "postgres").await.unwrap();
    for n in 0..AGENTS {
        let agent = serving.agent(&format!("a{n}"));
        for task in (1..=round).map(|r| format!("T-{r}")).chain(["T-after".to_owned()]) {
            agent.post(&format!("/v1/tasks/{task}/complete"), json!({})).await.ok();
        }
    }
    until("every grant ended", Duration::from_secs(30), async || {
        serving.record().grants.values().all(|g| g.state.word() == "ended")
    })
    .await;
    assert!(roles(&admin).await.is_empty());
    serving.stop().await;
    let record = serving.record();
    for lease in record.leases().filter(|l| l.intent.name != user) {
        assert!(
            matches!(&lease.state, LeaseState::Absent { absence: Absence::Proven { .. }, .. }),
            "{}: {:?}",
            lease.intent.name,
            lease.state
        );
    }
    let Report::Verified(verified) = serving.verified() else { panic!("{:?}", serving.verified()) };
    assert!(verified.closed && verified.signatures_checked);
}
