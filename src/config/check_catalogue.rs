//! What must hold in the catalogue: names, references, isolation, constraints, settings that can be hashed.
//! What a connector needs of its settings, the connector checks.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::core::permission::{
    ACTIONS_MAX, CONSTRAINT_VALUE_BYTES_MAX, CONSTRAINT_VALUES_MAX, CONSTRAINTS_MAX, ConstraintKind, is_plain_path,
};

use super::catalogue::{Catalogue, ConstraintConfig, Environment, Resource, Target};
use super::load::Problem;
use super::reader::{Doc, Item};
use super::secret_ref::SecretRef;
use crate::core::digest::INTEGER_MAX;

/// The connectors that there are.
pub const KINDS: [&str; 3] = ["token", "postgres", "vault"];
/// Most resources in a catalogue.
pub const RESOURCES_MAX: usize = 10_000;
/// Most labels on one resource.
pub const LABELS_MAX: usize = 32;
/// Longest title or `says`, in characters.
pub const TITLE_CHARS_MAX: usize = 120;
/// Fields of a request's entry, and of RFC 9396 section 2.2, that can't be names of constraints.
const RESERVED: [&str; 10] = [
    "type",
    "identifier",
    "actions",
    "locations",
    "datatypes",
    "privileges",
    "intent",
    "parent",
    "max_ttl",
    "resource",
];
/// Settings under these names hold secrets, so they must be references.
const SECRET_KEYS: [&str; 7] = ["password", "passwd", "secret", "client_secret", "secret_id", "private_key", "token"];

/// Reads and checks the catalogue. `None` if nothing of it could be used.
pub(super) fn read(mut doc: Doc<'_>, base: Option<&Path>, out: &mut Vec<Problem>) -> Catalogue {
    let mut unread = Unread::default();
    let environments = doc.list::<Environment>("environment", "name", &mut unread.environments, out);
    let targets = doc.list::<Target>("target", "name", &mut unread.targets, out);
    let resources = doc.list::<Resource>("resource", "name", &mut unread.resources, out);
    doc.finish(&["environment", "target", "resource"], out);

    unique("environment", &environments, |e| e.name.as_str(), out);
    unique("target", &targets, |t| t.name.as_str(), out);
    unique("resource", &resources, |r| r.name.as_str(), out);
    for item in &environments {
        if !is_word(&item.value.name) {
            out.push(item.problem(&["name"], word_rule("an environment's name")));
        }
    }
    for item in &targets {
        if !KINDS.contains(&item.value.kind.as_str()) {
            let what = format!("there is no such connector; `kind` is one of {}", KINDS.join(", "));
            out.push(item.problem(&["kind"], what));
        }
        settings(item, &["settings"], &item.value.settings, base, out);
    }
    if resources.len() > RESOURCES_MAX {
        out.push(resources[RESOURCES_MAX].problem(&[], format!("more than {RESOURCES_MAX} resources")));
    }
    let env: BTreeMap<&str, &Environment> = environments.iter().map(|e| (e.value.name.as_str(), &e.value)).collect();
    let target: BTreeSet<&str> = targets.iter().map(|t| t.value.name.as_str()).collect();
    let mut kinds = BTreeMap::new();
    for item in &resources {
        let r = &item.value;
        if !target.contains(r.target.as_str()) && !unread.targets.iter().any(|t| t == r.target.as_str()) {
            let what =
                format!("resource {}: no [[target]] is named `{}`; add it or correct the name", r.name, r.target);
            out.push(item.problem(&["target"], what));
        }
        environment(item, &env, &unread, out);
        words(item, out);
        actions(item, base, out);
        constraints(item, &mut kinds, out);
        settings(item, &["settings"], &r.settings, base, out);
    }
    Catalogue {
        environment: environments.into_iter().map(|i| i.value).collect(),
        target: targets.into_iter().map(|i| i.value).collect(),
        resource: resources.into_iter().map(|i| i.value).collect(),
    }
}

/// Names of entries that could not be read: they exist, so references to them are no second problem.
#[derive(Default)]
struct Unread {
    environments: Vec<String>,
    targets: Vec<String>,
    resources: Vec<String>,
}

