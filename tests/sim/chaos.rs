//! What goes wrong: kills between any two steps and in the middle of a write, power cuts, pauses, clocks that are set,
//! targets that are ill, disks that are full, fail, or lose what was not synced.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use super::target::Health;
use super::{Choices, Death, Node, World};

/// How rough a schedule is, drawn from its seed.
#[derive(Debug, Clone, Copy)]
pub struct Weather {
    kills: u64,
    targets: u64,
    clocks: u64,
    pauses: u64,
    disk: u64,
    stops: u64,
    calm_ms: u64,
}

impl Weather {
    pub fn draw(c: &mut Choices) -> Self {
        let mut some = |max: u64| if c.chance(600) { c.below(max) } else { 0 };
        Self {
            kills: some(10),
            targets: some(12),
            clocks: some(4),
            pauses: some(4),
            disk: some(6),
            stops: some(3),
            calm_ms: 5_000 + some(40_000),
        }
    }
}

/// One of them, as often as its weight says; none with a weight of one.
pub fn weighted(weights: &[u64], c: &mut Choices) -> Option<usize> {
    let mut pick = c.below(weights.iter().sum::<u64>() + 1);
    weights.iter().position(|weight| {
        let here = pick < *weight;
        pick = pick.saturating_sub(*weight);
        here
    })
}

pub async fn weather(world: Arc<World>, weather: Weather) {
    let mut c = world.choices();
    while world.is_day() {
        world.sleep(c.between(200, weather.calm_ms)).await;
        if !world.is_day() {
            return;
        }
        let w = weather;
        let all = [w.kills, w.targets, w.clocks, w.pauses, w.disk, w.stops];
        match weighted(&all, &mut c) {
            Some(0) => kill(&world, &mut c),
            Some(1) => ill(&world, &mut c),
            Some(2) => set_clock(&world, &world.nodes[0], &mut c),
            Some(3) => {
                let until_ms = world.sched.now_ms() + c.between(500, 200_000);
                world.nodes[0].control.lock().paused_until_ms = Some(until_ms);
            }
            Some(4) => disk(&world, &mut c),
            Some(5) => world.nodes[0].control.lock().stop = true,
            _ => {}
        }
    }
}

fn kill(world: &World, c: &mut Choices) {
    let node = &world.nodes[0];
    if node.process.lock().is_none() {
        return;
    }
    let down_ms = if c.chance(200) { c.between(1_000, 200_000) } else { c.between(10, 4_000) };
    let death = if c.chance(400) { Death::Power } else { Death::Process };
    let mut control = node.control.lock();
    if control.dies_in_steps.is_some() || control.dies_at_op.is_some() {
        return;
    }
    control.down_ms = down_ms;
    control.death = death;
    if c.coin() {
        control.dies_in_steps = Some(c.between(1, 400));
    } else {
        // In the middle of what the journal writes next.
        let dead_from = world.disk.ops() + c.below(12);
        world.disk.set(|d| d.dead_from = Some(dead_from));
        control.dies_at_op = Some(dead_from);
    }
}

pub fn ill(world: &Arc<World>, c: &mut Choices) {
    let target = Arc::clone(&world.targets[c.below(world.targets.len() as u64) as usize]);
    let health = match c.below(6) {
        0 | 1 => Health::Down,
        2 => Health::Hangs,
        3 => Health::Slow,
        _ => Health::Fails { before: c.below(500), after: c.below(600) },
    };
    let ms = if c.chance(50) { 20 * 60_000 } else { c.between(500, 60_000) };
    target.set(health);
    let (sched, sleeping) = (Arc::clone(&world.sched), world.sched.sleep_ms(ms));
    sched.spawn(
        super::sched::WORLD,
        Box::pin(async move {
            sleeping.await;
            target.set(Health::Well);
        }),
    );
}

pub fn set_clock(world: &Arc<World>, node: &Node, c: &mut Choices) {
    const YEARS: u64 = 10 * 365 * 86_400_000;
    let ms = match c.below(4) {
        0 => c.between(1, 2_000),
        1 => c.between(1_000, 120_000),
        2 => c.between(60_000, 86_400_000),
        _ => YEARS,
    };
    let off = i64::try_from(ms).unwrap() * if c.coin() { 1 } else { -1 };
    node.machine.wall_off.fetch_add(off, SeqCst);
    if c.chance(800) {
        // Somebody notices, and sets it right.
        let (machine, sleeping) = (Arc::clone(&node.machine), world.sched.sleep_ms(c.between(500, 90_000)));
        // At night all clocks of nodes are right: one that is set back to wrong would keep its node from starting.
        let (at_night, day_ends_ms) = (world.database.is_none(), world.day_ends_ms);
        let sched = Arc::clone(&world.sched);
        world.sched.spawn(
            super::sched::WORLD,
            Box::pin(async move {
                sleeping.await;
                if at_night || sched.now_ms() < day_ends_ms {
                    machine.wall_off.fetch_sub(off, SeqCst);
                }
            }),
        );
    }
}

fn disk(world: &Arc<World>, c: &mut Choices) {
    world.oracle.disk_is_ill();
    let disk = world.disk.clone();
    match c.below(3) {
        0 => disk.set(|d| d.fail_syncs = 1),
        1 => disk.set(|d| d.fail_writes = 1),
        _ => {
            let more = c.below(30_000);
            disk.set(|d| d.capacity = Some(d.used() + more));
            let sleeping = world.sched.sleep_ms(c.between(1_000, 90_000));
            world.sched.spawn(
                super::sched::WORLD,
                Box::pin(async move {
                    sleeping.await;
                    disk.set(|d| d.capacity = None);
                }),
            );
        }
    }
}
