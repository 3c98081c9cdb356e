//! The view in sled: what has left memory, and what a start needs. Never the truth: sled's `flush` does not
//! `fsync`, so each snapshot carries the sequence number and leaf hash that it stands at, and whatever is missing,
//! stale or damaged is rebuilt from the journal. How sled itself is held is in `slot.rs`.

mod slot;

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use sled::{Batch, Db};

use crate::core::digest::Digest;
use crate::core::event::BrokerEvent;
use crate::core::id::{AgentId, GrantId, TaskKey, Timestamp};
use crate::failpoint::{self, Point};
use crate::store::engine::{Archive, Snapshot, over_at};
use crate::store::holdings::Holding;
use crate::store::view::{KnownAgent, Rest, Stored, View};
use crate::store::{Freeze, StoreError};

use slot::{Slot, Trouble, mark_of, open_db};

/// The form of what is kept. Older forms are rebuilt; newer ones are refused.
const FORM: u64 = 5;
/// sled's own default is 1 GiB.
const CACHE_BYTES: u64 = 24 << 20;
/// sled flushes and tidies up by itself this often. Each snapshot is flushed when it is kept, so this is for the rest.
const FLUSH_EVERY_MS: u64 = 10_000;
/// A batch locks out all readers while it is applied: it has at most so many entries.
const BATCH_ENTRIES: usize = 128;
/// How the folder is named in what is said about it.
const VIEW: &str = "the view";

/// Keys begin with one of these.
mod prefix {
    pub const META: u8 = b'm';
    pub const GRANT: u8 = b'g';
    pub const OPEN: u8 = b'o';
    pub const IDEMPOTENCY: u8 = b'i';
    pub const DECIDED: u8 = b'd';
    pub const TASK: u8 = b't';
    pub const HOLDING: u8 = b'h';
    pub const AGENT: u8 = b'a';
}

/// Everything that isn't indexed, in one value.
#[derive(Debug, Default, Serialize, serde::Deserialize)]
struct Meta {
    form: u64,
    seq: u64,
    leaf: String,
    freezes: Vec<Freeze>,
    freeze_epoch: u64,
    run: Option<BrokerEvent>,
    last_at: Timestamp,
}

/// What every form has.
#[derive(serde::Deserialize)]
struct Form {
    form: u64,
}

/// Where a view stands: the last record that it contains.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Position {
    /// Its sequence number; 0 for an empty view.
    pub seq: u64,
    /// Its leaf hash.
    pub leaf: [u8; 32],
}

/// The view on disk.
#[derive(Debug)]
pub struct SledArchive {
    slot: Slot,
}

/// A view as it was found, or an empty one and why.
#[derive(Debug)]
pub struct Found {
    /// The view on disk.
    pub archive: SledArchive,
    /// What a start needs of it.
    pub view: View,
    /// Where it stands.
    pub position: Position,
    /// Why it is empty, though there was one.
    pub rebuilt: Option<String>,
}

fn key(prefix: u8, rest: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(1 + rest.len());
    key.push(prefix);
    key.extend_from_slice(rest);
    key
}

fn unreadable(what: impl std::fmt::Display) -> StoreError {
    StoreError::Unreadable(format!("{VIEW}: {what}"))
}

fn to_bytes<T: Serialize>(value: &T) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(value).map_err(unreadable)
}

fn from_bytes<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(unreadable)
}

fn task_key(task: &TaskKey) -> Vec<u8> {
    key(prefix::TASK, Digest::of_bytes(format!("{}\0{}", task.agent, task.task).as_bytes()).as_bytes())
}

fn agent_key(agent: &AgentId) -> Vec<u8> {
    key(prefix::AGENT, Digest::of_bytes(agent.as_str().as_bytes()).as_bytes())
}

/// So long a start waits for an earlier instance in this process to let go of the view.
const HELD_MAX: Duration = Duration::from_secs(5);
/// And looks again after this.
const HELD_PAUSE: Duration = Duration::from_millis(20);

fn grant_key(id: GrantId) -> Vec<u8> {
    key(prefix::GRANT, id.as_bytes())
}

/// Latest first: the complement of the moment, then the grant.
fn decided_key(at: Timestamp, id: GrantId) -> Vec<u8> {
    let mut rest = (u64::MAX - at.0).to_be_bytes().to_vec();
    rest.extend_from_slice(id.as_bytes());
    key(prefix::DECIDED, &rest)
}

/// Where an instance of sled stands; `None` if it doesn't say.
fn position_of(db: &Db) -> Result<Option<Position>, Trouble> {
    let Some(bytes) = db.get([prefix::META])? else { return Ok(None) };
    let meta: Meta = from_bytes(&bytes)?;
    let mut position = Position { seq: meta.seq, leaf: [0; 32] };
    hex::decode_to_slice(&meta.leaf, &mut position.leaf).map_err(unreadable)?;
    Ok(Some(position))
}

