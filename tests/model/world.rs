//! The model: one broker, its targets and the clock as one small state, every step that can be taken from it, and what must
//! hold. What a step does to a grant, the production `decide` and `apply` say.

use std::sync::atomic::{AtomicUsize, Ordering};

use countersign::core::decide::is_overdue;
use countersign::core::event::GrantEvent;
use countersign::core::grant::GrantState;
use stateright::{Model, Property};

use super::cast::{CHILD, GRANTS, OVERLAP, PARENT, PERSONS, SLOTS, Why, Wish, child_of, moment, parent_of, tick_of};
use super::examples::examples;
use super::kept::{Answer, Keeper, Kept};
use super::story::{Phase, Rule, Seen, Story, There, Told, must};

/// How much of everything there is.
pub struct Scope {
    /// These agents ask.
    pub asks: [bool; GRANTS],
    /// Leases of each grant, one after the other.
    pub slots: [usize; GRANTS],
    /// The last tick.
    pub last_tick: u8,
    /// Policy changes its mind about these while they wait.
    pub reassess: [bool; GRANTS],
    pub freeze: bool,
    pub crash: bool,
}

/// One grant in the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Seat {
    pub kept: Kept,
    pub story: Story,
    pub there: [There; SLOTS],
}

/// Everything at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    pub tick: u8,
    pub seats: [Option<Seat>; GRANTS],
    pub frozen: bool,
    pub crashed: bool,
    /// The first rule that was broken on the way here.
    pub broken: Option<Rule>,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// An agent asks.
    Ask(usize),
    /// Somebody wants something of one grant.
    Wish(usize, Wish),
    /// A mint's call has its effect at the target.
    Arrive(usize, usize),
    /// The target refuses a mint before any effect.
    Refuse(usize, usize),
    /// What is being ended is ended at the target. The answer is another step.
    Cut(usize, usize),
    Pass,
    Freeze,
    /// The broker stops and starts again: what was on its way is in doubt, what was never handed over is ended.
    Crash,
}

pub struct Countersign {
    pub scope: Scope,
    pub keeper: Keeper,
    /// States that were looked at.
    pub checked: AtomicUsize,
}

impl Countersign {
    pub fn new(scope: Scope) -> Self {
        Self { scope, keeper: Keeper::new(), checked: AtomicUsize::new(0) }
    }

    /// Puts a wish to a grant as the broker does: a deadline's events stand alone, then it is asked again. `true` if the
    /// wish itself was not refused.
    fn wish(&self, world: &mut World, grant: usize, wish: Wish) -> Result<bool, Rule> {
        let Some(seat) = world.seats[grant] else { return Ok(false) };
        let overdue = is_overdue(&self.keeper.grant(seat.kept), moment(world.tick));
        let mut taken = false;
        for _ in 0..=usize::from(overdue) {
            let seat = world.seats[grant].ok_or(Rule::Agrees)?;
            match self.keeper.wish(seat.kept, grant, wish, world.tick) {
                Answer::Nothing { refused } => taken = !refused,
                Answer::Events(events, after) => {
                    self.commit(world, grant, &events, after)?;
                    taken = true;
                }
                Answer::Impossible => return Err(Rule::Agrees),
            }
        }
        let story = world.seats[grant].ok_or(Rule::Agrees)?.story;
        must!(story.phase != Phase::InForce || world.tick < story.ends_at, Rule::Deadline);
        Ok(taken)
    }

    /// One batch: these events, and before them the end of what hangs from the grant, if they end it.
    fn commit(&self, world: &mut World, grant: usize, events: &[GrantEvent], after: Kept) -> Result<(), Rule> {
        let ends = events.iter().any(|e| matches!(e, GrantEvent::Ending { .. }));
        if ends && let Some((child, seat)) = child_of(grant).and_then(|c| Some((c, world.seats[c]?))) {
            match self.keeper.wish(seat.kept, child, Wish::Finish(Why::ParentEnded), world.tick) {
                Answer::Nothing { refused } => must!(!refused, Rule::EndsAll),
                Answer::Events(events, after) => self.tell(world, child, &events, after)?,
                Answer::Impossible => return Err(Rule::Agrees),
            }
        }
        self.tell(world, grant, events, after)?;
        self.holds(world)
    }

