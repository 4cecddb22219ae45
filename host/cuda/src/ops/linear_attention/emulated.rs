//! The steps of linear attention in f32, chunk by chunk as the kernels have them.

use super::super::super::segments::{Chunk, Chunks, From};
use super::super::Emulation;
use super::{CHUNK, LinearAttention, Slice};
use dpo_core::ops::answer_mask::AnswerMask;

/// Rows of some columns.
type Rows = Vec<Vec<f32>>;

/// What a head's tokens of a chunk are computed of: keys and queries times their factors, what a state is multiplied by, matrices.
struct Tokens {
    q: Rows,
    k: Rows,
    /// `e^G`, and `e^(G_end - G)`.
    from_start: Vec<f32>,
    to_end: Vec<f32>,
    sums: Vec<f32>,
    sees: Vec<Vec<bool>>,
    solve: Rows,
    scores: Rows,
}

/// A chunk of a head: its tokens, the state before it, what it writes, and its output.
struct Walked {
    chunk: Chunk,
    tokens: Tokens,
    state: Rows,
    written: Rows,
    out: Rows,
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [f32], by: f32, from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += by * from);
}

fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// `S x` or, of a row of values, what it gives: S is `[key, value]`.
fn read(state: &Rows, key: &[f32]) -> Vec<f32> {
    let mut value = vec![0.0; state[0].len()];
    state.iter().zip(key).for_each(|(row, k)| add(&mut value, *k, row));
    value
}

fn along(state: &Rows, value: &[f32]) -> Vec<f32> {
    state.iter().map(|row| dot(row, value)).collect()
}

fn scale(state: &mut Rows, by: f32) {
    state.iter_mut().flatten().for_each(|s| *s *= by);
}

fn write(state: &mut Rows, by: f32, key: &[f32], value: &[f32]) {
    state.iter_mut().zip(key).for_each(|(row, k)| add(row, by * k, value));
}

/// Which tokens of a chunk a token sees.
fn sees(on: &Emulation<'_>, chunk: &Chunk) -> Vec<Vec<bool>> {
    let spans = &on.batch().layout.spans;
    let span = spans.iter().find(|s| s.rows().contains(&chunk.row)).unwrap();
    let mask = AnswerMask::of(span, 0, 0);
    let of = |i: usize| (0..chunk.rows).map(|j| mask.sees(chunk.first + i, chunk.first + j)).collect();
    (0..chunk.rows).map(of).collect()
}

impl LinearAttention {
    fn share(&self) -> usize {
        self.heads / self.key_heads
    }

    fn vectors(&self, on: &Emulation<'_>) -> [Vec<f32>; 3] {
        self.vectors.map(|at| at.map(|at| on.vector(at)).unwrap_or_default())
    }

    /// A time step.
    fn step(&self, x: f32) -> f32 {
        softplus(x).max(self.limit[0]).min(self.limit[1])
    }

    fn zero(&self) -> Rows {
        vec![vec![0.0; self.kind.value]; self.kind.key]
    }

    /// Columns of a head.
    fn of_head(&self, s: &Slice, head: usize) -> Slice {
        s.part(head * self.kind.value, self.kind.value)
    }

    fn of_key(&self, s: &Slice, head: usize) -> Slice {
        s.part(head / self.share() * self.kind.key, self.kind.key)
    }

