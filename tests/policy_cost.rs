//! What an assessment costs with the shipped example. By hand, since a debug build says nothing:
//! `cargo test --release --test policy_cost -- --ignored --nocapture`

mod support;

use std::time::Instant;

use countersign::config::request;
use countersign::core::id::{AgentId, PersonId, TaskName};
use countersign::policy::{AgentFacts, AssessInput, Engine, Outcome, TaskFacts};
use serde_json::json;
use support::Example;

/// Microseconds for one permission with one action, a day's holdings in the context.
const ASSESS_US_MAX: f64 = 100.0;

#[test]
#[ignore = "a measurement of release builds; run it by hand"]
fn an_assessment_is_cheap() {
    let loaded = Example::new().load().unwrap();
    let engine = Engine::load(&loaded.policies, &loaded.catalogue, &loaded.config.tier).unwrap();
    let wire = |entry| request::normalise(&loaded.catalogue, &entry, &|_| true).unwrap();
    let read = wire(
        json!({"type": "postgres", "identifier": "postgres/billing", "actions": ["read"], "tables": ["invoices"]}),
    );
    let write = wire(json!({"type": "postgres", "identifier": "postgres/billing", "actions": ["write"]}));
    let input = AssessInput {
        agent: AgentFacts {
            id: AgentId::new("spiffe://corp.example/agent/ops/7").unwrap(),
            issuer: "spiffe://corp.example".to_owned(),
            method: "x509-svid".to_owned(),
            attributes: [("event_name".to_owned(), "push".to_owned())].into(),
            owner: Some(PersonId::new("ana").unwrap()),
            team: Some("platform".to_owned()),
            groups: ["ops".to_owned()].into(),
            tier_max: None,
        },
        permissions: vec![read.clone()],
        task: TaskFacts {
            name: TaskName::new("T-1").unwrap(),
            depth: 0,
            life_secs: 300,
            recent_requests: 3,
            intent_labels: ["routine".to_owned()].into(),
        },
        tree_holds: vec![write],
        held: vec![read; 20],
    };
    let runs = 2000;
    for _ in 0..200 {
        assert!(matches!(engine.assess(&input).outcome, Outcome::Permit { .. }));
    }
    let mut times: Vec<f64> = (0..runs)
        .map(|_| {
            let start = Instant::now();
            std::hint::black_box(engine.assess(std::hint::black_box(&input)));
            start.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    times.sort_by(f64::total_cmp);
    let (p50, p99) = (times[runs / 2], times[runs * 99 / 100]);
    println!("assess, one action: p50 {p50:.1} us, p99 {p99:.1} us");
    assert!(p50 <= ASSESS_US_MAX, "{p50} us");
}
