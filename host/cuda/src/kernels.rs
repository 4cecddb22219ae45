//! Kernels: sources in the binary, compiled by NVRTC for the card at hand, kept on disk as cubins.

use std::ffi::{CStr, CString};
use std::path::PathBuf;

use cudarc::nvrtc::{result, sys};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::device::{Gpu, Kernel};
use dpo_core::error::{Error, Result};
use dpo_core::files;

/// A source file and the kernels in it.
struct Source {
    file: &'static str,
    text: &'static str,
    kernels: &'static [&'static str],
}

macro_rules! source {
    ($file:literal, [$($kernel:literal),*]) => {
        Source { file: $file, text: include_str!(concat!("../kernels/", $file, ".cu")), kernels: &[$($kernel),*] }
    };
}

const COMMON: &str = include_str!("../kernels/common.cuh");

/// All kernels but attention's, which are compiled for a width of heads.
const SOURCES: &[Source] = &[
    source!("add", ["add", "copy"]),
    source!("adamw", ["adamw", "sum_squares", "spread", "collect", "random"]),
    source!("embedding", ["gather", "gather_rows", "scatter_rows"]),
    source!("glu", ["glu", "glu_vjp"]),
    source!("lm_head", ["log_prob", "scale_rows"]),
    source!("rms_norm", ["rms_norm", "rms_norm_vjp"]),
    source!("rope", ["rope_table", "rope"]),
];

const ATTENTION: Source =
    source!("attention", ["attention", "attention_delta", "attention_dq", "attention_dkv", "attention_sum"]);

/// Attention's kernels for Hopper's own instructions, which take the place of those in `attention.cu`.
const HOPPER: &str = include_str!("../kernels/attention_hopper.cu");

/// Widths of heads for which Hopper's are used.
const HOPPER_DIMS: &[usize] = &[64, 128];

/// Widths of heads that attention is written for.
pub const HEAD_DIMS: &[usize] = &[16, 32, 64, 80, 96, 112, 128, 256];

/// Cards that the kernels are checked for: Ampere, Ada, Hopper, Blackwell.
pub const ARCHITECTURES: &[u32] = &[80, 86, 89, 90, 120];

/// Compiled kernels by name.
pub struct Kernels {
    all: Vec<(&'static str, Kernel)>,
}

/// What attention is compiled for: the width of heads, and whether scores are capped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Heads {
    /// Columns of a head.
    pub dim: usize,
    /// Whether scores are capped.
    pub softcap: bool,
}

/// Attention for one kind of heads.
#[derive(Clone, Copy)]
pub struct AttentionKernels {
    /// Output and log-sum.
    pub forward: Kernel,
    /// Sums of output times its gradient.
    pub delta: Kernel,
    /// Gradient of queries.
    pub dq: Kernel,
    /// Gradients of keys and values.
    pub dkv: Kernel,
    /// Sums over the query heads of a key head.
    pub sum: Kernel,
    /// Bytes of shared memory that forward, dq and dkv take.
    pub shared: [usize; 3],
}

impl Heads {
    /// Queries or keys of a tile, as `attention.cu` has them.
    pub fn tile(self) -> usize {
        if self.dim > 128 { 32 } else { 64 }
    }

    fn hopper(self, capability: u32) -> bool {
        capability == 90 && HOPPER_DIMS.contains(&self.dim)
    }

    /// Bytes of shared memory that forward, dq and dkv take.
    fn shared_memory(self, capability: u32) -> [usize; 3] {
        let (dim, tile) = (self.dim, self.tile());
        if self.hopper(capability) {
            // Whole tiles, from an aligned address on.
            return [4, 6, 6].map(|tiles| tiles * tile * dim * 2 + 1024);
        }
        let (row, queries) = ((dim + 8) * 2, tile / 2);
        // Rows that a warp does not hold in registers.
        let held = |rows: usize| if dim > 128 { rows } else { 0 };
        [4 * tile + held(tile), 4 * tile + held(2 * tile), 4 * queries + held(2 * tile)]
            .map(|rows| rows * row + 4 * queries * 4)
    }
}

impl Kernels {
    /// Compiles or reads all kernels but attention's.
    pub fn load(gpu: &Gpu) -> Result<Kernels> {
        let mut all = Vec::new();
        for source in SOURCES {
            let loaded = gpu.load(&image(source, gpu.capability, None)?, source.kernels)?;
            all.extend(source.kernels.iter().copied().zip(loaded));
        }
        Ok(Kernels { all })
    }

    /// The kernel of a name.
    pub fn get(&self, name: &str) -> Result<Kernel> {
        let found = self.all.iter().find(|(n, _)| *n == name).map(|(_, k)| *k);
        found.ok_or_else(|| Error::run(format!("there is no kernel '{name}'")))
    }

