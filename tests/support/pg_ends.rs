//! Ends leases at a PostgreSQL and looks at what is left, with an admin connection of the test's own.
#![allow(dead_code)] // each test binary uses what it needs

use std::sync::Arc;

use countersign::connector::{Connector, Gone};
use countersign::core::id::Timestamp;
use countersign::core::lease::Evidence;
use tokio_postgres::Client;

use crate::pg_lease::{Bench, Minting, nothing_left};
use crate::postgres::{Cluster, THROW_AWAY};

pub const NOW: Timestamp = Timestamp(0);

/// Ends the lease and looks: proof given, nothing left, no login.
pub async fn ends(bench: &Bench, m: &Minting) -> Gone {
    let gone = bench.connector.revoke(&m.lease, NOW).await.unwrap();
    assert!(matches!(gone.evidence, Evidence::TargetSaysGone { .. }));
    nothing_left(&bench.admin().await, m.oid, m.name()).await;
    assert!(bench.login(m).await.is_err());
    gone
}

/// The same, asked for again until it is proven, as the broker does it.
pub async fn ends_at_last(bench: &Bench, m: &Minting) -> Gone {
    for _ in 0..20 {
        if let Ok(gone) = bench.connector.revoke(&m.lease, NOW).await {
            nothing_left(&bench.admin().await, m.oid, m.name()).await;
            return gone;
        }
    }
    panic!("never proven")
}

/// Takes the lease from the broker, and holds what would give it back, until this session rolls back. On 15 a lease could do that itself
/// in early releases; an operator can on every version.
pub async fn taken_from_the_broker(bench: &Bench, m: &Minting) -> Client {
    let admin = bench.admin().await;
    admin.batch_execute(&format!("REVOKE {} FROM {}", m.name(), bench.broker)).await.unwrap();
    admin.batch_execute(&format!("BEGIN; GRANT {} TO {}", m.name(), bench.broker)).await.unwrap();
    admin
}

pub fn seen(gone: &Gone, what: &str) -> u64 {
    gone.seen.iter().find(|o| o.what == what).map_or(0, |o| o.count)
}

pub async fn dead(session: &Client) -> bool {
    session.batch_execute("SELECT 1").await.is_err()
}

/// A cluster whose lock table is small, so that an attack on it needs hundreds of locks and not thousands.
pub fn small_lock_table() -> Arc<Cluster> {
    let mut settings = THROW_AWAY.to_vec();
    settings.extend([
        ("max_locks_per_transaction", "10"),
        ("max_connections", "25"),
        ("max_prepared_transactions", "0"),
    ]);
    Arc::new(Cluster::start(&settings))
}
