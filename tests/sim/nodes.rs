//! Several nodes on one database: how they start, and what goes wrong with them beyond what does with one process: a node
//! that stands still for longer than its run lasts and wakes, a way to the database that is cut, answers that get lost.

use std::sync::Arc;

use countersign::broker::run_clock;
use countersign::runtime::Runtime as _;
use countersign::store::postgres::OpenError;

use super::broker::{assemble, open};
use super::chaos::{ill, set_clock, weighted};
use super::link::{Database, Link, Roughness};
use super::sched::{EPOCH_MS, Machine, Sched, SimRuntime};
use super::{Choices, Death, Node, World};

/// A node's clock is off by at most so much from the start, in milliseconds.
const OFF_MS_MAX: u64 = 3_000;
/// A start that failed is tried again after this, in milliseconds.
const START_AGAIN_MS: u64 = 1_000;

pub fn database(sched: &Arc<Sched>, c: &mut Choices) -> Arc<Database> {
    let mut some = |max: u64| if c.chance(600) { c.below(max) } else { 0 };
    let roughness = Roughness { loses: some(30), delays: some(20), refuses: some(8) };
    Arc::new(Database::new(Arc::clone(sched), roughness, c.next()))
}

pub fn machines(nodes: usize, c: &mut Choices) -> Vec<Node> {
    let machine = |n: u64, c: &mut Choices| {
        let off_ms = i64::try_from(c.between(0, 2 * OFF_MS_MAX)).unwrap() - i64::try_from(OFF_MS_MAX).unwrap();
        Node { machine: Arc::new(Machine::numbered(n + 1, if c.coin() { off_ms } else { 0 })), ..Node::default() }
    };
    (0..nodes as u64).map(|n| machine(n, c)).collect()
}

/// Starts a run of a node, and goes on trying while the database is away or its clock is wrong.
pub fn start(world: &Arc<World>, n: usize, runtime: Arc<SimRuntime>, seed: u64) {
    let Some(database) = world.database.clone() else { return };
    let (world, of) = (Arc::clone(world), Arc::clone(&runtime));
    of.spawn(Box::pin(async move {
        for attempt in 0.. {
            let link = Link { database: Arc::clone(&database), node: n, runtime: Arc::clone(&runtime) };
            if let Some(why) = try_to(&world, link, seed.wrapping_add(attempt)).await {
                world.oracle.say(|| format!("broker {n} doesn't start: {why}"));
                runtime.sched.sleep_ms(START_AGAIN_MS).await;
            } else {
                return;
            }
        }
    }));
}

/// Why it doesn't start now.
async fn try_to(world: &World, link: Link, seed: u64) -> Option<String> {
    let (n, runtime) = (link.node, Arc::clone(&link.runtime));
    let store = match open(link, !seed).await {
        Ok(store) => store,
        Err(error) => {
            if !matches!(error, OpenError::Database(_) | OpenError::Clock { .. }) {
                world.oracle.violated(format!("broker {n} can't be started: {error}"));
            }
            return Some(error.to_string());
        }
    };
    let (run, at) = match store.last_run().await {
        Ok(last) => last,
        Err(error) => return Some(error.to_string()),
    };
    let start = run_clock::start(run.as_ref(), at, runtime.as_ref());
    let is = EPOCH_MS + world.sched.now_ms();
    world.oracle.starts_at_ms_off(i64::try_from(start.at.0).unwrap() - i64::try_from(is).unwrap());
    match assemble(runtime, store, start, &world.targets, seed) {
        Ok(process) => *world.nodes[n].process.lock() = Some(process),
        Err(why) => world.oracle.violated(format!("broker {n} can't be started: {why}")),
    }
    None
}

/// How rough a schedule is, drawn from its seed.
#[derive(Debug, Clone, Copy)]
pub struct Weather {
    kills: u64,
    targets: u64,
    clocks: u64,
    pauses: u64,
    cuts: u64,
    outages: u64,
    stops: u64,
    calm_ms: u64,
}

impl Weather {
    pub fn draw(c: &mut Choices) -> Self {
        let mut some = |max: u64| if c.chance(600) { c.below(max) } else { 0 };
        Self {
            kills: some(10),
            targets: some(10),
            clocks: some(3),
            pauses: some(8),
            cuts: some(8),
            outages: some(4),
            stops: some(4),
            calm_ms: 3_000 + some(30_000),
        }
    }
}

pub async fn weather(world: Arc<World>, weather: Weather) {
    let mut c = world.choices();
    if world.database.as_ref().is_some_and(|d| d.is_rough()) {
        world.oracle.disk_is_ill();
    }
    while world.is_day() {
        world.sleep(c.between(200, weather.calm_ms)).await;
        if !world.is_day() {
            return;
        }
        let w = weather;
        let all = [w.kills, w.targets, w.clocks, w.pauses, w.cuts, w.outages, w.stops];
        let kind = weighted(&all, &mut c);
        let (n, now) = (c.below(world.nodes.len() as u64) as usize, world.sched.now_ms());
        let node = &world.nodes[n];
        match kind {
            Some(0) => kill(node, &mut c),
            Some(1) => ill(&world, &mut c),
            Some(2) => set_clock(&world, node, &mut c),
            Some(3) => {
                // Mostly about as long as a run lasts.
                let ms = if c.chance(250) { c.between(500, 200_000) } else { c.between(5_000, 30_000) };
                away(&world, &format!("broker {n} stands still"), ms);
                node.control.lock().paused_until_ms = Some(now + ms);
            }
            Some(4) => {
                let ms = c.between(100, 40_000);
                away(&world, &format!("broker {n} is cut off from the database"), ms);
                world.database.iter().for_each(|d| d.cut(n, now + ms));
            }
            Some(5) => {
                let ms = if c.coin() { c.between(1, 300) } else { c.between(300, 40_000) };
                away(&world, "the database is restarted", ms);
                world.database.iter().for_each(|d| d.restart(now + ms));
            }
            Some(6) => node.control.lock().stop = true,
            _ => {}
        }
    }
}

/// What can't be recorded now is done all the same.
fn away(world: &World, what: &str, ms: u64) {
    world.oracle.disk_is_ill();
    world.oracle.say(|| format!("{what}, for {ms} ms"));
}

fn kill(node: &Node, c: &mut Choices) {
    let down_ms = if c.chance(200) { c.between(1_000, 200_000) } else { c.between(10, 15_000) };
    let death = if c.chance(300) { Death::Power } else { Death::Process };
    let mut control = node.control.lock();
    if control.dies_in_steps.is_none() {
        (control.down_ms, control.death, control.dies_in_steps) = (down_ms, death, Some(c.between(1, 400)));
    }
}
