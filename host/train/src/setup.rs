//! The start of a run: from settings to everything that the loop works on, step by step, and what follows the last step.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use dpo_core::backend::{Backend, Workload};
use dpo_core::collective::ProcessGroup;
use dpo_core::console::{self, Remark};
use dpo_core::device::Device;
use dpo_core::error::{Error, Result};
use dpo_core::example::Example;
use dpo_core::lora::{Adapter, AdapterConfig, read_config};
use dpo_core::plan::Packing;
use dpo_core::weights::Checkpoint;
use dpo_data::{self as data, ChatTokenizer, Report, Wanted};
use dpo_generate::Generator;
use dpo_hub::Need;
use dpo_hub::model::{self, Model};
use dpo_page::{ARGS, Runs, Server, Watchers};
use dpo_plugins::Registry;
use serde_json::{Map, Value, json};

use crate::checkpoint::load_state;
use crate::config::{Dashboard, PACKING, RESOLVED, StartAdapter, TrainConfig};
use crate::metrics::Window;
use crate::objective::Objective;
use crate::reference::Reference;
use crate::run::Run;
use crate::run_dir::RunDir;
use crate::samples::Samples;
use crate::{before_after, next_steps, nonfinite, settings};

/// Trains as one of some ranks, on the device of a backend; returns the folder with the result. `attempt` counts how often a
/// launcher has started these ranks again.
///
/// # Errors
/// Settings, rows, a model or a checkpoint that cannot be used; a run that fails; a rank that is lost.
pub fn train(
    registry: &Registry,
    mut config: TrainConfig,
    group: &mut dyn ProcessGroup,
    backend: &dyn Backend,
    attempt: u64,
) -> Result<PathBuf> {
    let objective = Objective::new(registry, &config.objective)?;
    let folder = model::locate(&config.model, Need::Weights)?;
    let model = Model::open(registry, &folder, config.plugin.as_deref())?;
    let attempt = group.all_reduce_max(attempt)?;
    let mut server = None;
    let mut claim = None;
    let RunDir { output, resumed } = group.broadcast_from_first(|| {
        server = serve(&config.dashboard, attempt)?;
        let (folder, claimed) = RunDir::claim(&config.output, &folder, attempt)?;
        claim = Some(claimed);
        Ok(folder)
    })?;
    let watchers = server.map(|server| {
        console::line(format!("dashboard   {}", server.url()));
        server.serve_beside(Runs::one(&output))
    });
    let checkpoint = Checkpoint::of(&folder, &model.graph)?;
    let adapter = starting_adapter(&model, &config)?;
    let tokenizer = ChatTokenizer::open(&folder, model.family.chat_template.as_deref())?;
    let wanted = objective.wanted()?;
    let Data { examples, validation, report } = Data::load(registry, &config, &wanted, &model, &tokenizer)?;
    console::line(format!("adapter     {} parameters at {} linears", adapter.parameters(), adapter.sites.len()));
    let content = format!("{}{}", checkpoint.content()?, model.config);
    let mut settings = settings::decisive(&config.flags, (&content, &model.graph), &objective, &adapter, &examples);
    if let Some(folder) = &resumed {
        // Before weights are loaded and references computed.
        settings::refuse_other(&load_state(folder)?.settings, &settings, folder)?;
    }
    config.memory.packing = group.broadcast_from_first(|| packing_before(&output, resumed.as_deref(), &config))?;
    let (family, package, graph) = (model.family.name.clone(), model.family.package(), model.graph);
    let workload = Workload::of(examples.iter().chain(&validation));
    let mut device = backend.trainer(group, graph, &checkpoint, adapter, workload, config.memory)?;
    settings.insert(settings::ARITHMETIC.to_owned(), json!(device.name()));

    let identity = format!("{}{}", checkpoint.identity()?, model.config);
    let [reference, validation_reference] =
        references(group, device.as_mut(), &objective, &identity, [&examples, &validation])?;
    let (seen, seen_reference) =
        if validation.is_empty() { (&examples, &reference) } else { (&validation, &validation_reference) };
    let samples = Samples::take(group, device.as_mut(), &tokenizer, seen, seen_reference)?;
    for logps in [reference.all(), validation_reference.all(), Some(&samples.logps)].into_iter().flatten() {
        nonfinite::look_at_weights(&checkpoint, &logps.logps)?;
    }
    let steps = config.optimizer.steps(examples.len());
    let facts = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": folder.display().to_string(),
        "family": family,
        "package": package,
        "parameters": device.adapter().parameters(),
        "device": device.name(),
        "ranks": group.size(),
        "examples": examples.len(),
        "validation_examples": validation.len(),
        "total_steps": steps.total,
        "data": report,
        "data_line": report.line(),
    });
    agree_on(group, &settings)?;
    let mut run = Run {
        group,
        base_model: config.model.clone(),
        config,
        output,
        device,
        objective,
        examples,
        validation,
        reference,
        validation_reference,
        steps,
        settings,
        facts,
        samples,
        window: Window::default(),
        done: 0,
        skipped: 0,
    };
    match resumed {
        Some(folder) => run.resume(&folder)?,
        None => run.begin()?,
    }
    run.train()?;
    let output = finish(registry, run, &checkpoint, backend)?;
    watchers.iter().for_each(Watchers::farewell);
    drop(claim);
    Ok(output)
}

