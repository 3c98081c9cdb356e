//! pki/issue and ssh/sign on a real OpenBao: ended with exactly the evidence that each allows.

#[path = "support/openbao.rs"]
mod openbao;
#[path = "support/vault_world.rs"]
mod world;

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use countersign::connector::vault::VaultConnector;
use countersign::connector::{Connector, MintError, RevocabilityMode, RevokeError};
use countersign::core::lease::Evidence;
use countersign::core::permission::Constraint;
use openbao::OpenBao;
use serde_json::{Value, json};
use world::*;

struct Ca {
    bao: OpenBao,
    connector: VaultConnector,
}

const NAMES: &str = "[constraint.names]\nkind = \"set\"\nvalues = [\"a.svc.test\", \"b.svc.test\", \"c.svc.test\"]";
const PRINCIPALS: &str = "[constraint.valid_principals]\nkind = \"set\"\nvalues = [\"deploy\", \"ops\"]";
const KEYS: &str = "engine = \"ssh\"\npath = \"ssh/sign/ops\"\nttl_secs_max = 300\nextensions = { permit-pty = \"\" }";

fn pki(role: &str, more: &str) -> String {
    format!("engine = \"pki\"\npath = \"pki/issue/{role}\"\nttl_secs_max = 300\n{more}")
}

async fn start(test: &str) -> Option<Ca> {
    let bao = OpenBao::start(test, 2).await?;
    let signer = Arc::new(Es256::new(ISSUER));
    let more = "path \"pki/issue/agents-nostore\" { capabilities = [\"update\"] }\n";
    bao.log_in_by(&signer.public_pem, ISSUER, more, "").await;
    bao.pki(&[
        ("agents", json!({})),
        ("agents-leased", json!({ "generate_lease": true })),
        ("agents-nostore", json!({ "no_store": true })),
    ])
    .await;
    bao.ssh("deploy,ops").await;
    let clock: Arc<TestClock> = Arc::default();
    let resources = [
        resource("ca/plain", &pki("agents", ""), NAMES),
        resource(
            "ca/leased",
            &pki("agents-leased", "common_name = \"a.svc.test\"\ngenerate_lease = true\ndedicated = true"),
            "",
        ),
        resource("ca/nostore", &pki("agents-nostore", "common_name = \"a.svc.test\"\nno_store = true"), ""),
        resource("ssh/ops", KEYS, PRINCIPALS),
    ];
    let connector = connect(&target(&bao.address(), "skew_secs = 0"), &resources, &signer, &clock, None).unwrap();
    Some(Ca { bao, connector })
}

fn set(values: &[&str]) -> Constraint {
    Constraint::Set(values.iter().map(|v| (*v).to_owned()).collect::<BTreeSet<_>>())
}

/// What the CA's record says of a serial number.
async fn revocation_time(bao: &OpenBao, serial: &str) -> Option<u64> {
    let (status, answer) = bao.call("GET", &format!("pki/cert/{serial}"), Value::Null).await;
    (status == 200).then(|| answer["data"]["revocation_time"].as_u64().unwrap())
}

