//! The last resort: one session that can terminate leases' sessions while the server's lock table is full.
//!
//! Then not even `pg_authid` can be looked at, because that takes a lock, and a lease can see to it that nobody has its answer
//! cached. So this session stays inside a transaction that holds those (ACCESS SHARE) locks already. It holds no snapshot: it
//! delays no VACUUM, only VACUUM FULL and REINDEX of those two catalogues.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;
use tokio_postgres::Statement;

use super::ending::Ending;
use super::fail::Fail;
use super::pool::{Conn, Dial};
use super::shared::EXCHANGE;

/// Terminates by OID: membership in the lease is the right to it.
const TERMINATE: &str =
    "SELECT pid, usesysid, pg_terminate_backend(pid) FROM pg_stat_get_activity(NULL) WHERE usesysid = ANY($1::oid[])";

/// Takes the locks, on the indexes too: planning a query locks all of a table's.
const HOLD: &str = "SET idle_in_transaction_session_timeout = 0; BEGIN READ ONLY; SELECT FROM pg_roles LIMIT 0; \
     SELECT FROM pg_auth_members LIMIT 0; SELECT FROM pg_database LIMIT 0";

/// The session, made when first needed and again when it is gone.
pub struct LastResort {
    dial: Dial,
    held: Mutex<Option<(Conn, Statement)>>,
    /// One attempt to make it at a time, with when and why the last one failed: who waited for it takes its answer.
    making: Mutex<Option<(Instant, Fail)>>,
}

impl LastResort {
    /// Nothing is connected yet.
    pub fn new(dial: Dial) -> Self {
        Self { dial, held: Mutex::new(None), making: Mutex::new(None) }
    }

    /// Makes sure that the session is there. Before each mint: what can't be ended is not made.
    pub async fn ready(&self, within: Duration) -> Result<(), Fail> {
        tokio::time::timeout(within, self.make()).await.unwrap_or_else(|_| {
            Err(Fail::Unreachable {
                place: self.dial.place(),
                why: format!("no standing session within {} s", within.as_secs()),
                code: None,
                answered: false,
            })
        })
    }

    /// The same, without waiting: where a session may be needed later and nothing depends on it now.
    pub fn soon(self: &Arc<Self>, within: Duration) {
        let last = Arc::clone(self);
        tokio::spawn(async move {
            // Whoever needs it says what is wrong with that server.
            let _ = last.ready(within).await;
        });
    }

    async fn is_held(&self) -> bool {
        self.held.lock().await.as_ref().is_some_and(|(conn, _)| !conn.client.is_closed())
    }

    async fn make(&self) -> Result<(), Fail> {
        if self.is_held().await {
            return Ok(());
        }
        let asked = Instant::now();
        let mut making = self.making.lock().await;
        if self.is_held().await {
            return Ok(());
        }
        if let Some((_, fail)) = making.as_ref().filter(|(at, _)| *at >= asked) {
            return Err(fail.clone());
        }
        match self.connect().await {
            Ok(session) => {
                *self.held.lock().await = Some(session);
                Ok(())
            }
            Err(fail) => {
                *making = Some((Instant::now(), fail.clone()));
                Err(fail)
            }
        }
    }

    async fn connect(&self) -> Result<(Conn, Statement), Fail> {
        let conn = self.dial.connect().await?;
        conn.exchange(EXCHANGE, conn.client.batch_execute(HOLD)).await?;
        let terminate = conn.exchange(EXCHANGE, conn.client.prepare(TERMINATE)).await?;
        // Once for nobody: everything that the real one needs has been looked up.
        conn.exchange(EXCHANGE, conn.client.query(&terminate, &[&Vec::<u32>::new()])).await?;
        Ok((conn, terminate))
    }

    /// Terminates every visible session of these roles.
    pub async fn terminate(&self, endings: &mut [Ending]) -> Result<(), Fail> {
        let oids: Vec<u32> = endings.iter().filter(|e| e.is_open()).flat_map(Ending::oids).collect();
        let mut held = self.held.lock().await;
        let Some((conn, terminate)) = held.as_ref() else {
            return Err(Fail::Lost("the lock table is full and there is no standing session".to_owned()));
        };
        // Inside a transaction the list of sessions is the one first seen.
        let fresh = conn.client.batch_execute("SELECT pg_stat_clear_snapshot()");
        let work = async {
            fresh.await?;
            conn.client.query(terminate, &[&oids]).await
        };
        let done = conn.exchange(EXCHANGE, work).await;
        if done.is_err() {
            // An error ended the transaction and gave the locks back.
            *held = None;
        }
        for row in done? {
            let (pid, oid): (i32, u32) = (row.get(0), row.get(1));
            if let Some(ending) = endings.iter_mut().find(|e| e.oids().any(|o| o == oid)) {
                ending.tally.sessions.insert(pid);
            }
        }
        Ok(())
    }
}
