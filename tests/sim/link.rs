//! The way from a node to the database: questions and answers get lost, come late, or take effect after nobody waits any
//! more; a node's way is cut, the database is away, or is restarted at once and forgets what was on its way.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use countersign::audit::merkle::Hash;
use countersign::core::digest::Digest;
use countersign::core::id::{GrantId, LeaseId, Timestamp};
use countersign::runtime::within;
use countersign::store::Job;
use countersign::store::postgres::OpenError;
use countersign::store::postgres::tables::{
    Claimed, KnownBy, Row, Run, Snapshot, Standing, Tables as Asked, Trouble, Write,
};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::Choices;
use super::database::Tables;
use super::sched::{EPOCH_MS, Sched, SimRuntime, WORLD};

/// One statement, as the node sees it: as long as in production.
const STATEMENT: Duration = Duration::from_secs(8);
/// The longest that a question is under way, in milliseconds: longer than anybody waits.
const UNDER_WAY_MS_MAX: u64 = 25_000;
/// How often a question that may be asked twice is asked, as in production.
const READS: usize = 3;

/// How rough the network is, in thousandths of the exchanges.
#[derive(Debug, Clone, Copy, Default)]
pub struct Roughness {
    pub loses: u64,
    pub delays: u64,
    pub refuses: u64,
}

struct State {
    tables: Tables,
    choices: Choices,
    roughness: Roughness,
    /// Nodes whose way is cut, until when.
    cut_until_ms: BTreeMap<usize, u64>,
    away_until_ms: u64,
    /// Changes with each restart: what was on its way before is lost.
    generation: u64,
}

/// The database, and the network before it.
pub struct Database {
    sched: Arc<Sched>,
    state: Mutex<State>,
}

/// What becomes of one exchange.
struct Fate {
    go_ms: Option<u64>,
    back_ms: Option<u64>,
    is_refused: bool,
}

impl Database {
    pub fn new(sched: Arc<Sched>, roughness: Roughness, seed: u64) -> Self {
        let state = State {
            tables: Tables::default(),
            choices: Choices(seed),
            roughness,
            cut_until_ms: BTreeMap::new(),
            away_until_ms: 0,
            generation: 0,
        };
        Self { sched, state: Mutex::new(state) }
    }

    pub fn look<T>(&self, at: impl FnOnce(&Tables) -> T) -> T {
        at(&self.state.lock().tables)
    }

    pub fn cut(&self, node: usize, until_ms: u64) {
        self.state.lock().cut_until_ms.insert(node, until_ms);
    }

    /// It is away until then, and whatever is on its way is lost.
    pub fn restart(&self, until_ms: u64) {
        let state = &mut *self.state.lock();
        state.generation += 1;
        state.away_until_ms = state.away_until_ms.max(until_ms);
    }

    /// From now on nothing gets lost.
    pub fn mend(&self) {
        let state = &mut *self.state.lock();
        state.roughness = Roughness::default();
        state.cut_until_ms.clear();
        state.away_until_ms = 0;
    }

    /// Does anything get lost by itself?
    pub fn is_rough(&self) -> bool {
        let r = self.state.lock().roughness;
        r.loses + r.delays + r.refuses > 0
    }

    /// Can this node reach it?
    pub fn is_reached_by(&self, node: usize) -> bool {
        let (state, now) = (self.state.lock(), self.sched.now_ms());
        now >= state.away_until_ms && state.cut_until_ms.get(&node).is_none_or(|until| now >= *until)
    }

    fn fate(&self) -> (Fate, u64) {
        let state = &mut *self.state.lock();
        let (c, r) = (&mut state.choices, state.roughness);
        let (mut go_ms, mut back_ms) = (Some(c.between(0, 4)), Some(c.between(0, 4)));
        if c.chance(r.loses) {
            if c.coin() { go_ms = None } else { back_ms = None }
        } else if c.chance(r.delays) {
            go_ms = Some(c.between(1_000, UNDER_WAY_MS_MAX));
        }
        (Fate { go_ms, back_ms, is_refused: c.chance(r.refuses) }, state.generation)
    }
}

/// A node's side of it, for one run of the process.
pub struct Link {
    pub database: Arc<Database>,
    pub node: usize,
    pub runtime: Arc<SimRuntime>,
}

impl Link {
    fn lost<T>(why: &str) -> Result<T, Trouble> {
        Err(Trouble::Lost(why.to_owned()))
    }

    /// One exchange. What it does happens at the database, whatever becomes of the node.
    async fn once<T: Send + 'static>(
        &self,
        effect: impl FnOnce(&mut Tables, u64) -> Result<T, Trouble> + Send + 'static,
    ) -> Result<T, Trouble> {
        let (database, node) = (Arc::clone(&self.database), self.node);
        if !database.is_reached_by(node) {
            // Refused at once, or nobody says anything.
            let wait_ms = if database.state.lock().choices.coin() { 2 } else { STATEMENT.as_millis() as u64 };
            database.sched.sleep_ms(wait_ms).await;
            return Self::lost("the database can't be reached");
        }
        let (fate, generation) = database.fate();
        let (answer, answered) = oneshot::channel();
        let sched = Arc::clone(&database.sched);
        self.runtime.sched.spawn(
            WORLD,
            Box::pin(async move {
                let Some(go_ms) = fate.go_ms else {
                    sched.sleep_ms(STATEMENT.as_millis() as u64).await;
                    return drop(answer);
                };
                sched.sleep_ms(go_ms).await;
                let done = {
                    let state = &mut *database.state.lock();
                    if state.generation != generation || sched.now_ms() < state.away_until_ms {
                        Self::lost("the database was restarted")
                    } else if fate.is_refused {
                        Err(Trouble::Refused("57014".to_owned(), "canceled".to_owned()))
                    } else {
                        effect(&mut state.tables, sched.now_ms())
                    }
                };
                let is_answered = database.is_reached_by(node) && database.state.lock().generation == generation;
                let Some(back_ms) = fate.back_ms.filter(|_| is_answered) else {
                    sched.sleep_ms(STATEMENT.as_millis() as u64).await;
                    return drop(answer);
                };
                sched.sleep_ms(back_ms).await;
                // Whoever asked may be gone.
                let _ = answer.send(done);
            }),
        );
        match within(self.runtime.as_ref(), STATEMENT, answered).await {
            Some(Ok(done)) => done,
            Some(Err(_)) => Self::lost("the connection was lost"),
            None => Self::lost("no answer in time"),
        }
    }

    /// Something that changes nothing, or may be done twice.
    async fn ask<T: Send + 'static>(
        &self,
        effect: impl Fn(&mut Tables, u64) -> T + Clone + Send + 'static,
    ) -> Result<T, Trouble> {
        let mut tries = 0;
        loop {
            tries += 1;
            let effect = effect.clone();
            match self.once(move |tables, now| Ok(effect(tables, now))).await {
                Err(trouble) if trouble.is_passing() && tries < READS => {}
                outcome => return outcome,
            }
        }
    }
}

