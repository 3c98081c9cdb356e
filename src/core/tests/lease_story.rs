//! The oracle's part about one lease: what its events may tell, and what its state must then be.

use super::Checked;
use super::oracle::Phase;
use crate::core::event::GrantEvent;
use crate::core::id::{LeaseId, Timestamp};
use crate::core::lease::{Absence, Lease, LeaseIntent, LeaseState};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeasePhase {
    OnItsWay,
    Live,
    Lost { since: Timestamp, not_before: Timestamp },
    BeingEnded,
    Gone,
}

pub struct LeaseStory {
    pub intent: LeaseIntent,
    pub phase: LeasePhase,
    seen_live: bool,
    released_at: Option<Timestamp>,
    /// Attempts that failed since its end began, or since it was lost.
    failed: u32,
    attested: bool,
}

/// The lease that an event changes, if it is about one that is there.
pub fn lease_of(event: &GrantEvent) -> Option<LeaseId> {
    match event {
        GrantEvent::LeasePrepared { lease, .. }
        | GrantEvent::LeaseLive { lease, .. }
        | GrantEvent::LeaseUnknown { lease, .. }
        | GrantEvent::LeaseRevoking { lease, .. }
        | GrantEvent::LeaseRetry { lease, .. }
        | GrantEvent::LeaseRevoked { lease, .. }
        | GrantEvent::LeaseAbsent { lease, .. }
        | GrantEvent::LeaseAttestedAbsent { lease, .. } => Some(*lease),
        _ => None,
    }
}

impl LeaseStory {
    pub fn new(intent: LeaseIntent) -> Self {
        Self { intent, phase: LeasePhase::OnItsWay, seen_live: false, released_at: None, failed: 0, attested: false }
    }

    /// Judges one event. `in_force_until` is the grant's end while it is in force.
    pub fn observe(
        &mut self,
        event: &GrantEvent,
        at: Timestamp,
        in_force_until: Option<Timestamp>,
    ) -> Result<&'static str, String> {
        let in_force = in_force_until.is_some();
        Ok(match event {
            GrantEvent::LeasePrepared { .. } => {
                ensure!(self.phase == LeasePhase::OnItsWay, "prepared after its outcome was known");
                "prepared"
            }
            GrantEvent::LeaseLive { released, .. } => {
                let late = matches!(self.phase, LeasePhase::Lost { .. });
                ensure!(late || self.phase == LeasePhase::OnItsWay, "live while {:?}", self.phase);
                if *released {
                    ensure!(!late, "G2: a late answer is handed over");
                    ensure!(in_force, "G2: handed over after the end");
                    ensure!(in_force_until.is_some_and(|end| at < end), "G10: handed over at or after the end");
                    ensure!(self.released_at.is_none(), "G2: handed over twice");
                    self.released_at = Some(at);
                }
                self.seen_live = true;
                self.failed = 0;
                self.phase = if in_force && !late { LeasePhase::Live } else { LeasePhase::BeingEnded };
                match (late, *released, in_force) {
                    (true, ..) => "late answer",
                    (_, true, _) => "handed over",
                    (_, _, true) => "live",
                    (_, _, false) => "over before its lease was known",
                }
            }
            GrantEvent::LeaseUnknown { not_before, .. } => {
                // Said again only by a clock that was set back to before it was noticed.
                let anew = matches!(self.phase, LeasePhase::Lost { since, not_before: until } if at < since || *not_before > until);
                ensure!(anew || self.phase == LeasePhase::OnItsWay, "unknown while {:?}", self.phase);
                self.phase = LeasePhase::Lost { since: at, not_before: *not_before };
                self.failed = 0;
                "unknown"
            }
            GrantEvent::LeaseRevoking { .. } => {
                ensure!(self.phase == LeasePhase::Live, "being ended while {:?}", self.phase);
                self.phase = LeasePhase::BeingEnded;
                "replaced"
            }
            GrantEvent::LeaseRetry { next_try, .. } => match self.phase {
                LeasePhase::BeingEnded => {
                    self.failed += 1;
                    "retried"
                }
                LeasePhase::Lost { not_before, .. } => {
                    ensure!(*next_try >= not_before, "G5: looked for while the mint may be under way");
                    self.failed += 1;
                    "looked for again"
                }
                phase => return Err(format!("tried again while {phase:?}")),
            },
            GrantEvent::LeaseRevoked { .. } => {
                ensure!(self.phase == LeasePhase::BeingEnded && self.seen_live, "G5: revoked while {:?}", self.phase);
                self.phase = LeasePhase::Gone;
                "revoked"
            }
            GrantEvent::LeaseAbsent { absence, .. } => {
                match (self.phase, absence) {
                    (LeasePhase::OnItsWay, Absence::NotMinted { .. }) => {}
                    (LeasePhase::Lost { not_before, .. }, Absence::Proven { .. }) => {
                        ensure!(at >= not_before, "G5: proven absent while the mint may be under way");
                    }
                    (phase, absence) => return Err(format!("G5: {absence:?} while {phase:?}")),
                }
                self.phase = LeasePhase::Gone;
                "absent"
            }
            GrantEvent::LeaseAttestedAbsent { .. } => {
                let tried = match self.phase {
                    LeasePhase::BeingEnded => true,
                    LeasePhase::Lost { not_before, .. } => at >= not_before,
                    _ => false,
                };
                ensure!(tried && self.failed > 0, "G5: attested away while {:?}, {} failed", self.phase, self.failed);
                (self.phase, self.attested) = (LeasePhase::Gone, true);
                "attested"
            }
            other => return Err(format!("not expected here: {other:?}")),
        })
    }

    pub fn agrees(&self, lease: &Lease, grant: Phase) -> Checked {
        ensure!(lease.intent == self.intent, "G3: the intent has changed");
        let phase = match &lease.state {
            LeaseState::Intended => LeasePhase::OnItsWay,
            LeaseState::Live { released_at, .. } => {
                ensure!(*released_at == self.released_at, "G2: released_at is {released_at:?}");
                ensure!(grant == Phase::InForce, "G4: live though the grant is {grant:?}");
                LeasePhase::Live
            }
            LeaseState::Unknown { since, not_before, .. } => {
                LeasePhase::Lost { since: *since, not_before: *not_before }
            }
            LeaseState::Revoking { .. } => LeasePhase::BeingEnded,
            LeaseState::Revoked { .. } | LeaseState::Absent { .. } => LeasePhase::Gone,
        };
        ensure!(phase == self.phase, "G4: the lease is {phase:?}, the events say {:?}", self.phase);
        ensure!(grant != Phase::Final || phase == LeasePhase::Gone, "G4: final with {phase:?}");
        ensure!(
            matches!(grant, Phase::InForce | Phase::Over | Phase::Final),
            "G1: a lease before the grant was in force"
        );
        let by_word = matches!(lease.state, LeaseState::Absent { absence: Absence::Attested { .. }, .. });
        ensure!(by_word == self.attested, "G5: a person's word and a proof are mixed up: {:?}", lease.state);
        let proven = matches!(lease.state, LeaseState::Revoked { .. });
        ensure!(!proven || self.seen_live, "G5: revoked, never seen live");
        Ok(())
    }
}
