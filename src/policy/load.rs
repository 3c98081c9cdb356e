//! Policy texts → validated rules. Every problem has file, line, column and what to do.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use cedar_policy::ffi::DetailedError;
use cedar_policy::{
    ActionConstraint, Policy, PolicyId, PolicySet, Schema, ValidationMode, ValidationWarning, Validator,
};

use crate::config::{Catalogue, Effect, Problem};
use crate::core::id::{ResourceName, TierName};
use crate::core::tier::Tier;

use super::PersonAction;

/// Most rules.
pub(super) const RULES_MAX: usize = 1024;
/// Longest `@reason`, in characters.
const REASON_CHARS_MAX: usize = 300;

/// A rule that passed all checks.
#[derive(Debug)]
pub(super) struct Rule {
    /// Its `@id`.
    pub(super) id: String,
    /// `file:line:column`.
    pub(super) place: String,
    /// True for `permit`.
    pub(super) permits: bool,
    /// Names of the actions in its scope.
    pub(super) actions: BTreeSet<&'static str>,
    /// The index of its tier; on permits for agents only.
    pub(super) tier: Option<usize>,
    /// Its `@reason`.
    pub(super) reason: Option<String>,
    pub(super) policy: Policy,
}

/// Rules, and warnings about them.
pub(super) struct Rules {
    pub(super) rules: Vec<Rule>,
    pub(super) warnings: Vec<Problem>,
}

/// `file:line:column` of a byte offset.
fn place(file: &str, text: &str, offset: usize) -> String {
    let before = text.get(..offset).unwrap_or_default();
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
    format!("{file}:{line}:{column}")
}

/// Cedar's own message with its place and advice.
fn problem(file: &str, text: &str, e: &DetailedError) -> Problem {
    let offset = e.source_locations.first().map_or(0, |l| l.loc.start);
    let mut what = e.message.clone();
    if let Some(label) = e.source_locations.first().and_then(|l| l.label.as_ref()) {
        what = format!("{what} ({label})");
    }
    if let Some(help) = &e.help {
        what = format!("{what}; {help}");
    }
    Problem { place: place(file, text, offset), what }
}

pub(super) fn load(
    policies: &[(String, String)],
    schema: &Schema,
    catalogue: &Catalogue,
    tiers: &[Tier],
) -> Result<Rules, Vec<Problem>> {
    let mut out = Vec::new();
    let mut rules: Vec<Rule> = Vec::new();
    let mut ids: BTreeMap<String, String> = BTreeMap::new();
    for (file, text) in policies {
        let set = match PolicySet::from_str(text) {
            Ok(set) => set,
            Err(e) => {
                let first = DetailedError::from(&e);
                out.push(problem(file, text, &first));
                out.extend(first.related.iter().map(|r| problem(file, text, r)));
                continue;
            }
        };
        for template in set.templates() {
            let at = place(file, text, text.find(&template.to_cedar()).unwrap_or(0));
            let what = "a template (`?principal`, `?resource`) is never linked here; write the condition out";
            out.push(Problem { place: at, what: what.to_owned() });
        }
        let mut parsed: Vec<(usize, &Policy)> =
            set.policies().map(|p| (p.to_cedar().and_then(|source| text.find(&source)).unwrap_or(0), p)).collect();
        parsed.sort_by_key(|(offset, _)| *offset);
        for (offset, policy) in parsed {
            let at = place(file, text, offset);
            match rule(policy, &at, catalogue, tiers) {
                Err(problems) => out.extend(problems.into_iter().map(|what| Problem { place: at.clone(), what })),
                Ok(rule) => match ids.insert(rule.id.clone(), at.clone()) {
                    Some(first) => out.push(Problem {
                        place: at,
                        what: format!("@id(\"{}\") is there already, at {first}; give each rule its own", rule.id),
                    }),
                    None => rules.push(rule),
                },
            }
        }
    }
    if rules.len() > RULES_MAX {
        out.push(Problem { place: "policies".to_owned(), what: format!("more than {RULES_MAX} rules") });
    }
    let warnings = validate(&rules, policies, schema, &mut out);
    if out.is_empty() { Ok(Rules { rules, warnings }) } else { Err(out) }
}

