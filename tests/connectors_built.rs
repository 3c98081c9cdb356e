//! The connectors of a configuration are built as it says, or everything that is wrong with them is said at once.

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use countersign::broker::build::{assertion_issuer, connectors};
use countersign::config::Problem;
use countersign::connector::Connector;
use countersign::core::id::{ResourceName, Timestamp};
use countersign::keys::{Keys, NamePrefix};
use countersign::time::SystemClock;
use support::Example;

fn build(example: &Example) -> Result<BTreeMap<ResourceName, Arc<dyn Connector>>, Vec<Problem>> {
    let loaded = example.load().unwrap();
    let keys = Keys::ephemeral(Timestamp(1_700_000_000_000)).unwrap();
    connectors(&loaded, &keys, Arc::new(SystemClock), &NamePrefix::new("csn").unwrap())
}

/// "place: what" of every problem.
fn problems(example: &Example) -> Vec<String> {
    build(example).err().unwrap().into_iter().map(|p| format!("{}: {}", p.place, p.what)).collect()
}

#[test]
fn every_target_of_the_example_gets_its_connector() {
    let example = Example::new();
    let built = build(&example).unwrap();
    let kinds: Vec<String> = built.iter().map(|(name, c)| format!("{name} {}", c.kind())).collect();
    assert_eq!(kinds, ["billing-db postgres", "openbao vault", "sandbox-db postgres", "tokens token"]);
}

#[test]
fn a_vault_may_stand_before_the_database_whose_users_it_makes() {
    let example = Example::new();
    let text = example.read("catalogue.toml");
    let (vault, at) = {
        let from = text.find("[[target]]\nname = \"openbao\"").unwrap();
        let to = from + text[from..].find("\n\n").unwrap();
        (text[from..to].to_owned(), from..to)
    };
    let rest = format!("{}{}", &text[..at.start], &text[at.end..]);
    let first = rest.find("[[target]]").unwrap();
    example.write("catalogue.toml", &format!("{}{vault}\n\n{}", &rest[..first], &rest[first..]));
    assert!(build(&example).is_ok());
}

#[test]
fn problems_of_all_targets_come_in_one_pass() {
    let example = Example::new();
    example.replace("catalogue.toml", "connection_limit = 5", "connection_limit = 0");
    example.replace("catalogue.toml", "life_secs_max = 900\n# Allowance", "life_secs_max = 0\n# Allowance");
    example.replace("catalogue.toml", "https://openbao.corp.example:8200", "http://openbao.corp.example:8200");
    let said = problems(&example);
    for part in [
        "target billing-db: connection_limit",
        "target tokens: life_secs_max",
        "target openbao: `address` must be https",
    ] {
        assert!(said.iter().any(|p| p.contains(part)), "{part:?} is not in {said:#?}");
    }
    assert!(!said.iter().any(|p| p.contains("postgres_target")), "a consequence is no problem: {said:#?}");
}

#[test]
fn a_postgres_target_that_is_none_and_a_kind_that_there_is_not_are_said() {
    let example = Example::new();
    example.replace("catalogue.toml", "postgres_target = \"billing-db\"", "postgres_target = \"tokens\"");
    let said = problems(&example);
    assert!(said.iter().any(|p| p.contains("`postgres_target` that is no target of kind `postgres`")), "{said:#?}");

    let example = Example::new();
    example.replace("catalogue.toml", "kind = \"token\"", "kind = \"tokens\"");
    let loaded = example.load();
    // Whichever looks first, the answer names the kinds that there are.
    let said = match loaded {
        Ok(_) => problems(&example),
        Err(problems) => problems.into_iter().map(|p| p.what).collect(),
    };
    assert!(said.iter().any(|p| p.contains("token") && p.contains("postgres")), "{said:#?}");
}

/// The functions know one prefix: users of a Vault's could be found and never ended.
#[test]
fn a_vault_whose_users_could_not_be_ended_is_refused() {
    let example = Example::new();
    example.replace("catalogue.toml", "connection_limit = 5", "connection_limit = 5\nsetup = \"functions\"");
    let said = problems(&example);
    assert!(said.iter().any(|p| p.starts_with("target openbao, postgres_target: with setup")), "{said:#?}");
}

#[test]
fn assertions_have_an_issuer_of_their_own() {
    assert_eq!(assertion_issuer("https://broker.corp:8443/"), "https://broker.corp:8443/assertions");
}
