//! A journal as brokers write them: grants of many agents, decided by the production core, appended by the production
//! writer. Most are tokens that came and went; some were voted on and have two leases; some lapsed; some go on.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use countersign::core::decide::{self, Command, PolicySaid, decide};
use countersign::core::digest::Digest;
use countersign::core::event::{BrokerEvent, EndCause, Event, GrantEvent};
use countersign::core::grant::{Grant, GrantState};
use countersign::core::id::{AgentId, GrantId, LeaseId, PersonId, TaskKey, TaskName, TierName, Timestamp};
use countersign::core::lease::{Evidence, LeaseIntent};
use countersign::core::permission::Permission;
use countersign::core::request::{AgentFacts, Approvable, Assessed, Reason, Request};
use countersign::core::revocability::{Observation, Revocability, RevocabilityMode};
use countersign::core::tier::{Friction, Tier};
use countersign::core::vote::{Verdict, Vote};
use countersign::store::embedded::journal::{Acknowledged, Batch, Journal, Options, Pending};
use countersign::store::engine::Record;
use countersign::time::SystemClock;
use serde_json::json;

use crate::Outcome;

/// Different agents.
const AGENTS: u64 = 400;
/// Records in one write.
const BATCH: usize = 512;
/// Milliseconds between two grants.
const EVERY_MS: u64 = 400;
const START: Timestamp = Timestamp(1_700_000_000_000);

/// What was made.
pub struct Made {
    pub events: u64,
    pub grants: u64,
    pub open: u64,
    pub bytes: u64,
    /// The first grant, which is over.
    pub first: GrantId,
}

/// How long a journal is to be.
#[derive(Debug, Clone, Copy)]
#[allow(dead_code)] // each benchmark uses a part
pub enum Length {
    /// At least so many events.
    Events(u64),
    /// So many grants that are over.
    Grants(u64),
}

/// Writes a journal of that length; `go_on` of the grants are in force at the end.
pub fn make(dir: &Path, length: Length, go_on: u64) -> Outcome<Made> {
    let (journal, _) = Journal::open(dir, Options::default(), Arc::new(SystemClock), &Acknowledged::default())?;
    let mut writer = Writer { journal, batch: Vec::new(), pending: None, written: 0 };
    let began = BrokerEvent::RunStarted {
        version: "bench".to_owned(),
        boot_id: String::new(),
        boot_ms: 0,
        wall: START,
        starts_at: START,
        clock_set_back: false,
    };
    writer.put(START, Event::Broker { what: began })?;
    let mut grants = 0;
    let is_short = |written: u64, grants: u64| match length {
        Length::Events(events) => written < events.saturating_sub(go_on * 5),
        Length::Grants(count) => grants < count,
    };
    while is_short(writer.written, grants) {
        One::new(grants).story(&mut writer, false)?;
        grants += 1;
    }
    let mut open = 0;
    let is_shorter = |written: u64| matches!(length, Length::Events(events) if written < events);
    while is_shorter(writer.written) || open < go_on {
        One::new(grants).story(&mut writer, true)?;
        (grants, open) = (grants + 1, open + 1);
    }
    writer.flush()?;
    if let Some(last) = writer.pending.take() {
        last.wait()?;
    }
    let (events, bytes) = (writer.written, writer.journal.counts().bytes);
    Ok(Made { events, grants, open, bytes, first: One::new(0).id })
}

struct Writer {
    journal: Journal,
    batch: Vec<Vec<u8>>,
    /// The write before, so that making and writing go side by side.
    pending: Option<Pending>,
    written: u64,
}

impl Writer {
    fn put(&mut self, at: Timestamp, event: Event) -> Outcome<()> {
        self.batch.push(serde_json::to_vec(&Record { at, event })?);
        self.written += 1;
        if self.batch.len() >= BATCH { self.flush() } else { Ok(()) }
    }
    fn flush(&mut self) -> Outcome<()> {
        let payloads = std::mem::take(&mut self.batch);
        let next = self.journal.enqueue(Batch { payloads, ..Batch::default() })?;
        if let Some(before) = self.pending.replace(next) {
            before.wait()?;
        }
        if self.batch.capacity() == 0 {
            self.batch.reserve(BATCH);
        }
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(last) = self.pending.take() {
            let _ = last.wait();
        }
    }
}

