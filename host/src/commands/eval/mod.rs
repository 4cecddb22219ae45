//! `dpo-host eval`: what a model and an adapter make of examples, file by file; or what they answer.

mod generate;

use std::ops::Range;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Map, Value, json};

use super::list::print_table;
use crate::args::DeviceArg;
use crate::args::data::DataArgs;
use crate::args::loss::LossArgs;
use crate::args::model::ModelArgs;
use crate::args::storage::StorageArgs;
use crate::{backends, demo};
use dpo_core::backend::Workload;
use dpo_core::collective::Alone;
use dpo_core::device::Device;
use dpo_core::error::{Error, Result};
use dpo_core::example::Example;
use dpo_core::logprobs::AnswerLogProbs;
use dpo_core::lora::Adapter;
use dpo_core::optimizer::Moments;
use dpo_core::plan::MemoryOptions;
use dpo_core::weights::Checkpoint;
use dpo_core::{console, files};
use dpo_data::{self as data, ChatTokenizer, read_json};
use dpo_hub::Need;
use dpo_hub::model::{self, Model};
use dpo_plugins::Registry;
use dpo_ranks::Ranks;
use dpo_train::{Objective, mean_metrics, score};
use generate::GenerateArgs;

#[derive(Args)]
pub(crate) struct EvalOptions {
    /// Checkpoint: a folder, or a model of a hub: owner/name of Hugging Face, ms::owner/name of ModelScope; by default the one
    /// that the adapter names
    #[arg(long, value_name = "DIR|ID")]
    model: Option<String>,
    #[command(flatten)]
    reading: ModelArgs,
    /// PEFT adapter; rewards are against the model without it. Without an adapter the model itself is scored
    #[arg(long, visible_alias = "adapters", value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// The loss; options that are not given are those of the run that the adapter is from
    #[command(flatten)]
    loss: LossArgs,
    /// Fields whose flags were given
    #[arg(skip)]
    pub(crate) given: Vec<String>,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceArg::Auto)]
    device: DeviceArg,
    #[command(flatten)]
    storage: StorageArgs,
    /// Print JSON instead of a table: means under the names of the log, for every --dataset and for all
    #[arg(long)]
    json: bool,
    /// Write a line of JSON for every example: log-probs of its answers; with --generate for every prompt, with both answers
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    generate: GenerateArgs,
    #[command(flatten)]
    data: DataArgs,
}

/// Columns of the table, and the means they show. Rewards are there with an adapter only.
const COLUMNS: [(&str, &str); 6] = [
    ("ACCURACY", "rewards/accuracies"),
    ("MARGIN", "rewards/margins"),
    ("LOSS", "loss"),
    ("CHOSEN LIKELIER", "chosen_more_likely"),
    ("LOGP CHOSEN", "logps/chosen"),
    ("LOGP REJECTED", "logps/rejected"),
];

/// Means that say something without an adapter.
const OF_MODEL: &[&str] = &["chosen_more_likely", "logps/chosen", "logps/rejected", "nll_loss"];

pub(crate) fn eval(registry: &Registry, options: &EvalOptions) -> Result<()> {
    options.generate.refuse_idle(&options.given)?;
    if let Some(prompts) = &options.generate.generate {
        return generate::generate(registry, options, prompts);
    }
    let name = demo::or_named(model::named(options.model.as_deref(), options.adapter.as_deref())?)?;
    // What can be told without weights is told before they are fetched.
    let folder = model::locate(&name, Need::WeightsToCome)?;
    let model = Model::open(registry, &folder, &options.reading.options())?;
    model.warn();
    let tokenizer = ChatTokenizer::open(&folder, model.family.chat_template.as_deref())?;
    let loss = as_in_run(options)?;
    let mut objective = Objective::new(registry, &loss.objective()?)?;
    // Without a path, too, loading says what is missing.
    let paths: Vec<&[String]> = match options.data.dataset.as_slice() {
        [] => vec![&[]],
        paths => paths.chunks(1).collect(),
    };
    let wanted = objective.wanted()?;
    let load = |path: &&[String]| {
        let rows = options.data.options(path, &wanted)?.of_model(&model.graph, model.positions());
        data::load(&rows, registry, &tokenizer)?.examples.all()
    };
    let files = paths.iter().map(load).collect::<Result<Vec<Vec<Example>>>>()?;
    let adapter =
        options.adapter.as_ref().map_or_else(|| Adapter::idle(&model.graph), |a| Adapter::load(&model.graph, a))?;
    let params = adapter.parameters();
    let backend = backends::open(&options.device, None)?;
    let workload = Workload::of(files.iter().flatten());
    let planned = backend.plan(
        &mut Alone,
        model.graph.clone(),
        adapter,
        workload,
        model.memory(options.storage.on(MemoryOptions::default()))?,
    )?;
    let folder = model::locate(&name, Need::Weights)?;
    let mut device = planned.load(&mut Alone, &Checkpoint::of(&folder, &model.graph)?)?;
    let policy = scores(device.as_mut(), &files)?;
    let reference = match options.adapter {
        Some(_) => {
            device.restore(&vec![0.0; params], Moments::new(params))?;
            scores(device.as_mut(), &files)?
        }
        None => policy.clone(),
    };
    for (file, logps) in files.iter().zip(&policy).chain(files.iter().zip(&reference)) {
        let whole = |e: &usize| logps.logps[logps.offsets.example(*e)].iter().all(|l| l.is_finite());
        if let Some(example) = (0..file.len()).find(|e| !whole(e)) {
            return Err(Error::run("the log-probs of this row are not finite")
                .at(&file[example].place)
                .help("a weight of the model or of the adapter is broken, or a number in them is too large"));
        }
    }
    let mut rows: Vec<(String, usize, Map<String, Value>)> = Vec::new();
    let mut row = |name: &str, examples: &[&Example], policy: &AnswerLogProbs, reference: &AnswerLogProbs| {
        let mut means = mean_metrics(&mut objective, examples, policy, reference)?;
        means.retain(|name, _| options.adapter.is_some() || OF_MODEL.contains(&name.as_str()));
        rows.push((name.to_owned(), examples.len(), means));
        Ok::<(), Error>(())
    };
    for (((path, file), policy), reference) in options.data.dataset.iter().zip(&files).zip(&policy).zip(&reference) {
        row(path, &file.iter().collect::<Vec<_>>(), policy, reference)?;
    }
    row("all", &files.iter().flatten().collect::<Vec<_>>(), &joined(&policy), &joined(&reference))?;
    show(&rows, options.json);
    match &options.output {
        Some(path) => files::write(path, lines(files.iter().flatten(), &joined(&policy)).as_bytes()),
        None => Ok(()),
    }
}

