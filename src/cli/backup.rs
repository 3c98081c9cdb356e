//! `backup` and `restore`, on the broker's machine, as the broker's user. Neither asks the broker.

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::json;

use crate::store::embedded::backup::{self, Backup};
use crate::store::embedded::restore::{self, Elsewhere};
use crate::time::{Clock as _, SystemClock};
use crate::wire::words::rfc3339;

use super::CliError;
use super::audit::{Place, checkpoints, verifiers};
use super::term::{Look, print, print_json, safe};

/// `backup`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The copy has everything that was acknowledged when it began, ends with a checkpoint over exactly that, and is checked,
file by file and record by record, before this says that it is done. The broker may run; it isn't asked.

It holds the broker's keys (but for those that sign tokens): keep it as you keep the data folder. Configuration, catalogue
and policies are not in it.

Examples:
  countersign backup --config /etc/countersign/countersign.toml --to /mnt/backup/countersign-monday
  countersign backup --data-dir /var/lib/countersign --to /mnt/backup/countersign-monday --json")]
pub struct BackupArgs {
    #[command(flatten)]
    place: Place,
    /// A new folder for the copy
    #[arg(long, value_name = "FOLDER")]
    to: PathBuf,
    /// For scripts
    #[arg(long)]
    json: bool,
}

/// `restore`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Every grant that was in force or waited at the time of the backup is over afterwards: what became of it since then isn't
known. The data folder must be new or empty. The backup is checked whole before anything is written.

Give the newest checkpoint that was kept elsewhere: it shows whether records came after the backup. A backup that is older than
that, or of which nothing shows that it isn't, is restored with --accept-lost-records only; everything is frozen then.

Examples:
  countersign restore /mnt/backup/countersign-monday --data-dir /var/lib/countersign --checkpoint newest.note
  countersign restore /mnt/backup/countersign-monday --config countersign.toml --accept-lost-records")]
pub struct RestoreArgs {
    /// The backup
    #[arg(value_name = "FOLDER")]
    from: PathBuf,
    #[command(flatten)]
    place: Place,
    /// The newest checkpoint that was kept elsewhere (DATA_DIR/journal/checkpoint, or what `backup` printed)
    #[arg(long, value_name = "FILE")]
    checkpoint: Vec<PathBuf>,
    /// A key that may have signed it, if that isn't in the backup: as the broker prints it, or a file with such lines
    #[arg(long, value_name = "VERIFIER")]
    key: Vec<String>,
    /// Restore though records that came after the backup are lost, or may be. It is recorded, and everything is frozen
    #[arg(long)]
    accept_lost_records: bool,
    /// Only check the backup, and whether it may be restored: nothing is written
    #[arg(long)]
    check: bool,
    /// For scripts
    #[arg(long)]
    json: bool,
}

/// Copies the data folder.
pub fn backup(args: &BackupArgs) -> Result<i32, CliError> {
    let done = backup::backup(&args.place.data_dir()?, &args.to, SystemClock.wall()).map_err(CliError::said)?;
    let Backup { manifest, note, .. } = &done;
    let bytes: u64 = manifest.files.values().map(|f| f.bytes).sum();
    if args.json {
        print_json(&json!({
            "backup": args.to, "journal": manifest.journal, "records": manifest.records, "root": manifest.root,
            "files": manifest.files.len(), "bytes": bytes, "checkpoint": note,
        }))?;
        return Ok(0);
    }
    let look = Look::of_stdout();
    let head = look.good(&format!("backed up and checked: {} records, root {}", manifest.records, manifest.root));
    let place = safe(&args.to.display().to_string());
    print(&format!(
        "{head}\n{} files, {bytes} bytes in {place}\nKeep this checkpoint apart from the backup; `restore` asks for the newest:\n\n{note}",
        manifest.files.len()
    ))?;
    Ok(0)
}

/// Puts a backup back.
pub async fn restore(args: RestoreArgs) -> Result<i32, CliError> {
    let mut elsewhere = Elsewhere {
        checkpoints: checkpoints(&args.checkpoint)?,
        keys: Vec::new(),
        accept_lost_records: args.accept_lost_records,
    };
    for key in &args.key {
        elsewhere.keys.extend(verifiers(key)?);
    }
    let data_dir = args.place.data_dir()?;
    let backup = backup::check(&args.from).map_err(CliError::said)?;
    let look = Look::of_stdout();
    if args.check {
        restore::judge(&backup, &elsewhere).map_err(CliError::said)?;
        let m = &backup.manifest;
        let made = rfc3339(m.made_at);
        let said = format!("a whole backup of {} records, made {made}, root {}: it may be restored", m.records, m.root);
        if args.json {
            print_json(
                &json!({ "records": m.records, "root": m.root, "made_at": m.made_at, "may_be_restored": true }),
            )?;
        } else {
            print(&format!("{}\n", look.good(&said)))?;
        }
        return Ok(0);
    }
    let done = restore::restore(&backup, &data_dir, &elsewhere, Arc::new(SystemClock)).await.map_err(CliError::said)?;
    if args.json {
        print_json(&json!({
            "data_dir": data_dir, "records": done.records, "ended": done.ended, "lost_records": done.lost,
            "freeze": done.freeze,
        }))?;
        return Ok(0);
    }
    let place = safe(&data_dir.display().to_string());
    let mut said = look.good(&format!("restored: {} records in {place}", done.records));
    said.push_str(&format!("\n{} grants that were in force or waited are over", done.ended));
    if let Some(id) = done.freeze {
        let lost =
            if done.lost > 0 { format!("{} records are lost", done.lost) } else { "records may be lost".to_owned() };
        said.push_str(&format!(
            "\n{lost}, freezes among them perhaps: everything is frozen. When the broker runs and the missing freezes are made \
             again, lift it: countersign freeze --lift {id}"
        ));
    }
    print(&format!(
        "{said}\nStart the broker: it looks at every target for credentials that no record explains, and ends them\n"
    ))?;
    Ok(0)
}
