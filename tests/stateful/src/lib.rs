//! A loss with a memory: BCO as it was first published (Jung et al. 2024, eq. 8), whose reward shift is a running mean. One that
//! takes its time, one that never ends on a rank, one that overflows, and a format of rankings.

use dpo_plugin_api::dataset::{column, plain_text};
use dpo_plugin_api::prelude::*;

/// The loss.
pub struct Shifted;

impl AlignmentLoss for Shifted {
    fn name(&self) -> &'static str {
        "bco-shifted"
    }

    fn summary(&self) -> &'static str {
        "for tests: BCO with a running mean of rewards"
    }

    fn formula(&self) -> &'static str {
        "-ls(rw - d) - ls(-(rl - d)), d = running mean of (rw + rl) / 2"
    }

    fn eval(&self, batch: &LossBatch<'_>, _: &Options, state: &mut Vec<f64>) -> Result<LossGrad> {
        let shift = state.first().copied().unwrap_or(0.0);
        let rewards = batch.pairs().into_iter().map(|p| (p.chosen_ratio().value + p.rejected_ratio().value) / 2.0);
        let mean = rewards.sum::<f64>() / batch.examples.len() as f64;
        *state = vec![0.5 * shift + 0.5 * mean];
        let of = |p: &Pair<'_>| -(p.chosen_ratio() - shift).log_sigmoid() - (shift - p.rejected_ratio()).log_sigmoid();
        Ok(batch.each_pair(of))
    }
}

/// A loss that computes for two seconds.
pub struct Slow;

impl AlignmentLoss for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn summary(&self) -> &'static str {
        "for tests: sigmoid, slowly"
    }

    fn formula(&self) -> &'static str {
        "-ls(rw - rl)"
    }

    fn eval(&self, batch: &LossBatch<'_>, _: &Options, _: &mut Vec<f64>) -> Result<LossGrad> {
        std::thread::sleep(std::time::Duration::from_secs(2));
        Ok(batch.each_pair(|p| -(p.chosen_ratio() - p.rejected_ratio()).log_sigmoid()))
    }
}

/// A loss that rank 1 never gets.
pub struct Stuck;

impl AlignmentLoss for Stuck {
    fn name(&self) -> &'static str {
        "stuck"
    }

    fn summary(&self) -> &'static str {
        "for tests: sigmoid, for which rank 1 computes for ever"
    }

    fn formula(&self) -> &'static str {
        "-ls(rw - rl)"
    }

    fn eval(&self, batch: &LossBatch<'_>, _: &Options, _: &mut Vec<f64>) -> Result<LossGrad> {
        while std::env::var("RANK").is_ok_and(|rank| rank == "1") {
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        Ok(batch.each_pair(|p| -(p.chosen_ratio() - p.rejected_ratio()).log_sigmoid()))
    }
}

/// A loss without a finite value for chosen answers of more than 30 tokens.
pub struct Overflowing;

impl AlignmentLoss for Overflowing {
    fn name(&self) -> &'static str {
        "overflowing"
    }

    fn summary(&self) -> &'static str {
        "for tests: sigmoid, infinite for long chosen answers"
    }

    fn formula(&self) -> &'static str {
        "-ls(rw - rl), infinite where |yw| > 30"
    }

    fn eval(&self, batch: &LossBatch<'_>, _: &Options, _: &mut Vec<f64>) -> Result<LossGrad> {
        let penalty = |p: &Pair<'_>| if p.chosen.count() > 30.0 { f64::INFINITY } else { 0.0 };
        Ok(batch.each_pair(|p| -(p.chosen_ratio() - p.rejected_ratio()).log_sigmoid() + penalty(p)))
    }
}

/// Rows of a question, answers best first, and perhaps an answer to another question.
pub struct Rankings;

impl DatasetFormat for Rankings {
    fn name(&self) -> &'static str {
        "rankings"
    }

    fn summary(&self) -> &'static str {
        "for tests: question, ranking, mismatched"
    }

    fn examples(&self) -> &'static str {
        r#"{"question": "2+2", "ranking": ["4", "four", "5"], "mismatched": "Paris"}"#
    }

    fn recognises(&self, row: &Row) -> u8 {
        if row.contains_key("question") && row.contains_key("ranking") { 2 } else { 0 }
    }

    fn records(&self, row: &Row) -> Result<Vec<Record>> {
        let turn = |role: &str, value: &Value| Ok(Text::Messages(vec![Message::new(role, plain_text(value)?)]));
        let Some(ranking) = column(row, "ranking")?.as_array() else { return bail!("'ranking' should be a list") };
        let answers = ranking.iter().map(|answer| turn("assistant", answer)).collect::<Result<Vec<Text>>>()?;
        let mut record = Record::ranked(turn("user", column(row, "question")?)?, answers);
        if let Some(answer) = row.get("mismatched") {
            record.answers.push(RecordAnswer { text: turn("assistant", answer)?, label: 0.0, detached: true });
        }
        Ok(vec![record])
    }
}

plugin! {
    losses: [Shifted, Slow, Stuck, Overflowing],
    datasets: [Rankings],
}
