//! The shipped example: it loads, its policies validate, its table of cases passes and covers every rule.

mod support;

use countersign::config::load::load;
use countersign::policy::{Engine, table};
use support::Example;

#[test]
fn the_example_loads_and_warns_of_nothing_but_passkeys() {
    let example = Example::new();
    let loaded = load(&example.file("countersign.toml")).unwrap();
    // Promised by the tier, and not built yet: it is said.
    let warnings: Vec<&str> = loaded.warnings.iter().map(|w| w.what.as_str()).collect();
    assert!(matches!(warnings.as_slice(), [one] if one.contains("passkeys are not enforced yet")), "{warnings:?}");
    let engine = Engine::load(&loaded.policies, &loaded.catalogue, &loaded.config.tier).unwrap();
    let summary = engine.check();
    // No resource of the example is administered: the rule stands for those of the reader.
    assert_eq!(summary.warnings, Vec::<String>::new(), "{summary}");
    assert!(summary.to_string().contains("critical     2 approvals, at most 900 s"), "{summary}");
}

#[test]
fn every_case_passes_and_every_rule_has_one() {
    let example = Example::new();
    let loaded = load(&example.file("countersign.toml")).unwrap();
    let engine = Engine::load(&loaded.policies, &loaded.catalogue, &loaded.config.tier).unwrap();
    let text = std::fs::read_to_string(example.file("policies/cases.toml")).unwrap();
    let report = table::run(&engine, "cases.toml", &text).unwrap();
    assert!(report.passed(), "{report}");
    // Nothing in the example is administered; tests/policy_engine.rs has that rule's case.
    assert_eq!(report.uncovered, ["critical-administer"]);
}

#[test]
fn the_limits_shown_are_the_defaults() {
    let example = Example::new();
    let shown = load(&example.file("countersign.toml")).unwrap().config.limits;
    let default = countersign::config::Limits::default();
    assert_eq!(serde_json::to_value(shown).unwrap(), serde_json::to_value(default).unwrap());
}

#[test]
fn hashes_are_of_the_meaning() {
    let example = Example::new();
    let file = example.file("countersign.toml");
    let before = load(&file).unwrap();
    example.replace("countersign.toml", "# --- who people are", "# --- people");
    let after = load(&file).unwrap();
    assert_eq!(before.hashes().unwrap(), after.hashes().unwrap());

    let name = countersign::core::id::ResourceName::new("postgres/billing").unwrap();
    let other = countersign::core::id::ResourceName::new("postgres/sandbox").unwrap();
    let hash = |l: &countersign::config::Loaded, n| l.catalogue.entry_hash(n).unwrap().unwrap();
    example.replace("catalogue.toml", "billing_invoices_read", "billing_invoices_all");
    let changed = load(&file).unwrap();
    assert_ne!(hash(&before, &name), hash(&changed, &name), "an action's settings are in the hash (D11)");
    assert_eq!(hash(&before, &other), hash(&changed, &other));
    example.replace("catalogue.toml", "billing-db.corp.example", "elsewhere.corp.example");
    assert_ne!(hash(&changed, &name), hash(&load(&file).unwrap(), &name), "the target is in the hash (D11)");
    let (a, b) = (before.hashes().unwrap(), changed.hashes().unwrap());
    assert_eq!((a.config, a.policies), (b.config, b.policies));
    assert_ne!(a.catalogue, b.catalogue);
}
