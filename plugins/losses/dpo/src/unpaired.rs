//! Losses over single answers that were liked or not.

use dpo_plugin_api::loss::Answer;
use dpo_plugin_api::prelude::*;

use crate::options::{beta, positive};
use crate::{Loss, needs, needs_whole_batch};

/// KTO (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8). Its reference point z is estimated, as TRL's `KTOTrainer` does, from the
/// answers of the same step under prompts that they do not belong to.
pub const KTO: Loss = Loss {
    name: "kto",
    summary: "KTO (Ethayarajh et al. 2024): answers that were liked or not, each by itself, in batches of several",
    formula: formula!(
        "liked: wd (1 - sigmoid(beta (r - z))), not liked: wu (1 - sigmoid(beta (z - r)))",
        ratio,
        mismatched,
        weights
    ),
    needs: needs_whole_batch(Answers::Labelled, true),
    options: || {
        let weight = |name: &str, of: &str| LossOption::new(name, 1.0, &format!("weight of answers that {of}"));
        vec![beta(0.1), weight("desirable_weight", "were liked"), weight("undesirable_weight", "were not")]
    },
    eval: |batch, o| {
        let beta = positive(o, "beta")?;
        let (liked, disliked) = (positive(o, "desirable_weight")?, positive(o, "undesirable_weight")?);
        let mismatched = batch.examples.iter().filter_map(|e| e.answers.last().filter(|a| a.detached));
        let ratios: Vec<f64> = mismatched.map(Answer::ratio).collect();
        if ratios.len() != batch.examples.len() {
            let without = batch.examples.len() - ratios.len();
            return Err(Error::new(format!(
                "{without} of {} examples have no mismatched answer",
                batch.examples.len()
            )));
        }
        let z = (ratios.iter().sum::<f64>() / ratios.len().max(1) as f64).max(0.0);
        Ok(batch.each_example(|e| match is_liked(e) {
            true => liked * (1.0 - sigmoid(beta * (e.ratio(0) - z))),
            false => disliked * (1.0 - sigmoid(beta * (z - e.ratio(0)))),
        }))
    },
};

/// APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266) for single answers, as TRL's `KTOTrainer` has it.
pub const APO_ZERO_UNPAIRED: Loss = Loss {
    name: "apo_zero_unpaired",
    summary: "APO-zero (D'Oosterlinck et al. 2024) over answers that were liked or not",
    formula: formula!("liked: 1 - sigmoid(beta r), not liked: sigmoid(beta r)", ratio),
    needs: needs(Answers::Labelled, true),
    options: || vec![beta(0.1)],
    eval: |batch, o| {
        let beta = positive(o, "beta")?;
        Ok(batch.each_example(|e| {
            let p = sigmoid(beta * e.ratio(0));
            if is_liked(e) { 1.0 - p } else { p }
        }))
    },
};

fn is_liked(example: &Example<'_>) -> bool {
    example.answers.first().is_some_and(|a| a.label > 0.0)
}

fn sigmoid(x: Dual) -> Dual {
    x.log_sigmoid().exp()
}
