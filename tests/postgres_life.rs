//! The life of a lease at a real PostgreSQL, looked at by an admin connection of the test's own.

#[path = "support/pg_lease.rs"]
mod pg_lease;
#[path = "support/postgres.rs"]
mod postgres;

use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use countersign::connector::postgres::SWEEP_MAX;
use countersign::connector::{Connector, MintError, RevocabilityMode, RevokeError};
use countersign::core::id::Timestamp;
use countersign::core::lease::{Evidence, Lease, LeaseState};
use pg_lease::{Bench, Minting, Mode, context, lease_name, nothing_left, permission};
use postgres::{Cluster, THROW_AWAY, available, shared, until};

const NOW: Timestamp = Timestamp(0);

async fn whole_life(bench: &Bench) {
    let admin = bench.admin().await;
    let m = bench.mint("life", &["read"]).await;
    assert_eq!(m.public["user"], m.name());
    assert_eq!(m.public["dbname"], bench.database);
    let row = admin
        .query_one(
            "SELECT rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls, rolconnlimit, \
             extract(epoch FROM rolvaliduntil - now())::float8, oid FROM pg_roles WHERE rolname = $1",
            &[&m.name()],
        )
        .await
        .unwrap();
    assert!(!row.get::<_, bool>(0));
    assert_eq!(row.get::<_, i32>(1), 20);
    assert!((550.0..=600.0).contains(&row.get::<_, f64>(2)));
    assert_eq!(row.get::<_, u32>(3), m.oid);

    // What was approved, and nothing else.
    let agent = bench.login(&m).await.unwrap();
    assert_eq!(agent.query_one("SELECT amount FROM invoices", &[]).await.unwrap().get::<_, i32>(0), 100);
    for refused in [
        "SELECT * FROM customers",
        "INSERT INTO invoices VALUES (2, 2)",
        "CREATE TABLE public.t ()",
        "CREATE TEMP TABLE t ()",
        "SELECT pg_advisory_lock(1)",
        "SELECT lo_create(0)",
        "CREATE ROLE friend",
        "ALTER ROLE CURRENT_USER VALID UNTIL 'infinity'",
        "ALTER ROLE CURRENT_USER CONNECTION LIMIT -1",
    ] {
        let code = agent.batch_execute(refused).await.expect_err(refused).code().unwrap().code().to_owned();
        assert_eq!(code, "42501", "{refused}");
    }

    // An open psql session is cut within two seconds.
    let mut psql = bench.cluster.agent_psql(m.name(), &m.password, &bench.database);
    psql.stdin.as_mut().unwrap().write_all(b"SELECT 'ready', pg_sleep(600);\n").unwrap();
    until("psql is at work", async || {
        let working = "SELECT count(*) FROM pg_stat_activity WHERE usesysid = $1 AND query LIKE '%pg_sleep(600)%' AND application_name = 'psql'";
        admin.query_one(working, &[&m.oid]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    let asked = Instant::now();
    let gone = bench.connector.revoke(&m.lease, NOW).await.unwrap();
    assert!(gone.access_cut.unwrap() <= asked.elapsed());
    let said = psql.wait_with_output().unwrap();
    assert!(asked.elapsed().as_secs() < 2, "{:?}", asked.elapsed());
    assert!(String::from_utf8_lossy(&said.stderr).contains("terminating connection"), "{said:?}");
    assert!(agent.query("SELECT 1", &[]).await.is_err());

    let Evidence::TargetSaysGone { detail } = &gone.evidence else { panic!("{gone:?}") };
    assert!(detail.contains(&format!("OID {}", m.oid)) && detail.contains("all 0"), "{detail}");
    assert_eq!(gone.seen.iter().find(|o| o.what == "sessions_cut").unwrap().count, 2);
    nothing_left(&admin, m.oid, m.name()).await;
    let refused = bench.login(&m).await.expect_err("a fresh login is refused");
    assert_eq!(refused.code().unwrap().code(), "28P01");

    // Again: the same proof, nothing done.
    let again = bench.connector.revoke(&m.lease, NOW).await.unwrap();
    assert!(matches!(again.evidence, Evidence::TargetSaysGone { .. }) && again.seen.is_empty(), "{again:?}");
}

#[tokio::test]
async fn the_whole_life_with_createrole() {
    if available("the_whole_life_with_createrole") {
        whole_life(&Bench::new("life").await).await;
    }
}

#[tokio::test]
async fn the_whole_life_with_the_stricter_functions() {
    if !available("the_whole_life_with_the_stricter_functions") {
        return;
    }
    let bench = Bench::on(shared(), "lifef", Mode::Functions, "").await;
    whole_life(&bench).await;
    // The broker's own login can do nothing else: no other names, no other groups, no roles by itself.
    let broker = bench.cluster.login(&bench.broker, "broker-secret-lifef", &bench.database).await.unwrap();
    let mint = |name: &str, group: &str, secs: u32| {
        format!(
            "SELECT countersign.mint(jsonb_build_object('name', '{name}', 'verifier', 'SCRAM-SHA-256$x', 'lifetime_secs', {secs}, \
             'connection_limit', 5, 'groups', jsonb_build_array('{group}')))"
        )
    };
    let x = lease_name(&bench.prefix, "x");
    for (what, code) in [
        ("CREATE ROLE friend".to_owned(), "42501"),
        ("GRANT postgres TO CURRENT_USER".to_owned(), "42501"),
        ("SELECT * FROM countersign.setting".to_owned(), "42501"),
        (mint("other_name", "read_lifef", 60), "CS004"),
        (mint("ls_lifef_\"x", "read_lifef", 60), "CS004"),
        (mint("ls_lifef_owner", "read_lifef", 60), "CS004"),
        (mint(&x, "postgres", 60), "CS005"),
        (mint(&x, "read_lifef", 90_000), "CS006"),
        (
            "SELECT countersign.drop('{\"roles\": [{\"name\": \"read_lifef\"}], \"lock_ms\": \"100\"}')".to_owned(),
            "CS004",
        ),
        (
            format!(
                "SELECT countersign.reach('{{\"reach\": \"{}reach_0123456789abcdef\", \"into\": [\"postgres\"]}}')",
                bench.prefix
            ),
            "CS004",
        ),
        ("SELECT countersign.cut('{\"roles\": [{\"name\": \"postgres\"}], \"lock_ms\": \"100\"}')".to_owned(), "CS004"),
    ] {
        assert_eq!(broker.batch_execute(&what).await.expect_err(&what).code().unwrap().code(), code, "{what}");
    }
}

#[tokio::test]
async fn tables_come_from_the_catalogues_set_only() {
    if !available("tables_come_from_the_catalogues_set_only") {
        return;
    }
    let bench = Bench::new("tables").await;
    let with = |name: &str, tables: Option<&[&str]>| {
        let mut intent = bench.intent(name, &["read"]);
        intent.permission = permission("postgres/tables", &["read"], tables);
        intent
    };
    let intent = with("one", Some(&["invoices"]));
    let minted = bench.connector.mint(&intent, None, &context()).await.unwrap();
    let m = Minting::of(intent, minted);
    let agent = bench.login(&m).await.unwrap();
    agent.batch_execute("SELECT * FROM invoices").await.unwrap();
    assert!(agent.batch_execute("SELECT * FROM customers").await.is_err());
    bench.connector.revoke(&m.lease, NOW).await.unwrap();
    for (name, tables) in [("none", None), ("empty", Some(&[][..])), ("other", Some(&["secrets"][..]))] {
        let refused = bench.connector.mint(&with(name, tables), None, &context()).await.unwrap_err();
        assert!(matches!(refused, MintError::NotMinted { transient: false, .. }), "{refused:?}");
    }
}

#[tokio::test]
async fn l11_two_leases_and_the_end_of_one_leaves_the_other() {
    if !available("l11_two_leases_and_the_end_of_one_leaves_the_other") {
        return;
    }
    let bench = Bench::new("overlap").await;
    let (a, b) = (bench.mint("a", &["read"]).await, bench.mint("b", &["read"]).await);
    let (sa, sb) = (bench.login(&a).await.unwrap(), bench.login(&b).await.unwrap());
    bench.connector.revoke(&a.lease, NOW).await.unwrap();
    assert!(sa.batch_execute("SELECT * FROM invoices").await.is_err());
    sb.batch_execute("SELECT * FROM invoices").await.unwrap();
    bench.login(&b).await.unwrap().batch_execute("SELECT * FROM invoices").await.unwrap();
    bench.connector.revoke(&b.lease, NOW).await.unwrap();
}

/// Logins of one lease go on while others end: a session that is just starting looks like one that hides.
#[tokio::test]
async fn l11_logins_of_one_lease_survive_the_ends_of_others() {
    if !available("l11_logins_of_one_lease_survive_the_ends_of_others") {
        return;
    }
    let bench = Bench::new("startup").await;
    let stays = bench.mint("stays", &["read"]).await;
    let logins = async {
        for _ in 0..60 {
            bench.login(&stays).await.expect("its logins work").batch_execute("SELECT * FROM invoices").await.unwrap();
        }
    };
    let ends = async {
        for i in 0..15 {
            let m = bench.mint(&format!("goes{i}"), &["read"]).await;
            let _session = bench.login(&m).await.unwrap();
            bench.connector.revoke(&m.lease, NOW).await.unwrap();
        }
    };
    futures::join!(logins, ends);
    bench.connector.revoke(&stays.lease, NOW).await.unwrap();
}

#[tokio::test]
async fn the_target_is_down_at_mint_and_nothing_is_left() {
    if !available("the_target_is_down_at_mint_and_nothing_is_left") {
        return;
    }
    let cluster = Arc::new(Cluster::start(THROW_AWAY));
    let bench = Bench::on(Arc::clone(&cluster), "down", Mode::Direct, "").await;
    let live = bench.mint("live", &["read"]).await;
    cluster.stop();
    let refused = bench.connector.mint(&bench.intent("x", &["read"]), None, &context()).await.unwrap_err();
    assert!(matches!(refused, MintError::NotMinted { transient: true, .. }), "{refused:?}");
    let retry = bench.connector.revoke(&live.lease, NOW).await.unwrap_err();
    assert!(matches!(retry, RevokeError::Retry { .. }), "{retry:?}");
    assert!(bench.connector.sweep().await.is_err());
    cluster.run(THROW_AWAY);
    // L4: it is revoked once the target is back.
    bench.connector.revoke(&live.lease, NOW).await.unwrap();
    assert!(bench.connector.sweep().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_mint_without_an_answer_is_unknown_and_found_again() {
    if !available("a_mint_without_an_answer_is_unknown_and_found_again") {
        return;
    }
    let bench = Bench::new("cut").await;
    let admin = bench.admin().await;
    // The broker's sessions are killed as soon as the role is committed: some mints lose their answer.
    let mut in_doubt = 0;
    for i in 0..200 {
        let intent = bench.intent(&format!("x{i}"), &["read"]);
        let asked = context();
        let minting = bench.connector.mint(&intent, None, &asked);
        let killing = async {
            admin
                .batch_execute(&format!(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{}' AND state = 'active'",
                    bench.broker
                ))
                .await
                .unwrap();
        };
        let (minted, ()) = futures::join!(minting, async {
            for _ in 0..3 {
                killing_pause(i).await;
            }
            killing.await;
        });
        let lease = match minted {
            Ok(minted) => Minting::of(intent, minted).lease,
            Err(MintError::NotMinted { transient, why }) => {
                assert!(transient, "{why}");
                let there = admin.query("SELECT FROM pg_roles WHERE rolname = $1", &[&intent.name]).await.unwrap();
                assert!(there.is_empty(), "not minted and there: {why}");
                continue;
            }
            Err(MintError::Unknown { why, handle }) => {
                in_doubt += 1;
                let state = LeaseState::Unknown {
                    since: NOW,
                    why,
                    not_before: NOW,
                    progress: countersign::core::lease::Progress::default(),
                };
                Lease { intent, handle, not_after: None, state }
            }
        };
        let gone = revoke_until_gone(&bench, &lease).await;
        assert!(matches!(gone, Evidence::TargetSaysGone { .. }));
        if in_doubt >= 5 {
            break;
        }
    }
    assert!(in_doubt >= 1, "no mint lost its answer: the test shows nothing");
    assert!(bench.connector.sweep().await.unwrap().is_empty());
}

/// Hits different moments of a mint without sleeping: yields to it a varying number of times.
async fn killing_pause(i: u32) {
    for _ in 0..(i % 40) {
        tokio::task::yield_now().await;
    }
}

async fn revoke_until_gone(bench: &Bench, lease: &Lease) -> Evidence {
    for _ in 0..50 {
        if let Ok(gone) = bench.connector.revoke(lease, NOW).await {
            return gone.evidence;
        }
    }
    panic!("never gone")
}

#[tokio::test]
async fn a_lease_in_doubt_that_never_was_is_absent_and_says_so() {
    if !available("a_lease_in_doubt_that_never_was_is_absent_and_says_so") {
        return;
    }
    let bench = Bench::new("absent").await;
    let state = LeaseState::Unknown {
        since: NOW,
        why: String::new(),
        not_before: NOW,
        progress: countersign::core::lease::Progress::default(),
    };
    let lease = Lease { intent: bench.intent("never", &["read"]), handle: None, not_after: None, state };
    let gone = bench.connector.revoke(&lease, NOW).await.unwrap();
    let Evidence::TargetSaysGone { detail } = gone.evidence else { panic!() };
    assert!(detail.contains("never seen live"), "{detail}");
    assert!(gone.access_cut.is_none());
}

#[tokio::test]
async fn names_are_never_reused() {
    if !available("names_are_never_reused") {
        return;
    }
    let bench = Bench::new("reuse").await;
    let m = bench.mint("same", &["read"]).await;
    let second = bench.connector.mint(&m.lease.intent, None, &context()).await.unwrap_err();
    assert!(matches!(second, MintError::Unknown { .. }), "{second:?}");
    // The first one's password still works: the second mint changed nothing.
    bench.login(&m).await.unwrap();
    bench.connector.revoke(&m.lease, NOW).await.unwrap();
    for bad in ["other_x", "ls_reuse_", "ls_reuse_owner", "ls_reuse_X", "ls_reuse_a\"b"] {
        let mut intent = m.lease.intent.clone();
        intent.name = bad.to_owned();
        let refused = bench.connector.mint(&intent, None, &context()).await.unwrap_err();
        assert!(matches!(refused, MintError::NotMinted { transient: false, .. }), "{bad}");
        let lease = Lease { intent, ..m.lease.clone() };
        assert!(bench.connector.revoke(&lease, NOW).await.is_err(), "{bad}");
    }
}

#[tokio::test]
async fn groups_that_are_missing_or_lead_too_far_mint_nothing() {
    if !available("groups_that_are_missing_or_lead_too_far_mint_nothing") {
        return;
    }
    let bench = Bench::new("groups").await;
    let admin = bench.admin().await;
    let refused = |name: &'static str, action: &'static str| {
        let bench = &bench;
        async move {
            match bench.connector.mint(&bench.intent(name, &[action]), None, &context()).await.unwrap_err() {
                MintError::NotMinted { why, transient: false } => why,
                e => panic!("{e:?}"),
            }
        }
    };
    assert!(refused("a", "missing").await.contains("no_such_group"));
    assert!(refused("b", "admin").await.contains("postgres"));
    // Not by a way round either: SET ROLE reaches what groups are members of.
    admin.batch_execute("GRANT pg_execute_server_program TO make_groups").await.unwrap();
    assert!(refused("c", "make").await.contains("pg_execute_server_program"));
    assert!(bench.connector.sweep().await.unwrap().is_empty());
}

#[tokio::test]
async fn l7_hostile_names_in_the_catalogue_are_quoted() {
    if !available("l7_hostile_names_in_the_catalogue_are_quoted") {
        return;
    }
    for (tag, mode) in [("quote", Mode::Direct), ("quotef", Mode::Functions)] {
        let bench = Bench::on(shared(), tag, mode, "").await;
        let m = bench.mint("q", &["odd"]).await;
        let agent = bench.login(&m).await.unwrap();
        agent.batch_execute("SELECT * FROM customers").await.unwrap();
        bench.connector.revoke(&m.lease, NOW).await.unwrap();
        bench.admin().await.batch_execute("SELECT * FROM invoices").await.expect("the table is still there");
    }
}

#[tokio::test]
async fn a_sweep_finds_what_is_ours_and_nothing_else() {
    if !available("a_sweep_finds_what_is_ours_and_nothing_else") {
        return;
    }
    let bench = Bench::new("sweep").await;
    let admin = bench.admin().await;
    admin
        .batch_execute(
            "CREATE ROLE \"ls_sweep_Operators\"; CREATE ROLE ls_sweep_owner LOGIN; CREATE ROLE lsxsweepxother",
        )
        .await
        .unwrap();
    let (a, b) = (bench.mint("a", &["read"]).await, bench.mint("b", &["write"]).await);
    let mut found = bench.connector.sweep().await.unwrap();
    found.sort_by(|x, y| x.name.cmp(&y.name));
    let mut names = [a.name(), b.name()];
    names.sort_unstable();
    assert_eq!(found.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), names);
    let _open = bench.login(&a).await.unwrap();
    bench.connector.revoke_found(found.iter().find(|f| f.name == a.name()).unwrap(), NOW).await.unwrap();
    let mut owner = found[0].clone();
    owner.name = "ls_sweep_owner".to_owned();
    assert!(
        bench.connector.revoke_found(&owner, NOW).await.is_err(),
        "a role of the operator's, whatever is asked for"
    );
    admin.query_one("SELECT FROM pg_roles WHERE rolname = 'ls_sweep_owner' AND rolcanlogin", &[]).await.unwrap();
    nothing_left(&admin, a.oid, a.name()).await;
    bench.login(&b).await.unwrap();
    bench.connector.revoke(&b.lease, NOW).await.unwrap();
    assert!(bench.connector.sweep().await.unwrap().is_empty());
}

#[tokio::test]
async fn two_brokers_with_two_prefixes_on_one_cluster() {
    if !available("two_brokers_with_two_prefixes_on_one_cluster") {
        return;
    }
    let bench = Bench::new("twob").await;
    // The second one's prefix begins with the first one's.
    let prefix = format!("{}b_", bench.prefix);
    let second = bench.another(&prefix, &[]);
    let mut intent = bench.intent("theirs", &["read"]);
    intent.name = lease_name(&prefix, "theirs");
    let theirs = Minting::of(intent.clone(), second.mint(&intent, None, &context()).await.unwrap());
    let ours = bench.mint("ours", &["read"]).await;
    let session = bench.login(&theirs).await.unwrap();
    // All that the first one's sweep finds is ended, as the broker does it when no lease explains it.
    for found in bench.connector.sweep().await.unwrap() {
        assert_eq!(found.name, ours.name());
        bench.connector.revoke_found(&found, NOW).await.unwrap();
    }
    session.batch_execute("SELECT * FROM invoices").await.expect("the other broker's session lives");
    bench.login(&theirs).await.expect("and its login");
    assert!(bench.connector.revoke(&theirs.lease, NOW).await.is_err(), "nor is it ended by name");
    second.revoke(&theirs.lease, NOW).await.unwrap();
}

#[tokio::test]
async fn a_prefix_search_that_would_be_cut_short_is_an_error() {
    if !available("a_prefix_search_that_would_be_cut_short_is_an_error") {
        return;
    }
    let bench = Bench::on(Arc::new(Cluster::start(THROW_AWAY)), "cut", Mode::Direct, "").await;
    let make = |from: i64, to: i64| {
        format!("DO $$ BEGIN FOR i IN {from}..{to} LOOP EXECUTE 'CREATE ROLE foreign_' || i; END LOOP; END $$")
    };
    let admin = bench.admin().await;
    admin.batch_execute(&make(1, 2)).await.unwrap();
    assert_eq!(bench.connector.sweep_prefix("foreign_").await.unwrap().len(), 2);
    for from in (3..SWEEP_MAX).step_by(500) {
        admin.batch_execute(&make(from, (from + 499).min(SWEEP_MAX))).await.unwrap();
    }
    let cut = bench.connector.sweep_prefix("foreign_").await.map(|found| found.len()).unwrap_err();
    assert!(cut.to_string().contains("10000 roles or more"), "{cut}");
}

#[tokio::test]
async fn a_host_that_answers_nothing_refuses_all_mints_in_time() {
    if !available("a_host_that_answers_nothing_refuses_all_mints_in_time") {
        return;
    }
    let bench = Bench::new("mute").await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = i64::from(listener.local_addr().unwrap().port());
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((socket, _)) = listener.accept().await {
            held.push(socket);
        }
    });
    let connector = bench.another(&bench.prefix, &[("port", port.into())]);
    let asked = Instant::now();
    let context = context();
    let intents: Vec<_> = (0..20).map(|i| bench.intent(&format!("m{i}"), &["read"])).collect();
    for refused in futures::future::join_all(intents.iter().map(|i| connector.mint(i, None, &context))).await {
        let refused = refused.unwrap_err();
        assert!(matches!(refused, MintError::NotMinted { transient: true, .. }), "{refused:?}");
    }
    // One attempt to connect for all of them (6 s), with room for a busy machine.
    assert!(asked.elapsed().as_secs() < 12, "{:?}", asked.elapsed());
}

#[tokio::test]
async fn the_servers_log_and_our_errors_hold_no_secret() {
    if !available("the_servers_log_and_our_errors_hold_no_secret") {
        return;
    }
    let mut settings = THROW_AWAY.to_vec();
    settings.extend([
        ("log_statement", "all"),
        ("log_min_duration_statement", "0"),
        ("log_connections", "on"),
        ("log_min_error_statement", "debug5"),
    ]);
    let cluster = Arc::new(Cluster::start(&settings));
    for (tag, mode) in [("log", Mode::Direct), ("logf", Mode::Functions)] {
        let bench = Bench::on(Arc::clone(&cluster), tag, mode, "").await;
        let m = bench.mint("x", &["read"]).await;
        bench.login(&m).await.unwrap();
        let refused = bench.connector.mint(&m.lease.intent, None, &context()).await.unwrap_err();
        assert!(!format!("{refused:?} {refused}").contains(&m.password));
        let gone = bench.connector.revoke(&m.lease, NOW).await.unwrap();
        assert!(!format!("{gone:?}").contains(&m.password));
        let log = cluster.log();
        assert!(log.contains(m.name()), "the log was on");
        assert!(!log.contains(&m.password) && !log.contains(&hex::encode(&m.password)));
    }
    drop(cluster);
}

#[tokio::test]
async fn what_the_reviewer_and_the_digest_see() {
    if !available("what_the_reviewer_and_the_digest_see") {
        return;
    }
    let bench = Bench::new("says").await;
    let says = bench.connector.revocability(&permission("postgres/app", &["read"], None), 600);
    assert_eq!(says.mode, RevocabilityMode::Immediate);
    assert!(says.residual_secs <= 5 && says.says.contains("600 s"));
    let of = |actions: &[&str]| bench.connector.fingerprint(&permission("postgres/app", actions, None));
    assert_eq!(of(&["read"])["groups"], serde_json::json!(["read_says"]));
    assert_ne!(of(&["read"]), of(&["read", "write"]));
}

/// What the broker makes under a login that SQL must quote, it also ends.
#[tokio::test]
async fn a_login_whose_name_must_be_quoted_ends_what_it_made() {
    if !available("a_login_whose_name_must_be_quoted_ends_what_it_made") {
        return;
    }
    for (tag, mode) in [("quoted", Mode::Direct), ("quotedf", Mode::Functions)] {
        let bench = Bench::on(Arc::new(Cluster::start(THROW_AWAY)), tag, mode, "").await;
        let admin = bench.admin().await;
        let login = format!("Broker of {tag}");
        admin.batch_execute(&format!("ALTER ROLE {} RENAME TO \"{login}\"", bench.broker)).await.unwrap();
        let connector = bench.another(&bench.prefix, &[("user", login.into())]);
        let intent = bench.intent("one", &["read"]);
        let one = Minting::of(intent.clone(), connector.mint(&intent, None, &context()).await.unwrap());
        connector.revoke(&one.lease, NOW).await.unwrap();
        nothing_left(&admin, one.oid, one.name()).await;
    }
}
