//! `dpo-host data`: what becomes of the rows of a dataset.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use crate::args::data::DataArgs;
use crate::args::model::ModelArgs;
use crate::demo;
use dpo_core::error::{Error, Result};
use dpo_core::example::{Answer, Example};
use dpo_core::files;
use dpo_data::{self as data, ChatTokenizer, Examples};
use dpo_hub::Need;
use dpo_hub::model::{self, Model};
use dpo_plugins::Registry;
use dpo_train::{Objective, ObjectiveOptions};

#[derive(Args)]
pub(crate) struct DataCommand {
    /// Rows: files or folders
    #[arg(value_name = "PATH[#N]")]
    paths: Vec<String>,
    /// Checkpoint whose tokenizer and chat template are used: a folder, or a model of a hub: owner/name of Hugging Face, ms::owner/name of ModelScope
    #[arg(long, value_name = "DIR|ID")]
    model: String,
    #[command(flatten)]
    reading: ModelArgs,
    /// Loss whose examples the rows should become: pairs, single answers or rankings
    #[arg(long, value_name = "NAME", default_value = "sigmoid")]
    loss: String,
    /// Write the examples, as training reads them, as jsonl: the place of the row, the prompt's ids, and of every answer ids, label and mask
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    args: DataArgs,
}

pub(crate) fn data(registry: &Registry, command: &DataCommand) -> Result<()> {
    if let Some(path) = command.output.as_ref().filter(|path| path.exists()) {
        return Err(Error::input("is there already")
            .at(format!("--output {}", path.display()))
            .help("name a new file, or remove that one"));
    }
    let folder = model::locate(&demo::or_named(command.model.clone())?, Need::Tokenizer)?;
    let paths: Vec<String> = command.paths.iter().chain(&command.args.dataset).cloned().collect();
    // A tokenizer alone is enough to look at data; a config adds the family's template and limits.
    let has_config = folder.join("config.json").is_file();
    let model = if has_config { Some(Model::open(registry, &folder, &command.reading.options())?) } else { None };
    model.iter().for_each(Model::warn);
    let family = match (&model, &command.reading.plugin) {
        (Some(model), _) => Some(model.family),
        (None, Some(name)) => Some(registry.family(name)?),
        (None, None) => None,
    };
    let tokenizer = ChatTokenizer::open(&folder, family.and_then(|f| f.chat_template.as_deref()))?;
    let loss = ObjectiveOptions { losses: vec![command.loss.clone()], ..ObjectiveOptions::default() };
    let wanted = Objective::new(registry, &loss)?.wanted()?;
    let options = command.args.options(&paths, &wanted)?;
    let options = if let Some(model) = &model { options.of_model(&model.graph, model.positions()) } else { options };
    let dataset = data::load(&options, registry, &tokenizer)?;
    if let Some(path) = &command.output {
        write(path, &dataset.examples)?;
    }
    if command.json {
        let text = serde_json::to_string_pretty(&dataset.report).map_err(|e| Error::run(e.to_string()))?;
        println!("{text}");
    } else {
        println!("{}", dataset.report);
    }
    Ok(())
}

/// Writes a line an example.
fn write(path: &Path, examples: &Examples) -> Result<()> {
    files::stream_into(path, |file| {
        let mut out = BufWriter::new(file);
        for example in examples.iter() {
            writeln!(out, "{}", line(&example.map_err(std::io::Error::other)?))?;
        }
        out.flush()
    })
}

/// An example in tokens. The mask of an answer is 1 for tokens that a loss learns, and 0 for those of an answer that gives log-probs alone.
fn line(example: &Example) -> Value {
    let answer = |a: &Answer| json!({"ids": a.ids, "label": a.label, "mask": vec![u8::from(!a.detached); a.ids.len()]});
    let answers: Vec<Value> = example.answers().iter().map(answer).collect();
    json!({"place": example.place, "prompt_ids": example.prompt(), "answers": answers})
}
