//! A whole world around the real binary: `countersign serve` with a configuration of its own on the real disk, TLS by a
//! CA of its own, identities of its own trust domain, a real OIDC provider, a real PostgreSQL. One world for one test.

#![allow(dead_code)] // each story uses a part

#[path = "broker/agent.rs"]
pub mod agent;
#[path = "broker/browser.rs"]
pub mod browser;
#[path = "broker/config.rs"]
pub mod config;
#[path = "oidc_provider.rs"]
pub mod oidc_provider;
#[path = "postgres.rs"]
pub mod postgres;
#[path = "broker/process.rs"]
pub mod process;
#[path = "broker/target.rs"]
pub mod target;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use countersign::client::tls;
use countersign::core::id::Timestamp;
use countersign::identity::dev_authority::DevAuthority;
use countersign::time::{Clock, SystemClock};
use serde_json::Value;

use agent::Agent;
use browser::Browser;
use config::Ports;
use oidc_provider::OidcProvider;
use postgres::Cluster;
use process::Broker;

/// The trust domain of the agents.
pub const DOMAIN: &str = "corp.test";
/// A condition that doesn't come within this doesn't come.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What a story needs beside the broker.
#[derive(Default)]
pub struct Plan {
    /// A PostgreSQL of its own.
    pub postgres: bool,
    /// People who can log in.
    pub people: bool,
    /// Lines of `[broker]`.
    pub broker: &'static str,
    /// Lines of `[limits]`.
    pub limits: &'static str,
}

/// Broker, identities, people, target.
pub struct World {
    pub broker: Broker,
    pub authority: Arc<DevAuthority>,
    /// By what the authority issues.
    pub clock: Arc<Shifted>,
    pub ports: Ports,
    pub http: reqwest::Client,
    pub pg: Option<Arc<Cluster>>,
    idp: Option<OidcProvider>,
    folder: tempfile::TempDir,
}

/// The real clock, moved back by so many seconds.
#[derive(Default)]
pub struct Shifted(pub std::sync::atomic::AtomicU64);

impl Clock for Shifted {
    fn wall(&self) -> Timestamp {
        Timestamp(SystemClock.wall().0 - self.0.load(std::sync::atomic::Ordering::SeqCst) * 1000)
    }
    fn boot_ms(&self) -> u64 {
        SystemClock.boot_ms()
    }
    fn boot_id(&self) -> String {
        SystemClock.boot_id()
    }
    fn sleep(&self, duration: Duration) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(tokio::time::sleep(duration))
    }
}

/// An answer, read to its end.
pub struct Answer {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub body: Vec<u8>,
}

impl Plan {
    /// The broker with what is asked for; `None` where a peer isn't installed.
    pub async fn start(self, test: &str) -> Option<World> {
        if self.postgres && !postgres::available(test) {
            return None;
        }
        let ports = Ports::free();
        let callback = format!("{}/login/callback", ports.reviewer_url());
        let pg = self.postgres.then(|| tokio::task::spawn_blocking(target::start));
        let idp = if self.people { Some(OidcProvider::start(&[&callback]).await?) } else { None };
        let pg = match pg {
            Some(starting) => Some(Arc::new(starting.await.unwrap())),
            None => None,
        };
        let folder = tempfile::Builder::new().prefix("cs-story-").tempdir().unwrap();
        let clock = Arc::new(Shifted::default());
        let authority = Arc::new(DevAuthority::new(DOMAIN, clock.clone()).unwrap());
        let issuer = idp.as_ref().map_or("http://127.0.0.1:1", |i| &i.issuer);
        config::write(folder.path(), &ports, &authority, issuer, pg.as_ref().map(|c| c.port), &self);
        let http = tls::http(Some(&folder.path().join("ca.pem")), None).unwrap();
        let broker = Broker::new(folder.path(), &ports);
        let mut world = World { broker, authority, clock, ports, http, pg, idp, folder };
        world.up().await;
        Some(world)
    }
}

