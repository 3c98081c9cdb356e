//! What a node reads when it starts: everything that is open, in one snapshot of the database.

use super::connect::Db;
use super::state::Tail;
use super::write::kind;
use super::{OpenError, hash, sql, unnum};
use crate::audit::merkle::Frontier;
use crate::core::id::Timestamp;
use crate::store::StoreError;
use crate::store::engine::read_record;
use crate::store::holdings::Holding;
use crate::store::view::{Changed, Rest, Stored, View};

/// What was read.
pub(super) struct Loaded {
    pub(super) view: View,
    pub(super) tail: Tail,
    /// Of the latest checkpoint.
    pub(super) checkpoint_size: u64,
}

/// Everything at one moment.
struct Snapshot {
    tail: tokio_postgres::Row,
    events: Vec<tokio_postgres::Row>,
    holdings: Vec<tokio_postgres::Row>,
    open: Vec<tokio_postgres::Row>,
    checkpoint: i64,
}

pub(super) async fn load(db: &Db, schema: &str) -> Result<Loaded, OpenError> {
    let t = |template: &str| sql::text(template, schema);
    let texts = [
        t("SELECT seq, leaf, tree, at_ms FROM $S.tail"),
        t("SELECT seq, payload FROM $S.event WHERE kind = $1 \
           OR seq = (SELECT max(seq) FROM $S.event WHERE kind = $2) ORDER BY seq"),
        t("SELECT body FROM $S.holding WHERE length(body) > 0"),
        t("SELECT body FROM $S.grants WHERE is_open"),
        t("SELECT coalesce(max(size), 0) FROM $S.checkpoint"),
    ];
    let mut session = db.session().await?;
    let read = session
        .exchange(async |client| {
            let transaction = client
                .build_transaction()
                .isolation_level(tokio_postgres::IsolationLevel::RepeatableRead)
                .read_only(true)
                .start()
                .await?;
            let snapshot = Snapshot {
                tail: transaction.query_one(&texts[0], &[]).await?,
                events: transaction.query(&texts[1], &[&kind::FREEZE, &kind::RUN]).await?,
                holdings: transaction.query(&texts[2], &[]).await?,
                open: transaction.query(&texts[3], &[]).await?,
                checkpoint: transaction.query_one(&texts[4], &[]).await?.try_get(0)?,
            };
            transaction.commit().await?;
            Ok(snapshot)
        })
        .await?;
    Ok(build(read)?)
}

fn build(read: Snapshot) -> Result<Loaded, StoreError> {
    let seq = unnum(read.tail.get(0));
    let tree: Vec<u8> = read.tail.get(2);
    let bad = |what: &str| StoreError::Unreadable(format!("{what} in the database can't be read"));
    let tree = Frontier::from_bytes(seq, &tree).ok_or_else(|| bad("the tree in the table `tail`"))?;
    let tail = Tail { seq, leaf: hash(read.tail.get(1))?, tree };
    // Freezes and the latest start are few: told by their events.
    let mut told = View::default();
    for row in &read.events {
        let seq = unnum(row.get(0));
        let record = read_record(seq, row.get(1))?;
        told.replay(seq, record.at, &record.event, &mut Changed::default())?;
    }
    let freezes = told.freezes();
    let parse = |row: &tokio_postgres::Row| -> Result<Holding, StoreError> {
        serde_json::from_slice(row.get(0)).map_err(|_| bad("a row of the table `holding`"))
    };
    let mut view = View::default();
    view.restore_rest(Rest {
        holdings: read.holdings.iter().map(parse).collect::<Result<_, _>>()?,
        freezes: freezes.holding,
        freeze_epoch: freezes.epoch,
        last_run: told.last_run().0,
        last_at: Timestamp(unnum(read.tail.get(3))),
    });
    for row in &read.open {
        view.restore_grant(stored(row.get(0))?);
    }
    Ok(Loaded { view, tail, checkpoint_size: unnum(read.checkpoint) })
}

/// A grant as its row has it.
pub(super) fn stored(body: &[u8]) -> Result<Stored, StoreError> {
    serde_json::from_slice(body).map_err(|_| StoreError::Unreadable("a row of the table `grants` can't be read".into()))
}
