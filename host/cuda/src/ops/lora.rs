//! Gradients of LoRA's matrices where ranks are small. Such products take the time in which their wide matrix is read: these kernels
//! read the gradient of a linear's output once, for `v = dy·s·B` and `dB = uᵀ·dy`, and its input once, for `dA = vᵀ·x`.

use super::attention::most_shared;
use super::{Address, Args, Launch, Source, Variant, View, WORKSPACE};
use dpo_core::error::Result;

pub(super) static SOURCE: Source = Source {
    waits: true,
    variants: Some(variants),
    ..Source::plain(
        "lora",
        concat!(include_str!("mma.cuh"), include_str!("lora.cu")),
        &["lora_vjp_b", "lora_vjp_a", "lora_sum", "lora_add"],
    )
};

/// Columns of the wide matrix that a block has, and tokens of its step.
#[derive(Clone, Copy)]
struct Block {
    columns: usize,
    tokens: usize,
}

const VJP_B: Block = Block { columns: 512, tokens: 16 };
const VJP_A: Block = Block { columns: 256, tokens: 32 };
const THREADS: usize = 256;
const STAGES: usize = 3;

/// Bytes of the parts of a gradient, at most. There are two of them; the rest of the workspace is for the parts of v.
const PARTS: usize = WORKSPACE / 3;

/// Linears with one input, and the LoRA rank of them all.
#[derive(Clone, Copy)]
pub(super) struct Lora {
    pub inputs: usize,
    pub outputs: usize,
    pub rank: usize,
}

/// Matrices that a vjp reads and writes: `x` `[tokens, inputs]` with `u` behind it, `dy` `[tokens, outputs]` with `v` behind it, `sb`
/// `[outputs, rank]`, and the f32 gradients of A `[rank, inputs]` and B `[rank, outputs]`.
pub(super) struct Matrices {
    pub x: View,
    pub dy: View,
    pub sb: View,
    pub gradients: [Address; 2],
}

/// How a wide matrix is cut: blocks of columns, and ranges of tokens.
#[derive(Clone, Copy)]
struct Cut {
    blocks: usize,
    ranges: usize,
}

/// The widest rank that has kernels. Above it the library's products are faster: on cards whose memory is fast for its number of
/// multiprocessors that is where a multiprocessor has room for a single block.
fn widest(capability: u32) -> usize {
    match capability {
        80 | 90 | 100 | 103 => ONE_BLOCK,
        _ => 32,
    }
}

/// Up to this rank a multiprocessor has registers for two blocks of `lora_vjp_b`.
const ONE_BLOCK: usize = 24;

impl Lora {
    /// Whether there are kernels for it.
    pub(super) fn has_kernels(self, capability: u32) -> bool {
        self.rank > 0 && self.rank <= widest(capability) && self.gradient(self.inputs.max(self.outputs)) <= PARTS
    }

    /// Its kernels, if there are any.
    pub(super) fn variant(self, capability: u32) -> Option<Variant> {
        self.has_kernels(capability).then(|| variant(self.rank))
    }

    /// Adds to the gradients, and writes `v`: as many tokens at a time as the workspace has room for.
    pub(super) fn vjp(self, on: &Launch<'_>, matrices: &Matrices) -> Result<()> {
        let [a, b] = self.cuts(on);
        let tokens = self.most_tokens(a, b);
        (0..on.rows).step_by(tokens).try_for_each(|first| {
            let Matrices { x, dy, .. } = *matrices;
            let part = Matrices { x: x.row(first), dy: dy.row(first), ..*matrices };
            self.vjp_of(on, &part, tokens.min(on.rows - first))
        })
    }

    fn vjp_of(self, on: &Launch<'_>, Matrices { x, dy, sb, gradients }: &Matrices, tokens: usize) -> Result<()> {
        let [a, b] = self.cuts(on);
        let v = dy.column(self.outputs);
        let v_parts = on.matmuls.workspace();
        let b_parts = v_parts + self.v(b, tokens) as u64;
        let a_parts = b_parts + (b.ranges * self.gradient(self.outputs)) as u64;
        let start = |name, cut: Cut, block: Block, args: Args, columns: usize| {
            let range = tokens.div_ceil(cut.ranges).next_multiple_of(block.tokens);
            let args = args.with(tokens as i32).with(columns as i32).with(range as i32);
            let (kernel, shared) = on.kernels.variant(name, self.rank)?;
            on.gpu.launch(kernel, [cut.blocks, tokens.div_ceil(range), 1], [THREADS as u32, 1, 1], shared, args)?;
            Result::Ok(tokens.div_ceil(range) as i32)
        };
        let flat = |name, threads: usize, args| {
            let (kernel, _) = on.kernels.variant(name, self.rank)?;
            on.gpu.launch(kernel, [threads.div_ceil(THREADS), 1, 1], [THREADS as u32, 1, 1], 0, args)
        };
        let args = Args::default().with(*dy).with(*sb).with(x.column(self.inputs)).with(v_parts).with(b_parts);
        let b_ranges = start("lora_vjp_b", b, VJP_B, args, self.outputs)?;
        let args = Args::default().with(v_parts).with(b.blocks as i32).with(v).with(tokens as i32);
        flat("lora_sum", tokens * self.rank / 2, args)?;
        let args = Args::default().with(*x).with(v).with(a_parts);
        let a_ranges = start("lora_vjp_a", a, VJP_A, args, self.inputs)?;
        let values = [self.rank * self.inputs, self.rank * self.outputs];
        let args = Args::default().with(a_parts).with(a_ranges).with(values[0] as i32).with(gradients[0]);
        let args = args.with(b_parts).with(b_ranges).with(values[1] as i32).with(gradients[1]);
        flat("lora_add", values[0] + values[1], args)
    }

