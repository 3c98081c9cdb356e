//! What can go wrong when a journal is read, and the exact place where one breaks.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// The error of this room.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("could not {action} {path}: {source}. Check that the folder is there, that this user may use it, and the disk's health", path = path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The journal does not verify.
    #[error("{0}")]
    Broken(Box<Break>),
    /// Another process has the journal.
    #[error("the data folder {dir} is in use by another countersign process{holder}: stop it, or give this one a folder of its own", dir = dir.display())]
    Locked {
        /// The folder.
        dir: PathBuf,
        /// " (process id N)" if known.
        holder: String,
    },
    /// The head file is there and good.
    #[error("{dir} has a good head file, which may know of more than the segments do: it is not remade. Without --remake-head, `audit verify` says whether all is well", dir = dir.display())]
    HeadIsGood {
        /// The journal folder.
        dir: PathBuf,
    },
    /// A signed note or a key is malformed, or nobody trusted signed it. Never echoes keys.
    #[error("{0}")]
    Note(&'static str),
    /// A payload or a batch beyond what one may have.
    #[error("{what} has {size}, the limit is {max}: split it, or find out why it is so large")]
    Limit {
        /// What was being measured.
        what: &'static str,
        /// Its size.
        size: usize,
        /// The limit.
        max: usize,
    },
}

impl From<Break> for Error {
    fn from(b: Break) -> Self {
        Self::Broken(Box::new(b))
    }
}

/// Names the operation and the path of an I/O error.
pub(crate) trait IoContext<T> {
    fn at(self, action: &'static str, path: &Path) -> Result<T, Error>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn at(self, action: &'static str, path: &Path) -> Result<T, Error> {
        self.map_err(|source| Error::Io { action, path: path.to_owned(), source })
    }
}

/// What should have been there, and what was, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// What should have been there.
    pub expected: String,
    /// What was.
    pub found: String,
}

impl Mismatch {
    pub(crate) fn new(expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self { expected: expected.into(), found: found.into() }
    }
}

/// The place where a journal breaks, what it means and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Break {
    /// The file's name inside the journal folder.
    pub file: String,
    /// Bytes from the start of the file.
    pub offset: u64,
    /// The sequence number of the record concerned.
    pub seq: u64,
    /// What should have been there.
    pub expected: String,
    /// What was there.
    pub found: String,
    /// What follows from it.
    pub meaning: String,
    /// The next step for the operator.
    pub action: String,
}

impl fmt::Display for Break {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "the journal breaks in {} at byte {} (record {})", self.file, self.offset, self.seq)?;
        writeln!(f, "  expected: {}", self.expected)?;
        writeln!(f, "  found:    {}", self.found)?;
        writeln!(f, "  meaning:  {}", self.meaning)?;
        write!(f, "  do:       {}", self.action)
    }
}

impl std::error::Error for Break {}

/// What to do when records are damaged.
pub(crate) const RESTORE: &str = "keep a copy of the folder as it is (evidence), then restore the journal folder from a \
     backup and check it with `countersign audit verify --checkpoint FILE` before starting the broker";
