//! An agent asks: read, normalise, assess, decide, record.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::config::request::normalise_all;
use crate::core::decide::{self, PolicySaid};
use crate::core::digest::Digest;
use crate::core::event::{DeniedBy, Selector};
use crate::core::grant::{Grant, GrantState};
use crate::core::id::{AgentId, GrantId, ResourceName, TaskKey, Timestamp};
use crate::core::permission::Permission;
use crate::core::request::{AgentFacts, Approvable, Assessed, HEARTBEAT_SECS_MAX, HEARTBEAT_SECS_MIN, Reason, Request};
use crate::identity::VerifiedAgent;
use crate::policy::{Askable, AssessInput, Outcome, TaskFacts};
use crate::store::{Batch, Expect, Freeze, StoreError};
use crate::wire::agent::GrantRequest;

use super::{Broker, BrokerError, CONFLICT_TRIES_MAX, Rules, numbered, sentence};

/// Longest life that can be asked for, in seconds. Tiers allow less.
pub const LIFE_SECS_MAX: u64 = 24 * 3600;
/// Longest `Idempotency-Key`, in bytes.
pub const IDEMPOTENCY_KEY_BYTES_MAX: usize = 255;

/// Everything about a request that doesn't change while it is decided.
struct Asked {
    facts: AgentFacts,
    request: Request,
    tier_max: Option<crate::core::id::TierName>,
}

impl Broker {
    /// An agent asks. Automatic tiers are in force when this returns; the others wait.
    pub async fn request(
        &self,
        agent: &VerifiedAgent,
        wanted: GrantRequest,
        idempotency_key: Option<&str>,
    ) -> Result<Arc<Grant>, BrokerError> {
        self.require_started()?;
        let rules = self.rules();
        check_text(&wanted, rules.config.limits.intent_chars_max)?;
        let content = Digest::of(&wanted).map_err(|_| BrokerError::Invalid {
            field: "authorization_details",
            what: "numbers must be integers between 0 and 2^53-1, nested at most 32 deep".to_owned(),
        })?;
        let idempotency = idempotency_key.map(|key| idempotency_digest(&agent.id, key)).transpose()?;
        if let Some(known) = self.known_request(idempotency.as_ref(), content).await? {
            return Ok(known);
        }
        self.rates.lock().asked(&agent.id, self.now());
        let permissions = {
            let told = std::cell::OnceCell::new();
            let may_know = |name: &ResourceName| {
                told.get_or_init(|| Self::askable(&rules, agent)).iter().any(|a: &Askable| a.resource == *name)
            };
            normalise_all(&rules.catalogue, &wanted.authorization_details, &may_know).map_err(BrokerError::Details)?
        };
        let facts = rules.facts(agent);
        let confirmation = if wanted.bind {
            let key = agent.confirmation.clone().ok_or_else(|| BrokerError::Invalid {
                field: "bind",
                what: "only a request over mutual TLS can bind its certificate; use the mTLS listener".to_owned(),
            })?;
            Some(key)
        } else {
            None
        };
        let request = Request {
            agent: facts.clone(),
            task: wanted.task,
            intent: wanted.intent,
            permissions,
            life_secs: wanted.life_secs,
            parent: wanted.parent,
            chain: Vec::new(),
            excluded_voters: BTreeSet::new(),
            heartbeat_secs: wanted.heartbeat_secs,
            confirmation,
            idempotency,
            content,
        };
        let id = crate::keys::random::grant_id(self.random.as_ref());
        let asked = Asked { facts, request, tier_max: agent.tier_max.clone() };
        for _ in 0..CONFLICT_TRIES_MAX {
            match self.request_once(&rules, id, &asked).await {
                Err(Again::Conflict) => {
                    // A twin with the same key may have been the one that was first.
                    if let Some(known) = self.known_request(idempotency.as_ref(), content).await? {
                        return Ok(known);
                    }
                }
                Err(Again::No(error)) => {
                    self.count_refusal(&agent.id, &error).await;
                    return Err(*error);
                }
                Ok(grant) => return Ok(grant),
            }
        }
        Err(BrokerError::Unavailable("too much happened at once; try again".to_owned()))
    }

    async fn known_request(&self, key: Option<&Digest>, content: Digest) -> Result<Option<Arc<Grant>>, BrokerError> {
        let Some(key) = key else { return Ok(None) };
        match self.store.by_idempotency(key).await? {
            Some(grant) if grant.request.content == content => {
                // It may be ahead of what is durable: answer only once it is there.
                let durable = self.store.changed(grant.id, 0, std::time::Duration::from_secs(5)).await?;
                denied_or(durable.unwrap_or(grant)).map(Some)
            }
            Some(_) => Err(BrokerError::IdempotencyReused),
            None => Ok(None),
        }
    }

