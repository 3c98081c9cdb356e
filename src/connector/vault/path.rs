//! Paths that the operator names literally, and what may never be one (regression A16).
//! Everything that goes into a URL is one of these checked values, or a checked lease id or serial.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Longest path, in bytes.
pub(super) const PATH_BYTES_MAX: usize = 256;
/// Longest lease id or serial that is believed, in bytes.
pub(super) const ID_BYTES_MAX: usize = 512;

/// Mounts of the target's own. Nothing is ever minted, or asked, under a catalogue path that names one.
const RESERVED: [&str; 6] = ["sys", "auth", "identity", "cubbyhole", "token", "root"];

/// The kinds of engine that mint what can be ended, or ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", rename_all = "snake_case")]
pub(super) enum Engine {
    /// `MOUNT/creds/ROLE`.
    Database,
    /// `MOUNT/issue/ROLE`.
    Pki,
    /// `MOUNT/sign/ROLE`.
    Ssh,
}

impl Engine {
    /// The segment before the role's name.
    const fn verb(self) -> &'static str {
        match self {
            Self::Database => "creds",
            Self::Pki => "issue",
            Self::Ssh => "sign",
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Database => "database",
            Self::Pki => "pki",
            Self::Ssh => "ssh",
        })
    }
}

impl TryFrom<String> for Engine {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "database" => Ok(Self::Database),
            "pki" => Ok(Self::Pki),
            "ssh" => Ok(Self::Ssh),
            "kv" | "kv-v1" | "kv-v2" | "generic" | "cubbyhole" => {
                Err("a stored value (kv) has neither an early end nor an expiry, so it can't be granted; \
                     have the target make a credential instead (`database`, `pki`, `ssh`)"
                    .to_owned())
            }
            _ => Err("`engine` must be one of `database`, `pki`, `ssh`".to_owned()),
        }
    }
}

/// A path that mints: mount, verb and role, each segment plain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MintPath {
    text: String,
    mount_len: usize,
}

impl MintPath {
    /// Checks `text` as a path of `engine`.
    pub(super) fn new(engine: Engine, text: &str) -> Result<Self, String> {
        let segments = plain_segments("`path`", text)?;
        if let Some(reserved) = segments
            .iter()
            .take(segments.len().saturating_sub(1))
            .find(|s| RESERVED.contains(&s.to_ascii_lowercase().as_str()))
        {
            return Err(format!(
                "`path` goes through `{reserved}/`, which belongs to the target itself; name a role of a secrets engine"
            ));
        }
        let wants = format!("`path` of a {engine} engine must be MOUNT/{}/ROLE", engine.verb());
        let [mount @ .., verb, _role] = segments.as_slice() else { return Err(wants) };
        if *verb != engine.verb() || mount.is_empty() {
            return Err(wants);
        }
        if mount.iter().any(|s| matches!(*s, "issuer" | "data" | "metadata")) {
            return Err(format!("{wants}, without an issuer or data part between"));
        }
        let mount_len = mount.iter().map(|s| s.len() + 1).sum::<usize>() - 1;
        Ok(Self { text: text.to_owned(), mount_len })
    }

    /// The whole path, without a slash at either end.
    pub(super) fn as_str(&self) -> &str {
        &self.text
    }
    /// The mount, without a slash at either end.
    pub(super) fn mount(&self) -> &str {
        &self.text[..self.mount_len]
    }
    /// The role's name.
    pub(super) fn role(&self) -> &str {
        self.text.rsplit('/').next().unwrap_or_default()
    }
}

/// Splits a path of plain segments: no empty, `.` or `..` one, no encoding, no glob, nothing that a proxy
/// or the target could read in two ways.
fn plain_segments<'a>(what: &str, text: &'a str) -> Result<Vec<&'a str>, String> {
    if text.is_empty() || text.len() > PATH_BYTES_MAX {
        return Err(format!("{what} must have 1 to {PATH_BYTES_MAX} bytes"));
    }
    let segments: Vec<&str> = text.split('/').collect();
    let plain = |s: &&str| {
        !s.is_empty() && !s.starts_with('.') && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    if segments.iter().all(plain) {
        Ok(segments)
    } else {
        Err(format!(
            "{what} must be segments of letters, digits, `-`, `_`, `.` with single `/` between: no `..`, `%`, `*`, `+`"
        ))
    }
}

