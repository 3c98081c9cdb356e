//! `config check`: everything that `serve` would refuse, in one pass, and with `--live` what the targets lack.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use crate::config::load::load;
use crate::config::{Loaded, Problem};
use crate::connector::{Connector, Gap, build};
use crate::core::id::ResourceName;
use crate::keys::{Keys, Origin};
use crate::policy::Engine;
use crate::time::{Clock, SystemClock};

use super::assemble;
use super::term::{Look, print, print_json, safe};
use super::{CliError, serve};

/// The longest that looking at one target may take.
const LIVE_MAX: Duration = Duration::from_secs(120);

/// `config`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  countersign config check --config /etc/countersign/countersign.toml --live")]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Read and check configuration, catalogue, policies and targets; exit code 1 if `serve` would refuse
    Check(CheckArgs),
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
With --live each target is spoken to, and what it lacks is listed: what is missing, what that allows, and the
statement that closes it. Run it as the broker's user: a Vault is logged in at with the broker's own key.

Example:
  countersign config check --config /etc/countersign/countersign.toml --live

Exit codes: 0 fine (perhaps with warnings), 1 a problem, a target that can't be reached, or a gap that keeps the broker from
serving a target.")]
struct CheckArgs {
    /// The broker's configuration
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Look at the targets too
    #[arg(long)]
    live: bool,
    /// For scripts
    #[arg(long)]
    json: bool,
}

/// What was found.
#[derive(Debug, Default, Serialize)]
struct Findings {
    /// `serve` would refuse.
    problems: Vec<Problem>,
    /// Works, and is hardly meant.
    warnings: Vec<Problem>,
    /// What there is, in short.
    #[serde(skip_serializing_if = "String::is_empty")]
    summary: String,
    /// Target → what it lacks. Absent without `--live`.
    #[serde(skip_serializing_if = "Option::is_none")]
    live: Option<BTreeMap<ResourceName, Target>>,
}

/// One target, looked at.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Target {
    /// It could be looked at.
    Gaps(Vec<Gap>),
    /// It couldn't.
    Failed(String),
}

/// Runs it.
pub async fn run(args: Args) -> Result<i32, CliError> {
    let What::Check(args) = args.what;
    let findings = find(&args).await?;
    if args.json { print_json(&findings) } else { print(&text(Look::of_stdout(), &findings)) }?;
    Ok(i32::from(!findings.fine()))
}

async fn find(args: &CheckArgs) -> Result<Findings, CliError> {
    let mut findings = Findings::default();
    let loaded = match load(&args.config) {
        Ok(loaded) => loaded,
        Err(error) => {
            findings.problems = error.0;
            return Ok(findings);
        }
    };
    findings.warnings.clone_from(&loaded.warnings);
    findings.problems = serve::refusals(&loaded.config);
    match Engine::load(&loaded.policies, &loaded.catalogue, &loaded.config.tier) {
        Ok(engine) => {
            let place = |w: String| Problem { place: "policies".to_owned(), what: w };
            findings.warnings.extend(engine.check().warnings.into_iter().map(place));
        }
        Err(problems) => findings.problems.extend(problems),
    }
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    if let Err(problems) = assemble::edge(&loaded, &clock) {
        findings.problems.extend(problems);
    }
    let keys = keys(&loaded, args.live, &clock, &mut findings)?;
    match build::connectors(&loaded, &keys, clock, &loaded.config.broker.name_prefix) {
        Ok(connectors) => {
            findings.summary = summary(&loaded);
            if args.live {
                findings.live = Some(look_at(connectors).await);
            }
        }
        Err(problems) => findings.problems.extend(problems),
    }
    Ok(findings)
}

/// The broker's own keys to log in with, where they are there and `--live` needs them; else keys for this moment.
fn keys(loaded: &Loaded, live: bool, clock: &Arc<dyn Clock>, findings: &mut Findings) -> Result<Keys, CliError> {
    let data_dir = loaded.base.join(&loaded.config.broker.data_dir);
    let vault = loaded.catalogue.target.iter().any(|t| t.kind == "vault");
    if live && vault {
        let place = data_dir.join("keys").display().to_string();
        let mut warn = |what: String| findings.warnings.push(Problem { place: place.clone(), what });
        if data_dir.join("keys").is_dir() {
            match Keys::open(&data_dir, Origin::Serve, clock.wall()) {
                Ok(keys) => return Ok(keys),
                Err(error) => {
                    warn(format!("the broker's keys can't be used, so a log-in at a Vault will fail: {error}"));
                }
            }
        } else {
            let what = "the broker has made no keys yet, so a Vault can't know them: start it once, give its public key to \
                        the Vault (docs/vault.md), then check again";
            warn(what.to_owned());
        }
    }
    Keys::ephemeral(clock.wall()).map_err(CliError::said)
}

