//! The judge. It follows each grant by its events alone, in its own words, and says which guarantee an
//! event or a state breaks. It calls nothing of `decide.rs` and no judgement of `grant.rs`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::Checked;
use super::lease_story::{LeasePhase, LeaseStory, lease_of};
use super::make::refusal_word;
use super::uses::{plain, uses, within};
use crate::core::decide::{Command, Refusal};
use crate::core::digest::Digest;
use crate::core::event::{DeniedBy, GrantEvent};
use crate::core::grant::{Grant, GrantState};
use crate::core::id::{GrantId, LeaseId, PersonId, Timestamp};
use crate::core::lease::LeaseIntent;
use crate::core::request::{Assessed, Request};
use crate::core::vote::{Verdict, Vote};

/// What surrounds one event.
pub struct Moment<'a> {
    pub at: Timestamp,
    pub excluded_now: &'a BTreeSet<PersonId>,
    pub command: &'a Command,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Requested,
    Pending,
    InForce,
    Over,
    Final,
}

struct Story {
    request: Request,
    assessed: Option<Assessed>,
    /// The single uses that are approvable.
    held: Vec<bool>,
    earlier: Vec<Digest>,
    votes: Vec<Vote>,
    phase: Phase,
    ends_at: Option<Timestamp>,
    leases: BTreeMap<LeaseId, LeaseStory>,
    last: Option<Grant>,
}

/// All stories, and how often each interesting thing was met.
#[derive(Default)]
pub struct Oracle {
    stories: BTreeMap<GrantId, Story>,
    pub tally: BTreeMap<&'static str, u64>,
}

impl Oracle {
    fn met(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }

    pub fn refused(&mut self, refusal: &Refusal) {
        self.met(refusal_word(refusal));
    }

    /// A digest that stood once and stands no more.
    pub fn earlier_digest(&self, id: GrantId) -> Option<Digest> {
        let story = &self.stories[&id];
        let now = story.assessed.as_ref().map(|a| a.digest);
        story.earlier.iter().copied().find(|d| Some(*d) != now)
    }

    /// Everybody who may never vote on this one: owner, launcher, and the same of all above it.
    fn barred(&self, request: &Request) -> BTreeSet<PersonId> {
        let mut barred: BTreeSet<_> = request.excluded_voters.iter().chain(&request.agent.owner).cloned().collect();
        let mut above = request.parent;
        while let Some(story) = above.and_then(|id| self.stories.get(&id)) {
            barred.extend(story.request.excluded_voters.iter().chain(&story.request.agent.owner).cloned());
            above = story.request.parent;
        }
        barred
    }

    fn parent(&self, request: &Request) -> Option<&Story> {
        request.parent.and_then(|id| self.stories.get(&id))
    }

