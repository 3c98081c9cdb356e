//! Who must notice nothing, however often the broker dies: others who work at the same targets, and an agent that holds
//! its credentials and its sessions all the time.

use serde_json::Value;
use tokio_postgres::Client;

use crate::broker::Serving;
use crate::targets::{Kind, Others, Targets};

/// As long as the policies allow without a vote.
const KEPT_SECS: u64 = 3600;
const KEEPER: &str = "keeper";

pub struct Bystanders {
    others: Others,
    grants: Vec<String>,
    kept: Vec<Kept>,
}

struct Kept {
    user: String,
    password: String,
    session: Client,
}

impl Bystanders {
    /// The broker is up, and may log in at its targets.
    pub async fn begin(targets: &Targets, serving: &Serving) -> Self {
        let others = targets.others().await;
        let agent = serving.agent(KEEPER);
        let (mut grants, mut kept) = (Vec::new(), Vec::new());
        for (kind, field) in [(Kind::Postgres, "user"), (Kind::OpenBao, "username")] {
            let id = agent.asked(&format!("kept-{}", kind.name()), KEPT_SECS, kind.want()).await;
            let credential = agent.collected(&id).await;
            let text = |v: &Value| v.as_str().unwrap().to_owned();
            let (user, password) = (text(&credential["public"][field]), text(&credential["secret"]["password"]));
            let session = targets.db.connect(&user, &password).await.unwrap();
            grants.push(id);
            kept.push(Kept { user, password, session });
        }
        Self { others, grants, kept }
    }

    /// Nobody noticed anything. Then the agent is done with what it kept, and that ends, its sessions too.
    pub async fn finish(&self, targets: &Targets, serving: &Serving, wrong: &mut Vec<String>) {
        for trouble in targets.trouble_of(&self.others).await {
            wrong.push(format!("harmed: {trouble}"));
        }
        for Kept { user, password, session } in &self.kept {
            if session.simple_query("SELECT 1").await.is_err() {
                wrong.push(format!("lost: the session of {user}, whose grant is in force, was cut"));
            }
            if targets.db.connect(user, password).await.is_err() {
                wrong.push(format!("lost: {user}, whose grant is in force, can't log in"));
            }
        }
        for grant in &self.grants {
            serving.agent(KEEPER).complete(grant).await;
        }
    }

    /// Once all is settled.
    pub async fn check_cut(&self, wrong: &mut Vec<String>) {
        for Kept { user, session, .. } in &self.kept {
            if session.simple_query("SELECT 1").await.is_ok() {
                wrong.push(format!("alive: the session of {user} goes on after its end is on record"));
            }
        }
    }
}
