//! What a lease holder tries in order to survive its end, and what comes of it: TARGETS.md's table and a few more,
//! at a real PostgreSQL. Not here: what it leaves behind (`postgres_leaves.rs`), standbys (`postgres_standby.rs`).

#[path = "support/end_all.rs"]
mod end_all;
#[path = "support/pg_ends.rs"]
mod pg_ends;
#[path = "support/pg_lease.rs"]
mod pg_lease;
#[path = "support/postgres.rs"]
mod postgres;

use std::sync::Arc;
use std::time::{Duration, Instant};

use countersign::connector::Connector;
use countersign::core::lease::Lease;
use end_all::end_all;
use pg_ends::{NOW, dead, ends, ends_at_last, seen, small_lock_table, taken_from_the_broker};
use pg_lease::{Bench, Minting, Mode, nothing_left};
use postgres::{available, shared, until};

#[tokio::test]
async fn a_session_that_hides_behind_a_start_up_delay() {
    if !available("a_session_that_hides_behind_a_start_up_delay") {
        return;
    }
    for (tag, mode) in [("hide", Mode::Direct), ("hidef", Mode::Functions)] {
        let bench = Bench::on(shared(), tag, mode, "").await;
        let admin = bench.admin().await;
        let m = bench.mint("hides", &["read"]).await;
        let other = bench.mint("other", &["read"]).await;
        let delayed = |m: &Minting| {
            let (cluster, name, password, database) =
                (Arc::clone(&bench.cluster), m.name().to_owned(), m.password.clone(), bench.database.clone());
            tokio::spawn(async move {
                let session = cluster.login_with(&name, &password, &database, "-c post_auth_delay=4").await?;
                session.batch_execute("SELECT * FROM invoices").await
            })
        };
        let (hiding, innocent) = (delayed(&m), delayed(&other));
        let hidden = format!(
            "SELECT count(DISTINCT pid) FROM pg_locks l JOIN pg_database d ON d.oid = l.objid WHERE locktype = 'object' \
             AND d.datname = '{}' AND mode = 'RowExclusiveLock' AND pid NOT IN (SELECT pid FROM pg_stat_activity)",
            bench.database
        );
        until("both hide", async || admin.query_one(&hidden, &[]).await.unwrap().get::<_, i64>(0) == 2).await;
        let gone = ends(&bench, &m).await;
        assert_eq!(seen(&gone, "hidden_sessions_cut"), 1, "{gone:?}");
        assert!(hiding.await.unwrap().is_err(), "the hiding session wakes to nothing");
        // Guarantee 13: the same delay in another lease is left alone.
        assert!(innocent.await.unwrap().is_ok());
        ends(&bench, &other).await;
    }
}

#[tokio::test]
async fn a_lock_table_full_of_advisory_locks() {
    if !available("a_lock_table_full_of_advisory_locks") {
        return;
    }
    let bench = Bench::on(small_lock_table(), "full", Mode::Direct, "").await;
    bench.admin().await.batch_execute("GRANT EXECUTE ON FUNCTION pg_advisory_lock(bigint) TO PUBLIC").await.unwrap();
    let m = bench.mint("fills", &["read"]).await;
    let agent = bench.login(&m).await.unwrap();
    // Nobody has its role cached any more.
    agent.batch_execute("ALTER ROLE CURRENT_USER PASSWORD 'mine'").await.unwrap();
    let full = agent.batch_execute("SELECT pg_advisory_lock(i) FROM generate_series(1, 100000) i").await.unwrap_err();
    assert_eq!(full.code().unwrap().code(), "53200");
    // The table stays full, and new logins fail: the standing session does it.
    assert!(bench.login(&m).await.is_err());
    let gone = bench.connector.revoke(&m.lease, NOW).await.unwrap_or_else(|e| panic!("{e}\n{}", bench.cluster.log()));
    assert_eq!(seen(&gone, "sessions_cut"), 1);
    assert!(dead(&agent).await);
    nothing_left(&bench.admin().await, m.oid, m.name()).await;
}

#[tokio::test]
async fn an_uncommitted_change_of_its_own_role() {
    if !available("an_uncommitted_change_of_its_own_role") {
        return;
    }
    let bench = Bench::new("alter").await;
    let m = bench.mint("alters", &["read"]).await;
    let agent = bench.login(&m).await.unwrap();
    agent.batch_execute("BEGIN; ALTER ROLE CURRENT_USER PASSWORD 'mine'").await.unwrap();
    let asked = Instant::now();
    ends(&bench, &m).await;
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    assert!(dead(&agent).await);
}

