//! Is a token of ours good at this moment? Asked by resource servers at each call (RFC 7662).

use crate::core::grant::GrantState;
use crate::core::id::{GrantId, LeaseId};
use crate::core::lease::LeaseState;

use super::{Broker, BrokerError};

impl Broker {
    /// True while the grant is in force and the lease is live. Anything else, the unknown too, is no.
    pub async fn is_in_force(&self, grant: GrantId, lease: LeaseId) -> Result<bool, BrokerError> {
        let Some(grant) = self.store.grant(grant).await? else { return Ok(false) };
        let in_force = matches!(grant.state, GrantState::Active { ends_at, .. } if self.now() < ends_at);
        let live = grant.leases.get(&lease).is_some_and(|l| matches!(l.state, LeaseState::Live { .. }));
        Ok(in_force && live)
    }
}