    fn tell(&self, world: &mut World, grant: usize, events: &[GrantEvent], after: Kept) -> Result<(), Rule> {
        let mut seat =
            world.seats[grant].unwrap_or(Seat { kept: after, story: Story::new(), there: [There::Nothing; SLOTS] });
        let all = world.seats.map(|s| s.map(|s| s.story));
        let (there, parent) = (&seat.there, parent_of(grant));
        let seen = Seen { cast: &self.keeper.cast, tick: world.tick, there, all: &all, parent };
        for event in events {
            seat.story.observe(grant, event, &seen)?;
        }
        seat.kept = after;
        world.seats[grant] = Some(seat);
        self.agrees(&seat)
    }

    /// The production state says what the events say.
    fn agrees(&self, seat: &Seat) -> Result<(), Rule> {
        let (story, grant) = (&seat.story, self.keeper.grant(seat.kept));
        let says = match &grant.state {
            GrantState::Requested => Phase::Asked,
            GrantState::Pending { .. } => Phase::Pending,
            GrantState::Active { ends_at, .. } => {
                must!(tick_of(*ends_at) == story.ends_at, Rule::Deadline);
                Phase::InForce
            }
            GrantState::Ending { .. } => Phase::Ending,
            state => {
                must!(state.is_final(), Rule::Agrees);
                Phase::Final
            }
        };
        must!(says == story.phase, Rule::Agrees);
        must!(grant.leases.len() == story.leases.iter().filter(|t| **t != Told::Nothing).count(), Rule::Agrees);
        let open = story.leases.iter().filter(|t| !matches!(t, Told::Nothing | Told::Gone)).count();
        must!(grant.open_leases().count() == open, Rule::Agrees);
        Ok(())
    }

    /// What must hold between any two batches.
    fn holds(&self, world: &World) -> Result<(), Rule> {
        for (grant, seat) in world.seats.iter().enumerate() {
            let Some(seat) = seat else { continue };
            let story = &seat.story;
            if let Some(parent) = parent_of(grant)
                && story.phase == Phase::InForce
            {
                let above = world.seats[parent].ok_or(Rule::ChildIsLess)?.story;
                must!(above.phase == Phase::InForce && story.ends_at <= above.ends_at, Rule::ChildIsLess);
                must!(story.rows(grant) <= above.rows(parent), Rule::ChildIsLess);
            }
            for (told, there) in story.leases.iter().zip(seat.there) {
                let works = there == There::Yes || !matches!(told, Told::Live { .. });
                must!(works, Rule::Overlap);
                must!(there == There::Nothing || *told != Told::Nothing, Rule::IntentFirst);
                must!(there == There::Nothing || *told != Told::Gone, Rule::GoneIsGone);
                must!(there == There::Nothing || story.phase != Phase::Final, Rule::EndsAll);
            }
        }
        Ok(())
    }

    fn take(&self, world: &mut World, step: &Step) -> Result<(), Rule> {
        match *step {
            Step::Ask(grant) => {
                let parent = parent_of(grant).and_then(|p| world.seats[p]).map(|s| s.kept);
                match self.keeper.request(grant, parent, world.tick) {
                    Answer::Nothing { .. } => {}
                    Answer::Events(events, after) => self.commit(world, grant, &events, after)?,
                    Answer::Impossible => return Err(Rule::Agrees),
                }
            }
            Step::Wish(grant, wish) => {
                let taken = self.wish(world, grant, wish)?;
                if let Wish::Intend { slot, .. } = wish
                    && taken
                {
                    // What isn't refused is sent.
                    self.at(world, grant)?[slot] = There::UnderWay;
                }
            }
            Step::Arrive(grant, slot) => self.at(world, grant)?[slot] = There::Yes,
            Step::Refuse(grant, slot) => {
                self.at(world, grant)?[slot] = There::Nothing;
                self.wish(world, grant, Wish::NotMinted { slot })?;
            }
            Step::Cut(grant, slot) => self.at(world, grant)?[slot] = There::Nothing,
            Step::Pass => pass(world),
            Step::Freeze => {
                world.frozen = true;
                for grant in [CHILD, PARENT, OVERLAP] {
                    self.wish(world, grant, Wish::Finish(Why::Frozen))?;
                    let phase = world.seats[grant].map(|s| s.story.phase);
                    must!(!matches!(phase, Some(Phase::Pending | Phase::InForce)), Rule::EndsAll);
                }
            }
            Step::Crash => {
                world.crashed = true;
                for grant in 0..GRANTS {
                    let Some(seat) = world.seats[grant] else { continue };
                    for (slot, told) in seat.story.leases.into_iter().enumerate() {
                        match told {
                            Told::Intended => _ = self.wish(world, grant, Wish::Unknown { slot })?,
                            Told::Live { released: false } => _ = self.wish(world, grant, Wish::Revoke { slot })?,
                            _ => {}
                        }
                    }
                }
            }
        }
        self.holds(world)
    }

