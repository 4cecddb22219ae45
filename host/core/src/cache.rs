//! Results that can be computed again, kept on disk for this user alone: `$XDG_CACHE_HOME/dpo-host`, by default under `~/.cache`.
//!
//! An entry is named by a hash of everything that it depends on, and begins with a hash of its name and content: one that is not what
//! was written under its name is computed again. Folders that others could write are not used, and none lies in the temporary folder.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::console;
use crate::error::{Error, IoContext, Result};
use crate::files;

/// Bytes of the hash that an entry begins with.
const HASH: usize = 32;

/// The name of an entry that depends on these.
pub fn name(of: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in of {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// The content of an entry; none where it is not there, or not what was written.
pub fn read(kind: &str, name: &str) -> Option<Vec<u8>> {
    let path = folder(kind).ok()?.join(name);
    let bytes = fs::read(&path).ok()?;
    let content = bytes.get(HASH..).filter(|content| bytes[..HASH] == hash(name, content));
    if content.is_none() {
        console::warning(format!("{} is not what was written there: it is computed again", path.display()));
    }
    content.map(<[u8]>::to_vec)
}

/// Keeps an entry.
///
/// # Errors
/// A folder that cannot be written, or is not the user's alone.
pub fn write(kind: &str, name: &str, content: &[u8]) -> Result<()> {
    let bytes = [&hash(name, content), content].concat();
    files::write_into(&folder(kind)?.join(name), &bytes)
}

fn hash(name: &str, content: &[u8]) -> [u8; HASH] {
    Sha256::new().chain_update(name).chain_update([0]).chain_update(content).finalize().into()
}

/// The user's own folder for results of a kind, made if it is not there.
///
/// # Errors
/// A user without a home; a folder that cannot be made, or that others can write.
pub fn folder(kind: &str) -> Result<PathBuf> {
    let named = std::env::var_os("XDG_CACHE_HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = || std::env::home_dir().filter(|home| !home.as_os_str().is_empty()).map(|home| home.join(".cache"));
    let Some(cache) = named.or_else(home) else {
        return Err(Error::run("this user has no home folder").help(NAME_ONE));
    };
    let own = cache.join("dpo-host");
    let folder = own.join(kind);
    make(&folder).map_err(|e| e.help(NAME_ONE))?;
    for folder in [&own, &folder] {
        refuse_shared(folder)?;
    }
    Ok(folder)
}

const NAME_ONE: &str = "name a folder of your own with XDG_CACHE_HOME";

fn make(folder: &Path) -> Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).writing(folder)
}

/// Refuses a folder of another user's, or into which others can write.
fn refuse_shared(folder: &Path) -> Result<()> {
    let meta = fs::metadata(folder).reading(folder)?;
    let (owner, user) = (meta.uid(), rustix::process::geteuid().as_raw());
    if owner == user && meta.mode() & 0o022 == 0 {
        return Ok(());
    }
    let what = format!(
        "is of user {owner} with mode {:o}: what lies there may be another's than user {user}'s",
        meta.mode() & 0o777
    );
    Err(Error::run(what).at(folder.display()).help(format!("take the right to write from others, or {NAME_ONE}")))
}
