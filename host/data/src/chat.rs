//! Chat templates: from turns to the text that a checkpoint was trained on, as transformers' `apply_chat_template`
//! renders it (transformers 5.23, `utils/chat_template_utils.py`).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use dpo_plugin_api::dataset::Message;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, State, Value as Jinja};
use regex::Regex;
use serde_json::{Map, Value};

use super::python::{Dumps, repr, strftime_now};
use dpo_core::error::{Error, IoContext, Result};

/// Names of the templates that a checkpoint may have: the usual one and the one for conversations with tools.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// What a rendering may cost, so that no template runs for ever or eats the memory: an instruction costs 1, and so do 64
/// bytes of text. Published templates take about 100 a turn, and less than 1 for a byte of the conversation.
const FUEL: u64 = 1 << 18;
/// Stack of a rendering, in bytes. A list in a list in a list is walked by recursion, at up to 400 bytes a level; with so
/// much fuel a template can make some 60,000 of them.
const STACK: usize = 1 << 26;
/// Most bytes of JSON that a value may become. Lists that hold a list twice, level upon level, are small until then.
const MOST_JSON: usize = 1 << 24;
/// What fuel does not count: a filter or a comparison that walks lists of lists within a single instruction. A rendering has
/// so many ticks of this time; a process that was stopped for a while loses one of them.
const TICK: Duration = Duration::from_millis(100);
const TICKS: u32 = 30;
/// Most spaces of indentation.
const MOST_INDENT: usize = 16;

/// A checkpoint's chat template, ready to render.
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    /// Whether a rendering was given up: its thread still runs, and one is enough.
    runs_away: AtomicBool,
    /// Where it was found: a file, or the family's own.
    pub origin: String,
    special_tokens: Map<String, Value>,
    takes_call_text: bool,
    /// Whether the text depends on the day on which it is rendered.
    pub reads_clock: bool,
}

/// What a rendering takes beside the turns.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rendering<'a> {
    /// Tool descriptions: a list of JSON schemas.
    pub tools: Option<&'a Value>,
    /// Further variables of the template.
    pub args: Option<&'a Map<String, Value>>,
    /// Whether to end with what the assistant's answer begins with.
    pub generation_prompt: bool,
}

impl ChatTemplate {
    /// The template of a checkpoint's folder, in the order in which transformers looks: `chat_template.jinja`, then
    /// `tokenizer_config.json`, then `chat_template.json`; otherwise `fallback`, the family's own. `None` where there is
    /// none at all, which only matters to data that holds conversations.
    ///
    /// # Errors
    /// A file that cannot be read, or a template that is not Jinja.
    pub fn find(dir: &Path, fallback: Option<&str>) -> Result<Option<ChatTemplate>> {
        let config = read_json(&dir.join("tokenizer_config.json"))?;
        let special_tokens = special_tokens(&config);
        let jinja = dir.join("chat_template.jinja");
        let found = if jinja.is_file() {
            let text = std::fs::read_to_string(&jinja).reading(&jinja)?;
            Some((BTreeMap::from([(DEFAULT.to_owned(), text)]), jinja.display().to_string()))
        } else {
            let other = dir.join("chat_template.json");
            let place = |path: &Path| path.display().to_string();
            let in_config = templates(config.get("chat_template")).zip(Some(place(&dir.join("tokenizer_config.json"))));
            let in_file = templates(read_json(&other)?.get("chat_template")).zip(Some(place(&other)));
            let own =
                fallback.map(|text| (BTreeMap::from([(DEFAULT.to_owned(), text.to_owned())]), "the family".into()));
            in_config.or(in_file).or(own)
        };
        found.map(|(texts, origin)| ChatTemplate::new(texts, origin, special_tokens)).transpose()
    }

    /// A template from its text, for tests and tools.
    ///
    /// # Errors
    /// A text that is not Jinja.
    pub fn from_text(text: &str, special_tokens: Map<String, Value>) -> Result<ChatTemplate> {
        ChatTemplate::new(BTreeMap::from([(DEFAULT.to_owned(), text.to_owned())]), "text".into(), special_tokens)
    }

