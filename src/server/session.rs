//! Reviewers' sessions, on the server's side: a browser or a command line holds a random name, nothing else.
//!
//! Kept in memory: a restart signs everybody out.

use std::collections::HashMap;
use std::sync::Arc;

use axum::http::{HeaderMap, HeaderValue, header};
use parking_lot::Mutex;

use crate::broker::vote::{Reviewer, Via};
use crate::core::digest::Digest;
use crate::core::id::PersonId;
use crate::core::secret::Secret;
use crate::keys::random::{Random, random_secret};
use crate::time::Clock;

/// Sessions at once.
const SESSIONS_MAX: usize = 10_000;
/// Logins under way at once.
pub const PENDING_MAX: usize = 1_000;

/// One session.
#[derive(Debug, Clone)]
pub struct Session {
    /// The person of the directory.
    pub person: PersonId,
    /// The account, `issuer#subject`.
    pub account: String,
    /// Groups from the IdP's claims.
    pub claimed_groups: Vec<String>,
    /// Where it is used.
    pub via: Via,
    /// Proves that a form came from a page of this session.
    pub csrf: String,
    begun_ms: u64,
    used_ms: u64,
}

/// All sessions.
pub struct Sessions {
    by_name: Mutex<HashMap<Digest, Session>>,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
    idle_ms: u64,
    absolute_ms: u64,
    /// Groups from claims count so long.
    groups_ms: u64,
    cookie: &'static str,
    secure: bool,
    /// Terminals that wait for a session.
    pub waiting: super::cli_login::Waiting,
    /// Logins that were begun at the IdP, by `state`.
    pub pending: Mutex<HashMap<String, crate::identity::reviewer::PendingLogin>>,
    /// One-time links of `dev` and `tour`: hash of the code → person.
    pub one_time: Mutex<HashMap<Digest, PersonId>>,
}

impl Sessions {
    /// No sessions yet. `secure`: cookies only over TLS, with the `__Host-` prefix.
    pub fn new(clock: Arc<dyn Clock>, random: Arc<dyn Random>, limits: [u64; 3], secure: bool) -> Self {
        let [idle, absolute, groups] = limits;
        Self {
            by_name: Mutex::default(),
            clock,
            random,
            idle_ms: idle * 1000,
            absolute_ms: absolute * 1000,
            groups_ms: groups * 1000,
            cookie: if secure { "__Host-countersign" } else { "countersign_dev" },
            secure,
            waiting: super::cli_login::Waiting::default(),
            pending: Mutex::default(),
            one_time: Mutex::default(),
        }
    }

    /// Makes a one-time code for a person (`dev` and `tour`).
    pub fn one_time_code(&self, person: PersonId) -> Secret {
        let code = random_secret(self.random.as_ref());
        self.one_time.lock().insert(Digest::of_bytes(code.expose().as_bytes()), person);
        code
    }

    /// Begins a session and returns its name, which only its holder keeps.
    pub fn begin(&self, person: PersonId, account: String, claimed_groups: Vec<String>, via: Via) -> Secret {
        let name = random_secret(self.random.as_ref());
        let now = self.clock.boot_ms();
        let csrf = random_secret(self.random.as_ref()).expose().to_owned();
        let session = Session { person, account, claimed_groups, via, csrf, begun_ms: now, used_ms: now };
        let mut sessions = self.by_name.lock();
        sessions.retain(|_, s| !self.is_over(s, now));
        if sessions.len() >= SESSIONS_MAX
            && let Some(oldest) = sessions.iter().min_by_key(|(_, s)| s.used_ms).map(|(k, _)| *k)
        {
            sessions.remove(&oldest);
        }
        sessions.insert(Digest::of_bytes(name.expose().as_bytes()), session);
        name
    }

    const fn is_over(&self, session: &Session, now: u64) -> bool {
        now.saturating_sub(session.used_ms) > self.idle_ms || now.saturating_sub(session.begun_ms) > self.absolute_ms
    }

    /// The session of that name, if it isn't over. Counts as use.
    pub fn find(&self, name: &str) -> Option<Session> {
        self.look_up(name, true)
    }

    /// The same, for what an open page asks by itself: that doesn't keep an idle session alive.
    pub fn peek(&self, name: &str) -> Option<Session> {
        self.look_up(name, false)
    }

    fn look_up(&self, name: &str, counts_as_use: bool) -> Option<Session> {
        let key = Digest::of_bytes(name.as_bytes());
        let now = self.clock.boot_ms();
        let mut sessions = self.by_name.lock();
        let session = sessions.get_mut(&key)?;
        if self.is_over(session, now) {
            sessions.remove(&key);
            return None;
        }
        if counts_as_use {
            session.used_ms = now;
        }
        let mut session = session.clone();
        if now.saturating_sub(session.begun_ms) > self.groups_ms {
            session.claimed_groups.clear();
        }
        Some(session)
    }

    /// Ends a session.
    pub fn end(&self, name: &str) {
        self.by_name.lock().remove(&Digest::of_bytes(name.as_bytes()));
    }

    /// The session's name in a browser's cookie.
    pub fn cookie_of(&self, headers: &HeaderMap) -> Option<String> {
        cookie(headers, self.cookie)
    }

    /// Sets the session's cookie.
    pub fn set_cookie(&self, name: &Secret) -> HeaderValue {
        set_cookie(self.cookie, name.expose(), self.secure, None)
    }

    /// Takes the session's cookie away.
    pub fn drop_cookie(&self) -> HeaderValue {
        set_cookie(self.cookie, "", self.secure, Some(0))
    }

    /// The cookie that binds a login to its browser.
    pub fn login_cookie(&self, value: &str) -> HeaderValue {
        set_cookie(self.login_cookie_name(), value, self.secure, Some(600))
    }

    /// What a browser brings back of it.
    pub fn login_cookie_of(&self, headers: &HeaderMap) -> Option<String> {
        cookie(headers, self.login_cookie_name())
    }

    const fn login_cookie_name(&self) -> &'static str {
        if self.secure { "__Host-countersign-login" } else { "countersign_dev_login" }
    }
}

impl Session {
    /// Who acts, with the groups that count now.
    pub fn reviewer(&self, directory_groups: &[String]) -> Reviewer {
        let mut groups = directory_groups.to_vec();
        groups.extend(self.claimed_groups.iter().cloned());
        groups.sort();
        groups.dedup();
        Reviewer { person: self.person.clone(), account: self.account.clone(), groups, via: self.via }
    }
}

fn cookie(headers: &HeaderMap, name: &str) -> Option<String> {
    let mut found = headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .filter(|(n, _)| *n == name)
        .map(|(_, v)| v.to_owned());
    match (found.next(), found.next()) {
        (Some(one), None) => Some(one),
        _ => None, // twice: somebody planted one
    }
}

fn set_cookie(name: &str, value: &str, secure: bool, max_age: Option<u32>) -> HeaderValue {
    let secure = if secure { "; Secure" } else { "" };
    let age = max_age.map(|s| format!("; Max-Age={s}")).unwrap_or_default();
    HeaderValue::from_str(&format!("{name}={value}; Path=/; HttpOnly; SameSite=Lax{secure}{age}"))
        .unwrap_or_else(|_| HeaderValue::from_static(""))
}
