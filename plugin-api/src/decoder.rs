//! The plain decoder: what most families are, and what they differ in.
//!
//! [`Decoder::read`] gives a Llama of the checkpoint's sizes. A family changes the fields that it has otherwise, and
//! [`Decoder::graph`] builds the graph. A family that does not fit writes its graph op by op with [`GraphBuilder`].

use crate::builder::{Attention, BlockBuilder, GraphBuilder, Norm, Var};
use crate::graph::ModelGraph;
use crate::mixer::Mixer;
use crate::mla::LatentAttention;
use crate::model::Config;
use crate::moe::Moe;
use crate::rope::Rope;
use crate::{Result, bail};
use serde_json::{Value, json};

/// A decoder of equal layers: grouped-query attention and an MLP around a residual stream. Modules of a layer are named as the
/// checkpoint names them, without the layer's prefix.
#[derive(Clone, Debug)]
pub struct Decoder {
    /// Before the names of everything but the output projection, such as `model.`.
    pub prefix: &'static str,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside of the MLP.
    pub ffn: usize,
    /// Rows of the embedding and of the output projection.
    pub vocab: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Columns of a head.
    pub head_dim: usize,
    /// Every layer.
    pub layers: Vec<DecoderLayer>,

    /// The norms of the residual stream.
    pub norm: Norm,
    /// Where a layer has them.
    pub norms: LayerNorms,
    /// The norms behind attention and MLP, where they are others.
    pub after_norm: Option<Norm>,
    /// The module of the norm before the output projection.
    pub final_norm: &'static str,
    /// That norm, where it is another.
    pub of_final_norm: Option<Norm>,
    /// The norm of queries and keys.
    pub qk_norm: Option<QkNorm>,

    /// The projections of attention and MLP.
    pub names: Modules,
    /// Whether the projections to queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Whether the one behind the attention has.
    pub o_bias: bool,
    /// Whether those of the MLP have.
    pub mlp_bias: bool,
    /// The activation, and whether a gate carries it; `xielu` has its numbers in `mlp.act_fn`.
    pub activation: String,
    /// Whether the MLP is `down(activation(gate(x)) · up(x))`, not `down(activation(up(x)))`.
    pub gated: bool,

    /// Whether the embedding is the output projection, too.
    pub tied: bool,
    /// Factor on the embedding.
    pub embedding_scale: f64,
    /// A norm without a weight behind the embedding.
    pub embedding_norm: Option<Norm>,
    /// Factor on what attention and MLP add to the residual stream.
    pub residual_scale: f64,
    /// Factor on the scores of the attention.
    pub attention_scale: f64,
    /// Queries, keys and values are clamped to plus and minus this.
    pub clamp_qkv: Option<f64>,
    /// A tensor with a logit for every head, which joins the sum of its softmax and has no value (gpt-oss).
    pub sinks: Option<&'static str>,
    /// Soft cap of the scores.
    pub attention_softcap: Option<f64>,
    /// The attention that gives the heads' values in place of the queries, keys and values above.
    pub latent: Option<LatentAttention>,
    /// Factor on the logits.
    pub logit_scale: f64,
    /// Soft cap of the logits, after the factor.
    pub logit_softcap: Option<f64>,
    /// Whether the output projection has a bias.
    pub head_bias: bool,
}

/// What layers of a decoder may differ in.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DecoderLayer {
    /// Sliding window of its attention.
    pub window: Option<usize>,
    /// Rotary embedding; `None` for a layer without positions.
    pub rope: Option<Rope>,
    /// A mixer in place of its attention.
    pub mixer: Option<Mixer>,
    /// Experts in place of its MLP.
    pub moe: Option<Moe>,
}

/// The norms of a layer by their places; a place without a name has none.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorms {
    /// Of what the attention reads.
    pub before_attention: Option<&'static str>,
    /// Of what the attention adds.
    pub after_attention: Option<&'static str>,
    /// Of what the MLP reads.
    pub before_mlp: Option<&'static str>,
    /// Of what the MLP adds.
    pub after_mlp: Option<&'static str>,
    /// Whether the MLP reads what the attention reads.
    pub parallel: bool,
}

impl LayerNorms {
    /// Before attention and MLP, as in Llama.
    pub const PRE: LayerNorms = LayerNorms {
        before_attention: Some("input_layernorm"),
        after_attention: None,
        before_mlp: Some("post_attention_layernorm"),
        after_mlp: None,
        parallel: false,
    };

    /// Behind attention and MLP, as in OLMo 2.
    pub const POST: LayerNorms = LayerNorms {
        before_attention: None,
        after_attention: Some("post_attention_layernorm"),
        before_mlp: None,
        after_mlp: Some("post_feedforward_layernorm"),
        parallel: false,
    };

