//! W6: SIGKILL with many tokens in force, until it is ready again.

use std::path::Path;

use serde_json::{Value, json};

use crate::Outcome;
use crate::figures::load_average;
use crate::w1::{self, Stop};
use crate::world::World;

const AGENTS: usize = 16;

/// Measures it.
pub async fn run(binary: &Path, folder: &Path, count: usize) -> Outcome<Value> {
    let world = World::start(binary, folder, None).await?;
    w1::run(std::slice::from_ref(&world), AGENTS, Stop::Cycles(count.div_ceil(AGENTS))).await?;
    let load = load_average()?;
    let world = world.kill_and_restart().await?;
    let started = world.started();
    let open = world.metric("countersign_grants{state=\"active\"}").await?;
    // It works, and what was in force still is.
    w1::run(std::slice::from_ref(&world), 1, Stop::Cycles(10)).await?;
    world.stop().await?;
    Ok(json!({ "leases": count, "in_force_afterwards": open, "started": started, "load_average": load }))
}
