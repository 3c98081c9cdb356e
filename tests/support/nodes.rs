//! Three nodes of one record as processes of their own, the database of their store and a target, and agents who work at
//! all of them. Needs nothing of the test's file: `#[path = "support/nodes.rs"] mod nodes;`.
#![allow(dead_code)] // each test binary uses a part

#[path = "crash_broker.rs"]
pub mod broker;
#[path = "gate.rs"]
pub mod gate;
#[path = "broker.rs"]
pub mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use countersign::audit::verify::{Options, Report, verify};
use countersign::core::event::{Event, GrantEvent};
use countersign::core::grant::{Grant, GrantState};
use countersign::core::id::{GrantId, LeaseId};
use countersign::core::lease::LeaseState;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};

use broker::{Agent, PREFIX, Record, Serving, Setup, until};
use gate::Gate;
use world::oidc_provider::OidcProvider;
use world::postgres::{self, Cluster};

const PASSWORD: &str = "broker-secret";
/// What a node sends to make a role, and nothing else.
const MINT: &str = "CREATE ROLE %I LOGIN";
/// Until nothing is left: the longest mint of this connector, the time until a node counts as dead, and the endings.
pub const RECOVERY: Duration = Duration::from_secs(120);
/// This one's data is missed: it is restarted at once in the middle of everything.
pub const STORE: &[(&str, &str)] = &[("max_connections", "100"), ("shared_buffers", "32MB")];

fn target() -> Cluster {
    let mut settings = postgres::THROW_AWAY.to_vec();
    settings.extend([("max_prepared_transactions", "0"), ("max_connections", "200")]);
    let cluster = Cluster::start(&settings);
    let run = |variables: &[(&str, &str)], sql: &str| {
        let out = cluster.psql("postgres", variables, sql);
        assert!(out.status.success(), "{sql:.80}: {}", String::from_utf8_lossy(&out.stderr));
    };
    let names = [("broker", "countersign"), ("group", "lease_conn"), ("leases", "on")];
    run(&names, include_str!("../../config/postgres/10-broker-direct.sql"));
    run(&names, include_str!("../../config/postgres/00-hardening.sql"));
    run(
        &[],
        &format!(
            "ALTER ROLE countersign PASSWORD '{PASSWORD}'; CREATE TABLE notes (body text); CREATE ROLE notes_read NOLOGIN; \
             GRANT SELECT ON notes TO notes_read;"
        ),
    );
    cluster
}

/// The database of the store: an ordinary role, nothing of a superuser.
pub fn database(settings: &[(&str, &str)]) -> Cluster {
    let cluster = Cluster::start(settings);
    let out = cluster.psql(
        "postgres",
        &[],
        "CREATE ROLE node LOGIN PASSWORD 'node'; GRANT CREATE ON DATABASE postgres TO node;",
    );
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    cluster
}

fn catalogue(port: u16) -> String {
    format!(
        r#"
[[target]]
name = "db"
kind = "postgres"
[target.settings]
host = "127.0.0.1"
port = {port}
user = "countersign"
password = "file:pg.password"
sslmode = "disable"
connection_group = "lease_conn"

[[resource]]
name = "postgres/notes"
target = "db"
title = "notes database"
environment = "sandbox"
isolated = true
sensitivity = "none"
settings = {{ database = "postgres" }}
[[resource.action]]
name = "read"
effect = "read"
settings = {{ groups = ["notes_read"] }}

[[resource]]
name = "api/customers"
target = "tokens"
title = "customers"
environment = "prod"
sensitivity = "customer"
settings = {{ audience = "https://customers.test", checks = "offline" }}
[[resource.action]]
name = "read"
effect = "read"
"#
    )
}

pub fn want() -> Value {
    json!({ "type": "postgres", "identifier": "postgres/notes", "actions": ["read"] })
}

/// A proxy in front of the store's database whose connections can all be cut.
pub struct Cut {
    port: u16,
    now: tokio::sync::watch::Sender<u64>,
    task: tokio::task::JoinHandle<()>,
}

