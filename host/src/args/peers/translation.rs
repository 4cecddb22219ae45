//! From flags as they were written to flags of ours: which tool wrote them, what its table says of each, and what its function makes
//! of those that mean something together.

use std::collections::BTreeMap;

use clap::Command;
use dpo_core::error::{Error, Result};

use super::super::flag::{Flag, known};
use super::table::{Argument, Here, Peer};

/// Values that are spelled otherwise: flag of ours, theirs, ours.
const VALUES: &[(&str, &str, &str)] = &[
    ("dtype", "fp32", "float32"),
    ("dtype", "bf16", "bfloat16"),
    ("lr-scheduler", "constant_with_warmup", "constant"),
];

/// Values that ask for what is not done here: flag of ours, value, why, and what to do instead.
const REFUSED: &[(&str, &str, &str, &str)] = &[
    ("dtype", "float16", HALF, "say bfloat16"),
    ("dtype", "fp16", HALF, "say bf16"),
    ("truncation-strategy", "split", "only texts without answers can be split", "say delete, left or right"),
];

pub(super) const HALF: &str = "half precision overflows in preference training";

/// Flags on their way.
pub(super) struct Translation<'a> {
    /// The tool that wrote them, where its names tell.
    pub(super) peer: Option<&'static Peer>,
    /// Arguments that mean something together, by name; the last of each.
    taken: BTreeMap<String, Flag>,
    /// Flags of ours.
    pub(super) ours: Vec<Flag>,
    /// What the user should know.
    pub(super) notes: Vec<String>,
    /// One of the names that tell, as it was written.
    mark: Option<String>,
    peers: &'static [&'static Peer],
    command: &'a Command,
}

/// The tool of which most names are that neither we nor another tool has, and one of these names as it was written.
fn recognised(flags: &[Flag], command: &Command, peers: &'static [&'static Peer]) -> Option<(&'static Peer, String)> {
    let mut marks: Vec<(&Peer, String, usize)> = Vec::new();
    for flag in flags.iter().filter(|flag| known(command, &flag.name).is_none()) {
        let Some(key) = flag.key() else { continue };
        let mut theirs = peers.iter().filter(|peer| peer.argument(&key).is_some());
        if let (Some(peer), None) = (theirs.next(), theirs.next()) {
            match marks.iter_mut().find(|(other, ..)| other.name == peer.name) {
                Some((.., count)) => *count += 1,
                None => marks.push((peer, flag.name.clone(), 1)),
            }
        }
    }
    let most = marks.iter().map(|(.., count)| *count).max()?;
    marks.into_iter().find(|(.., count)| *count == most).map(|(peer, mark, _)| (peer, mark))
}

