//! The steps of an ending that work on many roles at once, in the order of `end.rs`: cut, silence, drop, prove.
//! A role that a step can't handle gets `stuck` and doesn't hold up the others.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio_postgres::error::SqlState;

use super::ending::Ending;
use super::fail::Fail;
use super::last::LastResort;
use super::op::Op;
use super::pool::Conn;
use super::reach::make_way;
use super::shared::{EXCHANGE, Shared};

/// Least time between the two polls that must both find nothing.
const APART: Duration = Duration::from_millis(10);
/// First pause while sessions are going.
const PAUSE: Duration = Duration::from_millis(2);
/// Longest pause while sessions are going.
const PAUSE_MAX: Duration = Duration::from_millis(25);
/// Most roles in one statement.
pub const TOGETHER_ROLES_MAX: usize = 256;

/// Step 1 and 2: groups, then NOLOGIN. A role whose groups or login could not be cut keeps `cut == false`, with why.
pub async fn cut(core: &Shared, conn: &Conn, endings: &mut [Ending], lock_ms: u32) -> Result<Vec<String>, Fail> {
    let mut open: Vec<&mut Ending> = endings.iter_mut().filter(|e| e.is_open() && !e.cut).collect();
    let roles: Vec<Value> = open.iter().map(|e| json!({ "name": e.name, "saved": e.saved })).collect();
    let input = json!({ "roles": roles, "lock_ms": lock_ms.to_string() });
    let out = Op::Cut.run(core.plan.setup, conn, &input, EXCHANGE).await?;
    let mut trouble = Vec::new();
    for ending in &mut open {
        let Some(answer) = answer_for(&out, &ending.name) else {
            ending.stuck = Some("the target gave no answer for this role".to_owned());
            continue;
        };
        if let Some(moved) = answer["moved"].as_str() {
            ending.stuck = Some(format!(
                "OID {} now belongs to a role named {moved:?}: rename it back to {:?} if it is this lease's, \
                 or tell the broker where the target went if this is another cluster",
                ending.saved.unwrap_or(0),
                ending.name
            ));
            continue;
        }
        let oid = answer["oid"].as_u64().and_then(|oid| u32::try_from(oid).ok());
        ending.present = oid.is_some();
        ending.seen_live |= ending.present;
        ending.found = oid.or(ending.found);
        let errors = answer["errors"].as_array().map(Vec::as_slice).unwrap_or_default();
        ending.cut = errors.is_empty();
        trouble.extend(errors.iter().map(error_text));
    }
    Ok(trouble)
}

