//! Attacks that were thought of, one by one: what a caller, a race or a crash might try on the core.

use super::make::{end_cause, lease_command, lease_id, person};
use super::steps::{Ask, AssessLie, IntendLie, LeaseAct, Plan, Step, VoteOn};
use super::world::World;
use crate::core::decide::{self, Command, PolicySaid, Refusal, decide};
use crate::core::digest::INTEGER_MAX;
use crate::core::event::{EndCause, GrantEvent};
use crate::core::grant::{Grant, GrantState};
use crate::core::id::{GrantId, LeaseId, Timestamp};
use crate::core::lease::{Absence, LeaseState, OPEN_LEASES_MAX};

fn plan(approvals: u8) -> Plan {
    Plan { approvals, shave: false, latest_secs: 7200, decide_secs: 600, lie: AssessLie::None }
}

/// Agent 0 (owner `ana`, launched by `eve`) asks for everything at `pg`.
fn ask(world: &mut World, approvals: u8, parent: Option<usize>, agent: usize) -> GrantId {
    let ask = Ask {
        agent,
        parent,
        other_parent: false,
        from_parent: parent.is_some(),
        permissions: vec![0],
        life_secs: 3600,
        deny: false,
        plan: plan(approvals),
    };
    world.step(&Step::Ask(ask)).unwrap();
    *world.order.last().unwrap()
}

/// A vote to approve what stands, through the first account of `PERSONS[voter]`.
fn approve(world: &World, id: GrantId, voter: usize) -> Result<Vec<GrantEvent>, Refusal> {
    let grant = world.grant(id);
    decide(grant, &world.vote(grant, 2 * voter, true, VoteOn::Standing), world.now)
}

fn must(world: &mut World, id: GrantId, command: &Command) {
    decide(world.grant(id), command, world.now).unwrap();
    world.command(id, command).unwrap();
}

/// Intends one lease and says which.
fn intend(world: &mut World, id: GrantId) -> LeaseId {
    let command = world.intend(id, 0, 1, false, IntendLie::None);
    must(world, id, &command);
    let Command::Intend { intents, .. } = command else { unreachable!("made above") };
    intents[0].lease
}

fn act(world: &mut World, id: GrantId, lease: LeaseId, act: LeaseAct) {
    let command = lease_command(lease, act, world.now);
    must(world, id, &command);
}

#[test]
fn no_approval_is_needed_only_where_the_tier_says_so() {
    let mut world = World::new();
    let automatic = ask(&mut world, 0, None, 0);
    assert!(matches!(world.grant(automatic).state, GrantState::Active { .. }));
    // Agent 2 has nobody who answers for it: automatic is the only tier that it can reach.
    let ownerless = ask(&mut world, 0, None, 2);
    assert!(matches!(world.grant(ownerless).state, GrantState::Active { .. }));
    let count = world.order.len();
    ask(&mut world, 1, None, 2);
    assert_eq!(world.order.len(), count, "recorded though nobody answers for the agent");
}

#[test]
fn more_approvals_than_there_are_persons_lapse() {
    let mut world = World::new();
    let id = ask(&mut world, u8::MAX, None, 0);
    for account in 0..12 {
        let command = world.vote(world.grant(id), account, true, VoteOn::Standing);
        world.command(id, &command).unwrap();
    }
    // Six persons with two accounts each, less the owner and the launcher.
    assert_eq!(world.grant(id).votes.len(), 4);
    assert!(matches!(world.grant(id).state, GrantState::Pending { .. }));
    world.now = world.now.plus_secs(600);
    must(&mut world, id, &Command::Tick);
    assert!(matches!(world.grant(id).state, GrantState::Lapsed { .. }));
}

#[test]
fn an_approval_counts_no_more_once_its_giver_is_excluded() {
    let mut world = World::new();
    let id = ask(&mut world, 2, None, 0);
    let cy = world.vote(world.grant(id), 6, true, VoteOn::Standing);
    must(&mut world, id, &cy);
    world.excluded_now.insert(person(3));
    let dee = world.vote(world.grant(id), 8, true, VoteOn::Standing);
    must(&mut world, id, &dee);
    assert!(matches!(world.grant(id).state, GrantState::Pending { .. }), "cy is excluded: dee is one person");
    let fay = world.vote(world.grant(id), 10, true, VoteOn::Standing);
    must(&mut world, id, &fay);
    assert!(matches!(world.grant(id).state, GrantState::Active { .. }));
}

#[test]
fn nobody_of_the_chain_votes_though_the_broker_forgot_to_exclude_them() {
    let mut world = World::new();
    ask(&mut world, 0, None, 0);
    let child = ask(&mut world, 1, Some(0), 1);
    for (voter, who) in [(0, "the parent's owner"), (1, "the owner"), (2, "the parent's launcher")] {
        assert!(matches!(approve(&world, child, voter), Err(Refusal::Excluded { .. })), "{who} voted");
    }
    assert!(approve(&world, child, 3).is_ok());
}

