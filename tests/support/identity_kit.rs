//! What the identity tests share: a clock that the test moves, keys that sign whatever a test writes, and an issuer's
//! web server on loopback whose answers the test sets. No check of the product is repeated here.

#![allow(dead_code)] // each test file uses a part

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair as RsaKeyPair, KeySize};
use aws_lc_rs::signature::{
    self, ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _,
};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as B64;
use countersign::core::id::Timestamp;
use countersign::time::{Clock, SystemClock};
use parking_lot::Mutex;
use serde_json::{Value, json};

/// A clock that stands still until the test moves it. Its sleep is real, so that loops go on.
pub struct TestClock {
    wall_ms: AtomicU64,
    boot_ms: AtomicU64,
}

impl TestClock {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { wall_ms: AtomicU64::new(SystemClock.wall().0), boot_ms: AtomicU64::new(1_000_000) })
    }
    pub fn advance_secs(&self, secs: u64) {
        self.wall_ms.fetch_add(secs * 1000, Ordering::SeqCst);
        self.boot_ms.fetch_add(secs * 1000, Ordering::SeqCst);
    }
    pub fn now_secs(&self) -> u64 {
        self.wall().secs()
    }
}

impl Clock for TestClock {
    fn wall(&self) -> Timestamp {
        Timestamp(self.wall_ms.load(Ordering::SeqCst))
    }
    fn boot_ms(&self) -> u64 {
        self.boot_ms.load(Ordering::SeqCst)
    }
    fn boot_id(&self) -> String {
        "test".into()
    }
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(tokio::time::sleep(duration.min(Duration::from_millis(20))))
    }
}

/// Waits for a condition, at most ten seconds.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let waited = tokio::time::timeout(Duration::from_secs(10), async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    assert!(waited.await.is_ok(), "waited in vain: {what}");
}

