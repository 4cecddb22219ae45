//! Linear attention with decay, a chunk of a head at a time: the algebra that the gated delta rule and Mamba 2 have in common.
//!
//! With log decays `g_t <= 0`, `S_t = e^{g_t} S_{t-1} + k_t u_tᵀ` and `o_t = S_tᵀ q_t`. Over a chunk whose first state is S, with
//! `G_t = g_1 + … + g_t` (Dao and Gu 2024, "Transformers are SSMs", section 6; Yang et al. 2024, "Gated Delta Networks", section 3.3):
//!
//! ```text
//! o_i = e^{G_i} Sᵀ q_i + Σ_{j <= i} e^{G_i - G_j} (q_i·k_j) u_j        S' = e^{G_n} S + Σ_j e^{G_n - G_j} k_j u_jᵀ
//! ```
//!
//! Sums of log decays, and what is between two of them, are in f64: a decay is as exact as its log.

use super::product::{Matrix, multiply};
use super::real::{Real, sum_by};
use super::rows::widest;

/// Tokens of a chunk.
pub(super) const CHUNK: usize = 64;

/// A chunk's inputs, its first `tokens` rows.
#[derive(Default)]
pub(super) struct Chunk<T> {
    pub tokens: usize,
    pub key_dim: usize,
    pub value_dim: usize,
    /// `[tokens, key_dim]`.
    pub q: Vec<T>,
    /// `[tokens, key_dim]`.
    pub k: Vec<T>,
    /// What is written to the state, `[tokens, value_dim]`.
    pub u: Vec<T>,
    /// `e^{G_i}`.
    pub from_start: Vec<T>,
    /// `e^{G_n - G_j}`.
    to_end: Vec<T>,
    /// `e^{G_i - G_j}` at `[i, j]` for `j <= i`, else 0.
    pub decay: Vec<T>,
    /// `(q_i·k_j) e^{G_i - G_j}` at `[i, j]`.
    scores: Vec<T>,
    /// Room for what is `[tokens, key_dim]` or `[tokens, value_dim]`.
    room: [Vec<T>; 2],
    dscores: Vec<T>,
}

/// Gradients of a chunk's inputs.
#[derive(Default)]
pub(super) struct ChunkGradients<T> {
    /// `[tokens, key_dim]`.
    pub q: Vec<T>,
    /// `[tokens, key_dim]`.
    pub k: Vec<T>,
    /// `[tokens, value_dim]`.
    pub u: Vec<T>,
    /// Of the sums of log decays `G`, `[tokens]`.
    pub log: Vec<f64>,
}

impl<T> ChunkGradients<T> {
    /// Those of the log decays: `G_t` is in all sums from t on.
    pub(super) fn of_log_decays(&self) -> Vec<f64> {
        let mut all = self.log.clone();
        (1..all.len()).rev().for_each(|at| all[at - 1] += all[at]);
        all
    }
}

/// A matrix whose rows lie one behind another.
pub(super) fn dense<T>(values: &[T], columns: usize) -> Matrix<'_, T> {
    Matrix::rows(values, columns, 0)
}

/// `to (+)= a · b`, all rows one behind another.
pub(super) fn product<T: Real>(to: &mut Vec<T>, sizes: [usize; 3], a: Matrix<'_, T>, b: Matrix<'_, T>, add: bool) {
    to.resize(sizes[0] * sizes[1], T::zero());
    multiply((to, sizes[1]), sizes, (a, b), 1.0, add, false);
}

/// Rows times a number each.
pub(super) fn scale_rows<T: Real>(rows: &mut [T], columns: usize, by: &[T]) {
    rows.chunks_exact_mut(columns).zip(by).for_each(|(row, by)| row.iter_mut().for_each(|x| *x *= *by));
}

/// `Σ a·b`.
pub(super) fn dot<T: Real>(a: &[T], b: &[T]) -> f64 {
    sum_by([a, b], |[a, b]| a * b)
}

impl<T: Real> Chunk<T> {
    pub(super) fn new(key_dim: usize, value_dim: usize) -> Chunk<T> {
        Chunk { key_dim, value_dim, ..Chunk::default() }
    }

    /// Takes the log decay of every token.
    pub(super) fn decays(&mut self, log: impl Iterator<Item = f64>) {
        let sums: Vec<f64> = log
            .scan(0.0, |sum, g| {
                *sum += g;
                Some(*sum)
            })
            .collect();
        self.tokens = sums.len();
        let power = |log: f64| T::from_f64(log).fast_exp();
        let end = sums.last().copied().unwrap_or(0.0);
        self.from_start = sums.iter().map(|log| power(*log)).collect();
        self.to_end = sums.iter().map(|log| power(end - log)).collect();
        self.decay.clear();
        for i in 0..self.tokens {
            self.decay.extend(sums[..=i].iter().map(|log| power(sums[i] - log)));
            self.decay.resize((i + 1) * self.tokens, T::zero());
        }
    }

    fn sizes(&self) -> (usize, usize, usize) {
        (self.tokens, self.key_dim, self.value_dim)
    }

