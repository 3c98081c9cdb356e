//! Credentials: minted write-ahead, handed over once.
//!
//! The order is the point. Intent durable → (handle made and durable) → mint in a task of its own, run to its end
//! → lease durable as live and released → the secret leaves. Whatever breaks in between leaves a lease in the
//! journal from which the driver ends what may exist (guarantees 1 and 2).

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use parking_lot::Mutex;

use crate::connector::{Connector, Credential, Found, MintContext, MintError, Minted};
use crate::core::decide::{Command, PolicySaid, decide};
use crate::core::event::{BrokerEvent, EndCause};
use crate::core::grant::{Grant, GrantState};
use crate::core::id::{GrantId, LeaseId, ResourceName, Timestamp};
use crate::core::lease::{Handle, LeaseIntent, LeaseState};
use crate::core::permission::Permission;
use crate::failpoint::{self, Point};
use crate::identity::VerifiedAgent;
use crate::mutation::Mutation;
use crate::store::{Expect, StoreError};

use super::{Broker, BrokerError, CONFLICT_TRIES_MAX, Rules};

/// What is handed over: credentials of one grant. Lives in memory only, until it is sent.
#[derive(Debug)]
pub struct Issued {
    /// The grant.
    pub grant: GrantId,
    /// In force until then.
    pub ends_at: Timestamp,
    /// One for each permission, in the grant's order.
    pub credentials: Vec<IssuedCredential>,
}

/// One credential, on its way out.
#[derive(Debug)]
pub struct IssuedCredential {
    /// Its lease.
    pub lease: LeaseId,
    /// What it is for.
    pub resource: ResourceName,
    /// It.
    pub credential: Credential,
    /// When it dies by itself.
    pub not_after: Option<Timestamp>,
}

type Outcome = Result<Arc<Issued>, BrokerError>;

struct Flight {
    key: Option<String>,
    outcome: Shared<BoxFuture<'static, Outcome>>,
}

/// Mints that are under way, by grant.
#[derive(Default)]
pub struct Flights(Mutex<HashMap<GrantId, Flight>>);

/// Takes a flight off the list however it ends: after a panic too, the next call begins anew.
struct Landing<'a>(&'a Flights, GrantId);

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        self.0.0.lock().remove(&self.1);
    }
}

/// Credentials under one grant, ended ones too: each asking costs records, also when the target is down or the last
/// one is replaced again and again.
pub const LEASES_PER_GRANT_MAX: usize = 500;

impl Broker {
    /// Hands over the credentials of a grant, once. Two calls at once with one key are one flight with one answer.
    pub async fn credentials(
        self: &Arc<Self>,
        agent: &VerifiedAgent,
        id: GrantId,
        replace: bool,
        key: Option<&str>,
    ) -> Outcome {
        self.require_started()?;
        let grant = self.own(agent, id).await?;
        if let Some(bound) = &grant.request.confirmation
            && agent.confirmation.as_ref() != Some(bound)
        {
            return Err(BrokerError::NotBound); // regression D8
        }
        let outcome = {
            let mut flights = self.flights.0.lock();
            match flights.get(&id) {
                Some(flight) if flight.key.is_some() && flight.key.as_deref() == key => flight.outcome.clone(),
                Some(_) => return Err(BrokerError::InProgress),
                None => {
                    let broker = Arc::clone(self);
                    // A task of its own: the caller may go away, the flight ends properly.
                    let task = self.spawn_mint(async move {
                        let _landing = Landing(&broker.flights, id);
                        broker.issue(id, replace).await.map(Arc::new)
                    });
                    let outcome = task
                        .map(|done| done.unwrap_or_else(|e| Err(BrokerError::Internal(e.to_string()))))
                        .boxed()
                        .shared();
                    flights.insert(id, Flight { key: key.map(str::to_owned), outcome: outcome.clone() });
                    outcome
                }
            }
        };
        outcome.await
    }

    /// The grant, if it is this agent's: unknown and not-yours can't be told apart (regression L6).
    pub async fn own(&self, agent: &VerifiedAgent, id: GrantId) -> Result<Arc<Grant>, BrokerError> {
        match self.store.grant(id).await? {
            Some(grant) if grant.request.agent.id == agent.id => Ok(grant),
            _ => Err(BrokerError::NotFound),
        }
    }

