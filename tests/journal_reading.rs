//! "Who keeps the record can read it from any place, follow it, prove it, and lock it." On the real disk.

mod journal_support;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use countersign::audit::disk::{Access, Disk, DiskFile, Stat};
use countersign::audit::note::Signer;
use countersign::audit::pick::MARK_BYTES;
use countersign::audit::proof::{verify_consistency, verify_inclusion};
use countersign::audit::reader::{self, read_from};
use countersign::audit::segment;
use countersign::audit::verify::{self, Report, verify_on};
use countersign::store::embedded::JournalLog;
use countersign::store::embedded::journal::{Acknowledged, Journal, Options};
use countersign::store::engine::Log as _;
use journal_support::mem_disk::MemDisk;
use journal_support::{EVENTS, batch, clock, closed, key, open, options, segments, small, verified};

#[test]
fn records_are_read_from_any_place_and_proven() {
    let dir = closed();
    for from in 0..=13 {
        let mut records = read_from(dir.path(), from).unwrap();
        let mut texts = Vec::new();
        while let Some(r) = records.next_record().unwrap() {
            texts.push(String::from_utf8(r.payload.to_vec()).unwrap());
        }
        let skip = usize::try_from(from.max(1) - 1).unwrap();
        assert_eq!(texts, EVENTS[skip..], "from {from}");
    }
    let whole = verified(dir.path(), &options());
    let (leaf, path, root) = reader::prove_inclusion(dir.path(), 5, 12).unwrap().unwrap();
    assert_eq!(root, whole.root);
    assert!(verify_inclusion(leaf, 4, 12, &path, root));
    let (_, _, old_root) = reader::prove_inclusion(dir.path(), 1, 7).unwrap().unwrap();
    let proof = reader::prove_consistency(dir.path(), 7, 12).unwrap().unwrap();
    assert!(verify_consistency(7, old_root, 12, root, &proof));
    assert_eq!(reader::prove_inclusion(dir.path(), 13, 13).unwrap(), None);
    assert_eq!(reader::prove_consistency(dir.path(), 7, 13).unwrap(), None);
}

#[test]
fn a_reader_follows_the_writer_over_segments() {
    let dir = tempfile::tempdir().unwrap();
    let mut tail = read_from(dir.path(), 1).unwrap();
    assert!(tail.next_record().unwrap().is_none());
    let (journal, _) = open(dir.path(), &Acknowledged::default()).unwrap();
    for i in 1..=40 {
        journal.enqueue(batch(&[&format!("event {i}")])).unwrap().wait().unwrap();
        let record = tail.next_record().unwrap().expect("there at once");
        assert_eq!((record.meta.seq, record.payload), (i, format!("event {i}").as_bytes()));
        assert!(tail.next_record().unwrap().is_none());
    }
    assert!(segments(dir.path()).len() > 3);
    // `audit verify` works beside the running broker.
    assert_eq!(verified(dir.path(), &options()).last_seq, 40);
}

#[test]
fn a_rotated_key_is_accepted_when_the_earlier_one_is_given() {
    let dir = closed();
    let mut rotated = small();
    rotated.signer = Some(Signer::from_seed("broker.example/journal", &[9; 32]).unwrap());
    let e = Journal::open(dir.path(), rotated, clock(), &Acknowledged::default()).unwrap_err();
    assert!(e.to_string().contains("earlier verifier key"), "{e}");
    let mut rotated = small();
    rotated.signer = Some(Signer::from_seed("broker.example/journal", &[9; 32]).unwrap());
    rotated.earlier_keys = vec![key()];
    drop(Journal::open(dir.path(), rotated, clock(), &Acknowledged::default()).unwrap());
    let new = Signer::from_seed("broker.example/journal", &[9; 32]).unwrap().verifier();
    verified(dir.path(), &verify::Options { keys: vec![new], ..verify::Options::default() });
}

#[test]
fn locked_names_the_holder() {
    let dir = closed();
    let _holder = open(dir.path(), &Acknowledged::default()).unwrap();
    let e = open(dir.path(), &Acknowledged::default()).unwrap_err();
    assert!(e.to_string().contains(&format!("process id {}", std::process::id())), "{e}");
}

