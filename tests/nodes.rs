//! "Several brokers on one PostgreSQL": three processes, each of which may die, stop for longer than anybody waits, or lose
//! its connections, while agents work. An admin's connection counts what is at the target; the record is verified offline.

#[path = "support/crash_broker.rs"]
mod broker;
#[path = "support/gate.rs"]
mod gate;
#[path = "support/broker.rs"]
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use broker::{Agent, PREFIX, Record, Serving, Setup, notes, until};
use countersign::audit::verify::{Options, Report, verify};
use countersign::core::grant::{Grant, GrantState};
use countersign::core::lease::LeaseState;
use gate::Gate;
use parking_lot::Mutex;
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use world::browser::Browser;
use world::oidc_provider::OidcProvider;
use world::postgres::{self, Cluster};

const PASSWORD: &str = "broker-secret";
/// What a node sends to make a role, and nothing else.
const MINT: &str = "CREATE ROLE %I LOGIN";
/// Longer than a run may be silent.
const STOPPED: Duration = Duration::from_secs(13);
/// Until nothing is left: the longest mint of this connector, the time until a node counts as dead, and the endings.
const RECOVERY: Duration = Duration::from_secs(120);

fn rounds() -> usize {
    std::env::var("COUNTERSIGN_ROUNDS").ok().map_or(4, |n| n.parse().expect("COUNTERSIGN_ROUNDS is a number"))
}

