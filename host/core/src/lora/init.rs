//! How A and B begin, as PEFT initialises them (`init_lora_weights`; `peft/tuners/lora/layer.py`).
//!
//! PiSSA and OLoRA begin with a part of W, `s·B0·A0`, and train what is left of W with it. Here W stays as it is, and the update is
//! `s·(B·A − B0·A0)`: the same model, without rounding what is left of W, and with the model itself as what the reference is. A file
//! has both as one plain adapter of twice the rank, `A' = [A; A0]` and `B' = [B, −B0]`, which is what PEFT's
//! `path_initial_model_for_weight_conversion` makes of such a run: it is right on the model as it is.

use candle_core::{DType, Device, Tensor};
use dpo_plugin_api::graph::ModelGraph;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Adapter, Site};
use crate::error::{Error, Result};
use crate::ops::{product, row_norms};
use crate::progress;
use crate::storage::Quantization;
use crate::weights::{Checkpoint, blocks, is_quantized};

/// How A and B begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Init {
    /// A uniform in `±1/sqrt(inputs)` (Kaiming with `a = sqrt(5)`), B zero.
    #[default]
    Kaiming,
    /// A normal with deviation `1/rank`, B zero.
    Gaussian,
    /// A and B from halves of an orthogonal matrix, so that `B·A` is zero and neither is.
    Orthogonal,
    /// The largest singular values of W and their vectors (Meng et al. 2024, eq. 2 to 4); found by so many iterations of a subspace, or until they change no more.
    Pissa(Option<usize>),
    /// The first columns of Q and rows of R, of W's QR decomposition (Büyükakyüz 2024).
    Olora,
}

/// Columns that a subspace has beyond the rank: what is sought converges the faster (Halko et al. 2011, section 4.3).
const OVERSAMPLING: usize = 10;
/// A side of W up to which the subspace is all of it: then one iteration is exact.
const SMALL: usize = 256;
/// Most iterations, and by how much of themselves singular values then change at most.
const MOST_ITERATIONS: usize = 64;
const CONVERGED: f64 = 1e-6;

impl Init {
    /// From PEFT's name.
    pub fn parse(text: &str) -> Result<Init> {
        let niter = text.strip_prefix("pissa_niter_").and_then(|n| n.parse().ok());
        match text {
            "true" | "kaiming" => Ok(Init::Kaiming),
            "gaussian" => Ok(Init::Gaussian),
            "orthogonal" => Ok(Init::Orthogonal),
            "pissa" => Ok(Init::Pissa(None)),
            "olora" => Ok(Init::Olora),
            _ => match niter {
                Some(iterations) => Ok(Init::Pissa(Some(iterations))),
                None => Err(Error::unknown(
                    "start",
                    text,
                    ["true", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora"],
                )),
            },
        }
    }

    /// Whether the adapter begins with a part of W, which is subtracted again.
    pub fn subtracts(self) -> bool {
        matches!(self, Init::Pissa(_) | Init::Olora)
    }
}

/// A and B of a site that begins without W.
pub(super) fn plain(adapter: &mut Adapter, site: &Site, rng: &mut ChaCha8Rng) {
    let [a, b] = adapter.ranges(site);
    let rank = site.rank;
    match adapter.config.init {
        Init::Gaussian => adapter.params[a].fill_with(|| normal(rng) / rank as f32),
        Init::Orthogonal => {
            let mut q: Vec<Vec<f64>> = (0..rank).map(|_| (0..rank).map(|_| f64::from(normal(rng))).collect()).collect();
            orthonormalise(&mut q);
            // A = (X · q_odd)ᵀ / 10 and B = Y · q_even / 10 of normal X and Y.
            let mut fill = |first: usize, to: &mut [f32], at: &dyn Fn(usize, usize) -> usize| {
                for column in 0..to.len() / rank {
                    let x: Vec<f64> = (0..rank / 2).map(|_| f64::from(normal(rng))).collect();
                    for r in 0..rank {
                        let sum: f64 = x.iter().enumerate().map(|(i, x)| x * q[2 * i + first][r]).sum();
                        to[at(column, r)] = (sum / 10.0) as f32;
                    }
                }
            };
            fill(0, &mut adapter.params[a], &|input, r| r * site.inputs + input);
            fill(1, &mut adapter.params[b], &|output, r| output * rank + r);
        }
        Init::Kaiming | Init::Pissa(_) | Init::Olora => {
            let bound = (site.inputs as f32).powf(-0.5);
            adapter.params[a].fill_with(|| rng.random_range(-bound..bound));
        }
    }
}

/// A standard normal number (Box and Muller 1958).
fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
    ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
}

