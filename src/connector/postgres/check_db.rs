//! What the databases of a live target lack: who may connect, what leases could fill the lock table with, and whether
//! the groups give what the catalogue says and no more.

use std::collections::BTreeSet;

use tokio_postgres::types::{ToSql, Type};

use super::check::gap;
use super::fail::Fail;
use super::ident::Ident;
use super::pool::Conn;
use super::shared::{EXCHANGE, Shared};
use crate::connector::Gap;

/// Objects that are named in one gap; more are counted.
const NAMED_MAX: usize = 5;

/// Looks at who may connect where. Gives the databases to look into: those where leases can be and the broker too.
pub async fn cluster(core: &Shared, conn: &Conn, gaps: &mut Vec<Gap>) -> Result<BTreeSet<String>, Fail> {
    const ASK: &str = "SELECT d.datname::text, quote_ident(d.datname), \
         EXISTS (SELECT FROM aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a WHERE a.grantee = 0 AND a.privilege_type = 'CONNECT'), \
         EXISTS (SELECT FROM aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a WHERE a.grantee = 0 AND a.privilege_type = 'TEMPORARY'), \
         EXISTS (SELECT FROM aclexplode(d.datacl) a JOIN pg_roles r ON r.oid = a.grantee AND r.rolname = $1 WHERE a.privilege_type = 'CONNECT'), \
         has_database_privilege(d.oid, 'CONNECT') FROM pg_database d WHERE d.datallowconn";
    let group = core.plan.connection_group.as_str();
    let rows = conn.exchange(EXCHANGE, conn.client.query_typed(ASK, &[(&group, Type::TEXT)])).await?;
    let meant: BTreeSet<&str> = core.plan.databases().iter().map(|d| d.as_str()).collect();
    let mut there = BTreeSet::new();
    let (user, connection_group) = (&core.plan.user, &core.plan.connection_group);
    for row in &rows {
        let (name, quoted): (&str, &str) = (row.get(0), row.get(1));
        let (public, temporary, by_group, broker): (bool, bool, bool, bool) =
            (row.get(2), row.get(3), row.get(4), row.get(5));
        there.insert(name.to_owned());
        if public {
            gaps.push(gap(
                format!("PUBLIC may connect to database {name:?}"),
                "every lease can log in there, whatever was approved, and taking it out of the connection group doesn't stop that",
                format!("REVOKE CONNECT, TEMPORARY ON DATABASE {quoted} FROM PUBLIC"),
                false,
            ));
        } else if temporary {
            gaps.push(gap(
                format!("PUBLIC may make temporary tables in database {name:?}"),
                "a lease fills the lock table with them",
                format!("REVOKE TEMPORARY ON DATABASE {quoted} FROM PUBLIC"),
                false,
            ));
        }
        if meant.contains(name) && !by_group && !public {
            gaps.push(gap(
                format!("the connection group may not connect to database {name:?}"),
                "credentials for it don't work",
                format!("GRANT CONNECT ON DATABASE {quoted} TO {connection_group}"),
                true,
            ));
        }
        if !broker && (public || by_group) {
            gaps.push(gap(
                format!("the broker may not connect to database {name:?}"),
                "what a lease leaves there can't be dropped, so its end can't be proven",
                format!("GRANT CONNECT ON DATABASE {quoted} TO {user}"),
                meant.contains(name),
            ));
        }
        if !broker || !(public || by_group) {
            there.remove(name);
        }
    }
    for missing in meant.iter().filter(|name| !rows.iter().any(|row| row.get::<_, &str>(0) == **name)) {
        gaps.push(gap(
            format!("the database {missing:?} does not exist"),
            "credentials for it don't work",
            "correct the resource's database, or create it",
            true,
        ));
    }
    Ok(there)
}

/// Looks into one database.
pub async fn database(core: &Shared, conn: &Conn, database: &str, gaps: &mut Vec<Gap>) -> Result<(), Fail> {
    let groups: Vec<&str> = core.plan.all_groups().iter().map(|g| g.as_str()).collect();
    functions(conn, database, gaps).await?;
    objects(conn, database, &groups, gaps).await?;
    let resources = core.plan.resources.iter().filter(|(_, r)| r.by_tables && r.database.as_str() == database);
    for (name, resource) in resources {
        let tables: BTreeSet<(&str, &Ident)> = resource
            .actions
            .values()
            .flat_map(|a| a.tables.iter().flat_map(|(table, groups)| groups.iter().map(move |g| (table.as_str(), g))))
            .collect();
        for (table, group) in tables {
            table_group(conn, database, name.as_str(), table, group, gaps).await?;
        }
    }
    Ok(())
}

