//! Room on a page: every list and text from outside is shown within a named number of bytes, and it is
//! known when something had to be left out.

use super::visible::{Limits, show};

/// Room for texts of one part of a page, in bytes after escaping.
#[derive(Debug)]
pub(super) struct Room {
    left: usize,
    cut: bool,
}

/// Some lines, and how many more there are.
#[derive(Debug, Default)]
pub(super) struct Lines {
    pub(super) lines: Vec<String>,
    pub(super) more: usize,
}

/// What an item costs beside its text: its tags.
const ITEM_BYTES: usize = 40;
/// For one line of the facts: a list of tables may be long.
pub(super) const FACT: Limits = Limits { chars_max: 4000, lines_max: 1 };

impl Room {
    pub(super) const fn new(bytes: usize) -> Self {
        Self { left: bytes, cut: false }
    }

    /// True once anything was left out.
    pub(super) const fn was_cut(&self) -> bool {
        self.cut
    }

    /// The text, visible, as far as it fits.
    pub(super) fn text(&mut self, text: &str, limits: Limits) -> String {
        let shown = show(text, limits, '‹', '›');
        let mut end = 0;
        for c in shown.text.chars() {
            let cost = if matches!(c, '<' | '>' | '&' | '"' | '\'') { 5 } else { c.len_utf8() };
            let Some(left) = self.left.checked_sub(cost) else { break };
            self.left = left;
            end += c.len_utf8();
        }
        let whole = end == shown.text.len();
        let left_out = shown.left_out + shown.text[end..].chars().count();
        let mut out = shown.text;
        out.truncate(end);
        if !whole || shown.left_out > 0 {
            self.cut = true;
            out.push_str(" … (");
            out.push_str(&left_out.to_string());
            out.push_str(" more characters)");
        }
        out
    }

    /// As many items as fit, each with `bytes` for its tags.
    pub(super) fn each<I: IntoIterator, T>(
        &mut self,
        items: I,
        bytes: usize,
        mut tell: impl FnMut(I::Item, &mut Self) -> T,
    ) -> Vec<T> {
        let mut out = Vec::new();
        for item in items {
            if !self.item(bytes) {
                break;
            }
            out.push(tell(item, self));
        }
        out
    }

    /// Takes the tags of one more item; false if there is no room.
    fn item(&mut self, bytes: usize) -> bool {
        let fits = self.left >= bytes + ITEM_BYTES;
        if fits {
            self.left -= bytes;
        } else {
            self.left = 0;
            self.cut = true;
        }
        fits
    }

    /// As many lines as fit.
    pub(super) fn lines(&mut self, lines: &[String], limits: Limits) -> Lines {
        let mut out = Lines::default();
        for (i, line) in lines.iter().enumerate() {
            if !self.item(ITEM_BYTES) {
                out.more = lines.len() - i;
                break;
            }
            out.lines.push(self.text(line, limits));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::super::visible::LINE;
    use super::*;

    #[test]
    fn what_does_not_fit_is_counted_and_known() {
        let mut room = Room::new(1000);
        let lines = room.lines(&vec!["\"".repeat(100); 10], LINE);
        assert_eq!((lines.lines.len(), lines.more), (2, 8));
        assert!(lines.lines[1].ends_with("more characters)"), "{:?}", lines.lines);
        assert!(room.was_cut());
        let mut room = Room::new(1000);
        assert_eq!(room.lines(&["abc".to_owned()], LINE).lines, ["abc"]);
        assert!(!room.was_cut());
    }
}
