//! One library: opened, verified, and called.

use std::cell::Cell;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once, OnceLock};

use abi_stable::library::AbiHeaderRef;
use abi_stable::std_types::{RResult, RString};
use dpo_plugin_api::abi::{Linked, Manifest, PluginModule_Ref, RawLossCall, RawLossResult};
use dpo_plugin_api::check::check_features;
use object::{Object, ObjectSymbol};
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use super::helper;
use dpo_core::console;
use dpo_core::error::{Error, Result};
use dpo_core::files;

/// Most bytes of a library.
const MOST_BYTES: u64 = 1 << 30;
/// Every plugin exports one symbol of this prefix and its crate's name.
const SYMBOL_PREFIX: &str = "dpo_plugin_";

/// Where a plugin came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Linked into this binary.
    BuiltIn,
    /// A shared library.
    File(PathBuf),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::BuiltIn => f.write_str("built-in"),
            Origin::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A library by its manifest. The code of a file is loaded when one of its items is first called.
pub struct Library {
    code: Code,
    /// Where it came from.
    pub origin: Origin,
    /// What it says of itself.
    pub manifest: Manifest,
    /// SHA-256 of a file, in hex.
    pub sha256: Option<String>,
    /// Where it came from, in words that live as long as the process.
    name: &'static str,
}

enum Code {
    Linked(PluginModule_Ref),
    File {
        path: PathBuf,
        /// The program that calls it in a process of its own.
        helper: Option<PathBuf>,
        module: OnceLock<Result<PluginModule_Ref>>,
    },
}

impl Library {
    /// The libraries linked into this binary, by package name.
    pub(super) fn linked() -> Vec<Result<Library>> {
        let linked = |l: &Linked| {
            let module = (l.module)();
            let manifest = manifest(&reply(module.call()("manifest".into(), 0, "".into()))?)?;
            Ok(Library {
                code: Code::Linked(module),
                origin: Origin::BuiltIn,
                manifest,
                sha256: None,
                name: "built-in",
            })
        };
        let mut all: Vec<Result<Library>> = inventory::iter::<Linked>().map(linked).collect();
        // The order in which the linker collects them differs between builds.
        all.sort_by_key(|l| l.as_ref().map(|l| l.manifest.package.clone()).unwrap_or_default());
        all
    }

    /// What a shared library says of itself, asked in a process of its own where there is a `helper`. One that is no plugin is
    /// never loaded, so none of its code runs.
    pub(super) fn open(path: &Path, helper: Option<&Path>) -> Result<Library> {
        let bytes = files::read_bounded(path, MOST_BYTES)?;
        plugin_symbol(&bytes)?;
        let sha256 = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        let code = Code::File { path: path.to_owned(), helper: helper.map(Path::to_owned), module: OnceLock::new() };
        let manifest = manifest(&code.call_bounded("manifest", 0, "")?)?;
        let name = path.display().to_string().leak();
        Ok(Library { code, origin: Origin::File(path.to_owned()), manifest, sha256: Some(sha256), name })
    }

    /// Calls a JSON function of one item.
    pub(super) fn call<T: DeserializeOwned>(&self, what: &str, item: usize, input: &str) -> Result<T> {
        let module = self.code.module()?;
        parsed(what, &reply(self.blamed(|| module.call()(what.into(), item, input.into())))?)
    }

    /// As [`call`](Self::call), for what is called once: a file's code then runs in a process of its own.
    pub(super) fn call_bounded<T: DeserializeOwned>(&self, what: &str, item: usize, input: &str) -> Result<T> {
        parsed(what, &self.code.call_bounded(what, item, input)?)
    }

    /// Calls a loss.
    pub(super) fn eval(&self, item: usize, call: RawLossCall<'_>) -> Result<RawLossResult> {
        let module = self.code.module()?;
        reply(self.blamed(|| module.eval()(item, call)))
    }

    /// Runs a call. Should the library end the process in the middle of it, it is named.
    fn blamed<T>(&self, call: impl FnOnce() -> T) -> T {
        let before = CALLED.replace(Some(self.name));
        let answer = call();
        CALLED.set(before);
        answer
    }

    /// Package, version and, of a file, the beginning of its hash.
    pub(super) fn identity(&self) -> String {
        let Manifest { package, version, .. } = &self.manifest;
        match &self.sha256 {
            Some(hash) => format!("{package} {version} (sha256 {})", &hash[..12]),
            None => format!("{package} {version}"),
        }
    }
}

impl Code {
    fn module(&self) -> Result<PluginModule_Ref> {
        match self {
            Code::Linked(module) => Ok(*module),
            Code::File { path, module, .. } => module.get_or_init(|| load(path)).clone(),
        }
    }

    fn call_bounded(&self, what: &str, item: usize, input: &str) -> Result<String> {
        match self {
            Code::File { path, helper: Some(helper), .. } => helper::call(helper, path, what, item, input),
            _ => Ok(reply(self.module()?.call()(what.into(), item, input.into()))?.into()),
        }
    }
}

