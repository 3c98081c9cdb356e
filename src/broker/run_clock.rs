//! The broker's own time: the boot-time clock within a run, the wall clock across runs (guarantee 10).
//!
//! A run starts at the later of wall clock and last record, so a grant never gains by a restart. If the wall
//! clock was set back by more than [`BACK_MS_MAX`], how long the broker was down can't be known: the run starts
//! at the wall clock, which keeps the broker usable after a step is undone, and every grant in force is ended.

use std::sync::Arc;

use crate::core::event::BrokerEvent;
use crate::core::id::Timestamp;
use crate::mutation::Mutation;
use crate::runtime::Runtime;
use crate::time::Clock;

/// A wall clock that lags the record by no more than this was not set back; it is only slow.
pub const BACK_MS_MAX: u64 = 60_000;

/// While wall clock and broker's clock are further apart, nothing is minted that expires on the wall clock. A run may
/// begin up to [`BACK_MS_MAX`] apart; as much again is for clocks that run unevenly.
pub const APART_MS_MAX: u64 = 2 * BACK_MS_MAX;

/// The time of one run.
#[derive(Clone)]
pub struct RunClock {
    clock: Arc<dyn Runtime>,
    starts_at: Timestamp,
    boot_start_ms: u64,
}

/// How a run begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start {
    /// The broker's clock starts here.
    pub at: Timestamp,
    /// True if grants in force must be ended: the clock was set back, now or before an earlier run that did not come to
    /// settling that.
    pub clock_set_back: bool,
    /// True if less time may have passed since the last run than the broker's clock says: after a boot, or when the wall
    /// clock was set ahead meanwhile. What was to be over by then may be under way.
    pub may_have_leapt: bool,
}

/// Where a run begins, from what the last one left and what the clocks say.
pub fn start(last_run: Option<&BrokerEvent>, last_at: Timestamp, clock: &dyn Clock) -> Start {
    let wall = clock.wall();
    // Within one boot, the boot-time clock says exactly how long it was, whatever the wall clock did.
    let by_boot_clock = match last_run {
        Some(BrokerEvent::RunStarted { boot_id, boot_ms, starts_at, .. })
            if *boot_id == clock.boot_id() && !boot_id.is_empty() && clock.boot_ms() >= *boot_ms =>
        {
            Some(starts_at.plus_ms(clock.boot_ms() - boot_ms).max(last_at))
        }
        _ => None,
    };
    // Noticed by a run that didn't come to ending all that was in force: it is to be done still.
    let not_settled = matches!(last_run, Some(BrokerEvent::RunStarted { clock_set_back: true, .. }));
    let expected = by_boot_clock.unwrap_or(last_at);
    let may_have_leapt = by_boot_clock.is_none_or(|passed| wall > passed);
    if Mutation::SetBackUnnoticed.is_on() {
        Start { at: wall, clock_set_back: false, may_have_leapt }
    } else if wall.plus_ms(BACK_MS_MAX) < expected {
        Start { at: wall, clock_set_back: true, may_have_leapt }
    } else {
        Start { at: wall.max(expected), clock_set_back: not_settled, may_have_leapt }
    }
}

