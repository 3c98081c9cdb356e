//! Ending what the target confirmed, and proving it (guarantees 4 and 5). Never `revoke-prefix` (it takes what others
//! made) and never `revoke-force` (it answers 204 while the user still exists).

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

use super::Inner;
use super::api::{Fault, Kind};
use super::handle::VaultHandle;
use super::path::{Engine, check_lease_id, check_serial};
use crate::connector::{Gone, Observation, RevokeError};
use crate::core::id::Timestamp;
use crate::core::lease::{Evidence, Lease};

/// How long a synchronous revocation may take: the role's statements may wait for sessions.
const SYNC_REVOKE_DEADLINE: Duration = Duration::from_mins(1);

/// A lease as the target shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Looked {
    /// It is there; so long ago it was made, in whole seconds on the target's own clock (never more than the truth),
    /// and so much of it is left (negative: it should have ended, and could not).
    Live { age_secs: i64, ttl_secs: i64 },
    /// Exactly 400 `invalid lease`.
    Gone,
}

/// How the end of a lease went.
pub(super) struct LeaseEnd {
    /// It was there when we came.
    pub was_live: bool,
    /// Its time had passed and the target had failed to end it.
    pub was_overdue: bool,
}

impl From<Fault> for RevokeError {
    fn from(fault: Fault) -> Self {
        let next = match fault.kind {
            Kind::PolicyDenied => "; give the janitor the policy of docs/vault.md",
            Kind::TokenRefused => "; the janitor's log-in is refused, see docs/vault.md",
            Kind::Empty | Kind::NotFound => "; is the namespace and the mount the one it was made in?",
            Kind::Sealed | Kind::NotInitialised => "; unseal the target",
            _ => "",
        };
        Self::Retry { why: format!("{fault}{next}") }
    }
}

pub(super) fn retry(why: impl Into<String>) -> RevokeError {
    RevokeError::Retry { why: why.into() }
}

impl Inner {
    /// Ends the lease. `known` explains other leases at this target; without it nothing is ended that this lease doesn't name.
    pub(super) async fn end(
        &self,
        lease: &Lease,
        known: Option<&BTreeSet<String>>,
        now: Timestamp,
    ) -> Result<Gone, RevokeError> {
        if self.under_way.lock().contains(&lease.intent.lease) {
            return Err(retry("its mint is still under way in this process; it is ended when that has come back"));
        }
        let Some(handle) = &lease.handle else {
            return Ok(Gone {
                evidence: Evidence::TargetSaysGone {
                    detail:
                        "nothing was asked of the target: a mint needs a log-in that is recorded first, and none was"
                            .to_owned(),
                },
                seen: Vec::new(),
                access_cut: None,
            });
        };
        let handle = VaultHandle::read(handle).map_err(retry)?;
        if handle.names_it() {
            self.end_named(&handle, now).await
        } else {
            self.recover(lease, &handle, known, now).await
        }
    }

    /// Ends what a mint's own answer named: it was seen live in this namespace then.
    async fn end_named(&self, handle: &VaultHandle, now: Timestamp) -> Result<Gone, RevokeError> {
        let started = self.clock.boot_ms();
        let mut seen = Vec::new();
        let mut said = Vec::new();
        let mut cut = None;
        let certificate = handle.serial.as_ref().filter(|_| handle.engine == Engine::Pki);
        if let Some(id) = &handle.lease_id {
            match self.end_lease(handle, id).await {
                Ok(end) => {
                    cut = Some(Duration::from_millis(self.clock.boot_ms().saturating_sub(started)));
                    seen.push(observation(if end.was_live { "leases_revoked" } else { "leases_already_gone" }));
                    if end.was_overdue {
                        seen.push(observation("leases_overdue"));
                    }
                    said.push(format!(
                        "sys/leases/lookup of {id} answers 400 invalid lease; {}",
                        if end.was_live {
                            "it was live just before, and was revoked with sync"
                        } else {
                            "it was live when minted, and had ended before this call"
                        }
                    ));
                }
                // A certificate is ended at its CA whatever becomes of its lease, which is only the target's own reminder
                // to do that, and ends with the token.
                Err(error) if certificate.is_some() => {
                    seen.push(observation("leases_left_to_their_token"));
                    said.push(format!("its lease {id} ends with its token ({error})"));
                }
                Err(error) => return Err(error),
            }
        }
        let evidence = match (certificate, handle.engine) {
            (Some(serial), _) => self.end_certificate(handle, serial, now, &mut said).await,
            (None, Engine::Ssh) => self.ssh_ended(handle, now),
            _ => Ok(Evidence::TargetSaysGone { detail: said.join("; ") }),
        };
        // The token too, also of a certificate that only time ends: it could mint.
        self.end_token(handle).await?;
        Ok(Gone { evidence: evidence?, seen, access_cut: cut })
    }

    /// Ends the token of the mint, and with it (asynchronously) every lease that is linked to it. 204, or 200 with a
    /// warning for an unknown one.
    pub(super) async fn end_token(&self, handle: &VaultHandle) -> Result<(), RevokeError> {
        let Some(accessor) = &handle.accessor else { return Ok(()) };
        let body = json!({ "accessor": accessor });
        let ns = handle.namespace.as_deref();
        self.logins
            .as_janitor(&self.api, ns, "PUT", "auth/token/revoke-accessor", Some(&body), self.deadline())
            .await?;
        Ok(())
    }

