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

/// All of the world, as deep as a minute goes.
#[test]
fn everything_together() {
    let scope = Scope {
        asks: [true; GRANTS],
        slots: [1; GRANTS],
        last_tick: 4,
        reassess: [true; GRANTS],
        freeze: true,
        crash: true,
    };
    explore("together", scope, Some(14), 78_707);
}

/// All there is of a parent, its child and a crash.
#[test]
fn a_parent_and_its_child() {
    let mut scope = Scope {
        asks: [false; GRANTS],
        slots: [1; GRANTS],
        last_tick: 4,
        reassess: [true; GRANTS],
        freeze: true,
        crash: true,
    };
    (scope.asks[PARENT], scope.asks[CHILD]) = (true, true);
    explore("parent and child", scope, None, 23_382);
}

/// All there is of two grants for the same thing and a crash.
#[test]
fn two_that_overlap() {
    let mut scope = Scope {
        asks: [false; GRANTS],
        slots: [1; GRANTS],
        last_tick: 4,
        reassess: [true; GRANTS],
        freeze: true,
        crash: true,
    };
    (scope.asks[PARENT], scope.asks[OVERLAP]) = (true, true);
    explore("overlap", scope, None, 113_670);
}

/// All there is of one grant whose credential is replaced.
#[test]
fn one_that_is_replaced() {
    let mut scope = Scope {
        asks: [false; GRANTS],
        slots: [SLOTS; GRANTS],
        last_tick: 4,
        reassess: [true; GRANTS],
        freeze: true,
        crash: true,
    };
    scope.asks[PARENT] = true;
    explore("replaced", scope, None, 9_126);
}