impl World {
    /// Starts the broker (again) on the same folder and waits until it is ready.
    pub async fn up(&mut self) {
        self.broker.spawn();
        let url = format!("http://127.0.0.1:{}/readyz", self.ports.metrics);
        let deadline = Instant::now() + PATIENCE;
        loop {
            if self.http.get(&url).send().await.is_ok_and(|r| r.status() == 200) {
                return;
            }
            assert!(self.broker.is_running() && Instant::now() < deadline, "not ready:\n{}", self.broker.stderr());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// SIGKILL, and up again.
    pub async fn kill_and_restart(&mut self) {
        self.broker.kill();
        self.up().await;
    }

    /// SIGTERM, and up again.
    pub async fn restart(&mut self) {
        let status = self.broker.stop().await;
        assert!(status.success(), "{status}:\n{}", self.broker.stderr());
        self.up().await;
    }

    /// A file of the configuration.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Changes the configuration; it counts after a restart.
    pub fn change(&self, name: &str, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.file(name)).unwrap();
        assert!(text.contains(from), "{name} has no {from:?}");
        std::fs::write(self.file(name), text.replace(from, to)).unwrap();
    }

    /// An agent of `spiffe://corp.test/agent/…` that brings JWT-SVIDs.
    pub fn agent(&self, name: &str) -> Agent {
        Agent::by_jwt(self, name)
    }

    /// The same agent by mutual TLS.
    pub fn agent_mtls(&self, name: &str) -> Agent {
        Agent::by_certificate(self, name)
    }

    /// A person, logged in at the provider in a browser. The account's subject is its name.
    pub async fn browser(&self, account: &str) -> Browser {
        let idp = self.idp.as_ref().expect("the plan has people");
        Browser::log_in(&self.http, &self.ports.reviewer_url(), idp, account).await
    }

    /// The same for an account that may be nobody's.
    pub async fn try_browser(&self, account: &str) -> Result<Browser, Answer> {
        let idp = self.idp.as_ref().expect("the plan has people");
        Browser::try_log_in(&self.http, &self.ports.reviewer_url(), idp, account).await
    }

    /// Where people log in, which also issues tokens of agents.
    pub fn idp(&self) -> &OidcProvider {
        self.idp.as_ref().expect("the plan has people")
    }

    /// A client on another address of this machine, with connections of its own.
    pub fn client_at(&self, address: &str) -> reqwest::Client {
        let pem = std::fs::read(self.file("ca.pem")).unwrap();
        reqwest::Client::builder()
            .local_address(address.parse::<std::net::IpAddr>().unwrap())
            .tls_certs_only([reqwest::Certificate::from_pem(&pem).unwrap()])
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()
            .unwrap()
    }

    /// PostgreSQL.
    pub fn cluster(&self) -> &Cluster {
        self.pg.as_ref().expect("the plan has PostgreSQL")
    }

    /// The text of `/metrics`.
    pub async fn metrics(&self) -> String {
        let url = format!("http://127.0.0.1:{}/metrics", self.ports.metrics);
        self.http.get(url).send().await.unwrap().text().await.unwrap()
    }

    /// Is this token good now? As the API that it is for asks.
    pub async fn introspect(&self, api: &str, token: &str) -> Value {
        let asker = self.agent(api);
        Answer::of(asker.posting("/introspect").form(&[("token", token)])).await.ok()
    }

    /// One figure of `/metrics`.
    pub async fn metric(&self, name: &str) -> f64 {
        let text = self.metrics().await;
        let line = text.lines().find(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')));
        line.and_then(|l| l.rsplit(' ').next()?.parse().ok()).unwrap_or_else(|| panic!("no {name} in:\n{text}"))
    }

    /// Everything that is on disk of the broker: its data, and what it printed.
    pub fn on_disk(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut out = Vec::new();
        let mut folders = vec![self.file("data")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    out.push((path.clone(), std::fs::read(&path).unwrap()));
                }
            }
        }
        for file in ["stdout.log", "stderr.log"] {
            out.push((self.file(file), std::fs::read(self.file(file)).unwrap()));
        }
        out
    }
}

impl Answer {
    pub async fn of(request: reqwest::RequestBuilder) -> Self {
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Self { status, headers, body: response.bytes().await.unwrap().to_vec() }
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e} in {}: {}", self.status, self.text()))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map(|v| v.to_str().unwrap()).unwrap_or_default()
    }

    /// It went well.
    #[track_caller]
    pub fn ok(&self) -> Value {
        assert!(matches!(self.status, 200 | 202), "{}: {}", self.status, self.text());
        self.json()
    }

    /// A problem of that word and status, in full form: what, why, and by its type. Gives the detail.
    #[track_caller]
    pub fn problem(&self, status: u16, word: &str) -> String {
        let all = format!("{}: {}", self.status, self.text());
        assert_eq!(self.status, status, "{all}");
        assert_eq!(self.header("content-type"), "application/problem+json", "{all}");
        assert_eq!(self.header("cache-control"), "no-store", "{all}");
        let json = self.json();
        assert_eq!(json["type"], format!("urn:countersign:problem:{word}"), "{all}");
        assert_eq!(json["status"], status, "{all}");
        assert!(json["title"].as_str().is_some_and(|t| !t.is_empty()), "{all}");
        let detail = json["detail"].as_str().unwrap_or_default();
        assert!(detail.len() > 8, "a detail that says something: {all}");
        assert!(json["next"].as_str().is_some_and(|n| n.ends_with('.')), "what to do next: {all}");
        detail.to_owned()
    }
}

/// Waits until a condition holds; panics with `what` when the deadline passes. Gives how long it took.
pub async fn until(what: &str, condition: impl AsyncFnMut() -> bool) -> Duration {
    until_within(PATIENCE, what, condition).await
}

/// The same with a deadline of its own.
pub async fn until_within(patience: Duration, what: &str, mut condition: impl AsyncFnMut() -> bool) -> Duration {
    let begun = Instant::now();
    while !condition().await {
        assert!(begun.elapsed() < patience, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    begun.elapsed()
}
