//! The run: everything from options to a trained adapter.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::checkpoint::{self, State};
use super::doctor::Doctor;
use super::interrupt::Interrupt;
use super::log::Log;
use super::metrics::Window;
use super::optimizer::{AdamW, Moments, clip};
use super::options::{Dtype, Quantization, TrainOptions};
use super::samples::Samples;
use super::{Objective, ObjectiveOptions, Reference, Scores, Step, answers, next, settings, step, unsound};
use crate::data::{self, ChatTokenizer, TokenPair};
use crate::device::{self, Device};
use crate::error::{Error, Result};
use crate::hub::Need;
use crate::lora::{Adapter, AdapterConfig, Targets, read_config};
use crate::model::{self, Model};
use crate::page::{self, Runs, Server, Watchers};
use crate::plan::{Wishes, free_memory, parse_size};
use crate::plugins::Registry;
use crate::ranks::{self, Patience, Place, Ranks};
use crate::weights::Checkpoint;
use crate::{console, demo, files};

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
    Objective::new(registry, &options.objective()?)?;
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
    let objective_options = options.objective()?;
    let objective = Objective::new(registry, &objective_options)?;
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
    let rows = |paths: &[String]| options.data.options(paths, model.graph.max_positions);
    let dataset = data::load(&rows(&options.data.dataset)?, registry, &tokenizer)?;
    refuse_foreign_tokens(&dataset.pairs, model.graph.vocab_size)?;
    console::line(format!("model       {} ({})", folder.display(), model.family.name));
    console::line(format!("data        {}", dataset.report.line()));
    let (pairs, validation) = match options.val_dataset.as_slice() {
        [] => data::split(dataset.pairs, options.split_dataset_ratio, options.data.seed),
        paths => (dataset.pairs, data::load(&rows(paths)?, registry, &tokenizer)?.pairs),
    };
    warn_of_shared(&pairs, &validation);
    if pairs.is_empty() {
        return Err(Error::input("the split leaves no pair to train on")
            .at("--split-dataset-ratio")
            .help("lower it, or add rows"));
    }

    let checkpoint = Checkpoint::open(&folder)?;
    checkpoint.refuse_extra(&model.graph)?;
    let identity = format!("{}{}", checkpoint.identity()?, model.config);
    console::line(format!("adapter     {} parameters at {} linears", adapter.params.len(), adapter.sites.len()));
    let all = pairs.iter().chain(&validation);
    let mut device = device::open(ranks, gpu, model.graph, &checkpoint, adapter, all, options.wishes(gpu, place)?)?;

    let mut references = [Reference::none(), Reference::none()];
    if objective.needs_reference() {
        for (reference, pairs) in references.iter_mut().zip([&pairs, &validation]) {
            let own = pairs.len().div_ceil(ranks.size()) as u64;
            let bar = console::bar(own, "reference   {bar:30} {pos}/{len} pairs {eta} left");
            *reference = Reference::of(ranks, device.as_mut(), &identity, pairs, |n| bar.inc(n as u64))?;
            bar.finish_and_clear();
        }
    }
    let [reference, validation_reference] = references;
    let (seen, seen_reference) =
        if validation.is_empty() { (&pairs, &reference) } else { (&validation, &validation_reference) };
    let samples = Samples::take(ranks, device.as_mut(), &tokenizer, seen, seen_reference)?;

    let per_epoch = pairs.len().div_ceil(options.batch_size) as u64;
    let total = options.max_steps.unwrap_or((options.num_epochs * per_epoch as f64).ceil() as u64);
    let warmup = options.warmup_steps.unwrap_or((options.warmup_ratio * total as f64).ceil() as u64);
    let content = format!("{}{}", checkpoint.content()?, model.config);
    let settings = settings::decisive(&options, &content, device.as_ref(), &pairs);
    let facts = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": folder.display().to_string(),
        "family": model.family.name,
        "parameters": device.adapter().params.len(),
        "device": device.name(),
        "ranks": ranks.size(),
        "pairs": pairs.len(),
        "validation_pairs": validation.len(),
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
        pairs,
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
    let Run { options, output, .. } = &run;
    // The base is what a continued adapter was before it was an adapter, not before this run.
    let alone = gpu.is_none() && run.ranks.size() == 1 && options.init_adapter.is_none();
    if alone && answers::are_cheap(checkpoint.bytes()) {
        let pairs = if run.validation.is_empty() { &run.pairs } else { &run.validation };
        let written = Model::open(registry, &folder, options.plugin.as_deref())
            .and_then(|model| answers::write(&model, run.device.adapter().clone(), pairs, output));
        written.unwrap_or_else(|e| console::warning(format!("the report has no answers: {e}")));
    }
    let rows = if options.val_dataset.is_empty() { &options.data.dataset } else { &options.val_dataset };
    console::line(next::commands(output, rows));
    let end = [("adapter", json!(adapter)), ("output_dir", json!(output)), ("global_step", json!(run.done))];
    console::event("end", &end.into_iter().map(|(name, value)| (name.to_owned(), value)).collect());
    watchers.iter().for_each(Watchers::farewell);
    Ok(run.output)
}

