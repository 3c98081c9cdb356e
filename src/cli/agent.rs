//! The agent's commands: `exec`, and its steps one by one.

use std::io::IsTerminal;
use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;
use zeroize::Zeroizing;

use crate::client::agent::fresh_key;
use crate::client::exec::{self, EXIT_DENIED, EXIT_FAILED, EXIT_PENDING, Exec, HEARTBEAT_SECS};
use crate::client::waiting::Waiting;
use crate::client::{AgentClient, ClientError};
use crate::core::id::{GrantId, TaskName};
use crate::time::SystemClock;
use crate::wire::agent::{CredentialView, Credentials, GrantView};
use crate::wire::visible::is_unseen;
use crate::wire::words::rfc3339;

use super::CliError;
use super::grant_text;
use super::term::{Look, duration, facts, print, print_json, safe};
use super::want::Ask;

/// `exec`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The command gets its credentials in its own way: PGHOST, PGUSER, PGPASSFILE … for PostgreSQL, else
COUNTERSIGN_<RESOURCE>_<FIELD>. They end when it ends, however it ends. With several databases the passwords of
all are in PGPASSFILE, and what differs between them is in COUNTERSIGN_<RESOURCE>_HOST, _PORT, _DBNAME, _USER alone.

Examples:
  countersign exec --want postgres/billing:read --why 'INC-42: find the double charge' -- psql
  countersign exec --want api/notes:read+write --why 'nightly sync' --ttl 5m -- ./sync.sh

