//! "The broker may die at any moment": the real binary under SIGKILL, at each failpoint and at moments by chance, while
//! agents work against PostgreSQL, OpenBao and tokens. After each death the targets are looked at from outside and the
//! journal is read offline: no orphan, nothing acknowledged that is lost, nothing minted twice. `tests/crash` runs it.
#![allow(clippy::struct_field_names, clippy::match_same_arms, clippy::cast_precision_loss)] // a test's tables and rates

mod agents;
#[path = "../support/crash_broker.rs"]
mod broker;
mod bystanders;
mod ledger;
#[path = "../support/openbao.rs"]
mod openbao;
mod plan;
mod round;
mod seed;
mod targets;
mod truth;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use ledger::Ledger;
use round::Folder;

/// After so many cycles the broker has died at each failpoint: some are reached in one of many lives only.
const EACH_REACHED_CYCLES: u64 = 1000;

const HELP: &str = "\
The broker under SIGKILL. Goes on with the cycles that the results folder has.

  --cycles N     until there are N cycles in all (default 300)
  --jobs N       brokers at once, each with targets of its own (default 2)
  --round N      cycles on one data folder (default 150)
  --results DIR  where cycles.jsonl is, and is added to (default: a new folder, for this run alone)
  --seed N       of what agents do and where the broker dies (default: by chance)
";

struct Options {
    cycles: u64,
    jobs: u64,
    round: u64,
    results: Option<PathBuf>,
    seed: u64,
}

/// `None`: this isn't meant.
fn options() -> Result<Option<Options>, String> {
    let random = countersign::keys::random::random_bytes::<4>(&countersign::keys::random::SystemRandom);
    let mut options =
        Options { cycles: 300, jobs: 2, round: 150, results: None, seed: u32::from_be_bytes(random).into() };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value\n\n{HELP}"));
        let number = |text: String| text.parse::<u64>().map_err(|_| format!("{text} is no number\n\n{HELP}"));
        match arg.as_str() {
            "--cycles" => options.cycles = number(value()?)?,
            "--jobs" => options.jobs = number(value()?)?.max(1),
            "--round" => options.round = number(value()?)?.max(1),
            "--results" => options.results = Some(value()?.into()),
            "--seed" => options.seed = number(value()?)?,
            "--help" | "-h" => return Err(HELP.to_owned()),
            // As other tests are asked for: by a part of their name, or with options that mean nothing here.
            "--list" => return Ok(None),
            flag if flag.starts_with('-') => {}
            filter if "crash".contains(filter) => {}
            _ => return Ok(None),
        }
    }
    Ok(Some(options))
}

struct Run {
    options: Options,
    ledger: Mutex<Ledger>,
    /// Cycles that were begun or are done.
    taken: AtomicU64,
    skipped: AtomicBool,
}

impl Run {
    /// One broker after the other, until there are enough cycles.
    async fn job(&self, job: u64) {
        for round in 0.. {
            if self.taken.load(Ordering::SeqCst) >= self.options.cycles {
                return;
            }
            let Some(mut folder) = Folder::prepare(self.options.seed, job, round).await else {
                return self.skipped.store(true, Ordering::SeqCst);
            };
            for _ in 0..self.options.round {
                if self.taken.fetch_add(1, Ordering::SeqCst) >= self.options.cycles {
                    break;
                }
                let cycle = folder.cycle().await;
                for wrong in &cycle.wrong {
                    eprintln!("job {job} round {round} cycle {} ({}): {wrong}", cycle.nth, cycle.kill);
                }
                self.ledger.lock().unwrap().cycle(cycle);
            }
            let done = folder.settle().await;
            for wrong in &done.wrong {
                eprintln!("job {job} round {round}: {wrong}");
            }
            self.ledger.lock().unwrap().round(done);
        }
    }
}

fn main() -> std::process::ExitCode {
    let options = match options() {
        Ok(Some(options)) => options,
        Ok(None) => return std::process::ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("{text}");
            return std::process::ExitCode::FAILURE;
        }
    };
    let own = options.results.is_none().then(|| tempfile::tempdir().unwrap());
    let folder = options.results.clone().or_else(|| own.as_ref().map(|o| o.path().to_owned())).unwrap();
    let ledger = Ledger::open(&folder);
    let (before, seed, jobs) = (ledger.totals.cycles, options.seed, options.jobs);
    println!("\nrunning the broker under SIGKILL: {} cycles in {jobs} jobs, seed {seed}", options.cycles);
    let begun = Instant::now();
    let run = Arc::new(Run {
        options,
        ledger: Mutex::new(ledger),
        taken: AtomicU64::new(before),
        skipped: AtomicBool::new(false),
    });
    // A thread for each: what it starts is told to die with it.
    let threads: Vec<_> = (0..jobs)
        .map(|job| {
            let run = Arc::clone(&run);
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(run.job(job));
            })
        })
        .collect();
    let panicked = threads.into_iter().map(std::thread::JoinHandle::join).filter(Result::is_err).count();
    let ledger = run.ledger.lock().unwrap();
    let totals = &ledger.totals;
    let here = totals.cycles - before;
    let secs = begun.elapsed().as_secs_f64();
    if own.is_none() {
        println!("{}", ledger.path().display());
    }
    // Thousands fit.
    let rate = f64::from(u32::try_from(here).unwrap_or(u32::MAX)) / secs;
    println!("{totals}{here} cycles in {secs:.0} s: {rate:.2} a second");
    for wrong in &totals.wrong {
        println!("  {wrong}");
    }
    let never = totals.never();
    if !never.is_empty() {
        println!("the broker never died at: {}", never.join(", "));
    }
    if run.skipped.load(Ordering::SeqCst) {
        return std::process::ExitCode::SUCCESS;
    }
    // Enough cycles come by every place; one that they don't come by is no place.
    let all_reached = never.is_empty() || totals.cycles < EACH_REACHED_CYCLES;
    let ok = totals.wrong.is_empty() && panicked == 0 && all_reached;
    println!(
        "\ntest result: {}. {} passed; {} failed; 0 ignored",
        if ok { "ok" } else { "FAILED" },
        u8::from(ok),
        u8::from(!ok)
    );
    if ok { std::process::ExitCode::SUCCESS } else { std::process::ExitCode::FAILURE }
}
