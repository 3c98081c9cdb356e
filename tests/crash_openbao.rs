//! "The broker may die at any moment and leaves nothing behind at OpenBao either": SIGKILL while leases (or users that
//! OpenBao has no lease for yet) exist and the journal knows an intent and an accessor alone. Counted from outside: the
//! lease list as root, the users as the database's admin, the journal read offline.

#[path = "support/crash_broker.rs"]
mod broker;
#[path = "support/gate.rs"]
mod gate;
#[path = "support/openbao.rs"]
mod openbao;

use std::collections::BTreeSet;
use std::time::Duration;

use broker::{Serving, Setup, until};
use countersign::audit::verify::Report;
use countersign::core::lease::{Absence, LeaseState};
use gate::Gate;
use openbao::{OpenBao, Postgres, doc};
use serde_json::{Value, json};

const ROLE: &str = "billing-ro";
const CREDS: &str = "database/creds/billing-ro";
/// What the broker sends to mint, and nothing else.
const MINT: &str = "GET /v1/database/creds/";
const AGENTS: usize = 4;
/// `mint_deadline_secs`: nothing of a mint is under way at the target after it. The server allows a request 2 s.
const DEADLINE_SECS: u64 = 6;

fn kills() -> usize {
    std::env::var("COUNTERSIGN_KILLS").ok().map_or(30, |n| n.parse().expect("COUNTERSIGN_KILLS is a number"))
}

fn catalogue(bao: u16, db: u16) -> String {
    format!(
        r#"
[[target]]
name = "db"
kind = "postgres"
[target.settings]
host = "127.0.0.1"
port = {db}
user = "countersign"
password = "file:pg.password"
sslmode = "disable"
connection_group = "lease_conn"

[[target]]
name = "bao"
kind = "vault"
[target.settings]
address = "http://127.0.0.1:{bao}"
mint_deadline_secs = {DEADLINE_SECS}
[target.settings.auth]
method = "jwt"
mint_role = "countersign-mint"
janitor_role = "countersign-janitor"
audience = "openbao"

[[resource]]
name = "bao/billing"
target = "bao"
title = "billing database (through OpenBao)"
environment = "sandbox"
isolated = true
sensitivity = "none"
action = [{{ name = "use", effect = "read" }}]
[resource.settings]
engine = "database"
path = "{CREDS}"
ttl_secs_max = 600
dedicated = true
revocation_cuts_sessions = true
postgres_target = "db"
username_prefix = "csv_"
"#
    )
}

fn want() -> Value {
    json!({ "type": "vault", "identifier": "bao/billing", "actions": ["use"] })
}

async fn users(admin: &tokio_postgres::Client) -> BTreeSet<String> {
    let sql = "SELECT rolname::text FROM pg_roles WHERE starts_with(rolname, 'csv_')";
    admin.query(sql, &[]).await.unwrap().iter().map(|r| r.get(0)).collect()
}

async fn leases(bao: &OpenBao) -> BTreeSet<String> {
    bao.leases(CREDS).await.into_iter().map(|key| format!("{CREDS}/{key}")).collect()
}

