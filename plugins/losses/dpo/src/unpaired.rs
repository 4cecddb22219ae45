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
    peers: "TRL KTOTrainer `kto`, ms-swift `rlhf_type kto`, LLaMA-Factory `stage: kto`; all estimate z within a micro-batch of a device instead of the step",
    needs: needs_whole_batch(Answers::Labelled, true),
    options: || {
        let weight = |name: &str, of: &str| LossOption::new(name, 1.0, &format!("weight of answers that {of}"));
        vec![beta(0.1), weight("desirable_weight", "were liked"), weight("undesirable_weight", "were not")]
    },
    eval: |batch, o, _| {
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
    peers: "TRL KTOTrainer `apo_zero_unpaired`",
    needs: needs(Answers::Labelled, true),
    options: || vec![beta(0.1)],
    eval: |batch, o, _| {
        let beta = positive(o, "beta")?;
        Ok(batch.each_example(|e| {
            let p = sigmoid(beta * e.ratio(0));
            if is_liked(e) { 1.0 - p } else { p }
        }))
    },
};

/// BCO (Jung et al. 2024, arXiv 2404.04656, eq. 6) with its reward shift: a classifier of liked answers whose logit is the reward, less
/// the running mean of rewards.
pub const BCO: Loss = Loss {
    name: "bco",
    summary: "BCO (Jung et al. 2024) with its running reward shift, over answers that were liked or not",
    formula: formula!("liked: -ls(beta r - shift), not liked: -ls(-(beta r - shift))", ls, ratio, running),
    peers: "TRL's BCOTrainer, which TRL 1.16 has no more (its density-ratio weights are not here); ms-swift's `bco_pair` and LLaMA-Factory's pref_bco_weight, which add the two terms of a pair where this is their mean",
    needs: needs_whole_batch(Answers::Labelled, false),
    options: || vec![beta(0.1)],
    eval: |batch, o, state| {
        let beta = positive(o, "beta")?;
        // The number of rewards so far, and their sum.
        let (mut count, mut sum) = match state[..] {
            [count, sum] => (count, sum),
            _ => (0.0, 0.0),
        };
        count += batch.examples.len() as f64;
        sum += batch.examples.iter().map(|e| beta * e.ratio(0).value).sum::<f64>();
        *state = vec![count, sum];
        let shift = sum / count.max(1.0);
        Ok(batch.each_example(|e| {
            let logit = beta * e.ratio(0) - shift;
            -(if is_liked(e) { logit } else { -logit }).log_sigmoid()
        }))
    },
};

fn is_liked(example: &Example<'_>) -> bool {
    example.answers.first().is_some_and(|a| a.label > 0.0)
}

fn sigmoid(x: Dual) -> Dual {
    x.log_sigmoid().exp()
}
