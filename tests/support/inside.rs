//! A broker of the real parts in the test's own process, around a journal that can be told to refuse, and a clock that
//! can be put ahead. Uses the configuration of `broker.rs`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use countersign::broker::vote::{Reviewer, Via};
use countersign::broker::{Broker, BrokerError, Mode, Parts, Rules, RunClock, build, run_clock};
use countersign::config::load::load;
use countersign::core::digest::Digest;
use countersign::core::event::{BrokerEvent, Event, GrantEvent};
use countersign::core::grant::Grant;
use countersign::core::id::{AgentId, GrantId, LeaseId, PersonId, TaskKey, Timestamp};
use countersign::core::permission::Permission;
use countersign::identity::dev_authority::DevAuthority;
use countersign::identity::{Method, VerifiedAgent};
use countersign::keys::random::SystemRandom;
use countersign::keys::{Keys, NamePrefix, Origin};
use countersign::policy::Engine;
use countersign::runtime::Runtime;
use countersign::store::memory::{self, MemoryLog};
use countersign::store::{AgentHistory, Appended, Batch, Freezes, Held, Job, Recorded, Store, StoreError};
use countersign::time::{Clock, SystemClock};
use serde_json::Value;

use crate::broker::config::{self, Ports};
use crate::broker::postgres::{self, Cluster};
use crate::broker::{DOMAIN, Plan, Shifted, target};

/// The real clock, put ahead by so many milliseconds.
#[derive(Default)]
pub struct Ahead(pub AtomicU64);

impl Clock for Ahead {
    fn wall(&self) -> Timestamp {
        SystemClock.wall().plus_ms(self.0.load(Ordering::SeqCst))
    }
    fn boot_ms(&self) -> u64 {
        SystemClock.boot_ms() + self.0.load(Ordering::SeqCst)
    }
    fn boot_id(&self) -> String {
        SystemClock.boot_id()
    }
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(tokio::time::sleep(duration))
    }
}

impl Runtime for Ahead {}

/// What a journal takes.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Takes {
    Everything,
    /// A full disk: the space reserved for endings is left.
    Endings,
    Nothing,
}

/// A store whose journal can be told to refuse, as a full or broken disk does.
pub struct Door {
    pub store: Arc<dyn Store>,
    takes: AtomicU8,
}

impl Door {
    pub fn set(&self, takes: Takes) {
        self.takes.store(takes as u8, Ordering::SeqCst);
    }
    fn takes(&self, least: Takes) -> bool {
        self.takes.load(Ordering::SeqCst) <= least as u8
    }
}

fn full() -> StoreError {
    StoreError::Unavailable("no disk space".to_owned())
}

