//! "The disk lies, fills up, fails or loses power: what was acknowledged is there, and nothing is half there."
//! The production writer, driven step by step on a disk in memory.

mod journal_support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use countersign::audit::reader::read_from_on;
use countersign::audit::verify::{self, Report, Verified, verify_on};
use countersign::store::embedded::journal::{Acknowledged, Batch, Error, Journal, Opened, Options, Pending, Stepper};
use journal_support::mem_disk::MemDisk;
use journal_support::{Choices, batch, clock, ending, key, small};

fn dir() -> PathBuf {
    PathBuf::from("/j")
}

fn open(disk: &MemDisk, known: &Acknowledged) -> Result<(Journal, Stepper, Opened), Error> {
    open_with(disk, small(), known)
}

fn open_with(disk: &MemDisk, options: Options, known: &Acknowledged) -> Result<(Journal, Stepper, Opened), Error> {
    Journal::open_stepped(Arc::new(disk.clone()), &dir(), options, clock(), known)
}

fn fresh(disk: &MemDisk) -> (Journal, Stepper) {
    let (journal, stepper, _) = open(disk, &Acknowledged::default()).unwrap();
    (journal, stepper)
}

fn append(journal: &Journal, stepper: &mut Stepper, batch: Batch) -> Result<u64, Error> {
    let pending = journal.enqueue(batch)?;
    stepper.step();
    pending.wait().map(|a| a.last_seq())
}

fn all(disk: &MemDisk) -> Vec<String> {
    let mut records = read_from_on(Arc::new(disk.clone()), &dir(), 1).unwrap();
    let mut out = Vec::new();
    while let Some(record) = records.next_record().unwrap() {
        out.push(String::from_utf8(record.payload.to_vec()).unwrap());
    }
    out
}

fn verified(disk: &MemDisk) -> Verified {
    match verify_on(disk, &dir(), &verify::Options { keys: vec![key()], ..Default::default() }).unwrap() {
        Report::Verified(verified) => verified,
        Report::Broken(broken) => panic!("{broken}"),
    }
}

fn seen(seq: u64) -> Acknowledged {
    Acknowledged { view_seq: seq, ..Acknowledged::default() }
}

/// Batches of one to four records of different sizes; each record names its batch and its place in it.
fn workload() -> Vec<Vec<String>> {
    let record = |b: usize, i: usize| format!("b{b}.{i} {}", "x".repeat((b * 37 + i * 91) % 700));
    (0..14).map(|b| (0..=b % 4).map(|i| record(b, i)).collect()).collect()
}

fn as_batch(texts: &[String]) -> Batch {
    Batch { payloads: texts.iter().map(|t| t.clone().into_bytes()).collect(), ..Batch::default() }
}

/// Runs the workload, two batches a group, until the disk dies. Returns how many batches were acknowledged.
fn run(disk: &MemDisk, work: &[Vec<String>]) -> usize {
    let options = Options { checkpoint_records: 7, segment_bytes: 2500, ..small() };
    let Ok((journal, mut stepper, _)) = open_with(disk, options, &Acknowledged::default()) else { return 0 };
    let mut acknowledged = 0;
    for group in work.chunks(2) {
        let pending: Vec<Pending> = group.iter().filter_map(|b| journal.enqueue(as_batch(b)).ok()).collect();
        stepper.step();
        for p in pending {
            match p.wait() {
                Ok(_) => acknowledged += 1,
                Err(_) => return acknowledged,
            }
        }
    }
    acknowledged
}

