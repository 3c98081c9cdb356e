//! Checkpoints: size and root of the journal's tree as a signed note (<https://c2sp.org/tlog-checkpoint>).
//! One that is kept elsewhere proves later that the journal still extends what it was then.

use std::path::Path;

use super::disk::{Disk, read_small};
use super::error::{Break, Error, IoContext as _};
use super::merkle::Hash;
use super::note::{self, NOTE_BYTES_MAX, Signer, Verifier};
use super::walk::KnownRoot;

/// The newest checkpoint's name in the journal folder.
pub const FILE_NAME: &str = "checkpoint";

/// What a checkpoint says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Which journal: the name of the key that signs.
    pub origin: String,
    /// Number of records.
    pub size: u64,
    /// Root of the Merkle tree over them.
    pub root: Hash,
}

impl Checkpoint {
    /// Signs the tree of `size` leaves. The origin is the signer's name.
    pub fn sign(signer: &Signer, size: u64, root: Hash) -> Result<String, Error> {
        signer.sign(&format!("{}\n{size}\n{root}\n", signer.name()))
    }

    /// Reads a checkpoint that one of `trusted` signed, as the journal that the key is named after.
    pub fn open(bytes: &[u8], trusted: &[Verifier]) -> Result<Self, Error> {
        let checkpoint = Self::parse(note::open(bytes, trusted)?)?;
        if trusted.iter().any(|k| k.name() == checkpoint.origin) {
            Ok(checkpoint)
        } else {
            Err(Error::Note("this checkpoint is another journal's: its origin is not the name of the given key"))
        }
    }

    /// Reads a checkpoint without looking at its signatures: good against accidents, not against an attacker.
    pub fn read_unverified(bytes: &[u8]) -> Result<Self, Error> {
        Self::parse(note::parse(bytes)?.0)
    }

    fn parse(text: &str) -> Result<Self, Error> {
        const FORM: Error =
            Error::Note("this note is not a checkpoint: three lines of origin, size and root are wanted");
        // Extension lines may follow; they say nothing about the tree.
        let mut lines = text.strip_suffix('\n').ok_or(FORM)?.split('\n');
        let (Some(origin), Some(size), Some(root)) = (lines.next(), lines.next(), lines.next()) else {
            return Err(FORM);
        };
        if origin.is_empty() || lines.any(str::is_empty) {
            return Err(FORM);
        }
        let number: u64 = size.parse().map_err(|_| FORM)?;
        let hash = Hash::from_base64(root).ok_or(FORM)?;
        // One spelling only: no sign, no leading zero, canonical base64.
        if number.to_string() != size || hash.to_string() != root {
            return Err(FORM);
        }
        Ok(Self { origin: origin.to_owned(), size: number, root: hash })
    }

    /// As something that the journal must extend.
    pub fn known(&self, source: &str) -> KnownRoot {
        KnownRoot { size: self.size, root: self.root, source: source.to_owned() }
    }

    /// Reads the newest checkpoint beside the segments, if there is one. Without `trusted` keys its signature
    /// isn't looked at.
    pub fn load(disk: &dyn Disk, dir: &Path, trusted: &[Verifier]) -> Result<Option<Self>, Error> {
        let path = dir.join(FILE_NAME);
        let Some(bytes) = read_small(disk, &path, NOTE_BYTES_MAX).at("read", &path)? else { return Ok(None) };
        let read = if trusted.is_empty() { Self::read_unverified(&bytes) } else { Self::open(&bytes, trusted) };
        match read {
            Ok(checkpoint) => Ok(Some(checkpoint)),
            Err(e) => Err(broken("a checkpoint signed by a key of this journal", &e.to_string()).into()),
        }
    }
}

/// The break of a journal whose newest checkpoint is not there or not good.
pub(crate) fn broken(expected: &str, found: &str) -> Break {
    Break {
        file: FILE_NAME.into(),
        offset: 0,
        seq: 0,
        expected: expected.into(),
        found: found.into(),
        meaning: "the newest checkpoint was damaged, replaced or removed, or signed by a key that was not given".into(),
        action: "if the key was rotated, give the earlier verifier key too; else restore `checkpoint` from the copy \
                 that is kept elsewhere, and verify the journal against it"
            .into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_in_the_documented_form() {
        let signer = Signer::from_seed("broker.example/journal", &[7; 32]).unwrap();
        let note = Checkpoint::sign(&signer, 42, Hash([1; 32])).unwrap();
        assert!(note.starts_with("broker.example/journal\n42\nAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\n\n\u{2014} broker.example/journal "));
        let read = Checkpoint::open(note.as_bytes(), &[signer.verifier()]).unwrap();
        assert_eq!((read.size, read.root, &*read.origin), (42, Hash([1; 32]), "broker.example/journal"));
    }

    #[test]
    fn another_journals_checkpoint_is_refused() {
        let signer = Signer::from_seed("broker.example/journal", &[7; 32]).unwrap();
        let foreign = signer.sign(&format!("other.example\n1\n{}\n", Hash([1; 32]))).unwrap();
        assert!(Checkpoint::open(foreign.as_bytes(), &[signer.verifier()]).is_err());
    }

    #[test]
    fn one_spelling_only() {
        let signer = Signer::from_seed("o", &[7; 32]).unwrap();
        let root = Hash([1; 32]).to_string();
        for (body, fine) in [
            (format!("o\n1\n{root}\n"), true),
            (format!("o\n0\n{root}\nextension\n"), true),
            (format!("o\n01\n{root}\n"), false),
            (format!("o\n+1\n{root}\n"), false),
            (format!("o\n-1\n{root}\n"), false),
            (format!("o\n18446744073709551616\n{root}\n"), false),
            (format!("o\n1\n{}\n", root.trim_end_matches('=')), false),
            (format!("\n1\n{root}\n"), false),
            ("o\n1\n".to_owned(), false),
        ] {
            let note = signer.sign(&body).unwrap();
            assert_eq!(Checkpoint::open(note.as_bytes(), &[signer.verifier()]).is_ok(), fine, "{body}");
        }
    }
}