/// Loads a library into this process, and calls a JSON function of one item.
pub(super) fn call_here(path: &Path, what: &str, item: usize, input: &str) -> Result<String> {
    Ok(reply(load(path)?.call()(what.into(), item, input.into()))?.into())
}

thread_local! {
    /// The library that this thread is in.
    static CALLED: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// A library that exits would otherwise end a run without a word, and with the exit code of success.
extern "C" fn name_who_exits() {
    if let Some(name) = CALLED.get() {
        console::error(&Error::run("the plugin ended the process in the middle of a call").at(name));
        // SAFETY: ends the process at once, as it was about to.
        unsafe { libc::_exit(1) };
    }
}

fn load(path: &Path) -> Result<PluginModule_Ref> {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the function lives as long as the process. Where it is not taken, exits are not named.
        unsafe { libc::atexit(name_who_exits) };
    });
    let symbol = plugin_symbol(&files::read_bounded(path, MOST_BYTES)?)?;
    // SAFETY: loading runs the library's constructors. A file in a plugin folder that exports our symbol is code which
    // the user chose to run; README says so.
    let library = unsafe { libloading::Library::new(path) }.map_err(|e| {
        let source = std::error::Error::source(&e).map(ToString::to_string);
        Error::input(format!("cannot be loaded: {}", source.unwrap_or_else(|| e.to_string())))
    })?;
    // SAFETY: `AbiHeaderRef` is what `plugin!` exports under this name; `upgrade` checks abi_stable's magic and version
    // before anything behind the header is read.
    let header = unsafe { library.get::<AbiHeaderRef>(symbol.as_bytes()) }.map(|h| *h);
    let header = header.map_err(|_| Error::input(format!("symbol {symbol} is not data of a plugin")))?;
    // Plugins are never unloaded: their statics and panic hook may be referred to until the process ends.
    std::mem::forget(library);
    let header = header.upgrade().map_err(|e| Error::input(condensed(&e.to_string())))?;
    header.init_root_module::<PluginModule_Ref>().map_err(|e| Error::input(condensed(&e.to_string())))
}

/// A manifest that this host can work with.
fn manifest(text: &str) -> Result<Manifest> {
    let manifest: Manifest = parsed("manifest", text)?;
    let (ours, theirs) = (major(dpo_plugin_api::VERSION), major(&manifest.api));
    if ours != theirs {
        return Err(Error::input(format!("it was built for plugin-api {}, this host has {ours}.x", manifest.api)));
    }
    check_features(&manifest.requires)?;
    Ok(manifest)
}

fn parsed<T: DeserializeOwned>(what: &str, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|e| Error::input(format!("its {what} cannot be read: {e}")))
}

fn reply<T>(reply: RResult<T, RString>) -> Result<T> {
    match reply {
        RResult::ROk(value) => Ok(value),
        RResult::RErr(text) => {
            let error = serde_json::from_str::<dpo_plugin_api::Error>(&text);
            Err(error.unwrap_or_else(|_| dpo_plugin_api::Error::new(text.into_string())).into())
        }
    }
}

fn major(version: &str) -> &str {
    version.split('.').next().unwrap_or(version)
}

/// The name of the symbol a plugin exports, read without loading it.
fn plugin_symbol(library: &[u8]) -> Result<String> {
    let file = object::File::parse(library).map_err(|_| Error::input("is not a shared library"))?;
    let names = file.dynamic_symbols().filter(|s| s.is_definition()).filter_map(|s| s.name().ok());
    // Mach-O puts an underscore before every name.
    let found = names.map(|n| n.strip_prefix('_').unwrap_or(n)).find(|n| n.starts_with(SYMBOL_PREFIX));
    found.map(str::to_owned).ok_or_else(|| {
        Error::input(format!("is not a plugin: it exports no symbol {SYMBOL_PREFIX}*"))
            .help("export one with plugin! { … }")
    })
}

/// The first reason out of abi_stable's report, which runs to thousands of lines.
fn condensed(report: &str) -> String {
    let lines: Vec<&str> = report.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let reason = lines.iter().position(|l| l.starts_with("Error:")).map(|at| lines[at..].iter().take(3));
    let reason = reason.map(|l| l.copied().collect::<Vec<_>>().join(" "));
    let text = reason.or_else(|| lines.first().map(|l| (*l).to_owned())).unwrap_or_default();
    format!("was built with another layout of plugin-api: {}", text.chars().take(160).collect::<String>())
}

/// The user's plugin folder: `$XDG_DATA_HOME/dpo-host/plugins`, by default under `~/.local/share`.
pub fn user_folder() -> Option<PathBuf> {
    let data = std::env::var_os("XDG_DATA_HOME").map(PathBuf::from);
    let data = data.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/share")));
    data.map(|d| d.join("dpo-host/plugins"))
}

/// A library shared by its items.
pub(super) type Shared = Arc<Library>;
