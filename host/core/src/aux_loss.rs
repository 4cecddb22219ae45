//! The auxiliary loss of routers, which spreads tokens over experts (Fedus et al. 2021, equations 4 to 6), as transformers'
//! `load_balancing_loss_func` has it: `E · Σ_e f_e · P_e` over the experts of all layers together, where `f_e` is the share of tokens that are
//! sent to expert `e`, which has no gradient, and `P_e` the mean of the probabilities that routers give it. Both are of a whole step, so that a
//! backward pass begins when all tokens of the step are counted.
//!
//! A prompt stands before each of its answers, as in TRL's batch: its tokens count once for every answer with a gradient. The last token of an
//! answer counts, too.

use dpo_plugin_api::graph::{ModelGraph, Node};
use dpo_plugin_api::ops::{AUX_LOSS_COEF, number};
use serde_json::json;

use crate::collective::ProcessGroup;
use crate::error::{Error, Result};

/// Whether it is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum RouterAuxLoss {
    /// It is not.
    #[default]
    Off,
    /// With the coefficient that the config states, where the family has such a loss.
    OfConfig,
    /// With another one; of 0 it is not.
    Coefficient(f64),
}

/// The loss of a graph whose routers have one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AuxLoss {
    /// What it counts in a step's loss; above 0.
    pub coefficient: f64,
    /// Experts of a layer.
    pub experts: usize,
}

/// What routers did with some tokens, over all layers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouterLoad {
    /// Tokens, once for every layer; 0 where nothing was counted.
    pub tokens: f64,
    /// Of every expert, the tokens that were sent to it.
    pub counts: Vec<f64>,
    /// Of every expert, the sum of the probabilities that tokens gave it.
    pub probs: Vec<f64>,
}

impl RouterAuxLoss {
    /// Gives a graph's routers its coefficient. It is done before predictors are gathered: with the loss, routers run on all rows.
    ///
    /// # Errors
    /// A coefficient for a family without such a loss.
    pub fn apply(self, graph: &mut ModelGraph) -> Result<()> {
        let coefficient = match self {
            RouterAuxLoss::OfConfig => return Ok(()),
            RouterAuxLoss::Off => 0.0,
            RouterAuxLoss::Coefficient(coefficient) => coefficient,
        };
        let mut found = false;
        for node in graph.blocks.iter_mut().flat_map(|block| &mut block.nodes) {
            if let Some(own) = node.attrs.get_mut(AUX_LOSS_COEF) {
                (*own, found) = (json!(coefficient), true);
            }
        }
        match found || coefficient == 0.0 {
            true => Ok(()),
            false => Err(Error::input("the model has no router with an auxiliary loss")
                .at("--router-aux-loss-coef")
                .help("leave it out: docs/families.md says which families have one")),
        }
    }
}

/// Whether a node is a router whose loss is computed.
pub fn is_balanced(node: &Node) -> bool {
    node.attrs.contains_key(AUX_LOSS_COEF) && number(node, AUX_LOSS_COEF) > 0.0
}

impl AuxLoss {
    /// That of a graph, where its routers have one.
    pub fn of(graph: &ModelGraph) -> Option<AuxLoss> {
        let router = graph.layers.iter().flat_map(|l| &graph.blocks[l.block].nodes).find(|node| is_balanced(node))?;
        Some(AuxLoss { coefficient: number(router, AUX_LOSS_COEF), experts: router.width })
    }

    /// Its value, without the coefficient: at least `top_k`, where tokens are spread evenly.
    pub fn value(&self, load: &RouterLoad) -> f64 {
        let products = load.counts.iter().zip(&load.probs).map(|(count, prob)| count * prob);
        self.experts as f64 * products.sum::<f64>() / load.tokens.powi(2)
    }

    /// Of every expert the derivative of a step's loss by the probability that a token gives it.
    pub fn dprobs(&self, load: &RouterLoad) -> Vec<f64> {
        let factor = self.coefficient * self.experts as f64 / load.tokens.powi(2);
        load.counts.iter().map(|count| factor * count).collect()
    }
}

impl RouterLoad {
    /// Of nothing yet, by a graph's routers.
    pub fn of(graph: &ModelGraph) -> RouterLoad {
        RouterLoad::new(AuxLoss::of(graph).map_or(0, |loss| loss.experts))
    }

    /// Of nothing yet, by routers of so many experts.
    pub fn new(experts: usize) -> RouterLoad {
        RouterLoad { tokens: 0.0, counts: vec![0.0; experts], probs: vec![0.0; experts] }
    }

    /// Adds another one, of as many experts or of nothing.
    pub fn add(&mut self, other: &RouterLoad) {
        let add = |own: &mut [f64], other: &[f64]| own.iter_mut().zip(other).for_each(|(own, other)| *own += other);
        self.tokens += other.tokens;
        add(&mut self.counts, &other.counts);
        add(&mut self.probs, &other.probs);
    }

    /// Adds up those of all ranks, in their order.
    ///
    /// # Errors
    /// A rank that is lost.
    pub fn all_reduce(&mut self, group: &mut dyn ProcessGroup) -> Result<()> {
        let experts = self.counts.len();
        let mut values = [&[self.tokens], self.counts.as_slice(), self.probs.as_slice()].concat();
        group.all_reduce_f64(&mut values)?;
        self.tokens = values[0];
        self.counts.copy_from_slice(&values[1..=experts]);
        self.probs.copy_from_slice(&values[experts + 1..]);
        Ok(())
    }
}
