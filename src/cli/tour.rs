//! `tour`: the whole promise kept once, on this machine, and each step checked. Exits 0 only if every check held.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio_postgres::error::SqlState;

use crate::audit::verify;
use crate::client::agent::fresh_key;
use crate::client::signals::Signals;
use crate::client::{AgentClient, Proof, ReviewerClient};
use crate::core::id::TaskName;
use crate::core::lease::Evidence;
use crate::core::vote::Verdict;
use crate::wire::agent::{CredentialView, Credentials, GrantRequest, GrantView};

use super::dev::{World, fresh_folder};
use super::folder::Folder;
use super::{CliError, throwaway};

/// How long the tour waits for a person.
const PERSON: Duration = Duration::from_secs(15 * 60);
/// How long it waits for the broker.
const BROKER: Duration = Duration::from_secs(20);
/// Chooses the target: `demo-api`, or `postgres`.
const TARGET_VARIABLE: &str = "COUNTERSIGN_TOUR_TARGET";

/// `tour`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  countersign tour
  countersign tour --yes && echo 'each step was checked'
  COUNTERSIGN_TOUR_TARGET=demo-api countersign tour

Exits 0 only if every check held.")]
pub struct Args {
    /// Don't wait for a person: the tour's own reviewer votes, through the same reviewer API
    #[arg(long)]
    yes: bool,
    /// Keep the folder with journal and configuration, to look at
    #[arg(long)]
    keep: bool,
}

/// `try`: uses a credential from a process of its own (hidden; the tour's client outside the broker's process).
#[derive(Debug, clap::Args)]
pub struct TryArgs {}

/// What `try` reads from its standard input: a secret never stands in argv.
#[derive(Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Attempt {
    Postgres { host: String, port: u16, dbname: String, user: String, password: String, sql: String },
    Http { method: String, url: String, token: String, body: String },
}

/// PostgreSQL's words for a login that is no good: the password, or the role.
const REFUSED: [SqlState; 2] = [SqlState::INVALID_PASSWORD, SqlState::INVALID_AUTHORIZATION_SPECIFICATION];

struct Target {
    name: &'static str,
    read: (&'static str, &'static str),
    write: (&'static str, &'static str),
}

const POSTGRES: Target =
    Target { name: "PostgreSQL", read: ("postgres/sandbox", "read"), write: ("postgres/shop", "write") };
const DEMO_API: Target =
    Target { name: "demo API", read: ("api/notes-sandbox", "read"), write: ("api/notes", "write") };

struct Narrator {
    step: u32,
    colour: bool,
}

impl Narrator {
    fn head(&mut self, text: &str) {
        self.step += 1;
        if self.colour {
            println!("\n\x1b[1m{}. {text}\x1b[0m", self.step);
        } else {
            println!("\n{}. {text}", self.step);
        }
    }
    fn check(&self, holds: bool, text: &str) -> Result<(), CliError> {
        let mark = if holds { "✓" } else { "✗" };
        match (self.colour, holds) {
            (true, true) => println!("   \x1b[32m{mark}\x1b[0m {text}"),
            (true, false) => println!("   \x1b[31m{mark}\x1b[0m {text}"),
            (false, _) => println!("   {mark} {text}"),
        }
        if holds { Ok(()) } else { Err(CliError::said(format!("this did not hold: {text}"))) }
    }
}

fn say(text: &str) {
    println!("   {text}");
}

/// Runs it. Told to stop on the way, it leaves nothing behind either.
pub async fn run(args: Args) -> Result<i32, CliError> {
    let mut signals = Signals::listen().map_err(CliError::said)?;
    let wanted = std::env::var(TARGET_VARIABLE).unwrap_or_default();
    let binaries = match wanted.as_str() {
        "" => throwaway::binaries(),
        "demo-api" => Err(format!("{TARGET_VARIABLE}=demo-api")),
        "postgres" => {
            Ok(throwaway::binaries().map_err(|why| CliError::said(format!("{TARGET_VARIABLE}=postgres, but {why}")))?)
        }
        _ => return Err(CliError::said("COUNTERSIGN_TOUR_TARGET is demo-api or postgres")),
    };
    let target = if binaries.is_ok() { POSTGRES } else { DEMO_API };
    let mut n = Narrator { step: 0, colour: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() };
    match &binaries {
        Ok(_) => println!("Countersign, once through. The target is a real PostgreSQL, started for this tour."),
        Err(why) => println!(
            "Countersign, once through. The target is the demo API, which asks the broker at each call ({why})."
        ),
    }
    n.head("A broker starts");
    let world = World::start(fresh_folder("tour", !args.keep), binaries.ok(), [0, 0]).await?;
    let outcome = tokio::select! {
        biased;
        code = signals.told() => Ok(Some(code)),
        outcome = steps(&args, &mut n, &target, &world) => outcome.map(|()| None),
    };
    let journal = world.running.journal.clone();
    let (folder, keep) = (world.folder.path().to_owned(), args.keep);
    if !matches!(outcome, Ok(None)) {
        world.stop().await?;
        return outcome.map(Option::unwrap_or_default);
    }
    n.head("The record is verified, offline");
    // The broker closes its journal first: what is verified is all there is.
    let copy = Folder::new(folder.with_extension("journal"), true);
    world.stop_and(|| copy_files(&journal.0, copy.path())).await?;
    let options = verify::Options { keys: vec![journal.1], ..verify::Options::default() };
    match verify::verify(copy.path(), &options).map_err(CliError::said)? {
        verify::Report::Verified(verified) => n.check(true, &verified.to_string())?,
        verify::Report::Broken(broken) => n.check(false, &broken.to_string())?,
    }
    println!("\nDone. No credential stood anywhere before, and none is left.");
    if keep {
        println!("Journal and configuration: {}", folder.display());
    }
    println!("Next: `countersign dev` runs this world for you to build against.");
    Ok(0)
}

