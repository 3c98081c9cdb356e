//! W2: an identity's JWT → a PostgreSQL credential, really logged in with → complete → the evidence in the grant's view.

use std::sync::Arc;
use std::time::{Duration, Instant};

use countersign::keys::random::{SystemRandom, random_secret};
use serde_json::{Map, Value, json};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config, NoTls};

use crate::Outcome;
use crate::figures::Part;
use crate::http::Connection;
use crate::postgres::Cluster;
use crate::w1::{Credentials, Grant, Stop, ask, wanted};
use crate::world::{self, World};

/// Durability as PostgreSQL ships it: nothing is switched off.
pub const SETTINGS: &[(&str, &str)] = &[
    ("fsync", "on"),
    ("synchronous_commit", "on"),
    ("full_page_writes", "on"),
    ("max_connections", "200"),
    ("shared_buffers", "128MB"),
    ("max_prepared_transactions", "0"),
];
/// Where leases work.
pub const DATABASE: &str = "app";
/// The broker's login there.
pub const BROKER: &str = "countersign";
/// How long anything at the target may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the agent does with its session before it completes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Session {
    /// Leaves it open: the broker has to cut it, and the agent sees when.
    Open,
    /// Closes it, as a tool does that ends.
    Closed,
}

#[allow(dead_code)] // each benchmark uses a part
/// A PostgreSQL of our own, set up with the SQL that is shipped for operators.
pub struct Target {
    pub cluster: Cluster,
    password: String,
}

impl Target {
    /// Starts it.
    pub fn start() -> Outcome<Self> {
        let cluster = Cluster::start(SETTINGS);
        let password = random_secret(&SystemRandom).expose().to_owned();
        let run = |database: &str, variables: &[(&str, &str)], sql: &str| -> Outcome<()> {
            let out = cluster.psql(database, variables, sql);
            if out.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&out.stderr).into_owned().into()) }
        };
        run("postgres", &[], &format!("CREATE DATABASE {DATABASE}"))?;
        let names = [("broker", BROKER), ("group", "lease_conn")];
        run(DATABASE, &names, include_str!("../../config/postgres/10-broker-direct.sql"))?;
        for (database, leases) in [(DATABASE, "on"), ("postgres", "off"), ("template1", "off")] {
            let variables = [names[0], names[1], ("leases", leases)];
            run(database, &variables, include_str!("../../config/postgres/00-hardening.sql"))?;
        }
        run(
            DATABASE,
            &[],
            &format!(
                "ALTER ROLE {BROKER} PASSWORD '{password}'; CREATE TABLE notes (id int PRIMARY KEY, body text);
                 INSERT INTO notes VALUES (1, 'a note'); CREATE ROLE app_read NOLOGIN; GRANT SELECT ON notes TO app_read;"
            ),
        )?;
        Ok(Self { cluster, password })
    }

    /// Starts it again after it was stopped; it answers when this returns.
    #[allow(dead_code)] // each benchmark uses a part
    pub fn start_again(&self) {
        self.cluster.run(SETTINGS);
    }

    /// Of the broker's login.
    pub fn password(&self) -> &str {
        &self.password
    }

    /// Its part of the catalogue.
    pub fn catalogue(&self) -> String {
        CATALOGUE.replace("@PORT@", &self.cluster.port.to_string())
    }

    /// Its version and durability, as it says itself.
    pub async fn settings(&self) -> Outcome<Value> {
        let admin = self.cluster.admin("postgres").await;
        let mut out = Map::new();
        for name in
            ["server_version", "fsync", "synchronous_commit", "full_page_writes", "wal_sync_method", "max_connections"]
        {
            let value: String = admin.query_one("SELECT current_setting($1)", &[&name]).await?.get(0);
            out.insert(name.to_owned(), json!(value));
        }
        let folder = std::env::temp_dir();
        out.insert("disk".to_owned(), crate::limits::disk_of(&folder)?);
        Ok(Value::Object(out))
    }

    /// Roles that should not be there any more: must be 0.
    pub async fn left(&self) -> Outcome<Value> {
        let admin = self.cluster.admin("postgres").await;
        let row = admin
            .query_one("SELECT count(*) FROM pg_roles WHERE rolname LIKE 'cslease%' OR rolname LIKE 'bare%'", &[])
            .await?;
        match row.get::<_, i64>(0) {
            0 => Ok(json!({ "roles": 0 })),
            n => Err(format!("{n} roles of leases are left at the target").into()),
        }
    }

    /// Logs in, and asks something.
    pub async fn use_it(&self, user: &str, password: &str) -> Outcome<(Client, JoinHandle<()>)> {
        let mut config = Config::new();
        config.host("127.0.0.1").port(self.cluster.port).user(user).password(password).dbname(DATABASE);
        let (client, connection) = config.connect(NoTls).await?;
        // It ends when the session does, whoever ends it.
        let session = tokio::spawn(async move {
            let _ = connection.await;
        });
        let one: &str = "1";
        let rows = client.simple_query("SELECT 1").await?;
        let answered =
            rows.iter().any(|m| matches!(m, tokio_postgres::SimpleQueryMessage::Row(r) if r.get(0) == Some(one)));
        if answered { Ok((client, session)) } else { Err("the target did not answer 1".into()) }
    }
}

