//! Several nodes on one database.

use std::collections::BTreeMap;

use countersign::audit::frame::leaf_of;
use countersign::audit::merkle::{Frontier, Hash};
use countersign::core::digest::Digest;
use countersign::core::event::{Event, GrantEvent};
use countersign::store::{Expect, Job, StoreError};

use super::conformance::kit::*;
use super::*;

/// The whole record, read and verified by nothing of the store's.
async fn verify(house: &PostgresHouse) -> u64 {
    let client = house.tell("SELECT 1").await;
    let rows = client
        .query(&format!("SELECT seq, at_ms, leaf, payload FROM {}.event ORDER BY seq", house.schema), &[])
        .await
        .unwrap();
    let (mut tree, mut prev) = (Frontier::new(), Hash::ZERO);
    for (row, seq) in rows.iter().zip(1u64..) {
        assert_eq!(row.get::<_, i64>(0), i64::try_from(seq).unwrap(), "no gap");
        prev = leaf_of(seq, u64::try_from(row.get::<_, i64>(1)).unwrap(), &prev, row.get(3));
        assert_eq!(row.get::<_, Vec<u8>>(2), prev.0, "leaf of {seq}");
        tree.push(prev);
    }
    let tail = client.query_one(&format!("SELECT seq, leaf, tree FROM {}.tail", house.schema), &[]).await.unwrap();
    assert_eq!(tail.get::<_, i64>(0), i64::try_from(tree.size()).unwrap());
    assert_eq!((tail.get::<_, Vec<u8>>(1), tail.get::<_, Vec<u8>>(2)), (prev.0.to_vec(), tree.to_bytes()));
    tree.size()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_make_one_record() {
    const EACH: u64 = 25;
    let house = PostgresHouse::default();
    let nodes = [house.node().await, house.node().await, house.node().await].map(Arc::new);
    let shared = ask(1).on(&*nodes[0]).await;
    for node in &nodes {
        node.refresh().await.unwrap();
        assert_eq!(node.grant(shared.id).await.unwrap().as_ref(), Some(&shared), "after a refresh it is there");
    }
    let callers =
        nodes.iter().cloned().zip(1u64..).flat_map(|(node, n)| (0..4u64).map(move |c| (Arc::clone(&node), n, c)));
    let tasks = callers.map(|(node, n, caller)| {
        tokio::spawn(async move {
            for i in 0..EACH {
                let id = n * 10_000 + caller * 1000 + i;
                // Its own, and one that all write on.
                append(&*node, ask(id).events(), START).await.unwrap();
                loop {
                    let now = node.head(grant_id(1)).await.unwrap().unwrap();
                    let report = GrantEvent::Invoked { invocation: invocation(id) };
                    match append(&*node, numbered(grant_id(1), now.version, vec![report]), START).await {
                        Ok(_) => break,
                        Err(StoreError::Conflict) => {}
                        Err(other) => panic!("{other}"),
                    }
                }
                if i % 2 == 0 {
                    end(&*node, id, START).await;
                }
            }
        })
    });
    for task in futures::future::join_all(tasks).await {
        task.unwrap();
    }
    for node in &nodes {
        node.refresh().await.unwrap();
        let all = node.grant(shared.id).await.unwrap().unwrap();
        assert_eq!((all.version, all.invocations.len()), (shared.version + 12 * EACH, 300));
        assert_eq!(node.open_grants().await.unwrap().len() as u64, 1 + 12 * (EACH / 2));
        assert_eq!(node.open_counts(&agent(1)).await.unwrap(), (0, 1 + 12 * 12));
    }
    assert!(nodes.iter().map(|n| figure(&**n, "store_lost_races")).sum::<u64>() > 0, "they met");
    let records = verify(&house).await;
    assert_eq!(records, 3 + 300 * 3 + 300 + 12 * 13 * 2);
    for node in &nodes {
        assert_eq!(figure(&**node, "journal_records"), records);
        node.close().await.unwrap();
    }
    // And one that starts on it reads the same.
    let late = house.node().await;
    assert_eq!(late.grant(shared.id).await.unwrap().unwrap().version, shared.version + 12 * EACH);
    late.close().await.unwrap();
}

fn invocation(n: u64) -> countersign::core::event::Invocation {
    countersign::core::event::Invocation {
        tool: format!("tool-{n}"),
        arguments_digest: None,
        arguments: None,
        status: "ok".into(),
        started_at: None,
        ended_at: None,
    }
}

#[tokio::test]
async fn what_one_node_expects_another_can_break() {
    let house = PostgresHouse::default();
    let (a, b) = (house.node().await, house.node().await);
    // None of these reads again before it writes: what it read is old by then.
    let grant = ask(1).on(&a).await;
    let freezes = b.freezes().await.unwrap().epoch;
    let below = |n| vec![Expect::OpenBelow { agent: agent(1), pending: 9, open: n }];
    let conflicts =
        |outcome: Result<_, StoreError>| assert!(matches!(outcome, Err(StoreError::Conflict)), "{outcome:?}");
    conflicts(append_if(&b, below(1), ask(2).events()).await);
    a.refresh().await.unwrap();
    let key = Digest::of_bytes(b"key");
    let twin = |n| Ask { idempotency: Some(key), ..ask(n) };
    append(&a, twin(3).events(), START).await.unwrap();
    conflicts(append(&b, twin(4).events(), START).await);
    assert_eq!(b.by_idempotency(&key).await.unwrap().map(|g| g.id), Some(grant_id(3)), "it can be read now");
    let child = Ask { parent: Some(Arc::clone(&grant)), agent: 2, ..ask(5) };
    child.on(&a).await;
    conflicts(append(&b, events_of(&grant, &finish(), START), START).await);
    end_tree(&a, 1, START).await;
    conflicts(append_if(&b, vec![Expect::Version(grant.id, grant.version)], ask(6).events()).await);
    end(&a, 3, START).await;
    append(&a, vec![Event::TaskCompleted { task: task_key(1, "task") }], START).await.unwrap();
    conflicts(append_if(&b, vec![Expect::TaskOpen(task_key(1, "task"))], ask(7).events()).await);
    let freeze = Event::Frozen { id: 1, selector: core::event::Selector::All, by: person("eve"), reason: "r".into() };
    append(&a, vec![freeze], START).await.unwrap();
    conflicts(append_if(&b, vec![Expect::FreezeEpoch(freezes)], ask(8).events()).await);
    assert_eq!(b.freezes().await.unwrap().holding.len(), 1);
    verify(&house).await;
}

/// A proxy whose clients can be cut off while the server goes on as if nothing had happened.
struct Cut {
    port: u16,
    now: tokio::sync::watch::Sender<u64>,
    task: tokio::task::JoinHandle<()>,
}

impl Cut {
    async fn start(server: &postgres::Cluster) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let to = server.sockets().join(format!(".s.PGSQL.{}", server.port));
        let now = tokio::sync::watch::Sender::new(0);
        let cuts = now.clone();
        let task = tokio::spawn(async move {
            loop {
                let Ok((mut client, _)) = listener.accept().await else { return };
                let (to, mut cut) = (to.clone(), cuts.subscribe());
                tokio::spawn(async move {
                    let mut server = tokio::net::UnixStream::connect(to).await.unwrap();
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => return,
                        _ = cut.changed() => drop(client),
                    }
                    // The server's side stays open for as long as the test goes on.
                    std::future::pending::<()>().await;
                    drop(server);
                });
            }
        });
        Self { port, now, task }
    }
    fn now(&self) {
        self.now.send_modify(|n| *n += 1);
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tokio::test]
async fn a_lost_answer_is_looked_up() {
    let house = PostgresHouse::default();
    let cut = Cut::start(&house.server).await;
    let settings = house.settings_at("127.0.0.1", cut.port);
    let node = store::postgres::open(&settings, Arc::new(SystemClock), Arc::new(SystemRandom), None).await;
    let node = Arc::new(node.expect("the store opens"));
    let before = ask(1).on(&*node).await;
    for (n, comes_through) in [(2, true), (3, false), (4, true), (5, false)] {
        // It waits for the tail, at the server; then its connection is cut.
        let held = house.hold().await;
        let appending = tokio::spawn({
            let node = Arc::clone(&node);
            async move { append(&*node, ask(n).events(), START).await }
        });
        let admin = house.tell("SELECT 1").await;
        let waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'WITH moved%' \
             AND query LIKE '%' || $1 || '.tail%'";
        let mut pid = 0;
        postgres::until("it waits for the tail", async || {
            let row = admin.query_opt(waiting, &[&house.schema]).await.unwrap();
            pid = row.map_or(0, |row| row.get(0));
            pid != 0
        })
        .await;
        if comes_through {
            // The node gives up on the connection; the server doesn't know, and goes on when it can.
            cut.now();
            drop(held);
        } else {
            admin.execute("SELECT pg_terminate_backend($1)", &[&pid]).await.unwrap();
            drop(held);
        }
        let appended = appending.await.unwrap().expect("it is recorded");
        let records = verify(&house).await;
        assert_eq!((appended.last_seq, appended.last_seq - appended.first_seq), (records, 2), "once");
        assert_eq!(node.grant(grant_id(n)).await.unwrap().unwrap().version, before.version);
        let ours = admin
            .query_one(&format!("SELECT count(DISTINCT write_id), count(*) FROM {}.event", house.schema), &[])
            .await
            .unwrap();
        assert_eq!(
            (ours.get::<_, i64>(0), ours.get::<_, i64>(1)),
            (i64::try_from(n).unwrap(), 3 * i64::try_from(n).unwrap())
        );
    }
}

