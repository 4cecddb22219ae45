//! A mixture of experts in place of an MLP: a router, routed experts, experts that every token takes; how checkpoints have them.
//!
//! [`Moe::read`] gives what most families have of it. A family changes the fields that it has otherwise.

use crate::Result;
use crate::builder::{BlockBuilder, Experts, GraphBuilder, GroupScore, Groups, Router, Scoring, Var};
use crate::model::Config;
use crate::ops::AUX_LOSS_COEF;

/// A mixture of experts. Modules and tensors are named without the layer's prefix.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Moe {
    /// The module of the router, `mlp.gate`.
    pub gate: String,
    /// Whether the router's logits have a bias.
    pub gate_bias: bool,
    /// Whether the router is a linear, which PEFT adapts as any other; else its weight is a parameter of it.
    pub gate_is_linear: bool,
    /// How experts are chosen.
    pub router: Router,
    /// The experts.
    pub experts: Experts,
    /// What files may have in place of the experts' tensors.
    pub files: ExpertFiles,
    /// The expert that every token takes.
    pub shared: Option<SharedExpert>,
    /// Whether the layer has its MLP, too, to which the experts are added.
    pub beside_mlp: bool,
}

/// How published files have experts, beside the tensors of all of them that the graph reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertFiles {
    /// As the graph does.
    Fused,
    /// A tensor for each expert, of these names: of the gate, of up, of down, as in `experts.3.gate_proj.weight`.
    Each([&'static str; 3]),
    /// With rows and columns exchanged.
    Transposed,
}

/// An MLP that every token takes, beside its own experts.
#[derive(Clone, Debug, PartialEq)]
pub struct SharedExpert {
    /// Its module, with `gate_proj`, `up_proj` and `down_proj`.
    pub module: String,
    /// Width inside of it.
    pub inner: usize,
    /// Whether its projections have biases.
    pub bias: bool,
    /// The module of a gate of one column, whose sigmoid is a factor on what it gives.
    pub gate: Option<String>,
}

impl SharedExpert {
    /// One without biases or a gate.
    pub fn new(module: &str, inner: usize) -> SharedExpert {
        SharedExpert { module: module.into(), inner, bias: false, gate: None }
    }
}

impl Moe {
    /// Names of an expert's projections in most files.
    pub const PROJECTIONS: ExpertFiles = ExpertFiles::Each(["gate_proj", "up_proj", "down_proj"]);

    /// The experts of `mlp`: `count` of them, of which a token takes `top_k` by softmax.
    pub fn new(count: usize, top_k: usize, inner: usize, activation: &str) -> Moe {
        Moe {
            gate: "mlp.gate".into(),
            gate_bias: false,
            gate_is_linear: false,
            router: Router::new(Scoring::Softmax, top_k),
            experts: Experts::new("mlp.experts", count, top_k, inner, activation),
            files: Moe::PROJECTIONS,
            shared: None,
            beside_mlp: false,
        }
    }

    /// Experts as Qwen's and most configs state them: `num_experts` (or `num_local_experts`, `n_routed_experts`), `num_experts_per_tok`,
    /// `moe_intermediate_size`, `hidden_act`, and `norm_topk_prob` where scores are divided by their sum plus `eps`.
    ///
    /// # Errors
    /// A config without these sizes.
    pub fn read(config: &Config, eps: f64) -> Result<Moe> {
        let config = config.with_names(&[("num_local_experts", "num_experts"), ("n_routed_experts", "num_experts")]);
        let (count, top_k) = (config.size("num_experts")?, config.size("num_experts_per_tok")?);
        let activation = config.activation("hidden_act", "silu")?;
        let mut moe = Moe::new(count, top_k, config.size("moe_intermediate_size")?, &activation);
        moe.router.normalize = config.flag("norm_topk_prob", false)?.then_some(eps);
        Ok(moe)
    }

    /// [`read`](Self::read) with the router of DeepSeek-V3: sigmoid, a bias of the choice in the buffer `bias`, `n_group` groups of which a token
    /// takes experts of `topk_group`, `routed_scaling_factor`.
    ///
    /// # Errors
    /// A config without these sizes.
    pub fn read_sigmoid(config: &Config, bias: &str) -> Result<Moe> {
        let mut moe = Moe::read(config, 1e-20)?;
        moe.router.scoring = Scoring::Sigmoid;
        moe.router.selection_bias = Some(bias.into());
        moe.router.scale = config.opt_float("routed_scaling_factor")?.unwrap_or(1.0);
        moe.router.groups = Moe::groups(config, GroupScore::Top2Sum)?;
        Ok(moe)
    }

    /// With the auxiliary loss of transformers, whose coefficient `router_aux_loss_coef` states, else `default`: that of the family's config class.
    ///
    /// # Errors
    /// A coefficient that is no number.
    pub fn with_aux_loss(mut self, config: &Config, default: f64) -> Result<Moe> {
        // Whether transformers returns it, which trainers decide.
        config.get("output_router_logits");
        self.router.aux_loss_coef = Some(config.opt_float(AUX_LOSS_COEF)?.unwrap_or(default));
        Ok(self)
    }

    /// The groups that `n_group` and `topk_group` state, where there is more than one.
    ///
    /// # Errors
    /// Values that are no sizes.
    pub fn groups(config: &Config, score: GroupScore) -> Result<Option<Groups>> {
        let count = config.opt_size("n_group")?.unwrap_or(1);
        let top = config.opt_size("topk_group")?.unwrap_or(1);
        Ok((count > 1).then_some(Groups { count, top, score }))
    }

    /// From what the MLP would read to what it would give.
    pub fn build(&self, b: &mut BlockBuilder, x: Var) -> Var {
        let logits = match self.gate_is_linear {
            true => b.linear_if(self.gate_bias, &self.gate, x, self.experts.count),
            false => b.linear_of_parameter(self.gate_bias, &self.gate, x, self.experts.count),
        };
        let routing = b.route(logits, &self.router);
        let routed = b.experts(x, routing, &self.experts);
        match &self.shared {
            Some(shared) => {
                let shared = self.shared(b, x, shared);
                b.add(routed, shared)
            }
            None => routed,
        }
    }

    fn shared(&self, b: &mut BlockBuilder, x: Var, shared: &SharedExpert) -> Var {
        let SharedExpert { module, inner, bias, gate } = shared;
        let activation = &self.experts.activation;
        let up = b.linear_if(*bias, &format!("{module}.up_proj"), x, *inner);
        let h = match self.experts.gated {
            true => {
                let gate = b.linear_if(*bias, &format!("{module}.gate_proj"), x, *inner);
                b.glu(activation, gate, up)
            }
            false => b.activation(activation, up),
        };
        let y = b.linear_if(*bias, &format!("{module}.down_proj"), h, x.width());
        match gate {
            Some(gate) => {
                let gate = b.linear(gate, x, 1);
                b.glu("sigmoid", gate, y)
            }
            None => y,
        }
    }

    /// Tells a graph how files have the experts.
    pub fn assemble(&self, graph: &mut GraphBuilder) {
        let (up, down) = (self.experts.up.as_str(), self.experts.down.as_str());
        match self.files {
            ExpertFiles::Fused => {}
            ExpertFiles::Transposed => [up, down].iter().for_each(|tensor| graph.assembly(tensor, &[tensor], true)),
            ExpertFiles::Each(names) => {
                let front = down.rsplit_once('.').map_or("", |(front, _)| front);
                let [gate, other, out] = names.map(|name| format!("{front}.*.{name}.weight"));
                let parts: &[&str] = if self.experts.gated { &[&gate, &other] } else { &[&other] };
                graph.assembly(up, parts, false);
                graph.assembly(down, &[&out], false);
            }
        }
    }
}
