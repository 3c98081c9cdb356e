//! The Vault/OpenBao connector: what a catalogue names literally (`database/creds/R`, `pki/issue/R`,
//! `ssh/sign/R`) is minted under a token of its own, and ended with the evidence that the target allows.
//!
//! `settings.rs` reads the operator's words; `login.rs`, `mint.rs` make; `ending.rs`, `recover.rs`, `sweep.rs`
//! end; `check.rs`, `rights.rs`, `roles.rs`, `trial.rs`
//! look at the live target; `api.rs` is the HTTP. What was found by experiment, and why the
//! order is as it is, stands at each step.

mod api;
pub mod assertion;
mod check;
mod ending;
mod handle;
mod login;
mod mint;
mod path;
mod recover;
mod resource;
mod rights;
mod roles;
mod settings;
mod ssh;
mod sweep;
mod trial;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde_json::json;

pub use assertion::AssertionSigner;

use self::api::Client;
use self::handle::VaultHandle;
use self::login::Logins;
use self::path::Engine;
use self::resource::Minting;
use self::settings::{AuthSettings, TargetSettings};
use super::{
    Away, Connector, Found, Gap, Gone, MintContext, MintError, Minted, Revocability, RevocabilityMode, RevokeError,
    SweepError,
};
use crate::config::{Problem, Resource, Target};
use crate::core::id::{LeaseId, ResourceName, Timestamp};
use crate::core::lease::{Handle, Lease, LeaseIntent};
use crate::core::permission::Permission;
use crate::time::Clock;

pub use crate::core::revocability::RESIDUAL_UNBOUNDED_SECS;
/// One Vault or OpenBao.
pub struct VaultConnector {
    inner: Arc<Inner>,
}

/// What the connector's tasks share.
pub(crate) struct Inner {
    settings: TargetSettings,
    api: Client,
    clock: Arc<dyn Clock>,
    logins: Logins,
    minting: BTreeMap<ResourceName, Minting>,
    behind: Option<Arc<dyn Connector>>,
    /// Mints of this process that have not come back: their leases are not looked for yet.
    under_way: parking_lot::Mutex<HashSet<LeaseId>>,
    /// Leases in doubt that are not settled yet, and when each was first seen here (boot clock).
    in_doubt: parking_lot::Mutex<HashMap<LeaseId, u64>>,
    /// Users at the database behind that no lease explained, and when they were first seen (boot clock).
    first_seen: parking_lot::Mutex<HashMap<String, u64>>,
    /// Paths whose roles are not the ones that `revocation_tried` stands for.
    untried: parking_lot::Mutex<HashSet<String>>,
}

