//! A folder that goes when its holder goes, however that ends.

use std::path::{Path, PathBuf};

/// The folder.
pub struct Folder {
    path: PathBuf,
    remove: bool,
}

impl Folder {
    /// Holds a folder. `remove`: it was made for this run alone.
    pub fn new(path: PathBuf, remove: bool) -> Self {
        Self { path, remove }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.remove
            && let Err(error) = std::fs::remove_dir_all(&self.path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            eprintln!("countersign: {} is left behind: {error}", self.path.display());
        }
    }
}
