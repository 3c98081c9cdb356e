//! database/creds on a real OpenBao and a real PostgreSQL: made, used, ended with proof.

#[path = "support/end_all.rs"]
mod end_all;
#[path = "support/openbao.rs"]
mod openbao;
#[path = "support/vault_world.rs"]
mod world;

use std::time::{Duration, Instant};

use countersign::connector::{Connector, RevocabilityMode};
use end_all::end_all;
use world::*;

const LEASE_PATH: &str = "database/creds/billing-ro";

#[tokio::test]
async fn a_database_user_is_made_used_and_ended_with_proof() {
    let Some(w) = World::start("vault_database: main job").await else { return };
    // Two leases that are not ours, on the same mount: another role, and another database.
    w.bao
        .database_role(
            "other",
            600,
            &["CREATE ROLE \"{{name}}\" LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}'".into()],
            &[],
        )
        .await;
    w.bao
        .call("PUT", "database/config/billing-ro", serde_json::json!({ "allowed_roles": ["billing-ro", "other"] }))
        .await;
    w.bao.ok("PUT", "database/roles/other", serde_json::json!({ "db_name": "billing-ro" })).await;
    let other = w.bao.ok("GET", "database/creds/other", serde_json::Value::Null).await;
    let other_lease = other["lease_id"].as_str().unwrap().to_owned();
    let other_user = other["data"]["username"].as_str().unwrap().to_owned();

    let c = w.billing("connection = { host = \"127.0.0.1\", dbname = \"postgres\" }", None);
    let i = intent("bao/billing", &[], 300, 0);
    let minted = mint(&c, &i).await.unwrap();
    assert_eq!(minted.credential.kind, "vault");
    let user = minted.credential.public["username"].clone();
    let password = &minted.credential.secret["password"];
    assert!(user.starts_with("csv_") && minted.credential.public["host"] == "127.0.0.1");
    // The handle finds it again and holds no secret.
    let text = minted.handle.to_string();
    assert!(
        text.contains("accessor")
            && !text.contains(password.expose())
            && !text.contains("hvs.")
            && !text.contains("s."),
        "{text}"
    );
    assert_eq!(c.keys(&minted.handle).len(), 2);
    // The lease is the smaller of the role's 600 s and the token's hour.
    let left = minted.not_after.unwrap().ms_since(now()) / 1000;
    assert!((590..=600).contains(&left), "{left}");

    let session = w.db.connect(&user, password.expose()).await.unwrap();
    assert_eq!(session.query_one("SELECT count(*) FROM invoices", &[]).await.unwrap().get::<_, i64>(0), 1);
    // The log-in is marked with our lease, for the target's own log.
    let accessor = minted.handle["accessor"].as_str().unwrap();
    let looked = w.bao.ok("PUT", "auth/token/lookup-accessor", serde_json::json!({ "accessor": accessor })).await;
    assert_eq!(looked["data"]["meta"]["lease"], i.lease.to_string());

    let gone = c.revoke(&live(&i, &minted), now()).await.unwrap();
    assert!(said(&gone).contains("400 invalid lease; it was live just before"), "{gone:?}");
    assert!(gone.access_cut.is_some() && gone.seen[0].what == "leases_revoked");
    assert!(session.query_one("SELECT 1", &[]).await.is_err(), "the open session was cut by the role's statements");
    assert!(w.db.connect(&user, password.expose()).await.is_err());
    assert_eq!(w.db.users(&user).await, Vec::<String>::new());
    assert_eq!(
        w.bao.call("PUT", "auth/token/lookup-accessor", serde_json::json!({ "accessor": accessor })).await.0 / 100,
        4
    );

    // Again: already gone is success, by the same proof.
    let again = c.revoke(&live(&i, &minted), now()).await.unwrap();
    assert!(said(&again).contains("had ended before this call"), "{again:?}");

    // What is not ours lives.
    assert!(w.bao.is_lease(&other_lease).await);
    assert_eq!(w.db.users(&other_user).await.len(), 1);
    let other_password = other["data"]["password"].as_str().unwrap();
    assert!(w.db.connect(&other_user, other_password).await.is_ok());
}

