//! A grant and how events change it. `apply` is total over the events that `decide` makes and refuses
//! every other: a journal that tells an impossible story is not read further.
//!
//! What may happen is decided in `decide.rs`; nothing here judges.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::event::{DeniedBy, EndCause, GrantEvent, Invocation, Urgency};
use super::id::{GrantId, LeaseId, PersonId, Timestamp};
use super::lease::{Absence, Lease, LeaseState, Progress};
use super::request::{Assessed, Request};
use super::revocability::Observation;
use super::strict::no_fields;
use super::vote::{Verdict, Vote};

/// One request and all that became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// Its name.
    pub id: GrantId,
    /// How many events made it what it is: the compare-and-set value.
    pub version: u64,
    /// What was asked.
    pub request: Request,
    /// When.
    pub requested_at: Timestamp,
    /// What policy made of it, unless it said no.
    pub assessed: Option<Assessed>,
    /// Where it is in its life.
    pub state: GrantState,
    /// Votes on the digest that now stands.
    pub votes: Vec<Vote>,
    /// Credentials under it.
    pub leases: BTreeMap<LeaseId, Lease>,
    /// What targets told, by lease.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub seen: BTreeMap<LeaseId, Vec<Observation>>,
    /// What the agent reported, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub invocations: Vec<Invocation>,
}

/// Where a grant is in its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case", deny_unknown_fields)]
pub enum GrantState {
    /// Recorded, not yet assessed: only between two events of one batch.
    #[serde(deserialize_with = "no_fields")]
    Requested,
    /// Waiting for votes until `decide_by`.
    Pending {
        /// Lapses then.
        decide_by: Timestamp,
    },
    /// In force until `ends_at`.
    Active {
        /// Since.
        since: Timestamp,
        /// Never moves later.
        ends_at: Timestamp,
    },
    /// Over for the agent; leases are being ended.
    Ending {
        /// It was in force since.
        active_since: Timestamp,
        /// Since.
        since: Timestamp,
        /// Why.
        cause: EndCause,
    },
    /// Every lease is proven gone, or a person attests that its target is.
    Ended {
        /// It was in force since.
        active_since: Timestamp,
        /// It was over for the agent since.
        over_since: Timestamp,
        /// When the last proof or attestation came.
        at: Timestamp,
        /// Why it ended.
        cause: EndCause,
    },
    /// No.
    Denied {
        /// When.
        at: Timestamp,
        /// Who said so.
        by: DeniedBy,
        /// Why, for the agent.
        reason: String,
    },
    /// Nobody decided in time.
    Lapsed {
        /// When.
        at: Timestamp,
    },
    /// The agent took it back.
    Cancelled {
        /// When.
        at: Timestamp,
    },
    /// Something else ended it before it was in force.
    Withdrawn {
        /// When.
        at: Timestamp,
        /// What.
        cause: EndCause,
    },
}

impl GrantState {
    /// True if nothing can happen any more (guarantee 11).
    pub const fn is_final(&self) -> bool {
        matches!(
            self,
            Self::Ended { .. }
                | Self::Denied { .. }
                | Self::Lapsed { .. }
                | Self::Cancelled { .. }
                | Self::Withdrawn { .. }
        )
    }
    /// One word for wire formats and pages.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Requested => "requested",
            Self::Pending { .. } => "pending",
            Self::Active { .. } => "active",
            Self::Ending { .. } => "ending",
            Self::Ended { .. } => "ended",
            Self::Denied { .. } => "denied",
            Self::Lapsed { .. } => "lapsed",
            Self::Cancelled { .. } => "cancelled",
            Self::Withdrawn { .. } => "withdrawn",
        }
    }
}

/// An event that can't follow what is there. Only a journal that wasn't written by `decide` holds one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{event} can't happen to a grant that is {state}")]
pub struct Impossible {
    /// The event.
    pub event: &'static str,
    /// The state it met.
    pub state: &'static str,
}

impl Grant {
    /// The persons who approved the digest that now stands, each once.
    pub fn approvers(&self) -> Vec<PersonId> {
        let mut people: Vec<_> =
            self.votes.iter().filter(|v| v.verdict == Verdict::Approve).map(|v| v.person.clone()).collect();
        people.sort();
        people.dedup();
        people
    }

    /// Leases that are neither proven gone nor attested absent.
    pub fn open_leases(&self) -> impl Iterator<Item = &Lease> {
        self.leases.values().filter(|l| !l.is_gone())
    }

    /// How urgent it is to end those of its leases that are to be ended.
    pub const fn urgency(&self) -> Urgency {
        match &self.state {
            GrantState::Ending { cause, .. } => cause.urgency(),
            _ => Urgency::Over,
        }
    }

