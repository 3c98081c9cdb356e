//! What may happen: `decide(&grant, command, now) → events | refusal`. Pure.
//!
//! Time passes first: a command that arrives after a deadline meets the state that the deadline made
//! (see [`decide`]), so no caller can be early or late by forgetting a timer.

use std::collections::BTreeSet;

use super::decide_lease;
use super::digest::Digest;
use super::event::{DeniedBy, EndCause, GrantEvent, Invocation};
use super::grant::{Grant, GrantState};
use super::id::{GrantId, LeaseId, PersonId, Timestamp};
use super::lease::{Evidence, Handle, LeaseIntent, LeaseState, OPEN_LEASES_MAX};
use super::permission::all_narrow;
use super::request::{Assessed, Request};
use super::revocability::Observation;
use super::vote::{Verdict, Vote};

/// All arguments of reported invocations that one grant keeps, in bytes.
pub const INVOCATION_BYTES_MAX: usize = 256 * 1024;

/// What policy said, as `decide` needs it.
#[derive(Debug, Clone)]
pub enum PolicySaid {
    /// No.
    Denied {
        /// The rule.
        rule: String,
        /// The version of the policies.
        policy_version: String,
        /// Why, for the agent.
        reason: String,
    },
    /// Yes, at a tier.
    Permitted(Box<Assessed>),
}

/// Something that somebody wants to happen to a grant.
#[derive(Debug, Clone)]
pub enum Command {
    /// A reviewer votes. `excluded` are persons whom the directory excludes now, beyond those recorded.
    Vote {
        /// The vote; its `at` is overwritten with `now`.
        vote: Vote,
        /// May not vote, as things stand now.
        excluded: BTreeSet<PersonId>,
        /// The end of the parent, if there is one.
        parent_ends_at: Option<Timestamp>,
    },
    /// Policy was asked again while it is pending, and says something else now.
    Reassess(Box<Assessed>),
    /// Policy was asked again while it is pending, and says no now.
    DenyByPolicy {
        /// The rule.
        rule: String,
        /// The version of the policies.
        policy_version: String,
        /// Why, for the agent.
        reason: String,
    },
    /// Time passes: lapse or expire what is due.
    Tick,
    /// The agent takes it back (pending) or is done (in force).
    Finish {
        /// [`EndCause::Completed`] for the agent's own word, anything else otherwise.
        cause: EndCause,
    },
    /// The agent takes a pending request back.
    Cancel,
    /// Credentials are about to be minted.
    Intend {
        /// One for each permission that has none.
        intents: Vec<LeaseIntent>,
        /// The digest, computed anew from what stands now.
        digest: Digest,
    },
    /// The connector made the handle.
    Prepared {
        /// Which.
        lease: LeaseId,
        /// The handle.
        handle: Handle,
    },
    /// The target confirmed it. `release`: the caller waits for the secret and will hand it over.
    Live {
        /// Which.
        lease: LeaseId,
        /// Where it is.
        handle: Handle,
        /// When it dies by itself.
        not_after: Option<Timestamp>,
        /// True if its secret is to leave the broker.
        release: bool,
    },
    /// The mint did not happen, for certain.
    NotMinted {
        /// Which.
        lease: LeaseId,
        /// What happened.
        why: String,
    },
    /// It is not known whether the mint happened.
    Unknown {
        /// Which.
        lease: LeaseId,
        /// What happened.
        why: String,
        /// What was learned.
        handle: Option<Handle>,
        /// Not looked for before.
        not_before: Timestamp,
    },
    /// End one lease though the grant goes on.
    RevokeLease {
        /// Which.
        lease: LeaseId,
        /// Why.
        why: String,
    },
    /// An ending did not work.
    Retry {
        /// Which.
        lease: LeaseId,
        /// What happened.
        why: String,
        /// When to try again.
        next_try: Timestamp,
    },
    /// An ending is proven.
    Gone {
        /// Which.
        lease: LeaseId,
        /// The proof.
        evidence: Evidence,
        /// What the target told.
        seen: Vec<Observation>,
        /// How long it took until access was cut.
        access_cut_ms: Option<u64>,
    },
    /// A person attests that what an ending resists at is there no more. No proof, and never recorded as one.
    AttestAbsent {
        /// Which.
        lease: LeaseId,
        /// Who says so.
        by: PersonId,
        /// Why.
        reason: String,
    },
    /// The agent reports what it did.
    Report {
        /// What.
        invocation: Invocation,
        /// The limit that holds.
        max: usize,
    },
}

