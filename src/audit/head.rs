//! The head file: how far the journal had been acknowledged, and whether it was closed cleanly. It stands beside
//! the segments so that the last record, too, can't be damaged or dropped unnoticed. Unkeyed: no seal.
//!
//! ```text
//! offset size   (integers big-endian)
//!      0    8  magic "CSJHEAD" 01
//!      8    8  last acknowledged sequence number (0: none)
//!     16   32  its leaf hash (zero: none)
//!     48    8  size of the last checkpoint written (0: none)
//!     56    4  1 if closed cleanly: nothing but zeros follows the record; else 0
//!     60    4  CRC-32C of bytes 0..60
//! ```
//!
//! It is rewritten in place after each group, not synced: after a power cut it may lag, never lead. It lies
//! within one sector, so a write is whole or not there.

use std::path::Path;

use super::disk::{Disk, read_small};
use super::error::{Break, Error, IoContext as _};
use super::merkle::Hash;

/// The file's name in the journal folder.
pub const FILE_NAME: &str = "head";
/// Its size in bytes.
pub const HEAD_BYTES: usize = 64;
const MAGIC: [u8; 8] = *b"CSJHEAD\x01";

/// What the head file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Last acknowledged record.
    pub seq: u64,
    /// Its leaf hash.
    pub leaf: Hash,
    /// Size of the last checkpoint that was written.
    pub checkpoint_size: u64,
    /// The writer closed the journal: nothing may follow.
    pub closed: bool,
}

impl Head {
    /// Of a journal without records.
    pub const EMPTY: Self = Self { seq: 0, leaf: Hash::ZERO, checkpoint_size: 0, closed: false };

    /// As it stands in the file.
    pub fn encode(&self) -> [u8; HEAD_BYTES] {
        let mut out = [0; HEAD_BYTES];
        out[..8].copy_from_slice(&MAGIC);
        out[8..16].copy_from_slice(&self.seq.to_be_bytes());
        out[16..48].copy_from_slice(&self.leaf.0);
        out[48..56].copy_from_slice(&self.checkpoint_size.to_be_bytes());
        out[59] = u8::from(self.closed);
        let crc = crc32c::crc32c(&out[..60]);
        out[60..].copy_from_slice(&crc.to_be_bytes());
        out
    }

    /// Reads it; `None` for anything that [`Head::encode`] didn't write.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; HEAD_BYTES] = bytes.try_into().ok()?;
        let long = |at: usize| bytes[at..].first_chunk::<8>().map_or(0, |b| u64::from_be_bytes(*b));
        let head = Self {
            seq: long(8),
            leaf: Hash::from_slice(&bytes[16..])?,
            checkpoint_size: long(48),
            closed: bytes[59] == 1,
        };
        (head.encode() == *bytes).then_some(head)
    }

    /// Reads the head of a journal folder; `Ok(None)` if there is no such file.
    pub fn load(disk: &dyn Disk, dir: &Path) -> Result<Option<Self>, Error> {
        let path = dir.join(FILE_NAME);
        // A running writer rewrites it in place: a torn read is gone at the next try.
        let mut tries = 0;
        loop {
            let Some(bytes) = read_small(disk, &path, HEAD_BYTES * 2).at("read", &path)? else { return Ok(None) };
            match Self::decode(&bytes) {
                Some(head) => return Ok(Some(head)),
                None if tries < 3 => tries += 1,
                None => return Err(damaged(bytes.len()).into()),
            }
        }
    }
}

/// What the operator can do about a head that is not there or not good.
const REMAKE: &str = "restore `head` from the same backup as the segments; without one, check the journal with \
     `countersign audit verify DIR --key VERIFIER --checkpoint FILE --without-head` and, if it is whole, remake the head \
     as the broker's user, with the broker stopped, with \
     `countersign audit verify DIR --key VERIFIER --checkpoint FILE --remake-head`";

fn damaged(len: usize) -> Break {
    Break {
        file: FILE_NAME.into(),
        offset: 0,
        seq: 0,
        expected: format!("{HEAD_BYTES} bytes with magic and checksum"),
        found: format!("{len} bytes that don't fit"),
        meaning: "the head file was damaged; it says how far records were acknowledged".into(),
        action: REMAKE.into(),
    }
}

/// The break of a journal that has segments and no head.
pub(crate) fn missing(last_seq: u64) -> Break {
    Break {
        file: FILE_NAME.into(),
        offset: 0,
        seq: last_seq,
        expected: "the file `head` beside the segments".into(),
        found: "no such file".into(),
        meaning: "how far records were acknowledged is not known: the last ones could have been dropped".into(),
        action: REMAKE.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_every_flipped_bit_is_seen() {
        for closed in [true, false] {
            let head = Head { seq: 3, leaf: Hash([4; 32]), checkpoint_size: 2, closed };
            let mut bytes = head.encode();
            assert_eq!(Head::decode(&bytes), Some(head));
            for bit in 0..bytes.len() * 8 {
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(Head::decode(&bytes), None, "bit {bit}");
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
            assert_eq!(Head::decode(&bytes[1..]), None);
        }
    }
}
