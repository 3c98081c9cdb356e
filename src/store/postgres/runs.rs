//! Runs of nodes. A run says every few seconds that it goes on; one that didn't is declared over by any other, and from
//! then on nothing of it is written any more, whenever it wakes: each write is compared with its row. A node whose run
//! was declared over begins another.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Core;
use super::tables::Run;
use crate::audit::checkpoint::Checkpoint;
use crate::runtime::within;
use crate::store::StoreError;

/// A run that gave no sign of life for so long may be declared over.
pub const RUN_LASTS: Duration = Duration::from_secs(10);
/// A sign of life comes this often.
const EVERY: Duration = Duration::from_secs(2);
/// Tables are tidied up, and checkpoints are written, this often.
const UPKEEP: Duration = Duration::from_secs(60);

pub(super) fn lasts_ms() -> u64 {
    u64::try_from(RUN_LASTS.as_millis()).unwrap_or(u64::MAX)
}

/// Gives signs of life until the store is closed.
pub(super) async fn run(core: Arc<Core>) {
    let mut alive_since: Option<u64> = None;
    let mut upkeep_at = core.in_ms(UPKEEP);
    while !core.state.lock().inner.is_closed {
        if let Err(error) = core.renew(&mut alive_since).await {
            alive_since = None;
            tracing::warn!(%error, "this node could not say that it goes on");
        }
        if core.in_ms(Duration::ZERO) >= upkeep_at {
            upkeep_at = core.in_ms(UPKEEP);
            if let Err(error) = core.upkeep().await {
                tracing::warn!(%error, "the tables could not be tidied up, or a checkpoint not written");
            }
        }
        if within(core.runtime.as_ref(), EVERY, core.stopping.cancelled()).await.is_some() {
            return;
        }
    }
}

impl Core {
    pub(super) fn run(&self) -> Run {
        self.run.load(Ordering::SeqCst)
    }

    /// After the run was declared over: another one. What was handed out to the old one isn't ours any more.
    pub(super) async fn begin_again(&self, old: Run) -> Result<(), StoreError> {
        let _one = self.beginning.lock().await;
        if self.run() != old {
            return Ok(());
        }
        let run = self.tables.join(lasts_ms()).await?;
        self.state.lock().claims.clear();
        self.run.store(run, Ordering::SeqCst);
        tracing::warn!(old, run, "this node was silent for too long and was taken for dead; it begins a new run");
        Ok(())
    }

    async fn renew(&self, alive_since: &mut Option<u64>) -> Result<(), StoreError> {
        let (run, read) = {
            let state = self.state.lock();
            if state.broken.is_some() {
                // What it was at is for the others.
                return Ok(());
            }
            (self.run(), (state.tail.seq, state.tail.leaf))
        };
        let Some(end) = self.tables.renew(run, lasts_ms()).await? else {
            *alive_since = None;
            return self.begin_again(run).await;
        };
        // Whoever has nothing to write must hear of it too.
        self.state.lock().went_back(read, end)?;
        // After an outage of the database all are late: nobody is declared over before all had time to say so.
        let now = self.in_ms(Duration::ZERO);
        if now > *alive_since.get_or_insert(now) + lasts_ms() {
            for run in self.tables.declare(run).await? {
                tracing::warn!(run, "a node gave no sign of life; its run is over");
            }
        }
        Ok(())
    }

    async fn upkeep(&self) -> Result<(), StoreError> {
        let reach = self.state.lock().inner.view.reach();
        self.tables.prune(reach).await?;
        self.write_checkpoint().await
    }

    /// Signs what this node has read and verified.
    pub(super) async fn write_checkpoint(&self) -> Result<(), StoreError> {
        let Some(signer) = &self.signer else { return Ok(()) };
        let tail = self.state.lock().tail.clone();
        if tail.seq <= self.checkpoint_size.load(Ordering::SeqCst) {
            return Ok(());
        }
        let note =
            Checkpoint::sign(signer, tail.seq, tail.tree.root()).map_err(|e| StoreError::Unavailable(e.to_string()))?;
        // Of what the database has: it may have lost what this node has read.
        self.tables.checkpoint(tail.seq, &tail.leaf, &note).await?;
        self.checkpoint_size.store(tail.seq, Ordering::SeqCst);
        Ok(())
    }
}
