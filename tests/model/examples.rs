//! States that must be met on the way: a model that never gets there proves little.

use stateright::Property;

use super::cast::{CHILD, OVERLAP, PARENT, SLOTS};
use super::story::{Phase, Story, There, Told};
use super::world::{Countersign, Scope, World};

/// What must occur somewhere, or the model explores less than it says.
pub fn examples(scope: &Scope) -> Vec<Property<Countersign>> {
    fn is(world: &World, grant: usize, phase: Phase) -> bool {
        world.seats[grant].is_some_and(|s| s.story.phase == phase)
    }
    fn works(world: &World, grant: usize) -> bool {
        world.seats[grant].is_some_and(|s| s.story.leases.contains(&Told::Live { released: true }))
    }
    fn any(world: &World, fits: impl Fn(&Story, Told, There) -> bool) -> bool {
        world.seats.iter().flatten().any(|s| (0..SLOTS).any(|i| fits(&s.story, s.story.leases[i], s.there[i])))
    }
    let mut all = vec![
        Property::sometimes("a mint in doubt is still under way", |_: &Countersign, w| {
            any(w, |_, told, there| matches!(told, Told::InDoubt { .. }) && there == There::UnderWay)
        }),
        Property::sometimes("a mint arrives when its grant is over", |_, w: &World| {
            any(w, |story, told, there| {
                story.phase == Phase::Ending && matches!(told, Told::InDoubt { .. }) && there == There::Yes
            })
        }),
        Property::sometimes("time is up before the credential is gone", |_, w: &World| {
            any(w, |story, told, there| story.phase == Phase::Ending && told == Told::BeingEnded && there == There::Yes)
        }),
    ];
    if scope.asks[PARENT] && scope.asks[OVERLAP] {
        all.push(Property::sometimes("two credentials for the same thing work", |_, w: &World| {
            works(w, PARENT) && works(w, OVERLAP)
        }));
        all.push(Property::sometimes("one of them is gone, the other works", |_, w: &World| {
            let gone = w.seats[OVERLAP].is_some_and(|s| s.story.leases.contains(&Told::Gone));
            is(w, OVERLAP, Phase::Final) && gone && works(w, PARENT)
        }));
    }
    if scope.asks[PARENT] && scope.asks[CHILD] {
        all.push(Property::sometimes("parent and child have a credential each", |_, w: &World| {
            works(w, PARENT) && works(w, CHILD)
        }));
        all.push(Property::sometimes("a child's credential is ended because its parent is", |_, w: &World| {
            let ending = w.seats[CHILD].is_some_and(|s| s.story.leases.contains(&Told::BeingEnded));
            is(w, PARENT, Phase::Ending) && is(w, CHILD, Phase::Ending) && ending
        }));
    }
    if scope.reassess.contains(&true) {
        all.push(Property::sometimes("what policy narrowed is in force", |_, w: &World| {
            w.seats.iter().flatten().any(|s| s.story.phase == Phase::InForce && s.story.standing == 1)
        }));
    }
    if scope.slots.iter().any(|n| *n > 1) {
        all.push(Property::sometimes("a credential is replaced while the old one is being ended", |_, w: &World| {
            w.seats
                .iter()
                .flatten()
                .any(|s| s.story.leases[0] == Told::BeingEnded && matches!(s.story.leases[1], Told::Live { .. }))
        }));
    }
    if scope.crash {
        all.push(Property::sometimes("a broker stopped in the middle of a mint", |_, w: &World| {
            w.crashed && any(w, |_, told, there| matches!(told, Told::InDoubt { .. }) && there == There::UnderWay)
        }));
    }
    if scope.freeze {
        all.push(Property::sometimes("a freeze found a credential", |_, w: &World| {
            w.frozen && any(w, |_, told, there| told == Told::BeingEnded && there == There::Yes)
        }));
    }
    all
}
