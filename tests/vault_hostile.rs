//! Targets that lie, and things between us and them: what they answer gets no secret out, is never released if it isn't what
//! was approved, and proves nothing.

#[path = "support/openbao.rs"]
mod openbao;
#[path = "support/vault_world.rs"]
mod world;

use std::sync::Arc;
use std::time::{Duration, Instant};

use countersign::connector::{Connector, MintError, RevokeError};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use world::*;

const LEASE_PATH: &str = "database/creds/billing-ro";

/// A server that answers log-ins as it should and everything else with these bytes (or never).
async fn hostile(answer: Option<Vec<u8>>) -> String {
    hostile_by(move |_| answer.clone()).await
}

async fn hostile_by(answer: impl Fn(&str) -> Option<Vec<u8>> + Send + Sync + 'static) -> String {
    let answer = Arc::new(answer);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let Ok((mut tcp, _)) = listener.accept().await else { return };
            let answer = answer.clone();
            tokio::spawn(async move {
                let mut buffer = vec![0u8; 16 * 1024];
                let mut n = 0;
                // Headers and body may come apart.
                while let Ok(more) = tokio::time::timeout(Duration::from_millis(100), tcp.read(&mut buffer[n..])).await
                {
                    n += more.as_ref().map_or(0, |m| *m);
                    if more.is_err()
                        || n == 0
                        || buffer[..n].ends_with(b"}")
                        || buffer[..n].ends_with(b"\r\n\r\n") && buffer.starts_with(b"GET")
                    {
                        break;
                    }
                }
                let request = String::from_utf8_lossy(&buffer[..n]).into_owned();
                let login = request.contains("/login");
                if login {
                    let body = r#"{"auth":{"client_token":"s.CANARY-token","accessor":"acc","lease_duration":600,"token_type":"service","policies":["m"]}}"#;
                    let _ = tcp.write_all(http(200, body).as_bytes()).await;
                } else if let Some(bytes) = answer(&request) {
                    let _ = tcp.write_all(&bytes).await;
                } else {
                    let _ = tcp.read(&mut buffer).await;
                }
            });
        }
    });
    address
}

