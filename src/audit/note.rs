//! Signed notes with Ed25519 (<https://c2sp.org/signed-note>), and keys in their text form `name+id+base64`.
//! Own code because the crate for it brings a second crypto provider into the tree.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::error::Error;
use super::merkle::sha256;
use crate::keys::CheckpointKeys;

/// Largest note that is looked at, in bytes.
pub const NOTE_BYTES_MAX: usize = 64 * 1024;
/// Most signatures that are looked at in one note; the specification asks for at least 16.
pub const SIGNATURES_MAX: usize = 64;
/// Longest key name, in bytes.
pub const KEY_NAME_BYTES_MAX: usize = 256;
/// The signature type "Ed25519" of the specification.
const ED25519_TYPE: u8 = 1;

fn check_name(name: &str) -> Result<(), Error> {
    let fine = !name.is_empty()
        && name.len() <= KEY_NAME_BYTES_MAX
        && !name.chars().any(|c| c.is_whitespace() || c.is_control() || c == '+');
    if fine {
        Ok(())
    } else {
        Err(Error::Note(
            "a key's name is 1 to 256 bytes without spaces and `+`, for example broker.example.com/journal",
        ))
    }
}

fn key_id(name: &str, public: &[u8]) -> u32 {
    let hash = sha256(&[name.as_bytes(), b"\n", &[ED25519_TYPE], public].concat());
    u32::from_be_bytes([hash.0[0], hash.0[1], hash.0[2], hash.0[3]])
}

/// Signs notes.
pub struct Signer {
    name: String,
    key: Key,
}

enum Key {
    Pair(Ed25519KeyPair),
    Kept(Arc<CheckpointKeys>),
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signer({})", self.verifier())
    }
}

impl Signer {
    /// A key from its 32-byte seed (RFC 8032, section 5.1.5).
    pub fn from_seed(name: &str, seed: &[u8; 32]) -> Result<Self, Error> {
        let key =
            Ed25519KeyPair::from_seed_unchecked(seed).map_err(|_| Error::Note("the seed is not an Ed25519 key"))?;
        Self::new(name, key)
    }

    /// A key from PKCS#8 DER.
    pub fn from_pkcs8(name: &str, der: &[u8]) -> Result<Self, Error> {
        let key = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der)
            .map_err(|_| Error::Note("the checkpoint key is not an Ed25519 key in PKCS#8: make it anew"))?;
        Self::new(name, key)
    }

    /// The broker's own checkpoint keys: signs with whichever is current.
    pub fn from_keys(name: &str, keys: Arc<CheckpointKeys>) -> Result<Self, Error> {
        check_name(name)?;
        Ok(Self { name: name.to_owned(), key: Key::Kept(keys) })
    }

    fn new(name: &str, key: Ed25519KeyPair) -> Result<Self, Error> {
        check_name(name)?;
        Ok(Self { name: name.to_owned(), key: Key::Pair(key) })
    }

    /// The key's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The public half.
    pub fn verifier(&self) -> Verifier {
        let public = match &self.key {
            Key::Pair(pair) => public_of(pair),
            Key::Kept(keys) => keys.public_key(),
        };
        Verifier::of(&self.name, public)
    }

    /// The note with one signature. `text` ends in a newline and has no control characters beside newlines.
    pub fn sign(&self, text: &str) -> Result<String, Error> {
        if !text.ends_with('\n') || text.chars().any(|c| c < ' ' && c != '\n') {
            return Err(Error::Note("a note's text ends in a newline and has no other control characters"));
        }
        let (public, signature) = match &self.key {
            Key::Pair(pair) => (public_of(pair), pair.sign(text.as_bytes()).as_ref().to_vec()),
            Key::Kept(keys) => {
                let made = keys.sign(text.as_bytes()).map_err(|_| Error::Note("the checkpoint key could not sign"))?;
                (made.public, made.signature.to_vec())
            }
        };
        let id = key_id(&self.name, &public);
        let line = STANDARD.encode([&id.to_be_bytes()[..], &signature].concat());
        Ok(format!("{text}\n\u{2014} {} {line}\n", self.name))
    }
}

