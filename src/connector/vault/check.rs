//! Looks at the live target: log-ins, policies, roles. Each gap says what it allows and what closes it.
//! Probes name leases that don't exist, and end the tokens that they made.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Inner;
use super::api::{Call, Fault, Kind};
use super::login::Login;
use super::path::Engine;
use super::resource::Minting;
use super::settings::AuthSettings;
use crate::connector::{Gap, SweepError};

/// The last part of lease ids that no target makes.
const NO_LEASE: &str = "countersign-check";

fn gap(fatal: bool, what: impl Into<String>, allows: &str, fix: impl Into<String>) -> Gap {
    Gap { what: what.into(), allows: allows.to_owned(), fix: fix.into(), fatal }
}

fn unreachable(fault: &Fault) -> bool {
    !matches!(fault.kind, Kind::PolicyDenied | Kind::TokenRefused | Kind::NotFound | Kind::InvalidLease | Kind::Refused)
}

impl Inner {
    /// Everything that can be seen by the two log-ins that the broker has.
    pub(super) async fn check(&self) -> Result<Vec<Gap>, SweepError> {
        let mut gaps = Vec::new();
        let ns = self.settings.namespace.as_deref();
        let life = self.minting.values().map(|m| m.settings.ttl_secs_max).max().unwrap_or(60);
        let first = match self.logins.mint(&self.api, ns, NO_LEASE, life).await {
            Ok(login) => login,
            Err(fault) if unreachable(&fault) => return Err(SweepError(fault.to_string())),
            Err(fault) => {
                gaps.push(gap(
                    true,
                    format!("the mint log-in is refused: {fault}"),
                    "nothing can be minted",
                    "set the log-in up as in docs/vault.md",
                ));
                return Ok(gaps);
            }
        };
        self.check_login(&first, life, &mut gaps);
        self.check_bounds(&first, &mut gaps).await;
        for minting in self.minting.values() {
            self.check_mount(minting, &first, &mut gaps).await?;
            self.check_janitor(minting, &mut gaps).await?;
            self.check_role(minting, &mut gaps).await?;
        }
        // The first log-in ends by its accessor, which tries that right too.
        let body = json!({ "accessor": first.accessor });
        if let Err(fault) = self.janitor("PUT", "auth/token/revoke-accessor", Some(&body)).await {
            if unreachable(&fault) {
                return Err(SweepError(fault.to_string()));
            }
            let fix = "path \"auth/token/revoke-accessor\" { capabilities = [\"update\"] }";
            gaps.push(gap(
                true,
                format!("the janitor can't end a token by its accessor: {fault}"),
                "what a crash left can't be ended",
                fix,
            ));
            self.end_own_token(&first).await;
        }
        if !gaps.iter().any(|g| g.fatal) {
            for minting in self.minting.values().filter(|m| m.settings.revocation_cuts_sessions) {
                self.try_cut(minting, &mut gaps).await;
            }
        }
        Ok(gaps)
    }

    async fn janitor(
        &self,
        method: &'static str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<super::api::Reply, Fault> {
        self.logins.as_janitor(&self.api, self.settings.namespace.as_deref(), method, path, body, self.deadline()).await
    }

    fn check_login(&self, login: &Login, life: u64, gaps: &mut Vec<Gap>) {
        if let Some(why) = login.unfit() {
            gaps.push(gap(
                true,
                why,
                "leases that can't be ended",
                "set token_type=service, token_num_uses=0 and the mint policy alone on the role",
            ));
        }
        if login.policies.iter().any(|p| p == "default") {
            let fix = "token_no_default_policy=true on both roles";
            gaps.push(gap(
                false,
                "log-ins have the `default` policy",
                "the token can look itself up, renew itself and use its cubbyhole",
                fix,
            ));
        }
        if login.metadata.get("lease").is_none_or(|l| l != NO_LEASE)
            && matches!(self.settings.auth, AuthSettings::Jwt { .. })
        {
            let fix = "claim_mappings={lease=lease} on the mint role";
            gaps.push(gap(
                false,
                "the claim `lease` is not mapped into the token",
                "the target's own log doesn't say for which lease a token was",
                fix,
            ));
        }
        if login.ttl_secs < life {
            let what = format!("a log-in lives {} s, less than the longest `ttl_secs_max` ({life} s)", login.ttl_secs);
            gaps.push(gap(
                false,
                what,
                "leases end with their token, before the grant does",
                "a longer token_ttl on the mint role",
            ));
        }
    }

