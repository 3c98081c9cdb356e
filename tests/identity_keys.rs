//! "Keys come from the issuer, and only from there": discovery on a real web server on loopback. A12, A14, rotation, the
//! rate limit, one flight, keys that grow too old, and key files.

#[path = "support/identity_kit.rs"]
mod kit;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use countersign::config::{IssuerConfig, IssuerPreset};
use countersign::identity::dev_authority::DevAuthority;
use countersign::identity::keyset::{FRESH_SECS, REFRESH_SECS_MIN, STALE_SECS_MAX};
use countersign::identity::{Identities, IdentityError, Refusal, VerifiedAgent};
use countersign::time::{Clock as _, SystemClock};
use kit::{IssuerServer, Signer, TestClock, until, with};
use serde_json::{Value, json};

const AUDIENCE: &str = "https://broker.example";

fn config(issuer: &str) -> IssuerConfig {
    IssuerConfig {
        issuer: issuer.to_owned(),
        preset: IssuerPreset::Generic,
        audience: AUDIENCE.to_owned(),
        algorithms: vec!["ES256".to_owned()],
        jwks_file: None,
        ca_file: None,
        allow_private_network: true,
        require: BTreeMap::new(),
        attributes: BTreeMap::new(),
        launcher: None,
        tier_max: None,
        token_life_secs_max: 24 * 3600,
    }
}

struct Door {
    clock: Arc<TestClock>,
    identities: Arc<Identities>,
}

impl Door {
    fn new(issuers: &[IssuerConfig]) -> Self {
        let clock = TestClock::new();
        let identities = Identities::new(None, issuers, Path::new("."), clock.clone()).unwrap();
        Self { clock, identities: Arc::new(identities) }
    }
    fn token(&self, signer: &Signer, kid: &str, iss: &str) -> String {
        let now = self.clock.now_secs();
        let claims = json!({ "iss": iss, "sub": "a", "aud": AUDIENCE, "iat": now, "exp": now + 3600 * 3 });
        signer.sign(&json!({ "alg": "ES256", "kid": kid, "typ": "JWT" }), &claims)
    }
    async fn ask(&self, token: &str) -> Result<VerifiedAgent, IdentityError> {
        self.identities.authenticate_bearer(token, self.clock.wall()).await
    }
    async fn refusal(&self, token: &str) -> Refusal {
        self.ask(token).await.unwrap_err().refusal()
    }
}

fn jwks(keys: &[(&Signer, &str)]) -> Value {
    json!({ "keys": keys.iter().map(|(signer, kid)| signer.jwk(kid, "sig")).collect::<Vec<_>>() })
}

#[tokio::test]
async fn a12_a_redirect_is_not_followed() {
    let key = Signer::es256();
    let inside = IssuerServer::start(jwks(&[(&key, "k")])).await;
    let issuer = IssuerServer::start(jwks(&[(&key, "k")])).await;
    let door = Door::new(&[config(&issuer.url)]);
    let token = door.token(&key, "k", &issuer.url);
    for to in [format!("{}/.well-known/openid-configuration", inside.url), "http://169.254.169.254/latest".into()] {
        issuer.redirect_to(Some(to));
        assert_eq!(door.refusal(&token).await, Refusal::KeysUnavailable);
        door.clock.advance_secs(REFRESH_SECS_MIN);
    }
    assert_eq!(inside.requests(), 0, "nobody went where the redirect pointed");
    issuer.redirect_to(None);
    door.ask(&token).await.unwrap();
}

