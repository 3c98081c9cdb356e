//! "Whoever touches the record is found out": every byte of a small journal flipped, records and segments dropped and
//! swapped, all of it rewritten and resealed (D12), files gone under the running broker (R7). On the real disk.

mod journal_support;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use countersign::audit::checkpoint::{self, Checkpoint};
use countersign::audit::disk::{Access, Disk as _, RealDisk};
use countersign::audit::error::Break;
use countersign::audit::frame::{self, Meta};
use countersign::audit::head::{self, Head};
use countersign::audit::merkle::{Frontier, Hash};
use countersign::audit::note::Signer;
use countersign::audit::reader::read_from;
use countersign::audit::segment::{self, Header};
use countersign::audit::verify::{self, Options, Report, remake_head};
use countersign::store::embedded::journal::{Acknowledged, Error, Journal};
use journal_support::mem_disk::MemDisk;
use journal_support::{EVENTS, batch, clock, closed, key, open, options, segments, small, verified, write};

/// The same, of a broker that was killed: not closed, with a checkpoint in the middle.
fn killed() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &EVENTS[..4]);
    let (journal, mut stepper, _) =
        Journal::open_stepped(Arc::new(RealDisk), dir.path(), small(), clock(), &Acknowledged::default()).unwrap();
    for text in &EVENTS[4..] {
        let pending = journal.enqueue(batch(&[text])).unwrap();
        stepper.step();
        pending.wait().unwrap();
    }
    drop((journal, stepper)); // without a thread, nothing closes it
    assert!(!Head::load(&RealDisk, dir.path()).unwrap().unwrap().closed);
    dir
}

fn broken(dir: &Path, options: &Options, what: &str) -> Break {
    match verify::verify(dir, options).unwrap() {
        Report::Broken(broken) => broken,
        Report::Verified(v) => panic!("{what}: not found: {v}"),
    }
}

/// `audit verify` finds it and the broker refuses to start, at the same place, and changes nothing.
fn found(dir: &Path, what: &str) -> Break {
    let before = contents(dir);
    let found = broken(dir, &options(), what);
    // Several readers find what one finds.
    match verify::verify_on(&one_reader(&before, dir), dir, &options()).unwrap() {
        Report::Broken(by_one) => assert_eq!(by_one, found, "{what}"),
        Report::Verified(v) => panic!("{what}: not found by one reader: {v}"),
    }
    match open(dir, &Acknowledged::default()) {
        Err(Error::Audit(e)) => match &*e {
            countersign::audit::Error::Broken(b) => assert_eq!(**b, found, "{what}"),
            other => panic!("{what}: {other}"),
        },
        Err(other) => panic!("{what}: {other}"),
        Ok(_) => panic!("{what}: the broker started"),
    }
    assert_eq!(contents(dir), before, "{what}: refusing changes nothing");
    for text in [&found.expected, &found.found, &found.meaning, &found.action] {
        assert!(!text.is_empty(), "{what}");
    }
    found
}

fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut out: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap())
        .filter(|e| e.file_name() != "lock")
        .map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap()))
        .collect();
    out.sort();
    out
}

/// The same files on a disk that is read by one thread, front to back.
fn one_reader(files: &[(String, Vec<u8>)], dir: &Path) -> MemDisk {
    let disk = MemDisk::default();
    assert_eq!(disk.readers(), 1);
    disk.create_dir(dir).unwrap();
    for (name, bytes) in files {
        disk.open(&dir.join(name), Access::Create).unwrap().write_at(bytes, 0).unwrap();
    }
    disk
}

fn flip_every_byte(dir: &Path) -> usize {
    let mut flipped = 0;
    for (name, bytes) in contents(dir) {
        let path = dir.join(&name);
        for i in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[i] ^= 1 << (i % 8);
            fs::write(&path, &changed).unwrap();
            let found = found(dir, &format!("{name} byte {i}"));
            if segment::first_seq_of(&name).is_some() {
                assert_eq!(found.file, name);
                let near = i64::try_from(found.offset).unwrap() - i64::try_from(i).unwrap();
                assert!((-112..=0).contains(&near), "byte {i} is reported at {}", found.offset);
            }
            flipped += 1;
        }
        fs::write(&path, &bytes).unwrap();
    }
    verified(dir, &options());
    flipped
}

#[test]
fn every_byte_of_a_closed_journal_flipped_in_turn() {
    let dir = closed();
    let flipped = flip_every_byte(dir.path());
    assert!(flipped > 1500, "segments with their zeros, head and checkpoint: {flipped}");
    assert_eq!(open(dir.path(), &Acknowledged::default()).unwrap().1.last_seq, 12);
}

