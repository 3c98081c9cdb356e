//! What is true, kept apart from the broker: what exists at the targets, what disk or database durably holds, what clients
//! were told. Reads the record as plain JSON, so that no code of the broker's own says what an event means.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::Value;

use super::ground::{Durable, Ground};
use super::sched::Sched;

/// What is over must be gone from a target after this, while broker and target are well, in milliseconds: the longest
/// pause between attempts with its jitter, a mint in doubt, and a sweep.
pub const BOUND_MS: u64 = 60_000 + 15_000 + 25_000 + 20_000;
/// What was due while a target was down must be gone this soon after its return, in milliseconds: a look-out a second,
/// and the answers of a slow network.
pub const BACK_MS: u64 = 3_000;

/// As [`BOUND_MS`], if there are several nodes: the run of one that is gone lasts 10 s, is declared over by another 10 s
/// after that one's own first sign of life at the earliest, a turn of 2 s later; what was asked of the database by then
/// may wait 8 s for an answer that is lost. Only then what it was at is anybody's.
pub const NODES_MS: u64 = 10_000 + 10_000 + 2_000 + 8_000;

/// A credential at a target.
#[derive(Debug, Clone)]
pub struct Object {
    pub target: &'static str,
    /// The lease's name.
    pub name: String,
    pub permission: Value,
    pub alive: bool,
    /// Made by a node that was taken for dead, after its lease was proven absent: since then.
    pub late_ms: Option<u64>,
}

#[derive(Debug, Default)]
struct GrantFacts {
    version: u64,
    permissions: Value,
    digest: Value,
    owner: Value,
    approvals: u64,
    approved_by: BTreeSet<String>,
    life_secs: u64,
    is_active: bool,
    deadline_ms: Option<u64>,
    /// Over since then, as the journal or an answer to its agent says.
    over_ms: Option<u64>,
    terminal: Option<String>,
    parent: Option<String>,
    /// How often the record says that its credentials were asked for again and replaced.
    replaced: usize,
    /// Resource → leases that were handed over.
    handed: BTreeMap<String, BTreeSet<String>>,
}

#[derive(Debug, Default)]
struct LeaseFacts {
    grant: String,
    name: String,
    permission: Value,
    /// Who intended it.
    run: i64,
    is_prepared: bool,
    is_live: bool,
    is_released: bool,
    /// Is to be ended since then.
    doomed_ms: Option<u64>,
    gone: Option<&'static str>,
}

/// What a reviewer saw when they voted.
type Seen = BTreeMap<(String, String), Vec<(Value, Value)>>;

#[derive(Default)]
struct Inner {
    /// Hashes of the durable records, in order.
    records: Vec<u64>,
    at_mark: Option<u64>,
    grants: BTreeMap<String, GrantFacts>,
    leases: BTreeMap<String, LeaseFacts>,
    by_name: BTreeMap<String, String>,
    objects: BTreeMap<String, Object>,
    votes: Seen,
    frozen: BTreeSet<u64>,
    violations: Vec<String>,
    /// By how much a restart may prolong a grant, because nobody could know how long the broker was down.
    allowance_ms: u64,
    /// How far the clocks of all runs so far were from the true time, at most, to either side: a deadline that one node
    /// sets on its clock is met by the clock of another.
    clocks_ms: (i64, i64),
    /// Was a credential ever there without a record that it is live?
    pub windows: u64,
    disk_was_ill: bool,
    counts: Counts,
}

/// What a run went through: a schedule in which nothing happens proves nothing.
#[derive(Debug, Default, Clone, Copy)]
pub struct Counts {
    pub granted: u64,
    pub handed_over: u64,
    pub minted: u64,
    pub ended: u64,
    pub votes: u64,
    pub orphans: u64,
}

pub struct Oracle {
    pub ground: Ground,
    pub sched: Arc<Sched>,
    pub talks: bool,
    inner: Mutex<Inner>,
}

fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xCBF2_9CE4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01B3))
}