/// A run in progress.
struct Run<'r> {
    ranks: &'r mut Ranks,
    options: TrainOptions,
    output: PathBuf,
    base_model: String,
    device: Box<dyn Device>,
    objective: Objective<'r>,
    optimizer: AdamW,
    pairs: Vec<TokenPair>,
    validation: Vec<TokenPair>,
    reference: Reference,
    validation_reference: Reference,
    /// Steps an epoch, in all, and of warm-up.
    per_epoch: u64,
    total: u64,
    warmup: u64,
    settings: Map<String, Value>,
    /// What is known before the first step, for those who look at the run.
    facts: Value,
    samples: Samples,
    window: Window,
    /// Steps taken.
    done: u64,
    /// The last of them that were skipped, one after the other.
    skipped: u64,
}

impl Run<'_> {
    fn begin(&self) -> Result<()> {
        if !self.ranks.is_first() {
            return Ok(());
        }
        let args = serde_json::to_string_pretty(&self.options).map_err(|e| Error::run(e.to_string()))?;
        files::write(&self.output.join("args.json"), args.as_bytes())
    }

    fn resume(&mut self, folder: &Path) -> Result<()> {
        let state = checkpoint::load_state(folder)?;
        settings::refuse_other(&state.settings, &self.settings, folder)?;
        let adapter = Adapter::load(self.device.graph(), folder)?;
        let moments = checkpoint::load_moments(folder, adapter.params.len(), state.updates)?;
        self.ranks.same("checkpoint", &digest(&adapter.params, &moments))?;
        self.device.restore(&adapter.params, moments)?;
        (self.done, self.skipped, self.window) = (state.global_step, state.skipped, state.window);
        self.objective.restore(state.losses);
        Ok(())
    }

    fn train(&mut self) -> Result<()> {
        // Rank 0 alone writes; the others wait for it where they next need it.
        let mut doctor = Doctor::default();
        let mut log = match self.ranks.is_first() {
            true => {
                checkpoint::remove_leftovers(&self.output);
                files::write(&self.output.join(page::FACTS), self.facts.to_string().as_bytes())?;
                let (log, before) = Log::open(&self.output, self.done, self.samples.start())?;
                before.iter().for_each(|line| drop(doctor.look(line, false)));
                Some(log)
            }
            false => None,
        };
        let interrupt = Interrupt::listen()?;
        let bar = console::bar(self.total, "{pos}/{len} {bar:6} {eta} left  {wide_msg}");
        let warn = |what: &str| bar.suspend(|| console::warning(what));
        bar.set_position(self.done);
        // What was taken before says nothing of the time that is left.
        bar.reset_eta();
        if self.done >= self.total {
            console::note(format!(
                "all {} steps are taken already; a run that begins anew has a folder of its own",
                self.total
            ));
        }
        let start = Instant::now();
        let mut line_start = Instant::now();
        let eval_steps = self.options.eval_steps.unwrap_or(self.options.save_steps);
        while self.done < self.total {
            let learning_rate = self.learning_rate();
            let losses = self.objective.states();
            let (step, tokens) = self.gradient()?;
            let norm = self.device.gradient_norm()?;
            let sound = step.loss.is_finite() && norm.is_finite();
            if sound {
                let clip = clip(norm, self.options.max_grad_norm);
                self.device.update(&self.optimizer, clip, learning_rate)?;
                self.window.add(step.loss, step.sums, tokens);
                self.skipped = 0;
            } else {
                self.objective.restore(losses);
                let what = self.skip(&step, norm).inspect_err(|_| bar.finish_and_clear())?;
                warn(&what);
                log.iter_mut().for_each(|log| log.remark(self.done + 1, "warning", &what));
            }
            self.done += 1;
            bar.inc(1);
            let last = self.done == self.total;
            if self.done == 1 || self.done.is_multiple_of(self.options.logging_steps.max(1)) || last {
                if let Some(log) = &mut log {
                    let mut line = self.line(norm, learning_rate);
                    let seconds = line_start.elapsed().as_secs_f64().max(1e-9);
                    line.insert("tokens_per_second".into(), json!(self.window.tokens / seconds));
                    line.insert("memory_gib".into(), json!(self.device.memory_gib()));
                    line.insert("elapsed_s".into(), json!(start.elapsed().as_secs_f64()));
                    log.write(&line, warn);
                    show(&bar, &line);
                    for what in doctor.look(&line, last) {
                        warn(&what);
                        log.remark(self.done, "doctor", &what);
                    }
                }
                self.window = Window::default();
                line_start = Instant::now();
            }
            if self.done.is_multiple_of(eval_steps.max(1)) || last {
                let (line, scores) = self.evaluate()?;
                if let Some(log) = &mut log {
                    if let Some(line) = line {
                        log.write(&line, warn);
                        show(&bar, &line);
                        for what in doctor.look(&line, false) {
                            warn(&what);
                            log.remark(self.done, "doctor", &what);
                        }
                    }
                    log.samples(&self.samples.line(self.done, &scores), warn);
                }
            }
            let signal = interrupt.on_any(self.ranks)?.filter(|_| !last);
            if self.done.is_multiple_of(self.options.save_steps.max(1)) || last || signal.is_some() {
                self.agree()?;
                match log.as_mut().map_or(Ok(()), |log| log.flush().and_then(|()| self.save())) {
                    Err(e) if !last && signal.is_none() => {
                        let what = format!("{e}\n  the run goes on and tries again at the next checkpoint");
                        warn(&what);
                        log.iter_mut().for_each(|log| log.remark(self.done, "warning", &what));
                    }
                    saved => saved?,
                }
            }
            if let Some(signal) = signal {
                bar.finish_and_clear();
                self.ranks.wait()?;
                return Err(Error::run(format!("ended by {signal} after step {}, which is saved", self.done))
                    .at(self.output.display())
                    .help("the same command with --resume-from-checkpoint latest goes on from there"));
            }
        }
        bar.finish_and_clear();
        self.device.fetch()?;
        match log {
            Some(_) => self.device.adapter().save(&self.output, &self.base_model),
            None => Ok(()),
        }
    }

    /// What to say of a step that is skipped; too many in a row are an error.
    fn skip(&mut self, step: &Step, norm: f64) -> Result<String> {
        self.skipped += 1;
        let worst = unsound::culprit(self.ranks, step)?;
        let place = self.next_pairs().get(worst).map(|pair| self.pairs[*pair].place.clone()).unwrap_or_default();
        let what = format!("step {} has loss {} and a gradient of norm {norm}", self.done + 1, step.loss);
        match self.skipped {
            unsound::LIMIT.. => Err(unsound::end(&what, &place)),
            _ => Ok(format!("{place}: {what}: the step is skipped")),
        }
    }

    fn learning_rate(&self) -> f64 {
        self.options.learning_rate * self.options.lr_scheduler.factor(self.done, self.warmup, self.total)
    }

    /// Leaves the gradient of the next step on the device; returns its loss and its unique tokens.
    fn gradient(&mut self) -> Result<(Step, usize)> {
        let chosen = self.next_pairs();
        let pairs: Vec<&TokenPair> = chosen.iter().map(|i| &self.pairs[*i]).collect();
        let reference = self.reference.gather(chosen.iter().copied());
        let step = step::gradient(self.ranks, self.device.as_mut(), &mut self.objective, &pairs, &reference)?;
        Ok((step, pairs.iter().map(|p| p.prompt.len() + p.chosen.len() + p.rejected.len()).sum()))
    }

    /// The pairs of the next step.
    fn next_pairs(&self) -> Vec<usize> {
        let (epoch, at) = (self.done / self.per_epoch, (self.done % self.per_epoch) as usize);
        let order = order(self.pairs.len(), self.options.data.shuffle, self.options.data.seed, epoch);
        let first = at * self.options.batch_size;
        order[first..(first + self.options.batch_size).min(order.len())].to_vec()
    }

    fn line(&self, norm: f64, learning_rate: f64) -> Map<String, Value> {
        let mut line = self.place();
        line.extend(self.window.means(""));
        line.insert("grad_norm".into(), json!(norm));
        line.insert("learning_rate".into(), json!(learning_rate));
        line
    }

    fn place(&self) -> Map<String, Value> {
        let epoch = self.done as f64 / self.per_epoch as f64;
        Map::from_iter([("global_step".to_owned(), json!(self.done)), ("epoch".to_owned(), json!(epoch))])
    }

    /// A line about the validation pairs, where there are any, and log-probs that begin with those of the samples.
    fn evaluate(&mut self) -> Result<(Option<Map<String, Value>>, Scores)> {
        if self.validation.is_empty() {
            return Ok((None, self.samples.score(self.ranks, self.device.as_mut(), &self.pairs)?));
        }
        let pairs: Vec<&TokenPair> = self.validation.iter().collect();
        let reference = self.validation_reference.gather(0..pairs.len());
        let (step, scores) = step::evaluate(self.ranks, self.device.as_mut(), &mut self.objective, &pairs, &reference)?;
        let mut window = Window::default();
        window.add(step.loss, step.sums, 0);
        let mut line = self.place();
        line.extend(window.means("eval_"));
        Ok((Some(line), scores))
    }

    /// Every rank has what rank 0 is about to save.
    fn agree(&mut self) -> Result<()> {
        self.device.fetch()?;
        let digest = digest(&self.device.adapter().params, self.device.moments());
        self.ranks.same("adapter", &digest).map_err(|e| {
            Error::run(e.message()).help("a device or its memory may be faulty; earlier checkpoints are whole")
        })
    }

    fn save(&mut self) -> Result<()> {
        let state = State {
            global_step: self.done,
            epoch: self.done as f64 / self.per_epoch as f64,
            updates: self.device.moments().steps,
            skipped: self.skipped,
            settings: self.settings.clone(),
            losses: self.objective.states(),
            window: self.window.clone(),
        };
        let (adapter, moments) = (self.device.adapter(), self.device.moments());
        let keep = self.options.save_total_limit;
        checkpoint::save(&self.output, adapter, &self.base_model, moments, &state, keep)?;
        page::write_report(&self.output)
    }
}

