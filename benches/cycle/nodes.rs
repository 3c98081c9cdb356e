//! W1 and W2 with the record in PostgreSQL, with one node and with three, beside what that PostgreSQL does bare.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::figures::{Part, load_average, round};
use crate::postgres::Cluster;
use crate::w1::{self, Stop};
use crate::w2::{self, SETTINGS, Session, Target};
use crate::world::{Setup, World};
use crate::{AGENTS, Outcome, WARM_UP};

/// The database of the record: durable as PostgreSQL ships it, with a login that may do nothing but make its schema.
struct Record {
    cluster: Cluster,
    url: String,
}

impl Record {
    fn start() -> Outcome<Self> {
        let cluster = Cluster::start(SETTINGS);
        let sql = "CREATE ROLE node LOGIN PASSWORD 'node'; GRANT CREATE ON DATABASE postgres TO node";
        let out = cluster.psql("postgres", &[], sql);
        if !out.status.success() {
            return Err(String::from_utf8_lossy(&out.stderr).into_owned().into());
        }
        let url = format!("postgres://node:node@127.0.0.1:{}/postgres", cluster.port);
        Ok(Self { cluster, url })
    }

    /// Commits of one row of 600 bytes, so many sessions at once.
    async fn commits(&self, sessions: usize, length: Duration) -> Outcome<Value> {
        let mut clients = Vec::new();
        for _ in 0..sessions {
            clients.push(self.cluster.admin("postgres").await);
        }
        clients[0].batch_execute("CREATE TABLE IF NOT EXISTS bare (id bigserial PRIMARY KEY, body text)").await?;
        let began = Instant::now();
        let running = clients.iter().map(|client| async move {
            let (mut part, body) = (Part::default(), "x".repeat(600));
            let insert = client.prepare("INSERT INTO bare (body) VALUES ($1)").await?;
            let mut commits = 0;
            while began.elapsed() < length {
                let at = Instant::now();
                client.execute(&insert, &[&body]).await?;
                part.add(at.elapsed());
                commits += 1;
            }
            Ok::<_, tokio_postgres::Error>((commits, part))
        });
        let (mut all, mut took) = (0_u32, Part::default());
        for one in futures::future::join_all(running).await {
            let (commits, part) = one?;
            all += commits;
            took.join(part);
        }
        let rate = round(f64::from(all) / began.elapsed().as_secs_f64());
        Ok(
            json!({ "sessions": sessions, "rate_per_sec": rate, "took": took.figures(), "load_average": load_average()? }),
        )
    }
}

/// Measures it; `say` is told each result.
pub async fn run(binary: &Path, folder: &Path, length: Duration, say: &mut dyn FnMut(&str, Value)) -> Outcome<()> {
    let bare = Record::start()?;
    for sessions in [1, AGENTS] {
        say(&format!("bare_commits_{sessions}"), bare.commits(sessions, length.min(Duration::from_secs(3))).await?);
    }
    drop(bare);
    for count in [1, 3] {
        let (record, target) = (Record::start()?, Target::start()?);
        let mut nodes: Vec<Arc<World>> = Vec::new();
        for n in 0..count {
            let setup = Setup {
                target: Some(&target),
                store: Some(&record.url),
                beside: nodes.first().map(|first| &**first),
                ..Setup::default()
            };
            let node = World::start_with(binary, &folder.join(format!("node-{n}")), &setup).await?;
            nodes.push(node);
        }
        w1::run(&nodes, AGENTS, Stop::Cycles(WARM_UP)).await?;
        say(&format!("w1_16_nodes_{count}"), w1::run(&nodes, AGENTS, Stop::After(length)).await?);
        w2::run(&nodes, &target, AGENTS, Session::Open, Stop::Cycles(WARM_UP)).await?;
        let measured = w2::run(&nodes, &target, AGENTS, Session::Open, Stop::After(length)).await?;
        say(&format!("w2_16_nodes_{count}"), measured);
        let mut races = Map::new();
        for (n, node) in nodes.iter().enumerate() {
            races.insert(n.to_string(), json!(node.metric("countersign_store{figure=\"store_lost_races\"}").await?));
        }
        say(&format!("lost_races_nodes_{count}"), Value::Object(races));
        for node in nodes {
            node.stop().await?;
        }
        say(&format!("left_at_target_nodes_{count}"), target.left().await?);
    }
    Ok(())
}
