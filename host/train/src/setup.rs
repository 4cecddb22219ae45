//! The start of a run: from settings to everything that the loop works on, step by step, and what follows the last step.

use std::path::{Path, PathBuf};

use dpo_core::aux_loss::AuxLoss;
use dpo_core::backend::{Backend, Workload};
use dpo_core::collective::ProcessGroup;
use dpo_core::console::{self, Remark};
use dpo_core::decoder::Sequences;
use dpo_core::device::Device;
use dpo_core::error::{Error, Result};
use dpo_core::files;
use dpo_core::lora::{Adapter, read_config};
use dpo_core::memory::size;
use dpo_core::plan::{MemoryOptions, Packing};
use dpo_core::storage::Quantization;
use dpo_core::weights::Checkpoint;
use dpo_data::{self as data, ChatTokenizer, Examples};
use dpo_generate::Generator;
use dpo_hub::Need;
use dpo_hub::model::{self, Model};
use dpo_page::{ARGS, Runs, Server, Watchers};
use dpo_plugin_api::graph::ModelGraph;
use dpo_plugins::Registry;
use serde_json::{Map, Value, json};

use crate::checkpoint::load_state;
use crate::config::{Dashboard, OutputConfig, PACKING, RESOLVED, StartAdapter, Steps, TrainConfig};
use crate::data::Data;
use crate::evaluation::{Best, Metric};
use crate::metrics::Window;
use crate::objective::Objective;
use crate::own_reference::OwnReference;
use crate::reference::Reference;
use crate::run::Run;
use crate::run_dir::RunDir;
use crate::samples::Samples;
use crate::{before_after, next_steps, nonfinite, settings, trackers};

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
    // What can be told without weights is told before the first of them is fetched or read.
    let objective = Objective::new(registry, &config.objective)?;
    let folder = model::locate(&config.model, Need::WeightsToCome)?;
    let model = Model::open(registry, &folder, &config.reading)?;
    model.warn();
    model.memory(config.memory)?;
    let attempt = group.all_reduce_max(attempt)?;
    let mut server = None;
    let mut claim = None;
    let RunDir { output, resumed } = group.broadcast_from_first(|| {
        trackers::check(&config.output.report)?;
        server = serve(&config.dashboard, attempt)?;
        let (folder, claimed) = RunDir::claim(&config.output, (&config.model, &folder), attempt)?;
        claim = Some(claimed);
        Ok(folder)
    })?;
    if config.output.version {
        // What args.json says is where the run is, not where its folder was made.
        config.flags.insert("output_dir".into(), json!(output));
        config.flags.insert("add_version".into(), json!(false));
    }
    let watchers = server.map(|server| {
        console::line(format!("dashboard   {}", server.url()));
        server.serve_beside(Runs::one(&output))
    });
    let checkpoint = checkpoint_if_here(&config.model, &folder, &model.graph)?;
    let adapter = starting_adapter(&model, &config)?;
    let tokenizer = ChatTokenizer::open(&folder, model.family.chat_template.as_deref())?;
    let wanted = objective.wanted()?;
    let Data { examples, mut validation, report } = Data::load(registry, &config, &wanted, &model, &tokenizer, group)?;
    let metric = Metric::of(&config.evaluation, &validation)?;
    let steps = config.optimizer.steps(examples.len());
    say_length(&config, examples.len(), &steps);
    console::line(format!("adapter     {} parameters at {}", adapter.parameters(), adapter.places()));
    if let Some(experts) = adapter.frozen_experts(&model.graph) {
        console::line(format!("            experts stay frozen; --target-parameters {experts} adapts them"));
    }
    let mut settings = settings::decisive(&config.flags, &model.graph, &objective, &adapter, &examples)?;
    if let Some(folder) = &resumed {
        settings::refuse_other(&load_state(folder)?, &settings, steps, folder)?;
    }
    if group.is_first() {
        room_for_checkpoints(&output, &adapter, &config.output, steps)?;
    }
    config.memory.packing = group.broadcast_from_first(|| packing_before(&output, resumed.as_deref(), &config))?;
    let everything: Vec<&Examples> =
        std::iter::once(&examples).chain(validation.iter().map(|set| &set.examples)).collect();
    let ends = AuxLoss::of(&model.graph).is_some();
    let mut workload = Workload::default();
    for example in everything.iter().flat_map(|set| set.iter()) {
        workload.add(&example?, ends);
    }
    let mut planned = backend.plan(group, model.graph.clone(), adapter, workload, model.memory(config.memory)?)?;
    let memory = MemoryOptions { packing: Some(planned.packing()), ..config.memory };
    let own_reference = match &config.reference {
        Some(_) if !objective.needs_reference() => {
            console::note("the loss reads no reference: --ref-model and --ref-adapter change nothing");
            None
        }
        Some(reference) => Some(OwnReference::plan(
            registry,
            reference,
            (&config.model, &model, &tokenizer),
            (group, backend),
            &everything,
            (workload, memory),
        )?),
        None => None,
    };

    // From here on there are weights.
    let folder = same_folder(folder, model::locate(&config.model, Need::Weights)?)?;
    let checkpoint = checkpoint.map_or_else(|| Checkpoint::of(&folder, &model.graph), Ok)?;
    let content = format!("{}{}", checkpoint.content()?, model.config);
    let sets = || std::iter::once(&examples).chain(validation.iter().map(|set| &set.examples));
    let mut own = match own_reference {
        Some(reference) => Some(reference.log_probs(group, sets())?),
        None => None,
    };
    settings::add_models(&mut settings, &content, own.as_ref().map(|own| own.content.as_str()));
    if let Some(folder) = &resumed {
        settings::refuse_other(&load_state(folder)?, &settings, steps, folder)?;
    }
    let (family, package) = (model.family.name.clone(), model.family.package());
    if matches!(config.adapter, StartAdapter::New(_)) && planned.adapter().starts_from_weights() {
        start_from_weights(
            planned.adapter(),
            group,
            (&model.graph, &checkpoint, config.memory.quantization),
            resumed.as_deref(),
            config.data.seed,
        )?;
    }
    let mut device = planned.load(group, &checkpoint)?;
    settings.insert(settings::ARITHMETIC.to_owned(), json!(device.name()));

    // Where ends of answers are laid out, sums are rounded otherwise.
    let layout = if ends { "with ends" } else { "" };
    let identity = format!("{}{}{:?}{layout}", checkpoint.identity()?, model.config, config.memory.quantization);
    let mut references = match &mut own {
        Some(own) => std::mem::take(&mut own.references),
        None => references(group, device.as_mut(), &objective, &identity, sets())?,
    }
    .into_iter();
    let reference = references.next().unwrap_or_else(Reference::none);
    validation.iter_mut().zip(references).for_each(|(set, reference)| set.reference = reference);
    let (seen, seen_reference) = match validation.first() {
        Some(set) => (&set.examples, &set.reference),
        None => (&examples, &reference),
    };
    // What a reference of its own thinks is not what the model thinks at the start.
    let none = Reference::none();
    let start = if own.is_some() { &none } else { seen_reference };
    let samples = Samples::take(group, device.as_mut(), &tokenizer, seen, start)?;
    let known = std::iter::once(&reference).chain(validation.iter().map(|set| &set.reference));
    for logps in known.map(Reference::all).chain([Some(&samples.logps)]).flatten() {
        nonfinite::look_at_weights(&checkpoint, &logps.logps)?;
    }
    let facts = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": config.model,
        "family": family,
        "package": package,
        "parameters": device.adapter().parameters(),
        "device": device.name(),
        "ranks": group.size(),
        "examples": examples.len(),
        "validation_examples": validation.iter().map(|set| set.examples.len()).sum::<usize>(),
        "total_steps": steps.total,
        "warmup_steps": steps.warmup,
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
        steps,
        settings,
        facts,
        samples,
        metric,
        best: Best::default(),
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

