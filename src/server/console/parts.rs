//! The parts of a grant's page: a permission's facts, the agent's words, votes, credentials, the record.
//! Each takes its texts from the room that the page gives it.

use crate::core::id::Timestamp;
use crate::core::vote::Verdict;
use crate::wire::agent::LeaseView;
use crate::wire::reviewer::{PermissionFacts, TimelineEntry, VoteView};
use crate::wire::words::attestation_in_words;

use super::fit::{FACT, Lines, Room};
use super::format::{Moment, at_most, moment};
use super::look::{self, Look};
use super::visible::{LINE, WORDS, hints};
use crate::core::revocability::RESIDUAL_UNBOUNDED_SECS;

/// Room for the agent's words.
const WORDS_BYTES: usize = 6_000;
/// Lines and characters of the agent's words before the fold.
const FOLD: (usize, usize) = (6, 480);

pub(super) struct Facts {
    pub(super) title: String,
    pub(super) resource: String,
    pub(super) environment: String,
    pub(super) can: Lines,
    pub(super) cannot: Lines,
    pub(super) irreversible: Lines,
    pub(super) ending: String,
    pub(super) residual: Option<String>,
}

pub(super) struct Words {
    pub(super) head: String,
    pub(super) rest: String,
    pub(super) hints: Vec<String>,
}

pub(super) struct Vote {
    pub(super) person: String,
    pub(super) approves: bool,
    pub(super) reason: Option<String>,
    pub(super) at: Moment,
    pub(super) via: String,
}

pub(super) struct Lease {
    pub(super) resource: String,
    pub(super) name: String,
    pub(super) look: Look,
    pub(super) evidence: Option<(String, (&'static str, &'static str))>,
    pub(super) attested: Option<(String, (&'static str, &'static str))>,
    pub(super) at: Option<Moment>,
    pub(super) attempts: u32,
    pub(super) last_error: Option<String>,
    pub(super) next_try: Option<Moment>,
    pub(super) away: Option<String>,
    pub(super) seen: Vec<String>,
}

pub(super) struct Entry {
    pub(super) at: Moment,
    pub(super) says: String,
    pub(super) detail: Option<String>,
    pub(super) source: (&'static str, &'static str),
}

impl Facts {
    pub(super) fn new(p: &PermissionFacts, room: &mut Room) -> Self {
        Self {
            title: room.text(&p.title, LINE),
            resource: room.text(&p.resource, LINE),
            environment: room.text(&p.environment, LINE),
            can: room.lines(&p.can, FACT),
            irreversible: room.lines(&p.irreversible, LINE),
            ending: room.text(&p.ending, LINE),
            residual: (p.residual_secs > 0).then(|| match p.residual_secs {
                RESIDUAL_UNBOUNDED_SECS.. => "without any bound".to_owned(),
                secs => format!("for up to {}", at_most(secs)),
            }),
            cannot: room.lines(&p.cannot, LINE),
        }
    }
}

impl Words {
    pub(super) fn new(intent: &str) -> Self {
        let mut room = Room::new(WORDS_BYTES);
        let text = room.text(intent.trim(), WORDS);
        let fold = text
            .char_indices()
            .scan(0, |lines, (at, c)| {
                *lines += usize::from(c == '\n');
                Some((at, *lines, c))
            })
            .enumerate()
            .find(|(n, (_, lines, c))| *lines >= FOLD.0 || (*n >= FOLD.1 && c.is_whitespace()) || *n >= FOLD.1 + 40)
            .map_or(text.len(), |(_, (at, _, _))| at);
        let (head, rest) = text.split_at(fold);
        Self { head: head.to_owned(), rest: rest.trim_start_matches('\n').to_owned(), hints: hints(intent) }
    }
}

impl Vote {
    pub(super) fn new(v: &VoteView, now: Timestamp, room: &mut Room) -> Self {
        Self {
            person: room.text(&v.person, LINE),
            approves: v.verdict == Verdict::Approve,
            reason: v.reason.as_deref().filter(|r| !r.trim().is_empty()).map(|r| room.text(r, LINE)),
            at: moment(v.at, now),
            via: room.text(&v.via, LINE),
        }
    }
}

impl Lease {
    pub(super) fn new(l: &LeaseView, now: Timestamp, room: &mut Room) -> Self {
        let seen = room.each(&l.seen, 80, |o, room| {
            let detail = o.detail.as_deref().map(|d| format!(" ({d})")).unwrap_or_default();
            room.text(&format!("{}: {}{detail}", o.what.replace('_', " "), o.count), LINE)
        });
        Self {
            resource: room.text(&l.resource, LINE),
            name: room.text(&l.name, LINE),
            look: look::lease(&l.state, l.attempts, l.attested.is_some()),
            evidence: l.evidence.as_ref().map(|e| {
                let (says, source) = look::evidence(e, now);
                (room.text(&says, FACT), look::source(source))
            }),
            attested: l
                .attested
                .as_ref()
                .map(|a| (room.text(&attestation_in_words(&a.by, &a.reason), FACT), look::source("person"))),
            at: l.at.map(|at| moment(at, now)),
            attempts: l.attempts,
            last_error: l.last_error.as_deref().map(|e| room.text(e, LINE)),
            next_try: l.next_try.map(|at| moment(at, now)),
            away: l.away.as_deref().map(|e| room.text(e, LINE)),
            seen,
        }
    }
}

impl Entry {
    pub(super) fn new(e: &TimelineEntry, now: Timestamp, room: &mut Room) -> Self {
        Self {
            at: moment(e.at, now),
            says: room.text(&e.says, LINE),
            detail: e.detail.as_deref().map(|d| room.text(d, LINE)),
            source: look::source(&e.source),
        }
    }
}
