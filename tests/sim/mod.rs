//! A deterministic simulation of the broker: the production code on a simulated clock, disk, network and targets. One
//! seed is one schedule, and the oracle looks at what is true after every step.

#![allow(dead_code)] // a test and an example use a part each
#![allow(clippy::cast_possible_truncation)] // small numbers, on machines of 64 bits

mod broker;
mod chaos;
#[path = "../journal_support/choices.rs"]
mod choices;
mod database;
mod ground;
mod link;
#[path = "../journal_support/mem_disk.rs"]
mod mem_disk;
#[cfg(feature = "mutations")]
pub mod mutations;
mod nodes;
mod oracle;
mod people;
pub mod runner;
mod sched;
#[path = "../support/mod.rs"]
mod support;
mod target;

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use countersign::store::embedded::journal::Stepper;
use parking_lot::Mutex;

pub use choices::Choices;
pub use oracle::Counts;

use broker::Process;
use ground::Ground;
use link::Database;
use mem_disk::MemDisk;
use oracle::Oracle;
use sched::{Machine, Owner, Sched, SimRuntime, WORLD};
use target::{Health, SimTarget};

/// So long things go wrong, in milliseconds of simulated time.
const DAY_MS: u64 = 240_000;
/// So long everything is well afterwards: the longest life, the longest wait for a vote, and the bound of every ending.
const NIGHT_MS: u64 = 160_000 + 130_000 + oracle::BOUND_MS + 60_000;
/// More steps than any schedule needs: a loop that never rests is a fault too.
const STEPS_MAX: u64 = 3_000_000;
/// Most tasks of one run: more means that something piles up.
const TASKS_MAX: usize = 2_000;

/// How a run dies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Death {
    /// SIGKILL: what was written is there.
    #[default]
    Process,
    /// The power goes: what was not synced may be lost, and the machine boots anew.
    Power,
}

/// What is to happen to the run.
#[derive(Debug, Default)]
pub struct Control {
    pub dies_in_steps: Option<u64>,
    pub dies_at_op: Option<u64>,
    pub death: Death,
    pub down_ms: u64,
    pub paused_until_ms: Option<u64>,
    pub stop: bool,
}

/// A machine on which a broker runs, or is to.
#[derive(Default)]
pub struct Node {
    pub machine: Arc<Machine>,
    pub process: Mutex<Option<Process>>,
    pub control: Mutex<Control>,
}

/// Everything outside the broker.
pub struct World {
    pub sched: Arc<Sched>,
    pub nodes: Vec<Node>,
    /// What several nodes share.
    pub database: Option<Arc<Database>>,
    /// What one has for itself.
    pub disk: MemDisk,
    pub oracle: Arc<Oracle>,
    pub targets: Vec<Arc<SimTarget>>,
    pub forks: Mutex<Choices>,
    pub day_ends_ms: u64,
    /// So many of a thousand messages get lost.
    pub loses: u64,
}

impl World {
    pub fn outside(&self) -> SimRuntime {
        let machine = Arc::clone(&self.nodes[0].machine);
        SimRuntime { sched: Arc::clone(&self.sched), owner: WORLD, machine }
    }

    /// One of the nodes.
    pub fn any_node(&self, choices: &mut Choices) -> &Node {
        // With one, nothing is drawn.
        let n = if self.nodes.len() > 1 { choices.below(self.nodes.len() as u64) } else { 0 };
        &self.nodes[n as usize]
    }
}

/// How a schedule went.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub seed: u64,
    /// What was wrong first.
    pub violation: Option<String>,
    /// The same for each run of the seed.
    pub trace: u64,
    pub steps: u64,
    pub runs: u32,
    pub counts: Counts,
}

thread_local! {
    static PANICKED: Cell<bool> = const { Cell::new(false) };
}

/// A panic of the code under test is a violation; it is caught where the task runs, so it must be noticed here.
pub fn notice_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICKED.with(|p| p.set(true));
        before(info);
    }));
}

/// Runs one schedule, of one process on its disk.
pub fn run(seed: u64, talks: bool) -> Outcome {
    run_of(0, seed, talks)
}

/// Runs one schedule, of so many nodes on one database; 0: of one process on its disk.
pub fn run_of(nodes: usize, seed: u64, talks: bool) -> Outcome {
    PANICKED.with(|p| p.set(false));
    let mut sim = Sim::new(nodes, seed, talks);
    sim.day();
    if sim.world.oracle.violation().is_none() {
        sim.night();
    }
    let violation = sim.world.oracle.violation();
    Outcome {
        seed,
        violation,
        trace: sim.world.sched.trace(),
        steps: sim.steps,
        runs: sim.runs,
        counts: sim.world.oracle.counts(),
    }
}

