//! `countersign serve` as a process of its own, with a configuration that a test writes, for tests that kill it, read its
//! journal offline, or put something between it and its targets.
#![allow(dead_code)] // each test binary uses a part

#[allow(clippy::duplicate_mod)] // tests that have both kinds of broker
#[path = "free_ports.rs"]
mod free_ports;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use countersign::audit::note::Verifier;
use countersign::audit::reader::read_from;
use countersign::audit::verify;
use countersign::client::tls;
use countersign::core::event::{BrokerEvent, Event};
use countersign::core::grant::Grant;
use countersign::core::id::{GrantId, LeaseId};
use countersign::core::lease::Lease;
use countersign::identity::dev_authority::DevAuthority;
use countersign::keys::{Keys, Origin};
use countersign::store::embedded::journal_dir;
use countersign::store::engine::read_record;
use countersign::time::{Clock as _, SystemClock};
use free_ports::free_ports;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// The agents' trust domain.
pub const DOMAIN: &str = "corp.test";
/// What doesn't come within this doesn't come.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// What all names of ours at targets begin with.
pub const PREFIX: &str = "cslease_";

/// What a test adds to the configuration.
#[derive(Default)]
pub struct Setup {
    /// Lines of `[broker]`.
    pub broker: String,
    /// Lines of `[spiffe]` in place of the bundle file.
    pub spiffe: Option<String>,
    /// `[[issuer]]` tables.
    pub issuers: String,
    /// The reviewers' issuer.
    pub login: Option<String>,
    /// Lines of `[limits]`.
    pub limits: String,
    /// `[[target]]` and `[[resource]]` tables.
    pub catalogue: String,
    /// `[[agent]]` tables that come first.
    pub agents: String,
}

/// One broker with its folder.
pub struct Serving {
    pub ports: Ports,
    pub authority: Arc<DevAuthority>,
    pub http: reqwest::Client,
    /// What the process finds in its environment, beside the level of its log.
    pub environment: Vec<(String, String)>,
    folder: tempfile::TempDir,
    child: Option<Child>,
}

/// Loopback ports.
#[derive(Clone, Copy, Debug)]
pub struct Ports {
    pub agent: u16,
    pub mtls: u16,
    pub reviewer: u16,
    pub metrics: u16,
}

impl Ports {
    fn free() -> Self {
        let [agent, mtls, reviewer, metrics] = free_ports();
        Self { agent, mtls, reviewer, metrics }
    }
}

