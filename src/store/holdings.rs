//! What agents hold and held: the combination rule asks at each request, vote and mint. Pure, and bounded: beyond a
//! number of different permissions of one agent, those on one resource are told as one wider permission.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::core::grant::{Grant, GrantState};
use crate::core::id::{AgentId, GrantId, PersonId, Timestamp};
use crate::core::permission::Permission;

use super::Held;

/// How far back can be asked, in seconds: the longest window that the configuration may name.
pub const WINDOW_SECS_MAX: u64 = 30 * 24 * 3600;
/// Most different permissions that are remembered of one agent. Beyond it, what it held on one resource becomes one
/// permission with all of the actions and no bounds: policy sees more than was held, never less.
pub const PER_AGENT_MAX: usize = 256;

/// An agent, and who answered for it when it was given something.
pub type Holder = (AgentId, Option<PersonId>);

/// One permission that a holder has or had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holding {
    /// Whose.
    pub holder: Holder,
    /// What.
    pub permission: Arc<Permission>,
    /// Which grants gave it: all that go on, and the two that were over last.
    pub by: Vec<HeldBy>,
}

/// A grant that gave a permission.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldBy {
    /// Which.
    pub grant: GrantId,
    /// Its end; the moment at which it was over for the agent; once everything is proven gone, that moment.
    pub until: Timestamp,
    /// True once everything is proven gone.
    pub over: bool,
}

/// Names a holding.
pub type HoldingKey = (Holder, Arc<Permission>);

type OfHolder = BTreeMap<Arc<Permission>, Vec<HeldBy>>;

/// All holdings.
#[derive(Debug, Default)]
pub struct Holdings {
    of: BTreeMap<Holder, OfHolder>,
    agents_of: HashMap<PersonId, BTreeSet<AgentId>>,
}

fn held_by(grant: &Grant) -> Option<HeldBy> {
    let (until, over) = match grant.state {
        GrantState::Active { ends_at, .. } => (ends_at, false),
        // Over for the agent; a copy of the credential may still work.
        GrantState::Ending { since, .. } => (since, false),
        GrantState::Ended { at, .. } => (at, true),
        _ => return None,
    };
    Some(HeldBy { grant: grant.id, until, over })
}

/// Puts `entry` in place of what its grant had before, and forgets what can't matter any more.
fn note(by: &mut Vec<HeldBy>, entry: HeldBy) {
    by.retain(|e| e.grant != entry.grant);
    by.push(entry);
    // Of those that are over, two are enough to leave one out: their ends don't move any more.
    by.sort_by_key(|e| (e.over, std::cmp::Reverse(e.until), e.grant));
    let open = by.iter().filter(|e| !e.over).count();
    by.truncate(open + 2);
}

impl Holdings {
    /// Takes in what a grant has become. Returns what changed.
    pub fn update(&mut self, before: Option<&Grant>, grant: &Grant) -> Vec<HoldingKey> {
        let earlier = before.and_then(held_by);
        let Some(entry) = held_by(grant).filter(|e| earlier != Some(*e)) else { return Vec::new() };
        let Some(assessed) = &grant.assessed else { return Vec::new() };
        let agent = &grant.request.agent;
        let holder = (agent.id.clone(), agent.owner.clone());
        let mut changed = Vec::new();
        for permission in &assessed.approvable.permissions {
            self.put(&holder, permission, entry, earlier.is_some(), &mut changed);
        }
        changed.into_iter().map(|permission| (holder.clone(), permission)).collect()
    }

    fn put(
        &mut self,
        holder: &Holder,
        permission: &Permission,
        entry: HeldBy,
        is_known: bool,
        changed: &mut Vec<Arc<Permission>>,
    ) {
        let of = self.entry(holder);
        let exact = of.get_key_value(permission).map(|(known, _)| Arc::clone(known));
        // What was put here before and isn't here under its own name has been widened since.
        let widened = |(p, by): &(&Arc<Permission>, &Vec<HeldBy>)| {
            permission.narrows(p) && by.iter().any(|e| e.grant == entry.grant)
        };
        let known = exact.or_else(|| of.iter().find(|h| is_known && widened(h)).map(|(known, _)| Arc::clone(known)));
        if let Some(known) = known {
            note(of.entry(Arc::clone(&known)).or_default(), entry);
            changed.push(known);
        } else if of.len() < PER_AGENT_MAX {
            let permission = Arc::new(permission.clone());
            of.insert(Arc::clone(&permission), vec![entry]);
            changed.push(permission);
        } else {
            widen(of, permission, entry, changed);
        }
    }

