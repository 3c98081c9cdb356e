//! "The journal fails, or its disk is full, at whichever moment": no credential comes into being whose intent is not on the
//! disk, none is handed out that isn't recorded, and endings go on (R6). The production broker, engine and journal in one
//! process, on a disk with faults, at every operation of a small day.

#[path = "support/broker.rs"]
mod broker;
#[path = "support/counting.rs"]
mod counting;
mod journal_support;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use broker::agent::{notes, request};
use broker::{DOMAIN, Plan, Shifted, config};
use countersign::audit::reader::read_from_on;
use countersign::broker::{Broker, Mode, Parts, Rules, RunClock, build, run_clock};
use countersign::config::Loaded;
use countersign::config::load::load;
use countersign::core::event::{Event, GrantEvent};
use countersign::core::id::{AgentId, GrantId, LeaseId, Timestamp};
use countersign::identity::dev_authority::DevAuthority;
use countersign::identity::{Method, VerifiedAgent};
use countersign::keys::random::SystemRandom;
use countersign::keys::{Keys, NamePrefix};
use countersign::policy::Engine as Policies;
use countersign::runtime::Runtime;
use countersign::store::embedded::archive::Position;
use countersign::store::embedded::journal::{Acknowledged, Options};
use countersign::store::embedded::{JournalLog, replay};
use countersign::store::engine::{Engine, read_record};
use countersign::store::memory::MemoryArchive;
use countersign::store::view::View;
use countersign::store::{Store, StoreError};
use countersign::time::SystemClock;
use counting::{Counting, Mints};
use journal_support::mem_disk::{Fault, MemDisk};

/// Runs at once: they wait most of the time.
const AT_ONCE: usize = 24;
/// What doesn't come within this doesn't come.
const PATIENCE: Duration = Duration::from_secs(60);

fn dir() -> PathBuf {
    PathBuf::from("/data/journal")
}

/// What each run shares: reading a configuration takes longer than a run.
struct Shared {
    folder: tempfile::TempDir,
    keys: Keys,
}

impl Shared {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = DevAuthority::new(DOMAIN, Arc::new(Shifted::default())).unwrap();
        config::write(folder.path(), &config::Ports::free(), &authority, "http://127.0.0.1:1", None, &Plan::default());
        let keys = Keys::ephemeral(countersign::time::Clock::wall(&SystemClock)).unwrap();
        Self { folder, keys }
    }
    fn loaded(&self) -> Loaded {
        load(&self.folder.path().join("countersign.toml")).unwrap_or_else(|e| panic!("{:?}", e.0))
    }
}

/// An agent, as `identity` proves it.
fn agent(name: &str) -> VerifiedAgent {
    let id = format!("spiffe://{DOMAIN}/agent/{name}");
    VerifiedAgent {
        id: AgentId::new(&id).unwrap(),
        issuer: format!("spiffe://{DOMAIN}"),
        subject: id,
        method: Method::JwtSvid,
        attributes: BTreeMap::new(),
        tier_max: None,
        launcher: None,
        confirmation: None,
        expires_at: Timestamp(u64::MAX),
    }
}

/// Events that are on the disk, whatever becomes of the power.
fn on_disk(disk: &MemDisk) -> Vec<Event> {
    let copy = disk.copy();
    copy.power_cut_leaves(journal_support::mem_disk::Left::Nothing, &mut journal_support::Choices(1));
    let Ok(mut records) = read_from_on(Arc::new(copy), &dir(), 1) else { return Vec::new() };
    let mut out = Vec::new();
    while let Ok(Some(record)) = records.next_record() {
        out.push(read_record(record.meta.seq, record.payload).unwrap().event);
    }
    out
}

fn has(events: &[Event], wanted: impl Fn(GrantId, &GrantEvent) -> bool) -> bool {
    events.iter().any(|e| matches!(e, Event::Grant { id, what, .. } if wanted(*id, what)))
}