/// The packing of the run that is resumed, or that was ended before its first checkpoint and begins again in its folder.
fn packing_before(output: &Path, resumed: Option<&Path>, config: &TrainConfig) -> Result<Option<Packing>> {
    let packing: Option<Packing> = match resumed {
        Some(folder) => Some(load_state(folder)?.packing),
        // One that was cut short by a kill says nothing.
        None => data::read_json(&output.join(ARGS))
            .ok()
            .and_then(|args| serde_json::from_value(args.get(RESOLVED)?.get(PACKING)?.clone()).ok()),
    };
    match (packing, config.memory.micro_batch_tokens) {
        (Some(Packing { micro_batch_tokens: was, .. }), Some(is)) if was != is => {
            Err(Error::input(format!("is {is}; the run that is resumed has {was}"))
                .at("--micro-batch-tokens")
                .help("leave it out: other micro-batches round otherwise"))
        }
        (packing, _) => Ok(packing),
    }
}

/// The examples of a run.
struct Data {
    examples: Vec<Example>,
    validation: Vec<Example>,
    report: Report,
}

impl Data {
    fn load(
        registry: &Registry,
        config: &TrainConfig,
        wanted: &Wanted,
        model: &Model<'_>,
        tokenizer: &ChatTokenizer,
    ) -> Result<Data> {
        let load = |paths: &[String]| data::load(&config.rows(paths, &model.graph, wanted), registry, tokenizer);
        let dataset = load(&config.dataset)?;
        console::line(format!("model       {} ({})", model.folder.display(), model.family.name));
        console::line(format!("data        {}", dataset.report.line()));
        let (examples, validation) = match config.val_dataset.as_slice() {
            [] => data::split(dataset.examples, config.split_dataset_ratio, config.data.seed),
            paths => (dataset.examples, load(paths)?.examples),
        };
        warn_of_overlap(&examples, &validation);
        if examples.is_empty() {
            return Err(Error::input("the split leaves no example to train on")
                .at("--split-dataset-ratio")
                .help("lower it, or add rows"));
        }
        Ok(Data { examples, validation, report: dataset.report })
    }
}

/// Log-probs under the reference, of training and validation examples, where a loss reads them.
fn references(
    group: &mut dyn ProcessGroup,
    device: &mut dyn Device,
    objective: &Objective<'_>,
    identity: &str,
    examples: [&Vec<Example>; 2],
) -> Result<[Reference; 2]> {
    let mut references = [Reference::none(), Reference::none()];
    if objective.needs_reference() {
        for (reference, examples) in references.iter_mut().zip(examples) {
            let own = examples.len().div_ceil(group.size()) as u64;
            let bar = console::bar(own, "reference   {bar:30} {pos}/{len} examples {eta} left");
            *reference = Reference::of(group, device, identity, examples, |n| bar.inc(n as u64))?;
            bar.finish_and_clear();
        }
    }
    Ok(references)
}

