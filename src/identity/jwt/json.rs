//! JSON read strictly: one object, no member twice, no deeper than the limit, nothing after it.
//! What `serde_json` would let pass (the last of two `aud` wins) is how verifiers come to disagree.

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Deepest nesting that is accepted: the object itself is one level.
pub const JSON_DEPTH_MAX: usize = 8;

/// Reads one object. `None` for whatever else it is; the reason is not worth an echo (R2).
pub fn strict_object(bytes: &[u8], depth_max: usize) -> Option<Map<String, Value>> {
    let mut de = serde_json::Deserializer::from_slice(bytes);
    let value = Strict { depth_left: depth_max }.deserialize(&mut de).ok()?;
    de.end().ok()?;
    match value {
        Value::Object(map) => Some(map),
        _ => None,
    }
}

#[derive(Clone, Copy)]
struct Strict {
    depth_left: usize,
}

impl Strict {
    fn deeper<E: Error>(self) -> Result<Self, E> {
        self.depth_left.checked_sub(1).map(|depth_left| Self { depth_left }).ok_or_else(|| E::custom("too deep"))
    }
}

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Value, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JSON")
    }
    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }
    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(Value::Number(v.into()))
    }
    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(Value::Number(v.into()))
    }
    fn visit_f64<E: Error>(self, v: f64) -> Result<Value, E> {
        Number::from_f64(v).map(Value::Number).ok_or_else(|| E::custom("not a number"))
    }
    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::String(v.to_owned()))
    }
    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(Value::String(v))
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(inner)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut map = Map::new();
        while let Some(name) = members.next_key::<String>()? {
            let value = members.next_value_seed(inner)?;
            if map.insert(name, value).is_some() {
                return Err(A::Error::custom("a member twice"));
            }
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_twice_depth_and_trailing_bytes_are_refused() {
        let read = |text: &str| strict_object(text.as_bytes(), 3);
        assert!(read(r#"{"a":1,"b":{"c":[1]}}"#).is_some());
        for bad in [
            r#"{"aud":"us","aud":"them"}"#,
            r#"{"a":{"b":1,"b":1}}"#,
            r#"{"a":1,"\u0061":2}"#,
            r#"{"a":[[[1]]]}"#,
            r#"{"a":1} {"a":1}"#,
            r#"{"a":1}x"#,
            r#"{"a":NaN}"#,
            r#"{"a":1e999}"#,
            "[1]",
            "1",
            "",
            "{",
        ] {
            assert!(read(bad).is_none(), "{bad}");
        }
        assert!(strict_object(b"{\"a\":\"\xff\"}", 3).is_none());
    }

    #[test]
    fn integers_stay_integers_and_nothing_else_becomes_one() {
        let read = |text: &str| strict_object(text.as_bytes(), 3).unwrap()["a"].clone();
        assert_eq!(read(r#"{"a":10}"#).as_u64(), Some(10));
        for other in [r#"{"a":10.0}"#, r#"{"a":1e1}"#, r#"{"a":"10"}"#, r#"{"a":18446744073709551616}"#, r#"{"a":-1}"#]
        {
            assert_eq!(read(other).as_u64(), None, "{other}");
        }
    }
}
