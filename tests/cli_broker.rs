//! The command line against a broker: `countersign dev` and every command of an agent and of a reviewer, each the real
//! program. The reviewer's browser is played by an HTTP client.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);

/// A `dev` of its own, ended when this is dropped.
struct Dev {
    child: Child,
    folder: tempfile::TempDir,
    vars: Vec<(String, String)>,
    demo: String,
    reviewers: String,
    code: String,
}

impl Dev {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("dev");
        let mut child = Command::new(env!("CARGO_BIN_EXE_countersign"))
            .args(["dev", "--no-postgres", "--folder", data.to_str().unwrap()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (mut vars, mut demo, mut link) = (Vec::new(), String::new(), String::new());
        for line in lines.by_ref().map(Result::unwrap) {
            if let Some((name, value)) = line.trim().strip_prefix("export ").and_then(|l| l.split_once('='))
                && name != "PATH"
            {
                vars.push((name.to_owned(), value.to_owned()));
            }
            if let Some(at) = line.find("http://127.0.0.1:") {
                demo = line[at..].split("/sandbox").next().unwrap().to_owned();
            }
            if line.contains("/login/one-time?code=") {
                line.trim().clone_into(&mut link);
                break;
            }
        }
        std::thread::spawn(move || lines.for_each(drop)); // what follows is not needed, and must not block it
        let (reviewers, code) = link.split_once("/login/one-time?code=").expect("dev prints a link");
        let (reviewers, code) = (reviewers.to_owned(), code.to_owned());
        Self { child, folder, vars, demo, reviewers, code }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_countersign"));
        command.args(args).env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("HOME", self.folder.path());
        command.envs(self.vars.iter().map(|(k, v)| (k, v)));
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs and reads the JSON; the exit code must be 0.
    fn json(&self, args: &[&str]) -> Value {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}{}", out(&output), err(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Asks for what needs a person, and says which grant that is.
    fn ask(&self, task: &str) -> String {
        let asked =
            self.json(&["request", "--want", "api/notes:write", "--why", "to try it", "--task", task, "--json"]);
        assert_eq!(asked["state"], "pending", "{asked}");
        asked["id"].as_str().unwrap().to_owned()
    }

    /// The first row of the inbox that `fits`, as soon as there is one.
    fn inbox(&self, part: &str, fits: impl Fn(&Value) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let queue = self.json(&["inbox", "--json"]);
            if let Some(row) = queue[part].as_array().unwrap().iter().find(|row| fits(row)) {
                return row["id"].as_str().unwrap().to_owned();
            }
            assert!(Instant::now() < deadline, "nothing in {part}: {queue:#}");
        }
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("dev")
    }

    /// The browser's part of `login`: the one-time link, then the code.
    async fn sign_in(&self) {
        let http = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).no_proxy().build().unwrap();
        let post = |path: &str, form: Vec<(String, String)>, cookie: &str| {
            let call = http.post(format!("{}{path}", self.reviewers)).header("Origin", &self.reviewers);
            call.header("Cookie", cookie).form(&form).send()
        };
        let signed = post("/login/one-time", vec![("code".to_owned(), self.code.clone())], "none=1").await.unwrap();
        let cookie = signed.headers()["set-cookie"].to_str().unwrap().split(';').next().unwrap().to_owned();

        let mut login = self.command(&["login", "--url", &self.reviewers]).spawn().unwrap();
        let mut lines = BufReader::new(login.stdout.take().unwrap()).lines();
        let first = lines.next().unwrap().unwrap();
        let path = first.trim().rsplit_once(&self.reviewers).expect("it prints the address").1.to_owned();
        let code = path.strip_prefix("/cli/").unwrap().to_owned();
        assert!(lines.next().unwrap().unwrap().ends_with(&code), "the code to compare");
        let page = http.get(format!("{}{path}", self.reviewers)).header("Cookie", &cookie);
        let page = page.send().await.unwrap().text().await.unwrap();
        let csrf = page.split("name=\"csrf\" value=\"").nth(1).unwrap().split('"').next().unwrap().to_owned();
        let form = vec![("csrf".to_owned(), csrf), ("code".to_owned(), code), ("answer".to_owned(), "give".to_owned())];
        assert!(post(&path, form, &cookie).await.unwrap().status().as_u16() < 400);
        let last = tokio::task::spawn_blocking(move || lines.last().unwrap().unwrap()).await.unwrap();
        assert!(last.starts_with("signed in as Reviewer"), "{last}");
        assert!(login.wait().unwrap().success());
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn session_file(home: &Path) -> PathBuf {
    home.join(".local/state/countersign/session.json")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agents_commands() {
    let dev = Dev::start();
    // What the child sees: its token, and nothing that proves who we are. Its exit code is ours.
    let script = format!(
        "test -z \"$SPIFFE_ENDPOINT_SOCKET\" || exit 9; test -n \"$COUNTERSIGN_GRANT\" || exit 8; \
         echo $COUNTERSIGN_API_NOTES_SANDBOX_TOKEN; \
         curl -s -H \"Authorization: Bearer $COUNTERSIGN_API_NOTES_SANDBOX_TOKEN\" {}/sandbox/notes; exit 3",
        dev.demo
    );
    let want = ["exec", "-v", "--want", "api/notes-sandbox:read", "--why", "a look", "--"];
    let output = dev.run(&[&want[..], &["sh", "-c", &script]].concat());
    assert_eq!(code(&output), 3, "{}", err(&output));
    let token = out(&output).lines().next().unwrap().to_owned();
    assert!(token.starts_with("ey") && !err(&output).contains(&token), "no secret on stderr");
    assert!(err(&output).contains("sets COUNTERSIGN_API_NOTES_SANDBOX_TOKEN\n"), "{}", err(&output));
    assert!(err(&output).contains("takes away SPIFFE_ENDPOINT_SOCKET"), "{}", err(&output));
    let missing = dev.run(&[&want[..], &["/none/such"]].concat());
    assert_eq!(code(&missing), 127, "{}", err(&missing));

    let output = dev.run(&["exec", "--want", "api/nothing:read", "--why", "x", "--", "true"]);
    assert!(
        code(&output) == 70 && err(&output).contains("is not among what this identity may ask for: api/"),
        "{}",
        err(&output)
    );
    let output = dev.run(&["exec", "--want", "api/notes:write", "--why", "x", "--wait", "1s", "--", "true"]);
    assert_eq!(code(&output), 75, "{}", err(&output));
    assert_eq!(err(&output).matches("/grants/gr_").count(), 1, "one line with the address: {}", err(&output));

    // Step by step.
    let granted = dev.json(&[
        "request",
        "--want",
        "api/notes-sandbox:read",
        "--why",
        "x",
        "--task",
        "T1",
        "--wait",
        "5s",
        "--json",
    ]);
    let id = granted["id"].as_str().unwrap();
    let given = dev.json(&["credentials", id]);
    let token = given["credentials"][0]["secret"]["token"].as_str().unwrap();
    assert!(token.starts_with("ey"), "{given}");
    let again = dev.run(&["credentials", id]);
    assert!(code(&again) == 1 && err(&again).contains("Handed over already"), "{}", err(&again));
    let replaced = dev.json(&["credentials", id, "--replace"]);
    assert_ne!(replaced["credentials"][0]["secret"]["token"].as_str().unwrap(), token);
    let done = dev.run(&["complete", "--task", "T1", "--wait=30s"]);
    assert_eq!(code(&done), 0, "{}", err(&done));
    assert_eq!(out(&done).matches("proof ").count(), 2, "{}", out(&done));
    let status = dev.json(&["status", id, "--wait", "1s", "--json"]);
    assert_eq!(status["state"], "ended", "{status}");

    let pending = dev.ask("T2");
    assert_eq!(code(&dev.run(&["status", &pending, "--wait", "1s"])), 75);
    let cancelled = dev.json(&["cancel", &pending, "--json"]);
    assert_eq!(cancelled["state"], "cancelled");
    assert_eq!(code(&dev.run(&["cancel", &pending])), 0, "again is success");

    // The record, while the broker runs.
    let config = dev.data().join("countersign.toml");
    let record = dev.run(&["audit", "show", id, "--config", config.to_str().unwrap()]);
    assert!(code(&record) == 0 && out(&record).contains("no credential under it is open any more"), "{}", err(&record));
    assert!(!out(&record).contains(token), "no secret in the record (guarantee 9)");
    let output = dev.run(&["audit", "verify", "--config", config.to_str().unwrap()]);
    assert!(code(&output) == 0 && out(&output).starts_with("verified up to"), "{}{}", out(&output), err(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reviewers_commands() {
    let dev = Dev::start();
    dev.sign_in().await;
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&session_file(dev.folder.path()).metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);

    // Denied while the agent waits: it gets the reason, and a code of its own.
    let waiting = dev.command(&["exec", "--want", "api/notes:write", "--why", "x", "--", "true"]).spawn().unwrap();
    let id = dev.inbox("mine", |_| true);
    assert_eq!(code(&dev.run(&["deny", &id, "--reason", "ask for less"])), 0);
    let output = waiting.wait_with_output().unwrap();
    assert_eq!((code(&output), err(&output).contains("denied: ask for less")), (77, true), "{}", err(&output));

    // Approved in one place while `approve` waits in another (`dev` alone takes --here).
    let id = dev.ask("T1");
    let text = out(&dev.run(&["show", &id]));
    assert!(text.contains("| to try it") && text.contains("tier change, 0 of 1 approval"), "{text}");
    let waits = dev.command(&["approve", &id, "--no-browser"]).spawn().unwrap();
    let here = dev.run(&["approve", &id, "--here"]);
    assert!(code(&here) == 1 && err(&here).contains("--yes"), "nobody was asked: {}", err(&here));
    assert_eq!(code(&dev.run(&["approve", &id, "--here", "--yes"])), 0);
    let output = waits.wait_with_output().unwrap();
    // It may have begun to look after the decision; then it says that there is nothing to decide.
    let (said, trouble) = (out(&output), err(&output));
    assert!(
        said.ends_with("approved\n") && code(&output) == 0 || trouble.contains("the request is active"),
        "{said}{trouble}"
    );
    assert_eq!(code(&dev.run(&["status", &id, "--wait", "1s"])), 0);
    dev.json(&["credentials", &id]);
    let revoked = dev.run(&["revoke", &id, "--reason", "enough", "--wait=30s"]);
    assert!(code(&revoked) == 0 && out(&revoked).contains("proof"), "{}{}", out(&revoked), err(&revoked));
    let text = out(&dev.run(&["show", &id]));
    for part in [
        "Votes",
        "Reviewer approved",
        "took it away: enough",
        "minted and handed over",
        "no credential under it is open any more",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }

    // Taken away under a running command: it is stopped.
    let runs =
        dev.command(&["exec", "--want", "api/notes-sandbox:read", "--why", "x", "--", "sleep", "600"]).spawn().unwrap();
    let id = dev.inbox("live", |row| row["state"] == "active");
    assert_eq!(code(&dev.run(&["revoke", &id, "--reason", "stop"])), 0);
    let output = runs.wait_with_output().unwrap();
    assert_eq!(code(&output), 128 + 15, "{}", err(&output));
    assert!(err(&output).contains("the grant is over; stopping the command"), "{}", err(&output));

    // The kill switch.
    let id = dev.ask("T2");
    let unsure = dev.run(&["freeze", "--all", "--reason", "drill"]);
    assert!(
        code(&unsure) == 1 && out(&unsure).contains("everything: 1 grant ends now"),
        "{}{}",
        out(&unsure),
        err(&unsure)
    );
    assert_eq!(dev.json(&["status", &id, "--json"])["state"], "pending", "nothing happened");
    let frozen = dev.json(&["freeze", "--all", "--reason", "drill", "--yes", "--json"]);
    assert_eq!(frozen["freezes"][0]["ended"][0], Value::String(id.clone()), "{frozen}");
    assert_eq!(dev.json(&["status", &id, "--json"])["state"], "withdrawn");
    let refused = dev.run(&["exec", "--want", "api/notes-sandbox:read", "--why", "x", "--", "true"]);
    assert!(code(&refused) == 77 && err(&refused).contains("drill"), "{}", err(&refused));
    let number = frozen["freezes"][0]["freeze"].to_string();
    assert!(out(&dev.run(&["inbox"])).contains(&format!("countersign freeze --lift {number}")));
    assert_eq!(code(&dev.run(&["freeze", "--lift", &number])), 0);
    assert_eq!(code(&dev.run(&["exec", "--want", "api/notes-sandbox:read", "--why", "x", "--", "true"])), 0);
}
