//! Many credentials at one PostgreSQL, and how they come to their end, seen from the target.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::Outcome;
use crate::figures::round;
use crate::w1::{Credentials, Stop};
use crate::w2::{DATABASE, Target};
use crate::world::World;

/// Agents that ask at once.
const AGENTS: usize = 4;
/// A credential that can't be made now is asked for again so often.
const TRIES: usize = 20;
/// How often the target is looked at.
const LOOK: Duration = Duration::from_millis(10);
/// No ending takes longer: a benchmark that hangs says so.
const PATIENCE: Duration = Duration::from_secs(120);

/// One credential.
pub struct Held {
    pub grant: String,
    pub jwt: String,
    /// Milliseconds since the epoch.
    pub ends_at_ms: u64,
    pub user: String,
    pub password: String,
}

#[derive(Deserialize)]
struct Granted {
    id: String,
    state: String,
    ends_at: u64,
}

/// So many of them. `life_secs`: asked for at each, so that all can end in one second.
pub async fn hold(world: &Arc<World>, count: usize, life_secs: impl Fn() -> u64 + Copy) -> Outcome<Vec<Held>> {
    let each = count.div_ceil(AGENTS);
    let stacks = world.jwts(AGENTS, Stop::Cycles(each))?;
    let agents = stacks.into_iter().map(|jwts| async move {
        let mut connection = world.connect().await?;
        let mut held = Vec::new();
        for jwt in jwts {
            let key = jwt[jwt.len() - 40..].to_owned();
            let body = json!({
                "task": "bench", "intent": "measuring how fast this ends", "life_secs": life_secs(),
                "authorization_details": [{ "type": "postgres", "identifier": "postgres/bench", "actions": ["read"] }],
            });
            let granted: Granted =
                connection.call("POST", "/v1/grants", &jwt, Some(&key), Some(body.to_string())).await?;
            if granted.state != "active" {
                return Err(format!("{} is {}", granted.id, granted.state).into());
            }
            let path = format!("/v1/grants/{}/credentials", granted.id);
            let mut tries = 0;
            let issued: Credentials = loop {
                match connection.call("POST", &path, &jwt, Some(&key), Some("{}".to_owned())).await {
                    Ok(issued) => break issued,
                    // Making them isn't what is measured: a busy machine may say "not now".
                    Err(error) if error.to_string().contains("target-unavailable") && tries < TRIES => tries += 1,
                    Err(error) => return Err(error),
                }
            };
            let one = issued.credentials.first().ok_or("no credential")?;
            let (user, password) = (one.public["user"].clone(), one.secret["password"].clone());
            held.push(Held { grant: granted.id, jwt, ends_at_ms: granted.ends_at, user, password });
        }
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>(held)
    });
    let mut all = Vec::with_capacity(count);
    for held in futures::future::join_all(agents).await {
        all.extend(held?);
    }
    all.truncate(count);
    Ok(all)
}

/// Who could still log in, whatever its password's own expiry says: the catalogue's answer, since trying two thousand
/// logins takes longer than what is measured.
const COULD_LOG_IN: &str = "SELECT count(*) FILTER (WHERE rolcanlogin AND has_database_privilege(oid, $1, 'CONNECT')), count(*) \
     FROM pg_roles WHERE starts_with(rolname, $2)";

/// When the last login was refused, and when the last role was gone, from `began` on.
pub struct Ends {
    pub refused: Duration,
    pub gone: Duration,
}

/// Looks until nothing is left of roles with this prefix.
pub async fn watch(target: &Target, prefix: &str, began: Instant) -> Outcome<Ends> {
    let admin = target.cluster.admin("postgres").await;
    let look = admin.prepare(COULD_LOG_IN).await?;
    let mut refused = None;
    loop {
        let row = admin.query_one(&look, &[&DATABASE, &prefix]).await?;
        let at = began.elapsed();
        if row.get::<_, i64>(0) == 0 {
            refused.get_or_insert(at);
        }
        if let (0, Some(refused)) = (row.get::<_, i64>(1), refused) {
            return Ok(Ends { refused, gone: at });
        }
        if at > PATIENCE {
            return Err(format!("after {at:?}, {} of {} can log in", row.get::<_, i64>(0), row.get::<_, i64>(1)).into());
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// The logins themselves, tried: all of them are refused.
pub async fn all_refused(target: &Target, held: &[Held]) -> Outcome<Value> {
    let tried = futures::stream::iter(held.iter().step_by(held.len().div_ceil(50)))
        .map(|h| async move { target.use_it(&h.user, &h.password).await.is_err() })
        .buffer_unordered(8)
        .collect::<Vec<_>>()
        .await;
    if tried.iter().all(|refused| *refused) { Ok(json!(tried.len())) } else { Err("a login still works".into()) }
}

/// Waits until every grant is over with evidence.
pub async fn all_proven(world: &Arc<World>, held: &[Held], began: Instant) -> Outcome<Duration> {
    let mut connection = world.connect().await?;
    for one in held {
        let path = format!("/v1/grants/{}", one.grant);
        loop {
            let seen: Value = connection.call("GET", &path, &one.jwt, None, None).await?;
            if seen["state"] == "ended" {
                let proven = |l: &Value| l["evidence"].is_object();
                if !seen["leases"].as_array().is_some_and(|all| !all.is_empty() && all.iter().all(proven)) {
                    return Err(format!("{} ended without evidence", one.grant).into());
                }
                break;
            }
            if began.elapsed() > PATIENCE {
                return Err(format!("{} is {}", one.grant, seen["state"]).into());
            }
            tokio::time::sleep(LOOK).await;
        }
    }
    Ok(began.elapsed())
}

/// In milliseconds.
pub fn ms(took: Duration) -> f64 {
    round(took.as_secs_f64() * 1000.0)
}
