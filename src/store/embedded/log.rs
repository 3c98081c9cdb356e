//! The journal, as the engine's log.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;

use super::journal::{self, Acknowledged, Batch, Journal, Opened, Options, Stepper};
use crate::audit::disk::{Disk, RealDisk};
use crate::audit::pick::pick;
use crate::audit::reader;
use crate::store::StoreError;
use crate::store::engine::{Log, Receipt};
use crate::time::Clock;

/// Disk space that is kept ready for the ending of each open grant (guarantee 8), in bytes: what the events of an
/// ending with a few leases take.
const ENDING_BYTES: u64 = 4096;

/// The journal, as the engine's log.
pub struct JournalLog {
    journal: Journal,
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    /// Its writer is gone: only a new start helps.
    is_gone: AtomicBool,
    lock: Mutex<Option<File>>,
}

impl From<journal::Error> for StoreError {
    fn from(error: journal::Error) -> Self {
        match error {
            journal::Error::Stale => Self::Conflict,
            // Too large, or too many: said before anything is queued.
            journal::Error::Audit(why) => Self::Impossible(why.to_string()),
            other => Self::Unavailable(other.to_string()),
        }
    }
}

impl JournalLog {
    /// Opens the journal in `dir`. `lock` is held until it is closed.
    pub(super) fn open(
        dir: PathBuf,
        options: Options,
        clock: Arc<dyn Clock>,
        known: &Acknowledged,
        lock: File,
    ) -> Result<(Self, Opened), journal::Error> {
        let (journal, opened) = Journal::open(&dir, options, clock, known)?;
        Ok((Self::around(journal, Arc::new(RealDisk), dir, Some(lock)), opened))
    }

    /// On any disk; the caller drives the writer (simulations, fault tests).
    pub fn open_stepped(
        disk: Arc<dyn Disk>,
        dir: &Path,
        options: Options,
        clock: Arc<dyn Clock>,
        known: &Acknowledged,
    ) -> Result<(Self, Stepper, Opened), journal::Error> {
        let (journal, stepper, opened) = Journal::open_stepped(Arc::clone(&disk), dir, options, clock, known)?;
        Ok((Self::around(journal, disk, dir.to_owned(), None), stepper, opened))
    }

    fn around(journal: Journal, disk: Arc<dyn Disk>, dir: PathBuf, lock: Option<File>) -> Self {
        Self { journal, disk, dir, is_gone: AtomicBool::new(false), lock: Mutex::new(lock) }
    }

    /// All records from `from` on.
    pub(super) fn records(&self, from: u64) -> Result<reader::Records, crate::audit::Error> {
        reader::read_from_on(Arc::clone(&self.disk), &self.dir, from)
    }
}

impl Log for JournalLog {
    fn enqueue(
        &self,
        payloads: Vec<Vec<u8>>,
        urgent: bool,
        rests_on: Option<u64>,
        open: usize,
    ) -> Result<BoxFuture<'static, Result<Receipt, StoreError>>, StoreError> {
        let reserve_bytes = open as u64 * ENDING_BYTES;
        let batch = Batch { payloads, ending: urgent, generation: rests_on, reserve_bytes };
        let pending = self.journal.enqueue(batch).inspect_err(|e| {
            if matches!(e, journal::Error::Closed) {
                self.is_gone.store(true, Ordering::Release);
            }
        })?;
        Ok(async move {
            let done = pending.await?;
            Ok(Receipt { first_seq: done.first_seq, leaf: done.leaf.0 })
        }
        .boxed())
    }

    fn generation(&self) -> u64 {
        self.journal.generation()
    }

    fn read(&self, seqs: &[u64]) -> Result<Vec<(u64, Vec<u8>)>, StoreError> {
        let picked = pick(&*self.disk, &self.dir, seqs, |seq| self.journal.place(seq));
        picked.map_err(|e| StoreError::Unreadable(e.to_string()))
    }

    fn stopped(&self) -> Option<StoreError> {
        if self.is_gone.load(Ordering::Acquire) {
            return Some(journal::Error::WriterGone.into());
        }
        self.journal.poisoned().map(StoreError::from)
    }

    fn recover(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        async {
            if let Some(why) = self.journal.poisoned() {
                self.journal.reopen().await?;
                tracing::warn!(%why, "the journal had stopped; it was verified anew and is written again");
            }
            self.stopped().map_or(Ok(()), Err)
        }
        .boxed()
    }

    fn figures(&self) -> Vec<(&'static str, u64)> {
        let c = self.journal.counts();
        vec![
            ("journal_syncs", c.syncs),
            ("journal_batches", c.batches),
            ("journal_records", c.records),
            ("journal_bytes", c.bytes),
            ("journal_refused_no_space", c.refused_no_space),
            ("journal_reserve_ready_bytes", c.reserve_ready_bytes),
        ]
    }

    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        async {
            let closed = self.journal.close().await;
            *self.lock.lock() = None;
            Ok(closed?)
        }
        .boxed()
    }
}