#[tokio::test]
async fn a_certificate_is_issued_for_the_approved_names_and_revoked_at_the_ca() {
    let Some(ca) = start("vault_certificates: pki").await else { return };
    let c = &ca.connector;
    // Somebody else's certificates of the same roles.
    let mut theirs = Vec::new();
    for role in ["agents", "agents-leased"] {
        let issued =
            ca.bao.ok("PUT", &format!("pki/issue/{role}"), json!({ "common_name": "z.svc.test", "ttl": "300s" })).await;
        theirs.push((
            issued["data"]["serial_number"].as_str().unwrap().to_owned(),
            issued["lease_id"].as_str().unwrap().to_owned(),
        ));
    }
    for (name, constraints, lease, stored) in [
        ("ca/plain", vec![("names", set(&["b.svc.test", "a.svc.test"]))], false, true),
        ("ca/leased", vec![], true, true),
        ("ca/nostore", vec![], false, false),
    ] {
        let i = intent(name, &constraints, 120, 0);
        let minted = mint(c, &i).await.unwrap();
        assert_eq!(minted.credential.kind, "x509");
        assert!(minted.credential.secret["private_key"].expose().contains("PRIVATE KEY"));
        let text = minted.handle.to_string();
        assert!(!text.contains("PRIVATE KEY"), "{text}");
        assert_eq!(minted.handle["lease_id"].is_string(), lease, "{text}");
        assert_eq!(minted.handle["certificate"].is_string(), !stored, "{text}");
        assert!(minted.not_after.unwrap().ms_since(now()) <= 122_000, "the lifetime of the grant, not the role's hour");
        let serial = minted.credential.public["serial"].clone();
        assert_eq!(revocation_time(&ca.bao, &serial).await, stored.then_some(0));

        let gone = c.revoke(&live(&i, &minted), now()).await.unwrap();
        assert!(said(&gone).contains("shows revocation_time"), "{gone:?}");
        assert_eq!(said(&gone).contains("400 invalid lease"), lease, "{gone:?}");
        assert!(revocation_time(&ca.bao, &serial).await.unwrap() > 0);
        said(&c.revoke(&live(&i, &minted), now()).await.unwrap());

        let r = c.revocability(&i.permission, 120);
        assert_eq!((r.mode, r.residual_secs), (RevocabilityMode::NewUseOnly, 120));
        assert!(r.says.contains("CRL or OCSP"), "{}", r.says);
    }
    for (serial, lease) in theirs {
        assert_eq!(revocation_time(&ca.bao, &serial).await, Some(0), "somebody else's certificate was revoked");
        assert!(lease.is_empty() || ca.bao.is_lease(&lease).await);
    }
    assert_eq!(c.check().await.unwrap().iter().filter(|g| g.fatal).count(), 0);
}

#[tokio::test]
async fn a_certificate_with_a_lease_that_nobody_declared_is_ended_with_its_token() {
    let Some(bao) = OpenBao::start("vault_certificates: undeclared lease", 2).await else { return };
    let signer = Arc::new(Es256::new(ISSUER));
    let mint_too = "path \"pki/issue/undeclared\" { capabilities = [\"update\"] }\n";
    // The janitor may read the role, and has no right on its leases.
    bao.log_in_by(
        &signer.public_pem,
        ISSUER,
        mint_too,
        "path \"pki/roles/undeclared\" { capabilities = [\"read\"] }\n",
    )
    .await;
    bao.pki(&[("undeclared", json!({ "generate_lease": true })), ("agents", json!({}))]).await;
    let resources = [
        resource("ca/undeclared", &pki("undeclared", "common_name = \"a.svc.test\""), ""),
        resource("ca/plain", &pki("agents", "common_name = \"a.svc.test\"\ngenerate_lease = true"), ""),
    ];
    let c = connect(&target(&bao.address(), ""), &resources, &signer, &Arc::default(), None).unwrap();
    for (name, leased) in [("ca/undeclared", true), ("ca/plain", false)] {
        let i = intent(name, &[], 120, 0);
        let Err(MintError::Unknown { why, handle: Some(handle) }) = mint(&c, &i).await else {
            panic!("{name}: released")
        };
        assert!(why.contains(&format!("the role has generate_lease={leased}")), "{why}");
        let (serial, accessor) = (handle["serial"].as_str().unwrap().to_owned(), handle["accessor"].clone());
        assert_eq!((revocation_time(&bao, &serial).await, handle["lease_id"].is_string()), (Some(0), leased));
        let gone = c.revoke_unknown(&unknown(&i, Some(handle.clone())), &BTreeSet::new(), now()).await.unwrap();
        assert!(said(&gone).contains("shows revocation_time"), "{gone:?}");
        assert_eq!(said(&gone).contains("ends with its token"), leased, "{gone:?}");
        assert!(revocation_time(&bao, &serial).await.unwrap() > 0);
        let start = Instant::now();
        let left = async || {
            let token = bao.call("PUT", "auth/token/lookup-accessor", json!({ "accessor": accessor })).await.0 == 200;
            token || leased && bao.is_lease(handle["lease_id"].as_str().unwrap()).await
        };
        while left().await {
            assert!(start.elapsed() < Duration::from_secs(10), "{name}: its token or its lease lives");
        }
    }
    let gaps = c.check().await.unwrap();
    let lease = gaps.iter().filter(|g| g.fatal && g.what.contains("generate_lease of pki/roles/"));
    assert_eq!(lease.count(), 2, "{gaps:?}");
}

