//! The PostgreSQL connector: a role for each lease, ended with proof. TARGETS.md has the experiments behind every step.
//!
//! Read in this order: `mint`, `end`, `steps`, `alone`, `leave`; `settings` is the operator's side, `check` looks at a live target.

mod alone;
mod check;
mod check_db;

mod end;
mod ending;
mod fail;
mod gather;
mod ident;
mod last;
mod leave;
mod mint;
mod op;
mod pool;
mod reach;
mod scram;
mod settings;
mod settings_check;
mod shared;
mod shut;
mod spares;
mod steps;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use aws_lc_rs::digest;
use serde_json::json;

use self::ending::Ending;
use self::op::Op;
use self::shared::{EXCHANGE, MINT_DEADLINE, Shared, TURN};
use super::{
    Away, Connector, Found, Gap, Gone, Listener, MintContext, MintError, Minted, Revocability, RevocabilityMode,
    RevokeError, SweepError,
};
use crate::config::{Problem, Resource, Target};
use crate::core::event::Urgency;
use crate::core::id::Timestamp;
use crate::core::lease::{Handle, Lease, LeaseIntent};
use crate::core::permission::Permission;
use crate::store::tls;
use crate::time::Clock;

pub use self::settings::{CONNECTIONS_MAX, DATABASES_MAX, GROUPS_MAX, SCRAM_ITERATIONS_MAX, STANDBYS_MAX};

/// Most roles that one sweep reports; the next one finds the rest.
pub const SWEEP_MAX: i64 = 10_000;
/// Worst case of an ending at a target that answers, in seconds: shown to the reviewer.
pub const RESIDUAL_SECS: u64 = 5;

/// One PostgreSQL cluster.
pub struct PostgresConnector {
    core: Arc<Shared>,
}

impl PostgresConnector {
    /// Checks the settings of a target and of its resources, all problems in one pass. Connects to nothing.
    ///
    /// `base` is where relative files start from; `name_prefix` is what every [`LeaseIntent::name`] of this
    /// broker begins with: what else begins with it at the target is ended by sweeps.
    pub fn new(
        target: &Target,
        resources: &[&Resource],
        base: &Path,
        clock: Arc<dyn Clock>,
        name_prefix: &str,
    ) -> Result<Self, Vec<Problem>> {
        let plan = settings::Plan::new(target, resources, base, name_prefix)?;
        Ok(Self { core: Arc::new(Shared::new(plan, base, clock)) })
    }
}

