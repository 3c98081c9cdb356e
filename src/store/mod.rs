//! Where events become durable, and what they add up to.
//!
//! [`Store`] is the seam: `embedded` is one process with a disk, `postgres` several nodes with one database;
//! `conformance.rs` is the suite that each must pass.

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod conforms;
mod due;
pub mod embedded;
pub mod engine;
pub mod holdings;
pub mod memory;
pub mod postgres;
pub mod tls;
pub mod view;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::core::digest::Digest;
use crate::core::event::{BrokerEvent, Event, Selector};
use crate::core::grant::Grant;
use crate::core::id::{AgentId, GrantId, LeaseId, PersonId, TaskKey, Timestamp};
use crate::core::permission::Permission;

/// Most events in one batch.
pub const BATCH_EVENTS_MAX: usize = 4096;

/// Events that become durable together or not at all.
#[derive(Debug, Clone)]
pub struct Batch {
    /// What must still be true.
    pub expect: Vec<Expect>,
    /// What happened. For each grant, versions follow on without gaps.
    pub events: Vec<Event>,
    /// When, on the broker's clock.
    pub at: Timestamp,
    /// True for endings: they may use the space that is reserved for them (guarantee 8).
    pub urgent: bool,
}

/// A condition of a batch. Grants that the batch changes are compared by their events' versions anyway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expect {
    /// This grant, which the batch does not change, is still at this version.
    Version(GrantId, u64),
    /// This task has not been completed.
    TaskOpen(TaskKey),
    /// Of this agent's grants, fewer than so many are pending, and fewer than so many are not final. What is on its way
    /// counts too.
    OpenBelow {
        /// Whose.
        agent: AgentId,
        /// Pending ones.
        pending: usize,
        /// Those that are not final, pending ones too.
        open: usize,
    },
    /// No freeze was made or lifted since this number was read, not even in an earlier run.
    FreezeEpoch(u64),
}

/// A batch that is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// Sequence number of the first event.
    pub first_seq: u64,
    /// Sequence number of the last one.
    pub last_seq: u64,
}

/// Why a batch was not appended. Nothing of it is there.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// Somebody else was first: read again and decide again.
    #[error("the record changed meanwhile; read it again")]
    Conflict,
    /// The events don't follow from what is there: a bug, never the user's doing.
    #[error("impossible event: {0}")]
    Impossible(String),
    /// The journal can't be written. Nothing is minted until it can (guarantee 8). Of a write whose answer is out, what is
    /// decided next sees it, and comes behind it or not at all.
    #[error("not recorded: {0}")]
    Unavailable(String),
    /// Something stored can't be read.
    #[error("the store can't be read: {0}")]
    Unreadable(String),
}

/// A freeze that holds.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Freeze {
    /// Its number.
    pub id: u64,
    /// What it covers.
    pub selector: Selector,
    /// Who did it.
    pub by: PersonId,
    /// Why.
    pub reason: String,
    /// When.
    pub at: Timestamp,
}

/// The freezes that hold, and the number that changes with them.
#[derive(Debug, Clone, Default)]
pub struct Freezes {
    /// The sequence number of the latest freeze or lifting: never the same for two different sets, in any run.
    pub epoch: u64,
    /// Those that hold.
    pub holding: Vec<Freeze>,
}

/// Something that an agent holds, or held within the window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The agent.
    pub agent: AgentId,
    /// What.
    pub permission: Permission,
    /// Until when it held it, or will.
    pub until: Timestamp,
}

/// Work that is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Job {
    /// A deadline of a grant has come: lapse or expire it.
    Deadline(GrantId),
    /// A lease is to be ended, or looked for.
    Lease(GrantId, LeaseId),
}

/// A record as it stands in the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    /// Its sequence number.
    pub seq: u64,
    /// When, on the broker's clock.
    pub at: Timestamp,
    /// What.
    pub event: Event,
}

/// What this broker knows of an agent from earlier requests.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct AgentHistory {
    /// When it first asked.
    pub first_seen: Timestamp,
    /// Its latest grants, newest last, bounded.
    pub recent: Vec<GrantId>,
    /// The latest that was in force.
    pub last_active: Option<GrantId>,
}

