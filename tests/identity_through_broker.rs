//! "I prove what I am in my own way, and the broker believes me for exactly as long as my authority is believed": an
//! X.509-SVID and a JWT-SVID from a Workload API socket and a token of a real oidc-provider, each up to a grant and a
//! credential through the real binary; and bundles that change under a kept-alive connection (A10).

#[path = "support/crash_broker.rs"]
mod broker;
#[path = "support/oidc_provider.rs"]
mod oidc_provider;

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use broker::{Agent, Answer, DOMAIN, Serving, Setup, notes, request, until};
use countersign::client::tls;
use countersign::identity::dev_authority::DevAuthority;
use countersign::identity::spiffe::{Svid, WorkloadApi};
use countersign::identity::workload_api::WorkloadApiServer;
use countersign::time::SystemClock;
use oidc_provider::{OidcProvider, REDIRECT_URI};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const ID: &str = "spiffe://corp.test/agent/seven";
/// The broker looks at bundle files every few seconds.
const SOON: Duration = Duration::from_secs(20);

/// Asks for a token credential, has the API ask the broker about it, completes, and has it asked again.
async fn whole_job(serving: &Serving, agent: &Agent, sub: &str, bind: bool) -> Value {
    let mut wanted = request("T-1", 300, notes());
    wanted["bind"] = bind.into();
    let granted = agent.post("/v1/grants", wanted).await.ok();
    assert_eq!(granted["state"], "active", "{granted}");
    let id = granted["id"].as_str().unwrap();
    let token = agent.collected(id).await["secret"]["token"].as_str().unwrap().to_owned();
    let part = |i: usize| BASE64_URL_SAFE_NO_PAD.decode(token.split('.').nth(i).unwrap()).unwrap();
    let (header, claims): (Value, Value) =
        (serde_json::from_slice(&part(0)).unwrap(), serde_json::from_slice(&part(1)).unwrap());
    assert_eq!(
        (&header["typ"], &claims["sub"], &claims["aud"]),
        (&json!("at+jwt"), &json!(sub), &json!("https://notes.test"))
    );
    let seen = introspect(serving, &token).await;
    assert_eq!((&seen["active"], &seen["sub"], &seen["txn"]), (&json!(true), &json!(sub), &json!(id)), "{seen}");
    agent.complete(id).await;
    assert_eq!(introspect(serving, &token).await, json!({ "active": false }));
    let record = serving.record();
    let grant = record.grant(id);
    assert_eq!(grant.request.agent.id.as_str(), sub, "as it stands in the journal");
    claims
}

async fn introspect(serving: &Serving, token: &str) -> Value {
    let api = serving.agent("notes-api");
    let request = api.http.post(format!("{}/introspect", api.base)).bearer_auth(api.token.unwrap());
    request.form(&[("token", token)]).send().await.unwrap().json().await.unwrap()
}

/// The status and problem of a look at the catalogue.
async fn look(agent: &Agent) -> (u16, String) {
    let answer: Answer = agent.get("/v1/catalogue").await;
    (answer.status, answer.problem().to_owned())
}

