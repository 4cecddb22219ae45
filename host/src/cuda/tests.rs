//! Lowered programs without a GPU. An emulator runs them in f32 in one piece of memory, laid out as on a card and full of
//! NaN wherever nothing was written, and has to find the log-probs and gradients of the CPU engine. What it cannot see is
//! the kernels: those are compared by `dpo-host selftest` on a GPU.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use dpo_plugin_api::graph::{Block, ModelGraph};

use super::launch::rope_numbers;
use super::memory::{Arrangement, Footprint, Lowered};
use super::plan::{GpuPlan, LOST_TOKENS, Room};
use super::program::{Attention, GRADIENT, Group, INPUT, Keep, OUTPUT, Op, Program, Slice};
use crate::batch::Batch;
use crate::cli::selftest::{FAMILIES, adapter, cpu, distance, examples, given, op_cases};
use crate::cli::shape::Shape;
use crate::device::Device;
use crate::lora::Adapter;
use crate::ops::answer_mask::AnswerMask;
use crate::plan::Wishes;
use crate::plugins::Registry;

/// A group's `[[W, s·B], [A, 0]]`, its bias, and the gradients by A `[rank, inputs]` and B `[rank, outputs]`.
struct Stack {
    weights: Vec<f32>,
    columns: usize,
    bias: Vec<f32>,
    gradients: [Vec<f32>; 2],
}

struct Emulator {
    graph: ModelGraph,
    adapter: Adapter,
    lowered: Lowered,
    arrangement: Arrangement,
    /// Of every layer, its groups'.
    stacks: Vec<Vec<Stack>>,
    /// A value for every two bytes.
    memory: Vec<f32>,
    batch: Batch,
    /// `d logp / d hidden` of every answer token.
    slopes: Vec<Vec<f32>>,
}

/// Of a row and a head: the weights of the keys it sees, and the logarithm of their sum.
struct Attended {
    row: usize,
    head: usize,
    weights: Vec<(usize, f32)>,
    log_sum: f32,
}

/// Where a program runs.
struct Pass<'a> {
    program: &'a Program,
    block: &'a Block,
    prefix: &'a str,
    places: Vec<usize>,
    rows: usize,
}

impl Pass<'_> {
    fn at(&self, s: &Slice, row: usize) -> usize {
        self.places[s.buffer] + row * super::memory::columns(self.program.buffers[s.buffer]) + s.column
    }

    /// Of a buffer with a number for every head; a number has four bytes.
    fn number(&self, buffer: usize, head: usize, row: usize) -> usize {
        self.places[buffer] + (head * self.rows + row) * 2
    }
}

impl Emulator {
    fn new(graph: &ModelGraph, batch: Batch, allowed: &[Keep], bytes: impl Fn(&Footprint) -> usize) -> Emulator {
        let adapter = adapter(graph, false).unwrap();
        let lowered = Lowered::new(graph, &adapter).unwrap();
        let footprint = Footprint::new(graph, &lowered);
        let bytes = bytes(&footprint);
        let arrangement = footprint.arrange(batch.tokens(), batch.targets.len(), bytes, allowed).unwrap();
        let stacks = graph.layers.iter().enumerate().map(|(at, layer)| {
            let block = &graph.blocks[layer.block];
            let groups = lowered.programs[layer.block].groups.iter();
            groups.map(|g| Stack::new(g, block, &layer.prefix, at, &adapter)).collect()
        });
        let stacks = stacks.collect();
        let (graph, memory) = (graph.clone(), vec![f32::NAN; bytes / 2]);
        Emulator { graph, adapter, lowered, arrangement, stacks, memory, batch, slopes: Vec::new() }
    }

    fn row(&self, pass: &Pass<'_>, s: &Slice, row: usize) -> Vec<f32> {
        let at = pass.at(s, row);
        self.memory[at..at + s.width].to_vec()
    }

    fn write(&mut self, pass: &Pass<'_>, s: &Slice, row: usize, values: &[f32]) {
        let at = pass.at(s, row);
        self.memory[at..at + s.width].copy_from_slice(values);
    }

