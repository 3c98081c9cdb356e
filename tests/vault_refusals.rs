//! What must not work: log-ins that aren't ours, targets that are sealed, down or sloppy, and configurations that could not be
//! held. Hostile targets: `vault_hostile.rs`.

#[path = "support/openbao.rs"]
mod openbao;
#[path = "support/vault_world.rs"]
mod world;

use std::sync::Arc;

use countersign::connector::{Connector, MintError, RevokeError};
use serde_json::{Value, json};
use world::*;

const LEASE_PATH: &str = "database/creds/billing-ro";

fn not_minted(result: Result<countersign::connector::Minted, MintError>, want: bool) -> String {
    match result {
        Err(MintError::NotMinted { why, transient }) if transient == want => why,
        other => panic!("{other:?}"),
    }
}

fn retried(result: Result<countersign::connector::Gone, RevokeError>) -> String {
    match result {
        Err(RevokeError::Retry { why }) => why,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn sealed_or_down_nothing_is_minted_and_nothing_is_gone() {
    let Some(mut w) = World::start("vault_refusals: sealed, down").await else { return };
    let c = w.billing("", None);
    let i = intent("bao/billing", &[], 300, 0);
    let lease = live(&i, &mint(&c, &i).await.unwrap());
    // It waits longer for its mint than one of 2 s may.
    let mut patient = target(&w.bao.address(), "");
    patient.settings["mint_deadline_secs"] = 100.into();
    let patient = connect(&patient, &[resource("bao/billing", BILLING, "")], &w.signer, &w.clock, None).unwrap();
    let j = intent("bao/billing", &[], 300, 0);
    let prepared = patient.prepare(&j).await.unwrap();

    w.bao.seal().await;
    assert!(retried(c.revoke(&lease, now()).await).contains("unseal the target"));
    assert!(not_minted(mint(&c, &i).await, true).contains("503"));
    // Logged in before, sealed at the mint.
    assert!(not_minted(patient.mint(&j, prepared.as_ref(), &context()).await, true).contains("503"));
    assert!(c.sweep().await.is_err() && c.check().await.is_err());
    w.bao.unseal().await;

    w.bao.kill();
    assert!(!retried(c.revoke(&lease, now().plus_secs(86400)).await).is_empty());
    not_minted(mint(&c, &i).await, true);
    w.bao.restart().await;
    // The janitor's token outlives the restart; the lease is ended as ever.
    said(&until_gone("after restart", || async { c.revoke(&lease, now()).await }).await);
    assert!(w.db.users("csv_").await.is_empty());
}

#[tokio::test]
async fn our_own_expired_or_forbidden_token_is_never_taken_for_gone() {
    let Some(w) = World::start("vault_refusals: own token").await else { return };
    let c = w.billing("", None);
    let i = intent("bao/billing", &[], 300, 0);
    let lease = live(&i, &mint(&c, &i).await.unwrap());
    assert_eq!(c.sweep().await.unwrap().len(), 1);

    // The janitor's token is ended at the target: the connector logs in again.
    let mint_accessor = lease.handle.as_ref().unwrap()["accessor"].as_str().unwrap().to_owned();
    let accessors = w.bao.ok("LIST", "auth/token/accessors", Value::Null).await;
    let mut ended = 0;
    for accessor in accessors["data"]["keys"].as_array().unwrap() {
        let looked = w.bao.ok("PUT", "auth/token/lookup-accessor", json!({ "accessor": accessor })).await;
        if *accessor != mint_accessor.as_str() && looked["data"]["display_name"] != "root" {
            w.bao.ok("PUT", "auth/token/revoke-accessor", json!({ "accessor": accessor })).await;
            ended += 1;
        }
    }
    assert_eq!(ended, 1);
    assert_eq!(c.sweep().await.unwrap().len(), 1);

    // Its policy is gone: 403 on every call.
    w.bao
        .ok(
            "PUT",
            "sys/policies/acl/countersign-janitor",
            json!({ "policy": "path \"nothing\" { capabilities = [\"read\"] }" }),
        )
        .await;
    assert!(retried(c.revoke(&lease, now()).await).contains("give the janitor the policy"));
    let found = countersign::connector::Found { name: "x".into(), handle: lease.handle.clone().unwrap() };
    retried(c.revoke_found(&found, now()).await);
    assert!(c.sweep().await.is_err());
    // Its role is gone.
    w.bao.ok("DELETE", "auth/jwt/role/countersign-janitor", Value::Null).await;
    let fresh = w.billing("", None);
    retried(fresh.revoke(&lease, now()).await);
    // A stored token that expired.
    let expired = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(expired.path(), "s.expired").unwrap();
    let stored = by_token(&w, expired.path());
    assert!(retried(stored.revoke(&lease, now()).await).contains("403 permission denied"));
    assert_eq!(w.db.users("csv_").await.len(), 1, "and indeed it is still there");
}

fn by_token(w: &World, file: &std::path::Path) -> countersign::connector::vault::VaultConnector {
    let target: countersign::config::Target = toml::from_str(&format!(
        "name = \"bao\"\nkind = \"vault\"\n[settings]\naddress = \"{}\"\nmint_deadline_secs = 2\n\
         auth = {{ method = \"token\", token = \"file:{}\", mint_policies = [\"countersign-mint\"] }}",
        w.bao.address(),
        file.display()
    ))
    .unwrap();
    connect(&target, &[resource("bao/billing", BILLING, "")], &w.signer, &w.clock, None).unwrap()
}

#[tokio::test]
async fn a_stored_token_by_reference_does_the_same() {
    let Some(w) = World::start("vault_refusals: stored token").await else { return };
    w.bao
        .ok(
            "PUT",
            "sys/policies/acl/create",
            json!({ "policy": "path \"auth/token/create\" { capabilities = [\"update\"] }" }),
        )
        .await;
    let body = json!({ "policies": ["create", "countersign-mint", "countersign-janitor"], "period": "1h", "no_default_policy": true });
    let token =
        w.bao.ok("POST", "auth/token/create-orphan", body).await["auth"]["client_token"].as_str().unwrap().to_owned();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("{token}\n")).unwrap();
    let c = by_token(&w, file.path());
    let i = intent("bao/billing", &[], 60, 0);
    let minted = mint(&c, &i).await.unwrap();
    // The child token is bounded by the grant, and with it the lease: a backstop that OpenBao itself holds.
    assert!(minted.not_after.unwrap().ms_since(now()) <= 63_000);
    said(&c.revoke(&live(&i, &minted), now()).await.unwrap());
    assert!(w.db.users("csv_").await.is_empty());
    std::fs::remove_file(file.path()).unwrap();
    assert!(!not_minted(mint(&c, &i).await, true).contains(&token));
}

#[tokio::test]
async fn d5_a_minted_token_with_the_targets_audience_does_not_log_in() {
    let Some(w) = World::start("vault_refusals: D5").await else { return };
    let resources = [resource("bao/billing", BILLING, "")];
    let to = target(&w.bao.address(), "");
    // The key that signs minted tokens, with their issuer; the same with the assertions' issuer in it.
    for issuer in ["https://broker.test", ISSUER] {
        let minted_tokens_key = Arc::new(Es256::new(issuer));
        let c = connect(&to, &resources, &minted_tokens_key, &w.clock, None).unwrap();
        not_minted(mint(&c, &intent("bao/billing", &[], 300, 0)).await, false);
        assert!(c.sweep().await.is_err());
    }
    // Right key, and right everything else, for another audience or subject: refused by the roles of the docs.
    let c = w.billing("", None);
    assert!(!c.check().await.unwrap().iter().any(|g| g.what.contains("takes assertions")));
    assert!(mint(&c, &intent("bao/billing", &[], 300, 0)).await.is_ok());
}

#[tokio::test]
async fn config_check_names_each_gap_of_a_sloppy_set_up() {
    let Some(w) = World::start("vault_refusals: check").await else { return };
    let c = w.billing("", None);
    let gaps = c.check().await.unwrap();
    assert_eq!(gaps, [], "the set-up of docs/vault.md has no gap");

    let sloppy = openbao::doc("hcl janitor").replace("allowed_parameters = { \"sync\" = [] }", "");
    w.bao.ok("PUT", "sys/policies/acl/countersign-janitor", json!({ "policy": sloppy })).await;
    let role = json!({
        "role_type": "jwt", "user_claim": "lease", "bound_audiences": ["openbao", "countersign-check-no-such-audience"],
        "token_policies": ["countersign-mint"], "token_type": "service", "token_ttl": "5m",
    });
    w.bao.ok("DELETE", "auth/jwt/role/countersign-mint", Value::Null).await;
    w.bao.ok("PUT", "auth/jwt/role/countersign-mint", role).await;
    w.bao
        .database_role(
            "billing-ro",
            700,
            &["CREATE ROLE \"{{name}}\" LOGIN PASSWORD '{{password}}'".into()],
            &["ALTER ROLE \"{{name}}\" NOLOGIN".into()],
        )
        .await;
    let gaps = c.check().await.unwrap();
    for (what, fatal) in [
        ("takes a `lease_id`", false),
        ("another audiences", true),
        ("another subject", true),
        ("`default` policy", false),
        ("identity entity of its own", false),
        ("is not mapped", false),
        ("a log-in lives 300 s", false),
        ("default_ttl of database/roles/billing-ro is 700 s", true),
        ("without VALID UNTIL", true),
        ("don't terminate sessions", false),
        ("don't drop the role", false),
        ("alter the role unconditionally", false),
    ] {
        let found = gaps.iter().find(|g| g.what.contains(what)).unwrap_or_else(|| panic!("{what}: {gaps:#?}"));
        assert_eq!(found.fatal, fatal, "{found:?}");
        assert!(!found.allows.is_empty() && !found.fix.is_empty());
    }

    // The lines of the janitor's policy, each left out in turn.
    w.bao.log_in_again().await;
    for (line, what) in [
        ("path \"auth/token/revoke-accessor\"", "can't end a token"),
        ("path \"sys/leases/lookup\" ", "can't look a lease up"),
        ("path \"sys/leases/lookup/database", "can't list"),
        ("path \"sys/leases/revoke/database", "can't revoke a lease"),
        ("path \"database/roles", "can't be read"),
        ("path \"auth/token/revoke-self\"", "can't end the tokens of this check's own tries"),
        ("path \"sys/capabilities-self\"", "the janitor can't ask what it may do"),
    ] {
        let policy = openbao::doc("hcl janitor").replace(line, &line.replace("path \"", "path \"nothing/"));
        w.bao.ok("PUT", "sys/policies/acl/countersign-janitor", json!({ "policy": policy })).await;
        let gaps = c.check().await.unwrap();
        assert!(gaps.iter().any(|g| g.what.contains(what)), "{line}: {gaps:#?}");
    }
    for (line, what) in [
        ("path \"auth/token/revoke-self\"", "the mint log-in can't end its own token"),
        ("path \"sys/capabilities-self\"", "the mint log-in can't ask what it may do"),
        ("path \"database/creds/billing-ro\"", "the mint log-in can't mint"),
    ] {
        let policy = openbao::doc("hcl mint").replace(line, &line.replace("path \"", "path \"nothing/"));
        w.bao.ok("PUT", "sys/policies/acl/countersign-mint", json!({ "policy": policy })).await;
        let gaps = c.check().await.unwrap();
        assert!(gaps.iter().any(|g| g.fatal && g.what.contains(what)), "{line}: {gaps:#?}");
    }
    // And a mint policy that doesn't reach the path; a path that is a kv engine by another name.
    w.bao
        .ok(
            "PUT",
            "sys/policies/acl/countersign-mint",
            json!({ "policy": "path \"sys/capabilities-self\" { capabilities = [\"update\"] }" }),
        )
        .await;
    assert!(
        c.check().await.unwrap().iter().any(|g| g.fatal && g.what.contains("doesn't reach database/creds/billing-ro"))
    );
    w.bao.ok("POST", "sys/mounts/disguise", json!({ "type": "kv" })).await;
    let policy = "path \"disguise/creds/x\" { capabilities = [\"read\"] }";
    w.bao.ok("PUT", "sys/policies/acl/countersign-mint", json!({ "policy": policy })).await;
    let kv = resource("bao/kv", "engine = \"database\"\npath = \"disguise/creds/x\"\nttl_secs_max = 600", "");
    let c = connect(&target(&w.bao.address(), ""), &[kv], &w.signer, &w.clock, None).unwrap();
    assert!(c.check().await.unwrap().iter().any(|g| g.fatal && g.what.contains("is a kv engine")));
}

#[tokio::test]
async fn tokens_that_could_not_be_ended_are_not_used() {
    let Some(w) = World::start("vault_refusals: unfit tokens").await else { return };
    let c = w.billing("", None);
    for (more, says) in
        [(json!({ "token_type": "batch" }), "batch tokens"), (json!({ "token_num_uses": 1 }), "token_num_uses=0")]
    {
        w.bao.log_in_again().await;
        let mut role = openbao::doc_roles().remove(0).1;
        role.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        w.bao.ok("PUT", "auth/jwt/role/countersign-mint", role).await;
        let why = not_minted(mint(&c, &intent("bao/billing", &[], 300, 0)).await, false);
        assert!(why.contains(says), "{why}");
    }
    assert!(w.bao.leases(LEASE_PATH).await.is_empty());
}

#[test]
fn what_could_not_be_held_is_refused_at_load_with_what_to_do() {
    let signer = Arc::new(Es256::new(ISSUER));
    let good = target("https://bao.test:8200", "");
    let problem = |target: &countersign::config::Target, resources: &[countersign::config::Resource], says: &str| {
        let Err(problems) = connect(target, resources, &signer, &Arc::default(), None) else {
            panic!("loaded; wanted: {says}")
        };
        assert!(problems.iter().any(|p| p.what.contains(says)), "wanted {says:?}, got {problems:#?}");
    };
    for (address, says) in [
        ("http://bao.test:8200", "must be https"),
        ("https://u:p@bao.test", "alone"),
        ("https://bao.test/v1", "alone"),
        ("ftp://127.0.0.1", "must be https"),
        ("bao", "not a URL"),
    ] {
        problem(&target(address, ""), &[], says);
    }
    for (more, says) in [
        ("namespace = \"a/../b\"", "`namespace`"),
        ("namespace = \"a*\"", "`namespace`"),
        ("mint_deadline = 3", "unknown field"),
        ("ca_file = \"/nowhere/ca.pem\"", "can't be read"),
        ("request_deadline_secs = 0", "`request_deadline_secs`"),
        ("skew_secs = 301", "`skew_secs`"),
    ] {
        problem(&target("https://bao.test", more), &[], says);
    }
    let mut same = good.clone();
    same.settings["auth"]["janitor_role"] = "countersign-mint".into();
    problem(&same, &[], "must differ");
    let mut root = good.clone();
    root.settings["auth"] =
        toml::from_str::<toml::Value>("method = \"token\"\ntoken = \"env:T\"\nmint_policies = [\"root\"]").unwrap();
    problem(&root, &[], "neither `root` nor `default`");
    let mut inline = good.clone();
    inline.settings["auth"] =
        toml::from_str::<toml::Value>("method = \"token\"\ntoken = \"hvs.CANARY\"\nmint_policies = [\"m\"]").unwrap();
    let Err(problems) = connect(&inline, &[], &signer, &Arc::default(), None) else { panic!("a token in the file") };
    assert!(
        problems[0].what.contains("must be a reference") && !format!("{problems:?}").contains("CANARY"),
        "{problems:?}"
    );

    for (settings, constraints, says) in [
        ("engine = \"kv\"\npath = \"secret/data/x\"\nttl_secs_max = 60", "", "neither an early end nor an expiry"),
        ("engine = \"database\"\npath = \"secret/data/x\"\nttl_secs_max = 60", "", "must be MOUNT/creds/ROLE"),
        ("engine = \"database\"\npath = \"sys/creds/x\"\nttl_secs_max = 60", "", "belongs to the target itself"),
        ("engine = \"database\"\npath = \"auth/token/creds/x\"\nttl_secs_max = 60", "", "belongs to the target itself"),
        ("engine = \"database\"\npath = \"identity/creds/x\"\nttl_secs_max = 60", "", "belongs to the target itself"),
        ("engine = \"database\"\npath = \"database/creds/..%2fx\"\nttl_secs_max = 60", "", "no `..`, `%`, `*`, `+`"),
        ("engine = \"database\"\npath = \"database/creds/*\"\nttl_secs_max = 60", "", "no `..`, `%`, `*`, `+`"),
        ("engine = \"database\"\npath = \"database/creds/x\"", "", "ttl_secs_max"),
        ("engine = \"database\"\npath = \"database/creds/x\"\nttl_secs_max = 0", "", "`ttl_secs_max` must be"),
        (
            "engine = \"database\"\npath = \"database/creds/x\"\nttl_secs_max = 60\nvalid_principals = [\"x\"]",
            "",
            "is for the ssh engine",
        ),
        (
            "engine = \"database\"\npath = \"database/creds/x\"\nttl_secs_max = 60\nusername_prefix = \"v_\"",
            "",
            "`username_prefix` must have",
        ),
        (
            "engine = \"database\"\npath = \"database/creds/x\"\nttl_secs_max = 60\npostgres_target = \"p\"",
            "",
            "needs `username_prefix`",
        ),
        (BILLING, "[constraint.tables]\nkind = \"set\"\nvalues = [\"a\"]", "can't be held at a database engine"),
        (BILLING, "[constraint.ttl_secs]\nkind = \"max\"\nmax = 60", "can't be held at a database engine"),
        ("engine = \"pki\"\npath = \"pki/issue/x\"\nttl_secs_max = 60", "", "needs `common_name`"),
        (
            "engine = \"pki\"\npath = \"pki/issue/x\"\nttl_secs_max = 60\ncommon_name = \"*.svc\"",
            "",
            "not an exact name",
        ),
        (
            "engine = \"pki\"\npath = \"pki/issue/x\"\nttl_secs_max = 60",
            "[constraint.names]\nkind = \"set\"\nvalues = [\"*.svc\"]",
            "not an exact name",
        ),
        (
            "engine = \"pki\"\npath = \"pki/issue/x\"\nttl_secs_max = 60\ncommon_name = \"a\"\ngenerate_lease = true\nno_store = true",
            "",
            "exclude each other",
        ),
        ("engine = \"ssh\"\npath = \"ssh/sign/x\"\nttl_secs_max = 60", "", "would open every account"),
        (
            "engine = \"ssh\"\npath = \"ssh/sign/x\"\nttl_secs_max = 60\nvalid_principals = [\"a,b\"]",
            "",
            "not an exact name",
        ),
    ] {
        problem(&good, &[resource("x", settings, constraints)], says);
    }
    let mut two = resource("x", BILLING, "");
    two.action.push(toml::from_str("name = \"export\"\neffect = \"export\"").unwrap());
    problem(&good, &[two], "give each action a resource");
    let behind = "\npostgres_target = \"pg\"\nusername_prefix = \"csv_\"";
    problem(&good, &[resource("x", &format!("{BILLING}{behind}"), "")], "no target of kind `postgres`");
    let other = BILLING.replace("billing-ro", "other");
    let prefixes = [
        resource("x", &format!("{BILLING}\nusername_prefix = \"csv_\""), ""),
        resource("y", &format!("{other}\nusername_prefix = \"csv_b_\""), ""),
    ];
    problem(&good, &prefixes, "begin alike");
}
