//! Names at targets: a prefix that a sweep recognises, and a keyed hash that nobody can guess or aim at.
//! The same parts give the same name, also after a restart: a name is what finds an orphan again.

use std::fmt;
use std::path::Path;

use aws_lc_rs::hmac;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::KeyError;
use super::files::Folder;
use super::random::{SystemRandom, random_bytes};
use crate::core::id::GrantId;
use crate::core::permission::Permission;

/// Longest name, in bytes: fits PostgreSQL's 63 with room to spare.
pub const NAME_AT_TARGET_BYTES_MAX: usize = 48;
/// 130 bits of the hash.
pub const HASH_CHARS: usize = 26;
const FILE: &str = "name.key";
/// 32 characters, so that five bits make one without bias.
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// True if this is what follows the prefix and `_` in every [name](NameKey::name).
pub fn is_name_hash(text: &str) -> bool {
    text.len() == HASH_CHARS && text.bytes().all(|b| ALPHABET.contains(&b))
}

/// Begins every name of ours at a target: `[a-z][a-z0-9_]*`, 2 to 21 bytes, not `pg_` (which PostgreSQL keeps for itself).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct NamePrefix(String);

/// Why a text can't begin names.
#[derive(Debug, thiserror::Error)]
#[error(
    "a name prefix has 2 to {} characters of [a-z0-9_], begins with a letter and not with pg_",
    NamePrefix::BYTES_MAX
)]
pub struct NamePrefixError;

impl TryFrom<String> for NamePrefix {
    type Error = NamePrefixError;
    fn try_from(text: String) -> Result<Self, NamePrefixError> {
        Self::new(&text).ok_or(NamePrefixError)
    }
}

impl From<NamePrefix> for String {
    fn from(prefix: NamePrefix) -> Self {
        prefix.0
    }
}

impl Default for NamePrefix {
    fn default() -> Self {
        Self("cslease".to_owned())
    }
}

impl NamePrefix {
    /// Longest prefix, in bytes.
    pub const BYTES_MAX: usize = NAME_AT_TARGET_BYTES_MAX - HASH_CHARS - 1;

