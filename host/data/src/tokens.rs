//! From records to token ids, as TRL 1.16 makes them (`trainer/dpo_trainer.py`, `_prepare_dataset`), and their cutting to
//! a length.

use std::collections::HashSet;
use std::path::Path;

use dpo_plugin_api::dataset::{Message, Record, Text};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::chat::{ChatTemplate, Rendering, read_json, special_tokens};
use super::tokenizer::{Settings, Tokenizer};
use dpo_core::cache;
use dpo_core::error::{Error, IoContext, Result};
use dpo_core::example::{Example, answer_name};

/// How far before an answer's end its end-of-turn token is looked for: templates write a line break or two behind it.
const END_WINDOW: usize = 4;

/// Files of a checkpoint that decide ids.
const DECISIVE: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
];

/// What happens to an example whose prompt and longest answer exceed `max_length`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Truncation {
    /// It is dropped.
    #[default]
    Delete,
    /// The prompt loses its head, as much as the longest answer needs. All answers keep the same prompt.
    Left,
    /// Each sequence keeps its first tokens (TRL's `keep_start`).
    Right,
}

impl Truncation {
    /// Cuts an example to `max_length`; answers whether it was cut, or why it has to be dropped.
    pub fn apply(self, example: &mut Example, max_length: usize) -> std::result::Result<bool, &'static str> {
        let over = example.longest().saturating_sub(max_length);
        if over == 0 {
            return Ok(false);
        }
        let room = max_length.saturating_sub(example.prompt().len());
        match self {
            Truncation::Delete => return Err("longer than max_length"),
            Truncation::Left if !example.cut_prompt(over) => return Err("an answer alone is longer than max_length"),
            Truncation::Right if room == 0 => return Err("the prompt alone fills max_length"),
            Truncation::Left => {}
            Truncation::Right => example.cut_answers(room),
        }
        Ok(true)
    }
}

/// A checkpoint's tokenizer with its chat template and the tokens that begin and end a text.
pub struct ChatTokenizer {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    eos: Option<String>,
    eos_ids: Vec<u32>,
    bos_id: Option<u32>,
    special_ids: Vec<u32>,
    content: String,
    /// Tokens that a rendering has and plain text has not.
    markers: Vec<String>,
    /// Those at which every text is split, wherever they stand in it.
    splits: Vec<String>,
    /// A token of the family's chat template that the tokenizer has not, so that the template is not this checkpoint's.
    foreign: Option<String>,
}

/// What became of a record that may be of plain text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MadeTurns {
    /// It is turns now.
    Made,
    /// It has the chat template's tokens already, and stays.
    RenderedBefore,
    /// It stays: it has turns, or the checkpoint has no chat template of its own.
    Not,
}

/// Ids of a prompt and its answers, and what the prompt lost where its rendering parts from that of the conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Encoded {
    pub(super) prompt: Vec<u32>,
    pub(super) answers: Vec<Vec<u32>>,
    pub(super) lost: Vec<u32>,
}

