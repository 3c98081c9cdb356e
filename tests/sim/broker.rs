//! One run of the broker, made of the production parts: core, broker, drivers, the engine, the journal. Only its
//! clocks, its disk and what is at the other end of the network are simulated; the view is the one in memory.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};

use countersign::audit::disk::Disk;
use countersign::audit::note::Signer;
use countersign::broker::run_clock::Start;
use countersign::broker::{Broker, Mode, Parts, Rules, RunClock, build, run_clock};
use countersign::config::Loaded;
use countersign::connector::Connector;
use countersign::core::digest::Digest;
use countersign::core::id::{ResourceName, Timestamp};
use countersign::keys::random::SeededRandom;
use countersign::keys::{Keys, NameKey, NamePrefix, Origin};
use countersign::policy::Engine as Policies;
use countersign::runtime::Runtime;
use countersign::store::Store;
use countersign::store::embedded::archive::Position;
use countersign::store::embedded::journal::{Acknowledged, Options, Stepper};
use countersign::store::embedded::{JournalLog, replay};
use countersign::store::engine::Engine;
use countersign::store::memory::MemoryArchive;
use countersign::store::postgres::{self, OpenError};
use countersign::store::view::View;
use countersign::time::Clock;
use futures::FutureExt as _;

use super::link::Link;
use super::mem_disk::MemDisk;
use super::sched::SimRuntime;
use super::support::{CAT, Example};
use super::target::{SimConnector, SimTarget};

/// What is the same for all runs of all seeds: configuration, policies, keys.
struct House {
    loaded: Loaded,
    policies: Arc<Policies>,
    keys: Keys,
    /// Always the same: names at targets are a part of the schedule.
    names: Arc<NameKey>,
    prefix: NamePrefix,
    _files: Example,
}

/// Resources: automatic, one vote, two votes; each at a target that is told names and at one that chooses them; tokens.
fn catalogue() -> String {
    let mut out = r#"
[[environment]]
name = "sandbox"
reaches_production = false
[[environment]]
name = "prod"
reaches_production = true
[[target]]
name = "tokens"
kind = "token"
settings = { life_secs_max = 900, skew_secs = 1 }
[[target]]
name = "told"
kind = "token"
[[target]]
name = "chooses"
kind = "token"
"#
    .to_owned();
    for (target, checks) in [("tokens", "introspection"), ("told", "offline"), ("chooses", "offline")] {
        for (part, place) in [
            ("notes", "environment = \"sandbox\"\nisolated = true"),
            ("books", "environment = \"prod\""),
            ("vault", "environment = \"prod\""),
        ] {
            let server =
                if checks == "introspection" { "resource_server = \"spiffe://corp.example/api/notes\"," } else { "" };
            out += &format!(
                "[[resource]]\nname = \"{target}/{part}\"\ntarget = \"{target}\"\ntitle = \"{part}\"\n{place}\n\
                 sensitivity = \"internal\"\nsettings = {{ {server} audience = \"https://{part}.{target}.test\", checks = \"{checks}\" }}\n\
                 [[resource.action]]\nname = \"read\"\neffect = \"read\"\n\
                 [[resource.action]]\nname = \"erase\"\neffect = \"delete\"\n"
            );
        }
    }
    out
}

fn house() -> &'static House {
    static HOUSE: OnceLock<House> = OnceLock::new();
    HOUSE.get_or_init(|| {
        let files = Example::new();
        files.write(CAT, &catalogue());
        files.replace("countersign.toml", "sweep_every_secs = 300", "sweep_every_secs = 20");
        files.replace("countersign.toml", "decide_within_secs = 3600", "decide_within_secs = 120");
        let loaded = files.load().unwrap_or_else(|problems| panic!("{problems:#?}"));
        let policies = Policies::load(&loaded.policies, &loaded.catalogue, &loaded.config.tier).unwrap();
        let keys = Keys::open(&loaded.base, Origin::Serve, Timestamp(0)).unwrap();
        let prefix = loaded.config.broker.name_prefix.clone();
        let names = Arc::new(NameKey::from_bytes(&[7; 32]));
        House { loaded, policies: Arc::new(policies), keys, names, prefix, _files: files }
    })
}

