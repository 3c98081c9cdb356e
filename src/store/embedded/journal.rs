//! The journal's writer: batches in, durable records out, in order, one `fdatasync` for all that is queued
//! (DESIGN section 5). Payloads are opaque bytes here; formats and reading are in the room `audit`.

mod active;
mod error;
mod queue;
mod recover;
mod state;
mod writer;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::audit::checkpoint::Checkpoint;
use crate::audit::disk::{Disk, RealDisk};
use crate::audit::frame;
use crate::audit::merkle::Hash;
use crate::audit::note::{Signer, Verifier};
use crate::audit::pick::Mark;
use crate::time::Clock;

pub use error::Error;
pub use queue::{QUEUE_BATCHES_MAX, QUEUE_BYTES_MAX};
pub use state::{Counts, Tip};
pub use writer::{GROUP_BYTES_MAX, Stepper};

use queue::{Job, Queue};
use state::Shared;

/// How a journal is kept.
#[derive(Debug)]
pub struct Options {
    /// A new segment is started when a batch would make the present one longer than this, in bytes.
    pub segment_bytes: u64,
    /// Disk space that is kept ready for endings (guarantee 8), in bytes, unless a batch asks for more
    /// ([`Batch::reserve_bytes`]).
    pub reserve_bytes: u64,
    /// Disk space is taken in steps of this, in bytes: `fdatasync` is cheaper when the file needn't grow.
    pub extend_bytes: u64,
    /// Signs checkpoints. Without one there are none.
    pub signer: Option<Signer>,
    /// Keys that signed before, so that the checkpoint in the folder is still accepted after a rotation.
    pub earlier_keys: Vec<Verifier>,
    /// A checkpoint is written at least every so many records, when the journal is opened with records that have none,
    /// and when it is closed.
    pub checkpoint_records: u64,
    /// And at least every so many seconds while records come.
    pub checkpoint_secs: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            segment_bytes: 64 << 20,
            reserve_bytes: 8 << 20,
            extend_bytes: 4 << 20,
            signer: None,
            earlier_keys: Vec::new(),
            checkpoint_records: 10_000,
            checkpoint_secs: 60,
        }
    }
}

/// What the opener knows to be acknowledged. Nothing of it may be missing, changed or cut; the head file and
/// the checkpoint in the folder are looked at besides.
#[derive(Debug, Clone, Default)]
pub struct Acknowledged {
    /// The last record that the view has applied (it applies only what is durable); 0 without a view.
    pub view_seq: u64,
    /// The leaf hash that the view keeps of that record, see [`Appended::leaf`].
    pub view_leaf: Option<Hash>,
    /// Verified checkpoints from elsewhere.
    pub checkpoints: Vec<Checkpoint>,
}

/// What was found when the journal was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened {
    /// The last record.
    pub last_seq: u64,
    /// Its leaf hash.
    pub leaf: Hash,
    /// The root of the tree.
    pub root: Hash,
    /// What was cut from the end, if anything: to be reported.
    pub cut: Option<Cut>,
    /// Whether the space for endings could be reserved. If not, free some disk space.
    pub reserve_ready: bool,
}

/// Bytes that were never acknowledged and were cut from the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// The first record that isn't there any more.
    pub seq: u64,
    /// How many bytes.
    pub bytes: u64,
    /// Where they are kept.
    pub kept_in: PathBuf,
}

/// What is asked to be appended: all of it or nothing.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// One event each. An empty batch is a barrier: it is answered when all before it is durable.
    pub payloads: Vec<Vec<u8>>,
    /// Ends, freezes and revocations: may use the reserved space when the disk is full (guarantee 8).
    pub ending: bool,
    /// If given, and a batch was refused since [`Journal::generation`] returned this number, the batch is refused
    /// as [`Error::Stale`]: it may rest on events that were never recorded.
    pub generation: Option<u64>,
    /// How much space for endings must be ready behind this batch and those that follow, if that is more than
    /// [`Options::reserve_bytes`]: what is open needs it. Nothing else is taken while that can't be had.
    pub reserve_bytes: u64,
}

/// A durable batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Appended {
    /// Sequence number of its first record; the leaf index is this minus 1.
    pub first_seq: u64,
    /// Number of records.
    pub count: u64,
    /// The time written into them, milliseconds since 1970.
    pub at_ms: u64,
    /// Leaf hash of the last one.
    pub leaf: Hash,
}

impl Appended {
    /// Sequence number of the last record.
    pub const fn last_seq(&self) -> u64 {
        (self.first_seq + self.count).saturating_sub(1)
    }
}

/// A batch on its way to the disk. Dropping it doesn't take the batch back.
#[derive(Debug)]
pub struct Pending(oneshot::Receiver<Result<Appended, Error>>);

