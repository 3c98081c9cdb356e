//! A broker inside the test: the shipped configuration, a journal in memory, clocks that the test moves, real tokens,
//! and a target that does what the test says. For what no real target does when asked: hang, and answer when told to.
#![allow(dead_code)] // each test file uses a part

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use countersign::broker::mint::Issued;
use countersign::broker::vote::{Reviewer, Via};
use countersign::broker::{Broker, BrokerError, Mode, Parts, Rules, RunClock, build, run_clock};
use countersign::connector::{
    Away, Connector, Credential, Extent, Found, Gap, Gone, MintContext, MintError, Minted, Revocability,
    RevocabilityMode, RevokeError, SweepError,
};
use countersign::core::grant::Grant;
use countersign::core::id::{GrantId, LeaseId, PersonId, Timestamp};
use countersign::core::lease::{Evidence, Handle, Lease, LeaseIntent, LeaseState};
use countersign::core::permission::Permission;
use countersign::identity::{Method, VerifiedAgent};
use countersign::keys::random::SystemRandom;
use countersign::keys::{Keys, NamePrefix, Origin};
use countersign::policy::Engine;
use countersign::runtime::Runtime;
use countersign::store::Store;
use countersign::time::{Clock, SystemClock};
use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::Semaphore;

use crate::support::{CAT, Example};

const CATALOGUE: &str = r#"
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
[[target]]
name = "puppet"
kind = "token"

[[resource]]
name = "api/notes"
target = "tokens"
title = "notes"
environment = "sandbox"
isolated = true
sensitivity = "none"
settings = { audience = "https://notes.test", checks = "offline" }
[[resource.action]]
name = "read"
effect = "read"
[[target]]
name = "mirror"
kind = "token"

[[resource]]
name = "mirror/one"
target = "mirror"
title = "the other target"
environment = "sandbox"
isolated = true
sensitivity = "none"
settings = { audience = "https://mirror.test", checks = "offline" }
[[resource.action]]
name = "read"
effect = "read"
[[resource]]
name = "puppet/one"
target = "puppet"
title = "one"
environment = "sandbox"
isolated = true
sensitivity = "none"
settings = { audience = "https://one.test", checks = "offline" }
[[resource.action]]
name = "read"
effect = "read"
[[resource]]
name = "puppet/two"
target = "puppet"
title = "two"
environment = "sandbox"
isolated = true
sensitivity = "none"
settings = { audience = "https://two.test", checks = "offline" }
[[resource.action]]
name = "read"
effect = "read"
[[resource]]
name = "api/customers"
target = "tokens"
title = "customers"
environment = "prod"
sensitivity = "customer"
settings = { audience = "https://customers.test", checks = "offline" }
[[resource.action]]
name = "read"
effect = "read"
"#;

/// How long anything may take that should happen at once.
pub const PATIENCE: Duration = Duration::from_secs(30);
pub const TEN_YEARS_MS: i64 = 10 * 365 * 86_400_000;

/// The real clocks, and how far the test has moved them.
#[derive(Default)]
pub struct Moved {
    wall: AtomicI64,
    boot: AtomicU64,
}

impl Moved {
    /// Somebody sets the wall clock.
    pub fn step_wall(&self, ms: i64) {
        self.wall.fetch_add(ms, SeqCst);
    }
    /// Time passes.
    pub fn pass(&self, duration: Duration) {
        let ms = u64::try_from(duration.as_millis()).unwrap();
        self.wall.fetch_add(i64::try_from(ms).unwrap(), SeqCst);
        self.boot.fetch_add(ms, SeqCst);
    }
}

impl Clock for Moved {
    fn wall(&self) -> Timestamp {
        Timestamp(SystemClock.wall().0.checked_add_signed(self.wall.load(SeqCst)).unwrap())
    }
    fn boot_ms(&self) -> u64 {
        SystemClock.boot_ms() + self.boot.load(SeqCst)
    }
    fn boot_id(&self) -> String {
        SystemClock.boot_id()
    }
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(tokio::time::sleep(duration))
    }
}

impl Runtime for Moved {}