impl ChatTokenizer {
    /// Reads `tokenizer.json` of a checkpoint's folder, the special tokens of its configs, and its chat template.
    ///
    /// # Errors
    /// A file that is missing or broken.
    pub fn open(dir: &Path, fallback_template: Option<&str>) -> Result<ChatTokenizer> {
        let path = dir.join("tokenizer.json");
        if !path.is_file() {
            return Err(Error::input("the checkpoint has no tokenizer.json")
                .at(dir.display())
                .help("save it with transformers: AutoTokenizer.from_pretrained(dir).save_pretrained(dir)"));
        }
        let settings = read_json(&dir.join("tokenizer_config.json"))?;
        let tokens = special_tokens(&settings);
        let config = read_json(&dir.join("config.json"))?;
        let model_type = config.get("model_type").and_then(Value::as_str);
        let tokenizer = Tokenizer::open(&path, &Settings::new(&settings, model_type))?;
        let named = |name: &str| tokens.get(name).and_then(Value::as_str).map(str::to_owned);
        let mut eos_ids: Vec<u32> = named("eos_token").and_then(|t| tokenizer.id(&t)).into_iter().collect();
        for file in ["generation_config.json", "config.json"] {
            let ids = match read_json(&dir.join(file))?.get("eos_token_id") {
                Some(Value::Array(ids)) => ids.clone(),
                Some(id) => vec![id.clone()],
                None => Vec::new(),
            };
            eos_ids.extend(ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()));
        }
        let mut seen = HashSet::new();
        eos_ids.retain(|id| seen.insert(*id));
        let mut made = ChatTokenizer {
            template: ChatTemplate::find(dir, fallback_template)?,
            eos: named("eos_token").or_else(|| tokenizer.token(*eos_ids.first()?)),
            bos_id: named("bos_token").and_then(|t| tokenizer.id(&t)),
            special_ids: tokenizer.special_ids(),
            eos_ids,
            tokenizer,
            content: content(dir, fallback_template)?,
            markers: Vec::new(),
            splits: Vec::new(),
            foreign: None,
        };
        made.look_at_rendering();
        Ok(made)
    }

    /// Finds the template's tokens in a rendering, and leaves a template of the family alone whose tokens the tokenizer has not.
    fn look_at_rendering(&mut self) {
        let turns = [Message::new("user", "a"), Message::new("assistant", "b")];
        let Some(template) = &self.template else { return };
        let text =
            template.render(&turns, Rendering { generation_prompt: true, ..Rendering::default() }).unwrap_or_default();
        if template.is_borrowed() {
            let tags = || text.split('<').skip(1).filter_map(|rest| Some(format!("<{}>", rest.split_once('>')?.0)));
            self.foreign = tags().find(|tag| self.tokenizer.id(tag).is_none());
            if self.foreign.is_some() || tags().next().is_none() {
                self.template = None;
                return;
            }
        }
        let edges = |id: &u32| {
            Some(*id) == self.bos_id || self.eos.as_deref().is_some_and(|eos| self.tokenizer.id(eos) == Some(*id))
        };
        let ids: HashSet<u32> = self.encode(&text, false).unwrap_or_default().into_iter().collect();
        let rendered: Vec<u32> = self.special_ids.iter().copied().filter(|id| ids.contains(id)).collect();
        self.markers = rendered.iter().filter(|id| !edges(id)).filter_map(|id| self.token(*id)).collect();
        self.splits = rendered.iter().filter_map(|id| self.tokenizer.always_splits(*id)).collect();
    }

    /// Makes turns of plain text, where the checkpoint has a chat template of its own and the prompt has none of its tokens.
    pub(super) fn make_turns(&self, record: &mut Record) -> MadeTurns {
        let Some(template) = &self.template else { return MadeTurns::Not };
        let Text::Plain(prompt) = &record.prompt else { return MadeTurns::Not };
        if template.is_borrowed() {
            return MadeTurns::Not;
        }
        if self.markers.iter().any(|marker| prompt.contains(marker)) {
            return MadeTurns::RenderedBefore;
        }
        record.prompt = Text::Messages(vec![Message::new("user", prompt.as_str())]);
        for answer in &mut record.answers {
            if let Text::Plain(text) = &answer.text {
                answer.text = Text::Messages(vec![Message::new("assistant", text.as_str())]);
            }
        }
        MadeTurns::Made
    }

    /// A text that another tokenizer, or one with another template, does not have.
    pub fn content(&self) -> &str {
        &self.content
    }

    /// The chat template, where there is one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// Tokens at which generation ends.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// The token that begins a text, where there is one.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// The text of the token that ends an answer.
    pub fn eos(&self) -> Option<&str> {
        self.eos.as_deref()
    }

    /// Ids of a text. `special` asks for what the tokenizer puts around plain text; renderings of a chat template have it
    /// already.
    ///
    /// # Errors
    /// A text that the tokenizer cannot take apart.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        self.tokenizer.encode(text, special)
    }

    /// The text of ids, with special tokens or without.
    pub fn decode(&self, ids: &[u32], special: bool) -> String {
        self.tokenizer.decode(ids, special).unwrap_or_else(|| format!("{ids:?}"))
    }

    /// The text of one token.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.token(id)
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// A checkpoint without chat template, or what the template refuses.
    pub fn render(&self, messages: &[Message], with: Rendering<'_>) -> Result<String> {
        self.need_template()?.render(messages, with)
    }

    /// The token with which the template ends the assistant's turn.
    pub fn turn_end(&self) -> Option<u32> {
        let turns = [Message::new("user", "a"), Message::new("assistant", "b")];
        let text = self.template.as_ref()?.render(&turns, Rendering::default()).ok()?;
        self.ending(&self.encode(&text, false).ok()?)
    }

    /// The chat template, or what to do without one.
    pub(super) fn need_template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().ok_or_else(|| {
            let foreign =
                self.foreign.as_ref().map(|token| format!(", and its tokenizer has not the family's {token}"));
            let foreign = foreign.unwrap_or_default();
            Error::input(format!("the checkpoint has no chat template, which conversations need{foreign}"))
                .help("put the model's chat_template.jinja into the checkpoint's folder, or give rows of plain text")
        })
    }

    /// The end-of-turn token within an answer's last few tokens.
    pub(super) fn ending(&self, answer: &[u32]) -> Option<u32> {
        let ends = |id: &&u32| self.eos_ids.contains(id) || self.special_ids.contains(id);
        answer.iter().rev().take(END_WINDOW).find(ends).copied()
    }

    /// Ids of a record. The prompt is what its own rendering, with the generation prompt, shares with the renderings of all
    /// whole conversations; the answers are the rest of these.
    ///
    /// # Errors
    /// A record that makes no example: an empty answer, an answer that holds other turns than the assistant's, a prompt
    /// without tokens.
    pub(super) fn encode_record(&self, record: &Record) -> Result<Encoded> {
        let answers = || record.answers.iter().map(|a| &a.text);
        let turns = || answers().map(|a| if let Text::Messages(turns) = a { Some(turns.as_slice()) } else { None });
        let texts = || answers().map(|a| if let Text::Plain(text) = a { Some(text.as_str()) } else { None });
        let (alone, whole) = match &record.prompt {
            Text::Messages(prompt) => {
                let answers: Vec<&[Message]> = turns().collect::<Option<_>>().ok_or_else(of_two_kinds)?;
                self.chat_ids(record, prompt, &answers)?
            }
            Text::Plain(prompt) => {
                let answers: Vec<&str> = texts().collect::<Option<_>>().ok_or_else(of_two_kinds)?;
                let whole = answers.iter().map(|answer| self.ended(prompt, answer)).collect::<Result<Vec<_>>>()?;
                (self.plain_ids(prompt.clone())?, whole)
            }
        };
        let shared = whole.iter().map(|ids| shared_prefix(&alone, ids)).min().unwrap_or(0);
        if shared == 0 {
            return Err(Error::input("the prompt has no token that all answers follow"));
        }
        let answers: Vec<Vec<u32>> = whole.iter().map(|ids| ids[shared..].to_vec()).collect();
        match answers.iter().position(Vec::is_empty) {
            Some(at) => Err(empty(&side(at, answers.len(), "answer"))),
            None => Ok(Encoded { lost: alone[shared..].to_vec(), prompt: alone[..shared].to_vec(), answers }),
        }
    }

    /// Ids of a record's prompt as they are before an answer, whatever answers it has.
    ///
    /// # Errors
    /// A prompt without tokens, or that the template refuses.
    pub(super) fn encode_prompt(&self, record: &Record) -> Result<Vec<u32>> {
        let ids = match &record.prompt {
            Text::Plain(text) => self.plain_ids(text.clone())?,
            Text::Messages(turns) => {
                let tools = tool_list(record.tools.as_ref())?;
                let with =
                    Rendering { tools: tools.as_ref(), args: Some(&record.template_args), generation_prompt: true };
                self.encode(&self.render(turns, with)?, false)?
            }
        };
        if ids.is_empty() { Err(Error::input("the prompt has no token")) } else { Ok(ids) }
    }

    /// Ids of the prompt with the generation prompt, and of every whole conversation.
    fn chat_ids(
        &self,
        record: &Record,
        prompt: &[Message],
        answers: &[&[Message]],
    ) -> Result<(Vec<u32>, Vec<Vec<u32>>)> {
        let whole: Vec<Vec<Message>> = answers.iter().map(|answer| [prompt, answer].concat()).collect();
        let start = if prompt.is_empty() { shared_turns(&whole) } else { prompt.len() };
        for (at, turns) in whole.iter().enumerate() {
            check_answer(&|what: &str| side(at, whole.len(), what), start, turns)?;
        }
        let tools = tool_list(record.tools.as_ref())?;
        let with = Rendering { tools: tools.as_ref(), args: Some(&record.template_args), generation_prompt: true };
        let before = whole.first().map_or(&[][..], |turns| &turns[..start]);
        let rests: Vec<&[Message]> = whole.iter().map(|turns| &turns[start..]).collect();
        let (text, texts) = self.need_template()?.render_all(before, &rests, with)?;
        self.encode_all(&text, &texts)
    }

    /// Ids of a text and of others that begin like it. What they share is encoded once, up to the last token at which every text is split,
    /// so that these are the ids of the whole texts.
    fn encode_all(&self, text: &str, others: &[String]) -> Result<(Vec<u32>, Vec<Vec<u32>>)> {
        let shared = others.iter().map(|other| shared_bytes(text, other)).min().unwrap_or(0);
        let cut = self.splits.iter().filter_map(|split| text[..shared].rfind(split)).max().unwrap_or(0);
        let head = self.encode(&text[..cut], false)?;
        let all = |text: &str| Ok([head.as_slice(), &self.encode(&text[cut..], false)?].concat());
        Ok((all(text)?, others.iter().map(|other| all(other)).collect::<Result<_>>()?))
    }

    /// Ids of a prompt and an answer as they are, ended with EOS.
    fn ended(&self, prompt: &str, answer: &str) -> Result<Vec<u32>> {
        if answer.trim().is_empty() {
            return Err(empty("an answer"));
        }
        let eos = self.eos.as_deref().ok_or_else(|| {
            Error::input("the tokenizer names no eos_token, so plain text cannot be ended").at("tokenizer_config.json")
        })?;
        let end = if answer.ends_with(eos) { "" } else { eos };
        self.plain_ids(format!("{prompt}{answer}{end}"))
    }

    /// Ids of plain text. Where the text brings the BOS that the tokenizer adds, one is enough.
    fn plain_ids(&self, text: String) -> Result<Vec<u32>> {
        let mut ids = self.encode(&text, true)?;
        if self.bos_id.is_some() && ids.first().copied() == self.bos_id && ids.get(1).copied() == self.bos_id {
            ids.remove(0);
        }
        Ok(ids)
    }
}

