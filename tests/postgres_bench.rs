//! How long a mint and an ending take at a real PostgreSQL that syncs to disk. Not run by itself:
//! `cargo test --release --test postgres_bench -- --ignored --nocapture`.

#[path = "support/pg_lease.rs"]
mod pg_lease;
#[path = "support/postgres.rs"]
mod postgres;

use std::sync::Arc;
use std::time::{Duration, Instant};

use countersign::connector::Connector;
use countersign::core::id::Timestamp;
use pg_lease::{Bench, Minting, Mode, context};
use postgres::Cluster;

#[derive(Default)]
struct Times {
    mint: Vec<Duration>,
    usable: Vec<Duration>,
    cut: Vec<Duration>,
    proven: Vec<Duration>,
}

impl Times {
    fn add(&mut self, mut other: Self) {
        self.mint.append(&mut other.mint);
        self.usable.append(&mut other.usable);
        self.cut.append(&mut other.cut);
        self.proven.append(&mut other.proven);
    }

    fn say(mut self, what: &str, took: Duration) {
        let n = self.mint.len();
        let line = |name: &str, all: &mut Vec<Duration>| {
            all.sort();
            let at = |p: usize| all[(all.len() - 1) * p / 100].as_secs_f64() * 1e3;
            println!("  {name:<22} p50 {:6.1} ms   p99 {:6.1} ms   max {:6.1} ms", at(50), at(99), at(100));
        };
        println!("{what}: {n} cycles, {:.0}/s", f64::from(u32::try_from(n).unwrap()) / took.as_secs_f64());
        line("mint", &mut self.mint);
        line("mint and log in", &mut self.usable);
        line("access cut", &mut self.cut);
        line("evidence", &mut self.proven);
    }
}

async fn cycle(bench: &Bench, name: String, times: &mut Times) {
    let intent = bench.intent(&name, &["read"]);
    let asked = Instant::now();
    let minted = bench.connector.mint(&intent, None, &context()).await.unwrap();
    times.mint.push(asked.elapsed());
    let m = Minting::of(intent, minted);
    let session = bench.login(&m).await.unwrap();
    session.batch_execute("SELECT * FROM invoices").await.unwrap();
    times.usable.push(asked.elapsed());
    let asked = Instant::now();
    let gone = bench.connector.revoke(&m.lease, Timestamp(0)).await.unwrap();
    times.proven.push(asked.elapsed());
    times.cut.push(gone.access_cut.unwrap());
}

/// The statements of TARGETS.md as they stand, one by one on a session for each agent: what the target itself allows.
async fn bare(bench: &Bench, broker: &tokio_postgres::Client, name: &str, verifier: &str, times: &mut Times) {
    let (tag, me) = (&bench.tag, &bench.broker);
    let asked = Instant::now();
    let make = format!(
        "CREATE ROLE {name} LOGIN PASSWORD '{verifier}' VALID UNTIL '2100-01-01' CONNECTION LIMIT 5 IN ROLE read_{tag}, conn_{tag} ROLE {me}"
    );
    broker.batch_execute(&make).await.unwrap();
    let oid: u32 = broker.query_one("SELECT oid FROM pg_roles WHERE rolname = $1", &[&name]).await.unwrap().get(0);
    times.mint.push(asked.elapsed());
    let session = bench.cluster.login(name, "bare", &bench.database).await.unwrap();
    session.batch_execute("SELECT * FROM invoices").await.unwrap();
    times.usable.push(asked.elapsed());
    let asked = Instant::now();
    let run = |sql: String| async move { broker.batch_execute(&sql).await.unwrap() };
    run(format!("REVOKE read_{tag}, conn_{tag} FROM {name}")).await;
    run(format!("ALTER ROLE {name} NOLOGIN PASSWORD NULL CONNECTION LIMIT 0 VALID UNTIL '-infinity'")).await;
    let mut empty_since = None;
    loop {
        broker
            .query("SELECT DISTINCT pid FROM pg_locks WHERE locktype='object' AND classid='pg_database'::regclass AND mode='RowExclusiveLock'", &[])
            .await
            .unwrap();
        broker.query("SELECT pid, usesysid FROM pg_stat_get_activity(NULL)", &[]).await.unwrap();
        let cut = broker
            .query("SELECT pg_terminate_backend(pid) FROM pg_stat_get_activity(NULL) WHERE usesysid = $1", &[&oid])
            .await
            .unwrap();
        match empty_since {
            _ if !cut.is_empty() => empty_since = None,
            None => empty_since = Some(Instant::now()),
            Some(since) if since.elapsed() >= Duration::from_millis(10) => break,
            Some(_) => {}
        }
        tokio::time::sleep(Duration::from_millis(if empty_since.is_some() { 10 } else { 2 })).await;
    }
    times.cut.push(asked.elapsed());
    run(format!("BEGIN; DROP OWNED BY {name} CASCADE; DROP ROLE {name}; COMMIT")).await;
    let proof = "SELECT (SELECT count(*) FROM pg_roles WHERE oid=$1), (SELECT count(*) FROM pg_stat_activity WHERE usesysid=$1), \
         (SELECT count(*) FROM pg_shdepend WHERE refclassid='pg_authid'::regclass AND refobjid=$1), \
         (SELECT count(*) FROM pg_auth_members WHERE $1 IN (roleid,member,grantor)), (SELECT count(*) FROM pg_db_role_setting WHERE setrole=$1)";
    broker.query(proof, &[&oid]).await.unwrap();
    times.proven.push(asked.elapsed());
}

