//! Endings at the targets: who waits for whom. Pure; how a turn is spent is in `turns.rs`.
//!
//! Endings of one resource wait for one another and for no other's. Within a resource, what is tried for the first
//! time never waits for what resisted before, and what is in doubt waits apart: a credential that can be cut at once
//! is cut at once, whatever else hangs (guarantee 4). What a freeze ends goes before all that waits, and among equals
//! each owner's agents have their turn, however many of one owner's wait.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::connector::Connector;
use crate::core::event::Urgency;
use crate::core::grant::Grant;
use crate::core::id::{AgentId, PersonId, ResourceName};
use crate::core::lease::{Lease, LeaseState};

use super::turns::Work;

/// A group that is tried for the first time keeps its turn until access is cut, and no longer than this: if it hangs, the
/// next one comes.
const TURN: Duration = Duration::from_secs(2);
/// Turns at one target, of all its resources, of what gives its turn back after [`TURN`].
const FRESH_TURNS_MAX: usize = 16;
/// The same, of what resisted before.
const STUBBORN_TURNS_MAX: usize = 48;
/// Turns beyond those, for what a freeze ends.
const FROZEN_TURNS: usize = 2;

/// Endings that wait for one another.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LaneName {
    pub(super) target: ResourceName,
    pub(super) resource: ResourceName,
    pub(super) kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Kind {
    /// Tried for the first time: what is due together goes together.
    First,
    /// Resisted before: each for itself.
    Again,
    /// In doubt, and looked for the first time.
    Doubtful,
    /// In doubt, and not settled when it was looked for before.
    DoubtfulAgain,
}

impl Kind {
    /// `unrecorded`: attempts that failed, and that the journal didn't take.
    pub(super) fn of(lease: &Lease, occasion: Occasion, unrecorded: u32) -> Self {
        match &lease.state {
            LeaseState::Unknown { progress, .. } if progress.attempts == 0 && unrecorded == 0 => Self::Doubtful,
            LeaseState::Unknown { .. } => Self::DoubtfulAgain,
            // It was the target that was away: nothing is known of a lease that resists.
            _ if occasion == Occasion::TargetIsBack => Self::First,
            LeaseState::Revoking { progress, .. } if progress.attempts > 0 || unrecorded > 0 => Self::Again,
            _ => Self::First,
        }
    }
    pub(super) const fn is_doubtful(self) -> bool {
        matches!(self, Self::Doubtful | Self::DoubtfulAgain)
    }
    /// Turns at once in one lane.
    const fn turns(self) -> usize {
        match self {
            Self::First | Self::Doubtful | Self::DoubtfulAgain => 4,
            Self::Again => 16,
        }
    }
    /// How many share a turn.
    fn together(self, connector: &dyn Connector) -> usize {
        if matches!(self, Self::First) { connector.endings_together().max(1) } else { 1 }
    }
    /// How long a turn is kept while it goes on.
    pub(super) const fn turn(self) -> Option<Duration> {
        match self {
            Self::First | Self::Doubtful => Some(TURN),
            Self::Again | Self::DoubtfulAgain => None,
        }
    }
}

/// Why leases are ended now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Occasion {
    /// The store handed them out as due.
    Due,
    /// Their target was away, and serves again.
    TargetIsBack,
}

/// Whose turn it is among equals.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Whose {
    Owner(PersonId),
    Agent(AgentId),
}

impl Whose {
    fn of(grant: &Grant) -> Self {
        let agent = &grant.request.agent;
        agent.owner.clone().map_or_else(|| Self::Agent(agent.id.clone()), Self::Owner)
    }
}

/// All that waits, at every target.
#[derive(Default)]
pub(super) struct Lanes {
    targets: BTreeMap<ResourceName, Target>,
    /// Tells equals apart: first come, first served.
    count: u64,
}

struct Target {
    connector: Arc<dyn Connector>,
    lanes: BTreeMap<(ResourceName, Kind), Lane>,
    /// Turns that are taken: of what is fresh, of what is stubborn.
    fresh: usize,
    stubborn: usize,
    /// The lane that had the last turn: the ones behind it come first.
    last: Option<(ResourceName, Kind)>,
}

