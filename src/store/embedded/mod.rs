//! The embedded store: the journal as the truth, the engine in memory, sled as the view that can be rebuilt.

pub mod archive;
pub mod backup;
pub mod journal;
mod log;
mod replay;
pub mod restore;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FlockOperation, flock};

use crate::audit::disk::{RealDisk, make_dir};
use crate::audit::merkle::Hash;
use crate::audit::note::{Signer, Verifier};
use crate::runtime::Runtime;
use crate::time::Clock;

use self::archive::{Found, Position, SledArchive};
use self::journal::{Acknowledged, Cut, Options};
use super::StoreError;
use super::engine::Engine;
use super::view::View;

pub use self::log::JournalLog;
pub use self::replay::{REPLAY_CHUNK, replay};

/// The embedded store.
pub type EmbeddedStore = Engine<JournalLog, SledArchive>;

/// Why the store can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A folder or file can't be used.
    #[error("can't use {path}: {source}", path = .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Another process has it.
    #[error(
        "the data folder {0} is in use by another countersign process: stop it, or give this one a folder of its own"
    )]
    Locked(String),
    /// The journal refuses.
    #[error("{0}")]
    Journal(#[from] journal::Error),
    /// The journal can't be read back.
    #[error("{0}")]
    Audit(#[from] crate::audit::Error),
    /// The journal tells an impossible story, or the view is from a newer version.
    #[error("{0}")]
    Store(#[from] StoreError),
}

/// What was found at the opening.
#[derive(Debug, Clone)]
pub struct Report {
    /// Records in the journal.
    pub records: u64,
    /// Records that were read again to bring the view up to date.
    pub replayed: u64,
    /// Why the view was rebuilt from the first record, if it was.
    pub rebuilt: Option<String>,
    /// Bytes that were never acknowledged and were cut from the journal's end.
    pub cut: Option<Cut>,
}

/// Where things are in a data folder.
pub fn journal_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("journal")
}

/// Opens the store in `data_dir`, made if need be. Blocks while it verifies. Needs a running runtime.
pub fn open(
    data_dir: &Path,
    runtime: Arc<dyn Runtime>,
    signer: Option<Signer>,
    earlier_keys: Vec<Verifier>,
) -> Result<(EmbeddedStore, Report), OpenError> {
    let lock = lock(data_dir)?;
    let view_dir = data_dir.join("view");
    let Found { mut archive, mut view, position, mut rebuilt } = SledArchive::open(&view_dir)?;
    let known = Acknowledged {
        view_seq: position.seq,
        view_leaf: (position.seq > 0).then_some(Hash(position.leaf)),
        checkpoints: Vec::new(),
    };
    let segment_bytes = crate::failpoint::segment_bytes().unwrap_or(Options::default().segment_bytes);
    let options = Options { segment_bytes, signer, earlier_keys, ..Options::default() };
    let clock: Arc<dyn Clock> = runtime.clone();
    let (log, opened) = JournalLog::open(journal_dir(data_dir), options, clock, &known, lock)?;
    let mut replayed = replay(&log, &archive, &mut view, position, &opened);
    if let Err(OpenError::Store(error)) = &replayed {
        // What the view kept doesn't fit the journal, or can't be read. The journal alone decides.
        rebuilt = Some(error.to_string());
        drop(archive);
        archive = SledArchive::anew(&view_dir)?;
        view = View::default();
        replayed = replay(&log, &archive, &mut view, Position::default(), &opened);
    }
    let (keeper, replayed) = replayed?;
    let report = Report { records: opened.last_seq, replayed, rebuilt, cut: opened.cut };
    Ok((Engine::start(runtime, log, archive, view, keeper), report))
}

fn lock(data_dir: &Path) -> Result<File, OpenError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| OpenError::Io { path, source }
    };
    make_dir(&RealDisk, data_dir).map_err(io(data_dir))?;
    let path = data_dir.join("lock");
    let lock = File::create(&path).map_err(io(&path))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(OpenError::Locked(data_dir.display().to_string())),
        Err(error) => Err(io(&path)(error.into())),
    }
}
