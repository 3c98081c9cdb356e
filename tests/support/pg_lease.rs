//! A PostgreSQL target for tests: a database with tables, groups, the shipped set-up SQL, and a connector to it.
#![allow(dead_code)] // each test binary uses what it needs

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use countersign::config::{Resource, Target};
use countersign::connector::postgres::PostgresConnector;
use countersign::connector::{Connector, MintContext, Minted};
use countersign::core::id::{ActionName, AgentId, ConstraintName, GrantId, LeaseId, ResourceName, TaskName, Timestamp};
use countersign::core::lease::{Lease, LeaseIntent, LeaseState};
use countersign::core::permission::{Constraint, Permission};
use countersign::keys::{NameKey, NamePrefix};
use countersign::time::{Clock, SystemClock};
use tokio_postgres::Client;

use crate::postgres::{Cluster, shared};

/// A target on a cluster, with names of its own so that tests can share the cluster.
pub struct Bench {
    pub cluster: Arc<Cluster>,
    pub tag: String,
    pub broker: String,
    pub connector: PostgresConnector,
    pub database: String,
    pub prefix: String,
    target: Target,
    resources: [Resource; 2],
    folder: tempfile::TempDir,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Direct,
    Functions,
}

impl Bench {
    /// On the shared cluster, direct set-up.
    pub async fn new(tag: &str) -> Self {
        Self::on(shared(), tag, Mode::Direct, "").await
    }

    /// `more` goes into the target's settings.
    pub async fn on(cluster: Arc<Cluster>, tag: &str, mode: Mode, more: &str) -> Self {
        // Roles are the cluster's: two set-ups at once could touch the same row.
        static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
        let _turn = ONE_AT_A_TIME.lock().await;
        let (broker, database, prefix) = (format!("broker_{tag}"), format!("app_{tag}"), format!("ls_{tag}_"));
        let group = format!("conn_{tag}");
        let run = |db: &str, vars: &[(&str, &str)], sql: &str| {
            let out = cluster.psql(db, vars, sql);
            assert!(out.status.success(), "{sql:.80}: {}", String::from_utf8_lossy(&out.stderr));
        };
        run("postgres", &[], &format!("CREATE DATABASE {database}"));
        let names = [("broker", broker.as_str()), ("group", &group), ("prefix", &prefix)];
        match mode {
            Mode::Direct => run(&database, &names, include_str!("../../config/postgres/10-broker-direct.sql")),
            Mode::Functions => run(&database, &names, include_str!("../../config/postgres/11-broker-functions.sql")),
        }
        let mut hardening = names.to_vec();
        hardening.push(("leases", "on"));
        run(&database, &hardening, include_str!("../../config/postgres/00-hardening.sql"));
        run(
            &database,
            &[],
            &format!(
                "ALTER ROLE {broker} PASSWORD 'broker-secret-{tag}';
                 CREATE ROLE read_{tag} NOLOGIN; CREATE ROLE write_{tag} NOLOGIN; CREATE ROLE make_{tag} NOLOGIN;
                 CREATE ROLE \"odd\"\"; DROP TABLE invoices; -- {tag}\" NOLOGIN;
                 CREATE TABLE invoices (id int PRIMARY KEY, amount int); INSERT INTO invoices VALUES (1, 100);
                 CREATE TABLE customers (id int, name text); INSERT INTO customers VALUES (1, 'Ada');
                 CREATE SCHEMA playground;
                 GRANT SELECT ON invoices TO read_{tag}; GRANT SELECT, INSERT, UPDATE ON customers TO write_{tag};
                 GRANT USAGE, CREATE ON SCHEMA playground TO make_{tag};
                 GRANT SELECT ON customers TO \"odd\"\"; DROP TABLE invoices; -- {tag}\";"
            ),
        );
        if mode == Mode::Functions {
            run(
                &database,
                &[],
                &format!(
                    "INSERT INTO countersign.allowed_group SELECT rolname FROM pg_roles WHERE rolname LIKE '%{tag}' AND NOT rolcanlogin"
                ),
            );
        }
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("password"), format!("broker-secret-{tag}\n")).unwrap();
        let setup = if mode == Mode::Direct { "direct" } else { "functions" };
        // The certificate of a test with TLS is for a name.
        let (host, wire) =
            if more.contains("sslmode") { ("localhost", "") } else { ("127.0.0.1", "sslmode = 'disable'") };
        let settings = format!(
            "host = '{host}'\nport = {}\ndbname = '{database}'\nuser = '{broker}'\npassword = 'file:password'\n\
             {wire}\nconnection_group = '{group}'\nconnection_limit = 20\nsetup = '{setup}'\n{more}",
            cluster.port
        );
        let target = Target {
            name: ResourceName::new("db").unwrap(),
            kind: "postgres".to_owned(),
            settings: settings.parse().unwrap(),
        };
        let resource: Resource = toml::from_str(&format!(
            r#"
            name = "postgres/app"
            target = "db"
            title = "app"
            environment = "test"
            sensitivity = "none"
            settings = {{ database = "{database}" }}
            action = [
              {{ name = "read", effect = "read", settings = {{ groups = ["read_{tag}"] }} }},
              {{ name = "write", effect = "write", settings = {{ groups = ["write_{tag}"] }} }},
              {{ name = "make", effect = "write", settings = {{ groups = ["make_{tag}"] }} }},
              {{ name = "odd", effect = "read", settings = {{ groups = ['odd"; DROP TABLE invoices; -- {tag}'] }} }},
              {{ name = "missing", effect = "read", settings = {{ groups = ['no_such_group'] }} }},
              {{ name = "admin", effect = "read", settings = {{ groups = ['postgres'] }} }},
            ]
            "#
        ))
        .unwrap();
        let by_table: Resource = toml::from_str(&format!(
            r#"
            name = "postgres/tables"
            target = "db"
            title = "app by table"
            environment = "test"
            sensitivity = "none"
            settings = {{ database = "{database}" }}
            action = [{{ name = "read", effect = "read", settings = {{ tables = {{ invoices = ["read_{tag}"], customers = ["write_{tag}"] }} }} }}]
            constraint = {{ tables = {{ kind = "set", values = ["invoices", "customers"] }} }}
            "#
        ))
        .unwrap();
        let connector = connect(&target, &[&resource, &by_table], folder.path(), &prefix);
        let resources = [resource, by_table];
        Self { cluster, tag: tag.to_owned(), broker, connector, database, prefix, target, resources, folder }
    }

    /// A second broker on the same cluster: the same login, another name prefix, and `more` in place of the target's settings.
    pub fn another(&self, prefix: &str, more: &[(&str, toml::Value)]) -> PostgresConnector {
        let mut target = self.target.clone();
        target.settings.extend(more.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        connect(&target, &self.resources.iter().collect::<Vec<_>>(), self.folder.path(), prefix)
    }

    pub async fn admin(&self) -> Client {
        self.cluster.admin(&self.database).await
    }

    pub fn intent(&self, name: &str, actions: &[&str]) -> LeaseIntent {
        LeaseIntent {
            lease: LeaseId::from_bytes([1; 16]),
            grant: GrantId::from_bytes([2; 16]),
            name: lease_name(&self.prefix, name),
            target: "db".parse().unwrap(),
            permission: permission("postgres/app", actions, None),
            intended_at: SystemClock.wall(),
            lifetime_secs: 600,
        }
    }

    /// Mints, and gives the lease as the journal would hold it.
    pub async fn mint(&self, name: &str, actions: &[&str]) -> Minting {
        let intent = self.intent(name, actions);
        let minted = self.connector.mint(&intent, None, &context()).await.unwrap();
        Minting::of(intent, minted)
    }

    pub async fn login(&self, m: &Minting) -> Result<Client, tokio_postgres::Error> {
        self.cluster.login(&m.lease.intent.name, &m.password, &self.database).await
    }
}

