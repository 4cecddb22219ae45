//! What a run takes on a GPU, known before its first step. Needs no GPU.

use std::fmt;

use dpo_plugin_api::graph::ModelGraph;
use serde::Serialize;

use super::footprint::{Footprint, LOGITS_ROWS, Mode, OFFLOAD_COST, input_bytes};
use super::lowered::Lowered;
use super::matmul::{CLASS, Gates, WORKSPACE};
use super::saved::SavedActivations;
use super::weights::{LayerStore, NUMBERS};
use dpo_core::aux_loss::AuxLoss;
use dpo_core::error::{Error, Result};
use dpo_core::lora::Adapter;
use dpo_core::memory::size;
use dpo_core::plan::{MemoryOptions, Packing, RESUMED, of_tokens, share};
use dpo_core::storage::{Numbers, Place, Quantization, Storage};

/// Tokens at once of the largest micro-batches: 14,000 were 2.4% faster than 8,192 on an H200; more than these were not tried.
const ENOUGH_TOKENS: usize = 16384;

/// Tokens that sizes of micro-batches differ by.
const SIZE_STEP: usize = 512;

/// Tokens whose time a micro-batch loses, about: the last pair that did not fit, matmuls that are too small to fill the
/// card, the wait for the loss. Fitted to an H100 (docs/performance.md).
pub(super) const LOST_TOKENS: f64 = 300.0;

/// Rows of a chunk, at most, where a batch is computed in chunks; `None` is at once. Where it makes no difference, the first of them.
const CHUNK_ROWS: [Option<usize>; 4] = [None, Some(8192), Some(4096), Some(2048)];

/// Tokens whose time every further chunk of a batch takes: its matmuls fill the card less well (docs/performance.md).
const LOST_CHUNK_TOKENS: f64 = 130.0;

/// What rows of the embedding table from host memory cost, as a share of a step.
const HOST_EMBEDDING_COST: f64 = 0.005;

/// Where layers fit on the GPU, their time in host memory has to be so much of that to be preferred, even if a step has no more tokens than
/// [`FEW_TOKENS`], which hide fewer copies than a full micro-batch.
const FASTER: f64 = 0.9;
const FEW_TOKENS: usize = 4096;

/// What a context, its kernels and cuBLASLt take on a card before anything is allocated.
pub(super) const CONTEXT: usize = 640 << 20;

/// What a GPU gives to a run, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Memory to plan with.
    pub available: usize,
    /// What of it context, kernels and libraries take.
    pub context: usize,
    /// The gated activations that the card's matmuls compute, which takes less memory.
    pub gates: Gates,
    /// Whether the card has products of fp8.
    pub fp8: bool,
    /// Host memory that is free for this process, where that is known.
    pub host: Option<usize>,
}

impl Room {
    /// So much on each of some GPUs that need not be there, and may be of any kind.
    pub fn of(available: usize, gpus: usize) -> Room {
        Room {
            available,
            context: CONTEXT + if gpus > 1 { NCCL } else { 0 },
            gates: Gates::default(),
            fp8: true,
            host: None,
        }
    }
}

/// What NCCL was seen to take of each of two H200 (docs/performance.md); where it is there, it is measured.
const NCCL: usize = 864 << 20;

