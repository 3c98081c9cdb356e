//! The thin client: one call, with a deadline, a size limit, no redirect, and a verdict on the status code.
//! It knows HTTP and the target's error form, not what the calls mean.

use std::time::Duration;

use reqwest::Method;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde::de::DeserializeOwned;
use serde_json::Value;
use zeroize::Zeroizing;

use crate::core::secret::Secret;

/// Largest answer that is read, in bytes. A list of 50 000 leases fits.
pub(super) const RESPONSE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Longest part of the target's own words that goes into an error, in characters.
const MESSAGE_CHARS_MAX: usize = 300;
/// The longest wait for a TCP and TLS connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

const TOKEN: HeaderName = HeaderName::from_static("x-vault-token");
const NAMESPACE: HeaderName = HeaderName::from_static("x-vault-namespace");
/// The target refuses calls that a server-side request forgery could make: agents of its own set this.
const REQUEST: HeaderName = HeaderName::from_static("x-vault-request");

/// What an answer other than success means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing left this machine: no name, no connection, no TLS.
    Unreachable,
    /// The call left, and no whole answer came back in time.
    NoAnswer,
    /// 503 with the target's own words: sealed.
    Sealed,
    /// 501: not initialised.
    NotInitialised,
    /// 500 `local node not active`, just after unseal or on a standby.
    NotActive,
    /// 429: a rate limit. No Retry-After comes with it.
    Busy,
    /// 403 `permission denied` alone: the token is bad or expired (or the policy's text is that short).
    TokenRefused,
    /// Any other 403 of the target's: the token is good, its policy says no.
    PolicyDenied,
    /// 404 with the target's own `{"errors":[]}`: an empty list, no such entry.
    Empty,
    /// 404 with the target's words: no such mount or namespace.
    NotFound,
    /// Exactly 400 `invalid lease`.
    InvalidLease,
    /// Any other 400 of the target's.
    Refused,
    /// 500 where the target says that it could not even connect to the database behind it.
    BehindUnreachable,
    /// Any other 5xx.
    Failed,
    /// 3xx, a code that this API doesn't have, an answer too large or not of the form it should have; 400, 403 and 404 of
    /// something between us and the target, which says nothing about what the target did.
    Unexpected,
}

/// A call that did not succeed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{what}: {message}")]
pub(super) struct Fault {
    /// What it means.
    pub kind: Kind,
    /// The call, for example `PUT sys/leases/revoke/…`.
    pub what: String,
    /// The target's words, bounded, without control characters and without the token; or ours.
    pub message: String,
}

impl Fault {
    /// A fault that is no answer.
    pub(super) fn new(kind: Kind, what: impl Into<String>, message: impl Into<String>) -> Self {
        Self { kind, what: what.into(), message: message.into() }
    }
}

/// A successful answer. The body may hold a secret: it is zeroised.
pub(super) struct Reply {
    what: String,
    /// 200, 202 or 204.
    pub status: u16,
    body: Zeroizing<Vec<u8>>,
}

impl Reply {
    /// Reads the body. An error never echoes it (regression R2).
    pub(super) fn json<T: DeserializeOwned>(&self) -> Result<T, Fault> {
        serde_json::from_slice(&self.body).map_err(|e| {
            let place = format!("line {}, column {}", e.line(), e.column());
            Fault::new(Kind::Unexpected, &*self.what, format!("the answer is not of the form this API has ({place})"))
        })
    }
}

/// One call.
pub(super) struct Call<'a> {
    /// `GET`, `PUT`, `LIST`.
    pub method: &'static str,
    /// Below `/v1/`; every part was checked by `path.rs`.
    pub path: &'a str,
    /// In which namespace.
    pub namespace: Option<&'a str>,
    /// By whose token.
    pub token: Option<&'a Secret>,
    /// The JSON body.
    pub body: Option<&'a Value>,
    /// How long at most, all in all.
    pub deadline: Duration,
}