#[derive(Default)]
struct Lane {
    /// By urgency, then in fair order, then as they came.
    waiting: BTreeMap<(Urgency, u64, u64), Work>,
    turns: usize,
    /// Where in the fair order the last of each owner's stands, and how far the order has come.
    order: BTreeMap<Whose, u64>,
    reached: u64,
}

/// A turn, and who has it.
pub(super) struct Turn {
    pub(super) lane: LaneName,
    pub(super) connector: Arc<dyn Connector>,
    pub(super) works: Vec<Work>,
}

impl Lanes {
    /// Puts one in line.
    pub(super) fn add(&mut self, lane: &LaneName, connector: &Arc<dyn Connector>, work: Work) {
        self.count += 1;
        let fresh =
            || Target { connector: Arc::clone(connector), lanes: BTreeMap::new(), fresh: 0, stubborn: 0, last: None };
        let target = self.targets.entry(lane.target.clone()).or_insert_with(fresh);
        target.connector = Arc::clone(connector);
        target.lanes.entry((lane.resource.clone(), lane.kind)).or_default().add(self.count, work);
    }

    /// The next turn at a target, if there is one to be had and somebody who waits for it.
    pub(super) fn next(&mut self, target: &ResourceName) -> Option<Turn> {
        let at = self.targets.get_mut(target)?;
        let (resource, kind) = at.whose_turn()?;
        let connector = Arc::clone(&at.connector);
        *at.taken(kind) += 1;
        at.last = Some((resource.clone(), kind));
        let lane = at.lanes.get_mut(&(resource.clone(), kind))?;
        lane.turns += 1;
        let works = lane.take(kind.together(connector.as_ref()));
        Some(Turn { lane: LaneName { target: target.clone(), resource, kind }, connector, works })
    }

    /// A turn is over.
    pub(super) fn give_back(&mut self, lane: &LaneName) {
        let Some(at) = self.targets.get_mut(&lane.target) else { return };
        let taken = at.taken(lane.kind);
        *taken = taken.saturating_sub(1);
        let key = (lane.resource.clone(), lane.kind);
        if let Some(found) = at.lanes.get_mut(&key) {
            found.turns = found.turns.saturating_sub(1);
            if found.turns == 0 && found.waiting.is_empty() {
                at.lanes.remove(&key);
            }
        }
        if at.lanes.is_empty() {
            self.targets.remove(&lane.target);
        }
    }
}

impl Target {
    const fn taken(&mut self, kind: Kind) -> &mut usize {
        match kind {
            Kind::First | Kind::Doubtful => &mut self.fresh,
            Kind::Again | Kind::DoubtfulAgain => &mut self.stubborn,
        }
    }

    /// The lane with the most urgent that may have a turn now; among equals, the one behind the last.
    fn whose_turn(&self) -> Option<(ResourceName, Kind)> {
        let may = |(key, lane): (&(ResourceName, Kind), &Lane)| {
            let urgency = lane.waiting.first_key_value()?.0.0;
            let more = if urgency == Urgency::Frozen { FROZEN_TURNS } else { 0 };
            let (taken, max) = match key.1 {
                Kind::First | Kind::Doubtful => (self.fresh, FRESH_TURNS_MAX),
                Kind::Again | Kind::DoubtfulAgain => (self.stubborn, STUBBORN_TURNS_MAX),
            };
            let free = taken < max + more && lane.turns < key.1.turns() + more;
            let is_behind = self.last.as_ref().is_none_or(|last| key > last);
            free.then(|| ((urgency, !is_behind), key.clone()))
        };
        self.lanes.iter().filter_map(may).min().map(|(_, key)| key)
    }
}

impl Lane {
    fn add(&mut self, count: u64, work: Work) {
        let last = self.order.entry(Whose::of(&work.grant)).or_default();
        *last = (*last).max(self.reached) + 1;
        self.waiting.insert((work.urgency, *last, count), work);
    }

    /// The next ones, as urgent as each other: what is less urgent holds nobody up at the target either.
    fn take(&mut self, max: usize) -> Vec<Work> {
        let mut out: Vec<Work> = Vec::new();
        while out.len() < max
            && let Some(next) = self.waiting.first_entry()
            && out.first().is_none_or(|first| first.urgency == next.key().0)
        {
            let ((_, place, _), work) = next.remove_entry();
            self.reached = self.reached.max(place);
            out.push(work);
        }
        if self.waiting.is_empty() {
            self.order.clear();
        }
        out
    }
}
