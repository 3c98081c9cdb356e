//! The state machine, explored: the production `core::decide` and `Grant::apply` in every order of steps that a small world
//! has. `docs/model.md` says what is modelled, what isn't, and how many states there are.

#[path = "model/mod.rs"]
mod model;

use std::sync::atomic::Ordering;

use model::cast::{CHILD, GRANTS, OVERLAP, PARENT, SLOTS};
use model::world::{Countersign, Scope};
use stateright::{Checker, HasDiscoveries, Model};

/// Explores on one thread, to a depth or all there is, and says how much that was.
fn explore(name: &str, scope: Scope, depth: Option<usize>, at_least: usize) {
    let mut checker = Countersign::new(scope).checker().threads(1).finish_when(HasDiscoveries::AnyFailures);
    if let Some(depth) = depth {
        checker = checker.target_max_depth(depth);
    }
    let done = checker.spawn_bfs().join();
    let (checked, (grants, questions)) = (done.model().checked.load(Ordering::Relaxed), done.model().keeper.sizes());
    println!(
        "{name}: {checked} states looked at to depth {}, {} unique, {} steps; {grants} different grants, {questions} questions",
        done.max_depth(),
        done.unique_state_count(),
        done.state_count()
    );
    done.assert_properties();
    assert!(checked >= at_least, "{name}: only {checked} states");
}

/// A world in which these agents ask, with so many leases a grant, a freeze, a crash, and a policy that changes its mind.
fn scope(asks: [bool; GRANTS], slots: usize) -> Scope {
    Scope { asks, slots: [slots; GRANTS], last_tick: 4, reassess: [true; GRANTS], freeze: true, crash: true }
}

/// All of the world, as deep as a minute goes.
#[test]
fn everything_together() {
    explore("together", scope([true; GRANTS], 1), Some(14), 78_707);
}

/// All there is of a parent, its child and a crash.
#[test]
fn a_parent_and_its_child() {
    let mut asks = [false; GRANTS];
    (asks[PARENT], asks[CHILD]) = (true, true);
    explore("parent and child", scope(asks, 1), None, 23_382);
}

/// All there is of two grants for the same thing and a crash.
#[test]
fn two_that_overlap() {
    let mut asks = [false; GRANTS];
    (asks[PARENT], asks[OVERLAP]) = (true, true);
    explore("overlap", scope(asks, 1), None, 113_670);
}

/// All there is of one grant whose credential is replaced.
#[test]
fn one_that_is_replaced() {
    let mut asks = [false; GRANTS];
    asks[PARENT] = true;
    explore("replaced", scope(asks, SLOTS), None, 9_126);
}
