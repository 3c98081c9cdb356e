//! The broker as an operator runs it: `serve --config`, its own trust domain, TLS, a data folder on a real disk.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use countersign::identity::dev_authority::{DevAuthority, JWT_SVID_SECS};
use countersign::time::SystemClock;
use serde_json::{Map, Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::Outcome;
use crate::figures::{Used, peak_rss_mib, round};
use crate::http::{Connection, client_config};
use crate::w1::Stop;
use crate::w2::Target;

/// The person who presses the kill switch, and the account.
#[allow(dead_code)] // each benchmark uses a part
pub const PERSON: &str = "chen";
/// Of the client at the IdP.
const CLIENT_SECRET: &str = "reviewer-secret/+%";
const TRUST_DOMAIN: &str = "bench.countersign.internal";
/// How long the broker may take to start or to stop; a start may have to make a view of a long record.
const PATIENCE: Duration = Duration::from_secs(300);
/// JWTs made for each agent and second of a measurement: more than it can use up.
const JWTS_PER_AGENT_AND_SEC: usize = 400;

/// A running broker.
pub struct World {
    binary: PathBuf,
    folder: PathBuf,
    child: Child,
    authority: Arc<DevAuthority>,
    tls: Arc<rustls::ClientConfig>,
    agent_port: u16,
    /// In the broker's name; several nodes have one.
    name_port: u16,
    metrics_port: u16,
    ready_after: Duration,
}

/// What was known before a measurement.
pub struct Before {
    used: Used,
    /// `None`: the record isn't in a folder.
    syncs: Option<f64>,
}

/// Puts something into a data folder.
pub type Fill<'a> = &'a dyn Fn(&Path) -> Outcome<()>;

/// What a broker is started with.
#[derive(Default)]
#[allow(dead_code)] // each benchmark uses a part
pub struct Setup<'a> {
    /// A PostgreSQL in its catalogue.
    pub target: Option<&'a Target>,
    /// Free ones otherwise.
    pub ports: Option<Ports>,
    /// Where people really log in.
    pub idp: Option<&'a str>,
    /// The URL of the database that holds the record; the record is in the data folder otherwise.
    pub store: Option<&'a str>,
    /// A node of the same broker, whose name and keys this one has.
    pub beside: Option<&'a World>,
    /// Fills the data folder before the first start.
    pub fill: Option<Fill<'a>>,
}

/// The state of these nodes before a measurement.
pub async fn before(nodes: &[Arc<World>]) -> Outcome<Before> {
    Ok(Before { syncs: syncs(nodes).await, used: Used::of(&pids(nodes))? })
}

/// What so many cycles at these nodes have cost since.
pub async fn since(nodes: &[Arc<World>], before: Before, cycles: usize) -> Outcome<Map<String, Value>> {
    let mut out = before.used.since(&pids(nodes), cycles)?;
    if let (Some(now), Some(before)) = (syncs(nodes).await, before.syncs) {
        let syncs = now - before;
        #[allow(clippy::cast_precision_loss)] // a count
        let per_cycle = round(syncs / cycles.max(1) as f64);
        out.insert("journal_syncs".to_owned(), json!(syncs));
        out.insert("journal_syncs_per_cycle".to_owned(), json!(per_cycle));
    }
    let rss = pids(nodes).iter().map(|pid| peak_rss_mib(*pid)).collect::<Outcome<Vec<f64>>>()?;
    out.insert("peak_rss_mib".to_owned(), json!(rss.into_iter().fold(0.0, f64::max)));
    Ok(out)
}

fn pids(nodes: &[Arc<World>]) -> Vec<u32> {
    nodes.iter().map(|node| node.child.id()).collect()
}

async fn syncs(nodes: &[Arc<World>]) -> Option<f64> {
    let mut sum = 0.0;
    for node in nodes {
        sum += node.syncs().await?;
    }
    Some(sum)
}

