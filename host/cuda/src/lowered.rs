//! A model lowered for CUDA: programs of its blocks with their passes, and what its weights take.

use dpo_plugin_api::graph::{ModelGraph, Node, Weight};

use super::arena::aligned;
use super::inputs::Rows;
use super::launch::BatchTable;
use super::liveness::Scheduled;
use super::lowering::Frame;
use super::matmul::Gates;
use super::ops;
use super::ops::lm_head::LmHead;
use super::program::Program;
use super::saved::SavedActivations;
use super::weights::{LayerStore, NUMBERS, Stack};
use dpo_core::error::{Error, Result};
use dpo_core::lora::{Adapter, Site};
use dpo_core::predictors;
use dpo_core::storage::{Numbers, Storage};
use dpo_core::weights::BlockId;

/// A model lowered for CUDA.
#[derive(Default)]
pub(super) struct Lowered {
    /// From token ids to the residual stream; forward only.
    pub embed: Program,
    pub embed_schedule: Scheduled,
    /// Of every kind of block.
    pub programs: Vec<Program>,
    /// Of every kind of block, its passes for every level of [`SavedActivations`].
    pub schedules: Vec<[Scheduled; 4]>,
    /// The head up to its projection.
    pub head: Program,
    pub head_schedule: Scheduled,
    pub projection: LmHead,
    /// What is computed once a batch.
    pub tables: Vec<BatchTable>,
}

impl Lowered {
    /// With layers kept as such numbers, and with matmuls that compute these gated activations.
    pub(super) fn new(graph: &ModelGraph, adapter: &Adapter, numbers: Numbers, gates: Gates) -> Result<Lowered> {
        let hidden = graph.hidden_size;
        refuse(adapter)?;
        predictors::check(graph)?;
        if let Some(site) = adapter.sites.iter().find(|s| !matches!(s.node.0, BlockId::Layer(_))) {
            return Err(Error::input(format!("'{}' is in no layer: CUDA adapts linears of layers", site.module))
                .help("leave it out of --target-modules, or train with --device cpu"));
        }
        // Layers of a kind have one program: the rank of a weight there is the largest that it has in any of them.
        let rank = |kind: usize, node: usize, role: &str| {
            let of_kind = |id: BlockId| matches!(id, BlockId::Layer(layer) if graph.layers[layer].block == kind);
            let is = |s: &&Site| {
                s.node.1 == node && of_kind(s.node.0) && graph.blocks[kind].nodes[node].weights[s.weight].role == role
            };
            let ranks = adapter.sites.iter().filter(is).map(|s| adapter.columns(s));
            ranks.max().unwrap_or(0).next_multiple_of(8)
        };
        let mut behind = 0;
        for (kind, block) in graph.blocks.iter().enumerate() {
            for (index, node) in block.nodes.iter().enumerate() {
                let columns = ops::find(&node.op)?.columns_behind;
                behind = behind.max(columns(&block.nodes, index, &|node, role| rank(kind, node, role)));
            }
        }
        let lower = |kind: usize| {
            let block = &graph.blocks[kind];
            let rank = |node: usize, role: &str| rank(kind, node, role);
            let frame =
                Frame { widths: [hidden; 2], behind, rank: &rank, numbers, backward: true, rows: Rows::Tokens, gates };
            Program::lower(block, (&block.nodes, block.output), ops::find, &frame)
        };
        let programs: Vec<Program> = (0..graph.blocks.len()).map(lower).collect::<Result<_>>()?;
        // Only layers are kept in other numbers.
        let plain = |widths, rows| Frame {
            widths,
            behind,
            rank: &|_, _| 0,
            numbers: NUMBERS,
            backward: rows == Rows::Predictors,
            rows,
            gates,
        };
        let embed = (graph.embed.nodes.as_slice(), graph.embed.output);
        let embed = Program::lower(&graph.embed, embed, ops::find, &plain([1, hidden], Rows::Tokens))?;
        let (node, nodes) = projection(graph)?;
        let projection = LmHead::of(node)?;
        // Its input lies where the last layer's output does.
        let frame = plain([hidden, projection.inputs], Rows::Predictors);
        let head = Program::lower(&graph.head, (nodes, node.inputs[0]), ops::find, &frame)?;
        let nodes = graph.blocks.iter().chain([&graph.embed, &graph.head]).flat_map(|b| &b.nodes);
        let tables = nodes.map(|n| Ok((ops::find(&n.op)?.table)(n))).collect::<Result<Vec<_>>>()?;
        Ok(Lowered {
            tables: BatchTable::distinct(tables.into_iter().flatten()),
            schedules: programs.iter().map(|p| SavedActivations::ALL.map(|level| Scheduled::new(p, level))).collect(),
            embed_schedule: Scheduled::new(&embed, SavedActivations::All),
            head_schedule: Scheduled::new(&head, SavedActivations::All),
            embed,
            programs,
            head,
            projection,
        })
    }