/// The plan of a run on one GPU; sizes in bytes.
#[derive(Clone, Debug, Serialize)]
pub struct GpuPlan {
    /// Memory to plan with.
    pub available: usize,
    /// Context, kernels, libraries.
    pub context: usize,
    /// The gated activations that matmuls compute.
    pub gates: Gates,
    /// Ranks that share the layers' frozen weights; 1 where each has all.
    pub ranks: usize,
    /// How the layers' frozen weights are kept.
    pub layers: Storage,
    /// Bytes of layers in host memory.
    pub host_layers: usize,
    /// Bytes of host memory in which the layers' inputs wait for the backward pass; 0 where they stay on the GPU.
    pub host_inputs: usize,
    /// Frozen weights on the GPU, with the adapter's bf16 copy.
    pub weights: usize,
    /// The same where they are not shared.
    pub whole: usize,
    /// The embedding table, where it stays in host memory.
    pub host_embedding: usize,
    /// Parameters and gradient of the adapter in f32.
    pub adapter: usize,
    /// The optimizer's moments.
    pub optimizer: usize,
    /// cuBLASLt's workspace.
    pub workspace: usize,
    /// Ids, positions, places and what else a batch brings.
    pub inputs: usize,
    /// Values of a micro-batch: between layers, saved for the backward pass, in work; logits.
    pub values: usize,
    /// Of those, what a token takes in a full micro-batch, over all layers.
    pub per_token: usize,
    /// And the least that the head takes: hidden states of answers and a chunk of logits.
    pub head: usize,
    /// Tokens that micro-batches are filled up to.
    pub micro_batch_tokens: usize,
    /// Tokens that micro-batches without a backward pass are filled up to.
    pub scoring_tokens: usize,
    /// Rows of logits at once, at most.
    pub logits_rows: usize,
    /// Rows of a layer's steps at once, at most, but for those that mix rows; `None` is all.
    pub chunk_rows: Option<usize>,
    /// Tokens of the longest micro-batch: a pair that is longer is alone in its own.
    pub most_tokens: usize,
    /// Most answer tokens among a batch's tokens, as a share.
    pub answers: f64,
    /// What is saved of every layer, of a full micro-batch and of the longest.
    pub saved: [Vec<SavedActivations>; 2],
    /// What may be saved of a layer.
    pub allowed: Vec<SavedActivations>,
    /// Time that a full micro-batch loses by computing values again, as a share.
    pub again: f64,
    /// Time that it loses by waiting for weights that are dequantised or come from host memory, as a share.
    pub waits: f64,
}

impl GpuPlan {
    /// Plans pairs of up to `longest` tokens, at most `answers` of every token an answer's, with the layers sharded over so many
    /// `ranks`; refuses what does not fit. Layers stay in host memory where they do not fit otherwise, or where that is clearly faster,
    /// unless options say which.
    pub fn new(
        graph: &ModelGraph,
        adapter: &Adapter,
        longest: usize,
        answers: f64,
        room: Room,
        ranks: usize,
        options: MemoryOptions,
    ) -> Result<GpuPlan> {
        // What is published small stays so where a step then takes less time, or nothing else fits; of what ranks share, all have the same.
        let kinds = match (options.quantization, options.published) {
            (None, Some(published)) if ranks == 1 => vec![None, Some(published)],
            (None, published) => vec![published],
            (kind, _) => vec![kind],
        };
        let plan = |place| {
            let each = kinds.iter().map(|kind| {
                let options = MemoryOptions { quantization: *kind, ..options };
                GpuPlan::with(graph, adapter, (longest, answers), room, place, options)
            });
            let cost = |plan: &Result<(f64, GpuPlan)>| plan.as_ref().map_or(f64::INFINITY, |(cost, _)| *cost);
            let best = each.reduce(|a, b| if cost(&a) < cost(&b) { a } else { b });
            best.unwrap_or_else(|| Err(Error::run("there is nothing to plan")))
        };
        let (_, plan) = match (ranks, options.offload_base) {
            (1, Some(true)) => plan(Place::Host),
            (1, Some(false)) => plan(Place::Resident),
            (1, None) => match (plan(Place::Resident), plan(Place::Host)) {
                (Ok((here, _)), Ok((cost, host))) if cost < here * FASTER => Ok((cost, host)),
                (Err(_), Ok(host)) => Ok(host),
                (here, _) => here,
            },
            (_, Some(true)) => Err(Error::input("layers are either sharded over ranks or in host memory")
                .at("--offload-base")
                .help("leave out --offload-base or --shard-base")),
            _ => plan(Place::Sharded(ranks)),
        }?;
        Ok(plan)
    }

