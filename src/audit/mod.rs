//! The record that anyone can check: Merkle tree, frame and segment formats, checkpoints, proofs, offline verification.
//! Reads journals; the one that writes them is `store::embedded::journal`. Payloads are opaque bytes here.

pub mod ahead;
pub mod checkpoint;
pub mod disk;
pub mod error;
pub mod frame;
pub mod head;
pub mod merkle;
pub mod note;
pub mod pick;
pub mod proof;
pub mod reader;
pub mod scan;
pub mod segment;
pub mod verify;
pub mod walk;

pub use error::{Break, Error};
