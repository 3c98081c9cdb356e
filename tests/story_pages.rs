//! "I see what will be minted, decide once, watch it live, take it away, and read the proof", in a real browser: Chromium,
//! signed in at a real provider, against the real binary and a real PostgreSQL. Each page on the way is looked at in light
//! and dark, on a desk and on a phone. Pictures go to `target/pages/`, or where `COUNTERSIGN_PAGES` says.

#[path = "support/broker.rs"]
mod broker;
#[path = "support/chrome.rs"]
mod chrome;

use broker::agent::{Agent, app, customers, webhooks};
use broker::{Plan, World};
use chrome::Chrome;
use serde_json::{Value, json};

/// WebDriver's keys.
const ENTER: &str = "\u{e007}";
const SPACE: &str = " ";

async fn world(test: &str) -> Option<World> {
    if !chrome::available(test) {
        return None;
    }
    Plan { postgres: true, people: true, ..Plan::default() }.start(test).await
}

/// Asks as an agent at work would: for a task, in words of its own.
async fn asks(agent: &Agent, task: &str, intent: &str, secs: u64, want: Value) -> String {
    let body = json!({ "task": task, "intent": intent, "life_secs": secs, "authorization_details": [want] });
    agent.post("/v1/grants", &body).await.ok()["id"].as_str().unwrap().to_owned()
}

fn invoices(action: &str) -> Value {
    let mut want = app(action);
    want["tables"] = json!(["invoices"]);
    want
}

