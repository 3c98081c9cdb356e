//! Files → typed, checked configuration. Unknown keys are errors everywhere; secrets are references.
//!
//! [`Config`] is the broker's own file; [`Catalogue`] is the operator's list of what can be asked for.

pub mod algorithm;
pub mod catalogue;
mod check;
mod check_catalogue;
mod check_people;
pub mod claim_path;
pub mod directory;
pub mod load;
mod reader;
pub mod request;
pub mod secret_ref;
pub mod store;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use catalogue::{Action, Catalogue, Effect, Environment, Resource, Target};
pub use load::{ConfigError, Hashes, Loaded, Problem};
pub use secret_ref::SecretRef;
pub use store::StoreConfig;

use crate::core::id::{PersonId, TierName};
use crate::core::tier::Tier;
use crate::keys::NamePrefix;

/// The broker's own file, as written.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Who the broker is and where it keeps its data.
    pub broker: BrokerConfig,
    /// Where it listens.
    pub listen: ListenConfig,
    /// Where the record is kept.
    #[serde(default)]
    pub store: StoreConfig,
    /// Whom it believes, SPIFFE side.
    #[serde(default)]
    pub spiffe: Option<SpiffeConfig>,
    /// Whom it believes, OIDC side: issuers of agents' tokens.
    #[serde(default)]
    pub issuer: Vec<IssuerConfig>,
    /// Where reviewers log in.
    #[serde(default)]
    pub reviewer_login: Option<ReviewerLoginConfig>,
    /// The people directory.
    #[serde(default)]
    pub person: Vec<PersonConfig>,
    /// The agents directory.
    #[serde(default)]
    pub agent: Vec<AgentConfig>,
    /// The named levels of risk, mildest first: the order is the strictness.
    pub tier: Vec<Tier>,
    /// Named limits; each has a default.
    #[serde(default)]
    pub limits: Limits,
}

/// `[broker]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct BrokerConfig {
    /// `iss` of the tokens it mints and base URL of the agent API, for example `https://broker.corp:8443`.
    pub issuer: String,
    /// Base URL of the reviewer's pages.
    pub reviewer_url: String,
    /// The journal, the view and the keys live here. One process owns it.
    pub data_dir: PathBuf,
    /// The catalogue's file, relative to this one.
    pub catalogue: PathBuf,
    /// The folder of `*.cedar` policies, relative to this file.
    pub policies: PathBuf,
    /// What every name of this broker's begins with at the targets. A sweep ends what has a name of this form and no lease: two brokers
    /// at one target need two prefixes.
    #[serde(default)]
    pub name_prefix: NamePrefix,
    /// How far back "held within a window" looks for the combination rule, in seconds.
    #[serde(default = "default_window")]
    pub combination_window_secs: u64,
    /// How long a request may wait for its votes, in seconds.
    #[serde(default = "default_decide")]
    pub decide_within_secs: u64,
    /// How often the targets are swept for what no lease explains, in seconds.
    #[serde(default = "default_sweep")]
    pub sweep_every_secs: u64,
}

const fn default_window() -> u64 {
    24 * 3600
}
const fn default_decide() -> u64 {
    3600
}
const fn default_sweep() -> u64 {
    300
}

/// `[listen]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ListenConfig {
    /// Agent API (bearer identities).
    pub agent: SocketAddr,
    /// Agent API for X.509-SVIDs: client certificates are mandatory here.
    #[serde(default)]
    pub agent_mtls: Option<SocketAddr>,
    /// Reviewer API and pages.
    pub reviewer: SocketAddr,
    /// `/metrics`; none if absent.
    #[serde(default)]
    pub metrics: Option<SocketAddr>,
    /// The certificate chain (PEM) of the agent and reviewer listeners.
    #[serde(default)]
    pub tls_cert: Option<PathBuf>,
    /// Its private key (PEM).
    #[serde(default)]
    pub tls_key: Option<SecretRef>,
}

/// `[spiffe]`: the broker's own trust bundles. Never the system store.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SpiffeConfig {
    /// The Workload API, for example `unix:///run/spire/agent.sock`: bundles (and federated ones) come from there.
    #[serde(default)]
    pub workload_api: Option<String>,
    /// Trust domain → bundle file (SPIFFE bundle JSON, or PEM for X.509 only). Re-read when they change.
    #[serde(default)]
    pub bundles: BTreeMap<String, PathBuf>,
    /// Trust domains that agents may come from. A bundle alone admits nobody.
    pub trust_domains: Vec<String>,
    /// The one audience that JWT-SVIDs must carry, exactly.
    pub audience: String,
    /// The strictest tier that SPIFFE identities may reach; absent: all.
    #[serde(default)]
    pub tier_max: Option<TierName>,
}

