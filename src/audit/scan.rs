//! One segment, read front to back, batch by batch, in bounded memory. Checks frames, order and hash chain;
//! judges nothing: whether a fault is a torn tail or damage is decided in `walk.rs`.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::disk::{Access, Disk, DiskFile};
use super::error::{Error, IoContext as _, Mismatch};
use super::frame::{self, Frame, Meta};
use super::merkle::Hash;
use super::segment;

/// How much is read at once, in bytes.
const READ_BYTES: usize = 1024 * 1024;
/// The least buffer, in bytes.
const BUFFER_BYTES_MIN: usize = 4096;

/// One record of a batch.
#[derive(Debug, Clone, Copy)]
pub struct Record<'a> {
    /// What the frame says.
    pub meta: Meta,
    /// The leaf hash.
    pub leaf: Hash,
    /// The event.
    pub payload: &'a [u8],
    /// Where the frame starts in the file.
    pub offset: u64,
}

/// Where something that is no batch begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadBatch {
    /// Where the batch begins: a cut is made here.
    pub batch_offset: u64,
    /// Its first record.
    pub batch_seq: u64,
    /// Where the bad frame begins.
    pub offset: u64,
    /// The record that should be there.
    pub seq: u64,
    /// What should be there.
    pub expected: String,
    /// What is.
    pub found: String,
}

/// What comes next in a segment.
#[derive(Debug)]
pub enum Step {
    /// A whole batch; see [`SegmentScan::records`].
    Batch,
    /// No further frame: the end of the file, or zeros from here.
    End,
    /// Neither.
    Bad(BadBatch),
}

#[derive(Debug, Clone)]
struct Slot {
    meta: Meta,
    leaf: Hash,
    payload: Range<usize>,
    offset: u64,
}

/// A reader of one segment.
pub struct SegmentScan {
    file: Box<dyn DiskFile>,
    path: PathBuf,
    buf: Vec<u8>,
    /// Where the unread part of `buf` starts and ends, and which byte of the file `buf[0]` is.
    start: usize,
    end: usize,
    base: u64,
    eof: bool,
    slots: Vec<Slot>,
    first_seq: u64,
    next_seq: u64,
    prev: Hash,
}

impl SegmentScan {
    /// Opens a segment and reads its header; the inner error says what is wrong with the header.
    pub fn open(disk: &dyn Disk, path: &Path) -> Result<Result<(Self, segment::Header), Mismatch>, Error> {
        let file = disk.open(path, Access::Read).at("open", path)?;
        // A small segment needs a small buffer; it grows with what is read.
        let len = usize::try_from(file.stat().at("look at", path)?.len).unwrap_or(usize::MAX);
        let mut scan = Self {
            file,
            path: path.to_owned(),
            buf: vec![0; len.clamp(BUFFER_BYTES_MIN, 2 * READ_BYTES)],
            start: 0,
            end: 0,
            base: 0,
            eof: false,
            slots: Vec::new(),
            first_seq: 0,
            next_seq: 0,
            prev: Hash::ZERO,
        };
        scan.fill(segment::HEADER_BYTES)?;
        Ok(segment::Header::decode(&scan.buf[..scan.end]).map(|header| {
            scan.start = segment::HEADER_BYTES;
            (scan.first_seq, scan.next_seq, scan.prev) = (header.first_seq, header.first_seq, header.prev);
            (scan, header)
        }))
    }

    /// The next record's sequence number.
    pub const fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// The sequence number of the segment's first record.
    pub(crate) const fn first_seq(&self) -> u64 {
        self.first_seq
    }

    /// The leaf hash of the last record that was read.
    pub(crate) const fn prev(&self) -> Hash {
        self.prev
    }

    /// The segment's name.
    pub(crate) fn file_name(&self) -> String {
        segment::file_name(self.first_seq)
    }

    /// Reads what follows from the file again at the next call: it may have been written to.
    pub(crate) fn forget_buffer(&mut self) {
        self.back_to(self.offset());
    }

    /// Goes back to where the next batch would begin, and reads what follows from the file again.
    pub(crate) fn back_to(&mut self, offset: u64) {
        self.base = offset;
        (self.start, self.end, self.eof) = (0, 0, false);
        self.slots.clear();
    }

    /// Where in the file the scan stands.
    pub const fn offset(&self) -> u64 {
        self.base + self.start as u64
    }

