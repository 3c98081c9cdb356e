//! Who and what the model is about: three grants on one resource, three persons, moments. Requests, assessments and
//! commands are made here, from the public API of `core` alone.

use std::collections::{BTreeMap, BTreeSet};

use countersign::core::decide::{Command, PolicySaid};
use countersign::core::digest::Digest;
use countersign::core::event::EndCause;
use countersign::core::id::{
    ActionName, AgentId, ConstraintName, GrantId, LeaseId, PersonId, ResourceName, TaskName, TierName, Timestamp,
};
use countersign::core::lease::{Evidence, LeaseIntent};
use countersign::core::permission::{Constraint, Permission};
use countersign::core::request::{AgentFacts, Approvable, Assessed, Request};
use countersign::core::revocability::{Revocability, RevocabilityMode};
use countersign::core::tier::{Friction, Tier};
use countersign::core::vote::{Verdict, Vote};

/// The grants of the model.
pub const GRANTS: usize = 3;
/// Needs two approvals.
pub const PARENT: usize = 0;
/// Another agent's, for the very same permission.
pub const OVERLAP: usize = 1;
/// Hangs from [`PARENT`]; asks for a part of it, for longer than it lasts.
pub const CHILD: usize = 2;
/// Leases that one grant can have, one after the other.
pub const SLOTS: usize = 2;
/// The persons. The first two are reviewers; the second answers for the second agent, the third for the first one.
pub const PERSONS: usize = 3;
/// So long is a mint under way at the longest, in ticks, once nobody waits for its answer any more.
pub const UNDER_WAY_TICKS: u8 = 1;

const NAMES: [&str; PERSONS] = ["ana", "ben", "own"];
const TICK_SECS: u64 = 10;
const START: Timestamp = Timestamp(1_000_000_000);

/// What is fixed about one grant.
pub struct Part {
    pub agent: usize,
    /// Who answers for that agent.
    pub owner: usize,
    /// Who else may not vote: they answer for an agent in the chain.
    pub chain_owner: Option<usize>,
    pub approvals: u8,
    /// How many rows: what was asked, and what a second assessment leaves of it.
    pub rows: [u64; 2],
    pub life_ticks: u8,
    /// The latest end, whenever it is activated.
    pub latest_end: u8,
}

pub const PARTS: [Part; GRANTS] = [
    Part { agent: 0, owner: 2, chain_owner: None, approvals: 2, rows: [100, 10], life_ticks: 2, latest_end: 4 },
    Part { agent: 1, owner: 1, chain_owner: None, approvals: 1, rows: [100, 10], life_ticks: 3, latest_end: 3 },
    Part { agent: 1, owner: 1, chain_owner: Some(2), approvals: 1, rows: [50, 5], life_ticks: 4, latest_end: 4 },
];
/// Nobody has decided by then: the request lapses.
pub const DECIDE_BY: u8 = 2;

/// The grant that one hangs from.
pub const fn parent_of(grant: usize) -> Option<usize> {
    if grant == CHILD { Some(PARENT) } else { None }
}

/// What hangs from a grant.
pub const fn child_of(grant: usize) -> Option<usize> {
    if grant == PARENT { Some(CHILD) } else { None }
}

/// The moment of a tick.
pub fn moment(tick: u8) -> Timestamp {
    START.plus_secs(u64::from(tick) * TICK_SECS)
}

/// The tick of a moment, rounded up.
pub fn tick_of(at: Timestamp) -> u8 {
    u8::try_from(at.ms_since(START).div_ceil(TICK_SECS * 1000)).unwrap_or(u8::MAX)
}

pub fn person(n: usize) -> PersonId {
    PersonId::new(NAMES[n]).expect("a plain name")
}

pub fn person_of(id: &PersonId) -> Option<usize> {
    NAMES.iter().position(|n| *n == id.as_str())
}

pub fn grant_id(grant: usize) -> GrantId {
    GrantId::from_bytes((grant as u128 + 1).to_be_bytes())
}

pub fn lease_id(grant: usize, slot: usize) -> LeaseId {
    LeaseId::from_bytes((100 + (grant * SLOTS + slot) as u128).to_be_bytes())
}

/// The slot of one of a grant's own leases.
pub fn slot_of(grant: usize, lease: LeaseId) -> Option<usize> {
    (0..SLOTS).find(|slot| lease_id(grant, *slot) == lease)
}

fn agent(n: usize) -> AgentId {
    AgentId::new(&format!("spiffe://corp/agent/{n}")).expect("a plain SPIFFE ID")
}

fn resource() -> ResourceName {
    ResourceName::new("postgres/billing").expect("a plain name")
}

fn rows(max: u64) -> Permission {
    Permission {
        resource: resource(),
        actions: BTreeSet::from([ActionName::new("read").expect("a plain name")]),
        constraints: BTreeMap::from([(ConstraintName::new("rows").expect("a plain name"), Constraint::Max(max))]),
    }
}

/// What an agent asks for.
pub fn request(grant: usize) -> Request {
    let part = &PARTS[grant];
    Request {
        agent: AgentFacts {
            id: agent(part.agent),
            name: "agent".into(),
            issuer: "spiffe://corp".into(),
            method: "x509-svid".into(),
            attributes: BTreeMap::new(),
            launcher: None,
            owner: Some(person(part.owner)),
            team: None,
        },
        task: TaskName::new("task").expect("a plain name"),
        intent: "words of the agent".into(),
        permissions: vec![rows(part.rows[0])],
        life_secs: u64::from(part.life_ticks) * TICK_SECS,
        parent: parent_of(grant).map(grant_id),
        chain: parent_of(grant).map(|p| agent(PARTS[p].agent)).into_iter().collect(),
        // That who answers for the parent's agent is excluded too is the core's own work.
        excluded_voters: BTreeSet::new(),
        heartbeat_secs: None,
        confirmation: None,
        idempotency: None,
        content: Digest::of_bytes(b"content"),
    }
}

