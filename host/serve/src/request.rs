//! What a client asks for: the fields of OpenAI's chats and completions, and those that vLLM has beside them.

use dpo_core::batch::mix;
use dpo_core::error::Error;
use dpo_data::Rendering;
use dpo_generate::Sampling;
use dpo_plugin_api::dataset::Message;
use serde_json::{Map, Value};

use super::fields::Fields;
use super::refusal::Refusal;
use super::service::Service;

/// Answers to a prompt at most, and prompts of a request.
const MOST_CHOICES: usize = 128;
/// The likeliest tokens that are told with each at most.
const MOST_LOGPROBS: usize = 20;
/// Strings that may end an answer, and what OpenAI's completions have as the most tokens.
const MOST_STOPS: usize = 16;
const COMPLETION_TOKENS: usize = 16;

/// What kind of answer it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Chat,
    Completion,
}

/// A request that was understood.
pub(super) struct Request {
    pub kind: Kind,
    /// The name that it gave.
    pub model: String,
    pub adapter: Option<usize>,
    pub prompts: Vec<Vec<u32>>,
    /// Answers to each prompt.
    pub count: usize,
    /// Of each answer.
    pub samplings: Vec<Sampling>,
    pub stream: bool,
    pub include_usage: bool,
    /// Whether the prompt is told before the answer.
    pub echo: bool,
}

/// What both kinds take.
const COMMON: &[&str] = &[
    "model",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "max_tokens",
    "stop",
    "seed",
    "n",
    "logprobs",
    "ignore_eos",
];
const CHAT: &[&str] =
    &["messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs", "reasoning_effort"];
const COMPLETION: &[&str] = &["prompt", "echo"];

impl Request {
    pub(super) fn parse(service: &Service, kind: Kind, body: &[u8]) -> Result<Request, Refusal> {
        let mut fields = Fields::parse(body)?;
        let model = fields.text("model")?.ok_or_else(|| Refusal::of("model", "a request names a 'model'"))?;
        let adapter = service.adapter(&model)?;
        let (stream, options) = (fields.flag("stream")?, fields.object("stream_options")?);
        let mut sampling = sampling(&mut fields, &service.config.sampling)?;
        let (prompts, limit) = match kind {
            Kind::Chat => {
                let limit = fields.count("max_completion_tokens", 1, usize::MAX)?;
                let top = fields.count("top_logprobs", 0, MOST_LOGPROBS)?;
                sampling.logprobs = fields.flag("logprobs")?.then_some(top.unwrap_or(0));
                if top.is_some_and(|top| top > 0) && sampling.logprobs.is_none() {
                    return Err(Refusal::of("top_logprobs", "'top_logprobs' needs 'logprobs': true"));
                }
                (vec![conversation(service, &mut fields)?], limit.or(fields.count("max_tokens", 1, usize::MAX)?))
            }
            Kind::Completion => {
                sampling.logprobs = fields.count("logprobs", 0, MOST_LOGPROBS)?;
                (texts(service, &mut fields)?, fields.count("max_tokens", 1, usize::MAX)?)
            }
        };
        let echo = kind == Kind::Completion && fields.flag("echo")?;
        if echo && sampling.logprobs.is_some() {
            return Err(Refusal::of(
                "echo",
                "'echo' with 'logprobs' is not supported: a prompt's log-probs are not told",
            ));
        }
        let count = fields.count("n", 1, MOST_CHOICES)?.unwrap_or(1);
        let seed = fields.whole("seed", i64::MIN)?.map_or_else(|| service.next_seed(), |seed| seed as u64);
        let known = [COMMON, if kind == Kind::Chat { CHAT } else { COMPLETION }].concat();
        fields.end(&known)?;
        for ids in &prompts {
            service.bounds.check(ids).map_err(|e| too_long(&e, kind))?;
        }
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let room = service.bounds.length - longest;
        let usual = service.config.max_new_tokens;
        let usual = usual.unwrap_or(if kind == Kind::Chat { room } else { COMPLETION_TOKENS });
        sampling.max_new_tokens = limit.unwrap_or(usual.min(room));
        if sampling.max_new_tokens > room {
            let (asked, length) = (sampling.max_new_tokens, service.bounds.length);
            return Err(Refusal::of(
                "max_tokens",
                format!(
                    "{asked} tokens behind a prompt of {longest} are more than the {length} that there is room for"
                ),
            )
            .code("context_length_exceeded"));
        }
        let include_usage = options.and_then(|o| o.get("include_usage")?.as_bool()).unwrap_or(false);
        let of_choice = |choice| Sampling { seed: mix(seed, choice as u64), ..sampling.clone() };
        let samplings = (0..prompts.len() * count).map(of_choice).collect();
        Ok(Request { kind, model, adapter, prompts, count, samplings, stream, include_usage, echo })
    }

