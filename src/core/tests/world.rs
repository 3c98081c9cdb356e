//! A broker of a few lines: it holds grants, asks the production `decide`, ends a subtree in one batch and
//! applies what is read back from the journal's text. It judges nothing; every event goes to the oracle.

use std::collections::{BTreeMap, BTreeSet};

use super::Checked;
use super::make::{agent_id, deny_by_policy, end_cause, grant_id, lease_command, lease_id, person, report};
use super::oracle::{Moment, Oracle};
use super::steps::{Ask, AssessLie, IntendLie, LeaseAct, Plan, Step, VoteOn};
use super::uses::permission;
use crate::core::decide::{self, Command, PolicySaid, decide};
use crate::core::digest::Digest;
use crate::core::event::{EndCause, Event, GrantEvent};
use crate::core::grant::{Grant, GrantState};
use crate::core::id::{GrantId, PersonId, ResourceName, TaskName, TierName, Timestamp};
use crate::core::lease::{LeaseIntent, LeaseState};
use crate::core::permission::Permission;
use crate::core::request::{AgentFacts, Approvable, Assessed, Request};
use crate::core::revocability::{Revocability, RevocabilityMode};
use crate::core::tier::{Friction, Tier};
use crate::core::vote::{Verdict, Vote};

/// Grants in one history.
const GRANTS_MAX: usize = 12;
/// The longest life at every tier, in seconds.
const TIER_SECS_MAX: u64 = 1 << 52;
/// The broker, the directory, the targets and the clock.
pub struct World {
    pub now: Timestamp,
    pub grants: BTreeMap<GrantId, Option<Grant>>,
    pub order: Vec<GrantId>,
    /// The journal as text, with the moment of each event.
    pub journal: Vec<(Timestamp, String)>,
    pub oracle: Oracle,
    pub excluded_now: BTreeSet<PersonId>,
    versions: [u64; 2],
    leases: u64,
}

impl World {
    pub fn new() -> Self {
        Self {
            now: Timestamp(1_000_000_000),
            grants: BTreeMap::new(),
            order: Vec::new(),
            journal: Vec::new(),
            oracle: Oracle::default(),
            excluded_now: BTreeSet::new(),
            versions: [0; 2],
            leases: 0,
        }
    }

    pub fn grant(&self, id: GrantId) -> &Grant {
        self.grants[&id].as_ref().expect("a grant in `order` has its first event")
    }

    /// The `n`-th of those that fit; now and then of all, so that what can't be is tried too.
    fn pick(&self, n: usize, fits: impl Fn(&Grant) -> bool) -> Option<GrantId> {
        let fitting: Vec<_> = self.order.iter().copied().filter(|id| fits(self.grant(*id))).collect();
        let wild = n % 16 == 15 || fitting.is_empty() && n % 4 == 3;
        let from = if wild { &self.order } else { &fitting };
        (!from.is_empty()).then(|| from[n % from.len()])
    }

    pub fn step(&mut self, step: &Step) -> Checked {
        let pending = |g: &Grant| matches!(g.state, GrantState::Pending { .. });
        let active = |g: &Grant| matches!(g.state, GrantState::Active { .. });
        let open = |g: &Grant| g.open_leases().next().is_some();
        match step {
            Step::Ask(ask) => return self.ask(ask),
            Step::Time { ms } => self.now = Timestamp(self.now.0.saturating_add_signed(*ms)),
            Step::Until { who, ms } => {
                let due = self.pick(*who, |g| active(g) || pending(g)).and_then(|id| match self.grant(id).state {
                    GrantState::Pending { decide_by } => Some(decide_by),
                    _ => self.grant(id).ends_at(),
                });
                self.now = due.map_or(self.now, |due| Timestamp(due.0.saturating_add_signed(*ms)));
            }
            Step::Directory { person: n, excluded: true } => _ = self.excluded_now.insert(person(*n)),
            Step::Directory { person: n, excluded: false } => _ = self.excluded_now.remove(&person(*n)),
            Step::Target { resource } => self.versions[*resource] += 1,
            Step::Tick { who: None } => {
                for id in self.order.clone() {
                    self.command(id, &Command::Tick)?;
                }
            }
            Step::Tick { who: Some(n) } => self.command_some(self.pick(*n, |_| true), |_, _| Command::Tick)?,
            Step::Reassess { who, plan } => self.command_some(self.pick(*who, pending), |world, grant| {
                Command::Reassess(Box::new(world.assess(grant.id, &grant.request, plan)))
            })?,
            Step::DenyByPolicy { who } => self.command_some(self.pick(*who, pending), |_, _| deny_by_policy())?,
            Step::Vote { who, account, approve, on } => {
                self.command_some(self.pick(*who, pending), |world, grant| world.vote(grant, *account, *approve, *on))?;
            }
            Step::Finish { who, cause } => {
                self.command_some(self.pick(*who, active), |_, _| Command::Finish { cause: end_cause(*cause) })?;
            }
            Step::Cancel { who } => self.command_some(self.pick(*who, pending), |_, _| Command::Cancel)?,
            Step::Report { who } => self.command_some(self.pick(*who, active), |_, _| report())?,
            Step::Intend { who, from, count, brief, lie } => {
                if let Some(id) = self.pick(*who, active) {
                    let command = self.intend(id, *from, *count, *brief, *lie);
                    self.command(id, &command)?;
                }
            }
            Step::Lease { who, which, act } => {
                if let Some(id) = self.pick(*who, open) {
                    let grant = self.grant(id);
                    let mut leases: Vec<_> = grant.open_leases().map(|l| l.intent.lease).collect();
                    if which % 16 == 15 {
                        leases = grant.leases.keys().copied().collect();
                    }
                    let lease = if leases.is_empty() { lease_id(u64::MAX) } else { leases[which % leases.len()] };
                    let command = lease_command(lease, *act, self.now);
                    self.command(id, &command)?;
                }
            }
            Step::Crash => self.crash()?,
        }
        Ok(())
    }

