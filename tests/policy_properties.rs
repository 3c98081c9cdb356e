//! Random policies against random requests: the engine agrees with an independent reading of the rules, adding a
//! permit never lowers the bar, the order of rules doesn't matter, an error always denies.

#[path = "support/world.rs"]
mod world;

use countersign::policy::{Assessment, Engine, Outcome};
use proptest::prelude::*;
use world::*;

const TIERS: [&str; 4] = ["observe", "export", "change", "critical"];
const ACTIONS: [(&str, &str, &str); 7] = [
    ("db/customers", "read", "read"),
    ("db/customers", "write", "write"),
    ("db/customers", "drop", "delete"),
    ("db/customers", "grant", "administer"),
    ("db/play", "read", "read"),
    ("db/play", "write", "write"),
    ("web/out", "post", "write"),
];

/// A condition, and how the oracle reads it.
#[derive(Debug, Clone, Copy, PartialEq)]
enum When {
    Always,
    Isolated,
    CustomerLabel,
    HoldsOutside,
    Deep,
    Errs,
}

impl When {
    fn text(self) -> &'static str {
        match self {
            Self::Always => "true",
            Self::Isolated => "resource.isolated",
            Self::CustomerLabel => "resource.labels.contains(\"customer-data\")",
            Self::HoldsOutside => "context.together.contains(\"outside/write\")",
            Self::Deep => "context.task.depth > 1",
            Self::Errs => "context.task.life_secs * 9223372036854775807 > 0",
        }
    }
    fn holds(self, resource: &str, outside: bool, depth: u32) -> bool {
        match self {
            Self::Always => true,
            Self::Isolated => resource == "db/play",
            Self::CustomerLabel => resource == "db/customers",
            Self::HoldsOutside => outside,
            Self::Deep => depth > 1,
            Self::Errs => false,
        }
    }
}

#[derive(Debug, Clone)]
struct Rule {
    /// `None`: a forbid.
    tier: Option<usize>,
    effects: Vec<&'static str>,
    when: When,
}

fn rule(errs: bool) -> impl Strategy<Value = Rule> {
    let when = if errs {
        prop::sample::select(vec![When::Errs])
    } else {
        prop::sample::select(vec![
            When::Always,
            When::Always,
            When::Isolated,
            When::CustomerLabel,
            When::HoldsOutside,
            When::Deep,
        ])
    };
    let effects = prop::sample::subsequence(vec!["read", "write", "delete", "administer"], 1..=4);
    (prop_oneof![5 => (0usize..4).prop_map(Some), 1 => Just(None)], effects, when)
        .prop_map(|(tier, effects, when)| Rule { tier, effects, when })
}

fn permit() -> impl Strategy<Value = Rule> {
    rule(false).prop_filter("permits", |r| r.tier.is_some())
}

fn text(rules: &[(usize, Rule)]) -> String {
    let one = |(id, r): &(usize, Rule)| {
        let actions: Vec<_> = r.effects.iter().map(|e| format!("Action::\"{e}\"")).collect();
        let (tier, effect) = match r.tier {
            Some(t) => (format!("@tier(\"{}\")", TIERS[t]), "permit"),
            None => (String::new(), "forbid"),
        };
        format!(
            "@id(\"r{id}\") {tier} {effect}(principal is Agent, action in [{}], resource) when {{ {} }};\n",
            actions.join(", "),
            r.when.text()
        )
    };
    rules.iter().map(one).collect()
}

#[derive(Debug, Clone)]
struct Ask {
    wants: Vec<usize>,
    held: Vec<usize>,
    depth: u32,
    life_secs: u64,
}

fn request() -> impl Strategy<Value = Ask> {
    let some = || prop::sample::subsequence((0..ACTIONS.len()).collect::<Vec<_>>(), 1..4);
    (some(), prop::option::of(some()), 0u32..4, 2u64..5000).prop_map(|(wants, held, depth, life_secs)| Ask {
        wants,
        held: held.unwrap_or_default(),
        depth,
        life_secs,
    })
}

fn assess(e: &Engine, a: &Ask) -> Assessment {
    let permissions = |which: &[usize]| which.iter().map(|i| permission(ACTIONS[*i].0, &[ACTIONS[*i].1])).collect();
    let mut input = ask(permissions(&a.wants));
    input.held = permissions(&a.held);
    input.task.depth = a.depth;
    input.task.life_secs = a.life_secs;
    e.assess(&input)
}