    /// Tokens of all prompts.
    pub(super) fn prompt_tokens(&self) -> usize {
        self.prompts.iter().map(Vec::len).sum()
    }
}

fn sampling(fields: &mut Fields, usual: &Sampling) -> Result<Sampling, Refusal> {
    // 0 and -1 are all tokens, to transformers and to vLLM.
    let top_k = fields.whole("top_k", -1)?.map(|k| if k <= 0 { usize::MAX } else { k as usize });
    let sampling = Sampling {
        temperature: fields.number("temperature", 0.0, 2.0)?.unwrap_or(usual.temperature),
        top_p: fields.number("top_p", f64::MIN_POSITIVE, 1.0)?.unwrap_or(usual.top_p),
        top_k: top_k.unwrap_or(usual.top_k),
        repetition_penalty: fields
            .number("repetition_penalty", f64::MIN_POSITIVE, 10.0)?
            .unwrap_or(usual.repetition_penalty),
        frequency_penalty: fields.number("frequency_penalty", -2.0, 2.0)?.unwrap_or(0.0),
        presence_penalty: fields.number("presence_penalty", -2.0, 2.0)?.unwrap_or(0.0),
        logit_bias: fields.by_token("logit_bias")?,
        stop: fields.texts("stop")?,
        ignore_eos: fields.flag("ignore_eos")?,
        ..usual.clone()
    };
    if sampling.stop.len() > MOST_STOPS || sampling.stop.iter().any(String::is_empty) {
        return Err(Refusal::of("stop", format!("'stop' has {MOST_STOPS} texts at most, none of them empty")));
    }
    Ok(sampling)
}

/// The tokens of a chat, rendered by the model's template.
fn conversation(service: &Service, fields: &mut Fields) -> Result<Vec<u32>, Refusal> {
    let messages = fields.take("messages").ok_or_else(|| Refusal::of("messages", "a chat has 'messages'"))?;
    let turns = Message::parse_list(&messages).map_err(|e| Refusal::of("messages", Error::from(e).to_string()))?;
    if turns.is_empty() {
        return Err(Refusal::of("messages", "a chat has a message at least"));
    }
    let mut args: Map<String, Value> = fields.object("chat_template_kwargs")?.unwrap_or_default();
    if let Some(effort) = fields.text("reasoning_effort")? {
        args.insert("reasoning_effort".into(), effort.into());
    }
    let rendering = Rendering { generation_prompt: true, args: Some(&args), ..Rendering::default() };
    let rendered = service.tokenizer.render(&turns, rendering);
    let ids = rendered.and_then(|text| service.tokenizer.encode(&text, false));
    ids.map_err(|e| Refusal::of("messages", e.to_string()))
}

/// The tokens of what a completion goes on with: a text or tokens, or a list of either.
fn texts(service: &Service, fields: &mut Fields) -> Result<Vec<Vec<u32>>, Refusal> {
    let prompt = fields.take("prompt").ok_or_else(|| Refusal::of("prompt", "a completion has a 'prompt'"))?;
    let wrong =
        || Refusal::of("prompt", "'prompt' is a text, a list of texts, a list of tokens, or a list of such lists");
    let ids = |list: &[Value]| -> Option<Vec<u32>> { list.iter().map(|id| u32::try_from(id.as_u64()?).ok()).collect() };
    let encode = |text: &str| service.tokenizer.encode(text, true).map_err(|e| Refusal::of("prompt", e.to_string()));
    let one = |value: &Value| match value {
        Value::String(text) => encode(text),
        Value::Array(list) if !list.is_empty() => ids(list).ok_or_else(wrong),
        _ => Err(wrong()),
    };
    match &prompt {
        Value::Array(list) if list.len() > MOST_CHOICES && !list[0].is_number() => {
            Err(Refusal::of("prompt", format!("{} prompts, of {MOST_CHOICES} at most", list.len())))
        }
        Value::Array(list) if list.iter().any(|v| !v.is_number()) => list.iter().map(one).collect(),
        value => Ok(vec![one(value)?]),
    }
}

fn too_long(e: &Error, kind: Kind) -> Refusal {
    let name = if kind == Kind::Chat { "messages" } else { "prompt" };
    Refusal::of(name, e.to_string()).code("context_length_exceeded")
}
