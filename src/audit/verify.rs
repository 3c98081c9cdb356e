//! Offline verification of a whole journal folder: verified up to where and with which root, or exactly where it
//! breaks (DESIGN section 5). Streams: memory stays constant whatever the journal's size.

use std::fmt;
use std::path::Path;

use super::checkpoint::{self, Checkpoint};
use super::disk::{self, Disk, RealDisk};
use super::error::{Break, Error, IoContext as _};
use super::head::{self, Head};
use super::merkle::Hash;
use super::note::Verifier;
use super::walk::{Known, KnownRoot, Torn, Walked, walk};

/// What to verify against.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Keys that may have signed the checkpoints. Without any, the checkpoint beside the segments is compared
    /// but its signature isn't checked: that finds accidents, not an attacker who resealed everything.
    pub keys: Vec<Verifier>,
    /// Checkpoints kept elsewhere: the bytes, and a name for messages. They need `keys`.
    pub checkpoints: Vec<(String, Vec<u8>)>,
    /// Take a journal without head file: the last records could have been dropped.
    pub without_head: bool,
}

/// A journal that verifies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// The last record's sequence number; also the number of records and the size of the tree.
    pub last_seq: u64,
    /// The Merkle root over all of them.
    pub root: Hash,
    /// Leaf hash of the last one.
    pub leaf: Hash,
    /// When the last one was written, milliseconds since 1970.
    pub last_at_ms: u64,
    /// How many segments.
    pub segments: usize,
    /// An unfinished write at the end: never acknowledged, cut when the broker starts next.
    pub torn: Option<Torn>,
    /// The checkpoints that the journal extends: size and name.
    pub extends: Vec<(u64, String)>,
    /// Whether their signatures were checked.
    pub signatures_checked: bool,
    /// Whether the writer had closed the journal. A running broker's journal isn't closed.
    pub closed: bool,
}

impl fmt::Display for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "verified up to {}, root {}", self.last_seq, self.root)?;
        for (size, name) in &self.extends {
            let how = if self.signatures_checked { "" } else { " (signature not checked: no key was given)" };
            write!(f, "\nextends {name} at {size}{how}")?;
        }
        if let Some(torn) = &self.torn {
            write!(
                f,
                "\n{} bytes of an unfinished write at the end of {} were never acknowledged",
                torn.bytes, torn.file
            )?;
        }
        Ok(())
    }
}

/// What verification found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// All is as it was written.
    Verified(Verified),
    /// It isn't, and here is where.
    Broken(Break),
}

/// Verifies the journal in `dir`. An `Err` means that it couldn't be looked at, or that what was given to
/// verify against is unusable; a journal that doesn't verify is [`Report::Broken`].
pub fn verify(dir: &Path, options: &Options) -> Result<Report, Error> {
    verify_on(&RealDisk, dir, options)
}

/// [`verify`] on another disk.
pub fn verify_on(disk: &dyn Disk, dir: &Path, options: &Options) -> Result<Report, Error> {
    let mut roots = Vec::new();
    for (name, bytes) in &options.checkpoints {
        roots.push(Checkpoint::open(bytes, &options.keys)?.known(&format!("checkpoint {name}")));
    }
    match check(disk, dir, options, roots) {
        Ok(verified) => Ok(Report::Verified(verified)),
        Err(Error::Broken(broken)) => Ok(Report::Broken(*broken)),
        Err(e) => Err(e),
    }
}

fn check(disk: &dyn Disk, dir: &Path, options: &Options, roots: Vec<KnownRoot>) -> Result<Verified, Error> {
    let known = Known { roots, ..Known::default() };
    let (walked, known) = examine(disk, dir, &options.keys, known, options.without_head, Walked::default())?;
    Ok(Verified {
        last_seq: walked.frontier.size(),
        root: walked.frontier.root(),
        leaf: walked.leaf,
        last_at_ms: walked.last_at_ms,
        segments: walked.segments.len(),
        torn: walked.torn,
        extends: known.roots.into_iter().map(|r| (r.size, r.source)).collect(),
        signatures_checked: !options.keys.is_empty(),
        closed: known.head.is_some_and(|h| h.closed),
    })
}

/// Adds head and checkpoint of the folder to what is known, and walks. The writer opens by this, too, so
/// that what `audit verify` calls broken is exactly what the broker refuses to start with. `from` is what was walked
/// before (see [`walk`]).
pub(crate) fn examine(
    disk: &dyn Disk,
    dir: &Path,
    keys: &[Verifier],
    mut known: Known,
    without_head: bool,
    from: Walked,
) -> Result<(Walked, Known), Error> {
    // Head before segments: a running writer only adds behind what the head says.
    known.head = if without_head { None } else { Head::load(disk, dir)? };
    let newest = Checkpoint::load(disk, dir, keys)?;
    let promised = known.head.map_or(0, |h| h.checkpoint_size);
    match &newest {
        Some(c) if c.size >= promised => {}
        None if promised == 0 => {}
        other => {
            let found = other.as_ref().map_or("no such file".into(), |c| format!("one for {} records", c.size));
            return Err(checkpoint::broken(&format!("a checkpoint for {promised} records (head file)"), &found).into());
        }
    }
    let signed = if keys.is_empty() { " (unchecked)" } else { "" };
    known.roots.extend(newest.map(|c| c.known(&format!("the checkpoint in the folder{signed}"))));
    let walked = walk(disk, dir, &known, from)?;
    if known.head.is_none() && !without_head && !walked.segments.is_empty() {
        return Err(head::missing(walked.frontier.size()).into());
    }
    Ok((walked, known))
}

/// Makes a new head file for a journal that has lost its own, after verifying it against `options`
/// (which should have a checkpoint from elsewhere). For the operator, with the broker stopped: refused while somebody
/// holds the journal's lock, and while there is a good head, which may know of more than the segments still have.
pub fn remake_head(dir: &Path, options: &Options) -> Result<Report, Error> {
    remake_head_on(&RealDisk, dir, options)
}

/// [`remake_head`] on another disk.
pub fn remake_head_on(disk: &dyn Disk, dir: &Path, options: &Options) -> Result<Report, Error> {
    let lock = disk::lock_journal(disk, dir)?;
    if let Ok(Some(_)) = Head::load(disk, dir) {
        return Err(Error::HeadIsGood { dir: dir.to_owned() });
    }
    let options = Options { without_head: true, ..options.clone() };
    let report = verify_on(disk, dir, &options)?;
    if let Report::Verified(v) = &report {
        let checkpoint_size = Checkpoint::load(disk, dir, &options.keys)?.map_or(0, |c| c.size);
        let head = Head { seq: v.last_seq, leaf: v.leaf, checkpoint_size, closed: false };
        disk::replace(disk, dir, head::FILE_NAME, &head.encode()).at("write", &dir.join(head::FILE_NAME))?;
    }
    drop(lock);
    Ok(report)
}