fn check_after_crash(disk: &MemDisk, work: &[Vec<String>], acknowledged: usize, with_view: bool, what: &str) {
    let least: usize = work[..acknowledged].iter().map(Vec::len).sum();
    let known = if with_view { seen(least as u64) } else { Acknowledged::default() };
    if !disk.names_any_segment() && least == 0 {
        return; // died before the first segment was there
    }
    // Offline first: what a crash leaves is never taken for damage.
    let torn = verified(disk).torn;
    let (journal, mut stepper, opened) = open(disk, &known).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(torn.is_some(), opened.cut.is_some(), "{what}: verify and open agree on what is torn");
    if let Some(cut) = &opened.cut {
        let kept = disk.read(&cut.kept_in).unwrap();
        assert_eq!(kept.len() as u64, cut.bytes, "{what}: the cut bytes are kept");
        assert!(kept.last().is_some_and(|b| *b != 0), "{what}");
    }
    let there = all(disk);
    assert!(there.len() >= least, "{what}: {} records of {least} acknowledged", there.len());
    let flat: Vec<&String> = work.iter().flatten().collect();
    assert!(there.iter().eq(flat[..there.len()].iter().copied()), "{what}: the records are the ones that were written");
    let mut boundary = 0;
    let boundaries: Vec<usize> = work
        .iter()
        .map(|b| {
            boundary += b.len();
            boundary
        })
        .collect();
    assert!(there.is_empty() || boundaries.contains(&there.len()), "{what}: a batch is all or nothing");
    // And it goes on.
    let seq = append(&journal, &mut stepper, batch(&["after"])).unwrap();
    assert_eq!(seq, there.len() as u64 + 1, "{what}");
    assert_eq!(verified(disk).last_seq, seq, "{what}");
}

#[test]
fn power_may_go_at_any_operation() {
    let work = workload();
    let total = {
        let disk = MemDisk::default();
        assert_eq!(run(&disk, &work), work.len());
        disk.ops()
    };
    assert!(total > 80, "the workload has syncs, rolls and checkpoints: {total}");
    let mut torn = 0;
    for at in 0..=total {
        for seed in 0..12 {
            let disk = MemDisk::default();
            disk.set(|s| s.dead_from = Some(at));
            let acknowledged = run(&disk, &work);
            disk.power_cut(&mut Choices(at * 1000 + seed));
            let what = format!("operation {at}, seed {seed}");
            let cut_before = disk.names_any_segment() && verified(&disk).torn.is_some();
            torn += u32::from(cut_before);
            check_after_crash(&disk, &work, acknowledged, seed % 2 == 0, &what);
        }
    }
    assert!(torn > 50, "the cases have torn tails: {torn}");
}

#[test]
fn the_process_may_die_at_any_operation() {
    let work = workload();
    for at in 0..120 {
        let disk = MemDisk::default();
        disk.set(|s| s.dead_from = Some(at));
        let acknowledged = run(&disk, &work);
        disk.process_dies();
        check_after_crash(&disk, &work, acknowledged, at % 2 == 0, &format!("operation {at}"));
    }
}

#[test]
fn a_failed_sync_is_never_believed_again() {
    let disk = MemDisk::default();
    let (journal, mut stepper) = fresh(&disk);
    append(&journal, &mut stepper, batch(&["one"])).unwrap();
    disk.set(|s| s.fail_syncs = 1);
    assert!(matches!(append(&journal, &mut stepper, batch(&["two"])), Err(Error::Io { action: "sync", .. })));
    // Stopped, endings too, with a clear error, until reopened.
    assert!(matches!(append(&journal, &mut stepper, batch(&["three"])), Err(Error::Poisoned(_))));
    assert!(matches!(append(&journal, &mut stepper, ending("four")), Err(Error::Poisoned(_))));
    assert!(journal.poisoned().is_some());

    let opened = reopen(&journal, &mut stepper).unwrap();
    assert_eq!(opened.last_seq, 1, "what was told to have failed isn't there");
    let cut = opened.cut.unwrap();
    assert!(String::from_utf8_lossy(&disk.read(&cut.kept_in).unwrap()).contains("two"), "the cut bytes are kept");
    assert!(journal.poisoned().is_none());
    assert_eq!(append(&journal, &mut stepper, batch(&["five"])).unwrap(), 2);

    // Nothing rests on pages that only memory has.
    disk.power_cut(&mut Choices(1));
    drop((journal, stepper));
    let (_journal, _stepper, opened) = open(&disk, &seen(2)).unwrap();
    assert_eq!((opened.last_seq, opened.cut), (2, None));
    assert_eq!(all(&disk), ["one", "five"]);
}

