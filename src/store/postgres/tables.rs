//! The seam between what a node decides and the database that keeps it: what the tables are asked, in the words of the
//! store. `sql_tables.rs` is the one of production; the simulation has another, in memory, whose answers can get lost.

use async_trait::async_trait;

use super::OpenError;
use crate::audit::merkle::Hash;
use crate::core::digest::Digest;
use crate::core::id::{GrantId, LeaseId, Timestamp};
use crate::store::{Job, StoreError};

/// Names a write, for whoever has to look up whether it came through.
pub type WriteId = [u8; 16];
/// The number of a run.
pub type Run = i64;

/// Rows in one answer to [`Tables::since`].
pub const ROWS: usize = 2000;

/// Why the database gave no answer, or a bad one.
#[derive(Debug, Clone)]
pub enum Trouble {
    /// It said no: nothing of what was asked has happened. With the SQLSTATE.
    Refused(String, String),
    /// Whatever was asked may have happened, or happens yet.
    Lost(String),
    /// There is something in it that can't be read.
    Unreadable(String),
}

impl Trouble {
    pub(super) fn says(&self) -> &str {
        match self {
            Self::Refused(_, text) | Self::Lost(text) | Self::Unreadable(text) => text,
        }
    }
    /// May it go well another time, by itself?
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Refused(code, _) => matches!(code.as_str(), "40001" | "40P01" | "55P03" | "57014" | "53300"),
            Self::Lost(_) => true,
            Self::Unreadable(_) => false,
        }
    }
}

impl From<Trouble> for StoreError {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Unreadable(what) => Self::Unreadable(what),
            Trouble::Refused(..) | Trouble::Lost(_) => Self::Unavailable(format!(
                "the database does not answer as it should: {}. Nothing is minted until it does; it is tried again by itself",
                trouble.says()
            )),
        }
    }
}

/// What a record is looked for by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// By its grant, or not at all.
    Other,
    /// A freeze, or its lifting.
    Freeze,
    /// A start.
    Run,
}

/// A record to be written.
#[derive(Debug, Clone)]
pub struct NewRecord {
    /// Its place.
    pub seq: u64,
    /// As its leaf tells it.
    pub at: Timestamp,
    /// What it is looked for by.
    pub kind: Kind,
    /// Whose it is.
    pub grant: Option<GrantId>,
    /// Records that follow in its batch.
    pub left: u32,
    /// Its leaf hash.
    pub leaf: Hash,
    /// Its bytes.
    pub payload: Vec<u8>,
}

/// A grant as a write leaves it.
#[derive(Debug, Clone)]
pub struct GrantRow {
    /// Which.
    pub id: GrantId,
    /// Its version.
    pub version: u64,
    /// Is it not final?
    pub is_open: bool,
    /// When it became final, if it is.
    pub over: Timestamp,
    /// Its idempotency digest: no two grants have the same.
    pub twin: Option<Digest>,
    /// Its agent's key.
    pub agent: Vec<u8>,
    /// Its first record.
    pub asked_seq: u64,
    /// The moment of that.
    pub asked_at: Timestamp,
    /// The record that put it in force, if this write has that.
    pub active_seq: Option<u64>,
    /// All of it.
    pub body: Vec<u8>,
}

/// What is held, as a write leaves it.
#[derive(Debug, Clone)]
pub struct HoldingRow {
    /// By whom, of what.
    pub key: Vec<u8>,
    /// Can be forgotten after this.
    pub until: Timestamp,
    /// All of it; empty: nothing is held any more.
    pub body: Vec<u8>,
}

/// Work, as a write leaves it.
#[derive(Debug, Clone)]
pub struct DueRow {
    /// Which.
    pub job: Job,
    /// From when on; `None`: it isn't due.
    pub at: Option<Timestamp>,
    /// Tells it from the next of the same name.
    pub attempt: i64,
    /// Is it a mint that the writing run is at?
    pub is_intended: bool,
    /// What is handed out before what.
    pub rank: i16,
}

/// The record's end that a write makes.
#[derive(Debug, Clone)]
pub struct NewTail {
    /// The last record.
    pub seq: u64,
    /// Its leaf.
    pub leaf: Hash,
    /// The tree's frontier.
    pub tree: Vec<u8>,
    /// The latest moment since the latest run started.
    pub at: Timestamp,
}

/// A write that can be sent, again and again until its outcome is known.
#[derive(Debug, Clone)]
pub struct Write {
    /// Its name.
    pub id: WriteId,
    /// Who writes.
    pub run: Run,
    /// The record's end on which it rests: sequence number and leaf.
    pub base: (u64, Hash),
    /// The end that it makes.
    pub next: NewTail,
    /// What is recorded.
    pub records: Vec<NewRecord>,
    /// What becomes of grants.
    pub grants: Vec<GrantRow>,
    /// Keys of tasks that are completed.
    pub tasks: Vec<Vec<u8>>,
    /// What becomes of holdings.
    pub holdings: Vec<HoldingRow>,
    /// What becomes of the work that is due.
    pub due: Vec<DueRow>,
}

/// A record as it came from the database.
#[derive(Debug, Clone)]
pub struct Row {
    /// Its place.
    pub seq: u64,
    /// As its leaf tells it.
    pub at: Timestamp,
    /// Its leaf hash, as it was written.
    pub leaf: Hash,
    /// Its bytes.
    pub payload: Vec<u8>,
    /// The write that it came with.
    pub write: WriteId,
}