fn copy_files(from: &std::path::Path, to: &std::path::Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

async fn steps(args: &Args, n: &mut Narrator, target: &Target, world: &World) -> Result<(), CliError> {
    say(&format!("agents:    {}", world.agent_url));
    say(&format!("reviewers: {}", world.reviewer_url));
    say("an agent's identity comes from a SPIFFE Workload API; it holds no key and no password");
    let proof = Proof::WorkloadJwt { endpoint: world.workload_api() };
    let agent = AgentClient::new(&world.agent_url, None, Some(&world.ca), proof)?;
    let task = TaskName::new("INC-42").map_err(CliError::said)?;

    n.head("The agent asks to read, in a place from which production can't be reached");
    let read = ask(&agent, &task, "look at the sandbox before touching anything", target.read, 300).await?;
    say(read.sentence.as_deref().unwrap_or_default());
    n.check(read.state == "active", "policy lets it pass by itself (tier observe, no person asked)")?;
    let credentials = agent.credentials(read.id, false, &fresh_key()).await?;
    let reading = &credentials.credentials[0];
    let used = attempt(world, target, reading, false).await?;
    n.check(used.is_ok(), &format!("a credential for {} was minted, and works", target.read.0))?;

    n.head("It asks for a production write");
    let why = "mark invoice 2 as paid, as agreed in INC-42";
    let write = ask(&agent, &task, why, target.write, 600).await?;
    n.check(write.state == "pending", "policy wants a person (tier change, one approval)")?;
    let early = agent.credentials(write.id, false, &fresh_key()).await;
    n.check(early.is_err(), "before that, the agent gets nothing")?;

    n.head("A person reads one page, and decides");
    say(&format!("“{}”", write.sentence.as_deref().unwrap_or_default()));
    let write = decide(args, world, &agent, &write).await?;
    n.check(write.state == "active", "approved: exactly what was shown is what will be minted")?;

    n.head("The agent collects its credential, once, and works with it");
    let collected: Credentials = agent.credentials(write.id, false, &fresh_key()).await?;
    let writing = &collected.credentials[0];
    let used = attempt(world, target, writing, true).await?;
    n.check(used.is_ok(), &format!("from another process: {}", used.unwrap_or_else(|e| e)))?;
    let again = agent.credentials(write.id, false, &fresh_key()).await;
    n.check(again.is_err(), "a second collection is refused")?;
    let report = json!({ "tool": "try", "status": "ok" });
    let invocation = serde_json::from_value(report).map_err(CliError::said)?;
    agent.report(write.id, invocation).await?;

    n.head("The task is done, and the credentials die with it");
    agent.complete_task(&task).await?;
    for (id, credential, write) in [(write.id, writing, true), (read.id, reading, false)] {
        let what = if write { target.write.0 } else { target.read.0 };
        let ended = agent.wait_state(id, &["ended"], BROKER).await?;
        n.check(ended.state == "ended", &format!("the broker says that everything for {what} is gone"))?;
        n.check(!ended.leases.is_empty(), &format!("{} credential(s) had been minted for it", ended.leases.len()))?;
        for lease in &ended.leases {
            let evidence = lease.evidence.as_ref().map(evidence_in_words).unwrap_or_default();
            n.check(lease.state == "revoked" && !evidence.is_empty(), &format!("evidence: {evidence}"))?;
        }
        match attempt(world, target, credential, write).await? {
            Ok(_) => n.check(false, "the very same credential, tried from another process, is refused")?,
            Err(refused) => {
                n.check(true, &format!("the very same credential, tried from another process: {refused}"))?
            }
        }
    }

    n.head("Everything stands in one record");
    let auditor = ReviewerClient::new(&world.reviewer_url, None, Some(world.terminal_session("reviewer")?))?;
    let review = auditor.review(write.id).await?;
    for entry in &review.timeline {
        let at = entry.at.0 % 86_400_000 / 1000;
        let source = match entry.source.as_str() {
            "agent" => "  [reported by the agent]",
            "target" => "  [seen at the target]",
            _ => "",
        };
        say(&format!("{:02}:{:02}:{:02}  {}{source}", at / 3600, at / 60 % 60, at % 60, entry.says));
    }
    n.check(review.timeline.len() >= 8, "request, rule, vote, credential, use, end and proof")
}

fn evidence_in_words(evidence: &Evidence) -> String {
    match evidence {
        Evidence::TargetSaysGone { detail } | Evidence::TriedAndRefused { detail } => detail.clone(),
        Evidence::Expired { .. } => "its own expiry has passed".to_owned(),
    }
}

async fn ask(
    agent: &AgentClient,
    task: &TaskName,
    why: &str,
    want: (&str, &str),
    life_secs: u64,
) -> Result<GrantView, CliError> {
    let wants = [(want.0.to_owned(), vec![want.1.to_owned()])];
    let mut authorization_details = agent.details(&wants).await?;
    if want == POSTGRES.write {
        // No more than the task needs: one table of two.
        authorization_details[0]["tables"] = json!(["invoices"]);
    }
    let wanted = GrantRequest {
        task: task.clone(),
        intent: why.to_owned(),
        authorization_details,
        life_secs,
        parent: None,
        heartbeat_secs: None,
        bind: false,
    };
    Ok(agent.request(&wanted, &fresh_key()).await?)
}

/// The person's decision: in the browser, with `y` here, or by the tour's own reviewer.
async fn decide(args: &Args, world: &World, agent: &AgentClient, grant: &GrantView) -> Result<GrantView, CliError> {
    let reviewer = ReviewerClient::new(&world.reviewer_url, None, Some(world.terminal_session("reviewer")?))?;
    let review = reviewer.review(grant.id).await?;
    for facts in &review.permissions {
        say(&format!("can:     {}", facts.can.join("; ")));
        say(&format!("cannot:  {}", facts.cannot.join("; ")));
        say(&format!("ending:  {}", facts.ending));
    }
    let digest = review.digest.ok_or_else(|| CliError::said("the request has no digest"))?;
    say(&format!("digest:  {digest}"));
    if args.yes {
        say("--yes: the tour's own reviewer approves, through the same reviewer API");
        reviewer.vote(grant.id, Verdict::Approve, digest, None).await?;
    } else {
        say(&format!("open     {}", world.one_time_link("reviewer")?));
        say(&format!("then     {}", grant.review_url));
        print!("   or type y (approve) or n (deny) here: ");
        std::io::stdout().flush().map_err(CliError::said)?;
        let mut lines = BufReader::new(tokio::io::stdin()).lines();
        tokio::select! {
            seen = agent.wait_decision(grant.clone(), PERSON) => {
                println!();
                return Ok(seen?);
            }
            line = lines.next_line() => {
                let verdict = match line.map_err(CliError::said)?.as_deref().map(str::trim) {
                    Some("y" | "Y" | "yes") => Verdict::Approve,
                    Some(_) => Verdict::Deny,
                    None => return Err(CliError::said("nobody is there to decide; `tour --yes` goes on by itself")),
                };
                reviewer.vote(grant.id, verdict, digest, None).await?;
            }
        }
    }
    Ok(agent.wait_decision(grant.clone(), BROKER).await?)
}

/// Uses a credential from a process of its own. Inner `Err`: the target said that the credential is no good, and how.
async fn attempt(
    world: &World,
    target: &Target,
    credential: &CredentialView,
    write: bool,
) -> Result<Result<String, String>, CliError> {
    let public = |name: &str| credential.public.get(name).cloned().unwrap_or_default();
    let secret = |name: &str| credential.secret.get(name).map(|s| s.expose().to_owned()).unwrap_or_default();
    let attempt = if target.name == POSTGRES.name {
        let sql = if write { "UPDATE invoices SET paid = true WHERE id = 2" } else { "SELECT body FROM notes" };
        Attempt::Postgres {
            host: public("host"),
            port: public("port").parse().map_err(CliError::said)?,
            dbname: public("dbname"),
            user: public("user"),
            password: secret("password"),
            sql: sql.to_owned(),
        }
    } else {
        let (method, path, body) =
            if write { ("POST", "/prod/notes", "invoice 2 is paid") } else { ("GET", "/sandbox/notes", "") };
        Attempt::Http {
            method: method.to_owned(),
            url: format!("{}{path}", world.demo_url),
            token: secret("token"),
            body: body.to_owned(),
        }
    };
    let program = std::env::current_exe().map_err(CliError::said)?;
    let mut child = tokio::process::Command::new(program)
        .arg("try")
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(CliError::said)?;
    let text = zeroize::Zeroizing::new(serde_json::to_vec(&attempt).map_err(CliError::said)?);
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(&text).await.map_err(CliError::said)?;
    }
    let output = child.wait_with_output().await.map_err(CliError::said)?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    match output.status.code() {
        Some(0) => Ok(Ok(said)),
        Some(1) => Ok(Err(said)),
        _ => Err(CliError::said(format!("the client that tries the credential failed: {said}"))),
    }
}