#[async_trait]
impl Store for Door {
    async fn append(&self, batch: Batch) -> Result<Appended, StoreError> {
        let least = if batch.urgent { Takes::Endings } else { Takes::Everything };
        if self.takes(least) { self.store.append(batch).await } else { Err(full()) }
    }
    async fn abandoned(&self) -> Result<Vec<(GrantId, LeaseId)>, StoreError> {
        self.store.abandoned().await
    }
    async fn recover(&self) -> Result<(), StoreError> {
        if self.takes(Takes::Endings) { self.store.recover().await } else { Err(full()) }
    }
    fn is_writable(&self) -> bool {
        self.takes(Takes::Endings) && self.store.is_writable()
    }
    async fn head(&self, id: GrantId) -> Result<Option<Arc<Grant>>, StoreError> {
        self.store.head(id).await
    }
    async fn grant(&self, id: GrantId) -> Result<Option<Arc<Grant>>, StoreError> {
        self.store.grant(id).await
    }
    async fn changed(&self, id: GrantId, version: u64, wait: Duration) -> Result<Option<Arc<Grant>>, StoreError> {
        self.store.changed(id, version, wait).await
    }
    async fn subtree(&self, id: GrantId) -> Result<Vec<Arc<Grant>>, StoreError> {
        self.store.subtree(id).await
    }
    async fn task_links(&self, task: &TaskKey) -> Result<Vec<GrantId>, StoreError> {
        self.store.task_links(task).await
    }
    async fn task_grants(&self, task: &TaskKey) -> Result<Vec<Arc<Grant>>, StoreError> {
        self.store.task_grants(task).await
    }
    async fn task_completed(&self, task: &TaskKey) -> Result<bool, StoreError> {
        self.store.task_completed(task).await
    }
    async fn open_grants(&self) -> Result<Vec<Arc<Grant>>, StoreError> {
        self.store.open_grants().await
    }
    async fn open_counts(&self, agent: &AgentId) -> Result<(usize, usize), StoreError> {
        self.store.open_counts(agent).await
    }
    async fn decided(&self, limit: usize) -> Result<Vec<Arc<Grant>>, StoreError> {
        self.store.decided(limit).await
    }
    async fn by_idempotency(&self, digest: &Digest) -> Result<Option<Arc<Grant>>, StoreError> {
        self.store.by_idempotency(digest).await
    }
    async fn held(
        &self,
        agent: &AgentId,
        owner: Option<&PersonId>,
        since: Timestamp,
        except: Option<GrantId>,
    ) -> Result<Vec<Held>, StoreError> {
        self.store.held(agent, owner, since, except).await
    }
    async fn held_in_task(
        &self,
        task: &TaskKey,
        since: Timestamp,
        except: Option<GrantId>,
    ) -> Result<Vec<Permission>, StoreError> {
        self.store.held_in_task(task, since, except).await
    }
    async fn history(&self, agent: &AgentId) -> Result<Option<AgentHistory>, StoreError> {
        self.store.history(agent).await
    }
    async fn freezes(&self) -> Result<Freezes, StoreError> {
        self.store.freezes().await
    }
    async fn lease_named(&self, name: &str) -> Result<Option<(GrantId, LeaseId)>, StoreError> {
        self.store.lease_named(name).await
    }
    async fn events(&self, id: GrantId) -> Result<Vec<Recorded>, StoreError> {
        self.store.events(id).await
    }
    async fn last_run(&self) -> Result<(Option<BrokerEvent>, Timestamp), StoreError> {
        self.store.last_run().await
    }
    async fn claim(&self, now: Timestamp, lease_for: Duration, limit: usize) -> Result<Vec<Job>, StoreError> {
        self.store.claim(now, lease_for, limit).await
    }
    async fn release(&self, job: Job) {
        self.store.release(job).await;
    }
    async fn due(&self, now: Timestamp, wait: Duration) {
        self.store.due(now, wait).await;
    }
    fn figures(&self) -> Vec<(&'static str, u64)> {
        self.store.figures()
    }
    async fn close(&self) -> Result<(), StoreError> {
        self.store.close().await
    }
}

/// One broker, not started.
pub struct Inside {
    pub broker: Arc<Broker>,
    pub door: Arc<Door>,
    pub clock: Arc<Ahead>,
    pub start: run_clock::Start,
    pub pg: Option<Arc<Cluster>>,
    log: MemoryLog,
    keys: Keys,
    folder: tempfile::TempDir,
}

impl Inside {
    /// `None` where a peer isn't installed.
    pub async fn new(plan: Plan, test: &str) -> Option<Self> {
        if plan.postgres && !postgres::available(test) {
            return None;
        }
        let pg = if plan.postgres {
            Some(Arc::new(tokio::task::spawn_blocking(target::start).await.unwrap()))
        } else {
            None
        };
        let folder = tempfile::Builder::new().prefix("cs-inside-").tempdir().unwrap();
        let authority = DevAuthority::new(DOMAIN, Arc::new(Shifted::default())).unwrap();
        let port = pg.as_ref().map(|c| c.port);
        config::write(folder.path(), &Ports::free(), &authority, "http://127.0.0.1:1", port, &plan);
        let data: PathBuf = folder.path().join("data");
        std::fs::create_dir(&data).unwrap();
        let keys = Keys::open(&data, Origin::Serve, SystemClock.wall()).unwrap();
        let (log, clock) = (MemoryLog::default(), Arc::new(Ahead::default()));
        let (broker, door, start) = assemble(folder.path(), &keys, &log, &clock).await;
        Some(Self { broker, door, clock, start, pg, log, keys, folder })
    }

    /// The same, started, and driven.
    pub async fn driven(plan: Plan, test: &str) -> Option<Self> {
        let one = Self::new(plan, test).await?;
        one.start_up().await.unwrap();
        one.broker.drive();
        Some(one)
    }

