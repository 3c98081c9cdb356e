//! What becomes of an attempt to end a lease: the proof, or the next try, on record or remembered until it can be.

use std::sync::Arc;
use std::time::Duration;

use crate::connector::{Gone, RevokeError};
use crate::core::decide::Command;
use crate::core::id::{GrantId, LeaseId, Timestamp};
use crate::core::lease::{Evidence, Lease, LeaseState};
use crate::failpoint::{self, Point};
use crate::mutation::Mutation;
use crate::store::Job;

use super::Broker;
use super::turns::Work;

/// First pause after a failed ending.
pub const RETRY_FIRST_MS: u64 = 250;
/// Longest pause after failed endings.
pub const RETRY_MS_MAX: u64 = 60_000;
/// After the moment at which a credential ends by itself, in milliseconds: so that it is over when it is looked at.
const AFTER_MS: u64 = 50;

impl Broker {
    /// Records what became of an ending. False if it has to be tried again.
    pub(super) async fn settle(&self, mut work: Work, lease: &Lease, outcome: Result<Gone, RevokeError>) -> bool {
        let outcome = match outcome {
            Err(RevokeError::Retry { why }) if Mutation::EvidenceAssumed.is_on() => {
                let evidence = Evidence::TargetSaysGone { detail: why };
                Ok(Gone { evidence, seen: Vec::new(), access_cut: None })
            }
            outcome => outcome,
        };
        let grant = work.grant.id;
        let well = !matches!(outcome, Err(RevokeError::Retry { .. }));
        let is_proof = outcome.is_ok();
        let recorded = match outcome {
            Ok(gone) => {
                failpoint::at(Point::RevokeProven);
                self.proven(grant, lease, gone).await
            }
            Err(RevokeError::Retry { why }) => self.again(grant, lease, why).await,
            Err(RevokeError::EndsAt { at }) => {
                let why = "this target can't end it early; it ends by its own expiry".to_owned();
                let next = look_again(lease, at, self.clock.passed(), self.now());
                self.retry_at(grant, lease, why, next).await
            }
        };
        let id = lease.intent.lease;
        let handed_out_again = work.mark.lift();
        if recorded {
            self.driver.unrecorded_tries.lock().remove(&id);
            if handed_out_again {
                self.store.release(Job::Lease(grant, id)).await;
            }
        } else {
            self.release_later(grant, id, is_proof);
        }
        well
    }

    /// Hands a lease out again after a pause: what became of it could not be recorded. A proof only has to be written; an
    /// attempt that failed waits longer each time, as one that is on record does.
    fn release_later(&self, grant: GrantId, lease: LeaseId, is_proof: bool) {
        let pause = if is_proof {
            RETRY_FIRST_MS
        } else {
            let mut tries = self.driver.unrecorded_tries.lock();
            let tries = tries.entry(lease).or_default();
            *tries = tries.saturating_add(1);
            backoff_ms(*tries, self.random.as_ref())
        };
        let (store, clock) = (Arc::clone(&self.store), Arc::clone(self.clock.clock()));
        let waiting = Arc::clone(&clock);
        clock.spawn(Box::pin(async move {
            waiting.sleep(Duration::from_millis(pause)).await;
            store.release(Job::Lease(grant, lease)).await;
        }));
    }

    /// True if it is recorded.
    async fn proven(&self, id: GrantId, lease: &Lease, gone: Gone) -> bool {
        let command = Command::Gone {
            lease: lease.intent.lease,
            evidence: gone.evidence.clone(),
            seen: gone.seen.clone(),
            access_cut_ms: gone.access_cut.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
        };
        let recorded = self.command(id, &command, true).await;
        match &recorded {
            Ok(_) => {
                failpoint::at(Point::RevokeRecorded);
                self.driver.unrecorded.lock().remove(&lease.intent.lease);
            }
            Err(error) => {
                tracing::warn!(lease = %lease.intent.lease, %error, "a proof could not be recorded yet");
                self.driver.unrecorded.lock().insert(lease.intent.lease, gone);
            }
        }
        recorded.is_ok()
    }

    /// A lease whose target left the catalogue stays to be ended, visibly (regression L3).
    pub(super) async fn no_connector(&self, id: GrantId, lease: &Lease) {
        let why = format!(
            "the target {} is no longer in the catalogue: put it back until this lease is ended, or attest that it is gone \
             for good (countersign revoke --force-absent --target {0})",
            lease.intent.target
        );
        if !self.again(id, lease, why).await {
            self.release_later(id, lease.intent.lease, false);
        }
    }

    async fn again(&self, id: GrantId, lease: &Lease, why: String) -> bool {
        let attempts = match &lease.state {
            LeaseState::Revoking { progress, .. } | LeaseState::Unknown { progress, .. } => progress.attempts,
            _ => 0,
        };
        let gives_up = Mutation::ForgetToRetry.is_on() || (Mutation::GiveUp.is_on() && attempts >= 5);
        let pause = if gives_up { u64::from(u32::MAX) } else { backoff_ms(attempts, self.random.as_ref()) };
        self.retry_at(id, lease, why, self.now().plus_ms(pause)).await
    }

    /// True if it is recorded.
    async fn retry_at(&self, id: GrantId, lease: &Lease, why: String, next_try: Timestamp) -> bool {
        tracing::warn!(lease = %lease.intent.lease, %why, "an ending is not proven yet; it will be tried again");
        let command = Command::Retry { lease: lease.intent.lease, why, next_try };
        // Not urgent: an attempt that failed is no ending, and there may be many (guarantee 8).
        let recorded = self.command(id, &command, false).await;
        match &recorded {
            Ok(_) => failpoint::at(Point::RevokeRetry),
            Err(error) => {
                tracing::warn!(lease = %lease.intent.lease, %error, "a failed ending could not be recorded yet");
            }
        }
        recorded.is_ok()
    }
}

/// When to look again at a lease that ends by itself at `at`, on the broker's clock. Not much later than the end of
/// the life that it was minted with, whatever the wall clock says now: a step that is undone parks nothing
/// (guarantee 10). From then on at every longest pause.
fn look_again(lease: &Lease, at: Timestamp, passed: Timestamp, now: Timestamp) -> Timestamp {
    let life_left = lease.intent.intended_at.plus_secs(lease.intent.lifetime_secs).ms_since(now);
    let wait = at.ms_since(passed).min(life_left.max(RETRY_MS_MAX));
    now.plus_ms(wait.saturating_add(AFTER_MS))
}

/// Doubles from [`RETRY_FIRST_MS`] to [`RETRY_MS_MAX`], with up to a quarter taken off at random.
pub(super) fn backoff_ms(attempts: u32, random: &dyn crate::keys::random::Random) -> u64 {
    let full = RETRY_FIRST_MS.saturating_mul(1 << attempts.min(16)).min(RETRY_MS_MAX);
    let [byte] = crate::keys::random::random_bytes::<1>(random);
    full - full / 4 * u64::from(byte) / 255
}