    /// How x and dy are cut.
    fn cuts(self, on: &Launch<'_>) -> [Cut; 2] {
        let room = most_shared(on.gpu.kernels) / shared(self.rank)[0];
        let resident = if self.rank > ONE_BLOCK { 1 } else { room.clamp(1, 2) };
        let multiprocessors = on.gpu.multiprocessors;
        [self.cut(self.inputs, VJP_A, multiprocessors), self.cut(self.outputs, VJP_B, multiprocessors * resident)]
    }

    /// As few ranges as leave at most a tenth of the card idle, which has room for so many blocks at a time.
    fn cut(self, columns: usize, block: Block, room: usize) -> Cut {
        let blocks = columns.div_ceil(block.columns);
        let most = PARTS / self.gradient(columns);
        let ranges = |turns: usize| (room * turns / blocks).clamp(1, most);
        let full = |turns: &usize| {
            let all = blocks * ranges(*turns);
            all * 10 >= all.next_multiple_of(room) * 9
        };
        Cut { blocks, ranges: ranges((1..8).find(full).unwrap_or(8)) }
    }

    /// Tokens whose parts of v fit into the workspace, beside those of the gradients.
    fn most_tokens(self, a: Cut, b: Cut) -> usize {
        let gradients = a.ranges * self.gradient(self.inputs) + b.ranges * self.gradient(self.outputs);
        (WORKSPACE - gradients) / self.v(b, 1)
    }

    /// Bytes of a part of a gradient.
    fn gradient(self, columns: usize) -> usize {
        self.rank * columns * 4
    }

    /// Bytes of all parts of v.
    fn v(self, cut: Cut, tokens: usize) -> usize {
        cut.blocks * tokens * self.rank * 4
    }
}

/// Bytes of shared memory that `lora_vjp_b` and `lora_vjp_a` take: tiles of the wide and the narrow matrix for every stage, and v's sums
/// of eight warps, twice.
fn shared(rank: usize) -> [usize; 2] {
    let tiles = |b: Block| STAGES * b.tokens * (b.columns + rank) * 2;
    [tiles(VJP_B) + 2 * (THREADS / 32) * VJP_B.tokens * rank * 4, tiles(VJP_A)]
}

fn variant(rank: usize) -> Variant {
    Variant {
        source: &SOURCE,
        key: rank,
        label: format!("rank {rank}"),
        before: format!("#define RANK {rank}\n"),
        after: "",
        generation: false,
        shared: ["lora_vjp_b", "lora_vjp_a"].into_iter().zip(shared(rank)).collect(),
    }
}

fn variants(capability: u32) -> Vec<Variant> {
    (8..=widest(capability)).step_by(8).map(variant).collect()
}

#[cfg(test)]
mod tests {
    use super::super::attention::most_shared;
    use super::{Lora, PARTS, VJP_A, VJP_B, WORKSPACE, shared, widest};
    use crate::kernels::ARCHITECTURES;

    #[test]
    fn kernels_fit_into_the_shared_memory_of_every_card() {
        for capability in ARCHITECTURES {
            for bytes in shared(widest(*capability)) {
                assert!(bytes <= most_shared(*capability), "{bytes} on {capability}");
            }
        }
    }

    #[test]
    fn parts_fit_into_the_workspace_and_blocks_fill_the_card() {
        // Hidden sizes, three linears of gate, up and down, a vocabulary.
        for (inputs, outputs) in
            [(896, 1152), (3584, 4608), (3584, 37888), (18944, 3584), (8192, 57344), (4096, 152_064)]
        {
            for rank in (8..=32).step_by(8) {
                let lora = Lora { inputs, outputs, rank };
                if !lora.has_kernels(89) {
                    assert!(rank * inputs.max(outputs) * 4 > PARTS);
                    continue;
                }
                for room in [46, 128, 264] {
                    let (a, b) = (lora.cut(inputs, VJP_A, room), lora.cut(outputs, VJP_B, room));
                    let tokens = lora.most_tokens(a, b);
                    assert!(tokens >= 512, "{tokens} tokens at a time of [{inputs}, {outputs}], rank {rank}");
                    let gradients = a.ranges * lora.gradient(inputs) + b.ranges * lora.gradient(outputs);
                    assert!(lora.v(b, tokens) + gradients <= WORKSPACE);
                    let blocks = b.blocks * b.ranges;
                    let idle = blocks.next_multiple_of(room) - blocks;
                    let most = (b.ranges + 1) * lora.gradient(outputs) > PARTS;
                    assert!(most || idle * 8 <= blocks.next_multiple_of(room), "{blocks} blocks for {room}");
                }
            }
        }
    }
}
