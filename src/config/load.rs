//! Reading and checking: every problem is found in one pass, each with file, line and what to do.
//! Secrets are read once here, only to know that they can be, and dropped.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::core::digest::{CanonicalError, Digest};

use super::check_people::Known;
use super::reader::{Doc, Source};
use super::{Catalogue, Config, Limits, check, check_catalogue, check_people};

/// Largest configuration file, in bytes.
pub const CONFIG_BYTES_MAX: u64 = 1024 * 1024;
/// Largest catalogue, in bytes.
pub const CATALOGUE_BYTES_MAX: u64 = 8 * 1024 * 1024;
/// Largest policy file, in bytes.
pub const POLICY_BYTES_MAX: u64 = 1024 * 1024;
/// Most policy files.
pub const POLICY_FILES_MAX: usize = 256;

/// One thing that is wrong with the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// File and line where there is one, for example `catalogue.toml:31`.
    pub place: String,
    /// What is wrong and what to do.
    pub what: String,
}

/// The configuration can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.iter().map(|p| format!("{}: {}", p.place, p.what)).collect::<Vec<_>>().join("\n"))]
pub struct ConfigError(pub Vec<Problem>);

/// A configuration that was read and checked.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The broker's own file.
    pub config: Config,
    /// The catalogue.
    pub catalogue: Catalogue,
    /// The policies: file name and text, by name. The policy room reads them.
    pub policies: Vec<(String, String)>,
    /// The folder that relative paths start from.
    pub base: PathBuf,
    /// What works but probably isn't meant.
    pub warnings: Vec<Problem>,
}

/// What was loaded, for the journal: SHA-256, lower-case hex.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hashes {
    /// Of the configuration's meaning: comments and spacing don't count.
    pub config: Digest,
    /// Of the catalogue's meaning.
    pub catalogue: Digest,
    /// Of names and texts of the policies.
    pub policies: Digest,
}

impl Loaded {
    /// The hashes that the journal keeps of this configuration.
    pub fn hashes(&self) -> Result<Hashes, CanonicalError> {
        let mut policies = self.policies.clone();
        policies.sort();
        Ok(Hashes {
            config: Digest::of(&self.config)?,
            catalogue: Digest::of(&self.catalogue)?,
            policies: Digest::of(&policies)?,
        })
    }
}

/// Reads the broker's file, the catalogue and the policies folder, and checks all of it. Policies are only
/// read: they are validated against the catalogue's schema by the policy room.
pub fn load(path: &Path) -> Result<Loaded, ConfigError> {
    load_with(path, true)
}

/// The same, without looking at the files and secrets that it refers to: enough for testing policies where no
/// secret is (a developer's machine, CI). Never enough to run a broker.
pub fn load_rules(path: &Path) -> Result<Loaded, ConfigError> {
    load_with(path, false)
}

fn load_with(path: &Path, look: bool) -> Result<Loaded, ConfigError> {
    let mut out = Vec::new();
    let name = path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
    let base = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned();
    let text =
        read_text(path, CONFIG_BYTES_MAX).map_err(|what| ConfigError(vec![Problem { place: name.clone(), what }]))?;
    let source = Source { file: name, text };
    let mut warnings = Vec::new();
    let config = read_config(&source, look.then_some(base.as_path()), &mut out, &mut warnings);

    // The other files are read even when this one has problems: one pass finds them all.
    let paths = config
        .as_ref()
        .map_or_else(|| folders(&source.text), |c| Some((c.broker.catalogue.clone(), c.broker.policies.clone())));
    let (catalogue, policies) = match paths {
        Some((catalogue, policies)) => (
            read_catalogue(&base.join(catalogue), look.then_some(base.as_path()), &mut out),
            read_policies(&base.join(policies), &mut out),
        ),
        None => (None, Vec::new()),
    };
    match (config, catalogue) {
        (Some(config), Some(catalogue)) if out.is_empty() => Ok(Loaded { config, catalogue, policies, base, warnings }),
        _ => Err(ConfigError(out)),
    }
}

