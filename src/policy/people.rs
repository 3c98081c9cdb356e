//! What a person may do: vote, see, revoke, freeze, read the record, operate.

use std::collections::BTreeSet;

use cedar_policy::Context;

use super::engine::{Engine, Verdict};
use super::facts::FactError;
use super::{Decision, On, PersonAction, PersonFacts, builtin};

impl Engine {
    /// Whether a person may do something. Guarantee 6 is held elsewhere, whatever this says.
    pub fn may(&self, person: &PersonFacts, action: PersonAction, on: On<'_>) -> Decision {
        let mut undecided = BTreeSet::new();
        let deny = |rule: &str, reason: String, undecided: BTreeSet<String>| Decision {
            allowed: false,
            rules: vec![rule.to_owned()],
            reason: Some(reason),
            undecided: undecided.into_iter().collect(),
        };
        let fits = match on {
            On::Grant(_) => action.is_on_grant(),
            On::Broker => action.is_on_broker(),
        };
        if !fits {
            return deny(builtin::NO_PERMIT, format!("{} isn't done to this", action.as_str()), undecided);
        }
        match self.ask_person(person, action, on, &mut undecided) {
            Ok(v) if v.errors.is_empty() => {
                let ids: Vec<String> = v.rules.iter().map(|i| self.rules[*i].id.clone()).collect();
                if v.allowed && !ids.is_empty() {
                    return Decision {
                        allowed: true,
                        rules: ids,
                        reason: None,
                        undecided: undecided.into_iter().collect(),
                    };
                }
                let Some(rule) = v.rules.first().map(|i| &self.rules[*i]) else {
                    let reason = format!("no rule lets you {} this", action.as_str().replace('_', " "));
                    return deny(builtin::NO_PERMIT, reason, undecided);
                };
                let reason = rule.reason.clone().unwrap_or_else(|| format!("rule {} forbids it", rule.id));
                deny(&rule.id, reason, undecided)
            }
            Ok(v) => {
                undecided.extend(v.errors);
                deny(builtin::EVALUATION_ERROR, "a rule could not be evaluated; ask the operator".to_owned(), undecided)
            }
            Err(e) => {
                undecided.insert(e);
                deny(
                    builtin::EVALUATION_ERROR,
                    "the facts could not be evaluated; ask the operator".to_owned(),
                    undecided,
                )
            }
        }
    }

    fn ask_person(
        &self,
        person: &PersonFacts,
        action: PersonAction,
        on: On<'_>,
        undecided: &mut BTreeSet<String>,
    ) -> Result<Verdict, FactError> {
        let (principal, person) = self.index.person(person)?;
        let (resource, entity) = match on {
            On::Grant(g) => self.index.grant(g, undecided)?,
            On::Broker => self.index.broker(),
        };
        let entities = self.entities([person, entity], [].into_iter())?;
        self.ask(&principal, action.as_str(), &resource, Context::empty(), &entities)
    }
}
