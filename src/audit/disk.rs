//! Every file operation of the journal, as a trait, so that faults can be put under it; and the machine's own disk.
//! Small on purpose: what is not needed by the journal is not here.

use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::num::NonZero;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::FallocateFlags;

use super::error::{Error, IoContext as _};

/// Zeros are written in pieces of this size where the file system can't allocate.
const ZEROS_BYTES: usize = 64 * 1024;

/// How to open a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It exists; to read.
    Read,
    /// It exists; to read and write.
    Write,
    /// To read and write; whatever was there is emptied. Mode 0600.
    Create,
}

/// What identifies a file and how long it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// Device and inode number.
    pub id: (u64, u64),
    /// Length in bytes.
    pub len: u64,
}

/// An open file.
pub trait DiskFile: Send {
    /// Reads up to `buf.len()` bytes at `offset`; 0 at the end of the file.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Makes the file `len` bytes long, the new bytes zero, with disk space behind every one of them.
    /// After an error the file may have grown by a part.
    fn allocate(&self, from: u64, len: u64) -> io::Result<()>;
    /// Cuts or extends (sparse) to `len` bytes.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Makes the data and what is needed to read it back durable (`fdatasync`).
    fn sync_data(&self) -> io::Result<()>;
    /// Makes data and metadata durable (`fsync`).
    fn sync_all(&self) -> io::Result<()>;
    /// The open file's identity and length.
    fn stat(&self) -> io::Result<Stat>;
}

/// A file system.
pub trait Disk: Send + Sync + fmt::Debug {
    /// The names in a folder, unordered.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
    /// Opens a file.
    fn open(&self, path: &Path, access: Access) -> io::Result<Box<dyn DiskFile>>;
    /// What stands under this path now.
    fn stat(&self, path: &Path) -> io::Result<Stat>;
    /// Renames, replacing what has the new name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes a folder and its parents, mode 0700. It may exist. See [`make_dir`].
    fn create_dir(&self, dir: &Path) -> io::Result<()>;
    /// Makes the names in a folder durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// Takes the exclusive lock on a file, created if need be, until the value is dropped;
    /// `None` if another holder has it. The lock dies with the process.
    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Send + Sync>>>;
    /// How many threads may read at once to gain by it. One, where the order of operations must not be by chance.
    fn readers(&self) -> usize {
        1
    }
}

/// The machine's own file systems.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealDisk;

impl DiskFile for File {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        std::os::unix::fs::FileExt::read_at(self, buf, offset)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }
    fn allocate(&self, from: u64, len: u64) -> io::Result<()> {
        let Some(more) = len.checked_sub(from).filter(|more| *more > 0) else { return Ok(()) };
        match rustix::fs::fallocate(self, FallocateFlags::empty(), from, more) {
            Err(e) if e == rustix::io::Errno::OPNOTSUPP => {
                let zeros = vec![0; ZEROS_BYTES];
                let mut at = from;
                while at < len {
                    let n = usize::try_from(len - at).unwrap_or(ZEROS_BYTES).min(ZEROS_BYTES);
                    self.write_all_at(&zeros[..n], at)?;
                    at += n as u64;
                }
                Ok(())
            }
            other => Ok(other?),
        }
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }
    fn sync_data(&self) -> io::Result<()> {
        File::sync_data(self)
    }
    fn sync_all(&self) -> io::Result<()> {
        File::sync_all(self)
    }
    fn stat(&self) -> io::Result<Stat> {
        let meta = self.metadata()?;
        Ok(Stat { id: (meta.dev(), meta.ino()), len: meta.len() })
    }
}

impl Disk for RealDisk {
    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        // A name that is not UTF-8 is none of ours.
        std::fs::read_dir(dir)?
            .filter_map(|entry| entry.map(|e| e.file_name().into_string().ok()).transpose())
            .collect()
    }
    fn open(&self, path: &Path, access: Access) -> io::Result<Box<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        options.read(true).mode(0o600);
        match access {
            Access::Read => &mut options,
            Access::Write => options.write(true),
            Access::Create => options.write(true).create(true).truncate(true),
        };
        Ok(Box::new(options.open(path)?))
    }
    fn stat(&self, path: &Path) -> io::Result<Stat> {
        let meta = std::fs::metadata(path)?;
        Ok(Stat { id: (meta.dev(), meta.ino()), len: meta.len() })
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }
    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Send + Sync>>> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        match file.try_lock() {
            Ok(()) => {
                // Who holds it, for the message that the next one gets. Only a help: the lock itself is what counts.
                let pid = format!("{}\n", std::process::id());
                file.set_len(0)?;
                file.write_all_at(pid.as_bytes(), 0)?;
                Ok(Some(Box::new(file)))
            }
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(e),
        }
    }
    fn readers(&self) -> usize {
        std::thread::available_parallelism().map_or(1, NonZero::get)
    }
}

/// Makes a folder, and its parents if need be, so that its name is durable.
pub fn make_dir(disk: &dyn Disk, dir: &Path) -> io::Result<()> {
    let levels: Vec<&Path> = dir.ancestors().filter(|d| !d.as_os_str().is_empty()).collect();
    let missing = levels.iter().take_while(|d| disk.stat(d).is_err()).count();
    // One level after the other, each durable before the next: so only the innermost of those that are there can have
    // been made by a run that died before it was durable.
    for (i, level) in levels.iter().enumerate().take(missing + 1).rev() {
        if i < missing {
            disk.create_dir(level)?;
        }
        match level.parent() {
            Some(parent) if parent.as_os_str().is_empty() => disk.sync_dir(Path::new("."))?,
            Some(parent) => disk.sync_dir(parent)?,
            None => {}
        }
    }
    Ok(())
}

/// The lock file in a journal's folder: who holds its lock may write there.
pub const LOCK_FILE: &str = "lock";

/// Takes the lock of the journal in `dir` until the value is dropped.
pub fn lock_journal(disk: &dyn Disk, dir: &Path) -> Result<Box<dyn Send + Sync>, Error> {
    let path = dir.join(LOCK_FILE);
    if let Some(lock) = disk.lock(&path).at("lock", &path)? {
        return Ok(lock);
    }
    let pid = read_small(disk, &path, 32).ok().flatten().unwrap_or_default();
    let pid = String::from_utf8(pid).ok().and_then(|p| p.trim().parse::<u32>().ok());
    let holder = pid.map_or(String::new(), |pid| format!(" (process id {pid})"));
    Err(Error::Locked { dir: dir.to_owned(), holder })
}

/// Reads a small file whole; `Ok(None)` if it isn't there. An error if it has more than `max` bytes.
pub(crate) fn read_small(disk: &dyn Disk, path: &Path, max: usize) -> io::Result<Option<Vec<u8>>> {
    let file = match disk.open(path, Access::Read) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut bytes = vec![0; max + 1];
    let mut have = 0;
    while have < bytes.len() {
        match file.read_at(&mut bytes[have..], have as u64) {
            Ok(0) => break,
            Ok(n) => have += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    if have > max {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("the file has more than {max} bytes")));
    }
    bytes.truncate(have);
    Ok(Some(bytes))
}

/// Replaces a small file so that at every moment either the old or the new content is there, and durably.
/// `name` is the file's name in `dir`; the new content stands under `name.new` first.
pub fn replace(disk: &dyn Disk, dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let new = dir.join(format!("{name}.new"));
    let file = disk.open(&new, Access::Create)?;
    file.write_at(bytes, 0)?;
    file.sync_all()?;
    disk.rename(&new, &dir.join(name))?;
    disk.sync_dir(dir)
}
