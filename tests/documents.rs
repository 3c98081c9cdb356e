//! The documents say what is so: each path that they name exists, each command that they show is one of the program's, with
//! the options that they show, and each test that docs/regressions.md names is in the tree.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Files below a folder whose names end so, by their path from the root.
fn below(folder: &str, end: &str) -> Vec<String> {
    let mut out = Vec::new();
    for entry in fs::read_dir(root().join(folder)).unwrap() {
        let path = entry.unwrap().path();
        let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if !["target", ".git", "node_modules", "data"].iter().any(|n| name == *n) {
                out.extend(below(&name, end));
            }
        } else if name.ends_with(end) {
            out.push(name.trim_start_matches('/').to_owned());
        }
    }
    out.sort();
    out
}

fn documents() -> Vec<(String, String)> {
    let all = below("", ".md").into_iter();
    all.map(|name| (name.clone(), fs::read_to_string(root().join(&name)).unwrap())).collect()
}

/// What stands between backticks outside of blocks, and what links lead to.
fn named(text: &str) -> Vec<String> {
    let mut out = Vec::new();
    for (i, prose) in text.split("```").enumerate() {
        if i % 2 == 1 {
            continue; // a block
        }
        out.extend(prose.split('`').skip(1).step_by(2).map(str::to_owned));
        let links = prose.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        out.extend(links.map(|link| link.split('#').next().unwrap_or_default().to_owned()));
    }
    out
}

/// The paths among them: with one of our folders in front, or a file name of ours at the end.
fn paths(text: &str) -> Vec<String> {
    let folders = [".ci/", "benches/", "config/", "docker/", "docs/", "examples/", "src/", "tests/"];
    let ends = [".rs", ".md", ".html", ".css", ".js", ".sql", ".yml"];
    let plain = |p: &String| p.chars().all(|c| c.is_ascii_alphanumeric() || "._-/".contains(c)) && !p.starts_with('/');
    let ours = |p: &String| {
        folders.iter().any(|f| p.starts_with(f)) || ends.iter().any(|e| p.ends_with(e) && p.len() > e.len())
    };
    named(text).into_iter().filter(plain).filter(ours).collect()
}

/// Does a document's path lead anywhere: from the root, from the document, from `src/`, or as the name of a file there?
fn exists(document: &str, path: &str, names: &BTreeSet<String>) -> bool {
    let from = root().join(document);
    let folders = [root(), from.parent().unwrap().to_owned(), root().join("src")];
    folders.iter().any(|folder| folder.join(path).exists()) || (!path.contains('/') && names.contains(path))
}

fn file_names() -> BTreeSet<String> {
    let name = |p: &String| Path::new(p).file_name().unwrap().to_string_lossy().into_owned();
    ["src", "tests", "config"].iter().flat_map(|f| below(f, "")).map(|p| name(&p)).collect()
}

#[test]
fn every_path_that_a_document_names_is_there() {
    let names = file_names();
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (document, text) in documents() {
        for path in paths(&text) {
            seen += 1;
            if !exists(&document, &path, &names) {
                wrong.push(format!("{document} names {path}, which isn't there"));
            }
        }
    }
    assert!(seen > 60, "only {seen} paths were seen");
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));

    let text = "see `src/store/engine.rs`, [this](adr/0001-aws-lc-rs.md#why), `no path`, `core/grant.rs`\n```\n`src/x.rs`\n```\n`x.rs`";
    let found = paths(text);
    assert_eq!(found, ["src/store/engine.rs", "core/grant.rs", "adr/0001-aws-lc-rs.md", "x.rs"]);
    let there: Vec<bool> = found.iter().map(|p| exists("docs/ARCHITECTURE.md", p, &names)).collect();
    assert_eq!(there, [false, true, true, false]);
}

/// One command line that a text shows: what follows the program's name, up to what another program gets.
fn commands(text: &str) -> Vec<Vec<String>> {
    let mut out = Vec::new();
    let text = text.replace("\\\n", " ");
    // In a block or a comment a line begins with the program; in prose it stands between backticks, on a page in <code>.
    let lines = text.lines().map(|l| l.trim_start_matches(['#', ' ', '/', '!', '>']));
    let starts = lines.chain(text.split('`').skip(1).step_by(2)).chain(text.split("<code>").skip(1));
    for line in starts {
        let Some(rest) = ["countersign ", "cargo run --release -- "].iter().find_map(|p| line.strip_prefix(p)) else {
            continue;
        };
        let rest = rest.split(['`', '<', '#', '&', ';', '|']).next().unwrap_or_default();
        let words: Vec<String> = rest.split_whitespace().map(|w| w.trim_matches(['.', ',', ':']).to_owned()).collect();
        let ours: Vec<String> = words.split(|w| w == "--").next().unwrap_or_default().to_vec();
        let first = ours.first().map(String::as_str).unwrap_or_default();
        if first.starts_with('-') || (first.len() > 1 && first.chars().all(|c| c.is_ascii_lowercase() || c == '-')) {
            out.push(ours);
        }
    }
    out
}

/// Asks the program itself, once for each command.
struct Program(BTreeMap<Vec<String>, Option<String>>);

impl Program {
    fn help(&mut self, words: &[String]) -> Option<String> {
        let known = self.0.entry(words.to_vec()).or_insert_with(|| {
            let run = Command::new(env!("CARGO_BIN_EXE_countersign")).args(words).arg("--help").output().unwrap();
            run.status.success().then(|| String::from_utf8_lossy(&run.stdout).into_owned())
        });
        known.clone()
    }