async fn run_bare(cluster: &Arc<Cluster>, tag: &str) {
    let bench = Arc::new(Bench::on(Arc::clone(cluster), tag, Mode::Direct, "").await);
    let admin = bench.admin().await;
    admin.batch_execute("SET password_encryption = 'scram-sha-256'; CREATE ROLE sample PASSWORD 'bare'").await.unwrap();
    let verifier: String =
        admin.query_one("SELECT rolpassword FROM pg_authid WHERE rolname = 'sample'", &[]).await.unwrap().get(0);
    for (what, agents, each) in [("Bare statements, alone", 1, 200), ("Bare statements, 16 at once", 16, 120)] {
        let began = Instant::now();
        let tasks = (0..agents).map(|t| {
            let (bench, verifier) = (Arc::clone(&bench), verifier.clone());
            tokio::spawn(async move {
                let broker = bench
                    .cluster
                    .login(&bench.broker, &format!("broker-secret-{}", bench.tag), &bench.database)
                    .await
                    .unwrap();
                let mut times = Times::default();
                for i in 0..each {
                    bare(&bench, &broker, &format!("ls_{}_{agents}_{t}_{i}", bench.tag), &verifier, &mut times).await;
                }
                times
            })
        });
        let mut all = Times::default();
        for task in futures::future::join_all(tasks).await {
            all.add(task.unwrap());
        }
        all.say(what, began.elapsed());
    }
}

async fn run(cluster: &Arc<Cluster>, tag: &str, mode: Mode, more: &str) {
    println!("{mode:?} {more}");
    let bench = Arc::new(Bench::on(Arc::clone(cluster), tag, mode, more).await);
    cycle(&bench, "warm".to_owned(), &mut Times::default()).await;
    let mut times = Times::default();
    let began = Instant::now();
    for i in 0..200 {
        cycle(&bench, format!("a{i}"), &mut times).await;
    }
    times.say(&format!("{mode:?}, alone"), began.elapsed());
    let began = Instant::now();
    let tasks = (0..16).map(|t| {
        let bench = Arc::clone(&bench);
        tokio::spawn(async move {
            let mut times = Times::default();
            for i in 0..120 {
                cycle(&bench, format!("c{t}_{i}"), &mut times).await;
            }
            times
        })
    });
    let mut all = Times::default();
    for task in futures::future::join_all(tasks).await {
        all.add(task.unwrap());
    }
    all.say(&format!("{mode:?}, 16 at once"), began.elapsed());
}

#[ignore = "a measurement, not a check"]
#[tokio::test(flavor = "multi_thread")]
async fn measure() {
    let cluster = Arc::new(Cluster::start(&[("max_connections", "200")]));
    if std::env::var_os("BARE").is_none_or(|b| b != "no") {
        run_bare(&cluster, "mb").await;
    }
    run(&cluster, "md", Mode::Direct, "").await;
    run(&cluster, "mf", Mode::Functions, "").await;
    run(&cluster, "mi", Mode::Direct, "scram_iterations = 1").await;
}
