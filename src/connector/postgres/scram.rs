//! Passwords and their SCRAM-SHA-256 verifiers (RFC 5802, RFC 7677), made here so that the password
//! itself never reaches the target's statements or its log.

use std::num::NonZeroU32;

use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use aws_lc_rs::{digest, hmac, pbkdf2};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use zeroize::Zeroizing;

use crate::core::secret::Secret;

/// RFC 7677 asks for at least so many, and some drivers (pgjdbc) refuse fewer. The password has 256 bits of its own, so
/// they add nothing but time: the server runs through them at each CREATE ROLE, every client at each login.
pub const ITERATIONS: NonZeroU32 = NonZeroU32::new(4096).unwrap();
const SALT_BYTES: usize = 16;
const PASSWORD_BYTES: usize = 32;

/// The system's random source failed.
#[derive(Debug, thiserror::Error)]
#[error("the system's random source failed; nothing can be minted until it works")]
pub struct NoRandomness;

/// Draws a password: 256 bits, 43 characters of `[A-Za-z0-9_-]`, so no driver, URL or file has to escape it.
pub fn draw_password() -> Result<Secret, NoRandomness> {
    let mut bytes = Zeroizing::new([0u8; PASSWORD_BYTES]);
    SystemRandom::new().fill(bytes.as_mut()).map_err(|_| NoRandomness)?;
    Ok(Secret::new(URL_SAFE_NO_PAD.encode(*bytes)))
}

/// The verifier in the form that PostgreSQL stores: it checks a password and can't be used as one.
pub fn verifier(password: &Secret, iterations: NonZeroU32) -> Result<String, NoRandomness> {
    let mut salt = [0u8; SALT_BYTES];
    SystemRandom::new().fill(&mut salt).map_err(|_| NoRandomness)?;
    Ok(verifier_with(password, &salt, iterations))
}

/// Hex digits of 8 random bytes, for names that nobody can guess.
pub fn draw_tag() -> Result<String, NoRandomness> {
    let mut bytes = [0u8; 8];
    SystemRandom::new().fill(&mut bytes).map_err(|_| NoRandomness)?;
    Ok(hex::encode(bytes))
}

/// RFC 5802 section 3: StoredKey = H(HMAC(salted, "Client Key")), ServerKey = HMAC(salted, "Server Key").
fn verifier_with(password: &Secret, salt: &[u8], iterations: NonZeroU32) -> String {
    let mut salted = Zeroizing::new([0u8; digest::SHA256_OUTPUT_LEN]);
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, iterations, salt, password.expose().as_bytes(), salted.as_mut());
    let key = hmac::Key::new(hmac::HMAC_SHA256, salted.as_ref());
    let client_key = hmac::sign(&key, b"Client Key");
    let stored = digest::digest(&digest::SHA256, client_key.as_ref());
    let server = hmac::sign(&key, b"Server Key");
    format!(
        "SCRAM-SHA-256${iterations}:{}${}:{}",
        STANDARD.encode(salt),
        STANDARD.encode(stored),
        STANDARD.encode(server)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The exchange printed in RFC 7677 section 3, checked the way a server checks it.
    #[test]
    fn the_verifier_accepts_the_exchange_of_rfc_7677() {
        let salt = STANDARD.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap();
        let verifier = verifier_with(&Secret::new("pencil".to_owned()), &salt, ITERATIONS);
        let rest = verifier.strip_prefix("SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$").unwrap();
        let (stored, server) = rest.split_once(':').unwrap();
        let message = concat!(
            "n=user,r=rOprNGfwEbeRWgbNEkqO,",
            "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,",
            "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
        );
        let sign = |key: &[u8]| hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), message.as_bytes());
        let signature = sign(&STANDARD.decode(stored).unwrap());
        let proof = STANDARD.decode("dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=").unwrap();
        let client_key: Vec<u8> = proof.iter().zip(signature.as_ref()).map(|(p, s)| p ^ s).collect();
        assert_eq!(STANDARD.encode(digest::digest(&digest::SHA256, &client_key)), stored);
        assert_eq!(
            STANDARD.encode(sign(&STANDARD.decode(server).unwrap())),
            "6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="
        );
    }

    #[test]
    fn passwords_differ_and_need_no_escaping() {
        let (a, b) = (draw_password().unwrap(), draw_password().unwrap());
        assert_ne!(a.expose(), b.expose());
        assert_eq!(a.expose().len(), 43);
        assert!(a.expose().bytes().all(|c| c.is_ascii_alphanumeric() || b"-_".contains(&c)));
        assert_ne!(verifier(&a, ITERATIONS).unwrap(), verifier(&a, ITERATIONS).unwrap(), "a salt of its own each time");
    }
}
