//! The simulation, as far as it is quick: seeds that once found something, a few new ones, and that a seed is a schedule.
//! Ten thousand seeds, and the faults that must be found, are `.ci/run`'s part.

#[path = "sim/mod.rs"]
mod sim;

use std::time::Duration;

use countersign::time::{Clock as _, SystemClock};
use parking_lot::Mutex;
use sim::runner::{Sum, many};

/// Seeds that failed once, for ever. They are told apart from the code by what they found, see `docs/simulation.md`.
const CORPUS: [u64; 17] = [
    44,
    45,
    112,
    141,
    187,
    241,
    261,
    855,
    1_185,
    1_623,
    1_758,
    2_709,
    4_307,
    4_630,
    5_651,
    8_000_462,
    1_796_036_922_001_949,
];

#[test]
fn seeds_that_once_failed_are_well() {
    sim::notice_panics();
    for seed in CORPUS {
        let outcome = sim::run(seed, false);
        assert_eq!(outcome.violation, None, "cargo run --release --example sim -- --seed {seed}");
    }
}

#[test]
fn a_seed_is_one_schedule() {
    for seed in 1..6 {
        let (once, again) = (sim::run(seed, false), sim::run(seed, false));
        assert_eq!((once.trace, once.steps), (again.trace, again.steps), "seed {seed}");
    }
}

/// Of three nodes on one database.
const CORPUS_OF_NODES: [u64; 8] = [4, 89, 204, 412, 1_011, 5_014, 6_462, 6_627];

#[test]
fn seeds_of_several_nodes_that_once_failed_are_well() {
    sim::notice_panics();
    for seed in CORPUS_OF_NODES {
        let outcome = sim::run_of(3, seed, false);
        assert_eq!(outcome.violation, None, "cargo run --release --example sim -- --nodes 3 --seed {seed}");
    }
}

#[test]
fn a_seed_of_several_nodes_is_one_schedule() {
    for seed in 1..4 {
        let (once, again) = (sim::run_of(3, seed, false), sim::run_of(3, seed, false));
        assert_eq!((once.trace, once.steps), (again.trace, again.steps), "seed {seed}");
    }
}

#[test]
fn new_seeds_are_well_and_something_happens_in_them() {
    seeds(0, SystemClock.wall().0 << 20, 40);
}

#[test]
fn seeds_of_several_nodes_are_well_and_something_happens_in_them() {
    seeds(3, 6_600, 10);
}

fn seeds(nodes: usize, first: u64, count: u64) {
    sim::notice_panics();
    let sum = Mutex::new(Sum::default());
    many(nodes, first, count, Duration::from_secs(120), false, &sum, &|_, _| {});
    let sum = sum.into_inner();
    let again = |seed: &u64| format!("cargo run --release --example sim -- --nodes {nodes} --seed {seed}");
    let again = sum.violations.first().map(|(seed, _)| again(seed));
    assert!(sum.violations.is_empty(), "{again:?}: {:#?}", sum.violations);
    assert!(sum.minted > sum.seeds && sum.handed_over > sum.seeds && sum.votes > sum.seeds, "{sum:#?}");
}