fn public_of(pair: &Ed25519KeyPair) -> [u8; 32] {
    let mut public = [0; 32];
    public.copy_from_slice(pair.public_key().as_ref()); // always 32 bytes: RFC 8032 section 5.1.5
    public
}

/// Checks signatures of one key. Its text form is `name+id+base64(0x01 ‖ public key)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verifier {
    name: String,
    id: u32,
    public: [u8; 32],
}

impl fmt::Display for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{:08x}+{}", self.name, self.id, STANDARD.encode([&[ED25519_TYPE][..], &self.public].concat()))
    }
}

impl std::str::FromStr for Verifier {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        const FORM: Error = Error::Note("a verifier key has the form name+hash+base64, as the broker prints it");
        let mut parts = text.splitn(3, '+');
        let (Some(name), Some(id), Some(key)) = (parts.next(), parts.next(), parts.next()) else { return Err(FORM) };
        check_name(name)?;
        let key = STANDARD.decode(key).map_err(|_| FORM)?;
        let Some((&ED25519_TYPE, public)) = key.split_first() else {
            return Err(Error::Note("this verifier key is not of the type Ed25519"));
        };
        let public: [u8; 32] = public.try_into().map_err(|_| FORM)?;
        let wanted = key_id(name, &public);
        if id != format!("{wanted:08x}") {
            return Err(Error::Note("the verifier key's hash doesn't fit its name and key: copy it again, whole"));
        }
        Ok(Self { name: name.to_owned(), id: wanted, public })
    }
}

impl Verifier {
    /// The key of that name.
    pub fn of(name: &str, public: [u8; 32]) -> Self {
        Self { name: name.to_owned(), id: key_id(name, &public), public }
    }

    /// The key's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// Takes a note apart, checked: returns its text if one of `trusted` signed it. Signatures of other keys
/// are ignored; a bad one of a trusted key spoils the note.
pub fn open<'a>(note: &'a [u8], trusted: &[Verifier]) -> Result<&'a str, Error> {
    let (text, signatures) = parse(note)?;
    let mut verified = false;
    for (name, signature) in signatures {
        let Some((id, signature)) = signature.split_first_chunk::<4>() else { continue };
        let id = u32::from_be_bytes(*id);
        for key in trusted.iter().filter(|k| k.name == name && k.id == id) {
            if UnparsedPublicKey::new(&ED25519, &key.public).verify(text.as_bytes(), signature).is_err() {
                return Err(Error::Note(
                    "the note's signature is not valid: it was changed, or cut when it was copied",
                ));
            }
            verified = true;
        }
    }
    if verified { Ok(text) } else { Err(Error::Note("none of the given keys signed this note: give the key that did")) }
}

