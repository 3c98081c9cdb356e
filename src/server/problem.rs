//! The one table from what went wrong to RFC 9457: what happened, why, and the exact next step.

use axum::extract::{FromRequestParts, Path};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::broker::BrokerError;
use crate::core::decide::Refusal;
use crate::wire::Problem;

/// An answer that is a problem.
#[derive(Debug, Clone)]
pub struct Failure(pub Box<Problem>);

/// A problem: `detail` says what happened and why, `next` what whoever reads it can do.
pub fn problem(status: StatusCode, word: &str, title: &str, detail: impl Into<String>, next: &str) -> Failure {
    Failure(Box::new(Problem {
        kind: format!("urn:countersign:problem:{word}"),
        title: title.to_owned(),
        status: status.as_u16(),
        detail: detail.into(),
        next: Some(next.to_owned()),
        rule: None,
        nearest: Vec::new(),
        retry_after: None,
        grant: None,
    }))
}

impl Failure {
    /// Says when trying again makes sense.
    #[must_use]
    pub fn after(mut self, secs: u64) -> Self {
        self.0.retry_after = Some(secs);
        self
    }

    /// The status it is answered with.
    pub fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let body = serde_json::to_vec(&self.0).unwrap_or_default();
        let mut response = (self.status(), body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(secs) = self.0.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(secs));
        }
        response
    }
}

/// The one part of a path that varies. What can't be read is an address that isn't there, in our words (regression R2).
pub struct Segment(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = Failure;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        Path::from_request_parts(parts, state).await.map(|Path(text)| Self(text)).map_err(|_| no_such_address())
    }
}

/// Nothing is there.
pub fn no_such_address() -> Failure {
    let next = "Check the address; the documentation lists all there are, and GET /v1/catalogue what can be asked for.";
    problem(StatusCode::NOT_FOUND, "no-such-address", "No such address", "nothing answers at this address", next)
}

/// Something is there, for another method.
pub fn no_such_method() -> Failure {
    let detail = "this address doesn't answer that method";
    problem(StatusCode::METHOD_NOT_ALLOWED, "method", "Another method is needed", detail, "Use one that `Allow` names.")
}

