//! What a lease holder tries in order to survive its end, and what comes of it: TARGETS.md's table and a few more,
//! at a real PostgreSQL. Every test looks at the target with an admin connection of its own.

#[path = "support/pg_lease.rs"]
mod pg_lease;
#[path = "support/postgres.rs"]
mod postgres;

use std::sync::Arc;
use std::time::{Duration, Instant};

use countersign::connector::{Connector, Gone, RevokeError};
use countersign::core::id::Timestamp;
use countersign::core::lease::{Evidence, Lease};
use pg_lease::{Bench, Minting, Mode, nothing_left};
use postgres::{Cluster, THROW_AWAY, available, shared, until};
use tokio_postgres::Client;

const NOW: Timestamp = Timestamp(0);

/// Ends the lease and looks: proof given, nothing left, no login.
async fn ends(bench: &Bench, m: &Minting) -> Gone {
    let gone = bench.connector.revoke(&m.lease, NOW).await.unwrap();
    assert!(matches!(gone.evidence, Evidence::TargetSaysGone { .. }));
    nothing_left(&bench.admin().await, m.oid, m.name()).await;
    assert!(bench.login(m).await.is_err());
    gone
}

fn seen(gone: &Gone, what: &str) -> u64 {
    gone.seen.iter().find(|o| o.what == what).map_or(0, |o| o.count)
}

async fn dead(session: &Client) -> bool {
    session.batch_execute("SELECT 1").await.is_err()
}

/// A cluster whose lock table is small, so that an attack on it needs hundreds of locks and not thousands.
fn small_lock_table() -> Arc<Cluster> {
    let mut settings = THROW_AWAY.to_vec();
    settings.extend([
        ("max_locks_per_transaction", "10"),
        ("max_connections", "25"),
        ("max_prepared_transactions", "0"),
    ]);
    Arc::new(Cluster::start(&settings))
}

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

#[tokio::test]
async fn prepared_transactions_here_and_in_another_database() {
    if !available("prepared_transactions_here_and_in_another_database") {
        return;
    }
    let mut settings = THROW_AWAY.to_vec();
    settings.push(("max_prepared_transactions", "10"));
    let bench = Bench::on(Arc::new(Cluster::start(&settings)), "prep", Mode::Direct, "").await;
    let admin = bench.admin().await;
    admin.batch_execute("CREATE DATABASE other_prep").await.unwrap();
    let m = bench.mint("prepares", &["make"]).await;
    let agent = bench.login(&m).await.unwrap();
    agent
        .batch_execute("BEGIN; CREATE TABLE playground.t (); PREPARE TRANSACTION E'it''s \\\\ \"odd\"'")
        .await
        .unwrap();
    let there = bench.cluster.login(m.name(), &m.password, "other_prep").await.unwrap();
    // This one holds the very row that has to be changed, and that one what would give the role back to the broker.
    there.batch_execute("BEGIN; ALTER ROLE CURRENT_USER PASSWORD 'mine'; PREPARE TRANSACTION 'there'").await.unwrap();
    let (me, broker) = (m.name(), &bench.broker);
    let mut prepared = 2;
    if there.batch_execute(&format!("REVOKE {me} FROM {broker}")).await.is_ok() {
        there.batch_execute(&format!("BEGIN; GRANT {me} TO {broker}; PREPARE TRANSACTION 'back'")).await.unwrap();
        prepared += 1;
    }
    // A stranger's stays, even without an owner.
    admin.batch_execute("BEGIN; CREATE TABLE strangers (); PREPARE TRANSACTION 'stranger'").await.unwrap();
    let gone = ends(&bench, &m).await;
    assert_eq!(seen(&gone, "prepared_transactions_rolled_back"), prepared, "{gone:?}");
    let left = admin.query("SELECT gid FROM pg_prepared_xacts", &[]).await.unwrap();
    assert_eq!(left.iter().map(|r| r.get::<_, String>(0)).collect::<Vec<_>>(), ["stranger"]);
    admin.batch_execute("ROLLBACK PREPARED 'stranger'").await.unwrap();
}

#[tokio::test]
async fn more_tables_and_large_objects_than_the_lock_table_holds() {
    if !available("more_tables_and_large_objects_than_the_lock_table_holds") {
        return;
    }
    let bench = Bench::on(small_lock_table(), "many", Mode::Direct, "").await;
    bench.admin().await.batch_execute("GRANT EXECUTE ON FUNCTION lo_create(oid) TO PUBLIC").await.unwrap();
    let m = bench.mint("hoards", &["make"]).await;
    let agent = bench.login(&m).await.unwrap();
    for i in 0..30 {
        let make = format!(
            "DO $$ BEGIN FOR i IN 1..40 LOOP EXECUTE format('CREATE TABLE playground.t_{i}_%s (a int)', i); END LOOP; END $$; \
             SELECT lo_create(0) FROM generate_series(1, 60)"
        );
        agent.batch_execute(&make).await.unwrap();
    }
    agent.batch_execute("CREATE FUNCTION playground.f() RETURNS int LANGUAGE sql AS 'SELECT 1'").await.unwrap();
    let at_once = bench.admin().await.batch_execute(&format!("DROP OWNED BY {} CASCADE", m.name())).await.unwrap_err();
    assert_eq!(at_once.code().unwrap().code(), "53200", "the attack works against one DROP OWNED");
    let gone = ends(&bench, &m).await;
    assert_eq!(seen(&gone, "objects_dropped"), 30 * 100 + 1, "{gone:?}");
    let left = bench.admin().await;
    let row = left.query_one("SELECT (SELECT count(*) FROM pg_largeobject_metadata), (SELECT count(*) FROM pg_class WHERE relname LIKE 't\\_%')", &[]);
    let row = row.await.unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (0, 0));
}

