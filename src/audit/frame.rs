//! The record frame: how one event stands in a segment. All integers are big-endian.
//!
//! ```text
//! offset size
//!      0    4  magic  F5 43 53 52 (F5 is in no UTF-8 text, so no JSON payload can imitate a frame)
//!      4    4  payload length n, at most PAYLOAD_BYTES_MAX
//!      8    4  CRC-32C of the whole frame without these four bytes, padding included
//!     12    8  durable: every record up to this sequence number was on disk when this frame was written
//!     20    2  how many records of the same batch follow; 0 in the last
//!     22    1  zero
//!     23    1  zero: the leaf prefix of RFC 6962, so that bytes 23.. are what the leaf hash is taken of
//!     24    8  sequence number, from 1; the leaf index is this minus 1          ┐
//!     32    8  broker's time, milliseconds since 1970                           │ the leaf's data
//!     40   32  leaf hash of the record before (zero for the first): the chain   │
//!     72    n  payload                                                          ┘
//!   72+n    p  zeros up to a multiple of 8
//! ```
//!
//! A batch is all or nothing: readers take it when its last frame is good, or not at all.

use super::error::{Error, Mismatch};
use super::merkle::{Hash, sha256};

/// Largest payload of one record, in bytes.
pub const PAYLOAD_BYTES_MAX: usize = 256 * 1024;
/// Most records in one batch.
pub const BATCH_RECORDS_MAX: usize = 4096;
/// Largest batch, frames and padding included, in bytes.
pub const BATCH_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Bytes of a frame before the payload.
pub const HEADER_BYTES: usize = 72;
/// Frames start at multiples of this.
pub const ALIGN_BYTES: usize = 8;
/// What a frame starts with.
pub const MAGIC: [u8; 4] = [0xF5, b'C', b'S', b'R'];

const LEAF_START: usize = 23;

/// Bytes of the frame around a payload of `payload` bytes.
pub const fn frame_len(payload: usize) -> usize {
    (HEADER_BYTES + payload).next_multiple_of(ALIGN_BYTES)
}

/// Checks a batch against the limits and returns the bytes of its frames.
pub fn check_batch<P: AsRef<[u8]>>(payloads: &[P]) -> Result<usize, Error> {
    let limit = |what, size, max| if size > max { Err(Error::Limit { what, size, max }) } else { Ok(()) };
    limit("the number of records in a batch", payloads.len(), BATCH_RECORDS_MAX)?;
    let mut total = 0;
    for payload in payloads {
        limit("an event's payload in bytes", payload.as_ref().len(), PAYLOAD_BYTES_MAX)?;
        total += frame_len(payload.as_ref().len());
    }
    limit("a batch in bytes", total, BATCH_BYTES_MAX)?;
    Ok(total)
}

/// What a frame says beside its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meta {
    /// Sequence number, from 1.
    pub seq: u64,
    /// The broker's time in milliseconds since 1970.
    pub at_ms: u64,
    /// Every record up to this one was durable when the frame was written.
    pub durable: u64,
    /// How many records of the same batch follow.
    pub batch_left: u16,
    /// Leaf hash of the record before.
    pub prev: Hash,
}

/// The leaf hash of a record that stands in no frame (a journal in a database).
pub fn leaf_of(seq: u64, at_ms: u64, prev: &Hash, payload: &[u8]) -> Hash {
    let mut bytes = Vec::with_capacity(HEADER_BYTES - LEAF_START + payload.len());
    bytes.push(0);
    bytes.extend_from_slice(&seq.to_be_bytes());
    bytes.extend_from_slice(&at_ms.to_be_bytes());
    bytes.extend_from_slice(&prev.0);
    bytes.extend_from_slice(payload);
    sha256(&bytes)
}

/// Appends the frame to `out` and returns its leaf hash. The payload keeps the limit (see [`check_batch`]).
pub fn encode(meta: &Meta, payload: &[u8], out: &mut Vec<u8>) -> Hash {
    debug_assert!(payload.len() <= PAYLOAD_BYTES_MAX);
    let start = out.len();
    let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&meta.durable.to_be_bytes());
    out.extend_from_slice(&meta.batch_left.to_be_bytes());
    out.extend_from_slice(&[0; 2]);
    out.extend_from_slice(&meta.seq.to_be_bytes());
    out.extend_from_slice(&meta.at_ms.to_be_bytes());
    out.extend_from_slice(&meta.prev.0);
    out.extend_from_slice(payload);
    let leaf = sha256(&out[start + LEAF_START..]);
    out.resize(start + frame_len(payload.len()), 0);
    let crc = crc(&out[start..]);
    out[start + 8..start + 12].copy_from_slice(&crc.to_be_bytes());
    leaf
}

fn crc(frame: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&frame[..8]), &frame[12..])
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The frame needs this many bytes; there are fewer.
    Short(usize),
    /// It doesn't start with [`MAGIC`].
    Magic([u8; 4]),
    /// The length is beyond the limit.
    Length(u32),
    /// The checksum in the frame, and the one of its bytes.
    Checksum(u32, u32),
    /// A byte that is always zero isn't.
    Reserved,
}

impl Fault {
    /// What should have been there, and what was, in words.
    pub fn describe(self) -> Mismatch {
        match self {
            Self::Short(need) => Mismatch::new(format!("a frame of {need} bytes"), "the end of the file before that"),
            Self::Magic(found) => {
                let expected = format!("a frame, starting {}", hex::encode(MAGIC));
                Mismatch::new(expected, format!("bytes {}", hex::encode(found)))
            }
            Self::Length(n) => {
                Mismatch::new(format!("a payload of at most {PAYLOAD_BYTES_MAX} bytes"), format!("a length of {n}"))
            }
            Self::Checksum(said, is) => {
                Mismatch::new(format!("bytes with checksum {said:08x}"), format!("bytes with {is:08x}"))
            }
            Self::Reserved => Mismatch::new("zeros in the reserved bytes", "something else"),
        }
    }
}

