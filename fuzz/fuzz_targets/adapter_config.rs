//! `adapter_config.json` of a folder that somebody else wrote.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use dpo_core::lora::read_config;
use libfuzzer_sys::fuzz_target;

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = PathBuf::from(format!("/dev/shm/dpo-fuzz-adapter-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder in memory");
    folder
});

fuzz_target!(|data: &[u8]| {
    std::fs::write(FOLDER.join("adapter_config.json"), data).expect("a file in memory");
    if let Ok(config) = read_config(&FOLDER) {
        assert!(config.rank > 0 && config.scale().is_finite());
        let _ = config.targets.name("model.layers.0.self_attn.q_proj");
    }
});
