//! What agents hold and held: the combination rule asks at each request, vote and mint. Pure, and bounded: beyond a
//! number of different permissions of one agent, those on one resource are told as one wider permission.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::core::grant::{Grant, GrantState};
use crate::core::id::{AgentId, GrantId, PersonId, TaskKey, TaskName, Timestamp};
use crate::core::permission::{PERMISSIONS_MAX, Permission};

use super::Held;

/// How far back can be asked, in seconds: the longest window that the configuration may name.
pub const WINDOW_SECS_MAX: u64 = 30 * 24 * 3600;
/// Most different permissions that are remembered of one agent. Beyond it, what it held on one resource becomes one
/// permission with all of the actions and no bounds: policy sees more than was held, never less.
pub const PER_AGENT_MAX: usize = 256;
/// Of so many tasks of an agent it is remembered that they held a permission and hold it no more. What earlier ones held
/// counts for every task: policy sees more than was held, never less.
pub const TASKS_MAX: usize = 128;

/// An agent, and who answered for it when it was given something.
pub type Holder = (AgentId, Option<PersonId>);

/// One permission that a holder has or had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holding {
    /// Whose.
    pub holder: Holder,
    /// What.
    pub permission: Arc<Permission>,
    /// Of the grants that gave it and are over, of each task the last two. Those that go on are told by the grants
    /// themselves.
    pub over: Vec<HeldBy>,
}

/// A grant that gave a permission. They are ordered by the end.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct HeldBy {
    /// Its end; the moment at which it was over for the agent; once everything is proven gone, that moment.
    pub until: Timestamp,
    /// Which.
    pub grant: GrantId,
    /// The holder's task that it was for; `None`: no longer known, so any.
    pub task: Option<TaskName>,
    /// True once everything is proven gone.
    pub over: bool,
}

/// Names a holding.
pub type HoldingKey = (Holder, Arc<Permission>);

/// Which grants gave one permission.
#[derive(Debug, Default, Clone)]
struct By {
    /// Those that go on. There may be many, so nothing here looks through all of them.
    open: BTreeSet<HeldBy>,
    /// The same by task.
    open_of_task: BTreeMap<TaskName, BTreeSet<GrantId>>,
    /// Of those of a task that are over, [`OVER_KEPT`], the latest first.
    over: Vec<HeldBy>,
}

/// Of those of a task that are over, two are enough to leave one out: their ends don't move any more.
const OVER_KEPT: usize = 2;

type OfHolder = BTreeMap<Arc<Permission>, By>;

/// All holdings.
#[derive(Debug, Default)]
pub struct Holdings {
    of: BTreeMap<Holder, OfHolder>,
    agents_of: HashMap<PersonId, BTreeSet<AgentId>>,
}

/// What a grant gives, while it goes on and when it is over.
pub(super) fn held_by(grant: &Grant) -> Option<HeldBy> {
    let (until, over) = match grant.state {
        GrantState::Active { ends_at, .. } => (ends_at, false),
        // Over for the agent; a copy of the credential may still work.
        GrantState::Ending { since, .. } => (since, false),
        GrantState::Ended { at, .. } => (at, true),
        _ => return None,
    };
    Some(HeldBy { grant: grant.id, task: Some(grant.request.task.clone()), until, over })
}

impl By {
    /// Puts `entry` in place of what its grant had before. True if what is over changed.
    fn note(&mut self, earlier: Option<&HeldBy>, entry: HeldBy) -> bool {
        if let Some(earlier) = earlier {
            self.leave(earlier);
        }
        if !entry.over {
            if let Some(task) = &entry.task {
                self.open_of_task.entry(task.clone()).or_default().insert(entry.grant);
            }
            self.open.insert(entry);
            return false;
        }
        self.over.retain(|e| e.grant != entry.grant);
        let place = self.over.partition_point(|e| *e > entry);
        self.over.insert(place, entry);
        self.keep_few();
        true
    }

    fn leave(&mut self, earlier: &HeldBy) {
        self.open.remove(earlier);
        if let Some(task) = &earlier.task
            && let Some(grants) = self.open_of_task.get_mut(task)
        {
            grants.remove(&earlier.grant);
            if grants.is_empty() {
                self.open_of_task.remove(task);
            }
        }
    }

