//! `config check --live` at a real PostgreSQL: what is missing, what that allows, and that the fix closes it.
//! And the wire: TLS with the operator's CA, the name verified, channel binding.

#[path = "support/pg_lease.rs"]
mod pg_lease;
#[path = "support/postgres.rs"]
mod postgres;

use std::sync::Arc;

use countersign::connector::{Connector, Gap, MintError};
use countersign::core::id::Timestamp;
use countersign::keys::NamePrefix;
use pg_lease::{Bench, Mode, context};
use postgres::{Cluster, THROW_AWAY, available};

fn named<'a>(gaps: &'a [Gap], what: &str) -> Option<&'a Gap> {
    gaps.iter().find(|g| g.what.contains(what))
}

/// Every database that accepts connections, not only the one that leases are meant for.
fn harden_the_others(bench: &Bench) {
    for other in ["postgres", "template1"] {
        let hardening = include_str!("../config/postgres/00-hardening.sql");
        let out = bench.cluster.psql(other, &[("broker", &bench.broker)], hardening);
        assert!(out.status.success(), "{out:?}");
    }
}

#[tokio::test]
async fn the_shipped_set_up_leaves_only_gaps_that_are_meant() {
    if !available("the_shipped_set_up_leaves_only_gaps_that_are_meant") {
        return;
    }
    for (tag, mode) in [("clean", Mode::Direct), ("cleanf", Mode::Functions)] {
        let cluster = Arc::new(Cluster::start(THROW_AWAY));
        let bench = Bench::on(Arc::clone(&cluster), tag, mode, "").await;
        harden_the_others(&bench);
        let gaps = bench.connector.check().await.unwrap();
        // The bench gives one action the group `postgres`, one a group that doesn't exist, and one CREATE.
        let mut left: Vec<&Gap> = gaps
            .iter()
            .filter(|g| {
                !g.what.contains("\"postgres\"")
                    && !g.what.contains("no_such_group")
                    && !g.what.contains("may create objects")
            })
            .collect();
        if mode == Mode::Direct {
            assert!(named(&gaps, "CREATEROLE").is_some_and(|g| !g.fatal));
            left.retain(|g| !g.what.contains("CREATEROLE"));
        }
        assert!(left.is_empty(), "{left:#?}");
        assert!(named(&gaps, "no_such_group").unwrap().fatal);
    }
}

