//! `dpo-host ui`: the page of finished or running runs.

use std::path::PathBuf;

use clap::Args;

use dpo_core::console;
use dpo_core::error::Result;
use dpo_page::{Runs, Server};

#[derive(Args)]
pub(crate) struct UiOptions {
    /// Output folders of runs, or folders above some
    #[arg(required = true, value_name = "OUTPUT_DIR")]
    folders: Vec<PathBuf>,
    /// Where to listen; an address that other machines reach asks them for a token, which is printed. A port alone is one of
    /// 127.0.0.1; by default 6868, or another one if that is taken
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<String>,
}

pub(crate) fn ui(options: &UiOptions) -> Result<()> {
    let runs = Runs::below(&options.folders)?;
    let server = Server::bind(options.listen.as_deref(), "--listen")?;
    let count = runs.folders().len();
    console::result(format!("page        {} ({count} run{})", server.url(), if count == 1 { "" } else { "s" }));
    server.serve(runs);
    Ok(())
}
