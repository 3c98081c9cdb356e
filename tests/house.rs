//! The house rules that no compiler holds: who may import whom (DESIGN section 4), one crypto provider, files that fit,
//! nothing of anybody's machine in the tree. Each rule is shown to be able to fail.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The rooms, top down. A room imports itself and the floors below its own; rooms on one floor don't know each other.
const FLOORS: [&[&str]; 15] = [
    &["cli"],
    &["client", "server"],
    &["broker"],
    &["identity"],
    &["policy"],
    &["connector"],
    &["store"],
    &["audit"],
    &["config"],
    &["keys"],
    &["wire"],
    &["runtime"],
    &["time", "failpoint"],
    &["mutation"],
    &["core"],
];
/// The client is what agents carry: nothing of a broker's inside is in it.
const CLIENT_MAY: [&str; 7] = ["client", "wire", "identity", "keys", "config", "time", "core"];
/// These assemble the whole; every other command reaches a broker through the client.
const CLI_ASSEMBLES: [&str; 5] = ["serve", "dev", "tour", "assemble", "demo_api"];
/// Longest file, in lines.
const LINES_MAX: usize = 600;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn floor(room: &str) -> Option<usize> {
    FLOORS.iter().position(|rooms| rooms.contains(&room))
}

/// A word, `::`, or one other character.
fn tokens(source: &str) -> Vec<String> {
    let c: Vec<char> = source.chars().collect();
    let at = |i: usize| c.get(i).copied().unwrap_or('\0');
    let word = |ch: char| ch.is_alphanumeric() || ch == '_';
    let (mut out, mut i) = (Vec::new(), 0);
    while i < c.len() {
        let raw = if at(i) == 'r' {
            i + 1
        } else if at(i) == 'b' && at(i + 1) == 'r' {
            i + 2
        } else {
            0
        };
        let hashes = if raw > 0 { (raw..c.len()).take_while(|j| at(*j) == '#').count() } else { 0 };
        if at(i) == '/' && at(i + 1) == '/' {
            while i < c.len() && at(i) != '\n' {
                i += 1;
            }
        } else if at(i) == '/' && at(i + 1) == '*' {
            let mut depth = 1;
            i += 2;
            while i < c.len() && depth > 0 {
                match (at(i), at(i + 1)) {
                    ('/', '*') => (depth, i) = (depth + 1, i + 2),
                    ('*', '/') => (depth, i) = (depth - 1, i + 2),
                    _ => i += 1,
                }
            }
        } else if raw > 0 && at(raw + hashes) == '"' {
            i = raw + hashes + 1;
            while i < c.len() && !(at(i) == '"' && (1..=hashes).all(|k| at(i + k) == '#')) {
                i += 1;
            }
            i += 1 + hashes;
        } else if at(i) == '"' {
            i += 1;
            while i < c.len() && at(i) != '"' {
                i += if at(i) == '\\' { 2 } else { 1 };
            }
            i += 1;
        } else if at(i) == '\'' && (at(i + 1) == '\\' || at(i + 2) == '\'') {
            i += if at(i + 1) == '\\' { 3 } else { 2 };
            while i < c.len() && at(i) != '\'' {
                i += 1;
            }
            i += 1;
        } else if word(at(i)) {
            let start = i;
            while word(at(i)) {
                i += 1;
            }
            out.push(c[start..i].iter().collect());
        } else {
            let step = if at(i) == ':' && at(i + 1) == ':' { 2 } else { 1 };
            if !at(i).is_whitespace() {
                out.push(c[i..i + step].iter().collect());
            }
            i += step;
        }
    }
    out
}

