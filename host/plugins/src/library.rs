//! One library: opened, verified, and called.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use abi_stable::library::AbiHeaderRef;
use abi_stable::std_types::{RResult, RString};
use dpo_plugin_api::abi::{Linked, Manifest, PluginModule_Ref, RawLossCall, RawLossResult};
use object::{Object, ObjectSymbol};
use serde::de::DeserializeOwned;

use dpo_core::error::{Error, IoContext, Result};
use dpo_core::graph::refuse_unknown_features;

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

/// A verified library with its manifest.
pub struct Library {
    module: PluginModule_Ref,
    /// Where it came from.
    pub origin: Origin,
    /// What it says of itself.
    pub manifest: Manifest,
}

impl Library {
    /// The libraries linked into this binary, by package name.
    pub(super) fn linked() -> Vec<Result<Library>> {
        let mut all: Vec<_> =
            inventory::iter::<Linked>().map(|l| Library::verified((l.module)(), Origin::BuiltIn)).collect();
        // The order in which the linker collects them differs between builds.
        all.sort_by_key(|l| l.as_ref().map(|l| l.manifest.package.clone()).unwrap_or_default());
        all
    }

    /// Opens a shared library. One that is no plugin is never loaded, so none of its code runs.
    pub(super) fn open(path: &Path) -> Result<Library> {
        let symbol = plugin_symbol(path)?;
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
        let module =
            header.init_root_module::<PluginModule_Ref>().map_err(|e| Error::input(condensed(&e.to_string())))?;
        Library::verified(module, Origin::File(path.to_owned()))
    }

    fn verified(module: PluginModule_Ref, origin: Origin) -> Result<Library> {
        let text = reply(module.call()("manifest".into(), 0, "".into()))?;
        let manifest: Manifest =
            serde_json::from_str(&text).map_err(|e| Error::input(format!("its manifest cannot be read: {e}")))?;
        let (ours, theirs) = (major(dpo_plugin_api::VERSION), major(&manifest.api));
        if ours != theirs {
            return Err(Error::input(format!("it was built for plugin-api {}, this host has {ours}.x", manifest.api)));
        }
        refuse_unknown_features(&manifest.requires)?;
        Ok(Library { module, origin, manifest })
    }

    /// Calls a JSON function of one item.
    pub(super) fn call<T: DeserializeOwned>(&self, what: &str, item: usize, input: &str) -> Result<T> {
        let text = reply(self.module.call()(what.into(), item, input.into()))?;
        serde_json::from_str(&text).map_err(|e| Error::input(format!("its {what} cannot be read: {e}")))
    }

    /// Calls a loss.
    pub(super) fn eval(&self, item: usize, call: RawLossCall<'_>) -> Result<RawLossResult> {
        reply(self.module.eval()(item, call))
    }
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

/// The name of the symbol a plugin exports, read from the file without loading it.
fn plugin_symbol(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).reading(path)?;
    let file = object::File::parse(&*bytes).map_err(|_| Error::input("is not a shared library"))?;
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