    /// Before and behind both, as in Gemma 2.
    pub const SANDWICH: LayerNorms = LayerNorms {
        before_attention: Some("input_layernorm"),
        after_attention: Some("post_attention_layernorm"),
        before_mlp: Some("pre_feedforward_layernorm"),
        after_mlp: Some("post_feedforward_layernorm"),
        parallel: false,
    };

    /// One norm for attention and MLP, which are added together, as in Cohere's models.
    pub const PARALLEL: LayerNorms = LayerNorms {
        before_attention: Some("input_layernorm"),
        after_attention: None,
        before_mlp: None,
        after_mlp: None,
        parallel: true,
    };
}

/// A norm of queries and keys.
#[derive(Clone, Copy, Debug)]
pub struct QkNorm {
    /// Which norm.
    pub norm: Norm,
    /// The module of the queries' norm.
    pub q: &'static str,
    /// The module of the keys' norm.
    pub k: &'static str,
    /// What it is taken over.
    pub over: QkNormOver,
    /// Whether it comes after the rotary embedding.
    pub after_rope: bool,
}

/// What a norm of queries and keys is taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNormOver {
    /// Every head, with one weight for all.
    Head,
    /// Every head, with a weight `[heads, head_dim]`.
    EachHead,
    /// Every head, with a module for each: `norms.0`, `norms.1`.
    ModulePerHead,
    /// All heads together.
    Row,
}

impl QkNorm {
    /// Over every head, before the rotary embedding, as `self_attn.q_norm` and `self_attn.k_norm`.
    pub fn heads(norm: Norm) -> QkNorm {
        let (q, k) = ("self_attn.q_norm", "self_attn.k_norm");
        QkNorm { norm, q, k, over: QkNormOver::Head, after_rope: false }
    }
}

/// Names of a layer's projections.
#[derive(Clone, Copy, Debug)]
pub struct Modules {
    /// Queries, keys, values.
    pub qkv: [&'static str; 3],
    /// One projection to queries, keys and values, side by side, in their place.
    pub fused_qkv: Option<&'static str>,
    /// A projection whose sigmoid is a factor on what the attention gives.
    pub output_gate: Option<&'static str>,
    /// Whether that is one for each head, not for each column.
    pub head_gate: bool,
    /// Whether the projection to queries gives such a factor, too, of every head behind its queries.
    pub gated_queries: bool,
    /// Behind the attention.
    pub o: &'static str,
    /// The gate of a gated MLP.
    pub gate: &'static str,
    /// Into the MLP.
    pub up: &'static str,
    /// One projection to gate and up, side by side, in their place.
    pub fused_gate_up: Option<&'static str>,
    /// Out of the MLP.
    pub down: &'static str,
}

impl Decoder {
    /// A Llama with a config's sizes, epsilon, activation, rotary embedding and tied or untied head; what the config leaves out is
    /// as transformers has it for a Llama. Other defaults are given with [`Config::with_defaults`]. Biases, windows and all the rest
    /// are for the family to read.
    pub fn read(config: &Config) -> Result<Decoder> {
        let mut decoder = Decoder::without_rope(config)?;
        let rope = Rope::from_config(config, decoder.head_dim, 10_000.0)?;
        decoder.rope(&rope);
        Ok(decoder)
    }

