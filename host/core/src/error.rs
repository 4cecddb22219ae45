//! The host's error: what, where, help; and which exit code it deserves.

use std::fmt;
use std::io::ErrorKind;

/// Whose fault it is, which is what the exit code says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The command line, the configuration or the input was wrong: exit code 2.
    Input,
    /// The run failed: exit code 1.
    Run,
}

/// An error for the person who reads it.
#[derive(Clone, Debug)]
pub struct Error {
    /// Whose fault it is.
    pub kind: Kind,
    message: String,
    place: Option<String>,
    help: Option<String>,
}

/// What every fallible function of the host returns.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The command line or the input is wrong.
    pub fn input(message: impl Into<String>) -> Error {
        Error { kind: Kind::Input, message: message.into(), place: None, help: None }
    }

    /// The run cannot go on.
    pub fn run(message: impl Into<String>) -> Error {
        Error { kind: Kind::Run, ..Error::input(message) }
    }

    /// Says where: a file with its line, a tensor, a flag. A place that is there already is the nearer one and stays.
    #[must_use]
    pub fn at(mut self, place: impl fmt::Display) -> Error {
        self.place.get_or_insert_with(|| place.to_string());
        self
    }

    /// Says what to do about it.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Error {
        self.help.get_or_insert_with(|| help.into());
        self
    }

    /// Where, if it is known.
    pub fn place(&self) -> Option<&str> {
        self.place.as_deref()
    }

    /// What to do about it, if that is known.
    pub fn advice(&self) -> Option<&str> {
        self.help.as_deref()
    }

    /// The message without place and help.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The known name that is most like this one, if any is.
    pub fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
        dpo_plugin_api::nearest(name, known, 0.7)
    }

    /// The known name that this one is a misspelling of, if it is of any.
    pub fn misspelt<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
        dpo_plugin_api::nearest(name, known, 0.9)
    }

    /// An input error for a name that is not among those known, with the nearest one as help.
    pub fn unknown<'a>(what: &str, name: &str, known: impl IntoIterator<Item = &'a str>) -> Error {
        dpo_plugin_api::Error::unknown(what, name, known).into()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        f.write_str(&self.message)?;
        if let Some(help) = &self.help {
            write!(f, "\n  help: {help}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

impl From<dpo_plugin_api::Error> for Error {
    fn from(error: dpo_plugin_api::Error) -> Error {
        Error { help: error.help, ..Error::input(error.message) }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Error {
        // candle appends a backtrace on further lines when RUST_BACKTRACE is set.
        let text = error.to_string();
        Error::run(text.lines().next().unwrap_or("tensor error"))
    }
}

/// Reading and writing files, with the path as the place.
pub trait IoContext<T> {
    /// Turns an IO error into an input error about `path`.
    fn reading(self, path: &std::path::Path) -> Result<T>;
    /// Turns an IO error into a run error about `path`.
    fn writing(self, path: &std::path::Path) -> Result<T>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn reading(self, path: &std::path::Path) -> Result<T> {
        self.map_err(|e| {
            let error = Error::input(format!("cannot read: {}", plain(&e))).at(path.display());
            match READING.iter().find(|(kind, _)| *kind == e.kind()) {
                Some((_, help)) => error.help(*help),
                None => error,
            }
        })
    }

    fn writing(self, path: &std::path::Path) -> Result<T> {
        self.map_err(|e| {
            let error = Error::run(format!("cannot write: {}", plain(&e))).at(path.display());
            match WRITING.iter().find(|(kind, _)| *kind == e.kind()) {
                Some((_, help)) => error.help(*help),
                None => error,
            }
        })
    }
}

/// What to do about a file that cannot be read.
const READING: &[(ErrorKind, &str)] = &[
    (ErrorKind::NotFound, "check the spelling; a path that begins without '/' begins at the folder you are in"),
    (ErrorKind::PermissionDenied, "this user may not read it"),
    (ErrorKind::IsADirectory, "this is a folder: name a file in it"),
];

/// What to do about a file that cannot be written.
const WRITING: &[(ErrorKind, &str)] = &[
    (ErrorKind::StorageFull, "make room on this disk; what was written before is whole"),
    (ErrorKind::QuotaExceeded, "make room within the quota of this disk; what was written before is whole"),
    (ErrorKind::ReadOnlyFilesystem, "the disk is mounted read-only, as after a fault of the disk; see dmesg"),
    (ErrorKind::PermissionDenied, "this user may not write there"),
    (ErrorKind::NotFound, "the folder is gone: it was removed, renamed or unmounted"),
    (ErrorKind::AlreadyExists, "a file is in its way: name a folder"),
    (ErrorKind::NotADirectory, "a part of this path is a file: name a folder"),
];

/// "no such file or directory" instead of "No such file or directory (os error 2)".
fn plain(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut letters = text.chars();
    letters.next().map(|c| c.to_lowercase().collect::<String>() + letters.as_str()).unwrap_or_default()
}