/// A target that does what the test says.
pub struct Puppet {
    /// The first ending of each of these fails.
    pub refuses: Mutex<BTreeSet<LeaseId>>,
    /// Endings of these fail as long as they stand here.
    pub resists: Mutex<BTreeSet<LeaseId>>,
    /// Endings of these hang.
    pub hangs: Mutex<BTreeSet<LeaseId>>,
    /// Every ending that was begun.
    pub tried: Mutex<Vec<LeaseId>>,
    /// True: a mint's answer is lost.
    pub loses_mints: AtomicBool,
    /// Mints wait for a permit of this.
    pub mints: Semaphore,
    /// What sweeps find.
    pub found: Mutex<Vec<Found>>,
    pub sweeps: AtomicUsize,
    /// While something stands here, nothing works.
    pub away: Mutex<Option<Away>>,
    pub probes: AtomicUsize,
    /// While this is true, probes and endings don't come back.
    pub mute: AtomicBool,
    /// Endings wait for a permit of this, once it is taken away from.
    pub endings: Semaphore,
    /// Endings of what was found wait for a permit of this.
    pub found_endings: Semaphore,
    pub found_tried: Mutex<Vec<String>>,
}

impl Default for Puppet {
    fn default() -> Self {
        Self {
            refuses: Mutex::default(),
            resists: Mutex::default(),
            hangs: Mutex::default(),
            tried: Mutex::default(),
            loses_mints: AtomicBool::new(false),
            mints: Semaphore::new(1_000),
            found: Mutex::default(),
            sweeps: AtomicUsize::new(0),
            away: Mutex::default(),
            probes: AtomicUsize::new(0),
            mute: AtomicBool::new(false),
            endings: Semaphore::new(Semaphore::MAX_PERMITS),
            found_endings: Semaphore::new(0),
            found_tried: Mutex::default(),
        }
    }
}

impl Puppet {
    pub const MINT_DEADLINE: Duration = Duration::from_secs(20);

    pub fn tries(&self, lease: LeaseId) -> usize {
        self.tried.lock().iter().filter(|l| **l == lease).count()
    }
}

fn gone() -> Gone {
    let evidence = Evidence::TargetSaysGone { detail: "it is gone".to_owned() };
    Gone { evidence, seen: Vec::new(), access_cut: None }
}

#[async_trait]
impl Connector for Puppet {
    fn kind(&self) -> &'static str {
        "token"
    }
    fn revocability(&self, _: &Permission, _: u64) -> Revocability {
        Revocability { mode: RevocabilityMode::Immediate, residual_secs: 0, says: "It ends when told to.".to_owned() }
    }
    fn fingerprint(&self, _: &Permission) -> serde_json::Value {
        json!("puppet")
    }
    fn counts_on_wall_clock(&self) -> bool {
        false
    }
    async fn prepare(&self, intent: &LeaseIntent) -> Result<Option<Handle>, MintError> {
        Ok(Some(json!({ "key": format!("key of {}", intent.permission.resource) })))
    }
    async fn mint(&self, _: &LeaseIntent, prepared: Option<&Handle>, _: &MintContext) -> Result<Minted, MintError> {
        self.mints.acquire().await.unwrap().forget();
        if self.loses_mints.load(SeqCst) {
            return Err(MintError::Unknown { why: "no answer".to_owned(), handle: None });
        }
        let credential = Credential { kind: "token", public: BTreeMap::new(), secret: BTreeMap::new() };
        Ok(Minted { credential, handle: prepared.unwrap().clone(), not_after: None })
    }
    fn mint_deadline(&self) -> Duration {
        Self::MINT_DEADLINE
    }
    async fn revoke(&self, lease: &Lease, _: Timestamp) -> Result<Gone, RevokeError> {
        let id = lease.intent.lease;
        self.tried.lock().push(id);
        if let Some(away) = self.away.lock().clone().filter(|a| a.extent != Extent::Behind) {
            return Err(RevokeError::Retry { why: away.why });
        }
        if self.refuses.lock().remove(&id) || self.resists.lock().contains(&id) {
            return Err(RevokeError::Retry { why: "it resists".to_owned() });
        }
        let _turn = self.endings.acquire().await.unwrap();
        if self.mute.load(SeqCst) || self.hangs.lock().contains(&id) {
            std::future::pending::<()>().await;
        }
        Ok(gone())
    }
    fn keys(&self, handle: &Handle) -> Vec<String> {
        handle["key"].as_str().map(str::to_owned).into_iter().collect()
    }
    async fn probe(&self) -> Result<(), Away> {
        self.probes.fetch_add(1, SeqCst);
        if self.mute.load(SeqCst) {
            std::future::pending::<()>().await;
        }
        self.away.lock().clone().map_or(Ok(()), Err)
    }
    async fn sweep(&self) -> Result<Vec<Found>, SweepError> {
        if let Some(away) = self.away.lock().clone() {
            return Err(SweepError(away.why));
        }
        self.sweeps.fetch_add(1, SeqCst);
        Ok(self.found.lock().clone())
    }
    async fn revoke_found(&self, found: &Found, _: Timestamp) -> Result<Gone, RevokeError> {
        self.found_tried.lock().push(found.name.clone());
        self.found_endings.acquire().await.unwrap().forget();
        self.found.lock().retain(|f| f.name != found.name);
        Ok(gone())
    }
    async fn check(&self) -> Result<Vec<Gap>, SweepError> {
        Ok(Vec::new())
    }
}

