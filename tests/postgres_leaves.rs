//! What a lease leaves behind at a real PostgreSQL, or is given there, and that none of it works for anybody afterwards (regression D3).

#[path = "support/pg_ends.rs"]
mod pg_ends;
#[path = "support/pg_lease.rs"]
mod pg_lease;
#[path = "support/postgres.rs"]
mod postgres;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use countersign::connector::Connector;
use pg_ends::{NOW, dead, ends, ends_at_last, seen, small_lock_table, taken_from_the_broker};
use pg_lease::{Bench, Mode, nothing_left};
use postgres::{Cluster, THROW_AWAY, available, until};

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
    // This one holds the very row that has to be changed.
    there.batch_execute("BEGIN; ALTER ROLE CURRENT_USER PASSWORD 'mine'; PREPARE TRANSACTION 'there'").await.unwrap();
    // The broker is no member any more, and can't become one again by the straight way.
    let taken = taken_from_the_broker(&bench, &m).await;
    // A stranger's stays, even without an owner.
    admin.batch_execute("BEGIN; CREATE TABLE strangers (); PREPARE TRANSACTION 'stranger'").await.unwrap();
    let helping = async {
        let its = "SELECT count(*) FROM pg_prepared_xacts WHERE owner = $1";
        until("they are rolled back by force", async || {
            admin.query_one(its, &[&m.name()]).await.unwrap().get::<_, i64>(0) == 0
        })
        .await;
        taken.batch_execute("ROLLBACK").await.unwrap();
    };
    let (gone, ()) = futures::join!(ends_at_last(&bench, &m), helping);
    assert_eq!(seen(&gone, "prepared_transactions_rolled_back"), 2, "{gone:?}");
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
    // D3: a definer function that reads what only another group may read; it had the group once, and another lease calls it in a loop.
    agent
        .batch_execute(
            "CREATE FUNCTION playground.peek() RETURNS SETOF text LANGUAGE sql SECURITY DEFINER AS 'SELECT name FROM public.customers';
             GRANT EXECUTE ON FUNCTION playground.peek() TO PUBLIC",
        )
        .await
        .unwrap_or_else(|e| panic!("{e}"));
    let second = bench.mint("loops", &["make"]).await;
    let caller = bench.login(&second).await.unwrap();
    let (calls, peeked) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (stop, looping) = {
        let (calls, peeked, (stop, mut stopped)) =
            (Arc::clone(&calls), Arc::clone(&peeked), tokio::sync::oneshot::channel::<()>());
        let looping = tokio::spawn(async move {
            while stopped.try_recv() == Err(tokio::sync::oneshot::error::TryRecvError::Empty) {
                if let Ok(rows) = caller.query("SELECT * FROM playground.peek()", &[]).await {
                    peeked.fetch_add(rows.len(), Ordering::Relaxed);
                }
                calls.fetch_add(1, Ordering::Relaxed);
            }
        });
        (stop, looping)
    };
    until("the loop runs", async || calls.load(Ordering::Relaxed) > 0).await;
    let at_once = bench.admin().await.batch_execute(&format!("DROP OWNED BY {} CASCADE", m.name())).await.unwrap_err();
    assert_eq!(at_once.code().unwrap().code(), "53200", "the attack works against one DROP OWNED");
    let gone = ends(&bench, &m).await;
    assert_eq!(seen(&gone, "objects_dropped"), 30 * 100 + 2, "{gone:?}");
    stop.send(()).unwrap();
    looping.await.unwrap();
    assert_eq!(peeked.load(Ordering::Relaxed), 0, "the function worked again while it was being dropped");
    let ways = bench.connector.sweep().await.unwrap();
    assert_eq!(ways.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), [second.name()], "no way round is left");
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