    /// The roles must refuse another audience and another subject; one subject must stay one entity.
    async fn check_bounds(&self, first: &Login, gaps: &mut Vec<Gap>) {
        let AuthSettings::Jwt { mint_role, janitor_role, audience, subject, .. } = &self.settings.auth else { return };
        let ns = self.settings.namespace.as_deref();
        for role in [mint_role, janitor_role] {
            for (aud, sub, bound) in [
                ("countersign-check-no-such-audience", subject.as_str(), "bound_audiences"),
                (audience.as_str(), "countersign-check-no-such-subject", "bound_subject"),
            ] {
                let extra = Map::from_iter([("lease".to_owned(), NO_LEASE.into())]);
                if let Ok(login) = self.logins.by_jwt(&self.api, ns, role, aud, sub, extra).await {
                    self.end_own_token(&login).await;
                    let fix = format!("{bound} on the role {role}, as in docs/vault.md");
                    gaps.push(gap(
                        true,
                        format!("the role {role} takes assertions with another {}", &bound[6..]),
                        "a token made for somewhere else logs in as the broker",
                        fix,
                    ));
                }
            }
        }
        let extra = Map::from_iter([("lease".to_owned(), "countersign-check-2".into())]);
        if let Ok(second) = self.logins.by_jwt(&self.api, ns, mint_role, audience, subject, extra).await {
            self.end_own_token(&second).await;
            if second.entity != first.entity {
                gaps.push(gap(
                    false,
                    "each log-in makes an identity entity of its own",
                    "entities pile up, one for each lease",
                    "user_claim=sub on the mint role",
                ));
            }
        }
    }

    /// The mount must be of the kind that the catalogue says: a kv engine by another name is found here.
    async fn check_mount(&self, minting: &Minting, login: &Login, gaps: &mut Vec<Gap>) -> Result<(), SweepError> {
        #[derive(Deserialize)]
        struct Mount {
            data: Data,
        }
        #[derive(Deserialize)]
        struct Data {
            #[serde(rename = "type")]
            kind: String,
        }
        let (ns, deadline) = (self.settings.namespace.as_deref(), self.deadline());
        let path = format!("sys/internal/ui/mounts/{}", minting.path.as_str());
        let call = Call { method: "GET", path: &path, namespace: ns, token: Some(&login.token), body: None, deadline };
        let engine = minting.settings.engine;
        match self.api.call(call).await {
            Ok(reply) => {
                let kind = reply.json::<Mount>().map_err(|f| SweepError(f.to_string()))?.data.kind;
                if kind != engine.to_string() {
                    let what = format!("`{}` is a {kind} engine, not {engine}", minting.path.mount());
                    gaps.push(gap(
                        true,
                        what,
                        "what is handed out may have neither an early end nor an expiry",
                        "name the right path in the catalogue",
                    ));
                }
            }
            Err(fault) if unreachable(&fault) => return Err(SweepError(fault.to_string())),
            Err(fault) => {
                let capability = if engine == Engine::Database { "read" } else { "update" };
                let fix = format!("path \"{}\" {{ capabilities = [\"{capability}\"] }}", minting.path.as_str());
                gaps.push(gap(
                    true,
                    format!("the mint policy doesn't reach {}: {fault}", minting.path.as_str()),
                    "nothing can be minted there",
                    fix,
                ));
            }
        }
        Ok(())
    }

