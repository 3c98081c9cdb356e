//! W4: many credentials that expire in one second, some with an open session, which the target's own expiry leaves alone.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::Outcome;
use crate::bare::Roles;
use crate::figures::{load_average, round};
use crate::mass::{self, ms};
use crate::w2::Target;
use crate::world::World;

/// Credentials that are made in a second, at the least: so long before it the first is asked for.
const MADE_PER_SEC: u64 = 25;

#[allow(clippy::disallowed_methods)] // what an outside clock says is what is measured
fn wall_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// Measures it.
pub async fn run(binary: &Path, folder: &Path, count: usize, sessions: usize) -> Outcome<Value> {
    let target = Target::start()?;
    let world = World::start(binary, folder, Some(&target)).await?;
    let at_ms = wall_ms() + (count as u64 / MADE_PER_SEC + 15) * 1000;
    let held = mass::hold(&world, count, || (at_ms.saturating_sub(wall_ms()) / 1000).max(1)).await?;
    let mut open = Vec::new();
    for one in held.iter().step_by((held.len() / sessions).max(1)).take(sessions) {
        let (client, session) = target.use_it(&one.user, &one.password).await?;
        let ends_at_ms = one.ends_at_ms;
        open.push(tokio::spawn(async move {
            let _ = session.await;
            drop(client);
            (ends_at_ms, wall_ms())
        }));
    }
    let (first, last) = held.iter().fold((u64::MAX, 0), |(a, b), h| (a.min(h.ends_at_ms), b.max(h.ends_at_ms)));
    if wall_ms() >= first {
        return Err("making the credentials took longer than planned: the first has expired already".into());
    }
    tokio::time::sleep(Duration::from_millis(first - wall_ms())).await;
    let began = Instant::now();
    let offset = last.saturating_sub(wall_ms());
    let ends = mass::watch(&target, "cslease", began).await?;
    let mut overruns = Vec::new();
    for session in open {
        let (ends_at_ms, cut_ms) = session.await?;
        #[allow(clippy::cast_precision_loss)] // milliseconds
        overruns.push(round(cut_ms as f64 - ends_at_ms as f64));
    }
    overruns.sort_by(f64::total_cmp);
    let proven = mass::all_proven(&world, &held, began).await?;
    let load = load_average()?;
    let tried = mass::all_refused(&target, &held).await?;
    world.stop().await?;
    let (bare, bare_cut) = Roles::make(&target, count, sessions).await?.end(&target).await?;
    let after = |took: Duration| ms(took) - ms(Duration::from_millis(offset));
    Ok(json!({
        "credentials": count, "with_sessions": overruns.len(), "spread_ms": last - first,
        "session_overrun_ms": { "p50": overruns.get(overruns.len() / 2), "max": overruns.last() },
        "after_the_last_deadline": {
            "last_login_refused_ms": after(ends.refused), "last_role_gone_ms": after(ends.gone),
            "all_proofs_recorded_ms": after(proven),
        },
        "logins_tried_and_refused": tried,
        "bare": {
            "last_session_cut_ms": ms(bare_cut), "last_login_refused_ms": ms(bare.refused), "last_role_gone_ms": ms(bare.gone),
        },
        "load_average": load, "left_at_target": target.left().await?,
    }))
}