#[tokio::test]
async fn every_gap_is_seen_and_closed_by_its_own_fix() {
    if !available("every_gap_is_seen_and_closed_by_its_own_fix") {
        return;
    }
    let mut settings = THROW_AWAY.to_vec();
    settings.push(("max_prepared_transactions", "3"));
    let cluster = Arc::new(Cluster::start(&settings));
    let bench = Bench::on(Arc::clone(&cluster), "gaps", Mode::Direct, "").await;
    harden_the_others(&bench);
    let admin = bench.admin().await;
    let db = &bench.database;
    let cases = [
        (format!("GRANT CONNECT ON DATABASE {db} TO PUBLIC"), "PUBLIC may connect to database \"app_gaps\""),
        (format!("GRANT TEMP ON DATABASE {db} TO PUBLIC"), "temporary tables in database \"app_gaps\""),
        (format!("REVOKE CONNECT ON DATABASE {db} FROM conn_gaps"), "connection group may not connect"),
        ("GRANT EXECUTE ON FUNCTION pg_advisory_lock(bigint) TO PUBLIC".to_owned(), "pg_advisory_lock(bigint)"),
        ("GRANT EXECUTE ON FUNCTION lo_create(oid) TO PUBLIC".to_owned(), "lo_create(oid)"),
        ("GRANT CREATE ON SCHEMA public TO PUBLIC".to_owned(), "may create objects"),
        ("GRANT SELECT ON invoices TO PUBLIC".to_owned(), "PUBLIC has rights on public.invoices"),
        ("GRANT SELECT ON customers TO read_gaps".to_owned(), "also gives public.customers"),
        ("GRANT write_gaps TO read_gaps".to_owned(), "also gives the role write_gaps"),
        (
            "GRANT SELECT ON invoices TO read_gaps WITH GRANT OPTION".to_owned(),
            "WITH GRANT OPTION: public.invoices to read_gaps",
        ),
        ("ALTER TABLE invoices OWNER TO read_gaps".to_owned(), "\"read_gaps\" owns 1 objects"),
        ("ALTER ROLE write_gaps LOGIN".to_owned(), "\"write_gaps\" can log in"),
        ("ALTER ROLE broker_gaps CREATEDB".to_owned(), "CREATEDB, REPLICATION"),
        ("ALTER ROLE broker_gaps NOCREATEROLE".to_owned(), "can't make roles"),
        ("ALTER ROLE broker_gaps SUPERUSER".to_owned(), "is a superuser"),
    ];
    for (open, what) in cases {
        admin.batch_execute(&open).await.unwrap();
        let gaps = bench.connector.check().await.unwrap();
        let gap = named(&gaps, what).unwrap_or_else(|| panic!("{open}: {gaps:#?}"));
        assert!(!gap.allows.is_empty());
        // Some fixes are for a person to finish; the others are statements and are tried.
        let fix = gap.fix.split("; ").next().unwrap();
        if let Err(e) = admin.batch_execute(fix).await {
            let by_hand = ["the role write_gaps", "each of them", "their real owner"];
            assert!(by_hand.iter().any(|h| gap.fix.contains(h)), "{fix}: {e}");
            admin
                .batch_execute("ALTER TABLE invoices OWNER TO postgres; REVOKE write_gaps FROM read_gaps; REVOKE GRANT OPTION FOR ALL ON invoices FROM read_gaps CASCADE")
                .await
                .unwrap();
        }
        let after = bench.connector.check().await.unwrap();
        if what != "may create objects" {
            assert!(named(&after, what).is_none(), "{fix}: {:#?}", named(&after, what));
        }
    }
    let gaps = bench.connector.check().await.unwrap();
    assert!(named(&gaps, "max_prepared_transactions is 3").is_some());
}

/// The file with its own defaults and the prefix that the broker has by itself.
#[tokio::test]
async fn the_stricter_set_up_as_shipped_mints_and_says_what_keeps_it_from_minting() {
    if !available("the_stricter_set_up_as_shipped_mints_and_says_what_keeps_it_from_minting") {
        return;
    }
    let cluster = Arc::new(Cluster::start(THROW_AWAY));
    let bench = Bench::on(Arc::clone(&cluster), "shipped", Mode::Functions, "").await;
    let shipped = include_str!("../config/postgres/11-broker-functions.sql");
    let out = cluster.psql(&bench.database, &[("broker", &bench.broker)], shipped);
    assert!(out.status.success(), "{out:?}");
    let prefix = format!("{}_", NamePrefix::default().as_str());
    let connector = bench.another(&prefix, &[]);
    let mut intent = bench.intent("x", &["read"]);
    intent.name = pg_lease::lease_name(&prefix, "x");
    let minted = connector.mint(&intent, None, &context()).await.unwrap();
    let m = pg_lease::Minting::of(intent, minted);
    connector.revoke(&m.lease, Timestamp(0)).await.unwrap();

    let reads = |gaps: &[Gap]| gaps.iter().find(|g| g.what.contains("refuses to mint read of postgres/app")).cloned();
    assert!(reads(&connector.check().await.unwrap()).is_none());
    let admin = bench.admin().await;
    admin.batch_execute("DELETE FROM countersign.allowed_group WHERE name = 'read_shipped'").await.unwrap();
    let gap = reads(&connector.check().await.unwrap()).expect("a missing group is seen");
    assert!(gap.fatal && gap.what.contains("read_shipped"), "{gap:?}");
    admin.batch_execute(&gap.fix).await.unwrap();
    // Another prefix than the broker's.
    admin.batch_execute("UPDATE countersign.setting SET prefix = 'cs_'").await.unwrap();
    let gap = reads(&connector.check().await.unwrap()).expect("another prefix is seen");
    admin.batch_execute(&gap.fix).await.unwrap();
    assert!(reads(&connector.check().await.unwrap()).is_none());
    let left = "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'cslease%'";
    assert_eq!(admin.query_one(left, &[]).await.unwrap().get::<_, i64>(0), 0, "what was tried is taken back");
}

