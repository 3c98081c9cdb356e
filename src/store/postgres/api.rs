//! The trait, over what a node knows, its one writing task, and the tables.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::oneshot;

use super::ask::Asking;
use super::state::Queued;
use super::tables::Claimed;
use super::{APPEND, PostgresStore, REFRESH};
use crate::audit::frame::check_batch;
use crate::core::digest::Digest;
use crate::core::event::BrokerEvent;
use crate::core::grant::Grant;
use crate::core::id::{AgentId, GrantId, LeaseId, PersonId, TaskKey, Timestamp};
use crate::core::permission::Permission;
use crate::mutation::Mutation;
use crate::runtime::within;
use crate::store::engine::closed;
use crate::store::engine::head::No;
use crate::store::{AgentHistory, Appended, BATCH_EVENTS_MAX, Batch, Freezes, Held, Job, Recorded, Store, StoreError};

/// How long is waited to see whether the database is back: the driver has other work meanwhile.
const RECOVER: Duration = Duration::from_millis(500);
/// Work that was due and that another node may have is looked at again after this, in milliseconds.
const LOOK_AGAIN_MS: u64 = 1000;

impl PostgresStore {
    fn count(&self, no: StoreError) -> StoreError {
        if matches!(no, StoreError::Conflict) {
            self.conflicts.fetch_add(1, Ordering::Relaxed);
        }
        no
    }

    /// Waits until everything that is on its way now is answered.
    async fn settled(&self) {
        let target = self.core.state.lock().inner.queued;
        self.core.answered.reached(target).await;
    }

    /// Waits until all that was written before now has been read.
    async fn round(&self, limit: Duration) -> Result<(), StoreError> {
        if Mutation::ReadsAreStale.is_on() {
            return Ok(());
        }
        let mine = self.core.wanted.fetch_add(1, Ordering::SeqCst) + 1;
        self.core.wake.notify_one();
        let why = || StoreError::Unavailable("what other nodes wrote could not be read in time; try again".into());
        within(self.core.runtime.as_ref(), limit, self.core.seen.reached(mine)).await.ok_or_else(why)
    }

    /// Puts a batch on its way, as these bytes.
    pub(super) async fn queue(
        &self,
        batch: Batch,
        payloads: Vec<(Timestamp, Vec<u8>)>,
    ) -> Result<oneshot::Receiver<Result<Appended, StoreError>>, No> {
        let until_ms = self.core.in_ms(APPEND);
        let _asking = Asking::new(&self.core);
        let facts = self.core.facts(&batch).await?;
        let (reply, answer) = oneshot::channel();
        let queued = Queued { batch, payloads, facts, after: BTreeMap::new(), reply: Some(reply), until_ms };
        self.core.state.lock().enqueue(queued)?;
        self.core.wake.notify_one();
        Ok(answer)
    }
}

#[async_trait]
impl Store for PostgresStore {
    async fn append(&self, batch: Batch) -> Result<Appended, StoreError> {
        if batch.events.is_empty() || batch.events.len() > BATCH_EVENTS_MAX {
            return Err(StoreError::Impossible(format!("a batch has 1 to {BATCH_EVENTS_MAX} events")));
        }
        let write = |event| crate::store::engine::write_record(batch.at, event);
        let payloads = batch.events.iter().map(write).collect::<Result<Vec<_>, _>>()?;
        check_batch(&payloads).map_err(|e| StoreError::Impossible(e.to_string()))?;
        let payloads = payloads.into_iter().map(|payload| (batch.at, payload)).collect();
        let outcome = match self.queue(batch, payloads).await {
            Ok(answer) => answer.await.unwrap_or_else(|_| Err(closed())),
            Err(No::Error(error)) => Err(error),
            Err(No::Conflict) => Err(StoreError::Conflict),
            Err(No::Wait) => {
                // Whoever reads again at once would see the same; what is on its way is not for reading yet.
                self.settled().await;
                Err(StoreError::Conflict)
            }
        };
        outcome.map_err(|e| self.count(e))
    }

    async fn head(&self, id: GrantId) -> Result<Option<Arc<Grant>>, StoreError> {
        if let Some(grant) = self.core.state.lock().inner.standing(id) {
            return Ok(Some(Arc::clone(grant)));
        }
        self.core.grant(id).await
    }

    async fn grant(&self, id: GrantId) -> Result<Option<Arc<Grant>>, StoreError> {
        self.core.grant(id).await
    }

