//! Many endings at once: access is cut for all of them before any is taken further. One statement takes the groups, and
//! with them login and data, from two thousand roles in some milliseconds; one more sends their sessions away.
//!
//! Nothing is concluded from it: each role goes through every step of its own ending afterwards (`end.rs`), and what
//! failed here is done there.

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::ending::Ending;
use super::fail::Fail;
use super::op::Op;
use super::shared::{EXCHANGE, Shared, TURN};

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

/// Cuts access of many, in one statement with all others who wait for the same: two of them at once would wait for each
/// other's sessions and locks. True if the statements went through.
pub async fn shut(core: &Arc<Shared>, endings: &[Ending]) -> bool {
    let roles = endings.iter().map(|e| Role { name: e.name.clone(), oids: e.oids().collect() }).collect();
    let (done, is_done) = oneshot::channel();
    core.cuts.put([Group { roles, done }]);
    // A task of its own: whoever waits may be dropped, and the others' cuts must not be dropped with it.
    tokio::spawn(lead(Arc::clone(core)));
    is_done.await.unwrap_or(false)
}

async fn lead(core: Arc<Shared>) {
    let (groups, _turn) = core.cuts.turn(usize::MAX).await;
    let (roles, waiting): (Vec<_>, Vec<_>) = groups.into_iter().map(|group| (group.roles, group.done)).unzip();
    let roles: Vec<Role> = roles.into_iter().flatten().collect();
    let mut well = true;
    for some in roles.chunks(SHUT_ROLES_MAX) {
        let begun = std::time::Instant::now();
        match shut_some(&core, some).await {
            Ok(taken) => tracing::debug!(roles = some.len(), %taken, ms = begun.elapsed().as_millis(), "cut together"),
            Err(e) => {
                tracing::debug!(roles = some.len(), error = %e, "not cut together; each is cut by itself");
                well = false;
            }
        }
    }
    for done in waiting {
        // Nobody waits any more.
        let _ = done.send(well);
    }
}

async fn shut_some(core: &Shared, some: &[Role]) -> Result<Value, Fail> {
    let roles: Vec<Value> = some.iter().map(|role| json!({ "name": role.name })).collect();
    let oids: Vec<u32> = some.iter().flat_map(|role| role.oids.iter().copied()).collect();
    let conn = core.ends.get(TURN).await?;
    let input = json!({ "roles": roles, "lock_ms": LOCK_MS.to_string() });
    // Committed before sessions are sent away, so that none comes back. Also if it was refused, they are.
    let taken = Op::Shut.run(core.plan.setup, &conn, &input, EXCHANGE).await;
    Op::Expel.run(core.plan.setup, &conn, &json!({ "oids": oids }), EXCHANGE).await?;
    taken
}
