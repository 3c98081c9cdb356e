//! Every list and text of the configuration has a named limit: what is at it passes, one more is refused.

mod support;

use std::fmt::Write as _;

use countersign::core::permission::{ACTIONS_MAX, CONSTRAINT_VALUE_BYTES_MAX, CONSTRAINT_VALUES_MAX, CONSTRAINTS_MAX};
use countersign::policy::{Engine, table};
use support::Example;

const MAIN: &str = "countersign.toml";
const CAT: &str = "catalogue.toml";

/// Loads the example with more in one file.
fn with(file: &str, more: &str) -> Vec<String> {
    let e = Example::new();
    e.append(file, more);
    e.load().err().unwrap_or_default().into_iter().map(|p| p.what).collect()
}

fn resource(name: &str, more: &str, actions: usize) -> String {
    let mut text = format!(
        "[[resource]]\nname = \"{name}\"\ntarget = \"tokens\"\ntitle = \"t\"\nenvironment = \"prod\"\nsensitivity = \"none\"\n{more}\n"
    );
    for i in 0..actions {
        write!(text, "[[resource.action]]\nname = \"a{i}\"\neffect = \"read\"\n").unwrap();
    }
    text
}

/// `make(n)` is what has `n` of something; `in_example` are there already.
fn at_most(file: &str, max: usize, in_example: usize, says: &str, make: impl Fn(usize) -> String) {
    assert_eq!(with(file, &make(max - in_example)), Vec::<String>::new(), "{says}");
    let found = with(file, &make(max + 1 - in_example));
    assert!(found.iter().any(|f| f.contains(says)), "{says}: {found:?}");
}

#[test]
fn of_the_catalogue() {
    let list = |n: usize, f: &dyn Fn(usize) -> String| (0..n).map(f).collect::<Vec<_>>().join(", ");
    at_most(CAT, 10_000, 6, "more than 10000 resources", |n| {
        (0..n).map(|i| resource(&format!("x/{i}"), "", 1)).collect()
    });
    at_most(CAT, 32, 0, "more than 32 labels", |n| {
        resource("x", &format!("labels = [{}]", list(n, &|i| format!("\"l{i}\""))), 1)
    });
    at_most(CAT, ACTIONS_MAX, 0, "needs 1 to 32 [[resource.action]]", |n| resource("x", "", n));
    at_most(CAT, CONSTRAINTS_MAX, 0, "more than 16 constraints", |n| {
        let all = list(n, &|i| format!("c{i} = {{ kind = \"max\", max = 1 }}"));
        resource("x", &format!("constraint = {{ {all} }}"), 1)
    });
    at_most(CAT, CONSTRAINT_VALUES_MAX, 0, "`values` needs 1 to 256 entries", |n| {
        let all = list(n, &|i| format!("\"v{i}\""));
        resource("x", &format!("constraint = {{ c = {{ kind = \"set\", values = [{all}] }} }}"), 1)
    });
    at_most(CAT, CONSTRAINT_VALUE_BYTES_MAX, 0, "each value has 1 to 512 bytes", |n| {
        resource("x", &format!("constraint = {{ c = {{ kind = \"set\", values = [\"{}\"] }} }}", "v".repeat(n)), 1)
    });
    at_most(CAT, 120, 0, "needs 1 to 120 characters", |n| {
        resource("x", "", 1).replace("\"t\"", &format!("\"{}\"", "t".repeat(n)))
    });
    at_most(CAT, 64, 0, "a label has 1 to 64", |n| resource("x", &format!("labels = [\"{}\"]", "l".repeat(n)), 1));
    at_most(CAT, 9_007_199_254_740_991, 0, "`max` must be at most 2^53-1", |n| {
        resource("x", &format!("constraint = {{ c = {{ kind = \"max\", max = {n} }} }}"), 1)
    });
    assert!(with(CAT, &resource("x", "", 0))[0].contains("missing key `action`"));
}

#[test]
fn of_the_directories() {
    let person = |i: usize, more: &str| format!("[[person]]\nid = \"p{i}\"\nname = \"P\"\n{more}\n");
    let agent = |i: usize, more: &str| {
        format!("[[agent]]\nmatch = \"spiffe://corp.example/more/{i}\"\nowner = \"ana\"\n{more}\n")
    };
    at_most(MAIN, 10_000, 3, "more than 10000 entries", |n| (0..n).map(|i| person(i, "")).collect());
    at_most(MAIN, 64, 0, "more than 64 groups", |n| {
        let groups: Vec<_> = (0..n).map(|i| format!("\"g{i}\"")).collect();
        person(0, &format!("groups = [{}]", groups.join(", ")))
    });
    at_most(MAIN, 128, 0, "needs 1 to 128 bytes", |n| agent(0, &format!("team = \"{}\"", "t".repeat(n))));
    at_most(MAIN, 255, 0, "`subject` has 1 to 255", |n| {
        person(0, &format!("identities = [{{ issuer = \"https://i.example\", subject = \"{}\" }}]", "s".repeat(n)))
    });
    let prefix = "spiffe://corp.example/more/".len();
    at_most(MAIN, 2048, prefix, "a pattern has 1 to 2048 bytes", |n| {
        format!("[[agent]]\nmatch = \"spiffe://corp.example/more/{}\"\nowner = \"ana\"\n", "x".repeat(n))
    });
    at_most(MAIN, 16, 4, "more than 16 tiers", |n| {
        let tier =
            |i| format!("[[tier]]\nname = \"t{i}\"\napprovals = 2\nlife_secs_max = 60\nfriction = \"critical\"\n");
        (0..n).map(tier).collect()
    });
}

#[test]
fn of_the_policies() {
    let files = |n: usize| {
        let e = Example::new();
        for i in 0..n {
            e.write(&format!("policies/x{i}.cedar"), "// nothing");
        }
        e.load().err().unwrap_or_default()
    };
    assert_eq!(files(256 - 6), []);
    assert!(files(257 - 6)[0].what.contains("more than 256 policy files; join some"));

    let loaded = Example::new().load().unwrap();
    let rules = |n: usize| {
        let mut text = String::new();
        for i in 0..n {
            writeln!(text, "@id(\"r{i}\") forbid(principal, action == Action::\"operate\", resource);").unwrap();
        }
        Engine::load(&[("p.cedar".to_owned(), text)], &loaded.catalogue, &loaded.config.tier)
    };
    assert!(rules(1024).is_ok());
    assert!(rules(1025).unwrap_err().iter().any(|p| p.what.contains("more than 1024 rules")));

    let engine = rules(1).unwrap();
    let cases = |n: usize| {
        let one = "[[may]]\nname = \"x\"\nperson = { id = \"a\" }\naction = \"operate\"\nallowed = false\n";
        table::run(&engine, "t.toml", &one.repeat(n))
    };
    assert_eq!(cases(table::CASES_MAX).unwrap().results.len(), table::CASES_MAX);
    assert!(cases(table::CASES_MAX + 1).unwrap_err()[0].what.contains("more than 2000 cases"));
}
