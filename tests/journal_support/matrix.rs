//! A journal's whole life on a disk with faults, and what must be true of it whatever happened: written apart from the
//! journal, by the texts of the records alone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use countersign::audit;
use countersign::audit::head;
use countersign::audit::reader::read_from_on;
use countersign::audit::segment;
use countersign::audit::verify::{self, Report, Verified, remake_head_on, verify_on};
use countersign::store::embedded::journal::{Acknowledged, Batch, Error, Journal, Opened, Options, Pending, Stepper};

use crate::journal_support::mem_disk::{Left, MemDisk};
use crate::journal_support::{Choices, clock, key, small};

/// What comes after the fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextLife {
    /// The broker runs on; it is closed and started again at the end.
    GoesOn,
    /// The same, and then the power goes: nothing may rest on what only memory has.
    PowerCutAfterwards,
    /// The process is killed at the first error, and started again.
    KilledAtOnce,
}

/// Is a thing done right after space or the disk is back, at this many tries?
const TRIES: usize = 3;

/// What a broker does with its journal. A batch: how many records, and whether it is an ending.
enum Do {
    Group(&'static [(usize, bool)]),
    Checkpoint,
    Reopen,
    CloseAndStart,
}

const LIFE: [Do; 16] = [
    Do::Group(&[(1, false), (3, false)]),
    Do::Group(&[(1, true)]),
    Do::Group(&[(2, false), (1, true)]),
    Do::Checkpoint,
    Do::Group(&[(4, false)]),
    Do::Group(&[(1, false), (2, true), (1, false)]),
    Do::Reopen,
    Do::Group(&[(2, false)]),
    Do::Group(&[(1, true), (1, true)]),
    Do::CloseAndStart,
    Do::Group(&[(3, false)]),
    Do::Group(&[(1, true)]),
    Do::Group(&[(5, false), (1, false)]),
    Do::Checkpoint,
    Do::Group(&[(1, false)]),
    Do::CloseAndStart,
];

fn options() -> Options {
    Options { segment_bytes: 1800, checkpoint_records: 7, ..small() }
}

fn dir() -> PathBuf {
    PathBuf::from("/data/journal")
}

/// What a life has come to. Each record's text names its batch, its place in it, and how many there are.
#[derive(Clone)]
pub struct Life {
    disk: MemDisk,
    next: Option<NextLife>,
    batches: usize,
    /// Acknowledged: place in the journal → text.
    acked: BTreeMap<u64, String>,
    /// Told to have failed, by a writer that has been made ready again since: never to be seen.
    gone: BTreeSet<String>,
    /// Told to have failed, and not settled: there as a whole, or not.
    open: BTreeSet<String>,
    pub errors: Vec<String>,
    pub recovered: u32,
    pub heads_remade: u32,
}

impl Life {
    pub fn new(disk: MemDisk) -> Self {
        Self {
            disk,
            next: None,
            batches: 0,
            acked: BTreeMap::new(),
            gone: BTreeSet::new(),
            open: BTreeSet::new(),
            errors: Vec::new(),
            recovered: 0,
            heads_remade: 0,
        }
    }
    pub fn with(mut self, next: NextLife) -> Self {
        self.next = Some(next);
        self
    }
    /// The same history, on a copy of the disk.
    pub fn on(&self, disk: &MemDisk) -> Self {
        Self { disk: disk.clone(), ..self.clone() }
    }

    /// Lives with a fault, comes through it as the kind of life says, and is checked.
    pub fn lived(mut self, what: &str) -> Self {
        let next = self.next.expect("a kind of life");
        self.live();
        match next {
            NextLife::GoesOn => self.check(what),
            NextLife::KilledAtOnce => {
                self.check(what);
                self.disk.power_cut_leaves(Left::Nothing, &mut Choices(1));
                self.check(&format!("{what}, and then the power goes"));
            }
            NextLife::PowerCutAfterwards => {
                self.disk.power_cut_leaves(Left::Nothing, &mut Choices(1));
                self.check(what);
            }
        }
        self
    }

    /// One start; false if it doesn't go through.
    pub fn starts(&mut self) -> bool {
        self.start().is_some()
    }

    fn known(&self) -> Acknowledged {
        // Half of the lives have a view that knows how far it was.
        let view_seq = if self.batches.is_multiple_of(2) { self.last_acked() } else { 0 };
        Acknowledged { view_seq, ..Acknowledged::default() }
    }

    fn last_acked(&self) -> u64 {
        self.acked.keys().next_back().copied().unwrap_or(0)
    }

