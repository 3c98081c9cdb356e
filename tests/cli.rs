//! The command line, as a person or a script meets it, where no broker is needed: help, wrong lines, exit codes, checks of
//! files, and the record read offline. Each runs the real program.

mod journal_support;
mod support;

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use countersign::audit::note::{Signer, Verifier};
use countersign::core::digest::Digest;
use countersign::core::event::{BrokerEvent, DeniedBy, Event, GrantEvent, Selector};
use countersign::core::id::{AgentId, GrantId, PersonId, ResourceName, TaskName, Timestamp};
use countersign::core::permission::Permission;
use countersign::core::request::{AgentFacts, Request};
use countersign::store::embedded::journal::{Acknowledged, Batch, Journal};
use countersign::store::engine::Record;
use journal_support::{TickClock, key, small};
use serde_json::Value;
use support::{Example, line};

fn countersign(args: &[&str]) -> Output {
    with(args, &[])
}

/// The program with a clean environment: nothing of this machine's settings counts.
fn with(args: &[&str], vars: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_countersign"));
    command.args(args).env_clear().stdin(Stdio::null());
    command.envs(vars.iter().copied()).output().unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}{}", stdout(output), stderr(output)))
}

// --- help and wrong lines ---------------------------------------------------------------------------------------------------

const COMMANDS: [&[&str]; 22] = [
    &["tour"],
    &["dev"],
    &["serve"],
    &["exec"],
    &["request"],
    &["status"],
    &["credentials"],
    &["complete"],
    &["cancel"],
    &["login"],
    &["inbox"],
    &["show"],
    &["approve"],
    &["deny"],
    &["revoke"],
    &["freeze"],
    &["audit", "verify"],
    &["audit", "tail"],
    &["audit", "show"],
    &["policy", "check"],
    &["policy", "test"],
    &["config", "check"],
];

#[test]
fn every_command_can_be_learned_from_its_help() {
    let all = stdout(&countersign(&["--help"]));
    for part in [
        "COUNTERSIGN_URL",
        "COUNTERSIGN_CA",
        "COUNTERSIGN_AUDIENCE",
        "COUNTERSIGN_TOKEN ",
        "COUNTERSIGN_TOKEN_FILE",
        "COUNTERSIGN_SVID_CERT",
        "SPIFFE_ENDPOINT_SOCKET",
        "75 still pending",
        "77 denied",
        "countersign tour",
    ] {
        assert!(all.contains(part), "{part}: {all}");
    }
    for command in COMMANDS {
        assert!(all.contains(command[0]), "{command:?} is not listed");
        let help = countersign(&[command, &["--help"]].concat());
        assert_eq!(code(&help), 0, "{command:?}");
        let help = stdout(&help);
        let example = format!("  countersign {}", command.join(" "));
        assert!(help.contains("Example") && help.contains(&example), "{command:?} has no example: {help}");
        assert!(!help.contains('\u{1b}'), "no colours into a pipe: {help:?}");
    }
}

