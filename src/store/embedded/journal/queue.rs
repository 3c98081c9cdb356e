//! The bounded queue between callers and the writer. Order in is order out.

use std::collections::VecDeque;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

use super::{Appended, Batch, Error, Opened};

/// Most batches that may wait. Endings and control may fill it to twice this.
pub const QUEUE_BATCHES_MAX: usize = 16_384;
/// Most bytes of frames that may wait. Endings may fill it to twice this.
pub const QUEUE_BYTES_MAX: usize = 32 * 1024 * 1024;

pub(super) type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// What the writer is asked to do.
#[derive(Debug)]
pub(super) enum Job {
    Append { batch: Batch, bytes: usize, reply: Reply<Appended> },
    Checkpoint { reply: Reply<Option<String>> },
    Reopen { reply: Reply<Opened> },
    Close { reply: Option<Reply<()>> },
}

impl Job {
    const fn bytes(&self) -> usize {
        match self {
            Self::Append { bytes, .. } => *bytes,
            _ => 0,
        }
    }
}

#[derive(Debug, Default)]
struct Inner {
    jobs: VecDeque<Job>,
    bytes: usize,
    closed: bool,
}

#[derive(Debug, Default)]
pub(super) struct Queue {
    inner: Mutex<Inner>,
    filled: Condvar,
}

impl Queue {
    pub(super) fn push(&self, job: Job) -> Result<(), Error> {
        let more = match &job {
            Job::Append { batch, .. } if !batch.ending => 1,
            _ => 2,
        };
        let mut inner = self.inner.lock();
        if inner.closed {
            return Err(Error::Closed);
        }
        if inner.jobs.len() >= QUEUE_BATCHES_MAX * more || inner.bytes + job.bytes() > QUEUE_BYTES_MAX * more {
            return Err(Error::QueueFull);
        }
        inner.bytes += job.bytes();
        inner.jobs.push_back(job);
        drop(inner);
        self.filled.notify_one();
        Ok(())
    }

    /// Nothing goes in after this. The first call queues the closing itself; later ones drop their reply.
    pub(super) fn close(&self, reply: Option<Reply<()>>) {
        let mut inner = self.inner.lock();
        if !inner.closed {
            inner.closed = true;
            inner.jobs.push_back(Job::Close { reply });
            drop(inner);
            self.filled.notify_one();
        }
    }

    /// Takes what is waiting, at most about `bytes_max` bytes of it, but at least one job. If there is none it waits, so
    /// long at most.
    pub(super) fn take(&self, wait: Duration, bytes_max: usize) -> Vec<Job> {
        let mut inner = self.inner.lock();
        if !wait.is_zero() {
            self.filled.wait_while_for(&mut inner, |inner| inner.jobs.is_empty(), wait);
        }
        let mut bytes = 0;
        let fits = |job: &&Job| {
            bytes += job.bytes();
            bytes <= bytes_max || bytes == job.bytes()
        };
        let n = inner.jobs.iter().take_while(fits).count();
        let jobs: Vec<Job> = inner.jobs.drain(..n).collect();
        inner.bytes -= jobs.iter().map(Job::bytes).sum::<usize>();
        jobs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(bytes: usize, ending: bool) -> Job {
        Job::Append { batch: Batch { ending, ..Batch::default() }, bytes, reply: oneshot::channel().0 }
    }

    #[test]
    fn limits_hold_and_leave_room_for_endings() {
        let queue = Queue::default();
        for _ in 0..QUEUE_BATCHES_MAX {
            queue.push(job(0, false)).unwrap();
        }
        assert!(matches!(queue.push(job(0, false)), Err(Error::QueueFull)));
        queue.push(job(0, true)).unwrap();
        assert_eq!(queue.take(Duration::ZERO, 1).len(), QUEUE_BATCHES_MAX + 1);
        queue.push(job(QUEUE_BYTES_MAX, false)).unwrap();
        assert!(matches!(queue.push(job(1, false)), Err(Error::QueueFull)));
        queue.push(job(QUEUE_BYTES_MAX, true)).unwrap();
        assert!(matches!(queue.push(job(1, true)), Err(Error::QueueFull)));
    }

    #[test]
    fn a_group_is_bounded_and_never_empty() {
        let queue = Queue::default();
        for bytes in [10, 3, 3, 3] {
            queue.push(job(bytes, false)).unwrap();
        }
        assert_eq!(queue.take(Duration::from_secs(1), 6).len(), 1, "one job larger than a group goes alone");
        assert_eq!(queue.take(Duration::from_secs(1), 6).len(), 2);
        assert_eq!(queue.take(Duration::from_secs(1), 6).len(), 1);
        assert!(queue.take(Duration::ZERO, 6).is_empty());
        queue.close(None);
        assert!(matches!(queue.push(job(1, true)), Err(Error::Closed)));
    }
}
