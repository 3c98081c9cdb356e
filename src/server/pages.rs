//! The reviewers' pages: who may see them, what their forms do. How they look is `console`'s.

use axum::Router;
use axum::body::Body;
use axum::extract::{FromRequestParts, Path, RawQuery, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use subtle::ConstantTimeEq;

use crate::broker::Mode;
use crate::broker::vote::{Reviewer, Via};
use crate::core::digest::Digest;
use crate::core::tier::Friction;
use crate::core::vote::Verdict;
use crate::identity::reviewer::Callback;
use crate::policy::PersonAction;
use crate::wire::reviewer::{FreezeResult, VoteRequest};

use super::agent_api::{grant_id, healthz, readyz};
use super::body::{json, page, read};
use super::console::{self, Chrome, FreezeForm, FreezePage, LoginView, LoginWay, Version};
use super::problem::{Failure, problem};
use super::session::{PENDING_MAX, Session};
use super::{Shared, reviewer_api};

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
        .route("/login", get(login))
        .route("/login/start", get(login_start))
        .route("/login/callback", get(login_callback))
        .route("/login/one-time", get(one_time_page).post(one_time))
        .route("/logout", post(logout))
        .route("/cli/{code}", get(cli_page).post(cli_answer))
        .route("/assets/{name}", get(asset))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .merge(reviewer_api::routes())
        .fallback(nothing)
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
            return problem(StatusCode::FORBIDDEN, "cross-site", "From another site", detail).into_response();
        }
    }
    next.run(request).await
}

/// A person in a browser.
pub struct InBrowser {
    by: Reviewer,
    session: Session,
    name: String,
}

/// No session: to the login, and back afterwards only to an address of ours.
pub struct NotSignedIn;

impl IntoResponse for NotSignedIn {
    fn into_response(self) -> Response {
        redirect("/login")
    }
}

impl FromRequestParts<Shared> for InBrowser {
    type Rejection = NotSignedIn;
    async fn from_request_parts(parts: &mut Parts, app: &Shared) -> Result<Self, NotSignedIn> {
        let name = app.sessions.cookie_of(&parts.headers).ok_or(NotSignedIn)?;
        // A script's fetch (the page renewing itself) is not a person who is there.
        let by_script = parts.headers.get("sec-fetch-dest").is_some_and(|d| d == "empty");
        let session = if by_script { app.sessions.peek(&name) } else { app.sessions.find(&name) };
        let session = session.ok_or(NotSignedIn)?;
        let by = reviewer_api::reviewer_of(app, &session).ok_or(NotSignedIn)?;
        Ok(Self { by, session, name })
    }
}