impl Serving {
    /// Writes a configuration. `extra` sees the folder before it is checked (passwords, key files).
    pub fn prepare(setup: impl FnOnce(&Ports, &Path) -> Setup) -> Self {
        let ports = Ports::free();
        let folder = tempfile::Builder::new().prefix("cs-crash-").tempdir().unwrap();
        let authority = Arc::new(DevAuthority::new(DOMAIN, Arc::new(SystemClock)).unwrap());
        let setup = setup(&ports, folder.path());
        let put = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let policies = folder.path().join("policies");
        std::fs::create_dir(&policies).unwrap();
        for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("config/policies")).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "cedar") {
                std::fs::copy(&path, policies.join(path.file_name().unwrap())).unwrap();
            }
        }
        certificates(&put);
        put("bundle.json", &authority.bundle_document());
        put("login.secret", "reviewer-secret/+%");
        put("countersign.toml", &main(ports, &setup));
        put("catalogue.toml", &format!("{ENVIRONMENTS}{}", setup.catalogue));
        let http = tls::http(Some(&folder.path().join("ca.pem")), None).unwrap();
        Self { ports, authority, http, environment: Vec::new(), folder, child: None }
    }

    pub fn agent_url(&self) -> String {
        format!("https://localhost:{}", self.ports.agent)
    }
    pub fn mtls_url(&self) -> String {
        format!("https://localhost:{}", self.ports.mtls)
    }
    pub fn reviewer_url(&self) -> String {
        format!("https://localhost:{}", self.ports.reviewer)
    }
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
    pub fn data(&self) -> PathBuf {
        self.file("data")
    }
    pub fn journal_dir(&self) -> PathBuf {
        journal_dir(&self.data())
    }

    /// Starts the process, and doesn't wait.
    pub fn spawn(&mut self) {
        self.spawn_under(&[]);
    }

    /// The same, run by another program that becomes it.
    pub fn spawn_under(&mut self, runner: &[&str]) {
        assert!(self.child.is_none(), "it runs already");
        let log = |name: &str| File::options().create(true).append(true).open(self.folder.path().join(name)).unwrap();
        let line = [runner, &[env!("CARGO_BIN_EXE_countersign"), "serve", "--config"]].concat();
        let mut command = Command::new(line[0]);
        command.args(&line[1..]).arg(self.file("countersign.toml"));
        command.env_clear().env("COUNTERSIGN_LOG", "info,countersign=debug");
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(log("stdout.log")).stderr(log("stderr.log"));
        self.child = Some(command.spawn().unwrap());
    }

    /// Starts it and waits until it is ready.
    pub async fn up(&mut self) {
        self.spawn();
        self.ready().await;
    }

    /// Waits until it is ready.
    pub async fn ready(&mut self) {
        let url = format!("http://127.0.0.1:{}/readyz", self.ports.metrics);
        let deadline = Instant::now() + PATIENCE;
        while !self.http.get(&url).send().await.is_ok_and(|r| r.status() == 200) {
            let running = self.child.as_mut().is_some_and(|c| matches!(c.try_wait(), Ok(None)));
            assert!(running && Instant::now() < deadline, "not ready:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// How it ended, if it did.
    pub fn is_over(&mut self) -> Option<ExitStatus> {
        self.child.as_mut().and_then(|c| c.try_wait().unwrap())
    }

    /// Starts it where it must not start; gives what it said. Nothing may listen meanwhile.
    pub async fn refused(&mut self) -> String {
        let before = self.log().len();
        self.spawn();
        let status = self.ended().await;
        let said = self.log().split_off(before);
        assert!(!status.success(), "it started and ended well:\n{said}");
        assert!(!said.contains("ready"), "it was ready before it refused:\n{said}");
        said
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        let id = self.child.as_ref().expect("it runs").id();
        Pid::from_raw(i32::try_from(id).unwrap()).unwrap()
    }

    /// SIGKILL, and gone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM, and its end.
    pub async fn stop(&mut self) {
        kill_process(self.pid(), Signal::TERM).unwrap();
        let status = self.ended().await;
        assert!(status.success(), "{status}:\n{}", self.log());
    }

    async fn ended(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("it runs");
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                panic!("it didn't end:\n{}", self.log());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Everything that it logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.file("stderr.log")).unwrap_or_default()
    }

    /// What the journal says now, read from its files alone.
    pub fn record(&self) -> Record {
        Record::read(&self.journal_dir())
    }

    /// What `audit verify` says, with the keys of this broker.
    pub fn verified(&self) -> verify::Report {
        verify::verify(&self.journal_dir(), &self.verify_options()).unwrap()
    }

    /// The keys of this broker's checkpoints.
    pub fn verify_options(&self) -> verify::Options {
        verify::Options { keys: checkpoint_keys(&self.data()), ..verify::Options::default() }
    }

    /// An agent with a JWT-SVID.
    pub fn agent(&self, name: &str) -> Agent {
        let id = format!("spiffe://{DOMAIN}/agent/{name}");
        let token = self.authority.jwt_svid(&id, &[&self.agent_url()], 3000).unwrap();
        Agent { base: self.agent_url(), http: self.http.clone(), token: Some(token) }
    }

    /// Someone with any bearer token.
    pub fn bearer(&self, token: &str) -> Agent {
        Agent { base: self.agent_url(), http: self.http.clone(), token: Some(token.to_owned()) }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("--- the broker's last lines\n{}", lines[lines.len().saturating_sub(40)..].join("\n"));
        }
    }
}

