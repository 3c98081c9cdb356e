//! What the writer shows to the outside: the durable end, counters, and why it stopped.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;

use super::Error;
use crate::audit::merkle::{Frontier, Hash};
use crate::audit::pick::{Index, Mark};

/// The durable end of the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tip {
    /// The last durable record; also the size of the tree.
    pub seq: u64,
    /// Its leaf hash.
    pub leaf: Hash,
    /// The root of the tree.
    pub root: Hash,
}

/// What was done since the journal was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// `fdatasync` calls on segments: one a group.
    pub syncs: u64,
    /// Durable batches.
    pub batches: u64,
    /// Durable records.
    pub records: u64,
    /// Bytes of their frames.
    pub bytes: u64,
    /// Batches refused because the disk was full.
    pub refused_no_space: u64,
    /// Checkpoints written.
    pub checkpoints: u64,
    /// Checkpoints that were due and could not be written. They are tried again at the next group.
    pub checkpoints_failed: u64,
    /// Bytes of the space reserved for endings that are ready now.
    pub reserve_ready_bytes: u64,
}

#[derive(Debug, Default)]
pub(super) struct Shared {
    /// Frontier and last leaf of what is durable.
    end: Mutex<(Frontier, Hash)>,
    poisoned: Mutex<Option<Error>>,
    /// Where durable records stand.
    index: Mutex<Index>,
    generation: AtomicU64,
    pub(super) syncs: AtomicU64,
    pub(super) batches: AtomicU64,
    pub(super) records: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) refused_no_space: AtomicU64,
    pub(super) checkpoints: AtomicU64,
    pub(super) checkpoints_failed: AtomicU64,
    pub(super) reserve_ready_bytes: AtomicU64,
}

impl Shared {
    pub(super) fn set_end(&self, frontier: &Frontier, leaf: Hash) {
        let mut end = self.end.lock();
        end.0.clone_from(frontier);
        end.1 = leaf;
    }
    pub(super) fn tip(&self) -> Tip {
        let end = self.end.lock().clone();
        Tip { seq: end.0.size(), leaf: end.1, root: end.0.root() }
    }
    pub(super) fn set_index(&self, index: Index) {
        *self.index.lock() = index;
    }
    pub(super) fn index(&self) -> Index {
        self.index.lock().clone()
    }
    pub(super) fn note_places(&self, marks: impl IntoIterator<Item = Mark>) {
        let mut index = self.index.lock();
        for mark in marks {
            index.note(mark);
        }
    }
    pub(super) fn place(&self, seq: u64) -> Option<Mark> {
        self.index.lock().before(seq)
    }
    pub(super) fn poisoned(&self) -> Option<Error> {
        self.poisoned.lock().clone()
    }
    pub(super) fn set_poisoned(&self, why: Option<Error>) {
        *self.poisoned.lock() = why;
    }
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Relaxed)
    }
    /// Called by the writer before it answers a refusal: who sees the refusal sees the new number.
    pub(super) fn next_generation(&self) {
        self.generation.fetch_add(1, Relaxed);
    }
    pub(super) fn counts(&self) -> Counts {
        Counts {
            syncs: self.syncs.load(Relaxed),
            batches: self.batches.load(Relaxed),
            records: self.records.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            refused_no_space: self.refused_no_space.load(Relaxed),
            checkpoints: self.checkpoints.load(Relaxed),
            checkpoints_failed: self.checkpoints_failed.load(Relaxed),
            reserve_ready_bytes: self.reserve_ready_bytes.load(Relaxed),
        }
    }
}