#[tokio::test]
async fn names_beyond_the_role_or_the_permission_are_refused_with_nothing_left() {
    let Some(ca) = start("vault_certificates: refused names").await else { return };
    let c = &ca.connector;
    for names in [set(&["x.evil.test"]), set(&["a.svc.test", "*.svc.test"]), set(&["a.svc.test,b.svc.test"]), set(&[])]
    {
        let i = intent("ca/plain", &[("names", names)], 120, 0);
        let Err(MintError::NotMinted { transient: false, why }) = mint(c, &i).await else { panic!("issued") };
        assert!(!why.is_empty());
    }
    assert!(mint(c, &intent("ca/plain", &[], 120, 0)).await.is_err(), "no name at all");
    // No token of a refused mint stays: root's own is the only one, beside the janitor's (not logged in yet).
    let tokens = ca.bao.ok("LIST", "auth/token/accessors", Value::Null).await;
    let start = Instant::now();
    let mut left = tokens["data"]["keys"].as_array().unwrap().len();
    while left > 1 && start.elapsed() < Duration::from_secs(10) {
        left = ca.bao.ok("LIST", "auth/token/accessors", Value::Null).await["data"]["keys"].as_array().unwrap().len();
    }
    assert_eq!(left, 1);
}

#[tokio::test]
async fn an_ssh_certificate_ends_at_its_time_and_not_before() {
    let Some(ca) = start("vault_certificates: ssh").await else { return };
    let c = &ca.connector;
    let i = intent("ssh/ops", &[("valid_principals", set(&["deploy"]))], 3, 0);
    let minted = mint(c, &i).await.unwrap();
    assert_eq!(minted.credential.kind, "ssh");
    assert_eq!(minted.credential.public["key_id"], i.name);
    let dir = tempfile::tempdir().unwrap();
    // OpenSSH reads both: the key belongs to the certificate, which names our lease and one principal.
    let (key, cert) = (dir.path().join("k"), dir.path().join("k-cert.pub"));
    std::fs::write(&key, minted.credential.secret["private_key"].expose()).unwrap();
    std::os::unix::fs::chown(&key, None, None).unwrap();
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    std::fs::write(&cert, &minted.credential.public["certificate"]).unwrap();
    match Command::new("ssh-keygen").arg("-y").arg("-f").arg(&key).output() {
        Ok(out) => {
            let public = String::from_utf8(out.stdout).unwrap();
            assert!(
                minted.credential.public["public_key"]
                    .starts_with(public.split(' ').take(2).collect::<Vec<_>>().join(" ").trim()),
                "{public}"
            );
            let shown = Command::new("ssh-keygen").arg("-L").arg("-f").arg(&cert).output().unwrap();
            let shown = String::from_utf8(shown.stdout).unwrap();
            assert!(
                shown.contains(&i.name)
                    && shown.contains("deploy")
                    && shown.contains("permit-pty")
                    && !shown.contains("ops\n"),
                "{shown}"
            );
        }
        Err(_) => assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "no ssh-keygen"),
    }
    let lease = live(&i, &minted);
    let not_after = minted.not_after.unwrap();
    let accessor = minted.handle["accessor"].clone();
    let Err(RevokeError::EndsAt { at }) = c.revoke(&lease, now()).await else { panic!("nothing ends it early") };
    assert_eq!(at, not_after);
    // Its token ended all the same.
    let start = Instant::now();
    while ca.bao.call("PUT", "auth/token/lookup-accessor", json!({ "accessor": accessor })).await.0 == 200 {
        assert!(start.elapsed() < Duration::from_secs(10));
    }
    // No call from the agent: it is `Expired` when it is.
    let gone = loop {
        match c.revoke(&lease, now()).await {
            Ok(gone) => break gone,
            Err(RevokeError::EndsAt { .. }) => assert!(now().ms_since(not_after) < 10_000, "never expired"),
            Err(e) => panic!("{e}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(gone.evidence, Evidence::Expired { not_after, skew_secs: 0 });
    assert!(now() > not_after);
    assert_eq!(c.revocability(&i.permission, 60).mode, RevocabilityMode::ExpiryOnly);
}

#[tokio::test]
async fn a17_no_ssh_certificate_without_or_beyond_the_approved_principals() {
    let Some(ca) = start("vault_certificates: A17").await else { return };
    for principals in [
        vec![],
        vec![("valid_principals", set(&[]))],
        vec![("valid_principals", set(&["root"]))],
        vec![("valid_principals", set(&["deploy,root"]))],
        vec![("valid_principals", set(&["*"]))],
    ] {
        let i = intent("ssh/ops", &principals, 60, 0);
        assert!(
            matches!(mint(&ca.connector, &i).await, Err(MintError::NotMinted { transient: false, .. })),
            "{principals:?}"
        );
    }
    // Also not where the role would sign anything.
    ca.bao.ok("PUT", "ssh/roles/ops", json!({
        "key_type": "ca", "allow_user_certificates": true, "allowed_users": "*", "default_user": "root", "allow_empty_principals": true,
        "allow_user_key_ids": false, "ttl": "10m", "max_ttl": "1h",
    })).await;
    assert!(mint(&ca.connector, &intent("ssh/ops", &[], 60, 0)).await.is_err());
    let gaps = ca.connector.check().await.unwrap();
    for what in ["doesn't allow key ids", "every principal"] {
        assert!(gaps.iter().any(|g| g.what.contains(what)), "{what}: {gaps:?}");
    }
}

#[tokio::test]
async fn a_lost_answer_of_a_leased_certificate_is_found_and_revoked() {
    let Some(ca) = start("vault_certificates: in doubt").await else { return };
    let i = intent("ca/leased", &[], 120, 0);
    let handle = ca.connector.prepare(&i).await.unwrap();
    let lost = ca.connector.mint(&i, handle.as_ref(), &context()).await.unwrap();
    let serial = lost.credential.public["serial"].clone();
    drop(lost);
    let lease = unknown(&i, handle);
    let start = Instant::now();
    while revocation_time(&ca.bao, &serial).await == Some(0) {
        assert!(start.elapsed() < Duration::from_secs(30));
        let result = ca.connector.revoke_unknown(&lease, &BTreeSet::new(), now()).await;
        assert!(matches!(result, Err(RevokeError::Retry { .. } | RevokeError::EndsAt { .. })), "{result:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(ca.bao.leases("pki/issue/agents-leased").await.is_empty());
}

#[tokio::test]
async fn in_a_namespace_everything_works_and_in_a_wrong_one_nothing_is_gone() {
    let Some(mut bao) = OpenBao::start("vault_certificates: namespaces", 2).await else { return };
    let signer = Arc::new(Es256::new(ISSUER));
    bao.ok("PUT", "sys/namespaces/team", json!({})).await;
    bao.namespace = Some("team".into());
    bao.log_in_by(&signer.public_pem, ISSUER, "", "").await;
    bao.pki(&[("agents-leased", json!({ "generate_lease": true }))]).await;
    let leased = [resource(
        "ca/leased",
        &pki("agents-leased", "common_name = \"a.svc.test\"\ngenerate_lease = true\ndedicated = true"),
        "",
    )];
    let clock: Arc<TestClock> = Arc::default();
    let c = connect(&target(&bao.address(), "namespace = \"team\""), &leased, &signer, &clock, None).unwrap();
    let i = intent("ca/leased", &[], 120, 0);
    let minted = mint(&c, &i).await.unwrap();
    assert_eq!(minted.handle["namespace"], "team");
    assert_eq!(c.sweep().await.unwrap().len(), 1);

    // A handle that says another namespace, or none: its own log-in is refused there, and that is no evidence.
    for wrong in [json!("nowhere"), Value::Null] {
        let mut lease = live(&i, &minted);
        lease.handle.as_mut().unwrap()["namespace"] = wrong.clone();
        let result = c.revoke(&lease, now()).await;
        assert!(matches!(result, Err(RevokeError::Retry { .. })), "{wrong}: {result:?}");
    }
    // A connector of the wrong namespace mints nothing and still ends what the handle names.
    let elsewhere =
        connect(&target(&bao.address(), "namespace = \"nowhere\""), &leased, &signer, &clock, None).unwrap();
    assert!(matches!(mint(&elsewhere, &i).await, Err(MintError::NotMinted { transient: false, .. })));
    assert!(elsewhere.sweep().await.is_err());
    said(&elsewhere.revoke(&live(&i, &minted), now()).await.unwrap());
    assert_eq!(c.sweep().await.unwrap(), []);
}

#[tokio::test]
async fn only_the_named_ca_is_trusted_for_the_connection() {
    let make_ca = || {
        let pair = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&pair).unwrap();
        (certificate.pem(), rcgen::Issuer::new(params, pair))
    };
    let (ca, issuer) = make_ca();
    let (other_ca, _) = make_ca();
    let pair = rcgen::KeyPair::generate().unwrap();
    let certificate =
        rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().signed_by(&pair, &issuer).unwrap();
    let (certificate, key) = (certificate.pem(), pair.serialize_pem());
    let Some(bao) = OpenBao::start_with("vault_certificates: TLS", 2, Some((&ca, &certificate, &key))).await else {
        return;
    };
    let signer = Arc::new(Es256::new(ISSUER));
    bao.log_in_by(&signer.public_pem, ISSUER, "", "").await;
    bao.pki(&[("agents", json!({}))]).await;
    let resources = [resource("ca/plain", &pki("agents", "common_name = \"a.svc.test\""), "")];
    let dir = tempfile::tempdir().unwrap();
    for (name, pem, trusted) in [("ca.pem", &ca, true), ("other.pem", &other_ca, false)] {
        let file = dir.path().join(name);
        std::fs::write(&file, pem).unwrap();
        let to = target(&bao.address(), &format!("ca_file = \"{}\"", file.display()));
        let connector = connect(&to, &resources, &signer, &Arc::default(), None).unwrap();
        let minted = mint(&connector, &intent("ca/plain", &[], 60, 0)).await;
        assert!(
            if trusted { minted.is_ok() } else { matches!(minted, Err(MintError::NotMinted { transient: true, .. })) },
            "{name}: {minted:?}"
        );
    }
    // Without `ca_file` the system's roots decide: they don't know it.
    let connector = connect(&target(&bao.address(), ""), &resources, &signer, &Arc::default(), None).unwrap();
    assert!(mint(&connector, &intent("ca/plain", &[], 60, 0)).await.is_err());
    // A file that holds no certificate is a problem at load.
    let file = dir.path().join("empty.pem");
    std::fs::write(&file, "nothing").unwrap();
    let to = target(&bao.address(), &format!("ca_file = \"{}\"", file.display()));
    assert!(connect(&to, &resources, &signer, &Arc::default(), None).is_err());
}
