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
use crate::identity::pending_login::LOGIN_SECS_MAX;
use crate::keys::random::{Random, random_secret};
use crate::time::Clock;

/// Sessions at once.
const SESSIONS_MAX: usize = 10_000;

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
    pub csrf: Secret,
    /// The session that it was given by: it ages with that one, and ends when that one is signed out.
    parent: Option<Digest>,
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
        let now = self.clock.boot_ms();
        let csrf = random_secret(self.random.as_ref());
        let session = Session { person, account, claimed_groups, via, csrf, parent: None, begun_ms: now, used_ms: now };
        self.put(&mut self.by_name.lock(), session, now)
    }

    /// Begins the session of a command line, given by another session that still stands. It is as old as that one: its
    /// groups and its end come when they come there.
    pub fn begin_child(&self, parent: Digest) -> Option<Secret> {
        let now = self.clock.boot_ms();
        let csrf = random_secret(self.random.as_ref());
        let mut sessions = self.by_name.lock();
        let given_by = sessions.get(&parent).filter(|s| !self.is_over(s, now))?.clone();
        let session = Session { via: Via::StoredSession, csrf, parent: Some(parent), used_ms: now, ..given_by };
        Some(self.put(&mut sessions, session, now))
    }

    fn put(&self, sessions: &mut HashMap<Digest, Session>, session: Session, now: u64) -> Secret {
        let name = random_secret(self.random.as_ref());
        sessions.retain(|_, s| !self.is_over(s, now));
        if sessions.len() >= SESSIONS_MAX
            && let Some(oldest) = sessions.iter().min_by_key(|(_, s)| s.used_ms).map(|(k, _)| *k)
        {
            sessions.remove(&oldest);
        }
        sessions.insert(key_of(name.expose()), session);
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
        let key = key_of(name);
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

    /// Ends a session, and those that it gave.
    pub fn end(&self, name: &str) {
        let key = key_of(name);
        self.by_name.lock().retain(|k, s| *k != key && s.parent != Some(key));
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

    /// Gives a browser something to bring back within the time of a login; empty: takes it away.
    pub fn keep(&self, kept: Kept, value: &str) -> HeaderValue {
        let age = if value.is_empty() { 0 } else { LOGIN_SECS_MAX };
        set_cookie(kept.cookie(self.secure), value, self.secure, Some(age))
    }

    /// What a browser brings back of it.
    pub fn kept(&self, kept: Kept, headers: &HeaderMap) -> Option<String> {
        cookie(headers, kept.cookie(self.secure))
    }
}

/// What a browser keeps while somebody signs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// The login, sealed, which binds it to this browser.
    Login,
    /// Where the person wanted to go.
    WayBack,
}

impl Kept {
    const fn cookie(self, secure: bool) -> &'static str {
        match (self, secure) {
            (Self::Login, true) => "__Host-countersign-login",
            (Self::Login, false) => "countersign_dev_login",
            (Self::WayBack, true) => "__Host-countersign-way-back",
            (Self::WayBack, false) => "countersign_dev_way_back",
        }
    }
}

/// What a session is kept under: not the name that its holder has.
pub fn key_of(name: &str) -> Digest {
    Digest::of_bytes(name.as_bytes())
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

fn set_cookie(name: &str, value: &str, secure: bool, max_age: Option<u64>) -> HeaderValue {
    let secure = if secure { "; Secure" } else { "" };
    let age = max_age.map(|s| format!("; Max-Age={s}")).unwrap_or_default();
    HeaderValue::from_str(&format!("{name}={value}; Path=/; HttpOnly; SameSite=Lax{secure}{age}"))
        .unwrap_or_else(|_| HeaderValue::from_static(""))
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use super::*;
    use crate::core::id::Timestamp;
    use crate::keys::random::SystemRandom;

    #[derive(Default)]
    struct Hand(AtomicU64);

    impl Clock for Hand {
        fn wall(&self) -> Timestamp {
            Timestamp(self.boot_ms())
        }
        fn boot_ms(&self) -> u64 {
            self.0.load(Ordering::SeqCst)
        }
        fn boot_id(&self) -> String {
            "boot".to_owned()
        }
        fn sleep(&self, _: Duration) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
            Box::pin(std::future::pending())
        }
    }

    /// Idle after 100 s, over after 1000 s, groups count 50 s.
    fn sessions() -> (Arc<Hand>, Sessions, Secret) {
        let clock = Arc::new(Hand::default());
        let sessions = Sessions::new(clock.clone(), Arc::new(SystemRandom), [100, 1000, 50], true);
        let ana = PersonId::new("ana").unwrap();
        let browser = sessions.begin(ana, "https://idp#1".to_owned(), vec!["sre".to_owned()], Via::Browser);
        (clock, sessions, browser)
    }

    #[test]
    fn what_a_session_gives_is_as_old_as_it_is() {
        let (clock, sessions, browser) = sessions();
        clock.0.store(40_000, Ordering::SeqCst);
        sessions.find(browser.expose()).unwrap();
        let child = sessions.begin_child(key_of(browser.expose())).unwrap();
        let seen = sessions.find(child.expose()).unwrap();
        assert_eq!((seen.claimed_groups.len(), seen.via), (1, Via::StoredSession));
        assert_ne!(seen.csrf.expose(), sessions.find(browser.expose()).unwrap().csrf.expose());
        // 51 s after the login, not after the child was given.
        clock.0.store(51_000, Ordering::SeqCst);
        assert!(sessions.find(child.expose()).unwrap().claimed_groups.is_empty());
        for at in (100_000..=1_000_000).step_by(90_000) {
            clock.0.store(at, Ordering::SeqCst);
            assert!(sessions.find(child.expose()).is_some(), "{at}");
        }
        clock.0.store(1_001_000, Ordering::SeqCst);
        assert!(sessions.find(child.expose()).is_none(), "over when its parent is, whoever used it meanwhile");
    }

    #[test]
    fn who_signs_out_signs_out_what_they_gave() {
        let (_, sessions, browser) = sessions();
        let child = sessions.begin_child(key_of(browser.expose())).unwrap();
        let other = sessions.begin_child(key_of(browser.expose())).unwrap();
        sessions.end(other.expose());
        assert!(sessions.find(browser.expose()).is_some() && sessions.find(child.expose()).is_some());
        sessions.end(browser.expose());
        assert!(sessions.find(child.expose()).is_none());
        assert!(sessions.begin_child(key_of(browser.expose())).is_none(), "and gives nothing more");
    }

    #[test]
    fn a_session_is_not_printed_with_what_proves_its_forms() {
        let (_, sessions, browser) = sessions();
        let seen = sessions.find(browser.expose()).unwrap();
        assert!(!format!("{seen:?}").contains(seen.csrf.expose()));
    }
}
