//! YAML, as far as files of flags need it: a mapping of keys to texts, lists and mappings, each key with its line.
//!
//! What is not quoted stays a text as it is written, but for null and booleans: flags read numbers by themselves.

use std::collections::HashSet;

use saphyr_parser::{Event, Parser, ScalarStyle, ScanError, Span};
use serde_json::{Map, Value};

/// Line, key and value of every key; or a line and what is wrong with it.
pub(super) type Keys = Result<Vec<(usize, String, Value)>, (usize, String)>;

/// Most mappings and lists inside of each other.
const DEEPEST: usize = 16;

/// The keys of a document.
pub(super) fn keys(text: &str) -> Keys {
    let mut events = Events { events: Parser::new_from_str(text), line: 1 };
    let (mut keys, mut seen) = (Vec::new(), HashSet::new());
    loop {
        match events.next()? {
            Event::StreamStart | Event::DocumentStart(_) => {}
            Event::MappingStart(..) => break,
            // A file without a key.
            Event::StreamEnd | Event::DocumentEnd => return Ok(keys),
            _ => return Err((events.line, "should be keys with values, as in 'model: NAME'".into())),
        }
    }
    while let Some((line, key)) = events.key()? {
        if !seen.insert(key.clone()) {
            return Err((line, format!("'{key}' is there twice")));
        }
        keys.push((line, key, events.value(DEEPEST)?));
    }
    Ok(keys)
}

/// What a parser finds, and where it is.
struct Events<'t> {
    events: Parser<'t, saphyr_parser::StrInput<'t>>,
    line: usize,
}

impl<'t> Events<'t> {
    fn next(&mut self) -> Result<Event<'t>, (usize, String)> {
        let event: Option<Result<(Event<'t>, Span), ScanError>> = self.events.next();
        match event {
            Some(Ok((event, span))) => {
                self.line = span.start.line().max(1);
                Ok(event)
            }
            Some(Err(e)) => Err((e.marker().line().max(1), e.info().to_owned())),
            None => Ok(Event::StreamEnd),
        }
    }

    /// The next key of a mapping with its line, or none at its end.
    fn key(&mut self) -> Result<Option<(usize, String)>, (usize, String)> {
        match self.next()? {
            Event::MappingEnd => Ok(None),
            Event::Scalar(key, ..) => Ok(Some((self.line, key.into_owned()))),
            _ => Err((self.line, "a key should be a text".into())),
        }
    }

    fn value(&mut self, deep: usize) -> Result<Value, (usize, String)> {
        let event = self.next()?;
        self.value_of(event, deep)
    }

    fn value_of(&mut self, event: Event<'t>, deep: usize) -> Result<Value, (usize, String)> {
        match event {
            _ if deep == 0 => Err((self.line, format!("more than {DEEPEST} lists and mappings inside of each other"))),
            Event::Scalar(text, ScalarStyle::Plain, ..) => Ok(match &*text {
                "" | "~" | "null" | "Null" | "NULL" => Value::Null,
                "true" | "True" | "TRUE" => Value::Bool(true),
                "false" | "False" | "FALSE" => Value::Bool(false),
                _ => Value::String(text.into_owned()),
            }),
            Event::Scalar(text, ..) => Ok(Value::String(text.into_owned())),
            Event::SequenceStart(..) => {
                let mut list = Vec::new();
                loop {
                    match self.next()? {
                        Event::SequenceEnd => return Ok(Value::Array(list)),
                        event => list.push(self.value_of(event, deep - 1)?),
                    }
                }
            }
            Event::MappingStart(..) => {
                let mut map = Map::new();
                while let Some((_, key)) = self.key()? {
                    map.insert(key, self.value(deep - 1)?);
                }
                Ok(Value::Object(map))
            }
            // A few of them, one in the other, are larger than any memory.
            Event::Alias(_) => Err((self.line, "aliases (*name) are not read: write the value again".into())),
            _ => Err((self.line, "a value is missing".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keys_have_lines_and_texts() {
        let text = "### model\nmodel: a/b  # a comment\n\nlearning_rate: 5.0e-6\nbf16: true\nsystem: \"true\"\nresume: null\n\
            empty:\nkwargs:\n  min_lr: 1e-6\n  deep: [1, {a: b}]\nmodules:\n- q_proj\n- v_proj\nlong: >\n  two\n  lines\n";
        let expected = [
            (2, "model", json!("a/b")),
            (4, "learning_rate", json!("5.0e-6")),
            (5, "bf16", json!(true)),
            (6, "system", json!("true")),
            (7, "resume", json!(null)),
            (8, "empty", json!(null)),
            (9, "kwargs", json!({"min_lr": "1e-6", "deep": ["1", {"a": "b"}]})),
            (12, "modules", json!(["q_proj", "v_proj"])),
            (15, "long", json!("two lines\n")),
        ];
        assert_eq!(keys(text).unwrap(), expected.map(|(line, key, value)| (line, key.to_owned(), value)));
        assert_eq!(keys("# nothing\n").unwrap(), []);
    }

    #[test]
    fn what_is_no_list_of_keys_is_told_with_its_line() {
        for (text, line, says) in [
            ("a: 1\nb: [1, 2\nc: 3\n", 3, ""),
            ("a: 1\nb: *c\n", 2, "anchor"),
            ("a: &x 1\nb: *x\n", 2, "aliases"),
            ("- a\n- b\n", 1, "keys with values"),
            ("a: 1\na: 2\n", 2, "twice"),
            ("a: 1\n? [b]\n: 2\n", 2, "key"),
            ("a: \"b\nc: d\n", 1, ""),
        ] {
            let (at, cause) = keys(text).unwrap_err();
            assert!(cause.contains(says) && at >= line, "{text}: {at} {cause}");
        }
        let deep = |depth: usize| format!("a: {}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(keys(&deep(DEEPEST - 1)).is_ok() && keys(&deep(100_000)).is_err());
        assert!(keys(&deep(DEEPEST + 1)).unwrap_err().1.contains("inside of each other"));
    }
}
