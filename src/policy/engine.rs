//! The engine: one Cedar request for each action of each permission, the strictest tier of all that match.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use cedar_policy::{
    Authorizer, Context, Decision as CedarDecision, Entities, Entity, EntityUid, PolicySet, Request, Schema,
};

use crate::config::{Catalogue, Problem};
use crate::core::digest::Digest;
use crate::core::id::{ActionName, ResourceName, TaskName};
use crate::core::permission::Permission;
use crate::core::tier::Tier;

use super::facts::{Entry, FactError, Index, context};
use super::load::{Rule, Rules};
use super::{AgentFacts, Askable, AssessInput, Assessment, Outcome, Reason, TaskFacts, builtin};

/// Validated policies, ready to answer. Immutable: a change of policies or catalogue is a new engine.
#[derive(Debug)]
pub struct Engine {
    pub(super) rules: Vec<Rule>,
    pub(super) warnings: Vec<Problem>,
    pub(super) tiers: Vec<Tier>,
    pub(super) index: Index,
    pub(super) catalogue: Catalogue,
    /// By action: the rules whose scope names it. The others can't match it.
    sets: HashMap<&'static str, PolicySet>,
    by_id: HashMap<String, usize>,
    /// Resources that policies name literally: their attributes must be at hand in every evaluation.
    literals: BTreeSet<ResourceName>,
    authorizer: Authorizer,
    schema: Schema,
    schema_text: String,
    version: String,
}

/// What one Cedar request said.
pub(super) struct Verdict {
    pub(super) allowed: bool,
    /// Rules that decided, in the order of loading.
    pub(super) rules: Vec<usize>,
    /// Rules that could not be evaluated, with Cedar's message.
    pub(super) errors: Vec<String>,
}

/// A denial on its way out.
struct Denied {
    rule: String,
    reason: String,
}

impl Denied {
    fn new(rule: &str, reason: impl Into<String>) -> Self {
        Self { rule: rule.to_owned(), reason: reason.into() }
    }
}

impl Engine {
    /// Makes the schema, reads and validates the policies (file name and text). All problems in one pass.
    pub fn load(policies: &[(String, String)], catalogue: &Catalogue, tiers: &[Tier]) -> Result<Self, Vec<Problem>> {
        let whole = |what: String| vec![Problem { place: "catalogue".to_owned(), what }];
        let (schema, schema_text) = super::schema::generate(catalogue, tiers).map_err(whole)?;
        let index = Index::new(catalogue).map_err(whole)?;
        let Rules { rules, warnings } = super::load::load(policies, &schema, catalogue, tiers)?;

        let mut sets: HashMap<&'static str, PolicySet> = HashMap::new();
        let mut literals = BTreeSet::new();
        for rule in &rules {
            for action in &rule.actions {
                let set = sets.entry(action).or_default();
                set.add(rule.policy.clone())
                    .map_err(|e| vec![Problem { place: rule.place.clone(), what: format!("can't be added: {e}") }])?;
            }
            let named = rule.policy.entity_literals();
            literals.extend(named.iter().filter_map(|u| ResourceName::new(u.id().unescaped()).ok()));
        }
        literals.retain(|name| index.entry(name).is_some());
        let by_id = rules.iter().enumerate().map(|(i, r)| (r.id.clone(), i)).collect();
        let version = version(policies, &schema_text, tiers);
        Ok(Self {
            rules,
            warnings,
            tiers: tiers.to_vec(),
            index,
            catalogue: catalogue.clone(),
            sets,
            by_id,
            literals,
            authorizer: Authorizer::new(),
            schema,
            schema_text,
            version,
        })
    }

    /// SHA-256 (hex) over the policies, the schema and the tiers; the order of files doesn't matter.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The schema that policies are validated against, in Cedar's syntax.
    pub fn schema_text(&self) -> &str {
        &self.schema_text
    }

    /// Ids of all rules, in the order of loading.
    pub fn rule_ids(&self) -> impl Iterator<Item = &str> {
        self.rules.iter().map(|r| r.id.as_str())
    }

