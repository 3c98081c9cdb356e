//! Signing in and out: at the IdP, by a one-time link, and for a command line that waits.

use axum::Router;
use axum::extract::{RawQuery, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use axum::routing::{get, post};
use serde::Deserialize;

use crate::broker::vote::Via;
use crate::config::directory::NotAPerson;
use crate::core::digest::Digest;
use crate::core::secret::Secret;
use crate::identity::reviewer::Callback;

use super::body::{page, read};
use super::console::{self, LoginView, LoginWay};
use super::pages::{InBrowser, Only, chrome, failed, fields, form, redirect};
use super::problem::{Failure, Segment, problem};
use super::session::{Kept, key_of};
use super::{Shared, way_back};

/// Their routes.
pub fn routes() -> Router<Shared> {
    Router::new()
        .route("/login", get(login))
        .route("/login/start", get(login_start))
        .route("/login/callback", get(login_callback))
        .route("/login/one-time", get(one_time_page).post(one_time))
        .route("/logout", post(logout))
        .route("/cli/{code}", get(cli_page).post(cli_answer))
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
            let mut response = redirect(&begun.url);
            let kept = app.sessions.keep(Kept::Login, begun.sealed.expose());
            response.headers_mut().append(header::SET_COOKIE, kept);
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
    let sealed = app.sessions.kept(Kept::Login, &headers).unwrap_or_default();
    let account = match login.finish(&sealed, &callback, app.broker.clock.wall()).await {
        Ok(account) => account,
        Err(error) => return refuse(error.detail(), error.refusal().public()),
    };
    let rules = app.broker.rules();
    let person = match rules.config.reviewer_of(&account.issuer, &account.subject) {
        Ok(person) => person.id.clone(),
        Err(NotAPerson::Unknown) => {
            return refuse(
                "the account is none of the people directory",
                "You are signed in there, but this broker's people directory has no such account. Ask the operator to add it.",
            );
        }
        Err(NotAPerson::Agent) => {
            return refuse(
                "the account is an agent of the agents directory, and agents can't review",
                "You are signed in there, but with an account that this broker knows as an agent. Sign in with your own.",
            );
        }
    };
    let name =
        app.sessions.begin(person, format!("{}#{}", account.issuer, account.subject), account.groups, Via::Browser);
    let mut response = signed_in(&app, &headers, &name);
    response.headers_mut().append(header::SET_COOKIE, app.sessions.keep(Kept::Login, ""));
    response
}

/// A session stands: on to where the person wanted to go.
fn signed_in(app: &Shared, headers: &HeaderMap, name: &Secret) -> Response {
    let kept = app.sessions.kept(Kept::WayBack, headers);
    let mut response = redirect(kept.as_deref().and_then(way_back::checked).unwrap_or("/"));
    response.headers_mut().append(header::SET_COOKIE, app.sessions.set_cookie(name));
    response.headers_mut().append(header::SET_COOKIE, app.sessions.keep(Kept::WayBack, ""));
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
    let headers = request.headers().clone();
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
    signed_in(&app, &headers, &name)
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

async fn cli_page(State(app): State<Shared>, who: InBrowser, Segment(code): Segment) -> Response {
    match app.sessions.waiting.asked(&code, app.broker.now()) {
        Some(asked) => {
            let view = console::CliLogin { action: format!("/cli/{code}"), code, from: asked.from, until: asked.until };
            page(StatusCode::OK, console::cli_login_confirm(&view, &chrome(&app, Some(&who))))
        }
        None => failed(&app, Some(&who), &no_code()),
    }
}

fn no_code() -> Failure {
    let detail = "it was answered already, or is over";
    problem(StatusCode::NOT_FOUND, "no-such-code", "No such code", detail, "Run `countersign login` again.")
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CliForm {
    #[allow(dead_code)] // checked before the rest is read
    csrf: String,
    code: String,
    answer: String,
}

async fn cli_answer(State(app): State<Shared>, who: InBrowser, Segment(code): Segment, request: Request) -> Response {
    let form: CliForm = match form(&app, &who, request).await {
        Ok(form) => form,
        Err(failure) => return failed(&app, Some(&who), &failure),
    };
    let give = (form.answer == "give").then(|| key_of(&who.name));
    if form.code == code && app.sessions.waiting.answer(&code, app.broker.now(), give) {
        redirect("/")
    } else {
        failed(&app, Some(&who), &no_code())
    }
}
