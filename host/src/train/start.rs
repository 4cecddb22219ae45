//! The start of a run: from options to everything that the loop works on, on one device or as one of several ranks.

use std::collections::HashSet;
use std::path::PathBuf;

use serde_json::json;

use super::checkpoint::load_state;
use super::folders::{Folders, folders};
use super::meaning::{choose_device, demo_or_given, note_ignored, refuse_unsupported};
use super::metrics::Window;
use super::optimizer::AdamW;
use super::options::TrainOptions;
use super::run::Run;
use super::samples::Samples;
use super::{Objective, Reference, answers, next, settings};
use crate::console;
use crate::data::{self, ChatTokenizer};
use crate::device;
use crate::error::{Error, Result};
use crate::example::Example;
use crate::generate::Generator;
use crate::hub::Need;
use crate::lora::{Adapter, AdapterConfig, Targets, read_config};
use crate::model::{self, Model};
use crate::page::{Runs, Server, Watchers};
use crate::plugins::Registry;
use crate::ranks::{self, Place, Ranks};
use crate::weights::Checkpoint;

/// Trains, as one of the ranks that the environment names, or alone, or by starting ranks; returns the folder with the
/// result.
pub fn run(registry: &Registry, mut options: TrainOptions) -> Result<PathBuf> {
    refuse_unsupported(&options)?;
    let Some(place) = Place::from_environment()? else {
        note_ignored(&options);
        return if options.gpus > 1 {
            launch(registry, &mut options)
        } else {
            train(registry, options, &mut Ranks::alone(), None)
        };
    };
    if place.launched {
        ranks::end_with_launcher();
    } else {
        note_ignored(&options);
        if options.gpus != 1 && ![Some(place.size), place.local_size].contains(&Some(options.gpus)) {
            let (gpus, size) = (options.gpus, place.size);
            return Err(Error::input(format!("{gpus} devices, but a launcher has started {size} ranks"))
                .at("--gpus")
                .help("leave it out: each rank has one device"));
        }
    }
    let mut ranks = Ranks::join(&place, options.patience()?)?;
    console::line(format!("ranks       {}{}", place.size, if place.exposed() { GUESSABLE } else { "" }));
    let result = train(registry, options, &mut ranks, Some(&place));
    ranks.end(result)
}

const GUESSABLE: &str = "; on a network with strangers, set DPO_HOST_SECRET to the same random text for every rank";

/// Starts ranks on this machine. What can be checked beforehand is, so that it is said once.
fn launch(registry: &Registry, options: &mut TrainOptions) -> Result<PathBuf> {
    let given = demo_or_given(options)?;
    let gpus = (0..options.gpus).map(|rank| choose_device(options, Some(rank))).collect::<Result<Vec<_>>>()?;
    if gpus.iter().all(Option::is_none) {
        let count = options.gpus;
        console::note(format!("--gpus {count} on the CPU: {count} processes, which share its cores and memory"));
    }
    Objective::new(registry, &options.loss.objective()?)?;
    let folder = model::locate(&given, Need::Weights)?;
    Model::open(registry, &folder, options.plugin.as_deref())?;
    let output = match &options.output_dir {
        // Rank 0 looks for the checkpoint and says what it finds.
        Some(output) if options.resume_from_checkpoint.is_some() => output.clone(),
        _ => folders(options, &folder, 0)?.output,
    };
    ranks::launch(options.gpus, &["--output-dir".into(), output.clone().into()], options.max_restarts)?;
    Ok(output)
}

