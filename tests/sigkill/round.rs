//! One data folder with targets of its own: the broker is started on it and killed again and again, and at the end it is
//! left in peace until nothing is left at the targets.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use countersign::audit::verify::Report;
use countersign::client::tls;
use countersign::core::event::BrokerEvent;
use countersign::core::id::LeaseId;
use countersign::core::lease::LeaseState;
use countersign::keys::{NameKey, NamePrefix};
use countersign::time::{Clock as _, SystemClock};

use crate::agents::{Ack, Reach, Story, Told};
use crate::broker::{DOMAIN, PREFIX, Serving, Setup};
use crate::bystanders::Bystanders;
use crate::ledger;
use crate::plan::{Kill, Kills};
use crate::seed::Seed;
use crate::targets::{Seen, Targets};
use crate::truth::Truth;

/// Segments are short, so that most lives of the broker begin one.
const SEGMENT_BYTES: &str = "24576";
/// Identities of agents. Each holds what it holds until it is proven gone, and there is a limit.
const AGENTS: u64 = 16;
/// New grants in each life.
const NEW: usize = 3;
/// Grants of earlier lives that are gone on with.
const OLD: usize = 4;
/// How long a process may take to be ready: on a machine that does much else, too.
const READY: Duration = Duration::from_secs(180);
/// Lines of its log that are shown when it isn't.
const LOG_LINES: usize = 20;
/// A planted role is gone once the broker has been up for so long in all.
const SWEPT_WITHIN: Duration = Duration::from_secs(10);
/// Until nothing is left, once nobody kills any more: the longest mint (43 s), and the longest pause after attempts
/// that failed (60 s).
const SETTLED: Duration = Duration::from_secs(180);

pub struct Folder {
    seed: u64,
    job: u64,
    round: u64,
    cycle: u64,
    targets: Arc<Targets>,
    serving: Serving,
    kills: Kills,
    truth: Truth,
    stories: Vec<Story>,
    tokens: Vec<String>,
    api_token: String,
    bystanders: Bystanders,
    /// Roles that were planted, and for how long the broker was up since.
    planted: BTreeMap<String, Duration>,
}

impl Folder {
    /// `None` where a peer isn't installed.
    pub async fn prepare(seed: u64, job: u64, round: u64) -> Option<Self> {
        let targets = Arc::new(Targets::start().await?);
        let mut serving = Serving::prepare(|_, folder| {
            std::fs::write(folder.join("pg.password"), "broker").unwrap();
            Setup {
                catalogue: targets.catalogue(),
                broker: "sweep_every_secs = 1".to_owned(),
                limits: "requests_per_agent_per_sec = 1000\nrequests_per_agent_burst = 1000\n\
                         open_grants_per_agent_max = 10000"
                    .to_owned(),
                ..Setup::default()
            }
        });
        serving.up().await;
        targets.let_in(&serving).await;
        serving.stop().await;
        serving.up().await;
        let bystanders = Bystanders::begin(&targets, &serving).await;
        serving.kill();
        let token = |name: &str| {
            let id = format!("spiffe://{DOMAIN}/agent/{name}");
            serving.authority.jwt_svid(&id, &[&serving.agent_url()], 6 * 3600).unwrap()
        };
        let (tokens, api_token) = ((0..AGENTS).map(|n| token(&format!("a{n}"))).collect(), token("notes-api"));
        Some(Self {
            seed,
            job,
            round,
            cycle: 0,
            targets,
            serving,
            kills: Kills::default(),
            truth: Truth::default(),
            stories: Vec::new(),
            tokens,
            api_token,
            bystanders,
            planted: BTreeMap::new(),
        })
    }

    /// One life and death of the broker.
    pub async fn cycle(&mut self) -> ledger::Cycle {
        self.cycle += 1;
        let mut seed = Seed::of(self.seed, &[self.job, self.round, self.cycle]);
        let kill = self.kills.next(&mut seed);
        if kill.wants_orphan() {
            self.plant().await;
        }
        // What a target went on with after the last death is not of this life.
        self.truth.seen_before(&self.targets.look().await);
        let due = self.truth.to_end(SystemClock.wall());
        let half_way = self.truth.intended();
        let begun = Instant::now();
        self.spawn(kill.failpoints());
        let ready = self.ready(begun, kill).await;
        let mut told = Told::default();
        let mut hit = self.serving.is_over().is_some();
        if ready.is_some() {
            hit = self.live(begun, kill, &mut seed, &mut told).await;
        }
        let (lived, up) =
            (begun.elapsed(), ready.map_or(Duration::ZERO, |ready| begun.elapsed().saturating_sub(ready)));
        self.serving.kill();

        let (acks, mut wrong) = (std::mem::take(&mut told.acks), std::mem::take(&mut told.wrong));
        let window = self.judge(&acks, &due, up, &mut wrong).await;
        if ready.is_some() {
            self.truth.check_taken_up(&half_way, &mut wrong);
        }
        let ms = |d: Duration| u64::try_from(d.as_millis()).unwrap();
        ledger::Cycle {
            seed: self.seed,
            job: self.job,
            round: self.round,
            nth: self.cycle,
            kill: kill.name(),
            hit: hit && matches!(kill, Kill::At(..)),
            lived_ms: ms(lived),
            ready_ms: ready.map(ms),
            acks: acks.len() as u64,
            used: told.used,
            window_postgres: window.postgres,
            window_openbao: window.openbao,
            records: self.truth.seq,
            wrong,
        }
    }

