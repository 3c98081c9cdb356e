//! What is asked at the end of each history: final grants take nothing more, everything can be ended, and
//! the journal's text alone makes the same grants again.

use std::collections::BTreeMap;

use super::Checked;
use super::lease_story::lease_of;
use super::make::{deny_by_policy, end_cause, grant_id, lease_command, lease_id, person, report};
use super::steps::{IntendLie, LeaseAct};
use super::world::World;
use crate::core::decide::{Command, decide};
use crate::core::event::{Event, GrantEvent};
use crate::core::grant::{Grant, GrantState};
use crate::core::id::{GrantId, LeaseId, Timestamp};
use crate::core::lease::LeaseState;
use crate::core::vote::{Verdict, Vote};

const ACTS: [LeaseAct; 9] = [
    LeaseAct::Prepared,
    LeaseAct::Live { release: true },
    LeaseAct::Live { release: false },
    LeaseAct::NotMinted,
    LeaseAct::Unknown { secs: 0 },
    LeaseAct::Revoke,
    LeaseAct::Retry { secs: 0 },
    LeaseAct::Gone,
    LeaseAct::Attest,
];

/// Every command there is, as right as it can be made, on every grant that is over.
pub fn final_means_final(world: &mut World) -> Checked {
    let events = distinct_events(world)?;
    for id in world.order.clone() {
        let grant = world.grant(id).clone();
        if !grant.state.is_final() {
            continue;
        }
        for command in commands(world, &grant) {
            for now in [world.now, Timestamp(0), Timestamp(1 << 52)] {
                let events = decide(&grant, &command, now).unwrap_or_default();
                ensure!(events.is_empty(), "G11: {events:?} on a grant that is {}", grant.state.word());
            }
        }
        for event in &events {
            let mut slot = Some(grant.clone());
            let answer = Grant::apply(&mut slot, id, event, world.now);
            ensure!(answer.is_err(), "G11: {event:?} applies to a grant that is {}", grant.state.word());
            ensure!(slot.as_ref() == Some(&grant), "G11: a refused event changed the grant");
        }
    }
    Ok(())
}

fn commands(world: &mut World, grant: &Grant) -> Vec<Command> {
    let mut all = vec![Command::Tick, Command::Cancel, deny_by_policy(), report()];
    all.extend((0..10).map(|n| Command::Finish { cause: end_cause(n) }));
    if let Some(assessed) = &grant.assessed {
        all.push(Command::Reassess(Box::new(assessed.clone())));
        for verdict in [Verdict::Approve, Verdict::Deny] {
            let vote = Vote {
                person: person(5),
                account: "https://idp#10".into(),
                via: "browser".into(),
                verdict,
                digest: assessed.digest,
                reason: None,
                at: world.now,
            };
            let parent_ends_at = grant.request.parent.map(|_| Timestamp(1 << 52));
            all.push(Command::Vote { vote, excluded: [].into(), parent_ends_at });
        }
    }
    all.push(world.intend(grant.id, 0, 1, true, IntendLie::None));
    let leases = grant.leases.keys().copied().chain([lease_id(u64::MAX)]);
    all.extend(leases.flat_map(|lease| ACTS.map(|act| lease_command(lease, act, world.now))));
    all
}

/// One event of each kind and lease that the history holds.
fn distinct_events(world: &World) -> Result<Vec<GrantEvent>, String> {
    let mut distinct: BTreeMap<(&'static str, Option<LeaseId>), GrantEvent> = BTreeMap::new();
    for (_, text) in &world.journal {
        let (_, what) = read(text)?;
        distinct.insert((what.word(), lease_of(&what)), what);
    }
    Ok(distinct.into_values().collect())
}

fn read(text: &str) -> Result<(GrantId, GrantEvent), String> {
    match serde_json::from_str(text).map_err(|e| format!("{e}: {text}"))? {
        Event::Grant { id, what, .. } => Ok((id, *what)),
        other => Err(format!("not about a grant: {other:?}")),
    }
}

/// Guarantee 4, as far as the pure state goes: from wherever a history stopped, the drivers' own commands
/// (never the agent's) bring every grant to a final state.
pub fn everything_ends(world: &mut World) -> Checked {
    world.crash()?;
    world.now = Timestamp(1 << 52);
    for id in world.order.clone() {
        world.command(id, &Command::Tick)?;
        for lease in world.grant(id).open_leases().map(|l| l.intent.lease).collect::<Vec<_>>() {
            world.command(id, &lease_command(lease, LeaseAct::Retry { secs: 0 }, world.now))?;
            world.command(id, &lease_command(lease, LeaseAct::Gone, world.now))?;
        }
        let grant = world.grant(id);
        ensure!(grant.state.is_final(), "G4: {id} does not end: {:?}", grant.state);
    }
    Ok(())
}

/// Guarantee 8: nothing but the journal's text is needed, and the view's own text loses nothing.
pub fn replay_is_identical(world: &World) -> Checked {
    let mut again: BTreeMap<GrantId, Option<Grant>> = BTreeMap::new();
    for (at, text) in &world.journal {
        let (id, what) = read(text)?;
        Grant::apply(again.entry(id).or_default(), id, &what, *at).map_err(|e| format!("G8: {e}"))?;
    }
    ensure!(again == world.grants, "G8: the journal makes other grants");
    for grant in world.grants.values().flatten() {
        let text = serde_json::to_string(grant).map_err(|e| e.to_string())?;
        let back: Grant = serde_json::from_str(&text).map_err(|e| format!("{e}: {text}"))?;
        ensure!(back == *grant, "G8: the view reads back something else");
    }
    Ok(())
}

/// Guarantee 13: an event meets only the grant that it is about.
pub fn events_stay_at_home(world: &World) -> Checked {
    for grant in world.grants.values().flatten() {
        let live = grant.leases.values().find(|l| matches!(l.state, LeaseState::Live { .. }));
        let event = match (&grant.state, live) {
            (_, Some(l)) => GrantEvent::LeaseRevoking { lease: l.intent.lease, why: "other".into() },
            (GrantState::Active { .. }, _) => GrantEvent::Ending { cause: end_cause(0) },
            (GrantState::Pending { .. }, _) => GrantEvent::Cancelled,
            _ => continue,
        };
        let mut slot = Some(grant.clone());
        ensure!(
            Grant::apply(&mut slot, grant_id(77), &event, world.now).is_err() && slot.as_ref() == Some(grant),
            "G13: {event:?} of another grant changed {}",
            grant.id
        );
    }
    Ok(())
}
