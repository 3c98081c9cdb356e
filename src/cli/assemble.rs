//! Puts a whole broker together from a checked configuration, and runs it until it is told to stop.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::audit::note::{Signer, Verifier};
use crate::broker::{Broker, BrokerError, Mode, Parts, Rules, RunClock, build, run_clock};
use crate::config::{Loaded, Problem, StoreConfig};
use crate::core::digest::Digest;
use crate::identity::agents::Identities;
use crate::identity::mtls::mtls_server_config;
use crate::identity::net::system_lookup;
use crate::identity::reviewer::ReviewerLogin;
use crate::keys::random::SystemRandom;
use crate::keys::{Keys, Origin};
use crate::policy::Engine;
use crate::runtime::Runtime;
use crate::server::listen::{Listener, serve};
use crate::server::session::Sessions;
use crate::server::tls::{OwnCertificate, server_config};
use crate::server::{App, Shared, agent_api, metrics, pages};
use crate::store::embedded;
use crate::time::{Clock, SystemClock};

use super::{CliError, open_store};

/// How often keys and certificates are looked after.
const UPKEEP: Duration = Duration::from_secs(60);
/// How long endings may take once the end of the broker has begun.
const STOP: Duration = Duration::from_secs(15);
/// Without a reviewer login (`dev`), a session lasts: idle, absolute, groups, in seconds.
const DEV_SESSION_SECS: [u64; 3] = [12 * 3600, 24 * 3600, 24 * 3600];

