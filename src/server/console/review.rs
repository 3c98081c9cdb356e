//! One grant: request page, live grant or record, depending on its state. This file turns the wire type
//! into what the templates show; how much of each part is shown is bounded here.

use askama::Template;

use crate::core::id::AGENT_ID_BYTES_MAX;
use crate::core::tier::Friction;
use crate::core::vote::REASON_CHARS_MAX;
use crate::wire::agent::LeaseView;
use crate::wire::reviewer::Review;

use super::fit::{FACT, Lines, Room};
use super::format::{Moment, exact, moment, span};
use super::look::{self, Look};
use super::parts::{Entry, Facts, Lease, Vote, Words};
use super::queue::{RowView, row};
use super::visible::{LINE, hints, visible_line};
use super::{Chrome, page};

/// Room for what is decided about. If it isn't enough, the page offers no approval.
const FACTS_BYTES: usize = 14_000;
const IDENTITY_BYTES: usize = 6_000;
const WHY_BYTES: usize = 4_000;
const SIMILAR_BYTES: usize = 3_000;
const RECORD_BYTES: usize = 14_000;
const SIMILAR_MAX: usize = 5;
/// Fields of the identity that are looked at for hidden characters and look-alikes.
const HINTED_FIELDS_MAX: usize = 32;

/// The page of one grant. `notice` tells what the viewer's last action did, or why it did nothing.
pub fn request(review: &Review, chrome: &Chrome, notice: Option<&str>) -> String {
    let v = View::new(review, notice);
    match review.grant.state.as_str() {
        "pending" | "requested" => page(&RequestPage { chrome, v }),
        "active" | "ending" => page(&LivePage { chrome, v }),
        _ => page(&RecordPage { chrome, v }),
    }
}

/// What must be typed to approve, where the tier asks for it: the resource that can't be undone, else the first.
pub fn typed_target(review: &Review) -> Option<&str> {
    review.tier.as_ref().filter(|t| t.friction == Friction::Critical)?;
    let undoable = review.permissions.iter().find(|p| !p.irreversible.is_empty());
    undoable.or(review.permissions.first()).map(|p| p.resource.as_str())
}

#[derive(Template)]
#[template(path = "request.html")]
struct RequestPage<'a> {
    chrome: &'a Chrome,
    v: View<'a>,
}
#[derive(Template)]
#[template(path = "live.html")]
struct LivePage<'a> {
    chrome: &'a Chrome,
    v: View<'a>,
}
#[derive(Template)]
#[template(path = "over.html")]
struct RecordPage<'a> {
    chrome: &'a Chrome,
    v: View<'a>,
}

struct View<'a> {
    notice: Option<String>,
    id: String,
    version: u64,
    state_word: &'a str,
    state: Look,
    tier: Look,
    tiered: bool,
    critical: bool,
    asked: Option<Moment>,
    until: Option<Moment>,
    until_ms: u64,
    now_ms: u64,
    left: String,
    approvals: u8,
    needed: u8,
    sentence: Vec<(String, bool)>,
    facts: Vec<Facts>,
    facts_more: usize,
    holds: Lines,
    difference: Option<Lines>,
    name: String,
    agent_id: String,
    agent_raw: &'a str,
    issuer: String,
    method: String,
    owner: Option<String>,
    team: Option<String>,
    attributes: Vec<(String, String)>,
    attributes_more: usize,
    chain: Lines,
    parent: Option<String>,
    first_seen: Option<Moment>,
    identity_hints: Vec<String>,
    task: String,
    words: Words,
    reasons: Lines,
    deciders: Lines,
    votes: Vec<Vote>,
    may_vote: Result<(), String>,
    may_revoke: bool,
    similar: Vec<RowView>,
    typed: Option<String>,
    typed_pattern: String,
    approve_label: String,
    digest: String,
    outcome: Option<String>,
    leases: Vec<Lease>,
    stuck: usize,
    entries: Vec<Entry>,
    entries_left_out: usize,
    reason_chars_max: usize,
}

