//! Small things that tests are made of: names, causes, and the commands that need no world.

use serde_json::json;

use super::steps::LeaseAct;
use super::uses::permission;
use crate::core::decide::{Command, Refusal};
use crate::core::event::{EndCause, Invocation};
use crate::core::id::{AgentId, GrantId, LeaseId, PersonId, Timestamp};
use crate::core::lease::Evidence;

/// Everybody in the directory. The first two answer for agents, the third launches, two accounts each.
pub const PERSONS: [&str; 6] = ["ana", "ben", "eve", "cy", "dee", "fay"];

/// A person of the directory.
pub fn person(n: usize) -> PersonId {
    PersonId::new(PERSONS[n % PERSONS.len()]).expect("a plain name")
}

pub fn grant_id(n: usize) -> GrantId {
    GrantId::from_bytes((n as u128 + 1).to_be_bytes())
}

pub fn lease_id(n: u64) -> LeaseId {
    LeaseId::from_bytes(u128::from(n).to_be_bytes())
}

pub fn agent_id(n: usize) -> AgentId {
    AgentId::new(&format!("spiffe://corp/agent/{n}")).expect("a plain SPIFFE ID")
}

/// One cause of each kind.
pub fn end_cause(n: usize) -> EndCause {
    match n % 10 {
        0 => EndCause::Completed,
        1 => EndCause::TaskCompleted,
        2 => EndCause::Expired,
        3 => EndCause::Revoked { by: person(5), reason: "enough".into() },
        4 => EndCause::AgentLost,
        5 => EndCause::Frozen { id: 7 },
        6 => EndCause::TierRisen { reason: "more is held now".into() },
        7 => EndCause::ApprovedThingChanged { resource: permission(0).resource },
        8 => EndCause::Restored,
        _ => EndCause::ClockSetBack,
    }
}

pub fn deny_by_policy() -> Command {
    Command::DenyByPolicy { rule: "r2".into(), policy_version: "v2".into(), reason: "no more".into() }
}

pub fn report() -> Command {
    let (tool, status) = ("psql".into(), "ok".into());
    let invocation =
        Invocation { tool, arguments_digest: None, arguments: None, status, started_at: None, ended_at: None };
    Command::Report { invocation, max: 3 }
}

/// The command of one act on one lease.
pub fn lease_command(lease: LeaseId, act: LeaseAct, now: Timestamp) -> Command {
    let handle = json!({"oid": 16_384});
    let why = "because".to_owned();
    match act {
        LeaseAct::Prepared => Command::Prepared { lease, handle },
        LeaseAct::Live { release } => Command::Live { lease, handle, not_after: Some(now.plus_secs(60)), release },
        LeaseAct::NotMinted => Command::NotMinted { lease, why },
        LeaseAct::Unknown { secs } => {
            Command::Unknown { lease, why, handle: (secs > 0).then_some(handle), not_before: now.plus_secs(secs) }
        }
        LeaseAct::Revoke => Command::RevokeLease { lease, why },
        LeaseAct::Retry { secs } => Command::Retry { lease, why, next_try: now.plus_secs(secs) },
        LeaseAct::Gone => {
            let evidence = Evidence::TargetSaysGone { detail: "no such role".into() };
            Command::Gone { lease, evidence, seen: Vec::new(), access_cut_ms: Some(3) }
        }
        LeaseAct::Attest => Command::AttestAbsent { lease, by: person(5), reason: why },
    }
}

/// Why nothing happened, counted by kind.
pub fn refusal_word(refusal: &Refusal) -> &'static str {
    match refusal {
        Refusal::State { .. } => "state",
        Refusal::DigestMismatch => "digest",
        Refusal::Excluded { .. } => "excluded",
        Refusal::AlreadyVoted => "voted already",
        Refusal::NotApproved => "not approved",
        Refusal::NotNarrower { .. } => "not narrower",
        Refusal::LeaseExists => "lease exists",
        Refusal::NoLease => "no lease",
        Refusal::NotResisting => "not resisting",
        Refusal::Limit { .. } => "limit",
    }
}
