//! Mistakes in the catalogue, refused at their line with what to do.

mod support;

use support::{CAT, Example, each_is_refused, line, problems};

#[test]
fn the_catalogue() {
    each_is_refused(&[
        (
            CAT,
            "target = \"sandbox-db\"",
            "target = \"sandbox\"",
            "target = \"sandbox\"",
            "resource postgres/sandbox: no [[target]] is named `sandbox`; add it or correct the name",
        ),
        (
            CAT,
            "kind = \"vault\"",
            "kind = \"valt\"",
            "kind = \"valt\"",
            "there is no such connector; `kind` is one of token, postgres, vault",
        ),
        (
            CAT,
            "environment = \"prod\"",
            "environment = \"production\"",
            "environment = \"production\"",
            "environment `production` isn't declared; add [[environment]]",
        ),
        (CAT, "sensitivity = \"internal\"", "sensitivity = \"a/b\"", "a/b", "a sensitivity has 1 to 64"),
        (CAT, "labels = [\"outside\"]", "labels = [\"out:side\"]", "out:side", "a label has 1 to 64"),
        (CAT, "title = \"demo API\"", "title = \" \"", "title = \" \"", "needs 1 to 120 characters"),
        (CAT, "title = \"demo API\"", "title = \"demo \u{202e}API\"", "title = \"demo ", "none of them invisible"),
        (
            CAT,
            "values = [\"/partners/\", \"/status\"]",
            "values = [\"/partners/../\"]",
            "constraint.paths",
            "a path is absolute, without empty, `.` or `..` parts",
        ),
        (
            CAT,
            "values = [\"invoices\", \"payments\"]",
            "values = []",
            "constraint.tables",
            "`values` needs 1 to 256 entries",
        ),
        (
            CAT,
            "values = [\"invoices\", \"payments\"]",
            "values = [\"invoices\"]\nmax = 3",
            "constraint.tables",
            "`max` belongs to kind `max`",
        ),
        (
            CAT,
            "[resource.constraint.names]\nkind = \"set\"",
            "[resource.constraint.names]\nkind = \"max\"",
            "constraint.names",
            "kind `max` has `max`, not `values`",
        ),
        (
            CAT,
            "[resource.constraint.paths]",
            "[resource.constraint.actions]",
            "constraint.actions",
            "this name is a field of every request",
        ),
    ]);
}

#[test]
fn a_resource_whose_environment_reaches_production_cannot_be_exempt() {
    let e = Example::new();
    let text = e.read(CAT);
    e.write(CAT, &text.replacen("environment = \"prod\"", "environment = \"prod\"\nisolated = true # here", 1));
    let found = problems(&e);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].place, format!("{CAT}:{}", line(&e.read(CAT), "# here")));
    assert!(found[0].what.contains("a resource whose environment can reach production cannot be exempt"), "{found:#?}");
}

#[test]
fn names_in_the_catalogue_are_unique() {
    for (from, to, says) in [
        (
            "name = \"postgres/sandbox\"",
            "name = \"api/demo\"",
            "resource `api/demo` is there already, at catalogue.toml:",
        ),
        ("name = \"sandbox-db\"", "name = \"billing-db\"", "target `billing-db` is there already"),
        ("name = \"prod\"", "name = \"sandbox\"", "environment `sandbox` is there already"),
        (
            "name = \"delete\"\neffect = \"delete\"",
            "name = \"write\"\neffect = \"delete\"",
            "resource postgres/billing: action `write` is there already",
        ),
    ] {
        let e = Example::new();
        e.replace(CAT, from, to);
        let found = problems(&e);
        assert!(found.iter().any(|p| p.what.contains(says)), "{to:?}: {found:#?}");
    }
}

#[test]
fn one_name_of_a_constraint_has_one_kind() {
    let e = Example::new();
    e.replace(
        CAT,
        "[resource.constraint.names]\nkind = \"set\"\nvalues = [\"web.corp.example\", \"api.corp.example\"]",
        "[resource.constraint.tables]\nkind = \"max\"\nmax = 3",
    );
    let found = problems(&e);
    assert!(found[0].what.contains("constraint tables: it has another kind at catalogue.toml:"), "{found:#?}");
}

#[test]
fn settings_can_be_hashed() {
    for (to, says) in [
        ("1.5", "`skew_secs`: only text, whole numbers"),
        ("9007199254740992", "must be within"),
        ("2026-01-01", "only text"),
    ] {
        let e = Example::new();
        e.replace(CAT, "skew_secs = 30", &format!("skew_secs = {to}"));
        let found = problems(&e);
        assert_eq!(found[0].place, format!("{CAT}:{}", line(&e.read(CAT), "skew_secs")));
        assert!(found[0].what.contains(says), "{found:#?}");
    }
}