    /// Judges one event before it is applied.
    pub fn observe(&mut self, id: GrantId, event: &GrantEvent, moment: &Moment<'_>) -> Checked {
        let at = moment.at;
        if let GrantEvent::Requested { request } = event {
            ensure!(!self.stories.contains_key(&id), "G11: {id} is requested twice");
            self.requested(request, at)?;
            let story = Story {
                request: request.clone(),
                assessed: None,
                held: Vec::new(),
                earlier: Vec::new(),
                votes: Vec::new(),
                phase: Phase::Requested,
                ends_at: None,
                leases: BTreeMap::new(),
                last: None,
            };
            self.stories.insert(id, story);
            return Ok(());
        }
        let phase = self.stories.get(&id).map(|s| s.phase).ok_or("an event of a grant that was never requested")?;
        ensure!(phase != Phase::Final, "G11: {event:?} after the end of {id}");
        let next = match event {
            GrantEvent::Requested { .. } => unreachable!("handled above"),
            GrantEvent::Assessed { assessed } => {
                ensure!(matches!(phase, Phase::Requested | Phase::Pending), "G3: assessed while {phase:?}");
                self.assessed(id, assessed)?;
                Phase::Pending
            }
            GrantEvent::Voted { vote } => {
                ensure!(phase == Phase::Pending, "G3: a vote while {phase:?}");
                self.voted(id, vote, moment)?;
                phase
            }
            GrantEvent::Activated { ends_at } => {
                ensure!(phase == Phase::Pending, "G11: activated while {phase:?}");
                self.activated(id, *ends_at, moment)?;
                Phase::InForce
            }
            GrantEvent::Denied { by, .. } => {
                ensure!(matches!(phase, Phase::Requested | Phase::Pending), "G11: denied while {phase:?}");
                if let DeniedBy::Person { person } = by {
                    let said = self.stories[&id].votes.last().map(|v| (&v.person, v.verdict));
                    ensure!(said == Some((person, Verdict::Deny)), "G6: denied by one who did not vote so");
                }
                Phase::Final
            }
            GrantEvent::Lapsed => {
                let assessed = self.stories[&id].assessed.as_ref().ok_or("lapsed before it was assessed")?;
                let due = assessed.decide_by.min(assessed.approvable.latest_end);
                ensure!(phase == Phase::Pending && at >= due, "G11: lapsed too early, {phase:?}");
                Phase::Final
            }
            GrantEvent::Cancelled | GrantEvent::Withdrawn { .. } => {
                ensure!(phase == Phase::Pending, "G11: {event:?} while {phase:?}");
                Phase::Final
            }
            GrantEvent::Ending { .. } => {
                ensure!(phase == Phase::InForce, "G11: ended while {phase:?}");
                let leases = &mut self.stories.get_mut(&id).ok_or("no story")?.leases;
                for lease in leases.values_mut().filter(|l| l.phase == LeasePhase::Live) {
                    lease.phase = LeasePhase::BeingEnded;
                }
                Phase::Over
            }
            GrantEvent::Ended => {
                let all_gone = self.stories[&id].leases.values().all(|l| l.phase == LeasePhase::Gone);
                ensure!(phase == Phase::Over && all_gone, "G4: ended with a lease that is not proven gone");
                Phase::Final
            }
            GrantEvent::Invoked { .. } => {
                ensure!(matches!(phase, Phase::InForce | Phase::Over), "a report while {phase:?}");
                phase
            }
            GrantEvent::LeaseIntended { intent } => {
                ensure!(phase == Phase::InForce, "G3: a lease while {phase:?}");
                self.intended(id, intent, moment)?;
                phase
            }
            lease_event => {
                ensure!(matches!(phase, Phase::InForce | Phase::Over), "a lease changes while {phase:?}");
                self.lease(id, lease_event, at)?;
                phase
            }
        };
        self.stories.get_mut(&id).ok_or("no story")?.phase = next;
        Ok(())
    }

    fn requested(&mut self, request: &Request, at: Timestamp) -> Checked {
        let Some(parent_id) = request.parent else { return Ok(()) };
        let parent = self.stories.get(&parent_id).ok_or("G7: a parent that does not exist")?;
        ensure!(parent.phase == Phase::InForce, "G7: the parent is {:?}", parent.phase);
        ensure!(parent.ends_at.is_some_and(|e| at < e), "G7: the parent's end is behind");
        ensure!(within(&uses(&request.permissions), &parent.held), "G7: asked for more than the parent has");
        let barred = self.barred(request);
        let recorded = |p: &PersonId| request.excluded_voters.contains(p) || request.agent.owner.as_ref() == Some(p);
        ensure!(barred.iter().all(recorded), "G6: one of the chain is not recorded as excluded");
        self.met(if self.parent(request).is_some_and(|p| p.request.parent.is_some()) { "grandchild" } else { "child" });
        Ok(())
    }

    fn assessed(&mut self, id: GrantId, assessed: &Assessed) -> Checked {
        let story = &self.stories[&id];
        let (a, r) = (&assessed.approvable, &story.request);
        ensure!(assessed.digest == digest_of(assessed), "G3: the digest is not of what is approvable");
        ensure!(a.grant == id && a.agent == r.agent.id && a.chain == r.chain, "G3: about something else");
        ensure!(a.owner == r.agent.owner, "G3: another owner");
        let held = uses(&a.permissions);
        ensure!(within(&held, &uses(&r.permissions)), "G3: wider than asked");
        ensure!(a.life_secs > 0 && a.life_secs <= r.life_secs.min(a.tier.life_secs_max), "G3: longer than asked");
        ensure!(a.revocability.len() == a.permissions.len(), "G5: not all of the residual is shown");
        ensure!(a.permissions.iter().all(|p| a.targets.contains_key(&p.resource)), "G3: a target is not bound");
        ensure!(a.tier.approvals == 0 || a.owner.is_some(), "G6: nobody answers for the agent");
        let (had_votes, again) = (!story.votes.is_empty(), story.assessed.is_some());
        let story = self.stories.get_mut(&id).ok_or("no story")?;
        story.votes.clear();
        story.held = held;
        story.earlier.extend(story.assessed.replace(assessed.clone()).map(|a| a.digest));
        if had_votes {
            self.met("votes voided");
        } else if again {
            self.met("assessed again");
        }
        Ok(())
    }