impl From<BrokerError> for Failure {
    fn from(error: BrokerError) -> Self {
        use BrokerError as E;
        use StatusCode as S;
        let detail = error.to_string();
        match error {
            E::NotFound => problem(
                S::NOT_FOUND,
                "not-found",
                "No such grant",
                detail,
                "Check the id; another identity's grants can't be seen.",
            ),
            E::Invalid { field, what } => problem(
                S::BAD_REQUEST,
                "invalid-request",
                "The request can't be used",
                format!("{field}: {what}"),
                &format!("Correct `{field}` and send the request again."),
            ),
            E::Details(p) => {
                let field = p.field.clone().unwrap_or_else(|| "authorization_details".to_owned());
                let entry = p.entry.map(|i| format!("authorization_details[{i}]: ")).unwrap_or_default();
                let detail = format!("{entry}{field}: {}", p.what);
                let mut f = problem(
                    S::BAD_REQUEST,
                    "invalid-authorization-details",
                    "This can't be asked for",
                    detail,
                    "GET /v1/catalogue lists what you may ask for.",
                );
                f.0.nearest = p.nearest;
                f
            }
            E::Denied { grant, rule, reason } => {
                let next = "Ask for less, or ask the operator about this rule.";
                let mut f = problem(S::FORBIDDEN, "denied", "Policy says no", reason, next);
                f.0.rule = Some(rule);
                f.0.grant = grant.map(|g| g.to_string());
                f
            }
            E::Refused(refusal) => refused(&refusal, detail),
            E::NotAllowed(_) => problem(
                S::FORBIDDEN,
                "not-allowed",
                "You may not do this",
                detail,
                "Leave it to somebody who may, or ask the operator which policy gives it to whom.",
            ),
            E::Frozen { .. } => problem(
                S::FORBIDDEN,
                "frozen",
                "Frozen",
                detail,
                "Nothing that matches is granted until the freeze is lifted; ask the operator.",
            ),
            E::TaskCompleted => problem(
                S::CONFLICT,
                "task-completed",
                "The task was completed",
                detail,
                "Ask again under the name of a new task.",
            ),
            E::TooMany { .. } => problem(
                S::TOO_MANY_REQUESTS,
                "too-many",
                "A limit is reached",
                detail,
                "Complete or cancel what you no longer need.",
            )
            .after(30),
            E::Parent => problem(
                S::FORBIDDEN,
                "parent",
                "The parent grant can't be used",
                detail,
                "Check the id, and have the parent's agent look whether its grant is active; its entry in the agents \
                 directory must name this identity under may_delegate_to.",
            ),
            E::IdempotencyReused => problem(
                S::UNPROCESSABLE_ENTITY,
                "idempotency-reused",
                "Idempotency-Key reused",
                detail,
                "Send a new key with a new request.",
            ),
            E::NotBound => problem(
                S::FORBIDDEN,
                "not-bound",
                "Another key is needed",
                detail,
                "Collect over mutual TLS with the certificate that made the request.",
            ),
            E::AlreadyReleased => problem(
                S::CONFLICT,
                "already-released",
                "Handed over already",
                detail,
                "If the answer was lost: ask again with replace=true, which mints anew and ends the first.",
            ),
            E::InProgress => problem(
                S::CONFLICT,
                "in-progress",
                "A mint is under way",
                detail,
                "Ask again in a second; with the same Idempotency-Key as the other call, you get its answer.",
            )
            .after(1),
            E::Over { .. } => problem(S::CONFLICT, "over", "The grant is over", detail, "Ask for a new grant."),
            E::NotNow { retry_after, .. } => problem(
                S::SERVICE_UNAVAILABLE,
                "target-unavailable",
                "Not now",
                detail,
                "Nothing was handed over. Ask for the credentials again in a moment.",
            )
            .after(retry_after),
            E::NotAbsent { .. } => problem(
                S::CONFLICT,
                "not-absent",
                "Nothing was attested",
                detail,
                "Mend what `last_error` of each credential says; the broker goes on trying. If another system answers at that \
                 address by now, take the target out of the catalogue, restart the broker, and attest then.",
            ),
            E::Unavailable(_) => problem(
                S::SERVICE_UNAVAILABLE,
                "journal-unavailable",
                "The broker can't record",
                detail,
                "No credential was given. What you asked for may still come to be recorded: look before you repeat it, or repeat it with \
                 the same Idempotency-Key. If it stays so, the operator must look at the journal's disk or database.",
            )
            .after(5),
            E::Unrecorded(_) => problem(
                S::SERVICE_UNAVAILABLE,
                "ending-unrecorded",
                "It ends, and can't be recorded yet",
                detail,
                "Nothing needs to be done: the broker records it by itself. Free disk space if there is none.",
            ),
            E::Internal(why) => {
                tracing::error!(%why, "internal error");
                problem(
                    S::INTERNAL_SERVER_ERROR,
                    "internal",
                    "Internal error",
                    "The broker met something that should not happen.",
                    "The operator finds it in the log.",
                )
            }
        }
    }
}

