//! Plugins that load well and fail when they are called.

use dpo_plugin_api::prelude::*;

/// A loss by its name and what it answers.
pub struct Failing {
    name: &'static str,
    eval: fn(&LossBatch<'_>) -> LossGrad,
}

impl AlignmentLoss for Failing {
    fn name(&self) -> &'static str {
        self.name
    }

    fn summary(&self) -> &'static str {
        "for tests"
    }

    fn formula(&self) -> &'static str {
        "none"
    }

    fn eval(&self, batch: &LossBatch<'_>, _: &Options, _: &mut Vec<f64>) -> Result<LossGrad> {
        Ok((self.eval)(batch))
    }
}

/// A format that panics on every row.
pub struct PanickingFormat;

impl DatasetFormat for PanickingFormat {
    fn name(&self) -> &'static str {
        "panicking-format"
    }

    fn summary(&self) -> &'static str {
        "for tests"
    }

    fn examples(&self) -> &'static str {
        r#"{"hostile": true}"#
    }

    fn recognises(&self, row: &Row) -> u8 {
        row.contains_key("hostile").into()
    }

    fn records(&self, _: &Row) -> Result<Vec<Record>> {
        panic!("no record comes to mind")
    }
}

/// A format that makes more records of a row than there can be.
pub struct FloodingFormat;

impl DatasetFormat for FloodingFormat {
    fn name(&self) -> &'static str {
        "flooding-format"
    }

    fn summary(&self) -> &'static str {
        "for tests"
    }

    fn examples(&self) -> &'static str {
        r#"{"hostile": true}"#
    }

    fn recognises(&self, _: &Row) -> u8 {
        0
    }

    fn records(&self, _: &Row) -> Result<Vec<Record>> {
        let text = || Text::Plain(String::new());
        Ok((0..1_000_000).map(|_| Record::pair(text(), text(), text())).collect())
    }
}

/// A loss whose state is not finite from the second step on.
pub struct Forgetful;

impl AlignmentLoss for Forgetful {
    fn name(&self) -> &'static str {
        "nan-state-loss"
    }

    fn summary(&self) -> &'static str {
        "for tests"
    }

    fn formula(&self) -> &'static str {
        "0"
    }

    fn eval(&self, batch: &LossBatch<'_>, _: &Options, state: &mut Vec<f64>) -> Result<LossGrad> {
        *state = vec![if state.is_empty() { 1.0 } else { f64::NAN }];
        Ok(batch.zero())
    }
}

plugin! {
    losses: [
        Failing { name: "panicking-loss", eval: |_| panic!("no loss comes to mind") },
        Failing { name: "nan-loss", eval: |batch| batch.each_pair(|_| f64::NAN.into()) },
        Forgetful,
        Failing { name: "index-loss", eval: |batch| batch.each_pair(|p| f64::from(p.chosen.policy[1000]).into()) },
    ],
    datasets: [PanickingFormat, FloodingFormat],
}
