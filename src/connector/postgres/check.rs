//! What a live target lacks (`config check --live`): the broker's rights, the groups, the cluster. Databases: `check_db.rs`.
//! Each gap says what it allows and the exact statement that closes it.

use std::collections::BTreeSet;

use serde_json::json;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use super::fail::Fail;
use super::ident::{Ident, Literal};
use super::op::Op;
use super::pool::Conn;
use super::settings::Setup;
use super::shared::{EXCHANGE, Shared, TURN};
use super::{check_db, mint, scram};
use crate::connector::Gap;

/// The oldest major version that has what the statements use.
const VERSION_MIN: i32 = 140_000;
/// From here on memberships work differently; the statements differ and were tried less.
const VERSION_NEW: i32 = 160_000;

/// One gap.
pub fn gap(what: impl Into<String>, allows: impl Into<String>, fix: impl Into<String>, fatal: bool) -> Gap {
    Gap { what: what.into(), allows: allows.into(), fix: fix.into(), fatal }
}

/// Looks at everything.
pub async fn check(core: &Shared) -> Result<Vec<Gap>, Fail> {
    let conn = core.ends.get(TURN).await?;
    let mut gaps = Vec::new();
    broker(core, &conn, &mut gaps).await?;
    if core.plan.setup == Setup::Functions {
        functions(&conn, &mut gaps).await?;
    }
    groups(core, &conn, &mut gaps).await?;
    mints(core, &conn, &mut gaps).await?;
    let reachable = check_db::cluster(core, &conn, &mut gaps).await?;
    for database in reachable {
        match core.elsewhere(&core.plan.primary, &database).await {
            Ok(there) => check_db::database(core, &there, &database, &mut gaps).await?,
            Err(e) => gaps.push(gap(
                format!("the broker can't log in to database {database:?}: {e}"),
                "what a lease leaves there can't be dropped, so its end can't be proven",
                format!("let {} connect there in pg_hba.conf", core.plan.user),
                false,
            )),
        }
    }
    standbys(core, &mut gaps).await;
    Ok(gaps)
}

async fn broker(core: &Shared, conn: &Conn, gaps: &mut Vec<Gap>) -> Result<(), Fail> {
    const ASK: &str = "SELECT rolsuper, rolcreaterole, rolcreatedb OR rolreplication OR rolbypassrls, \
         current_setting('server_version_num')::int4, current_setting('max_prepared_transactions')::int4, \
         EXISTS (SELECT FROM pg_language WHERE lanname = 'plpgsql' AND has_language_privilege(oid, 'USAGE')) \
         FROM pg_roles WHERE rolname = session_user";
    let row = conn.exchange(EXCHANGE, conn.client.query_typed_one(ASK, &[])).await?;
    let user = &core.plan.user;
    let direct = core.plan.setup == Setup::Direct;
    let (superuser, createrole, more): (bool, bool, bool) = (row.get(0), row.get(1), row.get(2));
    let (version, prepared, plpgsql): (i32, i32, bool) = (row.get(3), row.get(4), row.get(5));
    if superuser {
        gaps.push(gap(
            "the broker's login is a superuser",
            "whoever takes over the broker owns the cluster and the machine's account",
            format!(
                "ALTER ROLE {user} NOSUPERUSER; and run config/postgres/10-broker-direct.sql or 11-broker-functions.sql"
            ),
            true,
        ));
    }
    if more {
        gaps.push(gap(
            "the broker's login has CREATEDB, REPLICATION or BYPASSRLS",
            "whoever takes over the broker reads and copies more than it needs",
            format!("ALTER ROLE {user} NOCREATEDB NOREPLICATION NOBYPASSRLS"),
            false,
        ));
    }
    match (direct, createrole) {
        (true, false) if !superuser => gaps.push(gap(
            "the broker's login can't make roles",
            "nothing can be minted",
            format!("ALTER ROLE {user} CREATEROLE; or setup = \"functions\" with config/postgres/11-broker-functions.sql"),
            true,
        )),
        (true, true) if version < VERSION_NEW => gaps.push(gap(
            "the broker's login has CREATEROLE, which is nearly superuser on PostgreSQL 15",
            "whoever takes over the broker can grant itself any role that is no superuser, pg_execute_server_program among them",
            "run config/postgres/11-broker-functions.sql and set setup = \"functions\"",
            false,
        )),
        (false, true) => gaps.push(gap(
            "the broker's login has CREATEROLE although setup = \"functions\"",
            "it can make any role, and the functions' limits bound nothing",
            format!("ALTER ROLE {user} NOCREATEROLE"),
            false,
        )),
        _ => {}
    }
    if version < VERSION_MIN {
        gaps.push(gap("PostgreSQL is older than 14", "the statements don't exist there", "upgrade the server", true));
    }
    if !plpgsql {
        gaps.push(gap(
            "the broker may not use plpgsql in its database",
            "nothing can be minted or ended",
            format!("GRANT USAGE ON LANGUAGE plpgsql TO {user}"),
            true,
        ));
    }
    if prepared > 0 {
        gaps.push(gap(
            format!("max_prepared_transactions is {prepared}"),
            "a lease's prepared transaction outlives its sessions and holds its locks until the broker rolls it back; \
             one of another lease can delay an end until that lease ends too",
            "ALTER SYSTEM SET max_prepared_transactions = 0; then restart",
            false,
        ));
    }
    Ok(())
}

