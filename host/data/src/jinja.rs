//! transformers' jinja environment (`_compile_jinja_template` of `utils/chat_template_utils.py`): what jinja2's filters and tests and the methods
//! of Python's types answer where minijinja has them not, or has them otherwise. All that a template makes counts against its fuel.

use std::borrow::Cow;

use dpo_core::error::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{AutoEscape, Environment, ErrorKind, State, Value as Jinja};
use regex::Regex;
use serde_json::Value;

use super::python::{Dumps, repr, strftime_now};

/// What a rendering may cost: an instruction costs 1, and so do 64 bytes of text. Published templates take about 100 a turn, and
/// less than 1 for a byte of the conversation. It is the same for a row wherever and whenever it is rendered.
const FUEL: u64 = 1 << 18;
/// Most bytes of text that a value may become. Lists that hold a list twice, level upon level, are small until then.
const MOST_TEXT: usize = 1 << 24;
/// Most spaces of indentation.
const MOST_INDENT: usize = 16;

type Made<T = Jinja> = std::result::Result<T, minijinja::Error>;

/// The environment, without templates.
pub(super) fn environment() -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|e| Error::run(format!("jinja syntax: {e}")))?);
    environment.set_unknown_method_callback(|state, value, method, args| {
        pay_for_text(state, value, method, args)?;
        match python_method(state, value, method, args)? {
            Some(made) => Ok(made),
            None => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
        }
    });
    environment.set_fuel(Some(FUEL));
    environment.set_formatter(|out, state, value| {
        if !matches!(state.auto_escape(), AutoEscape::None) {
            return Err(refused("autoescape is not supported"));
        }
        match value.as_str() {
            Some(text) => Ok(out.write_str(text)?),
            None if value.is_undefined() => Ok(()),
            None => Ok(out.write_str(&to_text(state, value)?)?),
        }
    });
    // For minijinja none is an empty list, and a text no sequence.
    let is_sequence =
        |kind: ValueKind| matches!(kind, ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map);
    environment.add_test("sequence", move |value: &Jinja| is_sequence(value.kind()));
    environment
        .add_test("iterable", move |value: &Jinja| is_sequence(value.kind()) || value.kind() == ValueKind::Iterable);
    environment.add_filter("string", to_text);
    environment.add_filter("tojson", to_json);
    environment.add_filter("e", |state: &State<'_, '_>, value: &Jinja| escaped(state, value, false));
    environment.add_filter("escape", |state: &State<'_, '_>, value: &Jinja| escaped(state, value, false));
    environment.add_filter("forceescape", |state: &State<'_, '_>, value: &Jinja| escaped(state, value, true));
    environment.add_filter(
        "int",
        |state: &State<'_, '_>, value: &Jinja, default: Option<Jinja>, base: Option<u32>, kwargs: Kwargs| {
            let otherwise = default.clone().or(kwargs.get("default").ok());
            minijinja::filters::int(state, value, default, base, kwargs)
                .or_else(|e| number_or(value, otherwise, Jinja::from(0), e))
        },
    );
    environment.add_filter("float", |state: &State<'_, '_>, value: &Jinja, default: Option<Jinja>, kwargs: Kwargs| {
        let otherwise = default.clone().or(kwargs.get("default").ok());
        minijinja::filters::float(state, value, default, kwargs)
            .or_else(|e| number_or(value, otherwise, Jinja::from(0.0), e))
    });
    // Not of jinja2, and what they make is not counted; or of jinja2, and otherwise there.
    ["chain", "pprint", "attr"].iter().for_each(|name| environment.remove_filter(name));
    environment.remove_global("debug");
    environment.add_function("raise_exception", |state: &State<'_, '_>, message: &Jinja| {
        Err::<Jinja, _>(minijinja::Error::new(ErrorKind::InvalidOperation, to_text(state, message)?))
    });
    environment.add_function("strftime_now", |format: &str| strftime_now(format));
    Ok(environment)
}