/// What came of a try.
enum Tried {
    /// The target let it.
    Let(String),
    /// The target says that the credential is no good.
    Refused(String),
    /// Anything else: nothing was shown.
    Neither(String),
}

/// `try`: exits 0 if the target let it, 1 if it refused the credential, 2 if neither is certain.
pub async fn try_credential(_: TryArgs) -> Result<i32, CliError> {
    let mut text = zeroize::Zeroizing::new(String::new());
    std::io::Read::read_to_string(&mut std::io::stdin(), &mut text).map_err(CliError::said)?;
    let attempt: Attempt = serde_json::from_str(&text).map_err(CliError::said)?;
    let tried = match attempt {
        Attempt::Postgres { host, port, dbname, user, password, sql } => {
            let mut config = tokio_postgres::Config::new();
            config.host(host).port(port).dbname(dbname).user(user).password(password);
            match try_postgres(&config, &sql).await {
                Ok(rows) => Tried::Let(format!("PostgreSQL answered: {rows} row(s)")),
                Err(error) => refused_by_postgres(&error),
            }
        }
        Attempt::Http { method, url, token, body } => match try_http(&method, &url, &token, body).await {
            Ok((status, why)) => refused_by_api(status, &why),
            Err(error) => Tried::Neither(format!("the API can't be asked: {}", error.without_url())),
        },
    };
    let (code, said) = match tried {
        Tried::Let(said) => (0, said),
        Tried::Refused(said) => (1, said),
        Tried::Neither(said) => (2, said),
    };
    println!("{said}");
    Ok(code)
}