/// A credential in an agent's hands.
pub struct Minting {
    pub lease: Lease,
    pub password: String,
    pub oid: u32,
    pub public: BTreeMap<String, String>,
}

impl Minting {
    pub fn of(intent: LeaseIntent, minted: Minted) -> Self {
        let oid = u32::try_from(minted.handle["oid"].as_u64().unwrap()).unwrap();
        Self {
            password: minted.credential.secret["password"].expose().to_owned(),
            public: minted.credential.public,
            oid,
            lease: Lease {
                intent,
                handle: Some(minted.handle),
                not_after: minted.not_after,
                state: LeaseState::Live { since: Timestamp(0), released_at: None },
            },
        }
    }
    pub fn name(&self) -> &str {
        &self.lease.intent.name
    }
}

/// A name as the broker makes them, the same for the same text.
pub fn lease_name(prefix: &str, name: &str) -> String {
    let prefix = NamePrefix::new(prefix.trim_end_matches('_')).unwrap();
    NameKey::from_bytes(&[7; 32]).name(&prefix, &[name.as_bytes()])
}

pub fn connect(target: &Target, resources: &[&Resource], base: &Path, prefix: &str) -> PostgresConnector {
    PostgresConnector::new(target, resources, base, Arc::new(SystemClock), prefix).unwrap()
}

pub fn permission(resource: &str, actions: &[&str], tables: Option<&[&str]>) -> Permission {
    let set = |tables: &[&str]| Constraint::Set(tables.iter().map(|t| (*t).to_owned()).collect::<BTreeSet<_>>());
    Permission {
        resource: ResourceName::new(resource).unwrap(),
        actions: actions.iter().map(|a| ActionName::new(a).unwrap()).collect(),
        constraints: tables.iter().map(|t| (ConstraintName::new("tables").unwrap(), set(t))).collect(),
    }
}

pub fn context() -> MintContext {
    MintContext {
        agent: AgentId::new("spiffe://corp/agent").unwrap(),
        owner: None,
        task: TaskName::new("T-1").unwrap(),
        approvers: Vec::new(),
        chain: Vec::new(),
        confirmation: None,
        wall_now: SystemClock.wall(),
    }
}

/// The catalogues hold nothing of this OID any more.
pub async fn nothing_left(admin: &Client, oid: u32, name: &str) {
    let row = admin
        .query_one(
            "SELECT (SELECT count(*) FROM pg_roles WHERE oid = $1 OR rolname = $2), \
             (SELECT count(*) FROM pg_stat_activity WHERE usesysid = $1), \
             (SELECT count(*) FROM pg_shdepend WHERE refclassid = 'pg_authid'::regclass AND refobjid = $1), \
             (SELECT count(*) FROM pg_auth_members WHERE $1 IN (roleid, member, grantor))",
            &[&oid, &name],
        )
        .await
        .unwrap();
    for i in 0..4 {
        assert_eq!(row.get::<_, i64>(i), 0, "count {i} for {name}");
    }
}