/// Strict validation of all rules against the schema. What can never match is an error too: a `forbid` that
/// can't forbid is a hole.
fn validate(rules: &[Rule], policies: &[(String, String)], schema: &Schema, out: &mut Vec<Problem>) -> Vec<Problem> {
    let mut warnings = Vec::new();
    let set = match PolicySet::from_policies(rules.iter().map(|r| r.policy.clone())) {
        Ok(set) => set,
        Err(e) => {
            out.push(Problem { place: "policies".to_owned(), what: e.to_string() });
            return warnings;
        }
    };
    let locate = |id: &PolicyId, e: &DetailedError| {
        let rule = rules.iter().find(|r| r.id == id.to_string());
        let place = rule.map_or("policies", |r| r.place.as_str());
        let file = place.split(':').next().unwrap_or_default();
        match policies.iter().find(|(name, _)| name == file) {
            Some((file, text)) if !e.source_locations.is_empty() => problem(file, text, e),
            _ => Problem { place: place.to_owned(), ..problem("", "", e) },
        }
    };
    let result = Validator::new(schema.clone()).validate(&set, ValidationMode::Strict);
    for e in result.validation_errors() {
        out.push(locate(e.policy_id(), &DetailedError::from(e)));
    }
    // An error makes the rule impossible too: said once.
    let mut dead: BTreeSet<PolicyId> = result.validation_errors().map(|e| e.policy_id().clone()).collect();
    for w in result.validation_warnings() {
        let mut problem = locate(w.policy_id(), &DetailedError::from(w));
        match w {
            ValidationWarning::ImpossiblePolicy(_) | ValidationWarning::InvalidActionApplication(_) => {
                // And Cedar says it twice of a rule whose scope fits nothing.
                if !dead.insert(w.policy_id().clone()) {
                    continue;
                }
                problem.what = format!("{}; this rule can never match: correct or remove it", problem.what);
                out.push(problem);
            }
            ValidationWarning::BidiCharsInString(_) | ValidationWarning::BidiCharsInIdentifier(_) => out.push(problem),
            _ => warnings.push(problem),
        }
    }
    warnings
}

/// Checks what Cedar doesn't: annotations, the scope's actions, literals of the catalogue.
fn rule(policy: &Policy, at: &str, catalogue: &Catalogue, tiers: &[Tier]) -> Result<Rule, Vec<String>> {
    let mut out = Vec::new();
    let permits = policy.effect() == cedar_policy::Effect::Permit;
    for (key, _) in policy.annotations() {
        if !matches!(key, "id" | "tier" | "reason") {
            out.push(format!("unknown annotation @{key}; there are @id, @tier, @reason"));
        }
    }
    let id = policy.annotation("id").unwrap_or_default().to_owned();
    // The same alphabet as tiers have: no `:`, which marks the broker's own rules.
    if TierName::new(&id).is_err() {
        out.push("the rule needs an @id(\"…\") of lower-case letters, digits, `-`, `_`, `.`, `/`".to_owned());
    }
    let reason = policy.annotation("reason").map(str::to_owned);
    if reason
        .as_ref()
        .is_some_and(|r| r.trim().is_empty() || r.chars().count() > REASON_CHARS_MAX || r.chars().any(char::is_control))
    {
        out.push(format!("@reason has 1 to {REASON_CHARS_MAX} characters, without control characters"));
    }
    let actions = scope_actions(policy, permits, &mut out);
    let for_agents = actions.iter().any(|a| Effect::ALL.iter().any(|e| e.as_str() == *a));
    let tier = tier(policy, permits && for_agents, tiers, &mut out);
    for uid in policy.entity_literals() {
        if uid.type_name().to_string() == "Resource"
            && ResourceName::new(uid.id().unescaped()).ok().and_then(|n| catalogue.resource(&n)).is_none()
        {
            out.push(format!("{uid} isn't in the catalogue; correct the name or remove the rule"));
        }
    }
    if out.is_empty() {
        let policy = policy.new_id(PolicyId::new(&id));
        Ok(Rule { id, place: at.to_owned(), permits, actions, tier, reason, policy })
    } else {
        Err(out)
    }
}

/// The actions in the scope. A `permit` has to name them; a `forbid` may be about all.
fn scope_actions(policy: &Policy, permits: bool, out: &mut Vec<String>) -> BTreeSet<&'static str> {
    let agent: BTreeSet<&'static str> = Effect::ALL.iter().map(|e| e.as_str()).collect();
    let person: BTreeSet<&'static str> = PersonAction::ALL.iter().map(|a| a.as_str()).collect();
    let named = match policy.action_constraint() {
        ActionConstraint::Any if permits => {
            out.push(
                "a permit names its actions: `action == Action::\"read\"` or `action in [Action::\"read\", …]`"
                    .to_owned(),
            );
            return BTreeSet::new();
        }
        ActionConstraint::Any => return &agent | &person,
        ActionConstraint::Eq(uid) => vec![uid],
        ActionConstraint::In(uids) => uids,
    };
    // A name that is none of these is the validator's to refuse: it has a suggestion.
    let names: BTreeSet<&'static str> =
        (&agent | &person).into_iter().filter(|a| named.iter().any(|n| n.id().unescaped() == *a)).collect();
    if !names.is_disjoint(&agent) && !names.is_disjoint(&person) {
        out.push(
            "one rule is about agents (read, export, …) or about persons (approve, see, …), not both; split it"
                .to_owned(),
        );
    }
    names
}

fn tier(policy: &Policy, wanted: bool, tiers: &[Tier], out: &mut Vec<String>) -> Option<usize> {
    let known = || tiers.iter().map(|t| t.name.as_str()).collect::<Vec<_>>().join(", ");
    match policy.annotation("tier") {
        None if wanted => {
            out.push(format!("a permit for agents needs a @tier(\"…\"); there are: {}", known()));
            None
        }
        Some(_) if !wanted => {
            out.push("@tier belongs to permits for agents only; remove it".to_owned());
            None
        }
        Some(name) => {
            let found = tiers.iter().position(|t| t.name.as_str() == name);
            if found.is_none() {
                out.push(format!("there is no tier of that name; there are: {}", known()));
            }
            found
        }
        None => None,
    }
}
