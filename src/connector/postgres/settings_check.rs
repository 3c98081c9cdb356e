//! Reading and checking the operator's `settings` tables: every problem is found in one pass, with what to do.
//! Not here: what comes of them (`settings.rs`).

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::path::Path;

use serde::Deserialize;

use super::ident::Ident;
use super::settings::{
    ActionPlan, CONNECTIONS_MAX, DATABASES_MAX, GROUPS_MAX, Plan, ResourcePlan, SCRAM_ITERATIONS_MAX, STANDBYS_MAX,
    Setup, SslMode, Standby, TABLES, default_port,
};
use super::{scram, tls};
use crate::config::{Problem, Resource, SecretRef, Target};
use crate::core::permission::ConstraintKind;

/// `[target.settings]` of a target with `kind = "postgres"`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TargetSettings {
    host: String,
    #[serde(default = "default_port")]
    port: u16,
    #[serde(default = "default_dbname")]
    dbname: String,
    user: String,
    #[serde(default)]
    password: Option<SecretRef>,
    #[serde(default)]
    sslmode: SslMode,
    #[serde(default)]
    ca_file: Option<std::path::PathBuf>,
    #[serde(default)]
    agent_host: Option<String>,
    #[serde(default)]
    agent_port: Option<u16>,
    #[serde(default)]
    standbys: Vec<Standby>,
    #[serde(default)]
    setup: Setup,
    connection_group: String,
    #[serde(default = "default_connections")]
    connection_limit: u16,
    #[serde(default = "default_iterations")]
    scram_iterations: NonZeroU32,
}

fn default_dbname() -> String {
    "postgres".to_owned()
}
const fn default_iterations() -> NonZeroU32 {
    scram::ITERATIONS
}
const fn default_connections() -> u16 {
    5
}

/// `[resource.settings]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ResourceSettings {
    database: String,
    #[serde(default)]
    other_databases: Vec<String>,
}

/// `[resource.action.settings]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ActionSettings {
    #[serde(default)]
    groups: Vec<String>,
    #[serde(default)]
    tables: BTreeMap<String, Vec<String>>,
}

/// The problems found so far, and where we are.
pub struct Check<'a> {
    /// Found so far.
    pub problems: Vec<Problem>,
    /// Where we are.
    pub place: String,
    /// What the names of leases begin with.
    pub prefix: &'a str,
}

