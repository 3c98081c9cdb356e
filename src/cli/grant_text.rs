//! Grants and leases in text, the same for their agent and for reviewers. What came from outside is made safe here.

use crate::wire::agent::{GrantView, LeaseView};
use crate::wire::times::span;
use crate::wire::words::{attestation_in_words, cause_in_words, evidence_in_words, rfc3339};

use super::term::{Look, facts, safe};

/// What its agent wants to know of a grant.
pub fn grant(look: Look, view: &GrantView) -> String {
    let mut rows: Vec<(&str, Vec<String>)> = vec![("grant", vec![view.id.to_string()])];
    rows.push(("state", vec![look.state(&safe(&view.state))]));
    rows.push(("task", vec![safe(view.task.as_str())]));
    rows.extend(view.sentence.as_ref().map(|s| ("what", vec![safe(s)])));
    if let Some(tier) = &view.tier {
        rows.push(("tier", vec![format!("{}, {}", safe(tier), approvals(view.approvals, view.approvals_needed))]));
    }
    if view.state == "pending" {
        rows.push(("decide at", vec![safe(&view.review_url)]));
    }
    let left = view.secs_left.map(|s| format!(" ({} left)", span(s))).unwrap_or_default();
    rows.extend(view.decide_by.map(|at| ("decided by", vec![format!("{}{left}", rfc3339(at))])));
    rows.extend(view.ends_at.map(|at| ("ends at", vec![format!("{}{left}", rfc3339(at))])));
    rows.extend(view.reason.as_ref().map(|r| ("denied", vec![safe(r)])));
    rows.extend(view.rule.as_ref().map(|r| ("by rule", vec![safe(r)])));
    rows.extend(view.cause.as_ref().map(|c| ("over", vec![safe(&cause_in_words(c))])));
    format!("{}{}", facts(look, &rows), leases(look, &view.leases))
}

/// `automatic`, or `1 of 2 approvals`.
pub fn approvals(given: u8, needed: u8) -> String {
    match needed {
        0 => "automatic".to_owned(),
        1 => format!("{given} of 1 approval"),
        n => format!("{given} of {n} approvals"),
    }
}

/// Credentials with where they are in their life, and the proof of their end.
pub fn leases(look: Look, leases: &[LeaseView]) -> String {
    let mut out = String::new();
    for lease in leases {
        let at = lease.at.map(|at| format!(" since {}", rfc3339(at))).unwrap_or_default();
        let state = look.state(&safe(&lease.state));
        out.push_str(&format!("\n{}  {state}{at}\n", look.bold(&format!("credential for {}", safe(&lease.resource)))));
        let mut rows = vec![("  named", vec![format!("{} ({})", safe(&lease.name), lease.lease)])];
        rows.extend(lease.evidence.as_ref().map(|e| ("  proof", vec![safe(&evidence_in_words(e))])));
        let attested = lease.attested.as_ref().map(|a| safe(&attestation_in_words(&a.by, &a.reason)));
        rows.extend(attested.map(|a| ("  attested", vec![a])));
        if lease.attempts > 0 {
            let next = match (&lease.away, lease.next_try) {
                (Some(_), _) => "; next try as soon as its target serves, which is looked at every second".to_owned(),
                (None, Some(at)) => format!("; next try {}", rfc3339(at)),
                (None, None) => String::new(),
            };
            rows.push(("  tried", vec![format!("{} times without success{next}", lease.attempts)]));
        }
        rows.extend(lease.last_error.as_ref().map(|e| ("  because", vec![safe(e)])));
        rows.extend(lease.away.as_ref().map(|e| ("  target away", vec![safe(e)])));
        let seen = lease.seen.iter().map(|s| {
            let more = s.detail.as_ref().map(|d| format!(" ({d})")).unwrap_or_default();
            safe(&format!("{}: {}{more}", s.what, s.count))
        });
        rows.push(("  seen at the target", seen.collect()));
        out.push_str(&facts(look, &rows));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::id::{GrantId, LeaseId, TaskName, Timestamp};
    use crate::core::lease::Evidence;

    fn view() -> GrantView {
        GrantView {
            id: GrantId::from_bytes([1; 16]),
            state: "ended".to_owned(),
            version: 9,
            task: TaskName::new("INC-42").unwrap(),
            parent: None,
            authorization_details: Vec::new(),
            tier: Some("change".to_owned()),
            approvals: 1,
            approvals_needed: 1,
            decide_by: None,
            life_secs: Some(900),
            ends_at: None,
            secs_left: None,
            review_url: "https://r.example/grants/x".to_owned(),
            cause: Some(crate::core::event::EndCause::Completed),
            reason: None,
            rule: None,
            sentence: Some("demo wants to read".to_owned()),
            leases: vec![LeaseView {
                lease: LeaseId::from_bytes([2; 16]),
                resource: "postgres/billing".to_owned(),
                state: "revoked".to_owned(),
                name: "cs_x".to_owned(),
                evidence: Some(Evidence::TargetSaysGone { detail: "no role with OID 7\u{1b}[2J".to_owned() }),
                attested: None,
                at: Some(Timestamp(1_700_000_000_000)),
                attempts: 0,
                last_error: None,
                next_try: None,
                away: None,
                seen: Vec::new(),
            }],
        }
    }

    #[test]
    fn an_ended_grant_shows_its_evidence_and_nothing_commands_the_terminal() {
        let text = grant(Look::PLAIN, &view());
        for part in [
            "gr_",
            "ended",
            "INC-42",
            "1 of 1 approval",
            "over",
            "the agent said that it is done",
            "no role with OID 7",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(text.contains("<U+001B>[2J") && !text.contains('\u{1b}'), "{text:?}");
        assert!(!text.contains("decide at"), "a link is shown while somebody can decide: {text}");
    }

    #[test]
    fn what_fails_to_end_says_so() {
        let mut view = view();
        let lease = &mut view.leases[0];
        (lease.state, lease.evidence) = ("revoking".to_owned(), None);
        (lease.attempts, lease.last_error) = (3, Some("connection refused".to_owned()));
        let text = leases(Look::PLAIN, &view.leases);
        assert!(text.contains("3 times without success") && text.contains("connection refused"), "{text}");
        assert!(!text.contains("proof"), "{text}");
    }

    #[test]
    fn approvals_are_told() {
        assert_eq!(
            [approvals(0, 0), approvals(0, 1), approvals(1, 2)],
            ["automatic", "0 of 1 approval", "1 of 2 approvals"]
        );
    }
}