fn target() -> Cluster {
    let mut settings = postgres::THROW_AWAY.to_vec();
    settings.extend([("max_prepared_transactions", "0"), ("max_connections", "200")]);
    let cluster = Cluster::start(&settings);
    let run = |variables: &[(&str, &str)], sql: &str| {
        let out = cluster.psql("postgres", variables, sql);
        assert!(out.status.success(), "{sql:.80}: {}", String::from_utf8_lossy(&out.stderr));
    };
    let names = [("broker", "countersign"), ("group", "lease_conn"), ("leases", "on")];
    run(&names, include_str!("../config/postgres/10-broker-direct.sql"));
    run(&names, include_str!("../config/postgres/00-hardening.sql"));
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
fn database() -> Cluster {
    let cluster = Cluster::start(STORE);
    let out = cluster.psql(
        "postgres",
        &[],
        "CREATE ROLE node LOGIN PASSWORD 'node'; GRANT CREATE ON DATABASE postgres TO node;",
    );
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    cluster
}

/// This one's data is missed: it is restarted at once in the middle of everything.
const STORE: &[(&str, &str)] = &[("max_connections", "100"), ("shared_buffers", "32MB")];

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

fn want() -> Value {
    json!({ "type": "postgres", "identifier": "postgres/notes", "actions": ["read"] })
}

/// A proxy in front of the store's database whose connections can all be cut.
struct Cut {
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
    fn now(&self) {
        self.now.send_modify(|n| *n += 1);
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Three nodes with one record, one name, one set of keys.
struct Nodes {
    all: Vec<Serving>,
    cuts: Vec<Cut>,
    target: Cluster,
    /// In front of the target.
    gate: Gate,
    /// Where people log in, if that is installed.
    people: Option<OidcProvider>,
    database: Arc<Cluster>,
}

/// Changes a node's configuration.
fn change(node: &Serving, from: &str, to: &str) {
    let config = std::fs::read_to_string(node.file("countersign.toml")).unwrap();
    assert!(config.contains(from), "{from}");
    std::fs::write(node.file("countersign.toml"), config.replace(from, to)).unwrap();
}

impl Nodes {
    async fn up() -> Self {
        let (target, database) = (target(), Arc::new(database()));
        let gate = Gate::start(target.port, &[MINT]).await;
        let (mut nodes, mut cuts): (Vec<Serving>, Vec<Cut>) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            let cut = Cut::start(database.port).await;
            let mut node = Serving::prepare(|_, folder| {
                std::fs::write(folder.join("pg.password"), PASSWORD).unwrap();
                let url = format!("postgres://node:node@127.0.0.1:{}/postgres\n", cut.port);
                std::fs::write(folder.join("store.url"), url).unwrap();
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
            cuts.push(cut);
        }
        let back: Vec<String> = nodes.iter().map(|n| format!("{}/login/callback", n.reviewer_url())).collect();
        let people = OidcProvider::start(&back.iter().map(String::as_str).collect::<Vec<_>>()).await;
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
        Self { all: nodes, cuts, target, gate, people, database }
    }

    /// One identity, at each node.
    fn agent(&self, name: &str) -> [Agent; 3] {
        let agent = self.all[0].agent(name);
        [0, 1, 2].map(|n: usize| Agent { base: self.all[n].agent_url(), ..agent.clone() })
    }

    /// The record, exported and verified.
    fn record(&self, name: &str) -> Record {
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
}

async fn roles(admin: &tokio_postgres::Client) -> BTreeSet<String> {
    let sql = "SELECT rolname::text FROM pg_roles WHERE starts_with(rolname, $1)";
    admin.query(sql, &[&PREFIX]).await.unwrap().iter().map(|r| r.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_step_at_another_node() {
    if !postgres::available("each_step_at_another_node") {
        return;
    }
    let nodes = Nodes::up().await;
    let admin = nodes.target.admin("postgres").await;
    let [a, b, c] = nodes.agent("a0");
    for round in 0..5 {
        let id = a.asked(&format!("T-{round}"), 600, want()).await;
        assert_eq!(b.show(&id).await["state"], "active", "what one has answered, the next one knows");
        let credential = b.collected(&id).await;
        let (user, password) = (&credential["public"]["user"], &credential["secret"]["password"]);
        let (user, password) = (user.as_str().unwrap(), password.as_str().unwrap());
        nodes.target.login(user, password, "postgres").await.expect("it works at the target");
        assert_eq!(a.collect(&id).await.status, 409, "handed over once, wherever it is asked for");
        c.complete(&id).await;
        assert_ne!(a.show(&id).await["state"], "active");
        assert_eq!(b.collect(&id).await.status, 409);
        until("the login is refused", Duration::from_secs(20), async || {
            nodes.target.login(user, password, "postgres").await.is_err()
        })
        .await;
    }
    // Asked for at one, approved at another, collected at the third.
    if let Some(people) = &nodes.people {
        let customers = json!({ "type": "token", "identifier": "api/customers", "actions": ["read"] });
        let id = a.asked("V-1", 600, customers).await;
        assert_eq!(c.show(&id).await["state"], "pending");
        let at = &nodes.all[1];
        let rita = Browser::log_in(&at.http, &at.reviewer_url(), people, "rita").await;
        rita.approved(&id).await;
        assert_eq!(c.collect(&id).await.status, 200, "approved at another node, and known at once");
        a.complete(&id).await;
    }
    // A token that is ended at one node is no longer good at any.
    let resource = nodes.agent("notes-api");
    for round in 0..3 {
        let id = a.asked(&format!("N-{round}"), 600, notes()).await;
        let token = a.collected(&id).await["secret"]["token"].as_str().unwrap().to_owned();
        let good = async |at: &Agent| {
            let url = format!("{}/introspect", at.base);
            let request = at.http.post(url).bearer_auth(at.token.as_ref().unwrap()).form(&[("token", &token)]);
            request.send().await.unwrap().json::<Value>().await.unwrap()["active"].clone()
        };
        assert_eq!(good(&resource[1]).await, true);
        c.complete(&id).await;
        for at in &resource {
            assert_eq!(good(at).await, false);
        }
    }
    until("nothing of ours is left", RECOVERY, async || roles(&admin).await.is_empty()).await;
    let record = nodes.record("record");
    assert!(record.grants.values().all(|g| g.leases.len() == 1), "one credential each");
}

/// A credential exists, and only its intent is on record: its node dies, or stops for so long that it is taken for dead.
/// Another node looks for it and ends it, and nothing that the first one does when it wakes changes that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_node_was_minting_is_ended_by_another() {
    if !postgres::available("what_a_node_was_minting_is_ended_by_another") {
        return;
    }
    let mut nodes = Nodes::up().await;
    let admin = nodes.target.admin("postgres").await;
    for (victim, dies) in [(0, true), (1, false)] {
        nodes.gate.close();
        let [at, other] = [victim, 2].map(|n| nodes.agent("m0")[n].clone());
        let id = other.asked(&format!("M-{victim}"), 900, want()).await;
        let minting = tokio::spawn({
            let (at, id) = (at.clone(), id.clone());
            async move {
                at.try_call("POST", &format!("/v1/grants/{id}/credentials"), Some(json!({}))).await.map(|a| a.status)
            }
        });
        until("the role exists", RECOVERY, async || roles(&admin).await.len() == 1).await;
        if dies {
            nodes.all[victim].kill();
        } else {
            kill_process(nodes.all[victim].pid(), Signal::STOP).unwrap();
        }
        let lease = async || {
            tokio::time::sleep(Duration::from_millis(100)).await; // within its rate
            other.show(&id).await["leases"][0]["state"].clone()
        };
        until("another node puts it in doubt", RECOVERY, async || lease().await == "unknown").await;
        assert_eq!(roles(&admin).await.len(), 1, "not looked for while the mint may be under way");
        until("another node ends it", RECOVERY, async || roles(&admin).await.is_empty()).await;
        // What the first one says of it before that is on record counts as an answer that came late.
        until("and has it on record", RECOVERY, async || lease().await == "absent").await;
        nodes.gate.open();
        if !dies {
            kill_process(nodes.all[victim].pid(), Signal::CONT).unwrap();
        }
        assert!(!matches!(minting.await.unwrap(), Ok(200)), "nothing was handed over");
        if dies {
            nodes.all[victim].up().await;
        }
        // The grant goes on, at any node.
        let collected = async || {
            tokio::time::sleep(Duration::from_millis(100)).await; // within its rate
            at.collect(&id).await.status == 200
        };
        until("it can be collected", RECOVERY, collected).await;
        assert_eq!(roles(&admin).await.len(), 1);
        other.complete(&id).await;
        until("nothing of ours is left", RECOVERY, async || roles(&admin).await.is_empty()).await;
    }
    let record = nodes.record("record");
    let handed_over = |g: &Grant| g.leases.values().filter(|l| matches!(l.state, LeaseState::Revoked { .. })).count();
    let is_whole = |g: &Grant| handed_over(g) == 1 && g.leases.len() >= 2;
    assert!(record.grants.values().all(is_whole), "{:#?}", record.grants);
}

/// Guarantee 8: what is due is ended at its target, though nothing can be recorded, and is on record once it can.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_due_ends_while_the_database_is_away() {
    if !postgres::available("what_is_due_ends_while_the_database_is_away") {
        return;
    }
    let nodes = Nodes::up().await;
    let admin = nodes.target.admin("postgres").await;
    let [a, b, c] = nodes.agent("d0");
    let due = a.asked("D-due", 45, want()).await;
    let completed = a.asked("D-completed", 900, want()).await;
    for (at, id) in [(&b, &due), (&c, &completed)] {
        // A target that is slow is no news.
        until("it is handed over", RECOVERY, async || at.collect(id).await.status == 200).await;
    }
    assert_eq!(roles(&admin).await.len(), 2);
    nodes.database.stop();
    // At the one that surely knows of it; another may not have read of it yet, and says 503 too.
    let answer = c.post(&format!("/v1/grants/{completed}/complete"), json!({})).await;
    assert_eq!((answer.status, answer.problem()), (503, "ending-unrecorded"), "{answer:?}");
    assert_ne!(c.collect(&completed).await.status, 200);
    until("both are ended at the target", RECOVERY, async || roles(&admin).await.is_empty()).await;
    assert_ne!(a.ask("D-new", 60, want()).await.status, 200, "nothing is given meanwhile");
    nodes.database.run(STORE);
    until("both are on record", RECOVERY, async || nodes.record_is_quiet().await).await;
    let record = nodes.record("record");
    assert!(record.leases().all(|l| matches!(l.state, LeaseState::Revoked { .. })));
    let asked = async || {
        tokio::time::sleep(Duration::from_millis(100)).await; // within its rate
        a.ask("D-after", 60, want()).await.status == 200
    };
    until("it works again", RECOVERY, asked).await;
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_die_stop_and_are_cut_off() {
    if !postgres::available("nodes_die_stop_and_are_cut_off") {
        return;
    }
    let mut nodes = Nodes::up().await;
    let admin = nodes.target.admin("postgres").await;
    let (told, stop) = (Arc::new(Told::default()), Arc::new(AtomicBool::new(false)));
    let agents: Vec<_> = (0..4)
        .map(|n| tokio::spawn(work(nodes.agent(&format!("w{n}")), n, Arc::clone(&told), Arc::clone(&stop))))
        .collect();
    let done = |told: &Told| told.completed.lock().len();
    for round in 0..rounds() {
        let before = done(&told);
        until("work goes on", RECOVERY, async || done(&told) >= before + 5).await;
        let victim = round % 3;
        match round % 4 {
            0 => {
                nodes.all[victim].kill();
                let before = done(&told);
                until("the others go on", RECOVERY, async || done(&told) >= before + 5).await;
                nodes.all[victim].up().await;
            }
            1 => {
                let pid = nodes.all[victim].pid();
                kill_process(pid, Signal::STOP).unwrap();
                tokio::time::sleep(STOPPED).await; // what is tested is the time itself
                kill_process(pid, Signal::CONT).unwrap();
            }
            2 => {
                for _ in 0..10 {
                    nodes.cuts[victim].now();
                    tokio::time::sleep(Duration::from_millis(37)).await; // in whatever is under way
                }
            }
            _ => {
                nodes.database.stop();
                nodes.database.run(STORE);
            }
        }
        eprintln!("round {round}: {} completed, {} calls unclear", done(&told), told.unclear.load(Ordering::Relaxed));
    }
    let before = done(&told);
    until("work goes on after all", RECOVERY, async || done(&told) >= before + 5).await;
    stop.store(true, Ordering::Relaxed);
    for agent in agents {
        agent.await.unwrap();
    }
    // A request whose answer was lost may have made a grant that no agent knows: its task is over too.
    let tasks = told.tasks.lock().clone();
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
    let waited = until("nothing of ours is left", RECOVERY, async || roles(&admin).await.is_empty()).await;
    eprintln!("nothing left {} s after the last call", waited.as_secs());

    until("everything is proven", RECOVERY, async || nodes.record_is_quiet().await).await;
    for node in &mut nodes.all {
        node.stop().await;
    }
    let record = nodes.record("record");
    let grant =
        |id: &String| -> &Grant { record.grants.get(&id.parse().unwrap()).unwrap_or_else(|| panic!("{id} is lost")) };
    for id in told.granted.lock().iter() {
        assert!(matches!(grant(id).state, GrantState::Ended { .. }), "{id}: {:?}", grant(id).state);
    }
    for (id, user) in told.handed_over.lock().iter() {
        let lease = grant(id).leases.values().find(|l| l.intent.name == *user).expect("it is on record");
        assert!(matches!(lease.state, LeaseState::Revoked { .. }), "{id}: {:?}", lease.state);
    }
    let live = |g: &&Grant| g.leases.values().filter(|l| matches!(l.state, LeaseState::Revoked { .. })).count() > 1;
    assert_eq!(record.grants.values().filter(live).count(), 0, "no grant was given two credentials");
    eprintln!("{} grants, {} records", record.grants.len(), record.events.len());
}

impl Nodes {
    /// Is everything over, as the database says?
    async fn record_is_quiet(&self) -> bool {
        let client = self.database.admin("postgres").await;
        let row = client.query_one("SELECT count(*) FROM countersign.grants WHERE is_open", &[]).await.unwrap();
        row.get::<_, i64>(0) == 0
    }
}
