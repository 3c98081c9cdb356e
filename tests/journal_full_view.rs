//! "The disk was full for a moment": a limit on file sizes meets the real broker's view, and is lifted. The broker goes on
//! by itself, forgets nothing, and takes an undamaged view for what it is.

#[path = "support/crash_broker.rs"]
mod broker;

use std::path::Path;

use broker::{Serving, Setup, notes, until};
use rustix::process::{Resource, Rlimit, prlimit};

/// Between what the limit must let through and where it must meet the view.
const MARGIN_BYTES: u64 = 64 * 1024;

fn limit(serving: &Serving, current: Option<u64>) {
    prlimit(Some(serving.pid()), Resource::Fsize, Rlimit { current, maximum: None }).unwrap();
}

/// Where the last byte that is not zero stands.
fn used(path: &Path) -> u64 {
    std::fs::read(path).unwrap_or_default().iter().rposition(|b| *b != 0).map_or(0, |at| at as u64 + 1)
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // figures
async fn figure(serving: &Serving, name: &str) -> u64 {
    let url = format!("http://127.0.0.1:{}/metrics", serving.ports.metrics);
    let text = serving.http.get(url).send().await.unwrap().text().await.unwrap();
    let line = text.lines().find(|l| l.contains(&format!("figure=\"{name}\"")));
    line.and_then(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).map_or(0, |v| v as u64)
}

/// One small job; false if it didn't go through.
async fn work(serving: &Serving, task: &str) -> bool {
    let agent = serving.agent("a");
    let asked = agent.ask(task, 300, notes()).await;
    let Some(id) = asked.json["id"].as_str() else { return false };
    agent.collect(id).await.status == 200
        && agent
            .try_call("POST", &format!("/v1/grants/{id}/complete"), Some(serde_json::json!({})))
            .await
            .is_ok_and(|a| a.status == 200)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_moment_without_space_is_over_when_there_is_space_again() {
    let mut serving = Serving::prepare(|_, _| Setup::default());
    // A write beyond the limit is an error like that of a full disk, not a signal.
    serving.spawn_under(&["/usr/bin/env", "--ignore-signal=XFSZ"]);
    serving.ready().await;
    let view = serving.data().join("view").join("db");
    let segment = serving.journal_dir().join("journal-00000000000000000001.seg");
    let logs = serving.file("stderr.log");
    let mut n = 0;
    // The limit must meet the view alone: so long until the view's file is well ahead of the journal and the log.
    let floor = || used(&segment).max(used(&logs)) + 2 * MARGIN_BYTES;
    while used(&view) < floor() {
        assert!(n < 400, "the view's file has {} bytes used, wanted {}", used(&view), floor());
        n += 1;
        assert!(work(&serving, &format!("T-{n}")).await);
    }
    until("all is kept", broker::PATIENCE, async || figure(&serving, "view_waiting").await == 0).await;

    limit(&serving, Some(floor() - MARGIN_BYTES));
    until("the view meets the limit", broker::PATIENCE, async || {
        n += 1;
        work(&serving, &format!("T-{n}")).await;
        serving.log().contains("the view is closed for a moment")
    })
    .await;
    assert!(figure(&serving, "view_waiting").await > 0, "what could not be kept is in memory");
    limit(&serving, None);

    until("jobs go through again", broker::PATIENCE, async || {
        n += 1;
        work(&serving, &format!("T-{n}")).await
    })
    .await;
    assert!(serving.log().contains("the view is open again"));
    for _ in 0..5 {
        n += 1;
        assert!(work(&serving, &format!("T-{n}")).await);
    }
    until("what is over leaves memory", broker::PATIENCE, async || {
        figure(&serving, "grants_final_in_memory").await == 0 && figure(&serving, "grants_open").await == 0
    })
    .await;
    assert!(!serving.data().join("view.damaged").exists(), "nothing was damaged");
    let (before, granted) = (serving.log().len(), serving.record().grants.len());
    serving.stop().await;
    serving.up().await;
    let log = serving.log().split_off(before);
    assert!(!log.contains("rebuilt"), "nothing was to be rebuilt:\n{log}");
    assert!(granted > 5 && work(&serving, "after").await);
    serving.stop().await;
}
