//! Where the secret of a run comes from, by which its ranks know each other.
//!
//! Who starts the ranks may give it to all of them. Where all are on one host and nobody does, rank 0 makes it up and leaves it
//! in a file that only its user can read. Else it is made from what a launcher tells every rank, which others may guess.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::handshake::{self, Refused, Secret};
use dpo_core::cache;
use dpo_core::error::{Error, IoContext, Result};
use dpo_core::files;

/// The variable with the secret of a run.
pub(super) const SECRET: &str = "DPO_HOST_SECRET";

/// Characters of a secret in a file.
const LENGTH: usize = 64;

/// Where a run's secret comes from.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Source {
    /// All ranks were given it.
    Given(Secret),
    /// All ranks can make it, and perhaps others.
    Guessable(Secret),
    /// Rank 0 leaves it in a file of this name for the other ranks of its host.
    File(String),
}

/// A secret that the other ranks can have, for as long as this lives.
pub(super) struct Offered {
    pub(super) secret: Secret,
    file: Option<PathBuf>,
}

impl Source {
    /// A file that ranks with the same text in common find.
    pub(super) fn file(shared: &str) -> Source {
        Source::File(cache::name(&[shared.as_bytes()]))
    }

    /// At rank 0, before it answers any other rank: who is answered finds the secret of this run and none of an earlier one.
    pub(super) fn offer(&self) -> Result<Offered> {
        let name = match self {
            Source::Given(secret) | Source::Guessable(secret) => {
                return Ok(Offered { secret: secret.clone(), file: None });
            }
            Source::File(name) => name,
        };
        let written = path(name).and_then(|path| Ok((write(&path)?, path)));
        let (text, path) = written.map_err(|e| {
            e.help(format!("the ranks' secret is kept there; where that cannot be, set {SECRET} to a random text"))
        })?;
        Ok(Offered { secret: Secret::new(text.as_bytes()), file: Some(path) })
    }

    /// At any other rank, once rank 0 has answered.
    pub(super) fn find(&self) -> std::result::Result<Secret, Refused> {
        match self {
            Source::Given(secret) | Source::Guessable(secret) => Ok(secret.clone()),
            Source::File(name) => {
                let failed = |e: Error| Refused::Unauthenticated(format!("left no secret for this rank: {e}"));
                let path = path(name).map_err(failed)?;
                let text = read(&path).reading(&path).map_err(failed)?;
                Ok(Secret::new(text.as_bytes()))
            }
        }
    }
}

impl Drop for Offered {
    fn drop(&mut self) {
        if let Some(path) = &self.file {
            let _ = fs::remove_file(path);
        }
    }
}

fn path(name: &str) -> Result<PathBuf> {
    Ok(cache::folder("ranks")?.join(name))
}

fn write(path: &Path) -> Result<String> {
    // Of a run that was killed.
    let _ = fs::remove_file(path);
    let text: String = handshake::random().writing(path)?.iter().map(|b| format!("{b:02x}")).collect();
    let file = File::options().write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|mut f| f.write_all(text.as_bytes())).writing(path)?;
    Ok(text)
}

fn read(path: &Path) -> io::Result<String> {
    let file = files::open_regular(path)?;
    let metadata = file.metadata()?;
    if metadata.uid() != rustix::process::geteuid().as_raw() || metadata.mode() & 0o077 != 0 {
        return Err(io::Error::other("it is not of this user alone"));
    }
    let mut text = String::new();
    file.take(LENGTH as u64 + 1).read_to_string(&mut text)?;
    if text.len() == LENGTH { Ok(text) } else { Err(io::Error::other("it is none")) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // In a test, a panic is the report.
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_secret_is_of_one_user_and_one_run() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("of a run"), folder.path().join("other"));
        assert!(read(&path).is_err());
        // What lies there is neither taken nor written into.
        fs::write(&other, "0".repeat(LENGTH)).unwrap();
        symlink(&other, &path).unwrap();
        assert!(read(&path).is_err());
        let text = write(&path).unwrap();
        assert_eq!(fs::read_to_string(&other).unwrap(), "0".repeat(LENGTH));
        assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(read(&path).unwrap(), text);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(read(&path).is_err());
        assert_ne!(write(&path).unwrap(), text);
        fs::write(&path, "short").unwrap();
        assert!(read(&path).is_err());
        drop(Offered { secret: Secret::new(b""), file: Some(path.clone()) });
        assert!(!path.exists());
    }
}
