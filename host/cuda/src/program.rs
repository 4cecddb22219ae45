//! A block as a list of operations on buffers: what runs forward, and what runs backward.
//!
//! Linears that read the same value become one product with stacked weights `[[W, s·B], [A, 0]]`: A gives the low-rank
//! columns `u` that lie behind the input's columns, and `[x, u] · [W, s·B]ᵀ` is the adapted output in one product. Backward,
//! `v = dy · s·B` lies behind the gradient's columns and `[dy, v] · [W; A]` is the input's gradient. An `add` after a linear
//! is the product's own addition.

use super::kernels::Heads;
use dpo_plugin_api::graph::{Block, Node};

/// The block's input, its output, and the gradient that goes from block to block.
pub(super) const INPUT: usize = 0;
pub(super) const OUTPUT: usize = 1;
pub(super) const GRADIENT: usize = 2;

/// Columns of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slice {
    pub buffer: usize,
    pub column: usize,
    pub width: usize,
}

/// What one token takes in a buffer.
#[derive(Clone, Copy, Debug)]
pub(super) enum Buffer {
    /// bf16 columns.
    Columns(usize),
    /// An f32 for every head; heads are rows.
    Heads(usize),
}

/// Linears with one input.
#[derive(Clone, Debug)]
pub(super) struct Group {
    pub members: Vec<Member>,
    pub inputs: usize,
    pub outputs: usize,
    /// Low-rank columns of all members, 0 where none is adapted.
    pub rank: usize,
    pub bias: bool,
    pub x: Slice,
    pub y: Slice,
    /// What the product adds.
    pub residual: Option<Slice>,
}

/// A linear of a group.
#[derive(Clone, Debug)]
pub(super) struct Member {
    pub node: usize,
    /// Its first column among the outputs and among the low-rank columns.
    pub column: usize,
    pub rank_column: usize,
    pub width: usize,
}

/// Numbers of an attention.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attention {
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub scale: f32,
    /// 0 is none.
    pub window: usize,
    /// 0 is none.
    pub softcap: f32,
}

impl Attention {
    /// What its kernels are compiled for.
    pub(super) fn kernels(&self) -> Heads {
        Heads { dim: self.dim, softcap: self.softcap > 0.0 }
    }
}

/// One operation.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Norm {
        node: usize,
        x: Slice,
        y: Slice,
        dim: usize,
        eps: f32,
    },
    NormVjp {
        node: usize,
        x: Slice,
        dy: Slice,
        before: Option<Slice>,
        dx: Slice,
        dim: usize,
        eps: f32,
    },
    /// In place; backward turns back.
    Rope {
        node: usize,
        x: Slice,
        dim: usize,
        back: bool,
    },
    /// The low-rank columns behind `x`.
    Down {
        group: usize,
    },
    Product {
        group: usize,
    },
    ProductVjp {
        group: usize,
        dy: Slice,
        before: Option<Slice>,
        dx: Slice,
    },
    Attend {
        a: Attention,
        q: Slice,
        k: Slice,
        v: Slice,
        out: Slice,
        lse: usize,
    },
    AttendVjp {
        a: Attention,
        q: Slice,
        k: Slice,
        v: Slice,
        out: Slice,
        lse: usize,
        delta: usize,
        dout: Slice,
        d: [Slice; 3],
        /// What every query head gives to dk and dv, where several share a key head.
        parts: Option<[Slice; 2]>,
    },
    Glu {
        kind: i32,
        gate: Slice,
        up: Slice,
        y: Slice,
    },
    /// `d` may be `gate` and `up`.
    GluVjp {
        kind: i32,
        gate: Slice,
        up: Slice,
        dy: Slice,
        d: [Slice; 2],
    },
    Add {
        a: Slice,
        b: Slice,
        y: Slice,
    },
    Copy {
        a: Slice,
        y: Slice,
    },
}

/// A lowered block.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub buffers: Vec<Buffer>,
    pub groups: Vec<Group>,
    pub forward: Vec<Op>,
    /// Reads buffers of the forward pass; [`Program::replayed`] adds what computes those that were not kept.
    pub backward: Vec<Op>,
}

impl Buffer {
    /// Bytes a token takes.
    pub(super) fn bytes(self) -> usize {
        match self {
            Buffer::Columns(n) => n * 2,
            Buffer::Heads(n) => n * 4,
        }
    }
}