#[tokio::test]
async fn d4_its_own_password() {
    if !available("d4_its_own_password") {
        return;
    }
    let bench = Bench::new("pass").await;
    let m = bench.mint("changes", &["read"]).await;
    let agent = bench.login(&m).await.unwrap();
    agent
        .batch_execute("ALTER ROLE CURRENT_USER PASSWORD 'mine'; ALTER ROLE CURRENT_USER SET work_mem = '1MB'")
        .await
        .unwrap();
    let again = bench.cluster.login(m.name(), "mine", &bench.database).await.unwrap();
    ends(&bench, &m).await;
    assert!(dead(&agent).await && dead(&again).await);
    assert!(bench.cluster.login(m.name(), "mine", &bench.database).await.is_err());
}

/// Not in TARGETS.md: the membership by which the broker ends sessions is gone, and what would give it back is locked. Sessions are ended
/// by force all the same, those that hide too; the proof waits for the lock.
#[tokio::test]
async fn a_lease_that_is_taken_from_the_broker() {
    if !available("a_lease_that_is_taken_from_the_broker") {
        return;
    }
    for (tag, mode) in [("take", Mode::Direct), ("takef", Mode::Functions)] {
        let bench = Bench::on(shared(), tag, mode, "").await;
        let m = bench.mint("takes", &["read"]).await;
        let agent = bench.login(&m).await.unwrap();
        let hiding = {
            let (cluster, name, password, database) =
                (Arc::clone(&bench.cluster), m.name().to_owned(), m.password.clone(), bench.database.clone());
            tokio::spawn(async move {
                let session = cluster.login_with(&name, &password, &database, "-c post_auth_delay=10").await?;
                session.batch_execute("SELECT 1").await
            })
        };
        let admin = bench.admin().await;
        let hidden = format!(
            "SELECT count(DISTINCT pid) FROM pg_locks l JOIN pg_database d ON d.oid = l.objid WHERE locktype = 'object' \
             AND d.datname = '{}' AND mode = 'RowExclusiveLock' AND pid NOT IN (SELECT pid FROM pg_stat_activity)",
            bench.database
        );
        until("it hides", async || admin.query_one(&hidden, &[]).await.unwrap().get::<_, i64>(0) == 1).await;
        let taken = taken_from_the_broker(&bench, &m).await;
        let helping = async {
            until("its session is cut by force", async || dead(&agent).await).await;
            assert!(hiding.await.unwrap().is_err(), "and the one that hides");
            assert!(bench.login(&m).await.is_err());
            taken.batch_execute("ROLLBACK").await.expect("a stranger's session is left alone");
        };
        let (gone, ()) = futures::join!(ends_at_last(&bench, &m), helping);
        assert!(bench.connector.sweep().await.unwrap().is_empty(), "no way round is left: {gone:?}");
    }
}

#[tokio::test]
async fn a_lease_that_gives_itself_to_a_friend() {
    if !available("a_lease_that_gives_itself_to_a_friend") {
        return;
    }
    let bench = Bench::new("friend").await;
    let (m, friend) = (bench.mint("gives", &["read"]).await, bench.mint("friend", &["write"]).await);
    let (agent, other) = (bench.login(&m).await.unwrap(), bench.login(&friend).await.unwrap());
    if agent.batch_execute(&format!("GRANT {} TO {} WITH ADMIN OPTION", m.name(), friend.name())).await.is_err() {
        return; // PostgreSQL 16 and later
    }
    other.batch_execute(&format!("GRANT {} TO {} WITH ADMIN OPTION", friend.name(), m.name())).await.unwrap_err();
    other
        .batch_execute(&format!(
            "SET ROLE {}; SELECT * FROM invoices; BEGIN; GRANT {} TO {}",
            m.name(),
            m.name(),
            bench.broker
        ))
        .await
        .unwrap();
    ends(&bench, &m).await;
    let again = bench.login(&friend).await.unwrap();
    assert!(again.batch_execute("SELECT * FROM invoices").await.is_err(), "what the friend got is gone");
    again.batch_execute("SELECT * FROM customers").await.expect("what is its own stays");
    ends(&bench, &friend).await;
}

