//! Gemma 4: layers of two kinds with heads of their own, keys that are values too, a scalar for every layer; in the small models
//! embeddings for every layer, and keys and values that later layers share; in 26B-A4B experts beside the MLP.
//!
//! What a layer leaves for later ones lies behind the residual stream: `[hidden | embeddings of all layers | keys and values]`.

use dpo_plugin_api::builder::{BlockBuilder, Experts, Router, Scoring};
use dpo_plugin_api::prelude::*;

use crate::{WRAPPED, is_wrapped, name_wrapped};

pub(crate) static GEMMA4: Family = Family {
    name: "gemma4",
    summary: "Gemma 4: E2B, E4B, 12B, 26B-A4B, 31B; the text of the published models",
    claims: &[
        "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedForCausalLM",
        "Gemma4UnifiedForConditionalGeneration",
    ],
    checkpoints: &[
        "google/gemma-4-E2B-it",
        "google/gemma-4-E4B-it",
        "google/gemma-4-12B-it",
        "google/gemma-4-26B-A4B-it",
        "google/gemma-4-31B-it",
    ],
    example_config: include_str!("../configs/gemma4.json"),
    graph,
};

/// A layer, as far as it is not like every other.
#[derive(Clone, Debug)]
struct Layer {
    slides: bool,
    head_dim: usize,
    kv_heads: usize,
    rope: Rope,
    keys: Keys,
    ffn: usize,
}

/// Where a layer has its keys and values from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keys {
    /// Its own.
    Own,
    /// Its own, which later layers of its kind use, from this column behind the stream on.
    Stored(usize),
    /// Those of the last layer of its kind that has its own.
    Shared(usize),
}

struct Gemma4 {
    prefix: &'static str,
    hidden: usize,
    vocab: usize,
    heads: usize,
    window: Option<usize>,
    norm: Norm,
    activation: String,
    bias: bool,
    /// Whether keys of layers without a window are their values.
    k_eq_v: bool,
    /// Experts beside the MLP, and which of them a token takes.
    experts: Option<(Experts, Router)>,
    layers: Vec<Layer>,
    /// Columns and rows of an embedding for every layer.
    own: Option<(usize, usize)>,
    /// Columns of keys and values behind the stream.
    shared: usize,
}

/// transformers, `modeling_gemma4.py` and `configuration_gemma4.py`.
fn graph(whole: &Config) -> Result<ModelGraph> {
    let config = whole.text()?.with_defaults(&[
        ("vocab_size", json!(262_144)),
        ("hidden_size", json!(2304)),
        ("intermediate_size", json!(9216)),
        ("num_hidden_layers", json!(30)),
        ("num_attention_heads", json!(8)),
        ("num_key_value_heads", json!(4)),
        ("head_dim", json!(256)),
        ("sliding_window", json!(512)),
        ("vocab_size_per_layer_input", json!(262_144)),
    ]);
    // Images' tokens see each other, texts' do not.
    config.only("use_bidirectional_attention", &[json!("vision"), json!(false)])?;
    let model = Gemma4::read(&config, whole)?;
    let tied = config.flag("tie_word_embeddings", true)?;
    let softcap = config.opt_float("final_logit_softcapping")?;
    let mut graph = model.build(tied, softcap);
    if is_wrapped(whole) {
        name_wrapped(&mut graph);
        graph.unused_tensor("model.vision_embedder.*");
    }
    graph.finish(whole)
}

