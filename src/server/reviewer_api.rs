//! The reviewers' API, `/api`: what the pages show and do, for the command line. A session as a bearer, never a
//! cookie, so no other site's page can use it.

use axum::Router;
use axum::extract::{FromRequestParts, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::Response;
use axum::routing::{get, post};

use crate::broker::vote::Reviewer;
use crate::core::vote::Verdict;
use crate::wire::reviewer::{AttestRequest, FreezeRequest, FreezeResult, RevokeRequest, Viewer, VoteRequest};

use super::agent_api::{bearer, grant_id};
use super::body::{Json, json};
use super::problem::{Failure, Segment, problem};
use super::session::Session;
use super::{Shared, cli_login};

/// Routes below `/api`.
pub fn routes() -> Router<Shared> {
    Router::new()
        .route("/api/me", get(me))
        .route("/api/queue", get(queue))
        .route("/api/grants/{id}", get(review))
        .route("/api/grants/{id}/votes", post(vote))
        .route("/api/grants/{id}/revoke", post(revoke))
        .route("/api/attestations", post(attest))
        .route("/api/freezes", post(freeze))
        .route("/api/freezes/{id}/lift", post(lift))
        .route("/api/logout", post(logout))
        .route("/api/cli-login", post(cli_login::begin))
        .route("/api/cli-login/poll", post(cli_login::poll))
}

/// A person with a session, as a bearer.
pub struct Signed(pub Reviewer, pub Session, String);

impl FromRequestParts<Shared> for Signed {
    type Rejection = Failure;
    async fn from_request_parts(parts: &mut Parts, app: &Shared) -> Result<Self, Failure> {
        let no = || {
            let detail = "the session is missing or over";
            problem(StatusCode::UNAUTHORIZED, "session", "No session", detail, "Run `countersign login`.")
        };
        let name = bearer(&parts.headers)?.ok_or_else(no)?.to_owned();
        let session = app.sessions.find(&name).ok_or_else(no)?;
        let reviewer = reviewer_of(app, &session).ok_or_else(no)?;
        Ok(Self(reviewer, session, name))
    }
}

/// The person behind a session, with the groups of the directory as it is now. A person who left it is nobody.
pub fn reviewer_of(app: &Shared, session: &Session) -> Option<Reviewer> {
    let rules = app.broker.rules();
    let person = rules.config.person.iter().find(|p| p.id == session.person)?;
    Some(session.reviewer(&person.groups))
}

/// How a person is told who they are.
pub fn viewer(app: &Shared, reviewer: &Reviewer) -> Viewer {
    Viewer {
        person: reviewer.person.to_string(),
        name: app.broker.rules().person_name(&reviewer.person),
        groups: reviewer.groups.clone(),
    }
}

async fn me(State(app): State<Shared>, Signed(by, ..): Signed) -> Response {
    json(StatusCode::OK, &viewer(&app, &by))
}

async fn queue(State(app): State<Shared>, Signed(by, ..): Signed) -> Result<Response, Failure> {
    Ok(json(StatusCode::OK, &app.broker.queue(&by).await?))
}

async fn review(State(app): State<Shared>, Signed(by, ..): Signed, Segment(id): Segment) -> Result<Response, Failure> {
    Ok(json(StatusCode::OK, &app.broker.review(&by, grant_id(&id)?).await?))
}

async fn vote(
    State(app): State<Shared>,
    Signed(by, ..): Signed,
    Segment(id): Segment,
    Json(wanted): Json<VoteRequest>,
) -> Result<Response, Failure> {
    let grant = app.broker.vote(&by, grant_id(&id)?, &wanted).await?;
    app.metrics.voted(if wanted.verdict == Verdict::Approve { "approve" } else { "deny" });
    Ok(json(StatusCode::OK, &app.broker.view(&grant)))
}

async fn revoke(
    State(app): State<Shared>,
    Signed(by, ..): Signed,
    Segment(id): Segment,
    Json(wanted): Json<RevokeRequest>,
) -> Result<Response, Failure> {
    let grant = app.broker.revoke(&by, grant_id(&id)?, &wanted.reason).await?;
    Ok(json(StatusCode::OK, &app.broker.view(&grant)))
}

async fn attest(
    State(app): State<Shared>,
    Signed(by, ..): Signed,
    Json(wanted): Json<AttestRequest>,
) -> Result<Response, Failure> {
    Ok(json(StatusCode::OK, &app.broker.attest_absent(&by, &wanted.of, &wanted.reason).await?))
}

async fn freeze(
    State(app): State<Shared>,
    Signed(by, ..): Signed,
    Json(wanted): Json<FreezeRequest>,
) -> Result<Response, Failure> {
    let result = if wanted.dry_run {
        FreezeResult { id: None, grants: app.broker.would_freeze(&by, &wanted.selector).await? }
    } else {
        let (id, grants) = app.broker.freeze(&by, wanted.selector, &wanted.reason).await?;
        FreezeResult { id: Some(id), grants }
    };
    Ok(json(StatusCode::OK, &result))
}

/// The number of a freeze from the path.
pub fn freeze_id(text: &str) -> Result<u64, Failure> {
    text.parse().map_err(|_| {
        let (title, detail) = ("No such freeze", "the number in the address is none of a freeze");
        let next = "Look up the freezes that hold on the page /freeze, or in GET /api/queue.";
        problem(StatusCode::NOT_FOUND, "not-found", title, detail, next)
    })
}

async fn lift(State(app): State<Shared>, Signed(by, ..): Signed, Segment(id): Segment) -> Result<Response, Failure> {
    app.broker.unfreeze(&by, freeze_id(&id)?).await?;
    Ok(json(StatusCode::OK, &serde_json::json!({})))
}

async fn logout(State(app): State<Shared>, Signed(_, _, name): Signed) -> Response {
    app.sessions.end(&name);
    json(StatusCode::OK, &serde_json::json!({}))
}