/// The text of a template as jinja2 reads it, written for minijinja: line ends are `\n`, escapes within texts in quotes are Python's, and
/// `{% generation %}`, which marks the assistant's text for transformers and prints nothing, is a scope of its own.
///
/// # Errors
/// An escape by the name of a character.
pub(super) fn source(text: &str) -> Result<String> {
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    let tag = |pattern: &str, to: &str, text: &str| match Regex::new(pattern) {
        Ok(regex) => regex.replace_all(text, to).into_owned(),
        Err(_) => text.to_owned(),
    };
    let text = tag(r"\{%([-+]?)\s*generation\s*([-+]?)%\}", "{%$1 with $2%}", &text);
    let text = tag(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", "{%$1 endwith $2%}", &text);
    super::namespace::with_texts(&text, python_escapes)
}

/// A text in quotes, whose escapes are Python's.
fn python_escapes(quoted: &str) -> Result<Cow<'_, str>> {
    if !["\\a", "\\v", "\\/", "\\U", "\\N", "\\\n"].iter().any(|escape| quoted.contains(escape)) {
        return Ok(quoted.into());
    }
    let (mut made, mut rest) = (String::new(), quoted);
    while let Some((before, behind)) = rest.split_once('\\') {
        made += before;
        let mut letters = behind.chars();
        match letters.next() {
            Some('a') => made += "\\x07",
            Some('v') => made += "\\x0b",
            Some('/') => made += "\\\\/",
            Some('\n') => {}
            Some('U') => {
                let letter = behind.get(1..9).and_then(|digits| char::from_u32(u32::from_str_radix(digits, 16).ok()?));
                made.push(letter.ok_or_else(|| Error::input("the chat template has a broken escape \\U"))?);
                letters = behind[9..].chars();
            }
            Some('N') => {
                return Err(
                    Error::input("the chat template names a character with \\N{…}").help("write the character itself")
                );
            }
            Some(other) => made.extend(['\\', other]),
            None => made.push('\\'),
        }
        rest = letters.as_str();
    }
    Ok((made + rest).into())
}

/// Python's `str`.
fn to_text(state: &State<'_, '_>, value: &Jinja) -> Made<String> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    let text = repr(value, MOST_TEXT).ok_or_else(too_large)?;
    state.consume_fuel(text.len() as u64 / 64)?;
    Ok(text)
}

/// markupsafe's `escape`, which jinja2 uses. What is escaped or safe already stays unless it is `forced`.
fn escaped(state: &State<'_, '_>, value: &Jinja, forced: bool) -> Made {
    if value.is_safe() && !forced {
        return Ok(value.clone());
    }
    let text = if value.is_undefined() { String::new() } else { to_text(state, value)? };
    let text = text
        .replace('&', "&amp;")
        .replace('>', "&gt;")
        .replace('<', "&lt;")
        .replace('\'', "&#39;")
        .replace('"', "&#34;");
    Ok(Jinja::from_safe_string(text))
}

/// What a text that is no number is.
fn number_or(value: &Jinja, otherwise: Option<Jinja>, zero: Jinja, error: minijinja::Error) -> Made {
    if value.as_str().is_some() { Ok(otherwise.unwrap_or(zero)) } else { Err(error) }
}

/// Takes the fuel for what a method of a text makes before it is made, where that is more than the engine counts: lists
/// become text, and `format` fills to any width and repeats its arguments.
fn pay_for_text(state: &State<'_, '_>, value: &Jinja, method: &str, args: &[Jinja]) -> Made<()> {
    let Some(text) = value.as_str() else { return Ok(()) };
    let mut longest = 0;
    for arg in args {
        let bytes = match arg.as_str() {
            Some(text) => text.len(),
            None if method == "format" || method == "join" => json_of(arg)?.len(),
            None => 0,
        };
        state.consume_fuel(bytes as u64 / 64)?;
        longest = longest.max(bytes as u64);
    }
    match method {
        "format" => {
            let numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
            let widest = numbers.map(|digits| digits.parse().unwrap_or(u64::MAX)).max().unwrap_or(0);
            let fields = text.matches('{').count() as u64;
            state.consume_fuel(fields.saturating_mul(longest.saturating_add(widest)) / 64)
        }
        "ljust" | "rjust" | "center" | "zfill" => {
            let width = args.first().and_then(Jinja::as_i64).unwrap_or(0);
            state.consume_fuel(u64::try_from(width).unwrap_or(0) / 64)
        }
        _ => Ok(()),
    }
}