fn reopen(journal: &Journal, stepper: &mut Stepper) -> Result<Opened, Error> {
    let reopening = journal.reopen();
    let mut reopening = std::pin::pin!(reopening);
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    loop {
        if let std::task::Poll::Ready(done) = std::future::Future::poll(reopening.as_mut(), &mut cx) {
            return done;
        }
        stepper.step();
    }
}

#[test]
fn records_read_from_memory_after_a_failed_sync_are_written_again() {
    let disk = MemDisk::default();
    let (journal, mut stepper) = fresh(&disk);
    append(&journal, &mut stepper, batch(&["one"])).unwrap();
    disk.set(|s| s.fail_syncs = 1);
    append(&journal, &mut stepper, batch(&["two"])).unwrap_err();
    // The process dies in place of reopening; the page with "two" is still in memory, clean, and not on the disk.
    drop((journal, stepper));
    disk.process_dies();
    let (journal, mut stepper, opened) = open(&disk, &seen(1)).unwrap();
    assert_eq!(opened.last_seq, 2, "it is whole, so it stays");
    append(&journal, &mut stepper, batch(&["three"])).unwrap();
    drop((journal, stepper));
    disk.power_cut(&mut Choices(3));
    assert_eq!(open(&disk, &seen(3)).unwrap().2.last_seq, 3);
    assert_eq!(all(&disk), ["one", "two", "three"]);
}

#[test]
fn what_was_found_at_open_is_on_the_disk_before_anyone_sees_it() {
    for seed in 0..8 {
        let disk = MemDisk::default();
        let (journal, mut stepper) = fresh(&disk);
        disk.set(|s| s.dead_from = Some(s.ops + 2)); // space is taken, the write goes through, the sync does not
        append(&journal, &mut stepper, batch(&["one"])).unwrap_err();
        drop((journal, stepper));
        disk.process_dies();
        let (journal, stepper, opened) = open(&disk, &Acknowledged::default()).unwrap();
        assert_eq!(opened.last_seq, 1);
        drop((journal, stepper));
        disk.power_cut(&mut Choices(seed));
        assert_eq!(open(&disk, &seen(1)).unwrap().2.last_seq, 1, "a view that has applied it is right");
    }
}

#[test]
fn a_failed_write_poisons_and_reopening_heals() {
    let disk = MemDisk::default();
    let (journal, mut stepper) = fresh(&disk);
    append(&journal, &mut stepper, batch(&["one"])).unwrap();
    disk.set(|s| s.fail_writes = 1);
    let long = "b".repeat(300);
    let pending: Vec<Pending> = ["a", &long].iter().map(|t| journal.enqueue(batch(&[t, t])).unwrap()).collect();
    stepper.step();
    for p in pending {
        assert!(matches!(p.wait(), Err(Error::Io { action: "write", .. })), "all of the group are told");
    }
    assert!(verified(&disk).torn.is_some());
    let opened = reopen(&journal, &mut stepper).unwrap();
    assert_eq!((opened.last_seq, opened.cut.map(|c| c.seq)), (1, Some(2)));
    append(&journal, &mut stepper, batch(&["two"])).unwrap();
    assert_eq!(all(&disk), ["one", "two"]);
    assert_eq!(verified(&disk).torn, None);
}

