//! The property: whatever is done, in whatever order, with restarts anywhere, a store answers every question as the
//! naive oracle does.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::House;
use super::kit::*;
use super::oracle::{Names, Oracle, dump};
use crate::core::decide::{Command, decide};
use crate::core::digest::Digest;
use crate::core::event::{BrokerEvent, EndCause, Event, Selector};
use crate::core::grant::{Grant, GrantState};
use crate::core::id::{GrantId, Timestamp};
use crate::core::lease::LeaseState;
use crate::core::vote::Verdict;
use crate::store::{Appended, Job, Recorded, Store, StoreError};

/// Grants in one history.
const GRANTS_MAX: usize = 50;

#[derive(Debug, Clone)]
enum Step {
    Ask {
        agent: u64,
        ben: bool,
        other: bool,
        of: usize,
        approvals: u8,
        deny: bool,
        keyed: bool,
        what: usize,
        life: u64,
    },
    /// Two on a grant in one write.
    AskAndEnd {
        agent: u64,
        what: usize,
    },
    Do {
        to: usize,
        what: Act,
    },
    /// The same, without waiting for one to be durable before the next.
    Burst {
        to: usize,
        acts: Vec<Act>,
    },
    EndTree {
        to: usize,
    },
    Again {
        to: usize,
    },
    CompleteTask {
        agent: u64,
        other: bool,
    },
    Freeze {
        id: u64,
    },
    Lift {
        id: u64,
    },
    Run,
    Time {
        secs: u64,
    },
    Claim {
        secs: u64,
        limit: usize,
    },
    Release {
        n: usize,
    },
    Compare,
    Archive,
    Reopen,
}

#[derive(Debug, Clone)]
enum Act {
    Vote { by: usize, approve: bool },
    Cancel,
    Tick,
    Intend,
    Live,
    Unknown,
    Retry { secs: u64 },
    Gone,
    Replace,
    Report,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        2 => (0..3usize, any::<bool>()).prop_map(|(by, approve)| Act::Vote { by, approve }),
        1 => Just(Act::Cancel),
        2 => Just(Act::Tick),
        4 => Just(Act::Intend),
        4 => Just(Act::Live),
        1 => Just(Act::Unknown),
        2 => (0..40u64).prop_map(|secs| Act::Retry { secs }),
        3 => Just(Act::Gone),
        1 => Just(Act::Replace),
        1 => Just(Act::Report),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let ask = (1..5u64, any::<bool>(), any::<bool>(), any::<usize>(), 0..3u8, 0..6u8, any::<bool>(), any::<usize>());
    prop_oneof![
        6 => (ask, 5..200u64).prop_map(|((agent, ben, other, of, approvals, deny, keyed, what), life)| Step::Ask {
            agent, ben, other, of, approvals: approvals.saturating_sub(1), deny: deny == 0, keyed, what, life,
        }),
        1 => (1..5u64, any::<usize>()).prop_map(|(agent, what)| Step::AskAndEnd { agent, what }),
        14 => (any::<usize>(), act()).prop_map(|(to, what)| Step::Do { to, what }),
        3 => (any::<usize>(), prop::collection::vec(act(), 1..6)).prop_map(|(to, acts)| Step::Burst { to, acts }),
        4 => any::<usize>().prop_map(|to| Step::EndTree { to }),
        1 => any::<usize>().prop_map(|to| Step::Again { to }),
        1 => (1..5u64, any::<bool>()).prop_map(|(agent, other)| Step::CompleteTask { agent, other }),
        1 => (1..4u64).prop_map(|id| Step::Freeze { id }),
        1 => (1..4u64).prop_map(|id| Step::Lift { id }),
        1 => Just(Step::Run),
        3 => (1..60u64).prop_map(|secs| Step::Time { secs }),
        2 => (1..100u64, 1..5usize).prop_map(|(secs, limit)| Step::Claim { secs, limit }),
        1 => any::<usize>().prop_map(|n| Step::Release { n }),
        1 => Just(Step::Compare),
        1 => Just(Step::Archive),
        1 => Just(Step::Reopen),
    ]
}

struct Day<'a> {
    house: &'a dyn House,
    store: Arc<dyn Store>,
    oracle: Oracle,
    now: Timestamp,
    asked: u64,
    leases: u64,
    /// Handed out: until when, and the grant's version then.
    claimed: BTreeMap<Job, (Timestamp, u64)>,
    names: Names,
}