/// The order of pairs in an epoch; the same for the same seed, wherever a run begins.
fn order(pairs: usize, shuffle: bool, seed: u64, epoch: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..pairs).collect();
    if shuffle {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(epoch + 1);
        order.shuffle(&mut rng);
    }
    order
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

/// The model that was named; without model and data, the demo with settings that suit it.
fn demo_or_given(options: &mut TrainOptions) -> Result<String> {
    match (&options.model, options.data.dataset.is_empty()) {
        (Some(model), false) => Ok(model.clone()),
        (Some(_), true) => {
            Err(Error::input("no data").at("--dataset").help("name rows: --dataset FILE, or --dataset hf::owner/name"))
        }
        (None, false) => Err(Error::input("no model")
            .at("--model")
            .help("name a checkpoint folder, or a model of a hub: --model owner/name")),
        (None, true) => {
            let demo = demo::write()?;
            let text = |p: &Path| p.display().to_string();
            let model = text(&demo.model);
            options.model = Some(model.clone());
            options.data.dataset = vec![text(&demo.dataset)];
            options.val_dataset = vec![text(&demo.val_dataset)];
            options.suit_demo();
            Ok(model)
        }
    }
}

fn refuse_unsupported(options: &TrainOptions) -> Result<()> {
    if options.gpus == 0 {
        return Err(Error::input("should be above 0").at("--gpus").help("say --device cpu to compute without one"));
    }
    if options.quantization != Quantization::None {
        return Err(Error::input("quantised weights: this version computes in bf16 or f32")
            .at("--quantization")
            .help("leave it out; `dpo-host plan` says what fits, and what --recompute and --shard-base save"));
    }
    if options.batch_size == 0 {
        return Err(Error::input("a step needs pairs").at("--batch-size").help("16 is usual"));
    }
    options.refuse_out_of_range()
}

