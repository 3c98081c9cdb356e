//! The one task of a node that writes to the record and reads what others wrote.
//!
//! A write whose answer is lost is sent again as it was, under its name: the tail it rests on can be passed only once, so
//! either the first one came through and is found among what was written, or it never can.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Core;
use super::state::Pending;
use super::tables::{ROWS, Run, Trouble, Write};
use crate::mutation::Mutation;
use crate::runtime::within;
use crate::store::StoreError;
use crate::store::view::Changed;

/// What others wrote is looked for at least this often.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// After a failure, the next try comes this late.
const TRY_AGAIN: Duration = Duration::from_millis(200);

/// What the task keeps between rounds.
#[derive(Default)]
pub(super) struct Pump {
    pending: Option<Pending>,
}

/// Runs until the store is closed and nothing is left to write.
pub(super) async fn run(core: Arc<Core>) {
    let mut pump = Pump::default();
    loop {
        let is_idle = {
            let state = core.state.lock();
            if state.inner.is_closed && state.queue.is_empty() {
                break;
            }
            state.queue.is_empty()
        };
        if is_idle {
            // Either something is wanted or it is time to look: a round follows in any case.
            let _ = within(core.runtime.as_ref(), LOOK_EVERY, core.wake.notified()).await;
        }
        let outcome = pump.round(&core).await;
        let is_closed = core.state.lock().inner.is_closed;
        if let Err(error) = outcome {
            core.is_down(&error, pump.pending);
            if is_closed {
                core.state.lock().expire(pump.pending, core.in_ms(super::APPEND), "the store is closed");
                break;
            }
            core.runtime.sleep(TRY_AGAIN).await;
        }
    }
    core.answered.pass(u64::MAX);
}

impl Pump {
    async fn round(&mut self, core: &Core) -> Result<(), StoreError> {
        let wanted = core.wanted.load(Ordering::SeqCst);
        let run = core.run();
        let write = {
            let mut state = core.state.lock();
            if let Some(why) = &state.broken {
                return Err(StoreError::Unreadable(why.clone()));
            }
            state.expire(self.pending, core.in_ms(Duration::ZERO), "the database did not take it in time");
            let pending = self.pending.or_else(|| match state.group() {
                0 => None,
                count => Some(Pending { id: core.write_id(), count }),
            });
            self.pending = pending;
            pending.map(|p| Write::of(&state, p.count, p.id, run)).transpose()?
        };
        let mut changed = Changed::default();
        let outcome = self.exchange(core, write.as_ref(), run, &mut changed).await;
        core.tell(&changed);
        outcome?;
        core.seen.pass(wanted);
        Ok(())
    }

    async fn exchange(
        &mut self,
        core: &Core,
        write: Option<&Write>,
        run: Run,
        changed: &mut Changed,
    ) -> Result<(), StoreError> {
        if let (Some(write), Some(pending)) = (write, self.pending) {
            let written = match core.tables.write(write).await {
                Err(Trouble::Lost(_)) if Mutation::LostIsRecorded.is_on() => Ok(true),
                written => written,
            };
            match written {
                Ok(true) => {
                    self.pending = None;
                    let mut state = core.state.lock();
                    state.publish(pending.count, changed);
                    state.down = None;
                    return Ok(());
                }
                Ok(false) => {}
                Err(trouble @ Trouble::Refused(..)) => {
                    self.pending = None;
                    return Self::refused(core, pending, trouble);
                }
                Err(trouble) => return Err(trouble.into()),
            }
        }
        let (is_behind, is_ours_in) = self.catch_up(core, changed).await?;
        if write.is_some() && !is_behind {
            // Nobody was first, and yet it was refused.
            core.diagnose(run).await?;
        } else if is_ours_in || is_behind {
            // Decided anew, and the tail has moved on: the old one can't come through any more.
            self.pending = None;
        }
        core.state.lock().down = None;
        Ok(())
    }

    /// The database said no, and nothing has happened.
    fn refused(core: &Core, pending: Pending, trouble: Trouble) -> Result<(), StoreError> {
        if let Trouble::Refused(code, text) = &trouble {
            match code.as_str() {
                // Somebody else has the same name or idempotency digest: whoever reads again sees it.
                "23505" => {
                    core.state.lock().refuse(pending.count, &StoreError::Conflict);
                    return Ok(());
                }
                // Transactions in each other's way: at once again.
                "40001" | "40P01" => return Ok(()),
                code if code.starts_with("22") || code.starts_with("54") => {
                    let error = StoreError::Impossible(format!("the database can't keep this: {text}"));
                    core.state.lock().refuse(pending.count, &error);
                    return Ok(());
                }
                _ => {}
            }
        }
        Err(trouble.into())
    }

    /// Reads what was written since. True if anything was, and if this node's own write was among it.
    async fn catch_up(&mut self, core: &Core, changed: &mut Changed) -> Result<(bool, bool), StoreError> {
        let (mut is_behind, mut is_ours_in) = (false, false);
        loop {
            let from = core.state.lock().tail.seq;
            let rows = core.tables.since(from).await?;
            let is_last = rows.len() < ROWS;
            is_behind |= !rows.is_empty();
            let mut state = core.state.lock();
            if state.take_in(rows, self.pending.filter(|_| !is_ours_in), changed)? {
                is_ours_in = true;
                self.pending = None;
            }
            if is_last {
                return Ok((is_behind, is_ours_in));
            }
        }
    }
}

impl Core {
    /// Nothing can be written now. What was not sent yet and has waited is given back.
    fn is_down(&self, error: &StoreError, pending: Option<Pending>) {
        let mut state = self.state.lock();
        let why = match error {
            StoreError::Unavailable(why) => why.clone(),
            other => other.to_string(),
        };
        if state.down.is_none() {
            tracing::error!(%why, "the record can't be written");
        }
        state.expire(pending, self.in_ms(Duration::ZERO), &why);
        if matches!(error, StoreError::Unreadable(_)) {
            // For good: nobody needs to wait.
            let all = state.queue.len();
            state.refuse(all, error);
        }
        state.down = Some(why);
        drop(state);
        self.bump();
    }

    /// Wakes whoever waits for what has changed, and lets go of what can leave memory.
    fn tell(&self, changed: &Changed) {
        self.watchers.wake(&changed.grants);
        self.state.lock().settle(changed, self.in_ms(Duration::ZERO));
        if changed.due {
            self.due.notify_one();
        }
        self.bump();
    }

    fn bump(&self) {
        let answered = self.state.lock().answered;
        self.answered.pass(answered);
    }

    /// Why was a write refused, though nobody else wrote?
    async fn diagnose(&self, run: Run) -> Result<(), StoreError> {
        let Some(now) = self.tables.standing(run).await? else {
            return Err(StoreError::Unreadable("the table `tail` in the database is empty".into()));
        };
        if now.is_over {
            self.begin_again(run).await?;
            return Ok(());
        }
        let mut state = self.state.lock();
        let read = (state.tail.seq, state.tail.leaf);
        state.went_back(read, (now.seq, now.leaf))
    }
}