Exit codes: those of the command; 70 failed, 75 still pending at the time limit, 77 denied, 128 + the signal that
stopped it before the command ran.")]
pub struct ExecArgs {
    #[command(flatten)]
    ask: Ask,
    /// How long to wait for a person, where one is asked. Then the request is taken back
    #[arg(long, value_name = "DURATION", default_value = "15m", value_parser = duration)]
    wait: Duration,
    /// Record the command's arguments themselves, not only a keyed hash of them
    #[arg(long)]
    record_arguments: bool,
    /// Name every variable that is set or taken away (never a value)
    #[arg(short, long)]
    verbose: bool,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

/// Gets credentials for one task, runs a command with them, gives them back.
pub async fn exec(args: ExecArgs) -> Result<i32, CliError> {
    // Its own codes, since 1 may be the command's.
    match exec_inner(args).await {
        Ok(code) => Ok(code),
        Err(error) => {
            eprintln!("countersign: {error}");
            Ok(EXIT_FAILED)
        }
    }
}

async fn exec_inner(args: ExecArgs) -> Result<i32, CliError> {
    let client = AgentClient::from_env()?;
    let wanted = args.ask.request(&client, Some(HEARTBEAT_SECS)).await?;
    let exec = Exec {
        wanted,
        wait: args.wait,
        command: args.command,
        record_arguments: args.record_arguments,
        verbose: args.verbose,
    };
    Ok(exec::run(&client, exec, &SystemClock).await?)
}

/// `request`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  countersign request --want postgres/billing:read --why 'INC-42' --task INC-42 --wait 15m
  countersign credentials gr_…
  countersign complete gr_…

Exit codes: 0 asked (with --wait: granted), 1 failed, 75 still pending at the time limit, 77 denied.")]
pub struct RequestArgs {
    #[command(flatten)]
    ask: Ask,
    /// Wait for the decision, at most so long
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    wait: Option<Duration>,
    /// For scripts
    #[arg(long)]
    json: bool,
}

/// Asks for a grant.
pub async fn request(args: RequestArgs) -> Result<i32, CliError> {
    let client = AgentClient::from_env()?;
    let wanted = args.ask.request(&client, None).await?;
    let mut view = match client.request(&wanted, &fresh_key()).await {
        Ok(view) => view,
        Err(ClientError::Problem(problem)) if problem.kind.ends_with(":denied") => {
            if args.json {
                print_json(&problem)?;
            } else {
                eprintln!("countersign: {}", ClientError::Problem(problem));
            }
            return Ok(EXIT_DENIED);
        }
        Err(error) => return Err(error.into()),
    };
    if let Some(wait) = args.wait.filter(|_| view.state == "pending") {
        let _waiting = Waiting::for_person("waiting for approval", &view.review_url);
        view = client.wait_decision(view, wait).await?;
    }
    show(&view, args.json)?;
    Ok(if args.wait.is_some() { code(&view) } else { 0 })
}

/// One grant.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  countersign cancel gr_06a1v3pz8t5q3r4c9m2x7k0w1h")]
pub struct GrantArgs {
    /// The grant, as `request` printed it
    #[arg(value_name = "GRANT")]
    id: GrantId,
    /// For scripts
    #[arg(long)]
    json: bool,
}

/// `status`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  countersign status gr_06a1v3pz8t5q3r4c9m2x7k0w1h --wait 30s

With --wait it comes back when a pending request is decided, or an ending grant is over with proof; then
75 means that the time was up before, and 77 that it was denied.")]
pub struct StatusArgs {
    /// The grant, as `request` printed it
    #[arg(value_name = "GRANT")]
    id: GrantId,
    /// Wait for the next step, at most so long
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    wait: Option<Duration>,
    /// For scripts
    #[arg(long)]
    json: bool,
}

/// Looks at a grant.
pub async fn status(args: StatusArgs) -> Result<i32, CliError> {
    let client = AgentClient::from_env()?;
    let mut view = client.show(args.id).await?;
    if let Some(wait) = args.wait {
        view = match view.state.as_str() {
            "pending" => {
                let _waiting = Waiting::quietly("waiting for a person");
                client.wait_decision(view, wait).await?
            }
            "ending" => until_over(&client, view.id, wait).await?,
            _ => view,
        };
    }
    show(&view, args.json)?;
    Ok(if args.wait.is_some() { code(&view) } else { 0 })
}

/// `credentials`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The secrets go to standard output and nowhere else: as JSON into a pipe or a file, readable on a terminal.

Example:
  countersign credentials gr_06a1v3pz8t5q3r4c9m2x7k0w1h | jq -r '.credentials[0].secret.token'

They are handed over once. If they were lost: --replace mints new ones and ends the first, which is recorded.")]
pub struct CredentialsArgs {
    /// The grant, as `request` printed it
    #[arg(value_name = "GRANT")]
    id: GrantId,
    /// Mint anew, and end what was handed over before
    #[arg(long)]
    replace: bool,
    /// JSON, on a terminal too
    #[arg(long)]
    json: bool,
}

/// Collects the credentials.
pub async fn credentials(args: CredentialsArgs) -> Result<i32, CliError> {
    let client = AgentClient::from_env()?;
    let given = client.credentials(args.id, args.replace, &fresh_key()).await?;
    let terminal = std::io::stdout().is_terminal();
    if terminal {
        eprintln!("countersign: secrets follow; they stay in this terminal's memory. `countersign exec` shows none.");
    }
    let text =
        if args.json || !terminal { credentials_json(&given)? } else { credentials_text(Look::of_stdout(), &given) };
    print(&text)?;
    Ok(0)
}

/// The broker's answer again: the types that hold secrets can't be serialised by accident, so it is done here.
fn credentials_json(given: &Credentials) -> Result<Zeroizing<String>, CliError> {
    let one = |c: &CredentialView| {
        let secret: serde_json::Map<String, serde_json::Value> =
            c.secret.iter().map(|(k, v)| (k.clone(), json!(v.expose()))).collect();
        json!({ "lease": c.lease, "resource": c.resource, "kind": c.kind, "public": c.public, "secret": secret, "not_after": c.not_after })
    };
    let all: Vec<_> = given.credentials.iter().map(one).collect();
    let body = json!({ "grant": given.grant, "ends_at": given.ends_at, "credentials": all });
    Ok(Zeroizing::new(format!("{}\n", serde_json::to_string_pretty(&body).map_err(CliError::said)?)))
}

fn credentials_text(look: Look, given: &Credentials) -> Zeroizing<String> {
    let mut out = Zeroizing::new(format!("{} until {}\n", given.grant, rfc3339(given.ends_at)));
    for c in &given.credentials {
        let head = look.bold(&safe(&format!("{} ({})", c.resource, c.kind)));
        out.push_str(&format!("\n{head}  {}\n", c.lease));
        let public = c.public.iter().map(|(k, v)| (k.as_str(), vec![on_terminal(v)]));
        let secret = c.secret.iter().map(|(k, v)| (k.as_str(), vec![on_terminal(v.expose())]));
        let rows: Vec<(&str, Vec<String>)> = public.chain(secret).collect();
        // What is copied must not be broken into lines.
        out.push_str(&Zeroizing::new(facts(look.unwrapped(), &rows)));
    }
    out
}

/// The very text, unless it would do something to the terminal.
fn on_terminal(text: &str) -> String {
    if text.chars().any(|c| c != '\n' && is_unseen(c)) {
        return "(has characters that a terminal can't show: use --json)".to_owned();
    }
    text.to_owned()
}

/// `complete`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("which").required(true), after_help = "\
Examples:
  countersign complete gr_06a1v3pz8t5q3r4c9m2x7k0w1h --wait
  countersign complete --task INC-42

With --wait it comes back when every credential is proven gone, and shows the proofs; 75 means not yet.")]
pub struct CompleteArgs {
    /// The grant
    #[arg(value_name = "GRANT", group = "which")]
    id: Option<GrantId>,
    /// Or the whole task: all its grants, and what hangs from them
    #[arg(long, value_name = "NAME", group = "which")]
    task: Option<TaskName>,
    /// Wait for the proofs, at most so long [default: 5m]
    #[arg(long, value_name = "DURATION", num_args = 0..=1, require_equals = true, default_missing_value = "5m",
          value_parser = duration)]
    wait: Option<Duration>,
    /// For scripts
    #[arg(long)]
    json: bool,
}

