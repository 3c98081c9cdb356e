//! Bodies and answers: JSON read strictly (size, depth, duplicate members, unknown members), answers never cached.

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, Limited};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::problem::{Failure, problem};
use super::{Shared, console};

/// Reads a body, up to the configured size.
pub async fn read(app: &Shared, request: Request) -> Result<Bytes, Failure> {
    let max = app.broker.rules().config.limits.body_bytes_max;
    let too_large =
        || problem(StatusCode::PAYLOAD_TOO_LARGE, "too-large", "Too large", format!("a body has at most {max} bytes"));
    let body = Limited::new(request.into_body(), max);
    Ok(body.collect().await.map_err(|_| too_large())?.to_bytes())
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
            let what = "send application/json";
            return Err(problem(StatusCode::UNSUPPORTED_MEDIA_TYPE, "media-type", "Unsupported media type", what));
        }
        parse(&bytes, depth).map(Self)
    }
}

/// Parses JSON strictly. The error says where, never what (regression R2).
pub fn parse<T: DeserializeOwned>(bytes: &[u8], depth: usize) -> Result<T, Failure> {
    let bad = |detail: String| problem(StatusCode::BAD_REQUEST, "invalid-json", "The body can't be read", detail);
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
        let expected = rest.split_once("expected").map(|(_, e)| e).unwrap_or_default();
        let expected = expected.split(" at line").next().unwrap_or_default();
        return format!("unknown member at {place}; expected{expected}");
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
