//! Ed25519 keys that sign the journal's checkpoints. The note around the signature is the audit room's.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use zeroize::Zeroizing;

use super::files::Folder;
use super::ring::{KeyChange, KeySet, Pair};
use super::{KeyError, Purpose};
use crate::core::id::Timestamp;

impl Pair for Ed25519KeyPair {
    const ALG: &'static str = "EdDSA";

    fn generate() -> Result<Zeroizing<Vec<u8>>, KeyError> {
        let made = Self::generate().and_then(|pair| pair.to_pkcs8());
        Ok(Zeroizing::new(made.map_err(|_| KeyError::Crypto { doing: "make an Ed25519 key" })?.as_ref().to_vec()))
    }

    fn parse(pkcs8: &[u8]) -> Option<Self> {
        Self::from_pkcs8(pkcs8).ok()
    }

    fn required_members(&self) -> String {
        format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{}"}}"#, URL_SAFE_NO_PAD.encode(self.public_key()))
    }
}

/// The keys of [`Purpose::Checkpoints`]. Retired ones stay published: an old checkpoint verifies for ever.
pub struct CheckpointKeys {
    keys: KeySet<Ed25519KeyPair>,
}

impl fmt::Debug for CheckpointKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CheckpointKeys({:?})", self.keys.ring().current())
    }
}

/// A signature with what is needed to say whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointSignature {
    /// RFC 8037 thumbprint of the key.
    pub kid: String,
    /// The public key.
    pub public: [u8; 32],
    /// RFC 8032 signature.
    pub signature: [u8; 64],
}

fn public(pair: &Ed25519KeyPair) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(pair.public_key().as_ref()); // always 32 bytes: RFC 8032 section 5.1.5
    out
}

impl CheckpointKeys {
    /// The keys in `<root>/checkpoints/`; the first is made if there is none.
    pub fn open(root: &Path, now: Timestamp) -> Result<Self, KeyError> {
        let folder = Folder::open(&root.join(Purpose::Checkpoints.folder()))?;
        Ok(Self { keys: KeySet::open(Some(folder), Purpose::Checkpoints.periods(), now)? })
    }

    /// Keys that live in memory alone.
    pub fn ephemeral(now: Timestamp) -> Result<Self, KeyError> {
        Ok(Self { keys: KeySet::open(None, Purpose::Checkpoints.periods(), now)? })
    }

    /// Signs the bytes with the current key; says with which, so that a rotation in between can't mix two.
    pub fn sign(&self, bytes: &[u8]) -> Result<CheckpointSignature, KeyError> {
        let ring = self.keys.ring();
        let key = ring.current();
        let made = key.pair.try_sign(bytes).map_err(|_| KeyError::Crypto { doing: "sign" })?;
        let mut signature = [0; 64];
        signature.copy_from_slice(made.as_ref()); // always 64 bytes: RFC 8032 section 5.1.6
        Ok(CheckpointSignature { kid: key.kid.clone(), public: public(&key.pair), signature })
    }

    /// The public key that signs now.
    pub fn public_key(&self) -> [u8; 32] {
        public(&self.keys.ring().current().pair)
    }

    /// All public keys that ever signed, the oldest first.
    pub fn public_keys(&self) -> Vec<[u8; 32]> {
        self.keys.ring().entries().map(|e| public(&e.pair)).collect()
    }

    /// The JWKS (RFC 8037).
    pub fn jwks(&self) -> Arc<str> {
        self.keys.ring().jwks()
    }

    /// Makes a new key that signs from now on.
    pub fn rotate(&self, now: Timestamp) -> Result<Vec<KeyChange>, KeyError> {
        self.keys.rotate(now)
    }

    /// Does what is due at `now`.
    pub fn tick(&self, now: Timestamp) -> Result<Vec<KeyChange>, KeyError> {
        self.keys.tick(now)
    }
}
