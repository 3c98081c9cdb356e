//! The binary as a process: started with its output in files, stopped by its pid.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::config::Ports;

/// How long a stop may take: draining, then endings that are under way.
const STOP: Duration = Duration::from_secs(40);

/// `countersign serve`.
pub struct Broker {
    folder: PathBuf,
    child: Option<Child>,
    /// Variables that it gets.
    pub env: Vec<(String, String)>,
}

/// The binary under test.
pub fn binary() -> &'static str {
    env!("CARGO_BIN_EXE_countersign")
}

impl Broker {
    pub fn new(folder: &Path, _: &Ports) -> Self {
        Self { folder: folder.to_owned(), child: None, env: Vec::new() }
    }

    fn log(&self, name: &str) -> File {
        File::options().create(true).append(true).open(self.folder.join(name)).unwrap()
    }

    pub fn spawn(&mut self) {
        assert!(self.child.is_none(), "it runs already");
        let mut command = Command::new(binary());
        command.args(["serve", "--config"]).arg(self.folder.join("countersign.toml"));
        command.env_clear().env("COUNTERSIGN_LOG", "info,countersign=debug").envs(self.env.iter().cloned());
        command.stdin(Stdio::null()).stdout(self.log("stdout.log")).stderr(self.log("stderr.log"));
        self.child = Some(command.spawn().unwrap());
    }

    pub fn pid(&self) -> Pid {
        let id = self.child.as_ref().expect("it runs").id();
        Pid::from_raw(i32::try_from(id).unwrap()).unwrap()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|c| matches!(c.try_wait(), Ok(None)))
    }

    /// SIGKILL, and gone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// SIGTERM, and its exit status.
    pub async fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.ended().await
    }

    /// Waits until it ended by itself.
    pub async fn ended(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("it runs");
        let deadline = Instant::now() + STOP;
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                panic!("it didn't end:\n{}", self.stderr());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub fn stderr(&self) -> String {
        std::fs::read_to_string(self.folder.join("stderr.log")).unwrap_or_default()
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = self.stderr();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("--- the broker's last lines\n{}", lines[lines.len().saturating_sub(40)..].join("\n"));
        }
    }
}
