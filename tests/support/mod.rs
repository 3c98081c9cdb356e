//! The shipped example in a folder of its own, with the files that an operator has to provide.

#![allow(dead_code)] // each test file uses a part

use std::path::{Path, PathBuf};

use countersign::config::load::load;
use countersign::config::{Loaded, Problem};

pub const MAIN: &str = "countersign.toml";
pub const CAT: &str = "catalogue.toml";

pub struct Example {
    folder: tempfile::TempDir,
}

impl Example {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
        for sub in ["config/policies", "certs/bundles", "certs/secrets"] {
            std::fs::create_dir_all(folder.path().join(sub)).unwrap();
        }
        for sub in ["", "policies"] {
            for entry in std::fs::read_dir(from.join(sub)).unwrap() {
                let path = entry.unwrap().path();
                if path.is_file() {
                    let to = folder.path().join("config").join(sub).join(path.file_name().unwrap());
                    std::fs::copy(&path, to).unwrap();
                }
            }
        }
        let key = rcgen::generate_simple_self_signed(["broker.corp.example".to_owned()]).unwrap();
        for (file, text) in [
            ("broker.pem", key.cert.pem()),
            ("broker-key.pem", key.signing_key.serialize_pem()),
            ("bundles/corp.example.pem", key.cert.pem()),
            ("billing-db-ca.pem", key.cert.pem()),
            ("openbao-ca.pem", key.cert.pem()),
            ("secrets/reviewer-login", "not-a-secret\n".to_owned()),
            ("secrets/billing-db", "not-a-secret\n".to_owned()),
            ("secrets/sandbox-db", "not-a-secret\n".to_owned()),
        ] {
            std::fs::write(folder.path().join("certs").join(file), text).unwrap();
        }
        Self { folder }
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join("config").join(name)
    }

    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.file(name)).unwrap()
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.file(name), text).unwrap();
    }

    /// Replaces all of `from`, which must be there.
    pub fn replace(&self, name: &str, from: &str, to: &str) {
        let text = self.read(name);
        assert!(text.contains(from), "{name} doesn't contain {from:?}");
        self.write(name, &text.replace(from, to));
    }

    pub fn append(&self, name: &str, more: &str) {
        self.write(name, &format!("{}\n{more}\n", self.read(name)));
    }

    pub fn load(&self) -> Result<Loaded, Vec<Problem>> {
        load(&self.file("countersign.toml")).map_err(|e| e.0)
    }
}

/// The line of the first text, from 1.
pub fn line(text: &str, part: &str) -> usize {
    text.lines().position(|l| l.contains(part)).unwrap_or_else(|| panic!("{part:?} isn't there")) + 1
}

pub fn problems(e: &Example) -> Vec<Problem> {
    e.load().err().unwrap_or_default()
}

/// `(file, what is replaced, by what, where the problem is, part of what is said)`.
pub type Case = (&'static str, &'static str, &'static str, &'static str, &'static str);

/// Each case: exactly one problem, at the line where `at` stands after the change (empty: a line isn't known).
pub fn each_is_refused(cases: &[Case]) {
    for (file, from, to, at, says) in cases {
        let e = Example::new();
        let text = e.read(file);
        assert!(text.contains(from), "{file} has no {from:?}");
        e.write(file, &text.replacen(from, to, 1));
        let found = problems(&e);
        assert_eq!(found.len(), 1, "{to:?}: {found:#?}");
        let place = if at.is_empty() { (*file).to_owned() } else { format!("{file}:{}", line(&e.read(file), at)) };
        assert_eq!(found[0].place, place, "{to:?}: {found:#?}");
        assert!(found[0].what.contains(says), "{to:?}: {found:#?}");
    }
}
