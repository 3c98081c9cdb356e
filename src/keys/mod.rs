//! Signing keys, their rotation and their JWKS; the key that makes names; randomness.
//!
//! Keys have one meaning each (DESIGN section 8): [`SigningKeys`] of [`Purpose::Tokens`] sign what agents carry,
//! of [`Purpose::Assertions`] what the broker logs in with at targets; [`CheckpointKeys`] sign the journal's
//! checkpoints; [`NameKey`] makes names at targets. No key signs for another's purpose.

mod checkpoint;
mod files;
mod jwt;
mod names;
pub mod random;
mod ring;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use checkpoint::{CheckpointKeys, CheckpointSignature};
pub use files::{KEY_FILE_BYTES_MAX, KEY_FILES_MAX};
pub use jwt::{ASSERTION_LIFE_SECS_MAX, Assertion, SigningKeys, TOKEN_BYTES_MAX, TOKEN_LIFE_SECS_MAX, VerifyError};
pub use names::{HASH_CHARS, NAME_AT_TARGET_BYTES_MAX, NameKey, NamePrefix, NamePrefixError, is_name_hash};
pub use ring::{KeyChange, Periods};

use crate::core::id::Timestamp;
use files::Folder;

/// What went wrong with a key. Never shows key material.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Others can read it.
    #[error("{path} is open to others (mode {mode:03o}); if none of them can have read it, run: chmod {wanted:03o} {path}",
        path = .path.display())]
    Mode {
        /// Which file or folder.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// The mode it must have.
        wanted: u32,
    },
    /// It belongs to somebody else.
    #[error("{path} belongs to user {uid}, the broker runs as user {wanted}; run: chown -R {wanted} {path}",
        path = .path.display())]
    Owner {
        /// Which file or folder.
        path: PathBuf,
        /// Its owner.
        uid: u32,
        /// Who must own it.
        wanted: u32,
    },
    /// It is no key file, damaged, or renamed.
    #[error("{path} is not a key file of this folder (damaged, renamed or foreign); restore it from the backup, or move it away",
        path = .path.display())]
    Unexpected {
        /// Which.
        path: PathBuf,
    },
    /// More keys than [`KEY_FILES_MAX`].
    #[error("{path} holds more than {max} keys; wait until retired ones are dropped, or move strangers away",
        path = .path.display(), max = KEY_FILES_MAX)]
    TooMany {
        /// Which folder.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("can't {doing} {path}: {source}", path = .path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The crypto library refused; not expected to happen.
    #[error("the crypto library could not {doing}")]
    Crypto {
        /// What was tried.
        doing: &'static str,
    },
    /// What was to be signed can't be.
    #[error("can't sign this: {0}")]
    Claims(&'static str),
    /// A key was asked to sign for another's purpose.
    #[error("keys for {0:?} don't sign this")]
    Purpose(Purpose),
    /// The folder was made by `dev` or `tour`, and `serve` never trusts that (DESIGN section 9), or the reverse.
    #[error("the keys in {path} were made by `{made_by}` and can't be used by `{asked_by}`; give it a data folder of its own",
        path = .path.display())]
    Origin {
        /// The keys' folder.
        path: PathBuf,
        /// Who made it.
        made_by: &'static str,
        /// Who wants it.
        asked_by: &'static str,
    },
}

/// What a set of keys is for. One meaning each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// ES256: tokens that agents carry (RFC 9068).
    Tokens,
    /// ES256: assertions by which the broker logs in at targets.
    Assertions,
    /// Ed25519: checkpoints of the journal.
    Checkpoints,
}

impl Purpose {
    pub(crate) const fn folder(self) -> &'static str {
        match self {
            Self::Tokens => "tokens",
            Self::Assertions => "assertions",
            Self::Checkpoints => "checkpoints",
        }
    }

    /// When its keys come and go.
    pub const fn periods(self) -> Periods {
        match self {
            // Resource servers cache a JWKS for hours; no token outlives TOKEN_LIFE_SECS_MAX.
            Self::Tokens => Periods {
                rotate_every: Some(Duration::from_hours(30 * 24)),
                publish_ahead: Duration::from_hours(24),
                keep_after: Some(Duration::from_secs(TOKEN_LIFE_SECS_MAX + 3600)),
            },
            // Only an operator rotates: a target may hold a pinned public key, and would be locked out.
            Self::Assertions => Periods {
                rotate_every: None,
                publish_ahead: Duration::from_hours(24),
                keep_after: Some(Duration::from_hours(1)),
            },
            // An old checkpoint must verify as long as the journal lives.
            Self::Checkpoints => Periods { rotate_every: None, publish_ahead: Duration::ZERO, keep_after: None },
        }
    }
}

