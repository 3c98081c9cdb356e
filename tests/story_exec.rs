//! "I put `countersign exec` before my command, and it has its access while it runs, and not a moment longer."

#[path = "support/broker.rs"]
mod broker;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use broker::agent::{Agent, sandbox};
use broker::{PATIENCE, Plan, World, postgres, process, target, until, until_within};
use countersign::identity::workload_api::WorkloadApiServer;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const SANDBOX: [&str; 4] = ["--want", "postgres/sandbox:read", "--why", "the story"];
const NOTES: [&str; 4] = ["--want", "api/notes:read", "--why", "the story"];

/// `countersign exec … -- command`, in a process group of its own, as a service or an agent's harness starts it.
fn exec(world: &World, agent: &Agent, args: &[&str], command: &[&str]) -> Command {
    let home = world.file("home");
    std::fs::create_dir_all(&home).unwrap();
    // The program itself, not a distribution's wrapper around it.
    let mut path = postgres::binaries().map(|p| format!("{}:", p.display())).unwrap_or_default();
    path.push_str("/usr/bin:/bin");
    let mut exec = Command::new(process::binary());
    exec.arg("exec").args(args).arg("--").args(command).env_clear().process_group(0);
    exec.env("PATH", path).env("HOME", home).env("COUNTERSIGN_URL", &agent.base).env("COUNTERSIGN_CA", &agent.ca);
    if let Some(token) = &agent.token {
        exec.env("COUNTERSIGN_TOKEN", token);
    }
    exec.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    exec
}

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap(), signal).unwrap();
}

/// Waits for its end without blocking the runtime.
async fn ended(child: Child) -> Output {
    tokio::time::timeout(PATIENCE, tokio::task::spawn_blocking(move || child.wait_with_output().unwrap()))
        .await
        .expect("it ends")
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The next line of a child's output, without blocking the runtime. The reader comes back for the next one.
async fn line<R: std::io::Read + Send + 'static>(mut reader: BufReader<R>) -> (String, BufReader<R>) {
    let read = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        (line.trim_end().to_owned(), reader)
    });
    tokio::time::timeout(PATIENCE, read).await.expect("a line comes").unwrap()
}

/// `countersign audit …` over the journal of the running broker.
fn audit(world: &World, args: &[&str]) -> String {
    let mut command = Command::new(process::binary());
    let out = command.arg("audit").args(args).arg("--data-dir").arg(world.file("data")).output().unwrap();
    assert!(out.status.success(), "{}", text(&out.stderr));
    text(&out.stdout)
}

/// What the record has of the one command that ran under a grant.
fn invocation(world: &World, id: &str) -> Value {
    let story: Value = serde_json::from_str(&audit(world, &["show", id, "--json"])).unwrap();
    let records = story["records"].as_array().unwrap().clone();
    let invoked = records.iter().map(|r| &r["event"]["what"]).find(|e| e["event"] == "invoked");
    invoked.unwrap_or_else(|| panic!("no report in {story:#}"))["invocation"].clone()
}

/// The last grant of the record.
fn latest(world: &World) -> Option<String> {
    let tail = audit(world, &["tail", "--json", "--from", "1"]);
    let at = tail.rfind("gr_")?;
    Some(tail[at..].chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect())
}

#[tokio::test]
async fn d15_when_it_is_killed_its_role_and_its_open_session_are_gone_and_the_record_says_that_the_agent_was_lost() {
    let Some(world) = Plan { postgres: true, ..Plan::default() }.start("story_exec").await else { return };
    let ops = world.agent("ops");
    let admin = world.cluster().admin("postgres").await;
    let command = ["sh", "-c", "echo $COUNTERSIGN_GRANT; exec psql -X -q -A -t"];
    let mut child = exec(&world, &ops, &SANDBOX, &command).spawn().unwrap();
    let mut psql = child.stdin.take().unwrap();
    let (id, reader) = line(BufReader::new(child.stdout.take().unwrap())).await;
    psql.write_all(b"SELECT current_user;\n").unwrap();
    let (user, _reader) = line(reader).await;
    assert_eq!(target::leases(&admin).await, [user.as_str()]);
    let oid = target::oid(&admin, &user).await;
    assert_eq!(target::sessions(&admin, oid).await, 1, "psql is in");

    send(&child, Signal::KILL);
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    assert_eq!(target::sessions(&admin, oid).await, 1, "psql outlives it: the broker alone can end this");
    let lost = Duration::from_secs(60);
    let shown = ops.wait_until("it is over, with proof", lost, &id, |seen| seen["state"] == "ended").await;
    assert_eq!(shown["cause"]["cause"], "agent_lost");
    assert!(shown["leases"][0]["evidence"].is_object(), "{shown}");
    assert_eq!(target::left(&admin, oid, &user).await, [0; 5]);
    let record = audit(&world, &["show", &id]);
    for part in ["the agent gave no more signs of life", "seen at the target", "gone: "] {
        assert!(record.contains(part), "{part}: {record}");
    }
}