#[tokio::test]
async fn a_node_that_was_taken_for_dead_writes_nothing_under_its_old_run() {
    let house = PostgresHouse::default();
    let (a, b) = (house.node().await, house.node().await);
    let grant = ask(1).on(&a).await;
    command(&a, grant.id, &intend(&grant, &[1], START), START).await;
    assert_eq!(b.abandoned().await.unwrap(), [], "a is at it");
    house.tell("UPDATE $S.run SET is_over = true WHERE run = 1").await;
    assert_eq!(b.abandoned().await.unwrap(), [(grant.id, lease_id(1))], "nobody is at it any more");
    // What it writes from now on is another run's.
    let other = ask(2).on(&a).await;
    command(&a, other.id, &intend(&other, &[2], START), START).await;
    let rows = house.tell("SELECT 1").await;
    let rows =
        rows.query(&format!("SELECT run, count(*) FROM {}.event GROUP BY run", house.schema), &[]).await.unwrap();
    let runs: BTreeMap<i64, i64> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(runs.len(), 2);
    assert_eq!(runs.get(&1), Some(&4), "{runs:?}");
    assert_eq!(b.abandoned().await.unwrap(), [(grant.id, lease_id(1))], "the new one's isn't");
    verify(&house).await;
}

#[tokio::test]
async fn work_is_handed_to_one_node() {
    const LEASE: Duration = Duration::from_secs(120);
    let house = PostgresHouse::default();
    let (a, b) = (house.node().await, house.node().await);
    for n in 1..=20 {
        Ask { life_secs: 10, ..ask(n) }.on(&a).await;
    }
    b.refresh().await.unwrap();
    let claims = [&a, &b, &a, &b].map(|node| node.claim(at(10), LEASE, 6));
    let mut all: Vec<Job> = futures::future::join_all(claims).await.into_iter().flat_map(Result::unwrap).collect();
    all.extend(a.claim(at(10), LEASE, 100).await.unwrap());
    all.extend(b.claim(at(12), LEASE, 100).await.unwrap());
    let distinct: std::collections::BTreeSet<Job> = all.iter().copied().collect();
    assert_eq!((all.len(), distinct.len()), (20, 20), "each once");
    // One that comes too late gives nothing back: meanwhile it was somebody else's.
    let mine = a.claim(at(10), LEASE, 100).await.unwrap();
    assert_eq!(mine, []);
    house.passes(LEASE).await;
    let again = b.claim(at(200), LEASE, 100).await.unwrap();
    assert_eq!(again.len(), 20);
    for job in &all {
        a.release(*job).await;
    }
    assert_eq!(a.claim(at(210), LEASE, 100).await.unwrap(), [], "b is at it");
    // A node that is gone holds nothing.
    b.close().await.unwrap();
    assert_eq!(a.claim(at(500), LEASE, 100).await.unwrap().len(), 20);
}

