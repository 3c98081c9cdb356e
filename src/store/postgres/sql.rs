//! Every statement that is run often. Plain SQL: no session state, no advisory locks, no notifications.

/// Puts the schema in.
pub(super) fn text(template: &str, schema: &str) -> String {
    // The name was checked: letters, digits and `_` only.
    template.replace("$S", schema)
}

/// The statements, with the schema in.
pub(super) struct Texts {
    pub(super) load: [String; 5],
    pub(super) write: String,
    pub(super) since: String,
    pub(super) standing: String,
    pub(super) grants: String,
    pub(super) twins: String,
    pub(super) tasks: String,
    pub(super) decided: String,
    pub(super) events: String,
    pub(super) history: String,
    pub(super) claim: String,
    pub(super) release: String,
    pub(super) abandoned: String,
    pub(super) join: String,
    pub(super) renew: String,
    pub(super) leave: String,
    pub(super) declare: String,
    pub(super) beat: String,
    pub(super) beats: String,
    pub(super) checkpoint: String,
    pub(super) prune: [String; 3],
}

impl Texts {
    pub(super) fn new(schema: &str) -> Self {
        let t = |template| text(template, schema);
        Self {
            load: [
                t("SELECT seq, leaf, tree, at_ms FROM $S.tail"),
                t("SELECT seq, payload FROM $S.event WHERE kind = $1 \
                   OR seq = (SELECT max(seq) FROM $S.event WHERE kind = $2) ORDER BY seq"),
                t("SELECT body FROM $S.holding WHERE length(body) > 0"),
                t("SELECT body FROM $S.grants WHERE is_open"),
                t("SELECT coalesce(max(size), 0) FROM $S.checkpoint"),
            ],
            write: t(WRITE),
            since: t("SELECT seq, at_ms, leaf, payload, write_id FROM $S.event WHERE seq > $1 ORDER BY seq LIMIT 2000"),
            standing: t("SELECT t.seq, t.leaf, coalesce((SELECT r.is_over FROM $S.run r WHERE r.run = $1), true) \
                 FROM $S.tail t"),
            grants: t("SELECT body FROM $S.grants WHERE id = ANY($1)"),
            twins: t("SELECT twin, id FROM $S.grants WHERE twin = ANY($1)"),
            tasks: t("SELECT key FROM $S.task WHERE key = ANY($1)"),
            decided: t("SELECT body FROM $S.grants WHERE NOT is_open ORDER BY over_ms DESC, id LIMIT $1"),
            events: t("SELECT seq, payload FROM $S.event WHERE grant_id = $1 ORDER BY seq"),
            history: t(HISTORY),
            claim: t(CLAIM),
            release: t("UPDATE $S.due SET owner = NULL, until = NULL \
                 WHERE grant_id = $1 AND lease_id = $2 AND owner = $3 AND epoch = $4"),
            abandoned: t("SELECT d.grant_id, d.lease_id FROM $S.due d JOIN $S.run r ON r.run = d.intended_by \
                 WHERE r.is_over"),
            join: t("INSERT INTO $S.run (began, until) \
                 VALUES (clock_timestamp(), clock_timestamp() + $1::bigint * interval '1 millisecond') RETURNING run"),
            renew: t("UPDATE $S.run SET until = clock_timestamp() + $2::bigint * interval '1 millisecond' \
                 WHERE run = $1 AND NOT is_over RETURNING (SELECT seq FROM $S.tail), (SELECT leaf FROM $S.tail)"),
            leave: t("UPDATE $S.run SET is_over = true WHERE run = $1"),
            declare: t("UPDATE $S.run SET is_over = true \
                 WHERE NOT is_over AND run <> $1 AND until < clock_timestamp() RETURNING run"),
            beat: t("INSERT INTO $S.life SELECT g, clock_timestamp() FROM unnest($1::bytea[]) AS l(g) \
                 ON CONFLICT (grant_id) DO UPDATE SET at = excluded.at"),
            beats: t("SELECT grant_id, (extract(epoch FROM clock_timestamp() - at) * 1000)::bigint FROM $S.life \
                 WHERE grant_id = ANY($1)"),
            checkpoint: t("INSERT INTO $S.checkpoint SELECT $1::bigint, $2::text, clock_timestamp() FROM $S.event \
                 WHERE seq = $1 AND leaf = $3 ON CONFLICT (size) DO NOTHING"),
            prune: [
                t("DELETE FROM $S.due WHERE at_ms IS NULL AND intended_by IS NULL"),
                t("DELETE FROM $S.holding WHERE until_ms < $1"),
                t("DELETE FROM $S.life WHERE at < clock_timestamp() - interval '7 days'"),
            ],
        }
    }
}

