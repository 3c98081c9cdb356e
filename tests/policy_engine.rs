//! What comes out of an assessment: the strictest tier, what denies, what is raised, what is capped.

#[path = "support/world.rs"]
mod world;

use countersign::core::permission::Permission;
use countersign::policy::{AssessInput, Outcome, builtin};
use serde_json::json;
use world::*;

const OBSERVE: &str = r#"
@id("read") @tier("observe") permit(principal is Agent, action == Action::"read", resource);
"#;
/// Valid, and overflows as soon as it is evaluated with more than one second.
const OVERFLOW: &str = "context.task.life_secs * 9223372036854775807 > 0";

#[test]
fn the_strictest_of_all_matching_permits_wins_and_all_are_told() {
    let e = engine(
        r#"
        @id("a") @tier("observe") permit(principal is Agent, action == Action::"read", resource);
        @id("c") @tier("critical") @reason("customers") permit(principal is Agent, action == Action::"read", resource)
            when { resource.labels.contains("customer-data") };
        @id("b") @tier("change") permit(principal is Agent, action == Action::"read", resource);
        "#,
    );
    let a = e.assess(&ask(vec![permission("db/play", &["read"]), permission("db/customers", &["read"])]));
    assert_eq!(short(&a), "critical");
    let told: Vec<_> = a.reasons.iter().map(|r| (r.policy.as_str(), r.tier.as_str())).collect();
    assert_eq!(told, [("c", "critical"), ("b", "change"), ("a", "observe")]);
    assert_eq!(a.reasons[0].reason.as_deref(), Some("customers"));
    assert_eq!(a.policy_version, e.version());
    assert_eq!(short(&e.assess(&ask(vec![permission("db/play", &["read"])]))), "change");
}

#[test]
fn one_action_without_a_permit_denies_the_whole() {
    let e = engine(OBSERVE);
    assert_eq!(short(&e.assess(&ask(vec![permission("db/play", &["read"])]))), "observe");
    let a = e.assess(&ask(vec![permission("db/play", &["read", "write"])]));
    assert_eq!(short(&a), format!("deny {}", builtin::NO_PERMIT));
    let Outcome::Deny { reason, .. } = a.outcome else { unreachable!() };
    assert!(reason.contains("no rule permits write on db/play"), "{reason}");
    assert_eq!(short(&engine("").assess(&ask(vec![permission("db/play", &["read"])]))), "deny countersign:no-permit");
}

#[test]
fn a_forbid_denies_with_its_reason() {
    let e =
        engine(&format!("{OBSERVE} @id(\"never\") @reason(\"not on Fridays\") forbid(principal, action, resource);"));
    let a = e.assess(&ask(vec![permission("db/play", &["read"])]));
    assert_eq!(a.outcome, Outcome::Deny { rule: "never".to_owned(), reason: "not on Fridays".to_owned() });
}

#[test]
fn a18_a_forbid_that_errs_denies_and_so_does_a_permit() {
    for rule in [
        format!("@id(\"err\") forbid(principal, action == Action::\"read\", resource) when {{ {OVERFLOW} }};"),
        format!(
            "@id(\"err\") @tier(\"observe\") permit(principal, action == Action::\"read\", resource) when {{ {OVERFLOW} }};"
        ),
    ] {
        let a = engine(&format!("{OBSERVE}{rule}")).assess(&ask(vec![permission("db/play", &["read"])]));
        assert_eq!(short(&a), "deny countersign:evaluation-error", "{rule}");
        assert!(a.undecided.iter().any(|u| u.contains("err") && u.contains("overflow")), "{:?}", a.undecided);
        let Outcome::Deny { reason, .. } = &a.outcome else { unreachable!() };
        assert!(!reason.contains("err\""), "the agent isn't told which rule (R3): {reason}");
    }
}

#[test]
fn an_error_is_told_before_a_forbid_and_a_forbid_before_no_permit() {
    let forbid = r#"@id("never") forbid(principal, action == Action::"write", resource);"#;
    let err = format!("@id(\"err\") forbid(principal, action == Action::\"read\", resource) when {{ {OVERFLOW} }};");
    let all = vec![permission("db/customers", &["drop", "read", "write"])];
    assert_eq!(short(&engine(forbid).assess(&ask(all.clone()))), "deny never");
    assert_eq!(short(&engine(&format!("{forbid}{err}")).assess(&ask(all))), "deny countersign:evaluation-error");
}

