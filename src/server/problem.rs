//! The one table from what went wrong to RFC 9457.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::broker::BrokerError;
use crate::core::decide::Refusal;
use crate::wire::Problem;

/// An answer that is a problem.
#[derive(Debug, Clone)]
pub struct Failure(pub Box<Problem>);

/// A problem with what, why and next.
pub fn problem(status: StatusCode, word: &str, title: &str, detail: impl Into<String>) -> Failure {
    Failure(Box::new(Problem {
        kind: format!("urn:countersign:problem:{word}"),
        title: title.to_owned(),
        status: status.as_u16(),
        detail: detail.into(),
        next: None,
        rule: None,
        nearest: Vec::new(),
        retry_after: None,
        grant: None,
    }))
}

impl Failure {
    /// Says what to do next.
    #[must_use]
    pub fn next(mut self, next: &str) -> Self {
        self.0.next = Some(next.to_owned());
        self
    }
    /// Says when trying again makes sense.
    #[must_use]
    pub fn after(mut self, secs: u64) -> Self {
        self.0.retry_after = Some(secs);
        self
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&self.0).unwrap_or_default();
        let mut response = (status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(secs) = self.0.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(secs));
        }
        response
    }
}

impl From<BrokerError> for Failure {
    fn from(error: BrokerError) -> Self {
        use BrokerError as E;
        use StatusCode as S;
        let detail = error.to_string();
        match error {
            E::NotFound => problem(S::NOT_FOUND, "not-found", "No such grant", detail)
                .next("Check the id; another identity's grants can't be seen."),
            E::Invalid { field, what } => {
                problem(S::BAD_REQUEST, "invalid-request", "The request can't be used", format!("{field}: {what}"))
            }
            E::Details(p) => {
                let field = p.field.clone().unwrap_or_else(|| "authorization_details".to_owned());
                let entry = p.entry.map(|i| format!("authorization_details[{i}]: ")).unwrap_or_default();
                let detail = format!("{entry}{field}: {}", p.what);
                let mut f = problem(S::BAD_REQUEST, "invalid-authorization-details", "This can't be asked for", detail);
                f.0.nearest = p.nearest;
                f.next("GET /v1/catalogue lists what you may ask for.")
            }
            E::Denied { grant, rule, reason } => {
                let mut f = problem(S::FORBIDDEN, "denied", "Policy says no", reason);
                f.0.rule = Some(rule);
                f.0.grant = grant.map(|g| g.to_string());
                f.next("Ask for less, or ask the operator about this rule.")
            }
            E::Refused(refusal) => refused(&refusal, detail),
            E::NotAllowed(_) => problem(S::FORBIDDEN, "not-allowed", "You may not do this", detail),
            E::Frozen { .. } => problem(S::FORBIDDEN, "frozen", "Frozen", detail)
                .next("Nothing that matches is granted until the freeze is lifted; ask the operator."),
            E::TaskCompleted => problem(S::CONFLICT, "task-completed", "The task was completed", detail),
            E::TooMany { .. } => problem(S::TOO_MANY_REQUESTS, "too-many", "A limit is reached", detail)
                .after(30)
                .next("Complete or cancel what you no longer need."),
            E::Parent => problem(S::FORBIDDEN, "parent", "The parent grant can't be used", detail),
            E::IdempotencyReused => {
                problem(S::UNPROCESSABLE_ENTITY, "idempotency-reused", "Idempotency-Key reused", detail)
                    .next("Send a new key with a new request.")
            }
            E::NotBound => problem(S::FORBIDDEN, "not-bound", "Another key is needed", detail)
                .next("Collect over mutual TLS with the certificate that made the request."),
            E::AlreadyReleased => problem(S::CONFLICT, "already-released", "Handed over already", detail)
                .next("If the answer was lost: ask again with replace=true, which mints anew and ends the first."),
            E::InProgress => problem(S::CONFLICT, "in-progress", "A mint is under way", detail).after(1),
            E::Over { .. } => problem(S::CONFLICT, "over", "The grant is over", detail).next("Ask for a new grant."),
            E::NotNow { retry_after, .. } => problem(S::SERVICE_UNAVAILABLE, "target-unavailable", "Not now", detail)
                .after(retry_after)
                .next("Nothing was handed over. Ask for the credentials again in a moment."),
            E::Unavailable(_) => {
                problem(S::SERVICE_UNAVAILABLE, "journal-unavailable", "The broker can't record", detail).after(5)
            }
            E::Internal(why) => {
                tracing::error!(%why, "internal error");
                problem(
                    S::INTERNAL_SERVER_ERROR,
                    "internal",
                    "Internal error",
                    "The broker met something that should not happen.",
                )
                .next("The operator finds it in the log.")
            }
        }
    }
}

fn refused(refusal: &Refusal, detail: String) -> Failure {
    use StatusCode as S;
    match refusal {
        Refusal::State { .. } => problem(S::CONFLICT, "state", "Not in this state", detail),
        Refusal::DigestMismatch => problem(S::CONFLICT, "digest-mismatch", "The request changed", detail)
            .next("Load it again; a decision is bound to what was shown."),
        Refusal::Excluded { .. } => problem(S::FORBIDDEN, "excluded", "You may not decide about this", detail),
        Refusal::AlreadyVoted => problem(S::CONFLICT, "already-voted", "You have voted already", detail),
        Refusal::NotApproved => problem(S::FORBIDDEN, "not-approved", "Not what was approved", detail),
        Refusal::NotNarrower { .. } => problem(S::FORBIDDEN, "not-narrower", "A child must be narrower", detail),
        Refusal::LeaseExists => problem(S::CONFLICT, "lease-exists", "There is one already", detail),
        Refusal::NoLease => problem(S::CONFLICT, "no-lease", "No such credential", detail),
        Refusal::Limit { .. } => problem(S::TOO_MANY_REQUESTS, "too-many", "A limit is reached", detail),
    }
}
