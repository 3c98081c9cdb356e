//! "Whoever asks too much, too long or not at all is stopped, and everybody else is answered." One test for each of the
//! limits that a door has, over the real wire.

#[path = "support/broker.rs"]
mod broker;

use std::sync::Arc;
use std::time::{Duration, Instant};

use broker::agent::{Agent, customers, notes, request};
use broker::{Answer, Plan, World, until};
use countersign::client::tls;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

type Tls = tokio_rustls::client::TlsStream<TcpStream>;

/// An honest request is answered within this, however busy the machine is.
const SOON: Duration = Duration::from_secs(12);
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

async fn world(limits: &'static str) -> World {
    Plan { limits, ..Plan::default() }.start("story_limits").await.expect("no peer is needed")
}

/// A TLS connection to the agents' door that speaks `alpn`.
async fn connect(world: &World, alpn: &str) -> std::io::Result<Tls> {
    let mut roots = rustls::RootCertStore::empty();
    for ca in CertificateDer::pem_file_iter(world.file("ca.pem")).unwrap() {
        roots.add(ca.unwrap()).unwrap();
    }
    let provider = rustls::crypto::aws_lc_rs::default_provider().into();
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    let stream = TcpStream::connect(("127.0.0.1", world.ports.agent)).await?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    connector.connect("localhost".try_into().unwrap(), stream).await
}

/// The same, with something said on it.
async fn saying(world: &World, alpn: &str, what: &[u8]) -> Tls {
    let mut stream = connect(world, alpn).await.unwrap();
    stream.write_all(what).await.unwrap();
    stream.flush().await.unwrap();
    stream
}

/// Everything until the other end closes.
async fn rest(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> String {
    let mut all = Vec::new();
    // A close without TLS's own goodbye is one too.
    let _ = tokio::time::timeout(SOON, stream.read_to_end(&mut all)).await.expect("the broker closes it");
    String::from_utf8_lossy(&all).into_owned()
}

/// Half of a request whose sender is good.
fn half_a_body(agent: &Agent) -> Vec<u8> {
    let token = agent.token.as_ref().unwrap();
    format!(
        "POST /v1/grants HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {token}\r\n\
         content-type: application/json\r\ncontent-length: 100\r\n\r\n{{\"task\":"
    )
    .into_bytes()
}

/// Somebody who has nothing to do with it, on a connection of their own.
async fn honest(world: &World, agent: &Agent) -> Answer {
    let http = tls::http(Some(&world.file("ca.pem")), None).unwrap();
    let fresh = Agent { http, ..agent.clone() };
    tokio::time::timeout(SOON, fresh.get("/v1/catalogue")).await.expect("an honest request is answered")
}

#[tokio::test]
async fn connections_that_ask_nothing_keep_nobody_out() {
    let world = world(
        "connections_max = 4\nhandshake_ms_max = 500\nheader_read_ms_max = 500\nbody_read_ms_max = 500\nidle_ms_max = 500",
    )
    .await;
    let ops = world.agent("ops");
    let once = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n".to_vec();
    let kinds: [(&str, &str, Vec<u8>); 7] = [
        ("silent over HTTP/1.1", "http/1.1", Vec::new()),
        ("silent over HTTP/2", "h2", Vec::new()),
        ("stuck after PRI", "h2", PREFACE[..3].to_vec()),
        ("stuck after PRI, and HTTP/1.1 was agreed", "http/1.1", PREFACE[..3].to_vec()),
        ("idle over HTTP/2", "h2", PREFACE.to_vec()),
        ("idle after a request", "http/1.1", once),
        ("half a body", "http/1.1", half_a_body(&ops)),
    ];
    for (kind, alpn, says) in kinds {
        let mut held = Vec::new();
        for _ in 0..4 {
            held.push(saying(&world, alpn, &says).await);
        }
        assert_eq!(honest(&world, &ops).await.status, 200, "{kind}");
        drop(held);
    }
    // Not even a handshake.
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(TcpStream::connect(("127.0.0.1", world.ports.agent)).await.unwrap());
    }
    assert_eq!(honest(&world, &ops).await.status, 200);
}

