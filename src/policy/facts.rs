//! What policies see, as Cedar values: entities of the catalogue (made once), of the agent, of a grant, and
//! the context. Facts have the form `label/effect`, `env:NAME/effect`, `sensitivity:NAME/effect`.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use cedar_policy::{Context, Entity, EntityId, EntityTypeName, EntityUid, RestrictedExpression};

use crate::config::{Catalogue, Effect, Resource};
use crate::core::id::{ActionName, ConstraintName, ResourceName};
use crate::core::permission::{Constraint, Permission};

use super::{AgentFacts, AssessInput, GrantFacts, PersonFacts};

/// A text that says why facts could not be made into Cedar values. Closed: it denies.
pub(super) type FactError = String;

/// The catalogue, prepared.
#[derive(Debug)]
pub(super) struct Index {
    entries: HashMap<ResourceName, Entry>,
    /// Every fact that the catalogue can produce: what a permission that it no longer knows counts as.
    pub(super) everything: BTreeSet<String>,
    types: Types,
}

#[derive(Debug)]
struct Types {
    agent: EntityTypeName,
    person: EntityTypeName,
    resource: EntityTypeName,
    grant: EntityTypeName,
    broker: EntityTypeName,
    tier: EntityTypeName,
    action: EntityTypeName,
}

/// One resource, prepared.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) resource: Resource,
    pub(super) kind: String,
    pub(super) entity: Entity,
    pub(super) uid: EntityUid,
}

impl Entry {
    /// What an effect on this resource is, as facts.
    fn facts(&self, effect: Effect) -> impl Iterator<Item = String> + '_ {
        let r = &self.resource;
        let own = [
            format!("env:{}/{}", r.environment, effect.as_str()),
            format!("sensitivity:{}/{}", r.sensitivity, effect.as_str()),
        ];
        r.labels.iter().map(move |l| format!("{l}/{}", effect.as_str())).chain(own)
    }

    /// The effect of an action and whether it can be rolled back.
    pub(super) fn effect(&self, action: &ActionName) -> Option<(Effect, bool)> {
        self.resource.action(action).map(|a| (a.effect, a.reversible))
    }
}

fn string(text: &str) -> RestrictedExpression {
    RestrictedExpression::new_string(text.to_owned())
}

fn strings<'s>(texts: impl IntoIterator<Item = &'s str>) -> RestrictedExpression {
    RestrictedExpression::new_set(texts.into_iter().map(string))
}

fn long(n: u64) -> RestrictedExpression {
    RestrictedExpression::new_long(i64::try_from(n).unwrap_or(i64::MAX))
}

fn record(fields: Vec<(&str, RestrictedExpression)>) -> Result<RestrictedExpression, FactError> {
    let fields = fields.into_iter().map(|(k, v)| (k.to_owned(), v));
    RestrictedExpression::new_record(fields).map_err(|e| e.to_string())
}

impl Index {
    pub(super) fn new(catalogue: &Catalogue) -> Result<Self, FactError> {
        let name = |n: &str| n.parse::<EntityTypeName>().map_err(|e| e.to_string());
        let types = Types {
            agent: name("Agent")?,
            person: name("Person")?,
            resource: name("Resource")?,
            grant: name("Grant")?,
            broker: name("Broker")?,
            tier: name("Tier")?,
            action: name("Action")?,
        };
        let mut index = Self { entries: HashMap::new(), everything: BTreeSet::new(), types };
        for r in &catalogue.resource {
            let target = catalogue.target(&r.target).ok_or_else(|| format!("{}: its target is missing", r.name))?;
            // Undeclared counts as reaching production; the catalogue's check refuses it anyway.
            let reaches = catalogue.environment(&r.environment).is_none_or(|e| e.reaches_production);
            let uid = uid(&index.types.resource, r.name.as_str());
            let attrs = HashMap::from([
                ("name".to_owned(), string(r.name.as_str())),
                ("target".to_owned(), string(r.target.as_str())),
                ("kind".to_owned(), string(&target.kind)),
                ("environment".to_owned(), string(&r.environment)),
                ("reaches_production".to_owned(), RestrictedExpression::new_bool(reaches)),
                ("isolated".to_owned(), RestrictedExpression::new_bool(r.isolated && !reaches)),
                ("sensitivity".to_owned(), string(&r.sensitivity)),
                ("labels".to_owned(), strings(r.labels.iter().map(String::as_str))),
            ]);
            let entity =
                Entity::new(uid.clone(), attrs, std::collections::HashSet::new()).map_err(|e| e.to_string())?;
            let mut resource = r.clone();
            resource.isolated = r.isolated && !reaches;
            let entry = Entry { resource, kind: target.kind.clone(), entity, uid };
            for effect in Effect::ALL {
                index.everything.extend(entry.facts(effect));
            }
            index.entries.insert(r.name.clone(), entry);
        }
        Ok(index)
    }

