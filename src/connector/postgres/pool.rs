//! Connections of the broker: made when first needed, kept warm, thrown away when in doubt.
//! Not here: what is said on them.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_postgres::config::TargetSessionAttrs;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Config, NoTls, Row, Statement};

use super::fail::Fail;
use super::settings::{Plan, Standby};
use crate::config::SecretRef;

/// Reaching a server and logging in.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// One statement, at the server.
pub const STATEMENT_TIMEOUT: Duration = Duration::from_secs(5);
/// One statement that drops what a lease owned, at the server.
pub const DROP_TIMEOUT: Duration = Duration::from_mins(1);
/// Unanswered bytes on a connection: after this the kernel sends them no more.
pub const UNANSWERED: Duration = Duration::from_secs(5);

/// How to reach one database of one server as the broker.
#[derive(Clone)]
pub struct Dial {
    server: Standby,
    database: String,
    user: String,
    password: Option<SecretRef>,
    base: Arc<std::path::Path>,
    tls: Option<super::tls::MakeTls>,
    /// For the primary: a server in recovery knows less than there is, and its "gone" would prove nothing.
    writes: bool,
}

impl Dial {
    /// The broker's way to a server and database of the plan.
    pub fn new(plan: &Plan, base: &Arc<std::path::Path>, server: &Standby, database: &str) -> Self {
        Self {
            server: server.clone(),
            database: database.to_owned(),
            user: plan.user.as_str().to_owned(),
            password: plan.password.clone(),
            base: Arc::clone(base),
            tls: plan.tls.clone(),
            writes: *server == plan.primary,
        }
    }

    /// For messages.
    pub fn place(&self) -> String {
        format!("{}:{}/{}", self.server.host, self.server.port, self.database)
    }

    /// A new session.
    pub async fn connect(&self) -> Result<Conn, Fail> {
        let refuse = |why: String, answered| Fail::Unreachable { place: self.place(), why, code: None, answered };
        let mut config = Config::new();
        config.host(&self.server.host).port(self.server.port).user(&self.user).dbname(&self.database);
        config.application_name("countersign").connect_timeout(CONNECT_TIMEOUT).tcp_user_timeout(UNANSWERED);
        config.keepalives_idle(Duration::from_secs(30));
        if self.writes {
            config.target_session_attrs(TargetSessionAttrs::ReadWrite);
        }
        if let Some(reference) = &self.password {
            config.password(reference.read(&self.base).map_err(|e| refuse(e.to_string(), true))?.expose());
        }
        let connecting = async {
            if let Some(tls) = &self.tls {
                config.ssl_mode(tokio_postgres::config::SslMode::Require);
                let (client, connection) = config.connect(tls.clone()).await?;
                tokio::spawn(connection);
                Ok(client)
            } else {
                config.ssl_mode(tokio_postgres::config::SslMode::Disable);
                let (client, connection) = config.connect(NoTls).await?;
                tokio::spawn(connection);
                Ok(client)
            }
        };
        let prepare = async {
            let client: Client = connecting.await.map_err(|e| Fail::of_connect(self.place(), &e))?;
            Conn::prepare(client).await.map_err(|e| Fail::of_connect(self.place(), &e))
        };
        match tokio::time::timeout(CONNECT_TIMEOUT * 2, prepare).await {
            Ok(result) => result,
            // It took the connection: else that had its own, shorter deadline.
            Err(_) => Err(refuse(format!("no answer within {} s", (CONNECT_TIMEOUT * 2).as_secs()), true)),
        }
    }
}

/// A session with what it needs prepared.
pub struct Conn {
    /// The session.
    pub client: Client,
    /// Its backend's process id.
    pub pid: i32,
    /// [`LOCKS`].
    pub locks: Statement,
    /// [`ACTIVITY`].
    pub activity: Statement,
    kept: tokio::sync::Mutex<HashMap<&'static str, Statement>>,
    in_doubt: AtomicBool,
    fresh: AtomicBool,
}

/// Sessions that may be absent from `pg_stat_get_activity`: from start-up until they are listed there they hold
/// this lock (1262 is `pg_database`; by number, since with the lock table full no name can be looked up), also while they sleep in `post_auth_delay`.
pub const LOCKS: &str = "SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'object' AND classid = 1262 \
     AND mode = 'RowExclusiveLock' AND pid IS NOT NULL";
/// All sessions, with whose they are. By OID: names are NULL once a role is dropped.
pub const ACTIVITY: &str = "SELECT pid, usesysid FROM pg_stat_get_activity(NULL)";

/// `synchronous_commit`: an ending that was reported must survive the target's own crash (guarantee 5).
const SESSION: &str = "SET search_path = pg_catalog, pg_temp; SET lock_timeout = '200ms'; SET statement_timeout = '5s'; \
     SET idle_in_transaction_session_timeout = '15s'; SET client_min_messages = warning; SET synchronous_commit = on; \
     SET standard_conforming_strings = on; SET DateStyle = 'ISO'; SET TimeZone = 'UTC'";