/// The public keys of a data folder's checkpoints, under the journal's name.
pub fn checkpoint_keys(data: &Path) -> Vec<Verifier> {
    let keys = Keys::open(data, Origin::Serve, SystemClock.wall()).unwrap();
    keys.checkpoints.public_keys().into_iter().map(|public| Verifier::of("localhost/journal", public)).collect()
}

/// A journal, added up.
pub struct Record {
    pub grants: BTreeMap<GrantId, Grant>,
    pub broker: Vec<BrokerEvent>,
    pub events: Vec<Event>,
}

impl Record {
    pub fn read(journal: &Path) -> Self {
        let (mut grants, mut broker, mut events) = (BTreeMap::new(), Vec::new(), Vec::new());
        let mut records = read_from(journal, 1).unwrap();
        while let Some(record) = records.next_record().unwrap() {
            let read = read_record(record.meta.seq, record.payload).unwrap();
            match &read.event {
                Event::Grant { id, what, .. } => {
                    let mut slot = grants.remove(id);
                    Grant::apply(&mut slot, *id, what, read.at).unwrap();
                    grants.insert(*id, slot.unwrap());
                }
                Event::Broker { what } => broker.push(what.clone()),
                _ => {}
            }
            events.push(read.event);
        }
        Self { grants, broker, events }
    }

    pub fn leases(&self) -> impl Iterator<Item = &Lease> {
        self.grants.values().flat_map(|g| g.leases.values())
    }

    pub fn lease(&self, id: &str) -> &Lease {
        let id: LeaseId = id.parse().unwrap();
        self.leases().find(|l| l.intent.lease == id).unwrap()
    }

    pub fn grant(&self, id: &str) -> &Grant {
        &self.grants[&id.parse::<GrantId>().unwrap()]
    }
}

/// An agent: HTTP, and a proof.
#[derive(Clone)]
pub struct Agent {
    pub base: String,
    pub http: reqwest::Client,
    pub token: Option<String>,
}

/// An answer, read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub json: Value,
}

impl Answer {
    #[track_caller]
    pub fn ok(self) -> Value {
        assert!(matches!(self.status, 200 | 202), "{self:?}");
        self.json
    }
    /// The problem's last word.
    pub fn problem(&self) -> &str {
        self.json["type"].as_str().unwrap_or_default().rsplit(':').next().unwrap_or_default()
    }
}

