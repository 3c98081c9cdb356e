//! What can go wrong in the journal's writer. Clonable, since one failure answers all that waited in a group.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::audit;

/// Why the journal didn't do what it was asked to.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("could not {action} {path}: {source}. Check the disk's health and free space", path = path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The reason.
        source: Arc<io::Error>,
    },
    /// The journal doesn't verify, or a limit was passed, or a key is unusable.
    #[error(transparent)]
    Audit(Arc<audit::Error>),
    /// Another process has the folder.
    #[error("the data folder {dir} is in use by another countersign process{holder}: stop it, or give this one a folder of its own", dir = dir.display())]
    Locked {
        /// The folder.
        dir: PathBuf,
        /// " (process id N)" if known.
        holder: String,
    },
    /// There is no disk space beside what is reserved for endings. Nothing of the batch was written.
    #[error("no disk space for new records in {dir}: nothing is minted until some is freed; endings go on while the reserved space lasts", dir = dir.display())]
    NoSpace {
        /// The folder.
        dir: PathBuf,
    },
    /// Too much is waiting to be written.
    #[error("the journal's queue is full: try again in a moment")]
    QueueFull,
    /// An earlier batch, on which this one may rest, was refused.
    #[error("an earlier event was not recorded, so this one was not either: read the state again and repeat")]
    Stale,
    /// A journal file is not as the writer left it (REGRESSIONS R7).
    #[error("{file} {what} while the broker was running: nothing is written any more. Find out who did it; restore the file, verify with `countersign audit verify`, restart", file = file.display())]
    Changed {
        /// The file.
        file: PathBuf,
        /// What happened to it.
        what: String,
    },
    /// An earlier error stopped the writer; whether the batch that met it will be on disk is not known until reopened.
    #[error("the journal stopped writing: {0}")]
    Poisoned(Arc<Error>),
    /// The writer's thread is gone. What was queued may or may not be on disk.
    #[error("the journal's writer is gone: restart the broker; it verifies the journal when it starts")]
    WriterGone,
    /// The journal was closed.
    #[error("the journal is closed: the broker is shutting down")]
    Closed,
}

impl Error {
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source: Arc::new(source) }
    }

    /// Whether it says that the disk is full.
    pub(super) fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if is_full(source))
    }

    /// True if the journal needs [`super::Journal::reopen`] or a restart before it takes anything again.
    pub const fn is_final(&self) -> bool {
        matches!(self, Self::Io { .. } | Self::Changed { .. } | Self::Poisoned(_) | Self::WriterGone | Self::Closed)
    }
}

impl From<audit::Error> for Error {
    fn from(e: audit::Error) -> Self {
        match e {
            audit::Error::Io { action, path, source } => Self::Io { action, path, source: Arc::new(source) },
            audit::Error::Locked { dir, holder } => Self::Locked { dir, holder },
            other => Self::Audit(Arc::new(other)),
        }
    }
}

/// Names the operation and the path of an I/O error.
pub(super) trait At<T> {
    fn at(self, action: &'static str, path: &Path) -> Result<T, Error>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, action: &'static str, path: &Path) -> Result<T, Error> {
        self.map_err(|e| Error::io(action, path, e))
    }
}

/// Whether an error says that the space is used up.
pub(super) fn is_full(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge)
}
