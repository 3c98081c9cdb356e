//! "Many agents at once share one sync, each gets its own answer, and a closed journal opens whole." On the real disk.

mod journal_support;

use std::sync::Arc;

use countersign::audit::verify::{self, Report};
use countersign::store::embedded::journal::{Acknowledged, Batch, Error, Journal, Options};
use journal_support::{batch, clock, key, small};

fn roomy() -> Options {
    Options { segment_bytes: 1 << 20, reserve_bytes: 64 << 10, extend_bytes: 64 << 10, ..small() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_appenders_share_syncs() {
    const CALLERS: usize = 16;
    const EACH: usize = 60;
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path(), roomy(), clock(), &Acknowledged::default()).unwrap();
    let journal = Arc::new(journal);
    let mut callers = Vec::new();
    for caller in 0..CALLERS {
        let journal = journal.clone();
        callers.push(tokio::spawn(async move {
            let mut seqs = Vec::new();
            for i in 0..EACH {
                let payloads = vec![format!("{caller}/{i}/a").into_bytes(), format!("{caller}/{i}/b").into_bytes()];
                let appended = journal.append(payloads).await.unwrap();
                // Durable when it returns: the tip is at least there.
                assert!(journal.tip().seq >= appended.last_seq());
                seqs.push(appended.first_seq);
            }
            seqs
        }));
    }
    let mut all = Vec::new();
    for caller in callers {
        let seqs = caller.await.unwrap();
        assert!(seqs.is_sorted(), "one caller's batches keep their order");
        all.extend(seqs);
    }
    all.sort_unstable();
    let expected: Vec<u64> = (0..(CALLERS * EACH) as u64).map(|i| i * 2 + 1).collect();
    assert_eq!(all, expected, "each batch has its own two numbers, without gaps");
    let counts = journal.counts();
    assert_eq!((counts.batches, counts.records), (960, 1920));
    assert!(counts.syncs < counts.batches / 2, "{} syncs for {} batches", counts.syncs, counts.batches);

    let tip = journal.tip();
    journal.close().await.unwrap();
    assert!(matches!(journal.append(vec![vec![1]]).await, Err(Error::Closed)));
    let options = verify::Options { keys: vec![key()], ..Default::default() };
    let Report::Verified(v) = verify::verify(dir.path(), &options).unwrap() else { panic!("broken") };
    assert_eq!((v.last_seq, v.leaf, v.root, v.closed), (tip.seq, tip.leaf, tip.root, true));
    assert_eq!(v.extends.len(), 1, "closing signs a checkpoint");
    let (_journal, opened) = Journal::open(dir.path(), roomy(), clock(), &Acknowledged::default()).unwrap();
    assert_eq!((opened.last_seq, opened.root, opened.cut), (tip.seq, tip.root, None));
}

#[tokio::test]
async fn checkpoints_come_when_asked_for_and_by_count() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { checkpoint_records: 10, ..roomy() };
    let (journal, _) = Journal::open(dir.path(), options, clock(), &Acknowledged::default()).unwrap();
    for _ in 0..25 {
        journal.append(vec![b"x".to_vec()]).await.unwrap();
    }
    // The last batch's checkpoint is written after its answer: ask for one to be behind it.
    let note = journal.checkpoint().await.unwrap().unwrap();
    assert_eq!(journal.counts().checkpoints, 3, "after 10, after 20, and the one asked for");
    assert!(note.starts_with(&format!("broker.example/journal\n25\n{}\n\n", journal.tip().root)));
    assert_eq!(std::fs::read_to_string(dir.path().join("checkpoint")).unwrap(), note);
    let (journal, _) = {
        drop(journal);
        let unsigned = Options { signer: None, earlier_keys: vec![key()], ..roomy() };
        Journal::open(dir.path(), unsigned, clock(), &Acknowledged::default()).unwrap()
    };
    assert_eq!(journal.checkpoint().await.unwrap(), None, "no signer, no checkpoint");
}

#[test]
fn limits_are_told_before_anything_is_queued() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path(), roomy(), clock(), &Acknowledged::default()).unwrap();
    let too_long = Batch { payloads: vec![vec![0; 256 * 1024 + 1]], ..Batch::default() };
    let e = journal.enqueue(too_long).unwrap_err();
    assert!(e.to_string().contains("262145") && e.to_string().contains("262144"), "{e}");
    assert!(matches!(e, Error::Audit(_)));
    // The largest batch that may be is taken, more than a segment though it is.
    let largest = Batch { payloads: vec![vec![7; 256 * 1024 - 72]; 16], ..Batch::default() };
    journal.enqueue(largest).unwrap().wait().unwrap();
    journal.enqueue(batch(&["and on"])).unwrap().wait().unwrap();
    drop(journal);
    let (_journal, opened) = Journal::open(dir.path(), roomy(), clock(), &Acknowledged::default()).unwrap();
    assert_eq!(opened.last_seq, 17);
}
