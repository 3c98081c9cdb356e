//! What may be done: a resource, actions on it, and constraints. Permissions form a lattice:
//! [`Permission::narrows`] is decidable for every constraint, and guarantee 7 rests on it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::id::{ActionName, ConstraintName, ResourceName};

/// Most permissions in one request.
pub const PERMISSIONS_MAX: usize = 16;
/// Most actions in one permission.
pub const ACTIONS_MAX: usize = 32;
/// Most constraints in one permission.
pub const CONSTRAINTS_MAX: usize = 16;
/// Most values in one constraint.
pub const CONSTRAINT_VALUES_MAX: usize = 256;
/// Longest constraint value, in bytes.
pub const CONSTRAINT_VALUE_BYTES_MAX: usize = 512;

/// How a constraint is compared. Declared by the catalogue, never by the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConstraintKind {
    /// A set of names (tables, repositories, methods): fewer is narrower.
    Set,
    /// A set of path prefixes (`/a/` covers everything below it, `/a` only itself): deeper is narrower.
    Paths,
    /// An upper bound (rows, bytes): lower is narrower.
    Max,
}

/// One bound on what a permission covers.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Constraint {
    /// Exactly these names.
    Set(BTreeSet<String>),
    /// Exactly these paths; a trailing `/` covers everything below.
    Paths(BTreeSet<String>),
    /// At most this many.
    Max(u64),
}

impl Constraint {
    /// The kind, as the catalogue declares it.
    pub const fn kind(&self) -> ConstraintKind {
        match self {
            Self::Set(_) => ConstraintKind::Set,
            Self::Paths(_) => ConstraintKind::Paths,
            Self::Max(_) => ConstraintKind::Max,
        }
    }

    /// True if everything that `self` allows, `wider` allows too. Different kinds never compare.
    pub fn narrows(&self, wider: &Self) -> bool {
        match (self, wider) {
            (Self::Set(a), Self::Set(b)) => a.is_subset(b),
            (Self::Paths(a), Self::Paths(b)) => a.iter().all(|p| b.iter().any(|w| path_covers(w, p))),
            (Self::Max(a), Self::Max(b)) => a <= b,
            _ => false,
        }
    }

    /// What both allow: the greatest lower bound. `None` for different kinds.
    pub fn meet(&self, other: &Self) -> Option<Self> {
        match (self, other) {
            (Self::Set(a), Self::Set(b)) => Some(Self::Set(a & b)),
            (Self::Max(a), Self::Max(b)) => Some(Self::Max(*a.min(b))),
            (Self::Paths(a), Self::Paths(b)) => {
                let deeper = |xs: &BTreeSet<String>, ys: &BTreeSet<String>| -> BTreeSet<String> {
                    xs.iter().filter(|x| ys.iter().any(|y| path_covers(y, x))).cloned().collect()
                };
                Some(Self::Paths(&deeper(a, b) | &deeper(b, a)))
            }
            _ => None,
        }
    }
}

/// True if the path pattern `wider` covers everything that `path` covers.
fn path_covers(wider: &str, path: &str) -> bool {
    wider == path || (wider.ends_with('/') && path.starts_with(wider))
}

/// Checks a path before it becomes a constraint: absolute, no empty, `.` or `..` segments, no
/// percent-encoding, no backslash (regression A16), so that prefix comparison means what it says.
pub fn is_plain_path(path: &str) -> bool {
    path.starts_with('/') && !path.contains(['%', '\\', '?', '#']) && !path.chars().any(char::is_control) && {
        let inner = path.strip_suffix('/').unwrap_or(path);
        inner.is_empty() || inner[1..].split('/').all(|s| !matches!(s, "" | "." | ".."))
    }
}

/// One thing an agent may do: the unit of request, approval and minting.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Permission {
    /// The catalogue's resource.
    pub resource: ResourceName,
    /// The actions on it. Never empty.
    pub actions: BTreeSet<ActionName>,
    /// Bounds. A name that is absent is unbounded.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub constraints: BTreeMap<ConstraintName, Constraint>,
}

impl Permission {
    /// True if everything that `self` allows, `wider` allows too.
    ///
    /// Reflexive, transitive, antisymmetric up to equivalent path sets. An absent constraint is the
    /// top of its kind: `self` may bound what `wider` leaves open, never the other way round.
    pub fn narrows(&self, wider: &Self) -> bool {
        self.resource == wider.resource
            && self.actions.is_subset(&wider.actions)
            && wider
                .constraints
                .iter()
                .all(|(name, bound)| self.constraints.get(name).is_some_and(|mine| mine.narrows(bound)))
    }

