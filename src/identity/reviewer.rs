//! A reviewer's login: OIDC code flow with PKCE (OpenID Connect Core 1.0; RFC 7636, 9207, 9700). It ends in a verified
//! account; sessions are the server's, persons are the directory's.

use std::path::Path;
use std::sync::Arc;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest;
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde_json::{Map, Value};
use url::{Url, form_urlencoded};

use super::VerifiedAccount;
use super::claims::ClaimPath;
use super::error::{IdentityError, Refusal, refuse};
use super::jwt::{Algorithm, Claims, DATE_SECS_MAX, Expected, Token, TokenKind, json};
use super::keyset::{IssuerKeys, Metadata, Source};
use super::net::{Fetcher, Lookup, Reach};
use super::oidc::{algorithms, check_issuer, verify_with};
use super::pending_login::{LoginSeal, PendingLogin};
use crate::config::ReviewerLoginConfig;
use crate::core::id::Timestamp;
use crate::core::secret::Secret;
use crate::time::Clock;

/// Longest life of an ID token, in seconds.
pub const ID_TOKEN_SECS_MAX: u64 = 24 * 3600;
/// Largest answer of the token endpoint, in bytes.
pub const TOKEN_ANSWER_BYTES_MAX: usize = 64 * 1024;
/// Longest query that comes back from the IdP, in bytes.
pub const CALLBACK_BYTES_MAX: usize = 8 * 1024;
/// Most groups taken from a claim.
pub const GROUPS_MAX: usize = 256;
/// Longest group name, in bytes.
pub const GROUP_BYTES_MAX: usize = 256;
/// Longest subject, in bytes (OpenID Connect Core, section 2).
pub const SUBJECT_BYTES_MAX: usize = 255;

/// The beginning of a login.
#[derive(Debug)]
pub struct LoginBegun {
    /// Where the browser goes.
    pub url: String,
    /// The login, sealed: only the browser keeps it, as a cookie (`HttpOnly`, `Secure`, `SameSite=Lax`) that it brings
    /// back to [`ReviewerLogin::finish`].
    pub sealed: Secret,
}

/// What the browser brings back.
#[derive(Debug, Default)]
pub struct Callback {
    state: Option<String>,
    code: Option<Secret>,
    issuer: Option<String>,
    error: Option<String>,
}

impl Callback {
    /// Reads the query; a parameter that is there twice refuses it (RFC 6749, section 3.1).
    pub fn parse(query: &str) -> Result<Self, IdentityError> {
        if query.len() > CALLBACK_BYTES_MAX {
            return refuse(Refusal::Login, "the IdP's answer is too long");
        }
        let mut callback = Self::default();
        let mut code = None;
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            let slot = match &*name {
                "state" => &mut callback.state,
                "code" => &mut code,
                "iss" => &mut callback.issuer,
                "error" => &mut callback.error,
                _ => continue,
            };
            if slot.replace(value.into_owned()).is_some() {
                return refuse(Refusal::Login, "a parameter is twice in the IdP's answer");
            }
        }
        callback.code = code.map(Secret::new);
        Ok(callback)
    }
}

/// The client side of one IdP.
pub struct ReviewerLogin {
    issuer: String,
    client_id: String,
    client_secret: Option<Secret>,
    scope: String,
    redirect_uri: String,
    groups: Option<ClaimPath>,
    algorithms: Vec<Algorithm>,
    fetcher: Fetcher,
    keys: IssuerKeys,
    seal: LoginSeal,
    clock: Arc<dyn Clock>,
}

impl std::fmt::Debug for ReviewerLogin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ReviewerLogin({})", self.issuer)
    }
}

fn random() -> Result<String, IdentityError> {
    let mut bytes = [0u8; 32];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| IdentityError::new(Refusal::Configuration, "the system gives no randomness"))?;
    Ok(BASE64_URL_SAFE_NO_PAD.encode(bytes))
}

fn sha256(text: &str) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest::digest(&digest::SHA256, text.as_bytes()).as_ref());
    hash
}

