//! An ending that resists: what it left is removed database by database, and whoever of ours stands in the way is
//! terminated. Rounds until there is proof or the time is over; then it is asked for again, for ever (guarantee 4).

use std::time::{Duration, Instant};

use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use super::end::{leftovers, standbys};
use super::ending::Ending;
use super::fail::Fail;
use super::ident::{Ident, Literal};
use super::leave;
use super::mint::is_ours;
use super::pool::{Conn, Lent};
use super::reach::{drop_way, make_way};
use super::shared::{EXCHANGE, Shared, TURN};
use super::steps::{cut, drop_roles, hush, prove, silence};
use crate::connector::{Gone, RevokeError};

/// How long one call goes on: then the attempt is recorded with what stood in its way, and the next one follows.
const CALL: Duration = Duration::from_secs(15);
/// Waiting for a lock; the watcher looks sooner.
const LOCK_MS: u32 = 200;
/// How often the watcher looks.
const WATCH: Duration = Duration::from_millis(20);
/// How long its sessions may take to go in one round.
const SILENCE: Duration = Duration::from_secs(8);
/// Cutting may be blocked by a session of the role itself: terminate, then again.
const CUTS_MAX: usize = 6;

/// Ends one role, if there is a turn for it within `patience`: one that resists may take a turn for long, and must not hold up others.
pub async fn end(core: &Shared, mut ending: Ending, patience: Duration) -> Result<Gone, RevokeError> {
    let retry = |why: &str| RevokeError::Retry { why: why.to_owned() };
    let resists = ending.stuck.clone().unwrap_or_default();
    let Ok(Ok(_turn)) = tokio::time::timeout(patience, core.alone.acquire()).await else {
        return Err(retry(&format!(
            "{resists}; others that resist are being ended just now, so it waits for its turn"
        )));
    };
    let deadline = Instant::now() + CALL;
    let mut pause = Duration::from_millis(20);
    loop {
        ending.again();
        let left = deadline.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left, Box::pin(round(core, &mut ending))).await {
            Ok(Ok(())) => {}
            // A target that can't be reached is for the caller's back-off; a lease that resists is for here.
            Ok(Err(e @ Fail::Unreachable { .. })) if e.code().is_none() => return Err(retry(&e.to_string())),
            Ok(Err(e)) => ending.stuck = Some(e.to_string()),
            Err(_) => ending.stuck = Some(format!("not done within {} s", CALL.as_secs())),
        }
        if let Some(way) = ending.way.take()
            && let Err(e) = drop_a_way(core, &way).await
        {
            tracing::warn!(role = %way, error = %e, "a role of the broker's own is left at the target; a sweep will drop it");
        }
        ending = match ending.gone() {
            Ok(gone) => return Ok(gone),
            Err(ending) => *ending,
        };
        if ending.away || Instant::now() + pause >= deadline {
            return Err(retry(ending.stuck.as_deref().unwrap_or("no proof yet")));
        }
        core.clock.sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(2));
    }
}

async fn drop_a_way(core: &Shared, way: &str) -> Result<(), Fail> {
    let conn = core.ends.get(TURN).await?;
    drop_way(core, &conn, way).await
}

async fn round(core: &Shared, ending: &mut Ending) -> Result<(), Fail> {
    let conn = core.ending(std::slice::from_mut(ending)).await?;
    let mut trouble = Vec::new();
    for _ in 0..CUTS_MAX {
        // With the lock table full even this fails, and killing by process still works.
        let one = std::slice::from_mut(ending);
        let mut watched = Watched::default();
        trouble = match watch(core, conn.pid, &mut watched, cut(core, &conn, one, LOCK_MS)).await {
            Ok(trouble) => trouble,
            Err(e @ (Fail::Lost(_) | Fail::Unreachable { .. })) => return Err(e),
            Err(e) => vec![e.to_string()],
        };
        ending.tally.blockers.append(&mut watched.cut);
        trouble.append(&mut watched.others);
        silence(core, &conn, &core.last, std::slice::from_mut(ending), SILENCE).await?;
        if ending.cut || !ending.is_open() {
            break;
        }
        // What blocks the cut now is no session of its own.
        roll_back_all(core, &conn, ending).await?;
    }
    if !ending.cut && ending.is_open() {
        ending.stuck = Some(trouble.join("; "));
    }
    standbys(core, &conn, std::slice::from_mut(ending), SILENCE).await?;
    let name = ending.name.clone();
    let Ok(role) = Ident::new(&name) else {
        ending.stuck = Some("its name can't be a role's name: nothing of that name was ever made".to_owned());
        return Ok(());
    };
    roll_back_all(core, &conn, ending).await?;
    for left in leftovers(&conn, std::slice::from_ref(ending)).await? {
        let Some(database) = left.database else { continue };
        if left.owned > 0 || left.granted > 0 {
            let there = core.elsewhere(&core.plan.primary, &database).await?;
            leave::drop_owned(core, &there, ending, &role, left.oid, &database).await?;
        }
    }
    let mut watched = Watched::default();
    let one = std::slice::from_mut(ending);
    watch(core, conn.pid, &mut watched, drop_roles(core, &conn, one, LOCK_MS)).await?;
    watched.tell(ending);
    prove(core, &conn, std::slice::from_mut(ending)).await
}

