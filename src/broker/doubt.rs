//! Mints without a clear answer: an error after the call left is *unknown*, never "failed". What may exist is looked for
//! once nothing of the mint can be under way any more.

use std::sync::Arc;
use std::time::Duration;

use crate::connector::{Connector, MintError};
use crate::core::decide::Command;
use crate::core::id::Timestamp;
use crate::core::lease::{Handle, LeaseIntent};
use crate::mutation::Mutation;

use super::mint::not_now;
use super::{Broker, BrokerError};

/// How often a lease whose answer couldn't be recorded is tried again.
const RECORD_AGAIN: Duration = Duration::from_millis(500);

impl Broker {
    /// What becomes of a mint that gave no credential, and what its caller is told.
    pub(super) async fn mint_failed(
        self: &Arc<Self>,
        connector: &Arc<dyn Connector>,
        intent: &LeaseIntent,
        error: &MintError,
    ) -> BrokerError {
        match error {
            MintError::Unknown { why, .. } if Mutation::UnknownIsFailed.is_on() => {
                let command = Command::NotMinted { lease: intent.lease, why: why.clone() };
                let _ = self.command(intent.grant, &command, true).await;
            }
            MintError::NotMinted { why, .. } => {
                let command = Command::NotMinted { lease: intent.lease, why: why.clone() };
                if let Err(unrecorded) = self.command(intent.grant, &command, true).await {
                    tracing::warn!(lease = %intent.lease, %unrecorded, "the outcome of a mint could not be recorded yet");
                    self.settle_later(connector, intent, why.clone(), None);
                }
            }
            MintError::Unknown { why, handle } => self.doubt(connector, intent, why.clone(), handle.clone()).await,
        }
        not_now(error)
    }

    /// After this moment, nothing of a mint that is abandoned now can still be under way at its target.
    pub(super) fn not_before(&self, connector: &dyn Connector) -> Timestamp {
        if Mutation::LookTooEarly.is_on() {
            return self.now();
        }
        self.now().plus_ms(u64::try_from(connector.mint_deadline().as_millis()).unwrap_or(u64::MAX))
    }

    /// Says that a lease is in doubt: now, or as soon as that can be recorded.
    pub(super) async fn doubt(
        self: &Arc<Self>,
        connector: &Arc<dyn Connector>,
        intent: &LeaseIntent,
        why: String,
        handle: Option<Handle>,
    ) {
        let not_before = self.not_before(connector.as_ref());
        let command = Command::Unknown { lease: intent.lease, why: why.clone(), handle: handle.clone(), not_before };
        if let Err(unrecorded) = self.command(intent.grant, &command, true).await {
            tracing::warn!(lease = %intent.lease, %unrecorded, "the outcome of a mint could not be recorded yet");
            self.settle_later(connector, intent, why, handle);
        }
    }

    /// What became of a mint could not be recorded: keep trying to say that this lease is in doubt, whatever the
    /// journal answers, until it is said or the lease is somewhere else by now. If the broker stops before that,
    /// start-up finds it `Intended` and says the same.
    pub(super) fn settle_later(
        self: &Arc<Self>,
        connector: &Arc<dyn Connector>,
        intent: &LeaseIntent,
        why: String,
        handle: Option<Handle>,
    ) {
        let not_before = self.not_before(connector.as_ref());
        self.say_later(intent, Command::Unknown { lease: intent.lease, why, handle, not_before });
    }

    /// Whether an intent was recorded isn't known, and nobody mints for it: if it comes through, that is said behind it.
    pub(super) fn not_minted_later(self: &Arc<Self>, intent: &LeaseIntent, why: &BrokerError) {
        let why = format!("nothing was minted: {why}");
        self.say_later(intent, Command::NotMinted { lease: intent.lease, why });
    }

    fn say_later(self: &Arc<Self>, intent: &LeaseIntent, command: Command) {
        let (broker, id, lease) = (Arc::clone(self), intent.grant, intent.lease);
        // Nobody waits for it but `stop`.
        drop(self.spawn_mint(async move {
            loop {
                match broker.command(id, &command, true).await {
                    Ok(_) | Err(BrokerError::Refused(_) | BrokerError::NotFound) => return,
                    Err(_) if broker.stopping() => return,
                    Err(error) => {
                        tracing::warn!(%lease, %error, "what became of a lease could not be recorded yet");
                        broker.or_stop(broker.clock.clock().sleep(RECORD_AGAIN)).await;
                    }
                }
            }
        }));
    }
}
