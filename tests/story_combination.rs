//! "Harmless alone, not together": customer data and a way to the outside are seen as one, whatever the order, the task,
//! or what was completed in between.

#[path = "support/broker.rs"]
mod broker;

use broker::agent::{app, customers, notes, request, webhooks};
use broker::{Plan, World};
use serde_json::json;

const RULE: &str = "critical-customer-data-outside";

async fn world() -> Option<World> {
    Plan { people: true, ..Plan::default() }.start("story_combination").await
}

#[tokio::test]
async fn each_alone_takes_one_vote_and_in_one_request_it_takes_two() {
    let Some(world) = world().await else { return };
    let ops = world.agent("ops");
    for want in [customers("read"), webhooks()] {
        let alone = ops.ask("T-1", want).await.ok();
        assert_eq!((&alone["tier"], &alone["approvals_needed"]), (&json!("export"), &json!(1)));
    }
    let mut both = request("T-2", customers("read"));
    both["authorization_details"].as_array_mut().unwrap().push(webhooks());
    let both = ops.post("/v1/grants", &both).await.ok();
    assert_eq!((&both["tier"], &both["approvals_needed"]), (&json!("critical"), &json!(2)));
    let page = world.browser("ana").await.form(both["id"].as_str().unwrap()).await.page;
    assert!(page.contains(RULE) && page.contains("customer data and a way to the outside, together"), "{page}");
}

#[tokio::test]
async fn d2_over_two_tasks_after_completion_and_by_the_owners_other_agent_it_takes_two_all_the_same() {
    let Some(world) = world().await else { return };
    let (ops, sibling, stranger) = (world.agent("ops"), world.agent("ops-two"), world.agent("other"));
    let ana = world.browser("ana").await;
    let read = ops.asked("T-1", customers("read")).await;
    ana.approved(&read).await;
    ops.collect(&read).await.ok();

    // Another task, while it is held.
    let while_held = ops.ask("T-2", webhooks()).await.ok();
    assert_eq!(while_held["tier"], "critical");
    ops.cancel(while_held["id"].as_str().unwrap()).await.ok();
    // The first one completed, its task too.
    ops.complete(&read).await.ok();
    ops.wait(&read, "ended").await;
    ops.post("/v1/tasks/T-1/complete", &json!({})).await.ok();
    let after = ops.ask("T-3", webhooks()).await.ok();
    assert_eq!((&after["state"], &after["tier"]), (&json!("pending"), &json!("critical")));
    // Another agent of the same person: what the one has seen, the other could carry out.
    assert_eq!(sibling.ask("T-1", webhooks()).await.ok()["tier"], "critical");
    // Somebody else's agent has nothing to do with it; nor has what is harmless.
    assert_eq!(stranger.ask("T-1", webhooks()).await.ok()["tier"], "export");
    assert_eq!(ops.ask("T-4", notes()).await.ok()["state"], "active");

    // One vote is not enough for it, and what the reviewer sees says why.
    let id = after["id"].as_str().unwrap();
    let page = ana.form(id).await.page;
    assert!(page.contains(RULE), "{page}");
    ana.approved(id).await;
    ops.collect(id).await.problem(409, "state");
    world.browser("ben").await.approved(id).await;
    ops.collect(id).await.ok();
}

#[tokio::test]
async fn d2_the_other_way_round_and_after_a_restart() {
    let Some(mut world) = world().await else { return };
    let ops = world.agent("ops");
    let post = ops.asked("T-1", webhooks()).await;
    world.browser("ana").await.approved(&post).await;
    ops.collect(&post).await.ok();
    ops.complete(&post).await.ok();
    world.kill_and_restart().await;
    let read = ops.ask("T-2", customers("read")).await.ok();
    assert_eq!((&read["state"], &read["tier"]), (&json!("pending"), &json!("critical")));
}

#[tokio::test]
async fn d2_pending_twins_do_not_slip_through_one_vote_each() {
    let Some(world) = world().await else { return };
    let ops = world.agent("ops");
    let (ana, ben) = (world.browser("ana").await, world.browser("ben").await);
    // Both asked for before either is held: each is shown as harmless.
    let (read, post) = (ops.asked("T-1", customers("read")).await, ops.asked("T-2", webhooks()).await);
    let shown = ana.form(&post).await;
    let old = shown.digest.clone().unwrap();
    ana.approved(&read).await;

    // The second is no longer what was shown: the vote is void, and it is critical now.
    let answer = ana.vote(&post, &shown, &old, "approve", "").await;
    assert!(answer.status == 409 && answer.text().contains("look at it again"), "{}: {}", answer.status, answer.text());
    let now = ops.show(&post).await;
    assert_eq!((&now["state"], &now["tier"], &now["approvals"]), (&json!("pending"), &json!("critical"), &json!(0)));
    ana.approved(&post).await;
    ben.approved(&post).await;

    // Now both are in force, and the first was approved by one person who knew nothing of the second: guarantee 3.
    let why = ops.collect(&read).await.problem(409, "over");
    assert!(why.contains("policy at mint asks for more"), "{why}");
    let ended = ops.wait(&read, "ended").await;
    assert_eq!(ended["cause"]["cause"], "tier_risen", "{ended}");
    assert!(ended["leases"].is_null(), "nothing was minted: {ended}");
    // The second was approved as what it is.
    ops.collect(&post).await.ok();
}

#[tokio::test]
async fn d2_a_task_that_changes_several_systems_is_critical_also_when_it_asks_in_parts() {
    let plan = Plan { people: true, postgres: true, ..Plan::default() };
    let Some(mut world) = plan.start("story_combination").await else { return };
    let ops = world.agent("ops");
    let write = ops.asked("T-1", customers("write")).await;
    assert_eq!(ops.show(&write).await["tier"], "change");
    let tier = async |task: &str| {
        let asked = ops.ask(task, app("write")).await.ok();
        ops.cancel(asked["id"].as_str().unwrap()).await.ok();
        asked["tier"].as_str().unwrap().to_owned()
    };
    // As long as it is only asked for, nothing is held.
    assert_eq!(tier("T-1").await, "change");
    world.browser("chen").await.approved(&write).await;
    ops.collect(&write).await.ok();
    assert_eq!((tier("T-1").await.as_str(), tier("T-2").await.as_str()), ("critical", "change"));
    // Completed first: its task held it, and nothing else did.
    ops.complete(&write).await.ok();
    ops.wait(&write, "ended").await;
    assert_eq!((tier("T-1").await.as_str(), tier("T-2").await.as_str()), ("critical", "change"));
    world.kill_and_restart().await;
    let ops = world.agent("ops");
    let after = ops.ask("T-1", app("write")).await.ok();
    assert_eq!((&after["tier"], &after["approvals_needed"]), (&json!("critical"), &json!(2)));
    let page = world.browser("ana").await.form(after["id"].as_str().unwrap()).await.page;
    assert!(page.contains("one task changes several systems"), "{page}");
    assert_eq!(ops.ask("T-2", app("write")).await.ok()["tier"], "change");
}