    /// [`read`](Self::read), with layers without positions.
    pub fn without_rope(config: &Config) -> Result<Decoder> {
        let (hidden, heads) = (config.size("hidden_size")?, config.size("num_attention_heads")?);
        let head_dim = config.opt_size("head_dim")?.unwrap_or(hidden / heads);
        Ok(Decoder {
            prefix: "model.",
            hidden,
            ffn: config.size("intermediate_size")?,
            vocab: config.size("vocab_size")?,
            heads,
            kv_heads: config.opt_size("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            layers: vec![DecoderLayer::default(); config.layers()?],
            norm: Norm::rms(config.opt_float("rms_norm_eps")?.unwrap_or(1e-6)),
            norms: LayerNorms::PRE,
            after_norm: None,
            final_norm: "norm",
            of_final_norm: None,
            qk_norm: None,
            names: Modules {
                qkv: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                fused_qkv: None,
                output_gate: None,
                head_gate: false,
                gated_queries: false,
                o: "self_attn.o_proj",
                gate: "mlp.gate_proj",
                up: "mlp.up_proj",
                fused_gate_up: None,
                down: "mlp.down_proj",
            },
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            activation: config.activation("hidden_act", "silu")?,
            gated: true,
            tied: config.flag("tie_word_embeddings", false)?,
            embedding_scale: 1.0,
            embedding_norm: None,
            residual_scale: 1.0,
            attention_scale: (head_dim as f64).powf(-0.5),
            clamp_qkv: None,
            sinks: None,
            attention_softcap: None,
            latent: None,
            logit_scale: 1.0,
            logit_softcap: None,
            head_bias: false,
        })
    }

    /// Biases of all four projections of the attention, as one key says.
    pub fn attention_bias(&mut self, bias: bool) {
        (self.qkv_bias, self.o_bias) = (bias, bias);
    }

    /// The window of every layer.
    pub fn windows(&mut self, windows: Vec<Option<usize>>) {
        self.layers.iter_mut().zip(windows).for_each(|(layer, window)| layer.window = window);
    }

    /// One window for the layers that slide.
    pub fn slide(&mut self, window: Option<usize>, sliding: &[bool]) {
        self.windows(sliding.iter().map(|slides| window.filter(|_| *slides)).collect());
    }

    /// Turns columns `2j` and `2j + 1` of heads together in all layers.
    pub fn interleave_rope(&mut self) {
        self.layers.iter_mut().filter_map(|l| l.rope.as_mut()).for_each(|rope| rope.interleaved = true);
    }

    /// One rotary embedding for all layers.
    pub fn rope(&mut self, rope: &Rope) {
        self.layers.iter_mut().for_each(|layer| layer.rope = Some(rope.clone()));
    }

    /// A rotary embedding for layers that slide, and one for the others.
    pub fn ropes(&mut self, sliding: &[bool], of_sliding: &Rope, of_others: &Rope) {
        for (layer, slides) in self.layers.iter_mut().zip(sliding) {
            layer.rope = Some(if *slides { of_sliding.clone() } else { of_others.clone() });
        }
    }

    /// A plain rotary embedding with a base of its own for every layer, or none where that is 0, if `layer_rope_theta` lists them.
    ///
    /// # Errors
    /// A list of another length.
    pub fn layer_ropes(&mut self, config: &Config) -> Result<()> {
        let Some(list) = config.get("layer_rope_theta") else { return Ok(()) };
        let bases: Option<Vec<f64>> = list.as_array().and_then(|list| list.iter().map(Value::as_f64).collect());
        let Some(bases) = bases.filter(|bases| bases.len() == self.layers.len()) else {
            return bail!("config.json: layer_rope_theta is no list of {} numbers", self.layers.len());
        };
        if let Some(rule) = config.opt_object("rope_parameters")? {
            rule.only("rope_type", &[json!("default")])?;
        }
        for (layer, base) in self.layers.iter_mut().zip(bases) {
            layer.rope = (base != 0.0).then(|| Rope::plain(self.head_dim, base));
        }
        Ok(())
    }

    /// Multi-head latent attention in all layers, with a config's sizes and rotary embedding; `rope_interleave` is on where it is left
    /// out.
    ///
    /// # Errors
    /// A config without these sizes.
    pub fn latent_attention(&mut self, config: &Config) -> Result<()> {
        let latent = LatentAttention::read(config)?;
        let interleaved = config.flag("rope_interleave", true)?;
        self.rope(&Rope { interleaved, ..Rope::from_config(config, latent.rope_dim, 10_000.0)? });
        (self.o_bias, self.latent) = (latent.bias, Some(latent));
        Ok(())
    }

    /// Experts in the layers that have them.
    pub fn experts(&mut self, moe: &Moe, in_layer: impl Fn(usize) -> bool) {
        let layers = self.layers.iter_mut().enumerate().filter(|(at, _)| in_layer(*at));
        layers.for_each(|(_, layer)| layer.moe = Some(moe.clone()));
    }

    /// The graph. `config` is the whole file, whose unread keys go with it.
    pub fn graph(&self, config: &Config) -> Result<ModelGraph> {
        self.build()?.finish(config)
    }

    /// The graph before it is finished, for a family that has more to say of its files.
    pub fn build(&self) -> Result<GraphBuilder> {
        let name = |layer: &DecoderLayer| {
            let mut name = String::from("decoder");
            name.extend(layer.window.map(|w| format!(", window {w}")));
            name += match &layer.mixer {
                Some(Mixer::GatedDelta(_)) => ", gated delta net",
                Some(Mixer::ShortConv(_)) => ", short convolution",
                Some(Mixer::Mamba(_)) => ", Mamba 2",
                None if layer.rope.is_none() => ", no rope",
                None => "",
            };
            name.extend(layer.moe.is_some().then_some(", experts"));
            name
        };
        let mut graph = self.build_of(&self.layers, name, |b, x, layer| self.layer(b, x, layer))?;
        for layer in &self.layers {
            layer.rope.iter().for_each(|rope| graph.rope_limit(rope));
            layer.moe.iter().for_each(|moe| moe.assemble(&mut graph));
        }
        Ok(graph)
    }

    /// Embedding, final norm and output projection around layers that a family builds: what each is, what a kind of layer is called, and
    /// from a layer's input to its output.
    ///
    /// # Errors
    /// Heads that cannot share key heads.
    pub fn build_of<K: PartialEq>(
        &self,
        layers: &[K],
        name: impl Fn(&K) -> String,
        body: impl Fn(&mut BlockBuilder, Var, &K) -> Var,
    ) -> Result<GraphBuilder> {
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            return bail!("config.json: {} attention heads cannot share {} key heads", self.heads, self.kv_heads);
        }
        let table = format!("{}embed_tokens.weight", self.prefix);
        let mut graph = GraphBuilder::decoder(self.hidden, self.vocab);
        graph.embed(|b, tokens| {
            let x = b.embedding(&table, tokens, self.vocab, self.hidden);
            let x = scaled(b, x, self.embedding_scale);
            self.embedding_norm.map_or(x, |norm| b.norm(norm.plain(), "embed_norm", x))
        });
        let mut kinds: Vec<&K> = Vec::new();
        for (at, layer) in layers.iter().enumerate() {
            let kind = kinds.iter().position(|k| *k == layer).unwrap_or_else(|| {
                kinds.push(layer);
                kinds.len() - 1
            });
            let known = kinds[..kind].iter().filter(|k| name(k) == name(layer)).count();
            let more = if known > 0 { format!(", other {known}") } else { String::new() };
            let block = graph.block_once(&(name(layer) + &more), |b, x| body(b, x, layer));
            graph.layer(block, format!("{}layers.{at}.", self.prefix));
        }
        let head = if self.tied { table.as_str() } else { "lm_head.weight" };
        graph.head(|b, x| {
            let norm = self.of_final_norm.unwrap_or(self.norm);
            let h = b.norm(norm, &format!("{}{}", self.prefix, self.final_norm), x);
            let h = scaled(b, h, self.logit_scale);
            b.lm_head_with(head, h, self.vocab, self.head_bias.then_some("lm_head.bias"), self.logit_softcap)
        });
        // A tied checkpoint may carry the projection all the same; old conversions saved the frequencies beside the weights.
        graph.unused_tensor("lm_head.weight");
        graph.unused_tensor("*.rotary_emb.inv_freq");
        Ok(graph)
    }