    async fn changed(&self, id: GrantId, version: u64, wait: Duration) -> Result<Option<Arc<Grant>>, StoreError> {
        let mut limit = std::pin::pin!(self.core.runtime.sleep(wait));
        let watcher = self.core.watchers.watch(id);
        loop {
            let notified = watcher.notified();
            tokio::pin!(notified);
            notified.as_mut().enable(); // before looking, so no change is missed
            let grant = self.core.grant(id).await?;
            if grant.as_ref().map_or(0, |g| g.version) != version {
                return Ok(grant);
            }
            tokio::select! {
                biased;
                () = notified => {}
                () = &mut limit => return Ok(grant),
            }
        }
    }

    async fn subtree(&self, id: GrantId) -> Result<Vec<Arc<Grant>>, StoreError> {
        let root = self.head(id).await?;
        Ok(self.core.state.lock().inner.subtree(id, root))
    }

    async fn task_grants(&self, task: &TaskKey) -> Result<Vec<Arc<Grant>>, StoreError> {
        Ok(self.core.state.lock().inner.task_grants(task))
    }

    async fn task_links(&self, task: &TaskKey) -> Result<Vec<GrantId>, StoreError> {
        Ok(self.core.state.lock().inner.task_links(task))
    }

    async fn task_completed(&self, task: &TaskKey) -> Result<bool, StoreError> {
        self.core.task_completed(task).await
    }

    async fn open_grants(&self) -> Result<Vec<Arc<Grant>>, StoreError> {
        Ok(self.core.state.lock().inner.view.open().cloned().collect())
    }

    async fn open_counts(&self, agent: &AgentId) -> Result<(usize, usize), StoreError> {
        Ok(self.core.state.lock().inner.view.counts(agent))
    }

    async fn decided(&self, limit: usize) -> Result<Vec<Arc<Grant>>, StoreError> {
        self.core.decided(limit).await
    }

    async fn by_idempotency(&self, digest: &Digest) -> Result<Option<Arc<Grant>>, StoreError> {
        let in_memory = |store: &Self| {
            let state = store.core.state.lock();
            let found = state.inner.view.by_idempotency(digest).map(|s| Arc::clone(&s.grant));
            (found, state.inner.head.grants().any(|g| g.request.idempotency == Some(*digest)))
        };
        match in_memory(self) {
            (Some(grant), _) => return Ok(Some(grant)),
            (None, true) => {
                self.settled().await;
                if let (Some(grant), _) = in_memory(self) {
                    return Ok(Some(grant));
                }
            }
            (None, false) => {}
        }
        match self.core.twin(digest).await? {
            Some(id) => self.core.grant(id).await,
            None => Ok(None),
        }
    }

    async fn held(
        &self,
        agent: &AgentId,
        owner: Option<&PersonId>,
        since: Timestamp,
        except: Option<GrantId>,
    ) -> Result<Vec<Held>, StoreError> {
        Ok(self.core.state.lock().inner.view.held(agent, owner, since, except))
    }

    async fn held_in_task(
        &self,
        task: &TaskKey,
        since: Timestamp,
        except: Option<GrantId>,
    ) -> Result<Vec<Permission>, StoreError> {
        Ok(self.core.state.lock().inner.view.held_in_task(task, since, except))
    }

    async fn history(&self, agent: &AgentId) -> Result<Option<AgentHistory>, StoreError> {
        self.core.history(agent).await
    }

    async fn freezes(&self) -> Result<Freezes, StoreError> {
        Ok(self.core.state.lock().inner.view.freezes())
    }

    async fn lease_named(&self, name: &str) -> Result<Option<(GrantId, LeaseId)>, StoreError> {
        Ok(self.core.state.lock().inner.lease_named(name))
    }

    async fn events(&self, id: GrantId) -> Result<Vec<Recorded>, StoreError> {
        self.core.events(id).await
    }

    async fn last_run(&self) -> Result<(Option<BrokerEvent>, Timestamp), StoreError> {
        Ok(self.last_run.clone())
    }

