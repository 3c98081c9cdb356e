//! `audit`: verify, follow and read the journal, offline. Nothing here asks a broker: the journal is the truth.

use std::collections::{BTreeMap, VecDeque};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use crate::audit::disk::RealDisk;
use crate::audit::note::{NOTE_BYTES_MAX, Verifier};
use crate::audit::reader::{Records, read_from};
use crate::audit::segment;
use crate::audit::verify::{Options, Report, remake_head, verify};
use crate::core::event::Event;
use crate::core::id::GrantId;
use crate::store::engine::{Record, read_record};
use crate::wire::words::{Told, event, rfc3339};

use super::CliError;
use super::record_text;
use super::term::{Look, print, print_json, print_open, safe};

/// Records that `tail` begins with.
const TAIL_RECORDS: usize = 20;
/// How often `tail --follow` looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// `audit`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  countersign audit verify /var/lib/countersign --checkpoint last-month.note --key broker.corp/journal+1a2b3c4d+…
  countersign audit tail --config /etc/countersign/countersign.toml --follow
  countersign audit show gr_06a1v3pz8t5q3r4c9m2x7k0w1h --data-dir /var/lib/countersign")]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Recompute the whole journal: verified up to where, with which root; or exactly where it breaks (exit code 1)
    Verify(VerifyArgs),
    /// The latest records, one line each
    Tail(TailArgs),
    /// All that was recorded of one grant
    Show(ShowArgs),
    /// Write the record of a broker with a database as a journal folder, for the commands above or an archive
    Export(ExportArgs),
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  countersign audit export --config /etc/countersign/countersign.toml --to today && countersign audit verify today")]
struct ExportArgs {
    /// The configuration of any node: [store] names the database
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// A new folder
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
}

/// Where the journal is.
#[derive(Debug, clap::Args)]
#[group(multiple = false)]
pub(super) struct Place {
    /// The broker's data folder (or the journal folder in it)
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// The broker's configuration, which names the data folder
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Without --key, signatures are not checked: that finds accidents, not somebody who rewrote the whole journal.
Keep a checkpoint elsewhere from time to time (DATA_DIR/journal/checkpoint), and the key that the broker prints.

Example:
  countersign audit verify /var/lib/countersign --checkpoint last-month.note --key broker.corp/journal+1a2b3c4d+…")]
struct VerifyArgs {
    /// The broker's data folder, or a journal folder
    #[arg(value_name = "DIR", conflicts_with_all = ["data_dir", "config"])]
    dir: Option<PathBuf>,
    #[command(flatten)]
    place: Place,
    /// A checkpoint that was kept elsewhere: the journal must extend it
    #[arg(long, value_name = "FILE", requires = "key")]
    checkpoint: Vec<PathBuf>,
    /// A key that may have signed checkpoints, as the broker prints it (NAME+ID+BASE64), or a file with such lines
    #[arg(long, value_name = "VERIFIER")]
    key: Vec<String>,
    /// Take a journal whose file `head` is lost or damaged: its last records could have been dropped
    #[arg(long)]
    without_head: bool,
    /// If all else verifies, make a lost or damaged `head` anew. With the broker stopped, as the broker's user
    #[arg(long, conflicts_with = "without_head")]
    remake_head: bool,
    /// For scripts
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  countersign audit tail --data-dir /var/lib/countersign --follow --json | jq .event"
)]
struct TailArgs {
    #[command(flatten)]
    place: Place,
    /// From this record on [default: the last 20]
    #[arg(long, value_name = "N")]
    from: Option<u64>,
    /// Go on with what is written from now on
    #[arg(short, long)]
    follow: bool,
    /// One JSON object a line: seq, at (milliseconds since 1970), event
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  countersign audit show gr_06a1v3pz8t5q3r4c9m2x7k0w1h --config countersign.toml")]
struct ShowArgs {
    /// The grant
    #[arg(value_name = "GRANT")]
    id: GrantId,
    #[command(flatten)]
    place: Place,
    /// For scripts
    #[arg(long)]
    json: bool,
}

/// Runs one of them.
pub async fn run(args: Args) -> Result<i32, CliError> {
    match args.what {
        What::Export(args) => export(&args).await,
        What::Verify(args) => run_verify(args),
        What::Tail(args) => tail(&args),
        What::Show(args) => show(&args),
    }
}

/// Only `[store]` of the configuration is looked at: an auditor can't read the broker's other secrets.
async fn export(args: &ExportArgs) -> Result<i32, CliError> {
    let place = args.config.display();
    let text = std::fs::read_to_string(&args.config).map_err(|e| CliError::said(format!("can't read {place}: {e}")))?;
    let table: toml::Table = toml::from_str(&text).map_err(|e| CliError::said(format!("{place}: {}", e.message())))?;
    let store = table.get("store").cloned().map(toml::Value::try_into::<crate::config::StoreConfig>).transpose();
    let store = store.map_err(|e| CliError::said(format!("{place}: [store]: {}", e.message())))?.unwrap_or_default();
    let base = args.config.parent().unwrap_or(Path::new(""));
    let Some(settings) = super::open_store::way_to(&store, base)? else {
        return Err(CliError::said(format!(
            "{place} has no [store] with kind = \"postgres\": its record is a journal folder already"
        )));
    };
    let exported = crate::store::postgres::export(&settings, &args.to).await.map_err(CliError::said)?;
    print(&format!(
        "{} records, root {}, in {}\n",
        exported.last_seq,
        exported.root,
        safe(&args.to.display().to_string())
    ))?;
    Ok(0)
}

impl Place {
    /// The data folder.
    pub(super) fn data_dir(&self) -> Result<PathBuf, CliError> {
        match (&self.data_dir, &self.config) {
            (Some(dir), _) => Ok(dir.clone()),
            (None, Some(config)) => data_dir_of(config),
            (None, None) => {
                Err(CliError::said("which data folder? Give --data-dir DIR, or --config FILE, which names it"))
            }
        }
    }

