//! The seam to the targets: mint, revoke, verify and sweep credentials of one kind.
//!
//! One file or folder a kind. A connector holds no state that matters: everything it needs to end
//! a credential is in the [`Lease`] that the journal holds.

pub mod build;
pub mod postgres;
pub mod token;
pub mod vault;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use serde::Serialize;

use crate::core::event::Urgency;
use crate::core::id::Timestamp;
use crate::core::lease::{Evidence, Handle, Lease, LeaseIntent};
use crate::core::permission::Permission;
use crate::core::secret::Secret;

/// A credential as it is handed to the agent: named fields, each secret until it is released.
#[derive(Debug)]
pub struct Credential {
    /// What kind of thing this is, for the helper that renders it: `token`, `postgres`, `x509`, `ssh`, `vault`.
    pub kind: &'static str,
    /// Fields that are no secret (host, port, user, serial, lease id …).
    pub public: BTreeMap<String, String>,
    /// Fields that are (password, token, private key …).
    pub secret: BTreeMap<String, Secret>,
}

/// A mint that succeeded.
#[derive(Debug)]
pub struct Minted {
    /// What the agent gets.
    pub credential: Credential,
    /// How to find it again. Replaces the handle that [`Connector::prepare`] gave.
    pub handle: Handle,
    /// When it dies by itself, on the wall clock, where the target has native expiry.
    pub not_after: Option<Timestamp>,
}

/// A mint that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum MintError {
    /// Nothing was created, for certain: the target was not reached, or refused before any effect.
    #[error("nothing was created: {why}")]
    NotMinted {
        /// What happened, for the operator (never a secret).
        why: String,
        /// True if trying again later may help (target down), false if it won't (misconfigured).
        transient: bool,
    },
    /// The call left and no clear answer came back. Never treated as "failed".
    #[error("the outcome is unknown: {why}")]
    Unknown {
        /// What happened, for the operator (never a secret).
        why: String,
        /// What was learned about where the object may be, if more than was known before.
        handle: Option<Handle>,
    },
}

/// An ending that is proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gone {
    /// The proof. For a lease that [`Lease::was_seen_live`] says was never seen live, the broker
    /// records it as *absent*, else as *revoked*.
    pub evidence: Evidence,
    /// What the target told on the way.
    pub seen: Vec<Observation>,
    /// From the start of this call until access was cut, where that comes before the proof.
    pub access_cut: Option<Duration>,
}

/// An ending that is not proven yet. There is no third outcome.
#[derive(Debug, thiserror::Error)]
pub enum RevokeError {
    /// It did not work now; it will be tried again, for ever.
    #[error("{why}")]
    Retry {
        /// What happened, for the operator (never a secret).
        why: String,
    },
    /// This target can't end it early: ask again at that moment (wall clock), and it will be `Expired`.
    #[error("the credential can't be ended before it expires")]
    EndsAt {
        /// Expiry plus skew, wall clock.
        at: Timestamp,
    },
}

/// Is told how many endings go on. A closure hears what [became of each](Listener::settled).
pub trait Listener: Send + Sync {
    /// What became of one of them: its place among them, and the outcome.
    fn settled(&self, place: usize, outcome: Result<Gone, RevokeError>);
    /// Access of all that could be cut at once is cut, and what is left to do is in nobody's way: others may begin.
    fn cut(&self) {}
}

impl<F: Fn(usize, Result<Gone, RevokeError>) + Send + Sync> Listener for F {
    fn settled(&self, place: usize, outcome: Result<Gone, RevokeError>) {
        self(place, outcome);
    }
}

/// Endings in one [`Connector::revoke_all`], unless the [connector says otherwise](Connector::endings_together).
pub const ENDINGS_TOGETHER: usize = 64;

/// Endings at once in [`Connector::revoke_all`], where each goes for itself.
pub const ENDINGS_AT_ONCE: usize = 16;

/// Something of ours that a sweep found at the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The name at the target: compared with [`LeaseIntent::name`]. Where the target chooses the name, the
    /// connector gives the lease's name if it can tell it, else the target's own id.
    pub name: String,
    /// Where it is.
    pub handle: Handle,
}

/// A target that doesn't serve now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Away {
    /// What happened, for the operator (never a secret).
    pub why: String,
    /// How much of it is away.
    pub extent: Extent,
}

/// How much of a target is away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Nothing answers at its address.
    Silent,
    /// Something answers there, and doesn't serve: sealed, starting, refuses the log-in.
    Refuses,
    /// It serves; something behind it doesn't, so that some endings can't work.
    Behind,
}

/// A target that can't be swept now.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SweepError(pub String);

/// One thing that a target lacks, and what the lack allows (`config check --live`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gap {
    /// What is missing.
    pub what: String,
    /// What that allows.
    pub allows: String,
    /// The exact statement or setting that closes it.
    pub fix: String,
    /// True if the broker must not serve this target so.
    pub fatal: bool,
}

/// One target: a configured database, Vault, token issuer.
///
/// Every method has a deadline and a size limit of its own, and leaves no secret in an error.
/// A method may be called by several tasks at once.
#[async_trait]
pub trait Connector: Send + Sync {
    /// The kind: the `type` of its entries in `authorization_details` (`token`, `postgres`, `vault`).
    fn kind(&self) -> &'static str;

    /// What ending a credential for this permission does, if it lives at most `lifetime_secs`.
    fn revocability(&self, permission: &Permission, lifetime_secs: u64) -> Revocability;

    /// What of the target's configuration is behind this permission (statements, paths, addresses; no
    /// secret). Its hash is in the digest, so a change between approval and mint is seen (regression D11).
    fn fingerprint(&self, permission: &Permission) -> serde_json::Value;