/// A frame that stands by itself: checksum right, chain and sequence not looked at.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    /// What it says.
    pub meta: Meta,
    /// The event.
    pub payload: &'a [u8],
    bytes: &'a [u8],
}

impl Frame<'_> {
    /// Its length with padding.
    pub const fn frame_len(&self) -> usize {
        self.bytes.len()
    }
    /// Its leaf hash. Costs a SHA-256 over the payload.
    pub fn leaf(&self) -> Hash {
        sha256(&self.bytes[LEAF_START..HEADER_BYTES + self.payload.len()])
    }
}

/// The whole frame's length, from its first bytes, or why there is none.
pub fn peek_len(bytes: &[u8]) -> Result<usize, Fault> {
    let Some((magic, rest)) = bytes.split_first_chunk::<4>() else { return Err(Fault::Short(HEADER_BYTES)) };
    if *magic != MAGIC {
        return Err(Fault::Magic(*magic));
    }
    let Some(len) = rest.first_chunk::<4>() else { return Err(Fault::Short(HEADER_BYTES)) };
    let len = u32::from_be_bytes(*len);
    match usize::try_from(len) {
        Ok(n) if n <= PAYLOAD_BYTES_MAX => Ok(frame_len(n)),
        _ => Err(Fault::Length(len)),
    }
}

/// Reads the frame at the start of `bytes`. Never panics, whatever the bytes.
pub fn decode(bytes: &[u8]) -> Result<Frame<'_>, Fault> {
    let total = peek_len(bytes)?;
    let Some(bytes) = bytes.get(..total) else { return Err(Fault::Short(total)) };
    // `total` is at least HEADER_BYTES, so every field is there.
    let field = |at: usize| bytes[at..].first_chunk::<8>().map_or(0, |b| u64::from_be_bytes(*b));
    let short = |at: usize| bytes[at..].first_chunk::<4>().map_or(0, |b| u32::from_be_bytes(*b));
    let said = short(8);
    let is = crc(bytes);
    if said != is {
        return Err(Fault::Checksum(said, is));
    }
    let end = HEADER_BYTES + short(4) as usize;
    if bytes[22..24] != [0, 0] || bytes[end..].iter().any(|b| *b != 0) {
        return Err(Fault::Reserved);
    }
    let meta = Meta {
        durable: field(12),
        batch_left: u16::from_be_bytes([bytes[20], bytes[21]]),
        seq: field(24),
        at_ms: field(32),
        prev: Hash::from_slice(&bytes[40..]).unwrap_or(Hash::ZERO),
    };
    Ok(Frame { meta, payload: &bytes[HEADER_BYTES..end], bytes })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::audit::merkle::leaf_hash;

    const META: Meta = Meta { seq: 7, at_ms: 8, durable: 6, batch_left: 1, prev: Hash([9; 32]) };

    #[test]
    fn round_trip_and_every_flipped_bit_is_seen() {
        for n in [0, 1, 7, 8, 9, 300] {
            let payload = vec![0xA5; n];
            let mut bytes = vec![1, 2, 3]; // `encode` appends
            let leaf = encode(&META, &payload, &mut bytes);
            bytes.drain(..3);
            assert_eq!(bytes.len(), frame_len(n));
            let frame = decode(&bytes).unwrap();
            assert_eq!((frame.meta, frame.payload, frame.leaf()), (META, &payload[..], leaf));
            assert_eq!(leaf_of(META.seq, META.at_ms, &META.prev, &payload), leaf);
            let mut data = [7u64.to_be_bytes(), 8u64.to_be_bytes()].concat();
            data.extend_from_slice(&[9; 32]);
            data.extend_from_slice(&payload);
            assert_eq!(leaf, leaf_hash(&data), "the leaf hash is RFC 6962's over the documented data");
            for bit in 0..bytes.len() * 8 {
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert!(decode(&bytes).is_err(), "bit {bit}");
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
            assert!(matches!(decode(&bytes[..bytes.len() - 1]), Err(Fault::Short(_))));
        }
    }

    #[test]
    fn limits_are_named_and_held() {
        assert!(check_batch(&[vec![0; PAYLOAD_BYTES_MAX]]).is_ok());
        assert!(matches!(
            check_batch(&[vec![0; PAYLOAD_BYTES_MAX + 1]]),
            Err(Error::Limit { max: PAYLOAD_BYTES_MAX, .. })
        ));
        assert!(check_batch(&[[0u8; 0]; BATCH_RECORDS_MAX]).is_ok());
        assert!(matches!(
            check_batch(&[[0u8; 0]; BATCH_RECORDS_MAX + 1]),
            Err(Error::Limit { max: BATCH_RECORDS_MAX, .. })
        ));
        let big = vec![vec![0u8; PAYLOAD_BYTES_MAX]; 16];
        assert!(matches!(check_batch(&big), Err(Error::Limit { max: BATCH_BYTES_MAX, .. })));
        let mut long = MAGIC.to_vec();
        long.extend_from_slice(&u32::try_from(PAYLOAD_BYTES_MAX + 1).unwrap().to_be_bytes());
        assert!(matches!(decode(&long), Err(Fault::Length(_))));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_without_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), framed: bool) {
            if framed && bytes.len() >= 8 {
                bytes[..4].copy_from_slice(&MAGIC);
                bytes[4..7].copy_from_slice(&[0; 3]);
            }
            prop_assert!(decode(&bytes).is_err());
        }
    }
}