#[tokio::test]
async fn one_saboteur_does_not_fail_the_rest() {
    if !available("one_saboteur_does_not_fail_the_rest") {
        return;
    }
    let bench = Bench::new("sab").await;
    let mut all = Vec::new();
    for i in 0..12 {
        all.push(bench.mint(&format!("n{i}"), &["make"]).await);
    }
    let saboteur = bench.login(&all[5]).await.unwrap();
    saboteur.batch_execute("CREATE TABLE playground.t ()").await.unwrap();
    saboteur.batch_execute("BEGIN; ALTER ROLE CURRENT_USER PASSWORD 'mine'").await.unwrap();
    let leases: Vec<Lease> = all.iter().map(|m| m.lease.clone()).collect();
    for (i, result) in end_all(&bench.connector, &leases, NOW).await.into_iter().enumerate() {
        let gone = result.unwrap();
        assert_eq!(seen(&gone, "objects_dropped"), u64::from(i == 5));
        nothing_left(&bench.admin().await, all[i].oid, all[i].name()).await;
    }
}

#[tokio::test]
async fn a_reconnect_storm_and_loops_that_catch_everything() {
    if !available("a_reconnect_storm_and_loops_that_catch_everything") {
        return;
    }
    let bench = Bench::new("storm").await;
    let m = bench.mint("storms", &["read"]).await;
    let stubborn = bench.login(&m).await.unwrap();
    let looping = tokio::spawn(async move {
        stubborn
            .batch_execute("LISTEN x; DO $$ BEGIN LOOP BEGIN PERFORM pg_sleep(1); EXCEPTION WHEN OTHERS THEN NULL; END; END LOOP; END $$")
            .await
    });
    let cursor = bench.login(&m).await.unwrap();
    cursor
        .batch_execute("BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT generate_series(1, 1000000); FETCH 10 FROM c")
        .await
        .unwrap();
    let storm = (0..4).map(|_| {
        let (cluster, name, password, database) =
            (Arc::clone(&bench.cluster), m.name().to_owned(), m.password.clone(), bench.database.clone());
        tokio::spawn(async move {
            let mut logins = 0;
            while let Ok(session) = cluster.login(&name, &password, &database).await {
                logins += 1;
                drop(session);
            }
            logins
        })
    });
    let storm: Vec<_> = storm.collect();
    ends(&bench, &m).await;
    assert!(looping.await.unwrap().is_err() && dead(&cursor).await);
    for logins in storm {
        logins.await.unwrap();
    }
}

#[tokio::test]
async fn a_login_that_stalls_in_the_middle_of_sasl() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    if !available("a_login_that_stalls_in_the_middle_of_sasl") {
        return;
    }
    let bench = Bench::new("stall").await;
    let m = bench.mint("stalls", &["read"]).await;
    // Between the agent and the server: lets the start-up through, holds back the agent's proof until told.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (release, released) = tokio::sync::oneshot::channel::<()>();
    let (stalled, is_stalled) = tokio::sync::oneshot::channel::<()>();
    let server_port = bench.cluster.port;
    tokio::spawn(async move {
        let (mut agent, _) = listener.accept().await.unwrap();
        let mut server = tokio::net::TcpStream::connect(("127.0.0.1", server_port)).await.unwrap();
        let mut buffer = [0u8; 4096];
        // Start-up, SASL offer, client-first, server-first: then the client-final message is held.
        for i in 0..2 {
            let n = agent.read(&mut buffer).await.unwrap();
            server.write_all(&buffer[..n]).await.unwrap();
            let n = server.read(&mut buffer).await.unwrap();
            assert_eq!(buffer[0], b'R', "authentication goes on, {i}");
            agent.write_all(&buffer[..n]).await.unwrap();
        }
        let n = agent.read(&mut buffer).await.unwrap();
        stalled.send(()).unwrap();
        released.await.unwrap();
        // The server may have hung up already.
        let _ = server.write_all(&buffer[..n]).await;
        let _ = tokio::io::copy_bidirectional(&mut agent, &mut server).await;
    });
    let (name, password, database) = (m.name().to_owned(), m.password.clone(), bench.database.clone());
    let login = tokio::spawn(async move {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(port).user(&name).password(&password).dbname(&database);
        config.connect(tokio_postgres::NoTls).await.map(drop)
    });
    is_stalled.await.unwrap();
    ends(&bench, &m).await;
    release.send(()).unwrap();
    assert!(login.await.unwrap().is_err(), "a proof that comes after the end opens nothing");
}

