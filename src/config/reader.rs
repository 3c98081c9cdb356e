//! TOML with places: each section is read on its own, so that one pass finds every problem, and a
//! problem found later, when values are compared, still knows its line. What is checked is in `check`.

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue, ValueDeserializer};

use super::load::Problem;

/// Most unknown keys that are told of one section.
const UNKNOWN_KEYS_TOLD_MAX: usize = 16;

/// A file's name and text.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) file: String,
    pub(super) text: String,
}

impl Source {
    /// `file:line` of a byte offset.
    pub(super) fn line(&self, offset: usize) -> String {
        format!("{}:{}", self.file, line_of(&self.text, offset))
    }
}

/// The line (from 1) of a byte offset.
pub(super) fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes().iter().take(offset).filter(|b| **b == b'\n').count() + 1
}

/// A TOML document that is taken apart section by section. What is left over is unknown.
pub(super) struct Doc<'a> {
    source: &'a Source,
    table: DeTable<'a>,
}

/// A value that was read, with where it stands.
pub(super) struct Item<'a, T> {
    pub(super) value: T,
    source: &'a Source,
    raw: Spanned<DeValue<'a>>,
}

impl<'a> Doc<'a> {
    /// Parses. Every syntax error is a problem; the rest is read all the same.
    pub(super) fn parse(source: &'a Source, problems: &mut Vec<Problem>) -> Self {
        let (table, errors) = DeTable::parse_recoverable(&source.text);
        for e in errors {
            let place = e.span().map_or_else(|| source.file.clone(), |s| source.line(s.start));
            problems.push(Problem { place, what: format!("this isn't TOML: {}", scrub(e.message())) });
        }
        Self { source, table: table.into_inner() }
    }

    /// Takes a table out. `None` if it is absent or could not be read (then that is a problem already).
    pub(super) fn section<T: DeserializeOwned>(&mut self, key: &str, out: &mut Vec<Problem>) -> Option<Item<'a, T>> {
        let (key, raw) = self.table.remove_entry(key)?;
        // A table's own span is its header or nothing useful: the key's is where a person looks.
        self.read(key.span().start, raw, out)
    }

    /// True if the key is there.
    pub(super) fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// Takes an array of tables out. Elements that can't be read are problems and are left out; their
    /// `name_key` goes to `unread`, so that a reference to one is not a second problem.
    pub(super) fn list<T: DeserializeOwned>(
        &mut self,
        key: &str,
        name_key: &str,
        unread: &mut Vec<String>,
        out: &mut Vec<Problem>,
    ) -> Vec<Item<'a, T>> {
        let Some((_, raw)) = self.table.remove_entry(key) else { return Vec::new() };
        let start = raw.span().start;
        let DeValue::Array(elements) = raw.into_inner() else {
            out.push(Problem {
                place: self.source.line(start),
                what: format!("`{key}` must be a list of tables; write `[[{key}]]` above each"),
            });
            return Vec::new();
        };
        let mut items = Vec::new();
        for element in elements {
            let name = element.get_ref().as_table().and_then(|t| t.get(name_key)).and_then(|v| v.get_ref().as_str());
            let name = name.map(str::to_owned);
            let start = element.span().start;
            match self.read(start, element, out) {
                Some(item) => items.push(item),
                None => unread.extend(name),
            }
        }
        items
    }

    fn read<T: DeserializeOwned>(
        &self,
        start: usize,
        mut raw: Spanned<DeValue<'a>>,
        out: &mut Vec<Problem>,
    ) -> Option<Item<'a, T>> {
        let before = out.len();
        for _ in 0..=UNKNOWN_KEYS_TOLD_MAX {
            match T::deserialize(ValueDeserializer::from(raw.clone())) {
                Ok(value) if out.len() == before => return Some(Item { value, source: self.source, raw }),
                Ok(_) => return None,
                Err(e) => {
                    let span = e.span();
                    let offset = span.as_ref().map_or(start, |s| if s.start < s.end { s.start } else { start });
                    out.push(Problem { place: self.source.line(offset), what: advise(e.message()) });
                    // With the unknown key gone, the next problem of this section can be found.
                    let unknown = e.message().starts_with("unknown field");
                    if !(unknown && span.is_some_and(|s| remove_key(raw.get_mut(), s.start))) {
                        return None;
                    }
                }
            }
        }
        None
    }

    /// What nobody took is unknown.
    pub(super) fn finish(self, known: &[&str], out: &mut Vec<Problem>) {
        for key in self.table.keys() {
            out.push(Problem {
                place: self.source.line(key.span().start),
                what: format!("unknown key `{}`; known here: {}", clip(key.get_ref()), known.join(", ")),
            });
        }
    }
}

impl<T> Item<'_, T> {
    /// `file:line` of the value itself, or of what `path` (keys, and indices as text) names below it; as
    /// deep as the file goes.
    pub(super) fn place(&self, path: &[&str]) -> String {
        let mut at = &self.raw;
        let mut offset = at.span().start;
        for step in path {
            let next = match at.get_ref() {
                DeValue::Table(t) => t.get_key_value(*step).map(|(k, v)| (k.span().start, v)),
                DeValue::Array(a) => step.parse().ok().and_then(|i: usize| a.get(i)).map(|v| (v.span().start, v)),
                _ => None,
            };
            let Some((start, value)) = next else { break };
            (offset, at) = (start, value);
        }
        self.source.line(offset)
    }

    /// A problem with what `path` names.
    pub(super) fn problem(&self, path: &[&str], what: impl Into<String>) -> Problem {
        Problem { place: self.place(path), what: what.into() }
    }
}