/// Segments that are read ahead of the walk are judged as if they weren't.
#[test]
fn what_is_read_ahead_is_found_too() {
    let dir = tempfile::tempdir().unwrap();
    for _ in 0..3 {
        write(dir.path(), &EVENTS);
    }
    let all = segments(dir.path());
    assert!(all.len() >= 5, "{all:?}");
    for (n, path) in all[..all.len() - 1].iter().enumerate() {
        let bytes = fs::read(path).unwrap();
        for i in (n..bytes.len()).step_by(11) {
            let mut changed = bytes.clone();
            changed[i] ^= 1 << (i % 8);
            fs::write(path, &changed).unwrap();
            assert_eq!(dir.path().join(found(dir.path(), &format!("segment {n} byte {i}")).file), *path);
        }
        for (what, changed) in [
            ("cut in half", &bytes[..bytes.len() / 2]),
            ("without a record", &bytes[..segment::HEADER_BYTES]),
            ("without a header", &bytes[..8]),
            ("with the next one's content", &fs::read(&all[n + 1]).unwrap()[..]),
        ] {
            fs::write(path, changed).unwrap();
            found(dir.path(), &format!("segment {n} {what}"));
        }
        fs::remove_file(path).unwrap();
        found(dir.path(), &format!("segment {n} removed"));
        fs::write(path, &bytes).unwrap();
    }
    assert_eq!(verified(dir.path(), &options()).segments, all.len());
}

#[test]
fn every_byte_of_the_records_of_a_killed_broker_flipped_in_turn() {
    let dir = killed();
    let last = segments(dir.path()).pop().unwrap();
    let bytes = fs::read(&last).unwrap();
    let end = bytes.iter().rposition(|b| *b != 0).unwrap() / 8 * 8 + 8;
    for i in 0..end {
        let mut changed = bytes.clone();
        changed[i] ^= 0x10;
        fs::write(&last, &changed).unwrap();
        found(dir.path(), &format!("byte {i}"));
    }
    // Behind the end there may be an unfinished write: it is reported by both, cut and kept.
    for i in [end, end + 100, bytes.len() - 1] {
        let mut changed = bytes.clone();
        changed[i] ^= 0x10;
        fs::write(&last, &changed).unwrap();
        let torn = verified(dir.path(), &options()).torn.expect("reported");
        assert_eq!((torn.offset, torn.bytes), (end as u64, (i - end) as u64 + 1));
    }
    let (_journal, opened) = open(dir.path(), &Acknowledged { view_seq: 12, ..Acknowledged::default() }).unwrap();
    let cut = opened.cut.unwrap();
    assert_eq!((opened.last_seq, cut.seq, fs::read(&cut.kept_in).unwrap().len()), (12, 13, bytes.len() - end));
}

