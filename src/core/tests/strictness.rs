//! Guarantee 12 for the journal: a field that the code doesn't know is an error, wherever it stands.

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};

use super::make::end_cause;
use super::steps::step;
use super::world::World;
use crate::core::event::{BrokerEvent, EndCause, Event, GrantEvent, Selector};
use crate::core::grant::Grant;
use crate::core::id::{AgentId, GrantId, PersonId, ResourceName, TaskKey, TaskName, Timestamp};
use crate::core::lease::Evidence;

/// Maps with keys of the operator's or a connector's own; an additional key there is no unknown field.
const FREE: [&str; 7] = ["attributes", "constraints", "targets", "handle", "hashes", "leases", "seen"];

/// The value, once for each object in it that has fields, with one field too many.
fn with_one_too_many(value: &Value) -> Vec<Value> {
    fn walk(root: &Value, at: &str, free: bool, all: &mut Vec<Value>) {
        match root.pointer(at) {
            Some(Value::Object(map)) => {
                if !free {
                    let mut more = root.clone();
                    more.pointer_mut(at).unwrap()["zz_unknown"] = json!(1);
                    all.push(more);
                }
                for key in map.keys().filter(|k| *k != "handle") {
                    walk(root, &format!("{at}/{key}"), FREE.contains(&key.as_str()), all);
                }
            }
            Some(Value::Array(items)) => {
                (0..items.len()).for_each(|n| walk(root, &format!("{at}/{n}"), false, all));
            }
            _ => {}
        }
    }
    let mut all = Vec::new();
    walk(value, "", false, &mut all);
    all
}

fn strict<T: serde::de::DeserializeOwned + PartialEq + std::fmt::Debug>(value: &Value, expected: &T) {
    assert_eq!(&serde_json::from_value::<T>(value.clone()).unwrap(), expected);
    for more in with_one_too_many(value) {
        assert!(serde_json::from_value::<T>(more.clone()).is_err(), "taken: {more}");
        assert!(serde_json::from_str::<T>(&more.to_string()).is_err(), "taken as text: {more}");
    }
}

#[test]
fn an_unknown_field_in_a_grants_event_or_state_is_an_error() {
    let mut runner = TestRunner::deterministic();
    let mut words = std::collections::BTreeSet::new();
    for _ in 0..40 {
        let steps = prop::collection::vec(step(), 60).new_tree(&mut runner).unwrap().current();
        let mut world = World::new();
        for step in &steps {
            world.step(step).unwrap();
        }
        for (_, text) in &world.journal {
            let event: Event = serde_json::from_str(text).unwrap();
            let Event::Grant { what, .. } = &event else { panic!("not about a grant") };
            if words.insert(what.word()) {
                strict(&json!(event), &event);
            }
        }
        for grant in world.grants.values().flatten() {
            if words.insert(grant.state.word()) {
                strict::<Grant>(&json!(grant), grant);
            }
        }
    }
    assert!(words.len() >= 20, "too few kinds were met: {words:?}");
}

#[test]
fn an_unknown_field_in_any_other_event_is_an_error() {
    let agent = AgentId::new("spiffe://corp/a").unwrap();
    let person = PersonId::new("ana").unwrap();
    let resource = ResourceName::new("pg").unwrap();
    let task = TaskKey { agent: agent.clone(), task: TaskName::new("t").unwrap() };
    let grant = GrantId::from_bytes([1; 16]);
    let frozen = |selector| Event::Frozen { id: 1, selector, by: person.clone(), reason: "r".into() };
    let broker = |what| Event::Broker { what };
    let evidence = Evidence::Expired { not_after: Timestamp(1), skew_secs: 1 };
    let target = resource.clone();
    let all = [
        Event::TaskCompleted { task: task.clone() },
        frozen(Selector::All),
        frozen(Selector::Agent(agent.clone())),
        frozen(Selector::Task(task)),
        frozen(Selector::Resource(resource.clone())),
        Event::Unfrozen { id: 1, by: person.clone() },
        broker(BrokerEvent::RunStarted {
            version: "1".into(),
            boot_id: "b".into(),
            boot_ms: 1,
            wall: Timestamp(1),
            starts_at: Timestamp(1),
            clock_set_back: false,
        }),
        broker(BrokerEvent::RunEnded),
        broker(BrokerEvent::ConfigurationLoaded { hashes: [].into() }),
        broker(BrokerEvent::OrphanFound { target: target.clone(), name: "n".into() }),
        broker(BrokerEvent::OrphanGone { target, name: "n".into(), evidence }),
        broker(BrokerEvent::Refused { agent, problem: "p".into(), count: 1 }),
        broker(BrokerEvent::VoteRefused { grant, person: person.clone(), problem: "p".into() }),
        broker(BrokerEvent::VotesRefused { person, problem: "p".into(), count: 2 }),
        broker(BrokerEvent::Restored {
            records: 1,
            root: "r".into(),
            made_at: Timestamp(1),
            newest_size: None,
            newest_root: None,
            may_lack_records: true,
        }),
        broker(BrokerEvent::Replaced { grant }),
    ];
    for event in &all {
        strict(&json!(event), event);
    }
    for n in 0..10 {
        let cause: EndCause = end_cause(n);
        strict(&json!(cause), &cause);
        let event = GrantEvent::Withdrawn { cause };
        strict(&json!(event), &event);
    }
    strict(&json!(EndCause::ParentEnded), &EndCause::ParentEnded);
}
