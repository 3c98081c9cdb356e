//! What the broker would tell of some grants: every tier and every state, honest and hostile.
//! Only data; the tests are in `console_pages.rs`.

use std::collections::BTreeMap;

use countersign::core::digest::Digest;
use countersign::core::event::{EndCause, Selector};
use countersign::core::id::{AgentId, GrantId, LeaseId, PersonId, TaskName, TierName, Timestamp};
use countersign::core::lease::Evidence;
use countersign::core::revocability::Observation;
use countersign::core::tier::{Friction, Tier};
use countersign::core::vote::Verdict;
use countersign::server::console::{Chrome, Mode};
use countersign::wire::agent::{Attested, GrantView, LeaseView};
use countersign::wire::reviewer::{
    FreezeView, IdentityFacts, PermissionFacts, Queue, Review, Row, TimelineEntry, Viewer, VoteView,
};
use serde_json::json;

/// 2026-11-22T14:06:40Z.
pub const NOW: Timestamp = Timestamp(1_795_356_400_000);

pub fn ago(secs: u64) -> Timestamp {
    Timestamp(NOW.0 - secs * 1000)
}

pub fn chrome() -> Chrome {
    let viewer = Viewer { person: "ana".into(), name: "Ana Ruiz".into(), groups: vec!["payments-leads".into()] };
    Chrome::new(Some(viewer), "csrf-token-of-this-session".into(), NOW, Mode::Serve)
}

pub fn tier(name: &str, approvals: u8, life_secs_max: u64, friction: Friction) -> Tier {
    Tier { name: TierName::new(name).unwrap(), approvals, life_secs_max, friction }
}
pub fn observe() -> Tier {
    tier("observe", 0, 3600, Friction::None)
}
pub fn export() -> Tier {
    tier("export", 1, 3600, Friction::One)
}
pub fn change() -> Tier {
    tier("change", 1, 900, Friction::High)
}
pub fn critical() -> Tier {
    tier("critical", 2, 600, Friction::Critical)
}

pub fn id(n: u8) -> GrantId {
    GrantId::from_bytes([n.wrapping_mul(37) ^ 0x5a; 16])
}

fn strings(lines: &[&str]) -> Vec<String> {
    lines.iter().map(|l| (*l).to_owned()).collect()
}

fn entry(seq: u64, secs_ago: u64, says: &str, detail: Option<&str>, source: &str) -> TimelineEntry {
    TimelineEntry { seq, at: ago(secs_ago), says: says.into(), detail: detail.map(Into::into), source: source.into() }
}

fn row(n: u8, state: &str, tier: Tier, sentence: &str) -> Row {
    Row {
        id: id(n),
        state: state.into(),
        sentence: sentence.into(),
        tier: Some(tier),
        approvals: 0,
        requested_at: ago(u64::from(n) * 97),
        until: Some(NOW.plus_secs(660)),
        secs_left: 660,
        stuck: 0,
        attested: 0,
        mine: false,
    }
}

