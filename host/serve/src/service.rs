//! A model that is served: what its adapters are called, and where answers are asked for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use dpo_core::batch::mix;
use dpo_data::ChatTokenizer;
use dpo_generate::Bounds;
use serde_json::{Value, json};

use super::Config;
use super::refusal::Refusal;
use super::scheduler::Queue;

/// A model that is served.
pub(super) struct Service {
    pub tokenizer: ChatTokenizer,
    pub bounds: Bounds,
    pub config: Config,
    pub queue: Queue,
    created: u64,
    requests: AtomicU64,
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
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
            Refusal::of("model", what).status(404).code("model_not_found")
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
}