impl Adapter {
    /// Whether its start needs the weights: see [`start`](Self::start).
    pub fn starts_from_weights(&self) -> bool {
        self.config.init.subtracts() || self.config.dora
    }

    /// Begins with what the weights say, as they are kept: factors of them, or the norms of their rows. `done` hears of every site.
    ///
    /// # Errors
    /// A weight that cannot be read.
    pub fn start(
        &mut self,
        graph: &ModelGraph,
        (checkpoint, quantization): (&Checkpoint, Option<Quantization>),
        seed: u64,
        done: impl Fn(),
    ) -> Result<()> {
        for (index, site) in self.sites.clone().iter().enumerate() {
            let found = blocks(graph).find(|(block, ..)| *block == site.node.0);
            let found = found.and_then(|(block, prefix, nodes)| {
                let node = &nodes[site.node.1];
                let weight = node.weights.get(site.weight)?;
                let own = quantization.filter(|kind| is_quantized(kind.numbers(), block, node, weight));
                Some((prefix, weight, own))
            });
            let (prefix, weight, quantization) =
                found.ok_or_else(|| Error::run(format!("'{}' has no weight", site.module)))?;
            let w = match quantization {
                None => checkpoint.load(prefix, weight)?,
                Some(kind) => {
                    let values = kind.unpack(&weight.shape, &checkpoint.load_packed(prefix, weight, kind)?);
                    Tensor::from_vec(values, weight.shape.as_slice(), &Device::Cpu)?
                }
            };
            self.start_site(site, &w, seed.wrapping_add(index as u64))?;
            progress::advance();
            done();
        }
        if self.config.init.subtracts() {
            self.subtracted = self.params.clone();
        }
        Ok(())
    }

    fn start_site(&mut self, site: &Site, w: &Tensor, seed: u64) -> Result<()> {
        let factors = match self.config.init {
            Init::Pissa(iterations) => Some(pissa(w, site, iterations, seed)?),
            Init::Olora => Some(olora(w, site)?),
            Init::Kaiming | Init::Gaussian | Init::Orthogonal => None,
        };
        if let Some(factors) = factors {
            for (range, factor) in self.ranges(site).into_iter().zip(factors) {
                self.params[range].copy_from_slice(&factor.flatten_all()?.to_vec1::<f32>()?);
            }
        }
        if let Some(range) = self.magnitude(site) {
            let norms: Vec<f32> = row_norms(w, &self.lora(site)?)?.to_vec1()?;
            self.params[range].copy_from_slice(&norms);
        }
        Ok(())
    }
}

/// `A = sqrt(S/s)·Vᵀ`, `B = U·sqrt(S/s)` of the largest singular values of W.
fn pissa(w: &Tensor, site: &Site, iterations: Option<usize>, seed: u64) -> Result<[Tensor; 2]> {
    let (outputs, inputs) = w.dims2()?;
    let least = outputs.min(inputs);
    let columns = if least <= SMALL { least } else { (site.rank + OVERSAMPLING).min(least) };
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let start: Vec<f32> = (0..columns * inputs).map(|_| normal(&mut rng)).collect();
    // A subspace of W's rows, `[columns, inputs]`, and its image, `[columns, outputs]` (Halko et al. 2011, algorithm 4.4).
    let mut rows = Tensor::from_vec(start, (columns, inputs), &Device::Cpu)?;
    let mut before: Vec<f64> = Vec::new();
    let most = if columns == least { 1 } else { iterations.unwrap_or(MOST_ITERATIONS) };
    for iteration in 0..=most {
        let (image, _) = orthonormal(&product(&rows, w)?)?;
        let (next, norms) = orthonormal(&image.matmul(w)?)?;
        rows = next;
        // The norms of an orthogonal iteration go to the singular values.
        let apart = |(a, b): (&f64, &f64)| (a - b).abs() / a.max(f64::MIN_POSITIVE);
        let settled = before.len() == norms.len()
            && norms.iter().zip(&before).take(site.rank).map(apart).all(|change| change < CONVERGED);
        if iterations.is_none() && settled && iteration > 0 {
            break;
        }
        before = norms;
    }
    // W ≈ (W·V)·Vᵀ, and W·V = U·S·Rᵀ by the eigenvectors R of its small Gram matrix.
    let image = to_rows(&product(&rows, w)?)?;
    let gram: Vec<Vec<f64>> = image.iter().map(|a| image.iter().map(|b| dot(a, b)).collect()).collect();
    let (values, vectors) = eigen(gram);
    let mut order: Vec<usize> = (0..columns).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
    let rows = to_rows(&rows)?;
    let combine = |of: &[Vec<f64>], vector: usize, factor: f64| -> Vec<f64> {
        let mut sum = vec![0.0; of[0].len()];
        for (row, vectors) in of.iter().zip(&vectors) {
            sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += vectors[vector] * value * factor);
        }
        sum
    };
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for vector in (0..site.rank).map(|r| order.get(r).copied()) {
        let Some(vector) = vector else {
            // A rank beyond the smaller side of W has nothing to begin with.
            a.push(vec![0.0; inputs]);
            b.push(vec![0.0; outputs]);
            continue;
        };
        let singular = values[vector].max(0.0).sqrt();
        let root = (singular / site.scale).sqrt();
        a.push(combine(&rows, vector, root));
        b.push(combine(&image, vector, if singular > 0.0 { root / singular } else { 0.0 }));
    }
    Ok([tensor(&a)?, tensor(&b)?.t()?.contiguous()?])
}

