//! What the engine rests on: a log that makes bytes durable, and an archive that keeps what has left memory.

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::core::digest::Digest;
use crate::core::event::{BrokerEvent, Event, GrantEvent};
use crate::core::id::{AgentId, GrantId, TaskKey, Timestamp};
use crate::store::holdings::{Holding, HoldingKey};
use crate::store::view::{KnownAgent, Stored};
use crate::store::{Freezes, StoreError};

/// Makes bytes durable, in the order in which they are given.
pub trait Log: Send + Sync + 'static {
    /// Queues a batch. The answer comes once it is durable, or refused; an error here means that it was not queued.
    /// With `rests_on`, the batch is refused with [`StoreError::Conflict`] if any batch was refused since
    /// [`Log::generation`] returned that number. `open` grants will be open once the batch is durable: a log that can
    /// run out of space keeps enough for their endings (guarantee 8).
    fn enqueue(
        &self,
        payloads: Vec<Vec<u8>>,
        urgent: bool,
        rests_on: Option<u64>,
        open: usize,
    ) -> Result<BoxFuture<'static, Result<Receipt, StoreError>>, StoreError>;
    /// Changes, before the answer comes, each time that a queued batch is refused.
    fn generation(&self) -> u64;
    /// Reads records by their sequence numbers (ascending).
    fn read(&self, seqs: &[u64]) -> Result<Vec<(u64, Vec<u8>)>, StoreError>;
    /// Why nothing can be written until it is recovered, if so. A full disk is no such reason.
    fn stopped(&self) -> Option<StoreError>;
    /// Makes the log writable again after a failure; nothing unacknowledged is left in it.
    fn recover(&self) -> BoxFuture<'_, Result<(), StoreError>>;
    /// Figures.
    fn figures(&self) -> Vec<(&'static str, u64)>;
    /// Closes in good order.
    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>>;
}

/// A durable batch.
#[derive(Debug, Clone, Copy)]
pub struct Receipt {
    /// Sequence number of its first record.
    pub first_seq: u64,
    /// Leaf hash of its last record.
    pub leaf: [u8; 32],
}

/// A record in the log: an event and the broker's time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// When, on the broker's clock.
    pub at: Timestamp,
    /// What.
    pub event: Event,
}

#[derive(Serialize)]
struct RecordRef<'a> {
    at: Timestamp,
    event: &'a Event,
}

/// A record's payload.
pub(in crate::store) fn write_record(at: Timestamp, event: &Event) -> Result<Vec<u8>, StoreError> {
    let mut out = Vec::with_capacity(512);
    serde_json::to_writer(&mut out, &RecordRef { at, event }).map_err(|e| StoreError::Impossible(e.to_string()))?;
    Ok(out)
}

/// A record about a grant. Read as such, all that it holds is copied once less than where the kind is found out first: the
/// same is accepted, and nearly all records are of this kind.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GrantRecord {
    at: Timestamp,
    event: OfGrant,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OfGrant {
    #[serde(rename = "of")]
    _of: GrantTag,
    id: GrantId,
    version: u64,
    what: Box<GrantEvent>,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum GrantTag {
    Grant,
}

/// Reads a record's payload.
pub fn read_record(seq: u64, bytes: &[u8]) -> Result<Record, StoreError> {
    if let Ok(GrantRecord { at, event: OfGrant { id, version, what, .. } }) = serde_json::from_slice(bytes) {
        return Ok(Record { at, event: Event::Grant { id, version, what } });
    }
    serde_json::from_slice(bytes).map_err(|e| StoreError::Unreadable(format!("record {seq} is not an event: {e}")))
}

/// What an archive is given to keep.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// It contains everything up to here.
    pub seq: u64,
    /// The leaf hash of that record.
    pub leaf: [u8; 32],
    /// Grants that changed.
    pub grants: Vec<Stored>,
    /// Tasks that were completed.
    pub tasks: Vec<TaskKey>,
    /// Holdings that changed; `None`: gone.
    pub holdings: Vec<(HoldingKey, Option<Holding>)>,
    /// Agents whose history changed.
    pub agents: Vec<(AgentId, KnownAgent)>,
    /// The freezes.
    pub freezes: Freezes,
    /// The latest run.
    pub run: Option<BrokerEvent>,
    /// The latest moment since it started.
    pub last_at: Timestamp,
}

/// Keeps what has left memory. Never the truth: it can be rebuilt from the log.
pub trait Archive: Send + Sync + 'static {
    /// Keeps a snapshot. May keep it in parts, if grants come last but for the position: records are replayed on top
    /// of what is ahead of the position.
    fn keep(&self, snapshot: &Snapshot) -> Result<(), StoreError>;
    /// A grant.
    fn grant(&self, id: GrantId) -> Result<Option<Stored>, StoreError>;
    /// The grant of an idempotency digest.
    fn by_idempotency(&self, digest: &Digest) -> Result<Option<GrantId>, StoreError>;
    /// Was the task completed?
    fn task_completed(&self, task: &TaskKey) -> Result<bool, StoreError>;
    /// What is known of an agent.
    fn agent(&self, agent: &AgentId) -> Result<Option<KnownAgent>, StoreError>;
    /// Final grants, latest first, then by id.
    fn decided(&self, limit: usize) -> Result<Vec<Stored>, StoreError>;
    /// Figures.
    fn figures(&self) -> Vec<(&'static str, u64)>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::conformance::kit::{START, ask};

    /// What is read in one go is what is read by its kind, and nothing else is accepted.
    #[test]
    fn a_record_is_read_the_same_in_both_ways() {
        let task = r#"{"at":7,"event":{"of":"unfrozen","id":3,"by":"ana"}}"#.to_owned();
        let written = |event: &Event| String::from_utf8(write_record(START, event).expect("it can be written"));
        let mut texts: Vec<String> = ask(1).events().iter().map(|e| written(e).expect("UTF-8")).collect();
        texts.push(task);
        assert!(texts.len() > 3, "{texts:#?}");
        for text in texts {
            let by_kind: Record = serde_json::from_str(&text).expect("it is a record");
            assert_eq!(read_record(1, text.as_bytes()).expect("it is a record"), by_kind);
            for (from, to) in [
                ("\"of\":", "\"also\":1,\"of\":"),
                ("\"event\":{\"of\"", "\"also\":1,\"event\":{\"of\""),
                ("\"what\":{", "\"what\":{\"also\":1,"),
                ("\"of\":\"grant\"", "\"of\":\"grant\",\"of\":\"grant\""),
                ("\"of\":\"grant\"", "\"of\":\"grants\""),
                ("\"version\":", "\"versions\":"),
            ] {
                let changed = text.replacen(from, to, 1);
                let is_refused = serde_json::from_str::<Record>(&changed).is_err();
                assert_eq!(read_record(1, changed.as_bytes()).is_err(), is_refused, "{changed}");
                assert_eq!(is_refused, changed != text, "{changed}");
            }
        }
    }
}
