//! "Nobody approves alone what needs two, nobody approves for their own agent, and no agent approves at all."

#[path = "support/broker.rs"]
mod broker;

use broker::agent::{customers, notes};
use broker::{Answer, Plan, World};
use countersign::client::ReviewerClient;
use countersign::core::secret::Secret;
use countersign::core::vote::Verdict;
use serde_json::json;

async fn world(test: &str) -> Option<World> {
    Plan { people: true, ..Plan::default() }.start(test).await
}

#[tokio::test]
async fn what_cannot_be_undone_takes_two_persons_whatever_their_accounts() {
    let Some(world) = world("story_approval").await else { return };
    let ops = world.agent("ops");
    let id = ops.asked("T-1", customers("purge")).await;
    let shown = ops.show(&id).await;
    assert_eq!(
        (&shown["state"], &shown["tier"], &shown["approvals_needed"]),
        (&json!("pending"), &json!("critical"), &json!(2))
    );

    let ana = world.browser("ana").await;
    ana.approved(&id).await;
    let shown = ops.show(&id).await;
    assert_eq!((&shown["state"], &shown["approvals"]), (&json!("pending"), &json!(1)), "one of two");
    ops.collect(&id).await.problem(409, "state");

    // Again in the same browser, in another one, and through her second account: still one person.
    let form = ana.form(&id).await;
    assert!(form.digest.is_none() && form.page.contains("You have voted already"), "{}", form.page);
    let digest = digest_of(&world, &id).await;
    for again in [ana, world.browser("ana").await, world.browser("ana-second").await] {
        let mut form = again.form(&id).await;
        form.typed = Some("api/customers".to_owned());
        let answer = again.vote(&id, &form, &digest, "approve", "").await;
        assert!(
            answer.status == 409 && answer.text().contains("already voted"),
            "{}: {}",
            answer.status,
            answer.text()
        );
    }
    assert_eq!(ops.show(&id).await["approvals"], 1);

    // The agent's owner, through either account, and somebody whom policy doesn't let vote.
    for (who, status, says) in [
        ("dora", 403, "may not decide about this request"),
        ("dora-second", 403, "may not decide about this request"),
        ("otto", 403, "You may not do this"),
    ] {
        let browser = world.browser(who).await;
        let mut form = browser.form(&id).await;
        assert!(form.digest.is_none(), "{who} is offered no vote");
        form.typed = Some("api/customers".to_owned());
        for verdict in ["approve", "deny"] {
            let answer = browser.vote(&id, &form, &digest, verdict, "").await;
            assert!(answer.status == status && answer.text().contains(says), "{who}: {}", answer.text());
        }
    }
    // Who may not see it gets no difference from what doesn't exist.
    let eve = world.browser("eve").await;
    let unknown = eve.get("/grants/gr_00000000000000000000000000").await;
    let hidden = eve.get(&format!("/grants/{id}")).await;
    assert_eq!((unknown.status, hidden.status), (404, 404));
    assert_eq!(ops.show(&id).await["approvals"], 1);

    world.browser("ben").await.approved(&id).await;
    let shown = ops.show(&id).await;
    assert_eq!((&shown["state"], &shown["approvals"]), (&json!("active"), &json!(2)));
    ops.collect(&id).await.ok();
    ops.complete(&id).await.ok();
}

/// The digest that stands, as somebody sees it who may vote.
async fn digest_of(world: &World, id: &str) -> String {
    world.browser("chen").await.form(id).await.digest.expect("chen may vote")
}

#[tokio::test]
async fn d1_a_stored_session_denies_and_never_approves() {
    let Some(world) = world("story_approval").await else { return };
    let ops = world.agent("ops");
    let ana = world.browser("ana").await;
    let session = ana.cli_session().await;
    let ca = world.file("ca.pem");
    let cli = ReviewerClient::new(&world.ports.reviewer_url(), Some(&ca), Some(Secret::new(session.clone()))).unwrap();
    assert_eq!(cli.me().await.unwrap().person, "ana");

    let id = ops.asked("T-1", customers("read")).await;
    let grant = id.parse().unwrap();
    let review = cli.review(grant).await.unwrap();
    let digest = review.digest.unwrap();
    let refused = cli.vote(grant, Verdict::Approve, digest, None).await.unwrap_err();
    assert_eq!(refused.word(), Some("not-allowed"), "{refused}");
    assert!(refused.to_string().contains("open the page in the browser"), "{refused}");
    assert_eq!(ops.state(&id).await, "pending");

    // The stored session is no cookie, so a browser that an agent drives can't be given it.
    let page = world.http.get(format!("{}/grants/{id}", world.ports.reviewer_url()));
    let page = Answer::of(page.header("cookie", format!("__Host-countersign={session}"))).await;
    if page.status == 200 {
        let csrf = broker::browser::field(&page.text(), "csrf").unwrap();
        let thief = broker::browser::Browser {
            base: ana.base.clone(),
            http: world.http.clone(),
            cookie: format!("__Host-countersign={session}"),
        };
        let form = broker::browser::Form { csrf, digest: None, typed: None, page: String::new() };
        let answer = thief.vote(&id, &form, &digest.to_string(), "approve", "").await;
        assert_eq!(answer.status, 403, "{}", answer.text());
    }
    assert_eq!(ops.state(&id).await, "pending");

    cli.vote(grant, Verdict::Deny, digest, Some("not today".to_owned())).await.unwrap();
    let shown = ops.show(&id).await;
    assert_eq!((&shown["state"], &shown["reason"]), (&json!("denied"), &json!("not today")));
}

