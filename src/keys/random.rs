//! Randomness, asked for in one place: the system's in the broker, a seeded stream in the simulator.
//! Keys and salts of the crypto library draw their own; what is drawn here are ids, nonces and links.

use std::sync::atomic::{AtomicU64, Ordering};

use aws_lc_rs::digest::{Context, SHA256};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::core::id::{GrantId, LeaseId};
use crate::core::secret::Secret;

/// A source of bytes that nobody can guess. Everything that draws is given one.
pub trait Random: Send + Sync + 'static {
    /// Fills `out`. Never returns with less than that.
    fn fill(&self, out: &mut [u8]);
}

/// The system's own source.
#[derive(Debug, Default, Clone, Copy)]
pub struct SystemRandom;

impl Random for SystemRandom {
    /// # Panics
    /// If the operating system has no randomness to give: no id or key made after that could be trusted.
    fn fill(&self, out: &mut [u8]) {
        assert!(aws_lc_rs::rand::fill(out).is_ok(), "the operating system gives no random bytes");
    }
}

/// A repeatable stream for the simulator: SHA-256 over seed and counter. Never for real credentials.
#[derive(Debug)]
pub struct SeededRandom {
    seed: u64,
    drawn: AtomicU64,
}

impl SeededRandom {
    /// The stream of that seed, from its start.
    pub const fn new(seed: u64) -> Self {
        Self { seed, drawn: AtomicU64::new(0) }
    }
}

impl Random for SeededRandom {
    fn fill(&self, out: &mut [u8]) {
        for chunk in out.chunks_mut(32) {
            let block = self.drawn.fetch_add(1, Ordering::Relaxed);
            let mut hash = Context::new(&SHA256);
            hash.update(b"countersign simulation\0");
            hash.update(&self.seed.to_be_bytes());
            hash.update(&block.to_be_bytes());
            chunk.copy_from_slice(&hash.finish().as_ref()[..chunk.len()]);
        }
    }
}

/// `N` bytes.
pub fn random_bytes<const N: usize>(random: &dyn Random) -> [u8; N] {
    let mut out = [0; N];
    random.fill(&mut out);
    out
}

/// A new grant's id.
pub fn grant_id(random: &dyn Random) -> GrantId {
    GrantId::from_bytes(random_bytes(random))
}

/// A new lease's id.
pub fn lease_id(random: &dyn Random) -> LeaseId {
    LeaseId::from_bytes(random_bytes(random))
}

/// 256 bits as 43 characters of base64url: session ids, one-time codes, nonces.
pub fn random_secret(random: &dyn Random) -> Secret {
    let bytes = zeroize::Zeroizing::new(random_bytes::<32>(random));
    Secret::new(URL_SAFE_NO_PAD.encode(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_and_another_seed_differs() {
        let draw = |seed| {
            let r = SeededRandom::new(seed);
            (grant_id(&r), lease_id(&r), random_bytes::<70>(&r))
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        let r = SeededRandom::new(1);
        assert_ne!(grant_id(&r), grant_id(&r));
    }

    #[test]
    fn the_system_does_not_repeat() {
        assert_ne!(grant_id(&SystemRandom), grant_id(&SystemRandom));
        assert_eq!(random_secret(&SystemRandom).expose().len(), 43);
    }
}
