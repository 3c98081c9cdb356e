//! "Who keeps the record can read it from any place, follow it, prove it, and lock it." On the real disk.

mod journal_support;

use countersign::audit::note::Signer;
use countersign::audit::proof::{verify_consistency, verify_inclusion};
use countersign::audit::reader::{self, read_from};
use countersign::audit::verify::Options;
use countersign::store::embedded::journal::{Acknowledged, Journal};
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
    verified(dir.path(), &Options { keys: vec![new], ..Options::default() });
}

#[test]
fn locked_names_the_holder() {
    let dir = closed();
    let _holder = open(dir.path(), &Acknowledged::default()).unwrap();
    let e = open(dir.path(), &Acknowledged::default()).unwrap_err();
    assert!(e.to_string().contains(&format!("process id {}", std::process::id())), "{e}");
}