    /// Reads on until `need` bytes are there behind `start`, or the file ends.
    fn fill(&mut self, need: usize) -> Result<(), Error> {
        while self.end - self.start < need && !self.eof {
            if self.start + need > self.buf.len() || self.end == self.buf.len() {
                self.buf.copy_within(self.start..self.end, 0);
                self.base += self.start as u64;
                self.end -= self.start;
                self.start = 0;
                let want = if need < BUFFER_BYTES_MIN { 2 * need } else { need + READ_BYTES };
                if self.buf.len() < want {
                    self.buf.resize(want, 0);
                }
            }
            let to = self.buf.len().min(self.end + READ_BYTES);
            match self.file.read_at(&mut self.buf[self.end..to], self.base + self.end as u64) {
                Ok(0) => self.eof = true,
                Ok(n) => self.end += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e).at("read", &self.path),
            }
        }
        Ok(())
    }

    /// Takes the next batch into the buffer, whole, or says what stands there instead.
    /// After [`Step::End`] and [`Step::Bad`] the scan stays where the next batch would begin.
    pub fn next_batch(&mut self) -> Result<Step, Error> {
        self.slots.clear();
        let (mut at, mut seq, mut prev, mut left) = (0, self.next_seq, self.prev, None);
        loop {
            self.fill(at + frame::HEADER_BYTES)?;
            let have = self.end - self.start;
            let rest = &self.buf[self.start + at..self.end];
            if left.is_none() && rest.iter().take(4).all(|b| *b == 0) {
                return Ok(Step::End);
            }
            let fault = match frame::peek_len(rest) {
                Ok(len) if at + len > have && !self.eof => {
                    self.fill(at + len)?;
                    continue;
                }
                Ok(_) => None,
                Err(fault) => Some(fault),
            };
            let decoded = match fault {
                None => frame::decode(rest),
                Some(fault) => Err(fault),
            };
            let wrong = match decoded {
                Err(fault) => fault.describe(),
                Ok(f) => match check(&f, seq, prev, left) {
                    Some(wrong) => wrong,
                    None if at + f.frame_len() > frame::BATCH_BYTES_MAX => {
                        Mismatch::new(format!("a batch of at most {} bytes", frame::BATCH_BYTES_MAX), "more")
                    }
                    None => {
                        let (meta, leaf, len) = (f.meta, f.leaf(), f.frame_len());
                        let payload = at + frame::HEADER_BYTES..at + frame::HEADER_BYTES + f.payload.len();
                        self.slots.push(Slot { meta, leaf, payload, offset: self.offset() + at as u64 });
                        (at, seq, prev, left) = (at + len, seq + 1, leaf, Some(meta.batch_left));
                        if meta.batch_left > 0 {
                            continue;
                        }
                        for slot in &mut self.slots {
                            slot.payload = slot.payload.start + self.start..slot.payload.end + self.start;
                        }
                        self.start += at;
                        (self.next_seq, self.prev) = (seq, prev);
                        return Ok(Step::Batch);
                    }
                },
            };
            let batch_offset = self.offset();
            return Ok(Step::Bad(BadBatch {
                batch_offset,
                batch_seq: self.next_seq,
                offset: batch_offset + at as u64,
                seq,
                expected: wrong.expected,
                found: wrong.found,
            }));
        }
    }

    /// The records of the batch that [`SegmentScan::next_batch`] took.
    pub fn records(&self) -> impl ExactSizeIterator<Item = Record<'_>> {
        self.slots.iter().map(|s| Record {
            meta: s.meta,
            leaf: s.leaf,
            payload: &self.buf[s.payload.clone()],
            offset: s.offset,
        })
    }

    /// How many records that batch has.
    pub const fn batch_len(&self) -> usize {
        self.slots.len()
    }

    /// One record of that batch.
    pub(crate) fn record(&self, index: usize) -> Option<Record<'_>> {
        let s = self.slots.get(index)?;
        Some(Record { meta: s.meta, leaf: s.leaf, payload: self.buf.get(s.payload.clone())?, offset: s.offset })
    }

    /// Looks at all that follows the last good batch: how far bytes other than zero reach, and the highest
    /// `durable` that an intact frame in there states. An intact frame behind a bad one is proof that the bad
    /// one had been on disk, if the frame says so. Consumes the rest of the file.
    pub fn survey_rest(&mut self) -> Result<Rest, Error> {
        let mut rest = Rest { last_used: self.offset(), durable: 0, first: None };
        loop {
            self.fill(frame::ALIGN_BYTES)?;
            if self.end - self.start >= frame::MAGIC.len() && self.buf[self.start..self.end].starts_with(&frame::MAGIC)
            {
                // All of it, also when it stands across two reads.
                self.fill(frame::frame_len(frame::PAYLOAD_BYTES_MAX))?;
            }
            if self.start == self.end {
                return Ok(rest);
            }
            let step = frame::ALIGN_BYTES.min(self.end - self.start);
            let word = &self.buf[self.start..self.start + step];
            if let Some(last) = word.iter().rposition(|b| *b != 0) {
                if rest.first.is_none() {
                    let first = word.iter().position(|b| *b != 0).unwrap_or(last);
                    rest.first = Some((self.offset() + first as u64, word[first]));
                }
                rest.last_used = self.offset() + last as u64 + 1;
                if word.starts_with(&frame::MAGIC)
                    && let Ok(f) = frame::decode(&self.buf[self.start..self.end])
                {
                    rest.durable = rest.durable.max(f.meta.durable);
                }
                self.start += step;
            } else {
                self.start += step;
                // Long zeros are the common case: skip them at memory speed.
                let zeros = self.buf[self.start..self.end].chunks_exact(frame::ALIGN_BYTES);
                self.start += frame::ALIGN_BYTES * zeros.take_while(|c| **c == [0; frame::ALIGN_BYTES]).count();
            }
        }
    }
}

/// What [`SegmentScan::survey_rest`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rest {
    /// One past the last byte that is not zero; the start of the rest if all are.
    pub last_used: u64,
    /// The highest `durable` of an intact frame in the rest; 0 if there is none.
    pub durable: u64,
    /// The first byte that is not zero: where, and what.
    pub first: Option<(u64, u8)>,
}

fn check(f: &Frame<'_>, seq: u64, prev: Hash, left: Option<u16>) -> Option<Mismatch> {
    if f.meta.seq != seq {
        return Some(Mismatch::new(format!("record {seq}"), format!("record {}", f.meta.seq)));
    }
    if f.meta.prev != prev {
        return Some(Mismatch::new(
            format!("a record that follows leaf {prev}"),
            format!("one that follows {}", f.meta.prev),
        ));
    }
    match left {
        Some(left) if f.meta.batch_left != left - 1 => {
            Some(Mismatch::new(format!("{} more records in the batch", left - 1), f.meta.batch_left.to_string()))
        }
        _ => None,
    }
}