/// Why something may not happen. Each has one problem on the wire.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The grant is not where it would have to be.
    #[error("the grant is {state}")]
    State {
        /// Where it is.
        state: &'static str,
    },
    /// The vote is about something else than what stands now.
    #[error("the request changed after it was shown; look at it again")]
    DigestMismatch,
    /// This person may not decide about this request (guarantee 6).
    #[error("this person may not decide about this request: {why}")]
    Excluded {
        /// Why.
        why: &'static str,
    },
    /// This person has voted already.
    #[error("this person has already voted on this request")]
    AlreadyVoted,
    /// What is to be minted is not what was approved (guarantee 3).
    #[error("what would be minted is not what was approved")]
    NotApproved,
    /// A child is wider than its parent, or its parent is not in force (guarantee 7).
    #[error("{why}")]
    NotNarrower {
        /// Why.
        why: &'static str,
    },
    /// There is a credential already, or one is on its way.
    #[error("a credential for this permission exists already")]
    LeaseExists,
    /// No such lease, or not in a state where this can happen.
    #[error("no such lease in that state")]
    NoLease,
    /// Only what an ending has failed on can be attested away.
    #[error("no ending of this credential has failed")]
    NotResisting,
    /// A limit is reached.
    #[error("the limit of {max} {what} is reached")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How many.
        max: usize,
    },
}

/// The events of a new request. `parent` must be the grant that `request.parent` names.
pub fn request(
    id: GrantId,
    request: Request,
    parent: Option<&Grant>,
    verdict: PolicySaid,
    now: Timestamp,
) -> Result<Vec<GrantEvent>, Refusal> {
    if request.parent != parent.map(|p| p.id) {
        return Err(Refusal::NotNarrower { why: "the parent grant is not the one that was named" });
    }
    let mut parent_ends_at = None;
    let mut request = request;
    if let Some(parent) = parent {
        if parent.id == id {
            return Err(Refusal::NotNarrower { why: "a grant can't be its own parent" });
        }
        match parent.state {
            GrantState::Active { ends_at, .. } if now < ends_at => parent_ends_at = Some(ends_at),
            _ => return Err(Refusal::NotNarrower { why: "the parent grant is not in force" }),
        }
        let wide = parent.assessed.as_ref().map_or(&[][..], |a| &a.approvable.permissions);
        if !all_narrow(&request.permissions, wide) {
            return Err(Refusal::NotNarrower { why: "the request is wider than the parent grant" });
        }
        // Guarantee 6: who is in the chain can't be forgotten by whoever built the request.
        request.excluded_voters.extend(parent.request.excluded_voters.iter().cloned());
        request.excluded_voters.extend(parent.request.agent.owner.clone());
    }
    let mut events = vec![GrantEvent::Requested { request: request.clone() }];
    match verdict {
        PolicySaid::Denied { rule, policy_version, reason } => {
            events.push(GrantEvent::Denied { by: DeniedBy::Policy { rule, policy_version }, reason });
        }
        PolicySaid::Permitted(assessed) => {
            check_assessed(id, &request, &assessed, now)?;
            let ends_at = end_of(&assessed, parent_ends_at, now);
            let automatic = assessed.approvable.tier.approvals == 0;
            events.push(GrantEvent::Assessed { assessed: *assessed });
            if automatic {
                events.push(GrantEvent::Activated { ends_at });
            }
        }
    }
    Ok(events)
}

/// What is approvable is what was asked, or narrower, under this very id, and could still be in force.
fn check_assessed(id: GrantId, request: &Request, assessed: &Assessed, now: Timestamp) -> Result<(), Refusal> {
    let a = &assessed.approvable;
    let same = a.grant == id
        && a.agent == request.agent.id
        && a.owner == request.agent.owner
        && a.chain == request.chain
        && a.permissions.len() == request.permissions.len()
        && a.permissions.iter().zip(&request.permissions).all(|(a, r)| a.narrows(r))
        && a.revocability.len() == a.permissions.len()
        && a.permissions.iter().all(|p| a.targets.contains_key(&p.resource))
        && a.life_secs > 0
        && a.life_secs <= request.life_secs.min(a.tier.life_secs_max)
        && a.latest_end > now
        && a.digest().is_ok_and(|d| d == assessed.digest);
    // A tier that needs votes needs somebody who answers for the agent.
    if same && (a.tier.approvals == 0 || a.owner.is_some()) { Ok(()) } else { Err(Refusal::NotApproved) }
}

/// The earliest of: the approved life from now, the approved latest end, the parent's end.
fn end_of(assessed: &Assessed, parent_ends_at: Option<Timestamp>, now: Timestamp) -> Timestamp {
    let own = now.plus_secs(assessed.approvable.life_secs).min(assessed.approvable.latest_end);
    parent_ends_at.map_or(own, |p| own.min(p))
}