/// Says that it is done.
pub async fn complete(args: CompleteArgs) -> Result<i32, CliError> {
    let client = AgentClient::from_env()?;
    let mut views = Vec::new();
    match (args.id, &args.task) {
        (Some(id), _) => views.push(client.complete(id).await?),
        (None, Some(task)) => {
            for id in client.complete_task(task).await?.ended {
                views.push(client.show(id).await?);
            }
        }
        (None, None) => return Err(CliError::said("name a grant, or a task with --task")), // clap asks for one
    }
    if let Some(wait) = args.wait {
        let deadline = Instant::now() + wait;
        for view in &mut views {
            *view = until_over(&client, view.id, deadline.saturating_duration_since(Instant::now())).await?;
        }
    }
    let open = views.iter().any(|v| v.state == "ending");
    if args.json {
        match args.id.and_then(|_| views.first()) {
            Some(view) => print_json(view)?,
            None => print_json(&json!({ "task": args.task, "grants": views }))?,
        }
    } else {
        let look = Look::of_stdout();
        let texts: Vec<String> = views.iter().map(|v| grant_text::grant(look, v)).collect();
        print(&texts.join("\n"))?;
        if let Some(task) = &args.task {
            print(&format!("task {} is completed; {} of its grants were open\n", safe(task.as_str()), views.len()))?;
        }
    }
    Ok(if args.wait.is_some() && open { EXIT_PENDING } else { 0 })
}

/// Takes a pending request back.
pub async fn cancel(args: GrantArgs) -> Result<i32, CliError> {
    let view = AgentClient::from_env()?.cancel(args.id).await?;
    show(&view, args.json)?;
    Ok(0)
}

/// Waits until nothing can happen to the grant any more, at most `wait`.
async fn until_over(client: &AgentClient, id: GrantId, wait: Duration) -> Result<GrantView, CliError> {
    const OVER: [&str; 5] = ["ended", "denied", "lapsed", "cancelled", "withdrawn"];
    let _waiting = Waiting::quietly("waiting for the proofs");
    Ok(client.wait_state(id, &OVER, wait).await?)
}

fn show(view: &GrantView, json: bool) -> Result<(), CliError> {
    if json { print_json(view) } else { print(&grant_text::grant(Look::of_stdout(), view)) }
}

/// The exit code after a wait.
fn code(view: &GrantView) -> i32 {
    match view.state.as_str() {
        "active" | "ended" => 0,
        "pending" | "ending" | "lapsed" => EXIT_PENDING,
        _ => EXIT_DENIED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given() -> Credentials {
        serde_json::from_value(json!({
            "grant": GrantId::from_bytes([1; 16]), "ends_at": 1_700_000_000_000_u64,
            "credentials": [{
                "lease": crate::core::id::LeaseId::from_bytes([2; 16]), "resource": "postgres/billing", "kind": "postgres",
                "public": { "host": "db", "user": "u" }, "secret": { "password": "p\"w" },
            }],
        }))
        .unwrap()
    }

    #[test]
    fn credentials_come_out_whole() {
        let json = credentials_json(&given()).unwrap();
        let back: Credentials = serde_json::from_str(&json).unwrap();
        assert_eq!(back.credentials[0].secret["password"].expose(), "p\"w");
        assert_eq!(back.credentials[0].public["host"], "db");
        let text = credentials_text(Look::PLAIN, &given());
        assert!(on_terminal("a\u{1b}[2J").contains("--json"), "nothing in a credential commands the terminal");
        assert!(text.contains("password  p\"w\n") && text.contains("postgres/billing (postgres)"), "{}", *text);
    }
}
