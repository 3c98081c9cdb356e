//! "It came from OpenBao through the broker, it worked, and then it was gone, or I was told until when it isn't": every
//! engine over `/v1` of the real binary, ended by `complete` and by time alone, looked at as OpenBao's root and as the
//! database's admin.

#[path = "support/crash_broker.rs"]
mod broker;
#[path = "support/openbao.rs"]
mod openbao;

use std::time::{Duration, Instant};

use broker::{Agent, Serving, Setup, until};
use countersign::core::event::EndCause;
use countersign::core::grant::GrantState;
use countersign::core::lease::{Evidence, LeaseState};
use countersign::time::{Clock as _, SystemClock};
use openbao::{OpenBao, Postgres};
use serde_json::{Value, json};

/// `skew_secs` of the target.
const SKEW: u64 = 1;
/// Long enough for two cores that do something else too.
const SOON: Duration = Duration::from_secs(20);

const CATALOGUE: &str = r#"
[[target]]
name = "bao"
kind = "vault"
[target.settings]
address = "@BAO@"
mint_deadline_secs = 60
skew_secs = 1
[target.settings.auth]
method = "jwt"
mint_role = "countersign-mint"
janitor_role = "countersign-janitor"
audience = "openbao"
"#;

fn resource(name: &str, settings: &str) -> String {
    format!(
        "\n[[resource]]\nname = \"bao/{name}\"\ntarget = \"bao\"\ntitle = \"{name}\"\nenvironment = \"sandbox\"\nisolated = true\n\
         sensitivity = \"none\"\naction = [{{ name = \"use\", effect = \"read\" }}]\n[resource.settings]\n{settings}\n"
    )
}

fn catalogue(bao: &str) -> String {
    let pki = |role: &str, more: &str| {
        format!(
            "engine = \"pki\"\npath = \"pki/issue/{role}\"\nttl_secs_max = 600\ncommon_name = \"a.svc.test\"\n{more}"
        )
    };
    let database = "engine = \"database\"\npath = \"database/creds/billing-ro\"\nttl_secs_max = 600\ndedicated = true\n\
                    revocation_cuts_sessions = true";
    let ssh = "engine = \"ssh\"\npath = \"ssh/sign/ops\"\nttl_secs_max = 300\nvalid_principals = [\"deploy\"]";
    [
        CATALOGUE.replace("@BAO@", bao),
        TOKENS.to_owned(),
        resource("billing", database),
        resource("plain", &pki("agents", "")),
        resource("nostore", &pki("agents-nostore", "no_store = true")),
        resource("leased", &pki("agents-leased", "generate_lease = true\ndedicated = true")),
        resource("ssh", ssh),
    ]
    .concat()
}

struct World {
    bao: OpenBao,
    db: Postgres,
    serving: Serving,
    theirs: Theirs,
}

/// What somebody else got from the same mounts.
struct Theirs {
    lease: String,
    user: String,
    password: String,
    serial: String,
    leased_certificate: String,
}

fn text(v: &Value) -> String {
    v.as_str().unwrap_or_else(|| panic!("no text: {v}")).to_owned()
}

impl World {
    async fn start(test: &str) -> Option<Self> {
        let bao = OpenBao::start(test, 2).await?;
        let db = Postgres::start(test).await?;
        let address = bao.address();
        let mut serving = Serving::prepare(|_, _| Setup {
            catalogue: catalogue(&address),
            broker: "sweep_every_secs = 1".to_owned(),
            ..Setup::default()
        });
        serving.up().await;
        let more = "path \"pki/issue/agents-nostore\" { capabilities = [\"update\"] }\n";
        bao.log_in_by_broker(&serving.agent_url(), &serving.file("ca.pem"), more).await;
        bao.database(&db, "billing-ro", 600, "csv_").await;
        bao.database(&db, "reports", 3600, "rep_").await;
        let leased = json!({ "generate_lease": true });
        let roles = [
            ("agents", json!({})),
            ("agents-nostore", json!({ "no_store": true })),
            ("agents-leased", leased.clone()),
            ("others-leased", leased),
        ];
        bao.pki(&roles).await;
        bao.ssh("deploy,ops").await;
        let role = bao.ok("GET", "database/creds/reports", Value::Null).await;
        let issue = json!({ "common_name": "z.svc.test", "ttl": "900s" });
        let plain = bao.ok("PUT", "pki/issue/agents", issue.clone()).await;
        let leased = bao.ok("PUT", "pki/issue/others-leased", issue).await;
        let theirs = Theirs {
            lease: text(&role["lease_id"]),
            user: text(&role["data"]["username"]),
            password: text(&role["data"]["password"]),
            serial: text(&plain["data"]["serial_number"]),
            leased_certificate: text(&leased["lease_id"]),
        };
        Some(Self { bao, db, serving, theirs })
    }

