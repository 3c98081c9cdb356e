//! Runs the simulation: `cargo run --release --example sim -- --seeds 10000`. What the seeds mean, and what to do with
//! one that fails, is in `docs/simulation.md`.

#[path = "../tests/sim/mod.rs"]
mod sim;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use parking_lot::Mutex;
use sim::runner::{Sum, many, source};

/// Runs the broker under a simulated clock, disk, network and targets, one schedule a seed.
#[derive(Parser)]
struct Args {
    /// How many seeds.
    #[arg(long, default_value_t = 1_000)]
    seeds: u64,
    /// The first of them; else where the file of `--add-to` ends, or 1.
    #[arg(long)]
    from: Option<u64>,
    /// Replays one seed and tells what happens in it.
    #[arg(long, conflicts_with_all = ["seeds", "from", "add_to", "mutations"])]
    seed: Option<u64>,
    /// So many nodes on one database, instead of one process on its disk.
    #[arg(long, default_value_t = 0, conflicts_with = "mutations")]
    nodes: usize,
    /// Stops after so many seconds.
    #[arg(long, default_value_t = u64::MAX / 2)]
    budget_secs: u64,
    /// A file in which runs add up, over as many days as it takes.
    #[arg(long)]
    add_to: Option<PathBuf>,
    /// Breaks the broker in each of the known ways, and looks whether that is found within so many seeds. Needs the
    /// feature `mutations`.
    #[arg(long)]
    mutations: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    sim::notice_panics();
    if let Some(seed) = args.seed {
        tracing_subscriber::fmt().without_time().with_max_level(tracing::Level::INFO).init();
        let outcome = sim::run_of(args.nodes, seed, true);
        println!("{outcome:#?}");
        return if outcome.violation.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    }
    if args.mutations {
        return mutations(args.from.unwrap_or(1), args.seeds);
    }
    let sum = match args.add_to.as_deref().map_or(Ok(Sum::default()), Sum::load) {
        Ok(sum) => Mutex::new(sum),
        Err(why) => {
            eprintln!("the sum so far can't be read: {why}; move the file away to begin anew");
            return ExitCode::FAILURE;
        }
    };
    let (first, before) = {
        let sum = sum.lock();
        (args.from.unwrap_or_else(|| sum.next_seed.max(1)), sum.seeds)
    };
    // What was built, not what is there when the seeds are through.
    let source = source();
    let nodes = if args.nodes > 0 { format!("--nodes {} ", args.nodes) } else { String::new() };
    many(args.nodes, first, args.seeds, Duration::from_secs(args.budget_secs), false, &sum, &|outcome, sum| {
        if let Some(violation) = &outcome.violation {
            println!("seed {}: {violation}", outcome.seed);
            println!("  again: cargo run --release --example sim -- {nodes}--seed {}", outcome.seed);
        }
        if sum.seeds.is_multiple_of(1_000) {
            println!("{} seeds, {} violations", sum.seeds, sum.violations.len());
        }
    });
    let mut sum = sum.into_inner();
    let seeds = sum.seeds - before;
    sum.ran_on(source, seeds);
    println!("{}", serde_json::to_string_pretty(&sum).unwrap_or_default());
    if let Some(Err(why)) = args.add_to.as_deref().map(|file| sum.save(file)) {
        eprintln!("the sum can't be kept: {why}");
        return ExitCode::FAILURE;
    }
    if sum.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(feature = "mutations")]
fn mutations(first: u64, seeds: u64) -> ExitCode {
    let missed = sim::mutations::missed(first, seeds);
    if missed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(not(feature = "mutations"))]
fn mutations(_: u64, _: u64) -> ExitCode {
    eprintln!(
        "this build has no faults to find: cargo run --release --features mutations --example sim -- --mutations"
    );
    ExitCode::FAILURE
}
