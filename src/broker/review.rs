//! What a reviewer sees: the queue, and everything about one grant. Page, command line and script get the same.

use std::sync::Arc;

use crate::core::event::Event;
use crate::core::grant::{Grant, GrantState};
use crate::core::id::{GrantId, Timestamp};
use crate::core::lease::{Absence, Lease, LeaseState};
use crate::policy::PersonAction;
use crate::store::{Recorded, engine::over_at};
use crate::wire::reviewer::{FreezeView, IdentityFacts, PermissionFacts, Queue, Review, Row, TimelineEntry, VoteView};
use crate::wire::words::{Told, grant_event};

use super::vote::Reviewer;
use super::{Broker, BrokerError, Rules, sentence};

/// Final grants that the queue shows.
const DECIDED_SHOWN_MAX: usize = 50;
/// Rows of each part of the queue.
const ROWS_MAX: usize = 200;
/// Persons named as able to decide.
const DECIDERS_MAX: usize = 8;

impl Broker {
    /// The queue of a reviewer.
    pub async fn queue(&self, by: &Reviewer) -> Result<Queue, BrokerError> {
        let rules = self.rules();
        let now = self.now();
        let mut queue = Queue::default();
        let mut open = self.store.open_grants().await?;
        open.sort_by_key(|g| g.requested_at);
        for grant in open {
            if super::vote::require(&rules, by, PersonAction::See, &grant).is_err() {
                continue;
            }
            let mine = self.may_vote(&rules, by, &grant).is_ok();
            let row = row(&rules, &grant, now, mine);
            let part = match grant.state {
                GrantState::Pending { .. } if mine => &mut queue.mine,
                GrantState::Pending { .. } => &mut queue.others,
                _ => &mut queue.live,
            };
            if part.len() < ROWS_MAX {
                part.push(row);
            }
        }
        for grant in self.store.decided(DECIDED_SHOWN_MAX).await? {
            if super::vote::require(&rules, by, PersonAction::See, &grant).is_ok() {
                queue.decided.push(row(&rules, &grant, now, false));
            }
        }
        let freezes = self.store.freezes().await?.holding;
        queue.freezes = freezes
            .into_iter()
            .map(|f| FreezeView {
                id: f.id,
                selector: f.selector,
                by: rules.person_name(&f.by),
                reason: f.reason,
                at: f.at,
            })
            .collect();
        Ok(queue)
    }

    /// A grant that this person may see, as it stands.
    async fn seen(&self, by: &Reviewer, id: GrantId) -> Result<Arc<Grant>, BrokerError> {
        let grant = self.store.grant(id).await?.ok_or(BrokerError::NotFound)?;
        super::vote::require(&self.rules(), by, PersonAction::See, &grant).map_err(|_| BrokerError::NotFound)?;
        Ok(grant)
    }

    /// What an open page compares itself with: the grant's version, its state's word, and who voted last.
    pub async fn standing(&self, by: &Reviewer, id: GrantId) -> Result<(u64, String, Option<String>), BrokerError> {
        let grant = self.seen(by, id).await?;
        let voter = grant.votes.last().map(|v| self.rules().person_name(&v.person));
        Ok((grant.version, grant.state.word().to_owned(), voter))
    }

