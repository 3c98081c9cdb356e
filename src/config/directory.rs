//! The agents directory: which entry an identity matches, and which patterns are sound.
//! Comparison is byte by byte: case, trailing dots and Unicode variants are other identities (regression A15).

use crate::core::id::{AGENT_ID_BYTES_MAX, AgentId};

use super::AgentConfig;

impl AgentConfig {
    /// True if this entry is about that identity.
    pub fn matches(&self, id: &AgentId) -> bool {
        pattern_matches(&self.pattern, id)
    }
}

/// The entry for an identity: the first that matches.
pub fn agent_entry<'a>(agents: &'a [AgentConfig], id: &AgentId) -> Option<&'a AgentConfig> {
    agents.iter().find(|a| a.matches(id))
}

/// True if the pattern (exact, or ending in `*`) covers the identity.
pub fn pattern_matches(pattern: &str, id: &AgentId) -> bool {
    match pattern.strip_suffix('*') {
        // The star stands for at least one character: `…/ns/*` isn't `…/ns/` itself.
        Some(prefix) => id.as_str().len() > prefix.len() && id.as_str().starts_with(prefix),
        None => id.as_str() == pattern,
    }
}

/// True if all that `later` matches is matched by `earlier`.
pub(super) fn pattern_covers(earlier: &str, later: &str) -> bool {
    match (earlier.strip_suffix('*'), later.strip_suffix('*')) {
        (Some(e), Some(l)) => l.starts_with(e),
        (Some(e), None) => later.len() > e.len() && later.starts_with(e),
        (None, _) => earlier == later,
    }
}

/// What a pattern is about: the trust domain or the issuer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PatternRealm<'a> {
    /// `spiffe://DOMAIN/…`
    TrustDomain(&'a str),
    /// `ISSUER#…`
    Issuer(&'a str),
}

/// Checks a pattern: the star only at the end, never across a trust domain or an issuer, and only after a
/// separator, since `repo:acme*` would match `repo:acme-evil` too (regression A13).
pub(super) fn check_pattern(pattern: &str) -> Result<PatternRealm<'_>, String> {
    if pattern.is_empty() || pattern.len() > AGENT_ID_BYTES_MAX || pattern.chars().any(char::is_control) {
        return Err(format!("a pattern has 1 to {AGENT_ID_BYTES_MAX} bytes and no control characters"));
    }
    let prefix = pattern.strip_suffix('*').unwrap_or(pattern);
    let starred = prefix.len() < pattern.len();
    if prefix.contains('*') {
        return Err("`*` may only stand at the end of a pattern; write one entry for each prefix".to_owned());
    }
    let realm = if let Some(rest) = prefix.strip_prefix("spiffe://") {
        let Some((domain, _)) = rest.split_once('/') else {
            return Err(if starred {
                "this pattern crosses trust domains (`spiffe://corp*` matches `spiffe://corp.evil` too); \
                 name the whole domain: `spiffe://DOMAIN/*`"
                    .to_owned()
            } else {
                "an agent's SPIFFE ID has a path: `spiffe://DOMAIN/PATH`".to_owned()
            });
        };
        if !is_trust_domain(domain) {
            return Err("the trust domain must be lower-case letters, digits, `.`, `-`, `_`".to_owned());
        }
        PatternRealm::TrustDomain(domain)
    } else if let Some((issuer, subject)) = prefix.split_once('#') {
        if subject.is_empty() && !starred {
            return Err("the subject after `#` is missing".to_owned());
        }
        PatternRealm::Issuer(issuer)
    } else if starred {
        return Err(
            "this pattern crosses issuers; it must contain `ISSUER#` or `spiffe://DOMAIN/` before the `*`".to_owned()
        );
    } else {
        return Err("an identity is `spiffe://DOMAIN/PATH` or `ISSUER#SUBJECT`".to_owned());
    };
    if starred && !prefix.ends_with(['/', ':', '#']) {
        return Err("`*` must stand after `/`, `:` or `#`: a prefix that ends inside a name also matches names of \
                    others that begin the same"
            .to_owned());
    }
    Ok(realm)
}

/// SPIFFE-ID section 2.1, with its limit of 255 bytes.
pub(super) fn is_trust_domain(text: &str) -> bool {
    (1..=255).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> AgentId {
        AgentId::new(text).unwrap()
    }

    #[test]
    fn a_pattern_matches_what_it_says_and_no_variant() {
        assert!(pattern_matches("spiffe://corp/a/*", &id("spiffe://corp/a/b/c")));
        for other in
            ["spiffe://corp/a/", "spiffe://corp/a", "spiffe://Corp/a/b", "spiffe://corp./a/b", "x#spiffe://corp/a/b"]
        {
            assert!(!pattern_matches("spiffe://corp/a/*", &id(other)), "{other}");
        }
        assert!(pattern_matches("spiffe://corp/a", &id("spiffe://corp/a")));
        assert!(!pattern_matches("spiffe://corp/a", &id("spiffe://corp/ab")));
    }

    #[test]
    fn patterns_that_reach_too_far_are_refused() {
        for bad in [
            "",
            "*",
            "spiffe://*",
            "spiffe://corp*",
            "spiffe://corp",
            "spiffe://Corp/*",
            "spiffe://corp/a*",
            "spiffe://corp/*/x",
            "https://idp*",
            "https://idp",
            "https://idp#",
            "https://token.example#repo:acme*",
            "https://idp#a\nb",
        ] {
            assert!(check_pattern(bad).is_err(), "{bad:?}");
        }
        assert_eq!(check_pattern("spiffe://corp/*"), Ok(PatternRealm::TrustDomain("corp")));
        assert_eq!(check_pattern("https://idp#repo:acme/app:*"), Ok(PatternRealm::Issuer("https://idp")));
        assert_eq!(check_pattern("https://idp#*"), Ok(PatternRealm::Issuer("https://idp")));
    }

    #[test]
    fn covering_is_what_makes_a_later_entry_unreachable() {
        assert!(pattern_covers("spiffe://a/*", "spiffe://a/b/*"));
        assert!(pattern_covers("spiffe://a/*", "spiffe://a/b"));
        assert!(pattern_covers("spiffe://a/b", "spiffe://a/b"));
        assert!(!pattern_covers("spiffe://a/b/*", "spiffe://a/*"));
        assert!(!pattern_covers("spiffe://a/b", "spiffe://a/*"));
    }
}
