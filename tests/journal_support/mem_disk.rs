//! A disk in memory. What was not synced can be lost, sector by sector, at a power cut; a failed sync loses what it
//! should have written and says nothing the next time, as Linux does; space can run out; operations can fail.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use countersign::audit::disk::{Access, Disk, DiskFile, Stat};

use super::Choices;

const SECTOR: usize = 512;

#[derive(Debug, Clone)]
enum Change {
    Write(u64, Vec<u8>),
    Len(u64),
}

#[derive(Debug, Default, Clone)]
struct Node {
    /// Shared with the copies that are made of the disk, until it changes.
    now: Arc<Vec<u8>>,
    durable: Arc<Vec<u8>>,
    pending: Vec<Change>,
}

/// The parts of a write, by sector.
fn sectors(at: u64, len: usize) -> Vec<(usize, usize)> {
    let (at, mut from, mut out) = (usize::try_from(at).unwrap(), 0, Vec::new());
    while from < len {
        let to = len.min((at + from) / SECTOR * SECTOR + SECTOR - at);
        out.push((from, to));
        from = to;
    }
    out
}

fn apply(bytes: &mut Arc<Vec<u8>>, change: &Change) {
    let bytes = Arc::make_mut(bytes);
    match change {
        Change::Write(at, data) => {
            let at = usize::try_from(*at).unwrap();
            if bytes.len() < at + data.len() {
                bytes.resize(at + data.len(), 0);
            }
            bytes[at..at + data.len()].copy_from_slice(data);
        }
        Change::Len(len) => bytes.resize(usize::try_from(*len).unwrap(), 0),
    }
}

/// What goes wrong at one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// An error, and nothing is done.
    Error,
    /// It is done, and said to have failed.
    ErrorAfter,
    /// A write stops in the middle; anything else fails.
    Short,
    /// No space, this once, whatever it is.
    Full,
    /// From here on there is no space for anything new.
    FullFromHere,
    /// A sync fails; the pages count as clean from then on and never reach the disk. Anything else fails.
    LyingSync,
}

/// What a power cut leaves of what was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    Nothing,
    /// Each write, and each name, or not.
    Writes,
    /// Each sector of each write, and each name, or not.
    Sectors,
    /// The same, and some of the sectors are half old and half new.
    TornSectors,
}

/// What happens to an operation after all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Fine,
    /// Done, and said to have failed.
    Fail,
    /// Half of a write.
    Half,
    /// Not done for good, and forgotten.
    Lie,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    Write,
    Sync,
    Other,
}

fn broken() -> io::Error {
    io::Error::other("input/output error")
}

#[derive(Debug, Default, Clone)]
pub struct State {
    nodes: BTreeMap<u64, Node>,
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    /// Folders, and those whose names are durable.
    dirs: BTreeSet<PathBuf>,
    durable_dirs: BTreeSet<PathBuf>,
    next: u64,
    locked: Vec<PathBuf>,
    /// Syncs that went well so far.
    pub syncs: u64,
    /// Bytes that were read so far.
    pub bytes_read: u64,
    /// Calls that read so far.
    pub reads: u64,
    /// Changing operations so far.
    pub ops: u64,
    /// From this operation on, everything fails: the power is about to go.
    pub dead_from: Option<u64>,
    /// The next syncs fail, so many.
    pub fail_syncs: u32,
    /// The next writes fail, so many, after half of the bytes.
    pub fail_writes: u32,
    /// Bytes that all files together may have.
    pub capacity: Option<u64>,
    /// No file can be made while the capacity is used up.
    pub no_new_files: bool,
    /// What goes wrong at which changing operation (the first is 1).
    pub fault: Option<(u64, Fault)>,
    /// Which call that reads fails (the first is 1).
    pub read_fault: Option<u64>,
    /// How much one call reads at most; 0: 100 bytes.
    pub read_max: usize,
    /// What the operations were, if they are to be told.
    pub told: Option<Vec<String>>,
}