/// Each name once.
pub(super) fn unique<'i, T>(
    what: &str,
    items: &'i [Item<'_, T>],
    name: impl Fn(&'i T) -> &'i str,
    out: &mut Vec<Problem>,
) {
    let mut seen: BTreeMap<&str, &Item<'_, T>> = BTreeMap::new();
    for item in items {
        let n = name(&item.value);
        if let Some(first) = seen.get(n) {
            let what = format!("{what} `{n}` is there already, at {}; give one of them another name", first.place(&[]));
            out.push(item.problem(&[], what));
        } else {
            seen.insert(n, item);
        }
    }
}

/// A name of one piece: it goes into facts like `label/effect` and `env:NAME/effect`.
fn is_word(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_".contains(&b))
}

fn word_rule(what: &str) -> String {
    format!("{what} has 1 to 64 lower-case letters, digits, `-`, `_`")
}

fn environment(item: &Item<'_, Resource>, env: &BTreeMap<&str, &Environment>, unread: &Unread, out: &mut Vec<Problem>) {
    let r = &item.value;
    match env.get(r.environment.as_str()) {
        None if unread.environments.contains(&r.environment) => {}
        None => out.push(item.problem(
            &["environment"],
            format!(
                "resource {}: environment `{}` isn't declared; add [[environment]] with `reaches_production`",
                r.name, r.environment
            ),
        )),
        Some(e) if r.isolated && e.reaches_production => out.push(item.problem(
            &["isolated"],
            format!(
                "resource {}: a resource whose environment can reach production cannot be exempt; remove `isolated`, or \
                 move it to an environment with `reaches_production = false` ({} has true)",
                r.name, e.name
            ),
        )),
        Some(_) => {}
    }
}

fn words(item: &Item<'_, Resource>, out: &mut Vec<Problem>) {
    let r = &item.value;
    if !is_word(&r.sensitivity) {
        out.push(item.problem(&["sensitivity"], word_rule("a sensitivity")));
    }
    if r.labels.len() > LABELS_MAX {
        out.push(item.problem(&["labels"], format!("more than {LABELS_MAX} labels")));
    }
    if r.labels.iter().any(|l| !is_word(l)) {
        out.push(item.problem(&["labels"], word_rule("a label")));
    }
    shown(item, &["title"], &r.title, out);
}

/// Text of the operator that reviewers read: one line, nothing hidden.
fn shown(item: &Item<'_, Resource>, path: &[&str], text: &str, out: &mut Vec<Problem>) {
    let hidden = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
    };
    if text.trim().is_empty() || text.chars().count() > TITLE_CHARS_MAX || text.chars().any(hidden) {
        let what =
            format!("resource {}: needs 1 to {TITLE_CHARS_MAX} characters, none of them invisible", item.value.name);
        out.push(item.problem(path, what));
    }
}

fn actions(item: &Item<'_, Resource>, base: Option<&Path>, out: &mut Vec<Problem>) {
    let r = &item.value;
    if r.action.is_empty() || r.action.len() > ACTIONS_MAX {
        out.push(item.problem(&[], format!("resource {}: needs 1 to {ACTIONS_MAX} [[resource.action]]", r.name)));
    }
    let mut seen = BTreeSet::new();
    for (i, action) in r.action.iter().enumerate() {
        let at = i.to_string();
        if !seen.insert(&action.name) {
            let what = format!("resource {}: action `{}` is there already; give it another name", r.name, action.name);
            out.push(item.problem(&["action", &at, "name"], what));
        }
        if let Some(says) = &action.says {
            shown(item, &["action", &at, "says"], says, out);
        }
        settings(item, &["action", &at, "settings"], &action.settings, base, out);
    }
}