#[test]
fn what_is_not_isolated_is_never_automatic() {
    let e = engine(OBSERVE);
    let a = e.assess(&ask(vec![permission("db/customers", &["read"])]));
    assert_eq!(short(&a), "export", "raised to the mildest tier with a vote");
    assert_eq!(a.reasons[0].policy, builtin::NOT_ISOLATED);
    assert!(a.reasons[0].reason.as_deref().unwrap().contains("db/customers isn't isolated"));
    // One of several is enough.
    let both = vec![permission("db/play", &["read"]), permission("db/customers", &["read"])];
    assert_eq!(short(&e.assess(&ask(both))), "export");

    // No tier with a vote: there is nothing to raise to.
    let only: Vec<_> = tiers().into_iter().take(1).collect();
    let files = [("p.cedar".to_owned(), OBSERVE.to_owned())];
    let e = countersign::policy::Engine::load(&files, &catalogue(), &only).unwrap();
    assert_eq!(short(&e.assess(&ask(vec![permission("db/customers", &["read"])]))), "deny countersign:not-isolated");

    // The engine doesn't rely on the catalogue's check: isolated in an environment that reaches production is not.
    let mut wrong = catalogue();
    wrong.resource[0].isolated = true;
    let e = countersign::policy::Engine::load(&files, &wrong, &tiers()).unwrap();
    assert_eq!(short(&e.assess(&ask(vec![permission("db/customers", &["read"])]))), "export");
}

#[test]
fn an_issuer_reaches_its_tier_and_no_further() {
    let e = engine(OBSERVE);
    let with = |max: &str, what: &str| {
        let mut input = ask(vec![permission(what, &["read"])]);
        input.agent.tier_max = Some(tier_name(max));
        short(&e.assess(&input))
    };
    assert_eq!(with("observe", "db/play"), "observe");
    assert_eq!(with("export", "db/customers"), "export");
    assert_eq!(with("observe", "db/customers"), "deny countersign:tier-max", "after it was raised");
    assert_eq!(with("no-such-tier", "db/play"), "deny countersign:tier-max");
}

#[test]
fn without_an_owner_no_tier_with_a_vote() {
    let e = engine(OBSERVE);
    let mut input = ask(vec![permission("db/play", &["read"])]);
    input.agent.owner = None;
    assert_eq!(short(&e.assess(&input)), "observe");
    input.permissions = vec![permission("db/customers", &["read"])];
    assert_eq!(short(&e.assess(&input)), "deny countersign:no-owner");
}

#[test]
fn the_life_is_capped_by_every_tier_that_counts_and_that_is_told() {
    let e = engine(
        r#"
        @id("x") @tier("change") permit(principal is Agent, action == Action::"read", resource);
        @id("y") @tier("critical") permit(principal is Agent, action == Action::"read", resource);
        "#,
    );
    let life = |secs: u64| {
        let mut input = ask(vec![permission("db/play", &["read"])]);
        input.task.life_secs = secs;
        match e.assess(&input).outcome {
            Outcome::Permit { life_secs, capped_from_secs, .. } => (life_secs, capped_from_secs),
            Outcome::Deny { rule, .. } => panic!("{rule}"),
        }
    };
    // critical allows 1200 s, but a milder rule that counts too allows 900: a stricter rule never makes it longer.
    assert_eq!(life(5000), (900, Some(5000)));
    assert_eq!(life(900), (900, None));
    let mut input = ask(vec![permission("db/play", &["read"])]);
    input.task.life_secs = 0;
    assert!(matches!(e.assess(&input).outcome, Outcome::Deny { .. }));
}

const COMBINATION: &str = r#"
@id("read") @tier("export") permit(principal is Agent, action == Action::"read", resource);
@id("post") @tier("export") permit(principal is Agent, action == Action::"write", resource);
@id("whole") @tier("critical") permit(principal is Agent, action in [Action::"read", Action::"write"], resource)
    when { resource.labels.containsAny(["customer-data", "outside"]) &&
           context.together.containsAll(["customer-data/read", "outside/write"]) };
