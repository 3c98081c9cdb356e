//! Mints in doubt, on a real OpenBao and a real PostgreSQL: what a crash leaves is found and ended, and nothing else is.

#[path = "support/openbao.rs"]
mod openbao;
#[path = "support/vault_world.rs"]
mod world;

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use countersign::connector::vault::VaultConnector;
use countersign::connector::{
    Away, Connector, Found, Gap, Gone, MintContext, MintError, Minted, Revocability, RevokeError, SweepError,
};
use countersign::core::id::Timestamp;
use countersign::core::lease::{Evidence, Handle, Lease, LeaseIntent};
use countersign::core::permission::Permission;
use serde_json::{Value, json};
use world::*;

const LEASE_PATH: &str = "database/creds/billing-ro";

/// `known`, as the broker makes it: names and keys of the other leases.
fn known(c: &VaultConnector, leases: &[Lease]) -> BTreeSet<String> {
    let keys = leases.iter().flat_map(|l| l.handle.iter().flat_map(|h| c.keys(h)));
    keys.chain(leases.iter().map(|l| l.intent.name.clone())).collect()
}

async fn end_unknown(c: &VaultConnector, lease: &Lease, known: &BTreeSet<String>) -> countersign::connector::Gone {
    until_gone("in doubt", || async { c.revoke_unknown(lease, known, now()).await }).await
}

/// A handle whose log-in is as old as its intent.
fn long_ago(doubt: &LeaseIntent, handle: Option<Handle>) -> Option<Handle> {
    let mut handle = handle?;
    handle["prepared_at"] = json!(doubt.intended_at);
    Some(handle)
}

/// A role whose users take a second to make.
async fn slow(w: &World) {
    let creation = vec!["SELECT pg_sleep(1)".to_owned(), openbao::doc("sql creation")];
    let revocation: Vec<String> = openbao::doc("sql revocation").lines().map(str::to_owned).collect();
    w.bao.database_role("billing-ro", 600, &creation, &revocation).await;
}

/// Waits until such a mint is under way, as the database's own process list shows.
async fn reached_the_database(w: &World) {
    let start = Instant::now();
    let admin = w.db.admin().await;
    let sql = "SELECT 1 FROM pg_stat_activity WHERE query LIKE '%pg_sleep(1)%' AND pid <> pg_backend_pid()";
    while admin.query(sql, &[]).await.unwrap().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(20), "the mint never reached the database");
    }
}

#[tokio::test]
async fn each_kind_of_leak_is_ended_and_everything_else_lives() {
    let Some(w) = World::start("vault_recovery: leaks").await else { return };
    let c = w.billing_behind();
    let i = intent("bao/billing", &[], 300, 0);
    let known_lease = live(&i, &mint(&c, &i).await.unwrap());
    let known_user = known_lease.handle.as_ref().unwrap()["username"].as_str().unwrap().to_owned();
    let known = known(&c, &[known_lease]);

    // The answer of the mint was lost: a lease, linked to its token, that no journal knows.
    let doubt = intent("bao/billing", &[], 300, 0);
    let handle = c.prepare(&doubt).await.unwrap();
    drop(c.mint(&doubt, handle.as_ref(), &context()).await.unwrap());
    // A lease that is not linked to the token in doubt.
    w.bao.ok("GET", LEASE_PATH, Value::Null).await;
    // A user without any lease.
    w.db.admin().await.batch_execute("CREATE ROLE csv_leaked LOGIN PASSWORD 'x' VALID UNTIL 'tomorrow'").await.unwrap();
    assert_eq!((w.db.users("csv_").await.len(), w.bao.leases(LEASE_PATH).await.len()), (4, 3));

    let lease = unknown(&doubt, handle);
    // Not before the longest mint has passed: it might still be under way.
    let Err(RevokeError::Retry { why }) = c.revoke_unknown(&lease, &known, now()).await else { panic!("too early") };
    assert!(why.contains("may be under way at the target"), "{why}");
    let gone = end_unknown(&c, &lease, &known).await;
    assert!(said(&gone).contains("no user that the journal doesn't explain"), "{gone:?}");
    assert_eq!(w.db.users("csv_").await, [known_user]);
    assert_eq!(w.bao.leases(LEASE_PATH).await.len(), 1);
}