/// A hash of everything that decides ids.
fn content(dir: &Path, fallback_template: Option<&str>) -> Result<String> {
    let mut parts: Vec<Vec<u8>> = vec![fallback_template.unwrap_or_default().into()];
    for name in DECISIVE {
        let path = dir.join(name);
        parts.push(if path.is_file() { std::fs::read(&path).reading(&path)? } else { Vec::new() });
    }
    Ok(cache::name(&parts.iter().map(Vec::as_slice).collect::<Vec<_>>()))
}

fn empty(answer: &str) -> Error {
    Error::input(format!("{answer} is empty"))
}

fn of_two_kinds() -> Error {
    Error::input("prompt and answers should all be texts, or all be conversations")
}

/// `chosen answer`, or where there are not two, `answer 3`.
fn side(index: usize, count: usize, what: &str) -> String {
    match (index, count) {
        (_, 2) => format!("{} {what}", answer_name(index, count)),
        (_, 1) => what.to_owned(),
        _ => format!("{what} {}", index + 1),
    }
}

/// Bytes of whole letters that both begin with.
fn shared_bytes(a: &str, b: &str) -> usize {
    let shared = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    (0..=shared).rev().find(|at| a.is_char_boundary(*at)).unwrap_or(0)
}

fn shared_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Turns that all conversations begin with; the last turn of the shortest one is always an answer (TRL's `extract_prompt`).
pub(super) fn shared_turns(conversations: &[Vec<Message>]) -> usize {
    let Some((first, others)) = conversations.split_first() else { return 0 };
    let with = |other: &Vec<Message>| first.iter().zip(other).take_while(|(a, b)| a == b).count();
    let shared = others.iter().map(with).min().unwrap_or(first.len());
    shared.min(conversations.iter().map(Vec::len).min().unwrap_or(0).saturating_sub(1))
}

/// An answer is the assistant's, though tools may speak within it. Whatever else it holds would be learned as well. `named`
/// says which one is meant.
fn check_answer(named: &dyn Fn(&str) -> String, start: usize, turns: &[Message]) -> Result<()> {
    let Some(answer) = turns.get(start..).filter(|a| !a.is_empty()) else { return Err(empty(&named("answer"))) };
    if !answer.iter().any(|m| m.role == "assistant") {
        return Err(Error::input(format!("the {} ends without an assistant's answer", named("conversation"))));
    }
    let foreign = answer.iter().enumerate().find(|(i, m)| m.role != "assistant" && (*i == 0 || m.role != "tool"));
    if let Some((i, turn)) = foreign {
        let (at, named) = (start + i + 1, named("conversation"));
        let what = format!("turn {at} of the {named}, of role '{}', would be learned", turn.role);
        return Err(Error::input(what)
            .help("answers should part at an answer of the assistant, after the last turn of the user"));
    }
    if start == 0 {
        return Err(Error::input("the conversation has nothing before the answer"));
    }
    if answer.iter().all(|m| m.content.trim().is_empty() && m.extra.is_empty()) {
        return Err(empty(&named("answer")));
    }
    Ok(())
}

/// Tools as a list of JSON schemas: rows also hold it as text, or hold bare functions, which ms-swift and LLaMA-Factory
/// wrap in the same way.
fn tool_list(tools: Option<&Value>) -> Result<Option<Value>> {
    let broken = |e: serde_json::Error| Error::input(format!("tools are not JSON: {e}"));
    let list = match tools {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
        Some(Value::String(text)) => serde_json::from_str(text).map_err(broken)?,
        Some(value) => value.clone(),
    };
    let list = match list {
        Value::Array(list) => list,
        one => vec![one],
    };
    if list.is_empty() {
        return Ok(None);
    }
    let tool = |value: Value| {
        let value: Value = match value {
            Value::String(text) => serde_json::from_str(&text).map_err(broken)?,
            value => value,
        };
        let bare = value.get("name").is_some() && value.get("function").is_none() && value.get("type").is_none();
        Ok(if bare { json!({"type": "function", "function": value}) } else { value })
    };
    Ok(Some(Value::Array(list.into_iter().map(tool).collect::<Result<_>>()?)))
}
