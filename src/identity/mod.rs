//! Bytes from outside → a verified agent or reviewer. Issuer, subject and claims come from the
//! verified bytes only.

pub mod agents;
pub mod claims;
pub mod dev_authority;
pub mod error;
pub mod jwt;
pub mod keyset;
pub mod mtls;
pub mod net;
pub mod oidc;
pub mod pending_login;
pub mod reviewer;
pub mod spiffe;
pub mod svid;
pub mod trust;
pub mod workload_api;
pub mod workload_proto;

use std::collections::BTreeMap;

pub use agents::Identities;
pub use error::{IdentityError, Refusal};
pub use reviewer::{Callback, LoginBegun, ReviewerLogin};
use serde::{Deserialize, Serialize};

use crate::core::id::{AgentId, TierName, Timestamp};
use crate::core::request::{Account, Confirmation};

/// How an agent proved what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// X.509-SVID over mutual TLS.
    X509Svid,
    /// JWT-SVID as a bearer.
    JwtSvid,
    /// An OIDC token of an allowed issuer as a bearer.
    Oidc,
}

/// An agent whose proof was verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedAgent {
    /// Who it is.
    pub id: AgentId,
    /// The trust domain (`spiffe://corp`) or the OIDC issuer.
    pub issuer: String,
    /// The SPIFFE ID, or the OIDC subject.
    pub subject: String,
    /// How it was proven.
    pub method: Method,
    /// Mapped claims that matter to policies and reviewers (repository, ref, namespace, …).
    pub attributes: BTreeMap<String, String>,
    /// The person who launched it, where the issuer says who that was.
    pub launcher: Option<Account>,
    /// The strictest tier that this issuer's identities may reach; `None`: all.
    pub tier_max: Option<TierName>,
    /// The certificate it came with, when it came over mutual TLS.
    pub confirmation: Option<Confirmation>,
    /// When the proof expires (wall clock).
    pub expires_at: Timestamp,
}

/// A person's account whose login was verified. Which person that is, the people directory says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedAccount {
    /// The IdP's exact issuer.
    pub issuer: String,
    /// The immutable subject.
    pub subject: String,
    /// Groups from the configured claim; empty if none is configured.
    pub groups: Vec<String>,
    /// `auth_time`, if the IdP said it (wall clock).
    pub auth_time: Option<Timestamp>,
    /// `acr`, if the IdP said it.
    pub acr: Option<String>,
}

/// The one provider of cryptography, whatever a process has installed as its default.
pub(crate) fn crypto_provider() -> std::sync::Arc<rustls::crypto::CryptoProvider> {
    static PROVIDER: std::sync::LazyLock<std::sync::Arc<rustls::crypto::CryptoProvider>> =
        std::sync::LazyLock::new(|| std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    std::sync::Arc::clone(&PROVIDER)
}
