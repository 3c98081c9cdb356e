//! What persons may do, and tables of cases.

#[path = "support/world.rs"]
mod world;

use countersign::core::id::{AgentId, PersonId};
use countersign::core::permission::Permission;
use countersign::policy::{GrantFacts, On, PersonAction, PersonFacts, builtin, table};
use world::*;

const RULES: &str = r#"
@id("db") permit(principal is Person, action == Action::"approve", resource is Grant)
    when { principal.groups.contains("db-owners") && ["postgres"].containsAll(resource.kinds) };
@id("own") permit(principal is Person, action in [Action::"see", Action::"revoke"], resource is Grant)
    when { resource has owner && resource.owner == principal.id };
@id("all") permit(principal is Person, action == Action::"read_record", resource)
    when { principal.groups.contains("auditors") };
@id("stop") permit(principal is Person, action == Action::"freeze", resource is Broker);
@id("out") @reason("suspended") forbid(principal is Person, action, resource)
    when { principal.groups.contains("suspended") };
"#;

fn person(id: &str, groups: &[&str]) -> PersonFacts {
    PersonFacts { id: PersonId::new(id).unwrap(), groups: groups.iter().map(|g| (*g).to_owned()).collect() }
}

fn grant(permissions: Vec<Permission>) -> GrantFacts {
    GrantFacts {
        agent: AgentId::new("spiffe://corp/agent/one").unwrap(),
        owner: Some(PersonId::new("ana").unwrap()),
        team: None,
        tier: tier_name("change"),
        permissions,
    }
}

#[test]
fn votes_are_for_whom_the_rules_name() {
    let e = engine(RULES);
    let db = grant(vec![permission("db/customers", &["write"])]);
    let both = grant(vec![permission("db/customers", &["write"]), permission("web/out", &["post"])]);
    let may = |p: &PersonFacts, g: &GrantFacts| e.may(p, PersonAction::Approve, On::Grant(g));
    let ben = person("ben", &["db-owners"]);
    let yes = may(&ben, &db);
    assert!(yes.allowed && yes.rules == ["db"] && yes.reason.is_none(), "{yes:?}");
    let no = may(&ben, &both);
    assert!(!no.allowed && no.rules == [builtin::NO_PERMIT], "a grant that spans more is not theirs: {no:?}");
    assert!(!may(&person("ben", &[]), &db).allowed);
    let out = may(&person("ben", &["db-owners", "suspended"]), &db);
    assert_eq!(
        (out.allowed, out.rules.as_slice(), out.reason.as_deref()),
        (false, ["out".to_owned()].as_slice(), Some("suspended"))
    );
}

#[test]
fn p5_one_right_is_no_other() {
    let e = engine(RULES);
    let g = grant(vec![permission("db/customers", &["write"])]);
    for action in PersonAction::ALL {
        for (who, right) in [
            (person("fay", &["auditors"]), PersonAction::ReadRecord),
            (person("ben", &["db-owners"]), PersonAction::Approve),
        ] {
            let got = e.may(&who, action, On::Grant(&g)).allowed;
            assert_eq!(got, action == right, "{who:?} {action:?}");
        }
    }
}

#[test]
fn an_act_fits_what_it_is_done_to() {
    let e = engine(RULES);
    let g = grant(vec![permission("db/play", &["read"])]);
    let fay = person("fay", &["auditors", "db-owners"]);
    assert!(e.may(&fay, PersonAction::Freeze, On::Broker).allowed);
    assert!(!e.may(&fay, PersonAction::Freeze, On::Grant(&g)).allowed);
    assert!(!e.may(&fay, PersonAction::Approve, On::Broker).allowed);
    assert!(e.may(&fay, PersonAction::ReadRecord, On::Broker).allowed);
    assert!(e.may(&fay, PersonAction::ReadRecord, On::Grant(&g)).allowed);
}

#[test]
fn l3_a_resource_that_left_the_catalogue_can_be_ended_and_not_approved() {
    let e = engine(RULES);
    let mut gone = permission("db/customers", &["write"]);
    gone.resource = resource("db/removed");
    let g = grant(vec![gone, permission("db/play", &["read"])]);
    let ana = person("ana", &["db-owners"]);
    assert!(e.may(&ana, PersonAction::Revoke, On::Grant(&g)).allowed);
    let vote = e.may(&ana, PersonAction::Approve, On::Grant(&g));
    assert!(!vote.allowed, "all of it must be theirs, and a part is unknown");
    assert!(vote.undecided[0].contains("db/removed is held and no longer in the catalogue"), "{vote:?}");
}