"#;

#[test]
fn d2_parts_that_add_up_are_seen_however_they_are_split() {
    let e = engine(COMBINATION);
    let (read, post) = (permission("db/customers", &["read"]), permission("web/out", &["post"]));
    let (narrow, play) = (
        wire(
            json!({"type": "postgres", "identifier": "db/customers", "actions": ["read"], "tables": ["a"], "rows": 1}),
        ),
        permission("db/play", &["read"]),
    );
    let assess = |now: &[&Permission], tree: &[&Permission], held: &[&Permission]| {
        let own = |list: &[&Permission]| list.iter().map(|p| (*p).clone()).collect();
        short(&e.assess(&AssessInput { tree_holds: own(tree), held: own(held), ..ask(own(now)) }))
    };
    assert_eq!(assess(&[&read], &[], &[]), "export");
    assert_eq!(assess(&[&post], &[], &[]), "export");
    assert_eq!(assess(&[&read, &post], &[], &[]), "critical", "at once");
    assert_eq!(assess(&[&post], &[&read], &[]), "critical", "one after the other, same task");
    // `held` has what was held in other tasks, by the owner's other agents, and what has ended within the window.
    assert_eq!(assess(&[&post], &[], &[&read]), "critical", "another task, ended or not");
    assert_eq!(assess(&[&read], &[], &[&post]), "critical", "the other way round");
    assert_eq!(assess(&[&post], &[], &[&narrow]), "critical", "a narrower part is a part");
    assert_eq!(assess(&[&play], &[], &[&read]), "export", "what has no label stays");
}

#[test]
fn d2_what_the_catalogue_no_longer_knows_counts_as_everything() {
    let mut shrunk = catalogue();
    shrunk.resource.retain(|r| r.name.as_str() != "db/customers");
    // Another resource keeps the label alive.
    shrunk.resource[0].labels.insert("customer-data".to_owned());
    let files = [("p.cedar".to_owned(), COMBINATION.to_owned())];
    let e = countersign::policy::Engine::load(&files, &shrunk, &tiers()).unwrap();
    let mut input = ask(vec![permission("web/out", &["post"])]);
    assert_eq!(short(&e.assess(&input)), "export");
    input.held = vec![permission("db/customers", &["read"])];
    let a = e.assess(&input);
    assert_eq!(short(&a), "critical");
    assert!(a.undecided[0].contains("db/customers is held and no longer in the catalogue"), "{:?}", a.undecided);
    // Asked for, it is simply not there.
    input.permissions = vec![permission("db/customers", &["read"])];
    assert_eq!(short(&e.assess(&input)), "deny countersign:not-in-catalogue");
    assert_eq!(short(&e.assess(&ask(vec![]))), "deny countersign:not-in-catalogue");
}

