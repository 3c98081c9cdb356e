//! Why the broker didn't do something. The server's one table makes RFC 9457 problems of these.

use crate::config::request::RequestProblem;
use crate::core::decide::Refusal;
use crate::core::id::GrantId;
use crate::store::StoreError;

/// Why the broker didn't do something.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BrokerError {
    /// Unknown, or somebody else's: the two can't be told apart (regression L6).
    #[error("there is no such grant")]
    NotFound,
    /// Something in the request can't be used.
    #[error("{what}")]
    Invalid {
        /// Which field.
        field: &'static str,
        /// What is wrong and what to do.
        what: String,
    },
    /// An entry of `authorization_details` can't be used.
    #[error("{0}")]
    Details(RequestProblem),
    /// Policy said no; the refusal is on record as this grant, if there was budget for it.
    #[error("{reason}")]
    Denied {
        /// The grant that records it.
        grant: Option<GrantId>,
        /// The rule.
        rule: String,
        /// Its words for the agent.
        reason: String,
    },
    /// The state, the digest, the person … don't permit it.
    #[error("{0}")]
    Refused(Refusal),
    /// Policy doesn't let this person do this.
    #[error("{0}")]
    NotAllowed(String),
    /// A freeze covers it.
    #[error("a freeze holds: {reason}")]
    Frozen {
        /// Why it was made.
        reason: String,
    },
    /// The task was completed.
    #[error("this task was completed; name a new one")]
    TaskCompleted,
    /// A limit is reached.
    #[error("the limit of {max} {what} is reached")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        max: usize,
    },
    /// The parent grant can't carry this request.
    #[error("the parent grant can't be used: it is unknown, not in force, or not handed to this identity")]
    Parent,
    /// The same idempotency key came with another request.
    #[error("this Idempotency-Key was used for another request")]
    IdempotencyReused,
    /// The grant is bound to another key.
    #[error("this grant is bound to a key that this request didn't prove")]
    NotBound,
    /// The credentials were handed over already.
    #[error("the credentials were handed over already")]
    AlreadyReleased,
    /// Another call, with another key, is minting for this grant.
    #[error("credentials for this grant are being minted by another call")]
    InProgress,
    /// The grant ended meanwhile, or at mint.
    #[error("the grant is over: {why}")]
    Over {
        /// Why.
        why: String,
    },
    /// The target can't mint now; nothing is left there.
    #[error("the target can't mint now: {why}")]
    NotNow {
        /// What happened.
        why: String,
        /// Seconds after which trying again makes sense.
        retry_after: u64,
    },
    /// Nothing of it can be attested absent.
    #[error("nothing was attested: {why}")]
    NotAbsent {
        /// Why.
        why: String,
    },
    /// The journal can't be written, or didn't say in time whether it was: nothing is minted (guarantee 8).
    #[error("the broker can't record it now: {0}")]
    Unavailable(String),
    /// The journal can't be written: what is to end is ended all the same (guarantee 8).
    #[error("it is being ended now, and recorded as soon as the journal can be written: {0}")]
    Unrecorded(String),
    /// A bug.
    #[error("internal: {0}")]
    Internal(String),
}

impl From<StoreError> for BrokerError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Conflict => Self::Unavailable("too much happened at once; try again".to_owned()),
            StoreError::Unavailable(why) => Self::Unavailable(why),
            // As when it can't be written: nothing is done, and what is to end is ended all the same (guarantee 8).
            StoreError::Unreadable(why) => {
                tracing::error!(%why, "the store can't be read");
                Self::Unavailable(why)
            }
            StoreError::Impossible(why) => Self::Internal(why),
        }
    }
}

impl From<Refusal> for BrokerError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}