/// Methods of Python's `str`, `list` and `dict` that minijinja has not, or has otherwise.
fn python_method(state: &State<'_, '_>, value: &Jinja, method: &str, args: &[Jinja]) -> Made<Option<Jinja>> {
    let Some(text) = value.as_str() else {
        return Ok(match (value.kind(), method) {
            (ValueKind::Seq | ValueKind::Map, "copy") => from_args::<()>(args).map(|()| Some(value.clone()))?,
            (ValueKind::Seq, "index") => {
                let (wanted,): (&Jinja,) = from_args(args)?;
                let at = value.try_iter()?.position(|item| item == *wanted);
                Some(at.map(Jinja::from).ok_or_else(|| refused("the list has no such item"))?)
            }
            _ => None,
        });
    };
    let padded = |made: fn(&str, usize, char) -> String| -> Made {
        let (width, fill): (usize, Option<char>) = from_args(args)?;
        Ok(made(text, width.saturating_sub(text.chars().count()), fill.unwrap_or(' ')).into())
    };
    let letters = |letter: char, count: usize| String::from_iter(std::iter::repeat_n(letter, count));
    let parts = |found: Option<usize>, sep: &str, otherwise: [&str; 3]| {
        let [a, b, c] = found.map_or(otherwise, |at| [&text[..at], &text[at..at + sep.len()], &text[at + sep.len()..]]);
        Jinja::from(Tuple::from([a, b, c].map(Jinja::from)))
    };
    state.consume_fuel(text.len() as u64 / 64)?;
    Ok(Some(match method {
        "index" | "rindex" => {
            let (wanted,): (&str,) = from_args(args)?;
            let at = if method == "index" { text.find(wanted) } else { text.rfind(wanted) };
            text[..at.ok_or_else(|| refused("the text has no such part"))?].chars().count().into()
        }
        "ljust" => {
            padded(|text, missing, fill| text.to_owned() + &String::from_iter(std::iter::repeat_n(fill, missing)))?
        }
        "rjust" => padded(|text, missing, fill| String::from_iter(std::iter::repeat_n(fill, missing)) + text)?,
        "center" => {
            let (width, fill): (usize, Option<char>) = from_args(args)?;
            let missing = width.saturating_sub(text.chars().count());
            let left = missing / 2 + (missing & width & 1);
            let fill = fill.unwrap_or(' ');
            format!("{}{text}{}", letters(fill, left), letters(fill, missing - left)).into()
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let sign = text.len() - text.trim_start_matches(['+', '-']).len();
            let (sign, digits) = text.split_at(sign.min(1));
            format!("{sign}{}{digits}", letters('0', width.saturating_sub(text.chars().count()))).into()
        }
        "partition" | "rpartition" => {
            let (sep,): (&str,) = from_args(args)?;
            match method {
                _ if sep.is_empty() => return Err(refused("the separator is empty")),
                "partition" => parts(text.find(sep), sep, [text, "", ""]),
                _ => parts(text.rfind(sep), sep, ["", "", text]),
            }
        }
        "removeprefix" => from_args(args).map(|(part,): (&str,)| text.strip_prefix(part).unwrap_or(text).into())?,
        "removesuffix" => from_args(args).map(|(part,): (&str,)| text.strip_suffix(part).unwrap_or(text).into())?,
        "rsplit" => {
            let (sep, most): (&str, Option<i64>) = from_args(args)?;
            if sep.is_empty() {
                return Err(refused("the separator is empty"));
            }
            let most =
                most.and_then(|most| usize::try_from(most).ok()).map_or(usize::MAX, |most| most.saturating_add(1));
            let mut found: Vec<&str> = text.rsplitn(most, sep).collect();
            found.reverse();
            Jinja::from_iter(found)
        }
        "swapcase" => {
            let swapped =
                |c: char| if c.is_uppercase() { c.to_lowercase().to_string() } else { c.to_uppercase().to_string() };
            text.chars().map(swapped).collect::<String>().into()
        }
        "title" => {
            // A word begins behind what is no letter.
            let mut inside = false;
            let mut made = String::with_capacity(text.len());
            for letter in text.chars() {
                if inside {
                    made.extend(letter.to_lowercase())
                } else {
                    made.extend(letter.to_uppercase())
                }
                inside = letter.is_alphabetic();
            }
            made.into()
        }
        _ => return Ok(None),
    }))
}

/// transformers' `tojson`: `json.dumps` that keeps `<`, `&` and letters beyond ASCII.
fn to_json(state: &State<'_, '_>, value: &Jinja, args: Kwargs) -> Made<String> {
    if value.is_undefined() {
        return Err(refused("what is not there cannot be written as JSON"));
    }
    let indent = args.get::<Option<usize>>("indent")?;
    let mut dumps = Dumps::new(indent.map(|i| i.min(MOST_INDENT)));
    if let Some((item, key)) =
        args.get::<Option<Vec<String>>>("separators")?.and_then(|s| Some((s.first()?.clone(), s.get(1)?.clone())))
    {
        (dumps.item_separator, dumps.key_separator) = (item, key);
    }
    dumps.sort_keys = args.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    dumps.ensure_ascii = args.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    args.assert_all_used()?;
    let text = json_of(value)?;
    state.consume_fuel(text.len() as u64 / 64)?;
    let value: Value =
        serde_json::from_slice(&text).map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    dumps.text(&value, MOST_TEXT).ok_or_else(too_large)
}

fn json_of(value: &Jinja) -> Made<Vec<u8>> {
    let mut text = Capped(Vec::new());
    serde_json::to_writer(&mut text, value).map_err(|e| {
        if e.is_io() { too_large() } else { minijinja::Error::new(ErrorKind::BadSerialization, e.to_string()) }
    })?;
    Ok(text.0)
}

fn too_large() -> minijinja::Error {
    refused(&format!("a value has more than {MOST_TEXT} bytes of text"))
}

fn refused(what: &str) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, what.to_owned())
}

/// Bytes that do not grow beyond [`MOST_TEXT`].
struct Capped(Vec<u8>);

impl std::io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MOST_TEXT {
            return Err(std::io::Error::other("the value is too large"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