/// The rules, read in the plainest way: `Err` is a denial.
fn oracle(rules: &[Rule], a: &Ask) -> Result<usize, ()> {
    let outside = a.wants.iter().chain(&a.held).any(|i| ACTIONS[*i].0 == "web/out");
    let mut tier = 0;
    for (resource, _, effect) in a.wants.iter().map(|i| ACTIONS[*i]) {
        let about: Vec<&Rule> = rules.iter().filter(|r| r.effects.contains(&effect)).collect();
        if about.iter().any(|r| r.when == When::Errs) {
            return Err(());
        }
        let matching: Vec<_> = about.iter().filter(|r| r.when.holds(resource, outside, a.depth)).collect();
        if matching.iter().any(|r| r.tier.is_none()) {
            return Err(());
        }
        tier = tier.max(matching.iter().filter_map(|r| r.tier).max().ok_or(())?);
    }
    let isolated = a.wants.iter().all(|i| ACTIONS[*i].0 == "db/play");
    Ok(if tier == 0 && !isolated { 1 } else { tier })
}

fn level(a: &Assessment) -> Result<usize, ()> {
    match &a.outcome {
        Outcome::Permit { tier, .. } => Ok(TIERS.iter().position(|t| *t == tier.name.as_str()).unwrap()),
        Outcome::Deny { .. } => Err(()),
    }
}

fn life(a: &Assessment) -> u64 {
    if let Outcome::Permit { life_secs, .. } = a.outcome { life_secs } else { 0 }
}

fn numbered(rules: &[Rule]) -> Vec<(usize, Rule)> {
    rules.iter().cloned().enumerate().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn the_engine_agrees_with_the_oracle(
        rules in prop::collection::vec(prop_oneof![8 => rule(false), 1 => rule(true)], 0..7), a in request(),
    ) {
        let got = assess(&engine(&text(&numbered(&rules))), &a);
        prop_assert_eq!(level(&got), oracle(&rules, &a), "{:?}", got);
    }

    #[test]
    fn adding_a_permit_never_lowers_the_bar(
        rules in prop::collection::vec(rule(false), 1..6), more in permit(), a in request(),
    ) {
        let before = assess(&engine(&text(&numbered(&rules))), &a);
        let mut with = rules;
        with.push(more);
        let after = assess(&engine(&text(&numbered(&with))), &a);
        if let (Ok(b), Ok(n)) = (level(&before), level(&after)) {
            prop_assert!(n >= b, "{:?} then {:?}", before, after);
            prop_assert!(life(&after) <= life(&before), "{:?} then {:?}", before, after);
        } else {
            // What was permitted stays permitted (nothing here is beyond reach), at a tier compared above.
            prop_assert!(level(&before).is_err());
        }
    }

    #[test]
    fn an_evaluation_error_always_denies(
        rules in prop::collection::vec(rule(false), 0..6), bad in rule(true), at in 0usize..6, a in request(),
    ) {
        let mut with = rules;
        let at = at.min(with.len());
        with.insert(at, bad.clone());
        let got = assess(&engine(&text(&numbered(&with))), &a);
        if a.wants.iter().any(|i| bad.effects.contains(&ACTIONS[*i].2)) {
            prop_assert_eq!(short(&got), "deny countersign:evaluation-error");
        }
    }

    #[test]
    fn the_order_of_rules_and_files_does_not_matter(
        rules in prop::collection::vec(prop_oneof![8 => rule(false), 1 => rule(true)], 1..7)
            .prop_flat_map(|r| { let n = numbered(&r); (Just(n.clone()), Just(n).prop_shuffle()) }),
        cut in 0usize..7, a in request(),
    ) {
        let (in_order, shuffled) = rules;
        let one = assess(&engine(&text(&in_order)), &a);
        let (x, y) = shuffled.split_at(cut.min(shuffled.len()));
        let files = [("y.cedar".to_owned(), text(y)), ("x.cedar".to_owned(), text(x))];
        let two = assess(&Engine::load(&files, &catalogue(), &tiers()).unwrap(), &a);
        prop_assert_eq!((&one.outcome, &one.reasons, &one.undecided), (&two.outcome, &two.reasons, &two.undecided));
    }
}
