//! Two texts side by side while both grow. Widths are those of a terminal: Chinese characters and emoji take two columns.

use std::fmt::Write;

use unicode_segmentation::UnicodeSegmentation;
use unicode_width::UnicodeWidthStr;

/// Between the columns.
const BAR: &str = " │ ";

/// What does not begin a row, though Chinese and Japanese text may be broken anywhere else.
const CLOSING: &str = "，。！？、：；）」』》】…,.!?:;)";

/// Two columns of which whole rows are printed once, and the row that grows is drawn over.
pub(super) struct Columns {
    width: usize,
    texts: [String; 2],
    ended: [bool; 2],
    printed: usize,
}

impl Columns {
    /// Columns that fit into a terminal of so many, if they are wide enough to be read.
    pub(super) fn fit(terminal: usize) -> Option<Columns> {
        // A terminal breaks a row that reaches its last column.
        let width = terminal.checked_sub(BAR.width() + 1)? / 2;
        let columns = Columns { width, texts: Default::default(), ended: [false; 2], printed: 0 };
        (width >= 34).then_some(columns)
    }

    /// Adds to a text; empty lines at its head are left out.
    pub(super) fn push(&mut self, side: usize, text: &str) {
        self.texts[side].push_str(text);
        if self.texts[side].trim_start().is_empty() {
            self.texts[side].clear();
        }
    }

    /// A text is whole.
    pub(super) fn end(&mut self, side: usize) {
        self.ended[side] = true;
    }

    /// Names above the columns.
    pub(super) fn heading(&self, names: [&str; 2]) -> String {
        self.row(names)
    }

    /// What to print for what was added: rows that are whole, then the one that is not.
    pub(super) fn draw(&mut self) -> String {
        let rows = [0, 1].map(|side| wrap(&self.texts[side], self.width));
        let all = rows[0].len().max(rows[1].len());
        // A later row does not change an earlier one: what did not fit there does not fit when it is longer.
        let whole = |side: usize| if self.ended[side] { all } else { rows[side].len() - 1 };
        let whole = whole(0).min(whole(1));
        let row = |at: usize| self.row([0, 1].map(|side| rows[side].get(at).map_or("", String::as_str)));
        let mut text = String::new();
        for at in self.printed..whole {
            let _ = write!(text, "\r{}\x1b[K\n", row(at));
        }
        if whole < all {
            let _ = write!(text, "\r{}\x1b[K", row(whole));
        }
        self.printed = whole;
        text
    }

    fn row(&self, cells: [&str; 2]) -> String {
        let space = " ".repeat(self.width.saturating_sub(cells[0].width()));
        format!("{}{space}{BAR}{}", cells[0], cells[1])
    }
}

/// Rows of a text, none wider than `width`: broken at spaces, around wide characters, and within what is wider than a row.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut rows = Vec::new();
    for line in text.split('\n') {
        let (mut row, mut used) = (String::new(), 0);
        for unit in units(line) {
            let mut unit = unit;
            if used + unit.width() > width && used > 0 {
                unit = unit.trim_start();
                if unit.is_empty() {
                    continue;
                }
                rows.push(std::mem::take(&mut row));
                used = 0;
            }
            for grapheme in unit.graphemes(true) {
                if used + grapheme.width() > width {
                    rows.push(std::mem::take(&mut row));
                    used = 0;
                }
                row.push_str(grapheme);
                used += grapheme.width();
            }
        }
        rows.push(row);
    }
    rows
}

/// What is not broken unless it has to be: words with the spaces before them, and single wide characters.
fn units(line: &str) -> Vec<&str> {
    let (mut units, mut start, mut last) = (Vec::new(), 0, " ");
    for (at, grapheme) in line.grapheme_indices(true) {
        let wide = last.width() > 1 || grapheme.width() > 1;
        if last != " " && (grapheme == " " || wide && !CLOSING.contains(grapheme)) {
            units.push(&line[start..at]);
            start = at;
        }
        last = grapheme;
    }
    units.push(&line[start..]);
    units
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Rinse it until the water runs clear, then steam it. 🍚👩‍🍳 先把米淘到水清，再小火慢煮，粒粒分明特别香！🍚\n\n  \
        indented, and averyveryverylongwordthatdoesnotfit é́ end";

    #[test]
    fn rows_fit_and_lose_nothing() {
        let plain = |text: &str| text.split_whitespace().collect::<String>();
        for width in 8..60 {
            let rows = wrap(TEXT, width);
            assert!(rows.iter().all(|r| r.width() <= width), "{width}: {rows:#?}");
            assert_eq!(plain(&rows.concat()), plain(TEXT), "{width}");
            assert!(!rows.iter().any(|r| r.starts_with('，')), "{width}: {rows:#?}");
        }
        assert_eq!(wrap("ab cd", 4), ["ab", "cd"]);
        assert_eq!(wrap("米饭怎么煮", 4), ["米饭", "怎么", "煮"]);
        assert_eq!(wrap("米饭。", 4), ["米", "饭。"]);
        assert_eq!(wrap("abcdef", 4), ["abcd", "ef"]);
        assert_eq!(wrap("", 4), [""]);
        assert_eq!(wrap("a\n  b", 4), ["a", "  b"]);
    }

    #[test]
    fn a_row_that_was_printed_stays() {
        for width in [8, 13, 20, 34] {
            let whole = wrap(TEXT, width);
            for end in (0..TEXT.len()).filter(|end| TEXT.is_char_boundary(*end)) {
                let rows = wrap(&TEXT[..end], width);
                assert_eq!(rows[..rows.len() - 1], whole[..rows.len() - 1], "{width} {end}");
            }
        }
    }

    /// What a terminal shows: a row is drawn over until it is whole.
    fn shown(drawn: &str) -> Vec<String> {
        let last = |line: &str| line.rsplit('\r').next().unwrap_or_default().replace("\x1b[K", "");
        drawn.split('\n').map(last).collect()
    }

    #[test]
    fn columns_grow_together() {
        assert!(Columns::fit(60).is_none());
        let mut columns = Columns::fit(74).unwrap();
        let mut drawn = String::new();
        for (at, character) in TEXT.char_indices() {
            columns.push(0, &character.to_string());
            if at % 3 == 0 {
                columns.push(1, "好");
            }
            drawn += &columns.draw();
        }
        columns.end(1);
        columns.end(0);
        drawn += &columns.draw();
        let rows = shown(&drawn);
        assert!(rows.iter().all(|r| r.width() < 74), "{rows:#?}");
        let left: Vec<&str> = rows.iter().filter_map(|r| Some(r.split_once(BAR)?.0.trim_end())).collect();
        let expected: Vec<String> = wrap(TEXT, 35).iter().map(|r| r.trim_end().to_owned()).collect();
        assert_eq!(left, expected);
    }
}
