//! What an agent writes → a permission: complete, within the catalogue, or refused with what it could have meant.

#[path = "support/world.rs"]
mod world;

use std::collections::BTreeSet;

use countersign::config::request::{RequestProblem, normalise, normalise_all, wire_form};
use countersign::core::id::ConstraintName;
use countersign::core::permission::{CONSTRAINT_VALUES_MAX, Constraint, PERMISSIONS_MAX};
use serde_json::{Value, json};
use world::*;

fn refused(entry: Value) -> RequestProblem {
    normalise(&catalogue(), &entry, &|_| true).unwrap_err()
}

fn customers(more: Value) -> Value {
    let mut entry = json!({"type": "postgres", "identifier": "db/customers", "actions": ["read"]});
    entry.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    entry
}

/// What an agent may know of costs an evaluation for each action of the catalogue: only a hint is worth that.
#[test]
fn a_request_without_faults_does_not_ask_what_its_agent_may_know() {
    let entry = customers(json!({"tables": ["a"], "rows": 7}));
    let permission = normalise(&catalogue(), &entry, &|name| panic!("{name} was looked up")).unwrap();
    assert_eq!(permission.resource.as_str(), "db/customers");
}

#[test]
fn every_bound_is_explicit_afterwards() {
    let p = wire(customers(json!({})));
    let get = |n: &str| p.constraints[&ConstraintName::new(n).unwrap()].clone();
    assert_eq!(get("tables"), Constraint::Set(BTreeSet::from(["a".to_owned(), "b".to_owned()])));
    assert_eq!(get("rows"), Constraint::Max(100));
    let narrower = wire(customers(json!({"tables": ["a", "a"], "rows": 7})));
    assert!(narrower.narrows(&p) && !p.narrows(&narrower));
    let paths =
        wire(json!({"type": "token", "identifier": "web/out", "actions": ["post"], "paths": ["/pub/x/y", "/one"]}));
    assert!(paths.narrows(&permission("web/out", &["post"])));
}

#[test]
fn what_is_granted_is_told_in_the_same_form() {
    for entry in [
        customers(json!({"tables": ["b"], "rows": 3})),
        json!({"type": "token", "identifier": "web/out", "actions": ["post"]}),
    ] {
        let p = wire(entry);
        assert_eq!(wire(wire_form(&catalogue(), &p)), p);
    }
}

#[test]
fn unknown_names_are_refused_with_the_nearest() {
    let p = refused(json!({"type": "postgres", "identifier": "db/custmers", "actions": ["read"]}));
    assert_eq!(
        (p.field.as_deref(), p.nearest.as_slice()),
        (Some("identifier"), ["db/customers".to_owned()].as_slice())
    );
    assert!(p.to_string().contains(
        "there is no resource `db/custmers`; GET /v1/catalogue lists what you may ask for; perhaps: db/customers"
    ));
    let p = refused(json!({"type": "postgres", "identifier": "db/customers", "actions": ["rad"]}));
    assert_eq!((p.field.as_deref(), p.nearest.as_slice()), (Some("actions"), ["read".to_owned()].as_slice()));
    assert!(p.what.contains("db/customers has no action `rad`"), "{p}");
    let p = refused(customers(json!({"table": ["a"]})));
    assert_eq!((p.field.as_deref(), p.nearest.as_slice()), (Some("table"), ["tables".to_owned()].as_slice()));
    assert!(
        p.what.contains("unknown field `table`; this resource knows type, identifier, actions, rows, tables"),
        "{p}"
    );
    assert!(
        refused(customers(json!({"paths": ["/"]}))).what.contains("unknown field `paths`"),
        "another resource's bound"
    );
}

#[test]
fn hints_name_only_what_the_agent_is_told() {
    let nothing = |_: &_| false;
    let told = |entry: Value| normalise(&catalogue(), &entry, &nothing).unwrap_err();
    assert!(told(json!({"type": "postgres", "identifier": "db/custmers", "actions": ["read"]})).nearest.is_empty());
    let p = told(json!({"type": "postgres", "identifier": "db/customers", "actions": ["rad"]}));
    assert!(p.nearest.is_empty() && !p.what.contains("read"), "{p}");
    let p = told(customers(json!({"table": ["a"]})));
    assert!(p.nearest.is_empty() && !p.what.contains("rows"), "{p}");
    let p = told(json!({"type": "token", "identifier": "db/customers", "actions": ["read"]}));
    assert!(!p.what.contains("postgres"), "{p}");
}