/// Decides. First time passes: if a deadline lies behind, its events come first, and the command is
/// decided against what they made. If the command is then refused, the deadline's events stand alone
/// (`Ok`), so that the caller records them, asks again, and gets the refusal.
pub fn decide(grant: &Grant, command: &Command, now: Timestamp) -> Result<Vec<GrantEvent>, Refusal> {
    let mut events = due(grant, now);
    if !matches!(command, Command::Tick) {
        if events.is_empty() {
            events = decide_now(grant, command, now)?;
        } else {
            return Ok(complete(grant, events, now));
        }
    }
    Ok(complete(grant, events, now))
}

/// True if `decide` would answer with a deadline's events, whatever the command.
pub fn is_overdue(grant: &Grant, now: Timestamp) -> bool {
    !due(grant, now).is_empty()
}

fn due(grant: &Grant, now: Timestamp) -> Vec<GrantEvent> {
    match grant.state {
        // A vote after the latest end could bring nothing into force any more.
        GrantState::Pending { decide_by }
            if now >= decide_by || grant.assessed.as_ref().is_some_and(|a| now >= a.approvable.latest_end) =>
        {
            vec![GrantEvent::Lapsed]
        }
        GrantState::Active { ends_at, .. } if now >= ends_at => vec![GrantEvent::Ending { cause: EndCause::Expired }],
        _ => Vec::new(),
    }
}

/// Adds `Ended` when these events leave an ending grant without an open lease.
fn complete(grant: &Grant, mut events: Vec<GrantEvent>, now: Timestamp) -> Vec<GrantEvent> {
    if events.is_empty() {
        return events;
    }
    let ends = matches!(grant.state, GrantState::Ending { .. })
        || events.iter().any(|e| matches!(e, GrantEvent::Ending { .. }));
    if ends {
        let mut after = Some(grant.clone());
        for event in &events {
            if Grant::apply(&mut after, grant.id, event, now).is_err() {
                return events; // the store refuses them in the same words
            }
        }
        if after.is_some_and(|g| matches!(g.state, GrantState::Ending { .. }) && g.open_leases().next().is_none()) {
            events.push(GrantEvent::Ended);
        }
    }
    events
}

fn decide_now(grant: &Grant, command: &Command, now: Timestamp) -> Result<Vec<GrantEvent>, Refusal> {
    let wrong_state = || Refusal::State { state: grant.state.word() };
    let pending = matches!(grant.state, GrantState::Pending { .. });
    let in_force = matches!(grant.state, GrantState::Active { .. });
    match command {
        Command::Tick => Ok(Vec::new()),
        Command::Vote { vote, excluded, parent_ends_at } => {
            if !pending {
                return Err(wrong_state());
            }
            decide_vote(grant, vote, excluded, *parent_ends_at, now)
        }
        Command::Reassess(assessed) => {
            if !pending {
                return Err(wrong_state());
            }
            check_assessed(grant.id, &grant.request, assessed, now)?;
            Ok(vec![GrantEvent::Assessed { assessed: (**assessed).clone() }])
        }
        Command::DenyByPolicy { rule, policy_version, reason } => {
            if !pending {
                return Err(wrong_state());
            }
            let by = DeniedBy::Policy { rule: rule.clone(), policy_version: policy_version.clone() };
            Ok(vec![GrantEvent::Denied { by, reason: reason.clone() }])
        }
        Command::Cancel => match grant.state {
            GrantState::Pending { .. } => Ok(vec![GrantEvent::Cancelled]),
            GrantState::Cancelled { .. } => Ok(Vec::new()),
            _ => Err(wrong_state()),
        },
        Command::Finish { cause } => match grant.state {
            GrantState::Pending { .. } => Ok(vec![match cause {
                EndCause::Completed => GrantEvent::Cancelled,
                cause => GrantEvent::Withdrawn { cause: cause.clone() },
            }]),
            GrantState::Active { .. } => Ok(vec![GrantEvent::Ending { cause: cause.clone() }]),
            // Over already: the first cause stands (guarantee 11).
            _ => Ok(Vec::new()),
        },
        Command::Intend { intents, digest } => {
            if !in_force {
                return Err(wrong_state());
            }
            decide_intend(grant, intents, *digest, now)
        }
        Command::Report { invocation, max } => {
            if !in_force && !matches!(grant.state, GrantState::Ending { .. }) {
                return Err(wrong_state());
            }
            if grant.invocations.len() >= *max {
                return Err(Refusal::Limit { what: "invocations", max: *max });
            }
            Ok(vec![GrantEvent::Invoked { invocation: within_budget(grant, invocation) }])
        }
        Command::Prepared { .. }
        | Command::Live { .. }
        | Command::NotMinted { .. }
        | Command::Unknown { .. }
        | Command::RevokeLease { .. }
        | Command::Retry { .. }
        | Command::Gone { .. }
        | Command::AttestAbsent { .. } => decide_lease::decide_lease(grant, command, now),
    }
}