    fn layer<R>(&mut self, layer: usize, backward: bool, body: impl FnOnce(&mut Emulator, &Pass<'_>, &[Op]) -> R) -> R {
        let (graph, lowered) = (self.graph.clone(), std::mem::replace(&mut self.lowered, empty()));
        let kind = graph.layers[layer].block;
        let places = self.arrangement.places(&lowered, kind, layer, true, backward);
        let pass = Pass {
            program: &lowered.programs[kind],
            block: &graph.blocks[kind],
            prefix: &graph.layers[layer].prefix,
            places: places.into_iter().map(|p| p.unwrap_or(usize::MAX / 4) / 2).collect(),
            rows: self.batch.tokens(),
        };
        // Nothing may be read from work space that another layer left.
        let (from, to) = (self.arrangement.scratch / 2, self.memory.len());
        self.memory[from..to].fill(f32::NAN);
        let scheduled = &lowered.schedules[kind][self.arrangement.keep[layer] as usize];
        let result = body(self, &pass, if backward { &scheduled.ops } else { &lowered.programs[kind].forward });
        self.lowered = lowered;
        result
    }

    fn forward(&mut self) -> Vec<f32> {
        let hidden = self.graph.hidden_size;
        let table = &self.graph.embed.nodes[0].weights[0];
        let table = given(&table.tensor, &table.shape);
        let ids = self.batch.ids.clone();
        for layer in 0..self.graph.layers.len() {
            self.layer(layer, false, |own, pass, ops| {
                let input = Slice { buffer: INPUT, column: 0, width: hidden };
                if layer == 0 {
                    ids.iter().enumerate().for_each(|(row, id)| {
                        own.write(pass, &input, row, &table[*id as usize * hidden..][..hidden]);
                    });
                }
                ops.iter().for_each(|op| own.run(pass, layer, op));
            });
        }
        self.head(None)
    }

    /// The head forward; with a gradient by log-probs, backward.
    fn head(&mut self, dlogps: Option<&[f32]>) -> Vec<f32> {
        let (graph, lowered) = (self.graph.clone(), std::mem::replace(&mut self.lowered, empty()));
        let hidden = graph.hidden_size;
        let edge = |layer: usize| (layer * lowered.programs[0].edge() * self.arrangement.rows) / 2;
        let (last, gradient) = (edge(graph.layers.len()), self.arrangement.gradient / 2);
        let ld = lowered.programs[0].edge() / 2;
        let places = self.arrangement.head_places(&lowered).into_iter().map(|p| p.unwrap_or(usize::MAX / 4) / 2);
        let rows = self.batch.targets.len();
        let pass = Pass { program: &lowered.head, block: &graph.head, prefix: "", places: places.collect(), rows };
        let of = |buffer| Slice { buffer, column: 0, width: hidden };
        let mut logps = Vec::new();
        match dlogps {
            None => {
                for row in 0..rows {
                    let from = last + self.batch.predictors[row] as usize * ld;
                    let values = self.memory[from..from + hidden].to_vec();
                    self.write(&pass, &of(INPUT), row, &values);
                }
                lowered.head.forward.iter().for_each(|op| self.run(&pass, usize::MAX, op));
                let weight = &graph.head.nodes.last().unwrap().weights[0];
                let table = given(&weight.tensor, &weight.shape);
                for row in 0..rows {
                    let h = self.row(&pass, &of(OUTPUT), row);
                    let (logp, slope) = log_prob(&h, &table, self.batch.targets[row] as usize);
                    logps.push(logp);
                    self.write(&pass, &of(GRADIENT), row, &slope);
                }
            }
            Some(dlogps) => {
                for (row, by) in dlogps.iter().enumerate() {
                    let scaled: Vec<f32> = self.slopes[row].iter().map(|v| v * by).collect();
                    self.write(&pass, &of(GRADIENT), row, &scaled);
                }
                lowered.head_schedule.ops.iter().for_each(|op| self.run(&pass, usize::MAX, op));
                let mut sums = vec![0.0; self.batch.tokens() * hidden];
                for row in 0..rows {
                    let to = self.batch.predictors[row] as usize * hidden;
                    let values = self.row(&pass, &of(GRADIENT), row);
                    sums[to..to + hidden].iter_mut().zip(values).for_each(|(s, v)| *s += v);
                }
                for (row, values) in sums.chunks(hidden).enumerate() {
                    self.memory[gradient + row * ld..][..hidden].copy_from_slice(values);
                }
            }
        }
        if dlogps.is_none() {
            self.slopes = (0..rows).map(|row| self.row(&pass, &of(GRADIENT), row)).collect();
        }
        self.lowered = lowered;
        logps
    }

    /// The adapter's gradient, laid out as its parameters.
    fn backward(&mut self, dlogps: &[f32]) -> Vec<f32> {
        self.head(Some(dlogps));
        for layer in (0..self.graph.layers.len()).rev() {
            self.layer(layer, true, |own, pass, ops| ops.iter().for_each(|op| own.run(pass, layer, op)));
        }
        let mut gradient = vec![0.0; self.adapter.params.len()];
        let (rank, scale) = (self.adapter.config.rank, self.adapter.config.scale() as f32);
        for site in &self.adapter.sites {
            let layer = site.node.0 - 1;
            let groups = &self.lowered.programs[self.graph.layers[layer].block].groups;
            let find = |g: &Group| g.members.iter().position(|m| m.node == site.node.1);
            let (at, member) = groups.iter().enumerate().find_map(|(at, g)| Some((at, find(g)?))).unwrap();
            let (group, [da, db]) = (&groups[at], &self.stacks[layer][at].gradients);
            let member = &group.members[member];
            let [a, b] = self.adapter.ranges(site);
            gradient[a].copy_from_slice(&da[member.rank_column * group.inputs..][..rank * group.inputs]);
            for (i, to) in gradient[b].iter_mut().enumerate() {
                let (output, r) = (i / rank, i % rank);
                *to = scale * db[(member.rank_column + r) * group.outputs + member.column + output];
            }
        }
        gradient
    }

    fn run(&mut self, pass: &Pass<'_>, layer: usize, op: &Op) {
        let group = |at: usize| &pass.program.groups[at];
        let weight = |node: usize| {
            let weight = &pass.block.nodes[node].weights[0];
            given(&format!("{}{}", pass.prefix, weight.tensor), &weight.shape)
        };
        for row in 0..pass.rows {
            match op {
                Op::Norm { node, x, y, dim, eps } => {
                    let (w, mut x) = (weight(*node), self.row(pass, x, row));
                    for head in x.chunks_mut(*dim) {
                        let scale = norm_scale(head, *eps);
                        head.iter_mut().zip(&w).for_each(|(v, w)| *v *= scale * w);
                    }
                    self.write(pass, y, row, &x);
                }
                Op::NormVjp { node, x, dy, before, dx, dim, eps } => {
                    let (w, x, dy) = (weight(*node), self.row(pass, x, row), self.row(pass, dy, row));
                    let mut out = before.map_or(vec![0.0; x.len()], |b| self.row(pass, &b, row));
                    for ((x, dy), out) in x.chunks(*dim).zip(dy.chunks(*dim)).zip(out.chunks_mut(*dim)) {
                        let s = norm_scale(x, *eps);
                        let pull = (0..*dim).map(|i| w[i] * dy[i] * x[i]).sum::<f32>() / *dim as f32 * s * s;
                        (0..*dim).for_each(|i| out[i] += s * (w[i] * dy[i] - x[i] * pull));
                    }
                    self.write(pass, dx, row, &out);
                }
                Op::Rope { node, x, dim, back } => {
                    let (frequencies, scale) = rope_numbers(&pass.block.nodes[*node]);
                    let mut values = self.row(pass, x, row);
                    for head in values.chunks_mut(*dim) {
                        for (j, frequency) in frequencies.iter().enumerate() {
                            let (sine, cosine) = (self.batch.layout.positions[row] as f32 * frequency).sin_cos();
                            let sine = if *back { -sine } else { sine } * scale;
                            let (a, b) = (head[j], head[j + dim / 2]);
                            head[j] = a * cosine * scale - b * sine;
                            head[j + dim / 2] = b * cosine * scale + a * sine;
                        }
                    }
                    self.write(pass, x, row, &values);
                }
                Op::Down { group: at } => {
                    let (g, x) = (group(*at), self.row(pass, &group(*at).x, row));
                    let stack = &self.stacks[layer][*at];
                    let u: Vec<f32> = (0..g.rank).map(|r| dot(&stack.row(g.outputs + r)[..g.inputs], &x)).collect();
                    self.write(pass, &behind(&g.x, g.inputs, g.rank), row, &u);
                }
                Op::Product { group: at } => {
                    let g = group(*at);
                    let x = self.row(pass, &Slice { width: g.inputs + g.rank, ..g.x }, row);
                    let mut y = g.residual.map_or(vec![0.0; g.outputs], |r| self.row(pass, &r, row));
                    let stack = &self.stacks[layer][*at];
                    (0..g.outputs).for_each(|o| y[o] += stack.bias[o] + dot(stack.row(o), &x));
                    self.write(pass, &g.y, row, &y);
                }
                Op::ProductVjp { group: at, dy, before, dx } => {
                    let g = group(*at);
                    assert!(dx.buffer != dy.buffer, "a product would overwrite what it reads");
                    let values = self.row(pass, dy, row);
                    let x = self.row(pass, &Slice { width: g.inputs + g.rank, ..g.x }, row);
                    let mut out = before.map_or(vec![0.0; g.inputs], |b| self.row(pass, &b, row));
                    let stack = &mut self.stacks[layer][*at];
                    let v: Vec<f32> = (0..g.rank)
                        .map(|r| (0..g.outputs).map(|o| values[o] * stack.row(o)[g.inputs + r]).sum())
                        .collect();
                    for r in 0..g.rank {
                        (0..g.inputs).for_each(|i| stack.gradients[0][r * g.inputs + i] += v[r] * x[i]);
                        let u = x[g.inputs + r];
                        (0..g.outputs).for_each(|o| stack.gradients[1][r * g.outputs + o] += u * values[o]);
                    }
                    let dv = [values, v.clone()].concat();
                    for (o, d) in dv.iter().enumerate() {
                        out.iter_mut().zip(stack.row(o)).for_each(|(out, w)| *out += d * w);
                    }
                    self.write(pass, &behind(dy, g.outputs, g.rank), row, &v);
                    self.write(pass, dx, row, &out);
                }
                Op::Glu { kind, gate, up, y } => {
                    let (gate, up) = (self.row(pass, gate, row), self.row(pass, up, row));
                    let values: Vec<f32> = gate.iter().zip(up).map(|(g, u)| activation(*kind, *g).0 * u).collect();
                    self.write(pass, y, row, &values);
                }
                Op::GluVjp { kind, gate, up, dy, d } => {
                    let (gate, up, dy) = (self.row(pass, gate, row), self.row(pass, up, row), self.row(pass, dy, row));
                    let act: Vec<(f32, f32)> = gate.iter().map(|g| activation(*kind, *g)).collect();
                    let dgate: Vec<f32> = (0..dy.len()).map(|i| dy[i] * up[i] * act[i].1).collect();
                    let dup: Vec<f32> = (0..dy.len()).map(|i| dy[i] * act[i].0).collect();
                    self.write(pass, &d[0], row, &dgate);
                    self.write(pass, &d[1], row, &dup);
                }
                Op::Add { a, b, y } => {
                    let b = self.row(pass, b, row);
                    let sum: Vec<f32> = self.row(pass, a, row).iter().zip(b).map(|(a, b)| a + b).collect();
                    self.write(pass, y, row, &sum);
                }
                Op::Copy { a, y } => {
                    let values = self.row(pass, a, row);
                    self.write(pass, y, row, &values);
                }
                Op::Attend { .. } | Op::AttendVjp { .. } => {}
            }
        }
        match op {
            Op::Attend { a, q, k, v, out, lse } => {
                for Attended { row, head, weights, log_sum: sum } in self.attention(pass, a, q, k) {
                    let mut values = vec![0.0; a.dim];
                    for (key, weight) in weights {
                        let v = self.row(pass, &of_head(v, head / (a.heads / a.kv_heads), a.dim), key);
                        values.iter_mut().zip(v).for_each(|(o, v)| *o += weight * v);
                    }
                    self.write(pass, &of_head(out, head, a.dim), row, &values);
                    self.memory[pass.number(*lse, head, row)] = sum;
                }
            }
            Op::AttendVjp { a, q, k, v, out, lse, delta, dout, d, parts } => {
                let mut sums = [q.width, k.width, v.width].map(|width| vec![0.0_f32; width * pass.rows]);
                for Attended { row, head, weights, log_sum: sum } in self.attention(pass, a, q, k) {
                    assert!((self.memory[pass.number(*lse, head, row)] - sum).abs() < 1e-4, "the log-sum was lost");
                    let kv = head / (a.heads / a.kv_heads);
                    let dy = self.row(pass, &of_head(dout, head, a.dim), row);
                    let pull = dot(&dy, &self.row(pass, &of_head(out, head, a.dim), row));
                    self.memory[pass.number(*delta, head, row)] = pull;
                    let own = self.row(pass, &of_head(q, head, a.dim), row);
                    for (key, weight) in weights {
                        let key_row = self.row(pass, &of_head(k, kv, a.dim), key);
                        let value_row = self.row(pass, &of_head(v, kv, a.dim), key);
                        let slope = if a.softcap > 0.0 {
                            1.0 - (dot(&own, &key_row) * a.scale / a.softcap).tanh().powi(2)
                        } else {
                            1.0
                        };
                        let ds = weight * (dot(&dy, &value_row) - pull) * slope * a.scale;
                        let mut add = |which: usize, at: usize, by: f32, from: &[f32]| {
                            sums[which][at..at + a.dim].iter_mut().zip(from).for_each(|(s, f)| *s += by * f);
                        };
                        add(0, row * q.width + head * a.dim, ds, &key_row);
                        add(1, key * k.width + kv * a.dim, ds, &own);
                        add(2, key * v.width + kv * a.dim, weight, &dy);
                    }
                }
                // What the kernels leave there is of no further use.
                for part in parts.iter().flatten() {
                    (0..pass.rows).for_each(|row| self.write(pass, part, row, &vec![f32::NAN; part.width]));
                }
                for (sums, to) in sums.iter().zip(d) {
                    (0..pass.rows).for_each(|row| self.write(pass, to, row, &sums[row * to.width..][..to.width]));
                }
            }
            _ => {}
        }
    }

    fn attention(&self, pass: &Pass<'_>, a: &Attention, q: &Slice, k: &Slice) -> Vec<Attended> {
        let mut all = Vec::new();
        for (row, head) in (0..pass.rows).flat_map(|row| (0..a.heads).map(move |head| (row, head))) {
            let own = self.row(pass, &of_head(q, head, a.dim), row);
            let span = self.batch.layout.spans.iter().find(|s| (s.start..s.start + s.len()).contains(&row)).unwrap();
            let mask = AnswerMask::of(span, 0, a.window);
            let keys = (span.start..=row).filter(|key| mask.sees(row - span.start, key - span.start));
            let score = |key| {
                let score =
                    dot(&own, &self.row(pass, &of_head(k, head / (a.heads / a.kv_heads), a.dim), key)) * a.scale;
                if a.softcap > 0.0 { a.softcap * (score / a.softcap).tanh() } else { score }
            };
            let scores: Vec<(usize, f32)> = keys.map(|key| (key, score(key))).collect();
            let sum = scores.iter().map(|(_, s)| s.exp()).sum::<f32>().ln();
            let weights = scores.into_iter().map(|(key, s)| (key, (s - sum).exp())).collect();
            all.push(Attended { row, head, weights, log_sum: sum });
        }
        all
    }
}

impl Stack {
    fn new(group: &Group, block: &Block, prefix: &str, layer: usize, adapter: &Adapter) -> Stack {
        let columns = group.inputs + group.rank;
        let mut weights = vec![0.0; (group.outputs + group.rank) * columns];
        let mut bias = vec![0.0; group.outputs];
        for member in &group.members {
            for weight in &block.nodes[member.node].weights {
                let values = given(&format!("{prefix}{}", weight.tensor), &weight.shape);
                if weight.role == "bias" {
                    bias[member.column..member.column + member.width].copy_from_slice(&values);
                } else {
                    for (row, values) in values.chunks(group.inputs).enumerate() {
                        weights[(member.column + row) * columns..][..group.inputs].copy_from_slice(values);
                    }
                }
            }
            let Some(site) = adapter.sites.iter().find(|s| s.node == (layer + 1, member.node)) else { continue };
            let ([a, b], rank) = (adapter.ranges(site), adapter.config.rank);
            for (r, row) in adapter.params[a].chunks(group.inputs).enumerate() {
                let to = (group.outputs + member.rank_column + r) * columns;
                weights[to..to + group.inputs].copy_from_slice(row);
            }
            for (output, row) in adapter.params[b].chunks(rank).enumerate() {
                let to = (member.column + output) * columns + group.inputs + member.rank_column;
                let scaled = row.iter().map(|v| v * adapter.config.scale() as f32);
                weights[to..to + rank].iter_mut().zip(scaled).for_each(|(to, v)| *to = v);
            }
        }
        let gradients = [vec![0.0; group.rank * group.inputs], vec![0.0; group.rank * group.outputs]];
        Stack { weights, columns, bias, gradients }
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.weights[row * self.columns..][..self.columns]
    }
}

fn empty() -> Lowered {
    let none = Program { buffers: Vec::new(), groups: Vec::new(), forward: Vec::new(), backward: Vec::new() };
    let nothing =
        super::memory::Scheduled { forward: Default::default(), backward: Default::default(), ops: Vec::new() };
    Lowered { programs: Vec::new(), schedules: Vec::new(), head: none, head_schedule: nothing }
}

fn behind(slice: &Slice, column: usize, width: usize) -> Slice {
    Slice { buffer: slice.buffer, column: slice.column + column, width }
}

fn of_head(slice: &Slice, head: usize, dim: usize) -> Slice {
    Slice { buffer: slice.buffer, column: slice.column + head * dim, width: dim }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm_scale(x: &[f32], eps: f32) -> f32 {
    (dot(x, x) / x.len() as f32 + eps).powf(-0.5)
}

/// Value and slope, the slope by differences in f64.
fn activation(kind: i32, x: f32) -> (f32, f32) {
    let value = |x: f64| match kind {
        0 => x / (1.0 + (-x).exp()),
        1 => x * 0.5 * candle_erfc(-x / std::f64::consts::SQRT_2),
        _ => 0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044715 * x.powi(3))).tanh()),
    };
    let (x, h) = (f64::from(x), 1e-5);
    (value(x) as f32, ((value(x + h) - value(x - h)) / (2.0 * h)) as f32)
}

