//! The inbox, and everything about one grant on one screen. What came from outside is made safe here (regression P8).

use crate::core::vote::Verdict;
use crate::wire::reviewer::{FreezeView, PermissionFacts, Queue, Review, Row};
use crate::wire::times::{at_most, exact, moment, span};
use crate::wire::visible::hints;
use crate::wire::words::selector_in_words;

use super::grant_text::{approvals, leases};
use super::term::{Cell, Look, facts, quoted, safe, table};

/// Residual windows from here on have no bound that a person can picture.
const UNBOUNDED_SECS: u64 = 1 << 40;

/// The queue.
pub fn inbox(look: Look, queue: &Queue) -> String {
    let mut out = String::new();
    for freeze in &queue.freezes {
        out.push_str(&look.wrap(&look.bad(&frozen(freeze)), 0));
        out.push('\n');
    }
    if !queue.freezes.is_empty() {
        out.push('\n');
    }
    let parts = [
        ("For you to decide", &queue.mine),
        ("Waiting for others", &queue.others),
        ("In force, or ending", &queue.live),
        ("Decided", &queue.decided),
    ];
    for (title, rows) in parts.into_iter().filter(|(_, rows)| !rows.is_empty()) {
        out.push_str(&format!("{}\n", look.bold(title)));
        let rows: Vec<Vec<Cell>> = rows.iter().map(|row| cells(look, row)).collect();
        out.push_str(&table(look, &["GRANT", "STATE", "TIER", "APPROVALS", "LEFT", "WHAT"], &rows));
        out.push('\n');
    }
    if out.is_empty() {
        return "nothing waits, and nothing is in force\n".to_owned();
    }
    out.push_str(&look.dim("Everything about one: countersign show GRANT"));
    out.push('\n');
    out
}

fn frozen(freeze: &FreezeView) -> String {
    let (selector, by, reason) = (safe(&selector_in_words(&freeze.selector)), safe(&freeze.by), safe(&freeze.reason));
    format!("FROZEN: {selector}, by {by}: “{reason}”. Lift it with: countersign freeze --lift {}", freeze.id)
}

fn cells(look: Look, row: &Row) -> Vec<Cell> {
    let state = safe(&row.state);
    let needed = row.tier.as_ref().map_or(0, |t| t.approvals);
    let left = if row.secs_left > 0 { span(row.secs_left) } else { "–".to_owned() };
    let mut what = safe(&row.sentence);
    if row.stuck > 0 {
        what = format!("{what} [{} not ended yet in spite of trying]", row.stuck);
    }
    vec![
        row.id.to_string().into(),
        Cell::shown(&state, look.state(&state)),
        row.tier.as_ref().map_or_else(|| "–".to_owned(), |t| safe(t.name.as_str())).into(),
        format!("{}/{needed}", row.approvals).into(),
        left.into(),
        what.into(),
    ]
}

/// The top half: what a decision is about.
pub fn decision(look: Look, review: &Review) -> String {
    let grant = &review.grant;
    let mut head = vec![look.bold(&grant.id.to_string()), look.state(&safe(&grant.state))];
    if let Some(tier) = &review.tier {
        let votes = approvals(grant.approvals, tier.approvals);
        head.push(format!(
            "tier {}, {votes}, at most {}",
            safe(tier.name.as_str()),
            exact(grant.life_secs.unwrap_or(0))
        ));
    }
    head.extend(grant.secs_left.map(|s| format!("{} left", span(s))));
    let mut out = format!("{}\n\n  {}\n\n", head.join(" · "), look.bold(&look.wrap(&safe(&review.sentence), 2)));
    for permission in &review.permissions {
        out.push_str(&permission_text(look, permission));
        out.push('\n');
    }
    let all = |lines: &[String]| lines.iter().map(|l| safe(l)).collect::<Vec<_>>();
    let mut rows = vec![("why this tier", all(&review.reasons)), ("has already", all(&review.holds))];
    match &review.difference {
        None => rows.push(("last time", vec!["this agent never had anything approved".to_owned()])),
        Some(same) if same.is_empty() => rows.push(("last time", vec!["the same was approved".to_owned()])),
        Some(lines) => rows.push(("unlike last time", all(lines))),
    }
    if let Err(why) = &review.may_vote
        && grant.state == "pending"
    {
        rows.push(("you can't vote", vec![look.warn(&safe(why))]));
    }
    if !review.deciders.is_empty() {
        rows.push(("others who can", vec![all(&review.deciders).join(", ")]));
    }
    out.push_str(&facts(look, &rows));
    out.push('\n');
    out.push_str(&who(look, review));
    out.push_str(&format!(
        "\n{}\n{}\n",
        look.dim("In the agent's own words (nobody has checked them):"),
        quoted(&review.intent)
    ));
    for hint in hints(&review.intent) {
        out.push_str(&format!("{}\n", look.warn(&hint)));
    }
    out
}