impl<'a> Translation<'a> {
    /// Of flags, each of which is still to come.
    pub(super) fn new(flags: &[Flag], command: &'a Command, peers: &'static [&'static Peer]) -> Translation<'a> {
        let (peer, mark) = recognised(flags, command, peers).unzip();
        Translation { peer, taken: BTreeMap::new(), ours: Vec::new(), notes: Vec::new(), mark, peers, command }
    }

    /// What the table says of a flag.
    pub(super) fn flag(&mut self, flag: Flag) -> Result<()> {
        let ours = known(self.command, &flag.name).is_some();
        let Some(key) = flag.key().filter(|_| !ours || self.peer.is_some() && !is_kebab(&flag)) else {
            self.own(flag);
            return Ok(());
        };
        let argument = match self.peer {
            Some(peer) => peer.argument(&key),
            None => self.peers.iter().find_map(|peer| peer.argument(&key)),
        };
        let Some(argument) = argument else {
            if !ours {
                return Err(self.unknown(&flag, &key));
            }
            self.own(flag);
            return Ok(());
        };
        match argument.here {
            Here::Becomes(_) => drop(self.taken.insert(key, flag)),
            Here::Named(why) => self.notes.push(format!("{} is ignored: {why}", flag.spelled())),
            Here::Refused(why, instead) => {
                if !argument.is_usual(&flag.values) {
                    return Err(Error::input(why).at(flag.spelled()).help(instead));
                }
            }
            Here::Is(_) => self.is(&argument, flag)?,
        }
        Ok(())
    }

    /// A flag of ours, whose words may be joined with `_`.
    fn own(&mut self, flag: Flag) {
        let name = if flag.name.starts_with("--") { flag.name.replace('_', "-") } else { flag.name };
        self.ours.push(Flag { name, ..flag });
    }

    /// An argument that is a flag of ours.
    fn is(&mut self, argument: &Argument, flag: Flag) -> Result<()> {
        if says_none(&flag) {
            return Ok(());
        }
        let name = argument.flag().unwrap_or_default();
        let refused = |value: &String| REFUSED.iter().find(|(f, v, ..)| *f == name && v == value);
        if let Some((.., why, instead)) = flag.values.iter().find_map(refused) {
            return Err(Error::input(*why).at(flag.spelled()).help(*instead));
        }
        let value = |value: String| match VALUES.iter().find(|(f, theirs, _)| *f == name && *theirs == value) {
            Some((.., ours)) => (*ours).to_owned(),
            // As Python writes them.
            None if ["True", "False"].contains(&value.as_str()) => value.to_lowercase(),
            None => value,
        };
        // A switch without a value is on.
        let on = flag.values.is_empty().then(|| "true".to_owned());
        let values = flag.values.into_iter().map(value).chain(on).collect();
        self.ours.push(Flag { name: format!("--{name}"), values, place: flag.place });
        Ok(())
    }

    /// Of a name that is neither ours nor the tool's.
    fn unknown(&self, flag: &Flag, key: &str) -> Error {
        // In a file it is a key, whose line is the place.
        let error = match &flag.place {
            Some(place) => Error::input(format!("unknown key '{key}'")).at(place),
            None => Error::input(format!("unknown flag '{}'", flag.name)),
        };
        let another = self.peers.iter().find(|peer| peer.argument(key).is_some());
        if let (Some(peer), Some(mark), Some(another)) = (self.peer, &self.mark, another) {
            return error
                .help(format!("it is {}'s, and {mark} is {}'s: use the names of one", another.name, peer.name));
        }
        let ours = self.command.get_arguments().filter_map(|a| a.get_long()).map(|name| name.replace('-', "_"));
        let peers = self.peers.iter().filter(|peer| self.peer.is_none_or(|own| own.name == peer.name));
        let names: Vec<String> = ours.chain(peers.flat_map(|p| p.arguments()).map(|a| a.name.to_owned())).collect();
        let distance = |name: &String| strsim::damerau_levenshtein(name, key);
        let near = names.iter().min_by_key(|name| distance(name)).filter(|name| distance(name) <= 1 + key.len() / 6);
        error.help(match (near, &flag.place) {
            (Some(near), Some(_)) => format!("did you mean '{near}'? `dpo-host train --help` lists all"),
            (Some(near), None) => {
                let near = if flag.name.contains('_') { near.clone() } else { near.replace('_', "-") };
                format!("did you mean '--{near}'? `dpo-host train --help` lists all")
            }
            (None, _) => "`dpo-host train --help` lists all".into(),
        })
    }

    /// Flags of ours, with what the user should know.
    pub(super) fn end(mut self) -> Result<(Vec<Flag>, Vec<String>)> {
        if let Some(flag) = self.taken.values().find(|flag| !says_none(flag)) {
            return Err(Error::input("it goes together with other arguments of its tool, which are not there")
                .at(flag.spelled())
                .help("`dpo-host train --help` lists our own names"));
        }
        self.defaults();
        Ok((self.ours, self.notes))
    }

    /// The tool's defaults, where ours are others and nothing was said.
    fn defaults(&mut self) {
        let Some(peer) = self.peer else { return };
        let mut told = Vec::new();
        for argument in peer.arguments() {
            let (Some(flag), Some(default)) = (argument.flag(), argument.default) else { continue };
            let name = format!("--{flag}");
            let arg = known(self.command, &name);
            let ours: Vec<String> =
                arg.iter().flat_map(|a| a.get_default_values()).map(|v| v.to_string_lossy().into()).collect();
            if arg.is_some() && !self.has(&flag) && !argument.is_usual(&ours) {
                told.push(format!("{name} {default}"));
                self.push(&flag, [default], None);
            }
        }
        if !told.is_empty() {
            self.notes.push(format!("{}'s defaults: {}", peer.name, told.join(" ")));
        }
    }

    /// Takes an argument that means something together with others, if it was written and does not say none.
    pub(super) fn take(&mut self, name: &str) -> Option<Flag> {
        self.taken.remove(name).filter(|flag| !says_none(flag))
    }

    /// The same with its only value, or its default in the tool that wrote the flags.
    pub(super) fn take_value(&mut self, name: &str) -> (Option<String>, Option<Flag>) {
        let flag = self.take(name);
        let given = flag.as_ref().map(|flag| flag.values.first().map_or("true", |v| v.as_str()).to_owned());
        let default = || self.peer.and_then(|peer| peer.argument(name)?.default.map(str::to_owned));
        (given.or_else(default), flag)
    }

    /// Whether a flag of ours was written, by any of its names.
    pub(super) fn has(&self, flag: &str) -> bool {
        self.ours_of(flag).is_some()
    }

    /// A flag of ours as it was written last.
    pub(super) fn ours_of(&self, flag: &str) -> Option<&Flag> {
        let name = format!("--{flag}");
        let arg = known(self.command, &name);
        let is = |f: &&Flag| f.name == name || (arg.is_some() && known(self.command, &f.name) == arg);
        self.ours.iter().rev().find(is)
    }

    /// Adds a flag of ours.
    pub(super) fn push<V: Into<String>>(
        &mut self,
        flag: &str,
        values: impl IntoIterator<Item = V>,
        place: Option<String>,
    ) {
        let values = values.into_iter().map(Into::into).collect();
        self.ours.push(Flag { name: format!("--{flag}"), values, place });
    }

    /// Adds what an argument says as a flag of ours.
    pub(super) fn push_as(&mut self, flag: &str, from: Flag) {
        self.ours.push(Flag { name: format!("--{flag}"), ..from });
    }
}

/// Whether a flag is spelled with dashes, as only ours are.
fn is_kebab(flag: &Flag) -> bool {
    flag.place.is_none() && flag.name.trim_start_matches('-').contains('-')
}

/// Whether a flag was written to say that there is no value.
fn says_none(flag: &Flag) -> bool {
    matches!(flag.values.as_slice(), [value] if ["", "none", "null"].contains(&value.to_lowercase().as_str()))
}