    fn command_some(&mut self, id: Option<GrantId>, make: impl FnOnce(&Self, &Grant) -> Command) -> Checked {
        let Some(id) = id else { return Ok(()) };
        let command = make(self, self.grant(id));
        self.command(id, &command)
    }

    /// What was on its way when the broker died is unknown: the only thing it can say at the next start.
    pub fn crash(&mut self) -> Checked {
        for id in self.order.clone() {
            let intended = self
                .grant(id)
                .leases
                .values()
                .filter(|l| matches!(l.state, LeaseState::Intended))
                .map(|l| l.intent.lease);
            for lease in intended.collect::<Vec<_>>() {
                self.command(id, &lease_command(lease, LeaseAct::Unknown { secs: 20 }, self.now))?;
            }
        }
        Ok(())
    }

    /// Asks `decide` as the broker does: a deadline's events are recorded first, then it is asked again.
    pub fn command(&mut self, id: GrantId, command: &Command) -> Checked {
        let overdue = decide::is_overdue(self.grant(id), self.now);
        for _ in 0..=usize::from(overdue) {
            match decide(self.grant(id), command, self.now) {
                Ok(events) => self.commit(id, events, command)?,
                Err(refusal) => {
                    self.oracle.refused(&refusal);
                    return Ok(());
                }
            }
        }
        let behind = self.grant(id).ends_at().is_some_and(|end| self.now >= end);
        ensure!(!behind, "G10: {id} is in force after its end, and a command has just met it");
        Ok(())
    }

    /// One batch: these events, and the end of everything below if they end this grant.
    fn commit(&mut self, id: GrantId, events: Vec<GrantEvent>, command: &Command) -> Checked {
        let ends = events.iter().any(|e| matches!(e, GrantEvent::Ending { .. }));
        let mut touched = BTreeSet::new();
        self.write(id, events, command, &mut touched)?;
        if ends {
            let mut over = BTreeSet::from([id]);
            for child in self.order.clone() {
                // In order of their making, so that a parent comes before its children.
                if self.grant(child).request.parent.is_some_and(|p| over.contains(&p)) {
                    let finish = Command::Finish { cause: EndCause::ParentEnded };
                    let events = decide(self.grant(child), &finish, self.now).map_err(|r| format!("G4: {r}"))?;
                    self.write(child, events, &finish, &mut touched)?;
                    over.insert(child);
                }
            }
        }
        self.oracle.check(&self.grants, &touched)
    }

    fn write(
        &mut self,
        id: GrantId,
        events: Vec<GrantEvent>,
        command: &Command,
        touched: &mut BTreeSet<GrantId>,
    ) -> Checked {
        for what in events {
            touched.insert(id);
            let slot = self.grants.entry(id).or_default();
            let version = slot.as_ref().map_or(0, |g| g.version) + 1;
            let event = Event::Grant { id, version, what: Box::new(what) };
            let text = serde_json::to_string(&event).map_err(|e| e.to_string())?;
            let read: Event = serde_json::from_str(&text).map_err(|e| format!("{e}: {text}"))?;
            ensure!(read == event, "G8: the journal reads back something else: {text}");
            let Event::Grant { what, .. } = read else { return Err("not about a grant".into()) };
            let moment = Moment { at: self.now, excluded_now: &self.excluded_now, command };
            self.oracle.observe(id, &what, &moment)?;
            Grant::apply(slot, id, &what, self.now).map_err(|e| format!("decide made what apply refuses: {e}"))?;
            ensure!(slot.as_ref().is_some_and(|g| g.version == version), "G8: {id} is not at version {version}");
            self.journal.push((self.now, text));
        }
        Ok(())
    }

