//! `exec`: obtain the grant, hand the credential over in the tool's own way, run it, end the grant when it ends.
//!
//! Secrets never stand in argv or on stderr. A PostgreSQL password goes into an anonymous file in memory; what has no
//! such way goes into the variables that were asked for.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::Duration;

use rustix::fs::{MemfdFlags, Mode};

use crate::core::event::Invocation;
use crate::core::id::{GrantId, Timestamp};
use crate::core::request::HEARTBEATS_MISSED;
use crate::core::secret::Secret;
use crate::time::Clock;
use crate::wire::agent::{CredentialView, Credentials, GrantRequest, GrantView};
use crate::wire::visible::terminal_line as line;

use super::ClientError;
use super::agent::{AgentClient, fresh_key};
use super::waiting::Waiting;

/// Exit code: still pending at the time limit.
pub const EXIT_PENDING: i32 = 75;
/// Exit code: denied.
pub const EXIT_DENIED: i32 = 77;
/// Exit code: anything else that kept the command from running.
pub const EXIT_FAILED: i32 = 70;
/// Interval of signs of life, in seconds.
pub const HEARTBEAT_SECS: u64 = 5;
/// How long to wait, at the end, until the broker has heard that it is over.
const COMPLETE: Duration = Duration::from_secs(10);

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

/// What a child gets: variables, and files in memory that must stay open while it runs.
#[derive(Default)]
pub struct Handover {
    /// Variables to set.
    pub set: BTreeMap<String, Secret>,
    /// Variables to take away: they would win over ours, or are ours alone.
    pub scrub: Vec<&'static str>,
    files: Vec<OwnedFd>,
}

/// Variables that prove who we are. The child has a credential of its own and needs none of them.
const OURS: [&str; 6] = [
    "COUNTERSIGN_TOKEN",
    "COUNTERSIGN_TOKEN_FILE",
    "COUNTERSIGN_SVID_CERT",
    "COUNTERSIGN_SVID_KEY",
    "ACTIONS_ID_TOKEN_REQUEST_URL",
    "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
];

/// Runs it. Returns the exit code for our own process.
pub async fn run(client: &AgentClient, exec: Exec, clock: &dyn Clock) -> Result<i32, ClientError> {
    let asked = match client.request(&exec.wanted, &fresh_key()).await {
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
            seen = client.wait_decision(asked.clone(), exec.wait) => seen?,
            code = interrupted() => {
                take_back(client, asked.id).await?;
                return Ok(code);
            }
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
    let outcome = with_grant(client, &exec, &grant, clock).await;
    // However it went: the grant ends now, not at its deadline.
    if let Ok(Err(error)) | Err(error) = tokio::time::timeout(COMPLETE, client.complete(grant.id))
        .await
        .map_err(|_| ClientError::Answer("no answer in time".to_owned()))
    {
        eprintln!("countersign: could not say that it is over ({error}); it ends by missed heartbeat");
    }
    outcome
}

/// Takes a request back, also one that was approved in that very moment.
async fn take_back(client: &AgentClient, id: GrantId) -> Result<(), ClientError> {
    match client.cancel(id).await {
        Err(error) if error.word() == Some("state") => client.complete(id).await.map(|_| ()),
        other => other.map(|_| ()),
    }
}

async fn with_grant(
    client: &AgentClient,
    exec: &Exec,
    grant: &GrantView,
    clock: &dyn Clock,
) -> Result<i32, ClientError> {
    // A mint may take longer than a missed heartbeat: signs of life begin before it.
    let key = fresh_key();
    let credentials = tokio::select! {
        credentials = client.credentials(grant.id, false, &key) => credentials?,
        () = keep_alive(client, grant.id) => {
            return Err(ClientError::Settings("the grant was ended before its credentials came".to_owned()));
        }
    };
    let handover = hand_over(&credentials)?;
    if exec.verbose {
        for name in handover.set.keys() {
            eprintln!("countersign: sets {name}");
        }
        for name in handover.scrub.iter().chain(&OURS) {
            if std::env::var_os(name).is_some() {
                eprintln!("countersign: takes away {name}");
            }
        }
    }
    let Some((program, arguments)) = exec.command.split_first() else {
        return Err(ClientError::Settings("no command was given after `--`".to_owned()));
    };
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).stdin(Stdio::inherit()).stdout(Stdio::inherit()).stderr(Stdio::inherit());
    for name in handover.scrub.iter().chain(&OURS) {
        command.env_remove(name);
    }
    for (name, value) in &handover.set {
        command.env(name, value.expose());
    }
    command.env("COUNTERSIGN_GRANT", grant.id.to_string());
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
        status = supervise(&mut child) => status,
        () = keep_alive(client, grant.id) => {
            // The grant is over: what the child holds works no more.
            eprintln!("countersign: the grant is over; stopping the command");
            signal(&child, rustix::process::Signal::TERM);
            tokio::time::timeout(Duration::from_secs(5), child.wait()).await.unwrap_or_else(|_| {
                signal(&child, rustix::process::Signal::KILL);
                Ok(std::process::ExitStatus::from_raw(9))
            })
        }
    };
    drop(handover);
    let status = status.map_err(|e| ClientError::Settings(format!("the command can't be waited for: {e}")))?;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    report(client, exec, grant.id, &format!("exit:{code}"), started_at, clock.wall()).await;
    Ok(code)
}

