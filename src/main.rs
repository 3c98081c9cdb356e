//! Parse, dispatch, exit code.

use clap::Parser;
use countersign::cli::{self, Cli};

fn main() -> std::process::ExitCode {
    #[cfg(feature = "failpoints")]
    countersign::failpoint::arm();
    let filter = tracing_subscriber::EnvFilter::try_from_env("COUNTERSIGN_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn,countersign=info"));
    let quiet =
        !matches!(std::env::args().nth(1).as_deref(), Some("serve")) && std::env::var_os("COUNTERSIGN_LOG").is_none();
    let filter = if quiet { tracing_subscriber::EnvFilter::new("error") } else { filter };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false)
        .init();
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("countersign: can't start: {error}");
            return std::process::ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(cli::run(cli));
    // A read of the terminal that nobody waits for any more must not keep us.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => std::process::ExitCode::from(u8::try_from(code & 0xff).unwrap_or(1)),
        Err(error) => {
            eprintln!("countersign: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
