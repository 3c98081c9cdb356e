//! "I collect my credentials once, whoever else tries and however often I ask."

#[path = "support/broker.rs"]
mod broker;

use std::sync::Arc;

use broker::agent::{Agent, Login, customers, notes, request, sandbox};
use broker::{Answer, Plan, World, target, until};
use countersign::client::agent::fresh_key;
use countersign::core::id::GrantId;
use futures::future::join_all;
use rustix::process::Signal;
use rustls_pki_types::pem::PemObject as _;
use serde_json::{Value, json};

/// The same agent with all its calls on one HTTP/2 connection, so that they arrive in the order in which they are sent.
fn on_one_connection(world: &World, agent: &Agent) -> Agent {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(rustls_pki_types::CertificateDer::from_pem_file(world.file("ca.pem")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let http = reqwest::Client::builder().tls_backend_preconfigured(config).no_proxy().build().unwrap();
    Agent { http, ..agent.clone() }
}

/// Sixteen redemptions that are all under way before the target answers the first.
async fn sixteen(world: &World, ops: &Agent, id: &str, key: impl Fn(usize) -> String) -> Vec<Answer> {
    let one = on_one_connection(world, ops);
    assert_eq!(one.get("/v1/catalogue").await.status, 200, "the connection is up");
    let admin = world.cluster().admin("postgres").await;
    target::backends(&admin, Signal::STOP).await;
    let path = format!("/v1/grants/{id}/credentials");
    let calls: Vec<_> = (0..16)
        .map(|i| {
            let call = one.posting(&path).header("idempotency-key", key(i)).json(&json!({}));
            tokio::spawn(Answer::of(call))
        })
        .collect();
    // Sent after all of them on the same connection: once it is answered, they are there.
    for _ in 0..3 {
        one.show(id).await;
    }
    until("the mint is intended", async || ops.show(id).await["leases"][0]["state"] == "intended").await;
    target::backends(&admin, Signal::CONT).await;
    join_all(calls).await.into_iter().map(Result::unwrap).collect()
}

#[tokio::test]
async fn l9_sixteen_redemptions_with_one_key_are_one_and_with_sixteen_keys_one_wins() {
    let Some(world) = Plan { postgres: true, ..Plan::default() }.start("story_handover").await else { return };
    let ops = world.agent("ops");
    let admin = world.cluster().admin("postgres").await;
    let warm = ops.asked("T-0", sandbox()).await;
    ops.login(&warm).await;
    ops.complete(&warm).await.ok();
    ops.wait(&warm, "ended").await;

    let id = ops.asked("T-1", sandbox()).await;
    let answers = sixteen(&world, &ops, &id, |_| "one-key".to_owned()).await;
    let first = Login::of(&answers[0].ok());
    for answer in &answers {
        assert_eq!((answer.status, answer.text()), (200, answers[0].text()));
    }
    assert_eq!(target::leases(&admin).await, std::slice::from_ref(&first.user), "one role at the target");
    assert_eq!(ops.show(&id).await["leases"].as_array().unwrap().len(), 1);
    world.cluster().login(&first.user, &first.password, &first.database).await.unwrap();
    // The same key afterwards brings nothing back: no reply is kept.
    let late = ops.post_with_key(&format!("/v1/grants/{id}/credentials"), "one-key", &json!({})).await;
    late.problem(409, "already-released");

    let id = ops.asked("T-2", sandbox()).await;
    let answers = sixteen(&world, &ops, &id, |i| format!("key-{i}")).await;
    let won: Vec<&Answer> = answers.iter().filter(|a| a.status == 200).collect();
    assert_eq!(won.len(), 1, "{:?}", answers.iter().map(|a| a.status).collect::<Vec<_>>());
    for lost in answers.iter().filter(|a| a.status != 200) {
        lost.problem(409, "in-progress");
    }
    let second = Login::of(&won[0].ok());
    let mut both = vec![first.user, second.user];
    both.sort();
    assert_eq!(target::leases(&admin).await, both);
    assert_eq!(ops.show(&id).await["leases"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn when_the_answer_was_lost_i_replace_it_and_the_lost_one_dies() {
    let Some(world) = Plan { postgres: true, people: true, ..Plan::default() }.start("story_handover").await else {
        return;
    };
    let ops = world.agent("ops");
    let client = ops.client();
    let id = ops.asked("T-1", sandbox()).await;
    let grant: GrantId = id.parse().unwrap();
    let lost = ops.login(&id).await;
    let session = world.cluster().login(&lost.user, &lost.password, &lost.database).await.unwrap();
    let refused = client.credentials(grant, false, &fresh_key()).await.unwrap_err();
    assert_eq!(refused.word(), Some("already-released"));
    assert!(refused.to_string().contains("replace=true"), "{refused}");

    let again = client.credentials(grant, true, &fresh_key()).await.unwrap();
    let user = &again.credentials[0].public["user"];
    assert_ne!(*user, lost.user);
    world.cluster().login(user, again.credentials[0].secret["password"].expose(), &lost.database).await.unwrap();
    until("the lost one is ended", async || {
        let shown = ops.show(&id).await;
        shown["leases"][0]["state"] == "revoked" && shown["leases"][0]["evidence"].is_object()
    })
    .await;
    until("its session is cut", async || session.is_closed()).await;
    assert!(world.cluster().login(&lost.user, &lost.password, &lost.database).await.is_err());
    let shown = ops.show(&id).await;
    assert_eq!((&shown["state"], &shown["leases"][1]["state"]), (&json!("active"), &json!("live")));
    assert!(world.broker.stderr().contains("asked for again and replaced"), "the operator hears of it");
    let record = world.browser("chen").await.form(&id).await.page;
    assert!(record.contains("replaced: asked for again"), "{record}");
}

#[tokio::test]
async fn d8_what_i_bound_to_my_certificate_a_stolen_token_does_not_collect() {
    let Some(world) = Plan::default().start("story_handover").await else { return };
    let (by_certificate, by_token) = (world.agent_mtls("ops"), world.agent("ops"));
    let mut bound = request("T-1", notes());
    bound["bind"] = json!(true);
    let why = by_token.post("/v1/grants", &bound).await.problem(400, "invalid-request");
    assert!(why.contains("mTLS"), "{why}");
    let id = by_certificate.post("/v1/grants", &bound).await.ok()["id"].as_str().unwrap().to_owned();
    // The same agent by a token, and by another key of its own.
    by_token.collect(&id).await.problem(403, "not-bound");
    world.agent_mtls("ops").collect(&id).await.problem(403, "not-bound");
    // Another agent's certificate learns not even that.
    world.agent_mtls("other").collect(&id).await.problem(404, "not-found");
    let issued = by_certificate.collect(&id).await.ok();
    let token =
        issued["credentials"][0]["secret"].as_object().unwrap().values().next().unwrap().as_str().unwrap().to_owned();
    let about = world.introspect("notes-api", &token).await;
    assert_eq!(about["active"], true);
    assert!(about["cnf"]["x5t#S256"].is_string(), "the token is bound as well: {about}");
    // Not bound: either proof of the same agent collects.
    let id = by_certificate.asked("T-2", notes()).await;
    by_token.collect(&id).await.ok();
}

#[tokio::test]
async fn l6_somebody_elses_grant_is_no_grant() {
    let Some(world) = Plan { people: true, ..Plan::default() }.start("story_handover").await else { return };
    let (ops, other) = (world.agent("ops"), world.agent("other"));
    let active = ops.asked("T-1", notes()).await;
    let pending = ops.asked("T-1", customers("read")).await;
    let unknown = "gr_00000000000000000000000000";
    let report = json!({ "invocation": { "tool": "psql", "status": "ok" } });
    for (method, path, body) in [
        ("GET", "", Value::Null),
        ("GET", "?wait=30s", Value::Null),
        ("GET", "?wait=30s&version=2", Value::Null),
        ("POST", "/credentials", json!({})),
        ("POST", "/credentials", json!({ "replace": true })),
        ("POST", "/complete", json!({})),
        ("POST", "/cancel", json!({})),
        ("POST", "/heartbeat", json!({})),
        ("POST", "/invocations", report),
    ] {
        let mut answers = Vec::new();
        for id in [unknown, active.as_str(), pending.as_str(), "gr_1", "nonsense", "..%2Fcatalogue"] {
            let path = format!("/v1/grants/{id}{path}");
            let answer = if method == "GET" { other.get(&path).await } else { other.post(&path, &body).await };
            answer.problem(404, "not-found");
            let mut headers: Vec<_> = answer.headers.iter().filter(|(n, _)| *n != "date").collect();
            headers.sort_by_key(|(n, _)| n.as_str());
            answers.push(format!("{headers:?} {}", answer.text()));
        }
        assert!(answers.iter().all(|a| *a == answers[0]), "{method} {path}: {answers:#?}");
    }
    // Its task's name is its own: completing "T-1" is about the other's T-1.
    assert_eq!(other.post("/v1/tasks/T-1/complete", &json!({})).await.ok()["ended"], json!([]));
    assert_eq!((ops.state(&active).await, ops.state(&pending).await), ("active".to_owned(), "pending".to_owned()));
    // A token of another API is no token.
    let token =
        ops.collect(&active).await.ok()["credentials"][0]["secret"]["token"].as_str().unwrap_or_default().to_owned();
    assert!(!token.is_empty());
    let garbage = world.introspect("customers-api", "garbage").await;
    assert_eq!(world.introspect("customers-api", &token).await, garbage);
    assert_eq!(world.introspect("ops", &token).await, garbage);
    assert_eq!(garbage, json!({ "active": false }));
    assert_eq!(world.introspect("notes-api", &token).await["active"], true);
}

#[tokio::test]
async fn asking_twice_with_one_key_is_asking_once() {
    let Some(world) =
        Plan { limits: "refusals_per_agent_per_min = 2", ..Plan::default() }.start("story_handover").await
    else {
        return;
    };
    let (ops, other) = (world.agent("ops"), world.agent("other"));
    let body = request("T-1", notes());
    let all = join_all((0..8).map(|_| ops.post_with_key("/v1/grants", "k-1", &body))).await;
    let ids: Vec<Value> = all.iter().map(|a| a.ok()["id"].clone()).collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    assert_eq!(ops.post_with_key("/v1/grants", "k-1", &body).await.ok()["id"], ids[0], "later too");
    let mut changed = body.clone();
    changed["life_secs"] = json!(601);
    ops.post_with_key("/v1/grants", "k-1", &changed).await.problem(422, "idempotency-reused");
    assert_ne!(ops.post_with_key("/v1/grants", "k-2", &body).await.ok()["id"], ids[0]);
    assert_ne!(other.post_with_key("/v1/grants", "k-1", &body).await.ok()["id"], ids[0], "another agent's key");
    let without = (ops.post("/v1/grants", &body).await.ok(), ops.post("/v1/grants", &body).await.ok());
    assert_ne!(without.0["id"], without.1["id"], "no key, two requests");
    // A key that can't be used is not as good as none.
    for key in [String::new(), "x".repeat(256), "with space".to_owned()] {
        ops.post_with_key("/v1/grants", &key, &body).await.problem(400, "invalid-request");
    }
    let bytes = reqwest::header::HeaderValue::from_bytes(b"k\xe9y").unwrap();
    Answer::of(ops.posting("/v1/grants").header("idempotency-key", bytes).json(&body))
        .await
        .problem(400, "invalid-request");
    let twice = ops.posting("/v1/grants").header("idempotency-key", "a").header("idempotency-key", "b");
    Answer::of(twice.json(&body)).await.problem(400, "invalid-request");
    // A refusal stays the same refusal.
    let stray = world.agent("robots/stray");
    let no = request("T-1", customers("read"));
    let first = stray.post_with_key("/v1/grants", "k-1", &no).await;
    first.problem(403, "denied");
    let second = stray.post_with_key("/v1/grants", "k-1", &no).await;
    assert_eq!((second.status, second.text()), (403, first.text()));
}