    /// Plans with the layers in this place; with it the time of a token, to compare places.
    fn with(
        graph: &ModelGraph,
        adapter: &Adapter,
        (longest, answers): (usize, f64),
        room: Room,
        place: Place,
        options: MemoryOptions,
    ) -> Result<(f64, GpuPlan)> {
        let numbers = options.quantization.map_or(NUMBERS, Quantization::numbers);
        if numbers == Numbers::Fp8 && !room.fp8 {
            let what = "this card's tensor cores do not multiply fp8: those of Ada (RTX 4090, L40), Hopper (H100) and later cards do";
            return Err(Error::input(what).at("--quantization").help("take --quantization nf4, which every card has"));
        }
        let layers = Storage { numbers, place };
        let Room { available, context, gates, host, .. } = room;
        let lowered = Lowered::new(graph, adapter, numbers, gates)?;
        let footprint = Footprint::new(graph, &lowered);
        let ranks = if let Place::Sharded(ranks) = place { ranks } else { 1 };
        let [weights, whole] =
            [place, Place::Resident].map(|place| lowered.weights(graph, Storage { place, ..layers }));
        let host_layers = LayerStore::host_bytes(layers, &lowered.layers(graph));
        if let Some(host) = host.filter(|host| *host < host_layers) {
            let (need, there) = (size(host_layers), size(host));
            return Err(Error::input(format!(
                "the layers' frozen weights take {need} of host memory, {there} are free"
            ))
            .at("--offload-base"));
        }
        let table = lowered.table(graph, table(Place::Resident));
        let optimizer = adapter.parameters() * 8;
        let adapter = lowered.adapter(graph, adapter.parameters()) + adapter.subtracted_parameters() * 4;
        let allowed = match options.recompute {
            Some(true) => &SavedActivations::ALL[3..],
            Some(false) => &SavedActivations::ALL[..1],
            None => &SavedActivations::ALL[..],
        };
        let fixed = options.packing.map(|p| p.micro_batch_tokens).or(options.micro_batch_tokens);
        let sizes = match fixed {
            Some(tokens) => vec![tokens],
            None => (SIZE_STEP..=ENOUGH_TOKENS).step_by(SIZE_STEP).collect(),
        };
        let chunks = match options.packing {
            Some(packing) => vec![packing.chunk_rows],
            None => CHUNK_ROWS.to_vec(),
        };
        let ways = chunks.iter().flat_map(|chunk| [false, true].map(|offload| (*chunk, offload)));
        let mut best: Option<([f64; 2], GpuPlan)> = None;
        let mut need = 0;
        for place in if table > 0 { &[Place::Resident, Place::Host][..] } else { &[Place::Resident] } {
            let (here, host) = if *place == Place::Host { (0, table) } else { (table, 0) };
            for (tokens, (chunk, offload)) in sizes.iter().flat_map(|tokens| ways.clone().map(move |way| (tokens, way)))
            {
                let scoring = match options.packing {
                    Some(packing) => packing.scoring_tokens,
                    None if fixed.is_some() => *tokens,
                    None => ENOUGH_TOKENS,
                };
                let longest = longest.max(*tokens);
                let most = longest.max(scoring);
                // Half of the host memory that is left then stays for others.
                let fits = |inputs: &usize| room.host.is_none_or(|host| host_layers + 2 * inputs <= host);
                let inputs = match offload {
                    true => footprint.host_inputs(longest, answer_tokens(longest, answers)).filter(fits),
                    false => Some(0),
                };
                let Some(host_inputs) = inputs else { continue };
                let mut plan = GpuPlan {
                    gates,
                    available,
                    context,
                    ranks,
                    layers,
                    host_layers,
                    host_inputs,
                    weights: weights + here,
                    whole: whole + here,
                    host_embedding: host,
                    adapter,
                    optimizer,
                    workspace: WORKSPACE,
                    inputs: input_bytes(&lowered, AuxLoss::of(graph), most, answer_tokens(most, answers)),
                    values: 0,
                    per_token: 0,
                    head: footprint.head(answer_tokens(*tokens, answers), LOGITS_ROWS[0]),
                    logits_rows: options.packing.and_then(|p| p.logits_rows).unwrap_or(LOGITS_ROWS[0]),
                    chunk_rows: chunk,
                    micro_batch_tokens: *tokens,
                    scoring_tokens: *tokens,
                    most_tokens: longest,
                    answers,
                    saved: [Vec::new(), Vec::new()],
                    allowed: allowed.to_vec(),
                    again: 0.0,
                    waits: 0.0,
                };
                let mode = plan.mode();
                let values = |keep, mode| footprint.whole(longest, answer_tokens(longest, answers), keep, mode);
                let least = values(allowed[allowed.len() - 1], mode);
                let most_useful = values(allowed[0], Mode { offload: false, ..mode });
                let left = available.saturating_sub(plan.total());
                let bytes = left.min(most_useful);
                let arrange = |tokens| footprint.arrange(tokens, answer_tokens(tokens, answers), bytes, allowed, mode);
                let (Some(full), Some(largest)) = (arrange(*tokens), arrange(longest)) else {
                    let all = plan.total() + least;
                    need = if need == 0 { all } else { need.min(all) };
                    continue;
                };
                // Whole classes of matmuls, so that what memory is left over decides no bits.
                let room = full.logits_room.min(largest.logits_room) / CLASS * CLASS;
                plan.logits_rows = match options.packing.and_then(|p| p.logits_rows) {
                    Some(rows) => rows,
                    None => room.clamp(LOGITS_ROWS[0], LOGITS_ROWS[1]),
                };
                let mode = plan.mode();
                let fits = |tokens: &usize| {
                    footprint.arrange_forward(*tokens, answer_tokens(*tokens, answers), bytes, mode).is_some()
                };
                plan.scoring_tokens = match options.packing {
                    Some(_) if fits(&scoring) => scoring,
                    Some(_) => continue,
                    None => (*tokens..=scoring).step_by(256).filter(fits).last().unwrap_or(*tokens),
                };
                plan.values = bytes;
                plan.again = full.again;
                plan.per_token = footprint.per_token(&full.saved, full.offloads);
                let waits = |tokens: usize, again: f64, offloads: bool| {
                    let turns = chunk.map_or(1, |rows| tokens.div_ceil(rows)) as f64;
                    footprint.waits((tokens, answer_tokens(tokens, answers)), again, turns, (layers.place, offloads))
                };
                plan.waits = waits(*tokens, full.again, full.offloads);
                let cost = |tokens: usize, again: f64, offloads: bool| {
                    let further = chunk.map_or(0, |rows| tokens.div_ceil(rows) - 1) as f64;
                    let lost = (LOST_TOKENS + further * LOST_CHUNK_TOKENS) / tokens as f64;
                    let waits = waits(tokens, again, offloads);
                    let host = [(host > 0, HOST_EMBEDDING_COST), (offloads, OFFLOAD_COST)].into_iter();
                    let host: f64 = host.filter(|(is, _)| *is).map(|(_, cost)| cost).sum();
                    (1.0 + again + waits) * (1.0 + lost) + host
                };
                // Of plans that are as good for full micro-batches, the best for the longest.
                let cost = [(*tokens, &full), (longest, &largest)].map(|(tokens, a)| cost(tokens, a.again, a.offloads));
                if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                    plan.saved = [full.saved, largest.saved];
                    best = Some((cost, plan));
                }
            }
        }
        let cost = |plan: &GpuPlan| {
            let few = plan.micro_batch_tokens.min(FEW_TOKENS);
            let batch = (few, answer_tokens(few, answers));
            let waits = footprint.waits(batch, plan.again, 1.0, (layers.place, plan.offloads()));
            (1.0 + plan.again + waits) * (1.0 + LOST_TOKENS / plan.micro_batch_tokens as f64)
        };
        best.map(|(_, plan)| (cost(&plan), plan)).ok_or_else(|| {
            Error::input(format!(
                "{} and needs {} on the GPU, there are {}: weights {}, adapter {}",
                of_tokens(longest, longest.max(fixed.unwrap_or(0))),
                size(need),
                size(available),
                share(weights, whole, ranks),
                size(adapter + optimizer)
            ))
            .help(match options.packing {
                Some(_) => RESUMED,
                // No setting helps where the weights alone do not fit.
                None if weights > available && ranks == 1 => {
                    "the weights alone do not fit: --quantization nf4 keeps them small, --gpus N shards them over N GPUs, --offload-base \
                     keeps them in host memory; or take a smaller model"
                }
                None => "lower --max-length or --lora-rank, take a smaller model, or a GPU with more memory",
            })
        })
    }

    /// What of it a run saves and reuses.
    pub fn packing(&self) -> Packing {
        let GpuPlan { micro_batch_tokens, scoring_tokens, logits_rows, chunk_rows, .. } = *self;
        Packing { micro_batch_tokens, scoring_tokens, logits_rows: Some(logits_rows), chunk_rows }
    }

    /// Whether the layers' inputs may wait for the backward pass in host memory.
    pub(super) fn offloads(&self) -> bool {
        self.host_inputs > 0
    }

    /// How batches are computed.
    pub(super) fn mode(&self) -> Mode {
        let chunk = self.chunk_rows.unwrap_or(usize::MAX);
        Mode { logits: self.logits_rows, chunk, offload: self.offloads() }
    }

    /// Bytes of the whole process on the GPU.
    pub fn total(&self) -> usize {
        self.context + self.weights + self.adapter + self.optimizer + self.workspace + self.inputs + self.values
    }

    /// How the embedding table is kept.
    pub(super) fn table(&self) -> Storage {
        table(if self.host_embedding > 0 { Place::Host } else { Place::Resident })
    }

    /// Most answer tokens of a micro-batch.
    pub fn most_answers(&self) -> usize {
        answer_tokens(self.most_tokens, self.answers)
    }
}