#[tokio::test]
async fn a12_metadata_that_points_elsewhere_or_names_another_issuer() {
    let key = Signer::es256();
    let issuer = IssuerServer::start(jwks(&[(&key, "k")])).await;
    let door = Door::new(&[config(&issuer.url)]);
    let token = door.token(&key, "k", &issuer.url);
    let good = json!({ "issuer": issuer.url, "jwks_uri": format!("{}/jwks", issuer.url) });
    for bad in [
        json!({ "issuer": format!("{}/", issuer.url) }),
        json!({ "issuer": issuer.url.to_uppercase() }),
        json!({ "issuer": null }),
        json!({ "jwks_uri": null }),
        json!({ "jwks_uri": "http://169.254.169.254/keys" }),
        json!({ "jwks_uri": "file:///etc/passwd" }),
        json!({ "jwks_uri": "http://10.0.0.1/keys" }),
        json!({ "jwks_uri": format!("{}/nothing", issuer.url) }),
        json!({ "pad": "x".repeat(300 * 1024) }),
    ] {
        issuer.set_metadata(with(&good, bad.clone()));
        assert_eq!(door.refusal(&token).await, Refusal::KeysUnavailable, "{:.80}", bad.to_string());
        door.clock.advance_secs(REFRESH_SECS_MIN);
    }
    assert_eq!(issuer.hits(), 0, "no key was ever fetched");
    issuer.set_metadata(good);
    door.ask(&token).await.unwrap();
}

#[tokio::test]
async fn a12_loopback_is_out_of_reach_unless_the_operator_allows_it() {
    let key = Signer::es256();
    let issuer = IssuerServer::start(jwks(&[(&key, "k")])).await;
    for url in [
        issuer.url.clone(),
        issuer.url.replace("127.0.0.1", "localhost"),
        "https://127.0.0.1:1".into(),
        "https://[::1]:1".into(),
    ] {
        let mut strict = config(&url);
        strict.allow_private_network = false;
        let clock = TestClock::new();
        assert!(Identities::new(None, &[strict], Path::new("."), clock).is_err(), "{url}");
    }
    // By name the configuration can't tell; the resolver does.
    let mut strict = config("https://localhost:1");
    strict.allow_private_network = false;
    let door = Door::new(&[strict]);
    let error = door.ask(&door.token(&key, "k", "https://localhost:1")).await.unwrap_err();
    assert!(error.refusal() == Refusal::KeysUnavailable && error.detail().contains("may not be reached"), "{error}");
    assert_eq!(issuer.requests(), 0);
}

#[tokio::test]
async fn a14_a_key_of_one_issuer_verifies_for_no_other() {
    let (a_key, b_key) = (Signer::es256(), Signer::es256());
    let a = IssuerServer::start(jwks(&[(&a_key, "same")])).await;
    let b = IssuerServer::start(jwks(&[(&b_key, "same")])).await;
    let door = Door::new(&[config(&a.url), config(&b.url)]);
    door.ask(&door.token(&a_key, "same", &a.url)).await.unwrap();
    door.ask(&door.token(&b_key, "same", &b.url)).await.unwrap();
    assert_eq!(door.refusal(&door.token(&a_key, "same", &b.url)).await, Refusal::BadSignature);
    assert_eq!(door.refusal(&door.token(&b_key, "same", &a.url)).await, Refusal::BadSignature);
    // Also with a `kid` that only the other one has.
    b.set_jwks(&jwks(&[(&b_key, "only-b")]));
    door.clock.advance_secs(REFRESH_SECS_MIN);
    door.ask(&door.token(&b_key, "only-b", &b.url)).await.unwrap();
    assert_eq!(door.refusal(&door.token(&b_key, "only-b", &a.url)).await, Refusal::UnknownKey);
}

#[tokio::test]
async fn a_new_key_is_found_at_once_and_a_flood_of_invented_ones_fetches_little() {
    let (old, new) = (Signer::es256(), Signer::es256());
    let issuer = IssuerServer::start(jwks(&[(&old, "old")])).await;
    let door = Door::new(&[config(&issuer.url)]);
    door.ask(&door.token(&old, "old", &issuer.url)).await.unwrap();
    assert_eq!(issuer.hits(), 1);
    // Within the limit nothing is fetched, whatever comes.
    for n in 0..100 {
        assert_eq!(door.refusal(&door.token(&new, &format!("x{n}"), &issuer.url)).await, Refusal::UnknownKey);
    }
    assert_eq!(issuer.hits(), 1);
    issuer.set_jwks(&jwks(&[(&old, "old"), (&new, "new")]));
    door.clock.advance_secs(REFRESH_SECS_MIN);
    door.ask(&door.token(&new, "new", &issuer.url)).await.unwrap();
    assert_eq!(issuer.hits(), 2);
    for n in 0..100 {
        door.clock.advance_secs(1);
        assert_eq!(door.refusal(&door.token(&new, &format!("y{n}"), &issuer.url)).await, Refusal::UnknownKey);
    }
    assert_eq!(issuer.hits(), 2 + 100 / usize::try_from(REFRESH_SECS_MIN).unwrap());
}

