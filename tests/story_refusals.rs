//! "When I am refused, I am told what is wrong and what to do, and nobody learns more than that."

#[path = "support/broker.rs"]
mod broker;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as B64;
use broker::agent::{Agent, customers, notes, request, webhooks};
use broker::{Answer, DOMAIN, Plan, Shifted, World};
use countersign::client::tls;
use countersign::identity::dev_authority::DevAuthority;
use serde_json::{Value, json};

/// Stands in every input that is refused, and may be in no answer.
const MARK: &str = "MARK<7f3a>\u{202e}";

async fn world(people: bool) -> Option<World> {
    Plan { people, ..Plan::default() }.start("story_refusals").await
}

#[tokio::test]
async fn what_cannot_be_asked_for() {
    let Some(world) = world(false).await else { return };
    let ops = world.agent("ops");
    let want = |change: Value| {
        let mut want = webhooks();
        for (key, value) in change.as_object().unwrap() {
            want[key] = value.clone();
        }
        want
    };
    let cases = [
        (want(json!({ "identifier": "api/webhook" })), "identifier", "there is no resource"),
        (want(json!({ "identifier": MARK })), "identifier", "there is no resource"),
        (want(json!({ "identifier": 7 })), "identifier", "must name a resource"),
        (want(json!({ "type": "postgres" })), "type", "is `token`"),
        (want(json!({ "type": MARK })), "type", "is `token`"),
        (want(json!({ "actions": [] })), "actions", "must be a list"),
        (want(json!({ "actions": "post" })), "actions", "must be a list"),
        (want(json!({ "actions": ["delete"] })), "actions", "has no action"),
        (want(json!({ "actions": [MARK] })), "actions", "has no action"),
        (want(json!({ MARK: true })), "authorization_details", "unknown field"),
        (want(json!({ "tables": ["x"] })), "tables", "unknown field"),
        (want(json!({ "locations": ["https://hooks.test"] })), "locations", "unknown field"),
        // Beyond the catalogue.
        (want(json!({ "calls": 101 })), "calls", "at most 100"),
        (want(json!({ "calls": -1 })), "calls", "whole number"),
        (want(json!({ "calls": "1" })), "calls", "whole number"),
        (want(json!({ "paths": ["/admin"] })), "paths", ""),
        (want(json!({ "paths": ["/"] })), "paths", ""),
        (want(json!({ "paths": ["/partners/../admin"] })), "paths", "absolute"),
        (want(json!({ "paths": ["/partners/%2e%2e/admin"] })), "paths", "absolute"),
        (want(json!({ "paths": [MARK] })), "paths", ""),
        (want(json!({ "paths": [] })), "paths", "must be a list"),
        (json!(MARK), "authorization_details", "JSON object"),
    ];
    for (want, field, says) in cases {
        let answer = ops.ask("T-1", want.clone()).await;
        let why = answer.problem(400, "invalid-authorization-details");
        assert!(
            why.starts_with("authorization_details[0]: ") && why.contains(field) && why.contains(says),
            "{want}: {why}"
        );
        assert!(answer.json()["next"].as_str().unwrap().contains("/v1/catalogue"), "{}", answer.text());
        no_mark(&answer);
    }
    let near = ops.ask("T-1", want(json!({ "identifier": "api/webhook" }))).await.json();
    assert_eq!(near["nearest"], json!(["api/webhooks"]), "{near}");
    for details in [json!([]), json!(vec![webhooks(); 17])] {
        let mut body = request("T-1", webhooks());
        body["authorization_details"] = details;
        ops.post("/v1/grants", &body).await.problem(400, "invalid-authorization-details");
    }
}

#[track_caller]
fn no_mark(answer: &Answer) {
    let text = answer.text();
    assert!(!text.contains("MARK") && !text.contains("7f3a") && !text.contains('\u{202e}'), "{text}");
}