#[tokio::test]
async fn without_the_database_behind_it_ends_with_the_expiry_and_says_so() {
    let Some(w) = World::start("vault_recovery: no database behind").await else { return };
    let c = w.billing("", None);
    let doubt = intent("bao/billing", &[], 300, 100);
    let handle = long_ago(&doubt, c.prepare(&doubt).await.unwrap());
    let lease = unknown(&doubt, handle);
    let Err(RevokeError::EndsAt { at }) = c.revoke_unknown(&lease, &BTreeSet::new(), now()).await else {
        panic!("no proof yet")
    };
    // A log-in that came later counts.
    let later = unknown(&doubt, c.prepare(&doubt).await.unwrap());
    assert!(
        matches!(c.revoke_unknown(&later, &BTreeSet::new(), at).await, Err(RevokeError::EndsAt { at: a }) if a > at)
    );
    // Longest mint 2 s, the role's 600 s, 30 s skew.
    assert_eq!(at.ms_since(doubt.intended_at) / 1000, 2 + 600 + 30 + 1);
    let gone = c.revoke_unknown(&lease, &BTreeSet::new(), at).await.unwrap();
    assert!(matches!(gone.evidence, Evidence::Expired { skew_secs: 30, .. }), "{gone:?}");
    let says = c.revocability(&doubt.permission, 300).says;
    assert!(says.contains("until its VALID UNTIL, 10 minutes at most"), "{says}");

    // No log-in was recorded: no mint was asked for.
    let gone = c.revoke(&unknown(&doubt, None), now()).await.unwrap();
    assert!(said(&gone).contains("nothing was asked"), "{gone:?}");
}

#[tokio::test]
async fn a_role_that_others_use_is_never_swept() {
    let Some(w) = World::start("vault_recovery: not dedicated").await else { return };
    let shared =
        resource("bao/billing", "engine = \"database\"\npath = \"database/creds/billing-ro\"\nttl_secs_max = 600", "");
    let c = connect(&target(&w.bao.address(), ""), &[shared], &w.signer, &w.clock, None).unwrap();
    let theirs = w.bao.ok("GET", LEASE_PATH, Value::Null).await["lease_id"].as_str().unwrap().to_owned();
    assert_eq!(c.sweep().await.unwrap(), []);
    let doubt = intent("bao/billing", &[], 300, 100);
    let handle = long_ago(&doubt, c.prepare(&doubt).await.unwrap());
    let result = c.revoke_unknown(&unknown(&doubt, handle), &BTreeSet::new(), now()).await;
    assert!(matches!(result, Err(RevokeError::EndsAt { .. })), "{result:?}");
    assert!(w.bao.is_lease(&theirs).await);
    assert!(c.check().await.unwrap().iter().any(|g| g.what.contains("not declared `dedicated`")));
}

#[tokio::test]
async fn a_sweep_finds_what_no_lease_explains_and_leaves_the_young_alone() {
    let Some(w) = World::start("vault_recovery: sweep").await else { return };
    let c = w.billing_behind();
    let i = intent("bao/billing", &[], 300, 0);
    let minted = mint(&c, &i).await.unwrap();
    let known = known(&c, &[live(&i, &minted)]);
    let stray = w.bao.ok("GET", LEASE_PATH, Value::Null).await["lease_id"].as_str().unwrap().to_owned();
    w.db.admin().await.batch_execute("CREATE ROLE csv_stray").await.unwrap();
    w.db.admin().await.batch_execute("CREATE ROLE csx_not_ours").await.unwrap();
    let unexplained = || async {
        let mut found = c.sweep().await.unwrap();
        found.retain(|f| !known.contains(&f.name) && !c.keys(&f.handle).iter().any(|k| known.contains(k)));
        found
    };
    let found = unexplained().await;
    let names: BTreeSet<_> = found.iter().map(|f| f.name.as_str()).collect();
    assert_eq!(found.len(), 3, "{found:?}");
    assert!(names.contains(stray.as_str()) && names.contains("csv_stray"));
    for f in &found {
        let Err(RevokeError::Retry { why }) = c.revoke_found(f, now()).await else { panic!("too young: {f:?}") };
        assert!(why.contains("not recorded yet"), "{why}");
    }
    for f in &found {
        until_gone("found", || async { c.revoke_found(f, now()).await }).await;
    }
    assert_eq!(unexplained().await, []);
    assert_eq!(w.db.users("csv_").await, [minted.credential.public["username"].clone()]);
    assert_eq!(w.db.users("csx_").await.len(), 1);
}

