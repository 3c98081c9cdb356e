//! What is told of a grant to its agent, and in words to everybody.

use crate::config::request::wire_form;
use crate::core::event::DeniedBy;
use crate::core::grant::{Grant, GrantState};
use crate::core::lease::{Absence, Lease, LeaseState};
use crate::identity::VerifiedAgent;
use crate::wire::agent::{Attested, CatalogueView, GrantView, LeaseView, ResourceView};

use super::{Broker, Rules};

pub use crate::wire::words::{cause_in_words, evidence_in_words, rfc3339};

impl Broker {
    /// A grant, as its agent sees it.
    pub fn view(&self, grant: &Grant) -> GrantView {
        let rules = self.rules();
        let now = self.now();
        let assessed = grant.assessed.as_ref();
        let permissions = assessed.map_or(&grant.request.permissions, |a| &a.approvable.permissions);
        let (decide_by, ends_at) = match grant.state {
            GrantState::Pending { decide_by } => (Some(decide_by), None),
            GrantState::Active { ends_at, .. } => (None, Some(ends_at)),
            _ => (None, None),
        };
        let (cause, reason, rule) = match &grant.state {
            GrantState::Ending { cause, .. }
            | GrantState::Ended { cause, .. }
            | GrantState::Withdrawn { cause, .. } => (Some(cause.clone()), None, None),
            GrantState::Denied { by, reason, .. } => {
                let rule = match by {
                    DeniedBy::Policy { rule, .. } => Some(rule.clone()),
                    DeniedBy::Person { .. } => None,
                };
                (None, Some(reason.clone()), rule)
            }
            _ => (None, None, None),
        };
        GrantView {
            id: grant.id,
            state: grant.state.word().to_owned(),
            version: grant.version,
            task: grant.request.task.clone(),
            parent: grant.request.parent,
            authorization_details: permissions.iter().map(|p| wire_form(&rules.catalogue, p)).collect(),
            tier: assessed.map(|a| a.approvable.tier.name.to_string()),
            approvals: u8::try_from(grant.approvers().len()).unwrap_or(u8::MAX),
            approvals_needed: assessed.map_or(0, |a| a.approvable.tier.approvals),
            decide_by,
            life_secs: assessed.map(|a| a.approvable.life_secs),
            ends_at,
            secs_left: decide_by.or(ends_at).map(|at| at.ms_since(now) / 1000),
            review_url: review_url(&rules, grant),
            cause,
            reason,
            rule,
            sentence: assessed.map(|a| a.approvable.sentence.clone()),
            leases: self.leases(grant),
        }
    }

    /// The leases of a grant, oldest first.
    pub fn leases(&self, grant: &Grant) -> Vec<LeaseView> {
        let mut all: Vec<&Lease> = grant.leases.values().collect();
        all.sort_by_key(|l| l.intent.intended_at);
        let told = |lease: &&Lease| {
            let away = lease.resists().then(|| self.away(&lease.intent.target)).flatten();
            LeaseView { away, ..lease_view(grant, lease) }
        };
        all.iter().map(told).collect()
    }

    /// What this agent may ask for.
    pub fn catalogue_for(&self, agent: &VerifiedAgent) -> CatalogueView {
        let rules = self.rules();
        let askable = Self::askable(&rules, agent);
        let resources = rules
            .catalogue
            .resource
            .iter()
            .filter_map(|r| {
                let actions: std::collections::BTreeMap<String, String> = r
                    .action
                    .iter()
                    .filter(|a| askable.iter().any(|k| k.resource == r.name && k.action == a.name))
                    .map(|a| (a.name.to_string(), word(a.effect)))
                    .collect();
                (!actions.is_empty()).then(|| ResourceView {
                    kind: rules.catalogue.target(&r.target).map(|t| t.kind.clone()).unwrap_or_default(),
                    identifier: r.name.to_string(),
                    title: r.title.clone(),
                    environment: r.environment.clone(),
                    actions,
                    constraints: r
                        .constraint
                        .iter()
                        .map(|(name, c)| {
                            let value = c.max.map_or_else(|| serde_json::json!(c.values), |max| serde_json::json!(max));
                            (name.to_string(), value)
                        })
                        .collect(),
                })
            })
            .collect();
        CatalogueView { resources }
    }
}

fn word(effect: crate::config::Effect) -> String {
    serde_json::to_value(effect).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Where a person decides.
pub fn review_url(rules: &Rules, grant: &Grant) -> String {
    format!("{}/grants/{}", rules.config.broker.reviewer_url.trim_end_matches('/'), grant.id)
}

fn lease_view(grant: &Grant, lease: &Lease) -> LeaseView {
    let mut view = LeaseView {
        lease: lease.intent.lease,
        resource: lease.intent.permission.resource.to_string(),
        state: String::new(),
        name: lease.intent.name.clone(),
        evidence: None,
        attested: None,
        at: None,
        attempts: 0,
        last_error: None,
        next_try: None,
        away: None,
        seen: grant.seen.get(&lease.intent.lease).cloned().unwrap_or_default(),
    };
    match &lease.state {
        LeaseState::Intended => {
            "intended".clone_into(&mut view.state);
            view.at = Some(lease.intent.intended_at);
        }
        LeaseState::Live { since, .. } => {
            "live".clone_into(&mut view.state);
            view.at = Some(*since);
        }
        LeaseState::Unknown { since, progress, .. } | LeaseState::Revoking { since, progress } => {
            let word = if matches!(lease.state, LeaseState::Unknown { .. }) { "unknown" } else { "revoking" };
            word.clone_into(&mut view.state);
            view.at = Some(*since);
            view.attempts = progress.attempts;
            view.last_error.clone_from(&progress.last_error);
            view.next_try = progress.next_try;
        }
        LeaseState::Revoked { at, evidence } => {
            "revoked".clone_into(&mut view.state);
            view.at = Some(*at);
            view.evidence = Some(evidence.clone());
        }
        LeaseState::Absent { at, absence } => {
            "absent".clone_into(&mut view.state);
            view.at = Some(*at);
            match absence {
                Absence::Proven { evidence } => view.evidence = Some(evidence.clone()),
                Absence::NotMinted { why } => view.last_error = Some(why.clone()),
                Absence::Attested { by, reason } => {
                    view.attested = Some(Attested { by: by.to_string(), reason: reason.clone() });
                }
            }
        }
    }
    view
}
