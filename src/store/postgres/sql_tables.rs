//! The tables of a real database: each question is one of the statements of `sql.rs`.

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio_postgres::types::ToSql;

use super::connect::{Db, Session};
use super::sql::{self, Texts};
use super::tables::{Claimed, Kind, KnownBy, NewTail, Row, Run, Snapshot, Standing, Tables, Trouble, Write, WriteId};
use super::{OpenError, Settings, hash, num, schema, unnum};
use crate::audit::merkle::Hash;
use crate::core::digest::Digest;
use crate::core::id::{GrantId, LeaseId, Timestamp};
use crate::store::Job;

impl Kind {
    const fn number(self) -> i16 {
        match self {
            Self::Other => 0,
            Self::Freeze => 1,
            Self::Run => 2,
        }
    }
}

/// A database, and the schema in it.
pub(super) struct SqlTables {
    db: Db,
    schema: String,
    texts: Texts,
    /// Of the one task that writes and reads on: it never waits for a free one.
    own: Mutex<Option<Session>>,
}

impl SqlTables {
    /// Connects to nothing yet.
    pub(super) fn new(settings: &Settings) -> Result<Self, OpenError> {
        let (db, texts) = (Db::new(settings)?, Texts::new(&settings.schema));
        Ok(Self { db, schema: settings.schema.clone(), texts, own: Mutex::new(None) })
    }

    /// Asks once, in the session that is kept for it.
    async fn once(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<tokio_postgres::Row>, Trouble> {
        let kept = self.own.lock().take();
        let mut session = match kept {
            Some(session) => session,
            None => self.db.session().await?,
        };
        let outcome = session.query(sql, params).await;
        if !matches!(outcome, Err(Trouble::Lost(_))) {
            *self.own.lock() = Some(session);
        }
        outcome
    }

    /// Rows by their keys; nothing is asked if there are none.
    async fn rows(&self, sql: &str, keys: &[Vec<u8>]) -> Result<Vec<tokio_postgres::Row>, Trouble> {
        if keys.is_empty() { Ok(Vec::new()) } else { self.db.query(sql, &[&keys]).await }
    }
}

#[async_trait]
impl Tables for SqlTables {
    async fn now(&self) -> Result<Timestamp, Trouble> {
        let rows = self.db.query("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint", &[]).await?;
        Ok(Timestamp(rows.first().map_or(0, |row| unnum(row.get(0)))))
    }

    async fn prepare(&self) -> Result<(), OpenError> {
        schema::migrate(&self.db, &self.schema).await
    }

    async fn has_keys(&self, keys: &Digest) -> Result<bool, Trouble> {
        let ours = keys.as_bytes().to_vec();
        let say = "INSERT INTO $S.house VALUES (true, $1) ON CONFLICT (one) DO NOTHING";
        self.db.query(&sql::text(say, &self.schema), &[&ours]).await?;
        let rows = self.db.query(&sql::text("SELECT keys FROM $S.house", &self.schema), &[]).await?;
        Ok(rows.first().is_some_and(|row| row.get::<_, Vec<u8>>(0) == ours))
    }

    async fn load(&self) -> Result<Snapshot, Trouble> {
        let mut session = self.db.session().await?;
        let texts = &self.texts.load;
        let read = session.exchange(async |client| {
            let transaction = client
                .build_transaction()
                .isolation_level(tokio_postgres::IsolationLevel::RepeatableRead)
                .read_only(true)
                .start()
                .await?;
            let tail = transaction.query_one(&texts[0], &[]).await?;
            let told = transaction.query(&texts[1], &[&Kind::Freeze.number(), &Kind::Run.number()]).await?;
            let holdings = transaction.query(&texts[2], &[]).await?;
            let open = transaction.query(&texts[3], &[]).await?;
            let checkpoint_size: i64 = transaction.query_one(&texts[4], &[]).await?.try_get(0)?;
            transaction.commit().await?;
            Ok((tail, told, holdings, open, checkpoint_size))
        });
        let (tail, told, holdings, open, checkpoint_size) = read.await?;
        let bodies = |rows: Vec<tokio_postgres::Row>| rows.iter().map(|row| row.get(0)).collect();
        Ok(Snapshot {
            tail: NewTail {
                seq: unnum(tail.get(0)),
                leaf: hash(tail.get(1))?,
                tree: tail.get(2),
                at: Timestamp(unnum(tail.get(3))),
            },
            told: told.iter().map(|row| (unnum(row.get(0)), row.get(1))).collect(),
            holdings: bodies(holdings),
            open: bodies(open),
            checkpoint_size: unnum(checkpoint_size),
        })
    }