    async fn claim(&self, now: Timestamp, lease_for: Duration, limit: usize) -> Result<Vec<Job>, StoreError> {
        let core = &self.core;
        let lease_ms = u64::try_from(lease_for.as_millis()).unwrap_or(u64::MAX);
        {
            let mut state = core.state.lock();
            if state.inner.view.due.next().is_none_or(|at| at > now) {
                return Ok(Vec::new());
            }
            if state.down.is_some() {
                // Endings go on (guarantee 8). Others may do the same, and an ending may be done twice.
                return Ok(state.inner.view.due.claim(now, now.plus_ms(lease_ms), limit));
            }
        }
        let got: BTreeSet<Claimed> = core.tables.claim(now, limit, core.run(), lease_ms).await?.into_iter().collect();
        let jobs: Vec<Job> = got.iter().map(|claimed| claimed.job).collect();
        let mut state = core.state.lock();
        state.claims.extend(got.iter().map(|claimed| (claimed.job, claimed.epoch)));
        // What else is due is somebody else's, for now.
        let later = (jobs.len() < limit).then(|| now.plus_ms(LOOK_AGAIN_MS));
        state.inner.view.due.handed_out(now, &jobs, now.plus_ms(lease_ms), later);
        Ok(jobs)
    }

    async fn release(&self, job: Job) {
        let core = &self.core;
        let epoch = core.state.lock().claims.remove(&job);
        if let Some(epoch) = epoch {
            // One that comes too late gives back nothing of somebody else's: the epoch is another.
            if let Err(trouble) = core.tables.release(job, core.run(), epoch).await {
                tracing::warn!(why = trouble.says(), "a job could not be given back; it comes back by itself");
                return;
            }
        }
        if core.state.lock().inner.view.due.release(job) {
            core.due.notify_one();
        }
    }

    async fn due(&self, now: Timestamp, wait: Duration) {
        let next = self.core.state.lock().inner.view.due.next();
        let wait = next.map_or(wait, |at| wait.min(Duration::from_millis(at.ms_since(now))));
        if !wait.is_zero() {
            // Either something changed or the moment has come: the caller looks in any case.
            let _ = within(self.core.runtime.as_ref(), wait, self.core.due.notified()).await;
        }
    }

    async fn recover(&self) -> Result<(), StoreError> {
        let (refusal, is_closed) = {
            let state = self.core.state.lock();
            (state.refuses(), state.inner.is_closed)
        };
        match refusal {
            None => Ok(()),
            Some(StoreError::Unavailable(_)) if !is_closed => self.round(RECOVER).await,
            Some(error) => Err(error),
        }
    }

    fn is_writable(&self) -> bool {
        let state = self.core.state.lock();
        !state.inner.is_closed && state.down.is_none() && state.broken.is_none()
    }

    fn figures(&self) -> Vec<(&'static str, u64)> {
        let state = self.core.state.lock();
        let inner = &state.inner;
        vec![
            ("journal_records", state.tail.seq),
            ("store_conflicts", self.conflicts.load(Ordering::Relaxed)),
            ("store_watched", self.core.watchers.len() as u64),
            ("store_on_its_way", inner.head.len() as u64),
            ("store_queued", inner.queued),
            ("store_lost_races", state.lost_races),
            ("grants_open", inner.view.open_len() as u64),
            ("grants_final_in_memory", inner.view.finals().count() as u64),
            ("agents_in_memory", inner.view.agents_len() as u64),
            ("holdings", inner.view.holdings_len() as u64),
            ("view_waiting", 0),
        ]
    }

    async fn close(&self) -> Result<(), StoreError> {
        let core = &self.core;
        if std::mem::replace(&mut core.state.lock().inner.is_closed, true) {
            return Ok(());
        }
        core.stopping.cancel();
        core.wake.notify_one();
        let tasks = std::mem::take(&mut *self.tasks.lock());
        for task in tasks {
            // One that panicked has nothing left to do.
            let _ = task.await;
        }
        let signed = core.write_checkpoint().await;
        // What this run was at is for others from here on.
        core.tables.leave(core.run()).await?;
        signed
    }

    async fn abandoned(&self) -> Result<Vec<(GrantId, LeaseId)>, StoreError> {
        Ok(self.core.tables.abandoned().await?)
    }

    async fn alive(&self, grants: &[GrantId]) -> Result<(), StoreError> {
        Ok(self.core.tables.beat(grants).await?)
    }

    async fn silent_ms(&self, grants: &[GrantId]) -> Result<HashMap<GrantId, u64>, StoreError> {
        Ok(self.core.tables.silent_ms(grants).await?.into_iter().collect())
    }

    async fn refresh(&self) -> Result<(), StoreError> {
        let refusal = {
            let state = self.core.state.lock();
            if state.inner.is_closed { None } else { state.down.clone().or_else(|| state.broken.clone()) }
        };
        match refusal {
            Some(why) => Err(StoreError::Unavailable(why)),
            None => self.round(REFRESH).await,
        }
    }
}
