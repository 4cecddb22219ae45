//! The command line: one subcommand a file. Options are parsed here; what they mean is decided where they are used.

mod bench;
mod chat;
mod config;
mod data;
mod describe;
mod doctor;
mod eval;
mod list;
mod merge;
pub mod new;
mod plan;
pub(crate) mod selftest;
pub(crate) mod shape;
mod swift;
mod ui;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::console;
use crate::error::{Kind, Result};
use crate::plugins::Registry;
use crate::ranks::Place;
use crate::train::{self, TrainOptions};

/// Trains language models on preference data with LoRA: one binary, plugins for model families, dataset formats and
/// losses.
#[derive(Parser)]
#[command(name = "dpo-host", version, max_term_width = 110, args_override_self = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Folder with plugin libraries, looked through before $DPO_PLUGIN_PATH and the user's folder; may be repeated
    #[arg(long, global = true, value_name = "DIR")]
    plugin_dir: Vec<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Train an adapter. Without model and data: the built-in demo
    ///
    /// Flags of ms-swift's `swift rlhf --rlhf_type dpo` are accepted under their own names; those without a meaning here are
    /// reported. Flags may also be written as a TOML file: --config run.toml.
    #[command(args_override_self = true)]
    Train(Box<TrainOptions>),
    /// List plugins: what was found, and where
    List(list::ListOptions),
    /// Describe a plugin: a family's graph, a format's rows, a loss's formula and options
    Describe(describe::DescribeOptions),
    /// Write a new plugin crate that builds, passes its tests and loads
    New(NewOptions),
    /// Check a dataset: what becomes of its rows, lengths, one pair as the model sees it
    Data(data::DataCommand),
    /// Compute the memory of a run before it starts
    Plan(plan::PlanOptions),
    /// Compare every op and ten steps of training on a GPU with the CPU
    Selftest(selftest::SelftestOptions),
    /// Measure training speed with random weights of a published shape
    Bench(bench::BenchOptions),
    /// Say what of CUDA was found, what is missing, and how to get it
    Doctor(doctor::DoctorOptions),
    /// Score pairs: log-probs of chosen and rejected answers under a model and an adapter
    Eval(eval::EvalOptions),
    /// Talk to a model, to what an adapter made of it, or to both side by side. Without model and adapter: the demo's model
    Chat(chat::ChatOptions),
    /// Fold an adapter into its model: a checkpoint that needs no adapter
    ///
    /// The files are those of the model, with W + scale * B * A in the place of every adapted W: computed in f32, and rounded once,
    /// to nearest with ties to even, to the type that the model has. Everything else is the same byte for byte.
    Merge(merge::MergeOptions),
    /// Show runs in a browser: curves side by side, remarks, sample pairs token by token
    Ui(ui::UiOptions),
}

#[derive(clap::Args)]
struct NewOptions {
    /// What to write
    #[arg(value_enum)]
    kind: new::Kind,
    /// Its name, in lower case
    name: String,
    /// Where; by default a folder of that name here
    #[arg(long, value_name = "DIR")]
    path: Option<PathBuf>,
}

/// Runs a command line, prints its error, and says how it ended.
pub fn main(args: Vec<OsString>) -> ExitCode {
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(match error.kind {
                Kind::Run => 1,
                Kind::Input => 2,
            })
        }
    }
}

/// Commands that may run as ranks.
const RANKED: &[&str] = &["train", "bench", "selftest"];

fn run(args: Vec<OsString>) -> Result<()> {
    let args = args.into_iter().map(|a| a.to_string_lossy().into_owned()).collect();
    let args = swift::translate(config::expand(args)?)?;
    let ranked = args.args.get(1).is_some_and(|command| RANKED.contains(&command.as_str()));
    let place = if ranked { Place::from_environment()? } else { None };
    if place.as_ref().is_some_and(|p| p.rank > 0) {
        console::silence();
    }
    // Our own launcher has said these before it started its ranks.
    let said = place.is_some_and(|p| p.launched);
    if !said {
        args.notes.iter().for_each(|note| console::line(format!("note: {note}")));
    }
    let cli = match Cli::try_parse_from(&args.args) {
        Ok(cli) => cli,
        // clap prints its own errors with usage, to the right stream; they are the user's to mend.
        Err(e) => {
            let _ = e.print();
            std::process::exit(if e.use_stderr() { 2 } else { 0 });
        }
    };
    let registry = Registry::discover(&cli.plugin_dir);
    if !matches!(cli.command, Command::List(_)) && !said {
        for refusal in &registry.refusals {
            console::line(format!("warning: plugin {} is left out: {}", refusal.place, refusal.cause));
        }
    }
    match cli.command {
        Command::Train(options) => train::run(&registry, *options).map(|_| ()),
        Command::List(options) => list::list(&registry, &options),
        Command::Describe(options) => describe::describe(&registry, &options),
        Command::New(options) => {
            let folder = options.path.unwrap_or_else(|| PathBuf::from(&options.name));
            new::new(options.kind, &options.name, &folder)
        }
        Command::Data(options) => data::data(&registry, &options),
        Command::Plan(options) => plan::plan(&registry, &options),
        Command::Eval(options) => eval::eval(&registry, &options),
        Command::Chat(options) => chat::chat(&registry, &options),
        Command::Merge(options) => merge::merge(&registry, &options),
        Command::Selftest(options) => selftest::selftest(&registry, &options),
        Command::Bench(options) => bench::bench(&registry, &options),
        Command::Doctor(options) => doctor::doctor(&options),
        Command::Ui(options) => ui::ui(&options),
    }
}