    async fn write(&self, write: &Write) -> Result<bool, Trouble> {
        let columns = Columns::of(write);
        Ok(!self.once(&self.texts.write, &columns.params()).await?.is_empty())
    }

    async fn since(&self, seq: u64) -> Result<Vec<Row>, Trouble> {
        let read = |row: &tokio_postgres::Row| {
            let bad = |e: tokio_postgres::Error| Trouble::Unreadable(format!("a record in the database: {e}"));
            let id: Vec<u8> = row.try_get(4).map_err(bad)?;
            Ok(Row {
                seq: unnum(row.try_get(0).map_err(bad)?),
                at: Timestamp(unnum(row.try_get(1).map_err(bad)?)),
                leaf: hash(row.try_get(2).map_err(bad)?)?,
                payload: row.try_get(3).map_err(bad)?,
                write: WriteId::try_from(id).unwrap_or_default(),
            })
        };
        self.once(&self.texts.since, &[&num(seq)]).await?.iter().map(read).collect()
    }

    async fn standing(&self, run: Run) -> Result<Option<Standing>, Trouble> {
        let rows = self.once(&self.texts.standing, &[&run]).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        Ok(Some(Standing { seq: unnum(row.get(0)), leaf: hash(row.get(1))?, is_over: row.get(2) }))
    }

    async fn grants(&self, ids: &[GrantId]) -> Result<Vec<Vec<u8>>, Trouble> {
        let rows = self.rows(&self.texts.grants, &bytes_of(ids)).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    async fn twins(&self, digests: &[Digest]) -> Result<Vec<(Digest, GrantId)>, Trouble> {
        let keys: Vec<Vec<u8>> = digests.iter().map(|d| d.as_bytes().to_vec()).collect();
        let rows = self.rows(&self.texts.twins, &keys).await?;
        let twin = |row: &tokio_postgres::Row| {
            let twin: Vec<u8> = row.get(0);
            let digest = digests.iter().find(|d| d.as_bytes()[..] == twin)?;
            Some((*digest, grant_id(row.get(1))?))
        };
        Ok(rows.iter().filter_map(twin).collect())
    }

    async fn tasks(&self, keys: &[Vec<u8>]) -> Result<Vec<Vec<u8>>, Trouble> {
        Ok(self.rows(&self.texts.tasks, keys).await?.iter().map(|row| row.get(0)).collect())
    }

    async fn decided(&self, limit: usize) -> Result<Vec<Vec<u8>>, Trouble> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        Ok(self.db.query(&self.texts.decided, &[&limit]).await?.iter().map(|row| row.get(0)).collect())
    }

    async fn records(&self, id: GrantId) -> Result<Vec<(u64, Vec<u8>)>, Trouble> {
        let rows = self.db.query(&self.texts.events, &[&id.as_bytes().to_vec()]).await?;
        Ok(rows.iter().map(|row| (unnum(row.get(0)), row.get(1))).collect())
    }

    async fn history(&self, agent: &[u8], recent: usize) -> Result<KnownBy, Trouble> {
        let rows = self.db.query(&self.texts.history, &[&agent, &num(recent as u64)]).await?;
        let Some(row) = rows.first() else { return Ok(KnownBy::default()) };
        let (recent, active): (Vec<Vec<u8>>, Option<Vec<u8>>) = (row.get(1), row.get(2));
        Ok(KnownBy {
            first: row.get::<_, Option<i64>>(0).map(|ms| Timestamp(unnum(ms))),
            recent: recent.iter().filter_map(|id| grant_id(id)).collect(),
            active: active.and_then(|id| grant_id(&id)),
        })
    }

    async fn claim(&self, now: Timestamp, limit: usize, run: Run, lease_ms: u64) -> Result<Vec<Claimed>, Trouble> {
        let most = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = self.db.query(&self.texts.claim, &[&num(now.0), &most, &run, &num(lease_ms)]).await?;
        let claimed = |row: &tokio_postgres::Row| {
            let (job, at) = (job_of(row.get(0), row.get(1))?, Timestamp(unnum(row.get(2))));
            Some(Claimed { rank: row.get(4), at, job, epoch: row.get(3) })
        };
        Ok(rows.iter().filter_map(claimed).collect())
    }