    fn layer(&self, b: &mut BlockBuilder, x: Var, layer: &DecoderLayer) -> Var {
        let (before, after) = (self.norm, self.after_norm.unwrap_or(self.norm));
        let h = norm_at(b, before, self.norms.before_attention, x);
        let attention = match &layer.mixer {
            Some(mixer) => mixer.build(b, h),
            None => self.attention(b, h, layer),
        };
        let attention = norm_at(b, after, self.norms.after_attention, attention);
        let attention = scaled(b, attention, self.residual_scale);
        if self.norms.parallel {
            let mlp = self.mlp_of(b, h, layer);
            let mlp = scaled(b, mlp, self.residual_scale);
            let both = b.add(attention, mlp);
            return b.add(x, both);
        }
        let x = b.add(x, attention);
        let h = norm_at(b, before, self.norms.before_mlp, x);
        let mlp = self.mlp_of(b, h, layer);
        let mlp = norm_at(b, after, self.norms.after_mlp, mlp);
        let mlp = scaled(b, mlp, self.residual_scale);
        b.add(x, mlp)
    }

    /// From what the attention reads to what its last projection gives.
    pub fn attention(&self, b: &mut BlockBuilder, h: Var, layer: &DecoderLayer) -> Var {
        if let Some(latent) = &self.latent {
            let mixed = latent.build(b, h, layer.rope.as_ref());
            return b.linear_if(self.o_bias, self.names.o, mixed, self.hidden);
        }
        let [wide, narrow] = [self.heads, self.kv_heads].map(|heads| heads * self.head_dim);
        let mut gate_of_queries = None;
        let parts = match self.names.fused_qkv {
            Some(module) => {
                let all = b.linear_if(self.qkv_bias, module, h, wide + 2 * narrow);
                b.split(all, [wide, narrow, narrow])
            }
            None => {
                let [q, k, v] = self.names.qkv;
                let wide = if self.names.gated_queries { 2 * wide } else { wide };
                let mut parts = [(q, wide), (k, narrow), (v, narrow)]
                    .map(|(module, out)| b.linear_if(self.qkv_bias, module, h, out));
                if self.names.gated_queries {
                    let [queries, gate] = b.split_heads(parts[0], self.heads, [self.head_dim; 2]);
                    (parts[0], gate_of_queries) = (queries, Some(gate));
                }
                parts
            }
        };
        let [mut q, mut k, v] = match self.clamp_qkv {
            Some(limit) => parts.map(|part| b.clamp(part, limit)),
            None => parts,
        };
        let early = self.qk_norm.filter(|n| !n.after_rope);
        let late = self.qk_norm.filter(|n| n.after_rope);
        if let Some(norm) = early {
            (q, k) = (self.of_heads(b, &norm, norm.q, q), self.of_heads(b, &norm, norm.k, k));
        }
        if let Some(rope) = &layer.rope {
            // Only queries are made longer by their position.
            let of_keys = Rope { position_factor: None, ..rope.clone() };
            (q, k) = (b.rope(q, self.head_dim, rope), b.rope(k, self.head_dim, &of_keys));
        }
        if let Some(norm) = late {
            (q, k) = (self.of_heads(b, &norm, norm.q, q), self.of_heads(b, &norm, norm.k, k));
        }
        let numbers = Attention::new(self.heads, self.kv_heads, self.head_dim).scale(self.attention_scale);
        let numbers = numbers.window(layer.window).softcap(self.attention_softcap);
        let mut mixed = b.attention_with(q, k, v, numbers, self.sinks);
        let gate_of_output = self.names.output_gate.map(|gate| {
            let columns = if self.names.head_gate { self.heads } else { wide };
            b.linear(gate, h, columns)
        });
        for gate in gate_of_queries.into_iter().chain(gate_of_output) {
            mixed = b.glu("sigmoid", gate, mixed);
        }
        b.linear_if(self.o_bias, self.names.o, mixed, self.hidden)
    }

