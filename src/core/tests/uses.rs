//! The small lattice of the tests, and an independent reading of it: a permission is the set of single
//! uses that it allows. No use of `narrows` or `meet` here.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::core::permission::{Constraint, Permission};

const RESOURCES: [&str; 2] = ["pg", "kv"];
const ACTIONS: [&str; 3] = ["read", "write", "export"];
const TABLES: [&str; 3] = ["t1", "t2", "t3"];
const PATHS: [&str; 4] = ["/a", "/a/b", "/a/b/c", "/z"];
const ROWS: [u64; 3] = [1, 10, 100];

/// How many permissions [`permission`] knows.
pub const PERMISSIONS: usize = 10;

/// The n-th permission of the lattice.
pub fn permission(n: usize) -> Permission {
    let (resource, actions, constraints) = [
        ("pg", json!(["read", "write", "export"]), json!({})),
        ("pg", json!(["read", "write"]), json!({"tables": {"set": ["t1", "t2"]}})),
        ("pg", json!(["read"]), json!({"tables": {"set": ["t1", "t2"]}, "rows": {"max": 10}})),
        ("pg", json!(["read"]), json!({"tables": {"set": ["t1"]}, "rows": {"max": 1}})),
        ("pg", json!(["read"]), json!({"rows": {"max": 10}})),
        ("pg", json!(["export"]), json!({"tables": {"set": ["t2"]}})),
        ("kv", json!(["read", "write"]), json!({})),
        ("kv", json!(["read", "write"]), json!({"paths": {"paths": ["/a/"]}})),
        ("kv", json!(["read"]), json!({"paths": {"paths": ["/a/b/"]}})),
        ("kv", json!(["read"]), json!({"paths": {"paths": ["/a/b"]}})),
    ][n % PERMISSIONS]
        .clone();
    serde_json::from_value(json!({"resource": resource, "actions": actions, "constraints": constraints}))
        .expect("a permission of the table above")
}

/// One truth value for each single use, in a fixed order.
pub fn uses<'a>(permissions: impl IntoIterator<Item = &'a Permission>) -> Vec<bool> {
    let mut all = vec![false; RESOURCES.len() * ACTIONS.len() * TABLES.len() * PATHS.len() * ROWS.len()];
    for permission in permissions {
        let mut at = 0;
        for resource in RESOURCES {
            for action in ACTIONS {
                let named =
                    permission.resource.as_str() == resource && permission.actions.iter().any(|a| a.as_str() == action);
                for table in TABLES {
                    for path in PATHS {
                        for rows in ROWS {
                            all[at] |= named && bounds_allow(permission, table, path, rows);
                            at += 1;
                        }
                    }
                }
            }
        }
    }
    all
}

fn bounds_allow(permission: &Permission, table: &str, path: &str, rows: u64) -> bool {
    permission.constraints.values().all(|bound| match bound {
        Constraint::Set(names) => names.contains(table),
        Constraint::Paths(patterns) => {
            patterns.iter().any(|p| p == path || (p.ends_with('/') && path.strip_prefix(p.as_str()).is_some()))
        }
        Constraint::Max(max) => rows <= *max,
    })
}

/// True if every use in `less` is one in `more`.
pub fn within(less: &[bool], more: &[bool]) -> bool {
    less.iter().zip(more).all(|(less, more)| !less || *more)
}

/// The canonical text of plain JSON (ASCII keys, small integers), written again without `digest.rs`.
pub fn plain(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("[{}]", items.iter().map(plain).collect::<Vec<_>>().join(",")),
        Value::Object(map) => {
            let sorted: BTreeMap<_, _> = map.iter().collect();
            let entries: Vec<_> = sorted.iter().map(|(k, v)| format!("{}:{}", json!(k), plain(v))).collect();
            format!("{{{}}}", entries.join(","))
        }
        other => other.to_string(),
    }
}