impl ReviewerLogin {
    /// Checks the configuration and reads the client's secret; fetches nothing. `redirect_uri` is our own callback,
    /// exactly as registered at the IdP.
    pub fn new(
        config: &ReviewerLoginConfig,
        redirect_uri: &str,
        base: &Path,
        clock: Arc<dyn Clock>,
        lookup: Lookup,
    ) -> Result<Self, IdentityError> {
        let reach = if config.allow_private_network { Reach::Private } else { Reach::Public };
        check_issuer(&config.issuer, reach)?;
        let ca = config.ca_file.as_ref().map(|f| base.join(f));
        let fetcher = Fetcher::new(reach, ca.as_deref(), lookup)?;
        fetcher.check_url(&config.issuer)?;
        let secret = config.client_secret.as_ref().map(|r| r.read(base)).transpose();
        let scope_ok = |s: &String| !s.is_empty() && s.bytes().all(|b| b.is_ascii_graphic() && b != b'"' && b != b'\\');
        if config.client_id.is_empty() || !config.scopes.iter().all(scope_ok) {
            return refuse(Refusal::Configuration, "reviewer_login: client_id is empty or a scope is malformed");
        }
        let scopes = config.scopes.iter().map(String::as_str).filter(|s| *s != "openid");
        let source = Source::Discovery { issuer: config.issuer.clone(), fetcher: fetcher.clone() };
        Ok(Self {
            issuer: config.issuer.clone(),
            client_id: config.client_id.clone(),
            client_secret: secret.or_else(|e| refuse(Refusal::Configuration, format!("reviewer_login: {e}")))?,
            scope: std::iter::once("openid").chain(scopes).collect::<Vec<_>>().join(" "),
            redirect_uri: redirect_uri.to_owned(),
            groups: config.groups_claim.as_deref().map(ClaimPath::parse).transpose()?,
            algorithms: algorithms(&config.algorithms)?,
            fetcher,
            keys: IssuerKeys::new(source, Arc::clone(&clock)),
            seal: LoginSeal::new()?,
            clock,
        })
    }

    async fn metadata(&self) -> Result<Arc<Metadata>, IdentityError> {
        let none = || IdentityError::new(Refusal::KeysUnavailable, "the IdP has no metadata");
        self.keys.metadata().await?.ok_or_else(none)
    }

    fn endpoint(&self, metadata: &Metadata, member: &str) -> Result<Url, IdentityError> {
        let missing = || IdentityError::new(Refusal::KeysUnavailable, format!("the IdP's metadata has no `{member}`"));
        self.fetcher.check_url(metadata.text(member).ok_or_else(missing)?)
    }

    /// Begins a login.
    pub async fn begin(&self) -> Result<LoginBegun, IdentityError> {
        let metadata = self.metadata().await?;
        for (member, needed) in [("response_types_supported", "code"), ("code_challenge_methods_supported", "S256")] {
            if !metadata.allows(member, needed) {
                return refuse(Refusal::Configuration, format!("the IdP's `{member}` doesn't have {needed}"));
            }
        }
        let (state, nonce, verifier) = (random()?, random()?, random()?);
        let mut url = self.endpoint(&metadata, "authorization_endpoint")?;
        url.query_pairs_mut()
            .append_pair("response_type", "code")
            .append_pair("client_id", &self.client_id)
            .append_pair("redirect_uri", &self.redirect_uri)
            .append_pair("scope", &self.scope)
            .append_pair("state", &state)
            .append_pair("nonce", &nonce)
            .append_pair("code_challenge", &BASE64_URL_SAFE_NO_PAD.encode(sha256(&verifier)))
            .append_pair("code_challenge_method", "S256");
        let pending = PendingLogin { state, nonce, verifier, begun_boot_ms: self.clock.boot_ms() };
        Ok(LoginBegun { url: url.into(), sealed: self.seal.seal(&pending)? })
    }

