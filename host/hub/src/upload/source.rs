//! What goes up: files as they lie on the disk, and texts that were made for the hub.

use std::cell::OnceCell;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::PathBuf;

use crate::hash::{Hash, git, sha256};
use dpo_core::error::{Error, IoContext, Result};
use dpo_core::files;

/// What a file in a repository has.
#[derive(Clone, Debug)]
pub enum Content {
    /// The bytes of a file.
    File(PathBuf),
    /// These bytes.
    Text(Vec<u8>),
}

/// A file of a repository before it is there.
#[derive(Debug)]
pub struct Source {
    path: String,
    content: Content,
    size: u64,
    /// What a file was when it was first looked at ([`files::identity`]).
    identity: String,
    sha256: OnceCell<String>,
}

impl Source {
    /// `path` is the place in the repository, with `/`.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn new(path: impl Into<String>, content: Content) -> Result<Source> {
        let (size, identity) = match &content {
            Content::File(file) => {
                let meta = fs::metadata(file).reading(file)?;
                if !meta.is_file() {
                    return Err(Error::input("is not a regular file").at(file.display()));
                }
                (meta.len(), files::identity(file)?)
            }
            Content::Text(bytes) => (bytes.len() as u64, String::new()),
        };
        Ok(Source { path: path.into(), content, size, identity, sha256: OnceCell::new() })
    }

    /// Its place in the repository.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Some of its bytes.
    pub(super) fn open(&self, from: u64, length: u64) -> io::Result<Box<dyn Read + '_>> {
        match &self.content {
            Content::File(path) => {
                let mut file = File::open(path)?;
                file.seek(SeekFrom::Start(from))?;
                Ok(Box::new(file.take(length)))
            }
            Content::Text(bytes) => {
                let (from, end) = (from as usize, (from + length) as usize);
                Ok(Box::new(bytes.get(from..end).unwrap_or_default()))
            }
        }
    }

    /// At most so many bytes from its beginning on.
    pub(super) fn head(&self, most: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.open(0, most.min(self.size))
            .and_then(|mut r| r.read_to_end(&mut bytes))
            .map_err(|e| self.unreadable(&e))?;
        Ok(bytes)
    }

    /// Its SHA-256, which is computed once.
    pub(super) fn sha256(&self) -> Result<&str> {
        if self.sha256.get().is_none() {
            let hash = self.open(0, self.size).and_then(sha256).map_err(|e| self.unreadable(&e))?;
            self.unchanged()?;
            let _ = self.sha256.set(hash);
        }
        Ok(self.sha256.get().map_or("", String::as_str))
    }

    /// Whether a hub has it already, under a name that is a hash.
    pub(super) fn is(&self, name: &str) -> Result<bool> {
        match Hash::of_git(name) {
            Some(hash) => {
                let own = self.open(0, self.size).and_then(|r| git(self.size, r)).map_err(|e| self.unreadable(&e))?;
                Ok(hash.is(&own))
            }
            None => Ok(name.len() == 64 && self.sha256()?.eq_ignore_ascii_case(name)),
        }
    }

    /// That it is still what it was: a file that is written while it is sent would arrive as neither.
    pub(super) fn unchanged(&self) -> Result<()> {
        match &self.content {
            Content::File(path) if files::identity(path)? != self.identity => {
                Err(Error::run("changed while it was sent")
                    .at(path.display())
                    .help("wait until it is written, or push a checkpoint, which no longer changes"))
            }
            _ => Ok(()),
        }
    }

    fn unreadable(&self, error: &io::Error) -> Error {
        Error::run(format!("cannot be read: {error}")).at(&self.path)
    }
}
