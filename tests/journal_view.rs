//! "The view is gone, old, damaged, somebody else's": it is rebuilt from the journal, or refused with the reason; no answer
//! is ever another than the journal's. With the production store on the real disk.

#[path = "../benches/rebuild/journal.rs"]
mod journal;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use countersign::core::digest::Digest;
use countersign::core::event::{BrokerEvent, Event};
use countersign::core::id::{AgentId, TaskKey, TaskName};
use countersign::store::embedded::{self, OpenError, Report, journal_dir};
use countersign::store::{Batch, Store};
use countersign::time::{Clock as _, SystemClock};

/// As benchmarks have it.
pub type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Enough for a view of something of each kind; few enough to be rebuilt often.
const EVENTS: u64 = 200;
const OPEN: u64 = 8;

fn make(data: &Path, events: u64, open: u64) {
    // The writer is waited for, which a thread of the runtime mustn't do.
    let made = std::thread::scope(|s| {
        s.spawn(|| journal::make(&journal_dir(data), journal::Length::Events(events), open).unwrap()).join()
    });
    let made = made.unwrap();
    assert_ne!(made.first, countersign::core::id::GrantId::from_bytes([0; 16]));
    assert!(made.events >= events && made.open >= open && made.grants > made.open && made.bytes > 0);
}

/// A data folder with a journal and the view of it, closed.
async fn house() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path(), EVENTS, OPEN);
    let (_, report) = asked(dir.path()).await.unwrap();
    assert_eq!((report.replayed, report.rebuilt), (report.records, None), "there was none");
    dir
}

/// Opens the store, asks it everything that there is to ask, and closes it.
async fn asked(data: &Path) -> Result<(String, Report), OpenError> {
    let (store, report) = embedded::open(data, Arc::new(SystemClock), None, Vec::new())?;
    let mut out = String::new();
    let mut open: Vec<String> = store.open_grants().await?.iter().map(|g| format!("{g:?}")).collect();
    open.sort();
    out.push_str(&open.join("\n"));
    for grant in store.decided(10_000).await? {
        out.push_str(&format!("\n{grant:?}\n{:?}", store.events(grant.id).await?));
    }
    for n in 0..EVENTS {
        let found = store.by_idempotency(&Digest::of_bytes(&n.to_le_bytes())).await?;
        out.push_str(&format!("\n{:?}", found.map(|g| g.id)));
        let agent = AgentId::new(&format!("spiffe://corp.example/ns/agents/sa/worker-{n:03}")).unwrap();
        out.push_str(&format!("\n{:?} {:?}", store.history(&agent).await?, store.open_counts(&agent).await?));
        out.push_str(&format!("\n{:?}", store.held(&agent, None, countersign::core::id::Timestamp(0), None).await?));
        let task = TaskKey { agent, task: TaskName::new(&format!("TICKET-{n}")).unwrap() };
        out.push_str(&format!("\n{}", store.task_completed(&task).await?));
    }
    out.push_str(&format!("\n{:?} {:?}", store.freezes().await?, store.last_run().await?));
    store.close().await?;
    Ok((out, report))
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() { copy(&path, &to) } else { fs::copy(&path, &to).map(|_| ()).unwrap() }
    }
}

fn replace(dir: &Path, with: &Path) {
    let _ = fs::remove_dir_all(dir);
    copy(with, dir);
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { out.extend(files(&path)) } else { out.push(path) }
    }
    out.sort();
    out
}