fn constraints<'i>(
    item: &'i Item<'_, Resource>,
    kinds: &mut BTreeMap<&'i str, (ConstraintKind, String)>,
    out: &mut Vec<Problem>,
) {
    let r = &item.value;
    if r.constraint.len() > CONSTRAINTS_MAX {
        out.push(
            item.problem(&["constraint"], format!("resource {}: more than {CONSTRAINTS_MAX} constraints", r.name)),
        );
    }
    for (name, c) in &r.constraint {
        let path = ["constraint", name.as_str()];
        let mut say =
            |what: String| out.push(item.problem(&path, format!("resource {}, constraint {name}: {what}", r.name)));
        if RESERVED.contains(&name.as_str()) {
            say("this name is a field of every request; choose another".to_owned());
        }
        // The schema of the policies has one type for a name (`context.constraints.tables`).
        let (kind, first) = kinds.entry(name.as_str()).or_insert_with(|| (c.kind, item.place(&path)));
        if *kind != c.kind {
            say(format!("it has another kind at {first}; one name has one kind everywhere"));
        }
        if let Err(what) = bounds(c) {
            say(what);
        }
    }
}

fn bounds(c: &ConstraintConfig) -> Result<(), String> {
    match c.kind {
        ConstraintKind::Max => match c.max {
            _ if !c.values.is_empty() => Err("kind `max` has `max`, not `values`".to_owned()),
            Some(m) if m <= INTEGER_MAX => Ok(()),
            Some(_) => Err("`max` must be at most 2^53-1".to_owned()),
            None => Err("kind `max` needs `max`: what a request that doesn't say gets".to_owned()),
        },
        ConstraintKind::Set | ConstraintKind::Paths => {
            if c.max.is_some() {
                return Err("`max` belongs to kind `max`; here `values` lists everything there is".to_owned());
            }
            if c.values.is_empty() || c.values.len() > CONSTRAINT_VALUES_MAX {
                return Err(format!("`values` needs 1 to {CONSTRAINT_VALUES_MAX} entries: everything there is"));
            }
            if c.values
                .iter()
                .any(|v| v.is_empty() || v.len() > CONSTRAINT_VALUE_BYTES_MAX || v.chars().any(char::is_control))
            {
                return Err(format!(
                    "each value has 1 to {CONSTRAINT_VALUE_BYTES_MAX} bytes and no control characters"
                ));
            }
            if c.kind == ConstraintKind::Paths && !c.values.iter().all(|v| is_plain_path(v)) {
                return Err("a path is absolute, without empty, `.` or `..` parts, `%`, `\\`, `?`, `#`".to_owned());
            }
            Ok(())
        }
    }
}

/// Settings are hashed (whole numbers only), and a secret in them is a reference that can be read.
fn settings<T>(item: &Item<'_, T>, path: &[&str], table: &toml::Table, base: Option<&Path>, out: &mut Vec<Problem>) {
    for (key, value) in table {
        let path = [path, &[key.as_str()]].concat();
        setting(item, &path, key, value, base, out);
    }
}

fn setting<T>(
    item: &Item<'_, T>,
    path: &[&str],
    key: &str,
    value: &toml::Value,
    base: Option<&Path>,
    out: &mut Vec<Problem>,
) {
    match value {
        toml::Value::String(text) => {
            let reference = text.starts_with("env:") || text.starts_with("file:");
            if !reference && !SECRET_KEYS.contains(&key) {
                return;
            }
            if let Err(e) =
                SecretRef::try_from(text.clone()).and_then(|r| base.map_or(Ok(()), |base| r.read(base).map(|_| ())))
            {
                out.push(item.problem(path, format!("`{key}`: {e}")));
            }
        }
        toml::Value::Integer(i) if i.unsigned_abs() > INTEGER_MAX => {
            out.push(item.problem(path, format!("`{key}`: must be within ±(2^53-1)")));
        }
        toml::Value::Float(_) | toml::Value::Datetime(_) => {
            out.push(item.problem(path, format!("`{key}`: only text, whole numbers, true/false, lists and tables")));
        }
        toml::Value::Array(values) => {
            for (i, v) in values.iter().enumerate() {
                let at = i.to_string();
                setting(item, &[path, &[at.as_str()]].concat(), key, v, base, out);
            }
        }
        toml::Value::Table(t) => settings(item, path, t, base, out),
        toml::Value::Integer(_) | toml::Value::Boolean(_) => {}
    }
}