impl Conn {
    async fn prepare(client: Client) -> Result<Self, tokio_postgres::Error> {
        client.batch_execute(SESSION).await?;
        let (locks, activity, pid) = futures::try_join!(
            client.prepare(LOCKS),
            client.prepare(ACTIVITY),
            client.query_typed_one("SELECT pg_backend_pid()", &[])
        )?;
        Ok(Self {
            pid: pid.try_get(0)?,
            client,
            locks,
            activity,
            kept: tokio::sync::Mutex::default(),
            in_doubt: AtomicBool::new(false),
            fresh: AtomicBool::new(true),
        })
    }

    /// Runs one exchange with a deadline. If it doesn't come to its end, or the future is dropped, the
    /// connection is never used again: it might still be in the middle of it.
    pub async fn exchange<T>(
        &self,
        deadline: Duration,
        work: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, Fail> {
        self.in_doubt.store(true, Ordering::Relaxed);
        match tokio::time::timeout(deadline, work).await {
            Ok(Ok(value)) => {
                self.in_doubt.store(false, Ordering::Relaxed);
                Ok(value)
            }
            Ok(Err(e)) => {
                let fail = Fail::of_statement(&e);
                self.in_doubt.store(matches!(fail, Fail::Lost(_)), Ordering::Relaxed);
                Err(fail)
            }
            Err(_) => Err(Fail::Lost(format!("nothing within {} s", deadline.as_secs()))),
        }
    }

    /// Runs a query that is prepared on this session the first time.
    pub async fn ask(&self, sql: &'static str, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Fail> {
        let mut kept = self.kept.lock().await;
        let statement = if let Some(statement) = kept.get(sql) {
            statement.clone()
        } else {
            let statement = self.exchange(STATEMENT_TIMEOUT, self.client.prepare(sql)).await?;
            kept.insert(sql, statement.clone());
            statement
        };
        drop(kept);
        self.exchange(STATEMENT_TIMEOUT + Duration::from_secs(1), self.client.query(&statement, params)).await
    }

    /// Marks the session as not to be used again.
    pub fn discard(&self) {
        self.in_doubt.store(true, Ordering::Relaxed);
    }
}

/// A bounded set of sessions to one place.
pub struct Pool {
    dial: Dial,
    idle: Mutex<Vec<Conn>>,
    slots: Arc<Semaphore>,
    max: usize,
}

/// A session on loan. Goes back when dropped, if it is whole.
pub struct Lent {
    conn: Option<Conn>,
    pool: Arc<Pool>,
    _slot: OwnedSemaphorePermit,
}

impl Pool {
    /// At most `max` sessions; none is made now.
    pub fn new(dial: Dial, max: usize) -> Arc<Self> {
        Arc::new(Self { dial, idle: Mutex::new(Vec::new()), slots: Arc::new(Semaphore::new(max)), max })
    }

    /// For messages.
    pub fn place(&self) -> String {
        self.dial.place()
    }

    /// A session of nobody's, beside those that are counted.
    pub async fn beside(&self) -> Result<Conn, Fail> {
        self.dial.connect().await
    }

    /// An idle session, or a new one. Waits its turn for at most `patience`.
    pub async fn get(self: &Arc<Self>, patience: Duration) -> Result<Lent, Fail> {
        let busy = |_| Fail::Unreachable {
            place: self.place(),
            why: "all of the broker's sessions there are busy".to_owned(),
            code: None,
            answered: true,
        };
        let slot = tokio::time::timeout(patience, Arc::clone(&self.slots).acquire_owned()).await.map_err(busy)?;
        let slot = slot.map_err(|_| Fail::Lost("the broker is shutting down".to_owned()))?;
        let kept = {
            let mut idle = self.idle.lock();
            idle.retain(|c| !c.client.is_closed());
            idle.pop()
        };
        let conn = match kept {
            Some(conn) => conn,
            None => self.dial.connect().await?,
        };
        Ok(Lent { conn: Some(conn), pool: Arc::clone(self), _slot: slot })
    }

    /// The same, asked first whether the server still answers on it, so that a statement that may have no clear
    /// answer is not sent into a connection that died unnoticed.
    pub async fn get_live(self: &Arc<Self>, within: Duration) -> Result<Lent, Fail> {
        let search = async {
            loop {
                let lent = self.get(within).await?;
                if lent.fresh.swap(false, Ordering::Relaxed)
                    || lent.exchange(CONNECT_TIMEOUT, lent.client.check_connection()).await.is_ok()
                {
                    return Ok(lent);
                }
                lent.discard();
            }
        };
        tokio::time::timeout(within, search).await.unwrap_or_else(|_| {
            Err(Fail::Unreachable {
                place: self.place(),
                why: format!("no session within {} s", within.as_secs()),
                code: None,
                answered: false,
            })
        })
    }

    /// Makes sure that there is a session, idle or on loan.
    pub async fn warm(self: &Arc<Self>) -> Result<(), Fail> {
        let ready = self.slots.available_permits() < self.max || self.idle.lock().iter().any(|c| !c.client.is_closed());
        if ready { Ok(()) } else { self.get(CONNECT_TIMEOUT).await.map(drop) }
    }
}

impl Deref for Lent {
    type Target = Conn;
    fn deref(&self) -> &Conn {
        match &self.conn {
            Some(conn) => conn,
            None => unreachable!("only drop takes it"),
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(conn) = self.conn.take()
            && !conn.in_doubt.load(Ordering::Relaxed)
            && !conn.client.is_closed()
        {
            self.pool.idle.lock().push(conn);
        }
    }
}
