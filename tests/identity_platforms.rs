//! "Tokens of GitHub Actions, GitLab and Kubernetes are what they say": subjects, pinned ids and attributes (A13).

#[path = "support/identity_house.rs"]
mod house;
#[path = "support/identity_kit.rs"]
mod kit;

use std::collections::BTreeMap;

use countersign::config::{IssuerPreset, LauncherConfig};
use countersign::identity::Refusal;
use house::{AUDIENCE, House, issuer_config};
use kit::with;
use serde_json::{Value, json};

#[tokio::test]
async fn a13_github_subjects() {
    let issuer = "https://token.actions.githubusercontent.com";
    let config = |require: &[(&str, &[&str])]| {
        let mut config = issuer_config(issuer, IssuerPreset::GithubActions);
        config.require = require
            .iter()
            .map(|(claim, values)| ((*claim).to_owned(), values.iter().map(|v| (*v).to_owned()).collect()))
            .collect();
        config
    };
    // A configuration that pins names only, or "pins" with a wildcard, doesn't load.
    for bad in [
        config(&[]),
        config(&[("repository", &["corp/app"])]),
        config(&[("repository_owner", &["corp"])]),
        config(&[("repository_id", &["*"])]),
        config(&[("repository_owner_id", &["12*"])]),
        config(&[("repository_id", &[])]),
        config(&[("repository_id", &["1"]), ("repository", &["corp/*"])]),
    ] {
        assert!(House::build(bad).is_err());
    }
    let house = House::build(config(&[("repository_owner_id", &["123456"])])).unwrap();
    let now = house.clock.now_secs();
    let base = json!({
        "iss": issuer, "aud": AUDIENCE, "iat": now, "nbf": now - 300, "exp": now + 300, "jti": "x",
        "sub": "repo:corp/app:ref:refs/heads/main", "repository": "corp/app", "repository_id": "456789",
        "repository_owner": "corp", "repository_owner_id": "123456", "ref": "refs/heads/main", "sha": "abc",
        "workflow_ref": "corp/app/.github/workflows/ci.yml@refs/heads/main", "run_id": "99", "environment": "prod",
        "actor": "octocat", "actor_id": "583231",
    });
    let ask = async |changes: Value| house.ask_claims(&with(&base, changes)).await;
    let agent = ask(json!({})).await.unwrap();
    assert_eq!(agent.id.as_str(), format!("{issuer}#repo:corp/app:ref:refs/heads/main"));
    for (name, value) in [
        ("repository", "corp/app"),
        ("repository_id", "456789"),
        ("environment", "prod"),
        ("sha", "abc"),
        ("run_id", "99"),
    ] {
        assert_eq!(agent.attributes[name], value);
    }
    let launcher = agent.launcher.unwrap();
    assert_eq!((launcher.issuer.as_str(), launcher.subject.as_str()), (issuer, "583231"), "the number, not the name");
    let untold = ask(json!({ "actor_id": null })).await.unwrap_err();
    assert_eq!(untold.refusal(), Refusal::Claim, "nobody could tell who must not vote");
    // The immutable form, whose ids must be those of the claims.
    let immutable = "repo:corp@123456/app@456789:ref:refs/heads/main";
    assert_eq!(ask(json!({ "sub": immutable })).await.unwrap().subject, immutable);
    for bad in [
        "repo:corp@1/app@456789:ref:refs/heads/main",
        "repo:corp@123456/app@1:ref:refs/heads/main",
        "repo:corp@123456/app:ref:refs/heads/main",
        "repo:corp/app@456789:ref:refs/heads/main",
        "repo:corp/other:ref:refs/heads/main",
        "repo:Corp/app:ref:refs/heads/main",
        "repo:corp/app:",
        "repo:corp:x",
        "repo:corp@123456@1/app@456789:ref:refs/heads/main",
    ] {
        assert_eq!(ask(json!({ "sub": bad })).await.unwrap_err().refusal(), Refusal::Claim, "{bad}");
    }
    for sub in [json!(null), json!("")] {
        assert_eq!(ask(json!({ "sub": sub })).await.unwrap_err().refusal(), Refusal::Claim);
    }
    assert!(ask(json!({ "repository": null })).await.is_err());
    // The organisation's name was freed and taken by somebody else: same names, another id.
    let taken = ask(json!({ "repository_owner_id": "777" })).await.unwrap_err();
    assert_eq!(taken.refusal(), Refusal::Rule);
    assert!(ask(json!({ "repository_owner_id": null })).await.is_err());
    // Renamed: the id holds the rule, the identity changes with the name unless the subject is immutable.
    let renamed = json!({ "sub": "repo:corp/app2:ref:refs/heads/main", "repository": "corp/app2" });
    assert_ne!(ask(renamed).await.unwrap().id, agent.id);
    // An organisation's own subject template.
    ask(json!({ "sub": "repository_owner:corp:environment:prod" })).await.unwrap();
}