/// The binary under test: cargo has built it with this benchmark, unless `COUNTERSIGN_RELEASE_BIN` names another.
pub fn release_binary() -> PathBuf {
    std::env::var_os("COUNTERSIGN_RELEASE_BIN").map_or_else(|| env!("CARGO_BIN_EXE_countersign").into(), PathBuf::from)
}

fn free_port() -> Outcome<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// RFC 7468.
fn pem(label: &str, der: &[u8]) -> String {
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", BASE64_STANDARD.encode(der))
}

/// Ports of one broker.
#[derive(Debug, Clone, Copy)]
pub struct Ports {
    /// Agents'.
    pub agent: u16,
    /// Reviewers'.
    pub reviewer: u16,
    /// Of `/metrics`.
    pub metrics: u16,
}

#[allow(dead_code)] // each benchmark uses a part
impl World {
    /// Free ones.
    pub fn ports() -> Outcome<Ports> {
        Ok(Ports { agent: free_port()?, reviewer: free_port()?, metrics: free_port()? })
    }

    /// A broker with this target in its catalogue and nothing else.
    pub async fn start(binary: &Path, folder: &Path, target: Option<&Target>) -> Outcome<Arc<Self>> {
        Self::start_with(binary, folder, &Setup { target, ..Setup::default() }).await
    }

    /// Writes a configuration into a fresh folder and starts the broker on it.
    pub async fn start_with(binary: &Path, folder: &Path, setup: &Setup<'_>) -> Outcome<Arc<Self>> {
        if folder.exists() {
            std::fs::remove_dir_all(folder)?;
        }
        let policies = folder.join("policies");
        std::fs::create_dir_all(&policies)?;
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join("policies");
        for entry in std::fs::read_dir(shipped)? {
            let path = entry?.path();
            if let (Some(name), true) = (path.file_name(), path.extension().is_some_and(|e| e == "cedar")) {
                // The shipped rules, but for the brake on runaway agents: this is one.
                let text =
                    std::fs::read_to_string(&path)?.replace("recent_requests > 200", "recent_requests > 1000000000");
                std::fs::write(policies.join(name), text)?;
            }
        }
        let authority = identity(folder, setup.beside)?;
        let ports = setup.ports.map_or_else(Self::ports, Ok)?;
        let name_port = setup.beside.map_or(ports.agent, |first| first.name_port);
        let mut config = CONFIG
            .replace("@NAME@", &name_port.to_string())
            .replace("@AGENT@", &ports.agent.to_string())
            .replace("@REVIEWER@", &ports.reviewer.to_string())
            .replace("@METRICS@", &ports.metrics.to_string())
            .replace("@IDP@", setup.idp.unwrap_or("https://login.corp.example"));
        if let Some(url) = setup.store {
            config.push_str("[store]\nkind = \"postgres\"\nurl = \"file:store.url\"\n");
            std::fs::write(folder.join("store.url"), url)?;
        }
        std::fs::write(folder.join("countersign.toml"), config)?;
        let mut catalogue = CATALOGUE.to_owned();
        if let Some(target) = setup.target {
            catalogue.push_str(&target.catalogue());
            std::fs::write(folder.join("postgres.password"), target.password())?;
        }
        std::fs::write(folder.join("catalogue.toml"), catalogue)?;
        if let Some(fill) = setup.fill {
            fill(&folder.join("data"))?;
        }
        let tls = client_config(authority.x509_authorities())?;
        let (child, ready_after) = spawn(binary, folder, ports.metrics).await?;
        let (binary, folder, agent_port, metrics_port) =
            (binary.to_owned(), folder.to_owned(), ports.agent, ports.metrics);
        Ok(Arc::new(Self { binary, folder, child, authority, tls, agent_port, name_port, metrics_port, ready_after }))
    }

