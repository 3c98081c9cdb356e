//! The operator's directories: which person an account is, and who answers for an agent.
//! Accounts match by issuer and immutable subject, byte by byte; e-mail is not looked at.

use std::collections::{BTreeMap, BTreeSet};

use super::VerifiedAccount;
use super::error::{IdentityError, Refusal, refuse};
use crate::config::{AgentConfig, PersonConfig, PersonIdentity};
use crate::core::id::{AgentId, PersonId};

/// Most persons.
pub const PERSONS_MAX: usize = 10_000;
/// Most entries of the agents directory.
pub const AGENTS_MAX: usize = 10_000;

/// A person of the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Person {
    /// The key used in votes, policies and the record.
    pub id: PersonId,
    /// As it is shown.
    pub name: String,
    /// Groups from the directory; what an IdP claims is in the account.
    pub groups: Vec<String>,
}

/// What the directory says of an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentFacts {
    /// Who answers for it.
    pub owner: PersonId,
    /// Its team.
    pub team: Option<String>,
    /// Its groups.
    pub groups: Vec<String>,
    /// How reviewers see it.
    pub name: String,
}

/// Both directories, checked.
#[derive(Debug, Clone, Default)]
pub struct Directory {
    persons: BTreeMap<PersonId, Person>,
    accounts: BTreeMap<PersonIdentity, PersonId>,
    agents: Vec<(Pattern, AgentConfig, Vec<Pattern>)>,
}

/// An exact identity, or one with `*` at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Pattern {
    Exact(String),
    Prefix(String),
}

impl Pattern {
    /// The part before `*` must name a whole trust domain or issuer, and for OIDC end at a separator: `…#repo:corp*`
    /// would match the organisation `corp-of-somebody-else` (regression A13).
    fn parse(text: &str) -> Result<Self, &'static str> {
        let Some(prefix) = text.strip_suffix('*') else {
            return match AgentId::new(text) {
                Ok(_) if !text.contains('*') => Ok(Self::Exact(text.to_owned())),
                _ => Err("must be `spiffe://…`, `issuer#subject`, or one of them ending in `*`"),
            };
        };
        if prefix.contains('*') {
            return Err("may have one `*`, at its end");
        }
        let whole_issuer = match prefix.strip_prefix("spiffe://") {
            Some(rest) => rest.find('/').is_some_and(|at| at > 0),
            None => prefix.find('#').is_some_and(|at| at > 0) && prefix.ends_with(['#', '/', ':', '@']),
        };
        if prefix.is_empty() || whole_issuer {
            return Ok(Self::Prefix(prefix.to_owned()));
        }
        Err("must name its whole trust domain (`spiffe://corp/…*`), or its issuer and a subject up to a `/` or `:`")
    }

    fn matches(&self, id: &str) -> bool {
        match self {
            Self::Exact(text) => text == id,
            Self::Prefix(prefix) => id.starts_with(prefix),
        }
    }

    fn is_everybody(&self) -> bool {
        matches!(self, Self::Prefix(prefix) if prefix.is_empty())
    }
}

impl Directory {
    /// Checks both; every problem is found in one pass.
    pub fn new(persons: &[PersonConfig], agents: &[AgentConfig]) -> Result<Self, Vec<IdentityError>> {
        let mut directory = Self::default();
        let mut problems = Vec::new();
        let mut problem = |what: String| problems.push(IdentityError::new(Refusal::Configuration, what));
        if persons.len() > PERSONS_MAX || agents.len() > AGENTS_MAX {
            problem(format!("more than {PERSONS_MAX} persons or {AGENTS_MAX} agents"));
        }
        for config in persons {
            let person = Person { id: config.id.clone(), name: config.name.clone(), groups: config.groups.clone() };
            if directory.persons.insert(config.id.clone(), person).is_some() {
                problem(format!("person {}: is there twice; give each person one entry", config.id));
            }
            for account in &config.identities {
                if account.issuer.is_empty() || account.subject.is_empty() {
                    problem(format!("person {}: an identity needs both issuer and subject", config.id));
                }
                let taken = directory.accounts.insert(account.clone(), config.id.clone());
                if let Some(other) = taken {
                    problem(format!(
                        "person {}: the account {} at {} belongs to {other} already; one account is one person",
                        config.id, account.subject, account.issuer
                    ));
                }
            }
        }
        let mut seen = BTreeSet::new();
        for config in agents {
            let place = format!("agent {}", config.pattern);
            if !directory.persons.contains_key(&config.owner) {
                problem(format!("{place}: its owner {} is not in the people directory", config.owner));
            }
            if !seen.insert(&config.pattern) {
                problem(format!("{place}: is there twice; the second entry would never match"));
            }
            let targets: Result<Vec<_>, _> = config.may_delegate_to.iter().map(|t| Pattern::parse(t)).collect();
            match (Pattern::parse(&config.pattern), targets) {
                (Ok(pattern), Ok(targets)) => directory.agents.push((pattern, config.clone(), targets)),
                (Err(why), _) => problem(format!("{place}: the pattern {why}")),
                (_, Err(why)) => problem(format!("{place}: a pattern of may_delegate_to {why}")),
            }
        }
        if problems.is_empty() { Ok(directory) } else { Err(problems) }
    }

