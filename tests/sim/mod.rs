//! A deterministic simulation of the broker: the production code on a simulated clock, disk, network and targets. One
//! seed is one schedule, and the oracle looks at what is true after every step.

#![allow(dead_code)] // a test and an example use a part each
#![allow(clippy::cast_possible_truncation)] // small numbers, on machines of 64 bits

mod broker;
mod chaos;
#[path = "../journal_support/choices.rs"]
mod choices;
#[path = "../journal_support/mem_disk.rs"]
mod mem_disk;
#[cfg(feature = "mutations")]
pub mod mutations;
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
use std::sync::atomic::Ordering::SeqCst;

use countersign::store::embedded::journal::Stepper;
use parking_lot::Mutex;

pub use choices::Choices;
pub use oracle::Counts;

use broker::Process;
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

/// Everything outside the broker.
pub struct World {
    pub sched: Arc<Sched>,
    pub machine: Arc<Machine>,
    pub oracle: Arc<Oracle>,
    pub targets: Vec<Arc<SimTarget>>,
    pub process: Mutex<Option<Process>>,
    pub control: Mutex<Control>,
    pub forks: Mutex<Choices>,
    pub day_ends_ms: u64,
    /// So many of a thousand messages get lost.
    pub loses: u64,
}

impl World {
    pub fn outside(&self) -> SimRuntime {
        SimRuntime { sched: Arc::clone(&self.sched), owner: WORLD, machine: Arc::clone(&self.machine) }
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

/// Runs one schedule.
pub fn run(seed: u64, talks: bool) -> Outcome {
    PANICKED.with(|p| p.set(false));
    let mut sim = Sim::new(seed, talks);
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
        runs: sim.run,
        counts: sim.world.oracle.counts(),
    }
}

struct Sim {
    seed: u64,
    world: Arc<World>,
    choices: Choices,
    disk: MemDisk,
    dir: PathBuf,
    stepper: Option<Stepper>,
    run: Owner,
    starts_at_ms: Option<u64>,
    well_since_ms: Option<u64>,
    looked_at_ms: u64,
    died_at: Option<(u64, Death)>,
    is_stopping: bool,
    steps: u64,
}

impl Sim {
    fn new(seed: u64, talks: bool) -> Self {
        let mut choices = Choices(seed);
        let sched = Arc::new(Sched::default());
        let machine = Arc::new(Machine::default());
        let (disk, dir) = (MemDisk::default(), PathBuf::from("/data/journal"));
        // Short reads are legal and tried elsewhere, at a hundred bytes each; here they would only cost time.
        disk.set(|d| d.read_max = 4096);
        let oracle = Arc::new(Oracle::new(disk.clone(), dir.clone(), Arc::clone(&sched), talks));
        let target = |name, chooses, seed| Arc::new(SimTarget::new(name, chooses, Arc::clone(&oracle), seed));
        let targets = vec![target("told", false, choices.next()), target("chooses", true, choices.next())];
        let world = Arc::new(World {
            sched: Arc::clone(&sched),
            machine,
            oracle,
            targets,
            process: Mutex::new(None),
            control: Mutex::default(),
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
        let weather = chaos::Weather::draw(&mut choices);
        sched.spawn(WORLD, Box::pin(chaos::weather(Arc::clone(&world), weather)));
        Self {
            seed,
            world,
            choices,
            disk,
            dir,
            stepper: None,
            run: 0,
            starts_at_ms: Some(0),
            well_since_ms: None,
            looked_at_ms: 0,
            died_at: None,
            is_stopping: false,
            steps: 0,
        }
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
        let process = self.world.process.lock();
        if let Some(process) = process.as_ref() {
            let figures = process.store.figures();
            for (name, value) in
                figures.iter().filter(|(n, v)| matches!(*n, "store_on_its_way" | "grants_open") && *v > 0)
            {
                self.world.oracle.violated(format!("{name} is {value} when all is over"));
            }
        } else {
            self.world.oracle.violated("no broker runs when all is well".to_owned());
        }
        drop(process);
        self.world.oracle.nothing_is_lost();
    }

    fn mend(&mut self) {
        *self.world.control.lock() = Control::default();
        self.disk.set(|d| (d.capacity, d.dead_from, d.fail_syncs, d.fail_writes) = (None, None, 0, 0));
        self.world.targets.iter().for_each(|t| t.set(Health::Well));
        self.world.machine.wall_off.store(0, SeqCst);
        self.well_since_ms = None;
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
        if self.starts_at_ms.is_some_and(|at| now >= at) {
            self.start();
        }
        let paused_until = self.world.control.lock().paused_until_ms.filter(|at| now < *at);
        let paused = paused_until.map(|_| self.run);
        if paused.is_some() {
            self.well_since_ms = None;
        }
        // The writer is a thread: it comes to its turn whenever it likes.
        let writes = paused.is_none() && self.choices.chance(200) && self.write();
        let works = writes || self.world.sched.step(&mut self.choices, paused) || (paused.is_none() && self.write());
        if !works {
            self.look_around(now);
            let limit = [Some(now + 1_000), self.starts_at_ms.filter(|at| *at > now), paused_until, Some(end_ms)];
            self.world.sched.advance(limit.into_iter().flatten().min().unwrap_or(end_ms));
        }
        self.take_orders();
    }

    /// One turn of the journal's writer. False: nothing came of it.
    fn write(&mut self) -> bool {
        // On a full disk it asks for space each time: that alone is no progress.
        let before = (self.disk.syncs(), self.world.sched.ready_len());
        if let Some(stepper) = &mut self.stepper
            && !stepper.step()
        {
            self.stepper = None;
        }
        (self.disk.syncs(), self.world.sched.ready_len()) != before
    }

    fn take_orders(&mut self) {
        let mut control = self.world.control.lock();
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
            None => control.dies_at_op.is_some_and(|op| self.disk.ops() > op),
        };
        if dies {
            let (death, down_ms) = (control.death, control.down_ms);
            (control.dies_in_steps, control.dies_at_op) = (None, None);
            drop(control);
            return self.die(death, now + down_ms);
        }
        if std::mem::take(&mut control.stop) && !self.is_stopping {
            drop(control);
            return self.stop();
        }
        drop(control);
        if self.is_stopping && self.stepper.is_none() {
            // It closed in good order; a supervisor starts it again.
            self.is_stopping = false;
            self.die(Death::Process, now + 500);
        }
    }

    fn stop(&mut self) {
        let parts = self
            .world
            .process
            .lock()
            .as_ref()
            .map(|p| (Arc::clone(&p.broker), Arc::clone(&p.store), Arc::clone(&p.runtime)));
        let Some((broker, store, runtime)) = parts else { return };
        self.is_stopping = true;
        self.well_since_ms = None;
        countersign::runtime::Runtime::spawn(
            runtime.as_ref(),
            Box::pin(async move {
                broker.stop(std::time::Duration::from_secs(5)).await;
                broker.run_ended().await;
                let _ = store.close().await;
            }),
        );
    }

    fn die(&mut self, death: Death, starts_at_ms: u64) {
        let now = self.world.sched.now_ms();
        self.world.oracle.say(|| format!("the broker dies: {death:?}; it starts again at {starts_at_ms}"));
        // Whatever dying tasks do on their way out reaches nobody: a killed process runs none of it.
        self.disk.set(|d| d.dead_from = Some(0));
        let process = self.world.process.lock().take();
        self.world.sched.kill(self.run);
        drop(process);
        self.stepper = None;
        self.is_stopping = false;
        self.well_since_ms = None;
        match death {
            Death::Process => {
                self.disk.process_dies_unhealed();
                self.disk.set(|d| d.dead_from = None);
            }
            Death::Power => {
                self.disk.power_cut(&mut self.choices);
                self.world.machine.reboot(now);
            }
        }
        self.died_at = Some((now, death));
        self.starts_at_ms = Some(starts_at_ms);
    }

    fn start(&mut self) {
        let now = self.world.sched.now_ms();
        self.starts_at_ms = None;
        if let Some((at, Death::Power)) = self.died_at.take() {
            // Without a battery that everybody trusts, nobody can know how long the power was off.
            let off = self.world.machine.wall_off.load(SeqCst);
            let slow = u64::try_from(-off.min(0)).unwrap_or(0);
            self.world.oracle.allow_ms((now - at).min(slow));
        }
        self.world.oracle.nothing_is_lost();
        let was_ill = self.disk.is_ill();
        self.run += 1;
        let runtime = Arc::new(SimRuntime {
            sched: Arc::clone(&self.world.sched),
            owner: self.run,
            machine: Arc::clone(&self.world.machine),
        });
        let seed = self.choices.next();
        match broker::start(runtime, &self.disk, Path::new(&self.dir), &self.world.targets, seed) {
            Ok((process, stepper, _)) => {
                *self.world.process.lock() = Some(process);
                self.stepper = Some(stepper);
            }
            Err(error) => {
                // A disk that is full or fails: its supervisor tries again. Anything else would be a broker that nobody can start.
                self.world.oracle.say(|| format!("it doesn't start: {error}"));
                if !was_ill {
                    self.world.oracle.violated(format!("the broker can't be started: {error}"));
                }
                self.world.sched.kill(self.run);
                self.disk.process_dies_unhealed();
                self.disk.set(|d| d.dead_from = None);
                self.starts_at_ms = Some(now + 1_000);
            }
        }
    }

    fn look_around(&mut self, now: u64) {
        if now < self.looked_at_ms + 1_000 {
            return;
        }
        self.looked_at_ms = now;
        let is_up = !self.is_stopping && self.world.process.lock().as_ref().is_some_and(|p| p.broker.has_started());
        self.well_since_ms = if is_up { self.well_since_ms.or(Some(now)) } else { None };
        if is_up && self.world.sched.tasks_of(self.run) > TASKS_MAX {
            self.world.oracle.violated("more and more tasks wait".to_owned());
        }
        let Some(well) = self.well_since_ms else { return };
        let targets = &self.world.targets;
        self.world.oracle.look_around(&|name| {
            let (target_well, was_down) = targets.iter().find(|t| t.name == name)?.well_since()?;
            // The return within seconds is promised while the broker was well all along.
            Some((target_well.max(well), was_down && well + 20_000 < target_well))
        });
    }
}