#[test]
fn a_full_disk_stops_new_things_and_endings_go_on() {
    let disk = MemDisk::default();
    let (journal, mut stepper) = fresh(&disk);
    let mut seq = append(&journal, &mut stepper, batch(&["one"])).unwrap();
    disk.set(|s| s.capacity = Some(0));
    let refused = loop {
        match append(&journal, &mut stepper, batch(&["minted"])) {
            Ok(s) => seq = s,
            Err(e) => break e,
        }
    };
    assert!(matches!(refused, Error::NoSpace { .. }), "{refused}");
    assert!(journal.poisoned().is_none(), "nothing was written, so nothing is wrong");
    assert_eq!(journal.counts().reserve_ready_bytes, small().reserve_bytes, "the reserve is whole");

    // One group with both: the ending is recorded, the other is not.
    let (a, b) = (journal.enqueue(batch(&["minted"])).unwrap(), journal.enqueue(ending("ended")).unwrap());
    stepper.step();
    assert!(matches!(a.wait(), Err(Error::NoSpace { .. })));
    assert_eq!(b.wait().unwrap().first_seq, seq + 1);
    seq += 1;
    let mut more = 0;
    while append(&journal, &mut stepper, ending("ended")).is_ok() {
        more += 1;
    }
    assert!(more >= 2, "256 bytes of reserve hold at least three endings of 80 bytes: {more} more");
    assert!(matches!(append(&journal, &mut stepper, ending("ended")), Err(Error::NoSpace { .. })));
    assert_eq!(journal.counts().refused_no_space, 4);
    assert_eq!(verified(&disk).last_seq, seq + more);

    // Starting on a full disk works, and says that there is no reserve.
    drop((journal, stepper));
    let (journal, mut stepper, opened) = open(&disk, &seen(seq + more)).unwrap();
    assert!(!opened.reserve_ready);
    assert!(matches!(append(&journal, &mut stepper, batch(&["minted"])), Err(Error::NoSpace { .. })));
    // Space again: all goes on without a restart, and the reserve is filled again.
    disk.set(|s| s.capacity = None);
    append(&journal, &mut stepper, batch(&["minted"])).unwrap();
    assert_eq!(journal.counts().reserve_ready_bytes, small().reserve_bytes);
}

#[test]
fn a_torn_tail_on_a_full_disk_is_cut_and_endings_go_on() {
    for reopened in [false, true] {
        let disk = MemDisk::default();
        let (mut journal, mut stepper) = fresh(&disk);
        append(&journal, &mut stepper, batch(&["one"])).unwrap();
        disk.set(|s| s.fail_writes = 1);
        append(&journal, &mut stepper, batch(&[&"torn".repeat(20)])).unwrap_err();
        // Nothing is free, not a byte.
        disk.set(|s| s.capacity = Some(s.used()));
        let opened = if reopened {
            reopen(&journal, &mut stepper).unwrap()
        } else {
            drop((journal, stepper));
            disk.process_dies();
            let (j, s, opened) = open(&disk, &seen(1)).unwrap();
            (journal, stepper) = (j, s);
            opened
        };
        let cut = opened.cut.expect("the tail was torn");
        let kept = disk.read(&cut.kept_in).unwrap();
        assert!(!kept.is_empty() && kept.len() as u64 == cut.bytes, "the cut bytes are kept");
        let names = countersign::audit::disk::Disk::list(&disk, &dir()).unwrap();
        assert_eq!(names.iter().filter(|n| n.starts_with("torn-")).count(), 1, "{names:?}");
        append(&journal, &mut stepper, ending("ended")).unwrap();
        assert_eq!(all(&disk), ["one", "ended"]);
    }
}

#[test]
fn attempts_on_a_full_disk_leave_the_reserve_to_endings() {
    let disk = MemDisk::default();
    let (journal, mut stepper) = fresh(&disk);
    // A hundred grants are open, an ending takes a frame of 80 bytes.
    let open = Batch { reserve_bytes: 100 * 80, ..batch(&["minted"]) };
    append(&journal, &mut stepper, open.clone()).unwrap();
    disk.set(|s| s.capacity = Some(0));
    let refused = (0..1000).find_map(|_| append(&journal, &mut stepper, open.clone()).err());
    assert!(matches!(refused, Some(Error::NoSpace { .. })), "{refused:?}");
    for n in 0..1000 {
        append(&journal, &mut stepper, Batch { reserve_bytes: 100 * 80, ..batch(&["an attempt"]) }).unwrap_err();
        if n % 10 == 0 {
            append(&journal, &mut stepper, Batch { reserve_bytes: 100 * 80, ..ending("ended") }).unwrap();
        }
    }
}

