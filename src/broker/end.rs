//! Endings: complete, cancel, revoke, freeze. How they are recorded is in `endings.rs`.

use std::sync::Arc;

use crate::core::decide::{Command, is_overdue};
use crate::core::event::{EndCause, Event, Invocation, Selector};
use crate::core::grant::{Grant, GrantState};
use crate::core::id::{GrantId, TaskKey, TaskName};
use crate::core::vote::REASON_CHARS_MAX;
use crate::identity::VerifiedAgent;
use crate::policy::PersonAction;
use crate::store::{Batch, StoreError};

use super::endings::What;
use super::vote::Reviewer;
use super::{Broker, BrokerError};

/// Longest tool name, status, or argument that is recorded, in characters.
pub const INVOCATION_TEXT_CHARS_MAX: usize = 256;
/// Longest number in `exit:N`, in characters: `-2147483648`.
const EXIT_CHARS_MAX: usize = 11;
/// Most arguments that are recorded with an invocation.
pub const INVOCATION_ARGUMENTS_MAX: usize = 64;

impl Broker {
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
        // Again for one that is completed already: whatever there still is of it ends.
        self.end_all(What::Task(&key), &EndCause::TaskCompleted).await
    }

    /// A sign of life.
    pub async fn heartbeat(&self, agent: &VerifiedAgent, id: GrantId) -> Result<Arc<Grant>, BrokerError> {
        let grant = self.own(agent, id).await?;
        let now = self.now();
        match grant.state {
            GrantState::Active { ends_at, .. } if now < ends_at => {
                self.heartbeats.beat(&grant, now);
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
        let invocation = Invocation {
            arguments_digest: invocation.arguments_digest.map(|digest| self.arguments_hash(&digest)),
            ..invocation
        };
        let max = self.rules().config.limits.invocations_per_grant_max;
        self.command(id, &Command::Report { invocation, max }, false).await
    }

    /// What the record has of a command's arguments: whoever reads it can compare, and without our key guess nothing.
    fn arguments_hash(&self, digest: &str) -> String {
        let digest = digest.to_ascii_lowercase();
        hex::encode(self.names.mac("countersign arguments", &[digest.as_bytes()]))
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
        self.covered(selector).await
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
        match self.store.append(batch.clone()).await {
            Ok(_) => Ok((id, self.enforce(id, &selector).await?)),
            Err(StoreError::Unavailable(why) | StoreError::Unreadable(why)) => {
                self.freeze_later(id, &selector, batch.events).await?;
                Err(BrokerError::Unrecorded(why))
            }
            Err(error) => Err(error.into()),
        }
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

pub(super) fn check_reason(reason: &str) -> Result<String, BrokerError> {
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
        && status
            .strip_prefix("exit:")
            .filter(|n| n.len() <= EXIT_CHARS_MAX)
            .and_then(|n| n.parse::<i32>().ok())
            .is_none()
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
