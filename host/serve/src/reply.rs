//! The JSON of answers, whole or as chunks of a stream, as OpenAI's reference of chats and completions has it.

use dpo_generate::{Sampling, Stop, TokenLogProb};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::refusal::Refusal;
use super::request::{Kind, Request};
use super::scheduler::{Event, Job};
use super::service::{Service, now};

/// A request whose answers are on their way.
pub(super) struct Reply {
    pub request: Request,
    pub events: UnboundedReceiver<(usize, Event)>,
    id: String,
    created: u64,
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
    /// Has a request answered.
    pub(super) fn begin(service: &Service, request: Request) -> Result<Reply, Refusal> {
        let (sender, events) = unbounded_channel();
        let job = |(choice, sampling): (usize, &Sampling)| Job {
            prompt: request.prompts[choice / request.count].clone(),
            adapter: request.adapter,
            sampling: sampling.clone(),
            choice,
            events: sender.clone(),
        };
        let jobs = request.samplings.iter().enumerate().map(job).collect();
        if !service.queue.put(jobs) {
            return Err(Refusal::new(503, "too many requests wait: try again later").code("overloaded"));
        }
        let kind = if request.kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        let id = format!("{kind}-{:032x}", rand::random::<u128>());
        Ok(Reply { request, events, id, created: now() })
    }

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
                Some((_, Event::Failed(e))) => return Err(Refusal::failed(&e)),
                None => return Err(Refusal::ends()),
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
            Event::Failed(e) => return Err(Refusal::failed(e)),
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
