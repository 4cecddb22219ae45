//! The gated delta rule: `S_t = e^{g_t} S_{t-1} + k_t u_tᵀ` with `u_t = beta_t (v_t - e^{g_t} S_{t-1}ᵀ k_t)`, `o_t = S_tᵀ q_t` (Yang et al. 2024,
//! "Gated Delta Networks", eq. 10), with `beta = sigmoid(b)`, `g = -exp(A_log) · softplus(a + dt_bias)`; queries and keys are divided by
//! their lengths, queries by `sqrt(key_dim)`, too.
//!
//! Over a chunk this is [linear attention](super::linear_attention) of what is written, which the state before and the rows before
//! decide: with `A_ij = beta_i (k_i·k_j) e^{G_i - G_j}` for `j < i`, `(I + A) U = beta (V - e^G K S)` (section 3.3).

use std::ops::Range;

use super::linear_attention::{Chunk, ChunkGradients, dense, dot, product, scale_rows};
use super::product::multiply;
use super::real::Real;
use super::recurrence::{Gradients, Heads, Rule, Scan, forward, of_heads, vjp};
use super::rows::widest;
use super::{Call, Kernel, Op, count, number};
use crate::error::Result;

pub(super) const OP: Op = Op {
    name: "gated_delta",
    cached_inputs: &[],
    kernel: Kernel::Recurrence { forward: forward::<GatedDelta>, vjp: vjp::<GatedDelta> },
};

/// A head's recurrence.
struct Head<'a, T> {
    heads: Heads,
    head: usize,
    /// q, k, v, a, b as they lie.
    inputs: &'a [&'a [T]],
    /// The gradient of the value, where that is known.
    dy: &'a [T],
    /// `-exp(A_log)` and `dt_bias`.
    rate: f64,
    bias: f64,
    eps: f64,
    chunk: Chunk<T>,
    /// Lengths of queries and keys as what they are multiplied by, of every row.
    inverse: [Vec<T>; 2],
    beta: Vec<T>,
    /// `k_i·k_j`, and A.
    products: Vec<T>,
    matrix: Vec<T>,
    /// `e^G K S`, and what is written before the others' part is taken off: `V` less that.
    read: Vec<T>,
    rest: Vec<T>,
    gradients: ChunkGradients<T>,
}

/// `ln(1 + eˣ)`, as PyTorch has it: x above 20.
pub(super) fn softplus(x: f64) -> f64 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

impl<'a, T: Real> Head<'a, T> {
    /// A row's columns of the head in an input.
    fn row(&self, input: usize, row: usize) -> &'a [T] {
        let Heads { heads, key_heads, key_dim, value_dim } = self.heads;
        let (of, count, width) = match input {
            0 | 1 => (self.heads.key_head(self.head), key_heads, key_dim),
            2 => (self.head, heads, value_dim),
            _ => (self.head, heads, 1),
        };
        &self.inputs[input][row * count * width + of * width..][..width]
    }

    /// The chunk's inputs, and what is written, from the state before.
    fn prepare(&mut self, rows: Range<usize>, state: &[T]) {
        let Heads { key_dim, value_dim, .. } = self.heads;
        let n = rows.len();
        let log = |row| self.rate * softplus(self.row(3, row)[0].to_f64() + self.bias);
        let log: Vec<f64> = rows.clone().map(log).collect();
        self.chunk.decays(log.into_iter());
        self.beta = rows.clone().map(|row| self.row(4, row)[0].sigmoid()).collect();
        let scale = (key_dim as f64).powf(-0.5);
        for (at, scale) in [scale, 1.0].into_iter().enumerate() {
            let mut units = Vec::with_capacity(n * key_dim);
            self.inverse[at].clear();
            for row in rows.clone() {
                let x = self.row(at, row);
                let inverse = T::from_f64(scale / (T::sum_of_squares(x) + self.eps).sqrt());
                units.extend(x.iter().map(|x| *x * inverse));
                self.inverse[at].push(inverse);
            }
            if at == 0 { self.chunk.q = units } else { self.chunk.k = units }
        }
        let chunk = &mut self.chunk;
        let k = dense(&chunk.k, key_dim);
        product(&mut self.products, [n, n, key_dim], k, k.transposed(), false);
        product(&mut self.read, [n, value_dim, key_dim], k, dense(state, value_dim), false);
        scale_rows(&mut self.read, value_dim, &chunk.from_start);
        self.matrix.clear();
        self.matrix.extend(self.products.iter().zip(&chunk.decay).map(|(kk, decay)| *kk * *decay));
        scale_rows(&mut self.matrix, n, &self.beta);
        self.rest.clear();
        rows.for_each(|row| {
            let (v, read) = (&self.inputs[2][(row * self.heads.heads + self.head) * value_dim..], &self.read);
            let at = self.rest.len();
            self.rest.extend(v[..value_dim].iter().zip(&read[at..]).map(|(v, read)| *v - *read));
        });
        chunk.u.clear();
        chunk.u.extend_from_slice(&self.rest);
        scale_rows(&mut chunk.u, value_dim, &self.beta);
        let (u, matrix) = (&mut chunk.u, &self.matrix);
        widest(|| {
            for i in 1..n {
                let (before, own) = u.split_at_mut(i * value_dim);
                for (u, a) in before.chunks_exact(value_dim).zip(&matrix[i * n..]) {
                    own[..value_dim].iter_mut().zip(u).for_each(|(own, u)| *own -= *a * *u);
                }
            }
        });
    }
}

