//! Many seeds on all cores, with a budget of time, and a file in which runs add up.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{Outcome, run_of};

/// What runs so far add up to.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sum {
    pub seeds: u64,
    pub violations: Vec<(u64, String)>,
    pub wall_secs: u64,
    pub broker_runs: u64,
    pub grants: u64,
    pub minted: u64,
    pub handed_over: u64,
    pub orphans_ended: u64,
    pub votes: u64,
    /// The next run goes on here.
    pub next_seed: u64,
    /// How many of the seeds ran on which state of the source, oldest first.
    #[serde(default)]
    pub sources: Vec<Source>,
}

/// Seeds that ran on one state of the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// What git calls the tree `src/`, so it stays the same however commits are rearranged; with `+` if there were changes
    /// beyond it.
    pub src: String,
    pub seeds: u64,
}

/// What git calls `src/` as it is now.
pub fn source() -> String {
    let git = |args: &[&str]| {
        let out = Command::new("git").args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output().ok()?;
        out.status.success().then(|| String::from_utf8_lossy(&out.stdout).trim().to_owned())
    };
    let tree = git(&["rev-parse", "--short=12", "HEAD:src"]).unwrap_or_else(|| "unknown".to_owned());
    let is_clean = git(&["status", "--porcelain", "--", "src"]).is_some_and(|changes| changes.is_empty());
    if is_clean { tree } else { tree + "+" }
}

impl Sum {
    fn add(&mut self, outcome: &Outcome) {
        self.seeds += 1;
        self.broker_runs += u64::from(outcome.runs);
        self.grants += outcome.counts.granted;
        self.minted += outcome.counts.minted;
        self.handed_over += outcome.counts.handed_over;
        self.orphans_ended += outcome.counts.orphans;
        self.votes += outcome.counts.votes;
        if let Some(violation) = &outcome.violation {
            self.violations.push((outcome.seed, violation.clone()));
        }
    }

    /// So many more of the seeds ran on this state of the source.
    pub fn ran_on(&mut self, src: String, seeds: u64) {
        match self.sources.last_mut() {
            Some(last) if last.src == src => last.seeds += seeds,
            _ => self.sources.push(Source { src, seeds }),
        }
    }

    /// What an earlier run left, or nothing.
    pub fn load(file: &Path) -> Result<Self, String> {
        match std::fs::read(file) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| format!("{}: {e}", file.display())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(format!("{}: {e}", file.display())),
        }
    }

    pub fn save(&self, file: &Path) -> Result<(), String> {
        let new = file.with_extension("new");
        let text = serde_json::to_vec_pretty(self).map_err(|e| e.to_string())?;
        std::fs::write(&new, text)
            .and_then(|()| std::fs::rename(&new, file))
            .map_err(|e| format!("{}: {e}", file.display()))
    }
}

/// Runs `count` seeds of schedules with so many nodes (0: one process on its disk) from `first` on, as many at once as there are cores, until all are through, the time is up, or,
/// with `stops`, the first violation. Each result is told as it comes.
pub fn many(
    nodes: usize,
    first: u64,
    count: u64,
    budget: Duration,
    stops: bool,
    sum: &Mutex<Sum>,
    tell: &(dyn Fn(&Outcome, &Sum) + Sync),
) {
    let (next, found, begun) = (AtomicU64::new(0), AtomicBool::new(false), Instant::now());
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while begun.elapsed() < budget && !(stops && found.load(SeqCst)) {
                    let n = next.fetch_add(1, SeqCst);
                    if n >= count {
                        return;
                    }
                    let outcome = run_of(nodes, first.wrapping_add(n), false);
                    found.fetch_or(outcome.violation.is_some(), SeqCst);
                    let mut sum = sum.lock();
                    sum.add(&outcome);
                    tell(&outcome, &sum);
                }
            });
        }
    });
    let mut sum = sum.lock();
    sum.wall_secs += begun.elapsed().as_secs();
    sum.next_seed = first.wrapping_add(next.load(SeqCst).min(count));
}