/// Where the record ends, and how a run stands.
#[derive(Debug, Clone)]
pub struct Standing {
    /// The last record.
    pub seq: u64,
    /// Its leaf.
    pub leaf: Hash,
    /// Was the run declared over?
    pub is_over: bool,
}

/// Everything that a node reads when it starts, at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The record's end.
    pub tail: NewTail,
    /// All freezes and liftings, and the latest start: sequence numbers and bytes.
    pub told: Vec<(u64, Vec<u8>)>,
    /// What is held.
    pub holdings: Vec<Vec<u8>>,
    /// Grants that are open.
    pub open: Vec<Vec<u8>>,
    /// Size of the latest checkpoint.
    pub checkpoint_size: u64,
}

/// A job that was handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Claimed {
    /// What goes before what.
    pub rank: i16,
    /// Since when it is due.
    pub at: Timestamp,
    /// What.
    pub job: Job,
    /// The claim's number: only with it can it be given back.
    pub epoch: i64,
}

/// What is known of an agent: when it first asked, its latest requests (newest first), the latest that was in force.
#[derive(Debug, Clone, Default)]
pub struct KnownBy {
    /// When it first asked, if ever.
    pub first: Option<Timestamp>,
    /// Its latest requests, newest first.
    pub recent: Vec<GrantId>,
    /// The latest that was in force.
    pub active: Option<GrantId>,
}

/// The tables. All deadlines in them are on the database's own clock.
#[async_trait]
pub trait Tables: Send + Sync + 'static {
    /// The database's clock.
    async fn now(&self) -> Result<Timestamp, Trouble>;
    /// Makes the tables, or brings them up to date.
    async fn prepare(&self) -> Result<(), OpenError>;
    /// The first node says by which keys all are known. Are these the ones?
    async fn has_keys(&self, keys: &Digest) -> Result<bool, Trouble>;
    /// Everything that is open, at one moment.
    async fn load(&self) -> Result<Snapshot, Trouble>;

    /// Everything in it happens, if the record ends where it rests and its run isn't over; else nothing does, and it is
    /// false. Sent once: what its error means for it is the caller's to find out.
    async fn write(&self, write: &Write) -> Result<bool, Trouble>;
    /// Records behind this one, in their order, at most [`ROWS`].
    async fn since(&self, seq: u64) -> Result<Vec<Row>, Trouble>;
    /// Where the record ends. `None`: the tables are empty.
    async fn standing(&self, run: Run) -> Result<Option<Standing>, Trouble>;

    /// Those of the grants that are there.
    async fn grants(&self, ids: &[GrantId]) -> Result<Vec<Vec<u8>>, Trouble>;
    /// Those of the idempotency digests that are there, and whose they are.
    async fn twins(&self, digests: &[Digest]) -> Result<Vec<(Digest, GrantId)>, Trouble>;
    /// Those of the tasks, by their keys, that are completed.
    async fn tasks(&self, keys: &[Vec<u8>]) -> Result<Vec<Vec<u8>>, Trouble>;
    /// Final grants, latest first.
    async fn decided(&self, limit: usize) -> Result<Vec<Vec<u8>>, Trouble>;
    /// The records of a grant.
    async fn records(&self, id: GrantId) -> Result<Vec<(u64, Vec<u8>)>, Trouble>;
    /// What is known of an agent, by its key, with at most so many requests.
    async fn history(&self, agent: &[u8], recent: usize) -> Result<KnownBy, Trouble>;

    /// Hands out work that is due at `now` to a run, unless another has it, for so long.
    async fn claim(&self, now: Timestamp, limit: usize, run: Run, lease_ms: u64) -> Result<Vec<Claimed>, Trouble>;
    /// Gives it back, if it is still this claim's.
    async fn release(&self, job: Job, run: Run, epoch: i64) -> Result<(), Trouble>;
    /// Mints that runs which are over were at.
    async fn abandoned(&self) -> Result<Vec<(GrantId, LeaseId)>, Trouble>;

    /// Begins a run that goes on for so long.
    async fn join(&self, lasts_ms: u64) -> Result<Run, Trouble>;
    /// It goes on for so long from now. Tells where the record ends: the last record and its leaf. `None`: the run was
    /// declared over.
    async fn renew(&self, run: Run, lasts_ms: u64) -> Result<Option<(u64, Hash)>, Trouble>;
    /// It is over.
    async fn leave(&self, run: Run) -> Result<(), Trouble>;
    /// Declares over all others whose time is up. Returns them.
    async fn declare(&self, but: Run) -> Result<Vec<Run>, Trouble>;

    /// These grants gave a sign of life.
    async fn beat(&self, grants: &[GrantId]) -> Result<(), Trouble>;
    /// For how many milliseconds those that ever did haven't.
    async fn silent_ms(&self, grants: &[GrantId]) -> Result<Vec<(GrantId, u64)>, Trouble>;

    /// Keeps a signed checkpoint of that size, if the last record that it covers is there with this leaf.
    async fn checkpoint(&self, size: u64, leaf: &Hash, note: &str) -> Result<(), Trouble>;
    /// Forgets what nobody asks about any more; holdings that were over at `reach`.
    async fn prune(&self, reach: Timestamp) -> Result<(), Trouble>;
}
