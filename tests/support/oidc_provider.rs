//! The real oidc-provider (npm, on its own node) as a child process, and a browserless browser that logs in at it by posting
//! the forms that a person would. `None` where it isn't installed (`tests/peers` does that); with `CI` set, that fails.

#![allow(dead_code)] // each test file uses a part

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

/// Where a login comes back to if a test names nothing else; nobody listens there.
pub const REDIRECT_URI: &str = "http://127.0.0.1:1/callback";
/// The confidential client of reviewers and its secret (with characters that need encoding).
pub const CLIENT: (&str, &str) = ("reviewers", "reviewer-secret/+%");

pub struct OidcProvider {
    pub issuer: String,
    http: reqwest::Client,
    _child: Child,
}

/// Where `tests/peers` puts what comes from npm.
pub fn peers() -> PathBuf {
    let own = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/countersign/peers");
    std::env::var_os("COUNTERSIGN_PEERS").map_or_else(own, PathBuf::from).join("oidc")
}

impl OidcProvider {
    /// Starts it; logins may come back to these URIs.
    pub async fn start(redirect_uris: &[&str]) -> Option<Self> {
        let peers = peers();
        let node = peers.join("node_modules/.bin/node");
        if !node.exists() || !peers.join("node_modules/oidc-provider").exists() {
            assert!(std::env::var_os("CI").is_none(), "oidc-provider is not installed; run tests/peers");
            eprintln!("SKIPPED: oidc-provider is not installed (run tests/peers)");
            return None;
        }
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/oidc-provider/server.mjs");
        let mut child = Command::new(node)
            .arg(script)
            .arg(&peers)
            .arg(json!({ "redirect_uris": redirect_uris }).to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = tokio::time::timeout(Duration::from_secs(30), async {
            while let Some(line) = lines.next_line().await.unwrap() {
                if line.starts_with('{') {
                    return line;
                }
            }
            panic!("oidc-provider ended before it said where it listens");
        });
        let line: Value = serde_json::from_str(&first.await.expect("oidc-provider starts within 30 s")).unwrap();
        // What it says later must go somewhere.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        let http = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).no_proxy().build().unwrap();
        Some(Self { issuer: line["issuer"].as_str().unwrap().to_owned(), http, _child: child })
    }

    /// Follows an authorization URL as `account` and gives the query that comes back to the client.
    pub async fn log_in(&self, url: &str, account: &str) -> String {
        let mut cookies: BTreeMap<String, String> = BTreeMap::new();
        let mut next: (String, Option<Vec<(&str, &str)>>) = (url.to_owned(), None);
        for _ in 0..12 {
            if !next.0.starts_with(&self.issuer) {
                return next.0.split_once('?').map(|(_, query)| query.to_owned()).unwrap_or_default();
            }
            let (url, form) = next;
            let request = match &form {
                Some(form) => self.http.post(&url).form(form),
                None => self.http.get(&url),
            };
            let jar = cookies.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("; ");
            let response = request.header("cookie", jar).send().await.unwrap();
            for cookie in response.headers().get_all("set-cookie") {
                let (name, rest) = cookie.to_str().unwrap().split_once('=').unwrap();
                cookies.insert(name.to_owned(), rest.split(';').next().unwrap_or_default().to_owned());
            }
            let at = reqwest::Url::parse(&url).unwrap();
            if let Some(location) = response.headers().get("location") {
                next = (at.join(location.to_str().unwrap()).unwrap().into(), None);
                continue;
            }
            let status = response.status();
            let page = response.text().await.unwrap();
            let action = page.split("action=\"").nth(1).and_then(|rest| rest.split('"').next());
            let action = action.unwrap_or_else(|| panic!("{status}: no form in {page}"));
            let form = if page.contains("name=\"login\"") {
                vec![("prompt", "login"), ("login", account), ("password", "any")]
            } else {
                vec![("prompt", "consent")]
            };
            next = (at.join(action).unwrap().into(), Some(form));
        }
        panic!("the login doesn't end");
    }

    /// An agent's token by client credentials: with `scope=run` one with `typ: JWT`, else an access token (`at+jwt`).
    pub async fn agent_token(&self, audience: &str, scope: Option<&str>) -> String {
        let mut form = vec![("grant_type", "client_credentials"), ("resource", audience)];
        form.extend(scope.map(|s| ("scope", s)));
        let request = self.http.post(format!("{}/token", self.issuer)).basic_auth("agent-7", Some("agent-secret"));
        let answer: Value = request.form(&form).send().await.unwrap().json().await.unwrap();
        answer["access_token"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
    }
}
