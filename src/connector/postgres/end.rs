//! Endings: the order of steps, shared between all roles that are due together; what resists goes on alone (`alone.rs`).
//! Every ending goes through one queue, however it was asked for: those that wait for a turn share the next statements.
//!
//! Order (guarantee 5 rests on it): groups and login are cut and committed → sessions terminated until two polls
//! find none, on standbys too → prepared transactions → what it owned → the role → counts by OID.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio_postgres::types::Type;

use super::alone;
use super::ending::Ending;
use super::fail::Fail;
use super::pool::Conn;
use super::shared::{EXCHANGE, MINT_SESSION, Shared, TURN};
use super::shut::{MANY, shut};
use super::steps::{TOGETHER_ROLES_MAX, cut, drop_roles, prove, silence};
use crate::connector::{Gone, Listener, RevokeError};
use crate::core::event::Urgency;

/// In shared statements nobody waits long for a lock that one saboteur holds.
const LOCK_MS: u32 = 25;
/// How long the sessions of all may take to go before the slow ones go on alone.
const SILENCE: Duration = Duration::from_secs(2);
/// How long a standby may take to replay that logins are cut.
const REPLAY: Duration = Duration::from_secs(5);

/// So many roles that are before one, being ended or waiting, are worth a statement of its own that cuts its access now:
/// dropping them takes seconds.
const BEHIND: usize = 64;

/// An ending that waits for a turn.
pub struct Job {
    ending: Ending,
    done: oneshot::Sender<Ending>,
}

/// Ends one role, in shared statements if others are due now, alone if it resists.
pub async fn end(core: &Arc<Shared>, ending: Ending) -> Result<Gone, RevokeError> {
    // How urgent one is that resisted before, or that a sweep found, isn't known here.
    let (urgency, endings) = (Urgency::Over, vec![ending]);
    cut_first(core, urgency, &endings).await;
    let answer = enqueue(core, urgency, endings).pop();
    finish(core, answer, TURN).await
}

/// Nobody keeps their access for as long as others' roles are being dropped. True if all were cut that could be.
async fn cut_first(core: &Arc<Shared>, urgency: Urgency, endings: &[Ending]) -> bool {
    let is_worth_it = endings.len() >= MANY || core.queue.before() >= BEHIND;
    is_worth_it && shut(core, urgency, endings).await
}

/// Ends many at once, and tells of each by its place as soon as it is settled. One that resists goes on alone only if there is a turn
/// for it right now: the caller's own turn must not wait for those of saboteurs.
pub async fn end_all(core: &Arc<Shared>, urgency: Urgency, endings: Vec<(usize, Ending)>, listener: &dyn Listener) {
    let (places, endings): (Vec<usize>, Vec<Ending>) = endings.into_iter().unzip();
    if cut_first(core, urgency, &endings).await {
        listener.cut();
    }
    let answers = places.into_iter().zip(enqueue(core, urgency, endings));
    let each = answers.map(|(place, answer)| async move {
        listener.settled(place, finish(core, Some(answer), Duration::ZERO).await)
    });
    futures::future::join_all(each).await;
}

/// Puts them into the queue, with as many leaders as they need.
fn enqueue(core: &Arc<Shared>, urgency: Urgency, endings: Vec<Ending>) -> Vec<oneshot::Receiver<Ending>> {
    let leaders = endings.len().div_ceil(TOGETHER_ROLES_MAX);
    let mut answers = Vec::with_capacity(endings.len());
    for ending in endings {
        let (done, answer) = oneshot::channel();
        core.queue.put(urgency, 1, Job { ending, done });
        answers.push(answer);
    }
    for _ in 0..leaders {
        // A task of its own: whoever waits may be dropped, and the others' endings must not be dropped with it.
        tokio::spawn(lead(Arc::clone(core)));
    }
    answers
}

/// Takes a turn, and with it everybody who waits.
async fn lead(core: Arc<Shared>) {
    let mut turn = core.queue.turn(TOGETHER_ROLES_MAX).await;
    let (endings, dones): (Vec<_>, Vec<_>) =
        std::mem::take(&mut turn.jobs).into_iter().map(|job| (job.ending, job.done)).unzip();
    for (ending, done) in together(&core, endings).await.into_iter().zip(dones) {
        // Nobody waits any more: the ending is idempotent, the next attempt finds it done.
        let _ = done.send(ending);
    }
}

async fn finish(
    core: &Shared,
    answer: Option<oneshot::Receiver<Ending>>,
    patience: Duration,
) -> Result<Gone, RevokeError> {
    let retry = |why: String| RevokeError::Retry { why };
    let stopping = || retry("the broker is shutting down".to_owned());
    let ending = answer.ok_or_else(stopping)?.await.map_err(|_| stopping())?;
    match ending.gone() {
        Ok(gone) => Ok(gone),
        Err(ending) if ending.away => Err(retry(ending.stuck.unwrap_or_default())),
        Err(ending) => alone::end(core, *ending, patience).await,
    }
}

