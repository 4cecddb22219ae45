//! Attention, as blocks name it.

use serde_json::json;

use super::{BlockBuilder, Var, tensor};

/// Numbers of a grouped-query attention.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head of queries and keys.
    pub head_dim: usize,
    /// Width of a head of values.
    pub value_dim: usize,
    /// Factor on the scores before the softmax.
    pub scale: f64,
    /// A token sees itself and this many minus one before it; `None` sees all before it.
    pub window: Option<usize>,
    /// Scores `s` become `softcap · tanh(s / softcap)` before the softmax (Gemma 2, section 2); `None` leaves them.
    pub softcap: Option<f64>,
}

impl Attention {
    /// Full causal attention with the usual scale of `1 / sqrt(head_dim)`.
    pub fn new(heads: usize, kv_heads: usize, head_dim: usize) -> Attention {
        let scale = (head_dim as f64).powf(-0.5);
        Attention { heads, kv_heads, head_dim, value_dim: head_dim, scale, window: None, softcap: None }
    }

    /// Another factor on the scores.
    pub fn scale(self, scale: f64) -> Attention {
        Attention { scale, ..self }
    }

    /// Values with heads of another width.
    pub fn value_dim(self, value_dim: usize) -> Attention {
        Attention { value_dim, ..self }
    }

    /// A sliding window, where there is one.
    pub fn window(self, window: Option<usize>) -> Attention {
        Attention { window, ..self }
    }

    /// A soft cap, where there is one.
    pub fn softcap(self, softcap: Option<f64>) -> Attention {
        Attention { softcap, ..self }
    }
}

impl BlockBuilder {
    /// Causal attention; the host adds the rule that a rejected answer does not see the chosen one.
    pub fn attention(&mut self, q: Var, k: Var, v: Var, a: Attention) -> Var {
        self.attention_with(q, k, v, a, None)
    }

    /// [`attention`](Self::attention) with a logit for every query head, a tensor `[heads]`, which joins the sum of its softmax and has
    /// no value (gpt-oss).
    pub fn attention_with(&mut self, q: Var, k: Var, v: Var, a: Attention, sinks: Option<&str>) -> Var {
        let needs = [a.heads * a.head_dim, a.kv_heads * a.head_dim, a.kv_heads * a.value_dim];
        if [q.width, k.width, v.width] != needs {
            self.fail(format!(
                "attention: q, k, v have {}, {}, {} columns; {} and {} heads of {} need {needs:?}",
                q.width, k.width, v.width, a.heads, a.kv_heads, a.head_dim
            ));
        }
        if a.kv_heads == 0 || !a.heads.is_multiple_of(a.kv_heads) {
            self.fail(format!("attention: {} heads cannot share {} key heads", a.heads, a.kv_heads));
        }
        let mut attrs = vec![
            ("heads", json!(a.heads)),
            ("kv_heads", json!(a.kv_heads)),
            ("head_dim", json!(a.head_dim)),
            ("scale", json!(a.scale)),
        ];
        attrs.extend((a.value_dim != a.head_dim).then(|| ("value_dim", json!(a.value_dim))));
        attrs.extend(a.window.map(|w| ("window", json!(w))));
        attrs.extend(a.softcap.map(|c| ("softcap", json!(c))));
        let weights = sinks.map(|name| tensor("sinks", name, &[a.heads])).into_iter().collect();
        self.op("attention", &[q, k, v], weights, &attrs, a.heads * a.value_dim)
    }
}
