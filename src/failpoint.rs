//! Places where a test kills the broker: at every boundary of what must survive a crash. One list; what ships has none
//! of them (feature `failpoints`, which only test builds turn on).
//!
//! Armed by the crate `fail`'s own variable: `FAILPOINTS="mint-made=2*off->return"` ends the process by SIGKILL when
//! it comes there for the third time; with `return(20)`, the thread stands still for 20 ms before that and all others go
//! on, so that what should have waited for it shows. `tests/sigkill` does that for each of them.

macro_rules! points {
    ($($(#[doc = $says:literal])+ $point:ident = $name:literal,)+) => {
        /// Every failpoint.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Point {
            $($(#[doc = $says])+ $point,)+
        }

        impl Point {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$point),+];

            /// As `FAILPOINTS` names it.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$point => $name,)+
                }
            }
        }
    };
}

points! {
    /// A credential is asked for; nothing is recorded of it.
    MintAsked = "mint-asked",
    /// A credential that the broker makes by itself is made, in memory.
    MintLocal = "mint-local",
    /// The intents are durable; no target was asked.
    MintIntended = "mint-intended",
    /// The target made the handle by which everything ends; it is not recorded.
    MintHandle = "mint-handle",
    /// The handle is durable; the secret wasn't asked for.
    MintPrepared = "mint-prepared",
    /// The credential exists at the target; the record has its intent alone.
    MintMade = "mint-made",
    /// The lease is durable as live; the secret is in the broker.
    MintLive = "mint-live",
    /// All credentials of a grant are live; the answer isn't written.
    ReleaseReady = "release-ready",
    /// The answer with the secrets is written; it hasn't left.
    ReleaseAnswer = "release-answer",
    /// An ending is decided; nothing of it is recorded.
    EndDecided = "end-decided",
    /// The ending is durable; nobody was told.
    EndRecorded = "end-recorded",
    /// The driver has leases that are due.
    RevokeDue = "revoke-due",
    /// The target is about to be asked to end leases.
    RevokeAsk = "revoke-ask",
    /// A lease in doubt is about to be looked for.
    RevokeDoubtful = "revoke-doubtful",
    /// The target has ended it; the proof isn't recorded.
    RevokeProven = "revoke-proven",
    /// The proof is durable.
    RevokeRecorded = "revoke-recorded",
    /// An attempt that failed is durable.
    RevokeRetry = "revoke-retry",
    /// A sweep has its list of what is at the target.
    SweepListed = "sweep-listed",
    /// A sweep found what no lease explains, and hasn't touched it.
    SweepFound = "sweep-found",
    /// It is ended; nobody was told.
    SweepEnded = "sweep-ended",
    /// It is ended, and on record.
    SweepTold = "sweep-told",
    /// The start of the run is durable; what the last one left is as it was.
    StartRecorded = "start-recorded",
    /// One lease that the last run left half-way is in doubt, durably; others may not be.
    StartDoubted = "start-doubted",
    /// All that the last run left is settled; no request was taken yet.
    StartSettled = "start-settled",
    /// A batch is checked; it isn't in the log's queue.
    AppendChecked = "append-checked",
    /// A batch is in the log's queue.
    AppendQueued = "append-queued",
    /// The writer is about to write a group.
    AppendWrite = "append-write",
    /// Half of a group is written.
    AppendTorn = "append-torn",
    /// A group is written and not synced.
    AppendWritten = "append-written",
    /// A group is synced; the head doesn't say so.
    AppendSynced = "append-synced",
    /// The head says so; nobody was answered.
    AppendHead = "append-head",
    /// Everybody was answered.
    AppendAnswered = "append-answered",
    /// A durable batch isn't in the view.
    ViewApply = "view-apply",
    /// It is in the view; whoever waits for it wasn't told.
    ViewApplied = "view-applied",
    /// A new segment is complete, and not under its name.
    RotateMade = "rotate-made",
    /// It has its name; the folder isn't synced.
    RotateNamed = "rotate-named",
    /// It counts; the old one isn't ended.
    RotateOpened = "rotate-opened",
    /// The old one is ended; the head isn't synced.
    RotateEnded = "rotate-ended",
    /// The head is synced.
    RotateDone = "rotate-done",
    /// A torn tail is kept in a file of its own, and not cut.
    TornKept = "torn-kept",
    /// It is cut.
    TornCut = "torn-cut",
    /// A checkpoint is written; the head doesn't know it.
    CheckpointWritten = "checkpoint-written",
    /// The archive is about to be given a snapshot.
    ArchiveKeep = "archive-keep",
    /// It has all of the snapshot but its position.
    ArchivePart = "archive-part",
    /// It has the snapshot; nothing left memory.
    ArchiveKept = "archive-kept",
    /// What it keeps has left memory.
    ArchiveEvicted = "archive-evicted",
}