/// Five segments of the size that the broker makes them, on a disk that counts.
#[test]
fn one_record_costs_one_part_of_one_segment() {
    let disk = MemDisk::default();
    let (dir, options) = (PathBuf::from("/j"), || Options { segment_bytes: 1 << 20, ..small() });
    let open = || {
        JournalLog::open_stepped(Arc::new(disk.clone()), &dir, options(), clock(), &Acknowledged::default()).unwrap()
    };
    let payload = |n: u64| format!("record {n} {}", "x".repeat(1000));
    let (log, mut stepper, _) = open();
    for n in 1..=4500 {
        let receipt = log.enqueue(vec![payload(n).into_bytes()], false, None, 0).unwrap();
        stepper.step();
        futures::executor::block_on(receipt).unwrap();
    }
    let check = |log: &JournalLog, what: &str| {
        assert!(segment::list(&disk, &dir).unwrap().len() >= 5);
        for seqs in [vec![3], vec![4498], vec![1, 1000, 1001, 4500], vec![2250]] {
            let before = disk.bytes_read();
            let read = log.read(&seqs).unwrap();
            let cost = disk.bytes_read() - before;
            let wanted: Vec<_> = seqs.iter().map(|n| (*n, payload(*n).into_bytes())).collect();
            assert!(read == wanted, "{what}: {seqs:?}");
            // From the mark before it, and what is read at once.
            assert!(cost <= seqs.len() as u64 * 3 * MARK_BYTES, "{what}: {seqs:?} cost {cost} bytes");
        }
        assert!(log.read(&[4501]).is_err(), "{what}: there is no such record");
    };
    check(&log, "as they were written");
    drop((log, stepper));
    disk.process_dies();
    let (log, _stepper, _) = open();
    check(&log, "as they were found");

    // A frame that was changed meanwhile is never taken for good.
    let name = dir.join(segment::file_name(1));
    let at = disk.read(&name).unwrap().windows(9).position(|w| w == b"record 3 ").unwrap();
    disk.open(&name, Access::Write).unwrap().write_at(b"X", at as u64).unwrap();
    let said = log.read(&[3]).unwrap_err().to_string();
    assert!(said.contains("checksum") && said.contains("record 3"), "{said}");
    log.read(&[2]).unwrap();
}

/// A disk on which the broker writes on while somebody else reads.
#[derive(Clone)]
struct Racing {
    disk: MemDisk,
    reads: Arc<AtomicU64>,
    write: Arc<Mutex<dyn FnMut(u64) + Send>>,
}

impl std::fmt::Debug for Racing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Racing")
    }
}

struct RacingFile(Box<dyn DiskFile>, Racing);

impl DiskFile for RacingFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        (self.1.write.lock().unwrap())(self.1.reads.fetch_add(1, Ordering::Relaxed));
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(bytes, offset)
    }
    fn allocate(&self, from: u64, len: u64) -> io::Result<()> {
        self.0.allocate(from, len)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }
    fn sync_all(&self) -> io::Result<()> {
        self.0.sync_all()
    }
    fn stat(&self) -> io::Result<Stat> {
        self.0.stat()
    }
}

impl Disk for Racing {
    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.disk.list(dir)
    }
    fn open(&self, path: &Path, access: Access) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(RacingFile(self.disk.open(path, access)?, self.clone())))
    }
    fn stat(&self, path: &Path) -> io::Result<Stat> {
        self.disk.stat(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.disk.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk.remove(path)
    }
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.disk.create_dir(dir)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.disk.sync_dir(dir)
    }
    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Send + Sync>>> {
        self.disk.lock(path)
    }
}

#[test]
fn verifying_beside_a_writer_finds_no_damage_that_is_not_there() {
    let dir = PathBuf::from("/j");
    for (at, groups) in (0..120u64).flat_map(|at| [(at, 1), (at, 2), (at, 5)]) {
        let disk = MemDisk::default();
        let roomy = Options { segment_bytes: 1 << 20, reserve_bytes: 16 << 10, ..small() };
        let (journal, mut stepper, _) =
            Journal::open_stepped(Arc::new(disk.clone()), &dir, roomy, clock(), &Acknowledged::default()).unwrap();
        let mut append = move |text: &str| {
            let pending = journal.enqueue(batch(&[text, "and more of the same"])).unwrap();
            stepper.step();
            pending.wait().unwrap();
        };
        for n in 0..20 {
            append(&format!("event {n}"));
        }
        let write = Arc::new(Mutex::new(move |read| {
            if read >= at && read < at + 3 {
                for n in 0..groups {
                    append(&format!("meanwhile {n}"));
                }
            }
        }));
        let racing = Racing { disk, reads: Arc::default(), write };
        match verify_on(&racing, &dir, &options()).unwrap() {
            Report::Verified(v) => assert!(v.last_seq >= 40 && v.torn.is_none(), "{at} {groups}: {v:?}"),
            Report::Broken(broken) => panic!("read {at}, {groups} groups: {broken}"),
        }
    }
}