impl State {
    fn change(&mut self, op: Op, what: &str, path: &Path) -> io::Result<Then> {
        self.ops += 1;
        if let Some(told) = &mut self.told {
            told.push(format!("{what} {}", path.display()));
        }
        if self.dead_from.is_some_and(|dead| self.ops > dead) {
            return Err(io::Error::other("power is gone"));
        }
        match self.fault {
            Some((at, fault)) if at == self.ops => match (fault, op) {
                (Fault::ErrorAfter, _) => Ok(Then::Fail),
                (Fault::Short, Op::Write) => Ok(Then::Half),
                (Fault::LyingSync, Op::Sync) => Ok(Then::Lie),
                (Fault::Full, _) => Err(ErrorKind::StorageFull.into()),
                (Fault::FullFromHere, _) => {
                    self.capacity = Some(self.used());
                    self.no_new_files = true;
                    Ok(Then::Fine)
                }
                (Fault::Error | Fault::Short | Fault::LyingSync, _) => Err(broken()),
            },
            _ => Ok(Then::Fine),
        }
    }
    /// The machine is up again.
    fn heal(&mut self) {
        (self.dead_from, self.fault, self.read_fault) = (None, None, None);
        (self.capacity, self.no_new_files) = (None, false);
    }
    fn name(&self, id: u64) -> PathBuf {
        self.names.iter().find(|(_, of)| **of == id).map_or_else(PathBuf::new, |(name, _)| name.clone())
    }
    /// Bytes that all files together have.
    pub fn used(&self) -> u64 {
        self.names.values().map(|id| self.nodes[id].now.len() as u64).sum()
    }
    fn node(&mut self, id: u64) -> &mut Node {
        self.nodes.entry(id).or_default()
    }
    fn grow(&mut self, id: u64, len: u64) -> io::Result<()> {
        let have = self.node(id).now.len() as u64;
        if len <= have {
            return Ok(());
        }
        let free = self.capacity.map_or(u64::MAX, |c| c.saturating_sub(self.used()));
        let more = (len - have).min(free);
        let change = Change::Len(have + more);
        let node = self.node(id);
        apply(&mut node.now, &change);
        node.pending.push(change);
        if have + more < len { Err(ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

#[derive(Debug, Default, Clone)]
pub struct MemDisk(pub Arc<Mutex<State>>);

impl MemDisk {
    /// Reads in large pieces: each call that reads is an index of its own.
    pub fn for_matrix() -> Self {
        let disk = Self::default();
        disk.set(|s| s.read_max = 4096);
        disk
    }

    /// Cuts the power: of what was not synced, each sector and each name is there or not, as chosen.
    pub fn power_cut(&self, choices: &mut Choices) {
        self.power_cut_leaves(Left::Sectors, choices);
    }

    /// Cuts the power; `left` says what may be left of what was not synced.
    pub fn power_cut_leaves(&self, left: Left, choices: &mut Choices) {
        let mut state = self.0.lock().unwrap();
        let state = &mut *state;
        let coin = |choices: &mut Choices| left != Left::Nothing && choices.coin();
        for node in state.nodes.values_mut() {
            for change in std::mem::take(&mut node.pending) {
                match change {
                    Change::Write(at, data) if matches!(left, Left::Sectors | Left::TornSectors) => {
                        for (from, to) in sectors(at, data.len()) {
                            if choices.coin() {
                                let torn = left == Left::TornSectors && choices.coin();
                                let to = if torn { from + (to - from) / 2 } else { to };
                                apply(&mut node.durable, &Change::Write(at + from as u64, data[from..to].to_vec()));
                            }
                        }
                    }
                    other if coin(choices) => apply(&mut node.durable, &other),
                    _ => {}
                }
            }
            node.now = node.durable.clone();
        }
        let names: Vec<PathBuf> = state.names.keys().chain(state.durable_names.keys()).cloned().collect();
        for name in names {
            let (now, durable) = (state.names.get(&name).copied(), state.durable_names.get(&name).copied());
            let after = if now != durable && coin(choices) { now } else { durable };
            match after {
                Some(id) => state.durable_names.insert(name, id),
                None => state.durable_names.remove(&name),
            };
        }
        for dir in std::mem::take(&mut state.dirs) {
            if !state.durable_dirs.contains(&dir) && !coin(choices) {
                // With its name goes what is in it.
                state.durable_names.retain(|name, _| !name.starts_with(&dir));
            } else {
                state.durable_dirs.insert(dir);
            }
        }
        state.dirs = state.durable_dirs.clone();
        state.names = state.durable_names.clone();
        state.locked.clear();
        state.heal();
    }

    /// The process dies; the machine, and what it holds in memory, goes on.
    pub fn process_dies(&self) {
        let mut state = self.0.lock().unwrap();
        state.locked.clear();
        state.heal();
    }

    /// The same, and what is wrong with the disk stays so.
    pub fn process_dies_unhealed(&self) {
        self.set(|s| s.locked.clear());
    }

    /// True once nothing works any more.
    pub fn is_dead(&self) -> bool {
        let state = self.0.lock().unwrap();
        state.dead_from.is_some_and(|dead| state.ops >= dead)
    }

    /// Another disk with the same on it.
    pub fn copy(&self) -> Self {
        Self(Arc::new(Mutex::new(self.0.lock().unwrap().clone())))
    }

    /// There is space again.
    pub fn space_returns(&self) {
        self.set(|s| (s.capacity, s.no_new_files) = (None, false));
    }

    /// A copy of what would be there if the power went now and nothing unsynced were lucky.
    pub fn durable(&self) -> Self {
        let state = self.0.lock().unwrap();
        let node = |n: &Node| Node { now: n.durable.clone(), durable: n.durable.clone(), pending: Vec::new() };
        let copy = State {
            nodes: state.nodes.iter().map(|(id, n)| (*id, node(n))).collect(),
            names: state.durable_names.clone(),
            durable_names: state.durable_names.clone(),
            dirs: state.durable_dirs.clone(),
            durable_dirs: state.durable_dirs.clone(),
            // It is for looking, as often as one likes.
            read_max: usize::MAX,
            ..State::default()
        };
        Self(Arc::new(Mutex::new(copy)))
    }

    pub fn set(&self, f: impl FnOnce(&mut State)) {
        f(&mut self.0.lock().unwrap());
    }

    pub fn bytes_read(&self) -> u64 {
        self.0.lock().unwrap().bytes_read
    }

    /// Is anything of it failing, or about to?
    pub fn is_ill(&self) -> bool {
        let state = self.0.lock().unwrap();
        let fails = state.fail_syncs + state.fail_writes > 0;
        fails || state.capacity.is_some() || state.dead_from.is_some()
    }

    pub fn syncs(&self) -> u64 {
        self.0.lock().unwrap().syncs
    }

    pub fn ops(&self) -> u64 {
        self.0.lock().unwrap().ops
    }

    pub fn read(&self, path: &Path) -> Option<Vec<u8>> {
        let state = self.0.lock().unwrap();
        state.names.get(path).map(|id| state.nodes[id].now.to_vec())
    }
}

impl MemDisk {
    /// An operation on names.
    fn change<T>(&self, what: &str, path: &Path, work: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.0.lock().unwrap();
        let then = state.change(Op::Other, what, path)?;
        let done = work(&mut state)?;
        if then == Then::Fine { Ok(done) } else { Err(broken()) }
    }
}

struct MemFile {
    disk: MemDisk,
    id: u64,
}

impl MemFile {
    /// Does one operation, as far as it is let. `Then::Lie` is for `work` to see to.
    fn change(&self, op: Op, what: &str, work: impl FnOnce(&mut State, Then) -> io::Result<()>) -> io::Result<()> {
        let mut state = self.disk.0.lock().unwrap();
        let name = state.name(self.id);
        let then = state.change(op, what, &name)?;
        work(&mut state, then)?;
        if then == Then::Fine { Ok(()) } else { Err(broken()) }
    }
}

impl DiskFile for MemFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut state = self.disk.0.lock().unwrap();
        state.reads += 1;
        if state.read_fault == Some(state.reads) {
            return Err(broken());
        }
        let read_max = if state.read_max == 0 { 100 } else { state.read_max };
        let now = &state.node(self.id).now;
        let from = usize::try_from(offset).unwrap().min(now.len());
        // Short reads are legal, so they happen.
        let n = buf.len().min(now.len() - from).min(read_max);
        buf[..n].copy_from_slice(&now[from..from + n]);
        state.bytes_read += n as u64;
        Ok(n)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.change(Op::Write, "write", |state, then| {
            state.grow(self.id, offset + bytes.len() as u64)?;
            let fails = state.fail_writes > 0;
            let bytes = if fails || then == Then::Half { &bytes[..bytes.len() / 2] } else { bytes };
            let change = Change::Write(offset, bytes.to_vec());
            let node = state.node(self.id);
            apply(&mut node.now, &change);
            node.pending.push(change);
            if fails {
                state.fail_writes -= 1;
                return Err(broken());
            }
            Ok(())
        })
    }
    fn allocate(&self, _from: u64, len: u64) -> io::Result<()> {
        self.change(Op::Other, "allocate", |state, _| state.grow(self.id, len))
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Op::Other, "set_len", |state, _| {
            let node = state.node(self.id);
            let change = Change::Len(len);
            apply(&mut node.now, &change);
            node.pending.push(change);
            Ok(())
        })
    }
    fn sync_data(&self) -> io::Result<()> {
        self.change(Op::Sync, "sync", |state, then| {
            let fails = state.fail_syncs > 0;
            let node = state.node(self.id);
            let pending = std::mem::take(&mut node.pending);
            if fails || then == Then::Lie {
                // The pages are marked clean and never reach the disk; a second sync would say that all is well.
                state.fail_syncs = state.fail_syncs.saturating_sub(1);
                return Err(broken());
            }
            for change in &pending {
                apply(&mut node.durable, change);
            }
            state.syncs += 1;
            Ok(())
        })
    }
    fn sync_all(&self) -> io::Result<()> {
        self.sync_data()
    }
    fn stat(&self) -> io::Result<Stat> {
        let mut state = self.disk.0.lock().unwrap();
        Ok(Stat { id: (0, self.id), len: state.node(self.id).now.len() as u64 })
    }
}

struct MemLock(MemDisk, PathBuf);

impl Drop for MemLock {
    fn drop(&mut self) {
        self.0.0.lock().unwrap().locked.retain(|p| *p != self.1);
    }
}

impl Disk for MemDisk {
    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let state = self.0.lock().unwrap();
        let here = state.names.keys().filter(|p| p.parent() == Some(dir));
        Ok(here.map(|p| p.file_name().unwrap().to_str().unwrap().to_owned()).collect())
    }
    fn open(&self, path: &Path, access: Access) -> io::Result<Box<dyn DiskFile>> {
        let known = self.0.lock().unwrap().names.get(path).copied();
        let id = match (known, access) {
            (None, Access::Read | Access::Write) => return Err(ErrorKind::NotFound.into()),
            (Some(id), Access::Read | Access::Write) => id,
            (known, Access::Create) => self.change("create", path, |state| {
                if let Some(id) = known {
                    let node = state.node(id);
                    node.now = Arc::default();
                    node.pending.push(Change::Len(0));
                    return Ok(id);
                }
                if state.no_new_files {
                    return Err(ErrorKind::StorageFull.into());
                }
                state.next += 1;
                let id = state.next;
                state.names.insert(path.to_owned(), id);
                state.nodes.insert(id, Node::default());
                Ok(id)
            })?,
        };
        Ok(Box::new(MemFile { disk: self.clone(), id }))
    }
    fn stat(&self, path: &Path) -> io::Result<Stat> {
        let state = self.0.lock().unwrap();
        if path == Path::new("/") || state.dirs.contains(path) {
            return Ok(Stat { id: (1, 0), len: 0 });
        }
        let id = *state.names.get(path).ok_or(ErrorKind::NotFound)?;
        Ok(Stat { id: (0, id), len: state.nodes[&id].now.len() as u64 })
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change("rename", from, |state| {
            let id = state.names.remove(from).ok_or(ErrorKind::NotFound)?;
            state.names.insert(to.to_owned(), id);
            Ok(())
        })
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.change("remove", path, |state| state.names.remove(path).map(drop).ok_or(ErrorKind::NotFound.into()))
    }
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.change("create_dir", dir, |state| {
            state.dirs.extend(dir.ancestors().filter(|d| d.parent().is_some()).map(Path::to_owned));
            Ok(())
        })
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.change("sync_dir", dir, |state| {
            let here = |p: &PathBuf| p.parent() == Some(dir);
            let now: Vec<_> = state.names.iter().filter(|(p, _)| here(p)).map(|(p, id)| (p.clone(), *id)).collect();
            state.durable_names.retain(|p, _| !here(p));
            state.durable_names.extend(now);
            let dirs: Vec<_> = state.dirs.iter().filter(|d| here(d)).cloned().collect();
            state.durable_dirs.extend(dirs);
            Ok(())
        })
    }
    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Send + Sync>>> {
        let mut state = self.0.lock().unwrap();
        if state.locked.iter().any(|p| p == path) {
            return Ok(None);
        }
        state.locked.push(path.to_owned());
        Ok(Some(Box::new(MemLock(self.clone(), path.to_owned()))))
    }
}
