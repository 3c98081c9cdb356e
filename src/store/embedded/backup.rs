//! A copy of a data folder, taken while the broker runs or not, that can be checked. What it is put back by is in
//! `restore.rs`.
//!
//! Segments are append-only, and what the head file says was acknowledged is on disk for good: so the copy beside a
//! broker that runs is bounded by the head as it was read first, and cut there. Without one (the journal's lock is
//! free), everything that is whole is taken, since after a power cut the head may lag. A checkpoint over exactly that is signed into the copy, which is a
//! journal that was closed in good order. The broker isn't asked and doesn't notice.
//!
//! The keys are in it but for those that sign tokens: who steals a backup can't mint, and tokens that were handed out
//! before a restore are nobody's after it.

mod copy;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::journal_dir;
use crate::audit::checkpoint::{self, Checkpoint};
use crate::audit::disk::{RealDisk, lock_journal, replace};
use crate::audit::head::{self, Head};
use crate::audit::note::{NOTE_BYTES_MAX, Signer, Verifier};
use crate::audit::scan::{SegmentScan, Step};
use crate::audit::segment;
use crate::audit::verify::{Options, Report, Verified, verify};
use crate::audit::walk::{Known, Walked, walk};
use crate::core::id::Timestamp;
use crate::keys::{CheckpointKeys, Purpose};

pub(super) use copy::{Sums, copy_file, make_folder, names_in, sync_folder};

/// The file that makes a folder a backup. Written last.
pub const MANIFEST: &str = "backup.json";
/// Largest manifest, in bytes: a million segments would have one of that size.
const MANIFEST_BYTES_MAX: u64 = 256 << 20;
/// The form of the manifest.
const FORM: u64 = 1;

/// Why a backup can't be made or used.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The operating system refused.
    #[error("could not {action} {path}: {source}. Check that the folder is there, that this user may use it, and the free space", path = path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The journal, its copy, or a key.
    #[error("{0}")]
    Audit(#[from] crate::audit::Error),
    /// Something is there already.
    #[error("{dir} is not empty: nothing is ever written over. Name a new folder{hint}", dir = dir.display())]
    NotEmpty {
        /// The folder.
        dir: PathBuf,
        /// What else could be meant.
        hint: &'static str,
    },
    /// What is to be copied, or put back, isn't there or isn't whole.
    #[error("{0}")]
    Unusable(String),
}

/// What a backup says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The form of this file.
    pub form: u64,
    /// The program's version.
    pub version: String,
    /// When it was made (wall clock).
    pub made_at: Timestamp,
    /// The journal's name in checkpoints.
    pub journal: String,
    /// How many records it has.
    pub records: u64,
    /// The root of the Merkle tree over them, base64.
    pub root: String,
    /// Each file by its path in the folder.
    pub files: BTreeMap<String, FileSum>,
}

/// What a file must be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSum {
    /// Its length.
    pub bytes: u64,
    /// SHA-256, hex.
    pub sha256: String,
}

/// A backup that was checked.
#[derive(Debug, Clone)]
pub struct Backup {
    /// Where it is.
    pub dir: PathBuf,
    /// What it says of itself.
    pub manifest: Manifest,
    /// What its journal says.
    pub verified: Verified,
    /// The keys that its checkpoint may be signed by.
    pub keys: Vec<Verifier>,
    /// The checkpoint over all of it.
    pub note: String,
}

pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> BackupError {
    let path = path.to_owned();
    move |source| BackupError::Io { action, path, source }
}