impl Gemma4 {
    fn read(config: &Config, whole: &Config) -> Result<Gemma4> {
        let count = config.layers()?;
        let mut sliding = config.sliding_layers(count, |layer| !(layer + 1).is_multiple_of(6))?;
        sliding[count - 1] = false;
        let k_eq_v = config.flag("attention_k_eq_v", false)?;
        let (head_dim, kv_heads) = (config.size("head_dim")?, config.size("num_key_value_heads")?);
        let of_full = (
            config.opt_size("global_head_dim")?.unwrap_or(512),
            config.opt_size("num_global_key_value_heads")?.filter(|_| k_eq_v).unwrap_or(kv_heads),
        );
        // Files of transformers 5 say it layer by layer.
        let each = config.opt_object("per_layer_config")?;
        let mut layers = Vec::with_capacity(count);
        let shared = config.opt_int("num_kv_shared_layers")?.unwrap_or(0);
        let Some(first_shared) = count.checked_sub(shared) else {
            return bail!("config.json: {shared} num_kv_shared_layers of {count} layers");
        };
        let wide = config.flag("use_double_wide_mlp", false)?;
        let ffn = config.size("intermediate_size")?;
        config.opt_float("rope_theta")?;
        for (at, slides) in sliding.iter().copied().enumerate() {
            let (mut dim, mut kv) = if slides || each.is_some() { (head_dim, kv_heads) } else { of_full };
            let own = each.as_ref().map(|each| each.opt_object(&at.to_string())).transpose()?.flatten();
            if let Some(own) = own {
                dim = own.opt_size("head_dim")?.unwrap_or(dim);
                kv = own.opt_size("num_key_value_heads")?.unwrap_or(kv);
            }
            let rope = match (config.opt_object("rope_parameters")?, slides) {
                (Some(_), true) => Rope::of_layers(config, Some("sliding_attention"), dim, 10_000.0)?,
                (Some(_), false) => Rope::of_layers(config, Some("full_attention"), dim, 1e6)?,
                (None, true) => Rope::plain(dim, 10_000.0),
                (None, false) => Rope::proportional(dim, 1e6, 0.25),
            };
            let ffn = if wide && at >= first_shared { 2 * ffn } else { ffn };
            layers.push(Layer { slides, head_dim: dim, kv_heads: kv, rope, keys: Keys::Own, ffn });
        }
        let width = config.opt_int("hidden_size_per_layer_input")?.unwrap_or(256);
        let rows = config.size("vocab_size_per_layer_input")?;
        let mut model = Gemma4 {
            prefix: if is_wrapped(whole) { WRAPPED } else { "model." },
            hidden: config.size("hidden_size")?,
            vocab: config.size("vocab_size")?,
            heads: config.size("num_attention_heads")?,
            window: config.opt_size("sliding_window")?,
            norm: Norm::rms(config.opt_float("rms_norm_eps")?.unwrap_or(1e-6)),
            activation: config.activation("hidden_activation", "gelu_tanh")?,
            bias: config.flag("attention_bias", false)?,
            k_eq_v,
            experts: config.flag("enable_moe_block", false)?.then(|| experts(config)).transpose()?,
            layers,
            own: (width > 0).then_some((width, rows)),
            shared: 0,
        };
        if shared > 0 {
            model.share(first_shared)?;
        }
        Ok(model)
    }

    /// Gives keys and values that are shared their columns.
    fn share(&mut self, first: usize) -> Result<()> {
        for slides in [true, false] {
            let of_kind = |layer: &Layer| layer.slides == slides;
            if !self.layers[first..].iter().any(of_kind) {
                continue;
            }
            let Some(last) = self.layers[..first].iter().rposition(of_kind) else {
                return bail!(
                    "config.json: no layer before num_kv_shared_layers has keys for the later ones of its kind"
                );
            };
            let column = self.shared;
            self.layers[last].keys = Keys::Stored(column);
            self.shared += 2 * self.layers[last].kv_heads * self.layers[last].head_dim;
            self.layers[first..].iter_mut().filter(|l| of_kind(l)).for_each(|l| l.keys = Keys::Shared(column));
        }
        Ok(())
    }

    /// Columns of the embeddings of all layers.
    fn own_width(&self) -> usize {
        self.own.map_or(0, |(width, _)| width * self.layers.len())
    }

