//! A policy that isn't sound is refused, with file, line, column and what to do. What only looks wrong is a warning.

#[path = "support/world.rs"]
mod world;

use countersign::config::Problem;
use countersign::policy::Engine;
use world::*;

fn problems(policies: &str) -> Vec<Problem> {
    try_engine(policies).map(|_| ()).expect_err("it was accepted")
}

/// Exactly one problem, there, saying that.
fn refused(policies: &str, place: &str, says: &str) {
    let found = problems(policies);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].place, place, "{found:#?}");
    assert!(found[0].what.contains(says), "{found:#?}");
}

#[test]
fn what_does_not_parse() {
    let found = problems("\n\n@id(\"a\")\npermit(principal, action resource);");
    assert_eq!(found[0].place, "p.cedar:4:26", "{found:#?}");
    assert!(found[0].what.contains("unexpected token"), "{found:#?}");
}

#[test]
fn what_does_not_validate() {
    let rule = |body: &str| {
        format!(
            "// first\n@id(\"a\") @tier(\"export\")\npermit(principal is Agent, action == Action::\"read\", resource)\nwhen {{ {body} }};"
        )
    };
    refused(&rule("resource.lables.contains(\"x\")"), "p.cedar:4:8", "did you mean `labels`?");
    refused(&rule("context.task.dpth > 1"), "p.cedar:4:8", "did you mean `depth`?");
    refused(&rule("context.task.depth > \"1\""), "p.cedar:4:29", "expected");
    refused(&rule("principal.owner == \"ana\""), "p.cedar:4:8", "`e has owner && ..`");
    refused(&rule("principal.getTag(\"x\") == \"y\""), "p.cedar:4:8", "hasTag");
    refused(
        &rule("context.constraints has colour && context.constraints.colour == 1"),
        "p.cedar:2:1",
        "can never match",
    );
    refused(&rule("false"), "p.cedar:2:1", "this rule can never match: correct or remove it");
    refused(
        "@id(\"a\") @tier(\"export\") permit(principal is Person, action == Action::\"read\", resource);",
        "p.cedar:1:1",
        "can never match",
    );
    refused(
        "@id(\"a\") permit(principal, action == Action::\"writ\", resource);",
        "p.cedar:1:38",
        "did you mean `Action::\"write\"`?",
    );
    refused(
        "@id(\"a\") permit(principal, action == Action::\"approve\", resource) when { resource.tier == Tier::\"criticl\" };",
        "p.cedar:1:91",
        "criticl",
    );
}

#[test]
fn annotations() {
    let rule =
        |annotations: &str| format!("{annotations} permit(principal is Agent, action == Action::\"read\", resource);");
    refused(
        &rule("@id(\"a\") @tier(\"export\") @teir(\"x\")"),
        "p.cedar:1:1",
        "unknown annotation @teir; there are @id, @tier, @reason",
    );
    refused(&rule("@tier(\"export\")"), "p.cedar:1:1", "the rule needs an @id");
    refused(&rule("@id(\"a b\") @tier(\"export\")"), "p.cedar:1:1", "the rule needs an @id");
    refused(&rule("@id(\"countersign:x\") @tier(\"export\")"), "p.cedar:1:1", "the rule needs an @id");
    refused(
        &rule("@id(\"a\")"),
        "p.cedar:1:1",
        "a permit for agents needs a @tier(\"…\"); there are: observe, export, change, critical",
    );
    refused(&rule("@id(\"a\") @tier(\"exprt\")"), "p.cedar:1:1", "there is no tier of that name; there are: observe");
    refused(&rule("@id(\"a\") @tier(\"export\") @reason(\"\")"), "p.cedar:1:1", "@reason has 1 to 300 characters");
    refused(
        &rule(&format!("@id(\"a\") @tier(\"export\") @reason(\"{}\")", "x".repeat(301))),
        "p.cedar:1:1",
        "@reason has 1 to 300",
    );
    refused(
        "@id(\"a\") @tier(\"export\") forbid(principal is Agent, action == Action::\"read\", resource);",
        "p.cedar:1:1",
        "@tier belongs to permits for agents only",
    );
    refused(
        "@id(\"a\") @tier(\"export\") permit(principal, action == Action::\"see\", resource);",
        "p.cedar:1:1",
        "@tier belongs to permits for agents only",
    );
    let twice = format!("{}\n{}", rule("@id(\"a\") @tier(\"export\")"), rule("@id(\"a\") @tier(\"observe\")"));
    refused(&twice, "p.cedar:2:1", "@id(\"a\") is there already, at p.cedar:1:1");
}

