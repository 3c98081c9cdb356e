//! `policy`: what the policies say, and whether they say what a table of cases expects.

use std::path::{Path, PathBuf};

use serde_json::json;

use crate::config::load::load_rules;
use crate::config::{ConfigError, Loaded, Problem};
use crate::policy::Engine;
use crate::policy::table::{self, Report, TABLE_BYTES_MAX};

use super::CliError;
use super::term::{Look, print, print_json, safe};

/// `policy`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  countersign policy check --config countersign.toml
  countersign policy test --config countersign.toml policies/cases.toml")]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Validate the policies against the catalogue; show tiers and rules, and what is probably not meant
    Check(CheckArgs),
    /// Run a table of cases; exit code 1 if one fails
    Test(TestArgs),
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  countersign policy check --config /etc/countersign/countersign.toml")]
struct CheckArgs {
    /// The broker's configuration, which names catalogue and policies
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// For scripts
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
A case says who asks for what, and what must come out:

  [agents.ops]
  id = \"spiffe://corp.example/agent/ops/7\"
  owner = \"ana\"

  [[case]]
  name = \"writing production is a change\"
  agent = \"ops\"
  want = [{ type = \"postgres\", identifier = \"postgres/billing\", actions = [\"write\"] }]
  expect = { tier = \"change\" }             # or { deny = \"RULE\" }

Example:
  countersign policy test --config countersign.toml policies/cases.toml")]
struct TestArgs {
    /// The broker's configuration, which names catalogue and policies
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// The table of cases
    #[arg(value_name = "CASES.toml")]
    cases: PathBuf,
    /// Say the failures alone
    #[arg(short, long)]
    quiet: bool,
    /// For scripts
    #[arg(long)]
    json: bool,
}

/// Runs one of them.
pub fn run(args: Args) -> Result<i32, CliError> {
    match args.what {
        What::Check(args) => check(&args),
        What::Test(args) => test(&args),
    }
}

/// Problems, one a line.
fn said(problems: Vec<Problem>) -> CliError {
    CliError::said(ConfigError(problems))
}

fn engine(config: &Path) -> Result<(Loaded, Engine), CliError> {
    let loaded = load_rules(config).map_err(CliError::said)?;
    let engine = Engine::load(&loaded.policies, &loaded.catalogue, &loaded.config.tier).map_err(said)?;
    Ok((loaded, engine))
}

fn check(args: &CheckArgs) -> Result<i32, CliError> {
    let (_, engine) = engine(&args.config)?;
    let summary = engine.check();
    if args.json { print_json(&summary) } else { print(&summary.to_string()) }?;
    Ok(0)
}

fn test(args: &TestArgs) -> Result<i32, CliError> {
    let (_, engine) = engine(&args.config)?;
    let place = args.cases.display().to_string();
    let size = std::fs::metadata(&args.cases).map_err(|e| CliError::said(format!("can't read {place}: {e}")))?.len();
    if size > TABLE_BYTES_MAX as u64 {
        return Err(CliError::said(format!("{place} is larger than {TABLE_BYTES_MAX} bytes")));
    }
    let text = std::fs::read_to_string(&args.cases).map_err(|e| CliError::said(format!("can't read {place}: {e}")))?;
    let report = table::run(&engine, &place, &text).map_err(said)?;
    if args.json {
        let cases: Vec<_> = report
            .results
            .iter()
            .map(|r| json!({ "name": r.name, "passed": r.failure.is_none(), "failure": r.failure }))
            .collect();
        print_json(&json!({ "passed": report.passed(), "cases": cases, "uncovered": report.uncovered }))?;
    } else {
        print(&report_text(Look::of_stdout(), &report, args.quiet))?;
    }
    Ok(i32::from(!report.passed()))
}

fn report_text(look: Look, report: &Report, quiet: bool) -> String {
    let mut out = String::new();
    let mut failed = 0;
    for result in &report.results {
        match &result.failure {
            None if quiet => {}
            None => out.push_str(&format!("{}      {}\n", look.good("ok"), safe(&result.name))),
            Some(why) => {
                failed += 1;
                out.push_str(&format!("{}  {}\n", look.bad("FAILED"), look.bold(&safe(&result.name))));
                for line in why.lines() {
                    out.push_str(&format!("        {}\n", safe(line)));
                }
            }
        }
    }
    let verdict = format!("{} cases, {failed} failed", report.results.len());
    out.push_str(&if failed == 0 { look.good(&verdict) } else { look.bad(&verdict) });
    if report.uncovered.is_empty() {
        out.push_str("; every rule is covered\n");
    } else {
        out.push_str(&format!("; rules without a case: {}\n", safe(&report.uncovered.join(", "))));
    }
    out
}