    fn build(&self, tied: bool, softcap: Option<f64>) -> GraphBuilder {
        let stream = self.hidden + self.own_width() + self.shared;
        let table = format!("{}embed_tokens.weight", self.prefix);
        let mut graph = GraphBuilder::decoder(stream, self.vocab);
        graph.embed(|b, tokens| self.embed(b, tokens, &table));
        if self.own.is_some() {
            let block = graph.block("embeddings of all layers", |b, x| self.own_embeddings(b, x));
            graph.layer(block, self.prefix);
        }
        for (at, layer) in self.layers.iter().enumerate() {
            let mut name = String::from(if layer.slides { "decoder, window" } else { "decoder" });
            name += match layer.keys {
                Keys::Own => "",
                Keys::Stored(_) => ", stores keys",
                Keys::Shared(_) => ", shares keys",
            };
            if self.own.is_some() {
                name += &format!(", {at}");
            }
            let block = graph.block_once(&name, |b, x| self.layer(b, x, at, layer));
            graph.layer(block, format!("{}layers.{at}.", self.prefix));
            if let Keys::Shared(_) = layer.keys {
                for unread in ["k_proj", "v_proj", "k_norm", "v_norm"] {
                    graph.unused_tensor(&format!("*layers.{at}.self_attn.{unread}.*"));
                }
            }
        }
        let head = if tied { table.as_str() } else { "lm_head.weight" };
        graph.head(|b, x| {
            let x = if stream == self.hidden { x } else { b.narrow(x, 0, self.hidden) };
            let h = b.norm(self.norm, &format!("{}norm", self.prefix), x);
            b.lm_head_with(head, h, self.vocab, None, softcap)
        });
        graph.unused_tensor("lm_head.weight");
        graph
    }

    fn embed(&self, b: &mut BlockBuilder, tokens: Var, table: &str) -> Var {
        let x = b.embedding(table, tokens, self.vocab, self.hidden);
        let mut x = b.scale(x, (self.hidden as f64).sqrt());
        if let Some((width, rows)) = self.own {
            let name = format!("{}embed_tokens_per_layer.weight", self.prefix);
            let own = b.embedding(&name, tokens, rows, self.own_width());
            let own = b.scale(own, (width as f64).sqrt());
            x = b.cat(x, own);
        }
        // Nothing is there until a layer stores its keys.
        let mut empty = self.shared;
        while empty > 0 {
            let columns = empty.min(self.hidden);
            let part = b.narrow(x, 0, columns);
            let part = b.scale(part, 0.0);
            x = b.cat(x, part);
            empty -= columns;
        }
        x
    }

    /// The embeddings of all layers: those of the tokens, and a projection of the residual stream.
    fn own_embeddings(&self, b: &mut BlockBuilder, stream: Var) -> Var {
        let width = self.own.map_or(0, |(width, _)| width);
        let x = b.narrow(stream, 0, self.hidden);
        let of_tokens = b.narrow(stream, self.hidden, self.own_width());
        let projected = b.linear("per_layer_model_projection", x, self.own_width());
        let projected = b.scale(projected, (self.hidden as f64).powf(-0.5));
        let projected = b.head_norm(self.norm, "per_layer_projection_norm", projected, width);
        let sum = b.add(projected, of_tokens);
        let sum = b.scale(sum, 2.0_f64.powf(-0.5));
        let x = b.cat(x, sum);
        if self.shared == 0 {
            return x;
        }
        let keys = b.narrow(stream, self.hidden + self.own_width(), self.shared);
        b.cat(x, keys)
    }

