//! Somebody is waited for: one line on stderr that says where, and on a terminal a sign that we are alive.
//! Nothing goes to stdout, which may be a child's or a script's.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::wire::visible::terminal_message;

/// How often the sign moves.
const TICK: Duration = Duration::from_millis(120);

/// The sign goes away when this is dropped.
pub struct Waiting(Option<ProgressBar>);

impl Waiting {
    /// For a person, at `url`.
    pub fn for_person(what: &str, url: &str) -> Self {
        eprintln!("countersign: {what}: {}", terminal_message(url));
        Self::quietly("waiting for a person")
    }

    /// For something, without a line that stays.
    pub fn quietly(what: &str) -> Self {
        let terminal = std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|t| t != "dumb");
        Self(terminal.then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}  {elapsed}") {
                bar.set_style(style);
            }
            bar.set_message(what.to_owned());
            bar.enable_steady_tick(TICK);
            bar
        }))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