/// Trains as one of some ranks.
fn train(registry: &Registry, mut options: TrainOptions, ranks: &mut Ranks, place: Option<&Place>) -> Result<PathBuf> {
    let given = demo_or_given(&mut options)?;
    let gpu = choose_device(&options, place.map(|p| p.local_rank))?;
    let objective = Objective::new(registry, &options.loss.objective()?)?;
    let folder = model::locate(&given, Need::Weights)?;
    let model = Model::open(registry, &folder, options.plugin.as_deref())?;
    let attempt = ranks.most(place.map_or(0, |p| p.attempt))?;
    let mut server = None;
    let Folders { output, resumed } = ranks.first(|| {
        server = dashboard(&options, attempt)?;
        folders(&options, &folder, attempt)
    })?;
    let watchers = server.map(|server| {
        console::line(format!("dashboard   {}", server.url()));
        server.serve_beside(Runs::one(&output))
    });
    let adapter = starting_adapter(&model, &options)?;

    let tokenizer = ChatTokenizer::open(&folder, model.family.chat_template.as_deref())?;
    let wanted = objective.wanted()?;
    let rows = |paths: &[String]| options.data.options(paths, model.graph.max_positions, &wanted);
    let dataset = data::load(&rows(&options.data.dataset)?, registry, &tokenizer)?;
    refuse_foreign_tokens(&dataset.examples, model.graph.vocab_size)?;
    console::line(format!("model       {} ({})", folder.display(), model.family.name));
    console::line(format!("data        {}", dataset.report.line()));
    let (examples, validation) = match options.val_dataset.as_slice() {
        [] => data::split(dataset.examples, options.split_dataset_ratio, options.data.seed),
        paths => (dataset.examples, data::load(&rows(paths)?, registry, &tokenizer)?.examples),
    };
    warn_of_shared(&examples, &validation);
    if examples.is_empty() {
        return Err(Error::input("the split leaves no example to train on")
            .at("--split-dataset-ratio")
            .help("lower it, or add rows"));
    }

    let checkpoint = Checkpoint::open(&folder)?;
    checkpoint.refuse_extra(&model.graph)?;
    let identity = format!("{}{}", checkpoint.identity()?, model.config);
    console::line(format!("adapter     {} parameters at {} linears", adapter.params.len(), adapter.sites.len()));
    let all = examples.iter().chain(&validation);
    let content = format!("{}{}", checkpoint.content()?, model.config);
    let mut settings = settings::decisive(&options, &content, &adapter, &examples);
    if let Some(folder) = &resumed {
        // Before weights are loaded and references computed.
        settings::refuse_other(&load_state(folder)?.settings, &settings, folder)?;
    }
    let mut device = device::open(ranks, gpu, model.graph, &checkpoint, adapter, all, options.wishes(gpu, place)?)?;

    let mut references = [Reference::none(), Reference::none()];
    if objective.needs_reference() {
        for (reference, examples) in references.iter_mut().zip([&examples, &validation]) {
            let own = examples.len().div_ceil(ranks.size()) as u64;
            let bar = console::bar(own, "reference   {bar:30} {pos}/{len} examples {eta} left");
            *reference = Reference::of(ranks, device.as_mut(), &identity, examples, |n| bar.inc(n as u64))?;
            bar.finish_and_clear();
        }
    }
    let [reference, validation_reference] = references;
    let (seen, seen_reference) =
        if validation.is_empty() { (&examples, &reference) } else { (&validation, &validation_reference) };
    let samples = Samples::take(ranks, device.as_mut(), &tokenizer, seen, seen_reference)?;

    let per_epoch = examples.len().div_ceil(options.batch_size) as u64;
    let total = options.max_steps.unwrap_or((options.num_epochs * per_epoch as f64).ceil() as u64);
    let warmup = options.warmup_steps.unwrap_or((options.warmup_ratio * total as f64).ceil() as u64);
    settings.insert(settings::ARITHMETIC.to_owned(), json!(device.name()));
    let facts = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": folder.display().to_string(),
        "family": model.family.name,
        "parameters": device.adapter().params.len(),
        "device": device.name(),
        "ranks": ranks.size(),
        "examples": examples.len(),
        "validation_examples": validation.len(),
        "total_steps": total,
        "data": dataset.report,
        "data_line": dataset.report.line(),
    });
    let all_settings = serde_json::to_vec(&settings).map_err(|e| Error::run(e.to_string()))?;
    ranks.same("model, data or set of flags", &all_settings)?;
    let mut run = Run {
        ranks,
        optimizer: AdamW {
            beta1: options.adam_beta1,
            beta2: options.adam_beta2,
            eps: options.adam_epsilon,
            weight_decay: options.weight_decay,
        },
        base_model: given,
        examples,
        validation,
        reference,
        validation_reference,
        per_epoch,
        total,
        warmup,
        settings,
        facts,
        samples,
        window: Window::default(),
        done: 0,
        skipped: 0,
        objective,
        device,
        output,
        options,
    };
    match resumed {
        Some(folder) => run.resume(&folder)?,
        None => run.begin()?,
    }
    run.train()?;
    let adapter = run.output.join("adapter_model.safetensors").display().to_string();
    console::result(format!("adapter     {adapter}"));
    let Run { ranks, options, output, device, examples, validation, done, .. } = run;
    // The base is what a continued adapter was before it was an adapter, not before this run.
    if ranks.is_first() && options.init_adapter.is_none() && answers::are_cheap(checkpoint.bytes(), gpu) {
        let adapter = device.adapter().clone();
        // A GPU may not have room for the model twice.
        drop(device);
        let examples = if validation.is_empty() { &examples } else { &validation };
        let written = Model::open(registry, &folder, options.plugin.as_deref())
            .and_then(|model| Generator::open(&model, Some(adapter), gpu, options.memory()?))
            .and_then(|generator| answers::write(generator, examples, &output));
        written.unwrap_or_else(|e| console::warning(format!("the report has no answers: {e}")));
    }
    let trained = options.val_dataset.is_empty();
    let rows = if trained { &options.data.dataset } else { &options.val_dataset };
    console::line(next::commands(&output, rows, trained));
    let end = [("adapter", json!(adapter)), ("output_dir", json!(output)), ("global_step", json!(done))];
    console::event("end", &end.into_iter().map(|(name, value)| (name.to_owned(), value)).collect());
    watchers.iter().for_each(Watchers::farewell);
    Ok(output)
}

