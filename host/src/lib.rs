//! The command line of dpo-host: one subcommand a file. Flags are parsed here; what is done is in the crates beside this one.

pub mod allocator;
pub mod args;
mod backends;
pub mod commands;
mod demo;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use args::train::TrainArgs;
use args::{given, resolve};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use commands::{
    bench, chat, data, describe, doctor, eval, list, manual, merge, new, plan, push, selftest, serve, train, ui,
};
use dpo_core::console;
use dpo_core::error::{Kind, Result};
use dpo_plugins::Registry;
use dpo_ranks::Place;

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
    /// Print only warnings, errors and results
    #[arg(long, global = true)]
    quiet: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Train an adapter. Without model and data: the built-in demo
    ///
    /// Arguments of ms-swift, LLaMA-Factory and TRL are taken under their own names; those without a meaning here are
    /// reported. Flags may also be written in a file, TOML or YAML: --config run.toml.
    #[command(args_override_self = true)]
    Train(Box<TrainArgs>),
    /// List plugins: what was found, and where
    List(list::ListOptions),
    /// Describe a plugin: a family's graph, a format's rows, a loss's formula and options
    Describe(describe::DescribeOptions),
    /// Write a new plugin crate that builds, passes its tests and loads
    New(NewOptions),
    /// Check a dataset: what becomes of its rows, lengths, one example as the model sees it
    Data(data::DataCommand),
    /// Plan the memory of a run before it starts
    Plan(plan::PlanOptions),
    /// Compare every op and ten steps of training on a GPU with the CPU
    Selftest(selftest::SelftestOptions),
    /// Measure training speed with random weights of a published shape
    Bench(bench::BenchOptions),
    /// Check the GPU setup: what of CUDA was found, what is missing, and how to get it
    Doctor(doctor::DoctorOptions),
    /// Score pairs: log-probs of chosen and rejected answers under a model and an adapter; or answer prompts with both (--generate)
    Eval(Box<eval::EvalOptions>),
    /// Chat with a model, with an adapter, or compare both side by side. Without model and adapter: the demo's model
    Chat(chat::ChatOptions),
    /// Merge an adapter into its model: a checkpoint that needs no adapter
    ///
    /// The files are those of the model, with W + scale * B * A in the place of every adapted W: computed in f32, and rounded once,
    /// to nearest with ties to even, to the type that the model has. Everything else is the same byte for byte.
    Merge(merge::MergeOptions),
    /// Serve a model and adapters over HTTP to clients of OpenAI's API
    ///
    /// Endpoints: /v1/chat/completions and /v1/completions, with streams, /v1/models, /health. Answers to all requests go on together,
    /// each adapter under a model name of its own. What neither a request nor the flags of sampling nor the model's
    /// generation_config.json says is as in OpenAI's API: temperature 1, a chat's answer as long as there is room for, 16 tokens of a
    /// completion.
    Serve(serve::ServeOptions),
    /// Push an adapter, a merged model or a GGUF file to Hugging Face or ModelScope, with a model card
    ///
    /// Of a run's folder its adapter, tokenizer files and a card go up: no checkpoint, no log, no row. A push that broke off goes
    /// on when it is begun again.
    Push(push::PushOptions),
    /// Show runs in a browser: curves side by side, remarks, sample pairs token by token; with --allow-start, start and stop them
    Ui(ui::UiOptions),
    /// Write a script that completes commands and flags: dpo-host completions bash > /etc/bash_completion.d/dpo-host
    Completions(manual::CompletionsOptions),
    /// Write a manual page: dpo-host man train | man -l -
    Man(manual::ManOptions),
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

/// Tells candle how many threads there are. Unless this variable does, it reads /proc/cpuinfo anew for every product, which
/// takes longer than the product where both are small.
fn name_threads() {
    const NAME: &str = "RAYON_NUM_THREADS";
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    if std::env::var_os(NAME).is_none() {
        // SAFETY: at the start of the process no other thread reads the environment.
        unsafe { std::env::set_var(NAME, threads.to_string()) };
    }
}

