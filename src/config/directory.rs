//! The directories: which entry of the agents an identity matches, which patterns are sound, and whose an account is.
//! Comparison is byte by byte: case, trailing dots and Unicode variants are other identities (regression A15).

use crate::core::id::{AGENT_ID_BYTES_MAX, AgentId};

use super::{AgentConfig, Config, PersonConfig};

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

/// Whose an account isn't.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotAPerson {
    /// The people directory has no such account.
    Unknown,
    /// The agents directory names it: agents can't review (guarantee 6).
    Agent,
}

impl Config {
    /// Everybody to whom the people directory gives this account.
    pub fn persons_with<'a, 'b>(
        &'a self,
        issuer: &'b str,
        subject: &'b str,
    ) -> impl Iterator<Item = &'a PersonConfig> + use<'a, 'b> {
        let is = move |p: &&'a PersonConfig| p.identities.iter().any(|i| i.issuer == issuer && i.subject == subject);
        self.person.iter().filter(is)
    }

    /// The person who reviews with an account. One that the agents directory names is an agent, whoever owns it.
    pub fn reviewer_of(&self, issuer: &str, subject: &str) -> Result<&PersonConfig, NotAPerson> {
        if AgentId::oidc(issuer, subject).is_ok_and(|id| agent_entry(&self.agent, &id).is_some()) {
            return Err(NotAPerson::Agent);
        }
        self.persons_with(issuer, subject).next().ok_or(NotAPerson::Unknown)
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

    fn directories() -> Config {
        toml::from_str(
            r#"
            tier = []
            broker = { issuer = "https://b", reviewer_url = "https://r", data_dir = "d", catalogue = "c", policies = "p" }
            listen = { agent = "127.0.0.1:1", reviewer = "127.0.0.1:2" }
            [[person]]
            id = "ana"
            name = "Ana"
            identities = [
                { issuer = "https://idp", subject = "1" },
                { issuer = "https://other", subject = "a" },
                { issuer = "https://idp", subject = "bot-1" },
            ]
            [[agent]]
            match = "https://idp#bot-1"
            owner = "ana"
            "#,
        )
        .unwrap()
    }

    #[test]
    fn d07_two_accounts_of_one_person_are_one_person_byte_by_byte() {
        let config = directories();
        let who = |issuer: &str, subject: &str| config.reviewer_of(issuer, subject).map(|p| p.id.as_str());
        assert_eq!((who("https://idp", "1"), who("https://other", "a")), (Ok("ana"), Ok("ana")));
        for (issuer, subject) in [
            ("https://idp", "a"),
            ("https://idp/", "1"),
            ("https://IDP", "1"),
            ("https://idp", "1 "),
            ("https://idp", "\u{ff11}"),
            ("https://idp", ""),
        ] {
            assert_eq!(who(issuer, subject), Err(NotAPerson::Unknown), "a15 {issuer} {subject:?}");
        }
    }

    #[test]
    fn an_agent_never_reviews_though_the_account_is_a_persons() {
        let config = directories();
        assert_eq!(config.reviewer_of("https://idp", "bot-1").unwrap_err(), NotAPerson::Agent);
        let whose: Vec<&str> = config.persons_with("https://idp", "bot-1").map(|p| p.id.as_str()).collect();
        assert_eq!(whose, ["ana"], "and it is still known whose it is: she can't vote on what it asks for");
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