#[async_trait]
impl Connector for PostgresConnector {
    fn kind(&self) -> &'static str {
        "postgres"
    }

    fn revocability(&self, _permission: &Permission, lifetime_secs: u64) -> Revocability {
        Revocability {
            mode: RevocabilityMode::Immediate,
            residual_secs: RESIDUAL_SECS,
            says: format!(
                "When it ends, its open sessions are cut and the role is dropped with all it owns, within {RESIDUAL_SECS} s while \
                 the database answers. If it can't be reached then: when it returns; its password dies by itself {lifetime_secs} s \
                 after it was made."
            ),
        }
    }

    fn fingerprint(&self, permission: &Permission) -> serde_json::Value {
        let plan = &self.core.plan;
        let statements = Op::ALL.iter().fold(digest::Context::new(&digest::SHA256), |mut all, op| {
            all.update(op.body().as_bytes());
            all
        });
        let (database, groups) = match plan.groups(permission) {
            Ok((resource, groups)) => {
                (Some(resource.database.as_str()), groups.iter().map(|g| g.as_str()).collect::<Vec<_>>())
            }
            // Nothing can be minted for it.
            Err(_) => (None, Vec::new()),
        };
        json!({
            "connector": "postgres", "target": plan.target, "host": plan.primary.host, "port": plan.primary.port,
            "agent_host": plan.agent.host, "agent_port": plan.agent.port, "home": plan.home.as_str(), "user": plan.user.as_str(),
            "setup": plan.setup, "standbys": plan.standbys, "connection_group": plan.connection_group.as_str(),
            "connection_limit": plan.connection_limit, "tls": plan.tls.is_some(),
            "database": database, "groups": groups, "statements_sha256": hex::encode(statements.finish()),
        })
    }

    /// The server counts `VALID UNTIL` on its own clock, and no ending rests on it.
    fn counts_on_wall_clock(&self) -> bool {
        false
    }

    async fn mint(
        &self,
        intent: &LeaseIntent,
        _prepared: Option<&Handle>,
        _context: &MintContext,
    ) -> Result<Minted, MintError> {
        mint::mint(&self.core, intent).await
    }

    fn mint_deadline(&self) -> Duration {
        MINT_DEADLINE
    }

    async fn revoke(&self, lease: &Lease, _now: Timestamp) -> Result<Gone, RevokeError> {
        end::end(&self.core, self.ending(lease)?).await
    }

    async fn revoke_all(&self, leases: &[Lease], _now: Timestamp, urgency: Urgency, listener: &dyn Listener) {
        let mut endings = Vec::with_capacity(leases.len());
        for (place, lease) in leases.iter().enumerate() {
            match self.ending(lease) {
                Ok(ending) => endings.push((place, ending)),
                Err(foreign) => listener.settled(place, Err(foreign)),
            }
        }
        end::end_all(&self.core, urgency, endings, listener).await;
    }

    fn endings_together(&self) -> usize {
        shut::SHUT_ROLES_MAX
    }

    async fn probe(&self) -> Result<(), Away> {
        self.core.probe().await
    }

    async fn sweep(&self) -> Result<Vec<Found>, SweepError> {
        let prefix = self.core.plan.prefix.as_str();
        // A name that begins like ours and has another form is the operator's business.
        let ours = self.roles(prefix).await?.into_iter().filter(|(_, name)| mint::is_ours(name, prefix));
        Ok(ours.map(|(oid, name)| Found { name, handle: ending::handle(oid) }).collect())
    }

    fn ends_by_prefix(&self) -> Result<(), String> {
        match self.core.plan.setup {
            settings::Setup::Direct => Ok(()),
            settings::Setup::Functions => Err("with setup = \"functions\" the broker may end roles of its own prefix only: take \
                 `postgres_target` away (what a crash leaves then lives until VALID UNTIL), or name a target with setup = \"direct\""
                .to_owned()),
        }
    }

    async fn sweep_prefix(&self, prefix: &str) -> Result<Vec<Found>, SweepError> {
        if prefix.len() < ending::FOREIGN_PREFIX_BYTES_MIN {
            return Err(SweepError(format!(
                "the prefix {prefix:?} is too short: it could be the beginning of anybody's name"
            )));
        }
        // All of them, whatever else is in the name: what is not listed would count as gone.
        let roles = self.roles(prefix).await?;
        if roles.len() >= usize::try_from(SWEEP_MAX).unwrap_or(usize::MAX) {
            return Err(SweepError(format!(
                "{SWEEP_MAX} roles or more at {} begin with {prefix:?}: more than a sweep lists; drop those that nobody needs",
                self.core.plan.target
            )));
        }
        Ok(roles.into_iter().map(|(oid, name)| Found { name, handle: ending::foreign_handle(oid, prefix) }).collect())
    }

    async fn revoke_found(&self, found: &Found, _now: Timestamp) -> Result<Gone, RevokeError> {
        match ending::foreign_prefix(&found.handle) {
            // Made by what stands in front of this target, under a prefix that the catalogue gives it alone.
            Some(prefix) if found.name.starts_with(prefix) => {}
            _ => self.is_ours(&found.name)?,
        }
        end::end(&self.core, Ending::new(&found.name, Some(&found.handle), false)).await
    }

    async fn check(&self) -> Result<Vec<Gap>, SweepError> {
        check::check(&self.core).await.map_err(|e| SweepError(format!("can't check {}: {e}", self.core.plan.target)))
    }
}

impl PostgresConnector {
    /// Roles whose names begin so, with their OIDs.
    async fn roles(&self, prefix: &str) -> Result<Vec<(u32, String)>, SweepError> {
        use tokio_postgres::types::Type;
        const ROLES: &str =
            "SELECT oid, rolname::text FROM pg_roles WHERE starts_with(rolname, $1) ORDER BY oid LIMIT $2";
        let look = async {
            let conn = self.core.ends.get(TURN).await?;
            let params: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 2] =
                [(&prefix, Type::TEXT), (&SWEEP_MAX, Type::INT8)];
            conn.exchange(EXCHANGE, conn.client.query_typed(ROLES, &params)).await
        };
        let rows = look.await.map_err(|e| SweepError(format!("can't sweep {}: {e}", self.core.plan.target)))?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    fn ending(&self, lease: &Lease) -> Result<Ending, RevokeError> {
        self.is_ours(&lease.intent.name)?;
        Ok(Ending::new(&lease.intent.name, lease.handle.as_ref(), lease.was_seen_live()))
    }

    /// The last guard before anything is dropped: no role of another form than ours, whatever the journal says.
    fn is_ours(&self, name: &str) -> Result<(), RevokeError> {
        if mint::is_ours(name, &self.core.plan.prefix) {
            return Ok(());
        }
        Err(RevokeError::Retry {
            why: format!(
                "{name:?} is no name of a lease with the prefix {:?}: it was minted under another `name_prefix`; set that one back until \
                 it has ended",
                self.core.plan.prefix
            ),
        })
    }
}
