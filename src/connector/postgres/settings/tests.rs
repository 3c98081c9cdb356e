//! What a catalogue may say about PostgreSQL, and every refusal.

use std::path::Path;

use super::*;
use crate::core::id::ConstraintName;

const TARGET: &str = "host = '127.0.0.1'\nuser = 'broker'\nsslmode = 'disable'\nconnection_group = 'lease_conn'\n";
const RESOURCE: &str = r#"
    name = "postgres/app"
    target = "db"
    title = "app"
    environment = "test"
    sensitivity = "none"
"#;
const PLAIN: &str = "settings = { database = 'app' }\n\
    action = [{ name = 'read', effect = 'read', settings = { groups = ['app_read', 'app_usage'] } }]\n";
const TABLES: &str = "settings = { database = 'app' }\n\
    constraint = { tables = { kind = 'set', values = ['a', 'b'] } }\n";

fn plan(target: &str, resource: &str) -> Result<Plan, Vec<String>> {
    let target = Target {
        name: ResourceName::new("db").unwrap(),
        kind: "postgres".to_owned(),
        settings: target.parse().unwrap(),
    };
    let resource: Resource = toml::from_str(&format!("{RESOURCE}{resource}")).unwrap();
    Plan::new(&target, &[&resource], Path::new("/nowhere"), "cs_")
        .map_err(|problems| problems.into_iter().map(|p| format!("{}: {}", p.place, p.what)).collect())
}

fn refused(target: &str, resource: &str, says: &str) {
    match plan(target, resource) {
        Ok(_) => panic!("accepted; expected {says}"),
        Err(problems) => assert!(problems.iter().any(|p| p.contains(says)), "{says}: {problems:#?}"),
    }
}

fn asked(actions: &[&str], tables: Option<&[&str]>) -> Permission {
    let set = |t: &[&str]| Constraint::Set(t.iter().map(|t| (*t).to_owned()).collect());
    Permission {
        resource: ResourceName::new("postgres/app").unwrap(),
        actions: actions.iter().map(|a| ActionName::new(a).unwrap()).collect(),
        constraints: tables.iter().map(|t| (ConstraintName::new("tables").unwrap(), set(t))).collect(),
    }
}

#[test]
fn a_plain_target_is_accepted_and_gives_its_groups() {
    let plan = plan(TARGET, PLAIN).unwrap_or_else(|e| panic!("{e:#?}"));
    let (resource, groups) = plan.groups(&asked(&["read"], None)).unwrap();
    assert_eq!(resource.database.as_str(), "app");
    assert_eq!(groups.iter().map(|g| g.as_str()).collect::<Vec<_>>(), ["app_read", "app_usage"]);
    assert_eq!(plan.groups(&asked(&["write"], None)).err(), Some(NotInPlan("unknown action")));
    assert_eq!(
        plan.groups(&asked(&["read"], Some(&["a"]))).err(),
        Some(NotInPlan("a constraint that is not enforced here"))
    );
}

#[test]
fn tables_give_their_own_groups_and_no_more() {
    let action = "action = [{ name = 'read', effect = 'read', settings = { groups = ['usage'], tables = { a = ['ra'], b = ['rb'] } } }]\n";
    let plan = plan(TARGET, &format!("{action}{TABLES}")).unwrap_or_else(|e| panic!("{e:#?}"));
    let of = |tables: Option<&[&str]>| {
        plan.groups(&asked(&["read"], tables)).map(|(_, g)| g.iter().map(|g| g.as_str().to_owned()).collect::<Vec<_>>())
    };
    assert_eq!(of(Some(&["a"])).unwrap(), ["ra", "usage"]);
    assert_eq!(of(Some(&["a", "b"])).unwrap(), ["ra", "rb", "usage"]);
    assert_eq!(of(None).unwrap_err(), NotInPlan("no tables named"));
    assert_eq!(of(Some(&[])).unwrap_err(), NotInPlan("no tables named"));
    assert_eq!(of(Some(&["c"])).unwrap_err(), NotInPlan("unknown table"));
}

#[test]
fn constraints_that_cannot_be_enforced_are_refused() {
    for constraint in [
        "rows = { kind = 'max', max = 10 }",
        "tables = { kind = 'paths', values = ['/a/'] }",
        "columns = { kind = 'set', values = ['x'] }",
    ] {
        refused(TARGET, &format!("{PLAIN}constraint = {{ {constraint} }}\n"), "can't be enforced");
    }
    let action = |settings: &str| format!("action = [{{ name = 'read', effect = 'read', settings = {settings} }}]\n");
    let with = |settings: &str| format!("{}{TABLES}", action(settings));
    refused(TARGET, &with("{ tables = { a = ['ra'] } }"), "no groups for b");
    refused(TARGET, &with("{ tables = { a = ['ra'], b = ['rb'], c = ['rc'] } }"), "tables.c is not in the values");
    refused(TARGET, &with("{ tables = { a = [], b = ['rb'] } }"), "tables.a: name at least one group");
    refused(TARGET, &with("{ groups = ['all'] }"), "no groups for a");
    refused(
        TARGET,
        &format!("settings = {{ database = 'app' }}\n{}", action("{ tables = { a = ['ra'] } }")),
        "needs the resource's constraint",
    );
    refused(TARGET, &format!("settings = {{ database = 'app' }}\n{}", action("{}")), "name the NOLOGIN groups");
    refused(TARGET, &format!("{PLAIN}constraint = {{ tables = {{ kind = 'set' }} }}\n"), "list every table");
}