    /// When it ends, while it is in force.
    pub const fn ends_at(&self) -> Option<Timestamp> {
        match self.state {
            GrantState::Active { ends_at, .. } => Some(ends_at),
            _ => None,
        }
    }

    /// Applies the event at `at` to a grant (or to none yet, for [`GrantEvent::Requested`]).
    pub fn apply(slot: &mut Option<Self>, id: GrantId, event: &GrantEvent, at: Timestamp) -> Result<(), Impossible> {
        match (slot.as_mut(), event) {
            (None, GrantEvent::Requested { request }) => {
                *slot = Some(Self {
                    id,
                    version: 1,
                    request: request.clone(),
                    requested_at: at,
                    assessed: None,
                    state: GrantState::Requested,
                    votes: Vec::new(),
                    leases: BTreeMap::new(),
                    seen: BTreeMap::new(),
                    invocations: Vec::new(),
                });
                Ok(())
            }
            (None, event) => Err(Impossible { event: event.word(), state: "not there" }),
            (Some(grant), event) => grant.advance(id, event, at),
        }
    }

    /// Applies an event to a grant that is there. After an error the grant is of no use any more.
    pub fn advance(&mut self, id: GrantId, event: &GrantEvent, at: Timestamp) -> Result<(), Impossible> {
        // Guarantee 13: what happens to one grant changes no other.
        if self.id != id || !event.is_about(id) {
            return Err(Impossible { event: event.word(), state: "another grant" });
        }
        self.change(event, at)?;
        self.version += 1;
        Ok(())
    }

    fn change(&mut self, event: &GrantEvent, at: Timestamp) -> Result<(), Impossible> {
        let impossible = Impossible { event: event.word(), state: self.state.word() };
        let next = match (&self.state, event) {
            (GrantState::Requested | GrantState::Pending { .. }, GrantEvent::Assessed { assessed }) => {
                self.votes.clear(); // guarantee 3: what was voted on is no longer there
                self.assessed = Some(assessed.clone());
                Some(GrantState::Pending { decide_by: assessed.decide_by })
            }
            (GrantState::Requested | GrantState::Pending { .. }, GrantEvent::Denied { by, reason }) => {
                Some(GrantState::Denied { at, by: by.clone(), reason: reason.clone() })
            }
            (GrantState::Pending { .. }, GrantEvent::Voted { vote }) => {
                self.votes.push(vote.clone());
                None
            }
            (GrantState::Pending { .. }, GrantEvent::Activated { ends_at }) => {
                Some(GrantState::Active { since: at, ends_at: *ends_at })
            }
            (GrantState::Pending { .. }, GrantEvent::Lapsed) => Some(GrantState::Lapsed { at }),
            (GrantState::Pending { .. }, GrantEvent::Cancelled) => Some(GrantState::Cancelled { at }),
            (GrantState::Pending { .. }, GrantEvent::Withdrawn { cause }) => {
                Some(GrantState::Withdrawn { at, cause: cause.clone() })
            }
            (GrantState::Active { since, .. }, GrantEvent::Ending { cause }) => {
                let state = GrantState::Ending { active_since: *since, since: at, cause: cause.clone() };
                for lease in self.leases.values_mut() {
                    if matches!(lease.state, LeaseState::Live { .. }) {
                        lease.state = LeaseState::Revoking { since: at, progress: Progress::default() };
                    }
                }
                Some(state)
            }
            (GrantState::Ending { active_since, since, cause }, GrantEvent::Ended) => {
                if self.open_leases().next().is_some() {
                    return Err(impossible);
                }
                Some(GrantState::Ended { active_since: *active_since, over_since: *since, at, cause: cause.clone() })
            }
            (GrantState::Active { .. }, GrantEvent::LeaseIntended { intent }) => {
                if self.leases.contains_key(&intent.lease) {
                    return Err(impossible);
                }
                let lease =
                    Lease { intent: intent.clone(), handle: None, not_after: None, state: LeaseState::Intended };
                self.leases.insert(intent.lease, lease);
                None
            }
            (GrantState::Active { .. } | GrantState::Ending { .. }, event) => {
                self.change_lease(event, at).ok_or(impossible)?;
                None
            }
            _ => return Err(impossible),
        };
        if let Some(next) = next {
            self.state = next;
        }
        Ok(())
    }