/// A production write that waits for one person.
pub fn pending() -> Review {
    let sentence =
        "ci-migrator, for Ana Ruiz's team, asks to change rows of invoices in Billing database (prod) for 15 min.";
    Review {
        grant: GrantView {
            id: id(1),
            state: "pending".into(),
            version: 2,
            task: TaskName::new("PAY-1412/backfill-vat").unwrap(),
            parent: None,
            authorization_details: vec![json!({"type": "postgres", "identifier": "postgres/billing", "actions": ["write"], "tables": ["invoices"]})],
            tier: Some("change".into()),
            approvals: 0,
            approvals_needed: 1,
            decide_by: Some(NOW.plus_secs(702)),
            life_secs: Some(900),
            ends_at: None,
            secs_left: Some(702),
            review_url: "https://countersign.example/grants/x".into(),
            cause: None,
            reason: None,
            rule: None,
            sentence: Some(sentence.into()),
            leases: vec![],
        },
        digest: Some(Digest::of_bytes(b"what is approved")),
        tier: Some(change()),
        sentence: sentence.into(),
        permissions: vec![PermissionFacts {
            resource: "postgres/billing".into(),
            title: "Billing database".into(),
            environment: "prod".into(),
            can: strings(&["change rows of: invoices", "read: invoices"]),
            cannot: strings(&["change rows of: customers, payments", "delete", "change the schema", "export"]),
            irreversible: vec![],
            ending: "Sessions are cut, what the role owns is dropped, and the role is dropped.".into(),
            residual_secs: 0,
        }],
        holds: strings(&["read customers in Billing database (prod), until 14:21 UTC, granted automatically"]),
        difference: Some(strings(&["+ change rows of: invoices (read only, last time)", "+ 15 min (usually 5 min)"])),
        identity: IdentityFacts {
            name: "ci-migrator".into(),
            id: "https://token.actions.githubusercontent.com#repo:acme/billing:environment:prod".into(),
            issuer: "https://token.actions.githubusercontent.com".into(),
            method: "oidc".into(),
            attributes: BTreeMap::from([
                ("repository".into(), "acme/billing".into()),
                ("commit".into(), "9f2c1e07b4d84c6f9a3e5d10c2b7a6f4e8d9c013".into()),
                ("workflow".into(), "migrate.yml@refs/heads/main".into()),
            ]),
            owner: Some("Bo Lindqvist".into()),
            team: Some("payments".into()),
            chain: vec![],
            task: TaskName::new("PAY-1412/backfill-vat").unwrap(),
            first_seen: Some(ago(86_400 * 41)),
        },
        intent: "Backfill the VAT column of invoices that were written before the tax change of 1 July.\nDry run went through on staging: 4 112 rows.".into(),
        reasons: strings(&[
            "prod-write (policies/change.cedar, line 14): a write in production needs one person",
            "short-life: at most 15 minutes at this tier",
        ]),
        deciders: strings(&["Carla Moreau", "Dmitri Ahn"]),
        may_vote: Ok(()),
        may_revoke: true,
        votes: vec![],
        timeline: vec![
            entry(4101, 431, "ci-migrator asked for write on postgres/billing", None, "broker"),
            entry(4102, 431, "Policy: tier change, one approval", Some("rule prod-write, policies 7c1f"), "broker"),
        ],
        leases: vec![],
        similar: vec![
            row(11, "ended", change(), "ci-migrator, for Ana Ruiz's team, asks to change rows of invoices in Billing database (prod) for 5 min."),
            row(12, "denied", change(), "ci-migrator, for Ana Ruiz's team, asks to change rows of customers, invoices in Billing database (prod) for 15 min."),
            row(13, "ended", export(), "ci-migrator, for Ana Ruiz's team, asks to read invoices in Billing database (prod) for 5 min."),
        ],
        now: NOW,
    }
}

pub fn pending_export() -> Review {
    let mut r = pending();
    let sentence = "report-bot, for Bo Lindqvist, asks to export usage in Analytics warehouse (prod) for 30 min.";
    r.grant.id = id(2);
    r.grant.life_secs = Some(1800);
    r.grant.authorization_details =
        vec![json!({"type": "postgres", "identifier": "postgres/analytics", "actions": ["export"]})];
    r.tier = Some(export());
    r.sentence = sentence.into();
    r.identity.name = "report-bot".into();
    r.identity.id = "spiffe://corp.example/ns/reports/sa/report-bot".into();
    r.identity.issuer = "corp.example".into();
    r.identity.method = "x509-svid".into();
    r.identity.attributes =
        BTreeMap::from([("namespace".into(), "reports".into()), ("service account".into(), "report-bot".into())]);
    r.permissions[0].title = "Analytics warehouse".into();
    r.permissions[0].resource = "postgres/analytics".into();
    r.permissions[0].can = strings(&["export: usage", "read: usage"]);
    r.permissions[0].cannot = strings(&["change rows", "delete"]);
    r.permissions[0].residual_secs = 300;
    r.difference = Some(vec![]);
    r.holds = vec![];
    r
}

/// Several systems, irreversible, the first of two votes given, handed on by another agent.
pub fn pending_critical() -> Review {
    let mut r = pending();
    let sentence = "release-agent, for Bo Lindqvist, asks to delete rows of customers, payments in Billing database (prod), and to sign ssh certificates for deploy in Production hosts (prod), for 10 min.";
    r.grant.id = id(3);
    r.grant.parent = Some(id(1));
    r.grant.approvals = 1;
    r.grant.approvals_needed = 2;
    r.grant.life_secs = Some(600);
    r.grant.decide_by = Some(NOW.plus_secs(171));
    r.grant.authorization_details = vec![
        json!({"identifier": "postgres/billing", "actions": ["delete"]}),
        json!({"identifier": "ssh/prod-hosts", "actions": ["sign"]}),
    ];
    r.tier = Some(critical());
    r.sentence = sentence.into();
    r.identity.name = "release-agent".into();
    r.identity.id = "spiffe://corp.example/agents/release".into();
    r.identity.issuer = "corp.example".into();
    r.identity.method = "jwt-svid".into();
    r.identity.chain = strings(&["spiffe://corp.example/agents/planner", "spiffe://corp.example/agents/coder"]);
    r.identity.first_seen = None;
    r.permissions[0].can = strings(&["delete rows of: customers, payments"]);
    r.permissions[0].cannot = strings(&["change the schema"]);
    r.permissions[0].irreversible =
        strings(&["delete rows of: customers, payments. There is no way back but the nightly backup."]);
    r.permissions.push(PermissionFacts {
        resource: "ssh/prod-hosts".into(),
        title: "Production hosts".into(),
        environment: "prod".into(),
        can: strings(&["sign ssh certificates for: deploy"]),
        cannot: strings(&["sign ssh certificates for: root"]),
        irreversible: strings(&["what is done on a host by a shell"]),
        ending: "Nothing can be done before the certificate's own expiry.".into(),
        residual_secs: 630,
    });
    r.difference = None;
    r.reasons = strings(&[
        "several-systems (policies/critical.cedar, line 3): what can't be undone, or spans several systems, needs two persons",
    ]);
    r.votes = vec![VoteView {
        person: "Carla Moreau".into(),
        verdict: Verdict::Approve,
        reason: Some("Agreed in the incident call.".into()),
        at: ago(64),
        via: "browser".into(),
    }];
    r.deciders = strings(&["Dmitri Ahn"]);
    r.holds = strings(&[
        "change rows of invoices in Billing database (prod), until 14:15 UTC",
        "read customers in Billing database (prod), ended 13:58 UTC",
    ]);
    r.similar = vec![];
    r
}

