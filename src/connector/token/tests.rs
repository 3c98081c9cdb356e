//! What the token connector's tokens say, how they end, and which catalogues it refuses.

use serde_json::{Value, json};

use super::*;
use crate::config::Catalogue;
use crate::core::id::{ActionName, AgentId, GrantId, LeaseId, PersonId, TaskName};
use crate::core::lease::Progress;
use crate::keys::Purpose;

const NOW: Timestamp = Timestamp(1_800_000_000_500);

const CATALOGUE: &str = r#"
[[target]]
name = "broker-tokens"
kind = "token"
settings = { life_secs_max = 1800, skew_secs = 30 }

[[resource]]
name = "api/asks"
target = "broker-tokens"
title = "asking API"
environment = "prod"
sensitivity = "internal"
settings = { audience = "https://asks.corp", checks = "introspection", resource_server = "spiffe://corp/api/asks", enforces = ["paths", "rows"] }
action = [{ name = "read", effect = "read" }]
constraint = { paths = { kind = "paths", values = ["/"] }, rows = { kind = "max", max = 100 } }

[[resource]]
name = "api/offline"
target = "broker-tokens"
title = "offline API"
environment = "prod"
sensitivity = "internal"
settings = { audience = "https://offline.corp", checks = "offline", life_secs_max = 600 }
action = [{ name = "read", effect = "read" }]
"#;

fn build(catalogue: &str) -> Result<TokenConnector, Vec<Problem>> {
    let catalogue: Catalogue = toml::from_str(catalogue).unwrap();
    let keys = Arc::new(SigningKeys::ephemeral(Purpose::Tokens, NOW).unwrap());
    let resources: Vec<&Resource> = catalogue.resource.iter().collect();
    TokenConnector::new(&catalogue.target[0], &resources, "https://broker.corp", keys)
}

fn connector() -> TokenConnector {
    build(CATALOGUE).unwrap()
}

fn permission(resource: &str, constraints: Value) -> Permission {
    Permission {
        resource: ResourceName::new(resource).unwrap(),
        actions: [ActionName::new("read").unwrap()].into(),
        constraints: serde_json::from_value(constraints).unwrap(),
    }
}

fn intent(permission: Permission, lifetime_secs: u64) -> LeaseIntent {
    LeaseIntent {
        lease: LeaseId::from_bytes([1; 16]),
        grant: GrantId::from_bytes([2; 16]),
        name: "cs_x".to_owned(),
        target: ResourceName::new("tokens").unwrap(),
        permission,
        intended_at: NOW,
        lifetime_secs,
    }
}

fn context() -> MintContext {
    MintContext {
        agent: AgentId::new("spiffe://corp/agent/ops").unwrap(),
        owner: Some(PersonId::new("ana").unwrap()),
        task: TaskName::new("INC-42").unwrap(),
        approvers: vec![PersonId::new("bo").unwrap(), PersonId::new("cy").unwrap()],
        chain: Vec::new(),
        confirmation: None,
        wall_now: NOW,
    }
}

async fn mint(c: &TokenConnector, intent: &LeaseIntent, context: &MintContext) -> (Minted, Value) {
    let minted = c.mint(intent, None, context).await.unwrap();
    let claims = c.keys.verify("at+jwt", minted.credential.secret["token"].expose(), NOW).unwrap();
    (minted, claims)
}

fn lease(intent: &LeaseIntent, minted: &Minted, state: LeaseState) -> Lease {
    Lease { intent: intent.clone(), handle: Some(minted.handle.clone()), not_after: minted.not_after, state }
}

fn revoking() -> LeaseState {
    LeaseState::Revoking { since: NOW, progress: Progress::default() }
}

#[tokio::test]
async fn a_token_says_exactly_what_was_granted() {
    let asked = permission("api/asks", json!({"paths": {"paths": ["/a/"]}, "rows": {"max": 10}}));
    let (minted, claims) = mint(&connector(), &intent(asked, 60), &context()).await;
    let second = NOW.secs();
    let expected = json!({
        "iss": "https://broker.corp",
        "aud": "https://asks.corp",
        "iat": second,
        "exp": second + 60,
        "jti": LeaseId::from_bytes([1; 16]),
        "sub": "spiffe://corp/agent/ops",
        "client_id": "spiffe://corp/agent/ops",
        "txn": GrantId::from_bytes([2; 16]),
        "authorization_details": [
            {"type": "token", "identifier": "api/asks", "actions": ["read"], "paths": ["/a/"], "rows": 10}
        ],
        "owner": "ana",
        "approvers": ["bo", "cy"],
    });
    assert_eq!(claims, expected);
    assert_eq!(minted.not_after, Some(Timestamp((second + 60) * 1000)));
    assert_eq!(minted.credential.public["token_type"], "Bearer");
    assert_eq!(minted.credential.public["audience"], "https://asks.corp");
    // What is journaled and shown has no token in it (guarantee 9).
    assert!(!format!("{:?}{}", minted.credential, minted.handle).contains("eyJ"));
}

