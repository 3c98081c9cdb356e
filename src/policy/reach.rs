//! What a permit could reach at most, whoever asks and whatever is held: the rule without the conditions that
//! need an agent or a context. It errs on the side of reaching, so a warning may be too many, never too few.

use std::collections::HashSet;
use std::str::FromStr;

use cedar_policy::{Authorizer, Context, Decision, Entities, EntityUid, Policy, PolicySet, Request};
use serde_json::{Value, json};

use super::engine::Engine;
use super::facts::Entry;
use super::load::Rule;

/// A rule reduced to what it says of resources.
pub(super) struct Reach<'e> {
    engine: &'e Engine,
    entities: &'e Entities,
    /// `None`: could not be reduced, so it counts as reaching everything.
    relaxed: Option<PolicySet>,
}

impl<'e> Reach<'e> {
    pub(super) fn new(engine: &'e Engine, entities: &'e Entities, rule: &Rule) -> Self {
        Self { engine, entities, relaxed: relax(rule) }
    }

    /// True if the rule may match this resource for some agent in some context.
    pub(super) fn may_match(&self, entry: &Entry) -> bool {
        let Some(set) = &self.relaxed else { return true };
        let Ok(principal) = EntityUid::from_str("Agent::\"any\"") else { return true };
        let action = self.engine.index.action("read");
        let request = Request::new(principal, action, entry.uid.clone(), Context::empty(), None);
        let Ok(request) = request else { return true };
        let response = Authorizer::new().is_authorized(&request, set, self.entities);
        response.decision() == Decision::Allow || response.diagnostics().errors().next().is_some()
    }
}

fn relax(rule: &Rule) -> Option<PolicySet> {
    let mut form = rule.policy.to_json().ok()?;
    let conditions = form.get("conditions")?.as_array()?.iter().flat_map(relax_condition).collect::<Vec<_>>();
    form["conditions"] = Value::Array(conditions);
    form["principal"] = json!({"op": "All"});
    form["action"] = json!({"op": "All"});
    let policy = Policy::from_json(None, form).ok()?;
    PolicySet::from_policies([policy]).ok()
}

/// `when { a && b }` is two conditions, `unless { a || b }` too; those about more than the resource are dropped.
fn relax_condition(condition: &Value) -> Vec<Value> {
    let kind = condition.get("kind").and_then(Value::as_str).unwrap_or_default();
    let operator = if kind == "unless" { "||" } else { "&&" };
    let mut parts = Vec::new();
    split(condition.get("body").unwrap_or(&Value::Null), operator, &mut parts);
    parts.into_iter().filter(|p| !needs_more(p)).map(|p| json!({"kind": kind, "body": p})).collect()
}

fn split<'v>(body: &'v Value, operator: &str, out: &mut Vec<&'v Value>) {
    match body.get(operator) {
        Some(pair) => {
            for side in ["left", "right"] {
                split(pair.get(side).unwrap_or(&Value::Null), operator, out);
            }
        }
        None => out.push(body),
    }
}

/// True if the expression is about anything but the resource.
fn needs_more(expression: &Value) -> bool {
    match expression {
        Value::Object(map) => map.iter().any(|(key, value)| match key.as_str() {
            "Var" => value.as_str() != Some("resource"),
            "Value" => false,
            _ => needs_more(value),
        }),
        Value::Array(items) => items.iter().any(needs_more),
        _ => false,
    }
}

/// Texts in a rule that look like facts, `…/effect`.
pub(super) fn fact_literals(rule: &Rule) -> HashSet<String> {
    let mut found = HashSet::new();
    if let Ok(form) = rule.policy.to_json() {
        texts(form.get("conditions").unwrap_or(&Value::Null), &mut found);
    }
    found.retain(|text| {
        text.rsplit_once('/').is_some_and(|(_, e)| crate::config::Effect::ALL.iter().any(|known| known.as_str() == e))
    });
    found
}

fn texts(value: &Value, out: &mut HashSet<String>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                match value {
                    Value::String(text) if key == "Value" => {
                        out.insert(text.clone());
                    }
                    _ => texts(value, out),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|i| texts(i, out)),
        _ => {}
    }
}