/// What policy says of it: the first time, or when it is asked again and leaves fewer rows.
pub fn assessed(grant: usize, which: usize) -> Assessed {
    let (part, asked) = (&PARTS[grant], request(grant));
    let approvable = Approvable {
        grant: grant_id(grant),
        agent: asked.agent.id,
        owner: asked.agent.owner,
        chain: asked.chain,
        permissions: vec![rows(part.rows[which])],
        life_secs: asked.life_secs,
        latest_end: moment(part.latest_end),
        tier: Tier {
            name: TierName::new("tier").expect("a plain name"),
            approvals: part.approvals,
            life_secs_max: 1000,
            friction: Friction::One,
        },
        targets: BTreeMap::from([(resource(), Digest::of_bytes(b"target"))]),
        revocability: vec![Revocability {
            mode: RevocabilityMode::Immediate,
            residual_secs: 0,
            says: "cut at once".into(),
        }],
        sentence: format!("up to {} rows", part.rows[which]),
    };
    let digest = approvable.digest().expect("small integers");
    let decide_by = moment(DECIDE_BY);
    Assessed { approvable, digest, reasons: Vec::new(), policy_version: "v1".into(), decide_by }
}

/// Why a grant is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Why {
    Completed,
    ParentEnded,
    Frozen,
}

/// What somebody wants of one grant, in the model's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Wish {
    Reassess,
    /// About the `on.1`-th assessment of the grant `on.0`.
    Vote {
        person: usize,
        approve: bool,
        on: (usize, usize),
        parent_ends_at: Option<u8>,
    },
    Cancel,
    /// What the `on`-th assessment says; `ticks` is the credential's life.
    Intend {
        slot: usize,
        on: usize,
        ticks: u8,
    },
    Prepared {
        slot: usize,
    },
    Live {
        slot: usize,
        release: bool,
    },
    NotMinted {
        slot: usize,
    },
    Unknown {
        slot: usize,
    },
    Revoke {
        slot: usize,
    },
    Retry {
        slot: usize,
    },
    /// `of` is the grant whose lease it is.
    Gone {
        of: usize,
        slot: usize,
    },
    Finish(Why),
    Tick,
}

/// The digests that votes and mints are about.
pub struct Cast {
    pub assessed: [[Assessed; 2]; GRANTS],
}

impl Cast {
    pub fn new() -> Self {
        Self { assessed: std::array::from_fn(|g| std::array::from_fn(|which| assessed(g, which))) }
    }

    /// Which of a grant's assessments has this digest.
    pub fn which(&self, grant: usize, digest: Digest) -> Option<usize> {
        self.assessed[grant].iter().position(|a| a.digest == digest)
    }

    pub fn permitted(&self, grant: usize) -> PolicySaid {
        PolicySaid::Permitted(Box::new(self.assessed[grant][0].clone()))
    }

    /// The production command that says the same.
    pub fn command(&self, grant: usize, wish: Wish, now: Timestamp) -> Command {
        let why = "because".to_owned();
        let handle = serde_json::json!({"oid": 16_384});
        let id = |slot| lease_id(grant, slot);
        match wish {
            Wish::Reassess => Command::Reassess(Box::new(self.assessed[grant][1].clone())),
            Wish::Vote { person: n, approve, on, parent_ends_at } => Command::Vote {
                vote: Vote {
                    person: person(n),
                    account: format!("https://idp#{n}"),
                    via: "browser".into(),
                    verdict: if approve { Verdict::Approve } else { Verdict::Deny },
                    digest: self.assessed[on.0][on.1].digest,
                    reason: None,
                    at: now,
                },
                excluded: BTreeSet::new(),
                parent_ends_at: parent_ends_at.map(moment),
            },
            Wish::Cancel => Command::Cancel,
            Wish::Intend { slot, on, ticks } => {
                let about = &self.assessed[grant][on];
                let intent = LeaseIntent {
                    lease: id(slot),
                    grant: grant_id(grant),
                    name: format!("cs_{grant}_{slot}"),
                    target: resource(),
                    permission: about.approvable.permissions[0].clone(),
                    intended_at: now,
                    lifetime_secs: u64::from(ticks) * TICK_SECS,
                };
                Command::Intend { intents: vec![intent], digest: about.digest }
            }
            Wish::Prepared { slot } => Command::Prepared { lease: id(slot), handle },
            Wish::Live { slot, release } => Command::Live { lease: id(slot), handle, not_after: None, release },
            Wish::NotMinted { slot } => Command::NotMinted { lease: id(slot), why },
            Wish::Unknown { slot } => {
                let not_before = now.plus_secs(u64::from(UNDER_WAY_TICKS) * TICK_SECS);
                Command::Unknown { lease: id(slot), why, handle: None, not_before }
            }
            Wish::Revoke { slot } => Command::RevokeLease { lease: id(slot), why },
            Wish::Retry { slot } => Command::Retry { lease: id(slot), why, next_try: now },
            Wish::Gone { of, slot } => {
                let evidence = Evidence::TargetSaysGone { detail: "no such role".into() };
                Command::Gone { lease: lease_id(of, slot), evidence, seen: Vec::new(), access_cut_ms: None }
            }
            Wish::Finish(why) => Command::Finish {
                cause: match why {
                    Why::Completed => EndCause::Completed,
                    Why::ParentEnded => EndCause::ParentEnded,
                    Why::Frozen => EndCause::Frozen { id: 7 },
                },
            },
            Wish::Tick => Command::Tick,
        }
    }
}
