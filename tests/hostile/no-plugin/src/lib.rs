//! A shared library that is no plugin.

/// Something to export.
#[unsafe(no_mangle)]
pub extern "C" fn hostile_no_plugin() -> u32 {
    42
}
