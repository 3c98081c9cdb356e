//! The single writer: takes what is queued, writes it as one group, syncs once, answers all. After any error of
//! a write or a sync it takes nothing until reopened: a sync that failed once may lie the second time.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::active::{Active, check_present};
use super::error::At as _;
use super::queue::{Job, Queue, Reply};
use super::recover::{Place, Ready, Recovered};
use super::state::Shared;
use super::{Acknowledged, Appended, Batch, Error, Opened, Options};
use crate::audit::checkpoint::{self, Checkpoint};
use crate::audit::disk::{Disk, lock_journal, make_dir, replace};
use crate::audit::frame::{self, BATCH_BYTES_MAX, Meta};
use crate::audit::head::Head;
use crate::audit::merkle::Hash;
use crate::audit::pick::Mark;
use crate::audit::segment::{self, Header};
use crate::audit::walk::{SegmentEnd, Walked};
use crate::failpoint::{self, Point};
use crate::mutation::Mutation;
use crate::time::Clock;

/// Most bytes of frames that share one sync. One batch is always taken.
pub const GROUP_BYTES_MAX: usize = BATCH_BYTES_MAX;
/// So long the writer sleeps when there is nothing to do.
const IDLE_WAIT: Duration = Duration::from_secs(3600);
/// The buffer for a group is given back when it has grown beyond this.
const BUFFER_KEPT_BYTES: usize = 1024 * 1024;

/// The writer, driven step by step: by its thread, or by a simulation.
pub struct Stepper {
    queue: Arc<Queue>,
    shared: Arc<Shared>,
    clock: Arc<dyn Clock>,
    place: Place,
    checkpoints: Vec<Checkpoint>,
    ready: Option<Ready>,
    /// What is durable and was acknowledged: sequence number and leaf.
    durable: (u64, Hash),
    buf: Vec<u8>,
    group: Vec<(Reply<Appended>, Appended)>,
    /// Where the batches in `buf` will stand.
    places: Vec<Mark>,
    /// The journal up to the end of the last finished segment: the active one alone is walked at a reopening.
    base: Walked,
    /// The reserve of the options; what is open may ask for more.
    reserve_least: u64,
    /// A checkpoint isn't written for time alone before this moment, in milliseconds of the boot clock.
    sign_after_ms: u64,
    /// Which finished segment (or the head) is looked at next.
    look: usize,
    last_note: Option<(u64, String)>,
    lock: Option<Box<dyn Send + Sync>>,
}