/// A signing key.
pub enum Signer {
    Es256(EcdsaKeyPair),
    Es384(EcdsaKeyPair),
    Rsa(RsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

impl Signer {
    pub fn es256() -> Self {
        Self::Es256(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap())
    }
    pub fn es384() -> Self {
        Self::Es384(EcdsaKeyPair::generate(&ECDSA_P384_SHA384_FIXED_SIGNING).unwrap())
    }
    pub fn rsa() -> Self {
        Self::Rsa(RsaKeyPair::generate(KeySize::Rsa2048).unwrap())
    }
    pub fn ed25519() -> Self {
        Self::Ed25519(Ed25519KeyPair::generate().unwrap())
    }

    /// The algorithm that it signs with by itself.
    pub fn alg(&self) -> &'static str {
        match self {
            Self::Es256(_) => "ES256",
            Self::Es384(_) => "ES384",
            Self::Rsa(_) => "RS256",
            Self::Ed25519(_) => "EdDSA",
        }
    }

    /// The public JWK.
    pub fn jwk(&self, kid: &str, key_use: &str) -> Value {
        let ec = |key: &EcdsaKeyPair, crv: &str| {
            let point = key.public_key().as_ref();
            let (x, y) = point[1..].split_at(point.len() / 2);
            json!({ "kty": "EC", "crv": crv, "x": B64.encode(x), "y": B64.encode(y) })
        };
        let mut jwk = match self {
            Self::Es256(key) => ec(key, "P-256"),
            Self::Es384(key) => ec(key, "P-384"),
            Self::Rsa(key) => {
                let (n, e) = (key.public_key().modulus(), key.public_key().exponent());
                json!({ "kty": "RSA", "n": B64.encode(n.big_endian_without_leading_zero()),
                        "e": B64.encode(e.big_endian_without_leading_zero()) })
            }
            Self::Ed25519(key) => json!({ "kty": "OKP", "crv": "Ed25519", "x": B64.encode(key.public_key().as_ref()) }),
        };
        jwk["kid"] = kid.into();
        jwk["use"] = key_use.into();
        jwk
    }

    /// The public key's bytes, as somebody would misuse them for an HMAC.
    pub fn public_bytes(&self) -> Vec<u8> {
        match self {
            Self::Es256(key) | Self::Es384(key) => key.public_key().as_ref().to_vec(),
            Self::Rsa(key) => key.public_key().as_ref().to_vec(),
            Self::Ed25519(key) => key.public_key().as_ref().to_vec(),
        }
    }

    /// Signs texts as they are: whatever a test writes, valid JSON or not.
    pub fn sign_text(&self, header: &str, payload: &str) -> String {
        self.sign_as(if header.contains("PS256") { "PS256" } else { self.alg() }, header, payload)
    }

    /// Signs with an algorithm that need not be what the header says.
    pub fn sign_as(&self, alg: &str, header: &str, payload: &str) -> String {
        let input = format!("{}.{}", B64.encode(header), B64.encode(payload));
        let rng = SystemRandom::new();
        let signature = match self {
            Self::Es256(key) | Self::Es384(key) => key.sign(&rng, input.as_bytes()).unwrap().as_ref().to_vec(),
            Self::Rsa(key) => {
                let padding: &dyn signature::RsaEncoding =
                    if alg == "PS256" { &signature::RSA_PSS_SHA256 } else { &signature::RSA_PKCS1_SHA256 };
                let mut out = vec![0; key.public_modulus_len()];
                key.sign(padding, &rng, input.as_bytes(), &mut out).unwrap();
                out
            }
            Self::Ed25519(key) => key.sign(input.as_bytes()).as_ref().to_vec(),
        };
        format!("{input}.{}", B64.encode(signature))
    }

    pub fn sign(&self, header: &Value, payload: &Value) -> String {
        self.sign_text(&header.to_string(), &payload.to_string())
    }
}

/// `base` with members replaced; `null` takes a member out.
pub fn with(base: &Value, changes: Value) -> Value {
    let mut all = base.as_object().unwrap().clone();
    for (name, value) in changes.as_object().unwrap() {
        if value.is_null() {
            all.remove(name);
        } else {
            all.insert(name.clone(), value.clone());
        }
    }
    Value::Object(all)
}

/// An issuer's web server.
pub struct IssuerServer {
    pub url: String,
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    metadata: Mutex<Option<Value>>,
    jwks: Mutex<String>,
    redirect_to: Mutex<Option<String>>,
    down: Mutex<bool>,
    requests: AtomicUsize,
    hits: AtomicUsize,
}

impl IssuerServer {
    pub async fn start(jwks: Value) -> Self {
        use axum::http::{StatusCode, header};
        use axum::response::IntoResponse as _;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let shared = Arc::new(Shared::default());
        *shared.jwks.lock() = jwks.to_string();
        let (at, base) = (Arc::clone(&shared), url.clone());
        let app = axum::Router::new().fallback(move |uri: axum::http::Uri| {
            let (shared, base) = (Arc::clone(&at), base.clone());
            shared.requests.fetch_add(1, Ordering::SeqCst);
            async move {
                if *shared.down.lock() {
                    return StatusCode::SERVICE_UNAVAILABLE.into_response();
                }
                if let Some(to) = shared.redirect_to.lock().clone() {
                    shared.hits.fetch_add(1, Ordering::SeqCst);
                    return (StatusCode::FOUND, [(header::LOCATION, to)]).into_response();
                }
                match uri.path() {
                    "/.well-known/openid-configuration" => {
                        let own = json!({ "issuer": base, "jwks_uri": format!("{base}/jwks") });
                        shared.metadata.lock().clone().unwrap_or(own).to_string().into_response()
                    }
                    "/jwks" => {
                        shared.hits.fetch_add(1, Ordering::SeqCst);
                        shared.jwks.lock().clone().into_response()
                    }
                    _ => StatusCode::NOT_FOUND.into_response(),
                }
            }
        });
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { url, shared, task }
    }
    pub fn set_jwks(&self, jwks: &Value) {
        *self.shared.jwks.lock() = jwks.to_string();
    }
    pub fn set_jwks_text(&self, text: String) {
        *self.shared.jwks.lock() = text;
    }
    pub fn set_metadata(&self, metadata: Value) {
        *self.shared.metadata.lock() = Some(metadata);
    }
    pub fn redirect_to(&self, to: Option<String>) {
        *self.shared.redirect_to.lock() = to;
    }
    pub fn set_down(&self, down: bool) {
        *self.shared.down.lock() = down;
    }
    /// How often anything at all was asked.
    pub fn requests(&self) -> usize {
        self.shared.requests.load(Ordering::SeqCst)
    }
    /// How often its keys were fetched (or a redirect was given).
    pub fn hits(&self) -> usize {
        self.shared.hits.load(Ordering::SeqCst)
    }
}

impl Drop for IssuerServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}
