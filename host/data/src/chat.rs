//! Chat templates: from turns to the text that a checkpoint was trained on, as transformers' `apply_chat_template`
//! renders it (transformers 5.23, `utils/chat_template_utils.py`).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dpo_plugin_api::dataset::Message;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value as Jinja};
use regex::Regex;
use serde_json::{Map, Value};

use super::bounded::bounded;
use super::{jinja, namespace};
use dpo_core::error::{Error, Kind, Result};

/// Names of the templates that a checkpoint may have: the usual one and the one for conversations with tools.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// Where the template of a checkpoint that has none comes from.
const OF_FAMILY: &str = "the family";

/// What it is called in messages.
const WHAT: &str = "the chat template";
/// Most bytes of a template. Published ones have up to 40,000.
const MOST_TEXT: usize = 1 << 17;
/// What fuel does not count: a comparison or `~` that walks lists of lists within a single instruction. A rendering within its
/// fuel takes milliseconds, so one that takes this long never ends.
const LONGEST: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 60 });
/// How long compiling may take: milliseconds, unless an expression has ten thousand operators.
const LONGEST_COMPILING: Duration = Duration::from_secs(10);
/// Most letters of what a template says when it refuses a conversation.
const MOST_SAID: usize = 500;

/// A checkpoint's chat template, ready to render.
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    /// Where it was found: a file, or the family's own.
    pub origin: String,
    /// Its text, of several that named `default`.
    pub text: String,
    special_tokens: Map<String, Value>,
    takes_call_text: bool,
    has_tool_use: bool,
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
            let text = dpo_core::files::read_text(&jinja)?;
            Some((BTreeMap::from([(DEFAULT.to_owned(), text)]), jinja.display().to_string()))
        } else {
            let other = dir.join("chat_template.json");
            let place = |path: &Path| path.display().to_string();
            let in_config = templates(config.get("chat_template")).zip(Some(place(&dir.join("tokenizer_config.json"))));
            let in_file = templates(read_json(&other)?.get("chat_template")).zip(Some(place(&other)));
            let own = fallback.map(|text| (BTreeMap::from([(DEFAULT.to_owned(), text.to_owned())]), OF_FAMILY.into()));
            in_config.or(in_file).or(own)
        };
        found.map(|(texts, origin)| ChatTemplate::new(texts, origin, special_tokens)).transpose()
    }

    /// Whether it is the family's, since the checkpoint has none.
    pub fn is_borrowed(&self) -> bool {
        self.origin == OF_FAMILY
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
        let takes_call_text = texts.values().any(|text| asks_for_call_text(text));
        let reads_clock = texts.values().any(|text| text.contains("strftime_now"));
        if let Some(long) = texts.values().map(String::len).find(|bytes| *bytes > MOST_TEXT) {
            return Err(Error::input(format!("the chat template has {long} bytes, more than {MOST_TEXT}")).at(&origin));
        }
        texts.values().try_for_each(|text| namespace::refuse_as_value(text)).map_err(|e| e.at(&origin))?;
        let text = texts.get(DEFAULT).cloned().unwrap_or_default();
        let environment =
            bounded(WHAT, LONGEST_COMPILING, || compiled(texts)).and_then(|done| done).map_err(|e| e.at(&origin))?;
        if environment.get_template(DEFAULT).is_err() {
            return Err(Error::input(format!("there is no chat template named '{DEFAULT}'")).at(&origin));
        }
        let has_tool_use = environment.get_template(TOOL_USE).is_ok();
        let environment = Arc::new(environment);
        Ok(ChatTemplate { environment, origin, text, special_tokens, takes_call_text, has_tool_use, reads_clock })
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// What the template itself refuses, such as roles that do not alternate, and a rendering that costs too much. A run error
    /// for one that does not come to an end.
    pub fn render(&self, messages: &[Message], with: Rendering<'_>) -> Result<String> {
        let (text, _) = self.render_all(messages, &[], with)?;
        Ok(text)
    }

    /// The text of a conversation, and the texts of what it becomes with each of `rests`, which have no generation prompt.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub(super) fn render_all(
        &self,
        messages: &[Message],
        rests: &[&[Message]],
        with: Rendering<'_>,
    ) -> Result<(String, Vec<String>)> {
        match self.render_with(messages, rests, with, !self.takes_call_text) {
            // Some templates only take the object, or only join the text, and say nothing of it.
            Err(error)
                if error.kind == Kind::Input
                    && messages.iter().chain(rests.iter().copied().flatten()).any(has_call_text) =>
            {
                self.render_with(messages, rests, with, self.takes_call_text).map_err(|_| error)
            }
            texts => texts,
        }
    }

    /// `parsed` says whether arguments of calls that are text become objects.
    fn render_with(
        &self,
        messages: &[Message],
        rests: &[&[Message]],
        with: Rendering<'_>,
        parsed: bool,
    ) -> Result<(String, Vec<String>)> {
        let turns = |messages: &[Message]| messages.iter().map(|m| turn(m, parsed)).collect::<Vec<Value>>();
        let (turns, rests): (_, Vec<Vec<Value>>) = (turns(messages), rests.iter().map(|rest| turns(rest)).collect());
        let tools = with.tools.cloned().unwrap_or(Value::Null);
        let args = with.args.cloned().unwrap_or_default();
        let generation_prompt = with.generation_prompt;
        let name = if with.tools.is_some() && self.has_tool_use { TOOL_USE } else { DEFAULT };
        let special_tokens = self.special_tokens.clone();
        let environment = Arc::clone(&self.environment);
        let render = move || {
            let value = |value: Value| Jinja::from(Serde(value));
            let turns: Vec<Jinja> = turns.into_iter().map(value).collect();
            let tools = value(tools);
            let template = environment.get_template(name)?;
            let render = |messages: Vec<Jinja>, generation_prompt: bool| {
                let fixed = [
                    ("messages", messages.into()),
                    ("tools", tools.clone()),
                    ("documents", ().into()),
                    ("add_generation_prompt", generation_prompt.into()),
                ];
                let mut variables: BTreeMap<String, Jinja> =
                    special_tokens.iter().map(|(name, token)| (name.clone(), value(token.clone()))).collect();
                variables.extend(fixed.map(|(name, made)| (name.to_owned(), made)));
                variables.extend(args.iter().map(|(name, arg)| (name.clone(), value(arg.clone()))));
                template.render(Jinja::from(variables))
            };
            let all = |rest: Vec<Value>| turns.iter().cloned().chain(rest.into_iter().map(value)).collect();
            let text = render(turns.clone(), generation_prompt)?;
            let texts =
                rests.into_iter().map(|rest| render(all(rest), false)).collect::<std::result::Result<_, _>>()?;
            Ok((text, texts))
        };
        let render = || {
            render().map_err(|e: minijinja::Error| {
                Error::input(format!("the chat template refuses the conversation: {}", cause(&e)))
            })
        };
        bounded(WHAT, LONGEST, render)
            .and_then(|texts| texts)
            .map_err(|e| e.help(format!("the template is from {}", self.origin)))
    }
}

