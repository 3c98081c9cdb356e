//! The doors: listeners and TLS, the agents' API, the reviewers' API and pages, metrics.
//!
//! Agents and reviewers have listeners of their own, and neither's credentials open the other's door
//! (guarantee 6, regression P10).

pub mod agent_api;
pub mod body;
pub mod cli_login;
mod connection;
pub mod console;
pub mod introspection;
pub mod listen;
mod login_pages;
pub mod metrics;
pub mod pages;
pub mod problem;
pub mod reviewer_api;
pub mod session;
pub mod tls;
mod way_back;

use std::sync::Arc;

use crate::broker::Broker;
use crate::identity::agents::Identities;
use crate::identity::reviewer::ReviewerLogin;
use crate::keys::SigningKeys;

use session::Sessions;

/// What every handler can reach.
pub struct App {
    /// The broker.
    pub broker: Arc<Broker>,
    /// Who agents are.
    pub identities: Arc<Identities>,
    /// Who reviewers are, between two requests.
    pub sessions: Sessions,
    /// Where reviewers log in; `None` in `dev` and `tour`, which print one-time links.
    pub login: Option<ReviewerLogin>,
    /// Keys of the broker's own tokens.
    pub token_keys: Arc<SigningKeys>,
    /// Keys of the assertions by which the broker logs in at targets.
    pub assertion_keys: Arc<SigningKeys>,
    /// `/metrics`.
    pub metrics: metrics::Metrics,
    /// Set once the broker takes requests.
    pub ready: std::sync::atomic::AtomicBool,
    /// Cancelled when the broker goes down: whoever waits for a change is answered then.
    pub stop: tokio_util::sync::CancellationToken,
}

/// Shared by all handlers.
pub type Shared = Arc<App>;
