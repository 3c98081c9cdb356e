//! What a history is made of: steps as plain data, so that a failing history shrinks to a few of them.
//! Numbers are indices that `world` resolves against what is there.

use proptest::prelude::*;

/// Something that is tried.
#[derive(Debug, Clone)]
pub enum Step {
    /// A new request.
    Ask(Ask),
    /// Policy is asked again.
    Reassess { who: usize, plan: Plan },
    /// Policy is asked again and says no.
    DenyByPolicy { who: usize },
    /// Somebody votes, through one of two accounts.
    Vote { who: usize, account: usize, approve: bool, on: VoteOn },
    /// Time is looked at by one grant, or by all.
    Tick { who: Option<usize> },
    /// The clock moves, forwards or backwards.
    Time { ms: i64 },
    /// The clock moves to where one grant's time is up, or to one millisecond beside it.
    Until { who: usize, ms: i64 },
    /// The directory changes its mind about a person.
    Directory { person: usize, excluded: bool },
    /// A target's configuration changes.
    Target { resource: usize },
    /// A grant is ended.
    Finish { who: usize, cause: usize },
    /// The agent takes it back.
    Cancel { who: usize },
    /// Credentials are about to be minted for the permissions from `from`, `count` of them.
    Intend { who: usize, from: usize, count: usize, brief: bool, lie: IntendLie },
    /// Something happens to a lease.
    Lease { who: usize, which: usize, act: LeaseAct },
    /// The agent reports.
    Report { who: usize },
    /// The broker dies and starts again: what was on its way is unknown.
    Crash,
}

/// A new request.
#[derive(Debug, Clone)]
pub struct Ask {
    pub agent: usize,
    pub parent: Option<usize>,
    pub other_parent: bool,
    pub from_parent: bool,
    pub permissions: Vec<usize>,
    pub life_secs: u64,
    pub deny: bool,
    pub plan: Plan,
}

/// What policy makes of a request.
#[derive(Debug, Clone)]
pub struct Plan {
    pub approvals: u8,
    pub shave: bool,
    pub latest_secs: u64,
    pub decide_secs: u64,
    pub lie: AssessLie,
}

/// How an assessment is not about the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AssessLie {
    None,
    Wider,
    OtherGrant,
    OtherAgent,
    OtherOwner,
    OtherDigest,
    Longer,
    NoTargets,
    NoRevocability,
}

/// What a vote is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VoteOn {
    Standing,
    Earlier,
    Twin,
}

/// How an intent is not what was approved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IntendLie {
    None,
    Digest,
    Permission,
    Wider,
    TooLong,
    NoLife,
    OldLease,
    OldName,
    OtherGrant,
    OtherTime,
    Twice,
}

/// Something that happens to a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseAct {
    Prepared,
    Live { release: bool },
    NotMinted,
    Unknown { secs: u64 },
    Revoke,
    Retry { secs: u64 },
    Gone,
    Attest,
}

fn index() -> impl Strategy<Value = usize> {
    0usize..64
}

fn plan() -> impl Strategy<Value = Plan> {
    use AssessLie::{
        Longer, NoRevocability, NoTargets, None as Honest, OtherAgent, OtherDigest, OtherGrant, OtherOwner, Wider,
    };
    let lies = vec![Wider, OtherGrant, OtherAgent, OtherOwner, OtherDigest, Longer, NoTargets, NoRevocability];
    let lie = prop_oneof![9 => Just(Honest), 1 => prop::sample::select(lies)];
    let approvals = prop_oneof![6 => Just(0u8), 6 => Just(1), 6 => Just(2), 1 => Just(9)];
    let latest = prop::sample::select(vec![0, 40, 900, 9_000, 90_000, 90_000, 90_000, 90_000, 90_000, 90_000]);
    (approvals, any::<bool>(), latest, prop::sample::select(vec![0u64, 60, 600, 600, 600, 6000, 6000]), lie).prop_map(
        |(approvals, shave, latest_secs, decide_secs, lie)| Plan { approvals, shave, latest_secs, decide_secs, lie },
    )
}