/// One grant.
struct One {
    n: u64,
    id: GrantId,
    at: Timestamp,
    slot: Option<Grant>,
}

fn mixed(n: u64) -> [u8; 16] {
    let digest = Digest::of_bytes(&n.to_be_bytes());
    let mut out = [0; 16];
    out.copy_from_slice(&digest.as_bytes()[..16]);
    out
}

impl One {
    fn new(n: u64) -> Self {
        Self { n, id: GrantId::from_bytes(mixed(n)), at: START.plus_ms(n * EVERY_MS), slot: None }
    }

    fn story(mut self, writer: &mut Writer, goes_on: bool) -> Outcome<()> {
        // Of twenty: one is not decided in time, three are voted on and have two leases, the others are tokens.
        let kind = if goes_on { 9 } else { self.n % 20 };
        let (two, voted) = ((1..4).contains(&kind), kind < 4);
        self.ask(writer, two, u8::from(voted))?;
        if kind == 0 {
            return self.command(writer, 601, &Command::Tick);
        }
        if voted {
            let digest = self.grant()?.assessed.as_ref().ok_or("assessed")?.digest;
            let vote = Vote {
                person: PersonId::new("rita")?,
                account: "https://login.corp.example/realms/people#8d1c2b6e-7c1e-4b43-9b32-1f1c6a0f3a11".to_owned(),
                via: "browser".to_owned(),
                verdict: Verdict::Approve,
                digest,
                reason: None,
                at: self.at.plus_secs(40),
            };
            let vote = Command::Vote { vote, excluded: BTreeSet::from([PersonId::new("olga")?]), parent_ends_at: None };
            self.command(writer, 40, &vote)?;
        }
        let leases: Vec<LeaseId> =
            (0..=u64::from(two)).map(|i| LeaseId::from_bytes(mixed((1 << 40) | (self.n * 2 + i)))).collect();
        self.intend(writer, &leases)?;
        for lease in &leases {
            let handle = json!({ "jti": lease.to_string(), "audience": "https://notes.corp.example" });
            let not_after = Some(self.at.plus_secs(900));
            self.command(writer, 41, &Command::Live { lease: *lease, handle, not_after, release: true })?;
        }
        if goes_on {
            return Ok(());
        }
        self.command(writer, 300, &Command::Finish { cause: EndCause::Completed })?;
        for lease in leases {
            let evidence = Evidence::TargetSaysGone { detail: "introspection says no since record".to_owned() };
            let seen = if two {
                vec![Observation { what: "sessions ended".to_owned(), count: 1, detail: None }]
            } else {
                Vec::new()
            };
            self.command(writer, 300, &Command::Gone { lease, evidence, seen, access_cut_ms: Some(3) })?;
        }
        if self.n.is_multiple_of(10) {
            let task = TaskKey { agent: self.agent()?, task: self.task()? };
            writer.put(self.at.plus_secs(300), Event::TaskCompleted { task })?;
        }
        Ok(())
    }

    fn grant(&self) -> Outcome<&Grant> {
        Ok(self.slot.as_ref().ok_or("asked for")?)
    }
    fn agent(&self) -> Outcome<AgentId> {
        Ok(AgentId::new(&format!("spiffe://corp.example/ns/agents/sa/worker-{:03}", self.n % AGENTS))?)
    }
    fn task(&self) -> Outcome<TaskName> {
        Ok(TaskName::new(&format!("TICKET-{}", self.n))?)
    }
    fn permission(resource: &str) -> Outcome<Permission> {
        Ok(serde_json::from_value(json!({
            "resource": resource, "actions": ["read"],
            "constraints": { "tables": { "set": ["public.customers", "public.invoices", "public.orders"] } },
        }))?)
    }

    fn take(&mut self, writer: &mut Writer, at: Timestamp, events: Vec<GrantEvent>) -> Outcome<()> {
        for what in events {
            Grant::apply(&mut self.slot, self.id, &what, at)?;
            let version = self.grant()?.version;
            writer.put(at, Event::Grant { id: self.id, version, what: Box::new(what) })?;
        }
        Ok(())
    }

