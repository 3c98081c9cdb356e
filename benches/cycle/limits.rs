//! What the machine can do: durable appends to the disk that holds the data folder, and what it is.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Outcome;
use crate::figures::{Part, load_average, round};

/// Bytes of one record: about what an event of the journal has.
const RECORD_BYTES: usize = 600;

/// The file system under a folder, and its device, by the longest mount point (proc(5), mounts).
pub fn disk_of(folder: &Path) -> Outcome<Value> {
    let folder = folder.canonicalize()?;
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    let mount = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (device, point, kind) = (fields.next()?, fields.next()?, fields.next()?);
            folder.starts_with(point).then_some((point, device, kind))
        })
        .max_by_key(|(point, ..)| point.len())
        .ok_or("no mount point")?;
    Ok(json!({ "folder_on": mount.0, "device": mount.1, "file_system": mount.2 }))
}

/// Processors, memory, kernel, load.
pub fn machine() -> Outcome<Value> {
    let line = |file: &str, name: &str| -> Outcome<String> {
        let text = std::fs::read_to_string(file)?;
        let found = text.lines().find_map(|l| Some(l.strip_prefix(name)?.split_once(':')?.1.trim().to_owned()));
        Ok(found.unwrap_or_default())
    };
    Ok(json!({
        "processors": std::thread::available_parallelism()?.get(),
        "processor": line("/proc/cpuinfo", "model name")?,
        "memory": line("/proc/meminfo", "MemTotal")?,
        "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
        "load_average_before": load_average()?,
    }))
}

/// Durable appends: `callers` at once, each waits until its own record is synced; one `fdatasync` for all that waits.
pub fn appends(folder: &Path, callers: usize, length: Duration) -> Outcome<Value> {
    let path = folder.join("appends.bin");
    let mut file = File::create(&path)?;
    let (queue, queued) = mpsc::channel::<mpsc::SyncSender<()>>();
    let until = Instant::now() + length;
    let threads: Vec<_> = (0..callers)
        .map(|_| {
            let queue = queue.clone();
            std::thread::spawn(move || {
                let mut part = Part::default();
                while Instant::now() < until {
                    let (done, synced) = mpsc::sync_channel(1);
                    let began = Instant::now();
                    if queue.send(done).is_err() || synced.recv().is_err() {
                        break;
                    }
                    part.add(began.elapsed());
                }
                part
            })
        })
        .collect();
    drop(queue);
    let record = [7u8; RECORD_BYTES];
    let (mut appended, mut syncs, began) = (0u32, 0u32, Instant::now());
    while let Ok(first) = queued.recv() {
        let all: Vec<_> = std::iter::once(first).chain(queued.try_iter()).collect();
        for _ in &all {
            file.write_all(&record)?;
        }
        file.sync_data()?;
        syncs += 1;
        for done in all {
            appended += 1;
            let _ = done.send(()); // its caller waits
        }
    }
    let secs = began.elapsed().as_secs_f64();
    let mut part = Part::default();
    for thread in threads {
        part.join(thread.join().map_err(|_| "an appending thread failed")?);
    }
    std::fs::remove_file(&path)?;
    Ok(json!({
        "callers": callers, "record_bytes": RECORD_BYTES, "appends_per_sec": round(f64::from(appended) / secs),
        "syncs_per_sec": round(f64::from(syncs) / secs), "append": part.figures(), "load_average": load_average()?,
    }))
}
