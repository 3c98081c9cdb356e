//! What the commands print: colours where somebody looks, tables, wrapped text, durations. Text from outside
//! goes through [`safe`] or [`quoted`] before it comes here (regression P8).

use std::io::{IsTerminal, Write};
use std::time::Duration;

use serde::Serialize;

use super::CliError;

pub use crate::wire::visible::{terminal as quoted, terminal_message as safe};

/// Text is not wrapped wider than this, in columns.
const WIDTH_MAX: usize = 110;
/// Nor narrower.
const WIDTH_MIN: usize = 40;
/// Longest duration that can be given: a year.
const DURATION_SECS_MAX: u64 = 366 * 86_400;

/// How to print on stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    colour: bool,
    /// Columns, where a person looks; else nothing is wrapped or shortened.
    pub width: Option<usize>,
}

impl Look {
    /// Of this process's stdout. `NO_COLOR` (<https://no-color.org>) and `TERM=dumb` take the colours away.
    pub fn of_stdout() -> Self {
        let stdout = std::io::stdout();
        if !stdout.is_terminal() {
            return Self::PLAIN;
        }
        let set = |name: &str| std::env::var_os(name).is_some_and(|v| !v.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|t| t == "dumb");
        let columns = rustix::termios::tcgetwinsize(&stdout).map_or(0, |size| usize::from(size.ws_col));
        let width = if columns == 0 { 80 } else { columns.clamp(WIDTH_MIN, WIDTH_MAX) };
        Self { colour: !set("NO_COLOR") && !dumb, width: Some(width) }
    }

    /// For pipes, files and tests.
    pub const PLAIN: Self = Self { colour: false, width: None };

    /// The same, and no line is broken.
    #[must_use]
    pub const fn unwrapped(self) -> Self {
        Self { width: None, ..self }
    }

    fn sgr(self, code: &str, text: &str) -> String {
        if self.colour && !text.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
    /// What matters most.
    pub fn bold(self, text: &str) -> String {
        self.sgr("1", text)
    }
    /// What matters least.
    pub fn dim(self, text: &str) -> String {
        self.sgr("2", text)
    }
    /// Fine.
    pub fn good(self, text: &str) -> String {
        self.sgr("32", text)
    }
    /// To be looked at.
    pub fn warn(self, text: &str) -> String {
        self.sgr("33", text)
    }
    /// Not fine.
    pub fn bad(self, text: &str) -> String {
        self.sgr("31", text)
    }

    /// A state's word, in its colour.
    pub fn state(self, word: &str) -> String {
        match word {
            "active" | "live" | "ended" | "revoked" | "absent" => self.good(word),
            "pending" | "ending" | "revoking" | "intended" => self.warn(word),
            "denied" | "unknown" => self.bad(word),
            _ => word.to_owned(),
        }
    }

    /// `text` in lines that fit behind `indent` columns; lines after the first are indented, also where nobody looks:
    /// no line of a text can be taken for one of ours.
    pub fn wrap(self, text: &str, indent: usize) -> String {
        let room = self.width.map_or(usize::MAX, |width| width.saturating_sub(indent).max(20));
        let mut out = String::new();
        for (i, line) in text.split('\n').enumerate() {
            if i > 0 {
                new_line(&mut out, indent);
            }
            let mut column = 0;
            for (j, word) in line.split(' ').enumerate() {
                let len = columns(word);
                if column > 0 && column + 1 + len > room {
                    new_line(&mut out, indent);
                    column = 0;
                } else if j > 0 {
                    out.push(' ');
                    column += 1;
                }
                out.push_str(word);
                column += len;
            }
        }
        out
    }
}

fn new_line(out: &mut String, indent: usize) {
    out.push('\n');
    out.extend(std::iter::repeat_n(' ', indent));
}

/// Columns that a text without escape sequences takes: characters. Wide ones count as one, which shifts a table
/// and breaks nothing.
fn columns(text: &str) -> usize {
    text.chars().count()
}

/// Lines of `label  value`, the values under one another and wrapped. Several values for one label stand below each other.
pub fn facts(look: Look, rows: &[(&str, Vec<String>)]) -> String {
    let width = rows.iter().map(|(label, _)| columns(label)).max().unwrap_or(0);
    let mut out = String::new();
    for (label, values) in rows {
        for (i, value) in values.iter().enumerate() {
            let label = if i == 0 { label } else { "" };
            let pad = " ".repeat(width - columns(label));
            out.push_str(&format!("{}{pad}  {}\n", look.dim(label), look.wrap(value, width + 2)));
        }
    }
    out
}

/// A table with a head. The last column is wrapped; the others are as wide as they need. A cell has its plain text
/// and what is printed for it (the same, perhaps coloured).
pub fn table(look: Look, head: &[&str], rows: &[Vec<Cell>]) -> String {
    let last = head.len().saturating_sub(1);
    let widths: Vec<usize> = (0..last)
        .map(|c| {
            rows.iter().filter_map(|r| r.get(c)).map(|x| columns(&x.plain)).chain([columns(head[c])]).max().unwrap_or(0)
        })
        .collect();
    let indent: usize = widths.iter().map(|w| w + 2).sum();
    let mut out = String::new();
    let mut line = |cells: &[Cell]| {
        let mut text = String::new();
        for (c, cell) in cells.iter().enumerate().take(head.len()) {
            if c == last {
                text.push_str(&look.wrap(&cell.shown, indent));
            } else {
                text.push_str(&cell.shown);
                text.extend(std::iter::repeat_n(' ', widths[c] + 2 - columns(&cell.plain)));
            }
        }
        out.push_str(text.trim_end());
        out.push('\n');
    };
    line(&head.iter().map(|h| Cell { plain: (*h).to_owned(), shown: look.dim(h) }).collect::<Vec<_>>());
    for row in rows {
        line(row);
    }
    out
}

/// One field of a table.
#[derive(Debug, Clone)]
pub struct Cell {
    plain: String,
    shown: String,
}

impl Cell {
    /// A field with a look of its own.
    pub fn shown(plain: &str, shown: String) -> Self {
        Self { plain: plain.to_owned(), shown }
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self { plain: text.to_owned(), shown: text.to_owned() }
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self { plain: text.clone(), shown: text }
    }
}

/// Writes to stdout. False if nobody reads any more (`| head`).
pub fn print_open(text: &str) -> Result<bool, CliError> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(CliError::said(format!("can't write to standard output: {e}"))),
    }
}

