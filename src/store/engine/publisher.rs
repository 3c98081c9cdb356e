//! Takes the log's answers in the order of the batches, and shows what is durable.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot};

use super::head::After;
use super::{Archive, Inner, Log, Receipt, Shared};
use crate::core::event::Event;
use crate::core::id::Timestamp;
use crate::failpoint::{self, Point};
use crate::store::view::Changed;
use crate::store::{Appended, StoreError};

/// A batch that is queued in the log.
pub(super) struct InFlight {
    pub(super) receipt: BoxFuture<'static, Result<Receipt, StoreError>>,
    pub(super) at: Timestamp,
    pub(super) events: Vec<Event>,
    pub(super) after: After,
    pub(super) reply: oneshot::Sender<Result<Appended, StoreError>>,
}

/// Runs until the queue is closed and empty.
pub(super) async fn run<L: Log, A: Archive>(shared: Arc<Shared<L, A>>, mut queue: mpsc::UnboundedReceiver<InFlight>) {
    while let Some(mut batch) = queue.recv().await {
        let receipt = (&mut batch.receipt).await;
        failpoint::at(Point::ViewApply);
        let mut changed = Changed::default();
        let outcome = {
            let mut inner = shared.inner.lock();
            inner.answered(&batch, receipt, &mut changed)
        };
        failpoint::at(Point::ViewApplied);
        shared.watchers.wake(&changed.grants);
        if changed.due {
            shared.due.notify_one();
        }
        if outcome.is_ok() {
            shared.dirty.notify_one();
        }
        shared.answered.fetch_add(1, Ordering::Release);
        shared.was_answered.notify_waiters();
        // The caller may be gone; what it wanted is done all the same.
        let _ = batch.reply.send(outcome);
    }
}

impl Inner {
    fn answered(
        &mut self,
        batch: &InFlight,
        receipt: Result<Receipt, StoreError>,
        changed: &mut Changed,
    ) -> Result<Appended, StoreError> {
        self.head.pop(&batch.events, &batch.after, receipt.is_ok());
        let Receipt { first_seq, leaf } = receipt?;
        self.view.publish(first_seq, batch.at, &batch.events, &batch.after, changed);
        let last_seq = first_seq + batch.events.len() as u64 - 1;
        self.keeper.note(changed, last_seq, leaf);
        Ok(Appended { first_seq, last_seq })
    }
}