    /// How long the start took, and how much memory it has.
    pub fn started(&self) -> Value {
        let ms = round(self.ready_after.as_secs_f64() * 1000.0);
        json!({ "start_to_ready_ms": ms, "rss_mib": peak_rss_mib(self.child.id()).ok() })
    }

    /// A connection of an agent's own.
    pub async fn connect(&self) -> Outcome<Connection> {
        Connection::open(self.agent_port, &self.tls).await
    }

    /// JWT-SVIDs: a stack for each agent, enough for one measurement; every one is distinct.
    pub fn jwts(&self, agents: usize, stop: Stop) -> Outcome<Vec<Vec<String>>> {
        let each = match stop {
            Stop::Cycles(n) => n,
            Stop::After(length) => usize::try_from(length.as_secs())? * JWTS_PER_AGENT_AND_SEC,
        };
        let audience = format!("https://localhost:{}", self.name_port);
        let stack = |agent: usize| {
            let id = format!("spiffe://{TRUST_DOMAIN}/agent/{agent}");
            let one = |_| self.authority.jwt_svid(&id, &[&audience], JWT_SVID_SECS);
            (0..each).map(one).collect::<Result<Vec<_>, _>>().map_err(|e| e.detail().to_owned().into())
        };
        (0..agents).map(stack).collect()
    }

    async fn syncs(&self) -> Option<f64> {
        self.metric("countersign_store{figure=\"journal_syncs\"}").await.ok()
    }

    /// A line of `/metrics`.
    pub async fn metric(&self, name: &str) -> Outcome<f64> {
        let page = get(self.metrics_port, "/metrics").await?;
        let value = page.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        Ok(value.ok_or_else(|| format!("no {name} in /metrics"))?)
    }

    /// A browser's way to the reviewers' pages.
    pub fn reqwest(&self) -> Outcome<reqwest::Client> {
        let mut roots = Vec::new();
        for authority in self.authority.x509_authorities() {
            roots.push(reqwest::Certificate::from_der(&authority)?);
        }
        let plain = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).no_proxy();
        Ok(plain.tls_certs_only(roots).build()?)
    }

    /// Kills the broker as the kernel does, and starts it on the same folder.
    pub async fn kill_and_restart(self: Arc<Self>) -> Outcome<Arc<Self>> {
        let mut world = Arc::into_inner(self).ok_or("somebody still uses this broker")?;
        world.child.kill()?;
        world.child.wait()?;
        (world.child, world.ready_after) = spawn(&world.binary, &world.folder, world.metrics_port).await?;
        Ok(Arc::new(world))
    }

    /// Stops the broker and starts it on the same folder.
    pub async fn restart(self: Arc<Self>) -> Outcome<Arc<Self>> {
        let mut world = Arc::into_inner(self).ok_or("somebody still uses this broker")?;
        stop(&mut world.child).await?;
        (world.child, world.ready_after) = spawn(&world.binary, &world.folder, world.metrics_port).await?;
        Ok(Arc::new(world))
    }

    /// Stops it in good order.
    pub async fn stop(self: Arc<Self>) -> Outcome<()> {
        let mut world = Arc::into_inner(self).ok_or("somebody still uses this broker")?;
        stop(&mut world.child).await
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it is gone already, unless the benchmark failed
        let _ = self.child.wait();
    }
}

