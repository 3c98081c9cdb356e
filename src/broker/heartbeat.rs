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
    /// Signs of life that other nodes haven't been told of.
    untold: Mutex<HashSet<GrantId>>,
}

impl Heartbeats {
    /// None yet, in a run that begins now.
    pub fn since(now: Timestamp) -> Self {
        Self { since: now, last: Mutex::default(), untold: Mutex::default() }
    }
    /// A sign of life of a grant in force.
    pub fn beat(&self, grant: &Grant, now: Timestamp) {
        if grant.request.heartbeat_secs.is_some() {
            self.last.lock().insert(grant.id, now);
            self.untold.lock().insert(grant.id);
        }
    }
    fn of(&self, id: GrantId) -> Timestamp {
        self.last.lock().get(&id).copied().unwrap_or(self.since)
    }
}

impl Broker {
    /// Tells other nodes who gave a sign of life here.
    async fn share_signs_of_life(&self) {
        let told: Vec<GrantId> = std::mem::take(&mut *self.heartbeats.untold.lock()).into_iter().collect();
        if !told.is_empty()
            && let Err(error) = self.store.alive(&told).await
        {
            tracing::warn!(%error, "other nodes can't be told of signs of life yet");
            self.heartbeats.untold.lock().extend(told);
        }
    }

    /// Ends grants whose agent has been silent for too long.
    pub(super) async fn check_heartbeats(&self) {
        self.share_signs_of_life().await;
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
        let limit_ms = |interval: u64| interval * HEARTBEATS_MISSED * 1000;
        let silent: Vec<(&Arc<Grant>, u64)> = watched
            .into_iter()
            .filter(|(grant, since, interval)| {
                let silent_ms = now.ms_since(self.heartbeats.of(grant.id).max(*since));
                self.unfinished.cause_of(grant.id).is_none() && silent_ms > limit_ms(*interval)
            })
            .map(|(grant, _, interval)| (grant, interval))
            .collect();
        if silent.is_empty() {
            return;
        }
        let ids: Vec<GrantId> = silent.iter().map(|(grant, _)| grant.id).collect();
        let elsewhere = match self.store.silent_ms(&ids).await {
            Ok(elsewhere) => elsewhere,
            Err(error) => return tracing::warn!(%error, "can't read which agents gave signs of life to other nodes"),
        };
        for (grant, interval) in silent {
            let is_alive = elsewhere.get(&grant.id).is_some_and(|silent_ms| *silent_ms <= limit_ms(interval));
            if !is_alive && let Err(error) = self.end(grant.id, EndCause::AgentLost).await {
                tracing::warn!(grant = %grant.id, %error, "can't end a grant whose agent is lost yet");
            }
        }
    }
}
