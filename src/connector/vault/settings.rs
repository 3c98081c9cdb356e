//! The operator's words about a Vault target, checked: every problem in one pass (`resource.rs` has those about
//! its resources). Nothing here speaks to the target; `check.rs` does.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::api::Client;
use super::path::check_plain;
use crate::config::{Problem, SecretRef, Target};

/// Highest accepted `mint_deadline_secs`.
const MINT_DEADLINE_SECS_MAX: u64 = 600;
/// Highest accepted `request_deadline_secs`.
const REQUEST_DEADLINE_SECS_MAX: u64 = 120;
/// Highest accepted `skew_secs`.
const SKEW_SECS_MAX: u64 = 300;

/// `[target.settings]` of a target of kind `vault`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TargetSettings {
    /// Base URL, `https://HOST:PORT`; plain `http` for loopback only.
    pub address: String,
    /// PEM of the one CA to trust; absent: the system's.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// Namespace of everything below.
    #[serde(default)]
    pub namespace: Option<String>,
    /// How the broker logs in.
    pub auth: AuthSettings,
    /// The longest that a mint may be under way at the target. Not below the server's `default_max_request_duration` (90 s).
    #[serde(default = "default_mint_deadline")]
    pub mint_deadline_secs: u64,
    /// The longest that any other call may take.
    #[serde(default = "default_request_deadline")]
    pub request_deadline_secs: u64,
    /// Allowance between the target's clock, the verifiers' and ours.
    #[serde(default = "default_skew")]
    pub skew_secs: u64,
}

const fn default_mint_deadline() -> u64 {
    100
}
const fn default_request_deadline() -> u64 {
    20
}
const fn default_skew() -> u64 {
    30
}

/// `[target.settings.auth]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(tag = "method", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum AuthSettings {
    /// By a JWT that the broker signs itself: no stored token.
    Jwt {
        /// Where the JWT auth method is mounted.
        #[serde(default = "default_jwt_mount")]
        mount: String,
        /// The role whose tokens mint (one log-in per lease).
        mint_role: String,
        /// The role whose token ends and lists.
        janitor_role: String,
        /// The roles' `bound_audiences`.
        audience: String,
        /// The roles' `bound_subject`.
        #[serde(default = "default_subject")]
        subject: String,
    },
    /// By a stored token: it ends and lists, and makes one child token for each lease.
    Token {
        /// The token. Read at each use, so that something else may renew or replace it.
        token: SecretRef,
        /// The policies of the child tokens.
        mint_policies: Vec<String>,
    },
}

fn default_jwt_mount() -> String {
    "jwt".to_owned()
}
fn default_subject() -> String {
    "countersign".to_owned()
}

/// Reads and checks the target's settings. `base` is where relative files start from.
pub(super) fn read(target: &Target, base: &Path, problems: &mut Vec<Problem>) -> Option<(TargetSettings, Client)> {
    let place = format!("target {}", target.name);
    let mut wrong = |what: String| problems.push(Problem { place: place.clone(), what });
    let s: TargetSettings = match target.settings.clone().try_into() {
        Ok(s) => s,
        Err(e) => {
            wrong(format!("settings: {}", e.message()));
            return None;
        }
    };
    let url = check_address(&s.address).map_err(&mut wrong).ok();
    if let Some(namespace) = &s.namespace {
        let _ = check_plain("`namespace`", namespace).map_err(&mut wrong);
    }
    for (name, value, max) in [
        ("mint_deadline_secs", s.mint_deadline_secs, MINT_DEADLINE_SECS_MAX),
        ("request_deadline_secs", s.request_deadline_secs, REQUEST_DEADLINE_SECS_MAX),
    ] {
        if value == 0 || value > max {
            wrong(format!("`{name}` must be 1 to {max}"));
        }
    }
    if s.skew_secs > SKEW_SECS_MAX {
        wrong(format!("`skew_secs` must be at most {SKEW_SECS_MAX}"));
    }
    match &s.auth {
        AuthSettings::Jwt { mount, mint_role, janitor_role, audience, subject } => {
            for (what, text) in
                [("`auth.mount`", mount), ("`auth.mint_role`", mint_role), ("`auth.janitor_role`", janitor_role)]
            {
                let _ = check_plain(what, text).map_err(&mut wrong);
            }
            if mint_role == janitor_role {
                wrong("`auth.mint_role` and `auth.janitor_role` must differ: what mints must not be able to end what others made".to_owned());
            }
            if audience.is_empty() || subject.is_empty() {
                wrong("`auth.audience` and `auth.subject` must not be empty".to_owned());
            }
        }
        AuthSettings::Token { mint_policies, .. } => {
            if mint_policies.is_empty() || mint_policies.iter().any(|p| matches!(p.as_str(), "" | "root" | "default")) {
                wrong(
                    "`auth.mint_policies` must name the policy that mints, and neither `root` nor `default`".to_owned(),
                );
            }
        }
    }
    let ca = match &s.ca_file {
        None => None,
        Some(file) => match std::fs::read(base.join(file)) {
            Ok(pem) => Some(pem),
            Err(e) => {
                wrong(format!("`ca_file` {} can't be read: {e}", base.join(file).display()));
                return None;
            }
        },
    };
    let client = Client::new(url?, ca.as_deref()).map_err(&mut wrong).ok()?;
    Some((s, client))
}

/// `https`, or `http` to loopback; nothing but scheme, host and port.
fn check_address(text: &str) -> Result<url::Url, String> {
    let url = url::Url::parse(text).map_err(|e| format!("`address` is not a URL ({e}); write https://HOST:PORT"))?;
    let loopback = match url.host() {
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => false,
    };
    let bare = matches!(url.path(), "" | "/") && url.query().is_none() && url.fragment().is_none();
    if !bare || !url.username().is_empty() || url.password().is_some() {
        return Err("`address` must be scheme, host and port alone".to_owned());
    }
    match url.scheme() {
        "https" => Ok(url),
        "http" if loopback => Ok(url),
        _ => {
            Err("`address` must be https (plain http is for loopback only): tokens and secrets cross this line"
                .to_owned())
        }
    }
}
