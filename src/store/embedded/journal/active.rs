//! The segment that is written to: its space, its presence, and the roll to the next one.

use std::path::{Path, PathBuf};

use super::error::{At as _, is_full};
use super::{Error, Options};
use crate::audit::disk::{Access, Disk, DiskFile, Stat};
use crate::audit::segment::{self, Header};
use crate::failpoint::{self, Point};

/// So much is written ahead of the records, in bytes.
const AHEAD_BYTES: u64 = 256 * 1024;
/// On a full disk, the reserve is tried for in halves, so many.
const RESERVE_PARTS: u32 = 12;

/// The last segment, open for writing.
pub(super) struct Active {
    pub(super) file: Box<dyn DiskFile>,
    pub(super) path: PathBuf,
    /// Its first record.
    pub(super) first_seq: u64,
    /// One past the last durable frame.
    pub(super) end: u64,
    /// Up to here the file has been written, if only with zeros: see [`Active::write_ahead`].
    written: u64,
    /// The file as we left it: any other length or identity is somebody else's doing.
    pub(super) stat: Stat,
}

impl Active {
    /// Opens the last segment, whose good frames end at `end`.
    pub(super) fn open(disk: &dyn Disk, dir: &Path, first_seq: u64, end: u64) -> Result<Self, Error> {
        let path = dir.join(segment::file_name(first_seq));
        let file = disk.open(&path, Access::Write).at("open", &path)?;
        let stat = file.stat().at("look at", &path)?;
        Ok(Self { file, path, first_seq, end, written: end, stat })
    }

    /// Makes a new segment under its name, header and reserved space durable. A crash at any point leaves
    /// either nothing under that name or a good, empty segment. `Ok(None)`: the disk is full.
    pub(super) fn create(
        disk: &dyn Disk,
        dir: &Path,
        header: &Header,
        options: &Options,
    ) -> Result<Option<Self>, Error> {
        let path = dir.join(segment::file_name(header.first_seq));
        let new = path.with_extension("seg.new");
        let bytes = header.encode();
        let len = bytes.len() as u64 + options.reserve_bytes + options.extend_bytes;
        let prepared = disk.open(&new, Access::Create).and_then(|file| {
            file.allocate(0, len)?;
            file.write_at(&bytes, 0)?;
            file.sync_all()?;
            Ok(file)
        });
        let file = match prepared {
            Ok(file) => file,
            Err(e) if is_full(&e) => {
                disk.remove(&new).at("remove", &new)?;
                return Ok(None);
            }
            Err(e) => return Err(Error::io("make the segment", &new, e)),
        };
        failpoint::at(Point::RotateMade);
        disk.rename(&new, &path).at("name the segment", &path)?;
        failpoint::at(Point::RotateNamed);
        disk.sync_dir(dir).at("sync the folder", dir)?;
        let stat = file.stat().at("look at", &path)?;
        let end = bytes.len() as u64;
        Ok(Some(Self { file, path, first_seq: header.first_seq, end, written: end, stat }))
    }

    /// Sees to it that the file has disk space up to `end`, and the reserve behind it. Only endings may go
    /// on when the reserve can't be had (guarantee 8). `Ok(false)`: the disk is full.
    pub(super) fn ensure(&mut self, end: u64, ending: bool, options: &Options) -> Result<bool, Error> {
        let want = end + options.reserve_bytes;
        // A part of the reserve is better than none: an ending takes what can be had.
        let parts = (1..RESERVE_PARTS).map(|n| end + (options.reserve_bytes >> n)).chain([end]);
        let lens = [want + options.extend_bytes, want].into_iter().chain(parts.filter(|_| ending));
        for len in lens {
            if self.stat.len >= want {
                return Ok(true);
            }
            if self.stat.len >= len {
                break;
            }
            match self.file.allocate(self.stat.len, len) {
                Ok(()) => self.stat.len = len,
                Err(e) if is_full(&e) => self.stat.len = self.file.stat().at("look at", &self.path)?.len,
                Err(e) => return Err(Error::io("take disk space for", &self.path, e)),
            }
        }
        Ok(self.stat.len >= want || ending && self.stat.len >= end)
    }

    /// Writes zeros over the space that is used next. The space was only allocated so far, and a sync of what is
    /// written to it would have to record that first: done here a piece at a time, it is paid once in many groups.
    pub(super) fn write_ahead(&mut self) -> Result<(), Error> {
        let from = self.written.max(self.end);
        let to = self.stat.len.min(self.end + AHEAD_BYTES);
        if self.written >= self.end + AHEAD_BYTES / 2 || from >= to {
            return Ok(());
        }
        // Zeros behind the end of a file that somebody cut off would make it as long as it was, and nobody would see it.
        same(&self.path, self.stat, self.file.stat().at("look at", &self.path)?)?;
        let zeros = vec![0; usize::try_from(to - from).unwrap_or(0)];
        match self.file.write_at(&zeros, from) {
            Ok(()) => self.written = to,
            // It is a help, not a need.
            Err(e) if is_full(&e) => self.written = to,
            Err(e) => return Err(Error::io("write", &self.path, e)),
        }
        Ok(())
    }

    /// Disk space behind the last frame.
    pub(super) const fn space(&self) -> u64 {
        self.stat.len.saturating_sub(self.end)
    }

    /// Ends this segment: cuts the reserved space off, so that the file ends with its last frame.
    pub(super) fn finish(&mut self) -> Result<(), Error> {
        self.file.set_len(self.end).at("end the segment", &self.path)?;
        self.file.sync_all().at("sync", &self.path)?;
        self.stat.len = self.end;
        Ok(())
    }
}

/// Checks that a file is still there under its path, the same one, and as long as it was (REGRESSIONS R7).
pub(super) fn check_present(disk: &dyn Disk, path: &Path, stat: Stat) -> Result<(), Error> {
    match disk.stat(path) {
        Ok(now) => same(path, stat, now),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => changed(path, "was removed or renamed".into()),
        Err(e) => Err(Error::io("look at", path, e)),
    }
}

fn same(path: &Path, was: Stat, now: Stat) -> Result<(), Error> {
    if now == was {
        Ok(())
    } else if now.id != was.id {
        changed(path, "was replaced by another file".into())
    } else {
        changed(path, format!("went from {} to {} bytes", was.len, now.len))
    }
}

fn changed(path: &Path, what: String) -> Result<(), Error> {
    Err(Error::Changed { file: path.to_owned(), what })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::disk::RealDisk;
    use crate::audit::merkle::Hash;

    #[test]
    fn zeros_ahead_hide_no_file_that_was_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let header = Header { first_seq: 1, made_ms: 0, prev: Hash::ZERO, root: Hash::ZERO };
        let mut active = Active::create(&RealDisk, dir.path(), &header, &Options::default()).unwrap().unwrap();
        active.write_ahead().unwrap();
        active.written = active.end;
        let len = active.stat.len;
        std::fs::File::options().write(true).open(&active.path).unwrap().set_len(active.end).unwrap();
        assert!(matches!(active.write_ahead(), Err(Error::Changed { .. })));
        assert_ne!(std::fs::metadata(&active.path).unwrap().len(), len, "it is as short as it was found");
    }
}