/// Without the head file: the frames themselves, the view and the checkpoint say what had been acknowledged.
#[test]
fn damage_is_told_from_a_torn_tail_without_the_head() {
    let dir = killed();
    fs::remove_file(dir.path().join(head::FILE_NAME)).unwrap();
    assert_eq!(found(dir.path(), "no head").file, head::FILE_NAME);
    let headless = Options { without_head: true, ..options() };
    let last = segments(dir.path()).pop().unwrap();
    let bytes = fs::read(&last).unwrap();
    let offsets = offsets_of_records(dir.path());
    for (seq, offset) in offsets.iter().filter(|(seq, _)| *seq >= segment::first_seq_of(&name(&last)).unwrap()) {
        let mut changed = bytes.clone();
        changed[usize::try_from(*offset).unwrap() + 72] ^= 1;
        fs::write(&last, &changed).unwrap();
        if *seq < 12 {
            let broken = broken(dir.path(), &headless, "a record before the last");
            assert_eq!((broken.seq, broken.offset), (*seq, *offset));
            assert!(broken.meaning.contains("a later record says"), "{broken}");
        } else {
            // The very last, with no witness left: it could be a torn write. The view's sequence tells.
            assert_eq!(verified(dir.path(), &headless).torn.unwrap().seq, 12);
        }
    }
    fs::write(&last, &bytes).unwrap();
    assert!(matches!(remake_head(dir.path(), &options()).unwrap(), Report::Verified(v) if v.last_seq == 12));
    assert_eq!(open(dir.path(), &Acknowledged { view_seq: 12, ..Acknowledged::default() }).unwrap().1.last_seq, 12);
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

fn offsets_of_records(dir: &Path) -> Vec<(u64, u64)> {
    let mut records = read_from(dir, 1).unwrap();
    let mut out = Vec::new();
    while let Some(r) = records.next_record().unwrap() {
        out.push((r.meta.seq, r.offset));
    }
    out
}

#[test]
fn the_last_record_dropped() {
    for dir in [closed(), killed()] {
        let (seq, offset) = *offsets_of_records(dir.path()).last().unwrap();
        let last = segments(dir.path()).pop().unwrap();
        let mut bytes = fs::read(&last).unwrap();
        bytes[usize::try_from(offset).unwrap()..].fill(0);
        fs::write(&last, &bytes).unwrap();
        let b = found(dir.path(), "zeroed");
        assert_eq!((b.seq, b.offset), (seq, offset));
        fs::write(&last, &bytes[..usize::try_from(offset).unwrap()]).unwrap();
        assert_eq!(found(dir.path(), "cut off").seq, seq);

        // Head and checkpoint forged to fit: only knowledge from elsewhere tells.
        forge_head(dir.path(), 11);
        fs::remove_file(dir.path().join(checkpoint::FILE_NAME)).unwrap();
        assert_eq!(verified(dir.path(), &options()).last_seq, 11, "the journal alone can't know");
        let view = Acknowledged { view_seq: 12, ..Acknowledged::default() };
        assert!(open(dir.path(), &view).unwrap_err().to_string().contains("the view has applied records up to 12"));
    }
}

#[test]
fn one_record_rewritten_with_the_right_checksum() {
    let dir = closed();
    let first = &segments(dir.path())[0];
    let mut bytes = fs::read(first).unwrap();
    let at = usize::try_from(offsets_of_records(dir.path())[3].1).unwrap();
    let old = frame::decode(&bytes[at..]).unwrap();
    let mut changed = Vec::new();
    frame::encode(&old.meta, b"DELTA", &mut changed);
    bytes[at..at + changed.len()].copy_from_slice(&changed);
    fs::write(first, &bytes).unwrap();
    // The frame is good; the next one's chain tells.
    let b = found(dir.path(), "rewritten");
    assert!(b.seq == 5 && b.expected.contains("follows leaf"), "{b}");
}

/// Makes a head that fits the journal as it is.
fn forge_head(dir: &Path, seq: u64) {
    let mut records = read_from(dir, 1).unwrap();
    let mut leaf = Hash::ZERO;
    while let Some(r) = records.next_record().unwrap() {
        leaf = r.leaf;
    }
    let head = Head { seq, leaf, checkpoint_size: 0, closed: true };
    fs::write(dir.join(head::FILE_NAME), head.encode()).unwrap();
}

#[test]
fn segments_dropped_or_swapped() {
    for drop in [0, 1] {
        let dir = closed();
        fs::remove_file(&segments(dir.path())[drop]).unwrap();
        let b = found(dir.path(), "dropped");
        assert!(b.to_string().contains("missing") || b.to_string().contains("gone"), "{b}");
    }
    let dir = closed();
    let all = segments(dir.path());
    fs::rename(&all[0], dir.path().join("x")).unwrap();
    fs::rename(&all[1], &all[0]).unwrap();
    fs::rename(dir.path().join("x"), &all[1]).unwrap();
    assert!(found(dir.path(), "swapped").meaning.contains("swapped"));
    for path in all.iter().chain([&dir.path().join(checkpoint::FILE_NAME)]) {
        fs::remove_file(path).unwrap();
    }
    assert_eq!(found(dir.path(), "all segments and the checkpoint gone").seq, 0);
}

#[test]
fn the_whole_folder_gone_is_seen_by_the_view_and_by_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let known = Acknowledged { view_seq: 3, ..Acknowledged::default() };
    assert!(
        open(dir.path(), &known).unwrap_err().to_string().contains("records 1 to 3 were acknowledged and are gone")
    );
    let checkpoints = vec![Checkpoint { origin: "o".into(), size: 5, root: Hash::ZERO }];
    let known = Acknowledged { checkpoints, ..Acknowledged::default() };
    assert!(open(dir.path(), &known).unwrap_err().to_string().contains("records 1 to 5"));
}

#[test]
fn two_records_swapped() {
    let dir = closed();
    let first = &segments(dir.path())[0];
    let offsets = offsets_of_records(dir.path());
    let mut bytes = fs::read(first).unwrap();
    // "alpha" and "bravo" have frames of the same length.
    let (a, b) = (usize::try_from(offsets[0].1).unwrap(), usize::try_from(offsets[1].1).unwrap());
    bytes[a..b + (b - a)].rotate_left(b - a);
    fs::write(first, &bytes).unwrap();
    let broken = found(dir.path(), "swapped");
    assert_eq!((broken.seq, &*broken.expected, &*broken.found), (1, "record 1", "record 2"));
}