    fn start(&mut self) -> Option<(Journal, Stepper)> {
        for _ in 0..TRIES {
            match Journal::open_stepped(Arc::new(self.disk.clone()), &dir(), options(), clock(), &self.known()) {
                Ok((journal, stepper, opened)) => {
                    // What wasn't settled is there now or never; nobody was told that it is.
                    let there = texts(&self.disk);
                    assert_eq!(there.len() as u64, opened.last_seq);
                    return Some((journal, stepper));
                }
                Err(error) => {
                    self.met(&error);
                    self.disk.space_returns();
                    self.disk.process_dies_unhealed();
                }
            }
        }
        None
    }

    fn met(&mut self, error: &Error) {
        let said = error.to_string();
        let next_step =
            ["Check the disk's health and free space", "until some is freed", "read the state again", "do:"];
        assert!(next_step.iter().any(|n| said.contains(n)), "what to do isn't said: {said}");
        self.errors.push(said);
    }

    fn is_killed(&self) -> bool {
        self.next == Some(NextLife::KilledAtOnce) && !self.errors.is_empty()
    }

    /// Everything, or as much of it as the disk lets.
    pub fn live(&mut self) {
        let Some((mut journal, mut stepper)) = self.start() else { return };
        for step in &LIFE {
            if self.is_killed() {
                break;
            }
            match step {
                Do::Group(batches) => self.group(&journal, &mut stepper, batches),
                Do::Checkpoint => {
                    let asked = journal.checkpoint();
                    if let Err(error) = driven(asked, &mut stepper) {
                        self.met(&error);
                    }
                }
                Do::Reopen => {
                    if let Err(error) = driven(journal.reopen(), &mut stepper) {
                        self.met(&error);
                    }
                }
                Do::CloseAndStart => {
                    if let Err(error) = driven(journal.close(), &mut stepper) {
                        self.met(&error);
                    }
                    drop((journal, stepper));
                    self.disk.process_dies_unhealed();
                    let Some(again) = self.start() else { return };
                    (journal, stepper) = again;
                }
            }
            if journal.poisoned().is_some() && !self.is_killed() && !self.recover(&journal, &mut stepper) {
                break;
            }
        }
        // The process is killed: nothing is closed.
        drop(stepper);
        drop(journal);
        self.disk.process_dies();
    }

    fn group(&mut self, journal: &Journal, stepper: &mut Stepper, batches: &[(usize, bool)]) {
        let reserved = journal.counts().reserve_ready_bytes;
        let mut waiting: Vec<(Pending, Vec<String>, bool)> = Vec::new();
        for (count, ending) in batches {
            self.batches += 1;
            let record =
                |i| format!("b{}.{i}/{count} {}", self.batches, "x".repeat((self.batches * 37 + i * 91) % 260));
            let texts: Vec<String> = (0..*count).map(record).collect();
            let payloads = texts.iter().map(|t| t.clone().into_bytes()).collect();
            let batch = Batch { payloads, ending: *ending, ..Batch::default() };
            waiting.push((journal.enqueue(batch).unwrap(), texts, *ending));
        }
        stepper.step();
        for (pending, texts, ending) in waiting {
            match pending.wait() {
                Ok(done) => {
                    for (text, seq) in texts.into_iter().zip(done.first_seq..) {
                        assert!(self.acked.insert(seq, text).is_none(), "two records at {seq}");
                    }
                }
                Err(error) => {
                    self.met(&error);
                    if let Error::NoSpace { .. } = error {
                        let bytes: usize = texts.iter().map(|t| audit::frame::frame_len(t.len())).sum();
                        assert!(!ending || (bytes as u64) > reserved, "an ending was refused with {reserved} reserved");
                        self.gone.extend(texts); // nothing of it was written
                    } else {
                        self.open.extend(texts);
                    }
                }
            }
        }
        // A new thing refused for lack of space: space comes back by and by.
        if self.errors.last().is_some_and(|e| e.contains("until some is freed")) && self.errors.len() > 2 {
            self.disk.space_returns();
        }
    }

    /// As the broker does it: again and again, with space coming back meanwhile.
    fn recover(&mut self, journal: &Journal, stepper: &mut Stepper) -> bool {
        for _ in 0..TRIES {
            match driven(journal.reopen(), stepper) {
                Ok(_) => {
                    // What failed is cut, as its callers were told.
                    self.gone.append(&mut self.open);
                    self.recovered += 1;
                    return true;
                }
                Err(error) => {
                    self.met(&error);
                    self.disk.space_returns();
                }
            }
        }
        assert!(self.disk.is_dead(), "it doesn't recover without help: {:?}", self.errors);
        false
    }

