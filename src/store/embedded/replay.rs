//! From the journal to the view: records are read and parsed, added up, and what they add up to is kept, side by side.
//! Memory stays bounded whatever the journal's length: each of the three waits for the next.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Scope, ScopedJoinHandle};

use super::archive::Position;
use super::journal::Opened;
use super::{JournalLog, OpenError};
use crate::audit::reader::Records;
use crate::core::event::{Event, GrantEvent};
use crate::store::StoreError;
use crate::store::engine::{Archive, Keeper, Kept, Record, Snapshot, read_record};
use crate::store::view::View;

/// So many things change before they are given to the archive, while as many are being kept.
pub const REPLAY_CHUNK: usize = 8192;
/// Records that are handed on together.
const READ_CHUNK: usize = 256;
/// How many such hand-overs may wait.
const READ_AHEAD: usize = 8;

/// One record, parsed.
struct Read {
    seq: u64,
    leaf: [u8; 32],
    /// How many records of its batch follow.
    left: u16,
    record: Record,
}

type Chunk = Result<Vec<Read>, OpenError>;

/// Brings a view from where it stands to the journal's end. Returns how many records that took.
pub fn replay<A: Archive>(
    log: &JournalLog,
    archive: &A,
    view: &mut View,
    from: Position,
    opened: &Opened,
) -> Result<(Keeper, u64), OpenError> {
    let mut keeper = Keeper::at(from.seq, from.leaf);
    if opened.last_seq <= from.seq {
        return Ok((keeper, 0));
    }
    let records = log.records(from.seq + 1)?;
    std::thread::scope(|scope| {
        let (to_us, chunks) = sync_channel(READ_AHEAD);
        scope.spawn(move || read(records, &to_us));
        let mut keeping = Keeping::start(scope, archive);
        let mut replayed = 0;
        for chunk in chunks {
            for Read { seq, leaf, left, record } in chunk? {
                lend(archive, view, &record.event, from)?;
                view.replay(seq, record.at, &record.event, keeper.going_on(seq, leaf))?;
                replayed += 1;
                if left == 0 && keeper.waiting() >= REPLAY_CHUNK {
                    keeping.keep(&mut keeper, view)?;
                }
            }
        }
        keeping.finish(&mut keeper, view)?;
        Ok((keeper, replayed))
    })
}

/// Reads until the end, an error, or until nobody wants more.
fn read(mut records: Records, to: &SyncSender<Chunk>) {
    loop {
        let mut chunk = Vec::with_capacity(READ_CHUNK);
        let mut next = || -> Result<Option<Read>, OpenError> {
            let Some(record) = records.next_record()? else { return Ok(None) };
            let (seq, leaf, left) = (record.meta.seq, record.leaf.0, record.meta.batch_left);
            Ok(Some(Read { seq, leaf, left, record: read_record(seq, record.payload)? }))
        };
        let end = loop {
            match next() {
                Ok(Some(one)) => chunk.push(one),
                Ok(None) => break Some(Ok(())),
                Err(error) => break Some(Err(error)),
            }
            if chunk.len() >= READ_CHUNK {
                break None;
            }
        };
        let is_over = to.send(Ok(chunk)).is_err() || end.is_some();
        if let Some(Err(error)) = end {
            let _ = to.send(Err(error));
        }
        if is_over {
            return;
        }
    }
}

/// The archive keeps one snapshot while the next comes together.
struct Keeping<'scope> {
    to: Option<SyncSender<Snapshot>>,
    kept: Receiver<Result<Kept, StoreError>>,
    under_way: usize,
    _thread: ScopedJoinHandle<'scope, ()>,
}

impl<'scope> Keeping<'scope> {
    fn start<'env, A: Archive>(scope: &'scope Scope<'scope, 'env>, archive: &'env A) -> Self {
        let (to, snapshots) = sync_channel::<Snapshot>(1);
        let (told, kept) = sync_channel(2);
        let thread = scope.spawn(move || {
            for snapshot in snapshots {
                let done = archive.keep(&snapshot).map(|()| Kept::of(snapshot));
                let failed = done.is_err();
                if told.send(done).is_err() || failed {
                    return;
                }
            }
        });
        Self { to: Some(to), kept, under_way: 0, _thread: thread }
    }

    /// Takes out of memory what was kept since, and hands over what is lacking.
    fn keep(&mut self, keeper: &mut Keeper, view: &mut View) -> Result<(), StoreError> {
        // One at a time: what has changed since is told by the keeper, and must not be forgotten with what was kept.
        while self.under_way > 0 {
            self.take(keeper, view)?;
        }
        let Some(snapshot) = keeper.lacking(view) else { return Ok(()) };
        if self.to.as_ref().is_none_or(|to| to.send(snapshot).is_err()) {
            // It stopped over an error, which it has told.
            while self.under_way > 0 {
                self.take(keeper, view)?;
            }
            return Err(StoreError::Unreadable("the view's writer stopped".to_owned()));
        }
        self.under_way += 1;
        Ok(())
    }

    fn take(&mut self, keeper: &mut Keeper, view: &mut View) -> Result<(), StoreError> {
        self.under_way -= 1;
        let kept = self.kept.recv().map_err(|_| StoreError::Unreadable("the view's writer stopped".to_owned()))??;
        keeper.forget(view, &kept);
        Ok(())
    }

    /// Waits for what is under way. What has changed since is kept by the store itself.
    fn finish(mut self, keeper: &mut Keeper, view: &mut View) -> Result<(), StoreError> {
        self.to = None;
        while self.under_way > 0 {
            self.take(keeper, view)?;
        }
        Ok(())
    }
}

/// Brings back into memory what an event is about, if it was archived.
fn lend<A: Archive>(archive: &A, view: &mut View, event: &Event, from: Position) -> Result<(), StoreError> {
    let Event::Grant { id, what, version } = event else { return Ok(()) };
    // An archive that was empty can't know of what begins here.
    let is_new = from.seq == 0 && *version == 1;
    if !is_new
        && view.get(*id).is_none()
        && let Some(stored) = archive.grant(*id)?
    {
        view.restore_grant(stored);
    }
    let agent = match &**what {
        GrantEvent::Requested { request } => Some(&request.agent.id),
        GrantEvent::Activated { .. } => view.get(*id).map(|s| &s.grant.request.agent.id),
        _ => None,
    };
    if let Some(agent) = agent.filter(|a| view.agent(a).is_none()).cloned()
        && let Some(known) = archive.agent(&agent)?
    {
        view.restore_agent(agent, known);
    }
    Ok(())
}
