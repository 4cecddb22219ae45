//! What layers have in place of attention: a gated delta net, a short convolution, Mamba 2.
//!
//! Each is a description that builds its ops. What it carries from token to token is forked at the prompt's end, for every answer.

use crate::Result;
use crate::builder::{BlockBuilder, GatedDelta, Norm, StateSpace, Var};
use crate::model::Config;

/// A layer's mixer of tokens. Modules are named without the layer's prefix.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Mixer {
    /// Qwen3-Next, Qwen3.5.
    GatedDelta(GatedDeltaNet),
    /// LFM2.
    ShortConv(ShortConv),
    /// Granite 4, Nemotron-H, Falcon-H1, Bamba.
    Mamba(Mamba2),
}

impl Mixer {
    /// From what attention would read to what it would give.
    pub fn build(&self, b: &mut BlockBuilder, h: Var) -> Var {
        match self {
            Mixer::GatedDelta(net) => net.build(b, h),
            Mixer::ShortConv(conv) => conv.build(b, h),
            Mixer::Mamba(mamba) => mamba.build(b, h),
        }
    }
}

/// A gated delta net (Yang et al. 2024, "Gated Delta Networks", figure 1): projections, a short convolution of queries, keys and values, the
/// rule, a norm of every head with a gate.
#[derive(Clone, Debug, PartialEq)]
pub struct GatedDeltaNet {
    /// Its module, `linear_attn`.
    pub module: String,
    /// Sizes.
    pub numbers: GatedDelta,
    /// Tokens that the convolution is over.
    pub taps: usize,
    /// The norm of every head, in `norm`.
    pub norm: Norm,
    /// Whether one projection gives queries, keys, values and gates, and one beta and alpha, key head by key head (Qwen3-Next); else
    /// queries, keys and values come from one, the others from one each.
    pub fused: bool,
}

impl GatedDeltaNet {
    /// `linear_attn` with the sizes of Qwen's configs: `linear_num_value_heads` and its kin.
    ///
    /// # Errors
    /// Keys that are missing; an activation of the convolution that is not SiLU.
    pub fn read(config: &Config) -> Result<GatedDeltaNet> {
        config.only("hidden_act", &["silu".into(), "swish".into()])?;
        let numbers = GatedDelta {
            heads: config.size("linear_num_value_heads")?,
            key_heads: config.size("linear_num_key_heads")?,
            key_dim: config.size("linear_key_head_dim")?,
            value_dim: config.size("linear_value_head_dim")?,
            eps: 1e-6,
        };
        let (module, taps) = ("linear_attn".into(), config.size("linear_conv_kernel_dim")?);
        let norm = Norm::rms(config.opt_float("rms_norm_eps")?.unwrap_or(1e-6));
        Ok(GatedDeltaNet { module, numbers, taps, norm, fused: false })
    }

    fn build(&self, b: &mut BlockBuilder, h: Var) -> Var {
        let GatedDelta { heads, key_heads, key_dim, value_dim, .. } = self.numbers;
        let named = |name: &str| format!("{}.{name}", self.module);
        let (keys, values) = (key_heads * key_dim, heads * value_dim);
        let (mixed, z, beta, alpha);
        if self.fused {
            let share = heads / key_heads.max(1);
            let all = b.linear(&named("in_proj_qkvz"), h, 2 * keys + 2 * values);
            let gates = b.linear(&named("in_proj_ba"), h, 2 * heads);
            let parts = b.split_heads(all, key_heads, [key_dim, key_dim, share * value_dim, share * value_dim]);
            [beta, alpha] = b.split_heads(gates, key_heads, [share, share]);
            let qk = b.cat(parts[0], parts[1]);
            (mixed, z) = (b.cat(qk, parts[2]), parts[3]);
        } else {
            mixed = b.linear(&named("in_proj_qkv"), h, 2 * keys + values);
            z = b.linear(&named("in_proj_z"), h, values);
            [beta, alpha] = ["in_proj_b", "in_proj_a"].map(|name| b.linear(&named(name), h, heads));
        }
        let mixed = b.causal_conv(&named("conv1d"), mixed, self.taps, false, Some("silu"));
        let [q, k, v] = b.split(mixed, [keys, keys, values]);
        let y = b.gated_delta(&self.module, [q, k, v, alpha, beta], self.numbers);
        let y = b.head_norm(self.norm, &named("norm"), y, value_dim);
        let y = b.glu("silu", z, y);
        b.linear(&named("out_proj"), y, h.width())
    }
}

/// A short convolution between two gates (Hasani et al. 2025, "LFM2 technical report", section 2): `out(C · conv(B · x))`.
#[derive(Clone, Debug, PartialEq)]
pub struct ShortConv {
    /// Its module, `conv`.
    pub module: String,
    /// Tokens that the convolution is over.
    pub taps: usize,
    /// Whether convolution and projections have biases.
    pub bias: bool,
}

impl ShortConv {
    fn build(&self, b: &mut BlockBuilder, h: Var) -> Var {
        let (width, named) = (h.width(), |name: &str| format!("{}.{name}", self.module));
        let all = b.linear_if(self.bias, &named("in_proj"), h, 3 * width);
        let [before, after, x] = b.split(all, [width; 3]);
        let x = b.glu("identity", before, x);
        let x = b.causal_conv(&named("conv"), x, self.taps, self.bias, None);
        let y = b.glu("identity", after, x);
        b.linear_if(self.bias, &named("out_proj"), y, width)
    }
}