#[test]
fn policies_see_the_facts_that_the_schema_promises() {
    let all = [
        r#"principal.id == "spiffe://corp/agent/one""#,
        r#"principal.issuer == "spiffe://corp""#,
        r#"principal.method == "x509-svid""#,
        r#"principal has trust_domain && principal.trust_domain == "corp""#,
        r#"principal has owner && principal.owner == "ana""#,
        r#"principal has team && principal.team == "platform""#,
        r#"principal.groups.contains("ops")"#,
        r#"principal.hasTag("repository") && principal.getTag("repository") == "acme/app""#,
        r#"resource == Resource::"db/customers""#,
        r#"resource.target == "db" && resource.kind == "postgres" && resource.environment == "prod""#,
        "resource.reaches_production && !resource.isolated",
        r#"resource.sensitivity == "customer" && resource.name == "db/customers""#,
        r#"Resource::"db/play".isolated"#,
        r#"context.task.name == "T-1" && context.task.depth == 2 && context.task.life_secs == 600"#,
        r#"context.task.recent_requests == 3 && context.task.intent_labels.contains("routine")"#,
        r#"context.task.holds.contains("outside/write") && !context.task.holds.contains("env:sandbox/read")"#,
        r#"context.asked.contains("customer-data/write") && !context.asked.contains("outside/write")"#,
        r#"context.holds.containsAll(["outside/write", "env:sandbox/read"])"#,
        r#"context.together.containsAll(["env:prod/write", "sensitivity:customer/write", "sensitivity:none/read"])"#,
        "context.systems_changed == 2",
        r#"context.action.name == "write" && context.action.reversible"#,
        r#"context.constraints has tables && ["a"].containsAll(context.constraints.tables)"#,
        "context.constraints has rows && context.constraints.rows < 50",
        "!(context.constraints has paths)",
    ];
    let p = wire(
        json!({"type": "postgres", "identifier": "db/customers", "actions": ["write"], "tables": ["a"], "rows": 10}),
    );
    let mut input = ask(vec![p]);
    input.task.depth = 2;
    input.task.recent_requests = 3;
    input.tree_holds = vec![permission("web/out", &["post"])];
    input.held = vec![permission("db/play", &["read"])];
    for condition in all {
        let rule = |when: &str| {
            format!(
                "@id(\"x\") @tier(\"change\") permit(principal is Agent, action == Action::\"write\", resource) {when} {{ {condition} }};"
            )
        };
        let yes = engine(&rule("when")).assess(&input);
        assert_eq!(short(&yes), "change", "{condition}: {yes:?}");
        assert_eq!(short(&engine(&rule("unless")).assess(&input)), "deny countersign:no-permit", "{condition}");
    }
}

#[test]
fn each_effect_is_an_action_of_its_own() {
    for (action, effect) in [("read", "read"), ("write", "write"), ("drop", "delete"), ("grant", "administer")] {
        let rule = format!(
            "@id(\"x\") @tier(\"critical\") permit(principal is Agent, action == Action::\"{effect}\", resource);"
        );
        let e = engine(&rule);
        for other in ["read", "write", "drop", "grant"] {
            let got = short(&e.assess(&ask(vec![permission("db/customers", &[other])])));
            assert_eq!(got == "critical", other == action, "{effect} {other}: {got}");
        }
    }
}

#[test]
fn the_version_is_of_all_that_decides_and_not_of_the_order_of_files() {
    let load = |files: &[(&str, &str)], tiers: &[_]| {
        let files: Vec<_> = files.iter().map(|(n, t)| ((*n).to_owned(), (*t).to_owned())).collect();
        countersign::policy::Engine::load(&files, &catalogue(), tiers).unwrap().version().to_owned()
    };
    let other = r#"@id("other") forbid(principal, action, resource);"#;
    let v = load(&[("a", OBSERVE), ("b", other)], &tiers());
    assert_eq!(v, load(&[("b", other), ("a", OBSERVE)], &tiers()));
    assert_ne!(v, load(&[("a", OBSERVE)], &tiers()));
    assert_ne!(v, load(&[("a", OBSERVE), ("b", other)], &tiers()[..3]));
    let mut longer = tiers();
    longer[0].life_secs_max += 1;
    assert_ne!(v, load(&[("a", OBSERVE), ("b", other)], &longer));
}

#[test]
fn what_can_be_asked_for_is_what_would_be_permitted() {
    let e = engine(OBSERVE);
    let told: Vec<_> = e.askable(&agent()).iter().map(|a| format!("{} {} {}", a.resource, a.action, a.tier)).collect();
    assert_eq!(told, ["db/customers read export", "db/play read observe"]);
    let mut stray = agent();
    stray.owner = None;
    assert_eq!(e.askable(&stray).len(), 1, "no owner, no tier with a vote");
}

#[test]
fn inputs_and_assessments_are_records() {
    let input = ask(vec![permission("db/customers", &["read"])]);
    let text = serde_json::to_string(&input).unwrap();
    assert_eq!(serde_json::from_str::<AssessInput>(&text).unwrap(), input);
    for a in [engine(OBSERVE).assess(&input), engine("").assess(&input)] {
        let text = serde_json::to_string(&a).unwrap();
        assert_eq!(serde_json::from_str::<countersign::policy::Assessment>(&text).unwrap(), a);
    }
    assert!(serde_json::from_str::<AssessInput>(&text.replacen('{', "{\"surprise\":1,", 1)).is_err());
}
