//! What the events alone tell of one grant, and what they must never tell. It reads events, never the production state, and
//! shares no code with `core`.

use countersign::core::event::GrantEvent;
use countersign::core::lease::Absence;
use countersign::core::vote::Verdict;

use super::cast::{Cast, GRANTS, PARTS, SLOTS, person_of, slot_of, tick_of};

/// What must always hold; the number is DESIGN's guarantee.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rule {
    IntentFirst,
    ReleasedInForce,
    Approved,
    EndsAll,
    GoneIsGone,
    Quorum,
    ChildIsLess,
    Agrees,
    Deadline,
    OneEnd,
    Overlap,
}

/// Where a grant is, by its events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    Asked,
    Pending,
    InForce,
    Ending,
    Final,
}

/// Where a lease is, by its events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Told {
    Nothing,
    Intended,
    Live { released: bool },
    InDoubt { look_from: u8 },
    BeingEnded,
    Gone,
}

/// What is at the target under a lease's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum There {
    Nothing,
    /// The call is under way, and may have its effect at any moment, or never.
    UnderWay,
    Yes,
}

/// The story of one grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Story {
    pub phase: Phase,
    /// Which assessment stands.
    pub standing: usize,
    /// Who approved exactly what stands.
    pub approved_by: [bool; 3],
    pub ends_at: u8,
    pub leases: [Told; SLOTS],
}

/// What an event is judged by.
pub struct Seen<'a> {
    pub cast: &'a Cast,
    pub tick: u8,
    pub there: &'a [There; SLOTS],
    /// The other stories, by grant.
    pub all: &'a [Option<Story>; GRANTS],
    pub parent: Option<usize>,
}

macro_rules! must {
    ($holds:expr, $rule:expr) => {
        if !$holds {
            return Err($rule);
        }
    };
}
pub(crate) use must;

impl Story {
    pub const fn new() -> Self {
        let (approved_by, leases) = ([false; 3], [Told::Nothing; SLOTS]);
        Self { phase: Phase::Asked, standing: 0, approved_by, ends_at: 0, leases }
    }

    /// How many rows the grant's credentials may read.
    pub fn rows(&self, grant: usize) -> u64 {
        PARTS[grant].rows[self.standing]
    }

    /// How many persons approved what stands, of those who may.
    pub fn approvals(&self, grant: usize) -> usize {
        let part = &PARTS[grant];
        let may = |person: usize| person != part.owner && Some(person) != part.chain_owner;
        (0..3).filter(|person| self.approved_by[*person] && may(*person)).count()
    }

    /// Judges one event and goes on with it.
    pub fn observe(&mut self, grant: usize, event: &GrantEvent, seen: &Seen<'_>) -> Result<(), Rule> {
        must!(self.phase != Phase::Final, Rule::OneEnd);
        match event {
            GrantEvent::Requested { .. } => must!(self.phase == Phase::Asked, Rule::OneEnd),
            GrantEvent::Assessed { assessed } => {
                must!(matches!(self.phase, Phase::Asked | Phase::Pending), Rule::Approved);
                self.standing = seen.cast.which(grant, assessed.digest).ok_or(Rule::Approved)?;
                (self.approved_by, self.phase) = ([false; 3], Phase::Pending);
            }
            GrantEvent::Voted { vote } => {
                must!(self.phase == Phase::Pending, Rule::OneEnd);
                must!(seen.cast.which(grant, vote.digest) == Some(self.standing), Rule::Quorum);
                let person = person_of(&vote.person).ok_or(Rule::Quorum)?;
                must!(!self.approved_by[person], Rule::Quorum);
                self.approved_by[person] = vote.verdict == Verdict::Approve;
            }
            GrantEvent::Activated { ends_at } => {
                must!(self.phase == Phase::Pending, Rule::OneEnd);
                must!(self.approvals(grant) >= usize::from(PARTS[grant].approvals), Rule::Quorum);
                self.ends_at = tick_of(*ends_at);
                let latest = PARTS[grant].latest_end.min(seen.tick + PARTS[grant].life_ticks);
                must!(self.ends_at <= latest && self.ends_at > seen.tick, Rule::Deadline);
                self.phase = Phase::InForce;
            }
            GrantEvent::Denied { .. } | GrantEvent::Lapsed | GrantEvent::Cancelled | GrantEvent::Withdrawn { .. } => {
                must!(self.phase == Phase::Pending, Rule::OneEnd);
                self.phase = Phase::Final;
            }
            GrantEvent::Ending { .. } => {
                must!(self.phase == Phase::InForce, Rule::OneEnd);
                self.phase = Phase::Ending;
                for told in &mut self.leases {
                    if matches!(told, Told::Live { .. }) {
                        *told = Told::BeingEnded;
                    }
                }
            }
            GrantEvent::Ended => {
                must!(self.phase == Phase::Ending, Rule::OneEnd);
                must!(self.leases.iter().all(|t| matches!(t, Told::Nothing | Told::Gone)), Rule::EndsAll);
                self.phase = Phase::Final;
            }
            lease_event => self.lease(grant, lease_event, seen)?,
        }
        // What nothing depends on any more tells no two worlds apart.
        match self.phase {
            Phase::Ending => self.ends_at = 0,
            Phase::Final => (self.ends_at, self.standing, self.approved_by) = (0, 0, [false; 3]),
            _ => {}
        }
        Ok(())
    }