#[tokio::test]
async fn fifty_at_once_are_one_fetch() {
    let key = Signer::es256();
    let issuer = IssuerServer::start(jwks(&[(&key, "k")])).await;
    let door = Door::new(&[config(&issuer.url)]);
    let token = door.token(&key, "k", &issuer.url);
    let now = door.clock.wall();
    let all = (0..50).map(|_| {
        let (identities, token) = (Arc::clone(&door.identities), token.clone());
        tokio::spawn(async move { identities.authenticate_bearer(&token, now).await })
    });
    for one in futures::future::join_all(all).await {
        one.unwrap().unwrap();
    }
    assert_eq!(issuer.hits(), 1);
}

#[tokio::test]
async fn an_issuer_that_is_down_closes_the_door_after_a_while_and_opens_it_again() {
    let key = Signer::es256();
    let issuer = IssuerServer::start(jwks(&[(&key, "k")])).await;
    let door = Door::new(&[config(&issuer.url)]);
    let token = door.token(&key, "k", &issuer.url);
    issuer.set_down(true);
    assert_eq!(door.refusal(&token).await, Refusal::KeysUnavailable, "never seen: closed");
    issuer.set_down(false);
    assert_eq!(door.refusal(&token).await, Refusal::KeysUnavailable, "the limit counts for failures too");
    door.clock.advance_secs(REFRESH_SECS_MIN);
    door.ask(&token).await.unwrap();
    issuer.set_down(true);
    door.clock.advance_secs(STALE_SECS_MAX);
    door.ask(&token).await.unwrap();
    door.clock.advance_secs(1);
    assert_eq!(door.refusal(&token).await, Refusal::KeysUnavailable, "too old: closed");
    issuer.set_down(false);
    door.clock.advance_secs(REFRESH_SECS_MIN);
    door.ask(&token).await.unwrap();
}

#[tokio::test]
async fn a_key_that_the_issuer_took_back_is_refused_once_its_keys_are_fetched_again() {
    let (leaked, other) = (Signer::es256(), Signer::es256());
    let issuer = IssuerServer::start(jwks(&[(&leaked, "leaked"), (&other, "other")])).await;
    let door = Door::new(&[config(&issuer.url)]);
    let token = door.token(&leaked, "leaked", &issuer.url);
    door.ask(&token).await.unwrap();
    issuer.set_jwks(&jwks(&[(&other, "other")]));
    door.clock.advance_secs(FRESH_SECS + 1);
    until("the keys are refreshed in the background", async || door.ask(&token).await.is_err()).await;
    assert_eq!(door.refusal(&token).await, Refusal::UnknownKey);
}

