//! Minting: log in, journal the accessor (the broker does), ask for the secret in a detached task, and check
//! that what came is what was asked for (guarantee 3).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::Inner;
use super::api::{Call, Fault, Kind, Reply};
use super::handle::VaultHandle;
use super::login::Login;
use super::path::{Engine, check_lease_id, check_serial};
use super::resource::{Minting, is_exact_name};
use super::ssh::{FreshKey, Wanted, check_certificate, ends, fresh_key, read_certificate};
use crate::connector::{Credential, MintError, Minted};
use crate::core::id::Timestamp;
use crate::core::lease::LeaseIntent;
use crate::core::permission::{Constraint, Permission};
use crate::core::secret::Secret;

/// How much longer than asked a certificate may live: the target rounds, and counts on its own clock.
const ROUNDING_SECS: u64 = 2;
/// How long the answer to a mint that came to nothing waits for its token's end.
const CLEAN_UP_DEADLINE: Duration = Duration::from_secs(3);

#[derive(Deserialize)]
struct MintReply {
    #[serde(default)]
    lease_id: String,
    #[serde(default)]
    lease_duration: u64,
    data: Value,
}

/// What goes to the target, made from the permission.
struct Ask {
    method: &'static str,
    body: Option<Value>,
    names: BTreeSet<String>,
    ttl_secs: u64,
    key: Option<FreshKey>,
}

/// Something of the answer is not as asked: nothing is released, and what was made is ended (regression L8).
struct Mismatch(String);

fn no(why: impl Into<String>, transient: bool) -> MintError {
    MintError::NotMinted { why: why.into(), transient }
}

impl Inner {
    /// Logs in and keeps the token in memory; the handle has its accessor.
    pub(super) async fn prepare(&self, intent: &LeaseIntent) -> Result<VaultHandle, MintError> {
        let minting = self.minting(&intent.permission)?;
        ask(minting, intent, &intent.name).map_err(|why| no(why, false))?;
        let ns = self.settings.namespace.as_deref();
        // The token dies after its lease at the latest; a deadline's worth for the mint itself.
        let life = intent.lifetime_secs.saturating_add(self.settings.mint_deadline_secs);
        // A log-in creates nothing but a token that nobody knows if the answer is lost: always `NotMinted`.
        let login = self
            .logins
            .mint(&self.api, ns, &intent.lease.to_string(), life)
            .await
            .map_err(|fault| no(format!("log-in failed: {fault}"), may_heal(&fault)))?;
        if let Some(why) = login.unfit() {
            self.end_own_token(&login).await;
            return Err(no(why, false));
        }
        let mut handle = VaultHandle::new(minting.settings.engine, minting.path.as_str(), minting.path.mount(), ns);
        handle.accessor = Some(login.accessor.clone());
        handle.prepared_at = Some(self.clock.wall());
        handle.life_secs_max = minting.settings.ttl_secs_max;
        handle.swept = minting.swept();
        handle.username_prefix = minting.behind_prefix().map(str::to_owned);
        match self.logins.keep(intent.lease, login) {
            Ok(()) => Ok(handle),
            Err(login) => {
                self.end_own_token(&login).await;
                Err(no("too many mints wait for the journal", true))
            }
        }
    }

    /// Asks for the secret, to the end.
    pub(super) async fn mint(
        &self,
        intent: &LeaseIntent,
        prepared: VaultHandle,
        wall_now: Timestamp,
    ) -> Result<Minted, MintError> {
        let minting = self.minting(&intent.permission)?;
        if minting.path.as_str() != prepared.path {
            return Err(no("the resource's path changed between log-in and mint", true));
        }
        let Some((login, waited)) = self.logins.take(intent.lease) else {
            return Err(no("the log-in for this mint is gone from memory; ask again", true));
        };
        if waited > self.wait_max() {
            self.end_own_token(&login).await;
            return Err(no("too long passed between this mint's log-in and the mint itself; ask again", true));
        }
        let asked = match ask(minting, intent, &intent.name) {
            Ok(asked) => asked,
            Err(why) => {
                self.end_own_token(&login).await;
                return Err(no(why, false));
            }
        };
        let ns = prepared.namespace.clone();
        let call = Call {
            method: asked.method,
            path: minting.path.as_str(),
            namespace: ns.as_deref(),
            token: Some(&login.token),
            body: asked.body.as_ref(),
            deadline: self.mint_timeout(),
        };
        let reply = match self.api.call(call).await {
            Ok(reply) => reply,
            Err(fault) => {
                let error = mint_fault(&fault);
                if matches!(error, MintError::NotMinted { .. }) {
                    self.end_own_token(&login).await;
                }
                return Err(error);
            }
        };
        let received = self.clock.wall().max(wall_now);
        read_mint(&reply, minting, intent, &asked, prepared, &login, (received, self.skew_secs()))
    }

