//! The record leaves the database as a journal that anybody verifies, and an embedded broker's comes into it.

use std::path::Path;

use countersign::audit::note::Signer;
use countersign::audit::verify::{Options, Report, verify};
use countersign::store::{embedded, postgres as pg};

use super::conformance::kit::*;
use super::conformance::oracle::{Names, dump};
use super::*;

const NAME: &str = "localhost/journal";

fn signer() -> Signer {
    Signer::from_seed(NAME, &[7; 32]).unwrap()
}

fn options() -> Options {
    Options { keys: vec![signer().verifier()], ..Options::default() }
}

async fn furnished(house: &PostgresHouse) {
    let node =
        pg::open(&house.settings(), Arc::new(SystemClock), Arc::new(SystemRandom), Some(signer())).await.unwrap();
    furnish(&node).await;
    node.close().await.unwrap();
}

fn verified(dir: &Path) -> Report {
    verify(dir, &options()).unwrap()
}

#[tokio::test]
async fn an_export_is_a_journal_that_verifies() {
    let house = PostgresHouse::default();
    furnished(&house).await;
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("journal");
    let exported = pg::export(&house.settings(), &dir).await.unwrap();
    let Report::Verified(v) = verified(&dir) else { panic!("{:?}", verified(&dir)) };
    assert_eq!((v.last_seq, v.root), (exported.last_seq, exported.root));
    assert_eq!(v.extends.first().map(|(size, _)| *size), Some(v.last_seq), "the checkpoint of the good end");
    assert!(v.signatures_checked && v.closed && v.last_seq > 20);
    assert!(pg::export(&house.settings(), &dir).await.is_err(), "never into a folder that holds something");

    // Somebody changes one record where it is.
    house
        .tell(
            "UPDATE $S.event SET payload = convert_to(replace(convert_from(payload, 'UTF8'), 'eve', 'eva'), 'UTF8') \
         WHERE convert_from(payload, 'UTF8') LIKE '%eve%'",
        )
        .await;
    let outcome = pg::export(&house.settings(), &folder.path().join("changed")).await;
    assert!(outcome.is_err_and(|e| e.to_string().contains("is not what its leaf says")));
}

#[tokio::test]
async fn a_record_that_was_rewritten_whole_does_not_extend_its_checkpoint() {
    let (house, other) = (PostgresHouse::default(), PostgresHouse::default());
    furnished(&house).await;
    // Another history of the same length, sealed as it should be, with the checkpoint of the first.
    let node = other.node().await;
    while figure(&node, "journal_records") < 60 {
        let n = figure(&node, "journal_records");
        ask(1000 + n).on(&node).await;
    }
    node.close().await.unwrap();
    let theirs = format!("INSERT INTO {}.checkpoint SELECT * FROM {}.checkpoint", other.schema, house.schema);
    other.tell(&theirs).await;
    let folder = tempfile::tempdir().unwrap();
    pg::export(&other.settings(), &folder.path().join("j")).await.unwrap();
    assert!(matches!(verified(&folder.path().join("j")), Report::Broken(_)));
}

#[tokio::test]
async fn an_embedded_history_moves_root_for_root() {
    let folder = tempfile::tempdir().unwrap();
    let (store, _) = embedded::open(folder.path(), Arc::new(SystemClock), Some(signer()), Vec::new()).unwrap();
    furnish(&store).await;
    let before = dump(&store, &Names::usual()).await;
    store.close().await.unwrap();
    drop(store);
    let journal = embedded::journal_dir(folder.path());
    let Report::Verified(was) = verified(&journal) else { panic!("it verifies") };

    let house = PostgresHouse::default();
    let move_it = async || {
        pg::migrate(&house.settings(), Arc::new(SystemClock), Arc::new(SystemRandom), signer(), &journal, &options())
            .await
    };
    let moved = move_it().await.unwrap();
    assert_eq!((moved.records, moved.before, moved.root), (was.last_seq, 0, was.root));
    let again = move_it().await.unwrap();
    assert_eq!((again.records, again.before, again.root), (was.last_seq, was.last_seq, was.root));
    let node = house.node().await;
    assert_eq!(dump(&node, &Names::usual()).await, before, "every answer to every question");
    // It goes on from there, and the way back is a journal.
    end(&node, 1, at(100)).await;
    let back = folder.path().join("back");
    pg::export(&house.settings(), &back).await.unwrap();
    let Report::Verified(v) = verified(&back) else { panic!("{:?}", verified(&back)) };
    assert!(v.last_seq > was.last_seq);

    // Into a database with another history, nothing goes.
    let other = PostgresHouse::default();
    ask(77).on(&other.node().await).await;
    let outcome =
        pg::migrate(&other.settings(), Arc::new(SystemClock), Arc::new(SystemRandom), signer(), &journal, &options())
            .await;
    assert!(outcome.is_err_and(|e| e.to_string().contains("another history")));
}