/// One statement, so no lock outlives an exchange. Everything hangs from `moved`: if somebody else was first, or this run
/// was declared over, there is nothing in it and nothing is written.
const WRITE: &str = "WITH moved AS (
  UPDATE $S.tail SET seq = $3, leaf = $4, tree = $5, at_ms = $6
  WHERE one AND seq = $1 AND leaf = $2 AND EXISTS (SELECT 1 FROM $S.run r WHERE r.run = $7 AND NOT r.is_over)
  RETURNING seq
), e AS (
  INSERT INTO $S.event (seq, at_ms, kind, grant_id, batch_left, leaf, payload, write_id, run)
  SELECT u.seq, u.at_ms, u.kind, u.grant_id, u.batch_left, u.leaf, u.payload, $8::bytea, $7::bigint
  FROM moved, unnest($9::bigint[], $10::bigint[], $11::smallint[], $12::bytea[], $13::integer[], $14::bytea[], $15::bytea[])
    AS u(seq, at_ms, kind, grant_id, batch_left, leaf, payload)
), g AS (
  INSERT INTO $S.grants (id, version, is_open, over_ms, twin, agent, asked_seq, asked_ms, active_seq, body)
  SELECT u.* FROM moved, unnest($16::bytea[], $17::bigint[], $18::boolean[], $19::bigint[], $20::bytea[], $21::bytea[],
    $22::bigint[], $23::bigint[], $24::bigint[], $25::bytea[])
    AS u(id, version, is_open, over_ms, twin, agent, asked_seq, asked_ms, active_seq, body)
  ON CONFLICT (id) DO UPDATE SET version = excluded.version, is_open = excluded.is_open, over_ms = excluded.over_ms,
    active_seq = coalesce(excluded.active_seq, grants.active_seq), body = excluded.body
), k AS (
  INSERT INTO $S.task (key) SELECT u.key FROM moved, unnest($26::bytea[]) AS u(key) ON CONFLICT (key) DO NOTHING
), h AS (
  INSERT INTO $S.holding (key, until_ms, body)
  SELECT u.* FROM moved, unnest($27::bytea[], $28::bigint[], $29::bytea[]) AS u(key, until_ms, body)
  ON CONFLICT (key) DO UPDATE SET until_ms = excluded.until_ms, body = excluded.body
), d AS (
  INSERT INTO $S.due (grant_id, lease_id, at_ms, attempt, intended_by, rank)
  SELECT u.grant_id, u.lease_id, u.at_ms, u.attempt, CASE WHEN u.is_intended THEN $7::bigint END, u.rank
  FROM moved, unnest($30::bytea[], $31::bytea[], $32::bigint[], $33::bigint[], $34::boolean[],
    $35::smallint[]) AS u(grant_id, lease_id, at_ms, attempt, is_intended, rank)
  ON CONFLICT (grant_id, lease_id) DO UPDATE SET at_ms = excluded.at_ms, attempt = excluded.attempt,
    intended_by = excluded.intended_by, rank = excluded.rank,
    owner = CASE WHEN due.at_ms = excluded.at_ms AND due.attempt = excluded.attempt THEN due.owner END,
    until = CASE WHEN due.at_ms = excluded.at_ms AND due.attempt = excluded.attempt THEN due.until END
)
SELECT seq FROM moved";

/// The deadline of a claim is on the database's clock; a run that is over holds none.
const CLAIM: &str = "WITH free AS (
  SELECT d.grant_id, d.lease_id FROM $S.due d
  WHERE d.at_ms <= $1 AND (d.until IS NULL OR d.until <= clock_timestamp()
    OR NOT EXISTS (SELECT 1 FROM $S.run r WHERE r.run = d.owner AND NOT r.is_over))
  ORDER BY d.rank, d.at_ms LIMIT $2 FOR UPDATE OF d SKIP LOCKED
)
UPDATE $S.due SET owner = $3, epoch = due.epoch + 1,
  until = clock_timestamp() + $4::bigint * interval '1 millisecond'
FROM free WHERE due.grant_id = free.grant_id AND due.lease_id = free.lease_id
  AND EXISTS (SELECT 1 FROM $S.run r WHERE r.run = $3 AND NOT r.is_over)
RETURNING due.grant_id, due.lease_id, due.at_ms, due.epoch, due.rank";

/// When an agent first asked, its latest requests, the latest that was in force.
const HISTORY: &str = "SELECT
  (SELECT g.asked_ms FROM $S.grants g WHERE g.agent = $1 ORDER BY g.asked_seq LIMIT 1),
  ARRAY(SELECT g.id FROM $S.grants g WHERE g.agent = $1 ORDER BY g.asked_seq DESC LIMIT $2),
  (SELECT g.id FROM $S.grants g WHERE g.agent = $1 AND g.active_seq IS NOT NULL ORDER BY g.active_seq DESC LIMIT 1)";