impl<T: Real> Scan<T> for Head<'_, T> {
    fn forward(&mut self, rows: Range<usize>, state: &mut [T], value: Option<&mut [T]>) {
        self.prepare(rows, state);
        self.chunk.forward(state, value);
    }

    /// With `X = (I + A)⁻ᵀ dU` and `R = V - e^G K S`: `dV = beta X`, `dbeta = X·R + Σ_j dA_ij (k_i·k_j) D_ij`, `dA_ij = -X_i·U_j` for `j < i`, and
    /// what reads the state, `-beta X`, goes to `K`, `S` and `G` as the values of linear attention do to theirs.
    fn backward(&mut self, rows: Range<usize>, state: &[T], dstate: &mut [T], to: &mut Gradients<T>) {
        let Heads { heads, key_dim, value_dim, .. } = self.heads;
        let n = rows.len();
        self.prepare(rows.clone(), state);
        let dy: Vec<T> = rows
            .clone()
            .flat_map(|row| &self.dy[(row * heads + self.head) * value_dim..][..value_dim])
            .copied()
            .collect();
        let (chunk, gradients) = (&mut self.chunk, &mut self.gradients);
        chunk.backward(state, dstate, &dy, gradients);
        // X takes the place of dU.
        let (x, matrix) = (&mut gradients.u, &self.matrix);
        widest(|| {
            for j in (1..n).rev() {
                let (before, own) = x.split_at_mut(j * value_dim);
                for (i, x) in before.chunks_exact_mut(value_dim).enumerate() {
                    let a = matrix[j * n + i];
                    x.iter_mut().zip(&*own).for_each(|(x, own)| *x -= a * *own);
                }
            }
        });
        let mut dmatrix = Vec::new();
        product(
            &mut dmatrix,
            [n, n, value_dim],
            dense(&gradients.u, value_dim),
            dense(&chunk.u, value_dim).transposed(),
            false,
        );
        let mut dbeta: Vec<f64> = (0..n)
            .map(|i| dot(&gradients.u[i * value_dim..][..value_dim], &self.rest[i * value_dim..][..value_dim]))
            .collect();
        for (i, (row, dbeta)) in dmatrix.chunks_exact_mut(n).zip(&mut dbeta).enumerate() {
            row[i..].fill(T::zero());
            for (j, d) in row[..i].iter_mut().enumerate() {
                let (at, da) = (i * n + j, T::zero() - *d);
                let along = (da * self.matrix[at]).to_f64();
                gradients.log[i] += along;
                gradients.log[j] -= along;
                *dbeta += (da * self.products[at] * chunk.decay[at]).to_f64();
                *d = da * self.beta[i] * chunk.decay[at];
            }
        }
        let (k, dproducts) = (dense(&chunk.k, key_dim), dense(&dmatrix, n));
        product(&mut gradients.k, [n, key_dim, n], dproducts, k, true);
        product(&mut gradients.k, [n, key_dim, n], dproducts.transposed(), k, true);
        // dV; and of what is read of the state, with the decay that it has.
        scale_rows(&mut gradients.u, value_dim, &self.beta);
        for i in 0..n {
            let own = i * value_dim..(i + 1) * value_dim;
            gradients.log[i] -= dot(&gradients.u[own.clone()], &self.read[own]);
        }
        let mut dread = gradients.u.clone();
        let back: Vec<T> = chunk.from_start.iter().map(|decay| T::zero() - *decay).collect();
        scale_rows(&mut dread, value_dim, &back);
        product(
            &mut gradients.k,
            [n, key_dim, value_dim],
            dense(&dread, value_dim),
            dense(state, value_dim).transposed(),
            true,
        );
        multiply(
            (dstate, value_dim),
            [key_dim, value_dim, n],
            (k.transposed(), dense(&dread, value_dim)),
            1.0,
            true,
            false,
        );

        let dlog = self.gradients.of_log_decays();
        let first = rows.start - to.start;
        to.inputs[2][first * value_dim..][..n * value_dim].copy_from_slice(&self.gradients.u);
        for (at, row) in rows.enumerate() {
            let a = self.row(3, row)[0] + T::from_f64(self.bias);
            to.inputs[3][first + at] = T::from_f64(dlog[at] * self.rate) * a.sigmoid();
            let beta = self.beta[at];
            to.inputs[4][first + at] = T::from_f64(dbeta[at]) * beta * (T::one() - beta);
        }
        // Of a unit y = r·x, times s: dx = r·s·(dy - y (y·dy) / s²).
        let lengths = [(&self.chunk.q, &self.gradients.q, key_dim as f64), (&self.chunk.k, &self.gradients.k, 1.0)];
        for ((shared, (units, d, unscale)), inverse) in to.inputs.iter_mut().zip(lengths).zip(&self.inverse) {
            let shared = shared[first * key_dim..].chunks_exact_mut(key_dim);
            for (((to, y), dy), r) in shared.zip(units.chunks_exact(key_dim)).zip(d.chunks_exact(key_dim)).zip(inverse)
            {
                let along = T::from_f64(dot(y, dy) * unscale);
                to.iter_mut().zip(y).zip(dy).for_each(|((to, y), dy)| *to += *r * (*dy - *y * along));
            }
        }
    }
}

/// Numbers and weights of the op.
struct GatedDelta {
    heads: Heads,
    eps: f64,
    /// `-exp(A_log)` and `dt_bias` of every head.
    rate: Vec<f64>,
    bias: Vec<f64>,
}

impl Rule for GatedDelta {
    const SHARED: [usize; 2] = [0, 1];
    type Head<'a, T: Real> = Head<'a, T>;

    fn of(call: &Call<'_>) -> Result<GatedDelta> {
        let [heads, key_heads, key_dim, value_dim] =
            ["heads", "key_heads", "key_dim", "value_dim"].map(|name| count(call.node, name));
        let rate = of_heads(call, "A_log")?.into_iter().map(|log| -log.exp()).collect();
        let heads = Heads { heads, key_heads, key_dim, value_dim };
        Ok(GatedDelta { heads, eps: number(call.node, "eps"), rate, bias: of_heads(call, "dt_bias")? })
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
            eps: self.eps,
            chunk: Chunk::new(self.heads.key_dim, self.heads.value_dim),
            inverse: Default::default(),
            beta: Vec::new(),
            products: Vec::new(),
            matrix: Vec::new(),
            read: Vec::new(),
            rest: Vec::new(),
            gradients: ChunkGradients::default(),
        }
    }
}