    async fn issue(self: &Arc<Self>, id: GrantId, replace: bool) -> Result<Issued, BrokerError> {
        let rules = self.rules();
        let grant = self.store.head(id).await?.ok_or(BrokerError::NotFound)?;
        if let Some(cause) = self.mint_check(&rules, &grant).await? {
            let why = super::told::cause_in_words(&cause);
            self.end(id, cause).await?;
            return Err(BrokerError::Over { why });
        }
        if grant.leases.len() >= LEASES_PER_GRANT_MAX {
            return Err(BrokerError::TooMany { what: "credentials of one grant", max: LEASES_PER_GRANT_MAX });
        }
        self.clocks_agree(&rules, &grant)?;
        self.leave_nothing_behind(&grant, replace).await?;
        failpoint::at(Point::MintAsked);
        let (grant, intents, mut minted) = self.intend(&rules, id).await?;
        let context = mint_context(&grant, self.clock.passed());
        // Each in a task of its own, run to its end: a mint that is dropped half-way leaks (TARGETS).
        let remote: Vec<_> = intents
            .iter()
            .filter(|i| !minted.contains_key(&i.lease))
            .filter_map(|i| Some((i.clone(), Arc::clone(rules.connectors.get(&i.target)?))))
            .map(|(intent, connector)| {
                let (broker, context) = (Arc::clone(self), context.clone());
                let (of, at) = (intent.clone(), Arc::clone(&connector));
                (of, at, self.spawn_mint(async move { broker.mint_one(connector, intent, context).await }))
            })
            .collect();
        let mut failure = None;
        for (intent, connector, task) in remote {
            match task.await {
                Ok(Ok((lease, credential))) => {
                    minted.insert(lease, credential);
                }
                Ok(Err(error)) => failure = Some(error),
                Err(error) => {
                    // It panicked: whatever it had asked for is in doubt.
                    let error = MintError::Unknown { why: format!("its task failed: {error}"), handle: None };
                    failure = Some(self.mint_failed(&connector, &intent, &error).await);
                }
            }
        }
        if let Some(failure) = failure {
            // All or nothing: what the others minted is ended.
            for lease in minted.keys() {
                let why = "another credential of the same request could not be minted".to_owned();
                self.command(id, &Command::RevokeLease { lease: *lease, why }, true).await?;
            }
            return Err(failure);
        }
        let ends_at = grant.ends_at().unwrap_or_default();
        let mut credentials: Vec<IssuedCredential> = minted.into_values().collect();
        let order = |r: &ResourceName| grant.request.permissions.iter().position(|p| p.resource == *r);
        credentials.sort_by_key(|c| order(&c.resource));
        failpoint::at(Point::ReleaseReady);
        Ok(Issued { grant: id, ends_at, credentials })
    }

    /// Guarantee 3: at mint, policy and the digest are asked again. `Some`: the grant must end.
    async fn mint_check(&self, rules: &Rules, grant: &Grant) -> Result<Option<EndCause>, BrokerError> {
        let (GrantState::Active { ends_at, .. }, Some(approved)) = (&grant.state, &grant.assessed) else {
            return Err(match &grant.state {
                GrantState::Pending { .. } => {
                    BrokerError::Refused(crate::core::decide::Refusal::State { state: "pending" })
                }
                state => BrokerError::Over { why: state.word().to_owned() },
            });
        };
        if self.now() >= *ends_at {
            return Ok(Some(EndCause::Expired));
        }
        if let Some(cause) = self.unfinished.cause_of(grant.id) {
            return Ok(Some(cause));
        }
        if let Some(freeze) = super::request::frozen_by(rules, &self.store.freezes().await?.holding, &grant.request) {
            return Ok(Some(EndCause::Frozen { id: freeze.id }));
        }
        Ok(match self.assess_again(rules, grant).await? {
            PolicySaid::Denied { rule, reason, .. } => {
                Some(EndCause::TierRisen { reason: format!("{reason} (rule {rule})") })
            }
            PolicySaid::Permitted(now) => {
                let (was, is) = (&approved.approvable, &now.approvable);
                if rules.strictness(&is.tier.name) > rules.strictness(&was.tier.name)
                    || is.tier.approvals > was.tier.approvals
                {
                    let reasons: Vec<&str> = now.reasons.iter().map(|r| r.says.as_str()).collect();
                    let reason = format!(
                        "it would now be {}, it was approved as {}: {}",
                        is.tier.name,
                        was.tier.name,
                        reasons.join("; ")
                    );
                    Some(EndCause::TierRisen { reason })
                } else {
                    was.targets
                        .iter()
                        .find(|(name, digest)| is.targets.get(*name) != Some(*digest))
                        .map(|(name, _)| EndCause::ApprovedThingChanged { resource: name.clone() })
                }
            }
        })
    }