    /// What must be so now, and that it goes on.
    pub fn check(&mut self, what: &str) {
        let least = self.last_acked();
        if segment::list(&self.disk, &dir()).map_or(true, |s| s.is_empty()) && least == 0 {
            return; // it died before the first segment was there
        }
        // Offline first: what a crash leaves is never taken for damage.
        let torn = self.verified(what).torn;
        let (journal, mut stepper, opened) = self.opened(what);
        assert_eq!(torn.is_some(), opened.cut.is_some(), "{what}: verify and open agree on what is torn");
        let there = texts(&self.disk);
        for (seq, text) in &self.acked {
            let found = usize::try_from(*seq).ok().and_then(|s| there.get(s - 1));
            assert_eq!(found, Some(text), "{what}: record {seq} was acknowledged");
        }
        let mut seen = BTreeSet::new();
        for (i, text) in there.iter().enumerate() {
            assert!(seen.insert(text), "{what}: {text} is there twice");
            assert!(!self.gone.contains(text), "{what}: {text} was refused and is there");
            let (batch, rest) = text.split_once('.').unwrap();
            let (nth, count) = rest.split(' ').next().unwrap().split_once('/').unwrap();
            let (nth, count): (usize, usize) = (nth.parse().unwrap(), count.parse().unwrap());
            let last = there.get(i + count - 1 - nth);
            let whole = last.is_some_and(|l| l.starts_with(&format!("{batch}.{}/", count - 1)));
            assert!(whole, "{what}: a batch is all or nothing: {text}");
        }
        // It goes on, and who looks offline agrees.
        self.batches += 1;
        let text = format!("b{}.0/1 after", self.batches);
        let pending = journal.enqueue(Batch { payloads: vec![text.clone().into_bytes()], ..Batch::default() }).unwrap();
        stepper.step();
        let done = pending.wait().unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(done.first_seq, there.len() as u64 + 1, "{what}");
        self.acked.insert(done.first_seq, text);
        assert_eq!(self.verified(what).last_seq, done.first_seq, "{what}");
        // What a start has shown is not lost afterwards, whoever was told of it.
        for (text, seq) in there.into_iter().zip(1..) {
            self.open.remove(&text);
            self.acked.insert(seq, text);
        }
        drop(stepper);
        drop(journal);
        self.disk.process_dies();
    }

    fn opened(&mut self, what: &str) -> (Journal, Stepper, Opened) {
        Journal::open_stepped(Arc::new(self.disk.clone()), &dir(), options(), clock(), &self.known())
            .unwrap_or_else(|e| panic!("{what}: {e}"))
    }

    fn verified(&mut self, what: &str) -> Verified {
        let options = verify::Options { keys: vec![key()], ..verify::Options::default() };
        let report = verify_on(&self.disk, &dir(), &options).unwrap();
        let broken = match report {
            Report::Verified(verified) => return verified,
            Report::Broken(broken) => broken,
        };
        // Half a sector of the head: a disk that writes no sector whole. Refused, and the operator is told what to run.
        assert_eq!(broken.file, head::FILE_NAME, "{what}: {broken}");
        assert!(what.contains("TornSectors"), "{what}: {broken}");
        assert!(broken.action.contains("audit verify") && broken.action.contains("--remake-head"), "{broken}");
        let refused = Journal::open_stepped(Arc::new(self.disk.clone()), &dir(), small(), clock(), &self.known());
        assert!(refused.is_err(), "{what}");
        drop(refused);
        self.disk.process_dies();
        self.heads_remade += 1;
        match remake_head_on(&self.disk, &dir(), &options).unwrap() {
            Report::Verified(verified) => verified,
            Report::Broken(broken) => panic!("{what}: {broken}"),
        }
    }
}

/// Waits for an answer of the writer, which is driven meanwhile.
fn driven<T>(asked: impl Future<Output = Result<T, Error>>, stepper: &mut Stepper) -> Result<T, Error> {
    let mut asked = std::pin::pin!(asked);
    let mut cx = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(done) = asked.as_mut().poll(&mut cx) {
            return done;
        }
        stepper.step();
    }
}

/// All records, as somebody sees them who meets no fault.
fn texts(disk: &MemDisk) -> Vec<String> {
    let disk = disk.copy();
    disk.process_dies();
    let mut records = read_from_on(Arc::new(disk.clone()), Path::new(&dir()), 1).unwrap();
    let mut out = Vec::new();
    while let Some(record) = records.next_record().unwrap() {
        out.push(String::from_utf8(record.payload.to_vec()).unwrap());
    }
    out
}
