//! The one strict JWT verifier under everything: JWT-SVIDs, agents' OIDC tokens, reviewers' ID tokens.
//! It takes bytes, keys that the caller chose, and what is expected; it fetches nothing, ever.

pub mod json;
pub mod key;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde_json::{Map, Value};

pub use key::{Algorithm, KeySet, KeyUse, VerifyingKey};

use super::error::{IdentityError, Refusal, refuse};
use crate::core::id::Timestamp;

/// Longest token, in bytes.
pub const TOKEN_BYTES_MAX: usize = 16 * 1024;
/// Longest signature, in bytes (RSA with 8192 bits).
const SIGNATURE_BYTES_MAX: usize = 1024;
/// How far in the future `nbf` and `iat` may lie, for clocks that differ, in seconds.
pub const CLOCK_LEEWAY_SECS: u64 = 30;
/// How long after `exp` a token still counts, in seconds: not at all.
pub const EXPIRY_LEEWAY_SECS: u64 = 0;
/// Latest date that is taken for one: the year 9999, in seconds since the epoch.
pub const DATE_SECS_MAX: u64 = 253_402_300_799;
/// Most keys of one `kid` that are tried on a token.
const CANDIDATES_MAX: usize = 4;

/// What kind of token is expected: each has its own `typ` and its own required claims (regression A7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// JWT-SVID: `typ` is `JWT`, `JOSE` or absent; `kid` is required (JWT-SVID, 2 and 5).
    JwtSvid,
    /// An OIDC token of an agent: `typ` is `JWT` or absent, `iat` is required.
    Workload,
    /// An OIDC ID token of a reviewer's login: as above (OpenID Connect Core, 2).
    IdToken,
}

impl TokenKind {
    fn accepts_typ(self, typ: Option<&str>) -> bool {
        match self {
            Self::JwtSvid => matches!(typ, None | Some("JWT" | "JOSE")),
            Self::Workload | Self::IdToken => matches!(typ, None | Some("JWT")),
        }
    }
}

/// What a token must be to be believed.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    /// Which kind.
    pub kind: TokenKind,
    /// The algorithms that the operator allows.
    pub algorithms: &'a [Algorithm],
    /// The exact `iss`; `None` where it means nothing (JWT-SVID).
    pub issuer: Option<&'a str>,
    /// The exact audience, and the only one.
    pub audience: &'a str,
    /// Longest life (`exp − iat`; without `iat`, `exp − now`), in seconds.
    pub life_secs_max: u64,
}

/// A token that was read, but not believed.
#[derive(Debug)]
pub struct Token<'a> {
    signing_input: &'a [u8],
    signature: Vec<u8>,
    algorithm: Algorithm,
    kid: Option<String>,
    typ: Option<String>,
    claims: Map<String, Value>,
}

/// Claims whose signature, time, type and audience were verified.
#[derive(Debug, Clone)]
pub struct Claims {
    /// All of them.
    pub all: Map<String, Value>,
    /// `sub`, not empty.
    pub subject: String,
    /// `iat`, in seconds since the epoch.
    pub issued_at_secs: Option<u64>,
    /// `exp`, in seconds since the epoch.
    pub expires_at_secs: u64,
}

impl Claims {
    /// When the token expires.
    pub const fn expires_at(&self) -> Timestamp {
        Timestamp(self.expires_at_secs.saturating_mul(1000))
    }
}

impl<'a> Token<'a> {
    /// Reads a compact JWS (RFC 7515, section 7.1) and refuses what no kind of token may have.
    pub fn parse(token: &'a str) -> Result<Self, IdentityError> {
        if token.len() > TOKEN_BYTES_MAX {
            return refuse(Refusal::Malformed, format!("the token is longer than {TOKEN_BYTES_MAX} bytes"));
        }
        let mut parts = token.split('.');
        let (Some(header), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return refuse(Refusal::Malformed, "the token is not a compact JWS (three parts)");
        };
        let object = |part: &str, what: &str| {
            let bytes = BASE64_URL_SAFE_NO_PAD.decode(part).ok();
            bytes.and_then(|b| json::strict_object(&b, json::JSON_DEPTH_MAX)).ok_or_else(|| {
                let why = "is not base64url of one JSON object without doubled members or deep nesting";
                IdentityError::new(Refusal::Malformed, format!("the token's {what} {why}"))
            })
        };
        let header_members = object(header, "header")?;
        let claims = object(payload, "payload")?;
        let signature = match BASE64_URL_SAFE_NO_PAD.decode(signature) {
            Ok(bytes) if !bytes.is_empty() && bytes.len() <= SIGNATURE_BYTES_MAX => bytes,
            _ => return refuse(Refusal::Malformed, "the token's signature is empty, too long or not base64url"),
        };
        let (algorithm, kid, typ) = read_header(&header_members)?;
        let signing_input = &token.as_bytes()[..header.len() + 1 + payload.len()];
        Ok(Self { signing_input, signature, algorithm, kid, typ, claims })
    }