#[tokio::test]
async fn a_mint_that_outlives_its_token_is_waited_for_and_ended() {
    let Some(w) = World::start("vault_recovery: race with revoke-accessor").await else { return };
    slow(&w).await;
    let c = Arc::new(w.billing_behind());
    let doubt = intent("bao/billing", &[], 300, 0);
    let handle = c.prepare(&doubt).await.unwrap();
    let lease = unknown(&doubt, handle.clone());
    let task = tokio::spawn({
        let (c, doubt) = (c.clone(), doubt.clone());
        async move { c.mint(&doubt, handle.as_ref(), &context()).await }
    });
    reached_the_database(&w).await;
    // In this process: not touched while it runs.
    let Err(RevokeError::Retry { why }) = c.revoke_unknown(&lease, &BTreeSet::new(), now()).await else { panic!() };
    assert!(why.contains("in this process"), "{why}");
    // Another process, after a crash of this one, ends the token meanwhile; the mint answers all the same.
    let other = w.billing_behind();
    assert!(matches!(other.revoke_unknown(&lease, &BTreeSet::new(), now()).await, Err(RevokeError::Retry { .. })));
    let minted = task.await.unwrap();
    let left = w.bao.leases(LEASE_PATH).await.len();
    eprintln!(
        "the mint answered {} with its token ended; leases left: {left}",
        if minted.is_ok() { "200" } else { "an error" }
    );
    drop(minted);
    end_unknown(&other, &lease, &BTreeSet::new()).await;
    assert_eq!((w.db.users("csv_").await.len(), w.bao.leases(LEASE_PATH).await.len()), (0, 0));
}

#[tokio::test]
async fn a_caller_that_goes_away_does_not_cut_the_mint() {
    let Some(w) = World::start("vault_recovery: detached").await else { return };
    slow(&w).await;
    let c = Arc::new(w.billing_behind());
    let i = intent("bao/billing", &[], 300, 0);
    let handle = c.prepare(&i).await.unwrap();
    let caller = tokio::spawn({
        let (c, i, handle) = (c.clone(), i.clone(), handle.clone());
        async move { c.mint(&i, handle.as_ref(), &context()).await }
    });
    reached_the_database(&w).await;
    caller.abort();
    assert!(caller.await.unwrap_err().is_cancelled());
    // A closed connection would cancel it at the target, and is what leaves users without a lease.
    let start = Instant::now();
    while w.bao.leases(LEASE_PATH).await.len() != 1 {
        assert!(start.elapsed() < Duration::from_secs(10), "the mint was cut");
    }
    end_unknown(&c, &unknown(&i, handle), &BTreeSet::new()).await;
    assert!(w.db.users("csv_").await.is_empty());
}