/// A broker, and what it runs on.
pub struct House {
    pub broker: Arc<Broker>,
    pub clock: Arc<Moved>,
    pub puppet: Arc<Puppet>,
    /// Another target.
    pub mirror: Arc<Puppet>,
    example: Example,
}

impl House {
    /// A run that begins on this store.
    pub async fn open(store: impl Store, clock: Arc<Moved>) -> Self {
        Self::open_with(store, clock, Arc::new(Puppet::default()), |_| {}).await
    }

    /// One where an agent may have as many grants as it likes.
    pub async fn open_crowded(store: impl Store, clock: Arc<Moved>) -> Self {
        Self::open_with(store, clock, Arc::new(Puppet::default()), |example| {
            example.replace("policies/50-never.cedar", "recent_requests > 200", "recent_requests > 20000");
            example.replace("countersign.toml", "open_grants_per_agent_max = 200", "open_grants_per_agent_max = 20000");
        })
        .await
    }

    /// A run whose catalogue doesn't have the puppet any more.
    pub async fn open_without_puppet(store: impl Store, clock: Arc<Moved>) -> Self {
        Self::build(store, clock, Arc::new(Puppet::default()), |_| {}, false).await
    }

    /// A run with this puppet, after this change of the configuration.
    pub async fn open_with(
        store: impl Store,
        clock: Arc<Moved>,
        puppet: Arc<Puppet>,
        change: impl FnOnce(&Example),
    ) -> Self {
        Self::build(store, clock, puppet, change, true).await
    }

    async fn build(
        store: impl Store,
        clock: Arc<Moved>,
        puppet: Arc<Puppet>,
        change: impl FnOnce(&Example),
        there: bool,
    ) -> Self {
        let example = Example::new();
        change(&example);
        example.write(CAT, CATALOGUE);
        example.replace("countersign.toml", "sweep_every_secs = 300", "sweep_every_secs = 1");
        let loaded = example.load().unwrap();
        let keys = Keys::open(&loaded.base, Origin::Serve, clock.wall()).unwrap();
        let prefix = NamePrefix::new("cslease").unwrap();
        let shared: Arc<dyn Clock> = clock.clone();
        let mut connectors = build::connectors(&loaded, &keys, Arc::clone(&shared), &prefix).unwrap();
        let mirror = Arc::new(Puppet::default());
        connectors.remove(&"puppet".parse().unwrap());
        if there {
            connectors.insert("puppet".parse().unwrap(), puppet.clone());
        }
        connectors.insert("mirror".parse().unwrap(), mirror.clone());
        let engine = Engine::load(&loaded.policies, &loaded.catalogue, &loaded.config.tier).unwrap();
        let (last_run, last_at) = store.last_run().await.unwrap();
        let start = run_clock::start(last_run.as_ref(), last_at, clock.as_ref());
        let broker = Broker::new(Parts {
            store: Arc::new(store),
            rules: Rules { config: loaded.config, catalogue: loaded.catalogue, engine: Arc::new(engine), connectors },
            clock: RunClock::new(clock.clone(), start.at),
            random: Arc::new(SystemRandom),
            names: Arc::clone(&keys.names),
            prefix,
            mode: Mode::Serve,
        });
        broker.start_up(start, &BTreeMap::new()).await.unwrap();
        Self { broker, clock, puppet, mirror, example }
    }

