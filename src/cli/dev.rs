//! `dev`: a broker to build against. Its own trust domain, a Workload API, a reviewer's one-time link, example
//! resources, a demo API and a throw-away PostgreSQL. Loopback only. `tour` runs on the same world.

use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::broker::Mode;
use crate::broker::vote::Via;
use crate::client::ReviewerClient;
use crate::client::signals::Signals;
use crate::config::load::load;
use crate::core::id::PersonId;
use crate::core::secret::Secret;
use crate::identity::dev_authority::DevAuthority;
use crate::identity::workload_api::WorkloadApiServer;
use crate::time::SystemClock;
use crate::wire::reviewer::{Queue, Row};

use super::assemble::{self, Running};
use super::folder::Folder;
use super::throwaway::{self, ThrowAway};
use super::{CliError, demo_api};

/// The trust domain of `dev` and `tour`. `serve` refuses it.
pub const TRUST_DOMAIN: &str = "dev.countersign.internal";
/// The demo agent.
pub const AGENT_ID: &str = "spiffe://dev.countersign.internal/agent/demo";
/// The demo API.
pub const DEMO_API_ID: &str = "spiffe://dev.countersign.internal/demo-api";
/// Life of the broker's own TLS certificate, in seconds: as long as anybody keeps `dev` running.
const TLS_SECS: u64 = 29 * 24 * 3600;

/// How long the end of open grants may take.
const END_ALL: Duration = Duration::from_secs(10);
/// How often it is looked whether they have ended.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// `dev`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  countersign dev\nand in another terminal, with the lines that it prints:\n  countersign exec --want api/notes-sandbox:read --why 'trying it' -- env"
)]
pub struct Args {
    /// Where it keeps its data and writes its example configuration (default: a fresh folder, removed at the end)
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    /// Don't start a throw-away PostgreSQL
    #[arg(long)]
    no_postgres: bool,
    /// Port of the agents' API on loopback (0: a free one)
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Port of the reviewers' pages on loopback (0: a free one)
    #[arg(long, default_value_t = 0)]
    reviewer_port: u16,
}

