//! Many endings at once: access is cut for all of them before any is taken further. One statement takes the groups, and
//! with them login and data, from two thousand roles in some milliseconds; one more sends their sessions away.
//!
//! Nothing is concluded from it: each role goes through every step of its own ending afterwards (`end.rs`), and what
//! failed here is done there.

use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::ending::Ending;
use super::fail::Fail;
use super::op::Op;
use super::shared::{EXCHANGE, Shared, TURN};
use crate::core::event::Urgency;

/// Fewer than this go through the steps at once, unless others are before them: that is as fast.
pub const MANY: usize = 16;
/// Most roles in one statement.
pub const SHUT_ROLES_MAX: usize = 2048;
/// Waiting for a lock.
const LOCK_MS: u32 = 200;

/// Roles whose access is to be cut, and who waits for it.
pub struct Group {
    roles: Vec<Role>,
    done: oneshot::Sender<bool>,
}

struct Role {
    name: String,
    oids: Vec<u32>,
}

/// Cuts access of many, in one statement with others who wait for the same: two of them at once would wait for each other's
/// sessions and locks. True if nothing of it failed.
pub async fn shut(core: &Arc<Shared>, urgency: Urgency, endings: &[Ending]) -> bool {
    let roles = endings.iter().map(|e| Role { name: e.name.clone(), oids: e.oids().collect() }).collect();
    let (done, is_done) = oneshot::channel();
    core.cuts.put(urgency, endings.len(), Group { roles, done });
    // A task of its own: whoever waits may be dropped, and the others' cuts must not be dropped with it.
    tokio::spawn(lead(Arc::clone(core)));
    is_done.await.unwrap_or(false)
}

async fn lead(core: Arc<Shared>) {
    let mut turn = core.cuts.turn(SHUT_ROLES_MAX).await;
    if turn.jobs.is_empty() {
        return;
    }
    let (begun, roles) = (Instant::now(), turn.jobs.iter().flat_map(|group| &group.roles).count());
    let cut = shut_all(&core, turn.jobs.iter().flat_map(|group| &group.roles)).await;
    let mut waiting = std::mem::take(&mut turn.jobs);
    match &cut {
        Ok(cut) => tracing::debug!(roles, %cut, ms = begun.elapsed().as_millis(), "cut together"),
        Err(error) => {
            tracing::debug!(roles, %error, "not cut together; each is cut by itself");
            if !matches!(error, Fail::Refused { .. }) {
                // No session: each of those who wait would find that out after the other.
                waiting.extend(core.cuts.drain());
            }
        }
    }
    // Functions of an earlier version say how many they took, and not whether any failed.
    let well = cut.is_ok_and(|cut| cut["failed"].as_u64().unwrap_or(0) == 0);
    for group in waiting {
        // Nobody waits any more.
        let _ = group.done.send(well);
    }
}

async fn shut_all(core: &Shared, all: impl Iterator<Item = &Role> + Clone) -> Result<Value, Fail> {
    let roles: Vec<Value> = all.clone().map(|role| json!({ "name": role.name })).collect();
    let oids: Vec<u32> = all.flat_map(|role| role.oids.iter().copied()).collect();
    let conn = core.ends.get(TURN).await?;
    let input = json!({ "roles": roles, "lock_ms": LOCK_MS.to_string() });
    // Committed before sessions are sent away, so that none comes back. Also if it was refused, they are.
    let taken = Op::Shut.run(core.plan.setup, &conn, &input, EXCHANGE).await;
    Op::Expel.run(core.plan.setup, &conn, &json!({ "oids": oids }), EXCHANGE).await?;
    taken
}
