//! The whole journal, segment by segment, against everything known of it: the one judge of what verifies, what is
//! a torn tail and what is damage. `verify.rs` reports what it finds; the writer opens by it. Constant memory: some segments
//! are read ahead (`ahead.rs`), none is kept.

use std::path::Path;

use super::ahead::{Ahead, Entry, Sound};
use super::disk::Disk;
use super::error::{Break, Error, Mismatch, RESTORE};
use super::head::Head;
use super::merkle::{Frontier, Hash};
use super::pick::{Index, Mark};
use super::scan::{BadBatch, Rest, SegmentScan, Step};
use super::segment::{self, Header};

/// A tree that the journal must extend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownRoot {
    /// Number of leaves: the sequence number of the last record in it.
    pub size: u64,
    /// The root at that size.
    pub root: Hash,
    /// Where this is known from, for messages.
    pub source: String,
}

/// All that is known of what was acknowledged. Nothing at or below it may be missing, changed or cut.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// The head file, if there is one.
    pub head: Option<Head>,
    /// The last record that the view has applied; 0 if there is no view.
    pub view_seq: u64,
    /// The leaf hash that the view keeps of it.
    pub view_leaf: Option<Hash>,
    /// Verified checkpoints.
    pub roots: Vec<KnownRoot>,
}

impl Known {
    /// Why record `seq` must be there, if it must.
    fn acknowledged(&self, seq: u64) -> Option<String> {
        if let Some(head) = self.head.filter(|h| h.seq >= seq) {
            return Some(format!("the head file says that records up to {} were acknowledged", head.seq));
        }
        if self.view_seq >= seq {
            return Some(format!("the view has applied records up to {}", self.view_seq));
        }
        self.roots.iter().find(|r| r.size >= seq).map(|r| format!("{} covers records up to {}", r.source, r.size))
    }

    /// The last record that must be there.
    fn last(&self) -> u64 {
        let roots = self.roots.iter().map(|r| r.size).max().unwrap_or(0);
        self.head.map_or(0, |h| h.seq).max(self.view_seq).max(roots)
    }
}

/// A tail that was never acknowledged and isn't whole: what a crash in the middle of a write leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Torn {
    /// The segment's name.
    pub file: String,
    /// The cut: nothing before it is touched.
    pub offset: u64,
    /// Bytes from the cut to the last one that is not zero.
    pub bytes: u64,
    /// The first record that isn't whole.
    pub seq: u64,
}

/// One segment as the walk left it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentEnd {
    /// First record.
    pub first_seq: u64,
    /// One past the last good frame.
    pub end: u64,
}

/// A journal that verifies.
#[derive(Debug, Clone, Default)]
pub struct Walked {
    /// The tree: size is the last sequence number.
    pub frontier: Frontier,
    /// Leaf hash of the last record.
    pub leaf: Hash,
    /// Time of the last record, milliseconds since 1970.
    pub last_at_ms: u64,
    /// The segments in order.
    pub segments: Vec<SegmentEnd>,
    /// What may be cut, at the end of the last segment.
    pub torn: Option<Torn>,
    /// In the last segment, where the records begin that nothing knows as acknowledged.
    pub unacknowledged_from: u64,
    /// Where records stand.
    pub index: Index,
    /// The journal up to the last segment, without its own `before_last`.
    pub before_last: Option<Box<Walked>>,
}