    /// Of each task that is over, [`OVER_KEPT`]; of the tasks, [`TASKS_MAX`], those that ended last.
    fn keep_few(&mut self) {
        let (mut named, mut unnamed): (HashMap<&TaskName, usize>, usize) = (HashMap::new(), 0);
        let mut judged = Vec::with_capacity(self.over.len());
        for e in &self.over {
            let task = e.task.as_ref().filter(|t| named.contains_key(t) || named.len() < TASKS_MAX);
            let count = task.map_or(&mut unnamed, |t| named.entry(t).or_default());
            *count += 1;
            judged.push((*count <= OVER_KEPT, task.is_some()));
        }
        let mut judged = judged.into_iter();
        self.over.retain_mut(|e| {
            let (stays, keeps_name) = judged.next().unwrap_or_default();
            if !keeps_name {
                e.task = None;
            }
            stays
        });
    }

    fn contains(&self, entry: &HeldBy) -> bool {
        self.open.contains(entry) || self.over.contains(entry)
    }

    /// Until when it is or was held, if it was since then, leaving out what one grant gave.
    fn until(&self, since: Timestamp, except: Option<GrantId>) -> Option<Timestamp> {
        let others = |e: &&HeldBy| Some(e.grant) != except;
        let open = self.open.iter().rev().find(others);
        let over = self.over.iter().find(|e| others(e) && e.until >= since);
        open.into_iter().chain(over).map(|e| e.until).max()
    }

    /// Is it or was it held since then in a task, leaving out what one grant gave?
    fn in_task(&self, task: &TaskName, since: Timestamp, except: Option<GrantId>) -> bool {
        let open = self.open_of_task.get(task).is_some_and(|g| g.iter().any(|id| Some(*id) != except));
        let ours = |e: &HeldBy| e.task.as_ref().is_none_or(|name| name == task);
        open || self.over.iter().any(|e| ours(e) && Some(e.grant) != except && e.until >= since)
    }
}

impl Holdings {
    /// Takes in what a grant has become; `earlier` is what [`held_by`] made of it before. Returns the holdings of which
    /// something else is over than before.
    pub(super) fn update(&mut self, earlier: Option<&HeldBy>, grant: &Grant) -> Vec<HoldingKey> {
        let Some(entry) = held_by(grant).filter(|e| earlier != Some(e)) else { return Vec::new() };
        let Some(assessed) = &grant.assessed else { return Vec::new() };
        let agent = &grant.request.agent;
        let holder = (agent.id.clone(), agent.owner.clone());
        let mut changed = Vec::new();
        for permission in &assessed.approvable.permissions {
            self.put(&holder, permission, earlier, entry.clone(), &mut changed);
        }
        changed.into_iter().map(|permission| (holder.clone(), permission)).collect()
    }

    /// What is kept of these changes once they are taken in, without taking them in: for a store that writes it beforehand.
    pub fn after(&self, steps: &[(Option<Arc<Grant>>, Arc<Grant>)]) -> Vec<(HoldingKey, Option<Holding>)> {
        let holder = |g: &Grant| (g.request.agent.id.clone(), g.request.agent.owner.clone());
        let mut scratch = Self::default();
        for (_, after) in steps {
            let holder = holder(after);
            // Only what is over is kept, or what was made one because there is too much.
            let is_kept = matches!(after.state, GrantState::Ended { .. });
            let of = self.of.get(&holder);
            if is_kept || of.is_some_and(|of| of.len() + steps.len() * PERMISSIONS_MAX >= PER_AGENT_MAX) {
                scratch.of.entry(holder).or_insert_with(|| of.cloned().unwrap_or_default());
            }
        }
        let mut changed = BTreeSet::new();
        for (before, after) in steps {
            if scratch.of.contains_key(&holder(after)) {
                changed.extend(scratch.update(before.as_deref().and_then(held_by).as_ref(), after));
            }
        }
        let kept = |key: HoldingKey| (scratch.get(&key), key);
        changed.into_iter().map(kept).map(|(holding, key)| (key, holding)).collect()
    }

    /// Takes in a grant that was kept. What it gave is told by itself as long as it goes on, see [`Holding::over`].
    pub fn restore_grant(&mut self, grant: &Grant) {
        if held_by(grant).is_some_and(|e| !e.over) {
            // Nothing is over by it.
            self.update(None, grant);
        }
    }