/// What is at the target and was not there before.
#[derive(Default)]
struct Fresh {
    users: BTreeSet<String>,
    leases: BTreeSet<String>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_while_leases_exist_that_only_their_accessors_tell_of() {
    let test = "killed_while_leases_exist_that_only_their_accessors_tell_of";
    let Some(bao) = OpenBao::start(test, 2).await else { return };
    let Some(db) = Postgres::start(test).await else { return };
    let admin = db.admin().await;
    admin
        .batch_execute("CREATE ROLE countersign LOGIN PASSWORD 'broker' CREATEROLE; CREATE ROLE lease_conn NOLOGIN")
        .await
        .unwrap();
    let gate = Gate::start(bao.port(), &[MINT]).await;
    let mut serving = Serving::prepare(|_, folder| {
        std::fs::write(folder.join("pg.password"), "broker").unwrap();
        Setup {
            catalogue: catalogue(gate.port, db.port),
            broker: "sweep_every_secs = 1".to_owned(),
            ..Setup::default()
        }
    });
    serving.up().await;
    bao.log_in_by_broker(&serving.agent_url(), &serving.file("ca.pem"), "").await;
    serving.stop().await;
    bao.database(&db, ROLE, 600, "csv_").await;
    let lines = |fence: &str| {
        doc(fence).lines().map(|l| l.replace("ROLE vault", "ROLE vault, countersign")).collect::<Vec<_>>()
    };
    bao.database_role(ROLE, 600, &lines("sql creation"), &lines("sql revocation")).await;
    // Somebody else's lease on the same mount.
    bao.database(&db, "reports", 3600, "rep_").await;
    let theirs = bao.ok("GET", "database/creds/reports", Value::Null).await;
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    let their_lease = text(&theirs["lease_id"]);
    let their_login = (text(&theirs["data"]["username"]), text(&theirs["data"]["password"]));
    let their_session = db.connect(&their_login.0, &their_login.1).await.unwrap();

    // And one of the broker's own, of the very role that is swept: it is somebody's, all the time.
    serving.up().await;
    let keeper = serving.agent("keeper");
    let kept_grant = keeper.asked("T-kept", 1800, want()).await;
    let kept = keeper.collected(&kept_grant).await;
    let kept_lease = text(&kept["public"]["lease_id"]);
    let kept_login = (text(&kept["public"]["username"]), text(&kept["secret"]["password"]));
    let kept_session = db.connect(&kept_login.0, &kept_login.1).await.unwrap();
    serving.kill();

    let (kills, mut caught, mut without_lease, mut found, mut round) = (kills(), 0, 0, 0, 0);
    let (mut users_seen, mut leases_seen) = (BTreeSet::new(), BTreeSet::new());
    while caught < kills {
        round += 1;
        assert!(round <= kills + 10, "{caught} of {round} kills came in the window");
        gate.close();
        serving.up().await;
        // What OpenBao went on with after the last kill is not of this round.
        users_seen.extend(users(&admin).await);
        leases_seen.extend(leases(&bao).await);
        let mut mints = Vec::new();
        for n in 0..AGENTS {
            let agent = serving.agent(&format!("a{n}"));
            mints.push(tokio::spawn(async move {
                let id = agent.asked(&format!("T-{round}"), 900, want()).await;
                agent.try_call("POST", &format!("/v1/grants/{id}/credentials"), Some(json!({}))).await.map(|a| a.status)
            }));
        }
        let mut fresh = Fresh::default();
        // Every second time in the middle of the mint: a user exists, and OpenBao may not have stored its lease.
        let early = round % 2 == 0;
        until("there is something at the target", Duration::from_secs(20), async || {
            fresh.users = users(&admin).await.difference(&users_seen).cloned().collect();
            if early {
                return !fresh.users.is_empty();
            }
            fresh.leases = leases(&bao).await.difference(&leases_seen).cloned().collect();
            fresh.leases.len() >= AGENTS
        })
        .await;
        serving.kill();
        for mint in mints {
            let answer = mint.await.unwrap();
            assert!(!matches!(answer, Ok(200)), "no credential had left");
        }

        // What was there when it died, and what the journal knew of it.
        let (users_now, leases_now) = (users(&admin).await, leases(&bao).await);
        fresh.users.extend(users_now.difference(&users_seen).cloned());
        fresh.leases.extend(leases_now.difference(&leases_seen).cloned());
        let record = serving.record();
        let in_window = record.leases().filter(|l| l.state == LeaseState::Intended);
        let in_window = in_window.filter(|l| l.handle.as_ref().is_some_and(|h| h["accessor"].is_string())).count();
        let journal = format!("{:?}", record.events);
        for what in fresh.users.iter().chain(&fresh.leases) {
            assert!(!journal.contains(what.as_str()), "{what} is in the record already: not in the window");
        }
        caught += usize::from(in_window > 0 && !fresh.users.is_empty());
        found += fresh.leases.len();
        without_lease += fresh.users.len().saturating_sub(fresh.leases.len());
        users_seen.extend(fresh.users);
        leases_seen.extend(fresh.leases);
        let intents = record.leases().count();
        assert!(users_seen.len() <= intents, "guarantee 1: {intents} intents for {} users", users_seen.len());
    }
    eprintln!(
        "OpenBao: {caught} of {round} kills in the window, {found} leases and {without_lease} users without a lease seen"
    );

    gate.open();
    serving.up().await;
    let waited = until("nothing of ours is left", Duration::from_secs(60), async || {
        users(&admin).await.iter().eq([&kept_login.0]) && leases(&bao).await.iter().eq([&kept_lease])
    })
    .await;
    eprintln!("OpenBao: nothing left {} s after the last start", waited.as_secs());

    assert!(bao.is_lease(&their_lease).await, "somebody else's lease on the same mount lives");
    assert_eq!(their_session.query("SELECT 1", &[]).await.unwrap().len(), 1, "and so does its session");
    db.connect(&their_login.0, &their_login.1).await.unwrap();
    assert_eq!(kept_session.query("SELECT 1", &[]).await.unwrap().len(), 1, "what an agent held all the time works");
    db.connect(&kept_login.0, &kept_login.1).await.unwrap();
    let state = &serving.record().grant(&kept_grant).leases.values().next().unwrap().state.clone();
    assert!(matches!(state, LeaseState::Live { released_at: Some(_), .. }), "{state:?}");
    keeper.complete(&kept_grant).await;

    // The broker goes on, and its record says what happened to each.
    let agent = serving.agent("a0");
    let id = agent.asked("T-after", 900, want()).await;
    let credential = agent.collected(&id).await;
    let (user, password) = (text(&credential["public"]["username"]), text(&credential["secret"]["password"]));
    db.connect(&user, &password).await.unwrap();
    for n in 0..AGENTS {
        let agent = serving.agent(&format!("a{n}"));
        for task in (1..=round).map(|r| format!("T-{r}")).chain(["T-after".to_owned()]) {
            agent.post(&format!("/v1/tasks/{task}/complete"), json!({})).await.ok();
        }
    }
    until("every grant ended", Duration::from_secs(60), async || {
        serving.record().grants.values().all(|g| g.state.word() == "ended")
    })
    .await;
    assert!(users(&admin).await.is_empty() && leases(&bao).await.is_empty());
    serving.stop().await;
    let record = serving.record();
    let mut revoked = 0;
    for lease in record.leases() {
        match &lease.state {
            LeaseState::Absent { absence: Absence::Proven { .. }, .. } => {}
            LeaseState::Revoked { .. } => revoked += 1,
            // A kill before its log-in came back: nothing was asked of the target.
            LeaseState::Absent { absence: Absence::NotMinted { .. }, .. } if lease.handle.is_none() => {}
            other => panic!("{}: {other:?}", lease.intent.name),
        }
    }
    assert_eq!(revoked, 2, "those that were handed over");
    assert!(kept_session.is_closed(), "and the one that was completed is cut");
    let Report::Verified(verified) = serving.verified() else { panic!("{:?}", serving.verified()) };
    assert!(verified.closed && verified.signatures_checked);
}
