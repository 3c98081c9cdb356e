//! The operator's words about a resource at a Vault target, checked. What the target can't be made to hold is
//! refused here (DESIGN 8).

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::path::{Engine, MintPath};
use crate::config::{Problem, Resource};
use crate::core::id::ResourceName;
use crate::core::permission::ConstraintKind;

/// Highest accepted life of a credential: 32 days, the target's own default maximum.
const TTL_SECS_MAX: u64 = 32 * 24 * 3600;
/// Shortest prefix of user names: a sweep by a shorter one could meet somebody else's users.
const USERNAME_PREFIX_BYTES_MIN: usize = 4;
/// Most names in a certificate, and most principals.
const NAMES_MAX: usize = 32;
/// Longest name or principal, in bytes.
const NAME_BYTES_MAX: usize = 253;

/// `[resource.settings]` of a resource at a `vault` target.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ResourceSettings {
    /// `database`, `pki` or `ssh`.
    pub engine: Engine,
    /// The path, literally: `database/creds/ROLE`, `pki/issue/ROLE`, `ssh/sign/ROLE`.
    pub path: String,
    /// The longest life of a credential. Database: the role's `default_ttl`; pki, ssh: what is asked for at most.
    pub ttl_secs_max: u64,
    /// True if the role makes credentials for this broker alone, so that what no lease explains may be ended.
    #[serde(default)]
    pub dedicated: bool,

    /// database: the `postgres` target whose users these are, for sweeps.
    #[serde(default)]
    pub postgres_target: Option<ResourceName>,
    /// database: what the role's `username_template` puts before each name.
    #[serde(default)]
    pub username_prefix: Option<String>,
    /// database: the role's revocation statements terminate sessions: `config check --live` shall try it.
    #[serde(default)]
    pub revocation_cuts_sessions: bool,
    /// database: what that said when it had tried it. Only then a reviewer reads that sessions are cut.
    #[serde(default)]
    pub revocation_tried: Option<String>,
    /// database: sessions end after so long whatever happens (a pooler's or proxy's limit).
    #[serde(default)]
    pub session_secs_max: Option<u64>,
    /// database: where the user may log in (`host`, `port`, `dbname` …): handed out beside user and password.
    #[serde(default)]
    pub connection: BTreeMap<String, String>,

    /// pki: the common name, if no `names` constraint says it.
    #[serde(default)]
    pub common_name: Option<String>,
    /// pki: more DNS names, beside `common_name`.
    #[serde(default)]
    pub alt_names: BTreeSet<String>,
    /// pki: the role has `generate_lease`.
    #[serde(default)]
    pub generate_lease: bool,
    /// pki: the role has `no_store`; the certificate itself is journaled, since revoking needs it.
    #[serde(default)]
    pub no_store: bool,

    /// ssh: the principals, if no `valid_principals` constraint says them.
    #[serde(default)]
    pub valid_principals: BTreeSet<String>,
    /// ssh: extensions, for example `permit-pty = ""`.
    #[serde(default)]
    pub extensions: BTreeMap<String, String>,
    /// ssh: critical options, for example `force-command`.
    #[serde(default)]
    pub critical_options: BTreeMap<String, String>,
}

/// A resource that was checked.
#[derive(Debug, Clone)]
pub(super) struct Minting {
    /// Its path, taken apart.
    pub path: MintPath,
    /// As written.
    pub settings: ResourceSettings,
}

impl Minting {
    /// True if the target lists what this role made, and all of it is ours.
    pub(super) fn swept(&self) -> bool {
        self.settings.dedicated
            && match self.settings.engine {
                Engine::Database => true,
                Engine::Pki => self.settings.generate_lease,
                Engine::Ssh => false,
            }
    }
    /// The prefix to look for at the database behind, if that may be done.
    pub(super) fn behind_prefix(&self) -> Option<&str> {
        let s = &self.settings;
        s.postgres_target.as_ref().filter(|_| s.dedicated).and(s.username_prefix.as_deref())
    }
}

