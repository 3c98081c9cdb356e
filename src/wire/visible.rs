//! Text from outside, made safe to look at: what could hide, reorder or command becomes visible, and
//! length is bounded. Pages, command line and mail use it (regression P8).
//!
//! Escaping for HTML is not done here; the templates do it.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use unicode_normalization::UnicodeNormalization as _;
use unicode_normalization::char::is_combining_mark;

/// How much of a text is shown.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Characters, counted as shown.
    pub chars_max: usize,
    /// Lines. One means that a line break is shown as a code point.
    pub lines_max: usize,
}

/// For an agent's own words.
pub const WORDS: Limits = Limits { chars_max: 4000, lines_max: 80 };
/// For a name, a claim, an error: one line.
pub const LINE: Limits = Limits { chars_max: 300, lines_max: 1 };
/// For a message of several sentences, on one line.
pub const MESSAGE: Limits = Limits { chars_max: 2000, lines_max: 1 };
/// Combining marks on one letter that are shown as they are.
const MARKS_MAX: usize = 2;
/// Characters that are looked at for hints: more than is ever shown.
const HINTED_CHARS_MAX: usize = 16_000;
/// Hints given about one text.
const HINTS_MAX: usize = 4;

/// A text as it may be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// What to show.
    pub text: String,
    /// Characters of the original that are not in it.
    pub left_out: usize,
}

/// Several lines, for a page: controls, bidi, zero-width and other invisible characters as `‹U+202E›`.
pub fn visible(text: &str) -> String {
    let shown = show(text, WORDS, '‹', '›');
    with_rest(shown, "\n")
}

/// One line, for a page.
pub fn visible_line(text: &str) -> String {
    let shown = show(text, LINE, '‹', '›');
    with_rest(shown, " ")
}

/// Several lines, for a terminal, a log or a mail: as [`visible`], with `<U+001B>` in ASCII and each line
/// behind `| `, so that no line of it can be taken for one of ours.
pub fn terminal(text: &str) -> String {
    let shown = with_rest(show(text, WORDS, '<', '>'), "\n");
    let mut out = String::with_capacity(shown.len() + 64);
    for (i, line) in shown.split('\n').enumerate() {
        if i > 0 {
            out.push('\n');
        }
        out.push_str("| ");
        out.push_str(line);
    }
    out
}

/// One line, for a terminal or a log.
pub fn terminal_line(text: &str) -> String {
    with_rest(show(text, LINE, '<', '>'), " ")
}

/// One long line, for a terminal or a log: an error with what to do next.
pub fn terminal_message(text: &str) -> String {
    with_rest(show(text, MESSAGE, '<', '>'), " ")
}

fn with_rest(shown: Shown, before: &str) -> String {
    match shown.left_out {
        0 => shown.text,
        n => format!("{}{before}… ({n} more characters are not shown)", shown.text),
    }
}

/// Makes `text` visible within `limits`, code points between `open` and `close`.
pub fn show(text: &str, limits: Limits, open: char, close: char) -> Shown {
    let mut out = String::with_capacity(text.len().min(limits.chars_max * 2));
    let (mut chars, mut lines, mut marks, mut taken) = (0, 1, MARKS_MAX, 0);
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        let crlf = c == '\r' && rest.peek() == Some(&'\n');
        if crlf {
            taken += 1;
            continue;
        }
        marks = if is_combining_mark(c) { marks + 1 } else { 0 };
        let before = out.len();
        match c {
            '\n' if limits.lines_max > 1 => {
                if lines == limits.lines_max {
                    break;
                }
                lines += 1;
                marks = MARKS_MAX;
                out.push('\n');
            }
            '\t' => out.push_str("    "),
            c if is_odd_space(c) => out.push(' '),
            c if is_unseen(c) || marks > MARKS_MAX => {
                // Writing to a String can't fail.
                let _ = write!(out, "{open}U+{:04X}{close}", u32::from(c));
            }
            c => out.push(c),
        }
        let added = out[before..].chars().count();
        if chars + added > limits.chars_max {
            out.truncate(before);
            break;
        }
        chars += added;
        taken += 1;
    }
    let left_out = if taken == 0 && text.is_empty() { 0 } else { text.chars().count() - taken };
    Shown { text: out, left_out }
}

/// Spaces that look like the ordinary one, or nearly: shown as the ordinary one.
const fn is_odd_space(c: char) -> bool {
    matches!(c, '\u{a0}' | '\u{1680}' | '\u{2000}'..='\u{200a}' | '\u{202f}' | '\u{205f}' | '\u{3000}')
}

