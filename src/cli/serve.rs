//! `serve`: the real thing.

use std::path::PathBuf;

use crate::broker::Mode;
use crate::client::signals::Signals;
use crate::config::load::load;
use crate::config::{Config, Problem};

use super::{CliError, assemble, dev};

/// `serve --config FILE`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  countersign config check --config /etc/countersign/countersign.toml && \\\n  countersign serve --config /etc/countersign/countersign.toml"
)]
pub struct Args {
    /// The broker's configuration
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

/// Runs until it is told to stop.
pub async fn run(args: Args) -> Result<i32, CliError> {
    let loaded = load(&args.config).map_err(CliError::said)?;
    for warning in &loaded.warnings {
        tracing::warn!(place = %warning.place, "{}", warning.what);
    }
    let config = &loaded.config;
    if let Some(refusal) = refusals(config).into_iter().next() {
        return Err(CliError::said(format!("{}: {}", refusal.place, refusal.what)));
    }
    let (agent, reviewer) = (config.listen.agent, config.listen.reviewer);
    let running = assemble::start(loaded, Mode::Serve).await?;
    let mut signals = Signals::listen().map_err(CliError::said)?;
    // The key is for `audit verify --key`, on whichever machine that is.
    let (records, journal_key) = (running.records, &running.journal.1);
    tracing::info!(%agent, %reviewer, records, %journal_key, "ready");
    signals.told().await;
    tracing::info!("stopping: no new requests; what is in flight finishes");
    running.stop().await?;
    Ok(0)
}

/// What `dev` may do and `serve` may not.
pub fn refusals(config: &Config) -> Vec<Problem> {
    let mut out = Vec::new();
    let mut refuse = |place: &str, what: String| out.push(Problem { place: place.to_owned(), what });
    if config.spiffe.iter().flat_map(|s| &s.trust_domains).any(|d| d == dev::TRUST_DOMAIN) {
        let what = format!(
            "names {}, whose keys anybody can make with `countersign dev`; `serve` refuses it",
            dev::TRUST_DOMAIN
        );
        refuse("spiffe.trust_domains", what);
    }
    if config.listen.tls_cert.is_none() {
        refuse("listen", "`serve` needs TLS: set tls_cert and tls_key".to_owned());
    }
    if !config.broker.reviewer_url.starts_with("https://") {
        refuse("broker.reviewer_url", "`serve` needs TLS: write https://…".to_owned());
    }
    if config.reviewer_login.is_none() {
        refuse("reviewer_login", "the section is missing: without it nobody can approve".to_owned());
    }
    out
}