/// Writes a valid journal with other content under the same sizes, head included: all that an attacker without the
/// checkpoint key can do (D12).
fn reseal(dir: &Path, texts: &[&str]) {
    for path in segments(dir) {
        fs::remove_file(path).unwrap();
    }
    let (mut frontier, mut prev) = (Frontier::new(), Hash::ZERO);
    let header = Header { first_seq: 1, made_ms: 1, prev, root: frontier.root() };
    let mut bytes = header.encode().to_vec();
    for text in texts {
        let seq = frontier.size() + 1;
        let meta = Meta { seq, at_ms: 5, durable: seq - 1, batch_left: 0, prev };
        prev = frame::encode(&meta, text.as_bytes(), &mut bytes);
        frontier.push(prev);
    }
    fs::write(dir.join(segment::file_name(1)), bytes).unwrap();
    fs::remove_file(dir.join(checkpoint::FILE_NAME)).unwrap();
    forge_head(dir, frontier.size());
}

#[test]
fn d12_the_whole_rewritten_and_resealed() {
    let dir = closed();
    let kept = fs::read(dir.path().join(checkpoint::FILE_NAME)).unwrap();
    let leaf = verified(dir.path(), &options()).leaf;
    let with = Options { checkpoints: vec![("kept.txt".into(), kept.clone())], ..options() };
    assert!(verified(dir.path(), &with).extends.contains(&(12, "checkpoint kept.txt".into())));

    let mut events = EVENTS;
    events[3] = "DELTA";
    reseal(dir.path(), &events);
    assert_eq!(verified(dir.path(), &options()).last_seq, 12, "by itself it looks well");
    let b = broken(dir.path(), &with, "resealed");
    assert_eq!(b.seq, 12);
    assert!(b.meaning.contains("resealed") && b.expected.contains("kept.txt"), "{b}");
    // So do the broker's own memories: a checkpoint given at start, or the leaf that the view keeps.
    let checkpoints = vec![Checkpoint::open(&kept, &[key()]).unwrap()];
    assert!(open(dir.path(), &Acknowledged { checkpoints, ..Acknowledged::default() }).is_err());
    let view = Acknowledged { view_seq: 12, view_leaf: Some(leaf), ..Acknowledged::default() };
    assert!(open(dir.path(), &view).unwrap_err().to_string().contains("resealed"));

    // Shorter than the checkpoint is found, too.
    reseal_again(dir.path(), &EVENTS[..11]);
    assert!(broken(dir.path(), &with, "shorter").meaning.contains("12 were acknowledged and are gone"));

    // A checkpoint signed by another key proves nothing and is refused.
    let other = Signer::from_seed(journal_support::KEY_NAME, &[1; 32]).unwrap();
    let forged = Checkpoint::sign(&other, 11, Hash::ZERO).unwrap();
    let with = Options { checkpoints: vec![("forged".into(), forged.into_bytes())], ..options() };
    assert!(verify::verify(dir.path(), &with).is_err());
}

fn reseal_again(dir: &Path, texts: &[&str]) {
    fs::write(dir.join(checkpoint::FILE_NAME), "").unwrap();
    reseal(dir, texts);
}

#[test]
fn r7_files_gone_or_changed_under_the_running_broker() {
    type Harm = fn(&Path);
    let harms: [(&str, Harm); 6] = [
        ("removed", |d| fs::remove_file(segments(d).pop().unwrap()).unwrap()),
        ("truncated", |d| {
            fs::File::options().write(true).open(segments(d).pop().unwrap()).unwrap().set_len(200).unwrap();
        }),
        ("renamed", |d| fs::rename(segments(d).pop().unwrap(), d.join("elsewhere")).unwrap()),
        ("replaced", |d| {
            let last = segments(d).pop().unwrap();
            fs::copy(&last, d.join("copy")).unwrap();
            fs::rename(d.join("copy"), last).unwrap();
        }),
        ("an old segment removed", |d| fs::remove_file(&segments(d)[0]).unwrap()),
        ("head removed", |d| fs::remove_file(d.join(head::FILE_NAME)).unwrap()),
    ];
    for (what, harm) in harms {
        let dir = closed();
        let (journal, _) = open(dir.path(), &Acknowledged::default()).unwrap();
        journal.enqueue(batch(&["before"])).unwrap().wait().unwrap();
        harm(dir.path());
        // One other file is looked at each time, so two appends see all three.
        let noticed = (0..2).find_map(|_| journal.enqueue(batch(&["after"])).unwrap().wait().err());
        let Some(Error::Poisoned(why)) = noticed else { panic!("{what}: {noticed:?}") };
        assert!(matches!(&*why, Error::Changed { .. }), "{what}: {why}");
        assert!(matches!(journal.enqueue(batch(&["later"])).unwrap().wait(), Err(Error::Poisoned(_))), "{what}");
    }
}
