//! Opening a journal: verify everything, cut what was never acknowledged and isn't whole (and keep it in a file),
//! refuse anything else. Used at start and after the writer was poisoned.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::active::{Active, check_present};
use super::error::At as _;
use super::{Acknowledged, Cut, Error, Opened, Options};
use crate::audit::disk::{Access, Disk, DiskFile, Stat, replace};
use crate::audit::head::{self, Head};
use crate::audit::merkle::{Frontier, Hash};
use crate::audit::note::Verifier;
use crate::audit::pick::Index;
use crate::audit::segment::{self, Header};
use crate::audit::verify::examine;
use crate::audit::walk::{Known, Walked};
use crate::failpoint::{self, Point};

/// Copies are made in pieces of this size, in bytes.
const COPY_BYTES: usize = 256 * 1024;

/// The head file, open.
pub(super) struct HeadFile {
    file: Box<dyn DiskFile>,
    path: PathBuf,
    stat: Stat,
    pub(super) head: Head,
}

impl HeadFile {
    /// Overwrites the head in place; `durable` also syncs it.
    pub(super) fn write(&mut self, head: Head, durable: bool) -> Result<(), Error> {
        let bytes = head.encode();
        if let Err(error) = self.file.write_at(&bytes, 0) {
            // A write that stopped in the middle left a head that nobody can read: the writer stops all the same.
            let _ = self.file.write_at(&bytes, 0);
            return Err(Error::io("write", &self.path, error));
        }
        self.head = head;
        if durable {
            self.file.sync_data().at("sync", &self.path)?;
        }
        Ok(())
    }
    pub(super) fn check_present(&self, disk: &dyn Disk) -> Result<(), Error> {
        check_present(disk, &self.path, self.stat)
    }
}

/// What the writer needs, and what it asks for.
pub(super) struct Place {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) dir: PathBuf,
    pub(super) options: Options,
}

/// What recovery made.
pub(super) struct Recovered {
    pub(super) ready: Ready,
    pub(super) opened: Opened,
    /// Up to the end of the last finished segment.
    pub(super) base: Walked,
    /// Where the records stand, up to the journal's end.
    pub(super) index: Index,
}

/// The journal, ready to be appended to.
pub(super) struct Ready {
    pub(super) active: Active,
    pub(super) head: HeadFile,
    pub(super) frontier: Frontier,
    pub(super) leaf: Hash,
    pub(super) finished: Vec<(PathBuf, Stat)>,
}

impl Place {
    fn keys(&self) -> Vec<Verifier> {
        let own = self.options.signer.as_ref().map(crate::audit::note::Signer::verifier);
        own.into_iter().chain(self.options.earlier_keys.iter().cloned()).collect()
    }

    /// Verifies and makes ready. With `only_acknowledged`, also whole batches behind what `known` says are cut:
    /// their callers were told that they failed. `base` was walked before.
    pub(super) fn recover(
        &self,
        known: &Acknowledged,
        only_acknowledged: bool,
        base: Walked,
        now_ms: u64,
    ) -> Result<Recovered, Error> {
        let disk = &*self.disk;
        for name in disk.list(&self.dir).at("list the journal folder", &self.dir)? {
            // Left by a crash before the rename that would have made it count.
            if name.strip_suffix(".new").is_some() {
                disk.remove(&self.dir.join(&name)).at("remove", &self.dir.join(&name))?;
            }
        }
        let (mut walked, mut what_is_known) = self.examine(known, base)?;
        let mut cut = None;
        if let Some(last) = walked.segments.last() {
            let end = walked.torn.as_ref().map_or(last.end, |t| t.offset + t.bytes);
            let from = if only_acknowledged { walked.unacknowledged_from } else { last.end };
            if from < end {
                let seq = if only_acknowledged { known.view_seq } else { walked.frontier.size() } + 1;
                cut = Some(self.cut(last.first_seq, seq, from, end, now_ms)?);
                (walked, what_is_known) =
                    self.examine(known, walked.before_last.take().map_or_else(Walked::default, |b| *b))?;
            }
        }
        let head = what_is_known.head.unwrap_or(Head::EMPTY);
        let ready = self.ready(&walked, head, now_ms)?;
        let opened = Opened {
            last_seq: walked.frontier.size(),
            leaf: walked.leaf,
            root: walked.frontier.root(),
            cut,
            reserve_ready: ready.active.space() >= self.options.reserve_bytes,
        };
        let index = std::mem::take(&mut walked.index);
        let base = walked.before_last.map_or_else(Walked::default, |b| *b);
        Ok(Recovered { ready, opened, base, index })
    }

    fn examine(&self, known: &Acknowledged, base: Walked) -> Result<(Walked, Known), Error> {
        let known = Known {
            head: None,
            view_seq: known.view_seq,
            view_leaf: known.view_leaf,
            roots: known
                .checkpoints
                .iter()
                .map(|c| c.known(&format!("the checkpoint given for {}", c.origin)))
                .collect(),
        };
        Ok(examine(&*self.disk, &self.dir, &self.keys(), known, false, base)?)
    }

