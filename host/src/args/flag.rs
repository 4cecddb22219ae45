//! A flag as it was written.

/// A flag with its values.
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
}
