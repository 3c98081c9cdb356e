//! One entry of a request's `authorization_details` (RFC 9396) → a permission with every bound explicit,
//! and back. Nothing beyond the catalogue gets through; unknown fields are refused (guarantee 12).

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use crate::core::id::{ActionName, ConstraintName, NAME_BYTES_MAX, ResourceName};
use crate::core::permission::{
    ACTIONS_MAX, CONSTRAINT_VALUE_BYTES_MAX, CONSTRAINT_VALUES_MAX, Constraint, ConstraintKind, PERMISSIONS_MAX,
    Permission, is_plain_path,
};

use super::catalogue::{Catalogue, ConstraintConfig, Resource};

/// Most names offered as "perhaps you meant".
pub const NEAREST_MAX: usize = 3;
/// How many letters may differ in such a name.
const DISTANCE_MAX: usize = 3;

/// Why an entry can't be asked for. Meant for the agent; echoes nothing but names in the catalogue's alphabet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}{}", self.hint())]
pub struct RequestProblem {
    /// Which entry, from 0, when there are several.
    pub entry: Option<usize>,
    /// The field, for example `identifier`, `tables`.
    pub field: Option<String>,
    /// What is wrong and what to do.
    pub what: String,
    /// Names that the agent could have meant, nearest first; only of what it is told anyway.
    pub nearest: Vec<String>,
}

impl RequestProblem {
    fn new(field: &str, what: impl Into<String>) -> Self {
        Self { entry: None, field: Some(field.to_owned()), what: what.into(), nearest: Vec::new() }
    }
    fn near(mut self, nearest: Vec<String>) -> Self {
        self.nearest = nearest;
        self
    }
    fn hint(&self) -> String {
        if self.nearest.is_empty() { String::new() } else { format!("; perhaps: {}", self.nearest.join(", ")) }
    }
}

/// Normalises all entries of a request, [`PERMISSIONS_MAX`] at most. `told` says which resources the agent may
/// know of; hints name no others. It is asked for hints alone: finding it out costs an evaluation for each action that
/// there is, which a request without faults must not wait for.
pub fn normalise_all(
    catalogue: &Catalogue,
    entries: &[Value],
    told: &dyn Fn(&ResourceName) -> bool,
) -> Result<Vec<Permission>, RequestProblem> {
    if entries.is_empty() || entries.len() > PERMISSIONS_MAX {
        let what = format!("a request names 1 to {PERMISSIONS_MAX} permissions");
        return Err(RequestProblem::new("authorization_details", what));
    }
    let one = |(i, e)| normalise(catalogue, e, told).map_err(|p| RequestProblem { entry: Some(i), ..p });
    entries.iter().enumerate().map(one).collect()
}

/// Normalises one entry: `{"type":"postgres","identifier":"postgres/billing","actions":["read"],"tables":["invoices"]}`.
/// Bounds that it doesn't mention are filled in from the catalogue: all values, the highest number.
pub fn normalise(
    catalogue: &Catalogue,
    entry: &Value,
    told: &dyn Fn(&ResourceName) -> bool,
) -> Result<Permission, RequestProblem> {
    let Value::Object(fields) = entry else {
        return Err(RequestProblem::new("authorization_details", "each entry must be a JSON object"));
    };
    let resource = find_resource(catalogue, fields, told)?;
    let told = || told(&resource.name);
    check_type(catalogue, resource, fields, &told)?;
    let actions = read_actions(resource, fields, &told)?;
    for field in fields.keys() {
        let known = matches!(field.as_str(), "type" | "identifier" | "actions")
            || resource.constraint.keys().any(|c| c.as_str() == field);
        if !known {
            let names: Vec<&str> = resource.constraint.keys().map(ConstraintName::as_str).collect();
            let is_told = told();
            let hint = if is_told { nearest(field, names.iter().copied()) } else { Vec::new() };
            let what = format!("unknown field{}; this resource knows type, identifier, actions{}", quoted(field), {
                if is_told && !names.is_empty() { format!(", {}", names.join(", ")) } else { String::new() }
            });
            return Err(RequestProblem::new(&plain(field), what).near(hint));
        }
    }
    let mut constraints = BTreeMap::new();
    for (name, config) in &resource.constraint {
        let value = match fields.get(name.as_str()) {
            Some(value) => bound(name, config, value, &told)?,
            None => whole(config),
        };
        constraints.insert(name.clone(), value);
    }
    Ok(Permission { resource: resource.name.clone(), actions, constraints })
}

