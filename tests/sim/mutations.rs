//! Shows that the simulator bites: the broker is broken in each of the ways of [`Mutation`], and each must be found.

use std::time::{Duration, Instant};

use countersign::mutation::Mutation;
use parking_lot::Mutex;

use super::runner::{Sum, many};

/// Nodes, for the faults that one process can't show.
const NODES: usize = 3;

/// The faults that weren't found within so many seeds.
pub fn missed(first: u64, seeds: u64) -> Vec<Mutation> {
    let mut missed = Vec::new();
    for mutation in Mutation::ALL {
        let nodes = if mutation.needs_nodes() { NODES } else { 0 };
        Mutation::set(Some(mutation));
        let (sum, begun) = (Mutex::new(Sum::default()), Instant::now());
        many(nodes, first, seeds, Duration::MAX, true, &sum, &|_, _| {});
        let sum = sum.into_inner();
        let took = begun.elapsed().as_secs_f32();
        match sum.violations.first() {
            Some((seed, violation)) => {
                println!("{mutation:?}: found after {} seeds ({took:.1} s), seed {seed}: {violation}", sum.seeds);
            }
            None => {
                println!("{mutation:?}: NOT found in {} seeds ({took:.1} s)", sum.seeds);
                missed.push(mutation);
            }
        }
    }
    Mutation::set(None);
    missed
}