#[tokio::test]
async fn a_changed_record_stops_the_nodes_that_see_it() {
    let house = PostgresHouse::default();
    let node = house.node().await;
    ask(1).on(&node).await;
    house
        .tell(
            "WITH m AS (UPDATE $S.tail SET seq = seq + 1) INSERT INTO $S.event \
             SELECT seq + 1, at_ms, 0, grant_id, 0, leaf, payload, write_id, run FROM $S.event ORDER BY seq DESC LIMIT 1",
        )
        .await;
    let outcome = append(&node, ask(2).events(), START).await;
    assert!(matches!(&outcome, Err(StoreError::Unreadable(why)) if why.contains("audit verify")), "{outcome:?}");
    assert!(!node.is_writable());
    assert!(node.refresh().await.is_err());
}

#[tokio::test]
async fn a_database_that_went_back_in_time_stops_its_nodes() {
    let house = PostgresHouse::default();
    let node = house.node().await;
    let state = "CREATE TABLE $S.kept AS SELECT * FROM $S.tail";
    ask(1).on(&node).await;
    house.tell(state).await;
    ask(2).on(&node).await;
    house
        .tell(
            "DELETE FROM $S.event WHERE seq > (SELECT seq FROM $S.kept); DELETE FROM $S.grants WHERE asked_seq > 3; \
             UPDATE $S.tail SET (seq, leaf, tree) = (SELECT seq, leaf, tree FROM $S.kept)",
        )
        .await;
    let outcome = append(&node, ask(3).events(), START).await;
    assert!(matches!(&outcome, Err(StoreError::Unreadable(why)) if why.contains("lost acknowledged")), "{outcome:?}");
}

/// A clock that is off.
struct Off(i64);

