//! What the two log-ins may do, asked of the target itself (`sys/capabilities-self`): every line of the policies of
//! docs/vault.md that this catalogue needs. Nothing is done to find it out.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

use super::Inner;
use super::api::{Call, Fault, Kind, Reply};
use super::check::{NO_LEASE, gap, unreachable};
use super::login::Login;
use super::path::Engine;
use super::resource::Minting;
use super::settings::AuthSettings;
use crate::connector::{Gap, SweepError};

const CAPABILITIES: &str = "sys/capabilities-self";

/// One line of a policy.
struct Right {
    /// As the policy writes it.
    line: String,
    /// Something that the line covers.
    path: String,
    /// All of them are needed.
    capabilities: &'static [&'static str],
    /// What can't be done without it.
    to: &'static str,
    /// What the lack allows; none: only this check misses it.
    allows: Option<&'static str>,
}

impl Right {
    fn new(
        path: impl Into<String>,
        capabilities: &'static [&'static str],
        to: &'static str,
        allows: Option<&'static str>,
    ) -> Self {
        let path = path.into();
        Self { line: path.clone(), path, capabilities, to, allows }
    }

    fn on_all(mut self, line: String) -> Self {
        self.line = line;
        self
    }

    fn fix(&self) -> String {
        let list: Vec<_> = self.capabilities.iter().map(|c| format!("\"{c}\"")).collect();
        let body =
            if self.line.starts_with("sys/leases/revoke/") { " allowed_parameters = { \"sync\" = [] }" } else { "" };
        format!("path \"{}\" {{ capabilities = [{}]{body} }}", self.line, list.join(", "))
    }
}

const NOT_ENDED: Option<&str> = Some("what was minted can't be ended, or not be proven gone");

/// What the janitor needs for all resources.
fn janitors(minting: &BTreeMap<crate::core::id::ResourceName, Minting>, auth: &AuthSettings) -> Vec<Right> {
    let mut out = vec![Right::new(
        "auth/token/revoke-accessor",
        &["update"],
        "end a token by its accessor",
        Some("what a crash left can't be ended"),
    )];
    match auth {
        AuthSettings::Jwt { .. } => {
            out.push(Right::new(
                "auth/token/revoke-self",
                &["update"],
                "end the tokens of this check's own tries",
                None,
            ));
        }
        AuthSettings::Token { .. } => {
            let allows = Some("nothing can be minted");
            out.push(Right::new("auth/token/create", &["update"], "make a token for each lease", allows));
        }
    }
    for m in minting.values() {
        let (path, mount) = (m.path.as_str(), m.path.mount());
        if m.settings.engine == Engine::Pki {
            out.push(Right::new(format!("{mount}/revoke"), &["update"], "revoke certificates", NOT_ENDED));
            let record = Right::new(format!("{mount}/cert/00"), &["read"], "read the CA's record", NOT_ENDED);
            out.push(record.on_all(format!("{mount}/cert/*")));
        }
        if m.settings.engine == Engine::Database || m.settings.generate_lease {
            out.push(Right::new("sys/leases/lookup", &["update"], "look a lease up", NOT_ENDED));
            let one = format!("sys/leases/revoke/{path}/{NO_LEASE}");
            let revoke = Right::new(one, &["update"], "revoke a lease", NOT_ENDED);
            out.push(revoke.on_all(format!("sys/leases/revoke/{path}/*")));
        }
        if m.swept() {
            let list = format!("sys/leases/lookup/{path}/");
            out.push(Right::new(list, &["list", "sudo"], "list the role's leases", NOT_ENDED));
        }
    }
    out
}

/// What the mint log-in needs for all resources.
fn mints(minting: &BTreeMap<crate::core::id::ResourceName, Minting>) -> Vec<Right> {
    let allows = Some("the token of a mint that came to nothing can mint until its TTL");
    let mut out = vec![Right::new("auth/token/revoke-self", &["update"], "end its own token", allows)];
    for m in minting.values() {
        let needed: &[&str] = if m.settings.engine == Engine::Database { &["read"] } else { &["update"] };
        out.push(Right::new(m.path.as_str(), needed, "mint", Some("nothing can be minted there")));
    }
    out
}