#[tokio::test]
async fn documents_beyond_the_limits_and_keys_that_are_none() {
    let key = Signer::es256();
    let issuer = IssuerServer::start(json!({})).await;
    let door = Door::new(&[config(&issuer.url)]);
    let token = door.token(&key, "k", &issuer.url);
    let jwk = key.jwk("k", "sig");
    let rsa_1024 = json!({ "kty": "RSA", "kid": "k", "n": "w".repeat(171), "e": "AQAB" });
    let many: Vec<Value> = (0..129).map(|n| key.jwk(&format!("k{n}"), "sig")).collect();
    for bad in [
        json!({}),
        json!([]),
        json!({ "keys": {} }),
        json!({ "keys": [] }),
        json!({ "keys": ["x", 1, null] }),
        json!({ "keys": many }),
        json!({ "keys": [jwk], "pad": "x".repeat(512 * 1024) }),
        json!({ "keys": [rsa_1024] }),
        json!({ "keys": [with(&jwk, json!({ "use": "enc" }))] }),
        json!({ "keys": [with(&jwk, json!({ "key_ops": ["sign"] }))] }),
        json!({ "keys": [with(&jwk, json!({ "alg": "ES384" }))] }),
        json!({ "keys": [with(&jwk, json!({ "d": "x" }))] }),
        json!({ "keys": [with(&jwk, json!({ "crv": "P-384" }))] }),
        json!({ "keys": [with(&jwk, json!({ "kid": "k".repeat(257) }))] }),
        json!({ "keys": [with(&jwk, json!({ "y": jwk["x"] }))] }),
        json!({ "keys": [with(&jwk, json!({ "use": ["sig"] }))] }),
    ] {
        issuer.set_jwks(&bad);
        assert_eq!(door.refusal(&token).await, Refusal::KeysUnavailable, "{:.120}", bad.to_string());
        door.clock.advance_secs(REFRESH_SECS_MIN);
    }
    issuer.set_jwks_text(format!("{{\"keys\":[{jwk}],\"keys\":[{jwk}]}}"));
    assert_eq!(door.refusal(&token).await, Refusal::KeysUnavailable);
    door.clock.advance_secs(REFRESH_SECS_MIN);
    issuer.set_jwks(&json!({ "keys": [{ "kty": "new" }, 7, jwk] }));
    door.ask(&token).await.unwrap();
}

#[tokio::test]
async fn a_key_file_is_read_again_when_it_changes_and_closes_when_it_is_gone() {
    let (one, two) = (Signer::es256(), Signer::es256());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("jwks.json");
    let issuer = "https://issuer.example";
    let mut from_file = config(issuer);
    from_file.jwks_file = Some("jwks.json".into());
    let clock = TestClock::new();
    let identities = Identities::new(None, &[from_file], folder.path(), clock.clone()).unwrap();
    let door = Door { clock, identities: Arc::new(identities) };
    let (first, second) = (door.token(&one, "one", issuer), door.token(&two, "two", issuer));
    assert_eq!(door.refusal(&first).await, Refusal::KeysUnavailable);
    let replace = |keys: &[(&Signer, &str)]| {
        let next = folder.path().join("next");
        std::fs::write(&next, jwks(keys).to_string()).unwrap();
        std::fs::rename(next, &file).unwrap();
    };
    replace(&[(&one, "one")]);
    door.ask(&first).await.unwrap();
    replace(&[(&two, "two")]);
    // An unknown `kid` looks at once; a key that was taken back is gone a second later.
    door.ask(&second).await.unwrap();
    assert_eq!(door.refusal(&first).await, Refusal::UnknownKey);
    // Half a file: the last keys for a few seconds, then closed.
    std::fs::write(&file, "{\"keys\":[").unwrap();
    door.clock.advance_secs(2);
    door.ask(&second).await.unwrap();
    door.clock.advance_secs(10);
    assert_eq!(door.refusal(&second).await, Refusal::KeysUnavailable);
    replace(&[(&two, "two")]);
    door.clock.advance_secs(2);
    door.ask(&second).await.unwrap();
    std::fs::remove_file(&file).unwrap();
    door.clock.advance_secs(2);
    assert_eq!(door.refusal(&second).await, Refusal::KeysUnavailable);
}

/// The same issuer behind HTTPS on localhost, with a certificate of a private CA.
async fn https(key: &Signer, authority: &DevAuthority) -> (String, tokio::task::JoinHandle<()>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let svid = authority.x509_svid("spiffe://idp/web", &["localhost"], 3600).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(rustls::crypto::aws_lc_rs::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(svid.chain, svid.key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let keys = jwks(&[(key, "k")]).to_string();
    let metadata = json!({ "issuer": url, "jwks_uri": format!("{url}/jwks") }).to_string();
    let task = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, keys, metadata) = (acceptor.clone(), keys.clone(), metadata.clone());
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let service = hyper::service::service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
                    let body = if request.uri().path() == "/jwks" { keys.clone() } else { metadata.clone() };
                    async move {
                        Ok::<_, std::convert::Infallible>(hyper::Response::new(http_body_util::Full::new(
                            bytes::Bytes::from(body),
                        )))
                    }
                });
                let io = hyper_util::rt::TokioIo::new(stream);
                let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
            });
        }
    });
    (url, task)
}