#[test]
fn a_checkpoint_covers_what_a_killed_run_wrote_and_what_comes_in_a_quiet_one() {
    let disk = MemDisk::default();
    let signed = || {
        let note = disk.read(&dir().join("checkpoint"))?;
        Some(countersign::audit::checkpoint::Checkpoint::open(&note, &[key()]).unwrap().size)
    };
    let (journal, mut stepper) = fresh(&disk);
    append(&journal, &mut stepper, batch(&["one", "two", "three"])).unwrap();
    assert_eq!(signed(), None);
    stepper_dies(journal, stepper, &disk);
    let time = Arc::new(journal_support::SetClock::default());
    let open = |disk: &MemDisk| {
        Journal::open_stepped(Arc::new(disk.clone()), &dir(), small(), time.clone(), &seen(3)).unwrap()
    };
    let (journal, mut stepper, _) = open(&disk);
    assert_eq!(signed(), Some(3), "what the run before wrote is signed at the start");
    append(&journal, &mut stepper, batch(&["four"])).unwrap();
    time.set_boot_ms(59_000);
    stepper.step();
    assert_eq!(signed(), Some(3));
    time.set_boot_ms(60_000);
    stepper.step();
    assert_eq!(signed(), Some(4), "after a minute, without anything more to write");
    let before = journal.counts().checkpoints;
    time.set_boot_ms(600_000);
    stepper.step();
    assert_eq!(journal.counts().checkpoints, before, "nothing moved");
    append(&journal, &mut stepper, batch(&["five"])).unwrap();
    stepper_dies(journal, stepper, &disk);
    drop(open(&disk));
    assert_eq!(signed(), Some(5));
    verified(&disk);
}

/// The process is killed: nothing is closed.
fn stepper_dies(journal: Journal, stepper: Stepper, disk: &MemDisk) {
    drop(stepper);
    drop(journal);
    disk.process_dies();
}

#[test]
fn what_was_finished_is_not_read_again_at_a_reopening() {
    let disk = MemDisk::default();
    let (journal, mut stepper) = fresh(&disk);
    for n in 0..60 {
        append(&journal, &mut stepper, batch(&[&format!("event {n}")])).unwrap();
    }
    assert!(verified(&disk).segments > 5);
    disk.set(|s| s.fail_syncs = 1);
    append(&journal, &mut stepper, batch(&["lost"])).unwrap_err();
    let before = disk.bytes_read();
    let opened = reopen(&journal, &mut stepper).unwrap();
    let read = disk.bytes_read() - before;
    assert!(read < 4 * small().segment_bytes, "{read} bytes were read");
    append(&journal, &mut stepper, batch(&["and on"])).unwrap();
    assert_eq!(opened.last_seq, 60);
    assert_eq!((verified(&disk).last_seq, all(&disk).len()), (61, 61));
    // A finished segment that is gone is noticed all the same.
    disk.set(|s| s.fail_syncs = 1);
    append(&journal, &mut stepper, batch(&["lost"])).unwrap_err();
    countersign::audit::disk::Disk::remove(&disk, &dir().join(countersign::audit::segment::file_name(1))).unwrap();
    let refused = reopen(&journal, &mut stepper).unwrap_err();
    assert!(refused.to_string().contains("missing"), "{refused}");
}

#[test]
fn a_full_disk_at_the_end_of_a_segment_leaves_endings_in_it() {
    let disk = MemDisk::default();
    let (journal, mut stepper) = fresh(&disk);
    // Fill the first segment to just below its size: seven frames of 80 bytes behind a header of 112.
    for _ in 0..7 {
        append(&journal, &mut stepper, batch(&["event"])).unwrap();
    }
    disk.set(|s| s.capacity = Some(0));
    assert!(matches!(append(&journal, &mut stepper, batch(&["minted"])), Err(Error::NoSpace { .. })));
    append(&journal, &mut stepper, ending("ended")).unwrap();
    assert_eq!(verified(&disk).segments, 1);
    disk.set(|s| s.capacity = None);
    append(&journal, &mut stepper, batch(&["minted"])).unwrap();
    assert_eq!((verified(&disk).segments, verified(&disk).last_seq), (2, 9));
}