/// Where catalogue and policies are, of a file whose `[broker]` could not be read as a whole.
fn folders(text: &str) -> Option<(PathBuf, PathBuf)> {
    let table: toml::Table = toml::from_str(text).ok()?;
    let broker = table.get("broker")?;
    let path = |key: &str| broker.get(key)?.as_str().map(PathBuf::from);
    Some((path("catalogue")?, path("policies")?))
}

const SECTIONS: [&str; 10] =
    ["broker", "listen", "store", "spiffe", "issuer", "reviewer_login", "person", "agent", "tier", "limits"];

fn read_config(
    source: &Source,
    base: Option<&Path>,
    out: &mut Vec<Problem>,
    warnings: &mut Vec<Problem>,
) -> Option<Config> {
    let mut doc = Doc::parse(source, out);
    for key in ["broker", "listen", "tier"] {
        if !doc.has(key) {
            let what = format!("the section `{key}` is missing; config/countersign.toml is a complete example");
            out.push(Problem { place: source.file.clone(), what });
        }
    }
    let before = out.len();
    let has_tiers = doc.has("tier");
    let (mut u_issuer, mut u_person, mut u_agent, mut u_tier) = (vec![], vec![], vec![], vec![]);
    let broker = doc.section("broker", out);
    let listen = doc.section("listen", out);
    let store = doc.section("store", out);
    let spiffe = doc.section("spiffe", out);
    let issuers = doc.list("issuer", "issuer", &mut u_issuer, out);
    let login = doc.section("reviewer_login", out);
    let persons = doc.list("person", "id", &mut u_person, out);
    let agents = doc.list("agent", "match", &mut u_agent, out);
    let tiers = doc.list::<crate::core::tier::Tier>("tier", "name", &mut u_tier, out);
    let limits = doc.section::<Limits>("limits", out);
    doc.finish(&SECTIONS, out);
    let partial = out.len() > before;

    let names = check::TierNames { names: tiers.iter().map(|t| t.value.name.as_str()).collect(), unread: &u_tier };
    if let Some(b) = &broker {
        check::broker(b, out, warnings);
    }
    if let Some(l) = &listen {
        check::listen(l, spiffe.is_some() || partial, base, out);
    }
    if let Some(s) = &store {
        super::store::check(s, base, out);
    }
    if let Some(s) = &spiffe {
        check::spiffe(s, &names, base, out);
    }
    check_catalogue::unique("issuer", &issuers, |i: &super::IssuerConfig| i.issuer.as_str(), out);
    for i in &issuers {
        check::issuer(i, &names, base, out);
    }
    if let Some(r) = &login {
        check::reviewer_login(r, base, out);
    }
    check_catalogue::unique("person", &persons, |p: &super::PersonConfig| p.id.as_str(), out);
    check_people::persons(&persons, login.as_ref(), out);
    let known = Known {
        persons: &persons,
        unread_persons: &u_person,
        spiffe: spiffe.as_ref().map(|s| &s.value),
        issuers: &issuers,
        partial,
    };
    check_people::agents(&agents, &known, out);
    check_catalogue::unique("tier", &tiers, |t| t.name.as_str(), out);
    if tiers.is_empty() && u_tier.is_empty() && has_tiers {
        out.push(Problem { place: source.file.clone(), what: "there is no [[tier]]; add at least one".to_owned() });
    }
    check::tiers(&tiers, out, warnings);
    if let Some(l) = &limits {
        check::limits(l, out);
    }
    if spiffe.is_none() && issuers.is_empty() && !partial {
        let what = "neither [spiffe] nor [[issuer]]: no agent can prove what it is".to_owned();
        warnings.push(Problem { place: source.file.clone(), what });
    }
    enough_persons(&persons, &tiers, source, warnings);
    Some(Config {
        broker: broker?.value,
        listen: listen?.value,
        store: store.map(|s| s.value).unwrap_or_default(),
        spiffe: spiffe.map(|s| s.value),
        issuer: issuers.into_iter().map(|i| i.value).collect(),
        reviewer_login: login.map(|l| l.value),
        person: persons.into_iter().map(|p| p.value).collect(),
        agent: agents.into_iter().map(|a| a.value).collect(),
        tier: tiers.into_iter().map(|t| t.value).collect(),
        limits: limits.map(|l| l.value).unwrap_or_default(),
    })
}

