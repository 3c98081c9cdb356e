//! W1: an identity's JWT → a grant (automatic tier) → a durable, audited token of the broker's own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::Outcome;
use crate::figures::Part;
use crate::http::Connection;
use crate::world::{self, World};

/// When a measurement ends.
#[derive(Debug, Clone, Copy)]
pub enum Stop {
    /// After so many cycles of each agent.
    Cycles(usize),
    /// After so long.
    After(Duration),
}

impl Stop {
    /// Has it come?
    pub fn reached(self, cycles: usize, began: Instant) -> bool {
        match self {
            Self::Cycles(n) => cycles >= n,
            Self::After(length) => began.elapsed() >= length,
        }
    }
}

/// What of a grant's view is looked at.
#[derive(Debug, Deserialize)]
pub struct Grant {
    pub id: String,
    pub state: String,
    pub version: u64,
    #[serde(default)]
    pub leases: Vec<Lease>,
}

/// A credential under it.
#[derive(Debug, Deserialize)]
pub struct Lease {
    pub evidence: Option<Value>,
}

/// The answer with the secrets.
#[derive(Debug, Deserialize)]
pub struct Credentials {
    pub credentials: Vec<Credential>,
}

/// One of them.
#[derive(Debug, Deserialize)]
pub struct Credential {
    pub public: std::collections::BTreeMap<String, String>,
    pub secret: std::collections::BTreeMap<String, String>,
}

/// The body of a request.
pub fn wanted(kind: &str, resource: &str) -> String {
    json!({
        "task": "bench", "intent": "measuring how fast this goes", "life_secs": 900,
        "authorization_details": [{ "type": kind, "identifier": resource, "actions": ["read"] }],
    })
    .to_string()
}

/// Asks, and gets it at once.
pub async fn ask(connection: &mut Connection, jwt: &str, key: &str, body: String) -> Outcome<Grant> {
    let grant: Grant = connection.call("POST", "/v1/grants", jwt, Some(key), Some(body)).await?;
    if grant.state != "active" {
        return Err(format!("{} is {}, not active", grant.id, grant.state).into());
    }
    Ok(grant)
}

#[derive(Default)]
struct Parts {
    cycles: usize,
    asked: Part,
    collected: Part,
    usable: Part,
}

/// So many agents at once, each with its own identity and its own connection to one of the nodes, one cycle after the other.
pub async fn run(nodes: &[Arc<World>], agents: usize, stop: Stop) -> Outcome<Value> {
    let mut connections = Vec::with_capacity(agents);
    for node in nodes.iter().cycle().take(agents) {
        connections.push(node.connect().await?);
    }
    // Made before: signing them is the identity provider's work, not the broker's.
    let stacks = nodes.first().ok_or("no node")?.jwts(agents, stop)?;
    let before = world::before(nodes).await?;
    let began = Instant::now();
    let tasks: Vec<_> = connections
        .into_iter()
        .zip(stacks)
        .map(|(connection, jwts)| tokio::spawn(agent(connection, jwts, stop, began)))
        .collect();
    let mut all = Parts::default();
    for task in tasks {
        let one = task.await??;
        all.cycles += one.cycles;
        all.asked.join(one.asked);
        all.collected.join(one.collected);
        all.usable.join(one.usable);
    }
    let mut out = world::since(nodes, before, all.cycles).await?;
    out.insert("agents".to_owned(), json!(agents));
    out.insert("asked_to_granted".to_owned(), all.asked.figures());
    out.insert("granted_to_token".to_owned(), all.collected.figures());
    out.insert("asked_to_usable".to_owned(), all.usable.figures());
    Ok(Value::Object(out))
}

async fn agent(mut connection: Connection, jwts: Vec<String>, stop: Stop, began: Instant) -> Outcome<Parts> {
    let mut parts = Parts::default();
    for jwt in &jwts {
        if stop.reached(parts.cycles, began) {
            return Ok(parts);
        }
        // The end of a token is its signature: different for each, and never the same twice.
        let key = &jwt[jwt.len() - 40..];
        let t0 = Instant::now();
        let grant = ask(&mut connection, jwt, key, wanted("token", "api/bench")).await?;
        let t1 = Instant::now();
        let path = format!("/v1/grants/{}/credentials", grant.id);
        let issued: Credentials = connection.call("POST", &path, jwt, Some(key), Some("{}".to_owned())).await?;
        let t2 = Instant::now();
        let token = issued.credentials.first().and_then(|c| c.secret.get("token"));
        if token.is_none_or(|t| t.len() <= 100) {
            return Err("no token in the answer".into());
        }
        parts.asked.add(t1 - t0);
        parts.collected.add(t2 - t1);
        parts.usable.add(t2 - t0);
        parts.cycles += 1;
    }
    if stop.reached(parts.cycles, began) { Ok(parts) } else { Err("more cycles than JWTs were made for".into()) }
}
