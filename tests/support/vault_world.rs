//! What the vault tests share: a signer, catalogue entries, leases, and the database behind.
#![allow(dead_code)] // each test file uses a part

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use countersign::config::{Problem, Resource, Target};
use countersign::connector::vault::{AssertionSigner, VaultConnector};
use countersign::connector::{
    Away, Connector, Extent, Found, Gap, Gone, MintContext, MintError, Minted, Revocability, RevokeError, SweepError,
};
use countersign::core::id::{GrantId, LeaseId, Timestamp};
use countersign::core::lease::{Evidence, Handle, Lease, LeaseIntent, LeaseState, Progress};
use countersign::core::permission::{Constraint, Permission};
use countersign::core::secret::Secret;
use countersign::time::{Clock, SystemClock};
use serde_json::{Map, Value, json};

use crate::openbao::{OpenBao, Postgres};

pub const ISSUER: &str = "https://broker.test/assertions";

/// ES256 by a key of its own.
pub struct Es256 {
    key: jsonwebtoken::EncodingKey,
    pub public_pem: String,
    pub issuer: String,
}

impl Es256 {
    pub fn new(issuer: &str) -> Self {
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let key = jsonwebtoken::EncodingKey::from_ec_pem(pair.serialize_pem().as_bytes()).unwrap();
        Self { key, public_pem: pair.public_key_pem(), issuer: issuer.to_owned() }
    }
}

impl AssertionSigner for Es256 {
    fn sign(&self, audience: &str, subject: &str, mut extra: Map<String, Value>, life: u64) -> Result<Secret, String> {
        let now = SystemClock.wall().secs();
        let own =
            json!({ "iss": self.issuer, "aud": audience, "sub": subject, "iat": now, "nbf": now, "exp": now + life });
        extra.extend(own.as_object().unwrap().clone());
        let header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::ES256);
        jsonwebtoken::encode(&header, &extra, &self.key).map(Secret::new).map_err(|e| e.to_string())
    }
}

/// The machine's clocks, of which the boot clock can be moved on.
#[derive(Default)]
pub struct TestClock {
    pub ahead_ms: AtomicU64,
}

impl Clock for TestClock {
    fn wall(&self) -> Timestamp {
        SystemClock.wall()
    }
    fn boot_ms(&self) -> u64 {
        SystemClock.boot_ms() + self.ahead_ms.load(Ordering::SeqCst)
    }
    fn boot_id(&self) -> String {
        SystemClock.boot_id()
    }
    fn sleep(&self, d: Duration) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        SystemClock.sleep(d)
    }
}

/// Parts of the target's settings that a test changes.
pub struct Setup<'a> {
    pub address: String,
    pub more_target: &'a str,
    pub resources: Vec<String>,
    pub signer: Arc<dyn AssertionSigner>,
    pub behind: Option<Arc<dyn Connector>>,
}

pub fn target(address: &str, more: &str) -> Target {
    toml::from_str(&format!(
        "name = \"bao\"\nkind = \"vault\"\n[settings]\naddress = \"{address}\"\nmint_deadline_secs = 2\n{more}\n\
         [settings.auth]\nmethod = \"jwt\"\nmint_role = \"countersign-mint\"\njanitor_role = \"countersign-janitor\"\naudience = \"openbao\"\n"
    ))
    .unwrap()
}

/// A resource `name` with these settings and constraints (TOML).
pub fn resource(name: &str, settings: &str, constraints: &str) -> Resource {
    toml::from_str(&format!(
        "name = \"{name}\"\ntarget = \"bao\"\ntitle = \"t\"\nenvironment = \"sandbox\"\nsensitivity = \"none\"\n\
         action = [{{ name = \"use\", effect = \"read\" }}]\n{constraints}\n[settings]\n{settings}\n"
    ))
    .unwrap()
}

pub fn connect(
    target: &Target,
    resources: &[Resource],
    signer: &Arc<Es256>,
    clock: &Arc<TestClock>,
    behind: Option<Arc<dyn Connector>>,
) -> Result<VaultConnector, Vec<Problem>> {
    let all: Vec<&Resource> = resources.iter().collect();
    VaultConnector::new(target, &all, Path::new("."), signer.clone(), clock.clone(), behind)
}

