//! Kernels: sources in the binary, compiled by NVRTC for the card at hand, kept on disk as cubins.

use std::ffi::{CString, c_char, c_int};
use std::ptr;

use rayon::prelude::*;

use super::api::{self, Nvrtc, Status};
use super::gpu::{Gpu, Kernel};
use super::libraries;
use dpo_core::cache;
use dpo_core::error::{Error, Result};

/// A source file and the kernels in it.
pub(crate) struct Source {
    pub file: &'static str,
    pub text: &'static str,
    pub kernels: &'static [&'static str],
    /// Whether its kernels wait for those before by `after_previous`, so that they may be started while those end.
    pub waits: bool,
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
        Source { file, text, kernels, waits: false, variants: None }
    }

    fn variants(&'static self, capability: u32) -> Vec<Variant> {
        self.variants.map_or_else(|| vec![Variant::plain(self)], |all| all(capability))
    }
}

impl Variant {
    /// That of a source that is compiled in one way.
    pub(crate) fn plain(source: &'static Source) -> Variant {
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
        let mut all: Vec<Variant> = sources.filter(|s| s.variants.is_none()).map(Variant::plain).collect();
        for variant in variants {
            let same = |v: &Variant| std::ptr::eq(v.source, variant.source) && v.key == variant.key;
            if !all.iter().any(same) {
                all.push(variant);
            }
        }
        let capability = gpu.capability;
        let images: Vec<Result<Vec<u8>>> = all.par_iter().map(|variant| image(variant, capability)).collect();
        let mut kernels = Kernels::default();
        all.iter().zip(images).try_for_each(|(variant, image)| kernels.add(gpu, variant, &image?))?;
        Ok(kernels)
    }

    fn add(&mut self, gpu: &Gpu, variant: &Variant, image: &[u8]) -> Result<()> {
        let names = variant.source.kernels;
        for (name, kernel) in names.iter().copied().zip(gpu.load(image, names, variant.source.waits)?) {
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
    require_known(capability)?;
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
    require_known(capability)?;
    let (image, _) = compile(file, &text, &architecture)?;
    // A cache that cannot be written costs a second in the next run, not this run.
    let _ = cache::write(CACHE, &name, &image);
    Ok(image)
}

/// Where images are cached.
const CACHE: &str = "kernels";

const OPTIONS: &[&str] = &["--std=c++17", "--ptxas-options=-v"];

/// What a function of NVRTC returned, as a result.
fn done(nvrtc: &Nvrtc, what: &str, file: &str, status: Status) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: NVRTC returns a text that it keeps.
    let said = unsafe { api::text((nvrtc.nvrtcGetErrorString)(status)) };
    Err(Error::run(format!("NVRTC: {what} {file}: {said}")))
}

/// NVRTC's version.
pub fn version() -> Result<(i32, i32)> {
    let nvrtc = libraries::table::<Nvrtc>()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two numbers.
    done(nvrtc, "asking for", "its version", unsafe { (nvrtc.nvrtcVersion)(&mut major, &mut minor) })?;
    Ok((major, minor))
}

/// Whether NVRTC knows a card; the error says how to get one that does.
///
/// # Errors
/// An NVRTC that is older, or much newer, than the card.
pub fn require_known(capability: u32) -> Result<()> {
    let nvrtc = libraries::table::<Nvrtc>()?;
    let mut count = 0;
    let mut known: Vec<c_int> = Vec::new();
    // SAFETY: writes one number, then as many as that.
    unsafe {
        done(nvrtc, "asking for", "its cards", (nvrtc.nvrtcGetNumSupportedArchs)(&mut count))?;
        known.resize(count.max(1) as usize, 0);
        done(nvrtc, "asking for", "its cards", (nvrtc.nvrtcGetSupportedArchs)(known.as_mut_ptr()))?;
    }
    if known.contains(&(capability as c_int)) {
        return Ok(());
    }
    let (major, minor) = version()?;
    let newest = known.iter().max().copied().unwrap_or_default();
    let what = format!("NVRTC {major}.{minor} does not know cards of compute capability {capability}");
    let upgrade = libraries::pip_upgrade_nvrtc();
    Err(Error::run(format!("{what}; the newest that it knows is {newest}")).help(upgrade))
}

/// A cubin, and what the compiler said.
fn compile(file: &str, text: &str, architecture: &str) -> Result<(Vec<u8>, String)> {
    let nvrtc = libraries::table::<Nvrtc>()?;
    let file = format!("{file}.cu");
    let source = CString::new(text).map_err(|_| Error::run("a kernel's source has a zero"))?;
    let name = CString::new(file.as_str()).map_err(|_| Error::run("a kernel's name has a zero"))?;
    let architecture = format!("--gpu-architecture={architecture}");
    let options = std::iter::once(architecture.as_str()).chain(OPTIONS.iter().copied()).map(CString::new);
    let options: Vec<CString> =
        options.collect::<std::result::Result<_, _>>().map_err(|_| Error::run("an option has a zero"))?;
    let options: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
    let mut program = ptr::null_mut();
    // SAFETY: the texts end with a zero and outlive the call; there are no headers.
    let status = unsafe {
        let (source, name) = (source.as_ptr(), name.as_ptr());
        (nvrtc.nvrtcCreateProgram)(&mut program, source, name, 0, ptr::null(), ptr::null())
    };
    done(nvrtc, "reading", &file, status)?;
    let ok = |status| done(nvrtc, "compiling", &file, status);
    // SAFETY: the program lives until it is destroyed here; buffers have the sizes NVRTC asked for.
    unsafe {
        let outcome = (nvrtc.nvrtcCompileProgram)(program, options.len() as c_int, options.as_ptr());
        let log = buffer(
            ok,
            |size| (nvrtc.nvrtcGetProgramLogSize)(program, size),
            |to| (nvrtc.nvrtcGetProgramLog)(program, to),
        );
        let image =
            buffer(ok, |size| (nvrtc.nvrtcGetCUBINSize)(program, size), |to| (nvrtc.nvrtcGetCUBIN)(program, to));
        (nvrtc.nvrtcDestroyProgram)(&mut program);
        let log = String::from_utf8_lossy(&log?).trim_end_matches('\0').to_owned();
        ok(outcome).map_err(|e| e.help(log.clone()))?;
        Ok((image?, log))
    }
}

/// Bytes whose number is asked for first.
fn buffer(
    ok: impl Fn(Status) -> Result<()>,
    size: impl FnOnce(*mut usize) -> Status,
    fill: impl FnOnce(*mut c_char) -> Status,
) -> Result<Vec<u8>> {
    let mut bytes = 0;
    ok(size(&mut bytes))?;
    let mut all = vec![0_u8; bytes];
    ok(fill(all.as_mut_ptr().cast()))?;
    Ok(all)
}

#[cfg(test)]
mod tests {
    use crate::engine::sources;

    /// A kernel that did not wait would read what the one before it has not written yet.
    #[test]
    fn kernels_that_start_early_wait() {
        let early: Vec<_> = sources().filter(|source| source.waits).collect();
        assert!(!early.is_empty());
        for source in early {
            let kernels: Vec<&str> = source.text.split("extern \"C\"").skip(1).collect();
            // Of a macro's text there are several.
            assert!(source.kernels.len().is_multiple_of(kernels.len()), "{}", source.file);
            assert!(kernels.iter().all(|kernel| kernel.contains("after_previous();")), "{}", source.file);
        }
    }
}