fn http(status: u16, body: &str) -> String {
    format!(
        "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[tokio::test]
async fn a_hostile_target_gets_no_secret_out_and_is_never_called_failed_in_doubt() {
    let followed = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let other = hostile_by({
        let followed = followed.clone();
        move |_| {
            followed.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            None
        }
    })
    .await;
    let cases: Vec<(&str, Option<Vec<u8>>)> = vec![
        ("redirect", Some(format!("HTTP/1.1 307 X\r\nLocation: {other}/v1/x\r\nContent-Length: 0\r\n\r\n").into_bytes())),
        ("too large", Some({
            let mut all = b"HTTP/1.1 200 X\r\nContent-Length: 5000000\r\n\r\n{\"data\":\"CANARY".to_vec();
            all.resize(5_000_100, b'x');
            all
        })),
        ("no JSON", Some(http(200, "CANARY-password").into_bytes())),
        ("half an answer", Some(b"HTTP/1.1 200 X\r\nContent-Length: 500\r\n\r\n{\"data\":{\"password\":\"CANARY".to_vec())),
        ("wrong types", Some(http(200, r#"{"lease_id":"database/creds/billing-ro/x","lease_duration":"CANARY","data":{}}"#).into_bytes())),
        ("lease elsewhere", Some(http(200, r#"{"lease_id":"database/creds/other/CANARY","lease_duration":60,"data":{"username":"u","password":"CANARY"}}"#).into_bytes())),
        ("lease with dots", Some(http(200, r#"{"lease_id":"database/creds/billing-ro/../../sys/CANARY","data":{"username":"u","password":"CANARY"}}"#).into_bytes())),
        ("no lease", Some(http(200, r#"{"lease_id":"","lease_duration":60,"data":{"username":"u","password":"CANARY"}}"#).into_bytes())),
        ("no password", Some(http(200, r#"{"lease_id":"database/creds/billing-ro/x","lease_duration":60,"data":{"username":"u"}}"#).into_bytes())),
        ("500 that quotes", Some(http(500, r#"{"errors":["CREATE ROLE x PASSWORD 'CANARY'"]}"#).into_bytes())),
        ("a gateway's 503", Some(http(503, "<html>CANARY</html>").into_bytes())),
        ("silence", None),
    ];
    let signer = Arc::new(Es256::new(ISSUER));
    for (what, answer) in cases {
        let address = hostile(answer).await;
        let c = connect(
            &target(&address, "request_deadline_secs = 1"),
            &[resource("bao/billing", BILLING, "")],
            &signer,
            &Arc::default(),
            None,
        )
        .unwrap();
        let i = intent("bao/billing", &[], 300, 0);
        let start = Instant::now();
        let result = mint(&c, &i).await;
        assert!(start.elapsed() < Duration::from_secs(10), "{what}: no deadline");
        let Err(MintError::Unknown { why, handle }) = result else { panic!("{what}: {result:?}") };
        assert!(!why.contains("CANARY") && !format!("{handle:?}").contains("password"), "{what}: {why}");
        let lease = unknown(
            &i,
            Some(handle.unwrap_or_else(
                || json!({ "v": 1, "engine": "database", "path": LEASE_PATH, "mount": "database", "accessor": "acc" }),
            )),
        );
        let result = c.revoke_unknown(&lease, &std::collections::BTreeSet::default(), now()).await;
        let Err(RevokeError::Retry { why }) = result else { panic!("{what}: {result:?}") };
        assert!(!why.contains("CANARY-password") && !why.contains("s.CANARY-token"), "{what}: {why}");
    }
    assert_eq!(followed.load(std::sync::atomic::Ordering::SeqCst), 0, "a redirect was followed, with the token");
}

#[tokio::test]
async fn a_gateways_404_is_no_empty_list() {
    let signer = Arc::new(Es256::new(ISSUER));
    let doubt = intent("bao/billing", &[], 300, 100);
    let handle = json!({
        "v": 1, "engine": "database", "path": LEASE_PATH, "mount": "database", "accessor": "acc", "swept": true, "life_secs_max": 600,
    });
    for (what, answer, empty) in [
        ("the target's empty list", http(404, r#"{"errors":[]}"#), true),
        ("a gateway", http(404, "<html>not here</html>"), false),
        ("a gateway without words", http(404, ""), false),
        ("a gateway with JSON", http(404, r#"{"message":"no route"}"#), false),
        ("no such namespace", http(404, r#"{"errors":["no handler for route"]}"#), false),
    ] {
        let address = hostile_by(move |request| {
            let list = request.starts_with("LIST ");
            Some(
                if list { answer.clone() } else { "HTTP/1.1 204 X\r\nConnection: close\r\n\r\n".to_owned() }
                    .into_bytes(),
            )
        })
        .await;
        let resources = [resource("bao/billing", BILLING, "")];
        let c = connect(&target(&address, ""), &resources, &signer, &Arc::default(), None).unwrap();
        assert_eq!(c.sweep().await.is_ok(), empty, "{what}");
        let result = c
            .revoke_unknown(&unknown(&doubt, Some(handle.clone())), &std::collections::BTreeSet::default(), now())
            .await;
        // Without a database behind, an empty list leaves the expiry to wait for.
        let as_empty = matches!(result, Err(RevokeError::EndsAt { .. }));
        assert!(
            as_empty == empty && (as_empty || matches!(result, Err(RevokeError::Retry { .. }))),
            "{what}: {result:?}"
        );
    }
}

#[tokio::test]
async fn certificates_that_are_not_what_was_approved_are_never_released() {
    let signer = Arc::new(Es256::new(ISSUER));
    let issue = |names: &[&str], secs: i64, serial: u64, ca: bool| {
        let pair = rcgen::KeyPair::generate().unwrap();
        let mut params =
            rcgen::CertificateParams::new(names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.serial_number = Some(serial.into());
        let now = time::OffsetDateTime::from_unix_timestamp(i64::try_from(now().secs()).unwrap()).unwrap();
        params.not_before = now;
        params.not_after = now + time::Duration::seconds(secs);
        if ca {
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        }
        let certificate = params.self_signed(&pair).unwrap().pem();
        json!({ "lease_id": "", "data": { "certificate": certificate, "private_key": "CANARY", "serial_number": "01:02" } }).to_string()
    };
    for (what, body, good) in [
        ("as approved", issue(&["a.svc"], 60, 0x0102, false), true),
        // 30 s are allowed between the clocks.
        ("by a clock that is ahead", issue(&["a.svc"], 70, 0x0102, false), true),
        ("a longer life", issue(&["a.svc"], 150, 0x0102, false), false),
        ("another name", issue(&["b.svc"], 60, 0x0102, false), false),
        ("one name more", issue(&["a.svc", "b.svc"], 60, 0x0102, false), false),
        ("an address", issue(&["a.svc", "10.0.0.1"], 60, 0x0102, false), false),
        ("no name", issue(&[], 60, 0x0102, false), false),
        ("another serial", issue(&["a.svc"], 60, 0x0103, false), false),
        ("a CA", issue(&["a.svc"], 60, 0x0102, true), false),
    ] {
        let address = hostile(Some(http(200, &body).into_bytes())).await;
        let web =
            resource("x", "engine = \"pki\"\npath = \"pki/issue/x\"\nttl_secs_max = 60\ncommon_name = \"a.svc\"", "");
        let c = connect(&target(&address, ""), &[web], &signer, &Arc::default(), None).unwrap();
        match mint(&c, &intent("x", &[], 60, 0)).await {
            Ok(_) => assert!(good, "{what}: released"),
            Err(MintError::Unknown { why, handle }) => {
                assert!(!good && why.contains("not what was asked for") && !why.contains("CANARY"), "{what}: {why}");
                assert_eq!(handle.unwrap()["serial"], "01:02", "{what}: it can't be ended");
            }
            other => panic!("{what}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn a17_an_ssh_certificate_that_opens_more_is_never_released() {
    if std::process::Command::new("ssh-keygen").arg("-?").output().is_err() {
        assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "no ssh-keygen");
        eprintln!("SKIPPED a17_an_ssh_certificate_that_opens_more_is_never_released: no ssh-keygen");
        return;
    }
    let signer = Arc::new(Es256::new(ISSUER));
    let approved = "-O clear -O permit-pty -O force-command=/bin/date ";
    let good = format!("{approved} -n deploy -V -1m:+1m");
    for (what, options, other_key, released) in [
        ("as approved", good.clone(), false, true),
        ("by a clock that is ahead", format!("{approved} -n deploy -V -1m:+70s"), false, true),
        ("longer", format!("{approved} -n deploy -V -1m:+150s"), false, false),
        ("no principals", format!("{approved} -V -1m:+1m"), false, false),
        ("one principal more", format!("{approved} -n deploy,root -V -1m:+1m"), false, false),
        ("for ever", format!("{approved} -n deploy"), false, false),
        ("a host certificate", "-h -n deploy -V -1m:+1m".to_owned(), false, false),
        ("an extra extension", format!("{good} -O permit-port-forwarding"), false, false),
        ("all extensions of a default", good.replace("-O clear ", ""), false, false),
        ("no force-command", good.replace("-O force-command=/bin/date", ""), false, false),
        ("another force-command", good.replace("/bin/date", "/bin/sh"), false, false),
        ("another key", good.clone(), true, false),
    ] {
        let options: Vec<String> = options.split_whitespace().map(str::to_owned).collect();
        let address = hostile_by(move |request| {
            let body: Value = serde_json::from_str(&request[request.find("\r\n\r\n")? + 4..]).ok()?;
            let dir = tempfile::tempdir().unwrap();
            let at = |name: &str| dir.path().join(name);
            let keygen = |args: &[&str]| {
                let out = std::process::Command::new("ssh-keygen").current_dir(dir.path()).args(args).output().unwrap();
                assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            };
            keygen(&["-q", "-t", "ed25519", "-N", "", "-f", "ca"]);
            std::fs::write(at("k.pub"), body["public_key"].as_str()?).unwrap();
            if other_key {
                std::fs::copy(at("ca.pub"), at("k.pub")).unwrap();
            }
            let mut args = vec!["-q", "-s", "ca", "-I", body["key_id"].as_str()?];
            args.extend(options.iter().map(String::as_str));
            args.push("k.pub");
            keygen(&args);
            let certificate = std::fs::read_to_string(at("k-cert.pub")).unwrap();
            Some(
                http(200, &json!({ "data": { "serial_number": "0a", "signed_key": certificate } }).to_string())
                    .into_bytes(),
            )
        })
        .await;
        let ops = resource(
            "x",
            "engine = \"ssh\"\npath = \"ssh/sign/x\"\nttl_secs_max = 60\nvalid_principals = [\"deploy\"]\n\
             extensions = { permit-pty = \"\" }\ncritical_options = { force-command = \"/bin/date\" }",
            "",
        );
        let c = connect(&target(&address, ""), &[ops], &signer, &Arc::default(), None).unwrap();
        match mint(&c, &intent("x", &[], 60, 0)).await {
            Ok(_) => assert!(released, "{what}: released"),
            Err(MintError::Unknown { why, handle }) => {
                assert!(!released && why.contains("not what was asked for"), "{what}: {why}");
                assert_eq!(handle.unwrap()["serial"], "0a");
            }
            other => panic!("{what}: {other:?}"),
        }
    }
}
