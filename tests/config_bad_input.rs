//! Every mistake in the configuration is refused, at its line, with what to do. Each case is one change of the
//! shipped example.

mod support;

use std::net::SocketAddr;

use support::{CAT, Example, MAIN, each_is_refused, line, problems};

#[test]
fn unknown_missing_and_misplaced_keys() {
    each_is_refused(&[
        (
            MAIN,
            "sweep_every_secs = 300",
            "sweep_every_sec = 300",
            "sweep_every_sec =",
            "unknown key `sweep_every_sec`; known here: one of",
        ),
        (MAIN, "[limits]", "[limit]", "[limit]", "unknown key `limit`; known here: broker, listen"),
        (MAIN, "policies = \"policies\"", "", "[broker]", "missing key `policies`; add it"),
        (
            MAIN,
            "friction = \"none\"",
            "friction = \"no\"",
            "friction = \"no\"",
            "unknown value, expected one of `none`",
        ),
        (MAIN, "approvals = 2", "approvals = \"two\"", "approvals = \"two\"", "a string, expected u8"),
        (MAIN, "preset = \"kubernetes\"", "preset = \"k8s\"", "\"k8s\"", "expected one of `github-actions`"),
        (MAIN, "agent = \"0.0.0.0:8443\"", "agent = \"here\"", "agent = \"here\"", "invalid socket address"),
        (MAIN, "name_prefix = \"cslease\"", "name_prefix = \"CS\"", "\"CS\"", "a name prefix has 2 to 21 characters"),
        (MAIN, "name = \"observe\"", "name = \"Observe\"", "\"Observe\"", "tier name is malformed"),
        (CAT, "labels = [\"outside\"]", "label = [\"outside\"]", "label = ", "unknown key `label`; known here"),
        (CAT, "effect = \"delete\"", "effect = \"destroy\"", "destroy", "expected one of `read`, `export`"),
        (CAT, "reaches_production = false", "", "[[environment]]", "missing key `reaches_production`"),
        (CAT, "kind = \"set\"", "kind = \"list\"", "\"list\"", "expected one of `set`, `paths`, `max`"),
        (CAT, "name = \"api/demo\"", "name = \"API\"", "\"API\"", "resource name is malformed"),
    ]);
}

#[test]
fn toml_that_is_none() {
    let e = Example::new();
    e.replace(MAIN, "issuer = \"https://broker.corp.example:8443\"", "issuer = ");
    let found = problems(&e);
    assert_eq!(found[0].place, format!("{MAIN}:{}", line(&e.read(MAIN), "issuer = ")));
    assert!(found[0].what.starts_with("this isn't TOML"), "{found:#?}");
}

#[test]
fn a_section_that_is_missing() {
    let e = Example::new();
    e.write(MAIN, "[broker]\nissuer='https://a'\nreviewer_url='https://b'\ndata_dir='/x'\ncatalogue='catalogue.toml'\npolicies='policies'\n");
    let found = problems(&e);
    assert_eq!(found.len(), 2, "{found:#?}");
    assert!(found[0].what.contains("the section `listen` is missing"), "{found:#?}");
    assert!(found[1].what.contains("the section `tier` is missing"), "{found:#?}");
}

#[test]
fn addresses_and_urls() {
    each_is_refused(&[
        (
            MAIN,
            "issuer = \"https://broker.corp.example:8443\"",
            "issuer = \"http://broker.corp.example\"",
            "http://broker",
            "must begin with https://",
        ),
        (
            MAIN,
            "issuer = \"https://broker.corp.example:8443\"",
            "issuer = \"broker\"",
            "issuer = \"broker\"",
            "isn't a URL",
        ),
        (
            MAIN,
            "issuer = \"https://broker.corp.example:8443\"",
            "issuer = \"https://BROKER.corp.example\"",
            "BROKER",
            "isn't in its normal form; write https://broker.corp.example",
        ),
        (
            MAIN,
            "reviewer_url = \"https://countersign.corp.example\"",
            "reviewer_url = \"https://countersign.corp.example/\"",
            "reviewer_url",
            "must not end in `/`",
        ),
        (
            MAIN,
            "reviewer_url = \"https://countersign.corp.example\"",
            "reviewer_url = \"https://a:b@countersign.corp.example\"",
            "reviewer_url",
            "no user, query or fragment",
        ),
        (
            MAIN,
            "issuer = \"https://kubernetes.corp.example\"",
            "issuer = \"https://kubernetes.corp.example#x\"",
            "example#x",
            "no user, query or fragment",
        ),
        (
            MAIN,
            "reviewer = \"0.0.0.0:443\"",
            "reviewer = \"0.0.0.0:8443\"",
            "reviewer = ",
            "`reviewer` and `agent` have the same address",
        ),
        (MAIN, "tls_key = \"file:../certs/broker-key.pem\"", "", "tls_cert", "belong together"),
        (
            MAIN,
            "combination_window_secs = 86400",
            "combination_window_secs = 0",
            "combination_window_secs",
            "must be from 1 to 2592000",
        ),
        (
            MAIN,
            "decide_within_secs = 3600",
            "decide_within_secs = 604801",
            "decide_within_secs",
            "must be from 1 to 604800",
        ),
        (MAIN, "sweep_every_secs = 300", "sweep_every_secs = 0", "sweep_every_secs", "must be from 1 to 86400"),
    ]);
}

