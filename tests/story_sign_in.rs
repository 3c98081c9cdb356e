//! "I get to the page that I was sent to, nobody can keep me out, and when I sign out I am out."

#[path = "support/broker.rs"]
mod broker;

use broker::agent::customers;
use broker::browser::{Browser, cookie, field};
use broker::{Answer, Plan, World};
use serde_json::{Value, json};

async fn world(limits: &'static str) -> Option<World> {
    Plan { people: true, limits, ..Plan::default() }.start("story_sign_in").await
}

/// Opens a link without a session and signs in: where does that lead? `planted` is a cookie that something else set.
async fn lands(world: &World, link: &str, planted: Option<&str>) -> (String, Browser) {
    let base = world.ports.reviewer_url();
    let first = Answer::of(world.http.get(format!("{base}{link}"))).await;
    assert_eq!((first.status, first.header("location")), (303, "/login"), "{link}");
    let start = Answer::of(world.http.get(format!("{base}/login/start"))).await;
    let kept = [cookie(&start, "__Host-countersign-login"), cookie(&first, "__Host-countersign-way-back")];
    let kept: Vec<String> = kept.into_iter().flatten().chain(planted.map(str::to_owned)).collect();
    let query = world.idp().log_in(start.header("location"), "ana").await;
    let back = world.http.get(format!("{base}/login/callback?{query}")).header("cookie", kept.join("; "));
    let back = Answer::of(back).await;
    assert_eq!(back.status, 303, "{}", back.text());
    let cookie = cookie(&back, "__Host-countersign").expect("a session");
    (back.header("location").to_owned(), Browser { base, http: world.http.clone(), cookie })
}

#[tokio::test]
async fn a_link_leads_to_its_page_through_the_login_and_nowhere_else() {
    let Some(world) = world("").await else { return };
    let id = world.agent("ops").asked("T-1", customers("read")).await;
    let begun = begin(&world, &world.http).await.ok();
    let code = format!("/cli/{}", begun["code"].as_str().unwrap());
    for link in [format!("/grants/{id}"), code] {
        let (to, browser) = lands(&world, &link, None).await;
        assert_eq!(to, link);
        let page = browser.get(&to).await;
        assert_eq!(page.status, 200, "{}", page.text());
    }
    assert_eq!(lands(&world, "/freeze", None).await.0, "/");
    for planted in ["https://evil.example/", "//evil.example/", "/\\evil.example", "/cli//evil.example", "/logout"] {
        let planted = format!("__Host-countersign-way-back={planted}");
        assert_eq!(lands(&world, "/freeze", Some(&planted)).await.0, "/", "{planted}");
    }
}

async fn begin(world: &World, http: &reqwest::Client) -> Answer {
    let url = format!("{}/api/cli-login", world.ports.reviewer_url());
    Answer::of(http.post(url).json(&json!({ "from": "a laptop" }))).await
}

async fn poll(world: &World, poll: &Value) -> Answer {
    let url = format!("{}/api/cli-login/poll", world.ports.reviewer_url());
    Answer::of(world.http.post(url).json(&json!({ "poll": poll }))).await
}

#[tokio::test]
async fn who_begins_logins_without_end_keeps_nobody_out() {
    let Some(world) = world("cli_logins_per_address_max = 5").await else { return };
    for _ in 0..1100 {
        let start = Answer::of(world.http.get(format!("{}/login/start", world.ports.reviewer_url()))).await;
        assert_eq!(start.status, 303, "{}", start.text());
    }
    world.browser("ana").await;
    for _ in 0..5 {
        begin(&world, &world.http).await.ok();
    }
    begin(&world, &world.http).await.problem(429, "too-many");
    let elsewhere = world.client_at("127.0.0.2");
    begin(&world, &elsewhere).await.ok();
}

#[tokio::test]
async fn signing_out_ends_what_was_given_to_a_command_line() {
    let Some(world) = world("").await else { return };
    let ana = world.browser("ana").await;
    let give = async |browser: &Browser| {
        let begun = begin(&world, &world.http).await.ok();
        let path = format!("/cli/{}", begun["code"].as_str().unwrap());
        let csrf = field(&browser.get(&path).await.text(), "csrf").unwrap();
        let fields = [("csrf", csrf.as_str()), ("code", begun["code"].as_str().unwrap()), ("answer", "give")];
        assert_eq!(browser.post(&path, &fields).await.status, 303);
        begun["poll"].clone()
    };
    let collected = poll(&world, &give(&ana).await).await.ok()["session"].as_str().unwrap().to_owned();
    let not_yet = give(&ana).await;
    let me = || Answer::of(world.http.get(format!("{}/api/me", world.ports.reviewer_url())).bearer_auth(&collected));
    assert_eq!(me().await.ok()["person"], "ana");
    let other = world.browser("ana").await;

    let csrf = ana.csrf().await;
    assert_eq!(ana.post("/logout", &[("csrf", &csrf)]).await.status, 200);
    me().await.problem(401, "session");
    poll(&world, &not_yet).await.problem(410, "login-over");
    assert_eq!(other.get("/freeze").await.status, 200, "her session in another browser is another one");
}

#[tokio::test]
async fn r2_what_is_wrong_in_an_address_is_told_in_our_words() {
    let Some(world) = world("").await else { return };
    let ana = world.browser("ana").await;
    let csrf = ana.csrf().await;
    let page = ana.post("/unfreeze/MARK7f3a", &[("csrf", &csrf)]).await;
    assert_eq!(page.status, 404, "{}", page.text());
    let begun = begin(&world, &world.http).await.ok();
    let path = format!("/cli/{}", begun["code"].as_str().unwrap());
    let csrf = field(&ana.get(&path).await.text(), "csrf").unwrap();
    ana.post(&path, &[("csrf", &csrf), ("code", begun["code"].as_str().unwrap()), ("answer", "give")]).await;
    let session = poll(&world, &begun["poll"]).await.ok()["session"].as_str().unwrap().to_owned();
    let base = world.ports.reviewer_url();
    let call = |method: &str, path: &str| {
        let request = world.http.request(method.parse().unwrap(), format!("{base}{path}"));
        Answer::of(request.bearer_auth(&session).json(&json!({})))
    };
    let answers = [
        (call("POST", "/api/freezes/MARK7f3a/lift").await, 404, "not-found"),
        (call("POST", "/api/freezes/-1/lift").await, 404, "not-found"),
        (call("GET", "/api/grants/%ffMARK7f3a").await, 404, "no-such-address"),
        (call("GET", "/api/MARK7f3a").await, 404, "no-such-address"),
        (call("DELETE", "/api/me").await, 405, "method"),
        (world.agent("ops").get("/v1/grants").await, 405, "method"),
    ];
    for (answer, status, word) in answers {
        answer.problem(status, word);
        assert!(!answer.text().contains("MARK7f3a"), "{}", answer.text());
    }
    let page = Answer::of(world.http.delete(format!("{base}/login"))).await;
    assert!(page.status == 405 && page.header("content-type").starts_with("text/html"), "{:?}", page.headers);
    assert!(page.header("allow").contains("GET"), "{:?}", page.headers);
}