    /// What was handed over stays the only one, unless it is to be replaced; what was minted and never handed
    /// over (the broker stopped in between) is ended: its secret is gone.
    async fn leave_nothing_behind(&self, grant: &Grant, replace: bool) -> Result<(), BrokerError> {
        let mut released = false;
        let mut live = Vec::new();
        for lease in grant.leases.values() {
            match &lease.state {
                LeaseState::Intended => return Err(BrokerError::InProgress),
                LeaseState::Live { released_at, .. } => {
                    released |= released_at.is_some();
                    live.push((lease.intent.lease, released_at.is_some()));
                }
                LeaseState::Revoking { .. }
                | LeaseState::Unknown { .. }
                | LeaseState::Revoked { .. }
                | LeaseState::Absent { .. } => {}
            }
        }
        if released && !replace && !Mutation::HandOverTwice.is_on() {
            return Err(BrokerError::AlreadyReleased);
        }
        // First the record of the alarm: a broker that stops in between must not have replaced in silence.
        if released && !Mutation::HandOverTwice.is_on() {
            tracing::warn!(grant = %grant.id, "credentials that had been handed over were asked for again and replaced");
            self.note(BrokerEvent::Replaced { grant: grant.id }).await?;
        }
        for (lease, was_released) in live {
            let why = if was_released { "replaced: asked for again" } else { "never handed over" };
            self.command(grant.id, &Command::RevokeLease { lease, why: why.to_owned() }, true).await?;
        }
        Ok(())
    }

    /// Makes the intents durable. What the broker makes by itself (its own tokens) is made and recorded as live in
    /// the same write: it exists nowhere until it is handed over.
    async fn intend(
        self: &Arc<Self>,
        rules: &Rules,
        id: GrantId,
    ) -> Result<(Arc<Grant>, Vec<LeaseIntent>, BTreeMap<LeaseId, IssuedCredential>), BrokerError> {
        for _ in 0..CONFLICT_TRIES_MAX {
            let grant = self.store.head(id).await?.ok_or(BrokerError::NotFound)?;
            let now = self.now();
            let (Some(ends_at), Some(assessed)) = (grant.ends_at(), &grant.assessed) else {
                return Err(BrokerError::Over { why: grant.state.word().to_owned() });
            };
            let lifetime_secs = ends_at.ms_since(now) / 1000;
            if lifetime_secs == 0 {
                return Err(BrokerError::Over { why: "its time is up".to_owned() });
            }
            // Computed from what would be minted, not read back: guarantee 3.
            let digest = assessed.approvable.digest().map_err(|e| BrokerError::Internal(e.to_string()))?;
            let attempt = u32::try_from(grant.leases.len()).unwrap_or(u32::MAX);
            let gone = || BrokerError::Over { why: "the resource is no longer in the catalogue".to_owned() };
            let intents: Vec<LeaseIntent> = assessed
                .approvable
                .permissions
                .iter()
                .map(|permission| {
                    let (resource, _) = rules.behind(&permission.resource).ok_or_else(gone)?;
                    Ok(self.intent(&grant, permission, &resource.target, attempt, now, lifetime_secs))
                })
                .collect::<Result<_, BrokerError>>()?;
            let mut events = decide(&grant, &Command::Intend { intents: intents.clone(), digest }, now)?;
            let mut minted = BTreeMap::new();
            let mut after = Some((*grant).clone());
            for event in &events {
                Grant::apply(&mut after, id, event, now).map_err(|e| BrokerError::Internal(e.to_string()))?;
            }
            let context = mint_context(&grant, self.clock.passed());
            for intent in &intents {
                let connector = rules.connectors.get(&intent.target).ok_or_else(gone)?;
                if !connector.mints_locally() {
                    continue;
                }
                let made = connector.mint(intent, None, &context).await.map_err(|e| not_now(&e))?;
                failpoint::at(Point::MintLocal);
                let Some(grant) = &mut after else { continue };
                let live = live_command(intent.lease, &made, true);
                for event in decide(grant, &live, now)? {
                    let mut slot = Some(grant.clone());
                    Grant::apply(&mut slot, id, &event, now).map_err(|e| BrokerError::Internal(e.to_string()))?;
                    if let Some(changed) = slot {
                        *grant = changed;
                    }
                    events.push(event);
                }
                minted.insert(intent.lease, issued(intent.lease, &intent.permission.resource, made));
            }
            if Mutation::MintBeforeIntent.is_on() {
                for intent in &intents {
                    let connector = rules.connectors.get(&intent.target).ok_or_else(gone)?;
                    let _ = connector.mint(intent, None, &context).await;
                }
            }
            // Ancestors must be in force at this very moment (guarantee 7): their end changes their version.
            let expect = self.ancestors(&grant, now).await?;
            match self.append(&grant, events, expect, now, false).await {
                Ok(_) => {
                    failpoint::at(Point::MintIntended);
                    return Ok((grant, intents, minted));
                }
                Err(StoreError::Conflict) => {}
                Err(error) => {
                    let error = error.into();
                    // Of a write that waits for its answer, the intents are there already.
                    if let Ok(Some(grant)) = self.store.head(id).await {
                        for intent in intents.iter().filter(|i| grant.leases.contains_key(&i.lease)) {
                            self.not_minted_later(intent, &error);
                        }
                    }
                    return Err(error);
                }
            }
        }
        Err(BrokerError::Unavailable("too much happened at once; try again".to_owned()))
    }