fn by_certificate(serving: &Serving, svid: &Svid) -> Agent {
    let http = tls::http(Some(&serving.file("ca.pem")), Some(svid)).unwrap();
    Agent { base: serving.mtls_url(), http, token: None }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn svids_from_the_workload_api_get_a_credential() {
    let mut serving = Serving::prepare(|_, _| Setup::default());
    serving.up().await;
    let socket = serving.file("workload-api/agent.sock");
    let api = WorkloadApiServer::start(&socket, Arc::clone(&serving.authority), ID).unwrap();
    let workload = WorkloadApi::connect(&api.endpoint()).await.unwrap();

    let svid = workload.x509_svid().await.unwrap();
    let agent = by_certificate(&serving, &svid);
    let claims = whole_job(&serving, &agent, ID, true).await;
    let thumbprint = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &svid.chain[0]);
    assert_eq!(
        claims["cnf"]["x5t#S256"],
        BASE64_URL_SAFE_NO_PAD.encode(thumbprint),
        "bound to its certificate (RFC 8705)"
    );
    let record = serving.record();
    assert_eq!(record.grants.values().next().unwrap().request.agent.method, "x509-svid");

    let jwt = workload.fetch_jwt_svid(&serving.agent_url()).await.unwrap();
    let agent = serving.bearer(jwt.expose());
    let claims = whole_job(&serving, &agent, ID, false).await;
    assert!(claims.get("cnf").is_none());
    // A bearer has no key to bind, and says so.
    let mut bound = request("T-2", 300, notes());
    bound["bind"] = true.into();
    let refused = agent.post("/v1/grants", bound).await;
    assert_eq!(refused.status, 400, "{refused:?}");

    // Two proofs in one request, and a proof at the wrong door.
    let both = Agent { token: Some(jwt.expose().to_owned()), ..by_certificate(&serving, &svid) };
    assert_eq!(look(&both).await, (400, "two-identities".to_owned()));
    let at_bearers_door = Agent { base: serving.agent_url(), ..by_certificate(&serving, &svid) };
    assert_eq!(look(&at_bearers_door).await, (401, "identity".to_owned()), "a certificate counts where it is demanded");
    let without = Agent { base: serving.mtls_url(), http: serving.http.clone(), token: Some(jwt.expose().to_owned()) };
    assert!(without.try_call("GET", "/v1/catalogue", None).await.is_err(), "no handshake without a certificate");

    // Another authority of the same name, another trust domain, another audience, another kind of key.
    let stranger = DevAuthority::new(DOMAIN, Arc::new(SystemClock)).unwrap();
    let elsewhere = DevAuthority::new("other.test", Arc::new(SystemClock)).unwrap();
    for svid in
        [stranger.x509_svid(ID, &[], 60).unwrap(), elsewhere.x509_svid("spiffe://other.test/a", &[], 60).unwrap()]
    {
        assert!(by_certificate(&serving, &svid).try_call("GET", "/v1/catalogue", None).await.is_err());
    }
    let ours = serving.agent_url();
    for token in [
        stranger.jwt_svid(ID, &[&ours], 60).unwrap(),
        elsewhere.jwt_svid("spiffe://other.test/a", &[&ours], 60).unwrap(),
        serving.authority.jwt_svid(ID, &["https://other.test"], 60).unwrap(),
        serving.authority.jwt_svid(ID, &[&ours, "https://other.test"], 60).unwrap(),
        unsigned(jwt.expose()),
    ] {
        assert_eq!(look(&serving.bearer(&token)).await, (401, "identity".to_owned()));
    }
    serving.stop().await;
}

