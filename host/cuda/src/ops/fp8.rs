//! Linears and experts whose W is kept in e4m3. Of linears: what a product reads of x, and of gradients, is quantised by rows before it, and W transposed for the
//! backward pass, since the tensor cores read both sides of such a product along k.

use super::{
    Address, Args, Execute, Gpu, Kernels, Launch, LoadedFp8, Lowering, Slice, Source, Step, View, transposed_ld,
};
use dpo_core::error::Result;

pub(crate) static SOURCE: Source = Source {
    waits: true,
    variants: Some(|capability| if capability < 89 { Vec::new() } else { vec![super::Variant::plain(&SOURCE)] }),
    ..Source::plain(
        "fp8",
        concat!(include_str!("dequantize.cuh"), include_str!("fp8.cu")),
        &["quantize_fp8", "transpose_fp8", "dequantize_fp8", "random_fp8"],
    )
};

/// Pieces of eight values of a row that a thread keeps; `HELD` of `fp8.cu`.
const HELD: usize = 8;

/// Threads of a row, at most.
const MOST: usize = 1024;

/// Side of the squares that are transposed.
const SIDE: usize = 128;

/// Rows as codes and scales; with the stack whose rows' scales they are multiplied by before.
struct Quantize {
    width: usize,
    scales: Option<usize>,
}

/// Columns of bf16 that codes of a row and the scale behind them take, in whole pieces of 16 bytes.
fn columns(width: usize) -> usize {
    (width + 4).next_multiple_of(16) / 2
}

/// Pushes a step that quantises rows, multiplied by the scales of a stack's outputs where one is given; where they will lie.
pub(super) fn quantized(l: &mut Lowering<'_>, x: Slice, scales: Option<usize>) -> Result<Slice> {
    let codes = l.buffer(columns(x.width), 0);
    l.push(Step::new("quantize", [x], [codes], Quantize { width: x.width, scales }))?;
    Ok(codes)
}

/// W `[outputs, inputs]` as `[inputs, outputs]`, in the workspace: where, and bytes from row to row.
pub(super) fn transposed(on: &Launch<'_>, w: &LoadedFp8, [outputs, inputs]: [usize; 2]) -> Result<(Address, usize)> {
    let to = (on.dequantized, transposed_ld(outputs));
    let args = Args::default().with(w.codes).with(to.0).with(outputs as i32).with(inputs as i32);
    let args = args.with(w.ld as i32).with(to.1 as i32);
    let grid = [inputs.div_ceil(SIDE), outputs.div_ceil(SIDE), 1];
    on.gpu.launch(on.kernels.get("transpose_fp8")?, grid, [256, 1, 1], 0, args)?;
    on.gpu.mark("transpose")?;
    Ok(to)
}

/// Fills with random codes.
pub(crate) fn random(gpu: &Gpu, kernels: &Kernels, (at, bytes): (Address, usize), seed: u32) -> Result<()> {
    let args = Args::default().with(at).with((bytes / 4) as i64).with(seed);
    gpu.launch(kernels.get("random_fp8")?, [1024, 1, 1], [256, 1, 1], 0, args)
}

impl Execute for Quantize {
    fn variants(&self, _capability: u32) -> Vec<super::Variant> {
        vec![super::Variant::plain(&SOURCE)]
    }

    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let scales = self.scales.map_or(0, |stack| on.weights.stacks[stack].w.scales());
        let args = Args::default().with(reads[0]).with(writes[0]).with(scales).with(self.width as i32);
        let threads = (self.width / 8).div_ceil(HELD).next_multiple_of(32).min(MOST);
        on.gpu.launch(on.kernels.get("quantize_fp8")?, [on.rows, 1, 1], [threads as u32, 1, 1], 0, args)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let scales = self.scales.map(|stack| on.stack(stack).scales.clone());
        on.each_row(reads, writes, |_, read, written| {
            let scaled = |(at, v): (usize, &f32)| v * scales.as_ref().map_or(1.0, |s| s[at]);
            let values: Vec<f32> = read[0].iter().enumerate().map(scaled).collect();
            written[0] = emulated::pack(&values, writes[0].width);
        });
    }
}

/// Codes in the emulator, whose memory has a number for every two bytes: two of twelve bits are a number. So rounding does not hide what
/// a program does wrong; that of e4m3 is the kernels', which the self-test compares.
#[cfg(test)]
pub(super) mod emulated {
    const LARGEST: f32 = 2047.0;

    pub(in super::super) fn pack(values: &[f32], columns: usize) -> Vec<f32> {
        let scale = values.iter().fold(f32::MIN_POSITIVE, |most, v| most.max(v.abs())) / LARGEST;
        let code = |v: f32| (v / scale).round() + LARGEST;
        let mut row: Vec<f32> = values.as_chunks::<2>().0.iter().map(|[a, b]| code(*a) + 4096.0 * code(*b)).collect();
        row.push(scale);
        row.resize(columns, 0.0);
        row
    }

    pub(in super::super) fn unpack(row: &[f32], width: usize) -> Vec<f32> {
        let codes = row[..width / 2].iter().flat_map(|two| [two % 4096.0, (two / 4096.0).floor()]);
        codes.map(|code| (code - LARGEST) * row[width / 2]).collect()
    }
}
