//! Targets, and the network before them: slow, hanging, down, answering after the effect or not at all. What was asked
//! goes on at the target when the broker that asked is dead.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use countersign::connector::{
    Away, Connector, Credential, Extent, Found, Gap, Gone, MintContext, MintError, Minted, Revocability,
    RevocabilityMode, RevokeError, SweepError,
};
use countersign::core::id::Timestamp;
use countersign::core::lease::{Evidence, Handle, Lease, LeaseIntent};
use countersign::core::permission::Permission;
use countersign::runtime::within;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::Choices;
use super::oracle::{Object, Oracle};
use super::sched::{SimRuntime, WORLD};

/// The broker waits no longer for an answer.
const CALL: Duration = Duration::from_secs(10);
/// The longest that a call may still take effect, in milliseconds after it was made: [`Connector::mint_deadline`].
pub const EFFECT_MS_MAX: u64 = 20_000;

/// How a target is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    Well,
    /// Nothing is listening.
    Down,
    /// Requests vanish, or take effect much later, and no answer comes.
    Hangs,
    /// So many of a thousand calls fail before, and so many after their effect.
    Fails {
        before: u64,
        after: u64,
    },
    /// Answers take seconds.
    Slow,
}

struct State {
    health: Health,
    /// Since when it is as it is.
    since_ms: u64,
    was_down: bool,
    choices: Choices,
    /// Keys that were made beforehand: id → (lease's name, when).
    keys: BTreeMap<String, (String, u64)>,
    made: u64,
}

/// A target. One kind is told the names (as PostgreSQL), the other chooses them (as Vault).
pub struct SimTarget {
    pub name: &'static str,
    names_by_itself: bool,
    oracle: Arc<Oracle>,
    state: Mutex<State>,
}

enum Failure {
    /// Certainly without effect.
    Unreached(&'static str),
    /// Perhaps with.
    Unclear(&'static str),
}

impl Failure {
    const fn why(&self) -> &'static str {
        match self {
            Self::Unreached(why) | Self::Unclear(why) => why,
        }
    }
}

impl SimTarget {
    pub fn new(name: &'static str, names_by_itself: bool, oracle: Arc<Oracle>, seed: u64) -> Self {
        let choices = Choices(seed);
        let state =
            State { health: Health::Well, since_ms: 0, was_down: false, choices, keys: BTreeMap::new(), made: 0 };
        Self { name, names_by_itself, oracle, state: Mutex::new(state) }
    }

    pub fn set(&self, health: Health) {
        let mut state = self.state.lock();
        self.oracle.say(|| format!("{} is {health:?}", self.name));
        // A call that hangs from before is no part of the promise: it ends by its own deadline.
        let now = self.oracle.sched.now_ms();
        let was_well_long = state.health == Health::Well && now > state.since_ms + 2 * CALL.as_millis() as u64;
        state.was_down = match health {
            Health::Down => was_well_long,
            _ => state.was_down && state.health == Health::Down && now > state.since_ms + 2_000,
        };
        state.health = health;
        state.since_ms = self.oracle.sched.now_ms();
    }

    /// Keys that are there, whatever they are for.
    pub fn keys_left(&self) -> usize {
        self.state.lock().keys.len()
    }

    /// Since when it is well, and whether it was just down before.
    pub fn well_since(&self) -> Option<(u64, bool)> {
        let state = self.state.lock();
        (state.health == Health::Well).then_some((state.since_ms, state.was_down))
    }

