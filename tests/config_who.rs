//! Mistakes about whom the broker believes: issuers, trust domains, people, agents. Each case is one change of the
//! shipped example, refused at its line with what to do.

mod support;

use support::{Example, MAIN, each_is_refused, problems};

#[test]
fn whom_the_broker_believes() {
    each_is_refused(&[
        (
            MAIN,
            "require = { repository_owner_id = [\"9919\"] }",
            "",
            "[[issuer]]",
            "GitHub Actions: pin `repository_id` or `repository_owner_id` under `require`",
        ),
        (
            MAIN,
            "require = { repository_owner_id = [\"9919\"] }",
            "require = { repository = [\"acme/billing\"] }",
            "require = ",
            "pin `repository_id`",
        ),
        (
            MAIN,
            "repository_owner_id = [\"9919\"]",
            "repository_owner_id = [\"acme\"]",
            "repository_owner_id",
            "is a number",
        ),
        (
            MAIN,
            "repository_owner_id = [\"9919\"]",
            "repository_owner_id = [\"*\"]",
            "repository_owner_id",
            "needs exact values; `*` has no meaning",
        ),
        (
            MAIN,
            "preset = \"github-actions\"",
            "preset = \"gitlab\"",
            "require = ",
            "GitLab: pin `project_id` or `namespace_id`",
        ),
        (
            MAIN,
            "algorithms = [\"RS256\", \"ES256\"]",
            "algorithms = [\"HS256\"]",
            "HS256",
            "`algorithms` may name: ES256, ES384, RS256, PS256, EdDSA",
        ),
        (
            MAIN,
            "algorithms = [\"RS256\", \"ES256\"]",
            "algorithms = [\"none\"]",
            "\"none\"]",
            "`algorithms` may name: ES256, ES384, RS256, PS256, EdDSA",
        ),
        (
            MAIN,
            "algorithms = [\"RS256\", \"ES256\"]",
            "algorithms = [\"RS384\"]",
            "RS384",
            "`algorithms` may name: ES256",
        ),
        (MAIN, "\"/kubernetes.io/node/name\"", "\"a..b\"", "a..b", "a claim path must be like `a.b`"),
        (MAIN, "{ node = ", "{ Node = ", "Node", "an attribute's name must be 1 to 64 lower-case letters"),
        (MAIN, "groups_claim = \"groups\"", "groups_claim = \"a..b\"", "a..b", "a claim path must be like `a.b`"),
        (
            MAIN,
            "repository_owner_id = [\"9919\"]",
            "repository_owner_id = [\"9919\"], \"a..b\" = [\"x\"]",
            "a..b",
            "a claim path must be like `a.b`",
        ),
        (MAIN, "algorithms = [\"RS256\", \"ES256\"]", "algorithms = []", "algorithms = []", "`algorithms` may name"),
        (MAIN, "audience = \"countersign\"", "audience = \"\"", "audience = \"\"", "must name the exact audience"),
        (
            MAIN,
            "token_life_secs_max = 3600",
            "token_life_secs_max = 9999999",
            "token_life_secs_max",
            "must be from 1 to 604800",
        ),
        (
            MAIN,
            "tier_max = \"change\"",
            "tier_max = \"chnge\"",
            "chnge",
            "there is no tier `chnge`; there are: change, critical",
        ),
        (
            MAIN,
            "trust_domains = [\"corp.example\"]",
            "trust_domains = [\"corp.example\", \"other.example\"]",
            "trust_domains",
            "no bundle for `other.example`",
        ),
        (
            MAIN,
            "trust_domains = [\"corp.example\"]",
            "trust_domains = [\"corp.example\", \"SPIFFE://x\"]",
            "trust_domains",
            "lower-case letters",
        ),
        (
            MAIN,
            "# workload_api = \"unix:///run/spire/agent.sock\"",
            "workload_api = \"https://spire\"",
            "workload_api = ",
            "must be `unix:///PATH`",
        ),
        (
            MAIN,
            "session_idle_secs_max = 1800",
            "session_idle_secs_max = 50000",
            "session_idle_secs_max",
            "must be from 1 to 43200",
        ),
        (MAIN, "client_id = \"countersign\"", "client_id = \"\"", "client_id", "must name the client"),
    ]);
}