#[test]
fn what_rests_on_a_refused_batch_is_refused_too() {
    let disk = MemDisk::default();
    let (journal, mut stepper) = fresh(&disk);
    let generation = Some(journal.generation());
    disk.set(|s| s.capacity = Some(0));
    let first = journal.enqueue(Batch { generation, payloads: vec![vec![b'x'; 300]], ..Batch::default() }).unwrap();
    let second = journal.enqueue(Batch { generation, ..ending("ends what the first began") }).unwrap();
    let independent = journal.enqueue(ending("ends something else")).unwrap();
    stepper.step();
    assert!(matches!(first.wait(), Err(Error::NoSpace { .. })));
    assert!(matches!(second.wait(), Err(Error::Stale)));
    independent.wait().unwrap();
    let again = Batch { generation: Some(journal.generation()), ..ending("ends") };
    append(&journal, &mut stepper, again).unwrap();
}

/// A writer that has stopped refuses, too; what is queued behind its reopening may rest on what it refused.
#[test]
fn what_rests_on_a_batch_that_a_stopped_writer_refused_is_refused_after_it_goes_on() {
    let disk = MemDisk::default();
    let (journal, mut stepper) = fresh(&disk);
    disk.set(|s| s.fail_syncs = 1);
    append(&journal, &mut stepper, batch(&["lost"])).unwrap_err();
    let generation = Some(journal.generation());
    let first = journal.enqueue(batch(&["begins"])).unwrap();
    let mut reopening = std::pin::pin!(journal.reopen());
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(std::future::Future::poll(reopening.as_mut(), &mut cx).is_pending());
    let second = journal.enqueue(Batch { generation, ..ending("ends what the first began") }).unwrap();
    let independent = journal.enqueue(ending("ends something else")).unwrap();
    stepper.step();
    assert!(matches!(first.wait(), Err(Error::Poisoned(_))));
    assert!(matches!(second.wait(), Err(Error::Stale)));
    independent.wait().unwrap();
    assert_eq!(all(&disk), ["ends something else"]);
}

#[test]
fn one_sync_for_all_that_is_queued_and_a_barrier_costs_none() {
    let disk = MemDisk::default();
    let (journal, mut stepper) = {
        let options = Options { segment_bytes: 1 << 20, ..small() };
        let (j, s, _) = open_with(&disk, options, &Acknowledged::default()).unwrap();
        (j, s)
    };
    let pending: Vec<Pending> = (0..100).map(|i| journal.enqueue(batch(&[&format!("{i}"), "x"])).unwrap()).collect();
    stepper.step();
    for (i, p) in pending.into_iter().enumerate() {
        assert_eq!(p.wait().unwrap().first_seq, i as u64 * 2 + 1, "the order of enqueue is the order in the journal");
    }
    let barrier = append(&journal, &mut stepper, Batch::default()).unwrap();
    let counts = journal.counts();
    assert_eq!((counts.syncs, counts.batches, counts.records, barrier), (1, 100, 200, 200));
}

#[test]
fn one_owner_at_a_time() {
    let disk = MemDisk::default();
    let (journal, stepper) = fresh(&disk);
    assert!(matches!(open(&disk, &Acknowledged::default()), Err(Error::Locked { .. })));
    drop((journal, stepper));
    assert!(open(&disk, &Acknowledged::default()).is_ok());
}

trait Names {
    fn names_any_segment(&self) -> bool;
}
impl Names for MemDisk {
    fn names_any_segment(&self) -> bool {
        countersign::audit::segment::list(self, Path::new("/j")).is_ok_and(|s| !s.is_empty())
    }
}