/// Parts of a cycle, for the broker's and for the bare one.
#[derive(Default)]
pub struct Parts {
    pub cycles: usize,
    pub retries: usize,
    pub usable: Part,
    pub login: Part,
    pub cut: Part,
    pub evidence: Part,
    pub cycle: Part,
}

impl Parts {
    /// Adds another agent's.
    pub fn join(&mut self, other: Self) {
        self.cycles += other.cycles;
        self.retries += other.retries;
        self.usable.join(other.usable);
        self.login.join(other.login);
        self.cut.join(other.cut);
        self.evidence.join(other.evidence);
        self.cycle.join(other.cycle);
    }
    /// The percentiles.
    pub fn figures(self, session: Session, out: &mut Map<String, Value>) {
        out.insert("asked_to_usable".to_owned(), self.usable.figures());
        out.insert("log_in_and_use".to_owned(), self.login.figures());
        if session == Session::Open {
            out.insert("completed_to_access_cut".to_owned(), self.cut.figures());
        }
        out.insert("completed_to_evidence".to_owned(), self.evidence.figures());
        out.insert("whole_cycle".to_owned(), self.cycle.figures());
    }
}

/// So many agents at once, each with its own identity and its own connection to one of the nodes, one cycle after the other.
pub async fn run(nodes: &[Arc<World>], target: &Target, agents: usize, session: Session, stop: Stop) -> Outcome<Value> {
    let stacks = nodes.first().ok_or("no node")?.jwts(agents, stop)?;
    let mut connections = Vec::with_capacity(agents);
    for node in nodes.iter().cycle().take(agents) {
        connections.push(node.connect().await?);
    }
    let before = world::before(nodes).await?;
    let began = Instant::now();
    let running = connections
        .into_iter()
        .zip(stacks)
        .map(|(connection, jwts)| agent(connection, jwts, target, session, stop, began));
    let mut all = Parts::default();
    for one in futures::future::join_all(running).await {
        all.join(one?);
    }
    let mut out = world::since(nodes, before, all.cycles).await?;
    out.insert("agents".to_owned(), json!(agents));
    out.insert("session".to_owned(), json!(format!("{session:?}").to_lowercase()));
    all.figures(session, &mut out);
    Ok(Value::Object(out))
}

async fn agent(
    mut connection: Connection,
    jwts: Vec<String>,
    target: &Target,
    session: Session,
    stop: Stop,
    began: Instant,
) -> Outcome<Parts> {
    let mut parts = Parts::default();
    for jwt in &jwts {
        if stop.reached(parts.cycles, began) {
            break;
        }
        one(&mut connection, jwt, target, session, &mut parts).await?;
        parts.cycles += 1;
    }
    Ok(parts)
}

async fn one(
    connection: &mut Connection,
    jwt: &str,
    target: &Target,
    session: Session,
    parts: &mut Parts,
) -> Outcome<()> {
    let key = &jwt[jwt.len() - 40..];
    let t0 = Instant::now();
    let grant = ask(connection, jwt, key, wanted("postgres", "postgres/bench")).await?;
    let path = format!("/v1/grants/{}", grant.id);
    let issued: Credentials =
        connection.call("POST", &format!("{path}/credentials"), jwt, Some(key), Some("{}".to_owned())).await?;
    let usable = Instant::now();
    let credential = issued.credentials.first().ok_or("no credential")?;
    let (client, open) = target.use_it(&credential.public["user"], &credential.secret["password"]).await?;
    let used = Instant::now();
    let watch = match session {
        Session::Open => {
            // Seen from outside: the moment when the server ends this session.
            Some(tokio::spawn(async move {
                let ended = tokio::time::timeout(PATIENCE, open).await;
                drop(client);
                ended.map(|_| Instant::now())
            }))
        }
        Session::Closed => {
            drop(client);
            tokio::time::timeout(PATIENCE, open).await??;
            None
        }
    };
    let completed = Instant::now();
    let mut seen: Grant =
        connection.call("POST", &format!("{path}/complete"), jwt, None, Some("{}".to_owned())).await?;
    while seen.state != "ended" {
        let poll = format!("{path}?wait=30s&version={}", seen.version);
        seen = connection.call("GET", &poll, jwt, None, None).await?;
    }
    let ended = Instant::now();
    if seen.leases.is_empty() || seen.leases.iter().any(|l| l.evidence.is_none()) {
        return Err("ended without evidence".into());
    }
    if let Some(watch) = watch {
        parts.cut.add(watch.await?.map_err(|_| "the session was never cut")? - completed);
    }
    parts.usable.add(usable - t0);
    parts.login.add(used - usable);
    parts.evidence.add(ended - completed);
    parts.cycle.add(ended - t0);
    Ok(())
}

const CATALOGUE: &str = r#"
[[target]]
name = "bench-db"
kind = "postgres"
[target.settings]
host = "127.0.0.1"
port = @PORT@
dbname = "app"
user = "countersign"
password = "file:postgres.password"
sslmode = "disable"
connection_group = "lease_conn"

[[resource]]
name = "postgres/bench"
target = "bench-db"
title = "a database"
environment = "sandbox"
isolated = true
sensitivity = "none"
settings = { database = "app" }

[[resource.action]]
name = "read"
effect = "read"
says = "read"
settings = { groups = ["app_read"] }
"#;