impl Check<'_> {
    fn problem(&mut self, what: impl Into<String>) {
        self.problems.push(Problem { place: self.place.clone(), what: what.into() });
    }

    /// Parse errors name the key and what is expected there; values are left out (regression R2).
    fn parse<T: for<'de> Deserialize<'de>>(&mut self, settings: &toml::Table) -> Option<T> {
        match T::deserialize(settings.clone()) {
            Ok(parsed) => Some(parsed),
            Err(e) => {
                let says = without_values(e.message());
                self.problem(format!("settings: {says}; see config/postgres/README.md for the keys"));
                None
            }
        }
    }

    /// A role of the operator's.
    fn role(&mut self, what: &str, text: &str) -> Option<Ident> {
        if text.starts_with(self.prefix) {
            self.problem(format!(
                "{what} must not begin with {:?}, the prefix of leases: sweeps would end it",
                self.prefix
            ));
        }
        self.ident(what, text)
    }

    fn ident(&mut self, what: &str, text: &str) -> Option<Ident> {
        match Ident::new(text) {
            Ok(ident) => Some(ident),
            Err(e) => {
                self.problem(format!("{what}: {e}"));
                None
            }
        }
    }

    fn at_most(&mut self, what: &str, count: usize, max: usize) {
        if count > max {
            self.problem(format!("{what}: {count}, and at most {max} are allowed"));
        }
    }

    /// Checks a target. The plan has no resources yet.
    pub fn target(&mut self, target: &Target, base: &Path) -> Option<Plan> {
        let prefix = self.prefix;
        let prefix_fits = prefix.len() >= 3
            && prefix.len() < 32
            && prefix.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
            && prefix.as_bytes()[0].is_ascii_lowercase()
            && !prefix.starts_with("pg_");
        if !prefix_fits {
            self.problem(
                "the name prefix must have 3 to 31 characters of [a-z0-9_], begin with a letter, not with pg_",
            );
        }
        let s: TargetSettings = self.parse(&target.settings)?;
        let home = self.ident("dbname", &s.dbname);
        let user = self.role("user", &s.user);
        let connection_group = self.role("connection_group", &s.connection_group);
        self.at_most("standbys", s.standbys.len(), STANDBYS_MAX);
        if s.connection_limit == 0 || s.connection_limit > CONNECTIONS_MAX {
            self.problem(format!("connection_limit must be 1 to {CONNECTIONS_MAX}"));
        }
        if s.scram_iterations > SCRAM_ITERATIONS_MAX {
            self.problem(format!("scram_iterations must be 1 to {SCRAM_ITERATIONS_MAX}"));
        }
        if let Some(Err(e)) = s.password.as_ref().map(|p| p.read(base)) {
            self.problem(format!("password: {e}"));
        }
        let primary = Standby { host: s.host, port: s.port };
        let agent = Standby {
            host: s.agent_host.unwrap_or_else(|| primary.host.clone()),
            port: s.agent_port.unwrap_or(primary.port),
        };
        for server in [&primary, &agent].into_iter().chain(&s.standbys) {
            if server.host.is_empty()
                || server.host.len() > 253
                || server.host.chars().any(|c| c.is_control() || c == ',')
            {
                self.problem("host: one name, address or folder of a Unix socket (begins with /)");
            } else if s.sslmode == SslMode::Disable && !is_local(&server.host) {
                self.problem(
                    "sslmode = \"disable\" is for loopback and Unix sockets only: use verify-full and ca_file",
                );
            } else if s.sslmode == SslMode::VerifyFull && server.host.starts_with('/') {
                self.problem("a Unix socket has no TLS: set sslmode = \"disable\"");
            }
        }
        let (tls, ca_pem) = match (s.sslmode, &s.ca_file) {
            (SslMode::Disable, None) => (None, None),
            (SslMode::Disable, Some(_)) => {
                self.problem("ca_file has no use with sslmode = \"disable\": take one of them away");
                (None, None)
            }
            (SslMode::VerifyFull, None) => {
                self.problem("ca_file is missing: the PEM file of the CA that signs the server's certificate");
                (None, None)
            }
            (SslMode::VerifyFull, Some(path)) => match read_ca(&base.join(path)) {
                Ok((tls, pem)) => (Some(tls), Some(pem)),
                Err(e) => {
                    self.problem(e);
                    (None, None)
                }
            },
        };
        Some(Plan {
            target: target.name.clone(),
            primary,
            home: home?,
            user: user?,
            password: s.password,
            sslmode: s.sslmode,
            tls,
            ca_pem,
            agent,
            standbys: s.standbys,
            setup: s.setup,
            connection_group: connection_group?,
            connection_limit: s.connection_limit,
            scram_iterations: s.scram_iterations,
            prefix: prefix.to_owned(),
            resources: BTreeMap::new(),
        })
    }

    /// Checks a resource.
    pub fn resource(&mut self, resource: &Resource) -> Option<ResourcePlan> {
        let settings: Option<ResourceSettings> = self.parse(&resource.settings);
        let mut values = None;
        for (name, constraint) in &resource.constraint {
            if name.as_str() == TABLES && constraint.kind == ConstraintKind::Set {
                if constraint.values.is_empty() {
                    self.problem(
                        "constraint tables: list every table in values; what is not listed can't be asked for",
                    );
                }
                values = Some(&constraint.values);
            } else {
                self.problem(format!(
                    "constraint {name} can't be enforced by PostgreSQL groups: only `tables` with kind = \"set\" can. \
                     Take it away, or make a view or a function with that bound and a group for it"
                ));
            }
        }
        let mut actions = BTreeMap::new();
        for action in &resource.action {
            self.place = format!("resource {}, action {}", resource.name, action.name);
            let Some(s) = self.parse::<ActionSettings>(&action.settings) else { continue };
            let mut plan = ActionPlan { groups: self.groups(&s.groups), tables: BTreeMap::new() };
            for (table, groups) in &s.tables {
                if groups.is_empty() {
                    self.problem(format!("tables.{table}: name at least one group"));
                }
                plan.tables.insert(table.clone(), self.groups(groups));
            }
            match values {
                None if !s.tables.is_empty() => self.problem(
                    "settings.tables needs the resource's constraint `tables` (kind = \"set\"), or nobody could bound it",
                ),
                None if s.groups.is_empty() => self.problem("settings.groups: name the NOLOGIN groups that this action gives"),
                Some(values) => {
                    for missing in values.iter().filter(|v| !s.tables.contains_key(*v)) {
                        self.problem(format!("settings.tables has no groups for {missing}, which constraint tables lists"));
                    }
                    for extra in s.tables.keys().filter(|t| !values.contains(*t)) {
                        self.problem(format!("settings.tables.{extra} is not in the values of constraint tables"));
                    }
                }
                None => {}
            }
            actions.insert(action.name.clone(), plan);
        }
        self.place = format!("resource {}", resource.name);
        let settings = settings?;
        self.at_most("other_databases", settings.other_databases.len(), DATABASES_MAX);
        Some(ResourcePlan {
            database: self.ident("database", &settings.database)?,
            other_databases: settings.other_databases.iter().filter_map(|d| self.ident("other_databases", d)).collect(),
            by_tables: values.is_some(),
            actions,
        })
    }

    fn groups(&mut self, names: &[String]) -> BTreeSet<Ident> {
        self.at_most("groups", names.len(), GROUPS_MAX);
        names.iter().filter_map(|n| self.role("groups", n)).collect()
    }
}

/// serde shows values in double quotes (those of an enum in backticks) and keys in backticks.
fn without_values(message: &str) -> String {
    if let Some((_, expected)) = message.split_once("`, ").filter(|_| message.starts_with("unknown variant")) {
        return format!("unknown value, {expected}");
    }
    let parts: Vec<&str> = message.split('"').collect();
    parts.iter().enumerate().map(|(i, part)| if i % 2 == 0 { *part } else { "…" }).collect()
}

/// Loopback addresses by number, `localhost`, and Unix sockets.
fn is_local(host: &str) -> bool {
    host.starts_with('/')
        || host == "localhost"
        || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn read_ca(path: &Path) -> Result<(tls::MakeTls, String), String> {
    let pem = std::fs::read_to_string(path).map_err(|e| format!("ca_file {}: {e}", path.display()))?;
    let tls = tls::MakeTls::from_pem(&pem).map_err(|what| format!("ca_file {} {what}", path.display()))?;
    Ok((tls, pem))
}
