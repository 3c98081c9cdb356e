//! Events, causes and proofs in words: page, command line and offline record say the same.
//! Nothing here makes text safe to show; whoever shows it does ([`super::visible`]).

use crate::core::event::{BrokerEvent, DeniedBy, EndCause, Event, GrantEvent, Selector};
use crate::core::id::{PersonId, Timestamp};
use crate::core::lease::{Absence, Evidence};
use crate::core::vote::Verdict;

/// An event, told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// What happened, in words.
    pub says: String,
    /// More, in words: evidence, digest, reason.
    pub detail: Option<String>,
    /// `broker`, `agent` ("reported by the agent"), `target` ("seen at the target"), `person`.
    pub source: &'static str,
}

/// Any event, as the journal has it. `name`: what a person is called.
pub fn event(event: &Event, name: &dyn Fn(&PersonId) -> String) -> Told {
    let (says, detail, source) = match event {
        Event::Grant { what, .. } => return grant_event(what, name),
        Event::TaskCompleted { task } => {
            (format!("task {} was completed", task.task), Some(task.agent.to_string()), "agent")
        }
        Event::Frozen { id, selector, by, reason } => (
            format!("{} froze {}", name(by), selector_in_words(selector)),
            Some(format!("freeze {id}: “{reason}”")),
            "person",
        ),
        Event::Unfrozen { id, by } => (format!("{} lifted freeze {id}", name(by)), None, "person"),
        Event::Broker { what } => return broker_event(what, name),
    };
    Told { says, detail, source }
}

/// What a freeze covers.
pub fn selector_in_words(selector: &Selector) -> String {
    match selector {
        Selector::All => "everything".to_owned(),
        Selector::Agent(agent) => format!("agent {agent}"),
        Selector::Owner(person) => format!("all agents of {person}"),
        Selector::Resource(resource) => format!("resource {resource}"),
        Selector::Target(target) => format!("target {target}"),
        Selector::Task(task) => format!("task {} of {}", task.task, task.agent),
        Selector::TaskName(task) => format!("every task named {task}"),
    }
}

fn broker_event(event: &BrokerEvent, name: &dyn Fn(&PersonId) -> String) -> Told {
    let (says, detail, source) = match event {
        BrokerEvent::RunStarted { version, clock_set_back, .. } => {
            let back = clock_set_back.then(|| "the wall clock had been set back since the last run".to_owned());
            (format!("the broker started (version {version})"), back, "broker")
        }
        BrokerEvent::RunEnded => ("the broker stopped in good order".to_owned(), None, "broker"),
        BrokerEvent::ConfigurationLoaded { hashes } => {
            let hashes: Vec<String> = hashes.iter().map(|(part, hash)| format!("{part} {hash}")).collect();
            ("the configuration was loaded".to_owned(), Some(hashes.join("; ")), "broker")
        }
        BrokerEvent::OrphanFound { target, name } => {
            (format!("found at {target} what no lease explains: {name}"), None, "target")
        }
        BrokerEvent::OrphanGone { target, name, evidence } => {
            (format!("gone from {target}: {name}"), Some(evidence_in_words(evidence)), "target")
        }
        BrokerEvent::Refused { agent, problem, count } => {
            (format!("refused {agent}: {problem}"), (*count > 1).then(|| format!("{count} times")), "broker")
        }
        BrokerEvent::VoteRefused { grant, person, problem } => {
            (format!("a vote of {} was refused: {problem}", name(person)), Some(grant.to_string()), "broker")
        }
        BrokerEvent::VotesRefused { person, problem, count } => {
            (format!("votes of {} were refused: {problem}", name(person)), Some(format!("{count} more")), "broker")
        }
        BrokerEvent::Restored { records, root, made_at, newest_size, newest_root, may_lack_records } => {
            let newest = newest_size.zip(newest_root.as_ref());
            let newest =
                newest.map(|(size, root)| format!("; the newest checkpoint given: {size} records, root {root}"));
            let lacks = if *may_lack_records { "; later records are lost, or may be" } else { "" };
            let detail = format!("root {root}; made {}{}{lacks}", rfc3339(*made_at), newest.unwrap_or_default());
            (format!("restored from a backup of {records} records"), Some(detail), "broker")
        }
        BrokerEvent::Replaced { grant } => {
            ("a credential was asked for again and minted anew".to_owned(), Some(grant.to_string()), "agent")
        }
    };
    Told { says, detail, source }
}

