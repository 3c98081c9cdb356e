//! `[store]`: where the record is kept. Without it, in the data folder, for one process.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::SecretRef;
use super::check::{check_file, check_secret, within};
use super::load::Problem;
use super::reader::Item;

/// Most sessions of one node with the store's database.
pub const SESSIONS_MAX: u64 = 200;
/// Least sessions: the writing one is never waited for by the others.
pub const SESSIONS_MIN: u64 = 3;

/// `[store]`.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum StoreConfig {
    /// Journal and view in the data folder; one process owns it.
    #[default]
    Embedded,
    /// One PostgreSQL database for any number of nodes.
    Postgres {
        /// `postgres://USER:PASSWORD@HOST:PORT/DATABASE`, behind a reference since it holds a password.
        url: SecretRef,
        /// The schema of the tables, made if need be.
        #[serde(default = "default_schema")]
        schema: String,
        /// PEM of the CA that the server's certificate comes from. Needed unless the server is on this machine.
        #[serde(default)]
        ca_file: Option<PathBuf>,
        /// Most sessions of this node.
        #[serde(default = "default_sessions")]
        sessions_max: u64,
    },
}

fn default_schema() -> String {
    "countersign".to_owned()
}
const fn default_sessions() -> u64 {
    10
}

pub(super) fn check(item: &Item<'_, StoreConfig>, base: Option<&std::path::Path>, out: &mut Vec<Problem>) {
    let StoreConfig::Postgres { url, schema, ca_file, sessions_max } = &item.value else { return };
    check_secret(item, &["url"], url, base, out);
    if let Some(file) = ca_file {
        check_file(item, &["ca_file"], file, base, out);
    }
    let is_plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    let begins = schema.bytes().next().is_some_and(|b| b.is_ascii_lowercase());
    if !begins || schema.len() > 63 || !schema.bytes().all(is_plain) {
        let what = "`schema` has 1 to 63 small letters, digits and `_`, and begins with a letter";
        out.push(item.problem(&["schema"], what));
    }
    within(item, "sessions_max", *sessions_max, SESSIONS_MIN, SESSIONS_MAX, out);
}
