//! The losses of the DPO family, formula by formula those of TRL 1.16 (`DPOTrainer._compute_loss`), their kin that need no
//! reference model, and those over another number of answers than two.
//!
//! A loss is a constant of type [`Loss`]: its text for the user, its options, and its formula over dual numbers. A new
//! one is one more constant and its name in the list below; `tests/golden.rs` then asks for its numbers.

/// What a name in a formula means, for the user who reads it in `dpo-host describe`.
macro_rules! meaning {
    (ls) => {
        "ls(x) = log sigmoid(x)"
    };
    (e) => {
        "e = label_smoothing"
    };
    (D) => {
        "D = s(rw) - s(rl), where s(r) = r unless f_divergence says otherwise"
    };
    (s) => {
        "s(r) = r unless f_divergence says otherwise"
    };
    (ratios) => {
        "rw, rl = log pi - log pi_ref of the chosen and of the rejected answer"
    };
    (logps) => {
        "Lw, Ll = log pi of the chosen and of the rejected answer"
    };
    (tokens) => {
        "|yw|, |yl| = their tokens"
    };
    (NLL) => {
        "NLL = minus the mean log-prob of the chosen answers' tokens, over the whole step (nll_mean=tokens), or of each answer's mean (answers)"
    };
    (NLLP) => {
        "NLLP = minus the mean log-prob of the tokens of prompts, their first excepted, and chosen answers, over the whole step"
    };
    (scores) => {
        "s(j) = score of answer j"
    };
    (running) => {
        "shift = mean of beta r over all answers of all steps so far, this one included"
    };
    (ratio) => {
        "r = log pi - log pi_ref of the answer"
    };
    (mismatched) => {
        "z = max(0, mean over the step of log pi - log pi_ref of answers to other prompts); no gradient flows through it"
    };
    (weights) => {
        "wd, wu = desirable_weight, undesirable_weight"
    };
    (ranking) => {
        "r(j) = log pi - log pi_ref of answer j, best first"
    };
}

/// A formula, and below it the names in it.
macro_rules! formula {
    ($text:literal, $($name:ident),*) => { concat!($text $(, "\n  ", meaning!($name))*) };
}

pub mod options;
pub mod ranked;
pub mod reference;
pub mod reference_free;
pub mod unpaired;

use dpo_plugin_api::prelude::*;
use ranked::{ALL_PAIRS, PLACKETT_LUCE, REBEL, SDPO};
use reference::{
    AOT, AOT_UNPAIRED, APO_DOWN, APO_ZERO, BCO_PAIR, CAL_DPO, DISCOPOP, DPOP, EXO_PAIR, HINGE, IPO, NCA_PAIR, R_DPO,
    ROBUST, SIGMOID, SIGMOID_NORM, SPPO_HARD,
};
use reference_free::{ALPHAPO, CPO, ORPO, ORPO_PROMPT, SFT, SIMPO};
use unpaired::{APO_ZERO_UNPAIRED, BCO, KTO};

/// A loss as a value.
pub struct Loss {
    name: &'static str,
    summary: &'static str,
    formula: &'static str,
    peers: &'static str,
    needs: Needs,
    options: fn() -> Vec<LossOption>,
    eval: fn(&LossBatch<'_>, &Options, &mut Vec<f64>) -> Result<LossGrad>,
}

/// What a loss needs that looks at one example at a time.
const fn needs(answers: Answers, reference: bool) -> Needs {
    Needs { answers, reference, whole_batch: false, mismatched: false, prompt: false, statistics: Vec::new() }
}

/// What a loss needs that looks at all examples of a step, and at answers to other prompts if they are asked for.
const fn needs_whole_batch(answers: Answers, mismatched: bool) -> Needs {
    Needs { answers, reference: true, whole_batch: true, mismatched, prompt: false, statistics: Vec::new() }
}

/// What losses need that know only the policy, and of it the prompt's likelihood too.
const OF_PROMPTS: Needs = Needs {
    answers: Answers::Pair,
    reference: false,
    whole_batch: false,
    mismatched: false,
    prompt: true,
    statistics: Vec::new(),
};
/// What most losses need: pairs and the reference.
const PAIRWISE: Needs = needs(Answers::Pair, true);
/// What losses need that compare the answers of different pairs.
const WHOLE_BATCH: Needs = needs_whole_batch(Answers::Pair, false);
/// What losses need that know only the policy.
const REFERENCE_FREE: Needs = needs(Answers::Pair, false);

impl AlignmentLoss for Loss {
    fn name(&self) -> &'static str {
        self.name
    }

    fn summary(&self) -> &'static str {
        self.summary
    }

    fn formula(&self) -> &'static str {
        self.formula
    }

    fn peers(&self) -> &'static str {
        self.peers
    }

    fn needs(&self) -> Needs {
        self.needs.clone()
    }

    fn options(&self) -> Vec<LossOption> {
        (self.options)()
    }

    fn eval(&self, batch: &LossBatch<'_>, options: &Options, state: &mut Vec<f64>) -> Result<LossGrad> {
        (self.eval)(batch, options, state)
    }
}

/// Exports losses, and lists them for those who test all of them.
macro_rules! export {
    ($($loss:ident),* $(,)?) => {
        /// Every loss of this crate.
        pub const ALL: &[Loss] = &[$($loss),*];
        plugin! { losses: [$($loss),*] }
    };
}

export! {
    SIGMOID, HINGE, IPO, EXO_PAIR, NCA_PAIR, ROBUST, BCO_PAIR, SPPO_HARD, AOT, AOT_UNPAIRED, APO_ZERO, APO_DOWN,
    DISCOPOP, SIGMOID_NORM, DPOP, R_DPO, CAL_DPO,
    SFT, SIMPO, ALPHAPO, CPO, ORPO, ORPO_PROMPT,
    PLACKETT_LUCE, SDPO, ALL_PAIRS, REBEL,
    KTO, APO_ZERO_UNPAIRED, BCO,
}

/// `-(1-e) ls(x) - e ls(-x)`: the logistic loss where a share `e` of the labels is taken to be flipped.
fn logistic(x: Dual, e: f64) -> Dual {
    -(1.0 - e) * x.log_sigmoid() - e * (-x).log_sigmoid()
}
