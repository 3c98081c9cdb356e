//! Typed identifiers. A grant id can't be passed where a lease id is meant, and nothing
//! here makes randomness: ids are built from bytes that the caller drew.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Longest accepted name for tasks, in bytes.
pub const TASK_NAME_BYTES_MAX: usize = 128;
/// Longest accepted agent identity, in bytes (SPIFFE-ID section 2.3 allows 2048).
pub const AGENT_ID_BYTES_MAX: usize = 2048;
/// Longest catalogue name (resource, action, tier, constraint), in bytes.
pub const NAME_BYTES_MAX: usize = 128;

/// Why a text is not the identifier it was meant to be. Never echoes the text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The text is empty or longer than the kind allows.
    #[error("{kind} must have 1 to {max} bytes")]
    Length {
        /// What was being parsed.
        kind: &'static str,
        /// The limit in bytes.
        max: usize,
    },
    /// The text has a form that this kind of identifier doesn't have.
    #[error("{kind} is malformed: expected {expected}")]
    Form {
        /// What was being parsed.
        kind: &'static str,
        /// The form that would have been right.
        expected: &'static str,
    },
}

/// Crockford's alphabet in lower case: no `i`, `l`, `o`, `u`, so an id can be read aloud.
const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
const ENCODED_LEN: usize = 26;

fn encode(bytes: [u8; 16]) -> String {
    let mut n = u128::from_be_bytes(bytes);
    let mut out = [0u8; ENCODED_LEN];
    for slot in out.iter_mut().rev() {
        *slot = ALPHABET[(n & 31) as usize];
        n >>= 5;
    }
    out.iter().map(|b| char::from(*b)).collect()
}

fn decode(text: &str) -> Option<[u8; 16]> {
    if text.len() != ENCODED_LEN {
        return None;
    }
    let mut n: u128 = 0;
    for (i, b) in text.bytes().enumerate() {
        let digit = ALPHABET.iter().position(|a| *a == b)? as u128;
        // 26 × 5 = 130 bits: the first digit may only carry three of them.
        if i == 0 && digit > 7 {
            return None;
        }
        n = (n << 5) | digit;
    }
    Some(n.to_be_bytes())
}

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 16]);

        impl $name {
            /// Builds the id from 16 bytes that the caller drew.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }
            /// The raw bytes.
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), encode(self.0))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                text.strip_prefix($prefix).and_then(decode).map(Self).ok_or(IdError::Form {
                    kind: $kind,
                    expected: concat!($prefix, " and 26 characters"),
                })
            }
        }
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
                text.parse().map_err(de::Error::custom)
            }
        }
    };
}

random_id!(
    /// Names one grant: one request and all that becomes of it.
    GrantId, "gr_", "grant id"
);
random_id!(
    /// Names one lease: one credential minted under a grant.
    LeaseId, "le_", "lease id"
);

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $max:expr, $expected:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $name(std::sync::Arc<str>);

        impl $name {
            /// Checks and takes the text.
            pub fn new(text: &str) -> Result<Self, IdError> {
                if text.is_empty() || text.len() > $max {
                    return Err(IdError::Length { kind: $kind, max: $max });
                }
                let valid: fn(&str) -> bool = $valid;
                if !valid(text) {
                    return Err(IdError::Form { kind: $kind, expected: $expected });
                }
                Ok(Self(text.into()))
            }
            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }
        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::new(text)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
                Self::new(&text).map_err(de::Error::custom)
            }
        }
    };
}

/// Lower-case names of the operator's own making: they go into policies, URLs and sentences.
fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        && bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_./".contains(&b))
        && !text.contains("..")
        && !text.contains("//")
        && !text.ends_with(['/', '.'])
}

fn is_visible_ascii(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_graphic())
}

