//! Logging in: one token for each lease, and a janitor's token that ends and lists.
//! Tokens are secrets: kept in memory alone, never in a handle (guarantee 9).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::api::{Call, Client, Fault, Kind, Reply};
use super::assertion::{ASSERTION_LIFE_SECS, AssertionSigner};
use super::path::ID_BYTES_MAX;
use super::settings::AuthSettings;
use crate::core::id::LeaseId;
use crate::core::secret::Secret;
use crate::time::Clock;

/// Most tokens that wait between log-in and mint.
pub(super) const KEPT_MAX: usize = 4096;
/// A token that waited so long for its mint is forgotten: longer than any mint waits for the durable write before it.
pub(super) const KEPT_MS_MAX: u64 = 2 * 60 * 1000;

/// A token that the target gave.
pub(super) struct Login {
    /// The token itself.
    pub token: Secret,
    /// By which it can be ended without being known.
    pub accessor: String,
    /// How long it lives, in seconds.
    pub ttl_secs: u64,
    /// `service` or `batch`.
    pub token_type: String,
    /// Its policies.
    pub policies: Vec<String>,
    /// How often it can be used; 0: no limit.
    pub num_uses: u64,
    /// The identity entity, if one was made.
    pub entity: String,
    /// What the role mapped into it.
    pub metadata: HashMap<String, String>,
}

impl Login {
    /// Why one token per lease can't work with this one, if so.
    pub(super) fn unfit(&self) -> Option<&'static str> {
        if self.token_type != "service" || self.accessor.is_empty() {
            Some("the role gives batch tokens, which have no accessor to end them by; set token_type=service")
        } else if self.num_uses != 0 {
            Some("the role limits the uses of a token, which ends its leases with the last use; set token_num_uses=0")
        } else if self.policies.iter().any(|p| p == "root") {
            Some("the token has the root policy; give the role the policies of docs/vault.md and no other")
        } else {
            None
        }
    }
}

#[derive(Deserialize)]
struct AuthReply {
    auth: Auth,
}
#[derive(Deserialize)]
struct Auth {
    client_token: String,
    #[serde(default)]
    accessor: String,
    #[serde(default)]
    lease_duration: u64,
    #[serde(default)]
    token_type: String,
    #[serde(default)]
    policies: Option<Vec<String>>,
    #[serde(default)]
    num_uses: u64,
    #[serde(default)]
    entity_id: String,
    #[serde(default)]
    metadata: Option<HashMap<String, String>>,
}

fn read_login(reply: &Reply) -> Result<Login, Fault> {
    let auth = reply.json::<AuthReply>()?.auth;
    let token = Secret::new(auth.client_token);
    let plain = auth.accessor.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if token.expose().is_empty() || auth.accessor.len() > ID_BYTES_MAX || !plain {
        return Err(Fault::new(Kind::Unexpected, "log-in", "the answer has no token, or an accessor of another form"));
    }
    Ok(Login {
        token,
        accessor: auth.accessor,
        ttl_secs: auth.lease_duration,
        token_type: auth.token_type,
        policies: auth.policies.unwrap_or_default(),
        num_uses: auth.num_uses,
        entity: auth.entity_id,
        metadata: auth.metadata.unwrap_or_default(),
    })
}

struct Janitor {
    token: Secret,
    stale_at_boot_ms: u64,
    generation: u64,
}

/// Who logs in at one target.
pub(super) struct Logins {
    auth: AuthSettings,
    base: std::path::PathBuf,
    signer: Arc<dyn AssertionSigner>,
    clock: Arc<dyn Clock>,
    deadline: Duration,
    /// By namespace; the lock is held over the log-in, so that many at once make one.
    janitors: tokio::sync::Mutex<HashMap<Option<String>, Janitor>>,
    kept: parking_lot::Mutex<HashMap<LeaseId, (Login, u64)>>,
}

impl Logins {
    pub(super) fn new(
        auth: AuthSettings,
        base: std::path::PathBuf,
        signer: Arc<dyn AssertionSigner>,
        clock: Arc<dyn Clock>,
        deadline: Duration,
    ) -> Self {
        let (janitors, kept) = (tokio::sync::Mutex::default(), parking_lot::Mutex::default());
        Self { auth, base, signer, clock, deadline, janitors, kept }
    }