fn ask() -> impl Strategy<Value = Ask> {
    let lives = vec![0, 30, 600, 600, 3600, 3600, 7200, 7200, 7200, (1 << 53) - 1, u64::MAX];
    (
        prop_oneof![3 => Just(0usize), 3 => Just(1), 1 => Just(2)],
        prop::option::weighted(0.75, index()),
        prop::bool::weighted(0.04),
        prop::bool::weighted(0.85),
        prop::collection::vec(index(), 1..3),
        prop::sample::select(lives),
        prop::bool::weighted(0.05),
        plan(),
    )
        .prop_map(|(agent, parent, other_parent, from_parent, permissions, life_secs, deny, plan)| Ask {
            agent,
            parent,
            other_parent,
            from_parent,
            permissions,
            life_secs,
            deny,
            plan,
        })
}

fn intend_lie() -> impl Strategy<Value = IntendLie> {
    use IntendLie::{
        Digest, NoLife, None as Honest, OldLease, OldName, OtherGrant, OtherTime, Permission, TooLong, Twice, Wider,
    };
    let lies = vec![Digest, Permission, Wider, TooLong, NoLife, OldLease, OldName, OtherGrant, OtherTime, Twice];
    prop_oneof![3 => Just(Honest), 1 => prop::sample::select(lies)]
}

fn lease_act() -> impl Strategy<Value = LeaseAct> {
    let secs = || prop::sample::select(vec![0u64, 20, 120]);
    prop_oneof![
        2 => Just(LeaseAct::Prepared),
        6 => prop::bool::weighted(0.8).prop_map(|release| LeaseAct::Live { release }),
        1 => Just(LeaseAct::NotMinted),
        3 => secs().prop_map(|secs| LeaseAct::Unknown { secs }),
        2 => Just(LeaseAct::Revoke),
        2 => secs().prop_map(|secs| LeaseAct::Retry { secs }),
        3 => Just(LeaseAct::Gone),
        2 => Just(LeaseAct::Attest),
    ]
}

fn time() -> impl Strategy<Value = i64> {
    prop_oneof![
        16 => 1i64..30_000,
        3 => 30_000i64..700_000,
        1 => 700_000i64..8_000_000,
        3 => -120_000i64..0,
        1 => Just(-8_000_000i64),
    ]
}

/// One step, weighted so that histories get somewhere.
pub fn step() -> impl Strategy<Value = Step> {
    let on = prop_oneof![8 => Just(VoteOn::Standing), 1 => Just(VoteOn::Earlier), 1 => Just(VoteOn::Twin)];
    prop_oneof![
        10 => ask().prop_map(Step::Ask),
        3 => (index(), plan()).prop_map(|(who, plan)| Step::Reassess { who, plan }),
        1 => index().prop_map(|who| Step::DenyByPolicy { who }),
        16 => (index(), 0usize..12, prop::bool::weighted(0.93), on)
            .prop_map(|(who, account, approve, on)| Step::Vote { who, account, approve, on }),
        2 => prop::option::of(index()).prop_map(|who| Step::Tick { who }),
        1 => (index(), -1i64..=1).prop_map(|(who, ms)| Step::Until { who, ms }),
        6 => time().prop_map(|ms| Step::Time { ms }),
        2 => (0usize..6, prop::bool::weighted(0.4)).prop_map(|(person, excluded)| Step::Directory { person, excluded }),
        1 => (0usize..2).prop_map(|resource| Step::Target { resource }),
        2 => (index(), 0usize..9).prop_map(|(who, cause)| Step::Finish { who, cause }),
        1 => index().prop_map(|who| Step::Cancel { who }),
        10 => (index(), index(), 1usize..3, any::<bool>(), intend_lie())
            .prop_map(|(who, from, count, brief, lie)| Step::Intend { who, from, count, brief, lie }),
        16 => (index(), index(), lease_act()).prop_map(|(who, which, act)| Step::Lease { who, which, act }),
        1 => index().prop_map(|who| Step::Report { who }),
        1 => Just(Step::Crash),
    ]
}