#[tokio::test]
async fn a_storm_of_disconnects_and_kills_leaves_nothing() {
    let Some(mut w) = World::start("vault_recovery: storm").await else { return };
    let c = Arc::new(w.billing_behind());
    let mut kept = Vec::new();
    for _ in 0..3 {
        let i = intent("bao/billing", &[], 300, 0);
        kept.push(live(&i, &mint(&c, &i).await.unwrap()));
    }
    let known = known(&c, &kept);
    let mut doubt = Vec::new();

    // A client that dies at every half millisecond of a mint.
    for step in 0..40u64 {
        let i = intent("bao/billing", &[], 300, 0);
        let mut handle = c.prepare(&i).await.unwrap().unwrap();
        let body = json!({ "policies": ["countersign-mint"], "no_default_policy": true, "ttl": "10m" });
        let auth = w.bao.ok("POST", "auth/token/create-orphan", body).await["auth"].clone();
        handle["accessor"] = auth["accessor"].clone();
        let mut tcp = std::net::TcpStream::connect(("127.0.0.1", w.bao.port())).unwrap();
        let token = auth["client_token"].as_str().unwrap();
        write!(tcp, "GET /v1/{LEASE_PATH} HTTP/1.1\r\nHost: x\r\nX-Vault-Token: {token}\r\n\r\n").unwrap();
        let until = Instant::now() + Duration::from_micros(500 * step);
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        tcp.shutdown(std::net::Shutdown::Both).unwrap();
        doubt.push(unknown(&i, Some(handle)));
    }
    // And OpenBao itself dies in the middle of mints.
    let mut tasks = Vec::new();
    for _ in 0..8 {
        let i = intent("bao/billing", &[], 300, 0);
        let handle = c.prepare(&i).await.unwrap();
        let c = c.clone();
        tasks.push(tokio::spawn(async move {
            let minted = c.mint(&i, handle.as_ref(), &context()).await;
            (i, handle, minted)
        }));
    }
    let start = Instant::now();
    while w.db.users("csv_").await.len() < 5 {
        assert!(start.elapsed() < Duration::from_secs(20), "no mint reached the database");
    }
    w.bao.kill();
    for task in tasks {
        let (i, handle, minted) = task.await.unwrap();
        match minted {
            // Answered in time, but its record was lost in the broker's own crash.
            Ok(_) | Err(MintError::Unknown { .. }) => doubt.push(unknown(&i, handle)),
            Err(MintError::NotMinted { why, .. }) => eprintln!("not minted: {why}"),
        }
    }
    w.bao.restart().await;
    let (users, leases) = (w.db.users("csv_").await.len() - 3, w.bao.leases(LEASE_PATH).await.len() - 3);
    eprintln!("{} mints in doubt left {users} users and {leases} leases", doubt.len());
    assert!(users > 0 && leases > 0, "the storm left nothing to find");

    // A fresh process.
    let c = w.billing_behind();
    for lease in &doubt {
        end_unknown(&c, lease, &known).await;
    }
    assert_eq!((w.db.users("csv_").await.len(), w.bao.leases(LEASE_PATH).await.len()), (3, 3));
    for lease in &kept {
        let user = lease.handle.as_ref().unwrap()["username"].as_str().unwrap();
        assert_eq!(w.db.users(user).await.len(), 1, "a lease that the journal knows was ended");
    }
}

#[tokio::test]
async fn a_wall_clock_that_is_ahead_makes_no_lease_look_absent() {
    let Some(w) = World::start("vault_recovery: wall clock ahead").await else { return };
    let c = w.billing_behind();
    let doubt = intent("bao/billing", &[], 300, 0);
    let handle = c.prepare(&doubt).await.unwrap();
    // What the mint left is not linked to its token.
    w.bao.ok("GET", LEASE_PATH, Value::Null).await;
    let lease = unknown(&doubt, handle);
    let ahead = || now().plus_secs(3600);
    // By the wall clock the doubt is an hour old, and this lease far too young to be the one.
    let Err(RevokeError::Retry { why }) = c.revoke_unknown(&lease, &BTreeSet::new(), ahead()).await else {
        panic!("called absent while its lease lives")
    };
    assert!(why.contains("not in the journal yet"), "{why}");
    until_gone("ahead", || async { c.revoke_unknown(&lease, &BTreeSet::new(), ahead()).await }).await;
    assert_eq!((w.db.users("csv_").await.len(), w.bao.leases(LEASE_PATH).await.len()), (0, 0));
}