impl SledArchive {
    /// Opens the view and reads what a start needs. It is made anew if there is none or it can't be used.
    pub fn open(dir: &Path) -> Result<Found, StoreError> {
        let mark = mark_of(dir);
        let marked = std::fs::read_to_string(&mark).ok();
        let why = match marked {
            Some(why) => format!("{VIEW} could not be read while the broker was running ({})", why.trim()),
            // sled may panic at what it finds there, too.
            None => match std::panic::catch_unwind(|| Self::read(dir)) {
                Ok(Ok((archive, view, position, None))) => return Ok(Found { archive, view, position, rebuilt: None }),
                Ok(Ok((archive, _, _, Some(why)))) => {
                    drop(archive);
                    why
                }
                Ok(Err(Unusable::Refused(error))) => return Err(error),
                Ok(Err(Unusable::Damaged(why))) => why,
                Err(_) => format!("{VIEW} is damaged: sled can't make sense of its files"),
            },
        };
        let archive = Self::anew(dir)?;
        // Only now: until there is a new one, the reason stands.
        let _ = std::fs::remove_file(&mark);
        Ok(Found { archive, view: View::default(), position: Position::default(), rebuilt: Some(why) })
    }

    /// An empty view in place of what is there.
    pub fn anew(dir: &Path) -> Result<Self, StoreError> {
        match std::fs::remove_dir_all(dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(unreadable(format!("{} can't be removed: {error}", dir.display())));
            }
            _ => {}
        }
        Ok(Self { slot: Slot::new(open_db(dir).map_err(unreadable)?, dir, 0) })
    }

    /// The last value says why it must be rebuilt all the same.
    #[allow(clippy::type_complexity)] // once
    fn read(dir: &Path) -> Result<(Self, View, Position, Option<String>), Unusable> {
        let is_held = |error: &String| error.contains("could not acquire lock");
        // Another instance in this very process: the data folder's own lock keeps others out. When it was dropped, threads
        // of sled's own may have it for a moment longer.
        let patience = Instant::now() + HELD_MAX;
        let mut opened = open_db(dir);
        while opened.as_ref().is_err_and(is_held) && Instant::now() < patience {
            std::thread::sleep(HELD_PAUSE);
            opened = open_db(dir);
        }
        let db = opened.map_err(|error| {
            if is_held(&error) {
                Unusable::Refused(unreadable(format!("{error}: it is still open in this process")))
            } else {
                Unusable::Damaged(format!("{VIEW} could not be opened ({error})"))
            }
        })?;
        let damaged = |e: StoreError| Unusable::Damaged(e.to_string());
        let empty = |db, why| Ok((Self { slot: Slot::new(db, dir, 0) }, View::default(), Position::default(), why));
        let Some(bytes) = db.get([prefix::META]).map_err(|e| damaged(unreadable(e)))? else {
            let why = (!db.is_empty()).then(|| format!("{VIEW} doesn't say where it stands"));
            return empty(db, why);
        };
        let Form { form } = from_bytes(&bytes).map_err(damaged)?;
        if form > FORM {
            return Err(Unusable::Refused(unreadable(format!(
                "it was written by a newer version (form {form}, this one knows {FORM}). Run that version, or remove {} \
                 to rebuild it from the journal",
                dir.display()
            ))));
        }
        if form < FORM {
            return empty(db, Some(format!("{VIEW} had the older form {form}")));
        }
        let meta: Meta = from_bytes(&bytes).map_err(damaged)?;
        let position = position_of(&db).map_err(|e| damaged(e.into()))?.unwrap_or_default();
        let archive = Self { slot: Slot::new(db, dir, position.seq) };
        let view = archive.restore(meta).map_err(damaged)?;
        Ok((archive, view, position, None))
    }

    /// Open grants, their agents, and everything that is neither.
    fn restore(&self, meta: Meta) -> Result<View, StoreError> {
        let mut view = View::default();
        view.restore_rest(Rest {
            holdings: self.all(prefix::HOLDING, |_, v| from_bytes::<Holding>(v))?,
            freezes: meta.freezes,
            freeze_epoch: meta.freeze_epoch,
            last_run: meta.run,
            last_at: meta.last_at,
        });
        for id in self.all(prefix::OPEN, |k, _| grant_id(k))? {
            let stored = self.grant(id)?.ok_or_else(|| unreadable(format!("the open grant {id} is missing")))?;
            let agent = stored.grant.request.agent.id.clone();
            if view.agent(&agent).is_none() {
                let known = self.agent(&agent)?.ok_or_else(|| unreadable("the agent of an open grant is missing"))?;
                view.restore_agent(agent, known);
            }
            view.restore_grant(stored);
        }
        Ok(view)
    }

    fn all<T>(&self, prefix: u8, read: impl Fn(&[u8], &[u8]) -> Result<T, StoreError>) -> Result<Vec<T>, StoreError> {
        self.slot.with(|db| {
            db.scan_prefix([prefix])
                .map(|entry| {
                    let (k, v) = entry?;
                    Ok(read(&k[1..], &v)?)
                })
                .collect()
        })
    }

    fn get<T>(&self, key: Vec<u8>, read: impl Fn(&[u8]) -> Result<T, StoreError>) -> Result<Option<T>, StoreError> {
        self.slot.with(|db| Ok(db.get(key)?.map(|bytes| read(&bytes)).transpose()?))
    }
}

