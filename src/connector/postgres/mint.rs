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
use crate::keys::{HASH_CHARS, is_name_hash};

/// Longest life of a lease here, in seconds.
pub const LIFETIME_SECS_MAX: u64 = 7 * 24 * 3600;
/// Creates the lease's role.
pub async fn mint(core: &Shared, intent: &LeaseIntent) -> Result<Minted, MintError> {
    let refuse = |why: String| MintError::NotMinted { why, transient: false };
    let (resource, groups) = core.plan.groups(&intent.permission).map_err(|e| refuse(e.to_string()))?;
    if !is_ours(&intent.name, &core.plan.prefix) {
        return Err(refuse(format!(
            "the lease's name must be {} and {HASH_CHARS} characters of [a-z2-7]",
            core.plan.prefix
        )));
    }
    if intent.lifetime_secs == 0 || intent.lifetime_secs > LIFETIME_SECS_MAX {
        return Err(refuse(format!("a lease lives 1 to {LIFETIME_SECS_MAX} seconds")));
    }
    let password = core.spares.take().await.map_err(|e| refuse(e.to_string()))?;
    let mut names: Vec<&str> = groups.iter().map(|g| g.as_str()).collect();
    names.push(core.plan.connection_group.as_str());
    let input = json!({
        "name": intent.name, "verifier": password.verifier, "lifetime_secs": intent.lifetime_secs,
        "connection_limit": core.plan.connection_limit, "groups": names,
    });

    // Nothing was sent yet.
    let not_reached = |e: Fail| MintError::NotMinted { transient: e.is_transient(), why: e.to_string() };
    // What couldn't be ended with the lock table full is not made.
    core.last.ready(MINT_SESSION).await.map_err(not_reached)?;
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
    // Made after the answer, so that a standby that is down delays no mint; only an ending needs it.
    core.lasts.iter().for_each(|last| last.soon(MINT_SESSION));
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
            secret: BTreeMap::from([("password".to_owned(), password.secret)]),
        },
        handle: handle(oid),
        // The target counted from its own now, which was before this one.
        not_after: Some(core.clock.wall().plus_secs(intent.lifetime_secs)),
    })
}

/// What comes after the prefix in the name of a way round (`reach.rs`), and then hex digits.
const WAY: &str = "reach_";
const WAY_HEX_CHARS: usize = 16;

/// A name for a way round, which nobody can guess.
pub fn draw_way(prefix: &str) -> Result<String, scram::NoRandomness> {
    Ok(format!("{prefix}{WAY}{}", scram::draw_tag()?))
}

/// A name of a lease's form that no lease has: for a mint that is taken back.
pub fn draw_lease(prefix: &str) -> Result<String, scram::NoRandomness> {
    // Its 16 hex digits use [0-9a-f]; what a name can't hold becomes something that it can.
    let tag: String = scram::draw_tag()?
        .bytes()
        .map(|b| char::from(if b.is_ascii_digit() { b'g' + (b - b'0') } else { b }))
        .collect();
    Ok(format!("{prefix}{tag:z<HASH_CHARS$}"))
}

/// Only names of exactly these forms are made or ended by this connector: a role of the operator's that happens to begin with the
/// prefix is none, and neither is one of another broker's whose prefix begins with this one's.
pub fn is_ours(name: &str, prefix: &str) -> bool {
    let is_way =
        |tag: &str| tag.len() == WAY_HEX_CHARS && tag.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    name.strip_prefix(prefix).is_some_and(|rest| is_name_hash(rest) || rest.strip_prefix(WAY).is_some_and(is_way))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{NameKey, NamePrefix};

    #[test]
    fn only_names_of_exactly_our_forms_are_ours() {
        let lease = NameKey::from_bytes(&[7; 32]).name(&NamePrefix::new("cs").unwrap(), &[b"a"]);
        let way = draw_way("cs_").unwrap();
        assert!(is_ours(&lease, "cs_") && is_ours(&way, "cs_"), "{lease} {way}");
        assert!(is_ours(&draw_lease("cs_").unwrap(), "cs_"));
        let (longer, shorter) = (format!("{lease}a"), &lease[..lease.len() - 1]);
        let other = NameKey::from_bytes(&[7; 32]).name(&NamePrefix::new("cs_b").unwrap(), &[b"a"]);
        let foreign =
            ["cs_owner", "cs_", "cs_reach_", "cs_reach_0123456789abcdeF", "postgres", &longer, shorter, &other];
        for name in foreign {
            assert!(!is_ours(name, "cs_"), "{name}");
        }
        assert!(is_ours(&other, "cs_b_"));
    }
}