    /// Asks for a lease.
    pub(super) async fn look(&self, handle: &VaultHandle, id: &str) -> Result<Looked, RevokeError> {
        #[derive(Deserialize)]
        struct Lookup {
            data: Data,
        }
        #[derive(Deserialize)]
        struct Data {
            id: String,
            issue_time: String,
            expire_time: Option<String>,
            ttl: i64,
        }
        let body = json!({ "lease_id": id });
        let ns = handle.namespace.as_deref();
        match self.logins.as_janitor(&self.api, ns, "PUT", "sys/leases/lookup", Some(&body), self.deadline()).await {
            Err(fault) if fault.kind == Kind::InvalidLease => Ok(Looked::Gone),
            Err(fault) => Err(fault.into()),
            Ok(reply) => {
                let data = reply.json::<Lookup>()?.data;
                if data.id != id {
                    return Err(retry("the target answered the look-up of one lease with another"));
                }
                let secs = |text: &str| {
                    time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339)
                        .map(time::OffsetDateTime::unix_timestamp)
                        .map_err(|_| retry("the target's time of a lease can't be read"))
                };
                let issued = secs(&data.issue_time)?;
                // `expire_time − ttl` is now, on the target's own clock; a second for its rounding.
                let age_secs = match &data.expire_time {
                    Some(expires) => (secs(expires)? - data.ttl - issued - 1).max(0),
                    None => 0,
                };
                Ok(Looked::Live { age_secs, ttl_secs: data.ttl })
            }
        }
    }

    /// Ends a lease that was seen live, and proves it: look, revoke with sync, look again. A 403 or a 404 is never "gone".
    pub(super) async fn end_lease(&self, handle: &VaultHandle, id: &str) -> Result<LeaseEnd, RevokeError> {
        check_lease_id(&handle.path, id).map_err(retry)?;
        let Looked::Live { ttl_secs, .. } = self.look(handle, id).await? else {
            return Ok(LeaseEnd { was_live: false, was_overdue: false });
        };
        // The id stands in the URL, so that the janitor's policy can bound it; `sync` alone is in the body. Also for an
        // irrevocable lease: our own sync revocation heals it once the database is back.
        let path = format!("sys/leases/revoke/{id}");
        let ns = handle.namespace.as_deref();
        let body = json!({ "sync": true });
        let reply = self.logins.as_janitor(&self.api, ns, "PUT", &path, Some(&body), SYNC_REVOKE_DEADLINE).await?;
        match self.look(handle, id).await? {
            Looked::Gone => Ok(LeaseEnd { was_live: true, was_overdue: ttl_secs < 0 }),
            Looked::Live { .. } => Err(retry(format!(
                "the revocation of {id} was answered {}, but the lease is still there",
                reply.status
            ))),
        }
    }

    /// Ends a certificate at its CA. The proof is the CA's own record, not the answer.
    async fn end_certificate(
        &self,
        handle: &VaultHandle,
        serial: &str,
        now: Timestamp,
        said: &mut Vec<String>,
    ) -> Result<Evidence, RevokeError> {
        check_serial(serial).map_err(retry)?;
        if let Some(expired) = self.expired(handle.not_after, now) {
            return Ok(expired);
        }
        let mut at = self.revoked_at(handle, serial).await?;
        if at.is_none() {
            let body = match &handle.certificate {
                Some(certificate) => json!({ "certificate": certificate }),
                None => json!({ "serial_number": serial }),
            };
            let path = format!("{}/revoke", handle.mount);
            self.logins
                .as_janitor(&self.api, handle.namespace.as_deref(), "PUT", &path, Some(&body), self.deadline())
                .await?;
            at = self.revoked_at(handle, serial).await?;
        }
        let Some(at) = at else { return Err(retry(format!("the CA does not show {serial} as revoked yet"))) };
        said.push(format!(
            "{}/cert/{serial} shows revocation_time {at}: stops those who check CRL or OCSP",
            handle.mount
        ));
        Ok(Evidence::TargetSaysGone { detail: said.join("; ") })
    }

    /// The CA's record of a certificate's revocation; none if it is not revoked, or not stored.
    async fn revoked_at(&self, handle: &VaultHandle, serial: &str) -> Result<Option<u64>, RevokeError> {
        #[derive(Deserialize)]
        struct Record {
            data: Data,
        }
        #[derive(Deserialize)]
        struct Data {
            #[serde(default)]
            revocation_time: u64,
        }
        let path = format!("{}/cert/{serial}", handle.mount);
        match self.logins.as_janitor(&self.api, handle.namespace.as_deref(), "GET", &path, None, self.deadline()).await
        {
            Ok(reply) => Ok(Some(reply.json::<Record>()?.data.revocation_time).filter(|at| *at > 0)),
            Err(fault) if fault.kind == Kind::Empty => Ok(None),
            Err(fault) => Err(fault.into()),
        }
    }

    fn ssh_ended(&self, handle: &VaultHandle, now: Timestamp) -> Result<Evidence, RevokeError> {
        let Some(not_after) = handle.not_after else { return Err(retry("the handle has no expiry")) };
        self.expired(Some(not_after), now).ok_or(RevokeError::EndsAt { at: not_after.plus_secs(self.skew_secs()) })
    }

    /// `Expired`, once it is true.
    pub(super) fn expired(&self, not_after: Option<Timestamp>, now: Timestamp) -> Option<Evidence> {
        let not_after = not_after?;
        let skew_secs = self.skew_secs();
        (now > not_after.plus_secs(skew_secs)).then_some(Evidence::Expired { not_after, skew_secs })
    }
}

pub(super) fn observation(what: &str) -> Observation {
    Observation { what: what.to_owned(), count: 1, detail: None }
}