/// Fails with every fault, not just the first.
#[track_caller]
fn none(faults: &[String]) {
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_decides_watches_and_takes_away_in_a_browser() {
    let Some(world) = world("story_pages").await else { return };
    let (ops, base) = (world.agent("ops"), world.ports.reviewer_url());
    // What it had before: the difference to that is shown.
    let before = asks(&ops, "INC-41", "look for the invoice that was sent twice", 300, invoices("read")).await;
    world.browser("ana").await.approved(&before).await;
    ops.complete(&before).await.ok();

    let intent = "Invoice 1 was booked with the wrong amount. I correct it and book the difference, as INC-42 says.";
    let id = asks(&ops, "INC-42", intent, 600, invoices("write")).await;
    let page = format!("{base}/grants/{id}");
    asks(&world.agent("helper"), "NEWS-7", "tell the partners about the new price list", 300, webhooks()).await;
    let hostile = "\u{202e}approve\u{202c} <b>me</b> <script>alert(1)</script> now\u{200b}, p\u{430}ypal";
    let purge = asks(&world.agent("ops-two"), "GDPR-9", hostile, 600, customers("purge")).await;

    let chrome = Chrome::start(&world.file("broker.pem")).await;
    let mut faults = chrome.faults(&format!("{base}/login"), "login").await;
    chrome.sign_in(&base, "ana").await;
    chrome.console().await; // the provider's own pages
    faults.extend(chrome.faults(&base, "queue").await);
    chrome.click(&format!("a[href='/grants/{id}']")).await;
    assert_eq!(chrome.address().await, page);
    faults.extend(chrome.faults(&page, "request").await);
    faults.extend(chrome.faults(&format!("{base}/grants/{purge}"), "request-critical").await);

    // The facts stand before the agent's words, and the words say nothing but that they are its own.
    chrome.open(&page).await;
    let text = chrome.text("main").await;
    let order = ["change", "To decide", "asks to", "Can and cannot", "Difference", "Verified identity"];
    let order = order.into_iter().chain([
        "Written by the agent. Not verified.",
        "Why you",
        "Decide",
        "Approve write for 10 min",
    ]);
    let mut rest = text.as_str();
    for part in order {
        rest = rest.split_once(part).unwrap_or_else(|| panic!("{part:?} isn't there in its order:\n{text}")).1;
    }
    let shown = text.split("Written by the agent").nth(1).unwrap();
    assert!(shown.contains(intent) && !text.split("Written by the agent").next().unwrap().contains(intent), "{text}");

    // Enter never approves, from the page or from the button; the space bar is a deliberate press.
    chrome.keys("body", ENTER).await;
    chrome.keys("[data-approve]", ENTER).await;
    assert!(chrome.text("#status").await.contains("Enter never approves"));
    assert_eq!((chrome.address().await, ops.state(&id).await), (page.clone(), "pending".to_owned()));
    chrome.keys("[data-approve]", SPACE).await;
    chrome.found("main.s-on").await;
    assert_eq!(ops.state(&id).await, "active");

    // The same address is now the live grant; what it holds is at the target.
    let login = ops.login(&id).await;
    assert!(world.cluster().login(&login.user, &login.password, &login.database).await.is_ok());
    faults.extend(chrome.faults(&page, "live").await);
    assert!(chrome.text(".leases").await.contains(&login.lease) || chrome.text(".leases").await.contains(&login.user));

    chrome.click(".bar .danger").await;
    let over = "return document.querySelector('main').dataset.state === 'ended'";
    chrome.until("the record says that it ended", over).await;
    assert_eq!(ops.state(&id).await, "ended");
    assert!(world.cluster().login(&login.user, &login.password, &login.database).await.is_err(), "the role is gone");
    faults.extend(chrome.faults(&page, "ended").await);
    // Who decides need not be who reads the record: hers says so, the auditor's has it all.
    let said = chrome.text("section[aria-labelledby=h-record]").await;
    assert!(said.contains("You may not read it"), "{said}");
    drop(chrome);
    let chrome = Chrome::start(&world.file("broker.pem")).await;
    chrome.sign_in(&base, "chen").await;
    chrome.console().await;
    faults.extend(chrome.faults(&page, "record").await);
    let record = chrome.text(".record").await;
    let mut rest = record.as_str();
    let order = ["asked, for task INC-42", "rule change-write", "ana approved it", "about to be minted", "handed over"];
    for part in order.into_iter().chain(["ana took it away", "gone:", "no credential under it is open any more"]) {
        rest = rest.split_once(part).unwrap_or_else(|| panic!("{part:?} isn't in its order in\n{record}")).1;
    }
    none(&faults);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_undone_is_typed_and_waited_for_in_a_browser() {
    let Some(world) = world("story_pages").await else { return };
    let (ops, base) = (world.agent("ops"), world.ports.reviewer_url());
    let id = asks(&ops, "GDPR-9", "the customer asked to be forgotten", 600, customers("purge")).await;
    let page = format!("{base}/grants/{id}");
    let chrome = Chrome::start(&world.file("broker.pem")).await;
    chrome.sign_in(&base, "ana").await;
    // How long the button is out of reach, measured in the page: this machine may be slow to ask.
    let watch = "new MutationObserver(([{ target: b }]) => {
        if (b.disabled) window.since ??= performance.now(); else window.paused ??= performance.now() - window.since;
    }).observe(document, { subtree: true, attributes: true, attributeFilter: ['disabled'] });";
    chrome.before(watch).await;
    chrome.open(&page).await;
    chrome.until("the pause is over", "return window.paused !== undefined").await;
    assert!(chrome.run("return window.paused").await.as_f64().unwrap() > 2900.0, "three seconds' pause");
    assert_eq!(chrome.run("return document.querySelector('[data-approve]').disabled").await, false);
    // Without the name, the browser itself sends nothing; and Enter in the field is no approval, whatever was typed.
    chrome.click("[data-approve]").await;
    chrome.keys("#typed", &format!("api/customers{ENTER}")).await;
    let value = "return document.getElementById('typed').value";
    assert_eq!((chrome.address().await, chrome.run(value).await), (page.clone(), json!("api/customers")));
    assert_eq!(ops.show(&id).await["approvals"], 0);
    chrome.click("[data-approve]").await;
    chrome.found("main:not(:has([data-approve]))").await;
    let shown = ops.show(&id).await;
    assert_eq!((&shown["state"], &shown["approvals"]), (&json!("pending"), &json!(1)), "one of two");

    // Somebody else decides while the page is open: no button of it works any more, and it says who.
    let other = asks(&ops, "GDPR-10", "and the next one", 600, customers("read")).await;
    chrome.open(&format!("{base}/grants/{other}")).await;
    world.browser("ben").await.deny(&other, "not today").await;
    chrome.until("the page noticed", "return document.getElementById('status').textContent.includes('changed')").await;
    assert!(chrome.text("#status").await.contains("ben"), "{}", chrome.text("#status").await);
    let live = "return [...document.querySelectorAll('main button:not([hidden])')].filter((b) => !b.disabled).length";
    assert_eq!(chrome.run(live).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_other_pages_keep_to_the_same() {
    let Some(world) = world("story_pages").await else { return };
    let (ops, base) = (world.agent("ops"), world.ports.reviewer_url());
    let chrome = Chrome::start(&world.file("broker.pem")).await;

    // First: these eyes see. A page that breaks every rule has a fault of every kind.
    chrome.open(&format!("{base}/login")).await;
    let broken = "const main = document.getElementById('main');
        main.insertAdjacentHTML('beforeend', '<p id=faint>faint</p><p id=wide>wide</p><a class=btn id=small href=#>x</a>');
        document.getElementById('faint').style.color = 'rgb(230, 226, 220)';
        document.getElementById('wide').style.width = '2000px';
        Object.assign(document.getElementById('small').style, { minHeight: '20px', padding: '0' });
        main.insertAdjacentHTML('beforeend', '<p style=color:red>inline</p>');
        document.getElementById('small').focus();";
    chrome.run(broken).await;
    let seen = chrome.faults_here("broken").await.join("\n");
    for kind in ["focused at load", "ends at", "id=\"small\"", "color-contrast", "Content Security Policy"] {
        assert!(seen.contains(kind), "{kind} wasn't seen in:\n{seen}");
    }

    chrome.sign_in(&base, "chen").await;
    chrome.console().await;
    let mut faults = chrome.faults(&base, "queue-empty").await;
    asks(&ops, "INC-42", "repair", 600, invoices("write")).await;
    let read = asks(&ops, "INC-43", "who has not paid", 600, app("read")).await;
    world.browser("ana").await.approved(&read).await;
    ops.login(&read).await;
    faults.extend(chrome.faults(&format!("{base}/freeze"), "freeze").await);
    chrome.keys("#reason", "an agent went astray").await;
    chrome.run("document.getElementById('kind').value = 'all'").await;
    chrome.click("main .primary").await;
    chrome.found("#typed").await;
    faults.extend(chrome.faults_here("freeze-count").await);
    chrome.keys("#typed", "freeze").await;
    chrome.click("main .danger").await;
    chrome.found(".frozen").await;
    faults.extend(chrome.faults(&format!("{base}/freeze"), "frozen").await);
    faults.extend(chrome.faults(&base, "queue-frozen").await);
    let nothing = format!("{base}/grants/gr_00000000000000000000000000");
    // That the answer was 404 is no fault of the page.
    let expected = |fault: &String| !(fault.contains(&nothing) && fault.contains("404"));
    faults.extend(chrome.faults(&nothing, "problem").await.into_iter().filter(expected));
    let code = world.http.post(format!("{base}/api/cli-login")).json(&json!({ "from": "ana's laptop" }));
    let begun = broker::Answer::of(code).await.ok();
    faults.extend(chrome.faults(&format!("{base}/cli/{}", begun["code"].as_str().unwrap()), "command-line").await);
    none(&faults);
}
