//! How much agents ask: a token bucket for every call, and a rough count of the requests for grants alone, which
//! policies see. A heartbeat or a poll is no request.

use std::collections::HashMap;

use crate::core::id::{AgentId, Timestamp};

use super::Broker;

/// Agents that are kept before those are forgotten of whom nothing is left to know.
const KEPT_MAX: usize = 10_000;
const HOUR_MS: u64 = 3_600_000;

/// Token buckets of agents, and their recent requests.
#[derive(Debug, Default)]
pub struct Rates {
    buckets: HashMap<AgentId, Bucket>,
    requests: HashMap<AgentId, Hours>,
}

#[derive(Debug)]
struct Bucket {
    milli_tokens: u64,
    at: Timestamp,
}

/// Requests in the running hour, and in the one before it.
#[derive(Debug, Default)]
struct Hours {
    hour: u64,
    this: u64,
    last: u64,
}

impl Hours {
    fn advance(&mut self, hour: u64) {
        if self.hour != hour {
            self.last = if self.hour + 1 == hour { self.this } else { 0 };
            self.this = 0;
            self.hour = hour;
        }
    }
}

impl Broker {
    /// Counts a call of an agent against its rate. `Err`: seconds to wait.
    pub fn admit(&self, agent: &AgentId) -> Result<(), u64> {
        let rules = self.rules.load();
        let limits = &rules.config.limits;
        self.rates.lock().admit(agent, self.now(), limits.requests_per_agent_per_sec, limits.requests_per_agent_burst)
    }
}

impl Rates {
    pub(super) fn admit(&mut self, agent: &AgentId, now: Timestamp, per_sec: u32, burst: u32) -> Result<(), u64> {
        let full = u64::from(burst.max(1)) * 1000;
        let filled = |b: &Bucket| {
            let gained = now.ms_since(b.at).saturating_mul(u64::from(per_sec));
            b.milli_tokens.saturating_add(gained).min(full)
        };
        if self.buckets.len() > KEPT_MAX {
            self.buckets.retain(|_, b| filled(b) < full);
        }
        let bucket = self.buckets.entry(agent.clone()).or_insert(Bucket { milli_tokens: full, at: now });
        bucket.milli_tokens = filled(bucket);
        bucket.at = now;
        if bucket.milli_tokens < 1000 {
            return Err(1);
        }
        bucket.milli_tokens -= 1000;
        Ok(())
    }

    /// Counts a request for a grant.
    pub(super) fn asked(&mut self, agent: &AgentId, now: Timestamp) {
        let hour = now.0 / HOUR_MS;
        if self.requests.len() > KEPT_MAX {
            self.requests.retain(|_, h| hour.saturating_sub(h.hour) < 2);
        }
        let hours = self.requests.entry(agent.clone()).or_default();
        hours.advance(hour);
        hours.this += 1;
    }

    /// Requests for grants in this hour and the one before it.
    pub(super) fn recent(&self, agent: &AgentId, now: Timestamp) -> u32 {
        let hour = now.0 / HOUR_MS;
        let count = self.requests.get(agent).map_or(0, |h| match hour.saturating_sub(h.hour) {
            0 => h.this + h.last,
            1 => h.this,
            _ => 0,
        });
        u32::try_from(count).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_700_000_000_000);

    fn agent(name: &str) -> AgentId {
        AgentId::new(&format!("spiffe://corp.test/agent/{name}")).unwrap()
    }

    #[test]
    fn calls_are_no_requests() {
        let mut rates = Rates::default();
        for _ in 0..300 {
            rates.admit(&agent("a"), NOW, 10, 1000).unwrap();
        }
        assert_eq!(rates.recent(&agent("a"), NOW), 0);
        rates.asked(&agent("a"), NOW);
        assert_eq!((rates.recent(&agent("a"), NOW), rates.recent(&agent("b"), NOW)), (1, 0));
    }

    #[test]
    fn requests_count_for_this_hour_and_the_next() {
        let mut rates = Rates::default();
        for _ in 0..7 {
            rates.asked(&agent("a"), NOW);
        }
        let next = NOW.plus_ms(HOUR_MS);
        assert_eq!(rates.recent(&agent("a"), next), 7);
        rates.asked(&agent("a"), next);
        assert_eq!(rates.recent(&agent("a"), next), 8);
        assert_eq!(rates.recent(&agent("a"), next.plus_ms(HOUR_MS)), 1);
        assert_eq!(rates.recent(&agent("a"), next.plus_ms(2 * HOUR_MS)), 0);
    }

    #[test]
    fn a_bucket_empties_and_fills_again() {
        let mut rates = Rates::default();
        for _ in 0..3 {
            rates.admit(&agent("a"), NOW, 2, 3).unwrap();
        }
        assert_eq!(rates.admit(&agent("a"), NOW, 2, 3), Err(1));
        assert_eq!(rates.admit(&agent("b"), NOW, 2, 3), Ok(()));
        assert_eq!(rates.admit(&agent("a"), NOW.plus_ms(500), 2, 3), Ok(()));
        assert_eq!(rates.admit(&agent("a"), NOW.plus_ms(500), 2, 3), Err(1));
    }
}
