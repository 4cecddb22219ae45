//! The table of a tool's arguments: how it is written, looked up and shown.

/// A tool whose arguments are taken.
pub struct Peer {
    /// Its name.
    pub name: &'static str,
    /// What it has. The first table that has a name counts.
    pub(super) tables: &'static [&'static [Group]],
}

/// Arguments with the same fate.
pub(super) struct Group {
    /// `name=default` each; no `=` where the default is none, or the tool finds it out by itself. Behind a `|` are further values
    /// that are taken like the default.
    names: &'static str,
    here: Here,
}

/// What becomes of an argument.
#[derive(Clone, Copy)]
pub(super) enum Here {
    /// Obeyed: it is this flag, or the one of the same name if this is empty. A default that is written is taken over.
    Is(&'static str),
    /// Obeyed together with others, by the tool's own function: what it becomes.
    Becomes(&'static str),
    /// Changes nothing here: why.
    Named(&'static str),
    /// Other values than the default are refused: why, and what to do.
    Refused(&'static str, &'static str),
}

pub(super) const fn same(names: &'static str) -> Group {
    Group { names, here: Here::Is("") }
}

pub(super) const fn is(names: &'static str, flag: &'static str) -> Group {
    Group { names, here: Here::Is(flag) }
}

pub(super) const fn becomes(names: &'static str, what: &'static str) -> Group {
    Group { names, here: Here::Becomes(what) }
}

pub(super) const fn named(names: &'static str, why: &'static str) -> Group {
    Group { names, here: Here::Named(why) }
}

pub(super) const fn refused(names: &'static str, why: &'static str, instead: &'static str) -> Group {
    Group { names, here: Here::Refused(why, instead) }
}

/// An argument of a tool.
pub struct Argument {
    /// Its name, as the tool writes it.
    pub name: &'static str,
    /// Its default there, if there is one.
    pub default: Option<&'static str>,
    /// Further values that are taken like the default.
    also: Vec<&'static str>,
    pub(super) here: Here,
}

/// The three fates of an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The same happens here.
    Obeyed,
    /// It changes nothing here.
    Named,
    /// It asks for what is not done here.
    Refused,
}

impl Argument {
    fn parse(entry: &'static str, here: Here) -> Argument {
        let (name, values) = entry.split_once('=').unwrap_or((entry, ""));
        let mut values = values.split('|');
        let default = values.next().filter(|d| !d.is_empty());
        Argument { name, default, also: values.collect(), here }
    }

    /// Its fate.
    pub fn kind(&self) -> Kind {
        match self.here {
            Here::Is(_) | Here::Becomes(_) => Kind::Obeyed,
            Here::Named(_) => Kind::Named,
            Here::Refused(..) => Kind::Refused,
        }
    }

    /// The flag of ours that it is, if it is one alone.
    pub fn flag(&self) -> Option<String> {
        match self.here {
            Here::Is("") => Some(self.name.replace('_', "-")),
            Here::Is(flag) => Some(flag.to_owned()),
            _ => None,
        }
    }

    /// Whether these values say what the tool does without them, or what is done here as well.
    pub fn is_usual(&self, values: &[String]) -> bool {
        let number = |text: &str| text.parse::<f64>().ok();
        let equal = |a: &str, b: &str| {
            a.eq_ignore_ascii_case(b) || matches!((number(a), number(b)), (Some(a), Some(b)) if a == b)
        };
        // A switch without a value is on.
        let joined = if values.is_empty() { "true".to_owned() } else { values.join(" ") };
        let joined = joined.trim();
        ["", "none", "null", "[]", "{}"].iter().any(|none| joined.eq_ignore_ascii_case(none))
            || self.default.iter().chain(&self.also).any(|usual| equal(usual, joined))
    }
}

impl Peer {
    /// All its arguments. A name that is there twice counts where it is first.
    pub fn arguments(&self) -> impl Iterator<Item = Argument> {
        self.groups().flat_map(|(_, group)| group)
    }

    /// The argument of a name.
    pub fn argument(&self, name: &str) -> Option<Argument> {
        self.arguments().find(|argument| argument.name == name)
    }

    fn groups(&self) -> impl Iterator<Item = (Here, Vec<Argument>)> {
        let mut seen = std::collections::HashSet::new();
        self.tables.iter().flat_map(|table| *table).map(move |group| {
            let entries = group.names.split_whitespace().map(|entry| Argument::parse(entry, group.here));
            (group.here, entries.filter(|argument| seen.insert(argument.name)).collect())
        })
    }

    /// The table as Markdown: how many arguments have which fate, then the arguments of each.
    pub fn page(&self) -> String {
        let count = |kind| self.arguments().filter(|argument| argument.kind() == kind).count();
        let (obeyed, named, refused) = (count(Kind::Obeyed), count(Kind::Named), count(Kind::Refused));
        let mut page = format!(
            "Of {} arguments {obeyed} are obeyed, {named} are named and {refused} are refused.\n\n",
            obeyed + named + refused
        );
        for (kind, title) in [
            (Kind::Obeyed, "| obeyed | here |"),
            (Kind::Named, "| named | why it changes nothing here |"),
            (Kind::Refused, "| refused, unless it has its default | why, and what to do instead |"),
        ] {
            page += &format!("{title}\n|---|---|\n");
            for (here, arguments) in self.groups().filter(|(_, arguments)| !arguments.is_empty()) {
                if arguments[0].kind() == kind {
                    let names: Vec<String> = arguments.iter().map(|a| format!("`{}`", a.name)).collect();
                    page += &format!("| {} | {} |\n", names.join(" "), here.shown(&arguments));
                }
            }
            page.push('\n');
        }
        page
    }
}

impl Here {
    fn shown(self, arguments: &[Argument]) -> String {
        match self {
            Here::Is(_) => {
                let mut flags: Vec<String> = arguments.iter().filter_map(Argument::flag).collect();
                flags.dedup();
                flags.iter().map(|flag| format!("`--{flag}`")).collect::<Vec<_>>().join(" ")
            }
            Here::Becomes(what) | Here::Named(what) => what.replace('|', "\\|"),
            Here::Refused(why, instead) => format!("{why}: {instead}").replace('|', "\\|"),
        }
    }
}
