//! What the roles at a live target say, as far as the janitor may read them: what of it allows more, or less, than the
//! catalogue says.

use serde::Deserialize;
use serde_json::Value;

use super::Inner;
use super::api::{Fault, Kind};
use super::check::{gap, unreachable};
use super::path::Engine;
use super::resource::Minting;
use crate::connector::{Gap, SweepError};

impl Inner {
    /// A role as the target shows it to the janitor.
    pub(super) async fn role(&self, minting: &Minting) -> Result<Value, Fault> {
        #[derive(Deserialize)]
        struct Role {
            data: Value,
        }
        let at = format!("{}/roles/{}", minting.path.mount(), minting.path.role());
        Ok(self.janitor("GET", &at, None).await?.json::<Role>()?.data)
    }

    /// The role itself, where the janitor may read it.
    pub(super) async fn check_role(&self, minting: &Minting, gaps: &mut Vec<Gap>) -> Result<(), SweepError> {
        let at = format!("{}/roles/{}", minting.path.mount(), minting.path.role());
        let role = match self.role(minting).await {
            Ok(role) => role,
            Err(fault) if unreachable(&fault) => return Err(SweepError(fault.to_string())),
            Err(fault) if matches!(fault.kind, Kind::Empty | Kind::NotFound) => {
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
            Engine::Ssh => ssh_role(&at, &role, minting, gaps),
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
    if let (Some(alter), Some(terminate)) = (revocation.find("alter "), revocation.find("terminate"))
        && alter < terminate
    {
        let allows = "a user that keeps its own role locked, in an open transaction, blocks its revocation";
        gaps.push(gap(
            false,
            format!("the revocation_statements of {at} alter the role before they terminate its sessions"),
            allows,
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
        (
            "generate_lease",
            s.generate_lease,
            "what a crash leaves is not found, or the janitor has no right to end it: such a mint is refused",
        ),
    ] {
        let is = role[name].as_bool().unwrap_or(false);
        if is != declared {
            let what = format!("{name} of {at} is {is}, the catalogue says {declared}");
            gaps.push(gap(
                name == "generate_lease" || is,
                what,
                allows,
                format!("`{name} = {is}` in the resource's settings, or the role changed"),
            ));
        }
    }
}

fn ssh_role(at: &str, role: &Value, minting: &Minting, gaps: &mut Vec<Gap>) {
    let s = &minting.settings;
    for (name, declared) in
        [("default_extensions", s.extensions.is_empty()), ("default_critical_options", s.critical_options.is_empty())]
    {
        if declared && role[name].as_object().is_some_and(|o| !o.is_empty()) {
            let setting = name.trim_start_matches("default_");
            gaps.push(gap(
                true,
                format!("{at} has {name}, the catalogue has no `{setting}`"),
                "each certificate has what was not approved: such a mint is refused",
                format!("`{setting}` in the resource's settings, or no {name} on the role"),
            ));
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn minting(settings: &str) -> Minting {
        let resource = toml::from_str(&format!(
            "name = \"r\"\ntarget = \"t\"\ntitle = \"t\"\nenvironment = \"e\"\nsensitivity = \"none\"\n\
             action = [{{ name = \"use\", effect = \"read\" }}]\n[settings]\nttl_secs_max = 60\n{settings}\n"
        ))
        .unwrap();
        super::super::resource::read(&resource, &mut Vec::new()).unwrap()
    }

    #[test]
    fn statements_that_a_user_can_block_or_survive_are_named() {
        let minting = minting("engine = \"database\"\npath = \"database/creds/r\"");
        let (alter, end) = ("ALTER ROLE \"{{name}}\" NOLOGIN", "pg_terminate_backend(pid)");
        let of = |statements: String| {
            let role = json!({
                "default_ttl": 60, "creation_statements": ["… VALID UNTIL '{{expiration}}'"],
                "revocation_statements": [statements, "DROP ROLE IF EXISTS \"{{name}}\""],
            });
            let mut gaps = Vec::new();
            database_role("database/roles/r", &role, &minting, &mut gaps);
            gaps.into_iter().map(|g| g.what).collect::<Vec<_>>()
        };
        assert_eq!(of(format!("IF EXISTS ( {end} {alter} {end}")), [""; 0]);
        assert_eq!(of(format!("IF EXISTS ( {end}")), [""; 0]);
        for (statements, says) in [
            (format!("IF EXISTS ( {alter} {end}"), "before they terminate"),
            (format!("{end} {alter}"), "alter the role unconditionally"),
            (format!("IF EXISTS ( {alter}"), "don't terminate sessions"),
        ] {
            let gaps = of(statements.clone());
            assert!(gaps.len() == 1 && gaps[0].contains(says), "{statements}: {gaps:?}");
        }
    }

    #[test]
    fn ssh_options_that_a_role_adds_by_itself_are_named() {
        let bare = minting("engine = \"ssh\"\npath = \"ssh/sign/r\"\nvalid_principals = [\"a\"]");
        let pty = minting(
            "engine = \"ssh\"\npath = \"ssh/sign/r\"\nvalid_principals = [\"a\"]\nextensions = { permit-pty = \"\" }",
        );
        let role = json!({ "allow_user_key_ids": true, "default_extensions": { "permit-pty": "" } });
        for (minting, n) in [(&bare, 1), (&pty, 0)] {
            let mut gaps = Vec::new();
            ssh_role("ssh/roles/r", &role, minting, &mut gaps);
            assert!(gaps.len() == n && gaps.iter().all(|g| g.fatal), "{gaps:?}");
        }
    }
}