/// Copies the data folder `data_dir` into the new folder `to`, and checks the copy. `now`: the wall clock.
pub fn backup(data_dir: &Path, to: &Path, now: Timestamp) -> Result<Backup, BackupError> {
    let from = journal_dir(data_dir);
    if segment::list(&RealDisk, &from).map_or(true, |s| s.is_empty()) {
        let what = format!("there is no journal in {}: name the broker's data folder", data_dir.display());
        return Err(BackupError::Unusable(what));
    }
    make_folder(to)?;
    if !names_in(to)?.is_empty() {
        return Err(BackupError::NotEmpty { dir: to.to_owned(), hint: "" });
    }
    // The checkpoint first, then the keys that it may be signed by, then how far was acknowledged: a broker that runs
    // only adds behind.
    let newest = Checkpoint::load(&RealDisk, &from, &[])?.ok_or_else(|| {
        let what = "the journal has no checkpoint yet: the broker writes one within a minute of its first start";
        BackupError::Unusable(what.to_owned())
    })?;
    let mut sums = Sums::default();
    copy_keys(data_dir, to, &mut sums)?;
    let lock = match lock_journal(&RealDisk, &from) {
        Ok(lock) => Some(lock),
        Err(crate::audit::Error::Locked { .. }) => None,
        Err(e) => return Err(e.into()),
    };
    let head = Head::load(&RealDisk, &from)?.ok_or_else(|| {
        BackupError::Unusable("the journal has no head: run `countersign audit verify` on it".to_owned())
    })?;
    let least = head.seq.max(newest.size);
    copy_journal(&from, to, least, if lock.is_some() { u64::MAX } else { least }, &mut sums)?;
    drop(lock);

    let journal = journal_dir(to);
    let known = Known {
        head: Some(Head { closed: false, ..head }),
        roots: vec![newest.known("the broker's checkpoint")],
        ..Known::default()
    };
    let walked = walk(&RealDisk, &journal, &known, Walked::default())?;
    let (records, root) = (walked.frontier.size(), walked.frontier.root());
    let signer = signer(to, &newest.origin)?;
    let note = Checkpoint::sign(&signer, records, root)?;
    let closed = Head { seq: records, leaf: walked.leaf, checkpoint_size: records, closed: true };
    for (name, bytes) in [(checkpoint::FILE_NAME, note.as_bytes()), (head::FILE_NAME, &closed.encode()[..])] {
        replace(&RealDisk, &journal, name, bytes).map_err(io("write", &journal.join(name)))?;
        sums.add(&format!("journal/{name}"), bytes);
    }
    sync_folder(&journal)?;
    let manifest = Manifest {
        form: FORM,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        made_at: now,
        journal: newest.origin,
        records,
        root: root.to_string(),
        files: sums.files,
    };
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| BackupError::Unusable(e.to_string()))?;
    replace(&RealDisk, to, MANIFEST, &text).map_err(io("write", &to.join(MANIFEST)))?;
    check(to)
}

/// All keys but those that sign tokens.
fn copy_keys(data_dir: &Path, to: &Path, sums: &mut Sums) -> Result<(), BackupError> {
    let (from, keys) = (data_dir.join("keys"), to.join("keys"));
    make_folder(&keys)?;
    for name in names_in(&from)? {
        let (source, target) = (from.join(&name), keys.join(&name));
        if !source.is_dir() {
            copy_file(&source, &target, &format!("keys/{name}"), sums)?;
            continue;
        }
        if name == Purpose::Tokens.folder() {
            continue;
        }
        make_folder(&target)?;
        for file in names_in(&source)?.into_iter().filter(|n| !n.starts_with('.')) {
            copy_file(&source.join(&file), &target.join(&file), &format!("keys/{name}/{file}"), sums)?;
        }
        sync_folder(&target)?;
    }
    sync_folder(&keys)
}

/// The segments: whole batches, at least up to record `least`, at most up to `most`.
fn copy_journal(from: &Path, to: &Path, least: u64, most: u64, sums: &mut Sums) -> Result<(), BackupError> {
    let journal = journal_dir(to);
    make_folder(&journal)?;
    let firsts = segment::list(&RealDisk, from)?;
    let firsts: Vec<u64> = firsts.into_iter().filter(|first| *first <= most.max(1)).collect();
    for (i, first) in firsts.iter().enumerate() {
        let name = segment::file_name(*first);
        let (source, target, listed) = (from.join(&name), journal.join(&name), format!("journal/{name}"));
        copy_file(&source, &target, &listed, sums)?;
        if i + 1 == firsts.len() {
            // The broker may have written on meanwhile, and there is space that it has reserved.
            let end = end_of(&target, least, most)?;
            let file = std::fs::OpenOptions::new().write(true).open(&target).map_err(io("open", &target))?;
            file.set_len(end).and_then(|()| file.sync_all()).map_err(io("cut", &target))?;
            sums.of_file(&target, &listed)?;
        }
    }
    Ok(())
}