/// True for what a reader can't see, or what moves what a reader sees.
pub const fn is_unseen(c: char) -> bool {
    matches!(c,
        // controls: C0 with ESC, DEL, C1 with CSI and OSC
        '\0'..='\u{1f}' | '\u{7f}'..='\u{9f}'
        // bidi: marks, embeddings, overrides, isolates
        | '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        // zero width, joiners, invisible operators, deprecated formatting, byte-order mark
        | '\u{ad}' | '\u{34f}' | '\u{200b}'..='\u{200d}' | '\u{2060}'..='\u{2065}' | '\u{206a}'..='\u{206f}' | '\u{feff}'
        // line and paragraph separators
        | '\u{2028}' | '\u{2029}'
        // letters and symbols that show nothing
        | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{2800}' | '\u{3164}' | '\u{ffa0}'
        // variation selectors
        | '\u{180b}'..='\u{180f}' | '\u{fe00}'..='\u{fe0f}' | '\u{e0100}'..='\u{e01ef}'
        // interlinear annotation, object replacement, shorthand and musical formatting
        | '\u{fff0}'..='\u{fffc}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
        // tags
        | '\u{e0000}'..='\u{e007f}'
        // private use: looks like whatever a font says
        | '\u{e000}'..='\u{f8ff}' | '\u{f0000}'..='\u{ffffd}' | '\u{100000}'..='\u{10fffd}'
    )
}

/// What a reader should know before trusting their eyes, one line each; bounded, most telling first.
pub fn hints(text: &str) -> Vec<String> {
    let text = &text[..text.char_indices().nth(HINTED_CHARS_MAX).map_or(text.len(), |(at, _)| at)];
    let mut hints = Vec::new();
    let unseen = text.chars().filter(|c| is_unseen(*c) && !matches!(c, '\n' | '\r' | '\t')).count();
    if unseen > 0 {
        let s = if unseen == 1 { "" } else { "s" };
        hints.push(format!("{unseen} hidden or direction-changing character{s}, shown as ‹U+…›"));
    }
    let mut words = BTreeSet::new();
    for word in text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_ascii() && words.insert(*w)) {
        if hints.len() == HINTS_MAX {
            break;
        }
        hints.extend(odd_word(word));
    }
    hints
}

fn odd_word(word: &str) -> Option<String> {
    let scripts: BTreeSet<_> = word.chars().filter_map(script).collect();
    let spelled = || -> String {
        let mut out = String::new();
        for c in word.chars().take(24) {
            if c.is_ascii() {
                out.push(c);
            } else {
                let _ = write!(out, "‹U+{:04X}›", u32::from(c));
            }
        }
        out
    };
    if scripts.len() > 1 {
        let names: Vec<_> = scripts.iter().copied().collect();
        return Some(format!("“{}” mixes {} letters", spelled(), names.join(" and ")));
    }
    if word.nfkc().all(|c| c.is_ascii()) {
        return Some(format!("“{}” is written with look-alikes of ordinary letters", spelled()));
    }
    let letters = word.chars().filter(|c| c.is_alphabetic());
    if letters.clone().count() > 2 && letters.clone().all(looks_latin) {
        let script = scripts.iter().next().copied().unwrap_or("other");
        return Some(format!("“{}” looks Latin, but its letters are {script}", spelled()));
    }
    None
}

/// Scripts that are mistaken for one another. Others (CJK beside Latin) mix in honest text.
const fn script(c: char) -> Option<&'static str> {
    match c {
        'a'..='z' | 'A'..='Z' | '\u{c0}'..='\u{24f}' | '\u{1e00}'..='\u{1eff}' => Some("Latin"),
        '\u{370}'..='\u{3ff}' | '\u{1f00}'..='\u{1fff}' => Some("Greek"),
        '\u{400}'..='\u{52f}' | '\u{1c80}'..='\u{1c8f}' | '\u{2de0}'..='\u{2dff}' | '\u{a640}'..='\u{a69f}' => {
            Some("Cyrillic")
        }
        '\u{530}'..='\u{58f}' => Some("Armenian"),
        '\u{13a0}'..='\u{13ff}' | '\u{ab70}'..='\u{abbf}' => Some("Cherokee"),
        _ => None,
    }
}