    /// Where a rule stands: `file:line:column`.
    pub fn rule_place(&self, id: &str) -> Option<&str> {
        self.by_id.get(id).map(|i| self.rules[*i].place.as_str())
    }

    /// What policy says of a request. Pure: the same input gives the same answer.
    pub fn assess(&self, input: &AssessInput) -> Assessment {
        let mut reasons = BTreeMap::new();
        let mut undecided = BTreeSet::new();
        let result = self.try_assess(input, &mut reasons, &mut undecided);
        let mut reasons: Vec<(usize, Reason)> = reasons.into_values().collect();
        reasons.sort_by(|(a, x), (b, y)| b.cmp(a).then_with(|| x.policy.cmp(&y.policy)));
        Assessment {
            outcome: result.unwrap_or_else(|d| Outcome::Deny { rule: d.rule, reason: d.reason }),
            reasons: reasons.into_iter().map(|(_, r)| r).collect(),
            undecided: undecided.into_iter().collect(),
            policy_version: self.version.clone(),
        }
    }

    fn try_assess(
        &self,
        input: &AssessInput,
        reasons: &mut BTreeMap<String, (usize, Reason)>,
        undecided: &mut BTreeSet<String>,
    ) -> Result<Outcome, Denied> {
        let mut unevaluated = |e: FactError| {
            undecided.insert(e);
            Denied::new(builtin::EVALUATION_ERROR, "the request's facts could not be evaluated; ask the operator")
        };
        if input.permissions.is_empty() || input.permissions.iter().any(|p| p.actions.is_empty()) {
            return Err(Denied::new(builtin::NOT_IN_CATALOGUE, "nothing is asked for; name a resource and an action"));
        }
        if input.task.life_secs == 0 {
            return Err(Denied::new(builtin::NO_PERMIT, "the life that is asked for must be at least a second"));
        }
        let (principal, agent) = self.index.agent(&input.agent).map_err(&mut unevaluated)?;
        let entities =
            self.entities([agent], input.permissions.iter().map(|p| &p.resource)).map_err(&mut unevaluated)?;
        let shared = self.index.shared_context(input, undecided).map_err(|e| {
            undecided.insert(e);
            Denied::new(builtin::EVALUATION_ERROR, "the request's facts could not be evaluated; ask the operator")
        })?;

        let mut strictest = 0;
        let mut life_secs = u64::MAX;
        let mut denied: Option<Denied> = None;
        for permission in &input.permissions {
            let entry = self.index.entry(&permission.resource);
            for action in &permission.actions {
                let Some((entry, (effect, reversible))) = entry.and_then(|e| Some((e, e.effect(action)?))) else {
                    return Err(Denied::new(
                        builtin::NOT_IN_CATALOGUE,
                        format!("{action} on {} isn't in the catalogue (any more)", permission.resource),
                    ));
                };
                let verdict = context(&shared, action, reversible, &permission.constraints)
                    .and_then(|c| self.ask(&principal, effect.as_str(), &entry.uid, c, &entities))
                    .unwrap_or_else(|e| Verdict { allowed: false, rules: Vec::new(), errors: vec![e] });
                match self.tier_of(&verdict, permission, action, undecided) {
                    // The worst denial is told: an error before a rule, a rule before the lack of one.
                    Err(d) => {
                        if denied.as_ref().is_none_or(|old| severity(&d) > severity(old)) {
                            denied = Some(d);
                        }
                    }
                    Ok(()) => {
                        for rule in verdict.rules.iter().map(|i| &self.rules[*i]) {
                            let tier = self.rule_tier(rule)?;
                            strictest = strictest.max(tier);
                            life_secs = life_secs.min(self.tiers[tier].life_secs_max);
                            self.count(reasons, &rule.id, tier, rule.reason.clone());
                        }
                    }
                }
            }
        }
        if let Some(denied) = denied {
            return Err(denied);
        }
        let tier = self.raise_unless_isolated(strictest, input, reasons)?;
        self.within_reach(tier, &input.agent)?;
        let cap = life_secs.min(self.tiers[tier].life_secs_max);
        Ok(Outcome::Permit {
            tier: self.tiers[tier].clone(),
            life_secs: input.task.life_secs.min(cap),
            capped_from_secs: (input.task.life_secs > cap).then_some(input.task.life_secs),
        })
    }

