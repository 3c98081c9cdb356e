//! "The machine is gone, and there is a backup": taken beside the running broker, checked, and put back so that nothing of
//! what happened since comes back to life, and no history is forked unnoticed. With the real binary.

#[path = "support/crash_broker.rs"]
mod broker;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use broker::{Agent, Serving, Setup, notes};
use countersign::audit::checkpoint::{self, Checkpoint};
use countersign::core::event::{BrokerEvent, EndCause, Event};
use countersign::core::grant::GrantState;
use serde_json::{Value, json};

/// A resource that nobody gets without a vote.
const LEDGER: &str = r#"
[[resource]]
name = "api/ledger"
target = "tokens"
title = "the ledger"
environment = "prod"
sensitivity = "customer"
settings = { audience = "https://ledger.test", checks = "introspection", resource_server = "spiffe://corp.test/agent/notes-api" }
[[resource.action]]
name = "write"
effect = "write"
reversible = true
"#;

fn prepared() -> Serving {
    Serving::prepare(|_, _| Setup { catalogue: LEDGER.to_owned(), ..Setup::default() })
}

/// Runs the binary: whether it went well, and what it said.
fn run(args: &[&str]) -> (bool, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_countersign")).args(args).env_clear().output().unwrap();
    (out.status.success(), String::from_utf8([out.stdout, out.stderr].concat()).unwrap())
}

#[track_caller]
fn done(args: &[&str]) -> Value {
    let (well, said) = run(&[args, &["--json"]].concat());
    assert!(well, "{said}");
    serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}"))
}

