//! Canonical JSON (RFC 8785, integers only) and the digest over it. What is approved is named by
//! these bytes and nothing else (guarantee 3).

use aws_lc_rs::digest::{SHA256, digest};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::Value;
use std::fmt;
use std::str::FromStr;

/// Largest integer that every JSON reader keeps exactly: 2⁵³−1.
pub const INTEGER_MAX: u64 = (1 << 53) - 1;
/// Deepest nesting that is canonicalised.
pub const DEPTH_MAX: usize = 32;

/// Why a value has no canonical form here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CanonicalError {
    /// A fraction, or beyond ±(2⁵³−1).
    #[error("a number is not an integer between -(2^53-1) and 2^53-1")]
    Number,
    /// Nested deeper than [`DEPTH_MAX`].
    #[error("nested deeper than {DEPTH_MAX}")]
    Depth,
    /// Not JSON at all (a map with keys that are no texts).
    #[error("not representable as JSON")]
    NotJson,
}

/// The canonical bytes of a value.
pub fn canonical(value: &Value) -> Result<Vec<u8>, CanonicalError> {
    let mut out = Vec::with_capacity(512);
    write(value, &mut out, 0)?;
    Ok(out)
}

fn write(value: &Value, out: &mut Vec<u8>, depth: usize) -> Result<(), CanonicalError> {
    if depth > DEPTH_MAX {
        return Err(CanonicalError::Depth);
    }
    match value {
        Value::Null => out.extend_from_slice(b"null"),
        Value::Bool(true) => out.extend_from_slice(b"true"),
        Value::Bool(false) => out.extend_from_slice(b"false"),
        Value::Number(n) => {
            let size = n.as_u64().or_else(|| n.as_i64().map(i64::unsigned_abs));
            if size.is_none_or(|size| size > INTEGER_MAX) {
                return Err(CanonicalError::Number);
            }
            out.extend_from_slice(n.to_string().as_bytes());
        }
        Value::String(s) => write_text(s, out),
        Value::Array(items) => {
            out.push(b'[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                write(item, out, depth + 1)?;
            }
            out.push(b']');
        }
        Value::Object(map) => {
            let mut keys: Vec<&String> = map.keys().collect();
            // RFC 8785 section 3.2.3: by UTF-16 code units, which differs from UTF-8 order for astral characters.
            keys.sort_by(|a, b| a.encode_utf16().cmp(b.encode_utf16()));
            out.push(b'{');
            for (i, key) in keys.into_iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                write_text(key, out);
                out.push(b':');
                write(&map[key], out, depth + 1)?;
            }
            out.push(b'}');
        }
    }
    Ok(())
}

/// RFC 8785 section 3.2.2.2: the short escapes, `\u00xx` in lower case for other controls, else as is.
fn write_text(text: &str, out: &mut Vec<u8>) {
    out.push(b'"');
    for c in text.chars() {
        match c {
            '"' => out.extend_from_slice(b"\\\""),
            '\\' => out.extend_from_slice(b"\\\\"),
            '\u{8}' => out.extend_from_slice(b"\\b"),
            '\t' => out.extend_from_slice(b"\\t"),
            '\n' => out.extend_from_slice(b"\\n"),
            '\u{c}' => out.extend_from_slice(b"\\f"),
            '\r' => out.extend_from_slice(b"\\r"),
            c if c < ' ' => out.extend_from_slice(format!("\\u{:04x}", c as u32).as_bytes()),
            c => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    out.push(b'"');
}

/// A SHA-256 digest. Written as 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Of bytes.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        let mut out = [0; 32];
        out.copy_from_slice(digest(&SHA256, bytes).as_ref());
        Self(out)
    }
    /// Of the canonical JSON of a value.
    pub fn of<T: Serialize>(value: &T) -> Result<Self, CanonicalError> {
        let value = serde_json::to_value(value).map_err(|_| CanonicalError::NotJson)?;
        Ok(Self::of_bytes(&canonical(&value)?))
    }
    /// The raw bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}
impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl FromStr for Digest {
    type Err = super::id::IdError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let err = super::id::IdError::Form { kind: "digest", expected: "64 lower-case hex digits" };
        if text.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(err);
        }
        let mut out = [0; 32];
        hex::decode_to_slice(text, &mut out).map_err(|_| err)?;
        Ok(Self(out))
    }
}
impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}
impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn canonical_form_is_rfc_8785() {
        let value = json!({"\u{20ac}": "Euro", "\r": "CR", "1": "One", "\u{1f600}": "smile", "\u{80}": "c", "\u{fb33}": "Hebrew"});
        // The order of RFC 8785 section 3.2.3.
        let expected = "{\"\\r\":\"CR\",\"1\":\"One\",\"\u{80}\":\"c\",\"\u{20ac}\":\"Euro\",\"\u{1f600}\":\"smile\",\"\u{fb33}\":\"Hebrew\"}";
        assert_eq!(String::from_utf8(canonical(&value).unwrap()).unwrap(), expected);
        assert_eq!(canonical(&json!("\u{1}\"\\/\u{7f}")).unwrap(), "\"\\u0001\\\"\\\\/\u{7f}\"".as_bytes());
    }

    #[test]
    fn numbers_that_readers_disagree_on_are_refused() {
        for bad in [json!(1.5), json!(i64::MIN), json!(INTEGER_MAX + 1), json!(1e300)] {
            assert_eq!(canonical(&bad), Err(CanonicalError::Number), "{bad}");
        }
        assert_eq!(canonical(&json!([INTEGER_MAX, -3])).unwrap(), b"[9007199254740991,-3]");
        let deep = (0..=DEPTH_MAX).fold(json!(1), |v, _| json!([v]));
        assert_eq!(canonical(&deep), Err(CanonicalError::Depth));
    }
}
