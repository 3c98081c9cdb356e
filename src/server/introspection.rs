//! `POST /introspect` (RFC 7662): a resource server asks about a token at each call. Its own identity is proven
//! like an agent's, and it learns only about tokens that are meant for it.

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::json as value;

use crate::connector::token::{ACCESS_TOKEN_TYP, AccessTokenClaims};
use crate::core::id::{GrantId, LeaseId};

use super::Shared;
use super::agent_api::{authenticate, too_often};
use super::body::{json, read};
use super::problem::{Failure, problem};

/// RFC 7662 section 2. Everything that isn't good, the unreadable too, is `active: false` and nothing more.
pub async fn introspect(State(app): State<Shared>, request: Request) -> Result<Response, Failure> {
    let (parts, body) = request.into_parts();
    let asker = authenticate(&parts, &app).await?;
    // Its own rate: what agents ask for must not use up what answers about them, and the other way round.
    app.broker.admit_introspection(&asker.id).map_err(|secs| {
        too_often(
            secs,
            "Ask again then; the operator can raise introspections_per_sec, or have tokens checked offline.",
        )
    })?;
    let bytes = read(&app, Request::from_parts(parts, body)).await?;
    let mut tokens = form_urlencoded(&bytes).filter(|(name, _)| name == "token").map(|(_, v)| v);
    let (Some(token), None) = (tokens.next(), tokens.next()) else {
        let (title, detail) = ("One token", "the form has no `token`, or several");
        return Err(problem(
            StatusCode::BAD_REQUEST,
            "invalid-request",
            title,
            detail,
            "Send token=… once, as a form.",
        ));
    };
    let inactive = || json(StatusCode::OK, &value!({ "active": false }));
    let now = app.broker.clock.wall();
    let Ok(claims) = app.token_keys.verify::<AccessTokenClaims>(ACCESS_TOKEN_TYP, &token, now) else {
        return Ok(inactive());
    };
    if !app.broker.rules().serves(&asker.id, &claims.aud) {
        return Ok(inactive());
    }
    let (Ok(grant), Ok(lease)) = (claims.txn.parse::<GrantId>(), claims.jti.parse::<LeaseId>()) else {
        return Ok(inactive());
    };
    if !app.broker.is_in_force(grant, lease).await? {
        return Ok(inactive());
    }
    let mut answer = serde_json::to_value(&claims).unwrap_or_default();
    if let Some(members) = answer.as_object_mut() {
        members.insert("active".to_owned(), value!(true));
        members.insert("token_type".to_owned(), value!("Bearer"));
    }
    Ok(json(StatusCode::OK, &answer))
}

fn form_urlencoded(bytes: &[u8]) -> impl Iterator<Item = (String, String)> + '_ {
    url::form_urlencoded::parse(bytes).into_owned()
}
