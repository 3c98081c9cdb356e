//! A small catalogue and tiers for tests of the policy engine.

#![allow(dead_code)] // each test file uses a part

use countersign::config::{Catalogue, Problem, request};
use countersign::core::id::{AgentId, PersonId, ResourceName, TaskName, TierName};
use countersign::core::permission::Permission;
use countersign::core::tier::Tier;
use countersign::policy::{AgentFacts, AssessInput, Assessment, Engine, Outcome, TaskFacts};
use serde_json::{Value, json};

pub const CATALOGUE: &str = r#"
environment = [{ name = "sandbox", reaches_production = false }, { name = "prod", reaches_production = true }]
target = [{ name = "db", kind = "postgres" }, { name = "tokens", kind = "token" }]

[[resource]]
name = "db/customers"
target = "db"
title = "customers"
environment = "prod"
sensitivity = "customer"
labels = ["customer-data"]
constraint = { tables = { kind = "set", values = ["a", "b"] }, rows = { kind = "max", max = 100 } }
action = [
    { name = "read", effect = "read" },
    { name = "write", effect = "write", reversible = true },
    { name = "drop", effect = "delete" },
    { name = "grant", effect = "administer" },
]

[[resource]]
name = "db/play"
target = "db"
title = "play"
environment = "sandbox"
isolated = true
sensitivity = "none"
action = [{ name = "read", effect = "read" }, { name = "write", effect = "write", reversible = true }]

[[resource]]
name = "web/out"
target = "tokens"
title = "web"
environment = "prod"
sensitivity = "none"
labels = ["outside"]
constraint = { paths = { kind = "paths", values = ["/pub/", "/one"] } }
action = [{ name = "post", effect = "write" }]
"#;

pub fn catalogue() -> Catalogue {
    toml::from_str(CATALOGUE).unwrap()
}

/// observe (0 votes, 3600 s), export (1, 1800 s), change (1, 900 s), critical (2, 1200 s).
pub fn tiers() -> Vec<Tier> {
    serde_json::from_value(json!([
        {"name": "observe", "approvals": 0, "life_secs_max": 3600, "friction": "none"},
        {"name": "export", "approvals": 1, "life_secs_max": 1800, "friction": "one"},
        {"name": "change", "approvals": 1, "life_secs_max": 900, "friction": "high"},
        {"name": "critical", "approvals": 2, "life_secs_max": 1200, "friction": "critical"},
    ]))
    .unwrap()
}

pub fn try_engine(policies: &str) -> Result<Engine, Vec<Problem>> {
    Engine::load(&[("p.cedar".to_owned(), policies.to_owned())], &catalogue(), &tiers())
}

pub fn engine(policies: &str) -> Engine {
    try_engine(policies).unwrap_or_else(|p| panic!("{p:?}"))
}

pub fn resource(name: &str) -> ResourceName {
    ResourceName::new(name).unwrap()
}

/// A permission with all bounds of the catalogue.
pub fn permission(name: &str, actions: &[&str]) -> Permission {
    let kind = if name.starts_with("db/") { "postgres" } else { "token" };
    wire(json!({"type": kind, "identifier": name, "actions": actions}))
}

pub fn wire(entry: Value) -> Permission {
    request::normalise(&catalogue(), &entry, &|_| true).unwrap()
}

pub fn agent() -> AgentFacts {
    AgentFacts {
        id: AgentId::new("spiffe://corp/agent/one").unwrap(),
        issuer: "spiffe://corp".to_owned(),
        method: "x509-svid".to_owned(),
        attributes: [("repository".to_owned(), "acme/app".to_owned())].into(),
        owner: Some(PersonId::new("ana").unwrap()),
        team: Some("platform".to_owned()),
        groups: ["ops".to_owned()].into(),
        tier_max: None,
    }
}

pub fn task() -> TaskFacts {
    TaskFacts {
        name: TaskName::new("T-1").unwrap(),
        depth: 0,
        life_secs: 600,
        recent_requests: 0,
        intent_labels: ["routine".to_owned()].into(),
    }
}

pub fn ask(permissions: Vec<Permission>) -> AssessInput {
    AssessInput { agent: agent(), permissions, task: task(), tree_holds: vec![], held: vec![] }
}

/// The tier's name, or `deny RULE`.
pub fn short(a: &Assessment) -> String {
    match &a.outcome {
        Outcome::Permit { tier, .. } => tier.name.to_string(),
        Outcome::Deny { rule, .. } => format!("deny {rule}"),
    }
}

pub fn tier_name(name: &str) -> TierName {
    TierName::new(name).unwrap()
}
