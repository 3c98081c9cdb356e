//! The store of several nodes: one PostgreSQL database, no leader.
//!
//! The record is a table whose end only one write can pass at a time ([`sql`]): events, their place in the Merkle log,
//! the view's tables and what is due change in one statement or not at all. Each node has read the whole record up to
//! some place, keeps what is open in memory, decides there, and writes if nobody was first ([`state`]). The reasons are in
//! docs/adr/0011-several-nodes.md.

mod api;
mod ask;
mod connect;
mod export;
mod load;
mod migrate;
mod pump;
mod runs;
mod schema;
mod sql;
mod sql_tables;
mod state;
pub mod tables;
mod write;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use self::sql_tables::SqlTables;
use self::state::State;
use self::tables::{Tables, Trouble, WriteId};
use super::engine::watchers::Watchers;
use super::tls::MakeTls;
use super::{Job, StoreError};
use crate::audit::merkle::Hash;
use crate::audit::note::Signer;
use crate::core::digest::Digest;
use crate::core::event::BrokerEvent;
use crate::core::id::{AgentId, GrantId, TaskKey, Timestamp};
use crate::core::secret::Secret;
use crate::keys::random::Random;
use crate::runtime::{Runtime, Task, start};

pub use self::export::{Exported, export};
pub use self::migrate::{Moved, migrate};
pub use self::runs::RUN_LASTS;
pub use self::schema::STEP;

/// An append is answered within this time, in any case.
const APPEND: Duration = Duration::from_secs(15);
/// How long a reader waits to learn what others wrote.
const REFRESH: Duration = Duration::from_secs(5);
/// A node whose clock is further from the database's than this doesn't start, in milliseconds.
pub const CLOCKS_APART_MS_MAX: u64 = 30_000;
/// Longest name of a schema, in bytes: PostgreSQL's own limit.
pub const SCHEMA_BYTES_MAX: usize = 63;

/// How to reach the database.
#[derive(Clone)]
pub struct Settings {
    /// `postgres://USER:PASSWORD@HOST:PORT/DATABASE`.
    pub url: Secret,
    /// Where the tables are, made if need be: small letters, digits, `_`.
    pub schema: String,
    /// Needed unless the database is on this machine.
    pub tls: Option<MakeTls>,
    /// Most sessions of this node.
    pub sessions_max: usize,
    /// What all nodes must have in common: a hash of what their keys are known by.
    pub keys: Digest,
}

/// Why the store can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// What is configured can't be.
    #[error("{0}")]
    Settings(String),
    /// The database gives no answer, or refuses.
    #[error("the store's database does not answer as it should: {0}")]
    Database(String),
    /// The tables are of a newer version.
    #[error(
        "the tables in the database are of a newer version (step {is}, this program knows {knows}): run that version, \
         or restore the database from before the upgrade"
    )]
    Newer {
        /// The step that the tables are at.
        is: i32,
        /// The step that this program knows.
        knows: i32,
    },
    /// This machine's clock, or the database's, is wrong.
    #[error(
        "this machine's clock is {apart_secs} s apart from the database's, and deadlines of all nodes would be off by \
         as much: set it right (at most {} s are taken)", CLOCKS_APART_MS_MAX / 1000
    )]
    Clock {
        /// How far.
        apart_secs: u64,
    },
    /// Another node has other keys.
    #[error(
        "the keys of this node are not those of the nodes that this database belongs to: what one signs another would \
         refuse. Stop this node, copy the folder `keys` of a node that runs into its data folder, and start it again"
    )]
    Keys,
    /// What is stored can't be read.
    #[error("{0}")]
    Store(#[from] StoreError),
}

impl From<Trouble> for OpenError {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Unreadable(what) => Self::Store(StoreError::Unreadable(what)),
            Trouble::Refused(..) | Trouble::Lost(_) => Self::Database(trouble.says().to_owned()),
        }
    }
}

/// The parts that the store's own tasks need too.
struct Core {
    runtime: Arc<dyn Runtime>,
    tables: Arc<dyn Tables>,
    state: Mutex<State>,
    watchers: Watchers,
    /// There is something to write or to read.
    wake: Notify,
    due: Notify,
    /// Rounds that were asked for, and the latest that is through.
    wanted: AtomicU64,
    seen: Mark,
    /// Batches that were answered.
    answered: Mark,
    /// The present run.
    run: AtomicI64,
    beginning: tokio::sync::Mutex<()>,
    stopping: CancellationToken,
    random: Arc<dyn Random>,
    signer: Option<Signer>,
    checkpoint_size: AtomicU64,
}

/// The store of one node.
pub struct PostgresStore {
    core: Arc<Core>,
    /// As it was when the store was opened.
    last_run: (Option<BrokerEvent>, Timestamp),
    tasks: Mutex<Vec<Task<()>>>,
    conflicts: AtomicU64,
}

/// Opens the store: brings the tables up to date, begins a run, reads what is open. Needs a running runtime.
pub async fn open(
    settings: &Settings,
    runtime: Arc<dyn Runtime>,
    random: Arc<dyn Random>,
    signer: Option<Signer>,
) -> Result<PostgresStore, OpenError> {
    check_schema(&settings.schema)?;
    open_on(Arc::new(SqlTables::new(settings)?), &settings.keys, runtime, random, signer).await
}