    /// A token for one mint. `lease` goes into its metadata, so that the target's own log names it;
    /// `lifetime_secs` bounds the token where the target lets us.
    pub(super) async fn mint(
        &self,
        api: &Client,
        ns: Option<&str>,
        lease: &str,
        lifetime_secs: u64,
    ) -> Result<Login, Fault> {
        match &self.auth {
            AuthSettings::Jwt { mint_role, audience, subject, .. } => {
                let extra = Map::from_iter([("lease".to_owned(), Value::from(lease))]);
                self.by_jwt(api, ns, mint_role, audience, subject, extra).await
            }
            AuthSettings::Token { token, mint_policies } => {
                let parent =
                    token.read(&self.base).map_err(|e| Fault::new(Kind::Unreachable, "log-in", e.to_string()))?;
                let body = json!({
                    "policies": mint_policies, "no_default_policy": true, "type": "service", "renewable": false,
                    "ttl": format!("{lifetime_secs}s"), "explicit_max_ttl": format!("{lifetime_secs}s"),
                    "display_name": "countersign", "meta": { "lease": lease },
                });
                let path = "auth/token/create";
                let call = Call {
                    method: "POST",
                    path,
                    namespace: ns,
                    token: Some(&parent),
                    body: Some(&body),
                    deadline: self.deadline,
                };
                read_login(&api.call(call).await?)
            }
        }
    }

    /// A log-in with claims of the caller's choice (`config check --live` tries wrong ones).
    pub(super) async fn by_jwt(
        &self,
        api: &Client,
        ns: Option<&str>,
        role: &str,
        audience: &str,
        subject: &str,
        extra: Map<String, Value>,
    ) -> Result<Login, Fault> {
        let AuthSettings::Jwt { mount, .. } = &self.auth else {
            return Err(Fault::new(Kind::Unexpected, "log-in", "this target is logged in to by a stored token"));
        };
        let jwt = self
            .signer
            .sign(audience, subject, extra, ASSERTION_LIFE_SECS)
            .map_err(|e| Fault::new(Kind::Unreachable, "log-in", format!("the assertion can't be signed: {e}")))?;
        let body = json!({ "role": role, "jwt": jwt.expose() });
        let path = format!("auth/{mount}/login");
        let call = Call {
            method: "POST",
            path: &path,
            namespace: ns,
            token: None,
            body: Some(&body),
            deadline: self.deadline,
        };
        let reply = api.call(call).await.map_err(|mut fault| {
            fault.message = fault.message.replace(jwt.expose(), "…");
            fault
        })?;
        read_login(&reply)
    }

    /// The janitor's token, and which one it is.
    async fn janitor(&self, api: &Client, ns: Option<&str>) -> Result<(Secret, u64), Fault> {
        let (role, audience, subject) = match &self.auth {
            AuthSettings::Token { token, .. } => {
                let token =
                    token.read(&self.base).map_err(|e| Fault::new(Kind::Unreachable, "log-in", e.to_string()))?;
                return Ok((token, 0));
            }
            AuthSettings::Jwt { janitor_role, audience, subject, .. } => (janitor_role, audience, subject),
        };
        let mut janitors = self.janitors.lock().await;
        let ns_key = ns.map(str::to_owned);
        let generation = match janitors.get(&ns_key) {
            Some(j) if self.clock.boot_ms() < j.stale_at_boot_ms => return Ok((j.token.clone(), j.generation)),
            Some(j) => j.generation + 1,
            None => 1,
        };
        let login = self.by_jwt(api, ns, role, audience, subject, Map::new()).await?;
        // Two thirds of its life: a call must not begin with a token that dies under way.
        let stale_at_boot_ms = self.clock.boot_ms().saturating_add(login.ttl_secs.saturating_mul(1000) / 3 * 2);
        let token = login.token.clone();
        janitors.insert(ns_key, Janitor { token: login.token, stale_at_boot_ms, generation });
        Ok((token, generation))
    }