/// The page that `--dashboard` asks for. Where a run is started again, whether there is one is not worth the run.
fn dashboard(options: &TrainOptions, attempt: u64) -> Result<Option<Server>> {
    let Some(address) = options.dashboard.as_deref().filter(|a| *a != "false") else { return Ok(None) };
    match Server::bind(Some(address).filter(|a| *a != "true"), "--dashboard") {
        Err(e) if attempt > 0 => {
            console::warning(format!("no dashboard: {e}"));
            Ok(None)
        }
        server => server.map(Some),
    }
}

fn starting_adapter(model: &Model<'_>, options: &TrainOptions) -> Result<Adapter> {
    let Some(folder) = &options.init_adapter else {
        let targets = match options.target_modules.as_slice() {
            [] => Targets::AllLinear,
            names => Targets::parse(names)?,
        };
        let (rank, alpha) = (options.lora_rank.unwrap_or(8), options.lora_alpha.unwrap_or(32.0));
        if rank == 0 {
            return Err(Error::input("should be above 0").at("--lora-rank").help("8 to 64 is usual"));
        }
        let config = AdapterConfig { rank, alpha, rslora: options.use_rslora, targets };
        return Adapter::new(&model.graph, config, options.data.seed).map_err(|e| e.at("--target-modules"));
    };
    let config = read_config(folder)?;
    let differs = [
        ("--lora-rank", options.lora_rank.is_some_and(|r| r != config.rank)),
        ("--lora-alpha", options.lora_alpha.is_some_and(|a| a != config.alpha)),
    ];
    match differs.iter().find(|(_, differs)| *differs) {
        Some((flag, _)) => {
            let (rank, alpha) = (config.rank, config.alpha);
            let what =
                format!("differs from the adapter in {}, which has rank {rank} and alpha {alpha}", folder.display());
            Err(Error::input(what).at(flag).help("leave it out: a run from an adapter keeps its shape"))
        }
        None => Adapter::load(&model.graph, folder),
    }
}

/// An evaluation of examples that are trained on says that a model learns, not what it learned.
fn warn_of_shared(examples: &[Example], validation: &[Example]) {
    let trained: HashSet<Vec<u8>> = examples.iter().map(Example::content).collect();
    let shared = validation.iter().filter(|e| trained.contains(&e.content())).count();
    if shared > 0 {
        console::warning(format!(
            "{shared} of {} validation examples are trained on as well\n  help: evaluate on other rows, or keep some from \
             training with --split-dataset-ratio 0.1",
            validation.len()
        ));
    }
}

/// A token id beyond the projection would read other memory's row.
fn refuse_foreign_tokens(examples: &[Example], vocab: usize) -> Result<()> {
    let most = |e: &Example| e.parts().flatten().copied().max().unwrap_or(0);
    match examples.iter().find(|e| most(e) as usize >= vocab) {
        Some(e) => Err(Error::input(format!("token id {} is beyond the model's vocabulary of {vocab}", most(e)))
            .at(&e.place)
            .help("the tokenizer is not this model's")),
        None => Ok(()),
    }
}
