//! The seam to the key with which the broker logs in at a Vault: signed assertions, no stored token.
//!
//! That key, its `iss` and its JWKS are apart from those of the tokens that the broker mints, so a minted
//! `token` with the target's own audience can't log in as the broker (regression D5).

use serde_json::{Map, Value};

use crate::core::secret::Secret;

/// Life of an assertion, in seconds. The target accepts one up to 30 s past its `exp`.
pub const ASSERTION_LIFE_SECS: u64 = 60;

/// Signs the JWTs by which the broker proves itself to a target.
pub trait AssertionSigner: Send + Sync + 'static {
    /// A JWT with exactly this `aud` and `sub`, the claims of `extra`, and `exp` in `life_secs` seconds.
    /// `iss` and key are those for assertions. The error says what to do; it never has key material.
    fn sign(&self, audience: &str, subject: &str, extra: Map<String, Value>, life_secs: u64) -> Result<Secret, String>;
}
