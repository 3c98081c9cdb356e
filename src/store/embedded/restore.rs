//! A backup, put back as a new data folder.
//!
//! What happened after the backup isn't known: credentials were minted that no record explains, others were ended,
//! votes were cast, and names were used. So nothing that the record says is in force or waits stays so: all of it is
//! ended right behind the backup's last record, before any broker sees it. No grant of before is ever minted for again,
//! so no name is used twice (names come from random grant ids); what exists at targets without a record is found by the
//! sweep, by name; a token that was ended is not good again. Where later records are lost, freezes may be among them:
//! then everything is frozen until somebody lifts that.
//!
//! All of it is made beside, in a folder of its own, and renamed into place last: a restore that was interrupted leaves
//! a folder that no broker starts on ([`refuse_unfinished`]).

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::backup::{
    Backup, BackupError, MANIFEST, Sums, copy_file, io, make_folder, names_in, signer, sync_folder, verifiers,
};
use super::journal_dir;
use crate::audit::checkpoint::Checkpoint;
use crate::audit::note::Verifier;
use crate::audit::verify::{Options, Report, verify};
use crate::core::decide::{Command, decide};
use crate::core::event::{BrokerEvent, EndCause, Event, Selector};
use crate::core::grant::{Grant, GrantState};
use crate::core::id::{GrantId, PersonId, Timestamp};
use crate::runtime::Runtime;
use crate::store::{BATCH_EVENTS_MAX, Batch, Store, StoreError};

/// Holds what is being put back until it is whole.
const UNFINISHED: &str = "restoring";
/// Who freezes what lacks records.
const FREEZER: &str = "restore";
/// Events in one write.
const EVENTS_AT_ONCE: usize = BATCH_EVENTS_MAX / 4;

/// Why a backup wasn't put back.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The backup, or the folders.
    #[error("{0}")]
    Backup(#[from] BackupError),
    /// A checkpoint or key that was given.
    #[error("{0}")]
    Audit(#[from] crate::audit::Error),
    /// A checkpoint shows that the journal went on after the backup.
    #[error(
        "this backup has {records} records, and {file} shows that the journal had {newest}: the last {} would be lost, with every \
         credential minted, vote and freeze in them. Restore a newer backup; if there is none, run this again with \
         --accept-lost-records: what was in force is ended, everything is frozen until somebody lifts it, and the record says so", newest - records
    )]
    Older {
        /// Records in the backup.
        records: u64,
        /// Records that the checkpoint covers.
        newest: u64,
        /// The checkpoint's name.
        file: String,
    },
    /// Nothing was given that shows how far the journal went.
    #[error(
        "nothing shows whether the journal went on after this backup of {records} records. Give the newest checkpoint that was kept \
         elsewhere with --checkpoint; if there is none, run this again with --accept-lost-records: everything is frozen then, until somebody \
         lifts it, and the record says so"
    )]
    Unknown {
        /// Records in the backup.
        records: u64,
    },
    /// A checkpoint contradicts the backup.
    #[error(
        "this backup is of another history than {file}: {why}. It is not restored: find out which of the two is genuine"
    )]
    Fork {
        /// The checkpoint's name.
        file: String,
        /// What doesn't fit.
        why: String,
    },
    /// The store.
    #[error("{0}")]
    Open(#[from] super::OpenError),
    /// What was in force could not be ended.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// A restore into this folder was interrupted.
    #[error(
        "{dir} holds a restore that was not finished: no broker starts on it. Run `countersign restore` into it again", dir = dir.display()
    )]
    Unfinished {
        /// The data folder.
        dir: PathBuf,
    },
}

/// What is known from elsewhere.
#[derive(Debug, Clone, Default)]
pub struct Elsewhere {
    /// Checkpoints that were kept elsewhere: names and bytes.
    pub checkpoints: Vec<(String, Vec<u8>)>,
    /// Keys that may have signed them, beside those in the backup.
    pub keys: Vec<Verifier>,
    /// The operator accepts that later records are lost, or may be.
    pub accept_lost_records: bool,
}

