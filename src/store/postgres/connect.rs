//! The way to the database: bounded sessions, a deadline on every call, and what an error means for what was asked.

use std::time::Duration;

use deadpool_postgres::{Hook, HookError, Manager, ManagerConfig, Object, Pool, RecyclingMethod, Runtime, Timeouts};
use tokio_postgres::config::{Host, LoadBalanceHosts, SslMode, TargetSessionAttrs};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Config, NoTls, Row};

use super::tables::Trouble;
use super::{OpenError, Settings};

/// Reaching the database and logging in.
const CONNECT: Duration = Duration::from_secs(5);
/// Waiting for a session that is free.
const PATIENCE: Duration = Duration::from_secs(3);
/// One statement, as the broker sees it. The server gives up earlier, see [`SESSION`].
const STATEMENT: Duration = Duration::from_secs(8);
/// Unanswered bytes on a connection: after this the kernel sends them no more.
const UNANSWERED: Duration = Duration::from_secs(5);
/// How often a read is tried.
const READS: usize = 3;

/// `synchronous_commit`: what is acknowledged must survive the server's own crash.
const SESSION: &str = "SET statement_timeout = '5s'; SET lock_timeout = '5s'; \
     SET idle_in_transaction_session_timeout = '10s'; SET synchronous_commit = on; \
     SET default_transaction_isolation = 'read committed'; SET standard_conforming_strings = on; \
     SET client_min_messages = warning; SET TimeZone = 'UTC'";

impl Trouble {
    /// What an error means for what was asked.
    pub(super) fn of(error: &tokio_postgres::Error) -> Self {
        let Some(db) = error.as_db_error() else { return Self::Lost(chain(error)) };
        let code = db.code().code().to_owned();
        let text = format!("{} (SQLSTATE {code})", db.message());
        // The connection, the server or the machine went away in the middle of it: no answer to what was asked.
        let is_lost = ["08", "57P", "58", "XX", "F0", "40003"].iter().any(|class| code.starts_with(class));
        if is_lost { Self::Lost(text) } else { Self::Refused(code, text) }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// A bounded set of sessions.
pub(super) struct Db {
    pool: Pool,
}

/// One session. It is given up if anything on it has no clear end.
pub(super) struct Session(Option<Object>);

impl Db {
    /// Makes the set; connects to nothing yet.
    pub(super) fn new(settings: &Settings) -> Result<Self, OpenError> {
        let bad = |what: String| OpenError::Settings(what);
        let mut config: Config = settings.url.expose().parse().map_err(|_| {
            bad("the store's `url` is not of the form postgres://USER:PASSWORD@HOST:PORT/DATABASE".into())
        })?;
        config.application_name("countersign-store").tcp_user_timeout(UNANSWERED);
        config.keepalives_idle(Duration::from_secs(10)).target_session_attrs(TargetSessionAttrs::ReadWrite);
        // Of several servers, one that is silent must not keep the others from being asked.
        let hosts = u32::try_from(config.get_hosts().len().max(1)).unwrap_or(u32::MAX);
        config.connect_timeout(CONNECT / hosts).load_balance_hosts(LoadBalanceHosts::Random);
        let manager = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let manager = match &settings.tls {
            Some(tls) => {
                config.ssl_mode(SslMode::Require);
                Manager::from_config(config, tls.clone(), manager)
            }
            None if config.get_hosts().iter().all(is_here) => {
                config.ssl_mode(SslMode::Disable);
                Manager::from_config(config, NoTls, manager)
            }
            None => {
                return Err(bad("the store's database is on another machine: set `ca_file` in [store], so that the \
                     connection is encrypted and the server is who it says"
                    .into()));
            }
        };
        let prepare = Hook::async_fn(|client, _| {
            Box::pin(async move { client.batch_execute(SESSION).await.map_err(HookError::Backend) })
        });
        let timeouts = Timeouts { wait: Some(PATIENCE), create: Some(CONNECT), recycle: Some(PATIENCE) };
        let pool = Pool::builder(manager)
            .max_size(settings.sessions_max)
            .timeouts(timeouts)
            .runtime(Runtime::Tokio1)
            .post_create(prepare)
            .build()
            .map_err(|e| bad(e.to_string()))?;
        Ok(Self { pool })
    }

    pub(super) async fn session(&self) -> Result<Session, Trouble> {
        let lost = |e: deadpool_postgres::PoolError| match &e {
            deadpool_postgres::PoolError::Backend(error) => Trouble::Lost(Trouble::of(error).says().to_owned()),
            _ => Trouble::Lost(chain(&e)),
        };
        Ok(Session(Some(self.pool.get().await.map_err(lost)?)))
    }

    /// Asks something that changes nothing, or may be done twice.
    pub(super) async fn query(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Trouble> {
        let mut tries = 0;
        loop {
            tries += 1;
            let outcome = match self.session().await {
                Ok(mut session) => session.query(sql, params).await,
                Err(trouble) => Err(trouble),
            };
            match outcome {
                Err(trouble) if trouble.is_passing() && tries < READS => {}
                outcome => return outcome,
            }
        }
    }
}

impl Session {
    pub(super) async fn query(&mut self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Trouble> {
        self.exchange(async |client| {
            let statement = client.prepare_cached(sql).await?;
            client.query(&statement, params).await
        })
        .await
    }

    /// Runs one exchange with a deadline. A session on which it doesn't come to its end is never used again, nor is
    /// one whose exchange is dropped half-way.
    pub(super) async fn exchange<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut Object) -> Result<T, tokio_postgres::Error>,
    ) -> Result<T, Trouble> {
        let Some(object) = self.0.take() else { return Err(Trouble::Lost("the session was given up".into())) };
        let mut taken = Taken(Some(object));
        let Some(object) = taken.0.as_mut() else { return Err(Trouble::Lost("the session was given up".into())) };
        let outcome = match tokio::time::timeout(STATEMENT, work(object)).await {
            Ok(outcome) => outcome.map_err(|e| Trouble::of(&e)),
            Err(_) => Err(Trouble::Lost(format!("no answer within {} s", STATEMENT.as_secs()))),
        };
        if !matches!(outcome, Err(Trouble::Lost(_))) {
            self.0 = taken.0.take();
        }
        outcome
    }
}

/// Closes a session instead of giving it back.
struct Taken(Option<Object>);

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some(object) = self.0.take() {
            drop(Object::take(object));
        }
    }
}

/// Does it stay on this machine?
fn is_here(host: &Host) -> bool {
    match host {
        Host::Tcp(name) => name == "localhost" || name.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback()),
        Host::Unix(_) => true,
    }
}