    fn rule_tier(&self, rule: &Rule) -> Result<usize, Denied> {
        // Loading has checked that every permit for agents has a tier; closed all the same.
        let broken = || Denied::new(builtin::EVALUATION_ERROR, "a rule has no tier; ask the operator");
        rule.tier.filter(|t| *t < self.tiers.len()).ok_or_else(broken)
    }

    fn count(&self, reasons: &mut BTreeMap<String, (usize, Reason)>, rule: &str, tier: usize, reason: Option<String>) {
        let name = self.tiers[tier].name.clone();
        reasons.insert(rule.to_owned(), (tier, Reason { policy: rule.to_owned(), tier: name, reason }));
    }

    /// No permit, a forbid, or any error: denied (guarantee 12). Cedar skips a `forbid` that errs, so an error
    /// is looked for before the decision (regression A18).
    fn tier_of(
        &self,
        verdict: &Verdict,
        permission: &Permission,
        action: &ActionName,
        undecided: &mut BTreeSet<String>,
    ) -> Result<(), Denied> {
        if !verdict.errors.is_empty() {
            undecided.extend(verdict.errors.iter().cloned());
            let reason = "a rule could not be evaluated, so the answer is no; ask the operator";
            return Err(Denied::new(builtin::EVALUATION_ERROR, reason));
        }
        if verdict.allowed && !verdict.rules.is_empty() {
            return Ok(());
        }
        let forbid =
            verdict.rules.iter().map(|i| &self.rules[*i]).filter(|r| !r.permits).min_by(|a, b| a.id.cmp(&b.id));
        Err(match forbid {
            Some(rule) => Denied {
                rule: rule.id.clone(),
                reason: rule
                    .reason
                    .clone()
                    .unwrap_or_else(|| format!("{action} on {} is forbidden", permission.resource)),
            },
            None => Denied::new(
                builtin::NO_PERMIT,
                format!(
                    "no rule permits {action} on {} to this agent; GET /v1/catalogue lists what you may ask for",
                    permission.resource
                ),
            ),
        })
    }

    /// An exemption from approval can be given only where the catalogue says that the resource is isolated.
    fn raise_unless_isolated(
        &self,
        tier: usize,
        input: &AssessInput,
        reasons: &mut BTreeMap<String, (usize, Reason)>,
    ) -> Result<usize, Denied> {
        let exempt = |p: &&Permission| self.index.entry(&p.resource).is_some_and(|e| e.resource.isolated);
        let Some(open) = input.permissions.iter().find(|p| !exempt(p)).filter(|_| self.tiers[tier].approvals == 0)
        else {
            return Ok(tier);
        };
        let reason = format!("{} isn't isolated, so it can't be exempt from approval", open.resource);
        let raised = self.tiers.iter().enumerate().position(|(i, t)| i > tier && t.approvals > 0);
        let raised =
            raised.ok_or_else(|| Denied::new(builtin::NOT_ISOLATED, format!("{reason}, and no tier has a vote")))?;
        self.count(reasons, builtin::NOT_ISOLATED, raised, Some(reason));
        Ok(raised)
    }

    fn within_reach(&self, tier: usize, agent: &AgentFacts) -> Result<(), Denied> {
        let wanted = &self.tiers[tier];
        if let Some(max) = &agent.tier_max {
            // A tier that doesn't exist reaches nothing.
            let reach = self.tiers.iter().position(|t| t.name == *max);
            if reach.is_none_or(|reach| tier > reach) {
                let reason =
                    format!("this needs tier {}, and identities of your issuer reach {max} at most", wanted.name);
                return Err(Denied::new(builtin::TIER_MAX, reason));
            }
        }
        if wanted.approvals > 0 && agent.owner.is_none() {
            let reason = format!(
                "this needs tier {} and a vote, and nobody answers for this agent; ask the operator for an [[agent]] entry",
                wanted.name
            );
            return Err(Denied::new(builtin::NO_OWNER, reason));
        }
        Ok(())
    }