/// The broker comes by. Nothing, unless a test armed this point: then this was the last that it did.
#[inline]
pub fn at(point: Point) {
    last(point, || ());
}

/// The same, with something that is done only in the moment before the end.
#[inline]
#[cfg_attr(not(feature = "failpoints"), allow(unused_variables))]
pub fn last(point: Point, deed: impl FnOnce()) {
    #[cfg(feature = "failpoints")]
    armed::last(point, deed);
}

/// Length of a segment of the journal, if a test wants another than the store's, in bytes: `COUNTERSIGN_SEGMENT_BYTES`.
pub fn segment_bytes() -> Option<u64> {
    #[cfg(feature = "failpoints")]
    return armed::number("COUNTERSIGN_SEGMENT_BYTES");
    #[cfg(not(feature = "failpoints"))]
    None
}

#[cfg(feature = "failpoints")]
pub use armed::arm;

#[cfg(feature = "failpoints")]
mod armed {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use rustix::process::{Signal, getpid, kill_process};

    use super::Point;

    /// Whether any point may be armed: a test build that nobody kills asks nothing else.
    static ARMED: AtomicBool = AtomicBool::new(false);

    /// Arms what `FAILPOINTS` says, for as long as the process lives.
    ///
    /// # Panics
    /// If it names a point that isn't there: a test that kills at no place would show nothing.
    pub fn arm() {
        let Ok(text) = std::env::var("FAILPOINTS") else { return };
        for name in text.split(';').filter_map(|one| one.split_once('=')).map(|(name, _)| name.trim()) {
            assert!(Point::ALL.iter().any(|p| p.name() == name), "FAILPOINTS names {name}, which is no failpoint");
        }
        std::mem::forget(fail::FailScenario::setup());
        ARMED.store(true, Ordering::Release);
    }

    pub(super) fn last(point: Point, deed: impl FnOnce()) {
        if ARMED.load(Ordering::Acquire)
            && let Some(pause) = hit(point)
        {
            deed();
            std::thread::sleep(pause);
            die();
        }
    }

    /// If this is the end: for how long the thread stands still before.
    fn hit(point: Point) -> Option<Duration> {
        fail::fail_point!(point.name(), |ms| {
            Some(Duration::from_millis(ms.and_then(|ms| ms.parse().ok()).unwrap_or_default()))
        });
        None
    }

    /// As a crash would have it: no destructor, no answer, nothing flushed.
    fn die() -> ! {
        let _ = kill_process(getpid(), Signal::KILL);
        loop {
            // The signal is on its way; nothing after this line may happen.
            std::thread::park();
        }
    }

    pub(super) fn number(variable: &str) -> Option<u64> {
        std::env::var(variable).ok()?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;

    fn sources(folder: &Path, out: &mut String) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, out);
            } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("src/failpoint.rs") {
                out.push_str(&std::fs::read_to_string(&path).unwrap());
            }
        }
    }

    /// That each place is in the list is the compiler's to say.
    #[test]
    fn each_point_of_the_list_is_one_place_in_the_source() {
        let mut all = String::new();
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut all);
        let mut times: BTreeMap<&str, usize> = BTreeMap::new();
        for rest in all.split("Point::").skip(1) {
            let end = rest.find(|c: char| !c.is_alphanumeric()).unwrap_or(rest.len());
            *times.entry(&rest[..end]).or_default() += 1;
        }
        for point in Point::ALL {
            assert_eq!(times.get(format!("{point:?}").as_str()), Some(&1), "{point:?}");
        }
        let names: std::collections::BTreeSet<_> = Point::ALL.iter().map(|p| p.name()).collect();
        assert_eq!(names.len(), Point::ALL.len());
    }
}