/// The same permission in its wire form, as it is told to the agent once granted.
pub fn wire_form(catalogue: &Catalogue, permission: &Permission) -> Value {
    let kind =
        catalogue.resource(&permission.resource).and_then(|r| catalogue.target(&r.target)).map(|t| t.kind.as_str());
    let mut out = Map::new();
    out.insert("type".to_owned(), json!(kind));
    out.insert("identifier".to_owned(), json!(permission.resource));
    out.insert("actions".to_owned(), json!(permission.actions));
    for (name, bound) in &permission.constraints {
        let value = match bound {
            Constraint::Set(v) | Constraint::Paths(v) => json!(v),
            Constraint::Max(n) => json!(n),
        };
        out.insert(name.as_str().to_owned(), value);
    }
    Value::Object(out)
}

fn find_resource<'c>(
    catalogue: &'c Catalogue,
    fields: &Map<String, Value>,
    told: &dyn Fn(&ResourceName) -> bool,
) -> Result<&'c Resource, RequestProblem> {
    let Some(text) = fields.get("identifier").and_then(Value::as_str) else {
        return Err(RequestProblem::new("identifier", "`identifier` must name a resource of the catalogue"));
    };
    let found = ResourceName::new(text).ok().and_then(|name| catalogue.resource(&name));
    found.ok_or_else(|| {
        let names = catalogue.resource.iter().filter(|r| told(&r.name)).map(|r| r.name.as_str());
        let what = format!("there is no resource{}; GET /v1/catalogue lists what you may ask for", quoted(text));
        RequestProblem::new("identifier", what).near(nearest(text, names))
    })
}

fn check_type(
    catalogue: &Catalogue,
    resource: &Resource,
    fields: &Map<String, Value>,
    told: &dyn Fn() -> bool,
) -> Result<(), RequestProblem> {
    let kind = catalogue.target(&resource.target).map(|t| t.kind.as_str());
    if kind.is_some() && fields.get("type").and_then(Value::as_str) == kind {
        return Ok(());
    }
    Err(RequestProblem::new(
        "type",
        match kind {
            Some(kind) if told() => format!("`type` of {} is `{kind}`", resource.name),
            _ => "`type` doesn't fit this resource".to_owned(),
        },
    ))
}

fn read_actions(
    resource: &Resource,
    fields: &Map<String, Value>,
    told: &dyn Fn() -> bool,
) -> Result<BTreeSet<ActionName>, RequestProblem> {
    let fail = |what: String| RequestProblem::new("actions", what);
    let list = match fields.get("actions") {
        Some(Value::Array(list)) if (1..=ACTIONS_MAX).contains(&list.len()) => list,
        _ => return Err(fail(format!("`actions` must be a list of 1 to {ACTIONS_MAX} names"))),
    };
    let mut actions = BTreeSet::new();
    for item in list {
        let Some(text) = item.as_str() else { return Err(fail("each action must be a text".to_owned())) };
        let found = ActionName::new(text).ok().filter(|name| resource.action(name).is_some());
        let Some(name) = found else {
            let names = resource.action.iter().map(|a| a.name.as_str());
            // A resource has few actions: when none is near, the first of them are told.
            let is_told = told();
            let mut hint = if is_told { nearest(text, names.clone()) } else { Vec::new() };
            if hint.is_empty() && is_told {
                hint = names.take(NEAREST_MAX).map(str::to_owned).collect();
            }
            return Err(fail(format!("{} has no action{}", resource.name, quoted(text))).near(hint));
        };
        actions.insert(name);
    }
    Ok(actions)
}

/// The bounds of a request that names none.
pub fn whole_bounds(resource: &Resource) -> BTreeMap<ConstraintName, Constraint> {
    resource.constraint.iter().map(|(name, config)| (name.clone(), whole(config))).collect()
}

/// Everything there is: what a request gets that doesn't say.
fn whole(config: &ConstraintConfig) -> Constraint {
    match config.kind {
        ConstraintKind::Set => Constraint::Set(config.values.clone()),
        ConstraintKind::Paths => Constraint::Paths(config.values.clone()),
        // A `max` without a number doesn't pass the catalogue's check; closed all the same (guarantee 12).
        ConstraintKind::Max => Constraint::Max(config.max.unwrap_or(0)),
    }
}

