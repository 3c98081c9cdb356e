//! Ends many leases in one call and waits for all of them.

use countersign::connector::{Connector, Gone, RevokeError};
use countersign::core::event::Urgency;
use countersign::core::id::Timestamp;
use countersign::core::lease::Lease;
use parking_lot::Mutex;

/// The outcomes, in the order of the leases. Each is told exactly once.
pub async fn end_all(connector: &dyn Connector, leases: &[Lease], now: Timestamp) -> Vec<Result<Gone, RevokeError>> {
    let told: Mutex<Vec<Option<Result<Gone, RevokeError>>>> = Mutex::new(leases.iter().map(|_| None).collect());
    let settled = |place: usize, outcome: Result<Gone, RevokeError>| {
        assert!(told.lock()[place].replace(outcome).is_none(), "{place} was told twice");
    };
    connector.revoke_all(leases, now, Urgency::Over, &settled).await;
    told.into_inner().into_iter().map(|outcome| outcome.expect("one was never told")).collect()
}
