//! The property: whatever is tried, in whatever order, with whatever clock, the guarantees hold.

use std::collections::BTreeMap;
use std::sync::Mutex;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestError, TestRunner};

use super::steps::{Step, step};
use super::world::World;
use super::{Checked, probes};

/// Histories in one run; `PROPTEST_CASES` asks for more.
const HISTORIES: u32 = 250;
/// Steps in one history.
const STEPS_MAX: usize = 100;

/// What must have been met in a run, or the run has shown nothing.
const MET: [&str; 36] = [
    "in force by itself",
    "in force by one",
    "in force by two",
    "child",
    "grandchild",
    "child in force",
    "grandchild in force",
    "handed over",
    "over before its lease was known",
    "votes voided",
    "assessed again",
    "intended",
    "prepared",
    "live",
    "late answer",
    "unknown",
    "looked for again",
    "retried",
    "replaced",
    "revoked",
    "absent",
    "ended",
    "denied",
    "lapsed",
    "cancelled",
    "withdrawn",
    "state",
    "digest",
    "excluded",
    "voted already",
    "not approved",
    "not narrower",
    "lease exists",
    "no lease",
    "attested",
    "not resisting",
];

fn live_through(steps: &[Step], tally: &Mutex<BTreeMap<&'static str, u64>>) -> Checked {
    let mut world = World::new();
    for (n, step) in steps.iter().enumerate() {
        world.step(step).map_err(|e| format!("{e} (step {n}: {step:?})"))?;
    }
    probes::events_stay_at_home(&world)?;
    let mut tally = tally.lock().map_err(|e| e.to_string())?;
    for grant in world.grants.values().flatten() {
        *tally.entry(grant.state.word()).or_default() += 1;
    }
    probes::everything_ends(&mut world)?;
    probes::final_means_final(&mut world)?;
    probes::replay_is_identical(&world)?;
    for (what, count) in world.oracle.tally {
        *tally.entry(what).or_default() += count;
    }
    Ok(())
}

#[test]
fn guarantees_hold_in_every_history() {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(HISTORIES);
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let tally = Mutex::new(BTreeMap::new());
    let histories = prop::collection::vec(step(), 1..STEPS_MAX);
    let outcome =
        TestRunner::new(config).run(&histories, |steps| live_through(&steps, &tally).map_err(TestCaseError::fail));
    match outcome {
        Ok(()) => {}
        Err(TestError::Fail(why, steps)) => panic!("{why}\nafter {} steps: {steps:#?}", steps.len()),
        Err(TestError::Abort(why)) => panic!("{why}"),
    }
    let tally = tally.into_inner().expect("no history panicked");
    let missing: Vec<_> = MET.iter().filter(|what| !tally.contains_key(*what)).collect();
    assert!(missing.is_empty(), "never met: {missing:?} in {tally:#?}");
}