    fn spawn(&mut self, failpoints: Option<String>) {
        let set = |name: &str, value: String| (name.to_owned(), value);
        self.serving.environment =
            vec![set("COUNTERSIGN_LOG", "warn".to_owned()), set("COUNTERSIGN_SEGMENT_BYTES", SEGMENT_BYTES.to_owned())];
        self.serving.environment.extend(failpoints.map(|text| set("FAILPOINTS", text)));
        // So that none outlives us, however we end.
        self.serving.spawn_under(&["setpriv", "--pdeathsig", "KILL", "--"]);
    }

    /// Waits until it takes requests: after how long it did. `None`: it died before, or was killed.
    async fn ready(&mut self, begun: Instant, kill: Kill) -> Option<Duration> {
        let url = format!("http://127.0.0.1:{}/readyz", self.serving.ports.metrics);
        loop {
            if let Some(status) = self.serving.is_over() {
                let killed = std::os::unix::process::ExitStatusExt::signal(&status) == Some(9);
                assert!(killed, "it ended by itself, {status}:\n{}", self.log_end());
                return None;
            }
            if self.serving.http.get(&url).send().await.is_ok_and(|r| r.status() == 200) {
                return Some(begun.elapsed());
            }
            if matches!(kill, Kill::AtStart(after) if begun.elapsed() >= after) {
                return None;
            }
            assert!(begun.elapsed() < READY, "not ready:\n{}", self.log_end());
            tokio::time::sleep(Duration::from_millis(4)).await;
        }
    }

    fn log_end(&self) -> String {
        let log = self.serving.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }

    /// Agents at work until it dies, or is killed. True if it died by itself.
    async fn live(&mut self, begun: Instant, kill: Kill, seed: &mut Seed, told: &mut Told) -> bool {
        // A client of its own: connections to the last process are dead.
        let http = tls::http(Some(&self.serving.file("ca.pem")), None).unwrap();
        let reach = Arc::new(Reach {
            base: self.serving.agent_url(),
            http,
            api_token: self.api_token.clone(),
            targets: Arc::clone(&self.targets),
        });
        seed.shuffle(&mut self.stories);
        let mut begin: Vec<Story> = self.stories.drain(..self.stories.len().min(OLD)).collect();
        for n in 0..NEW {
            let token = self.tokens[usize::try_from(seed.below(AGENTS)).unwrap()].clone();
            begin.push(Story::new(format!("T-{}-{n}", self.cycle), token, seed));
        }
        let agents: Vec<_> = begin.into_iter().map(|story| tokio::spawn(story.go_on(Arc::clone(&reach)))).collect();
        let ready = Instant::now();
        let died = loop {
            if self.serving.is_over().is_some() {
                break true;
            }
            let done = agents.iter().all(tokio::task::JoinHandle::is_finished);
            match kill {
                Kill::AtStart(after) if begun.elapsed() >= after => break false,
                Kill::AtWork(after) if ready.elapsed() >= after => break false,
                Kill::At(..) if done => break self.linger(kill.patience()).await,
                _ => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        };
        self.serving.kill();
        for agent in agents {
            let (story, mut brought) = agent.await.unwrap();
            told.acks.append(&mut brought.acks);
            told.wrong.append(&mut brought.wrong);
            told.used += brought.used;
            if !story.is_done() {
                self.stories.push(story);
            }
        }
        died
    }

    /// Leaves it alone for so long. True if it died by itself.
    async fn linger(&mut self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        while Instant::now() < until {
            if self.serving.is_over().is_some() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(4)).await;
        }
        false
    }

    /// What stands after its death. First the targets, then the journal: what exists must be on record by then.
    async fn judge(
        &mut self,
        acks: &[Ack],
        due: &BTreeSet<LeaseId>,
        up: Duration,
        wrong: &mut Vec<String>,
    ) -> crate::truth::Window {
        let seen = self.targets.look().await;
        self.truth.read_on(&self.serving.journal_dir(), wrong);
        self.truth.check_acks(acks, wrong);
        self.truth.check_ends(due, up, wrong);
        self.planted.retain(|name, since| {
            *since += up;
            seen.roles.contains(name)
        });
        for (name, since) in &mut self.planted {
            if *since > SWEPT_WITHIN {
                *since = Duration::ZERO;
                wrong.push(format!("orphan: {name} is there after sweeps of {SWEPT_WITHIN:?}"));
            }
        }
        let planted = self.planted.keys().cloned().collect();
        self.truth.check_seen(&seen, &planted, wrong)
    }

