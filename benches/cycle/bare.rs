//! The very statements of a lease's life, sent bare over tokio-postgres: no broker, no record, no shared statements.
//! The same login and the same session are in the cycle, so that what is compared is the same work at the target.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio_postgres::{Client, SimpleQueryMessage};

use crate::Outcome;
use crate::figures::{load_average, round};
use crate::w1::Stop;
use crate::w2::{BROKER, DATABASE, Parts, Session, Target};

/// Two polls that find nothing lie at least so far apart.
const APART: Duration = Duration::from_millis(10);
/// A statement that met another one on the same row is sent again, as any client would.
const TRIES: usize = 20;
const PASSWORD: &str = "bare-bench-password";

/// So many sessions at once, each with one role after the other.
pub async fn run(target: &Target, agents: usize, session: Session, stop: Stop) -> Outcome<Value> {
    // One verifier for all, made by the server once: computing them is not what is compared.
    let admin = target.cluster.admin("postgres").await;
    admin.batch_execute(&format!("CREATE ROLE bare_model LOGIN PASSWORD '{PASSWORD}'")).await?;
    let verifier: String =
        admin.query_one("SELECT rolpassword FROM pg_authid WHERE rolname = 'bare_model'", &[]).await?.get(0);
    admin.batch_execute("DROP ROLE bare_model").await?;
    let mut sessions = Vec::with_capacity(agents);
    for _ in 0..agents {
        let client = target.cluster.login(BROKER, target.password(), DATABASE).await?;
        client.batch_execute("SET search_path = pg_catalog, pg_temp; SET lock_timeout = '200ms'").await?;
        sessions.push(client);
    }
    let began = Instant::now();
    let running = sessions.iter().enumerate().map(|(agent, client)| {
        let verifier = &verifier;
        async move {
            let mut parts = Parts::default();
            while !stop.reached(parts.cycles, began) {
                let name = format!("bare_{agent}_{}_{}", parts.cycles, began.elapsed().as_nanos());
                one(target, client, &name, verifier, session, &mut parts).await?;
                parts.cycles += 1;
            }
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(parts)
        }
    });
    let mut all = Parts::default();
    for one in futures::future::join_all(running).await {
        all.join(one?);
    }
    let secs = began.elapsed().as_secs_f64();
    let mut out = serde_json::Map::new();
    #[allow(clippy::cast_precision_loss)] // a count
    let rate = round(all.cycles as f64 / secs);
    for (name, value) in [
        ("agents", json!(agents)),
        ("session", json!(format!("{session:?}").to_lowercase())),
        ("cycles", json!(all.cycles)),
        ("rate_per_sec", json!(rate)),
        ("sent_again", json!(all.retries)),
        ("load_average", json!(load_average()?)),
    ] {
        out.insert(name.to_owned(), value);
    }
    all.figures(session, &mut out);
    Ok(Value::Object(out))
}

/// Sends it, again if it met another one.
async fn send(client: &Client, sql: &str, parts: &mut Parts) -> Outcome<Vec<SimpleQueryMessage>> {
    let mut tries = 0;
    loop {
        match client.simple_query(sql).await {
            Ok(answer) => return Ok(answer),
            Err(error) => {
                tries += 1;
                parts.retries += 1;
                if tries == TRIES {
                    return Err(error.into());
                }
                let _ = client.simple_query("ROLLBACK").await; // out of a transaction, if it was in one
            }
        }
    }
}

fn rows(answer: &[SimpleQueryMessage]) -> usize {
    answer.iter().filter(|m| matches!(m, SimpleQueryMessage::Row(_))).count()
}

async fn one(
    target: &Target,
    client: &Client,
    name: &str,
    verifier: &str,
    session: Session,
    parts: &mut Parts,
) -> Outcome<()> {
    let t0 = Instant::now();
    let create = format!(
        "CREATE ROLE {name} LOGIN PASSWORD '{verifier}' VALID UNTIL 'infinity' CONNECTION LIMIT 5 \
         IN ROLE app_read, lease_conn ROLE {BROKER}"
    );
    send(client, &create, parts).await?;
    let oid = send(client, &format!("SELECT oid FROM pg_roles WHERE rolname = '{name}'"), parts).await?;
    let oid = oid.iter().find_map(|m| match m {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    });
    let oid = oid.ok_or("no OID")?;
    let usable = Instant::now();
    let (mine, open) = target.use_it(name, PASSWORD).await?;
    let used = Instant::now();
    let watch = match session {
        Session::Open => Some(tokio::spawn(async move {
            let _ = open.await;
            drop(mine);
            Instant::now()
        })),
        Session::Closed => {
            drop(mine);
            open.await?;
            None
        }
    };
    let completed = Instant::now();
    send(client, &format!("REVOKE app_read, lease_conn FROM {name}"), parts).await?;
    let alter = format!("ALTER ROLE {name} NOLOGIN PASSWORD NULL CONNECTION LIMIT 0 VALID UNTIL '-infinity'");
    send(client, &alter, parts).await?;
    let mut empty_since: Option<Instant> = None;
    loop {
        send(client, HIDDEN, parts).await?;
        send(client, "SELECT pid, usesysid FROM pg_stat_get_activity(NULL)", parts).await?;
        let kill = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_get_activity(NULL) WHERE usesysid = {oid}");
        let at = Instant::now();
        if rows(&send(client, &kill, parts).await?) > 0 {
            empty_since = None;
            tokio::time::sleep(Duration::from_millis(1)).await;
            continue;
        }
        let since = *empty_since.get_or_insert(at);
        if at - since >= APART {
            break;
        }
        tokio::time::sleep(APART).await;
    }
    send(client, &format!("DROP OWNED BY {name} CASCADE"), parts).await?;
    send(client, &format!("BEGIN; DROP OWNED BY {name} CASCADE; DROP ROLE {name}; COMMIT"), parts).await?;
    let proof = PROOF.replace("@OID@", &oid).replace("@NAME@", name);
    let proof = send(client, &proof, parts).await?;
    let all_zero = proof.iter().any(|m| match m {
        SimpleQueryMessage::Row(row) => (0..row.len()).all(|i| row.get(i) == Some("0")),
        _ => false,
    });
    if !all_zero {
        return Err("something is left of a bare role".into());
    }
    let ended = Instant::now();
    if let Some(watch) = watch {
        parts.cut.add(watch.await? - completed);
    }
    parts.usable.add(usable - t0);
    parts.login.add(used - usable);
    parts.evidence.add(ended - completed);
    parts.cycle.add(ended - t0);
    Ok(())
}

const HIDDEN: &str = "SELECT DISTINCT pid FROM pg_locks WHERE locktype='object' AND classid='pg_database'::regclass \
     AND mode='RowExclusiveLock'";
const PROOF: &str = "SELECT (SELECT count(*) FROM pg_roles WHERE oid=@OID@ OR rolname='@NAME@'), \
     (SELECT count(*) FROM pg_stat_activity WHERE usesysid=@OID@), \
     (SELECT count(*) FROM pg_shdepend WHERE refclassid='pg_authid'::regclass AND refobjid=@OID@), \
     (SELECT count(*) FROM pg_auth_members WHERE @OID@ IN (roleid,member,grantor)), \
     (SELECT count(*) FROM pg_db_role_setting WHERE setrole=@OID@), \
     (SELECT count(*) FROM pg_prepared_xacts WHERE owner IS NULL OR owner='@NAME@')";
