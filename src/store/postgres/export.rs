//! The record in the database as a journal folder, byte for byte what the embedded store would have written: for `audit`,
//! for an archive, for the way back. It is read and written as a stream.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::connect::Db;
use super::{OpenError, Settings, hash, num, sql, unnum};
use crate::audit::checkpoint;
use crate::audit::frame::{self, Meta};
use crate::audit::head::{self, Head};
use crate::audit::merkle::{Frontier, Hash};
use crate::audit::segment;
use crate::store::StoreError;

/// A new segment is begun beyond this, in bytes.
const SEGMENT_BYTES: usize = 64 << 20;
/// Rows in one answer.
const ROWS: usize = 2000;

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// The last record.
    pub last_seq: u64,
    /// The root of the tree over all of them.
    pub root: Hash,
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> OpenError {
    let place = path.display().to_string();
    move |e| OpenError::Settings(format!("can't write {place}: {e}"))
}

/// The folder that grows.
struct Out<'a> {
    dir: &'a Path,
    tree: Frontier,
    leaf: Hash,
    segment: Option<(File, PathBuf, usize)>,
    batch: Vec<u8>,
    /// The last record of the batch before.
    durable: u64,
}

impl Out<'_> {
    fn record(&mut self, at_ms: u64, left: u16, payload: &[u8]) -> Result<Hash, OpenError> {
        if self.segment.as_ref().is_none_or(|(_, _, bytes)| self.batch.is_empty() && *bytes > SEGMENT_BYTES) {
            self.next_segment(at_ms)?;
        }
        let seq = self.tree.size() + 1;
        let meta = Meta { seq, at_ms, durable: self.durable, batch_left: left, prev: self.leaf };
        self.leaf = frame::encode(&meta, payload, &mut self.batch);
        self.tree.push(self.leaf);
        if left == 0 {
            self.durable = seq;
            if let Some((file, path, bytes)) = &mut self.segment {
                file.write_all(&self.batch).map_err(io(path))?;
                *bytes += self.batch.len();
            }
            self.batch.clear();
        }
        Ok(self.leaf)
    }

    fn next_segment(&mut self, made_ms: u64) -> Result<(), OpenError> {
        self.sync()?;
        let first_seq = self.tree.size() + 1;
        let path = self.dir.join(segment::file_name(first_seq));
        let header = segment::Header { first_seq, made_ms, prev: self.leaf, root: self.tree.root() }.encode();
        let mut file = File::create_new(&path).map_err(io(&path))?;
        file.write_all(&header).map_err(io(&path))?;
        self.segment = Some((file, path, header.len()));
        Ok(())
    }

    fn sync(&mut self) -> Result<(), OpenError> {
        match self.segment.take() {
            Some((file, path, _)) => file.sync_all().map_err(io(&path)),
            None => Ok(()),
        }
    }
}

/// Writes all records, and the newest checkpoint, into an empty folder. Verify it like any other: nothing here judges,
/// but for a record that isn't what its own leaf says.
pub async fn export(settings: &Settings, dir: &Path) -> Result<Exported, OpenError> {
    super::check_schema(&settings.schema)?;
    std::fs::create_dir_all(dir).map_err(io(dir))?;
    if std::fs::read_dir(dir).map_err(io(dir))?.next().is_some() {
        return Err(OpenError::Settings(format!("{} is not empty: name a new folder", dir.display())));
    }
    let db = Db::new(settings)?;
    let text = |t: &str| sql::text(t, &settings.schema);
    // First: what is written meanwhile comes after it.
    let newest = text("SELECT size, note FROM $S.checkpoint ORDER BY size DESC LIMIT 1");
    let newest = db.query(&newest, &[]).await?.first().map(|row| (unnum(row.get(0)), row.get::<_, String>(1)));
    let since =
        text("SELECT seq, at_ms, batch_left, payload, leaf FROM $S.event WHERE seq > $1 ORDER BY seq LIMIT 2000");
    let (tree, leaf) = (Frontier::new(), Hash::ZERO);
    let mut out = Out { dir, tree, leaf, segment: None, batch: Vec::new(), durable: 0 };
    loop {
        let rows = db.query(&since, &[&num(out.tree.size())]).await?;
        for row in &rows {
            let (seq, left) = (unnum(row.get(0)), u16::try_from(row.get::<_, i32>(2)).unwrap_or(u16::MAX));
            let is = out.record(unnum(row.get(1)), left, row.get(3))?;
            if seq != out.tree.size() || is != hash(row.get(4))? {
                let why =
                    format!("record {seq} in the database is not what its leaf says, or one before it is missing");
                return Err(StoreError::Unreadable(why).into());
            }
        }
        if rows.len() < ROWS {
            break;
        }
    }
    out.sync()?;
    let checkpoint_size = newest.as_ref().map_or(0, |(size, _)| *size);
    if let Some((_, note)) = newest {
        let path = dir.join(checkpoint::FILE_NAME);
        std::fs::write(&path, note).map_err(io(&path))?;
    }
    let path = dir.join(head::FILE_NAME);
    let head = Head { seq: out.tree.size(), leaf: out.leaf, checkpoint_size, closed: true };
    std::fs::write(&path, head.encode()).map_err(io(&path))?;
    Ok(Exported { last_seq: out.tree.size(), root: out.tree.root() })
}