/// One round for all. Whoever is stuck afterwards goes on alone.
async fn together(core: &Shared, mut endings: Vec<Ending>) -> Vec<Ending> {
    if endings.is_empty() {
        return endings;
    }
    let round = async {
        let conn = core.ending(&mut endings).await?;
        let trouble = cut(core, &conn, &mut endings, LOCK_MS).await?;
        for ending in endings.iter_mut().filter(|e| e.is_open() && !e.cut) {
            ending.stuck = Some(trouble.join("; "));
        }
        silence(core, &conn, &core.last, &mut endings, SILENCE).await?;
        standbys(core, &conn, &mut endings, SILENCE).await?;
        for left in leftovers(&conn, &endings).await? {
            // A clean lease owns nothing and holds nothing: only that is dropped in shared statements.
            if let Some(ending) = endings.iter_mut().find(|e| e.oids().any(|oid| oid == left.oid)) {
                ending.stuck = Some(format!("it left {}", left.what()));
            }
        }
        drop_roles(core, &conn, &mut endings, LOCK_MS).await?;
        prove(core, &conn, &mut endings).await
    };
    if let Err(e) = round.await {
        for ending in endings.iter_mut().filter(|e| e.is_open()) {
            ending.stuck = Some(e.to_string());
        }
    }
    endings
}

/// Step 3 on every hot standby: sessions there outlive the role. Marks the moment when access is cut.
pub async fn standbys(core: &Shared, primary: &Conn, endings: &mut [Ending], within: Duration) -> Result<(), Fail> {
    for (standby, last) in core.plan.standbys.iter().zip(&core.lasts) {
        let place = format!("standby {}:{}", standby.host, standby.port);
        let looked = async {
            let lsn = primary.client.query_typed_one("SELECT pg_current_wal_flush_lsn()::text", &[]);
            let lsn: String = primary.exchange(EXCHANGE, async { lsn.await?.try_get(0) }).await?;
            let conn = core.elsewhere(standby, core.plan.home.as_str()).await?;
            replayed(core, &conn, &lsn).await?;
            last.soon(MINT_SESSION);
            silence(core, &conn, last, endings, within).await
        };
        if let Err(e) = looked.await {
            for ending in endings.iter_mut().filter(|e| e.is_open()) {
                ending.stuck = Some(format!("{place}: {e}"));
                ending.away = true;
            }
        }
    }
    for ending in endings.iter_mut().filter(|e| e.is_open() && e.present && e.cut && e.quiet_for.is_some()) {
        let cut = ending.started.elapsed();
        ending.access_cut.get_or_insert(cut);
    }
    Ok(())
}

/// Waits until the standby has replayed what was written on the primary: logins are cut there from then on.
async fn replayed(core: &Shared, conn: &Conn, lsn: &str) -> Result<(), Fail> {
    const ASK: &str = "SELECT pg_is_in_recovery(), coalesce(pg_last_wal_replay_lsn() >= $1::text::pg_lsn, false)";
    let mut waited = Duration::ZERO;
    loop {
        let row = conn.exchange(EXCHANGE, conn.client.query_typed_one(ASK, &[(&lsn, Type::TEXT)])).await?;
        let (in_recovery, done): (bool, bool) = (row.get(0), row.get(1));
        if !in_recovery {
            return Err(Fail::Lost("it is no standby (any more): correct the catalogue's standbys".to_owned()));
        }
        if done {
            return Ok(());
        }
        if waited >= REPLAY {
            return Err(Fail::Lost(format!("it lags: {lsn} was not replayed within {} s", REPLAY.as_secs())));
        }
        core.clock.sleep(Duration::from_millis(5)).await;
        waited += Duration::from_millis(5);
    }
}

/// What a role left somewhere.
pub struct Leftover {
    /// Whose.
    pub oid: u32,
    /// The database; `None` for what belongs to none.
    pub database: Option<String>,
    /// Objects it owns.
    pub owned: u64,
    /// Rights it was given, and the like.
    pub granted: u64,
    /// Prepared transactions, by their global ids.
    pub prepared: Vec<String>,
}

impl Leftover {
    fn what(&self) -> String {
        format!(
            "{} objects, {} rights, {} prepared transactions in {}",
            self.owned,
            self.granted,
            self.prepared.len(),
            self.database.as_deref().unwrap_or("no database")
        )
    }
}

const LEFTOVERS: &str = "SELECT s.refobjid, d.datname::text, count(*) FILTER (WHERE s.deptype = 'o'), \
       count(*) FILTER (WHERE s.deptype <> 'o'), '{}'::text[] \
       FROM pg_shdepend s LEFT JOIN pg_database d ON d.oid = s.dbid \
      WHERE s.refclassid = 'pg_authid'::regclass AND s.refobjid = ANY($1::oid[]) GROUP BY 1, 2 \
     UNION ALL SELECT p.ownerid, d.datname::text, 0, 0, array_agg(p.gid) \
       FROM pg_prepared_xact() AS p(xid, gid, prepared, ownerid, dbid) LEFT JOIN pg_database d ON d.oid = p.dbid \
      WHERE p.ownerid = ANY($1::oid[]) GROUP BY 1, 2";

/// Looks into every database at once: `pg_shdepend` and the prepared transactions are the cluster's.
pub async fn leftovers(conn: &Conn, endings: &[Ending]) -> Result<Vec<Leftover>, Fail> {
    let oids: Vec<u32> = endings.iter().filter(|e| e.is_open() && e.present).flat_map(Ending::oids).collect();
    if oids.is_empty() {
        return Ok(Vec::new());
    }
    let rows = conn.ask(LEFTOVERS, &[&oids]).await?;
    let count = |n: i64| u64::try_from(n).unwrap_or(0);
    Ok(rows
        .iter()
        .map(|row| Leftover {
            oid: row.get(0),
            database: row.get(1),
            owned: count(row.get(2)),
            granted: count(row.get(3)),
            prepared: row.get(4),
        })
        .collect())
}
