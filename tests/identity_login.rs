//! "I log in at our IdP and the broker knows which account I am": the code flow against the real oidc-provider, and its
//! tokens as those of an agent. Answers that belong to another login, browser, client or issuer are refused.

#[path = "support/identity_kit.rs"]
mod kit;
#[path = "support/oidc_provider.rs"]
mod oidc_provider;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as B64;
use countersign::config::{IssuerConfig, IssuerPreset, ReviewerLoginConfig, SecretRef};
use countersign::core::secret::Secret;
use countersign::identity::net::system_lookup;
use countersign::identity::pending_login::LOGIN_SECS_MAX;
use countersign::identity::{Callback, Identities, IdentityError, LoginBegun, Refusal, ReviewerLogin, VerifiedAccount};
use countersign::time::Clock;
use kit::{Signer, TestClock, with};
use oidc_provider::{CLIENT, OidcProvider, REDIRECT_URI};
use parking_lot::Mutex;
use serde_json::{Value, json};

struct Client {
    login: ReviewerLogin,
    clock: Arc<TestClock>,
    _folder: tempfile::TempDir,
}

impl Client {
    fn new(issuer: &str, id: &str, secret: Option<&str>, algorithm: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let client_secret = secret.map(|text| {
            std::fs::write(folder.path().join("secret"), text).unwrap();
            SecretRef::File("secret".into())
        });
        let config = ReviewerLoginConfig {
            issuer: issuer.to_owned(),
            client_id: id.to_owned(),
            client_secret,
            scopes: vec!["groups".into()],
            groups_claim: Some("groups".into()),
            groups_age_secs_max: 3600,
            algorithms: vec![algorithm.to_owned()],
            ca_file: None,
            allow_private_network: true,
            session_idle_secs_max: 60,
            session_secs_max: 60,
        };
        let clock = TestClock::new();
        let login = ReviewerLogin::new(&config, REDIRECT_URI, folder.path(), clock.clone(), system_lookup()).unwrap();
        Self { login, clock, _folder: folder }
    }
    async fn finish(&self, begun: LoginBegun, query: &str) -> Result<VerifiedAccount, IdentityError> {
        let callback = Callback::parse(query)?;
        self.login.finish(begun.sealed.expose(), &callback, self.clock.wall()).await
    }
}

#[tokio::test]
async fn a_reviewer_logs_in_by_every_way_in_which_a_client_proves_itself() {
    let Some(idp) = OidcProvider::start(&[REDIRECT_URI]).await else { return };
    for (id, secret, algorithm) in [
        (CLIENT.0, Some(CLIENT.1), "RS256"),
        ("reviewers-es256", Some("s"), "ES256"),
        ("reviewers-public", None, "RS256"),
    ] {
        let client = Client::new(&idp.issuer, id, secret, algorithm);
        let begun = client.login.begin().await.unwrap();
        let query = idp.log_in(&begun.url, "ana+sre+oncall").await;
        let account = client.finish(begun, &query).await.unwrap_or_else(|e| panic!("{id}: {e}"));
        assert_eq!((account.issuer.as_str(), account.subject.as_str()), (idp.issuer.as_str(), "ana+sre+oncall"));
        assert_eq!(account.groups, ["sre", "oncall"]);
    }
    let wrong = Client::new(&idp.issuer, CLIENT.0, Some("not the secret"), "RS256");
    let begun = wrong.login.begin().await.unwrap();
    let query = idp.log_in(&begun.url, "ana").await;
    let error = wrong.finish(begun, &query).await.unwrap_err();
    assert!(error.refusal() == Refusal::Login && error.detail().contains("invalid_client"), "{error}");
}