    fn entry(&mut self, holder: &Holder) -> &mut OfHolder {
        if !self.of.contains_key(holder)
            && let Some(owner) = &holder.1
        {
            self.agents_of.entry(owner.clone()).or_default().insert(holder.0.clone());
        }
        self.of.entry(holder.clone()).or_default()
    }

    /// What the agent, and other agents for the owner, hold or held since.
    pub fn held(
        &self,
        agent: &AgentId,
        owner: Option<&PersonId>,
        since: Timestamp,
        except: Option<GrantId>,
    ) -> Vec<Held> {
        let until = |by: &[HeldBy]| {
            by.iter().filter(|e| Some(e.grant) != except && (!e.over || e.until >= since)).map(|e| e.until).max()
        };
        let mut own: BTreeMap<&Permission, Timestamp> = BTreeMap::new();
        let holders = self.of.range((agent.clone(), None)..).take_while(|((a, _), _)| a == agent);
        for (permission, by) in holders.flat_map(|(_, of)| of) {
            if let Some(until) = until(by) {
                let known = own.entry(permission).or_insert(until);
                *known = until.max(*known);
            }
        }
        let mut others: BTreeMap<&Permission, (&AgentId, Timestamp)> = BTreeMap::new();
        let agents = owner.and_then(|o| self.agents_of.get(o)).into_iter().flatten().filter(|a| *a != agent);
        for other in agents {
            for (permission, by) in self.of.get(&(other.clone(), owner.cloned())).into_iter().flatten() {
                if let Some(until) = until(by) {
                    let known = others.entry(permission).or_insert((other, until));
                    if until > known.1 {
                        *known = (other, until);
                    }
                }
            }
        }
        let held = |permission: &Permission, agent: &AgentId, until| Held {
            agent: agent.clone(),
            permission: permission.clone(),
            until,
        };
        let own = own.into_iter().map(|(p, until)| held(p, agent, until));
        own.chain(others.into_iter().map(|(p, (other, until))| held(p, other, until))).collect()
    }

    /// Forgets what was over before a moment. Returns the holdings that are gone.
    pub fn prune(&mut self, before: Timestamp) -> Vec<HoldingKey> {
        let mut gone = Vec::new();
        let agents_of = &mut self.agents_of;
        self.of.retain(|holder, of| {
            of.retain(|permission, by| {
                by.retain(|e| !e.over || e.until >= before);
                if by.is_empty() {
                    gone.push((holder.clone(), Arc::clone(permission)));
                }
                !by.is_empty()
            });
            if of.is_empty()
                && let Some(owner) = &holder.1
                && let Some(agents) = agents_of.get_mut(owner)
            {
                agents.remove(&holder.0);
                if agents.is_empty() {
                    agents_of.remove(owner);
                }
            }
            !of.is_empty()
        });
        gone
    }

    /// One of them; `None` if it is gone.
    pub fn get(&self, key: &HoldingKey) -> Option<Holding> {
        let by = self.of.get(&key.0)?.get(&key.1)?;
        Some(Holding { holder: key.0.clone(), permission: Arc::clone(&key.1), by: by.clone() })
    }

    /// Takes back what was kept.
    pub fn restore(&mut self, holding: Holding) {
        self.entry(&holding.holder).insert(holding.permission, holding.by);
    }

    /// How many there are.
    #[allow(clippy::len_without_is_empty)] // a figure
    pub fn len(&self) -> usize {
        self.of.values().map(BTreeMap::len).sum()
    }
}

/// Makes one of all that is known on the permission's resource: every action, no bounds.
fn widen(of: &mut OfHolder, permission: &Permission, entry: HeldBy, changed: &mut Vec<Arc<Permission>>) {
    let mut wide = Permission {
        resource: permission.resource.clone(),
        actions: permission.actions.clone(),
        constraints: BTreeMap::new(),
    };
    let mut all = vec![entry];
    of.retain(|known, by| {
        if known.resource != permission.resource {
            return true;
        }
        wide.actions.extend(known.actions.iter().cloned());
        all.append(by);
        changed.push(Arc::clone(known));
        false
    });
    let mut by = Vec::new();
    // Newest word on each grant last: the entry itself was put first.
    for entry in all.into_iter().rev() {
        note(&mut by, entry);
    }
    let wide = Arc::new(wide);
    of.insert(Arc::clone(&wide), by);
    changed.push(wide);
}