/// Waits for the child; signals that we get are passed on to it.
async fn supervise(child: &mut tokio::process::Child) -> std::io::Result<std::process::ExitStatus> {
    use tokio::signal::unix::{SignalKind, signal as listen};
    let mut terminate = listen(SignalKind::terminate())?;
    let mut hangup = listen(SignalKind::hangup())?;
    // The terminal sends these to the whole process group, the child included: we only must not die before it.
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut quit = listen(SignalKind::quit())?;
    loop {
        tokio::select! {
            status = child.wait() => return status,
            _ = terminate.recv() => signal(child, rustix::process::Signal::TERM),
            _ = hangup.recv() => signal(child, rustix::process::Signal::HUP),
            _ = interrupt.recv() => {}
            _ = quit.recv() => {}
        }
    }
}

/// Comes back with the exit code when we are told to stop.
async fn interrupted() -> i32 {
    use tokio::signal::unix::{SignalKind, signal as listen};
    let (Ok(mut interrupt), Ok(mut terminate)) = (listen(SignalKind::interrupt()), listen(SignalKind::terminate()))
    else {
        return std::future::pending().await; // the default action stays: we die of it
    };
    tokio::select! {
        _ = interrupt.recv() => 128 + 2,
        _ = terminate.recv() => 128 + 15,
    }
}

fn signal(child: &tokio::process::Child, signal: rustix::process::Signal) {
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid {
        // It may be gone already.
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Gives signs of life; returns when the grant is over, or must be: then the broker has missed too many.
async fn keep_alive(client: &AgentClient, id: GrantId) {
    let mut missed = 0;
    while missed < HEARTBEATS_MISSED {
        tokio::time::sleep(Duration::from_secs(HEARTBEAT_SECS)).await;
        match client.heartbeat(id).await {
            Ok(_) => missed = 0,
            // A broker that restarts takes its start as everybody's sign of life.
            Err(error) if error.is_transient() => {}
            Err(error) if matches!(error.word(), Some("over" | "not-found")) => return,
            // Our own identity can't be proven just now (its source restarts, a token is renewed late).
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
        arguments_digest: Some(arguments_digest(id, &exec.command)),
        arguments: exec
            .record_arguments
            .then(|| exec.command.iter().skip(1).take(64).map(|a| line(a).chars().take(250).collect()).collect()),
        status: status.to_owned(),
        started_at: Some(started_at),
        ended_at: Some(ended_at),
    };
    if let Err(error) = client.report(id, invocation).await {
        eprintln!("countersign: what was run could not be reported: {error}");
    }
}

/// Keyed with the grant's id: the same arguments can be compared within a grant, and not guessed from a list across all.
fn arguments_digest(id: GrantId, command: &[String]) -> String {
    let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, id.as_bytes());
    let mut context = aws_lc_rs::hmac::Context::with_key(&key);
    for argument in command {
        context.update(&(argument.len() as u64).to_be_bytes());
        context.update(argument.as_bytes());
    }
    hex::encode(context.sign().as_ref())
}

/// Each credential in its tool's own way.
pub fn hand_over(credentials: &Credentials) -> Result<Handover, ClientError> {
    let mut out = Handover { scrub: vec!["SPIFFE_ENDPOINT_SOCKET"], ..Handover::default() };
    let many = credentials.credentials.len() > 1;
    for credential in &credentials.credentials {
        match credential.kind.as_str() {
            "postgres" => postgres(&mut out, credential)?,
            _ => variables(&mut out, credential),
        }
        if many {
            variables(&mut out, credential);
        }
    }
    Ok(out)
}

/// `PGHOST` … and a password file in memory (HELPERS, "PostgreSQL").
fn postgres(out: &mut Handover, credential: &CredentialView) -> Result<(), ClientError> {
    let public = |name: &str| credential.public.get(name).cloned().unwrap_or_default();
    let password = credential.secret.get("password").map(Secret::expose).unwrap_or_default();
    let fields = [public("host"), public("port"), public("dbname"), public("user"), password.to_owned()];
    let escaped: Vec<String> = fields.iter().map(|f| f.replace('\\', "\\\\").replace(':', "\\:")).collect();
    let text = zeroize::Zeroizing::new(format!("{}\n", escaped.join(":")));
    let fail = |e: std::io::Error| ClientError::Settings(format!("no file in memory for the password: {e}"));
    // Without CLOEXEC: the child inherits it, under the same number.
    let file = rustix::fs::memfd_create("pgpass", MemfdFlags::empty()).map_err(|e| fail(e.into()))?;
    rustix::fs::fchmod(&file, Mode::RUSR | Mode::WUSR).map_err(|e| fail(e.into()))?;
    let mut writer = std::fs::File::from(file);
    writer.write_all(text.as_bytes()).map_err(fail)?;
    let file = OwnedFd::from(writer);
    let set = [
        ("PGHOST", public("host")),
        ("PGPORT", public("port")),
        ("PGDATABASE", public("dbname")),
        ("PGUSER", public("user")),
        ("PGSSLMODE", public("sslmode")),
        ("PGPASSFILE", format!("/proc/self/fd/{}", file.as_raw_fd())),
    ];
    for (name, value) in set {
        if !value.is_empty() {
            out.set.insert(name.to_owned(), Secret::new(value));
        }
    }
    out.scrub.extend(["PGPASSWORD", "PGSERVICE", "PGSERVICEFILE", "PGHOSTADDR", "PGOPTIONS"]);
    out.files.push(file);
    Ok(())
}

/// `COUNTERSIGN_<RESOURCE>_<FIELD>` for each field.
fn variables(out: &mut Handover, credential: &CredentialView) {
    let name = |text: &str| -> String {
        text.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect()
    };
    let resource = name(&credential.resource);
    for (field, value) in &credential.public {
        out.set.insert(format!("COUNTERSIGN_{resource}_{}", name(field)), Secret::new(value.clone()));
    }
    for (field, value) in &credential.secret {
        out.set.insert(format!("COUNTERSIGN_{resource}_{}", name(field)), value.clone());
    }
}