#[tokio::test]
async fn no_more_connections_than_the_limit_and_the_next_one_waits() {
    let world = world("connections_max = 2\nidle_ms_max = 60000\nheader_read_ms_max = 60000").await;
    let ops = world.agent("ops");
    let (first, _second) = (saying(&world, "http/1.1", b"").await, saying(&world, "http/1.1", b"").await);
    let third = tokio::time::timeout(Duration::from_millis(1500), connect(&world, "http/1.1")).await;
    assert!(third.is_err(), "two hold all there are");
    drop(first);
    assert_eq!(honest(&world, &ops).await.status, 200);
}

#[tokio::test]
async fn one_address_has_its_share_and_no_more() {
    let world = world("connections_per_address_max = 3").await;
    let ops = world.agent("ops");
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(saying(&world, "http/1.1", b"").await);
    }
    assert!(connect(&world, "http/1.1").await.is_err(), "the fourth is dropped");
    let elsewhere = Agent { http: world.client_at("127.0.0.2"), ..ops.clone() };
    assert_eq!(elsewhere.get("/v1/catalogue").await.status, 200);
    held.pop();
    until("the place is free again", async || connect(&world, "http/1.1").await.is_ok()).await;
}

#[tokio::test]
async fn each_deadline_ends_what_it_is_about() {
    let world = world("handshake_ms_max = 700\nheader_read_ms_max = 800\nbody_read_ms_max = 900").await;
    let ops = world.agent("ops");
    let takes = |begun: Instant, ms: u64, what: &str| {
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(ms), "{what} ended early: {took:?}");
    };
    let begun = Instant::now();
    let mut stream = TcpStream::connect(("127.0.0.1", world.ports.agent)).await.unwrap();
    rest(&mut stream).await;
    takes(begun, 700, "the handshake");

    let begun = Instant::now();
    let mut stream = saying(&world, "http/1.1", b"GET /healthz HTTP/1.1\r\nhost: loc").await;
    rest(&mut stream).await;
    takes(begun, 800, "the headers");

    let begun = Instant::now();
    let mut stream = saying(&world, "http/1.1", &half_a_body(&ops)).await;
    let answer = rest(&mut stream).await;
    takes(begun, 900, "the body");
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("urn:countersign:problem:too-slow"), "{answer}");
    assert!(answer.contains("900 ms"), "{answer}");
}

#[tokio::test]
async fn a_request_has_a_size() {
    let world = world("body_bytes_max = 2048\njson_depth_max = 6\nheader_bytes_max = 9000").await;
    let ops = world.agent("ops");
    let sized = |n: usize| {
        let mut body = request("T-1", notes());
        body["task"] = json!("");
        body["task"] = json!("t".repeat(n - body.to_string().len()));
        body
    };
    assert_eq!(sized(2048).to_string().len(), 2048);
    ops.post("/v1/grants", &sized(2048)).await.problem(400, "invalid-json"); // a task has 128 bytes
    let why = ops.post("/v1/grants", &sized(2049)).await.problem(413, "too-large");
    assert!(why.contains("2048"), "{why}");

    let deep = |levels: usize| (1..levels).fold(json!(1), |inner, _| json!([inner]));
    let with = |value: Value| {
        let mut body = request("T-1", notes());
        body["x"] = value;
        body
    };
    let why = ops.post("/v1/grants", &with(deep(6))).await.problem(400, "invalid-json");
    assert!(why.contains("unknown member"), "{why}");
    let why = ops.post("/v1/grants", &with(deep(7))).await.problem(400, "invalid-json");
    assert!(!why.contains("unknown member"), "{why}");

    let http2 = world.client_at("127.0.0.1");
    for (bytes, fine) in [(4000, true), (12_000, false)] {
        let asking = http2.get(format!("{}/healthz", ops.base)).header("x-filler", "f".repeat(bytes));
        let answer = asking.send().await.unwrap();
        assert_eq!(answer.version(), reqwest::Version::HTTP_2);
        assert_eq!(answer.status().as_u16(), if fine { 200 } else { 431 }, "{bytes}");
        let filler = "f".repeat(bytes);
        let says =
            format!("GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx-filler: {filler}\r\n\r\n");
        let mut stream = saying(&world, "http/1.1", says.as_bytes()).await;
        let answer = rest(&mut stream).await;
        assert!(answer.starts_with(if fine { "HTTP/1.1 200" } else { "HTTP/1.1 431" }), "{bytes}: {answer}");
    }
}