    fn at<'a>(&self, world: &'a mut World, grant: usize) -> Result<&'a mut [There; SLOTS], Rule> {
        world.seats[grant].as_mut().map(|s| &mut s.there).ok_or(Rule::Agrees)
    }

    /// From here on nobody asks for anything: every mint that is under way arrives as late as it can, its answer is lost,
    /// and the broker goes on ending. Does everything come to its end?
    pub fn drains(&self, world: &World) -> bool {
        let mut world = world.clone();
        self.drain(&mut world).is_ok_and(|()| {
            let over = |s: &Seat| s.story.phase == Phase::Final && s.there == [There::Nothing; SLOTS];
            world.seats.iter().flatten().all(over)
        })
    }

    fn drain(&self, world: &mut World) -> Result<(), Rule> {
        for grant in [PARENT, OVERLAP, CHILD] {
            self.wish(world, grant, Wish::Finish(Why::Completed))?;
            for slot in 0..SLOTS {
                let Some(seat) = world.seats[grant] else { continue };
                if seat.story.leases[slot] == Told::Intended {
                    self.wish(world, grant, Wish::Unknown { slot })?;
                }
                if seat.there[slot] == There::UnderWay {
                    self.take(world, &Step::Arrive(grant, slot))?;
                }
            }
        }
        let doubts = world.seats.iter().flatten().flat_map(|s| s.story.leases);
        let look_from = doubts.filter_map(|t| if let Told::InDoubt { look_from } = t { Some(look_from) } else { None });
        let last = look_from.max().unwrap_or(0);
        while world.tick < last {
            pass(world);
        }
        for grant in 0..GRANTS {
            for slot in 0..SLOTS {
                let told = world.seats[grant].map(|s| s.story.leases[slot]);
                if matches!(told, Some(Told::BeingEnded | Told::InDoubt { .. })) {
                    self.take(world, &Step::Cut(grant, slot))?;
                    self.wish(world, grant, Wish::Gone { of: grant, slot })?;
                }
            }
        }
        Ok(())
    }

    fn lease_steps(&self, grant: usize, seat: &Seat, steps: &mut Vec<Step>) {
        let mut wish = |w| steps.push(Step::Wish(grant, w));
        for slot in 0..self.scope.slots[grant] {
            let (told, there) = (seat.story.leases[slot], seat.there[slot]);
            if matches!(told, Told::Nothing | Told::Gone) && there == There::Nothing {
                continue;
            }
            wish(Wish::Prepared { slot });
            wish(Wish::Revoke { slot });
            wish(Wish::Retry { slot });
            if told == Told::Intended {
                wish(Wish::Unknown { slot });
            }
            match there {
                There::Yes => {
                    wish(Wish::Live { slot, release: true });
                    wish(Wish::Live { slot, release: false });
                }
                // Whoever looks finds nothing. What that proves is for `decide` to say.
                There::UnderWay | There::Nothing => wish(Wish::Gone { of: grant, slot }),
            }
        }
        for slot in 0..self.scope.slots[grant] {
            let (told, there) = (seat.story.leases[slot], seat.there[slot]);
            if there == There::UnderWay {
                steps.push(Step::Arrive(grant, slot));
                steps.push(Step::Refuse(grant, slot));
            }
            if there == There::Yes && matches!(told, Told::BeingEnded | Told::InDoubt { .. }) {
                steps.push(Step::Cut(grant, slot));
            }
        }
    }

    fn grant_steps(&self, world: &World, grant: usize, seat: &Seat, steps: &mut Vec<Step>) {
        let mut wish = |w| steps.push(Step::Wish(grant, w));
        let phase = seat.story.phase;
        wish(Wish::Tick);
        wish(Wish::Finish(Why::Completed));
        wish(Wish::Cancel);
        if phase == Phase::Pending && self.scope.reassess[grant] && seat.story.standing == 0 {
            wish(Wish::Reassess);
        }
        let parent_ends_at = parent_of(grant).and_then(|p| world.seats[p]).and_then(|s| {
            self.keeper.grant(s.kept).ends_at().map(tick_of) // whatever the clock says
        });
        let mut vote = |person, approve, on| wish(Wish::Vote { person, approve, on, parent_ends_at });
        if phase == Phase::Pending {
            let twin = if grant == OVERLAP { PARENT } else { OVERLAP };
            for person in 0..PERSONS {
                for on in [(grant, 0), (grant, 1), (twin, 0)] {
                    vote(person, false, on);
                    vote(person, true, on);
                }
            }
        } else if !world.frozen {
            vote(0, true, (grant, seat.story.standing));
            vote(0, false, (grant, seat.story.standing));
        }
        let free = (0..self.scope.slots[grant]).find(|slot| seat.story.leases[*slot] == Told::Nothing);
        if let Some(slot) = free
            && !world.frozen
        {
            let left = seat.story.ends_at.saturating_sub(world.tick);
            for (on, ticks) in [(0, left), (1, left), (seat.story.standing, left + 1)] {
                wish(Wish::Intend { slot, on, ticks });
            }
        }
        // Somebody mixes up whose lease it is.
        let other = if grant == OVERLAP { PARENT } else { OVERLAP };
        if world.seats[other].is_some_and(|s| s.story.leases[0] != Told::Nothing) {
            wish(Wish::Gone { of: other, slot: 0 });
        }
        self.lease_steps(grant, seat, steps);
    }
}

