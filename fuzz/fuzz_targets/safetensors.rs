//! A safetensors file: as a model's, and as an adapter's.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use dpo_core::weights::{Checkpoint, read_f32};
use libfuzzer_sys::fuzz_target;

/// A folder in memory, so that a million files cost no disk.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = PathBuf::from(format!("/dev/shm/dpo-fuzz-safetensors-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder in memory");
    folder
});

fuzz_target!(|data: &[u8]| {
    let path = FOLDER.join("model.safetensors");
    std::fs::write(&path, data).expect("a file in memory");
    let opened = Checkpoint::open(&FOLDER).is_ok();
    let read = read_f32(&path);
    assert!(opened || read.is_err(), "one reader takes what the other refuses");
    if let Ok(tensors) = read {
        assert!(tensors.values().all(|(shape, values)| shape.iter().product::<usize>() == values.len()));
    }
});