#[tokio::test]
async fn a_role_dropped_by_somebody_else_while_its_session_is_open() {
    if !available("a_role_dropped_by_somebody_else_while_its_session_is_open") {
        return;
    }
    let bench = Bench::new("over").await;
    let admin = bench.admin().await;
    let m = bench.mint("over", &["read"]).await;
    let agent = bench.login(&m).await.unwrap();
    admin.batch_execute(&format!("DROP ROLE {}", m.name())).await.unwrap();
    let revoking = tokio::time::timeout(Duration::from_secs(2), bench.connector.revoke(&m.lease, NOW)).await;
    assert!(!matches!(revoking, Ok(Ok(_))), "a dropped role with an open session is not gone");
    admin
        .execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usesysid = $1", &[&m.oid])
        .await
        .unwrap();
    until("its session is gone", async || dead(&agent).await).await;
    ends(&bench, &m).await;
}

#[tokio::test]
async fn an_oid_that_now_has_another_name_is_not_touched() {
    if !available("an_oid_that_now_has_another_name_is_not_touched") {
        return;
    }
    let bench = Bench::new("moved").await;
    let admin = bench.admin().await;
    let m = bench.mint("moved", &["read"]).await;
    admin.batch_execute(&format!("ALTER ROLE {} RENAME TO payroll_moved", m.name())).await.unwrap();
    let revoking = tokio::time::timeout(Duration::from_secs(1), bench.connector.revoke(&m.lease, NOW)).await;
    assert!(!matches!(revoking, Ok(Ok(_))));
    admin.query_one("SELECT FROM pg_roles WHERE rolname = 'payroll_moved' AND rolcanlogin", &[]).await.unwrap();
    admin.batch_execute(&format!("ALTER ROLE payroll_moved RENAME TO {}", m.name())).await.unwrap();
    ends(&bench, &m).await;
}

#[tokio::test]
async fn the_same_end_asked_for_twice_at_once() {
    if !available("the_same_end_asked_for_twice_at_once") {
        return;
    }
    let bench = Bench::new("twice").await;
    let m = bench.mint("twice", &["make"]).await;
    let agent = bench.login(&m).await.unwrap();
    agent.batch_execute("CREATE TABLE playground.t ()").await.unwrap();
    let once = || bench.connector.revoke(&m.lease, NOW);
    for result in futures::future::join_all([once(), once(), once(), once()]).await {
        result.unwrap();
    }
    ends(&bench, &m).await;
}

#[tokio::test]
async fn one_saboteur_among_many_keeps_access_of_no_other() {
    if !available("one_saboteur_among_many_keeps_access_of_no_other") {
        return;
    }
    for (tag, mode) in [("crowd", Mode::Direct), ("crowdf", Mode::Functions)] {
        let bench = Bench::on(shared(), tag, mode, "").await;
        let admin = bench.admin().await;
        let mut all = Vec::new();
        for i in 0..40 {
            all.push(bench.mint(&format!("n{i}"), &["read"]).await);
        }
        let mut sessions = Vec::new();
        for m in &all {
            sessions.push(bench.login(m).await.unwrap());
        }
        // It holds its own row, and has taken itself from the broker: neither its login nor its session goes the easy way.
        let held = taken_from_the_broker(&bench, &all[7]).await;
        sessions[7].batch_execute("BEGIN; ALTER ROLE CURRENT_USER PASSWORD 'mine'").await.unwrap();
        let leases: Vec<Lease> = all.iter().map(|m| m.lease.clone()).collect();
        for (i, ended) in end_all(&bench.connector, &leases, NOW).await.into_iter().enumerate() {
            assert!(ended.is_ok() || i == 7, "{i}: {ended:?}");
            assert!(dead(&sessions[i]).await, "{i}");
        }
        assert!(bench.login(&all[7]).await.is_err());
        // Only the proof of its own end waits for the lock.
        held.batch_execute("ROLLBACK").await.unwrap();
        ends_at_last(&bench, &all[7]).await;
        for (m, session) in all.iter().zip(&sessions) {
            assert!(dead(session).await);
            nothing_left(&admin, m.oid, m.name()).await;
        }
    }
}