struct Sim {
    seed: u64,
    world: Arc<World>,
    choices: Choices,
    dir: PathBuf,
    stepper: Option<Stepper>,
    seats: Vec<Seat>,
    /// Runs that were begun, of all nodes.
    runs: Owner,
    looked_at_ms: u64,
    steps: u64,
}

/// What becomes of a node.
#[derive(Default)]
struct Seat {
    run: Owner,
    starts_at_ms: Option<u64>,
    well_since_ms: Option<u64>,
    died_at: Option<(u64, Death)>,
    is_stopping: bool,
    /// Its store was closed.
    is_closed: Arc<AtomicBool>,
}

impl Sim {
    fn new(nodes: usize, seed: u64, talks: bool) -> Self {
        let mut choices = Choices(seed);
        let sched = Arc::new(Sched::default());
        let (disk, dir) = (MemDisk::default(), PathBuf::from("/data/journal"));
        // Short reads are legal and tried elsewhere, at a hundred bytes each; here they would only cost time.
        disk.set(|d| d.read_max = 4096);
        let database = (nodes > 0).then(|| nodes::database(&sched, &mut choices));
        let ground = match &database {
            Some(database) => Ground::Database(Arc::clone(database)),
            None => Ground::Disk(disk.clone(), dir.clone()),
        };
        let oracle = Arc::new(Oracle::new(ground, Arc::clone(&sched), talks));
        let target = |name, chooses, seed| Arc::new(SimTarget::new(name, chooses, Arc::clone(&oracle), seed));
        let targets = vec![target("told", false, choices.next()), target("chooses", true, choices.next())];
        let world = Arc::new(World {
            sched: Arc::clone(&sched),
            nodes: if database.is_some() { nodes::machines(nodes, &mut choices) } else { vec![Node::default()] },
            database,
            disk,
            oracle,
            targets,
            forks: Mutex::new(Choices(choices.next())),
            day_ends_ms: DAY_MS,
            loses: choices.below(60),
        });
        for (agent, helper) in [
            ("spiffe://corp.example/agent/ops/a", "spiffe://corp.example/agent/helper/a"),
            ("spiffe://corp.example/agent/ops/b", "spiffe://corp.example/agent/helper/b"),
            ("spiffe://corp.example/agent/c", "spiffe://corp.example/agent/d"),
        ] {
            sched.spawn(WORLD, Box::pin(people::an_agent(Arc::clone(&world), agent, helper)));
        }
        for person in ["ana", "ben", "chen"] {
            sched.spawn(WORLD, Box::pin(people::a_reviewer(Arc::clone(&world), person)));
        }
        if world.database.is_some() {
            let weather = nodes::Weather::draw(&mut choices);
            sched.spawn(WORLD, Box::pin(nodes::weather(Arc::clone(&world), weather)));
        } else {
            let weather = chaos::Weather::draw(&mut choices);
            sched.spawn(WORLD, Box::pin(chaos::weather(Arc::clone(&world), weather)));
        }
        let seat = |_: &Node| Seat { starts_at_ms: Some(0), ..Seat::default() };
        let seats = world.nodes.iter().map(seat).collect();
        Self { seed, world, choices, dir, stepper: None, seats, runs: 0, looked_at_ms: 0, steps: 0 }
    }

    fn day(&mut self) {
        self.until(DAY_MS);
    }

    /// Everything is mended, and goes on for as long as any ending may take.
    fn night(&mut self) {
        self.mend();
        self.until(DAY_MS + NIGHT_MS);
        if self.world.oracle.violation().is_some() {
            return;
        }
        self.world.oracle.at_the_end();
        for target in self.world.targets.iter().filter(|t| t.keys_left() > 0) {
            self.world.oracle.violated(format!("{} keys are left at {}", target.keys_left(), target.name));
        }
        for node in &self.world.nodes {
            let Some(store) = node.process.lock().as_ref().map(|p| Arc::clone(&p.store)) else {
                self.world.oracle.violated("no broker runs when all is well".to_owned());
                continue;
            };
            let left = |(n, v): &(&str, u64)| matches!(*n, "store_on_its_way" | "grants_open") && *v > 0;
            for (name, value) in store.figures().into_iter().filter(left) {
                self.world.oracle.violated(format!("{name} is {value} when all is over"));
            }
        }
        self.world.oracle.nothing_is_lost();
    }