    /// Keeps the bytes from `from` to `end` of a segment in a file of their own, then cuts them off.
    fn cut(&self, first_seq: u64, seq: u64, from: u64, end: u64, now_ms: u64) -> Result<Cut, Error> {
        let path = self.dir.join(segment::file_name(first_seq));
        let kept_in = self.dir.join(format!("torn-{seq}-{now_ms}.bin"));
        let source = self.disk.open(&path, Access::Write).at("open", &path)?;
        if let Err(why) = self.keep(&*source, &path, from..end, &kept_in) {
            if !why.is_full() {
                return Err(why);
            }
            // Only zeros are behind the tail: the space that was reserved for endings is given for the copy.
            source.set_len(end).at("free the reserved space of", &path)?;
            source.sync_all().at("sync", &path)?;
            self.keep(&*source, &path, from..end, &kept_in)?;
        }
        self.disk.sync_dir(&self.dir).at("sync the folder", &self.dir)?;
        failpoint::at(Point::TornKept);
        source.set_len(from).at("cut the torn tail of", &path)?;
        source.sync_all().at("sync", &path)?;
        failpoint::at(Point::TornCut);
        Ok(Cut { seq, bytes: end - from, kept_in })
    }

    /// Copies a part of a segment into a file of its own, durably. Nothing is left of that file if there is no space.
    fn keep(
        &self,
        source: &dyn DiskFile,
        path: &Path,
        part: std::ops::Range<u64>,
        kept_in: &Path,
    ) -> Result<(), Error> {
        let target = self.disk.open(kept_in, Access::Create).at("make", kept_in)?;
        let from = part.start;
        let copied = copy(source, path, part, |bytes, at| {
            target.write_at(bytes, at - from).at("keep the torn tail in", kept_in)
        });
        let kept = copied.and_then(|()| target.sync_all().at("sync", kept_in));
        if kept.as_ref().is_err_and(Error::is_full) {
            drop(target);
            self.disk.remove(kept_in).at("remove", kept_in)?;
        }
        kept
    }

    fn ready(&self, walked: &Walked, head: Head, now_ms: u64) -> Result<Ready, Error> {
        let disk = &*self.disk;
        let head_path = self.dir.join(head::FILE_NAME);
        if disk.stat(&head_path).is_err() {
            // Before the first segment: a segment without a head is always somebody's doing.
            replace(disk, &self.dir, head::FILE_NAME, &Head::EMPTY.encode()).at("make", &head_path)?;
        }
        // A run that died, or whose sync failed, may have left names that only memory has.
        disk.sync_dir(&self.dir).at("sync the folder", &self.dir)?;
        let mut finished = Vec::new();
        for s in walked.segments.iter().rev().skip(1).rev() {
            let path = self.dir.join(segment::file_name(s.first_seq));
            let mut stat = disk.stat(&path).at("look at", &path)?;
            if stat.len > s.end {
                // A crash came between making the next segment and cutting this one's reserved zeros.
                let mut old = Active::open(disk, &self.dir, s.first_seq, s.end)?;
                old.finish()?;
                stat = old.stat;
            }
            finished.push((path, stat));
        }
        let mut active = if let Some(last) = walked.segments.last() {
            let active = Active::open(disk, &self.dir, last.first_seq, last.end)?;
            // What was read there may be in memory only, if a sync failed before the last run's end: write it again.
            copy(&*active.file, &active.path, walked.unacknowledged_from..last.end, |bytes, at| {
                active.file.write_at(bytes, at).at("write", &active.path)
            })?;
            active.file.sync_data().at("sync", &active.path)?;
            active
        } else {
            let header = Header { first_seq: 1, made_ms: now_ms, prev: walked.leaf, root: walked.frontier.root() };
            Active::create(disk, &self.dir, &header, &self.options)?
                .ok_or_else(|| Error::NoSpace { dir: self.dir.clone() })?
        };
        // Starting on a full disk is allowed: endings go on for as long as there is any space.
        active.ensure(active.end, true, &self.options)?;
        let file = disk.open(&head_path, Access::Write).at("open", &head_path)?;
        let stat = file.stat().at("look at", &head_path)?;
        let mut head = HeadFile { file, path: head_path, stat, head };
        let (seq, leaf) = (walked.frontier.size(), walked.leaf);
        head.write(Head { seq, leaf, checkpoint_size: head.head.checkpoint_size, closed: false }, true)?;
        Ok(Ready { active, head, frontier: walked.frontier.clone(), leaf, finished })
    }
}

/// Reads a part of a file in pieces.
fn copy(
    file: &dyn DiskFile,
    path: &Path,
    range: std::ops::Range<u64>,
    mut to: impl FnMut(&[u8], u64) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut buf = vec![0; COPY_BYTES];
    let mut at = range.start;
    while at < range.end {
        let want = usize::try_from(range.end - at).unwrap_or(COPY_BYTES).min(COPY_BYTES);
        match file.read_at(&mut buf[..want], at).at("read", path)? {
            0 => return Err(Error::io("read", path, std::io::ErrorKind::UnexpectedEof.into())),
            n => {
                to(&buf[..n], at)?;
                at += n as u64;
            }
        }
    }
    Ok(())
}