    fn put(
        &mut self,
        holder: &Holder,
        permission: &Permission,
        earlier: Option<&HeldBy>,
        entry: HeldBy,
        changed: &mut Vec<Arc<Permission>>,
    ) {
        let of = self.entry(holder);
        let has = |by: &By| earlier.is_some_and(|e| by.contains(e)) || by.contains(&entry);
        let exact = of.get_key_value(permission).map(|(known, by)| (Arc::clone(known), has(by)));
        // What was put here before and isn't here under its own name has been widened since, also if that name came
        // back with another grant.
        let known = match exact {
            Some((known, true)) => Some(known),
            exact => {
                let widened = |(p, by): &(&Arc<Permission>, &By)| permission.narrows(p) && has(by);
                let widened = earlier.and_then(|_| of.iter().find(widened).map(|(known, _)| Arc::clone(known)));
                widened.or(exact.map(|(known, _)| known))
            }
        };
        if known.is_none() && of.len() >= PER_AGENT_MAX {
            widen(of, permission, entry, changed);
            return;
        }
        let known = known.unwrap_or_else(|| Arc::new(permission.clone()));
        if of.entry(Arc::clone(&known)).or_default().note(earlier, entry) {
            changed.push(known);
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
        let mut own: BTreeMap<&Permission, Timestamp> = BTreeMap::new();
        let holders = self.of.range((agent.clone(), None)..).take_while(|((a, _), _)| a == agent);
        for (permission, by) in holders.flat_map(|(_, of)| of) {
            if let Some(until) = by.until(since, except) {
                let known = own.entry(permission).or_insert(until);
                *known = until.max(*known);
            }
        }
        let mut others: BTreeMap<&Permission, (&AgentId, Timestamp)> = BTreeMap::new();
        let agents = owner.and_then(|o| self.agents_of.get(o)).into_iter().flatten().filter(|a| *a != agent);
        for other in agents {
            for (permission, by) in self.of.get(&(other.clone(), owner.cloned())).into_iter().flatten() {
                if let Some(until) = by.until(since, except) {
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

    /// What the agent holds or held since in one of its tasks, whoever answered for it.
    pub fn held_in_task(&self, task: &TaskKey, since: Timestamp, except: Option<GrantId>) -> Vec<Permission> {
        let holders = self.of.range((task.agent.clone(), None)..).take_while(|((a, _), _)| *a == task.agent);
        let held = holders.flat_map(|(_, of)| of).filter(|(_, by)| by.in_task(&task.task, since, except));
        held.map(|(permission, _)| &**permission).collect::<BTreeSet<_>>().into_iter().cloned().collect()
    }

    /// Forgets what was over before a moment. Returns the holdings of which nothing is over any more.
    pub fn prune(&mut self, before: Timestamp) -> Vec<HoldingKey> {
        let mut gone = Vec::new();
        let agents_of = &mut self.agents_of;
        self.of.retain(|holder, of| {
            of.retain(|permission, by| {
                let had = !by.over.is_empty();
                by.over.retain(|e| e.until >= before);
                if had && by.over.is_empty() {
                    gone.push((holder.clone(), Arc::clone(permission)));
                }
                !(by.open.is_empty() && by.over.is_empty())
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

    /// What is kept of one of them; `None` if nothing of it is over.
    pub fn get(&self, key: &HoldingKey) -> Option<Holding> {
        let over = &self.of.get(&key.0)?.get(&key.1)?.over;
        let holding = || Holding { holder: key.0.clone(), permission: Arc::clone(&key.1), over: over.clone() };
        (!over.is_empty()).then(holding)
    }

    /// Takes back what was kept.
    pub fn restore(&mut self, holding: Holding) {
        self.entry(&holding.holder).entry(holding.permission).or_default().over = holding.over;
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
    let mut all = By::default();
    all.note(None, entry);
    of.retain(|known, by| {
        if known.resource != permission.resource {
            return true;
        }
        wide.actions.extend(known.actions.iter().cloned());
        all.open.append(&mut by.open);
        for (task, mut grants) in std::mem::take(&mut by.open_of_task) {
            all.open_of_task.entry(task).or_default().append(&mut grants);
        }
        for over in by.over.drain(..) {
            all.note(None, over);
        }
        changed.push(Arc::clone(known));
        false
    });
    let wide = Arc::new(wide);
    of.insert(Arc::clone(&wide), all);
    changed.push(wide);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::event::Event;
    use crate::store::conformance::kit::{START, agent, ask, at, events_of, finish, grant_id, person};

    fn after(before: Option<&Grant>, events: &[Event], at: Timestamp) -> Grant {
        let mut slot = before.cloned();
        for event in events {
            if let Event::Grant { id, what, .. } = event {
                Grant::apply(&mut slot, *id, what, at).expect("it follows");
            }
        }
        slot.expect("a grant")
    }

    /// A grant of one and the same permission while it goes on, and when it is over.
    fn states(n: u64) -> [Grant; 2] {
        let active = after(None, &ask(n).events(), START);
        let over = after(Some(&active), &events_of(&active, &finish(), at(n)), at(n));
        assert!(held_by(&active).is_some_and(|e| !e.over) && held_by(&over).is_some_and(|e| e.over));
        [active, over]
    }

    #[test]
    fn what_many_open_grants_of_one_permission_cost_does_not_grow_with_them() {
        const MANY: u64 = 50_000;
        let mut holdings = Holdings::default();
        let [template, over] = states(1);
        for n in 0..MANY {
            let grant = Grant { id: grant_id(n), ..template.clone() };
            assert!(holdings.update(None, &grant).is_empty(), "nothing is to be kept of a grant that goes on");
        }
        let held = |holdings: &Holdings, except| holdings.held(&agent(1), Some(&person("ana")), at(0), except);
        assert_eq!((holdings.len(), held(&holdings, Some(grant_id(7))).len()), (1, 1));
        // All end; what is kept is two of them.
        for id in (0..MANY).map(grant_id) {
            let changed =
                holdings.update(held_by(&Grant { id, ..template.clone() }).as_ref(), &Grant { id, ..over.clone() });
            let kept = holdings.get(&changed[0]).expect("something is over");
            assert!(changed.len() == 1 && kept.over.len() <= OVER_KEPT && kept.over.iter().any(|e| e.grant == id));
        }
        assert_eq!(holdings.prune(at(3600)).len(), 1, "and in the end nothing is left");
        assert_eq!(holdings.len(), 0);
    }

    #[test]
    fn what_was_widened_is_left_though_its_name_came_back() {
        let template = states(1);
        let with = |n: u64, change: &dyn Fn(&mut Permission)| {
            template.clone().map(|grant| {
                let mut grant = Grant { id: grant_id(n), ..grant };
                let assessed = grant.assessed.as_mut().expect("it was assessed");
                assessed.approvable.permissions.iter_mut().for_each(change);
                grant
            })
        };
        let mut all = vec![with(1, &|_| {})];
        for n in 2..PER_AGENT_MAX as u64 {
            all.push(with(n, &|p| p.resource = format!("other/{n}").parse().expect("a name")));
        }
        // Two more on the resource of the first: the last one makes one of all three, and there is room again.
        for (n, action) in [(1000, "copy"), (1001, "move")] {
            all.push(with(n, &|p| p.actions = BTreeSet::from([action.parse().expect("a name")])));
        }
        all.push(with(1002, &|_| {}));
        let mut holdings = Holdings::default();
        for [active, _] in &all {
            holdings.update(None, active);
        }
        assert_eq!(holdings.len(), PER_AGENT_MAX, "the others, the wide one, and the first one's name again");
        for [active, over] in &all {
            holdings.update(held_by(active).as_ref(), over);
        }
        holdings.prune(at(3600));
        assert_eq!(holdings.len(), 0);
    }

    #[test]
    fn restored_from_what_is_over_and_from_the_grants_that_go_on() {
        let mut holdings = Holdings::default();
        let mut kept = BTreeMap::new();
        let mut open = Vec::new();
        for n in 1..=5 {
            let [active, over] = states(n);
            holdings.update(None, &active);
            if n <= 3 {
                for key in holdings.update(held_by(&active).as_ref(), &over) {
                    kept.insert(key.clone(), holdings.get(&key));
                }
            } else {
                open.push(active);
            }
        }
        let mut again = Holdings::default();
        for holding in kept.into_values().flatten() {
            again.restore(holding);
        }
        for grant in &open {
            again.restore_grant(grant);
        }
        for except in [None, Some(grant_id(4)), Some(grant_id(5))] {
            let held = |of: &Holdings| of.held(&agent(1), Some(&person("ana")), at(0), except);
            assert_eq!(held(&holdings), held(&again));
            assert_eq!(held(&again).len(), 1);
        }
    }
}