#[test]
fn an_evaluation_error_denies_persons_too() {
    let e = engine(&format!(
        "{RULES} @id(\"err\") forbid(principal is Person, action == Action::\"approve\", resource is Grant)
         when {{ resource.tier == Tier::\"change\" && 9223372036854775807 + (if resource.agent == \"\" then 0 else 1) > 0 }};"
    ));
    let got = e.may(
        &person("ben", &["db-owners"]),
        PersonAction::Approve,
        On::Grant(&grant(vec![permission("db/play", &["read"])])),
    );
    assert_eq!((got.allowed, got.rules.as_slice()), (false, [builtin::EVALUATION_ERROR.to_owned()].as_slice()));
    assert!(got.undecided[0].contains("err"), "{got:?}");
}

#[test]
fn grants_have_the_facts_that_the_schema_promises() {
    let g = grant(vec![permission("db/customers", &["read", "drop"]), permission("web/out", &["post"])]);
    for condition in [
        r#"resource.agent like "spiffe://corp/*""#,
        r#"resource has owner && resource.owner == "ana""#,
        "!(resource has team)",
        r#"resource.tier == Tier::"change""#,
        r#"resource.resources.contains(Resource::"web/out")"#,
        r#"resource.targets.containsAll(["db", "tokens"]) && resource.kinds.containsAll(["postgres", "token"])"#,
        r#"resource.environments.contains("prod") && resource.labels.containsAll(["customer-data", "outside"])"#,
        r#"resource.sensitivities.containsAll(["customer", "none"])"#,
        r#"resource.effects.containsAll(["read", "delete", "write"]) && !resource.effects.contains("administer")"#,
        r#"resource.facts.containsAll(["customer-data/read", "outside/write"])"#,
        r#"principal.id == "zoe" && principal.groups.isEmpty()"#,
    ] {
        let rule = format!(
            "@id(\"x\") permit(principal is Person, action == Action::\"approve\", resource is Grant) when {{ {condition} }};"
        );
        assert!(engine(&rule).may(&person("zoe", &[]), PersonAction::Approve, On::Grant(&g)).allowed, "{condition}");
    }
}

const TABLE: &str = r#"
[agents.one]
id = "spiffe://corp/agent/one"
owner = "ana"

[[case]]
name = "right"
agent = "one"
want = [{ type = "postgres", identifier = "db/play", actions = ["read"] }]
expect = { tier = "observe", rules = ["read"] }

[[case]]
name = "wrong"
agent = "one"
want = [{ type = "postgres", identifier = "db/play", actions = ["read", "write"] }]
expect = { tier = "change" }

[[may]]
name = "wrong too"
person = { id = "ben" }
action = "freeze"
allowed = false
"#;

#[test]
fn a_table_says_what_was_expected_and_what_came() {
    let rules = format!(
        "{RULES} @id(\"read\") @tier(\"observe\") permit(principal is Agent, action == Action::\"read\", resource);"
    );
    let report = table::run(&engine(&rules), "t.toml", TABLE).unwrap();
    assert!(!report.passed());
    assert_eq!(report.results[0].failure, None);
    let failure = report.results[1].failure.as_deref().unwrap();
    assert!(
        failure.starts_with("expected: tier change\ngot:      denied by countersign:no-permit (no rule permits write"),
        "{failure}"
    );
    assert_eq!(report.results[2].failure.as_deref(), Some("expected: refused\ngot:      allowed by stop"));
    assert_eq!(report.uncovered, ["db", "own", "all", "out"]);
    let text = report.to_string();
    assert!(
        text.contains("ok      right")
            && text.contains("FAILED  wrong")
            && text.contains("3 cases, 2 failed; rules without a case: db"),
        "{text}"
    );
}

#[test]
fn a_table_that_is_wrong_itself() {
    let e = engine(RULES);
    let said = |text: &str| {
        let p = table::run(&e, "t.toml", text).unwrap_err();
        format!("{}: {}", p[0].place, p[0].what)
    };
    let with = |from: &str, to: &str| {
        assert!(TABLE.contains(from), "{from}");
        said(&TABLE.replacen(from, to, 1))
    };
    assert!(
        with("name = \"right\"", "nam = \"right\"").starts_with("t.toml:7: unknown field `nam`"),
        "{}",
        with("name = \"right\"", "nam = \"right\"")
    );
    assert!(
        with("agent = \"one\"", "agent = \"two\"")
            .contains("t.toml: case \"right\": there is no [agents.two] in this table; add it")
    );
    assert!(
        with("identifier = \"db/play\"", "identifier = \"db/pley\"")
            .contains("identifier: there is no resource `db/pley`")
    );
    assert!(
        with("tier = \"observe\", rules", "deny = \"x\", tier = \"observe\", rules")
            .contains("`expect` needs either `tier` or `deny`")
    );
    assert!(with("tier = \"change\"", "tier = \"chnge\"").contains("names tier \"chnge\", which there isn't"));
    assert!(said(&format!("#{}", "x".repeat(table::TABLE_BYTES_MAX))).contains("larger than"));
}
