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

    /// The same error with where it is before the message.
    #[must_use]
    pub fn within(self, place: &str) -> Error {
        Error { message: format!("{place}: {}", self.message), ..self }
    }

    /// An error for a name that is not among those known, with the nearest one as help.
    pub fn unknown<'a>(what: &str, name: &str, known: impl IntoIterator<Item = &'a str>) -> Error {
        let known: Vec<&str> = known.into_iter().collect();
        let list = if known.is_empty() { "none is known".into() } else { format!("known: {}", known.join(", ")) };
        let help = match nearest(name, known.into_iter(), 0.7) {
            Some(near) => format!("did you mean '{near}'? {list}"),
            None => list,
        };
        Error::new(format!("unknown {what} '{name}'")).help(help)
    }
}

/// The known name that is most like this one, if it is more than `least` like it (Jaro-Winkler, 0 to 1).
pub fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>, least: f64) -> Option<&'a str> {
    let likeness = |n: &str| strsim::jaro_winkler(n, name);
    let near = known.map(|n| (likeness(n), n)).reduce(|best, n| if n.0 > best.0 { n } else { best });
    near.filter(|(likeness, _)| *likeness > least).map(|(_, n)| n)
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