    fn mend(&mut self) {
        for (node, seat) in self.world.nodes.iter().zip(&mut self.seats) {
            *node.control.lock() = Control::default();
            node.machine.wall_off.store(0, SeqCst);
            seat.well_since_ms = None;
        }
        if let Some(database) = &self.world.database {
            database.mend();
        }
        self.world.disk.set(|d| (d.capacity, d.dead_from, d.fail_syncs, d.fail_writes) = (None, None, 0, 0));
        self.world.targets.iter().for_each(|t| t.set(Health::Well));
    }

    fn until(&mut self, end_ms: u64) {
        while self.world.sched.now_ms() < end_ms && self.world.oracle.violation().is_none() {
            self.steps += 1;
            if self.steps > STEPS_MAX {
                return self.world.oracle.violated("it never comes to rest".to_owned());
            }
            if self.steps + 40 > STEPS_MAX {
                self.world.oracle.say(|| format!("step {}", self.world.sched.last()));
            }
            if PANICKED.with(|p| p.replace(false)) {
                return self.world.oracle.violated("something panicked".to_owned());
            }
            self.turn(end_ms);
        }
    }

    fn turn(&mut self, end_ms: u64) {
        let now = self.world.sched.now_ms();
        for n in 0..self.seats.len() {
            if self.seats[n].starts_at_ms.is_some_and(|at| now >= at) {
                self.start(n);
            }
        }
        let (mut paused, mut wake_at) = (Vec::new(), None);
        for (node, seat) in self.world.nodes.iter().zip(&mut self.seats) {
            if let Some(until) = node.control.lock().paused_until_ms.filter(|at| now < *at) {
                paused.push(seat.run);
                wake_at = Some(wake_at.map_or(until, |at: u64| at.min(until)));
                seat.well_since_ms = None;
            }
        }
        // The writer is a thread: it comes to its turn whenever it likes.
        let has_writer = self.world.database.is_none() && paused.is_empty();
        let writes = has_writer && self.choices.chance(200) && self.write();
        let works = writes || self.world.sched.step(&mut self.choices, &paused) || (has_writer && self.write());
        if !works {
            self.look_around(now);
            let starts = self.seats.iter().filter_map(|s| s.starts_at_ms).filter(|at| *at > now).min();
            let limit = [Some(now + 1_000), starts, wake_at, Some(end_ms)];
            self.world.sched.advance(limit.into_iter().flatten().min().unwrap_or(end_ms));
        }
        for n in 0..self.seats.len() {
            self.take_orders(n);
        }
    }

    /// One turn of the journal's writer. False: nothing came of it.
    fn write(&mut self) -> bool {
        // On a full disk it asks for space each time: that alone is no progress.
        let before = (self.world.disk.syncs(), self.world.sched.ready_len());
        if let Some(stepper) = &mut self.stepper
            && !stepper.step()
        {
            self.stepper = None;
        }
        (self.world.disk.syncs(), self.world.sched.ready_len()) != before
    }

    fn take_orders(&mut self, n: usize) {
        let world = Arc::clone(&self.world);
        let mut control = world.nodes[n].control.lock();
        let now = self.world.sched.now_ms();
        if control.paused_until_ms.is_some_and(|at| now >= at) {
            control.paused_until_ms = None;
        }
        let dies = match &mut control.dies_in_steps {
            Some(0) => true,
            Some(steps) => {
                *steps -= 1;
                false
            }
            None => control.dies_at_op.is_some_and(|op| self.world.disk.ops() > op),
        };
        if dies {
            let (death, down_ms) = (control.death, control.down_ms);
            (control.dies_in_steps, control.dies_at_op) = (None, None);
            drop(control);
            return self.die(n, death, now + down_ms);
        }
        if std::mem::take(&mut control.stop) && !self.seats[n].is_stopping {
            drop(control);
            return self.stop(n);
        }
        drop(control);
        let has_closed = match self.world.database {
            Some(_) => self.seats[n].is_closed.load(SeqCst),
            None => self.stepper.is_none(),
        };
        if self.seats[n].is_stopping && has_closed {
            // It closed in good order; a supervisor starts it again.
            self.seats[n].is_stopping = false;
            self.die(n, Death::Process, now + 500);
        }
    }

    fn stop(&mut self, n: usize) {
        let parts = self.world.nodes[n]
            .process
            .lock()
            .as_ref()
            .map(|p| (Arc::clone(&p.broker), Arc::clone(&p.store), Arc::clone(&p.runtime)));
        let Some((broker, store, runtime)) = parts else { return };
        let closed = Arc::new(AtomicBool::new(false));
        let seat = &mut self.seats[n];
        (seat.is_stopping, seat.well_since_ms, seat.is_closed) = (true, None, Arc::clone(&closed));
        countersign::runtime::Runtime::spawn(
            runtime.as_ref(),
            Box::pin(async move {
                broker.stop(std::time::Duration::from_secs(5)).await;
                broker.run_ended().await;
                let _ = store.close().await;
                closed.store(true, SeqCst);
            }),
        );
    }