    fn new(
        texts: BTreeMap<String, String>,
        origin: String,
        special_tokens: Map<String, Value>,
    ) -> Result<ChatTemplate> {
        let mut environment = environment()?;
        let any = |what: &str| texts.values().any(|text| text.contains(what));
        let (takes_call_text, reads_clock) = (any("arguments is string"), any("strftime_now"));
        for (name, text) in texts {
            environment.add_template_owned(name, without_generation_tags(&text)).map_err(|e| {
                let line = e.line().map(|l| format!(" in line {l}")).unwrap_or_default();
                Error::input(format!("the chat template cannot be read{line}: {}", cause(&e))).at(&origin)
            })?;
        }
        if environment.get_template(DEFAULT).is_err() {
            return Err(Error::input(format!("there is no chat template named '{DEFAULT}'")).at(&origin));
        }
        let environment = Arc::new(environment);
        Ok(ChatTemplate {
            environment,
            runs_away: AtomicBool::new(false),
            origin,
            special_tokens,
            takes_call_text,
            reads_clock,
        })
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// What the template itself refuses, such as roles that do not alternate.
    pub fn render(&self, messages: &[Message], with: Rendering<'_>) -> Result<String> {
        let mut variables = self.special_tokens.clone();
        let turns = messages.iter().map(|m| self.turn(m)).collect();
        variables.insert("messages".into(), Value::Array(turns));
        variables.insert("tools".into(), with.tools.cloned().unwrap_or(Value::Null));
        variables.insert("documents".into(), Value::Null);
        variables.insert("add_generation_prompt".into(), with.generation_prompt.into());
        if let Some(args) = with.args {
            variables.extend(args.clone());
        }
        let name =
            if with.tools.is_some() && self.environment.get_template(TOOL_USE).is_ok() { TOOL_USE } else { DEFAULT };
        self.bounded(name, variables).map_err(|cause| {
            Error::input(format!("the chat template refuses the conversation: {cause}"))
                .help(format!("the template is from {}", self.origin))
        })
    }

    /// Renders on a thread of its own, which is left behind if it does not come to an end.
    fn bounded(&self, name: &'static str, variables: Map<String, Value>) -> std::result::Result<String, String> {
        let endless = || Err("it does not come to an end".to_owned());
        if self.runs_away.load(Ordering::Relaxed) {
            return endless();
        }
        let (sender, receiver) = mpsc::sync_channel(1);
        let environment = Arc::clone(&self.environment);
        let render = move || {
            let text = environment.get_template(name).and_then(|t| t.render(Jinja::from(Serde(&variables))));
            // Nobody listens any more where this took too long.
            let _ = sender.send(text.map_err(|e| cause(&e)));
        };
        thread::Builder::new().stack_size(STACK).spawn(render).map_err(|e| e.to_string())?;
        for _ in 0..TICKS {
            match receiver.recv_timeout(TICK) {
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err("the template engine panicked".into()),
                Ok(text) => return text,
            }
        }
        self.runs_away.store(true, Ordering::Relaxed);
        endless()
    }

    /// A turn as the template sees it.
    fn turn(&self, message: &Message) -> Value {
        let mut keys = Map::new();
        keys.insert("role".into(), message.role.as_str().into());
        let mut extra = message.extra.clone();
        if let Some(Value::Array(calls)) = extra.get_mut("tool_calls")
            && !self.takes_call_text
        {
            calls.iter_mut().for_each(parse_arguments);
        }
        // OpenAI's turns that only call tools have no content, and transformers drops keys that are null. Templates that
        // read it all the same find an empty text.
        keys.insert("content".into(), message.content.as_str().into());
        if let Some(reasoning) = extra.get("reasoning_content") {
            // gpt-oss reads the same under an older name.
            keys.insert("thinking".into(), reasoning.clone());
        }
        keys.extend(extra.into_iter().filter(|(_, value)| !value.is_null()));
        Value::Object(keys)
    }
}

/// Arguments that are JSON written as text become the object, for templates that print them with `tojson`: otherwise they
/// would be quoted twice.
fn parse_arguments(call: &mut Value) {
    let call = match call.get("function").is_some_and(Value::is_object) {
        true => &mut call["function"],
        false => call,
    };
    if let Some(Value::String(text)) = call.get("arguments")
        && let Ok(parsed @ Value::Object(_)) = serde_json::from_str(text)
    {
        call["arguments"] = parsed;
    }
}

/// transformers' environment.
fn environment() -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|e| Error::run(format!("jinja syntax: {e}")))?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(FUEL));
    environment.set_formatter(|out, state, value| {
        if let Some(text) = value.as_str() {
            out.write_str(text)?;
        } else if !value.is_undefined() {
            out.write_str(&repr(&plain(state, value)?))?;
        }
        Ok(())
    });
    environment.add_filter("string", |state: &State<'_, '_>, value: &Jinja| match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => plain(state, value).map(|value| repr(&value)),
    });
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |message: String| -> std::result::Result<Jinja, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| strftime_now(&format));
    Ok(environment)
}

