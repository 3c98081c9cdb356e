//! The scheduler: one thread, one seed, one order. Tasks belong to an owner (the world, or one run of the broker), so
//! that a run can be killed between any two steps, or stand still for minutes while the world goes on.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::SeqCst};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use countersign::core::id::Timestamp;
use countersign::runtime::Runtime;
use countersign::time::Clock;
use futures::future::BoxFuture;
use parking_lot::Mutex;

use super::Choices;

/// Who a task belongs to: 0 is the world, the others are runs of the broker.
pub type Owner = u32;
pub const WORLD: Owner = 0;

/// The true time at which every simulation begins, in milliseconds since 1970.
pub const EPOCH_MS: u64 = 1_790_000_000_000;

struct Task {
    owner: Owner,
    future: Option<BoxFuture<'static, ()>>,
    wake: Arc<WakeUp>,
}

struct WakeUp {
    id: u64,
    is_ready: AtomicBool,
    ready: Arc<Mutex<BTreeSet<u64>>>,
}

impl Wake for WakeUp {
    fn wake(self: Arc<Self>) {
        if !self.is_ready.swap(true, SeqCst) {
            self.ready.lock().insert(self.id);
        }
    }
}

#[derive(Default)]
struct State {
    tasks: BTreeMap<u64, Task>,
    timers: BTreeMap<(u64, u64), Waker>,
    next: u64,
}

/// All tasks, and the true time.
#[derive(Default)]
pub struct Sched {
    now_ms: AtomicU64,
    state: Mutex<State>,
    /// By number: in which order they were woken doesn't matter, since tokio draws that by itself.
    ready: Arc<Mutex<BTreeSet<u64>>>,
    /// The task that was polled last.
    last: AtomicU64,
    /// Changes with every step: two runs of one seed must agree.
    trace: AtomicU64,
}

impl Sched {
    /// True time, in milliseconds since the simulation began.
    pub fn now_ms(&self) -> u64 {
        self.now_ms.load(SeqCst)
    }

    pub fn trace(&self) -> u64 {
        self.trace.load(SeqCst)
    }

    pub fn last(&self) -> String {
        let id = self.last.load(SeqCst);
        let owner = self.state.lock().tasks.get(&id).map(|t| t.owner);
        format!("{id} of {owner:?}")
    }

    /// Mixes something into the trace.
    pub fn note(&self, what: u64) {
        let mixed = (self.trace.load(SeqCst) ^ what).wrapping_mul(0x0100_0000_01B3).rotate_left(17);
        self.trace.store(mixed, SeqCst);
    }

    pub fn spawn(&self, owner: Owner, future: BoxFuture<'static, ()>) {
        let mut state = self.state.lock();
        let id = state.next;
        state.next += 1;
        let wake = Arc::new(WakeUp { id, is_ready: AtomicBool::new(true), ready: Arc::clone(&self.ready) });
        state.tasks.insert(id, Task { owner, future: Some(future), wake });
        drop(state);
        self.ready.lock().insert(id);
    }

    /// Polls one task that is ready, chosen by `choices`; those of the owners in `paused` stand still. False: none is ready.
    pub fn step(&self, choices: &mut Choices, paused: &[Owner]) -> bool {
        let (id, mut future, wake) = loop {
            let id = {
                let mut ready = self.ready.lock();
                let state = self.state.lock();
                let may = |id: &u64| state.tasks.get(id).is_none_or(|t| !paused.contains(&t.owner));
                let able: Vec<u64> = ready.iter().copied().filter(may).collect();
                if able.is_empty() {
                    return false;
                }
                let id = able[choices.below(able.len() as u64) as usize];
                ready.remove(&id);
                id
            };
            let mut state = self.state.lock();
            if let Some(task) = state.tasks.get_mut(&id) {
                task.wake.is_ready.store(false, SeqCst);
                if let Some(future) = task.future.take() {
                    break (id, future, Arc::clone(&task.wake));
                }
            }
        };
        self.note(id);
        self.last.store(id, SeqCst);
        let waker = Waker::from(wake);
        let poll = future.as_mut().poll(&mut Context::from_waker(&waker));
        let mut state = self.state.lock();
        if poll.is_ready() {
            state.tasks.remove(&id);
        } else if let Some(task) = state.tasks.get_mut(&id) {
            task.future = Some(future);
        }
        true
    }