    /// What both allow, or `None` when they have nothing in common.
    pub fn meet(&self, other: &Self) -> Option<Self> {
        if self.resource != other.resource {
            return None;
        }
        let actions: BTreeSet<_> = &self.actions & &other.actions;
        if actions.is_empty() {
            return None;
        }
        let mut constraints = self.constraints.clone();
        for (name, bound) in &other.constraints {
            let met = match constraints.get(name) {
                Some(mine) => mine.meet(bound)?,
                None => bound.clone(),
            };
            constraints.insert(name.clone(), met);
        }
        Some(Self { resource: self.resource.clone(), actions, constraints })
    }
}

/// True if each of `narrow` is covered by one of `wide` (guarantee 7 for whole requests).
pub fn all_narrow(narrow: &[Permission], wide: &[Permission]) -> bool {
    narrow.iter().all(|n| wide.iter().any(|w| n.narrows(w)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name() -> impl Strategy<Value = String> {
        prop::sample::select(vec!["a", "b", "c", "d"]).prop_map(str::to_owned)
    }
    fn path() -> impl Strategy<Value = String> {
        (prop::collection::vec(prop::sample::select(vec!["a", "b"]), 0..3), any::<bool>()).prop_map(|(parts, dir)| {
            let mut p = format!("/{}", parts.join("/"));
            if dir && !p.ends_with('/') {
                p.push('/');
            }
            p
        })
    }
    fn constraint(kind: u8) -> BoxedStrategy<Constraint> {
        match kind {
            0 => prop::collection::btree_set(name(), 0..4).prop_map(Constraint::Set).boxed(),
            1 => prop::collection::btree_set(path(), 0..4).prop_map(Constraint::Paths).boxed(),
            _ => (0u64..5).prop_map(Constraint::Max).boxed(),
        }
    }
    fn permission() -> impl Strategy<Value = Permission> {
        (
            prop::sample::select(vec!["r1", "r2"]),
            prop::collection::btree_set(name(), 1..4),
            prop::option::of(constraint(0)),
            prop::option::of(constraint(1)),
            prop::option::of(constraint(2)),
        )
            .prop_map(|(resource, actions, tables, paths, rows)| Permission {
                resource: ResourceName::new(resource).unwrap(),
                actions: actions.iter().map(|a| ActionName::new(a).unwrap()).collect(),
                constraints: [("tables", tables), ("paths", paths), ("rows", rows)]
                    .into_iter()
                    .filter_map(|(n, c)| Some((ConstraintName::new(n).unwrap(), c?)))
                    .collect(),
            })
    }
    /// An independent reading of what a permission allows: one concrete use.
    fn allows(p: &Permission, resource: &str, action: &str, table: &str, path: &str, rows: u64) -> bool {
        p.resource.as_str() == resource
            && p.actions.iter().any(|a| a.as_str() == action)
            && p.constraints.iter().all(|(_, c)| match c {
                Constraint::Set(s) => s.contains(table),
                Constraint::Paths(s) => {
                    s.iter().any(|w| w == path || (w.ends_with('/') && path.starts_with(w.as_str())))
                }
                Constraint::Max(m) => rows <= *m,
            })
    }

    proptest! {
        #[test]
        fn narrows_is_a_partial_order_and_sound(a in permission(), b in permission(), c in permission(),
            action in name(), table in name(), p in path(), rows in 0u64..6) {
            prop_assert!(a.narrows(&a));
            if a.narrows(&b) && b.narrows(&c) { prop_assert!(a.narrows(&c)); }
            if a.narrows(&b) && allows(&a, a.resource.as_str(), &action, &table, &p, rows) {
                prop_assert!(allows(&b, a.resource.as_str(), &action, &table, &p, rows));
            }
        }
        #[test]
        fn meet_is_the_greatest_lower_bound(a in permission(), b in permission(), c in permission()) {
            match a.meet(&b) {
                Some(m) => {
                    prop_assert!(m.narrows(&a) && m.narrows(&b));
                    if c.narrows(&a) && c.narrows(&b) { prop_assert!(c.narrows(&m)); }
                }
                None => prop_assert!(!(c.narrows(&a) && c.narrows(&b))),
            }
        }
    }

    #[test]
    fn paths_that_could_mean_something_else_are_refused() {
        for bad in ["", "a", "/a/../b", "/./a", "//a", "/a//", "/a%2f", "/a\\b", "/a?b", "/a\n"] {
            assert!(!is_plain_path(bad), "{bad:?}");
        }
        for good in ["/", "/a", "/a/", "/a.b/c-d"] {
            assert!(is_plain_path(good), "{good:?}");
        }
    }
}