/// Prepared transactions survive their sessions; each can be ended in its own database by its owner only.
async fn roll_back_all(core: &Shared, conn: &Conn, ending: &mut Ending) -> Result<(), Fail> {
    let Ok(role) = Ident::new(&ending.name) else { return Ok(()) };
    for left in leftovers(conn, std::slice::from_ref(ending)).await? {
        let Some(database) = left.database.filter(|_| !left.prepared.is_empty()) else { continue };
        let there = core.elsewhere(&core.plan.primary, &database).await?;
        for gid in &left.prepared {
            let mut done = roll_back(&there, &role, gid).await;
            if done.as_ref().is_err_and(|e| e.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE)) {
                // It took itself from the broker, and this very transaction locks the row that would give it back.
                done = roll_back_through(core, conn, &there, &role, gid).await;
            }
            done?;
            ending.tally.prepared += 1;
        }
    }
    Ok(())
}

async fn roll_back(conn: &Conn, role: &Ident, gid: &str) -> Result<(), Fail> {
    conn.exchange(EXCHANGE, conn.client.batch_execute(&format!("SET ROLE {role}"))).await?;
    let done = conn.exchange(EXCHANGE, conn.client.batch_execute(&format!("ROLLBACK PREPARED {}", Literal(gid)))).await;
    if conn.exchange(EXCHANGE, conn.client.batch_execute("RESET ROLE")).await.is_err() {
        conn.discard();
    }
    match done {
        // Ended by somebody else meanwhile.
        Err(e) if e.code() == Some(&SqlState::UNDEFINED_OBJECT) => Ok(()),
        done => done,
    }
}

/// ROLLBACK PREPARED can't stand in a transaction, so the way round is committed here, and dropped (a sweep would find it).
async fn roll_back_through(core: &Shared, home: &Conn, there: &Conn, role: &Ident, gid: &str) -> Result<(), Fail> {
    let through = make_way(core, home, &[role.as_str()]).await?;
    let done = roll_back(there, role, gid).await;
    done.and(drop_way(core, home, &through).await)
}

/// Who stood in the way of a statement.
#[derive(Default)]
pub struct Watched {
    /// Sessions of other leases, terminated.
    pub cut: std::collections::BTreeSet<i32>,
    /// Others, which are left alone.
    pub others: Vec<String>,
}

impl Watched {
    /// Adds it to what is told of the ending.
    pub fn tell(mut self, ending: &mut Ending) {
        ending.tally.blockers.append(&mut self.cut);
        if let Some(stuck) = ending.stuck.as_mut().filter(|_| !self.others.is_empty()) {
            stuck.push_str("; ");
            stuck.push_str(&self.others.join("; "));
        }
    }
}

/// Does the work while a second session terminates leases of ours that block it. Others are only named.
pub async fn watch<T>(core: &Shared, pid: i32, watched: &mut Watched, work: impl Future<Output = T>) -> T {
    // Before the work begins: it gives up waiting after a fifth of a second, and a session that is being made then would never be.
    let ready = core.watch.get(TURN).await.ok();
    tokio::select! {
        biased;
        out = work => out,
        never = watcher(core, pid, watched, ready) => match never {},
    }
}

async fn watcher(core: &Shared, pid: i32, watched: &mut Watched, mut ready: Option<Lent>) -> std::convert::Infallible {
    const BLOCKERS: &str = "SELECT a.pid, r.rolname::text FROM pg_stat_get_activity(NULL) a \
         JOIN pg_roles r ON r.oid = a.usesysid WHERE a.pid = ANY(pg_blocking_pids($1))";
    loop {
        core.clock.sleep(WATCH).await;
        // Without a second session the work goes on unwatched.
        let conn = match ready.take() {
            Some(conn) => conn,
            None => match core.watch.get(TURN).await {
                Ok(conn) => conn,
                Err(_) => continue,
            },
        };
        let Ok(rows) = conn.exchange(EXCHANGE, conn.client.query_typed(BLOCKERS, &[(&pid, Type::INT4)])).await else {
            continue;
        };
        watched.others.clear();
        for row in &rows {
            let (pid, name): (i32, String) = (row.get(0), row.get(1));
            if !is_ours(&name, &core.plan.prefix) {
                watched.others.push(format!("blocked by session {pid} of role {name:?}, which is not a lease: end it"));
                continue;
            }
            // Noted first: once it is gone the work goes on, and this is dropped in the middle.
            watched.cut.insert(pid);
            let mut killed = hush(core, &conn, &name, &[pid], false).await;
            if killed.is_err() {
                killed = hush(core, &conn, &name, &[pid], true).await;
            }
            if !killed.as_ref().is_ok_and(|pids| pids.contains(&pid)) {
                watched.cut.remove(&pid);
            }
            if let Err(e) = killed {
                watched.others.push(format!("blocked by session {pid} of the lease {name}: {e}"));
            }
        }
    }
}