#[tokio::test]
async fn an_answer_counts_once_in_its_own_browser_for_its_own_login() {
    let Some(idp) = OidcProvider::start(&[REDIRECT_URI]).await else { return };
    let client = Client::new(&idp.issuer, CLIENT.0, Some(CLIENT.1), "RS256");
    let refused = async |begun: LoginBegun, query: &str, why: &str| {
        let error = client.finish(begun, query).await.expect_err(why);
        assert_eq!(error.refusal(), Refusal::Login, "{why}: {error}");
        assert!(error.detail().contains(why), "{why}: {error}");
    };
    let begin = async || client.login.begin().await.unwrap();

    let begun = begin().await;
    let query = idp.log_in(&begun.url, "ana").await;
    let other = begin().await;
    refused(other, &query, "`state`").await;
    let nothing = LoginBegun { sealed: Secret::new(String::new()), ..begun };
    refused(nothing, &query, "another browser").await;

    // Somebody else's answer pushed into this browser (login CSRF): the state is not this login's.
    refused(other_login(&client, &idp).await.0, &query, "`state`").await;
    // …and with the state replaced, the code is not this login's: PKCE.
    let (begun, own) = other_login(&client, &idp).await;
    let stolen = idp.log_in(&begin().await.url, "mallory").await;
    let code = |query: &str| query.split('&').find(|p| p.starts_with("code=")).unwrap().to_owned();
    refused(begun, &own.replace(&code(&own), &code(&stolen)), "invalid_grant").await;

    // A code that was used already.
    let (begun, query) = other_login(&client, &idp).await;
    let used = state(&begun);
    let again = LoginBegun { url: String::new(), sealed: begun.sealed.clone() };
    client.finish(begun, &query).await.unwrap();
    refused(again, &query, "finished already").await;
    let fresh = begin().await;
    let replayed = query.replace(&used, &state(&fresh));
    refused(fresh, &replayed, "invalid_grant").await;

    // RFC 9207: another issuer's answer, or one without `iss` though this IdP always sends it.
    let (begun, query) = other_login(&client, &idp).await;
    let iss = query.split('&').find(|p| p.starts_with("iss=")).unwrap().to_owned();
    refused(begun, &query.replace(&iss, "iss=https%3A%2F%2Fother.example"), "another issuer").await;
    let (begun, query) = other_login(&client, &idp).await;
    let iss = query.split('&').find(|p| p.starts_with("iss=")).unwrap().to_owned();
    refused(begun, &query.replace(&iss, ""), "lacks `iss`").await;

    let (begun, query) = other_login(&client, &idp).await;
    refused(begun, &format!("{query}&code=x"), "twice").await;
    let (begun, query) = other_login(&client, &idp).await;
    refused(begun, &format!("{query}&x={}", "y".repeat(9000)), "too long").await;
    let (begun, query) = other_login(&client, &idp).await;
    refused(begun, &query.replace(&code(&query), "error=access_denied"), "refused the login").await;
    let (begun, query) = other_login(&client, &idp).await;
    client.clock.advance_secs(LOGIN_SECS_MAX + 1);
    refused(begun, &query, "10 minutes").await;
}

fn state(begun: &LoginBegun) -> String {
    begun.url.split("state=").nth(1).unwrap().split('&').next().unwrap().to_owned()
}

async fn other_login(client: &Client, idp: &OidcProvider) -> (LoginBegun, String) {
    let begun = client.login.begin().await.unwrap();
    let query = idp.log_in(&begun.url, "ana").await;
    (begun, query)
}