#[tokio::test]
async fn a_mint_that_waited_too_long_for_its_record_is_not_made() {
    let Some(w) = World::start("vault_recovery: waited too long").await else { return };
    let c = w.billing_behind();
    let i = intent("bao/billing", &[], 300, 0);
    let handle = c.prepare(&i).await.unwrap();
    let accessor = handle.as_ref().unwrap()["accessor"].clone();
    // A tenth of the deadline: later it would end after those who look for it have looked.
    w.clock.ahead_ms.fetch_add(201, Ordering::SeqCst);
    let result = c.mint(&i, handle.as_ref(), &context()).await;
    let Err(MintError::NotMinted { why, transient: true }) = result else { panic!("{result:?}") };
    assert!(why.contains("too long passed"), "{why}");
    assert!(w.bao.leases(LEASE_PATH).await.is_empty() && w.db.users("csv_").await.is_empty());
    let start = Instant::now();
    while w.bao.call("PUT", "auth/token/lookup-accessor", json!({ "accessor": accessor })).await.0 == 200 {
        assert!(start.elapsed() < Duration::from_secs(10), "its token lives");
    }
}

/// The database behind, which makes time pass while it is looked at.
struct Slow {
    behind: Behind,
    clock: Arc<TestClock>,
    ms: std::sync::atomic::AtomicU64,
}

#[async_trait::async_trait]
impl Connector for Slow {
    fn kind(&self) -> &'static str {
        self.behind.kind()
    }
    fn revocability(&self, p: &Permission, secs: u64) -> Revocability {
        self.behind.revocability(p, secs)
    }
    fn fingerprint(&self, p: &Permission) -> Value {
        self.behind.fingerprint(p)
    }
    async fn mint(&self, i: &LeaseIntent, h: Option<&Handle>, c: &MintContext) -> Result<Minted, MintError> {
        self.behind.mint(i, h, c).await
    }
    fn mint_deadline(&self) -> Duration {
        self.behind.mint_deadline()
    }
    async fn revoke(&self, lease: &Lease, now: Timestamp) -> Result<Gone, RevokeError> {
        self.behind.revoke(lease, now).await
    }
    async fn probe(&self) -> Result<(), Away> {
        self.behind.probe().await
    }
    async fn sweep(&self) -> Result<Vec<Found>, SweepError> {
        self.behind.sweep().await
    }
    async fn sweep_prefix(&self, prefix: &str) -> Result<Vec<Found>, SweepError> {
        self.clock.ahead_ms.fetch_add(self.ms.load(Ordering::SeqCst), Ordering::SeqCst);
        self.behind.sweep_prefix(prefix).await
    }
    async fn revoke_found(&self, found: &Found, now: Timestamp) -> Result<Gone, RevokeError> {
        self.behind.revoke_found(found, now).await
    }
    async fn check(&self) -> Result<Vec<Gap>, SweepError> {
        self.behind.check().await
    }
}

#[tokio::test]
async fn nothing_is_ended_on_an_old_word_of_the_journal() {
    let Some(w) = World::start("vault_recovery: known is stale").await else { return };
    let slow = Slow { behind: Behind { port: w.db.port }, clock: w.clock.clone(), ms: 1_100.into() };
    let slow = Arc::new(slow);
    let c = w.billing("postgres_target = \"pg/billing\"\nusername_prefix = \"csv_\"", Some(slow.clone()));
    // Made, and recorded while the call below is under way: it isn't in the set that the call was given.
    let other = w.bao.ok("GET", LEASE_PATH, Value::Null).await["lease_id"].as_str().unwrap().to_owned();
    let doubt = intent("bao/billing", &[], 300, 100);
    let handle = long_ago(&doubt, c.prepare(&doubt).await.unwrap());
    let lease = unknown(&doubt, handle);
    // Older than any mint, so that its age doesn't save it.
    let start = Instant::now();
    while w.bao.ok("PUT", "sys/leases/lookup", json!({ "lease_id": other })).await["data"]["ttl"].as_u64() > Some(595) {
        assert!(start.elapsed() < Duration::from_secs(20));
    }
    let result = c.revoke_unknown(&lease, &BTreeSet::new(), now()).await;
    let Err(RevokeError::Retry { why }) = result else { panic!("ended on an old word: {result:?}") };
    assert!(why.contains("read too long ago"), "{why}");
    assert!(w.bao.is_lease(&other).await && w.db.users("csv_").await.len() == 1);
    // In time, and still unexplained: it is nobody's.
    slow.ms.store(0, Ordering::SeqCst);
    until_gone("in time", || async { c.revoke_unknown(&lease, &BTreeSet::new(), now()).await }).await;
    assert!(!w.bao.is_lease(&other).await && w.db.users("csv_").await.is_empty());
}