    fn command(&mut self, writer: &mut Writer, after_secs: u64, command: &Command) -> Outcome<()> {
        let at = self.at.plus_secs(after_secs);
        let events = decide(self.grant()?, command, at)?;
        self.take(writer, at, events)
    }

    fn ask(&mut self, writer: &mut Writer, two: bool, approvals: u8) -> Outcome<()> {
        let resources: &[&str] = if two { &["postgres/customers", "api/notes"] } else { &["api/notes"] };
        let permissions = resources.iter().map(|r| Self::permission(r)).collect::<Outcome<Vec<_>>>()?;
        let owner = Some(PersonId::new("olga")?);
        let request = Request {
            agent: AgentFacts {
                id: self.agent()?,
                name: format!("worker-{:03}", self.n % AGENTS),
                issuer: "spiffe://corp.example".to_owned(),
                method: "jwt-svid".to_owned(),
                attributes: BTreeMap::from([("cluster".to_owned(), "eu-central-1".to_owned())]),
                launcher: None,
                owner: owner.clone(),
                team: Some("billing".to_owned()),
            },
            task: self.task()?,
            intent: "Customer asks why the invoice of last month was charged twice; look it up and answer the ticket"
                .to_owned(),
            permissions: permissions.clone(),
            life_secs: 900,
            parent: None,
            chain: Vec::new(),
            excluded_voters: owner.iter().cloned().collect(),
            heartbeat_secs: None,
            confirmation: None,
            idempotency: self.n.is_multiple_of(2).then(|| Digest::of_bytes(&self.n.to_le_bytes())),
            content: Digest::of_bytes(&self.n.to_be_bytes()),
        };
        let says = Revocability { mode: RevocabilityMode::Immediate, residual_secs: 0, says: "cut at once".to_owned() };
        let approvable = Approvable {
            grant: self.id,
            agent: request.agent.id.clone(),
            owner,
            chain: Vec::new(),
            permissions: permissions.clone(),
            life_secs: 900,
            latest_end: self.at.plus_secs(4500),
            tier: Tier { name: TierName::new("observe")?, approvals, life_secs_max: 3600, friction: Friction::One },
            targets: permissions.iter().map(|p| (p.resource.clone(), Digest::of_bytes(b"target"))).collect(),
            revocability: vec![says; permissions.len()],
            sentence: "read public.customers, public.invoices, public.orders of Customers (production), for 15 minutes at most".to_owned(),
        };
        let digest = approvable.digest()?;
        let reasons = vec![Reason {
            rule: "read-sandbox".to_owned(),
            says: "Reading what is not personal needs nobody".to_owned(),
        }];
        let decide_by = self.at.plus_secs(600);
        let assessed = Assessed { approvable, digest, reasons, policy_version: "f3b1c2d4e5".to_owned(), decide_by };
        let said = PolicySaid::Permitted(Box::new(assessed));
        let events = decide::request(self.id, request, None, said, self.at)?;
        self.take(writer, self.at, events)
    }

    fn intend(&mut self, writer: &mut Writer, leases: &[LeaseId]) -> Outcome<()> {
        let grant = self.grant()?;
        let assessed = grant.assessed.as_ref().ok_or("assessed")?;
        let GrantState::Active { ends_at, .. } = grant.state else { return Err("not in force".into()) };
        let at = self.at.plus_secs(40);
        let intent = |(lease, permission): (&LeaseId, &Permission)| -> Outcome<LeaseIntent> {
            Ok(LeaseIntent {
                lease: *lease,
                grant: self.id,
                name: format!("cslease_{}", &hex::encode(lease.as_bytes())[..26]),
                target: "tokens".parse()?,
                permission: permission.clone(),
                intended_at: at,
                lifetime_secs: ends_at.ms_since(at) / 1000,
            })
        };
        let intents = leases.iter().zip(&assessed.approvable.permissions).map(intent).collect::<Outcome<_>>()?;
        let command = Command::Intend { intents, digest: assessed.digest };
        self.command(writer, 40, &command)
    }
}