    /// An unverified claim: good for choosing the verifier, for nothing else.
    pub fn unverified(&self, claim: &str) -> Option<&str> {
        self.claims.get(claim)?.as_str()
    }

    /// The header's `kid`.
    pub fn kid(&self) -> Option<&str> {
        self.kid.as_deref()
    }

    /// The header's `alg`: one of ours, and still only a claim.
    pub const fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Verifies with the keys of the one issuer that the caller chose. [`Refusal::UnknownKey`] means that
    /// fresher keys may help; every other refusal is final.
    pub fn verify(self, keys: &KeySet, expected: &Expected<'_>, now: Timestamp) -> Result<Claims, IdentityError> {
        self.check_header(expected)?;
        self.check_signature(keys)?;
        // Only now is anything in the claims worth a reason.
        check_type_claims(&self.claims, expected.kind)?;
        let (issued_at_secs, expires_at_secs) = check_times(&self.claims, expected, now)?;
        if let Some(issuer) = expected.issuer
            && self.claims.get("iss").and_then(Value::as_str) != Some(issuer)
        {
            return refuse(Refusal::UnknownIssuer, "`iss` is absent or not exactly the configured issuer");
        }
        check_audience(&self.claims, expected.audience)?;
        let subject = match self.claims.get("sub").and_then(Value::as_str) {
            Some(sub) if !sub.is_empty() => sub.to_owned(),
            _ => return refuse(Refusal::Claim, "`sub` is absent, empty or not a string"),
        };
        Ok(Claims { all: self.claims, subject, issued_at_secs, expires_at_secs })
    }

    fn check_header(&self, expected: &Expected<'_>) -> Result<(), IdentityError> {
        if !expected.algorithms.contains(&self.algorithm) {
            return refuse(
                Refusal::Unacceptable,
                format!("the token is signed with {}, which is not among the allowed algorithms", self.algorithm),
            );
        }
        if !expected.kind.accepts_typ(self.typ.as_deref()) {
            return refuse(Refusal::Unacceptable, "the token's `typ` is that of another kind of token");
        }
        if expected.kind == TokenKind::JwtSvid && self.kid.is_none() {
            return refuse(Refusal::Malformed, "the JWT-SVID has no `kid`");
        }
        Ok(())
    }

    fn check_signature(&self, keys: &KeySet) -> Result<(), IdentityError> {
        let candidates = keys.candidates(self.kid(), self.algorithm);
        if candidates.is_empty() {
            return match self.kid() {
                Some(kid) if keys.has_kid(kid) => refuse(
                    Refusal::BadSignature,
                    format!("the issuer's key of that `kid` is not a key for {}", self.algorithm),
                ),
                Some(_) => refuse(Refusal::UnknownKey, "the issuer has no key of that `kid`"),
                None => refuse(
                    Refusal::UnknownKey,
                    format!("the token has no `kid` and the issuer has none or several keys for {}", self.algorithm),
                ),
            };
        }
        let signed = candidates
            .iter()
            .take(CANDIDATES_MAX)
            .any(|key| key.verifies(self.algorithm, self.signing_input, &self.signature));
        if !signed {
            return refuse(Refusal::BadSignature, "the signature was not made by the issuer's key of that `kid`");
        }
        Ok(())
    }
}