/// The checkpoint of a graph, where its weights are here already.
fn checkpoint_if_here(model: &str, folder: &Path, graph: &ModelGraph) -> Result<Option<Checkpoint>> {
    let here = Path::new(model).is_dir() || dpo_hub::has_weights(folder);
    here.then(|| Checkpoint::of(folder, graph)).transpose()
}

/// The folder of the weights, which is that of the config: a hub may have another commit by now.
fn same_folder(of_config: PathBuf, of_weights: PathBuf) -> Result<PathBuf> {
    match of_config == of_weights {
        true => Ok(of_config),
        false => Err(Error::run("the model was changed on the hub a moment ago").help("run it again")),
    }
}

/// Says how long the run is, and warns where it is too short to change anything.
fn say_length(config: &TrainConfig, examples: usize, steps: &Steps) {
    let Steps { per_epoch, total, warmup } = *steps;
    let batch = config.optimizer.batch_size;
    let warmup = if warmup > 0 { format!(", {warmup} of them warm-up") } else { String::new() };
    console::line(format!("steps       {total}, {per_epoch} an epoch of {batch} examples each{warmup}"));
    if total < FEW_STEPS && config.optimizer.max_steps.is_none() {
        let steps = if total == 1 { "1 step changes" } else { &format!("{total} steps change") };
        let what = format!("{steps} little: {examples} examples make {per_epoch} an epoch");
        console::warning(
            Remark::from(what).help("raise --num-epochs, lower --batch-size, or add rows: 50 steps and more are usual"),
        );
    }
}

/// So few steps change nothing that could be seen.
const FEW_STEPS: u64 = 10;