impl RunClock {
    /// The clock of a run that begins there, now.
    pub fn new(clock: Arc<dyn Runtime>, starts_at: Timestamp) -> Self {
        let boot_start_ms = clock.boot_ms();
        Self { clock, starts_at, boot_start_ms }
    }
    /// The broker's time.
    pub fn now(&self) -> Timestamp {
        if Mutation::ExpiryOnWallClock.is_on() {
            return self.wall();
        }
        self.starts_at.plus_ms(self.clock.boot_ms().saturating_sub(self.boot_start_ms))
    }
    /// The wall clock, for the outside.
    pub fn wall(&self) -> Timestamp {
        self.clock.wall()
    }
    /// The moment that both clocks say has passed: what expires on the wall clock is minted from here, and counts as
    /// expired only here, so that a step that is undone makes nothing live longer and calls nothing dead (guarantees
    /// 5 and 10).
    pub fn passed(&self) -> Timestamp {
        self.wall().min(self.now())
    }
    /// How far the two clocks are apart, if that is more than a run may begin with.
    pub fn apart_ms(&self) -> Option<u64> {
        let (wall, now) = (self.wall(), self.now());
        Some(wall.ms_since(now).max(now.ms_since(wall))).filter(|ms| *ms > APART_MS_MAX)
    }
    /// The clock underneath, and what runs tasks on it.
    pub fn clock(&self) -> &Arc<dyn Runtime> {
        &self.clock
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use std::future::Future;
    use std::pin::Pin;
    use std::time::Duration;

    struct Fake(Mutex<(u64, u64, &'static str)>);
    impl Clock for Fake {
        fn wall(&self) -> Timestamp {
            Timestamp(self.0.lock().0)
        }
        fn boot_ms(&self) -> u64 {
            self.0.lock().1
        }
        fn boot_id(&self) -> String {
            self.0.lock().2.to_owned()
        }
        fn sleep(&self, _: Duration) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
            Box::pin(async {})
        }
    }
    impl Runtime for Fake {}
    const TEN_YEARS: u64 = 10 * 365 * 86_400_000;
    const T: u64 = 1_700_000_000_000;

    fn run(boot_id: &str, boot_ms: u64, starts_at: u64) -> BrokerEvent {
        BrokerEvent::RunStarted {
            version: String::new(),
            boot_id: boot_id.to_owned(),
            boot_ms,
            wall: Timestamp(starts_at),
            starts_at: Timestamp(starts_at),
            clock_set_back: false,
        }
    }

    #[test]
    fn a_step_within_a_run_moves_nothing() {
        let fake = Arc::new(Fake(Mutex::new((T, 1000, "b"))));
        let run = RunClock::new(fake.clone(), Timestamp(T));
        *fake.0.lock() = (T - TEN_YEARS, 61_000, "b");
        assert_eq!(run.now(), Timestamp(T + 60_000));
        *fake.0.lock() = (T + TEN_YEARS, 61_000, "b");
        assert_eq!(run.now(), Timestamp(T + 60_000));
    }

    #[test]
    fn a_restart_in_the_same_boot_counts_the_time_between() {
        // The wall clock was set back 30 minutes while the broker was down for an hour: not visible in the wall
        // clock and the record, but in the boot-time clock.
        let fake = Fake(Mutex::new((T + 1_800_000, 3_601_000, "b")));
        let s = start(Some(&run("b", 1000, T)), Timestamp(T + 10), &fake);
        assert_eq!(s, Start { at: Timestamp(T + 1_800_000), clock_set_back: true, may_have_leapt: false });
        // Slow by some seconds: the boot-time clock's word counts, and nothing is ended.
        let fake = Fake(Mutex::new((T + 3_590_000, 3_601_000, "b")));
        let s = start(Some(&run("b", 1000, T)), Timestamp(T + 10), &fake);
        assert_eq!(s, Start { at: Timestamp(T + 3_600_000), clock_set_back: false, may_have_leapt: false });
    }

    #[test]
    fn ten_years_forward_and_back_leave_a_broker_that_works() {
        let fake = Fake(Mutex::new((T + TEN_YEARS, 5, "c")));
        let forward = start(Some(&run("b", 1000, T)), Timestamp(T), &fake);
        assert_eq!(forward, Start { at: Timestamp(T + TEN_YEARS), clock_set_back: false, may_have_leapt: true });
        let fake = Fake(Mutex::new((T + 60_000, 50_000, "c")));
        let back = start(Some(&run("c", 5, T + TEN_YEARS)), Timestamp(T + TEN_YEARS + 1), &fake);
        assert_eq!(back, Start { at: Timestamp(T + 60_000), clock_set_back: true, may_have_leapt: false });
    }

    #[test]
    fn what_a_run_that_noticed_did_not_settle_the_next_one_does() {
        let BrokerEvent::RunStarted { version, boot_id, boot_ms, wall, starts_at, .. } = run("b", 1000, T) else {
            panic!("another event")
        };
        let noticed = BrokerEvent::RunStarted { version, boot_id, boot_ms, wall, starts_at, clock_set_back: true };
        let fake = Fake(Mutex::new((T + 2_000, 3_000, "b")));
        assert!(start(Some(&noticed), Timestamp(T + 10), &fake).clock_set_back);
        assert!(!start(Some(&run("b", 1000, T)), Timestamp(T + 10), &fake).clock_set_back);
    }

    #[test]
    fn a_leap_is_possible_after_a_boot_and_when_the_wall_clock_is_ahead_of_the_boot_time_clock() {
        let leapt = |wall, boot_ms, boot_id| {
            let fake = Fake(Mutex::new((wall, boot_ms, boot_id)));
            start(Some(&run("b", 1000, T)), Timestamp(T), &fake).may_have_leapt
        };
        assert!(leapt(T + 2_000, 5, "c"), "nobody knows how long a boot took");
        assert!(leapt(T + TEN_YEARS, 3_000, "b"));
        assert!(!leapt(T + 2_000, 3_000, "b"));
    }
}
