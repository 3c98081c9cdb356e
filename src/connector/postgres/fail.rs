//! The one error of this room: what PostgreSQL or the way to it said, sorted by what may be concluded from it.

use tokio_postgres::error::{DbError, SqlState};

/// Longest text of a server's that is passed on, in characters.
const MESSAGE_CHARS_MAX: usize = 300;

/// A statement or a connection that failed. Never holds a secret: secrets are in no statement.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Fail {
    /// No connection: nothing was sent.
    #[error("can't connect to PostgreSQL at {place}: {why}")]
    Unreachable {
        /// Server and database.
        place: String,
        /// What was said.
        why: String,
        /// The server's own code, if it gave one.
        code: Option<SqlState>,
        /// True if anything answered there at all.
        answered: bool,
    },
    /// The server refused a statement, so it had no effect.
    #[error("PostgreSQL refused: {message} (SQLSTATE {})", .code.code())]
    Refused {
        /// The server's code.
        code: SqlState,
        /// The server's text.
        message: String,
    },
    /// The connection was lost, or no answer came in time: it may have had its effect.
    #[error("no clear answer from PostgreSQL: {0}")]
    Lost(String),
}

impl Fail {
    /// Sorts the error of a statement that was sent.
    pub fn of_statement(e: &tokio_postgres::Error) -> Self {
        match e.as_db_error() {
            // A FATAL error may come after the commit, before its answer.
            Some(db) if is_fatal(db) => Self::Lost(text(db)),
            Some(db) => Self::Refused { code: db.code().clone(), message: text(db) },
            None => Self::Lost(with_source(e)),
        }
    }

    /// Sorts the error of a connection attempt.
    pub fn of_connect(place: String, e: &tokio_postgres::Error) -> Self {
        let (why, code) = match e.as_db_error() {
            Some(db) => (text(db), Some(db.code().clone())),
            None => (with_source(e), None),
        };
        Self::Unreachable { place, why, code, answered: !is_silence(e) }
    }

    /// The server's code, if it gave one.
    pub fn code(&self) -> Option<&SqlState> {
        match self {
            Self::Refused { code, .. } => Some(code),
            Self::Unreachable { code, .. } => code.as_ref(),
            Self::Lost(_) => None,
        }
    }

    /// True if trying again later may help: not for wrong passwords, missing databases, missing rights.
    pub fn is_transient(&self) -> bool {
        self.code().is_none_or(|code| {
            let class = &code.code()[..2];
            matches!(class, "08" | "40" | "53" | "55" | "57" | "58" | "XX")
        })
    }
}

/// True if nothing came back: no such name, nobody at the address.
fn is_silence(e: &tokio_postgres::Error) -> bool {
    use std::error::Error;
    use std::io::ErrorKind::{
        AddrNotAvailable, ConnectionRefused, HostUnreachable, NetworkDown, NetworkUnreachable, NotFound, TimedOut,
    };
    let Some(e) = e.source().and_then(|s| s.downcast_ref::<std::io::Error>()) else { return false };
    let nobody =
        [AddrNotAvailable, ConnectionRefused, HostUnreachable, NetworkDown, NetworkUnreachable, NotFound, TimedOut];
    // The standard library has no kind for a name that can't be resolved.
    nobody.contains(&e.kind()) || e.to_string().starts_with("failed to lookup address")
}

fn is_fatal(db: &DbError) -> bool {
    use tokio_postgres::error::Severity::{Fatal, Panic};
    matches!(db.parsed_severity(), Some(Fatal | Panic)) || matches!(db.severity(), "FATAL" | "PANIC")
}

fn text(db: &DbError) -> String {
    db.message().chars().filter(|c| !c.is_control()).take(MESSAGE_CHARS_MAX).collect()
}

fn with_source(e: &tokio_postgres::Error) -> String {
    use std::error::Error;
    match e.source() {
        Some(source) => format!("{e}: {source}"),
        None => e.to_string(),
    }
}
