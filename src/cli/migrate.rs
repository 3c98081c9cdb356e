//! `migrate`: an embedded broker's history into the database that several nodes share.

use std::path::PathBuf;
use std::sync::Arc;

use crate::audit::note::{Signer, Verifier};
use crate::audit::verify::Options;
use crate::config::load::load;
use crate::keys::random::SystemRandom;
use crate::keys::{Keys, Origin};
use crate::store::{embedded, postgres};
use crate::time::{Clock, SystemClock};

use super::term::print;
use super::{CliError, assemble, open_store};

/// `migrate --config FILE`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Stop the broker, add [store] to its configuration, and run this as the broker's user. The journal stays as it is; the
database gets the very same records, and the same root. If it is stopped half-way, run it again.

Example:
  countersign migrate --config /etc/countersign/countersign.toml && countersign serve --config /etc/countersign/countersign.toml")]
pub struct Args {
    /// The broker's configuration: the journal is in its data folder, the database in [store]
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

/// Runs it.
pub async fn run(args: Args) -> Result<i32, CliError> {
    let loaded = load(&args.config).map_err(CliError::said)?;
    let data_dir = loaded.base.join(&loaded.config.broker.data_dir);
    let clock = SystemClock;
    let keys = Keys::open(&data_dir, Origin::Serve, clock.wall()).map_err(CliError::said)?;
    let Some(settings) = open_store::settings(&loaded.config, &loaded.base, &keys)? else {
        return Err(CliError::said(
            "the configuration has no [store] with kind = \"postgres\": say there where the history is to go",
        ));
    };
    let name = assemble::journal_name(&loaded.config.broker.issuer);
    let signer = Signer::from_keys(&name, Arc::clone(&keys.checkpoints)).map_err(CliError::said)?;
    let public = keys.checkpoints.public_keys().into_iter();
    let options = Options { keys: public.map(|key| Verifier::of(&name, key)).collect(), ..Options::default() };
    let journal = embedded::journal_dir(&data_dir);
    let moved = postgres::migrate(&settings, Arc::new(clock), Arc::new(SystemRandom), signer, &journal, &options).await;
    let moved = moved.map_err(CliError::said)?;
    let again =
        if moved.before > 0 { format!(" ({} of them were there already)", moved.before) } else { String::new() };
    print(&format!(
        "{} records are in the database{again}; root {}, the same as the journal's\n",
        moved.records, moved.root
    ))?;
    Ok(0)
}
