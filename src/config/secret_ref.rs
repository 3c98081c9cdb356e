//! References to secrets: `env:NAME` or `file:PATH`. Read late, held in zeroising memory.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::core::secret::Secret;

/// Largest secret that is read, in bytes.
pub const SECRET_BYTES_MAX: u64 = 64 * 1024;

/// Where a secret is. The secret itself never stands in a file of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum SecretRef {
    /// In an environment variable.
    Env(String),
    /// In a file (one trailing newline is dropped).
    File(PathBuf),
}

/// Why a reference can't be read. Names the place, never the content.
#[derive(Debug, thiserror::Error)]
pub enum SecretRefError {
    /// Not of a known form.
    #[error("a secret must be a reference, `env:NAME` or `file:PATH`, not the secret itself")]
    Form,
    /// The variable is not set.
    #[error("the environment variable {0} is not set; set it before the broker starts")]
    NoVariable(String),
    /// The file can't be read.
    #[error("can't read the secret in {path}: {source}", path = .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Too large, empty, or not text.
    #[error("the secret in {0} is empty, not UTF-8, or larger than 64 KiB")]
    Content(String),
}

impl TryFrom<String> for SecretRef {
    type Error = SecretRefError;
    fn try_from(text: String) -> Result<Self, SecretRefError> {
        match text.split_once(':') {
            Some(("env", name)) if !name.is_empty() => Ok(Self::Env(name.to_owned())),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err(SecretRefError::Form),
        }
    }
}

impl From<SecretRef> for String {
    fn from(r: SecretRef) -> Self {
        match r {
            SecretRef::Env(name) => format!("env:{name}"),
            SecretRef::File(path) => format!("file:{}", path.display()),
        }
    }
}

impl SecretRef {
    /// Reads the secret. Relative files are looked for beside `base`.
    pub fn read(&self, base: &Path) -> Result<Secret, SecretRefError> {
        let (text, place) = match self {
            Self::Env(name) => {
                (std::env::var(name).map_err(|_| SecretRefError::NoVariable(name.clone()))?, format!("env:{name}"))
            }
            Self::File(path) => {
                let path = base.join(path);
                let fail = |source| SecretRefError::File { path: path.clone(), source };
                if std::fs::metadata(&path).map_err(fail)?.len() > SECRET_BYTES_MAX {
                    return Err(SecretRefError::Content(path.display().to_string()));
                }
                let bytes = zeroize::Zeroizing::new(std::fs::read(&path).map_err(fail)?);
                let text =
                    std::str::from_utf8(&bytes).map_err(|_| SecretRefError::Content(path.display().to_string()))?;
                (text.strip_suffix('\n').unwrap_or(text).to_owned(), path.display().to_string())
            }
        };
        if text.is_empty() || text.len() as u64 > SECRET_BYTES_MAX {
            return Err(SecretRefError::Content(place));
        }
        Ok(Secret::new(text))
    }
}