impl countersign::time::Clock for Off {
    fn wall(&self) -> core::id::Timestamp {
        core::id::Timestamp(SystemClock.wall().0.saturating_add_signed(self.0))
    }
    fn boot_ms(&self) -> u64 {
        SystemClock.boot_ms()
    }
    fn boot_id(&self) -> String {
        SystemClock.boot_id()
    }
    fn sleep(&self, time: Duration) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(tokio::time::sleep(time))
    }
}

impl countersign::runtime::Runtime for Off {}

#[tokio::test]
async fn a_node_whose_clock_is_off_does_not_start() {
    use countersign::time::Clock as _;
    let house = PostgresHouse::default();
    for (off_ms, starts) in [(-60_000, false), (60_000, false), (-10_000, true)] {
        let clock = Off(off_ms);
        assert!(clock.wall().0 > 0);
        let opened = store::postgres::open(&house.settings(), Arc::new(clock), Arc::new(SystemRandom), None).await;
        match opened {
            Ok(_) => assert!(starts, "{off_ms}"),
            Err(error) => assert!(!starts && error.to_string().contains("s apart"), "{error}"),
        }
    }
}

#[tokio::test]
async fn a_node_with_other_keys_does_not_start() {
    let house = PostgresHouse::default();
    house.node().await;
    let settings = Settings { keys: Digest::of_bytes(b"others"), ..house.settings() };
    let opened = store::postgres::open(&settings, Arc::new(SystemClock), Arc::new(SystemRandom), None).await;
    assert!(matches!(opened, Err(store::postgres::OpenError::Keys)));
}

#[tokio::test]
async fn a_newer_database_is_refused() {
    let house = PostgresHouse::default();
    house.node().await.close().await.unwrap();
    house.tell("INSERT INTO $S.step VALUES (1000, now())").await;
    let opened = store::postgres::open(&house.settings(), Arc::new(SystemClock), Arc::new(SystemRandom), None).await;
    assert!(matches!(opened, Err(store::postgres::OpenError::Newer { is: 1000, .. })));
}

#[tokio::test]
async fn nodes_that_start_together_make_the_tables_once() {
    let house = PostgresHouse::default();
    let nodes = futures::future::join_all((0..4).map(|_| house.node())).await;
    for (node, n) in nodes.iter().zip(1..) {
        ask(n).on(node).await;
    }
    assert_eq!(verify(&house).await, 12);
}

#[tokio::test]
async fn signs_of_life_are_shared() {
    let house = PostgresHouse::default();
    let (a, b) = (house.node().await, house.node().await);
    a.alive(&[grant_id(1)]).await.unwrap();
    house.tell("UPDATE $S.life SET at = at - interval '5 seconds'").await;
    let silent = b.silent_ms(&[grant_id(1), grant_id(2)]).await.unwrap();
    assert!(silent.len() == 1 && silent[&grant_id(1)] >= 5000, "{silent:?}");
    b.alive(&[grant_id(1)]).await.unwrap();
    assert!(a.silent_ms(&[grant_id(1)]).await.unwrap()[&grant_id(1)] < 5000);
}

#[tokio::test]
async fn a_database_that_is_down_is_one_clear_error_and_then_works_again() {
    let house =
        PostgresHouse { server: Arc::new(postgres::Cluster::start(postgres::THROW_AWAY)), ..PostgresHouse::default() };
    let node = Arc::new(house.node().await);
    let grant = ask(1).on(&*node).await;
    house.server.stop();
    let outcome = append(&*node, ask(2).events(), START).await;
    assert!(matches!(outcome, Err(StoreError::Unavailable(_))), "{outcome:?}");
    postgres::until("the node knows", async || !node.is_writable()).await;
    assert_eq!(
        node.grant(grant.id).await.unwrap(),
        Some(grant.clone()),
        "what is open can still be read: endings go on"
    );
    // Once it is known to be down, nobody waits.
    assert!(append(&*node, ask(3).events(), START).await.is_err());
    house.server.run(postgres::THROW_AWAY);
    postgres::until("it can be written again", async || node.recover().await.is_ok()).await;
    end(&*node, 1, START).await;
    // What was in doubt is there once or not at all.
    let records = verify(&house).await;
    assert!([5, 8].contains(&records), "{records}");
    node.close().await.unwrap();
}

/// A decision is made anew on what another node wrote meanwhile, and the writer never hears of it.
#[tokio::test]
async fn losing_the_race_is_no_conflict() {
    let house = PostgresHouse::default();
    let (a, b) = (house.node().await, house.node().await);
    for n in 1..=10 {
        append(&a, ask(n).events(), START).await.unwrap();
        // b has not read that yet, mostly.
        append(&b, ask(100 + n).events(), START).await.unwrap();
    }
    assert_eq!(figure(&a, "store_conflicts") + figure(&b, "store_conflicts"), 0);
    assert!(figure(&b, "store_lost_races") > 0);
}
