//! Where the broker dies: each failpoint in turn, in an order by the seed, and between them any moment.

use std::collections::VecDeque;
use std::time::Duration;

use countersign::failpoint::Point;

use crate::seed::Seed;

/// Kills of a hundred at a moment that nobody chose.
const AT_RANDOM_PERCENT: u64 = 20;
/// Of those, so many of a hundred come while it starts, the others while agents are at work.
const AT_START_PERCENT: u64 = 20;
/// And within this.
const RANDOM_MS: u64 = 400;
/// How often the point where most can be lost is visited for one visit of another.
const MADE_WEIGHT: usize = 6;

/// In half of the deaths at a failpoint, the other threads go on for up to so long.
const PAUSE_MS: u64 = 40;

/// How one life of the broker ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kill {
    /// By itself, when it comes there for the nth time and has stood still for so long, while its other threads go on.
    At(Point, u64, Duration),
    /// From outside, so long after its start.
    AtStart(Duration),
    /// From outside, so long after it was ready.
    AtWork(Duration),
}

impl Kill {
    /// `mint-made#2`, or `random`.
    pub fn name(self) -> String {
        match self {
            Self::At(point, nth, pause) => format!("{}#{nth}+{}ms", point.name(), pause.as_millis()),
            Self::AtStart(_) | Self::AtWork(_) => "random".to_owned(),
        }
    }

    /// As the crate `fail` reads it.
    pub fn failpoints(self) -> Option<String> {
        match self {
            Self::At(point, 1, pause) => Some(format!("{}=return({})", point.name(), pause.as_millis())),
            Self::At(point, nth, pause) => {
                Some(format!("{}={}*off->return({})", point.name(), nth - 1, pause.as_millis()))
            }
            Self::AtStart(_) | Self::AtWork(_) => None,
        }
    }

    /// Something of ours, that no lease explains, is put at the target before.
    pub const fn wants_orphan(self) -> bool {
        matches!(self, Self::At(Point::SweepFound | Point::SweepEnded | Point::SweepTold, ..))
    }

    /// How long it is waited for, once the agents are done.
    pub const fn patience(self) -> Duration {
        match self {
            // The archive is given something twice a second.
            Self::At(Point::ArchiveKeep | Point::ArchivePart | Point::ArchiveKept | Point::ArchiveEvicted, ..) => {
                Duration::from_millis(1500)
            }
            Self::At(..) => Duration::from_millis(400),
            Self::AtStart(after) | Self::AtWork(after) => after,
        }
    }
}

/// Kills without end.
#[derive(Debug, Default)]
pub struct Kills {
    next: VecDeque<Kill>,
}

impl Kills {
    pub fn next(&mut self, seed: &mut Seed) -> Kill {
        if seed.percent(AT_RANDOM_PERCENT) {
            let at_start = seed.percent(AT_START_PERCENT);
            let after = Duration::from_millis(seed.below(RANDOM_MS));
            return if at_start { Kill::AtStart(after) } else { Kill::AtWork(after) };
        }
        if self.next.is_empty() {
            let mut all = Point::ALL.to_vec();
            all.extend([Point::MintMade; MADE_WEIGHT - 1]);
            seed.shuffle(&mut all);
            for point in all {
                // Some are reached only after another kill.
                match point {
                    Point::TornKept | Point::TornCut => self.next.push_back(nth(Point::AppendTorn, seed)),
                    Point::StartDoubted => self.next.push_back(Kill::At(Point::MintMade, 1, Duration::ZERO)),
                    _ => {}
                }
                self.next.push_back(nth(point, seed));
            }
        }
        self.next.pop_front().expect("there is a failpoint")
    }
}

/// How often the broker comes by before it dies: not more often than it does in most lives.
fn nth(point: Point, seed: &mut Seed) -> Kill {
    let most = match point {
        Point::AppendChecked
        | Point::AppendQueued
        | Point::AppendWrite
        | Point::AppendTorn
        | Point::AppendWritten
        | Point::AppendSynced
        | Point::AppendHead
        | Point::AppendAnswered
        | Point::ViewApply
        | Point::ViewApplied => 16,
        Point::MintAsked
        | Point::MintIntended
        | Point::ReleaseReady
        | Point::ReleaseAnswer
        | Point::EndDecided
        | Point::EndRecorded
        | Point::RevokeDue
        | Point::RevokeAsk => 3,
        Point::MintMade | Point::MintLive | Point::RevokeProven | Point::RevokeRecorded | Point::SweepListed => 2,
        _ => 1,
    };
    let pause = if seed.percent(50) { Duration::ZERO } else { Duration::from_millis(seed.below(PAUSE_MS)) };
    Kill::At(point, 1 + seed.below(most), pause)
}
