//! Bodies and answers: JSON read strictly (size, depth, duplicate members, unknown members), answers never cached.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::problem::{Failure, problem};
use super::{Shared, console};

/// Reads a body, up to the configured size and within the configured time.
pub async fn read(app: &Shared, request: Request) -> Result<Bytes, Failure> {
    let (max, ms_max) = {
        let limits = &app.broker.rules().config.limits;
        (limits.body_bytes_max, limits.body_read_ms_max)
    };
    let body = Limited::new(request.into_body(), max);
    match tokio::time::timeout(Duration::from_millis(ms_max), body.collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            let detail = format!("a body has at most {max} bytes");
            let next = "Send less: ask for fewer permissions at once.";
            Err(problem(StatusCode::PAYLOAD_TOO_LARGE, "too-large", "Too large", detail, next))
        }
        Ok(Err(_)) => {
            let (title, detail) = ("The body broke off", "it never came whole");
            Err(problem(StatusCode::BAD_REQUEST, "body-broken", title, detail, "Send the request again."))
        }
        Err(_) => {
            let detail = format!("the body did not come within {ms_max} ms");
            Err(problem(StatusCode::REQUEST_TIMEOUT, "too-slow", "Too slow", detail, "Send the request again."))
        }
    }
}

/// A JSON body, strictly.
pub struct Json<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Shared> for Json<T> {
    type Rejection = Failure;
    async fn from_request(request: Request, app: &Shared) -> Result<Self, Failure> {
        let json = request
            .headers()
            .get(header::CONTENT_TYPE)
            .and_then(|v| v.to_str().ok())
            .is_some_and(|v| v.split(';').next().is_some_and(|t| t.trim() == "application/json"));
        let depth = app.broker.rules().config.limits.json_depth_max;
        let bytes = read(app, request).await?;
        if !json && !bytes.is_empty() {
            let (title, detail) = ("Unsupported media type", "this address reads JSON");
            let next = "Send JSON with `Content-Type: application/json`.";
            return Err(problem(StatusCode::UNSUPPORTED_MEDIA_TYPE, "media-type", title, detail, next));
        }
        parse(&bytes, depth).map(Self)
    }
}

/// Parses JSON strictly. The error says where, never what (regression R2).
pub fn parse<T: DeserializeOwned>(bytes: &[u8], depth: usize) -> Result<T, Failure> {
    let bad = |detail: String| {
        let next = "Correct the body and send it again; the documentation shows each request's members.";
        problem(StatusCode::BAD_REQUEST, "invalid-json", "The body can't be read", detail, next)
    };
    let bytes = if bytes.is_empty() { b"{}" } else { bytes };
    crate::wire::strict_json::check(bytes, depth).map_err(|e| bad(e.to_string()))?;
    serde_json::from_slice(bytes).map_err(|e| bad(said(&e)))
}

/// What serde says, without quoting what was sent.
fn said(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = format!("line {}, column {}", error.line(), error.column());
    if let Some(rest) = text.strip_prefix("unknown field `") {
        // The expected names are ours; the unknown one is theirs.
        // Theirs may hold any text, these words too: ours is what follows on the last of them.
        let rest = rest.rsplit_once(" at line ").map_or(rest, |(r, _)| r);
        return match rest.rsplit_once("`, ").filter(|(_, end)| *end == "there are no fields") {
            Some(_) => format!("unknown member at {place}; there are none here"),
            None => {
                let expected = rest.rsplit_once("`, expected ").map(|(_, e)| e).unwrap_or_default();
                format!("unknown member at {place}; expected {expected}")
            }
        };
    }
    if text.starts_with("missing field") {
        return text;
    }
    format!("a member has the wrong form at {place}")
}

/// A JSON answer.
pub fn json<T: Serialize>(status: StatusCode, value: &T) -> Response {
    let body = serde_json::to_vec(value).unwrap_or_default();
    let mut response = (status, Body::from(body)).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// A page, with the headers that every page has.
pub fn page(status: StatusCode, html: String) -> Response {
    let mut response = (status, Body::from(html)).into_response();
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CACHE_CONTROL, "no-store"),
        (header::CONTENT_SECURITY_POLICY, console::CSP),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "same-origin"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.insert("cross-origin-opener-policy", HeaderValue::from_static("same-origin"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Two {
        #[allow(dead_code)]
        one: Option<u32>,
        #[allow(dead_code)]
        two: Option<u32>,
    }
    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Empty {}

    fn refused<T: DeserializeOwned + std::fmt::Debug>(name: &str) -> String {
        let body = serde_json::to_vec(&serde_json::json!({ name: 1 })).unwrap();
        parse::<T>(&body, 8).unwrap_err().0.detail
    }

    #[test]
    fn r2_an_unknown_member_is_never_told_whatever_it_is_called() {
        for name in [
            "MARK",
            "x`, expected MARK",
            "x` expected `MARK",
            "expected MARK",
            "x`, expected one of `MARK` at line 1 column 1",
            "MARK`, there are no fields",
        ] {
            let two = refused::<Two>(name);
            assert!(two.ends_with("expected `one` or `two`") && !two.contains("MARK"), "{name}: {two}");
            let empty = refused::<Empty>(name);
            assert!(empty.ends_with("there are none here") && !empty.contains("MARK"), "{name}: {empty}");
        }
    }
}