fn redirect(to: &str) -> Response {
    let mut response = StatusCode::SEE_OTHER.into_response();
    if let Ok(to) = HeaderValue::from_str(to) {
        response.headers_mut().insert(header::LOCATION, to);
    }
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn chrome(app: &Shared, who: Option<&InBrowser>) -> Chrome {
    let mode = if app.broker.mode == Mode::Dev { console::Mode::Dev } else { console::Mode::Serve };
    let viewer = who.map(|w| reviewer_api::viewer(app, &w.by));
    let csrf = who.map(|w| w.session.csrf.clone()).unwrap_or_default();
    Chrome::new(viewer, csrf, app.broker.now(), mode)
}

fn failed(app: &Shared, who: Option<&InBrowser>, failure: &Failure) -> Response {
    let status = StatusCode::from_u16(failure.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    page(status, console::problem(&failure.0, &chrome(app, who)))
}

/// The form of a request, with its CSRF token checked in constant time.
async fn form<T: DeserializeOwned>(app: &Shared, who: &InBrowser, request: Request) -> Result<T, Failure> {
    let bytes = read(app, request).await?;
    let bad = |what: &str| problem(StatusCode::BAD_REQUEST, "form", "The form can't be used", what.to_owned());
    let mut csrf = url::form_urlencoded::parse(&bytes).filter(|(n, _)| n == "csrf").map(|(_, v)| v);
    let (Some(token), None) = (csrf.next(), csrf.next()) else {
        return Err(bad("the page is incomplete; load it again"));
    };
    if !bool::from(token.as_bytes().ct_eq(who.session.csrf.as_bytes())) {
        return Err(problem(StatusCode::FORBIDDEN, "cross-site", "From another session", "load the page again"));
    }
    fields(&bytes).ok_or_else(|| bad("a field is missing, unknown or there twice"))
}

/// The fields of a form; `None` if one is missing, unknown or there twice.
fn fields<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
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

async fn grant(State(app): State<Shared>, who: InBrowser, Path(id): Path<String>) -> Response {
    show(&app, &who, &id, None, StatusCode::OK).await
}

async fn version(State(app): State<Shared>, who: InBrowser, Path(id): Path<String>) -> Result<Response, Failure> {
    let review = app.broker.review(&who.by, grant_id(&id)?).await?;
    let by = review.votes.last().map(|v| v.person.clone());
    Ok(json(StatusCode::OK, &Version { version: review.grant.version, state: review.grant.state, by }))
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

async fn vote(State(app): State<Shared>, who: InBrowser, Path(id): Path<String>, request: Request) -> Response {
    match vote_now(&app, &who, &id, request).await {
        Ok(()) => redirect(&format!("/grants/{id}")),
        Err(failure) => {
            let status = StatusCode::from_u16(failure.0.status).unwrap_or(StatusCode::CONFLICT);
            show(&app, &who, &id, Some(&failure.0.to_string()), status).await
        }
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
            return Err(problem(StatusCode::BAD_REQUEST, "typed", "Not approved", detail)
                .next("Type it exactly as it is shown."));
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

async fn revoke(State(app): State<Shared>, who: InBrowser, Path(id): Path<String>, request: Request) -> Response {
    let done = async {
        let grant = grant_id(&id)?;
        let form: ReasonForm = form(&app, &who, request).await?;
        let reason = Some(form.reason.trim()).filter(|r| !r.is_empty()).unwrap_or(NO_REASON);
        app.broker.revoke(&who.by, grant, reason).await?;
        Ok::<_, Failure>(())
    };
    match done.await {
        Ok(()) => redirect(&format!("/grants/{id}")),
        Err(failure) => {
            let status = StatusCode::from_u16(failure.0.status).unwrap_or(StatusCode::CONFLICT);
            show(&app, &who, &id, Some(&failure.0.to_string()), status).await
        }
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
struct Only {
    #[allow(dead_code)] // checked before the rest is read
    csrf: String,
}

async fn unfreeze(State(app): State<Shared>, who: InBrowser, Path(id): Path<u64>, request: Request) -> Response {
    let done = async {
        let _: Only = form(&app, &who, request).await?;
        app.broker.unfreeze(&who.by, id).await.map_err(Failure::from)
    };
    match done.await {
        Ok(()) => redirect("/freeze"),
        Err(failure) => failed(&app, Some(&who), &failure),
    }
}

fn login_view(app: &Shared, notice: Option<String>) -> LoginView {
    let way = if app.login.is_some() {
        let issuer = app.broker.rules().config.reviewer_login.as_ref().map(|l| l.issuer.clone()).unwrap_or_default();
        let name = url::Url::parse(&issuer).ok().and_then(|u| u.host_str().map(str::to_owned)).unwrap_or(issuer);
        LoginWay::Provider { name, start: "/login/start".to_owned() }
    } else {
        LoginWay::Printed
    };
    LoginView { way, notice }
}

async fn login(State(app): State<Shared>) -> Response {
    page(StatusCode::OK, console::login(&login_view(&app, None), &chrome(&app, None)))
}

async fn login_start(State(app): State<Shared>) -> Response {
    let Some(login) = &app.login else { return redirect("/login") };
    match login.begin().await {
        Ok(begun) => {
            {
                let mut pending = app.sessions.pending.lock();
                let clock = app.broker.clock.clock();
                pending.retain(|_, p| !p.is_over(clock.as_ref()));
                if pending.len() >= PENDING_MAX {
                    let failure = problem(
                        StatusCode::SERVICE_UNAVAILABLE,
                        "too-many",
                        "Too many logins",
                        "try again in a minute",
                    );
                    drop(pending);
                    return failed(&app, None, &failure);
                }
                pending.insert(begun.pending.state().to_owned(), begun.pending);
            }
            let mut response = redirect(&begun.url);
            response.headers_mut().append(header::SET_COOKIE, app.sessions.login_cookie(begun.browser.expose()));
            response
        }
        Err(error) => {
            tracing::warn!(detail = error.detail(), "a login could not begin");
            let view = login_view(&app, Some(error.refusal().public().to_owned()));
            page(StatusCode::SERVICE_UNAVAILABLE, console::login(&view, &chrome(&app, None)))
        }
    }
}

async fn login_callback(State(app): State<Shared>, headers: HeaderMap, RawQuery(query): RawQuery) -> Response {
    let refuse = |detail: &str, public: &str| {
        tracing::warn!(detail, "a login was refused");
        let view = login_view(&app, Some(public.to_owned()));
        page(StatusCode::FORBIDDEN, console::login(&view, &chrome(&app, None)))
    };
    let Some(login) = &app.login else { return redirect("/login") };
    let callback = match Callback::parse(&query.unwrap_or_default()) {
        Ok(callback) => callback,
        Err(error) => return refuse(error.detail(), error.refusal().public()),
    };
    let pending = callback.state().and_then(|state| app.sessions.pending.lock().remove(state));
    let Some(pending) = pending else {
        return refuse("no login waits for this answer", "This login is over. Start again.");
    };
    let browser = app.sessions.login_cookie_of(&headers).unwrap_or_default();
    let account = match login.finish(pending, &browser, &callback, app.broker.clock.wall()).await {
        Ok(account) => account,
        Err(error) => return refuse(error.detail(), error.refusal().public()),
    };
    let rules = app.broker.rules();
    let person = rules
        .config
        .person
        .iter()
        .find(|p| p.identities.iter().any(|i| i.issuer == account.issuer && i.subject == account.subject));
    let Some(person) = person else {
        return refuse(
            "the account is none of the people directory",
            "You are signed in there, but this broker's people directory has no such account. Ask the operator to add it.",
        );
    };
    let name = app.sessions.begin(
        person.id.clone(),
        format!("{}#{}", account.issuer, account.subject),
        account.groups,
        Via::Browser,
    );
    let mut response = redirect("/");
    response.headers_mut().append(header::SET_COOKIE, app.sessions.set_cookie(&name));
    response.headers_mut().append(header::SET_COOKIE, app.sessions.login_cookie(""));
    response
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OneTime {
    #[serde(default)]
    #[allow(dead_code)] // there is no session yet
    csrf: String,
    code: String,
}

async fn one_time_page(State(app): State<Shared>, RawQuery(query): RawQuery) -> Response {
    let code = query.and_then(|q| fields::<OneTime>(q.as_bytes())).map(|f| f.code);
    let person = code.as_ref().and_then(|c| app.sessions.one_time.lock().get(&Digest::of_bytes(c.as_bytes())).cloned());
    let view = match (code, person) {
        (Some(code), Some(person)) => LoginView {
            way: LoginWay::OneTime {
                person: app.broker.rules().person_name(&person),
                action: "/login/one-time".to_owned(),
                code,
            },
            notice: None,
        },
        _ => login_view(&app, Some("This link was used already, or is not one of this broker.".to_owned())),
    };
    page(StatusCode::OK, console::login(&view, &chrome(&app, None)))
}

async fn one_time(State(app): State<Shared>, request: Request) -> Response {
    let bytes = match read(&app, request).await {
        Ok(bytes) => bytes,
        Err(failure) => return failed(&app, None, &failure),
    };
    let code = fields::<OneTime>(&bytes).map(|f| f.code).unwrap_or_default();
    let person = app.sessions.one_time.lock().remove(&Digest::of_bytes(code.as_bytes()));
    let Some(person) = person else {
        let view = login_view(&app, Some("This link was used already, or is not one of this broker.".to_owned()));
        return page(StatusCode::FORBIDDEN, console::login(&view, &chrome(&app, None)));
    };
    let account = format!("one-time-link#{person}");
    let name = app.sessions.begin(person, account, Vec::new(), Via::Browser);
    let mut response = redirect("/");
    response.headers_mut().append(header::SET_COOKIE, app.sessions.set_cookie(&name));
    response
}

async fn logout(State(app): State<Shared>, who: InBrowser, request: Request) -> Response {
    if let Err(failure) = form::<Only>(&app, &who, request).await {
        return failed(&app, Some(&who), &failure);
    }
    app.sessions.end(&who.name);
    let mut response = page(StatusCode::OK, console::signed_out(&chrome(&app, None)));
    response.headers_mut().append(header::SET_COOKIE, app.sessions.drop_cookie());
    response
}

async fn cli_page(State(app): State<Shared>, who: InBrowser, Path(code): Path<String>) -> Response {
    match app.sessions.waiting.asked(&code, app.broker.now()) {
        Some(asked) => {
            let view = console::CliLogin { action: format!("/cli/{code}"), code, from: asked.from, until: asked.until };
            page(StatusCode::OK, console::cli_login_confirm(&view, &chrome(&app, Some(&who))))
        }
        None => failed(&app, Some(&who), &no_code()),
    }
}

fn no_code() -> Failure {
    problem(StatusCode::NOT_FOUND, "no-such-code", "No such code", "it was answered already, or is over")
        .next("Run `countersign login` again.")
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CliForm {
    #[allow(dead_code)] // checked before the rest is read
    csrf: String,
    code: String,
    answer: String,
}

async fn cli_answer(State(app): State<Shared>, who: InBrowser, Path(code): Path<String>, request: Request) -> Response {
    let form: CliForm = match form(&app, &who, request).await {
        Ok(form) => form,
        Err(failure) => return failed(&app, Some(&who), &failure),
    };
    let give = (form.answer == "give")
        .then(|| (who.by.person.clone(), who.by.account.clone(), who.session.claimed_groups.clone()));
    if form.code == code && app.sessions.waiting.answer(&code, app.broker.now(), give) {
        redirect("/")
    } else {
        failed(&app, Some(&who), &no_code())
    }
}

async fn asset(Path(name): Path<String>) -> Response {
    let Some((content_type, bytes)) = console::asset(&name) else { return StatusCode::NOT_FOUND.into_response() };
    let mut response = Response::new(Body::from(bytes));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(console::ASSET_CACHE));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

async fn nothing(State(app): State<Shared>) -> Response {
    let failure = problem(StatusCode::NOT_FOUND, "no-such-page", "No such page", "the address leads nowhere");
    failed(&app, None, &failure)
}