    /// True if the credential comes into being inside the broker and nowhere else until it is released
    /// (a token that the broker signs): then intent, mint and release need one durable write, not two.
    fn mints_locally(&self) -> bool {
        false
    }

    /// True if the credential carries an expiry that is counted from the broker's wall clock, or is said to be
    /// expired by it: nothing is minted then while that clock can't be trusted (guarantee 10).
    fn counts_on_wall_clock(&self) -> bool {
        true
    }

    /// Makes the handle by which everything can be ended, before the secret is asked for. It is
    /// journaled before [`Connector::mint`] is called. Targets where we choose the name need none.
    async fn prepare(&self, _intent: &LeaseIntent) -> Result<Option<Handle>, MintError> {
        Ok(None)
    }

    /// Creates the credential, if absent, under `intent.name`. The caller runs it in a task of its own
    /// to its end: it is never dropped half-way. `binding` is the key the credential is bound to, if any.
    async fn mint(
        &self,
        intent: &LeaseIntent,
        prepared: Option<&Handle>,
        context: &MintContext,
    ) -> Result<Minted, MintError>;

    /// The longest that a mint may take, on both sides: after this, nothing of it is still under way
    /// at the target. Leases in doubt are looked for only after it.
    fn mint_deadline(&self) -> Duration;

    /// Ends the credential and proves it. Idempotent; already gone is success, by the same proof.
    /// `now` is a moment that has passed by the wall clock and by the broker's own, for `Expired`.
    async fn revoke(&self, lease: &Lease, now: Timestamp) -> Result<Gone, RevokeError>;

    /// Ends a lease that is in doubt (`Unknown`, or `Intended` at start). Targets that choose the names can't
    /// ask for ours: they end what is there and `known` doesn't hold. `known` has the
    /// [names](LeaseIntent::name) and [keys](Connector::keys) of all *other* leases at this target that are
    /// not proven gone, read from the view just before this call.
    async fn revoke_unknown(
        &self,
        lease: &Lease,
        _known: &BTreeSet<String>,
        now: Timestamp,
    ) -> Result<Gone, RevokeError> {
        self.revoke(lease, now).await
    }

    /// Ends many that are equally urgent. Endings that are due together may share statements, the most urgent first; the
    /// default is each for itself, at most [`ENDINGS_AT_ONCE`] at a time. Each outcome is told as soon as it is known, exactly once, by the lease's place
    /// in `leases`: one that resists holds up no other's record.
    async fn revoke_all(&self, leases: &[Lease], now: Timestamp, _urgency: Urgency, listener: &dyn Listener) {
        let mut endings = Vec::with_capacity(leases.len());
        for (place, lease) in leases.iter().enumerate() {
            endings.push(async move { listener.settled(place, self.revoke(lease, now).await) });
        }
        futures::stream::iter(endings).buffer_unordered(ENDINGS_AT_ONCE).collect::<()>().await;
    }

    /// What identifies the objects behind a handle at the target, where it isn't [`LeaseIntent::name`]. A
    /// [`Found`] is explained by a lease if the lease has its name, or shares one of its keys.
    fn keys(&self, _handle: &Handle) -> Vec<String> {
        Vec::new()
    }

    /// Whether this target can be [searched by name](Connector::sweep_prefix), and what is found ended; else why not, and what to do.
    fn ends_by_prefix(&self) -> Result<(), String> {
        Err("this kind of target can't be searched by name".to_owned())
    }

    /// Objects at this target whose name begins with `prefix` and that something in front of it made (database
    /// users of a Vault role). [`Connector::revoke_found`] ends them. Only targets with names can.
    async fn sweep_prefix(&self, _prefix: &str) -> Result<Vec<Found>, SweepError> {
        Err(SweepError("this kind of target can't be searched by name".to_owned()))
    }

    /// Does the target serve? One cheap exchange, with a deadline and a session of its own, so that it says so also while
    /// endings hang. Asked once a second while the target is away, more than one at a time if it doesn't answer.
    async fn probe(&self) -> Result<(), Away>;

    /// How many endings may come in one [`Connector::revoke_all`]. More than the default only where that many cost the
    /// target little more than one.
    fn endings_together(&self) -> usize {
        ENDINGS_TOGETHER
    }

    /// What of ours exists at the target. The broker ends what no lease explains (see [`Connector::keys`]) by
    /// [`Connector::revoke_found`], which answers `Retry` for what is so young that its mint may not be recorded yet.
    async fn sweep(&self) -> Result<Vec<Found>, SweepError>;

    /// Ends something that a sweep found and that no lease explains.
    async fn revoke_found(&self, found: &Found, now: Timestamp) -> Result<Gone, RevokeError>;

    /// Looks at the live target and says what it lacks.
    async fn check(&self) -> Result<Vec<Gap>, SweepError>;
}

/// What a mint may need beyond the intent: who it is for. Verified facts only.
#[derive(Debug, Clone)]
pub struct MintContext {
    /// The agent.
    pub agent: crate::core::id::AgentId,
    /// Who answers for it.
    pub owner: Option<crate::core::id::PersonId>,
    /// The task.
    pub task: crate::core::id::TaskName,
    /// Who approved.
    pub approvers: Vec<crate::core::id::PersonId>,
    /// The delegation chain, outermost parent first, without the agent itself.
    pub chain: Vec<crate::core::id::AgentId>,
    /// RFC 7800 `cnf` of the key that the grant is bound to.
    pub confirmation: Option<Confirmation>,
    /// The wall clock, or the broker's own if that one is behind: for targets that want absolute times.
    pub wall_now: Timestamp,
}

pub use crate::core::request::Confirmation;
pub use crate::core::revocability::{Observation, Revocability, RevocabilityMode};