    /// The person that an account is. An account that the agents directory names is an agent, never a person: agents
    /// can't vote (guarantee 6).
    pub fn person_of(&self, account: &VerifiedAccount) -> Result<&Person, IdentityError> {
        self.person_of_account(&account.issuer, &account.subject)
    }

    /// As [`Self::person_of`], by the account's two parts.
    pub fn person_of_account(&self, issuer: &str, subject: &str) -> Result<&Person, IdentityError> {
        let as_agent = format!("{issuer}#{subject}");
        if self.agents.iter().any(|(pattern, ..)| !pattern.is_everybody() && pattern.matches(&as_agent)) {
            return refuse(Refusal::Rule, "the account is an agent of the agents directory, and agents can't review");
        }
        let key = PersonIdentity { issuer: issuer.to_owned(), subject: subject.to_owned() };
        match self.accounts.get(&key).and_then(|id| self.persons.get(id)) {
            Some(person) => Ok(person),
            None => {
                refuse(Refusal::Rule, "the account is no person of the people directory; add its issuer and subject")
            }
        }
    }

    /// A person by id.
    pub fn person(&self, id: &PersonId) -> Option<&Person> {
        self.persons.get(id)
    }

    /// All persons.
    pub fn persons(&self) -> impl Iterator<Item = &Person> {
        self.persons.values()
    }

    /// Who answers for an agent; the first entry that matches. `None`: nobody, so no tier that needs a vote is reached.
    pub fn agent(&self, id: &AgentId) -> Option<AgentFacts> {
        let (_, config, _) = self.entry(id)?;
        Some(AgentFacts {
            owner: config.owner.clone(),
            team: config.team.clone(),
            groups: config.groups.clone(),
            name: config.name.clone().unwrap_or_else(|| short_name(id)),
        })
    }

    /// True if `from` may hand a part of its grants to `to`.
    pub fn may_delegate(&self, from: &AgentId, to: &AgentId) -> bool {
        self.entry(from).is_some_and(|(_, _, targets)| targets.iter().any(|t| t.matches(to.as_str())))
    }

    fn entry(&self, id: &AgentId) -> Option<&(Pattern, AgentConfig, Vec<Pattern>)> {
        self.agents.iter().find(|(pattern, ..)| pattern.matches(id.as_str()))
    }
}

