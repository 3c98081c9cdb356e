//! Segment files: their names and their header. The frames behind the header are in `frame.rs`.
//!
//! ```text
//! offset size   (integers big-endian)
//!      0    8  magic "CSJSEG" 0D 0A
//!      8    4  format version, 1
//!     12    4  zero
//!     16    8  sequence number of the first record in this file
//!     24    8  size of the Merkle tree before that record (always the sequence number minus 1)
//!     32    8  when the file was made, milliseconds since 1970
//!     40   32  leaf hash of the record before (zero if none)
//!     72   32  root of the Merkle tree before that record
//!    104    4  zero
//!    108    4  CRC-32C of bytes 0..108
//! ```
//!
//! After the last frame come zeros (space reserved beforehand) or the end of the file. A segment gets its
//! name only when the header is durable, so a file under a segment's name never lacks one.

use std::path::Path;

use super::disk::Disk;
use super::error::{Error, IoContext as _, Mismatch};
use super::merkle::Hash;

/// Bytes of the header; the first frame starts here.
pub const HEADER_BYTES: usize = 112;
/// The format that this version writes and reads.
pub const FORMAT_VERSION: u32 = 1;
/// Most segments in one journal: at 64 MiB each, 64 TiB.
pub const SEGMENTS_MAX: usize = 1 << 20;
const MAGIC: [u8; 8] = *b"CSJSEG\r\n";

/// The name of the segment that starts with record `first_seq`.
pub fn file_name(first_seq: u64) -> String {
    format!("journal-{first_seq:020}.seg")
}

/// The first sequence number that a segment's name says; `None` for any other file.
pub fn first_seq_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("journal-")?.strip_suffix(".seg")?;
    (digits.len() == 20 && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok())?
}

/// The segments of a folder: first sequence numbers, ascending.
pub fn list(disk: &dyn Disk, dir: &Path) -> Result<Vec<u64>, Error> {
    let names = disk.list(dir).at("list the journal folder", dir)?;
    let mut found: Vec<u64> = names.iter().filter_map(|name| first_seq_of(name)).collect();
    if found.len() > SEGMENTS_MAX {
        return Err(Error::Limit { what: "the number of segments", size: found.len(), max: SEGMENTS_MAX });
    }
    found.sort_unstable();
    Ok(found)
}

/// A segment's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Sequence number of the first record.
    pub first_seq: u64,
    /// When the file was made, milliseconds since 1970.
    pub made_ms: u64,
    /// Leaf hash of the record before.
    pub prev: Hash,
    /// Root of the Merkle tree before the first record.
    pub root: Hash,
}

impl Header {
    /// As it stands in the file.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&FORMAT_VERSION.to_be_bytes());
        out[16..24].copy_from_slice(&self.first_seq.to_be_bytes());
        out[24..32].copy_from_slice(&self.first_seq.wrapping_sub(1).to_be_bytes());
        out[32..40].copy_from_slice(&self.made_ms.to_be_bytes());
        out[40..72].copy_from_slice(&self.prev.0);
        out[72..104].copy_from_slice(&self.root.0);
        let crc = crc32c::crc32c(&out[..108]);
        out[108..].copy_from_slice(&crc.to_be_bytes());
        out
    }

    /// Reads a header, or says what was expected and what was found.
    pub fn decode(bytes: &[u8]) -> Result<Self, Mismatch> {
        let wrong = |expected: String, found: String| Err(Mismatch { expected, found });
        let Some(bytes) = bytes.first_chunk::<HEADER_BYTES>() else {
            return wrong(format!("a segment header of {HEADER_BYTES} bytes"), format!("{} bytes", bytes.len()));
        };
        let short = |at: usize| bytes[at..].first_chunk::<4>().map_or(0, |b| u32::from_be_bytes(*b));
        let long = |at: usize| bytes[at..].first_chunk::<8>().map_or(0, |b| u64::from_be_bytes(*b));
        if bytes[..8] != MAGIC {
            return wrong("a segment header, starting CSJSEG".into(), format!("bytes {}", hex::encode(&bytes[..8])));
        }
        let (said, is) = (short(108), crc32c::crc32c(&bytes[..108]));
        if said != is {
            return wrong(format!("a header with checksum {said:08x}"), format!("one with {is:08x}"));
        }
        if short(8) != FORMAT_VERSION {
            let found = format!("version {}: it was written by another release", short(8));
            return wrong(format!("format version {FORMAT_VERSION}"), found);
        }
        let first_seq = long(16);
        if first_seq == 0 || long(24) != first_seq - 1 || short(12) != 0 || short(104) != 0 {
            return wrong("a tree size that fits the first record".into(), format!("{} and {first_seq}", long(24)));
        }
        let hash = |at: usize| Hash::from_slice(&bytes[at..]).unwrap_or(Hash::ZERO);
        Ok(Self { first_seq, made_ms: long(32), prev: hash(40), root: hash(72) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_round_trip_and_every_flipped_bit_is_seen() {
        let header = Header { first_seq: 12, made_ms: 5, prev: Hash([1; 32]), root: Hash([2; 32]) };
        let mut bytes = header.encode();
        assert_eq!(Header::decode(&bytes), Ok(header));
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&bytes).is_err(), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        assert!(Header::decode(&bytes[..50]).is_err());
    }

    #[test]
    fn only_exact_names_are_segments() {
        assert_eq!(first_seq_of(&file_name(42)), Some(42));
        assert_eq!(first_seq_of(&file_name(u64::MAX)), Some(u64::MAX));
        for bad in ["journal-1.seg", "journal-+0000000000000000001.seg", "journal-99999999999999999999.seg", "head"] {
            assert_eq!(first_seq_of(bad), None, "{bad}");
        }
    }
}
