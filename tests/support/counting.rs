//! A target around another one: what is minted there is counted, and looked at before it exists.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use countersign::connector::{
    Away, Connector, Found, Gap, Gone, Listener, MintContext, MintError, Minted, Revocability, RevokeError, SweepError,
};
use countersign::core::event::Urgency;
use countersign::core::id::{LeaseId, Timestamp};
use countersign::core::lease::{Handle, Lease, LeaseIntent};
use countersign::core::permission::Permission;

/// What was minted.
pub type Mints = Arc<Mutex<Vec<LeaseId>>>;

/// The target.
pub struct Counting {
    pub inner: Arc<dyn Connector>,
    pub mints: Mints,
    /// Sees each lease right before it is minted.
    pub seen: Box<dyn Fn(LeaseId) + Send + Sync>,
}

#[async_trait]
impl Connector for Counting {
    fn kind(&self) -> &'static str {
        self.inner.kind()
    }
    fn revocability(&self, permission: &Permission, lifetime_secs: u64) -> Revocability {
        self.inner.revocability(permission, lifetime_secs)
    }
    fn fingerprint(&self, permission: &Permission) -> serde_json::Value {
        self.inner.fingerprint(permission)
    }
    /// As at a target outside: intent, mint and release are apart.
    fn mints_locally(&self) -> bool {
        false
    }
    fn counts_on_wall_clock(&self) -> bool {
        self.inner.counts_on_wall_clock()
    }
    async fn mint(
        &self,
        intent: &LeaseIntent,
        prepared: Option<&Handle>,
        context: &MintContext,
    ) -> Result<Minted, MintError> {
        (self.seen)(intent.lease);
        self.mints.lock().unwrap().push(intent.lease);
        self.inner.mint(intent, prepared, context).await
    }
    fn mint_deadline(&self) -> Duration {
        self.inner.mint_deadline()
    }
    async fn revoke(&self, lease: &Lease, now: Timestamp) -> Result<Gone, RevokeError> {
        self.inner.revoke(lease, now).await
    }
    async fn revoke_unknown(
        &self,
        lease: &Lease,
        known: &BTreeSet<String>,
        now: Timestamp,
    ) -> Result<Gone, RevokeError> {
        self.inner.revoke_unknown(lease, known, now).await
    }
    async fn revoke_all(&self, leases: &[Lease], now: Timestamp, urgency: Urgency, listener: &dyn Listener) {
        self.inner.revoke_all(leases, now, urgency, listener).await;
    }
    async fn probe(&self) -> Result<(), Away> {
        self.inner.probe().await
    }
    async fn sweep(&self) -> Result<Vec<Found>, SweepError> {
        self.inner.sweep().await
    }
    async fn revoke_found(&self, found: &Found, now: Timestamp) -> Result<Gone, RevokeError> {
        self.inner.revoke_found(found, now).await
    }
    async fn check(&self) -> Result<Vec<Gap>, SweepError> {
        self.inner.check().await
    }
}
