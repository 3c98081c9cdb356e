//! A reviewer votes. Policy is asked again at that moment, with everything that is held by then.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::core::decide::{Command, PolicySaid};
use crate::core::event::BrokerEvent;
use crate::core::grant::{Grant, GrantState};
use crate::core::id::{GrantId, PersonId};
use crate::core::vote::{REASON_CHARS_MAX, Verdict, Vote};
use crate::mutation::Mutation;
use crate::policy::{GrantFacts, On, PersonAction, PersonFacts};
use crate::wire::reviewer::VoteRequest;

use super::{Broker, BrokerError, CONFLICT_TRIES_MAX, Mode, Rules};
use crate::store::{Expect, StoreError};

/// Where a vote comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// A browser session of its own.
    Browser,
    /// The terminal of `dev` and `tour`.
    Terminal,
    /// A session stored for the command line: where an agent under the reviewer's account could use it (regression D1).
    StoredSession,
}

impl Via {
    /// One word for the record.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Browser => "browser",
            Self::Terminal => "terminal",
            Self::StoredSession => "stored session",
        }
    }
}

/// A person who does something, as the session proved.
#[derive(Debug, Clone)]
pub struct Reviewer {
    /// The person of the directory.
    pub person: PersonId,
    /// The account, `issuer#subject`.
    pub account: String,
    /// Groups that count now.
    pub groups: Vec<String>,
    /// Where it comes from.
    pub via: Via,
}

impl Broker {
    /// A reviewer votes on exactly what they saw.
    pub async fn vote(&self, by: &Reviewer, id: GrantId, wanted: &VoteRequest) -> Result<Arc<Grant>, BrokerError> {
        self.require_started()?;
        // Whoever can't see it hears that there is none, and nothing is recorded: ids can be made up without end.
        let rules = self.rules();
        let grant = self.store.head(id).await?.ok_or(BrokerError::NotFound)?;
        require(&rules, by, PersonAction::See, &grant).map_err(|_| BrokerError::NotFound)?;
        let outcome = self.vote_checked(by, id, wanted).await;
        let (word, problem) = match &outcome {
            Err(error @ BrokerError::Refused(_)) => ("refused", error.to_string()),
            Err(error @ BrokerError::NotAllowed(_)) => ("not-allowed", error.to_string()),
            _ => return outcome,
        };
        let per_min = rules.config.limits.refusals_per_agent_per_min;
        if self.refused_votes.lock().may_record(&by.person, self.now(), per_min) {
            self.note(BrokerEvent::VoteRefused { grant: id, person: by.person.clone(), problem }).await?;
        } else {
            self.refused_votes.lock().count(&by.person, word);
        }
        outcome
    }