    fn journal(&self) -> Result<PathBuf, CliError> {
        match (&self.data_dir, &self.config) {
            (Some(dir), _) => journal_in(dir),
            (None, Some(config)) => journal_in(&data_dir_of(config)?),
            (None, None) => Err(CliError::said(
                "where is the journal? Give --data-dir DIR, or --config FILE, which names the data folder",
            )),
        }
    }
}

/// The journal folder: `dir` itself, or the one in it.
fn journal_in(dir: &Path) -> Result<PathBuf, CliError> {
    let inner = crate::store::embedded::journal_dir(dir);
    let dir = if inner.is_dir() { inner } else { dir.to_owned() };
    match segment::list(&RealDisk, &dir) {
        Ok(segments) if segments.is_empty() => {
            Err(CliError::said(format!("there is no journal in {}; name the broker's data folder", dir.display())))
        }
        Ok(_) => Ok(dir),
        Err(error) => Err(CliError::said(error)),
    }
}

/// `broker.data_dir` of a configuration. Nothing else of it is looked at: an auditor can't read the broker's secrets.
fn data_dir_of(config: &Path) -> Result<PathBuf, CliError> {
    let place = config.display();
    let text = std::fs::read_to_string(config).map_err(|e| CliError::said(format!("can't read {place}: {e}")))?;
    let table: toml::Table = toml::from_str(&text).map_err(|e| CliError::said(format!("{place}: {}", e.message())))?;
    let kind = table.get("store").and_then(|s| s.get("kind")).and_then(toml::Value::as_str);
    if kind.is_some_and(|kind| kind != "embedded") {
        return Err(CliError::said(format!(
            "the record of {place} is in a database: write it into a folder with `countersign audit export --config \
             {place} --to DIR`, and name that"
        )));
    }
    let dir = table.get("broker").and_then(|b| b.get("data_dir")).and_then(toml::Value::as_str);
    let dir = dir.ok_or_else(|| CliError::said(format!("{place}: broker.data_dir is missing")))?;
    Ok(config.parent().unwrap_or(Path::new("")).join(dir))
}

fn run_verify(args: VerifyArgs) -> Result<i32, CliError> {
    let dir = match &args.dir {
        Some(dir) => journal_in(dir)?,
        None => args.place.journal()?,
    };
    let mut options = Options { without_head: args.without_head, ..Options::default() };
    for key in &args.key {
        options.keys.extend(verifiers(key)?);
    }
    options.checkpoints = checkpoints(&args.checkpoint)?;
    let look = Look::of_stdout();
    let report = if args.remake_head { remake_head(&dir, &options) } else { verify(&dir, &options) };
    match report.map_err(CliError::said)? {
        Report::Verified(v) if args.json => {
            let extends: Vec<_> =
                v.extends.iter().map(|(size, name)| json!({ "size": size, "checkpoint": name })).collect();
            print_json(&json!({
                "verified": true, "last_seq": v.last_seq, "root": v.root.to_string(), "last_at": v.last_at_ms,
                "segments": v.segments, "extends": extends, "signatures_checked": v.signatures_checked, "closed": v.closed,
                "unfinished_bytes": v.torn.as_ref().map(|t| t.bytes),
            }))?;
            Ok(0)
        }
        Report::Verified(v) => {
            let unsigned = if v.signatures_checked || !v.extends.is_empty() {
                ""
            } else {
                "signatures were not checked: give --key, and a --checkpoint that was kept elsewhere\n"
            };
            print(&format!("{}\n{unsigned}", look.good(&safe_lines(&v.to_string()))))?;
            Ok(0)
        }
        Report::Broken(b) if args.json => {
            print_json(&json!({
                "verified": false, "file": b.file, "offset": b.offset, "seq": b.seq, "expected": b.expected,
                "found": b.found, "meaning": b.meaning, "action": b.action,
            }))?;
            Ok(1)
        }
        Report::Broken(b) => {
            print(&format!("{}\n", look.bad(&safe_lines(&b.to_string()))))?;
            Ok(1)
        }
    }
}

fn safe_lines(text: &str) -> String {
    text.lines().map(safe).collect::<Vec<_>>().join("\n")
}

/// Checkpoints that were kept elsewhere: their names and bytes.
pub(super) fn checkpoints(files: &[PathBuf]) -> Result<Vec<(String, Vec<u8>)>, CliError> {
    let read = |file: &PathBuf| {
        let place = file.display();
        let mut bytes = Vec::new();
        std::fs::File::open(file)
            .and_then(|f| f.take(NOTE_BYTES_MAX as u64 + 1).read_to_end(&mut bytes))
            .map_err(|e| CliError::said(format!("--checkpoint {place}: {e}")))?;
        Ok((place.to_string(), bytes))
    };
    files.iter().map(read).collect()
}

/// A key as it is printed, or a file with one a line.
pub(super) fn verifiers(text: &str) -> Result<Vec<Verifier>, CliError> {
    if let Ok(key) = text.parse() {
        return Ok(vec![key]);
    }
    let bad = |e: &dyn std::fmt::Display| CliError::said(format!("--key: {e}; it may also be a file with such lines"));
    let Ok(lines) = std::fs::read_to_string(text) else {
        return text.parse().map(|key| vec![key]).map_err(|e: crate::audit::Error| bad(&e));
    };
    let keys = lines.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
    let keys: Vec<Verifier> = keys.map(str::parse).collect::<Result<_, crate::audit::Error>>().map_err(|e| bad(&e))?;
    if keys.is_empty() { Err(bad(&"the file has no key")) } else { Ok(keys) }
}

/// The next record, read.
fn next(records: &mut Records) -> Result<Option<(u64, Record)>, CliError> {
    let Some(record) = records.next_record().map_err(CliError::said)? else { return Ok(None) };
    let seq = record.meta.seq;
    Ok(Some((seq, read_record(seq, record.payload).map_err(CliError::said)?)))
}

fn line(look: Look, json: bool, seq: u64, record: &Record) -> Result<String, CliError> {
    if json {
        let value = json!({ "seq": seq, "at": record.at, "event": record.event });
        return Ok(format!("{}\n", serde_json::to_string(&value).map_err(CliError::said)?));
    }
    let about = match &record.event {
        Event::Grant { id, .. } => id.to_string(),
        _ => "broker".to_owned(),
    };
    let Told { says, detail, source } = event(&record.event, &|person| person.to_string());
    let detail = detail.map(|d| look.dim(&format!("; {}", safe(&d)))).unwrap_or_default();
    let says = safe(&says);
    Ok(format!("{seq:>6}  {}  {about:<29}  {source:<6}  {says}{detail}\n", look.dim(&rfc3339(record.at))))
}

fn tail(args: &TailArgs) -> Result<i32, CliError> {
    let dir = args.place.journal()?;
    let look = Look::of_stdout();
    let mut records = if let Some(from) = args.from {
        read_from(&dir, from).map_err(CliError::said)?
    } else {
        // Only the last segments are read: so many that enough records are in them.
        let firsts = segment::list(&RealDisk, &dir).map_err(CliError::said)?;
        let last = firsts.last().copied().unwrap_or(1);
        let from = firsts.iter().rev().find(|first| **first + TAIL_RECORDS as u64 <= last).copied().unwrap_or(1);
        let mut records = read_from(&dir, from).map_err(CliError::said)?;
        let mut last = VecDeque::new();
        while let Some((seq, record)) = next(&mut records)? {
            if last.len() == TAIL_RECORDS {
                last.pop_front();
            }
            last.push_back(line(look, args.json, seq, &record)?);
        }
        if !print_open(&last.into_iter().collect::<String>())? {
            return Ok(0);
        }
        records
    };
    loop {
        while let Some((seq, record)) = next(&mut records)? {
            if !print_open(&line(look, args.json, seq, &record)?)? {
                return Ok(0);
            }
        }
        if !args.follow {
            return Ok(0);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn show(args: &ShowArgs) -> Result<i32, CliError> {
    let dir = args.place.journal()?;
    let mut records = read_from(&dir, 1).map_err(CliError::said)?;
    let mut story = record_text::Story::default();
    let mut freezes = BTreeMap::new();
    let mut last = 0;
    while let Some((seq, record)) = next(&mut records)? {
        last = seq;
        story.take(args.id, seq, record, &mut freezes);
    }
    if story.is_empty() {
        return Err(CliError::said(format!("there is nothing of {} in the journal's {last} records", args.id)));
    }
    if args.json { print_json(&story.json()) } else { print(&story.text(Look::of_stdout())) }?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::note::Signer;

    #[test]
    fn the_data_folder_is_beside_the_configuration_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("c.toml");
        let of = |text: &str| {
            std::fs::write(&config, text).unwrap();
            data_dir_of(&config).map_err(|e| e.to_string())
        };
        assert_eq!(of("[broker]\ndata_dir = \"data\"\n").unwrap(), dir.path().join("data"));
        assert_eq!(of("[broker]\ndata_dir = \"/var/lib/x\"\n").unwrap(), PathBuf::from("/var/lib/x"));
        assert!(of("[broker]\n").unwrap_err().contains("broker.data_dir is missing"));
        assert!(of("[broker").unwrap_err().contains("c.toml"));
        assert!(journal_in(dir.path()).unwrap_err().to_string().contains("there is no journal in"));
    }

    #[test]
    fn keys_come_from_the_line_or_from_a_file() {
        let key = Signer::from_seed("broker.example/journal", &[7; 32]).unwrap().verifier();
        assert_eq!(verifiers(&key.to_string()).unwrap()[0], key);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys");
        std::fs::write(&file, format!("# the first\n{key}\n\n")).unwrap();
        assert_eq!(verifiers(file.to_str().unwrap()).unwrap(), [key]);
        std::fs::write(&file, "# none\n").unwrap();
        assert!(verifiers(file.to_str().unwrap()).unwrap_err().to_string().contains("no key"));
        assert!(verifiers("nonsense").unwrap_err().to_string().contains("name+hash+base64"));
    }
}
