//! The PostgreSQL of a world: databases, tables, groups, and the shipped hardening and set-up SQL.

use rustix::process::{Pid, Signal, kill_process};
use tokio_postgres::Client;

use super::postgres::{Cluster, THROW_AWAY};

/// The password of the broker's login there: a canary that may be nowhere but in its file.
pub const PASSWORD: &str = "canary-pg-password-7f3a9c";

const SETUP: &str = include_str!("../../../config/postgres/10-broker-direct.sql");
const HARDENING: &str = include_str!("../../../config/postgres/00-hardening.sql");

const APP: &str = "
CREATE TABLE invoices (id int PRIMARY KEY, cents int NOT NULL);
INSERT INTO invoices VALUES (1, 100), (2, 200);
CREATE TABLE customers (id int PRIMARY KEY, name text NOT NULL);
INSERT INTO customers VALUES (1, 'Ada');
CREATE SCHEMA workshop;
CREATE TABLE workshop.bench (id int);
CREATE ROLE app_invoices_read NOLOGIN; CREATE ROLE app_invoices_write NOLOGIN; CREATE ROLE app_invoices_purge NOLOGIN;
CREATE ROLE app_customers_read NOLOGIN; CREATE ROLE app_customers_write NOLOGIN; CREATE ROLE app_customers_purge NOLOGIN;
CREATE ROLE app_build NOLOGIN;
GRANT SELECT ON invoices TO app_invoices_read;
GRANT SELECT, INSERT, UPDATE ON invoices TO app_invoices_write;
GRANT SELECT, DELETE ON invoices TO app_invoices_purge;
GRANT SELECT ON customers TO app_customers_read;
GRANT SELECT, INSERT, UPDATE ON customers TO app_customers_write;
GRANT SELECT, DELETE ON customers TO app_customers_purge;
GRANT USAGE, CREATE ON SCHEMA workshop TO app_build;
GRANT SELECT, INSERT, TRIGGER ON workshop.bench TO app_build;
";

const SANDBOX: &str = "
CREATE TABLE notes (id int PRIMARY KEY, body text NOT NULL);
INSERT INTO notes VALUES (1, 'nothing here is real');
CREATE TABLE drafts (id int PRIMARY KEY, body text NOT NULL);
CREATE ROLE sandbox_notes_read NOLOGIN; CREATE ROLE sandbox_drafts_read NOLOGIN;
GRANT SELECT ON notes TO sandbox_notes_read;
GRANT SELECT ON drafts TO sandbox_drafts_read;
";

/// What the server is started with.
pub fn settings() -> Vec<(&'static str, &'static str)> {
    let mut settings = THROW_AWAY.to_vec();
    settings.extend([("max_prepared_transactions", "0"), ("log_statement", "all")]);
    settings
}

/// A hardened server. Blocks.
pub fn start() -> Cluster {
    let cluster = Cluster::start(&settings());
    let run = |database: &str, variables: &[(&str, &str)], sql: &str| {
        let out = cluster.psql(database, variables, sql);
        assert!(out.status.success(), "{sql:.80}: {}", String::from_utf8_lossy(&out.stderr));
    };
    run("postgres", &[], "CREATE DATABASE app; CREATE DATABASE sandbox;");
    run("postgres", &[("broker", "countersign")], SETUP);
    run("postgres", &[], &format!("ALTER ROLE countersign PASSWORD '{PASSWORD}';"));
    for (database, leases) in [("app", "on"), ("sandbox", "on"), ("postgres", "off"), ("template1", "off")] {
        run(database, &[("broker", "countersign"), ("group", "lease_conn"), ("leases", leases)], HARDENING);
    }
    run("app", &[], APP);
    run("sandbox", &[], SANDBOX);
    cluster
}

/// Roles of leases that are there.
pub async fn leases(admin: &Client) -> Vec<String> {
    let rows = admin.query("SELECT rolname FROM pg_roles WHERE rolname LIKE 'cslease%' ORDER BY 1", &[]).await.unwrap();
    rows.iter().map(|r| r.get(0)).collect()
}

/// The OID of a role.
pub async fn oid(admin: &Client, role: &str) -> u32 {
    admin.query_one("SELECT oid FROM pg_roles WHERE rolname = $1", &[&role]).await.unwrap().get(0)
}

/// Sessions of a role, by OID: once it is dropped, names say nothing.
pub async fn sessions(admin: &Client, oid: u32) -> i64 {
    admin.query_one("SELECT count(*) FROM pg_stat_activity WHERE usesysid = $1", &[&oid]).await.unwrap().get(0)
}

/// What the catalogues still hold of a role: itself, its sessions, what depends on it, its memberships.
pub async fn left(admin: &Client, oid: u32, name: &str) -> Vec<i64> {
    let row = admin
        .query_one(
            "SELECT (SELECT count(*) FROM pg_roles WHERE oid = $1 OR rolname = $2), \
             (SELECT count(*) FROM pg_stat_activity WHERE usesysid = $1), \
             (SELECT count(*) FROM pg_shdepend WHERE refclassid = 'pg_authid'::regclass AND refobjid = $1), \
             (SELECT count(*) FROM pg_auth_members WHERE $1 IN (roleid, member, grantor)), \
             (SELECT count(*) FROM pg_class WHERE relowner = $1) + (SELECT count(*) FROM pg_proc WHERE proowner = $1)",
            &[&oid, &name],
        )
        .await
        .unwrap();
    (0..5).map(|i| row.get(i)).collect()
}

/// Stops the broker's own backends in PostgreSQL, or lets them go on.
pub async fn backends(admin: &Client, signal: Signal) {
    let pids = "SELECT pid FROM pg_stat_activity WHERE application_name = 'countersign'";
    let rows = admin.query(pids, &[]).await.unwrap();
    assert!(!rows.is_empty(), "the broker has sessions there");
    for row in rows {
        kill_process(Pid::from_raw(row.get(0)).unwrap(), signal).unwrap();
    }
}