/// Walks the journal in `dir` from where `from` ends, which is the end of a segment that a later one follows.
pub fn walk(disk: &dyn Disk, dir: &Path, known: &Known, from: Walked) -> Result<Walked, Error> {
    let firsts = segment::list(disk, dir)?;
    let done = from.segments.len();
    let mut walker = Walker { known, out: from };
    if let Some(gone) = walker.out.segments.iter().find(|s| !firsts.contains(&s.first_seq)) {
        return Err(not_there(gone.first_seq, "no such file".into(), "a segment is missing"));
    }
    if let Some((last, finished)) = firsts.get(done..).and_then(<[u64]>::split_last) {
        std::thread::scope(|scope| {
            let mut ahead = Ahead::start(scope, disk, dir, finished);
            finished.iter().try_for_each(|first| match ahead.take() {
                Some(sound) => walker.sound(*first, &sound),
                None => walker.segment(disk, dir, *first, false),
            })
        })?;
        walker.out.before_last = Some(Box::new(walker.out.clone()));
        walker.segment(disk, dir, *last, true)?;
    }
    let last = walker.out.frontier.size();
    if let Some(why) = known.acknowledged(last + 1) {
        let (file, offset) = match walker.out.segments.last() {
            Some(s) => (segment::file_name(s.first_seq), s.end),
            None => (segment::file_name(1), 0),
        };
        return Err(damage(
            file,
            offset,
            last + 1,
            format!("record {}: {why}", last + 1),
            "nothing further".into(),
            &format!("records {} to {} were acknowledged and are gone", last + 1, known.last()),
        ));
    }
    Ok(walker.out)
}

fn damage(file: String, offset: u64, seq: u64, expected: String, found: String, meaning: &str) -> Error {
    Break { file, offset, seq, expected, found, meaning: meaning.into(), action: RESTORE.into() }.into()
}

fn not_there(seq: u64, found: String, meaning: &str) -> Error {
    damage(segment::file_name(seq), 0, seq, format!("a segment that starts with record {seq}"), found, meaning)
}

struct Walker<'a> {
    known: &'a Known,
    out: Walked,
}

