//! A real Chromium, headless, driven over WebDriver: an empty profile, no network but loopback, one key that it trusts.
//! What a page must keep to (WCAG, its own CSP, no sideways scrolling) is looked at in `chrome/look.rs`.

#![allow(dead_code)] // each story uses a part

#[path = "chrome/look.rs"]
pub mod look;

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use fantoccini::wd::WebDriverCompatibleCommand;
use fantoccini::{Client, ClientBuilder, Locator};
use hyper_util::client::legacy::connect::HttpConnector;
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};

/// What doesn't come within this doesn't come.
const PATIENCE: Duration = Duration::from_secs(60);
/// Nothing of it looks for anything outside, and no name but our own leads anywhere.
const FLAGS: [&str; 12] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
];

/// The driver with its browser, ended together when this is dropped.
pub struct Chrome {
    driver: Child,
    client: Client,
    axe: String,
    _folder: tempfile::TempDir,
}

fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|folder| folder.join(name)).find(|file| file.is_file())
}

fn axe_file() -> PathBuf {
    super::broker::oidc_provider::peers().join("node_modules/axe-core/axe.min.js")
}

/// False, with a line that names the test, where the browser or axe-core isn't installed. With `CI` set that is a failure.
pub fn available(test: &str) -> bool {
    let missing: Vec<&str> = [
        ("chromium", on_path("chromium").is_none()),
        ("chromedriver", on_path("chromedriver").is_none()),
        ("axe-core", !axe_file().is_file()),
    ]
    .into_iter()
    .filter_map(|(what, missing)| missing.then_some(what))
    .collect();
    if missing.is_empty() {
        return true;
    }
    let missing = missing.join(", ");
    assert!(std::env::var_os("CI").is_none(), "{test}: {missing} not installed (run tests/peers)");
    eprintln!("SKIPPED: {test}: {missing} not installed (run tests/peers)");
    false
}