#[tokio::test]
async fn after_its_ttl_it_is_gone_without_a_call_from_anybody() {
    let Some(w) = World::start("vault_database: TTL").await else { return };
    w.bao.database(&w.db, "billing-ro", 2, "csv_").await;
    let c = w.billing("", None);
    let i = intent("bao/billing", &[], 300, 0);
    let minted = mint(&c, &i).await.unwrap();
    let start = Instant::now();
    while !w.db.users("csv_").await.is_empty() {
        assert!(start.elapsed() < Duration::from_secs(30), "OpenBao did not end it");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let gone = until_gone("after TTL", || async { c.revoke(&live(&i, &minted), now()).await }).await;
    assert!(said(&gone).contains("invalid lease"), "{gone:?}");
}

#[tokio::test]
async fn two_leases_of_one_role_are_independent_and_many_end_together() {
    let Some(w) = World::start("vault_database: L11, many").await else { return };
    let c = w.billing("", None);
    let mut leases = Vec::new();
    for _ in 0..12 {
        let i = intent("bao/billing", &[], 300, 0);
        let minted = mint(&c, &i).await.unwrap();
        leases.push(live(&i, &minted));
    }
    let survivor = leases.pop().unwrap();
    for result in end_all(&c, &leases, now()).await {
        said(&result.unwrap());
    }
    let user = survivor.handle.as_ref().unwrap()["username"].as_str().unwrap().to_owned();
    assert_eq!(w.db.users("csv_").await, [user]);
    assert_eq!(w.bao.leases(LEASE_PATH).await.len(), 1);
}

#[tokio::test]
async fn a_resource_that_left_the_catalogue_is_still_ended() {
    let Some(w) = World::start("vault_database: L3").await else { return };
    let i = intent("bao/billing", &[], 300, 0);
    let minted = mint(&w.billing("", None), &i).await.unwrap();
    let bare = connect(&target(&w.bao.address(), ""), &[], &w.signer, &w.clock, None).unwrap();
    said(&bare.revoke(&live(&i, &minted), now()).await.unwrap());
    assert!(w.db.users("csv_").await.is_empty());
    assert!(matches!(
        mint(&bare, &i).await,
        Err(countersign::connector::MintError::NotMinted { transient: false, .. })
    ));
}

#[tokio::test]
async fn what_comes_back_wrong_is_not_released_and_can_be_ended() {
    let Some(w) = World::start("vault_database: L8").await else { return };
    // The role lives longer than the catalogue says: the reviewer was shown less.
    let short = resource(
        "bao/billing",
        "engine = \"database\"\npath = \"database/creds/billing-ro\"\nttl_secs_max = 60\ndedicated = true",
        "",
    );
    // And the users are named otherwise than the catalogue says.
    let named = resource("bao/named", &format!("{BILLING}\nusername_prefix = \"other_\""), "");
    let c = connect(&target(&w.bao.address(), ""), &[short, named], &w.signer, &w.clock, None).unwrap();
    for name in ["bao/billing", "bao/named"] {
        let i = intent(name, &[], 300, 0);
        let Err(countersign::connector::MintError::Unknown { why, handle }) = mint(&c, &i).await else {
            panic!("released")
        };
        assert!(why.contains("not what was asked for"), "{why}");
        said(&c.revoke_unknown(&unknown(&i, handle), &std::collections::BTreeSet::default(), now()).await.unwrap());
        assert!(w.db.users("csv_").await.is_empty());
    }
}

#[tokio::test]
async fn a_user_that_keeps_its_own_role_locked_does_not_hold_up_its_end() {
    let Some(w) = World::start("vault_database: own role locked").await else { return };
    let c = w.billing("", None);
    let i = intent("bao/billing", &[], 300, 0);
    let minted = mint(&c, &i).await.unwrap();
    let user = minted.credential.public["username"].clone();
    let session = w.db.connect(&user, minted.credential.secret["password"].expose()).await.unwrap();
    session.batch_execute("BEGIN; ALTER ROLE CURRENT_USER PASSWORD 'mine'").await.unwrap();
    // It does hold the role: nobody else changes it meanwhile.
    let admin = w.db.admin().await;
    let blocked = admin.batch_execute(&format!("SET lock_timeout = '100ms'; ALTER ROLE \"{user}\" NOLOGIN")).await;
    assert_eq!(blocked.unwrap_err().code(), Some(&tokio_postgres::error::SqlState::LOCK_NOT_AVAILABLE));

    let start = Instant::now();
    let gone = c.revoke(&live(&i, &minted), now()).await.unwrap();
    let took = start.elapsed();
    eprintln!("ended in {took:?} while it held its role");
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert!(said(&gone).contains("revoked with sync"), "{gone:?}");
    assert!(session.query_one("SELECT 1", &[]).await.is_err(), "the session is closed");
    assert!(w.db.users("csv_").await.is_empty());
    assert!(w.db.connect(&user, "mine").await.is_err());
}

#[tokio::test]
async fn config_check_tries_the_cut_and_says_what_makes_it_immediate() {
    let Some(w) = World::start("vault_database: check").await else { return };
    let connection =
        format!("connection = {{ host = \"127.0.0.1\", port = \"{}\", dbname = \"postgres\" }}", w.db.port);
    let permission = intent("bao/billing", &[], 300, 0).permission;
    let c = w.billing(&format!("revocation_cuts_sessions = true\n{connection}"), None);
    let before = c.revocability(&permission, 300);
    assert_eq!(before.mode, RevocabilityMode::NewUseOnly);
    assert!(
        before.says.contains("may go on until they are closed") && before.says.contains("VALID UNTIL"),
        "{}",
        before.says
    );
    let gaps = c.check().await.unwrap();
    assert!(gaps.len() == 1 && !gaps[0].fatal && gaps[0].what.contains("tried just now"), "{gaps:?}");
    assert!(
        w.db.users("csv_").await.is_empty() && w.bao.leases(LEASE_PATH).await.is_empty(),
        "the trial left something"
    );
    assert_eq!(c.revocability(&permission, 300).mode, RevocabilityMode::NewUseOnly, "the catalogue decides");

    // What it said, put into the catalogue.
    let tried = gaps[0].fix.clone();
    let c = w.billing(&format!("revocation_cuts_sessions = true\n{tried}\n{connection}"), None);
    assert_eq!(c.check().await.unwrap(), []);
    c.sweep().await.unwrap();
    let after = c.revocability(&permission, 300);
    assert_eq!((after.mode, after.residual_secs), (RevocabilityMode::Immediate, 0));

    // The role changes: from the next sweep on it isn't claimed any more, until it is what was tried.
    let lines = |fence: &str| openbao::doc(fence).lines().map(str::to_owned).collect::<Vec<_>>();
    let old = ["DROP ROLE IF EXISTS \"{{name}}\"".to_owned()];
    w.bao.database_role("billing-ro", 600, &lines("sql creation"), &old).await;
    c.sweep().await.unwrap();
    assert_eq!(c.revocability(&permission, 300).mode, RevocabilityMode::NewUseOnly);
    assert!(c.check().await.unwrap().iter().any(|g| g.fatal && g.what.contains("could not be confirmed")));
    w.bao.database_role("billing-ro", 500, &lines("sql creation"), &lines("sql revocation")).await;
    c.sweep().await.unwrap();
    assert_eq!(c.revocability(&permission, 300).mode, RevocabilityMode::Immediate);

    // The same role with OpenBao's default statements: the word in the catalogue is not believed.
    let creation = openbao::doc("sql creation");
    w.bao.database_role("billing-ro", 600, &[creation], &[]).await;
    let c = w.billing(&format!("revocation_cuts_sessions = true\nsession_secs_max = 900\n{connection}"), None);
    let gaps = c.check().await.unwrap();
    assert!(gaps.iter().any(|g| g.what.contains("has no revocation_statements")), "{gaps:?}");
    assert!(gaps.iter().any(|g| g.what.contains("still there after the revocation")), "{gaps:?}");
    let r = c.revocability(&permission, 300);
    assert_eq!((r.mode, r.residual_secs), (RevocabilityMode::NewUseOnly, 900));
}

#[tokio::test]
async fn times() {
    let Some(w) = World::start("vault_database: times").await else { return };
    let c = w.billing("", None);
    let (mut prepare, mut made, mut ended) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..60 {
        let i = intent("bao/billing", &[], 300, 0);
        let t = Instant::now();
        let handle = c.prepare(&i).await.unwrap();
        prepare.push(t.elapsed());
        let t = Instant::now();
        let minted = c.mint(&i, handle.as_ref(), &context()).await.unwrap();
        made.push(t.elapsed());
        let t = Instant::now();
        c.revoke(&live(&i, &minted), now()).await.unwrap();
        ended.push(t.elapsed());
    }
    for (what, mut times) in [("log-in", prepare), ("mint", made), ("end with evidence", ended)] {
        times.sort();
        eprintln!("{what}: p50 {:?}, p95 {:?}, max {:?}", times[30], times[57], times[59]);
        assert!(times[30] < Duration::from_secs(2), "{what} takes {:?}", times[30]);
    }
}
