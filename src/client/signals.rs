//! The signals that we get, `exec` above all: one set of listeners for all of a run, since tokio never gives a signal's
//! default action back once somebody listened. What was ignored when we were started stays ignored (`nohup`, `cmd &`).

use std::future::poll_fn;
use std::io;
use std::task::Poll;

use futures::FutureExt as _;
use rustix::process::{Pid, Signal};
use tokio::process::Child;
use tokio::signal::unix::{Signal as Stream, SignalKind, signal};

/// Those that are passed on to the command.
const PASSED_ON: [Signal; 6] = [Signal::TERM, Signal::HUP, Signal::INT, Signal::QUIT, Signal::USR1, Signal::USR2];
/// Those of them that say that it shall be over, while there is no command yet.
const ENDING: [Signal; 4] = [Signal::TERM, Signal::HUP, Signal::INT, Signal::QUIT];
/// Those that a terminal sends to every process of its foreground group.
const OF_A_TERMINAL: [Signal; 2] = [Signal::INT, Signal::QUIT];

/// The listeners.
pub struct Signals {
    streams: Vec<(Signal, Stream)>,
    ending: Option<Signal>,
}

impl Signals {
    /// Listens from now on.
    pub fn listen() -> io::Result<Self> {
        let ignored = ignored(&std::fs::read_to_string("/proc/self/status").unwrap_or_default());
        let streams = PASSED_ON
            .into_iter()
            .filter(|s| ignored & bit(*s) == 0)
            .map(|s| Ok((s, signal(SignalKind::from_raw(s.as_raw()))?)))
            .collect::<io::Result<_>>()?;
        Ok(Self { streams, ending: None })
    }

    /// The next one. Nothing is lost if this is dropped.
    pub async fn next(&mut self) -> Signal {
        poll_fn(|cx| {
            for (signal, stream) in &mut self.streams {
                if stream.poll_recv(cx).is_ready() {
                    return Poll::Ready(*signal);
                }
            }
            Poll::Pending
        })
        .await
    }

    /// Comes back with the exit code when we are told to stop, now or before.
    pub async fn told(&mut self) -> i32 {
        while self.ending.is_none() {
            let next = self.next().await;
            self.ending = ENDING.contains(&next).then_some(next);
        }
        128 + self.ending.map_or(0, Signal::as_raw)
    }

    /// The exit code, if we were told to stop.
    pub fn told_already(&mut self) -> Option<i32> {
        self.told().now_or_never()
    }

    /// Waits for the child, and passes on to it what it didn't get by itself.
    pub async fn supervise(&mut self, child: &mut Child) -> io::Result<std::process::ExitStatus> {
        loop {
            tokio::select! {
                status = child.wait() => return status,
                signal = self.next() => {
                    if !(OF_A_TERMINAL.contains(&signal) && in_foreground()) {
                        send(child, signal);
                    }
                }
            }
        }
    }
}

/// Sends a signal to the child.
pub fn send(child: &Child, signal: Signal) {
    if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw) {
        // It may be gone already.
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// The place of a signal in the masks of `/proc/PID/status`.
const fn bit(signal: Signal) -> u64 {
    1 << (signal.as_raw() - 1)
}

/// `SigIgn` of `/proc/PID/status`.
fn ignored(status: &str) -> u64 {
    let mask = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    mask.and_then(|m| u64::from_str_radix(m.trim(), 16).ok()).unwrap_or(0)
}

/// True if a terminal's keys reach our whole group, the child included.
fn in_foreground() -> bool {
    group_is_in_foreground(&std::fs::read_to_string("/proc/self/stat").unwrap_or_default())
}

/// proc(5): after the name in parentheses come state, parent, group, session, terminal, the terminal's foreground group.
fn group_is_in_foreground(stat: &str) -> bool {
    let mut fields = stat.rsplit(')').next().unwrap_or_default().split_ascii_whitespace().skip(2);
    let group = fields.next();
    let foreground = fields.nth(2);
    group.is_some() && group == foreground
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_proc_says_is_read() {
        let status = "Name:\tx\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001003\nSigCgt:\tffffffffffffffff\n";
        let mask = ignored(status);
        assert!(mask & bit(Signal::HUP) != 0 && mask & bit(Signal::INT) != 0 && mask & bit(Signal::TERM) == 0);
        assert_eq!(ignored(""), 0);
        assert!(group_is_in_foreground("12 (a) b) S 1 12 9 34816 12 4194304 0"));
        assert!(!group_is_in_foreground("12 (a b) S 1 12 9 34816 13 4194304 0"));
        assert!(!group_is_in_foreground("12 (a b) S 1 12 9 0 -1 4194304 0"));
        assert!(!group_is_in_foreground(""));
    }
}
