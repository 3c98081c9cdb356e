//! Endings: complete, cancel, revoke, freeze. A grant and everything below it end in one write (guarantee 7).

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::core::decide::{Command, decide, is_overdue};
use crate::core::event::{EndCause, Event, Invocation, Selector};
use crate::core::grant::{Grant, GrantState};
use crate::core::id::{GrantId, TaskKey, TaskName};
use crate::core::vote::REASON_CHARS_MAX;
use crate::identity::VerifiedAgent;
use crate::policy::PersonAction;
use crate::store::{Batch, StoreError};

use super::vote::Reviewer;
use super::{Broker, BrokerError, CONFLICT_TRIES_MAX, numbered, request};

/// Grants that a freeze ends in one write.
const FREEZE_CHUNK: usize = 100;
/// Longest tool name, status, or argument that is recorded, in characters.
pub const INVOCATION_TEXT_CHARS_MAX: usize = 256;
/// Most arguments that are recorded with an invocation.
pub const INVOCATION_ARGUMENTS_MAX: usize = 64;

impl Broker {
    /// Ends a grant and everything below it. Over already: nothing happens, and that is success (guarantee 11).
    pub async fn end(&self, id: GrantId, cause: EndCause) -> Result<Arc<Grant>, BrokerError> {
        self.end_all(&[id], &cause, None).await?;
        self.store.grant(id).await?.ok_or(BrokerError::NotFound)
    }

