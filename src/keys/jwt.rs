//! ES256 keys and the JWTs they sign (RFC 7515, RFC 7518 section 3.4). The header is put together by hand
//! and the parsed key is kept: a token costs one signature and one allocation or two.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use aws_lc_rs::rand::SystemRandom as Rng;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _, ParsedPublicKey,
};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use zeroize::Zeroizing;

use super::files::Folder;
use super::random::{SystemRandom, random_bytes};
use super::ring::{KeyChange, KeySet, Pair};
use super::{KeyError, Purpose};
use crate::core::id::Timestamp;
use crate::core::secret::Secret;

/// Longest token that is signed or looked at, in bytes.
pub const TOKEN_BYTES_MAX: usize = 16 * 1024;
/// Longest life of a token, in seconds: a key stays published longer than this after it signed last.
pub const TOKEN_LIFE_SECS_MAX: u64 = 24 * 3600;
/// Longest life of a login assertion, in seconds.
pub const ASSERTION_LIFE_SECS_MAX: u64 = 300;

/// `typ` of a login assertion; tokens that agents carry never have it.
const ASSERTION_TYP: &str = "JWT";

/// Why a token of ours is not accepted. Never echoes the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// Longer than [`TOKEN_BYTES_MAX`].
    #[error("the token is too long")]
    TooLong,
    /// Not a compact JWS as we make them.
    #[error("the token is malformed")]
    Malformed,
    /// `alg` or `typ` is not what it has to be.
    #[error("the token is of another type")]
    Type,
    /// No published key of this purpose has this `kid`.
    #[error("the token is signed by a key that is not ours, or not any more")]
    Key,
    /// The signature is wrong.
    #[error("the token's signature is wrong")]
    Signature,
    /// `exp` has passed.
    #[error("the token has expired")]
    Expired,
    /// The claims don't have the form that was asked for.
    #[error("the token's claims are not as expected")]
    Claims,
}

/// A P-256 pair with its public half parsed once.
struct P256 {
    pair: EcdsaKeyPair,
    public: ParsedPublicKey,
    rng: Rng,
}

impl Pair for P256 {
    const ALG: &'static str = "ES256";

    fn generate() -> Result<Zeroizing<Vec<u8>>, KeyError> {
        let made = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &Rng::new());
        Ok(Zeroizing::new(made.map_err(|_| KeyError::Crypto { doing: "make a P-256 key" })?.as_ref().to_vec()))
    }

    fn parse(pkcs8: &[u8]) -> Option<Self> {
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8).ok()?;
        let public = ParsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, pair.public_key().as_ref()).ok()?;
        Some(Self { pair, public, rng: Rng::new() })
    }

    fn required_members(&self) -> String {
        let point = self.pair.public_key().as_ref();
        // SEC 1 uncompressed: 0x04, 32 bytes of x, 32 bytes of y.
        let (x, y) = (URL_SAFE_NO_PAD.encode(&point[1..33]), URL_SAFE_NO_PAD.encode(&point[33..65]));
        format!(r#"{{"crv":"P-256","kty":"EC","x":"{x}","y":"{y}"}}"#)
    }
}

/// What the broker says of itself when it logs in at a target.
#[derive(Debug)]
pub struct Assertion<'a> {
    /// `iss`: apart from the issuer of the tokens that agents carry.
    pub issuer: &'a str,
    /// `sub`: the broker, the same at each login.
    pub subject: &'a str,
    /// `aud`: the target, exactly.
    pub audience: &'a str,
    /// Claims beside the registered ones, for example `lease`.
    pub extra: Map<String, Value>,
    /// How long it lives, in seconds, at most [`ASSERTION_LIFE_SECS_MAX`].
    pub life_secs: u64,
}

/// ES256 keys of one purpose: [`Purpose::Tokens`] or [`Purpose::Assertions`].
pub struct SigningKeys {
    purpose: Purpose,
    keys: KeySet<P256>,
}

impl fmt::Debug for SigningKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKeys({:?}, {:?})", self.purpose, self.keys.ring().current())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Header<'a> {
    alg: &'a str,
    kid: &'a str,
    typ: &'a str,
}

#[derive(Deserialize)]
struct Expiry {
    exp: u64,
}

impl SigningKeys {
    /// The keys in `<root>/<purpose>/`; the first is made if there is none.
    pub fn open(root: &Path, purpose: Purpose, now: Timestamp) -> Result<Self, KeyError> {
        Self::over(Some(Folder::open(&root.join(purpose.folder()))?), purpose, now)
    }

    /// Keys that live in memory alone.
    pub fn ephemeral(purpose: Purpose, now: Timestamp) -> Result<Self, KeyError> {
        Self::over(None, purpose, now)
    }

    fn over(folder: Option<Folder>, purpose: Purpose, now: Timestamp) -> Result<Self, KeyError> {
        if purpose == Purpose::Checkpoints {
            return Err(KeyError::Purpose(purpose));
        }
        Ok(Self { purpose, keys: KeySet::open(folder, purpose.periods(), now)? })
    }

    /// What these keys are for.
    pub const fn purpose(&self) -> Purpose {
        self.purpose
    }

    /// RFC 7638 thumbprint of the key that signs now.
    pub fn kid(&self) -> String {
        self.keys.ring().current().kid.clone()
    }

    /// The JWKS (RFC 7517): what signs now, what will, and what did as long as something signed by it lives.
    pub fn jwks(&self) -> Arc<str> {
        self.keys.ring().jwks()
    }

