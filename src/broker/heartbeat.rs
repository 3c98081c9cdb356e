//! Signs of life. The last ones are kept in memory: a restart counts as one for everybody, which extends nothing beyond
//! `ends_at`. Which grants are watched is read from the view, so nothing has to be told.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::core::event::EndCause;
use crate::core::grant::{Grant, GrantState};
use crate::core::id::{GrantId, Timestamp};
use crate::core::request::HEARTBEATS_MISSED;

use super::Broker;

/// When grants last gave a sign of life.
#[derive(Debug)]
pub struct Heartbeats {
    /// The run began: nobody is given up for what came before.
    since: Timestamp,
    last: Mutex<HashMap<GrantId, Timestamp>>,
}

impl Heartbeats {
    /// None yet, in a run that begins now.
    pub fn since(now: Timestamp) -> Self {
        Self { since: now, last: Mutex::default() }
    }
    /// A sign of life of a grant in force.
    pub fn beat(&self, grant: &Grant, now: Timestamp) {
        if grant.request.heartbeat_secs.is_some() {
            self.last.lock().insert(grant.id, now);
        }
    }
    fn of(&self, id: GrantId) -> Timestamp {
        self.last.lock().get(&id).copied().unwrap_or(self.since)
    }
}

impl Broker {
    /// Ends grants whose agent has been silent for too long.
    pub(super) async fn check_heartbeats(&self) {
        let open = match self.store.open_grants().await {
            Ok(open) => open,
            Err(error) => return tracing::warn!(%error, "can't read which grants give signs of life"),
        };
        let watched: Vec<(&Arc<Grant>, Timestamp, u64)> = open
            .iter()
            .filter_map(|grant| match (&grant.state, grant.request.heartbeat_secs) {
                (GrantState::Active { since, .. }, Some(interval)) => Some((grant, *since, interval)),
                _ => None,
            })
            .collect();
        let ids: HashSet<GrantId> = watched.iter().map(|(grant, ..)| grant.id).collect();
        // Read before this: a grant that came into force meanwhile counts from then on, which is as good as a sign.
        self.heartbeats.last.lock().retain(|id, _| ids.contains(id));
        let now = self.now();
        for (grant, since, interval) in watched {
            let silent_ms = now.ms_since(self.heartbeats.of(grant.id).max(since));
            if self.unfinished.cause_of(grant.id).is_none()
                && silent_ms > interval * HEARTBEATS_MISSED * 1000
                && let Err(error) = self.end(grant.id, EndCause::AgentLost).await
            {
                tracing::warn!(grant = %grant.id, %error, "can't end a grant whose agent is lost yet");
            }
        }
    }
}