#[tokio::test]
async fn an_agents_token_from_oidc_provider_counts_and_its_access_token_does_not() {
    let Some(idp) = OidcProvider::start(&[REDIRECT_URI]).await else { return };
    let clock = TestClock::new();
    let audience = "https://broker.example";
    let config = IssuerConfig {
        issuer: idp.issuer.clone(),
        preset: IssuerPreset::Generic,
        audience: audience.into(),
        algorithms: vec!["ES256".into()],
        jwks_file: None,
        ca_file: None,
        allow_private_network: true,
        require: BTreeMap::from([("client_id".to_owned(), vec!["agent-7".to_owned()])]),
        attributes: BTreeMap::from([("team".to_owned(), "team".to_owned())]),
        launcher: None,
        tier_max: None,
        token_life_secs_max: 600,
    };
    let identities = Identities::new(None, std::slice::from_ref(&config), Path::new("."), clock.clone()).unwrap();
    let token = idp.agent_token(audience, Some("run")).await;
    let agent = identities.authenticate_bearer(&token, clock.wall()).await.unwrap();
    assert_eq!(agent.id.as_str(), format!("{}#agent-7", idp.issuer));
    assert_eq!(agent.attributes["team"], "ops");
    // A07: the same issuer, key, audience and subject, but an access token.
    let access = idp.agent_token(audience, None).await;
    let error = identities.authenticate_bearer(&access, clock.wall()).await.unwrap_err();
    assert_eq!(error.refusal(), Refusal::Unacceptable, "{error}");
    // A05: for somebody else.
    let other = idp.agent_token("https://other.example", Some("run")).await;
    assert_eq!(identities.authenticate_bearer(&other, clock.wall()).await.unwrap_err().refusal(), Refusal::Audience);
    // A reviewer's ID token is for its client, not for the broker's agents.
    let strict =
        IssuerConfig { require: BTreeMap::from([("client_id".to_owned(), vec!["agent-8".to_owned()])]), ..config };
    let strict = Identities::new(None, &[strict], Path::new("."), clock.clone()).unwrap();
    assert_eq!(strict.authenticate_bearer(&token, clock.wall()).await.unwrap_err().refusal(), Refusal::Rule);
}

/// An IdP that answers what the test wrote: what a real one never would.
struct Liar {
    url: String,
    key: Signer,
    answer: Arc<Mutex<Value>>,
    /// What the token endpoint was sent: the authorization header and the form.
    sent: Arc<Mutex<(Option<String>, String)>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Liar {
    async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let key = Signer::rsa();
        let (base, jwks) = (url.clone(), json!({ "keys": [key.jwk("k", "sig")] }).to_string());
        let answer = Arc::new(Mutex::new(json!({})));
        let said = Arc::clone(&answer);
        let sent = Arc::new(Mutex::new((None, String::new())));
        let heard = Arc::clone(&sent);
        let app =
            axum::Router::new().fallback(move |uri: axum::http::Uri, headers: axum::http::HeaderMap, form: String| {
                let body = match uri.path() {
                    "/jwks" => jwks.clone(),
                    "/token" => {
                        *heard.lock() = (headers.get("authorization").map(|v| v.to_str().unwrap().to_owned()), form);
                        said.lock().to_string()
                    }
                    _ => json!({
                        "issuer": base, "jwks_uri": format!("{base}/jwks"), "token_endpoint": format!("{base}/token"),
                        "authorization_endpoint": format!("{base}/auth"),
                        "token_endpoint_auth_methods_supported": ["client_secret_post"],
                    })
                    .to_string(),
                };
                async move { body }
            });
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { url, key, answer, sent, task }
    }
}

