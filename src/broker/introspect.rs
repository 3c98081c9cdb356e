//! Is a token of ours good at this moment? Asked by resource servers at each call (RFC 7662).

use crate::core::grant::GrantState;
use crate::core::id::{AgentId, GrantId, LeaseId};
use crate::core::lease::LeaseState;

use super::{Broker, BrokerError};

impl Broker {
    /// May this identity ask about a token now? `Err`: the seconds to wait.
    pub fn admit_introspection(&self, asker: &AgentId) -> Result<(), u64> {
        let rules = self.rules();
        let limits = &rules.config.limits;
        let mut rates = self.introspections.lock();
        rates.admit(asker, self.now(), limits.introspections_per_sec, limits.introspections_burst)
    }

    /// True while the grant is in force and the lease is live. Anything else, the unknown too, is no.
    pub async fn is_in_force(&self, grant: GrantId, lease: LeaseId) -> Result<bool, BrokerError> {
        if self.unfinished.cause_of(grant).is_some() {
            return Ok(false); // over, though the journal doesn't say so yet
        }
        // What was ended at another node must not look good at this one; without an answer, there is none.
        self.store.refresh().await?;
        let Some(grant) = self.store.grant(grant).await? else { return Ok(false) };
        let in_force = matches!(grant.state, GrantState::Active { ends_at, .. } if self.now() < ends_at);
        let live = grant.leases.get(&lease).is_some_and(|l| matches!(l.state, LeaseState::Live { .. }));
        Ok(in_force && live)
    }
}
