//! Claim paths and scalars: how rules and attributes reach into a token's verified claims.
//! Only texts, integers and booleans are ever taken; a list or an object is never flattened into one.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::error::{IdentityError, Refusal, refuse};
use crate::config::claim_path;

/// Most attributes of one identity.
pub const ATTRIBUTES_MAX: usize = 64;
/// Longest attribute value or compared claim, in bytes.
pub const ATTRIBUTE_BYTES_MAX: usize = 1024;

/// Where a claim is: `a.b.c`, or a JSON pointer (RFC 6901) where names hold dots: `/kubernetes.io/namespace`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimPath(Vec<String>);

impl ClaimPath {
    /// Reads a path as configured.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        claim_path::segments(text).map(Self).or_else(|what| refuse(Refusal::Configuration, what))
    }

    /// A path of names as they are.
    pub fn of(segments: &[&str]) -> Self {
        Self(segments.iter().map(|s| (*s).to_owned()).collect())
    }

    /// The claim, if it is there.
    pub fn find<'a>(&self, claims: &'a Map<String, Value>) -> Option<&'a Value> {
        let (first, rest) = self.0.split_first()?;
        rest.iter().try_fold(claims.get(first)?, |value, name| value.as_object()?.get(name))
    }

    /// The claim as a text: `None` if it is absent or null, refused if it is no scalar, too long, or holds
    /// control characters.
    pub fn scalar(&self, claims: &Map<String, Value>) -> Result<Option<String>, IdentityError> {
        let text = match self.find(claims) {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::String(text)) => text.clone(),
            Some(Value::Bool(b)) => b.to_string(),
            Some(Value::Number(n)) if n.is_i64() || n.is_u64() => n.to_string(),
            Some(_) => return self.bad("is neither a text, an integer nor a boolean"),
        };
        if text.len() > ATTRIBUTE_BYTES_MAX || text.chars().any(char::is_control) {
            return self.bad("is too long or holds control characters");
        }
        Ok(Some(text))
    }

    fn bad<T>(&self, what: &str) -> Result<T, IdentityError> {
        // The path is the operator's own or a preset's: naming it echoes nothing of the token.
        refuse(Refusal::Claim, format!("the claim `{}` {what}", self.0.join(".")))
    }
}

/// The operator's rules: claim → exact values of which one must match. All must hold.
#[derive(Debug, Clone, Default)]
pub struct Rules(Vec<(String, ClaimPath, Vec<String>)>);

impl Rules {
    /// Reads `require` as configured. A value with `*` is refused: nothing here is a pattern, and a rule that looks
    /// like one would be believed to be one (regression A13).
    pub fn parse(require: &BTreeMap<String, Vec<String>>) -> Result<Self, IdentityError> {
        let mut rules = Vec::new();
        for (claim, values) in require {
            let path = ClaimPath::parse(claim)?;
            if values.is_empty() || values.iter().any(|v| v.is_empty() || v.contains('*')) {
                return refuse(
                    Refusal::Configuration,
                    format!("require.{claim} must list exact values: none may be empty or hold `*`"),
                );
            }
            rules.push((claim.clone(), path, values.clone()));
        }
        Ok(Self(rules))
    }

    /// Holds each rule against verified claims, byte by byte (regression A15).
    pub fn check(&self, claims: &Map<String, Value>) -> Result<(), IdentityError> {
        for (name, path, values) in &self.0 {
            match path.scalar(claims)? {
                Some(found) if values.contains(&found) => {}
                Some(_) => return refuse(Refusal::Rule, format!("`{name}` has none of the required values")),
                None => return refuse(Refusal::Rule, format!("`{name}` is required and absent")),
            }
        }
        Ok(())
    }
}

/// Attribute name → where it comes from.
#[derive(Debug, Clone, Default)]
pub struct Mapping(Vec<(String, ClaimPath)>);