/// Reads and checks one resource's settings.
pub(super) fn read(resource: &Resource, problems: &mut Vec<Problem>) -> Option<Minting> {
    let place = format!("resource {}", resource.name);
    let before = problems.len();
    let mut wrong = |what: String| problems.push(Problem { place: place.clone(), what });
    let settings: ResourceSettings = match resource.settings.clone().try_into() {
        Ok(s) => s,
        Err(e) => {
            wrong(format!("settings: {}", e.message()));
            return None;
        }
    };
    let path = MintPath::new(settings.engine, &settings.path).map_err(&mut wrong).ok();
    if settings.ttl_secs_max == 0 || settings.ttl_secs_max > TTL_SECS_MAX {
        wrong(format!("`ttl_secs_max` must be 1 to {TTL_SECS_MAX}"));
    }
    if resource.action.len() != 1 {
        wrong(
            "a role's rights can't be divided by action: give each action a resource (and a role) of its own"
                .to_owned(),
        );
    }
    if resource.action.iter().any(|a| !a.settings.is_empty()) {
        wrong("actions of a `vault` resource have no settings".to_owned());
    }
    constraints(resource, settings.engine, &mut wrong);
    foreign_fields(&settings, &mut wrong);
    match settings.engine {
        Engine::Database => database(&settings, &mut wrong),
        Engine::Pki => pki(resource, &settings, &mut wrong),
        Engine::Ssh => ssh(resource, &settings, &mut wrong),
    }
    if problems.len() > before {
        return None;
    }
    Some(Minting { path: path?, settings })
}

/// Only bounds that the target can be made to hold may be declared.
fn constraints(resource: &Resource, engine: Engine, wrong: &mut dyn FnMut(String)) {
    for (name, c) in &resource.constraint {
        let held = match (engine, name.as_str()) {
            (Engine::Pki, "names") | (Engine::Ssh, "valid_principals") => c.kind == ConstraintKind::Set,
            (Engine::Pki | Engine::Ssh, "ttl_secs") => c.kind == ConstraintKind::Max,
            _ => false,
        };
        if !held {
            wrong(format!(
                "constraint `{name}` can't be held at a {engine} engine; there are: {}",
                match engine {
                    Engine::Database => "none (the role's statements decide)",
                    Engine::Pki => "`names` (set), `ttl_secs` (max)",
                    Engine::Ssh => "`valid_principals` (set), `ttl_secs` (max)",
                }
            ));
            continue;
        }
        if c.kind == ConstraintKind::Set {
            check_names(&format!("constraint `{name}`"), &c.values, wrong);
        }
    }
}

fn check_names(what: &str, names: &BTreeSet<String>, wrong: &mut dyn FnMut(String)) {
    if names.is_empty() || names.len() > NAMES_MAX {
        wrong(format!("{what} must have 1 to {NAMES_MAX} values"));
    }
    for name in names {
        if !is_exact_name(name) {
            wrong(format!(
                "{what}: `{}` is not an exact name: letters, digits, `-`, `_`, `.`, `@` (no `*`, no `,`)",
                name.escape_debug()
            ));
        }
    }
}

/// An exact DNS name or principal: no wildcard, and no comma that the target would split at.
pub(super) fn is_exact_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.@".contains(&b))
        && !name.starts_with(['.', '-'])
}

/// A field of another engine has no effect; the operator meant something by it.
fn foreign_fields(s: &ResourceSettings, wrong: &mut dyn FnMut(String)) {
    let used = [
        (Engine::Database, "postgres_target", s.postgres_target.is_some()),
        (Engine::Database, "username_prefix", s.username_prefix.is_some()),
        (Engine::Database, "revocation_cuts_sessions", s.revocation_cuts_sessions),
        (Engine::Database, "revocation_tried", s.revocation_tried.is_some()),
        (Engine::Database, "session_secs_max", s.session_secs_max.is_some()),
        (Engine::Database, "connection", !s.connection.is_empty()),
        (Engine::Pki, "common_name", s.common_name.is_some()),
        (Engine::Pki, "alt_names", !s.alt_names.is_empty()),
        (Engine::Pki, "generate_lease", s.generate_lease),
        (Engine::Pki, "no_store", s.no_store),
        (Engine::Ssh, "valid_principals", !s.valid_principals.is_empty()),
        (Engine::Ssh, "extensions", !s.extensions.is_empty()),
        (Engine::Ssh, "critical_options", !s.critical_options.is_empty()),
    ];
    for (engine, name, _) in used.iter().filter(|(engine, _, set)| *set && *engine != s.engine) {
        wrong(format!("`{name}` is for the {engine} engine"));
    }
}