/// A broker that runs.
pub struct Process {
    pub broker: Arc<Broker>,
    pub runtime: Arc<SimRuntime>,
    pub store: Arc<dyn Store>,
    /// Its doors open once its start was recorded, or could not be: as in `serve`.
    pub is_open: Arc<AtomicBool>,
}

fn options() -> Options {
    Options {
        segment_bytes: 48 * 1024,
        reserve_bytes: 16 * 1024,
        extend_bytes: 8 * 1024,
        signer: Some(Signer::from_seed("broker.corp.example/journal", &[42; 32]).unwrap()),
        earlier_keys: Vec::new(),
        checkpoint_records: 100,
        checkpoint_secs: 60,
    }
}

/// Starts a run as `serve` does. The caller drives the journal's writer.
pub fn start(
    runtime: Arc<SimRuntime>,
    disk: &MemDisk,
    dir: &Path,
    targets: &[Arc<SimTarget>],
    seed: u64,
) -> Result<(Process, Stepper, bool), String> {
    let shared: Arc<dyn Runtime> = runtime.clone();
    let clock: Arc<dyn Clock> = runtime.clone();
    let disk: Arc<dyn Disk> = Arc::new(disk.clone());
    let known = Acknowledged::default();
    let (log, stepper, opened) =
        JournalLog::open_stepped(disk, dir, options(), clock, &known).map_err(|e| e.to_string())?;
    let (archive, mut view) = (MemoryArchive::default(), View::default());
    let (keeper, _) =
        replay(&log, &archive, &mut view, Position::default(), &opened).map_err(|e| format!("replay: {e}"))?;
    let store: Arc<dyn Store> = Arc::new(Engine::start(Arc::clone(&shared), log, archive, view, keeper));
    let last = store.last_run().now_or_never().ok_or("the last run isn't at hand")?.map_err(|e| e.to_string())?;
    let start = run_clock::start(last.0.as_ref(), last.1, runtime.as_ref());
    Ok((assemble(runtime, store, start, targets, seed)?, stepper, start.clock_set_back))
}

/// Opens the store of several nodes, as `serve` does.
pub async fn open(link: Link, seed: u64) -> Result<Arc<dyn Store>, OpenError> {
    let signer = Signer::from_seed("broker.corp.example/journal", &[42; 32]).unwrap();
    let (keys, runtime) = (Digest::of_bytes(b"keys"), Arc::clone(&link.runtime));
    let random = Arc::new(SeededRandom::new(seed));
    Ok(Arc::new(postgres::open_on(Arc::new(link), &keys, runtime, random, Some(signer)).await?))
}

/// The broker on its store. Its start is on its way when this returns.
pub fn assemble(
    runtime: Arc<SimRuntime>,
    store: Arc<dyn Store>,
    start: Start,
    targets: &[Arc<SimTarget>],
    seed: u64,
) -> Result<Process, String> {
    let house = house();
    let shared: Arc<dyn Runtime> = runtime.clone();
    let clock: Arc<dyn Clock> = runtime.clone();
    let mut connectors: BTreeMap<ResourceName, Arc<dyn Connector>> =
        build::connectors(&house.loaded, &house.keys, clock, &house.prefix).map_err(|e| format!("{e:?}"))?;
    for target in targets {
        let connector = SimConnector { target: Arc::clone(target), runtime: Arc::clone(&runtime) };
        connectors.insert(target.name.parse().unwrap(), Arc::new(connector));
    }
    let broker = Broker::new(Parts {
        store: Arc::clone(&store),
        rules: Rules {
            config: house.loaded.config.clone(),
            catalogue: house.loaded.catalogue.clone(),
            engine: Arc::clone(&house.policies),
            connectors,
        },
        clock: RunClock::new(shared, start.at),
        random: Arc::new(SeededRandom::new(seed)),
        names: Arc::clone(&house.names),
        prefix: house.prefix.clone(),
        mode: Mode::Serve,
    });
    let (starting, is_open) = (Arc::clone(&broker), Arc::new(AtomicBool::new(false)));
    let opens = Arc::clone(&is_open);
    runtime.spawn(Box::pin(async move {
        let recorded = starting.start_up(start, &BTreeMap::new()).await;
        starting.drive();
        if recorded.is_err() {
            starting.start_later(start, BTreeMap::new());
        }
        opens.store(true, SeqCst);
    }));
    Ok(Process { broker, runtime, store, is_open })
}
