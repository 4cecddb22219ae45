//! `dpo-host completions` and `dpo-host man`: what a shell and `man` want to know of the command line, written to stdout.

use std::io::{self, Write};

use clap::{Args, Command};
use clap_complete::Shell;

use dpo_core::error::{Error, Result};

#[derive(Args)]
pub(crate) struct CompletionsOptions {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

#[derive(Args)]
pub(crate) struct ManOptions {
    /// A command, for the page of it
    command: Option<String>,
}

pub(crate) fn completions(options: &CompletionsOptions, mut cli: Command) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut cli, "dpo-host", &mut script);
    print(&script)
}

pub(crate) fn man(options: &ManOptions, mut cli: Command) -> Result<()> {
    cli.build();
    let page = match &options.command {
        None => cli,
        Some(name) => {
            let known = cli.get_subcommands().map(Command::get_name);
            let command = cli.find_subcommand(name).ok_or_else(|| Error::unknown("command", name, known))?;
            command.clone()
        }
    };
    let mut text = Vec::new();
    clap_mangen::Man::new(page).render(&mut text).map_err(|e| Error::run(e.to_string()))?;
    print(&text)
}

fn print(text: &[u8]) -> Result<()> {
    io::stdout().write_all(text).map_err(|e| Error::run(format!("cannot write: {e}")).at("stdout"))
}