    /// The same public keys as PEM (SubjectPublicKeyInfo), for targets that pin keys.
    pub fn public_pems(&self) -> Vec<String> {
        // SEQUENCE { SEQUENCE { ecPublicKey, prime256v1 }, BIT STRING } of RFC 5480; the point follows.
        const SPKI_P256: [u8; 26] = [
            0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48,
            0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
        ];
        let pem = |point: &[u8]| {
            let text = STANDARD.encode([&SPKI_P256, point].concat());
            let lines: Vec<&str> = (0..text.len()).step_by(64).map(|i| &text[i..text.len().min(i + 64)]).collect();
            format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", lines.join("\n"))
        };
        self.keys.ring().entries().map(|e| pem(e.pair.pair.public_key().as_ref())).collect()
    }

    /// Signs `claims` as a JWT of this `typ` (RFC 8725 section 3.11: each kind of token says what it is).
    ///
    /// An ECDSA signature can be rewritten into another valid one by anybody: revoke by `jti`, never by a hash of the text.
    pub fn sign_jwt(&self, typ: &str, claims: &impl Serialize) -> Result<Secret, KeyError> {
        if self.purpose != Purpose::Tokens || typ.eq_ignore_ascii_case(ASSERTION_TYP) {
            return Err(KeyError::Purpose(self.purpose));
        }
        self.sign(typ, claims)
    }

    fn sign(&self, typ: &str, claims: &impl Serialize) -> Result<Secret, KeyError> {
        if typ.is_empty() || !typ.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b)) {
            return Err(KeyError::Claims("the type is not a media type"));
        }
        let payload = serde_json::to_vec(claims).map_err(|_| KeyError::Claims("the claims are not JSON"))?;
        let ring = self.keys.ring();
        let key = ring.current();
        let header = format!(r#"{{"alg":"ES256","kid":"{}","typ":"{typ}"}}"#, key.kid);
        // Room for all of it, the 86 characters of the signature too: a buffer that grows leaves copies behind.
        let room = (header.len() + payload.len()).div_ceil(3) * 4 + 96;
        if room > TOKEN_BYTES_MAX {
            return Err(KeyError::Claims("the claims are too large"));
        }
        let mut token = String::with_capacity(room);
        URL_SAFE_NO_PAD.encode_string(header, &mut token);
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(payload, &mut token);
        let signature =
            key.pair.pair.sign(&key.pair.rng, token.as_bytes()).map_err(|_| KeyError::Crypto { doing: "sign" })?;
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(signature, &mut token);
        Ok(Secret::new(token))
    }

    /// An assertion by which the broker logs in at a target (RFC 7523 section 3), with a random `jti`.
    pub fn assertion(&self, assertion: &Assertion<'_>, now: Timestamp) -> Result<Secret, KeyError> {
        if self.purpose != Purpose::Assertions {
            return Err(KeyError::Purpose(self.purpose));
        }
        if assertion.life_secs == 0 || assertion.life_secs > ASSERTION_LIFE_SECS_MAX {
            return Err(KeyError::Claims("an assertion lives 1 to 300 seconds"));
        }
        let registered = [
            ("iss", assertion.issuer.into()),
            ("sub", assertion.subject.into()),
            ("aud", assertion.audience.into()),
            ("iat", now.secs().into()),
            ("nbf", now.secs().into()),
            ("exp", now.plus_secs(assertion.life_secs).secs().into()),
            ("jti", hex::encode(random_bytes::<16>(&SystemRandom)).into()),
        ];
        let mut claims = assertion.extra.clone();
        for (name, value) in registered {
            if claims.insert(name.to_owned(), value).is_some() {
                return Err(KeyError::Claims("an extra claim has the name of a registered one"));
            }
        }
        self.sign(ASSERTION_TYP, &claims)
    }

    /// Verifies a token that these keys signed: type, key, signature, expiry, and the claims' form. Whether it was
    /// revoked, and whether its audience is the asker's, is not known here.
    pub fn verify<C: DeserializeOwned>(&self, typ: &str, token: &str, now: Timestamp) -> Result<C, VerifyError> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(VerifyError::TooLong);
        }
        let (signed, signature) = token.rsplit_once('.').ok_or(VerifyError::Malformed)?;
        let (header, payload) = signed.split_once('.').ok_or(VerifyError::Malformed)?;
        if payload.contains('.') {
            return Err(VerifyError::Malformed);
        }
        let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| VerifyError::Malformed);
        let header = decode(header)?;
        let header: Header<'_> = serde_json::from_slice(&header).map_err(|_| VerifyError::Malformed)?;
        // The algorithm comes from our key; the header may only agree.
        if header.alg != P256::ALG || header.typ != typ {
            return Err(VerifyError::Type);
        }
        let ring = self.keys.ring();
        let key = ring.by_kid(header.kid).ok_or(VerifyError::Key)?;
        let signature = decode(signature)?;
        key.pair.public.verify_sig(signed.as_bytes(), &signature).map_err(|_| VerifyError::Signature)?;
        let payload = decode(payload)?;
        let Expiry { exp } = serde_json::from_slice(&payload).map_err(|_| VerifyError::Claims)?;
        if exp <= now.secs() {
            return Err(VerifyError::Expired);
        }
        serde_json::from_slice(&payload).map_err(|_| VerifyError::Claims)
    }

    /// Publishes the next key now; it signs once everybody had time to fetch it.
    pub fn rotate(&self, now: Timestamp) -> Result<Vec<KeyChange>, KeyError> {
        self.keys.rotate(now)
    }

    /// Does what is due at `now`: publishes, activates, drops.
    pub fn tick(&self, now: Timestamp) -> Result<Vec<KeyChange>, KeyError> {
        self.keys.tick(now)
    }
}
