//! The built-in demo: a very small Qwen2 that answers curtly, and preference rows that ask it for warmth. How both were made:
//! `datasets/demo/README.md`.
//!
//! They are written out as ordinary files and then read like anybody's, so that the demo exercises the ordinary path.

use std::path::PathBuf;

use dpo_core::error::Result;
use dpo_core::{cache, files};

/// Files by name, and what is in them.
macro_rules! embed {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!("../../datasets/demo/", $name)))),*]
    };
}

const FILES: &[(&str, &[u8])] = embed![
    "model/config.json",
    "model/generation_config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    "prefs.jsonl",
    "val.jsonl",
];

/// The demo's files.
pub(crate) struct Demo {
    /// Model folder.
    pub(crate) model: PathBuf,
    /// Rows to train on.
    pub(crate) dataset: PathBuf,
    /// Rows to evaluate on.
    pub(crate) val_dataset: PathBuf,
}

/// What a name of a model means: `demo` is the built-in one, unless there is such a folder.
pub(crate) fn or_named(name: String) -> Result<String> {
    match name == "demo" && !std::path::Path::new("demo").is_dir() {
        true => Ok(write()?.model.display().to_string()),
        false => Ok(name),
    }
}

/// Writes the demo into the cache folder, as far as it is not there.
pub(crate) fn write() -> Result<Demo> {
    let folder = cache::folder("demo")?;
    for (name, bytes) in FILES {
        let path = folder.join(name);
        if std::fs::read(&path).map_or(true, |there| there != *bytes) {
            files::write(&path, bytes)?;
        }
    }
    let at = |name| folder.join(name);
    Ok(Demo { model: at("model"), dataset: at("prefs.jsonl"), val_dataset: at("val.jsonl") })
}