    pub fn agent(&self) -> VerifiedAgent {
        self.agent_named("a")
    }

    /// Those named `ops/…` are another owner's.
    pub fn agent_named(&self, name: &str) -> VerifiedAgent {
        let id = format!("spiffe://corp.example/agent/{name}");
        VerifiedAgent {
            id: id.parse().unwrap(),
            issuer: "spiffe://corp.example".to_owned(),
            subject: id,
            method: Method::JwtSvid,
            attributes: BTreeMap::new(),
            tier_max: None,
            launcher: None,
            confirmation: None,
            expires_at: Timestamp(u64::MAX),
        }
    }

    /// Somebody of these groups, at a browser.
    pub fn person(&self, id: &str, groups: &[&str]) -> Reviewer {
        Reviewer {
            person: PersonId::new(id).unwrap(),
            account: format!("https://login.corp.example#{id}"),
            groups: groups.iter().map(|g| (*g).to_owned()).collect(),
            via: Via::Browser,
        }
    }

    pub async fn ask(&self, resource: &str, life_secs: u64) -> Result<GrantId, BrokerError> {
        self.ask_as("a", "T-1", resource, life_secs).await
    }

    pub async fn ask_as(
        &self,
        agent: &str,
        task: &str,
        resource: &str,
        life_secs: u64,
    ) -> Result<GrantId, BrokerError> {
        let wanted = json!({
            "task": task, "intent": "to see what happens", "life_secs": life_secs,
            "authorization_details": [{ "type": "token", "identifier": resource, "actions": ["read"] }],
        });
        self.broker.request(&self.agent_named(agent), serde_json::from_value(wanted).unwrap(), None).await.map(|g| g.id)
    }

    pub async fn asked(&self, resource: &str, life_secs: u64) -> GrantId {
        self.ask(resource, life_secs).await.unwrap()
    }

    pub async fn collect(&self, id: GrantId) -> Result<Arc<Issued>, BrokerError> {
        self.broker.credentials(&self.agent(), id, false, None).await
    }

    /// A grant whose credential was handed over, and its lease.
    pub async fn holds(&self, resource: &str, life_secs: u64) -> (GrantId, LeaseId) {
        let id = self.asked(resource, life_secs).await;
        (id, self.collect(id).await.unwrap().credentials[0].lease)
    }

    /// The same of another agent, under another task.
    pub async fn holds_as(&self, agent: &str, task: &str, resource: &str) -> (GrantId, LeaseId) {
        let id = self.ask_as(agent, task, resource, 600).await.unwrap();
        let issued = self.broker.credentials(&self.agent_named(agent), id, false, None).await.unwrap();
        (id, issued.credentials[0].lease)
    }

    pub async fn complete(&self, id: GrantId) {
        self.broker.complete(&self.agent(), id).await.unwrap();
    }

    pub async fn grant(&self, id: GrantId) -> Arc<Grant> {
        self.broker.store.grant(id).await.unwrap().unwrap()
    }

    pub async fn word(&self, id: GrantId) -> &'static str {
        self.grant(id).await.state.word()
    }

    /// The one lease of a grant.
    pub async fn lease(&self, id: GrantId) -> LeaseState {
        let grant = self.grant(id).await;
        assert_eq!(grant.leases.len(), 1);
        grant.leases.values().next().unwrap().state.clone()
    }

    /// Failed attempts to end the one lease of a grant, and when the next one is.
    pub async fn attempts(&self, id: GrantId) -> (u32, Option<Timestamp>) {
        match self.lease(id).await {
            LeaseState::Revoking { progress, .. } | LeaseState::Unknown { progress, .. } => {
                (progress.attempts, progress.next_try)
            }
            _ => (0, None),
        }
    }
}

/// Waits until a condition holds. Gives how long it took.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) -> Duration {
    let begun = Instant::now();
    while !condition().await {
        assert!(begun.elapsed() < PATIENCE, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    begun.elapsed()
}
