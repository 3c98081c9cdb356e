//! Many endings at once: access is cut for all of them before any is taken further. One statement takes the groups, and
//! with them login and data, from two thousand roles in some milliseconds; one more sends their sessions away.
//!
//! Nothing is concluded from it: each role goes through every step of its own ending afterwards (`end.rs`), and what
//! failed here is done there.

use serde_json::{Value, json};

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

/// Cuts access of many.
pub async fn shut(core: &Shared, endings: &[Ending]) {
    for some in endings.chunks(SHUT_ROLES_MAX) {
        if let Err(e) = shut_some(core, some).await {
            tracing::debug!(roles = some.len(), error = %e, "not cut together; each is cut by itself");
        }
    }
}

async fn shut_some(core: &Shared, endings: &[Ending]) -> Result<(), Fail> {
    let roles: Vec<Value> = endings.iter().map(|e| json!({ "name": e.name })).collect();
    let oids: Vec<u32> = endings.iter().flat_map(Ending::oids).collect();
    let conn = core.ends.get(TURN).await?;
    let input = json!({ "roles": roles, "lock_ms": LOCK_MS.to_string() });
    // Committed before sessions are sent away, so that none comes back. Also if it was refused, they are.
    let taken = Op::Shut.run(core.plan.setup, &conn, &input, EXCHANGE).await;
    Op::Expel.run(core.plan.setup, &conn, &json!({ "oids": oids }), EXCHANGE).await?;
    taken.map(drop)
}