fn refused(refusal: &Refusal, detail: String) -> Failure {
    use StatusCode as S;
    match refusal {
        Refusal::State { .. } => problem(
            S::CONFLICT,
            "state",
            "Not in this state",
            detail,
            "Look at the grant again. One that waits is decided by reviewers; one that is over is asked for anew.",
        ),
        Refusal::DigestMismatch => problem(
            S::CONFLICT,
            "digest-mismatch",
            "The request changed",
            detail,
            "Load it again; a decision is bound to what was shown.",
        ),
        Refusal::Excluded { .. } => problem(
            S::FORBIDDEN,
            "excluded",
            "You may not decide about this",
            detail,
            "Leave it to a reviewer who neither owns nor launched the agent, nor one in its chain.",
        ),
        Refusal::AlreadyVoted => problem(
            S::CONFLICT,
            "already-voted",
            "You have voted already",
            detail,
            "Nothing more is needed from you; revoke the grant if you have changed your mind.",
        ),
        Refusal::NotApproved => problem(
            S::FORBIDDEN,
            "not-approved",
            "Not what was approved",
            detail,
            "Ask for a new grant: what was approved no longer stands.",
        ),
        Refusal::NotNarrower { .. } => problem(
            S::FORBIDDEN,
            "not-narrower",
            "A child must be narrower",
            detail,
            "Ask for a part of the parent's permissions that ends no later, or without a parent.",
        ),
        Refusal::LeaseExists => problem(
            S::CONFLICT,
            "lease-exists",
            "There is one already",
            detail,
            "Use it; or ask with replace=true, which mints anew and ends the first.",
        ),
        Refusal::NoLease => problem(
            S::CONFLICT,
            "no-lease",
            "No such credential",
            detail,
            "Look at the grant again: its leases and their states are there.",
        ),
        Refusal::NotResisting => problem(
            S::CONFLICT,
            "not-resisting",
            "Nothing to attest",
            detail,
            "Leave it to the broker; attest only what it has tried in vain, because the target no longer exists.",
        ),
        Refusal::Limit { .. } => problem(
            S::TOO_MANY_REQUESTS,
            "too-many",
            "A limit is reached",
            detail,
            "Complete this grant and ask for a new one.",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::request::RequestProblem;

    /// Every refusal and every error there is. A new variant fails to compile here until it is added.
    fn all() -> Vec<BrokerError> {
        use BrokerError as E;
        use Refusal as R;
        let text = || "why".to_owned();
        let refusals = [
            R::State { state: "pending" },
            R::DigestMismatch,
            R::Excluded { why: "x" },
            R::AlreadyVoted,
            R::NotApproved,
            R::NotNarrower { why: "x" },
            R::LeaseExists,
            R::NoLease,
            R::NotResisting,
            R::Limit { what: "x", max: 1 },
        ];
        let details = RequestProblem { entry: Some(0), field: None, what: text(), nearest: Vec::new() };
        let errors = [
            E::NotFound,
            E::Invalid { field: "task", what: text() },
            E::Details(details),
            E::Denied { grant: None, rule: text(), reason: text() },
            E::NotAllowed(text()),
            E::Frozen { reason: text() },
            E::TaskCompleted,
            E::TooMany { what: "x", max: 1 },
            E::Parent,
            E::IdempotencyReused,
            E::NotBound,
            E::AlreadyReleased,
            E::InProgress,
            E::Over { why: text() },
            E::NotNow { why: text(), retry_after: 1 },
            E::Unavailable(text()),
            E::Unrecorded(text()),
            E::Internal(text()),
            E::NotAbsent { why: text() },
        ];
        for error in &errors {
            match error {
                E::NotFound
                | E::Invalid { .. }
                | E::Details(_)
                | E::Denied { .. }
                | E::Refused(_)
                | E::NotAllowed(_)
                | E::Frozen { .. }
                | E::TaskCompleted
                | E::TooMany { .. }
                | E::Parent
                | E::IdempotencyReused
                | E::NotBound
                | E::AlreadyReleased
                | E::InProgress
                | E::Over { .. }
                | E::NotNow { .. }
                | E::Unavailable(_)
                | E::Unrecorded(_)
                | E::Internal(_)
                | E::NotAbsent { .. } => {}
            }
        }
        for refusal in &refusals {
            match refusal {
                R::State { .. }
                | R::DigestMismatch
                | R::Excluded { .. }
                | R::AlreadyVoted
                | R::NotApproved
                | R::NotNarrower { .. }
                | R::LeaseExists
                | R::NoLease
                | R::NotResisting
                | R::Limit { .. } => {}
            }
        }
        errors.into_iter().chain(refusals.map(E::Refused)).collect()
    }

    #[test]
    fn every_problem_says_what_why_and_what_next() {
        let mut problems: Vec<Problem> = all().into_iter().map(|e| *Failure::from(e).0).collect();
        problems.extend([*no_such_address().0, *no_such_method().0]);
        for p in problems {
            let next = p.next.as_deref().unwrap_or_default();
            assert!(next.len() > 15 && next.ends_with('.'), "{}: {next:?}", p.kind);
            assert!(!p.title.is_empty() && !p.detail.is_empty(), "{}", p.kind);
            assert!((400..600).contains(&p.status), "{}", p.kind);
        }
    }
}