async fn functions(conn: &Conn, gaps: &mut Vec<Gap>) -> Result<(), Fail> {
    const ASK: &str = "SELECT p.proname::text, p.prosrc, p.prosecdef AND has_function_privilege(p.oid, 'EXECUTE') \
           AND has_schema_privilege(p.pronamespace, 'USAGE'), \
           EXISTS (SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a WHERE a.grantee = 0) \
         FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = 'countersign'";
    let rows = conn.exchange(EXCHANGE, conn.client.query_typed(ASK, &[])).await?;
    let fix = "run config/postgres/11-broker-functions.sql of this release in the broker's database";
    for op in Op::ALL.into_iter().filter(|op| op.needs_rights()) {
        let what = format!("countersign.{}(jsonb)", op.name());
        match rows.iter().find(|row| row.get::<_, &str>(0) == op.name()) {
            None => gaps.push(gap(format!("{what} is missing"), "leases can't be minted or ended", fix, true)),
            Some(row) => {
                let (source, usable, public): (&str, bool, bool) = (row.get(1), row.get(2), row.get(3));
                if !usable {
                    gaps.push(gap(
                        format!("the broker may not call {what}"),
                        "leases can't be minted or ended",
                        fix,
                        true,
                    ));
                }
                if !source.contains(op.body()) {
                    gaps.push(gap(
                        format!("{what} is of another release"),
                        "its answers may not mean what the broker reads in them",
                        fix,
                        true,
                    ));
                }
                if public {
                    gaps.push(gap(
                        format!("PUBLIC may call {what}"),
                        "any login, leases among them, makes and drops leases",
                        format!("REVOKE ALL ON FUNCTION {what} FROM PUBLIC"),
                        true,
                    ));
                }
            }
        }
    }
    Ok(())
}

async fn groups(core: &Shared, conn: &Conn, gaps: &mut Vec<Gap>) -> Result<(), Fail> {
    const ASK: &str = "SELECT g, quote_ident(g), r.oid IS NULL, coalesce(r.rolcanlogin, false), \
         coalesce(r.rolsuper OR r.rolcreaterole OR r.rolcreatedb OR r.rolreplication OR r.rolbypassrls, false), \
         (SELECT count(*) FROM pg_shdepend s WHERE s.refclassid = 'pg_authid'::regclass AND s.refobjid = r.oid AND s.deptype = 'o') \
         FROM unnest($1::text[]) AS g LEFT JOIN pg_roles r ON r.rolname = g";
    let all: BTreeSet<&Ident> = core.plan.all_groups().into_iter().chain([&core.plan.connection_group]).collect();
    let names: Vec<&str> = all.iter().map(|g| g.as_str()).collect();
    let rows = conn.exchange(EXCHANGE, conn.client.query_typed(ASK, &[(&names, Type::TEXT_ARRAY)])).await?;
    for row in &rows {
        let (name, quoted): (&str, &str) = (row.get(0), row.get(1));
        let (missing, login, powerful, owned): (bool, bool, bool, i64) =
            (row.get(2), row.get(3), row.get(4), row.get(5));
        if missing {
            gaps.push(gap(
                format!("the group {name:?} does not exist"),
                "whatever needs it can't be minted",
                format!("CREATE ROLE {quoted} NOLOGIN; and grant it what the action needs"),
                true,
            ));
        }
        if login || powerful {
            gaps.push(gap(
                format!("the group {name:?} can log in, or has rights over roles, databases or the server"),
                "a lease may SET ROLE to it; the broker refuses to mint with it",
                format!("ALTER ROLE {quoted} NOLOGIN NOSUPERUSER NOCREATEROLE NOCREATEDB NOREPLICATION NOBYPASSRLS"),
                true,
            ));
        }
        if owned > 0 {
            gaps.push(gap(
                format!("the group {name:?} owns {owned} objects"),
                "a lease alters and drops them, and leaves triggers on them that outlive it",
                format!("REASSIGN OWNED BY {quoted} TO their real owner, in each database"),
                false,
            ));
        }
    }
    Ok(())
}

