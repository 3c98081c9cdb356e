//! Single records from where an index says that they are: what one grant's story takes, without reading the segments
//! that it is spread over. Each frame is checked by its checksum; chain and tree were checked when the journal was opened.

use std::io;
use std::path::{Path, PathBuf};

use super::disk::{Access, Disk, DiskFile};
use super::error::{Break, Error, IoContext as _, Mismatch, RESTORE};
use super::frame;
use super::segment;

/// Marks are at least so many bytes apart, if batches let them: what is read in vain on the way to one record.
pub const MARK_BYTES: u64 = 64 * 1024;
/// How much is read at once, in bytes.
const READ_BYTES: usize = 64 * 1024;

/// Where a record's frame stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// The record.
    pub seq: u64,
    /// The first record of its segment.
    pub segment: u64,
    /// Where in the segment its frame begins.
    pub offset: u64,
}

/// Where some of the records stand, ascending.
#[derive(Debug, Clone, Default)]
pub struct Index(Vec<Mark>);

impl Index {
    /// Takes in the place of a record behind all that are known, if it is worth it.
    pub fn note(&mut self, mark: Mark) {
        let is_near = |last: &Mark| last.segment == mark.segment && mark.offset < last.offset + MARK_BYTES;
        if !self.0.last().is_some_and(is_near) {
            self.0.push(mark);
        }
    }

    /// Forgets what is behind a record.
    pub fn truncate(&mut self, last_seq: u64) {
        self.0.truncate(self.0.partition_point(|m| m.seq <= last_seq));
    }

    /// The last known place at or before a record.
    pub fn before(&self, seq: u64) -> Option<Mark> {
        let behind = self.0.partition_point(|m| m.seq <= seq);
        self.0.get(behind.checked_sub(1)?).copied()
    }
}

/// Reads records by their sequence numbers (ascending). `place` tells where one stands, or one before it in its segment.
pub fn pick(
    disk: &dyn Disk,
    dir: &Path,
    seqs: &[u64],
    place: impl Fn(u64) -> Option<Mark>,
) -> Result<Vec<(u64, Vec<u8>)>, Error> {
    let (mut out, mut at) = (Vec::with_capacity(seqs.len()), None::<Window>);
    for seq in seqs {
        let Some(mark) = place(*seq) else { return Err(missing(*seq)) };
        let window = match at.take() {
            // What was read last stands nearer to it.
            Some(window) if window.segment == mark.segment && (mark.seq..=*seq).contains(&window.seq) => window,
            Some(window) if window.segment == mark.segment => window.moved(mark),
            _ => Window::open(disk, dir, mark)?,
        };
        let window = at.insert(window);
        out.push((*seq, window.take(*seq)?));
    }
    Ok(out)
}

fn missing(seq: u64) -> Error {
    broken(segment::file_name(seq), 0, seq, Mismatch::new(format!("a segment with record {seq}"), "none"))
}

fn broken(file: String, offset: u64, seq: u64, wrong: Mismatch) -> Error {
    let Mismatch { expected, found } = wrong;
    let meaning = "a record was damaged, or is not there any more".into();
    Break { file, offset, seq, expected, found, meaning, action: RESTORE.into() }.into()
}

/// A part of a segment, read from a frame on.
struct Window {
    file: Box<dyn DiskFile>,
    path: PathBuf,
    segment: u64,
    /// The record whose frame comes next, and where.
    seq: u64,
    offset: u64,
    /// What has been read from `offset` on.
    bytes: Vec<u8>,
}

impl Window {
    fn open(disk: &dyn Disk, dir: &Path, mark: Mark) -> Result<Self, Error> {
        let path = dir.join(segment::file_name(mark.segment));
        let file = disk.open(&path, Access::Read).at("open", &path)?;
        let Mark { seq, segment, offset } = mark;
        Ok(Self { file, path, segment, seq, offset, bytes: Vec::new() })
    }

    fn moved(mut self, to: Mark) -> Self {
        (self.seq, self.offset) = (to.seq, to.offset);
        self.bytes.clear();
        self
    }

    /// Reads until `need` bytes are there, or the file ends.
    fn fill(&mut self, need: usize) -> Result<(), Error> {
        while self.bytes.len() < need {
            let have = self.bytes.len();
            self.bytes.resize(have + READ_BYTES, 0);
            let read = self.file.read_at(&mut self.bytes[have..], self.offset + have as u64);
            self.bytes.truncate(have + read.as_ref().map_or(0, |n| *n));
            match read {
                Ok(0) => break,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e).at("read", &self.path),
            }
        }
        Ok(())
    }

    /// Goes on to a record and gives its payload.
    fn take(&mut self, seq: u64) -> Result<Vec<u8>, Error> {
        loop {
            self.fill(frame::HEADER_BYTES)?;
            let len = frame::peek_len(&self.bytes).map_err(|fault| self.broken(fault.describe()))?;
            self.fill(len)?;
            let is_wanted = self.seq == seq;
            let payload = if is_wanted {
                let frame = frame::decode(&self.bytes).map_err(|fault| self.broken(fault.describe()))?;
                if frame.meta.seq != seq {
                    let found = format!("record {}", frame.meta.seq);
                    return Err(self.broken(Mismatch::new(format!("record {seq}"), found)));
                }
                Some(frame.payload.to_vec())
            } else {
                None
            };
            self.bytes.drain(..len.min(self.bytes.len()));
            self.offset += len as u64;
            self.seq += 1;
            if let Some(payload) = payload {
                return Ok(payload);
            }
        }
    }

    fn broken(&self, wrong: Mismatch) -> Error {
        broken(segment::file_name(self.segment), self.offset, self.seq, wrong)
    }
}