    /// Values `[tokens, value_dim]`, where they are wanted; the state becomes the one behind the chunk.
    pub(super) fn forward(&mut self, state: &mut [T], value: Option<&mut [T]>) {
        let (n, key_dim, dim) = self.sizes();
        if let Some(y) = value {
            self.score();
            multiply(
                (&mut *y, dim),
                [n, dim, key_dim],
                (dense(&self.q, key_dim), dense(state, dim)),
                1.0,
                false,
                false,
            );
            widest(|| scale_rows(y, dim, &self.from_start));
            multiply((y, dim), [n, dim, n], (dense(&self.scores, n), dense(&self.u, dim)), 1.0, true, false);
        }
        let k = self.keys_to_end();
        let end = self.from_start[n - 1];
        widest(|| state.iter_mut().for_each(|s| *s *= end));
        multiply(
            (state, dim),
            [key_dim, dim, n],
            (dense(&k, key_dim).transposed(), dense(&self.u, dim)),
            1.0,
            true,
            false,
        );
        self.room[0] = k;
    }

    fn score(&mut self) {
        let (n, key_dim, _) = self.sizes();
        product(
            &mut self.scores,
            [n, n, key_dim],
            dense(&self.q, key_dim),
            dense(&self.k, key_dim).transposed(),
            false,
        );
        widest(|| self.scores.iter_mut().zip(&self.decay).for_each(|(s, d)| *s *= *d));
    }

    /// Keys times their decays to the chunk's end.
    fn keys_to_end(&mut self) -> Vec<T> {
        let mut k = std::mem::take(&mut self.room[0]);
        k.clear();
        k.extend_from_slice(&self.k);
        widest(|| scale_rows(&mut k, self.key_dim, &self.to_end));
        k
    }

    /// Gradients of the inputs from those of the values `dy` and of the state behind the chunk, which becomes that of the state before it.
    ///
    /// With `M = (q·kᵀ) ∘ D`, `D` the decays, and `dM = dy·uᵀ`: `dq = (dM ∘ D)·k + e^G dy·Sᵀ`, `dk = (dM ∘ D)ᵀ·q + e^{G_n - G} u·dS'ᵀ`,
    /// `du = Mᵀ·dy + e^{G_n - G} k·dS'`, `dS = e^{G_n} dS' + qᵀ·(e^G dy)`; every decay's gradient times the decay goes to its end and off
    /// its beginning.
    pub(super) fn backward(&mut self, state: &[T], dstate: &mut [T], dy: &[T], to: &mut ChunkGradients<T>) {
        let (n, key_dim, dim) = self.sizes();
        self.score();
        to.log.clear();
        to.log.resize(n, 0.0);
        product(&mut self.dscores, [n, n, dim], dense(dy, dim), dense(&self.u, dim).transposed(), false);
        for i in 0..n {
            for j in 0..i {
                let along = (self.dscores[i * n + j] * self.scores[i * n + j]).to_f64();
                to.log[i] += along;
                to.log[j] -= along;
            }
        }
        widest(|| self.dscores.iter_mut().zip(&self.decay).for_each(|(s, d)| *s *= *d));
        product(&mut to.q, [n, key_dim, n], dense(&self.dscores, n), dense(&self.k, key_dim), false);
        product(&mut to.k, [n, key_dim, n], dense(&self.dscores, n).transposed(), dense(&self.q, key_dim), false);
        product(&mut to.u, [n, dim, n], dense(&self.scores, n).transposed(), dense(dy, dim), false);

        // From the state behind.
        let (behind, mut part) = (dense(&*dstate, dim), std::mem::take(&mut self.room[1]));
        let k = self.keys_to_end();
        multiply((&mut to.u, dim), [n, dim, key_dim], (dense(&k, key_dim), behind), 1.0, true, false);
        self.room[0] = k;
        product(&mut part, [n, key_dim, dim], dense(&self.u, dim), behind.transposed(), false);
        widest(|| scale_rows(&mut part, key_dim, &self.to_end));
        for (j, (k, dk)) in self.k.chunks_exact(key_dim).zip(part.chunks_exact(key_dim)).enumerate() {
            let along = dot(k, dk);
            to.log[n - 1] += along;
            to.log[j] -= along;
        }
        to.k.iter_mut().zip(&part).for_each(|(dk, part)| *dk += *part);
        let end = self.from_start[n - 1];
        to.log[n - 1] += end.to_f64() * dot(dstate, state);

        // From the state before.
        let mut decayed = dy.to_vec();
        widest(|| scale_rows(&mut decayed, dim, &self.from_start));
        product(&mut part, [n, key_dim, dim], dense(&decayed, dim), dense(state, dim).transposed(), false);
        for (i, (q, dq)) in self.q.chunks_exact(key_dim).zip(part.chunks_exact(key_dim)).enumerate() {
            to.log[i] += dot(q, dq);
        }
        to.q.iter_mut().zip(&part).for_each(|(dq, part)| *dq += *part);
        widest(|| dstate.iter_mut().for_each(|d| *d *= end));
        let q = dense(&self.q, key_dim).transposed();
        multiply((dstate, dim), [key_dim, dim, n], (q, dense(&decayed, dim)), 1.0, true, false);
        self.room[1] = part;
    }
}
