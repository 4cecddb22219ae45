//! Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values of all heads are made from one narrow
//! vector a token, and queries may be; the columns that turn by position are apart from the others, and those of keys are one head
//! that all share.
//!
//! [`LatentAttention::read`] gives what configs state; [`Decoder::latent_attention`](crate::decoder::Decoder::latent_attention) puts it
//! in place of a decoder's own.

use crate::builder::{Attention, BlockBuilder, Norm, Var};
use crate::model::Config;
use crate::rope::Rope;
use crate::{Result, bail};

/// Sizes of a latent attention. Its modules are named as transformers names them, `self_attn.kv_a_proj_with_mqa` and the like.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LatentAttention {
    /// Heads, of queries as of keys and values.
    pub heads: usize,
    /// Columns of a head of queries and keys that have no position.
    pub nope_dim: usize,
    /// Columns behind them that turn.
    pub rope_dim: usize,
    /// Columns of a head of values.
    pub value_dim: usize,
    /// Columns of the vector that queries are made from; `None` where one projection makes them.
    pub q_rank: Option<usize>,
    /// Columns of the vector that keys and values are made from.
    pub kv_rank: usize,
    /// Whether the projections to these vectors have biases.
    pub bias: bool,
    /// The norm of these vectors.
    pub norm: Norm,
    /// Factor on the scores.
    pub scale: f64,
}

impl LatentAttention {
    /// One with a config's sizes: `num_attention_heads`, `qk_nope_head_dim`, `qk_rope_head_dim`, `v_head_dim`, `q_lora_rank`,
    /// `kv_lora_rank`, `attention_bias`, and with the factor that its rotary embedding puts on scores.
    ///
    /// # Errors
    /// A config without these sizes, or with fewer heads of keys than of queries.
    pub fn read(config: &Config) -> Result<LatentAttention> {
        let heads = config.size("num_attention_heads")?;
        match config.opt_size("num_key_value_heads")? {
            Some(other) if other != heads => {
                return bail!("config.json: {other} num_key_value_heads of a latent attention with {heads} heads");
            }
            _ => {}
        }
        // What transformers 5 writes beside the sizes that it is made of.
        for key in ["head_dim", "qk_head_dim"] {
            config.get(key);
        }
        let (nope_dim, rope_dim) = (config.size("qk_nope_head_dim")?, config.size("qk_rope_head_dim")?);
        Ok(LatentAttention {
            heads,
            nope_dim,
            rope_dim,
            value_dim: config.size("v_head_dim")?,
            q_rank: config.opt_size("q_lora_rank")?,
            kv_rank: config.size("kv_lora_rank")?,
            bias: config.flag("attention_bias", false)?,
            // Whatever the config says of others.
            norm: Norm::rms(1e-6),
            scale: ((nope_dim + rope_dim) as f64).powf(-0.5) * Rope::score_scale(config)?,
        })
    }

    /// From what the attention reads to the values of all heads, `[tokens, heads · value_dim]`; without `rope`, no column turns.
    pub fn build(&self, b: &mut BlockBuilder, h: Var, rope: Option<&Rope>) -> Var {
        let LatentAttention { heads, nope_dim, rope_dim, value_dim, kv_rank, bias, .. } = *self;
        let dim = nope_dim + rope_dim;
        let mut q = match self.q_rank {
            Some(rank) => {
                let latent = b.linear_if(bias, "self_attn.q_a_proj", h, rank);
                let latent = b.norm(self.norm, "self_attn.q_a_layernorm", latent);
                b.linear("self_attn.q_b_proj", latent, heads * dim)
            }
            None => b.linear("self_attn.q_proj", h, heads * dim),
        };
        let latent = b.linear_if(bias, "self_attn.kv_a_proj_with_mqa", h, kv_rank + rope_dim);
        let [latent, mut k_rope] = b.split(latent, [kv_rank, rope_dim]);
        let latent = b.norm(self.norm, "self_attn.kv_a_layernorm", latent);
        let kv = b.linear("self_attn.kv_b_proj", latent, heads * (nope_dim + value_dim));
        let [k, v] = b.split_heads(kv, heads, [nope_dim, value_dim]);
        if let Some(rope) = rope {
            q = b.rope_from(q, dim, nope_dim, rope);
            k_rope = b.rope(k_rope, rope_dim, rope);
        }
        let k_rope = b.expand(k_rope, heads);
        let k = b.cat_heads(k, k_rope, heads);
        b.attention(q, k, v, Attention::new(heads, heads, dim).value_dim(value_dim).scale(self.scale))
    }
}
