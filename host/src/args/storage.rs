//! How the frozen base is kept: flags that several commands share.

use clap::{Args, ValueEnum};
use dpo_core::plan::MemoryOptions;
use dpo_core::storage::Quantization;
use serde::Serialize;

use super::Auto;

#[derive(Args, Clone, Debug, Serialize)]
#[command(next_help_heading = "Device")]
pub(crate) struct StorageArgs {
    /// Keep the matrices of the frozen base small, as QLoRA does: nf4 takes 0.52 bytes a weight, fp8 takes 1, mxfp4 0.53 of experts;
    /// LoRA, embeddings and head stay as they are
    #[arg(long, value_enum, default_value_t = QuantizationArg::Auto)]
    quantization: QuantizationArg,
    /// Keep the layers' frozen weights in host memory, and copy each to the GPU before it is computed; auto does so where
    /// they do not fit otherwise, or where that is clearly faster
    #[arg(long, value_name = "auto|true|false", num_args = 0..=1, default_missing_value = "true", default_value_t = Auto(None))]
    offload_base: Auto<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
enum QuantizationArg {
    /// In what the device computes in; experts that are published in mxfp4 stay so where that is better, with the same numbers
    Auto,
    /// In what the device computes in
    None,
    /// float8 e4m3, a scale for each row
    Fp8,
    /// 4-bit NormalFloat in blocks of 64, double quantised, as bitsandbytes has it
    Nf4,
    /// OCP's 4-bit e2m1 in blocks of 32, of experts alone: the checkpoint's own, as gpt-oss has them, or rounded to it
    Mxfp4,
}

impl StorageArgs {
    /// With these.
    pub(crate) fn on(&self, options: MemoryOptions) -> MemoryOptions {
        let quantization = match self.quantization {
            QuantizationArg::Auto | QuantizationArg::None => None,
            QuantizationArg::Fp8 => Some(Quantization::Fp8),
            QuantizationArg::Nf4 => Some(Quantization::Nf4),
            QuantizationArg::Mxfp4 => Some(Quantization::Mxfp4),
        };
        let published = (self.quantization == QuantizationArg::Auto).then_some(Quantization::Mxfp4);
        MemoryOptions { quantization, published, offload_base: self.offload_base.0, ..options }
    }
}