/// The store. Every reading method shows what is durable, never more, but for those that say that they show the head.
///
/// Beyond what a batch expects, the store itself keeps that no two grants have the same idempotency digest, that a
/// grant which is taken out of force before its time takes everything below it along (guarantee 7), and that a task is
/// completed together with the last of its grants that wait or are in force: a batch that would break this is a
/// [`StoreError::Conflict`].
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Appends a batch: atomic, and durable when it returns. After [`StoreError::Conflict`] the reading methods show
    /// what it conflicted with.
    async fn append(&self, batch: Batch) -> Result<Appended, StoreError>;

    /// The grant as the next batch must find it; may be ahead of what is durable. For deciding only.
    async fn head(&self, id: GrantId) -> Result<Option<Arc<Grant>>, StoreError>;
    /// The grant.
    async fn grant(&self, id: GrantId) -> Result<Option<Arc<Grant>>, StoreError>;
    /// Waits until the grant is no longer at `version` (0: not there), at most so long; then the grant.
    async fn changed(&self, id: GrantId, version: u64, wait: Duration) -> Result<Option<Arc<Grant>>, StoreError>;
    /// The grant, and everything below it that is not final, parents first, as [`Store::head`] shows them.
    async fn subtree(&self, id: GrantId) -> Result<Vec<Arc<Grant>>, StoreError>;
    /// Grants of a task that are not final, as [`Store::head`] shows them.
    async fn task_grants(&self, task: &TaskKey) -> Result<Vec<Arc<Grant>>, StoreError>;
    /// Those of them that hang from another grant, or that others have hung from: the trees of a task are found by them.
    async fn task_links(&self, task: &TaskKey) -> Result<Vec<GrantId>, StoreError>;
    /// Was the task completed?
    async fn task_completed(&self, task: &TaskKey) -> Result<bool, StoreError>;
    /// Everything that is not final.
    async fn open_grants(&self) -> Result<Vec<Arc<Grant>>, StoreError>;
    /// How many grants of this agent are pending, and how many are not final.
    async fn open_counts(&self, agent: &AgentId) -> Result<(usize, usize), StoreError>;
    /// Final grants, latest first.
    async fn decided(&self, limit: usize) -> Result<Vec<Arc<Grant>>, StoreError>;
    /// The grant that a request with this idempotency digest made. Waits for one that is on its way.
    async fn by_idempotency(&self, digest: &Digest) -> Result<Option<Arc<Grant>>, StoreError>;
    /// What this agent, and other agents for this owner, hold or held since a moment (at most
    /// [`holdings::WINDOW_SECS_MAX`] back), leaving out what only `except` gave. A grant holds from its activation
    /// until the last proof of its end. What several others held alike is told once.
    async fn held(
        &self,
        agent: &AgentId,
        owner: Option<&PersonId>,
        since: Timestamp,
        except: Option<GrantId>,
    ) -> Result<Vec<Held>, StoreError>;
    /// What the grants of a task hold or held since a moment, as [`Store::held`] counts it, leaving out what only
    /// `except` gave. Beyond [`holdings::TASKS_MAX`] tasks with one permission, what the earliest held is told for all.
    async fn held_in_task(
        &self,
        task: &TaskKey,
        since: Timestamp,
        except: Option<GrantId>,
    ) -> Result<Vec<Permission>, StoreError>;
    /// What is known of an agent.
    async fn history(&self, agent: &AgentId) -> Result<Option<AgentHistory>, StoreError>;
    /// The freezes that hold.
    async fn freezes(&self) -> Result<Freezes, StoreError>;
    /// The open lease of that name at its target, as the head has it: a sweep must not take for an orphan what is
    /// about to be.
    async fn lease_named(&self, name: &str) -> Result<Option<(GrantId, LeaseId)>, StoreError>;
    /// Everything that happened to a grant, oldest first.
    async fn events(&self, id: GrantId) -> Result<Vec<Recorded>, StoreError>;
    /// The latest `RunStarted`, and the latest moment since then ([`view::last_at`]), of the journal as it was opened.
    async fn last_run(&self) -> Result<(Option<BrokerEvent>, Timestamp), StoreError>;

    /// Hands out work that is due at `now`, at most `limit`: leases that a freeze ends first; then deadlines, and leases
    /// that were taken away; then all other leases. Among equals, what is due longest comes first. It is handed out again after `lease_for` unless
    /// an event or [`Store::release`] settled it.
    async fn claim(&self, now: Timestamp, lease_for: Duration, limit: usize) -> Result<Vec<Job>, StoreError>;
    /// Gives a job back at once.
    async fn release(&self, job: Job);
    /// Waits until something may be due: until the next known moment after `now`, at most so long.
    async fn due(&self, now: Timestamp, wait: Duration);

    /// Whatever any node had acknowledged when this was called is shown by the reading methods once it returns. Nothing to
    /// do where there is one process.
    async fn refresh(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// Leases that are intended, and whose run is over: nobody mints them any more. What a run before this process's left
    /// is told from the start; with several nodes, what another leaves when it dies is told as soon as it is known.
    async fn abandoned(&self) -> Result<Vec<(GrantId, LeaseId)>, StoreError>;
    /// These grants gave a sign of life here. Nothing to do where there is one process.
    async fn alive(&self, _grants: &[GrantId]) -> Result<(), StoreError> {
        Ok(())
    }
    /// For how long each of these grants has given no sign of life to any node, in milliseconds, as far as others know.
    async fn silent_ms(&self, _grants: &[GrantId]) -> Result<HashMap<GrantId, u64>, StoreError> {
        Ok(HashMap::new())
    }

    /// Tries to write again after [`StoreError::Unavailable`].
    async fn recover(&self) -> Result<(), StoreError>;
    /// True while the store can be written.
    fn is_writable(&self) -> bool;
    /// Figures for `/metrics` and the benchmark: name → value.
    fn figures(&self) -> Vec<(&'static str, u64)>;
    /// Writes a checkpoint and closes in good order.
    async fn close(&self) -> Result<(), StoreError>;
}