    /// Finishes a login: the answer must belong to the login that this browser brings back sealed, and the ID token to
    /// this client and this nonce.
    pub async fn finish(
        &self,
        sealed: &str,
        callback: &Callback,
        now: Timestamp,
    ) -> Result<VerifiedAccount, IdentityError> {
        let pending = self.seal.open(sealed, &*self.clock)?;
        let same = |a: &[u8], b: &[u8]| verify_slices_are_equal(a, b).is_ok();
        if !callback.state.as_ref().is_some_and(|state| same(state.as_bytes(), pending.state.as_bytes())) {
            return refuse(Refusal::Login, "`state` is not that of the pending login");
        }
        let taken = self.seal.take(&pending, &*self.clock)?;
        let metadata = self.metadata().await?;
        // RFC 9207, section 2.4: another IdP's answer is not ours to take.
        match callback.issuer.as_deref() {
            Some(iss) if iss == self.issuer => {}
            Some(_) => return refuse(Refusal::Login, "`iss` of the answer is another issuer"),
            None if metadata.is_true("authorization_response_iss_parameter_supported") => {
                return refuse(Refusal::Login, "the answer lacks `iss`, which this IdP always sends");
            }
            None => {}
        }
        if callback.error.is_some() {
            return refuse(Refusal::Login, "the IdP refused the login");
        }
        let Some(code) = &callback.code else {
            return refuse(Refusal::Login, "the answer has no `code`");
        };
        let answer = self.exchange(&metadata, code, &pending.verifier).await?;
        let text = |member: &str| answer.get(member).and_then(Value::as_str);
        let Some(id_token) = text("id_token") else {
            return refuse(Refusal::Login, "the IdP gave no ID token");
        };
        let claims = self.verify_id_token(id_token, now).await?;
        check_id_token(&claims, &self.client_id, &pending.nonce)?;
        check_at_hash(&claims, Token::parse(id_token)?.algorithm(), text("access_token"))?;
        let account = self.account(claims)?;
        taken.finish();
        Ok(account)
    }

    async fn verify_id_token(&self, id_token: &str, now: Timestamp) -> Result<Claims, IdentityError> {
        let expected = Expected {
            kind: TokenKind::IdToken,
            algorithms: &self.algorithms,
            issuer: Some(&self.issuer),
            audience: &self.client_id,
            life_secs_max: ID_TOKEN_SECS_MAX,
        };
        verify_with(&self.keys, id_token, &expected, now).await.map_err(|e| e.at("ID token"))
    }

    async fn exchange(
        &self,
        metadata: &Metadata,
        code: &Secret,
        verifier: &str,
    ) -> Result<Map<String, Value>, IdentityError> {
        let url = self.endpoint(metadata, "token_endpoint")?;
        let mut form = vec![
            ("grant_type", "authorization_code"),
            ("code", code.expose()),
            ("redirect_uri", self.redirect_uri.as_str()),
            ("code_verifier", verifier),
        ];
        // RFC 6749, section 2.3.1: both parts of the header are form-encoded first.
        let encode = |text: &str| form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
        let methods = "token_endpoint_auth_methods_supported";
        let basic = match &self.client_secret {
            None => {
                form.push(("client_id", &self.client_id));
                None
            }
            Some(secret) if metadata.allows(methods, "client_secret_basic") => {
                Some((encode(&self.client_id), Secret::new(encode(secret.expose()))))
            }
            Some(secret) => {
                form.push(("client_id", &self.client_id));
                form.push(("client_secret", secret.expose()));
                None
            }
        };
        let basic = basic.as_ref().map(|(id, secret)| (id.as_str(), secret.expose()));
        let (status, body) = self.fetcher.post_form(url.as_str(), &form, basic, TOKEN_ANSWER_BYTES_MAX).await?;
        let answer = json::strict_object(&body, json::JSON_DEPTH_MAX);
        match answer {
            Some(answer) if status == 200 => Ok(answer),
            _ => {
                // OAuth error codes are a closed set; anything else from there is not repeated.
                let known = ["invalid_grant", "invalid_client", "invalid_request", "unauthorized_client"];
                let error = answer.as_ref().and_then(|a| a.get("error")).and_then(Value::as_str);
                let error = known.into_iter().find(|k| Some(*k) == error).unwrap_or("no known error code");
                refuse(Refusal::Login, format!("the IdP's token endpoint answered {status} ({error})"))
            }
        }
    }

