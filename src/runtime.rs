//! What the broker's tasks run on: tokio in the broker, a seeded scheduler in the simulator.
//!
//! Everything from the store upwards starts tasks, waits, and runs what blocks through this trait and the functions
//! here, so that a simulation decides in which order things happen, and when they stop.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::oneshot;

use crate::time::{Clock, SystemClock};

/// Runs tasks. Its clock is the one that they wait on.
pub trait Runtime: Clock {
    /// Runs a task to its end, whoever goes away.
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        tokio::spawn(task);
    }
    /// Runs work that may block its thread.
    fn spawn_blocking(&self, work: Box<dyn FnOnce() + Send>) {
        tokio::task::spawn_blocking(work);
    }
}

impl Runtime for SystemClock {}

/// A task that ended without a result: it panicked, or what it ran on was shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a task of the broker ended without a result; its log says why")]
pub struct Died;

/// A task that was started. Dropping this doesn't stop it.
#[derive(Debug)]
pub struct Task<T>(oneshot::Receiver<T>);

impl<T> Future for Task<T> {
    type Output = Result<T, Died>;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map_err(|_| Died)
    }
}

/// Starts a task of its own.
pub fn start<T: Send + 'static>(runtime: &dyn Runtime, task: impl Future<Output = T> + Send + 'static) -> Task<T> {
    let (done, result) = oneshot::channel();
    runtime.spawn(Box::pin(async move {
        // A panic is told by the panic hook; whoever waits for the result learns that there is none.
        if let Ok(value) = AssertUnwindSafe(task).catch_unwind().await {
            // Nobody may be waiting.
            let _ = done.send(value);
        }
    }));
    Task(result)
}

/// Runs work that may block, on a thread where it may.
pub fn blocking<T: Send + 'static>(runtime: &dyn Runtime, work: impl FnOnce() -> T + Send + 'static) -> Task<T> {
    let (done, result) = oneshot::channel();
    runtime.spawn_blocking(Box::new(move || {
        // Nobody may be waiting.
        let _ = done.send(work());
    }));
    Task(result)
}

/// The result of `work`, or `None` if it takes longer than that.
pub async fn within<T>(runtime: &dyn Runtime, limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        done = work => Some(done),
        () = runtime.sleep(limit) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_panics_ends_without_a_result() {
        assert_eq!(start(&SystemClock, async { 7 }).await, Ok(7));
        assert_eq!(start(&SystemClock, async { panic!("on purpose") }).await, Err::<(), _>(Died));
        assert_eq!(blocking(&SystemClock, || 7).await, Ok(7));
        assert_eq!(blocking(&SystemClock, || panic!("on purpose")).await, Err::<(), _>(Died));
    }

    #[tokio::test]
    async fn what_takes_too_long_is_given_up() {
        assert_eq!(within(&SystemClock, Duration::from_secs(60), async { 7 }).await, Some(7));
        assert_eq!(within(&SystemClock, Duration::from_millis(1), std::future::pending::<()>()).await, None);
    }
}