#[tokio::test]
async fn the_chain_has_the_holder_outermost_and_the_first_deepest() {
    let chain = ["spiffe://corp/root", "spiffe://corp/middle"].map(|a| AgentId::new(a).unwrap()).to_vec();
    let intent = intent(permission("api/asks", json!({})), 60);
    let (_, claims) = mint(&connector(), &intent, &MintContext { chain, ..context() }).await;
    assert_eq!(claims["sub"], "spiffe://corp/agent/ops");
    let expected = json!({"sub": "spiffe://corp/agent/ops",
        "act": {"sub": "spiffe://corp/middle", "act": {"sub": "spiffe://corp/root"}}});
    assert_eq!(claims["act"], expected);
}

#[tokio::test]
async fn a_bound_grant_makes_a_bound_token() {
    let intent = intent(permission("api/asks", json!({})), 60);
    for (confirmation, cnf, token_type) in [
        (Confirmation::CertificateSha256("abc".into()), json!({"x5t#S256": "abc"}), "Bearer"),
        (Confirmation::JwkThumbprint("def".into()), json!({"jkt": "def"}), "DPoP"),
    ] {
        let context = MintContext { confirmation: Some(confirmation), ..context() };
        let (minted, claims) = mint(&connector(), &intent, &context).await;
        assert_eq!(claims["cnf"], cnf);
        assert_eq!(minted.credential.public["token_type"], token_type);
    }
}

#[tokio::test]
async fn no_token_lives_longer_than_its_cap() {
    for (resource, asked, lives) in [("api/asks", 60, 60), ("api/asks", 9_999, 1800), ("api/offline", 9_999, 600)] {
        let (_, claims) = mint(&connector(), &intent(permission(resource, json!({})), asked), &context()).await;
        assert_eq!(claims["exp"].as_u64().unwrap() - claims["iat"].as_u64().unwrap(), lives, "{resource}");
    }
}

#[tokio::test]
async fn a_resource_of_another_target_is_not_minted() {
    let err = connector().mint(&intent(permission("api/other", json!({})), 60), None, &context()).await.unwrap_err();
    assert!(matches!(err, MintError::NotMinted { transient: false, .. }), "{err}");
}

#[tokio::test]
async fn an_asking_api_sees_the_end_at_once() {
    let c = connector();
    let asked = permission("api/asks", json!({}));
    let says = c.revocability(&asked, 600);
    assert_eq!((says.mode, says.residual_secs), (RevocabilityMode::Immediate, 0));
    let intent = intent(asked, 60);
    let (minted, _) = mint(&c, &intent, &context()).await;
    let gone = c.revoke(&lease(&intent, &minted, revoking()), NOW).await.unwrap();
    let Evidence::TargetSaysGone { detail } = &gone.evidence else { panic!("{gone:?}") };
    assert!(detail.contains("introspection") && detail.contains(&intent.lease.to_string()), "{detail}");
    assert_eq!(c.revoke(&lease(&intent, &minted, revoking()), NOW).await.unwrap(), gone, "idempotent");
    // Not before the end is recorded: until then introspection says "active".
    let live = LeaseState::Live { since: NOW, released_at: Some(NOW) };
    assert!(matches!(c.revoke(&lease(&intent, &minted, live), NOW).await, Err(RevokeError::Retry { .. })));
}

#[tokio::test]
async fn an_offline_api_is_said_to_accept_a_copy_until_it_expires() {
    let c = connector();
    let asked = permission("api/offline", json!({}));
    let says = c.revocability(&asked, 300);
    assert_eq!((says.mode, says.residual_secs), (RevocabilityMode::ExpiryOnly, 330));
    assert!(says.says.contains("330 seconds"), "{}", says.says);
    assert_eq!(c.revocability(&asked, 9_999).residual_secs, 630, "the cap counts");

    let intent = intent(asked, 300);
    let (minted, claims) = mint(&c, &intent, &context()).await;
    let not_after = Timestamp(claims["exp"].as_u64().unwrap() * 1000);
    let at = not_after.plus_secs(30);
    let lease = lease(&intent, &minted, revoking());
    for early in [NOW, not_after, Timestamp(at.0 - 1)] {
        let Err(RevokeError::EndsAt { at: said }) = c.revoke(&lease, early).await else { panic!("{early:?}") };
        assert_eq!(said, at);
    }
    let gone = c.revoke(&lease, at).await.unwrap();
    assert_eq!(gone.evidence, Evidence::Expired { not_after, skew_secs: 30 });
    // The residual window that was approved covers it.
    assert!(at.ms_since(NOW) <= c.revocability(&intent.permission, 300).residual_secs * 1000);
}

