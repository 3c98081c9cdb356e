//! "Several brokers on one PostgreSQL": three processes, each of which may die, stop for longer than anybody waits, or lose
//! its connections, while agents work. An admin's connection counts what is at the target; the record is verified offline.

#[path = "support/nodes.rs"]
mod nodes;

use std::time::Duration;

use countersign::core::grant::Grant;
use countersign::core::lease::LeaseState;
use nodes::broker::{Agent, notes, until};
use nodes::world::browser::Browser;
use nodes::world::postgres;
use nodes::{Crowd, Nodes, RECOVERY, STORE, roles, want};
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

/// Longer than a run may be silent.
const STOPPED: Duration = Duration::from_secs(13);

fn rounds() -> usize {
    std::env::var("COUNTERSIGN_ROUNDS").ok().map_or(4, |n| n.parse().expect("COUNTERSIGN_ROUNDS is a number"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_step_at_another_node() {
    if !postgres::available("each_step_at_another_node") {
        return;
    }
    let nodes = Nodes::up_with_people().await;
    let admin = nodes.target.admin("postgres").await;
    let [a, b, c] = nodes.agent("a0");
    for round in 0..5 {
        let id = a.asked(&format!("T-{round}"), 600, want()).await;
        assert_eq!(b.show(&id).await["state"], "active", "what one has answered, the next one knows");
        let credential = b.collected(&id).await;
        let (user, password) = (&credential["public"]["user"], &credential["secret"]["password"]);
        let (user, password) = (user.as_str().unwrap(), password.as_str().unwrap());
        nodes.target.login(user, password, "postgres").await.expect("it works at the target");
        assert_eq!(a.collect(&id).await.status, 409, "handed over once, wherever it is asked for");
        c.complete(&id).await;
        assert_ne!(a.show(&id).await["state"], "active");
        assert_eq!(b.collect(&id).await.status, 409);
        until("the login is refused", Duration::from_secs(20), async || {
            nodes.target.login(user, password, "postgres").await.is_err()
        })
        .await;
    }
    // Asked for at one, approved at another, collected at the third.
    if let Some(people) = &nodes.people {
        let customers = json!({ "type": "token", "identifier": "api/customers", "actions": ["read"] });
        let id = a.asked("V-1", 600, customers).await;
        assert_eq!(c.show(&id).await["state"], "pending");
        let at = &nodes.all[1];
        let rita = Browser::log_in(&at.http, &at.reviewer_url(), people, "rita").await;
        rita.approved(&id).await;
        assert_eq!(c.collect(&id).await.status, 200, "approved at another node, and known at once");
        a.complete(&id).await;
    }
    // A token that is ended at one node is no longer good at any.
    let resource = nodes.agent("notes-api");
    for round in 0..3 {
        let id = a.asked(&format!("N-{round}"), 600, notes()).await;
        let token = a.collected(&id).await["secret"]["token"].as_str().unwrap().to_owned();
        let good = async |at: &Agent| {
            let url = format!("{}/introspect", at.base);
            let request = at.http.post(url).bearer_auth(at.token.as_ref().unwrap()).form(&[("token", &token)]);
            request.send().await.unwrap().json::<Value>().await.unwrap()["active"].clone()
        };
        assert_eq!(good(&resource[1]).await, true);
        c.complete(&id).await;
        for at in &resource {
            assert_eq!(good(at).await, false);
        }
    }
    until("nothing of ours is left", RECOVERY, async || roles(&admin).await.is_empty()).await;
    let record = nodes.record("record");
    assert!(record.grants.values().all(|g| g.leases.len() == 1), "one credential each");
}

/// A credential exists, and only its intent is on record: its node dies, or stops for so long that it is taken for dead.
/// Another node looks for it and ends it, and nothing that the first one does when it wakes changes that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_node_was_minting_is_ended_by_another() {
    if !postgres::available("what_a_node_was_minting_is_ended_by_another") {
        return;
    }
    let mut nodes = Nodes::up().await;
    let admin = nodes.target.admin("postgres").await;
    for (victim, dies) in [(0, true), (1, false)] {
        nodes.gate.close();
        let [at, other] = [victim, 2].map(|n| nodes.agent("m0")[n].clone());
        let id = other.asked(&format!("M-{victim}"), 900, want()).await;
        let minting = tokio::spawn({
            let (at, id) = (at.clone(), id.clone());
            async move {
                at.try_call("POST", &format!("/v1/grants/{id}/credentials"), Some(json!({}))).await.map(|a| a.status)
            }
        });
        until("the role exists", RECOVERY, async || roles(&admin).await.len() == 1).await;
        if dies {
            nodes.all[victim].kill();
        } else {
            kill_process(nodes.all[victim].pid(), Signal::STOP).unwrap();
        }
        let lease = async || {
            tokio::time::sleep(Duration::from_millis(100)).await; // within its rate
            other.show(&id).await["leases"][0]["state"].clone()
        };
        until("another node puts it in doubt", RECOVERY, async || lease().await == "unknown").await;
        assert_eq!(roles(&admin).await.len(), 1, "not looked for while the mint may be under way");
        until("another node ends it", RECOVERY, async || roles(&admin).await.is_empty()).await;
        // What the first one says of it before that is on record counts as an answer that came late.
        until("and has it on record", RECOVERY, async || lease().await == "absent").await;
        nodes.gate.open();
        if !dies {
            kill_process(nodes.all[victim].pid(), Signal::CONT).unwrap();
        }
        assert!(!matches!(minting.await.unwrap(), Ok(200)), "nothing was handed over");
        if dies {
            nodes.all[victim].up().await;
        }
        // The grant goes on, at any node.
        let collected = async || {
            tokio::time::sleep(Duration::from_millis(100)).await; // within its rate
            at.collect(&id).await.status == 200
        };
        until("it can be collected", RECOVERY, collected).await;
        assert_eq!(roles(&admin).await.len(), 1);
        other.complete(&id).await;
        until("nothing of ours is left", RECOVERY, async || roles(&admin).await.is_empty()).await;
    }
    let record = nodes.record("record");
    let handed_over = |g: &Grant| g.leases.values().filter(|l| matches!(l.state, LeaseState::Revoked { .. })).count();
    let is_whole = |g: &Grant| handed_over(g) == 1 && g.leases.len() >= 2;
    assert!(record.grants.values().all(is_whole), "{:#?}", record.grants);
}

/// Guarantee 8: what is due is ended at its target, though nothing can be recorded, and is on record once it can.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_due_ends_while_the_database_is_away() {
    if !postgres::available("what_is_due_ends_while_the_database_is_away") {
        return;
    }
    let nodes = Nodes::up().await;
    let admin = nodes.target.admin("postgres").await;
    let [a, b, c] = nodes.agent("d0");
    let due = a.asked("D-due", 45, want()).await;
    let completed = a.asked("D-completed", 900, want()).await;
    for (at, id) in [(&b, &due), (&c, &completed)] {
        // A target that is slow is no news.
        until("it is handed over", RECOVERY, async || at.collect(id).await.status == 200).await;
    }
    assert_eq!(roles(&admin).await.len(), 2);
    nodes.database.stop();
    // At the one that surely knows of it; another may not have read of it yet, and says 503 too.
    let answer = c.post(&format!("/v1/grants/{completed}/complete"), json!({})).await;
    assert_eq!((answer.status, answer.problem()), (503, "ending-unrecorded"), "{answer:?}");
    assert_ne!(c.collect(&completed).await.status, 200);
    until("both are ended at the target", RECOVERY, async || roles(&admin).await.is_empty()).await;
    assert_ne!(a.ask("D-new", 60, want()).await.status, 200, "nothing is given meanwhile");
    nodes.database.run(STORE);
    until("both are on record", RECOVERY, async || nodes.record_is_quiet().await).await;
    let record = nodes.record("record");
    assert!(record.leases().all(|l| matches!(l.state, LeaseState::Revoked { .. })));
    let asked = async || {
        tokio::time::sleep(Duration::from_millis(100)).await; // within its rate
        a.ask("D-after", 60, want()).await.status == 200
    };
    until("it works again", RECOVERY, asked).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_die_stop_and_are_cut_off() {
    if !postgres::available("nodes_die_stop_and_are_cut_off") {
        return;
    }
    let mut nodes = Nodes::up().await;
    let admin = nodes.target.admin("postgres").await;
    let mut agents = Crowd::at(&nodes, 4);
    for round in 0..rounds() {
        agents.goes_on("work goes on").await;
        let victim = round % 3;
        match round % 4 {
            0 => {
                nodes.all[victim].kill();
                agents.goes_on("the others go on").await;
                nodes.all[victim].up().await;
            }
            1 => {
                let pid = nodes.all[victim].pid();
                kill_process(pid, Signal::STOP).unwrap();
                tokio::time::sleep(STOPPED).await; // what is tested is the time itself
                kill_process(pid, Signal::CONT).unwrap();
            }
            2 => {
                for _ in 0..10 {
                    nodes.cuts[victim].now();
                    tokio::time::sleep(Duration::from_millis(37)).await; // in whatever is under way
                }
            }
            _ => {
                nodes.database.stop();
                nodes.database.run(STORE);
            }
        }
        eprintln!("round {round}: {} completed, {} calls unclear", agents.done(), agents.unclear());
    }
    agents.goes_on("work goes on after all").await;
    agents.ends(&nodes, &admin).await;
    for node in &mut nodes.all {
        node.stop().await;
    }
    agents.is_in(&nodes.record("record"));
}
