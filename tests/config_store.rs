//! `[store]`: what is taken, and what each mistake is told.

#[path = "support/mod.rs"]
mod support;

use countersign::config::StoreConfig;
use support::{Example, MAIN, problems};

const STORE: &str = "[store]\nkind = \"postgres\"\nurl = \"file:store-url\"\n";

fn with(store: &str) -> Example {
    let example = Example::new();
    std::fs::write(example.file("store-url"), "postgres://broker:secret@127.0.0.1/record\n").unwrap();
    std::fs::write(example.file("ca.pem"), "").unwrap();
    example.append(MAIN, store);
    example
}

#[test]
fn the_data_folder_unless_a_database_is_named() {
    assert!(matches!(Example::new().load().unwrap().config.store, StoreConfig::Embedded));
    assert!(matches!(with("[store]\nkind = \"embedded\"").load().unwrap().config.store, StoreConfig::Embedded));
    let loaded = with(&format!("{STORE}ca_file = \"ca.pem\"")).load().unwrap();
    let StoreConfig::Postgres { schema, sessions_max, ca_file, .. } = loaded.config.store else { panic!("a database") };
    assert_eq!((schema.as_str(), sessions_max, ca_file), ("countersign", 10, Some("ca.pem".into())));
}

#[test]
fn each_mistake_is_told() {
    for (store, says) in [
        ("[store]\nkind = \"sqlite\"".to_owned(), "embedded"),
        ("[store]\nkind = \"postgres\"".to_owned(), "url"),
        ("[store]\nkind = \"postgres\"\nurl = \"postgres://a:b@c/d\"".to_owned(), "reference"),
        ("[store]\nkind = \"postgres\"\nurl = \"file:nothing\"".to_owned(), "nothing"),
        (format!("{STORE}password = \"x\""), "password"),
        (format!("{STORE}schema = \"Robert; DROP\""), "schema"),
        (format!("{STORE}ca_file = \"no-such.pem\""), "no-such.pem"),
        (format!("{STORE}sessions_max = 1"), "sessions_max"),
    ] {
        let found = problems(&with(&store));
        assert_eq!(found.len(), 1, "{store}: {found:#?}");
        assert!(found[0].what.contains(says) && !found[0].what.contains("a:b@c"), "{store}: {found:#?}");
    }
}