#[tokio::test]
async fn a_request_that_cannot_be_read_or_used() {
    let Some(world) = world(false).await else { return };
    let ops = world.agent("ops");
    let with = |field: &str, value: Value| {
        let mut body = request("T-1", notes());
        body[field] = value;
        body
    };
    let long = format!("{MARK}{}", "x".repeat(500));
    for (field, value, says) in [
        ("intent", json!(""), "1 to 500 characters"),
        ("intent", json!(long), "1 to 500 characters"),
        ("intent", json!("MARK\u{1b}[2J\u{1b}]8;;https://evil.example\u{7}"), "control characters"),
        ("intent", json!("MARK one\ntwo"), "control characters"),
        ("intent", json!("MARK\u{85}"), "control characters"),
        ("intent", json!("MARK\u{0}"), "control characters"),
        ("life_secs", json!(0), "1 to 86400"),
        ("life_secs", json!(86_401), "1 to 86400"),
        ("heartbeat_secs", json!(601), "5 to 600"),
        ("bind", json!(true), "mutual TLS"),
    ] {
        let answer = ops.post("/v1/grants", &with(field, value.clone())).await;
        let why = answer.problem(400, "invalid-request");
        assert!(why.starts_with(&format!("{field}: ")) && why.contains(says), "{field} {value}: {why}");
        no_mark(&answer);
    }
    for (field, value) in [
        (MARK, json!(1)),
        ("owner", json!("MARK")),
        ("tier", json!("observe")),
        ("task", json!(7)),
        ("task", json!("")),
        ("task", json!("MARK\n")),
        ("task", json!("x".repeat(129))),
        ("intent", json!({ "MARK": 1 })),
        ("life_secs", json!(-1)),
        ("life_secs", json!(1.5)),
        ("life_secs", json!("600 MARK")),
        ("parent", json!("MARK")),
        ("bind", json!("MARK")),
        ("authorization_details", json!("MARK")),
    ] {
        let answer = ops.post("/v1/grants", &with(field, value.clone())).await;
        answer.problem(400, "invalid-json");
        no_mark(&answer);
    }
    for missing in ["task", "intent", "life_secs", "authorization_details"] {
        let mut body = request("T-1", notes());
        body.as_object_mut().unwrap().remove(missing);
        let why = ops.post("/v1/grants", &body).await.problem(400, "invalid-json");
        assert!(why.contains(missing), "{why}");
    }
    // Two members of one name: whoever reads it later could take the other.
    let twice = r#"{"task":"T-1","task":"T-2","intent":"MARK","life_secs":60,"authorization_details":[]}"#;
    let inside = r#"{"task":"T-1","intent":"x","life_secs":60,"authorization_details":[{"type":"token","identifier":"api/notes","actions":["read"],"actions":["MARK"]}]}"#;
    for body in [twice, inside, "MARK", "{", "[1,2", "\u{feff}{}", "{\"task\":\"\u{0}\"}", "nullMARK"] {
        let answer = Answer::of(ops.posting("/v1/grants").header("content-type", "application/json").body(body)).await;
        answer.problem(400, "invalid-json");
        no_mark(&answer);
    }
    let form = ops.posting("/v1/grants").form(&[("task", "MARK")]);
    Answer::of(form).await.problem(415, "media-type");
    for (method, path) in
        [("GET", "/v1/MARK"), ("GET", "/"), ("POST", "/v2/grants"), ("GET", "/v1/grants/../catalogue/x")]
    {
        let url = format!("{}{path}", ops.base);
        let answer = Answer::of(ops.http.request(method.parse().unwrap(), url)).await;
        answer.problem(404, "no-such-address");
        no_mark(&answer);
    }
    ops.get("/v1/grants").await.problem(405, "method");
}

