//! What the journal's tests share: a fixed clock, small options, and a disk in memory that loses what was
//! not synced, fills up and fails on demand.
#![allow(dead_code)] // each test binary uses its part

mod choices;
pub mod mem_disk;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub use choices::Choices;

use countersign::audit::disk::RealDisk;
use countersign::audit::merkle::Hash;
use countersign::audit::note::{Signer, Verifier};
use countersign::audit::segment;
use countersign::audit::verify::{self, Report, Verified};
use countersign::core::id::Timestamp;
use countersign::store::embedded::journal::{Acknowledged, Batch, Error, Journal, Opened, Options};
use countersign::time::Clock;

/// A clock that moves by one millisecond each time it is looked at.
#[derive(Debug, Default)]
pub struct TickClock(AtomicU64);

impl Clock for TickClock {
    fn wall(&self) -> Timestamp {
        Timestamp(1_700_000_000_000 + self.0.fetch_add(1, Ordering::Relaxed))
    }
    fn boot_ms(&self) -> u64 {
        0
    }
    fn boot_id(&self) -> String {
        "test".into()
    }
    fn sleep(&self, _: Duration) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(std::future::ready(()))
    }
}

/// A clock whose boot time is set.
#[derive(Debug, Default)]
pub struct SetClock(TickClock, AtomicU64);

impl SetClock {
    pub fn set_boot_ms(&self, ms: u64) {
        self.1.store(ms, Ordering::Relaxed);
    }
}

impl Clock for SetClock {
    fn wall(&self) -> Timestamp {
        self.0.wall()
    }
    fn boot_ms(&self) -> u64 {
        self.1.load(Ordering::Relaxed)
    }
    fn boot_id(&self) -> String {
        self.0.boot_id()
    }
    fn sleep(&self, time: Duration) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        self.0.sleep(time)
    }
}

pub fn clock() -> Arc<dyn Clock> {
    Arc::new(TickClock::default())
}

pub const KEY_NAME: &str = "broker.example/journal";

pub fn signer() -> Signer {
    Signer::from_seed(KEY_NAME, &[42; 32]).unwrap()
}

pub fn key() -> Verifier {
    signer().verifier()
}

/// Segments of about six small records, and a small reserve, so that every byte can be tried.
pub fn small() -> Options {
    Options {
        segment_bytes: 700,
        reserve_bytes: 256,
        extend_bytes: 64,
        signer: Some(signer()),
        earlier_keys: Vec::new(),
        checkpoint_records: 1_000_000,
        checkpoint_secs: 60,
    }
}

pub fn batch(texts: &[&str]) -> Batch {
    Batch { payloads: texts.iter().map(|t| t.as_bytes().to_vec()).collect(), ..Batch::default() }
}

pub fn ending(text: &str) -> Batch {
    Batch { ending: true, ..batch(&[text]) }
}

pub fn options() -> verify::Options {
    verify::Options { keys: vec![key()], ..verify::Options::default() }
}

pub fn open(dir: &Path, known: &Acknowledged) -> Result<(Journal, Opened), Error> {
    Journal::open(dir, small(), clock(), known)
}

pub fn write(dir: &Path, texts: &[&str]) -> Vec<Hash> {
    let (journal, _) = open(dir, &Acknowledged::default()).unwrap();
    texts.iter().map(|t| journal.enqueue(batch(&[t])).unwrap().wait().unwrap().leaf).collect()
    // Dropping closes it: checkpoint, and the mark of a clean end.
}

pub const EVENTS: [&str; 12] =
    ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima"];

/// A cleanly closed journal of twelve records in two segments, with a reserve of zeros behind the last.
pub fn closed() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &EVENTS);
    assert_eq!(segments(dir.path()).len(), 2);
    dir
}

pub fn segments(dir: &Path) -> Vec<PathBuf> {
    segment::list(&RealDisk, dir).unwrap().into_iter().map(|first| dir.join(segment::file_name(first))).collect()
}

pub fn verified(dir: &Path, options: &verify::Options) -> Verified {
    match verify::verify(dir, options).unwrap() {
        Report::Verified(verified) => verified,
        Report::Broken(broken) => panic!("{broken}"),
    }
}