/// Letters of other scripts that can't be told from Latin ones.
const fn looks_latin(c: char) -> bool {
    matches!(
        c,
        'а' | 'с'
            | 'е'
            | 'о'
            | 'р'
            | 'х'
            | 'у'
            | 'ѕ'
            | 'і'
            | 'ј'
            | 'ԁ'
            | 'ӏ'
            | 'һ'
            | 'ԛ'
            | 'ԝ'
            | 'А'
            | 'В'
            | 'Е'
            | 'К'
            | 'М'
            | 'Н'
            | 'О'
            | 'Р'
            | 'С'
            | 'Т'
            | 'Х'
            | 'У'
            | 'І'
            | 'Ј'
            | 'Ѕ'
            | 'ο'
            | 'ν'
            | 'Α'
            | 'Β'
            | 'Ε'
            | 'Ζ'
            | 'Η'
            | 'Ι'
            | 'Κ'
            | 'Μ'
            | 'Ν'
            | 'Ο'
            | 'Ρ'
            | 'Τ'
            | 'Υ'
            | 'Χ'
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_hides_reorders_or_commands_is_visible() {
        let cases = [
            ("a\u{1b}]8;;http://evil\u{7}b", "a‹U+001B›]8;;http://evil‹U+0007›b"),
            ("a\u{9b}31mb", "a‹U+009B›31mb"),
            ("a\u{202e}gpj", "a‹U+202E›gpj"),
            ("a\u{2066}b\u{2069}\u{200f}\u{61c}", "a‹U+2066›b‹U+2069›‹U+200F›‹U+061C›"),
            ("z\u{200b}\u{200d}\u{2060}\u{feff}", "z‹U+200B›‹U+200D›‹U+2060›‹U+FEFF›"),
            ("t\u{e0041}\u{fe0f}\u{e0100}", "t‹U+E0041›‹U+FE0F›‹U+E0100›"),
            ("a\rb\u{2028}c\u{85}", "a‹U+000D›b‹U+2028›c‹U+0085›"),
            ("a\r\nb\tc\u{a0}d", "a\nb    c d"),
            ("é e\u{301} 漢字 שלום", "é e\u{301} 漢字 שלום"),
            ("", ""),
        ];
        for (given, expected) in cases {
            assert_eq!(visible(given), expected, "{given:?}");
            assert_eq!(visible(&visible(given)), expected, "twice is once: {given:?}");
        }
        assert_eq!(visible_line("a\nb"), "a‹U+000A›b");
        assert_eq!(visible("\u{301}a\u{301}\u{301}\u{301}"), "‹U+0301›a\u{301}\u{301}‹U+0301›");
    }

    #[test]
    fn every_format_character_is_unseen() {
        // The Cf and Cc ranges that matter here, walked: nothing of them goes through.
        for range in [0x00..=0x1f, 0x7f..=0x9f, 0x200b..=0x200f, 0x2028..=0x202e, 0x2060..=0x206f, 0xe0000..=0xe007f] {
            for c in range.filter_map(char::from_u32) {
                assert!(!visible_line(&c.to_string()).contains(c) || c == ' ', "{:04X}", u32::from(c));
            }
        }
    }

    #[test]
    fn length_and_lines_are_bounded() {
        let lines = visible(&"x\n".repeat(10_000));
        assert_eq!(lines.lines().count(), WORDS.lines_max + 1);
        assert!(lines.ends_with("(19841 more characters are not shown)"), "{}", &lines[lines.len() - 60..]);
        assert!(visible(&"\u{202e}".repeat(1_000_000)).chars().count() < WORDS.chars_max + 60);
        assert!(visible_line(&"y".repeat(1_000_000)).chars().count() < LINE.chars_max + 60);
    }

    #[test]
    fn a_terminal_gets_no_control_and_no_line_of_ours_can_be_forged() {
        let text = terminal("ok\nApprove? [y/N] y\n\u{1b}[2J\u{1b}]8;;x\u{1b}\\\u{202e}");
        assert!(text.lines().all(|l| l.starts_with("| ")), "{text}");
        assert!(!text.chars().any(|c| c != '\n' && is_unseen(c)), "{text:?}");
        assert!(text.contains("<U+001B>[2J"));
        assert_eq!(terminal_line("a\nb\u{1b}"), "a<U+000A>b<U+001B>");
        assert_eq!(terminal_message(&"\u{1b}".repeat(9)), "<U+001B>".repeat(9));
        assert!(terminal_message(&"y".repeat(100_000)).chars().count() < MESSAGE.chars_max + 60);
    }

    #[test]
    fn look_alikes_are_named() {
        assert_eq!(
            hints("pаypal"),
            ["“p‹U+0430›ypal” mixes Latin and Cyrillic letters".replace("Latin and Cyrillic", "Cyrillic and Latin")]
        );
        assert!(hints("аррӏе")[0].contains("looks Latin, but its letters are Cyrillic"));
        assert!(hints("\u{ff41}dmin")[0].contains("look-alikes"));
        assert!(hints("x\u{202e}y")[0].starts_with("1 hidden"));
        assert!(hints("Überprüfung der Rechnungen, проверка счетов, 請求書").is_empty());
        assert_eq!(hints(&"pаy ".repeat(50)).len(), 1);
    }
}