#[tokio::test]
async fn who_cannot_prove_what_they_are() {
    let Some(world) = world(false).await else { return };
    let ops = world.agent("ops");
    let url = world.ports.agent_url();
    let good = ops.token.clone().unwrap();
    let jwt = |authority: &DevAuthority, audience: &[&str]| authority.jwt_svid(&ops.id, audience, 300).unwrap();
    // An hour-old one that lived five minutes, from the right authority.
    world.clock.0.store(3600, Ordering::SeqCst);
    let expired = jwt(&world.authority, &[&url]);
    world.clock.0.store(0, Ordering::SeqCst);
    let elsewhere = DevAuthority::new("other.test", Arc::new(Shifted::default())).unwrap();
    let impostor = DevAuthority::new(DOMAIN, Arc::new(Shifted::default())).unwrap();
    let (header, rest) = good.split_once('.').unwrap();
    let (claims, signature) = rest.split_once('.').unwrap();
    let none = B64.encode(r#"{"alg":"none","typ":"JWT"}"#);
    let hmac = B64.encode(r#"{"alg":"HS256","typ":"JWT"}"#);
    let other_claims =
        B64.encode(String::from_utf8(B64.decode(claims).unwrap()).unwrap().replace("/agent/ops", "/agent/other"));
    let foreign = elsewhere.jwt_svid("spiffe://other.test/agent/ops", &[&url], 300).unwrap();
    let cases = [
        (expired, "expired"),
        (jwt(&world.authority, &["https://other.test"]), "audience"),
        (jwt(&world.authority, &[&url, "https://other.test"]), "audience"),
        (jwt(&world.authority, &[&format!("{url}/")]), "audience"),
        (format!("{none}.{claims}."), ""),
        (format!("{none}.{claims}.{signature}"), ""),
        (format!("{hmac}.{claims}.{signature}"), ""),
        (format!("{header}.{claims}."), ""),
        (format!("{header}.{other_claims}.{signature}"), "signature"),
        (jwt(&impostor, &[&url]), "signature"),
        (foreign, "issuer is not known"),
        ("MARK".to_owned(), "malformed"),
        ("a.b.c".to_owned(), "malformed"),
        (format!("{good}.x"), "malformed"),
    ];
    for (token, says) in cases {
        let one = Agent { token: Some(token.clone()), ..ops.clone() };
        let answer = one.ask("T-1", notes()).await;
        let why = answer.problem(401, "identity");
        assert!(why.contains(says), "{token:.60}: {why}");
        let secret = token.rsplit('.').next().unwrap_or_default();
        // One letter stands in every answer.
        assert!(secret.len() < 4 || !answer.text().contains(secret), "{}", answer.text());
        no_mark(&answer);
        one.get("/v1/catalogue").await.problem(401, "identity");
        Answer::of(one.posting("/introspect").form(&[("token", "x")])).await.problem(401, "identity");
    }
    // Nothing at all, another scheme, two of them, and two identities in one request.
    let plain = || ops.http.post(format!("{url}/v1/grants")).json(&request("T-1", notes()));
    Answer::of(plain()).await.problem(401, "identity");
    Answer::of(plain().basic_auth("MARK", Some("MARK"))).await.problem(401, "identity");
    Answer::of(plain().bearer_auth(&good).header("authorization", format!("Bearer {good}")))
        .await
        .problem(400, "identity");
    let certificate = world.agent_mtls("ops");
    Answer::of(certificate.posting("/v1/grants").bearer_auth(&good).json(&json!({})))
        .await
        .problem(400, "two-identities");
    // Certificates that no bundle knows, and none.
    let ca = world.file("ca.pem");
    let mtls = world.ports.mtls_url();
    world.clock.0.store(7200, Ordering::SeqCst);
    let old = world.authority.x509_svid(&ops.id, &[], 3600).unwrap();
    world.clock.0.store(0, Ordering::SeqCst);
    for svid in [
        Some(impostor.x509_svid(&ops.id, &[], 300).unwrap()),
        Some(elsewhere.x509_svid("spiffe://other.test/agent/ops", &[], 300).unwrap()),
        Some(old),
        None,
    ] {
        let http = tls::http(Some(&ca), svid.as_ref()).unwrap();
        let answer = http.get(format!("{mtls}/v1/catalogue")).send().await;
        assert!(answer.is_err(), "the handshake fails: {:?}", answer.unwrap().status());
    }
    assert_eq!(certificate.get("/v1/catalogue").await.status, 200);
    // An agent without anybody who answers for it reaches nothing that needs a vote.
    let stray = world.agent("robots/stray");
    let answer = stray.ask("T-1", customers("read")).await;
    answer.problem(403, "denied");
    assert!(answer.json()["rule"].is_string(), "{}", answer.text());
    stray.ask("T-1", notes()).await.ok();
}

#[tokio::test]
async fn credentials_only_while_it_is_in_force() {
    let Some(world) = world(true).await else { return };
    let ops = world.agent("ops");
    let ana = world.browser("ana").await;
    let id = ops.asked("T-1", customers("read")).await;
    let why = ops.collect(&id).await.problem(409, "state");
    assert!(why.contains("pending"), "{why}");
    for path in ["heartbeat", "invocations"] {
        let report =
            if path == "heartbeat" { json!({}) } else { json!({ "invocation": { "tool": "x", "status": "ok" } }) };
        assert_eq!(ops.post(&format!("/v1/grants/{id}/{path}"), &report).await.status, 409, "{path}");
    }
    ana.approved(&id).await;
    ops.cancel(&id).await.problem(409, "state");
    ops.collect(&id).await.ok();
    ops.complete(&id).await.ok();
    for replace in [false, true] {
        ops.post(&format!("/v1/grants/{id}/credentials"), &json!({ "replace": replace })).await.problem(409, "over");
    }
    let ended = ops.wait(&id, "ended").await;
    ops.collect(&id).await.problem(409, "over");
    assert_eq!(ended["leases"].as_array().unwrap().len(), 1);

    let (cancelled, denied) = (ops.asked("T-2", customers("read")).await, ops.asked("T-2", customers("read")).await);
    ops.cancel(&cancelled).await.ok();
    ops.cancel(&cancelled).await.ok();
    assert_eq!(ana.deny(&denied, "no, and \u{202e}why").await.status, 303);
    for id in [&cancelled, &denied] {
        ops.collect(id).await.problem(409, "over");
    }
    assert_eq!(ops.show(&denied).await["state"], "denied");
    // A vote with a reason that is too long, or one that moves somebody's cursor.
    let id = ops.asked("T-3", customers("read")).await;
    let form = ana.form(&id).await;
    for reason in ["x".repeat(2000), "\u{1b}[2J".to_owned()] {
        let answer = ana.vote(&id, &form, form.digest.as_ref().unwrap(), "deny", &reason).await;
        assert_eq!(answer.status, 400, "{}", answer.text());
    }
    for verdict in ["maybe", "Approve", ""] {
        let answer = ana.vote(&id, &form, form.digest.as_ref().unwrap(), verdict, "").await;
        assert_eq!(answer.status, 400, "{}", answer.text());
    }
    assert_eq!(ops.state(&id).await, "pending");
}

#[tokio::test]
async fn an_account_that_the_directory_does_not_know_gets_no_session() {
    let Some(world) = world(true).await else { return };
    let refused = world.try_browser("mallory").await.err().expect("no session");
    assert_eq!(refused.status, 403);
    assert!(refused.text().contains("people directory has no such account"), "{}", refused.text());
    // The same name in another case, or with something around it, is another account (A15).
    for other in ["Ana", "ana ", " ana", "ana.", "\u{ff41}na"] {
        assert!(world.try_browser(other).await.is_err(), "{other:?}");
    }
    world.browser("ana").await;
}