#[tokio::test]
async fn a_user_is_old_enough_only_by_the_boot_clock() {
    let Some(w) = World::start("vault_recovery: ages of users").await else { return };
    let c = w.billing_behind();
    w.db.admin().await.batch_execute("CREATE ROLE csv_stray").await.unwrap();
    let found = c.sweep().await.unwrap();
    // A wall clock that is years ahead changes nothing (guarantee 10).
    let far = now().plus_secs(10 * 365 * 86400);
    assert!(c.revoke_found(&found[0], far).await.is_err());
    w.clock.ahead_ms.store(2_000, Ordering::SeqCst);
    c.revoke_found(&found[0], now()).await.unwrap();
    assert!(w.db.users("csv_").await.is_empty());
}

#[tokio::test]
async fn with_the_database_down_it_is_tried_until_it_is_back() {
    let Some(mut w) = World::start("vault_recovery: database down").await else { return };
    let c = w.billing("", None);
    let i = intent("bao/billing", &[], 300, 0);
    let minted = mint(&c, &i).await.unwrap();
    let lease = live(&i, &minted);
    w.db.stop();
    // At mint: a clear "not now", and nothing is left behind.
    let j = intent("bao/billing", &[], 300, 0);
    match mint(&c, &j).await {
        Err(MintError::NotMinted { transient: true, why }) => {
            assert!(why.contains("can't reach the database"), "{why}");
        }
        // The first call after the stop may meet the connection that just died.
        Err(MintError::Unknown { .. }) => {}
        other => panic!("{other:?}"),
    }
    let Err(MintError::NotMinted { transient: true, .. }) = mint(&c, &j).await else { panic!("not clear") };
    // At the end: visible, and tried again; a lease whose time has passed is no less there.
    for at in [now(), now().plus_secs(86400)] {
        let Err(RevokeError::Retry { why }) = c.revoke(&lease, at).await else { panic!("not gone") };
        assert!(why.contains("failed to revoke entry"), "{why}");
    }
    w.db.run().await;
    let gone = until_gone("database back", || async { c.revoke(&lease, now()).await }).await;
    said(&gone);
    assert!(w.db.users("csv_").await.is_empty());
}

#[tokio::test]
async fn an_irrevocable_lease_is_ended_by_our_own_sync_revocation() {
    let Some(mut w) = World::start("vault_recovery: irrevocable").await else { return };
    let c = w.billing("", None);
    let i = intent("bao/billing", &[], 300, 0);
    let lease = live(&i, &mint(&c, &i).await.unwrap());
    let id = lease.handle.as_ref().unwrap()["lease_id"].as_str().unwrap().to_owned();
    w.db.stop();
    // OpenBao gives a lease up after 5 to 12 minutes of failures.
    w.bao.give_up(&id).await;
    let shown = w.bao.ok("PUT", "sys/leases/lookup", json!({ "lease_id": id })).await;
    assert!(shown["data"]["revoke_error"].is_string(), "{shown}");
    assert_eq!(w.bao.ok("GET", "sys/leases/count?type=irrevocable", Value::Null).await["data"]["lease_count"], 1);
    // With the database down it stays, and is not called gone.
    assert!(matches!(c.revoke(&lease, now()).await, Err(RevokeError::Retry { .. })));
    w.db.run().await;
    let gone = until_gone("irrevocable", || async { c.revoke(&lease, now()).await }).await;
    assert!(said(&gone).contains("revoked with sync"), "{gone:?}");
    assert_eq!(w.bao.ok("GET", "sys/leases/count?type=irrevocable", Value::Null).await["data"]["lease_count"], 0);
    assert!(w.db.users("csv_").await.is_empty() && !w.bao.is_lease(&id).await);
}
