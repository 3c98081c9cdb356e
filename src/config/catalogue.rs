//! The catalogue: targets, resources and their actions. What is not in it can't be asked for.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::core::digest::{CanonicalError, Digest};
use crate::core::id::{ActionName, ConstraintName, ResourceName};
use crate::core::permission::ConstraintKind;

/// The operator's list, as written.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Catalogue {
    /// The environments that resources stand in.
    #[serde(default)]
    pub environment: Vec<Environment>,
    /// Places where credentials are minted.
    #[serde(default)]
    pub target: Vec<Target>,
    /// Things that can be asked for.
    #[serde(default)]
    pub resource: Vec<Resource>,
}

/// `[[environment]]`: where resources stand, and whether production can be reached from there.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Environment {
    /// Its name, for example `sandbox`, `prod`.
    pub name: String,
    /// True if what happens there can reach production (networks, credentials, shared data). There is no default:
    /// the operator has to say it.
    pub reaches_production: bool,
}

/// `[[target]]`: one database, Vault, token issuer, with the connector that speaks to it.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// The target's name, used by resources.
    pub name: ResourceName,
    /// The connector: `token`, `postgres`, `vault`.
    pub kind: String,
    /// What the connector needs; each has its own checked form.
    #[serde(default)]
    pub settings: toml::Table,
}

/// `[[resource]]`: one thing that can be asked for.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Resource {
    /// Its name, for example `postgres/billing`.
    pub name: ResourceName,
    /// The target that mints for it.
    pub target: ResourceName,
    /// What a reviewer calls it, for example `billing database`.
    pub title: String,
    /// One of the declared environments.
    pub environment: String,
    /// True if nothing that happens here can reach production. Only such a resource can be exempt from approval;
    /// refused where the environment reaches production.
    #[serde(default)]
    pub isolated: bool,
    /// For example `none`, `internal`, `customer`, `secret`. For policies.
    pub sensitivity: String,
    /// Free labels, for policies (`customer-data`, `outside`).
    #[serde(default)]
    pub labels: BTreeSet<String>,
    /// The verbs on it.
    pub action: Vec<Action>,
    /// The bounds that a request may set, by name.
    #[serde(default)]
    pub constraint: BTreeMap<ConstraintName, ConstraintConfig>,
    /// What the connector needs; each has its own checked form.
    #[serde(default)]
    pub settings: toml::Table,
}

/// `[[resource.action]]`: a verb, with its effect as the *operator* declares it.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Action {
    /// The verb, for example `read`.
    pub name: ActionName,
    /// What it does to the world.
    pub effect: Effect,
    /// True if what it does can be rolled back. Undeclared means irreversible.
    #[serde(default)]
    pub reversible: bool,
    /// For the reviewer's sentence, for example `read`, `change rows of`.
    #[serde(default)]
    pub says: Option<String>,
    /// What the connector needs; each has its own checked form.
    #[serde(default)]
    pub settings: toml::Table,
}

/// What an action does to the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// Looks.
    Read,
    /// Data leaves.
    Export,
    /// Changes.
    Write,
    /// Runs something.
    Execute,
    /// Removes.
    Delete,
    /// Changes who may do what.
    Administer,
}

/// A bound that a request may set.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ConstraintConfig {
    /// How it is compared.
    pub kind: ConstraintKind,
    /// For sets and paths: everything there is. A request that doesn't say gets all of it, explicitly.
    #[serde(default)]
    pub values: BTreeSet<String>,
    /// For `max`: the highest that can be asked for, and what a request that doesn't say gets.
    #[serde(default)]
    pub max: Option<u64>,
}

impl Effect {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Read, Self::Export, Self::Write, Self::Execute, Self::Delete, Self::Administer];

    /// As it is written in the catalogue and in policies.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Export => "export",
            Self::Write => "write",
            Self::Execute => "execute",
            Self::Delete => "delete",
            Self::Administer => "administer",
        }
    }
}

impl Resource {
    /// The action of that name.
    pub fn action(&self, name: &ActionName) -> Option<&Action> {
        self.action.iter().find(|a| a.name == *name)
    }
}

impl Catalogue {
    /// The resource of that name.
    pub fn resource(&self, name: &ResourceName) -> Option<&Resource> {
        self.resource.iter().find(|r| r.name == *name)
    }
    /// The target of that name.
    pub fn target(&self, name: &ResourceName) -> Option<&Target> {
        self.target.iter().find(|t| t.name == *name)
    }
    /// The environment of that name.
    pub fn environment(&self, name: &str) -> Option<&Environment> {
        self.environment.iter().find(|e| e.name == name)
    }
    /// SHA-256 (hex) of the canonical JSON of a resource's entry and of its target's. It is in the digest, so a
    /// change of the catalogue between approval and mint is seen (regression D11). `None`: not in the catalogue.
    pub fn entry_hash(&self, name: &ResourceName) -> Option<Result<Digest, CanonicalError>> {
        let resource = self.resource(name)?;
        let target = self.target(&resource.target)?;
        Some(Digest::of(&EntryForm { resource, target }))
    }
}

/// What [`Catalogue::entry_hash`] hashes.
#[derive(Serialize)]
struct EntryForm<'a> {
    resource: &'a Resource,
    target: &'a Target,
}
