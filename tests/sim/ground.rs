//! Where the record is, for the oracle: on the disk of one process, or in the database of several nodes.

use std::path::PathBuf;
use std::sync::Arc;

use countersign::audit::disk::Disk;
use countersign::audit::reader::read_from_on;

use super::database::Tables;
use super::link::Database;
use super::mem_disk::MemDisk;

/// What holds it.
pub enum Ground {
    Disk(MemDisk, PathBuf),
    Database(Arc<Database>),
}

/// A durable record.
pub struct Durable {
    pub seq: u64,
    pub payload: Vec<u8>,
    /// Who wrote it, of several nodes.
    pub run: i64,
    /// Was that run over by then?
    pub is_stale: bool,
}

impl Ground {
    /// Changes when something becomes durable.
    pub fn mark(&self) -> u64 {
        match self {
            Self::Disk(disk, _) => disk.syncs(),
            Self::Database(database) => database.look(Tables::count),
        }
    }

    /// Was this run declared over? Whatever it had asked of a target may still happen: nobody can take that back.
    pub fn is_over(&self, run: i64) -> bool {
        match self {
            Self::Disk(..) => false,
            Self::Database(database) => database.look(|tables| tables.is_over(run)),
        }
    }

    /// The durable records from there on, or those before one that can't be read, and why.
    pub fn records(&self, from: u64) -> Result<Vec<Durable>, (Vec<Durable>, String)> {
        let mut out = Vec::new();
        let (disk, dir) = match self {
            Self::Disk(disk, dir) => (disk, dir),
            Self::Database(database) => return Ok(database.look(|tables| tables.durable(from))),
        };
        let disk: Arc<dyn Disk> = Arc::new(disk.durable());
        let mut records = match read_from_on(disk, dir, from) {
            Ok(records) => records,
            // Nothing was ever written.
            Err(_) if from == 1 => return Ok(out),
            Err(error) => return Err((out, error.to_string())),
        };
        loop {
            match records.next_record() {
                Ok(Some(record)) => {
                    let (seq, payload) = (record.meta.seq, record.payload.to_vec());
                    out.push(Durable { seq, payload, run: 0, is_stale: false });
                }
                Ok(None) => return Ok(out),
                Err(error) => return Err((out, error.to_string())),
            }
        }
    }

    /// What is wrong with the record as a Merkle log; a journal's reader has looked already.
    pub fn wrong(&self) -> Option<String> {
        match self {
            Self::Disk(..) => None,
            Self::Database(database) => database.look(Tables::wrong),
        }
    }
}