/// `erfc`, by candle's scalar `erf`.
fn candle_erfc(x: f64) -> f64 {
    1.0 - candle_core::cpu::erf::erf_f64(x)
}

/// The log-prob of a target and its slope by the hidden state.
fn log_prob(hidden: &[f32], table: &[f32], target: usize) -> (f32, Vec<f32>) {
    let rows: Vec<&[f32]> = table.chunks(hidden.len()).collect();
    let logits: Vec<f32> = rows.iter().map(|row| dot(row, hidden)).collect();
    let max = logits.iter().copied().fold(f32::MIN, f32::max);
    let sum = max + logits.iter().map(|z| (z - max).exp()).sum::<f32>().ln();
    let mut slope = rows[target].to_vec();
    for (row, z) in rows.iter().zip(&logits) {
        slope.iter_mut().zip(*row).for_each(|(s, w)| *s -= (z - sum).exp() * w);
    }
    (logits[target] - sum, slope)
}

/// Every graph of the self-test, at every level of what is kept and in just as many bytes as a mixture of levels takes.
#[test]
fn programs_compute_what_the_cpu_computes() {
    let registry = Registry::discover(&[]);
    let families =
        FAMILIES.iter().map(|(name, config)| (name.to_string(), registry.family(name).unwrap().graph(config).unwrap()));
    for (name, graph) in op_cases().unwrap().into_iter().chain(families) {
        let lengths: [&[usize]; 6] = [&[3, 1, 9], &[17, 5, 6], &[1, 1, 1], &[4, 3], &[2, 3, 1, 5], &[1, 2, 4, 1, 3, 1]];
        let batch = Batch::of(&examples(graph.vocab_size, &lengths, 5).unwrap());
        let slopes: Vec<f32> = (0..batch.targets.len()).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut exact = cpu(&graph, batch.tokens(), false).unwrap();
        let logps = exact.forward(&batch, true).unwrap().logps;
        exact.backward(&batch, &slopes).unwrap();
        let (tokens, answers) = (batch.tokens(), batch.targets.len());
        let levels = Keep::ALL.map(|keep| (vec![keep], keep, 1.0)).into_iter();
        // Less than everything, so that layers keep different parts.
        let mixed = [0.9, 0.97].map(|part| (Keep::ALL.to_vec(), Keep::All, part));
        for (allowed, keep, part) in levels.chain(mixed) {
            let bytes = |f: &Footprint| {
                let (whole, least) = (f.whole(tokens, answers, keep), f.whole(tokens, answers, Keep::Input));
                least.max((whole as f64 * part) as usize).next_multiple_of(2)
            };
            let mut own = Emulator::new(&graph, batch.clone(), &allowed, bytes);
            let found = own.forward();
            let gradient = own.backward(&slopes);
            let what = format!("{name}, {allowed:?}, {:?}", own.arrangement.keep);
            let off = [distance(&found, &logps), distance(&gradient, exact.gradient())];
            assert!(off.iter().all(|d| *d < 1e-4), "{what}: log-probs and gradient are off by {off:?}");
        }
    }
}