impl Walker<'_> {
    /// Whether a segment follows what was walked so far.
    fn follows(&self, name: &str, header: &Header) -> Result<(), Error> {
        let root = self.out.frontier.root();
        for (what, expected, found) in [
            ("first record", (self.out.frontier.size() + 1).to_string(), header.first_seq.to_string()),
            ("leaf before", self.out.leaf.to_string(), header.prev.to_string()),
            ("root before", root.to_string(), header.root.to_string()),
        ] {
            if expected != found {
                return Err(damage(
                    name.to_owned(),
                    0,
                    self.out.frontier.size() + 1,
                    format!("a header with {what} {expected}"),
                    found,
                    "this segment doesn't follow the one before: one of them was swapped, changed or rewritten",
                ));
            }
        }
        Ok(())
    }

    /// Whether it is the turn of the segment with this name.
    fn is_next(&self, first: u64) -> Result<(), Error> {
        let next = self.out.frontier.size() + 1;
        if first == next {
            return Ok(());
        }
        let meaning =
            if first > next { "a segment, or the end of the one before, is missing" } else { "segments overlap" };
        Err(not_there(next, format!("{} next", segment::file_name(first)), meaning))
    }

    /// Takes in a segment that was read ahead.
    fn sound(&mut self, first: u64, segment: &Sound) -> Result<(), Error> {
        let name = segment::file_name(first);
        self.is_next(first)?;
        self.follows(&name, &segment.header)?;
        self.out.segments.push(SegmentEnd { first_seq: first, end: segment.end });
        for entry in &segment.entries {
            self.record(&name, first, entry)?;
        }
        self.out.unacknowledged_from = segment.end;
        Ok(())
    }

    fn segment(&mut self, disk: &dyn Disk, dir: &Path, first: u64, is_last: bool) -> Result<(), Error> {
        let name = segment::file_name(first);
        self.is_next(first)?;
        let (mut scan, header) = match SegmentScan::open(disk, &dir.join(&name))? {
            Ok(opened) => opened,
            Err(Mismatch { expected, found }) => {
                return Err(damage(name, 0, first, expected, found, "the header of this segment was damaged"));
            }
        };
        self.follows(&name, &header)?;
        self.out.segments.push(SegmentEnd { first_seq: first, end: scan.offset() });
        self.out.unacknowledged_from = scan.offset();
        let mut looked = None;
        loop {
            let bad = match scan.next_batch()? {
                Step::Batch => {
                    for (i, record) in scan.records().enumerate() {
                        self.record(&name, first, &Entry::of(&record, i == 0))?;
                    }
                    if let Some(segment) = self.out.segments.last_mut() {
                        segment.end = scan.offset();
                    }
                    if self.known.last() >= self.out.frontier.size() {
                        self.out.unacknowledged_from = scan.offset();
                    }
                    continue;
                }
                Step::End => None,
                Step::Bad(bad) => Some(bad),
            };
            let (cut, next) = (scan.offset(), scan.next_seq());
            let rest = scan.survey_rest()?;
            let Some(begins) = rest.first else {
                // The file may end inside a batch without a byte other than zero after the cut: nothing to keep.
                return Ok(());
            };
            // A running writer may have come past here while this was read: only what is still the same at the next
            // look is a fault.
            let fault = (bad, begins);
            if is_last && looked.as_ref() != Some(&fault) {
                looked = Some(fault);
                scan.back_to(cut);
                continue;
            }
            return self.tail(&name, cut, next, fault, rest, is_last);
        }
    }

    fn record(&mut self, name: &str, segment: u64, record: &Entry) -> Result<(), Error> {
        let seq = record.seq;
        if record.is_first {
            self.out.index.note(Mark { seq, segment, offset: record.offset });
        }
        self.out.frontier.push(record.leaf);
        self.out.leaf = record.leaf;
        self.out.last_at_ms = record.at_ms;
        let broke = |expected, found, meaning| Err(damage(name.into(), record.offset, seq, expected, found, meaning));
        if let Some(head) = self.known.head {
            if head.seq == seq && head.leaf != record.leaf {
                return broke(
                    format!("the record that was acknowledged, leaf {} (head file)", head.leaf),
                    format!("leaf {}", record.leaf),
                    "this record or one before it was changed, and what follows was resealed",
                );
            }
            if head.closed && seq > head.seq {
                return broke(
                    format!("nothing: the journal was closed after record {}", head.seq),
                    format!("record {seq}"),
                    "something else than the broker wrote to the journal while it was closed",
                );
            }
        }
        if let Some(leaf) = self.known.view_leaf.filter(|l| self.known.view_seq == seq && *l != record.leaf) {
            return broke(
                format!("the record that the view has applied, leaf {leaf}"),
                format!("leaf {}", record.leaf),
                "this record or one before it was changed, and what follows was resealed; or the view is another journal's",
            );
        }
        for known in self.known.roots.iter().filter(|r| r.size == seq) {
            let root = self.out.frontier.root();
            if root != known.root {
                return broke(
                    format!("root {} at size {seq} ({})", known.root, known.source),
                    format!("root {root}"),
                    "some record up to this one was changed after the checkpoint was signed, and the journal \
                     resealed; which one can't be told from the journal itself",
                );
            }
        }
        Ok(())
    }

    /// What follows the last good batch of a segment and isn't zeros: a torn tail, or damage.
    fn tail(
        &mut self,
        name: &str,
        cut: u64,
        next: u64,
        (bad, (place, byte)): (Option<BadBatch>, (u64, u8)),
        rest: Rest,
        is_last: bool,
    ) -> Result<(), Error> {
        let (offset, seq, expected, found) = match bad {
            Some(bad) => (bad.offset, bad.seq, bad.expected, bad.found),
            None => (place, next, "zeros to the end of the file".into(), format!("byte {byte:02x}")),
        };
        let proof = if !is_last {
            Some("a later segment was started, so this one was complete on disk".to_owned())
        } else if let Some(why) = self.known.acknowledged(next) {
            Some(why)
        } else if rest.durable >= next {
            Some(format!("a later record says that records up to {} were on disk before it", rest.durable))
        } else {
            let closed = self.known.head.filter(|h| h.closed);
            closed.map(|h| format!("the journal was closed cleanly after record {}; only zeros may follow", h.seq))
        };
        if let Some(proof) = proof {
            return Err(damage(
                name.into(),
                offset,
                seq,
                expected,
                found,
                &format!("not a torn tail but damage: {proof}"),
            ));
        }
        self.out.torn = Some(Torn { file: name.into(), offset: cut, bytes: rest.last_used - cut, seq: next });
        Ok(())
    }
}
