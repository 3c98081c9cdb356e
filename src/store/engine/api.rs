//! The trait, over head, view, log and archive. See `mod.rs` for how they belong together.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;

use super::head::No;
use super::{Archive, Engine, Log, Record, closed, over_at, read_record, seams};
use crate::core::digest::Digest;
use crate::core::event::BrokerEvent;
use crate::core::grant::Grant;
use crate::core::id::{AgentId, GrantId, LeaseId, PersonId, TaskKey, Timestamp};
use crate::core::lease::LeaseState;
use crate::core::permission::Permission;
use crate::runtime::{blocking, within};
use crate::store::{AgentHistory, Appended, BATCH_EVENTS_MAX, Batch, Freezes, Held, Job, Recorded, Store, StoreError};

#[async_trait]
impl<L: Log, A: Archive> Store for Engine<L, A> {
    async fn append(&self, batch: Batch) -> Result<Appended, StoreError> {
        if batch.events.is_empty() || batch.events.len() > BATCH_EVENTS_MAX {
            return Err(StoreError::Impossible(format!("a batch has 1 to {BATCH_EVENTS_MAX} events")));
        }
        let payloads =
            batch.events.iter().map(|event| seams::write_record(batch.at, event)).collect::<Result<_, _>>()?;
        match self.queue(batch, payloads) {
            Ok(answer) => answer.await.unwrap_or_else(|_| Err(closed())),
            Err(No::Error(error)) => Err(error),
            Err(No::Conflict) => {
                self.conflicts.fetch_add(1, Ordering::Relaxed);
                Err(StoreError::Conflict)
            }
            Err(No::Wait) => {
                // Whoever reads again at once would see the same; what is on its way is not for reading yet.
                self.conflicts.fetch_add(1, Ordering::Relaxed);
                self.settled().await;
                Err(StoreError::Conflict)
            }
        }
    }

    async fn head(&self, id: GrantId) -> Result<Option<Arc<Grant>>, StoreError> {
        self.head_of(id)
    }

    async fn grant(&self, id: GrantId) -> Result<Option<Arc<Grant>>, StoreError> {
        if let Some(stored) = self.shared.inner.lock().view.get(id) {
            return Ok(Some(Arc::clone(&stored.grant)));
        }
        Ok(self.shared.archive.grant(id)?.map(|s| s.grant))
    }