    /// A call as the janitor. A refused token is replaced once: it may have been ended at the target.
    pub(super) async fn as_janitor(
        &self,
        api: &Client,
        ns: Option<&str>,
        method: &'static str,
        path: &str,
        body: Option<&Value>,
        deadline: Duration,
    ) -> Result<Reply, Fault> {
        for last in [false, true] {
            let (token, generation) = self.janitor(api, ns).await?;
            let call = Call { method, path, namespace: ns, token: Some(&token), body, deadline };
            match api.call(call).await {
                Err(fault) if fault.kind == Kind::TokenRefused && !last => {
                    let mut janitors = self.janitors.lock().await;
                    if let Some(j) = janitors.get_mut(&ns.map(str::to_owned)).filter(|j| j.generation == generation) {
                        j.stale_at_boot_ms = 0;
                    }
                }
                answer => return answer,
            }
        }
        // The second turn always returns.
        Err(Fault::new(Kind::TokenRefused, path, "the janitor's token was refused twice"))
    }

    /// Keeps a token until its mint. Refused when too many wait already.
    pub(super) fn keep(&self, lease: LeaseId, login: Login) -> Result<(), Box<Login>> {
        let now = self.clock.boot_ms();
        let mut kept = self.kept.lock();
        kept.retain(|_, (_, since)| now.saturating_sub(*since) < KEPT_MS_MAX);
        if kept.len() >= KEPT_MAX {
            return Err(Box::new(login));
        }
        kept.insert(lease, (login, now));
        Ok(())
    }

    /// Takes it out again, with how long it has waited: it is used once.
    pub(super) fn take(&self, lease: LeaseId) -> Option<(Login, Duration)> {
        let (login, since) = self.kept.lock().remove(&lease)?;
        Some((login, Duration::from_millis(self.clock.boot_ms().saturating_sub(since))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::id::Timestamp;
    use std::sync::atomic::{AtomicU64, Ordering};

    struct NoSigner;
    impl AssertionSigner for NoSigner {
        fn sign(&self, _: &str, _: &str, _: Map<String, Value>, _: u64) -> Result<Secret, String> {
            Err("no key".to_owned())
        }
    }

    #[derive(Default)]
    struct Boot(AtomicU64);
    impl Clock for Boot {
        fn wall(&self) -> Timestamp {
            Timestamp(0)
        }
        fn boot_ms(&self) -> u64 {
            self.0.load(Ordering::SeqCst)
        }
        fn boot_id(&self) -> String {
            String::new()
        }
        fn sleep(&self, _: Duration) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send + '_>> {
            Box::pin(std::future::ready(()))
        }
    }

    fn login() -> Login {
        Login {
            token: Secret::new("t".to_owned()),
            accessor: "a".to_owned(),
            ttl_secs: 60,
            token_type: "service".to_owned(),
            policies: vec!["mint".to_owned()],
            num_uses: 0,
            entity: String::new(),
            metadata: HashMap::new(),
        }
    }

    #[test]
    fn tokens_that_wait_for_a_mint_are_few_used_once_and_forgotten() {
        let clock = Arc::new(Boot::default());
        let auth = AuthSettings::Jwt {
            mount: "jwt".to_owned(),
            mint_role: "m".to_owned(),
            janitor_role: "j".to_owned(),
            audience: "a".to_owned(),
            subject: "s".to_owned(),
        };
        let logins = Logins::new(auth, ".".into(), Arc::new(NoSigner), clock.clone(), Duration::from_secs(1));
        let id = |n: usize| LeaseId::from_bytes((n as u128).to_be_bytes());
        for n in 0..KEPT_MAX {
            assert!(logins.keep(id(n), login()).is_ok());
        }
        assert!(logins.keep(id(KEPT_MAX), login()).is_err());
        clock.0.store(300, Ordering::SeqCst);
        let (_, waited) = logins.take(id(7)).unwrap();
        assert!(waited == Duration::from_millis(300) && logins.take(id(7)).is_none());
        assert!(logins.keep(id(KEPT_MAX), login()).is_ok());
        clock.0.store(300 + KEPT_MS_MAX, Ordering::SeqCst);
        assert!(logins.keep(id(1), login()).is_ok() && logins.kept.lock().len() == 1, "the old are forgotten");
    }

    #[test]
    fn only_tokens_that_can_be_ended_are_fit() {
        assert!(login().unfit().is_none());
        for unfit in [
            Login { token_type: "batch".to_owned(), ..login() },
            Login { accessor: String::new(), ..login() },
            Login { num_uses: 1, ..login() },
            Login { policies: vec!["root".to_owned()], ..login() },
        ] {
            assert!(unfit.unfit().is_some());
        }
    }
}
