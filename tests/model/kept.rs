//! The production grants behind the model's states, each kept once. `decide` and `apply` are pure, so one grant, one wish
//! and one moment are put to them once, however many states of the world they occur in.

use std::collections::HashMap;
use std::sync::Arc;

use countersign::core::decide::{self, decide};
use countersign::core::event::{DeniedBy, EndCause, GrantEvent};
use countersign::core::grant::{Grant, GrantState};
use countersign::core::id::Timestamp;
use countersign::core::lease::{Absence, LeaseState, Progress};
use parking_lot::Mutex;

use super::cast::{Cast, Wish, grant_id, moment, request};

/// Names a grant as it is at some moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kept(u32);

/// What became of a wish.
#[derive(Debug, Clone)]
pub enum Answer {
    /// The production code says no, or that nothing is to happen.
    Nothing { refused: bool },
    /// These events, and the grant behind them.
    Events(Arc<[GrantEvent]>, Kept),
    /// `decide` made what `apply` refuses.
    Impossible,
}

#[derive(Default)]
struct Books {
    grants: Vec<Arc<Grant>>,
    /// By all that a grant is, as text.
    known: HashMap<String, Kept>,
    asked: HashMap<(Option<Kept>, usize, u8, Option<Wish>), Answer>,
}

pub struct Keeper {
    pub cast: Cast,
    books: Mutex<Books>,
}

impl Keeper {
    pub fn new() -> Self {
        Self { cast: Cast::new(), books: Mutex::default() }
    }

    pub fn grant(&self, kept: Kept) -> Arc<Grant> {
        Arc::clone(&self.books.lock().grants[kept.0 as usize])
    }

    /// How many different grants there were, and how many questions to the production code.
    pub fn sizes(&self) -> (usize, usize) {
        let books = self.books.lock();
        (books.grants.len(), books.asked.len())
    }

    /// The agent asks. `parent` is the parent's grant, whatever it has become.
    pub fn request(&self, grant: usize, parent: Option<Kept>, tick: u8) -> Answer {
        self.once((parent, grant, tick, None), || {
            let parent = parent.map(|p| self.grant(p));
            let said = self.cast.permitted(grant);
            let made = decide::request(grant_id(grant), request(grant), parent.as_deref(), said, moment(tick));
            (made, None)
        })
    }

    /// Somebody wants something of a grant that is there.
    pub fn wish(&self, kept: Kept, grant: usize, wish: Wish, tick: u8) -> Answer {
        self.once((Some(kept), grant, tick, Some(wish)), || {
            let before = self.grant(kept);
            let command = self.cast.command(grant, wish, moment(tick));
            (decide(&before, &command, moment(tick)), Some(before))
        })
    }

    fn once(
        &self,
        key: (Option<Kept>, usize, u8, Option<Wish>),
        ask: impl FnOnce() -> (Result<Vec<GrantEvent>, decide::Refusal>, Option<Arc<Grant>>),
    ) -> Answer {
        if let Some(answer) = self.books.lock().asked.get(&key) {
            return answer.clone();
        }
        let (grant, tick) = (key.1, key.2);
        let answer = match ask() {
            (Err(_), _) => Answer::Nothing { refused: true },
            (Ok(events), _) if events.is_empty() => Answer::Nothing { refused: false },
            (Ok(events), before) => {
                let mut slot = before.map(|g| (*g).clone());
                let applied = events.iter().all(|e| Grant::apply(&mut slot, grant_id(grant), e, moment(tick)).is_ok());
                match slot.filter(|_| applied) {
                    Some(after) => Answer::Events(events.into(), self.keep(after)),
                    None => Answer::Impossible,
                }
            }
        };
        self.books.lock().asked.insert(key, answer.clone());
        answer
    }

    fn keep(&self, grant: Grant) -> Kept {
        let grant = plain(grant);
        let text = serde_json::to_string(&grant).expect("a grant is plain data");
        let mut books = self.books.lock();
        if let Some(kept) = books.known.get(&text) {
            return *kept;
        }
        let kept = Kept(u32::try_from(books.grants.len()).expect("few grants"));
        books.grants.push(Arc::new(grant));
        books.known.insert(text, kept);
        kept
    }
}

/// Without what only tells how it came about: what differs in nothing else behaves alike from here on. (A moment at which
/// something was noticed matters only where a clock is set back, and attempts only to a person's attestation: neither is
/// modelled.)
fn plain(mut grant: Grant) -> Grant {
    let zero = Timestamp(0);
    grant.version = 1;
    grant.requested_at = zero;
    grant.votes.sort_by(|a, b| a.person.cmp(&b.person));
    for vote in &mut grant.votes {
        vote.at = zero;
    }
    if grant.state.is_final() {
        (grant.assessed, grant.votes) = (None, Vec::new());
    }
    match &mut grant.state {
        GrantState::Requested | GrantState::Pending { .. } => {}
        GrantState::Active { since, .. } => *since = zero,
        GrantState::Ending { active_since, since, cause } => {
            (*active_since, *since, *cause) = (zero, zero, EndCause::Completed);
        }
        GrantState::Ended { active_since, over_since, at, cause } => {
            (*active_since, *over_since, *at, *cause) = (zero, zero, zero, EndCause::Completed);
        }
        GrantState::Denied { at, by, .. } => {
            let (rule, policy_version) = (String::new(), String::new());
            (*at, *by) = (zero, DeniedBy::Policy { rule, policy_version });
        }
        GrantState::Lapsed { at } | GrantState::Cancelled { at } => *at = zero,
        GrantState::Withdrawn { at, cause } => (*at, *cause) = (zero, EndCause::Completed),
    }
    for lease in grant.leases.values_mut() {
        (lease.handle, lease.not_after) = (None, None);
        (lease.intent.intended_at, lease.intent.lifetime_secs) = (zero, 1);
        match &mut lease.state {
            LeaseState::Intended => {}
            LeaseState::Live { since, released_at } => (*since, *released_at) = (zero, released_at.map(|_| zero)),
            LeaseState::Unknown { since, progress, .. } | LeaseState::Revoking { since, progress } => {
                (*since, *progress) = (zero, Progress::default());
            }
            LeaseState::Revoked { at, .. } => *at = zero,
            LeaseState::Absent { at, absence } => {
                (*at, *absence) = (zero, Absence::NotMinted { why: String::new() });
            }
        }
    }
    grant
}