/// A turn as the template sees it.
fn turn(message: &Message, parsed: bool) -> Value {
    let mut keys = Map::new();
    keys.insert("role".into(), message.role.as_str().into());
    let mut extra = message.extra.clone();
    if let Some(Value::Array(calls)) = extra.get_mut("tool_calls")
        && parsed
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

/// Whether arguments of a call are written as text.
fn has_call_text(message: &Message) -> bool {
    let calls = message.extra.get("tool_calls").and_then(Value::as_array);
    let is_text = |call: &Value| call.get("function").unwrap_or(call).get("arguments").is_some_and(Value::is_string);
    calls.is_some_and(|calls| calls.iter().any(is_text))
}

/// Arguments that are JSON written as text become the object, for templates that print them with `tojson`: otherwise they
/// would be quoted twice, as they are in TRL.
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

/// Whether the template asks what the arguments of a call are: then it knows what to do with a text.
fn asks_for_call_text(template: &str) -> bool {
    let asks = Regex::new(r#"(arguments|\bargs)['"\])]*\s+is\s+(not\s+)?string"#);
    asks.is_ok_and(|asks| asks.is_match(template))
}

/// The environment with its templates.
fn compiled(texts: BTreeMap<String, String>) -> Result<Environment<'static>> {
    let mut environment = jinja::environment()?;
    for (name, text) in texts {
        environment.add_template_owned(name, jinja::source(&text)?).map_err(|e| {
            let line = e.line().map(|l| format!(" in line {l}")).unwrap_or_default();
            Error::input(format!("the chat template cannot be read{line}: {}", cause(&e)))
        })?;
    }
    Ok(environment)
}

/// The innermost message: what `raise_exception` said, without the engine's words around it.
fn cause(error: &minijinja::Error) -> String {
    if error.kind() == ErrorKind::OutOfFuel {
        return "rendering it costs more than a template may use".into();
    }
    let said = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    said.chars().take(MOST_SAID).collect()
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
    let text = dpo_core::files::read_text(path)?;
    serde_json::from_str(&text).map_err(|e| Error::input(format!("is not JSON: {e}")).at(path.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use super::*;

    /// What walks lists of lists within an instruction has no end and costs no fuel: it ends the run, and drops no row.
    #[test]
    fn a_rendering_without_end_is_no_fault_of_a_row() {
        let doubled = "{% set n = namespace(a=['x'], b=['x']) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}\
            {% set n.b = [n.b, n.b] %}{% endfor %}";
        let turns = [Message::new("user", "hi")];
        for end in ["{{ n.a == n.b }}", "{{ '' ~ n.a }}"] {
            let template = ChatTemplate::from_text(&format!("{doubled}{end}"), Map::new()).unwrap();
            let error = template.render(&turns, Rendering::default()).unwrap_err();
            assert_eq!(error.kind, Kind::Run, "{end}: {error}");
            assert!(error.message().starts_with("the chat template does not come to an end"), "{end}: {error}");
        }
        // The next rendering has a thread of its own.
        let template = ChatTemplate::from_text("{{ messages[0].content }}", Map::new()).unwrap();
        assert_eq!(template.render(&turns, Rendering::default()).unwrap(), "hi");
    }
}