/// `B = Q[:, :r]`, `A = R[:r]`: the first columns of W made orthonormal, and W in their terms.
fn olora(w: &Tensor, site: &Site) -> Result<[Tensor; 2]> {
    let (_, inputs) = w.dims2()?;
    let columns = site.rank.min(inputs);
    let (mut q, _) = orthonormal(&w.narrow(1, 0, columns)?.t()?.contiguous()?)?;
    if columns < site.rank {
        q = q.pad_with_zeros(0, 0, site.rank - columns)?;
    }
    Ok([q.matmul(w)?, q.t()?.contiguous()?])
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn to_rows(matrix: &Tensor) -> Result<Vec<Vec<f64>>> {
    Ok(matrix.to_dtype(DType::F64)?.to_vec2()?)
}

fn tensor(rows: &[Vec<f64>]) -> Result<Tensor> {
    let width = rows.first().map_or(0, Vec::len);
    Ok(Tensor::from_vec(rows.concat(), (rows.len(), width), &Device::Cpu)?.to_dtype(DType::F32)?)
}

/// Rows made orthonormal, in f32, and the lengths that they had when those before them were taken off.
fn orthonormal(rows: &Tensor) -> Result<(Tensor, Vec<f64>)> {
    let mut rows = to_rows(rows)?;
    let lengths = orthonormalise(&mut rows);
    Ok((tensor(&rows)?, lengths))
}

/// By Gram and Schmidt, twice (Giraud et al. 2005). A row that depends on those before it becomes zero.
fn orthonormalise(rows: &mut [Vec<f64>]) -> Vec<f64> {
    let mut lengths = Vec::new();
    for at in 0..rows.len() {
        let (before, rest) = rows.split_at_mut(at);
        let row = &mut rest[0];
        let whole = dot(row, row).sqrt();
        for _ in 0..2 {
            for other in before.iter() {
                let part = dot(row, other);
                row.iter_mut().zip(other).for_each(|(x, y)| *x -= part * y);
            }
        }
        let length = dot(row, row).sqrt();
        let factor = if length > whole * 1e-12 { 1.0 / length } else { 0.0 };
        row.iter_mut().for_each(|x| *x *= factor);
        lengths.push(length);
    }
    lengths
}

/// Eigenvalues of a symmetric matrix and, in columns, their vectors, by Jacobi's rotations (Golub and Van Loan, algorithm 8.5.3).
fn eigen(mut matrix: Vec<Vec<f64>>) -> (Vec<f64>, Vec<Vec<f64>>) {
    let n = matrix.len();
    let mut vectors: Vec<Vec<f64>> = (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    for _ in 0..30 {
        let (mut off, mut all) = (0.0, 0.0);
        for (i, row) in matrix.iter().enumerate() {
            all += dot(row, row);
            off += dot(&row[i + 1..], &row[i + 1..]);
        }
        if off <= all * 1e-30 {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                let apq = matrix[p][q];
                if apq == 0.0 {
                    continue;
                }
                let theta = (matrix[q][q] - matrix[p][p]) / (2.0 * apq);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let c = 1.0 / (t * t + 1.0).sqrt();
                let s = t * c;
                let turn = |x: &mut f64, y: &mut f64| (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
                for row in matrix.iter_mut().chain(&mut vectors) {
                    let (left, right) = row.split_at_mut(q);
                    turn(&mut left[p], &mut right[0]);
                }
                let (above, below) = matrix.split_at_mut(q);
                above[p].iter_mut().zip(&mut below[0]).for_each(|(x, y)| turn(x, y));
            }
        }
    }
    ((0..n).map(|i| matrix[i][i]).collect(), vectors)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use super::*;
    use crate::weights::BlockId;

    fn site(inputs: usize, outputs: usize, rank: usize) -> Site {
        let node = (BlockId::Layer(0), 0);
        Site {
            module: "m".into(),
            parameter: None,
            experts: 1,
            inputs,
            outputs,
            rank,
            scale: 2.0,
            magnitudes: 0,
            offset: 0,
            node,
            weight: 0,
        }
    }

    /// A matrix of known singular values, `2^-i`, between random orthonormal vectors.
    fn matrix(outputs: usize, inputs: usize, rng: &mut ChaCha8Rng) -> (Tensor, Vec<f64>) {
        let count = outputs.min(inputs).min(40);
        let mut basis = |width: usize| {
            let mut rows: Vec<Vec<f64>> =
                (0..count).map(|_| (0..width).map(|_| f64::from(normal(rng))).collect()).collect();
            orthonormalise(&mut rows);
            rows
        };
        let (u, v) = (basis(outputs), basis(inputs));
        let values: Vec<f64> = (0..count).map(|i| 0.5_f64.powi(i as i32)).collect();
        let scaled: Vec<Vec<f64>> = u.iter().zip(&values).map(|(u, s)| u.iter().map(|x| x * s).collect()).collect();
        (tensor(&scaled).unwrap().t().unwrap().matmul(&tensor(&v).unwrap()).unwrap(), values)
    }

    #[test]
    fn pissa_has_the_largest_singular_values() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        // Small enough for a whole subspace, and two that are not.
        for (outputs, inputs, iterations) in [(24, 40, None), (300, 400, None), (700, 300, Some(8))] {
            let (w, values) = matrix(outputs, inputs, &mut rng);
            let site = site(inputs, outputs, 6);
            let [a, b] = pissa(&w, &site, iterations, 3).unwrap();
            let update = (b.matmul(&a).unwrap() * site.scale).unwrap();
            // What is left has the other singular values: its length, and that nothing of the update is in it.
            let left = (&w - &update).unwrap();
            let length = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            let expected = values[6..].iter().map(|s| s * s).sum::<f64>().sqrt();
            assert!((f64::from(length(&left)) - expected).abs() < 1e-5, "{outputs}: {} {expected}", length(&left));
            let inner = left.matmul(&a.t().unwrap()).unwrap();
            assert!(length(&inner) < 1e-4, "{outputs}: {}", length(&inner));
            // A and B share the values: sqrt(S/s) each.
            let norms = |t: &Tensor| -> Vec<f32> { t.sqr().unwrap().sum(1).unwrap().to_vec1().unwrap() };
            for (norms, what) in [(norms(&a), "A"), (norms(&b.t().unwrap().contiguous().unwrap()), "B")] {
                for (is, value) in norms.iter().zip(&values) {
                    let expected = value / site.scale;
                    assert!((f64::from(*is) - expected).abs() < 1e-5, "{outputs}, {what}: {is} {expected}");
                }
            }
            // The same seed gives the same bits.
            let again = pissa(&w, &site, iterations, 3).unwrap();
            let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(bits(&again[0]), bits(&a));
        }
    }

    #[test]
    fn olora_is_the_head_of_a_qr_decomposition() {
        let (w, _) = matrix(20, 30, &mut ChaCha8Rng::seed_from_u64(2));
        let [a, b] = olora(&w, &site(30, 20, 5)).unwrap();
        let gram: Vec<Vec<f32>> = b.t().unwrap().matmul(&b).unwrap().to_vec2().unwrap();
        for (i, row) in gram.iter().enumerate() {
            row.iter().enumerate().for_each(|(j, v)| assert!((v - f32::from(u8::from(i == j))).abs() < 1e-5));
        }
        // The first columns of W are in the span of Q.
        let first = |t: &Tensor| t.narrow(1, 0, 5).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let update = b.matmul(&a).unwrap();
        first(&update).iter().zip(first(&w)).for_each(|(a, b)| assert!((a - b).abs() < 1e-5));
    }

    #[test]
    fn names_of_starts_are_pefts() {
        assert_eq!(Init::parse("pissa_niter_16").unwrap(), Init::Pissa(Some(16)));
        assert_eq!(Init::parse("true").unwrap(), Init::default());
        for wrong in ["false", "loftq", "pissa_niter_", "corda", "eva"] {
            assert!(Init::parse(wrong).unwrap_err().to_string().contains("pissa"), "{wrong}");
        }
    }
}