#[test]
fn a_wrong_line_is_2_and_says_what_is_right() {
    let id = GrantId::from_bytes([1; 16]).to_string();
    let cases: [(&[&str], &str); 14] = [
        (&["exec", "--why", "x", "--", "true"], "--want"),
        (&["exec", "--want", "a:read", "--details", "f", "--why", "x", "--", "true"], "cannot be used with"),
        (&["exec", "--want", "a:read", "--", "true"], "--why"),
        (&["exec", "--want", "a:read", "--why", "x"], "CMD"),
        (&["exec", "--want", "a", "--why", "x", "--", "true"], "RESOURCE:ACTION"),
        (&["exec", "--want", "a:read", "--why", "x", "--ttl", "10", "--", "true"], "write a duration like 90s"),
        (&["exec", "--want", "a:read", "--why", "x", "--task", "two words", "--", "true"], "task"),
        (&["status", "gr_1"], "gr_ and 26 characters"),
        (&["complete"], "--task"),
        (&["complete", &id, "--task", "x"], "cannot be used with"),
        (&["deny", &id], "--reason"),
        (&["freeze", "--all"], "--reason"),
        (&["login", "--url", "http://countersign.corp"], "must be https"),
        (&["audit", "verify", "x", "--checkpoint", "f"], "--key"),
    ];
    for (args, says) in cases {
        let output = countersign(args);
        assert_eq!(code(&output), 2, "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(says), "{args:?}: {}", stderr(&output));
        assert_eq!(stdout(&output), "", "{args:?}");
    }
}

#[test]
fn without_a_broker_an_identity_or_a_session_it_says_what_to_set() {
    let id = GrantId::from_bytes([1; 16]).to_string();
    let exec = ["exec", "--want", "a:read", "--why", "x", "--", "true"];
    let output = countersign(&exec);
    assert_eq!(code(&output), 70, "exec has a code of its own, since 1 may be the command's");
    assert!(stderr(&output).contains("COUNTERSIGN_URL is not set"), "{}", stderr(&output));
    let output = with(&exec, &[("COUNTERSIGN_URL", "https://127.0.0.1:1")]);
    assert!(stderr(&output).contains("SPIFFE_ENDPOINT_SOCKET"), "{}", stderr(&output));
    // A token that must not be seen anywhere, and a port where nobody listens.
    let vars = [("COUNTERSIGN_URL", "https://127.0.0.1:1"), ("COUNTERSIGN_TOKEN", "secret-token-text")];
    let output = with(&["status", &id], &vars);
    assert_eq!(code(&output), 1);
    assert!(stderr(&output).contains("can't reach the broker at https://127.0.0.1:1"), "{}", stderr(&output));
    assert!(!stderr(&output).contains("secret-token-text"));
    for args in [&["inbox"][..], &["show", &id], &["approve", &id], &["deny", &id, "--reason", "x"]] {
        let dir = tempfile::tempdir().unwrap();
        let output = with(args, &[("HOME", dir.path().to_str().unwrap())]);
        assert_eq!(code(&output), 1, "{args:?}");
        assert!(stderr(&output).contains("run `countersign login --url"), "{args:?}: {}", stderr(&output));
    }
}

// --- policies and configuration ---------------------------------------------------------------------------------------------

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn the_shipped_example_is_fine() {
    let e = Example::new();
    let file = e.file("countersign.toml");
    let output = countersign(&["config", "check", "--config", path(&file)]);
    assert_eq!(code(&output), 0, "{}", stdout(&output));
    // One warning, and it says what isn't so yet.
    let said = stdout(&output);
    assert_eq!(said.matches("warning  ").count(), 1, "{said}");
    let line = line(&e.read("countersign.toml"), "friction = \"high\"");
    assert!(said.starts_with(&format!("warning  countersign.toml:{line}\n")), "{said}");
    let flat = said.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(flat.contains("passkeys are not enforced yet: one click of a browser session decides"), "{said}");
    assert!(said.lines().last().unwrap().starts_with("fine: 0 problems; 4 targets"), "{said}");
    let output = countersign(&["config", "check", "--config", path(&file), "--json"]);
    assert_eq!(json(&output)["problems"], Value::Array(vec![]));

    let output = countersign(&["policy", "check", "--config", path(&file)]);
    assert_eq!(code(&output), 0);
    assert!(stdout(&output).contains("tiers, mildest first"), "{}", stdout(&output));
    let output = countersign(&["policy", "check", "--config", path(&file), "--json"]);
    assert_eq!(json(&output)["tiers"].as_array().unwrap().len(), 4);
}

#[test]
fn problems_of_all_files_and_targets_are_told_at_once() {
    let e = Example::new();
    let file = e.file("countersign.toml");
    // Of the files: these keep everything after them from being looked at.
    e.replace("countersign.toml", "sweep_every_secs", "sweep");
    e.replace("catalogue.toml", "effect = \"export\"", "effect = \"exfiltrate\"");
    let output = countersign(&["config", "check", "--config", path(&file)]);
    assert_eq!(code(&output), 1);
    for part in ["problem  countersign.toml:", "`sweep`", "problem  catalogue.toml:", "not fine"] {
        assert!(stdout(&output).contains(part), "{part}: {}", stdout(&output));
    }
    assert_eq!(countersign(&["policy", "check", "--config", path(&file)]).status.code(), Some(1));

    // Of policies, targets, and of what `serve` may not: together.
    let e = Example::new();
    let file = e.file("countersign.toml");
    e.append(
        "policies/50-never.cedar",
        "@id(\"broken\") permit (principal, action, resource) when { resource.nonsense };",
    );
    e.replace("catalogue.toml", "connection_limit = 5", "connection_limit = 0");
    e.replace(
        "countersign.toml",
        "trust_domains = [\"corp.example\"]",
        "trust_domains = [\"dev.countersign.internal\"]",
    );
    e.replace("countersign.toml", "\"corp.example\" = ", "\"dev.countersign.internal\" = ");
    e.replace("countersign.toml", "spiffe://corp.example", "spiffe://dev.countersign.internal");
    let output = countersign(&["config", "check", "--config", path(&file), "--json"]);
    assert_eq!(code(&output), 1);
    let problems = json(&output)["problems"].as_array().unwrap().clone();
    let at = |place: &str| problems.iter().any(|p| p["place"].as_str().unwrap().contains(place));
    assert!(at("50-never.cedar:") && at("target billing-db") && at("spiffe.trust_domains"), "{problems:#?}");

    let output = countersign(&["config", "check", "--config", "/none/countersign.toml"]);
    assert_eq!(code(&output), 1);
    assert!(stdout(&output).contains("can't open /none/countersign.toml"), "{}", stdout(&output));
}

#[test]
fn what_only_the_start_of_serve_would_notice_is_told_before() {
    for (from, to, place, says) in [
        (
            "issuer = \"https://kubernetes.corp.example\"",
            "issuer = \"https://10.0.0.1\"",
            "identities",
            "issuer https://10.0.0.1: a URL of the issuer points to an address that may not be reached",
        ),
        (
            "# ca_file = \"../certs/login-ca.pem\"",
            "ca_file = \"countersign.toml\"",
            "reviewer_login",
            "countersign.toml",
        ),
        ("scopes = [\"profile\"]", "scopes = [\"a b\"]", "reviewer_login", "a scope is malformed"),
        ("file:../certs/broker-key.pem", "file:countersign.toml", "listen", "listen.tls_key"),
    ] {
        let e = Example::new();
        let file = e.file("countersign.toml");
        if place == "identities" {
            e.replace("countersign.toml", "allow_private_network = true\n# Attribute", "# Attribute");
        }
        e.replace("countersign.toml", from, to);
        let output = countersign(&["config", "check", "--config", path(&file), "--json"]);
        assert_eq!(code(&output), 1, "{to}: {}", stdout(&output));
        let problems = json(&output)["problems"].clone();
        assert!(problems[0]["place"] == place && problems[0]["what"].as_str().unwrap().contains(says), "{problems:#}");
        // The same words as `serve`, which refuses it too.
        let data = tempfile::tempdir().unwrap();
        e.replace("countersign.toml", "/var/lib/countersign", path(data.path()));
        let output = countersign(&["serve", "--config", path(&file)]);
        assert_eq!(code(&output), 1);
        assert!(stderr(&output).contains(says), "{}", stderr(&output));
    }
}

#[test]
fn live_checks_say_which_target_cannot_be_reached() {
    let e = Example::new();
    let file = e.file("countersign.toml");
    // Loopback, and ports where nobody listens.
    e.replace("catalogue.toml", "host = \"billing-db.corp.example\"", "host = \"127.0.0.1\"\nport = 1");
    e.replace("catalogue.toml", "ca_file = \"../certs/billing-db-ca.pem\"", "sslmode = \"disable\"");
    e.replace("catalogue.toml", "host = \"127.0.0.1\"\nuser", "host = \"127.0.0.1\"\nport = 1\nuser");
    e.replace("catalogue.toml", "https://openbao.corp.example:8200", "https://127.0.0.1:1");
    let data = tempfile::tempdir().unwrap();
    e.replace("countersign.toml", "/var/lib/countersign", path(data.path()));
    let output = countersign(&["config", "check", "--config", path(&file), "--live", "--json"]);
    assert_eq!(code(&output), 1, "{}", stdout(&output));
    let found = json(&output);
    for target in ["billing-db", "sandbox-db", "openbao"] {
        assert!(found["live"][target]["failed"].is_string(), "{target}: {found:#}");
    }
    assert!(found["live"]["tokens"]["gaps"].is_array(), "{found:#}");
    let warnings = found["warnings"].as_array().unwrap();
    assert!(warnings.iter().any(|w| w["what"].as_str().unwrap().contains("has made no keys yet")), "{found:#}");
    assert!(!data.path().join("keys").exists(), "a check makes nothing");
    assert!(!stdout(&output).contains("not-a-secret"));
    let output = countersign(&["config", "check", "--config", path(&file), "--live"]);
    assert!(stdout(&output).contains("target openbao: can't be checked"), "{}", stdout(&output));
}

#[test]
fn a_case_that_fails_shows_the_difference() {
    let e = Example::new();
    let (file, cases) = (e.file("countersign.toml"), e.file("policies/cases.toml"));
    let test =
        |more: &[&str]| countersign(&[&["policy", "test", "--config", path(&file), path(&cases)], more].concat());
    let output = test(&[]);
    assert_eq!(code(&output), 0, "{}", stdout(&output));
    assert!(stdout(&output).contains("0 failed"), "{}", stdout(&output));
    assert_eq!(stdout(&test(&["--quiet"])).lines().count(), 1);

    e.replace(
        "policies/cases.toml",
        "expect = { tier = \"export\", rules = [\"export-send\"] }",
        "expect = { tier = \"observe\" }",
    );
    let output = test(&["--quiet"]);
    assert_eq!(code(&output), 1);
    let text = stdout(&output);
    assert!(text.starts_with("FAILED  posting to the outside, alone\n        expected: tier observe"), "{text}");
    assert!(text.contains("        got:      tier export") && text.contains("1 failed"), "{text}");
    let report = json(&test(&["--json"]));
    assert_eq!(report["passed"], false);

    e.replace("policies/cases.toml", "agent = \"nobodys\"", "agent = \"nobody\"");
    let output = test(&[]);
    assert_eq!((code(&output), stdout(&output)), (1, String::new()));
    assert!(stderr(&output).contains("there is no [agents.nobody]"), "{}", stderr(&output));
    let output = countersign(&["policy", "test", "--config", path(&file), "/none.toml"]);
    assert!(code(&output) == 1 && stderr(&output).contains("can't read /none.toml"), "{}", stderr(&output));
}

// --- the record -------------------------------------------------------------------------------------------------------------

const GRANT: [u8; 16] = [7; 16];

fn request() -> Request {
    Request {
        agent: AgentFacts {
            id: AgentId::new("spiffe://corp.example/agent/ops/7").unwrap(),
            name: "ops agent".to_owned(),
            issuer: "spiffe://corp.example".to_owned(),
            method: "jwt-svid".to_owned(),
            attributes: std::collections::BTreeMap::new(),
            launcher: None,
            owner: Some(PersonId::new("ana").unwrap()),
            team: None,
        },
        task: TaskName::new("INC-42").unwrap(),
        intent: "look\u{1b}[2Jat it".to_owned(),
        permissions: vec![Permission {
            resource: ResourceName::new("postgres/billing").unwrap(),
            actions: [countersign::core::id::ActionName::new("read").unwrap()].into(),
            constraints: std::collections::BTreeMap::new(),
        }],
        life_secs: 300,
        parent: None,
        chain: Vec::new(),
        excluded_voters: std::collections::BTreeSet::new(),
        heartbeat_secs: None,
        confirmation: None,
        idempotency: None,
        content: Digest::of_bytes(b"content"),
    }
}

/// A data folder with a closed journal: a run, a request that policy refused, a freeze, and `more` runs' ends.
fn record(more: usize) -> tempfile::TempDir {
    let data = tempfile::tempdir().unwrap();
    let grant = |version, what| Event::Grant { id: GrantId::from_bytes(GRANT), version, what: Box::new(what) };
    let mut events = vec![
        Event::Broker { what: BrokerEvent::ConfigurationLoaded { hashes: std::collections::BTreeMap::new() } },
        grant(1, GrantEvent::Requested { request: request() }),
        grant(
            2,
            GrantEvent::Denied {
                by: DeniedBy::Policy { rule: "never-secrets".to_owned(), policy_version: "1".to_owned() },
                reason: "not this".to_owned(),
            },
        ),
        Event::Frozen { id: 1, selector: Selector::All, by: PersonId::new("ana").unwrap(), reason: "drill".to_owned() },
    ];
    events.extend((0..more).map(|_| Event::Broker { what: BrokerEvent::RunEnded }));
    let dir = data.path().join("journal");
    let (journal, _) = Journal::open(&dir, small(), Arc::new(TickClock::default()), &Acknowledged::default()).unwrap();
    for (i, event) in events.into_iter().enumerate() {
        let record = Record { at: Timestamp(1_700_000_000_000 + i as u64 * 1000), event };
        let batch = Batch { payloads: vec![serde_json::to_vec(&record).unwrap()], ..Batch::default() };
        journal.enqueue(batch).unwrap().wait().unwrap();
    }
    drop(journal); // closes it
    data
}

fn verify(data: &Path, more: &[&str]) -> Output {
    countersign(&[&["audit", "verify", path(data)], more].concat())
}

#[test]
fn a_record_is_verified_offline_and_a_flipped_byte_is_found() {
    let data = record(30);
    let key = key().to_string();
    let output = verify(data.path(), &[]);
    assert_eq!(code(&output), 0);
    assert!(stdout(&output).starts_with("verified up to 34, root "), "{}", stdout(&output));
    assert!(stdout(&output).contains("signature not checked"), "{}", stdout(&output));
    let output = verify(data.path(), &["--key", &key]);
    assert!(code(&output) == 0 && !stdout(&output).contains("not checked"), "{}", stdout(&output));
    let output = verify(&data.path().join("journal"), &["--key", &key, "--json"]);
    let found = json(&output);
    assert_eq!((found["verified"].as_bool(), found["last_seq"].as_u64()), (Some(true), Some(34)), "{found}");

    // A checkpoint that was kept elsewhere.
    let kept = tempfile::tempdir().unwrap();
    let note = kept.path().join("kept.note");
    std::fs::copy(data.path().join("journal").join("checkpoint"), &note).unwrap();
    let output = verify(data.path(), &["--key", &key, "--checkpoint", path(&note)]);
    assert!(
        code(&output) == 0 && stdout(&output).contains("extends checkpoint"),
        "{}{}",
        stdout(&output),
        stderr(&output)
    );
    let other: Verifier = Signer::from_seed("broker.example/journal", &[1; 32]).unwrap().verifier();
    let output = verify(data.path(), &["--key", &other.to_string(), "--checkpoint", path(&note)]);
    assert_eq!((code(&output), stdout(&output)), (1, String::new()), "nobody trusted signed it");

    let segment = std::fs::read_dir(data.path().join("journal"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| countersign::audit::segment::first_seq_of(p.file_name().unwrap().to_str().unwrap()) == Some(1))
        .unwrap();
    let mut bytes = std::fs::read(&segment).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    let output = verify(data.path(), &[]);
    assert_eq!(code(&output), 1);
    let name = segment.file_name().unwrap().to_str().unwrap().to_owned();
    for part in ["the journal breaks in", name.as_str(), "expected:", "found:", "do:"] {
        assert!(stdout(&output).contains(part), "{part}: {}", stdout(&output));
    }
    let output = verify(data.path(), &["--json"]);
    assert_eq!((code(&output), json(&output)["verified"].as_bool()), (1, Some(false)));

    let output = verify(kept.path(), &[]);
    assert!(code(&output) == 1 && stderr(&output).contains("there is no journal in"), "{}", stderr(&output));
}

#[test]
fn the_record_is_told_one_line_a_record() {
    let data = record(30);
    let tail = |more: &[&str]| countersign(&[&["audit", "tail", "--data-dir", path(data.path())], more].concat());
    assert_eq!(stdout(&tail(&[])).lines().count(), 20, "the last ones");
    let text = stdout(&tail(&["--from", "1"]));
    assert_eq!(text.lines().count(), 34);
    let lines: Vec<&str> = text.lines().collect();
    let id = GrantId::from_bytes(GRANT).to_string();
    assert!(lines[1].contains(&id) && lines[1].contains("ops agent asked, for task INC-42"), "{}", lines[1]);
    assert!(lines[2].contains("denied by rule never-secrets; not this"), "{}", lines[2]);
    assert!(lines[3].contains("ana froze everything") && lines[3].contains("drill"), "{}", lines[3]);
    assert!(text.contains("<U+001B>[2J") && !text.contains('\u{1b}'), "nothing in a record commands the terminal (P8)");
    for (i, line) in stdout(&tail(&["--from", "3", "--json"])).lines().enumerate() {
        let record: Value = serde_json::from_str(line).unwrap();
        assert_eq!(record["seq"], i as u64 + 3);
    }
    // The folder also comes from the configuration.
    let config = data.path().join("countersign.toml");
    std::fs::write(&config, "[broker]\ndata_dir = \".\"\n").unwrap();
    let output = countersign(&["audit", "tail", "--config", path(&config), "--from", "34"]);
    assert_eq!(stdout(&output).lines().count(), 1, "{}", stderr(&output));
    let output = countersign(&["audit", "tail"]);
    assert!(code(&output) == 1 && stderr(&output).contains("--data-dir"), "{}", stderr(&output));
}

#[test]
fn one_grant_is_told_whole() {
    let data = record(3);
    let id = GrantId::from_bytes(GRANT).to_string();
    let show = |more: &[&str]| countersign(&[&["audit", "show", "--data-dir", path(data.path())], more].concat());
    let text = stdout(&show(&[&id]));
    for part in [
        &id,
        "denied",
        "ops agent (spiffe://corp.example/agent/ops/7, jwt-svid)",
        "owner: ana",
        "INC-42",
        "| look<U+001B>[2Jat it",
        "reported by the agent",
        "denied by rule never-secrets",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("stopped in good order") && !text.contains('\u{1b}'), "{text}");
    let story = json(&show(&[&id, "--json"]));
    assert_eq!(story["records"].as_array().unwrap().len(), 2, "{story:#}");
    assert_eq!(story["grant"]["state"]["is"], "denied");
    let other = GrantId::from_bytes([8; 16]).to_string();
    let output = show(&[&other]);
    assert!(code(&output) == 1 && stderr(&output).contains("there is nothing of"), "{}", stderr(&output));
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let data = record(30);
    let mut child = Command::new(env!("CARGO_BIN_EXE_countersign"))
        .args(["audit", "tail", "--from", "1", "--follow", "--data-dir", path(data.path())])
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut first = String::new();
    std::io::BufRead::read_line(&mut out, &mut first).unwrap();
    assert!(first.contains("the configuration was loaded"), "{first}");
    child.kill().unwrap(); // --follow has no end of its own
    child.wait().unwrap();

    let mut child = Command::new(env!("CARGO_BIN_EXE_countersign"))
        .args(["audit", "tail", "--from", "1", "--data-dir", path(data.path())])
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((code(&output), stderr(&output)), (0, String::new()));
}
