//! The queue: mine, waiting on others, in force, decided, and the freezes that hold.

use askama::Template;

use crate::core::id::Timestamp;
use crate::wire::reviewer::{FreezeView, Queue, Row};

use super::fit::Room;
use super::format::{Moment, moment, span};
use super::look::{self, Look};
use super::visible::{LINE, visible_line};
use super::{Chrome, page};

/// Room for one list, in bytes. What doesn't fit is counted; it moves up as others are decided.
const LIST_BYTES: usize = 12_000;
const ROW_BYTES: usize = 560;
const FREEZES_MAX: usize = 10;

/// The queue's page.
pub fn queue(queue: &Queue, chrome: &Chrome) -> String {
    let list = |rows: &[Row]| List::new(rows, chrome.now);
    page(&QueuePage {
        chrome,
        mine: list(&queue.mine),
        others: list(&queue.others),
        live: list(&queue.live),
        decided: list(&queue.decided),
        freezes: freezes(&queue.freezes, chrome.now),
    })
}

#[derive(Template)]
#[template(path = "queue.html")]
struct QueuePage<'a> {
    chrome: &'a Chrome,
    mine: List,
    others: List,
    live: List,
    decided: List,
    freezes: Vec<Frozen>,
}

impl QueuePage<'_> {
    fn stuck(&self) -> usize {
        self.live.rows.iter().filter(|r| r.stuck > 0).count()
    }
}

struct List {
    rows: Vec<RowView>,
    more: usize,
    total: usize,
}

impl List {
    fn new(rows: &[Row], now: Timestamp) -> Self {
        let mut room = Room::new(LIST_BYTES);
        let shown = room.each(rows, ROW_BYTES, |r, room| row(r, now, room));
        Self { more: rows.len() - shown.len(), rows: shown, total: rows.len() }
    }
}

/// One row.
pub(super) struct RowView {
    pub(super) id: String,
    pub(super) sentence: String,
    pub(super) tier: Look,
    pub(super) tiered: bool,
    pub(super) state: Look,
    pub(super) pending: bool,
    pub(super) live: bool,
    pub(super) approvals: u8,
    pub(super) needed: u8,
    pub(super) asked: Moment,
    pub(super) until: Option<Moment>,
    pub(super) until_ms: u64,
    pub(super) now_ms: u64,
    pub(super) left: String,
    pub(super) stuck: u32,
}

pub(super) fn row(r: &Row, now: Timestamp, room: &mut Room) -> RowView {
    RowView {
        id: r.id.to_string(),
        sentence: room.text(&r.sentence, LINE),
        tier: look::tier(r.tier.as_ref()),
        tiered: r.tier.is_some(),
        state: look::state(&r.state, r.stuck > 0, r.attested > 0),
        pending: r.state == "pending",
        live: r.state == "active",
        approvals: r.approvals,
        needed: r.tier.as_ref().map_or(0, |t| t.approvals),
        asked: moment(r.requested_at, now),
        until: r.until.map(|at| moment(at, now)),
        until_ms: now.plus_secs(r.secs_left).0,
        now_ms: now.0,
        left: span(r.secs_left),
        stuck: r.stuck,
    }
}

/// One freeze that holds.
pub(super) struct Frozen {
    pub(super) id: u64,
    pub(super) covers: String,
    pub(super) by: String,
    pub(super) reason: String,
    pub(super) at: Moment,
}

pub(super) fn freezes(freezes: &[FreezeView], now: Timestamp) -> Vec<Frozen> {
    let tell = |f: &FreezeView| Frozen {
        id: f.id,
        covers: look::selector(&f.selector),
        by: visible_line(&f.by),
        reason: visible_line(&f.reason),
        at: moment(f.at, now),
    };
    freezes.iter().rev().take(FREEZES_MAX).map(tell).collect()
}
