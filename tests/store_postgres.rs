//! The conformance suite on PostgreSQL, and what is this store's alone: several nodes at once, a lost answer, a node that
//! was taken for dead.

#[path = "../src/store/conformance/mod.rs"]
mod conformance;
#[path = "support/postgres.rs"]
mod postgres;

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use countersign::core::secret::Secret;
use countersign::keys::random::SystemRandom;
use countersign::store::postgres::{PostgresStore, Settings};
use countersign::time::SystemClock;
use countersign::{core, store};
use store::Store;

use conformance::House;

/// One schema of a server that the tests share.
pub struct PostgresHouse {
    server: Arc<postgres::Cluster>,
    schema: String,
}

impl Default for PostgresHouse {
    fn default() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { server: postgres::shared(), schema: format!("cs_{}", NEXT.fetch_add(1, Ordering::Relaxed)) }
    }
}

impl PostgresHouse {
    fn settings(&self) -> Settings {
        self.settings_at(&self.server.sockets().display().to_string(), self.server.port)
    }
    fn settings_at(&self, host: &str, port: u16) -> Settings {
        let url = format!("host={host} port={port} user=postgres dbname=postgres");
        Settings {
            url: Secret::new(url),
            schema: self.schema.clone(),
            tls: None,
            sessions_max: 6,
            keys: core::digest::Digest::of_bytes(b"keys"),
        }
    }
    async fn node(&self) -> PostgresStore {
        store::postgres::open(&self.settings(), Arc::new(SystemClock), Arc::new(SystemRandom), None)
            .await
            .expect("the store opens")
    }
    /// Says something to the database, as its superuser.
    async fn tell(&self, sql: &str) -> tokio_postgres::Client {
        let client = self.server.admin("postgres").await;
        client.batch_execute(&sql.replace("$S", &self.schema)).await.expect("the database does it");
        client
    }
}

#[async_trait]
impl House for PostgresHouse {
    async fn open(&self) -> Arc<dyn Store> {
        Arc::new(self.node().await)
    }
    async fn hold(&self) -> Box<dyn Any + Send> {
        Box::new(self.tell("BEGIN; SELECT 1 FROM $S.tail FOR UPDATE").await)
    }
    async fn passes(&self, time: Duration) {
        let ms = time.as_millis();
        self.tell(&format!("UPDATE $S.due SET until = until - interval '{ms} milliseconds'")).await;
    }
}

#[path = "store_postgres/moved.rs"]
mod moved;
#[path = "store_postgres/nodes.rs"]
mod nodes;

mod on_postgres {
    use super::conformance::suite;
    use super::*;
    suite!(PostgresHouse);

    #[test]
    fn histories() {
        conformance::histories::run::<PostgresHouse>(10, 60);
    }
}
