//! `policy check`: what the policies say, for people, and what is probably not meant.

use std::collections::BTreeSet;
use std::fmt;

use cedar_policy::Entities;
use serde::Serialize;

use crate::core::tier::Tier;

use super::engine::Engine;
use super::reach::{Reach, fact_literals};
use super::{PersonAction, builtin};

/// Most names in one warning.
const NAMES_TOLD_MAX: usize = 8;

/// What the policies say.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// See [`Engine::version`].
    pub version: String,
    /// The tiers, mildest first.
    pub tiers: Vec<Tier>,
    /// The rules, in the order of loading.
    pub rules: Vec<SummaryRule>,
    /// What works but is probably not meant.
    pub warnings: Vec<String>,
}

/// One rule, in short.
#[derive(Debug, Clone, Serialize)]
pub struct SummaryRule {
    /// Its `@id`.
    pub id: String,
    /// `file:line:column`.
    pub place: String,
    /// `permit` or `forbid`.
    pub effect: &'static str,
    /// The actions in its scope.
    pub actions: Vec<&'static str>,
    /// Its tier, on permits for agents.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tier: Option<String>,
    /// Its `@reason`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl Engine {
    /// Looks at the rules as a whole.
    pub fn check(&self) -> Summary {
        let rules = self.rules.iter().map(|r| SummaryRule {
            id: r.id.clone(),
            place: r.place.clone(),
            effect: if r.permits { "permit" } else { "forbid" },
            actions: r.actions.iter().copied().collect(),
            tier: r.tier.map(|t| self.tiers[t].name.to_string()),
            reason: r.reason.clone(),
        });
        let mut warnings: Vec<String> = self.warnings.iter().map(|w| format!("{}: {}", w.place, w.what)).collect();
        let all = Entities::from_entities(self.index.entries().map(|e| e.entity.clone()), None);
        match all {
            Ok(entities) => {
                self.exempt_and_open(&entities, &mut warnings);
                self.unreachable(&entities, &mut warnings);
            }
            Err(e) => warnings.push(format!("what rules could reach wasn't looked at: {e}")),
        }
        self.dead_facts(&mut warnings);
        self.nobody(&mut warnings);
        Summary { version: self.version().to_owned(), tiers: self.tiers.clone(), rules: rules.collect(), warnings }
    }

    /// Automatic permits that could reach what isn't isolated: such a request is raised, which the rule's
    /// author probably didn't mean.
    fn exempt_and_open(&self, entities: &Entities, warnings: &mut Vec<String>) {
        for rule in &self.rules {
            let Some(tier) = rule.tier.map(|t| &self.tiers[t]).filter(|t| t.approvals == 0) else { continue };
            let reach = Reach::new(self, entities, rule);
            let open: BTreeSet<String> = self
                .index
                .entries()
                .filter(|e| !e.resource.isolated)
                .filter(|e| e.resource.action.iter().any(|a| rule.actions.contains(a.effect.as_str())))
                .filter(|e| reach.may_match(e))
                .map(|e| e.resource.name.to_string())
                .collect();
            if !open.is_empty() {
                warnings.push(format!(
                    "{}: rule {} is automatic (tier {}) and could reach what isn't isolated: {}; there a vote is asked for \
                     all the same ({}). Add `resource.isolated` to its condition to say so",
                    rule.place,
                    rule.id,
                    tier.name,
                    some_of(&open),
                    builtin::NOT_ISOLATED
                ));
            }
        }
    }

    /// What is in the catalogue and can't be had by anybody.
    fn unreachable(&self, entities: &Entities, warnings: &mut Vec<String>) {
        let permits: Vec<_> =
            self.rules.iter().filter(|r| r.tier.is_some()).map(|r| (r, Reach::new(self, entities, r))).collect();
        let mut lost = BTreeSet::new();
        for entry in self.index.entries() {
            let reaching: BTreeSet<&str> = permits
                .iter()
                .filter(|(_, reach)| reach.may_match(entry))
                .flat_map(|(rule, _)| rule.actions.iter().copied())
                .collect();
            let missing = entry.resource.action.iter().filter(|a| !reaching.contains(a.effect.as_str()));
            lost.extend(missing.map(|a| format!("{} on {}", a.name, entry.resource.name)));
        }
        if !lost.is_empty() {
            warnings.push(format!(
                "no permit can ever match: {}; add a rule or remove it from the catalogue",
                some_of(&lost)
            ));
        }
    }

    /// Facts in conditions that no resource of the catalogue has: a combination rule with a slip of the pen
    /// would never fire.
    fn dead_facts(&self, warnings: &mut Vec<String>) {
        for rule in &self.rules {
            let dead: BTreeSet<String> =
                fact_literals(rule).into_iter().filter(|t| !self.index.everything.contains(t)).collect();
            if !dead.is_empty() {
                warnings.push(format!(
                    "{}: rule {} looks for {}, which nothing in the catalogue can be; correct the label",
                    rule.place,
                    rule.id,
                    some_of(&dead)
                ));
            }
        }
    }

    /// Votes and other acts that no rule allows to anybody; tiers that no rule uses.
    fn nobody(&self, warnings: &mut Vec<String>) {
        for action in PersonAction::ALL {
            if !self.rules.iter().any(|r| r.permits && r.actions.contains(action.as_str())) {
                warnings.push(format!("no rule permits anybody to {}", action.as_str()));
            }
        }
        for (i, tier) in self.tiers.iter().enumerate() {
            if !self.rules.iter().any(|r| r.tier == Some(i)) {
                warnings.push(format!("tier {} is used by no rule", tier.name));
            }
        }
    }
}

fn some_of(names: &BTreeSet<String>) -> String {
    let told: Vec<&str> = names.iter().take(NAMES_TOLD_MAX).map(String::as_str).collect();
    match names.len().saturating_sub(told.len()) {
        0 => told.join(", "),
        more => format!("{} and {more} more", told.join(", ")),
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "policies {}", &self.version[..self.version.len().min(12)])?;
        writeln!(f, "\ntiers, mildest first")?;
        for t in &self.tiers {
            let votes = match t.approvals {
                0 => "automatic".to_owned(),
                1 => "1 approval".to_owned(),
                n => format!("{n} approvals"),
            };
            writeln!(f, "  {:<12} {votes}, at most {} s", t.name.as_str(), t.life_secs_max)?;
        }
        writeln!(f, "\nrules")?;
        for r in &self.rules {
            let tier = r.tier.as_deref().unwrap_or("");
            writeln!(f, "  {:<6} {:<28} {:<10} {}  ({})", r.effect, r.id, tier, r.actions.join(", "), r.place)?;
        }
        if self.warnings.is_empty() {
            return writeln!(f, "\nno warnings");
        }
        writeln!(f, "\nwarnings")?;
        self.warnings.iter().try_for_each(|w| writeln!(f, "  - {w}"))
    }
}