/// One day with one fault. Gives what went wrong for callers, and how many operations there were.
async fn day(shared: &Shared, fault: Option<(u64, Fault)>) -> (Vec<String>, u64) {
    let what = format!("{fault:?}");
    let disk = MemDisk::for_matrix();
    disk.set(|s| s.fault = fault);
    let runtime: Arc<dyn Runtime> = Arc::new(SystemClock);
    let mut told = Vec::new();
    let options =
        || Options { segment_bytes: 6000, reserve_bytes: 16 << 10, extend_bytes: 4096, ..journal_support::small() };
    // An operator starts it again, with space.
    let (log, mut stepper, opened) = loop {
        let clock = runtime.clone();
        match JournalLog::open_stepped(Arc::new(disk.clone()), &dir(), options(), clock, &Acknowledged::default()) {
            Ok(open) => break open,
            Err(error) => {
                told.push(error.to_string());
                assert!(told.len() < 4, "{what}: {told:?}");
                disk.space_returns();
                disk.process_dies_unhealed();
            }
        }
    };
    let (archive, mut view) = (MemoryArchive::default(), View::default());
    let (keeper, _) = replay(&log, &archive, &mut view, Position::default(), &opened).unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let writer = std::thread::spawn({
        let over = Arc::clone(&over);
        move || {
            while !over.load(Ordering::SeqCst) && stepper.step() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    let store: Arc<dyn Store> = Arc::new(Engine::start(runtime.clone(), log, archive, view, keeper));

    let loaded = shared.loaded();
    let prefix = NamePrefix::new("cslease").unwrap();
    let engine = Policies::load(&loaded.policies, &loaded.catalogue, &loaded.config.tier).unwrap();
    let mints: Mints = Arc::default();
    let seen = {
        let (disk, what) = (disk.clone(), what.clone());
        move |lease: LeaseId| {
            let there =
                has(&on_disk(&disk), |_, e| matches!(e, GrantEvent::LeaseIntended { intent } if intent.lease == lease));
            assert!(there, "{what}: {lease} was minted, and its intent is not on the disk");
        }
    };
    let connectors = build::connectors(&loaded, &shared.keys, runtime.clone(), &prefix).unwrap();
    let connectors = connectors.into_iter().map(|(name, inner)| {
        let counting = Counting { inner, mints: Arc::clone(&mints), seen: Box::new(seen.clone()) };
        (name, Arc::new(counting) as Arc<dyn countersign::connector::Connector>)
    });
    let (last_run, last_at) = store.last_run().await.unwrap();
    let start = run_clock::start(last_run.as_ref(), last_at, &SystemClock);
    let broker = Broker::new(Parts {
        store: Arc::clone(&store),
        rules: Rules {
            config: loaded.config,
            catalogue: loaded.catalogue,
            engine: engine.into(),
            connectors: connectors.collect(),
        },
        clock: RunClock::new(runtime, start.at),
        random: Arc::new(SystemRandom),
        names: Arc::clone(&shared.keys.names),
        prefix,
        mode: Mode::Serve,
    });
    let started = broker.start_up(start, &BTreeMap::new()).await;
    broker.drive();
    if let Err(error) = started {
        told.push(error.to_string());
        broker.start_later(start, BTreeMap::new());
    }

    // Four jobs. Whoever is refused asks again; space comes back after a while.
    let ops = agent("ops");
    for n in 0..4 {
        let begun = Instant::now();
        let ask = async || -> Result<(GrantId, LeaseId), String> {
            let wanted = serde_json::from_value(request(&format!("T-{n}"), notes())).unwrap();
            let grant = broker.request(&ops, wanted, None).await.map_err(|e| e.to_string())?;
            let issued = broker.credentials(&ops, grant.id, false, None).await.map_err(|e| e.to_string())?;
            Ok((grant.id, issued.credentials[0].lease))
        };
        let (id, lease) = loop {
            match ask().await {
                Ok(got) => break got,
                Err(error) => {
                    // Nothing that was refused is in force with a credential that somebody has.
                    told.push(error);
                    assert!(begun.elapsed() < PATIENCE, "{what}: it doesn't recover: {told:?}");
                    if told.len().is_multiple_of(3) {
                        disk.space_returns();
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        };
        // Guarantee 2: whoever holds it, the disk says so.
        let released = has(&on_disk(&disk), |of, e| {
            of == id && matches!(e, GrantEvent::LeaseLive { lease: l, released: true, .. } if *l == lease)
        });
        assert!(released, "{what}: {lease} was handed out, and that is not on the disk");
        assert!(broker.is_in_force(id, lease).await.unwrap());
        // Guarantee 8: its end doesn't wait for the journal.
        if let Err(error) = broker.complete(&ops, id).await {
            told.push(error.to_string());
        }
        assert!(!broker.is_in_force(id, lease).await.unwrap(), "{what}: it was given back");
        let begun = Instant::now();
        while !store.grant(id).await.unwrap().unwrap().state.is_final() {
            assert!(begun.elapsed() < PATIENCE, "{what}: its end is never recorded: {told:?}");
            if begun.elapsed() > Duration::from_secs(2) {
                disk.space_returns();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    broker.stop(Duration::from_secs(5)).await;
    match store.close().await {
        Ok(()) | Err(StoreError::Unavailable(_)) => {}
        Err(error) => panic!("{what}: {error}"),
    }
    over.store(true, Ordering::SeqCst);
    tokio::task::spawn_blocking(move || writer.join().unwrap()).await.unwrap();
    assert!(mints.lock().unwrap().len() >= 4, "{what}");
    let mut count = 0;
    disk.set(|s| count = s.ops);
    (told, count)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r6_no_mint_follows_a_failed_append_and_revocation_goes_on() {
    let shared = Arc::new(Shared::new());
    let (told, ops) = day(&shared, None).await;
    assert!(told.is_empty(), "{told:?}");
    assert!(ops > 40, "{ops}");
    let faults = [Fault::Error, Fault::Short, Fault::LyingSync, Fault::FullFromHere];
    // How many operations a day has depends on how they share syncs: the last ones are met by most.
    let all: Vec<_> = (1..=ops).flat_map(|at| faults.map(|fault| (at, fault))).collect();
    let (mut runs, mut met) = (0, 0);
    for some in all.chunks(AT_ONCE) {
        let days: Vec<_> = some
            .iter()
            .map(|fault| {
                let (shared, fault) = (Arc::clone(&shared), *fault);
                tokio::spawn(async move { day(&shared, Some(fault)).await })
            })
            .collect();
        for day in days {
            let (told, _) = day.await.unwrap();
            (runs, met) = (runs + 1, met + u32::from(!told.is_empty()));
        }
    }
    eprintln!("journal through the broker: {ops} operations x 4 faults: {runs} days, {met} with an error told");
    assert!(met > 20, "{met} of {runs}");
}
