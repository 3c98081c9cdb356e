//! Minting: a password and its verifier here, a role there, in one statement that leaves nothing if it fails.

use std::collections::BTreeMap;

use serde_json::json;
use tokio_postgres::error::SqlState;

use super::ending::handle;
use super::fail::Fail;
use super::op::Op;
use super::scram;
use super::shared::{EXCHANGE, MINT_SESSION, Shared};
use crate::connector::{Credential, MintError, Minted};
use crate::core::lease::LeaseIntent;

/// Longest life of a lease here, in seconds.
pub const LIFETIME_SECS_MAX: u64 = 7 * 24 * 3600;
/// Creates the lease's role.
pub async fn mint(core: &Shared, intent: &LeaseIntent) -> Result<Minted, MintError> {
    let refuse = |why: String| MintError::NotMinted { why, transient: false };
    let (resource, groups) = core.plan.groups(&intent.permission).map_err(|e| refuse(e.to_string()))?;
    if !is_ours(&intent.name, &core.plan.prefix) {
        return Err(refuse(format!("the lease's name must begin with {} and have only [a-z0-9_]", core.plan.prefix)));
    }
    if intent.lifetime_secs == 0 || intent.lifetime_secs > LIFETIME_SECS_MAX {
        return Err(refuse(format!("a lease lives 1 to {LIFETIME_SECS_MAX} seconds")));
    }
    let password = scram::draw_password().map_err(|e| refuse(e.to_string()))?;
    let verifier = scram::verifier(&password, core.plan.scram_iterations).map_err(|e| refuse(e.to_string()))?;
    let mut names: Vec<&str> = groups.iter().map(|g| g.as_str()).collect();
    names.push(core.plan.connection_group.as_str());
    let input = json!({
        "name": intent.name, "verifier": verifier, "lifetime_secs": intent.lifetime_secs,
        "connection_limit": core.plan.connection_limit, "groups": names,
    });

    // Nothing was sent yet.
    let not_reached = |e: Fail| MintError::NotMinted { transient: e.is_transient(), why: e.to_string() };
    // What couldn't be ended with the lock table full is not made.
    core.last.ready().await.map_err(not_reached)?;
    core.ends.warm().await.map_err(not_reached)?;
    let conn = core.mints.get_live(MINT_SESSION).await.map_err(not_reached)?;
    let created = Op::Mint.run(core.plan.setup, &conn, &input, EXCHANGE).await.map_err(|e| match e {
        // It isn't ours to hand out (its password is nobody's), but it is this lease's name: to be ended, not forgotten.
        Fail::Refused { ref code, .. } if *code == SqlState::DUPLICATE_OBJECT => {
            MintError::Unknown { why: format!("{e}; names are never reused"), handle: None }
        }
        Fail::Lost(_) => MintError::Unknown { why: e.to_string(), handle: None },
        // One statement, one transaction: the server's refusal means that nothing is there.
        Fail::Refused { .. } | Fail::Unreachable { .. } => not_reached(e),
    })?;
    let oid = created["oid"].as_u64().and_then(|oid| u32::try_from(oid).ok());
    let Some(oid) = oid.filter(|oid| *oid != 0) else {
        return Err(MintError::Unknown {
            why: "the target made the role and didn't say its OID".to_owned(),
            handle: None,
        });
    };

    let agent = &core.plan.agent;
    let mut public = BTreeMap::from([
        ("host".to_owned(), agent.host.clone()),
        ("port".to_owned(), agent.port.to_string()),
        ("dbname".to_owned(), resource.database.as_str().to_owned()),
        ("user".to_owned(), intent.name.clone()),
        ("sslmode".to_owned(), core.plan.sslmode.as_str().to_owned()),
    ]);
    if let Some(pem) = &core.plan.ca_pem {
        public.insert("sslrootcert_pem".to_owned(), pem.clone());
    }
    Ok(Minted {
        credential: Credential {
            kind: "postgres",
            public,
            secret: BTreeMap::from([("password".to_owned(), password)]),
        },
        handle: handle(oid),
        // The target counted from its own now, which was before this one.
        not_after: Some(core.clock.wall().plus_secs(intent.lifetime_secs)),
    })
}

/// Only names of this form are made or ended by this connector.
pub fn is_ours(name: &str, prefix: &str) -> bool {
    name.len() > prefix.len()
        && name.len() <= super::ident::IDENT_BYTES_MAX
        && name.starts_with(prefix)
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}
