//! The command line: one file a command. Reaches a broker only through `client`; `serve`, `dev` and `tour` assemble one.

pub mod agent;
pub mod assemble;
pub mod attest;
pub mod audit;
pub mod backup;
pub mod config;
pub mod demo_api;
pub mod dev;
pub mod folder;
pub mod freeze;
pub mod grant_text;
pub mod migrate;
mod open_store;
pub mod policy;
pub mod record_text;
pub mod review_text;
pub mod reviewer;
pub mod serve;
pub mod term;
pub mod throwaway;
pub mod tour;
pub mod want;

use clap::{Parser, Subcommand};

use crate::client::ClientError;

/// The exit code of anything that failed without a code of its own.
pub const EXIT_FAILED: i32 = 1;
/// The exit code of a wrong command line (clap's own).
pub const EXIT_USAGE: i32 = 2;

/// Why a command failed: what happened, why, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The broker, or the way to it.
    #[error("{0}")]
    Client(#[from] ClientError),
    /// Anything that is said in one line.
    #[error("{0}")]
    Said(String),
}

impl CliError {
    /// Something that is said in one line.
    pub fn said(what: impl std::fmt::Display) -> Self {
        Self::Said(what.to_string())
    }
}

/// What `--version` says. A build that tests can kill from inside says so.
const VERSION: &str = if cfg!(feature = "failpoints") {
    concat!(env!("CARGO_PKG_VERSION"), "+failpoints")
} else {
    env!("CARGO_PKG_VERSION")
};

/// Countersign: credentials for AI agents, for one task, countersigned by a person, and provably gone afterwards.
#[derive(Debug, Parser)]
#[command(name = "countersign", version = VERSION, about, max_term_width = 100, after_help = AFTER)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const AFTER: &str = "\
Start here:
  countersign tour                   the whole promise in one minute, on this machine
  countersign dev                    a broker to build against

Environment of an agent:
  COUNTERSIGN_URL                    the broker, for example https://broker.corp:8443
  COUNTERSIGN_CA                     PEM of the CA that signed its certificate
  COUNTERSIGN_AUDIENCE               what a token must be issued for, if that is not COUNTERSIGN_URL
and one identity, the first of these that is set:
  COUNTERSIGN_TOKEN                  a JWT itself: whoever reads the environment has it
  COUNTERSIGN_TOKEN_FILE             a file with a JWT that somebody renews: a projected token
  COUNTERSIGN_SVID_CERT, …_KEY       PEM files of an X.509-SVID, for mutual TLS
  SPIFFE_ENDPOINT_SOCKET             JWT-SVIDs from SPIRE or `countersign dev`
    with COUNTERSIGN_MTLS=1          X.509-SVIDs; COUNTERSIGN_URL is then the address for mutual TLS
  In GitHub Actions nothing is needed but `permissions: id-token: write`.

Exit codes:
  0 done   1 failed   2 wrong command line   75 still pending at the time limit   77 denied
  `exec` passes on the exit code of the command that it ran; when that was not run:
  70 failed, 126 not executable, 127 not found, 128 + the signal that stopped it before.";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// See the main job done, narrated, on this machine: nothing to configure
    Tour(tour::Args),
    /// Run a broker to build against: own identities, a reviewer's link, example resources
    Dev(dev::Args),
    /// Run the broker
    Serve(serve::Args),
    /// Move the history of a broker with a data folder into a database for several nodes
    Migrate(migrate::Args),
    /// Get credentials for one task, run a command with them, give them back
    Exec(agent::ExecArgs),
    /// Ask for a grant
    Request(agent::RequestArgs),
    /// Look at a grant of yours
    Status(agent::StatusArgs),
    /// Collect the credentials of a grant, once
    Credentials(agent::CredentialsArgs),
    /// Say that a grant, or a whole task, is done
    Complete(agent::CompleteArgs),
    /// Take a pending request back
    Cancel(agent::GrantArgs),
    /// Sign in as a reviewer: look, deny, revoke, freeze
    Login(reviewer::LoginArgs),
    /// What waits for a decision
    Inbox(reviewer::InboxArgs),
    /// Everything about one grant, on one screen
    Show(reviewer::ShowArgs),
    /// Show the sentence, open the page, wait for the decision there
    Approve(reviewer::ApproveArgs),
    /// Say no, with a reason for the agent
    Deny(reviewer::DenyArgs),
    /// Take a grant away, now
    Revoke(reviewer::RevokeArgs),
    /// The kill switch: end all that matches and refuse new ones
    Freeze(reviewer::FreezeArgs),
    /// Read and verify the journal
    Audit(audit::Args),
    /// Copy the broker's data folder, while the broker runs, and check the copy
    Backup(backup::BackupArgs),
    /// Put a backup back as a new data folder: with nothing in force, and never as a fork of a longer history
    Restore(backup::RestoreArgs),
    /// Check and test policies
    Policy(policy::Args),
    /// Check the configuration
    Config(config::Args),
    /// Uses a credential from a process of its own: how `tour` looks from outside
    #[command(hide = true, name = "try")]
    Try(tour::TryArgs),
}

/// Runs a command and returns the exit code.
pub async fn run(cli: Cli) -> Result<i32, CliError> {
    match cli.command {
        Command::Tour(args) => tour::run(args).await,
        Command::Dev(args) => dev::run(args).await,
        Command::Serve(args) => serve::run(args).await,
        Command::Migrate(args) => migrate::run(args).await,
        Command::Exec(args) => agent::exec(args).await,
        Command::Request(args) => agent::request(args).await,
        Command::Status(args) => agent::status(args).await,
        Command::Credentials(args) => agent::credentials(args).await,
        Command::Complete(args) => agent::complete(args).await,
        Command::Cancel(args) => agent::cancel(args).await,
        Command::Login(args) => reviewer::login(args).await,
        Command::Inbox(args) => reviewer::inbox(args).await,
        Command::Show(args) => reviewer::show(args).await,
        Command::Approve(args) => reviewer::approve(args).await,
        Command::Deny(args) => reviewer::deny(args).await,
        Command::Revoke(args) => reviewer::revoke(args).await,
        Command::Freeze(args) => reviewer::freeze(args).await,
        Command::Audit(args) => audit::run(args).await,
        Command::Backup(args) => backup::backup(&args),
        Command::Restore(args) => backup::restore(args).await,
        Command::Policy(args) => policy::run(args),
        Command::Config(args) => config::run(args).await,
        Command::Try(args) => tour::try_credential(args).await,
    }
}