/// Where in the last segment the copy ends.
fn end_of(path: &Path, least: u64, most: u64) -> Result<u64, BackupError> {
    let short = |what: String| {
        BackupError::Unusable(format!("{}: {what}. Run `countersign audit verify` on the data folder", path.display()))
    };
    let (mut scan, _) = SegmentScan::open(&RealDisk, path)?
        .map_err(|wrong| short(format!("expected {}, found {}", wrong.expected, wrong.found)))?;
    while scan.next_seq() <= most {
        if !matches!(scan.next_batch()?, Step::Batch) {
            if scan.next_seq() <= least {
                return Err(short(format!("record {} was acknowledged and can't be read", scan.next_seq())));
            }
            break;
        }
    }
    Ok(scan.offset())
}

/// Signs with the checkpoint keys of a folder.
pub(super) fn signer(dir: &Path, journal: &str) -> Result<Signer, BackupError> {
    Ok(Signer::from_keys(journal, Arc::new(checkpoint_keys(dir)?))?)
}

fn checkpoint_keys(dir: &Path) -> Result<CheckpointKeys, BackupError> {
    let keys = dir.join("keys");
    // A folder without would get a new key, which has signed nothing.
    if names_in(&keys.join(Purpose::Checkpoints.folder()))?.is_empty() {
        return Err(BackupError::Unusable(format!("{} has no key that signs checkpoints", keys.display())));
    }
    CheckpointKeys::open(&keys, Timestamp(0)).map_err(|e| BackupError::Unusable(e.to_string()))
}

/// The keys that may have signed checkpoints of a folder's journal.
pub(super) fn verifiers(dir: &Path, journal: &str) -> Result<Vec<Verifier>, BackupError> {
    let keys = checkpoint_keys(dir)?;
    Ok(keys.public_keys().into_iter().map(|public| Verifier::of(journal, public)).collect())
}

/// Checks a backup: every file, and the whole journal with its signature.
pub fn check(dir: &Path) -> Result<Backup, BackupError> {
    let bad = |what: String| BackupError::Unusable(format!("{} is no backup that can be used: {what}", dir.display()));
    let path = dir.join(MANIFEST);
    let meta = match std::fs::metadata(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(bad(format!("it has no {MANIFEST}, so it was not finished. Take another")));
        }
        other => other.map_err(io("look at", &path))?,
    };
    if meta.len() > MANIFEST_BYTES_MAX {
        return Err(bad(format!("{MANIFEST} is too large")));
    }
    let text = std::fs::read(&path).map_err(io("read", &path))?;
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|e| bad(format!("{MANIFEST}: {e}")))?;
    if manifest.form != FORM {
        return Err(bad(format!("{MANIFEST} has form {}, this version reads {FORM}", manifest.form)));
    }
    for (name, sum) in &manifest.files {
        let plain = !name.starts_with('/') && name.split('/').all(|p| !matches!(p, "" | "." | ".."));
        let found =
            if plain { Sums::look(&dir.join(name))? } else { return Err(bad(format!("{MANIFEST} names {name}"))) };
        if found != *sum {
            return Err(bad(format!(
                "{name} has changed since the backup was made. Take another copy of it, or an older backup"
            )));
        }
    }
    let (journal, keys) = (journal_dir(dir), verifiers(dir, &manifest.journal)?);
    let listed = |first: &u64| manifest.files.contains_key(&format!("journal/{}", segment::file_name(*first)));
    if !segment::list(&RealDisk, &journal)?.iter().all(listed) {
        return Err(bad("it has segments that it doesn't list".to_owned()));
    }
    let verified = match verify(&journal, &Options { keys: keys.clone(), ..Options::default() })? {
        Report::Verified(verified) => verified,
        Report::Broken(broken) => return Err(bad(broken.to_string())),
    };
    if !verified.closed || verified.last_seq != manifest.records || verified.root.to_string() != manifest.root {
        return Err(bad(format!(
            "its journal has {} records, and {MANIFEST} says {}",
            verified.last_seq, manifest.records
        )));
    }
    let note = journal.join(checkpoint::FILE_NAME);
    let bytes = std::fs::read(&note).map_err(io("read", &note))?;
    if bytes.len() > NOTE_BYTES_MAX || Checkpoint::open(&bytes, &keys)?.size != manifest.records {
        return Err(bad("its checkpoint doesn't cover all of it".to_owned()));
    }
    let note = String::from_utf8_lossy(&bytes).into_owned();
    Ok(Backup { dir: dir.to_owned(), manifest, verified, keys, note })
}
