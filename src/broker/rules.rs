//! Everything that can be replaced while the broker runs: configuration, catalogue, policies, connectors, people.
//! Replaced as a whole, so that a decision never mixes two of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::config::{self, Catalogue, Config, Resource};
use crate::connector::Connector;
use crate::core::digest::Digest;
use crate::core::id::{AgentId, PersonId, ResourceName, TierName};
use crate::core::permission::Permission;
use crate::core::request::AgentFacts;
use crate::core::revocability::Revocability;
use crate::identity::VerifiedAgent;
use crate::policy::Engine;

use super::BrokerError;

/// The rules that hold at a moment.
pub struct Rules {
    /// The broker's own file.
    pub config: Config,
    /// What can be asked for.
    pub catalogue: Catalogue,
    /// The policies.
    pub engine: Arc<Engine>,
    /// Target → its connector.
    pub connectors: BTreeMap<ResourceName, Arc<dyn Connector>>,
}

impl Rules {
    /// The connector behind a resource, with the resource.
    pub fn behind(&self, name: &ResourceName) -> Option<(&Resource, &Arc<dyn Connector>)> {
        let resource = self.catalogue.resource(name)?;
        Some((resource, self.connectors.get(&resource.target)?))
    }

    /// The verified agent with what the operator's directory says of it.
    pub fn facts(&self, agent: &VerifiedAgent) -> AgentFacts {
        let entry = config::directory::agent_entry(&self.config.agent, &agent.id);
        let name = entry.and_then(|e| e.name.clone()).unwrap_or_else(|| short_name(&agent.id));
        AgentFacts {
            id: agent.id.clone(),
            name,
            issuer: agent.issuer.clone(),
            method: method_word(agent).to_owned(),
            attributes: agent.attributes.clone(),
            launcher: agent.launcher.clone(),
            owner: entry.map(|e| e.owner.clone()),
            team: entry.and_then(|e| e.team.clone()),
        }
    }

    /// The agent as policies see it.
    pub fn policy_agent(&self, facts: &AgentFacts, tier_max: Option<&TierName>) -> crate::policy::AgentFacts {
        let entry = config::directory::agent_entry(&self.config.agent, &facts.id);
        crate::policy::AgentFacts {
            id: facts.id.clone(),
            issuer: facts.issuer.clone(),
            method: facts.method.clone(),
            attributes: facts.attributes.clone(),
            owner: facts.owner.clone(),
            team: facts.team.clone(),
            groups: entry.map(|e| e.groups.iter().cloned().collect()).unwrap_or_default(),
            tier_max: tier_max.cloned(),
        }
    }

    /// The strictest tier that identities of this agent's issuer may reach now.
    pub fn tier_max_of(&self, facts: &AgentFacts) -> Option<TierName> {
        if facts.id.is_spiffe() {
            self.config.spiffe.as_ref().and_then(|s| s.tier_max.clone())
        } else {
            self.config.issuer.iter().find(|i| i.issuer == facts.issuer).and_then(|i| i.tier_max.clone())
        }
    }

    /// Who answers for an agent now.
    pub fn owner_of(&self, agent: &AgentId) -> Option<PersonId> {
        config::directory::agent_entry(&self.config.agent, agent).map(|e| e.owner.clone())
    }

    /// May `from` hand parts of its grants to `to`? Always to itself.
    pub fn may_delegate(&self, from: &AgentId, to: &AgentId) -> bool {
        from == to
            || config::directory::agent_entry(&self.config.agent, from)
                .is_some_and(|e| e.may_delegate_to.iter().any(|p| config::directory::pattern_matches(p, to)))
    }

    /// Persons who may not vote on a request of this agent with this chain, as the directory says now (guarantee 6).
    pub fn excluded(&self, facts: &AgentFacts, chain: &[AgentId]) -> BTreeSet<PersonId> {
        let agents = || chain.iter().chain([&facts.id]);
        let mut out: BTreeSet<PersonId> = agents().filter_map(|a| self.owner_of(a)).collect();
        out.extend(facts.owner.clone());
        // Whose account an agent runs as, and who launched this one, where the issuer says so.
        let runs_as = agents().filter_map(|a| a.as_str().split_once('#'));
        let launcher = facts.launcher.iter().map(|l| (l.issuer.as_str(), l.subject.as_str()));
        for (issuer, subject) in runs_as.chain(launcher) {
            out.extend(self.config.persons_with(issuer, subject).map(|p| p.id.clone()));
        }
        out
    }

    /// Is this identity the API that tokens of this audience are for?
    pub fn serves(&self, asker: &AgentId, audience: &str) -> bool {
        let text = |r: &Resource, key: &str| r.settings.get(key).and_then(toml::Value::as_str).map(str::to_owned);
        self.catalogue.resource.iter().any(|r| {
            text(r, "audience").as_deref() == Some(audience)
                && text(r, "resource_server").as_deref() == Some(asker.as_str())
        })
    }

    /// A person's name, as it is shown.
    pub fn person_name(&self, id: &PersonId) -> String {
        self.config.person.iter().find(|p| p.id == *id).map_or_else(|| id.to_string(), |p| p.name.clone())
    }

    /// How strict a tier is: its place in the operator's list. Unknown tiers are stricter than all.
    pub fn strictness(&self, tier: &TierName) -> usize {
        self.config.tier.iter().position(|t| t.name == *tier).unwrap_or(usize::MAX)
    }

    /// What of catalogue and target is behind each resource (regression D11).
    pub fn target_digests(&self, permissions: &[Permission]) -> Result<BTreeMap<ResourceName, Digest>, BrokerError> {
        let mut out: BTreeMap<ResourceName, Vec<serde_json::Value>> = BTreeMap::new();
        for permission in permissions {
            let (resource, connector) = self.behind(&permission.resource).ok_or_else(|| gone(&permission.resource))?;
            let entry = serde_json::to_value(resource).map_err(|e| BrokerError::Internal(e.to_string()))?;
            let parts = out.entry(permission.resource.clone()).or_insert_with(|| vec![entry]);
            parts.push(connector.fingerprint(permission));
        }
        out.into_iter()
            .map(|(name, parts)| {
                let digest = Digest::of(&parts).map_err(|e| BrokerError::Internal(e.to_string()))?;
                Ok((name, digest))
            })
            .collect()
    }

    /// What ending each permission's credential does.
    pub fn revocability(&self, permissions: &[Permission], life_secs: u64) -> Result<Vec<Revocability>, BrokerError> {
        permissions
            .iter()
            .map(|p| {
                let (_, connector) = self.behind(&p.resource).ok_or_else(|| gone(&p.resource))?;
                Ok(connector.revocability(p, life_secs))
            })
            .collect()
    }
}

fn gone(name: &ResourceName) -> BrokerError {
    BrokerError::Over { why: format!("{name} is no longer in the catalogue") }
}

const fn method_word(agent: &VerifiedAgent) -> &'static str {
    match agent.method {
        crate::identity::Method::X509Svid => "x509-svid",
        crate::identity::Method::JwtSvid => "jwt-svid",
        crate::identity::Method::Oidc => "oidc",
    }
}

/// The last part of an identity: what a person would call it.
fn short_name(id: &AgentId) -> String {
    let text = id.as_str().trim_end_matches('/');
    text.rsplit(['/', '#']).next().filter(|s| !s.is_empty()).unwrap_or(text).to_owned()
}
