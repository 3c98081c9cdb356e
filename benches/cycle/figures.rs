//! Figures: percentiles of latencies, and what a process cost by its own account in /proc.

use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::Outcome;

/// Latencies of one part of a cycle.
#[derive(Debug, Default, Clone)]
pub struct Part(Vec<f64>);

impl Part {
    /// Adds one.
    pub fn add(&mut self, took: Duration) {
        self.0.push(took.as_secs_f64() * 1000.0);
    }
    /// Adds another agent's.
    pub fn join(&mut self, other: Self) {
        self.0.extend(other.0);
    }
    /// `{p50_ms, p99_ms, max_ms}`, nearest rank.
    pub fn figures(mut self) -> Value {
        self.0.sort_by(f64::total_cmp);
        let at = |share: f64| {
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)] // a rank
            let rank = (share * self.0.len() as f64).ceil().max(1.0) as usize - 1;
            self.0.get(rank).copied().map(round)
        };
        json!({ "p50_ms": at(0.5), "p99_ms": at(0.99), "max_ms": at(1.0) })
    }
}

/// Two digits after the point.
pub fn round(n: f64) -> f64 {
    (n * 100.0).round() / 100.0
}

/// What a process has used so far.
#[derive(Debug, Clone, Copy)]
pub struct Used {
    at: Instant,
    cpu_ms: f64,
    own_cpu_ms: f64,
    machine_busy_ms: f64,
}

/// Kernel ticks are hundredths of a second on every Linux that this runs on (`getconf CLK_TCK`).
const TICK_MS: f64 = 10.0;

impl Used {
    /// Now: of these processes together.
    pub fn of(pids: &[u32]) -> Outcome<Self> {
        Ok(Self {
            at: Instant::now(),
            cpu_ms: pids.iter().map(|pid| cpu_ms(&pid.to_string())).sum::<Outcome<f64>>()?,
            own_cpu_ms: cpu_ms("self")?,
            machine_busy_ms: machine_busy_ms()?,
        })
    }

    /// What `cycles` cycles cost since then: rate, CPU of the processes, of this one, and of the whole machine.
    pub fn since(self, pids: &[u32], cycles: usize) -> Outcome<Map<String, Value>> {
        let now = Self::of(pids)?;
        #[allow(clippy::cast_precision_loss)] // a count
        let n = cycles.max(1) as f64;
        let secs = (now.at - self.at).as_secs_f64();
        let mut out = Map::new();
        out.insert("cycles".to_owned(), json!(cycles));
        out.insert("secs".to_owned(), json!(round(secs)));
        out.insert("rate_per_sec".to_owned(), json!(round(n / secs)));
        for (name, spent) in [
            ("broker_cpu_ms_per_cycle", now.cpu_ms - self.cpu_ms),
            ("client_cpu_ms_per_cycle", now.own_cpu_ms - self.own_cpu_ms),
            ("machine_cpu_ms_per_cycle", now.machine_busy_ms - self.machine_busy_ms),
        ] {
            out.insert(name.to_owned(), json!((spent / n * 1000.0).round() / 1000.0));
        }
        out.insert("load_average".to_owned(), json!(load_average()?));
        Ok(out)
    }
}

/// User and system time of a process with all its threads, in milliseconds (proc(5), fields 14 and 15).
fn cpu_ms(pid: &str) -> Outcome<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field may hold blanks; it ends with the last parenthesis.
    let fields: Vec<&str> = stat.rsplit_once(')').map(|(_, f)| f.split_whitespace().collect()).unwrap_or_default();
    let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok()).ok_or("unreadable /proc/PID/stat");
    Ok((ticks(11)? + ticks(12)?) * TICK_MS)
}

/// Time that all processors together did not idle, in milliseconds.
fn machine_busy_ms() -> Outcome<f64> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    let fields: Vec<f64> =
        stat.lines().next().unwrap_or_default().split_whitespace().skip(1).filter_map(|f| f.parse().ok()).collect();
    // user, nice, system, (idle, iowait), irq, softirq
    Ok([0, 1, 2, 5, 6].iter().filter_map(|i| fields.get(*i)).sum::<f64>() * TICK_MS)
}

/// The load average of the last minute.
pub fn load_average() -> Outcome<f64> {
    let text = std::fs::read_to_string("/proc/loadavg")?;
    Ok(text.split_whitespace().next().and_then(|n| n.parse().ok()).ok_or("unreadable /proc/loadavg")?)
}

/// The peak of a process's memory so far, in MiB (`VmHWM`).
pub fn peak_rss_mib(pid: u32) -> Outcome<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib: f64 = status
        .lines()
        .find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.trim().parse().ok())
        .ok_or("no VmHWM")?;
    Ok(round(kib / 1024.0))
}
