//! What the journal keeps of a Vault credential: enough to end it after the catalogue entry is gone
//! (regression L3), and no secret.

use serde::{Deserialize, Serialize};

use super::path::Engine;
use crate::core::id::Timestamp;
use crate::core::lease::Handle;

/// The form of [`Handle`] that this connector writes and reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VaultHandle {
    /// Version of this form.
    pub v: u8,
    /// What made it.
    pub engine: Engine,
    /// The path that mints it.
    pub path: String,
    /// The engine's mount.
    pub mount: String,
    /// The namespace, if not the root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Accessor of the one token under which it was minted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accessor: Option<String>,
    /// When that log-in was made (wall clock): the mint began within `mint_deadline_secs` of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prepared_at: Option<Timestamp>,
    /// The longest it can live after the mint, in seconds, as the operator declared it.
    #[serde(default)]
    pub life_secs_max: u64,
    /// True if the role makes credentials for this broker alone and the target lists them.
    #[serde(default)]
    pub swept: bool,
    /// The role's user names begin so, and the broker can look at the database behind it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username_prefix: Option<String>,
    /// The target's lease.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_id: Option<String>,
    /// The database user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// The certificate's serial number (pki, ssh).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// The certificate itself (PEM), where the CA doesn't store it: its revocation needs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
    /// The SSH certificate's key id, which servers log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_id: Option<String>,
    /// When the certificate expires.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_after: Option<Timestamp>,
    /// Where the connector behind it found the database user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_database: Option<Handle>,
}

impl VaultHandle {
    /// A handle that says where, not yet what.
    pub(super) fn new(engine: Engine, path: &str, mount: &str, namespace: Option<&str>) -> Self {
        Self {
            v: 1,
            engine,
            path: path.to_owned(),
            mount: mount.to_owned(),
            namespace: namespace.map(str::to_owned),
            accessor: None,
            prepared_at: None,
            life_secs_max: 0,
            swept: false,
            username_prefix: None,
            lease_id: None,
            username: None,
            serial: None,
            certificate: None,
            key_id: None,
            not_after: None,
            at_database: None,
        }
    }

    /// Reads what an earlier version of this connector wrote.
    pub(super) fn read(handle: &Handle) -> Result<Self, String> {
        let read: Self = serde_json::from_value(handle.clone())
            .map_err(|e| format!("the handle in the journal can't be read by this version: {e}"))?;
        if read.v == 1 { Ok(read) } else { Err(format!("the handle in the journal is of version {}, not 1", read.v)) }
    }

    /// The journal's form.
    pub(super) fn write(&self) -> Handle {
        // A struct of strings and numbers: serialising it has no way to fail.
        serde_json::to_value(self).unwrap_or_default()
    }

    /// True once the target answered the mint: the handle names the very thing.
    pub(super) const fn names_it(&self) -> bool {
        self.lease_id.is_some() || self.serial.is_some()
    }

    /// See [`crate::connector::Connector::keys`].
    pub(super) fn keys(&self) -> Vec<String> {
        let user = self.username.as_ref().map(|u| format!("user:{u}"));
        self.lease_id.clone().into_iter().chain(user).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_round_trip_and_foreign_ones_are_refused() {
        let mut h = VaultHandle::new(Engine::Database, "database/creds/r", "database", Some("team"));
        assert!(!h.names_it());
        h.lease_id = Some("database/creds/r/x".into());
        h.username = Some("cs_a".into());
        assert_eq!(VaultHandle::read(&h.write()).unwrap(), h);
        assert_eq!(h.keys(), ["database/creds/r/x", "user:cs_a"]);
        assert!(VaultHandle::read(&serde_json::json!({"role": "x"})).is_err());
        h.v = 2;
        assert!(VaultHandle::read(&h.write()).unwrap_err().contains("version 2"));
    }
}