fn small() -> Event {
    Event::Broker { what: BrokerEvent::RunEnded }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_or_an_older_copy_is_brought_up_to_date() {
    let dir = house().await;
    let data = dir.path();
    let (view, older) = (data.join("view"), data.join("older"));
    copy(&view, &older);
    // The journal goes on: of the open grants some end, and a task is done.
    let (store, _) = embedded::open(data, Arc::new(SystemClock), None, Vec::new()).unwrap();
    let at = SystemClock.wall();
    for grant in store.open_grants().await.unwrap().into_iter().take(3) {
        let finish = countersign::core::decide::Command::Tick;
        let made = countersign::core::decide::decide(&grant, &finish, at).unwrap();
        let events = made.into_iter().zip(grant.version + 1..).map(|(what, version)| Event::Grant {
            id: grant.id,
            version,
            what: Box::new(what),
        });
        store.append(Batch { expect: Vec::new(), events: events.collect(), at, urgent: true }).await.unwrap();
    }
    store.close().await.unwrap();
    drop(store);
    let (truth, report) = asked(data).await.unwrap();
    assert_eq!((report.replayed, report.rebuilt), (0, None), "it is current");

    replace(&view, &older);
    let (said, report) = asked(data).await.unwrap();
    assert!(said == truth, "an older copy answers as the journal does");
    assert!(report.replayed > 0 && report.replayed < report.records, "only what it lacks is read: {report:?}");

    fs::remove_dir_all(&view).unwrap();
    let (said, report) = asked(data).await.unwrap();
    assert!(said == truth && report.replayed == report.records, "{report:?}");
    fs::create_dir_all(&view).unwrap();
    for path in files(&view) {
        fs::remove_file(path).unwrap();
    }
    let (said, _) = asked(data).await.unwrap();
    assert!(said == truth);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_another_journal_or_a_newer_version_it_is_refused_with_the_reason() {
    let dir = house().await;
    let data = dir.path();
    let view = data.join("view");
    let (truth, _) = asked(data).await.unwrap();
    let kept = data.join("kept");
    copy(&view, &kept);

    // Of a journal as long, of a longer one, and of a shorter one.
    for events in [EVENTS, EVENTS * 2, EVENTS / 2] {
        let other = tempfile::tempdir().unwrap();
        make(other.path(), events, OPEN - 1);
        let (store, _) = embedded::open(other.path(), Arc::new(SystemClock), None, Vec::new()).unwrap();
        store
            .append(Batch { expect: Vec::new(), events: vec![small()], at: SystemClock.wall(), urgent: true })
            .await
            .unwrap();
        store.close().await.unwrap();
        drop(store);
        replace(&view, &other.path().join("view"));
        let refused = asked(data).await.map(|(_, report)| report).unwrap_err().to_string();
        let says_why = refused.contains("the view has applied") || refused.contains("the view is another journal's");
        assert!(says_why && refused.contains("do:"), "{refused}");
    }

    replace(&view, &kept);
    {
        let db = sled::open(&view).unwrap();
        let meta = db.get(b"m").unwrap().unwrap();
        let mut meta: serde_json::Value = serde_json::from_slice(&meta).unwrap();
        meta["form"] = 99.into();
        meta["something_new"] = true.into();
        db.insert(b"m", serde_json::to_vec(&meta).unwrap()).unwrap();
        db.flush().unwrap();
    }
    let refused = asked(data).await.map(|(_, report)| report).unwrap_err().to_string();
    assert!(refused.contains("newer version (form 99") && refused.contains("remove"), "{refused}");
    // As it says.
    fs::remove_dir_all(&view).unwrap();
    assert!(asked(data).await.unwrap().0 == truth);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_anywhere_it_answers_as_the_journal_does_or_is_rebuilt() {
    /// Places in each file that are flipped, over what is used of it.
    const PLACES: usize = 30;
    let dir = house().await;
    let data = dir.path();
    let view = data.join("view");
    let (truth, _) = asked(data).await.unwrap();
    let kept = data.join("kept");
    copy(&view, &kept);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {})); // sled's own, which are answers here
    let (mut tried, mut rebuilt, mut replayed) = (0, 0, 0);
    let mut wrong = Vec::new();
    for file in files(&kept) {
        let name = file.strip_prefix(&kept).unwrap().to_owned();
        let good = fs::read(&file).unwrap();
        let used = good.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
        let flips = (0..PLACES.min(used)).map(|i| i * used / PLACES.min(used));
        let flips = flips.map(|at| {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            (format!("byte {at}"), bad)
        });
        let cuts = [0, used / 3, used * 2 / 3, used.saturating_sub(1)];
        let cuts = cuts.into_iter().map(|to| (format!("cut to {to}"), good[..to].to_vec()));
        let zeroed = [used / 4, used / 2].into_iter().map(|from| {
            let mut bad = good.clone();
            bad[from..used.min(from + 4096)].fill(0);
            (format!("zeros from {from}"), bad)
        });
        for (how, bad) in flips.chain(cuts).chain(zeroed) {
            replace(&view, &kept);
            let _ = fs::remove_file(data.join("view.damaged"));
            fs::write(view.join(&name), &bad).unwrap();
            tried += 1;
            // What can't be read while it runs is told so, leaves a mark, and is rebuilt by the next start.
            let mut said = asked(data).await;
            if matches!(said, Err(OpenError::Store(_))) {
                said = asked(data).await;
            }
            match said {
                Ok((said, report)) => {
                    if said != truth {
                        wrong.push(format!("{} {how}: {report:?}", name.display()));
                    }
                    rebuilt += u32::from(report.rebuilt.is_some());
                    replayed += u32::from(report.replayed > 0);
                }
                Err(error) => wrong.push(format!("{} {how}: {error}", name.display())),
            }
        }
    }
    std::panic::set_hook(hook);
    eprintln!("view: damaged in {tried} ways, rebuilt {rebuilt} times, {replayed} times at least in part");
    assert!(wrong.is_empty(), "{} of {tried}:\n{}", wrong.len(), wrong.join("\n"));
    assert!(tried > PLACES && rebuilt > 0, "{tried}, {rebuilt}");
}