#[tokio::test]
async fn an_agent_has_a_rate_and_it_is_not_that_of_those_who_ask_about_its_tokens() {
    let world = world("requests_per_agent_per_sec = 1\nrequests_per_agent_burst = 20").await;
    let ops = world.agent("ops");
    let id = ops.asked("T-1", notes()).await;
    let issued = ops.collect(&id).await.ok();
    let token = issued["credentials"][0]["secret"]["token"].as_str().unwrap().to_owned();
    let mut refused = None;
    for _ in 0..100 {
        let answer = ops.get("/v1/catalogue").await;
        if answer.status == 429 {
            refused = Some(answer);
            break;
        }
    }
    let refused = refused.expect("an agent has a rate");
    refused.problem(429, "rate");
    assert_eq!(refused.header("retry-after"), "1");
    world.agent("ops-two").get("/v1/catalogue").await.ok();
    for n in 0..300 {
        assert_eq!(world.introspect("notes-api", &token).await["active"], true, "{n}");
    }
}

#[tokio::test]
async fn introspection_has_a_rate_of_its_own() {
    let world = world("introspections_per_sec = 1\nintrospections_burst = 5").await;
    let api = world.agent("notes-api");
    let ask = || Answer::of(api.posting("/introspect").form(&[("token", "x")]));
    let mut statuses = Vec::new();
    for _ in 0..60 {
        let answer = ask().await;
        statuses.push(answer.status);
        if answer.status == 429 {
            answer.problem(429, "rate");
            break;
        }
    }
    assert_eq!((statuses[0], statuses.last()), (200, Some(&429)), "{statuses:?}");
    api.get("/v1/catalogue").await.ok();
}

#[tokio::test]
async fn a_wait_has_an_end() {
    let world = world("wait_secs_max = 1").await;
    let ops = world.agent("ops");
    let id = ops.asked("T-1", customers("read")).await;
    let begun = Instant::now();
    let seen = tokio::time::timeout(SOON, ops.get(&format!("/v1/grants/{id}?wait=5m"))).await.expect("it ends");
    assert_eq!(seen.ok()["state"], "pending");
    assert!(begun.elapsed() >= Duration::from_millis(900), "and it waits");
}

#[tokio::test]
async fn the_end_lets_what_is_in_flight_finish_and_waits_for_nobody_else() {
    let mut world = world("body_read_ms_max = 60000\nheader_read_ms_max = 60000\nidle_ms_max = 60000").await;
    let ops = world.agent("ops");
    let id = ops.asked("T-1", customers("read")).await;
    let version = ops.show(&id).await["version"].as_u64().unwrap();
    let waits = {
        let (ops, id) = (ops.clone(), id.clone());
        tokio::spawn(async move { ops.poll(&id, version, Duration::from_secs(30)).await })
    };
    // One that never asked, one that never finishes what it asks.
    let mut idle = saying(&world, "http/1.1", b"").await;
    let mut stuck = saying(&world, "http/1.1", &half_a_body(&ops)).await;
    // Later requests of the same connection are answered: the long poll has been read.
    for _ in 0..20 {
        ops.get("/v1/catalogue").await.ok();
    }
    assert!(!waits.is_finished());
    let begun = Instant::now();
    let stopping = world.broker.stop();
    let (status, answer) = tokio::join!(stopping, waits);
    assert!(status.success(), "{status}");
    assert_eq!(answer.unwrap().ok()["state"], "pending", "who waited was answered");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    rest(&mut idle).await;
    rest(&mut stuck).await;
}
