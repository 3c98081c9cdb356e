//! The targets, and what is there when nobody but an admin looks: a PostgreSQL whose roles the broker makes itself, and
//! an OpenBao that makes users of its own at the same PostgreSQL.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::broker::{PREFIX, Serving};
use crate::openbao::{OpenBao, Postgres, doc};

const ROLE: &str = "billing-ro";
const CREDS: &str = "database/creds/billing-ro";
/// What OpenBao's users begin with.
const USERS: &str = "csv_";
/// The longest mint at OpenBao, which allows a request [`BAO_REQUEST_SECS`].
const BAO_MINT_SECS: u64 = 6;
const BAO_REQUEST_SECS: u64 = 2;
/// A role that begins as ours do, and is nobody's of ours.
const LOOKALIKE: &str = "cslease_lookalike";
/// Somebody else's login.
const OTHER: (&str, &str) = ("nightly_report", "nightly");

/// Where a credential is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Postgres,
    OpenBao,
    Token,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Postgres, Self::OpenBao, Self::Token];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::OpenBao => "openbao",
            Self::Token => "token",
        }
    }

    /// The target's name in the catalogue.
    pub const fn target(self) -> &'static str {
        match self {
            Self::Postgres => "db",
            Self::OpenBao => "bao",
            Self::Token => "tokens",
        }
    }

    pub fn of_resource(resource: &str) -> Self {
        match resource {
            "postgres/notes" => Self::Postgres,
            "bao/billing" => Self::OpenBao,
            "api/notes" => Self::Token,
            other => panic!("no resource of ours: {other}"),
        }
    }

    /// One permission, as an agent asks for it.
    pub fn want(self) -> Value {
        match self {
            Self::Postgres => json!({ "type": "postgres", "identifier": "postgres/notes", "actions": ["read"] }),
            Self::OpenBao => json!({ "type": "vault", "identifier": "bao/billing", "actions": ["use"] }),
            Self::Token => crate::broker::notes(),
        }
    }
}

/// What of ours is there.
#[derive(Debug, Default, Clone)]
pub struct Seen {
    /// Roles that the broker made.
    pub roles: BTreeSet<String>,
    /// Users that OpenBao made.
    pub users: BTreeSet<String>,
    /// OpenBao's own leases.
    pub leases: BTreeSet<String>,
}

impl Seen {
    pub fn is_empty(&self) -> bool {
        self.roles.is_empty() && self.users.is_empty() && self.leases.is_empty()
    }
}

/// What others have at the same targets.
pub struct Others {
    session: tokio_postgres::Client,
    lease: String,
    lease_session: tokio_postgres::Client,
}

pub struct Targets {
    bao: OpenBao,
    pub db: Postgres,
    admin: tokio_postgres::Client,
}

impl Targets {
    /// `None` where a peer isn't installed.
    pub async fn start() -> Option<Self> {
        let bao = OpenBao::start("crash", BAO_REQUEST_SECS).await?;
        let db = Postgres::start("crash").await?;
        let admin = db.admin().await;
        let roles = "CREATE ROLE countersign LOGIN PASSWORD 'broker' CREATEROLE; CREATE ROLE lease_conn NOLOGIN; \
                     CREATE TABLE notes (body text); CREATE ROLE notes_read NOLOGIN; GRANT SELECT ON notes TO notes_read";
        admin.batch_execute(roles).await.unwrap();
        Some(Self { bao, db, admin })
    }

    /// `[[target]]` and `[[resource]]` tables.
    pub fn catalogue(&self) -> String {
        let (db, bao) = (self.db.port, self.bao.port());
        format!(
            r#"
[[target]]
name = "db"
kind = "postgres"
[target.settings]
host = "127.0.0.1"
port = {db}
user = "countersign"
password = "file:pg.password"
sslmode = "disable"
connection_group = "lease_conn"

[[target]]
name = "bao"
kind = "vault"
[target.settings]
address = "http://127.0.0.1:{bao}"
mint_deadline_secs = {BAO_MINT_SECS}
[target.settings.auth]
method = "jwt"
mint_role = "countersign-mint"
janitor_role = "countersign-janitor"
audience = "openbao"

[[resource]]
name = "postgres/notes"
target = "db"
title = "notes database"
environment = "sandbox"
isolated = true
sensitivity = "none"
settings = {{ database = "postgres" }}
[[resource.action]]
name = "read"
effect = "read"
settings = {{ groups = ["notes_read"] }}

[[resource]]
name = "bao/billing"
target = "bao"
title = "billing database (through OpenBao)"
environment = "sandbox"
isolated = true
sensitivity = "none"
action = [{{ name = "use", effect = "read" }}]
[resource.settings]
engine = "database"
path = "{CREDS}"
ttl_secs_max = 600
dedicated = true
revocation_cuts_sessions = true
postgres_target = "db"
username_prefix = "{USERS}"
"#
        )
    }

