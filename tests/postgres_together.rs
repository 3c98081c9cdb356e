//! Many leases at one real PostgreSQL that end together, and one that ends behind them.

#[path = "support/end_all.rs"]
mod end_all;
#[path = "support/pg_lease.rs"]
mod pg_lease;
#[path = "support/postgres.rs"]
mod postgres;

use std::sync::Arc;

use countersign::connector::Connector;
use countersign::core::id::Timestamp;
use countersign::core::lease::Lease;
use end_all::end_all;
use futures::StreamExt;
use pg_lease::{Bench, Mode, nothing_left};
use postgres::{Cluster, THROW_AWAY, available, until};

const NOW: Timestamp = Timestamp(0);

#[tokio::test]
async fn endings_that_are_due_together_share_statements() {
    if !available("endings_that_are_due_together_share_statements") {
        return;
    }
    let mut settings = THROW_AWAY.to_vec();
    settings.push(("log_statement", "all"));
    let bench = Bench::on(Arc::new(Cluster::start(&settings)), "share", Mode::Functions, "").await;
    let mut all = Vec::new();
    for i in 0..16 {
        all.push(bench.mint(&format!("n{i}"), &["read"]).await);
    }
    // Each asked for by itself, as the broker does it when grants end one after the other.
    let leases: Vec<[Lease; 1]> = all.iter().map(|m| [m.lease.clone()]).collect();
    let ends = leases.iter().map(|lease| end_all(&bench.connector, lease, NOW));
    for ended in futures::future::join_all(ends).await {
        ended.into_iter().next().unwrap().unwrap();
    }
    let cuts = bench.cluster.log().matches("SELECT countersign.cut(").count();
    assert!((1..=4).contains(&cuts), "{cuts} statements for 16 endings");
}

#[tokio::test]
async fn many_end_in_shared_statements() {
    if !available("many_end_in_shared_statements") {
        return;
    }
    let bench = Bench::new("bulk").await;
    let admin = bench.admin().await;
    let mut all = Vec::new();
    for i in 0..40 {
        all.push(bench.mint(&format!("n{i}"), &["read"]).await);
    }
    let mut sessions = Vec::new();
    for m in all.iter().take(10) {
        sessions.push(bench.login(m).await.unwrap());
    }
    let mut leases: Vec<Lease> = all.iter().map(|m| m.lease.clone()).collect();
    let mut foreign = leases[0].clone();
    foreign.intent.name = "somebody".to_owned();
    leases.insert(3, foreign);
    let ended = end_all(&bench.connector, &leases, NOW).await;
    assert_eq!(ended.len(), 41);
    for (i, result) in ended.iter().enumerate() {
        assert_eq!(result.is_ok(), i != 3, "{i}: {result:?}");
    }
    for m in &all {
        nothing_left(&admin, m.oid, m.name()).await;
    }
}

/// Guarantee 4: access that can be cut at once is cut at once, however many roles are being dropped for others.
#[tokio::test]
async fn one_behind_many_is_cut_before_they_are_gone() {
    const MANY: usize = 560;
    if !available("one_behind_many_is_cut_before_they_are_gone") {
        return;
    }
    let bench = Bench::new("behind").await;
    let admin = bench.admin().await;
    let names: Vec<String> = (0..MANY).map(|i| format!("m{i}")).collect();
    let minted = futures::stream::iter(&names).map(|name| bench.mint(name, &["read"])).buffer_unordered(6);
    let many: Vec<Lease> = minted.map(|m| m.lease).collect().await;
    let one = bench.mint("one", &["read"]).await;
    let session = bench.login(&one).await.unwrap();
    let roles = "SELECT count(*) FILTER (WHERE NOT rolcanlogin), count(*) FROM pg_roles WHERE starts_with(rolname, $1) AND oid <> $2";
    let left = async || {
        let row = admin.query_one(roles, &[&bench.prefix, &one.oid]).await.unwrap();
        (row.get::<_, i64>(0), row.get::<_, i64>(1))
    };
    let behind = async {
        // The others are in line, and the first of them have their turn.
        until("the others' logins are cut", async || left().await.0 > 0).await;
        let ending = bench.connector.revoke(&one.lease, NOW);
        let cut = async {
            until("the one's session is cut", async || session.is_closed()).await;
            left().await.1
        };
        tokio::join!(ending, cut)
    };
    let (ended, (gone, left_then)) = tokio::join!(end_all(&bench.connector, &many, NOW), behind);
    assert!(ended.iter().all(Result::is_ok) && gone.is_ok());
    assert_eq!(usize::try_from(left_then).unwrap(), MANY, "none of the others' roles was dropped before it was cut");
    nothing_left(&admin, one.oid, one.name()).await;
}
