//! The functional core: `decide(&state, command, now) → events` and `apply(state, &event)`.
//! No I/O, no clock, no randomness, no runtime. The simulator, the property tests and the production
//! broker run this same code.

pub mod decide;
mod decide_lease;
pub mod digest;
pub mod event;
pub mod grant;
pub mod id;
pub mod lease;
pub mod permission;
pub mod request;
pub mod revocability;
pub mod secret;
mod strict;
#[cfg(test)]
mod tests;
pub mod tier;
pub mod vote;
