//! Many leases at one real PostgreSQL that end together, and one that ends behind them.

#[path = "support/end_all.rs"]
mod end_all;
#[path = "support/pg_lease.rs"]
mod pg_lease;
#[path = "support/postgres.rs"]
mod postgres;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use countersign::connector::{Connector, Gone, Listener, RevokeError};
use countersign::core::event::Urgency;
use countersign::core::id::Timestamp;
use countersign::core::lease::Lease;
use end_all::end_all;
use futures::StreamExt;
use parking_lot::Mutex;
use pg_lease::{Bench, Minting, Mode, nothing_left};
use postgres::{Cluster, THROW_AWAY, available, until};
use rustix::process::{Pid, Signal, kill_process};

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

/// In one statement while it goes, and one that resists holds up no other.
#[tokio::test]
async fn of_many_that_are_dropped_together_one_may_resist() {
    if !available("of_many_that_are_dropped_together_one_may_resist") {
        return;
    }
    let bench = Bench::new("resist").await;
    let (mut admin, onlooker) = (bench.admin().await, bench.admin().await);
    let names: Vec<String> = (0..60).map(|i| format!("r{i}")).collect();
    let minted: Vec<_> =
        futures::stream::iter(&names).map(|name| bench.mint(name, &["read"])).buffered(6).collect().await;
    let leases: Vec<Lease> = minted.iter().map(|m| m.lease.clone()).collect();
    // It is about to own something: that isn't there yet, and the role can't be dropped.
    let resists = 37;
    let holds = admin.transaction().await.unwrap();
    let table = format!("CREATE TABLE held (); ALTER TABLE held OWNER TO {}", minted[resists].name());
    holds.batch_execute(&table).await.unwrap();
    let ended = end_all(&bench.connector, &leases, NOW).await;
    for (i, (m, outcome)) in minted.iter().zip(&ended).enumerate() {
        assert_eq!(outcome.is_ok(), i != resists, "{i}: {outcome:?}");
        if i != resists {
            nothing_left(&onlooker, m.oid, m.name()).await;
        }
    }
    holds.rollback().await.unwrap();
    bench.connector.revoke(&leases[resists], NOW).await.unwrap();
    nothing_left(&onlooker, minted[resists].oid, minted[resists].name()).await;
}

/// Hears when access of all is cut, and how many endings were told before that.
#[derive(Default)]
struct Hears {
    settled: AtomicUsize,
    cut_after: Mutex<Vec<usize>>,
}

impl Listener for Hears {
    fn settled(&self, _place: usize, outcome: Result<Gone, RevokeError>) {
        outcome.unwrap();
        self.settled.fetch_add(1, Ordering::SeqCst);
    }
    fn cut(&self) {
        self.cut_after.lock().push(self.settled.load(Ordering::SeqCst));
    }
}

#[tokio::test]
async fn groups_that_come_one_after_the_other_are_cut_together() {
    const GROUPS: usize = 12;
    const EACH: usize = 20;
    if !available("groups_that_come_one_after_the_other_are_cut_together") {
        return;
    }
    let mut settings = THROW_AWAY.to_vec();
    settings.push(("log_statement", "all"));
    let bench = Bench::on(Arc::new(Cluster::start(&settings)), "groups", Mode::Functions, "").await;
    let names: Vec<String> = (0..GROUPS * EACH).map(|i| format!("g{i}")).collect();
    let minted = futures::stream::iter(&names).map(|name| bench.mint(name, &["read"])).buffer_unordered(6);
    let leases: Vec<Lease> = minted.map(|m| m.lease).collect().await;
    let hears: Vec<Hears> = (0..GROUPS).map(|_| Hears::default()).collect();
    let groups = leases
        .chunks(EACH)
        .zip(&hears)
        .map(|(some, hears)| bench.connector.revoke_all(some, NOW, Urgency::Over, hears));
    futures::future::join_all(groups).await;
    for hears in &hears {
        assert_eq!(hears.settled.load(Ordering::SeqCst), EACH);
        assert_eq!(
            *hears.cut_after.lock(),
            [0],
            "whoever waits for a turn hears at once, and once, that this one is done with it"
        );
    }
    // The first alone, perhaps one more while the sessions are made, then all that have come by then.
    let cuts = bench.cluster.log().matches("SELECT countersign.shut(").count();
    assert!((1..=4).contains(&cuts), "{cuts} statements for {GROUPS} groups");
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
    let others: Vec<Minting> = minted.collect().await;
    let many: Vec<Lease> = others.iter().map(|m| m.lease.clone()).collect();
    let one = bench.mint("one", &["read"]).await;
    let session = bench.login(&one).await.unwrap();
    // Sessions that don't go hold both turns, before any role of theirs is dropped.
    let mut held = Vec::new();
    for m in [&others[0], &others[MANY / 2]] {
        let session = bench.login(m).await.unwrap();
        let pid: i32 = session.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
        held.push((session, Pid::from_raw(pid).unwrap()));
    }
    for (_, pid) in &held {
        kill_process(*pid, Signal::STOP).unwrap();
    }
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
            let left = left().await.1;
            for (_, pid) in &held {
                kill_process(*pid, Signal::CONT).unwrap();
            }
            left
        };
        tokio::join!(ending, cut)
    };
    let (ended, (gone, left_then)) = tokio::join!(end_all(&bench.connector, &many, NOW), behind);
    assert!(ended.iter().all(Result::is_ok) && gone.is_ok());
    assert_eq!(usize::try_from(left_then).unwrap(), MANY, "none of the others' roles was dropped before it was cut");
    nothing_left(&admin, one.oid, one.name()).await;
}
