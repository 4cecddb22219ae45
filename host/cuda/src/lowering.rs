//! From a block's nodes to a [`Program`]: which linears are one product, where every value and every gradient lies.

use dpo_plugin_api::graph::{Block, Node};
use serde_json::Value as Json;

use super::program::{Attention, Buffer, GRADIENT, Group, INPUT, Member, OUTPUT, Op, Program, Slice, padded};
use dpo_core::error::{Error, Result};
use dpo_core::ops::{count, number};

impl Program {
    /// Lowers the nodes of a block, but for `lm_head`. `rank` is what an adapted linear has (a multiple of 8); `room` is how many low-rank
    /// columns lie behind the values that go from block to block.
    pub(super) fn lower(
        block: &Block,
        hidden: usize,
        rank: usize,
        room: usize,
        adapted: &dyn Fn(usize) -> bool,
    ) -> Result<Program> {
        let edge = Buffer::Columns(padded(hidden + room));
        let nodes = block.nodes.len() - usize::from(block.nodes.last().is_some_and(|n| n.op == "lm_head"));
        let output = if nodes < block.nodes.len() { block.nodes[nodes].inputs[0] } else { block.output };
        let mut lowering = Lowering {
            nodes: &block.nodes[..nodes],
            output,
            homes: vec![None; nodes + 1],
            group_of: vec![None; nodes],
            absorbed: vec![None; nodes],
            gradients: vec![None; nodes + 1],
            gradient_buffers: Vec::new(),
            room,
            widths: vec![hidden; 3],
            program: Program { buffers: vec![edge; 3], groups: Vec::new(), forward: Vec::new(), backward: Vec::new() },
        };
        lowering.homes[0] = Some(Slice { buffer: INPUT, column: 0, width: hidden });
        lowering.find_groups(rank, adapted);
        for index in 0..nodes {
            lowering.forward(index)?;
        }
        let home = lowering.home(output)?;
        if home.buffer != OUTPUT {
            let y = Slice { buffer: OUTPUT, column: 0, width: home.width };
            lowering.program.forward.push(Op::Copy { a: home, y });
        }
        let whole = Slice { buffer: GRADIENT, column: 0, width: hidden };
        lowering.gradients[output] = Some(whole);
        for index in (0..nodes).rev() {
            lowering.backward(index)?;
        }
        match lowering.gradients[0] {
            Some(is) if is == whole => {}
            Some(is) => lowering.program.backward.push(Op::Copy { a: is, y: whole }),
            None => return Err(Error::input(format!("block '{}' does not read its input", block.name))),
        }
        Ok(lowering.program)
    }
}

struct Lowering<'a> {
    nodes: &'a [Node],
    output: usize,
    /// Where every value lies.
    homes: Vec<Option<Slice>>,
    /// Of every node that is a linear, its group and its place in it.
    group_of: Vec<Option<(usize, usize)>>,
    /// Of every `add` that a product does, the linear.
    absorbed: Vec<Option<usize>>,
    /// Where the gradient of every value lies that has one.
    gradients: Vec<Option<Slice>>,
    /// Of every group of several linears, the buffer of its outputs' gradient.
    gradient_buffers: Vec<Option<usize>>,
    room: usize,
    /// Of every buffer, the columns of its value, without those behind it.
    widths: Vec<usize>,
    program: Program,
}

