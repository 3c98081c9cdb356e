//! The reviewers' pages: who may see them, what their forms do. How they look is `console`'s, signing in and out is
//! `login_pages`'.

use axum::Router;
use axum::body::Body;
use axum::extract::{FromRequestParts, RawQuery, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use subtle::ConstantTimeEq;

use crate::broker::Mode;
use crate::broker::vote::Reviewer;
use crate::core::digest::Digest;
use crate::core::tier::Friction;
use crate::core::vote::Verdict;
use crate::policy::PersonAction;
use crate::wire::reviewer::{FreezeResult, VoteRequest};

use super::agent_api::{grant_id, healthz, readyz};
use super::body::{json, page, read};
use super::console::{self, Chrome, FreezeForm, FreezePage, Version};
use super::problem::{Failure, Segment, no_such_address, no_such_method, problem};
use super::session::{Kept, Session};
use super::{Shared, login_pages, reviewer_api, way_back};

/// What stands in the record of a revocation without one: on the page the reason is optional, since it may hurry.
const NO_REASON: &str = "no reason given";

/// Routes of the reviewers' listener.
pub fn routes(app: Shared) -> Router {
    Router::new()
        .route("/", get(queue))
        .route("/grants/{id}", get(grant))
        .route("/grants/{id}/version", get(version))
        .route("/grants/{id}/vote", post(vote))
        .route("/grants/{id}/revoke", post(revoke))
        .route("/freeze", get(freeze_page).post(freeze))
        .route("/unfreeze/{id}", post(unfreeze))
        .merge(login_pages::routes())
        .route("/assets/{name}", get(asset))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .merge(reviewer_api::routes())
        .fallback(nothing)
        .method_not_allowed_fallback(another_method)
        .layer(axum::middleware::from_fn_with_state(app.clone(), same_origin))
        .with_state(app)
}

/// A form must come from a page of ours: what the browser says about its origin is checked for every POST that
/// could carry a cookie (regression P6). The CSRF token is checked besides.
async fn same_origin(State(app): State<Shared>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    if request.method() != Method::GET && request.method() != Method::HEAD && headers.contains_key(header::COOKIE) {
        let site = headers.get("sec-fetch-site").and_then(|v| v.to_str().ok());
        let ours = app.broker.rules().config.broker.reviewer_url.trim_end_matches('/').to_owned();
        let origin = headers.get(header::ORIGIN).and_then(|v| v.to_str().ok());
        let fine = site.is_none_or(|s| s == "same-origin")
            && origin.is_none_or(|o| o == ours)
            && (site.is_some() || origin.is_some());
        if !fine {
            let detail = "this form did not come from a page of this broker";
            let next = "Open the page here and decide there.";
            return problem(StatusCode::FORBIDDEN, "cross-site", "From another site", detail, next).into_response();
        }
    }
    let path = request.uri().path();
    if !(path.starts_with("/assets/") || matches!(path, "/healthz" | "/readyz")) {
        super::agent_api::up_to_date(&app).await;
    }
    next.run(request).await
}

/// A person in a browser.
pub struct InBrowser {
    pub(super) by: Reviewer,
    pub(super) session: Session,
    pub(super) name: String,
}

/// No session: to the login. Where the person wanted to go, the browser keeps meanwhile.
pub struct NotSignedIn(Option<HeaderValue>);

impl IntoResponse for NotSignedIn {
    fn into_response(self) -> Response {
        let mut response = redirect("/login");
        response.headers_mut().extend(self.0.map(|kept| (header::SET_COOKIE, kept)));
        response
    }
}

impl FromRequestParts<Shared> for InBrowser {
    type Rejection = NotSignedIn;
    async fn from_request_parts(parts: &mut Parts, app: &Shared) -> Result<Self, NotSignedIn> {
        let not_signed_in = || {
            let wanted = (parts.method == Method::GET).then(|| way_back::checked(parts.uri.path())).flatten();
            NotSignedIn(wanted.map(|path| app.sessions.keep(Kept::WayBack, path)))
        };
        let name = app.sessions.cookie_of(&parts.headers).ok_or_else(not_signed_in)?;
        // A script's fetch (the page renewing itself) is not a person who is there.
        let by_script = parts.headers.get("sec-fetch-dest").is_some_and(|d| d == "empty");
        let session = if by_script { app.sessions.peek(&name) } else { app.sessions.find(&name) };
        let session = session.ok_or_else(not_signed_in)?;
        let by = reviewer_api::reviewer_of(app, &session).ok_or_else(not_signed_in)?;
        Ok(Self { by, session, name })
    }
}

pub(super) fn redirect(to: &str) -> Response {
    let mut response = StatusCode::SEE_OTHER.into_response();
    if let Ok(to) = HeaderValue::from_str(to) {
        response.headers_mut().insert(header::LOCATION, to);
    }
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

pub(super) fn chrome(app: &Shared, who: Option<&InBrowser>) -> Chrome {
    let mode = if app.broker.mode == Mode::Dev { console::Mode::Dev } else { console::Mode::Serve };
    let viewer = who.map(|w| reviewer_api::viewer(app, &w.by));
    let csrf = who.map(|w| w.session.csrf.expose().to_owned()).unwrap_or_default();
    Chrome::new(viewer, csrf, app.broker.now(), mode)
}

pub(super) fn failed(app: &Shared, who: Option<&InBrowser>, failure: &Failure) -> Response {
    page(failure.status(), console::problem(&failure.0, &chrome(app, who)))
}

/// The form of a request, with its CSRF token checked in constant time.
pub(super) async fn form<T: DeserializeOwned>(app: &Shared, who: &InBrowser, request: Request) -> Result<T, Failure> {
    let bytes = read(app, request).await?;
    let bad = |what: &str| {
        problem(
            StatusCode::BAD_REQUEST,
            "form",
            "The form can't be used",
            what,
            "Load the page again, and try once more.",
        )
    };
    let mut csrf = url::form_urlencoded::parse(&bytes).filter(|(n, _)| n == "csrf").map(|(_, v)| v);
    let (Some(token), None) = (csrf.next(), csrf.next()) else {
        return Err(bad("the page was incomplete"));
    };
    if !bool::from(token.as_bytes().ct_eq(who.session.csrf.expose().as_bytes())) {
        let detail = "this form belongs to another session than the one that is signed in now";
        let next = "Load the page again, and try once more.";
        return Err(problem(StatusCode::FORBIDDEN, "cross-site", "From another session", detail, next));
    }
    fields(&bytes).ok_or_else(|| bad("a field is missing, unknown or there twice"))
}

/// The fields of a form; `None` if one is missing, unknown or there twice.
pub(super) fn fields<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    let mut members = serde_json::Map::new();
    for (name, value) in url::form_urlencoded::parse(bytes).into_owned() {
        if members.insert(name, serde_json::Value::String(value)).is_some() {
            return None;
        }
    }
    serde_json::from_value(serde_json::Value::Object(members)).ok()
}

async fn queue(State(app): State<Shared>, who: InBrowser) -> Response {
    match app.broker.queue(&who.by).await {
        Ok(queue) => page(StatusCode::OK, console::queue(&queue, &chrome(&app, Some(&who)))),
        Err(error) => failed(&app, Some(&who), &error.into()),
    }
}

async fn show(app: &Shared, who: &InBrowser, id: &str, notice: Option<&str>, status: StatusCode) -> Response {
    let review = match grant_id(id) {
        Ok(id) => app.broker.review(&who.by, id).await.map_err(Failure::from),
        Err(failure) => Err(failure),
    };
    match review {
        Ok(review) => page(status, console::request(&review, &chrome(app, Some(who)), notice)),
        Err(failure) => failed(app, Some(who), &failure),
    }
}

async fn grant(State(app): State<Shared>, who: InBrowser, Segment(id): Segment) -> Response {
    show(&app, &who, &id, None, StatusCode::OK).await
}

async fn version(State(app): State<Shared>, who: InBrowser, Segment(id): Segment) -> Result<Response, Failure> {
    let (version, state, by) = app.broker.standing(&who.by, grant_id(&id)?).await?;
    Ok(json(StatusCode::OK, &Version { version, state, by }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VoteForm {
    #[allow(dead_code)] // checked before the rest is read
    csrf: String,
    digest: Digest,
    verdict: Verdict,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    typed: String,
}

async fn vote(State(app): State<Shared>, who: InBrowser, Segment(id): Segment, request: Request) -> Response {
    match vote_now(&app, &who, &id, request).await {
        Ok(()) => redirect(&format!("/grants/{id}")),
        Err(failure) => show(&app, &who, &id, Some(&failure.0.to_string()), failure.status()).await,
    }
}

async fn vote_now(app: &Shared, who: &InBrowser, id: &str, request: Request) -> Result<(), Failure> {
    let id = grant_id(id)?;
    let form: VoteForm = form(app, who, request).await?;
    if form.verdict == Verdict::Approve {
        let review = app.broker.review(&who.by, id).await?;
        let critical = review.tier.as_ref().is_some_and(|t| t.friction == Friction::Critical);
        if critical && console::typed_target(&review).is_none_or(|target| form.typed.trim() != target) {
            let detail = "the name that was typed is not that of the resource";
            let next = "Type it exactly as it is shown.";
            return Err(problem(StatusCode::BAD_REQUEST, "typed", "Not approved", detail, next));
        }
    }
    let reason = Some(form.reason.trim().to_owned()).filter(|r| !r.is_empty());
    let vote = VoteRequest { verdict: form.verdict, digest: form.digest, reason };
    app.broker.vote(&who.by, id, &vote).await?;
    app.metrics.voted(if form.verdict == Verdict::Approve { "approve" } else { "deny" });
    Ok(())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReasonForm {
    #[allow(dead_code)] // checked before the rest is read
    csrf: String,
    reason: String,
}

async fn revoke(State(app): State<Shared>, who: InBrowser, Segment(id): Segment, request: Request) -> Response {
    let done = async {
        let grant = grant_id(&id)?;
        let form: ReasonForm = form(&app, &who, request).await?;
        let reason = Some(form.reason.trim()).filter(|r| !r.is_empty()).unwrap_or(NO_REASON);
        app.broker.revoke(&who.by, grant, reason).await?;
        Ok::<_, Failure>(())
    };
    match done.await {
        Ok(()) => redirect(&format!("/grants/{id}")),
        Err(failure) => show(&app, &who, &id, Some(&failure.0.to_string()), failure.status()).await,
    }
}

async fn show_freeze(
    app: &Shared,
    who: &InBrowser,
    form: FreezeForm,
    count: Option<FreezeResult>,
    notice: Option<String>,
) -> Response {
    let queue = match app.broker.queue(&who.by).await {
        Ok(queue) => queue,
        Err(error) => return failed(app, Some(who), &error.into()),
    };
    let may_freeze = app.broker.require_anywhere(&who.by, PersonAction::Freeze).is_ok();
    let data = FreezePage { form, count, freezes: &queue.freezes, notice, may_freeze };
    page(StatusCode::OK, console::freeze(&data, &chrome(app, Some(who))))
}

async fn freeze_page(State(app): State<Shared>, who: InBrowser, RawQuery(query): RawQuery) -> Response {
    let form = query
        .and_then(|q| fields::<FreezeForm>(q.as_bytes()))
        .map(|f| FreezeForm { step: String::new(), typed: String::new(), ..f })
        .unwrap_or_default();
    show_freeze(&app, &who, form, None, None).await
}

async fn freeze(State(app): State<Shared>, who: InBrowser, request: Request) -> Response {
    let form: FreezeForm = match form(&app, &who, request).await {
        Ok(form) => form,
        Err(failure) => return failed(&app, Some(&who), &failure),
    };
    let selector = match form.selector() {
        Ok(selector) => selector,
        Err(what) => return show_freeze(&app, &who, form, None, Some(what)).await,
    };
    let outcome = if form.confirmed() {
        app.broker.freeze(&who.by, selector, form.reason.trim()).await.map(|_| None)
    } else {
        app.broker.would_freeze(&who.by, &selector).await.map(|grants| Some(FreezeResult { id: None, grants }))
    };
    match outcome {
        Ok(None) => redirect("/freeze"),
        Ok(count) => show_freeze(&app, &who, form, count, None).await,
        Err(error) => show_freeze(&app, &who, form, None, Some(error.to_string())).await,
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Only {
    #[allow(dead_code)] // checked before the rest is read
    csrf: String,
}

async fn unfreeze(State(app): State<Shared>, who: InBrowser, Segment(id): Segment, request: Request) -> Response {
    let done = async {
        let _: Only = form(&app, &who, request).await?;
        app.broker.unfreeze(&who.by, reviewer_api::freeze_id(&id)?).await.map_err(Failure::from)
    };
    match done.await {
        Ok(()) => redirect("/freeze"),
        Err(failure) => failed(&app, Some(&who), &failure),
    }
}

async fn asset(Segment(name): Segment) -> Response {
    let Some((content_type, bytes)) = console::asset(&name) else { return StatusCode::NOT_FOUND.into_response() };
    let mut response = Response::new(Body::from(bytes));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(console::ASSET_CACHE));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// No such address; below `/api` for a program, elsewhere for a person.
async fn nothing(State(app): State<Shared>, uri: Uri) -> Response {
    for_whom(&app, &uri, no_such_address())
}

async fn another_method(State(app): State<Shared>, uri: Uri) -> Response {
    for_whom(&app, &uri, no_such_method())
}

fn for_whom(app: &Shared, uri: &Uri, failure: Failure) -> Response {
    if uri.path().starts_with("/api/") { failure.into_response() } else { failed(app, None, &failure) }
}
