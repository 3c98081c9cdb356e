//! Key files: written whole or not at all, readable by their owner alone, refused otherwise.
//! What is in them is the business of the neighbours.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::KeyError;
use super::random::{SystemRandom, random_bytes};

/// Largest key file, in bytes (a P-256 PKCS#8 document has 138).
pub const KEY_FILE_BYTES_MAX: u64 = 4096;
/// Most files in one folder.
pub const KEY_FILES_MAX: usize = 64;
/// Begins the name of a file that is being written.
const TEMPORARY: &str = ".new-";

/// A folder of secrets: mode 0700, owned by the process's user.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
}

fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> KeyError {
    let path = path.to_owned();
    move |source| KeyError::Io { doing, path, source }
}

/// Refuses what others could read or replace.
fn check_private(path: &Path, meta: &fs::Metadata, wanted: u32) -> Result<(), KeyError> {
    let owner = rustix::process::geteuid().as_raw();
    if meta.uid() != owner {
        return Err(KeyError::Owner { path: path.to_owned(), uid: meta.uid(), wanted: owner });
    }
    if meta.mode() & 0o077 != 0 {
        return Err(KeyError::Mode { path: path.to_owned(), mode: meta.mode() & 0o777, wanted });
    }
    Ok(())
}

impl Folder {
    /// Opens the folder, creating it (and its parents) with mode 0700. Files that an interrupted write left are removed.
    pub(super) fn open(path: &Path) -> Result<Self, KeyError> {
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io("create the folder", path))?;
        // Of the folder itself, not of what a symbolic link in its place points to.
        let meta = fs::symlink_metadata(path).map_err(io("look at the folder", path))?;
        if !meta.is_dir() {
            return Err(KeyError::Unexpected { path: path.to_owned() });
        }
        check_private(path, &meta, 0o700)?;
        let folder = Self { path: path.to_owned() };
        for name in folder.names()? {
            if name.starts_with(TEMPORARY) {
                folder.remove(&name)?;
            }
        }
        Ok(folder)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The names of all files, sorted.
    pub(super) fn names(&self) -> Result<Vec<String>, KeyError> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(io("list the folder", &self.path))? {
            let entry = entry.map_err(io("list the folder", &self.path))?;
            let name = entry.file_name().into_string().map_err(|_| KeyError::Unexpected { path: entry.path() })?;
            if names.len() == KEY_FILES_MAX {
                return Err(KeyError::TooMany { path: self.path.clone() });
            }
            names.push(name);
        }
        names.sort();
        Ok(names)
    }

    /// The file's bytes, or `None` if there is no such file.
    pub(super) fn read(&self, name: &str) -> Result<Option<Zeroizing<Vec<u8>>>, KeyError> {
        let path = self.path(name);
        let no_follow = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
        let flags = i32::try_from(no_follow.bits()).unwrap_or(0);
        let file = match OpenOptions::new().read(true).custom_flags(flags).open(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(io("open", &path))?,
        };
        let meta = file.metadata().map_err(io("look at", &path))?;
        if !meta.is_file() || meta.len() > KEY_FILE_BYTES_MAX {
            return Err(KeyError::Unexpected { path });
        }
        check_private(&path, &meta, 0o600)?;
        // Reserved beforehand: a buffer that grows leaves unzeroised copies behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(KEY_FILE_BYTES_MAX).unwrap_or(4096)));
        file.take(KEY_FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(io("read", &path))?;
        Ok(Some(bytes))
    }

    /// Writes a new file, durably, in one step: after a crash it is there whole or not at all.
    pub(super) fn write(&self, name: &str, bytes: &[u8]) -> Result<(), KeyError> {
        let path = self.path(name);
        let temporary = self.path(&format!("{TEMPORARY}{}", hex::encode(random_bytes::<8>(&SystemRandom))));
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(io("create", &temporary))?;
        let written = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&temporary, &path));
        if let Err(source) = written {
            // Best effort: what stays behind is removed at the next open.
            let _ = fs::remove_file(&temporary);
            return Err(KeyError::Io { doing: "write", path, source });
        }
        self.sync()
    }

    /// Removes a file, durably.
    pub(super) fn remove(&self, name: &str) -> Result<(), KeyError> {
        let path = self.path(name);
        fs::remove_file(&path).map_err(io("remove", &path))?;
        self.sync()
    }

    fn sync(&self) -> Result<(), KeyError> {
        File::open(&self.path).and_then(|d| d.sync_all()).map_err(io("sync the folder", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn files_are_private_and_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let folder = Folder::open(&path).unwrap();
        folder.write("k", b"secret").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(path.join("k")).unwrap().mode() & 0o777, 0o600);
        assert_eq!(folder.read("k").unwrap().unwrap().as_slice(), b"secret");
        assert!(folder.read("absent").unwrap().is_none());
        // What a crash left half-written is removed; what was there stays.
        fs::write(path.join(".new-0011"), b"sec").unwrap();
        assert_eq!(Folder::open(&path).unwrap().names().unwrap(), ["k"]);
    }

    #[test]
    fn what_others_can_read_is_refused_with_the_command_that_mends_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        let folder = Folder::open(&path).unwrap();
        folder.write("k", b"secret").unwrap();
        for mode in [0o640, 0o604, 0o660] {
            chmod(&path.join("k"), mode);
            let said = folder.read("k").unwrap_err().to_string();
            assert!(said.contains("chmod 600") && !said.contains("secret"), "{said}");
        }
        chmod(&path, 0o750);
        assert!(Folder::open(&path).unwrap_err().to_string().contains("chmod 700"));
    }

    #[test]
    fn links_folders_and_large_files_are_no_keys() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        let folder = Folder::open(&path).unwrap();
        folder.write("k", b"secret").unwrap();
        std::os::unix::fs::symlink(path.join("k"), path.join("link")).unwrap();
        assert!(folder.read("link").is_err());
        fs::create_dir(path.join("d")).unwrap();
        assert!(folder.read("d").is_err());
        let limit = usize::try_from(KEY_FILE_BYTES_MAX).unwrap();
        folder.write("fits", &vec![0; limit]).unwrap();
        assert_eq!(folder.read("fits").unwrap().unwrap().len(), limit);
        folder.write("large", &vec![0; limit + 1]).unwrap();
        assert!(folder.read("large").is_err());
        std::os::unix::fs::symlink(&path, dir.path().join("elsewhere")).unwrap();
        assert!(Folder::open(&dir.path().join("elsewhere")).is_err());
    }

    #[test]
    fn a_folder_of_too_many_files_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        let folder = Folder::open(&path).unwrap();
        for i in 0..KEY_FILES_MAX {
            folder.write(&format!("{i:03}"), b"x").unwrap();
        }
        assert_eq!(folder.names().unwrap().len(), KEY_FILES_MAX);
        folder.write("one-more", b"x").unwrap();
        assert!(matches!(folder.names(), Err(KeyError::TooMany { .. })));
    }
}