impl Agent {
    /// A call; `Err` if no answer came.
    pub async fn try_call(&self, method: &str, path: &str, body: Option<Value>) -> Result<Answer, reqwest::Error> {
        let mut request = self.http.request(method.parse().unwrap(), format!("{}{path}", self.base));
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await?;
        let status = response.status().as_u16();
        Ok(Answer { status, json: response.json().await.unwrap_or(Value::Null) })
    }
    pub async fn get(&self, path: &str) -> Answer {
        self.try_call("GET", path, None).await.unwrap()
    }
    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.try_call("POST", path, Some(body)).await.unwrap()
    }

    /// Asks for one permission.
    pub async fn ask(&self, task: &str, life_secs: u64, want: Value) -> Answer {
        self.post("/v1/grants", request(task, life_secs, want)).await
    }
    /// The same; it is granted, or waits. Gives the grant's id.
    pub async fn asked(&self, task: &str, life_secs: u64, want: Value) -> String {
        self.ask(task, life_secs, want).await.ok()["id"].as_str().unwrap().to_owned()
    }
    pub async fn collect(&self, id: &str) -> Answer {
        self.post(&format!("/v1/grants/{id}/credentials"), json!({})).await
    }
    /// The first credential of a grant.
    pub async fn collected(&self, id: &str) -> Value {
        self.collect(id).await.ok()["credentials"][0].clone()
    }
    pub async fn show(&self, id: &str) -> Value {
        self.get(&format!("/v1/grants/{id}")).await.ok()
    }
    pub async fn complete(&self, id: &str) -> Value {
        self.post(&format!("/v1/grants/{id}/complete"), json!({})).await.ok()
    }
    /// Waits until it is in that state.
    pub async fn wait(&self, id: &str, state: &str, patience: Duration) -> Value {
        let mut seen = Value::Null;
        let begun = Instant::now();
        while begun.elapsed() < patience {
            seen = self.show(id).await;
            if seen["state"] == state {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{id} is not {state}: {seen:#}");
    }
}

/// A request for one permission.
pub fn request(task: &str, life_secs: u64, want: Value) -> Value {
    json!({ "task": task, "intent": "because the test says so", "life_secs": life_secs, "authorization_details": [want] })
}

/// Waits until a condition holds.
pub async fn until(what: &str, patience: Duration, mut condition: impl AsyncFnMut() -> bool) -> Duration {
    let begun = Instant::now();
    while !condition().await {
        assert!(begun.elapsed() < patience, "waited {} s in vain until {what}", patience.as_secs());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    begun.elapsed()
}

/// A CA, and the broker's certificate by it.
fn certificates(put: &dyn Fn(&str, &str)) {
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.distinguished_name.push(DnType::CommonName, "a company's CA");
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
    let mut own = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
    own.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    own.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate().unwrap();
    put("ca.pem", &ca.pem());
    put("broker.pem", &own.signed_by(&key, &ca).unwrap().pem());
    put("broker.key", &key.serialize_pem());
}

fn main(ports: Ports, setup: &Setup) -> String {
    let Ports { agent, mtls, reviewer, metrics } = ports;
    let agent_url = format!("https://localhost:{agent}");
    let bundle = format!("bundles = {{ \"{DOMAIN}\" = \"bundle.json\" }}");
    let login = setup.login.as_deref().unwrap_or("http://127.0.0.1:1");
    format!(
        r#"[broker]
issuer = "{agent_url}"
reviewer_url = "https://localhost:{reviewer}"
data_dir = "data"
catalogue = "catalogue.toml"
policies = "policies"
{broker}

[listen]
agent = "127.0.0.1:{agent}"
agent_mtls = "127.0.0.1:{mtls}"
reviewer = "127.0.0.1:{reviewer}"
metrics = "127.0.0.1:{metrics}"
tls_cert = "broker.pem"
tls_key = "file:broker.key"

[spiffe]
{spiffe}
trust_domains = ["{DOMAIN}"]
audience = "{agent_url}"

{issuers}

[reviewer_login]
issuer = "{login}"
client_id = "reviewers"
client_secret = "file:login.secret"
allow_private_network = true

[[person]]
id = "olga"
name = "Olga Owner"
identities = [{{ issuer = "{login}", subject = "olga" }}]

[[person]]
id = "rita"
name = "Rita Reviewer"
groups = ["reviewers", "db-owners", "security"]
identities = [{{ issuer = "{login}", subject = "rita" }}]

{agents}

[[agent]]
match = "spiffe://{DOMAIN}/agent/*"
owner = "olga"

[[tier]]
name = "observe"
approvals = 0
life_secs_max = 3600
friction = "none"

[[tier]]
name = "export"
approvals = 1
life_secs_max = 3600
friction = "one"

[[tier]]
name = "change"
approvals = 1
life_secs_max = 900
friction = "high"

[[tier]]
name = "critical"
approvals = 2
life_secs_max = 900
friction = "critical"

[limits]
{limits}
"#,
        broker = setup.broker,
        spiffe = setup.spiffe.as_ref().unwrap_or(&bundle),
        issuers = setup.issuers,
        agents = setup.agents,
        limits = setup.limits,
    )
}

const ENVIRONMENTS: &str = r#"
[[environment]]
name = "sandbox"
reaches_production = false

[[environment]]
name = "prod"
reaches_production = true

[[target]]
name = "tokens"
kind = "token"
settings = { life_secs_max = 900, skew_secs = 1 }

[[resource]]
name = "api/notes"
target = "tokens"
title = "notes"
environment = "sandbox"
isolated = true
sensitivity = "none"
settings = { audience = "https://notes.test", checks = "introspection", resource_server = "spiffe://corp.test/agent/notes-api" }
[[resource.action]]
name = "read"
effect = "read"
"#;

/// A token for the notes.
pub fn notes() -> Value {
    json!({ "type": "token", "identifier": "api/notes", "actions": ["read"] })
}