fn summary(loaded: &Loaded) -> String {
    let (config, catalogue) = (&loaded.config, &loaded.catalogue);
    format!(
        "{} targets, {} resources, {} tiers, {} policy files, {} persons, {} agents' entries",
        catalogue.target.len(),
        catalogue.resource.len(),
        config.tier.len(),
        loaded.policies.len(),
        config.person.len(),
        config.agent.len()
    )
}

/// All targets at once: one that hangs holds up nobody.
async fn look_at(connectors: BTreeMap<ResourceName, Arc<dyn Connector>>) -> BTreeMap<ResourceName, Target> {
    let looks = connectors.into_iter().map(|(name, connector)| async move {
        let found = match tokio::time::timeout(LIVE_MAX, connector.check()).await {
            Ok(Ok(gaps)) => Target::Gaps(gaps),
            Ok(Err(error)) => Target::Failed(error.to_string()),
            Err(_) => Target::Failed(format!("no answer within {} s", LIVE_MAX.as_secs())),
        };
        (name, found)
    });
    futures::future::join_all(looks).await.into_iter().collect()
}

impl Findings {
    fn fine(&self) -> bool {
        let serves = |target: &Target| match target {
            Target::Gaps(gaps) => gaps.iter().all(|g| !g.fatal),
            Target::Failed(_) => false,
        };
        self.problems.is_empty() && self.live.iter().flat_map(BTreeMap::values).all(serves)
    }
}

fn text(look: Look, findings: &Findings) -> String {
    let mut out = String::new();
    let mut list = |label: String, all: &[Problem]| {
        for p in all {
            let what = look.wrap(&safe(&p.what), 2);
            out.push_str(&format!("{label}  {}\n  {what}\n", look.bold(&safe(&p.place))));
        }
    };
    list(look.bad("problem"), &findings.problems);
    list(look.warn("warning"), &findings.warnings);
    for (name, target) in findings.live.iter().flatten() {
        let name = look.bold(name.as_str());
        match target {
            Target::Gaps(gaps) if gaps.is_empty() => {
                out.push_str(&format!("target {name}: {}\n", look.good("nothing is missing")));
            }
            Target::Failed(why) => out.push_str(&format!(
                "target {name}: {}\n  {}\n",
                look.bad("can't be checked"),
                look.wrap(&safe(why), 2)
            )),
            Target::Gaps(gaps) => {
                let n = gaps.len();
                out.push_str(&format!("target {name}: {n} {}\n", if n == 1 { "gap" } else { "gaps" }));
                for gap in gaps {
                    let mark = if gap.fatal { look.bad("must be closed") } else { look.warn("should be closed") };
                    out.push_str(&format!("\n  {mark}  {}\n", look.wrap(&safe(&gap.what), 4)));
                    out.push_str(&format!("    allows: {}\n", look.wrap(&safe(&gap.allows), 12)));
                    // A statement is to be copied: its lines stay as they are.
                    let fix = gap.fix.lines().map(safe).collect::<Vec<_>>().join("\n            ");
                    out.push_str(&format!("    fix:    {fix}\n"));
                }
            }
        }
    }
    let verdict = if findings.fine() { look.good("fine") } else { look.bad("not fine") };
    let problems = findings.problems.len();
    let counted = if problems == 1 { "1 problem".to_owned() } else { format!("{problems} problems") };
    let says = if findings.summary.is_empty() { counted } else { format!("{counted}; {}", findings.summary) };
    out.push_str(&format!("{verdict}: {says}\n"));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gap(fatal: bool) -> Gap {
        Gap {
            what: "public may create in schema public".to_owned(),
            allows: "leaving tables behind".to_owned(),
            fix: "REVOKE CREATE\n  ON SCHEMA public\u{1b} FROM PUBLIC;".to_owned(),
            fatal,
        }
    }

    fn findings(target: Target) -> Findings {
        let name = ResourceName::new("db").unwrap();
        Findings { live: Some([(name, target)].into()), summary: "1 targets".to_owned(), ..Findings::default() }
    }

    #[test]
    fn gaps_say_what_they_allow_and_what_closes_them() {
        let open = findings(Target::Gaps(vec![gap(false), gap(true)]));
        let said = text(Look::PLAIN, &open);
        for part in [
            "target db: 2 gaps",
            "must be closed",
            "should be closed",
            "allows: leaving",
            "fix:    REVOKE CREATE\n",
            "ON SCHEMA public<U+001B>",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
        assert!(!open.fine() && said.contains("not fine"), "{said}");
        assert!(findings(Target::Gaps(vec![gap(false)])).fine(), "what isn't fatal is advice");
        assert!(findings(Target::Gaps(vec![])).fine());
        assert!(
            !findings(Target::Failed("connection refused".to_owned())).fine(),
            "a target that can't be seen isn't fine"
        );
    }
}
