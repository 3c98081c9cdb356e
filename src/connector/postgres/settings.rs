//! What the connector works by: the operator's `settings` tables as a checked [`Plan`]. Checking: `settings_check.rs`.
//! Not here: anything that touches the network.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::ident::Ident;
use super::settings_check::Check;
use super::tls;
use crate::config::{Problem, Resource, SecretRef, Target};
use crate::core::id::{ActionName, ResourceName};
use crate::core::permission::{Constraint, Permission};

/// The one constraint that this connector enforces.
pub const TABLES: &str = "tables";
/// Most groups of one action, or of one table of it.
pub const GROUPS_MAX: usize = 32;
/// Most hot standbys of one target.
pub const STANDBYS_MAX: usize = 16;
/// Most databases beside the resource's own.
pub const DATABASES_MAX: usize = 32;
/// Highest `connection_limit`.
pub const CONNECTIONS_MAX: u16 = 100;

/// Most rounds of a verifier: beyond this each login would take a second.
pub const SCRAM_ITERATIONS_MAX: NonZeroU32 = NonZeroU32::new(100_000).unwrap();

/// PostgreSQL's own.
pub const fn default_port() -> u16 {
    5432
}

/// How the wire is protected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SslMode {
    /// TLS, certificate and name verified against `ca_file`.
    #[default]
    VerifyFull,
    /// None: for loopback and Unix sockets only.
    Disable,
}

impl SslMode {
    /// As libpq spells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::VerifyFull => "verify-full",
            Self::Disable => "disable",
        }
    }
}

/// How the broker's rights are given (config/postgres/).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Setup {
    /// The broker's login has CREATEROLE (10-broker-direct.sql).
    #[default]
    Direct,
    /// The broker's login may only call `countersign.*` (11-broker-functions.sql).
    Functions,
}

/// A server of the target.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Standby {
    /// Name, address, or folder of a Unix socket.
    pub host: String,
    /// Port.
    #[serde(default = "default_port")]
    pub port: u16,
}

/// Everything checked: what the connector works by.
pub struct Plan {
    /// The target's name in the catalogue.
    pub target: ResourceName,
    /// The primary.
    pub primary: Standby,
    /// Where roles are made from.
    pub home: Ident,
    /// The broker's login.
    pub user: Ident,
    /// Its password, read late.
    pub password: Option<SecretRef>,
    /// How the wire is protected, for agents too.
    pub sslmode: SslMode,
    /// TLS towards all servers; none for loopback without.
    pub tls: Option<tls::MakeTls>,
    /// The operator's CA (PEM), for agents.
    pub ca_pem: Option<String>,
    /// Where agents connect.
    pub agent: Standby,
    /// Hot standbys.
    pub standbys: Vec<Standby>,
    /// How the broker's rights are given.
    pub setup: Setup,
    /// The group that holds CONNECT.
    pub connection_group: Ident,
    /// Sessions of one lease at once.
    pub connection_limit: u16,
    /// Rounds of the password's verifier.
    pub scram_iterations: NonZeroU32,
    /// What every name of ours begins with.
    pub prefix: String,
    /// What can be asked for.
    pub resources: BTreeMap<ResourceName, ResourcePlan>,
}

/// One resource.
pub struct ResourcePlan {
    /// The database that the credential names.
    pub database: Ident,
    /// Other databases where its leases may connect.
    pub other_databases: Vec<Ident>,
    /// True if the resource has the constraint `tables`.
    pub by_tables: bool,
    /// What each verb grants.
    pub actions: BTreeMap<ActionName, ActionPlan>,
}

/// One verb.
#[derive(Default)]
pub struct ActionPlan {
    /// Groups, whatever the tables.
    pub groups: BTreeSet<Ident>,
    /// Groups by table.
    pub tables: BTreeMap<String, BTreeSet<Ident>>,
}

/// Why a permission can't be turned into groups. The catalogue and the core should have refused it before.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the catalogue has no groups for this permission ({0}); nothing is minted")]
pub struct NotInPlan(pub &'static str);

impl Plan {
    /// The resource and the groups behind a permission: exactly what was approved (guarantee 3).
    pub fn groups(&self, permission: &Permission) -> Result<(&ResourcePlan, BTreeSet<&Ident>), NotInPlan> {
        let resource = self.resources.get(&permission.resource).ok_or(NotInPlan("unknown resource"))?;
        let mut tables = None;
        for (name, constraint) in &permission.constraints {
            match constraint {
                Constraint::Set(set) if name.as_str() == TABLES && resource.by_tables => tables = Some(set),
                _ => return Err(NotInPlan("a constraint that is not enforced here")),
            }
        }
        if resource.by_tables && tables.is_none_or(BTreeSet::is_empty) {
            return Err(NotInPlan("no tables named"));
        }
        let mut groups = BTreeSet::new();
        for action in &permission.actions {
            let action = resource.actions.get(action).ok_or(NotInPlan("unknown action"))?;
            groups.extend(&action.groups);
            for table in tables.into_iter().flatten() {
                groups.extend(action.tables.get(table).ok_or(NotInPlan("unknown table"))?);
            }
        }
        if groups.is_empty() {
            return Err(NotInPlan("no actions"));
        }
        Ok((resource, groups))
    }

    /// Every group that some action gives.
    pub fn all_groups(&self) -> BTreeSet<&Ident> {
        let actions = self.resources.values().flat_map(|r| r.actions.values());
        actions.flat_map(|a| a.groups.iter().chain(a.tables.values().flatten())).collect()
    }

    /// Every database where a lease of ours may be, without the home.
    pub fn databases(&self) -> BTreeSet<&Ident> {
        self.resources.values().flat_map(|r| r.other_databases.iter().chain([&r.database])).collect()
    }

    /// Checks one target and its resources.
    pub fn new(target: &Target, resources: &[&Resource], base: &Path, prefix: &str) -> Result<Self, Vec<Problem>> {
        let mut check = Check { problems: Vec::new(), place: format!("target {}", target.name), prefix };
        let plan = check.target(target, base);
        let mut by_name = BTreeMap::new();
        for resource in resources {
            check.place = format!("resource {}", resource.name);
            if let Some(plan) = check.resource(resource) {
                by_name.insert(resource.name.clone(), plan);
            }
        }
        match plan {
            Some(plan) if check.problems.is_empty() => Ok(Self { resources: by_name, ..plan }),
            _ => Err(check.problems),
        }
    }
}

#[cfg(test)]
mod tests;
