//! What of ours is at the target, whatever the journal says: leases under dedicated roles, and users at the database
//! behind them. The broker ends what no lease explains.

use std::collections::BTreeMap;

use super::Inner;
use super::ending::{Looked, observation, retry};
use super::handle::VaultHandle;
use super::path::Engine;
use crate::connector::{Found, Gone, RevokeError, SweepError};
use crate::core::id::Timestamp;
use crate::core::lease::Evidence;

/// Most things that one sweep brings; the next one brings more.
const FOUND_MAX: usize = 50_000;

/// A user at the database behind, as that connector found it.
pub(super) struct User {
    /// Its name there, and that connector's handle.
    pub found: Found,
    /// When we first saw it (boot clock).
    first_seen_boot_ms: u64,
}

impl Inner {
    /// Lists each dedicated role once, whichever resources use it.
    pub(super) async fn sweep(&self) -> Result<Vec<Found>, SweepError> {
        self.look_at_tried_roles().await?;
        let ns = self.settings.namespace.as_deref();
        let roles: BTreeMap<&str, _> =
            self.minting.values().filter(|m| m.swept()).map(|m| (m.path.as_str(), m)).collect();
        let mut all = Vec::new();
        for minting in roles.into_values() {
            let place = VaultHandle::new(minting.settings.engine, minting.path.as_str(), minting.path.mount(), ns);
            for id in self.list(&place).await.map_err(|e| SweepError(e.to_string()))? {
                let handle = VaultHandle { lease_id: Some(id.clone()), ..place.clone() };
                all.push(Found { name: id, handle: handle.write() });
            }
            let Some(prefix) = minting.behind_prefix() else { continue };
            for User { found, .. } in self.users(prefix).await? {
                let handle = VaultHandle {
                    username: Some(found.name.clone()),
                    at_database: Some(found.handle),
                    ..place.clone()
                };
                all.push(Found { name: found.name, handle: handle.write() });
            }
        }
        all.truncate(FOUND_MAX);
        Ok(all)
    }

    /// The users behind with this prefix. Their ages begin with the first time that we see them: a database doesn't
    /// say when it made a role.
    pub(super) async fn users(&self, prefix: &str) -> Result<Vec<User>, SweepError> {
        let Some(behind) = &self.behind else {
            return Err(SweepError("the database behind is no longer configured".to_owned()));
        };
        let mut found = behind.sweep_prefix(prefix).await?;
        found.retain(|f| f.name.starts_with(prefix));
        let now = self.clock.boot_ms();
        let mut first = self.first_seen.lock();
        first.retain(|name, _| !name.starts_with(prefix) || found.iter().any(|f| f.name == *name));
        Ok(found
            .into_iter()
            .map(|found| User { first_seen_boot_ms: *first.entry(found.name.clone()).or_insert(now), found })
            .collect())
    }

    /// Drops a user that nothing explains, once it is older than any mint that is not recorded yet.
    pub(super) async fn end_user(&self, user: &User) -> Result<Gone, RevokeError> {
        let age_ms = self.clock.boot_ms().saturating_sub(user.first_seen_boot_ms);
        if u128::from(age_ms) < self.mint_deadline().as_millis() {
            return Err(retry("a user at the database may belong to a mint that is not recorded yet; looking again"));
        }
        let Some(behind) = &self.behind else { return Err(retry("the database behind is no longer configured")) };
        behind.revoke_found(&user.found, Timestamp(self.clock.wall().0)).await
    }

    /// Ends something that a sweep found and no lease explains: nothing younger than the longest mint, whose record may
    /// be under way.
    pub(super) async fn end_found(&self, found: &Found) -> Result<Gone, RevokeError> {
        let handle = VaultHandle::read(&found.handle).map_err(retry)?;
        if let (Some(name), Some(at_database)) = (&handle.username, &handle.at_database) {
            let first = *self.first_seen.lock().entry(name.clone()).or_insert_with(|| self.clock.boot_ms());
            let found = Found { name: name.clone(), handle: at_database.clone() };
            return self.end_user(&User { found, first_seen_boot_ms: first }).await;
        }
        let Some(id) = handle.lease_id.clone().filter(|_| handle.engine != Engine::Ssh) else {
            return Err(retry("the handle of what was found names nothing"));
        };
        let Looked::Live { age_secs, .. } = self.look(&handle, &id).await? else {
            // Listed a moment ago, gone now: it was seen.
            return Ok(gone(&id, "it was listed just before"));
        };
        if u64::try_from(age_secs).unwrap_or(0) < self.mint_deadline().as_secs() {
            return Err(retry("a lease may belong to a mint that is not recorded yet; looking again"));
        }
        self.end_lease(&handle, &id).await?;
        Ok(gone(&id, "it was live just before, and was revoked with sync"))
    }
}

fn gone(id: &str, how: &str) -> Gone {
    let detail = format!("sys/leases/lookup of {id} answers 400 invalid lease; {how}");
    Gone { evidence: Evidence::TargetSaysGone { detail }, seen: vec![observation("leases_revoked")], access_cut: None }
}