#[track_caller]
fn refused(args: &[&str]) -> String {
    let (well, said) = run(args);
    assert!(!well, "{said}");
    said
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

async fn is_good(serving: &Serving, token: &str) -> bool {
    let api = serving.agent("notes-api");
    let request = api.http.post(format!("{}/introspect", api.base)).bearer_auth(api.token.unwrap());
    let answer: Value = request.form(&[("token", token)]).send().await.unwrap().json().await.unwrap();
    answer["active"] == true
}

async fn token_of(agent: &Agent, id: &str) -> String {
    agent.collected(id).await["secret"]["token"].as_str().expect("a token").to_owned()
}

async fn jwks(serving: &Serving) -> Value {
    serving.agent("a").get("/jwks.json").await.ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_older_than_the_record_brings_nothing_back_to_life() {
    let mut serving = prepared();
    serving.up().await;
    let (data, backup, kept) = (serving.data(), serving.file("backup"), serving.file("kept.note"));
    let a = serving.agent("a");
    let revoked_later = a.asked("T-1", 300, notes()).await;
    let token = token_of(&a, &revoked_later).await;
    let ledger = json!({ "type": "token", "identifier": "api/ledger", "actions": ["write"] });
    let waits = a.asked("T-2", 300, ledger).await;
    assert_eq!(a.show(&waits).await["state"], "pending");
    // The broker's first checkpoint comes when it has had something to sign for a minute, or is started again.
    serving.stop().await;
    serving.up().await;
    let keys_before = jwks(&serving).await;

    let made = done(&["backup", "--data-dir", text(&data), "--to", text(&backup)]);
    assert!(is_good(&serving, &token).await);
    let again = refused(&["backup", "--data-dir", text(&data), "--to", text(&backup)]);
    assert!(again.contains("is not empty"), "{again}");

    // What happens after it: one is given back, another is minted.
    a.complete(&revoked_later).await;
    let unknown = a.asked("T-3", 300, notes()).await;
    let unknown_token = token_of(&a, &unknown).await;
    serving.stop().await;
    fs::copy(serving.journal_dir().join(checkpoint::FILE_NAME), &kept).unwrap();
    let newest = Checkpoint::read_unverified(&fs::read(&kept).unwrap()).unwrap();

    // Over what is there: never. And not without knowing what is lost.
    let said = refused(&["restore", text(&backup), "--data-dir", text(&data), "--accept-lost-records"]);
    assert!(said.contains("is not empty"), "{said}");
    fs::rename(&data, serving.file("lost")).unwrap();
    let restore = ["restore", text(&backup), "--data-dir", text(&data)];
    let said = refused(&restore);
    assert!(said.contains("nothing shows whether") && said.contains("--checkpoint"), "{said}");
    let with_newest = [&restore[..], &["--checkpoint", text(&kept)]].concat();
    let said = refused(&with_newest);
    let records = made["records"].as_u64().unwrap();
    assert!(said.contains(&format!("has {records} records")) && said.contains("--accept-lost-records"), "{said}");
    assert!(said.contains(&format!("the last {} would be lost", newest.size - records)), "{said}");
    assert!(!data.exists(), "nothing was written");

    let told = done(&[&with_newest[..], &["--accept-lost-records"]].concat());
    assert_eq!((&told["ended"], &told["lost_records"]), (&json!(2), &json!(newest.size - records)));
    let freeze = told["freeze"].as_u64().expect("everything is frozen");

    serving.up().await;
    for token in [&token, &unknown_token] {
        assert!(!is_good(&serving, token).await, "a token of before is good");
    }
    let state = a.wait(&revoked_later, "ended", broker::PATIENCE).await;
    assert!(state.to_string().contains("restored"), "{state}");
    assert_eq!(a.show(&waits).await["state"], "withdrawn");
    let kids = |jwks: &Value| jwks["keys"].as_array().unwrap().iter().map(|k| k["kid"].clone()).collect::<Vec<_>>();
    let keys_after = kids(&jwks(&serving).await);
    assert!(!keys_after.is_empty() && kids(&keys_before).iter().all(|k| !keys_after.contains(k)), "token keys are new");
    let answer = a.ask("T-4", 300, notes()).await;
    assert_eq!(answer.problem(), "frozen", "{answer:?}");

    // It is on record, and an auditor with the newest checkpoint sees that this is not what was.
    let record = serving.record();
    let restored = record.broker.iter().find_map(|e| match e {
        BrokerEvent::Restored { records, newest_size, newest_root, may_lack_records: true, .. } => {
            Some((*records, *newest_size, newest_root.clone()))
        }
        _ => None,
    });
    assert_eq!(restored, Some((records, Some(newest.size), Some(newest.root.to_string()))));
    assert!(record.events.iter().any(|e| matches!(e, Event::Frozen { id, .. } if *id == freeze)));
    let cause = |id: &str| match &record.grant(id).state {
        GrantState::Ended { cause, .. } | GrantState::Withdrawn { cause, .. } => cause.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!((cause(&revoked_later), cause(&waits)), (EndCause::Restored, EndCause::Restored));
    serving.stop().await;
    let key = broker::checkpoint_keys(&data)[0].to_string();
    let verify = ["audit", "verify", text(&data), "--key", &key];
    let (well, said) = run(&verify);
    assert!(well, "{said}");
    let note = serving.file("backup.note");
    fs::write(&note, made["checkpoint"].as_str().unwrap()).unwrap();
    let (well, said) = run(&[&verify[..], &["--checkpoint", text(&note)]].concat());
    assert!(well && said.contains(&format!("extends checkpoint {} at {records}", note.display())), "{said}");
    let (well, said) = run(&[&verify[..], &["--checkpoint", text(&kept)]].concat());
    assert!(!well, "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_newest_backup_is_put_back_and_the_broker_goes_on() {
    let mut serving = prepared();
    serving.up().await;
    let (data, backup) = (serving.data(), serving.file("backup"));
    let a = serving.agent("a");
    let over = a.asked("T-1", 300, notes()).await;
    a.collected(&over).await;
    a.complete(&over).await;
    a.wait(&over, "ended", broker::PATIENCE).await;
    serving.stop().await;
    let made = done(&["backup", "--config", text(&serving.file("countersign.toml")), "--to", text(&backup)]);
    let note = serving.file("newest.note");
    fs::write(&note, made["checkpoint"].as_str().unwrap()).unwrap();
    fs::remove_dir_all(&data).unwrap();

    let restore = ["restore", text(&backup), "--data-dir", text(&data), "--checkpoint", text(&note)];
    done(&[&restore[..], &["--check"]].concat());
    assert!(!data.exists(), "nothing is written by a look");
    // Interrupted: no broker starts on that, and the next try goes on.
    fs::create_dir_all(data.join("restoring/journal")).unwrap();
    let said = serving.refused().await;
    assert!(said.contains("was not finished") && said.contains("countersign restore"), "{said}");
    assert!(!data.join("keys").exists() && !data.join("journal").exists(), "nothing was made there");
    let told = done(&restore);
    assert_eq!((&told["freeze"], &told["ended"], &told["lost_records"]), (&Value::Null, &json!(0), &json!(0)));
    let mut there: Vec<_> =
        fs::read_dir(&data).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    there.sort();
    assert_eq!(there, ["journal", "keys", "view"]);

    serving.up().await;
    assert!(!serving.log().contains("rebuilt"), "the view came along");
    assert_eq!(a.show(&over).await["state"], "ended");
    let id = a.asked("T-2", 300, notes()).await;
    let token = token_of(&a, &id).await;
    assert!(is_good(&serving, &token).await);
    serving.stop().await;
    // A checkpoint of another broker is no proof, nor is a backup of another history.
    let mut other = prepared();
    other.up().await;
    other.stop().await;
    let foreign = other.journal_dir().join(checkpoint::FILE_NAME);
    let elsewhere = serving.file("elsewhere");
    let said = refused(&[
        "restore",
        text(&backup),
        "--data-dir",
        text(&elsewhere),
        "--checkpoint",
        text(&foreign),
        "--accept-lost-records",
    ]);
    assert!(!elsewhere.exists() && said.contains("key"), "{said}");
    let key = broker::checkpoint_keys(&other.data())[0].to_string();
    let with_key =
        ["restore", text(&backup), "--data-dir", text(&elsewhere), "--checkpoint", text(&foreign), "--key", &key];
    let said = refused(&[&with_key[..], &["--accept-lost-records"]].concat());
    assert!(!elsewhere.exists() && said.contains("of another history than"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_beside_a_busy_broker_has_all_that_was_acknowledged_before_it() {
    let mut serving = prepared();
    serving.up().await;
    serving.stop().await;
    serving.up().await;
    let (stop, over) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let workers: Vec<_> = (0..4)
        .map(|n| {
            let (agent, stop, over) = (serving.agent(&format!("w{n}")), Arc::clone(&stop), Arc::clone(&over));
            tokio::spawn(async move {
                for i in 0.. {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let id = agent.asked(&format!("T-{n}-{i}"), 300, notes()).await;
                    agent.collected(&id).await;
                    agent.complete(&id).await;
                    over.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    let (data, mut before) = (serving.data(), 0);
    for n in 0..6 {
        let acknowledged = over.load(Ordering::SeqCst);
        let to = serving.file(&format!("backup-{n}"));
        let made = tokio::task::spawn_blocking({
            let (data, to) = (data.clone(), to.clone());
            move || done(&["backup", "--data-dir", text(&data), "--to", text(&to)])
        });
        let made = made.await.unwrap();
        let records = made["records"].as_u64().unwrap();
        assert!(records > before, "the broker works meanwhile: {records}");
        before = records;
        let record = broker::Record::read(&to.join("journal"));
        let known =
            record.grants.values().filter(|g| matches!(g.state, GrantState::Ending { .. } | GrantState::Ended { .. }));
        assert!(known.count() >= acknowledged, "{acknowledged} were over before it");
        assert!(!to.join("keys/tokens").exists(), "who steals it can't mint");
    }
    stop.store(true, Ordering::SeqCst);
    for worker in workers {
        worker.await.unwrap();
    }
    serving.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_was_touched_is_not_put_back() {
    let mut serving = prepared();
    serving.up().await;
    serving.stop().await;
    let (backup, data) = (serving.file("backup"), serving.file("new"));
    done(&["backup", "--data-dir", text(&serving.data()), "--to", text(&backup)]);
    let restore = ["restore", text(&backup), "--data-dir", text(&data), "--accept-lost-records"];
    let manifest: Value = serde_json::from_slice(&fs::read(backup.join("backup.json")).unwrap()).unwrap();
    let files: Vec<String> = manifest["files"].as_object().unwrap().keys().cloned().collect();
    assert!(files.len() > 5, "{files:?}");
    for name in files.iter().map(String::as_str).chain(["backup.json"]) {
        let path = backup.join(name);
        let good = fs::read(&path).unwrap();
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 0x20;
        for bad in [Some(flipped), Some(good[..good.len() - 1].to_vec()), None] {
            match bad {
                Some(bad) => fs::write(&path, bad).unwrap(),
                None => fs::remove_file(&path).unwrap(),
            }
            let said = refused(&restore);
            assert!(!data.exists(), "{name}: {said}");
            fs::write(&path, &good).unwrap();
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }
    // One more segment than was listed.
    let extra = backup.join("journal/journal-00000000000000009999.seg");
    fs::write(&extra, b"x").unwrap();
    assert!(refused(&restore).contains("doesn't list"));
    fs::remove_file(&extra).unwrap();
    done(&restore);
}
