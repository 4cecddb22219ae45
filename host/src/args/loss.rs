//! What is trained for; shared by `train` and `eval`.

use clap::{ArgAction, Args};
use dpo_core::error::{Error, Result};
use dpo_train::ObjectiveOptions;
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};

use super::{ABOVE_0, ANY, BELOW_HALF, FROM_0, SHARE, refuse_out_of_range};

/// The losses, their weights and options.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LossArgs {
    /// Losses (see `dpo-host list losses`); several are summed by --loss-weights
    #[arg(id = "loss", long, value_name = "NAME", num_args = 1.., value_delimiter = ',', default_values_t = ["sigmoid".to_owned()], help_heading = "Loss")]
    #[serde(rename = "loss")]
    pub(crate) names: Vec<String>,
    /// Weight of each loss [default: 1]
    #[arg(long, value_name = "W", num_args = 1.., help_heading = "Loss")]
    loss_weights: Vec<f64>,
    /// KL strength beta, which also scales the rewards in the log [default: the loss's own, 0.1 for DPO]
    #[arg(long, help_heading = "Loss")]
    pub(crate) beta: Option<f64>,
    /// Probability that a preference label is wrong (cDPO with sigmoid) [default: the loss's own, 0 for DPO]
    #[arg(long, value_name = "P", help_heading = "Loss")]
    label_smoothing: Option<f64>,
    /// Weight of an added negative log-likelihood of the chosen answers (RPO) [default: 0]
    #[arg(long, value_name = "W", help_heading = "Loss")]
    pub(crate) rpo_alpha: Option<f64>,
    /// LD-DPO: weight of tokens beyond the length of the shorter answer [default: 1]
    #[arg(long, value_name = "0..1", help_heading = "Loss")]
    pub(crate) ld_alpha: Option<f64>,
    /// Divergence from the reference: reverse_kl, forward_kl, js_divergence or alpha_divergence [default: reverse_kl]
    #[arg(long, value_name = "NAME", help_heading = "Loss")]
    f_divergence: Option<String>,
    /// Weight examples by their probability under the policy (WPO)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_value_t = false, default_missing_value = "true", action = ArgAction::Set, help_heading = "Loss")]
    use_weighting: bool,
    /// Any option of a loss plugin (see `dpo-host describe NAME`) [default: the plugin's]
    #[arg(long, value_name = "NAME=VALUE", num_args = 1.., help_heading = "Loss")]
    loss_option: Vec<String>,
}

impl LossArgs {
    /// The objective that they describe.
    ///
    /// # Errors
    /// Numbers of which no loss could make sense, and options that are not NAME=VALUE.
    pub(crate) fn objective(&self) -> Result<ObjectiveOptions> {
        refuse_out_of_range(&[
            ("--beta", self.beta, ABOVE_0, "0.01 to 0.5 is usual; the lower, the further from the reference"),
            (
                "--label-smoothing",
                self.label_smoothing,
                BELOW_HALF,
                "the fraction of preferences that are wrong, such as 0.1",
            ),
            ("--rpo-alpha", self.rpo_alpha, FROM_0, "0.1 to 1 is usual"),
            ("--ld-alpha", self.ld_alpha, SHARE, "1 is plain DPO"),
        ])?;
        for weight in &self.loss_weights {
            refuse_out_of_range(&[("--loss-weights", Some(*weight), ANY, "1 is usual")])?;
        }
        let mut options = Map::new();
        let numbers = [("beta", self.beta), ("label_smoothing", self.label_smoothing)];
        options.extend(numbers.into_iter().filter_map(|(name, value)| Some((name.to_owned(), json!(value?)))));
        options.extend(self.f_divergence.iter().map(|f| ("f_divergence".to_owned(), json!(f))));
        for option in &self.loss_option {
            let Some((name, value)) = option.split_once('=') else {
                return Err(Error::input(format!("'{option}' should be NAME=VALUE"))
                    .at("--loss-option")
                    .help("`dpo-host describe LOSS` names a loss's options"));
            };
            // What is no finite number is a text, and the loss says what it thinks of that.
            let number = value.parse::<f64>().ok().filter(|n| n.is_finite());
            options.insert(name.into(), number.map_or_else(|| json!(value), |n| json!(n)));
        }
        Ok(ObjectiveOptions {
            losses: self.names.clone(),
            weights: self.loss_weights.clone(),
            options,
            rpo_alpha: self.rpo_alpha,
            ld_alpha: self.ld_alpha,
            weighting: self.use_weighting,
        })
    }
}
