//! Deliberate faults, one at a time, to show that the simulator finds them. They exist with the feature `mutations`
//! alone, which nothing but that demonstration has; without it, [`Mutation::is_on`] is a constant `false`.

/// A fault. Each breaks a promise that is easy to break by mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Mutation {
    /// A credential is asked for before its intent is durable (guarantee 1).
    MintBeforeIntent = 1,
    /// A secret leaves before its lease is durable as live (guarantee 2).
    ReleaseBeforeAppend,
    /// An ending that failed isn't tried again (guarantee 4).
    ForgetToRetry,
    /// An ending is given up after a few attempts (guarantee 4).
    GiveUp,
    /// Targets aren't swept.
    NoSweep,
    /// The wall clock decides when a grant expires (guarantee 10).
    ExpiryOnWallClock,
    /// A vote counts whatever digest it is about (guarantee 3).
    VoteNotBound,
    /// One person may vote as often as they like (guarantee 6).
    SamePersonTwice,
    /// An ending without an answer counts as proven (guarantee 5).
    EvidenceAssumed,
    /// A mint without an answer counts as failed (guarantee 5).
    UnknownIsFailed,
    /// A lease in doubt is looked for while its mint may still be under way.
    LookTooEarly,
    /// What a run left half-minted is forgotten at the next start.
    ForgetIntended,
    /// The journal answers before its data is synced (guarantee 8).
    AckBeforeSync,
    /// A batch stays although what it rests on was refused.
    KeepWhatRestsOnRefused,
    /// Children don't end with their parent (guarantee 7).
    ChildrenLiveOn,
    /// What was handed over is minted and handed over again, unasked.
    HandOverTwice,
    /// A sweep takes credentials that leases explain (guarantee 13).
    SweepEverything,
    /// A clock that was set back isn't noticed at the start of a run.
    SetBackUnnoticed,
    /// The owner of an agent may vote on its requests (guarantee 6).
    OwnerVotes,
    /// What another node wrote meanwhile is taken in, and what was decided before that is written as it was (guarantee 11).
    NoCompareAndSet,
    /// A run that was declared over writes on.
    StaleRunWrites,
    /// A write whose answer was lost counts as recorded (guarantee 8).
    LostIsRecorded,
    /// What other nodes wrote isn't looked for before a request is served.
    ReadsAreStale,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Self; 23] = [
        Self::MintBeforeIntent,
        Self::ReleaseBeforeAppend,
        Self::ForgetToRetry,
        Self::GiveUp,
        Self::NoSweep,
        Self::ExpiryOnWallClock,
        Self::VoteNotBound,
        Self::SamePersonTwice,
        Self::EvidenceAssumed,
        Self::UnknownIsFailed,
        Self::LookTooEarly,
        Self::ForgetIntended,
        Self::AckBeforeSync,
        Self::KeepWhatRestsOnRefused,
        Self::ChildrenLiveOn,
        Self::HandOverTwice,
        Self::SweepEverything,
        Self::SetBackUnnoticed,
        Self::OwnerVotes,
        Self::NoCompareAndSet,
        Self::StaleRunWrites,
        Self::LostIsRecorded,
        Self::ReadsAreStale,
    ];

    /// Can only several nodes show it?
    pub const fn needs_nodes(self) -> bool {
        matches!(self, Self::NoCompareAndSet | Self::StaleRunWrites | Self::LostIsRecorded | Self::ReadsAreStale)
    }
}

#[cfg(feature = "mutations")]
mod active {
    use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

    static ACTIVE: AtomicU8 = AtomicU8::new(0);

    impl super::Mutation {
        /// Is the broker broken in this way?
        pub fn is_on(self) -> bool {
            ACTIVE.load(Relaxed) == self as u8
        }
        /// Breaks the broker in this way, for the whole process; `None` mends it.
        pub fn set(mutation: Option<Self>) {
            ACTIVE.store(mutation.map_or(0, |m| m as u8), Relaxed);
        }
    }
}

#[cfg(not(feature = "mutations"))]
impl Mutation {
    /// Is the broker broken in this way? Never: the feature isn't there.
    pub const fn is_on(self) -> bool {
        false
    }
}