#[tokio::test]
async fn a_change_of_settings_does_not_change_how_old_tokens_end() {
    let old = connector();
    let intent = intent(permission("api/offline", json!({})), 300);
    let (minted, _) = mint(&old, &intent, &context()).await;
    let new = build(
        &CATALOGUE
            .replace("\"offline\"", "\"introspection\", resource_server = \"spiffe://corp/api/offline\"")
            .replace("skew_secs = 30", "skew_secs = 0"),
    )
    .unwrap();
    let lease = lease(&intent, &minted, revoking());
    let Err(RevokeError::EndsAt { at }) = new.revoke(&lease, NOW).await else { panic!() };
    assert_eq!(at, minted.not_after.unwrap().plus_secs(30));
    // Between approval and mint such a change is seen by the fingerprint.
    assert_ne!(old.fingerprint(&intent.permission), new.fingerprint(&intent.permission));
}

#[tokio::test]
async fn what_was_never_recorded_live_never_left() {
    let intent = intent(permission("api/offline", json!({})), 300);
    let unknown = |state| Lease { intent: intent.clone(), handle: None, not_after: None, state };
    let state = LeaseState::Unknown { since: NOW, why: "crash".into(), not_before: NOW, progress: Progress::default() };
    let gone = connector().revoke(&unknown(state), NOW).await.unwrap();
    assert!(matches!(gone.evidence, Evidence::TargetSaysGone { .. }));
    // Once it may have been live, a lost handle means the worst: offline, for as long as the intent allowed.
    let Err(RevokeError::EndsAt { at }) = connector().revoke(&unknown(revoking()), NOW).await else { panic!() };
    assert!(at >= NOW.plus_secs(330) && at <= NOW.plus_secs(331), "{at:?}");
}

#[tokio::test]
async fn a_sweep_finds_nothing_and_a_long_offline_life_is_pointed_out() {
    assert_eq!(connector().sweep().await.unwrap(), []);
    assert_eq!(connector().check().await.unwrap(), []);
    let long = build(&CATALOGUE.replace("life_secs_max = 600", "life_secs_max = 1800")).unwrap();
    let gaps = long.check().await.unwrap();
    assert_eq!(gaps.len(), 1);
    assert!(gaps[0].what.contains("api/offline") && gaps[0].fix.contains("life_secs_max"), "{gaps:?}");
}

#[test]
fn catalogues_that_promise_too_much_are_refused() {
    for (find, replace, says) in [
        ("life_secs_max = 1800", "life_secs_max = 86401", "1 to 86400"),
        ("life_secs_max = 1800", "life_secs_max = 0", "1 to 86400"),
        ("skew_secs = 30", "skew_secs = 601", "at most 600"),
        ("skew_secs = 30", "skew = 30", "unknown field"),
        ("checks = \"offline\"", "checks = \"never\"", "unknown variant"),
        ("checks = \"offline\", ", "", "missing field"),
        ("life_secs_max = 600", "life_secs_max = 1801", "1 to 1800"),
        (", resource_server = \"spiffe://corp/api/asks\"", "", "needs resource_server"),
        (
            "resource_server = \"spiffe://corp/api/asks\"",
            "resource = \"x\"",
            "\"offline\", resource_server, life_secs_max",
        ),
        ("https://asks.corp", "", "1 to 512 bytes"),
        ("https://asks.corp", "a b", "without spaces"),
        ("https://asks.corp", "https://broker.corp/", "the broker itself"),
        (", enforces = [\"paths\", \"rows\"]", "", "enforced by nobody"),
        ("enforces = [\"paths\", \"rows\"]", "enforces = [\"paths\", \"rows\", \"more\"]", "no constraint of this"),
        ("rows", "type", "name it otherwise"),
        ("effect = \"read\" }", "effect = \"read\", settings = { x = 1 } }", "take none"),
    ] {
        let spoilt = CATALOGUE.replace(find, replace);
        assert_ne!(spoilt, CATALOGUE, "{find}");
        let problems = build(&spoilt).unwrap_err();
        assert!(problems.iter().any(|p| p.what.contains(says)), "{find} -> {replace}: {problems:?}");
    }
    let long = |n: usize| CATALOGUE.replace("https://asks.corp", &"a".repeat(n));
    assert!(build(&long(AUDIENCE_BYTES_MAX)).is_ok());
    assert!(build(&long(AUDIENCE_BYTES_MAX + 1)).is_err());
}