    /// Ends the token of a mint that came to nothing. If that fails too, the token dies by its own TTL, unknown to anybody.
    pub(super) async fn end_own_token(&self, login: &Login) {
        let ns = self.settings.namespace.as_deref();
        let (path, deadline) = ("auth/token/revoke-self", self.deadline().min(CLEAN_UP_DEADLINE));
        let call = Call { method: "PUT", path, namespace: ns, token: Some(&login.token), body: None, deadline };
        if let Err(fault) = self.api.call(call).await {
            tracing::warn!(accessor = %login.accessor, %fault, "the token of a mint that came to nothing was not ended; it ends by its TTL");
        }
    }
}

/// True if the same log-in may work later.
fn may_heal(fault: &Fault) -> bool {
    matches!(
        fault.kind,
        Kind::Unreachable
            | Kind::NoAnswer
            | Kind::Sealed
            | Kind::NotInitialised
            | Kind::NotActive
            | Kind::Busy
            | Kind::Failed
            | Kind::BehindUnreachable
    )
}

/// Whether a failed mint can have made something. In doubt it is `Unknown`, never "failed". The target's words are
/// passed on where it refused before any effect; after that they might quote a statement with the password in it.
pub(super) fn mint_fault(fault: &Fault) -> MintError {
    match fault.kind {
        Kind::Unreachable | Kind::Sealed | Kind::NotInitialised | Kind::NotActive | Kind::Busy | Kind::TokenRefused => {
            no(fault.to_string(), true)
        }
        Kind::BehindUnreachable => no(format!("{}: the target can't reach the database behind it", fault.what), true),
        Kind::PolicyDenied | Kind::Empty | Kind::NotFound | Kind::Refused | Kind::InvalidLease => {
            no(fault.to_string(), false)
        }
        Kind::NoAnswer => MintError::Unknown { why: fault.to_string(), handle: None },
        Kind::Failed | Kind::Unexpected => MintError::Unknown {
            why: format!(
                "{}: the target failed ({}); its own log says why",
                fault.what,
                fault.message.chars().take(3).collect::<String>()
            ),
            handle: None,
        },
    }
}

fn set<'a>(permission: &'a Permission, name: &str) -> Option<&'a BTreeSet<String>> {
    permission.constraints.iter().find(|(k, _)| k.as_str() == name).and_then(|(_, c)| match c {
        Constraint::Set(values) => Some(values),
        _ => None,
    })
}

fn ask(minting: &Minting, intent: &LeaseIntent, key_id: &str) -> Result<Ask, String> {
    let s = &minting.settings;
    let bound = intent.permission.constraints.iter().find(|(k, _)| k.as_str() == "ttl_secs");
    let bound = match bound {
        Some((_, Constraint::Max(secs))) => *secs,
        _ => u64::MAX,
    };
    let ttl_secs = intent.lifetime_secs.min(s.ttl_secs_max).min(bound);
    if ttl_secs == 0 {
        return Err("the credential would live for no time at all".to_owned());
    }
    let ttl = format!("{ttl_secs}s");
    let exact = |names: &BTreeSet<String>| {
        if !names.is_empty() && names.iter().all(|n| is_exact_name(n)) {
            Ok(())
        } else {
            Err("a name in the permission is not exact".to_owned())
        }
    };
    match s.engine {
        Engine::Database => Ok(Ask { method: "GET", body: None, names: BTreeSet::new(), ttl_secs, key: None }),
        Engine::Pki => {
            let (common, alt) = match (&s.common_name, set(&intent.permission, "names")) {
                (Some(common), _) => (common.clone(), s.alt_names.clone()),
                (None, Some(names)) => {
                    let common = names.first().ok_or("the permission names no name for the certificate")?;
                    (common.clone(), names.iter().skip(1).cloned().collect())
                }
                (None, None) => return Err("the permission names no name for the certificate".to_owned()),
            };
            let names: BTreeSet<String> = alt.iter().cloned().chain([common.clone()]).collect();
            exact(&names)?;
            let body = json!({
                "common_name": common, "alt_names": alt.into_iter().collect::<Vec<_>>().join(","), "ttl": ttl, "format": "pem",
            });
            Ok(Ask { method: "PUT", body: Some(body), names, ttl_secs, key: None })
        }
        Engine::Ssh => {
            let names = set(&intent.permission, "valid_principals").unwrap_or(&s.valid_principals).clone();
            // A17: without principals it would open every account.
            exact(&names)?;
            let key = fresh_key(key_id)?;
            let body = json!({
                "public_key": key.public, "valid_principals": names.iter().cloned().collect::<Vec<_>>().join(","),
                "cert_type": "user", "key_id": key_id, "ttl": ttl, "extensions": s.extensions, "critical_options": s.critical_options,
            });
            Ok(Ask { method: "PUT", body: Some(body), names, ttl_secs, key: Some(key) })
        }
    }
}