#[tokio::test]
async fn a_private_ca_is_trusted_where_it_is_named_and_nowhere_else() {
    let key = Signer::es256();
    let (authority, stranger) = (
        DevAuthority::new("idp", Arc::new(SystemClock)).unwrap(),
        DevAuthority::new("idp", Arc::new(SystemClock)).unwrap(),
    );
    let (url, task) = https(&key, &authority).await;
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("ca.pem"), authority.x509_authorities_pem()).unwrap();
    std::fs::write(folder.path().join("other.pem"), stranger.x509_authorities_pem()).unwrap();
    std::fs::write(folder.path().join("none.pem"), "nothing").unwrap();
    std::fs::write(folder.path().join("big.pem"), "x".repeat(257 * 1024)).unwrap();
    let door = |ca: Option<&str>| {
        let mut config = config(&url);
        config.ca_file = ca.map(Into::into);
        let clock = TestClock::new();
        let identities = Identities::new(None, &[config], folder.path(), clock.clone())?;
        Ok::<_, Vec<IdentityError>>(Door { clock, identities: Arc::new(identities) })
    };
    let good = door(Some("ca.pem")).unwrap();
    good.ask(&good.token(&key, "k", &url)).await.unwrap();
    for ca in [None, Some("other.pem")] {
        let closed = door(ca).unwrap();
        assert_eq!(closed.refusal(&closed.token(&key, "k", &url)).await, Refusal::KeysUnavailable, "{ca:?}");
    }
    for ca in ["missing.pem", "none.pem", "big.pem"] {
        assert!(door(Some(ca)).is_err(), "{ca}");
    }
    task.abort();
}

#[test]
fn limits_of_issuers_and_attributes() {
    let many =
        |count: usize| -> Vec<IssuerConfig> { (0..count).map(|n| config(&format!("https://i{n}.example"))).collect() };
    let try_with =
        |issuers: &[IssuerConfig]| Identities::new(None, issuers, Path::new("."), TestClock::new()).map(|_| ());
    assert!(try_with(&many(64)).is_ok() && try_with(&many(65)).is_err());
    let twice = [config("https://i.example"), config("https://i.example")];
    assert!(try_with(&twice).unwrap_err()[0].detail().contains("configured twice"));
    let mapped = |count: usize| {
        let mut config = config("https://i.example");
        config.attributes = (0..count).map(|n| (format!("a{n}"), format!("claim{n}"))).collect();
        try_with(&[config])
    };
    assert!(mapped(64).is_ok() && mapped(65).is_err());
    let changed = |change: &dyn Fn(&mut IssuerConfig)| {
        let mut config = config("https://i.example");
        change(&mut config);
        try_with(&[config])
    };
    assert!(changed(&|_| {}).is_ok());
    assert!(changed(&|c| c.audience.clear()).is_err());
    assert!(changed(&|c| c.token_life_secs_max = 0).is_err());
    assert!(changed(&|c| c.token_life_secs_max = 7 * 24 * 3600 + 1).is_err());
    assert!(changed(&|c| c.attributes = BTreeMap::from([("Bad Name".into(), "x".into())])).is_err());
    assert!(changed(&|c| c.attributes = BTreeMap::from([("x".into(), "a..b".into())])).is_err());
    for bad in [
        "i.example",
        "https://i.example/?q",
        "https://i.example/#f",
        "https://u@i.example",
        "https://*.example",
        "spiffe://corp",
        "",
    ] {
        assert!(changed(&|c| bad.clone_into(&mut c.issuer)).is_err(), "{bad}");
    }
}