    async fn request_once(&self, rules: &Rules, id: GrantId, asked: &Asked) -> Result<Arc<Grant>, Again> {
        let limits = &rules.config.limits;
        let agent = &asked.facts.id;
        let (pending_max, open_max) = (limits.pending_per_agent_max, limits.open_grants_per_agent_max);
        let (pending, open) = self.store.open_counts(agent).await?;
        if pending >= pending_max {
            return Err(BrokerError::TooMany { what: "pending requests of one agent", max: pending_max }.into());
        }
        if open >= open_max {
            return Err(BrokerError::TooMany { what: "open grants of one agent", max: open_max }.into());
        }
        let task = TaskKey { agent: agent.clone(), task: asked.request.task.clone() };
        if self.store.task_completed(&task).await? {
            return Err(BrokerError::TaskCompleted.into());
        }
        let mut request = asked.request.clone();
        let below = Expect::OpenBelow { agent: agent.clone(), pending: pending_max, open: open_max };
        let mut expect = vec![Expect::TaskOpen(task), below];
        let parent = match request.parent {
            Some(parent) => Some(self.usable_parent(rules, parent, agent).await?),
            None => None,
        };
        if let Some(parent) = &parent {
            expect.push(Expect::Version(parent.id, parent.version));
            request.chain.clone_from(&parent.request.chain);
            if parent.request.agent.id != *agent {
                request.chain.push(parent.request.agent.id.clone());
            }
            if request.chain.len() >= limits.delegation_depth_max {
                return Err(BrokerError::TooMany {
                    what: "links in a delegation chain",
                    max: limits.delegation_depth_max,
                }
                .into());
            }
        }
        request.excluded_voters = rules.excluded(&asked.facts, &request.chain);
        if let Some(parent) = &parent {
            request.excluded_voters.extend(parent.request.excluded_voters.iter().cloned());
        }
        let freezes = self.store.freezes().await?;
        expect.push(Expect::FreezeEpoch(freezes.epoch));
        if let Some(freeze) = frozen_by(rules, &freezes.holding, &request) {
            return Err(BrokerError::Frozen { reason: freeze.reason.clone() }.into());
        }
        let now = self.now();
        let said = self.assess_new(rules, id, &request, asked.tier_max.as_ref(), now).await?;
        if let PolicySaid::Denied { rule, reason, .. } = &said
            && !self.refusals.lock().may_record(agent, now, limits.refusals_per_agent_per_min)
        {
            let (rule, reason) = (rule.clone(), reason.clone());
            return Err(BrokerError::Denied { grant: None, rule, reason }.into());
        }
        let events = decide::request(id, request, parent.as_deref(), said, now).map_err(BrokerError::Refused)?;
        let batch = Batch { expect, events: numbered(id, 0, events), at: now, urgent: false };
        self.store.append(batch).await?;
        let grant = self.store.grant(id).await?.ok_or(BrokerError::NotFound)?;
        Ok(denied_or(grant)?)
    }

    /// The parent, if it is in force and handed to this identity. One answer for every reason why not.
    async fn usable_parent(&self, rules: &Rules, id: GrantId, agent: &AgentId) -> Result<Arc<Grant>, BrokerError> {
        let parent = self.store.head(id).await?.ok_or(BrokerError::Parent)?;
        let in_force =
            parent.ends_at().is_some_and(|ends_at| self.now() < ends_at) && self.unfinished.cause_of(id).is_none();
        if in_force && rules.may_delegate(&parent.request.agent.id, agent) {
            Ok(parent)
        } else {
            Err(BrokerError::Parent)
        }
    }

    /// Asks policy about a new request.
    async fn assess_new(
        &self,
        rules: &Rules,
        id: GrantId,
        request: &Request,
        tier_max: Option<&crate::core::id::TierName>,
        now: Timestamp,
    ) -> Result<PolicySaid, BrokerError> {
        let decide_by = now.plus_secs(rules.config.broker.decide_within_secs);
        self.assess(rules, id, request, tier_max, now, decide_by, None).await
    }