/// What reviewers see of an agent that has no name: the last part of a SPIFFE ID's path, or an OIDC subject whole
/// (its last part alone, say `main`, would tell nothing).
pub fn short_name(id: &AgentId) -> String {
    let text = id.as_str();
    let short = if id.is_spiffe() { text.rsplit('/').next() } else { text.split_once('#').map(|(_, subject)| subject) };
    short.unwrap_or(text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn person(id: &str, accounts: &[(&str, &str)]) -> PersonConfig {
        PersonConfig {
            id: PersonId::new(id).unwrap(),
            name: id.to_owned(),
            groups: vec![],
            identities: accounts
                .iter()
                .map(|(issuer, subject)| PersonIdentity { issuer: (*issuer).into(), subject: (*subject).into() })
                .collect(),
        }
    }

    fn agent(pattern: &str, owner: &str, to: &[&str]) -> AgentConfig {
        AgentConfig {
            pattern: pattern.to_owned(),
            owner: PersonId::new(owner).unwrap(),
            team: None,
            groups: vec![],
            name: None,
            may_delegate_to: to.iter().map(|t| (*t).to_owned()).collect(),
        }
    }

    fn id(text: &str) -> AgentId {
        AgentId::new(text).unwrap()
    }

    #[test]
    fn d07_two_accounts_of_one_person_are_one_person_and_an_account_has_one() {
        let ana = person("ana", &[("https://idp", "1"), ("https://other", "a")]);
        let directory = Directory::new(std::slice::from_ref(&ana), &[]).unwrap();
        let one = directory.person_of_account("https://idp", "1").unwrap();
        assert_eq!(one.id, directory.person_of_account("https://other", "a").unwrap().id);
        for (issuer, subject) in [
            ("https://idp", "a"),
            ("https://idp/", "1"),
            ("https://IDP", "1"),
            ("https://idp", "1 "),
            ("https://idp", "\u{ff11}"),
            ("https://idp", ""),
        ] {
            assert!(directory.person_of_account(issuer, subject).is_err(), "a15 {issuer} {subject:?}");
        }
        let problems = Directory::new(&[ana, person("ben", &[("https://idp", "1")])], &[]).unwrap_err();
        assert!(problems[0].detail().contains("belongs to ana already"), "{problems:?}");
    }

    #[test]
    fn the_first_entry_that_matches_says_who_answers() {
        let persons = [person("ana", &[]), person("ben", &[])];
        let agents = [
            agent("spiffe://corp/agent/ops-7", "ben", &["spiffe://corp/agent/helper/*"]),
            agent("spiffe://corp/agent/*", "ana", &[]),
        ];
        let directory = Directory::new(&persons, &agents).unwrap();
        assert_eq!(directory.agent(&id("spiffe://corp/agent/ops-7")).unwrap().owner.as_str(), "ben");
        let other = directory.agent(&id("spiffe://corp/agent/ops-77")).unwrap();
        assert_eq!((other.owner.as_str(), other.name.as_str()), ("ana", "ops-77"));
        assert!(directory.agent(&id("spiffe://corp.evil/agent/ops-7")).is_none());
        assert!(directory.may_delegate(&id("spiffe://corp/agent/ops-7"), &id("spiffe://corp/agent/helper/a")));
        assert!(!directory.may_delegate(&id("spiffe://corp/agent/ops-8"), &id("spiffe://corp/agent/helper/a")));
        assert!(!directory.may_delegate(&id("spiffe://corp/agent/ops-7"), &id("spiffe://corp/agent/ops-7")));
    }

    #[test]
    fn a13_a_pattern_names_its_whole_issuer() {
        let ana = [person("ana", &[])];
        for bad in [
            "spiffe://*",
            "spiffe://corp*",
            "https://gh#repo:corp*",
            "https://gh*",
            "#*",
            "**",
            "spiffe://corp/*/a",
            "spiffe://corp/*a*",
            "corp",
            "",
        ] {
            assert!(Directory::new(&ana, &[agent(bad, "ana", &[])]).is_err(), "{bad}");
            assert!(Directory::new(&ana, &[agent("spiffe://corp/a", "ana", &[bad])]).is_err(), "{bad}");
        }
        for good in
            ["*", "spiffe://corp/*", "spiffe://corp/ops-*", "https://gh#repo:corp/*", "https://gh#*", "https://gh#a"]
        {
            assert!(Directory::new(&ana, &[agent(good, "ana", &[])]).is_ok(), "{good}");
        }
        assert!(Directory::new(&ana, &[agent("spiffe://corp/a", "nobody", &[])]).is_err());
        assert!(Directory::new(&ana, &[agent("*", "ana", &[]), agent("*", "ana", &[])]).is_err());
    }

    #[test]
    fn an_agent_is_never_a_person() {
        let persons = [person("bot", &[("https://idp", "bot-1")])];
        let directory = Directory::new(&persons, &[agent("https://idp#bot-1", "bot", &[])]).unwrap();
        assert_eq!(directory.person_of_account("https://idp", "bot-1").unwrap_err().refusal(), Refusal::Rule);
        let everybody = Directory::new(&persons, &[agent("*", "bot", &[])]).unwrap();
        assert!(everybody.person_of_account("https://idp", "bot-1").is_ok());
    }
}