    /// Everything about one grant. Unknown and not-to-be-seen can't be told apart.
    pub async fn review(&self, by: &Reviewer, id: GrantId) -> Result<Review, BrokerError> {
        let rules = self.rules();
        let grant = self.seen(by, id).await?;
        let assessed = grant.assessed.as_ref();
        let life = assessed.map_or(grant.request.life_secs, |a| a.approvable.life_secs);
        let history = self.store.history(&grant.request.agent.id).await?;
        let timeline = if super::vote::require(&rules, by, PersonAction::ReadRecord, &grant).is_ok() {
            self.store.events(id).await?.iter().filter_map(|r| entry(&rules, r)).collect()
        } else {
            Vec::new()
        };
        let now = self.now();
        let mut similar = Vec::new();
        for earlier in history.iter().flat_map(|h| h.recent.iter().rev()).filter(|g| **g != id).take(5) {
            if let Some(earlier) = self.store.grant(*earlier).await?
                && super::vote::require(&rules, by, PersonAction::See, &earlier).is_ok()
            {
                similar.push(row(&rules, &earlier, now, false));
            }
        }
        Ok(Review {
            grant: self.view(&grant),
            digest: assessed.map(|a| a.digest),
            tier: assessed.map(|a| a.approvable.tier.clone()),
            sentence: sentence_of(&rules, &grant),
            permissions: facts(&rules, &grant),
            holds: self.holds(&rules, &grant).await?,
            difference: self.difference(&grant, life, history.as_ref().and_then(|h| h.last_active)).await?,
            identity: identity(&rules, &grant, history.as_ref().map(|h| h.first_seen)),
            intent: grant.request.intent.clone(),
            reasons: assessed
                .map(|a| a.reasons.iter().map(|r| format!("{} (rule {})", r.says, r.rule)).collect())
                .unwrap_or_default(),
            deciders: self.deciders(&rules, by, &grant),
            may_vote: self.may_vote(&rules, by, &grant),
            may_revoke: matches!(grant.state, GrantState::Active { .. })
                && super::vote::require(&rules, by, PersonAction::Revoke, &grant).is_ok(),
            votes: grant
                .votes
                .iter()
                .map(|v| VoteView {
                    person: rules.person_name(&v.person),
                    verdict: v.verdict,
                    reason: v.reason.clone(),
                    at: v.at,
                    via: v.via.clone(),
                })
                .collect(),
            timeline,
            leases: self.leases(&grant),
            similar,
            now,
        })
    }

    async fn holds(&self, rules: &Rules, grant: &Grant) -> Result<Vec<String>, BrokerError> {
        let since = Timestamp(self.now().0.saturating_sub(rules.config.broker.combination_window_secs * 1000));
        let agent = &grant.request.agent;
        let held = self.store.held(&agent.id, agent.owner.as_ref(), since, Some(grant.id)).await?;
        let now = self.now();
        let mut lines: Vec<String> = held
            .into_iter()
            .map(|h| {
                let what = sentence::permission_line(&rules.catalogue, &h.permission);
                let who = if h.agent == agent.id { String::new() } else { format!(" ({})", h.agent) };
                if h.until > now {
                    format!("holds: {what}{who}")
                } else {
                    format!("held until {}: {what}{who}", super::told::rfc3339(h.until))
                }
            })
            .collect();
        lines.sort();
        lines.dedup();
        lines.truncate(20);
        Ok(lines)
    }

    async fn difference(
        &self,
        grant: &Grant,
        life: u64,
        last: Option<GrantId>,
    ) -> Result<Option<Vec<String>>, BrokerError> {
        let Some(last) = last.filter(|l| *l != grant.id) else { return Ok(None) };
        let Some(last) = self.store.grant(last).await? else { return Ok(None) };
        let Some(old) = &last.assessed else { return Ok(None) };
        Ok(Some(sentence::difference(
            &old.approvable.permissions,
            old.approvable.life_secs,
            &grant.request.permissions,
            life,
        )))
    }

    fn deciders(&self, rules: &Rules, by: &Reviewer, grant: &Grant) -> Vec<String> {
        if !matches!(grant.state, GrantState::Pending { .. }) {
            return Vec::new();
        }
        rules
            .config
            .person
            .iter()
            .filter(|p| p.id != by.person)
            .filter(|p| {
                let person = Reviewer {
                    person: p.id.clone(),
                    account: String::new(),
                    groups: p.groups.clone(),
                    via: super::vote::Via::Browser,
                };
                self.may_vote(rules, &person, grant).is_ok()
            })
            .map(|p| p.name.clone())
            .take(DECIDERS_MAX)
            .collect()
    }
}