/// Removes the key that begins at `offset`, at any depth.
fn remove_key(value: &mut DeValue<'_>, offset: usize) -> bool {
    match value {
        DeValue::Table(table) => {
            let found = table.keys().find(|k| k.span().start == offset).map(|k| k.get_ref().to_string());
            if let Some(key) = found {
                return table.remove(key.as_str()).is_some();
            }
            let keys: Vec<String> = table.keys().map(|k| k.get_ref().to_string()).collect();
            keys.iter().any(|k| table.get_mut(k.as_str()).is_some_and(|v| remove_key(v.get_mut(), offset)))
        }
        DeValue::Array(array) => array.iter_mut().any(|v| remove_key(v.get_mut(), offset)),
        _ => false,
    }
}

/// A reader's message with what to do.
fn advise(message: &str) -> String {
    let message = scrub(message);
    if let Some(rest) = message.strip_prefix("unknown field ") {
        return format!("unknown key {}; remove it or correct its name", rest.replace(", expected", "; known here:"));
    }
    if message.starts_with("missing field ") {
        return format!("{}; add it", message.replace("missing field", "missing key"));
    }
    message
}

/// Takes values out of a reader's message: what stands in the wrong place may be a secret (regression R2).
fn scrub(message: &str) -> String {
    for kind in ["string", "character"] {
        let opening = format!("{kind} \"");
        if let Some(start) = message.find(&opening)
            && let Some(end) = message.rfind('"')
            && end >= start + opening.len()
        {
            return format!("{}a {kind}{}", &message[..start], &message[end + 1..]);
        }
    }
    if message.starts_with("unknown variant `")
        && let Some(end) = message.find("`, ")
    {
        return format!("unknown value{}", &message[end + 1..]);
    }
    clip(message)
}

/// At most 300 characters, without control characters.
pub(super) fn clip(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Thing {
        #[allow(dead_code)]
        name: String,
        #[serde(default)]
        inner: Option<Box<Thing>>,
    }

    fn source(text: &str) -> Source {
        Source { file: "f.toml".to_owned(), text: text.to_owned() }
    }

    #[test]
    fn every_unknown_key_is_told_with_its_line() {
        let s = source("[a]\nname = 'x'\nb = 1\n[a.inner]\nname = 'y'\nc = 2\n[d]\n");
        let mut out = Vec::new();
        let mut doc = Doc::parse(&s, &mut out);
        assert!(doc.section::<Thing>("a", &mut out).is_none());
        doc.finish(&["a"], &mut out);
        let places: Vec<&str> = out.iter().map(|p| p.place.as_str()).collect();
        assert_eq!(places, ["f.toml:3", "f.toml:6", "f.toml:7"], "{out:?}");
        assert!(out[0].what.contains("unknown key `b`; known here: `name` or `inner`"), "{out:?}");
        assert!(out[2].what.contains("unknown key `d`; known here: a"), "{out:?}");
    }

    #[test]
    fn a_value_in_the_wrong_place_is_never_echoed() {
        let s = source("[[a]]\nname = 'x'\ninner = 'hunter2-hunter2'\n[[a]]\nname = 7\n");
        let (mut out, mut unread) = (Vec::new(), Vec::new());
        let mut doc = Doc::parse(&s, &mut out);
        assert!(doc.list::<Thing>("a", "name", &mut unread, &mut out).is_empty());
        assert_eq!(unread, ["x"]);
        assert_eq!(out.len(), 2);
        assert!(!format!("{out:?}").contains("hunter2"), "{out:?}");
        assert!(out[0].what.contains("a string, expected"), "{out:?}");
        assert_eq!(scrub("unknown variant `hunter2`, expected one of `a`"), "unknown value, expected one of `a`");
    }

    #[test]
    fn a_place_is_as_deep_as_the_file_goes() {
        let s = source("[[a]]\nname = 'x'\n[a.inner]\nname = 'y'\n");
        let (mut out, mut unread) = (Vec::new(), Vec::new());
        let mut doc = Doc::parse(&s, &mut out);
        let items = doc.list::<Thing>("a", "name", &mut unread, &mut out);
        assert_eq!(items[0].place(&["inner", "name"]), "f.toml:4");
        assert_eq!(items[0].place(&["inner", "nothing"]), "f.toml:3");
        assert_eq!(items[0].place(&[]), "f.toml:1");
        assert!(items[0].value.inner.is_some());
    }

    #[test]
    fn syntax_errors_have_a_line() {
        let s = source("a = 1\nb = = 2\n");
        let mut out = Vec::new();
        let _ = Doc::parse(&s, &mut out);
        assert_eq!(out[0].place, "f.toml:2");
        assert!(out[0].what.starts_with("this isn't TOML"));
    }
}
