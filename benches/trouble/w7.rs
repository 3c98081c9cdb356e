//! W7: what a long history costs: W1 with very many ended grants stored, against W1 on an empty folder.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use countersign::store::embedded;
use serde_json::{Value, json};

use crate::Outcome;
use crate::figures::round;
use crate::journal::{self, Length};
use crate::w1::{self, Stop};
use crate::world::{Setup, World};

const AGENTS: usize = 16;
/// Cycles before anything is counted.
const WARM_UP: usize = 20;

/// Measures it.
pub async fn run(binary: &Path, folder: &Path, count: usize, length: Duration) -> Outcome<Value> {
    let world = World::start(binary, &folder.join("empty"), None).await?;
    let (world, empty) = rate(world, length).await?;
    world.stop().await?;

    let folder = folder.join("full");
    let made = std::cell::Cell::new(None);
    let fill = |data: &Path| {
        // The writer is waited for, which a thread of the runtime mustn't do.
        let make = || journal::make(&embedded::journal_dir(data), Length::Grants(count as u64), 0);
        let done = std::thread::scope(|scope| scope.spawn(make).join()).map_err(|_| "the journal's maker panicked")?;
        made.set(Some(done?));
        Ok(())
    };
    let setup = Setup { fill: Some(&fill), ..Setup::default() };
    let world = World::start_with(binary, &folder, &setup).await?;
    let made = made.take().ok_or("no journal was made")?;
    // The first start found no view, and made one.
    let without_view = world.started();
    let world = world.restart().await?;
    let started = world.started();
    let (world, full) = rate(world, length).await?;
    let running = world.started();
    world.stop().await?;
    std::fs::remove_dir_all(&folder)?;
    let per_sec = |of: &Value| of["rate_per_sec"].as_f64().unwrap_or_default();
    Ok(json!({
        "ended_grants": made.grants, "events": made.events, "journal_bytes": made.bytes,
        "start_without_a_view": without_view, "start": started, "after_w1": running,
        "w1_empty": empty, "w1_full": full, "full_over_empty": round(per_sec(&full) / per_sec(&empty)),
    }))
}

async fn rate(world: Arc<World>, length: Duration) -> Outcome<(Arc<World>, Value)> {
    let nodes = std::slice::from_ref(&world);
    w1::run(nodes, AGENTS, Stop::Cycles(WARM_UP)).await?;
    let figures = w1::run(nodes, AGENTS, Stop::After(length)).await?;
    Ok((world, figures))
}