    async fn check_janitor(&self, minting: &Minting, gaps: &mut Vec<Gap>) -> Result<(), SweepError> {
        let path = minting.path.as_str();
        let none = format!("{path}/{NO_LEASE}");
        let mut probe = async |method, at: String, body: Value, right: &str, fix: String| -> Result<(), SweepError> {
            match self.janitor(method, &at, Some(&body).filter(|b| !b.is_null())).await {
                Err(fault) if unreachable(&fault) => Err(SweepError(fault.to_string())),
                Err(fault) if matches!(fault.kind, Kind::PolicyDenied | Kind::TokenRefused) => {
                    gaps.push(gap(
                        true,
                        format!("the janitor can't {right}: {fault}"),
                        "what was minted can't be ended, or not be proven gone",
                        fix,
                    ));
                    Ok(())
                }
                _ => Ok(()),
            }
        };
        if minting.settings.engine == Engine::Pki {
            let mount = minting.path.mount();
            let fix = format!("path \"{mount}/revoke\" {{ capabilities = [\"update\"] }}");
            probe("PUT", format!("{mount}/revoke"), json!({ "serial_number": "00" }), "revoke certificates", fix)
                .await?;
        }
        let leased = minting.settings.engine == Engine::Database || minting.settings.generate_lease;
        if !leased {
            return Ok(());
        }
        let fix = "path \"sys/leases/lookup\" { capabilities = [\"update\"] }".to_owned();
        probe("PUT", "sys/leases/lookup".to_owned(), json!({ "lease_id": none }), "look a lease up", fix).await?;
        let fix = format!(
            "path \"sys/leases/revoke/{path}/*\" {{ capabilities = [\"update\"] allowed_parameters = {{ \"sync\" = [] }} }}"
        );
        probe("PUT", format!("sys/leases/revoke/{none}"), json!({ "sync": true }), "revoke a lease", fix.clone())
            .await?;
        if minting.swept() {
            let fix = format!("path \"sys/leases/lookup/{path}/\" {{ capabilities = [\"list\", \"sudo\"] }}");
            probe("LIST", format!("sys/leases/lookup/{path}"), Value::Null, "list the role's leases", fix).await?;
        } else {
            let allows = "a lease that a crash left unrecorded lives until its TTL: what the broker can't list, or not tell from others', it doesn't end";
            gaps.push(gap(
                false,
                format!("{path} is not declared `dedicated`"),
                allows,
                "a role of the broker's own, and `dedicated = true`",
            ));
        }
        // A body `lease_id` would override the URL, and any lease at all could be revoked.
        let body = json!({ "lease_id": format!("{none}-other") });
        if self.janitor("PUT", &format!("sys/leases/revoke/{none}"), Some(&body)).await.is_ok() {
            gaps.push(gap(
                false,
                format!("the janitor's right to revoke under {path} takes a `lease_id`"),
                "whoever has its token can end any lease at the target",
                fix,
            ));
        }
        Ok(())
    }

    /// The role itself, where the janitor may read it.
    async fn check_role(&self, minting: &Minting, gaps: &mut Vec<Gap>) -> Result<(), SweepError> {
        #[derive(Deserialize)]
        struct Role {
            data: Value,
        }
        let at = format!("{}/roles/{}", minting.path.mount(), minting.path.role());
        let role = match self.janitor("GET", &at, None).await {
            Ok(reply) => reply.json::<Role>().map_err(|f| SweepError(f.to_string()))?.data,
            Err(fault) if unreachable(&fault) => return Err(SweepError(fault.to_string())),
            Err(fault) if fault.kind == Kind::NotFound => {
                gaps.push(gap(
                    true,
                    format!("there is no role {at}"),
                    "nothing can be minted",
                    "make it as in docs/vault.md",
                ));
                return Ok(());
            }
            Err(_) => {
                let fix = format!("path \"{at}\" {{ capabilities = [\"read\"] }} for the janitor");
                gaps.push(gap(
                    false,
                    format!("the role {at} can't be read"),
                    "its statements and limits can't be checked",
                    fix,
                ));
                return Ok(());
            }
        };
        match minting.settings.engine {
            Engine::Database => database_role(&at, &role, minting, gaps),
            Engine::Pki => pki_role(&at, &role, minting, gaps),
            Engine::Ssh => ssh_role(&at, &role, gaps),
        }
        Ok(())
    }
}