#[test]
fn a_child_does_not_come_into_force_after_its_parents_end() {
    let mut world = World::new();
    let parent = ask(&mut world, 0, None, 0);
    let child = ask(&mut world, 1, Some(0), 1);
    let end = world.grant(parent).ends_at().unwrap();
    let mut late = world.grant(child).clone();
    late.state = GrantState::Pending { decide_by: end.plus_secs(600) };
    let vote = world.vote(&late, 6, true, VoteOn::Standing);
    // The parent is overdue, but nobody has recorded that yet.
    assert!(matches!(decide(&late, &vote, end), Err(Refusal::NotNarrower { .. })));
    assert!(decide(&late, &vote, Timestamp(end.0 - 1)).is_ok());
    // Nor without anybody having looked at the parent.
    let Command::Vote { vote, excluded, .. } = vote else { unreachable!("made above") };
    let blind = Command::Vote { vote, excluded, parent_ends_at: None };
    assert!(matches!(decide(&late, &blind, world.now), Err(Refusal::NotNarrower { .. })));
}

#[test]
fn a_grant_is_not_its_own_parent() {
    let mut world = World::new();
    let id = ask(&mut world, 0, None, 0);
    let grant = world.grant(id).clone();
    let mut request = grant.request.clone();
    request.parent = Some(id);
    let verdict = PolicySaid::Permitted(Box::new(world.assess(id, &request, &plan(0))));
    let refused = decide::request(id, request, Some(&grant), verdict, world.now);
    assert!(matches!(refused, Err(Refusal::NotNarrower { .. })));
}

#[test]
fn a_life_of_nothing_or_of_for_ever_is_not_approvable() {
    let mut world = World::new();
    let id = ask(&mut world, 1, None, 0);
    let grant = world.grant(id).clone();
    let request = |life_secs| crate::core::request::Request { life_secs, ..grant.request.clone() };
    let new = GrantId::from_bytes([9; 16]);
    let try_life = |life_secs: u64, tier_max: u64, latest_end: Timestamp| {
        let mut assessed = world.assess(new, &request(u64::MAX), &plan(1));
        assessed.approvable.life_secs = life_secs;
        assessed.approvable.tier.life_secs_max = tier_max;
        assessed.approvable.latest_end = latest_end;
        assessed.digest = assessed.approvable.digest().unwrap_or(assessed.digest);
        decide::request(new, request(u64::MAX), None, PolicySaid::Permitted(Box::new(assessed)), world.now)
    };
    let later = world.now.plus_secs(60);
    assert!(try_life(60, 60, later).is_ok());
    assert_eq!(try_life(0, 60, later), Err(Refusal::NotApproved));
    assert_eq!(try_life(61, 60, later), Err(Refusal::NotApproved));
    assert_eq!(try_life(60, 60, world.now), Err(Refusal::NotApproved));
    assert_eq!(try_life(u64::MAX, u64::MAX, later), Err(Refusal::NotApproved));
    assert_eq!(try_life(60, 60, Timestamp(u64::MAX)), Err(Refusal::NotApproved));
    assert!(try_life(INTEGER_MAX, INTEGER_MAX, Timestamp(INTEGER_MAX)).is_ok());
}

#[test]
fn what_could_never_be_in_force_any_more_lapses() {
    let mut world = World::new();
    let id = ask(&mut world, 1, None, 0);
    let mut grant = world.grant(id).clone();
    let latest_end = grant.assessed.as_ref().unwrap().approvable.latest_end;
    grant.state = GrantState::Pending { decide_by: latest_end.plus_secs(600) };
    let vote = world.vote(&grant, 6, true, VoteOn::Standing);
    assert_eq!(decide(&grant, &vote, latest_end).unwrap(), [GrantEvent::Lapsed]);
}

#[test]
fn of_two_who_decide_at_once_one_is_refused() {
    let mut world = World::new();
    let id = ask(&mut world, 1, None, 0);
    let grant = world.grant(id).clone();
    let vote = world.vote(&grant, 6, true, VoteOn::Standing);
    let deny = world.vote(&grant, 8, false, VoteOn::Standing);
    let revoked = Command::Finish { cause: end_cause(3) };
    let all = [vote, deny, Command::Cancel, revoked, super::make::deny_by_policy()];
    for first in &all {
        for second in &all {
            let mut slot = Some(grant.clone());
            let both = [first, second].map(|c| decide(&grant, c, world.now).unwrap());
            for event in &both[0] {
                Grant::apply(&mut slot, id, event, world.now).unwrap();
            }
            // Without the store's compare-and-set, the state machine still takes only one of them.
            assert!(Grant::apply(&mut slot, id, &both[1][0], world.now).is_err(), "{first:?} then {second:?}");
        }
    }
}