/// What happened to a grant. `name`: what a person is called.
pub fn grant_event(event: &GrantEvent, name: &dyn Fn(&PersonId) -> String) -> Told {
    let (says, detail, source) = match event {
        GrantEvent::Requested { request } => (
            format!("{} asked, for task {}", request.agent.name, request.task),
            Some(format!("“{}”", request.intent)),
            "agent",
        ),
        GrantEvent::Assessed { assessed } => (
            format!("policy permits it as {}", assessed.approvable.tier.name),
            Some(assessed.reasons.iter().rev().fold(format!("digest {}", assessed.digest), |rest, r| {
                format!("{} (rule {}); {rest}", r.says, r.rule)
            })),
            "broker",
        ),
        GrantEvent::Denied { by, reason } => match by {
            DeniedBy::Policy { rule, .. } => (format!("denied by rule {rule}"), Some(reason.clone()), "broker"),
            DeniedBy::Person { person } => (format!("denied by {}", name(person)), Some(reason.clone()), "person"),
        },
        GrantEvent::Voted { vote } => {
            let verdict = if vote.verdict == Verdict::Approve { "approved" } else { "denied" };
            let says = format!("{} {verdict} it ({})", name(&vote.person), vote.via);
            let reason = vote.reason.as_ref().map(|r| format!("“{r}”; ")).unwrap_or_default();
            (says, Some(format!("{reason}digest {}", vote.digest)), "person")
        }
        GrantEvent::Activated { ends_at } => (format!("in force until {}", rfc3339(*ends_at)), None, "broker"),
        GrantEvent::Lapsed => ("nobody decided in time".to_owned(), None, "broker"),
        GrantEvent::Cancelled => ("the agent took it back".to_owned(), None, "agent"),
        GrantEvent::Withdrawn { cause } => (format!("withdrawn: {}", cause_in_words(cause)), None, "broker"),
        GrantEvent::Ending { cause } => (format!("over: {}", cause_in_words(cause)), None, "broker"),
        GrantEvent::Ended => ("no credential under it is open any more".to_owned(), None, "broker"),
        GrantEvent::LeaseIntended { intent } => (
            format!("a credential for {} is about to be minted", intent.permission.resource),
            Some(format!("{} ({})", intent.name, intent.lease)),
            "broker",
        ),
        GrantEvent::LeasePrepared { lease, .. } => {
            ("the handle by which it can be ended is recorded".to_owned(), Some(lease.to_string()), "broker")
        }
        GrantEvent::LeaseLive { lease, released, .. } => {
            let says = if *released { "minted and handed over" } else { "minted" };
            (says.to_owned(), Some(lease.to_string()), "broker")
        }
        GrantEvent::LeaseUnknown { lease, why, .. } => {
            (format!("it is not known whether it was minted: {why}"), Some(lease.to_string()), "broker")
        }
        GrantEvent::LeaseRevoking { lease, why } => (format!("being ended: {why}"), Some(lease.to_string()), "broker"),
        GrantEvent::LeaseRetry { lease, why, next_try } => {
            (format!("not ended yet: {why}; next try {}", rfc3339(*next_try)), Some(lease.to_string()), "broker")
        }
        GrantEvent::LeaseRevoked { lease, evidence, seen, access_cut_ms } => {
            let mut detail = lease.to_string();
            if let Some(ms) = access_cut_ms {
                detail = format!("{detail}; access cut after {ms} ms");
            }
            for s in seen {
                detail = format!("{detail}; {}: {}", s.what, s.count);
                if let Some(more) = &s.detail {
                    detail = format!("{detail} ({more})");
                }
            }
            (format!("gone: {}", evidence_in_words(evidence)), Some(detail), "target")
        }
        GrantEvent::LeaseAbsent { lease, absence, .. } => match absence {
            Absence::NotMinted { why } => (format!("not minted: {why}"), Some(lease.to_string()), "broker"),
            Absence::Proven { evidence } => {
                (format!("nothing is there: {}", evidence_in_words(evidence)), Some(lease.to_string()), "target")
            }
            Absence::Attested { by, reason } => {
                (attestation_in_words(&name(by), reason), Some(lease.to_string()), "person")
            }
        },
        GrantEvent::LeaseAttestedAbsent { lease, by, reason } => {
            (attestation_in_words(&name(by), reason), Some(lease.to_string()), "person")
        }
        GrantEvent::Invoked { invocation } => {
            let detail: Vec<String> = [
                invocation.arguments.as_ref().map(|a| format!("arguments {a:?}")),
                invocation.started_at.map(|at| format!("began {}", rfc3339(at))),
                invocation.ended_at.map(|at| format!("ended {}", rfc3339(at))),
                invocation.arguments_digest.as_ref().map(|d| format!("keyed hash of the command {d}")),
            ]
            .into_iter()
            .flatten()
            .collect();
            let says = format!("{}: {}", invocation.tool, invocation.status);
            (says, (!detail.is_empty()).then(|| detail.join("; ")), "agent")
        }
    };
    Told { says, detail, source }
}