    /// Attention for a kind of heads, whose width is one of [`HEAD_DIMS`].
    pub fn attention(gpu: &Gpu, heads: Heads) -> Result<AttentionKernels> {
        let image = image(&ATTENTION, gpu.capability, Some(heads))?;
        let found = gpu.load(&image, ATTENTION.kernels)?;
        let shared = heads.shared_memory(gpu.capability);
        let [forward, delta, dq, dkv, sum] = found[..] else { return Err(Error::run("attention lacks a kernel")) };
        [forward, dq, dkv].iter().zip(shared).try_for_each(|(kernel, bytes)| gpu.allow_shared(*kernel, bytes))?;
        Ok(AttentionKernels { forward, delta, dq, dkv, sum, shared })
    }
}

/// Compiles every kernel for a card, and returns what the assembler says of each file: registers, spills.
pub fn check(capability: u32) -> Result<Vec<(String, String)>> {
    let plain = SOURCES.iter().map(|s| (s, None));
    let heads = HEAD_DIMS.iter().flat_map(|dim| [false, true].map(|softcap| Heads { dim: *dim, softcap }));
    let all: Vec<_> = plain.chain(heads.map(|h| (&ATTENTION, Some(h)))).collect();
    let check = |(source, heads): &(&Source, Option<Heads>)| {
        let text = text(source, capability, *heads);
        let (_, log) = compile(source.file, &text, &architecture(capability, *heads))?;
        let capped = |h: &Heads| if h.softcap { ", capped" } else { "" };
        let name = heads.as_ref().map(|h| format!("{} of {}{}", source.file, h.dim, capped(h)));
        Ok((name.unwrap_or_else(|| source.file.into()), log))
    };
    all.par_iter().map(check).collect()
}

fn text(source: &Source, capability: u32, heads: Option<Heads>) -> String {
    let Some(heads) = heads else { return format!("{COMMON}\n{}", source.text) };
    let (dim, softcap, hopper) = (heads.dim, u8::from(heads.softcap), heads.hopper(capability));
    let defines = format!("#define DIM {dim}\n#define SOFTCAP {softcap}\n#define WGMMA {}\n", u8::from(hopper));
    format!("{defines}{COMMON}\n{}\n{}", source.text, if hopper { HOPPER } else { "" })
}

/// NVRTC's name of a card; with an `a`, instructions that only this generation has.
fn architecture(capability: u32, heads: Option<Heads>) -> String {
    format!("sm_{capability}{}", if heads.is_some_and(|h| h.hopper(capability)) { "a" } else { "" })
}

/// The cubin of a source: from the cache, or compiled and put there.
fn image(source: &Source, capability: u32, heads: Option<Heads>) -> Result<Vec<u8>> {
    let (text, architecture) = (text(source, capability, heads), architecture(capability, heads));
    let compiler = version()?;
    let hash = Sha256::digest(format!("{architecture} {compiler:?} {}\n{text}", OPTIONS.join(" ")));
    let name: String = hash.iter().map(|b| format!("{b:02x}")).collect();
    let path: PathBuf = files::cache_folder().join("kernels").join(format!("{}-{name}.cubin", source.file));
    if let Ok(image) = std::fs::read(&path) {
        return Ok(image);
    }
    let (image, _) = compile(source.file, &text, &architecture)?;
    // A cache that cannot be written costs a second in the next run, not this run.
    let _ = files::write(&path, &image);
    Ok(image)
}

const OPTIONS: &[&str] = &["--std=c++17", "--ptxas-options=-v"];

/// NVRTC's version.
pub fn version() -> Result<(i32, i32)> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two numbers.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result().map_err(|e| Error::run(format!("NVRTC: {e:?}")))?;
    Ok((major, minor))
}

/// A cubin, and what the compiler said.
fn compile(file: &str, text: &str, architecture: &str) -> Result<(Vec<u8>, String)> {
    let failed = |what: &str, e: result::NvrtcError| Error::run(format!("NVRTC: {what} {file}.cu: {e:?}"));
    let source = CString::new(text).map_err(|_| Error::run("a kernel's source has a zero"))?;
    let name = CString::new(format!("{file}.cu")).map_err(|_| Error::run("a kernel's name has a zero"))?;
    let program = result::create_program(source.as_c_str(), Some(name.as_c_str())).map_err(|e| failed("reading", e))?;
    let mut options = vec![format!("--gpu-architecture={architecture}")];
    options.extend(OPTIONS.iter().map(|o| (*o).to_owned()));
    // SAFETY: the program lives until it is destroyed below; buffers have the sizes NVRTC asked for.
    unsafe {
        let outcome = result::compile_program(program, &options);
        let log = result::get_program_log(program).map_err(|e| failed("compiling", e))?;
        let log = CStr::from_ptr(log.as_ptr()).to_string_lossy().into_owned();
        if let Err(e) = outcome {
            let _ = result::destroy_program(program);
            return Err(failed("compiling", e).help(log));
        }
        let mut size = 0;
        sys::nvrtcGetCUBINSize(program, &mut size).result().map_err(|e| failed("compiling", e))?;
        let mut image = vec![0_u8; size];
        sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()).result().map_err(|e| failed("compiling", e))?;
        result::destroy_program(program).map_err(|e| failed("compiling", e))?;
        Ok((image, log))
    }
}