async fn names(conn: &Conn, ask: &str, params: &[(&(dyn ToSql + Sync), Type)]) -> Result<Vec<String>, Fail> {
    let rows = conn.exchange(EXCHANGE, conn.client.query_typed(ask, params)).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

fn some_of(names: &[String]) -> String {
    let more = names.len().saturating_sub(NAMED_MAX);
    let shown = names.iter().take(NAMED_MAX).map(String::as_str).collect::<Vec<_>>().join(", ");
    if more == 0 { shown } else { format!("{shown} and {more} more") }
}

/// Advisory locks and large objects are open to everybody unless somebody closes them.
async fn functions(conn: &Conn, database: &str, gaps: &mut Vec<Gap>) -> Result<(), Fail> {
    const ASK: &str = "SELECT p.oid::regprocedure::text FROM pg_proc p WHERE p.pronamespace = 'pg_catalog'::regnamespace \
         AND (p.proname ~ '^pg_(try_)?advisory_(xact_)?lock(_shared)?$' OR p.proname IN ('lo_create', 'lo_creat', 'lo_from_bytea', 'lo_put')) \
         AND has_function_privilege('public', p.oid, 'EXECUTE') ORDER BY 1";
    let open = names(conn, ASK, &[]).await?;
    if !open.is_empty() {
        gaps.push(gap(
            format!("in database {database:?} PUBLIC may call {}", some_of(&open)),
            "a lease fills the server's lock table: for everybody else nothing works until its sessions are cut",
            open.iter().map(|f| format!("REVOKE EXECUTE ON FUNCTION {f} FROM PUBLIC;")).collect::<Vec<_>>().join(" "),
            false,
        ));
    }
    Ok(())
}

async fn objects(conn: &Conn, database: &str, groups: &[&str], gaps: &mut Vec<Gap>) -> Result<(), Fail> {
    const WHO: &str = "JOIN LATERAL (SELECT coalesce(r.rolname, 'PUBLIC') AS who FROM (SELECT 1) one LEFT JOIN pg_roles r ON r.oid = a.grantee \
         WHERE a.grantee = 0 OR r.rolname = ANY($1)) w ON true";
    let creates = format!(
        "SELECT format('REVOKE CREATE ON SCHEMA %I FROM %s;', n.nspname, CASE w.who WHEN 'PUBLIC' THEN w.who ELSE quote_ident(w.who) END) \
         FROM pg_namespace n CROSS JOIN LATERAL aclexplode(n.nspacl) a {WHO} WHERE a.privilege_type = 'CREATE' \
         UNION SELECT format('REVOKE CREATE ON DATABASE %I FROM %s;', d.datname, CASE w.who WHEN 'PUBLIC' THEN w.who ELSE quote_ident(w.who) END) \
         FROM pg_database d CROSS JOIN LATERAL aclexplode(d.datacl) a {WHO} WHERE a.privilege_type = 'CREATE' AND d.datname = current_database()"
    );
    let creates = names(conn, &creates, &[(&groups, Type::TEXT_ARRAY)]).await?;
    if !creates.is_empty() {
        gaps.push(gap(
            format!("leases may create objects in database {database:?} ({} grants)", creates.len()),
            "they fill the lock table, and others' views and triggers that hang on them go when they are dropped; \
             what has to stay needs a declared owner",
            creates.join(" "),
            false,
        ));
    }
    let options = format!(
        "SELECT DISTINCT format('%s.%s to %s', c.relnamespace::regnamespace, quote_ident(c.relname), quote_ident(w.who)) FROM pg_class c \
         CROSS JOIN LATERAL aclexplode(c.relacl) a {WHO} WHERE a.is_grantable"
    );
    let options = names(conn, &options, &[(&groups, Type::TEXT_ARRAY)]).await?;
    if !options.is_empty() {
        gaps.push(gap(
            format!("in database {database:?} groups hold rights WITH GRANT OPTION: {}", some_of(&options)),
            "a lease passes them on to others, and what it passed on is not taken back by its end",
            "REVOKE GRANT OPTION FOR ALL ON each of them FROM the group CASCADE",
            false,
        ));
    }
    const PUBLIC: &str = "SELECT c.oid::regclass::text FROM pg_class c WHERE c.relkind IN ('r', 'v', 'm', 'p', 'f') \
         AND c.relnamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace) \
         AND EXISTS (SELECT FROM aclexplode(c.relacl) a WHERE a.grantee = 0) ORDER BY 1";
    let public = names(conn, PUBLIC, &[]).await?;
    if !public.is_empty() {
        gaps.push(gap(
            format!("in database {database:?} PUBLIC has rights on {}", some_of(&public)),
            "every lease that may connect has them too, whatever was approved",
            public.iter().map(|t| format!("REVOKE ALL ON TABLE {t} FROM PUBLIC;")).collect::<Vec<_>>().join(" "),
            false,
        ));
    }
    Ok(())
}

/// A group that stands for one table must give that table and nothing else, or the constraint `tables` bounds nothing.
async fn table_group(
    conn: &Conn,
    database: &str,
    resource: &str,
    table: &str,
    group: &Ident,
    gaps: &mut Vec<Gap>,
) -> Result<(), Fail> {
    const BEYOND: &str = "SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
           WHERE c.relkind <> 'S' AND $2 NOT IN (c.relname, n.nspname || '.' || c.relname) AND ( \
             EXISTS (SELECT FROM aclexplode(c.relacl) a JOIN pg_roles r ON r.oid = a.grantee WHERE r.rolname = $1) \
             OR EXISTS (SELECT FROM pg_attribute t, aclexplode(t.attacl) a JOIN pg_roles r ON r.oid = a.grantee \
                         WHERE t.attrelid = c.oid AND r.rolname = $1)) \
         UNION SELECT 'the role ' || quote_ident(g.rolname) FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid \
           JOIN pg_roles r ON r.oid = m.member WHERE r.rolname = $1 ORDER BY 1";
    let name = group.as_str();
    let beyond = names(conn, BEYOND, &[(&name, Type::TEXT), (&table, Type::TEXT)]).await?;
    if !beyond.is_empty() {
        gaps.push(gap(
            format!("in database {database:?} the group {name:?}, which stands for table {table:?} of {resource}, also gives {}", some_of(&beyond)),
            "a request for that table alone gets more than was approved",
            format!("REVOKE ALL ON {} FROM {group}", some_of(&beyond)),
            true,
        ));
    }
    Ok(())
}