fn row(rules: &Rules, grant: &Grant, now: Timestamp, mine: bool) -> Row {
    let until = match grant.state {
        GrantState::Pending { decide_by } => Some(decide_by),
        GrantState::Active { ends_at, .. } => Some(ends_at),
        GrantState::Requested => None,
        _ => Some(over_at(grant)),
    };
    let stuck = grant.open_leases().filter(|l| l.resists()).count();
    let is_attested = |l: &&Lease| matches!(l.state, LeaseState::Absent { absence: Absence::Attested { .. }, .. });
    let attested = grant.leases.values().filter(is_attested).count();
    Row {
        id: grant.id,
        state: grant.state.word().to_owned(),
        sentence: sentence_of(rules, grant),
        tier: grant.assessed.as_ref().map(|a| a.approvable.tier.clone()),
        approvals: u8::try_from(grant.approvers().len()).unwrap_or(u8::MAX),
        requested_at: grant.requested_at,
        until,
        secs_left: until.map_or(0, |u| u.ms_since(now) / 1000),
        stuck: u32::try_from(stuck).unwrap_or(u32::MAX),
        attested: u32::try_from(attested).unwrap_or(u32::MAX),
        mine,
    }
}

fn sentence_of(rules: &Rules, grant: &Grant) -> String {
    grant.assessed.as_ref().map_or_else(
        || {
            let owner = grant.request.agent.owner.as_ref().map(|o| rules.person_name(o));
            let r = &grant.request;
            sentence::sentence(&rules.catalogue, &r.agent, owner.as_deref(), &r.permissions, r.life_secs)
        },
        |a| a.approvable.sentence.clone(),
    )
}

fn facts(rules: &Rules, grant: &Grant) -> Vec<PermissionFacts> {
    let approvable = grant.assessed.as_ref().map(|a| &a.approvable);
    let permissions = approvable.map_or(&grant.request.permissions, |a| &a.permissions);
    permissions
        .iter()
        .enumerate()
        .map(|(i, p)| {
            let resource = rules.catalogue.resource(&p.resource);
            let revocability = approvable.and_then(|a| a.revocability.get(i));
            PermissionFacts {
                resource: p.resource.to_string(),
                title: resource.map(|r| r.title.clone()).unwrap_or_default(),
                environment: resource.map(|r| r.environment.clone()).unwrap_or_default(),
                can: resource.map(|r| sentence::can(r, p)).unwrap_or_default(),
                cannot: resource.map(|r| sentence::cannot(r, p)).unwrap_or_default(),
                irreversible: resource.map(|r| sentence::irreversible(r, p)).unwrap_or_default(),
                ending: revocability.map(|r| r.says.clone()).unwrap_or_default(),
                residual_secs: revocability.map_or(0, |r| r.residual_secs),
            }
        })
        .collect()
}

fn identity(rules: &Rules, grant: &Grant, first_seen: Option<Timestamp>) -> IdentityFacts {
    let agent = &grant.request.agent;
    IdentityFacts {
        name: agent.name.clone(),
        id: agent.id.to_string(),
        issuer: agent.issuer.clone(),
        method: agent.method.clone(),
        attributes: agent.attributes.clone(),
        owner: agent.owner.as_ref().map(|o| rules.person_name(o)),
        team: agent.team.clone(),
        chain: grant.request.chain.iter().map(ToString::to_string).collect(),
        task: grant.request.task.clone(),
        first_seen,
    }
}

/// One event in words.
pub fn entry(rules: &Rules, recorded: &Recorded) -> Option<TimelineEntry> {
    let Event::Grant { what, .. } = &recorded.event else { return None };
    let Told { says, detail, source } = grant_event(what, &|person| rules.person_name(person));
    Some(TimelineEntry { seq: recorded.seq, at: recorded.at, says, detail, source: source.to_owned() })
}