    fn ask(&mut self, ask: &Ask) -> Checked {
        if self.order.len() >= GRANTS_MAX {
            return Ok(());
        }
        let id = grant_id(self.order.len());
        let parent = ask
            .parent
            .and_then(|n| self.pick(n, |g| matches!(g.state, GrantState::Active { .. })))
            .map(|p| self.grant(p).clone());
        let mut permissions: Vec<_> = ask.permissions.iter().map(|n| permission(*n)).collect();
        if let Some(approved) = parent.as_ref().filter(|_| ask.from_parent).and_then(|p| p.assessed.as_ref()) {
            let held = &approved.approvable.permissions;
            let part: Vec<_> = permissions.iter().flat_map(|p| held.iter().filter_map(|h| p.meet(h))).collect();
            permissions = if part.is_empty() { held.clone() } else { part };
        }
        let named = if ask.other_parent { Some(grant_id(0)) } else { parent.as_ref().map(|p| p.id) };
        let mut chain = Vec::new();
        if let Some(p) = &parent {
            chain.extend(p.request.chain.iter().cloned().chain([p.request.agent.id.clone()]));
        }
        let request = Request {
            agent: AgentFacts {
                id: agent_id(ask.agent),
                name: "agent".into(),
                issuer: "spiffe://corp".into(),
                method: "x509-svid".into(),
                attributes: BTreeMap::new(),
                launcher: None,
                owner: (ask.agent < 2).then(|| person(ask.agent)),
                team: None,
            },
            task: TaskName::new("task").expect("a plain name"),
            intent: "words of the agent".into(),
            permissions,
            life_secs: ask.life_secs,
            parent: named,
            chain,
            // The launcher, whom the directory knows. What comes down the chain is the core's own work.
            excluded_voters: (ask.agent == 0).then(|| person(2)).into_iter().collect(),
            heartbeat_secs: None,
            confirmation: None,
            idempotency: None,
            content: Digest::of_bytes(b"content"),
        };
        let verdict = if ask.deny {
            let (rule, policy_version) = ("r1".into(), "v1".into());
            PolicySaid::Denied { rule, policy_version, reason: "no".into() }
        } else {
            PolicySaid::Permitted(Box::new(self.assess(id, &request, &ask.plan)))
        };
        match decide::request(id, request, parent.as_ref(), verdict, self.now) {
            Ok(events) => {
                self.order.push(id);
                self.commit(id, events, &Command::Tick)
            }
            Err(refusal) => {
                self.oracle.refused(&refusal);
                Ok(())
            }
        }
    }

    /// The catalogue's hash of a resource, as it is now.
    fn target_hash(&self, resource: &ResourceName) -> Digest {
        let version = self.versions[usize::from(resource.as_str() == "kv")];
        Digest::of_bytes(format!("{resource}@{version}").as_bytes())
    }

    pub fn assess(&self, id: GrantId, request: &Request, plan: &Plan) -> Assessed {
        let mut permissions = request.permissions.clone();
        if plan.shave {
            for p in &mut permissions {
                *p = p.meet(&permission(3)).or_else(|| p.meet(&permission(9))).unwrap_or_else(|| p.clone());
            }
        }
        if plan.lie == AssessLie::Wider {
            permissions[0] = permission(if permissions[0].resource.as_str() == "kv" { 6 } else { 0 });
        }
        let targets = permissions.iter().map(|p| (p.resource.clone(), self.target_hash(&p.resource))).collect();
        let revocability =
            Revocability { mode: RevocabilityMode::Immediate, residual_secs: 0, says: "cut at once".into() };
        let mut a = Approvable {
            grant: id,
            agent: request.agent.id.clone(),
            owner: request.agent.owner.clone(),
            chain: request.chain.clone(),
            life_secs: request.life_secs.min(TIER_SECS_MAX),
            latest_end: self.now.plus_secs(plan.latest_secs),
            tier: Tier {
                name: TierName::new("tier").expect("a plain name"),
                approvals: plan.approvals,
                life_secs_max: TIER_SECS_MAX,
                friction: Friction::One,
            },
            targets,
            revocability: vec![revocability; permissions.len()],
            sentence: format!("{} permissions", permissions.len()),
            permissions,
        };
        match plan.lie {
            AssessLie::OtherGrant => a.grant = grant_id(77),
            AssessLie::OtherAgent => a.agent = agent_id(9),
            AssessLie::OtherOwner => a.owner = Some(person(5)),
            AssessLie::Longer => a.life_secs = a.life_secs.saturating_add(1),
            AssessLie::NoTargets => a.targets.clear(),
            AssessLie::NoRevocability => a.revocability.clear(),
            AssessLie::None | AssessLie::Wider | AssessLie::OtherDigest => {}
        }
        let digest = match plan.lie {
            AssessLie::OtherDigest => Digest::of_bytes(b"another"),
            _ => a.digest().unwrap_or(Digest::of_bytes(b"no digest")),
        };
        let decide_by = self.now.plus_secs(plan.decide_secs);
        Assessed { approvable: a, digest, reasons: Vec::new(), policy_version: "v1".into(), decide_by }
    }