/// A tier whose votes can't be found: with the owner excluded, one more person than approvals is needed.
fn enough_persons(
    persons: &[super::reader::Item<'_, super::PersonConfig>],
    tiers: &[super::reader::Item<'_, crate::core::tier::Tier>],
    source: &Source,
    warnings: &mut Vec<Problem>,
) {
    let ids: BTreeSet<&str> = persons.iter().map(|p| p.value.id.as_str()).collect();
    for t in tiers.iter().map(|t| &t.value).filter(|t| t.approvals > 0 && ids.len() <= usize::from(t.approvals)) {
        let what = format!(
            "tier {} needs {} approvals beside the agent's owner, and the directory has {} persons: requests of an owner \
             may never be decided",
            t.name,
            t.approvals,
            ids.len()
        );
        warnings.push(Problem { place: source.file.clone(), what });
    }
}

fn read_catalogue(path: &Path, base: Option<&Path>, out: &mut Vec<Problem>) -> Option<Catalogue> {
    match read_text(path, CATALOGUE_BYTES_MAX) {
        Ok(text) => {
            let source = Source { file: file_name(path), text };
            let doc = Doc::parse(&source, out);
            Some(check_catalogue::read(doc, base, out))
        }
        Err(what) => {
            out.push(Problem { place: file_name(path), what });
            None
        }
    }
}

/// The `*.cedar` files of a folder, by name.
fn read_policies(folder: &Path, out: &mut Vec<Problem>) -> Vec<(String, String)> {
    let mut fail = |place: &Path, what: String| out.push(Problem { place: file_name(place), what });
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) => {
            fail(folder, format!("can't read the policies folder {}: {e}", folder.display()));
            return Vec::new();
        }
    };
    let mut files = Vec::new();
    for entry in entries {
        // A file that is passed over could hold a `forbid`: what can't be listed is a problem.
        match entry {
            Ok(e) if e.path().extension().is_some_and(|x| x.eq_ignore_ascii_case("cedar")) => files.push(e.path()),
            Ok(_) => {}
            Err(e) => fail(folder, format!("can't list the policies folder: {e}")),
        }
    }
    files.sort();
    if files.is_empty() {
        fail(folder, "there is no *.cedar file, so everything would be denied; add policies".to_owned());
    }
    if files.len() > POLICY_FILES_MAX {
        fail(folder, format!("more than {POLICY_FILES_MAX} policy files; join some"));
        files.truncate(POLICY_FILES_MAX);
    }
    let mut policies = Vec::new();
    for file in files {
        match read_text(&file, POLICY_BYTES_MAX) {
            Ok(text) => policies.push((file_name(&file), text)),
            Err(what) => fail(&file, what),
        }
    }
    policies
}

fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}

/// Reads at most `max` bytes of UTF-8; never more, whatever the file's size claims to be.
fn read_text(path: &Path, max: u64) -> Result<String, String> {
    let file = std::fs::File::open(path).map_err(|e| format!("can't open {}: {e}", path.display()))?;
    let mut bytes = Vec::new();
    file.take(max + 1).read_to_end(&mut bytes).map_err(|e| format!("can't read {}: {e}", path.display()))?;
    if bytes.len() as u64 > max {
        return Err(format!("{} is larger than {max} bytes", path.display()));
    }
    String::from_utf8(bytes).map_err(|_| format!("{} isn't UTF-8", path.display()))
}