/// What an issuer's tokens look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum IssuerPreset {
    /// GitHub Actions: `repository_id` or `repository_owner_id` must be pinned by a rule.
    GithubActions,
    /// GitLab CI: `project_id` or `namespace_id` must be pinned by a rule.
    Gitlab,
    /// A Kubernetes cluster's projected service-account tokens.
    Kubernetes,
    /// Any other OIDC issuer.
    Generic,
}

/// `[[issuer]]`: an OIDC issuer of agents' tokens.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct IssuerConfig {
    /// The exact `iss`.
    pub issuer: String,
    /// What its tokens look like.
    pub preset: IssuerPreset,
    /// The exact audience. A token with any other audience beside it is refused.
    pub audience: String,
    /// Signature algorithms; default `["RS256"]`. `none` and HMAC can't be named.
    #[serde(default = "default_algorithms")]
    pub algorithms: Vec<String>,
    /// A JWKS file; absent: discovery (`/.well-known/openid-configuration`).
    #[serde(default)]
    pub jwks_file: Option<PathBuf>,
    /// PEM of the CA that the issuer's HTTPS uses, if not a public one.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// Discovery may reach loopback and private addresses (an issuer inside the cluster). Off by default.
    #[serde(default)]
    pub allow_private_network: bool,
    /// Claim → the exact values of which one must match. All must hold.
    #[serde(default)]
    pub require: BTreeMap<String, Vec<String>>,
    /// Attribute name → claim path (`a.b.c`), beside those of the preset.
    #[serde(default)]
    pub attributes: BTreeMap<String, String>,
    /// Which claim says who launched the agent; the presets of GitHub and GitLab know it. That person can't vote on
    /// what the agent asks for (guarantee 6). A token without the claim is refused.
    #[serde(default)]
    pub launcher: Option<LauncherConfig>,
    /// The strictest tier that this issuer's identities may reach; absent: all.
    #[serde(default)]
    pub tier_max: Option<TierName>,
    /// Longest accepted life of a token (`exp − iat`), in seconds.
    #[serde(default = "default_token_life")]
    pub token_life_secs_max: u64,
}

/// `launcher` of an `[[issuer]]`: where a token names the person who launched the agent.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct LauncherConfig {
    /// Claim path (`a.b.c`) of an immutable id, never of a name that can be given to somebody else.
    pub claim: String,
    /// Whose id it is: the `issuer` that the person's identity has in the people directory. Absent: the token's own.
    #[serde(default)]
    pub issuer: Option<String>,
}

fn default_algorithms() -> Vec<String> {
    vec!["RS256".to_owned()]
}
const fn default_token_life() -> u64 {
    24 * 3600
}

/// `[reviewer_login]`: OIDC code flow + PKCE.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ReviewerLoginConfig {
    /// The exact issuer; its metadata is discovered.
    pub issuer: String,
    /// The client registered there.
    pub client_id: String,
    /// The client's secret; absent for a public client (PKCE alone).
    #[serde(default)]
    pub client_secret: Option<SecretRef>,
    /// Scopes beside `openid`.
    #[serde(default)]
    pub scopes: Vec<String>,
    /// Claim that holds groups, if groups come from the IdP.
    #[serde(default)]
    pub groups_claim: Option<String>,
    /// How long groups from claims count, in seconds.
    #[serde(default = "default_groups_age")]
    pub groups_age_secs_max: u64,
    /// Signature algorithms of ID tokens; default `["RS256"]`.
    #[serde(default = "default_algorithms")]
    pub algorithms: Vec<String>,
    /// PEM of the CA that the IdP's HTTPS uses, if not a public one.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// Discovery may reach loopback and private addresses. Off by default.
    #[serde(default)]
    pub allow_private_network: bool,
    /// A session without a request for so long ends, in seconds.
    #[serde(default = "default_idle")]
    pub session_idle_secs_max: u64,
    /// A session ends after so long whatever happens, in seconds.
    #[serde(default = "default_absolute")]
    pub session_secs_max: u64,
}