#[test]
fn a_mint_that_was_on_its_way_at_the_end_and_at_a_crash_is_still_ended() {
    let mut world = World::new();
    let id = ask(&mut world, 0, None, 0);
    let lease = intend(&mut world, id);
    must(&mut world, id, &Command::Finish { cause: EndCause::Completed });
    assert!(matches!(world.grant(id).state, GrantState::Ending { .. }), "ended with a lease on its way");
    // Nothing may be said of it while its outcome isn't known, and nothing makes it live again.
    let gone = lease_command(lease, LeaseAct::Gone, world.now);
    assert_eq!(decide(world.grant(id), &gone, world.now), Err(Refusal::NoLease));
    world.crash().unwrap();
    assert_eq!(decide(world.grant(id), &gone, world.now), Err(Refusal::NoLease), "looked for while it may be made");
    // Found alive: known now, never handed over, and to be ended.
    act(&mut world, id, lease, LeaseAct::Live { release: true });
    assert!(matches!(world.grant(id).leases[&lease].state, LeaseState::Revoking { .. }));
    act(&mut world, id, lease, LeaseAct::Gone);
    assert!(matches!(world.grant(id).state, GrantState::Ended { .. }));
}

#[test]
fn absence_is_proven_only_after_the_longest_mint() {
    let mut world = World::new();
    let id = ask(&mut world, 0, None, 0);
    let lease = intend(&mut world, id);
    act(&mut world, id, lease, LeaseAct::Unknown { secs: 120 });
    let not_before = world.now.plus_secs(120);
    world.now = world.now.plus_secs(1);
    // A try that failed does not bring the moment nearer.
    act(&mut world, id, lease, LeaseAct::Retry { secs: 0 });
    let LeaseState::Unknown { progress, .. } = &world.grant(id).leases[&lease].state else { panic!("not unknown") };
    assert_eq!(progress.next_try, Some(not_before));
    let gone = lease_command(lease, LeaseAct::Gone, world.now);
    assert_eq!(decide(world.grant(id), &gone, Timestamp(not_before.0 - 1)), Err(Refusal::NoLease));
    world.now = not_before;
    must(&mut world, id, &gone);
    let state = &world.grant(id).leases[&lease].state;
    assert!(matches!(state, LeaseState::Absent { absence: Absence::Proven { .. }, .. }), "{state:?}");
}

#[test]
fn doubt_from_the_future_is_dated_anew_and_no_other() {
    let mut world = World::new();
    let id = ask(&mut world, 0, None, 0);
    let lease = intend(&mut world, id);
    act(&mut world, id, lease, LeaseAct::Unknown { secs: 120 });
    // As time goes on, nobody brings the moment nearer.
    let anew = lease_command(lease, LeaseAct::Unknown { secs: 5 }, world.now);
    assert_eq!(decide(world.grant(id), &anew, world.now), Err(Refusal::NoLease));
    // Later it may be: the clock leapt, and a mint may be under way still.
    let later = lease_command(lease, LeaseAct::Unknown { secs: 121 }, world.now);
    assert!(decide(world.grant(id), &later, world.now).is_ok());
    // The clock was set back: what was noticed in ten years is looked for soon.
    let back = Timestamp(world.now.0 - 1_000);
    let anew = lease_command(lease, LeaseAct::Unknown { secs: 5 }, back);
    let mut after = Some(world.grant(id).clone());
    for event in decide(world.grant(id), &anew, back).unwrap() {
        Grant::apply(&mut after, id, &event, back).unwrap();
    }
    let state = &after.unwrap().leases[&lease].state;
    let LeaseState::Unknown { since, not_before, progress, .. } = state else { panic!("{state:?}") };
    assert_eq!((*since, *not_before, progress.next_try), (back, back.plus_secs(5), Some(back.plus_secs(5))));
}

#[test]
fn an_answer_that_meets_the_deadline_is_not_a_release() {
    let mut world = World::new();
    let id = ask(&mut world, 0, None, 0);
    let lease = intend(&mut world, id);
    let live = lease_command(lease, LeaseAct::Live { release: true }, world.now);
    world.now = world.grant(id).ends_at().unwrap();
    // First the deadline alone: a caller that hands over on any `Ok` would be wrong.
    let first = decide(world.grant(id), &live, world.now).unwrap();
    assert_eq!(first, [GrantEvent::Ending { cause: EndCause::Expired }]);
    world.command(id, &live).unwrap();
    assert!(matches!(world.grant(id).leases[&lease].state, LeaseState::Revoking { .. }));
}