impl Inner {
    /// Each right that a log-in lacks.
    pub(super) async fn check_rights(&self, mint: &Login, gaps: &mut Vec<Gap>) -> Result<(), SweepError> {
        let rights = mints(&self.minting);
        let (ns, deadline) = (self.settings.namespace.as_deref(), self.deadline());
        let body = json!({ "paths": paths(&rights) });
        let (path, token) = (CAPABILITIES, Some(&mint.token));
        let call = Call { method: "PUT", path, namespace: ns, token, body: Some(&body), deadline };
        lacking("the mint log-in", rights, self.api.call(call).await, gaps)?;

        let rights = janitors(&self.minting, &self.settings.auth);
        let body = json!({ "paths": paths(&rights) });
        let reply = self.janitor("PUT", CAPABILITIES, Some(&body)).await;
        lacking("the janitor", rights, reply, gaps)
    }

    /// A body `lease_id` would override the URL, and any lease at all could be revoked: capabilities don't show it, so it
    /// is tried, with the id of a lease that no target makes.
    pub(super) async fn check_override(&self, minting: &Minting, gaps: &mut Vec<Gap>) {
        let path = minting.path.as_str();
        let none = format!("{path}/{NO_LEASE}");
        let body = json!({ "lease_id": format!("{none}-other") });
        if self.janitor("PUT", &format!("sys/leases/revoke/{none}"), Some(&body)).await.is_ok() {
            gaps.push(gap(
                false,
                format!("the janitor's right to revoke under {path} takes a `lease_id`"),
                "whoever has its token can end any lease at the target",
                format!(
                    "path \"sys/leases/revoke/{path}/*\" {{ capabilities = [\"update\"] allowed_parameters = {{ \"sync\" = [] }} }}"
                ),
            ));
        }
    }
}

fn paths(rights: &[Right]) -> Vec<&str> {
    rights.iter().map(|r| r.path.as_str()).collect()
}

fn lacking(who: &str, rights: Vec<Right>, reply: Result<Reply, Fault>, gaps: &mut Vec<Gap>) -> Result<(), SweepError> {
    #[derive(Deserialize)]
    struct Answer {
        data: BTreeMap<String, Value>,
    }
    let answer = match reply.and_then(|reply| reply.json::<Answer>()) {
        Ok(answer) => answer.data,
        Err(fault) if matches!(fault.kind, Kind::PolicyDenied | Kind::TokenRefused) => {
            gaps.push(gap(
                true,
                format!("{who} can't ask what it may do: {fault}"),
                "what its policy lacks is found out when something can't be ended",
                format!("path \"{CAPABILITIES}\" {{ capabilities = [\"update\"] }}"),
            ));
            return Ok(());
        }
        Err(fault) if unreachable(&fault) => return Err(SweepError(fault.to_string())),
        Err(fault) => return Err(SweepError(format!("{fault}; is the namespace the right one?"))),
    };
    for right in rights {
        let has: Vec<&str> =
            answer.get(&right.path).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
        let whole = has.contains(&"root") || right.capabilities.iter().all(|c| has.contains(c));
        let told = gaps.iter().any(|g| g.fix == right.fix());
        if !whole && !told {
            gaps.push(gap(
                right.allows.is_some(),
                format!("{who} can't {}: it has {} on {}", right.to, listed(&has), right.path),
                right.allows.unwrap_or("tokens that this check made live until their TTL"),
                right.fix(),
            ));
        }
    }
    Ok(())
}

fn listed(capabilities: &[&str]) -> String {
    if capabilities.is_empty() { "nothing".to_owned() } else { capabilities.join(", ") }
}
