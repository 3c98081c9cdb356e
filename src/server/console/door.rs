//! The pages around the door: sign in, signed out, a problem, and a session for the command line.

use askama::Template;

use crate::core::id::Timestamp;
use crate::wire::Problem;

use super::format::{Moment, moment};
use super::look;
use super::visible::visible_line;
use super::{Chrome, page};

/// The sign-in page.
#[derive(Debug)]
pub struct LoginView {
    /// How.
    pub way: LoginWay,
    /// Why the last try failed, or what to know.
    pub notice: Option<String>,
}

/// How a reviewer signs in.
#[derive(Debug)]
pub enum LoginWay {
    /// At an identity provider.
    Provider {
        /// Its name, for people.
        name: String,
        /// The broker's own address that starts it.
        start: String,
    },
    /// With the one-time link that `dev` or `tour` printed: the page has a button, since a prefetched
    /// GET must use nothing up (regression P7).
    OneTime {
        /// As whom.
        person: String,
        /// Where the form posts to.
        action: String,
        /// The one-time code.
        code: String,
    },
    /// Without that link.
    Printed,
}

/// A session for the command line, to be confirmed by the person who started it.
#[derive(Debug)]
pub struct CliLogin {
    /// Where the form posts to.
    pub action: String,
    /// The code that the terminal shows, to compare.
    pub code: String,
    /// Where the command runs, as far as known (host name, address). From outside.
    pub from: String,
    /// Until when it can be confirmed.
    pub until: Timestamp,
}

/// Sign in.
pub fn login(view: &LoginView, chrome: &Chrome) -> String {
    page(&LoginPage { chrome, way: &view.way, notice: view.notice.as_deref().map(visible_line) })
}

/// Signed out.
pub fn signed_out(chrome: &Chrome) -> String {
    page(&SignedOutPage { chrome })
}

/// What went wrong, why, and what to do next.
pub fn problem(problem: &Problem, chrome: &Chrome) -> String {
    page(&ProblemPage {
        chrome,
        title: visible_line(&problem.title),
        detail: visible_line(&problem.detail),
        next: problem.next.as_deref().map(visible_line),
        status: problem.status,
        grant: problem.grant.as_deref().and_then(|g| g.parse::<crate::core::id::GrantId>().ok()).map(|g| g.to_string()),
    })
}

/// Asks the signed-in person to give the command line a session that looks, denies, revokes and freezes,
/// and never approves (guarantee 6). Fields: `csrf`, `code`, `answer` (`give` or `refuse`).
pub fn cli_login_confirm(view: &CliLogin, chrome: &Chrome) -> String {
    page(&CliPage {
        chrome,
        action: &view.action,
        code: visible_line(&view.code),
        from: visible_line(&view.from),
        until: moment(view.until, chrome.now),
    })
}

#[derive(Template)]
#[template(path = "login.html")]
struct LoginPage<'a> {
    chrome: &'a Chrome,
    way: &'a LoginWay,
    notice: Option<String>,
}

#[derive(Template)]
#[template(path = "signed_out.html")]
struct SignedOutPage<'a> {
    chrome: &'a Chrome,
}

#[derive(Template)]
#[template(path = "problem.html")]
struct ProblemPage<'a> {
    chrome: &'a Chrome,
    title: String,
    detail: String,
    next: Option<String>,
    status: u16,
    grant: Option<String>,
}

#[derive(Template)]
#[template(path = "cli_login.html")]
struct CliPage<'a> {
    chrome: &'a Chrome,
    action: &'a str,
    code: String,
    from: String,
    until: Moment,
}