fn pass(world: &mut World) {
    world.tick += 1;
    for seat in world.seats.iter_mut().flatten() {
        for (told, there) in seat.story.leases.iter().zip(&mut seat.there) {
            // A target's own deadline: what was under way for so long has no effect any more.
            if *there == There::UnderWay
                && let Told::InDoubt { look_from } = told
                && *look_from <= world.tick
            {
                *there = There::Nothing;
            }
        }
    }
}

impl Model for Countersign {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World { tick: 0, seats: [None; GRANTS], frozen: false, crashed: false, broken: None }]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        if world.broken.is_some() {
            return;
        }
        for (grant, seat) in world.seats.iter().enumerate() {
            match seat {
                Some(seat) => self.grant_steps(world, grant, seat, steps),
                None if self.scope.asks[grant] && !world.frozen => steps.push(Step::Ask(grant)),
                None => {}
            }
        }
        if world.tick < self.scope.last_tick {
            steps.push(Step::Pass);
        }
        if self.scope.freeze && !world.frozen {
            steps.push(Step::Freeze);
        }
        if self.scope.crash && !world.crashed {
            steps.push(Step::Crash);
        }
    }

    fn next_state(&self, last: &World, step: Step) -> Option<World> {
        let mut world = last.clone();
        if let Err(rule) = self.take(&mut world, &step) {
            world.broken = Some(rule);
        }
        (world != *last).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        macro_rules! never {
            ($name:literal, $rule:ident) => {
                Property::<Self>::always($name, |_, w| w.broken != Some(Rule::$rule))
            };
        }
        let mut all = vec![
            never!("a credential exists only after its intent (1)", IntentFirst),
            never!("a secret leaves only under a grant in force (2)", ReleasedInForce),
            never!("what is to be minted is what was approved, and under a grant in force (3)", Approved),
            never!("it is ended only with all of its leases (4)", EndsAll),
            never!("what is called gone is gone, and nothing can arrive any more (5)", GoneIsGone),
            never!("in force only by so many persons who may, for this very digest (3, 6)", Quorum),
            never!("a child is in force only while its parent is, and is less (7)", ChildIsLess),
            never!("the state says what the events say (8)", Agrees),
            never!("it ends no later than approved (10)", Deadline),
            never!("one end, and nothing after it (11)", OneEnd),
            never!("what ends one grant leaves the other's credential working (13)", Overlap),
            Property::always("every grant can come to its end (4)", |m: &Self, w: &World| {
                m.checked.fetch_add(1, Ordering::Relaxed);
                w.broken.is_some() || m.drains(w)
            }),
        ];
        all.extend(examples(&self.scope));
        all
    }
}