    pub(super) fn entry(&self, name: &ResourceName) -> Option<&Entry> {
        self.entries.get(name)
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }

    pub(super) fn action(&self, name: &str) -> EntityUid {
        uid(&self.types.action, name)
    }

    /// What permissions amount to. What the catalogue no longer knows counts as everything, so that removing
    /// an entry never makes a combination look harmless; it is told in `undecided`.
    pub(super) fn facts(&self, permissions: &[Permission], undecided: &mut BTreeSet<String>) -> BTreeSet<String> {
        // Many grants hold the same few things: each is looked up once.
        let pairs: BTreeSet<(&ResourceName, &ActionName)> =
            permissions.iter().flat_map(|p| p.actions.iter().map(|a| (&p.resource, a))).collect();
        let mut facts = BTreeSet::new();
        for (resource, action) in pairs {
            let Some(entry) = self.entry(resource) else {
                undecided.insert(format!("{resource} is held and no longer in the catalogue: it counts as everything"));
                facts.extend(self.everything.iter().cloned());
                continue;
            };
            if let Some((effect, _)) = entry.effect(action) {
                facts.extend(entry.facts(effect));
            } else {
                undecided.insert(format!(
                    "{action} on {resource} is held and no longer in the catalogue: it counts as every action"
                ));
                facts.extend(Effect::ALL.iter().flat_map(|e| entry.facts(*e)));
            }
        }
        facts
    }

