//! Kernels: sources in the binary, compiled by NVRTC for the card at hand, kept on disk as cubins.

use std::ffi::{CStr, CString};
use std::path::PathBuf;

use cudarc::nvrtc::{result, sys};
use sha2::{Digest, Sha256};

use super::device::{Gpu, Kernel};
use crate::error::{Error, Result};
use crate::files;

/// A source file and the kernels in it.
struct Source {
    file: &'static str,
    text: &'static str,
    kernels: &'static [&'static str],
}

macro_rules! source {
    ($file:literal, [$($kernel:literal),*]) => {
        Source { file: $file, text: include_str!(concat!("../../kernels/", $file, ".cu")), kernels: &[$($kernel),*] }
    };
}

const COMMON: &str = include_str!("../../kernels/common.cuh");

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
        Ok(AttentionKernels { forward: found[0], delta: found[1], dq: found[2], dkv: found[3], sum: found[4] })
    }
}

/// Compiles every kernel for a card, and returns what the assembler says of each file: registers, spills.
pub fn check(capability: u32) -> Result<Vec<(String, String)>> {
    let mut notes = Vec::new();
    let plain = SOURCES.iter().map(|s| (s, None));
    let heads = HEAD_DIMS.iter().flat_map(|dim| [false, true].map(|softcap| Heads { dim: *dim, softcap }));
    for (source, heads) in plain.chain(heads.map(|h| (&ATTENTION, Some(h)))) {
        let (_, log) = compile(source.file, &text(source, heads), capability)?;
        let capped = |h: Heads| if h.softcap { ", capped" } else { "" };
        let name = heads.map_or_else(|| source.file.into(), |h| format!("{} of {}{}", source.file, h.dim, capped(h)));
        notes.push((name, log));
    }
    Ok(notes)
}

fn text(source: &Source, heads: Option<Heads>) -> String {
    let define = |h: Heads| format!("#define DIM {}\n#define SOFTCAP {}\n", h.dim, u8::from(h.softcap));
    let define = heads.map(define).unwrap_or_default();
    format!("{define}{COMMON}\n{}", source.text)
}

/// The cubin of a source: from the cache, or compiled and put there.
fn image(source: &Source, capability: u32, heads: Option<Heads>) -> Result<Vec<u8>> {
    let text = text(source, heads);
    let compiler = version()?;
    let hash = Sha256::digest(format!("{capability} {compiler:?} {}\n{text}", OPTIONS.join(" ")));
    let name: String = hash.iter().map(|b| format!("{b:02x}")).collect();
    let path: PathBuf = files::cache_folder().join("kernels").join(format!("{}-{name}.cubin", source.file));
    if let Ok(image) = std::fs::read(&path) {
        return Ok(image);
    }
    let (image, _) = compile(source.file, &text, capability)?;
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
fn compile(file: &str, text: &str, capability: u32) -> Result<(Vec<u8>, String)> {
    let failed = |what: &str, e: result::NvrtcError| Error::run(format!("NVRTC: {what} {file}.cu: {e:?}"));
    let source = CString::new(text).map_err(|_| Error::run("a kernel's source has a zero"))?;
    let name = CString::new(format!("{file}.cu")).map_err(|_| Error::run("a kernel's name has a zero"))?;
    let program = result::create_program(source.as_c_str(), Some(name.as_c_str())).map_err(|e| failed("reading", e))?;
    let mut options = vec![format!("--gpu-architecture=sm_{capability}")];
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
