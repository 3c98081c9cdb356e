//! The life of a key: published, then used, then kept published until the last thing it signed is dead,
//! then dropped. One file a key, never changed: its name says from when on it signs.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::KeyError;
use super::files::{Folder, KEY_FILES_MAX};
use crate::core::id::Timestamp;

/// When keys of one purpose come and go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Periods {
    /// How long a key signs before the next takes over; `None`: until an operator rotates.
    pub rotate_every: Option<Duration>,
    /// How long a key is published before it signs: longer than anybody caches the JWKS.
    pub publish_ahead: Duration,
    /// How long it stays published after it signed last: longer than anything it signed lives. `None`: for ever.
    pub keep_after: Option<Duration>,
}

/// What [`tick`](super::Keys::tick) or a rotation did, for the record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case", deny_unknown_fields)]
pub enum KeyChange {
    /// A new key stands in the JWKS.
    Published {
        /// RFC 7638 thumbprint.
        kid: String,
        /// When it begins to sign.
        active_from: Timestamp,
    },
    /// A key signs from now on.
    Activated {
        /// RFC 7638 thumbprint.
        kid: String,
    },
    /// A key was removed: nothing that it signed is alive.
    Dropped {
        /// RFC 7638 thumbprint.
        kid: String,
    },
}

/// A key pair of one algorithm.
pub(super) trait Pair: Send + Sync + Sized {
    /// Makes one, as PKCS#8.
    fn generate() -> Result<Zeroizing<Vec<u8>>, KeyError>;
    /// Reads one; `None` if these bytes are none.
    fn parse(pkcs8: &[u8]) -> Option<Self>;
    /// The members that make the thumbprint, in order: RFC 7638 section 3.2, RFC 8037 section 2.
    fn required_members(&self) -> String;
    /// `alg` of RFC 7518 or RFC 8037.
    const ALG: &'static str;
}

/// A key with its place in time.
pub(super) struct Entry<P> {
    pub(super) kid: String,
    pub(super) active_from: Timestamp,
    pub(super) pair: P,
}

impl<P> fmt::Debug for Entry<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.kid, self.active_from.0)
    }
}

impl<P: Pair> Entry<P> {
    fn read(pkcs8: &[u8], active_from: Timestamp) -> Option<Self> {
        let pair = P::parse(pkcs8)?;
        let kid = thumbprint(&pair.required_members());
        Some(Self { kid, active_from, pair })
    }

    fn file_name(&self) -> String {
        // 15 digits of milliseconds: sorts until the year 33658.
        format!("{:015}-{}.p8", self.active_from.0, self.kid)
    }

    fn jwk(&self) -> Value {
        let mut jwk: Value = serde_json::from_str(&self.pair.required_members()).unwrap_or_else(|_| json!({}));
        jwk["kid"] = json!(self.kid);
        jwk["use"] = json!("sig");
        jwk["alg"] = json!(P::ALG);
        jwk
    }
}

/// RFC 7638.
pub(super) fn thumbprint(required_members: &str) -> String {
    URL_SAFE_NO_PAD.encode(digest(&SHA256, required_members.as_bytes()))
}

/// What signs and what is published at one moment. Never changed: replaced.
#[derive(Debug)]
pub(super) struct Ring<P> {
    /// By `active_from`, earliest first. Never empty.
    entries: Vec<Arc<Entry<P>>>,
    current: Arc<Entry<P>>,
    jwks: Arc<str>,
}

impl<P: Pair> Ring<P> {
    fn new(mut entries: Vec<Arc<Entry<P>>>, fallback: &Arc<Entry<P>>, now: Timestamp) -> Self {
        entries.sort_by(|a, b| (a.active_from, &a.kid).cmp(&(b.active_from, &b.kid)));
        // None has begun: the clock was set back behind them all. What signed so far goes on (guarantee 10).
        let current = entries.iter().rfind(|e| e.active_from <= now).unwrap_or(fallback).clone();
        let keys: Vec<Value> = entries.iter().map(|e| e.jwk()).collect();
        Self { entries, current, jwks: json!({ "keys": keys }).to_string().into() }
    }

    pub(super) fn current(&self) -> &Entry<P> {
        &self.current
    }