impl Day<'_> {
    fn pick(&self, n: usize, fits: impl Fn(&Grant) -> bool) -> Option<Grant> {
        let all = self.oracle.grants();
        let fitting: Vec<&Grant> = all.values().filter(|g| fits(g)).collect();
        (!fitting.is_empty()).then(|| fitting[n % fitting.len()].clone())
    }

    fn recorded(&mut self, events: Vec<Event>, appended: Appended, at: Timestamp) {
        assert_eq!(appended.first_seq, self.oracle.0.len() as u64 + 1);
        assert_eq!(appended.last_seq, appended.first_seq + events.len() as u64 - 1);
        self.oracle.0.extend(events.into_iter().zip(appended.first_seq..).map(|(event, seq)| Recorded {
            seq,
            at,
            event,
        }));
    }

    async fn append(&mut self, events: Vec<Event>) {
        let appended = append(&*self.store, events.clone(), self.now).await.expect("it follows from what is there");
        self.recorded(events, appended, self.now);
    }

    fn ask(&mut self, agent: u64, what: usize) -> Option<Ask> {
        if self.asked as usize >= GRANTS_MAX {
            return None;
        }
        self.asked += 1;
        let sets: [&[&str]; 4] = [&["db"], &["web"], &["db", "web"], &["kv"]];
        let permissions = sets[what % 4].iter().map(|r| permission(r)).collect();
        let owner = Some("ana").filter(|_| agent < 4);
        Some(Ask { agent, owner, permissions, at: self.now, ..ask(self.asked) })
    }

    /// What an act comes to on a grant as it is, if anything.
    fn command(&mut self, grant: &Grant, act: &Act) -> Option<Command> {
        let n_of = |l: &crate::core::lease::Lease| u128::from_be_bytes(*l.intent.lease.as_bytes()) as u64;
        let lease = |fits: &dyn Fn(&LeaseState) -> bool| grant.leases.values().find(|l| fits(&l.state)).map(n_of);
        Some(match act {
            Act::Vote { by, approve } => {
                let verdict = if *approve { Verdict::Approve } else { Verdict::Deny };
                vote(grant, ["eve", "cy", "dee"][*by], verdict)
            }
            Act::Cancel => Command::Cancel,
            Act::Tick => Command::Tick,
            Act::Intend => {
                let GrantState::Active { ends_at, .. } = grant.state else { return None };
                if ends_at.ms_since(self.now) < 1000 || !grant.leases.is_empty() {
                    return None;
                }
                self.leases += 2;
                intend(grant, &[self.leases - 1, self.leases], self.now)
            }
            Act::Live => live(lease(&|s| matches!(s, LeaseState::Intended))?),
            Act::Unknown => Command::Unknown {
                lease: lease_id(lease(&|s| matches!(s, LeaseState::Intended))?),
                why: "lost".into(),
                handle: None,
                not_before: self.now.plus_secs(5),
            },
            Act::Retry { secs } => retry(
                lease(&|s| matches!(s, LeaseState::Revoking { .. } | LeaseState::Unknown { .. }))?,
                self.now.plus_secs(*secs),
            ),
            Act::Gone => gone(lease(&|s| matches!(s, LeaseState::Revoking { .. } | LeaseState::Unknown { .. }))?),
            Act::Replace => {
                let lease = lease_id(lease(&|s| matches!(s, LeaseState::Live { .. }))?);
                Command::RevokeLease { lease, why: "replaced".into() }
            }
            Act::Report => {
                let invocation = crate::core::event::Invocation {
                    tool: "psql".into(),
                    arguments_digest: None,
                    arguments: None,
                    status: "ok".into(),
                    started_at: None,
                    ended_at: None,
                };
                Command::Report { invocation, max: 3 }
            }
        })
    }

    fn events(&mut self, grant: &Grant, act: &Act) -> Option<Vec<Event>> {
        let command = self.command(grant, act)?;
        let made = decide(grant, &command, self.now).ok().filter(|made| !made.is_empty())?;
        Some(numbered(grant.id, grant.version, made))
    }

    /// What ends a grant with everything below it.
    fn end_tree(&self, root: GrantId) -> Vec<Event> {
        let all = self.oracle.grants();
        let mut tree = vec![root];
        let mut next = 0;
        while next < tree.len() {
            let below = all.values().filter(|g| g.request.parent == Some(tree[next]));
            tree.extend(below.map(|g| g.id).collect::<Vec<_>>());
            next += 1;
        }
        let finish = |id: &GrantId| {
            let cause = if *id == root { EndCause::Completed } else { EndCause::ParentEnded };
            let made = decide(&all[id], &Command::Finish { cause }, self.now).unwrap_or_default();
            numbered(*id, all[id].version, made)
        };
        tree.iter().flat_map(finish).collect()
    }

    async fn step(&mut self, step: &Step) {
        match step {
            Step::Ask { agent, ben, other, of, approvals, deny, keyed, what, life } => {
                let Some(mut ask) = self.ask(*agent, *what) else { return };
                let now = self.now;
                let parent = self.pick(*of, |g| g.ends_at().is_some_and(|e| e > now)).filter(|_| of % 3 == 0);
                if let Some(parent) = parent {
                    ask.permissions.clone_from(&parent.assessed.as_ref().expect("in force").approvable.permissions);
                    ask.parent = Some(Arc::new(parent));
                }
                if *ben && *agent == 2 {
                    ask.owner = Some("ben");
                }
                ask.task = if *other { "other" } else { "task" };
                ask.approvals = if ask.owner.is_some() { *approvals } else { 0 };
                (ask.deny, ask.life_secs) = (*deny, *life);
                ask.idempotency = keyed.then(|| Digest::of_bytes(&self.asked.to_be_bytes()));
                self.append(ask.events()).await;
            }
            Step::AskAndEnd { agent, what } => {
                let Some(ask) = self.ask(*agent, *what) else { return };
                let mut events = ask.events();
                let mut made = None;
                for event in &events {
                    if let Event::Grant { id, what, .. } = event {
                        Grant::apply(&mut made, *id, what, self.now).expect("as decided");
                    }
                }
                events.extend(events_of(&made.expect("asked for"), &finish(), self.now));
                self.append(events).await;
            }
            Step::Do { to, what } => {
                let Some(grant) = self.pick(*to, |g| !g.state.is_final()) else { return };
                match self.events(&grant, what) {
                    Some(events) if !self.leaves_children(&events) => self.append(events).await,
                    _ => {}
                }
            }
            Step::Burst { to, acts } => self.burst(*to, acts).await,
            Step::EndTree { to } => {
                let Some(root) = self.pick(*to, |g| !g.state.is_final()) else { return };
                let events = self.end_tree(root.id);
                if !events.is_empty() {
                    self.append(events).await;
                }
            }
            Step::Again { to } => {
                // What was recorded once can't be recorded again.
                let Some(event) = self.oracle.0.iter().filter(|r| matches!(r.event, Event::Grant { .. })).nth(to % 50)
                else {
                    return;
                };
                let outcome = append(&*self.store, vec![event.event.clone()], self.now).await;
                assert!(matches!(outcome, Err(StoreError::Conflict)), "{outcome:?}");
            }
            Step::CompleteTask { agent, other } => {
                let task = task_key(*agent, if *other { "other" } else { "task" });
                let of_task = |g: &Grant| g.request.agent.id == task.agent && g.request.task == task.task;
                let all = self.oracle.grants();
                let mut events = vec![Event::TaskCompleted { task: task.clone() }];
                let is_left = |g: &&Grant| matches!(g.state, GrantState::Pending { .. } | GrantState::Active { .. });
                if all.values().filter(|g| of_task(g)).any(|g| is_left(&g)) {
                    // Not alone: with all that is left of it.
                    let alone = append(&*self.store, events.clone(), self.now).await;
                    assert!(matches!(alone, Err(StoreError::Conflict)), "{alone:?}");
                }
                let mut ended = BTreeSet::new();
                for root in all.values().filter(|g| of_task(g)) {
                    for event in self.end_tree(root.id) {
                        let Event::Grant { id, version, .. } = &event else { continue };
                        if ended.insert((*id, *version)) {
                            events.push(event);
                        }
                    }
                }
                self.append(events).await;
            }
            Step::Freeze { id } => {
                let (selector, by) = (Selector::Agent(agent(*id)), person("eve"));
                self.append(vec![Event::Frozen { id: *id, selector, by, reason: "enough".into() }]).await;
            }
            Step::Lift { id } => self.append(vec![Event::Unfrozen { id: *id, by: person("eve") }]).await,
            Step::Run => {
                let what = BrokerEvent::RunStarted {
                    version: "1".into(),
                    boot_id: "boot".into(),
                    boot_ms: self.now.0,
                    wall: self.now,
                    starts_at: self.now,
                    clock_set_back: false,
                };
                self.append(vec![Event::Broker { what }]).await;
            }
            Step::Time { secs } => {
                self.now = self.now.plus_secs(*secs);
                self.house.passes(Duration::from_secs(*secs)).await;
            }
            Step::Claim { secs, limit } => self.claim(*secs, *limit).await,
            Step::Release { n } => {
                let Some(job) = self.claimed.keys().nth(n % self.claimed.len().max(1)).copied() else { return };
                self.claimed.remove(&job);
                self.store.release(job).await;
            }
            Step::Compare => self.compare().await,
            Step::Archive => archived(&*self.store).await,
            Step::Reopen => {
                self.store.close().await.unwrap();
                self.store = self.reopened().await;
                self.claimed.clear();
                assert_eq!(self.store.last_run().await.unwrap(), self.oracle.last_run());
                self.compare().await;
            }
        }
    }

    async fn reopened(&mut self) -> Arc<dyn Store> {
        // The old one must be gone before the place is opened again.
        self.store = Arc::new(crate::store::memory::store());
        self.house.open().await
    }

    /// Would children stay though their parent ends before its time?
    fn leaves_children(&self, events: &[Event]) -> bool {
        let all = self.oracle.grants();
        events.iter().any(|event| match event {
            Event::Grant { id, .. } => {
                let cut = all.get(id).and_then(Grant::ends_at).is_some_and(|ends_at| ends_at > self.now);
                cut && all.values().any(|g| g.request.parent == Some(*id) && !g.state.is_final())
                    && !matches!(decide_end(event), None)
            }
            _ => false,
        })
    }

    async fn burst(&mut self, to: usize, acts: &[Act]) {
        let Some(id) = self.pick(to, |g| !g.state.is_final()).map(|g| g.id) else { return };
        let store = Arc::clone(&self.store);
        let held = self.house.hold().await;
        let mut coming: Vec<(Vec<Event>, Pin<Box<dyn Future<Output = Result<Appended, StoreError>>>>)> = Vec::new();
        for act in acts {
            let head = store.head(id).await.unwrap().expect("it was there");
            let Some(events) = self.events(&head, act).filter(|e| !self.leaves_children(e)) else { continue };
            let (store, now, mine) = (Arc::clone(&store), self.now, events.clone());
            let mut append = Box::pin(async move { append(&*store, mine, now).await });
            on_its_way(&*self.store, append.as_mut()).await;
            coming.push((events, append));
        }
        drop(held);
        for (events, append) in coming {
            let appended = append.await.expect("it follows from the head");
            self.recorded(events, appended, self.now);
        }
    }

    async fn claim(&mut self, secs: u64, limit: usize) {
        let all = self.oracle.grants();
        let version = |job: &Job| match job {
            Job::Deadline(id) | Job::Lease(id, _) => all[id].version,
        };
        let due = self.oracle.due(self.now);
        let got = self.store.claim(self.now, Duration::from_secs(secs), limit).await.unwrap();
        assert!(got.len() <= limit);
        for (n, job) in got.iter().enumerate() {
            assert!(!got[..n].contains(job), "twice at once");
            assert!(due.contains(job), "{job:?} is not due");
            if let Some((until, then)) = self.claimed.get(job) {
                assert!(*until <= self.now || *then != version(job), "{job:?} is out, and nothing happened");
            }
        }
        if got.len() < limit {
            for job in due.iter().filter(|j| !got.contains(j)) {
                let (until, _) = self.claimed.get(job).unwrap_or_else(|| panic!("{job:?} is due and not handed out"));
                assert!(*until > self.now, "{job:?} should have come back");
            }
        }
        for job in got {
            self.claimed.insert(job, (self.now.plus_secs(secs), version(&job)));
        }
    }

    async fn compare(&self) {
        let (is, should) = (dump(&*self.store, &self.names).await, self.oracle.dump(&self.names));
        assert_eq!(is, should);
    }
}

/// The event, if it takes a grant out of force.
fn decide_end(event: &Event) -> Option<&Event> {
    let Event::Grant { what, .. } = event else { return None };
    matches!(**what, crate::core::event::GrantEvent::Ending { .. }).then_some(event)
}

fn live_through(house: &dyn House, steps: &[Step]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut day = Day {
            house,
            store: house.open().await,
            oracle: Oracle::default(),
            now: START,
            asked: 0,
            leases: 0,
            claimed: BTreeMap::new(),
            names: Names::usual(),
        };
        for step in steps {
            day.step(step).await;
        }
        day.step(&Step::Compare).await;
        day.step(&Step::Reopen).await;
        assert_eq!(figure(&*day.store, "store_on_its_way"), 0);
        day.store.close().await.unwrap();
    });
}

/// Lives through so many histories, each in a house of its own.
pub fn run<H: House + Default>(cases: u32, steps_max: usize) {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(cases);
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 300, ..Config::default() };
    let histories = prop::collection::vec(step(), 1..steps_max);
    let outcome = TestRunner::new(config).run(&histories, |steps| {
        live_through(&H::default(), &steps);
        Ok(())
    });
    if let Err(why) = outcome {
        panic!("{why}");
    }
}
