//! A session for the command line: the terminal shows a code, the person confirms it in the browser, the terminal
//! collects. What it gets can look, deny, revoke and freeze, and never approve outside `dev` (regression D1).

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;

use axum::extract::{Extension, State};
use axum::http::StatusCode;
use axum::response::Response;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::core::digest::Digest;
use crate::core::id::Timestamp;

use super::Shared;
use super::body::{Json, json};
use super::listen::{Peer, quota_key};
use super::problem::{Failure, problem};

/// How long a code can be confirmed, in seconds.
pub const CODE_SECS_MAX: u64 = 300;
/// Codes at once, of all addresses. Each address has a share of its own (`cli_logins_per_address_max`).
const CODES_MAX: usize = 20_000;
/// Letters of a code that can be compared at a glance.
const CODE_ALPHABET: &[u8; 20] = b"BCDFGHJKLMNPQRSTVWXZ";

/// Codes that wait for their person.
#[derive(Default)]
pub struct Waiting(Mutex<HashMap<String, One>>);

struct One {
    secret: Digest,
    /// Who began it, for its share.
    address: IpAddr,
    from: String,
    until: Timestamp,
    answer: Option<Answer>,
}

#[derive(Clone, Copy)]
enum Answer {
    /// By this session.
    Given(Digest),
    Refused,
}

/// `POST /api/cli-login`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Begin {
    /// Where the command runs, as it says itself.
    pub from: String,
}

/// The answer.
#[derive(Serialize, Deserialize)]
pub struct Begun {
    /// To be compared in the browser.
    pub code: String,
    /// Where it is confirmed.
    pub url: String,
    /// With this the terminal collects. A secret.
    pub poll: String,
    /// Seconds until it is over.
    pub secs: u64,
}

impl fmt::Debug for Begun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Begun({}, …)", self.code)
    }
}

/// `POST /api/cli-login/poll`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Poll {
    /// As given.
    pub poll: String,
}

impl fmt::Debug for Poll {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Poll(…)")
    }
}

/// What a code stands for, for the page that asks.
pub struct Asked {
    /// Where the command runs, as it says itself.
    pub from: String,
    /// Until when.
    pub until: Timestamp,
}

impl Waiting {
    /// What waits under a code.
    pub fn asked(&self, code: &str, now: Timestamp) -> Option<Asked> {
        let waiting = self.0.lock();
        let one = waiting.get(code).filter(|o| now < o.until && o.answer.is_none())?;
        Some(Asked { from: one.from.clone(), until: one.until })
    }
    /// The person answers: the session that gives, or no. False if nothing waits under that code any more.
    pub fn answer(&self, code: &str, now: Timestamp, give: Option<Digest>) -> bool {
        let mut waiting = self.0.lock();
        let Some(one) = waiting.get_mut(code).filter(|o| now < o.until && o.answer.is_none()) else { return false };
        one.answer = Some(give.map_or(Answer::Refused, Answer::Given));
        true
    }
}

/// True for a text that could be a code.
pub fn is_code(text: &str) -> bool {
    let letters = |part: &str| part.len() == 4 && part.bytes().all(|b| CODE_ALPHABET.contains(&b));
    text.split_once('-').is_some_and(|(a, b)| letters(a) && letters(b))
}

/// A terminal begins.
pub async fn begin(
    State(app): State<Shared>,
    Extension(peer): Extension<Peer>,
    Json(begin): Json<Begin>,
) -> Result<Response, Failure> {
    let now = app.broker.now();
    let address = quota_key(peer.address.ip());
    let share = app.broker.rules().config.limits.cli_logins_per_address_max;
    let bytes = crate::keys::random::random_bytes::<8>(app.broker.random.as_ref());
    let letter = |b: &u8| char::from(CODE_ALPHABET[usize::from(*b) % CODE_ALPHABET.len()]);
    let code: String = bytes[..4].iter().map(letter).chain(['-']).chain(bytes[4..].iter().map(letter)).collect();
    let secret = crate::keys::random::random_secret(app.broker.random.as_ref());
    {
        let mut waiting = app.sessions.waiting.0.lock();
        waiting.retain(|_, o| now < o.until);
        if waiting.len() >= CODES_MAX || waiting.values().filter(|o| o.address == address).count() >= share {
            let (title, detail) = ("Too many logins", "too many of this address wait for their person already");
            let next = "Confirm one of them in the browser, or try again in a few minutes.";
            return Err(problem(StatusCode::TOO_MANY_REQUESTS, "too-many", title, detail, next).after(60));
        }
        let one = One {
            secret: Digest::of_bytes(secret.expose().as_bytes()),
            address,
            from: begin.from.chars().take(100).collect(),
            until: now.plus_secs(CODE_SECS_MAX),
            answer: None,
        };
        waiting.insert(code.clone(), one);
    }
    let base = app.broker.rules().config.broker.reviewer_url.trim_end_matches('/').to_owned();
    let url = format!("{base}/cli/{code}");
    Ok(json(StatusCode::OK, &Begun { code, url, poll: secret.expose().to_owned(), secs: CODE_SECS_MAX }))
}

/// The terminal collects: 202 while nobody has answered.
pub async fn poll(State(app): State<Shared>, Json(poll): Json<Poll>) -> Result<Response, Failure> {
    let now = app.broker.now();
    let secret = Digest::of_bytes(poll.poll.as_bytes());
    let gone = || {
        problem(
            StatusCode::GONE,
            "login-over",
            "The login is over",
            "nobody confirmed the code in time, it was refused, or who confirmed it has signed out",
            "Run `countersign login` again.",
        )
    };
    let answer = {
        let mut waiting = app.sessions.waiting.0.lock();
        let (code, one) = waiting.iter().find(|(_, o)| o.secret == secret && now < o.until).ok_or_else(gone)?;
        let (code, answer) = (code.clone(), one.answer);
        if answer.is_some() {
            waiting.remove(&code); // collected once
        }
        answer
    };
    match answer {
        None => Ok(json(StatusCode::ACCEPTED, &serde_json::json!({}))),
        Some(Answer::Refused) => Err(gone()),
        Some(Answer::Given(by)) => {
            let name = app.sessions.begin_child(by).ok_or_else(gone)?;
            Ok(json(StatusCode::OK, &serde_json::json!({ "session": name.expose() })))
        }
    }
}