    pub fn vote(&self, grant: &Grant, account: usize, approve: bool, on: VoteOn) -> Command {
        let standing = |g: &Grant| g.assessed.as_ref().map(|a| a.digest);
        let digest = match on {
            VoteOn::Standing => standing(grant),
            VoteOn::Earlier => self.oracle.earlier_digest(grant.id),
            VoteOn::Twin => self.order.iter().filter(|id| **id != grant.id).find_map(|id| standing(self.grant(*id))),
        };
        let parent_ends_at = grant.request.parent.and_then(|p| self.grant(p).ends_at());
        Command::Vote {
            vote: Vote {
                person: person(account / 2),
                account: format!("https://idp#{account}"),
                via: "browser".into(),
                verdict: if approve { Verdict::Approve } else { Verdict::Deny },
                digest: digest.unwrap_or(Digest::of_bytes(b"nothing")),
                reason: None,
                at: Timestamp(0),
            },
            excluded: self.excluded_now.clone(),
            parent_ends_at,
        }
    }

    pub fn intend(&mut self, id: GrantId, from: usize, count: usize, brief: bool, lie: IntendLie) -> Command {
        let grant = self.grant(id);
        // What stands now: the catalogue and the targets are looked at again.
        let mut digest = grant.assessed.as_ref().map(|a| {
            let mut now = a.approvable.clone();
            now.targets = now.targets.keys().map(|r| (r.clone(), self.target_hash(r))).collect();
            now.digest().unwrap_or(Digest::of_bytes(b"no digest"))
        });
        let approved: Vec<Permission> = grant.assessed.as_ref().map_or(vec![], |a| a.approvable.permissions.clone());
        let old = grant.leases.values().next().map(|l| l.intent.clone());
        let left = grant.ends_at().map_or(0, |e| e.ms_since(self.now) / 1000);
        let mut intents = Vec::new();
        for n in 0..count.min(approved.len()) {
            self.leases += 1;
            intents.push(LeaseIntent {
                lease: lease_id(self.leases),
                grant: id,
                name: format!("cs_{}", self.leases),
                target: "target".parse().expect("a name"),
                permission: approved[(from + n) % approved.len()].clone(),
                intended_at: self.now,
                lifetime_secs: if brief { left.min(5) } else { left },
            });
        }
        if let Some(last) = intents.last_mut() {
            match lie {
                IntendLie::Permission => last.permission = permission(from),
                IntendLie::Wider => _ = last.permission.constraints.pop_first(),
                IntendLie::TooLong => last.lifetime_secs = left.saturating_add(1),
                IntendLie::NoLife => last.lifetime_secs = 0,
                IntendLie::OldLease => last.lease = old.map_or(last.lease, |o| o.lease),
                IntendLie::OldName => last.name = old.map_or(last.name.clone(), |o| o.name),
                IntendLie::OtherGrant => last.grant = grant_id(77),
                IntendLie::OtherTime => last.intended_at = last.intended_at.plus_ms(1),
                IntendLie::Digest => digest = Some(Digest::of_bytes(b"another")),
                IntendLie::Twice => {
                    self.leases += 1;
                    let twin = LeaseIntent { lease: lease_id(self.leases), ..last.clone() };
                    intents.push(twin);
                }
                IntendLie::None => {}
            }
        }
        Command::Intend { intents, digest: digest.unwrap_or(Digest::of_bytes(b"nothing")) }
    }
}