impl Op {
    /// Buffers that are read, then those that are written.
    pub(super) fn touches(&self, groups: &[Group]) -> (Vec<usize>, Vec<usize>) {
        let of = |slices: &[Slice]| slices.iter().map(|s| s.buffer).collect::<Vec<_>>();
        match self {
            Op::Norm { x, y, .. } => (of(&[*x]), of(&[*y])),
            Op::NormVjp { x, dy, before, dx, .. } => (of(&[*x, *dy, before.unwrap_or(*x)]), of(&[*dx])),
            Op::Rope { x, .. } => (of(&[*x]), of(&[*x])),
            Op::Down { group } => (of(&[groups[*group].x]), of(&[groups[*group].x])),
            Op::Product { group } => {
                let g = &groups[*group];
                (of(&[g.x, g.residual.unwrap_or(g.x)]), of(&[g.y]))
            }
            Op::ProductVjp { group, dy, before, dx } => {
                (of(&[groups[*group].x, *dy, before.unwrap_or(*dy)]), of(&[*dx, *dy]))
            }
            Op::Attend { q, k, v, out, lse, .. } => (of(&[*q, *k, *v]), vec![out.buffer, *lse]),
            Op::AttendVjp { q, k, v, out, lse, delta, dout, d, parts, .. } => {
                let mut reads = of(&[*q, *k, *v, *out, *dout]);
                reads.push(*lse);
                let mut writes = of(d);
                writes.push(*delta);
                writes.extend(of(parts.as_ref().map_or(&[], |p| p)));
                (reads, writes)
            }
            Op::Glu { gate, up, y, .. } => (of(&[*gate, *up]), of(&[*y])),
            Op::GluVjp { gate, up, dy, d, .. } => (of(&[*gate, *up, *dy]), of(d)),
            Op::Add { a, b, y } => (of(&[*a, *b]), of(&[*y])),
            Op::Copy { a, y } => (of(&[*a]), of(&[*y])),
        }
    }

    /// Whether it costs about as much as reading and writing its values.
    fn cheap(&self) -> bool {
        matches!(
            self,
            Op::Norm { .. } | Op::Glu { .. } | Op::Add { .. } | Op::Copy { .. } | Op::Down { .. } | Op::Rope { .. }
        )
    }

    /// What a profile calls it.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Op::Norm { .. } => "norm",
            Op::NormVjp { .. } => "norm vjp",
            Op::Rope { .. } => "rope",
            Op::Down { .. } => "low-rank",
            Op::Product { .. } => "product",
            Op::ProductVjp { .. } => "product vjp",
            Op::Attend { .. } => "attention",
            Op::AttendVjp { .. } => "attention dq",
            Op::Glu { .. } => "glu",
            Op::GluVjp { .. } => "glu vjp",
            Op::Add { .. } | Op::Copy { .. } => "add, copy",
        }
    }
}

/// What of a layer is kept for its backward pass; the rest is computed again. From most to least memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
pub enum Keep {
    /// Everything that is read.
    All,
    /// All but what element-wise ops make.
    Products,
    /// Also not the widest products (gate and up).
    Narrow,
    /// Only the block's input.
    Input,
}

impl Keep {
    pub const ALL: [Keep; 4] = [Keep::All, Keep::Products, Keep::Narrow, Keep::Input];
}

impl Program {
    /// Low-rank columns behind the values that groups of a block read or write.
    pub(super) fn room(block: &Block, rank: usize) -> usize {
        let linears = block.nodes.iter().filter(|n| n.op == "linear");
        let same = |n: &Node| block.nodes.iter().filter(|o| o.op == "linear" && o.inputs == n.inputs).count();
        linears.map(same).max().unwrap_or(0) * rank
    }

    /// Buffers of the forward pass that are kept.
    pub(super) fn kept(&self, keep: Keep) -> Vec<bool> {
        let forward: Vec<_> = self.forward.iter().map(|o| o.touches(&self.groups)).collect();
        let made = |buffer: usize| forward.iter().any(|(_, writes)| writes.contains(&buffer));
        let needed = |buffer: usize| {
            buffer > GRADIENT
                && made(buffer)
                && self.backward.iter().any(|o| o.touches(&self.groups).0.contains(&buffer))
        };
        let makers = |buffer: usize| {
            self.forward.iter().zip(&forward).filter(move |(_, (_, w))| w.contains(&buffer)).map(|(o, _)| o)
        };
        let wide = |buffer: usize| {
            let limit = 4 * self.buffers[INPUT].bytes();
            makers(buffer).any(|o| matches!(o, Op::Product { .. })) && self.buffers[buffer].bytes() > limit
        };
        let keeps = |buffer: usize| {
            needed(buffer)
                && match keep {
                    Keep::All => true,
                    Keep::Products => !makers(buffer).all(Op::cheap),
                    Keep::Narrow => !makers(buffer).all(Op::cheap) && !wide(buffer),
                    Keep::Input => false,
                }
        };
        (0..self.buffers.len()).map(keeps).collect()
    }

    /// The backward pass, with what computes the buffers again that were not kept.
    pub(super) fn replayed(&self, kept: &[bool]) -> Vec<Op> {
        let mut ready = kept.to_vec();
        ready[INPUT] = true;
        let mut ops = Vec::new();
        for op in &self.backward {
            for buffer in op.touches(&self.groups).0 {
                self.ensure(buffer, &mut ready, &mut ops);
            }
            ops.push(op.clone());
        }
        ops
    }

    fn ensure(&self, buffer: usize, ready: &mut Vec<bool>, ops: &mut Vec<Op>) {
        if ready[buffer] {
            return;
        }
        ready[buffer] = true;
        for op in &self.forward {
            let (reads, writes) = op.touches(&self.groups);
            if writes.contains(&buffer) {
                reads.iter().for_each(|r| self.ensure(*r, ready, ops));
                ops.push(op.clone());
            }
        }
    }
}

/// Columns are padded so that rows begin at sectors of the device's memory.
pub(super) fn padded(columns: usize) -> usize {
    columns.next_multiple_of(16)
}