    /// Goes on to the next timer, but no further than `limit_ms`. False: there is none before that.
    pub fn advance(&self, limit_ms: u64) -> bool {
        let mut due = Vec::new();
        {
            let mut state = self.state.lock();
            let Some(at) = state.timers.keys().next().map(|(at, _)| *at).filter(|at| *at <= limit_ms) else {
                self.now_ms.fetch_max(limit_ms, SeqCst);
                return false;
            };
            self.now_ms.fetch_max(at, SeqCst);
            let now = self.now_ms();
            while let Some(entry) = state.timers.first_entry().filter(|e| e.key().0 <= now) {
                due.push(entry.remove());
            }
        }
        self.note(self.now_ms());
        due.into_iter().for_each(Waker::wake);
        true
    }

    /// Drops everything of an owner.
    pub fn kill(&self, owner: Owner) {
        let dead: Vec<Task> = {
            let mut state = self.state.lock();
            let ids: Vec<u64> = state.tasks.iter().filter(|(_, t)| t.owner == owner).map(|(id, _)| *id).collect();
            ids.iter().filter_map(|id| state.tasks.remove(id)).collect()
        };
        drop(dead);
        // What dying tasks spawned on their way out.
        let mut state = self.state.lock();
        let late: Vec<u64> = state.tasks.iter().filter(|(_, t)| t.owner == owner).map(|(id, _)| *id).collect();
        let late: Vec<Task> = late.iter().filter_map(|id| state.tasks.remove(id)).collect();
        drop(state);
        drop(late);
    }

    pub fn ready_len(&self) -> usize {
        self.ready.lock().len()
    }

    /// How many tasks an owner has.
    pub fn tasks_of(&self, owner: Owner) -> usize {
        self.state.lock().tasks.values().filter(|t| t.owner == owner).count()
    }

    pub fn sleep_ms(self: &Arc<Self>, ms: u64) -> Sleep {
        Sleep { sched: Arc::clone(self), at: self.now_ms() + ms, key: None }
    }
}

/// Waits for a moment of true time.
pub struct Sleep {
    sched: Arc<Sched>,
    at: u64,
    key: Option<u64>,
}

impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.sched.now_ms() >= self.at {
            return Poll::Ready(());
        }
        let sched = Arc::clone(&self.sched);
        let mut state = sched.state.lock();
        let key = *self.key.get_or_insert_with(|| {
            state.next += 1;
            state.next
        });
        state.timers.insert((self.at, key), cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            let gone = self.sched.state.lock().timers.remove(&(self.at, key));
            drop(gone);
        }
    }
}

/// The clocks of the machine that the broker runs on.
#[derive(Default)]
pub struct Machine {
    /// How far the wall clock is off, in milliseconds.
    pub wall_off: AtomicI64,
    boot: AtomicU64,
    booted_at: AtomicU64,
}

impl Machine {
    /// One of several: no two have a boot in common.
    pub fn numbered(n: u64, wall_off_ms: i64) -> Self {
        let (wall_off, boot) = (AtomicI64::new(wall_off_ms), AtomicU64::new(n * 1_000_000));
        Self { wall_off, boot, booted_at: AtomicU64::new(0) }
    }

    pub fn reboot(&self, now_ms: u64) {
        self.boot.fetch_add(1, SeqCst);
        self.booted_at.store(now_ms, SeqCst);
    }
}

/// What one owner's tasks run on.
pub struct SimRuntime {
    pub sched: Arc<Sched>,
    pub owner: Owner,
    pub machine: Arc<Machine>,
}

impl Clock for SimRuntime {
    fn wall(&self) -> Timestamp {
        let off = self.machine.wall_off.load(SeqCst);
        Timestamp((EPOCH_MS + self.sched.now_ms()).saturating_add_signed(off))
    }
    fn boot_ms(&self) -> u64 {
        self.sched.now_ms() - self.machine.booted_at.load(SeqCst)
    }
    fn boot_id(&self) -> String {
        format!("boot {}", self.machine.boot.load(SeqCst))
    }
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        let ms = u64::try_from(duration.as_micros().div_ceil(1000)).unwrap_or(u64::MAX / 4);
        Box::pin(self.sched.sleep_ms(ms))
    }
}

impl Runtime for SimRuntime {
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        self.sched.spawn(self.owner, task);
    }
    fn spawn_blocking(&self, work: Box<dyn FnOnce() + Send>) {
        self.sched.spawn(self.owner, Box::pin(async move { work() }));
    }
}