#[tokio::test]
async fn d3_definer_functions_triggers_and_rules_left_behind() {
    if !available("d3_definer_functions_triggers_and_rules_left_behind") {
        return;
    }
    let bench = Bench::new("trap").await;
    let admin = bench.admin().await;
    let m = bench.mint("traps", &["make", "read"]).await;
    let agent = bench.login(&m).await.unwrap();
    agent
        .batch_execute(
            "CREATE FUNCTION playground.peek() RETURNS SETOF int LANGUAGE sql SECURITY DEFINER AS 'SELECT amount FROM public.invoices';
             CREATE TABLE playground.bait (x int); CREATE TABLE playground.loot (x text);
             CREATE FUNCTION playground.spring() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
               INSERT INTO playground.loot VALUES (current_user); RETURN NEW; END $$;
             CREATE TRIGGER spring BEFORE INSERT ON playground.bait FOR EACH ROW EXECUTE FUNCTION playground.spring();
             CREATE RULE also AS ON UPDATE TO playground.bait DO ALSO INSERT INTO playground.loot VALUES (current_user);
             GRANT ALL ON playground.bait TO PUBLIC; GRANT EXECUTE ON FUNCTION playground.peek() TO PUBLIC;",
        )
        .await
        .unwrap();
    // Someone built on the bait: it goes too, and is named.
    admin
        .batch_execute(
            "CREATE VIEW public.built_on AS SELECT x FROM playground.bait; CREATE TABLE public.watched (x int);
             CREATE TRIGGER theirs BEFORE INSERT ON public.watched FOR EACH ROW EXECUTE FUNCTION playground.spring()",
        )
        .await
        .unwrap();
    let gone = ends(&bench, &m).await;
    for trap in ["SELECT playground.peek()", "INSERT INTO playground.bait VALUES (1)", "SELECT * FROM public.built_on"]
    {
        assert!(admin.batch_execute(trap).await.is_err(), "{trap}");
    }
    admin.batch_execute("INSERT INTO public.watched VALUES (1)").await.expect("without the trigger");
    let others = gone.seen.iter().find(|o| o.what == "objects_of_others_dropped").unwrap();
    let detail = others.detail.as_deref().unwrap();
    assert!(detail.contains("built_on of postgres") && detail.contains("trigger theirs"), "{detail}");
    let owned = gone.seen.iter().find(|o| o.what == "objects_dropped").unwrap();
    assert!(owned.count >= 4 && owned.detail.as_deref().unwrap().contains(&bench.database), "{owned:?}");
}

#[tokio::test]
async fn what_it_owned_in_another_database() {
    if !available("what_it_owned_in_another_database") {
        return;
    }
    let bench = Bench::new("else").await;
    let admin = bench.admin().await;
    admin.batch_execute("CREATE DATABASE other_else").await.unwrap();
    let there = bench.cluster.admin("other_else").await;
    there.batch_execute("CREATE SCHEMA open; GRANT ALL ON SCHEMA open TO PUBLIC").await.unwrap();
    let m = bench.mint("wanders", &["read"]).await;
    let agent = bench.cluster.login(m.name(), &m.password, "other_else").await.unwrap();
    agent.batch_execute("CREATE TABLE open.t (x int); CREATE TABLE open.u (x int)").await.unwrap();
    let gone = ends(&bench, &m).await;
    assert_eq!(seen(&gone, "objects_dropped"), 2);
    assert!(there.batch_execute("SELECT * FROM open.t").await.is_err());
}