/// Checks a mount path or namespace of the configuration (`jwt`, `team-a/dev`).
pub(super) fn check_plain(what: &str, text: &str) -> Result<(), String> {
    plain_segments(what, text).map(|_| ())
}

/// Checks a lease id that the target gave, before it goes into a URL or the journal: it must stand directly
/// under `path`.
pub(super) fn check_lease_id(path: &str, id: &str) -> Result<(), String> {
    let tail = id.strip_prefix(path).and_then(|rest| rest.strip_prefix('/')).unwrap_or_default();
    let plain = tail.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if tail.is_empty() || tail.starts_with('.') || !plain || id.len() > ID_BYTES_MAX {
        return Err(format!("the target gave a lease id that is not of the form {path}/ID"));
    }
    Ok(())
}

/// Checks a certificate's serial number (`60:ec:…` or bare hex) before it goes into a URL.
pub(super) fn check_serial(serial: &str) -> Result<(), String> {
    let plain = serial.bytes().all(|b| b.is_ascii_hexdigit() || b":-".contains(&b));
    if serial.is_empty() || serial.len() > 128 || !plain {
        return Err("the target gave a serial number that is not hexadecimal".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literal_paths_are_taken_apart() {
        let p = MintPath::new(Engine::Database, "team/database/creds/app-ro").unwrap();
        assert_eq!((p.mount(), p.role(), p.as_str()), ("team/database", "app-ro", "team/database/creds/app-ro"));
        assert_eq!(MintPath::new(Engine::Pki, "pki/issue/web").unwrap().mount(), "pki");
        assert_eq!(MintPath::new(Engine::Ssh, "ssh/sign/ops").unwrap().mount(), "ssh");
    }

    #[test]
    fn a16_dots_encodings_globs_and_the_targets_own_paths_are_refused() {
        for bad in [
            "",
            "/",
            "creds/x",
            "database/creds",
            "database/creds/",
            "/database/creds/x",
            "database//creds/x",
            "database/creds/x/",
            "database/creds/..",
            "../database/creds/x",
            "database/../sys/creds/x",
            "database/creds/%2e%2e",
            "database%2fcreds/x",
            "database/creds/*",
            "database/creds/+",
            "+/creds/x",
            "database/creds/x?list=true",
            "database/creds/x#a",
            "database/creds/x y",
            "database/creds/\u{ff0e}",
            "database\\creds\\x",
            "sys/creds/x",
            "SYS/creds/x",
            "auth/creds/x",
            "identity/creds/x",
            "ns/sys/creds/x",
            "ns1/auth/token/creds/x",
            "cubbyhole/creds/x",
            "database/static-creds/x",
            "database/config/x",
            "secret/data/creds/x",
            "database/creds/.x",
            "database/creds/x\n",
        ] {
            assert!(MintPath::new(Engine::Database, bad).is_err(), "{bad:?}");
        }
        assert!(MintPath::new(Engine::Database, &format!("d/creds/{}", "x".repeat(PATH_BYTES_MAX))).is_err());
        for bad in ["pki/sign-verbatim/x", "pki/issuer/a/issue/x", "pki/root/issue/x", "pki/sign/x"] {
            assert!(MintPath::new(Engine::Pki, bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn stored_values_are_refused_with_the_reason() {
        for kv in ["kv", "kv-v2"] {
            assert!(Engine::try_from(kv.to_owned()).unwrap_err().contains("neither an early end nor an expiry"));
        }
        assert!(Engine::try_from("transit".to_owned()).is_err());
    }

    #[test]
    fn ids_from_the_target_must_stand_under_our_path() {
        let path = "database/creds/app";
        assert!(check_lease_id(path, "database/creds/app/AbC123.ns01").is_ok());
        for bad in [
            "",
            "database/creds/app",
            "database/creds/app/",
            "database/creds/app2/x",
            "database/creds/app/../x",
            "database/creds/app/x/y",
            "database/creds/app/%2e",
            "sys/x",
            "database/creds/app/a?b",
        ] {
            assert!(check_lease_id(path, bad).is_err(), "{bad:?}");
        }
        assert!(check_lease_id(path, &format!("{path}/{}", "x".repeat(ID_BYTES_MAX))).is_err());
        assert!(check_serial("60:ec:b1").is_ok());
        for bad in ["", "60/ec", "..", "zz"] {
            assert!(check_serial(bad).is_err(), "{bad:?}");
        }
    }
}