fn note_ignored(options: &TrainOptions) {
    if options.lora_dropout != 0.0 {
        console::note(
            "--lora-dropout is ignored: dropout is off while aligning, as in TRL, LLaMA-Factory and ms-swift",
        );
    }
    if options.dtype == Dtype::Bfloat16 && options.device == "cpu" {
        console::note("--dtype bfloat16 is for GPUs; the CPU computes in float32");
    }
}

/// The GPU of `--device`, or `None` for the CPU. GPUs compute in bf16, the CPU in f32.
fn choose_device(options: &TrainOptions, local_rank: Option<usize>) -> Result<Option<usize>> {
    let exact = options.dtype == Dtype::Float32;
    if exact && options.device == "auto" {
        return Ok(None);
    }
    let chosen = device::choose(&options.device, local_rank);
    match chosen.map_err(|e| e.help("leave it out to compute on what there is"))? {
        Some(_) if exact => Err(Error::input("GPUs compute in bfloat16")
            .at("--dtype")
            .help("leave it out, or add --device cpu for float32")),
        gpu => Ok(gpu),
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

/// An evaluation of pairs that are trained on says that a model learns, not what it learned.
fn warn_of_shared(pairs: &[TokenPair], validation: &[TokenPair]) {
    let trained: HashSet<_> = pairs.iter().map(|p| (&p.prompt, &p.chosen, &p.rejected)).collect();
    let shared = validation.iter().filter(|p| trained.contains(&(&p.prompt, &p.chosen, &p.rejected))).count();
    if shared > 0 {
        console::warning(format!(
            "{shared} of {} validation pairs are trained on as well\n  help: evaluate on other rows, or keep some from training \
             with --split-dataset-ratio 0.1",
            validation.len()
        ));
    }
}

/// A token id beyond the projection would read other memory's row.
fn refuse_foreign_tokens(pairs: &[TokenPair], vocab: usize) -> Result<()> {
    let ids = |p: &TokenPair| p.prompt.iter().chain(&p.chosen).chain(&p.rejected).copied().max().unwrap_or(0);
    match pairs.iter().find(|p| ids(p) as usize >= vocab) {
        Some(pair) => Err(Error::input(format!("token id {} is beyond the model's vocabulary of {vocab}", ids(pair)))
            .at(&pair.place)
            .help("the tokenizer is not this model's")),
        None => Ok(()),
    }
}

/// Where a run is written, and the checkpoint it goes on from.
#[derive(Serialize, Deserialize)]
struct Folders {
    output: PathBuf,
    resumed: Option<PathBuf>,
}

/// A run that is started again finds its own folder, and goes on from the last checkpoint there if there is one.
fn folders(options: &TrainOptions, model: &Path, attempt: u64) -> Result<Folders> {
    let again = options.output_dir.clone().filter(|_| attempt > 0);
    let latest = again.as_ref().map_or(Ok(None), |output| checkpoint::find(Some(output), "latest"))?;
    let resumed = match &options.resume_from_checkpoint {
        Some(value) if latest.is_none() && !(again.is_some() && value == "latest") => {
            checkpoint::find(options.output_dir.as_deref(), value)?
        }
        _ => latest,
    };
    let output = again.map_or_else(|| output_folder(options, model, resumed.as_deref()), Ok)?;
    Ok(Folders { output, resumed })
}

/// Where the run goes: what was named, unless it holds a run; else the next free folder.
fn output_folder(options: &TrainOptions, model: &Path, resumed: Option<&Path>) -> Result<PathBuf> {
    let holds_run =
        |p: &Path| ["args.json", "logging.jsonl", "adapter_model.safetensors"].iter().any(|f| p.join(f).exists());
    // With `latest`, a run that was killed before its first checkpoint; one that has an adapter came to its end.
    let begins_again =
        |p: &Path| options.resume_from_checkpoint.is_some() && !p.join("adapter_model.safetensors").exists();
    match (&options.output_dir, resumed) {
        (Some(folder), None) if holds_run(folder) && !begins_again(folder) => Err(Error::input("holds a run already")
            .at(folder.display())
            .help("name another folder, or go on with --resume-from-checkpoint latest")),
        (Some(folder), _) => Ok(folder.clone()),
        (None, Some(checkpoint)) => Ok(checkpoint.parent().unwrap_or(Path::new(".")).to_owned()),
        (None, None) => {
            let name = model.canonicalize().ok().and_then(|p| Some(p.file_name()?.to_string_lossy().into_owned()));
            let name = name.unwrap_or_else(|| "run".into());
            let free = (1..).map(|n| PathBuf::from("output").join(format!("{name}-{n}"))).find(|p| !p.exists());
            free.ok_or_else(|| Error::run("no free folder under output"))
        }
    }
}

/// A hash of what ranks must agree on after every step.
fn digest(params: &[f32], moments: &Moments) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(moments.steps.to_le_bytes());
    for values in [params, &moments.first, &moments.second] {
        values.iter().for_each(|v| hash.update(v.to_le_bytes()));
    }
    hash.finalize().into()
}

/// Puts a line of the log beside the bar, or prints it where there is none.
fn show(bar: &ProgressBar, line: &Map<String, Value>) {
    let number = |name: &str| line.get(name).or_else(|| line.get(&format!("eval_{name}"))).and_then(Value::as_f64);
    let (loss, margin) = (number("loss").unwrap_or(f64::NAN), number("rewards/margins").unwrap_or(f64::NAN));
    let accuracy = number("rewards/accuracies").unwrap_or(f64::NAN);
    let step = number("global_step").unwrap_or(0.0);
    let speed = number("tokens_per_second").map(|t| format!(" {t:.0} tokens/s")).unwrap_or_default();
    let kind = if line.contains_key("eval_loss") { "evaluation" } else { "step" };
    let text = format!("loss {loss:.4} margin {margin:.3} accuracy {accuracy:.2}{speed}");
    console::event(kind, line);
    if kind == "step" && !bar.is_hidden() {
        bar.set_message(text);
    } else {
        bar.suspend(|| console::step(format!("{kind} {step} {text}")));
    }
}

impl TrainOptions {
    /// Numbers of which no run could make sense.
    fn refuse_out_of_range(&self) -> Result<()> {
        type Range = (fn(f64) -> bool, &'static str);
        const FROM_0: Range = (|x| x >= 0.0, "0 or more");
        const ABOVE_0: Range = (|x| x > 0.0, "above 0");
        const SHARE: Range = (|x| (0.0..=1.0).contains(&x), "from 0 to 1");
        const BELOW_1: Range = (|x| (0.0..1.0).contains(&x), "from 0 to below 1");
        let numbers: &[(&str, Option<f64>, Range, &str)] = &[
            ("--learning-rate", Some(self.learning_rate), FROM_0, "LoRA wants 1e-5 to 2e-4"),
            ("--num-epochs", Some(self.num_epochs), ABOVE_0, "part of an epoch is a number such as 0.5"),
            ("--max-steps", self.max_steps.map(|n| n as f64), ABOVE_0, "leave it out to take --num-epochs"),
            ("--beta", self.beta, ABOVE_0, "0.01 to 0.5 is usual; the lower, the further from the reference"),
            ("--label-smoothing", self.label_smoothing, BELOW_1, "the part of preferences that are wrong, such as 0.1"),
            ("--rpo-alpha", self.rpo_alpha, FROM_0, "0.1 to 1 is usual"),
            ("--ld-alpha", self.ld_alpha, SHARE, "1 is plain DPO"),
            ("--warmup-ratio", Some(self.warmup_ratio), SHARE, "0.05 is usual"),
            ("--weight-decay", Some(self.weight_decay), FROM_0, "0 is none"),
            ("--adam-beta1", Some(self.adam_beta1), BELOW_1, "0.9 is usual"),
            ("--adam-beta2", Some(self.adam_beta2), BELOW_1, "0.95 or 0.999 is usual"),
            ("--adam-epsilon", Some(self.adam_epsilon), ABOVE_0, "1e-8 is usual"),
            ("--max-grad-norm", Some(self.max_grad_norm), FROM_0, "0 is no clipping"),
            ("--lora-alpha", self.lora_alpha, ABOVE_0, "two to four times the rank is usual"),
            ("--lora-dropout", Some(self.lora_dropout), SHARE, "it has no effect here"),
            ("--split-dataset-ratio", Some(self.split_dataset_ratio), BELOW_1, "0.01 keeps every hundredth pair"),
        ];
        let wrong = |x: f64, (within, _): &Range| !x.is_finite() || !within(x);
        let first = numbers
            .iter()
            .find_map(|(flag, x, range, help)| x.filter(|x| wrong(*x, range)).map(|x| (flag, x, range.1, help)));
        match first {
            Some((flag, x, range, help)) => {
                Err(Error::input(format!("should be {range}, not {x}")).at(flag).help(*help))
            }
            None => Ok(()),
        }
    }

    fn objective(&self) -> Result<ObjectiveOptions> {
        let mut options = Map::new();
        let numbers = [("beta", self.beta), ("label_smoothing", self.label_smoothing)];
        options.extend(numbers.into_iter().filter_map(|(name, value)| Some((name.to_owned(), json!(value?)))));
        options.extend(self.f_divergence.iter().map(|f| ("f_divergence".to_owned(), json!(f))));
        for option in &self.loss_option {
            let Some((name, value)) = option.split_once('=') else {
                return Err(Error::input(format!("'{option}' should be NAME=VALUE"))
                    .at("--loss-option")
                    .help("`dpo-host describe LOSS` names a loss's options"));
            };
            options.insert(name.into(), value.parse::<f64>().map_or_else(|_| json!(value), |n| json!(n)));
        }
        Ok(ObjectiveOptions {
            losses: self.loss.clone(),
            weights: self.loss_weights.clone(),
            options,
            rpo_alpha: self.rpo_alpha,
            ld_alpha: self.ld_alpha,
            weighting: self.use_weighting,
        })
    }

    /// How ranks wait for each other.
    fn patience(&self) -> Result<Patience> {
        let seconds = |flag: &str, value: f64| match Duration::try_from_secs_f64(value) {
            Ok(time) if !time.is_zero() => Ok(time),
            _ => Err(Error::input(format!("{value} should be a number of seconds above 0"))
                .at(flag)
                .help("10 is ten seconds")),
        };
        Ok(Patience {
            rendezvous: seconds("--rendezvous", self.rendezvous)?,
            watchdog: seconds("--watchdog", self.watchdog)?,
        })
    }

    fn wishes(&self, gpu: Option<usize>, place: Option<&Place>) -> Result<Wishes> {
        let auto = |value: &str| value == "auto";
        let tokens = match self.micro_batch_tokens.as_str() {
            value if auto(value) => None,
            value => Some(value.parse().ok().filter(|n| *n > 0).ok_or_else(|| {
                Error::input(format!("'{value}' should be auto or a number of tokens")).at("--micro-batch-tokens")
            })?),
        };
        let choice = |flag: &str, value: &str| match value {
            value if auto(value) => Ok(None),
            "true" => Ok(Some(true)),
            "false" => Ok(Some(false)),
            _ => Err(Error::input(format!("'{value}' should be auto, true or false")).at(flag)),
        };
        let recompute = choice("--recompute", &self.recompute)?;
        let shard_base = choice("--shard-base", &self.shard_base)?;
        let memory = self.gpu_memory.as_deref().map(parse_size).transpose().map_err(|e| e.at("--gpu-memory"))?;
        // Ranks that compute on the same host's CPU share its memory.
        let sharing = if gpu.is_none() { place.and_then(|p| p.local_size) } else { None };
        let memory = memory.or_else(|| free_memory().zip(sharing).map(|(free, ranks)| free / ranks.max(1)));
        Ok(Wishes { memory, micro_batch_tokens: tokens, recompute, shard_base })
    }

    /// Settings under which the demo's model changes its tone within a minute and keeps what it knows. A strong reference and
    /// the likelihood of the chosen answers are what keeps a model of this size from stammering.
    fn suit_demo(&mut self) {
        let said = |name: &str| self.said.iter().any(|said| said == name);
        let (rate, epochs) = (said("learning_rate"), said("num_epochs"));
        if !rate {
            self.learning_rate = 2e-3;
        }
        if !epochs {
            self.num_epochs = 2.0;
        }
        if self.loss == ["sigmoid"] {
            self.beta.get_or_insert(0.5);
            self.rpo_alpha.get_or_insert(1.0);
        }
    }
}