    fn intent(
        &self,
        grant: &Grant,
        permission: &Permission,
        target: &ResourceName,
        attempt: u32,
        now: Timestamp,
        lifetime_secs: u64,
    ) -> LeaseIntent {
        LeaseIntent {
            lease: crate::keys::random::lease_id(self.random.as_ref()),
            grant: grant.id,
            name: self.names.lease_name(&self.prefix, grant.id, permission, attempt),
            target: target.clone(),
            permission: permission.clone(),
            intended_at: now,
            lifetime_secs,
        }
    }

    async fn ancestors(&self, grant: &Grant, now: Timestamp) -> Result<Vec<Expect>, BrokerError> {
        let mut expect = Vec::new();
        let mut above = grant.request.parent;
        while let Some(id) = above {
            let parent = self.store.head(id).await?.ok_or(BrokerError::Parent)?;
            if parent.ends_at().is_none_or(|ends_at| now >= ends_at) {
                return Err(BrokerError::Over { why: "the grant that it hangs from is over".to_owned() });
            }
            expect.push(Expect::Version(id, parent.version));
            above = parent.request.parent;
        }
        Ok(expect)
    }

    /// One mint at a target, to its end. Whatever comes back is recorded before anybody else sees it.
    async fn mint_one(
        self: Arc<Self>,
        connector: Arc<dyn Connector>,
        intent: LeaseIntent,
        context: MintContext,
    ) -> Result<(LeaseId, IssuedCredential), BrokerError> {
        let (id, lease) = (intent.grant, intent.lease);
        let handle: Option<Handle> = match connector.prepare(&intent).await {
            Ok(handle) => handle,
            Err(error) => return Err(self.mint_failed(&connector, &intent, &error).await),
        };
        if let Some(handle) = &handle {
            failpoint::at(Point::MintHandle);
            let prepared = Command::Prepared { lease, handle: handle.clone() };
            let grant = match self.command(id, &prepared, false).await {
                Ok(grant) => grant,
                Err(error) => {
                    // The secret isn't asked for, and what the handle stands for is in doubt.
                    let why = format!("its handle could not be recorded: {error}");
                    self.settle_later(&connector, &intent, why, Some(handle.clone()));
                    return Err(error);
                }
            };
            if !matches!(grant.state, GrantState::Active { .. }) {
                // Over meanwhile: the secret isn't asked for. What the handle stands for is ended like any doubt.
                let why = "the grant was over before the secret was asked for".to_owned();
                self.doubt(&connector, &intent, why, None).await;
                return Err(BrokerError::Over { why: grant.state.word().to_owned() });
            }
            failpoint::at(Point::MintPrepared);
        }
        match connector.mint(&intent, handle.as_ref(), &context).await {
            Ok(made) if Mutation::ReleaseBeforeAppend.is_on() => {
                Ok((lease, issued(lease, &intent.permission.resource, made)))
            }
            Ok(made) => {
                failpoint::at(Point::MintMade);
                let live = live_command(lease, &made, true);
                match self.command(id, &live, false).await {
                    Ok(grant) => {
                        failpoint::at(Point::MintLive);
                        let released = grant
                            .leases
                            .get(&lease)
                            .is_some_and(|l| matches!(l.state, LeaseState::Live { released_at: Some(_), .. }));
                        if released {
                            return Ok((lease, issued(lease, &intent.permission.resource, made)));
                        }
                        // Over meanwhile: the secret is dropped here, and the driver ends the lease.
                        Err(BrokerError::Over { why: grant.state.word().to_owned() })
                    }
                    Err(error @ BrokerError::Refused(_)) => {
                        // This node was taken for dead meanwhile, and the lease was proven to be gone. Now it exists.
                        drop(made.credential);
                        self.end_stray(&connector, &intent, made.handle);
                        Err(error)
                    }
                    Err(error) => {
                        // Not recorded, so not released. It exists: end it now, and record it as soon as that works.
                        drop(made.credential);
                        let why = format!("minted, but not recorded: {error}");
                        self.settle_later(&connector, &intent, why, Some(made.handle));
                        Err(error)
                    }
                }
            }
            Err(error) => Err(self.mint_failed(&connector, &intent, &error).await),
        }
    }