#[tokio::test]
async fn an_id_token_that_is_not_for_this_login_is_refused() {
    let liar = Liar::start().await;
    let client = Client::new(&liar.url, "us", None, "RS256");
    let now = client.clock.now_secs();
    let access_token = "an access token";
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, access_token.as_bytes());
    let at_hash = B64.encode(&hash.as_ref()[..16]);
    let base = json!({
        "iss": liar.url, "sub": "ana", "aud": "us", "iat": now, "exp": now + 300, "at_hash": at_hash, "auth_time": now - 5, "acr": "mfa",
    });
    let try_with = async |changes: Value, header: Value, answer: Value| {
        let begun = client.login.begin().await.unwrap();
        let nonce = begun.url.split("nonce=").nth(1).unwrap().split('&').next().unwrap().to_owned();
        let claims = with(&with(&base, json!({ "nonce": nonce })), changes);
        let header = with(&json!({ "alg": "RS256", "kid": "k", "typ": "JWT" }), header);
        let whole = json!({ "id_token": liar.key.sign(&header, &claims), "access_token": access_token, "token_type": "Bearer" });
        *liar.answer.lock() = with(&whole, answer);
        let query = format!("state={}&code=c", state(&begun));
        client.finish(begun, &query).await
    };
    let none = json!({});
    let account = try_with(none.clone(), none.clone(), none.clone()).await.unwrap();
    assert_eq!((account.subject.as_str(), account.acr.as_deref(), account.groups.len()), ("ana", Some("mfa"), 0));
    assert_eq!(account.auth_time.unwrap().secs(), now - 5);
    try_with(json!({ "azp": "us", "at_hash": null, "groups": "sre" }), none.clone(), none.clone()).await.unwrap();

    for (changes, refusal) in [
        (json!({ "nonce": "replayed" }), Refusal::Login),
        (json!({ "nonce": null }), Refusal::Login),
        (json!({ "nonce": ["x"] }), Refusal::Login),
        (json!({ "aud": "another-app" }), Refusal::Audience),
        (json!({ "aud": ["us", "another-app"] }), Refusal::Audience),
        (json!({ "azp": "another-app" }), Refusal::Audience),
        (json!({ "azp": ["us"] }), Refusal::Audience),
        (json!({ "at_hash": "AAAAAAAAAAAAAAAAAAAAAA" }), Refusal::Login),
        (json!({ "at_hash": 1 }), Refusal::Login),
        (json!({ "iss": "https://other.example" }), Refusal::UnknownIssuer),
        (json!({ "exp": now }), Refusal::Expired),
        (json!({ "exp": now + 90_000 }), Refusal::Claim),
        (json!({ "iat": null }), Refusal::Claim),
        (json!({ "sub": "" }), Refusal::Claim),
        (json!({ "sub": "x".repeat(256) }), Refusal::Claim),
        (json!({ "auth_time": "yesterday" }), Refusal::Claim),
        (json!({ "groups": { "sre": true } }), Refusal::Claim),
        (json!({ "groups": [1] }), Refusal::Claim),
        (json!({ "groups": ["g".repeat(257)] }), Refusal::Claim),
        (json!({ "groups": (0..257).map(|n| n.to_string()).collect::<Vec<_>>() }), Refusal::Claim),
        (json!({ "events": {} }), Refusal::Unacceptable),
    ] {
        let error = try_with(changes.clone(), none.clone(), none.clone()).await.expect_err(&changes.to_string());
        assert_eq!(error.refusal(), refusal, "{changes}: {error}");
    }
    for header in
        [json!({ "alg": "PS256" }), json!({ "typ": "at+jwt" }), json!({ "typ": "logout+jwt" }), json!({ "kid": "x" })]
    {
        assert!(try_with(none.clone(), header.clone(), none.clone()).await.is_err(), "{header}");
    }
    for answer in [
        json!({ "id_token": null }),
        json!({ "id_token": "x" }),
        json!({ "access_token": null }),
        json!({ "access_token": "another" }),
    ] {
        assert!(try_with(none.clone(), none.clone(), answer.clone()).await.is_err(), "{answer}");
    }
}

#[tokio::test]
async fn the_clients_secret_goes_where_the_idp_wants_it() {
    let liar = Liar::start().await;
    for (secret, in_form) in [(Some("s/+%"), true), (None, false)] {
        let client = Client::new(&liar.url, "us", secret, "RS256");
        let begun = client.login.begin().await.unwrap();
        let query = format!("state={}&code=c", state(&begun));
        assert!(client.finish(begun, &query).await.is_err(), "it answers nothing");
        let (authorization, form) = liar.sent.lock().clone();
        assert_eq!(authorization, None);
        assert!(form.contains("client_id=us") && form.contains("code_verifier=") && form.contains("code=c"), "{form}");
        assert_eq!(form.contains("client_secret=s%2F%2B%25"), in_form, "{form}");
    }
}