/// Mints for each action and takes it back: what only the target knows (the functions' limits, rights over a group) shows here.
async fn mints(core: &Shared, conn: &Conn, gaps: &mut Vec<Gap>) -> Result<(), Fail> {
    let drawn = |e: scram::NoRandomness| Fail::Lost(e.to_string());
    let verifier =
        scram::draw_password().and_then(|p| scram::verifier(&p, core.plan.scram_iterations)).map_err(drawn)?;
    let mut tried = BTreeSet::new();
    for (resource, plan) in &core.plan.resources {
        for (name, action) in &plan.actions {
            let given = action.groups.iter().chain(action.tables.values().flatten());
            let groups: BTreeSet<&str> = given.chain([&core.plan.connection_group]).map(Ident::as_str).collect();
            if !tried.insert(groups.clone()) {
                continue;
            }
            let input = json!({
                "name": mint::draw_lease(&core.plan.prefix).map_err(drawn)?, "verifier": verifier, "lifetime_secs": 60,
                "connection_limit": core.plan.connection_limit, "groups": groups,
            });
            conn.exchange(EXCHANGE, conn.client.batch_execute("BEGIN")).await?;
            let minted = Op::Mint.run(core.plan.setup, conn, &input, EXCHANGE).await;
            conn.exchange(EXCHANGE, conn.client.batch_execute("ROLLBACK")).await?;
            match minted {
                Ok(_) => {}
                Err(e @ Fail::Refused { .. }) => gaps.push(gap(
                    format!("the target refuses to mint {name} of {resource} (groups {groups:?}): {e}"),
                    "it can be asked for and approved, and no credential comes out",
                    mint_fix(core, &e, &groups),
                    true,
                )),
                Err(e) => return Err(e),
            }
        }
    }
    Ok(())
}

/// What helps against a refusal, by its code. Those that begin with CS are the functions' own.
fn mint_fix(core: &Shared, refusal: &Fail, groups: &BTreeSet<&str>) -> String {
    let quoted = |quote: fn(&str) -> String| groups.iter().map(|g| quote(g)).collect::<Vec<_>>();
    match refusal.code().map(SqlState::code) {
        Some("CS004") => format!("UPDATE countersign.setting SET prefix = {}", Literal(&core.plan.prefix)),
        Some("CS005") => format!(
            "INSERT INTO countersign.allowed_group VALUES {} ON CONFLICT DO NOTHING",
            quoted(|g| format!("({})", Literal(g))).join(", ")
        ),
        Some("CS006") => {
            "raise connections_max in countersign.setting, or lower the target's connection_limit".to_owned()
        }
        Some("42501") => format!(
            "PostgreSQL 16 and later: GRANT {} TO {} WITH ADMIN TRUE, INHERIT FALSE, SET FALSE",
            quoted(|g| Ident::new(g).map(|g| g.to_string()).unwrap_or_default()).join(", "),
            if core.plan.setup == Setup::Functions {
                "countersign_owner".to_owned()
            } else {
                core.plan.user.to_string()
            },
        ),
        _ => "correct the groups that the action names in the catalogue, or what is wrong with them at the target"
            .to_owned(),
    }
}

async fn standbys(core: &Shared, gaps: &mut Vec<Gap>) {
    for standby in &core.plan.standbys {
        let place = format!("{}:{}", standby.host, standby.port);
        let looked = async {
            let conn = core.elsewhere(standby, core.plan.home.as_str()).await?;
            let row = conn.exchange(EXCHANGE, conn.client.query_typed_one("SELECT pg_is_in_recovery()", &[])).await?;
            Ok::<bool, Fail>(row.get(0))
        };
        let what = match looked.await {
            Ok(true) => continue,
            Ok(false) => format!("{place} is listed as a standby and is none"),
            Err(e) => format!("the standby {place} can't be asked: {e}"),
        };
        let allows = "sessions there can't be ended, so no lease of this target can be proven gone";
        gaps.push(gap(what, allows, "bring it back, or take it out of the target's standbys", false));
    }
}
