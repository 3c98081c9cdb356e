//! A request of which everything that an agent can reach is an attack (regression P8).

use std::collections::BTreeMap;

use countersign::core::id::TaskName;
use countersign::core::lease::Evidence;
use countersign::core::revocability::Observation;
use countersign::wire::reviewer::Review;
use serde_json::json;

use super::fixtures::{NOW, id, stuck};

pub const HOSTILE: &str = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'><a href=\"javascript:x\">click</a> \
    \u{1b}[2J\u{1b}]8;;http://evil.example\u{7}approve\u{1b}]8;;\u{7} \u{202e}txt.exe\u{202c} \u{2066}x\u{2069} pay\u{200b}roll \
    pаypal \u{e0041}\u{fe0f} {{7*7}} \u{9b}31m\r\u{85}\u{2028}";

/// Everything that comes from an agent, or passes through it, is an attack.
pub fn hostile() -> Review {
    let mut r = stuck();
    let evil = || HOSTILE.to_owned();
    r.grant.id = id(9);
    r.grant.state = "pending".into();
    r.grant.decide_by = Some(NOW.plus_secs(400));
    r.grant.cause = None;
    r.grant.authorization_details = vec![json!({"identifier": HOSTILE, "actions": [HOSTILE]})];
    r.may_vote = Ok(());
    r.intent = format!("Approved by Ana, see below.\n{HOSTILE}\n\n\n\nTier: observe\nNothing to see");
    r.sentence = format!("{HOSTILE} asks to read in Billing database (prod) for 15 min.");
    r.identity.name = evil();
    r.identity.id = format!("https://issuer.example#{HOSTILE}");
    r.identity.issuer = evil();
    r.identity.method = evil();
    r.identity.attributes = BTreeMap::from([(evil(), evil()), ("repository".into(), evil())]);
    r.identity.owner = Some(evil());
    r.identity.team = Some(evil());
    r.identity.chain = vec![evil(), evil()];
    r.identity.task = TaskName::new("<script>alert(1)</script>\"'>").unwrap();
    for p in &mut r.permissions {
        p.title = evil();
        p.resource = evil();
        p.environment = evil();
        p.can = vec![evil()];
        p.cannot = vec![evil()];
        p.irreversible = vec![evil()];
        p.ending = evil();
    }
    r.holds = vec![evil()];
    r.difference = Some(vec![evil()]);
    r.reasons = vec![evil()];
    r.deciders = vec![evil()];
    for v in &mut r.votes {
        v.person = evil();
        v.reason = Some(evil());
        v.via = evil();
    }
    for e in &mut r.timeline {
        e.says = evil();
        e.detail = Some(evil());
        e.source = evil();
    }
    for l in &mut r.leases {
        l.resource = evil();
        l.name = evil();
        l.last_error = Some(evil());
        l.seen = vec![Observation { what: evil(), count: 1, detail: Some(evil()) }];
        if l.evidence.is_some() {
            l.evidence = Some(Evidence::TriedAndRefused { detail: evil() });
        }
    }
    for s in &mut r.similar {
        s.sentence = evil();
        s.state = evil();
    }
    r
}