/// How an embedding table is kept.
fn table(place: Place) -> Storage {
    Storage { numbers: NUMBERS, place }
}

fn answer_tokens(tokens: usize, share: f64) -> usize {
    ((tokens as f64 * share).ceil() as usize).next_multiple_of(8).max(8)
}

/// What is waited of all time, in percent.
fn share_of(waits: f64, again: f64) -> f64 {
    100.0 * waits / (1.0 + again + waits)
}

/// Such as `4 layers save all activations, 24 layers save outputs of matmuls`.
fn saved(levels: &[SavedActivations]) -> String {
    let names = [
        (SavedActivations::All, "all activations"),
        (SavedActivations::Matmuls, "outputs of matmuls"),
        (SavedActivations::SmallMatmuls, "outputs of small matmuls"),
        (SavedActivations::BlockInput, "their input alone"),
    ];
    let counts = names.iter().map(|(level, n)| (levels.iter().filter(|l| *l == level).count(), n));
    let parts: Vec<String> =
        counts.filter(|(n, _)| *n > 0).map(|(n, name)| format!("{n} layers save {name}")).collect();
    parts.join(", ")
}

impl fmt::Display for GpuPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "memory      {} of the GPU, {} planned", size(self.available), size(self.total()))?;
        let table = match self.host_embedding {
            0 => String::new(),
            bytes => format!("; the embedding table, {}, stays in host memory", size(bytes)),
        };
        let shared = match self.layers.place {
            Place::Resident => String::new(),
            Place::Sharded(ranks) => format!(", of {}: layers are sharded over {ranks} ranks", size(self.whole)),
            Place::Host => format!("; layers, {}, stay in host memory", size(self.host_layers)),
        };
        let numbers = match self.layers.numbers {
            Numbers::Nf4 => "layers in nf4, the rest in bf16",
            Numbers::Fp8 => "layers in fp8, the rest in bf16",
            Numbers::Mxfp4 => "experts in mxfp4, the rest in bf16",
            _ => "bf16",
        };
        let per_token = format!(
            "{} per token, {} for the head; micro-batches of {} tokens",
            size(self.per_token),
            size(self.head),
            self.micro_batch_tokens
        );
        let per_token = match self.host_inputs {
            0 => per_token,
            bytes => format!("{per_token}; inputs of layers, {}, wait in host memory", size(bytes)),
        };
        for (name, bytes, note) in [
            ("weights", self.weights, format!("{numbers}, with the adapter's copy{shared}{table}")),
            ("adapter", self.adapter, "parameters and gradient in f32".into()),
            ("optimizer", self.optimizer, "moments".into()),
            ("values", self.values, per_token),
            ("batch", self.inputs, "ids, positions, places".into()),
            ("workspace", self.workspace, "of matmuls".into()),
            ("CUDA", self.context, "context, kernels, libraries".into()),
        ] {
            writeln!(f, "  {name:<10}{:>10}  {note}", size(bytes))?;
        }
        let again = match self.again {
            again if again > 0.0005 => format!("; recomputing activations takes {:.1}% of a step", again * 100.0),
            _ => String::new(),
        };
        let waits = match self.layers.place {
            Place::Host => format!("; waiting for the bus, about {:.0}% of the time", share_of(self.waits, self.again)),
            _ if self.waits > 0.0005 => format!("; dequantising takes {:.1}%", share_of(self.waits, self.again)),
            _ => String::new(),
        };
        let again = again + &waits;
        let chunks = |tokens: usize| match self.chunk_rows {
            Some(rows) if rows < tokens => format!(" in chunks of up to {rows} rows"),
            _ => String::new(),
        };
        let (tokens, most) = (self.micro_batch_tokens, self.most_tokens);
        write!(f, "micro-batch {tokens} tokens{}: {}{again}", chunks(tokens), saved(&self.saved[0]))?;
        if most > tokens && (self.saved[1] != self.saved[0] || chunks(most) != chunks(tokens)) {
            let what = chunks(most);
            write!(f, "\nlongest     {most} tokens{what}, alone in a micro-batch: {}", saved(&self.saved[1]))?;
        }
        Ok(())
    }
}
