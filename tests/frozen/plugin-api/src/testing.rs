//! Checks for an author's own tests: `testing::check_model(&Qwen2)` and the like panic with what is wrong.
//!
//! They need no host. What only the host knows (which ops exist) `dpo-host describe` says.

use crate::dataset::{DatasetFormat, Row};
use crate::graph::{Block, ModelGraph};
use crate::loss::{AlignmentLoss, Answer, LossBatch, LossGrad, Options, Pair};
use crate::model::{Config, ModelFamily};

/// The graph of the family's example config, after checking that it is whole: every value is made before it is read, every
/// layer's block exists, the head ends in `lm_head`, the blocks keep the residual stream's width.
///
/// # Panics
/// With what is wrong.
pub fn check_model(family: &dyn ModelFamily) -> ModelGraph {
    check_config(family, family.example_config())
}

/// [`check_model`] for another config.
///
/// # Panics
/// With what is wrong.
pub fn check_config(family: &dyn ModelFamily, config: &str) -> ModelGraph {
    let name = family.name();
    assert!(!family.claims().is_empty(), "{name} claims no architecture");
    let config = Config::parse(config).unwrap_or_else(|e| panic!("{name}: {e}"));
    let graph = family.graph(&config).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert!(!graph.layers.is_empty(), "{name} has no layers");
    for layer in &graph.layers {
        assert!(layer.block < graph.blocks.len(), "{name}: layer '{}' is of no block", layer.prefix);
    }
    for block in graph.blocks.iter().chain([&graph.embed, &graph.head]) {
        check_block(name, block);
    }
    for block in graph.blocks.iter().chain([&graph.embed]) {
        let width = block.nodes.get(block.output.wrapping_sub(1)).map(|n| n.width);
        assert_eq!(
            width,
            Some(graph.hidden_size),
            "{name}: block '{}' does not return the residual stream",
            block.name
        );
    }
    assert_eq!(graph.head.nodes.last().map(|n| n.op.as_str()), Some("lm_head"), "{name}: the head ends in no lm_head");
    graph
}

fn check_block(family: &str, block: &Block) {
    for (i, node) in block.nodes.iter().enumerate() {
        assert!(
            node.inputs.iter().all(|v| *v <= i),
            "{family}: block '{}': {} reads a later value",
            block.name,
            node.op
        );
    }
    assert!(block.output <= block.nodes.len(), "{family}: block '{}' returns no value", block.name);
}

/// Every example row is recognised by its own format and gives at least one record.
///
/// # Panics
/// With the row and what is wrong.
pub fn check_format(format: &dyn DatasetFormat) {
    let mut rows = 0;
    for line in format.examples().lines().filter(|l| !l.trim().is_empty()) {
        let row: Row = serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"));
        assert!(format.recognises(&row) > 0, "{} does not recognise its own row {line}", format.name());
        let records = format.records(&row).unwrap_or_else(|e| panic!("{line}: {e}"));
        assert!(!records.is_empty(), "{} makes no record of {line}", format.name());
        rows += 1;
    }
    assert!(rows > 0, "{} has no example rows", format.name());
}

/// Derivatives of a loss against central differences, at several pairs of several lengths, with and without token weights.
///
/// # Panics
/// With the pair, the token and both derivatives.
pub fn check_loss(loss: &dyn AlignmentLoss) {
    check_loss_with(loss, &Options::defaults(loss));
}

/// [`check_loss`] with options other than the defaults.
///
/// # Panics
/// With the pair, the token and both derivatives.
pub fn check_loss_with(loss: &dyn AlignmentLoss, options: &Options) {
    for tail in [1.0, 0.3] {
        let batch = SyntheticBatch::new(tail);
        let grad = batch.eval(loss, options, None);
        let slopes = grad.slopes();
        for (token, slope) in slopes.iter().enumerate() {
            // f32 log-probs near -2 carry an error of 2e-7 each; a step of 2e-3 keeps that out of the quotient.
            let h = 2e-3_f32;
            let total = |by: f32| batch.eval(loss, options, Some((token, by))).losses().iter().sum::<f64>();
            let numeric = (total(h) - total(-h)) / (2.0 * f64::from(h));
            let slope = f64::from(*slope);
            let bound = 2e-3 * numeric.abs().max(slope.abs()).max(0.05);
            assert!(
                (slope - numeric).abs() <= bound,
                "{}: token {token}: derivative {slope}, central difference {numeric}",
                loss.name()
            );
        }
    }
}

/// Three pairs whose answers have different lengths, with fixed log-probs.
struct SyntheticBatch {
    policy: Vec<Vec<f32>>,
    reference: Vec<Vec<f32>>,
    weights: Vec<Vec<f32>>,
}

impl SyntheticBatch {
    fn new(tail: f32) -> SyntheticBatch {
        let lengths = [3usize, 2, 1, 4, 2, 2];
        // The second term keeps log-ratios of different pairs apart: where two are equal, a loss that sorts has a bend.
        let value = |i: usize, j: usize, k: usize| {
            -0.4 - ((i * 7 + j * 5 + k * 3) % 11) as f32 * 0.17 - ((i + 1) * (k + 1)) as f32 * 0.013
        };
        let rows = |k: usize| (0..6).map(|i| (0..lengths[i]).map(|j| value(i, j, k)).collect()).collect();
        let weights = (0..6).map(|i| {
            let shared = lengths[i].min(lengths[i ^ 1]);
            (0..lengths[i]).map(|j| if j < shared { 1.0 } else { tail }).collect()
        });
        SyntheticBatch { policy: rows(0), reference: rows(1), weights: weights.collect() }
    }

    fn eval(&self, loss: &dyn AlignmentLoss, options: &Options, nudge: Option<(usize, f32)>) -> LossGrad {
        let mut policy = self.policy.clone();
        if let Some((token, by)) = nudge {
            let value = policy.iter_mut().flatten().nth(token);
            *value.unwrap_or_else(|| panic!("token {token} is not there")) += by;
        }
        let statistics = [[-1.0_f32; 4]; crate::loss::MAX_STATISTICS];
        let answer = |i: usize| Answer {
            policy: &policy[i],
            reference: &self.reference[i],
            weights: &self.weights[i],
            statistics: std::array::from_fn(|s| &statistics[s][..policy[i].len()]),
        };
        let pairs = (0..3).map(|p| Pair { chosen: answer(2 * p), rejected: answer(2 * p + 1) });
        let count = |odd: usize| policy.iter().skip(odd).step_by(2).map(Vec::len).sum::<usize>() as f64;
        let batch = LossBatch {
            pairs: pairs.collect(),
            step_pairs: 3.0,
            step_chosen_tokens: count(0),
            step_rejected_tokens: count(1),
        };
        loss.eval(&batch, options, &mut Vec::new()).unwrap_or_else(|e| panic!("{}: {e}", loss.name()))
    }
}
