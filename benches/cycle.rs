//! `cargo bench --bench cycle`: how fast the main job goes, end to end. Drives the release binary from another process
//! over real TLS, beside what the machine itself can do in the same minutes, and writes target/bench/cycle.json.
//!
//! `COUNTERSIGN_RELEASE_BIN` names a binary that is built already; `COUNTERSIGN_BENCH_ONLY=w1,w2,nodes` picks parts;
//! `COUNTERSIGN_BENCH_SECS` is the length of one measurement (default 10). docs/benchmarks.md says what is measured how.

#[path = "cycle/bare.rs"]
mod bare;
#[path = "cycle/figures.rs"]
mod figures;
#[path = "cycle/http.rs"]
mod http;
#[path = "cycle/limits.rs"]
mod limits;
#[path = "cycle/nodes.rs"]
mod nodes;
#[path = "../tests/support/postgres.rs"]
mod postgres;
#[path = "cycle/w1.rs"]
mod w1;
#[path = "cycle/w2.rs"]
mod w2;
#[path = "cycle/world.rs"]
mod world;

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value, json};

/// What can go wrong in a benchmark is only ever printed.
pub type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Agents at once, where it is not one.
const AGENTS: usize = 16;
/// Cycles before anything is counted.
const WARM_UP: usize = 20;
/// Cycles of one agent alone: enough for a 99th percentile.
const ALONE_CYCLES: usize = 300;

fn main() -> Outcome<()> {
    // `cargo test --benches` builds and starts it too: there is nothing to test.
    if !std::env::args().any(|a| a == "--bench") {
        println!("run it with `cargo bench --bench cycle`");
        return Ok(());
    }
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(run())
}

async fn run() -> Outcome<()> {
    let secs = std::env::var("COUNTERSIGN_BENCH_SECS").ok().and_then(|s| s.parse().ok()).unwrap_or(10);
    let length = Duration::from_secs(secs);
    let only = std::env::var("COUNTERSIGN_BENCH_ONLY").unwrap_or_default();
    let wanted = |part: &str| only.is_empty() || only.split(',').any(|p| p.trim() == part);
    let out = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target").join("bench");
    std::fs::create_dir_all(&out)?;
    let disk = limits::disk_of(&out)?;
    println!("data folder: {} on {}", out.display(), disk["file_system"]);
    if disk["file_system"] == "tmpfs" {
        return Err("the data folder is on tmpfs: its syncs cost nothing, so nothing here would mean anything".into());
    }
    let binary = world::release_binary();
    let mut report = Map::new();
    report.insert("machine".to_owned(), limits::machine()?);
    report.insert("disk".to_owned(), disk);
    report.insert("length_secs".to_owned(), json!(secs));
    if wanted("limits") {
        say(&mut report, "appends_1", limits::appends(&out, 1, length.min(Duration::from_secs(3)))?);
        say(&mut report, "appends_16", limits::appends(&out, AGENTS, length.min(Duration::from_secs(3)))?);
    }
    if wanted("w1") {
        let world = world::World::start(&binary, &out.join("w1"), None).await?;
        say(&mut report, "w1_start", world.started());
        w1::run(std::slice::from_ref(&world), AGENTS, w1::Stop::Cycles(WARM_UP)).await?;
        say(&mut report, "w1_16", w1::run(std::slice::from_ref(&world), AGENTS, w1::Stop::After(length)).await?);
        // The same folder again: what it costs to come back to a journal with all of that in it.
        let world = world.restart().await?;
        say(&mut report, "w1_restart", world.started());
        world.stop().await?;
    }
    if wanted("w2") {
        let target = w2::Target::start()?;
        say(&mut report, "postgresql", target.settings().await?);
        let world = world::World::start(&binary, &out.join("w2"), Some(&target)).await?;
        say(&mut report, "w2_start", world.started());
        w2::run(std::slice::from_ref(&world), &target, AGENTS, w2::Session::Open, w1::Stop::Cycles(WARM_UP)).await?;
        let alone = w1::Stop::Cycles(ALONE_CYCLES);
        say(&mut report, "w2_1", w2::run(std::slice::from_ref(&world), &target, 1, w2::Session::Open, alone).await?);
        say(&mut report, "bare_1", bare::run(&target, 1, w2::Session::Open, alone).await?);
        for (session, ours, theirs) in
            [(w2::Session::Open, "w2_16", "bare_16"), (w2::Session::Closed, "w2_16_closed", "bare_16_closed")]
        {
            let stop = w1::Stop::After(length);
            say(&mut report, ours, w2::run(std::slice::from_ref(&world), &target, AGENTS, session, stop).await?);
            say(&mut report, theirs, bare::run(&target, AGENTS, session, stop).await?);
            let rate = |name: &str| report[name]["rate_per_sec"].as_f64().unwrap_or_default();
            let ratio = figures::round(rate(theirs) / rate(ours));
            report.insert(format!("{ours}_bare_over_ours"), json!(ratio));
            println!("{ours}: the bare statements are {ratio} times as fast");
        }
        world.stop().await?;
        say(&mut report, "left_at_target", target.left().await?);
    }
    if wanted("nodes") {
        nodes::run(&binary, &out.join("nodes"), length, &mut |name, value| say(&mut report, name, value)).await?;
    }
    let file = out.join("cycle.json");
    std::fs::write(&file, serde_json::to_vec_pretty(&Value::Object(report))?)?;
    println!("written: {}", file.display());
    Ok(())
}

fn say(report: &mut Map<String, Value>, name: &str, value: Value) {
    println!("{name}: {value}");
    report.insert(name.to_owned(), value);
}
