//! What an agent asks for, as it stands on the command line: `--want`, `--details`, `--why`, `--task`, `--ttl`.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde_json::Value;

use crate::client::{AgentClient, ClientError};
use crate::core::id::{ActionName, GrantId, ResourceName, TaskName};
use crate::core::permission::PERMISSIONS_MAX;
use crate::keys::random::{SystemRandom, random_bytes};
use crate::wire::agent::GrantRequest;
use crate::wire::strict_json;

use super::CliError;
use super::term::duration;

/// Largest `--details` file, in bytes: what a broker's body limit lets through.
const DETAILS_BYTES_MAX: u64 = 64 * 1024;
/// Deepest nesting in it.
const DETAILS_DEPTH_MAX: usize = 16;

/// What is asked for.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true))]
pub struct Ask {
    /// What is wanted: `postgres/billing:read`, several actions as `read+write`, several things with commas or by
    /// repeating it. All that the catalogue has of it, unless --details says less
    #[arg(long, group = "what", value_name = "RES:ACTION[+ACTION…][,…]")]
    want: Vec<Wants>,
    /// A JSON list of `authorization_details` entries (RFC 9396), for permissions with bounds:
    /// `[{"type":"postgres","identifier":"postgres/billing","actions":["read"],"tables":["invoices"]}]`
    #[arg(long, group = "what", value_name = "FILE")]
    details: Option<PathBuf>,
    /// Why, in your words. A reviewer reads it, marked as not verified
    #[arg(long, value_name = "TEXT")]
    why: String,
    /// The task that this is for: requests of one task belong together and can be completed together [default: a fresh name]
    #[arg(long, value_name = "NAME")]
    task: Option<TaskName>,
    /// How long it is wanted at most: 90s, 10m, 1h30m. What the tier allows may be less
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = duration)]
    ttl: Duration,
    /// The grant that this hangs from, when another agent handed over a part of its task
    #[arg(long, value_name = "GRANT")]
    parent: Option<GrantId>,
    /// Bind it to the certificate of this connection (COUNTERSIGN_MTLS=1): only its holder collects
    #[arg(long)]
    bind: bool,
}

impl Ask {
    /// The request, with the `type` of each entry looked up in the broker's catalogue.
    pub async fn request(&self, client: &AgentClient, heartbeat_secs: Option<u64>) -> Result<GrantRequest, CliError> {
        let authorization_details = match &self.details {
            Some(file) => read_details(file)?,
            None => client.details(&merge(&self.want)).await?,
        };
        Ok(GrantRequest {
            task: self.task.clone().map_or_else(fresh_task, Ok)?,
            intent: self.why.clone(),
            authorization_details,
            life_secs: self.ttl.as_secs(),
            parent: self.parent,
            heartbeat_secs,
            bind: self.bind,
        })
    }
}

/// A name that no other task has.
fn fresh_task() -> Result<TaskName, ClientError> {
    let name = format!("task-{}", hex::encode(random_bytes::<6>(&SystemRandom)));
    TaskName::new(&name).map_err(|e| ClientError::Settings(e.to_string()))
}

/// One value of `--want`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wants(Vec<(ResourceName, Vec<ActionName>)>);

impl FromStr for Wants {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let one = |part: &str| {
            let (resource, actions) = part
                .split_once(':')
                .ok_or_else(|| "write RESOURCE:ACTION, for example postgres/billing:read or …:read+write".to_owned())?;
            let resource = ResourceName::new(resource).map_err(|e| e.to_string())?;
            let actions = actions.split('+').map(|a| ActionName::new(a).map_err(|e| e.to_string()));
            Ok((resource, actions.collect::<Result<Vec<_>, String>>()?))
        };
        Ok(Self(text.split(',').map(one).collect::<Result<Vec<_>, String>>()?))
    }
}

/// One entry for each resource, in the order in which they were named first.
fn merge(wants: &[Wants]) -> Vec<(String, Vec<String>)> {
    let mut out: Vec<(String, Vec<String>)> = Vec::new();
    for (resource, actions) in wants.iter().flat_map(|w| &w.0) {
        let place = out.iter().position(|(name, _)| name == resource.as_str()).unwrap_or_else(|| {
            out.push((resource.to_string(), Vec::new()));
            out.len() - 1
        });
        for action in actions {
            if !out[place].1.iter().any(|a| a == action.as_str()) {
                out[place].1.push(action.to_string());
            }
        }
    }
    out
}