#[tokio::test]
async fn p10_an_agent_reaches_nothing_of_a_reviewer_and_a_reviewer_nothing_of_an_agent() {
    let Some(world) = world("story_approval").await else { return };
    let ops = world.agent("ops");
    let id = ops.asked("T-1", customers("read")).await;
    let mine = ops.asked("T-2", notes()).await;
    let ana = world.browser("ana").await;
    let form = ana.form(&id).await;
    let digest = form.digest.clone().unwrap();

    let reviewer_gets = ["/", "/grants/ID", "/grants/ID/version", "/freeze", "/api/me", "/api/queue", "/api/grants/ID"];
    let reviewer_posts = [
        "/grants/ID/vote",
        "/grants/ID/revoke",
        "/freeze",
        "/unfreeze/1",
        "/logout",
        "/cli/BCDF-BCDF",
        "/api/grants/ID/votes",
        "/api/grants/ID/revoke",
        "/api/freezes",
        "/api/freezes/1/lift",
        "/api/logout",
    ];
    let vote = json!({ "verdict": "approve", "digest": digest });
    // With its token, with its certificate, and with its token as a cookie.
    let base = world.ports.reviewer_url();
    let by_certificate = world.agent_mtls("ops");
    let token = ops.token.clone().unwrap();
    let as_cookie = format!("__Host-countersign={token}");
    for path in reviewer_gets {
        let url = format!("{base}{}", path.replace("ID", &id));
        for request in [
            world.http.get(&url).bearer_auth(&token),
            by_certificate.http.get(&url),
            world.http.get(&url).header("cookie", &as_cookie).header("sec-fetch-site", "same-origin"),
        ] {
            closed(path, &Answer::of(request).await);
        }
    }
    for path in reviewer_posts {
        let url = format!("{base}{}", path.replace("ID", &id));
        let fields = [("csrf", form.csrf.as_str()), ("digest", &digest), ("verdict", "approve"), ("reason", "x")];
        for request in [
            world.http.post(&url).bearer_auth(&token).json(&vote),
            by_certificate.http.post(&url).json(&vote),
            world.http.post(&url).bearer_auth(&token).form(&fields),
            world.http.post(&url).header("cookie", &as_cookie).header("sec-fetch-site", "same-origin").form(&fields),
        ] {
            closed(path, &Answer::of(request).await);
        }
    }
    assert_eq!(ops.state(&id).await, "pending");

    // The reviewer's cookie, and its value as a bearer, at the agents' doors.
    let value = ana.cookie.split_once('=').unwrap().1.to_owned();
    let agents = world.ports.agent_url();
    for (method, path) in [
        ("POST", "/v1/grants"),
        ("GET", "/v1/grants/ID"),
        ("POST", "/v1/grants/ID/credentials"),
        ("POST", "/v1/grants/ID/complete"),
        ("POST", "/v1/grants/ID/cancel"),
        ("POST", "/v1/grants/ID/heartbeat"),
        ("POST", "/v1/grants/ID/invocations"),
        ("POST", "/v1/tasks/T-2/complete"),
        ("GET", "/v1/catalogue"),
        ("POST", "/introspect"),
    ] {
        let url = format!("{agents}{}", path.replace("ID", &mine));
        let make = || world.http.request(method.parse().unwrap(), &url).json(&json!({}));
        Answer::of(make().header("cookie", &ana.cookie).header("origin", &base)).await.problem(401, "identity");
        Answer::of(make().bearer_auth(&value)).await.problem(401, "identity");
    }
    assert_eq!(ops.state(&mine).await, "active");
}

#[track_caller]
fn closed(path: &str, answer: &Answer) {
    let to_login = answer.status == 303 && answer.header("location") == "/login";
    assert!(to_login || matches!(answer.status, 401 | 403), "{path}: {} {}", answer.status, answer.text());
    assert!(!answer.text().contains("customers"), "{path} tells nothing");
}

