//! The state space of Mamba 2: `S_t = e^{g_t} S_{t-1} + d_t B_t x_tᵀ`, `y_t = S_tᵀ C_t + D x_t` of every head, with `d = softplus(dt + dt_bias)`, clamped,
//! and `g = -exp(A_log) · d` (Dao and Gu 2024, "Transformers are SSMs", section 2 and listing 1): [linear attention](super::linear_attention) with queries C,
//! keys B and values `d x`. Groups of heads share B and C.

use std::ops::Range;

use super::gated_delta::softplus;
use super::linear_attention::{Chunk, ChunkGradients, dot};
use super::real::Real;
use super::recurrence::{Gradients, Heads, Rule, Scan, forward, of_heads, vjp};
use super::{Call, Kernel, Op, count, number};
use crate::error::Result;

pub(super) const OP: Op =
    Op { name: "ssd", cached_inputs: &[], kernel: Kernel::Recurrence { forward: forward::<Ssd>, vjp: vjp::<Ssd> } };

/// A head's recurrence.
struct Head<'a, T> {
    heads: Heads,
    head: usize,
    /// x, B, C, dt as they lie.
    inputs: &'a [&'a [T]],
    /// The gradient of the value, where that is known.
    dy: &'a [T],
    /// `-exp(A_log)`, `dt_bias` and D.
    rate: f64,
    bias: f64,
    skip: T,
    /// What time steps are clamped to.
    limit: [f64; 2],
    chunk: Chunk<T>,
    /// `d` of every row.
    steps: Vec<f64>,
    gradients: ChunkGradients<T>,
}

impl<'a, T: Real> Head<'a, T> {
    fn x(&self, of: &'a [T], row: usize) -> &'a [T] {
        let width = self.heads.value_dim;
        &of[(row * self.heads.heads + self.head) * width..][..width]
    }

    /// B or C of a row.
    fn shared(&self, input: usize, row: usize) -> &'a [T] {
        let (group, width) = (self.heads.key_head(self.head), self.heads.key_dim);
        &self.inputs[input][(row * self.heads.key_heads + group) * width..][..width]
    }

    /// `dt + dt_bias`.
    fn before_softplus(&self, row: usize) -> f64 {
        self.inputs[3][row * self.heads.heads + self.head].to_f64() + self.bias
    }

    fn prepare(&mut self, rows: Range<usize>) {
        let step = |row| softplus(self.before_softplus(row)).max(self.limit[0]).min(self.limit[1]);
        let steps: Vec<f64> = rows.clone().map(step).collect();
        let rate = self.rate;
        self.chunk.decays(steps.iter().map(|step| rate * step));
        self.chunk.q = rows.clone().flat_map(|row| self.shared(2, row)).copied().collect();
        self.chunk.k = rows.clone().flat_map(|row| self.shared(1, row)).copied().collect();
        self.chunk.u.clear();
        for (row, step) in rows.zip(&steps) {
            let (x, step) = (self.x(self.inputs[0], row), T::from_f64(*step));
            self.chunk.u.extend(x.iter().map(|x| *x * step));
        }
        self.steps = steps;
    }
}

impl<T: Real> Scan<T> for Head<'_, T> {
    fn forward(&mut self, rows: Range<usize>, state: &mut [T], mut value: Option<&mut [T]>) {
        self.prepare(rows.clone());
        self.chunk.forward(state, value.as_deref_mut());
        if let Some(y) = value {
            for (row, y) in rows.zip(y.chunks_exact_mut(self.heads.value_dim)) {
                y.iter_mut().zip(self.x(self.inputs[0], row)).for_each(|(y, x)| *y += self.skip * *x);
            }
        }
    }

    fn backward(&mut self, rows: Range<usize>, state: &[T], dstate: &mut [T], to: &mut Gradients<T>) {
        let Heads { key_dim, value_dim, .. } = self.heads;
        self.prepare(rows.clone());
        let dy: Vec<T> = rows.clone().flat_map(|row| self.x(self.dy, row)).copied().collect();
        self.chunk.backward(state, dstate, &dy, &mut self.gradients);
        let dlog = self.gradients.of_log_decays();
        let first = rows.start - to.start;
        let of_group = [&self.gradients.k, &self.gradients.q];
        for (shared, own) in to.inputs[1..].iter_mut().zip(of_group) {
            shared[first * key_dim..].iter_mut().zip(own).for_each(|(to, own)| *to += *own);
        }
        let rows = rows.zip(self.gradients.u.chunks_exact(value_dim)).zip(dy.chunks_exact(value_dim)).enumerate();
        for (at, ((row, du), dy)) in rows {
            let (x, step) = (self.x(self.inputs[0], row), T::from_f64(self.steps[at]));
            let dx = to.inputs[0][(first + at) * value_dim..].iter_mut();
            dx.zip(du.iter().zip(dy)).for_each(|(dx, (du, dy))| *dx = *du * step + *dy * self.skip);
            // A step that is clamped has no gradient.
            let free = self.before_softplus(row);
            let clamped = softplus(free) != self.steps[at];
            let dstep = dot(du, x) + dlog[at] * self.rate;
            to.inputs[3][first + at] =
                if clamped { T::zero() } else { T::from_f64(dstep) * T::from_f64(free).sigmoid() };
        }
    }
}

/// Numbers and weights of the op.
struct Ssd {
    heads: Heads,
    limit: [f64; 2],
    /// `-exp(A_log)`, `dt_bias` and D of every head.
    rate: Vec<f64>,
    bias: Vec<f64>,
    skip: Vec<f64>,
}

impl Rule for Ssd {
    const SHARED: [usize; 2] = [1, 2];
    type Head<'a, T: Real> = Head<'a, T>;

    fn of(call: &Call<'_>) -> Result<Ssd> {
        let [heads, value_dim, key_heads, key_dim] =
            ["heads", "head_dim", "groups", "state"].map(|name| count(call.node, name));
        let bounded = call.node.attrs.contains_key("dt_max");
        let most = if bounded { number(call.node, "dt_max") } else { f64::INFINITY };
        let rate = of_heads(call, "A_log")?.into_iter().map(|log| -log.exp()).collect();
        Ok(Ssd {
            heads: Heads { heads, key_heads, key_dim, value_dim },
            limit: [number(call.node, "dt_min"), most],
            rate,
            bias: of_heads(call, "dt_bias")?,
            skip: of_heads(call, "D")?,
        })
    }

    fn heads(&self) -> Heads {
        self.heads
    }

    fn head<'a, T: Real>(&self, head: usize, inputs: &'a [&'a [T]], dy: &'a [T]) -> Head<'a, T> {
        Head {
            heads: self.heads,
            head,
            inputs,
            dy,
            rate: self.rate[head],
            bias: self.bias[head],
            skip: T::from_f64(self.skip[head]),
            limit: self.limit,
            chunk: Chunk::new(self.heads.key_dim, self.heads.value_dim),
            steps: Vec::new(),
            gradients: ChunkGradients::default(),
        }
    }
}
