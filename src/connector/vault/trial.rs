//! Whether a role's revocation really cuts an open session. `config check --live` tries it: mints one, logs in, ends it,
//! and looks. It then says what to put into the catalogue: the digest of the role that was tried. The broker calls a role
//! immediate for as long as its statements are those (guarantee 5).
//!
//! The trial makes a user that no journal knows, so the broker itself never does this (guarantee 1): only the operator's
//! command. All that it makes hangs from one token, which is ended whatever happens.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::Inner;
use super::api::Call;
use super::check::gap;
use super::handle::VaultHandle;
use super::login::Login;
use super::path::check_lease_id;
use super::resource::Minting;
use crate::connector::{Gap, RevokeError, SweepError};
use crate::core::digest::Digest;
use crate::core::secret::Secret;

/// How long the log-in, and the end of the session, may take.
const TRIAL_DEADLINE: Duration = Duration::from_secs(10);

/// What a trial stands for: this role, as it makes and ends its users. The rest of the role (its TTLs) may change.
fn tried(address: &str, namespace: Option<&str>, path: &str, role: &Value) -> String {
    let of = json!({
        "address": address, "namespace": namespace, "path": path, "db_name": role["db_name"],
        "creation": role["creation_statements"], "revocation": role["revocation_statements"],
    });
    // Canonical JSON of texts has no way to fail; if it had, no catalogue would name this.
    Digest::of(&of).map(|d| d.to_string()).unwrap_or_default()
}

impl Inner {
    fn tried(&self, minting: &Minting, role: &Value) -> String {
        tried(&self.settings.address, self.settings.namespace.as_deref(), minting.path.as_str(), role)
    }

    /// Notes each role that is no longer the one that was tried, or can't be looked at.
    pub(super) async fn look_at_tried_roles(&self) -> Result<(), SweepError> {
        for minting in self.minting.values() {
            let Some(tried) = &minting.settings.revocation_tried else { continue };
            let same = match self.role(minting).await {
                Ok(role) => self.tried(minting, &role) == *tried,
                Err(fault) if super::check::unreachable(&fault) => return Err(SweepError(fault.to_string())),
                Err(_) => false,
            };
            let path = minting.path.as_str();
            let noted =
                if same { self.untried.lock().remove(path) } else { self.untried.lock().insert(path.to_owned()) };
            if noted && !same {
                tracing::warn!(%path, "the role is not the one whose revocation was tried: reviewers are told that sessions may go on; run `config check --live`");
            }
        }
        Ok(())
    }

    /// Tries it, and says what the catalogue should say.
    pub(super) async fn try_cut(&self, minting: &Minting, gaps: &mut Vec<Gap>) {
        let path = minting.path.as_str();
        let outcome = match self.role(minting).await {
            Ok(role) => self.cut(minting).await.map(|()| self.tried(minting, &role)),
            Err(fault) => Err(fault.to_string()),
        };
        match outcome {
            Ok(tried) if minting.settings.revocation_tried.as_ref() == Some(&tried) => {}
            Ok(tried) => gaps.push(gap(
                false,
                format!("{path}: revocation cuts open sessions (tried just now), and the catalogue doesn't say so"),
                "the reviewer is told that open sessions may go on",
                format!("revocation_tried = \"{tried}\""),
            )),
            Err(why) => gaps.push(gap(
                // What the catalogue claims would be shown to reviewers.
                minting.settings.revocation_tried.is_some(),
                format!("{path}: that revocation cuts open sessions could not be confirmed: {why}"),
                "open sessions may go on after the end",
                "the revocation_statements of docs/vault.md, and `connection` with host, port and dbname",
            )),
        }
    }

    async fn cut(&self, minting: &Minting) -> Result<(), String> {
        // Before anything is made.
        let server = server(minting)?;
        let ns = self.settings.namespace.as_deref();
        let login = self.logins.mint(&self.api, ns, "countersign-trial", 120).await.map_err(|f| f.to_string())?;
        let outcome = self.cut_under(minting, server, &login).await;
        // Ends whatever was made under it, also what the answer didn't name.
        self.end_own_token(&login).await;
        outcome
    }

