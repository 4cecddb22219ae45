//! From what was written to what is parsed: flags of a `--config` file before those of the command line, other tools' names as
//! ours. What comes from a file is checked here, where its line is known.

use std::any::TypeId;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, Command};

use super::flag::{Flag, known};
use super::{config, peers};
use dpo_core::error::{Error, Result};

/// What is parsed, and what the user should know about it.
pub(crate) struct Flags {
    pub(crate) args: Vec<String>,
    pub(crate) notes: Vec<String>,
}

/// Where the subcommand stands among the arguments.
pub(crate) fn command_at(args: &[String]) -> Option<usize> {
    (1..args.len()).find(|i| !args[*i].starts_with('-') && args[i - 1] != "--plugin-dir")
}

/// Expands and translates the arguments of `train`; other commands are left alone.
pub(crate) fn resolve(mut args: Vec<String>, cli: &mut Command) -> Result<Flags> {
    let train = command_at(&args).filter(|at| args[*at] == "train");
    let Some(at) = train else { return Ok(Flags { args, notes: Vec::new() }) };
    let mut written = groups(&args.split_off(at + 1));
    name_the_first(&mut written)?;
    let (files, given): (Vec<Flag>, Vec<Flag>) = written.into_iter().partition(|flag| flag.name == "--config");
    let written = match files.as_slice() {
        [] => Vec::new(),
        [Flag { values, .. }] if values.len() == 1 => config::read(&values[0])?,
        [_] => return Err(Error::input("needs a file").at("--config").help("--config run.toml, or a run's args.json")),
        _ => return Err(Error::input("is given twice").at("--config").help("put what the files share into one")),
    };
    // Flags of all commands, such as --quiet, are known to a command once it is built.
    cli.build();
    let Some(command) = cli.find_subcommand("train") else { return Ok(Flags { args, notes: Vec::new() }) };
    let (flags, notes) = peers::translate(written.into_iter().chain(given).collect(), command)?;
    let given: Vec<&Arg> = flags.iter().filter(|f| f.place.is_none()).filter_map(|f| known(command, &f.name)).collect();
    let overruled = |f: &Flag| f.place.is_some() && known(command, &f.name).is_some_and(|a| given.contains(&a));
    let checked = |flag: Flag| match flag.place.clone() {
        Some(place) => check(command, flag).map_err(|e| e.at(place)).transpose(),
        None => Some(refuse_stray(command, &flag).map(|()| flag)),
    };
    let flags = flags.into_iter().filter(|f| !overruled(f)).filter_map(checked);
    for Flag { name, values, .. } in flags.collect::<Result<Vec<_>>>()? {
        match values.as_slice() {
            // A number below 0 is no flag.
            [value] if value.starts_with('-') && value.parse::<f64>().is_ok() => args.push(format!("{name}={value}")),
            _ => args.extend(std::iter::once(name).chain(values)),
        }
    }
    Ok(Flags { args, notes })
}

/// Flags with their values.
fn groups(args: &[String]) -> Vec<Flag> {
    let mut groups: Vec<Flag> = Vec::new();
    let flag = |name: &str, values| Flag { name: name.to_owned(), values, place: None };
    for arg in args {
        match (arg.starts_with("--"), groups.last_mut()) {
            (true, _) => groups.push(match arg.split_once('=') {
                Some((name, value)) => flag(name, vec![value.to_owned()]),
                None => flag(arg, Vec::new()),
            }),
            (false, Some(Flag { values, .. })) => values.push(arg.clone()),
            (false, None) => groups.push(flag(arg, Vec::new())),
        }
    }
    groups
}

/// What is named before the first flag: files of flags, as ms-swift and LLaMA-Factory take them, or rows, as `data` does.
fn name_the_first(flags: &mut [Flag]) -> Result<()> {
    let named = flags.iter().any(|flag| flag.name == "--dataset");
    let Some(first) = flags.first_mut().filter(|flag| !flag.name.starts_with('-')) else { return Ok(()) };
    first.values.insert(0, first.name.clone());
    let config = first.values.len() == 1 && config::is_one(&first.name);
    if named && !config {
        return Err(Error::input("rows are named here and with --dataset")
            .at(first.values.join(" "))
            .help("name all of them with --dataset"));
    }
    first.name = if config { "--config".into() } else { "--dataset".into() };
    Ok(())
}

/// Refuses values of a flag of the command line that takes fewer.
fn refuse_stray(command: &Command, flag: &Flag) -> Result<()> {
    let most = known(command, &flag.name).map(|arg| match arg.get_action() {
        ArgAction::Set | ArgAction::Append => arg.get_num_args().map_or(1, |n| n.max_values()),
        _ => 0,
    });
    match most.and_then(|most| flag.values.get(most)) {
        Some(stray) if !stray.starts_with('-') => Err(Error::input(format!("'{stray}' belongs to no flag"))
            .at(flag.spelled())
            .help("rows are named with --dataset, and a value with spaces needs quotes")),
        _ => Ok(()),
    }
}

/// Refuses a flag of a file that does not exist, or whose values are not what it takes. A switch that is off is no flag.
fn check(command: &Command, mut flag: Flag) -> Result<Option<Flag>> {
    let key = flag.name.trim_start_matches('-').replace('-', "_");
    let Some(arg) = known(command, &flag.name) else { return Err(Error::input(format!("unknown key '{key}'"))) };
    let values = flag.values.join(", ");
    let wrong = |expected: &str| Error::input(format!("'{key}' should be {expected}, not '{values}'"));
    let expected = expected(arg);
    if matches!(arg.get_action(), ArgAction::SetTrue) {
        return match flag.values.as_slice() {
            [value] if value == "true" => {
                flag.values.clear();
                Ok(Some(flag))
            }
            [value] if value == "false" => Ok(None),
            _ => Err(wrong("true or false")),
        };
    }
    let most = arg.get_num_args().map_or(1, |n| n.max_values());
    if flag.values.len() > most {
        return Err(wrong(&format!("one value, {expected}")));
    }
    let alone = ["dpo-host".to_owned(), flag.name.clone()].into_iter().chain(flag.values.clone());
    let parsed = command.clone().try_get_matches_from(alone);
    match parsed.map_err(|e| (e.kind(), e.get(ContextKind::InvalidValue).cloned())) {
        Err((ErrorKind::InvalidValue | ErrorKind::ValueValidation, value)) => match value {
            Some(ContextValue::String(value)) if !value.is_empty() && flag.values.len() > 1 => {
                Err(Error::input(format!("'{value}' in '{key}' should be {expected}")))
            }
            _ => Err(wrong(&expected)),
        },
        _ => Ok(Some(flag)),
    }
}

/// What a flag takes, in words.
fn expected(arg: &Arg) -> String {
    let names: Vec<String> = arg.get_possible_values().iter().map(|v| v.get_name().to_owned()).collect();
    if let [first @ .., last] = names.as_slice() {
        return format!("{} or {last}", first.join(", "));
    }
    let kind = arg.get_value_parser().type_id();
    match () {
        () if kind == TypeId::of::<f64>() => "a number".to_owned(),
        () if kind == TypeId::of::<usize>() || kind == TypeId::of::<u64>() => "a whole number".to_owned(),
        () => arg.get_value_names().and_then(|n| n.first()).map_or("a text".to_owned(), |n| format!("a text, {n}")),
    }
}