#[test]
fn a_lease_on_its_way_is_not_revoked_in_silence() {
    let mut world = World::new();
    let id = ask(&mut world, 0, None, 0);
    let lease = intend(&mut world, id);
    let revoke = lease_command(lease, LeaseAct::Revoke, world.now);
    assert_eq!(decide(world.grant(id), &revoke, world.now), Err(Refusal::NoLease));
}

#[test]
fn a_name_at_the_target_is_used_once() {
    let mut world = World::new();
    let id = ask(&mut world, 0, None, 0);
    let lease = intend(&mut world, id);
    act(&mut world, id, lease, LeaseAct::Unknown { secs: 0 });
    let same_name = world.intend(id, 0, 1, false, IntendLie::OldName);
    assert_eq!(decide(world.grant(id), &same_name, world.now), Err(Refusal::LeaseExists));
    intend(&mut world, id);
}

#[test]
fn replacing_for_ever_does_not_pile_up_credentials() {
    let mut world = World::new();
    let id = ask(&mut world, 0, None, 0);
    for _ in 0..OPEN_LEASES_MAX {
        let lease = intend(&mut world, id);
        act(&mut world, id, lease, LeaseAct::Unknown { secs: 20 });
    }
    let one_more = world.intend(id, 0, 1, false, IntendLie::None);
    let refused = decide(world.grant(id), &one_more, world.now);
    assert!(matches!(refused, Err(Refusal::Limit { max: OPEN_LEASES_MAX, .. })), "{refused:?}");
    assert_eq!(world.grant(id).open_leases().count(), OPEN_LEASES_MAX);
    // One proof makes room for one.
    world.now = world.now.plus_secs(20);
    act(&mut world, id, lease_id(1), LeaseAct::Gone);
    intend(&mut world, id);
}

#[test]
fn reports_have_a_limit_and_end_with_the_grant() {
    let mut world = World::new();
    let id = ask(&mut world, 0, None, 0);
    for _ in 0..3 {
        must(&mut world, id, &super::make::report());
    }
    let refused = decide(world.grant(id), &super::make::report(), world.now);
    assert!(matches!(refused, Err(Refusal::Limit { max: 3, .. })), "{refused:?}");
    must(&mut world, id, &Command::Finish { cause: EndCause::Completed });
    let refused = decide(world.grant(id), &super::make::report(), world.now);
    assert_eq!(refused, Err(Refusal::State { state: "ended" }));
}

#[test]
fn a_persons_word_ends_only_what_was_tried_in_vain_and_is_no_evidence() {
    let mut world = World::new();
    let id = ask(&mut world, 0, None, 0);
    let lease = intend(&mut world, id);
    let refused = |world: &World, when: &str| {
        let attest = lease_command(lease, LeaseAct::Attest, world.now);
        assert_eq!(decide(world.grant(id), &attest, world.now), Err(Refusal::NotResisting), "{when}");
    };
    refused(&world, "intended");
    act(&mut world, id, lease, LeaseAct::Live { release: true });
    refused(&world, "live");
    must(&mut world, id, &Command::Finish { cause: EndCause::Completed });
    refused(&world, "not tried yet");
    act(&mut world, id, lease, LeaseAct::Retry { secs: 0 });
    act(&mut world, id, lease, LeaseAct::Attest);
    let grant = world.grant(id);
    assert!(matches!(grant.state, GrantState::Ended { .. }), "{:?}", grant.state);
    let LeaseState::Absent { absence: Absence::Attested { by, .. }, .. } = &grant.leases[&lease].state else {
        panic!()
    };
    assert_eq!(*by, super::make::person(5));
    assert!(!serde_json::to_string(grant).unwrap().contains("evidence"));
    // A proof that comes afterwards changes nothing, and a person's word has no other way into the record.
    assert_eq!(decide(grant, &lease_command(lease, LeaseAct::Gone, world.now), world.now), Ok(Vec::new()));
    let mut world = World::new();
    let id = ask(&mut world, 0, None, 0);
    let lease = intend(&mut world, id);
    let absence = Absence::Attested { by: super::make::person(5), reason: "because".into() };
    let event = GrantEvent::LeaseAbsent { lease, absence, seen: Vec::new() };
    Grant::apply(&mut Some(world.grant(id).clone()), id, &event, world.now).unwrap_err();
}

#[test]
fn what_may_still_be_on_its_way_is_not_attested_away() {
    let mut world = World::new();
    let id = ask(&mut world, 0, None, 0);
    let lease = intend(&mut world, id);
    act(&mut world, id, lease, LeaseAct::Unknown { secs: 120 });
    act(&mut world, id, lease, LeaseAct::Retry { secs: 0 });
    let attest = lease_command(lease, LeaseAct::Attest, world.now);
    assert_eq!(decide(world.grant(id), &attest, world.now), Err(Refusal::NotResisting));
    world.now = world.now.plus_secs(120);
    act(&mut world, id, lease, LeaseAct::Attest);
}
