//! SSH keys made in the broker, and the check that a signed certificate is what was asked for.

use std::collections::{BTreeMap, BTreeSet};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use ssh_key::private::{Ed25519Keypair, Ed25519PrivateKey, KeypairData};
use ssh_key::public::Ed25519PublicKey;
use ssh_key::{Certificate, LineEnding, PrivateKey};
use zeroize::Zeroizing;

use crate::core::id::Timestamp;
use crate::core::secret::Secret;

/// Most option names that an error names.
const OPTIONS_TOLD_MAX: usize = 16;

/// A fresh key pair, as OpenSSH writes it.
pub(super) struct FreshKey {
    /// `-----BEGIN OPENSSH PRIVATE KEY-----`.
    pub private: Secret,
    /// `ssh-ed25519 AAAA… COMMENT`.
    pub public: String,
}

/// Makes an Ed25519 pair by aws-lc-rs.
pub(super) fn fresh_key(comment: &str) -> Result<FreshKey, String> {
    let wrong = |_| "an SSH key could not be made".to_owned();
    let mut seed = Zeroizing::new([0u8; 32]);
    aws_lc_rs::rand::fill(seed.as_mut()).map_err(|_| "no randomness for an SSH key".to_owned())?;
    let pair =
        Ed25519KeyPair::from_seed_unchecked(seed.as_ref()).map_err(|_| "an SSH key could not be made".to_owned())?;
    let public = Ed25519PublicKey::try_from(pair.public_key().as_ref()).map_err(wrong)?;
    let pair = Ed25519Keypair { public, private: Ed25519PrivateKey::from_bytes(&seed) };
    let key = PrivateKey::new(KeypairData::Ed25519(pair), comment).map_err(wrong)?;
    let private = key.to_openssh(LineEnding::LF).map_err(wrong)?;
    let public = key.public_key().to_openssh().map_err(wrong)?;
    Ok(FreshKey { private: Secret::new((*private).clone()), public })
}

/// What a signed certificate must be.
pub(super) struct Wanted<'a> {
    /// The key that was sent.
    pub public: &'a str,
    /// Exactly these principals.
    pub principals: &'a BTreeSet<String>,
    /// Our key id.
    pub key_id: &'a str,
    /// Exactly these extensions: each opens something.
    pub extensions: &'a BTreeMap<String, String>,
    /// Exactly these critical options: each closes something.
    pub critical_options: &'a BTreeMap<String, String>,
    /// The latest end.
    pub not_after_max: Timestamp,
}

/// A certificate that the target signed.
pub(super) fn read_certificate(text: &str) -> Result<Certificate, String> {
    Certificate::from_openssh(text.trim()).map_err(|_| "the answer is no SSH certificate".to_owned())
}

/// When it expires.
pub(super) fn ends(cert: &Certificate) -> Timestamp {
    Timestamp(cert.valid_before().saturating_mul(1000))
}

/// Checks that the certificate is what was asked for (guarantee 3, regression A17).
pub(super) fn check_certificate(cert: &Certificate, wanted: &Wanted<'_>) -> Result<(), String> {
    let key = ssh_key::PublicKey::from_openssh(wanted.public)
        .map_err(|_| "the key that was sent can't be read".to_owned())?;
    if cert.public_key() != key.key_data() {
        return Err("the certificate is for another key".to_owned());
    }
    if !cert.cert_type().is_user() {
        return Err("the certificate is not a user certificate".to_owned());
    }
    let principals: BTreeSet<&str> = cert.valid_principals().iter().map(String::as_str).collect();
    if principals.is_empty() || principals != wanted.principals.iter().map(String::as_str).collect() {
        return Err("the certificate has other principals than were asked for".to_owned());
    }
    if cert.key_id() != wanted.key_id {
        return Err(
            "the certificate has another key id than was asked for; set allow_user_key_ids=true on the role".to_owned()
        );
    }
    for (what, is, wanted) in [
        ("extensions", cert.extensions(), wanted.extensions),
        ("critical options", cert.critical_options(), wanted.critical_options),
    ] {
        if !is.iter().eq(wanted) {
            let names = |options: Vec<&String>| {
                let names: Vec<_> = options.iter().map(|n| format!("`{}`", n.escape_debug())).collect();
                names.join(", ")
            };
            return Err(format!(
                "the certificate has other {what} ({}) than the catalogue ({})",
                names(is.keys().take(OPTIONS_TOLD_MAX).collect()),
                names(wanted.keys().take(OPTIONS_TOLD_MAX).collect()),
            ));
        }
    }
    if ends(cert) > wanted.not_after_max {
        return Err("the certificate lives longer than was asked for".to_owned());
    }
    Ok(())
}
