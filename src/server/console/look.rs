//! How tiers, states, causes and proofs look and read. Word, icon and colour always together, so that
//! nothing rests on colour alone.

use askama::filters::Safe;

use crate::core::event::{EndCause, Selector};
use crate::core::id::Timestamp;
use crate::core::lease::Evidence;
use crate::core::tier::{Friction, Tier};

use super::format::moment;
use super::visible::visible_line;

/// One look.
#[derive(Debug)]
pub(super) struct Look {
    pub(super) word: String,
    pub(super) says: String,
    /// CSS class: the colours.
    pub(super) class: &'static str,
    pub(super) icon: &'static str,
}

impl Look {
    pub(super) fn svg(&self) -> Safe<&'static str> {
        svg(self.icon)
    }
}

/// The drawing of that name. Decorative: the word stands beside it. The only text that isn't escaped.
pub(super) fn svg(name: &'static str) -> Safe<&'static str> {
    macro_rules! draw {
        ($d:literal) => {
            concat!(
                "<svg class=\"i\" viewBox=\"0 0 20 20\" width=\"18\" height=\"18\" fill=\"none\" stroke=\"currentColor\" ",
                "stroke-width=\"1.8\" stroke-linecap=\"round\" stroke-linejoin=\"round\" aria-hidden=\"true\"><path d=\"",
                $d,
                "\"/></svg>"
            )
        };
    }
    Safe(match name {
        "eye" => draw!(
            "M2 10s3-5.5 8-5.5S18 10 18 10s-3 5.5-8 5.5S2 10 2 10zM10 7.7a2.3 2.3 0 1 0 0 4.6 2.3 2.3 0 0 0 0-4.6z"
        ),
        "out" => draw!("M8 4H4v12h12v-4M11 3h6v6M17 3l-8 8"),
        "pen" => draw!("M3 17l1-4L14 3l3 3L7 16zM12 5l3 3"),
        "stop" => draw!("M6.5 2h7L18 6.5v7L13.5 18h-7L2 13.5v-7zM10 6v5M10 14v.1"),
        "clock" => draw!("M10 2.5a7.5 7.5 0 1 0 0 15 7.5 7.5 0 0 0 0-15zM10 6v4.2l2.6 1.6"),
        "dot" => {
            draw!("M10 2.5a7.5 7.5 0 1 0 0 15 7.5 7.5 0 0 0 0-15zM10 8.8a1.2 1.2 0 1 0 0 2.4 1.2 1.2 0 0 0 0-2.4z")
        }
        "alert" => draw!("M10 2.5L18.5 17h-17zM10 8v4M10 14.5v.1"),
        "check" => draw!("M3.5 10.5l4.5 4.5L16.5 5.5"),
        "shield" => draw!("M10 2l6.5 2.5V9c0 4.5-2.8 7.5-6.5 9-3.7-1.5-6.5-4.5-6.5-9V4.5zM7 9.8l2.2 2.2L13.2 8"),
        "quote" => draw!("M3 4h14v9.5H9L5.5 17v-3.5H3zM6.5 7.5h7M6.5 10h4.5"),
        "snow" => draw!("M10 2v16M3.1 6l13.8 8M3.1 14l13.8-8M8 3.5l2 2 2-2M8 16.5l2-2 2 2"),
        "lock" => draw!("M4.5 9h11v8h-11zM7 9V6a3 3 0 0 1 6 0v3"),
        _ => draw!("M5 5l10 10M15 5L5 15"),
    })
}

pub(super) fn tier(tier: Option<&Tier>) -> Look {
    let Some(tier) = tier else {
        return Look { word: "refused".into(), says: "by policy".into(), class: "t-none", icon: "cross" };
    };
    let persons = match tier.approvals {
        0 => "automatic".to_owned(),
        1 => "one person".to_owned(),
        2 => "two persons".to_owned(),
        n => format!("{n} persons"),
    };
    let (says, class, icon) = match tier.friction {
        Friction::None => (persons, "t-none", "eye"),
        Friction::One => (persons, "t-one", "out"),
        Friction::High => (format!("{persons}, deliberately"), "t-high", "pen"),
        Friction::Critical => (format!("{persons}, target typed"), "t-critical", "stop"),
    };
    Look { word: tier.name.to_string(), says, class, icon }
}

/// A grant's state. `stuck`: an ending failed at least once. `attested`: a person's word stands in place of a proof.
pub(super) fn state(word: &str, stuck: bool, attested: bool) -> Look {
    let (word, says, class, icon) = match word {
        "pending" | "requested" => ("pending", "Waiting for a decision", "s-wait", "clock"),
        "active" => ("in force", "In force", "s-on", "dot"),
        "ending" if stuck => ("stuck", "Over for the agent, but not proven gone", "s-stuck", "alert"),
        "ending" => ("revoking", "Over for the agent; proof of the end is awaited", "s-ending", "clock"),
        "ended" if attested => ("attested", "Ended; not every credential is proven gone", "s-stuck", "quote"),
        "ended" => ("ended", "Ended, every credential is proven gone", "s-over", "check"),
        "denied" => ("denied", "Denied", "s-no", "cross"),
        "lapsed" => ("lapsed", "Lapsed: nobody decided in time", "s-over", "clock"),
        "cancelled" => ("cancelled", "Cancelled: the agent took it back", "s-over", "cross"),
        "withdrawn" => ("withdrawn", "Withdrawn before it was in force", "s-over", "cross"),
        other => return Look { word: visible_line(other), says: visible_line(other), class: "s-over", icon: "dot" },
    };
    Look { word: word.into(), says: says.into(), class, icon }
}

/// `attested`: a person's word stands in place of a proof.
pub(super) fn lease(state: &str, attempts: u32, attested: bool) -> Look {
    let (word, says, class, icon) = match state {
        "intended" => ("being made", "Recorded; the target may not have been reached yet", "s-wait", "clock"),
        "live" => ("live", "It works at its target", "s-on", "dot"),
        "unknown" => {
            ("unknown", "No clear answer came from the target: looked for until it is known", "s-stuck", "alert")
        }
        "revoking" if attempts > 0 => (
            "stuck",
            "Not proven gone: take it as still working. It is tried again until there is proof",
            "s-stuck",
            "alert",
        ),
        "revoking" => ("revoking", "Being ended; proof is awaited", "s-ending", "clock"),
        "revoked" => ("gone", "Proven gone", "s-over", "check"),
        "absent" if attested => ("attested", "Not proven gone", "s-stuck", "quote"),
        "absent" => ("never was", "Nothing of it is at the target", "s-over", "check"),
        other => return Look { word: visible_line(other), says: String::new(), class: "s-over", icon: "dot" },
    };
    Look { word: word.into(), says: says.into(), class, icon }
}

/// Why a grant is over, as the end of "It is over because …".
pub(super) fn cause(cause: &EndCause) -> String {
    match cause {
        EndCause::Completed => "the agent said that it is done".into(),
        EndCause::TaskCompleted => "its task was completed".into(),
        EndCause::Expired => "its time was up".into(),
        EndCause::Revoked { by, reason } if reason.trim().is_empty() => format!("{by} revoked it"),
        EndCause::Revoked { by, reason } => format!("{by} revoked it: {}", visible_line(reason)),
        EndCause::AgentLost => "the agent's signs of life stopped".into(),
        EndCause::ParentEnded => "the grant that it hangs from is over".into(),
        EndCause::Frozen { id } => format!("freeze {id} covers it"),
        EndCause::TierRisen { reason } => {
            format!("policy, asked again when the credential was to be made, wants more: {}", visible_line(reason))
        }
        EndCause::ApprovedThingChanged { resource } => format!("{resource} changed after it was approved"),
        EndCause::ClockSetBack => {
            "the clock was set back while the broker was down: the time left can't be known".into()
        }
        EndCause::Restored => "the record was restored from a backup: what happened since can't be known".into(),
    }
}

/// A proof in words, and whose word it is.
pub(super) fn evidence(evidence: &Evidence, now: Timestamp) -> (String, &'static str) {
    match evidence {
        Evidence::TargetSaysGone { detail } => {
            (format!("The target, asked for it, says that it is gone: {}", visible_line(detail)), "target")
        }
        Evidence::TriedAndRefused { detail } => {
            (format!("It was tried and refused: {}", visible_line(detail)), "target")
        }
        Evidence::Expired { not_after, skew_secs } => {
            let at = moment(*not_after, now);
            let text = format!("It expired by itself at {}; {skew_secs} s were allowed for the target's clock", at.utc);
            (text, "broker")
        }
    }
}

/// Whose word a line of the record is: what to show, and a class.
pub(super) fn source(source: &str) -> (&'static str, &'static str) {
    match source {
        "broker" => ("by the broker", "by-broker"),
        "agent" => ("reported by the agent", "by-agent"),
        "target" => ("seen at the target", "by-target"),
        "person" => ("by a person", "by-person"),
        _ => ("source unknown", "by-agent"),
    }
}

/// What a freeze covers, in words.
pub(super) fn selector(selector: &Selector) -> String {
    match selector {
        Selector::All => "everything".into(),
        Selector::Agent(id) => format!("agent {}", visible_line(id.as_str())),
        Selector::Owner(person) => format!("all agents of {person}"),
        Selector::Resource(name) => format!("resource {name}"),
        Selector::Task(key) => format!("task {} of {}", key.task, visible_line(key.agent.as_str())),
        Selector::TaskName(task) => format!("every task named {task}"),
        Selector::Target(name) => format!("target {name}"),
    }
}

/// How an agent proved itself.
pub(super) fn method(method: &str) -> String {
    match method {
        "x509-svid" => "X.509-SVID over mutual TLS".into(),
        "jwt-svid" => "JWT-SVID".into(),
        "oidc" => "OIDC token".into(),
        other => visible_line(other),
    }
}