#[test]
fn the_wire_is_closed_by_default() {
    let remote = "host = 'db.corp'\nuser = 'broker'\nconnection_group = 'lease_conn'\n";
    refused(remote, PLAIN, "ca_file is missing");
    refused(&format!("{remote}ca_file = 'no.pem'\n"), PLAIN, "no.pem");
    refused(&format!("{remote}sslmode = 'disable'\n"), PLAIN, "loopback and Unix sockets only");
    refused(&format!("{TARGET}agent_host = 'db.corp'\n"), PLAIN, "loopback and Unix sockets only");
    refused(&format!("{TARGET}standbys = [{{ host = '10.0.0.1' }}]\n"), PLAIN, "loopback and Unix sockets only");
    refused(&format!("{TARGET}ca_file = 'x.pem'\n"), PLAIN, "no use");
    refused("host = '/run/postgresql'\nuser = 'b'\nconnection_group = 'c'\nca_file = 'x'\n", PLAIN, "no TLS");
    assert!(plan("host = '/run/postgresql'\nuser = 'b'\nsslmode = 'disable'\nconnection_group = 'c'\n", PLAIN).is_ok());
    refused(&TARGET.replace("127.0.0.1", "127.0.0.1,db.corp"), PLAIN, "one name, address");
}

#[test]
fn every_limit_holds() {
    refused(&format!("{TARGET}connection_limit = 0\n"), PLAIN, "connection_limit must be");
    refused(&format!("{TARGET}connection_limit = {}\n", CONNECTIONS_MAX + 1), PLAIN, "connection_limit must be");
    assert!(plan(&format!("{TARGET}connection_limit = {CONNECTIONS_MAX}\n"), PLAIN).is_ok());
    for bad in ["cs", "Cs_", "1cs", "pg_x", &"x".repeat(32)] {
        let target = Target {
            name: ResourceName::new("db").unwrap(),
            kind: "postgres".to_owned(),
            settings: TARGET.parse().unwrap(),
        };
        let problems = Plan::new(&target, &[], Path::new("/"), bad).err().unwrap();
        assert!(problems[0].what.contains("name prefix"), "{bad}");
    }
    for bad in [0, SCRAM_ITERATIONS_MAX.get() + 1] {
        assert!(plan(&format!("{TARGET}scram_iterations = {bad}\n"), PLAIN).is_err());
    }
    let many = |n: usize, of: &str| vec![of.to_owned(); n].join(", ");
    let standbys = |n| format!("{TARGET}standbys = [{}]\n", many(n, "{ host = '127.0.0.1' }"));
    assert!(plan(&standbys(STANDBYS_MAX), PLAIN).is_ok());
    refused(&standbys(STANDBYS_MAX + 1), PLAIN, "standbys: 17");
    let groups = |n| PLAIN.replace("'app_read', 'app_usage'", &many(n, "'g'"));
    assert!(plan(TARGET, &groups(GROUPS_MAX)).is_ok());
    refused(TARGET, &groups(GROUPS_MAX + 1), "groups: 33");
    let databases = |n| PLAIN.replace("'app' }\n", &format!("'app', other_databases = [{}] }}\n", many(n, "'d'")));
    assert!(plan(TARGET, &databases(DATABASES_MAX)).is_ok());
    refused(TARGET, &databases(DATABASES_MAX + 1), "other_databases: 33");
    refused(TARGET, &PLAIN.replace("app_read", &"x".repeat(64)), "1 to 63 bytes");
}

#[test]
fn unknown_keys_and_names_that_sweeps_would_end_are_refused() {
    refused(&format!("{TARGET}passwrd = 'env:X'\n"), PLAIN, "unknown field `passwrd`");
    refused(TARGET, &PLAIN.replace("groups", "group"), "unknown field `group`");
    refused(TARGET, &PLAIN.replace("database", "db"), "unknown field `db`");
    refused(&TARGET.replace("'broker'", "'cs_broker'"), PLAIN, "sweeps would end it");
    refused(&TARGET.replace("lease_conn", "cs_conn"), PLAIN, "sweeps would end it");
    refused(TARGET, &PLAIN.replace("app_read", "cs_read"), "sweeps would end it");
}

#[test]
fn r2_problems_do_not_echo_what_was_written() {
    for bad in ["port = 'hunter2'\n", "password = 'hunter2'\n", "setup = 'hunter2'\n"] {
        let problems = plan(&format!("{TARGET}{bad}"), PLAIN).err().unwrap();
        assert!(!problems.concat().contains("hunter2"), "{problems:#?}");
    }
    refused(
        &format!("{TARGET}password = 'env:COUNTERSIGN_TEST_NOT_SET'\n"),
        PLAIN,
        "COUNTERSIGN_TEST_NOT_SET is not set",
    );
}

#[test]
fn every_problem_is_told_at_once() {
    let problems = plan(&format!("{TARGET}connection_limit = 0\n"), "settings = {}\naction = []\n").err().unwrap();
    assert_eq!(problems.len(), 2, "{problems:#?}");
    assert!(problems[0].starts_with("target db:") && problems[1].starts_with("resource postgres/app:"));
}