/// The arguments stay as long as all that a grant keeps fits into [`INVOCATION_BYTES_MAX`]; beyond it, their digest does.
fn within_budget(grant: &Grant, invocation: &Invocation) -> Invocation {
    let bytes = |i: &Invocation| i.arguments.iter().flatten().map(String::len).sum::<usize>();
    let kept: usize = grant.invocations.iter().map(bytes).sum();
    let mut invocation = invocation.clone();
    if kept + bytes(&invocation) > INVOCATION_BYTES_MAX
        && let Some(arguments) = invocation.arguments.take()
        && invocation.arguments_digest.is_none()
    {
        invocation.arguments_digest = Digest::of(&arguments).ok().map(|d| d.to_string());
    }
    invocation
}

fn decide_vote(
    grant: &Grant,
    vote: &Vote,
    excluded: &BTreeSet<PersonId>,
    parent_ends_at: Option<Timestamp>,
    now: Timestamp,
) -> Result<Vec<GrantEvent>, Refusal> {
    let Some(assessed) = &grant.assessed else {
        return Err(Refusal::State { state: grant.state.word() });
    };
    if vote.digest != assessed.digest {
        return Err(Refusal::DigestMismatch);
    }
    // Guarantee 6: what was recorded with the request holds, and what the directory says now holds too.
    if grant.request.agent.owner.as_ref() == Some(&vote.person) {
        return Err(Refusal::Excluded { why: "they answer for the agent that asks" });
    }
    if grant.request.excluded_voters.contains(&vote.person) || excluded.contains(&vote.person) {
        return Err(Refusal::Excluded { why: "they launched the agent, or answer for one in its chain" });
    }
    if grant.votes.iter().any(|v| v.person == vote.person) {
        return Err(Refusal::AlreadyVoted);
    }
    let vote = Vote { at: now, ..vote.clone() };
    let (person, verdict, reason) = (vote.person.clone(), vote.verdict, vote.reason.clone());
    let mut events = vec![GrantEvent::Voted { vote }];
    match verdict {
        Verdict::Deny => events.push(GrantEvent::Denied {
            by: DeniedBy::Person { person },
            reason: reason.unwrap_or_else(|| "denied by a reviewer".to_owned()),
        }),
        Verdict::Approve => {
            // An earlier voter whom the directory excludes by now doesn't count any more.
            let mut people: BTreeSet<_> = grant.approvers().into_iter().filter(|p| !excluded.contains(p)).collect();
            people.insert(person);
            if people.len() >= usize::from(assessed.approvable.tier.approvals) {
                if grant.request.parent.is_some() != parent_ends_at.is_some()
                    || parent_ends_at.is_some_and(|p| now >= p)
                {
                    return Err(Refusal::NotNarrower { why: "the parent grant is not in force" });
                }
                events.push(GrantEvent::Activated { ends_at: end_of(assessed, parent_ends_at, now) });
            }
        }
    }
    Ok(events)
}

fn decide_intend(
    grant: &Grant,
    intents: &[LeaseIntent],
    digest: Digest,
    now: Timestamp,
) -> Result<Vec<GrantEvent>, Refusal> {
    let (Some(assessed), Some(ends_at)) = (&grant.assessed, grant.ends_at()) else {
        return Err(Refusal::State { state: grant.state.word() });
    };
    let a = &assessed.approvable;
    // Guarantee 3: enough distinct persons approved exactly this digest, and it still describes what would be minted.
    let enough = grant.approvers().len() >= usize::from(a.tier.approvals)
        && grant.votes.iter().all(|v| v.digest == assessed.digest);
    if digest != assessed.digest || !enough {
        return Err(Refusal::NotApproved);
    }
    let mut events = Vec::with_capacity(intents.len());
    for (i, intent) in intents.iter().enumerate() {
        let fits = intent.grant == grant.id
            && a.permissions.contains(&intent.permission)
            && intent.intended_at == now
            && now.plus_secs(intent.lifetime_secs) <= ends_at
            && intent.lifetime_secs > 0;
        if !fits {
            return Err(Refusal::NotApproved);
        }
        let taken = grant.leases.contains_key(&intent.lease)
            || intents[..i]
                .iter()
                .any(|o| o.lease == intent.lease || o.name == intent.name || o.permission == intent.permission)
            || grant.leases.values().any(|l| {
                // A name is used once: the proof that one lease is gone must not be about another (guarantee 5).
                l.intent.name == intent.name
                    || l.intent.permission == intent.permission
                        && matches!(l.state, LeaseState::Intended | LeaseState::Live { .. })
            });
        if taken {
            return Err(Refusal::LeaseExists);
        }
        if grant.open_leases().count() + i >= OPEN_LEASES_MAX {
            return Err(Refusal::Limit {
                what: "credentials of one grant that are not proven gone",
                max: OPEN_LEASES_MAX,
            });
        }
        events.push(GrantEvent::LeaseIntended { intent: intent.clone() });
    }
    Ok(events)
}
