//! Runs of nodes. A run says every few seconds that it goes on; one that didn't is declared over by any other, and from
//! then on nothing of it is written any more, whenever it wakes: each write is compared with its row. A node whose run
//! was declared over begins another.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;

use super::connect::{Db, Trouble};
use super::sql::Texts;
use super::{Core, num};
use crate::audit::checkpoint::Checkpoint;
use crate::store::StoreError;

/// A run that gave no sign of life for so long may be declared over.
pub const RUN_LASTS: Duration = Duration::from_secs(10);
/// A sign of life comes this often.
const EVERY: Duration = Duration::from_secs(2);
/// Tables are tidied up, and checkpoints are written, this often.
const UPKEEP: Duration = Duration::from_secs(60);

fn lasts_ms() -> i64 {
    i64::try_from(RUN_LASTS.as_millis()).unwrap_or(i64::MAX)
}

/// Begins a run.
pub(super) async fn join(db: &Db, texts: &Texts) -> Result<i64, Trouble> {
    let rows = db.query(&texts.join, &[&lasts_ms()]).await?;
    rows.first().map(|row| row.get(0)).ok_or_else(|| Trouble::Lost("no run was begun".into()))
}

/// Gives signs of life until the store is closed.
pub(super) async fn run(core: Arc<Core>) {
    let mut alive_since: Option<Instant> = None;
    let mut upkeep_at = Instant::now() + UPKEEP;
    while !core.state.lock().inner.is_closed {
        if let Err(error) = core.renew(&mut alive_since).await {
            alive_since = None;
            tracing::warn!(%error, "this node could not say that it goes on");
        }
        if Instant::now() >= upkeep_at {
            upkeep_at = Instant::now() + UPKEEP;
            if let Err(error) = core.upkeep().await {
                tracing::warn!(%error, "the tables could not be tidied up, or a checkpoint not written");
            }
        }
        tokio::select! {
            () = core.stopping.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

impl Core {
    pub(super) fn run(&self) -> i64 {
        self.run.load(Ordering::SeqCst)
    }

    /// After the run was declared over: another one. What was handed out to the old one isn't ours any more.
    pub(super) async fn begin_again(&self, old: i64) -> Result<(), StoreError> {
        let _one = self.beginning.lock().await;
        if self.run() != old {
            return Ok(());
        }
        let run = join(&self.db, &self.texts).await?;
        self.state.lock().claims.clear();
        self.run.store(run, Ordering::SeqCst);
        tracing::warn!(old, run, "this node was silent for too long and was taken for dead; it begins a new run");
        Ok(())
    }

    async fn renew(&self, alive_since: &mut Option<Instant>) -> Result<(), StoreError> {
        let (run, read) = {
            let state = self.state.lock();
            if state.broken.is_some() {
                // What it was at is for the others.
                return Ok(());
            }
            (self.run(), (state.tail.seq, state.tail.leaf))
        };
        let rows = self.db.query(&self.texts.renew, &[&run, &lasts_ms()]).await?;
        let Some(row) = rows.first() else {
            *alive_since = None;
            return self.begin_again(run).await;
        };
        // Whoever has nothing to write must hear of it too.
        self.state.lock().went_back(read, row.get(0), &row.get::<_, Vec<u8>>(1))?;
        // After an outage of the database all are late: nobody is declared over before all had time to say so.
        let since = *alive_since.get_or_insert_with(Instant::now);
        if since.elapsed() > RUN_LASTS {
            for row in self.db.query(&self.texts.declare, &[&run]).await? {
                tracing::warn!(run = row.get::<_, i64>(0), "a node gave no sign of life; its run is over");
            }
        }
        Ok(())
    }

    async fn upkeep(&self) -> Result<(), StoreError> {
        let reach = num(self.state.lock().inner.view.reach().0);
        self.db.query(&self.texts.prune[0], &[]).await?;
        self.db.query(&self.texts.prune[1], &[&reach]).await?;
        self.db.query(&self.texts.prune[2], &[]).await?;
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
        self.db.query(&self.texts.checkpoint, &[&num(tail.seq), &note, &tail.leaf.0.as_slice()]).await?;
        self.checkpoint_size.store(tail.seq, Ordering::SeqCst);
        Ok(())
    }
}