    /// Ends grants with everything below them, and whatever `also` says, in one write. Returns what it ended.
    pub(super) async fn end_all(
        &self,
        ids: &[GrantId],
        cause: &EndCause,
        also: Option<&Event>,
    ) -> Result<Vec<GrantId>, BrokerError> {
        for _ in 0..CONFLICT_TRIES_MAX {
            let now = self.now();
            let mut events: Vec<Event> = also.into_iter().cloned().collect();
            let mut done = BTreeSet::new();
            let mut ended = Vec::new();
            for id in ids {
                for grant in self.store.subtree(*id).await? {
                    if !done.insert(grant.id) {
                        continue;
                    }
                    let own = ids.contains(&grant.id);
                    let cause = if own { cause.clone() } else { EndCause::ParentEnded };
                    let made = decide(&grant, &Command::Finish { cause }, now)?;
                    if !made.is_empty() {
                        ended.push(grant.id);
                        events.extend(numbered(grant.id, grant.version, made));
                    }
                }
            }
            if events.is_empty() {
                return Ok(ended);
            }
            match self.store.append(Batch { expect: Vec::new(), events, at: now, urgent: true }).await {
                Ok(_) => return Ok(ended),
                Err(StoreError::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(BrokerError::Unavailable("too much happened at once; try again".to_owned()))
    }

    /// The agent is done with a grant.
    pub async fn complete(&self, agent: &VerifiedAgent, id: GrantId) -> Result<Arc<Grant>, BrokerError> {
        self.own(agent, id).await?;
        self.end(id, EndCause::Completed).await
    }

    /// The agent takes a pending request back.
    pub async fn cancel(&self, agent: &VerifiedAgent, id: GrantId) -> Result<Arc<Grant>, BrokerError> {
        self.own(agent, id).await?;
        self.command(id, &Command::Cancel, true).await
    }

    /// The agent is done with a task: all its grants end, with what hangs from them, and no more are made.
    pub async fn complete_task(&self, agent: &VerifiedAgent, task: &TaskName) -> Result<Vec<GrantId>, BrokerError> {
        let key = TaskKey { agent: agent.id.clone(), task: task.clone() };
        let grants: Vec<GrantId> = self.store.task_grants(&key).await?.iter().map(|g| g.id).collect();
        if self.store.task_completed(&key).await? {
            return Ok(Vec::new());
        }
        let completed = Event::TaskCompleted { task: key.clone() };
        let mut ended = self.end_all(&grants, &EndCause::TaskCompleted, Some(&completed)).await?;
        // A request that was on its way when the list was read is refused by now, or on the list now.
        let late: Vec<GrantId> = self.store.task_grants(&key).await?.iter().map(|g| g.id).collect();
        if !late.is_empty() {
            ended.extend(self.end_all(&late, &EndCause::TaskCompleted, None).await?);
        }
        Ok(ended)
    }

    /// A sign of life.
    pub async fn heartbeat(&self, agent: &VerifiedAgent, id: GrantId) -> Result<Arc<Grant>, BrokerError> {
        let grant = self.own(agent, id).await?;
        let now = self.now();
        match grant.state {
            GrantState::Active { ends_at, .. } if now < ends_at => {
                self.heartbeats.beat(id, now);
                Ok(grant)
            }
            GrantState::Active { .. } => Err(BrokerError::Over { why: "its time is up".to_owned() }),
            ref state => Err(BrokerError::Over { why: state.word().to_owned() }),
        }
    }

    /// The agent reports what it did. Bounded, and marked as its own word in every record.
    pub async fn report(
        &self,
        agent: &VerifiedAgent,
        id: GrantId,
        invocation: Invocation,
    ) -> Result<Arc<Grant>, BrokerError> {
        self.own(agent, id).await?;
        check_invocation(&invocation)?;
        let max = self.rules().config.limits.invocations_per_grant_max;
        self.command(id, &Command::Report { invocation, max }, false).await
    }

    /// A person takes a grant away.
    pub async fn revoke(&self, by: &Reviewer, id: GrantId, reason: &str) -> Result<Arc<Grant>, BrokerError> {
        let reason = check_reason(reason)?;
        let grant = self.store.grant(id).await?.ok_or(BrokerError::NotFound)?;
        let rules = self.rules();
        super::vote::require(&rules, by, PersonAction::See, &grant).map_err(|_| BrokerError::NotFound)?;
        super::vote::require(&rules, by, PersonAction::Revoke, &grant)?;
        self.end(id, EndCause::Revoked { by: by.person.clone(), reason }).await
    }

    /// What a freeze would end.
    pub async fn would_freeze(&self, by: &Reviewer, selector: &Selector) -> Result<Vec<GrantId>, BrokerError> {
        self.require_anywhere(by, PersonAction::Freeze)?;
        let rules = self.rules();
        let mut ids: BTreeSet<GrantId> = BTreeSet::new();
        for grant in self.store.open_grants().await? {
            if request::selects(&rules, selector, &grant.request) {
                ids.extend(self.store.subtree(grant.id).await?.iter().map(|g| g.id));
            }
        }
        Ok(ids.into_iter().collect())
    }

    /// Refuses new grants that match, and ends those there are. Holds until it is lifted.
    pub async fn freeze(
        &self,
        by: &Reviewer,
        selector: Selector,
        reason: &str,
    ) -> Result<(u64, Vec<GrantId>), BrokerError> {
        self.require_anywhere(by, PersonAction::Freeze)?;
        let reason = check_reason(reason)?;
        // Drawn, not counted: two freezes at once are two.
        let id = u64::from_be_bytes(crate::keys::random::random_bytes::<8>(self.random.as_ref())) >> 12;
        let event = Event::Frozen { id, selector: selector.clone(), by: by.person.clone(), reason };
        // First the door is closed, then the room is emptied: nothing slips in between.
        let batch = Batch { expect: Vec::new(), events: vec![event], at: self.now(), urgent: true };
        self.store.append(batch).await?;
        let mut ended = Vec::new();
        let covered = self.would_freeze(by, &selector).await?;
        for chunk in covered.chunks(FREEZE_CHUNK) {
            ended.extend(self.end_all(chunk, &EndCause::Frozen { id }, None).await?);
        }
        Ok((id, ended))
    }

    /// Lifts a freeze.
    pub async fn unfreeze(&self, by: &Reviewer, id: u64) -> Result<(), BrokerError> {
        self.require_anywhere(by, PersonAction::Freeze)?;
        if !self.store.freezes().await?.holding.iter().any(|f| f.id == id) {
            return Err(BrokerError::NotFound);
        }
        let event = Event::Unfrozen { id, by: by.person.clone() };
        let batch = Batch { expect: Vec::new(), events: vec![event], at: self.now(), urgent: false };
        self.store.append(batch).await?;
        Ok(())
    }

    /// A deadline of a grant has come.
    pub(super) async fn tick(&self, id: GrantId) -> Result<(), BrokerError> {
        let Some(grant) = self.store.head(id).await? else { return Ok(()) };
        if !is_overdue(&grant, self.now()) {
            return Ok(());
        }
        match grant.state {
            // Children end with it, in the same write.
            GrantState::Active { .. } => self.end(id, EndCause::Expired).await.map(|_| ()),
            _ => self.command(id, &Command::Tick, true).await.map(|_| ()),
        }
    }
}

fn check_reason(reason: &str) -> Result<String, BrokerError> {
    let chars = reason.chars().count();
    if chars == 0 || chars > REASON_CHARS_MAX || reason.chars().any(|c| c.is_control() && c != '\n') {
        let what = format!("say why in 1 to {REASON_CHARS_MAX} characters, without control characters");
        return Err(BrokerError::Invalid { field: "reason", what });
    }
    Ok(reason.to_owned())
}

fn check_invocation(invocation: &Invocation) -> Result<(), BrokerError> {
    let bad = |field, what: &str| Err(BrokerError::Invalid { field, what: what.to_owned() });
    let plain = |text: &str| {
        !text.is_empty() && text.chars().count() <= INVOCATION_TEXT_CHARS_MAX && !text.chars().any(char::is_control)
    };
    if !plain(&invocation.tool) {
        return bad("tool", "1 to 256 characters without control characters");
    }
    let status = invocation.status.as_str();
    if !matches!(status, "started" | "ok" | "failed")
        && status.strip_prefix("exit:").and_then(|n| n.parse::<i32>().ok()).is_none()
    {
        return bad("status", "one of started, ok, failed, exit:N");
    }
    if let Some(digest) = &invocation.arguments_digest
        && (digest.len() != 64 || !digest.bytes().all(|b| b.is_ascii_hexdigit()))
    {
        return bad("arguments_digest", "64 hex digits");
    }
    if let Some(arguments) = &invocation.arguments
        && (arguments.len() > INVOCATION_ARGUMENTS_MAX
            || arguments.iter().any(|a| a.chars().count() > INVOCATION_TEXT_CHARS_MAX))
    {
        return bad("arguments", "at most 64 arguments of 256 characters");
    }
    Ok(())
}