    pub async fn start_up(&self) -> Result<(), BrokerError> {
        self.broker.start_up(self.start, &BTreeMap::new()).await
    }

    /// It stops, and another one is made on what the journal holds. Not started.
    pub async fn stop_and_reopen(&mut self) {
        self.broker.stop(Duration::from_secs(10)).await;
        self.door.close().await.unwrap();
        (self.broker, self.door, self.start) = assemble(self.folder.path(), &self.keys, &self.log, &self.clock).await;
    }

    /// A request of an agent.
    pub async fn ask(&self, by: &VerifiedAgent, body: Value) -> Result<Arc<Grant>, BrokerError> {
        self.broker.request(by, serde_json::from_value(body).unwrap(), None).await
    }

    pub async fn grant(&self, id: GrantId) -> Arc<Grant> {
        self.door.grant(id).await.unwrap().unwrap()
    }

    pub fn records(&self) -> u64 {
        self.door.figures().into_iter().find(|(name, _)| *name == "journal_records").unwrap().1
    }

    /// Writes events, as a run that stopped right after them left them.
    pub async fn write(&self, events: Vec<Event>) {
        let batch = Batch { expect: Vec::new(), events, at: self.broker.now(), urgent: false };
        self.door.store.append(batch).await.unwrap();
    }

    /// What made a grant, for another id. `change` sees each event.
    pub async fn again(&self, of: GrantId, id: GrantId, change: impl Fn(&mut GrantEvent)) -> Vec<Event> {
        let made = self.door.events(of).await.unwrap();
        let made = made.into_iter().filter_map(|r| match r.event {
            Event::Grant { what, version, .. } => Some((*what, version)),
            _ => None,
        });
        made.map(|(mut what, version)| {
            if let GrantEvent::Assessed { assessed } = &mut what {
                assessed.approvable.grant = id;
                assessed.digest = assessed.approvable.digest().unwrap();
            }
            change(&mut what);
            Event::Grant { id, version, what: Box::new(what) }
        })
        .collect()
    }
}

async fn assemble(
    folder: &std::path::Path,
    keys: &Keys,
    log: &MemoryLog,
    clock: &Arc<Ahead>,
) -> (Arc<Broker>, Arc<Door>, run_clock::Start) {
    let loaded = load(&folder.join("countersign.toml")).unwrap_or_else(|e| panic!("{:?}", e.0));
    let prefix = NamePrefix::new("cslease").unwrap();
    let engine = Engine::load(&loaded.policies, &loaded.catalogue, &loaded.config.tier).unwrap();
    let connectors = build::connectors(&loaded, keys, clock.clone(), &prefix).unwrap();
    let store: Arc<dyn Store> = Arc::new(memory::reopen(log.clone()).unwrap());
    let door = Arc::new(Door { store, takes: AtomicU8::new(Takes::Everything as u8) });
    let (last_run, last_at) = door.last_run().await.unwrap();
    let start = run_clock::start(last_run.as_ref(), last_at, clock.as_ref());
    let broker = Broker::new(Parts {
        store: door.clone(),
        rules: Rules { config: loaded.config, catalogue: loaded.catalogue, engine: Arc::new(engine), connectors },
        clock: RunClock::new(clock.clone(), start.at),
        random: Arc::new(SystemRandom),
        names: Arc::clone(&keys.names),
        prefix,
        mode: Mode::Serve,
    });
    (broker, door, start)
}

/// An agent of the agents' trust domain, as `identity` proves it.
pub fn agent(name: &str) -> VerifiedAgent {
    let id = format!("spiffe://{DOMAIN}/agent/{name}");
    VerifiedAgent {
        id: AgentId::new(&id).unwrap(),
        issuer: format!("spiffe://{DOMAIN}"),
        subject: id,
        method: Method::JwtSvid,
        attributes: BTreeMap::new(),
        tier_max: None,
        launcher: None,
        confirmation: None,
        expires_at: Timestamp(u64::MAX),
    }
}

/// A person with these groups, in a browser.
pub fn person(name: &str, groups: &[&str]) -> Reviewer {
    Reviewer {
        person: PersonId::new(name).unwrap(),
        account: format!("http://127.0.0.1:1#{name}"),
        groups: groups.iter().map(|g| (*g).to_owned()).collect(),
        via: Via::Browser,
    }
}
