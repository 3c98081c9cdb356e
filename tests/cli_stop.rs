//! `dev` and `tour` leave nothing behind, however they are told to stop: no PostgreSQL, no folder, no key.

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

#[path = "support/postgres.rs"]
mod postgres;

use rustix::process::{Pid, Signal, kill_process};

const PATIENCE: Duration = Duration::from_secs(60);

/// A `TMPDIR` of its own, into which PostgreSQL's user can see.
fn temporary() -> tempfile::TempDir {
    let folder = tempfile::Builder::new().prefix("cs-stop-").tempdir_in("/tmp").unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    folder
}

fn start(tmp: &Path, args: &[&str]) -> Child {
    // Whoever runs the tests with `nohup` would have it ignore SIGHUP, as it should.
    let mut command = Command::new("env");
    command.arg("--default-signal=HUP").arg(env!("CARGO_BIN_EXE_countersign"));
    command.args(args).env("TMPDIR", tmp).process_group(0);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap(), signal).unwrap();
}

fn end(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < deadline, "it doesn't end");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Reads its output until a text has come; the rest is read away.
fn said(child: &mut Child, text: &str) -> String {
    let mut reader = child.stdout.take().unwrap();
    let mut all = Vec::new();
    let mut byte = [0];
    while !String::from_utf8_lossy(&all).contains(text) {
        assert_ne!(reader.read(&mut byte).unwrap(), 0, "{text:?} didn't come: {}", String::from_utf8_lossy(&all));
        all.push(byte[0]);
    }
    std::thread::spawn(move || BufReader::new(reader).lines().for_each(drop));
    String::from_utf8_lossy(&all).into_owned()
}

/// The pids of the servers whose folders are there.
fn servers(tmp: &Path) -> Vec<i32> {
    let folders = std::fs::read_dir(tmp).unwrap().map(|e| e.unwrap().path().join("data/postmaster.pid"));
    folders.filter_map(|f| std::fs::read_to_string(f).ok()?.lines().next()?.parse().ok()).collect()
}

fn nothing_is_left(tmp: &Path, servers: &[i32], after: &str) {
    for pid in servers {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{after}: PostgreSQL {pid} runs still");
    }
    let left: Vec<PathBuf> = std::fs::read_dir(tmp).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(left.is_empty(), "{after}: {left:?}");
}

#[test]
fn dev_and_tour_take_their_servers_and_folders_with_them() {
    if !postgres::available("cli_stop") {
        return;
    }
    for (args, until, signal, code) in [
        (["dev"].as_slice(), "one-time?code=", Signal::HUP, 0),
        (&["dev"], "one-time?code=", Signal::TERM, 0),
        (&["tour"], "or type y", Signal::INT, 130),
        (&["tour"], "or type y", Signal::HUP, 129),
        (&["tour"], "or type y", Signal::TERM, 143),
    ] {
        let tmp = temporary();
        let mut child = start(tmp.path(), args);
        said(&mut child, until);
        let servers = servers(tmp.path());
        assert_eq!(servers.len(), 1, "{args:?} runs a PostgreSQL");
        send(&child, signal);
        let after = format!("{args:?} after {signal:?}");
        assert_eq!(end(&mut child).code(), Some(code), "{after}");
        nothing_is_left(tmp.path(), &servers, &after);
    }
    // While it still starts: at its first line, and when the server has its folder.
    let tmp = temporary();
    let mut child = start(tmp.path(), &["tour"]);
    said(&mut child, "A broker starts");
    send(&child, Signal::TERM);
    assert_eq!(end(&mut child).code(), Some(143));
    nothing_is_left(tmp.path(), &[], "a start");
}

#[test]
fn what_is_open_when_dev_ends_is_ended_first() {
    let tmp = temporary();
    let folder = tmp.path().join("kept");
    let mut dev = start(tmp.path(), &["dev", "--no-postgres", "--folder", folder.to_str().unwrap()]);
    let printed = said(&mut dev, "one-time?code=");
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_countersign"));
        let lines = printed.lines().filter_map(|l| l.trim().strip_prefix("export ")?.split_once('='));
        command.args(args).envs(lines.filter(|(name, _)| *name != "PATH"));
        let out = command.output().unwrap();
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let mut ids = Vec::new();
    for want in ["api/notes-sandbox:read", "api/notes:write"] {
        let asked: serde_json::Value =
            serde_json::from_str(&run(&["request", "--want", want, "--why", "to see", "--json"])).unwrap();
        ids.push(asked["id"].as_str().unwrap().to_owned());
    }
    run(&["credentials", &ids[0]]);
    send(&dev, Signal::TERM);
    assert_eq!(end(&mut dev).code(), Some(0));
    let data = folder.join("data");
    let story = |id: &str| run(&["audit", "show", id, "--data-dir", data.to_str().unwrap()]);
    assert!(story(&ids[0]).contains("no credential under it is open any more"), "{}", story(&ids[0]));
    assert!(story(&ids[1]).contains("withdrawn"), "{}", story(&ids[1]));
}