    /// One call over the network. The effect happens at the target, whatever becomes of the caller.
    async fn call<T: Send + 'static>(
        self: &Arc<Self>,
        runtime: &SimRuntime,
        effect: impl FnOnce(&Arc<Self>) -> T + Send + 'static,
    ) -> Result<T, Failure> {
        let (go, back, lost, fails_before, fails_after) = {
            let state = &mut *self.state.lock();
            let c = &mut state.choices;
            let quick = (c.between(1, 40), c.between(1, 40));
            match state.health {
                Health::Well => (Some(quick.0), quick.1, false, false, false),
                Health::Slow => (Some(c.between(50, 4_000)), c.between(50, 4_000), false, false, false),
                Health::Fails { before, after } => (Some(quick.0), quick.1, false, c.chance(before), c.chance(after)),
                Health::Hangs => (c.coin().then(|| c.between(1, EFFECT_MS_MAX - 10)), 1, true, false, false),
                Health::Down => return Err(Failure::Unreached("connection refused")),
            }
        };
        let (answer, answered) = oneshot::channel();
        if let Some(go) = go {
            let (target, sched) = (Arc::clone(self), Arc::clone(&runtime.sched));
            runtime.sched.spawn(
                WORLD,
                Box::pin(async move {
                    sched.sleep_ms(go).await;
                    if target.state.lock().health == Health::Down {
                        sched.sleep_ms(back).await;
                        // It went down before the call arrived; the caller can't know that.
                        let _ = answer.send(Err(Failure::Unclear("connection lost")));
                        return;
                    }
                    if fails_before {
                        let _ = answer.send(Err(Failure::Unclear("500 before the effect")));
                        return;
                    }
                    let done = effect(&target);
                    sched.sleep_ms(back).await;
                    if !lost {
                        let done = if fails_after { Err(Failure::Unclear("500 after the effect")) } else { Ok(done) };
                        let _ = answer.send(done);
                    }
                }),
            );
        }
        match within(runtime, CALL, answered).await {
            Some(Ok(done)) => done,
            // The other end is gone, or said nothing in time.
            Some(Err(_)) => {
                runtime.sched.sleep_ms(CALL.as_millis() as u64).await;
                Err(Failure::Unclear("no answer"))
            }
            None => Err(Failure::Unclear("no answer in time")),
        }
    }

    /// Ends everything behind a key or name.
    fn end(&self, id: &str) {
        if self.names_by_itself {
            self.state.lock().keys.remove(id);
        }
        self.oracle.ended(id);
    }
}

/// The broker's side of a target, for one run.
pub struct SimConnector {
    pub target: Arc<SimTarget>,
    pub runtime: Arc<SimRuntime>,
}

fn gone() -> Gone {
    let evidence = Evidence::TargetSaysGone { detail: "asked for it: it is gone".to_owned() };
    Gone { evidence, seen: Vec::new(), access_cut: None }
}

fn key_of(handle: &Handle) -> Option<String> {
    handle["key"].as_str().map(str::to_owned)
}

fn retry(failure: &Failure) -> RevokeError {
    RevokeError::Retry { why: failure.why().to_owned() }
}

impl SimConnector {
    /// What stands for a lease at the target, if that is known.
    fn id_of(&self, lease: &Lease) -> Option<String> {
        if self.target.names_by_itself {
            lease.handle.as_ref().and_then(key_of)
        } else {
            Some(lease.intent.name.clone())
        }
    }

    async fn end(&self, id: String) -> Result<Gone, RevokeError> {
        let ended = self.target.call(&self.runtime, move |target| target.end(&id)).await;
        ended.map(|()| gone()).map_err(|e| retry(&e))
    }
}