/// What was put back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// Records in the backup.
    pub records: u64,
    /// Grants that were in force or waited, and are over now.
    pub ended: usize,
    /// The freeze of everything, if records may be missing.
    pub freeze: Option<u64>,
    /// How many records are known to be lost.
    pub lost: u64,
}

/// Refuses a data folder in which a restore was interrupted. To be called before anything is made in it.
pub fn refuse_unfinished(data_dir: &Path) -> Result<(), RestoreError> {
    if data_dir.join(UNFINISHED).exists() {
        return Err(RestoreError::Unfinished { dir: data_dir.to_owned() });
    }
    Ok(())
}

/// The newest of the checkpoints from elsewhere, if the backup is as new as each of them, or the operator accepts that it isn't.
pub fn judge(backup: &Backup, elsewhere: &Elsewhere) -> Result<Option<Checkpoint>, RestoreError> {
    let records = backup.manifest.records;
    let keys: Vec<Verifier> = backup.keys.iter().chain(&elsewhere.keys).cloned().collect();
    let mut newest: Option<(&str, Checkpoint)> = None;
    for (file, bytes) in &elsewhere.checkpoints {
        let checkpoint = Checkpoint::open(bytes, &keys)?;
        if checkpoint.origin != backup.manifest.journal {
            let why = format!("it is a checkpoint of {}, and this is {}", checkpoint.origin, backup.manifest.journal);
            return Err(RestoreError::Fork { file: file.clone(), why });
        }
        if checkpoint.size <= records {
            let options =
                Options { keys: keys.clone(), checkpoints: vec![(file.clone(), bytes.clone())], without_head: false };
            if let Report::Broken(broken) = verify(&journal_dir(&backup.dir), &options)? {
                return Err(RestoreError::Fork { file: file.clone(), why: broken.to_string() });
            }
        }
        if newest.as_ref().is_none_or(|(_, n)| n.size < checkpoint.size) {
            newest = Some((file, checkpoint));
        }
    }
    match newest {
        None if !elsewhere.accept_lost_records => Err(RestoreError::Unknown { records }),
        Some((file, newest)) if newest.size > records && !elsewhere.accept_lost_records => {
            Err(RestoreError::Older { records, newest: newest.size, file: file.to_owned() })
        }
        newest => Ok(newest.map(|(_, checkpoint)| checkpoint)),
    }
}

/// Puts a checked backup back as the data folder `data_dir`, which is not there or empty. Needs a running runtime.
pub async fn restore(
    backup: &Backup,
    data_dir: &Path,
    elsewhere: &Elsewhere,
    runtime: Arc<dyn Runtime>,
) -> Result<Restored, RestoreError> {
    let newest = judge(backup, elsewhere)?;
    make_folder(data_dir)?;
    let work = data_dir.join(UNFINISHED);
    match names_in(data_dir)?.as_slice() {
        [] => {}
        // Left by a restore that was interrupted: nobody has used it.
        [one] if one == UNFINISHED => std::fs::remove_dir_all(&work).map_err(io("remove", &work))?,
        _ => {
            let hint = ", or move what is there away (a data folder that is there may know more than the backup)";
            return Err(BackupError::NotEmpty { dir: data_dir.to_owned(), hint }.into());
        }
    }
    copy_back(backup, &work)?;
    let done = end_everything(backup, &work, newest, elsewhere.accept_lost_records, runtime).await?;
    // The journal last: until it has its name there is nothing to start on.
    let mut names = names_in(&work)?;
    names.retain(|name| name != "lock");
    names.sort_by_key(|name| name == "journal");
    for name in names {
        let (from, to) = (work.join(&name), data_dir.join(&name));
        std::fs::rename(&from, &to).map_err(io("move", &from))?;
        sync_folder(data_dir)?;
    }
    std::fs::remove_dir_all(&work).map_err(io("remove", &work))?;
    sync_folder(data_dir)?;
    Ok(done)
}