    /// Lets a broker, which is up, log in at OpenBao, as docs/vault.md writes it.
    pub async fn let_in(&self, serving: &Serving) {
        self.bao.log_in_by_broker(&serving.agent_url(), &serving.file("ca.pem"), "").await;
        self.bao.database(&self.db, ROLE, 600, USERS).await;
        let lines = |fence: &str| {
            doc(fence).lines().map(|l| l.replace("ROLE vault", "ROLE vault, countersign")).collect::<Vec<_>>()
        };
        self.bao.database_role(ROLE, 600, &lines("sql creation"), &lines("sql revocation")).await;
    }

    /// What of ours is there now.
    pub async fn look(&self) -> Seen {
        let sql = "SELECT rolname::text FROM pg_roles WHERE starts_with(rolname, $1) OR starts_with(rolname, $2)";
        let (rows, leases) = tokio::join!(self.admin.query(sql, &[&PREFIX, &USERS]), self.bao.leases(CREDS));
        let names = rows.unwrap().into_iter().map(|row| row.get::<_, String>(0)).filter(|name| name != LOOKALIKE);
        let (roles, users) = names.partition(|name| name.starts_with(PREFIX));
        let leases = leases.into_iter().map(|key| format!("{CREDS}/{key}")).collect();
        Seen { roles, users, leases }
    }

    /// Others come to the same targets: a login and a lookalike at PostgreSQL, a lease on the same mount of OpenBao.
    pub async fn others(&self) -> Others {
        let (user, password) = OTHER;
        let sql =
            format!("CREATE ROLE {user} LOGIN PASSWORD '{password}' IN ROLE notes_read; CREATE ROLE {LOOKALIKE} LOGIN");
        self.admin.batch_execute(&sql).await.unwrap();
        self.bao.database(&self.db, "reports", 7200, "rep_").await;
        let theirs = self.bao.ok("GET", "database/creds/reports", Value::Null).await;
        let text = |v: &Value| v.as_str().unwrap().to_owned();
        let (name, secret) = (text(&theirs["data"]["username"]), text(&theirs["data"]["password"]));
        Others {
            session: self.db.connect(user, password).await.unwrap(),
            lease: text(&theirs["lease_id"]),
            lease_session: self.db.connect(&name, &secret).await.unwrap(),
        }
    }

    /// What they noticed.
    pub async fn trouble_of(&self, others: &Others) -> Vec<&'static str> {
        let lookalike = format!("SELECT 1 FROM pg_roles WHERE rolname = '{LOOKALIKE}'");
        let checks = [
            (others.session.simple_query("SELECT 1").await.is_ok(), "somebody else's session was cut"),
            (self.db.connect(OTHER.0, OTHER.1).await.is_ok(), "somebody else can't log in"),
            (self.admin.query(&lookalike, &[]).await.unwrap().len() == 1, "a role that isn't ours is gone"),
            (self.bao.is_lease(&others.lease).await, "somebody else's lease at OpenBao was ended"),
            (
                others.lease_session.simple_query("SELECT 1").await.is_ok(),
                "the session of somebody else's lease was cut",
            ),
        ];
        checks.into_iter().filter(|(is_well, _)| !is_well).map(|(_, what)| what).collect()
    }

    /// A role as ours are, that no lease explains.
    pub async fn plant(&self, name: &str) {
        self.admin.batch_execute(&format!("CREATE ROLE {name} LOGIN")).await.unwrap();
    }
}