    async fn release(&self, job: Job, run: Run, epoch: i64) -> Result<(), Trouble> {
        let (grant, lease) = job_key(job);
        self.db.query(&self.texts.release, &[&grant, &lease, &run, &epoch]).await?;
        Ok(())
    }

    async fn abandoned(&self) -> Result<Vec<(GrantId, LeaseId)>, Trouble> {
        let rows = self.db.query(&self.texts.abandoned, &[]).await?;
        let lease = |row: &tokio_postgres::Row| match job_of(row.get(0), row.get(1)) {
            Some(Job::Lease(grant, lease)) => Some((grant, lease)),
            _ => None,
        };
        Ok(rows.iter().filter_map(lease).collect())
    }

    async fn join(&self, lasts_ms: u64) -> Result<Run, Trouble> {
        let rows = self.db.query(&self.texts.join, &[&num(lasts_ms)]).await?;
        rows.first().map(|row| row.get(0)).ok_or_else(|| Trouble::Lost("no run was begun".into()))
    }

    async fn renew(&self, run: Run, lasts_ms: u64) -> Result<Option<(u64, Hash)>, Trouble> {
        let rows = self.db.query(&self.texts.renew, &[&run, &num(lasts_ms)]).await?;
        rows.first().map(|row| Ok((unnum(row.get(0)), hash(row.get(1))?))).transpose()
    }

    async fn leave(&self, run: Run) -> Result<(), Trouble> {
        self.db.query(&self.texts.leave, &[&run]).await?;
        Ok(())
    }

    async fn declare(&self, but: Run) -> Result<Vec<Run>, Trouble> {
        Ok(self.db.query(&self.texts.declare, &[&but]).await?.iter().map(|row| row.get(0)).collect())
    }

    async fn beat(&self, grants: &[GrantId]) -> Result<(), Trouble> {
        self.db.query(&self.texts.beat, &[&bytes_of(grants)]).await?;
        Ok(())
    }

    async fn silent_ms(&self, grants: &[GrantId]) -> Result<Vec<(GrantId, u64)>, Trouble> {
        let rows = self.db.query(&self.texts.beats, &[&bytes_of(grants)]).await?;
        Ok(rows.iter().filter_map(|row| Some((grant_id(row.get(0))?, unnum(row.get(1))))).collect())
    }

    async fn checkpoint(&self, size: u64, leaf: &Hash, note: &str) -> Result<(), Trouble> {
        self.db.query(&self.texts.checkpoint, &[&num(size), &note, &leaf.0.as_slice()]).await?;
        Ok(())
    }

    async fn prune(&self, reach: Timestamp) -> Result<(), Trouble> {
        self.db.query(&self.texts.prune[0], &[]).await?;
        self.db.query(&self.texts.prune[1], &[&num(reach.0)]).await?;
        self.db.query(&self.texts.prune[2], &[]).await?;
        Ok(())
    }
}

/// A write as the statement takes it: one array a column.
struct Columns<'a> {
    base: (i64, &'a [u8]),
    next: (i64, &'a [u8], &'a [u8], i64),
    run: Run,
    id: &'a [u8],
    event: Events<'a>,
    grant: Grants<'a>,
    tasks: &'a [Vec<u8>],
    holding: Holdings<'a>,
    due: Due,
}

#[derive(Default)]
struct Events<'a> {
    seq: Vec<i64>,
    at: Vec<i64>,
    kind: Vec<i16>,
    grant: Vec<Option<Vec<u8>>>,
    left: Vec<i32>,
    leaf: Vec<&'a [u8]>,
    payload: Vec<&'a [u8]>,
}

#[derive(Default)]
struct Grants<'a> {
    id: Vec<Vec<u8>>,
    version: Vec<i64>,
    is_open: Vec<bool>,
    over: Vec<i64>,
    twin: Vec<Option<Vec<u8>>>,
    agent: Vec<&'a [u8]>,
    asked_seq: Vec<i64>,
    asked_at: Vec<i64>,
    active_seq: Vec<Option<i64>>,
    body: Vec<&'a [u8]>,
}

