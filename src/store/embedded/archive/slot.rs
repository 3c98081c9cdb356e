//! sled, in a slot. After one I/O error a sled instance refuses everything for as long as it lives (0.34.7 keeps the
//! error in `global_error`), so it is dropped then and opened anew, with back-off, until the disk can be used again.
//! What an instance that was read back lacks of what was kept is damage, as is what makes no sense: that leaves a
//! mark, and the next start rebuilds the view.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use sled::Db;

use super::{CACHE_BYTES, FLUSH_EVERY_MS, VIEW, position_of, unreadable};
use crate::store::StoreError;

/// A first try to open the view anew comes after this, in milliseconds; each further one after twice the time.
const REOPEN_FIRST_MS: u64 = 100;
/// And at least this often.
const REOPEN_MS_MAX: u64 = 5_000;

/// Why something could not be done with the view.
#[derive(Debug)]
pub(super) enum Trouble {
    /// sled said so.
    Sled(sled::Error),
    /// What is kept there makes no sense.
    Senseless(StoreError),
}

impl From<sled::Error> for Trouble {
    fn from(error: sled::Error) -> Self {
        Self::Sled(error)
    }
}

impl From<StoreError> for Trouble {
    fn from(error: StoreError) -> Self {
        Self::Senseless(error)
    }
}

impl From<Trouble> for StoreError {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Sled(error) => unreadable(error),
            Trouble::Senseless(error) => error,
        }
    }
}

#[derive(Debug)]
enum State {
    /// The instance, and which one it is.
    Open(Db, u64),
    Closed {
        why: String,
        since: Instant,
        pause: Duration,
        nth: u64,
    },
}

/// The view's instance of sled, or none for the moment.
#[derive(Debug)]
pub(super) struct Slot {
    dir: PathBuf,
    state: RwLock<State>,
    /// Up to which record the view has been kept: an instance that stands before has lost something.
    kept_seq: AtomicU64,
}

/// The mark that a running broker leaves when it can't read something back: the next start rebuilds.
pub(super) fn mark_of(dir: &Path) -> PathBuf {
    dir.with_extension("damaged")
}

/// Opens sled. It asserts some of what it expects of its files: a panic in it is an answer here, not the broker's end.
pub(super) fn open_db(dir: &Path) -> Result<Db, String> {
    let open = || {
        sled::Config::new()
            .path(dir)
            .cache_capacity(CACHE_BYTES)
            .mode(sled::Mode::HighThroughput)
            .flush_every_ms(Some(FLUSH_EVERY_MS))
            .open()
    };
    match std::panic::catch_unwind(open) {
        Ok(Ok(db)) => Ok(db),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("sled can't make sense of its files".to_owned()),
    }
}

impl Slot {
    pub(super) fn new(db: Db, dir: &Path, kept_seq: u64) -> Self {
        Self { dir: dir.to_owned(), state: RwLock::new(State::Open(db, 0)), kept_seq: AtomicU64::new(kept_seq) }
    }

    /// Everything up to there is flushed.
    pub(super) fn kept(&self, seq: u64) {
        self.kept_seq.store(seq, Ordering::Release);
    }

    /// Does something with the view, opened anew first if it is time to try that.
    pub(super) fn with<T>(&self, work: impl FnOnce(&Db) -> Result<T, Trouble>) -> Result<T, StoreError> {
        let mut guard = self.state.read();
        if matches!(&*guard, State::Closed { .. }) {
            drop(guard);
            self.reopen()?;
            guard = self.state.read();
        }
        let (db, nth) = match &*guard {
            State::Open(db, nth) => (db, *nth),
            State::Closed { why, .. } => return Err(StoreError::Unavailable(why.clone())),
        };
        let trouble = match work(db) {
            Ok(done) => return Ok(done),
            Err(trouble) => trouble,
        };
        // An instance that has met an I/O error says anything later on, but nothing is wrong with what is kept.
        let is_disk = matches!(&trouble, Trouble::Sled(sled::Error::Io(..))) || db.flush().is_err();
        drop(guard);
        let error = StoreError::from(trouble);
        if !is_disk {
            return Err(self.damaged(&error.to_string()));
        }
        let why = format!("{error}. It is opened anew when the disk can be used: see to its free space and health");
        self.close(nth, why.clone());
        Err(StoreError::Unavailable(why))
    }

    /// What is kept can't be relied on: the next start rebuilds it.
    fn damaged(&self, why: &str) -> StoreError {
        let _ = std::fs::write(mark_of(&self.dir), why);
        unreadable(format!("{why}. Restart the broker: it is rebuilt from the journal then"))
    }

    /// Drops an instance, if it is still the one that is used.
    fn close(&self, broken: u64, why: String) {
        let mut state = self.state.write();
        if let State::Open(_, nth) = &*state
            && *nth == broken
        {
            tracing::warn!(%why, "the view is closed for a moment");
            let pause = Duration::from_millis(REOPEN_FIRST_MS);
            *state = State::Closed { why, since: Instant::now(), pause, nth: broken };
        }
    }

    /// Opens it anew, unless the last try was a moment ago.
    fn reopen(&self) -> Result<(), StoreError> {
        let mut state = self.state.write();
        let State::Closed { why, since, pause, nth } = &mut *state else { return Ok(()) };
        if since.elapsed() < *pause {
            return Err(StoreError::Unavailable(why.clone()));
        }
        match self.opened() {
            Ok(db) => {
                tracing::info!("the view is open again");
                *state = State::Open(db, *nth + 1);
                Ok(())
            }
            Err(error) => {
                (*since, *pause) = (Instant::now(), (*pause * 2).min(Duration::from_millis(REOPEN_MS_MAX)));
                Err(error)
            }
        }
    }

    fn opened(&self) -> Result<Db, StoreError> {
        let db = open_db(&self.dir).map_err(|why| StoreError::Unavailable(format!("{VIEW}: {why}")))?;
        let kept = self.kept_seq.load(Ordering::Acquire);
        match position_of(&db).map(|found| found.map_or(0, |p| p.seq)) {
            Ok(seq) if seq >= kept => Ok(db),
            Ok(seq) => Err(self.damaged(&format!("{VIEW} had record {kept} and stands at {seq} now"))),
            Err(Trouble::Sled(error)) => Err(StoreError::Unavailable(format!("{VIEW}: {error}"))),
            Err(Trouble::Senseless(error)) => Err(self.damaged(&error.to_string())),
        }
    }
}