    /// How many targets are changed (not only read) by these permissions; an unknown one counts.
    fn systems_changed<'p>(&'p self, permissions: impl Iterator<Item = &'p Permission>) -> u64 {
        let mut systems = BTreeSet::new();
        for p in permissions {
            match self.entry(&p.resource) {
                None => {
                    systems.insert(p.resource.as_str());
                }
                Some(entry) => {
                    let changes = |a| !matches!(entry.effect(a), Some((Effect::Read | Effect::Export, _)));
                    if p.actions.iter().any(changes) {
                        systems.insert(entry.resource.target.as_str());
                    }
                }
            }
        }
        systems.len() as u64
    }

    pub(super) fn agent(&self, a: &AgentFacts) -> Result<(EntityUid, Entity), FactError> {
        let uid = uid(&self.types.agent, a.id.as_str());
        let mut attrs = vec![
            ("id".to_owned(), string(a.id.as_str())),
            ("issuer".to_owned(), string(&a.issuer)),
            ("method".to_owned(), string(&a.method)),
            ("groups".to_owned(), strings(a.groups.iter().map(String::as_str))),
        ];
        if let Some(domain) = a.id.as_str().strip_prefix("spiffe://").and_then(|r| r.split('/').next()) {
            attrs.push(("trust_domain".to_owned(), string(domain)));
        }
        if let Some(owner) = &a.owner {
            attrs.push(("owner".to_owned(), string(owner.as_str())));
        }
        if let Some(team) = &a.team {
            attrs.push(("team".to_owned(), string(team)));
        }
        let tags = a.attributes.iter().map(|(k, v)| (k.clone(), string(v)));
        let entity = Entity::new_with_tags(uid.clone(), attrs, [], tags).map_err(|e| e.to_string())?;
        Ok((uid, entity))
    }

    pub(super) fn person(&self, p: &PersonFacts) -> Result<(EntityUid, Entity), FactError> {
        let uid = uid(&self.types.person, p.id.as_str());
        let attrs = HashMap::from([
            ("id".to_owned(), string(p.id.as_str())),
            ("groups".to_owned(), strings(p.groups.iter().map(String::as_str))),
        ]);
        let entity = Entity::new(uid.clone(), attrs, std::collections::HashSet::new()).map_err(|e| e.to_string())?;
        Ok((uid, entity))
    }

    pub(super) fn broker(&self) -> (EntityUid, Entity) {
        let uid = uid(&self.types.broker, "broker");
        (uid.clone(), Entity::new_no_attrs(uid, std::collections::HashSet::new()))
    }

    /// A grant, with what the catalogue says of it. What the catalogue no longer has is `unknown` everywhere:
    /// rules that want *all* of a grant to be theirs don't match, rules about ending still do (regression L3).
    pub(super) fn grant(
        &self,
        g: &GrantFacts,
        undecided: &mut BTreeSet<String>,
    ) -> Result<(EntityUid, Entity), FactError> {
        let mut sets: BTreeMap<&str, BTreeSet<String>> =
            ["targets", "kinds", "environments", "labels", "sensitivities", "effects"]
                .map(|k| (k, BTreeSet::new()))
                .into();
        let mut add = |key: &'static str, value: &str| {
            sets.entry(key).or_default().insert(value.to_owned());
        };
        for p in &g.permissions {
            let Some(entry) = self.entry(&p.resource) else {
                for key in ["targets", "kinds", "environments", "labels", "sensitivities", "effects"] {
                    add(key, "unknown");
                }
                continue;
            };
            let r = &entry.resource;
            add("targets", r.target.as_str());
            add("kinds", &entry.kind);
            add("environments", &r.environment);
            add("sensitivities", &r.sensitivity);
            for label in &r.labels {
                add("labels", label);
            }
            for action in &p.actions {
                add("effects", entry.effect(action).map_or("unknown", |(e, _)| e.as_str()));
            }
        }
        let uid = uid(&self.types.grant, "grant");
        let facts = self.facts(&g.permissions, undecided);
        let mut attrs: HashMap<String, RestrictedExpression> =
            sets.iter().map(|(k, v)| ((*k).to_owned(), strings(v.iter().map(String::as_str)))).collect();
        let resources = g
            .permissions
            .iter()
            .map(|p| RestrictedExpression::new_entity_uid(self::uid(&self.types.resource, p.resource.as_str())));
        attrs.insert("resources".to_owned(), RestrictedExpression::new_set(resources));
        attrs.insert("facts".to_owned(), strings(facts.iter().map(String::as_str)));
        attrs.insert("agent".to_owned(), string(g.agent.as_str()));
        attrs.insert(
            "tier".to_owned(),
            RestrictedExpression::new_entity_uid(self::uid(&self.types.tier, g.tier.as_str())),
        );
        if let Some(owner) = &g.owner {
            attrs.insert("owner".to_owned(), string(owner.as_str()));
        }
        if let Some(team) = &g.team {
            attrs.insert("team".to_owned(), string(team));
        }
        let entity = Entity::new(uid.clone(), attrs, std::collections::HashSet::new()).map_err(|e| e.to_string())?;
        Ok((uid, entity))
    }

    /// The part of the context that is the same for all of a request.
    pub(super) fn shared_context(
        &self,
        input: &AssessInput,
        undecided: &mut BTreeSet<String>,
    ) -> Result<Vec<(String, RestrictedExpression)>, FactError> {
        let task = &input.task;
        let asked = self.facts(&input.permissions, undecided);
        let tree = self.facts(&input.tree_holds, undecided);
        let holds = &self.facts(&input.held, undecided) | &tree;
        let together = &asked | &holds;
        let set = |s: &BTreeSet<String>| strings(s.iter().map(String::as_str));
        let task = record(vec![
            ("name", string(task.name.as_str())),
            ("depth", long(task.depth.into())),
            ("life_secs", long(task.life_secs)),
            ("recent_requests", long(task.recent_requests.into())),
            ("intent_labels", set(&task.intent_labels)),
            ("holds", set(&tree)),
        ])?;
        let systems = self.systems_changed(input.permissions.iter().chain(&input.tree_holds));
        Ok(vec![
            ("task".to_owned(), task),
            ("asked".to_owned(), set(&asked)),
            ("holds".to_owned(), set(&holds)),
            ("together".to_owned(), set(&together)),
            ("systems_changed".to_owned(), long(systems)),
        ])
    }
}

fn uid(kind: &EntityTypeName, id: &str) -> EntityUid {
    EntityUid::from_type_name_and_id(kind.clone(), EntityId::new(id))
}

/// The whole context of one action of one permission.
pub(super) fn context(
    shared: &[(String, RestrictedExpression)],
    action: &ActionName,
    reversible: bool,
    constraints: &BTreeMap<ConstraintName, Constraint>,
) -> Result<Context, FactError> {
    let action =
        record(vec![("name", string(action.as_str())), ("reversible", RestrictedExpression::new_bool(reversible))])?;
    let bounds = constraints
        .iter()
        .map(|(name, bound)| {
            let value = match bound {
                Constraint::Set(v) | Constraint::Paths(v) => strings(v.iter().map(String::as_str)),
                Constraint::Max(n) => long(*n),
            };
            (name.as_str(), value)
        })
        .collect();
    let own = [("action".to_owned(), action), ("constraints".to_owned(), record(bounds)?)];
    Context::from_pairs(shared.iter().cloned().chain(own)).map_err(|e| e.to_string())
}