    /// When the CA revoked a certificate; 0 if it did not.
    async fn revoked_at(&self, serial: &str) -> u64 {
        let cert = self.bao.ok("GET", &format!("pki/cert/{serial}"), Value::Null).await;
        cert["data"]["revocation_time"].as_u64().unwrap()
    }

    async fn theirs_live(&self) {
        for lease in [&self.theirs.lease, &self.theirs.leased_certificate] {
            assert!(self.bao.is_lease(lease).await, "{lease} is somebody else's");
        }
        self.db.connect(&self.theirs.user, &self.theirs.password).await.unwrap();
        assert_eq!(self.revoked_at(&self.theirs.serial).await, 0, "so is this certificate");
    }

    /// What the record says of the only lease of a grant, read from the files.
    fn evidence(&self, grant: &str) -> Option<Evidence> {
        let record = self.serving.record();
        let grant = record.grant(grant);
        let lease = grant.leases.values().next().expect("it has a lease");
        match (&grant.state, &lease.state) {
            (GrantState::Ended { .. }, LeaseState::Revoked { evidence, .. }) => Some(evidence.clone()),
            _ => None,
        }
    }

    async fn ended(&self, grant: &str) -> Evidence {
        let mut evidence = None;
        until(&format!("{grant} is proven gone"), SOON, async || {
            evidence = self.evidence(grant);
            evidence.is_some()
        })
        .await;
        evidence.unwrap()
    }
}

/// Everything that an agent has from the four engines.
struct Held {
    user: String,
    password: String,
    session: tokio_postgres::Client,
    lease: String,
    plain: String,
    leased: String,
    leased_lease: String,
    ssh_not_after_ms: u64,
    grants: [String; 4],
}

const NAMES: [&str; 4] = ["billing", "plain", "leased", "ssh"];

impl Held {
    /// Asks, collects, and uses each, so that it is known to have worked.
    async fn collect(w: &World, agent: &Agent, task: &str, life: [u64; 4]) -> Self {
        let (mut grants, mut credentials) = (Vec::new(), Vec::new());
        for (name, life) in NAMES.iter().zip(life) {
            let want = json!({ "type": "vault", "identifier": format!("bao/{name}"), "actions": ["use"] });
            let id = agent.asked(task, life, want).await;
            credentials.push(agent.collected(&id).await);
            grants.push(id);
        }
        let field = |i: usize, name: &str| text(&credentials[i]["public"][name]);
        let (user, password) = (field(0, "username"), text(&credentials[0]["secret"]["password"]));
        let session = w.db.connect(&user, &password).await.expect("the database login works");
        assert_eq!(session.query("SELECT * FROM invoices", &[]).await.unwrap().len(), 1);
        let lease = field(0, "lease_id");
        assert!(lease.starts_with("database/creds/billing-ro/") && w.bao.is_lease(&lease).await);
        let (plain, leased) = (field(1, "serial"), field(2, "serial"));
        for serial in [&plain, &leased] {
            assert_eq!(w.revoked_at(serial).await, 0, "the CA knows it, not revoked");
        }
        let mut of_role = w.bao.leases("pki/issue/agents-leased").await;
        assert_eq!(of_role.len(), 1);
        let leased_lease = format!("pki/issue/agents-leased/{}", of_role.remove(0));
        let certificate = ssh_key::Certificate::from_openssh(&field(3, "certificate")).unwrap();
        assert_eq!(certificate.valid_principals(), ["deploy"]);
        let ssh_not_after_ms = certificate.valid_before() * 1000;
        for i in [1, 2, 3] {
            assert!(text(&credentials[i]["secret"]["private_key"]).contains("PRIVATE KEY"));
        }
        Self {
            user,
            password,
            session,
            lease,
            plain,
            leased,
            leased_lease,
            ssh_not_after_ms,
            grants: grants.try_into().unwrap(),
        }
    }