    /// What this agent could ask for now, one action at a time, with nothing held. An indication for
    /// `GET /v1/catalogue`: the real request is assessed as a whole. Costs one evaluation an action.
    pub fn askable(&self, agent: &AgentFacts) -> Vec<Askable> {
        let Ok(task) = TaskName::new("catalogue") else { return Vec::new() };
        let task = TaskFacts { name: task, depth: 0, life_secs: 1, recent_requests: 0, intent_labels: BTreeSet::new() };
        let mut out = Vec::new();
        for r in &self.catalogue.resource {
            let constraints = crate::config::request::whole_bounds(r);
            for a in &r.action {
                let permission = Permission {
                    resource: r.name.clone(),
                    actions: [a.name.clone()].into(),
                    constraints: constraints.clone(),
                };
                let input = AssessInput {
                    agent: agent.clone(),
                    permissions: vec![permission],
                    task: task.clone(),
                    tree_holds: Vec::new(),
                    held: Vec::new(),
                };
                if let Outcome::Permit { tier, .. } = self.assess(&input).outcome {
                    out.push(Askable { resource: r.name.clone(), action: a.name.clone(), tier: tier.name });
                }
            }
        }
        out
    }

    /// The entities of one evaluation: the ones given, the resources asked for, those that rules name.
    pub(super) fn entities<'n>(
        &'n self,
        own: impl IntoIterator<Item = Entity>,
        asked: impl Iterator<Item = &'n ResourceName>,
    ) -> Result<Entities, FactError> {
        let names: BTreeSet<&ResourceName> = asked.chain(&self.literals).collect();
        let resources = names.into_iter().filter_map(|n| self.index.entry(n)).map(|e: &Entry| e.entity.clone());
        Entities::from_entities(own.into_iter().chain(resources), None).map_err(|e| e.to_string())
    }

    pub(super) fn ask(
        &self,
        principal: &EntityUid,
        action: &'static str,
        resource: &EntityUid,
        context: Context,
        entities: &Entities,
    ) -> Result<Verdict, FactError> {
        // Checked against the schema: facts that policies weren't validated for are an error, so a denial.
        let action_uid = self.index.action(action);
        let request = Request::new(principal.clone(), action_uid, resource.clone(), context, Some(&self.schema))
            .map_err(|e| e.to_string())?;
        let Some(set) = self.sets.get(action) else {
            return Ok(Verdict { allowed: false, rules: Vec::new(), errors: Vec::new() });
        };
        let response = self.authorizer.is_authorized(&request, set, entities);
        let diagnostics = response.diagnostics();
        let mut rules: Vec<usize> =
            diagnostics.reason().filter_map(|id| self.by_id.get(AsRef::<str>::as_ref(id)).copied()).collect();
        rules.sort_by(|a, b| self.rules[*a].id.cmp(&self.rules[*b].id));
        let mut errors: Vec<String> = diagnostics.errors().map(ToString::to_string).collect();
        errors.sort();
        Ok(Verdict { allowed: response.decision() == CedarDecision::Allow, rules, errors })
    }
}

fn severity(d: &Denied) -> u8 {
    match d.rule.as_str() {
        builtin::EVALUATION_ERROR => 2,
        builtin::NO_PERMIT => 0,
        _ => 1,
    }
}

fn version(policies: &[(String, String)], schema: &str, tiers: &[Tier]) -> String {
    let mut files: Vec<&(String, String)> = policies.iter().collect();
    files.sort();
    let tiers = serde_json::to_string(tiers).unwrap_or_default(); // plain data: can't fail
    let mut framed = Vec::new();
    for part in files.into_iter().flat_map(|(name, text)| [name.as_str(), text]).chain([schema, tiers.as_str()]) {
        framed.extend((part.len() as u64).to_be_bytes());
        framed.extend(part.as_bytes());
    }
    Digest::of_bytes(&framed).to_string()
}