    fn die(&mut self, n: usize, death: Death, starts_at_ms: u64) {
        let now = self.world.sched.now_ms();
        let which = if self.seats.len() > 1 { format!("broker {n}") } else { "the broker".to_owned() };
        self.world.oracle.say(|| format!("{which} dies: {death:?}; it starts again at {starts_at_ms}"));
        // Whatever dying tasks do on their way out reaches nobody: a killed process runs none of it.
        self.world.disk.set(|d| d.dead_from = Some(0));
        let process = self.world.nodes[n].process.lock().take();
        self.world.sched.kill(self.seats[n].run);
        drop(process);
        self.stepper = None;
        self.seats[n] = Seat {
            run: self.seats[n].run,
            died_at: Some((now, death)),
            starts_at_ms: Some(starts_at_ms),
            ..Seat::default()
        };
        match death {
            Death::Process => {
                self.world.disk.process_dies_unhealed();
                self.world.disk.set(|d| d.dead_from = None);
            }
            Death::Power => {
                self.world.disk.power_cut(&mut self.choices);
                self.world.nodes[n].machine.reboot(now);
            }
        }
    }

    fn start(&mut self, n: usize) {
        let now = self.world.sched.now_ms();
        self.seats[n].starts_at_ms = None;
        self.runs += 1;
        self.seats[n].run = self.runs;
        let machine = Arc::clone(&self.world.nodes[n].machine);
        let runtime =
            Arc::new(SimRuntime { sched: Arc::clone(&self.world.sched), owner: self.runs, machine: machine.clone() });
        if self.world.database.is_some() {
            return nodes::start(&self.world, n, runtime, self.choices.next());
        }
        if let Some((at, Death::Power)) = self.seats[n].died_at.take() {
            // Without a battery that everybody trusts, nobody can know how long the power was off.
            let off = machine.wall_off.load(SeqCst);
            let slow = u64::try_from(-off.min(0)).unwrap_or(0);
            self.world.oracle.allow_ms((now - at).min(slow));
        }
        self.world.oracle.nothing_is_lost();
        let was_ill = self.world.disk.is_ill();
        let seed = self.choices.next();
        match broker::start(runtime, &self.world.disk, Path::new(&self.dir), &self.world.targets, seed) {
            Ok((process, stepper, _)) => {
                *self.world.nodes[n].process.lock() = Some(process);
                self.stepper = Some(stepper);
            }
            Err(error) => {
                // A disk that is full or fails: its supervisor tries again. Anything else would be a broker that nobody can start.
                self.world.oracle.say(|| format!("it doesn't start: {error}"));
                if !was_ill {
                    self.world.oracle.violated(format!("the broker can't be started: {error}"));
                }
                self.world.sched.kill(self.seats[n].run);
                self.world.disk.process_dies_unhealed();
                self.world.disk.set(|d| d.dead_from = None);
                self.seats[n].starts_at_ms = Some(now + 1_000);
            }
        }
    }

    fn look_around(&mut self, now: u64) {
        if now < self.looked_at_ms + 1_000 {
            return;
        }
        self.looked_at_ms = now;
        for n in 0..self.seats.len() {
            let has_started = self.world.nodes[n].process.lock().as_ref().is_some_and(|p| p.broker.has_started());
            let is_up = !self.seats[n].is_stopping && has_started;
            let is_reached = self.world.database.as_ref().is_none_or(|d| d.is_reached_by(n));
            let seat = &mut self.seats[n];
            seat.well_since_ms = if is_up && is_reached { seat.well_since_ms.or(Some(now)) } else { None };
            if is_up && self.world.sched.tasks_of(seat.run) > TASKS_MAX {
                self.world.oracle.violated("more and more tasks wait".to_owned());
            }
        }
        // One that is well ends what is to be ended, whatever becomes of the others; what they are at at their target's
        // return is theirs.
        let Some(well) = self.seats.iter().filter_map(|s| s.well_since_ms).min() else { return };
        let all_well = self.seats.iter().map(|s| s.well_since_ms).max_by_key(|at| at.unwrap_or(u64::MAX)).flatten();
        let targets = &self.world.targets;
        self.world.oracle.look_around(&|name| {
            let (target_well, was_down) = targets.iter().find(|t| t.name == name)?.well_since()?;
            // The return within seconds is promised while the broker was well all along.
            let was_well = all_well.is_some_and(|since| since + 20_000 < target_well);
            Some((target_well.max(well), was_down && was_well))
        });
    }
}