impl Chrome {
    /// A new browser that takes this certificate (PEM), by its key alone, for any name.
    pub async fn start(certificate: &Path) -> Self {
        let folder = tempfile::Builder::new().prefix("cs-chrome-").tempdir().unwrap();
        let log = folder.path().join("driver.log");
        let driver = Command::new(on_path("chromedriver").unwrap())
            .arg("--port=0")
            .env("HOME", folder.path())
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&log).unwrap())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .unwrap();
        let mut started = Started(Some(driver));
        let deadline = Instant::now() + PATIENCE;
        let port = loop {
            let said = std::fs::read_to_string(&log).unwrap();
            if let Some(port) = said.split("successfully on port ").nth(1).and_then(|rest| rest.split_once('.')) {
                break port.0.to_owned();
            }
            assert!(Instant::now() < deadline, "chromedriver doesn't start: {said}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let profile = folder.path().join("profile");
        let mut args: Vec<String> = FLAGS.map(str::to_owned).into();
        args.push(format!("--user-data-dir={}", profile.display()));
        args.push(format!("--ignore-certificate-errors-spki-list={}", spki_hash(certificate)));
        let wanted = json!({
            "goog:chromeOptions": { "binary": on_path("chromium").unwrap(), "args": args },
            "goog:loggingPrefs": { "browser": "ALL" },
        });
        let Value::Object(wanted) = wanted else { unreachable!() };
        let client = ClientBuilder::new(HttpConnector::new())
            .capabilities(wanted)
            .connect(&format!("http://127.0.0.1:{port}"))
            .await
            .unwrap();
        let axe = std::fs::read_to_string(axe_file()).unwrap();
        Self { driver: started.0.take().unwrap(), client, axe, _folder: folder }
    }

    pub async fn open(&self, url: &str) {
        self.client.goto(url).await.unwrap();
    }

    pub async fn address(&self) -> String {
        self.client.current_url().await.unwrap().to_string()
    }

    /// Waits for what a selector finds, and clicks it.
    pub async fn click(&self, css: &str) {
        // A page that renews itself may do so between the two.
        while let Err(e) = self.found(css).await.click().await {
            assert!(e.is_stale_element_reference(), "{css}: {e}");
        }
    }

    /// Types into a field, key by key.
    pub async fn keys(&self, css: &str, keys: &str) {
        self.found(css).await.send_keys(keys).await.unwrap_or_else(|e| panic!("{css}: {e}"));
    }

    /// Waits for what a selector finds.
    pub async fn found(&self, css: &str) -> fantoccini::elements::Element {
        let wait = self.client.wait().at_most(PATIENCE).for_element(Locator::Css(css));
        match wait.await {
            Ok(element) => element,
            Err(e) => panic!("{css}: {e} in {}:\n{}", self.address().await, self.client.source().await.unwrap()),
        }
    }

    /// The text of what a selector finds, as it is shown.
    pub async fn text(&self, css: &str) -> String {
        loop {
            match self.found(css).await.text().await {
                Ok(text) => return text,
                Err(e) => assert!(e.is_stale_element_reference(), "{css}: {e}"),
            }
        }
    }

    /// Runs a script in the page.
    pub async fn run(&self, script: &str) -> Value {
        self.client.execute(script, Vec::new()).await.unwrap_or_else(|e| panic!("{e} of {script:.200}"))
    }

    /// Runs a script in every page that is opened from now on, before anything of the page's own.
    pub async fn before(&self, script: &str) {
        self.browser("Page.addScriptToEvaluateOnNewDocument", json!({ "source": script })).await;
    }

    /// Waits until a script says true.
    pub async fn until(&self, what: &str, script: &str) {
        let begun = Instant::now();
        while self.run(script).await != true {
            assert!(begun.elapsed() < PATIENCE, "waited in vain until {what} in {}", self.address().await);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Signs in at the provider's own pages.
    pub async fn sign_in(&self, base: &str, account: &str) {
        self.open(&format!("{base}/login")).await;
        self.click("main a.btn").await;
        self.keys("input[name=login]", account).await;
        self.keys("input[name=password]", "any").await;
        self.click("button[type=submit]").await;
        self.found("input[value=consent]").await;
        self.click("button[type=submit]").await;
        self.found("form.who").await;
    }

    /// A command of the browser's own protocol.
    async fn browser(&self, command: &str, params: Value) -> Value {
        let call = Call { path: "goog/cdp/execute", body: json!({ "cmd": command, "params": params }) };
        self.client.issue_cmd(call).await.unwrap_or_else(|e| panic!("{command}: {e}"))
    }

    /// What the console logged since it was asked last.
    pub async fn console(&self) -> Vec<String> {
        let call = Call { path: "se/log", body: json!({ "type": "browser" }) };
        let log = self.client.issue_cmd(call).await.unwrap();
        log.as_array().unwrap().iter().map(|e| e["message"].as_str().unwrap_or_default().to_owned()).collect()
    }
}

/// A driver that isn't anybody's yet: ended when starting the browser fails.
struct Started(Option<Child>);

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(driver) = &mut self.0 {
            end(driver);
        }
    }
}

impl Drop for Chrome {
    fn drop(&mut self) {
        end(&mut self.driver);
    }
}

/// The driver leads a process group of its own: the browser is in it.
fn end(driver: &mut Child) {
    let _ = kill_process_group(Pid::from_child(driver), Signal::KILL);
    let _ = driver.wait();
}

/// SHA-256 of the public key, as Chromium wants it.
fn spki_hash(certificate: &Path) -> String {
    let pem = std::fs::read(certificate).unwrap();
    let (_, pem) = x509_parser::pem::parse_x509_pem(&pem).unwrap();
    let certificate = pem.parse_x509().unwrap();
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, certificate.public_key().raw);
    BASE64_STANDARD.encode(hash)
}

/// A command that is chromedriver's own.
#[derive(Debug)]
struct Call {
    path: &'static str,
    body: Value,
}

impl WebDriverCompatibleCommand for Call {
    fn endpoint(&self, base: &url::Url, session: Option<&str>) -> Result<url::Url, url::ParseError> {
        base.join(&format!("session/{}/{}", session.unwrap_or_default(), self.path))
    }
    fn method_and_body(&self, _: &url::Url) -> (http::Method, Option<String>) {
        (http::Method::POST, Some(self.body.to_string()))
    }
}
