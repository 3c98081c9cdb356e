//! The tables, in numbered steps. A step only adds, and has defaults for what the version before doesn't write: nodes of
//! both work side by side while an upgrade goes on.

use super::connect::Db;
use super::tables::Trouble;
use super::{OpenError, sql};

/// The step that this version needs.
pub const STEP: i32 = 1;

/// What each step does; `$S` is the schema.
const STEPS: [&str; STEP as usize] = [r"
CREATE TABLE IF NOT EXISTS $S.tail (
  one boolean PRIMARY KEY CHECK (one), seq bigint NOT NULL, leaf bytea NOT NULL, tree bytea NOT NULL, at_ms bigint NOT NULL);
CREATE TABLE IF NOT EXISTS $S.event (
  seq bigint PRIMARY KEY, at_ms bigint NOT NULL, kind smallint NOT NULL, grant_id bytea, batch_left integer NOT NULL,
  leaf bytea NOT NULL, payload bytea NOT NULL, write_id bytea NOT NULL, run bigint NOT NULL);
CREATE INDEX IF NOT EXISTS event_grant ON $S.event (grant_id, seq) WHERE grant_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS event_kind ON $S.event (kind, seq) WHERE kind > 0;
CREATE TABLE IF NOT EXISTS $S.grants (
  id bytea PRIMARY KEY, version bigint NOT NULL, is_open boolean NOT NULL, over_ms bigint NOT NULL, twin bytea UNIQUE,
  agent bytea NOT NULL, asked_seq bigint NOT NULL, asked_ms bigint NOT NULL, active_seq bigint, body bytea NOT NULL);
CREATE INDEX IF NOT EXISTS grants_open ON $S.grants (id) WHERE is_open;
CREATE INDEX IF NOT EXISTS grants_over ON $S.grants (over_ms DESC, id) WHERE NOT is_open;
CREATE INDEX IF NOT EXISTS grants_asked ON $S.grants (agent, asked_seq);
CREATE INDEX IF NOT EXISTS grants_active ON $S.grants (agent, active_seq) WHERE active_seq IS NOT NULL;
CREATE TABLE IF NOT EXISTS $S.task (key bytea PRIMARY KEY);
CREATE TABLE IF NOT EXISTS $S.holding (key bytea PRIMARY KEY, until_ms bigint NOT NULL, body bytea NOT NULL);
CREATE TABLE IF NOT EXISTS $S.due (
  grant_id bytea NOT NULL, lease_id bytea NOT NULL, at_ms bigint, attempt bigint NOT NULL, intended_by bigint, rank smallint NOT NULL DEFAULT 0,
  owner bigint, epoch bigint NOT NULL DEFAULT 0, until timestamptz, PRIMARY KEY (grant_id, lease_id));
CREATE INDEX IF NOT EXISTS due_at ON $S.due (at_ms) WHERE at_ms IS NOT NULL;
CREATE INDEX IF NOT EXISTS due_intended ON $S.due (intended_by) WHERE intended_by IS NOT NULL;
CREATE TABLE IF NOT EXISTS $S.run (
  run bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, began timestamptz NOT NULL, until timestamptz NOT NULL,
  is_over boolean NOT NULL DEFAULT false);
CREATE TABLE IF NOT EXISTS $S.life (grant_id bytea PRIMARY KEY, at timestamptz NOT NULL);
CREATE TABLE IF NOT EXISTS $S.checkpoint (size bigint PRIMARY KEY, note text NOT NULL, at timestamptz NOT NULL);
CREATE TABLE IF NOT EXISTS $S.house (one boolean PRIMARY KEY CHECK (one), keys bytea NOT NULL);
INSERT INTO $S.tail VALUES (true, 0, decode(repeat('00', 32), 'hex'), '', 0) ON CONFLICT (one) DO NOTHING;
"];

/// Brings the tables to this version's step. Several nodes may do it at once: a step is one transaction, and whoever
/// comes second finds it done. A database that is further is refused.
pub(super) async fn migrate(db: &Db, schema: &str) -> Result<(), OpenError> {
    let mut session = db.session().await?;
    let make = sql::text(
        "CREATE SCHEMA IF NOT EXISTS $S; \
         CREATE TABLE IF NOT EXISTS $S.step (step integer PRIMARY KEY, at timestamptz NOT NULL)",
        schema,
    );
    // Two that make the same at once: one of them is told that it exists already, in one of several ways.
    let mut tries = 0;
    loop {
        let is_there = sql::text("SELECT to_regclass('$S.step') IS NOT NULL", schema);
        if session.query(&is_there, &[]).await?.first().is_some_and(|row| row.get::<_, bool>(0)) {
            break;
        }
        tries += 1;
        match session.exchange(async |c| c.batch_execute(&make).await).await {
            Err(Trouble::Refused(code, _)) if tries < 5 && matches!(code.as_str(), "42P07" | "42P06" | "23505") => {}
            outcome => outcome?,
        }
    }
    let now = sql::text("SELECT coalesce(max(step), 0) FROM $S.step", schema);
    for _ in 0..STEPS.len() * 4 {
        let is: i32 = session.query(&now, &[]).await?.first().map_or(0, |row| row.get(0));
        if is > STEP {
            return Err(OpenError::Newer { is, knows: STEP });
        }
        let Some(step) = usize::try_from(is).ok().and_then(|n| STEPS.get(n)) else { return Ok(()) };
        let step = sql::text(
            &format!("BEGIN; INSERT INTO $S.step VALUES ({}, clock_timestamp()); {step} COMMIT", is + 1),
            schema,
        );
        match session.exchange(async |c| c.batch_execute(&step).await).await {
            // Somebody else did it.
            Err(Trouble::Refused(code, _)) if matches!(code.as_str(), "23505" | "40001" | "40P01") => {
                session.exchange(async |c| c.batch_execute("ROLLBACK").await).await?;
            }
            outcome => outcome?,
        }
    }
    Err(OpenError::Settings("the tables could not be brought up to date: others change them at the same time".into()))
}