impl Mapping {
    /// The preset's attributes and the operator's own; the operator's win over a preset's of the same name.
    pub fn parse(preset: &[(&str, &[&str])], own: &BTreeMap<String, String>) -> Result<Self, IdentityError> {
        let mut all: BTreeMap<String, ClaimPath> =
            preset.iter().map(|(name, path)| ((*name).to_owned(), ClaimPath::of(path))).collect();
        for (name, path) in own {
            claim_path::check_attribute(name).or_else(|what| refuse(Refusal::Configuration, what))?;
            all.insert(name.clone(), ClaimPath::parse(path)?);
        }
        if all.len() > ATTRIBUTES_MAX {
            return refuse(Refusal::Configuration, format!("more than {ATTRIBUTES_MAX} attributes are mapped"));
        }
        Ok(Self(all.into_iter().collect()))
    }

    /// The attributes that are there. One that can't be taken refuses the token (guarantee 12).
    pub fn read(&self, claims: &Map<String, Value>) -> Result<BTreeMap<String, String>, IdentityError> {
        let mut attributes = BTreeMap::new();
        for (name, path) in &self.0 {
            if let Some(value) = path.scalar(claims)? {
                attributes.insert(name.clone(), value);
            }
        }
        Ok(attributes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims(text: &str) -> Map<String, Value> {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn a_path_reaches_what_it_names_and_nothing_else() {
        let c = claims(r#"{"a":{"b":1},"a.b":2,"kubernetes.io":{"namespace":"n"},"l":[{"b":1}],"f":1.5,"t":true}"#);
        let get = |path: &str| ClaimPath::parse(path).unwrap().scalar(&c);
        assert_eq!(get("a.b").unwrap().as_deref(), Some("1"));
        assert_eq!(get("/a.b").unwrap().as_deref(), Some("2"));
        assert_eq!(get("/kubernetes.io/namespace").unwrap().as_deref(), Some("n"));
        assert_eq!(get("t").unwrap().as_deref(), Some("true"));
        assert_eq!(get("kubernetes.io.namespace").unwrap(), None);
        for bad in ["a", "l", "f"] {
            assert_eq!(get(bad).unwrap_err().refusal(), Refusal::Claim, "{bad}");
        }
        for bad in ["", ".", "a..b", "/", "/a//b"] {
            assert!(ClaimPath::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn values_beyond_their_limits_are_refused_not_cut() {
        let path = ClaimPath::of(&["a"]);
        let with = |value: String| path.scalar(&Map::from_iter([("a".to_owned(), Value::String(value))]));
        assert!(with("x".repeat(ATTRIBUTE_BYTES_MAX)).is_ok());
        assert!(with("x".repeat(ATTRIBUTE_BYTES_MAX + 1)).is_err());
        assert!(with("a\u{1b}[31m".to_owned()).is_err());
    }

    #[test]
    fn a15_rules_compare_bytes() {
        let require = BTreeMap::from([("repository".to_owned(), vec!["corp/app".to_owned()])]);
        let rules = Rules::parse(&require).unwrap();
        assert!(rules.check(&claims(r#"{"repository":"corp/app"}"#)).is_ok());
        for other in ["Corp/app", "corp/app ", " corp/app", "corp/app.", "corp/\u{0430}pp", "corp/app\u{200b}", "corp"]
        {
            let c = Map::from_iter([("repository".to_owned(), Value::String(other.to_owned()))]);
            assert_eq!(rules.check(&c).unwrap_err().refusal(), Refusal::Rule, "{other:?}");
        }
        assert!(rules.check(&claims(r#"{"repository":["corp/app"]}"#)).is_err());
        assert!(rules.check(&claims("{}")).is_err());
    }

    #[test]
    fn a13_a_rule_that_looks_like_a_pattern_is_refused() {
        for bad in [vec!["corp/*".to_owned()], vec![], vec![String::new()]] {
            assert!(Rules::parse(&BTreeMap::from([("repository".to_owned(), bad)])).is_err());
        }
    }
}
