//! `exec`: obtain the grant, hand the credential over, run the command, end the grant when it ends, however it ends.
//! What the command gets is in `handover.rs`, which signals reach it in `signals.rs`.

use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use crate::core::event::Invocation;
use crate::core::id::{GrantId, Timestamp};
use crate::core::request::HEARTBEATS_MISSED;
use crate::time::Clock;
use crate::wire::agent::{GrantRequest, GrantView};
use crate::wire::visible::terminal_line as line;

use super::ClientError;
use super::agent::{AgentClient, fresh_key};
use super::handover::{self, Handover};
use super::signals::{Signals, send};
use super::waiting::Waiting;

/// Exit code: still pending at the time limit.
pub const EXIT_PENDING: i32 = 75;
/// Exit code: denied.
pub const EXIT_DENIED: i32 = 77;
/// Exit code: anything else that kept the command from running.
pub const EXIT_FAILED: i32 = 70;
/// Interval of signs of life, in seconds.
pub const HEARTBEAT_SECS: u64 = 5;
/// How long to wait until the broker has heard what it must hear before we go.
const FAREWELL: Duration = Duration::from_secs(10);
/// How long a command may take to end once its grant is over.
const STOP: Duration = Duration::from_secs(5);

/// What is to be run.
pub struct Exec {
    /// What is asked for.
    pub wanted: GrantRequest,
    /// How long to wait for a decision.
    pub wait: Duration,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Record the arguments themselves, not only their hash.
    pub record_arguments: bool,
    /// Name every variable that is set or scrubbed.
    pub verbose: bool,
}

/// Runs it. Returns the exit code for our own process.
pub async fn run(client: &AgentClient, exec: Exec, clock: &dyn Clock) -> Result<i32, ClientError> {
    let resources = exec.wanted.authorization_details.iter().filter_map(|d| d["identifier"].as_str());
    handover::check(resources)?;
    let fail = |e: std::io::Error| ClientError::Settings(format!("signals can't be listened to: {e}"));
    let mut signals = Signals::listen().map_err(fail)?;
    let asked = match ask(client, &exec.wanted, &mut signals).await {
        Ok(view) => view,
        Err(error @ ClientError::Problem(_)) if matches!(error.word(), Some("denied" | "frozen")) => {
            eprintln!("countersign: denied: {error}");
            return Ok(EXIT_DENIED);
        }
        Err(error) => return Err(error),
    };
    let grant = if asked.state == "pending" {
        let _waiting = Waiting::for_person("waiting for approval", &asked.review_url);
        tokio::select! {
            biased;
            code = signals.told() => {
                take_back(client, asked.id).await?;
                return Ok(code);
            }
            seen = client.wait_decision(asked.clone(), exec.wait) => seen?,
        }
    } else {
        asked
    };
    match grant.state.as_str() {
        "active" => {}
        "pending" => {
            take_back(client, grant.id).await?;
            eprintln!("countersign: nobody decided in time; the request was taken back");
            return Ok(EXIT_PENDING);
        }
        "denied" => {
            eprintln!("countersign: denied: {}", line(grant.reason.as_deref().unwrap_or("no reason given")));
            return Ok(EXIT_DENIED);
        }
        other => {
            eprintln!("countersign: the request is {other}");
            return Ok(if other == "lapsed" { EXIT_PENDING } else { EXIT_DENIED });
        }
    }
    let outcome = with_grant(client, &exec, &grant, &mut signals, clock).await;
    // However it went: the grant ends now, not at its deadline.
    if let Err(error) = farewell(client.complete(grant.id)).await {
        eprintln!("countersign: could not say that it is over ({error}); it ends by missed heartbeat");
    }
    outcome
}

/// Asks. Told to stop meanwhile, we wait a little: what was asked for must be taken back, and for that be known.
async fn ask(client: &AgentClient, wanted: &GrantRequest, signals: &mut Signals) -> Result<GrantView, ClientError> {
    let key = fresh_key();
    let mut asking = std::pin::pin!(client.request(wanted, &key));
    tokio::select! {
        asked = &mut asking => asked,
        _ = signals.told() => farewell(asking).await,
    }
}

/// A call that we don't wait for longer than it is polite to.
async fn farewell<T>(call: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
    let late = |_| Err(ClientError::Answer("no answer in time".to_owned()));
    tokio::time::timeout(FAREWELL, call).await.unwrap_or_else(late)
}