    /// Outside, nothing of the first three is left.
    async fn nothing_left(&self, w: &World) {
        assert!(!w.bao.is_lease(&self.lease).await && !w.bao.is_lease(&self.leased_lease).await);
        assert!(w.db.connect(&self.user, &self.password).await.is_err(), "the login is refused");
        assert!(w.db.users("csv_").await.is_empty(), "the user is gone");
        until("the open session is cut", Duration::from_secs(2), async || self.session.is_closed()).await;
    }
}

/// `openbao` is the audience of the assertions by which the broker logs in at the target.
const TOKENS: &str = r#"
[[resource]]
name = "api/bao"
target = "tokens"
title = "an API whose audience is the target's own"
environment = "sandbox"
isolated = true
sensitivity = "none"
settings = { audience = "openbao", checks = "offline" }
action = [{ name = "read", effect = "read" }]
"#;

fn said(evidence: &Evidence) -> &str {
    match evidence {
        Evidence::TargetSaysGone { detail } => detail,
        other => panic!("the target did not say so: {other:?}"),
    }
}

/// An SSH certificate can't be ended: it is `Expired`, and not a moment before that is true.
fn expired(evidence: &Evidence, held: &Held) {
    let Evidence::Expired { not_after, skew_secs } = evidence else { panic!("{evidence:?}") };
    assert_eq!((not_after.0, *skew_secs), (held.ssh_not_after_ms, SKEW));
    assert!(SystemClock.wall().0 > held.ssh_not_after_ms + SKEW * 1000, "recorded before it was true");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn completed_each_ends_with_the_evidence_that_its_engine_allows() {
    let Some(mut w) = World::start("vault_through_broker: completed").await else { return };
    let agent = w.serving.agent("a");
    let held = Held::collect(&w, &agent, "T-1", [300, 300, 300, 8]).await;
    let before = SystemClock.wall().secs();
    let begun = Instant::now();
    let [billing, plain, leased, ssh] = &held.grants;
    agent.post("/v1/tasks/T-1/complete", json!({})).await.ok();

    let evidence = w.ended(billing).await;
    assert!(said(&evidence).contains(&held.lease) && said(&evidence).contains("invalid lease"), "{evidence:?}");
    let evidence = w.ended(plain).await;
    assert!(said(&evidence).contains(&held.plain) && said(&evidence).contains("revocation_time"), "{evidence:?}");
    let evidence = w.ended(leased).await;
    assert!(said(&evidence).contains(&held.leased_lease) && said(&evidence).contains("invalid lease"), "{evidence:?}");
    assert!(said(&evidence).contains(&held.leased) && said(&evidence).contains("revocation_time"), "{evidence:?}");
    eprintln!("OpenBao: database and both pki are proven gone {} ms after completion", begun.elapsed().as_millis());
    held.nothing_left(&w).await;
    for serial in [&held.plain, &held.leased] {
        assert!(w.revoked_at(serial).await >= before, "revoked at the CA");
    }

    // The SSH certificate is over for the agent, and its end is not claimed before it is true.
    let shown = agent.show(ssh).await;
    if SystemClock.wall().0 <= held.ssh_not_after_ms + SKEW * 1000 {
        assert_eq!((&shown["state"], &shown["leases"][0]["state"]), (&json!("ending"), &json!("revoking")), "{shown}");
        assert!(text(&shown["leases"][0]["last_error"]).contains("own expiry"), "{shown}");
    }
    assert!(matches!(agent.collect(ssh).await.status, 409 | 410));
    expired(&w.ended(ssh).await, &held);
    w.theirs_live().await;

    // No token of a mint is left either: the janitor's is the only one that the broker has.
    let mut tokens = 0;
    for accessor in w.bao.ok("LIST", "auth/token/accessors", Value::Null).await["data"]["keys"].as_array().unwrap() {
        let (status, looked) = w.bao.call("PUT", "auth/token/lookup-accessor", json!({ "accessor": accessor })).await;
        tokens += usize::from(status == 200 && looked["data"]["policies"] == json!(["countersign-mint"]));
    }
    assert_eq!(tokens, 0, "tokens that could mint");
    w.serving.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_session_is_cut_within_two_seconds_and_its_user_is_gone() {
    let Some(mut w) = World::start("vault_through_broker: must show").await else { return };
    let admin = w.db.admin().await;
    admin.batch_execute("CREATE SCHEMA scratch; GRANT ALL ON SCHEMA scratch TO billing_ro").await.unwrap();
    let agent = w.serving.agent("c");
    let id = agent.asked("T-3", 300, json!({ "type": "vault", "identifier": "bao/billing", "actions": ["use"] })).await;
    let credential = agent.collected(&id).await;
    let (user, password) = (text(&credential["public"]["username"]), text(&credential["secret"]["password"]));
    let oid: u32 = admin.query_one("SELECT oid FROM pg_roles WHERE rolname = $1", &[&user]).await.unwrap().get(0);
    let session = w.db.connect(&user, &password).await.unwrap();
    // What it leaves behind would run with the rights of whoever touches it.
    session
        .batch_execute(
            "CREATE TABLE scratch.mine (id int);
             CREATE FUNCTION scratch.trap() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS 'BEGIN RETURN NEW; END';
             CREATE TRIGGER trap BEFORE INSERT ON scratch.mine FOR EACH ROW EXECUTE FUNCTION scratch.trap();
             GRANT ALL ON scratch.mine TO PUBLIC",
        )
        .await
        .unwrap();
    let mut psql = openbao::psql(w.db.port, &user, &password, "SELECT pg_sleep(600)");
    let busy = "SELECT count(*) FROM pg_stat_activity WHERE usesysid = $1 AND query LIKE '%pg_sleep%'";
    until("psql runs", SOON, async || admin.query_one(busy, &[&oid]).await.unwrap().get::<_, i64>(0) == 1).await;

    let begun = Instant::now();
    agent.complete(&id).await;
    until("psql is cut", SOON, async || psql.try_wait().unwrap().is_some()).await;
    let cut = begun.elapsed();
    assert!(!psql.wait().unwrap().success());
    until("the other session is cut", SOON, async || session.is_closed()).await;
    eprintln!("OpenBao: psql cut {} ms after the call of complete", cut.as_millis());
    assert!(cut < Duration::from_secs(2), "{cut:?}");

    let evidence = w.ended(&id).await;
    assert!(said(&evidence).contains(&text(&credential["public"]["lease_id"])), "{evidence:?}");
    assert!(said(&evidence).contains("400 invalid lease; it was live just before"), "{evidence:?}");
    // A fresh log-in is refused, as the same user and by whatever name the role has now.
    assert!(w.db.connect(&user, &password).await.is_err());
    for sql in [
        "SELECT count(*) FROM pg_roles WHERE oid = $1",
        "SELECT count(*) FROM pg_stat_activity WHERE usesysid = $1",
        "SELECT count(*) FROM pg_shdepend WHERE refclassid = 'pg_authid'::regclass AND refobjid = $1",
        "SELECT count(*) FROM pg_class WHERE relowner = $1 OR relname = 'mine'",
        "SELECT count(*) FROM pg_proc WHERE proowner = $1 OR proname = 'trap'",
    ] {
        assert_eq!(admin.query_one(sql, &[&oid]).await.unwrap().get::<_, i64>(0), 0, "{sql}");
    }
    w.theirs_live().await;
    w.serving.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_the_ca_does_not_store_is_revoked_there_long_before_it_expires() {
    let Some(mut w) = World::start("vault_through_broker: no_store").await else { return };
    let agent = w.serving.agent("d");
    let id = agent.asked("T-4", 500, json!({ "type": "vault", "identifier": "bao/nostore", "actions": ["use"] })).await;
    let serial = text(&agent.collected(&id).await["public"]["serial"]);
    let (status, _) = w.bao.call("GET", &format!("pki/cert/{serial}"), Value::Null).await;
    assert_eq!(status, 404, "the CA doesn't store it");
    agent.complete(&id).await;
    let evidence = w.ended(&id).await;
    // Its own expiry can't be the reason: it is minutes away.
    let record = w.serving.record();
    let not_after = record.grant(&id).leases.values().next().unwrap().not_after.unwrap();
    assert!(not_after.ms_since(SystemClock.wall()) > 300_000);
    assert!(said(&evidence).contains(&serial) && said(&evidence).contains("revocation_time"), "{evidence:?}");
    assert!(w.revoked_at(&serial).await > 0, "the CA says so");
    w.serving.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d5_a_token_that_the_broker_minted_for_the_targets_audience_does_not_log_in_there() {
    let Some(mut w) = World::start("vault_through_broker: D5").await else { return };
    let agent = w.serving.agent("e");
    let id = agent.asked("T-5", 300, json!({ "type": "token", "identifier": "api/bao", "actions": ["read"] })).await;
    let jwt = text(&agent.collected(&id).await["secret"]["token"]);
    let claims = jwt.split('.').nth(1).unwrap();
    let claims: Value = {
        use base64::Engine as _;
        serde_json::from_slice(&base64::prelude::BASE64_URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap()
    };
    assert!(claims["aud"] == "openbao" || claims["aud"] == json!(["openbao"]), "{claims}");
    for role in ["countersign-mint", "countersign-janitor"] {
        let body = json!({ "role": role, "jwt": jwt });
        let (status, answer) = w.bao.call_as("", None, "POST", "auth/jwt/login", body).await;
        assert!(matches!(status, 400 | 403) && answer["auth"].is_null(), "{role}: {status} {answer}");
    }
    // The same roles do let the broker in.
    let id = agent.asked("T-5", 300, json!({ "type": "vault", "identifier": "bao/plain", "actions": ["use"] })).await;
    agent.collected(&id).await;
    agent.post("/v1/tasks/T-5/complete", json!({})).await.ok();
    w.ended(&id).await;
    w.serving.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_its_time_is_up_each_ends_without_a_call_from_the_agent() {
    let Some(mut w) = World::start("vault_through_broker: ttl").await else { return };
    let agent = w.serving.agent("b");
    let life = 6;
    let held = Held::collect(&w, &agent, "T-2", [life; 4]).await;
    // No call of the agent from here on: the journal is read from its files.
    let [billing, plain, leased, ssh] = &held.grants;
    let evidence = w.ended(billing).await;
    assert!(said(&evidence).contains(&held.lease), "{evidence:?}");
    for (grant, serial) in [(plain, &held.plain), (leased, &held.leased)] {
        match w.ended(grant).await {
            // On time: revoked at the CA, and the CA says so.
            Evidence::TargetSaysGone { detail } => {
                assert!(detail.contains(serial.as_str()) && w.revoked_at(serial).await > 0, "{detail}");
            }
            // Later than that there is nothing to revoke.
            Evidence::Expired { not_after, .. } => assert!(not_after < SystemClock.wall()),
            tried @ Evidence::TriedAndRefused { .. } => panic!("{tried:?}"),
        }
    }
    held.nothing_left(&w).await;
    expired(&w.ended(ssh).await, &held);
    w.theirs_live().await;
    w.serving.stop().await;
    let record = w.serving.record();
    for grant in &held.grants {
        let GrantState::Ended { cause, .. } = &record.grant(grant).state else { panic!("{grant}") };
        assert_eq!(*cause, EndCause::Expired);
    }
}