pub const BILLING: &str =
    "engine = \"database\"\npath = \"database/creds/billing-ro\"\nttl_secs_max = 600\ndedicated = true";

/// The usual: one OpenBao with the log-in of the docs, one PostgreSQL, one role.
pub struct World {
    pub bao: OpenBao,
    pub db: Postgres,
    pub signer: Arc<Es256>,
    pub clock: Arc<TestClock>,
}

impl World {
    pub async fn start(test: &str) -> Option<Self> {
        let bao = OpenBao::start(test, 2).await?;
        let db = Postgres::start(test).await?;
        let signer = Arc::new(Es256::new(ISSUER));
        bao.log_in_by(&signer.public_pem, ISSUER, "", "").await;
        bao.database(&db, "billing-ro", 600, "csv_").await;
        Some(Self { bao, db, signer, clock: Arc::default() })
    }

    /// A connector on the one database resource, `more` added to its settings.
    pub fn billing(&self, more: &str, behind: Option<Arc<dyn Connector>>) -> VaultConnector {
        let resources = [resource("bao/billing", &format!("{BILLING}\n{more}"), "")];
        connect(&target(&self.bao.address(), ""), &resources, &self.signer, &self.clock, behind).unwrap()
    }

    /// Like `billing`, with the database behind.
    pub fn billing_behind(&self) -> VaultConnector {
        let behind = Arc::new(Behind { port: self.db.port });
        self.billing("postgres_target = \"pg/billing\"\nusername_prefix = \"csv_\"", Some(behind))
    }
}

static NEXT: AtomicU64 = AtomicU64::new(1);

/// An intent on `resource`, made `age_secs` ago.
pub fn intent(resource: &str, constraints: &[(&str, Constraint)], lifetime_secs: u64, age_secs: u64) -> LeaseIntent {
    let n = NEXT.fetch_add(1, Ordering::SeqCst);
    let mut bytes = [0u8; 16];
    bytes[8..].copy_from_slice(&n.to_be_bytes());
    LeaseIntent {
        lease: LeaseId::from_bytes(bytes),
        grant: GrantId::from_bytes(bytes),
        name: format!("cs_{n:08x}"),
        target: "bao".parse().unwrap(),
        permission: Permission {
            resource: resource.parse().unwrap(),
            actions: BTreeSet::from(["use".parse().unwrap()]),
            constraints: constraints.iter().map(|(k, v)| (k.parse().unwrap(), v.clone())).collect::<BTreeMap<_, _>>(),
        },
        intended_at: Timestamp(SystemClock.wall().0 - age_secs * 1000),
        lifetime_secs,
    }
}

pub fn context() -> MintContext {
    MintContext {
        agent: "spiffe://corp/agent".parse().unwrap(),
        owner: None,
        task: "T-1".parse().unwrap(),
        approvers: Vec::new(),
        chain: Vec::new(),
        confirmation: None,
        wall_now: SystemClock.wall(),
    }
}

pub fn now() -> Timestamp {
    SystemClock.wall()
}

/// Prepares and mints, as the broker does.
pub async fn mint(connector: &VaultConnector, intent: &LeaseIntent) -> Result<Minted, MintError> {
    let handle = connector.prepare(intent).await?.expect("a vault mint has a handle beforehand");
    connector.mint(intent, Some(&handle), &context()).await
}

/// The lease of a mint that succeeded.
pub fn live(intent: &LeaseIntent, minted: &Minted) -> Lease {
    let since = intent.intended_at;
    Lease {
        intent: intent.clone(),
        handle: Some(minted.handle.clone()),
        not_after: minted.not_after,
        state: LeaseState::Live { since, released_at: None },
    }
}

/// The lease of a mint whose answer was lost.
pub fn unknown(intent: &LeaseIntent, handle: Option<Handle>) -> Lease {
    let state = LeaseState::Unknown {
        since: intent.intended_at,
        why: "the broker died".to_owned(),
        not_before: Timestamp(0),
        progress: Progress::default(),
    };
    Lease { intent: intent.clone(), handle, not_after: None, state }
}