/// Takes a request back, also one that was approved in that very moment.
async fn take_back(client: &AgentClient, id: GrantId) -> Result<(), ClientError> {
    match farewell(client.cancel(id)).await {
        Err(error) if error.word() == Some("state") => farewell(client.complete(id)).await.map(|_| ()),
        other => other.map(|_| ()),
    }
}

async fn with_grant(
    client: &AgentClient,
    exec: &Exec,
    grant: &GrantView,
    signals: &mut Signals,
    clock: &dyn Clock,
) -> Result<i32, ClientError> {
    // A mint may take longer than a missed heartbeat: signs of life begin before it.
    let key = fresh_key();
    let credentials = tokio::select! {
        biased;
        code = signals.told() => return Ok(code),
        credentials = client.credentials(grant.id, false, &key) => credentials?,
        () = keep_alive(client, grant.id) => {
            return Err(ClientError::Settings("the grant was ended before its credentials came".to_owned()));
        }
    };
    let handover = Handover::of(&credentials)?;
    if exec.verbose {
        for says in handover.in_words(|name| std::env::var_os(name).is_some()) {
            eprintln!("countersign: {says}");
        }
    }
    let Some((program, arguments)) = exec.command.split_first() else {
        return Err(ClientError::Settings("no command was given after `--`".to_owned()));
    };
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).stdin(Stdio::inherit()).stdout(Stdio::inherit()).stderr(Stdio::inherit());
    handover.apply(&mut command);
    if let Some(code) = signals.told_already() {
        return Ok(code);
    }
    let started_at = clock.wall();
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            eprintln!("countersign: can't run {}: {error}", line(program));
            report(client, exec, grant.id, "failed", started_at, clock.wall()).await;
            return Ok(if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 });
        }
    };
    let status = tokio::select! {
        status = signals.supervise(&mut child) => status,
        () = keep_alive(client, grant.id) => {
            // The grant is over: what the child holds works no more.
            eprintln!("countersign: the grant is over; stopping the command");
            send(&child, Signal::TERM);
            tokio::time::timeout(STOP, child.wait()).await.unwrap_or_else(|_| {
                send(&child, Signal::KILL);
                Ok(ExitStatus::from_raw(Signal::KILL.as_raw()))
            })
        }
    };
    drop(handover);
    let status = status.map_err(|e| ClientError::Settings(format!("the command can't be waited for: {e}")))?;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    report(client, exec, grant.id, &format!("exit:{code}"), started_at, clock.wall()).await;
    Ok(code)
}

/// Gives signs of life; returns when the grant is over, or must be: then the broker has missed too many.
async fn keep_alive(client: &AgentClient, id: GrantId) {
    let mut missed = 0;
    while missed < HEARTBEATS_MISSED {
        tokio::time::sleep(Duration::from_secs(HEARTBEAT_SECS)).await;
        match client.heartbeat(id).await {
            Ok(_) => missed = 0,
            // Our own identity can't be proven just now: the broker is there and counts.
            Err(ClientError::Proof(_)) => missed += 1,
            // A broker that restarts takes its start as everybody's sign of life.
            Err(error) if error.is_transient() => {}
            Err(error) if matches!(error.word(), Some("over" | "not-found")) => return,
            Err(_) => missed += 1,
        }
    }
}

async fn report(
    client: &AgentClient,
    exec: &Exec,
    id: GrantId,
    status: &str,
    started_at: Timestamp,
    ended_at: Timestamp,
) {
    let tool = exec.command.first().map(|p| p.rsplit('/').next().unwrap_or(p)).unwrap_or_default();
    let invocation = Invocation {
        tool: line(tool).chars().take(200).collect(),
        arguments_digest: Some(arguments_digest(&exec.command)),
        arguments: exec
            .record_arguments
            .then(|| exec.command.iter().skip(1).take(64).map(|a| line(a).chars().take(250).collect()).collect()),
        status: status.to_owned(),
        started_at: Some(started_at),
        ended_at: Some(ended_at),
    };
    if let Err(error) = farewell(client.report(id, invocation)).await {
        eprintln!("countersign: what was run could not be reported: {error}");
    }
}

/// What the broker makes a keyed hash of, with a key that only it has: equal commands can be compared in the record, and
/// not guessed from a list. Not the arguments themselves: they don't leave this machine unless they are to be recorded.
fn arguments_digest(command: &[String]) -> String {
    let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    for argument in command {
        context.update(&(argument.len() as u64).to_be_bytes());
        context.update(argument.as_bytes());
    }
    hex::encode(context.finish())
}