fn agree_on(group: &mut dyn ProcessGroup, settings: &Map<String, Value>) -> Result<()> {
    let settings = serde_json::to_vec(settings).map_err(|e| Error::run(e.to_string()))?;
    group.assert_equal("model, data or set of flags", &settings)
}

/// What follows the last step: answers for the report, where they cost little, and what can be done with the adapter.
fn finish(registry: &Registry, run: Run<'_>, checkpoint: &Checkpoint, backend: &dyn Backend) -> Result<PathBuf> {
    let Run { group, config, output, device, examples, validation, done, .. } = run;
    let adapter = output.join("adapter_model.safetensors").display().to_string();
    console::result(format!("adapter     {adapter}"));
    // The base is what a continued adapter was before it was an adapter, not before this run.
    let from_base = matches!(config.adapter, StartAdapter::New { .. });
    if group.is_first() && from_base && before_after::are_cheap(checkpoint.bytes(), backend) {
        let adapter = device.adapter().clone();
        // A GPU may not have room for the model twice.
        drop(device);
        let examples = if validation.is_empty() { &examples } else { &validation };
        let generator = || {
            let folder = model::locate(&config.model, Need::Weights)?;
            let model = Model::open(registry, &folder, config.plugin.as_deref())?;
            Generator::open(&model, Some(adapter), backend, config.memory.limit)
        };
        let written = generator().and_then(|generator| before_after::write(generator, examples, &output));
        written.unwrap_or_else(|e| console::warning(Remark::because("the report has no answers", &e)));
    }
    let trained = config.val_dataset.is_empty();
    let rows = if trained { &config.dataset } else { &config.val_dataset };
    console::line(next_steps::commands(&output, rows, trained));
    let end = [("adapter", json!(adapter)), ("output_dir", json!(output)), ("global_step", json!(done))];
    console::event("end", &end.into_iter().map(|(name, value)| (name.to_owned(), value)).collect());
    Ok(output)
}

/// The page of the run. Where a run is started again, whether there is one is not worth the run.
fn serve(dashboard: &Dashboard, attempt: u64) -> Result<Option<Server>> {
    let address = match dashboard {
        Dashboard::Off => return Ok(None),
        Dashboard::Usual => None,
        Dashboard::At(address) => Some(address.as_str()),
    };
    match Server::bind(address, "--dashboard") {
        Err(e) if attempt > 0 => {
            console::warning(Remark::because("no dashboard", &e));
            Ok(None)
        }
        server => server.map(Some),
    }
}

fn starting_adapter(model: &Model<'_>, config: &TrainConfig) -> Result<Adapter> {
    match &config.adapter {
        StartAdapter::New { rank, alpha, rslora, targets } => {
            let lora = AdapterConfig { rank: *rank, alpha: *alpha, rslora: *rslora, targets: targets.clone() };
            Adapter::new(&model.graph, lora, config.data.seed).map_err(|e| e.at("--target-modules"))
        }
        StartAdapter::From { folder, rank, alpha } => {
            let own = read_config(folder)?;
            let differs = [
                ("--lora-rank", rank.is_some_and(|r| r != own.rank)),
                ("--lora-alpha", alpha.is_some_and(|a| a != own.alpha)),
            ];
            match differs.iter().find(|(_, differs)| *differs) {
                Some((flag, _)) => {
                    let (rank, alpha) = (own.rank, own.alpha);
                    let what = format!(
                        "differs from the adapter in {}, which has rank {rank} and alpha {alpha}",
                        folder.display()
                    );
                    Err(Error::input(what).at(flag).help("leave it out: a run from an adapter keeps its shape"))
                }
                None => Adapter::load(&model.graph, folder),
            }
        }
    }
}

/// An evaluation of examples that are trained on says that a model learns, not what it learned.
fn warn_of_overlap(examples: &[Example], validation: &[Example]) {
    let trained: HashSet<Vec<u8>> = examples.iter().map(Example::content).collect();
    let shared = validation.iter().filter(|e| trained.contains(&e.content())).count();
    if shared > 0 {
        let what = format!("{shared} of {} validation examples are trained on as well", validation.len());
        console::warning(
            Remark::from(what)
                .help("evaluate on other rows, or hold some out from training with --split-dataset-ratio 0.1"),
        );
    }
}
