//! Rows of a file as every built-in format reads them. The first byte chooses the format, the rest is JSON. No row may
//! make a plugin panic, which the host reports as an error that says so.
#![no_main]

use std::sync::LazyLock;

use dpo_plugins::Registry;
use dpo_plugin_api::dataset::Row;
use libfuzzer_sys::fuzz_target;

static REGISTRY: LazyLock<Registry> = LazyLock::new(|| Registry::discover(&[], None));

fuzz_target!(|data: &[u8]| {
    let Some((choice, json)) = data.split_first() else { return };
    let Ok(row) = serde_json::from_slice::<Row>(json) else { return };
    let format = &REGISTRY.formats[usize::from(*choice) % REGISTRY.formats.len()];
    let recognised = format.recognises(&row).map(drop);
    for result in [recognised, format.records(&row).map(drop)] {
        if let Err(error) = result {
            // Elsewhere in an error the word may be the row's own.
            assert!(!error.to_string().starts_with("it panicked"), "{}: {error}", format.name);
        }
    }
});
