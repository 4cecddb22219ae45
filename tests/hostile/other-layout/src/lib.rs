//! A library that exports a plugin's symbol over a root module of its own: of the same names, one field of another
//! type.

// abi_stable's derives name types in snake case with capitals and expand to undocumented items.
#![allow(non_camel_case_types, non_local_definitions, missing_docs)]

use abi_stable::StableAbi;
use abi_stable::library::{CheckTypeLayout, LibHeader, RootModule, RootModuleResult};
use abi_stable::package_version_strings;
use abi_stable::prefix_type::PrefixTypeTrait;
use abi_stable::sabi_types::VersionStrings;
use abi_stable::std_types::{RResult, RStr, RString};

#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = PluginModule_Ref)))]
pub struct PluginModule {
    pub call: extern "C" fn(RStr<'_>, usize, RStr<'_>) -> RResult<RString, RString>,
    /// A pair count in the place of the pairs.
    #[sabi(last_prefix_field)]
    pub eval: extern "C" fn(usize, u64) -> RResult<f64, RString>,
}

impl RootModule for PluginModule_Ref {
    abi_stable::declare_root_module_statics! {PluginModule_Ref}
    const BASE_NAME: &'static str = "dpo_plugin";
    const NAME: &'static str = "dpo_plugin";
    const VERSION_STRINGS: VersionStrings = package_version_strings!();
}

/// Ends the process if the host calls it, which the layout check is there to prevent.
extern "C" fn call(_: RStr<'_>, _: usize, _: RStr<'_>) -> RResult<RString, RString> {
    std::process::abort()
}

extern "C" fn eval(_: usize, _: u64) -> RResult<f64, RString> {
    std::process::abort()
}

fn module() -> PluginModule_Ref {
    PluginModule { call, eval }.leak_into_prefix()
}

extern "C" fn erased() -> RootModuleResult {
    abi_stable::library::__call_root_module_loader(module)
}

#[unsafe(export_name = "dpo_plugin_hostile_other_layout")]
// SAFETY: `erased` returns the root module of exactly this type, built by `module`.
pub static HEADER: LibHeader = unsafe { LibHeader::from_constructor::<PluginModule_Ref>(erased, CheckTypeLayout::Yes) };
