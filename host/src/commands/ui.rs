//! `dpo-host ui`: the page of finished or running runs, which may start further ones.

use std::path::{Path, PathBuf};

use clap::{Args, Command};

use crate::args::start;
use dpo_core::console;
use dpo_core::error::{Error, IoContext, Result};
use dpo_page::{Launcher, Runs, Server};
use dpo_plugins::Registry;

#[derive(Args)]
pub(crate) struct UiOptions {
    /// Output folders of runs, or folders above some
    #[arg(required_unless_present = "allow_start", value_name = "OUTPUT_DIR")]
    folders: Vec<PathBuf>,
    /// Where to listen; an address that other machines reach asks them for a token, which is printed. A port alone is one of
    /// 127.0.0.1; by default 6868, or another one if that is taken
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<String>,
    /// Let the page start runs that are written into this folder, and stop them. Whoever has the printed address can then do what
    /// `dpo-host train` can as this user
    #[arg(long, value_name = "DIR")]
    allow_start: Option<PathBuf>,
}

pub(crate) fn ui(registry: &Registry, options: &UiOptions, plugin_dirs: &[PathBuf], cli: Command) -> Result<()> {
    let starts = options.allow_start.as_deref();
    starts.map_or(Ok(()), |folder| std::fs::create_dir_all(folder).writing(folder))?;
    let runs = Runs::below(&options.folders, starts)?;
    let mut server = Server::bind(options.listen.as_deref(), "--listen")?;
    if let Some(folder) = starts {
        server = server.starting(launcher(registry, folder, plugin_dirs, cli)?)?;
    }
    let count = runs.folders().len();
    console::result(format!("page        {} ({count} run{})", server.url(), if count == 1 { "" } else { "s" }));
    server.serve(runs);
    Ok(())
}

/// What starts runs inside of a folder, with the plugins of this command.
fn launcher(registry: &Registry, folder: &Path, plugin_dirs: &[PathBuf], cli: Command) -> Result<Launcher> {
    let program = std::env::current_exe().map_err(|e| Error::run(format!("this program's file is not known: {e}")))?;
    let common: Vec<String> =
        plugin_dirs.iter().flat_map(|dir| ["--plugin-dir".to_owned(), dir.display().to_string()]).collect();
    let (form, parent) = (start::form(&cli, registry, &common, folder), folder.to_owned());
    let read = move |args: &[String]| start::read(&cli, &parent, args);
    Ok(Launcher::new(program, common, &folder.canonicalize().reading(folder)?, form, Box::new(read)))
}
