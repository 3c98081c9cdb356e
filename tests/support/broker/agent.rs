//! An agent: raw HTTP with a JWT-SVID or a certificate, and the same identity for the typed client.

use std::sync::Arc;
use std::time::Duration;

use countersign::client::{AgentClient, Proof, tls};
use countersign::core::secret::Secret;
use serde_json::{Value, json};

use super::{Answer, DOMAIN, PATIENCE, World, until_within};

/// Life of the identities, in seconds.
const LIFE: u64 = 600;

/// One agent.
#[derive(Clone)]
pub struct Agent {
    pub id: String,
    pub base: String,
    pub http: reqwest::Client,
    pub token: Option<String>,
    pub ca: std::path::PathBuf,
    pub proof: Proof,
}

/// Credentials of the first (mostly only) permission, as PostgreSQL's.
pub struct Login {
    pub user: String,
    pub password: String,
    pub database: String,
    pub lease: String,
}

impl Agent {
    pub fn by_jwt(world: &World, name: &str) -> Self {
        let id = format!("spiffe://{DOMAIN}/{}", path(name));
        let token = world.authority.jwt_svid(&id, &[&world.ports.agent_url()], LIFE).unwrap();
        Self {
            id,
            base: world.ports.agent_url(),
            http: world.http.clone(),
            ca: world.file("ca.pem"),
            proof: Proof::Token(Secret::new(token.clone())),
            token: Some(token),
        }
    }

    pub fn by_certificate(world: &World, name: &str) -> Self {
        let id = format!("spiffe://{DOMAIN}/{}", path(name));
        let svid = world.authority.x509_svid(&id, &[], LIFE).unwrap();
        let ca = world.file("ca.pem");
        let http = tls::http(Some(&ca), Some(&svid)).unwrap();
        Self { id, base: world.ports.mtls_url(), http, ca, proof: Proof::X509(Arc::new(svid)), token: None }
    }

    /// The same agent through the typed client.
    pub fn client(&self) -> AgentClient {
        AgentClient::new(&self.base, None, Some(&self.ca), self.proof.clone()).unwrap()
    }

    fn signed(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    pub fn getting(&self, path: &str) -> reqwest::RequestBuilder {
        self.signed(self.http.get(format!("{}{path}", self.base)))
    }

    pub fn posting(&self, path: &str) -> reqwest::RequestBuilder {
        self.signed(self.http.post(format!("{}{path}", self.base)))
    }

    pub async fn get(&self, path: &str) -> Answer {
        Answer::of(self.getting(path)).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        Answer::of(self.posting(path).json(body)).await
    }

    pub async fn post_with_key(&self, path: &str, key: &str, body: &Value) -> Answer {
        Answer::of(self.posting(path).header("idempotency-key", key).json(body)).await
    }

    /// Asks for one permission under a task, for ten minutes.
    pub async fn ask(&self, task: &str, want: Value) -> Answer {
        self.post("/v1/grants", &request(task, want)).await
    }

    /// The same, and it is granted or waits. Gives the grant's id.
    pub async fn asked(&self, task: &str, want: Value) -> String {
        self.ask(task, want).await.ok()["id"].as_str().unwrap().to_owned()
    }

    pub async fn show(&self, id: &str) -> Value {
        self.get(&format!("/v1/grants/{id}")).await.ok()
    }

    pub async fn state(&self, id: &str) -> String {
        self.show(id).await["state"].as_str().unwrap().to_owned()
    }

    pub async fn collect(&self, id: &str) -> Answer {
        self.post(&format!("/v1/grants/{id}/credentials"), &json!({})).await
    }

    pub async fn complete(&self, id: &str) -> Answer {
        self.post(&format!("/v1/grants/{id}/complete"), &json!({})).await
    }

    pub async fn cancel(&self, id: &str) -> Answer {
        self.post(&format!("/v1/grants/{id}/cancel"), &json!({})).await
    }

    /// Collects a PostgreSQL login.
    pub async fn login(&self, id: &str) -> Login {
        Login::of(&self.collect(id).await.ok())
    }

    /// Waits until the grant is in that state and gives it.
    pub async fn wait(&self, id: &str, state: &str) -> Value {
        self.wait_until(&format!("{id} is {state}"), PATIENCE, id, |seen| seen["state"] == state).await
    }

    /// Waits, by long polls, until what is shown of a grant is so, and gives it. Asking again and again would meet
    /// the rate limit.
    pub async fn wait_until(
        &self,
        what: &str,
        patience: Duration,
        id: &str,
        condition: impl Fn(&Value) -> bool,
    ) -> Value {
        let mut seen = self.show(id).await;
        until_within(patience, what, async || {
            if !condition(&seen) {
                seen = self.poll(id, seen["version"].as_u64().unwrap(), Duration::from_secs(1)).await.ok();
            }
            condition(&seen)
        })
        .await;
        seen
    }

    /// One long poll.
    pub async fn poll(&self, id: &str, version: u64, wait: Duration) -> Answer {
        self.get(&format!("/v1/grants/{id}?wait={}s&version={version}", wait.as_secs())).await
    }
}

impl Login {
    pub fn of(credentials: &Value) -> Self {
        let one = &credentials["credentials"][0];
        let text = |v: &Value| v.as_str().unwrap_or_else(|| panic!("{credentials}")).to_owned();
        Self {
            user: text(&one["public"]["user"]),
            password: text(&one["secret"]["password"]),
            database: text(&one["public"]["dbname"]),
            lease: text(&one["lease"]),
        }
    }
}

fn path(name: &str) -> String {
    if name.contains('/') { name.to_owned() } else { format!("agent/{name}") }
}

/// A request for one permission.
pub fn request(task: &str, want: Value) -> Value {
    json!({ "task": task, "intent": "because the story says so", "life_secs": 600, "authorization_details": [want] })
}

pub fn notes() -> Value {
    json!({ "type": "token", "identifier": "api/notes", "actions": ["read"] })
}
pub fn customers(action: &str) -> Value {
    json!({ "type": "token", "identifier": "api/customers", "actions": [action] })
}
pub fn webhooks() -> Value {
    json!({ "type": "token", "identifier": "api/webhooks", "actions": ["post"] })
}
pub fn sandbox() -> Value {
    json!({ "type": "postgres", "identifier": "postgres/sandbox", "actions": ["read"] })
}
pub fn app(action: &str) -> Value {
    json!({ "type": "postgres", "identifier": "postgres/app", "actions": [action] })
}
pub fn workshop() -> Value {
    json!({ "type": "postgres", "identifier": "postgres/workshop", "actions": ["build"] })
}
