//! The room's one error: what was refused and why. The detail is for the operator's log, the public
//! text for whoever knocks; neither repeats what came from outside (regression R2).

use std::fmt;

/// Why an identity was refused, in the few words that whoever presented it may read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// Not of the form that it should have.
    Malformed,
    /// Of a form that is never accepted here: another token type, a critical extension, another algorithm.
    Unacceptable,
    /// From an issuer or trust domain that is not configured.
    UnknownIssuer,
    /// The signature or the certificate chain does not hold.
    BadSignature,
    /// Signed by a key that the issuer doesn't have.
    UnknownKey,
    /// Over.
    Expired,
    /// Not begun.
    NotYetValid,
    /// Meant for somebody else, or for others too.
    Audience,
    /// A claim is missing, of the wrong type or beyond its limits.
    Claim,
    /// A rule of the operator's configuration does not hold.
    Rule,
    /// The keys to check it with can't be had now.
    KeysUnavailable,
    /// The operator's configuration can't be used.
    Configuration,
    /// A login's state, nonce or answer doesn't belong to this browser or this login.
    Login,
}

impl Refusal {
    /// What a stranger may read. Says what to do, reveals no rule.
    pub const fn public(self) -> &'static str {
        match self {
            Self::Malformed => "the credential is malformed; present one JWT or one X.509-SVID",
            Self::Unacceptable => "this kind of credential is not accepted here",
            Self::UnknownIssuer => "the credential's issuer is not known here; ask the operator",
            Self::BadSignature | Self::UnknownKey => "the credential's signature could not be verified",
            Self::Expired => "the credential has expired; fetch a new one",
            Self::NotYetValid => "the credential is not valid yet; check the clocks",
            Self::Audience => "the credential must be issued for this broker's audience alone",
            Self::Claim => "a claim of the credential is missing or not acceptable",
            Self::Rule => "this identity is not admitted; ask the operator",
            Self::KeysUnavailable => "the credential can't be verified now; try again shortly",
            Self::Configuration => "the broker can't verify this credential; ask the operator",
            Self::Login => "the login could not be completed; start again",
        }
    }

    /// What a stranger can do about it.
    pub const fn next(self) -> &'static str {
        match self {
            Self::Malformed => {
                "Present one JWT as `Authorization: Bearer`, or one X.509-SVID as the client certificate."
            }
            Self::Unacceptable => "Present a JWT-SVID, an OIDC token of a workload or an X.509-SVID.",
            Self::UnknownIssuer => {
                "Ask the operator to admit the issuer or trust domain, or fetch a credential of another."
            }
            Self::BadSignature | Self::UnknownKey => "Fetch a new credential; if that fails too, ask the operator.",
            Self::Expired => "Fetch a new credential and send the request again.",
            Self::NotYetValid => "Check this machine's clock against the issuer's, then send the request again.",
            Self::Audience => "Fetch a credential whose only audience is this broker's; the operator knows its name.",
            Self::Claim | Self::Rule => "Ask the operator; the broker's log says which claim or rule it was.",
            Self::KeysUnavailable => "Send the request again in a few seconds.",
            Self::Configuration => "Ask the operator; the broker's log says what is wrong.",
            Self::Login => "Start the login again.",
        }
    }

    /// True when trying again without any change may succeed.
    pub const fn is_transient(self) -> bool {
        matches!(self, Self::KeysUnavailable)
    }
}

/// An identity was refused.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct IdentityError {
    refusal: Refusal,
    detail: String,
}

impl IdentityError {
    /// Says what was refused. `detail` holds nothing that came from outside unverified.
    pub fn new(refusal: Refusal, detail: impl Into<String>) -> Self {
        Self { refusal, detail: detail.into() }
    }
    /// The kind of refusal.
    pub const fn refusal(&self) -> Refusal {
        self.refusal
    }
    /// For the operator's log.
    pub fn detail(&self) -> &str {
        &self.detail
    }
    /// For the client.
    pub const fn public(&self) -> &'static str {
        self.refusal.public()
    }
    /// The same refusal with the place in front (`issuer https://…`), as configured, never as received.
    #[must_use]
    pub fn at(mut self, place: &str) -> Self {
        self.detail = format!("{place}: {}", self.detail);
        self
    }
}

impl fmt::Debug for IdentityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.refusal, self.detail)
    }
}

/// Shorthand of this room.
pub(crate) fn refuse<T>(refusal: Refusal, detail: impl Into<String>) -> Result<T, IdentityError> {
    Err(IdentityError::new(refusal, detail))
}