    fn voted(&mut self, id: GrantId, vote: &Vote, moment: &Moment<'_>) -> Checked {
        let story = &self.stories[&id];
        ensure!(story.assessed.as_ref().is_some_and(|a| a.digest == vote.digest), "G3: a vote on something else");
        ensure!(!self.barred(&story.request).contains(&vote.person), "G6: {} may not vote", vote.person);
        ensure!(!moment.excluded_now.contains(&vote.person), "G6: {} may not vote now", vote.person);
        ensure!(story.votes.iter().all(|v| v.person != vote.person), "G6: {} votes twice", vote.person);
        ensure!(vote.at == moment.at, "G10: the voter told the time");
        self.stories.get_mut(&id).ok_or("no story")?.votes.push(vote.clone());
        Ok(())
    }

    /// The persons who approved exactly what stands, without those who may not.
    fn quorum(&self, story: &Story, excluded_now: &BTreeSet<PersonId>) -> usize {
        let barred = self.barred(&story.request);
        let standing = story.assessed.as_ref().map(|a| a.digest);
        let people: BTreeSet<_> = story
            .votes
            .iter()
            .filter(|v| v.verdict == Verdict::Approve && Some(v.digest) == standing)
            .map(|v| &v.person)
            .filter(|p| !barred.contains(*p) && !excluded_now.contains(*p))
            .collect();
        people.len()
    }

    fn activated(&mut self, id: GrantId, ends_at: Timestamp, moment: &Moment<'_>) -> Checked {
        let story = &self.stories[&id];
        let approvable = &story.assessed.as_ref().ok_or("G3: activated without an assessment")?.approvable;
        let needed = usize::from(approvable.tier.approvals);
        let have = self.quorum(story, moment.excluded_now);
        ensure!(have >= needed, "G3/G6: {have} of {needed} approved");
        ensure!(ends_at <= moment.at.plus_secs(approvable.life_secs), "G10: longer than approved");
        ensure!(ends_at <= approvable.latest_end, "G10: later than approved");
        ensure!(ends_at > moment.at, "G10: in force after its end");
        if story.request.parent.is_some() {
            let parent = self.parent(&story.request).ok_or("G7: no parent")?;
            ensure!(parent.phase == Phase::InForce, "G7: in force while the parent is {:?}", parent.phase);
            let end = parent.ends_at.ok_or("G7: a parent without end")?;
            ensure!(ends_at <= end && moment.at < end, "G7: ends later than its parent");
            let grandchild = parent.request.parent.is_some();
            self.met(if grandchild { "grandchild in force" } else { "child in force" });
        }
        let story = self.stories.get_mut(&id).ok_or("no story")?;
        ensure!(story.ends_at.is_none(), "G10: the end is set twice");
        story.ends_at = Some(ends_at);
        self.met(["in force by itself", "in force by one", "in force by two"][needed.min(2)]);
        Ok(())
    }

    fn intended(&mut self, id: GrantId, intent: &LeaseIntent, moment: &Moment<'_>) -> Checked {
        let story = &self.stories[&id];
        let assessed = story.assessed.as_ref().ok_or("G3: nothing was approved")?;
        let Command::Intend { digest: claimed, .. } = moment.command else {
            return Err("G3: an intent that nobody asked for".into());
        };
        ensure!(*claimed == assessed.digest && digest_of(assessed) == *claimed, "G3: not what was approved");
        let needed = usize::from(assessed.approvable.tier.approvals);
        ensure!(self.quorum(story, &BTreeSet::new()) >= needed, "G3: not enough approved what is minted");
        ensure!(assessed.approvable.permissions.contains(&intent.permission), "G3: a permission nobody approved");
        let end = story.ends_at.ok_or("G3: not in force")?;
        ensure!(moment.at < end, "G10: minted at or after the end");
        ensure!(intent.intended_at == moment.at && intent.lifetime_secs > 0, "G10: another time");
        ensure!(intent.intended_at.plus_secs(intent.lifetime_secs) <= end, "G10: outlives the grant");
        ensure!(intent.grant == id, "G13: a lease of another grant");
        for lease in story.leases.values() {
            ensure!(lease.intent.lease != intent.lease && lease.intent.name != intent.name, "G5: named twice");
            let there = matches!(lease.phase, LeasePhase::OnItsWay | LeasePhase::Live);
            ensure!(!(there && lease.intent.permission == intent.permission), "two credentials for one permission");
        }
        let elsewhere = self.stories.iter().any(|(other, s)| *other != id && s.leases.contains_key(&intent.lease));
        ensure!(!elsewhere, "G13: a lease of two grants");
        self.stories.get_mut(&id).ok_or("no story")?.leases.insert(intent.lease, LeaseStory::new(intent.clone()));
        self.met("intended");
        Ok(())
    }