/// A plan stays within its memory, and more memory never makes it slower.
#[test]
fn plans_use_what_there_is() {
    let registry = Registry::discover(&[]);
    let (family, config) = FAMILIES[0];
    let graph = registry.family(family).unwrap().graph(config).unwrap();
    let adapter = adapter(&graph, true).unwrap();
    let plan = |memory: usize| GpuPlan::new(&graph, &adapter, 3000, 0.6, Room::of(memory, 1), 1, Wishes::default());
    let least = (1..4096).map(|n| n << 20).find(|m| plan(*m).is_ok()).unwrap();
    let error = plan(least - (1 << 20)).unwrap_err().to_string();
    assert!(error.contains("3000 tokens") && error.contains("help: lower --max-length"), "{error}");
    let cost = |p: &GpuPlan| (1.0 + p.again) * (1.0 + LOST_TOKENS / p.micro_batch_tokens as f64);
    let mut before = f64::INFINITY;
    for memory in (0..40).map(|n| least + n * (16 << 20)) {
        let plan = plan(memory).unwrap();
        assert!(plan.total() <= memory, "{} of {memory}", plan.total());
        assert!(cost(&plan) <= before * 1.006, "more memory makes it slower: {plan}");
        before = cost(&plan);
    }
}

/// Layers that ranks share take a part of their bytes on each, and the places of two layers.
#[test]
fn a_shared_base_fits_where_a_whole_one_does_not() {
    let graph = Shape::Qwen25_7b.graph(&Registry::discover(&[])).unwrap();
    let adapter = adapter(&graph, true).unwrap();
    let plan =
        |ranks: usize| GpuPlan::new(&graph, &adapter, 2048, 0.6, Room::of(12 << 30, ranks), ranks, Wishes::default());
    let error = plan(1).unwrap_err().to_string();
    assert!(error.contains("weights 13.2 GiB"), "{error}");
    let shared = plan(4).unwrap();
    assert!(shared.total() <= 12 << 30);
    let rest = Lowered::new(&graph, &adapter).unwrap().rest(&graph).0;
    let layers = shared.whole - rest;
    let (expected, layer) = (layers / 4 + 2 * layers / graph.layers.len(), 28 * 4 * 256);
    assert!((shared.weights - rest).abs_diff(expected) <= layer, "{} of {}", shared.weights, shared.whole);
}