    /// What happens to leases, and to what hangs from them, while the grant is in force or ending.
    fn change_lease(&mut self, event: &GrantEvent, at: Timestamp) -> Option<()> {
        let in_force = matches!(self.state, GrantState::Active { .. });
        match event {
            GrantEvent::LeasePrepared { lease, handle } => {
                let lease = self.leases.get_mut(lease).filter(|l| matches!(l.state, LeaseState::Intended))?;
                lease.handle = Some(handle.clone());
            }
            GrantEvent::LeaseLive { lease, handle, not_after, released } => {
                // A late answer finds the lease `Unknown`: it is known now, and to be ended.
                let lease = self
                    .leases
                    .get_mut(lease)
                    .filter(|l| matches!(l.state, LeaseState::Intended | LeaseState::Unknown { .. }))?;
                lease.handle = Some(handle.clone());
                lease.not_after = *not_after;
                lease.state = if in_force && matches!(lease.state, LeaseState::Intended) {
                    LeaseState::Live { since: at, released_at: released.then_some(at) }
                } else {
                    LeaseState::Revoking { since: at, progress: Progress::default() }
                };
            }
            GrantEvent::LeaseUnknown { lease, why, handle, not_before } => {
                let lease = self.leases.get_mut(lease).filter(|l| match &l.state {
                    LeaseState::Intended => true,
                    state => state.may_be_doubted_anew(at, *not_before),
                })?;
                if handle.is_some() {
                    lease.handle.clone_from(handle);
                }
                let progress = Progress { attempts: 0, last_error: None, next_try: Some(*not_before) };
                lease.state = LeaseState::Unknown { since: at, why: why.clone(), not_before: *not_before, progress };
            }
            GrantEvent::LeaseRevoking { lease, .. } => {
                let lease = self.leases.get_mut(lease).filter(|l| matches!(l.state, LeaseState::Live { .. }))?;
                lease.state = LeaseState::Revoking { since: at, progress: Progress::default() };
            }
            GrantEvent::LeaseRetry { lease, why, next_try } => match &mut self.leases.get_mut(lease)?.state {
                LeaseState::Revoking { progress, .. } | LeaseState::Unknown { progress, .. } => {
                    progress.attempts = progress.attempts.saturating_add(1);
                    progress.last_error = Some(why.clone());
                    progress.next_try = Some(*next_try);
                }
                _ => return None,
            },
            GrantEvent::LeaseRevoked { lease, evidence, seen, .. } => {
                let lease = self.leases.get_mut(lease).filter(|l| matches!(l.state, LeaseState::Revoking { .. }))?;
                lease.state = LeaseState::Revoked { at, evidence: evidence.clone() };
                let id = lease.intent.lease;
                self.note(id, seen);
            }
            GrantEvent::LeaseAbsent { lease, absence, seen } => {
                // A person's word has an event of its own, and stands only where an ending has failed.
                let is_attested = matches!(absence, Absence::Attested { .. });
                let lease = self
                    .leases
                    .get_mut(lease)
                    .filter(|l| !is_attested && matches!(l.state, LeaseState::Intended | LeaseState::Unknown { .. }))?;
                lease.state = LeaseState::Absent { at, absence: absence.clone() };
                let id = lease.intent.lease;
                self.note(id, seen);
            }
            GrantEvent::LeaseAttestedAbsent { lease, by, reason } => {
                let lease = self.leases.get_mut(lease).filter(|l| l.resists())?;
                let absence = Absence::Attested { by: by.clone(), reason: reason.clone() };
                lease.state = LeaseState::Absent { at, absence };
            }
            GrantEvent::Invoked { invocation } => self.invocations.push(invocation.clone()),
            _ => return None,
        }
        Some(())
    }

    fn note(&mut self, lease: LeaseId, seen: &[Observation]) {
        if !seen.is_empty() {
            self.seen.entry(lease).or_default().extend_from_slice(seen);
        }
    }
}

impl GrantEvent {
    /// True unless the event itself names another grant.
    fn is_about(&self, id: GrantId) -> bool {
        match self {
            Self::Assessed { assessed } => assessed.approvable.grant == id,
            Self::LeaseIntended { intent } => intent.grant == id,
            _ => true,
        }
    }
    /// One word for logs and refusals.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Requested { .. } => "requested",
            Self::Assessed { .. } => "assessed",
            Self::Denied { .. } => "denied",
            Self::Voted { .. } => "voted",
            Self::Activated { .. } => "activated",
            Self::Lapsed => "lapsed",
            Self::Cancelled => "cancelled",
            Self::Withdrawn { .. } => "withdrawn",
            Self::Ending { .. } => "ending",
            Self::Ended => "ended",
            Self::LeaseIntended { .. } => "lease_intended",
            Self::LeasePrepared { .. } => "lease_prepared",
            Self::LeaseLive { .. } => "lease_live",
            Self::LeaseUnknown { .. } => "lease_unknown",
            Self::LeaseRevoking { .. } => "lease_revoking",
            Self::LeaseRetry { .. } => "lease_retry",
            Self::LeaseRevoked { .. } => "lease_revoked",
            Self::LeaseAbsent { .. } => "lease_absent",
            Self::LeaseAttestedAbsent { .. } => "lease_attested_absent",
            Self::Invoked { .. } => "invoked",
        }
    }
}