#[test]
fn what_is_reachable_from_outside_has_tls() {
    let e = Example::new();
    e.replace(MAIN, "tls_cert = \"../certs/broker.pem\"\ntls_key = \"file:../certs/broker-key.pem\"", "");
    let found = problems(&e);
    let says: Vec<&str> = found.iter().map(|p| p.what.as_str()).collect();
    assert_eq!(says.iter().filter(|s| s.contains("is reachable from outside; set `tls_cert`")).count(), 3, "{says:#?}");
    assert!(says.iter().any(|s| s.contains("mutual TLS needs `tls_cert`")), "{says:#?}");
    // On loopback it may go without, as `dev` does.
    for (from, to) in [("0.0.0.0", "127.0.0.1"), ("agent_mtls = \"127.0.0.1:8444\"", "")] {
        e.replace(MAIN, from, to);
    }
    let loaded = e.load().unwrap();
    assert_eq!(loaded.config.listen.agent, "127.0.0.1:8443".parse::<SocketAddr>().unwrap());
}

#[test]
fn secrets_and_files_that_cannot_be_read() {
    each_is_refused(&[
        (MAIN, "file:../certs/broker-key.pem", "file:../certs/nothing.key", "nothing.key", "can't read the secret in"),
        (
            MAIN,
            "file:../certs/secrets/reviewer-login",
            "env:COUNTERSIGN_TEST_NOT_SET",
            "NOT_SET",
            "the environment variable COUNTERSIGN_TEST_NOT_SET is not set; set it",
        ),
        (
            MAIN,
            "file:../certs/secrets/reviewer-login",
            "hunter2",
            "client_secret",
            "must be a reference, `env:NAME` or `file:PATH`, not the secret itself",
        ),
        (MAIN, "tls_cert = \"../certs/broker.pem\"", "tls_cert = \"../certs/none.pem\"", "none.pem", "can't open"),
        (MAIN, "../certs/bundles/corp.example.pem", "../certs/none.pem", "none.pem", "can't open"),
        (CAT, "file:../certs/secrets/billing-db", "file:../certs/none", "certs/none", "can't read the secret in"),
        (CAT, "file:../certs/secrets/billing-db", "hunter2", "hunter2", "`password`: a secret must be a reference"),
    ]);
    let e = Example::new();
    e.replace(CAT, "file:../certs/secrets/billing-db", "hunter2");
    e.replace(MAIN, "file:../certs/secrets/reviewer-login", "hunter2");
    assert!(!format!("{:?}", problems(&e)).contains("hunter2"), "a secret in the wrong place is not echoed");
    std::fs::write(e.file("../certs/broker-key.pem"), "").unwrap();
    assert!(problems(&e).iter().any(|p| p.what.contains("is empty, not UTF-8, or larger")));
}

#[test]
fn tiers() {
    let one = |from: &str, to: &str, says: &str| {
        let e = Example::new();
        let text = e.read(MAIN);
        assert!(text.contains(from), "{from:?}");
        e.write(MAIN, &text.replacen(from, to, 1));
        let found = problems(&e);
        assert!(found.iter().any(|p| p.what.contains(says)), "{to:?}: {found:#?}");
        assert!(found.iter().all(|p| p.place.starts_with("countersign.toml:")), "{found:#?}");
    };
    one("approvals = 2", "approvals = 1", "tier critical: friction `critical` is two persons: set approvals = 2");
    one(
        "approvals = 2",
        "approvals = 0",
        "tier critical asks for less than change before it; tiers stand in order of strictness",
    );
    one("approvals = 2", "approvals = 17", "`approvals` is 17; it must be from 0 to 16");
    one("friction = \"high\"", "friction = \"none\"", "tier change: friction `none` and 0 approvals belong together");
    one("life_secs_max = 900", "life_secs_max = 0", "`life_secs_max` is 0; it must be from 1 to 604800");
    one("life_secs_max = 900", "life_secs_max = 604801", "`life_secs_max` is 604801; it must be from 1 to 604800");
    one("name = \"change\"", "name = \"export\"", "tier `export` is there already");
}

