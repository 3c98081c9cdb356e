//! One grant as the journal tells it: reason, request, rule, votes, credentials, what was done, end and evidence.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::core::event::{BrokerEvent, EndCause, Event, GrantEvent};
use crate::core::grant::Grant;
use crate::core::id::GrantId;
use crate::store::engine::Record;
use crate::wire::times::exact;
use crate::wire::words::{event, rfc3339};

use super::grant_text::approvals;
use super::review_text::source_in_words;
use super::term::{Cell, Look, facts, quoted, safe, table};

/// What the journal has of one grant.
#[derive(Default)]
pub struct Story {
    grant: Option<Grant>,
    /// Why the events don't follow on one another, if they don't.
    impossible: Option<String>,
    records: Vec<(u64, Record)>,
}

impl Story {
    /// Takes the next record of the journal, if it is about this grant. `freezes`: those seen so far.
    pub fn take(&mut self, id: GrantId, seq: u64, record: Record, freezes: &mut BTreeMap<u64, (u64, Record)>) {
        let about = match &record.event {
            Event::Grant { id: of, what, .. } if *of == id => {
                if let GrantEvent::Ending { cause: EndCause::Frozen { id } }
                | GrantEvent::Withdrawn { cause: EndCause::Frozen { id } } = &**what
                {
                    self.records.extend(freezes.remove(id));
                }
                if let Err(error) = Grant::apply(&mut self.grant, id, what, record.at) {
                    self.impossible.get_or_insert_with(|| format!("record {seq}: {error}"));
                }
                true
            }
            Event::TaskCompleted { task } => self.grant.as_ref().is_some_and(|g| {
                g.request.task == task.task && g.request.agent.id == task.agent && !g.state.is_final()
            }),
            Event::Broker { what: BrokerEvent::VoteRefused { grant, .. } | BrokerEvent::Replaced { grant } } => {
                *grant == id
            }
            Event::Frozen { id, .. } => {
                freezes.insert(*id, (seq, record));
                return;
            }
            _ => false,
        };
        if about {
            self.records.push((seq, record));
        }
    }

    /// True if there is nothing.
    pub fn is_empty(&self) -> bool {
        self.grant.is_none()
    }

    /// For scripts.
    pub fn json(&self) -> Value {
        let records: Vec<Value> =
            self.records.iter().map(|(seq, r)| json!({ "seq": seq, "at": r.at, "event": r.event })).collect();
        json!({ "grant": self.grant, "records": records })
    }

    /// For people.
    pub fn text(&self, look: Look) -> String {
        let mut out = String::new();
        if let Some(grant) = &self.grant {
            out.push_str(&head(look, grant));
        }
        if let Some(why) = &self.impossible {
            out.push_str(&format!(
                "\n{}\n",
                look.bad(&format!("these events can't follow on one another: {}", safe(why)))
            ));
        }
        let rows: Vec<Vec<Cell>> = self
            .records
            .iter()
            .map(|(seq, record)| {
                let told = event(&record.event, &|person| person.to_string());
                let detail = told.detail.map(|d| format!("\n{}", safe(&d))).unwrap_or_default();
                let source = source_in_words(told.source);
                vec![
                    seq.to_string().into(),
                    rfc3339(record.at).into(),
                    Cell::shown(source, look.dim(source)),
                    format!("{}{detail}", safe(&told.says)).into(),
                ]
            })
            .collect();
        out.push_str(&format!("\n{}", table(look, &["#", "WHEN", "SOURCE", "WHAT"], &rows)));
        out
    }
}

fn head(look: Look, grant: &Grant) -> String {
    let agent = &grant.request.agent;
    let owner = agent.owner.as_ref().map_or_else(|| "nobody answers for it".to_owned(), ToString::to_string);
    let mut rows = vec![
        ("grant", vec![format!("{}  {}", grant.id, look.state(grant.state.word()))]),
        (
            "agent",
            vec![safe(&format!("{} ({}, {})", agent.name, agent.id, agent.method)), safe(&format!("owner: {owner}"))],
        ),
        ("task", vec![safe(grant.request.task.as_str())]),
    ];
    rows.extend(grant.request.parent.map(|parent| ("hangs from", vec![parent.to_string()])));
    if let Some(assessed) = &grant.assessed {
        let a = &assessed.approvable;
        let given = u8::try_from(grant.approvers().len()).unwrap_or(u8::MAX);
        rows.push(("what", vec![look.bold(&safe(&a.sentence))]));
        rows.push((
            "tier",
            vec![format!(
                "{}, {}, {} at most",
                safe(a.tier.name.as_str()),
                approvals(given, a.tier.approvals),
                exact(a.life_secs)
            )],
        ));
        rows.push(("rules", assessed.reasons.iter().map(|r| safe(&format!("{} ({})", r.says, r.rule))).collect()));
        rows.push(("digest", vec![assessed.digest.to_string()]));
    }
    let words = look.dim("In the agent's own words (nobody has checked them):");
    format!("{}\n{words}\n{}\n", facts(look, &rows), quoted(&grant.request.intent))
}