/// Step 3: terminates every session of the roles, the hidden ones too, until two polls in a row find none.
/// `last` is the standing session at the same server.
pub async fn silence(
    core: &Shared,
    conn: &Conn,
    last: &LastResort,
    endings: &mut [Ending],
    within: Duration,
) -> Result<(), Fail> {
    let began = Instant::now();
    let mut strangers: BTreeSet<i32> = BTreeSet::new();
    let mut empty_since: HashMap<usize, Instant> = HashMap::new();
    let mut waiting: Vec<usize> =
        (0..endings.len()).filter(|i| endings[*i].is_open() && endings[*i].oids().next().is_some()).collect();
    let mut pause = PAUSE;
    while !waiting.is_empty() {
        // Locks first: a session that leaves its hiding place in between is in the second list.
        let polled = conn.exchange(EXCHANGE, async {
            futures::try_join!(conn.client.query(&conn.locks, &[]), conn.client.query(&conn.activity, &[]))
        });
        let (locks, activity) = match polled.await {
            Err(e) if e.code() == Some(&SqlState::OUT_OF_MEMORY) && began.elapsed() < within => {
                // The lock table is full: once the sessions that fill it are gone, all goes its way again.
                last.terminate(endings).await?;
                core.clock.sleep(PAUSE_MAX).await;
                continue;
            }
            polled => polled?,
        };
        let at = Instant::now();
        let mut sessions: Vec<(i32, Option<u32>)> = Vec::with_capacity(activity.len());
        for row in &activity {
            sessions.push((row.get(0), row.get(1)));
        }
        let hidden: Vec<i32> = locks
            .iter()
            .map(|row| row.get::<_, i32>(0))
            .filter(|pid| !strangers.contains(pid) && !sessions.iter().any(|(p, _)| p == pid))
            .collect();
        let found = hush_hidden(core, conn, endings, &waiting, &hidden).await?;
        strangers.extend(hidden.iter().filter(|pid| !found.values().any(|pids| pids.contains(pid))));
        let mut visible: HashMap<usize, Vec<i32>> = HashMap::new();
        for i in &waiting {
            let pids: Vec<i32> = sessions
                .iter()
                .filter(|(_, user)| user.is_some_and(|user| endings[*i].oids().any(|oid| oid == user)))
                .map(|(pid, _)| *pid)
                .collect();
            endings[*i].tally.sessions.extend(&pids);
            if pids.is_empty() && !found.contains_key(i) {
                empty_since.entry(*i).or_insert(at);
            } else {
                empty_since.remove(i);
            }
            if !pids.is_empty() {
                visible.insert(*i, pids);
            }
        }
        waiting.retain(|i| {
            let quiet = empty_since.get(i).map(|since| at - *since).filter(|quiet| *quiet >= APART);
            endings[*i].quiet_for = quiet;
            quiet.is_none()
        });
        terminate(core, conn, last, endings, &visible).await?;
        waiting.retain(|i| endings[*i].stuck.is_none());
        if began.elapsed() >= within {
            for i in &waiting {
                endings[*i].stuck = Some(match visible.get(i) {
                    Some(pids) => format!("{} sessions are still open after {} ms", pids.len(), within.as_millis()),
                    None => "sessions kept coming while it was being ended".to_owned(),
                });
            }
            return Ok(());
        }
        if !waiting.is_empty() {
            let all_empty = waiting.iter().all(|i| empty_since.contains_key(i));
            core.clock.sleep(if all_empty { APART } else { pause }).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
    Ok(())
}

/// Tries the hidden sessions as each of the roles: only those of that role answer to it.
async fn hush_hidden(
    core: &Shared,
    conn: &Conn,
    endings: &mut [Ending],
    waiting: &[usize],
    hidden: &[i32],
) -> Result<HashMap<usize, Vec<i32>>, Fail> {
    let mut found = HashMap::new();
    let asked: Vec<usize> = waiting.iter().copied().filter(|i| endings[*i].present).collect();
    if hidden.is_empty() || asked.is_empty() {
        return Ok(found);
    }
    // As member of each role; if that was taken from the broker, through a role that nobody can see.
    let roles: Vec<Value> = asked.iter().map(|i| json!({ "name": endings[*i].name })).collect();
    let input = json!({ "roles": roles, "pids": hidden });
    let out = match Op::Hush.run(core.plan.setup, conn, &input, EXCHANGE).await {
        Err(e @ Fail::Lost(_)) => return Err(e),
        out => out.unwrap_or_default(),
    };
    for i in asked {
        let mut killed = killed(&out, &endings[i].name);
        if killed.is_err() {
            killed = hush(core, conn, &endings[i].name, hidden, true).await;
        }
        match killed {
            Ok(killed) if killed.is_empty() => {}
            Ok(killed) => {
                endings[i].tally.hidden.extend(&killed);
                found.insert(i, killed);
            }
            Err(e @ Fail::Lost(_)) => return Err(e),
            Err(e) => endings[i].stuck = Some(format!("can't look for hidden sessions: {e}")),
        }
    }
    Ok(found)
}

/// Terminates what is visible: by membership, and by force where a lease took that from the broker.
async fn terminate(
    core: &Shared,
    conn: &Conn,
    last: &LastResort,
    endings: &mut [Ending],
    visible: &HashMap<usize, Vec<i32>>,
) -> Result<(), Fail> {
    if visible.is_empty() {
        return Ok(());
    }
    const TERMINATE: &str =
        "SELECT pg_terminate_backend(pid) FROM pg_stat_get_activity(NULL) WHERE usesysid = ANY($1::oid[])";
    let oids: Vec<u32> = visible.keys().flat_map(|i| endings[*i].oids()).collect();
    let sent = conn.ask(TERMINATE, &[&oids]).await;
    match sent {
        Ok(_) => return Ok(()),
        Err(e) if e.code() == Some(&SqlState::OUT_OF_MEMORY) => return last.terminate(endings).await,
        Err(e @ Fail::Lost(_)) => return Err(e),
        Err(_) => {}
    }
    for (i, pids) in visible {
        let ending = &mut endings[*i];
        if ending.present {
            if let Err(e) = hush(core, conn, &ending.name, pids, true).await {
                if matches!(e, Fail::Lost(_)) {
                    return Err(e);
                }
                ending.stuck = Some(format!("can't terminate its sessions: {e}"));
            }
        } else {
            // Somebody dropped the role over our head: nobody but a superuser may end its sessions now.
            let pid = pids.first().copied().unwrap_or_default();
            ending.stuck = Some(format!(
                "the role was dropped by somebody else while {} of its sessions are open: as a superuser, run \
                 SELECT pg_terminate_backend({pid}) and the like for usesysid {:?}",
                pids.len(),
                ending.oids().collect::<Vec<_>>()
            ));
        }
    }
    Ok(())
}

/// Terminates those of the processes that belong to the role; says which. `reach`: through a role made for this
/// purpose alone and rolled back, which no lock and no REVOKE of a lease can be in the way of.
pub async fn hush(core: &Shared, conn: &Conn, name: &str, pids: &[i32], reach: bool) -> Result<Vec<i32>, Fail> {
    let input = json!({ "roles": [{ "name": name }], "pids": pids });
    let setup = core.plan.setup;
    if reach {
        conn.exchange(EXCHANGE, conn.client.batch_execute("BEGIN")).await?;
        let done = match make_way(core, conn, &[name]).await {
            Ok(_) => Op::Hush.run(setup, conn, &input, EXCHANGE).await,
            Err(e) => Err(e),
        };
        if conn.exchange(EXCHANGE, conn.client.batch_execute("ROLLBACK")).await.is_err() {
            conn.discard();
        }
        return killed(&done?, name);
    }
    killed(&Op::Hush.run(setup, conn, &input, EXCHANGE).await?, name)
}

fn killed(out: &Value, name: &str) -> Result<Vec<i32>, Fail> {
    let none = json!({ "error": { "at": "terminate", "message": "the target gave no answer for this role" } });
    let answer = answer_for(out, name).unwrap_or(&none);
    if !answer["error"].is_null() {
        return Err(Fail::Refused { code: SqlState::INSUFFICIENT_PRIVILEGE, message: error_text(&answer["error"]) });
    }
    let pids = answer["killed"].as_array().map(Vec::as_slice).unwrap_or_default();
    Ok(pids.iter().filter_map(Value::as_i64).filter_map(|pid| i32::try_from(pid).ok()).collect())
}

/// Step 6: what they own in the home database, and the roles.
pub async fn drop_roles(core: &Shared, conn: &Conn, endings: &mut [Ending], lock_ms: u32) -> Result<(), Fail> {
    let mut open: Vec<&mut Ending> = endings.iter_mut().filter(|e| e.is_open() && e.present).collect();
    if open.is_empty() {
        return Ok(());
    }
    let roles: Vec<Value> = open.iter().map(|e| json!({ "name": e.name })).collect();
    let input = json!({ "roles": roles, "lock_ms": lock_ms.to_string() });
    let out = Op::Drop.run(core.plan.setup, conn, &input, EXCHANGE).await?;
    for ending in &mut open {
        match answer_for(&out, &ending.name).map(|a| &a["error"]) {
            Some(Value::Null) => {}
            Some(error) => ending.stuck = Some(error_text(error)),
            None => ending.stuck = Some("the target gave no answer for this role".to_owned()),
        }
    }
    Ok(())
}

/// By OID: names are gone with the role, and a name filter would show a false zero.
const PROOF: &str = "SELECT t.i, (SELECT count(*) FROM pg_roles WHERE oid = t.o OR rolname = t.n), \
     (SELECT count(*) FROM pg_stat_get_activity(NULL) WHERE usesysid = t.o), \
     (SELECT count(*) FROM pg_shdepend WHERE refclassid = 'pg_authid'::regclass AND refobjid = t.o), \
     (SELECT count(*) FROM pg_auth_members WHERE t.o IN (roleid, member, grantor)), \
     (SELECT count(*) FROM pg_db_role_setting WHERE setrole = t.o), \
     (SELECT count(*) FROM pg_prepared_xact() AS p(xid, gid, prepared, ownerid, dbid) WHERE p.ownerid = t.o), \
     pg_is_in_recovery() \
     FROM unnest($1::int4[], $2::oid[], $3::text[]) AS t(i, o, n)";

/// Step 7: the evidence (guarantee 5): every count is zero, by the saved OID, after two empty polls.
pub async fn prove(core: &Shared, conn: &Conn, endings: &mut [Ending]) -> Result<(), Fail> {
    let (mut at, mut oids, mut names): (Vec<i32>, Vec<Option<u32>>, Vec<String>) = (Vec::new(), Vec::new(), Vec::new());
    for (i, ending) in endings.iter().enumerate().filter(|(_, e)| e.is_open()) {
        let i = i32::try_from(i).unwrap_or(i32::MAX);
        let known: Vec<Option<u32>> = ending.oids().map(Some).collect();
        for oid in if known.is_empty() { vec![None] } else { known } {
            at.push(i);
            oids.push(oid);
            names.push(ending.name.clone());
        }
    }
    if at.is_empty() {
        return Ok(());
    }
    let rows = conn.ask(PROOF, &[&at, &oids, &names]).await?;
    const COUNTED: [&str; 6] =
        ["pg_roles", "sessions", "pg_shdepend", "pg_auth_members", "pg_db_role_setting", "prepared transactions"];
    for row in &rows {
        let Some(ending) = usize::try_from(row.get::<_, i32>(0)).ok().and_then(|i| endings.get_mut(i)) else {
            continue;
        };
        let counts: Vec<(&str, i64)> = COUNTED.iter().enumerate().map(|(i, what)| (*what, row.get(i + 1))).collect();
        if row.get(COUNTED.len() + 1) {
            // What a standby doesn't know (yet) may be live at the primary.
            ending.stuck =
                Some("this server is in recovery, so what it lacks proves nothing: set host to the primary".to_owned());
            continue;
        }
        let left: Vec<String> = counts.iter().filter(|(_, n)| *n != 0).map(|(what, n)| format!("{what} {n}")).collect();
        if !left.is_empty() {
            ending.stuck = Some(format!("something of it is left at the target: {}", left.join(", ")));
        }
    }
    let place = core.place();
    let standbys = core.plan.standbys.len();
    for ending in endings.iter_mut().filter(|e| e.is_open()) {
        let oids: Vec<String> = ending.oids().map(|oid| oid.to_string()).collect();
        ending.proof = match (oids.is_empty(), ending.quiet_for) {
            (true, _) => Some(format!(
                "{place}: looked for by name: no role {:?}; {}",
                ending.name,
                if ending.seen_live { "its OID was never recorded" } else { "it was never seen live" }
            )),
            (false, Some(quiet)) => Some(format!(
                "{place}: role {:?}, OID {}: {} all 0; no session, hidden ones included, in two polls {} ms apart{}",
                ending.name,
                oids.join(" and "),
                COUNTED.join(", "),
                quiet.as_millis(),
                if standbys == 0 { String::new() } else { format!(", nor on its {standbys} standbys") }
            )),
            (false, None) => None,
        };
        if ending.proof.is_none() {
            ending.stuck = Some("its sessions were not polled twice".to_owned());
        }
    }
    Ok(())
}

fn answer_for<'a>(out: &'a Value, name: &str) -> Option<&'a Value> {
    out.as_array()?.iter().find(|a| a["name"] == name)
}

fn error_text(error: &Value) -> String {
    let field = |name: &str| {
        error[name].as_str().unwrap_or("?").chars().filter(|c| !c.is_control()).take(300).collect::<String>()
    };
    format!("{}: {} (SQLSTATE {})", field("at"), field("message"), field("code"))
}