/// Mamba 2 (Dao and Gu 2024, "Transformers are SSMs", section 7): one projection to gate, x, B, C and time steps, a short convolution of x, B
/// and C, the state space, a gate.
#[derive(Clone, Debug, PartialEq)]
pub struct Mamba2 {
    /// Its module, `mamba`.
    pub module: String,
    /// Sizes.
    pub numbers: StateSpace,
    /// Tokens that the convolution is over.
    pub taps: usize,
    /// Whether the convolution has a bias.
    pub conv_bias: bool,
    /// Whether the projections have, into it and out of it.
    pub bias: [bool; 2],
    /// The norm of groups of columns, in `norm`.
    pub norm: Option<Norm>,
    /// Whether the gate comes behind the norm.
    pub norm_before_gate: bool,
    /// Factors on gate, x, B, C and time steps.
    pub scales: [f64; 5],
    /// Whether the projection out of it is adapted only where it is named: PEFT refuses it in models whose fused kernel reads its
    /// weight by itself.
    pub out_is_parameter: bool,
}

impl Mamba2 {
    /// `mamba` with the sizes of most configs: `mamba_n_heads` and its kin, with a norm before which the gate comes. `inner` is the
    /// width of all heads.
    ///
    /// # Errors
    /// Keys that are missing; an activation of the convolution that is not SiLU; heads that do not make up `inner`.
    pub fn read(config: &Config, inner: usize) -> Result<Mamba2> {
        config.only("hidden_act", &["silu".into(), "swish".into()])?;
        // How much of the scan is computed at once.
        config.opt_size("mamba_chunk_size")?;
        let heads = config.size("mamba_n_heads")?;
        let head_dim = match config.get("mamba_d_head") {
            Some(auto) if auto == "auto" => inner / heads,
            _ => config.opt_size("mamba_d_head")?.unwrap_or(inner / heads),
        };
        if heads * head_dim != inner {
            return crate::bail!("config.json: mamba_n_heads {heads} of {head_dim} columns do not make up {inner}");
        }
        let numbers = StateSpace {
            heads,
            head_dim,
            groups: config.opt_size("mamba_n_groups")?.unwrap_or(1),
            state: config.opt_size("mamba_d_state")?.unwrap_or(256),
            dt_limit: Mamba2::time_step_limit(config)?,
        };
        Ok(Mamba2 {
            module: "mamba".into(),
            numbers,
            taps: config.opt_size("mamba_d_conv")?.unwrap_or(4),
            conv_bias: config.flag("mamba_conv_bias", true)?,
            bias: [config.flag("mamba_proj_bias", false)?; 2],
            norm: Some(Norm::rms(config.opt_float("rms_norm_eps")?.unwrap_or(1e-6))),
            norm_before_gate: false,
            scales: [1.0; 5],
            out_is_parameter: false,
        })
    }

    /// What `time_step_limit` clamps time steps to. JSON has no infinity: transformers writes it as a name or a text.
    ///
    /// # Errors
    /// A value that is no pair of numbers.
    fn time_step_limit(config: &Config) -> Result<Option<(f64, f64)>> {
        let Some(limit) = config.get("time_step_limit") else { return Ok(None) };
        let number = |value: &serde_json::Value| match value {
            serde_json::Value::Number(number) => number.as_f64(),
            other => match other.as_str().or_else(|| other.get("__float__")?.as_str()) {
                Some("Infinity" | "inf") => Some(f64::INFINITY),
                _ => None,
            },
        };
        match limit.as_array().map(|pair| pair.iter().map(number).collect::<Option<Vec<f64>>>()) {
            Some(Some(pair)) if pair.len() == 2 && pair[0] <= pair[1] => Ok(Some((pair[0], pair[1]))),
            _ => crate::bail!("config.json: time_step_limit is {limit}, should be two numbers"),
        }
    }

    /// From what it reads to what it gives.
    pub fn build(&self, b: &mut BlockBuilder, h: Var) -> Var {
        let StateSpace { heads, head_dim, groups, state, .. } = self.numbers;
        let named = |name: &str| format!("{}.{name}", self.module);
        let (wide, shared) = (heads * head_dim, groups * state);
        let all = b.linear_if(self.bias[0], &named("in_proj"), h, 2 * wide + 2 * shared + heads);
        let scaled = |b: &mut BlockBuilder, x: Var, factor: f64| if factor == 1.0 { x } else { b.scale(x, factor) };
        let [of_gate, of_x, of_b, of_c, of_dt] = self.scales;
        let (gate, mixed, dt);
        if of_x == of_b && of_b == of_c {
            [gate, mixed, dt] = b.split(all, [wide, wide + 2 * shared, heads]);
        } else {
            let [z, x, bs, cs, steps] = b.split(all, [wide, wide, shared, shared, heads]);
            let (bs, cs) = (scaled(b, bs, of_b / of_x), scaled(b, cs, of_c / of_x));
            let both = b.cat(bs, cs);
            (gate, mixed, dt) = (z, b.cat(x, both), steps);
        }
        let (gate, mixed, dt) = (scaled(b, gate, of_gate), scaled(b, mixed, of_x), scaled(b, dt, of_dt));
        let mixed = b.causal_conv(&named("conv1d"), mixed, self.taps, self.conv_bias, Some("silu"));
        let [x, bs, cs] = b.split(mixed, [wide, shared, shared]);
        let mut y = b.ssd(&self.module, [x, bs, cs, dt], self.numbers);
        let norm = |b: &mut BlockBuilder, y: Var| match self.norm {
            Some(norm) => b.grouped_norm(norm, &named("norm"), y, groups),
            None => y,
        };
        if self.norm_before_gate {
            y = norm(b, y);
        }
        y = b.glu("silu", gate, y);
        if !self.norm_before_gate {
            y = norm(b, y);
        }
        match self.out_is_parameter {
            true => b.linear_of_parameter(self.bias[1], &named("out_proj"), y, h.width()),
            false => b.linear_if(self.bias[1], &named("out_proj"), y, h.width()),
        }
    }
}
