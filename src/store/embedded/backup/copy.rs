//! Files from folder to folder, durably, with what they are.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use aws_lc_rs::digest::{Context, SHA256};

use super::{BackupError, FileSum, io};
use crate::audit::disk::{RealDisk, make_dir};

/// Copies are made in pieces of this size, in bytes.
const COPY_BYTES: usize = 1 << 20;

/// What the files of a backup are.
#[derive(Debug, Default)]
pub(in super::super) struct Sums {
    pub(super) files: BTreeMap<String, FileSum>,
}

impl Sums {
    /// Each by its path in the folder.
    pub(in super::super) fn files(&self) -> &BTreeMap<String, FileSum> {
        &self.files
    }
    pub(super) fn add(&mut self, name: &str, bytes: &[u8]) {
        let mut context = Context::new(&SHA256);
        context.update(bytes);
        self.files.insert(name.to_owned(), sum(bytes.len() as u64, context));
    }
    /// What a file is now.
    pub(super) fn of_file(&mut self, path: &Path, name: &str) -> Result<(), BackupError> {
        self.files.insert(name.to_owned(), Self::look(path)?);
        Ok(())
    }
    pub(super) fn look(path: &Path) -> Result<FileSum, BackupError> {
        let mut file = File::open(path).map_err(io("open", path))?;
        pieces(&mut file, path, |_| Ok(()))
    }
}

fn sum(bytes: u64, context: Context) -> FileSum {
    FileSum { bytes, sha256: hex::encode(context.finish()) }
}

fn pieces(
    file: &mut File,
    path: &Path,
    mut to: impl FnMut(&[u8]) -> Result<(), BackupError>,
) -> Result<FileSum, BackupError> {
    let (mut buf, mut bytes, mut context) = (vec![0; COPY_BYTES], 0, Context::new(&SHA256));
    loop {
        match file.read(&mut buf) {
            Ok(0) => return Ok(sum(bytes, context)),
            Ok(n) => {
                context.update(&buf[..n]);
                to(&buf[..n])?;
                bytes += n as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(io("read", path)(e)),
        }
    }
}

/// Copies one file into a new one, readable by this user alone, durably.
pub(in super::super) fn copy_file(from: &Path, to: &Path, name: &str, sums: &mut Sums) -> Result<(), BackupError> {
    let mut source = File::open(from).map_err(io("open", from))?;
    let mut target = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to).map_err(io("make", to))?;
    let copied = pieces(&mut source, from, |bytes| target.write_all(bytes).map_err(io("write", to)))?;
    target.sync_all().map_err(io("sync", to))?;
    sums.files.insert(name.to_owned(), copied);
    Ok(())
}

/// Makes a folder, readable by this user alone, durably. It may exist.
pub(in super::super) fn make_folder(dir: &Path) -> Result<(), BackupError> {
    make_dir(&RealDisk, dir).map_err(io("make the folder", dir))
}

/// Makes the names in a folder durable.
pub(in super::super) fn sync_folder(dir: &Path) -> Result<(), BackupError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(io("sync the folder", dir))
}

/// The names in a folder, sorted.
pub(in super::super) fn names_in(dir: &Path) -> Result<Vec<String>, BackupError> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io("list the folder", dir))? {
        let name = entry.map_err(io("list the folder", dir))?.file_name();
        names.push(name.to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
