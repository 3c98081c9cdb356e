//! The one sentence and the facts, made from the structure that will be minted and the catalogue alone.
//! Stored with the assessment and part of the digest: page, command line and notices show the same words.

use crate::config::{Catalogue, Effect, Resource};
use crate::core::permission::{Constraint, Permission};
use crate::core::request::AgentFacts;

/// Values of one constraint that a sentence names; more are counted.
const VALUES_TOLD_MAX: usize = 4;

/// A length of time, as a person says it.
pub fn duration(secs: u64) -> String {
    match secs {
        0..=119 => format!("{secs} s"),
        120..=7199 if secs.is_multiple_of(60) => format!("{} min", secs / 60),
        120..=7199 => format!("{} min {} s", secs / 60, secs % 60),
        _ if secs.is_multiple_of(3600) => format!("{} h", secs / 3600),
        _ => format!("{} h {} min", secs / 3600, (secs % 3600) / 60),
    }
}

/// "*ci-migrator*, for *Ana*, asks to change rows of invoices in prod / billing database for 15 min."
pub fn sentence(
    catalogue: &Catalogue,
    agent: &AgentFacts,
    owner: Option<&str>,
    permissions: &[Permission],
    life_secs: u64,
) -> String {
    let who = owner.map_or_else(|| agent.name.clone(), |owner| format!("{}, for {owner},", agent.name));
    let parts: Vec<String> = permissions.iter().map(|p| part(catalogue, p)).collect();
    format!("{who} asks to {} for {}.", join(&parts, "; and to "), duration(life_secs))
}

fn part(catalogue: &Catalogue, permission: &Permission) -> String {
    let Some(resource) = catalogue.resource(&permission.resource) else {
        return format!("use {}", permission.resource);
    };
    let verbs: Vec<String> = verbs(resource, permission);
    let what = objects(permission);
    let place = format!("{} / {}", resource.environment, resource.title);
    // Without an object of its own, the verb is about the place: "read sandbox / notes".
    if what.is_empty() {
        format!("{} {place}", join(&verbs, " and "))
    } else {
        format!("{} {what} in {place}", join(&verbs, " and "))
    }
}

fn verbs(resource: &Resource, permission: &Permission) -> Vec<String> {
    permission
        .actions
        .iter()
        .map(|name| resource.action(name).and_then(|a| a.says.clone()).unwrap_or_else(|| name.to_string()))
        .collect()
}

/// "invoices, customers (at most 100 rows)".
fn objects(permission: &Permission) -> String {
    let mut sets = Vec::new();
    let mut bounds = Vec::new();
    for (name, constraint) in &permission.constraints {
        match constraint {
            Constraint::Set(values) | Constraint::Paths(values) => sets.push(values_told(values.iter())),
            Constraint::Max(n) => bounds.push(format!("at most {n} {name}")),
        }
    }
    let sets = join(&sets, ", ");
    match (sets.is_empty(), bounds.is_empty()) {
        (_, true) => sets,
        (true, false) => format!("({})", bounds.join(", ")),
        (false, false) => format!("{sets} ({})", bounds.join(", ")),
    }
}

/// A few values by name, the rest by number.
pub fn values_told<'a>(values: impl ExactSizeIterator<Item = &'a String>) -> String {
    let count = values.len();
    let told: Vec<&str> = values.take(VALUES_TOLD_MAX).map(String::as_str).collect();
    if count > VALUES_TOLD_MAX {
        format!("{} and {} more", told.join(", "), count - VALUES_TOLD_MAX)
    } else {
        told.join(", ")
    }
}

/// One line: "read invoices in prod / billing database".
pub fn permission_line(catalogue: &Catalogue, permission: &Permission) -> String {
    part(catalogue, permission)
}

/// What it can, one line for each action.
pub fn can(resource: &Resource, permission: &Permission) -> Vec<String> {
    let what = objects(permission);
    permission
        .actions
        .iter()
        .map(|name| {
            let says = resource.action(name).and_then(|a| a.says.clone()).unwrap_or_else(|| name.to_string());
            if what.is_empty() { format!("{says} {}", resource.title) } else { format!("{says} {what}") }
        })
        .collect()
}

/// What it cannot: the other actions of the resource, and the values of its bounds that are left out.
pub fn cannot(resource: &Resource, permission: &Permission) -> Vec<String> {
    let mut lines: Vec<String> = resource
        .action
        .iter()
        .filter(|a| !permission.actions.contains(&a.name))
        .map(|a| format!("{} {}", a.says.clone().unwrap_or_else(|| a.name.to_string()), resource.title))
        .collect();
    for (name, config) in &resource.constraint {
        if let Some(Constraint::Set(given) | Constraint::Paths(given)) = permission.constraints.get(name) {
            let left: Vec<&String> = config.values.iter().filter(|v| !given.contains(*v)).collect();
            if !left.is_empty() {
                lines.push(format!("touch {}", values_told(left.into_iter())));
            }
        }
    }
    lines
}

/// Actions that can't be rolled back: undeclared means irreversible.
pub fn irreversible(resource: &Resource, permission: &Permission) -> Vec<String> {
    permission
        .actions
        .iter()
        .filter(|name| resource.action(name).is_none_or(|a| !a.reversible && a.effect != Effect::Read))
        .map(|name| resource.action(name).and_then(|a| a.says.clone()).unwrap_or_else(|| name.to_string()))
        .collect()
}

/// What `new` has that `old` had not, and the other way round, one line each.
pub fn difference(old: &[Permission], old_secs: u64, new: &[Permission], new_secs: u64) -> Vec<String> {
    let flat = |permissions: &[Permission]| -> std::collections::BTreeSet<String> {
        permissions
            .iter()
            .flat_map(|p| {
                let bounds: Vec<String> = p
                    .constraints
                    .iter()
                    .flat_map(|(name, c)| match c {
                        Constraint::Set(v) | Constraint::Paths(v) => {
                            v.iter().map(|v| format!("{} {name}: {v}", p.resource)).collect::<Vec<_>>()
                        }
                        Constraint::Max(n) => vec![format!("{} at most {n} {name}", p.resource)],
                    })
                    .collect();
                p.actions.iter().map(|a| format!("{a} on {}", p.resource)).chain(bounds).collect::<Vec<_>>()
            })
            .collect()
    };
    let (old, new) = (flat(old), flat(new));
    let mut lines: Vec<String> = new.difference(&old).map(|l| format!("+ {l}")).collect();
    lines.extend(old.difference(&new).map(|l| format!("− {l}")));
    if old_secs != new_secs {
        lines.push(format!("{} (last time {})", duration(new_secs), duration(old_secs)));
    }
    lines
}

fn join(parts: &[String], with: &str) -> String {
    parts.join(with)
}