    fn lease(&mut self, id: GrantId, event: &GrantEvent, at: Timestamp) -> Checked {
        let story = self.stories.get_mut(&id).ok_or("no story")?;
        let in_force_until = story.ends_at.filter(|_| story.phase == Phase::InForce);
        let lease = lease_of(event).ok_or_else(|| format!("not expected here: {event:?}"))?;
        let lease = story.leases.get_mut(&lease).ok_or("a lease that was never intended")?;
        let met = lease.observe(event, at, in_force_until)?;
        self.met(met);
        Ok(())
    }

    /// Judges all states after a batch. `touched` are the grants that the batch had events for.
    pub fn check(&mut self, grants: &BTreeMap<GrantId, Option<Grant>>, touched: &BTreeSet<GrantId>) -> Checked {
        for (id, story) in &self.stories {
            let grant = grants.get(id).and_then(Option::as_ref).ok_or("a story without a grant")?;
            if !touched.contains(id) {
                ensure!(story.last.as_ref() == Some(grant), "G13: {id} changed without an event of its own");
            }
            state_agrees(story, grant)?;
            if story.phase == Phase::InForce
                && let Some(parent_id) = story.request.parent
            {
                let parent = self.parent(&story.request).ok_or("G7: no parent")?;
                ensure!(parent.phase == Phase::InForce, "G7: {id} is in force, {parent_id} is {:?}", parent.phase);
                ensure!(story.ends_at <= parent.ends_at, "G7: {id} ends after {parent_id}");
                ensure!(within(&story.held, &parent.held), "G7: {id} has more than {parent_id}");
            }
        }
        for id in touched {
            let story = self.stories.get_mut(id).ok_or("no story")?;
            story.last = grants.get(id).cloned().flatten();
        }
        Ok(())
    }
}

/// The digest, computed without `digest.rs`'s canonical form.
fn digest_of(assessed: &Assessed) -> Digest {
    Digest::of_bytes(plain(&json!(assessed.approvable)).as_bytes())
}

fn state_agrees(story: &Story, grant: &Grant) -> Checked {
    let phase = match &grant.state {
        GrantState::Requested => Phase::Requested,
        GrantState::Pending { .. } => Phase::Pending,
        GrantState::Active { .. } => Phase::InForce,
        GrantState::Ending { .. } => Phase::Over,
        GrantState::Ended { .. }
        | GrantState::Denied { .. }
        | GrantState::Lapsed { .. }
        | GrantState::Cancelled { .. }
        | GrantState::Withdrawn { .. } => Phase::Final,
    };
    ensure!(phase == story.phase, "G11: the state is {phase:?}, the events say {:?}", story.phase);
    ensure!(phase != Phase::Requested, "a batch ends before policy has spoken");
    ensure!(grant.state.is_final() == (phase == Phase::Final), "G11: is_final says otherwise");
    ensure!(grant.votes == story.votes, "G3: votes that are not those on what stands");
    ensure!(grant.assessed == story.assessed && grant.request == story.request, "G3: another assessment");
    if let GrantState::Active { ends_at, .. } = grant.state {
        ensure!(Some(ends_at) == story.ends_at, "G10: the end has moved");
    }
    ensure!(grant.leases.len() == story.leases.len(), "a lease without an intent, or lost");
    for (id, lease) in &grant.leases {
        let told = story.leases.get(id).ok_or("a lease without an intent")?;
        told.agrees(lease, phase).map_err(|e| format!("{e} ({id})"))?;
    }
    Ok(())
}