/// Who the broker is, as files in its folder: a new one, or the one of the node beside it.
fn identity(folder: &Path, beside: Option<&World>) -> Outcome<Arc<DevAuthority>> {
    if let Some(first) = beside {
        for file in ["bundle.json", "broker.pem", "broker.key", "login.secret"] {
            std::fs::copy(first.folder.join(file), folder.join(file))?;
        }
        // With their modes, which the broker looks at.
        let (keys, data) = (first.folder.join("data").join("keys"), folder.join("data"));
        std::fs::create_dir_all(&data)?;
        if !Command::new("cp").arg("-a").arg(keys).arg(data).status()?.success() {
            return Err("the keys could not be copied".into());
        }
        return Ok(Arc::clone(&first.authority));
    }
    let authority = DevAuthority::new(TRUST_DOMAIN, Arc::new(SystemClock)).map_err(|e| e.detail().to_owned())?;
    let own = authority
        .x509_svid(&format!("spiffe://{TRUST_DOMAIN}/broker"), &["localhost"], 24 * 3600)
        .map_err(|e| e.detail().to_owned())?;
    std::fs::write(folder.join("bundle.json"), authority.bundle_document())?;
    std::fs::write(folder.join("broker.pem"), pem("CERTIFICATE", own.chain[0].as_ref()))?;
    std::fs::write(folder.join("broker.key"), pem("PRIVATE KEY", own.key.secret_der()))?;
    std::fs::write(folder.join("login.secret"), CLIENT_SECRET)?;
    Ok(Arc::new(authority))
}

async fn spawn(binary: &Path, folder: &Path, metrics_port: u16) -> Outcome<(Child, Duration)> {
    let log = std::fs::File::options().create(true).append(true).open(folder.join("broker.log"))?;
    let began = Instant::now();
    let mut child = Command::new(binary)
        .arg("serve")
        .arg("--config")
        .arg(folder.join("countersign.toml"))
        .env("COUNTERSIGN_LOG", "warn")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    while !get(metrics_port, "/readyz").await.is_ok_and(|text| text.starts_with("HTTP/1.1 200")) {
        if child.try_wait()?.is_some() || began.elapsed() > PATIENCE {
            let _ = child.kill();
            let log = std::fs::read_to_string(folder.join("broker.log"))?;
            return Err(format!("the broker did not start:\n{log}").into());
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok((child, began.elapsed()))
}

async fn stop(child: &mut Child) -> Outcome<()> {
    let pid = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw).ok_or("a pid")?;
    rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            return Err("the broker did not stop".into());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// A plain GET on loopback, with the head of the answer.
async fn get(port: u16, path: &str) -> Outcome<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let ask = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(ask.as_bytes()).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}

const CONFIG: &str = r#"
[broker]
issuer = "https://localhost:@NAME@"
reviewer_url = "https://localhost:@REVIEWER@"
data_dir = "data"
catalogue = "catalogue.toml"
policies = "policies"

[listen]
agent = "127.0.0.1:@AGENT@"
reviewer = "127.0.0.1:@REVIEWER@"
metrics = "127.0.0.1:@METRICS@"
tls_cert = "broker.pem"
tls_key = "file:broker.key"

[spiffe]
bundles = { "bench.countersign.internal" = "bundle.json" }
trust_domains = ["bench.countersign.internal"]
audience = "https://localhost:@NAME@"

[reviewer_login]
issuer = "@IDP@"
client_id = "reviewers"
client_secret = "file:login.secret"
allow_private_network = true

[[person]]
id = "chen"
name = "Chen"
groups = ["security", "operators"]
identities = [{ issuer = "@IDP@", subject = "chen" }]

[[person]]
id = "owner"
name = "Agent Owner"
groups = ["developers"]

[[agent]]
match = "spiffe://bench.countersign.internal/agent/*"
owner = "owner"
team = "bench"

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
requests_per_agent_per_sec = 100000
requests_per_agent_burst = 100000
open_grants_per_agent_max = 100000
"#;

const CATALOGUE: &str = r#"
[[environment]]
name = "sandbox"
reaches_production = false

[[target]]
name = "tokens"
kind = "token"
settings = { life_secs_max = 900, skew_secs = 5 }

[[resource]]
name = "api/bench"
target = "tokens"
title = "an API"
environment = "sandbox"
isolated = true
sensitivity = "none"
settings = { audience = "https://api.bench.example", checks = "introspection", resource_server = "spiffe://bench.countersign.internal/api/bench" }

[[resource.action]]
name = "read"
effect = "read"
says = "read"
"#;
