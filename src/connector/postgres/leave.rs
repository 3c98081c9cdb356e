//! What a lease left in one database: dropped, never reassigned (a definer function or trigger would run with its
//! new owner's rights: regression D3), in batches if the lock table is too small, and said whose objects go with it.

use std::time::Duration;

use serde_json::json;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use super::alone::{Watched, watch};
use super::ending::Ending;
use super::fail::Fail;
use super::ident::Ident;
use super::op::Op;
use super::pool::{Conn, DROP_TIMEOUT};
use super::reach::make_way;
use super::shared::{EXCHANGE, Shared, TURN};

/// Objects dropped in one transaction, at first; halved while the lock table is full.
const BATCH: u32 = 500;
/// Fewer than this in one transaction help nobody.
const BATCH_MIN: u32 = 5;
/// One such statement, on this side.
const DROPPING: Duration = DROP_TIMEOUT.saturating_add(Duration::from_secs(1));

/// Objects of others that hang on what the role owns: relations, and triggers, rules, constraints on relations of others.
const DEPENDENTS: &str = "WITH RECURSIVE gone(classid, objid) AS ( \
       SELECT s.classid, s.objid FROM pg_shdepend s WHERE s.refclassid = 'pg_authid'::regclass AND s.refobjid = $1 \
          AND s.deptype = 'o' AND s.dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) \
     UNION SELECT x.classid, x.objid FROM gone g CROSS JOIN LATERAL ( \
         SELECT d.classid, d.objid FROM pg_depend d WHERE d.refclassid = g.classid AND d.refobjid = g.objid \
            AND d.deptype IN ('n', 'a', 'i') \
         UNION ALL SELECT 'pg_class'::regclass, r.ev_class FROM pg_rewrite r \
          WHERE g.classid = 'pg_rewrite'::regclass AND r.oid = g.objid AND r.rulename = '_RETURN') x) \
     SELECT left(pg_describe_object(g.classid, g.objid, 0) || ' of ' || quote_ident(o.rolname), 200) \
       FROM gone g JOIN LATERAL ( \
         SELECT c.relowner AS owner FROM pg_class c WHERE g.classid = 'pg_class'::regclass AND c.oid = g.objid \
                AND c.relkind IN ('r', 'v', 'm', 'p', 'f', 'S') \
         UNION ALL SELECT c.relowner FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid \
          WHERE g.classid = 'pg_trigger'::regclass AND t.oid = g.objid \
         UNION ALL SELECT c.relowner FROM pg_constraint t JOIN pg_class c ON c.oid = t.conrelid \
          WHERE g.classid = 'pg_constraint'::regclass AND t.oid = g.objid \
         UNION ALL SELECT p.proowner FROM pg_proc p WHERE g.classid = 'pg_proc'::regclass AND p.oid = g.objid) w ON true \
       JOIN pg_roles o ON o.oid = w.owner WHERE w.owner <> $1 LIMIT 1000";

/// Rights that somebody gave to the role and that DROP OWNED leaves, with who gave them: only as those can they be taken back.
const GIVEN: &str = "SELECT r.rolname::text, format('REVOKE ALL%s ON %s FROM %I CASCADE', a.part, a.what, $2::text) FROM ( \
       SELECT x.grantor, '' AS part, CASE c.relkind WHEN 'S' THEN 'SEQUENCE ' ELSE 'TABLE ' END || c.oid::regclass::text AS what \
         FROM pg_class c, aclexplode(c.relacl) x WHERE x.grantee = $1 \
       UNION SELECT x.grantor, format(' (%I)', t.attname), 'TABLE ' || t.attrelid::regclass::text \
         FROM pg_attribute t, aclexplode(t.attacl) x WHERE x.grantee = $1 \
       UNION SELECT x.grantor, '', 'ROUTINE ' || p.oid::regprocedure::text FROM pg_proc p, aclexplode(p.proacl) x WHERE x.grantee = $1 \
       UNION SELECT x.grantor, '', format('SCHEMA %I', n.nspname) FROM pg_namespace n, aclexplode(n.nspacl) x WHERE x.grantee = $1 \
       UNION SELECT x.grantor, '', format('TYPE %s', t.oid::regtype) FROM pg_type t, aclexplode(t.typacl) x WHERE x.grantee = $1 \
       UNION SELECT x.grantor, '', format('DATABASE %I', d.datname) FROM pg_database d, aclexplode(d.datacl) x WHERE x.grantee = $1 \
     ) a JOIN pg_roles r ON r.oid = a.grantor LIMIT 1000";