/// Reads the answer. From here on something exists: every error carries the handle that ends it.
fn read_mint(
    reply: &Reply,
    minting: &Minting,
    intent: &LeaseIntent,
    asked: &Ask,
    mut handle: VaultHandle,
    login: &Login,
    (received, skew_secs): (Timestamp, u64),
) -> Result<Minted, MintError> {
    let unknown = |why: String, handle: &VaultHandle| MintError::Unknown { why, handle: Some(handle.write()) };
    let answer: MintReply = reply.json().map_err(|f| unknown(f.to_string(), &handle))?;
    let mut data = Fields(answer.data);
    if !answer.lease_id.is_empty() {
        check_lease_id(&handle.path, &answer.lease_id).map_err(|why| unknown(why, &handle))?;
        handle.lease_id = Some(answer.lease_id);
    }
    let token_ends = received.plus_secs(login.ttl_secs);
    // The target counts from its own clock, which may be ahead of ours.
    let latest = |life_secs: u64| received.plus_secs(life_secs + ROUNDING_SECS + skew_secs);
    let read = match minting.settings.engine {
        Engine::Database => database(&mut data, minting, answer.lease_duration, &mut handle),
        Engine::Pki => pki(&mut data, minting, asked, &mut handle, latest(asked.ttl_secs)),
        Engine::Ssh => {
            // Until the certificate is read: the longest that the role may have given.
            handle.not_after = Some(latest(handle.life_secs_max));
            ssh(&mut data, minting, intent, asked, &mut handle, latest(asked.ttl_secs))
        }
    };
    let credential =
        read.map_err(|Mismatch(why)| unknown(format!("what came is not what was asked for: {why}"), &handle))?;
    let own_end = match minting.settings.engine {
        Engine::Database => received.plus_secs(answer.lease_duration),
        Engine::Pki | Engine::Ssh => handle.not_after.unwrap_or(token_ends),
    };
    // A lease reports its full time even if its token, and it with it, ends sooner.
    let not_after = if handle.lease_id.is_some() { own_end.min(token_ends) } else { own_end };
    Ok(Minted { credential, handle: handle.write(), not_after: Some(not_after) })
}

/// The `data` of an answer. What is taken out is moved, not copied.
struct Fields(Value);

impl Fields {
    fn text(&mut self, name: &str) -> Result<String, Mismatch> {
        match self.0.get_mut(name).map(Value::take) {
            Some(Value::String(text)) if !text.is_empty() => Ok(text),
            _ => Err(Mismatch(format!("the answer has no `{name}`"))),
        }
    }
    fn texts(&mut self, name: &str) -> Vec<String> {
        match self.0.get_mut(name).map(Value::take) {
            Some(Value::Array(items)) => items.into_iter().filter_map(|v| v.as_str().map(str::to_owned)).collect(),
            _ => Vec::new(),
        }
    }
}

fn database(
    data: &mut Fields,
    minting: &Minting,
    lease_secs: u64,
    handle: &mut VaultHandle,
) -> Result<Credential, Mismatch> {
    let password = data.text("password").map(Secret::new);
    let username = data.text("username")?;
    handle.username = Some(username.clone());
    let s = &minting.settings;
    if handle.lease_id.is_none() {
        return Err(Mismatch("the answer has no lease, so the user could not be ended".to_owned()));
    }
    if lease_secs > s.ttl_secs_max {
        return Err(Mismatch(format!(
            "the role's default_ttl is {lease_secs} s, more than `ttl_secs_max` ({} s)",
            s.ttl_secs_max
        )));
    }
    if s.username_prefix.as_ref().is_some_and(|p| !username.starts_with(p.as_str())) {
        return Err(Mismatch(
            "the user's name doesn't begin with `username_prefix`; set username_template at the database connection"
                .to_owned(),
        ));
    }
    let mut public = s.connection.clone();
    public.extend([("username".to_owned(), username), ("path".to_owned(), handle.path.clone())]);
    public.extend(handle.lease_id.clone().map(|id| ("lease_id".to_owned(), id)));
    Ok(Credential { kind: "vault", public, secret: BTreeMap::from([("password".to_owned(), password?)]) })
}

