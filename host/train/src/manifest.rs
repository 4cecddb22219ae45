//! `manifest.json` of a checkpoint: name, size and SHA-256 of every file, by which an incomplete or corrupt checkpoint is known.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use dpo_core::error::{Error, IoContext, Result};
use dpo_core::files;

const NAME: &str = "manifest.json";

#[derive(Serialize, Deserialize)]
struct Entry {
    name: String,
    size: u64,
    sha256: String,
}

/// Lists a folder's files; the last to be written into it.
pub(super) fn write(folder: &Path) -> Result<()> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder).reading(folder)? {
        let path = entry.reading(folder)?.path();
        let bytes = fs::read(&path).reading(&path)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        entries.push(Entry { name, size: bytes.len() as u64, sha256: hex(&Sha256::digest(&bytes)) });
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    let text = serde_json::to_string_pretty(&entries).map_err(|e| Error::run(e.to_string()))?;
    files::write_into(&folder.join(NAME), text.as_bytes())
}

/// Whether a folder holds what its manifest lists; the answer is what is wrong, if anything is.
pub(super) fn verify(folder: &Path) -> std::result::Result<(), String> {
    let text = fs::read_to_string(folder.join(NAME)).map_err(|_| format!("has no {NAME}"))?;
    let entries: Vec<Entry> = serde_json::from_str(&text).map_err(|e| format!("{NAME} is broken: {e}"))?;
    for Entry { name, size, sha256 } in entries {
        let bytes = fs::read(folder.join(&name)).map_err(|_| format!("{name} is missing"))?;
        if bytes.len() as u64 != size {
            return Err(format!("{name} has {} bytes of {size}", bytes.len()));
        }
        if hex(&Sha256::digest(&bytes)) != sha256 {
            return Err(format!("{name} is not what was written: its SHA-256 differs"));
        }
    }
    Ok(())
}

/// Bytes as people compare them.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