#[tokio::test]
async fn functions_of_another_release_are_fatal() {
    if !available("functions_of_another_release_are_fatal") {
        return;
    }
    let cluster = Arc::new(Cluster::start(THROW_AWAY));
    let bench = Bench::on(cluster, "drift", Mode::Functions, "").await;
    let admin = bench.admin().await;
    admin
        .batch_execute(
            "CREATE OR REPLACE FUNCTION countersign.cut(p_in jsonb, OUT p_out jsonb) LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN p_out := '[]'; END $$;
             DROP FUNCTION countersign.reach; GRANT EXECUTE ON FUNCTION countersign.mint TO PUBLIC;
             REVOKE EXECUTE ON FUNCTION countersign.drop FROM broker_drift; ALTER ROLE broker_drift CREATEROLE",
        )
        .await
        .unwrap();
    let gaps = bench.connector.check().await.unwrap();
    for what in [
        "cut(jsonb) is of another release",
        "reach(jsonb) is missing",
        "PUBLIC may call countersign.mint",
        "may not call countersign.drop",
    ] {
        assert!(named(&gaps, what).is_some_and(|g| g.fatal), "{what}: {gaps:#?}");
    }
    assert!(named(&gaps, "although setup").is_some());
}

fn pki(folder: &std::path::Path, name: &str) -> (String, String) {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_cert = ca.self_signed(&ca_key).unwrap();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let cert = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    std::fs::write(folder.join("ca.pem"), ca_cert.pem()).unwrap();
    (cert.pem(), key.serialize_pem())
}

#[tokio::test]
async fn the_wire_is_tls_with_the_operators_ca_and_the_right_name() {
    if !available("the_wire_is_tls_with_the_operators_ca_and_the_right_name") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for (tag, name, works) in [("tls", "localhost", true), ("tlsbad", "db.elsewhere", false)] {
        let (cert, key) = pki(folder.path(), name);
        let cluster = Arc::new(Cluster::start(THROW_AWAY));
        cluster.stop();
        cluster.secure(&cert, &key);
        let mut settings = THROW_AWAY.to_vec();
        settings.push(("ssl", "on"));
        cluster.run(&settings);
        let ca = folder.path().join("ca.pem");
        let more = format!("sslmode = 'verify-full'\nca_file = '{}'", ca.display());
        let bench = Bench::on(cluster, tag, Mode::Direct, &more).await;
        let minted = bench.connector.mint(&bench.intent("x", &["read"]), None, &context()).await;
        if works {
            let m = pg_lease::Minting::of(bench.intent("x", &["read"]), minted.unwrap());
            assert_eq!(m.public["sslmode"], "verify-full");
            assert!(m.public["sslrootcert_pem"].contains("BEGIN CERTIFICATE"));
            let admin = bench.admin().await;
            let plain = "SELECT count(*) FROM pg_stat_activity a LEFT JOIN pg_stat_ssl s USING (pid) WHERE a.usename = $1 AND NOT s.ssl";
            assert_eq!(admin.query_one(plain, &[&bench.broker]).await.unwrap().get::<_, i64>(0), 0);
            bench.connector.revoke(&m.lease, Timestamp(0)).await.unwrap();
        } else {
            let e = minted.unwrap_err();
            assert!(matches!(&e, MintError::NotMinted { why, .. } if why.contains("certificate")), "{e:?}");
        }
    }
}
