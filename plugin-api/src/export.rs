//! The `plugin!` macro: one crate, linked in or loaded as a file.

/// Exports a crate's families, formats and losses.
///
/// ```text
/// plugin! { models: [Qwen2], losses: [Sigmoid, Hinge] }
/// ```
///
/// `requires: ["feature"]` names what the host must have; one that lacks it refuses the crate.
///
/// The crate should be of type `["cdylib", "rlib"]`. As a file it carries one symbol, `dpo_plugin_<crate>`; several such
/// crates may be linked into one program, which finds them through `inventory`.
#[macro_export]
macro_rules! plugin {
    ($($kind:ident : [$($item:expr),* $(,)?]),* $(,)?) => {
        const _: () = {
            use $crate::__private::{abi, abi_stable, inventory};
            use abi_stable::library::{CheckTypeLayout, LibHeader, RootModuleResult};
            use abi_stable::prefix_type::PrefixTypeTrait;
            use abi_stable::std_types::{RResult, RStr, RString};

            static EXPORTS: ::std::sync::OnceLock<abi::Exports> = ::std::sync::OnceLock::new();

            fn exports() -> abi::Exports {
                #[allow(unused_mut)]
                let mut exports = abi::Exports::new(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"));
                $($(exports.$kind($item);)*)*
                exports
            }

            extern "C" fn call(what: RStr<'_>, item: usize, input: RStr<'_>) -> RResult<RString, RString> {
                abi::call(&EXPORTS, exports, what, item, input)
            }

            extern "C" fn eval(item: usize, call: abi::RawLossCall<'_>) -> RResult<abi::RawLossResult, RString> {
                abi::eval(&EXPORTS, exports, item, call)
            }

            fn module() -> abi::PluginModule_Ref {
                abi::PluginModule { call, eval }.leak_into_prefix()
            }

            extern "C" fn erased() -> RootModuleResult {
                abi_stable::library::__call_root_module_loader(module)
            }

            #[unsafe(export_name = concat!("dpo_plugin_", env!("CARGO_CRATE_NAME")))]
            // SAFETY: `erased` returns the root module of exactly this type, built by `module`.
            pub static HEADER: LibHeader = unsafe {
                LibHeader::from_constructor::<abi::PluginModule_Ref>(
                    erased, CheckTypeLayout::Yes)
            };

            inventory::submit! { abi::Linked { module } }
        };
    };
}