enum Unusable {
    Refused(StoreError),
    Damaged(String),
}

fn grant_id(bytes: &[u8]) -> Result<GrantId, StoreError> {
    let bytes: [u8; 16] = bytes.try_into().map_err(unreadable)?;
    Ok(GrantId::from_bytes(bytes))
}

/// Entries on their way into sled, a bounded number at a time.
struct Writing<'a> {
    db: &'a Db,
    batch: Batch,
    entries: usize,
}

impl Writing<'_> {
    fn put(&mut self, key: Vec<u8>, value: Option<Vec<u8>>) -> Result<(), Trouble> {
        match value {
            Some(value) => self.batch.insert(key, value),
            None => self.batch.remove(key),
        }
        self.entries += 1;
        if self.entries >= BATCH_ENTRIES { self.apply() } else { Ok(()) }
    }
    fn apply(&mut self) -> Result<(), Trouble> {
        self.entries = 0;
        Ok(self.db.apply_batch(std::mem::take(&mut self.batch))?)
    }
}

/// Writes a snapshot, its position last.
fn write(db: &Db, snapshot: &Snapshot) -> Result<(), Trouble> {
    let mut to = Writing { db, batch: Batch::default(), entries: 0 };
    for task in &snapshot.tasks {
        to.put(task_key(task), Some(Vec::new()))?;
    }
    for (name, holding) in &snapshot.holdings {
        let key = key(prefix::HOLDING, Digest::of_bytes(&to_bytes(name)?).as_bytes());
        to.put(key, holding.as_ref().map(to_bytes).transpose()?)?;
    }
    for (agent, known) in &snapshot.agents {
        to.put(agent_key(agent), Some(to_bytes(known)?))?;
    }
    for stored in &snapshot.grants {
        let grant = &stored.grant;
        if let Some(digest) = grant.request.idempotency {
            to.put(key(prefix::IDEMPOTENCY, digest.as_bytes()), Some(grant.id.as_bytes().to_vec()))?;
        }
        let is_final = grant.state.is_final();
        if is_final {
            to.put(decided_key(over_at(grant), grant.id), Some(Vec::new()))?;
        }
        to.put(grant_key(grant.id), Some(to_bytes(stored)?))?;
        to.put(key(prefix::OPEN, grant.id.as_bytes()), (!is_final).then(Vec::new))?;
    }
    to.apply()?;
    failpoint::last(Point::ArchivePart, || _ = db.flush());
    let meta = Meta {
        form: FORM,
        seq: snapshot.seq,
        leaf: hex::encode(snapshot.leaf),
        freezes: snapshot.freezes.holding.clone(),
        freeze_epoch: snapshot.freezes.epoch,
        run: snapshot.run.clone(),
        last_at: snapshot.last_at,
    };
    to.put(vec![prefix::META], Some(to_bytes(&meta)?))?;
    to.apply()?;
    // What is kept leaves memory: a full disk must show itself before.
    db.flush()?;
    Ok(())
}

impl Archive for SledArchive {
    fn keep(&self, snapshot: &Snapshot) -> Result<(), StoreError> {
        self.slot.with(|db| write(db, snapshot))?;
        self.slot.kept(snapshot.seq);
        Ok(())
    }

    fn grant(&self, id: GrantId) -> Result<Option<Stored>, StoreError> {
        self.get(grant_key(id), from_bytes)
    }

    fn by_idempotency(&self, digest: &Digest) -> Result<Option<GrantId>, StoreError> {
        self.get(key(prefix::IDEMPOTENCY, digest.as_bytes()), grant_id)
    }

    fn task_completed(&self, task: &TaskKey) -> Result<bool, StoreError> {
        self.get(task_key(task), |_| Ok(())).map(|found| found.is_some())
    }

    fn agent(&self, agent: &AgentId) -> Result<Option<KnownAgent>, StoreError> {
        self.get(agent_key(agent), from_bytes)
    }

    fn decided(&self, limit: usize) -> Result<Vec<Stored>, StoreError> {
        let ids: Vec<GrantId> = self.slot.with(|db| {
            let entries = db.scan_prefix([prefix::DECIDED]).take(limit);
            entries.map(|entry| Ok(grant_id(entry?.0.get(9..).unwrap_or_default())?)).collect()
        })?;
        let mut out = Vec::with_capacity(ids.len());
        for id in ids {
            out.extend(self.grant(id)?);
        }
        Ok(out)
    }

    fn figures(&self) -> Vec<(&'static str, u64)> {
        let size = self.slot.with(|db| Ok(db.size_on_disk()?));
        size.map(|bytes| ("view_bytes_on_disk", bytes)).into_iter().collect()
    }
}