pub fn pending_not_mine() -> Review {
    let mut r = pending();
    r.grant.id = id(4);
    r.may_vote = Err("You answer for this agent, so you can't vote on what it asks for.".into());
    r
}

fn lease(n: u8, state: &str) -> LeaseView {
    LeaseView {
        lease: LeaseId::from_bytes([n; 16]),
        resource: "postgres/billing".into(),
        state: state.into(),
        name: "cs_7f3k2q9x0v5m1t8w4b6n".into(),
        evidence: None,
        attested: None,
        at: Some(ago(30)),
        attempts: 0,
        last_error: None,
        next_try: None,
        away: None,
        seen: vec![],
    }
}

/// Over, with a person's word in place of one proof.
pub fn attested() -> Review {
    let mut r = ended();
    r.leases[0].state = "absent".into();
    r.leases[0].evidence = None;
    r.leases[0].attested = Some(Attested { by: "Ana Ruiz".into(), reason: "the cluster was <deleted>".into() });
    r
}

pub fn active() -> Review {
    let mut r = pending();
    r.grant.id = id(5);
    r.grant.state = "active".into();
    r.grant.approvals = 1;
    r.grant.ends_at = Some(NOW.plus_secs(521));
    r.grant.decide_by = None;
    r.grant.secs_left = Some(521);
    r.grant.version = 9;
    r.votes = vec![VoteView {
        person: "Ana Ruiz".into(),
        verdict: Verdict::Approve,
        reason: None,
        at: ago(379),
        via: "browser".into(),
    }];
    r.leases = vec![lease(1, "live")];
    r.may_vote = Err("It was decided already.".into());
    r.timeline.extend([
        entry(4110, 379, "Ana Ruiz approved", Some("digest 5c0d1f7e…, from the browser"), "person"),
        entry(4111, 379, "In force until 14:15:21 UTC", None, "broker"),
        entry(4112, 371, "A credential is about to be made: cs_7f3k2q9x0v5m1t8w4b6n", None, "broker"),
        entry(4113, 371, "The credential is live and was handed over", Some("role OID 48213"), "target"),
        entry(4120, 340, "psql started", Some("arguments not recorded, keyed hash 91be…"), "agent"),
    ]);
    r
}

pub fn stuck() -> Review {
    let mut r = active();
    r.grant.id = id(6);
    r.grant.state = "ending".into();
    r.grant.ends_at = None;
    r.grant.secs_left = None;
    r.grant.cause = Some(EndCause::Revoked {
        by: PersonId::new("carla").unwrap(),
        reason: "The job writes to the wrong tenant.".into(),
    });
    let mut l = lease(2, "revoking");
    l.attempts = 7;
    l.last_error = Some("could not connect to the target: connection refused (10.2.0.14:5432)".into());
    l.next_try = Some(NOW.plus_secs(42));
    let mut gone = lease(3, "revoked");
    gone.resource = "vault/database/creds/reports".into();
    gone.evidence =
        Some(Evidence::TargetSaysGone { detail: "accessor lookup answered 403, seen live at 14:00:21".into() });
    r.leases = vec![l, gone];
    r.timeline.extend([
        entry(4131, 300, "Carla Moreau revoked it", Some("The job writes to the wrong tenant."), "person"),
        entry(4132, 299, "Ending failed, tried again", Some("connection refused"), "target"),
    ]);
    r
}