    async fn vote_checked(&self, by: &Reviewer, id: GrantId, wanted: &VoteRequest) -> Result<Arc<Grant>, BrokerError> {
        if let Some(reason) = &wanted.reason
            && (reason.chars().count() > REASON_CHARS_MAX || reason.chars().any(|c| c.is_control() && c != '\n'))
        {
            let what = format!("a reason has at most {REASON_CHARS_MAX} characters and no control characters");
            return Err(BrokerError::Invalid { field: "reason", what });
        }
        let from_here = match by.via {
            Via::Browser => true,
            Via::Terminal => self.mode == Mode::Dev,
            Via::StoredSession => self.mode == Mode::Dev || wanted.verdict == Verdict::Deny,
        };
        if !from_here {
            let what = "a stored session can't approve; open the page in the browser and decide there".to_owned();
            return Err(BrokerError::NotAllowed(what));
        }
        for _ in 0..CONFLICT_TRIES_MAX {
            let rules = self.rules();
            let grant = self.store.head(id).await?.ok_or(BrokerError::NotFound)?;
            require(&rules, by, PersonAction::See, &grant).map_err(|_| BrokerError::NotFound)?;
            require(&rules, by, PersonAction::Approve, &grant)?;
            let excluded = rules.excluded(&grant.request.agent, &grant.request.chain);
            if let Some(cause) = self.unfinished.cause_of(id) {
                return Err(BrokerError::Over { why: super::told::cause_in_words(&cause) });
            }
            let freezes = self.store.freezes().await?;
            if wanted.verdict == Verdict::Approve
                && let Some(freeze) = super::request::frozen_by(&rules, &freezes.holding, &grant.request)
            {
                return Err(BrokerError::Frozen { reason: freeze.reason.clone() });
            }
            if let Some(stands) = &grant.assessed
                && stands.digest == wanted.digest
                && matches!(grant.state, GrantState::Pending { .. })
                && wanted.verdict == Verdict::Approve
                && let Some(command) = self.moved(&rules, &grant).await?
            {
                // What was shown no longer stands: it is assessed anew, votes are void, and this vote is about the old one.
                self.command(id, &command, false).await?;
                continue;
            }
            let parent = match grant.request.parent {
                Some(parent) => self.store.head(parent).await?,
                None => None,
            };
            let now = self.now();
            let parent_ends_at = parent.as_ref().and_then(|p| p.ends_at()).filter(|ends_at| now < *ends_at);
            let vote = Vote {
                person: by.person.clone(),
                account: by.account.clone(),
                via: by.via.word().to_owned(),
                verdict: wanted.verdict,
                digest: wanted.digest,
                reason: wanted.reason.clone(),
                at: now,
            };
            let overdue = crate::core::decide::is_overdue(&grant, now);
            let (judged, vote, excluded) = if cfg!(feature = "mutations") {
                misjudged(&grant, vote, excluded)
            } else {
                (Arc::clone(&grant), vote, excluded)
            };
            let command = Command::Vote { vote, excluded, parent_ends_at };
            let events = match crate::core::decide::decide(&judged, &command, now) {
                Ok(events) => events,
                Err(refusal) => return Err(self.once_durable(&grant).await.err().unwrap_or(refusal.into())),
            };
            let mut expect: Vec<Expect> = parent.iter().map(|p| Expect::Version(p.id, p.version)).collect();
            expect.push(Expect::FreezeEpoch(freezes.epoch));
            match self.append(&grant, events, expect, now, false).await {
                Ok(_) if overdue => {}
                Ok(_) => return self.store.grant(id).await?.ok_or(BrokerError::NotFound),
                Err(StoreError::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(BrokerError::Unavailable("too much happened at once; look at the request again".to_owned()))
    }

    /// Policy asked again about a pending request: the command that records a change, or `None` if all stands.
    async fn moved(&self, rules: &Rules, grant: &Grant) -> Result<Option<Command>, BrokerError> {
        let Some(stands) = &grant.assessed else { return Ok(None) };
        Ok(match self.assess_again(rules, grant).await? {
            PolicySaid::Denied { rule, policy_version, reason } => {
                Some(Command::DenyByPolicy { rule, policy_version, reason })
            }
            PolicySaid::Permitted(now) if now.digest != stands.digest => Some(Command::Reassess(now)),
            PolicySaid::Permitted(_) => None,
        })
    }

    /// Policy asked again about a grant, with everything that is held by now beside it.
    pub(super) async fn assess_again(&self, rules: &Rules, grant: &Grant) -> Result<PolicySaid, BrokerError> {
        let stands = grant.assessed.as_ref();
        let now = self.now();
        let decide_by = stands.map_or(now, |s| s.decide_by);
        let mut request = grant.request.clone();
        // The directory may name another owner by now; exclusions and "who answers for it" follow it.
        request.agent.owner = rules.owner_of(&request.agent.id);
        let tier_max = rules.tier_max_of(&request.agent);
        self.assess(rules, grant.id, &request, tier_max.as_ref(), now, decide_by, stands).await
    }

    /// Does policy let this person do something that isn't about one grant?
    pub fn require_anywhere(&self, by: &Reviewer, action: PersonAction) -> Result<(), BrokerError> {
        allowed(&self.rules(), by, action, On::Broker)
    }

    /// May this person vote on it now? If not, why not.
    pub(super) fn may_vote(&self, rules: &Rules, by: &Reviewer, grant: &Grant) -> Result<(), String> {
        if !matches!(grant.state, GrantState::Pending { .. }) {
            return Err(format!("The request is {}.", grant.state.word()));
        }
        let excluded = rules.excluded(&grant.request.agent, &grant.request.chain);
        if grant.request.agent.owner.as_ref() == Some(&by.person) {
            return Err("You answer for the agent that asks.".to_owned());
        }
        if excluded.contains(&by.person) || grant.request.excluded_voters.contains(&by.person) {
            return Err("You launched the agent, it runs as an account of yours, or you answer for one in its chain."
                .to_owned());
        }
        if grant.votes.iter().any(|v| v.person == by.person) {
            return Err("You have voted already.".to_owned());
        }
        require(rules, by, PersonAction::Approve, grant).map_err(|e| e.to_string())
    }
}

fn allowed(rules: &Rules, by: &Reviewer, action: PersonAction, on: On<'_>) -> Result<(), BrokerError> {
    let person = PersonFacts { id: by.person.clone(), groups: by.groups.iter().cloned().collect() };
    let decision = rules.engine.may(&person, action, on);
    if decision.allowed {
        Ok(())
    } else {
        let why = decision.reason.unwrap_or_else(|| format!("no policy lets you {}", action.as_str()));
        Err(BrokerError::NotAllowed(why))
    }
}

/// Does policy let this person do this to this grant?
pub(super) fn require(rules: &Rules, by: &Reviewer, action: PersonAction, grant: &Grant) -> Result<(), BrokerError> {
    // A request that policy denied has no tier; who may look at the strictest may look at it.
    let tier = grant.assessed.as_ref().map(|a| a.approvable.tier.name.clone());
    let tier = tier.or_else(|| rules.config.tier.last().map(|t| t.name.clone()));
    let Some(tier) = tier else {
        return Err(BrokerError::NotAllowed("no tiers are configured".to_owned()));
    };
    let facts = GrantFacts {
        agent: grant.request.agent.id.clone(),
        owner: grant.request.agent.owner.clone(),
        team: grant.request.agent.team.clone(),
        tier,
        permissions: grant.request.permissions.clone(),
    };
    allowed(rules, by, action, On::Grant(&facts))
}

/// The grant, the vote and whom it excludes, as a broker with one of the deliberate faults sees them.
fn misjudged(
    grant: &Arc<Grant>,
    mut vote: Vote,
    mut excluded: BTreeSet<PersonId>,
) -> (Arc<Grant>, Vote, BTreeSet<PersonId>) {
    let mut seen = (**grant).clone();
    if let Some(assessed) = seen.assessed.as_ref().filter(|_| Mutation::VoteNotBound.is_on()) {
        vote.digest = assessed.digest;
    }
    if Mutation::SamePersonTwice.is_on() {
        for (n, earlier) in seen.votes.iter_mut().enumerate() {
            if let Ok(person) = format!("{}-{n}", earlier.person).parse() {
                earlier.person = person;
            }
        }
    }
    if Mutation::OwnerVotes.is_on() {
        seen.request.agent.owner = None;
        seen.request.excluded_voters.clear();
        excluded.clear();
    }
    (Arc::new(seen), vote, excluded)
}