/// Writes to stdout; that nobody reads any more is no failure.
pub fn print(text: &str) -> Result<(), CliError> {
    print_open(text).map(|_| ())
}

/// Writes JSON to stdout, for scripts.
pub fn print_json(value: &impl Serialize) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(value).map_err(CliError::said)?;
    print(&format!("{text}\n"))
}

/// Asks for a word on the terminal. False if it isn't that word; an error if nobody can be asked.
pub fn ask(question: &str, word: &str) -> Result<bool, CliError> {
    if !std::io::stdin().is_terminal() {
        return Err(CliError::said(
            "this asks before it acts, and there is no terminal to ask on; add --yes if you are sure",
        ));
    }
    eprint!("{question} ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).map_err(|e| CliError::said(format!("can't read the answer: {e}")))?;
    Ok(answer.trim() == word)
}

/// `90s`, `10m`, `1h`, `1h30m`, `2d`. A number without a unit is refused: seconds or minutes, nobody knows.
pub fn duration(text: &str) -> Result<Duration, String> {
    const FORM: &str = "write a duration like 90s, 10m, 1h30m or 2d";
    let mut secs: u64 = 0;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or(FORM)?;
        let n: u64 = rest[..digits].parse().map_err(|_| FORM)?;
        let size = match rest.as_bytes()[digits] {
            b's' => 1,
            b'm' => 60,
            b'h' => 3600,
            b'd' => 86_400,
            _ => return Err(FORM.to_owned()),
        };
        secs = n.checked_mul(size).and_then(|n| secs.checked_add(n)).ok_or("that is too long")?;
        rest = &rest[digits + 1..];
    }
    match secs {
        0 => Err(FORM.to_owned()),
        s if s > DURATION_SECS_MAX => Err("at most a year".to_owned()),
        s => Ok(Duration::from_secs(s)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        for (text, secs) in
            [("90s", 90), ("10m", 600), ("1h", 3600), ("1h30m", 5400), ("2d", 172_800), ("366d", 366 * 86_400)]
        {
            assert_eq!(duration(text), Ok(Duration::from_secs(secs)), "{text}");
        }
        for bad in [
            "",
            "0s",
            "10",
            "m",
            "1x",
            "-1s",
            "1.5h",
            "10 m",
            "１m",
            "1hé",
            "367d",
            "99999999999999999999s",
            "18446744073709551615d",
        ] {
            assert!(duration(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn pipes_get_plain_whole_text_and_terminals_colours_and_lines_that_fit() {
        let plain = Look::PLAIN;
        assert_eq!(plain.bold("x"), "x");
        assert_eq!(plain.wrap(&"word ".repeat(100), 4), "word ".repeat(100));
        assert_eq!(plain.wrap("a\nb", 3), "a\n   b", "no line begins where ours do");
        let seen = Look { colour: true, width: Some(40) };
        assert_eq!(seen.bad("no"), "\x1b[31mno\x1b[0m");
        assert_eq!(seen.bold(""), "");
        let wrapped = seen.wrap("one two three four five six seven eight nine ten", 10);
        assert!(wrapped.lines().skip(1).all(|l| l.starts_with("          ") && l.len() <= 40), "{wrapped}");
        assert_eq!(wrapped.split_whitespace().count(), 10);
        assert_eq!(seen.wrap(&"x".repeat(200), 0), "x".repeat(200), "a word is never cut");
    }

    #[test]
    fn columns_stand_under_one_another() {
        let rows = vec![
            vec!["gr_1".into(), Cell::shown("é", "\x1b[1mé\x1b[0m".to_owned()), "last".into()],
            vec!["gr_22".into(), "xyz".into(), "".into()],
        ];
        let text = table(Look::PLAIN, &["ID", "B", "C"], &rows);
        assert_eq!(text, "ID     B    C\ngr_1   \x1b[1mé\x1b[0m    last\ngr_22  xyz\n");
        let text = facts(
            Look::PLAIN,
            &[("can", vec!["a".into(), "b".into()]), ("cannot", vec!["c".into()]), ("none", vec![])],
        );
        assert_eq!(text, "can     a\n        b\ncannot  c\n");
    }
}
