//! What the connector's steps share: the plan, the sessions, the deadlines.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::end::Job;
use super::ending::Ending;
use super::fail::Fail;
use super::gather::Gather;
use super::last::LastResort;
use super::pool::{CONNECT_TIMEOUT, Dial, Lent, Pool, STATEMENT_TIMEOUT, UNANSWERED};
use super::settings::{Plan, Standby};
use super::shut::Group;
use super::spares::Spares;
use crate::connector::{Away, Extent};
use crate::time::Clock;

/// Mints at once; more wait.
pub const MINTS_MAX: usize = 6;
/// Endings at once in shared statements.
pub const TOGETHER_MAX: usize = 2;
/// Endings at once that need more than that.
pub const ALONE_MAX: usize = 3;
/// Statements at once that cut many; whoever waits shares the next one.
pub const SHUT_MAX: usize = 1;
/// Sessions for endings: those above, and one for sweeps and checks.
pub const ENDS_MAX: usize = TOGETHER_MAX + ALONE_MAX + SHUT_MAX + 1;
/// How long to wait for a session's turn.
pub const TURN: Duration = Duration::from_secs(3);
/// An ordinary exchange, on this side.
pub const EXCHANGE: Duration = STATEMENT_TIMEOUT.saturating_add(Duration::from_secs(1));
/// A session for a mint: its turn, a new connection, and that it answers.
pub const MINT_SESSION: Duration = TURN.saturating_add(CONNECT_TIMEOUT.saturating_mul(2));
/// All sessions (those that will end it are made first) and the statement on this side; then bytes that the kernel still
/// holds, and the statement on the other side.
pub const MINT_DEADLINE: Duration = MINT_SESSION
    .saturating_mul(3)
    .saturating_add(EXCHANGE)
    .saturating_add(UNANSWERED)
    .saturating_add(STATEMENT_TIMEOUT);

/// Shared by all calls.
pub struct Shared {
    /// What to do.
    pub plan: Plan,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Passwords made ahead.
    pub spares: Arc<Spares>,
    /// Sessions that mint.
    pub mints: Arc<Pool>,
    /// The session that ends leases when nothing else works.
    pub last: Arc<LastResort>,
    /// The same at each standby, in their order.
    pub lasts: Vec<Arc<LastResort>>,
    /// Sessions that end.
    pub ends: Arc<Pool>,
    /// Sessions that look for what stands in the way.
    pub watch: Arc<Pool>,
    /// Endings that wait for one another's statements.
    pub queue: Gather<Job>,
    /// Those whose access is to be cut together.
    pub cuts: Gather<Group>,
    /// Turns of endings that need more.
    pub alone: Semaphore,
    base: Arc<Path>,
    others: Mutex<HashMap<(Standby, String), Arc<Pool>>>,
}

impl Shared {
    /// Nothing is connected yet.
    pub fn new(plan: Plan, base: &Path, clock: Arc<dyn Clock>) -> Self {
        let base: Arc<Path> = base.into();
        let dial = || Dial::new(&plan, &base, &plan.primary, plan.home.as_str());
        let home = |max| Pool::new(dial(), max);
        Self {
            last: Arc::new(LastResort::new(dial())),
            lasts: (plan.standbys.iter())
                .map(|standby| Arc::new(LastResort::new(Dial::new(&plan, &base, standby, plan.home.as_str()))))
                .collect(),
            spares: Spares::new(plan.scram_iterations),
            mints: home(MINTS_MAX),
            ends: home(ENDS_MAX),
            watch: home(ALONE_MAX),
            queue: Gather::new(TOGETHER_MAX),
            cuts: Gather::new(SHUT_MAX),
            alone: Semaphore::new(ALONE_MAX),
            others: Mutex::new(HashMap::new()),
            base,
            clock,
            plan,
        }
    }

    /// A session for endings. If a full server lets no new one in, those whom it is for are terminated first.
    pub async fn ending(&self, endings: &mut [Ending]) -> Result<Lent, Fail> {
        match self.ends.get(TURN).await {
            Err(e) if e.code().is_some_and(|code| code.code().starts_with("53")) => {
                self.last.terminate(endings).await?;
                self.clock.sleep(Duration::from_millis(25)).await;
                self.ends.get(TURN).await
            }
            lent => lent,
        }
    }

    /// Does the primary take the broker's sessions? One that is full does: then there are sessions to be terminated.
    pub async fn probe(&self) -> Result<(), Away> {
        let Err(fail) = self.ends.beside().await else { return Ok(()) };
        let answered = match &fail {
            Fail::Unreachable { code: Some(code), .. } if code.code().starts_with("53") => return Ok(()),
            Fail::Unreachable { answered, .. } => *answered,
            Fail::Refused { .. } | Fail::Lost(_) => true,
        };
        Err(Away { why: fail.to_string(), extent: if answered { Extent::Refuses } else { Extent::Silent } })
    }

    /// A session in another database of the primary, or on a standby.
    pub async fn elsewhere(&self, server: &Standby, database: &str) -> Result<Lent, Fail> {
        let pool = {
            let mut others = self.others.lock();
            let key = (server.clone(), database.to_owned());
            Arc::clone(
                others
                    .entry(key)
                    .or_insert_with(|| Pool::new(Dial::new(&self.plan, &self.base, server, database), ALONE_MAX)),
            )
        };
        pool.get(TURN).await
    }

    /// For messages and evidence.
    pub fn place(&self) -> String {
        format!("{}:{}", self.plan.primary.host, self.plan.primary.port)
    }
}
