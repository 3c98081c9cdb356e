//! The agents' API, `/v1`. A bearer identity, or a client certificate on the listener that demands one.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{FromRequestParts, Query, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use axum::routing::{get, post};
use serde::{Deserialize, Serialize};

use crate::broker::mint::Issued;
use crate::core::grant::{Grant, GrantState};
use crate::core::id::{GrantId, TaskName};
use crate::failpoint::{self, Point};
use crate::identity::VerifiedAgent;
use crate::wire::agent::{CredentialsRequest, GrantRequest, GrantView, InvocationReport, TaskCompleted};

use super::body::{Json, json};
use super::listen::Peer;
use super::problem::{Failure, Segment, no_such_address, no_such_method, problem};
use super::{Shared, introspection};

/// Routes of the agents' listeners.
pub fn routes(app: Shared) -> Router {
    Router::new()
        .route("/v1/grants", post(request))
        .route("/v1/grants/{id}", get(show))
        .route("/v1/grants/{id}/credentials", post(credentials))
        .route("/v1/grants/{id}/complete", post(complete))
        .route("/v1/grants/{id}/cancel", post(cancel))
        .route("/v1/grants/{id}/heartbeat", post(heartbeat))
        .route("/v1/grants/{id}/invocations", post(report))
        .route("/v1/tasks/{task}/complete", post(complete_task))
        .route("/v1/catalogue", get(catalogue))
        .route("/introspect", post(introspection::introspect))
        .route("/jwks.json", get(jwks))
        .route("/assertions/jwks.json", get(assertion_jwks))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .fallback(nothing)
        .method_not_allowed_fallback(another_method)
        .with_state(app)
}

/// The agent behind a request: verified again for each one (regression A10).
pub struct Agent(pub VerifiedAgent);

impl FromRequestParts<Shared> for Agent {
    type Rejection = Failure;
    async fn from_request_parts(parts: &mut Parts, app: &Shared) -> Result<Self, Failure> {
        let agent = authenticate(parts, app).await?;
        app.broker.admit(&agent.id).map_err(|secs| {
            let next = "Wait for a decision with ?wait=30s instead of asking again and again.";
            too_often(secs, next)
        })?;
        up_to_date(app).await;
        Ok(Self(agent))
    }
}

/// What other nodes acknowledged before this request is seen by it. If it can't be read, the request goes on with what is
/// known: endings don't wait (guarantee 8), and everything else is compared with the record when it is written.
pub async fn up_to_date(app: &Shared) {
    if let Err(error) = app.broker.store.refresh().await {
        tracing::warn!(%error, "a request is answered by what this node knows");
    }
}

/// An identity asks more often than its rate allows.
pub fn too_often(secs: u64, next: &str) -> Failure {
    let (title, detail) = ("Too many requests", "this identity asks too often");
    problem(StatusCode::TOO_MANY_REQUESTS, "rate", title, detail, next).after(secs)
}

/// Who makes this request. Reviewers' cookies mean nothing here.
pub async fn authenticate(parts: &Parts, app: &Shared) -> Result<VerifiedAgent, Failure> {
    let now = app.broker.clock.wall();
    let refused = |e: crate::identity::IdentityError| {
        tracing::info!(refusal = ?e.refusal(), detail = e.detail(), "an identity was refused");
        let status =
            if e.refusal().is_transient() { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::UNAUTHORIZED };
        problem(status, "identity", "The identity was not accepted", e.refusal().public(), e.refusal().next())
    };
    let bearer = bearer(&parts.headers)?;
    let certificate = parts.extensions.get::<Peer>().filter(|p| !p.certificates.is_empty());
    match (certificate, bearer) {
        // Two identities in one request: whoever reads it later would have to guess which one counted.
        (Some(_), Some(_)) => Err(problem(
            StatusCode::BAD_REQUEST,
            "two-identities",
            "Two identities",
            "the request has a client certificate and a bearer token",
            "Send one of them.",
        )),
        (Some(peer), None) => app.identities.authenticate_certificate(&peer.certificates, now).map_err(refused),
        (None, Some(token)) => app.identities.authenticate_bearer(token, now).await.map_err(refused),
        (None, None) => Err(problem(
            StatusCode::UNAUTHORIZED,
            "identity",
            "No identity",
            "the request doesn't prove what it comes from",
            "Send `Authorization: Bearer` with a JWT-SVID or OIDC token, or use the listener for client certificates.",
        )),
    }
}