/// Whether the disk has room for what the run saves.
fn room_for_checkpoints(output: &Path, adapter: &Adapter, config: &OutputConfig, steps: Steps) -> Result<()> {
    // The adapter, and in a checkpoint beside it the two moments.
    let (one, saved) = (adapter.parameters() * 12, steps.total.div_ceil(config.save_steps.max(1)) as usize);
    let kept = config.save_total_limit.map_or(saved, |limit| limit.min(saved)).max(1);
    let Some(free) = files::free_space(output).map(|free| free as usize) else { return Ok(()) };
    if free < one {
        return Err(Error::input(format!("a checkpoint takes {}, of the disk {} are free", size(one), size(free)))
            .at(output.display())
            .help("make room, name a folder on another disk, or lower --lora-rank"));
    }
    if free < one.saturating_mul(kept) {
        let (all, one, free) = (size(one.saturating_mul(kept)), size(one), size(free));
        let what = format!("{kept} checkpoints of {one} take {all}; the disk of {} has {free} free", output.display());
        console::warning(Remark::from(what).help("keep fewer: --save-total-limit 2, or raise --save-steps"));
    }
    Ok(())
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

/// Log-probs of each set of examples under the adapter of the start, where a loss reads them.
fn references<'a>(
    group: &mut dyn ProcessGroup,
    device: &mut dyn Device,
    objective: &Objective<'_>,
    identity: &str,
    sets: impl Iterator<Item = &'a Examples>,
) -> Result<Vec<Reference>> {
    if !objective.needs_reference() {
        return Ok(sets.map(|_| Reference::none()).collect());
    }
    sets.map(|examples| Reference::of(group, device, identity, examples)).collect()
}

fn agree_on(group: &mut dyn ProcessGroup, settings: &Map<String, Value>) -> Result<()> {
    let settings = serde_json::to_vec(settings).map_err(|e| Error::run(e.to_string()))?;
    group.assert_equal("model, data or set of flags", &settings)
}

/// What follows the last step: answers for the report, where they cost little, and what can be done with the adapter.
fn finish(registry: &Registry, run: Run<'_>, checkpoint: &Checkpoint, backend: &dyn Backend) -> Result<PathBuf> {
    let Run { group, config, output, device, examples, validation, done, best, .. } = run;
    let adapter = output.join("adapter_model.safetensors").display().to_string();
    console::result(format!("adapter     {adapter}"));
    // The base is what a continued adapter was before it was an adapter, not before this run.
    let from_base = matches!(config.adapter, StartAdapter::New(_));
    if group.is_first() && from_base && before_after::are_cheap(checkpoint.bytes(), backend) {
        let adapter = device.adapter().clone();
        // A GPU may not have room for the model twice.
        drop(device);
        let examples = validation.first().map_or(&examples, |set| &set.examples);
        let generator = || {
            let folder = model::locate(&config.model, Need::Weights)?;
            let model = Model::open(registry, &folder, &config.reading)?;
            Generator::open(&model, vec![adapter], backend, Sequences::of(1), config.memory)
        };
        let written = generator().and_then(|generator| before_after::write(generator, examples, &output));
        written.unwrap_or_else(|e| console::warning(Remark::because("the report has no answers", &e)));
    }
    let trained = config.val_dataset.is_empty();
    let held_out: Vec<String> = config.val_dataset.iter().flat_map(|set| set.paths.clone()).collect();
    let rows = if trained { &config.dataset } else { &held_out };
    console::line(next_steps::commands(
        &output,
        rows,
        trained,
        &config.plugin_dirs,
        &config.reading.ignored_keys,
        config.memory.quantization,
    ));
    let best = best.found.map(|(step, value)| json!({"global_step": step, "value": value}));
    let end = [
        ("adapter", json!(adapter)),
        ("output_dir", json!(output)),
        ("global_step", json!(done)),
        ("best_evaluation", json!(best)),
    ];
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
        StartAdapter::New(lora) => Adapter::new(&model.graph, lora.as_ref().clone(), config.data.seed),
        StartAdapter::From { folder, rank, alpha, dropout } => {
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
                None => {
                    let mut adapter = Adapter::load(&model.graph, folder)?;
                    adapter.config.dropout = *dropout;
                    Ok(adapter)
                }
            }
        }
    }
}

/// Gives an adapter that begins with the weights its numbers: those that rank 0 finds. Factors of the weights, whose last bits depend on
/// the machine, are those that a resumed run has begun with.
fn start_from_weights(
    adapter: &mut Adapter,
    group: &mut dyn ProcessGroup,
    (graph, checkpoint, quantization): (&ModelGraph, &Checkpoint, Option<Quantization>),
    resumed: Option<&Path>,
    seed: u64,
) -> Result<()> {
    let mut found = Vec::new();
    if group.is_first() {
        if let Some(folder) = resumed.filter(|_| adapter.config.init.subtracts()) {
            [adapter.params, adapter.subtracted] = adapter.read(folder)?;
        } else {
            let bar = console::bar(adapter.sites.len() as u64, "adapter     {bar:30} {pos}/{len} linears {eta} left");
            adapter.start(graph, (checkpoint, quantization), seed, || bar.inc(1))?;
            bar.finish_and_clear();
        }
        found = adapter.params.iter().chain(&adapter.subtracted).flat_map(|v| v.to_le_bytes()).collect();
    }
    let found = group.broadcast(found)?;
    let values = found.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let parameters = adapter.parameters();
    adapter.params = values.clone().take(parameters).collect();
    adapter.subtracted = values.skip(parameters).collect();
    if adapter.config.init.subtracts() {
        // The reference of a resumed run is what it was: that of an update of zero. The parameters follow.
        adapter.params.clone_from(&adapter.subtracted);
    }
    Ok(())
}