/// The rooms that a file refers to, by `crate::`, `countersign::` or enough `super::`. `depth` is how many modules the file is below the root.
fn rooms_of(source: &str, depth: usize) -> Result<Vec<String>, String> {
    let tokens = tokens(source);
    let at = |i: usize| tokens.get(i).map_or("", String::as_str);
    let (mut rooms, mut braces, mut inline) = (Vec::new(), 0usize, Vec::new());
    for i in 0..tokens.len() {
        match at(i) {
            "{" => {
                braces += 1;
                if i >= 2 && at(i - 2) == "mod" {
                    inline.push(braces);
                }
            }
            "}" => {
                if inline.last() == Some(&braces) {
                    inline.pop();
                }
                braces = braces.saturating_sub(1);
            }
            "crate" | "countersign" if at(i + 1) == "::" && at(i.wrapping_sub(1)) != "::" => {
                take(&tokens, i + 2, &mut rooms)?;
            }
            "crate" if at(i + 1) == "as" => return Err("gives the whole crate another name".to_owned()),
            "super" if at(i + 1) == "::" && at(i.wrapping_sub(1)) != "::" => {
                let mut j = i;
                let mut ups = 0;
                while at(j) == "super" && at(j + 1) == "::" {
                    (ups, j) = (ups + 1, j + 2);
                }
                if ups >= depth + inline.len() {
                    take(&tokens, j, &mut rooms)?;
                }
            }
            "path" if at(i.wrapping_sub(1)) == "[" && at(i + 1) == "=" => {
                return Err("puts a module where its path doesn't say".to_owned());
            }
            _ => {}
        }
    }
    Ok(rooms)
}

/// What stands after `crate::`: one name, or a group of them.
fn take(tokens: &[String], start: usize, rooms: &mut Vec<String>) -> Result<(), String> {
    let first = tokens.get(start).map_or("", String::as_str);
    if first != "{" {
        return add(first, rooms);
    }
    let mut depth = 0;
    let mut head = false;
    for token in &tokens[start..] {
        match token.as_str() {
            "{" => (depth, head) = (depth + 1, depth == 0),
            "}" if depth == 1 => return Ok(()),
            "}" => depth -= 1,
            "," if depth == 1 => head = true,
            name if depth == 1 && head => {
                add(name, rooms)?;
                head = false;
            }
            _ => {}
        }
    }
    Err("has an import that doesn't end".to_owned())
}

fn add(name: &str, rooms: &mut Vec<String>) -> Result<(), String> {
    if matches!(name, "*" | "self") {
        return Err("imports the whole crate".to_owned());
    }
    rooms.push(name.to_owned());
    Ok(())
}

/// What is wrong with the imports of one file, given by its path below `src/`.
fn wrong_imports(file: &str, source: &str) -> Vec<String> {
    let path = file.trim_end_matches(".rs").trim_end_matches("/mod");
    let parts: Vec<&str> = path.split('/').collect();
    let room = parts[0];
    if matches!(room, "main" | "lib") {
        return Vec::new(); // one dispatches, the other lists
    }
    let Some(own) = floor(room) else { return vec![format!("src/{file} is in no room of DESIGN section 4")] };
    let imported = match rooms_of(source, parts.len()) {
        Ok(imported) => imported,
        Err(what) => return vec![format!("src/{file} {what}")],
    };
    let mut wrong = Vec::new();
    for other in imported {
        let Some(theirs) = floor(&other) else { continue }; // a macro, not a room
        let assembles = parts.get(1).is_some_and(|p| CLI_ASSEMBLES.contains(p));
        let reason = if room != other && theirs <= own {
            "which is not below it"
        } else if room == "client" && !CLIENT_MAY.contains(&other.as_str()) {
            "which is no business of a client"
        } else if room == "cli" && !assembles && matches!(other.as_str(), "broker" | "server") {
            "but a command reaches a broker through `client`"
        } else {
            continue;
        };
        wrong.push(format!("src/{file} imports `{other}`, {reason}"));
    }
    wrong
}