#[test]
fn a_bundle_alone_admits_nobody() {
    let e = Example::new();
    e.replace(MAIN, "bundles = {", "bundles = { \"other.example\" = \"../certs/broker.pem\",");
    let found = problems(&e);
    assert!(
        found[0].what.contains("`other.example` isn't in `trust_domains`, so its bundle admits nobody"),
        "{found:#?}"
    );
}

#[test]
fn an_issuer_twice() {
    let e = Example::new();
    e.append(MAIN, "[[issuer]]\nissuer = \"https://kubernetes.corp.example\"\npreset = \"generic\"\naudience = \"x\"");
    let found = problems(&e);
    assert!(
        found[0].what.contains("issuer `https://kubernetes.corp.example` is there already, at countersign.toml:"),
        "{found:#?}"
    );
}

#[test]
fn people() {
    each_is_refused(&[(
        MAIN,
        "subject = \"248289761003\"",
        "subject = \"248289761001\"",
        "248289761001\" }]",
        "person ben: this account belongs to person ana already",
    )]);
    let e = Example::new();
    e.replace(MAIN, "id = \"ben\"", "id = \"chen\"");
    let found = problems(&e);
    assert!(
        found.iter().any(|p| p.what.contains("person `chen` is there already, at countersign.toml:")),
        "{found:#?}"
    );
    assert!(found.iter().any(|p| p.what.contains("no [[person]] with id `ben`")), "{found:#?}");
    each_is_refused(&[
        (
            MAIN,
            "issuer = \"https://login.corp.example\", subject = \"248289761003\"",
            "issuer = \"https://login.corp.example/\", subject = \"248289761003\"",
            "248289761003",
            "by a trailing `/`",
        ),
        (MAIN, "subject = \"248289761003\"", "subject = \"\"", "subject = \"\"", "1 to 255 visible characters"),
        (MAIN, "name = \"Ben Okafor\"", "name = \"Ben\\u0007\"", "name = \"Ben", "no control characters"),
    ]);
}

#[test]
fn agents() {
    each_is_refused(&[
        (
            MAIN,
            "owner = \"ana\"",
            "owner = \"anna\"",
            "owner = \"anna\"",
            "`owner` must be a person: there is no [[person]] with id `anna`",
        ),
        (
            MAIN,
            "match = \"spiffe://corp.example/agent/*\"",
            "match = \"spiffe://*\"",
            "spiffe://*",
            "crosses trust domains",
        ),
        (
            MAIN,
            "match = \"spiffe://corp.example/agent/*\"",
            "match = \"spiffe://corp.example*\"",
            "spiffe://corp.example*",
            "crosses trust domains",
        ),
        (MAIN, "match = \"spiffe://corp.example/agent/*\"", "match = \"*\"", "match = \"*\"", "crosses issuers"),
        (
            MAIN,
            "match = \"spiffe://corp.example/agent/*\"",
            "match = \"spiffe://corp.example/*/x\"",
            "/*/x",
            "`*` may only stand at the end",
        ),
        (
            MAIN,
            "match = \"spiffe://corp.example/agent/*\"",
            "match = \"spiffe://corp.example/agent*\"",
            "agent*",
            "`*` must stand after `/`, `:` or `#`",
        ),
        (
            MAIN,
            "match = \"spiffe://corp.example/agent/*\"",
            "match = \"spiffe://other.example/agent/*\"",
            "other.example",
            "nobody can come from trust domain `other.example`",
        ),
        (MAIN, "#repo:acme/billing:*\"", "#repo:acme*\"", "repo:acme*", "`*` must stand after"),
        (
            MAIN,
            "match = \"https://token.actions",
            "match = \"https://tokens.actions",
            "https://tokens.actions",
            "nobody can come from issuer `https://tokens.actions.githubusercontent.com`",
        ),
        (
            MAIN,
            "may_delegate_to = [\"spiffe://corp.example/agent/helper/*\"]",
            "may_delegate_to = [\"spiffe://*\"]",
            "may_delegate_to",
            "crosses trust domains",
        ),
    ]);
    let e = Example::new();
    e.replace(MAIN, "match = \"spiffe://corp.example/agent/ops/*\"", "match = \"spiffe://corp.example/*\"");
    let found = problems(&e);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(found[0].what.contains("this entry is never reached: the one at countersign.toml:"), "{found:#?}");
}
