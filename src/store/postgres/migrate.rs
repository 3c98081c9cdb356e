//! The history of an embedded broker, moved into the database: the very bytes of each record, so leaf for leaf and root for
//! root the same. It can be stopped and started again; it goes on where it was.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

use tokio::sync::oneshot;

use super::{OpenError, PostgresStore, Settings, open};
use crate::audit::disk::{RealDisk, lock_journal};
use crate::audit::merkle::Hash;
use crate::audit::note::Signer;
use crate::audit::reader::read_from;
use crate::audit::verify::{Options, Report, verify};
use crate::core::id::Timestamp;
use crate::keys::random::Random;
use crate::runtime::Runtime;
use crate::store::engine::head::No;
use crate::store::engine::read_record;
use crate::store::{Appended, Batch, Store, StoreError};

/// Batches on their way at once.
const AHEAD: usize = 256;

/// What was moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// Records that are in the database now.
    pub records: u64,
    /// Of them, those that had been there before.
    pub before: u64,
    /// The root of both.
    pub root: Hash,
}

fn bad(what: impl std::fmt::Display) -> OpenError {
    OpenError::Settings(what.to_string())
}

/// Moves the journal in `dir`, whose broker must not run, into the database, which must be empty or hold a beginning of it.
/// The journal stays as it is.
pub async fn migrate(
    settings: &Settings,
    runtime: Arc<dyn Runtime>,
    random: Arc<dyn Random>,
    signer: Signer,
    dir: &Path,
    options: &Options,
) -> Result<Moved, OpenError> {
    let _lock = lock_journal(&RealDisk, dir).map_err(bad)?;
    let verified = match verify(dir, options).map_err(bad)? {
        Report::Verified(verified) => verified,
        Report::Broken(broken) => return Err(bad(broken)),
    };
    let store = open(settings, runtime, random, Some(signer)).await?;
    let outcome = copy(&store, dir).await;
    store.close().await?;
    let before = outcome?;
    let (seq, root) = {
        let state = store.core.state.lock();
        (state.tail.seq, state.tail.tree.root())
    };
    if (seq, root) != (verified.last_seq, verified.root) {
        return Err(bad(format!(
            "the database holds {seq} records with root {root}, the journal {} with root {}: they are not the same \
             history. Nothing of the journal was changed; use another schema, or drop this one, and start again",
            verified.last_seq, verified.root
        )));
    }
    Ok(Moved { records: seq, before, root })
}

async fn copy(store: &PostgresStore, dir: &Path) -> Result<u64, OpenError> {
    let (before, leaf) = {
        let state = store.core.state.lock();
        (state.tail.seq, state.tail.leaf)
    };
    let mut records = read_from(dir, before.max(1)).map_err(bad)?;
    let (mut events, mut payloads) = (Vec::new(), Vec::new());
    let mut ahead: VecDeque<oneshot::Receiver<Result<Appended, StoreError>>> = VecDeque::new();
    let mut is_joined = before == 0;
    while let Some(record) = records.next_record().map_err(bad)? {
        if record.meta.seq <= before {
            // The last one that is there must be the one of this journal.
            is_joined |= record.meta.seq == before && record.leaf == leaf;
            continue;
        }
        let read = read_record(record.meta.seq, record.payload)?;
        events.push(read.event);
        payloads.push((Timestamp(record.meta.at_ms), record.payload.to_vec()));
        if record.meta.batch_left > 0 {
            continue;
        }
        if !is_joined {
            break;
        }
        let batch = Batch { expect: Vec::new(), events: std::mem::take(&mut events), at: read.at, urgent: true };
        match store.queue(batch, std::mem::take(&mut payloads)).await {
            Ok(answer) => ahead.push_back(answer),
            Err(No::Error(error)) => return Err(error.into()),
            Err(No::Conflict | No::Wait) => return Err(bad(not_empty())),
        }
        if ahead.len() >= AHEAD
            && let Some(answer) = ahead.pop_front()
        {
            done(answer).await?;
        }
    }
    for answer in ahead {
        done(answer).await?;
    }
    if is_joined { Ok(before) } else { Err(bad(not_empty())) }
}

async fn done(answer: oneshot::Receiver<Result<Appended, StoreError>>) -> Result<(), OpenError> {
    answer.await.unwrap_or_else(|_| Err(crate::store::engine::closed())).map(|_| ()).map_err(OpenError::from)
}

fn not_empty() -> &'static str {
    "the database holds another history: name an empty schema, and let no node write there meanwhile"
}
