//! Builder methods of the ops that carry a state from token to token.

use serde_json::json;

use super::{BlockBuilder, Norm, Var, tensor};

/// Numbers of a gated delta net.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GatedDelta {
    /// Value heads, each with a state of its own.
    pub heads: usize,
    /// Heads of queries and keys; divides `heads`.
    pub key_heads: usize,
    /// Columns of a query or a key.
    pub key_dim: usize,
    /// Columns of a value.
    pub value_dim: usize,
    /// Added to the sums of squares that queries and keys are divided by.
    pub eps: f64,
}

/// Numbers of a state space of Mamba 2.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StateSpace {
    /// Heads, each with a state of its own.
    pub heads: usize,
    /// Columns of a head.
    pub head_dim: usize,
    /// Groups of heads that share B and C; divides `heads`.
    pub groups: usize,
    /// Columns of B and C of a group.
    pub state: usize,
    /// What time steps are clamped to.
    pub dt_limit: Option<(f64, f64)>,
}

impl BlockBuilder {
    /// Of every column a causal convolution over `taps` tokens, with `module.weight` `[columns, 1, taps]` and maybe `module.bias`, then
    /// maybe `silu`. Every answer goes on from the prompt.
    pub fn causal_conv(&mut self, module: &str, x: Var, taps: usize, bias: bool, activation: Option<&str>) -> Var {
        let mut weights = vec![tensor("weight", &format!("{module}.weight"), &[x.width, 1, taps])];
        weights.extend(bias.then(|| tensor("bias", &format!("{module}.bias"), &[x.width])));
        let attrs: Vec<_> = activation.map(|name| ("activation", json!(name))).into_iter().collect();
        self.op("causal_conv", &[x], weights, &attrs, x.width)
    }

    /// The gated delta rule (Yang et al. 2024, "Gated Delta Networks", eq. 10) over `[q, k, v, a, b]`, with `module.A_log` and
    /// `module.dt_bias`, `[heads]` each. Every answer goes on from the prompt's last state.
    pub fn gated_delta(&mut self, module: &str, inputs: [Var; 5], n: GatedDelta) -> Var {
        let (keys, values) = (n.key_heads * n.key_dim, n.heads * n.value_dim);
        for (x, needs) in inputs.iter().zip([keys, keys, values, n.heads, n.heads]) {
            if x.width != needs {
                self.fail(format!("gated_delta: an input of {} columns, {n:?} needs {needs}", x.width));
            }
        }
        let weights = ["A_log", "dt_bias"].map(|role| tensor(role, &within(module, role), &[n.heads]));
        let attrs = [
            ("heads", json!(n.heads)),
            ("key_heads", json!(n.key_heads)),
            ("key_dim", json!(n.key_dim)),
            ("value_dim", json!(n.value_dim)),
            ("eps", json!(n.eps)),
        ];
        self.op("gated_delta", &inputs, weights.to_vec(), &attrs, values)
    }

    /// The state space of Mamba 2 (Dao and Gu 2024, "Transformers are SSMs", section 2) over `[x, B, C, dt]`, with `module.A_log`,
    /// `module.D` and `module.dt_bias`, `[heads]` each. Every answer goes on from the prompt's last state.
    pub fn ssd(&mut self, module: &str, inputs: [Var; 4], n: StateSpace) -> Var {
        let (wide, keys) = (n.heads * n.head_dim, n.groups * n.state);
        for (x, needs) in inputs.iter().zip([wide, keys, keys, n.heads]) {
            if x.width != needs {
                self.fail(format!("ssd: an input of {} columns, {n:?} needs {needs}", x.width));
            }
        }
        let weights = ["A_log", "D", "dt_bias"].map(|role| tensor(role, &within(module, role), &[n.heads]));
        let mut attrs = vec![
            ("heads", json!(n.heads)),
            ("head_dim", json!(n.head_dim)),
            ("groups", json!(n.groups)),
            ("state", json!(n.state)),
        ];
        if let Some((least, most)) = n.dt_limit {
            attrs.extend((least > 0.0).then(|| ("dt_min", json!(least))));
            attrs.extend(most.is_finite().then(|| ("dt_max", json!(most))));
        }
        self.op("ssd", &inputs, weights.to_vec(), &attrs, wide)
    }

    /// A norm over each of `groups` runs of columns, with a weight `[columns]` of the whole row: Mamba 2's grouped norm.
    pub fn grouped_norm(&mut self, norm: Norm, module: &str, x: Var, groups: usize) -> Var {
        self.norm_of_runs(norm, module, x, x.width / groups.max(1), &[x.width])
    }
}

fn within(module: &str, name: &str) -> String {
    if module.is_empty() { name.into() } else { format!("{module}.{name}") }
}
