//! How a checkpoint is read, for every command that opens one.

use clap::Args;
use dpo_core::aux_loss::RouterAuxLoss;
use dpo_hub::model::ModelOptions;
use serde::Serialize;

#[derive(Args, Clone, Debug, Default, Serialize)]
pub(crate) struct ModelArgs {
    /// Model family (see `dpo-host list models`) [default: the one that claims the checkpoint's architecture]
    #[arg(long, value_name = "NAME")]
    pub(crate) plugin: Option<String>,
    #[command(flatten)]
    #[serde(flatten)]
    config: ConfigArgs,
}

#[derive(Args, Clone, Debug, Default, Serialize)]
pub(crate) struct ConfigArgs {
    /// Key of config.json to leave out of account, since it changes nothing that the model computes; may be repeated [default: none;
    /// keys that may change it are refused]
    #[arg(long, value_name = "NAME")]
    pub(crate) ignore_config_key: Vec<String>,
}

impl ModelArgs {
    /// As checkpoints are opened.
    pub(crate) fn options(&self) -> ModelOptions {
        ModelOptions {
            plugin: self.plugin.clone(),
            ignored_keys: self.config.ignore_config_key.clone(),
            router_aux_loss: RouterAuxLoss::Off,
        }
    }
}