/// Keeps freed memory for the next tensor. By default glibc returns that of large ones at once, and a run on the CPU then spends
/// some percent of its time in page faults. Larger ones than this are kept by [`allocator`].
fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (option, bytes) in [(libc::M_MMAP_THRESHOLD, 1 << 20), (libc::M_TRIM_THRESHOLD, 256 << 20)] {
        // SAFETY: sets a number of the allocator; where it is refused, nothing changes.
        unsafe { libc::mallopt(option, bytes) };
    }
}

/// Runs a command line, prints its error, and says how it ended. To be called first of all in a process.
pub fn main(args: Vec<OsString>) -> ExitCode {
    name_threads();
    keep_freed_memory();
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            console::error(&error);
            ExitCode::from(match error.kind {
                Kind::Run => 1,
                Kind::Input => 2,
            })
        }
    }
}

/// The plugins that a command finds. This program is the helper that asks them.
pub(crate) fn discover(dirs: &[PathBuf]) -> Registry {
    Registry::discover(dirs, std::env::current_exe().ok().as_deref())
}

/// Commands that may run as ranks.
const RANKED: &[&str] = &["train", "bench", "selftest"];

fn run(args: Vec<OsString>) -> Result<()> {
    let args: Vec<String> = args.into_iter().map(|a| a.to_string_lossy().into_owned()).collect();
    if args.get(1).is_some_and(|first| first == dpo_plugins::COMMAND) {
        return dpo_plugins::answer(&args[2..]);
    }
    let mut command = Cli::command();
    let flags = resolve::resolve(args, &mut command)?;
    let ranked = resolve::command_at(&flags.args).is_some_and(|at| RANKED.contains(&flags.args[at].as_str()));
    let place = if ranked { Place::from_environment()? } else { None };
    if !ranked {
        // Who does not read on, such as `head`, ends a command that prints. A run goes on.
        let always = Arc::new(AtomicBool::new(true));
        let _ = signal_hook::flag::register_conditional_default(signal_hook::consts::SIGPIPE, always);
    }
    if place.as_ref().is_some_and(|p| p.rank > 0) {
        console::silence();
    }
    let parsed = command.try_get_matches_from(&flags.args).and_then(|m| Ok((Cli::from_arg_matches(&m)?, m)));
    let (mut cli, matches) = match parsed {
        Ok(parsed) => parsed,
        // clap prints its own errors with usage, to the right stream; they are the user's to mend.
        Err(e) => {
            let _ = e.print();
            std::process::exit(if e.use_stderr() { 2 } else { 0 });
        }
    };
    if cli.quiet {
        console::quiet();
    }
    if let (Command::Train(options), Some((_, matches))) = (&mut cli.command, matches.subcommand()) {
        options.given = given(matches);
        options.plugin_dir.clone_from(&cli.plugin_dir);
        if options.json {
            console::json();
        }
    }
    if let (Command::Eval(options), Some((_, matches))) = (&mut cli.command, matches.subcommand()) {
        options.given = given(matches);
    }
    // Our own launcher has said these before it started its ranks.
    let launched = place.is_some_and(|p| p.launched);
    if !launched {
        flags.notes.iter().for_each(|note| console::note(note.as_str()));
    }
    let registry = discover(&cli.plugin_dir);
    if !matches!(cli.command, Command::List(_)) && !launched {
        for refusal in &registry.refusals {
            console::warning(format!("plugin {} is left out: {}", refusal.place, refusal.cause));
        }
    }
    match cli.command {
        Command::Train(options) => train::train(&registry, *options),
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
        Command::Push(options) => push::push(&options),
        Command::Selftest(options) => selftest::selftest(&registry, &options),
        Command::Bench(options) => bench::bench(&registry, &options),
        Command::Doctor(options) => doctor::doctor(&options),
        Command::Serve(options) => serve::serve(&registry, &options),
        Command::Ui(options) => ui::ui(&registry, &options, &cli.plugin_dir, Cli::command()),
        Command::Completions(options) => manual::completions(&options, Cli::command()),
        Command::Man(options) => manual::man(&options, Cli::command()),
    }
}
