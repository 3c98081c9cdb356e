//! Ways round: a role with the broker as its one member, made for one purpose and gone after it. No lease gets anything by it, so
//! nothing that a lease left behind (a definer function: regression D3) can do more while it is there.

use serde_json::json;

use super::fail::Fail;
use super::mint;
use super::op::Op;
use super::pool::Conn;
use super::shared::{EXCHANGE, Shared};

/// Waiting for a lock when one is dropped.
const LOCK_MS: u32 = 200;

/// Makes the broker a member of these roles through a new one, whose name this gives. What is not rolled back with the
/// caller's transaction is [dropped](drop_way); after a crash a sweep finds it by its name.
pub async fn make_way(core: &Shared, conn: &Conn, into: &[&str]) -> Result<String, Fail> {
    let through = mint::draw_way(&core.plan.prefix).map_err(|e| Fail::Lost(e.to_string()))?;
    let input = json!({ "reach": through, "into": into });
    Op::Reach.run(core.plan.setup, conn, &input, EXCHANGE).await?;
    Ok(through)
}

/// Drops it.
pub async fn drop_way(core: &Shared, conn: &Conn, through: &str) -> Result<(), Fail> {
    let input = json!({ "roles": [{ "name": through }], "lock_ms": LOCK_MS.to_string() });
    Op::Drop.run(core.plan.setup, conn, &input, EXCHANGE).await.map(drop)
}