    /// All programs.
    pub(super) fn all(&self) -> impl Iterator<Item = &Program> {
        self.programs.iter().chain([&self.embed, &self.head])
    }

    /// Bytes of frozen weights on a rank's GPU, where layers are kept so: of the layers, the head and the projection.
    pub(super) fn weights(&self, graph: &ModelGraph, layers: Storage) -> usize {
        self.rest() + self.apart(graph) + LayerStore::bytes(layers, &self.layers(graph))
    }

    /// Bytes of every layer's frozen weights.
    pub(super) fn layers(&self, graph: &ModelGraph) -> Vec<usize> {
        graph.layers.iter().map(|layer| self.programs[layer.block].weight_bytes()).collect()
    }

    /// Bytes of what stacks have apart from their layer's.
    pub(super) fn apart(&self, graph: &ModelGraph) -> usize {
        let of = |p: &Program| p.stacks.iter().flat_map(Stack::apart).map(aligned).sum::<usize>();
        graph.layers.iter().map(|l| of(&self.programs[l.block])).sum()
    }

    /// Bytes of the largest stack that is made before it is read.
    pub(super) fn dequantized(&self) -> usize {
        self.programs.iter().flat_map(|p| &p.stacks).map(Stack::made_bytes).max().unwrap_or(0)
    }

    /// Bytes of what every rank has: of the head with the projection.
    pub(super) fn rest(&self) -> usize {
        let LmHead { rows, inputs, bias, .. } = self.projection;
        let projection = aligned(NUMBERS.bytes(rows * inputs)) + if bias { aligned(NUMBERS.bytes(rows)) } else { 0 };
        self.embed.weight_bytes() + self.head.weight_bytes() + projection
    }

    /// Bytes on the GPU of the embedding's tables, where they are kept so; none of one that is the projection.
    pub(super) fn table(&self, graph: &ModelGraph, storage: Storage) -> usize {
        let own = self.embedding_tables(graph).filter(|(_, tied)| !tied);
        own.map(|(w, _)| aligned(storage.bytes(table_values(w)))).sum()
    }

    /// The embedding's tables, and whether one is the projection.
    pub(super) fn embedding_tables<'a>(&self, graph: &'a ModelGraph) -> impl Iterator<Item = (&'a Weight, bool)> {
        let projection = graph.head.nodes.last().and_then(|n| n.weight("weight"));
        let tables = self.embed.tables.iter().filter_map(|node| graph.embed.nodes[*node].weight("weight"));
        tables.map(move |w| (w, projection.is_some_and(|p| p.tensor == w.tensor)))
    }

    /// Bytes of the adapter's parameters and gradient, flat and in stacks.
    pub(super) fn adapter(&self, graph: &ModelGraph, parameters: usize) -> usize {
        parameters * 8 + self.gradients(graph)
    }

    /// Bytes of the gradients of all stacks.
    pub(super) fn gradients(&self, graph: &ModelGraph) -> usize {
        let of = |p: &Program| p.stacks.iter().flat_map(|s| s.gradient_bytes()).sum::<usize>();
        graph.layers.iter().map(|l| of(&self.programs[l.block])).sum()
    }
}

impl Program {
    /// Bytes that are read and written where every stack is dequantised once.
    pub(super) fn dequantizing(&self) -> usize {
        let made = self.stacks.iter().filter(|s| s.numbers != NUMBERS && s.read_as == NUMBERS);
        made.map(|s| s.bytes() + s.made_bytes()).sum()
    }

    /// Bytes of a block's frozen weights, every one at an aligned place.
    fn weight_bytes(&self) -> usize {
        let stacks = self.stacks.iter().map(|s| aligned(s.bytes()) + aligned(s.bias_bytes()));
        stacks.chain(self.vectors.iter().map(|v| aligned(v.bytes()))).sum()
    }
}

/// Refuses what of an adapter has no kernel.
fn refuse(adapter: &Adapter) -> Result<()> {
    let help = "train with --device cpu, or leave it out; `dpo-host merge` folds a trained adapter into its model";
    if adapter.config.dora {
        return Err(Error::input("DoRA has no CUDA kernel").at("--use-dora").help(help));
    }
    if adapter.config.dropout > 0.0 {
        let what = "dropout has no CUDA kernel";
        return Err(Error::input(what).at("--lora-dropout").help("leave it out, or train with --device cpu"));
    }
    Ok(())
}

/// Values of a table on the GPU, where zeros fill its rows up to a multiple of 8: it may be the projection.
pub(super) fn table_values(weight: &Weight) -> usize {
    let [rows, columns @ ..] = weight.shape.as_slice() else { return 0 };
    rows.next_multiple_of(8) * columns.iter().product::<usize>()
}

/// The head's projection, and the nodes before it.
pub(super) fn projection(graph: &ModelGraph) -> Result<(&Node, &[Node])> {
    graph.head.nodes.split_last().ok_or_else(|| Error::run("the head has no projection"))
}