#[tokio::test]
async fn its_password_is_in_a_file_in_memory_and_nowhere_else_and_what_would_win_is_taken_away() {
    let Some(world) = Plan { postgres: true, ..Plan::default() }.start("story_exec").await else { return };
    let ops = world.agent("ops");
    // Itself, the command, and what stands around them; then the file, then its use by psql, then an exit code.
    let script = "tr '\\0' '\\n' </proc/$$/environ; echo MARK; tr '\\0' '\\n' </proc/$PPID/environ; \
         tr '\\0' ' ' </proc/$$/cmdline; tr '\\0' ' ' </proc/$PPID/cmdline; echo; ls -l /proc/$$/fd; echo MARK; \
         readlink $PGPASSFILE; stat -L -c '%a %F' $PGPASSFILE; cat $PGPASSFILE; \
         psql -X -w -A -t -c 'SELECT body FROM notes'; echo $COUNTERSIGN_GRANT; exit 7";
    let mut command = exec(&world, &ops, &[&SANDBOX[..], &["-v"]].concat(), &["sh", "-c", script]);
    // Each of them would win over ours, or break the connection.
    let winners = [
        ("PGPASSWORD", "not-this"),
        ("PGSERVICE", "nowhere"),
        ("PGHOSTADDR", "192.0.2.1"),
        ("PGSSLROOTCERT", "/nowhere"),
        ("PGREQUIREAUTH", "none"),
        ("PGCHANNELBINDING", "require"),
        ("PGOPTIONS", "-c nonsense=1"),
        ("PGUSER", "postgres"),
        ("PGTARGETSESSIONATTRS", "standby"),
    ];
    command.envs(winners);
    let out = ended(command.spawn().unwrap()).await;
    let (stdout, stderr) = (text(&out.stdout), text(&out.stderr));
    assert_eq!(out.status.code(), Some(7), "{stdout}{stderr}");
    let [own, around, rest] = stdout.split("MARK\n").collect::<Vec<_>>()[..] else { panic!("{stdout}") };
    let rest: Vec<&str> = rest.lines().collect();
    let [link, mode, pass, body, id] = rest[..] else { panic!("{rest:?}") };
    assert_eq!((link, mode, body), ("/memfd:pgpass (deleted)", "600 regular file", "nothing here is real"));
    let password = pass.rsplit(':').next().unwrap();
    assert!(password.len() >= 20, "{pass}");
    assert!(![own, around, &stderr].iter().any(|t| t.contains(password)), "{own}{around}{stderr}");
    assert!(!around.contains("memfd"), "the command inherits no descriptor: the path is enough");
    let token = ops.token.as_ref().unwrap();
    assert!(!own.contains(token.as_str()), "the agent's own identity isn't handed on");
    for (path, bytes) in world.on_disk() {
        assert!(!text(&bytes).contains(password), "{}", path.display());
    }
    // Names, never a value.
    for said in stderr.lines() {
        let name = said.strip_prefix("countersign: sets ").or_else(|| said.strip_prefix("countersign: takes away "));
        let name = name.unwrap_or_else(|| panic!("{stderr}"));
        assert!(name.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_'), "{said}");
    }
    for said in ["sets COUNTERSIGN_GRANT", "sets PGPASSFILE", "takes away PGPASSWORD", "takes away COUNTERSIGN_TOKEN"] {
        assert!(stderr.contains(said), "{said}: {stderr}");
    }

    // The record: what was run, by a hash that can be compared and not guessed, when, and how it ended.
    ops.wait(id, "ended").await;
    let report = invocation(&world, id);
    assert_eq!((&report["tool"], &report["status"]), (&json!("sh"), &json!("exit:7")));
    let (began, over) = (report["started_at"].as_u64().unwrap(), report["ended_at"].as_u64().unwrap());
    assert!(began > 0 && began <= over, "{report}");
    assert!(report.get("arguments").is_none(), "{report}");
    let shown = audit(&world, &["show", id]);
    for part in ["sh: exit:7", "reported by the agent", "keyed hash of the command", "began ", "; ended "] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let mut hashes = Vec::new();
    for words in [["true", "a"], ["true", "a"], ["true", "b"]] {
        let args = [&NOTES[..], &["-v"]].concat();
        assert_eq!(ended(exec(&world, &ops, &args, &words).spawn().unwrap()).await.status.code(), Some(0));
        let id = latest(&world).unwrap();
        ops.wait(&id, "ended").await;
        hashes.push(invocation(&world, &id)["arguments_digest"].as_str().unwrap().to_owned());
    }
    assert!(hashes[0] == hashes[1] && hashes[1] != hashes[2], "{hashes:?}");
    let mut guess = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    for word in ["true", "a"] {
        guess.update(&(word.len() as u64).to_be_bytes());
        guess.update(word.as_bytes());
    }
    assert_ne!(hashes[0], hex::encode(guess.finish()), "a list of commands and the record don't give it away");
}

#[tokio::test]
async fn with_tls_the_operators_ca_is_handed_over_too() {
    let Some(mut world) = Plan { postgres: true, ..Plan::default() }.start("story_exec").await else { return };
    let ops = world.agent("ops");
    let read = |name: &str| std::fs::read_to_string(world.file(name)).unwrap();
    world.cluster().stop();
    world.cluster().secure(&read("broker.pem"), &read("broker.key"));
    let mut settings = target::settings();
    settings.push(("ssl", "on"));
    world.cluster().run(&settings);
    world.change("catalogue.toml", "sslmode = \"disable\"", "sslmode = \"verify-full\"\nca_file = \"ca.pem\"");
    world.change("catalogue.toml", "host = \"127.0.0.1\"", "host = \"localhost\"");
    world.restart().await;
    let sql = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    let script = format!("echo $PGSSLMODE; ls -A $HOME; exec psql -X -w -A -t -c '{sql}'");
    let out = ended(exec(&world, &ops, &SANDBOX, &["sh", "-c", &script]).spawn().unwrap()).await;
    assert_eq!(text(&out.stdout), "verify-full\nt\n", "{}", text(&out.stderr));
    assert_eq!(out.status.code(), Some(0));
}

#[tokio::test]
async fn when_nobody_decides_in_time_it_is_75_and_when_somebody_says_no_77() {
    let Some(world) = Plan { people: true, ..Plan::default() }.start("story_exec").await else { return };
    let (ops, ana) = (world.agent("ops"), world.browser("ana").await);
    let mark = world.file("ran");
    let touch = ["touch", mark.to_str().unwrap()];
    let wanted = ["--want", "api/customers:read", "--why", "the story", "--wait"];
    let waiting = async |wait: &str| {
        let mut child = exec(&world, &ops, &[&wanted[..], &[wait]].concat(), &touch).spawn().unwrap();
        let (said, rest) = line(BufReader::new(child.stderr.take().unwrap())).await;
        let id = said.rsplit('/').next().unwrap().to_owned();
        assert!(said.contains("waiting for approval: https://") && id.starts_with("gr_"), "{said}");
        (child, id, rest)
    };
    let (child, id, mut rest) = waiting("1s").await;
    assert_eq!(ended(child).await.status.code(), Some(75));
    let mut said = String::new();
    rest.read_to_string(&mut said).unwrap();
    assert!(said.contains("the request was taken back"), "{said}");
    assert_eq!(ops.state(&id).await, "cancelled");

    let (child, id, mut rest) = waiting("60s").await;
    assert_eq!(ana.deny(&id, "not today").await.status, 303);
    assert_eq!(ended(child).await.status.code(), Some(77));
    let mut said = String::new();
    rest.read_to_string(&mut said).unwrap();
    assert!(said.contains("not today"), "{said}");

    // Told to stop while somebody is asked: nothing is left to decide.
    for (signal, code) in [(Signal::HUP, 129), (Signal::INT, 130), (Signal::TERM, 143)] {
        let (child, id, _rest) = waiting("60s").await;
        send(&child, Signal::USR1);
        send(&child, signal);
        assert_eq!(ended(child).await.status.code(), Some(code));
        assert_eq!(ops.state(&id).await, "cancelled");
    }
    assert!(!mark.exists(), "nothing was run");
}

#[tokio::test]
async fn told_to_stop_while_a_credential_is_made_it_runs_nothing_and_ends_the_grant() {
    let Some(world) = Plan { postgres: true, ..Plan::default() }.start("story_exec").await else { return };
    let ops = world.agent("ops");
    let admin = world.cluster().admin("postgres").await;
    let warm = ops.asked("T-0", sandbox()).await;
    ops.login(&warm).await;
    ops.complete(&warm).await.ok();
    ops.wait(&warm, "ended").await;

    target::backends(&admin, Signal::STOP).await;
    let mark = world.file("ran");
    let child = exec(&world, &ops, &SANDBOX, &["touch", mark.to_str().unwrap()]).spawn().unwrap();
    until("the mint is under way", async || {
        audit(&world, &["tail", "--json", "--from", "1"]).matches("lease_intended").count() == 2
    })
    .await;
    let id = latest(&world).unwrap();
    send(&child, Signal::INT);
    let out = ended(child).await;
    assert_eq!(out.status.code(), Some(130), "{}", text(&out.stderr));
    target::backends(&admin, Signal::CONT).await;
    let shown = ops.wait(&id, "ended").await;
    assert_eq!(shown["cause"]["cause"], "completed", "{shown}");
    assert!(!mark.exists(), "nothing was run");
    until("no role is left", async || target::leases(&admin).await.is_empty()).await;
}

#[tokio::test]
async fn signals_reach_the_command_and_its_exit_code_comes_back() {
    let Some(world) = Plan::default().start("story_exec").await else { return };
    let ops = world.agent("ops");
    let traps = "trap 'echo usr1' USR1; trap 'echo usr2' USR2; trap 'echo hup' HUP; trap 'echo term' TERM; \
         trap 'echo quit' QUIT; trap 'echo int; exit 5' INT; echo $COUNTERSIGN_GRANT; while :; do sleep 0.05; done";
    let mut child = exec(&world, &ops, &NOTES, &["sh", "-c", traps]).spawn().unwrap();
    let (id, mut reader) = line(BufReader::new(child.stdout.take().unwrap())).await;
    for (signal, trap) in [
        (Signal::USR1, "usr1"),
        (Signal::USR2, "usr2"),
        (Signal::HUP, "hup"),
        (Signal::TERM, "term"),
        (Signal::QUIT, "quit"),
        (Signal::INT, "int"),
    ] {
        send(&child, signal);
        let (said, back) = line(reader).await;
        assert_eq!(said, trap);
        reader = back;
    }
    assert_eq!(ended(child).await.status.code(), Some(5));
    assert_eq!(ops.wait(&id, "ended").await["cause"]["cause"], "completed");

    // What was ignored stays ignored, for the command too: `nohup countersign exec …`.
    let script = "trap '' HUP; exec \"$@\"";
    let inner = exec(&world, &ops, &NOTES, &["sh", "-c", "echo ready; read line; exit 3"]);
    let mut nohup = Command::new("sh");
    nohup.args(["-c", script, "sh"]).arg(inner.get_program()).args(inner.get_args()).env_clear().process_group(0);
    nohup.envs(inner.get_envs().filter_map(|(k, v)| Some((k, v?))));
    let mut child = nohup.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (said, _reader) = line(BufReader::new(child.stdout.take().unwrap())).await;
    assert_eq!(said, "ready");
    send(&child, Signal::HUP);
    child.stdin.take().unwrap().write_all(b"on\n").unwrap();
    assert_eq!(ended(child).await.status.code(), Some(3));
}

/// An agent of the Workload API, over which its SVIDs have such lives.
fn workload_api(world: &World, x509_secs: u64, jwt_secs: u64) -> WorkloadApiServer {
    let socket = world.file("workload-api").join("agent.sock");
    let id = "spiffe://corp.test/agent/ops";
    WorkloadApiServer::start_with(&socket, world.authority.clone(), id, x509_secs, jwt_secs).unwrap()
}

/// Runs until its standard input ends, and says how it went.
async fn outlives(world: &World, mut command: Command, api: &WorkloadApiServer, until_then: Duration, away: bool) {
    command.env("SPIFFE_ENDPOINT_SOCKET", api.endpoint()).env_remove("COUNTERSIGN_TOKEN");
    let mut child = command.spawn().unwrap();
    let (id, _reader) = line(BufReader::new(child.stdout.take().unwrap())).await;
    if away {
        std::fs::rename(world.file("workload-api"), world.file("away")).unwrap();
    }
    let begun = std::time::Instant::now();
    until_within(until_then * 2, "it has outlived that", async || begun.elapsed() > until_then).await;
    assert!(child.try_wait().unwrap().is_none(), "it runs");
    drop(child.stdin.take());
    let out = ended(child).await;
    assert_eq!((out.status.code(), text(&out.stderr).as_str()), (Some(0), ""));
    let ops = world.agent("ops");
    assert_eq!(ops.wait(&id, "ended").await["cause"]["cause"], "completed");
}

#[tokio::test]
async fn it_outlives_its_certificate_and_a_pause_of_the_source_of_its_tokens() {
    let Some(world) = Plan::default().start("story_exec").await else { return };
    let waits = ["sh", "-c", "echo $COUNTERSIGN_GRANT; read line || exit 0"];
    {
        let api = workload_api(&world, 6, 60);
        let mut command = exec(&world, &world.agent_mtls("ops"), &NOTES, &waits);
        command.env("COUNTERSIGN_MTLS", "1");
        outlives(&world, command, &api, Duration::from_secs(9), false).await;
    }
    let api = workload_api(&world, 60, 120);
    outlives(&world, exec(&world, &world.agent("ops"), &NOTES, &waits), &api, Duration::from_secs(7), true).await;
}