/// Who makes a folder of keys. `serve` refuses keys of `dev` and `tour`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The real broker.
    Serve,
    /// `dev` and `tour`.
    Dev,
}

impl Origin {
    const fn name(self) -> &'static str {
        match self {
            Self::Serve => "serve",
            Self::Dev => "dev",
        }
    }
}

const ORIGIN_FILE: &str = "made-by";

/// All keys of one broker.
#[derive(Debug, Clone)]
pub struct Keys {
    /// Sign what agents carry.
    pub tokens: Arc<SigningKeys>,
    /// Sign what the broker logs in with.
    pub assertions: Arc<SigningKeys>,
    /// Sign the journal's checkpoints.
    pub checkpoints: Arc<CheckpointKeys>,
    /// Makes names at targets.
    pub names: Arc<NameKey>,
}

impl Keys {
    /// Opens `<data_dir>/keys`, making what is missing. The caller owns the data folder (its lock).
    pub fn open(data_dir: &Path, origin: Origin, now: Timestamp) -> Result<Self, KeyError> {
        let root = data_dir.join("keys");
        let folder = Folder::open(&root)?;
        match folder.read(ORIGIN_FILE)? {
            None if folder.names()?.is_empty() => folder.write(ORIGIN_FILE, origin.name().as_bytes())?,
            Some(made_by) if made_by.as_slice() == origin.name().as_bytes() => {}
            Some(made_by) => {
                let known = [Origin::Serve, Origin::Dev].map(Origin::name);
                let made_by = known.into_iter().find(|n| n.as_bytes() == made_by.as_slice()).unwrap_or("someone else");
                return Err(KeyError::Origin { path: root, made_by, asked_by: origin.name() });
            }
            None => return Err(KeyError::Unexpected { path: root }),
        }
        Ok(Self {
            tokens: Arc::new(SigningKeys::open(&root, Purpose::Tokens, now)?),
            assertions: Arc::new(SigningKeys::open(&root, Purpose::Assertions, now)?),
            checkpoints: Arc::new(CheckpointKeys::open(&root, now)?),
            names: Arc::new(NameKey::open(&root)?),
        })
    }

    /// Keys that live in memory alone.
    pub fn ephemeral(now: Timestamp) -> Result<Self, KeyError> {
        Ok(Self {
            tokens: Arc::new(SigningKeys::ephemeral(Purpose::Tokens, now)?),
            assertions: Arc::new(SigningKeys::ephemeral(Purpose::Assertions, now)?),
            checkpoints: Arc::new(CheckpointKeys::ephemeral(now)?),
            names: Arc::new(NameKey::ephemeral()),
        })
    }

    /// What these keys are known by, without any of them: nodes that share a record must have the same.
    pub fn known_by(&self) -> Vec<String> {
        let name = self.names.mark();
        [&self.tokens.jwks(), &self.assertions.jwks(), &self.checkpoints.jwks()]
            .map(ToString::to_string)
            .into_iter()
            .chain([name])
            .collect()
    }

    /// Does what is due at `now` for every purpose: to be called every few minutes. Says what changed.
    pub fn tick(&self, now: Timestamp) -> Result<Vec<(Purpose, KeyChange)>, KeyError> {
        let mut changes = Vec::new();
        let mut add = |purpose, new: Vec<KeyChange>| changes.extend(new.into_iter().map(|c| (purpose, c)));
        add(Purpose::Tokens, self.tokens.tick(now)?);
        add(Purpose::Assertions, self.assertions.tick(now)?);
        add(Purpose::Checkpoints, self.checkpoints.tick(now)?);
        Ok(changes)
    }
}

#[cfg(test)]
mod tests;