    async fn cut_under(
        &self,
        minting: &Minting,
        mut server: tokio_postgres::Config,
        login: &Login,
    ) -> Result<(), String> {
        #[derive(Deserialize)]
        struct Reply {
            lease_id: String,
            data: Data,
        }
        #[derive(Deserialize)]
        struct Data {
            username: String,
            password: String,
        }
        let (ns, path) = (self.settings.namespace.as_deref(), minting.path.as_str());
        let call = Call {
            method: "GET",
            path,
            namespace: ns,
            token: Some(&login.token),
            body: None,
            deadline: self.mint_timeout(),
        };
        let reply = self.api.call(call).await.and_then(|r| r.json::<Reply>());
        // The target's words might quote a statement with the password in it.
        let reply = reply.map_err(|fault| format!("{} failed", fault.what))?;
        let password = Secret::new(reply.data.password);
        check_lease_id(path, &reply.lease_id)?;
        server.user(&reply.data.username).password(password.expose());
        let session = session(server).await;
        let handle = VaultHandle::new(minting.settings.engine, path, minting.path.mount(), ns);
        let ended = self.end_lease(&handle, &reply.lease_id).await.map_err(|e: RevokeError| e.to_string());
        // The session's own task ends when the server closes it.
        let mut session = session?;
        let closed = tokio::time::timeout(TRIAL_DEADLINE, &mut session).await;
        session.abort();
        ended?;
        closed.map(|_| ()).map_err(|_| "the open session was still there after the revocation".to_owned())
    }
}

/// Where the trial logs in.
fn server(minting: &Minting) -> Result<tokio_postgres::Config, String> {
    let connection = &minting.settings.connection;
    let get = |name: &str| connection.get(name).ok_or_else(|| format!("`connection` has no `{name}` to try it at"));
    let mut config = tokio_postgres::Config::new();
    config.host(get("host")?).dbname(get("dbname")?);
    config.port(get("port")?.parse().map_err(|_| "`connection.port` is no port".to_owned())?);
    config.connect_timeout(TRIAL_DEADLINE);
    Ok(config)
}

/// Logs in as the minted user. The task ends when the connection does.
async fn session(config: tokio_postgres::Config) -> Result<tokio::task::JoinHandle<()>, String> {
    let connect = config.connect(tokio_postgres::NoTls);
    let (client, connection) = tokio::time::timeout(TRIAL_DEADLINE, connect)
        .await
        .map_err(|_| "logging in took too long".to_owned())?
        .map_err(|_| "logging in with the minted user failed".to_owned())?;
    Ok(tokio::spawn(async move {
        let _ = connection.await;
        drop(client);
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trial_stands_for_one_role_at_one_place_with_these_statements() {
        let role =
            json!({ "db_name": "d", "creation_statements": ["c"], "revocation_statements": ["r"], "default_ttl": 60 });
        let with = |name: &str, value: Value| {
            let mut other = role.clone();
            other[name] = value;
            other
        };
        let of = |address: &str, ns: Option<&str>, path: &str, role: &Value| tried(address, ns, path, role);
        let one = of("https://a", None, "p", &role);
        assert_eq!(one.len(), 64);
        assert_eq!(one, of("https://a", None, "p", &with("default_ttl", json!(90))));
        let others = [
            of("https://b", None, "p", &role),
            of("https://a", Some("n"), "p", &role),
            of("https://a", None, "q", &role),
            of("https://a", None, "p", &with("db_name", json!("e"))),
            of("https://a", None, "p", &with("creation_statements", json!([]))),
            of("https://a", None, "p", &with("revocation_statements", json!(["r", "s"]))),
        ];
        assert!(others.iter().all(|o| *o != one), "{others:?}");
    }
}
