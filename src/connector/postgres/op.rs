//! The steps that need rights, each one statement and one transaction: as a DO block of the broker's own
//! (`direct`), or as a call of the operator's function with the very same body (`functions`).

use std::time::Duration;

use serde_json::Value;
use tokio_postgres::SimpleQueryMessage;
use tokio_postgres::types::Type;

use super::fail::Fail;
use super::pool::Conn;
use super::settings::Setup;

/// A step at the target. What goes in and out stands at the top of its SQL file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Makes a lease's role.
    Mint,
    /// Cuts its groups and its login.
    Cut,
    /// Takes the groups of many, in one statement.
    Shut,
    /// Sends the sessions of many away. Needs no rights but membership.
    Expel,
    /// Drops it with what it owns here.
    Drop,
    /// Makes the broker a member of it, or of groups, in a way that nobody can block.
    Reach,
    /// Terminates its sessions. Needs no rights but membership.
    Hush,
    /// Drops some of what it owns here. Needs no rights but membership.
    Shed,
}

impl Op {
    /// All of them.
    pub const ALL: [Self; 8] =
        [Self::Mint, Self::Cut, Self::Shut, Self::Expel, Self::Drop, Self::Reach, Self::Hush, Self::Shed];

    /// Its name as a function of the operator's.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mint => "mint",
            Self::Cut => "cut",
            Self::Shut => "shut",
            Self::Expel => "expel",
            Self::Drop => "drop",
            Self::Reach => "reach",
            Self::Hush => "hush",
            Self::Shed => "shed",
        }
    }

    /// Its body: a PL/pgSQL block over `p_in` and `p_out`.
    pub const fn body(self) -> &'static str {
        match self {
            Self::Mint => include_str!("sql/mint.sql"),
            Self::Cut => include_str!("sql/cut.sql"),
            Self::Shut => include_str!("sql/shut.sql"),
            Self::Expel => include_str!("sql/expel.sql"),
            Self::Drop => include_str!("sql/drop.sql"),
            Self::Reach => include_str!("sql/reach.sql"),
            Self::Hush => include_str!("sql/hush.sql"),
            Self::Shed => include_str!("sql/shed.sql"),
        }
    }

    /// True if the broker's login needs more than membership in the lease.
    pub const fn needs_rights(self) -> bool {
        matches!(self, Self::Mint | Self::Cut | Self::Shut | Self::Drop | Self::Reach)
    }

    /// Does it. The input goes in as hex digits or as a parameter, so nothing in it can become SQL.
    pub async fn run(self, setup: Setup, conn: &Conn, input: &Value, deadline: Duration) -> Result<Value, Fail> {
        let input = input.to_string();
        let out = if setup == Setup::Functions && self.needs_rights() {
            let call = format!("SELECT countersign.{}($1::text::jsonb)::text", self.name());
            let ask = async { conn.client.query_typed_one(&call, &[(&input, Type::TEXT)]).await?.try_get(0) };
            conn.exchange(deadline, ask).await?
        } else {
            // Two commands in one message are one transaction: the answer is part of it.
            let block = format!(
                "DO $countersign$DECLARE p_in jsonb := convert_from(decode('{}', 'hex'), 'UTF8')::jsonb; p_out jsonb; BEGIN\n\
                 {}\nPERFORM set_config('countersign.out', p_out::text, true); END $countersign$; \
                 SELECT current_setting('countersign.out')",
                hex::encode(&input),
                self.body()
            );
            let messages = conn.exchange(deadline, conn.client.simple_query(&block)).await?;
            messages
                .into_iter()
                .find_map(|m| match m {
                    SimpleQueryMessage::Row(row) => Some(row.get(0).map(str::to_owned)),
                    _ => None,
                })
                .flatten()
        };
        let unreadable = || Fail::Lost(format!("an answer to {} that can't be read", self.name()));
        serde_json::from_str(&out.ok_or_else(unreadable)?).map_err(|_| unreadable())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The two set-ups can't drift apart: the shipped functions have these bodies word for word.
    #[test]
    fn the_shipped_functions_have_the_same_bodies() {
        let shipped = include_str!("../../../config/postgres/11-broker-functions.sql");
        for op in Op::ALL.into_iter().filter(|op| op.needs_rights()) {
            assert!(shipped.contains(op.body()), "body of {} in config/postgres/11-broker-functions.sql", op.name());
            assert!(shipped.contains(&format!("FUNCTION countersign.{}(p_in jsonb", op.name())));
        }
    }

    #[test]
    fn no_body_can_close_the_block_that_holds_it() {
        for op in Op::ALL {
            assert!(!op.body().contains('$'), "{}", op.name());
        }
    }
}