/// transformers' `tojson`: `json.dumps` that keeps `<`, `&` and letters beyond ASCII.
fn to_json(state: &State<'_, '_>, value: &Jinja, args: Kwargs) -> std::result::Result<String, minijinja::Error> {
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
    Ok(dumps.text(&plain(state, value)?))
}

/// A value as JSON.
fn plain(state: &State<'_, '_>, value: &Jinja) -> std::result::Result<Value, minijinja::Error> {
    let failed = |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut text = Capped(Vec::new());
    serde_json::to_writer(&mut text, value).map_err(failed)?;
    state.consume_fuel(text.0.len() as u64 / 64)?;
    serde_json::from_slice(&text.0).map_err(failed)
}

/// Bytes that do not grow beyond [`MOST_JSON`].
struct Capped(Vec<u8>);

impl std::io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MOST_JSON {
            return Err(std::io::Error::other("the value is too large"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// `{% generation %}` marks the assistant's text for transformers and prints nothing. minijinja does not know the tag; a
/// condition that always holds trims white space in the same way.
fn without_generation_tags(text: &str) -> String {
    let tag = |pattern: &str, to: &str, text: &str| match Regex::new(pattern) {
        Ok(regex) => regex.replace_all(text, to).into_owned(),
        Err(_) => text.to_owned(),
    };
    let text = tag(r"\{%([-+]?)\s*generation\s*([-+]?)%\}", "{%$1 if true $2%}", text);
    tag(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", "{%$1 endif $2%}", &text)
}

/// The innermost message: what `raise_exception` said, without the engine's words around it.
fn cause(error: &minijinja::Error) -> String {
    error.detail().map_or_else(|| error.kind().to_string(), str::to_owned)
}

/// `chat_template` as text, or as a list of named ones.
fn templates(value: Option<&Value>) -> Option<BTreeMap<String, String>> {
    match value? {
        Value::String(text) => Some(BTreeMap::from([(DEFAULT.to_owned(), text.clone())])),
        Value::Array(list) => {
            let text = |item: &Value, key: &str| item.get(key).and_then(Value::as_str).map(str::to_owned);
            Some(list.iter().filter_map(|item| Some((text(item, "name")?, text(item, "template")?))).collect())
        }
        _ => None,
    }
}

/// `bos_token` and the like, as text or as `{"content": …}`.
pub(super) fn special_tokens(config: &Value) -> Map<String, Value> {
    const NAMES: [&str; 7] =
        ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
    let token = |name: &&str| {
        let value = config.get(*name)?;
        let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
        Some(((*name).to_owned(), text.into()))
    };
    NAMES.iter().filter_map(token).collect()
}

/// A JSON file; `null` where there is none.
pub fn read_json(path: &Path) -> Result<Value> {
    if !path.is_file() {
        return Ok(Value::Null);
    }
    let text = std::fs::read_to_string(path).reading(path)?;
    serde_json::from_str(&text).map_err(|e| Error::input(format!("is not JSON: {e}")).at(path.display()))
}