const fn default_groups_age() -> u64 {
    12 * 3600
}
const fn default_idle() -> u64 {
    30 * 60
}
const fn default_absolute() -> u64 {
    12 * 3600
}

/// `[[person]]`: a human, joined to IdP identities by issuer + immutable subject.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PersonConfig {
    /// The key used in votes, policies and the record.
    pub id: PersonId,
    /// As it is shown.
    pub name: String,
    /// Groups given here.
    #[serde(default)]
    pub groups: Vec<String>,
    /// Accounts. E-mail alone never matches.
    #[serde(default)]
    pub identities: Vec<PersonIdentity>,
}

/// One account of a person: where they log in, or where the agents come from that they launch.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PersonIdentity {
    /// The IdP's exact issuer.
    pub issuer: String,
    /// The immutable subject there.
    pub subject: String,
}

/// `[[agent]]`: identity pattern → who answers for it. First match wins.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// An exact identity (`spiffe://…` or `issuer#subject`), or one ending in `*`, which matches the rest.
    #[serde(rename = "match")]
    pub pattern: String,
    /// The person who answers for it.
    pub owner: PersonId,
    /// The team, for policies.
    #[serde(default)]
    pub team: Option<String>,
    /// Groups, for policies.
    #[serde(default)]
    pub groups: Vec<String>,
    /// How reviewers see it; default: the last part of the identity.
    #[serde(default)]
    pub name: Option<String>,
    /// Identities (patterns) to which this agent may hand parts of its grants.
    #[serde(default)]
    pub may_delegate_to: Vec<String>,
}

/// `[limits]`: each has a name, a default and a test.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Request body, in bytes.
    pub body_bytes_max: usize,
    /// Nesting of JSON.
    pub json_depth_max: usize,
    /// All headers of a request, in bytes.
    pub header_bytes_max: usize,
    /// Requests waiting for votes, per agent.
    pub pending_per_agent_max: usize,
    /// Grants that are not final, per agent.
    pub open_grants_per_agent_max: usize,
    /// Requests per second, per agent, sustained.
    pub requests_per_agent_per_sec: u32,
    /// Requests at once above the sustained rate, per agent.
    pub requests_per_agent_burst: u32,
    /// Requests per second of one resource server at `/introspect`, sustained. Its own count: see above for agents.
    pub introspections_per_sec: u32,
    /// Introspections at once above the sustained rate.
    pub introspections_burst: u32,
    /// Logins of a command line that wait for their person, per address.
    pub cli_logins_per_address_max: usize,
    /// Connections, per listener.
    pub connections_max: usize,
    /// A TLS handshake, in milliseconds.
    pub handshake_ms_max: u64,
    /// Connections of one address (of one /64 with IPv6), per listener. Behind a load balancer that hides who
    /// connects, as many as `connections_max`.
    pub connections_per_address_max: usize,
    /// Until a new connection's first request is read, in milliseconds.
    pub header_read_ms_max: u64,
    /// Reading a request's body, in milliseconds.
    pub body_read_ms_max: u64,
    /// A connection without a request in flight, after its first one, in milliseconds.
    pub idle_ms_max: u64,
    /// A long poll, in seconds.
    pub wait_secs_max: u64,
    /// Depth of a delegation chain.
    pub delegation_depth_max: usize,
    /// Invocations recorded under one grant.
    pub invocations_per_grant_max: usize,
    /// Length of the agent's own text, in characters.
    pub intent_chars_max: usize,
    /// Refusals of one agent, or of one person's votes, that are journaled one by one, per minute; more are counted together.
    pub refusals_per_agent_per_min: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes_max: 64 * 1024,
            json_depth_max: 16,
            header_bytes_max: 32 * 1024,
            pending_per_agent_max: 20,
            open_grants_per_agent_max: 200,
            requests_per_agent_per_sec: 50,
            requests_per_agent_burst: 100,
            introspections_per_sec: 1_000,
            introspections_burst: 2_000,
            cli_logins_per_address_max: 20,
            connections_max: 4096,
            connections_per_address_max: 512,
            handshake_ms_max: 5_000,
            header_read_ms_max: 10_000,
            body_read_ms_max: 10_000,
            idle_ms_max: 60_000,
            wait_secs_max: 60,
            delegation_depth_max: 5,
            invocations_per_grant_max: 1_000,
            intent_chars_max: 500,
            refusals_per_agent_per_min: 30,
        }
    }
}
