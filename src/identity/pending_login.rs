//! A login that was begun and isn't finished lives in its browser, sealed: anybody may begin as many as they like, and
//! the broker keeps nothing of them. What it keeps are the logins that were finished, so that none counts twice.

use std::collections::BTreeMap;

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::error::{IdentityError, Refusal, refuse};
use crate::core::secret::Secret;
use crate::time::Clock;

/// A login must be finished within, in seconds.
pub const LOGIN_SECS_MAX: u64 = 600;
/// Longest sealed login that is opened, in bytes: those that were made here are far below.
const SEALED_BYTES_MAX: usize = 2048;
/// Logins being finished, or finished while they could have been finished again.
const USED_MAX: usize = 10_000;

/// What the browser brings back sealed.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PendingLogin {
    pub(super) state: String,
    pub(super) nonce: String,
    /// PKCE's.
    pub(super) verifier: String,
    pub(super) begun_boot_ms: u64,
}

impl Drop for PendingLogin {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.verifier);
    }
}

/// Seals logins, with a key of this run alone.
pub(super) struct LoginSeal {
    key: RandomizedNonceKey,
    /// State → when it was begun.
    used: Mutex<BTreeMap<String, u64>>,
}

impl LoginSeal {
    pub(super) fn new() -> Result<Self, IdentityError> {
        let fail = |_| IdentityError::new(Refusal::Configuration, "the system gives no randomness");
        let mut bytes = Zeroizing::new([0; 32]);
        aws_lc_rs::rand::fill(&mut *bytes).map_err(fail)?;
        let key = RandomizedNonceKey::new(&AES_256_GCM, &*bytes).map_err(fail)?;
        Ok(Self { key, used: Mutex::default() })
    }

    /// For a cookie of the browser.
    pub(super) fn seal(&self, pending: &PendingLogin) -> Result<Secret, IdentityError> {
        let fail = || IdentityError::new(Refusal::Configuration, "the login can't be sealed");
        let mut text = Zeroizing::new(serde_json::to_vec(pending).map_err(|_| fail())?);
        let nonce = self.key.seal_in_place_append_tag(Aad::empty(), &mut *text).map_err(|_| fail())?;
        Ok(Secret::new(BASE64_URL_SAFE_NO_PAD.encode([nonce.as_ref().as_slice(), &text].concat())))
    }

    /// Opens what a browser brought back: made here, in this run, and not too long ago.
    pub(super) fn open(&self, sealed: &str, clock: &dyn Clock) -> Result<PendingLogin, IdentityError> {
        let other = || {
            let what = "the login was begun in another browser, or before the broker was started";
            IdentityError::new(Refusal::Login, what)
        };
        if sealed.len() > SEALED_BYTES_MAX {
            return Err(other());
        }
        let mut bytes = Zeroizing::new(BASE64_URL_SAFE_NO_PAD.decode(sealed).map_err(|_| other())?);
        let (nonce, text) = bytes.split_at_mut_checked(NONCE_LEN).ok_or_else(other)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| other())?;
        let text = self.key.open_in_place(nonce, Aad::empty(), text).map_err(|_| other())?;
        let pending: PendingLogin = serde_json::from_slice(text).map_err(|_| other())?;
        if is_over(pending.begun_boot_ms, clock.boot_ms()) {
            return refuse(Refusal::Login, "the login took longer than 10 minutes");
        }
        Ok(pending)
    }

    /// A login is being finished: once at a time, and never again if that goes well.
    pub(super) fn take<'a>(&'a self, pending: &PendingLogin, clock: &dyn Clock) -> Result<Taken<'a>, IdentityError> {
        let now = clock.boot_ms();
        let mut used = self.used.lock();
        used.retain(|_, begun| !is_over(*begun, now));
        if used.len() >= USED_MAX {
            // The IdP's own codes count once: better to forget one of ours than to keep everybody out.
            used.pop_first();
        }
        if used.insert(pending.state.clone(), pending.begun_boot_ms).is_some() {
            return refuse(Refusal::Login, "this login was finished already");
        }
        Ok(Taken { seal: self, state: Some(pending.state.clone()) })
    }
}

/// A login that is being finished. Dropped before [`Self::finish`], it can be tried again: the IdP's own codes
/// count once.
pub(super) struct Taken<'a> {
    seal: &'a LoginSeal,
    state: Option<String>,
}

impl Taken<'_> {
    pub(super) fn finish(mut self) {
        self.state = None;
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if let Some(state) = self.state.take() {
            self.seal.used.lock().remove(&state);
        }
    }
}

const fn is_over(begun_ms: u64, now_ms: u64) -> bool {
    now_ms.saturating_sub(begun_ms) > LOGIN_SECS_MAX * 1000
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::SystemClock;

    fn pending() -> PendingLogin {
        let text = str::to_owned;
        let begun_boot_ms = SystemClock.boot_ms();
        PendingLogin { state: text("s"), nonce: text("n"), verifier: text("the verifier"), begun_boot_ms }
    }

    #[test]
    fn what_is_sealed_here_opens_here_unchanged_and_tells_nothing() {
        let (seal, other) = (LoginSeal::new().unwrap(), LoginSeal::new().unwrap());
        let sealed = seal.seal(&pending()).unwrap();
        assert_eq!(seal.open(sealed.expose(), &SystemClock).unwrap().verifier, "the verifier");
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(sealed.expose()).unwrap();
        assert!(!bytes.windows(8).any(|w| w == b"verifier"));
        assert!(other.open(sealed.expose(), &SystemClock).is_err(), "another run's key");
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(seal.open(&BASE64_URL_SAFE_NO_PAD.encode(changed), &SystemClock).is_err(), "byte {at}");
        }
        for bad in ["", "A", "AAAA", &"A".repeat(5000)] {
            assert!(seal.open(bad, &SystemClock).is_err());
        }
    }

    #[test]
    fn a_login_is_finished_once_and_one_that_failed_can_be_tried_again() {
        let seal = LoginSeal::new().unwrap();
        drop(seal.take(&pending(), &SystemClock).unwrap());
        let taken = seal.take(&pending(), &SystemClock).unwrap();
        assert!(seal.take(&pending(), &SystemClock).is_err(), "two at once");
        taken.finish();
        assert!(seal.take(&pending(), &SystemClock).is_err(), "again");
    }
}
