//! Rows of a table, one for each token id. Its input is the token ids, which take no gradient; its table is frozen.

use candle_core::{DType, Tensor};

use super::{Call, Gradients, Kernel, Op, main_weight};
use crate::error::Result;

pub(super) const OP: Op = Op { name: "embedding", cached_inputs: &[], kernel: Kernel::Value { forward, vjp } };

fn forward(call: &Call<'_>) -> Result<Tensor> {
    let rows = main_weight(call)?.index_select(call.inputs[0], 0)?;
    // A table that is kept in bf16.
    Ok(if rows.dtype() == DType::BF16 { rows.to_dtype(DType::F32)? } else { rows })
}

fn vjp(_: &Call<'_>, _: &Tensor) -> Result<Gradients> {
    Ok(Gradients { inputs: vec![None], loras: Vec::new() })
}
