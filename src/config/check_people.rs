//! What must hold in the directories of people and agents: one account is one person, an owner is a
//! person, a pattern is about one trust domain or issuer, and every entry can be reached.

use std::collections::BTreeMap;

use super::directory::{PatternRealm, check_pattern, pattern_covers};
use super::load::Problem;
use super::reader::Item;
use super::{AgentConfig, IssuerConfig, PersonConfig, ReviewerLoginConfig, SpiffeConfig};

/// Most entries in a directory.
pub const DIRECTORY_MAX: usize = 10_000;
/// Most groups of one entry.
pub const GROUPS_MAX: usize = 64;
/// Longest group, team or name, in bytes.
pub const WORD_BYTES_MAX: usize = 128;

pub(super) fn persons(
    items: &[Item<'_, PersonConfig>],
    login: Option<&Item<'_, ReviewerLoginConfig>>,
    out: &mut Vec<Problem>,
) {
    limit(items, out);
    let mut accounts: BTreeMap<(&str, &str), &Item<'_, PersonConfig>> = BTreeMap::new();
    for item in items {
        let p = &item.value;
        word(item, &["name"], &p.name, out);
        words(item, &["groups"], &p.groups, out);
        for (i, account) in p.identities.iter().enumerate() {
            let at = i.to_string();
            let path = ["identities", at.as_str()];
            if let Err(what) = super::check::check_url(&account.issuer) {
                out.push(item.problem(&path, format!("person {}: `issuer` {what}", p.id)));
            }
            if account.subject.is_empty()
                || account.subject.len() > 255
                || account.subject.chars().any(char::is_control)
            {
                out.push(item.problem(&path, format!("person {}: `subject` has 1 to 255 visible characters", p.id)));
            }
            if let Some(login) = login
                && account.issuer != login.value.issuer
                && account.issuer.trim_end_matches('/') == login.value.issuer.trim_end_matches('/')
            {
                let what = format!(
                    "person {}: the issuer differs from reviewer_login's by a trailing `/`, so this account could never \
                     log in; issuers are compared exactly",
                    p.id
                );
                out.push(item.problem(&path, what));
            }
            // Guarantee 6: persons are counted, not accounts.
            if let Some(first) = accounts.insert((&account.issuer, &account.subject), item) {
                let what = format!(
                    "person {}: this account belongs to person {} already, at {}; one account is one person",
                    p.id,
                    first.value.id,
                    first.place(&[])
                );
                out.push(item.problem(&path, what));
            }
        }
    }
}

/// What agents' patterns may refer to.
pub(super) struct Known<'a> {
    pub(super) persons: &'a [Item<'a, PersonConfig>],
    /// Persons whose entries could not be read: they exist.
    pub(super) unread_persons: &'a [String],
    pub(super) spiffe: Option<&'a SpiffeConfig>,
    pub(super) issuers: &'a [Item<'a, IssuerConfig>],
    /// True if some section could not be read, so that "unknown" would say too much.
    pub(super) partial: bool,
}

pub(super) fn agents(items: &[Item<'_, AgentConfig>], known: &Known<'_>, out: &mut Vec<Problem>) {
    limit(items, out);
    for (i, item) in items.iter().enumerate() {
        let a = &item.value;
        if !known.persons.iter().any(|p| p.value.id == a.owner)
            && !known.unread_persons.iter().any(|p| p == a.owner.as_str())
        {
            let what = format!("`owner` must be a person: there is no [[person]] with id `{}`; add it", a.owner);
            out.push(item.problem(&["owner"], what));
        }
        words(item, &["groups"], &a.groups, out);
        for (key, text) in [("team", &a.team), ("name", &a.name)] {
            if let Some(text) = text {
                word(item, &[key], text, out);
            }
        }
        pattern(item, &["match"], &a.pattern, known, out);
        for (n, to) in a.may_delegate_to.iter().enumerate() {
            pattern(item, &["may_delegate_to", &n.to_string()], to, known, out);
        }
        if let Some(earlier) = items[..i]
            .iter()
            .find(|e| check_pattern(&e.value.pattern).is_ok() && pattern_covers(&e.value.pattern, &a.pattern))
        {
            let what = format!(
                "this entry is never reached: the one at {} matches all of it, and the first match wins; put the \
                 narrower pattern first",
                earlier.place(&[])
            );
            out.push(item.problem(&["match"], what));
        }
    }
}

fn pattern(item: &Item<'_, AgentConfig>, path: &[&str], text: &str, known: &Known<'_>, out: &mut Vec<Problem>) {
    let what = match check_pattern(text) {
        Err(what) => what,
        Ok(_) if known.partial => return,
        Ok(PatternRealm::TrustDomain(d)) => {
            if known.spiffe.is_some_and(|s| s.trust_domains.iter().any(|t| t == d)) {
                return;
            }
            format!("nobody can come from trust domain `{d}`; add it to `trust_domains` in [spiffe]")
        }
        Ok(PatternRealm::Issuer(iss)) => {
            if known.issuers.iter().any(|i| i.value.issuer == iss) {
                return;
            }
            format!(
                "nobody can come from issuer `{}`; add an [[issuer]] with exactly this `issuer`",
                super::reader::clip(iss)
            )
        }
    };
    out.push(item.problem(path, what));
}

fn limit<T>(items: &[Item<'_, T>], out: &mut Vec<Problem>) {
    if let Some(item) = items.get(DIRECTORY_MAX) {
        out.push(item.problem(&[], format!("more than {DIRECTORY_MAX} entries")));
    }
}

fn words<T>(item: &Item<'_, T>, path: &[&str], texts: &[String], out: &mut Vec<Problem>) {
    if texts.len() > GROUPS_MAX {
        out.push(item.problem(path, format!("more than {GROUPS_MAX} groups")));
    }
    for text in texts {
        word(item, path, text, out);
    }
}

fn word<T>(item: &Item<'_, T>, path: &[&str], text: &str, out: &mut Vec<Problem>) {
    if text.trim().is_empty() || text.len() > WORD_BYTES_MAX || text.chars().any(char::is_control) {
        let what = format!("needs 1 to {WORD_BYTES_MAX} bytes and no control characters");
        out.push(item.problem(path, what));
    }
}
