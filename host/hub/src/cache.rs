//! Where fetched files lie: as the hubs' own tools lay them, so that what either has fetched is there for both.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::hash::Hash;
use super::protocol::{Layout, Remote};
use super::{Content, Name};
use dpo_core::error::{Error, IoContext, Result};
use dpo_core::files;

/// The cache of one model or dataset.
pub(super) struct Cache {
    folder: PathBuf,
    locks: PathBuf,
    layout: Layout,
    content: Content,
}

impl Cache {
    /// Where a name's files are, or will be.
    pub(super) fn of(name: &Name, content: Content) -> Result<Cache> {
        let Some(root) = (name.hub.cache)().map(PathBuf::from) else {
            return Err(Error::input(format!("no folder for what is fetched from {}", name.hub.title))
                .help("set HF_HOME or MODELSCOPE_CACHE; by default they are under HOME, which is not set"));
        };
        let kind = if content == Content::Dataset { "datasets" } else { "models" };
        let (owner, own) = name.id.split_once('/').unwrap_or_default();
        let own = match name.hub.layout {
            Layout::Blobs => format!("{kind}--{owner}--{own}"),
            Layout::Plain => format!("{kind}/{owner}/{}", own.replace('.', "___")),
        };
        let locks = root.join(".locks").join(&own);
        Ok(Cache { folder: root.join(own), locks, layout: name.hub.layout, content })
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn of_datasets(&self) -> bool {
        self.content == Content::Dataset
    }

    /// Whether a revision is a commit, which never changes.
    pub(super) fn is_commit(&self, revision: &str) -> bool {
        self.layout == Layout::Blobs && revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
    }

    /// The folder with the files of a commit.
    pub(super) fn view(&self, commit: &str) -> PathBuf {
        match self.layout {
            Layout::Blobs => self.folder.join("snapshots").join(commit),
            Layout::Plain => self.folder.clone(),
        }
    }

    /// The folder with what was fetched of a revision.
    pub(super) fn local(&self, revision: &str) -> Option<PathBuf> {
        let known = fs::read_to_string(self.folder.join("refs").join(revision)).unwrap_or_default();
        let known = Some(known.trim()).filter(|commit| super::protocol::plain(commit));
        Some(self.view(known.unwrap_or(revision))).filter(|folder| folder.is_dir())
    }

    /// Notes which commit a revision is.
    pub(super) fn remember(&self, revision: &str, commit: &str) -> Result<()> {
        if self.layout == Layout::Plain || revision == commit {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        let known = fs::read_to_string(&path).is_ok_and(|text| text == commit);
        if known { Ok(()) } else { files::write(&path, commit.as_bytes()) }
    }

    /// Where a file's content is.
    pub(super) fn place(&self, file: &Remote) -> PathBuf {
        match self.layout {
            Layout::Blobs => self.folder.join("blobs").join(&file.blob),
            Layout::Plain => self.folder.join(&file.path),
        }
    }

    /// Whether a file's content is there. Under its hash it is what it should be; under its path it may be an older one.
    pub(super) fn has(&self, file: &Remote) -> bool {
        let place = self.place(file);
        let Ok(meta) = fs::metadata(&place) else { return false };
        let same = file.size.is_none_or(|size| size == meta.len());
        let right = |hash: &Hash| hash.of(&place).is_ok_and(|is| hash.is(&is));
        same && (self.layout == Layout::Blobs || file.hash.as_ref().is_none_or(right))
    }

    /// Held by the one process that fetches a file, also among Hugging Face's own tools. Where files cannot be locked, none.
    pub(super) fn lock(&self, file: &Remote) -> Result<Option<File>> {
        let name = if file.blob.is_empty() { "file" } else { &file.blob };
        let path = self.locks.join(format!("{name}.lock"));
        fs::create_dir_all(&self.locks).writing(&self.locks)?;
        let lock = File::options().create(true).truncate(false).write(true).open(&path).writing(&path)?;
        Ok(lock.lock().is_ok().then_some(lock))
    }

    /// Puts a file's content into the folder of a commit.
    pub(super) fn show(&self, file: &Remote, commit: &str) -> Result<()> {
        if self.layout == Layout::Plain {
            return Ok(());
        }
        let (view, place) = (self.view(commit).join(&file.path), self.place(file));
        if fs::canonicalize(&view).is_ok_and(|v| fs::canonicalize(&place).is_ok_and(|p| p == v)) {
            return Ok(());
        }
        if let Some(folder) = view.parent() {
            fs::create_dir_all(folder).writing(folder)?;
        }
        let _ = fs::remove_file(&view);
        link(&file.blob, file.path.matches('/').count(), &place, &view).writing(&view)
    }
}

/// A link that holds when the whole cache is moved.
#[cfg(unix)]
fn link(blob: &str, depth: usize, _: &Path, view: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(format!("../../{}blobs/{blob}", "../".repeat(depth)), view)
}

/// Elsewhere links need rights that few have.
#[cfg(not(unix))]
fn link(_: &str, _: usize, place: &Path, view: &Path) -> std::io::Result<()> {
    fs::hard_link(place, view).or_else(|_| fs::copy(place, view).map(|_| ()))
}

/// Paths of all files in a folder and below, relative to it.
pub(super) fn files(folder: &Path) -> Vec<String> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        if entry.path().is_dir() {
            paths.extend(files(&entry.path()).into_iter().map(|p| format!("{name}/{p}")));
        } else {
            paths.push(name);
        }
    }
    paths
}