fn copy_back(backup: &Backup, work: &Path) -> Result<(), BackupError> {
    make_folder(work)?;
    let mut sums = Sums::default();
    for name in backup.manifest.files.keys() {
        let to = work.join(name);
        if let Some(parent) = to.parent() {
            make_folder(parent)?;
        }
        copy_file(&backup.dir.join(name), &to, name, &mut sums)?;
    }
    if sums.files() != &backup.manifest.files {
        let what = format!("{} changed while it was copied back", backup.dir.join(MANIFEST).display());
        return Err(BackupError::Unusable(what));
    }
    for name in ["journal", "keys"] {
        sync_folder(&work.join(name))?;
    }
    Ok(())
}

/// Records the restore, and ends what was in force or waited.
async fn end_everything(
    backup: &Backup,
    work: &Path,
    newest: Option<Checkpoint>,
    may_lack_records: bool,
    runtime: Arc<dyn Runtime>,
) -> Result<Restored, RestoreError> {
    let manifest = &backup.manifest;
    let journal = &manifest.journal;
    let (store, _) = super::open(work, Arc::clone(&runtime), Some(signer(work, journal)?), verifiers(work, journal)?)?;
    let (_, last_at) = store.last_run().await?;
    // Never before the last record, whatever this machine's clock says.
    let at = runtime.wall().max(last_at);
    let lost = newest.as_ref().map_or(0, |n| n.size.saturating_sub(manifest.records));
    let mut events = vec![Event::Broker {
        what: BrokerEvent::Restored {
            records: manifest.records,
            root: manifest.root.clone(),
            made_at: manifest.made_at,
            newest_size: newest.as_ref().map(|n| n.size),
            newest_root: newest.as_ref().map(|n| n.root.to_string()),
            may_lack_records,
        },
    }];
    let freeze = may_lack_records.then_some(manifest.records + 1);
    if let Some(id) = freeze {
        let reason = "the record was restored from a backup, and later records, freezes among them, are lost or may be; lift this \
                      once the freezes that are missing are made again";
        let by = PersonId::new(FREEZER).map_err(|e| StoreError::Impossible(e.to_string()))?;
        events.push(Event::Frozen { id, selector: Selector::All, by, reason: reason.to_owned() });
    }
    append(&store, events, at).await?;
    let ended = end_open(&store, at).await?;
    store.close().await?;
    Ok(Restored { records: manifest.records, ended, freeze, lost })
}

async fn append(store: &dyn Store, events: Vec<Event>, at: Timestamp) -> Result<(), StoreError> {
    store.append(Batch { expect: Vec::new(), events, at, urgent: true }).await.map(drop)
}

/// Ends every grant that is in force or waits, what hangs from another first.
async fn end_open(store: &dyn Store, at: Timestamp) -> Result<usize, StoreError> {
    let mut open = store.open_grants().await?;
    open.retain(|g| matches!(g.state, GrantState::Pending { .. } | GrantState::Active { .. }));
    let parents: HashMap<GrantId, Option<GrantId>> = open.iter().map(|g| (g.id, g.request.parent)).collect();
    let depth = |grant: &Grant| {
        std::iter::successors(Some(grant.id), |id| parents.get(id).copied().flatten()).take(parents.len() + 1).count()
    };
    open.sort_by_cached_key(|g| std::cmp::Reverse(depth(g)));
    let mut events = Vec::new();
    for grant in &open {
        let finish = Command::Finish { cause: EndCause::Restored };
        let made = decide(grant, &finish, at).map_err(|e| StoreError::Impossible(e.to_string()))?;
        events.extend(made.into_iter().zip(grant.version + 1..).map(|(what, version)| Event::Grant {
            id: grant.id,
            version,
            what: Box::new(what),
        }));
        if events.len() >= EVENTS_AT_ONCE {
            append(store, std::mem::take(&mut events), at).await?;
        }
    }
    if !events.is_empty() {
        append(store, events, at).await?;
    }
    Ok(open.len())
}