#[async_trait]
impl Asked for Link {
    async fn now(&self) -> Result<Timestamp, Trouble> {
        self.ask(|_, now| Timestamp(EPOCH_MS + now)).await
    }
    async fn prepare(&self) -> Result<(), OpenError> {
        Ok(())
    }
    async fn has_keys(&self, keys: &Digest) -> Result<bool, Trouble> {
        let keys = *keys;
        self.ask(move |t, _| t.has_keys(&keys)).await
    }
    async fn load(&self) -> Result<Snapshot, Trouble> {
        self.once(|t, _| Ok(t.load())).await
    }

    async fn write(&self, write: &Write) -> Result<bool, Trouble> {
        let write = write.clone();
        self.once(move |t, _| t.write(&write)).await
    }
    async fn since(&self, seq: u64) -> Result<Vec<Row>, Trouble> {
        self.once(move |t, _| Ok(t.since(seq))).await
    }
    async fn standing(&self, run: Run) -> Result<Option<Standing>, Trouble> {
        self.once(move |t, _| Ok(Some(t.standing(run)))).await
    }

    async fn grants(&self, ids: &[GrantId]) -> Result<Vec<Vec<u8>>, Trouble> {
        let ids = ids.to_vec();
        self.ask(move |t, _| t.grants(&ids)).await
    }
    async fn twins(&self, digests: &[Digest]) -> Result<Vec<(Digest, GrantId)>, Trouble> {
        let digests = digests.to_vec();
        self.ask(move |t, _| t.twins(&digests)).await
    }
    async fn tasks(&self, keys: &[Vec<u8>]) -> Result<Vec<Vec<u8>>, Trouble> {
        let keys = keys.to_vec();
        self.ask(move |t, _| t.tasks(&keys)).await
    }
    async fn decided(&self, limit: usize) -> Result<Vec<Vec<u8>>, Trouble> {
        self.ask(move |t, _| t.decided(limit)).await
    }
    async fn records(&self, id: GrantId) -> Result<Vec<(u64, Vec<u8>)>, Trouble> {
        self.ask(move |t, _| t.records(id)).await
    }
    async fn history(&self, agent: &[u8], recent: usize) -> Result<KnownBy, Trouble> {
        let agent = agent.to_vec();
        self.ask(move |t, _| t.history(&agent, recent)).await
    }

    async fn claim(&self, at: Timestamp, limit: usize, run: Run, lease_ms: u64) -> Result<Vec<Claimed>, Trouble> {
        self.ask(move |t, now| t.claim(at, limit, run, lease_ms, now)).await
    }
    async fn release(&self, job: Job, run: Run, epoch: i64) -> Result<(), Trouble> {
        self.ask(move |t, _| t.release(job, run, epoch)).await
    }
    async fn abandoned(&self) -> Result<Vec<(GrantId, LeaseId)>, Trouble> {
        self.ask(|t, _| t.abandoned()).await
    }

    async fn join(&self, lasts_ms: u64) -> Result<Run, Trouble> {
        self.ask(move |t, now| t.join(lasts_ms, now)).await
    }
    async fn renew(&self, run: Run, lasts_ms: u64) -> Result<Option<(u64, Hash)>, Trouble> {
        self.ask(move |t, now| t.renew(run, lasts_ms, now)).await
    }
    async fn leave(&self, run: Run) -> Result<(), Trouble> {
        self.ask(move |t, _| t.leave(run)).await
    }
    async fn declare(&self, but: Run) -> Result<Vec<Run>, Trouble> {
        self.ask(move |t, now| t.declare(but, now)).await
    }

    async fn beat(&self, grants: &[GrantId]) -> Result<(), Trouble> {
        let grants = grants.to_vec();
        self.ask(move |t, now| t.beat(&grants, now)).await
    }
    async fn silent_ms(&self, grants: &[GrantId]) -> Result<Vec<(GrantId, u64)>, Trouble> {
        let grants = grants.to_vec();
        self.ask(move |t, now| t.silent_ms(&grants, now)).await
    }

    async fn checkpoint(&self, size: u64, leaf: &Hash, note: &str) -> Result<(), Trouble> {
        let (leaf, note) = (*leaf, note.to_owned());
        self.ask(move |t, _| t.checkpoint(size, &leaf, &note)).await
    }
    async fn prune(&self, reach: Timestamp) -> Result<(), Trouble> {
        self.ask(move |t, _| t.prune(reach)).await
    }
}