/// Why a grant is over, in words.
pub fn cause_in_words(cause: &EndCause) -> String {
    match cause {
        EndCause::Completed => "the agent said that it is done".to_owned(),
        EndCause::TaskCompleted => "its task was completed".to_owned(),
        EndCause::Expired => "its time was up".to_owned(),
        EndCause::Revoked { by, reason } => format!("{by} took it away: {reason}"),
        EndCause::AgentLost => "the agent gave no more signs of life".to_owned(),
        EndCause::ParentEnded => "the grant that it hangs from is over".to_owned(),
        EndCause::Frozen { id } => format!("freeze {id} covers it"),
        EndCause::TierRisen { reason } => format!("policy at mint asks for more than was approved: {reason}"),
        EndCause::ApprovedThingChanged { resource } => {
            format!("what is behind {resource} changed since it was approved")
        }
        EndCause::ClockSetBack => "the clock was set back while the broker was down".to_owned(),
        EndCause::Restored => "the record was restored from a backup, and what happened since isn't known".to_owned(),
    }
}

/// A proof, in words.
pub fn evidence_in_words(evidence: &Evidence) -> String {
    match evidence {
        Evidence::TargetSaysGone { detail } => format!("the target says that it is gone: {detail}"),
        Evidence::TriedAndRefused { detail } => format!("it was tried and refused: {detail}"),
        Evidence::Expired { not_after, skew_secs } => {
            format!("it expired at {} (and {skew_secs} s for the target's clock have passed)", rfc3339(*not_after))
        }
    }
}

/// A person's word that a target no longer exists, in words. No proof, and it says so.
pub fn attestation_in_words(by: &str, reason: &str) -> String {
    format!("not proven: {by} attests that its target no longer exists: “{reason}”")
}

/// A moment, as RFC 3339 in UTC, to the second.
pub fn rfc3339(at: Timestamp) -> String {
    i64::try_from(at.secs())
        .ok()
        .and_then(|s| time::OffsetDateTime::from_unix_timestamp(s).ok())
        .and_then(|t| t.format(&time::format_description::well_known::Rfc3339).ok())
        .unwrap_or_else(|| format!("{} ms", at.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::digest::Digest;
    use crate::core::vote::Vote;

    fn ana() -> PersonId {
        PersonId::new("ana").unwrap()
    }

    #[test]
    fn people_have_their_names_and_votes_their_reasons() {
        let digest = Digest::of_bytes(b"x");
        let vote = |verdict, reason: Option<&str>| GrantEvent::Voted {
            vote: Vote {
                person: ana(),
                account: "a#b".to_owned(),
                via: "browser".to_owned(),
                verdict,
                digest,
                reason: reason.map(str::to_owned),
                at: Timestamp(0),
            },
        };
        let name = |_: &PersonId| "Ana Lima".to_owned();
        let told = grant_event(&vote(Verdict::Deny, Some("too much")), &name);
        assert_eq!((told.says.as_str(), told.source), ("Ana Lima denied it (browser)", "person"));
        assert_eq!(told.detail.unwrap(), format!("“too much”; digest {digest}"));
        let told = grant_event(&vote(Verdict::Approve, None), &name);
        assert_eq!(
            (told.says.as_str(), told.detail.unwrap()),
            ("Ana Lima approved it (browser)", format!("digest {digest}"))
        );
    }

    #[test]
    fn what_was_run_is_told_with_all_that_was_reported() {
        let mut invocation = crate::core::event::Invocation {
            tool: "psql".to_owned(),
            arguments_digest: Some("ab".repeat(32)),
            arguments: Some(vec!["-c".to_owned(), "select 1".to_owned()]),
            status: "exit:3".to_owned(),
            started_at: Some(Timestamp(1_000)),
            ended_at: Some(Timestamp(62_000)),
        };
        let told = |i: &crate::core::event::Invocation| {
            grant_event(&GrantEvent::Invoked { invocation: i.clone() }, &ToString::to_string)
        };
        let said = told(&invocation);
        assert_eq!((said.says.as_str(), said.source), ("psql: exit:3", "agent"));
        let began = "began 1970-01-01T00:00:01Z; ended 1970-01-01T00:01:02Z";
        let hash = "ab".repeat(32);
        let all = format!("arguments [\"-c\", \"select 1\"]; {began}; keyed hash of the command {hash}");
        assert_eq!(said.detail.unwrap(), all);
        (invocation.arguments, invocation.arguments_digest) = (None, None);
        assert_eq!(told(&invocation).detail.as_deref(), Some(began));
    }

    #[test]
    fn what_happened_to_no_grant_is_told_too() {
        let frozen = Event::Frozen { id: 3, selector: Selector::Owner(ana()), by: ana(), reason: "drill".to_owned() };
        let told = event(&frozen, &ToString::to_string);
        assert_eq!(
            (told.says.as_str(), told.detail.as_deref()),
            ("ana froze all agents of ana", Some("freeze 3: “drill”"))
        );
        let gone = Event::Broker {
            what: BrokerEvent::OrphanGone {
                target: crate::core::id::ResourceName::new("db").unwrap(),
                name: "cslease_x".to_owned(),
                evidence: Evidence::TriedAndRefused { detail: "28P01".to_owned() },
            },
        };
        let told = event(&gone, &ToString::to_string);
        assert_eq!((told.says.as_str(), told.source), ("gone from db: cslease_x", "target"));
        assert_eq!(told.detail.as_deref(), Some("it was tried and refused: 28P01"));
    }
}
