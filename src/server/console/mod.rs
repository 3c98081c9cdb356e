//! The reviewer's pages: pure functions from wire types to HTML. Routes, sessions and what a form does
//! are the server's; nothing here reads, decides or changes anything.
//!
//! Addresses that the pages name: `/` (queue), `/grants/{id}` and below it `vote`, `revoke` (POST) and
//! `version` (JSON of [`Version`]), `/freeze`, `/unfreeze/{id}`, `/login`, `/logout`, [`ASSETS`].
//! Everything that came from outside goes through [`visible`] and askama's escaping (regressions P6, P8).

mod assets;
mod door;
mod fit;
mod freeze;
mod look;
mod parts;
mod queue;
mod review;

use serde::Serialize;

use crate::core::id::Timestamp;
use crate::wire::reviewer::Viewer;
use crate::wire::times as format;

pub use assets::{ASSET_CACHE, ASSETS, asset, css_path, icon_path, js_path};
pub use door::{CliLogin, LoginView, LoginWay, cli_login_confirm, login, problem, signed_out};
pub use format::{at_most, exact, span};
pub use freeze::{FREEZE_WORD, FreezeForm, FreezePage, freeze};
pub use queue::queue;
pub use review::{request, typed_target};

pub use crate::wire::visible;

/// `Content-Security-Policy` of every page: nothing inline, nothing from elsewhere, never in a frame.
pub const CSP: &str = "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; \
                       form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

/// Largest page, in bytes, whatever an agent wrote.
pub const PAGE_BYTES_MAX: usize = 60_000;

/// How the broker runs, as far as a page tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The real thing.
    Serve,
    /// `dev` or `tour`: loopback, throw-away keys.
    Dev,
}

/// What stands around every page.
pub struct Chrome {
    /// Who is signed in.
    pub viewer: Option<Viewer>,
    /// Proves that a form came from a page of this session.
    pub csrf: String,
    /// The style sheet's address.
    pub css_path: String,
    /// The script's address.
    pub js_path: String,
    /// The broker's time.
    pub now: Timestamp,
    /// How the broker runs.
    pub mode: Mode,
}

impl Chrome {
    /// With the built-in assets.
    pub fn new(viewer: Option<Viewer>, csrf: String, now: Timestamp, mode: Mode) -> Self {
        Self { viewer, csrf, css_path: css_path(), js_path: js_path(), now, mode }
    }

    fn dev(&self) -> bool {
        self.mode == Mode::Dev
    }
    fn name(&self) -> Option<String> {
        self.viewer.as_ref().map(|v| visible::visible_line(&v.name))
    }
}

/// `GET /grants/{id}/version`: what an open page compares itself with.
#[derive(Debug, Clone, Serialize)]
pub struct Version {
    /// The grant's version.
    pub version: u64,
    /// Its state's word.
    pub state: String,
    /// Who changed it last, if a person did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

/// Renders. Writing to a `String` can't fail, and no template here calls a fallible filter.
fn page<T: askama::Template>(template: &T) -> String {
    template.render().unwrap_or_else(|_| "This page could not be shown. Use `countersign show`.".to_owned())
}