/// The HTTP client of one target.
pub(super) struct Client {
    http: reqwest::Client,
    base: String,
}

impl Client {
    /// `base` was checked to be scheme, host and port. With `ca`, that PEM is all that is trusted.
    pub(super) fn new(base: url::Url, ca: Option<&[u8]>) -> Result<Self, String> {
        let mut builder = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .no_proxy()
            .referer(false)
            .connect_timeout(CONNECT_DEADLINE)
            // Below the target's own idle limit (5 min): a call on a connection that it just closed would be in doubt.
            .pool_idle_timeout(Duration::from_mins(1))
            .user_agent(concat!("countersign/", env!("CARGO_PKG_VERSION")));
        if let Some(pem) = ca {
            let certificates =
                reqwest::Certificate::from_pem_bundle(pem).map_err(|e| format!("`ca_file` is not PEM: {e}"))?;
            if certificates.is_empty() {
                return Err("`ca_file` has no certificate in it".to_owned());
            }
            builder = builder.tls_certs_only(certificates);
        }
        let http = builder.build().map_err(|e| format!("the HTTP client can't be made: {e}"))?;
        Ok(Self { http, base: base.as_str().trim_end_matches('/').to_owned() })
    }

    /// Makes the call.
    pub(super) async fn call(&self, call: Call<'_>) -> Result<Reply, Fault> {
        let what = format!("{} {}", call.method, call.path);
        let wrong = |message: &str| Fault::new(Kind::Unexpected, &*what, message);
        let mut headers = HeaderMap::new();
        headers.insert(REQUEST, HeaderValue::from_static("true"));
        if let Some(token) = call.token {
            let mut value = HeaderValue::from_str(token.expose())
                .map_err(|_| wrong("the token has characters that no token has"))?;
            value.set_sensitive(true);
            headers.insert(TOKEN, value);
        }
        if let Some(namespace) = call.namespace {
            headers
                .insert(NAMESPACE, HeaderValue::from_str(namespace).map_err(|_| wrong("the namespace is malformed"))?);
        }
        let method = Method::from_bytes(call.method.as_bytes()).map_err(|_| wrong("no such method"))?;
        let mut request = self
            .http
            .request(method, format!("{}/v1/{}", self.base, call.path))
            .headers(headers)
            .timeout(call.deadline);
        if let Some(body) = call.body {
            request = request.json(body);
        }
        let mut response = request.send().await.map_err(|e| transport(&what, e))?;
        let status = response.status().as_u16();
        let mut body = Zeroizing::new(Vec::new());
        while let Some(chunk) = response.chunk().await.map_err(|e| transport(&what, e))? {
            if body.len() + chunk.len() > RESPONSE_BYTES_MAX {
                return Err(wrong(&format!("the answer is larger than {RESPONSE_BYTES_MAX} bytes")));
            }
            body.extend_from_slice(&chunk);
        }
        if matches!(status, 200 | 202 | 204) {
            return Ok(Reply { what, status, body });
        }
        let (kind, message) = classify(status, &body);
        let message = match call.token {
            Some(token) => message.replace(token.expose(), "…"),
            None => message,
        };
        Err(Fault { kind, what, message })
    }
}

/// A transport error: the one question is whether anything left.
fn transport(what: &str, error: reqwest::Error) -> Fault {
    let kind = if error.is_connect() || error.is_builder() { Kind::Unreachable } else { Kind::NoAnswer };
    let error = error.without_url();
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    Fault::new(kind, what, tidy(&text))
}