    /// Asks policy with the full context of this moment. `standing` is what was assessed before, whose latest end,
    /// deadline and (if nothing else moved) sentence stay.
    #[allow(clippy::too_many_arguments)] // one question, all of it
    pub(super) async fn assess(
        &self,
        rules: &Rules,
        id: GrantId,
        request: &Request,
        tier_max: Option<&crate::core::id::TierName>,
        now: Timestamp,
        decide_by: Timestamp,
        standing: Option<&Assessed>,
    ) -> Result<PolicySaid, BrokerError> {
        let agent = &request.agent;
        let since = Timestamp(now.0.saturating_sub(rules.config.broker.combination_window_secs * 1000));
        // What this grant itself gave doesn't count as already held (guarantee 3).
        let held: Vec<Permission> = self
            .store
            .held(&agent.id, agent.owner.as_ref(), since, Some(id))
            .await?
            .into_iter()
            .map(|h| h.permission)
            .collect();
        let tree_holds = self.tree_holds(id, request, since).await?;
        let assessment = rules.engine.assess(&AssessInput {
            agent: rules.policy_agent(agent, tier_max),
            permissions: request.permissions.clone(),
            task: TaskFacts {
                name: request.task.clone(),
                depth: u32::try_from(request.chain.len()).unwrap_or(u32::MAX),
                life_secs: request.life_secs,
                recent_requests: self.rates.lock().recent(&agent.id, now),
                intent_labels: BTreeSet::new(),
            },
            tree_holds,
            held,
        });
        let (tier, life_secs) = match assessment.outcome {
            Outcome::Deny { rule, reason } => {
                return Ok(PolicySaid::Denied { rule, policy_version: assessment.policy_version, reason });
            }
            Outcome::Permit { tier, life_secs, .. } => (tier, life_secs),
        };
        let owner = agent.owner.as_ref().map(|o| rules.person_name(o));
        let unmoved = standing.filter(|s| {
            let a = &s.approvable;
            a.permissions == request.permissions && a.life_secs == life_secs && a.tier == tier
        });
        let sentence = unmoved.map_or_else(
            || sentence::sentence(&rules.catalogue, agent, owner.as_deref(), &request.permissions, life_secs),
            |s| s.approvable.sentence.clone(),
        );
        let approvable = Approvable {
            grant: id,
            agent: agent.id.clone(),
            owner: agent.owner.clone(),
            chain: request.chain.clone(),
            permissions: request.permissions.clone(),
            life_secs,
            latest_end: standing.map_or_else(|| decide_by.plus_secs(life_secs), |s| s.approvable.latest_end),
            tier,
            targets: rules.target_digests(&request.permissions)?,
            revocability: rules.revocability(&request.permissions, life_secs)?,
            sentence,
        };
        let digest = approvable.digest().map_err(|e| BrokerError::Internal(e.to_string()))?;
        let reasons = assessment
            .reasons
            .into_iter()
            .map(|r| Reason { rule: r.policy, says: r.reason.unwrap_or_default() })
            .collect();
        Ok(PolicySaid::Permitted(Box::new(Assessed {
            approvable,
            digest,
            reasons,
            policy_version: assessment.policy_version,
            decide_by,
        })))
    }

    /// What the task holds, so that nothing is gained by asking in parts: what is in force above this request, below and
    /// beside it, and what its task held within the window (regression D2).
    async fn tree_holds(
        &self,
        id: GrantId,
        request: &Request,
        since: Timestamp,
    ) -> Result<Vec<Permission>, BrokerError> {
        let task = TaskKey { agent: request.agent.id.clone(), task: request.task.clone() };
        let held = self.store.held_in_task(&task, since, Some(id)).await?;
        let mut out: BTreeSet<Permission> = held.into_iter().collect();
        // What stands alone in the task is told by what the task holds.
        let beside = self.store.task_links(&task).await?;
        let mut roots = BTreeSet::new();
        for start in beside.into_iter().filter(|other| *other != id).chain(request.parent) {
            let mut root = start;
            while let Some(above) = self.store.head(root).await?.and_then(|g| g.request.parent) {
                root = above;
            }
            roots.insert(root);
        }
        for root in roots {
            for grant in self.store.subtree(root).await?.iter().filter(|g| g.id != id) {
                if matches!(grant.state, GrantState::Active { .. } | GrantState::Ending { .. })
                    && let Some(assessed) = &grant.assessed
                {
                    out.extend(assessed.approvable.permissions.iter().cloned());
                }
            }
        }
        Ok(out.into_iter().collect())
    }

    /// The resources that policy would let this agent ask for: it is told of no others (regression R3).
    pub(super) fn askable(rules: &Rules, agent: &VerifiedAgent) -> Vec<Askable> {
        rules.engine.askable(&rules.policy_agent(&rules.facts(agent), agent.tier_max.as_ref()))
    }