    fn lease(&mut self, grant: usize, event: &GrantEvent, seen: &Seen<'_>) -> Result<(), Rule> {
        let lease = match event {
            GrantEvent::LeaseIntended { intent } => intent.lease,
            GrantEvent::LeasePrepared { lease, .. }
            | GrantEvent::LeaseLive { lease, .. }
            | GrantEvent::LeaseUnknown { lease, .. }
            | GrantEvent::LeaseRevoking { lease, .. }
            | GrantEvent::LeaseRetry { lease, .. }
            | GrantEvent::LeaseRevoked { lease, .. }
            | GrantEvent::LeaseAbsent { lease, .. } => *lease,
            _ => return Err(Rule::Agrees),
        };
        let slot = slot_of(grant, lease).ok_or(Rule::Overlap)?;
        let (told, there) = (self.leases[slot], seen.there[slot]);
        must!(matches!(self.phase, Phase::InForce | Phase::Ending), Rule::Agrees);
        self.leases[slot] = match event {
            GrantEvent::LeaseIntended { intent } => {
                must!(self.phase == Phase::InForce && seen.tick < self.ends_at, Rule::Approved);
                must!(self.approvals(grant) >= usize::from(PARTS[grant].approvals), Rule::Approved);
                let approved = &seen.cast.assessed[grant][self.standing].approvable.permissions;
                must!(approved.contains(&intent.permission), Rule::Approved);
                let dies_at = tick_of(intent.intended_at.plus_secs(intent.lifetime_secs));
                must!(dies_at <= self.ends_at, Rule::Deadline);
                if let Some(parent) = seen.parent {
                    must!(seen.all[parent].is_some_and(|p| p.phase == Phase::InForce), Rule::ChildIsLess);
                }
                let another = |t: &Told| matches!(t, Told::Intended | Told::Live { .. });
                must!(told == Told::Nothing && !self.leases.iter().any(another), Rule::Approved);
                Told::Intended
            }
            GrantEvent::LeasePrepared { .. } => {
                must!(told == Told::Intended, Rule::IntentFirst);
                told
            }
            GrantEvent::LeaseLive { released, .. } => {
                must!(there == There::Yes, Rule::Agrees);
                let in_force = self.phase == Phase::InForce;
                match told {
                    Told::Intended => {
                        must!(in_force || !released, Rule::ReleasedInForce);
                        if in_force { Told::Live { released: *released } } else { Told::BeingEnded }
                    }
                    Told::InDoubt { .. } => {
                        must!(!released, Rule::ReleasedInForce);
                        Told::BeingEnded
                    }
                    _ => return Err(Rule::Agrees),
                }
            }
            GrantEvent::LeaseUnknown { not_before, .. } => {
                must!(told == Told::Intended, Rule::Agrees);
                Told::InDoubt { look_from: tick_of(*not_before) }
            }
            GrantEvent::LeaseRevoking { .. } => {
                must!(matches!(told, Told::Live { .. }), Rule::Agrees);
                Told::BeingEnded
            }
            GrantEvent::LeaseRetry { .. } => {
                must!(matches!(told, Told::BeingEnded | Told::InDoubt { .. }), Rule::Agrees);
                told
            }
            GrantEvent::LeaseRevoked { .. } => {
                must!(there == There::Nothing, Rule::GoneIsGone);
                must!(told == Told::BeingEnded, Rule::Agrees);
                Told::Gone
            }
            GrantEvent::LeaseAbsent { absence, .. } => {
                must!(there == There::Nothing, Rule::GoneIsGone);
                match (told, absence) {
                    (Told::Intended, Absence::NotMinted { .. }) | (Told::InDoubt { .. }, Absence::Proven { .. }) => {}
                    _ => return Err(Rule::Agrees),
                }
                Told::Gone
            }
            _ => return Err(Rule::Agrees),
        };
        Ok(())
    }
}