    fn of_heads(&self, b: &mut BlockBuilder, qk: &QkNorm, module: &str, x: Var) -> Var {
        match qk.over {
            QkNormOver::Head => b.head_norm(qk.norm, module, x, self.head_dim),
            QkNormOver::EachHead => b.norm_of_each_head(qk.norm, module, x, self.head_dim),
            QkNormOver::Row => b.norm(qk.norm, module, x),
            QkNormOver::ModulePerHead => {
                let heads = if module == qk.q { self.heads } else { self.kv_heads };
                let mut head = |i: usize| {
                    let part = b.narrow(x, i * self.head_dim, self.head_dim);
                    b.norm(qk.norm, &format!("{module}.norms.{i}"), part)
                };
                let parts: Vec<Var> = (0..heads).map(&mut head).collect();
                parts.into_iter().reduce(|all, part| b.cat(all, part)).unwrap_or(x)
            }
        }
    }

    /// The MLP of a layer, or its experts.
    fn mlp_of(&self, b: &mut BlockBuilder, h: Var, layer: &DecoderLayer) -> Var {
        let Some(moe) = &layer.moe else { return self.mlp(b, h) };
        let experts = moe.build(b, h);
        if !moe.beside_mlp {
            return experts;
        }
        let mlp = self.mlp(b, h);
        b.add(experts, mlp)
    }

    /// From what the MLP reads to what its last projection gives.
    pub fn mlp(&self, b: &mut BlockBuilder, h: Var) -> Var {
        let names = &self.names;
        let inner = match (self.gated, names.fused_gate_up) {
            (true, Some(module)) => {
                let both = b.linear_if(self.mlp_bias, module, h, 2 * self.ffn);
                let [gate, up] = b.split(both, [self.ffn; 2]);
                b.glu(&self.activation, gate, up)
            }
            (true, None) => {
                let [gate, up] = [names.gate, names.up].map(|m| b.linear_if(self.mlp_bias, m, h, self.ffn));
                b.glu(&self.activation, gate, up)
            }
            (false, _) => {
                let up = b.linear_if(self.mlp_bias, names.up, h, self.ffn);
                match self.activation.as_str() {
                    "xielu" => b.xielu("mlp.act_fn", up, [&[1], &[1], &[], &[]]),
                    activation => b.activation(activation, up),
                }
            }
        };
        b.linear_if(self.mlp_bias, names.down, inner, self.hidden)
    }
}

fn norm_at(b: &mut BlockBuilder, norm: Norm, module: Option<&str>, x: Var) -> Var {
    module.map_or(x, |module| b.norm(norm, module, x))
}

fn scaled(b: &mut BlockBuilder, x: Var, factor: f64) -> Var {
    if factor == 1.0 { x } else { b.scale(x, factor) }
}