impl<'a> View<'a> {
    fn new(review: &'a Review, notice: Option<&str>) -> Self {
        let (grant, identity, now) = (&review.grant, &review.identity, review.now);
        let mut room = Room::new(FACTS_BYTES);
        let sentence = emphasise(&room.text(&review.sentence, FACT), review);
        let facts = room.each(&review.permissions, 600, Facts::new);
        let holds = room.lines(&review.holds, LINE);
        let difference = review.difference.as_ref().map(|lines| room.lines(lines, FACT));
        // What can't be read whole can't be approved here: closed by default (guarantee 12).
        let may_vote = if room.was_cut() && review.may_vote.is_ok() {
            Err("This request is too long to be shown whole on one page, so it can't be approved here. \
                 Deny it, and ask for less at a time."
                .to_owned())
        } else {
            review.may_vote.clone().map_err(|why| visible_line(&why))
        };

        let mut room = Room::new(IDENTITY_BYTES);
        let name = room.text(&identity.name, LINE);
        let agent_id = room.text(&identity.id, FACT);
        let issuer = room.text(&identity.issuer, LINE);
        let attributes = room.each(&identity.attributes, 60, |(k, v), room| (room.text(k, LINE), room.text(v, LINE)));
        let chain = room.lines(&identity.chain, LINE);
        let identity_hints = identity_hints(review);

        let mut room = Room::new(WHY_BYTES);
        let reasons = room.lines(&review.reasons, LINE);
        let deciders = room.lines(&review.deciders, LINE);
        let votes = room.each(&review.votes, 200, |v, room| Vote::new(v, now, room));

        let mut room = Room::new(SIMILAR_BYTES);
        let similar = room.each(review.similar.iter().take(SIMILAR_MAX), 250, |r, room| row(r, now, room));

        let mut room = Room::new(RECORD_BYTES);
        let leases = room.each(&review.leases, 350, |l, room| Lease::new(l, now, room));
        let stuck = review.leases.iter().filter(|l| is_stuck(l)).count();
        // If not all of it fits, the proofs at its end matter most.
        let mut entries = room.each(review.timeline.iter().rev(), 230, |e, room| Entry::new(e, now, room));
        entries.reverse();

        let until =
            grant.ends_at.filter(|_| grant.state == "active").or(grant.decide_by.filter(|_| grant.state == "pending"));
        // The broker's own count, which no step of the wall clock moves (guarantee 10), where it gave one.
        let left = grant.secs_left.unwrap_or_else(|| until.map_or(0, |at| at.ms_since(now) / 1000));
        let typed = typed_target(review).map(visible_line);
        Self {
            notice: notice.map(visible_line),
            id: grant.id.to_string(),
            version: grant.version,
            state_word: &grant.state,
            state: look::state(&grant.state, stuck > 0, review.leases.iter().any(|l| l.attested.is_some())),
            tier: look::tier(review.tier.as_ref()),
            tiered: review.tier.is_some(),
            critical: review.tier.as_ref().is_some_and(|t| t.friction == Friction::Critical),
            asked: review.timeline.first().map(|e| moment(e.at, now)),
            until: until.map(|at| moment(at, now)),
            until_ms: now.plus_secs(left).0,
            now_ms: now.0,
            left: span(left),
            approvals: grant.approvals,
            needed: grant.approvals_needed,
            sentence,
            facts_more: review.permissions.len() - facts.len(),
            facts,
            holds,
            difference,
            name,
            agent_id,
            agent_raw: if identity.id.len() > AGENT_ID_BYTES_MAX { "" } else { &identity.id },
            issuer,
            method: look::method(&identity.method),
            owner: identity.owner.as_deref().map(visible_line),
            team: identity.team.as_deref().map(visible_line),
            attributes_more: identity.attributes.len() - attributes.len(),
            attributes,
            chain,
            parent: grant.parent.map(|id| id.to_string()),
            first_seen: identity.first_seen.map(|at| moment(at, now)),
            identity_hints,
            task: visible_line(identity.task.as_str()),
            words: Words::new(&review.intent),
            reasons,
            deciders,
            votes,
            may_vote,
            may_revoke: review.may_revoke,
            similar,
            typed_pattern: typed.as_deref().unwrap_or_default().replace('.', "\\."),
            typed,
            approve_label: approve_label(review),
            digest: review.digest.map(|d| d.to_string()).unwrap_or_default(),
            outcome: outcome(review),
            leases,
            stuck,
            entries_left_out: review.timeline.len() - entries.len(),
            entries,
            reason_chars_max: REASON_CHARS_MAX,
        }
    }

