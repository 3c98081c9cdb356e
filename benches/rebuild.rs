//! `cargo bench --bench rebuild`: how long a start takes on a long record, with the view as it was and without one. Makes
//! a journal of realistic grants by the production writer, opens the production store on it, and writes
//! target/bench/rebuild.json.
//!
//! `COUNTERSIGN_BENCH_EVENTS` is the journal's length (default 1 000 000).

#[path = "cycle/figures.rs"]
#[allow(dead_code)] // a part of it
mod figures;
#[path = "rebuild/journal.rs"]
mod journal;
#[path = "cycle/limits.rs"]
#[allow(dead_code)] // a part of it
mod limits;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use countersign::audit::verify::{Options, Report, verify};
use countersign::store::{Store, embedded};
use countersign::time::SystemClock;
use serde_json::{Map, Value, json};

/// What can go wrong in a benchmark is only ever printed.
pub type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Grants that go on at the journal's end.
const OPEN: u64 = 2_000;

fn main() -> Outcome<()> {
    // `cargo test --benches` builds and starts it too: there is nothing to test.
    if !std::env::args().any(|a| a == "--bench") {
        println!("run it with `cargo bench --bench rebuild`");
        return Ok(());
    }
    let events = std::env::var("COUNTERSIGN_BENCH_EVENTS").ok().and_then(|n| n.parse().ok()).unwrap_or(1_000_000);
    let out = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target").join("bench");
    let data = out.join("rebuild");
    if data.exists() {
        std::fs::remove_dir_all(&data)?;
    }
    std::fs::create_dir_all(&data)?;
    let mut report = Map::new();
    report.insert("machine".to_owned(), limits::machine()?);
    report.insert("disk".to_owned(), limits::disk_of(&out)?);
    let made = journal::make(&embedded::journal_dir(&data), journal::Length::Events(events), OPEN)?;
    say(
        &mut report,
        "journal",
        json!({ "events": made.events, "grants": made.grants, "open": made.open, "bytes": made.bytes }),
    );

    let begun = Instant::now();
    let Report::Verified(verified) = verify(&embedded::journal_dir(&data), &Options::default())? else {
        return Err("the journal doesn't verify".into());
    };
    say(&mut report, "audit_verify", rate(begun, verified.last_seq));

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let (first, rebuilt) = runtime.block_on(opened(&data, &made))?;
    if rebuilt != made.events {
        return Err(format!("{rebuilt} records were replayed").into());
    }
    say(&mut report, "start_without_a_view", first);
    let (current, replayed) = runtime.block_on(opened(&data, &made))?;
    if replayed != 0 {
        return Err(format!("{replayed} records were replayed").into());
    }
    say(&mut report, "start_with_the_view", current);
    say(&mut report, "peak_rss_mib", json!(figures::peak_rss_mib(std::process::id())?));
    std::fs::remove_dir_all(&data)?;
    let file = out.join("rebuild.json");
    std::fs::write(&file, serde_json::to_vec_pretty(&Value::Object(report))?)?;
    println!("written: {}", file.display());
    Ok(())
}

/// Opens the store, looks at what must be there, and closes it. Gives the figures and how many records were replayed.
async fn opened(data: &Path, made: &journal::Made) -> Outcome<(Value, u64)> {
    let begun = Instant::now();
    let (store, report) = embedded::open(data, Arc::new(SystemClock), None, Vec::new())?;
    let figures = rate(begun, report.records);
    let open = store.open_grants().await?.len() as u64;
    if report.records != made.events || open != made.open {
        return Err(format!("{} records and {open} open grants were found", report.records).into());
    }
    if store.grant(made.first).await?.is_none_or(|g| !g.state.is_final()) {
        return Err("the first grant is not as the journal says".into());
    }
    store.close().await?;
    Ok((figures, report.replayed))
}

fn rate(begun: Instant, events: u64) -> Value {
    let secs = begun.elapsed().as_secs_f64();
    #[allow(clippy::cast_precision_loss)] // a count
    let rate = events as f64 / secs;
    json!({ "secs": figures::round(secs), "events_per_sec": rate.round() })
}

fn say(report: &mut Map<String, Value>, name: &str, value: Value) {
    println!("{name}: {value}");
    report.insert(name.to_owned(), value);
}