impl Cut {
    async fn start(to: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let now = tokio::sync::watch::Sender::new(0);
        let cuts = now.clone();
        let task = tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let mut cut = cuts.subscribe();
                tokio::spawn(async move {
                    let Ok(mut server) = TcpStream::connect(("127.0.0.1", to)).await else { return };
                    let (_, _) = (client.set_nodelay(true), server.set_nodelay(true));
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                        _ = cut.changed() => {}
                    }
                });
            }
        });
        Self { port, now, task }
    }
    pub fn now(&self) {
        self.now.send_modify(|n| *n += 1);
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Three nodes with one record, one name, one set of keys.
pub struct Nodes {
    pub all: Vec<Serving>,
    /// Each node's way to the database, if it can be cut.
    pub cuts: Vec<Cut>,
    pub target: Cluster,
    /// In front of the target.
    pub gate: Gate,
    /// Where people log in, if that is installed.
    pub people: Option<OidcProvider>,
    /// Where the record is.
    pub database: Arc<Cluster>,
}

/// Changes a node's configuration.
fn change(node: &Serving, from: &str, to: &str) {
    let config = std::fs::read_to_string(node.file("countersign.toml")).unwrap();
    assert!(config.contains(from), "{from}");
    std::fs::write(node.file("countersign.toml"), config.replace(from, to)).unwrap();
}

impl Nodes {
    /// Each with a way of its own to one database.
    pub async fn up() -> Self {
        Self::started(false).await
    }

    /// The same, and people can log in.
    pub async fn up_with_people() -> Self {
        Self::started(true).await
    }

    async fn started(with_people: bool) -> Self {
        let database = Arc::new(database(STORE));
        let mut cuts = Vec::new();
        for _ in 0..3 {
            cuts.push(Cut::start(database.port).await);
        }
        let ways: Vec<String> = cuts.iter().map(|cut| format!("127.0.0.1:{}", cut.port)).collect();
        Self { cuts, ..Self::build(database, [&ways[0], &ways[1], &ways[2]], with_people).await }
    }

    /// Each with its way to the database: `HOST:PORT`, or several of them with commas.
    pub async fn on(database: Arc<Cluster>, ways: [&str; 3]) -> Self {
        Self::build(database, ways, false).await
    }

    async fn build(database: Arc<Cluster>, ways: [&str; 3], with_people: bool) -> Self {
        let target = target();
        let gate = Gate::start(target.port, &[MINT]).await;
        let mut nodes: Vec<Serving> = Vec::new();
        for way in ways {
            let mut node = Serving::prepare(|_, folder| {
                std::fs::write(folder.join("pg.password"), PASSWORD).unwrap();
                std::fs::write(folder.join("store.url"), format!("postgres://node:node@{way}/postgres\n")).unwrap();
                Setup {
                    catalogue: catalogue(gate.port),
                    broker: "sweep_every_secs = 2\n[store]\nkind = \"postgres\"\nurl = \"file:store.url\"".to_owned(),
                    limits: "open_grants_per_agent_max = 10000".to_owned(),
                    ..Setup::default()
                }
            });
            if let Some(first) = nodes.first() {
                // The same name, certificates and believed identities.
                for file in ["ca.pem", "broker.pem", "broker.key", "bundle.json"] {
                    std::fs::copy(first.file(file), node.file(file)).unwrap();
                }
                change(&node, &format!("\"{}\"", node.agent_url()), &format!("\"{}\"", first.agent_url()));
                (node.authority, node.http) = (Arc::clone(&first.authority), first.http.clone());
            }
            nodes.push(node);
        }
        let back: Vec<String> = nodes.iter().map(|n| format!("{}/login/callback", n.reviewer_url())).collect();
        let back: Vec<&str> = back.iter().map(String::as_str).collect();
        let people = if with_people { OidcProvider::start(&back).await } else { None };
        for n in 0..nodes.len() {
            if let Some(people) = &people {
                change(&nodes[n], "http://127.0.0.1:1", &people.issuer);
            }
            if n > 0 {
                // And the same keys, which the first one has made.
                let (keys, data) = (nodes[0].data().join("keys"), nodes[n].data());
                std::fs::create_dir_all(&data).unwrap();
                assert!(Command::new("cp").arg("-a").arg(keys).arg(data).status().unwrap().success());
            }
            nodes[n].up().await;
        }
        Self { all: nodes, cuts: Vec::new(), target, gate, people, database }
    }

    /// One identity, at each node.
    pub fn agent(&self, name: &str) -> [Agent; 3] {
        let agent = self.all[0].agent(name);
        [0, 1, 2].map(|n: usize| Agent { base: self.all[n].agent_url(), ..agent.clone() })
    }

    /// The record, exported and verified.
    pub fn record(&self, name: &str) -> Record {
        let to = self.all[0].file(name);
        let out = Command::new(env!("CARGO_BIN_EXE_countersign"))
            .args(["audit", "export", "--config"])
            .arg(self.all[0].file("countersign.toml"))
            .arg("--to")
            .arg(&to)
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let options = Options { keys: broker::checkpoint_keys(&self.all[0].data()), ..Options::default() };
        let report = verify(&to, &options).unwrap();
        assert!(matches!(&report, Report::Verified(v) if v.signatures_checked), "{report:?}");
        Record::read(&to)
    }

    /// Is everything over, as the database says?
    pub async fn record_is_quiet(&self) -> bool {
        let client = self.database.admin("postgres").await;
        let row = client.query_one("SELECT count(*) FROM countersign.grants WHERE is_open", &[]).await.unwrap();
        row.get::<_, i64>(0) == 0
    }
}

/// What of ours is at the target.
pub async fn roles(admin: &tokio_postgres::Client) -> BTreeSet<String> {
    let sql = "SELECT rolname::text FROM pg_roles WHERE starts_with(rolname, $1)";
    admin.query(sql, &[&PREFIX]).await.unwrap().iter().map(|r| r.get(0)).collect()
}

/// What the agents were told.
#[derive(Default)]
struct Told {
    granted: Mutex<BTreeSet<String>>,
    handed_over: Mutex<BTreeMap<String, String>>,
    completed: Mutex<BTreeSet<String>>,
    tasks: Mutex<BTreeSet<(usize, usize)>>,
    unclear: AtomicU64,
}

/// Works until it is told to stop: each step at whichever node answers.
async fn work(at: [Agent; 3], n: usize, told: Arc<Told>, stop: Arc<AtomicBool>) {
    let mut turn = n;
    let mut call = async |path: String, body: Value| {
        for _ in 0..200 {
            turn += 1;
            let asked = at[turn % 3].try_call("POST", &path, Some(body.clone()));
            match tokio::time::timeout(Duration::from_secs(8), asked).await {
                Ok(Ok(answer)) if matches!(answer.status, 200 | 202 | 409) => return Some(answer),
                _ => {
                    told.unclear.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
        None
    };
    let mut round = 0;
    while !stop.load(Ordering::Relaxed) {
        round += 1;
        told.tasks.lock().insert((n, round));
        let asked = call("/v1/grants".to_owned(), broker::request(&format!("W-{n}-{round}"), 900, want())).await;
        let Some(id) = asked.and_then(|a| a.json["id"].as_str().map(str::to_owned)) else { continue };
        told.granted.lock().insert(id.clone());
        if let Some(answer) = call(format!("/v1/grants/{id}/credentials"), json!({})).await
            && let Some(user) = answer.json["credentials"][0]["public"]["user"].as_str()
        {
            told.handed_over.lock().insert(id.clone(), user.to_owned());
        }
        if call(format!("/v1/grants/{id}/complete"), json!({})).await.is_some_and(|a| a.status == 200) {
            told.completed.lock().insert(id);
        }
    }
}

/// Agents at work, until they are told to stop.
pub struct Crowd {
    told: Arc<Told>,
    stop: Arc<AtomicBool>,
    agents: Vec<tokio::task::JoinHandle<()>>,
}

impl Crowd {
    /// So many, each of which goes to all nodes in turn.
    pub fn at(nodes: &Nodes, agents: usize) -> Self {
        let (told, stop) = (Arc::new(Told::default()), Arc::new(AtomicBool::new(false)));
        let one = |n| tokio::spawn(work(nodes.agent(&format!("w{n}")), n, Arc::clone(&told), Arc::clone(&stop)));
        Self { agents: (0..agents).map(one).collect(), told, stop }
    }

    /// Grants that were worked through to their end.
    pub fn done(&self) -> usize {
        self.told.completed.lock().len()
    }

    /// Calls that had no clear answer.
    pub fn unclear(&self) -> u64 {
        self.told.unclear.load(Ordering::Relaxed)
    }

    /// Waits until some more are through.
    pub async fn goes_on(&self, what: &str) {
        let before = self.done();
        until(what, RECOVERY, async || self.done() >= before + 5).await;
    }

    /// They stop, all that they were at is over, and nothing of it is left at the target.
    pub async fn ends(&mut self, nodes: &Nodes, admin: &tokio_postgres::Client) {
        self.stop.store(true, Ordering::Relaxed);
        for agent in self.agents.drain(..) {
            agent.await.unwrap();
        }
        // A request whose answer was lost may have made a grant that no agent knows: its task is over too.
        let tasks = self.told.tasks.lock().clone();
        for (n, round) in &tasks {
            let [at, ..] = nodes.agent(&format!("w{n}"));
            let over = async || {
                let answer = at.post(&format!("/v1/tasks/W-{n}-{round}/complete"), json!({})).await;
                if answer.status != 200 {
                    tokio::time::sleep(Duration::from_millis(200)).await; // within its rate
                }
                answer.status == 200
            };
            until("the task is over", RECOVERY, over).await;
        }
        let waited = until("nothing of ours is left", RECOVERY, async || roles(admin).await.is_empty()).await;
        eprintln!("nothing left {} s after the last call", waited.as_secs());
        until("everything is proven", RECOVERY, async || nodes.record_is_quiet().await).await;
    }

    /// All that they were told is in the record, and each has its end there.
    pub fn is_in(&self, record: &Record) {
        let grant = |id: &String| -> &Grant {
            record.grants.get(&id.parse().unwrap()).unwrap_or_else(|| panic!("{id} is lost"))
        };
        for id in self.told.granted.lock().iter() {
            assert!(matches!(grant(id).state, GrantState::Ended { .. }), "{id}: {:?}", grant(id).state);
        }
        for (id, user) in self.told.handed_over.lock().iter() {
            let lease = grant(id).leases.values().find(|l| l.intent.name == *user).expect("it is on record");
            assert!(matches!(lease.state, LeaseState::Revoked { .. }), "{id}: {:?}", lease.state);
        }
        // A mint whose answer came late, after another node had put it in doubt, was one that was never handed over.
        let mut handed_over: BTreeMap<GrantId, BTreeSet<LeaseId>> = BTreeMap::new();
        for event in &record.events {
            if let Event::Grant { id, what, .. } = event
                && let GrantEvent::LeaseLive { lease, released: true, .. } = &**what
            {
                handed_over.entry(*id).or_default().insert(*lease);
            }
        }
        for (id, leases) in &handed_over {
            assert_eq!(leases.len(), 1, "{id} was given two credentials: {:#?}", record.grants.get(id));
        }
        for (id, user) in self.told.handed_over.lock().iter() {
            let told = |l: &LeaseId| grant(id).leases[l].intent.name == *user;
            let on_record = handed_over.get(&grant(id).id).is_some_and(|leases| leases.iter().any(told));
            assert!(on_record, "{id}: {user} was handed over off the record");
        }
        eprintln!("{} grants, {} records", record.grants.len(), record.events.len());
    }
}