/// A broker that runs.
pub struct Running {
    /// What its handlers share.
    pub app: Shared,
    /// Records that were there when the store was opened.
    pub records: u64,
    /// Where the journal is, and the key that signs its checkpoints.
    pub journal: (PathBuf, Verifier),
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// Every problem on a line of its own.
fn problems(all: Vec<Problem>) -> CliError {
    CliError::said(crate::config::ConfigError(all))
}

/// What meets the outside.
pub struct Edge {
    identities: Identities,
    login: Option<ReviewerLogin>,
    certificate: Option<Arc<OwnCertificate>>,
}

/// Who is believed, where people log in, what the listeners show; or everything that is wrong with it. `serve` and
/// `config check` both build it here, so that what was checked is what is served. Fetches nothing.
pub fn edge(loaded: &Loaded, clock: &Arc<dyn Clock>) -> Result<Edge, Vec<Problem>> {
    let (config, base) = (&loaded.config, &loaded.base);
    let problem = |place: &str, what: &str| Problem { place: place.to_owned(), what: what.to_owned() };
    let identities = Identities::new(config.spiffe.as_ref(), &config.issuer, base, Arc::clone(clock));
    let callback = format!("{}/login/callback", config.broker.reviewer_url.trim_end_matches('/'));
    let login = config
        .reviewer_login
        .as_ref()
        .map(|login| ReviewerLogin::new(login, &callback, base, Arc::clone(clock), system_lookup()));
    let listen = &config.listen;
    let certificate = listen.tls_cert.as_ref().zip(listen.tls_key.as_ref());
    let certificate = certificate.map(|(cert, key)| OwnCertificate::load(cert, key, base));
    match (identities, login.transpose(), certificate.transpose()) {
        (Ok(identities), Ok(login), Ok(certificate)) => Ok(Edge { identities, login, certificate }),
        (identities, login, certificate) => {
            let mut all = Vec::new();
            all.extend(identities.err().iter().flatten().map(|e| problem("identities", e.detail())));
            all.extend(login.err().iter().map(|e| problem("reviewer_login", e.detail())));
            all.extend(certificate.err().iter().map(|e| problem("listen", &e.to_string())));
            Err(all)
        }
    }
}

/// Starts a broker. When this returns, it answers.
pub async fn start(loaded: Loaded, mode: Mode) -> Result<Running, CliError> {
    let runtime: Arc<dyn Runtime> = Arc::new(SystemClock);
    let clock: Arc<dyn Clock> = runtime.clone();
    let data_dir = loaded.base.join(&loaded.config.broker.data_dir);
    embedded::restore::refuse_unfinished(&data_dir).map_err(CliError::said)?;
    std::fs::create_dir_all(&data_dir)
        .map_err(|e| CliError::said(format!("can't make the data folder {}: {e}", data_dir.display())))?;
    let origin = if mode == Mode::Dev { Origin::Dev } else { Origin::Serve };
    let keys = Keys::open(&data_dir, origin, clock.wall()).map_err(CliError::said)?;
    let name = journal_name(&loaded.config.broker.issuer);
    let signer = Signer::from_keys(&name, Arc::clone(&keys.checkpoints)).map_err(CliError::said)?;
    let verifier = signer.verifier();
    let earlier = keys.checkpoints.public_keys().into_iter().map(|public| Verifier::of(&name, public)).collect();
    let opened =
        open_store::open(&loaded.config, &loaded.base, &data_dir, Arc::clone(&runtime), &keys, signer, earlier).await?;
    let (store, records) = (opened.store, opened.records);
    let shares_keys = !matches!(loaded.config.store, StoreConfig::Embedded);
    let (last_run, last_at) = store.last_run().await.map_err(CliError::said)?;
    let start = run_clock::start(last_run.as_ref(), last_at, clock.as_ref());

    let prefix = loaded.config.broker.name_prefix.clone();
    let engine = Engine::load(&loaded.policies, &loaded.catalogue, &loaded.config.tier).map_err(problems)?;
    let connectors = build::connectors(&loaded, &keys, Arc::clone(&clock), &prefix).map_err(problems)?;
    let hashes = loaded.hashes().map_err(CliError::said)?;
    let hashes: BTreeMap<String, Digest> =
        [("config", hashes.config), ("catalogue", hashes.catalogue), ("policies", hashes.policies)]
            .map(|(part, hash)| (part.to_owned(), hash))
            .into();
    let limits = loaded.config.limits.clone();
    let listen = loaded.config.listen.clone();
    let login_config = loaded.config.reviewer_login.clone();
    let reviewer_url = loaded.config.broker.reviewer_url.trim_end_matches('/').to_owned();

    let Edge { identities, login, certificate } = edge(&loaded, &clock).map_err(problems)?;
    let session_secs = login_config
        .as_ref()
        .map_or(DEV_SESSION_SECS, |c| [c.session_idle_secs_max, c.session_secs_max, c.groups_age_secs_max]);

    let broker = Broker::new(Parts {
        store,
        rules: Rules { config: loaded.config, catalogue: loaded.catalogue, engine: Arc::new(engine), connectors },
        clock: RunClock::new(runtime, start.at),
        random: Arc::new(SystemRandom),
        names: Arc::clone(&keys.names),
        prefix,
        mode,
    });
    let started = match broker.start_up(start, &hashes).await {
        Err(error @ (BrokerError::Unavailable(_) | BrokerError::Unrecorded(_))) => Err(error),
        other => Ok(other.map_err(CliError::said)?),
    };

    let stop = CancellationToken::new();
    identities.start(&stop);
    let app: Shared = Arc::new(App {
        sessions: Sessions::new(
            Arc::clone(&clock),
            Arc::new(SystemRandom),
            session_secs,
            reviewer_url.starts_with("https://"),
        ),
        broker: Arc::clone(&broker),
        identities: Arc::new(identities),
        login,
        token_keys: Arc::clone(&keys.tokens),
        assertion_keys: Arc::clone(&keys.assertions),
        metrics: metrics::Metrics::default(),
        ready: AtomicBool::new(false),
        stop: stop.clone(),
    });

    let tasks = TaskTracker::new();
    let certificate = match (certificate, &listen.tls_cert, &listen.tls_key) {
        (Some(own), Some(cert), Some(key)) => Some((own, cert, key)),
        _ => None,
    };
    let tls = match &certificate {
        Some((own, ..)) => {
            Some(Arc::new(arc_swap::ArcSwap::new(server_config(Arc::clone(own)).map_err(CliError::said)?)))
        }
        None => None,
    };
    let plain_reviewer = reviewer_url.starts_with("http://");
    let mut listeners = vec![
        Listener {
            name: "agent",
            socket: bind(listen.agent).await?,
            tls: tls.clone(),
            router: agent_api::routes(Arc::clone(&app)),
        },
        Listener {
            name: "reviewer",
            socket: bind(listen.reviewer).await?,
            tls: if plain_reviewer { None } else { tls.clone() },
            router: pages::routes(Arc::clone(&app)),
        },
    ];
    if let (Some(address), Some(verifier), Some((own, ..))) = (listen.agent_mtls, app.identities.spiffe(), &certificate)
    {
        let resolver: Arc<dyn rustls::server::ResolvesServerCert> = Arc::clone(own) as _;
        let config = mtls_server_config(Arc::clone(verifier), resolver, Arc::clone(&clock))
            .map_err(|e| CliError::said(e.detail()))?;
        let tls = Some(Arc::new(arc_swap::ArcSwap::from_pointee(config)));
        let router = agent_api::routes(Arc::clone(&app));
        listeners.push(Listener { name: "agent-mtls", socket: bind(address).await?, tls, router });
    }
    if let Some(address) = listen.metrics {
        let router = metrics::routes(Arc::clone(&app));
        listeners.push(Listener { name: "metrics", socket: bind(address).await?, tls: None, router });
    }
    for listener in listeners {
        tasks.spawn(serve(listener, limits.clone(), stop.clone()));
    }
    broker.drive();
    if let Err(error) = started {
        tracing::error!(%error, "the start can't be recorded; what is due is ended, and no request is taken");
        broker.start_later(start, hashes);
    }
    let upkeep = {
        let (stop, base, clock) = (stop.clone(), loaded.base.clone(), Arc::clone(&clock));
        let certificate = certificate.map(|(own, cert, key)| (own, cert.clone(), key.clone()));
        async move {
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = clock.sleep(UPKEEP) => {}
                }
                // Keys that several nodes share are the operator's to change, on all at once.
                if !shares_keys && let Err(error) = keys.tick(clock.wall()) {
                    tracing::error!(%error, "the signing keys can't be looked after");
                }
                if let Some((own, cert, key)) = &certificate
                    && let Err(error) = own.reload(cert, key, &base)
                {
                    tracing::warn!(%error, "the TLS certificate can't be read again; the old one stays");
                }
            }
        }
    };
    tasks.spawn(upkeep);
    tasks.close();
    app.ready.store(true, Ordering::Release);
    Ok(Running { app, records, journal: (embedded::journal_dir(&data_dir), verifier), stop, tasks })
}

impl Running {
    /// Stops in good order: no new requests, what is in flight finishes, the rest is due at the next start.
    pub async fn stop(self) -> Result<(), CliError> {
        self.app.ready.store(false, Ordering::Release);
        self.stop.cancel();
        self.tasks.wait().await;
        self.app.broker.stop(STOP).await;
        self.app.broker.run_ended().await;
        self.app.broker.store.close().await.map_err(CliError::said)
    }
}

async fn bind(address: std::net::SocketAddr) -> Result<TcpListener, CliError> {
    TcpListener::bind(address).await.map_err(|e| CliError::said(format!("can't listen on {address}: {e}")))
}

/// The journal's name in checkpoints: the broker's host and `/journal`.
pub fn journal_name(issuer: &str) -> String {
    let host = url::Url::parse(issuer).ok().and_then(|u| u.host_str().map(str::to_owned));
    format!("{}/journal", host.unwrap_or_else(|| "countersign".to_owned()))
}
