//! `freeze`: the kill switch. What it would end is counted first, and a word is typed before it happens.

use serde_json::json;

use crate::client::ReviewerClient;
use crate::core::event::Selector;
use crate::core::id::{AgentId, PersonId, ResourceName, TaskName};
use crate::wire::words::selector_in_words;

use super::CliError;
use super::term::{Look, ask, print, print_json, safe};

/// What must be typed.
const WORD: &str = "freeze";

/// `freeze`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true), after_help = "\
Everything that matches ends now, with what hangs from it, and is refused until the freeze is lifted.

Examples:
  countersign freeze --agent spiffe://corp/agent/billing --reason 'does what nobody asked for'
  countersign freeze --all --reason 'incident 7' --yes
  countersign freeze --lift 3")]
pub struct FreezeArgs {
    /// Everything
    #[arg(long, group = "what")]
    all: bool,
    /// One agent: its SPIFFE ID, or ISSUER#SUBJECT
    #[arg(long, group = "what", value_name = "ID")]
    agent: Vec<AgentId>,
    /// All agents that one person answers for
    #[arg(long, group = "what", value_name = "PERSON")]
    owner: Vec<PersonId>,
    /// One resource of the catalogue
    #[arg(long, group = "what", value_name = "NAME")]
    resource: Vec<ResourceName>,
    /// One target, with all its resources
    #[arg(long, group = "what", value_name = "NAME")]
    target: Vec<ResourceName>,
    /// Every task of this name
    #[arg(long, group = "what", value_name = "NAME")]
    task_name: Vec<TaskName>,
    /// Lift a freeze, by its number
    #[arg(long, group = "what", value_name = "N",
          conflicts_with_all = ["all", "agent", "owner", "resource", "target", "task_name", "reason"])]
    lift: Option<u64>,
    /// Why: it stands in the record, and agents that are refused see it
    #[arg(long, value_name = "TEXT", required_unless_present = "lift")]
    reason: Option<String>,
    /// Don't ask before it happens
    #[arg(long)]
    yes: bool,
    /// For scripts; asks nothing only with --yes
    #[arg(long)]
    json: bool,
}

impl FreezeArgs {
    fn selectors(&self) -> Vec<Selector> {
        let mut out = Vec::new();
        if self.all {
            out.push(Selector::All);
        }
        out.extend(self.agent.iter().cloned().map(Selector::Agent));
        out.extend(self.owner.iter().cloned().map(Selector::Owner));
        out.extend(self.resource.iter().cloned().map(Selector::Resource));
        out.extend(self.target.iter().cloned().map(Selector::Target));
        out.extend(self.task_name.iter().cloned().map(Selector::TaskName));
        out
    }
}

/// Freezes, or lifts a freeze.
pub async fn freeze(args: FreezeArgs) -> Result<i32, CliError> {
    let client = ReviewerClient::stored()?;
    if let Some(id) = args.lift {
        client.lift(id).await?;
        if args.json {
            print_json(&json!({ "lifted": id }))?;
        } else {
            print(&format!("freeze {id} is lifted\n"))?;
        }
        return Ok(0);
    }
    let reason = args.reason.clone().unwrap_or_default(); // clap asks for one
    let selectors = args.selectors();
    let mut would_end = 0;
    for selector in &selectors {
        let would = client.freeze(selector.clone(), reason.clone(), true).await?;
        would_end += would.grants.len();
        if !args.json {
            let n = would.grants.len();
            let grants = if n == 1 { "1 grant ends".to_owned() } else { format!("{n} grants end") };
            print(&format!("{}: {grants} now, and new ones are refused\n", safe(&selector_in_words(selector))))?;
        }
    }
    if !args.yes && !ask(&format!("Type {WORD} to do it:"), WORD)? {
        return Err(CliError::said("nothing was frozen"));
    }
    let mut done = Vec::new();
    for selector in selectors {
        let result = client.freeze(selector.clone(), reason.clone(), false).await?;
        if !args.json {
            let look = Look::of_stdout();
            let id = result.id.unwrap_or_default();
            let head = look.bold(&format!("freeze {id}"));
            let what = safe(&selector_in_words(&selector));
            print(&format!(
                "{head}: {what}; {} ended. Lift it with: countersign freeze --lift {id}\n",
                result.grants.len()
            ))?;
        }
        done.push(json!({ "selector": selector, "freeze": result.id, "ended": result.grants }));
    }
    if args.json {
        print_json(&json!({ "would_end": would_end, "freezes": done }))?;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        freeze: FreezeArgs,
    }

    fn line(args: &[&str]) -> Result<FreezeArgs, clap::Error> {
        Line::try_parse_from(["freeze"].iter().chain(args)).map(|l| l.freeze)
    }

    #[test]
    fn something_must_be_named_and_a_reason_given() {
        Line::command().debug_assert();
        let args =
            line(&["--agent", "spiffe://a/b", "--agent", "spiffe://a/c", "--target", "db", "--reason", "x"]).unwrap();
        assert_eq!(args.selectors().len(), 3);
        assert!(matches!(args.selectors()[2], Selector::Target(_)));
        assert_eq!(line(&["--all", "--reason", "x"]).unwrap().selectors(), [Selector::All]);
        assert_eq!(line(&["--lift", "3"]).unwrap().lift, Some(3));
        for bad in [
            &["--reason", "x"][..],
            &["--all"],
            &["--lift", "3", "--all"],
            &["--lift", "x"],
            &["--agent", "nobody", "--reason", "x"],
            &[],
        ] {
            assert!(line(bad).is_err(), "{bad:?}");
        }
    }
}
