//! Time, asked for in one place. `clippy.toml` bans the wall clock everywhere else.
//!
//! Deadlines of grants are held against the boot-time clock within a run, so that no step of the wall
//! clock and no suspend extends one (guarantee 10). The wall clock is for the outside: `exp` of tokens,
//! validity of certificates, and the start of a run.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use crate::core::id::Timestamp;

/// A source of time. Everything that asks the time is given one.
pub trait Clock: Send + Sync + 'static {
    /// The wall clock, in milliseconds since the epoch. May step in either direction.
    fn wall(&self) -> Timestamp;
    /// Milliseconds on the boot-time clock: never steps, counts suspends, starts again at boot.
    fn boot_ms(&self) -> u64;
    /// Names the boot that [`Clock::boot_ms`] counts from.
    fn boot_id(&self) -> String;
    /// Waits.
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

/// The machine's own clocks.
#[derive(Debug, Default, Clone, Copy)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[allow(clippy::disallowed_methods)] // the one place
    fn wall(&self) -> Timestamp {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }
    fn boot_ms(&self) -> u64 {
        let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let secs = u64::try_from(t.tv_sec).unwrap_or(0);
        let nanos = u64::try_from(t.tv_nsec).unwrap_or(0);
        secs * 1000 + nanos / 1_000_000
    }
    fn boot_id(&self) -> String {
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|s| s.trim().to_owned()).unwrap_or_default()
    }
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(tokio::time::sleep(duration))
    }
}
