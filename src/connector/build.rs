//! The connectors that a configuration names, each with what it needs. `serve`, `dev` and `config check` all build
//! them here, so that what was checked is what is served.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::Connector;
use super::postgres::PostgresConnector;
use super::token::TokenConnector;
use super::vault::{AssertionSigner, VaultConnector};
use crate::config::{Loaded, Problem, Resource, Target};
use crate::core::id::ResourceName;
use crate::core::secret::Secret;
use crate::keys::{Assertion, Keys, NamePrefix, SigningKeys};
use crate::time::Clock;

/// The kinds of targets that there are.
pub const KINDS: [&str; 3] = ["postgres", "token", "vault"];

/// Target → its connector, for every target of the catalogue; or everything that is wrong, in one pass. Connects to nothing.
pub fn connectors(
    loaded: &Loaded,
    keys: &Keys,
    clock: Arc<dyn Clock>,
    prefix: &NamePrefix,
) -> Result<BTreeMap<ResourceName, Arc<dyn Connector>>, Vec<Problem>> {
    let mut out: BTreeMap<ResourceName, Arc<dyn Connector>> = BTreeMap::new();
    let mut problems = Vec::new();
    let issuer = &loaded.config.broker.issuer;
    let signer: Arc<dyn AssertionSigner> = Arc::new(Assertions {
        issuer: assertion_issuer(issuer),
        keys: Arc::clone(&keys.assertions),
        clock: Arc::clone(&clock),
    });
    // A name is the prefix, `_` and a hash: a sweep that looked for less would find other people's.
    let names = format!("{}_", prefix.as_str());
    // Vault targets come last: one may need the `postgres` target whose users it makes.
    let (vaults, others): (Vec<&Target>, Vec<&Target>) =
        loaded.catalogue.target.iter().partition(|t| t.kind == "vault");
    for target in others.into_iter().chain(vaults) {
        let resources = minted_at(loaded, target);
        let base = &loaded.base;
        let built: Result<Arc<dyn Connector>, Vec<Problem>> = match target.kind.as_str() {
            "postgres" => {
                PostgresConnector::new(target, &resources, base, Arc::clone(&clock), &names).map(|c| Arc::new(c) as _)
            }
            "token" => {
                TokenConnector::new(target, &resources, issuer, Arc::clone(&keys.tokens)).map(|c| Arc::new(c) as _)
            }
            "vault" => match behind(loaded, &resources, &out) {
                // That target's own problems are told already.
                Behind::Broken => Err(VaultConnector::problems(target, &resources, base)),
                Behind::None => vault(target, &resources, base, &signer, &clock, None),
                Behind::Built(c) => match c.ends_by_prefix() {
                    Ok(()) => vault(target, &resources, base, &signer, &clock, Some(c)),
                    Err(what) => {
                        let place = format!("target {}, postgres_target", target.name);
                        let mut all = VaultConnector::problems(target, &resources, base);
                        all.push(Problem { place, what });
                        Err(all)
                    }
                },
            },
            other => Err(vec![Problem {
                place: format!("target {}", target.name),
                what: format!(
                    "there is no connector of kind `{}`; there are: {}",
                    other.escape_debug(),
                    KINDS.join(", ")
                ),
            }]),
        };
        match built {
            Ok(connector) => {
                out.insert(target.name.clone(), connector);
            }
            Err(more) => problems.extend(more),
        }
    }
    if problems.is_empty() { Ok(out) } else { Err(problems) }
}

/// `iss` of the assertions by which the broker logs in at targets: apart from that of the tokens that it mints.
pub fn assertion_issuer(issuer: &str) -> String {
    format!("{}/assertions", issuer.trim_end_matches('/'))
}

fn minted_at<'a>(loaded: &'a Loaded, target: &Target) -> Vec<&'a Resource> {
    loaded.catalogue.resource.iter().filter(|r| r.target == target.name).collect()
}

fn vault(
    target: &Target,
    resources: &[&Resource],
    base: &std::path::Path,
    signer: &Arc<dyn AssertionSigner>,
    clock: &Arc<dyn Clock>,
    behind: Option<Arc<dyn Connector>>,
) -> Result<Arc<dyn Connector>, Vec<Problem>> {
    VaultConnector::new(target, resources, base, Arc::clone(signer), Arc::clone(clock), behind)
        .map(|c| Arc::new(c) as _)
}

enum Behind {
    None,
    Built(Arc<dyn Connector>),
    Broken,
}

/// The `postgres` target whose users a Vault makes, as its resources name it. That they name one at most, and one
/// that exists, the connector checks.
fn behind(loaded: &Loaded, resources: &[&Resource], built: &BTreeMap<ResourceName, Arc<dyn Connector>>) -> Behind {
    let named = resources.iter().find_map(|r| r.settings.get("postgres_target")?.as_str());
    let target = named.and_then(|name| loaded.catalogue.target.iter().find(|t| t.name.as_str() == name));
    match target {
        Some(target) if target.kind == "postgres" => {
            built.get(&target.name).map_or(Behind::Broken, |c| Behind::Built(Arc::clone(c)))
        }
        _ => Behind::None,
    }
}

/// Assertions signed by the broker's own keys.
struct Assertions {
    issuer: String,
    keys: Arc<SigningKeys>,
    clock: Arc<dyn Clock>,
}

impl AssertionSigner for Assertions {
    fn sign(&self, audience: &str, subject: &str, extra: Map<String, Value>, life_secs: u64) -> Result<Secret, String> {
        let assertion = Assertion { issuer: &self.issuer, subject, audience, extra, life_secs };
        self.keys.assertion(&assertion, self.clock.wall()).map_err(|e| e.to_string())
    }
}
