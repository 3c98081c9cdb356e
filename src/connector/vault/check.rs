//! Looks at the live target: log-ins and mounts; `rights.rs` has the policies, `roles.rs` the roles, `trial.rs` the one
//! thing that is tried. Each gap says what it allows and what closes it; tokens that were made on the way are ended.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::Inner;
use super::api::{Call, Fault, Kind};
use super::login::Login;
use super::path::Engine;
use super::resource::Minting;
use super::settings::AuthSettings;
use crate::connector::{Away, Extent, Gap, SweepError};

/// The last part of lease ids that no target makes.
pub(super) const NO_LEASE: &str = "countersign-check";

pub(super) fn gap(fatal: bool, what: impl Into<String>, allows: &str, fix: impl Into<String>) -> Gap {
    Gap { what: what.into(), allows: allows.to_owned(), fix: fix.into(), fatal }
}

pub(super) fn unreachable(fault: &Fault) -> bool {
    !matches!(
        fault.kind,
        Kind::PolicyDenied | Kind::TokenRefused | Kind::Empty | Kind::NotFound | Kind::InvalidLease | Kind::Refused
    )
}

/// An instance that is asked whether it serves. Standbys do: they forward.
const HEALTH: &str = "sys/health?standbyok=true&perfstandbyok=true";

impl Inner {
    /// Does it serve, and does the database behind it?
    pub(super) async fn probe(&self) -> Result<(), Away> {
        let call =
            Call { method: "GET", path: HEALTH, namespace: None, token: None, body: None, deadline: self.deadline() };
        if let Err(fault) = self.api.call(call).await {
            let extent = if fault.kind == Kind::Unreachable { Extent::Silent } else { Extent::Refuses };
            return Err(Away { why: fault.to_string(), extent });
        }
        let Some(behind) = &self.behind else { return Ok(()) };
        behind.probe().await.map_err(|away| Away { extent: Extent::Behind, ..away })
    }

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
        let looked = self.look_around(&first, life, &mut gaps).await;
        self.end_own_token(&first).await;
        looked?;
        if !gaps.iter().any(|g| g.fatal) {
            for minting in self.minting.values().filter(|m| m.settings.revocation_cuts_sessions) {
                self.try_cut(minting, &mut gaps).await;
            }
        }
        Ok(gaps)
    }

    async fn look_around(&self, first: &Login, life: u64, gaps: &mut Vec<Gap>) -> Result<(), SweepError> {
        self.check_login(first, life, gaps);
        self.check_bounds(first, gaps).await;
        self.check_rights(first, gaps).await?;
        for minting in self.minting.values() {
            self.check_mount(minting, first, gaps).await?;
            self.check_role(minting, gaps).await?;
            let leased = minting.settings.engine == Engine::Database || minting.settings.generate_lease;
            if !leased {
                continue;
            }
            self.check_override(minting, gaps).await;
            if !minting.swept() {
                let allows = "a lease that a crash left unrecorded lives until its TTL: what the broker can't list, or not tell from others', it doesn't end";
                gaps.push(gap(
                    false,
                    format!("{} is not declared `dedicated`", minting.path.as_str()),
                    allows,
                    "a role of the broker's own, and `dedicated = true`",
                ));
            }
        }
        Ok(())
    }

    pub(super) async fn janitor(
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
}
