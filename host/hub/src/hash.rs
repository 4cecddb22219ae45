//! By what a hub knows a file: the SHA-256 of a large one, and git's name of a small one, which is a SHA-1.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest, Sha256};

/// What a file's hash has to be.
pub(super) enum Hash {
    Sha256(String),
    /// SHA-1 of `blob`, the length and the bytes (git-scm.com/book/en/v2/Git-Internals-Git-Objects).
    Git(String),
}

impl Hash {
    /// The name that git gave to a file, if it is one.
    pub(super) fn of_git(id: &str) -> Option<Hash> {
        (id.len() == 40 && id.bytes().all(|b| b.is_ascii_hexdigit())).then(|| Hash::Git(id.to_owned()))
    }

    pub(super) fn text(&self) -> &str {
        let (Hash::Sha256(text) | Hash::Git(text)) = self;
        text
    }

    /// What a file's hash is.
    pub(super) fn of(&self, path: &Path) -> io::Result<String> {
        let file = File::open(path)?;
        match self {
            Hash::Sha256(_) => sha256(file),
            Hash::Git(_) => git(file.metadata()?.len(), file),
        }
    }

    /// Whether it is the one that it has to be.
    pub(super) fn is(&self, hash: &str) -> bool {
        self.text().eq_ignore_ascii_case(hash)
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Hash::Sha256(_) => "SHA-256",
            Hash::Git(_) => "git hash",
        })
    }
}

/// The SHA-256 of some bytes.
pub(super) fn sha256(bytes: impl Read) -> io::Result<String> {
    digest(Sha256::new(), bytes)
}

/// Git's name of so many bytes.
pub(super) fn git(length: u64, bytes: impl Read) -> io::Result<String> {
    digest(Sha1::new_with_prefix(format!("blob {length}\0")), bytes)
}

fn digest<D: Digest + Write>(mut digest: D, mut bytes: impl Read) -> io::Result<String> {
    io::copy(&mut bytes, &mut digest)?;
    Ok(digest.finalize().iter().map(|b| format!("{b:02x}")).collect())
}
