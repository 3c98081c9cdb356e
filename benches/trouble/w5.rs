//! W5: PostgreSQL is gone for a while, and what was to end meanwhile ends when it is back.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Outcome;
use crate::bare::Roles;
use crate::figures::load_average;
use crate::mass::{self, ms};
use crate::w2::Target;
use crate::world::World;

/// Measures it; the target is gone for so long.
pub async fn run(binary: &Path, folder: &Path, count: usize, outage: Duration) -> Outcome<Value> {
    let target = Target::start()?;
    let world = World::start(binary, folder, Some(&target)).await?;
    let held = mass::hold(&world, count, || 900).await?;
    target.cluster.stop();
    let gone = Instant::now();
    let mut connection = world.connect().await?;
    for one in &held {
        let path = format!("/v1/grants/{}/complete", one.grant);
        let _: Value = connection.call("POST", &path, &one.jwt, None, Some("{}".to_owned())).await?;
    }
    let probes = world.metric("countersign_target_probes_total{target=\"bench-db\"}").await?;
    tokio::time::sleep(outage.saturating_sub(gone.elapsed())).await;
    let probes = world.metric("countersign_target_probes_total{target=\"bench-db\"}").await? - probes;
    let outage = gone.elapsed();
    target.start_again();
    let began = Instant::now();
    let ends = mass::watch(&target, "cslease", began).await?;
    let proven = mass::all_proven(&world, &held, began).await?;
    let tried = mass::all_refused(&target, &held).await?;
    let load = load_average()?;
    world.stop().await?;
    let (bare, _) = Roles::make(&target, count, 0).await?.end(&target).await?;
    Ok(json!({
        "credentials": count, "outage_secs": outage.as_secs_f64(), "probes_meanwhile": probes,
        "last_login_refused_ms": ms(ends.refused), "last_role_gone_ms": ms(ends.gone), "all_proofs_recorded_ms": ms(proven),
        "logins_tried_and_refused": tried,
        "bare": { "last_login_refused_ms": ms(bare.refused), "last_role_gone_ms": ms(bare.gone) },
        "load_average": load, "left_at_target": target.left().await?,
    }))
}