    /// Checks and takes the text; `None` if it can't begin a name at every target.
    pub fn new(text: &str) -> Option<Self> {
        let plain = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        let fits = (2..=Self::BYTES_MAX).contains(&text.len())
            && text.starts_with(|c: char| c.is_ascii_lowercase())
            && !text.starts_with("pg_");
        (plain && fits).then(|| Self(text.to_owned()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The key behind names, and behind hashes of what must not be readable in the record (a command's arguments).
pub struct NameKey(hmac::Key);

impl fmt::Debug for NameKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NameKey(…)")
    }
}

impl NameKey {
    /// The key in `<root>/names/`; made if there is none. Never rotated: old names must stay the same.
    pub fn open(root: &Path) -> Result<Self, KeyError> {
        let folder = Folder::open(&root.join("names"))?;
        let bytes = if let Some(bytes) = folder.read(FILE)? {
            bytes
        } else {
            let bytes = Zeroizing::new(random_bytes::<32>(&SystemRandom).to_vec());
            folder.write(FILE, &bytes)?;
            bytes
        };
        if bytes.len() != 32 {
            return Err(KeyError::Unexpected { path: folder.path(FILE) });
        }
        Ok(Self::from_bytes(&bytes))
    }

    /// A key that lives in memory alone.
    pub fn ephemeral() -> Self {
        Self::from_bytes(&random_bytes::<32>(&SystemRandom))
    }

    /// The key of these bytes, for the simulator.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, bytes))
    }

    /// HMAC-SHA-256 over a domain and parts. Each is framed by its length: `["ab","c"]` is not `["a","bc"]`.
    pub fn mac(&self, domain: &str, parts: &[&[u8]]) -> [u8; 32] {
        let mut context = hmac::Context::with_key(&self.0);
        for part in std::iter::once(domain.as_bytes()).chain(parts.iter().copied()) {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part);
        }
        let mut out = [0; 32];
        out.copy_from_slice(context.sign().as_ref()); // SHA-256 has 32 bytes
        out
    }

    /// `prefix_` and 130 bits of keyed hash: `[a-z0-9_]`, at most [`NAME_AT_TARGET_BYTES_MAX`] bytes.
    pub fn name(&self, prefix: &NamePrefix, parts: &[&[u8]]) -> String {
        let mac = self.mac("countersign name", parts);
        let mut name = format!("{}_", prefix.0);
        let (mut bits, mut count, mut bytes) = (0u32, 0, mac.iter());
        for _ in 0..HASH_CHARS {
            if count < 5 {
                bits = (bits << 8) | u32::from(*bytes.next().unwrap_or(&0)); // 26 characters need 17 of 32 bytes
                count += 8;
            }
            count -= 5;
            name.push(char::from(ALPHABET[(bits >> count) as usize & 31]));
        }
        name
    }

    /// The name of one lease: of a grant, one of its permissions, and the attempt.
    pub fn lease_name(&self, prefix: &NamePrefix, grant: GrantId, permission: &Permission, attempt: u32) -> String {
        // Maps and sets in a permission are sorted: the same permission has the same bytes.
        let permission = serde_json::to_vec(permission).unwrap_or_default();
        self.name(prefix, &[grant.as_bytes(), &permission, &attempt.to_be_bytes()])
    }

    /// Tells whether two keys are the same, and nothing else about them.
    pub(super) fn mark(&self) -> String {
        self.name(&NamePrefix::default(), &[b"which key this is"])
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::core::id::{ActionName, ResourceName};

    fn prefix(text: &str) -> NamePrefix {
        NamePrefix::new(text).unwrap()
    }

    #[test]
    fn names_are_deterministic_keyed_and_fit() {
        let key = NameKey::from_bytes(&[7; 32]);
        let name = key.name(&prefix("cs"), &[b"a", b"b"]);
        assert_eq!(name, NameKey::from_bytes(&[7; 32]).name(&prefix("cs"), &[b"a", b"b"]));
        assert_ne!(name, NameKey::from_bytes(&[8; 32]).name(&prefix("cs"), &[b"a", b"b"]));
        assert_ne!(key.name(&prefix("cs"), &[b"ab", b"c"]), key.name(&prefix("cs"), &[b"a", b"bc"]));
        assert_ne!(key.name(&prefix("cs"), &[b"a"]), key.name(&prefix("cs"), &[b"a", b""]));
        assert_ne!(key.mac("x", &[b"a"]), key.mac("y", &[b"a"]));
        let longest = key.name(&prefix(&"p".repeat(NamePrefix::BYTES_MAX)), &[]);
        assert_eq!(longest.len(), NAME_AT_TARGET_BYTES_MAX);
        assert!(longest.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'), "{longest}");
    }

    #[test]
    fn the_hash_is_the_first_130_bits_in_base_32() {
        let key = NameKey::from_bytes(&[7; 32]);
        let mac = key.mac("countersign name", &[b"a"]);
        let bits = mac.map(|b| format!("{b:08b}")).concat();
        let expected: String =
            (0..26).map(|i| char::from(ALPHABET[usize::from_str_radix(&bits[i * 5..i * 5 + 5], 2).unwrap()])).collect();
        assert_eq!(key.name(&prefix("cs"), &[b"a"]), format!("cs_{expected}"));
    }

    #[test]
    fn prefixes_that_no_target_could_take_are_refused() {
        for bad in ["", "a", "pg_x", "1a", "_a", "A", "a-b", "a b", "é", &"a".repeat(NamePrefix::BYTES_MAX + 1)] {
            assert!(NamePrefix::new(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn leases_differ_by_grant_permission_and_attempt() {
        let key = NameKey::from_bytes(&[7; 32]);
        let permission = |action: &str| Permission {
            resource: ResourceName::new("r").unwrap(),
            actions: [ActionName::new(action).unwrap()].into(),
            constraints: std::collections::BTreeMap::new(),
        };
        let (g, h) = (GrantId::from_bytes([1; 16]), GrantId::from_bytes([2; 16]));
        let p = prefix("cs");
        let names: BTreeSet<String> = [
            key.lease_name(&p, g, &permission("read"), 0),
            key.lease_name(&p, g, &permission("read"), 1),
            key.lease_name(&p, g, &permission("write"), 0),
            key.lease_name(&p, h, &permission("read"), 0),
        ]
        .into();
        assert_eq!(names.len(), 4);
        assert!(names.contains(&key.lease_name(&p, g, &permission("read"), 0)));
    }

    #[test]
    fn the_key_survives_a_restart_and_a_damaged_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let name = |k: &NameKey| k.name(&prefix("cs"), &[b"a"]);
        let first = name(&NameKey::open(dir.path()).unwrap());
        assert_eq!(first, name(&NameKey::open(dir.path()).unwrap()));
        let file = dir.path().join("names").join(FILE);
        std::fs::write(&file, b"short").unwrap();
        assert!(matches!(NameKey::open(dir.path()), Err(KeyError::Unexpected { .. })));
    }
}