/// The loss as the user says it, and else as the run says it that the adapter, or the checkpoint, is of.
fn as_in_run(options: &EvalOptions) -> Result<LossArgs> {
    let own = options.loss.clone();
    let folders = options.adapter.as_deref().into_iter().flat_map(|folder| [Some(folder), folder.parent()]).flatten();
    let Some(args) = folders.map(|folder| folder.join("args.json")).find(|args| args.is_file()) else { return Ok(own) };
    let (Value::Object(mut loss), Value::Object(run)) = (json!(own), read_json(&args)?) else { return Ok(own) };
    for (name, value) in &mut loss {
        if let Some(of_run) = run.get(name).filter(|_| !options.given.contains(name)) {
            *value = of_run.clone();
        }
    }
    let named = |flag: &str| run.get(flag).and_then(Value::as_str);
    if let Some(reference) = named("ref_adapter").or_else(|| named("ref_model")).or_else(|| named("init_adapter")) {
        console::note(format!(
            "rewards are measured from the model without an adapter; the run's own were measured from {reference}"
        ));
    }
    let loss: LossArgs =
        serde_json::from_value(loss.into()).map_err(|e| Error::input(e.to_string()).at(args.display()))?;
    let numbers = [("--beta", loss.beta), ("--rpo-alpha", loss.rpo_alpha), ("--ld-alpha", loss.ld_alpha)];
    let numbers: Vec<String> = numbers.iter().filter_map(|(name, x)| Some(format!(" {name} {}", (*x)?))).collect();
    console::line(format!(
        "loss        {}{}, other options taken from {}",
        loss.names.join(" "),
        numbers.concat(),
        args.display()
    ));
    Ok(loss)
}

fn scores(device: &mut dyn Device, files: &[Vec<Example>]) -> Result<Vec<AnswerLogProbs>> {
    let of = |file: &Vec<Example>| score(&mut Ranks::alone(), device, &file.iter().collect::<Vec<_>>(), |_| {});
    files.iter().map(of).collect()
}

fn show(rows: &[(String, usize, Map<String, Value>)], as_json: bool) {
    if as_json {
        let object = |(name, examples, means): &(String, usize, Map<String, Value>)| {
            let count = [("dataset".to_owned(), json!(name)), ("examples".to_owned(), json!(examples))];
            let mut object = Map::from_iter(count);
            object.extend(means.clone());
            object
        };
        let rows: Vec<_> = rows.iter().map(object).collect();
        println!("{:#}", json!(rows));
        return;
    }
    // One file is all there is.
    let rows = if rows.len() == 2 { &rows[..1] } else { rows };
    let cell = |means: &Map<String, Value>, name: &str| {
        means.get(name).and_then(Value::as_f64).map_or("-".into(), |value| format!("{value:.4}"))
    };
    let cells = rows.iter().map(|(name, examples, means)| {
        let [a, m, l, k, c, r] = COLUMNS.map(|(_, mean)| cell(means, mean));
        [name.clone(), examples.to_string(), a, m, l, k, c, r]
    });
    let [a, m, l, k, c, r] = COLUMNS.map(|(head, _)| head);
    print_table(["DATASET", "EXAMPLES", a, m, l, k, c, r], cells.collect());
}

/// Log-probs of all files as of one.
fn joined(files: &[AnswerLogProbs]) -> AnswerLogProbs {
    let mut all = AnswerLogProbs::default();
    files.iter().for_each(|file| all.append(file));
    all
}

/// A line of JSON for every example: of a pair, by the names of its answers.
fn lines<'a>(examples: impl Iterator<Item = &'a Example>, logps: &AnswerLogProbs) -> String {
    let sum = |at: Range<usize>| logps.logps[at].iter().map(|l| f64::from(*l)).sum::<f64>();
    let line = |(i, example): (usize, &Example)| {
        let sums: Vec<f64> = logps.offsets.answers(i).take(example.learned().len()).map(sum).collect();
        let line = match sums[..] {
            [chosen, rejected] => json!({"chosen": chosen, "rejected": rejected}),
            _ => json!({"answers": sums}),
        };
        format!("{line}\n")
    };
    examples.enumerate().map(line).collect()
}
