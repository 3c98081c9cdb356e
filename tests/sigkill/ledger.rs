//! What was seen, one line of JSON a cycle: kept in a folder, added to by each run, added up at the end.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};

use countersign::failpoint::Point;
use serde::{Deserialize, Serialize};

/// One life of the broker, and what was there after its death.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cycle {
    pub seed: u64,
    pub job: u64,
    pub round: u64,
    #[serde(rename = "cycle")]
    pub nth: u64,
    /// Where it was to die.
    pub kill: String,
    /// Whether it died there.
    pub hit: bool,
    /// Milliseconds from start to death.
    pub lived_ms: u64,
    /// Milliseconds until it took requests, if it did.
    pub ready_ms: Option<u64>,
    /// What agents were told in it.
    pub acks: u64,
    /// Credentials that worked in it.
    pub used: u64,
    /// Roles at PostgreSQL of which the journal knew the intent alone.
    pub window_postgres: u64,
    /// Users that OpenBao had made, of which the journal knew the intent alone.
    pub window_openbao: u64,
    /// Records in the journal.
    pub records: u64,
    pub wrong: Vec<String>,
}

/// The end of one data folder: nothing was killed any more until everything was settled.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Round {
    pub seed: u64,
    pub job: u64,
    #[serde(rename = "round_ended")]
    pub nth: u64,
    pub records: u64,
    pub leases: BTreeMap<String, u64>,
    /// Seconds until nothing was left.
    pub settled_secs: u64,
    pub wrong: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Cycle(Box<Cycle>),
    Round(Round),
}

/// The file, and what it adds up to.
pub struct Ledger {
    path: PathBuf,
    file: File,
    pub totals: Totals,
}

#[derive(Debug, Default, Clone)]
pub struct Totals {
    pub cycles: u64,
    pub rounds: u64,
    pub records: u64,
    pub leases: BTreeMap<String, u64>,
    at_random: u64,
    in_window: u64,
    window_postgres: u64,
    window_openbao: u64,
    acks: u64,
    used: u64,
    /// Failpoint → died there, was to.
    points: BTreeMap<String, (u64, u64)>,
    pub wrong: Vec<String>,
}

impl Ledger {
    /// Goes on with what is there.
    pub fn open(folder: &Path) -> Self {
        std::fs::create_dir_all(folder).unwrap();
        let path = folder.join("cycles.jsonl");
        let mut totals = Totals::default();
        if let Ok(file) = File::open(&path) {
            // The last line of a run that was stopped may be half a line.
            for line in BufReader::new(file).lines() {
                match serde_json::from_str(&line.unwrap()) {
                    Ok(Line::Cycle(cycle)) => totals.add(&cycle),
                    Ok(Line::Round(round)) => totals.add_round(&round),
                    Err(_) => {}
                }
            }
        }
        let mut file = File::options().create(true).append(true).open(&path).unwrap();
        if totals.cycles > 0 {
            writeln!(file).unwrap();
        }
        Self { path, file, totals }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn cycle(&mut self, cycle: Cycle) {
        self.totals.add(&cycle);
        self.write(&Line::Cycle(Box::new(cycle)));
    }

    pub fn round(&mut self, round: Round) {
        self.totals.add_round(&round);
        self.write(&Line::Round(round));
    }

    fn write(&mut self, line: &Line) {
        let mut text = serde_json::to_string(line).unwrap();
        text.push('\n');
        self.file.write_all(text.as_bytes()).unwrap();
    }
}

impl Totals {
    fn add(&mut self, cycle: &Cycle) {
        self.cycles += 1;
        self.window_postgres += cycle.window_postgres;
        self.window_openbao += cycle.window_openbao;
        self.in_window += u64::from(cycle.window_postgres + cycle.window_openbao > 0);
        self.acks += cycle.acks;
        self.used += cycle.used;
        match cycle.kill.split_once('#') {
            Some((point, _)) => {
                let (hit, meant) = self.points.entry(point.to_owned()).or_default();
                *hit += u64::from(cycle.hit);
                *meant += 1;
            }
            None => self.at_random += 1,
        }
        self.wrong.extend(
            cycle
                .wrong
                .iter()
                .map(|w| format!("job {} round {} cycle {} ({}): {w}", cycle.job, cycle.round, cycle.nth, cycle.kill)),
        );
    }

    fn add_round(&mut self, round: &Round) {
        self.rounds += 1;
        self.records += round.records;
        for (state, n) in &round.leases {
            *self.leases.entry(state.clone()).or_default() += n;
        }
        self.wrong.extend(round.wrong.iter().map(|w| format!("job {} round {}: {w}", round.job, round.nth)));
    }

    /// Points at which the broker never died.
    pub fn never(&self) -> Vec<&'static str> {
        let died = |p: &&str| self.points.get(*p).is_some_and(|(hit, _)| *hit > 0);
        Point::ALL.iter().map(|p| p.name()).filter(|name| !died(name)).collect()
    }

    /// So many of what was found begin so.
    fn count(&self, begins: &[&str]) -> usize {
        let what =
            |w: &&String| w.split_once("): ").or_else(|| w.split_once(": ")).map_or("", |(_, what)| what).to_owned();
        self.wrong.iter().filter(|w| begins.iter().any(|b| what(w).starts_with(b))).count()
    }
}

impl std::fmt::Display for Totals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let at_points: u64 = self.points.values().map(|(hit, _)| hit).sum();
        writeln!(
            f,
            "{} kills ({at_points} at a failpoint, {} at a moment by chance, {} elsewhere than meant) in {} data folders",
            self.cycles,
            self.at_random,
            self.cycles - at_points - self.at_random,
            self.rounds
        )?;
        writeln!(
            f,
            "{} answers were given to agents, {} credentials used; {} records and {:?} leases in the folders that are done",
            self.acks, self.used, self.records, self.leases
        )?;
        writeln!(
            f,
            "{} kills came while a credential existed that the journal knew the intent of alone ({} roles at PostgreSQL, {} users of OpenBao)",
            self.in_window, self.window_postgres, self.window_openbao
        )?;
        let each: Vec<String> =
            self.points.iter().map(|(name, (hit, meant))| format!("{name} {hit}/{meant}")).collect();
        writeln!(f, "died there / was to: {}", each.join(", "))?;
        writeln!(
            f,
            "orphans {}, lost records {}, double mints {}, released too early {}, not ended {}, anything else {}",
            self.count(&["orphan"]),
            self.count(&["lost"]),
            self.count(&["double"]),
            self.count(&["released"]),
            self.count(&["not ended", "alive"]),
            self.wrong.len() - self.count(&["orphan", "lost", "double", "released", "not ended", "alive"]),
        )
    }
}
