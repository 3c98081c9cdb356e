//! A lease in doubt: the broker died, or the answer of the mint was lost. Ending the accessor is necessary and not
//! enough. Of 60 kills, 4 left leases that are not linked to their token and 4 left users without any lease, and a
//! mint that is still running answers 200 under a dead token.
//!
//! What is somebody else's is told by ages alone: the target's own for leases, the boot-time clock for the doubt and
//! for users. A step of the wall clock makes nothing look absent (guarantees 5 and 10).

use std::collections::BTreeSet;

use serde::Deserialize;

use super::Inner;
use super::api::Kind;
use super::ending::{Looked, observation, retry};
use super::handle::VaultHandle;
use super::path::{Engine, check_lease_id};
use crate::connector::{Gone, Observation, RevokeError, SweepError};
use crate::core::id::Timestamp;
use crate::core::lease::{Evidence, Lease};

/// How long between the target's answer and the durable record of it: a lease of that age may be somebody's who is
/// just being served.
const RECORDING_SECS: i64 = 5;

/// What to do with a lease that no other lease of the journal explains.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Too young to be the one in doubt: another mint, just being recorded.
    NotOurs,
    /// It may be the one in doubt, or another mint that is just being recorded.
    Wait,
    /// Nobody's: older than any mint that is not recorded yet.
    End,
}

/// `in_doubt_secs` is how long the doubt is known here, by the boot-time clock: its mint began before that.
/// `deadline_secs` is the longest mint.
fn verdict(age_secs: i64, in_doubt_secs: i64, deadline_secs: i64) -> Verdict {
    if age_secs + RECORDING_SECS < in_doubt_secs - deadline_secs {
        Verdict::NotOurs
    } else if age_secs < deadline_secs {
        Verdict::Wait
    } else {
        Verdict::End
    }
}

/// What the journal explains, as it was when a call began. Nothing is ended on the word of an older one: what was
/// recorded since would look like nobody's.
struct Known<'a> {
    names: Option<&'a BTreeSet<String>>,
    read_at_boot_ms: u64,
}

impl Known<'_> {
    fn explains(&self, name: &str) -> bool {
        self.names.is_some_and(|names| names.contains(name))
    }
}

impl Inner {
    /// What is ended is older than the longest mint when it is ended. So it was made half of that before the set was
    /// read, and its record, if there is to be one, is in the set.
    fn still_known(&self, known: &Known<'_>) -> Result<(), RevokeError> {
        let age_ms = self.clock.boot_ms().saturating_sub(known.read_at_boot_ms);
        if u128::from(age_ms) > self.mint_deadline().as_millis() / 2 {
            return Err(retry("what the journal explains was read too long ago; it is read again"));
        }
        Ok(())
    }

    /// Ends whatever a mint in doubt may have left: its token, then (once no mint can be under way) leases and users
    /// that nothing explains.
    pub(super) async fn recover(
        &self,
        lease: &Lease,
        handle: &VaultHandle,
        known: Option<&BTreeSet<String>>,
        now: Timestamp,
    ) -> Result<Gone, RevokeError> {
        let known = Known { names: known, read_at_boot_ms: self.clock.boot_ms() };
        let in_doubt_since = *self.in_doubt.lock().entry(lease.intent.lease).or_insert(known.read_at_boot_ms);
        let gone = self.recover_from(lease, handle, &known, in_doubt_since, now).await?;
        self.in_doubt.lock().remove(&lease.intent.lease);
        Ok(gone)
    }

    async fn recover_from(
        &self,
        lease: &Lease,
        handle: &VaultHandle,
        known: &Known<'_>,
        in_doubt_since_boot_ms: u64,
        now: Timestamp,
    ) -> Result<Gone, RevokeError> {
        self.end_token(handle).await?;
        let users = match (handle.engine, &handle.username_prefix) {
            // Also before the wait is over: from now on it counts how long they have been there.
            (Engine::Database, Some(prefix)) => Some(self.users(prefix).await.map_err(|e| retry(e.0))?),
            _ => None,
        };
        let deadline = self.mint_deadline();
        // The log-in comes after the intent, and on the wall clock, which may be the later of the two.
        let intended_at = lease.intent.intended_at.max(handle.prepared_at.unwrap_or_default());
        let since_ms = now.ms_since(intended_at);
        if u128::from(since_ms) < deadline.as_millis() {
            let left = deadline.as_secs().saturating_sub(since_ms / 1000);
            return Err(retry(format!(
                "its token is ended; the mint may be under way at the target for {left} s more"
            )));
        }
        let mut ended = 0u64;
        let mut looked = None;
        if handle.swept {
            ended = self.end_unexplained(handle, known, in_doubt_since_boot_ms).await?;
            looked = Some(format!(
                "LIST sys/leases/lookup/{} has no lease that the journal doesn't explain ({ended} ended)",
                handle.path
            ));
        }
        let mut seen = Vec::new();
        if ended > 0 {
            seen.push(Observation { count: ended, ..observation("leases_revoked") });
        }
        let latest = intended_at.plus_secs(deadline.as_secs()).plus_secs(handle.life_secs_max);
        let evidence = match (users, looked) {
            (Some(users), Some(said)) => {
                let ended = self.end_users(users, handle, known).await?;
                if ended > 0 {
                    seen.push(Observation { count: ended, ..observation("users_dropped") });
                }
                let detail = format!(
                    "its token was ended and {} s have passed; {said}; the database has no user that the journal doesn't explain ({ended} dropped)",
                    since_ms / 1000
                );
                Evidence::TargetSaysGone { detail }
            }
            // A certificate comes with its lease or not at all where `generate_lease` is set: a crash between the two
            // leaves a certificate whose key nobody got. Like a user without a lease, it ends by its own expiry.
            _ => self
                .expired(Some(latest), now)
                .ok_or(RevokeError::EndsAt { at: latest.plus_secs(self.skew_secs() + 1) })?,
        };
        Ok(Gone { evidence, seen, access_cut: None })
    }

