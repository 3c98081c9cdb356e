//! The Cedar schema, made from the catalogue and the tiers: a policy that names a fact that can't exist is
//! refused when it is loaded.

use std::collections::BTreeMap;

use cedar_policy::{Schema, SchemaFragment};
use serde_json::{Map, Value, json};

use crate::config::{Catalogue, Effect};
use crate::core::permission::ConstraintKind;
use crate::core::tier::Tier;

use super::PersonAction;

/// The schema as Cedar's JSON form.
fn schema_json(catalogue: &Catalogue, tiers: &[Tier]) -> Value {
    let string = json!({"type": "String"});
    let strings = json!({"type": "Set", "element": {"type": "String"}});
    let boolean = json!({"type": "Boolean"});
    let long = json!({"type": "Long"});
    let optional = json!({"type": "String", "required": false});
    let record = |attributes: Value| json!({"type": "Record", "attributes": attributes});

    let context = record(json!({
        "task": record(json!({
            "name": string, "depth": long, "life_secs": long, "recent_requests": long,
            "intent_labels": strings, "holds": strings,
        })),
        "action": record(json!({"name": string, "reversible": boolean})),
        "constraints": record(Value::Object(constraint_types(catalogue))),
        "asked": strings, "holds": strings, "together": strings,
        "systems_changed": long,
    }));
    let mut actions = Map::new();
    for effect in Effect::ALL {
        let applies =
            json!({"principalTypes": ["Agent"], "resourceTypes": ["Resource"], "context": {"type": "AskContext"}});
        actions.insert(effect.as_str().to_owned(), json!({"appliesTo": applies}));
    }
    for action in PersonAction::ALL {
        let mut on = Vec::new();
        if action.is_on_grant() {
            on.push("Grant");
        }
        if action.is_on_broker() {
            on.push("Broker");
        }
        let applies = json!({"principalTypes": ["Person"], "resourceTypes": on, "context": record(json!({}))});
        actions.insert(action.as_str().to_owned(), json!({"appliesTo": applies}));
    }
    let mut entities = json!({
        "Agent": {
            "shape": record(json!({
                "id": string, "issuer": string, "method": string, "trust_domain": optional,
                "owner": optional, "team": optional, "groups": strings,
            })),
            "tags": string,
        },
        "Person": {"shape": record(json!({"id": string, "groups": strings}))},
        "Resource": {"shape": record(json!({
            "name": string, "target": string, "kind": string, "environment": string,
            "reaches_production": boolean, "isolated": boolean, "sensitivity": string, "labels": strings,
        }))},
        "Grant": {"shape": record(json!({
            "agent": string, "owner": optional, "team": optional,
            "tier": {"type": "Entity", "name": "Tier"},
            "resources": {"type": "Set", "element": {"type": "Entity", "name": "Resource"}},
            "targets": strings, "kinds": strings, "environments": strings, "labels": strings,
            "sensitivities": strings, "effects": strings, "facts": strings,
        }))},
        "Broker": {},
    });
    // An enumerated type can't be empty; without tiers no policy with `Tier::"…"` is valid, which is right.
    let names: Vec<&str> = tiers.iter().map(|t| t.name.as_str()).collect();
    entities["Tier"] = if names.is_empty() { json!({}) } else { json!({"enum": names}) };
    json!({"": {"commonTypes": {"AskContext": context}, "entityTypes": entities, "actions": actions}})
}

/// One optional attribute for each constraint's name; the catalogue's check has made its kind unique.
fn constraint_types(catalogue: &Catalogue) -> Map<String, Value> {
    let mut kinds = BTreeMap::new();
    for (name, config) in catalogue.resource.iter().flat_map(|r| &r.constraint) {
        kinds.entry(name.as_str()).or_insert(config.kind);
    }
    kinds
        .into_iter()
        .map(|(name, kind)| {
            let of = match kind {
                ConstraintKind::Max => json!({"type": "Long", "required": false}),
                ConstraintKind::Set | ConstraintKind::Paths => {
                    json!({"type": "Set", "element": {"type": "String"}, "required": false})
                }
            };
            (name.to_owned(), of)
        })
        .collect()
}

/// The schema, and the same as text for people.
pub(super) fn generate(catalogue: &Catalogue, tiers: &[Tier]) -> Result<(Schema, String), String> {
    let json = schema_json(catalogue, tiers);
    let text = SchemaFragment::from_json_value(json.clone())
        .map_err(|e| e.to_string())?
        .to_cedarschema()
        .map_err(|e| e.to_string())?;
    let schema = Schema::from_json_value(json).map_err(|e| e.to_string())?;
    Ok((schema, text))
}