    /// Ends at its target what was made for a lease that is over on the record: at once, and if that fails, the sweep
    /// does it like with everything that no lease explains.
    fn end_stray(self: &Arc<Self>, connector: &Arc<dyn Connector>, intent: &LeaseIntent, handle: Handle) {
        let (broker, connector, intent) = (Arc::clone(self), Arc::clone(connector), intent.clone());
        // Nobody waits for it but `stop`.
        drop(self.spawn_mint(async move {
            let found = Found { name: intent.name.clone(), handle };
            match connector.revoke_found(&found, broker.clock.passed()).await {
                Ok(gone) => {
                    tracing::warn!(lease = %intent.lease, "a mint came back after its lease was over; it is ended");
                    let name = intent.name.clone();
                    let gone = BrokerEvent::OrphanGone { target: intent.target.clone(), name, evidence: gone.evidence };
                    if let Err(why) = broker.tell(&intent.target, &intent.name, Some(gone)).await {
                        tracing::warn!(lease = %intent.lease, why, "its end could not be recorded yet");
                    }
                }
                Err(error) => {
                    tracing::error!(lease = %intent.lease, %error, "a mint came back after its lease was over; the next sweep ends it");
                }
            }
        }));
    }

    /// Guarantee 10: while the wall clock and the broker's own are apart, nothing is minted that expires by the first.
    fn clocks_agree(&self, rules: &Rules, grant: &Grant) -> Result<(), BrokerError> {
        let counts = |p: &Permission| rules.behind(&p.resource).is_some_and(|(_, c)| c.counts_on_wall_clock());
        let Some(apart_ms) = self.clock.apart_ms() else { return Ok(()) };
        if !grant.request.permissions.iter().any(counts) {
            return Ok(());
        }
        let why = format!(
            "the machine's clock was set by {} seconds while the broker ran, and this credential would expire by it; \
             set the clock right, or restart the broker if it is right now",
            apart_ms / 1000
        );
        Err(BrokerError::NotNow { why, retry_after: 60 })
    }
}

fn live_command(lease: LeaseId, made: &Minted, release: bool) -> Command {
    Command::Live { lease, handle: made.handle.clone(), not_after: made.not_after, release }
}

fn issued(lease: LeaseId, resource: &ResourceName, made: Minted) -> IssuedCredential {
    IssuedCredential { lease, resource: resource.clone(), credential: made.credential, not_after: made.not_after }
}

pub(super) fn not_now(error: &MintError) -> BrokerError {
    let retry_after = match error {
        MintError::NotMinted { transient: false, .. } => 60,
        MintError::NotMinted { .. } | MintError::Unknown { .. } => 5,
    };
    BrokerError::NotNow { why: error.to_string(), retry_after }
}

fn mint_context(grant: &Grant, wall_now: Timestamp) -> MintContext {
    MintContext {
        agent: grant.request.agent.id.clone(),
        owner: grant.request.agent.owner.clone(),
        task: grant.request.task.clone(),
        approvers: grant.approvers(),
        chain: grant.request.chain.clone(),
        confirmation: grant.request.confirmation.clone(),
        wall_now,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_flight_that_panics_is_taken_off_the_list() {
        let flights = Arc::new(Flights::default());
        let id = GrantId::from_bytes([7; 16]);
        let outcome = futures::future::ready(Err(BrokerError::InProgress)).boxed().shared();
        flights.0.lock().insert(id, Flight { key: None, outcome });
        let flying = Arc::clone(&flights);
        let task = tokio::spawn(async move {
            let _landing = Landing(&flying, id);
            panic!("on purpose");
        });
        assert!(task.await.is_err_and(|e| e.is_panic()));
        assert!(flights.0.lock().is_empty());
    }
}