#[tokio::test]
async fn p6_a_form_from_another_page_decides_nothing_and_p7_a_get_never_does() {
    let Some(world) = world("story_approval").await else { return };
    let ops = world.agent("ops");
    let id = ops.asked("T-1", customers("read")).await;
    let ana = world.browser("ana").await;
    let form = ana.form(&id).await;
    let digest = form.digest.clone().unwrap();
    let path = format!("/grants/{id}/vote");
    let fields = [("csrf", form.csrf.as_str()), ("digest", &digest), ("verdict", "approve")];
    let base = ana.base.clone();

    // From elsewhere: another site, a sibling, another scheme or port, the agents' listener, a sandboxed frame.
    for (site, origin) in [
        (Some("cross-site"), Some("https://evil.example")),
        (Some("cross-site"), None),
        (Some("same-site"), Some(base.as_str())),
        (None, Some("null")),
        (None, Some("https://evil.example")),
        (None, Some(base.replace("https", "http").as_str())),
        (None, Some(world.ports.agent_url().as_str())),
        (Some("same-origin"), Some("https://evil.example")),
        (None, None),
    ] {
        for (path, fields) in [
            (path.clone(), fields.to_vec()),
            (format!("/grants/{id}/revoke"), vec![("csrf", form.csrf.as_str()), ("reason", "x")]),
            ("/freeze".to_owned(), vec![("csrf", form.csrf.as_str()), ("kind", "all"), ("reason", "x")]),
            ("/logout".to_owned(), vec![("csrf", form.csrf.as_str())]),
        ] {
            let answer = ana.post_from(&path, &fields, site, origin).await;
            assert_eq!(answer.problem(403, "cross-site"), "this form did not come from a page of this broker");
        }
    }
    // From here, but without the token of this session: none, empty, wrong, another session's, twice.
    let other = world.browser("ana").await.csrf().await;
    for csrf in [vec![], vec![""], vec!["wrong"], vec![other.as_str()], vec![form.csrf.as_str(), form.csrf.as_str()]] {
        let mut fields = vec![("digest", digest.as_str()), ("verdict", "approve")];
        fields.extend(csrf.iter().map(|c| ("csrf", *c)));
        let answer = ana.post(&path, &fields).await;
        assert!(matches!(answer.status, 400 | 403), "{}: {}", answer.status, answer.text());
    }
    // A prefetch, a click on a link, a crafted link: nothing but looking.
    for link in [
        format!("/grants/{id}"),
        format!("/grants/{id}/vote"),
        format!("/grants/{id}/vote?csrf={}&digest={digest}&verdict=approve", form.csrf),
        format!("/grants/{id}/revoke?csrf={}&reason=x", form.csrf),
        format!("/freeze?kind=all&reason=x&step=confirm&typed=freeze&csrf={}", form.csrf),
        "/unfreeze/1".to_owned(),
        format!("/logout?csrf={}", form.csrf),
    ] {
        let answer = ana.get(&link).await;
        assert!(matches!(answer.status, 200 | 404 | 405), "{link}: {}", answer.status);
    }
    assert_eq!(ops.state(&id).await, "pending");

    // What every page says about frames, scripts and caches.
    let page = ana.get(&format!("/grants/{id}")).await;
    for (name, part) in [
        ("content-security-policy", "frame-ancestors 'none'"),
        ("content-security-policy", "default-src 'none'"),
        ("x-frame-options", "DENY"),
        ("x-content-type-options", "nosniff"),
        ("cache-control", "no-store"),
        ("cross-origin-opener-policy", "same-origin"),
    ] {
        assert!(page.header(name).contains(part), "{name}: {:?}", page.headers);
    }
    // And the same form from its own page counts.
    assert_eq!(ana.post(&path, &fields).await.status, 303);
    assert_eq!(ops.state(&id).await, "active");
}

#[tokio::test]
async fn a_vote_is_about_what_was_shown_and_d14_not_about_its_twin() {
    let Some(world) = world("story_approval").await else { return };
    let ops = world.agent("ops");
    let (first, twin) = (ops.asked("T-1", customers("read")).await, ops.asked("T-1", customers("read")).await);
    assert_ne!(first, twin);
    let ana = world.browser("ana").await;
    let (one, two) = (ana.form(&first).await, ana.form(&twin).await);
    let (digest, other) = (one.digest.clone().unwrap(), two.digest.clone().unwrap());
    assert_ne!(digest, other, "twins have digests of their own");

    // The other's digest, one that nobody ever saw, and none at all.
    for wrong in [other.as_str(), &"0".repeat(64)] {
        let answer = ana.vote(&first, &one, wrong, "approve", "").await;
        assert!(answer.status == 409 && answer.text().contains("look at it again"), "{}", answer.text());
    }
    assert_eq!(ana.vote(&first, &one, "", "approve", "").await.status, 400);
    ana.approved(&first).await;
    assert_eq!((ops.state(&first).await, ops.state(&twin).await), ("active".to_owned(), "pending".to_owned()));
    ops.collect(&twin).await.problem(409, "state");

    // Decided is decided.
    for verdict in ["approve", "deny"] {
        let answer = ana.vote(&first, &one, &digest, verdict, "").await;
        assert_eq!(answer.status, 409, "{}", answer.text());
    }
    assert_eq!(ops.state(&first).await, "active");
    // The agent takes the twin back: a vote that was on its way counts no more.
    ops.cancel(&twin).await.ok();
    assert_eq!(ana.vote(&twin, &two, &other, "approve", "").await.status, 409);
    assert_eq!(ops.state(&twin).await, "cancelled");
}
