//! Hot standbys of a real PostgreSQL: sessions there end too, what can't be asked there is not proven, and it delays nobody's cut.

#[path = "support/pg_ends.rs"]
mod pg_ends;
#[path = "support/pg_lease.rs"]
mod pg_lease;
#[path = "support/postgres.rs"]
mod postgres;

use std::sync::Arc;
use std::time::{Duration, Instant};

use countersign::connector::{Connector, RevokeError};
use countersign::core::lease::Evidence;
use pg_ends::{NOW, dead, ends, ends_at_last, seen};
use pg_lease::{Bench, Mode};
use postgres::{Cluster, THROW_AWAY, available, until};

/// A primary with a hot standby, and a bench that knows of it.
async fn with_a_standby(
    tag: &str,
    more: &[(&'static str, &'static str)],
) -> (Vec<(&'static str, &'static str)>, Cluster, Bench) {
    let mut settings = THROW_AWAY.to_vec();
    settings.extend([("wal_level", "replica"), ("max_wal_senders", "4"), ("hot_standby", "on")]);
    settings.extend(more);
    let primary = Arc::new(Cluster::start(&settings));
    let standby = primary.standby(&settings);
    let known = format!("standbys = [{{ host = '127.0.0.1', port = {} }}]", standby.port);
    let bench = Bench::on(primary, tag, Mode::Direct, &known).await;
    (settings, standby, bench)
}

#[tokio::test]
async fn a_session_on_a_hot_standby() {
    if !available("a_session_on_a_hot_standby") {
        return;
    }
    let mut settings = THROW_AWAY.to_vec();
    settings.extend([("wal_level", "replica"), ("max_wal_senders", "4"), ("hot_standby", "on")]);
    let primary = Arc::new(Cluster::start(&settings));
    let standby = primary.standby(&settings);
    let more = format!("standbys = [{{ host = '127.0.0.1', port = {} }}]", standby.port);
    let bench = Bench::on(Arc::clone(&primary), "hot", Mode::Direct, &more).await;
    let m = bench.mint("reads", &["read"]).await;
    until("the standby has the role", async || standby.login(m.name(), &m.password, &bench.database).await.is_ok())
        .await;
    let there = standby.login(m.name(), &m.password, &bench.database).await.unwrap();
    there.batch_execute("SELECT * FROM invoices").await.unwrap();
    let gone = ends(&bench, &m).await;
    assert!(dead(&there).await);
    assert_eq!(seen(&gone, "sessions_cut"), 1);
    let Evidence::TargetSaysGone { detail } = &gone.evidence else { panic!() };
    assert!(detail.contains("1 standbys"), "{detail}");
    // Without it there is no proof: a session may be open there.
    let m = bench.mint("again", &["read"]).await;
    standby.stop();
    let retry = bench.connector.revoke(&m.lease, NOW).await.unwrap_err();
    assert!(matches!(&retry, RevokeError::Retry { why } if why.contains("standby")), "{retry:?}");
    assert!(bench.login(&m).await.is_err(), "cut at the primary all the same");
    standby.run(&settings);
    ends(&bench, &m).await;
}

#[tokio::test]
async fn a_server_in_recovery_proves_nothing() {
    if !available("a_server_in_recovery_proves_nothing") {
        return;
    }
    let (_, standby, bench) = with_a_standby("recover", &[]).await;
    let there = standby.admin("postgres").await;
    let database = "SELECT count(*) FROM pg_database WHERE datname = $1";
    until("the standby has the database", async || {
        there.query_one(database, &[&bench.database]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    let broker = "SELECT count(*) FROM pg_authid WHERE rolname = $1 AND rolpassword IS NOT NULL";
    until("and the broker", async || there.query_one(broker, &[&bench.broker]).await.unwrap().get::<_, i64>(0) == 1)
        .await;
    there.batch_execute("SELECT pg_wal_replay_pause()").await.unwrap();
    let m = bench.mint("live", &["read"]).await;
    // A failover that went wrong, or a name that points at the wrong server: there the role doesn't exist.
    let astray = bench.another(
        &bench.prefix,
        &[("port", i64::from(standby.port).into()), ("standbys", toml::Value::Array(Vec::new()))],
    );
    let retry = astray.revoke(&m.lease, NOW).await.unwrap_err();
    assert!(matches!(retry, RevokeError::Retry { .. }), "{retry:?}");
    bench.login(&m).await.expect("it is live");
    there.batch_execute("SELECT pg_wal_replay_resume()").await.unwrap();
    ends(&bench, &m).await;
}

/// What can't be proven because of a server that is down takes nobody's turn: the cuts at the primary go on.
#[tokio::test]
async fn a_standby_that_is_down_delays_no_cut() {
    if !available("a_standby_that_is_down_delays_no_cut") {
        return;
    }
    let (settings, standby, bench) = with_a_standby("away", &[]).await;
    let mut all = Vec::new();
    for i in 0..8 {
        all.push(bench.mint(&format!("n{i}"), &["read"]).await);
    }
    standby.stop();
    let asked = Instant::now();
    let ends = all.iter().map(|m| bench.connector.revoke(&m.lease, NOW));
    for ended in futures::future::join_all(ends).await {
        assert!(matches!(&ended, Err(RevokeError::Retry { why }) if why.contains("standby")), "{ended:?}");
    }
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    for m in &all {
        assert!(bench.login(m).await.is_err(), "cut at the primary");
    }
    standby.run(&settings);
    for m in &all {
        ends_at_last(&bench, m).await;
    }
}

#[tokio::test]
async fn a_lock_table_full_on_a_standby() {
    if !available("a_lock_table_full_on_a_standby") {
        return;
    }
    let small = [("max_locks_per_transaction", "10"), ("max_connections", "25"), ("max_prepared_transactions", "0")];
    let (_, standby, bench) = with_a_standby("fulls", &small).await;
    bench.admin().await.batch_execute("GRANT EXECUTE ON FUNCTION pg_advisory_lock(bigint) TO PUBLIC").await.unwrap();
    let (first, m) = (bench.mint("first", &["read"]).await, bench.mint("fills", &["read"]).await);
    ends_at_last(&bench, &first).await;
    let there = standby.admin("postgres").await;
    let standing = "SELECT count(*) FROM pg_stat_activity WHERE usename = $1 AND state = 'idle in transaction'";
    until("the standing session is there", async || {
        there.query_one(standing, &[&bench.broker]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    let agent = standby.login(m.name(), &m.password, &bench.database).await.unwrap();
    // Nobody has its role cached any more, there neither.
    let own = bench.login(&m).await.unwrap();
    own.batch_execute("ALTER ROLE CURRENT_USER PASSWORD 'mine'").await.unwrap();
    let written: String =
        bench.admin().await.query_one("SELECT pg_current_wal_flush_lsn()::text", &[]).await.unwrap().get(0);
    let replayed = "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn";
    until("the standby has replayed that", async || there.query_one(replayed, &[&written]).await.unwrap().get(0)).await;
    let full = agent.batch_execute("SELECT pg_advisory_lock(i) FROM generate_series(1, 100000) i").await.unwrap_err();
    assert_eq!(full.code().unwrap().code(), "53200");
    ends_at_last(&bench, &m).await;
    assert!(dead(&agent).await);
}
