//! Kernels: sources in the binary, compiled by NVRTC for the card at hand, kept on disk as cubins.

use std::ffi::{CStr, CString};

use cudarc::nvrtc::{result, sys};
use rayon::prelude::*;

use super::gpu::{Gpu, Kernel};
use dpo_core::cache;
use dpo_core::error::{Error, Result};

/// A source file and the kernels in it.
pub(crate) struct Source {
    pub file: &'static str,
    pub text: &'static str,
    pub kernels: &'static [&'static str],
    /// All ways to compile it for a card, where there are more than one.
    pub variants: Option<fn(u32) -> Vec<Variant>>,
}

/// One way to compile a source, for one card.
#[derive(Clone)]
pub(crate) struct Variant {
    pub source: &'static Source,
    /// What tells its kernels from those of the source's other variants.
    pub key: usize,
    /// What `doctor` calls it.
    pub label: String,
    /// Macros before the source, and functions behind it.
    pub before: String,
    pub after: &'static str,
    /// Whether it uses instructions that only this generation of cards has.
    pub generation: bool,
    /// Bytes of shared memory that its kernels take.
    pub shared: Vec<(&'static str, usize)>,
}

/// What every source begins with.
const COMMON: &str = include_str!("ops/common.cuh");

/// Cards that the kernels are checked for: Ampere, Ada, Hopper, Blackwell.
pub const ARCHITECTURES: &[u32] = &[80, 86, 89, 90, 120];

/// Compiled kernels.
#[derive(Default)]
pub(crate) struct Kernels {
    all: Vec<Compiled>,
}

struct Compiled {
    name: &'static str,
    key: usize,
    kernel: Kernel,
    shared: usize,
}

impl Source {
    /// A source that is compiled in one way.
    pub(crate) const fn plain(file: &'static str, text: &'static str, kernels: &'static [&'static str]) -> Source {
        Source { file, text, kernels, variants: None }
    }

    fn variants(&'static self, capability: u32) -> Vec<Variant> {
        self.variants.map_or_else(|| vec![Variant::plain(self)], |all| all(capability))
    }
}

impl Variant {
    fn plain(source: &'static Source) -> Variant {
        Variant {
            source,
            key: 0,
            label: String::new(),
            before: String::new(),
            after: "",
            generation: false,
            shared: Vec::new(),
        }
    }

    fn text(&self) -> String {
        let text = format!("{}{COMMON}\n{}", self.before, self.source.text);
        if self.source.variants.is_some() { format!("{text}\n{}", self.after) } else { text }
    }

    /// NVRTC's name of a card; with an `a`, instructions that only this generation has.
    fn architecture(&self, capability: u32) -> String {
        format!("sm_{capability}{}", if self.generation { "a" } else { "" })
    }
}

impl Kernels {
    /// Compiles or reads sources that are compiled in one way, and these variants of the others.
    pub(super) fn load(
        gpu: &Gpu,
        sources: impl Iterator<Item = &'static Source>,
        variants: impl Iterator<Item = Variant>,
    ) -> Result<Kernels> {
        let mut kernels = Kernels::default();
        for source in sources.filter(|s| s.variants.is_none()) {
            kernels.add(gpu, &Variant::plain(source))?;
        }
        for variant in variants {
            if !kernels.all.iter().any(|k| k.name == variant.source.kernels[0] && k.key == variant.key) {
                kernels.add(gpu, &variant)?;
            }
        }
        Ok(kernels)
    }

    fn add(&mut self, gpu: &Gpu, variant: &Variant) -> Result<()> {
        let names = variant.source.kernels;
        for (name, kernel) in names.iter().copied().zip(gpu.load(&image(variant, gpu.capability)?, names)?) {
            let shared = variant.shared.iter().find(|(n, _)| *n == name).map_or(0, |(_, bytes)| *bytes);
            if shared > 0 {
                gpu.allow_shared(kernel, shared)?;
            }
            self.all.push(Compiled { name, key: variant.key, kernel, shared });
        }
        Ok(())
    }

    /// The kernel of a name.
    pub(crate) fn get(&self, name: &str) -> Result<Kernel> {
        self.variant(name, 0).map(|(kernel, _)| kernel)
    }

    /// The kernel of a name and a variant, and the shared memory that it takes.
    pub(crate) fn variant(&self, name: &str, key: usize) -> Result<(Kernel, usize)> {
        let found = self.all.iter().find(|k| k.name == name && k.key == key);
        found.map(|k| (k.kernel, k.shared)).ok_or_else(|| Error::run(format!("there is no kernel '{name}'")))
    }
}

/// Compiles every kernel for a card, and returns what the assembler says of each file: registers, spills.
pub(super) fn check(sources: impl Iterator<Item = &'static Source>, capability: u32) -> Result<Vec<(String, String)>> {
    let all: Vec<Variant> = sources.flat_map(|s| s.variants(capability)).collect();
    let check = |variant: &Variant| {
        let file = variant.source.file;
        let (_, log) = compile(file, &variant.text(), &variant.architecture(capability))?;
        Ok((if variant.label.is_empty() { file.into() } else { format!("{file} of {}", variant.label) }, log))
    };
    all.par_iter().map(check).collect()
}

/// The cubin of a source: from the cache, or compiled and put there.
fn image(variant: &Variant, capability: u32) -> Result<Vec<u8>> {
    let (text, architecture, file) = (variant.text(), variant.architecture(capability), variant.source.file);
    let compiler = version()?;
    let version = format!("{compiler:?}");
    let of = [architecture.as_bytes(), version.as_bytes(), &OPTIONS.join(" ").into_bytes(), text.as_bytes()];
    let name = format!("{file}-{}", cache::name(&of));
    if let Some(image) = cache::read(CACHE, &name) {
        return Ok(image);
    }
    let (image, _) = compile(file, &text, &architecture)?;
    // A cache that cannot be written costs a second in the next run, not this run.
    let _ = cache::write(CACHE, &name, &image);
    Ok(image)
}

/// Where images are cached.
const CACHE: &str = "kernels";

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
