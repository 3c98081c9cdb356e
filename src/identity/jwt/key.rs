//! Public keys as they come in a JWKS: each knows the algorithms that it may verify, so that no header
//! can choose one for it (regressions A1, A2). Parsed once, kept parsed.

use std::collections::HashMap;
use std::fmt;

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ED25519, ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256,
    RSA_PSS_2048_8192_SHA256, RsaParameters, RsaPublicKeyComponents,
};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde_json::{Map, Value};

use super::json::strict_object;
pub use crate::config::algorithm::Algorithm;

/// Largest JWKS or SPIFFE bundle document, in bytes.
pub const JWKS_BYTES_MAX: usize = 512 * 1024;
/// Most keys in one JWKS.
pub const JWKS_KEYS_MAX: usize = 128;
/// Longest `kid`, in bytes.
pub const KID_BYTES_MAX: usize = 256;
/// Nesting of a JWKS document.
const JWKS_DEPTH_MAX: usize = 5;
/// RSA moduli, in bytes: 2048 to 8192 bits.
const RSA_MODULUS_BYTES: std::ops::RangeInclusive<usize> = 256..=1024;

/// What a key may be used for, as the document's `use` says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyUse {
    /// A JWKS: `use` is `sig` or absent.
    Signature,
    /// A SPIFFE bundle: `use` is `jwt-svid` (SPIFFE Trust Domain and Bundle, 4.2.2).
    JwtSvid,
    /// JWT authorities as the Workload API hands them out: already chosen, `use` may be any of both or absent.
    JwtAuthority,
}

/// Why a document of keys can't be used. Never echoes the document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JwksError {
    /// Over the limit.
    #[error("the key document is larger than 512 KiB")]
    TooLarge,
    /// Not `{"keys":[…]}`.
    #[error("the key document is not a JSON object with a list `keys` (no member twice)")]
    Form,
    /// Too many.
    #[error("the key document holds more than 128 keys")]
    TooMany,
}

/// One key with the algorithms that it may verify.
pub struct VerifyingKey {
    kid: Option<String>,
    parsed: Vec<(Algorithm, ParsedPublicKey)>,
    thumbprint: [u8; 32],
}

impl fmt::Debug for VerifyingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerifyingKey")
            .field("algorithms", &self.algorithms().collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

impl VerifyingKey {
    /// Takes a public JWK. `None` if it is none of ours to use: another type, curve or use, a symmetric
    /// or private key, a weak or malformed one.
    pub fn from_jwk(jwk: &Map<String, Value>, key_use: KeyUse) -> Option<Self> {
        let text = |name: &str| jwk.get(name).map(Value::as_str);
        let bytes = |name: &str| BASE64_URL_SAFE_NO_PAD.decode(jwk.get(name)?.as_str()?).ok();
        let right_use = matches!(
            (text("use"), key_use),
            (None | Some(Some("sig")), KeyUse::Signature | KeyUse::JwtAuthority)
                | (Some(Some("jwt-svid")), KeyUse::JwtSvid | KeyUse::JwtAuthority)
        );
        let right_ops = match jwk.get("key_ops") {
            None => true,
            Some(ops) => ops.as_array().is_some_and(|ops| ops.iter().any(|op| op == "verify")),
        };
        // A published private key protects nothing any more.
        if !right_use || !right_ops || jwk.contains_key("d") || jwk.contains_key("k") {
            return None;
        }
        let kid = match text("kid") {
            None => None,
            Some(Some(kid)) if !kid.is_empty() && kid.len() <= KID_BYTES_MAX => Some(kid.to_owned()),
            Some(_) => return None,
        };
        let parsed = match (text("kty")??, text("crv")) {
            ("EC", Some(Some("P-256"))) => vec![(Algorithm::Es256, ec(bytes("x")?, bytes("y")?, 32)?)],
            ("EC", Some(Some("P-384"))) => vec![(Algorithm::Es384, ec(bytes("x")?, bytes("y")?, 48)?)],
            ("OKP", Some(Some("Ed25519"))) => {
                vec![(Algorithm::EdDsa, ParsedPublicKey::new(&ED25519, bytes("x")?).ok()?)]
            }
            ("RSA", _) => {
                let (n, e) = (bytes("n")?, bytes("e")?);
                vec![
                    (Algorithm::Rs256, rsa(&n, &e, &RSA_PKCS1_2048_8192_SHA256)?),
                    (Algorithm::Ps256, rsa(&n, &e, &RSA_PSS_2048_8192_SHA256)?),
                ]
            }
            _ => return None,
        };
        // The key's own `alg` narrows what it may verify.
        let parsed: Vec<_> = match text("alg") {
            None => parsed,
            Some(Some(name)) => parsed.into_iter().filter(|(a, _)| a.name() == name).collect(),
            Some(None) => return None,
        };
        let first = parsed.first()?;
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, first.1.as_ref());
        let thumbprint = digest.as_ref().try_into().ok()?;
        Some(Self { kid, parsed, thumbprint })
    }

    /// Its `kid`.
    pub fn kid(&self) -> Option<&str> {
        self.kid.as_deref()
    }

    /// What it may verify.
    pub fn algorithms(&self) -> impl Iterator<Item = Algorithm> {
        self.parsed.iter().map(|(a, _)| *a)
    }

    /// True if this very key made the signature with this algorithm, and may use it.
    pub fn verifies(&self, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> bool {
        self.parsed.iter().any(|(a, key)| *a == algorithm && key.verify_sig(message, signature).is_ok())
    }
}

fn ec(x: Vec<u8>, y: Vec<u8>, size: usize) -> Option<ParsedPublicKey> {
    if x.len() != size || y.len() != size {
        return None;
    }
    let point: Vec<u8> = std::iter::once(4).chain(x).chain(y).collect();
    if size == 32 {
        ParsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).ok()
    } else {
        ParsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, point).ok()
    }
}

