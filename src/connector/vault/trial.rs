//! Tries whether a role's revocation really cuts an open session: mints one, logs in, ends it, and looks. Only a role
//! that passed is called immediate.

use std::time::Duration;

use serde::Deserialize;

use super::Inner;
use super::api::Call;
use super::handle::VaultHandle;
use super::path::check_lease_id;
use super::resource::Minting;
use crate::connector::{Gap, RevokeError};
use crate::core::secret::Secret;

/// How long the log-in, and the end of the session, may take.
const TRIAL_DEADLINE: Duration = Duration::from_secs(10);

impl Inner {
    pub(super) async fn try_cut(&self, minting: &Minting, gaps: &mut Vec<Gap>) {
        let path = minting.path.as_str();
        match self.cut(minting).await {
            Ok(()) => _ = self.cuts.lock().insert(path.to_owned()),
            Err(why) => {
                self.cuts.lock().remove(path);
                gaps.push(Gap {
                    what: format!("{path}: that revocation cuts open sessions could not be confirmed: {why}"),
                    allows: "open sessions may go on after the end; the reviewer is told so".to_owned(),
                    fix: "the revocation_statements of docs/vault.md, and `connection` with host, port and dbname"
                        .to_owned(),
                    fatal: false,
                });
            }
        }
    }

    async fn cut(&self, minting: &Minting) -> Result<(), String> {
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
        let ns = self.settings.namespace.as_deref();
        let path = minting.path.as_str();
        let login = self.logins.mint(&self.api, ns, "countersign-trial", 120).await.map_err(|f| f.to_string())?;
        let call = Call {
            method: "GET",
            path,
            namespace: ns,
            token: Some(&login.token),
            body: None,
            deadline: self.mint_timeout(),
        };
        let reply = match self.api.call(call).await.and_then(|r| r.json::<Reply>()) {
            Ok(reply) => reply,
            Err(fault) => {
                self.end_own_token(&login).await;
                return Err(format!("{} failed", fault.what));
            }
        };
        let password = Secret::new(reply.data.password);
        check_lease_id(path, &reply.lease_id)?;
        let session = self.session(minting, &reply.data.username, &password).await;
        let handle = VaultHandle::new(minting.settings.engine, path, minting.path.mount(), ns);
        let ended = self.end_lease(&handle, &reply.lease_id).await.map_err(|e: RevokeError| e.to_string());
        self.end_own_token(&login).await;
        ended?;
        // The session's own task ends when the server closes it.
        let mut session = session?;
        if tokio::time::timeout(TRIAL_DEADLINE, &mut session).await.is_err() {
            session.abort();
            return Err("the open session was still there after the revocation".to_owned());
        }
        Ok(())
    }

    /// Logs in as the minted user. The task ends when the connection does.
    async fn session(
        &self,
        minting: &Minting,
        user: &str,
        password: &Secret,
    ) -> Result<tokio::task::JoinHandle<()>, String> {
        let connection = &minting.settings.connection;
        let get = |name: &str| connection.get(name).ok_or_else(|| format!("`connection` has no `{name}` to try it at"));
        let mut config = tokio_postgres::Config::new();
        config.host(get("host")?).dbname(get("dbname")?).user(user).password(password.expose());
        config.port(get("port")?.parse().map_err(|_| "`connection.port` is no port".to_owned())?);
        config.connect_timeout(TRIAL_DEADLINE);
        let connect = config.connect(tokio_postgres::NoTls);
        let (client, connection) = tokio::time::timeout(TRIAL_DEADLINE, connect)
            .await
            .map_err(|_| "logging in took too long".to_owned())?
            .map_err(|_| "logging in with the minted user failed".to_owned())?;
        let task = tokio::spawn(async move {
            let _ = connection.await;
            drop(client);
        });
        Ok(task)
    }
}