impl VaultConnector {
    /// Reads and checks the settings of `target` and of those `resources` that are minted there. Relative files
    /// start from `base`. `behind` is the connector of the `postgres_target` that the resources name.
    pub fn new(
        target: &Target,
        resources: &[&Resource],
        base: &Path,
        signer: Arc<dyn AssertionSigner>,
        clock: Arc<dyn Clock>,
        behind: Option<Arc<dyn Connector>>,
    ) -> Result<Self, Vec<Problem>> {
        let (settings, api, minting) = read(target, resources, base, behind.is_some())?;
        let deadline = Duration::from_secs(settings.request_deadline_secs);
        let logins = Logins::new(settings.auth.clone(), base.to_owned(), signer, clock.clone(), deadline);
        let (under_way, in_doubt, first_seen, untried) = Default::default();
        let inner = Inner { settings, api, clock, logins, minting, behind, under_way, in_doubt, first_seen, untried };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// What [`VaultConnector::new`] would say, if the connector behind could be built.
    pub fn problems(target: &Target, resources: &[&Resource], base: &Path) -> Vec<Problem> {
        read(target, resources, base, true).err().unwrap_or_default()
    }
}

/// The settings of a target and of its resources, checked.
fn read(
    target: &Target,
    resources: &[&Resource],
    base: &Path,
    behind: bool,
) -> Result<(TargetSettings, Client, BTreeMap<ResourceName, Minting>), Vec<Problem>> {
    let mut problems = Vec::new();
    let read = settings::read(target, base, &mut problems);
    let mut minting = BTreeMap::new();
    for resource in resources.iter().filter(|r| r.target == target.name) {
        if let Some(m) = resource::read(resource, &mut problems) {
            minting.insert(resource.name.clone(), m);
        }
    }
    check_together(target, &minting, behind, &mut problems);
    match read {
        Some((settings, api)) if problems.is_empty() => Ok((settings, api, minting)),
        _ => Err(problems),
    }
}

/// What can't be seen from one resource alone.
fn check_together(
    target: &Target,
    minting: &BTreeMap<ResourceName, Minting>,
    behind: bool,
    problems: &mut Vec<Problem>,
) {
    let place = format!("target {}", target.name);
    let mut wrong = |what: &str| problems.push(Problem { place: place.clone(), what: what.to_owned() });
    let databases: BTreeSet<_> = minting.values().filter_map(|m| m.settings.postgres_target.as_ref()).collect();
    if databases.len() > 1 {
        wrong("its resources name more than one `postgres_target`; make a `vault` target for each database");
    }
    if !databases.is_empty() && !behind {
        wrong("its resources name a `postgres_target` that is no target of kind `postgres`");
    }
    let prefixes: Vec<_> =
        minting.values().filter_map(|m| m.settings.username_prefix.as_deref().map(|p| (p, m.path.as_str()))).collect();
    for (i, (a, a_path)) in prefixes.iter().enumerate() {
        if prefixes[i + 1..].iter().any(|(b, b_path)| a_path != b_path && (a.starts_with(b) || b.starts_with(a))) {
            wrong("two `username_prefix`es of different roles begin alike: a sweep could not tell whose a user is");
        }
    }
}

impl Inner {
    fn minting(&self, permission: &Permission) -> Result<&Minting, MintError> {
        self.minting.get(&permission.resource).ok_or_else(|| MintError::NotMinted {
            why: format!("{} is not (or no longer) a resource of this target", permission.resource),
            transient: false,
        })
    }
    fn deadline(&self) -> Duration {
        Duration::from_secs(self.settings.request_deadline_secs)
    }
    fn mint_deadline(&self) -> Duration {
        Duration::from_secs(self.settings.mint_deadline_secs)
    }
    /// How long we wait for a mint: as long as the server may work on it (90 of the 100 s), since a connection
    /// that we close is what leaves leases behind. The rest is for what is still under way after that.
    fn mint_timeout(&self) -> Duration {
        self.mint_deadline() * 9 / 10
    }
    /// How long a log-in may wait for its mint: so a mint is over at the target within its deadline of the log-in, from
    /// which whoever looks for one in doubt counts.
    fn wait_max(&self) -> Duration {
        self.mint_deadline() / 10
    }
    fn skew_secs(&self) -> u64 {
        self.settings.skew_secs
    }

    fn revocability(&self, permission: &Permission, lifetime_secs: u64) -> Revocability {
        let Some(minting) = self.minting.get(&permission.resource) else {
            return Revocability {
                mode: RevocabilityMode::ExpiryOnly,
                residual_secs: lifetime_secs,
                says: "This resource is not at this target: nothing will be minted.".to_owned(),
            };
        };
        let s = &minting.settings;
        let life = lifetime_secs.min(s.ttl_secs_max);
        let (mode, residual_secs, mut says) = match s.engine {
            Engine::Ssh => (
                RevocabilityMode::ExpiryOnly,
                life + self.skew_secs(),
                format!("An SSH certificate can't be ended early: a copy opens sessions until it expires, {} at most after issue; open sessions go on.", span(life)),
            ),
            Engine::Pki => (
                RevocabilityMode::NewUseOnly,
                life + self.skew_secs(),
                format!("Revoked at the CA when the grant ends, which stops those who check CRL or OCSP. Others accept it until it expires, {} at most after issue.", span(life)),
            ),
            Engine::Database if s.revocation_tried.is_some() && !self.untried.lock().contains(minting.path.as_str()) => (
                RevocabilityMode::Immediate,
                0,
                "The user is dropped and its sessions are cut when the grant ends (tried on this role).".to_owned(),
            ),
            Engine::Database => match s.session_secs_max {
                Some(secs) => (
                    RevocabilityMode::NewUseOnly,
                    secs,
                    format!("New log-ins stop when the grant ends, on proof. Sessions that are open may go on, {} at most.", span(secs)),
                ),
                None => (
                    RevocabilityMode::NewUseOnly,
                    RESIDUAL_UNBOUNDED_SECS,
                    "New log-ins stop when the grant ends, on proof. Sessions that are open may go on until they are closed: nothing known bounds that.".to_owned(),
                ),
            },
        };
        if s.engine == Engine::Database && minting.behind_prefix().is_none() {
            let life = span(s.ttl_secs_max);
            says = format!(
                "{says} If the broker or the target crashes while it is made, a user whose password nobody got may stay until its VALID UNTIL, {life} at most."
            );
        }
        Revocability { mode, residual_secs, says }
    }
}

/// A length of time, for a sentence.
fn span(secs: u64) -> String {
    match secs {
        0..120 => format!("{secs} seconds"),
        120..7200 => format!("{} minutes", secs.div_ceil(60)),
        _ => format!("{} hours", secs.div_ceil(3600)),
    }
}

/// Takes the lease out of the mints under way, however the task ends.
struct UnderWay(Arc<Inner>, LeaseId);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.under_way.lock().remove(&self.1);
    }
}