#[test]
fn beyond_the_catalogue_is_refused() {
    for (more, says) in [
        (json!({"tables": ["a", "c"]}), "`tables` goes beyond the catalogue"),
        (json!({"rows": 101}), "`rows` goes beyond the catalogue: at most 100"),
        (json!({"rows": -1}), "`rows` must be a whole number"),
        (json!({"rows": 1.5}), "`rows` must be a whole number"),
        (json!({"rows": "5"}), "`rows` must be a whole number"),
        (json!({"tables": []}), "`tables` must be a list of 1 to 256"),
        (json!({"tables": "a"}), "`tables` must be a list of 1 to 256"),
        (json!({"tables": [1]}), "each of `tables` must be a text"),
        (json!({"tables": [""]}), "each of `tables` must be a text"),
        (json!({"tables": null}), "`tables` must be a list"),
        (json!({"tables": ["x".repeat(513)]}), "each of `tables` must be a text of 1 to 512 bytes"),
    ] {
        let p = refused(customers(more.clone()));
        assert!(p.what.contains(says), "{more}: {p}");
    }
    let many: Vec<String> = (0..=CONSTRAINT_VALUES_MAX).map(|i| i.to_string()).collect();
    assert!(refused(customers(json!({"tables": many}))).what.contains("1 to 256"));
}

#[test]
fn a16_paths_that_could_mean_something_else_are_refused() {
    for path in
        ["/pub/../secret", "/pub/%2e%2e/secret", "/pub//x", "/pub/./x", "pub/x", "/pub\\x", "/pub/?x", "/pub/\u{0}"]
    {
        let p = refused(json!({"type": "token", "identifier": "web/out", "actions": ["post"], "paths": [path]}));
        assert!(p.what.contains("each path must be absolute"), "{path}: {p}");
    }
    for path in ["/", "/pub", "/one/", "/public/"] {
        let p = refused(json!({"type": "token", "identifier": "web/out", "actions": ["post"], "paths": [path]}));
        assert!(p.what.contains("goes beyond the catalogue"), "{path}: {p}");
    }
}

#[test]
fn forms_that_are_none() {
    for (entry, field) in [
        (json!("db/customers"), "authorization_details"),
        (json!({"type": "postgres", "actions": ["read"]}), "identifier"),
        (json!({"type": "postgres", "identifier": 7, "actions": ["read"]}), "identifier"),
        (json!({"identifier": "db/customers", "actions": ["read"]}), "type"),
        (json!({"type": "token", "identifier": "db/customers", "actions": ["read"]}), "type"),
        (json!({"type": "postgres", "identifier": "db/customers"}), "actions"),
        (json!({"type": "postgres", "identifier": "db/customers", "actions": []}), "actions"),
        (json!({"type": "postgres", "identifier": "db/customers", "actions": "read"}), "actions"),
        (json!({"type": "postgres", "identifier": "db/customers", "actions": [1]}), "actions"),
        (json!({"type": "postgres", "identifier": "db/customers", "actions": vec!["read"; 33]}), "actions"),
    ] {
        assert_eq!(refused(entry.clone()).field.as_deref(), Some(field), "{entry}");
    }
}

#[test]
fn nothing_is_echoed_but_names() {
    for text in ["<script>", "\u{1b}[31m", "DB/CUSTOMERS", &"x".repeat(5000)] {
        for entry in [
            json!({"type": "postgres", "identifier": text, "actions": ["read"]}),
            json!({"type": text, "identifier": "db/customers", "actions": ["read"]}),
            json!({"type": "postgres", "identifier": "db/customers", "actions": [text]}),
            customers(json!({"tables": [text]})),
            customers(json!({text: 1})),
        ] {
            let told = format!("{:?} {}", refused(entry.clone()), refused(entry));
            assert!(!told.contains(text), "{told}");
        }
    }
}

#[test]
fn a_request_has_a_bounded_number_of_entries_and_says_which_is_wrong() {
    let good = customers(json!({}));
    let all = |entries: &[Value]| normalise_all(&catalogue(), entries, &|_| true);
    assert_eq!(all(&vec![good.clone(); PERMISSIONS_MAX]).unwrap().len(), PERMISSIONS_MAX);
    assert!(all(&vec![good.clone(); PERMISSIONS_MAX + 1]).unwrap_err().what.contains("1 to 16 permissions"));
    assert!(all(&[]).is_err());
    assert_eq!(all(&[good, json!(1)]).unwrap_err().entry, Some(1));
}
