//! Reads records from any sequence number on: for rebuilding a view, and for `audit tail` and `audit show`.
//! Checks frames, order and hash chain on the way; yields whole batches only.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::disk::{Disk, RealDisk};
use super::error::{Break, Error, Mismatch, RESTORE};
use super::merkle::Hash;
use super::proof::{self, RangeHasher};
use super::scan::{BadBatch, Record, SegmentScan, Step};
use super::segment;

/// A reader that lends one record after the other.
pub struct Records {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    from: u64,
    scan: Option<SegmentScan>,
    /// The next record of the batch in `scan`.
    index: usize,
    /// The record for which stale bytes were thrown away and read again.
    looked_again: Option<u64>,
}

/// Records from `from` on (1: all) of the journal in `dir`.
pub fn read_from(dir: &Path, from: u64) -> Result<Records, Error> {
    read_from_on(Arc::new(RealDisk), dir, from)
}

/// [`read_from`] on another disk.
pub fn read_from_on(disk: Arc<dyn Disk>, dir: &Path, from: u64) -> Result<Records, Error> {
    let firsts = segment::list(&*disk, dir)?;
    let from = from.max(1);
    let mut records = Records { disk, dir: dir.to_owned(), from, scan: None, index: 0, looked_again: None };
    // The last segment that starts at or before the record; a journal without the first has a gap.
    match firsts.iter().rev().find(|first| **first <= from) {
        Some(first) => records.scan = Some(records.open(*first)?),
        None if firsts.is_empty() => {}
        None => return Err(Records::gap(1, "no such segment".into())),
    }
    Ok(records)
}

impl Records {
    fn gap(seq: u64, found: String) -> Error {
        Break {
            file: segment::file_name(seq),
            offset: 0,
            seq,
            expected: format!("a segment with record {seq}"),
            found,
            meaning: "a part of the journal is missing".into(),
            action: RESTORE.into(),
        }
        .into()
    }

    fn open(&self, first: u64) -> Result<SegmentScan, Error> {
        let name = segment::file_name(first);
        let Mismatch { expected, found } = match SegmentScan::open(&*self.disk, &self.dir.join(&name))? {
            Ok((scan, header)) if header.first_seq == first => return Ok(scan),
            Ok((_, header)) => {
                Mismatch::new(format!("a segment from record {first}"), format!("one from {}", header.first_seq))
            }
            Err(wrong) => wrong,
        };
        let meaning = "the header of this segment was damaged, or the file is another's".into();
        Err(Break { file: name, offset: 0, seq: first, expected, found, meaning, action: RESTORE.into() }.into())
    }

    /// The next record, or `None` where the whole batches end. Called again later, it goes on with what was
    /// written meanwhile, in this segment and in later ones (`audit tail`).
    pub fn next_record(&mut self) -> Result<Option<Record<'_>>, Error> {
        loop {
            let Some(scan) = self.scan.as_mut() else {
                if segment::list(&*self.disk, &self.dir)?.is_empty() {
                    return Ok(None);
                }
                self.scan = Some(self.open(1)?);
                continue;
            };
            if self.index < scan.batch_len() {
                self.index += 1;
                if scan.record(self.index - 1).is_some_and(|r| r.meta.seq < self.from) {
                    continue;
                }
                break;
            }
            self.index = 0;
            let bad = match scan.next_batch()? {
                Step::Batch => continue,
                Step::End => None,
                Step::Bad(bad) => Some(bad),
            };
            if !self.turn_page(bad)? {
                return Ok(None);
            }
        }
        Ok(self.scan.as_ref().and_then(|scan| scan.record(self.index - 1)))
    }

    /// Goes on where the present segment has no further batch; false if the journal ends there for now.
    fn turn_page(&mut self, bad: Option<BadBatch>) -> Result<bool, Error> {
        let firsts = segment::list(&*self.disk, &self.dir)?;
        let Some(scan) = self.scan.as_mut() else { return Ok(false) };
        let (next, prev) = (scan.next_seq(), scan.prev());
        let last = firsts.last().copied().unwrap_or(0);
        if bad.is_none() && firsts.contains(&next) && next != scan.first_seq() {
            let scan = self.open(next)?;
            if scan.prev() != prev {
                return Err(Self::gap(next, "a segment that follows another record".into()));
            }
            self.scan = Some(scan);
            return Ok(true);
        }
        scan.forget_buffer();
        if last <= next {
            // The last segment: nothing yet, a write under way, or a torn tail. No record in any case.
            return Ok(false);
        }
        // There are later records. What was read may be from before the writer came past here: look once more.
        if self.looked_again.replace(next) != Some(next) {
            return Ok(true);
        }
        let Some(bad) = bad else { return Err(Self::gap(next, format!("{} next", segment::file_name(last)))) };
        Err(Break {
            file: scan.file_name(),
            offset: bad.offset,
            seq: bad.seq,
            expected: bad.expected,
            found: bad.found,
            meaning: "a record was damaged".into(),
            action: RESTORE.into(),
        }
        .into())
    }
}

/// The proof that record `seq` is in the tree of the first `size` records: its leaf hash, the path, and the root.
/// `None` if there is no such record or tree. Reads the whole journal up to `size`.
pub fn prove_inclusion(dir: &Path, seq: u64, size: u64) -> Result<Option<(Hash, Vec<Hash>, Hash)>, Error> {
    let Some(ranges) = seq.checked_sub(1).and_then(|index| proof::inclusion_ranges(index, size)) else {
        return Ok(None);
    };
    let (mut hasher, mut tree) = (RangeHasher::new(ranges), super::merkle::Frontier::new());
    let (mut records, mut leaf) = (read_from(dir, 1)?, None);
    while tree.size() < size
        && let Some(record) = records.next_record()?
    {
        hasher.push(record.leaf);
        tree.push(record.leaf);
        if record.meta.seq == seq {
            leaf = Some(record.leaf);
        }
    }
    Ok(leaf.zip(hasher.finish()).map(|(leaf, path)| (leaf, path, tree.root())))
}

/// The proof that the tree of the first `new` records extends the one of the first `old`. `None` as in
/// [`proof::consistency_ranges`], or if the journal is shorter.
pub fn prove_consistency(dir: &Path, old: u64, new: u64) -> Result<Option<Vec<Hash>>, Error> {
    let Some(ranges) = proof::consistency_ranges(old, new) else { return Ok(None) };
    let (mut hasher, mut records, mut size) = (RangeHasher::new(ranges), read_from(dir, 1)?, 0);
    while size < new
        && let Some(record) = records.next_record()?
    {
        hasher.push(record.leaf);
        size += 1;
    }
    Ok(if size == new { hasher.finish() } else { None })
}
