//! "Whoever touches the record is found out": a journal made by the real binary, then every byte of it flipped, its last
//! record dropped, its segments dropped and swapped, its head lost, all of it rewritten and resealed. The broker refuses to start and
//! `audit verify` says where; only what was never acknowledged is cut, kept and reported.

#[path = "support/crash_broker.rs"]
mod broker;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use broker::{Serving, Setup, checkpoint_keys, notes};
use countersign::audit::checkpoint;
use countersign::audit::frame::{self, Meta};
use countersign::audit::head::{self, Head};
use countersign::audit::merkle::{Frontier, Hash};
use countersign::audit::reader::read_from;
use countersign::audit::segment::{self, Header};
use countersign::audit::verify::{self, Report};
use countersign::store::embedded;
use countersign::time::SystemClock;

const SEGMENT: &str = "journal-00000000000000000001.seg";
/// Records are padded to this.
const ALIGNED: usize = 8;

/// One small job.
async fn work(serving: &Serving, task: &str) {
    let agent = serving.agent("a");
    let id = agent.asked(task, 300, notes()).await;
    agent.collected(&id).await;
    agent.complete(&id).await;
    agent.wait(&id, "ended", broker::PATIENCE).await;
}

/// A broker that did one small job and stopped in good order.
async fn stopped() -> Serving {
    let mut serving = Serving::prepare(|_, _| Setup::default());
    serving.up().await;
    work(&serving, "T-1").await;
    serving.stop().await;
    serving
}

/// The key that the broker printed.
fn printed_key(serving: &Serving) -> String {
    let log = serving.log();
    let key = log.split("journal_key=").nth(1).expect("the broker prints its journal's key");
    key.split_whitespace().next().unwrap().to_owned()
}

/// `countersign audit verify`, as an auditor runs it: exit code and what it says.
fn audit_verify(serving: &Serving, kept: Option<&Path>) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_countersign"));
    command.args(["audit", "verify"]).arg(serving.data()).args(["--key", &printed_key(serving)]).env_clear();
    if let Some(kept) = kept {
        command.arg("--checkpoint").arg(kept);
    }
    let out = command.output().unwrap();
    assert!(out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
    (out.status.code().unwrap(), String::from_utf8(out.stdout).unwrap())
}

/// The broker refuses, says which file and what to do, and `audit verify` says the same. Nothing on the disk changes.
async fn found(serving: &mut Serving, what: &str) -> String {
    let before = folder(&serving.journal_dir());
    let (code, said) = audit_verify(serving, None);
    assert_eq!(code, 1, "{what}: {said}");
    let refused = serving.refused().await;
    for part in ["expected:", "found:", "meaning:", "do:"] {
        assert!(said.contains(part) && refused.contains(part), "{what}: {said}\n{refused}");
    }
    let of = |text: &str| text.split("expected:").nth(1).unwrap().split("do:").next().unwrap().trim().to_owned();
    assert_eq!(of(&said), of(&refused), "{what}: both say the same");
    assert!(folder(&serving.journal_dir()) == before, "{what}: the evidence is as it was");
    said
}

/// Every file of a journal but the lock.
fn folder(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let files = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).filter(|p| !p.ends_with("lock"));
    let mut all: Vec<_> = files.map(|p| (p.clone(), fs::read(p).unwrap())).collect();
    all.sort();
    all
}

fn put_back(dir: &Path, files: &[(PathBuf, Vec<u8>)]) {
    for (path, _) in folder(dir) {
        fs::remove_file(path).unwrap();
    }
    for (path, bytes) in files {
        fs::write(path, bytes).unwrap();
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() { copy(&path, &to) } else { fs::copy(&path, &to).map(|_| ()).unwrap() }
    }
    fs::set_permissions(to, fs::metadata(from).unwrap().permissions()).unwrap();
}

/// Where the last record ends.
fn end_of(segment: &[u8]) -> usize {
    (segment.iter().rposition(|b| *b != 0).unwrap() + 1).next_multiple_of(ALIGNED)
}