/// The gist of a record.
fn brief(payload: &[u8]) -> String {
    let record: Value = serde_json::from_slice(payload).unwrap_or_default();
    let event = &record["event"];
    let mut what = event["what"].clone();
    if what["event"] == "requested" || what["event"] == "assessed" {
        let tier = what["assessed"]["approvable"]["tier"]["name"].clone();
        what = serde_json::json!({ "event": what["event"], "tier": tier, "task": what["request"]["task"] });
    }
    if what["event"] == "lease_intended" {
        what = serde_json::json!({ "lease": what["intent"]["lease"], "name": what["intent"]["name"] });
    }
    format!("{} {} {what}", event["of"].as_str().unwrap_or_default(), event["id"])
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

impl Oracle {
    pub fn new(ground: Ground, sched: Arc<Sched>, talks: bool) -> Self {
        Self { ground, sched, talks, inner: Mutex::default() }
    }

    /// Tells what happens, when a schedule is replayed to be read.
    pub fn say(&self, what: impl FnOnce() -> String) {
        if self.talks {
            println!("{:>9} {}", self.sched.now_ms(), what());
        }
    }

    pub fn violated(&self, what: String) {
        let at = self.sched.now_ms();
        self.inner.lock().violations.push(format!("at {at} ms: {what}"));
    }

    pub fn violation(&self) -> Option<String> {
        self.inner.lock().violations.first().cloned()
    }

    pub fn counts(&self) -> Counts {
        self.inner.lock().counts
    }

    /// From now on the journal may lag behind what was done.
    pub fn disk_is_ill(&self) {
        self.inner.lock().disk_was_ill = true;
    }

    pub fn allow_ms(&self, ms: u64) {
        self.inner.lock().allowance_ms += ms;
    }

    /// A run begins with a clock that is so far from the true time.
    pub fn starts_at_ms_off(&self, off_ms: i64) {
        let clocks = &mut self.inner.lock().clocks_ms;
        *clocks = (clocks.0.min(off_ms), clocks.1.max(off_ms));
    }

    /// Reads what became durable since the last look.
    pub fn refresh(&self) {
        let mark = self.ground.mark();
        let from = {
            let mut inner = self.inner.lock();
            if inner.at_mark == Some(mark) {
                return;
            }
            inner.at_mark = Some(mark);
            inner.records.len() as u64 + 1
        };
        for record in self.durable_records(from) {
            self.say(|| format!("durable {}: {}", record.seq, brief(&record.payload)));
            self.inner.lock().take(&record, self.sched.now_ms());
        }
    }

    /// Everything that was ever durable must still be, and the same.
    pub fn nothing_is_lost(&self) {
        self.refresh();
        let now = self.durable_records(1);
        let inner = &mut *self.inner.lock();
        if now.len() < inner.records.len() {
            let (is, was) = (now.len(), inner.records.len());
            inner.violations.push(format!("the journal had {was} durable records and has {is}"));
        }
        for (record, was) in now.iter().zip(&inner.records) {
            if hash(&record.payload) != *was {
                inner.violations.push(format!("durable record {} changed", record.seq));
            }
        }
        inner.violations.extend(self.ground.wrong());
    }

    fn durable_records(&self, from: u64) -> Vec<Durable> {
        self.ground.records(from).unwrap_or_else(|(records, why)| {
            self.violated(format!("the durable journal can't be read: {why}"));
            records
        })
    }

    /// Somebody was told this about a grant: it must be durable by then.
    pub fn acked(&self, grant: &str, version: u64) {
        self.refresh();
        let inner = &mut *self.inner.lock();
        let durable = inner.grants.get(grant).map_or(0, |g| g.version);
        if durable < version {
            let what = format!("grant {grant}: version {version} was told, and {durable} is durable");
            inner.violations.push(what);
        }
    }

    /// The agent was told that its grant is over.
    pub fn told_over(&self, grant: &str) {
        let now = self.sched.now_ms();
        if let Some(g) = self.inner.lock().grants.get_mut(grant) {
            g.over_ms.get_or_insert(now);
        }
    }

    /// A reviewer votes on what they saw.
    pub fn votes(&self, grant: &str, person: &str, digest: Value, permissions: Value) {
        let inner = &mut *self.inner.lock();
        inner.counts.votes += 1;
        inner.votes.entry((grant.to_owned(), person.to_owned())).or_default().push((digest, permissions));
    }

    /// A secret leaves the broker (guarantee 2).
    pub fn handed_over(&self, grant: &str, lease: &str, resource: &str) {
        self.refresh();
        let inner = &mut *self.inner.lock();
        inner.counts.handed_over += 1;
        if !inner.leases.get(lease).is_some_and(|l| l.is_live && l.is_released) {
            inner.violations.push(format!("lease {lease} was handed over and isn't durable as live and released"));
        }
        let g = inner.grants.entry(grant.to_owned()).or_default();
        let handed = g.handed.entry(resource.to_owned()).or_default();
        if handed.insert(lease.to_owned()) && handed.len() > 1 + g.replaced {
            inner.violations.push(format!("grant {grant}: {resource} was handed over twice: {handed:?}"));
        }
    }

    /// A credential comes into being at a target.
    pub fn born(&self, id: &str, mut object: Object, needs_handle: bool) {
        self.refresh();
        self.say(|| format!("made at {}: {}", object.target, object.name));
        let inner = &mut *self.inner.lock();
        inner.counts.minted += 1;
        let lease = inner.by_name.get(&object.name).and_then(|lease| inner.leases.get(lease));
        let wrong = match lease {
            None => Some("has no durable intent"),
            Some(lease) if needs_handle && !lease.is_prepared => Some("has no durable handle"),
            Some(lease) if lease.gone.is_some() && self.ground.is_over(lease.run) => {
                object.late_ms = Some(self.sched.now_ms());
                None
            }
            Some(lease) if lease.gone.is_some() => Some("is on record as gone"),
            Some(lease) if lease.permission != object.permission => Some("may do something else than was intended"),
            Some(lease) => {
                let approved = inner.grants.get(&lease.grant).and_then(|g| g.permissions.as_array());
                let is_approved = approved.is_some_and(|all| all.contains(&object.permission));
                (!is_approved).then_some("may do something that was not approved")
            }
        };
        if let Some(wrong) = wrong {
            inner.violations.push(format!("a credential is made at {}, and {} {wrong}", object.target, object.name));
        }
        inner.objects.insert(id.to_owned(), object);
    }

    /// A credential is ended at its target. False: it wasn't there.
    pub fn ended(&self, id: &str) -> bool {
        self.say(|| format!("ended at its target: {id}"));
        let inner = &mut *self.inner.lock();
        let Some(object) = inner.objects.get_mut(id) else { return false };
        if std::mem::replace(&mut object.alive, false) {
            inner.counts.ended += 1;
        }
        true
    }

    pub fn is_alive(&self, id: &str) -> bool {
        self.inner.lock().objects.get(id).is_some_and(|o| o.alive)
    }

    /// Credentials that are there now: id and name.
    pub fn alive_at(&self, target: &str) -> Vec<(String, String)> {
        let inner = self.inner.lock();
        let alive = inner.objects.iter().filter(|(_, o)| o.alive && o.target == target);
        alive.map(|(id, o)| (id.clone(), o.name.clone())).collect()
    }

    /// Its agent uses a credential: while its grant is in force, it works (guarantee 13).
    pub fn used(&self, grant: &str, lease: &str) {
        self.refresh();
        let inner = &mut *self.inner.lock();
        let (Some(g), Some(l)) = (inner.grants.get(grant), inner.leases.get(lease)) else { return };
        let in_force = g.is_active && g.over_ms.is_none() && l.is_live && l.doomed_ms.is_none() && l.gone.is_none();
        let works = inner.objects.values().any(|o| o.name == l.name && o.alive);
        // Endings that can't be recorded happen all the same.
        if in_force && !works && !inner.disk_was_ill {
            inner.violations.push(format!("grant {grant} is in force, and its credential {} doesn't work", l.name));
        }
    }

    /// The broker says that a token is good.
    pub fn token_is_good(&self, grant: &str, asked_ms: u64) {
        let inner = &mut *self.inner.lock();
        let Some(g) = inner.grants.get(grant) else { return };
        let late = g.deadline_ms.is_some_and(|at| asked_ms > at + inner.allowance() + 1);
        if late || g.over_ms.is_some_and(|at| asked_ms > at) {
            let what = format!("a token of grant {grant} is called good, and the grant is over");
            inner.violations.push(what);
        }
    }

    /// Nothing is alive that should be gone. `well_since` says of each target since when nothing disturbs endings there,
    /// and whether it was just down before that.
    pub fn look_around(&self, well_since: &dyn Fn(&str) -> Option<(u64, bool)>) {
        self.refresh();
        let now = self.sched.now_ms();
        let bound_ms = match self.ground {
            Ground::Disk(..) => BOUND_MS,
            Ground::Database(_) => BOUND_MS + NODES_MS,
        };
        let inner = &mut *self.inner.lock();
        let mut late = Vec::new();
        for object in inner.objects.values().filter(|o| o.alive) {
            let lease = inner.by_name.get(&object.name).and_then(|lease| inner.leases.get(lease));
            let Some(lease) = lease else { continue };
            let over = inner.over_since(&lease.grant, now);
            let Some(since) = [over, lease.doomed_ms].into_iter().flatten().min() else { continue };
            let Some((well, was_down)) = well_since(object.target) else { continue };
            let waited = now.saturating_sub(well.max(since).max(object.late_ms.unwrap_or(0)));
            // Due and recorded so before the target came back.
            let bound = if was_down && since < well && lease.is_live { BACK_MS } else { bound_ms + inner.apart_ms() };
            if since < now && waited > bound {
                late.push(format!(
                    "{} at {} is still alive {waited} ms after it could have been ended",
                    object.name, object.target
                ));
            }
        }
        inner.violations.extend(late);
    }

    /// After everything has calmed down.
    pub fn at_the_end(&self) {
        self.refresh();
        let inner = &mut *self.inner.lock();
        for object in inner.objects.values().filter(|o| o.alive) {
            inner.violations.push(format!("{} is left at {}", object.name, object.target));
        }
        for (id, grant) in inner.grants.iter().filter(|(_, g)| g.terminal.is_none()) {
            inner.violations.push(format!("grant {id} never came to its end (version {})", grant.version));
        }
        for (id, lease) in inner.leases.iter().filter(|(_, l)| l.gone.is_none()) {
            inner.violations.push(format!("lease {id} ({}) has no proof of its end", lease.name));
        }
    }
}

impl Inner {
    /// How far the clocks of two nodes are apart, at most.
    fn apart_ms(&self) -> u64 {
        u64::try_from(self.clocks_ms.1 - self.clocks_ms.0).unwrap_or(0)
    }

    /// How much later than it should a grant may be over.
    fn allowance(&self) -> u64 {
        self.allowance_ms + self.apart_ms()
    }

    /// Since when a grant is over, through its own end or that of one above it.
    fn over_since(&self, grant: &str, now: u64) -> Option<u64> {
        let g = self.grants.get(grant)?;
        let expired = g.deadline_ms.map(|at| at + self.allowance()).filter(|at| *at < now);
        let above = g.parent.as_deref().and_then(|parent| self.over_since(parent, now));
        [g.over_ms, expired, above].into_iter().flatten().min()
    }

    fn take(&mut self, durable: &Durable, now: u64) {
        let (seq, payload) = (durable.seq, &durable.payload[..]);
        if durable.is_stale {
            self.violations.push(format!("record {seq} is of run {}, which was over by then", durable.run));
        }
        if seq != self.records.len() as u64 + 1 {
            return self.violations.push(format!("record {seq} comes after {}", self.records.len()));
        }
        self.records.push(hash(payload));
        let record: Value = match serde_json::from_slice(payload) {
            Ok(record) => record,
            Err(error) => return self.violations.push(format!("record {seq} is not JSON: {error}")),
        };
        let event = &record["event"];
        match event["of"].as_str() {
            Some("grant") => {
                self.take_grant(&text(&event["id"]), event["version"].as_u64(), &event["what"], (durable.run, now));
            }
            Some("frozen") => _ = self.frozen.insert(event["id"].as_u64().unwrap_or_default()),
            Some("unfrozen") => _ = self.frozen.remove(&event["id"].as_u64().unwrap_or_default()),
            Some("broker") if event["what"]["event"] == "orphan_gone" => self.counts.orphans += 1,
            Some("broker") if event["what"]["event"] == "replaced" => {
                self.grants.entry(text(&event["what"]["grant"])).or_default().replaced += 1;
            }
            _ => {}
        }
    }

    fn take_grant(&mut self, id: &str, version: Option<u64>, what: &Value, (run, now): (i64, u64)) {
        let event = what["event"].as_str().unwrap_or_default();
        let g = self.grants.entry(id.to_owned()).or_default();
        if version != Some(g.version + 1) {
            self.violations.push(format!("grant {id}: version {version:?} follows {}", g.version));
        }
        g.version += 1;
        if let Some(terminal) = g.terminal.as_ref().filter(|_| event != "invoked") {
            self.violations.push(format!("grant {id} was {terminal}, and then came {event}"));
        }
        match event {
            "requested" => g.parent = what["request"]["parent"].as_str().map(str::to_owned),
            "assessed" => {
                let approvable = &what["assessed"]["approvable"];
                g.permissions = approvable["permissions"].clone();
                g.owner = approvable["owner"].clone();
                g.approvals = approvable["tier"]["approvals"].as_u64().unwrap_or(u64::MAX);
                g.life_secs = approvable["life_secs"].as_u64().unwrap_or_default();
                g.digest = what["assessed"]["digest"].clone();
                g.approved_by.clear();
            }
            "voted" => {
                let vote = &what["vote"];
                let person = text(&vote["person"]);
                let cast = self.votes.get(&(id.to_owned(), person.clone()));
                // What this person really had before their eyes.
                let saw = cast.is_some_and(|c| c.iter().any(|(d, p)| *d == g.digest && *p == g.permissions));
                if vote["verdict"] == "approve" {
                    if !saw {
                        self.violations.push(format!("grant {id}: {person} approved what they never saw"));
                    }
                    if vote["person"] == g.owner {
                        self.violations.push(format!("grant {id}: its owner {person} approved it"));
                    }
                    g.approved_by.insert(person);
                }
            }
            "activated" => {
                self.counts.granted += 1;
                if (g.approved_by.len() as u64) < g.approvals {
                    let what =
                        format!("grant {id} is in force with {:?}, and {} must approve", g.approved_by, g.approvals);
                    self.violations.push(what);
                }
                g.is_active = true;
                g.deadline_ms = Some(now + g.life_secs * 1000);
            }
            "ending" => {
                g.is_active = false;
                g.over_ms.get_or_insert(now);
                // Before its time, it takes everything below it along, children first (guarantee 7).
                let is_left = |g: &GrantFacts| g.is_active && g.parent.as_deref() == Some(id);
                if what["cause"]["cause"] != "expired" && self.grants.values().any(is_left) {
                    self.violations.push(format!("grant {id} ends, and a child of it is in force"));
                }
            }
            "ended" | "denied" | "lapsed" | "cancelled" | "withdrawn" => {
                g.is_active = false;
                g.over_ms.get_or_insert(now);
                g.terminal = Some(event.to_owned());
            }
            _ => self.take_lease(id, event, what, (run, now)),
        }
    }

    fn take_lease(&mut self, grant: &str, event: &str, what: &Value, (run, now): (i64, u64)) {
        if event == "lease_intended" {
            let intent = &what["intent"];
            let (lease, name) = (text(&intent["lease"]), text(&intent["name"]));
            if !self.grants.get(grant).is_some_and(|g| g.is_active) {
                self.violations.push(format!("lease {lease} is intended under a grant that isn't in force"));
            }
            let above = self.grants.get(grant).and_then(|g| g.parent.clone());
            if above.is_some_and(|above| self.grants.get(&above).is_some_and(|g| !g.is_active)) {
                self.violations.push(format!("lease {lease} is intended under a grant whose parent isn't in force"));
            }
            if self.by_name.insert(name.clone(), lease.clone()).is_some() {
                self.violations.push(format!("the name {name} is used twice"));
            }
            let permission = intent["permission"].clone();
            let facts = LeaseFacts { grant: grant.to_owned(), name, permission, run, ..LeaseFacts::default() };
            self.leases.insert(lease, facts);
            return;
        }
        let id = text(&what["lease"]);
        let Some(lease) = self.leases.get_mut(&id) else { return };
        if let Some(gone) = lease.gone {
            self.violations.push(format!("lease {id} was {gone}, and then came {event}"));
        }
        match event {
            "lease_prepared" => lease.is_prepared = true,
            "lease_live" => {
                lease.is_live = true;
                lease.is_released |= what["released"] == true;
            }
            "lease_unknown" | "lease_revoking" => _ = lease.doomed_ms.get_or_insert(now),
            "lease_revoked" | "lease_absent" => {
                lease.gone = Some(if event == "lease_revoked" { "revoked" } else { "absent" });
                let name = lease.name.clone();
                if self.objects.values().any(|o| o.alive && o.name == name) {
                    self.violations.push(format!("{name} is on record as {event}, and is alive"));
                }
            }
            _ => {}
        }
    }
}
