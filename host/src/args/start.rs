//! What a page may start: the flags of `train` without those that reach beyond a run, and what its form is made of.

use std::any::TypeId;
use std::path::Path;

use clap::{Arg, ArgAction, ArgMatches, Command, FromArgMatches};
use dpo_core::error::{Error, Result};
use dpo_page::Start;
use dpo_plugins::Registry;
use dpo_train::refuse_run;
use serde_json::{Map, Value, json};

use super::flag::known;
use super::train::TrainArgs;
use super::{given, record, resolve};

/// Flags that a page may not give, with what is to be done instead. A library that is loaded can do whatever its author likes, and a
/// file of flags may name one; a run has one page and one folder.
const REFUSED: [(&str, &str); 4] = [
    ("--plugin-dir", "give it to `dpo-host ui`: its runs have it, too"),
    ("--config", "write its flags into the form"),
    ("--dashboard", "leave it out: this page shows the run"),
    ("--add-version", "--add-version false: a run has a folder of its own"),
];

/// Those of them that are refused before anything is read.
const UNREAD: usize = 2;

/// Flags that the form has no use for, besides: it names the folder itself, and nobody reads what a run prints for programs.
const ELSEWHERE: [&str; 4] = ["--output-dir", "--json", "--quiet", "--help"];

/// Commands that say beforehand what would become of a run, each of the flags that it has in common with `train`.
const CHECKS: [&str; 2] = ["data", "plan"];

/// Reads the arguments of a run that is to be written into a folder right inside of `parent`.
///
/// # Errors
/// Flags that a page may not give, and what `train` refuses before it opens anything.
pub(crate) fn read(cli: &Command, parent: &Path, written: &[String]) -> Result<Start> {
    let named = |flag: &str| {
        let names = |arg: &String| arg.split('=').next().is_some_and(|name| name.replace('_', "-") == flag);
        written.iter().any(names)
    };
    if let Some((flag, help)) = REFUSED[..UNREAD].iter().find(|(flag, _)| named(flag)) {
        return Err(refused(flag, help));
    }
    if let Some(stray) = written.first().filter(|first| !first.starts_with("--")) {
        return Err(Error::input(format!("'{stray}' is no flag")).help("a flag begins with two dashes, as --model"));
    }
    let args = ["dpo-host", "train"].map(str::to_owned).into_iter().chain(written.iter().cloned()).collect();
    let mut cli = cli.clone();
    let flags = resolve::resolve(args, &mut cli)?;
    let matches = cli.clone().try_get_matches_from(&flags.args).map_err(|e| refusal(&e))?;
    let mut args = matches.subcommand().map_or_else(|| Err(Error::input("is no run")), |(_, own)| parsed(own))?;
    let beyond = args.beyond_a_run();
    if let Some((flag, help)) = REFUSED.iter().find(|(flag, _)| beyond == Some(*flag)) {
        return Err(refused(flag, help));
    }
    let output = args.output_dir().map(Path::to_owned).filter(|output| is_inside(output, parent)).ok_or_else(|| {
        Error::input(format!("should be a folder right inside of {}", parent.display()))
            .at("--output-dir")
            .help("a name without slashes")
    })?;
    args.refuse_unsupported()?;
    args.demo_or_given()?;
    args.resolve(None, false)?;
    if !args.resumes() {
        refuse_run(&output)?;
    }
    cli.build();
    let flags = record(&args);
    let check = |name: &&str| Some(shared(cli.find_subcommand(name)?, name, &flags));
    Ok(Start { output, checks: CHECKS.iter().filter_map(check).collect() })
}

fn refused(flag: &str, help: &str) -> Error {
    Error::input("is not for a page to give").at(flag).help(help)
}

fn parsed(matches: &ArgMatches) -> Result<TrainArgs> {
    let mut args = TrainArgs::from_arg_matches(matches).map_err(|e| refusal(&e))?;
    args.given = given(matches);
    args.plugin_dir = matches.get_many("plugin_dir").into_iter().flatten().cloned().collect();
    Ok(args)
}