/// A world of its own: broker, identities, targets.
pub struct World {
    /// The broker.
    pub running: Running,
    /// Issues the identities.
    pub authority: Arc<DevAuthority>,
    /// The agents' API.
    pub agent_url: String,
    /// The agents' API for X.509-SVIDs.
    pub mtls_url: String,
    /// The reviewers' pages.
    pub reviewer_url: String,
    /// The demo API.
    pub demo_url: String,
    /// PEM of the CA that signed the broker's certificate.
    pub ca: PathBuf,
    /// PostgreSQL, where there is one.
    pub postgres: Option<ThrowAway>,
    /// Where everything is.
    pub folder: Folder,
    workload_api: WorkloadApiServer,
    stop: CancellationToken,
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> CliError + '_ {
    move |e| CliError::said(format!("can't use {}: {e}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<(), CliError> {
    let mut file =
        std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path).map_err(io(path))?;
    std::io::Write::write_all(&mut file, text.as_bytes()).map_err(io(path))
}

/// A loopback port. What is asked for is what is given, or the start fails when it is bound.
async fn port(wanted: u16) -> Result<u16, CliError> {
    if wanted != 0 {
        return Ok(wanted);
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(CliError::said)?;
    Ok(listener.local_addr().map_err(CliError::said)?.port())
}

/// A fresh folder for one run.
pub fn fresh_folder(what: &str, remove: bool) -> Folder {
    let name = hex::encode(crate::keys::random::random_bytes::<6>(&crate::keys::random::SystemRandom));
    Folder::new(std::env::temp_dir().join(format!("countersign-{what}-{name}")), remove)
}

/// What to type so that `countersign` is this program, if it isn't yet.
fn path_to_ourselves() -> Option<String> {
    let own = std::env::current_exe().and_then(|p| p.canonicalize()).ok()?;
    let named = own.file_name().is_some_and(|name| name == "countersign");
    let found =
        std::env::split_paths(&std::env::var_os("PATH")?).find_map(|f| f.join("countersign").canonicalize().ok());
    if !named || found.as_ref() == Some(&own) {
        return None;
    }
    let folder = own.parent()?.display().to_string();
    Some(format!("export PATH='{}':\"$PATH\"", folder.replace('\'', r"'\''")))
}

impl World {
    /// Builds it in a folder. `with_postgres`: the folder of PostgreSQL's binaries, if it is to be used.
    /// Where it fails, it leaves nothing behind; once begun it must come to its end, for then it can be stopped.
    pub async fn start(kept: Folder, with_postgres: Option<PathBuf>, ports: [u16; 2]) -> Result<Self, CliError> {
        let folder = kept.path();
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(io(folder))?;
        let postgres = match with_postgres {
            Some(bin) => Some(ThrowAway::start(&bin).await?),
            None => None,
        };
        let authority =
            Arc::new(DevAuthority::new(TRUST_DOMAIN, Arc::new(SystemClock)).map_err(|e| CliError::said(e.detail()))?);
        let agent_port = port(ports[0]).await?;
        let reviewer_port = port(ports[1]).await?;
        let mtls_port = port(0).await?;
        let metrics_port = port(0).await?;
        let demo = TcpListener::bind("127.0.0.1:0").await.map_err(CliError::said)?;
        let demo_url = format!("http://{}", demo.local_addr().map_err(CliError::said)?);
        let agent_url = format!("https://localhost:{agent_port}");
        let reviewer_url = format!("http://localhost:{reviewer_port}");
        let loopback = |port: u16| SocketAddr::from(([127, 0, 0, 1], port)).to_string();
        let fill = |text: &str| {
            [
                ("@AGENT_URL@", agent_url.clone()),
                ("@REVIEWER_URL@", reviewer_url.clone()),
                ("@DEMO_URL@", demo_url.clone()),
                ("@AGENT_ADDRESS@", loopback(agent_port)),
                ("@MTLS_ADDRESS@", loopback(mtls_port)),
                ("@REVIEWER_ADDRESS@", loopback(reviewer_port)),
                ("@METRICS_ADDRESS@", loopback(metrics_port)),
                ("@PG_PORT@", postgres.as_ref().map(|p| p.port.to_string()).unwrap_or_default()),
            ]
            .iter()
            .fold(text.to_owned(), |text, (word, value)| text.replace(word, value))
        };
        let config_file = folder.join("countersign.toml");
        write(&config_file, &fill(include_str!("../../config/dev/countersign.toml")))?;
        let mut catalogue = include_str!("../../config/dev/catalogue.toml").to_owned();
        if let Some(postgres) = &postgres {
            catalogue.push_str(include_str!("../../config/dev/catalogue-postgres.toml"));
            write(&folder.join("postgres.password"), postgres.password.expose())?;
        }
        write(&folder.join("catalogue.toml"), &fill(&catalogue))?;
        let policies = folder.join("policies");
        std::fs::create_dir_all(&policies).map_err(io(&policies))?;
        for (name, text) in POLICIES {
            write(&policies.join(name), text)?;
        }
        write(&folder.join("bundle.json"), &authority.bundle_document())?;
        let ca = folder.join("ca.pem");
        write(&ca, &authority.x509_authorities_pem())?;
        let own = authority
            .x509_svid(&format!("spiffe://{TRUST_DOMAIN}/broker"), &["localhost", "127.0.0.1"], TLS_SECS)
            .map_err(|e| CliError::said(e.detail()))?;
        write(&folder.join("broker.pem"), &pem("CERTIFICATE", own.chain[0].as_ref()))?;
        write(&folder.join("broker.key"), &pem("PRIVATE KEY", own.key.secret_der()))?;

        let loaded = load(&config_file).map_err(CliError::said)?;
        let running = assemble::start(loaded, Mode::Dev).await?;
        let stop = CancellationToken::new();
        demo_api::start(demo, &demo_url, &agent_url, &ca, Arc::clone(&authority), stop.clone()).await?;
        let socket = folder.join("workload-api").join("agent.sock");
        let workload_api = WorkloadApiServer::start(&socket, Arc::clone(&authority), AGENT_ID)
            .map_err(|e| CliError::said(e.detail()))?;
        let mtls_url = format!("https://localhost:{mtls_port}");
        Ok(Self {
            running,
            authority,
            agent_url,
            mtls_url,
            reviewer_url,
            demo_url,
            ca,
            postgres,
            folder: kept,
            workload_api,
            stop,
        })
    }

    /// The Workload API's address.
    pub fn workload_api(&self) -> String {
        self.workload_api.endpoint()
    }

    /// A link that signs one person in, once.
    pub fn one_time_link(&self, person: &str) -> Result<String, CliError> {
        let person = PersonId::new(person).map_err(CliError::said)?;
        let code = self.running.app.sessions.one_time_code(person);
        Ok(format!("{}/login/one-time?code={}", self.reviewer_url, code.expose()))
    }

    /// A session of the terminal that runs this world (`dev` and `tour` alone).
    pub fn terminal_session(&self, person: &str) -> Result<Secret, CliError> {
        let person = PersonId::new(person).map_err(CliError::said)?;
        let account = format!("terminal#{person}");
        Ok(self.running.app.sessions.begin(person, account, Vec::new(), Via::Terminal))
    }

    /// Ends everything, and removes the folder if it was made for this run.
    pub async fn stop(self) -> Result<(), CliError> {
        self.stop_and(|| Ok(())).await
    }

    /// The same, with something to be done between.
    pub async fn stop_and(self, then: impl FnOnce() -> std::io::Result<()>) -> Result<(), CliError> {
        if let Err(error) = self.end_all().await {
            eprintln!("countersign: not every open grant was ended: {error}");
        }
        self.stop.cancel();
        self.running.stop().await?;
        then().map_err(CliError::said)
    }

    /// Ends what is open, while the targets are still there, and waits for the proofs.
    async fn end_all(&self) -> Result<(), CliError> {
        let reviewer = ReviewerClient::new(&self.reviewer_url, None, Some(self.terminal_session("reviewer")?))?;
        let deadline = tokio::time::Instant::now() + END_ALL;
        loop {
            let Queue { mine, others, live, .. } = reviewer.queue().await?;
            let open: Vec<Row> = [mine, others, live].concat();
            if open.is_empty() {
                return Ok(());
            }
            if tokio::time::Instant::now() > deadline {
                return Err(CliError::said(format!("{} are left", open.len())));
            }
            for row in open.iter().filter(|row| row.state != "ending") {
                match reviewer.revoke(row.id, "this trial broker is being ended".to_owned()).await {
                    // Somebody else was faster.
                    Err(error) if error.word() == Some("state") => {}
                    ended => drop(ended?),
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

const POLICIES: [(&str, &str); 6] = [
    ("10-observe.cedar", include_str!("../../config/policies/10-observe.cedar")),
    ("20-export.cedar", include_str!("../../config/policies/20-export.cedar")),
    ("30-change.cedar", include_str!("../../config/policies/30-change.cedar")),
    ("40-critical.cedar", include_str!("../../config/policies/40-critical.cedar")),
    ("50-never.cedar", include_str!("../../config/policies/50-never.cedar")),
    ("60-people.cedar", include_str!("../../config/policies/60-people.cedar")),
];

/// RFC 7468.
fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine as _;
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> = body.as_bytes().chunks(64).filter_map(|c| std::str::from_utf8(c).ok()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// Runs until it is told to stop.
pub async fn run(args: Args) -> Result<i32, CliError> {
    let mut signals = Signals::listen().map_err(CliError::said)?;
    let folder = match args.folder {
        Some(folder) => Folder::new(std::path::absolute(folder).map_err(CliError::said)?, false),
        None => fresh_folder("dev", true),
    };
    let binaries = if args.no_postgres { Err("--no-postgres".to_owned()) } else { throwaway::binaries() };
    let ports = [args.port, args.reviewer_port];
    let world = World::start(folder, binaries.as_ref().ok().cloned(), ports).await?;
    let printed = print(&world, binaries.err());
    if printed.is_ok() {
        signals.told().await;
        println!("\nEnding: open grants are ended first.");
    }
    world.stop().await?;
    printed.map(|()| 0)
}

/// What one copies to use it.
fn print(world: &World, no_postgres: Option<String>) -> Result<(), CliError> {
    println!("Countersign runs, for trying out, on this machine alone. Ctrl-C ends it.\n");
    println!("Agents (copy these lines into another terminal):\n");
    if let Some(line) = path_to_ourselves() {
        println!("  {line}");
    }
    println!("  export COUNTERSIGN_URL={}", world.agent_url);
    println!("  export COUNTERSIGN_CA={}", world.ca.display());
    println!("  export SPIFFE_ENDPOINT_SOCKET={}", world.workload_api());
    println!("  # or by mutual TLS: export COUNTERSIGN_MTLS=1 COUNTERSIGN_URL={}\n", world.mtls_url);
    println!("Then, for example:\n");
    println!("  countersign exec --want api/notes-sandbox:read --why 'a look' -- \\");
    println!(
        "    sh -c 'curl -s -H \"Authorization: Bearer $COUNTERSIGN_API_NOTES_SANDBOX_TOKEN\" {}/sandbox/notes'",
        world.demo_url
    );
    match no_postgres {
        None => {
            println!("  countersign exec --want postgres/sandbox:read --why 'a look' -- psql -c 'table notes'");
            println!(
                "  countersign exec --want postgres/shop:read --why 'who has not paid' -- psql -c 'table invoices'   # asks a person"
            );
        }
        Some(why) => println!("  ({why}: the demo API is the only target)"),
    }
    println!("\nReviewers (each link signs in once):\n");
    println!("  {}", world.one_time_link("reviewer")?);
    println!("  {}   (a second person, for critical requests)", world.one_time_link("second-reviewer")?);
    println!("\nSigned in there, also from a terminal (then inbox, show, deny, revoke, freeze):\n");
    println!("  countersign login --url {}", world.reviewer_url);
    println!("\nConfiguration, catalogue and policies to look at: {}", world.folder.path().display());
    Ok(())
}