/// The entries in a file. What they mean is the broker's to judge; that they are entries is checked here.
fn read_details(file: &Path) -> Result<Vec<Value>, CliError> {
    let place = file.display();
    let said = |what: String| CliError::said(format!("{place}: {what}"));
    let mut bytes = Vec::new();
    std::fs::File::open(file)
        .and_then(|f| f.take(DETAILS_BYTES_MAX + 1).read_to_end(&mut bytes))
        .map_err(|e| said(format!("can't be read: {e}")))?;
    if bytes.len() as u64 > DETAILS_BYTES_MAX {
        return Err(said(format!("larger than {DETAILS_BYTES_MAX} bytes")));
    }
    strict_json::check(&bytes, DETAILS_DEPTH_MAX).map_err(|e| said(format!("not JSON that can be used: {e}")))?;
    let entries: Vec<Value> = match serde_json::from_slice(&bytes) {
        Ok(Value::Array(entries)) => entries,
        _ => {
            return Err(said(
                "must be a JSON list of entries: [{\"type\":…,\"identifier\":…,\"actions\":[…]}]".to_owned(),
            ));
        }
    };
    if entries.is_empty() || entries.len() > PERMISSIONS_MAX {
        return Err(said(format!("must have 1 to {PERMISSIONS_MAX} entries")));
    }
    let whole = |e: &Value| ["type", "identifier", "actions"].iter().all(|member| e.get(member).is_some());
    match entries.iter().position(|e| !whole(e)) {
        Some(i) => Err(said(format!("entry {} needs `type`, `identifier` and `actions`", i + 1))),
        None => Ok(entries),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wants(texts: &[&str]) -> Result<Vec<(String, Vec<String>)>, String> {
        let all: Result<Vec<Wants>, String> = texts.iter().map(|t| t.parse()).collect();
        Ok(merge(&all?))
    }

    #[test]
    fn wants_are_resources_with_actions() {
        let entry = |r: &str, a: &[&str]| (r.to_owned(), a.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>());
        assert_eq!(wants(&["postgres/billing:read"]).unwrap(), [entry("postgres/billing", &["read"])]);
        assert_eq!(
            wants(&["b:read+write,a:read", "b:delete+read"]).unwrap(),
            [entry("b", &["read", "write", "delete"]), entry("a", &["read"])]
        );
        for bad in [
            "",
            "a",
            "a:",
            ":read",
            "a:read,",
            "a:read+",
            "a:Read",
            "A:read",
            "a:read:write",
            "a b:read",
            "a:read, b:read",
        ] {
            assert!(wants(&[bad]).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn details_are_a_bounded_list_of_entries() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("details.json");
        let read = |text: &str| {
            std::fs::write(&file, text).unwrap();
            read_details(&file).map_err(|e| e.to_string())
        };
        let entry = r#"{"type":"postgres","identifier":"a","actions":["read"],"tables":["t"]}"#;
        assert_eq!(read(&format!("[{entry}]")).unwrap().len(), 1);
        let many = vec![entry; PERMISSIONS_MAX].join(",");
        assert_eq!(read(&format!("[{many}]")).unwrap().len(), PERMISSIONS_MAX);
        for (bad, says) in [
            ("[]".to_owned(), "1 to"),
            (format!("[{many},{entry}]"), "1 to"),
            (entry.to_owned(), "must be a JSON list"),
            (r#"[{"type":"postgres","identifier":"a"}]"#.to_owned(), "entry 1 needs"),
            (r#"[{"type":"a","type":"b","identifier":"a","actions":[]}]"#.to_owned(), "twice"),
            ("[1".to_owned(), "not JSON"),
            (format!("[{}]", " ".repeat(70_000)), "larger than"),
        ] {
            let said = read(&bad).unwrap_err();
            assert!(said.contains(says) && said.contains("details.json"), "{says}: {said}");
        }
        assert!(read_details(&dir.path().join("none")).unwrap_err().to_string().contains("can't be read"));
    }

    #[test]
    fn fresh_tasks_differ() {
        assert_ne!(fresh_task().unwrap(), fresh_task().unwrap());
    }
}