    /// What is wrong with a command line.
    fn fault(&mut self, words: &[String]) -> Option<String> {
        let heads = words.iter().take_while(|w| !w.starts_with('-')).count();
        // `config check`: two words, if the second is a command of the first.
        let mut command = words[..heads.min(1)].to_vec();
        let mut help = self.help(&command).or_else(|| command.is_empty().then(String::new));
        if heads > 1
            && let Some(first) = &help
            && first.contains("Commands:\n")
        {
            command = words[..2].to_vec();
            help = self.help(&command);
        }
        let Some(help) = help else { return Some(format!("there is no `countersign {}`", command.join(" "))) };
        let options = words.iter().filter(|w| w.starts_with("--")).map(|w| w.split('=').next().unwrap_or_default());
        let known = |o: &&str| help.split(|c: char| c.is_whitespace() || ",[=".contains(c)).any(|w| w == *o);
        let unknown = options.filter(|o| !known(o) && *o != "--help").collect::<Vec<_>>();
        (!unknown.is_empty()).then(|| format!("`countersign {}` has no {}", command.join(" "), unknown.join(", ")))
    }
}

#[test]
fn every_command_that_is_shown_is_one() {
    let mut texts = documents();
    let pages = below("src/server/console/templates", ".html").into_iter();
    for file in pages.chain(["docker-compose.yml".to_owned(), "config/countersign.toml".to_owned()]) {
        texts.push((file.clone(), fs::read_to_string(root().join(file)).unwrap()));
    }
    let mut program = Program(BTreeMap::new());
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (file, text) in texts {
        for words in commands(&text) {
            seen += 1;
            wrong.extend(program.fault(&words).map(|fault| format!("{file}: {fault}: {}", words.join(" "))));
        }
    }
    assert!(seen > 15, "only {seen} commands were seen");
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));

    let text = "`countersign lie` <code>countersign audit lie</code>\n    countersign serve --lie FILE\n\
                countersign exec --want a:b --why 'x' -- psql --lie\n# countersign config check --config=FILE";
    let faults: Vec<bool> = commands(text).iter().map(|words| program.fault(words).is_some()).collect();
    assert_eq!(faults.iter().filter(|f| **f).count(), 3, "{faults:?} of {:?}", commands(text));
    assert_eq!(faults.len(), 5);
}

/// The tests that a text names as `file::name`, and that aren't there.
fn missing_tests(text: &str) -> Vec<String> {
    let all = named(text).into_iter().filter(|n| n.contains(".rs::"));
    let is_there = |name: &String| {
        let Some((file, test)) = name.split_once("::") else { return false };
        let Ok(source) = fs::read_to_string(root().join(file)) else { return false };
        let lines: Vec<&str> = source.lines().map(str::trim).collect();
        let at = lines.iter().position(|l| l.trim_start_matches("async ").starts_with(&format!("fn {test}(")));
        // Marked as a test, on one of the lines above; or inside of `proptest!`, whose tests are marked there too.
        at.is_some_and(|at| {
            lines[..at].iter().rev().take(4).any(|l| l.starts_with("#[test]") || l.starts_with("#[tokio::test"))
        })
    };
    all.filter(|name| !is_there(name)).collect()
}

#[test]
fn every_regression_has_a_test_that_is_in_the_tree_or_says_why_not() {
    let text = fs::read_to_string(root().join("docs/regressions.md")).unwrap();
    assert_eq!(missing_tests(&text), Vec::<String>::new());
    let counts = [('L', 12), ('A', 18), ('P', 10), ('R', 7), ('D', 15)];
    for case in counts.into_iter().flat_map(|(letter, count)| (1..=count).map(move |n| format!("{letter}{n}"))) {
        let row = text.lines().find(|l| l.starts_with(&format!("| {case} |")));
        let row = row.unwrap_or_else(|| panic!("{case} is missing"));
        let last = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        assert!(last.contains(".rs::") || last.len() > 20, "{case} has neither a test nor a reason");
    }
    assert_eq!(missing_tests("`tests/documents.rs::missing_tests`, `tests/none.rs::a`").len(), 2);
    assert!(missing_tests("`tests/documents.rs::every_path_that_a_document_names_is_there`").is_empty());
}

/// What a text asks for with `--want`, and that no catalogue of those has.
fn unknown_wants(text: &str, catalogues: &[&str]) -> Vec<String> {
    let mut offered = BTreeSet::new();
    for file in catalogues {
        // `dev` fills in words between @, of which some are numbers.
        let text = fs::read_to_string(root().join(file)).unwrap().replace("= @PG_PORT@", "= 5432");
        let read: toml::Table = text.parse().unwrap();
        for resource in read["resource"].as_array().unwrap() {
            for action in resource["action"].as_array().unwrap() {
                let name = |v: &toml::Value| v["name"].as_str().unwrap().to_owned();
                offered.insert(format!("{}:{}", name(resource), name(action)));
            }
        }
    }
    let wants = text.split("--want ").skip(1).filter_map(|rest| rest.split_whitespace().next());
    wants.filter(|w| !offered.contains(*w)).map(str::to_owned).collect()
}

#[test]
fn what_the_examples_ask_for_can_be_asked_for() {
    let read = |file: &str| fs::read_to_string(root().join(file)).unwrap();
    let dev = ["config/dev/catalogue.toml", "config/dev/catalogue-postgres.toml"];
    assert_eq!(unknown_wants(&read("README.md"), &dev), Vec::<String>::new());
    assert_eq!(unknown_wants(&read("docker-compose.yml"), &["config/compose/catalogue.toml"]), Vec::<String>::new());
    assert_eq!(unknown_wants("--want postgres/sandbox:read --want postgres/none:read", &dev), ["postgres/none:read"]);
}