    /// LIST, end what is nobody's, and LIST again.
    async fn end_unexplained(
        &self,
        handle: &VaultHandle,
        known: &Known<'_>,
        in_doubt_since_boot_ms: u64,
    ) -> Result<u64, RevokeError> {
        let deadline_secs = i64::try_from(self.mint_deadline().as_secs()).unwrap_or(i64::MAX);
        let mut ended = 0;
        for last in [false, true] {
            let mut to_end = Vec::new();
            for id in self.list(handle).await? {
                if known.explains(&id) {
                    continue;
                }
                let Looked::Live { age_secs, .. } = self.look(handle, &id).await? else { continue };
                let in_doubt_ms = self.clock.boot_ms().saturating_sub(in_doubt_since_boot_ms);
                let in_doubt_secs = i64::try_from(in_doubt_ms / 1000).unwrap_or(i64::MAX);
                match verdict(age_secs, in_doubt_secs, deadline_secs) {
                    Verdict::NotOurs => {}
                    Verdict::Wait => {
                        return Err(retry("a lease that was just made is not in the journal yet; looking again"));
                    }
                    Verdict::End if known.names.is_none() => {
                        return Err(retry(
                            "leases are there that may be this one's; a sweep decides which the journal explains",
                        ));
                    }
                    Verdict::End => to_end.push(id),
                }
            }
            if to_end.is_empty() {
                return Ok(ended);
            }
            if last {
                break;
            }
            for id in to_end {
                self.still_known(known)?;
                self.end_lease(handle, &id).await?;
                ended += 1;
            }
        }
        Err(retry("leases that nothing explains go on appearing; is the role used by something else? (`dedicated`)"))
    }

    /// The ids of the leases that a role made, each whole. An empty list is 404.
    pub(super) async fn list(&self, handle: &VaultHandle) -> Result<Vec<String>, RevokeError> {
        #[derive(Deserialize)]
        struct List {
            data: Data,
        }
        #[derive(Deserialize)]
        struct Data {
            keys: Vec<String>,
        }
        let path = format!("sys/leases/lookup/{}", handle.path);
        let ns = handle.namespace.as_deref();
        let reply = match self.logins.as_janitor(&self.api, ns, "LIST", &path, None, self.deadline()).await {
            Ok(reply) => reply,
            // Only the target's own empty list: a wrong namespace or mount has words, and a gateway's 404 is no proof.
            Err(fault) if fault.kind == Kind::Empty => return Ok(Vec::new()),
            Err(fault) => return Err(fault.into()),
        };
        let ids: Vec<String> =
            reply.json::<List>()?.data.keys.into_iter().map(|k| format!("{}/{k}", handle.path)).collect();
        for id in &ids {
            check_lease_id(&handle.path, id).map_err(retry)?;
        }
        Ok(ids)
    }

    /// Drops the users that nothing explains and that have been there longer than any mint.
    async fn end_users(
        &self,
        users: Vec<super::sweep::User>,
        handle: &VaultHandle,
        known: &Known<'_>,
    ) -> Result<u64, RevokeError> {
        let mut ended = 0;
        for user in users {
            if known.explains(&format!("user:{}", user.found.name)) {
                continue;
            }
            if known.names.is_none() {
                return Err(retry(
                    "users are there that may be this one's; a sweep decides which the journal explains",
                ));
            }
            self.still_known(known)?;
            self.end_user(&user).await?;
            ended += 1;
        }
        if ended > 0 {
            let prefix = handle.username_prefix.as_deref().unwrap_or_default();
            let left = self.users(prefix).await.map_err(|SweepError(why)| retry(why))?;
            if left.iter().any(|u| !known.explains(&format!("user:{}", u.found.name))) {
                return Err(retry(
                    "users that nothing explains go on appearing; is the role used by something else? (`dedicated`)",
                ));
            }
        }
        Ok(ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_leases_that_no_running_mint_can_own_are_ended() {
        // Deadline 100 s. The doubt is known for 300 s: its lease, if any, is at least 200 s old, however old the intent.
        assert_eq!(verdict(0, 300, 100), Verdict::NotOurs);
        assert_eq!(verdict(194, 300, 100), Verdict::NotOurs);
        assert_eq!(verdict(195, 300, 100), Verdict::End);
        assert_eq!(verdict(300, 300, 100), Verdict::End);
        assert_eq!(verdict(4000, 300, 100), Verdict::End);
        // Known for a moment, as after a start: nothing is somebody else's because it is young.
        assert_eq!(verdict(0, 0, 100), Verdict::Wait);
        assert_eq!(verdict(100, 0, 100), Verdict::End);
        // Just past the deadline: anything young may be ours or another's.
        assert_eq!(verdict(0, 100, 100), Verdict::Wait);
        assert_eq!(verdict(99, 120, 100), Verdict::Wait);
        assert_eq!(verdict(100, 120, 100), Verdict::End);
        assert_eq!(verdict(14, 120, 100), Verdict::NotOurs);
    }
}