/// Drops what the role owns in the database of this session, and takes back what it was given there.
pub async fn drop_owned(
    core: &Shared,
    conn: &Conn,
    ending: &mut Ending,
    role: &Ident,
    oid: u32,
    database: &str,
) -> Result<(), Fail> {
    conn.exchange(
        EXCHANGE,
        conn.client.batch_execute(&format!("SET statement_timeout = {}", DROP_TIMEOUT.as_millis())),
    )
    .await?;
    let dependents = conn.exchange(DROPPING, conn.client.query_typed(DEPENDENTS, &[(&oid, Type::OID)])).await?;
    ending.tally.others.extend(dependents.iter().map(|row| format!("{database}: {}", row.get::<_, String>(0))));
    let owned = count_owned(conn, oid).await?;
    if owned > 0 {
        ending.tally.owned_in.insert(database.to_owned());
    }
    let drop_owned = format!("DROP OWNED BY {role} CASCADE");
    let mut batch = BATCH;
    loop {
        let mut watched = Watched::default();
        let work = conn.exchange(DROPPING, conn.client.batch_execute(&drop_owned));
        let done = watch(core, conn.pid, &mut watched, work).await;
        watched.tell(ending);
        match done {
            Ok(()) => break,
            Err(e) if e.code() == Some(&SqlState::OUT_OF_MEMORY) || e.code() == Some(&SqlState::QUERY_CANCELED) => {
                if ending.way.is_none() {
                    let groups: Vec<&str> = core.plan.all_groups().iter().map(|g| g.as_str()).collect();
                    let home = core.ends.get(TURN).await?;
                    // DROP resolves names with the rights of who runs it. Whatever ends this, its caller drops the way again.
                    ending.way = Some(make_way(core, &home, &groups).await?);
                }
                if !shed(core, conn, ending, &mut batch).await? {
                    return Err(e);
                }
            }
            Err(e) => return Err(e),
        }
    }
    ending.tally.owned += owned.saturating_sub(count_owned(conn, oid).await?);
    take_back(conn, role, oid).await
}

/// Drops batches until nothing more can be dropped one by one. False if there was nothing to drop.
async fn shed(core: &Shared, conn: &Conn, ending: &mut Ending, batch: &mut u32) -> Result<bool, Fail> {
    let mut any = false;
    loop {
        let mut watched = Watched::default();
        let input = json!({ "name": ending.name, "max": *batch });
        let work = Op::Shed.run(core.plan.setup, conn, &input, DROPPING);
        let dropped = watch(core, conn.pid, &mut watched, work).await;
        watched.tell(ending);
        match dropped {
            Ok(dropped) if dropped.as_u64() == Some(0) => return Ok(any),
            Ok(_) => any = true,
            Err(e) if e.code() == Some(&SqlState::OUT_OF_MEMORY) && *batch > BATCH_MIN => *batch /= 2,
            Err(e) => return Err(e),
        }
    }
}

async fn count_owned(conn: &Conn, oid: u32) -> Result<u64, Fail> {
    const OWNED: &str = "SELECT count(*) FROM pg_shdepend WHERE refclassid = 'pg_authid'::regclass AND refobjid = $1 \
         AND deptype = 'o' AND dbid = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())";
    let row = conn.exchange(EXCHANGE, conn.client.query_typed_one(OWNED, &[(&oid, Type::OID)])).await?;
    Ok(u64::try_from(row.get::<_, i64>(0)).unwrap_or(0))
}

/// Grants by another grantor than the owner: taken back as that grantor, if that is a role of ours.
async fn take_back(conn: &Conn, role: &Ident, oid: u32) -> Result<(), Fail> {
    let name = role.as_str();
    let rows =
        conn.exchange(EXCHANGE, conn.client.query_typed(GIVEN, &[(&oid, Type::OID), (&name, Type::TEXT)])).await?;
    for row in &rows {
        let (grantor, revoke): (String, String) = (row.get(0), row.get(1));
        let Ok(by) = Ident::new(&grantor) else { continue };
        let work = format!("BEGIN; SET LOCAL ROLE {by}; {revoke}; COMMIT");
        if let Err(e) = conn.exchange(EXCHANGE, conn.client.batch_execute(&work)).await {
            if conn.exchange(EXCHANGE, conn.client.batch_execute("ROLLBACK")).await.is_err() {
                conn.discard();
            }
            return Err(match e {
                Fail::Refused { code, message } => Fail::Refused {
                    code,
                    message: format!(
                        "{message}. The role {grantor:?} gave the lease a right that only it can take back: as it, run {revoke}"
                    ),
                },
                e => e,
            });
        }
    }
    Ok(())
}
