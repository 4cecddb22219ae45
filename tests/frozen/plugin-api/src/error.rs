//! The one error a plugin returns: what is wrong, and what would mend it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Why a plugin cannot answer. The host adds the place (file and line, checkpoint, flag).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Error {
    /// What is wrong, in lower case and without a full stop.
    pub message: String,
    /// What the user can do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
}

/// What every plugin function returns.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error that says what is wrong.
    pub fn new(message: impl Into<String>) -> Error {
        Error { message: message.into(), help: None }
    }

    /// The same error with advice.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Error {
        self.help = Some(help.into());
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.help {
            Some(help) => write!(f, "\n  help: {help}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

/// An `Err` with a formatted message: `return bail!("rope type '{kind}' is unknown")`.
#[macro_export]
macro_rules! bail {
    ($($arg:tt)*) => { Err($crate::Error::new(format!($($arg)*))) };
}
