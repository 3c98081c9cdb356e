//! An operator attests that a target no longer exists: the only end of a lease without proof, and never called one.
//! What is attested away and shows up at its target after all is found by a sweep, and ended like any orphan.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::StreamExt;

use crate::connector::Extent;
use crate::core::decide::Command;
use crate::core::grant::Grant;
use crate::core::id::{GrantId, LeaseId, ResourceName};
use crate::core::lease::Lease;
use crate::policy::PersonAction;
use crate::wire::reviewer::{AttestOf, AttestResult, AttestedLease};

use super::end::check_reason;
use super::vote::Reviewer;
use super::{Broker, BrokerError, Rules};

/// Attestations that are recorded at once.
const AT_ONCE: usize = 64;

impl Broker {
    /// Records that an operator attests these credentials gone with their target. Only what an ending has failed on,
    /// and only while nothing answers at the target's address, or the target has left the catalogue.
    pub async fn attest_absent(&self, by: &Reviewer, of: &AttestOf, reason: &str) -> Result<AttestResult, BrokerError> {
        self.require_anywhere(by, PersonAction::Operate)?;
        let reason = check_reason(reason)?;
        let mut by_target: BTreeMap<ResourceName, Vec<(GrantId, Lease)>> = BTreeMap::new();
        for (grant, lease) in self.meant(of).await? {
            by_target.entry(lease.intent.target.clone()).or_default().push((grant, lease));
        }
        let (rules, mut result) = (self.rules(), AttestResult::default());
        for (target, leases) in by_target {
            let there = still_there(&rules, &target).await;
            let one = |(grant, lease): (GrantId, Lease)| self.attest(by, grant, lease, there.as_deref(), &reason);
            let done: Vec<_> = futures::stream::iter(leases.into_iter().map(one)).buffered(AT_ONCE).collect().await;
            for one in done {
                let one = one?;
                if one.why.is_none() { &mut result.attested } else { &mut result.left }.push(one);
            }
        }
        match (result.attested.is_empty(), result.left.first()) {
            (false, _) => Ok(result),
            (true, left) => {
                let why = left.and_then(|l| l.why.clone());
                Err(BrokerError::NotAbsent { why: why.unwrap_or_else(|| "no credential of it is open".to_owned()) })
            }
        }
    }

    /// The open leases that are meant.
    async fn meant(&self, of: &AttestOf) -> Result<Vec<(GrantId, Lease)>, BrokerError> {
        let grants: Vec<Arc<Grant>> = match of {
            AttestOf::Grant(id) => vec![self.store.grant(*id).await?.ok_or(BrokerError::NotFound)?],
            AttestOf::Lease(_) | AttestOf::Target(_) => self.store.open_grants().await?,
        };
        let is_meant = |lease: &Lease| match of {
            AttestOf::Grant(_) => true,
            AttestOf::Lease(id) => lease.intent.lease == *id,
            AttestOf::Target(target) => lease.intent.target == *target,
        };
        let of_grant =
            |g: &Arc<Grant>| g.open_leases().filter(|l| is_meant(l)).map(|l| (g.id, l.clone())).collect::<Vec<_>>();
        Ok(grants.iter().flat_map(of_grant).collect())
    }

    async fn attest(
        &self,
        by: &Reviewer,
        grant: GrantId,
        lease: Lease,
        there: Option<&str>,
        reason: &str,
    ) -> Result<AttestedLease, BrokerError> {
        let id: LeaseId = lease.intent.lease;
        let mut one = AttestedLease { grant, lease: id, target: lease.intent.target, why: there.map(str::to_owned) };
        if self.driver.is_proven(id) {
            one.why = Some("it is proven gone; the proof is recorded as soon as the journal can be written".to_owned());
        }
        if one.why.is_none() {
            let command = Command::AttestAbsent { lease: id, by: by.person.clone(), reason: reason.to_owned() };
            match self.command(grant, &command, false).await {
                Ok(_) => {
                    tracing::warn!(%grant, lease = %id, target = %one.target, by = %by.person, "attested absent, without proof")
                }
                Err(BrokerError::Refused(refusal)) => one.why = Some(refusal.to_string()),
                Err(error) => return Err(error),
            }
        }
        Ok(one)
    }
}

/// Why a target counts as still there. One that left the catalogue can't be asked: then the operator's word stands.
async fn still_there(rules: &Rules, target: &ResourceName) -> Option<String> {
    let connector = rules.connectors.get(target)?;
    match connector.probe().await {
        Err(away) if away.extent == Extent::Silent => None,
        Err(away) => Some(format!("something answers at the address of {target} ({away})")),
        Ok(()) => Some(format!("{target} answers")),
    }
}