fn rsa(n: &[u8], e: &[u8], params: &'static RsaParameters) -> Option<ParsedPublicKey> {
    // An even or tiny exponent is no RSA key; the modulus counts without leading zeros.
    let odd = e.last().is_some_and(|b| b & 1 == 1);
    if !RSA_MODULUS_BYTES.contains(&n.len()) || n[0] == 0 || !odd || e == [1] || e.len() > 8 {
        return None;
    }
    RsaPublicKeyComponents { n, e }.to_parsed_public_key(params).ok()
}

/// The keys of one issuer or trust domain. A key found here verifies for nobody else (regression A14).
#[derive(Debug, Default)]
pub struct KeySet {
    keys: Vec<VerifyingKey>,
    by_kid: HashMap<String, Vec<usize>>,
}

impl KeySet {
    /// Collects keys; the same key twice counts once.
    pub fn new(keys: impl IntoIterator<Item = VerifyingKey>) -> Self {
        let mut set = Self::default();
        for key in keys {
            if set.keys.iter().any(|k| k.thumbprint == key.thumbprint && k.kid == key.kid && same(k, &key)) {
                continue;
            }
            if let Some(kid) = key.kid() {
                set.by_kid.entry(kid.to_owned()).or_default().push(set.keys.len());
            }
            set.keys.push(key);
        }
        set
    }

    /// Reads a JWKS (RFC 7517, section 5). Keys that are not ours to use are left out.
    pub fn from_jwks(document: &[u8], key_use: KeyUse) -> Result<Self, JwksError> {
        Ok(Self::new(jwks_entries(document)?.iter().filter_map(|jwk| VerifyingKey::from_jwk(jwk, key_use))))
    }

    /// How many keys.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// True without keys.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Keys that may have signed: those of that `kid`; without one, the only key for the algorithm.
    pub fn candidates(&self, kid: Option<&str>, algorithm: Algorithm) -> Vec<&VerifyingKey> {
        let fits = |key: &&VerifyingKey| key.algorithms().any(|a| a == algorithm);
        if let Some(kid) = kid {
            return self.by_kid.get(kid).into_iter().flatten().map(|i| &self.keys[*i]).filter(fits).collect();
        }
        let all: Vec<_> = self.keys.iter().filter(fits).collect();
        if all.len() == 1 { all } else { Vec::new() }
    }

    /// True if a key of that `kid` exists, whatever its algorithm.
    pub fn has_kid(&self, kid: &str) -> bool {
        self.by_kid.contains_key(kid)
    }

    /// A hash of what is in it, to see a change.
    pub fn fingerprint(&self) -> Vec<u8> {
        let mut parts: Vec<Vec<u8>> = self
            .keys
            .iter()
            .map(|k| {
                let kid = k.kid.as_deref().unwrap_or_default().bytes();
                let algorithms = k.algorithms().flat_map(|a| a.name().bytes());
                k.thumbprint.iter().copied().chain(kid).chain(algorithms).collect()
            })
            .collect();
        parts.sort();
        parts.concat()
    }
}

fn same(a: &VerifyingKey, b: &VerifyingKey) -> bool {
    a.algorithms().eq(b.algorithms())
}

/// The entries of `keys`; those that are no objects are left out.
pub fn jwks_entries(document: &[u8]) -> Result<Vec<Map<String, Value>>, JwksError> {
    if document.len() > JWKS_BYTES_MAX {
        return Err(JwksError::TooLarge);
    }
    let mut object = strict_object(document, JWKS_DEPTH_MAX).ok_or(JwksError::Form)?;
    let Some(Value::Array(keys)) = object.remove("keys") else {
        return Err(JwksError::Form);
    };
    if keys.len() > JWKS_KEYS_MAX {
        return Err(JwksError::TooMany);
    }
    Ok(keys
        .into_iter()
        .filter_map(|key| match key {
            Value::Object(map) => Some(map),
            _ => None,
        })
        .collect())
}