    pub(super) fn by_kid(&self, kid: &str) -> Option<&Entry<P>> {
        self.entries.iter().find(|e| e.kid == kid).map(|e| &**e)
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = &Entry<P>> {
        self.entries.iter().map(|e| &**e)
    }

    pub(super) fn jwks(&self) -> Arc<str> {
        self.jwks.clone()
    }
}

/// The keys of one purpose, on disk or (for `dev` without a folder, and tests) in memory alone.
pub(super) struct KeySet<P> {
    folder: Option<Folder>,
    periods: Periods,
    ring: ArcSwap<Ring<P>>,
    changing: Mutex<()>,
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl<P: Pair> KeySet<P> {
    /// Reads the folder's keys; makes the first one if there is none.
    pub(super) fn open(folder: Option<Folder>, periods: Periods, now: Timestamp) -> Result<Self, KeyError> {
        let mut entries = Vec::new();
        if let Some(folder) = &folder {
            for name in folder.names()? {
                let path = folder.path(&name);
                let unexpected = || KeyError::Unexpected { path: path.clone() };
                let (from, _) = name.split_once('-').ok_or_else(unexpected)?;
                let active_from = Timestamp(from.parse().map_err(|_| unexpected())?);
                let bytes = folder.read(&name)?.ok_or_else(unexpected)?;
                let entry = Entry::<P>::read(&bytes, active_from).ok_or_else(unexpected)?;
                if entry.file_name() != name {
                    return Err(unexpected());
                }
                entries.push(Arc::new(entry));
            }
        }
        if entries.is_empty() {
            // Nobody can have cached a JWKS of ours: the first key signs at once.
            entries.push(Self::make(folder.as_ref(), now)?);
        }
        let fallback = entries.iter().max_by_key(|e| e.active_from).unwrap_or(&entries[0]).clone();
        let ring = Ring::new(entries, &fallback, now);
        Ok(Self { folder, periods, ring: ArcSwap::from_pointee(ring), changing: Mutex::new(()) })
    }

    pub(super) fn ring(&self) -> arc_swap::Guard<Arc<Ring<P>>> {
        self.ring.load()
    }

    fn make(folder: Option<&Folder>, active_from: Timestamp) -> Result<Arc<Entry<P>>, KeyError> {
        let pkcs8 = P::generate()?;
        let entry = Entry::read(&pkcs8, active_from).ok_or(KeyError::Crypto { doing: "read back a new key" })?;
        if let Some(folder) = folder {
            folder.write(&entry.file_name(), &pkcs8)?;
        }
        Ok(Arc::new(entry))
    }

    /// Publishes the next key now; it signs after [`Periods::publish_ahead`]. Nothing if one is under way.
    pub(super) fn rotate(&self, now: Timestamp) -> Result<Vec<KeyChange>, KeyError> {
        let _one = self.changing.lock();
        self.publish_next(now)
    }

    /// Does what is due at `now`: activates, publishes, drops.
    pub(super) fn tick(&self, now: Timestamp) -> Result<Vec<KeyChange>, KeyError> {
        let _one = self.changing.lock();
        let mut changes = self.replace(self.ring.load().entries.clone(), now);
        if let Some(every) = self.periods.rotate_every {
            let begun = self.ring.load().current.active_from;
            let due = begun.plus_ms(ms(every)) <= now.plus_ms(ms(self.periods.publish_ahead));
            if due || begun > now {
                changes.extend(self.publish_next(now)?);
            }
        }
        if let Some(keep) = self.periods.keep_after {
            let ring = self.ring.load_full();
            for (old, next) in ring.entries.iter().zip(ring.entries.iter().skip(1)) {
                if next.active_from.plus_ms(ms(keep)) > now || old.kid == ring.current.kid {
                    continue;
                }
                if let Some(folder) = &self.folder {
                    folder.remove(&old.file_name())?;
                }
                let left = self.ring.load().entries.iter().filter(|e| e.kid != old.kid).cloned().collect();
                changes.extend(self.replace(left, now));
                changes.push(KeyChange::Dropped { kid: old.kid.clone() });
            }
        }
        Ok(changes)
    }

    /// With `changing` held.
    fn publish_next(&self, now: Timestamp) -> Result<Vec<KeyChange>, KeyError> {
        let ring = self.ring.load_full();
        let active_from = now.plus_ms(ms(self.periods.publish_ahead));
        // A key that waits further in the future was made while the clock was wrong: it doesn't count.
        let waits = |e: &Entry<P>| e.active_from > now && e.active_from <= active_from && e.kid != ring.current.kid;
        if ring.entries().any(waits) {
            return Ok(Vec::new());
        }
        if ring.entries.len() >= KEY_FILES_MAX {
            return Err(KeyError::TooMany { path: self.folder.as_ref().map(|f| f.path("")).unwrap_or_default() });
        }
        let next = Self::make(self.folder.as_ref(), active_from)?;
        let mut changes = vec![KeyChange::Published { kid: next.kid.clone(), active_from }];
        let mut entries = ring.entries.clone();
        entries.push(next);
        changes.extend(self.replace(entries, now));
        Ok(changes)
    }

    /// With `changing` held. Says if another key signs from now on.
    fn replace(&self, entries: Vec<Arc<Entry<P>>>, now: Timestamp) -> Vec<KeyChange> {
        let before = self.ring.load_full();
        let after = Ring::new(entries, &before.current, now);
        let kid = after.current.kid.clone();
        if after.current.kid == before.current.kid && after.entries.len() == before.entries.len() {
            return Vec::new();
        }
        self.ring.store(Arc::new(after));
        if kid == before.current.kid { Vec::new() } else { vec![KeyChange::Activated { kid }] }
    }
}
