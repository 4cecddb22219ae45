//! The dataset format `@name@`.
//!
//! As it stands it reads rows of a question with a better and a worse answer. Change `records`, and
//! an example row to go with it.

use dpo_plugin_api::dataset::{column, plain_text};
use dpo_plugin_api::prelude::*;

/// Say here whose rows these are.
pub struct Format;

impl DatasetFormat for Format {
    /// What `--dataset-format` takes: lower case, unique among all plugins.
    fn name(&self) -> &'static str {
        "@name@"
    }

    /// The line of `dpo-host list`.
    fn summary(&self) -> &'static str {
        "question, better, worse"
    }

    /// Rows as jsonl; `describe` shows them, the test below reads them.
    fn examples(&self) -> &'static str {
        r#"{"question": "Which is larger, 9.9 or 9.11?", "better": "9.9", "worse": "9.11"}"#
    }

    /// 0: not such a row; 1: it might be; 2: it can be nothing else.
    fn recognises(&self, row: &Row) -> u8 {
        let keys = ["question", "better", "worse"];
        if keys.iter().all(|key| row.contains_key(*key)) {
            2
        } else {
            0
        }
    }

    /// The preferences of a row. An error names the column; the host adds file and line.
    /// `Message::parse_list` reads whole conversations, `Text::Plain` takes text past the chat
    /// template, `Record::liked` is one answer, liked or not,
    /// `Record::ranked` are several, best first.
    fn records(&self, row: &Row) -> Result<Vec<Record>> {
        let text = |key: &str| plain_text(column(row, key)?);
        let turn = |role: &str, content: String| Text::Messages(vec![Message::new(role, content)]);
        let prompt = turn("user", text("question")?);
        let better = turn("assistant", text("better")?);
        let worse = turn("assistant", text("worse")?);
        Ok(vec![Record::pair(prompt, better, worse)])
    }
}

plugin! { datasets: [Format] }

#[cfg(test)]
mod tests {
    use super::*;
    use dpo_plugin_api::testing::check_format;

    #[test]
    fn examples_are_read() {
        check_format(&Format);
    }

    #[test]
    fn a_missing_column_is_named() {
        let mut row = Row::new();
        row.insert("question".into(), json!("?"));
        row.insert("better".into(), json!("!"));
        assert_eq!(Format.recognises(&row), 0);
        assert!(Format.records(&row).unwrap_err().message.contains("worse"));
    }
}