impl Stepper {
    pub(super) fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        options: Options,
        clock: Arc<dyn Clock>,
        known: &Acknowledged,
        queue: Arc<Queue>,
    ) -> Result<(Self, Opened), Error> {
        make_dir(&*disk, dir).at("make the journal folder", dir)?;
        let lock = lock_journal(&*disk, dir)?;
        let reserve_least = options.reserve_bytes;
        let place = Place { disk, dir: dir.to_owned(), options };
        let recovered = place.recover(known, false, Walked::default(), clock.wall().0)?;
        let sign_after_ms = clock.boot_ms() + place.options.checkpoint_secs * 1000;
        let mut stepper = Self {
            queue,
            shared: Arc::default(),
            clock,
            place,
            checkpoints: known.checkpoints.clone(),
            ready: None,
            durable: (0, Hash::ZERO),
            buf: Vec::new(),
            group: Vec::new(),
            places: Vec::new(),
            base: Walked::default(),
            reserve_least,
            sign_after_ms,
            look: 0,
            last_note: None,
            lock: Some(lock),
        };
        let opened = stepper.take_up(recovered);
        // What an earlier run wrote and had no time to sign.
        stepper.sign_if(true);
        Ok((stepper, opened))
    }

    fn take_up(&mut self, recovered: Recovered) -> Opened {
        let Recovered { ready, opened, base, index } = recovered;
        self.base = base;
        self.shared.set_index(index);
        self.durable = (ready.frontier.size(), ready.leaf);
        self.shared.set_end(&ready.frontier, ready.leaf);
        self.shared.reserve_ready_bytes.store(ready.active.space().min(self.place.options.reserve_bytes), Relaxed);
        self.shared.set_poisoned(None);
        self.ready = Some(ready);
        opened
    }

    pub(super) fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// Waits for work and does one group of it. False: the journal is closed.
    pub fn step_blocking(&mut self) -> bool {
        let wait = if self.is_unsigned() {
            Duration::from_millis(self.sign_after_ms.saturating_sub(self.clock.boot_ms()).max(1))
        } else {
            IDLE_WAIT
        };
        let jobs = self.queue.take(wait, GROUP_BYTES_MAX);
        self.work(jobs)
    }

    /// Does one group of work if there is any. False: the journal is closed.
    pub fn step(&mut self) -> bool {
        let jobs = self.queue.take(Duration::ZERO, GROUP_BYTES_MAX);
        self.work(jobs)
    }

    fn work(&mut self, jobs: Vec<Job>) -> bool {
        if self.lock.is_none() {
            return false;
        }
        let mut looked = false;
        for job in jobs {
            match job {
                Job::Append { batch, bytes, reply } => {
                    if !looked {
                        looked = true;
                        self.guarded(Self::look_after_files);
                    }
                    self.append(&batch, bytes, reply);
                }
                Job::Checkpoint { reply } => {
                    self.flush();
                    let written = self.checkpoint();
                    answer(reply, written);
                }
                Job::Reopen { reply } => {
                    self.flush();
                    let reopened = self.reopen();
                    answer(reply, reopened);
                }
                Job::Close { reply } => {
                    self.flush();
                    let closed = self.close();
                    self.lock = None;
                    if let Some(reply) = reply {
                        answer(reply, closed);
                    }
                    return false;
                }
            }
        }
        self.flush();
        let due = self.signed_size() + self.place.options.checkpoint_records;
        self.sign_if(self.durable.0 >= due || self.clock.boot_ms() >= self.sign_after_ms);
        self.guarded(|_, ready| ready.active.write_ahead());
        true
    }

    /// How many records the last checkpoint covers.
    fn signed_size(&self) -> u64 {
        self.ready.as_ref().map_or(0, |r| r.head.head.checkpoint_size)
    }

    /// Are there durable records that no checkpoint covers, though one could be written?
    fn is_unsigned(&self) -> bool {
        self.place.options.signer.is_some() && self.ready.is_some() && self.durable.0 > self.signed_size()
    }

    /// Writes a checkpoint over what has none, if it is time.
    fn sign_if(&mut self, due: bool) {
        if due && self.is_unsigned() {
            if self.checkpoint().is_err() {
                self.shared.checkpoints_failed.fetch_add(1, Relaxed);
            }
            // Once it has failed, too, it is tried again after a while only.
            self.sign_after_ms = self.clock.boot_ms() + self.place.options.checkpoint_secs * 1000;
        }
    }

    /// Runs a part of the work; an error of it stops the writer. Does nothing when it is stopped already.
    fn guarded<T>(&mut self, part: impl FnOnce(&mut Self, &mut Ready) -> Result<T, Error>) -> Option<T> {
        let mut ready = self.ready.take()?;
        match part(self, &mut ready) {
            Ok(done) => {
                self.ready = Some(ready);
                Some(done)
            }
            Err(e) => {
                // The open files go with `ready`: nothing is ever synced again on a handle that has failed.
                self.shared.next_generation();
                self.shared.set_poisoned(Some(e.clone()));
                for (reply, _) in self.group.drain(..) {
                    answer(reply, Err(e.clone()));
                }
                self.buf.clear();
                self.places.clear();
                None
            }
        }
    }

    /// Are our files still ours? The one that is written to each time, one of the others in turn.
    fn look_after_files(&mut self, ready: &mut Ready) -> Result<(), Error> {
        let disk = &*self.place.disk;
        check_present(disk, &ready.active.path, ready.active.stat)?;
        self.look = if self.look >= ready.finished.len() { 0 } else { self.look + 1 };
        match ready.finished.get(self.look) {
            Some((path, stat)) => check_present(disk, path, *stat),
            None => ready.head.check_present(disk),
        }
    }

    /// Adds a batch to the group, or answers why not.
    fn append(&mut self, batch: &Batch, bytes: usize, reply: Reply<Appended>) {
        if let Err(why) = self.admit(batch, bytes) {
            // Whatever the reason: what is queued behind it may rest on it, also behind a reopening. What is stale rests on
            // something that changed the number already.
            if !matches!(why, Error::Stale) {
                self.shared.next_generation();
            }
            return answer(reply, Err(why));
        }
        let Some(ready) = self.ready.as_mut() else { return answer(reply, Err(Error::WriterGone)) };
        let at_ms = self.clock.wall().0;
        let first_seq = ready.frontier.size() + 1;
        let offset = ready.active.end + self.buf.len() as u64;
        let place = Mark { seq: first_seq, segment: ready.active.first_seq, offset };
        self.places.extend((bytes > 0).then_some(place));
        for (i, payload) in batch.payloads.iter().enumerate() {
            let left = batch.payloads.len() - 1 - i;
            let meta = Meta {
                seq: ready.frontier.size() + 1,
                at_ms,
                durable: self.durable.0,
                // `enqueue` has checked the batch: BATCH_RECORDS_MAX is far below u16::MAX.
                batch_left: u16::try_from(left).unwrap_or(u16::MAX),
                prev: ready.leaf,
            };
            ready.leaf = frame::encode(&meta, payload, &mut self.buf);
            ready.frontier.push(ready.leaf);
        }
        let count = batch.payloads.len() as u64;
        self.group.push((reply, Appended { first_seq, count, at_ms, leaf: ready.leaf }));
    }

    /// May it be added, and is there space for it?
    fn admit(&mut self, batch: &Batch, bytes: usize) -> Result<(), Error> {
        if let Some(why) = self.shared.poisoned() {
            return Err(Error::Poisoned(Arc::new(why)));
        }
        let is_stale = batch.generation.is_some_and(|g| g != self.shared.generation());
        if is_stale && !Mutation::KeepWhatRestsOnRefused.is_on() {
            return Err(Error::Stale);
        }
        if bytes > 0 {
            self.place.options.reserve_bytes = self.reserve_least.max(batch.reserve_bytes);
        }
        match self.guarded(|this, ready| this.make_room(ready, bytes as u64, batch.ending)) {
            Some(true) => Ok(()),
            Some(false) => {
                self.shared.refused_no_space.fetch_add(1, Relaxed);
                Err(Error::NoSpace { dir: self.place.dir.clone() })
            }
            None => Err(self.shared.poisoned().unwrap_or(Error::WriterGone)),
        }
    }

    /// Space for `bytes` more in the group, in a new segment if the present one is full. False: there is none.
    fn make_room(&mut self, ready: &mut Ready, bytes: u64, ending: bool) -> Result<bool, Error> {
        let end = ready.active.end + self.buf.len() as u64;
        let is_full = end + bytes > self.place.options.segment_bytes && end > segment::HEADER_BYTES as u64;
        if bytes > 0 && is_full {
            self.flush_into(ready)?;
            // A segment starts only when all before it is durable: that is what makes a torn tail in any but the
            // last segment impossible. On a full disk endings go on in this one.
            if !self.roll(ready)? && !ending {
                return Ok(false);
            }
        }
        let end = ready.active.end + self.buf.len() as u64 + bytes;
        // A barrier needs no space.
        Ok(bytes == 0 || ready.active.ensure(end, ending, &self.place.options)?)
    }

    /// Goes on to the next segment. False: the disk is full.
    fn roll(&mut self, ready: &mut Ready) -> Result<bool, Error> {
        let (first_seq, root) = (ready.frontier.size() + 1, ready.frontier.root());
        let header = Header { first_seq, made_ms: self.clock.wall().0, prev: ready.leaf, root };
        let place = &self.place;
        let Some(next) = Active::create(&*place.disk, &place.dir, &header, &place.options)? else { return Ok(false) };
        failpoint::at(Point::RotateOpened);
        let mut old = std::mem::replace(&mut ready.active, next);
        old.finish()?;
        failpoint::at(Point::RotateEnded);
        ready.head.write(ready.head.head, true)?;
        failpoint::at(Point::RotateDone);
        self.base.segments.push(SegmentEnd { first_seq: old.first_seq, end: old.end });
        (self.base.frontier, self.base.leaf) = (ready.frontier.clone(), ready.leaf);
        ready.finished.push((old.path, old.stat));
        Ok(true)
    }

    fn flush(&mut self) {
        self.guarded(Self::flush_into);
    }

    /// One write and one sync for the whole group, then the answers.
    fn flush_into(&mut self, ready: &mut Ready) -> Result<(), Error> {
        let active = &mut ready.active;
        if !self.buf.is_empty() {
            failpoint::at(Point::AppendWrite);
            failpoint::last(Point::AppendTorn, || {
                _ = active.file.write_at(&self.buf[..self.buf.len() / 2], active.end);
            });
            active.file.write_at(&self.buf, active.end).at("write", &active.path)?;
            failpoint::at(Point::AppendWritten);
            if !Mutation::AckBeforeSync.is_on() {
                active.file.sync_data().at("sync", &active.path)?;
            }
            failpoint::at(Point::AppendSynced);
            active.end += self.buf.len() as u64;
            self.durable = (ready.frontier.size(), ready.leaf);
            self.shared.syncs.fetch_add(1, Relaxed);
            self.shared.bytes.fetch_add(self.buf.len() as u64, Relaxed);
            self.shared.reserve_ready_bytes.store(active.space().min(self.place.options.reserve_bytes), Relaxed);
            self.shared.note_places(self.places.drain(..));
            self.shared.set_end(&ready.frontier, ready.leaf);
            self.buf.clear();
            self.buf.shrink_to(BUFFER_KEPT_BYTES);
        }
        // Before the answers: what was acknowledged is known to be, even if we are killed right after.
        let head = if ready.head.head.seq == self.durable.0 {
            Ok(())
        } else {
            let head = Head { seq: self.durable.0, leaf: self.durable.1, ..ready.head.head };
            ready.head.write(head, false)
        };
        let has_work = !self.group.is_empty();
        if has_work {
            failpoint::at(Point::AppendHead);
        }
        for (reply, appended) in self.group.drain(..) {
            self.shared.batches.fetch_add(u64::from(appended.count > 0), Relaxed);
            self.shared.records.fetch_add(appended.count, Relaxed);
            answer(reply, Ok(appended));
        }
        if has_work {
            failpoint::at(Point::AppendAnswered);
        }
        // The group is durable and answered so; a head that can't be written stops what comes after.
        head
    }

    fn checkpoint(&mut self) -> Result<Option<String>, Error> {
        if let Some(why) = self.shared.poisoned() {
            return Err(Error::Poisoned(Arc::new(why)));
        }
        let Some(signer) = &self.place.options.signer else { return Ok(None) };
        let tip = self.shared.tip();
        if let Some((_, note)) = self.last_note.as_ref().filter(|(size, _)| *size == tip.seq) {
            return Ok(Some(note.clone()));
        }
        // Only what is durable is ever signed: two checkpoints of one journal never contradict each other.
        let note = Checkpoint::sign(signer, tip.seq, tip.root)?;
        let (disk, dir) = (&*self.place.disk, &self.place.dir);
        let path: PathBuf = dir.join(checkpoint::FILE_NAME);
        replace(disk, dir, checkpoint::FILE_NAME, note.as_bytes()).at("write", &path)?;
        failpoint::at(Point::CheckpointWritten);
        self.shared.checkpoints.fetch_add(1, Relaxed);
        self.last_note = Some((tip.seq, note.clone()));
        self.guarded(|_, ready| ready.head.write(Head { checkpoint_size: tip.seq, ..ready.head.head }, true));
        Ok(Some(note))
    }

    fn reopen(&mut self) -> Result<Opened, Error> {
        // What this process acknowledged is the strongest knowledge there is; what failed is cut, as its callers were told.
        let leaf = (self.durable.0 > 0).then_some(self.durable.1);
        let known = Acknowledged { view_seq: self.durable.0, view_leaf: leaf, checkpoints: self.checkpoints.clone() };
        // What was finished before the last roll was verified when it was written or when the journal was opened.
        let mut base = self.base.clone();
        base.index = self.shared.index();
        base.index.truncate(base.frontier.size());
        match self.place.recover(&known, true, base, self.clock.wall().0) {
            Ok(recovered) => Ok(self.take_up(recovered)),
            Err(e) => {
                self.shared.next_generation();
                self.shared.set_poisoned(Some(e.clone()));
                Err(e)
            }
        }
    }

    fn close(&mut self) -> Result<(), Error> {
        if let Some(why) = self.shared.poisoned() {
            return Err(Error::Poisoned(Arc::new(why)));
        }
        let signed = self.checkpoint();
        if let Some(mut ready) = self.ready.take() {
            ready.head.write(Head { closed: true, ..ready.head.head }, true)?;
        }
        signed.map(drop)
    }
}

impl Drop for Stepper {
    fn drop(&mut self) {
        // Whoever still enqueues gets an answer in place of waiting for ever.
        self.queue.close(None);
        self.queue.take(Duration::ZERO, usize::MAX);
    }
}

fn answer<T>(reply: Reply<T>, with: Result<T, Error>) {
    // The caller may have stopped waiting; what was written stays written.
    let _ = reply.send(with);
}