pub fn ended() -> Review {
    let mut r = active();
    r.grant.id = id(7);
    r.grant.state = "ended".into();
    r.grant.ends_at = None;
    r.grant.cause = Some(EndCause::Completed);
    r.may_revoke = false;
    let mut l = lease(4, "revoked");
    l.evidence = Some(Evidence::TargetSaysGone { detail: "no role with OID 48213 in pg_roles".into() });
    l.seen = vec![
        Observation { what: "sessions_cut".into(), count: 2, detail: Some("psql, pgbouncer".into()) },
        Observation { what: "objects_dropped".into(), count: 1, detail: None },
    ];
    let mut x = lease(5, "revoked");
    x.resource = "token/demo-api".into();
    x.evidence = Some(Evidence::Expired { not_after: ago(90), skew_secs: 30 });
    r.leases = vec![l, x];
    r.timeline.extend([
        entry(4140, 120, "psql ended, exit 0", Some("31 s"), "agent"),
        entry(4141, 118, "The agent completed it", None, "agent"),
        entry(
            4142,
            118,
            "Two sessions cut, one object dropped, role dropped",
            Some("access cut after 11 ms"),
            "target",
        ),
        entry(4143, 118, "Proven gone", Some("no role with OID 48213 in pg_roles"), "target"),
        entry(4144, 118, "Ended", None, "broker"),
    ]);
    r
}

pub fn over(state: &str, n: u8) -> Review {
    let mut r = pending();
    r.grant.id = id(n);
    r.grant.state = state.into();
    r.may_vote = Err("It is over.".into());
    r.may_revoke = false;
    match state {
        "denied" => {
            r.grant.reason = Some("Not during the close of the month. Ask again on Monday.".into());
            r.votes = vec![VoteView {
                person: "Dmitri Ahn".into(),
                verdict: Verdict::Deny,
                reason: r.grant.reason.clone(),
                at: ago(60),
                via: "browser".into(),
            }];
        }
        "refused" => {
            r.grant.state = "denied".into();
            r.grant.rule = Some("no-prod-schema".into());
            r.grant.reason = Some("Schema changes in production go through a release.".into());
            r.tier = None;
        }
        "withdrawn" => r.grant.cause = Some(EndCause::Frozen { id: 3 }),
        _ => {}
    }
    r
}

/// Names, claims and lists as long as they get, all honest.
pub fn long() -> Review {
    let mut r = pending();
    r.grant.id = id(8);
    let name = "quarterly-reconciliation-and-reporting-orchestrator-for-the-north-european-subsidiaries";
    r.identity.name = name.into();
    r.identity.id = format!(
        "spiffe://very-long-trust-domain-name.platform.corp.example/namespaces/finance-reconciliation-production/serviceaccounts/{name}"
    );
    r.permissions[0].can = vec![format!(
        "change rows of: {}",
        (0..40).map(|n| format!("ledger_partition_{n:03}")).collect::<Vec<_>>().join(", ")
    )];
    r.sentence =
        format!("{name}, for Bo Lindqvist, asks to change rows of 40 tables in Billing database (prod) for 15 min.");
    let step = "reconcile the ledger of the partition and write the difference back.";
    r.intent = (1..40).map(|n| format!("Step {n}: {step}")).collect::<Vec<_>>().join("\n");
    r
}

pub fn queue() -> Queue {
    let mut mine = vec![
        row(3, "pending", critical(), &pending_critical().sentence),
        row(1, "pending", change(), &pending().sentence),
        row(2, "pending", export(), &pending_export().sentence),
    ];
    mine[0].approvals = 1;
    mine[0].secs_left = 171;
    mine[0].until = Some(NOW.plus_secs(171));
    let mut live = vec![
        row(5, "active", change(), &pending().sentence),
        row(6, "ending", change(), &pending().sentence),
        row(
            14,
            "active",
            observe(),
            "docs-agent, for Bo Lindqvist, asks to read articles in Help centre (staging) for 1 h.",
        ),
    ];
    live[1].stuck = 1;
    live[1].until = None;
    let mut decided: Vec<_> = [("ended", 20), ("denied", 21), ("lapsed", 22), ("cancelled", 23), ("withdrawn", 24)]
        .into_iter()
        .map(|(state, n)| Row { until: Some(ago(u64::from(n) * 60)), ..row(n, state, change(), &pending().sentence) })
        .collect();
    decided[1].tier = None;
    let freeze = FreezeView {
        id: 3,
        selector: Selector::Agent(AgentId::new("spiffe://corp.example/agents/importer").unwrap()),
        by: "Carla Moreau".into(),
        reason: "It loops.".into(),
        at: ago(840),
    };
    Queue {
        mine,
        others: vec![row(4, "pending", change(), &pending_not_mine().sentence)],
        live,
        decided,
        freezes: vec![freeze],
    }
}