#[async_trait]
impl Connector for VaultConnector {
    fn kind(&self) -> &'static str {
        "vault"
    }

    fn revocability(&self, permission: &Permission, lifetime_secs: u64) -> Revocability {
        self.inner.revocability(permission, lifetime_secs)
    }

    fn fingerprint(&self, permission: &Permission) -> serde_json::Value {
        let t = &self.inner.settings;
        let resource = self.inner.minting.get(&permission.resource).map(|m| &m.settings);
        let roles = match &t.auth {
            AuthSettings::Jwt { mount, mint_role, .. } => json!({ "mount": mount, "mint_role": mint_role }),
            AuthSettings::Token { mint_policies, .. } => json!({ "mint_policies": mint_policies }),
        };
        json!({ "address": t.address, "namespace": t.namespace, "auth": roles, "resource": resource })
    }

    async fn prepare(&self, intent: &LeaseIntent) -> Result<Option<Handle>, MintError> {
        self.inner.prepare(intent).await.map(|handle| Some(handle.write()))
    }

    async fn mint(
        &self,
        intent: &LeaseIntent,
        prepared: Option<&Handle>,
        context: &MintContext,
    ) -> Result<Minted, MintError> {
        let no = |why: &str| MintError::NotMinted { why: why.to_owned(), transient: false };
        let prepared = VaultHandle::read(prepared.ok_or_else(|| no("no log-in was recorded for this mint"))?)
            .map_err(|e| no(&e))?;
        let (inner, intent, wall_now) = (self.inner.clone(), intent.clone(), context.wall_now);
        self.inner.under_way.lock().insert(intent.lease);
        let guard = UnderWay(inner.clone(), intent.lease);
        // Detached: a caller that goes away would close the connection, and disconnects leave users and leases
        // that no answer names (9 of 400 when tried).
        let task = tokio::spawn(async move {
            let _guard = guard;
            inner.mint(&intent, prepared, wall_now).await
        });
        task.await
            .unwrap_or_else(|_| Err(MintError::Unknown { why: "the mint's own task failed".to_owned(), handle: None }))
    }

    fn mint_deadline(&self) -> Duration {
        self.inner.mint_deadline()
    }

    async fn revoke(&self, lease: &Lease, now: Timestamp) -> Result<Gone, RevokeError> {
        self.inner.end(lease, None, now).await
    }

    async fn revoke_unknown(
        &self,
        lease: &Lease,
        known: &BTreeSet<String>,
        now: Timestamp,
    ) -> Result<Gone, RevokeError> {
        self.inner.end(lease, Some(known), now).await
    }

    fn keys(&self, handle: &Handle) -> Vec<String> {
        VaultHandle::read(handle).map(|h| h.keys()).unwrap_or_default()
    }

    async fn probe(&self) -> Result<(), Away> {
        self.inner.probe().await
    }

    async fn sweep(&self) -> Result<Vec<Found>, SweepError> {
        self.inner.sweep().await
    }

    async fn revoke_found(&self, found: &Found, _now: Timestamp) -> Result<Gone, RevokeError> {
        self.inner.end_found(found).await
    }

    async fn check(&self) -> Result<Vec<Gap>, SweepError> {
        self.inner.check().await
    }
}
