//! The parts of the model; `tests/model.rs` says what is explored.

pub mod cast;
pub mod examples;
pub mod kept;
pub mod story;
pub mod world;