/// A1: the same claims, `alg: none`, no signature.
fn unsigned(token: &str) -> String {
    format!("{}.{}.", BASE64_URL_SAFE_NO_PAD.encode(r#"{"alg":"none","typ":"JWT"}"#), token.split('.').nth(1).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_known_by_an_oidc_provider_gets_a_credential() {
    let Some(idp) = OidcProvider::start(&[REDIRECT_URI]).await else { return };
    let issuer = idp.issuer.clone();
    let mut serving = Serving::prepare(|ports, _| Setup {
        issuers: format!(
            "[[issuer]]\nissuer = \"{issuer}\"\npreset = \"generic\"\naudience = \"https://localhost:{}\"\nalgorithms = [\"ES256\"]\n\
             allow_private_network = true\nrequire = {{ client_id = [\"agent-7\"] }}\ntoken_life_secs_max = 600",
            ports.agent
        ),
        agents: format!("[[agent]]\nmatch = \"{issuer}#agent-7\"\nowner = \"olga\"\n"),
        ..Setup::default()
    });
    serving.up().await;
    let audience = serving.agent_url();
    let agent = serving.bearer(&idp.agent_token(&audience, Some("run")).await);
    whole_job(&serving, &agent, &format!("{issuer}#agent-7"), false).await;
    let record = serving.record();
    assert_eq!(record.grants.values().next().unwrap().request.agent.method, "oidc");

    // A7, A5, A1: an access token of the same provider, one for somebody else, one that nobody signed.
    let good = idp.agent_token(&audience, Some("run")).await;
    for token in [
        idp.agent_token(&audience, None).await,
        idp.agent_token("https://other.test", Some("run")).await,
        unsigned(&good),
    ] {
        assert_eq!(look(&serving.bearer(&token)).await, (401, "identity".to_owned()));
    }
    serving.stop().await;
}

/// One connection, kept alive: it is not made anew behind the test's back.
struct KeptAlive(tokio_rustls::client::TlsStream<tokio::net::TcpStream>);

impl KeptAlive {
    async fn open(serving: &Serving, svid: &Svid) -> std::io::Result<Self> {
        let mut roots = rustls::RootCertStore::empty();
        for ca in CertificateDer::pem_file_iter(serving.file("ca.pem")).unwrap() {
            roots.add(ca.unwrap()).unwrap();
        }
        let mut config =
            rustls::ClientConfig::builder_with_provider(rustls::crypto::aws_lc_rs::default_provider().into())
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_root_certificates(roots)
                .with_client_auth_cert(svid.chain.clone(), svid.key.clone_key())
                .unwrap();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let stream = tokio::net::TcpStream::connect(("127.0.0.1", serving.ports.mtls)).await?;
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let mut open = Self(connector.connect("localhost".try_into().unwrap(), stream).await?);
        // With TLS 1.3 the server's no to a certificate comes with the first answer.
        open.status().await.map(|_| open)
    }

    /// The status of one more request.
    async fn status(&mut self) -> std::io::Result<u16> {
        self.0.write_all(b"GET /v1/catalogue HTTP/1.1\r\nhost: localhost\r\n\r\n").await?;
        let mut answer = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&answer).into_owned();
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let length = head.lines().find_map(|l| l.strip_prefix("content-length: ")).expect("a length");
                if body.len() >= length.parse().unwrap() {
                    return Ok(head.split(' ').nth(1).unwrap().parse().unwrap());
                }
            }
            let mut buffer = [0; 4096];
            match self.0.read(&mut buffer).await? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                n => answer.extend_from_slice(&buffer[..n]),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a10_bundles_from_the_workload_api_count_at_once_on_a_connection_that_is_open() {
    let mut serving = Serving::prepare(|_, folder| Setup {
        spiffe: Some(format!("workload_api = \"unix://{}/workload-api/agent.sock\"", folder.display())),
        ..Setup::default()
    });
    let socket = serving.file("workload-api/agent.sock");
    let api = WorkloadApiServer::start(&socket, Arc::clone(&serving.authority), ID).unwrap();
    serving.up().await;
    let workload = WorkloadApi::connect(&api.endpoint()).await.unwrap();
    let old = workload.x509_svid().await.unwrap();
    let old_jwt = serving.bearer(workload.fetch_jwt_svid(&serving.agent_url()).await.unwrap().expose());
    let mut open = None;
    until("the bundle arrived", SOON, async || {
        open = KeptAlive::open(&serving, &old).await.ok();
        open.is_some() && look(&old_jwt).await.0 == 200
    })
    .await;
    let mut open = open.unwrap();
    assert_eq!(open.status().await.unwrap(), 200);

    // Rotation: new SVIDs count as soon as the bundle says so, old ones go on.
    serving.authority.rotate().unwrap();
    let new = workload.x509_svid().await.unwrap();
    assert_ne!(new.chain[0], old.chain[0]);
    until("the new authority is believed", SOON, async || KeptAlive::open(&serving, &new).await.is_ok()).await;
    assert_eq!((open.status().await.unwrap(), look(&old_jwt).await.0), (200, 200), "the old one still is");

    // The old authority is taken out: same process, same connection, no identity.
    serving.authority.forget_old();
    until("the open connection has no identity", SOON, async || open.status().await.unwrap() == 401).await;
    until("nor has the old JWT-SVID", SOON, async || look(&old_jwt).await == (401, "identity".to_owned())).await;
    assert!(KeptAlive::open(&serving, &old).await.is_err(), "and no new connection is made with it");
    let mut open = KeptAlive::open(&serving, &new).await.unwrap();
    assert_eq!(open.status().await.unwrap(), 200);
    assert_eq!(
        serving.log().matches("\"ready\"").count() + serving.log().matches(" ready ").count(),
        1,
        "never restarted"
    );
    serving.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a10_a_bundle_file_that_is_taken_away_closes_the_door_on_a_connection_that_is_open() {
    let mut serving = Serving::prepare(|_, _| Setup::default());
    serving.up().await;
    let svid = serving.authority.x509_svid(ID, &[], 3600).unwrap();
    let jwt = serving.agent("seven");
    let mut open = KeptAlive::open(&serving, &svid).await.unwrap();
    assert_eq!((open.status().await.unwrap(), look(&jwt).await.0), (200, 200));
    let bundle = serving.file("bundle.json");
    let text = std::fs::read(&bundle).unwrap();
    std::fs::remove_file(&bundle).unwrap();
    // No keys to ask: not "wrong", but not let in either.
    until("the open connection is refused", SOON, async || open.status().await.unwrap() == 503).await;
    assert_eq!(look(&jwt).await.0, 503);
    assert!(KeptAlive::open(&serving, &svid).await.is_err());
    let next = serving.file("next");
    std::fs::write(&next, text).unwrap();
    std::fs::rename(next, &bundle).unwrap();
    until("it is let in again", SOON, async || open.status().await.unwrap() == 200).await;
    serving.stop().await;
}
