//! The demo API: a target that asks the broker about a token at each call, so that the end of a grant is the end of
//! access. Nothing of the broker's insides is used: it introspects over TLS, with an identity of its own.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::get;
use axum::{Json, Router};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::identity::dev_authority::DevAuthority;
use crate::server::listen::{Listener, serve};

use super::{CliError, dev};

/// Notes that it keeps at once.
const NOTES_MAX: usize = 1_000;

struct Api {
    broker: String,
    http: reqwest::Client,
    authority: Arc<DevAuthority>,
    /// Its own address: tokens are for `<own>/<path>`.
    own: String,
    notes: Mutex<Vec<String>>,
}

/// Starts it on an address, until `stop`.
pub async fn start(
    socket: TcpListener,
    own: &str,
    broker: &str,
    ca: &std::path::Path,
    authority: Arc<DevAuthority>,
    stop: CancellationToken,
) -> Result<(), CliError> {
    let http = crate::client::tls::http(Some(ca), None)?;
    let api = Arc::new(Api {
        broker: broker.to_owned(),
        http,
        authority,
        own: own.to_owned(),
        notes: Mutex::new(vec!["the first note".to_owned()]),
    });
    let router = Router::new()
        .route("/sandbox/notes", get(read_sandbox))
        .route("/prod/notes", get(read).post(write))
        .route("/outside/hook", axum::routing::post(hook))
        .with_state(api);
    tokio::spawn(serve(
        Listener { name: "demo-api", socket, tls: None, router },
        crate::config::Limits::default(),
        stop,
    ));
    Ok(())
}

type Answer = Result<Json<Value>, (StatusCode, Json<Value>)>;

fn no(status: StatusCode, why: &str) -> (StatusCode, Json<Value>) {
    (status, Json(json!({ "error": why })))
}

impl Api {
    /// Is this token good, for this part of the API, for this action, now?
    async fn allows(&self, headers: &HeaderMap, part: &str, action: &str) -> Result<(), (StatusCode, Json<Value>)> {
        let token = headers
            .get("authorization")
            .and_then(|v| v.to_str().ok())
            .and_then(|v| v.strip_prefix("Bearer "))
            .ok_or_else(|| no(StatusCode::UNAUTHORIZED, "no token"))?;
        let own = self
            .authority
            .jwt_svid(dev::DEMO_API_ID, &[&self.broker], 60)
            .map_err(|_| no(StatusCode::INTERNAL_SERVER_ERROR, "the demo API has no identity"))?;
        let answer: Value = async {
            self.http
                .post(format!("{}/introspect", self.broker))
                .bearer_auth(own)
                .form(&[("token", token)])
                .send()
                .await?
                .json()
                .await
        }
        .await
        .map_err(|_: reqwest::Error| {
            no(StatusCode::SERVICE_UNAVAILABLE, "the broker can't be asked, so the answer is no")
        })?;
        if answer["active"] != json!(true) {
            return Err(no(StatusCode::UNAUTHORIZED, "the broker says that this token is not active"));
        }
        let audience = format!("{}/{part}", self.own);
        let may = answer["aud"] == json!(audience)
            && answer["authorization_details"].as_array().is_some_and(|entries| {
                entries.iter().any(|e| e["actions"].as_array().is_some_and(|a| a.contains(&json!(action))))
            });
        if may { Ok(()) } else { Err(no(StatusCode::FORBIDDEN, "this token is for something else")) }
    }
}

async fn read_sandbox(State(api): State<Arc<Api>>, headers: HeaderMap) -> Answer {
    api.allows(&headers, "sandbox", "read").await?;
    Ok(Json(json!({ "notes": ["nothing here is real"] })))
}

async fn read(State(api): State<Arc<Api>>, headers: HeaderMap) -> Answer {
    api.allows(&headers, "prod", "read").await?;
    Ok(Json(json!({ "notes": *api.notes.lock() })))
}

async fn write(State(api): State<Arc<Api>>, headers: HeaderMap, body: String) -> Answer {
    api.allows(&headers, "prod", "write").await?;
    let mut notes = api.notes.lock();
    if notes.len() >= NOTES_MAX {
        return Err(no(StatusCode::INSUFFICIENT_STORAGE, "the demo keeps no more notes"));
    }
    notes.push(body.chars().take(200).collect());
    Ok(Json(json!({ "notes": notes.len() })))
}

async fn hook(State(api): State<Arc<Api>>, headers: HeaderMap) -> Answer {
    api.allows(&headers, "outside", "post").await?;
    Ok(Json(json!({ "posted": true })))
}