text_id!(
    /// A resource's name in the catalogue, for example `postgres/billing`.
    ResourceName, "resource name", NAME_BYTES_MAX,
    "lower-case letters, digits, `-`, `_`, `.`, `/`, starting with a letter or digit", is_name
);
text_id!(
    /// An action's name in the catalogue, for example `read`.
    ActionName, "action name", NAME_BYTES_MAX,
    "lower-case letters, digits, `-`, `_`, `.`, `/`, starting with a letter or digit", is_name
);
text_id!(
    /// A tier's name, for example `observe`.
    TierName, "tier name", NAME_BYTES_MAX,
    "lower-case letters, digits, `-`, `_`, `.`, `/`, starting with a letter or digit", is_name
);
text_id!(
    /// A constraint's name, for example `tables`.
    ConstraintName, "constraint name", NAME_BYTES_MAX,
    "lower-case letters, digits, `-`, `_`, `.`, `/`, starting with a letter or digit", is_name
);
text_id!(
    /// A person's key in the operator's people directory, for example `ana`.
    PersonId, "person id", NAME_BYTES_MAX,
    "lower-case letters, digits, `-`, `_`, `.`, `/`, starting with a letter or digit", is_name
);
text_id!(
    /// A task's name, chosen by the agent. It belongs to the identity that names it: see [`TaskKey`].
    TaskName, "task", TASK_NAME_BYTES_MAX,
    "visible ASCII characters without spaces", is_visible_ascii
);
text_id!(
    /// An agent's identity: its SPIFFE ID (`spiffe://domain/path`), or `issuer#subject` for OIDC.
    ///
    /// An OIDC issuer has no fragment (OpenID Connect Discovery 1.0, section 3), so the first `#`
    /// separates the two parts without doubt. Compared byte by byte: case, trailing dots and
    /// Unicode variants are other identities.
    AgentId, "agent identity", AGENT_ID_BYTES_MAX,
    "a SPIFFE ID or issuer#subject without control characters",
    |text| !text.chars().any(char::is_control)
        && (text.starts_with("spiffe://") || text.contains('#'))
);

impl AgentId {
    /// The identity of an OIDC subject.
    pub fn oidc(issuer: &str, subject: &str) -> Result<Self, IdError> {
        if issuer.contains('#') || issuer.is_empty() || subject.is_empty() {
            return Err(IdError::Form { kind: "agent identity", expected: "an issuer without `#` and a subject" });
        }
        Self::new(&format!("{issuer}#{subject}"))
    }

    /// True for a SPIFFE ID.
    pub fn is_spiffe(&self) -> bool {
        self.0.starts_with("spiffe://")
    }
}

/// A task, fully named: task names belong to the identity that uses them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskKey {
    /// The identity that names the task.
    pub agent: AgentId,
    /// The task's name.
    pub task: TaskName,
}

/// Milliseconds since 1970-01-01T00:00:00Z on the broker's own clock (see `time.rs`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// This moment plus `secs` seconds, saturating.
    #[must_use]
    pub const fn plus_secs(self, secs: u64) -> Self {
        Self(self.0.saturating_add(secs.saturating_mul(1000)))
    }
    /// This moment plus `ms` milliseconds, saturating.
    #[must_use]
    pub const fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }
    /// Milliseconds from `earlier` to this moment; zero if `earlier` is later.
    pub const fn ms_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
    /// Whole seconds since the epoch, rounded down.
    pub const fn secs(self) -> u64 {
        self.0 / 1000
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_and_are_canonical() {
        for bytes in [[0u8; 16], [0xff; 16], *b"0123456789abcdef"] {
            let id = GrantId::from_bytes(bytes);
            assert_eq!(id.to_string().parse::<GrantId>().unwrap(), id);
        }
        let id = GrantId::from_bytes([7; 16]).to_string();
        assert!(id.to_uppercase().parse::<GrantId>().is_err());
        assert!(id.replace("gr_", "le_").parse::<GrantId>().is_err());
        assert!(format!("{id}0").parse::<GrantId>().is_err());
        // The first digit carries three bits only: a second spelling of the same bytes is refused.
        assert!("gr_80000000000000000000000000".parse::<GrantId>().is_err());
    }

    #[test]
    fn names_refuse_what_could_be_read_as_something_else() {
        for bad in ["", "A", "a b", "a..b", "a//b", "a/", "é", "-a", "a\n", "a.", "../a"] {
            assert!(ResourceName::new(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "postgres/billing", "vault/db.creds_1", "0-x"] {
            assert!(ResourceName::new(good).is_ok(), "{good:?}");
        }
        assert!(AgentId::new("spiffe://corp/a\u{7}").is_err());
        assert!(AgentId::oidc("https://a#b", "c").is_err());
    }
}