fn statements(role: &Value, name: &str) -> String {
    let texts = role[name].as_array().map(|a| a.iter().filter_map(Value::as_str).collect::<Vec<_>>().join("\n"));
    texts.unwrap_or_default().to_ascii_lowercase()
}

fn database_role(at: &str, role: &Value, minting: &Minting, gaps: &mut Vec<Gap>) {
    let max = minting.settings.ttl_secs_max;
    let ttl = role["default_ttl"].as_u64().unwrap_or(0);
    if ttl == 0 || ttl > max {
        let what = format!("default_ttl of {at} is {ttl} s, `ttl_secs_max` is {max} s");
        gaps.push(gap(
            true,
            what,
            "a user lives longer than was shown to the reviewer; such a mint is refused",
            format!("default_ttl={max}s on the role"),
        ));
    }
    let creation = statements(role, "creation_statements");
    if !creation.contains("valid until") || !creation.contains("{{expiration}}") {
        let fix = "VALID UNTIL '{{expiration}}' in creation_statements";
        gaps.push(gap(
            true,
            format!("{at} makes users without VALID UNTIL"),
            "a user that a crash left without a lease stays for ever",
            fix,
        ));
    }
    let revocation = statements(role, "revocation_statements");
    let fix = "the revocation_statements of docs/vault.md";
    if revocation.is_empty() {
        let allows = "open sessions go on, and a user that owns a table can't be dropped";
        gaps.push(gap(false, format!("{at} has no revocation_statements"), allows, fix));
        return;
    }
    if !revocation.contains("pg_terminate_backend") {
        gaps.push(gap(
            false,
            format!("the revocation_statements of {at} don't terminate sessions"),
            "open sessions go on",
            fix,
        ));
    }
    if !revocation.contains("drop role if exists") && !revocation.contains("drop user if exists") {
        let allows = "once the user is gone, the lease can never be ended";
        gaps.push(gap(
            false,
            format!("the revocation_statements of {at} don't drop the role `if exists`"),
            allows,
            fix,
        ));
    }
    if revocation.contains("alter role") && !revocation.contains("if exists (") {
        let allows = "ALTER ROLE fails for ever once the role is gone, and the lease with it";
        gaps.push(gap(false, format!("the revocation_statements of {at} alter the role unconditionally"), allows, fix));
    }
}

fn pki_role(at: &str, role: &Value, minting: &Minting, gaps: &mut Vec<Gap>) {
    let s = &minting.settings;
    for (name, declared, allows) in [
        (
            "no_store",
            s.no_store,
            "the certificate can't be revoked: the CA doesn't know it, and the journal doesn't keep it",
        ),
        ("generate_lease", s.generate_lease, "what a crash leaves is not found"),
    ] {
        let is = role[name].as_bool().unwrap_or(false);
        if is != declared {
            let what = format!("{name} of {at} is {is}, the catalogue says {declared}");
            gaps.push(gap(
                name == "no_store" && is,
                what,
                allows,
                format!("`{name} = {is}` in the resource's settings, or the role changed"),
            ));
        }
    }
}

fn ssh_role(at: &str, role: &Value, gaps: &mut Vec<Gap>) {
    if !role["allow_user_key_ids"].as_bool().unwrap_or(false) {
        gaps.push(gap(
            true,
            format!("{at} doesn't allow key ids"),
            "nothing can be signed: each certificate carries its lease's name",
            "allow_user_key_ids=true",
        ));
    }
    if role["allowed_users"].as_str().is_some_and(|u| u.split(',').any(|u| u.trim() == "*")) {
        gaps.push(gap(
            false,
            format!("{at} signs for every principal"),
            "whoever has a mint token opens every account",
            "allowed_users with the names alone",
        ));
    }
    if role["allow_empty_principals"].as_bool().unwrap_or(false) {
        gaps.push(gap(
            false,
            format!("{at} signs without principals"),
            "such a certificate opens every account",
            "allow_empty_principals=false",
        ));
    }
}