/// What a status code with this body means ("Codes" in the notes on this API; each was seen on OpenBao 2.7.2).
pub(super) fn classify(status: u16, body: &[u8]) -> (Kind, String) {
    #[derive(serde::Deserialize)]
    struct Errors {
        errors: Vec<String>,
    }
    let errors = serde_json::from_slice::<Errors>(body).ok().map(|e| e.errors);
    let ours = errors.is_some();
    let errors = errors.unwrap_or_default();
    let text = errors.join("; ");
    let kind = match status {
        400 | 403 | 404 if !ours => Kind::Unexpected,
        400 if errors == ["invalid lease"] => Kind::InvalidLease,
        400 => Kind::Refused,
        403 if errors == ["permission denied"] => Kind::TokenRefused,
        403 => Kind::PolicyDenied,
        404 if errors.is_empty() => Kind::Empty,
        404 => Kind::NotFound,
        429 => Kind::Busy,
        500 if text.contains("local node not active") => Kind::NotActive,
        500 if text.contains("failed to connect to") && text.contains("dial error") => Kind::BehindUnreachable,
        501 if ours => Kind::NotInitialised,
        // A gateway's own 503 says nothing about what went through before it.
        503 if ours && text.to_ascii_lowercase().contains("sealed") => Kind::Sealed,
        500..=599 => Kind::Failed,
        _ => Kind::Unexpected,
    };
    let said = if text.is_empty() { format!("{status}") } else { format!("{status} {}", tidy(&text)) };
    (kind, said)
}

/// Bounds foreign words and takes the control characters out.
fn tidy(text: &str) -> String {
    let flat: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let words = flat.split_whitespace().collect::<Vec<_>>().join(" ");
    if words.chars().count() <= MESSAGE_CHARS_MAX {
        return words;
    }
    words.chars().take(MESSAGE_CHARS_MAX).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_one_meaning() {
        let cases: &[(u16, &str, Kind)] = &[
            (400, r#"{"errors":["invalid lease"]}"#, Kind::InvalidLease),
            (400, r#"{"errors":["invalid lease "]}"#, Kind::Refused),
            (400, r#"{"errors":["invalid lease","and more"]}"#, Kind::Refused),
            (
                400,
                r#"{"errors":["failed to revoke entry: resp: (*logical.Response)(nil) err: failed to connect to"]}"#,
                Kind::Refused,
            ),
            (400, "invalid lease", Kind::Unexpected),
            (403, r#"{"errors":["permission denied"]}"#, Kind::TokenRefused),
            (403, r#"{"errors":["1 error occurred:\n\t* permission denied\n\n"]}"#, Kind::PolicyDenied),
            (403, "", Kind::Unexpected),
            (403, "<html>blocked</html>", Kind::Unexpected),
            (404, r#"{"errors":[]}"#, Kind::Empty),
            (404, "", Kind::Unexpected),
            (404, "{}", Kind::Unexpected),
            (404, "<html>not here</html>", Kind::Unexpected),
            (404, r#"{"errors":["namespace not found"]}"#, Kind::NotFound),
            (429, "", Kind::Busy),
            (500, r#"{"errors":["local node not active but active cluster node not found"]}"#, Kind::NotActive),
            (
                500,
                r#"{"errors":["unable to start transaction: failed to connect to `x`: dial error: dial tcp"]}"#,
                Kind::BehindUnreachable,
            ),
            (500, r#"{"errors":["tuple concurrently updated"]}"#, Kind::Failed),
            (501, r#"{"errors":["Vault is not initialized"]}"#, Kind::NotInitialised),
            (503, r#"{"errors":["Vault is sealed"]}"#, Kind::Sealed),
            (503, "<html>upstream is sealed</html>", Kind::Failed),
            (502, "", Kind::Failed),
            (301, "", Kind::Unexpected),
            (307, "", Kind::Unexpected),
            (418, "", Kind::Unexpected),
            (206, "", Kind::Unexpected),
        ];
        for (status, body, kind) in cases {
            assert_eq!(classify(*status, body.as_bytes()).0, *kind, "{status} {body}");
        }
    }

    #[test]
    fn foreign_words_are_bounded_and_flat() {
        let (_, said) = classify(500, format!(r#"{{"errors":["a\u001b[31m\nb{}"]}}"#, "x".repeat(5000)).as_bytes());
        assert!(said.chars().count() < MESSAGE_CHARS_MAX + 10 && !said.chars().any(char::is_control), "{said}");
    }
}
