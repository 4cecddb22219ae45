//! Flags of trackers: where the numbers of a run go beside its folder.

use clap::{Args, ValueEnum};
use dpo_train::config::{ReportConfig, Service};
use serde::Serialize;

#[derive(Args, Clone, Debug, Serialize)]
pub(crate) struct ReportArgs {
    /// Trackers that get the run's numbers: wandb and swanlab as files to be sent with their `sync`, mlflow on the server of
    /// MLFLOW_TRACKING_URI; TensorBoard's files are always written [default: tensorboard]
    #[arg(long, value_name = "NAME", num_args = 1.., value_enum, help_heading = "Output")]
    report_to: Vec<ReportTo>,
    /// The run's name in trackers [default: that of its folder]
    #[arg(long, value_name = "NAME", help_heading = "Output")]
    run_name: Option<String>,
    /// The project of wandb and swanlab, the experiment of mlflow [default: WANDB_PROJECT, SWANLAB_PROJ_NAME,
    /// MLFLOW_EXPERIMENT_NAME, else dpo-host]
    #[arg(long, value_name = "NAME", help_heading = "Output")]
    project: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum ReportTo {
    Tensorboard,
    Wandb,
    Swanlab,
    Mlflow,
    None,
}

impl ReportTo {
    /// The tracker, where it is not one that is there anyway.
    fn service(self) -> Option<Service> {
        match self {
            ReportTo::Tensorboard | ReportTo::None => None,
            ReportTo::Wandb => Some(Service::Wandb),
            ReportTo::Swanlab => Some(Service::Swanlab),
            ReportTo::Mlflow => Some(Service::Mlflow),
        }
    }
}

impl ReportArgs {
    pub(crate) fn config(&self) -> ReportConfig {
        let mut to: Vec<Service> = Vec::new();
        for service in self.report_to.iter().filter_map(|name| name.service()) {
            if !to.contains(&service) {
                to.push(service);
            }
        }
        ReportConfig { to, run_name: self.run_name.clone(), project: self.project.clone() }
    }
}
