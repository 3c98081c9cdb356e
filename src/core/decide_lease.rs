//! What may happen to one lease of a grant. Pure, like the rest of `decide.rs`.

use super::decide::{Command, Refusal};
use super::event::GrantEvent;
use super::grant::{Grant, GrantState};
use super::id::{LeaseId, Timestamp};
use super::lease::{Absence, LeaseState};

/// Decides what a connector or a driver reports of one lease, or a person says of it.
pub(super) fn decide_lease(grant: &Grant, command: &Command, now: Timestamp) -> Result<Vec<GrantEvent>, Refusal> {
    let state_of = |lease: &LeaseId| grant.leases.get(lease).map(|l| &l.state).ok_or(Refusal::NoLease);
    let event = match command {
        Command::Prepared { lease, handle } => match state_of(lease)? {
            LeaseState::Intended => GrantEvent::LeasePrepared { lease: *lease, handle: handle.clone() },
            _ => return Err(Refusal::NoLease),
        },
        Command::Live { lease, handle, not_after, release } => match state_of(lease)? {
            LeaseState::Intended | LeaseState::Unknown { .. } => GrantEvent::LeaseLive {
                lease: *lease,
                handle: handle.clone(),
                not_after: *not_after,
                // Nothing is handed over once the grant is over, or when the answer came too late (guarantee 2).
                released: *release
                    && matches!(grant.state, GrantState::Active { .. })
                    && matches!(state_of(lease)?, LeaseState::Intended),
            },
            _ => return Err(Refusal::NoLease),
        },
        Command::NotMinted { lease, why } => match state_of(lease)? {
            LeaseState::Intended => GrantEvent::LeaseAbsent {
                lease: *lease,
                absence: Absence::NotMinted { why: why.clone() },
                seen: Vec::new(),
            },
            _ => return Err(Refusal::NoLease),
        },
        Command::Unknown { lease, why, handle, not_before } => {
            let anew = match state_of(lease)? {
                LeaseState::Intended => true,
                state => state.may_be_doubted_anew(now, *not_before),
            };
            if !anew {
                return Err(Refusal::NoLease);
            }
            GrantEvent::LeaseUnknown {
                lease: *lease,
                why: why.clone(),
                handle: handle.clone(),
                not_before: *not_before,
            }
        }
        Command::RevokeLease { lease, why } => match state_of(lease)? {
            LeaseState::Live { .. } => GrantEvent::LeaseRevoking { lease: *lease, why: why.clone() },
            // On its way: its outcome must be known (or `Unknown`) before anything can be ended.
            LeaseState::Intended => return Err(Refusal::NoLease),
            _ => return Ok(Vec::new()),
        },
        Command::Retry { lease, why, next_try } => match state_of(lease)? {
            LeaseState::Revoking { .. } => {
                GrantEvent::LeaseRetry { lease: *lease, why: why.clone(), next_try: *next_try }
            }
            LeaseState::Unknown { not_before, .. } => {
                GrantEvent::LeaseRetry { lease: *lease, why: why.clone(), next_try: (*next_try).max(*not_before) }
            }
            _ => return Ok(Vec::new()),
        },
        Command::Gone { lease, evidence, seen, access_cut_ms } => match state_of(lease)? {
            LeaseState::Revoking { .. } => GrantEvent::LeaseRevoked {
                lease: *lease,
                evidence: evidence.clone(),
                seen: seen.clone(),
                access_cut_ms: *access_cut_ms,
            },
            // It was never seen live: the proof says that nothing is there, not that something was revoked, and it
            // says nothing at all while the mint may still be under way (guarantee 5).
            LeaseState::Unknown { not_before, .. } if now < *not_before => return Err(Refusal::NoLease),
            LeaseState::Unknown { .. } => GrantEvent::LeaseAbsent {
                lease: *lease,
                absence: Absence::Proven { evidence: evidence.clone() },
                seen: seen.clone(),
            },
            LeaseState::Revoked { .. } | LeaseState::Absent { .. } => return Ok(Vec::new()),
            LeaseState::Intended | LeaseState::Live { .. } => return Err(Refusal::NoLease),
        },
        // A person's word stands where there is no proof, never beside one (guarantee 5), and only after the broker has
        // tried in vain.
        Command::AttestAbsent { lease, by, reason } => match state_of(lease)? {
            LeaseState::Unknown { not_before, .. } if now < *not_before => return Err(Refusal::NotResisting),
            LeaseState::Revoking { progress, .. } | LeaseState::Unknown { progress, .. } if progress.attempts > 0 => {
                GrantEvent::LeaseAttestedAbsent { lease: *lease, by: by.clone(), reason: reason.clone() }
            }
            LeaseState::Revoked { .. } | LeaseState::Absent { .. } => return Ok(Vec::new()),
            _ => return Err(Refusal::NotResisting),
        },
        _ => return Err(Refusal::NoLease),
    };
    Ok(vec![event])
}