impl Pending {
    /// Waits on a thread that may block (never inside the async runtime).
    pub fn wait(self) -> Result<Appended, Error> {
        self.0.blocking_recv().unwrap_or(Err(Error::WriterGone))
    }
}

impl Future for Pending {
    type Output = Result<Appended, Error>;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|r| r.unwrap_or(Err(Error::WriterGone)))
    }
}

/// The open journal. One process owns its folder.
#[derive(Debug)]
pub struct Journal {
    queue: Arc<Queue>,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Journal {
    /// Opens the journal in `dir`, made if need be, after verifying all of it, and starts the writer thread.
    ///
    /// Blocks. Refuses with [`Error::Audit`] (a break) if anything that was acknowledged doesn't verify, and with
    /// [`Error::Locked`] if another process has the folder.
    pub fn open(
        dir: &Path,
        options: Options,
        clock: Arc<dyn Clock>,
        known: &Acknowledged,
    ) -> Result<(Self, Opened), Error> {
        let (journal, mut stepper, opened) = Self::open_stepped(Arc::new(RealDisk), dir, options, clock, known)?;
        let thread = std::thread::Builder::new()
            .name("journal".into())
            .spawn(move || while stepper.step_blocking() {})
            .map_err(|e| Error::io("start the journal's thread for", dir, e))?;
        *journal.thread.lock() = Some(thread);
        Ok((journal, opened))
    }

    /// As [`Journal::open`], on any disk and without a thread: the caller drives the writer step by step
    /// (simulations, fault tests).
    pub fn open_stepped(
        disk: Arc<dyn Disk>,
        dir: &Path,
        options: Options,
        clock: Arc<dyn Clock>,
        known: &Acknowledged,
    ) -> Result<(Self, Stepper, Opened), Error> {
        let queue = Arc::new(Queue::default());
        let (stepper, opened) = Stepper::open(disk, dir, options, clock, known, queue.clone())?;
        let journal = Self { queue, shared: stepper.shared(), thread: Mutex::new(None) };
        Ok((journal, stepper, opened))
    }

    /// Puts a batch in the queue. The order of calls is the order in the journal, so a caller that holds a lock
    /// while it builds and enqueues keeps its own order.
    pub fn enqueue(&self, batch: Batch) -> Result<Pending, Error> {
        let bytes = frame::check_batch(&batch.payloads)?;
        let (reply, pending) = oneshot::channel();
        self.queue.push(Job::Append { batch, bytes, reply })?;
        Ok(Pending(pending))
    }

    /// Appends and waits until it is durable.
    pub async fn append(&self, payloads: Vec<Vec<u8>>) -> Result<Appended, Error> {
        self.enqueue(Batch { payloads, ..Batch::default() })?.await
    }

    /// As [`Journal::append`], for ends, freezes and revocations: uses the reserved space if need be.
    pub async fn append_priority(&self, payloads: Vec<Vec<u8>>) -> Result<Appended, Error> {
        self.enqueue(Batch { payloads, ending: true, ..Batch::default() })?.await
    }

    /// Changes each time that a batch is refused after it was queued. Read it when the state that batches are built
    /// on is known to be what is durable, and keep it until a refusal is seen. See [`Batch::generation`].
    pub fn generation(&self) -> u64 {
        self.shared.generation()
    }

    /// Signs and writes a checkpoint over all that is durable, and returns the note; `None` without a signer.
    pub async fn checkpoint(&self) -> Result<Option<String>, Error> {
        let (reply, answer) = oneshot::channel();
        self.queue.push(Job::Checkpoint { reply })?;
        answer.await.unwrap_or(Err(Error::WriterGone))
    }

    /// After [`Error::Poisoned`]: verifies the journal anew, cuts what was not acknowledged and takes appends again.
    pub async fn reopen(&self) -> Result<Opened, Error> {
        let (reply, answer) = oneshot::channel();
        self.queue.push(Job::Reopen { reply })?;
        answer.await.unwrap_or(Err(Error::WriterGone))
    }

    /// Writes what is queued, the last checkpoint and the mark of a clean end, and gives the folder free.
    pub async fn close(&self) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        self.queue.close(Some(reply));
        answer.await.unwrap_or(Err(Error::Closed))
    }

    /// The last durable record and the tree's root.
    pub fn tip(&self) -> Tip {
        self.shared.tip()
    }

    /// Where a durable record stands, or one before it in its segment.
    pub fn place(&self, seq: u64) -> Option<Mark> {
        self.shared.place(seq)
    }

    /// Why nothing is written at present, if so.
    pub fn poisoned(&self) -> Option<Error> {
        self.shared.poisoned()
    }

    /// What was done since the journal was opened.
    pub fn counts(&self) -> Counts {
        self.shared.counts()
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.queue.close(None);
        if let Some(thread) = self.thread.lock().take() {
            // A writer that panicked has nothing left to say.
            let _ = thread.join();
        }
    }
}