/// The bearer token; `Err` if there are several `Authorization` headers or another scheme.
pub fn bearer(headers: &HeaderMap) -> Result<Option<&str>, Failure> {
    let mut all = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(first), None) = (all.next(), all.next()) else {
        return if headers.contains_key(header::AUTHORIZATION) {
            let (title, detail) = ("Two identities", "there are several Authorization headers");
            Err(problem(StatusCode::BAD_REQUEST, "identity", title, detail, "Send one of them."))
        } else {
            Ok(None)
        };
    };
    let text = first.to_str().unwrap_or_default();
    match text.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => Ok(Some(token.trim())),
        _ => {
            let (title, detail) = ("No bearer token", "the Authorization header has another scheme");
            Err(problem(StatusCode::UNAUTHORIZED, "identity", title, detail, "Send `Authorization: Bearer TOKEN`."))
        }
    }
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Failure> {
    let mut all = headers.get_all("idempotency-key").iter();
    match (all.next(), all.next()) {
        (None, _) => Ok(None),
        // One that can't be read is not as good as none: the caller counts on it.
        (Some(one), None) => Ok(Some(checked_key(one.to_str().unwrap_or_default())?)),
        _ => {
            let (title, detail) = ("Two keys", "there are several Idempotency-Key headers");
            Err(problem(StatusCode::BAD_REQUEST, "invalid-request", title, detail, "Send one of them."))
        }
    }
}

fn checked_key(key: &str) -> Result<String, crate::broker::BrokerError> {
    crate::broker::request::check_key(key).map(|()| key.to_owned())
}

/// An id from the path. A malformed one is an unknown one.
pub fn grant_id(text: &str) -> Result<GrantId, Failure> {
    text.parse().map_err(|_| crate::broker::BrokerError::NotFound.into())
}

fn status_of(grant: &Grant) -> StatusCode {
    if matches!(grant.state, GrantState::Pending { .. }) { StatusCode::ACCEPTED } else { StatusCode::OK }
}

fn view(app: &Shared, grant: &Grant) -> Response {
    json(StatusCode::OK, &app.broker.view(grant))
}

async fn request(
    State(app): State<Shared>,
    Agent(agent): Agent,
    headers: HeaderMap,
    Json(wanted): Json<GrantRequest>,
) -> Result<Response, Failure> {
    let key = idempotency_key(&headers)?;
    let grant = app.broker.request(&agent, wanted, key.as_deref()).await?;
    app.metrics.requested(&grant);
    let view: GrantView = app.broker.view(&grant);
    Ok(json(status_of(&grant), &view))
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wait {
    /// `30s`, or plain seconds.
    #[serde(default)]
    wait: Option<String>,
    /// Return at once unless the grant is still at this version.
    #[serde(default)]
    version: Option<u64>,
}

/// `30s`, `30`, `2m`, in seconds.
pub fn secs(text: &str) -> Option<u64> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let n: u64 = digits.parse().ok()?;
    match unit {
        "" | "s" => Some(n),
        "m" => n.checked_mul(60),
        _ => None,
    }
}

async fn show(
    State(app): State<Shared>,
    Agent(agent): Agent,
    Segment(id): Segment,
    query: Result<Query<Wait>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, Failure> {
    let bad = || {
        let (title, detail) = ("Unknown parameter", "the query has another parameter, or one that can't be read");
        problem(StatusCode::BAD_REQUEST, "invalid-request", title, detail, "Use ?wait=30s and ?version=N alone.")
    };
    let Query(wait) = query.map_err(|_| bad())?;
    let mut grant = app.broker.own(&agent, grant_id(&id)?).await?;
    if let Some(text) = wait.wait {
        let max = app.broker.rules().config.limits.wait_secs_max;
        let secs = secs(&text).ok_or_else(bad)?.min(max);
        let seen = wait.version.unwrap_or(grant.version);
        // Without a version, a wait is for a decision: what is decided already is answered at once.
        let waits =
            wait.version.is_some() || matches!(grant.state, GrantState::Pending { .. } | GrantState::Ending { .. });
        if waits && secs > 0 && seen == grant.version {
            let changed = tokio::select! {
                changed = app.broker.store.changed(grant.id, seen, Duration::from_secs(secs)) => changed,
                // The broker goes down: who waits is told what stands, and asks the next one.
                () = app.stop.cancelled() => Ok(None),
            };
            if let Some(changed) = changed.map_err(crate::broker::BrokerError::from)? {
                grant = changed;
            }
        }
    }
    Ok(view(&app, &grant))
}

/// The answer that holds secrets: serialised here, from memory, once.
#[derive(Serialize)]
struct IssuedBody<'a> {
    grant: GrantId,
    ends_at: crate::core::id::Timestamp,
    credentials: Vec<IssuedOne<'a>>,
}