#[derive(Default)]
struct Holdings<'a> {
    key: Vec<&'a [u8]>,
    until: Vec<i64>,
    body: Vec<&'a [u8]>,
}

#[derive(Default)]
struct Due {
    grant: Vec<Vec<u8>>,
    lease: Vec<Vec<u8>>,
    at: Vec<Option<i64>>,
    attempt: Vec<i64>,
    is_intended: Vec<bool>,
    rank: Vec<i16>,
}

impl<'a> Columns<'a> {
    fn of(write: &'a Write) -> Self {
        let (mut event, mut grant) = (Events::default(), Grants::default());
        let (mut holding, mut due) = (Holdings::default(), Due::default());
        for e in &write.records {
            event.seq.push(num(e.seq));
            event.at.push(num(e.at.0));
            event.kind.push(e.kind.number());
            event.grant.push(e.grant.map(|id| id.as_bytes().to_vec()));
            event.left.push(i32::try_from(e.left).unwrap_or(i32::MAX));
            event.leaf.push(&e.leaf.0);
            event.payload.push(&e.payload);
        }
        for g in &write.grants {
            grant.id.push(g.id.as_bytes().to_vec());
            grant.version.push(num(g.version));
            grant.is_open.push(g.is_open);
            grant.over.push(num(g.over.0));
            grant.twin.push(g.twin.map(|d| d.as_bytes().to_vec()));
            grant.agent.push(&g.agent);
            grant.asked_seq.push(num(g.asked_seq));
            grant.asked_at.push(num(g.asked_at.0));
            grant.active_seq.push(g.active_seq.map(num));
            grant.body.push(&g.body);
        }
        for h in &write.holdings {
            holding.key.push(&h.key);
            holding.until.push(num(h.until.0));
            holding.body.push(&h.body);
        }
        for d in &write.due {
            let (grant, lease) = job_key(d.job);
            due.grant.push(grant);
            due.lease.push(lease);
            due.at.push(d.at.map(|at| num(at.0)));
            due.attempt.push(d.attempt);
            due.is_intended.push(d.is_intended);
            due.rank.push(d.rank);
        }
        Self {
            base: (num(write.base.0), &write.base.1.0),
            next: (num(write.next.seq), &write.next.leaf.0, &write.next.tree, num(write.next.at.0)),
            run: write.run,
            id: &write.id,
            event,
            grant,
            tasks: &write.tasks,
            holding,
            due,
        }
    }

    /// The statement's parameters, in its order.
    fn params(&self) -> [&(dyn ToSql + Sync); 35] {
        let Self { base, next, run, id, event: e, grant: g, tasks, holding: h, due: d } = self;
        [
            &base.0,
            &base.1,
            &next.0,
            &next.1,
            &next.2,
            &next.3,
            run,
            id, //
            &e.seq,
            &e.at,
            &e.kind,
            &e.grant,
            &e.left,
            &e.leaf,
            &e.payload, //
            &g.id,
            &g.version,
            &g.is_open,
            &g.over,
            &g.twin,
            &g.agent,
            &g.asked_seq,
            &g.asked_at,
            &g.active_seq,
            &g.body,
            tasks,
            &h.key,
            &h.until,
            &h.body, //
            &d.grant,
            &d.lease,
            &d.at,
            &d.attempt,
            &d.is_intended,
            &d.rank,
        ]
    }
}

fn bytes_of(ids: &[GrantId]) -> Vec<Vec<u8>> {
    ids.iter().map(|id| id.as_bytes().to_vec()).collect()
}

fn grant_id(bytes: &[u8]) -> Option<GrantId> {
    bytes.try_into().ok().map(GrantId::from_bytes)
}

/// The row of a job: grant, and lease or nothing.
fn job_key(job: Job) -> (Vec<u8>, Vec<u8>) {
    let (grant, lease) = match job {
        Job::Deadline(grant) => (grant, Vec::new()),
        Job::Lease(grant, lease) => (grant, lease.as_bytes().to_vec()),
    };
    (grant.as_bytes().to_vec(), lease)
}

/// The job that a row stands for.
fn job_of(grant: &[u8], lease: &[u8]) -> Option<Job> {
    let grant = grant_id(grant)?;
    match lease {
        [] => Some(Job::Deadline(grant)),
        lease => Some(Job::Lease(grant, LeaseId::from_bytes(lease.try_into().ok()?))),
    }
}