fn permission_text(look: Look, p: &PermissionFacts) -> String {
    let all = |lines: &[String]| lines.iter().map(|l| safe(l)).collect::<Vec<_>>();
    let mut ending = safe(&p.ending);
    let residual = match p.residual_secs {
        0 => "a stolen copy is dead with it".to_owned(),
        s if s >= UNBOUNDED_SECS => look.bad("nothing bounds how long a stolen copy works"),
        s => look.warn(&format!("a stolen copy works {} longer at most", at_most(s))),
    };
    if ending.is_empty() {
        "not said".clone_into(&mut ending);
    }
    facts(
        look,
        &[
            ("on", vec![safe(&format!("{} ({}), in {}", p.title, p.resource, p.environment))]),
            ("can", all(&p.can)),
            ("can't", all(&p.cannot)),
            ("irreversible", all(&p.irreversible).iter().map(|l| look.bad(l)).collect()),
            ("when it ends", vec![ending, residual]),
        ],
    )
}

fn who(look: Look, review: &Review) -> String {
    let i = &review.identity;
    let owner = i.owner.as_ref().map_or_else(|| look.warn("nobody answers for it"), |o| safe(o));
    let team = i.team.as_ref().map(|t| format!(" (team {})", safe(t))).unwrap_or_default();
    let attributes = i.attributes.iter().map(|(k, v)| safe(&format!("{k} = {v}"))).collect();
    let mut rows = vec![
        ("agent", vec![safe(&i.name), safe(&i.id)]),
        ("proved by", vec![safe(&format!("{}, {}", i.method, i.issuer))]),
        ("claims", attributes),
        ("owner", vec![format!("{owner}{team}")]),
        ("task", vec![safe(i.task.as_str())]),
    ];
    if !i.chain.is_empty() {
        rows.push(("handed on by", i.chain.iter().map(|c| safe(c)).collect()));
    }
    if let Some(at) = i.first_seen {
        let m = moment(at, review.now);
        rows.push(("first seen", vec![format!("{} ({})", m.utc, m.relative)]));
    }
    facts(look, &rows)
}

/// The whole story.
pub fn story(look: Look, review: &Review) -> String {
    let mut out = decision(look, review);
    if !review.votes.is_empty() {
        out.push_str(&format!("\n{}\n", look.bold("Votes")));
    }
    for vote in &review.votes {
        let verdict = if vote.verdict == Verdict::Approve { look.good("approved") } else { look.bad("denied") };
        let reason = vote.reason.as_ref().map(|r| format!(": “{}”", safe(r))).unwrap_or_default();
        let m = moment(vote.at, review.now);
        out.push_str(&format!("  {} {verdict} ({}), {}{reason}\n", safe(&vote.person), safe(&vote.via), m.utc));
    }
    out.push_str(&leases(look, &review.leases));
    if !review.timeline.is_empty() {
        out.push_str(&format!("\n{}\n", look.bold("What happened")));
        let rows: Vec<Vec<Cell>> = review
            .timeline
            .iter()
            .map(|e| {
                let detail = e.detail.as_ref().map(|d| format!("\n{}", safe(d))).unwrap_or_default();
                let source = source_in_words(&e.source);
                vec![
                    e.seq.to_string().into(),
                    moment(e.at, review.now).utc.into(),
                    Cell::shown(source, look.dim(source)),
                    format!("{}{detail}", safe(&e.says)).into(),
                ]
            })
            .collect();
        out.push_str(&table(look, &["#", "WHEN", "SOURCE", "WHAT"], &rows));
    }
    if !review.similar.is_empty() {
        out.push_str(&format!("\n{}\n", look.bold("Asked before by this agent")));
        let rows: Vec<Vec<Cell>> = review.similar.iter().map(|row| cells(look, row)).collect();
        out.push_str(&table(look, &["GRANT", "STATE", "TIER", "APPROVALS", "LEFT", "WHAT"], &rows));
    }
    if let Some(digest) = &review.digest {
        out.push_str(&format!("\n{}\n", look.dim(&format!("digest {digest}"))));
    }
    out
}

/// Whose word it is.
pub const fn source_in_words(source: &str) -> &'static str {
    match source.as_bytes() {
        b"agent" => "reported by the agent",
        b"target" => "seen at the target",
        b"person" => "a person",
        _ => "the broker",
    }
}
