//! A disk in memory. What was not synced can be lost, sector by sector, at a power cut; a failed sync loses what it
//! should have written and says nothing the next time, as Linux does; space can run out; operations can fail.

use std::collections::{BTreeMap, BTreeSet, HashMap};
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
    now: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Change>,
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
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

#[derive(Debug, Default)]
pub struct State {
    nodes: HashMap<u64, Node>,
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    /// Folders, and those whose names are durable.
    dirs: BTreeSet<PathBuf>,
    durable_dirs: BTreeSet<PathBuf>,
    next: u64,
    locked: Vec<PathBuf>,
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
}

impl State {
    fn change(&mut self) -> io::Result<()> {
        self.ops += 1;
        if self.dead_from.is_some_and(|dead| self.ops > dead) {
            return Err(io::Error::other("power is gone"));
        }
        Ok(())
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
    /// Cuts the power: of what was not synced, each sector and each name is there or not, as chosen.
    pub fn power_cut(&self, choices: &mut Choices) {
        let mut state = self.0.lock().unwrap();
        let state = &mut *state;
        for node in state.nodes.values_mut() {
            for change in std::mem::take(&mut node.pending) {
                match change {
                    Change::Write(at, data) => {
                        let mut from = 0;
                        while from < data.len() {
                            let sector_end = (usize::try_from(at).unwrap() + from) / SECTOR * SECTOR + SECTOR;
                            let to = data.len().min(sector_end - usize::try_from(at).unwrap());
                            if choices.coin() {
                                apply(&mut node.durable, &Change::Write(at + from as u64, data[from..to].to_vec()));
                            }
                            from = to;
                        }
                    }
                    other if choices.coin() => apply(&mut node.durable, &other),
                    Change::Len(_) => {}
                }
            }
            node.now = node.durable.clone();
        }
        let names: Vec<PathBuf> = state.names.keys().chain(state.durable_names.keys()).cloned().collect();
        for name in names {
            let (now, durable) = (state.names.get(&name).copied(), state.durable_names.get(&name).copied());
            let after = if now != durable && choices.coin() { now } else { durable };
            match after {
                Some(id) => state.durable_names.insert(name, id),
                None => state.durable_names.remove(&name),
            };
        }
        for dir in std::mem::take(&mut state.dirs) {
            if !state.durable_dirs.contains(&dir) && !choices.coin() {
                // With its name goes what is in it.
                state.durable_names.retain(|name, _| !name.starts_with(&dir));
            } else {
                state.durable_dirs.insert(dir);
            }
        }
        state.dirs = state.durable_dirs.clone();
        state.names = state.durable_names.clone();
        state.locked.clear();
        state.dead_from = None;
    }

    /// The process dies; the machine, and what it holds in memory, goes on.
    pub fn process_dies(&self) {
        let mut state = self.0.lock().unwrap();
        state.locked.clear();
        state.dead_from = None;
    }

    pub fn set(&self, f: impl FnOnce(&mut State)) {
        f(&mut self.0.lock().unwrap());
    }

    pub fn bytes_read(&self) -> u64 {
        self.0.lock().unwrap().bytes_read
    }

    pub fn ops(&self) -> u64 {
        self.0.lock().unwrap().ops
    }

    pub fn read(&self, path: &Path) -> Option<Vec<u8>> {
        let state = self.0.lock().unwrap();
        state.names.get(path).map(|id| state.nodes[id].now.clone())
    }
}

struct MemFile {
    disk: MemDisk,
    id: u64,
}

impl DiskFile for MemFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut state = self.disk.0.lock().unwrap();
        let now = &state.node(self.id).now;
        let from = usize::try_from(offset).unwrap().min(now.len());
        // Short reads are legal, so they happen.
        let n = buf.len().min(now.len() - from).min(100);
        buf[..n].copy_from_slice(&now[from..from + n]);
        state.bytes_read += n as u64;
        state.reads += 1;
        Ok(n)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.disk.0.lock().unwrap();
        state.change()?;
        state.grow(self.id, offset + bytes.len() as u64)?;
        let fails = state.fail_writes > 0;
        let bytes = if fails { &bytes[..bytes.len() / 2] } else { bytes };
        let change = Change::Write(offset, bytes.to_vec());
        let node = state.node(self.id);
        apply(&mut node.now, &change);
        node.pending.push(change);
        if fails {
            state.fail_writes -= 1;
            return Err(io::Error::other("input/output error"));
        }
        Ok(())
    }
    fn allocate(&self, _from: u64, len: u64) -> io::Result<()> {
        let mut state = self.disk.0.lock().unwrap();
        state.change()?;
        state.grow(self.id, len)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.disk.0.lock().unwrap();
        state.change()?;
        let node = state.node(self.id);
        let change = Change::Len(len);
        apply(&mut node.now, &change);
        node.pending.push(change);
        Ok(())
    }
    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.disk.0.lock().unwrap();
        state.change()?;
        let fails = state.fail_syncs > 0;
        let node = state.node(self.id);
        let pending = std::mem::take(&mut node.pending);
        if fails {
            // The pages are marked clean and never reach the disk; a second sync would say that all is well.
            state.fail_syncs -= 1;
            return Err(io::Error::other("input/output error"));
        }
        for change in &pending {
            apply(&mut node.durable, change);
        }
        Ok(())
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
        let mut state = self.0.lock().unwrap();
        let id = match (state.names.get(path).copied(), access) {
            (Some(id), Access::Create) => {
                state.change()?;
                let node = state.node(id);
                node.now.clear();
                node.pending.push(Change::Len(0));
                id
            }
            (Some(id), _) => id,
            (None, Access::Create) => {
                state.change()?;
                state.next += 1;
                let id = state.next;
                state.names.insert(path.to_owned(), id);
                state.nodes.insert(id, Node::default());
                id
            }
            (None, _) => return Err(ErrorKind::NotFound.into()),
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
        let mut state = self.0.lock().unwrap();
        state.change()?;
        let id = state.names.remove(from).ok_or(ErrorKind::NotFound)?;
        state.names.insert(to.to_owned(), id);
        Ok(())
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.change()?;
        state.names.remove(path).map(drop).ok_or(ErrorKind::NotFound.into())
    }
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.change()?;
        state.dirs.extend(dir.ancestors().filter(|d| d.parent().is_some()).map(Path::to_owned));
        Ok(())
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.change()?;
        let here = |p: &PathBuf| p.parent() == Some(dir);
        let now: Vec<_> = state.names.iter().filter(|(p, _)| here(p)).map(|(p, id)| (p.clone(), *id)).collect();
        state.durable_names.retain(|p, _| !here(p));
        state.durable_names.extend(now);
        let dirs: Vec<_> = state.dirs.iter().filter(|d| here(d)).cloned().collect();
        state.durable_dirs.extend(dirs);
        Ok(())
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