/// What clap says, without the usage that it shows on a terminal.
fn refusal(error: &clap::Error) -> Error {
    let text = error.to_string();
    let text = text.split("\n\nUsage").next().unwrap_or_default().split("\n\nFor more").next().unwrap_or_default();
    Error::input(text.trim().trim_start_matches("error: "))
}

/// Whether a folder that need not be there is right inside of another one, links followed.
fn is_inside(folder: &Path, parent: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().ok();
    // Of `.` and `..` there is none.
    let Some(name) = folder.file_name() else { return false };
    let (Some(parent), Some(own)) = (real(parent), folder.parent().and_then(real)) else { return false };
    let place = parent.join(name);
    own == parent && real(&place).is_none_or(|there| there == place) && !place.is_symlink()
}

/// A command with the flags of a run that it knows, too.
fn shared(command: &Command, name: &str, flags: &Map<String, Value>) -> Vec<String> {
    let mut words = vec![name.to_owned()];
    for (key, value) in flags {
        let flag = format!("--{}", key.replace('_', "-"));
        let Some(arg) = known(command, &flag) else { continue };
        let values: Vec<String> = match value {
            Value::Null => continue,
            Value::Array(list) => list.iter().map(plain).collect(),
            value => vec![plain(value)],
        };
        // What is as usual need not be said. `auto` is for what reads it; where a number is wanted, the command has one of its own.
        let number = arg.get_value_parser().type_id() == TypeId::of::<usize>();
        let usual = |value: &String| arg.get_default_values() == [value.as_str()] || (value == "auto" && number);
        let most = arg.get_num_args().map_or(1, |n| n.max_values());
        match &values[..values.len().min(most)] {
            [] => {}
            [value] if usual(value) => {}
            [value] => words.push(format!("{flag}={value}")),
            values => words.extend(std::iter::once(flag).chain(values.iter().cloned())),
        }
    }
    words
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// What the page makes its form of: every flag that it may give, with its help and its default, and the names that plugins have.
pub(crate) fn form(cli: &Command, registry: &Registry, common: &[String], parent: &Path) -> Value {
    let mut cli = cli.clone();
    cli.build();
    let train = cli.find_subcommand("train").map(Command::get_arguments).into_iter().flatten();
    let flags: Vec<Value> = train.filter_map(flag).collect();
    let families: Vec<_> = registry.families.iter().map(|f| [&f.name, &f.summary]).collect();
    let losses: Vec<_> = registry.losses.iter().map(|l| [&l.name, &l.summary]).collect();
    let home = std::env::var("HOME").ok();
    json!({"common": common, "folder": parent, "home": home, "flags": flags, "plugin": families, "loss": losses})
}

/// A flag as the form has it.
fn flag(arg: &Arg) -> Option<Value> {
    let name = format!("--{}", arg.get_long()?);
    let left_out = REFUSED.iter().map(|(flag, _)| *flag).chain(ELSEWHERE).any(|other| other == name);
    if left_out || arg.is_hide_set() {
        return None;
    }
    let text = |text: &clap::builder::OsStr| text.to_string_lossy().into_owned();
    let default: Vec<String> = arg.get_default_values().iter().map(text).collect();
    let values: Vec<String> = arg.get_possible_values().iter().map(|v| v.get_name().to_owned()).collect();
    Some(json!({
        "name": name,
        "key": arg.get_long()?.replace('-', "_"),
        "heading": arg.get_help_heading().unwrap_or("Options"),
        "help": arg.get_help().map(ToString::to_string).unwrap_or_default(),
        "value": arg.get_value_names().map(|names| names.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")),
        "default": default.join(" "),
        "values": values,
        "many": arg.get_num_args().is_some_and(|n| n.max_values() > 1),
        "switch": matches!(arg.get_action(), ArgAction::SetTrue),
    }))
}
