//! A full configuration in a folder: the shipped policies, people, agents, tiers, a catalogue with tokens and PostgreSQL.

#[allow(clippy::duplicate_mod)] // tests that have both kinds of broker
#[path = "../free_ports.rs"]
mod free_ports;

use std::path::Path;

use countersign::identity::dev_authority::DevAuthority;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair};

use free_ports::free_ports;

use super::oidc_provider::CLIENT;
use super::{DOMAIN, Plan, target};

/// Loopback ports of one broker.
#[derive(Clone, Copy, Debug)]
pub struct Ports {
    pub agent: u16,
    pub mtls: u16,
    pub reviewer: u16,
    pub metrics: u16,
}

impl Ports {
    pub fn free() -> Self {
        let [agent, mtls, reviewer, metrics] = free_ports();
        Self { agent, mtls, reviewer, metrics }
    }
    pub fn agent_url(&self) -> String {
        format!("https://localhost:{}", self.agent)
    }
    pub fn mtls_url(&self) -> String {
        format!("https://localhost:{}", self.mtls)
    }
    pub fn reviewer_url(&self) -> String {
        format!("https://localhost:{}", self.reviewer)
    }
}

pub fn write(folder: &Path, ports: &Ports, authority: &DevAuthority, idp: &str, pg: Option<u16>, plan: &Plan) {
    let put = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
    let policies = folder.join("policies");
    std::fs::create_dir(&policies).unwrap();
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/policies");
    for entry in std::fs::read_dir(shipped).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "cedar") {
            std::fs::copy(&path, policies.join(path.file_name().unwrap())).unwrap();
        }
    }
    certificates(&put);
    put("bundle.json", &authority.bundle_document());
    put("login.secret", CLIENT.1);
    put("pg.password", target::PASSWORD);
    put("countersign.toml", &main(ports, idp, plan));
    let mut catalogue = CATALOGUE.to_owned();
    if let Some(port) = pg {
        catalogue.push_str(&POSTGRES.replace("@PORT@", &port.to_string()));
    }
    put("catalogue.toml", &catalogue);
}

/// A CA, and the broker's certificate by it.
fn certificates(put: &dyn Fn(&str, &str)) {
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.distinguished_name.push(DnType::CommonName, "a company's CA");
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
    let mut own = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
    own.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    own.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate().unwrap();
    put("ca.pem", &ca.pem());
    put("broker.pem", &own.signed_by(&key, &ca).unwrap().pem());
    put("broker.key", &key.serialize_pem());
}

fn main(ports: &Ports, idp: &str, plan: &Plan) -> String {
    let Ports { agent, mtls, reviewer, metrics } = ports;
    let (agent_url, reviewer_url) = (ports.agent_url(), ports.reviewer_url());
    let persons: String = [
        // Two accounts of one person.
        ("ana", "[\"reviewers\", \"db-owners\"]", vec!["ana", "ana-second"]),
        ("ben", "[\"reviewers\", \"db-owners\"]", vec!["ben"]),
        ("chen", "[\"security\", \"auditors\", \"operators\"]", vec!["chen"]),
        // Owners of agents. By her groups alone, dora could approve everything.
        ("dora", "[\"reviewers\", \"db-owners\", \"security\"]", vec!["dora", "dora-second"]),
        ("eve", "[]", vec!["eve"]),
        // Sees, and may not approve.
        ("otto", "[\"operators\"]", vec!["otto"]),
    ]
    .into_iter()
    .map(|(id, groups, accounts)| {
        let identities: Vec<String> =
            accounts.iter().map(|a| format!("{{ issuer = \"{idp}\", subject = \"{a}\" }}")).collect();
        format!(
            "[[person]]\nid = \"{id}\"\nname = \"{id}\"\ngroups = {groups}\nidentities = [{}]\n",
            identities.join(", ")
        )
    })
    .collect();
    format!(
        r#"[broker]
issuer = "{agent_url}"
reviewer_url = "{reviewer_url}"
data_dir = "data"
catalogue = "catalogue.toml"
policies = "policies"
{broker}

[listen]
agent = "127.0.0.1:{agent}"
agent_mtls = "127.0.0.1:{mtls}"
reviewer = "127.0.0.1:{reviewer}"
metrics = "127.0.0.1:{metrics}"
tls_cert = "broker.pem"
tls_key = "file:broker.key"

[spiffe]
bundles = {{ "{DOMAIN}" = "bundle.json" }}
trust_domains = ["{DOMAIN}"]
audience = "{agent_url}"

[reviewer_login]
issuer = "{idp}"
client_id = "{client}"
client_secret = "file:login.secret"
allow_private_network = true

{persons}
[[agent]]
match = "spiffe://{DOMAIN}/agent/ops"
owner = "dora"
team = "platform"
may_delegate_to = ["spiffe://{DOMAIN}/agent/helper"]

[[agent]]
match = "spiffe://{DOMAIN}/agent/helper"
owner = "ben"
team = "platform"

[[agent]]
match = "spiffe://{DOMAIN}/agent/ops-two"
owner = "dora"

[[agent]]
match = "spiffe://{DOMAIN}/agent/*"
owner = "eve"

[[tier]]
name = "observe"
approvals = 0
life_secs_max = 3600
friction = "none"

[[tier]]
name = "export"
approvals = 1
life_secs_max = 3600
friction = "one"

[[tier]]
name = "change"
approvals = 1
life_secs_max = 900
friction = "high"

[[tier]]
name = "critical"
approvals = 2
life_secs_max = 900
friction = "critical"

[limits]
{limits}
"#,
        broker = plan.broker,
        limits = plan.limits,
        client = CLIENT.0,
    )
}