    pub(super) fn emulate_chunks(&self, on: &mut Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let [q, k, a, rest @ ..] = reads else { panic!("a recurrence lacks values") };
        let [a_log, dt_bias, _] = self.vectors(on);
        for chunk in Chunks::of(&on.batch().layout.clone()).all {
            let sees = sees(on, &chunk);
            for head in 0..self.heads {
                let of = |on: &Emulation<'_>, s: &Slice| -> Rows {
                    (0..chunk.rows).map(|i| on.row(&self.of_key(s, head), chunk.row + i)).collect()
                };
                let number = |on: &Emulation<'_>, s: &Slice, i: usize| on.row(&s.part(head, 1), chunk.row + i)[0];
                let (q, k) = (of(on, q), of(on, k));
                let norm = |x: &[f32]| (dot(x, x) + self.eps).powf(-0.5);
                let scale = (self.kind.key as f32).powf(-0.5);
                let norms: Vec<[f32; 2]> = q.iter().zip(&k).map(|(q, k)| [norm(q) * scale, norm(k)]).collect();
                let steps: Vec<f32> = (0..chunk.rows).map(|i| self.step(number(on, a, i) + dt_bias[head])).collect();
                let norms: Vec<[f32; 2]> = norms
                    .iter()
                    .zip(&steps)
                    .map(|(n, step)| if self.kind.solves { *n } else { [1.0, *step] })
                    .collect();
                let logs: Vec<f32> = steps.iter().map(|step| -a_log[head].exp() * step).collect();
                let sums: Vec<f32> =
                    sees.iter().map(|seen| seen.iter().zip(&logs).filter(|(s, _)| **s).map(|(_, l)| l).sum()).collect();
                let mut solve: Rows = Vec::new();
                for i in 0..chunk.rows {
                    let beta = rest.first().map_or(0.0, |b| sigmoid(number(on, b, i)));
                    let decay = |j: usize| if sees[i][j] { (sums[i] - sums[j]).exp() * norms[j][1] } else { 0.0 };
                    let (mut own, mut scores) = (vec![0.0; CHUNK], vec![0.0; CHUNK]);
                    own[i] = beta;
                    for j in 0..=i {
                        scores[j] = decay(j) * norms[i][0] * dot(&q[i], &k[j]);
                        if j < i {
                            add(&mut own, -beta * decay(j) * norms[i][1] * dot(&k[i], &k[j]), &solve[j]);
                        }
                    }
                    on.write(&writes[0].part(head * CHUNK, CHUNK), chunk.row + i, &scores);
                    *on.number(&writes[1], head, chunk.row + i) = sums[i];
                    *on.number(&writes[2], head, chunk.row + i) = norms[i][0];
                    *on.number(&writes[2], self.heads + head, chunk.row + i) = norms[i][1];
                    if let Some(to) = writes.get(3) {
                        on.write(&to.part(head * CHUNK, CHUNK), chunk.row + i, &own);
                    }
                    solve.push(own);
                }
            }
        }
    }

    /// Of q, k, then scores, decays, factors, and solving matrices where there are some.
    fn tokens(&self, on: &mut Emulation<'_>, chunk: &Chunk, head: usize, from: &[Slice]) -> Tokens {
        let rows =
            |on: &Emulation<'_>, s: &Slice| -> Rows { (0..chunk.rows).map(|i| on.row(s, chunk.row + i)).collect() };
        let [q, k, scores, decays, norms, solve @ ..] = from else { panic!("a recurrence lacks values") };
        let (mut q, mut k) = (rows(on, &self.of_key(q, head)), rows(on, &self.of_key(k, head)));
        let mut sums = Vec::new();
        for i in 0..chunk.rows {
            sums.push(*on.number(decays, head, chunk.row + i));
            for (of, which) in [(&mut q[i], 0), (&mut k[i], self.heads)] {
                let norm = *on.number(norms, which + head, chunk.row + i);
                of.iter_mut().for_each(|x| *x *= norm);
            }
        }
        let end = sums[chunk.rows - 1];
        Tokens {
            from_start: sums.iter().map(|s| s.exp()).collect(),
            to_end: sums.iter().map(|s| (end - s).exp()).collect(),
            sums,
            sees: sees(on, chunk),
            solve: solve.first().map_or_else(Vec::new, |s| rows(on, &s.part(head * CHUNK, CHUNK))),
            scores: rows(on, &scores.part(head * CHUNK, CHUNK)),
            q,
            k,
        }
    }

    /// What a chunk writes, and its output; the state before becomes the one behind.
    fn run(&self, t: &Tokens, values: &Rows, state: &mut Rows, skip: f32) -> [Rows; 2] {
        let rest = values.iter().enumerate().map(|(i, v)| {
            let mut rest = v.clone();
            add(&mut rest, -t.from_start[i], &read(state, &t.k[i]));
            rest
        });
        let rest: Rows = rest.collect();
        let sum = |weights: &[f32], of: &Rows| {
            let mut sum = vec![0.0; self.kind.value];
            of.iter().zip(weights).for_each(|(row, w)| add(&mut sum, *w, row));
            sum
        };
        let written: Rows = match self.kind.solves {
            true => t.solve.iter().map(|weights| sum(weights, &rest)).collect(),
            false => values.clone(),
        };
        let out = |i: usize| {
            let mut out = sum(&t.scores[i], &written);
            add(&mut out, t.from_start[i], &read(state, &t.q[i]));
            add(&mut out, skip, &values[i]);
            out
        };
        let out = (0..values.len()).map(out).collect();
        scale(state, t.from_start[values.len() - 1]);
        written.iter().enumerate().for_each(|(j, value)| write(state, t.to_end[j], &t.k[j], value));
        [written, out]
    }

    /// Walks of a head along every example.
    fn walk_head(&self, on: &mut Emulation<'_>, head: usize, v: &Slice, from: &[Slice]) -> Vec<Vec<Walked>> {
        let chunks = Chunks::of(&on.batch().layout.clone());
        let skip = self.vectors(on)[2].get(head).copied().unwrap_or(0.0);
        let mut all = Vec::new();
        for [first, count] in &chunks.walks {
            let (mut state, mut fork, mut walk) = (self.zero(), self.zero(), Vec::new());
            for chunk in &chunks.all[*first..first + count] {
                match chunk.from {
                    From::Prompt => state = fork.clone(),
                    From::Before => {}
                    From::Zero | From::Text => state = self.zero(),
                }
                let tokens = self.tokens(on, chunk, head, from);
                let values: Rows = (0..chunk.rows).map(|i| on.row(&self.of_head(v, head), chunk.row + i)).collect();
                let before = state.clone();
                let [written, out] = self.run(&tokens, &values, &mut state, skip);
                if chunk.first + chunk.rows == chunk.prompt {
                    fork = state.clone();
                }
                walk.push(Walked { chunk: *chunk, tokens, state: before, written, out });
            }
            all.push(walk);
        }
        all
    }

    pub(super) fn emulate_walk(&self, on: &mut Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let from: Vec<Slice> = reads[..2].iter().chain(&reads[3..]).copied().collect();
        for head in 0..self.heads {
            for Walked { chunk, out, .. } in self.walk_head(on, head, &reads[2], &from).into_iter().flatten() {
                let to = self.of_head(&writes[0], head);
                out.iter().enumerate().for_each(|(i, out)| on.write(&to, chunk.row + i, out));
            }
        }
    }

    pub(super) fn emulate_vjp(&self, on: &mut Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let [q, k, v, a, dy, made @ ..] = reads else { panic!("a recurrence lacks values") };
        let [dq, dk, dv, da, scratch @ ..] = writes else { panic!("a recurrence lacks gradients") };
        let count = if self.kind.solves { 4 } else { 3 };
        let (b, norms) = (made.get(count), &made[2]);
        let from: Vec<Slice> = [*q, *k].iter().chain(&made[..count]).copied().collect();
        let [a_log, dt_bias, skip] = self.vectors(on);
        // Written only when all is read: gradients may lie where values do.
        let mut shared = [dq, dk].map(|s| vec![vec![0.0; s.width]; on.rows()]);
        let mut own = [dv, da, da].map(|s| vec![vec![0.0; s.width]; on.rows()]);
        for head in 0..self.heads {
            let of_key = head / self.share() * self.kind.key;
            for walk in self.walk_head(on, head, v, &from) {
                let (mut dstate, mut dfork) = (self.zero(), self.zero());
                for Walked { chunk, tokens: t, state, written, .. } in walk.iter().rev() {
                    if chunk.first + chunk.rows == chunk.prompt {
                        dstate = dfork.clone();
                    }
                    let dout: Rows = (0..chunk.rows).map(|i| on.row(&self.of_head(dy, head), chunk.row + i)).collect();
                    let turned = |matrix: &Rows, of: &Rows, j: usize| {
                        let mut sum = vec![0.0; self.kind.value];
                        of.iter().enumerate().for_each(|(i, row)| add(&mut sum, matrix[i][j], row));
                        sum
                    };
                    let dwritten: Rows = (0..chunk.rows)
                        .map(|j| {
                            let mut d = turned(&t.scores, &dout, j);
                            add(&mut d, t.to_end[j], &read(&dstate, &t.k[j]));
                            d
                        })
                        .collect();
                    let dx: Rows = match self.kind.solves {
                        true => (0..chunk.rows).map(|j| turned(&t.solve, &dwritten, j)).collect(),
                        false => vec![vec![0.0; self.kind.value]; chunk.rows],
                    };
                    let (mut dq, mut dk) = (t.q.clone(), t.k.clone());
                    let (mut logs, mut of_steps) = (vec![0.0; chunk.rows], vec![0.0; chunk.rows]);
                    let mut end =
                        t.from_start[chunk.rows - 1] * state.iter().zip(&dstate).map(|(s, d)| dot(s, d)).sum::<f32>();
                    for i in 0..chunk.rows {
                        let n = |i: usize, j: usize| if t.sees[i][j] { (t.sums[i] - t.sums[j]).exp() } else { 0.0 };
                        dq[i] = along(state, &dout[i]).into_iter().map(|x| x * t.from_start[i]).collect();
                        let mut row: Vec<f32> =
                            along(state, &dx[i]).into_iter().map(|x| -x * t.from_start[i]).collect();
                        let mut column: Vec<f32> =
                            along(&dstate, &written[i]).into_iter().map(|x| x * t.to_end[i]).collect();
                        end += dot(&column, &t.k[i]);
                        for j in 0..chunk.rows {
                            add(&mut dq[i], n(i, j) * dot(&dout[i], &written[j]), &t.k[j]);
                            add(&mut column, n(j, i) * dot(&dout[j], &written[i]), &t.q[j]);
                            if i != j {
                                add(&mut row, -n(i, j) * dot(&dx[i], &written[j]), &t.k[j]);
                                add(&mut column, -n(j, i) * dot(&dx[j], &written[i]), &t.k[j]);
                            }
                        }
                        logs[i] = dot(&dq[i], &t.q[i]) + dot(&row, &t.k[i]) - dot(&column, &t.k[i]);
                        of_steps[i] = dot(&column, &t.k[i]);
                        dk[i] = row.iter().zip(&column).map(|(r, c)| r + c).collect();
                    }
                    logs[chunk.rows - 1] += end;
                    for i in 0..chunk.rows {
                        let r = chunk.row + i;
                        let log: f32 = (i..chunk.rows).filter(|later| t.sees[*later][i]).map(|later| logs[later]).sum();
                        let x = on.row(&a.part(head, 1), r)[0] + dt_bias[head];
                        let mut by_step = -log * a_log[head].exp();
                        let to = &mut own[0][r][head * self.kind.value..][..self.kind.value];
                        if let Some(b) = b {
                            let beta = sigmoid(on.row(&b.part(head, 1), r)[0]);
                            to.copy_from_slice(&dx[i]);
                            own[2][r][head] = dot(&dx[i], &written[i]) * (1.0 - beta) / beta;
                        } else {
                            to.copy_from_slice(&dwritten[i]);
                            add(to, skip[head], &dout[i]);
                            let free = self.step(x) == softplus(x);
                            by_step = if free { by_step + of_steps[i] / self.step(x) } else { 0.0 };
                        }
                        own[1][r][head] = by_step * sigmoid(x);
                        // Through the norms.
                        let scale = (self.kind.key as f32).powf(-0.5);
                        for (which, (unit, d), length) in [(0, (&t.q[i], &dq[i]), scale), (1, (&t.k[i], &dk[i]), 1.0)] {
                            let norm = *on.number(norms, which * self.heads + head, r);
                            let pull = if self.kind.solves { dot(unit, d) / (length * length) } else { 0.0 };
                            let to = &mut shared[which][r][of_key..][..self.kind.key];
                            to.iter_mut().zip(unit.iter().zip(d)).for_each(|(to, (u, d))| *to += norm * (d - u * pull));
                        }
                    }
                    scale(&mut dstate, t.from_start[chunk.rows - 1]);
                    for i in 0..chunk.rows {
                        write(&mut dstate, t.from_start[i], &t.q[i], &dout[i]);
                        write(&mut dstate, -t.from_start[i], &t.k[i], &dx[i]);
                    }
                    if chunk.from == From::Prompt {
                        dfork.iter_mut().zip(&dstate).for_each(|(sum, own)| add(sum, 1.0, own));
                        dstate = self.zero();
                    }
                }
            }
        }
        // What the kernels leave there is of no further use.
        for part in scratch.iter().filter(|part| part.width > da.width) {
            (0..on.rows()).for_each(|row| on.write(part, row, &vec![f32::NAN; part.width]));
        }
        for (to, rows) in [dq, dk].into_iter().zip(&shared).chain([dv, da].into_iter().chain(scratch.get(2)).zip(&own))
        {
            rows.iter().enumerate().for_each(|(row, values)| on.write(to, row, values));
        }
    }
}