    async fn changed(&self, id: GrantId, version: u64, wait: Duration) -> Result<Option<Arc<Grant>>, StoreError> {
        let mut limit = std::pin::pin!(self.shared.runtime.sleep(wait));
        let watcher = self.shared.watchers.watch(id);
        loop {
            let notified = watcher.notified();
            tokio::pin!(notified);
            notified.as_mut().enable(); // before looking, so no change is missed
            let grant = self.grant(id).await?;
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
        let root = self.head_of(id)?;
        Ok(self.shared.inner.lock().subtree(id, root))
    }

    async fn task_grants(&self, task: &TaskKey) -> Result<Vec<Arc<Grant>>, StoreError> {
        Ok(self.shared.inner.lock().task_grants(task))
    }

    async fn task_links(&self, task: &TaskKey) -> Result<Vec<GrantId>, StoreError> {
        Ok(self.shared.inner.lock().task_links(task))
    }

    async fn task_completed(&self, task: &TaskKey) -> Result<bool, StoreError> {
        let in_memory = self.shared.inner.lock().view.task_completed(task);
        Ok(in_memory || self.shared.archive.task_completed(task)?)
    }

    async fn open_grants(&self) -> Result<Vec<Arc<Grant>>, StoreError> {
        Ok(self.shared.inner.lock().view.open().cloned().collect())
    }

    async fn open_counts(&self, agent: &AgentId) -> Result<(usize, usize), StoreError> {
        Ok(self.shared.inner.lock().view.counts(agent))
    }

    async fn decided(&self, limit: usize) -> Result<Vec<Arc<Grant>>, StoreError> {
        // Memory first: what leaves it meanwhile is in the archive by then.
        let mut found: BTreeMap<GrantId, Arc<Grant>> =
            self.shared.inner.lock().view.finals().map(|s| (s.grant.id, Arc::clone(&s.grant))).collect();
        for stored in self.shared.archive.decided(limit)? {
            found.entry(stored.grant.id).or_insert(stored.grant);
        }
        let mut all: Vec<_> = found.into_values().collect();
        all.sort_by_key(|g| std::cmp::Reverse(over_at(g)));
        all.truncate(limit);
        Ok(all)
    }

    async fn by_idempotency(&self, digest: &Digest) -> Result<Option<Arc<Grant>>, StoreError> {
        let is_coming = {
            let inner = self.shared.inner.lock();
            if let Some(stored) = inner.view.by_idempotency(digest) {
                return Ok(Some(Arc::clone(&stored.grant)));
            }
            inner.head.grants().any(|g| g.request.idempotency == Some(*digest))
        };
        if is_coming {
            self.settled().await;
            if let Some(stored) = self.shared.inner.lock().view.by_idempotency(digest) {
                return Ok(Some(Arc::clone(&stored.grant)));
            }
        }
        match self.shared.archive.by_idempotency(digest)? {
            Some(id) => self.grant(id).await,
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
        Ok(self.shared.inner.lock().view.held(agent, owner, since, except))
    }

    async fn held_in_task(
        &self,
        task: &TaskKey,
        since: Timestamp,
        except: Option<GrantId>,
    ) -> Result<Vec<Permission>, StoreError> {
        Ok(self.shared.inner.lock().view.held_in_task(task, since, except))
    }

    async fn history(&self, agent: &AgentId) -> Result<Option<AgentHistory>, StoreError> {
        if let Some(known) = self.shared.inner.lock().view.agent(agent) {
            return Ok(Some(known.history.clone()));
        }
        Ok(self.shared.archive.agent(agent)?.map(|k| k.history))
    }

    async fn freezes(&self) -> Result<Freezes, StoreError> {
        Ok(self.shared.inner.lock().view.freezes())
    }

    async fn lease_named(&self, name: &str) -> Result<Option<(GrantId, LeaseId)>, StoreError> {
        Ok(self.shared.inner.lock().lease_named(name))
    }

    async fn events(&self, id: GrantId) -> Result<Vec<Recorded>, StoreError> {
        let in_memory = self.shared.inner.lock().view.get(id).map(|s| s.seqs.clone());
        let shared = Arc::clone(&self.shared);
        let records = blocking(self.shared.runtime.as_ref(), move || {
            let seqs = match in_memory {
                Some(seqs) => seqs,
                None => shared.archive.grant(id)?.map(|s| s.seqs).unwrap_or_default(),
            };
            shared.log.read(&seqs)
        })
        .await
        .map_err(|e| StoreError::Unreadable(e.to_string()))??;
        let read = |(seq, bytes): (u64, Vec<u8>)| {
            let Record { at, event } = read_record(seq, &bytes)?;
            Ok(Recorded { seq, at, event })
        };
        records.into_iter().map(read).collect()
    }

    async fn last_run(&self) -> Result<(Option<BrokerEvent>, Timestamp), StoreError> {
        Ok(self.last_run.clone())
    }

    async fn claim(&self, now: Timestamp, lease_for: Duration, limit: usize) -> Result<Vec<Job>, StoreError> {
        let until = now.plus_ms(u64::try_from(lease_for.as_millis()).unwrap_or(u64::MAX));
        Ok(self.shared.inner.lock().view.due.claim(now, until, limit))
    }

    async fn release(&self, job: Job) {
        if self.shared.inner.lock().view.due.release(job) {
            self.shared.due.notify_one();
        }
    }

    async fn due(&self, now: Timestamp, wait: Duration) {
        let next = self.shared.inner.lock().view.due.next();
        let wait = next.map_or(wait, |at| wait.min(Duration::from_millis(at.ms_since(now))));
        if !wait.is_zero() {
            // Either something changed or the moment has come: the caller looks in any case.
            let _ = within(self.shared.runtime.as_ref(), wait, self.shared.due.notified()).await;
        }
    }

    async fn abandoned(&self) -> Result<Vec<(GrantId, LeaseId)>, StoreError> {
        let inner = self.shared.inner.lock();
        let is_left = |(grant, lease): &&(GrantId, LeaseId)| {
            let lease = inner.standing(*grant).and_then(|g| g.leases.get(lease));
            lease.is_some_and(|l| matches!(l.state, LeaseState::Intended))
        };
        Ok(self.left.iter().filter(is_left).copied().collect())
    }

    async fn recover(&self) -> Result<(), StoreError> {
        let _one = self.recovering.lock().await;
        if self.shared.inner.lock().is_closed {
            return Err(closed());
        }
        if self.shared.log.stopped().is_none() {
            return Ok(());
        }
        self.shared.log.recover().await
    }

    fn is_writable(&self) -> bool {
        !self.shared.inner.lock().is_closed && self.shared.log.stopped().is_none()
    }

    fn figures(&self) -> Vec<(&'static str, u64)> {
        let mut figures = self.shared.log.figures();
        figures.extend(self.shared.archive.figures());
        figures.push(("store_conflicts", self.conflicts.load(Ordering::Relaxed)));
        figures.push(("store_watched", self.shared.watchers.len() as u64));
        let inner = self.shared.inner.lock();
        figures.extend([
            ("store_on_its_way", inner.head.len() as u64),
            ("store_queued", inner.queued),
            ("grants_open", inner.view.open_len() as u64),
            ("grants_final_in_memory", inner.view.finals().count() as u64),
            ("agents_in_memory", inner.view.agents_len() as u64),
            ("holdings", inner.view.holdings_len() as u64),
            ("view_waiting", inner.keeper.waiting() as u64),
        ]);
        figures
    }

    async fn close(&self) -> Result<(), StoreError> {
        {
            let mut inner = self.shared.inner.lock();
            if std::mem::replace(&mut inner.is_closed, true) {
                return Ok(());
            }
            *self.queue.lock() = None;
        }
        self.stop_archiving.cancel();
        let tasks = std::mem::take(&mut *self.tasks.lock());
        for task in tasks {
            // One that panicked has nothing left to do.
            let _ = task.await;
        }
        let shared = Arc::clone(&self.shared);
        // What the view lacks is replayed at the next start: it keeps nobody from the journal's good end.
        let kept = blocking(self.shared.runtime.as_ref(), move || shared.keep(true)).await;
        self.shared.log.close().await?;
        kept.map_err(|e| StoreError::Unavailable(e.to_string()))?
    }
}