/// A note's text, and who signed with which bytes.
type Parsed<'a> = (&'a str, Vec<(&'a str, Vec<u8>)>);

/// Takes a note apart, unchecked.
pub(crate) fn parse(note: &[u8]) -> Result<Parsed<'_>, Error> {
    const FORM: Error = Error::Note("this is not a signed note: a text, an empty line, then lines `— name base64`");
    if note.len() > NOTE_BYTES_MAX {
        return Err(Error::Limit { what: "a note in bytes", size: note.len(), max: NOTE_BYTES_MAX });
    }
    let note = std::str::from_utf8(note).map_err(|_| FORM)?;
    if note.chars().any(|c| c < ' ' && c != '\n') {
        return Err(FORM);
    }
    let at = note.rfind("\n\n").ok_or(FORM)?;
    let (text, lines) = (&note[..=at], note[at + 2..].strip_suffix('\n').ok_or(FORM)?);
    let mut signatures = Vec::new();
    for line in lines.split('\n') {
        let (name, signature) = line.strip_prefix("\u{2014} ").and_then(|l| l.split_once(' ')).ok_or(FORM)?;
        check_name(name)?;
        signatures.push((name, STANDARD.decode(signature).map_err(|_| FORM)?));
        if signatures.len() > SIGNATURES_MAX {
            return Err(Error::Limit { what: "the number of signatures", size: signatures.len(), max: SIGNATURES_MAX });
        }
    }
    Ok((text, signatures))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// From the tests of Go's golang.org/x/mod/sumdb/note, the origin of the format.
    const KEY: &str = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW";
    const SEED: &str = "AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz";
    const NOTE: &str = "If you think cryptography is the answer to your problem,\n\
        then you don't know what your problem is.\n\n\
        \u{2014} PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n";

    #[test]
    fn known_key_and_note() {
        let verifier: Verifier = KEY.parse().unwrap();
        assert_eq!(verifier.to_string(), KEY);
        let text = open(NOTE.as_bytes(), std::slice::from_ref(&verifier)).unwrap();
        let seed: [u8; 32] = STANDARD.decode(SEED).unwrap()[1..].try_into().unwrap();
        let signer = Signer::from_seed("PeterNeumann", &seed).unwrap();
        assert_eq!(signer.verifier(), verifier);
        assert_eq!(signer.sign(text).unwrap(), NOTE);
    }

    #[test]
    fn every_flipped_byte_is_refused() {
        let verifier: Verifier = KEY.parse().unwrap();
        let mut bytes = NOTE.as_bytes().to_vec();
        for i in 0..bytes.len() {
            for bit in 0..8 {
                bytes[i] ^= 1 << bit;
                assert!(open(&bytes, std::slice::from_ref(&verifier)).is_err(), "byte {i} bit {bit}");
                bytes[i] ^= 1 << bit;
            }
        }
    }

    #[test]
    fn unknown_signatures_are_ignored_and_bad_known_ones_are_not() {
        let a = Signer::from_seed("a.example/log", &[1; 32]).unwrap();
        let b = Signer::from_seed("b.example/log", &[2; 32]).unwrap();
        let one = a.sign("text\n").unwrap();
        let two = format!("{one}{}", b.sign("text\n").unwrap().rsplit_once("\n\n").unwrap().1);
        for keys in [vec![a.verifier()], vec![b.verifier()], vec![a.verifier(), b.verifier()]] {
            assert_eq!(open(two.as_bytes(), &keys).unwrap(), "text\n");
        }
        assert!(open(one.as_bytes(), &[b.verifier()]).is_err());
        assert!(open(one.as_bytes(), &[]).is_err());
        let mixed = format!("{one}{}", b.sign("other\n").unwrap().rsplit_once("\n\n").unwrap().1);
        assert!(open(mixed.as_bytes(), &[a.verifier(), b.verifier()]).is_err());
        // The same name with another key is another key.
        let c = Signer::from_seed("a.example/log", &[3; 32]).unwrap();
        assert!(open(one.as_bytes(), &[c.verifier()]).is_err());
    }

    #[test]
    fn limits_and_names() {
        for bad in ["", "a b", "a+b", "a\u{a0}b", "a\nb", &"x".repeat(KEY_NAME_BYTES_MAX + 1)] {
            assert!(Signer::from_seed(bad, &[1; 32]).is_err(), "{bad:?}");
        }
        let signer = Signer::from_seed("a", &[1; 32]).unwrap();
        assert!(signer.sign("no newline").is_err());
        let big = signer.sign(&format!("{}\n", "x".repeat(NOTE_BYTES_MAX))).unwrap();
        assert!(matches!(open(big.as_bytes(), &[signer.verifier()]), Err(Error::Limit { .. })));
        let line = format!("\u{2014} b {}\n", STANDARD.encode([0; 8]));
        let many = format!("{}{}", signer.sign("t\n").unwrap(), line.repeat(SIGNATURES_MAX));
        assert!(matches!(open(many.as_bytes(), &[signer.verifier()]), Err(Error::Limit { .. })));
        let changed = KEY.replace("c74f20a3", "c74f20a4");
        assert!(changed.parse::<Verifier>().is_err() && "PeterNeumann+c74f20a3".parse::<Verifier>().is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_parse_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), text in ".{0,80}") {
            prop_assert!(open(&bytes, &[]).is_err());
            prop_assert!(text.parse::<Verifier>().is_err());
        }
    }
}
