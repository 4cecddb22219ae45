//! What is served: names, refusals, and the JSON of answers, as OpenAI's reference of chats and completions has it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use dpo_core::batch::mix;
use dpo_core::error::Error;
use dpo_data::ChatTokenizer;
use dpo_generate::{Bounds, Stop, TokenLogProb};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::Config;
use super::request::{Kind, Request};
use super::scheduler::{Event, Job, Queue};

/// Why a request is not answered.
#[derive(Debug)]
pub(super) struct Refusal {
    pub status: u16,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
}

impl Refusal {
    pub(super) fn new(status: u16, message: impl Into<String>) -> Refusal {
        Refusal { status, message: message.into(), param: None, code: None }
    }

    /// Of a field that is wrong.
    pub(super) fn of(param: &str, message: impl Into<String>) -> Refusal {
        Refusal { param: Some(param.into()), ..Refusal::new(400, message) }
    }

    pub(super) fn code(self, code: &'static str) -> Refusal {
        Refusal { code: Some(code), ..self }
    }

    /// As clients read it.
    pub(super) fn json(&self) -> Value {
        let kind = match self.status {
            401 => "authentication_error",
            404 => "not_found_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}

/// A model that is served.
pub(super) struct Service {
    pub tokenizer: ChatTokenizer,
    pub bounds: Bounds,
    pub config: Config,
    queue: Queue,
    created: u64,
    requests: AtomicU64,
}

/// A request whose answers are on their way.
pub(super) struct Reply {
    pub request: Request,
    pub events: UnboundedReceiver<(usize, Event)>,
    id: String,
    created: u64,
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

impl Service {
    pub(super) fn new(tokenizer: ChatTokenizer, bounds: Bounds, config: Config, queue: Queue) -> Service {
        Service { tokenizer, bounds, config, queue, created: now(), requests: AtomicU64::new(0) }
    }

    /// The adapter that a name means; `None` for the model without one.
    pub(super) fn adapter(&self, name: &str) -> Result<Option<usize>, Refusal> {
        if name == self.config.model {
            return Ok(None);
        }
        self.config.adapters.iter().position(|own| own == name).map(Some).ok_or_else(|| {
            let names: Vec<&str> = self.names().collect();
            let what = format!("there is no model '{name}': {}", names.join(", "));
            Refusal { status: 404, code: Some("model_not_found"), ..Refusal::of("model", what) }
        })
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.config.model).chain(&self.config.adapters).map(String::as_str)
    }

    /// Of a request that names none.
    pub(super) fn next_seed(&self) -> u64 {
        mix(self.config.sampling.seed, self.requests.fetch_add(1, Ordering::Relaxed))
    }

    /// `GET /v1/models`.
    pub(super) fn models(&self) -> Value {
        let model = |(at, name): (usize, &str)| {
            let parent = (at > 0).then_some(&self.config.model);
            json!({"id": name, "object": "model", "created": self.created, "owned_by": "dpo-host", "root": name,
                "parent": parent, "max_model_len": self.bounds.length})
        };
        json!({"object": "list", "data": self.names().enumerate().map(model).collect::<Vec<_>>()})
    }

    /// Has a request answered.
    pub(super) fn begin(&self, request: Request) -> Result<Reply, Refusal> {
        let (sender, events) = unbounded_channel();
        let job = |(choice, sampling): (usize, &dpo_generate::Sampling)| Job {
            prompt: request.prompts[choice / request.count].clone(),
            adapter: request.adapter,
            sampling: sampling.clone(),
            choice,
            events: sender.clone(),
        };
        let jobs = request.samplings.iter().enumerate().map(job).collect();
        if !self.queue.put(jobs) {
            return Err(Refusal::new(503, "too many requests wait: try again later").code("overloaded"));
        }
        let kind = if request.kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        let id = format!("{kind}-{:032x}", rand::random::<u128>());
        Ok(Reply { request, events, id, created: now() })
    }
}

/// An answer as far as it has come.
#[derive(Default)]
struct Choice {
    text: String,
    logprobs: Vec<TokenLogProb>,
    stop: Option<Stop>,
    tokens: usize,
}

impl Reply {
    /// Waits for all answers.
    pub(super) async fn whole(mut self, service: &Service) -> Result<Value, Refusal> {
        let mut choices: Vec<Choice> = self.request.samplings.iter().map(|_| Choice::default()).collect();
        while choices.iter().any(|choice| choice.stop.is_none()) {
            match self.events.recv().await {
                Some((at, Event::Text(text, logprobs))) => {
                    choices[at].text += &text;
                    choices[at].logprobs.extend(logprobs);
                }
                Some((at, Event::End(stop, tokens))) => (choices[at].stop, choices[at].tokens) = (Some(stop), tokens),
                Some((_, Event::Failed(e))) => return Err(failed(&e)),
                None => return Err(ends()),
            }
        }
        let tokens = choices.iter().map(|choice| choice.tokens).sum();
        let choices: Vec<Value> = choices.into_iter().enumerate().map(|c| self.choice(service, c)).collect();
        let object = if self.request.kind == Kind::Chat { "chat.completion" } else { "text_completion" };
        let mut reply = self.head(object, choices);
        reply.insert("usage".into(), self.usage(tokens));
        Ok(reply.into())
    }

    fn choice(&self, service: &Service, (index, choice): (usize, Choice)) -> Value {
        let logprobs = self.logprobs(service, &choice.logprobs, 0);
        let finish = choice.stop.map(finish_reason);
        match self.request.kind {
            Kind::Chat => json!({"index": index, "message": {"role": "assistant", "content": choice.text},
                "logprobs": logprobs, "finish_reason": finish}),
            Kind::Completion => json!({"index": index, "text": self.echo(service, index) + &choice.text,
                "logprobs": logprobs, "finish_reason": finish}),
        }
    }

    /// The prompt of an answer, where it is told.
    fn echo(&self, service: &Service, choice: usize) -> String {
        let prompt = &self.request.prompts[choice / self.request.count];
        if self.request.echo { service.tokenizer.decode(prompt, false) } else { String::new() }
    }

    /// The chunks of a stream that come before the first event.
    pub(super) fn first(&self, service: &Service) -> Vec<Value> {
        let choices = 0..self.request.samplings.len();
        match self.request.kind {
            Kind::Chat => choices
                .map(|index| {
                    let delta = json!({"role": "assistant", "content": ""});
                    self.chunk(json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null}))
                })
                .collect(),
            Kind::Completion if self.request.echo => choices
                .map(|index| {
                    let text = self.echo(service, index);
                    self.chunk(json!({"index": index, "text": text, "logprobs": null, "finish_reason": null}))
                })
                .collect(),
            Kind::Completion => Vec::new(),
        }
    }

    /// The chunk of an event. `told` is how many bytes of the answer's text there were before.
    pub(super) fn next(&self, service: &Service, index: usize, event: &Event, told: usize) -> Result<Value, Refusal> {
        let (text, logprobs, finish) = match event {
            Event::Text(text, logprobs) => (text.as_str(), self.logprobs(service, logprobs, told), None),
            Event::End(stop, _) => ("", Value::Null, Some(finish_reason(*stop))),
            Event::Failed(e) => return Err(failed(e)),
        };
        Ok(self.chunk(match self.request.kind {
            Kind::Chat => {
                let delta = if finish.is_some() { json!({}) } else { json!({"content": text}) };
                json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish})
            }
            Kind::Completion => json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}),
        }))
    }

    /// The last chunk of a stream that tells the number of tokens.
    pub(super) fn last(&self, tokens: usize) -> Option<Value> {
        self.request.include_usage.then(|| {
            let mut chunk = self.head(self.object(), Vec::new());
            chunk.insert("usage".into(), self.usage(tokens));
            chunk.into()
        })
    }

    fn object(&self) -> &'static str {
        if self.request.kind == Kind::Chat { "chat.completion.chunk" } else { "text_completion" }
    }

    fn chunk(&self, choice: Value) -> Value {
        self.head(self.object(), vec![choice]).into()
    }

    fn head(&self, object: &str, choices: Vec<Value>) -> Map<String, Value> {
        let head = [
            ("id", json!(self.id)),
            ("object", json!(object)),
            ("created", json!(self.created)),
            ("model", json!(self.request.model)),
            ("choices", choices.into()),
        ];
        head.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    fn usage(&self, tokens: usize) -> Value {
        let prompt = self.request.prompt_tokens();
        json!({"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens})
    }

    /// Log-probs of tokens, in the shape of its kind.
    fn logprobs(&self, service: &Service, of: &[TokenLogProb], told: usize) -> Value {
        if self.request.samplings[0].logprobs.is_none() {
            return Value::Null;
        }
        let text = |id: u32| service.tokenizer.decode(&[id], true);
        match self.request.kind {
            Kind::Chat => {
                let one = |id: u32, logprob: f32| {
                    let text = text(id);
                    json!({"token": text, "logprob": logprob, "bytes": text.as_bytes()})
                };
                let content = of.iter().map(|token| {
                    let mut own = one(token.id, token.logprob);
                    own["top_logprobs"] = token.top.iter().map(|(id, logprob)| one(*id, *logprob)).collect();
                    own
                });
                json!({"content": content.collect::<Vec<_>>()})
            }
            Kind::Completion => {
                let offsets = of.iter().scan(told, |at, token| {
                    let own = *at;
                    *at += text(token.id).len();
                    Some(own)
                });
                let top = |token: &TokenLogProb| -> Map<String, Value> {
                    token.top.iter().map(|(id, logprob)| (text(*id), json!(logprob))).collect()
                };
                json!({
                    "tokens": of.iter().map(|token| text(token.id)).collect::<Vec<_>>(),
                    "token_logprobs": of.iter().map(|token| token.logprob).collect::<Vec<_>>(),
                    "top_logprobs": of.iter().map(top).collect::<Vec<_>>(),
                    "text_offset": offsets.collect::<Vec<_>>(),
                })
            }
        }
    }
}

fn finish_reason(stop: Stop) -> &'static str {
    match stop {
        Stop::Turn | Stop::StopString => "stop",
        Stop::Limit | Stop::Length => "length",
        Stop::Interrupt => "abort",
    }
}

fn failed(e: &Error) -> Refusal {
    Refusal::new(500, e.to_string())
}

/// The loop that computes is over.
pub(super) fn ends() -> Refusal {
    Refusal::new(503, "the server is about to end")
}
