//! The JSON types that server and client share. Unknown members are errors in both directions.

pub mod agent;
pub mod problem;
pub mod reviewer;
pub mod strict_json;
pub mod times;
pub mod visible;
pub mod words;

pub use problem::Problem;
