//! `cargo bench --bench trouble`: how fast it goes when things go wrong. Drives the release binary from another process, as
//! `cycle` does, beside what the machine itself can do in the same minutes, and writes target/bench/trouble.json.
//!
//! `COUNTERSIGN_RELEASE_BIN` names a binary that is built already; `COUNTERSIGN_BENCH_ONLY=w3,w5` picks parts;
//! `COUNTERSIGN_BENCH_SHARE=0.1` makes everything a tenth as large; `COUNTERSIGN_BENCH_OUTAGE_SECS` is how long W5's target
//! is gone (default 30). docs/benchmarks.md says what is measured how.

#[path = "trouble/bare.rs"]
mod bare;
#[path = "../tests/support/broker.rs"]
mod broker;
#[allow(dead_code)] // `cycle` uses the rest
#[path = "cycle/figures.rs"]
mod figures;
#[path = "cycle/http.rs"]
mod http;
#[allow(dead_code)] // `rebuild` uses the rest
#[path = "rebuild/journal.rs"]
mod journal;
#[allow(dead_code)] // `cycle` uses the rest
#[path = "cycle/limits.rs"]
mod limits;
#[path = "trouble/mass.rs"]
mod mass;
#[allow(dead_code)] // `cycle` uses the rest
#[path = "cycle/w1.rs"]
mod w1;
#[allow(dead_code)] // `cycle` uses the rest
#[path = "cycle/w2.rs"]
mod w2;
#[path = "trouble/w3.rs"]
mod w3;
#[path = "trouble/w4.rs"]
mod w4;
#[path = "trouble/w5.rs"]
mod w5;
#[path = "trouble/w6.rs"]
mod w6;
#[path = "trouble/w7.rs"]
mod w7;
#[path = "cycle/world.rs"]
mod world;

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use broker::postgres;
use serde_json::{Map, Value, json};

/// What can go wrong in a benchmark is only ever printed.
pub type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Outcome<()> {
    // `cargo test --benches` builds and starts it too: there is nothing to test.
    if !std::env::args().any(|a| a == "--bench") {
        println!("run it with `cargo bench --bench trouble`");
        return Ok(());
    }
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(run())
}

async fn run() -> Outcome<()> {
    let share: f64 = std::env::var("COUNTERSIGN_BENCH_SHARE").ok().and_then(|s| s.parse().ok()).unwrap_or(1.0);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)] // counts
    let of = |all: usize| ((all as f64 * share) as usize).max(20);
    let only = std::env::var("COUNTERSIGN_BENCH_ONLY").unwrap_or_default();
    let wanted = |part: &str| only.is_empty() || only.split(',').any(|p| p.trim() == part);
    let out = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target").join("bench");
    std::fs::create_dir_all(&out)?;
    let disk = limits::disk_of(&out)?;
    if disk["file_system"] == "tmpfs" {
        return Err("the data folder is on tmpfs: its syncs cost nothing, so nothing here would mean anything".into());
    }
    let outage = std::env::var("COUNTERSIGN_BENCH_OUTAGE_SECS").ok().and_then(|s| s.parse().ok()).unwrap_or(30);
    let outage = Duration::from_secs(outage);
    let binary = world::release_binary();
    let mut report = Map::new();
    report.insert("machine".to_owned(), limits::machine()?);
    report.insert("disk".to_owned(), disk);
    report.insert("share".to_owned(), json!(share));
    if wanted("w3") {
        say(&mut report, "w3_freeze", w3::run(&binary, &out.join("w3"), of(2_000)).await?);
    }
    if wanted("w4") {
        say(&mut report, "w4_expiry", w4::run(&binary, &out.join("w4"), of(2_800), of(100)).await?);
    }
    if wanted("w5") {
        say(&mut report, "w5_outage", w5::run(&binary, &out.join("w5"), of(200), outage).await?);
    }
    if wanted("w6") {
        say(&mut report, "w6_kill", w6::run(&binary, &out.join("w6"), of(50_000)).await?);
    }
    if wanted("w7") {
        let length = Duration::from_secs(10);
        say(&mut report, "w7_history", w7::run(&binary, &out.join("w7"), of(1_000_000), length).await?);
    }
    let file = out.join("trouble.json");
    std::fs::write(&file, serde_json::to_vec_pretty(&Value::Object(report))?)?;
    println!("written: {}", file.display());
    Ok(())
}

fn say(report: &mut Map<String, Value>, name: &str, value: Value) {
    println!("{name}: {value}");
    report.insert(name.to_owned(), value);
}