    fn account(&self, claims: Claims) -> Result<VerifiedAccount, IdentityError> {
        if claims.subject.len() > SUBJECT_BYTES_MAX || claims.subject.chars().any(char::is_control) {
            return refuse(Refusal::Claim, "`sub` is longer than 255 bytes or holds control characters");
        }
        let auth_time = match claims.all.get("auth_time") {
            None => None,
            Some(value) => match value.as_u64() {
                Some(secs) if secs <= DATE_SECS_MAX => Some(Timestamp(secs * 1000)),
                _ => return refuse(Refusal::Claim, "`auth_time` is not an integer number of seconds"),
            },
        };
        let acr = claims.all.get("acr").and_then(Value::as_str).filter(|acr| acr.len() <= GROUP_BYTES_MAX);
        Ok(VerifiedAccount {
            issuer: self.issuer.clone(),
            groups: self.groups.as_ref().map_or(Ok(Vec::new()), |path| read_groups(path, &claims.all))?,
            auth_time,
            acr: acr.map(str::to_owned),
            subject: claims.subject,
        })
    }
}

/// `nonce` and `azp` (OpenID Connect Core, section 3.1.3.7).
fn check_id_token(claims: &Claims, client_id: &str, nonce: &str) -> Result<(), IdentityError> {
    let text = |claim: &str| claims.all.get(claim).map(Value::as_str);
    let ours = match text("nonce") {
        Some(Some(found)) => verify_slices_are_equal(found.as_bytes(), nonce.as_bytes()).is_ok(),
        _ => false,
    };
    if !ours {
        return refuse(Refusal::Login, "the ID token's `nonce` is not that of this login");
    }
    if text("azp").is_some_and(|azp| azp != Some(client_id)) {
        return refuse(Refusal::Audience, "the ID token's `azp` is another client");
    }
    Ok(())
}

/// `at_hash`, if it is there: the left half of the access token's hash (OpenID Connect Core, section 3.1.3.6).
fn check_at_hash(claims: &Claims, algorithm: Algorithm, access_token: Option<&str>) -> Result<(), IdentityError> {
    let Some(at_hash) = claims.all.get("at_hash") else { return Ok(()) };
    let hash = match algorithm {
        Algorithm::Es256 | Algorithm::Rs256 | Algorithm::Ps256 => &digest::SHA256,
        Algorithm::Es384 => &digest::SHA384,
        Algorithm::EdDsa => &digest::SHA512,
    };
    let expected = access_token.map(|token| {
        let full = digest::digest(hash, token.as_bytes());
        BASE64_URL_SAFE_NO_PAD.encode(&full.as_ref()[..full.as_ref().len() / 2])
    });
    if expected.is_some() && at_hash.as_str() == expected.as_deref() {
        return Ok(());
    }
    refuse(Refusal::Login, "the ID token's `at_hash` is not that of the access token beside it")
}

fn read_groups(path: &ClaimPath, claims: &Map<String, Value>) -> Result<Vec<String>, IdentityError> {
    let good = |value: &Value| {
        let text = value.as_str()?;
        (!text.is_empty() && text.len() <= GROUP_BYTES_MAX && !text.chars().any(char::is_control))
            .then(|| text.to_owned())
    };
    let groups = match path.find(claims) {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(Value::Array(list)) if list.len() <= GROUPS_MAX => list.iter().map(good).collect(),
        Some(one @ Value::String(_)) => good(one).map(|group| vec![group]),
        Some(_) => None,
    };
    match groups {
        Some(groups) => Ok(groups),
        None => refuse(Refusal::Claim, format!("the groups' claim is not a list of up to {GROUPS_MAX} short texts")),
    }
}
