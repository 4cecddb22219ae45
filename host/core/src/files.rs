//! Files that are there whole or not at all.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::error::{Error, IoContext, Result};

/// A text that changes when a file does: its path, size, number and times. The time of its last change in any respect cannot be set,
/// so that a file which was written over, with its old time of modification put back, is another.
pub fn identity(path: &Path) -> Result<String> {
    let meta = fs::metadata(path).reading(path)?;
    let path = fs::canonicalize(path).reading(path)?;
    let time = meta.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
    let changed = format!("{} {}.{}", meta.ino(), meta.ctime(), meta.ctime_nsec());
    Ok(format!("{} {} {time:?} {changed}\n", path.display(), meta.len()))
}

/// As [`write_into`], in a folder that is made if it is not there.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).writing(folder)?;
    }
    write_into(path, bytes)
}

/// Writes a file beside its place, flushes it to disk and renames it, so that a reader never sees half of it, whenever the
/// power fails. The folder has to be there: one that vanished under a run is not made anew.
pub fn write_into(path: &Path, bytes: &[u8]) -> Result<()> {
    stream_into(path, |file| file.write_all(bytes))
}

/// As [`write_into`], for what need not be in memory as a whole.
pub fn stream_into(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = File::create(&temporary).and_then(|mut f| write(&mut f).and_then(|()| f.sync_all()));
    let placed = written.and_then(|()| fs::rename(&temporary, path)).writing(path);
    if placed.is_err() {
        // On a full disk the half that was written is in the way of everything else.
        let _ = fs::remove_file(&temporary);
    }
    placed?;
    path.parent().map_or(Ok(()), sync_folder)
}

/// Writes a folder beside its place and renames it, so that what is there under its name is whole. The place is new or an empty
/// folder.
pub fn write_folder(place: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let made = !place.exists();
    fs::create_dir_all(place).writing(place)?;
    let written = fill(place, write);
    if written.is_err() && made {
        // Only an empty folder is removed.
        let _ = fs::remove_dir(place);
    }
    written
}

fn fill(place: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    // The lock goes with the handle, however this process ends. Where folders cannot be locked, nothing is.
    let handle = File::open(place).ok();
    if let Some(Err(TryLockError::WouldBlock)) = handle.as_ref().map(File::try_lock) {
        return Err(Error::input("another process is writing this folder")
            .at(place.display())
            .help("wait for it, or name another folder"));
    }
    if fs::read_dir(place).writing(place)?.next().is_some() {
        return Err(Error::input("the folder is not empty").at(place.display()).help("name a new or an empty folder"));
    }
    let place = fs::canonicalize(place).writing(place)?;
    let mut name = std::ffi::OsString::from(".");
    name.push(place.file_name().unwrap_or_default());
    name.push(".tmp");
    let temporary = place.with_file_name(name);
    // Of a process that was killed.
    let _ = fs::remove_dir_all(&temporary);
    let written = fs::create_dir(&temporary).writing(&temporary).and_then(|()| write(&temporary));
    let flushed = written.and_then(|()| sync_folder(&temporary));
    let placed = flushed.and_then(|()| fs::rename(&temporary, &place).writing(&place));
    if placed.is_err() {
        let _ = fs::remove_dir_all(&temporary);
    }
    placed?;
    place.parent().map_or(Ok(()), sync_folder)
}

/// Flushes a folder's names to disk: without it a renamed file may have its old name after the power failed.
pub fn sync_folder(folder: &Path) -> Result<()> {
    // Only Unix can open a folder; elsewhere the file system keeps the order by itself.
    let here = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    if cfg!(unix) { File::open(here).and_then(|f| f.sync_all()).writing(folder) } else { Ok(()) }
}

/// Removes what a process that was killed within [`write_into`] left in a folder.
pub fn remove_leftovers(folder: &Path) {
    let left = |name: &str| {
        let writer = name.strip_suffix(".tmp").and_then(|n| n.rsplit_once('.')).map(|(_, writer)| writer);
        writer.is_some_and(|w| !w.is_empty() && w.bytes().all(|b| b.is_ascii_digit()))
    };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(left) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// The bytes of a file of a stranger's: a regular one, as what a link leads to may be, of up to so many bytes.
pub fn read_bounded(path: &Path, most: u64) -> Result<Vec<u8>> {
    let meta = fs::metadata(path).reading(path)?;
    let wrong = |what: String| Err(Error::input(what).at(path.display()));
    match meta.len() {
        _ if !meta.is_file() => wrong("is not a regular file".into()),
        long if long > most => wrong(format!("has {long} bytes, more than {most}")),
        _ => fs::read(path).reading(path),
    }
}

/// The text of such a file: a config has some KiB.
pub fn read_text(path: &Path) -> Result<String> {
    String::from_utf8(read_bounded(path, MOST_TEXT)?)
        .map_err(|_| Error::input("is not a text in UTF-8").at(path.display()))
}

/// Most bytes of a config.
const MOST_TEXT: u64 = 64 << 20;

/// Opens a file to write it, made if it is not there: no link, which may lead to another's, and no pipe.
pub fn open_own(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.create(true).truncate(false).write(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options.open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("not a regular file")) }
}

/// Opens a file to read it, in a folder that others may write: a link, which may lead anywhere, and what is no regular file,
/// such as a pipe that nobody writes into, is an error.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("not a regular file")) }
}

/// Bytes that may still be written where a path is, or will be; `None` where the system does not say.
pub fn free_space(path: &Path) -> Option<u64> {
    let there =
        path.ancestors().map(|p| if p.as_os_str().is_empty() { Path::new(".") } else { p }).find(|p| p.exists())?;
    let disk = rustix::fs::statvfs(there).ok()?;
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}