#[test]
fn limits_have_hard_bounds() {
    for (key, low, high) in [
        ("body_bytes_max", 1023, 1_048_577),
        ("json_depth_max", 3, 65),
        ("header_bytes_max", 4095, 262_145),
        ("pending_per_agent_max", 0, 10_001),
        ("open_grants_per_agent_max", 0, 100_001),
        ("requests_per_agent_per_sec", 0, 100_001),
        ("requests_per_agent_burst", 0, 100_001),
        ("connections_max", 0, 100_001),
        ("handshake_ms_max", 99, 60_001),
        ("header_read_ms_max", 99, 60_001),
        ("wait_secs_max", 0, 301),
        ("delegation_depth_max", -1, 17),
        ("invocations_per_grant_max", 0, 100_001),
        ("intent_chars_max", 15, 4_001),
        ("refusals_per_agent_per_min", 0, 10_001),
    ] {
        for beyond in [low, high] {
            let e = Example::new();
            let text = e.read(MAIN);
            let was = text.lines().find(|l| l.starts_with(&format!("{key} = "))).unwrap();
            e.write(MAIN, &text.replace(was, &format!("{key} = {beyond}")));
            let found = problems(&e);
            assert_eq!(found.len(), 1, "{key} = {beyond}: {found:#?}");
            assert_eq!(found[0].place, format!("{MAIN}:{}", line(&e.read(MAIN), &format!("{key} = "))));
            assert!(
                beyond < 0 || found[0].what.contains(&format!("`{key}` is {beyond}; it must be from")),
                "{found:#?}"
            );
        }
    }
}

#[test]
fn every_problem_of_every_file_is_found_in_one_pass() {
    let e = Example::new();
    e.replace(MAIN, "sweep_every_secs = 300", "sweep_every_secs = 300\nsweep = 1\nswept = 2");
    e.replace(MAIN, "owner = \"ana\"", "owner = \"anna\"");
    e.replace(MAIN, "repository_owner_id = [\"9919\"]", "repository = [\"a/b\"]");
    e.replace(CAT, "kind = \"vault\"", "kind = \"valt\"");
    e.replace(CAT, "effect = \"delete\"", "effect = \"destroy\"");
    e.replace(CAT, "target = \"sandbox-db\"", "target = \"sandbox\"");
    let found = problems(&e);
    let says: Vec<String> = found.iter().map(|p| p.what.clone()).collect();
    for part in [
        "`sweep`",
        "`swept`",
        "`anna`",
        "pin `repository_id`",
        "no such connector",
        "`read`, `export`",
        "named `sandbox`",
    ] {
        assert!(says.iter().any(|s| s.contains(part)), "{part}: {says:#?}");
    }
    assert_eq!(found.len(), 7, "no problem makes a second one: {says:#?}");
    let all = countersign::config::ConfigError(found).to_string();
    assert_eq!(all.lines().count(), 7, "{all}");
}

#[test]
fn files_that_are_not_there_or_too_large() {
    let e = Example::new();
    e.replace(MAIN, "catalogue = \"catalogue.toml\"", "catalogue = \"none.toml\"");
    e.replace(MAIN, "policies = \"policies\"", "policies = \"none\"");
    let found = problems(&e);
    assert!(found.iter().any(|p| p.place == "none.toml" && p.what.contains("can't open")), "{found:#?}");
    assert!(found.iter().any(|p| p.place == "none" && p.what.contains("can't read the policies folder")), "{found:#?}");

    let e = Example::new();
    std::fs::create_dir(e.file("empty")).unwrap();
    e.replace(MAIN, "policies = \"policies\"", "policies = \"empty\"");
    assert!(problems(&e)[0].what.contains("there is no *.cedar file, so everything would be denied"));

    for (file, max) in [(MAIN, 1 << 20), (CAT, 8 << 20), ("policies/10-observe.cedar", 1 << 20)] {
        let e = Example::new();
        let fill = |n: usize| {
            let text = e.read(file);
            let comment = if file.ends_with("cedar") { "//" } else { "#" };
            format!("{text}{comment}{}", "x".repeat(n - text.len() - comment.len()))
        };
        let (fits, beyond) = (fill(max), fill(max + 1));
        e.write(file, &fits);
        assert_eq!(problems(&e), [], "{file}");
        e.write(file, &beyond);
        let found = problems(&e);
        assert!(found[0].what.contains("is larger than"), "{found:#?}");
    }
    let e = Example::new();
    std::fs::write(e.file(CAT), b"\xff\xfe").unwrap();
    assert!(problems(&e)[0].what.contains("isn't UTF-8"));
}

#[test]
fn what_works_and_is_hardly_meant_is_a_warning() {
    let e = Example::new();
    e.replace(MAIN, "https://countersign.corp.example", "https://192.0.2.7");
    let warnings = e.load().unwrap().warnings;
    assert!(warnings[0].what.contains("a relying party can't be an IP address"), "{warnings:#?}");
    let e = Example::new();
    e.replace(MAIN, "approvals = 2", "approvals = 3");
    let warnings = e.load().unwrap().warnings;
    let few = "tier critical needs 3 approvals beside the agent's owner";
    assert!(warnings.iter().any(|w| w.what.contains(few)), "{warnings:#?}");
}
