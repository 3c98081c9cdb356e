//! Measures the journal on the disk that holds the given folder: durable appends a second at 1 and 16 callers, the
//! bare `fdatasync` limit beside it, CPU for each record, and the speed of reading and verifying.
//! `cargo run --release --example journal_rate -- FOLDER`

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use countersign::audit::disk::{Access, Disk as _, RealDisk};
use countersign::audit::note::Signer;
use countersign::audit::reader::read_from;
use countersign::audit::verify::{self, Report};
use countersign::store::embedded::journal::{Acknowledged, Batch, Journal, Options};
use countersign::time::SystemClock;

const PAYLOAD_BYTES: usize = 600;
const SECONDS: u64 = 5;
const READ_RECORDS: usize = 500_000;

fn rate(n: u64, since: Instant) -> f64 {
    #[allow(clippy::cast_precision_loss)] // for display
    let n = n as f64;
    n / since.elapsed().as_secs_f64()
}

fn options() -> Options {
    Options { signer: Signer::from_seed("journal_rate", &[1; 32]).ok(), ..Options::default() }
}

fn cpu() -> Duration {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(u64::try_from(t.tv_sec).unwrap_or(0), u32::try_from(t.tv_nsec).unwrap_or(0))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let base = PathBuf::from(std::env::args().nth(1).ok_or("give a folder on the disk to measure")?);
    std::fs::create_dir_all(&base)?;
    bare(&base.join("bare"))?;
    for callers in [1, 16, 64] {
        let dir = base.join(format!("callers-{callers}"));
        appends(&dir, callers)?;
        std::fs::remove_dir_all(&dir)?;
    }
    reading(&base.join("reading"))
}

/// One write and one sync after the other, into allocated space: the machine's limit.
fn bare(path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let file = RealDisk.open(path, Access::Create)?;
    file.allocate(0, 32 << 20)?;
    file.sync_all()?;
    let (start, mut n) = (Instant::now(), 0);
    while start.elapsed().as_secs() < SECONDS {
        file.write_at(&[7; PAYLOAD_BYTES], n * 672 % (31 << 20))?;
        file.sync_data()?;
        n += 1;
    }
    println!("bare write + fdatasync: {:.0}/s", rate(n, start));
    Ok(std::fs::remove_file(path)?)
}

fn appends(dir: &Path, callers: usize) -> Result<(), Box<dyn std::error::Error>> {
    let (journal, _) = Journal::open(dir, options(), Arc::new(SystemClock), &Acknowledged::default())?;
    let journal = Arc::new(journal);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let (start, cpu_start) = (Instant::now(), cpu());
    let mut latencies: Vec<Duration> = runtime.block_on(async {
        let tasks: Vec<_> = (0..callers)
            .map(|_| {
                let journal = journal.clone();
                tokio::spawn(async move {
                    let mut took = Vec::new();
                    while start.elapsed().as_secs() < SECONDS {
                        let asked = Instant::now();
                        if journal.append(vec![vec![b'x'; PAYLOAD_BYTES]]).await.is_err() {
                            break;
                        }
                        took.push(asked.elapsed());
                    }
                    took
                })
            })
            .collect();
        let mut all = Vec::new();
        for task in tasks {
            all.extend(task.await.unwrap_or_default());
        }
        all
    });
    latencies.sort_unstable();
    let counts = journal.counts();
    let each = cpu().saturating_sub(cpu_start) / u32::try_from(counts.records.max(1))?;
    println!(
        "{callers:>2} callers: {:.0} durable appends/s, {} syncs for {} records, p50 {:?}, p99 {:?}, CPU {each:?} each (callers included)",
        rate(counts.records, start),
        counts.syncs,
        counts.records,
        latencies[latencies.len() / 2],
        latencies[latencies.len() * 99 / 100],
    );
    Ok(())
}

fn reading(dir: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let (journal, _) = Journal::open(dir, options(), Arc::new(SystemClock), &Acknowledged::default())?;
    let (start, cpu_start) = (Instant::now(), cpu());
    let mut pending = Vec::new();
    for _ in 0..READ_RECORDS / 100 {
        pending.push(journal.enqueue(Batch { payloads: vec![vec![b'x'; PAYLOAD_BYTES]; 100], ..Batch::default() })?);
        if pending.len() == 50 {
            pending.drain(..).try_for_each(|p| p.wait().map(drop))?;
        }
    }
    pending.into_iter().try_for_each(|p| p.wait().map(drop))?;
    let records = journal.counts().records;
    let each = cpu().saturating_sub(cpu_start) / u32::try_from(records)?;
    println!("bulk: {:.0} records/s, CPU {each:?} a record", rate(records, start));
    drop(journal);
    let start = Instant::now();
    let (mut reader, mut n, mut bytes) = (read_from(dir, 1)?, 0, 0);
    while let Some(record) = reader.next_record()? {
        n += 1;
        bytes += record.payload.len();
    }
    println!("reading with chain: {:.0} records/s ({n} records, {bytes} bytes)", rate(n, start));
    let start = Instant::now();
    let Report::Verified(v) = verify::verify(dir, &verify::Options::default())? else { return Err("broken".into()) };
    println!("audit verify: {:.0} records/s", rate(v.last_seq, start));
    let start = Instant::now();
    let (_journal, opened) = Journal::open(dir, options(), Arc::new(SystemClock), &Acknowledged::default())?;
    println!("open: {:?} for {} records", start.elapsed(), opened.last_seq);
    Ok(std::fs::remove_dir_all(dir)?)
}