#[test]
fn scopes() {
    refused("@id(\"a\") permit(principal, action, resource);", "p.cedar:1:1", "a permit names its actions");
    refused(
        "@id(\"a\") @tier(\"export\") permit(principal, action in [Action::\"read\", Action::\"approve\"], resource);",
        "p.cedar:1:1",
        "one rule is about agents (read, export, …) or about persons (approve, see, …), not both; split it",
    );
    refused("@id(\"a\") forbid(principal == ?principal, action, resource);", "p.cedar:1:1", "a template");
    refused(
        "@id(\"a\") @tier(\"export\") permit(principal is Agent, action == Action::\"read\", resource == Resource::\"db/custmers\");",
        "p.cedar:1:1",
        "Resource::\"db/custmers\" isn't in the catalogue",
    );
}

#[test]
fn every_problem_of_every_file_is_found_in_one_pass() {
    let files = [
        ("a.cedar".to_owned(), "permit(".to_owned()),
        ("b.cedar".to_owned(), "@id(\"b\") @x(\"1\") forbid(principal, action, resource);\n@id(\"c\") forbid(principal is Agent, action, resource) when { resource.nothing };".to_owned()),
        ("c.cedar".to_owned(), "\n@id(\"c\") forbid(principal, action, resource);".to_owned()),
    ];
    let found = Engine::load(&files, &catalogue(), &tiers()).map(|_| ()).unwrap_err();
    let places: Vec<_> = found.iter().map(|p| p.place.as_str()).collect();
    assert_eq!(places, ["a.cedar:1:8", "b.cedar:1:1", "c.cedar:2:1", "b.cedar:2:62"], "{found:#?}");
}

#[test]
fn characters_that_hide_are_refused() {
    let rule = "@id(\"a\") forbid(principal is Agent, action, resource) when { resource.name == \"x\u{202e}y\" };";
    let found = problems(rule);
    assert!(found[0].what.to_lowercase().contains("bidi"), "{found:#?}");
}

#[test]
fn the_check_warns_of_what_is_hardly_meant() {
    let e = engine(
        r#"
        @id("open") @tier("observe") permit(principal is Agent, action == Action::"read", resource)
            when { principal.groups.contains("ops") && resource.environment == "prod" };
        @id("closed") @tier("observe") permit(principal is Agent, action == Action::"read", resource)
            when { principal.groups.contains("ops") } unless { !resource.isolated || context.task.depth > 0 };
        @id("typo") @tier("critical") permit(principal is Agent, action == Action::"write", resource)
            when { context.together.contains("custmer-data/read") && resource.labels.contains("outside") };
        @id("see") permit(principal, action in [Action::"see", Action::"approve"], resource is Grant);
        "#,
    );
    let warnings = e.check().warnings;
    let one = |part: &str| warnings.iter().filter(|w| w.contains(part)).collect::<Vec<_>>();
    let open = one("could reach what isn't isolated");
    assert_eq!(open.len(), 1, "{warnings:#?}");
    assert!(open[0].starts_with("p.cedar:2:9: rule open is automatic (tier observe)"), "{open:#?}");
    assert!(open[0].contains("what isn't isolated: db/customers;"), "{open:#?}");
    assert_eq!(
        one("no permit can ever match"),
        [
            "no permit can ever match: drop on db/customers, grant on db/customers, write on db/customers, write on db/play; \
             add a rule or remove it from the catalogue"
        ]
    );
    assert!(
        one("rule typo looks for custmer-data/read, which nothing in the catalogue can be").len() == 1,
        "{warnings:#?}"
    );
    for action in ["revoke", "freeze", "read_record", "operate"] {
        assert_eq!(one(&format!("no rule permits anybody to {action}")).len(), 1, "{warnings:#?}");
    }
    for tier in ["export", "change"] {
        assert_eq!(one(&format!("tier {tier} is used by no rule")).len(), 1);
    }
    let text = e.check().to_string();
    assert!(text.contains("permit typo") && text.contains("warnings\n"), "{text}");
    assert!(e.schema_text().contains("context") || e.schema_text().contains("AskContext"), "{}", e.schema_text());
}