#[derive(Serialize)]
struct IssuedOne<'a> {
    lease: crate::core::id::LeaseId,
    resource: &'a str,
    kind: &'a str,
    public: &'a std::collections::BTreeMap<String, String>,
    secret: std::collections::BTreeMap<&'a str, &'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_after: Option<crate::core::id::Timestamp>,
}

fn issued(issued: &Arc<Issued>) -> Response {
    let credentials = issued
        .credentials
        .iter()
        .map(|c| IssuedOne {
            lease: c.lease,
            resource: c.resource.as_str(),
            kind: c.credential.kind,
            public: &c.credential.public,
            secret: c.credential.secret.iter().map(|(k, v)| (k.as_str(), v.expose())).collect(),
            not_after: c.not_after,
        })
        .collect();
    json(StatusCode::OK, &IssuedBody { grant: issued.grant, ends_at: issued.ends_at, credentials })
}

async fn credentials(
    State(app): State<Shared>,
    Agent(agent): Agent,
    Segment(id): Segment,
    headers: HeaderMap,
    Json(wanted): Json<CredentialsRequest>,
) -> Result<Response, Failure> {
    let key = idempotency_key(&headers)?;
    let outcome = app.broker.credentials(&agent, grant_id(&id)?, wanted.replace, key.as_deref()).await;
    app.metrics.minted(outcome.is_ok());
    let answer = issued(&outcome?);
    failpoint::at(Point::ReleaseAnswer);
    Ok(answer)
}

async fn complete(State(app): State<Shared>, Agent(agent): Agent, Segment(id): Segment) -> Result<Response, Failure> {
    let grant = app.broker.complete(&agent, grant_id(&id)?).await?;
    Ok(view(&app, &grant))
}

async fn cancel(State(app): State<Shared>, Agent(agent): Agent, Segment(id): Segment) -> Result<Response, Failure> {
    let grant = app.broker.cancel(&agent, grant_id(&id)?).await?;
    Ok(view(&app, &grant))
}

async fn heartbeat(State(app): State<Shared>, Agent(agent): Agent, Segment(id): Segment) -> Result<Response, Failure> {
    let grant = app.broker.heartbeat(&agent, grant_id(&id)?).await?;
    Ok(view(&app, &grant))
}

async fn report(
    State(app): State<Shared>,
    Agent(agent): Agent,
    Segment(id): Segment,
    Json(report): Json<InvocationReport>,
) -> Result<Response, Failure> {
    let grant = app.broker.report(&agent, grant_id(&id)?, report.invocation).await?;
    Ok(view(&app, &grant))
}

async fn complete_task(
    State(app): State<Shared>,
    Agent(agent): Agent,
    Segment(task): Segment,
) -> Result<Response, Failure> {
    let task =
        TaskName::new(&task).map_err(|e| crate::broker::BrokerError::Invalid { field: "task", what: e.to_string() })?;
    let ended = app.broker.complete_task(&agent, &task).await?;
    Ok(json(StatusCode::OK, &TaskCompleted { task, ended }))
}

async fn catalogue(State(app): State<Shared>, Agent(agent): Agent) -> Response {
    json(StatusCode::OK, &app.broker.catalogue_for(&agent))
}

async fn jwks(State(app): State<Shared>) -> Response {
    raw_json(&app.token_keys.jwks())
}

async fn assertion_jwks(State(app): State<Shared>) -> Response {
    raw_json(&app.assertion_keys.jwks())
}

fn raw_json(text: &str) -> Response {
    let mut response = Response::new(axum::body::Body::from(text.to_owned()));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    headers.insert(header::CACHE_CONTROL, header::HeaderValue::from_static("public, max-age=300"));
    response
}

/// The process answers.
pub async fn healthz() -> &'static str {
    "ok\n"
}

/// The broker takes requests, and can record what it does.
pub async fn readyz(State(app): State<Shared>) -> Result<&'static str, Failure> {
    let ready = app.ready.load(std::sync::atomic::Ordering::Acquire);
    if ready && app.broker.has_started() && app.broker.store.is_writable() {
        Ok("ready\n")
    } else {
        Err(problem(
            StatusCode::SERVICE_UNAVAILABLE,
            "not-ready",
            "Not ready",
            "the journal can't be written, or the broker is starting or stopping",
            "Ask again in a few seconds; if it stays so, look into the broker's log.",
        ))
    }
}

/// No such address.
pub async fn nothing() -> Failure {
    no_such_address()
}

/// No such method there.
pub async fn another_method() -> Failure {
    no_such_method()
}