/// All files below a folder, without what is built or downloaded.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        // In a worktree `.git` is a file.
        if matches!(name.as_str(), "target" | ".git" | "node_modules" | "data") {
            continue;
        }
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn sources(folder: &str) -> BTreeMap<String, String> {
    let base = root().join(folder);
    files(&base)
        .into_iter()
        .filter(|p| p.extension().is_some_and(|e| e == "rs"))
        .map(|p| (p.strip_prefix(&base).unwrap().to_string_lossy().into_owned(), fs::read_to_string(&p).unwrap()))
        .collect()
}

/// Fails with every finding, not just the first.
fn none(found: &[String]) {
    assert!(found.is_empty(), "\n{}\n", found.join("\n"));
}

#[test]
fn a_room_imports_only_what_is_below_it() {
    let sources = sources("src");
    assert!(sources.len() > 20, "only {} files were read", sources.len());
    none(&sources.iter().flat_map(|(file, source)| wrong_imports(file, source)).collect::<Vec<_>>());
}

#[test]
fn an_import_upwards_is_seen_however_it_is_written() {
    for (file, source) in [
        ("core/grant.rs", "use crate::time::Clock;"),
        ("core/mod.rs", "fn f() { crate::keys::random::grant_id(); }"),
        ("store/mod.rs", "use crate::{core::id::GrantId, broker::Broker};"),
        ("store/mod.rs", "use crate::{\n    core::{id, lease},\n    connector,\n};"),
        ("connector/vault/mod.rs", "use super::super::broker::Broker;"),
        ("connector/mod.rs", "use super::policy;"),
        ("connector/mod.rs", "mod tests { use super::super::identity::Method; }"),
        ("identity/oidc.rs", "const A: char = '\"'; use crate::server::App;"),
        ("identity/oidc.rs", "const A: &str = \"\\\"\"; use crate::server::App;"),
        ("identity/oidc.rs", "fn f<'a>(x: &'a str) {} use crate::server::App;"),
        ("identity/oidc.rs", "const A: &str = r#\"a\"b\"#; use crate :: server::App;"),
        ("identity/oidc.rs", "/* /* */ */ use crate::server::App;"),
        ("client/mod.rs", "use crate::server::App;"),
        ("client/mod.rs", "use crate::connector::Credential;"),
        ("server/mod.rs", "use crate::client::Client;"),
        ("cli/approve.rs", "use crate::broker::Broker;"),
        ("cli/mod.rs", "use crate::server::App;"),
        ("core/mod.rs", "use crate::*;"),
        ("core/mod.rs", "use crate::{self, core};"),
        ("core/mod.rs", "use crate as c;"),
        ("core/mod.rs", "#[path = \"../broker/mod.rs\"] mod b;"),
        ("helpers/mod.rs", ""),
    ] {
        assert_eq!(wrong_imports(file, source).len(), 1, "{file}: {source}");
    }
}

#[test]
fn what_is_allowed_is_let_through() {
    for (file, source) in [
        ("core/grant.rs", "use super::id::GrantId; use crate::core::lease::Lease;"),
        ("core/grant.rs", "// use crate::broker\n/// [`crate::broker`]\nconst A: &str = \"crate::broker\";"),
        ("connector/token.rs", "use super::Connector; mod tests { use super::super::Connector; }"),
        ("connector/token.rs", "mod tests { } use crate::{core::id::{self, GrantId}, keys::SigningKeys};"),
        ("broker/mod.rs", "use crate::{store, policy, connector};"),
        ("client/mod.rs", "use crate::wire::Grant; use crate::identity::Method;"),
        ("cli/serve.rs", "use crate::broker::Broker; use crate::server::App;"),
        ("cli/tour/steps.rs", "use crate::broker::Broker;"),
        ("cli/approve.rs", "use crate::client::Client; use crate::audit::verify;"),
        ("main.rs", "use countersign::cli;"),
    ] {
        assert_eq!(wrong_imports(file, source), Vec::<String>::new(), "{source}");
    }
}