/// Each record as it stands: meta and payload.
fn records(journal: &Path) -> Vec<(Meta, Vec<u8>, u64)> {
    let mut all = Vec::new();
    let mut records = read_from(journal, 1).unwrap();
    while let Some(r) = records.next_record().unwrap() {
        all.push((r.meta, r.payload.to_vec(), r.offset));
    }
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_byte_flipped_in_turn_is_found_and_the_broker_does_not_start() {
    let mut serving = stopped().await;
    let journal = serving.journal_dir();
    let (code, said) = audit_verify(&serving, None);
    assert!(code == 0 && said.contains("verified up to 11"), "{said}");

    // A sample by the binary itself: the frame's parts, the header, the zeros behind the end, head and checkpoint.
    let whole = folder(&journal);
    let bytes = |name: &str| whole.iter().find(|(p, _)| p.ends_with(name)).unwrap().1.clone();
    let end = end_of(&bytes(SEGMENT));
    let sample = [
        (SEGMENT, vec![0, 20, 100, 112, 117, 120, 133, 140, 190, 300, end - 100, end + 5, 6_000_000]),
        (head::FILE_NAME, vec![0, 20, 40, 63]),
        (checkpoint::FILE_NAME, vec![0, 22, 60, 150]),
    ];
    for (name, places) in sample {
        let good = bytes(name);
        for at in places {
            let mut bad = good.clone();
            bad[at] ^= 0x04;
            fs::write(journal.join(name), bad).unwrap();
            let said = found(&mut serving, &format!("{name} byte {at}")).await;
            assert!(said.contains(name), "{said}");
        }
        fs::write(journal.join(name), good).unwrap();
    }

    // Every byte, by what the binary opens with: without the twelve megabytes of zeros, to have an end of it.
    let mut short = bytes(SEGMENT);
    short.truncate(end);
    fs::write(journal.join(SEGMENT), short).unwrap();
    assert!(matches!(serving.verified(), Report::Verified(v) if v.closed));
    let clock: Arc<SystemClock> = Arc::new(SystemClock);
    let (keys, options) = (checkpoint_keys(&serving.data()), serving.verify_options());
    let threads = 4;
    let parts: Vec<_> = (0..threads)
        .map(|turn| {
            let own = serving.file(&format!("copy-{turn}"));
            copy(&serving.data(), &own);
            let (clock, keys, options) = (Arc::clone(&clock), keys.clone(), options.clone());
            tokio::task::spawn_blocking(move || {
                let (journal, mut flipped) = (embedded::journal_dir(&own), 0);
                for (path, good) in folder(&journal) {
                    for at in (turn..good.len()).step_by(threads) {
                        let mut bad = good.clone();
                        bad[at] ^= 1 << (at % 8);
                        fs::write(&path, &bad).unwrap();
                        let report = verify::verify(&journal, &options).unwrap();
                        let Report::Broken(_) = report else { panic!("{} byte {at}: {report:?}", path.display()) };
                        let opened = embedded::open(&own, clock.clone(), None, keys.clone());
                        let Err(embedded::OpenError::Journal(_)) = opened.map(|_| ()) else {
                            panic!("{} byte {at} was not refused", path.display())
                        };
                        flipped += 1;
                    }
                    fs::write(&path, &good).unwrap();
                }
                flipped
            })
        })
        .collect();
    let mut flipped = 0;
    for part in parts {
        flipped += part.await.unwrap();
    }
    assert_eq!(flipped, end + bytes(head::FILE_NAME).len() + bytes(checkpoint::FILE_NAME).len());
    eprintln!("journal: {flipped} bytes flipped in turn, each found by verify and refused at the opening");

    // And put back as it was, it starts and goes on.
    put_back(&journal, &whole);
    serving.up().await;
    work(&serving, "T-2").await;
    serving.stop().await;
}

#[tokio::test]
async fn the_last_record_dropped() {
    let mut serving = stopped().await;
    let journal = serving.journal_dir();
    let whole = folder(&journal);
    let all = records(&journal);
    let at = usize::try_from(all.last().unwrap().2).unwrap();
    let mut zeroed = fs::read(journal.join(SEGMENT)).unwrap();
    let cut_off = zeroed[..at].to_vec();
    zeroed[at..].fill(0);
    for (what, bytes) in [("zeroed", zeroed), ("cut off", cut_off)] {
        fs::write(journal.join(SEGMENT), bytes).unwrap();
        let said = found(&mut serving, what).await;
        assert!(said.contains("record 11"), "{said}");
        put_back(&journal, &whole);
    }
    // With a head that fits, and no checkpoint beside it: the broker's own view knows better, and so does a checkpoint
    // that was kept elsewhere.
    let kept = serving.file("kept.note");
    fs::rename(journal.join(checkpoint::FILE_NAME), &kept).unwrap();
    let mut shorter = fs::read(journal.join(SEGMENT)).unwrap();
    shorter[at..].fill(0);
    fs::write(journal.join(SEGMENT), shorter).unwrap();
    forge_head(&journal, true);
    let (code, said) = audit_verify(&serving, None);
    assert!(code == 0 && said.contains("verified up to 10"), "by itself it looks well: {said}");
    let (code, said) = audit_verify(&serving, Some(&kept));
    assert!(code == 1 && said.contains("11 were acknowledged and are gone"), "{said}");
    let refused = serving.refused().await;
    assert!(refused.contains("the view has applied records up to 11"), "{refused}");
}

/// A head that fits the journal as it is.
fn forge_head(journal: &Path, closed: bool) {
    let mut frontier = (0, Hash::ZERO);
    let mut records = read_from(journal, 1).unwrap();
    while let Some(r) = records.next_record().unwrap() {
        frontier = (r.meta.seq, r.leaf);
    }
    let head = Head { seq: frontier.0, leaf: frontier.1, checkpoint_size: 0, closed };
    fs::write(journal.join(head::FILE_NAME), head.encode()).unwrap();
}

/// Writes the records anew into segments that begin at these, changed or not; gives their names.
fn write_segments(journal: &Path, all: &[(Meta, Vec<u8>)], firsts: &[u64]) -> Vec<PathBuf> {
    fs::remove_file(journal.join(SEGMENT)).unwrap();
    let (mut frontier, mut prev, mut out) = (Frontier::new(), Hash::ZERO, Vec::<(PathBuf, Vec<u8>)>::new());
    for (meta, payload) in all {
        if firsts.contains(&meta.seq) {
            let header = Header { first_seq: meta.seq, made_ms: meta.at_ms, prev, root: frontier.root() };
            out.push((journal.join(segment::file_name(meta.seq)), header.encode().to_vec()));
        }
        let bytes = &mut out.last_mut().expect("the first segment begins at 1").1;
        prev = frame::encode(&Meta { prev, ..*meta }, payload, bytes);
        frontier.push(prev);
    }
    for (path, bytes) in &out {
        fs::write(path, bytes).unwrap();
    }
    out.into_iter().map(|(path, _)| path).collect()
}

#[tokio::test]
async fn segments_dropped_or_swapped() {
    let mut serving = stopped().await;
    let journal = serving.journal_dir();
    // The binary's segments hold 64 MiB; the same records in three small ones are the same journal: same leaves, same
    // root, same signed checkpoint. The binary says so itself.
    let all: Vec<_> = records(&journal).into_iter().map(|(meta, payload, _)| (meta, payload)).collect();
    let begins: Vec<u64> =
        all.iter().zip(all.iter().skip(1)).filter(|(a, _)| a.0.batch_left == 0).map(|(_, b)| b.0.seq).collect();
    let segments = write_segments(&journal, &all, &[1, begins[1], begins[begins.len() - 2]]);
    let whole = folder(&journal);
    let (code, said) = audit_verify(&serving, None);
    assert!(code == 0 && said.contains("verified up to 11") && segments.len() == 3, "{said}");

    for path in &segments {
        fs::remove_file(path).unwrap();
        let said = found(&mut serving, "a segment dropped").await;
        assert!(said.contains("missing") || said.contains("gone"), "{said}");
        put_back(&journal, &whole);
    }
    for (a, b) in [(0, 1), (1, 2), (0, 2)] {
        let (one, other) = (fs::read(&segments[a]).unwrap(), fs::read(&segments[b]).unwrap());
        fs::write(&segments[a], other).unwrap();
        fs::write(&segments[b], one).unwrap();
        let said = found(&mut serving, "two segments swapped").await;
        assert!(said.contains("swapped"), "{said}");
        put_back(&journal, &whole);
    }
    serving.up().await;
    serving.stop().await;
}

/// What the program says to do, as an operator would type it: each command between backticks, with what it stands for.
fn printed_commands(serving: &Serving, said: &str, kept: &Path) -> Vec<Vec<String>> {
    let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
    let commands = said.split('`').filter(|c| c.starts_with("countersign "));
    let typed = |word: &str| match word {
        "DIR" => serving.data().display().to_string(),
        "VERIFIER" => printed_key(serving),
        "FILE" => kept.display().to_string(),
        other => other.to_owned(),
    };
    commands.map(|c| c.split(' ').skip(1).map(typed).collect()).collect()
}

fn run(command: &[String]) -> (i32, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_countersign")).args(command).env_clear().output().unwrap();
    let said = String::from_utf8([out.stdout, out.stderr].concat()).unwrap();
    (out.status.code().unwrap(), said)
}

#[tokio::test]
async fn a_lost_or_damaged_head_is_remade_as_the_program_says() {
    let mut serving = stopped().await;
    let head = serving.journal_dir().join(head::FILE_NAME);
    let kept = serving.file("kept.note");
    fs::copy(serving.journal_dir().join(checkpoint::FILE_NAME), &kept).unwrap();
    for damage in ["lost", "damaged"] {
        let good = fs::read(&head).unwrap();
        match damage {
            "lost" => fs::remove_file(&head).unwrap(),
            _ => fs::write(&head, &good[..40]).unwrap(),
        }
        let said = found(&mut serving, damage).await;
        let commands = printed_commands(&serving, &said, &kept);
        let [look, remake] = &commands[..] else { panic!("two commands are told: {said}") };
        assert!(look.contains(&"--without-head".to_owned()) && remake.contains(&"--remake-head".to_owned()), "{said}");
        let (code, told) = run(look);
        assert!(code == 0 && told.contains("verified up to"), "{told}");
        assert!(found(&mut serving, damage).await.contains(head::FILE_NAME), "looking changes nothing");
        let (code, told) = run(remake);
        assert!(code == 0 && told.contains("verified up to"), "{told}");
        serving.up().await;
        // Beside a running broker it is refused, and so it is while there is nothing to remake.
        let (code, told) = run(remake);
        assert!(code == 1 && told.contains("in use by another countersign process"), "{told}");
        work(&serving, damage).await;
        serving.stop().await;
        let (code, told) = run(remake);
        assert!(code == 1 && told.contains("has a good head file"), "{told}");
    }
    // Remaking a head forgives nothing else.
    fs::remove_file(&head).unwrap();
    let segment = serving.journal_dir().join(SEGMENT);
    let mut bytes = fs::read(&segment).unwrap();
    bytes[200] ^= 1;
    fs::write(&segment, bytes).unwrap();
    let key = printed_key(&serving);
    let data = serving.data().display().to_string();
    let remake = ["audit", "verify", &data, "--key", &key, "--remake-head"].map(str::to_owned);
    let (code, told) = run(&remake);
    assert!(code == 1 && told.contains(SEGMENT) && !head.exists(), "{told}");
}

#[tokio::test]
async fn d12_the_whole_rewritten_and_resealed_is_found_by_a_checkpoint() {
    let mut serving = stopped().await;
    let journal = serving.journal_dir();
    let kept = serving.file("kept.note");
    fs::rename(journal.join(checkpoint::FILE_NAME), &kept).unwrap();
    // Somebody with root and without the checkpoint key: another agent asked for it.
    let all: Vec<_> = records(&journal)
        .into_iter()
        .map(|(meta, payload, _)| {
            let text = String::from_utf8(payload).unwrap();
            (meta, text.replace("spiffe://corp.test/agent/a", "spiffe://corp.test/agent/b").into_bytes())
        })
        .collect();
    write_segments(&journal, &all, &[1]);
    forge_head(&journal, true);
    let (code, said) = audit_verify(&serving, None);
    assert!(code == 0 && said.contains("verified up to 11"), "by itself it looks well: {said}");
    let (code, said) = audit_verify(&serving, Some(&kept));
    assert!(code == 1 && said.contains("resealed") && said.contains("kept.note"), "{said}");
    // The broker remembers the leaf that its view came to.
    let refused = serving.refused().await;
    assert!(refused.contains("resealed"), "{refused}");
    // A checkpoint that he signed himself proves nothing: its key is not the broker's.
    let forger = countersign::audit::note::Signer::from_seed("localhost/journal", &[1; 32]).unwrap();
    let forged = checkpoint::Checkpoint::sign(&forger, 11, Hash::ZERO).unwrap();
    fs::write(journal.join(checkpoint::FILE_NAME), forged).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_countersign"));
    command.args(["audit", "verify"]).arg(serving.data()).args(["--key", &printed_key(&serving)]);
    assert_ne!(command.output().unwrap().status.code(), Some(0));
}

#[tokio::test]
async fn an_unfinished_write_past_everything_acknowledged_is_cut_kept_and_reported() {
    let mut serving = Serving::prepare(|_, _| Setup::default());
    serving.up().await;
    work(&serving, "T-1").await;
    // Power goes in the middle of a write: whole sectors of it, and not all.
    serving.kill();
    let segment = serving.journal_dir().join(SEGMENT);
    let mut bytes = fs::read(&segment).unwrap();
    let all = records(&serving.journal_dir());
    let (last, payload, _) = all.last().unwrap();
    let mut torn = Vec::new();
    frame::encode(&Meta { seq: last.seq + 1, durable: last.seq, ..*last }, &payload.repeat(3), &mut torn);
    let torn = &torn[..torn.len() - 9];
    let end = end_of(&bytes);
    bytes[end..end + torn.len()].copy_from_slice(torn);
    fs::write(&segment, &bytes).unwrap();

    let (code, said) = audit_verify(&serving, None);
    assert!(code == 0 && said.contains("unfinished write") && said.contains("never acknowledged"), "{said}");
    serving.up().await;
    let log = serving.log();
    let line =
        log.lines().find(|l| l.contains("an unfinished write was cut from the journal's end")).expect("it is reported");
    let kept = fs::read_dir(serving.journal_dir()).unwrap().map(|e| e.unwrap().path());
    let kept = kept.filter(|p| p.file_name().unwrap().to_str().unwrap().starts_with("torn-")).collect::<Vec<_>>();
    assert_eq!(kept.len(), 1);
    assert!(line.contains(kept[0].to_str().unwrap()) && line.contains("WARN"), "{line}");
    let kept = fs::read(&kept[0]).unwrap();
    assert!(kept.starts_with(torn) && kept[torn.len()..].iter().all(|b| *b == 0), "kept as it was");
    // What was acknowledged is all there, and it goes on.
    work(&serving, "T-2").await;
    serving.stop().await;
    assert_eq!(serving.record().grants.len(), 2);
    let (code, said) = audit_verify(&serving, None);
    assert!(code == 0 && !said.contains("unfinished"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r7_a_journal_file_gone_or_changed_under_the_running_broker_is_noticed_and_endings_go_on() {
    for (what, says) in [
        ("deleted", "was removed or renamed"),
        ("cut", "bytes while the broker was running"),
        ("replaced", "was replaced by another file"),
    ] {
        let mut serving = Serving::prepare(|_, _| Setup::default());
        serving.up().await;
        let agent = serving.agent("a");
        let id = agent.asked("T-1", 300, notes()).await;
        let token = agent.collected(&id).await["secret"]["token"].as_str().unwrap().to_owned();
        let segment = serving.journal_dir().join(SEGMENT);
        match what {
            "deleted" => fs::remove_file(&segment).unwrap(),
            "cut" => fs::File::options().write(true).open(&segment).unwrap().set_len(500).unwrap(),
            _ => {
                let copy = segment.with_extension("copy");
                fs::copy(&segment, &copy).unwrap();
                fs::rename(&copy, &segment).unwrap();
            }
        }
        let asked = agent.ask("T-2", 300, notes()).await;
        assert_eq!(asked.status, 503, "{what}: {asked:?}");
        assert!(asked.json.to_string().contains(says), "{what}: {asked:?}");
        // An identical copy verifies, so it is written on; the operator is told of either.
        let told = if what == "replaced" { says } else { "nothing is minted" };
        broker::until("the operator is told", broker::PATIENCE, async || serving.log().contains(told)).await;
        // What was given is taken back all the same.
        let _ = agent.post(&format!("/v1/grants/{id}/complete"), serde_json::json!({})).await;
        let api = serving.agent("notes-api");
        let request = api.http.post(format!("{}/introspect", api.base)).bearer_auth(api.token.unwrap());
        let answer: serde_json::Value = request.form(&[("token", &token)]).send().await.unwrap().json().await.unwrap();
        assert_eq!(answer["active"], false, "{what}");
        serving.kill();
    }
}