/// Opens the store on these tables.
pub async fn open_on(
    tables: Arc<dyn Tables>,
    keys: &Digest,
    runtime: Arc<dyn Runtime>,
    random: Arc<dyn Random>,
    signer: Option<Signer>,
) -> Result<PostgresStore, OpenError> {
    check_clock(tables.now().await?, runtime.wall())?;
    tables.prepare().await?;
    if !tables.has_keys(keys).await? {
        return Err(OpenError::Keys);
    }
    let run = tables.join(runs::lasts_ms()).await?;
    let loaded = load::load(tables.as_ref()).await?;
    let last_run = loaded.view.last_run();
    let core = Arc::new(Core {
        runtime: Arc::clone(&runtime),
        tables,
        state: Mutex::new(State::new(loaded.view, loaded.tail)),
        watchers: Watchers::default(),
        wake: Notify::new(),
        due: Notify::new(),
        wanted: AtomicU64::new(0),
        seen: Mark::default(),
        answered: Mark::default(),
        run: AtomicI64::new(run),
        beginning: tokio::sync::Mutex::new(()),
        stopping: CancellationToken::new(),
        random,
        signer,
        checkpoint_size: AtomicU64::new(loaded.checkpoint_size),
    });
    let pump = start(runtime.as_ref(), pump::run(Arc::clone(&core)));
    let runs = start(runtime.as_ref(), runs::run(Arc::clone(&core)));
    Ok(PostgresStore { core, last_run, tasks: Mutex::new(vec![pump, runs]), conflicts: AtomicU64::new(0) })
}

/// A number that only grows, and who waits for it. (A `watch` would wake its waiters in an order that it draws: a
/// simulation could not be repeated.)
#[derive(Default)]
struct Mark {
    at: AtomicU64,
    has_moved: Notify,
}

impl Mark {
    /// It is at least there.
    fn pass(&self, at: u64) {
        if self.at.fetch_max(at, Ordering::AcqRel) < at {
            self.has_moved.notify_waiters();
        }
    }
    /// Waits until it is at least there.
    async fn reached(&self, at: u64) {
        loop {
            let mut moves = std::pin::pin!(self.has_moved.notified());
            moves.as_mut().enable(); // before looking, so that none is missed
            if self.at.load(Ordering::Acquire) >= at {
                return;
            }
            moves.await;
        }
    }
}

impl PostgresStore {
    /// Records that this node has read.
    pub fn records(&self) -> u64 {
        self.core.state.lock().tail.seq
    }
}

impl Drop for PostgresStore {
    fn drop(&mut self) {
        // Whoever forgot to close it leaves no tasks behind; its run is declared over by others.
        self.core.state.lock().inner.is_closed = true;
        self.core.stopping.cancel();
        self.core.wake.notify_one();
    }
}

impl Core {
    fn write_id(&self) -> WriteId {
        let mut id = WriteId::default();
        self.random.fill(&mut id);
        id
    }
    /// That long from now, on the boot-time clock in milliseconds.
    fn in_ms(&self, time: Duration) -> u64 {
        self.runtime.boot_ms() + u64::try_from(time.as_millis()).unwrap_or(u64::MAX / 2)
    }
}

/// A deadline is on the clock of the node that decides: they must not be far apart.
fn check_clock(theirs: Timestamp, ours: Timestamp) -> Result<(), OpenError> {
    let apart_ms = theirs.ms_since(ours).max(ours.ms_since(theirs));
    if apart_ms <= CLOCKS_APART_MS_MAX { Ok(()) } else { Err(OpenError::Clock { apart_secs: apart_ms / 1000 }) }
}

fn check_schema(schema: &str) -> Result<(), OpenError> {
    let is_plain = schema.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    let begins = schema.bytes().next().is_some_and(|b| b.is_ascii_lowercase());
    if is_plain && begins && schema.len() <= SCHEMA_BYTES_MAX {
        return Ok(());
    }
    let what = format!(
        "the store's `schema` has 1 to {SCHEMA_BYTES_MAX} small letters, digits and `_`, and begins with a letter"
    );
    Err(OpenError::Settings(what))
}

/// As the database takes numbers. Sequence numbers and moments don't reach its limit.
fn num(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn unnum(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}

fn hash(bytes: Vec<u8>) -> Result<Hash, Trouble> {
    let bytes = bytes.try_into().map_err(|_| Trouble::Unreadable("a hash in the database is none".into()))?;
    Ok(Hash(bytes))
}

fn agent_key(agent: &AgentId) -> Vec<u8> {
    Digest::of_bytes(agent.as_str().as_bytes()).as_bytes().to_vec()
}

fn task_key_bytes(task: &TaskKey) -> Vec<u8> {
    Digest::of_bytes(format!("{}\0{}", task.agent, task.task).as_bytes()).as_bytes().to_vec()
}

const fn grant_of(job: Job) -> GrantId {
    match job {
        Job::Deadline(id) | Job::Lease(id, _) => id,
    }
}