/// What is wrong with a file's form.
fn wrong_form(name: &str, source: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    if !source.starts_with("//!") {
        wrong.push(format!("{name} doesn't begin by saying what lives in it (`//!`)"));
    }
    let lines = source.lines().count();
    if lines > LINES_MAX {
        wrong.push(format!("{name} has {lines} lines; a file has one subject and at most {LINES_MAX}"));
    }
    wrong
}

#[test]
fn each_file_says_what_it_is_and_fits() {
    let mut wrong = Vec::new();
    for folder in ["src", "tests"] {
        for (file, source) in sources(folder) {
            wrong.extend(wrong_form(&format!("{folder}/{file}"), &source));
        }
    }
    none(&wrong);
    assert_eq!(wrong_form("a.rs", "fn a() {}").len(), 1);
    assert_eq!(wrong_form("a.rs", &format!("//! a\n{}", "\n".repeat(LINES_MAX - 1))).len(), 0);
    assert_eq!(wrong_form("a.rs", &format!("//! a\n{}", "\n".repeat(LINES_MAX))).len(), 1);
}

/// Names of the list that may not be in the tree.
fn forbidden_crates(tree: &str) -> Vec<String> {
    let name = |line: &str| line.split(' ').next().unwrap_or("").to_owned();
    let mut found: Vec<String> = tree.lines().map(name).collect();
    found.retain(|n| matches!(n.as_str(), "ring" | "openssl" | "openssl-sys" | "native-tls"));
    found.sort();
    found.dedup();
    found
}

#[test]
fn there_is_one_crypto_provider() {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let out = Command::new(cargo)
        .current_dir(root())
        .args(["tree", "--locked", "--offline", "--target", "x86_64-unknown-linux-gnu"])
        .args(["--edges", "normal,build,dev", "--prefix", "none", "--format", "{p}"])
        .output()
        .unwrap();
    let tree = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(tree.lines().any(|l| l.starts_with("aws-lc-rs ")), "this is not our tree:\n{tree}");
    none(&forbidden_crates(&tree));
    assert_eq!(forbidden_crates("ring v0.17\nopenssl-probe v0.2\nopenssl-sys v1\nring v0.17"), ["openssl-sys", "ring"]);
}

/// What ties a file to one machine: somebody's home, or the place that packages were downloaded from.
fn machine_traces(text: &str) -> Vec<String> {
    // Put together here, so that this file doesn't find itself.
    let homes = ["home", "root", "Users", "work"].map(|h| format!("/{h}/"));
    let hosts = [("crates", "io"), ("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"), ("npmjs", "com")]
        .map(|(a, b)| format!("{a}.{b}"));
    let starts_a_path = |at: usize| !text[..at].ends_with(|c: char| c.is_alphanumeric() || "_-.$}*/".contains(c));
    let mut found: Vec<String> = hosts.into_iter().filter(|h| text.contains(h.as_str())).collect();
    for home in homes {
        if text.match_indices(&home).any(|(at, _)| starts_a_path(at)) {
            found.push(home);
        }
    }
    found
}

#[test]
fn nothing_of_a_machine_is_in_the_tree() {
    let mut wrong = Vec::new();
    let mut read = 0;
    for path in files(&root()) {
        // Cargo.lock names the registry by cargo's own rule.
        let Ok(text) = fs::read_to_string(&path) else { continue };
        if path.ends_with("Cargo.lock") {
            continue;
        }
        read += 1;
        let name = path.strip_prefix(root()).unwrap().display().to_string();
        wrong.extend(machine_traces(&text).into_iter().map(|t| format!("{name} mentions {t}")));
    }
    assert!(read > 30, "only {read} files were read");
    none(&wrong);
    let home = format!("cd /{}/ana/x", "home");
    assert_eq!(machine_traces(&home).len(), 1);
    assert_eq!(machine_traces(&format!("https://registry.{}.org/x", "npmjs")).len(), 1);
    assert_eq!(machine_traces("$HOME/x, var/root/x, ${CACHE}/work/x, api/work/y"), Vec::<String>::new());
}