/// Calls until there is evidence, as the broker does; every failure on the way must be `Retry`.
pub async fn until_gone<F: Future<Output = Result<Gone, RevokeError>>>(
    what: &str,
    mut call: impl FnMut() -> F,
) -> Gone {
    let start = Instant::now();
    loop {
        match call().await {
            Ok(gone) => return gone,
            Err(RevokeError::Retry { why }) => assert!(start.elapsed() < Duration::from_mins(1), "{what}: {why}"),
            Err(e) => panic!("{what}: {e}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

pub fn said(gone: &Gone) -> &str {
    match &gone.evidence {
        Evidence::TargetSaysGone { detail } => detail,
        other => panic!("not said by the target: {other:?}"),
    }
}

/// The database behind: finds and drops roles by an admin's connection, as the PostgreSQL connector does by its own.
pub struct Behind {
    pub port: u16,
}

impl Behind {
    async fn admin(&self) -> Result<tokio_postgres::Client, SweepError> {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(self.port).user("admin").password("admin").dbname("postgres");
        let (client, connection) =
            config.connect(tokio_postgres::NoTls).await.map_err(|e| SweepError(e.to_string()))?;
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(client)
    }
}

#[async_trait]
impl Connector for Behind {
    fn kind(&self) -> &'static str {
        "postgres"
    }
    fn revocability(&self, _: &Permission, _: u64) -> Revocability {
        unreachable!("only sweeps")
    }
    fn fingerprint(&self, _: &Permission) -> Value {
        unreachable!("only sweeps")
    }
    async fn mint(&self, _: &LeaseIntent, _: Option<&Handle>, _: &MintContext) -> Result<Minted, MintError> {
        unreachable!("only sweeps")
    }
    fn mint_deadline(&self) -> Duration {
        Duration::from_secs(1)
    }
    async fn revoke(&self, _: &Lease, _: Timestamp) -> Result<Gone, RevokeError> {
        unreachable!("only sweeps")
    }
    async fn probe(&self) -> Result<(), Away> {
        self.admin().await.map(drop).map_err(|e| Away { why: e.0, extent: Extent::Silent })
    }
    async fn sweep(&self) -> Result<Vec<Found>, SweepError> {
        unreachable!("only by prefix")
    }
    async fn sweep_prefix(&self, prefix: &str) -> Result<Vec<Found>, SweepError> {
        let rows = self
            .admin()
            .await?
            .query("SELECT rolname::text, oid FROM pg_roles WHERE starts_with(rolname::text, $1)", &[&prefix])
            .await
            .map_err(|e| SweepError(e.to_string()))?;
        Ok(rows
            .iter()
            .map(|r| Found {
                name: r.get(0),
                handle: json!({ "role": r.get::<_, String>(0), "oid": r.get::<_, u32>(1) }),
            })
            .collect())
    }
    async fn revoke_found(&self, found: &Found, _: Timestamp) -> Result<Gone, RevokeError> {
        let retry = |why: String| RevokeError::Retry { why };
        let admin = self.admin().await.map_err(|e| retry(e.0))?;
        let oid = u32::try_from(found.handle["oid"].as_u64().unwrap()).unwrap();
        let gone = |detail: &str| Gone {
            evidence: Evidence::TargetSaysGone { detail: detail.into() },
            seen: vec![],
            access_cut: None,
        };
        let left =
            admin.query("SELECT 1 FROM pg_roles WHERE oid = $1", &[&oid]).await.map_err(|e| retry(e.to_string()))?;
        if left.is_empty() {
            return Ok(gone("no role has the OID"));
        }
        let sql = format!("DROP OWNED BY \"{0}\" CASCADE; DROP ROLE \"{0}\"", found.name);
        admin.batch_execute(&sql).await.map_err(|e| retry(e.to_string()))?;
        Ok(gone("dropped"))
    }
    async fn check(&self) -> Result<Vec<Gap>, SweepError> {
        unreachable!("only sweeps")
    }
}
