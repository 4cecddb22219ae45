//! A flag as it was written.

use clap::{Arg, Command};

/// A flag with its values.
#[derive(Clone)]
pub(crate) struct Flag {
    /// As it was written, with its dashes; or an argument that is no flag.
    pub(crate) name: String,
    pub(crate) values: Vec<String>,
    /// The file and its line, where it is not from the command line.
    pub(crate) place: Option<String>,
}

impl Flag {
    /// Flag and values, after the line of a file.
    pub(crate) fn spelled(&self) -> String {
        let place = self.place.iter().map(|place| format!("{place}: ")).collect::<String>();
        let values = self.values.iter().map(|value| format!(" {value}")).collect::<String>();
        format!("{place}{}{values}", self.name)
    }

    /// Its name as a key: without dashes, and with `_` for those between words. None for an argument that is no flag.
    pub(crate) fn key(&self) -> Option<String> {
        Some(self.name.strip_prefix("--")?.replace('-', "_"))
    }
}

/// The argument of a command that a flag names, which may be by another name of it.
pub(crate) fn known<'a>(command: &'a Command, flag: &str) -> Option<&'a Arg> {
    let name = flag.strip_prefix("--")?.replace('_', "-");
    command
        .get_arguments()
        .find(|a| a.get_long() == Some(&name) || a.get_all_aliases().is_some_and(|aliases| aliases.contains(&&*name)))
}