/// `jku`, `x5u`, `jwk`, `x5c` and `x5t` are not looked at: the key comes from our own set, by `kid` alone (A6).
fn read_header(header: &Map<String, Value>) -> Result<(Algorithm, Option<String>, Option<String>), IdentityError> {
    // We understand no critical extension, so each is one that must be refused (RFC 7515, section 4.1.11; A4).
    for member in ["crit", "b64", "zip", "enc"] {
        if header.contains_key(member) {
            return refuse(Refusal::Unacceptable, format!("the token's header has `{member}`, which is not supported"));
        }
    }
    let text = |member: &str, max: usize| match header.get(member) {
        None => Ok(None),
        Some(Value::String(text)) if !text.is_empty() && text.len() <= max => Ok(Some(text.clone())),
        Some(_) => {
            refuse(Refusal::Malformed, format!("the token header's `{member}` is not a text of 1 to {max} bytes"))
        }
    };
    let typ = text("typ", 64)?;
    if text("cty", 64)?.is_some_and(|cty| cty.eq_ignore_ascii_case("jwt")) {
        return refuse(Refusal::Unacceptable, "a nested JWT is not accepted");
    }
    let algorithm = text("alg", 16)?
        .and_then(|alg| alg.parse().ok())
        .ok_or_else(|| IdentityError::new(Refusal::Unacceptable, "the token's `alg` is not a supported signature"))?;
    Ok((algorithm, text("kid", key::KID_BYTES_MAX)?, typ))
}

/// Tokens that say in their payload that they are something else: security events (logout tokens among them,
/// which older providers send without a `typ`), and what Keycloak marks there.
fn check_type_claims(claims: &Map<String, Value>, kind: TokenKind) -> Result<(), IdentityError> {
    let other = claims.get("typ").and_then(Value::as_str);
    if claims.contains_key("events") || matches!(other, Some("Logout" | "Refresh" | "Offline")) {
        return refuse(Refusal::Unacceptable, "the token is a logout, event or refresh token");
    }
    if kind == TokenKind::Workload && claims.contains_key("nonce") {
        return refuse(
            Refusal::Unacceptable,
            "the token is the ID token of somebody's login (`nonce`), not an agent's",
        );
    }
    if claims.contains_key("cnf") {
        return refuse(Refusal::Unacceptable, "the token is bound to a key (`cnf`) and is no bearer token");
    }
    Ok(())
}

/// A date is an integer between 0 and the year 9999; not a string, a float, negative or huge (A3).
fn date(claims: &Map<String, Value>, claim: &'static str) -> Result<Option<u64>, IdentityError> {
    match claims.get(claim) {
        None => Ok(None),
        Some(value) => match value.as_u64() {
            Some(secs) if secs <= DATE_SECS_MAX => Ok(Some(secs)),
            _ => refuse(Refusal::Claim, format!("`{claim}` is not an integer number of seconds in a sane range")),
        },
    }
}

fn check_times(
    claims: &Map<String, Value>,
    expected: &Expected<'_>,
    now: Timestamp,
) -> Result<(Option<u64>, u64), IdentityError> {
    let now_secs = now.secs();
    let Some(exp) = date(claims, "exp")? else {
        return refuse(Refusal::Claim, "`exp` is absent");
    };
    let nbf = date(claims, "nbf")?;
    let iat = date(claims, "iat")?;
    if iat.is_none() && expected.kind != TokenKind::JwtSvid {
        return refuse(Refusal::Claim, "`iat` is absent");
    }
    if now.0 >= exp.saturating_add(EXPIRY_LEEWAY_SECS).saturating_mul(1000) {
        return refuse(Refusal::Expired, "the token has expired (`exp`)");
    }
    for (claim, secs) in [("nbf", nbf), ("iat", iat)] {
        if secs.is_some_and(|s| s > now_secs.saturating_add(CLOCK_LEEWAY_SECS)) {
            return refuse(Refusal::NotYetValid, format!("`{claim}` lies in the future; check the clocks"));
        }
    }
    let begin = iat.unwrap_or(now_secs);
    if exp <= begin || exp - begin > expected.life_secs_max {
        return refuse(
            Refusal::Claim,
            format!("the token's life is not between 1 and {} seconds", expected.life_secs_max),
        );
    }
    Ok((iat, exp))
}

/// Exactly ours and nobody else's: a string, or a list of that one string (A5).
fn check_audience(claims: &Map<String, Value>, audience: &str) -> Result<(), IdentityError> {
    let ours = match claims.get("aud") {
        Some(Value::String(aud)) => aud == audience,
        Some(Value::Array(list)) => matches!(list.as_slice(), [Value::String(aud)] if aud == audience),
        _ => false,
    };
    if ours { Ok(()) } else { refuse(Refusal::Audience, "`aud` is not exactly the configured audience, alone") }
}