impl Lowering<'_> {
    fn consumers(&self, value: usize) -> impl Iterator<Item = usize> + '_ {
        self.nodes.iter().enumerate().filter(move |(_, n)| n.inputs.contains(&value)).map(|(i, _)| i)
    }

    fn only_consumer(&self, value: usize) -> Option<usize> {
        let mut all = self.consumers(value);
        let first = all.next()?;
        (all.next().is_none() && value != self.output).then_some(first)
    }

    fn find_groups(&mut self, rank: usize, adapted: &dyn Fn(usize) -> bool) {
        for (index, node) in self.nodes.iter().enumerate().filter(|(_, n)| n.op == "linear") {
            let known = self.program.groups.iter().position(|g| self.nodes[g.members[0].node].inputs == node.inputs);
            let at = known.unwrap_or_else(|| {
                let nowhere = Slice { buffer: 0, column: 0, width: 0 };
                self.program.groups.push(Group {
                    members: Vec::new(),
                    inputs: node.weights[0].shape[1],
                    outputs: 0,
                    rank: 0,
                    bias: false,
                    x: nowhere,
                    y: nowhere,
                    residual: None,
                });
                self.program.groups.len() - 1
            });
            let group = &mut self.program.groups[at];
            group.members.push(Member {
                node: index,
                column: group.outputs,
                rank_column: group.rank,
                width: node.width,
            });
            group.outputs += node.width;
            group.rank += if adapted(index) { rank } else { 0 };
            group.bias |= node.weights.iter().any(|w| w.role == "bias");
            self.group_of[index] = Some((at, group.members.len() - 1));
        }
        for group in &self.program.groups {
            let [only] = group.members.as_slice() else { continue };
            let Some(add) = self.only_consumer(only.node + 1).filter(|c| self.nodes[*c].op == "add") else { continue };
            let other = self.nodes[add].inputs.iter().copied().find(|v| *v != only.node + 1);
            if other.is_some_and(|v| v <= only.node) {
                self.absorbed[add] = Some(only.node);
            }
        }
        self.gradient_buffers = vec![None; self.program.groups.len()];
    }

    /// A buffer for a value, with room for low-rank columns behind it.
    fn buffer(&mut self, width: usize, room: usize) -> usize {
        self.program.buffers.push(Buffer::Columns(padded(width + room)));
        self.widths.push(width);
        self.program.buffers.len() - 1
    }

    fn numbers(&mut self, heads: usize) -> usize {
        self.program.buffers.push(Buffer::Heads(heads));
        self.widths.push(0);
        self.program.buffers.len() - 1
    }

    /// Low-rank columns behind a value: those of the group that reads it.
    fn room_behind(&self, value: usize) -> usize {
        let group = self.consumers(value).find_map(|c| self.group_of[c]);
        group.map_or(0, |(g, _)| self.program.groups[g].rank)
    }

    fn new_home(&mut self, value: usize, width: usize) -> Slice {
        let buffer = if value == self.output { OUTPUT } else { self.buffer(width, self.room_behind(value)) };
        let home = Slice { buffer, column: 0, width };
        self.homes[value] = Some(home);
        home
    }

    fn home(&self, value: usize) -> Result<Slice> {
        self.homes[value].ok_or_else(|| Error::run(format!("value {value} of a block is read before it is made")))
    }

    /// Whether a slice is all of its buffer, with `room` columns behind it.
    fn has_room(&self, slice: Slice, room: usize) -> bool {
        let Buffer::Columns(columns) = self.program.buffers[slice.buffer] else { return false };
        room == 0 || (slice.width == self.widths[slice.buffer] && slice.width + room <= columns)
    }

    fn forward(&mut self, index: usize) -> Result<()> {
        let node = &self.nodes[index];
        let value = index + 1;
        let eight = |what: &str, n: usize| {
            if n.is_multiple_of(8) {
                Ok(n)
            } else {
                Err(Error::input(format!("op '{}': {what} {n} is not a multiple of 8, which CUDA needs", node.op))
                    .help("train with --device cpu"))
            }
        };
        eight("width", node.width)?;
        match node.op.as_str() {
            "linear" => self.linear(index)?,
            "add" if self.absorbed[index].is_some() => {}
            "add" => {
                let (a, b) = (self.home(node.inputs[0])?, self.home(node.inputs[1])?);
                let y = self.new_home(value, node.width);
                self.program.forward.push(Op::Add { a, b, y });
            }
            "rms_norm" => {
                let x = self.home(node.inputs[0])?;
                let dim = eight("norm of", node.weights[0].shape[0])?;
                let y = self.new_home(value, node.width);
                self.program.forward.push(Op::Norm { node: index, x, y, dim, eps: number(node, "eps") as f32 });
            }
            "rope" => {
                let from = node.inputs[0];
                let mut x = self.home(from)?;
                let maker = from.checked_sub(1).map(|m| self.nodes[m].op.as_str());
                let free = self.only_consumer(from).is_some() && matches!(maker, Some("linear" | "rms_norm"));
                if !free || value == self.output {
                    let y = self.new_home(value, node.width);
                    self.program.forward.push(Op::Copy { a: x, y });
                    x = y;
                }
                self.homes[value] = Some(x);
                let dim = count(node, "head_dim");
                if !dim.is_multiple_of(16) {
                    return Err(Error::input(format!("rope of heads of {dim} columns: CUDA needs a multiple of 16")));
                }
                self.program.forward.push(Op::Rope { node: index, x, dim, back: false });
            }
            "attention" => {
                let a = attention(node);
                let of = |i: usize| self.home(node.inputs[i]);
                let (q, k, v) = (of(0)?, of(1)?, of(2)?);
                let out = self.new_home(value, node.width);
                let lse = self.numbers(a.heads);
                self.program.forward.push(Op::Attend { a, q, k, v, out, lse });
            }
            "glu" => {
                let (gate, up) = (self.home(node.inputs[0])?, self.home(node.inputs[1])?);
                let y = self.new_home(value, node.width);
                self.program.forward.push(Op::Glu { kind: activation(node)?, gate, up, y });
            }
            other => {
                return Err(Error::input(format!("op '{other}' has no CUDA kernel")).help("train with --device cpu"));
            }
        }
        Ok(())
    }

    fn linear(&mut self, index: usize) -> Result<()> {
        let Some((at, place)) = self.group_of[index] else { return Err(Error::run("a linear without a group")) };
        if place > 0 {
            return Ok(());
        }
        let group = self.program.groups[at].clone();
        let mut x = self.home(self.nodes[index].inputs[0])?;
        if !x.width.is_multiple_of(8) {
            return Err(Error::input(format!("a linear reads {} columns; CUDA needs a multiple of 8", x.width)));
        }
        if !self.has_room(x, group.rank) {
            let y = Slice { buffer: self.buffer(x.width, group.rank), column: 0, width: x.width };
            self.program.forward.push(Op::Copy { a: x, y });
            x = y;
        }
        let add = self.absorbed.iter().position(|a| *a == Some(index));
        let (y, residual) = match add {
            Some(add) => {
                let other = self.nodes[add].inputs.iter().copied().find(|v| *v != index + 1);
                (self.new_home(add + 1, group.outputs), other.map(|v| self.home(v)).transpose()?)
            }
            None if group.members.len() == 1 => (self.new_home(index + 1, group.outputs), None),
            None => {
                // Behind the outputs there is room for their gradient's low-rank columns.
                let buffer = self.buffer(group.outputs, group.rank);
                (Slice { buffer, column: 0, width: group.outputs }, None)
            }
        };
        if group.members.len() > 1 {
            for member in &group.members {
                let home = Slice { buffer: y.buffer, column: member.column, width: member.width };
                self.homes[member.node + 1] = Some(home);
            }
        }
        let own = &mut self.program.groups[at];
        (own.x, own.y, own.residual) = (x, y, residual);
        if group.rank > 0 {
            self.program.forward.push(Op::Down { group: at });
        }
        self.program.forward.push(Op::Product { group: at });
        Ok(())
    }

    /// Where the gradient of a value is written that has none yet.
    fn destination(&mut self, value: usize) -> Slice {
        let maker = value.checked_sub(1);
        let width = self.homes[value].map_or_else(|| self.nodes[value - 1].width, |h| h.width);
        match maker.map(|m| self.nodes[m].op.as_str()) {
            Some("rope") => self.destination(self.nodes[value - 1].inputs[0]),
            Some("linear")
                if self.group_of[value - 1].is_some_and(|(g, _)| self.program.groups[g].members.len() > 1) =>
            {
                let (at, place) = self.group_of[value - 1].unwrap_or_default();
                let (outputs, rank) = (self.program.groups[at].outputs, self.program.groups[at].rank);
                let buffer = match self.gradient_buffers[at] {
                    Some(buffer) => buffer,
                    None => self.buffer(outputs, rank),
                };
                self.gradient_buffers[at] = Some(buffer);
                Slice { buffer, column: self.program.groups[at].members[place].column, width }
            }
            Some("linear" | "add") => Slice { buffer: self.buffer(width, self.room), column: 0, width },
            _ => Slice { buffer: self.buffer(width, 0), column: 0, width },
        }
    }

    /// A further part of a value's gradient: what is added to, and where the sum goes. That is the same place unless
    /// another value's gradient lies there too, or one that is being `read`.
    fn accumulated(&mut self, value: usize, read: Option<Slice>) -> (Option<Slice>, Slice) {
        let (before, to) = match self.gradients[value] {
            None => (None, self.destination(value)),
            Some(before) => {
                let overlaps = |g: Slice| {
                    g.buffer == before.buffer
                        && g.column < before.column + before.width
                        && before.column < g.column + g.width
                };
                let others = self.gradients.iter().enumerate().filter(|(v, _)| *v != value).filter_map(|(_, g)| *g);
                let to = if others.chain(read).any(overlaps) { self.destination(value) } else { before };
                (Some(before), to)
            }
        };
        self.gradients[value] = Some(to);
        (before, to)
    }

    /// Gives a value a gradient by a kernel that cannot add; `write` makes the op for a place.
    fn written(&mut self, value: usize) -> (Slice, Option<Op>) {
        let (before, to) = self.accumulated(value, None);
        match before {
            None => (to, None),
            Some(before) => {
                let part = Slice { buffer: self.buffer(to.width, 0), column: 0, width: to.width };
                (part, Some(Op::Add { a: before, b: part, y: to }))
            }
        }
    }

    fn backward(&mut self, index: usize) -> Result<()> {
        let node = self.nodes[index].clone();
        if node.op == "linear" {
            return self.linear_backward(index);
        }
        // A value that nothing reads has no gradient, and neither has what made it.
        let Some(dy) = self.gradients[index + 1].take() else { return Ok(()) };
        let inputs: Vec<Slice> = node.inputs.iter().map(|v| self.home(*v)).collect::<Result<_>>().or_else(|e| {
            // What an absorbed `add` adds has no home of its own and is not read.
            if node.op == "add" { Ok(Vec::new()) } else { Err(e) }
        })?;
        let mut after = Vec::new();
        let op = match node.op.as_str() {
            "add" => {
                for value in node.inputs {
                    self.pass_on(value, dy);
                }
                return Ok(());
            }
            "rms_norm" => {
                let (before, dx) = self.accumulated(node.inputs[0], None);
                let dim = node.weights[0].shape[0];
                Op::NormVjp { node: index, x: inputs[0], dy, before, dx, dim, eps: number(&node, "eps") as f32 }
            }
            "rope" => {
                let dim = count(&node, "head_dim");
                self.program.backward.push(Op::Rope { node: index, x: dy, dim, back: true });
                self.pass_on(node.inputs[0], dy);
                return Ok(());
            }
            "attention" => {
                let Some(Op::Attend { a, q, k, v, out, lse }) =
                    self.program.forward.iter().find(|o| matches!(o, Op::Attend { q, .. } if *q == inputs[0])).cloned()
                else {
                    return Err(Error::run("an attention without its forward pass"));
                };
                let delta = self.numbers(a.heads);
                let mut d = [dy; 3];
                for (place, value) in d.iter_mut().zip(&node.inputs) {
                    let (to, add) = self.written(*value);
                    *place = to;
                    after.extend(add);
                }
                let width = a.heads * a.dim;
                let mut part = || Slice { buffer: self.buffer(width, 0), column: 0, width };
                let parts = (a.heads > a.kv_heads).then(|| [part(), part()]);
                Op::AttendVjp { a, q, k, v, out, lse, delta, dout: dy, d, parts }
            }
            "glu" => {
                self.reuse_outputs(node.inputs[0], node.inputs[1]);
                let mut d = [dy; 2];
                for (place, value) in d.iter_mut().zip(&node.inputs) {
                    let (to, add) = self.written(*value);
                    *place = to;
                    after.extend(add);
                }
                Op::GluVjp { kind: activation(&node)?, gate: inputs[0], up: inputs[1], dy, d }
            }
            other => return Err(Error::run(format!("op '{other}' has no CUDA kernel"))),
        };
        self.program.backward.push(op);
        self.program.backward.extend(after);
        Ok(())
    }

    /// Gate and up are read for the last time where their gradients are made: those may take their place.
    fn reuse_outputs(&mut self, gate: usize, up: usize) {
        let group = |value: usize| value.checked_sub(1).and_then(|m| self.group_of[m]).map(|(g, _)| g);
        let (Some(at), Some(other)) = (group(gate), group(up)) else { return };
        let alone = |v: usize| self.only_consumer(v).is_some();
        let whole = at == other && gate != up && self.program.groups[at].members.len() == 2;
        if whole && alone(gate) && alone(up) && self.gradient_buffers[at].is_none() {
            self.gradient_buffers[at] = Some(self.program.groups[at].y.buffer);
        }
    }

    /// Passes a gradient on to a value as it is.
    fn pass_on(&mut self, value: usize, dy: Slice) {
        if self.gradients[value].is_some() {
            if let (Some(a), y) = self.accumulated(value, None) {
                self.program.backward.push(Op::Add { a, b: dy, y });
            }
            return;
        }
        let stacked = value.checked_sub(1).and_then(|m| self.group_of[m]);
        if stacked.is_some_and(|(g, _)| self.program.groups[g].members.len() > 1) {
            let y = self.destination(value);
            if y != dy {
                self.program.backward.push(Op::Copy { a: dy, y });
            }
            self.gradients[value] = Some(y);
        } else {
            self.gradients[value] = Some(dy);
        }
    }

    fn linear_backward(&mut self, index: usize) -> Result<()> {
        let Some((at, 0)) = self.group_of[index] else { return Ok(()) };
        let group = self.program.groups[at].clone();
        let gradients: Vec<Option<Slice>> = group.members.iter().map(|m| self.gradients[m.node + 1].take()).collect();
        if gradients.iter().all(Option::is_none) {
            return Ok(());
        }
        if gradients.iter().any(Option::is_none) {
            return Err(Error::input("a linear's output is not read, but that of another with the same input is"));
        }
        let dy = match (gradients.as_slice(), self.gradient_buffers[at]) {
            ([Some(only)], _) if self.has_room(*only, group.rank) => *only,
            ([Some(only)], _) => {
                let y = Slice { buffer: self.buffer(only.width, group.rank), column: 0, width: only.width };
                self.program.backward.push(Op::Copy { a: *only, y });
                y
            }
            (_, Some(buffer)) => Slice { buffer, column: 0, width: group.outputs },
            _ => return Err(Error::run("a group of linears has no place for its gradient")),
        };
        let (before, dx) = self.accumulated(self.nodes[index].inputs[0], Some(dy));
        self.program.backward.push(Op::ProductVjp { group: at, dy, before, dx });
        Ok(())
    }
}

fn attention(node: &Node) -> Attention {
    Attention {
        heads: count(node, "heads"),
        kv_heads: count(node, "kv_heads"),
        dim: count(node, "head_dim"),
        scale: number(node, "scale") as f32,
        window: count(node, "window"),
        softcap: number(node, "softcap") as f32,
    }
}

fn activation(node: &Node) -> Result<i32> {
    let name = node.attrs.get("activation").and_then(Json::as_str).unwrap_or_default();
    let known = ["silu", "gelu", "gelu_tanh"].iter().position(|n| *n == name);
    known.map(|n| n as i32).ok_or_else(|| Error::input(format!("activation '{name}' has no CUDA kernel")))
}
