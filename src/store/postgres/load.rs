//! What a node reads when it starts: everything that is open, in one snapshot of the database.

use super::OpenError;
use super::state::Tail;
use super::tables::{Snapshot, Tables};
use crate::audit::merkle::Frontier;
use crate::store::StoreError;
use crate::store::engine::read_record;
use crate::store::holdings::Holding;
use crate::store::view::{Changed, Rest, Stored, View};

/// What was read.
pub(super) struct Loaded {
    pub(super) view: View,
    pub(super) tail: Tail,
    /// Of the latest checkpoint.
    pub(super) checkpoint_size: u64,
}

pub(super) async fn load(tables: &dyn Tables) -> Result<Loaded, OpenError> {
    Ok(build(tables.load().await?)?)
}

fn build(read: Snapshot) -> Result<Loaded, StoreError> {
    let bad = |what: &str| StoreError::Unreadable(format!("{what} in the database can't be read"));
    let tree = Frontier::from_bytes(read.tail.seq, &read.tail.tree);
    let tree = tree.ok_or_else(|| bad("the tree in the table `tail`"))?;
    let tail = Tail { seq: read.tail.seq, leaf: read.tail.leaf, tree };
    // Freezes and the latest start are few: told by their events.
    let mut told = View::default();
    for (seq, payload) in &read.told {
        let record = read_record(*seq, payload)?;
        told.replay(*seq, record.at, &record.event, &mut Changed::default())?;
    }
    let freezes = told.freezes();
    let parse = |body: &Vec<u8>| -> Result<Holding, StoreError> {
        serde_json::from_slice(body).map_err(|_| bad("a row of the table `holding`"))
    };
    let mut view = View::default();
    view.restore_rest(Rest {
        holdings: read.holdings.iter().map(parse).collect::<Result<_, _>>()?,
        freezes: freezes.holding,
        freeze_epoch: freezes.epoch,
        last_run: told.last_run().0,
        last_at: read.tail.at,
    });
    for body in &read.open {
        view.restore_grant(stored(body)?);
    }
    Ok(Loaded { view, tail, checkpoint_size: read.checkpoint_size })
}

/// A grant as its row has it.
pub(super) fn stored(body: &[u8]) -> Result<Stored, StoreError> {
    serde_json::from_slice(body).map_err(|_| StoreError::Unreadable("a row of the table `grants` can't be read".into()))
}
