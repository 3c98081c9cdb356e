//! Opens the store that the configuration names.

use std::path::Path;
use std::sync::Arc;

use crate::audit::note::{Signer, Verifier};
use crate::config::{Config, StoreConfig};
use crate::core::digest::Digest;
use crate::keys::Keys;
use crate::keys::random::SystemRandom;
use crate::runtime::Runtime;
use crate::store::{Store, embedded, postgres, tls};

use super::CliError;

/// What is known of a store once it is open.
pub struct Opened {
    /// The store.
    pub store: Arc<dyn Store>,
    /// Records in it.
    pub records: u64,
}

/// How to reach the database of `[store]`; `None` for a store in the data folder.
pub fn settings(config: &Config, base: &Path, keys: &Keys) -> Result<Option<postgres::Settings>, CliError> {
    let settings = way_to(&config.store, base)?;
    let known_by = Digest::of(&keys.known_by()).map_err(CliError::said)?;
    Ok(settings.map(|s| postgres::Settings { keys: known_by, ..s }))
}

/// The same without the node's keys: for whoever only reads.
pub fn way_to(store: &StoreConfig, base: &Path) -> Result<Option<postgres::Settings>, CliError> {
    let StoreConfig::Postgres { url, schema, ca_file, sessions_max } = store else { return Ok(None) };
    let tls = ca_file.as_ref().map(|file| tls::MakeTls::from_file(&base.join(file))).transpose();
    Ok(Some(postgres::Settings {
        url: url.read(base).map_err(CliError::said)?,
        schema: schema.clone(),
        tls: tls.map_err(|e| CliError::said(format!("store.ca_file: {e}")))?,
        sessions_max: usize::try_from(*sessions_max).unwrap_or(usize::MAX),
        keys: Digest::of_bytes(b""),
    }))
}

/// Opens it, and says in the log what was found.
pub async fn open(
    config: &Config,
    base: &Path,
    data_dir: &Path,
    runtime: Arc<dyn Runtime>,
    keys: &Keys,
    signer: Signer,
    earlier: Vec<Verifier>,
) -> Result<Opened, CliError> {
    if let Some(settings) = settings(config, base, keys)? {
        let store = postgres::open(&settings, runtime, Arc::new(SystemRandom), Some(signer)).await;
        let store = store.map_err(CliError::said)?;
        let records = store.records();
        return Ok(Opened { store: Arc::new(store), records });
    }
    let (store, report) = embedded::open(data_dir, runtime, Some(signer), earlier).map_err(CliError::said)?;
    if let Some(cut) = &report.cut {
        let kept = cut.kept_in.display();
        tracing::warn!(bytes = cut.bytes, seq = cut.seq, %kept, "an unfinished write was cut from the journal's end");
    }
    if let Some(why) = &report.rebuilt {
        tracing::warn!(%why, replayed = report.replayed, "the view was rebuilt from the journal");
    }
    Ok(Opened { store: Arc::new(store), records: report.records })
}