    /// Can a decision still be made here, by this viewer?
    fn votable(&self) -> bool {
        self.may_vote.is_ok() && !self.digest.is_empty()
    }
}

/// Hints about who asks, from the raw texts: made visible, nothing would be hidden any more.
fn identity_hints(review: &Review) -> Vec<String> {
    let identity = &review.identity;
    let texts = [&identity.name, &identity.id].into_iter().chain(identity.attributes.values());
    let heads = texts.map(|t| t.chars().take(FACT.chars_max).collect::<String>());
    hints(&heads.take(HINTED_FIELDS_MAX).collect::<Vec<_>>().join(" "))
}

fn is_stuck(lease: &LeaseView) -> bool {
    lease.state == "unknown" || (lease.state == "revoking" && lease.attempts > 0)
}

/// Verb, object and time: `Approve write for 15 min`.
fn approve_label(review: &Review) -> String {
    let object = match review.grant.authorization_details.as_slice() {
        [one] => {
            let actions = one.get("actions").and_then(serde_json::Value::as_array);
            let names: Vec<_> = actions.into_iter().flatten().filter_map(serde_json::Value::as_str).collect();
            match names.as_slice() {
                [] => "this".to_owned(),
                names if names.len() <= 3 => visible_line(&names.join(" + ")),
                names => format!("{} actions", names.len()),
            }
        }
        many => format!("{} permissions", many.len()),
    };
    match review.grant.life_secs {
        Some(secs) => format!("Approve {object} for {}", exact(secs)),
        None => format!("Approve {object}"),
    }
}

/// One line on how it came to its end, for what is over.
fn outcome(review: &Review) -> Option<String> {
    let grant = &review.grant;
    if let Some(cause) = &grant.cause {
        return Some(format!("Over because {}.", look::cause(cause).trim_end_matches('.')));
    }
    let reason = visible_line(grant.reason.as_deref()?);
    Some(match &grant.rule {
        Some(rule) => format!("Policy said no (rule {}): {reason}", visible_line(rule)),
        None => format!("Denied: {reason}"),
    })
}

/// Cuts the sentence into pieces; the broker's own facts in it stand out. Only the look depends on this.
fn emphasise(sentence: &str, review: &Review) -> Vec<(String, bool)> {
    let life = review.grant.life_secs.map(exact);
    let mut facts: Vec<String> =
        review.permissions.iter().flat_map(|p| [p.title.clone(), p.environment.clone()]).collect();
    facts.extend(review.permissions.iter().flat_map(|p| p.can.iter().cloned()));
    facts.extend(life);
    facts.extend(review.identity.owner.clone());
    facts.push(review.identity.name.clone());
    facts.retain(|f| f.len() > 1);
    facts.sort_by_key(|f| std::cmp::Reverse(f.len()));
    let mut pieces = Vec::new();
    let mut rest = sentence;
    while let Some((at, len)) =
        facts.iter().filter_map(|f| Some((whole_word(rest, f)?, f.len()))).min_by_key(|(at, _)| *at)
    {
        if pieces.len() > 40 {
            break;
        }
        pieces.push((rest[..at].to_owned(), false));
        pieces.push((rest[at..at + len].to_owned(), true));
        rest = &rest[at + len..];
    }
    pieces.push((rest.to_owned(), false));
    pieces.retain(|(text, _)| !text.is_empty());
    pieces
}

/// Where `word` stands in `text` with nothing word-like around it.
fn whole_word(text: &str, word: &str) -> Option<usize> {
    let inner = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
    text.match_indices(word)
        .map(|(at, _)| at)
        .find(|at| !text[..*at].ends_with(inner) && !text[at + word.len()..].starts_with(inner))
}
