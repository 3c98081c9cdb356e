//! "No secret is in the record, the log, a figure or a page, and nobody can fill the record by being refused."

#[path = "support/broker.rs"]
mod broker;

use broker::agent::{app, customers, notes};
use broker::oidc_provider::CLIENT;
use broker::{Plan, World, target};

/// How often a text stands in what the broker keeps and prints.
fn times(world: &World, text: &str) -> usize {
    times_where(world, text, |_| true)
}

fn times_where(world: &World, text: &str, counts: impl Fn(&str) -> bool) -> usize {
    let holds = |bytes: &[u8]| bytes.windows(text.len()).filter(|w| *w == text.as_bytes()).count();
    let files = world.on_disk();
    files.iter().filter(|(path, _)| counts(&path.to_string_lossy())).map(|(_, bytes)| holds(bytes)).sum()
}

#[tokio::test]
async fn r5_no_secret_is_on_disk_in_the_log_in_a_figure_or_on_a_page() {
    let Some(mut world) = Plan { postgres: true, people: true, ..Plan::default() }.start("story_record").await else {
        return;
    };
    let (ops, ana) = (world.agent("ops"), world.browser("ana").await);
    let id = ops.asked("T-1", app("write")).await;
    ana.approved(&id).await;
    let login = ops.login(&id).await;
    let read = ops.asked("T-2", notes()).await;
    let token = ops.collect(&read).await.ok()["credentials"][0]["secret"]["token"].as_str().unwrap().to_owned();
    let pages = [ana.get(&format!("/grants/{id}")).await.text(), ana.get("/").await.text()].concat();
    // Errors say most: the target is asked with a role that is gone, and a log-in fails.
    ops.complete(&id).await.ok();
    ops.wait(&id, "ended").await;
    assert!(world.cluster().login(&login.user, &login.password, &login.database).await.is_err());
    ops.collect(&id).await.problem(409, "over");
    let metrics = world.metrics().await;
    world.restart().await;
    let promised = "passkeys are not enforced yet: one click of a browser session decides";
    assert_eq!(world.broker.stderr().matches(promised).count(), 2, "each start says what a tier promises in vain");

    // What is looked for can be found: names are not secret.
    assert!(times(&world, &login.user) > 0 && pages.contains(&login.user) && metrics.contains("countersign"));
    let session = ana.cookie.split_once('=').unwrap().1;
    let signature = |jwt: &str| jwt.rsplit('.').next().unwrap().to_owned();
    let identity = signature(ops.token.as_deref().unwrap());
    for (what, secret) in [
        ("the broker's password at PostgreSQL", target::PASSWORD.to_owned()),
        ("the client secret at the provider", CLIENT.1.to_owned()),
        ("a lease's password", login.password),
        ("a minted token", signature(&token)),
        ("the agent's proof", identity),
        ("a reviewer's session", session.to_owned()),
    ] {
        assert!(secret.len() > 12, "{what} is too short to be looked for");
        assert_eq!(times(&world, &secret), 0, "{what} is on disk");
        assert!(!pages.contains(&secret) && !metrics.contains(&secret), "{what} is on a page or in a figure");
    }
}

#[tokio::test]
async fn d9_a_flood_of_refusals_neither_fills_the_record_nor_stops_minting() {
    let Some(world) = Plan { limits: "refusals_per_agent_per_min = 2", ..Plan::default() }.start("story_record").await
    else {
        return;
    };
    let stray = world.agent("robots/stray");
    stray.ask("T-1", customers("read")).await.problem(403, "denied");
    let times = |world: &World, text: &str| times_where(world, text, |path| path.contains("/journal/"));
    let one = times(&world, &stray.id);
    assert!(one > 0, "a refusal is recorded");
    for _ in 0..80 {
        stray.ask("T-1", customers("read")).await.problem(403, "denied");
    }
    // Two a minute, and the flood may have crossed into another minute; the rest is a sum.
    let all = times(&world, &stray.id);
    assert!(all <= one * 6, "{all} times, {one} for one refusal");
    let ops = world.agent("ops");
    ops.collect(&ops.asked("T-2", notes()).await).await.ok();
}
