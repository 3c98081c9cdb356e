//! Segments that a later one follows, read by several threads ahead of the walk: frames and hash chain of each can be
//! checked by themselves, since its header says which leaf it follows. What the walk adds, tree and order and what is known
//! of the journal, takes little of the time. Judges nothing: a segment with anything odd in it is left to the walk, which
//! reads it again and says what is wrong.

use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{Builder, Scope};

use super::disk::Disk;
use super::merkle::Hash;
use super::scan::{Record, SegmentScan, Step};
use super::segment::{self, Header};

/// More would wait for the walk.
const READERS_MAX: usize = 4;

/// What the walk takes from a record.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Its sequence number.
    pub seq: u64,
    /// When it was written, milliseconds since 1970.
    pub at_ms: u64,
    /// Its leaf hash.
    pub leaf: Hash,
    /// Where its frame begins.
    pub offset: u64,
    /// Whether a batch begins with it.
    pub is_first: bool,
}

impl Entry {
    pub(super) fn of(record: &Record<'_>, is_first: bool) -> Self {
        let (meta, leaf, offset) = (record.meta, record.leaf, record.offset);
        Self { seq: meta.seq, at_ms: meta.at_ms, leaf, offset, is_first }
    }
}

/// A segment in which each frame is whole and follows the one before, with nothing but zeros behind the last.
#[derive(Debug)]
pub struct Sound {
    /// What it says of itself. Not compared with anything yet.
    pub header: Header,
    /// All of its records.
    pub entries: Vec<Entry>,
    /// One past the last frame.
    pub end: u64,
}

impl Sound {
    fn read(disk: &dyn Disk, path: &Path) -> Option<Self> {
        let (mut scan, header) = SegmentScan::open(disk, path).ok()?.ok()?;
        let mut entries = Vec::new();
        loop {
            match scan.next_batch().ok()? {
                Step::Batch => {
                    entries.extend(scan.records().enumerate().map(|(i, record)| Entry::of(&record, i == 0)));
                }
                Step::End => break,
                Step::Bad(_) => return None,
            }
        }
        let end = scan.offset();
        scan.survey_rest().ok()?.first.is_none().then_some(Self { header, entries, end })
    }
}

/// Segments that are being read ahead. Holds at most two of them for each reader.
pub struct Ahead {
    readers: Vec<Receiver<Option<Sound>>>,
    next: usize,
}

impl Ahead {
    /// Starts to read the segments that begin with `firsts`, in this order, with as many readers as the disk bears; with
    /// none if that is one, or if there is no more than one segment.
    pub fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        disk: &'scope dyn Disk,
        dir: &'scope Path,
        firsts: &'scope [u64],
    ) -> Self {
        let count = disk.readers().min(firsts.len()).min(READERS_MAX);
        let reader = |n: usize| {
            let (to, from) = sync_channel(1);
            let read = move || {
                for first in firsts.iter().skip(n).step_by(count) {
                    // The walk is over before its end: nobody waits for the rest.
                    if to.send(Sound::read(disk, &dir.join(segment::file_name(*first)))).is_err() {
                        return;
                    }
                }
            };
            // Without a thread, its sender is dropped, and the walk reads what it would have read.
            let _ = Builder::new().name("journal-ahead".into()).spawn_scoped(scope, read);
            from
        };
        Self { readers: if count > 1 { (0..count).map(reader).collect() } else { Vec::new() }, next: 0 }
    }

    /// The next of the segments if it is sound. `None`: whoever asks must read it.
    pub fn take(&mut self) -> Option<Sound> {
        let reader = self.readers.get(self.next)?;
        self.next = (self.next + 1) % self.readers.len();
        reader.recv().ok().flatten()
    }
}
