//! Signs of life. Kept in memory: a restart counts as one for everybody, which extends nothing beyond `ends_at`.

use std::collections::HashMap;

use parking_lot::Mutex;

use crate::core::event::EndCause;
use crate::core::grant::GrantState;
use crate::core::id::{GrantId, Timestamp};
use crate::core::request::HEARTBEATS_MISSED;

use super::Broker;

/// When each watched grant last gave a sign of life.
#[derive(Debug, Default)]
pub struct Heartbeats(Mutex<HashMap<GrantId, Timestamp>>);

impl Heartbeats {
    /// Begins to watch, unless it is watched already.
    pub fn watch(&self, id: GrantId, now: Timestamp) {
        self.0.lock().entry(id).or_insert(now);
    }
    /// A sign of life.
    pub fn beat(&self, id: GrantId, now: Timestamp) {
        if let Some(last) = self.0.lock().get_mut(&id) {
            *last = now;
        }
    }
    fn all(&self) -> Vec<(GrantId, Timestamp)> {
        self.0.lock().iter().map(|(id, last)| (*id, *last)).collect()
    }
    fn forget(&self, id: GrantId) {
        self.0.lock().remove(&id);
    }
}

impl Broker {
    /// Ends grants whose agent has been silent for too long.
    pub(super) async fn check_heartbeats(&self) {
        let now = self.now();
        for (id, last) in self.heartbeats.all() {
            let grant = match self.store.grant(id).await {
                Ok(Some(grant)) => grant,
                Ok(None) => continue, // on its way to being durable
                Err(error) => {
                    tracing::warn!(grant = %id, %error, "can't read a grant whose heartbeat is watched");
                    continue;
                }
            };
            let (GrantState::Active { since, .. }, Some(interval)) = (&grant.state, grant.request.heartbeat_secs)
            else {
                if grant.state.is_final() || matches!(grant.state, GrantState::Ending { .. }) {
                    self.heartbeats.forget(id);
                }
                continue;
            };
            if now.ms_since(last.max(*since)) > interval * HEARTBEATS_MISSED * 1000 {
                match self.end(id, EndCause::AgentLost).await {
                    Ok(_) => self.heartbeats.forget(id),
                    Err(error) => tracing::warn!(grant = %id, %error, "can't end a grant whose agent is lost yet"),
                }
            }
        }
    }
}