fn database(s: &ResourceSettings, wrong: &mut dyn FnMut(String)) {
    if let Some(prefix) = &s.username_prefix {
        let plain = prefix.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        if prefix.len() < USERNAME_PREFIX_BYTES_MIN || prefix.len() > 32 || !plain {
            wrong(format!(
                "`username_prefix` must have {USERNAME_PREFIX_BYTES_MIN} to 32 lower-case letters, digits or `_`"
            ));
        }
    }
    if s.postgres_target.is_some() && (s.username_prefix.is_none() || !s.dedicated) {
        wrong("`postgres_target` is for sweeps: it needs `username_prefix` (as in the role's `username_template`) and `dedicated = true`".to_owned());
    }
    if let Some(tried) = &s.revocation_tried
        && (!s.revocation_cuts_sessions || tried.len() != 64 || !tried.bytes().all(|b| b.is_ascii_hexdigit()))
    {
        wrong("`revocation_tried` is what `config check --live` says (64 hex digits), with `revocation_cuts_sessions = true`".to_owned());
    }
    if s.connection.len() > 16 || s.connection.values().any(|v| v.len() > 512) {
        wrong("`connection` may have 16 values of 512 bytes".to_owned());
    }
    if s.connection.keys().any(|k| matches!(k.as_str(), "username" | "password" | "lease_id" | "path")) {
        wrong(
            "`connection` must not name `username`, `password`, `lease_id` or `path`: they come from the target"
                .to_owned(),
        );
    }
}

fn pki(resource: &Resource, s: &ResourceSettings, wrong: &mut dyn FnMut(String)) {
    let asked = resource.constraint.keys().any(|k| k.as_str() == "names");
    match (&s.common_name, asked) {
        (Some(_), true) => wrong("`common_name` and the constraint `names` exclude each other".to_owned()),
        (None, false) => wrong("a certificate needs `common_name`, or a constraint `names`".to_owned()),
        (None, true) if !s.alt_names.is_empty() => wrong("`alt_names` goes with `common_name`".to_owned()),
        _ => {}
    }
    let fixed: BTreeSet<String> = s.common_name.iter().chain(&s.alt_names).cloned().collect();
    if !fixed.is_empty() {
        check_names("`common_name`, `alt_names`", &fixed, wrong);
    }
    if s.generate_lease && s.no_store {
        wrong("`generate_lease` and `no_store` exclude each other: such a role gives no lease".to_owned());
    }
}

fn ssh(resource: &Resource, s: &ResourceSettings, wrong: &mut dyn FnMut(String)) {
    let asked = resource.constraint.keys().any(|k| k.as_str() == "valid_principals");
    match (s.valid_principals.is_empty(), asked) {
        // A17: a certificate without principals is good for every account.
        (true, false) => wrong("a certificate without principals would open every account: name `valid_principals`, or a constraint of that name".to_owned()),
        (false, true) => wrong("`valid_principals` and the constraint of that name exclude each other".to_owned()),
        (false, false) => check_names("`valid_principals`", &s.valid_principals, wrong),
        (true, true) => {}
    }
    for (name, value) in s.extensions.iter().chain(&s.critical_options) {
        let plain = name.bytes().all(|b| b.is_ascii_graphic()) && !name.is_empty() && name.len() <= 64;
        if !plain || value.len() > 512 || value.chars().any(char::is_control) {
            wrong(format!("ssh option `{}` is malformed", name.escape_debug()));
        }
    }
}