#[tokio::test]
async fn gitlab_and_kubernetes_tokens_say_what_they_are() {
    let mut config = issuer_config("https://gitlab.example", IssuerPreset::Gitlab);
    assert!(House::build(config.clone()).is_err(), "no id is pinned");
    config.require = BTreeMap::from([("namespace_id".to_owned(), vec!["72".to_owned()])]);
    let house = House::build(config).unwrap();
    let now = house.clock.now_secs();
    let base = json!({
        "iss": "https://gitlab.example", "aud": AUDIENCE, "iat": now, "nbf": now - 5, "exp": now + 3600,
        "sub": "project_path:corp/app:ref_type:branch:ref:main", "namespace_id": "72", "project_id": "20",
        "project_path": "corp/app", "ref": "main", "ref_protected": "true", "pipeline_id": "574",
        "user_id": 42, "user_login": "ana",
    });
    let agent = house.ask_claims(&base).await.unwrap();
    assert_eq!((agent.attributes["project_id"].as_str(), agent.attributes["ref_protected"].as_str()), ("20", "true"));
    let launcher = agent.launcher.unwrap();
    assert_eq!((launcher.issuer.as_str(), launcher.subject.as_str()), ("https://gitlab.example", "42"));
    for bad in [
        json!({ "user_id": null }),
        json!({ "namespace_id": "73" }),
        json!({ "project_path": "corp/other" }),
        json!({ "project_path": null }),
    ] {
        assert!(house.ask_claims(&with(&base, bad)).await.is_err());
    }

    let house = House::build(issuer_config("https://kubernetes.default.svc", IssuerPreset::Kubernetes)).unwrap();
    let k8s = |namespace: &str, name: &str| {
        json!({
            "namespace": namespace, "serviceaccount": { "name": name, "uid": "u-1" }, "pod": { "name": "p-1", "uid": "u-2" },
        })
    };
    let base = json!({
        "iss": "https://kubernetes.default.svc", "aud": [AUDIENCE], "iat": now, "nbf": now, "exp": now + 600,
        "sub": "system:serviceaccount:agents:ops", "kubernetes.io": k8s("agents", "ops"),
    });
    // Kubernetes sends no `typ`.
    let untyped = json!({ "alg": "ES256", "kid": "es256" });
    let agent = house.ask(&house.es256.sign(&untyped, &base)).await.unwrap();
    assert_eq!(agent.launcher, None);
    for (name, value) in
        [("namespace", "agents"), ("service_account", "ops"), ("service_account_uid", "u-1"), ("pod", "p-1")]
    {
        assert_eq!(agent.attributes[name], value);
    }
    for bad in [
        json!({ "kubernetes.io": null }),
        json!({ "kubernetes.io": k8s("kube-system", "ops") }),
        json!({ "kubernetes.io": k8s("agents", "root") }),
        json!({ "sub": "system:node:n-1" }),
    ] {
        assert!(house.ask_claims(&with(&base, bad)).await.is_err());
    }
}

#[tokio::test]
async fn any_issuer_can_say_who_launched_the_agent() {
    let mut config = issuer_config("https://ci.example", IssuerPreset::Generic);
    config.launcher =
        Some(LauncherConfig { claim: "run.by".to_owned(), issuer: Some("https://login.example".to_owned()) });
    let house = House::build(config).unwrap();
    let now = house.clock.now_secs();
    let base = json!({
        "iss": "https://ci.example", "aud": AUDIENCE, "iat": now, "exp": now + 300, "sub": "job-1", "run": { "by": "u-7" },
    });
    let launcher = house.ask_claims(&base).await.unwrap().launcher.unwrap();
    assert_eq!((launcher.issuer.as_str(), launcher.subject.as_str()), ("https://login.example", "u-7"));
    for by in [json!(null), json!(""), json!(["u-7"]), json!({})] {
        let untold = house.ask_claims(&with(&base, json!({ "run": { "by": by } }))).await.unwrap_err();
        assert_eq!(untold.refusal(), Refusal::Claim, "{by}");
    }
}