#[tokio::test]
async fn rights_given_by_another_grantor() {
    if !available("rights_given_by_another_grantor") {
        return;
    }
    let bench = Bench::new("given").await;
    let admin = bench.admin().await;
    // By a lease that has them from a third: taken back as that lease.
    let (owner, middle, m) = (
        bench.mint("owner", &["make"]).await,
        bench.mint("middle", &["make"]).await,
        bench.mint("given", &["make"]).await,
    );
    let by = bench.login(&owner).await.unwrap();
    by.batch_execute(&format!(
        "CREATE TABLE playground.t (x int); GRANT SELECT ON playground.t TO {} WITH GRANT OPTION",
        middle.name()
    ))
    .await
    .unwrap();
    let through = bench.login(&middle).await.unwrap();
    through.batch_execute(&format!("GRANT SELECT ON playground.t TO {}", m.name())).await.unwrap();
    ends(&bench, &m).await;
    through.batch_execute("SELECT * FROM playground.t").await.unwrap();
    // By a stranger: named, with the statement that takes it back.
    admin
        .batch_execute(
            "CREATE ROLE stranger_given LOGIN; GRANT SELECT ON customers TO stranger_given WITH GRANT OPTION",
        )
        .await
        .unwrap();
    let m = bench.mint("given2", &["make"]).await;
    let grant = format!("SET ROLE stranger_given; GRANT SELECT ON customers TO {}; RESET ROLE", m.name());
    admin.batch_execute(&grant).await.unwrap();
    let revoking = bench.connector.revoke(&m.lease, NOW);
    let helping = async {
        until("login is cut although the end isn't proven", async || bench.login(&m).await.is_err()).await;
        let undo = format!(
            "SET ROLE stranger_given; REVOKE ALL ON TABLE public.customers FROM {} CASCADE; RESET ROLE",
            m.name()
        );
        admin.batch_execute(&undo).await.unwrap();
    };
    let (gone, ()) = futures::join!(revoking, helping);
    gone.unwrap();
    nothing_left(&admin, m.oid, m.name()).await;
    ends(&bench, &middle).await;
    ends(&bench, &owner).await;
}

#[tokio::test]
async fn a_colluding_lease_that_holds_a_lock() {
    if !available("a_colluding_lease_that_holds_a_lock") {
        return;
    }
    let bench = Bench::new("collude").await;
    let (m, friend) = (bench.mint("owner", &["make"]).await, bench.mint("friend", &["make"]).await);
    let agent = bench.login(&m).await.unwrap();
    agent.batch_execute("CREATE TABLE playground.t (x int); GRANT ALL ON playground.t TO PUBLIC").await.unwrap();
    let holder = bench.login(&friend).await.unwrap();
    holder.batch_execute("CREATE VIEW playground.v AS SELECT * FROM playground.t").await.unwrap();
    holder.batch_execute("BEGIN; LOCK TABLE playground.t IN ACCESS SHARE MODE").await.unwrap();
    let gone = ends(&bench, &m).await;
    assert_eq!(seen(&gone, "blocking_sessions_of_other_leases_cut"), 1, "{gone:?}");
    assert!(dead(&holder).await);
    let others = gone.seen.iter().find(|o| o.what == "objects_of_others_dropped").unwrap();
    assert!(others.detail.as_deref().unwrap().contains(friend.name()), "{others:?}");
    // Its lease lives on: only the session that stood in the way is gone.
    bench.login(&friend).await.unwrap();
    ends(&bench, &friend).await;
}

#[tokio::test]
async fn a_strangers_lock_delays_the_proof_and_not_the_cut() {
    if !available("a_strangers_lock_delays_the_proof_and_not_the_cut") {
        return;
    }
    let bench = Bench::new("lock").await;
    let m = bench.mint("owner", &["make"]).await;
    let agent = bench.login(&m).await.unwrap();
    agent.batch_execute("CREATE TABLE playground.t (x int)").await.unwrap();
    let stranger = bench.admin().await;
    stranger.batch_execute("BEGIN; LOCK TABLE playground.t IN ACCESS SHARE MODE").await.unwrap();
    let revoking = bench.connector.revoke(&m.lease, NOW);
    let waiting = async {
        let admin = bench.admin().await;
        until("the broker waits for the lock", async || {
            let waits = "SELECT count(*) FROM pg_stat_activity WHERE usename = $1 AND wait_event_type = 'Lock'";
            admin.query_one(waits, &[&bench.broker]).await.unwrap().get::<_, i64>(0) > 0
        })
        .await;
        assert!(dead(&agent).await && bench.login(&m).await.is_err(), "access is cut meanwhile");
        stranger.batch_execute("COMMIT").await.expect("a stranger's session is left alone");
    };
    let (gone, ()) = futures::join!(revoking, waiting);
    gone.unwrap();
    nothing_left(&bench.admin().await, m.oid, m.name()).await;
}

/// Not in TARGETS.md: on 15 a role may grant itself away, take itself from the broker, and lock the row that would give it back.
#[tokio::test]
async fn a_lease_that_takes_itself_from_the_broker() {
    if !available("a_lease_that_takes_itself_from_the_broker") {
        return;
    }
    for (tag, mode) in [("take", Mode::Direct), ("takef", Mode::Functions)] {
        let bench = Bench::on(shared(), tag, mode, "").await;
        let m = bench.mint("takes", &["read"]).await;
        let agent = bench.login(&m).await.unwrap();
        let (me, broker) = (m.name(), &bench.broker);
        let take = format!("REVOKE {me} FROM {broker}");
        if let Err(e) = agent.batch_execute(&take).await {
            // PostgreSQL 16 and later: a role has no say over itself.
            assert_eq!(e.code().unwrap().code(), "42501");
            ends(&bench, &m).await;
            continue;
        }
        agent.batch_execute(&format!("BEGIN; GRANT {me} TO {broker}")).await.unwrap();
        let asked = Instant::now();
        ends(&bench, &m).await;
        assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
        assert!(dead(&agent).await);
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
    for (i, result) in bench.connector.revoke_all(&leases, NOW).await.into_iter().enumerate() {
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