async fn try_postgres(config: &tokio_postgres::Config, sql: &str) -> Result<u64, tokio_postgres::Error> {
    let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    client.execute(sql, &[]).await
}

/// Only the refusal of the login itself says that the credential is no good; a missing right, a full server or a syntax
/// error would not.
fn refused_by_postgres(error: &tokio_postgres::Error) -> Tried {
    let Some(db) = error.as_db_error() else { return Tried::Neither(format!("PostgreSQL can't be asked: {error}")) };
    let said = format!("PostgreSQL refuses it: {} (SQLSTATE {})", db.message(), db.code().code());
    if REFUSED.contains(db.code()) { Tried::Refused(said) } else { Tried::Neither(said) }
}

async fn try_http(method: &str, url: &str, token: &str, body: String) -> Result<(u16, String), reqwest::Error> {
    let method = method.parse().unwrap_or(reqwest::Method::GET);
    let http = reqwest::Client::builder().no_proxy().build()?;
    let response = http.request(method, url).bearer_auth(token).body(body).send().await?;
    let status = response.status().as_u16();
    let answer: BTreeMap<String, Value> = response.json().await.unwrap_or_default();
    Ok((status, answer.get("error").and_then(Value::as_str).unwrap_or_default().to_owned()))
}

/// 401 alone says that the token is no good (RFC 6750, section 3.1).
fn refused_by_api(status: u16, why: &str) -> Tried {
    match status {
        200..300 => Tried::Let(format!("the API answered {status}")),
        401 => Tried::Refused(format!("the API refuses it: 401, {why}")),
        _ => Tried::Neither(format!("the API answered {status}, {why}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_refused_credential_counts_as_refused() {
        for (status, refused) in [(401, true), (403, false), (404, false), (500, false), (503, false), (302, false)] {
            let tried = refused_by_api(status, "");
            assert_eq!(matches!(tried, Tried::Refused(_)), refused, "{status}");
            assert!(!matches!(tried, Tried::Let(_)), "{status}");
        }
        assert!(matches!(refused_by_api(200, ""), Tried::Let(_)));
        let codes: Vec<&str> = REFUSED.iter().map(SqlState::code).collect();
        assert_eq!(codes, ["28P01", "28000"]);
    }
}