#[async_trait]
impl Connector for SimConnector {
    fn kind(&self) -> &'static str {
        "token"
    }
    fn revocability(&self, _: &Permission, _: u64) -> Revocability {
        Revocability { mode: RevocabilityMode::Immediate, residual_secs: 0, says: "It ends when told to.".to_owned() }
    }
    fn fingerprint(&self, _: &Permission) -> Value {
        json!(self.target.name)
    }
    fn counts_on_wall_clock(&self) -> bool {
        false
    }

    async fn prepare(&self, intent: &LeaseIntent) -> Result<Option<Handle>, MintError> {
        if !self.target.names_by_itself {
            return Ok(None);
        }
        let name = intent.name.clone();
        let made = self.target.call(&self.runtime, move |target| {
            let state = &mut *target.state.lock();
            state.made += 1;
            let key = format!("key-{}", state.made);
            state.keys.insert(key.clone(), (name, target.oracle.sched.now_ms()));
            key
        });
        match made.await {
            Ok(key) => Ok(Some(json!({ "key": key }))),
            Err(Failure::Unreached(why)) => Err(MintError::NotMinted { why: why.to_owned(), transient: true }),
            Err(Failure::Unclear(why)) => Err(MintError::Unknown { why: why.to_owned(), handle: None }),
        }
    }

    async fn mint(
        &self,
        intent: &LeaseIntent,
        prepared: Option<&Handle>,
        _: &MintContext,
    ) -> Result<Minted, MintError> {
        let (name, permission) = (intent.name.clone(), json!(intent.permission));
        let key = prepared.and_then(key_of);
        let id = key.clone().unwrap_or_else(|| name.clone());
        let needs_handle = self.target.names_by_itself;
        let made = self.target.call(&self.runtime, move |target| {
            if needs_handle && !target.state.lock().keys.contains_key(&id) {
                return false;
            }
            if !target.oracle.is_alive(&id) {
                let object = Object { target: target.name, name, permission, alive: true, late_ms: None };
                target.oracle.born(&id, object, needs_handle);
            }
            true
        });
        match made.await {
            Ok(true) => {
                let public = BTreeMap::from([("name".to_owned(), intent.name.clone())]);
                let credential = Credential { kind: "token", public, secret: BTreeMap::new() };
                let handle = key.map_or(json!({}), |key| json!({ "key": key }));
                Ok(Minted { credential, handle, not_after: None })
            }
            Ok(false) => Err(MintError::NotMinted { why: "permission denied".to_owned(), transient: false }),
            Err(Failure::Unreached(why)) => Err(MintError::NotMinted { why: why.to_owned(), transient: true }),
            Err(Failure::Unclear(why)) => Err(MintError::Unknown { why: why.to_owned(), handle: None }),
        }
    }

    async fn probe(&self) -> Result<(), Away> {
        let answered = self.target.call(&self.runtime, |_| ()).await;
        answered.map_err(|e| Away { why: e.why().to_owned(), extent: Extent::Silent })
    }

    fn mint_deadline(&self) -> Duration {
        Duration::from_millis(EFFECT_MS_MAX) + CALL
    }

    async fn revoke(&self, lease: &Lease, _: Timestamp) -> Result<Gone, RevokeError> {
        match self.id_of(lease) {
            Some(id) => self.end(id).await,
            None => Err(RevokeError::Retry { why: "its handle is not known".to_owned() }),
        }
    }

    async fn revoke_unknown(&self, lease: &Lease, known: &BTreeSet<String>, _: Timestamp) -> Result<Gone, RevokeError> {
        let (name, id, known) = (lease.intent.name.clone(), self.id_of(lease), known.clone());
        let ended = self.target.call(&self.runtime, move |target| {
            let state = target.state.lock();
            let of_name = state.keys.iter().filter(|(key, (n, _))| *n == name && !known.contains(*key));
            let mut ids: BTreeSet<String> = of_name.map(|(key, _)| key.clone()).collect();
            ids.extend(id);
            drop(state);
            for id in &ids {
                target.end(id);
            }
        });
        ended.await.map(|()| gone()).map_err(|e| retry(&e))
    }

    fn keys(&self, handle: &Handle) -> Vec<String> {
        key_of(handle).into_iter().collect()
    }

    async fn sweep(&self) -> Result<Vec<Found>, SweepError> {
        let found = self.target.call(&self.runtime, |target| {
            if target.names_by_itself {
                let state = target.state.lock();
                let found = |(key, (name, _)): (&String, &(String, u64))| (name.clone(), json!({ "key": key }));
                state.keys.iter().map(found).collect::<Vec<_>>()
            } else {
                target.oracle.alive_at(target.name).into_iter().map(|(_, name)| (name, json!({}))).collect()
            }
        });
        let found = found.await.map_err(|e| SweepError(e.why().to_owned()))?;
        Ok(found.into_iter().map(|(name, handle)| Found { name, handle }).collect())
    }

    async fn revoke_found(&self, found: &Found, _: Timestamp) -> Result<Gone, RevokeError> {
        let Some(key) = key_of(&found.handle) else { return self.end(found.name.clone()).await };
        let ended = self.target.call(&self.runtime, move |target| {
            let now = target.oracle.sched.now_ms();
            let born = target.state.lock().keys.get(&key).map(|(_, at)| *at);
            // So young that its mint may be on its way into the record.
            if born.is_some_and(|at| now < at + EFFECT_MS_MAX + CALL.as_millis() as u64) {
                return false;
            }
            target.end(&key);
            true
        });
        match ended.await {
            Ok(true) => Ok(gone()),
            Ok(false) => Err(RevokeError::Retry { why: "too young".to_owned() }),
            Err(e) => Err(retry(&e)),
        }
    }

    async fn check(&self) -> Result<Vec<Gap>, SweepError> {
        Ok(Vec::new())
    }
}