fn bound(
    name: &ConstraintName,
    config: &ConstraintConfig,
    value: &Value,
    told: &dyn Fn() -> bool,
) -> Result<Constraint, RequestProblem> {
    let fail = |what: String| RequestProblem::new(name.as_str(), what);
    if config.kind == ConstraintKind::Max {
        let n = value.as_u64().ok_or_else(|| fail(format!("`{name}` must be a whole number, 0 or more")))?;
        let max = config.max.unwrap_or(0);
        return if n <= max {
            Ok(Constraint::Max(n))
        } else {
            Err(fail(format!("`{name}` goes beyond the catalogue: at most {max} can be asked for")))
        };
    }
    let Some(list) = value.as_array().filter(|l| (1..=CONSTRAINT_VALUES_MAX).contains(&l.len())) else {
        return Err(fail(format!("`{name}` must be a list of 1 to {CONSTRAINT_VALUES_MAX} texts")));
    };
    let mut values = BTreeSet::new();
    for item in list {
        let Some(text) = item.as_str().filter(|t| !t.is_empty() && t.len() <= CONSTRAINT_VALUE_BYTES_MAX) else {
            return Err(fail(format!("each of `{name}` must be a text of 1 to {CONSTRAINT_VALUE_BYTES_MAX} bytes")));
        };
        // Before any comparison of prefixes (regression A16).
        if config.kind == ConstraintKind::Paths && !is_plain_path(text) {
            let what = "each path must be absolute, without empty, `.` or `..` parts, `%`, `\\`, `?`, `#`";
            return Err(fail(format!("`{name}`: {what}")));
        }
        let one = BTreeSet::from([text.to_owned()]);
        let inside = match config.kind {
            ConstraintKind::Paths => Constraint::Paths(one).narrows(&Constraint::Paths(config.values.clone())),
            _ => config.values.contains(text),
        };
        if !inside {
            let hint = if told() { nearest(text, config.values.iter().map(String::as_str)) } else { Vec::new() };
            return Err(fail(format!("`{name}` goes beyond the catalogue: one value isn't among its own")).near(hint));
        }
        values.insert(text.to_owned());
    }
    Ok(match config.kind {
        ConstraintKind::Paths => Constraint::Paths(values),
        _ => Constraint::Set(values),
    })
}

/// The text, quoted, if it is a name in the catalogue's own alphabet; nothing otherwise (regression R2).
fn quoted(text: &str) -> String {
    match ResourceName::new(text) {
        Ok(name) => format!(" `{name}`"),
        Err(_) => " of that name".to_owned(),
    }
}

fn plain(field: &str) -> String {
    if ResourceName::new(field).is_ok() { field.to_owned() } else { "authorization_details".to_owned() }
}

/// The nearest names: few letters differ, or the last part is the same.
fn nearest<'n>(text: &str, names: impl Iterator<Item = &'n str>) -> Vec<String> {
    if text.len() > NAME_BYTES_MAX {
        return Vec::new();
    }
    let last = |t: &str| t.rsplit('/').next().unwrap_or_default().to_owned();
    let mut found: Vec<(usize, &str)> = names
        .filter_map(|name| match distance(text, name) {
            Some(d) => Some((d, name)),
            None if last(text) == last(name) => Some((DISTANCE_MAX + 1, name)),
            None => None,
        })
        .collect();
    found.sort_unstable();
    found.into_iter().take(NEAREST_MAX).map(|(_, name)| name.to_owned()).collect()
}

/// Levenshtein distance of the bytes if it is at most [`DISTANCE_MAX`] and less than half of the longer text.
fn distance(a: &str, b: &str) -> Option<usize> {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    if a.len().abs_diff(b.len()) > DISTANCE_MAX {
        return None;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        let mut least = row[0];
        for (j, y) in b.iter().enumerate() {
            let cost = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(row[j + 1] + 1);
            least = least.min(row[j + 1]);
        }
        if least > DISTANCE_MAX {
            return None; // no later row gets smaller
        }
    }
    let d = row[b.len()];
    (d <= DISTANCE_MAX && 2 * d < a.len().max(b.len())).then_some(d)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_names_are_near() {
        let names = ["postgres/billing", "postgres/sandbox", "vault/billing", "read"];
        assert_eq!(nearest("postgres/biling", names.into_iter()), ["postgres/billing"]);
        assert_eq!(nearest("billing", names.into_iter()), ["postgres/billing", "vault/billing"]);
        assert!(nearest("nothing-like-it", names.into_iter()).is_empty());
        assert!(nearest(&"x".repeat(5000), names.into_iter()).is_empty());
        assert_eq!(distance("kitten", "kittens"), Some(1));
        assert_eq!(distance("ab", "cd"), None);
    }
}
