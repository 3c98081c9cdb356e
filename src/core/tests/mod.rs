//! The pure core, driven through random histories and judged by an oracle that shares no code with it.
//! `world` plays the broker, `steps` says what may be tried, `oracle` judges, `histories` runs it all.

/// Leaves with `Err("what was broken")` unless the condition holds.
macro_rules! ensure {
    ($cond:expr, $($says:tt)+) => {
        if !$cond {
            return Err(format!($($says)+));
        }
    };
}

mod digests;
mod directed;
mod histories;
mod lease_story;
mod make;
mod oracle;
mod probes;
mod steps;
mod strictness;
mod uses;
mod world;

/// What a check answers: the guarantee that was broken, and how.
type Checked = Result<(), String>;