fn pki(
    data: &mut Fields,
    minting: &Minting,
    asked: &Ask,
    handle: &mut VaultHandle,
    latest: Timestamp,
) -> Result<Credential, Mismatch> {
    let private = data.text("private_key").map(Secret::new);
    let serial = data.text("serial_number")?;
    check_serial(&serial).map_err(Mismatch)?;
    handle.serial = Some(serial.clone());
    let certificate = data.text("certificate")?;
    if handle.lease_id.is_some() != minting.settings.generate_lease {
        let (is, says) = (handle.lease_id.is_some(), minting.settings.generate_lease);
        let why = format!("the role has generate_lease={is}, the catalogue says {says}");
        handle.certificate = Some(certificate).filter(|_| minting.settings.no_store);
        return Err(Mismatch(why));
    }
    if minting.settings.no_store {
        handle.certificate = Some(certificate.clone());
    }
    let facts = certificate_facts(&certificate).map_err(Mismatch)?;
    handle.not_after = Some(facts.not_after);
    let hex = |s: &str| s.replace([':', '-'], "").trim_start_matches('0').to_ascii_lowercase();
    if facts.serial_hex.trim_start_matches('0') != hex(&serial) {
        return Err(Mismatch("the certificate has another serial number than the answer".to_owned()));
    }
    if facts.other_names || facts.names.is_empty() || !facts.names.is_subset(&asked.names) {
        return Err(Mismatch("the certificate has names that were not asked for".to_owned()));
    }
    if facts.not_after > latest {
        return Err(Mismatch("the certificate lives longer than was asked for".to_owned()));
    }
    let mut chain = data.texts("ca_chain");
    if chain.is_empty() {
        chain.extend(data.text("issuing_ca"));
    }
    let public = BTreeMap::from([
        ("certificate".to_owned(), certificate),
        ("ca_chain".to_owned(), chain.join("\n")),
        ("serial".to_owned(), serial),
        ("path".to_owned(), handle.path.clone()),
    ]);
    Ok(Credential { kind: "x509", public, secret: BTreeMap::from([("private_key".to_owned(), private?)]) })
}

struct CertificateFacts {
    serial_hex: String,
    names: BTreeSet<String>,
    other_names: bool,
    not_after: Timestamp,
}

fn certificate_facts(pem: &str) -> Result<CertificateFacts, String> {
    use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
    let unreadable = || "the answer is no X.509 certificate".to_owned();
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).map_err(|_| unreadable())?;
    let (_, cert) = X509Certificate::from_der(&pem.contents).map_err(|_| unreadable())?;
    let (mut names, mut other_names) = (BTreeSet::new(), cert.is_ca());
    for cn in cert.subject().iter_common_name() {
        names.insert(cn.as_str().map_err(|_| unreadable())?.to_owned());
    }
    if let Ok(Some(san)) = cert.subject_alternative_name() {
        for name in &san.value.general_names {
            match name {
                GeneralName::DNSName(n) | GeneralName::RFC822Name(n) => _ = names.insert((*n).to_owned()),
                _ => other_names = true,
            }
        }
    }
    let secs = u64::try_from(cert.validity().not_after.timestamp()).unwrap_or(0);
    let serial_hex = hex::encode(cert.raw_serial());
    Ok(CertificateFacts { serial_hex, names, other_names, not_after: Timestamp(secs.saturating_mul(1000)) })
}

fn ssh(
    data: &mut Fields,
    minting: &Minting,
    intent: &LeaseIntent,
    asked: &Ask,
    handle: &mut VaultHandle,
    latest: Timestamp,
) -> Result<Credential, Mismatch> {
    let serial = data.text("serial_number")?;
    check_serial(&serial).map_err(Mismatch)?;
    handle.serial = Some(serial.clone());
    handle.key_id = Some(intent.name.clone());
    let certificate = data.text("signed_key")?.trim().to_owned();
    let Some(key) = &asked.key else { return Err(Mismatch("no key was sent".to_owned())) };
    let wanted = Wanted {
        public: &key.public,
        principals: &asked.names,
        key_id: &intent.name,
        extensions: &minting.settings.extensions,
        critical_options: &minting.settings.critical_options,
        not_after_max: latest,
    };
    let read = read_certificate(&certificate).map_err(Mismatch)?;
    handle.not_after = Some(ends(&read));
    check_certificate(&read, &wanted).map_err(Mismatch)?;
    let public = BTreeMap::from([
        ("certificate".to_owned(), certificate),
        ("public_key".to_owned(), key.public.clone()),
        ("serial".to_owned(), serial),
        ("key_id".to_owned(), intent.name.clone()),
        ("principals".to_owned(), asked.names.iter().cloned().collect::<Vec<_>>().join(",")),
    ]);
    Ok(Credential { kind: "ssh", public, secret: BTreeMap::from([("private_key".to_owned(), key.private.clone())]) })
}