    fn layer(&self, b: &mut BlockBuilder, stream: Var, at: usize, layer: &Layer) -> Var {
        let behind = self.own_width() + self.shared;
        let x = if behind == 0 { stream } else { b.narrow(stream, 0, self.hidden) };
        let h = b.norm(self.norm, "input_layernorm", x);
        let (mixed, keys) = self.attention(b, h, stream, layer);
        let mixed = b.norm(self.norm, "post_attention_layernorm", mixed);
        let x = b.add(x, mixed);
        let h = b.norm(self.norm, "pre_feedforward_layernorm", x);
        let [gate, up] = ["mlp.gate_proj", "mlp.up_proj"].map(|module| b.linear(module, h, layer.ffn));
        let h = b.glu(&self.activation, gate, up);
        let mut down = b.linear("mlp.down_proj", h, self.hidden);
        if let Some(experts) = &self.experts {
            let routed = self.experts(b, x, experts);
            down = b.norm(self.norm, "post_feedforward_layernorm_1", down);
            down = b.add(down, routed);
        }
        let down = b.norm(self.norm, "post_feedforward_layernorm", down);
        let mut x = b.add(x, down);
        if let Some((width, _)) = self.own {
            let own = b.narrow(stream, self.hidden + at * width, width);
            let gate = b.linear("per_layer_input_gate", x, width);
            let h = b.glu(&self.activation, gate, own);
            let h = b.linear("per_layer_projection", h, self.hidden);
            let h = b.norm(self.norm, "post_per_layer_input_norm", h);
            x = b.add(x, h);
        }
        let x = b.scale_by("layer_scalar", x);
        match (behind, layer.keys, keys) {
            (0, ..) => x,
            (_, Keys::Stored(column), Some([k, v])) => {
                let start = self.hidden + self.own_width();
                let keys = b.cat(k, v);
                let mut x = x;
                if self.own_width() + column > 0 {
                    let before = b.narrow(stream, self.hidden, self.own_width() + column);
                    x = b.cat(x, before);
                }
                x = b.cat(x, keys);
                let next = column + 2 * layer.kv_heads * layer.head_dim;
                if next < self.shared {
                    let after = b.narrow(stream, start + next, self.shared - next);
                    x = b.cat(x, after);
                }
                x
            }
            _ => {
                let rest = b.narrow(stream, self.hidden, behind);
                b.cat(x, rest)
            }
        }
    }

    /// What experts make of the residual stream: `Gemma4TextRouter` and `Gemma4TextExperts`.
    fn experts(&self, b: &mut BlockBuilder, x: Var, (experts, router): &(Experts, Router)) -> Var {
        let h = b.norm_of(self.norm, "router.scale", x);
        let h = b.scale(h, (self.hidden as f64).powf(-0.5));
        let logits = b.linear("router.proj", h, experts.count);
        let routing = b.route(logits, router);
        let h = b.norm(self.norm, "pre_feedforward_layernorm_2", x);
        let h = b.experts(h, routing, experts);
        b.norm(self.norm, "post_feedforward_layernorm_2", h)
    }

    /// What the attention adds, and the layer's own keys and values.
    fn attention(&self, b: &mut BlockBuilder, h: Var, stream: Var, layer: &Layer) -> (Var, Option<[Var; 2]>) {
        let (dim, narrow) = (layer.head_dim, layer.kv_heads * layer.head_dim);
        let q = b.linear_if(self.bias, "self_attn.q_proj", h, self.heads * dim);
        let q = b.head_norm(self.norm, "self_attn.q_norm", q, dim);
        let q = b.rope(q, dim, &layer.rope);
        let ([k, v], own) = match layer.keys {
            Keys::Shared(column) => {
                let start = self.hidden + self.own_width() + column;
                ([b.narrow(stream, start, narrow), b.narrow(stream, start + narrow, narrow)], None)
            }
            Keys::Own | Keys::Stored(_) => {
                let k = b.linear_if(self.bias, "self_attn.k_proj", h, narrow);
                let v = match self.k_eq_v && !layer.slides {
                    true => k,
                    false => b.linear_if(self.bias, "self_attn.v_proj", h, narrow),
                };
                let k = b.head_norm(self.norm, "self_attn.k_norm", k, dim);
                let k = b.rope(k, dim, &layer.rope);
                let v = b.head_norm(self.norm.plain(), "self_attn.v_norm", v, dim);
                ([k, v], Some([k, v]))
            }
        };
        let numbers = Attention::new(self.heads, layer.kv_heads, dim).scale(1.0);
        let mixed = b.attention(q, k, v, numbers.window(self.window.filter(|_| layer.slides)));
        (b.linear_if(self.bias, "self_attn.o_proj", mixed, self.hidden), own)
    }
}

fn experts(config: &Config) -> Result<(Experts, Router)> {
    let (count, top_k) = (config.size("num_experts")?, config.size("top_k_experts")?);
    let activation = config.activation("hidden_activation", "gelu_tanh")?;
    let mut router = Router::new(Scoring::Softmax, top_k);
    router.normalize = Some(0.0);
    router.expert_scale = Some("router.per_expert_scale".into());
    Ok((Experts::new("experts", count, top_k, config.size("moe_intermediate_size")?, &activation), router))
}