    /// A role as one of ours, which no lease explains.
    async fn plant(&mut self) -> String {
        let prefix = NamePrefix::new(PREFIX.trim_end_matches('_')).unwrap();
        let name = NameKey::from_bytes(&[7; 32]).name(&prefix, &[&self.cycle.to_be_bytes()]);
        self.targets.plant(&name).await;
        self.planted.insert(name.clone(), Duration::ZERO);
        name
    }

    /// What no lease explained, and nobody killed the broker meanwhile: on record as found, and as gone.
    fn check_told(&self, planted: &str, wrong: &mut Vec<String>) {
        let told = self.serving.record().broker;
        let found = told.iter().any(|e| matches!(e, BrokerEvent::OrphanFound { name, .. } if name == planted));
        let gone = told.iter().any(|e| matches!(e, BrokerEvent::OrphanGone { name, .. } if name == planted));
        if !found || !gone {
            wrong.push(format!("lost: that {planted} was found ({found}) and ended ({gone}) is not on record"));
        }
    }

    /// Leaves the broker in peace: every lease is settled, every grant that is over is done with, nothing is at the
    /// targets, and the journal verifies.
    pub async fn settle(mut self) -> ledger::Round {
        let mut wrong = Vec::new();
        self.spawn(None);
        self.ready(Instant::now(), Kill::AtWork(Duration::MAX)).await.expect("nobody kills it");
        self.bystanders.finish(&self.targets, &self.serving, &mut wrong).await;
        let orphan = self.plant().await;
        let begun = Instant::now();
        let mut told = Told::default();
        let mut seen = Seen::default();
        while begun.elapsed() < SETTLED {
            self.finish_stories(&mut told).await;
            seen = self.targets.look().await;
            self.truth.read_on(&self.serving.journal_dir(), &mut wrong);
            if seen.is_empty() && self.truth.open().is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        let settled_secs = begun.elapsed().as_secs();
        wrong.append(&mut told.wrong);
        self.truth.check_acks(&told.acks, &mut wrong);
        if !seen.is_empty() {
            wrong.push(format!("orphan: left at the targets after {settled_secs} s: {seen:?}"));
        }
        for grant in self.truth.open() {
            let leases: Vec<_> = grant.leases.values().filter(|l| !l.is_gone()).collect();
            wrong.push(format!("not ended: {} after {settled_secs} s: {:?} {leases:?}", grant.id, grant.state));
        }
        self.bystanders.check_cut(&mut wrong).await;
        self.serving.stop().await;
        self.check_told(&orphan, &mut wrong);
        self.check_journal(&mut wrong);
        let mut leases = BTreeMap::new();
        for lease in self.truth.grants.values().flat_map(|g| g.leases.values()) {
            let state = match &lease.state {
                LeaseState::Revoked { .. } => "revoked",
                LeaseState::Absent { .. } => "absent",
                _ => "open",
            };
            *leases.entry(state.to_owned()).or_default() += 1;
        }
        ledger::Round {
            seed: self.seed,
            job: self.job,
            nth: self.round,
            records: self.truth.seq,
            leases,
            settled_secs,
            wrong,
        }
    }

    /// Agents end what they still have.
    async fn finish_stories(&mut self, told: &mut Told) {
        let reach = Arc::new(Reach {
            base: self.serving.agent_url(),
            http: tls::http(Some(&self.serving.file("ca.pem")), None).unwrap(),
            api_token: self.api_token.clone(),
            targets: Arc::clone(&self.targets),
        });
        let stories: Vec<Story> = std::mem::take(&mut self.stories);
        for some in stories.chunks(OLD) {
            let agents: Vec<_> = some.iter().cloned().map(|s| tokio::spawn(s.go_on(Arc::clone(&reach)))).collect();
            for agent in agents {
                let (story, mut brought) = agent.await.unwrap();
                told.acks.append(&mut brought.acks);
                told.wrong.append(&mut brought.wrong);
                if !story.is_done() {
                    self.stories.push(story);
                }
            }
        }
    }

    /// The whole journal once more, from its first record: what was read between the kills is what is there.
    fn check_journal(&mut self, wrong: &mut Vec<String>) {
        match self.serving.verified() {
            Report::Verified(verified) if verified.closed && verified.signatures_checked => {}
            other => wrong.push(format!("the journal doesn't verify: {other:?}")),
        }
        self.truth.read_on(&self.serving.journal_dir(), wrong);
        let mut again = Truth::default();
        again.read_on(&self.serving.journal_dir(), wrong);
        if again.seq != self.truth.seq || again.grants != self.truth.grants {
            wrong.push("lost: the journal is not what it was between the kills".to_owned());
        }
    }
}