    /// Refusals that made no grant are counted, and recorded in sums (regression D9).
    async fn count_refusal(&self, agent: &AgentId, error: &BrokerError) {
        let word = match error {
            BrokerError::Denied { grant: Some(_), .. } => return,
            BrokerError::Denied { .. } => "denied",
            BrokerError::Frozen { .. } => "frozen",
            BrokerError::TooMany { .. } => "too-many",
            BrokerError::Parent => "parent",
            BrokerError::TaskCompleted => "task-completed",
            BrokerError::Refused(_) => "refused",
            _ => return,
        };
        self.refusals.lock().count(agent, word);
    }
}

/// The grant, or policy's no: the same answer however often it is asked for.
fn denied_or(grant: Arc<Grant>) -> Result<Arc<Grant>, BrokerError> {
    match &grant.state {
        GrantState::Denied { by: DeniedBy::Policy { rule, .. }, reason, .. } => {
            Err(BrokerError::Denied { grant: Some(grant.id), rule: rule.clone(), reason: reason.clone() })
        }
        _ => Ok(grant),
    }
}

/// Why one attempt ended.
enum Again {
    Conflict,
    No(Box<BrokerError>),
}

impl From<StoreError> for Again {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Conflict => Self::Conflict,
            other => Self::No(Box::new(other.into())),
        }
    }
}
impl From<BrokerError> for Again {
    fn from(error: BrokerError) -> Self {
        Self::No(Box::new(error))
    }
}

fn check_text(wanted: &GrantRequest, intent_chars_max: usize) -> Result<(), BrokerError> {
    let invalid = |field, what: String| Err(BrokerError::Invalid { field, what });
    let chars = wanted.intent.chars().count();
    if chars == 0 || chars > intent_chars_max {
        return invalid("intent", format!("say in 1 to {intent_chars_max} characters what this is for"));
    }
    if wanted.intent.chars().any(char::is_control) {
        return invalid(
            "intent",
            "control characters (line breaks too) are not accepted; write one plain line".to_owned(),
        );
    }
    if wanted.life_secs == 0 || wanted.life_secs > LIFE_SECS_MAX {
        return invalid("life_secs", format!("ask for 1 to {LIFE_SECS_MAX} seconds"));
    }
    if let Some(secs) = wanted.heartbeat_secs
        && !(HEARTBEAT_SECS_MIN..=HEARTBEAT_SECS_MAX).contains(&secs)
    {
        return invalid(
            "heartbeat_secs",
            format!("a heartbeat comes every {HEARTBEAT_SECS_MIN} to {HEARTBEAT_SECS_MAX} seconds"),
        );
    }
    Ok(())
}

/// Can this be an `Idempotency-Key`?
pub fn check_key(key: &str) -> Result<(), BrokerError> {
    if key.is_empty() || key.len() > IDEMPOTENCY_KEY_BYTES_MAX || !key.bytes().all(|b| b.is_ascii_graphic()) {
        let what = format!("an Idempotency-Key has 1 to {IDEMPOTENCY_KEY_BYTES_MAX} visible ASCII characters");
        return Err(BrokerError::Invalid { field: "Idempotency-Key", what });
    }
    Ok(())
}

pub(super) fn idempotency_digest(agent: &AgentId, key: &str) -> Result<Digest, BrokerError> {
    check_key(key)?;
    Digest::of(&(agent, key)).map_err(|e| BrokerError::Internal(e.to_string()))
}

/// The freeze that covers a request, if one does.
pub(super) fn frozen_by<'a>(rules: &Rules, freezes: &'a [Freeze], request: &Request) -> Option<&'a Freeze> {
    freezes.iter().find(|f| selects(rules, &f.selector, request))
}

/// Does a selector cover a request? Children are covered by what their chain holds.
pub(super) fn selects(rules: &Rules, selector: &Selector, request: &Request) -> bool {
    let agents = || std::iter::once(&request.agent.id).chain(&request.chain);
    match selector {
        Selector::All => true,
        Selector::Agent(agent) => agents().any(|a| a == agent),
        Selector::Owner(person) => {
            request.agent.owner.as_ref() == Some(person) || agents().any(|a| rules.owner_of(a).as_ref() == Some(person))
        }
        Selector::Resource(name) => request.permissions.iter().any(|p| p.resource == *name),
        Selector::Task(task) => request.agent.id == task.agent && request.task == task.task,
        Selector::TaskName(name) => request.task == *name,
        Selector::Target(target) => request
            .permissions
            .iter()
            .any(|p| rules.catalogue.resource(&p.resource).is_some_and(|r| r.target == *target)),
    }
}