const CATALOGUE: &str = r#"
[[environment]]
name = "sandbox"
reaches_production = false

[[environment]]
name = "prod"
reaches_production = true

[[target]]
name = "tokens"
kind = "token"
settings = { life_secs_max = 900, skew_secs = 1 }

[[resource]]
name = "api/notes"
target = "tokens"
title = "notes (sandbox copy)"
environment = "sandbox"
isolated = true
sensitivity = "none"
settings = { audience = "https://notes.test", checks = "introspection", resource_server = "spiffe://corp.test/agent/notes-api" }
[[resource.action]]
name = "read"
effect = "read"

[[resource]]
name = "api/customers"
target = "tokens"
title = "customers"
environment = "prod"
sensitivity = "customer"
labels = ["customer-data"]
settings = { audience = "https://customers.test", checks = "introspection", resource_server = "spiffe://corp.test/agent/customers-api" }
[[resource.action]]
name = "read"
effect = "read"
[[resource.action]]
name = "write"
effect = "write"
reversible = true
[[resource.action]]
name = "purge"
effect = "delete"

[[resource]]
name = "api/webhooks"
target = "tokens"
title = "outgoing webhooks"
environment = "prod"
sensitivity = "internal"
labels = ["outside"]
settings = { audience = "https://hooks.test", checks = "offline", life_secs_max = 300, enforces = ["paths", "calls"] }
[resource.constraint.paths]
kind = "paths"
values = ["/partners/", "/status"]
[resource.constraint.calls]
kind = "max"
max = 100
[[resource.action]]
name = "post"
effect = "export"
"#;

const POSTGRES: &str = r#"
[[target]]
name = "db"
kind = "postgres"
[target.settings]
host = "127.0.0.1"
port = @PORT@
dbname = "app"
user = "countersign"
password = "file:pg.password"
sslmode = "disable"
connection_group = "lease_conn"

[[resource]]
name = "postgres/sandbox"
target = "db"
title = "sandbox database"
environment = "sandbox"
isolated = true
sensitivity = "none"
settings = { database = "sandbox" }
[resource.constraint.tables]
kind = "set"
values = ["notes", "drafts"]
[[resource.action]]
name = "read"
effect = "read"
[resource.action.settings.tables]
notes = ["sandbox_notes_read"]
drafts = ["sandbox_drafts_read"]

[[resource]]
name = "postgres/app"
target = "db"
title = "app database"
environment = "prod"
sensitivity = "internal"
settings = { database = "app" }
[resource.constraint.tables]
kind = "set"
values = ["invoices", "customers"]
[[resource.action]]
name = "read"
effect = "read"
[resource.action.settings.tables]
invoices = ["app_invoices_read"]
customers = ["app_customers_read"]
[[resource.action]]
name = "write"
effect = "write"
reversible = true
[resource.action.settings.tables]
invoices = ["app_invoices_write"]
customers = ["app_customers_write"]
[[resource.action]]
name = "purge"
effect = "delete"
[resource.action.settings.tables]
invoices = ["app_invoices_purge"]
customers = ["app_customers_purge"]

# The operator lets leases make objects here: what they leave behind must be harmless (D3).
[[resource]]
name = "postgres/workshop"
target = "db"
title = "workshop schema"
environment = "prod"
sensitivity = "internal"
settings = { database = "app" }
[[resource.action]]
name = "build"
effect = "write"
reversible = true
settings = { groups = ["app_build"] }
"#;
