//! A run in progress: steps, lines of the log, evaluations, checkpoints, until all steps are taken or it is told to end.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::checkpoint::{self, State};
use super::config::{Steps, TrainConfig};
use super::doctor::Doctor;
use super::evaluation::{Best, EvalSet, Metric};
use super::log::Log;
use super::metrics::Window;
use super::next_steps;
use super::samples::Samples;
use super::trackers::{About, End};
use super::{Objective, Reference, Step, nonfinite, settings, step};
use dpo_core::batch::mix;
use dpo_core::collective::ProcessGroup;
use dpo_core::console::{self, Remark};
use dpo_core::device::Device;
use dpo_core::error::{Error, Result};
use dpo_core::example::Example;
use dpo_core::files;
use dpo_core::logprobs::AnswerLogProbs;
use dpo_core::optimizer::{Moments, clip};
use dpo_data::Examples;
use dpo_page as page;
use dpo_ranks::{Announcement, Interrupt};

/// What is said at the first Ctrl-C.
const SAVES: &str = "the run is saved after this step, and ends; once more ends it at once";

/// Why a step is not taken.
enum Skipped {
    /// Its loss or its gradient is not finite.
    Gradient,
    /// A parameter or a moment would not be finite after it.
    Update,
}

/// A run in progress.
pub(super) struct Run<'r> {
    pub(super) group: &'r mut dyn ProcessGroup,
    pub(super) config: TrainConfig,
    pub(super) output: PathBuf,
    pub(super) base_model: String,
    pub(super) device: Box<dyn Device>,
    pub(super) objective: Objective<'r>,
    pub(super) examples: Examples,
    pub(super) validation: Vec<EvalSet>,
    pub(super) reference: Reference,
    pub(super) steps: Steps,
    pub(super) settings: Map<String, Value>,
    /// What is known before the first step, for those who look at the run.
    pub(super) facts: Value,
    pub(super) samples: Samples,
    /// What evaluations are compared by, where anything depends on it.
    pub(super) metric: Option<Metric>,
    pub(super) best: Best,
    pub(super) window: Window,
    /// Steps taken.
    pub(super) done: u64,
    /// The last of them that were skipped, one after the other.
    pub(super) skipped: u64,
}

impl Run<'_> {
    pub(super) fn begin(&self) -> Result<()> {
        if self.group.is_first() { self.write_args() } else { Ok(()) }
    }

    fn write_args(&self) -> Result<()> {
        let (packing, losses) = (self.device.packing(), self.objective.resolved());
        let args = self.config.args_json(packing, &losses, &self.facts, &self.settings)?;
        files::write(&self.output.join(page::ARGS), &args)
    }

    pub(super) fn resume(&mut self, folder: &Path) -> Result<()> {
        let state = checkpoint::load_state(folder)?;
        settings::refuse_other(&state, &self.settings, self.steps, folder)?;
        if settings::prolongs(&state, self.steps) {
            let (before, now) = (state.total_steps, self.steps.total);
            console::note(format!(
                "the run is prolonged from {before} to {now} steps; from here on the learning rate follows the schedule of {now} steps"
            ));
            if self.group.is_first() {
                self.write_args()?;
            }
        }
        let [params, _] = self.device.adapter().read(folder)?;
        let moments = checkpoint::load_moments(folder, params.len(), state.updates)?;
        self.group.assert_equal("checkpoint", &digest(&params, &moments))?;
        self.device.restore(&params, moments)?;
        (self.done, self.skipped, self.window) = (state.global_step, state.skipped, state.window);
        self.best = state.best;
        self.objective.restore(state.losses);
        Ok(())
    }

    pub(super) fn train(&mut self) -> Result<()> {
        // Rank 0 alone writes; the others wait for it where they next need it.
        let mut doctor = Doctor::default();
        let mut log = match self.group.is_first() {
            true => {
                files::write(&self.output.join(page::FACTS), self.facts.to_string().as_bytes())?;
                let report = &self.config.output.report;
                let about = About { folder: &self.output, report, flags: &self.config.flags };
                let (log, before) = Log::open(&about, self.done, self.samples.start())?;
                before.iter().for_each(|line| drop(doctor.look(line, false)));
                Some(log)
            }
            false => None,
        };
        let interrupt = Interrupt::listen()?;
        let bar = console::bar(self.steps.total, "{pos}/{len} {bar:6} {eta} left  {wide_msg}");
        let announced = bar.clone();
        let announce = move || announced.suspend(|| console::note(SAVES));
        let _announcement = self.group.is_first().then(|| Announcement::new(announce)).transpose()?;
        let warn = |what: Remark| bar.suspend(|| console::warning(what));
        bar.set_position(self.done);
        // What was taken before says nothing of the time that is left.
        bar.reset_eta();
        if self.done >= self.steps.total {
            console::note(format!(
                "all {} steps are taken already; a run that begins anew has a folder of its own",
                self.steps.total
            ));
        }
        let start = Instant::now();
        let (mut line_start, mut saved, first) = (Instant::now(), Instant::now(), self.done);
        let eval_steps = self.config.output.eval_steps;
        let mut stops = self.lost_patience();
        if stops {
            console::note("the run has ended early before: raise --early-stopping-patience, or leave it out, to go on");
        }
        if self.done == 0 && self.config.evaluation.on_start {
            let (line, logps) = self.evaluate()?;
            self.tell_evaluation(&mut log, &mut doctor, line, &logps, &warn, &bar);
        }
        while self.done < self.steps.total && !stops {
            let learning_rate = self.learning_rate();
            let losses = self.objective.states();
            let (step, tokens) = self.gradient()?;
            let norm = self.device.gradient_norm()?;
            let clip = clip(norm, self.config.optimizer.max_grad_norm);
            let cause = if !(step.loss.is_finite() && norm.is_finite()) {
                Some(Skipped::Gradient)
            } else if !self.device.update(&self.config.optimizer.adamw, clip, learning_rate)? {
                Some(Skipped::Update)
            } else {
                None
            };
            if let Some(cause) = cause {
                self.objective.restore(losses);
                let what = self.skip(&cause, &step, norm).inspect_err(|_| bar.finish_and_clear())?;
                warn(what.clone());
                log.iter_mut().for_each(|log| log.remark(self.done + 1, "warning", &what));
            } else {
                self.window.add(step.loss, step.aux_loss, step.sums, tokens);
                self.skipped = 0;
            }
            self.done += 1;
            bar.inc(1);
            let last = self.done == self.steps.total;
            if self.done == 1 || self.done.is_multiple_of(self.config.output.logging_steps.max(1)) || last {
                if let Some(log) = &mut log {
                    let mut line = self.line(norm, learning_rate);
                    let seconds = line_start.elapsed().as_secs_f64().max(1e-9);
                    line.insert("tokens_per_second".into(), json!(self.window.tokens / seconds));
                    line.insert("memory_gib".into(), json!(self.device.memory_gib()));
                    line.insert("elapsed_s".into(), json!(start.elapsed().as_secs_f64()));
                    log.write(&line, warn);
                    let each = start.elapsed().as_secs_f64() / (self.done - first) as f64;
                    let left = each * (self.steps.total - self.done) as f64;
                    show(&bar, &line, Some((self.steps.total, left)));
                    for what in doctor.look(&line, last) {
                        warn(what.clone());
                        log.remark(self.done, "doctor", &what);
                    }
                }
                self.window = Window::default();
                line_start = Instant::now();
            }
            // What evaluations and checkpoints take does not count as slow steps.
            let pause = Instant::now();
            let mut is_best = false;
            if self.done.is_multiple_of(eval_steps.max(1)) || last {
                let (line, logps) = self.evaluate()?;
                if let Some((metric, line)) = self.metric.as_ref().zip(line.as_ref()) {
                    is_best = self.best.look(self.done, metric, line);
                }
                stops = self.lost_patience();
                self.tell_evaluation(&mut log, &mut doctor, line, &logps, &warn, &bar);
            }
            let ends = last || stops;
            let signal = interrupt.on_any(self.group)?.filter(|_| !ends);
            let due = self.done.is_multiple_of(self.config.output.save_steps.max(1)) || self.is_time_to_save(saved)?;
            if due || ends || is_best || signal.is_some() {
                self.agree()?;
                saved = Instant::now();
                match log.as_mut().map_or(Ok(()), |log| log.flush().and_then(|()| self.save())) {
                    Err(e) if !ends && signal.is_none() => {
                        let what = Remark::from(&e).help("the run goes on and tries again at the next checkpoint");
                        warn(what.clone());
                        log.iter_mut().for_each(|log| log.remark(self.done, "warning", &what));
                    }
                    saved => saved?,
                }
            }
            if let Some(signal) = signal {
                bar.finish_and_clear();
                log.iter_mut().for_each(|log| log.ends(End::Killed));
                self.group.barrier()?;
                return Err(Error::run(format!("ended by {signal} after step {}, which is saved", self.done))
                    .at(self.output.display())
                    .help(format!(
                        "{} goes on from there",
                        next_steps::resume(&self.output, &self.output.join(page::ARGS))
                    )));
            }
            line_start += pause.elapsed();
        }
        bar.finish_and_clear();
        if let Some([first, last]) = doctor.course() {
            console::line(format!("loss        {first:.4} → {last:.4} in {} steps", self.done));
        }
        if let Some(what) = self.take_best(stops)? {
            console::line(format!("best        {}", what.text));
            log.iter_mut().for_each(|log| log.remark(self.done, "note", &what));
        }
        self.device.fetch()?;
        if self.device.moments().steps == 0 && self.done > 0 {
            return Err(Error::run("every step was skipped: the adapter is the one of the start")
                .at(self.output.display())
                .help("the warnings above name the rows, or the flags"));
        }
        let Some(mut log) = log else { return Ok(()) };
        self.device.adapter().save(&self.output, &self.base_model)?;
        log.ends(End::Finished);
        Ok(())
    }

    /// What to say of a step that is skipped; too many in a row are an error.
    fn skip(&mut self, cause: &Skipped, step: &Step, norm: f64) -> Result<Remark> {
        self.skipped += 1;
        let what = format!("step {} has loss {} and a gradient of norm {norm}", self.done + 1, step.loss);
        let (place, what, help) = match cause {
            Skipped::Gradient => {
                let worst = nonfinite::worst_example(self.group, step)?;
                let row = self.next_examples().get(worst).map(|e| self.examples.get(*e)).transpose()?;
                (row.map(|e| e.place).unwrap_or_default(), what, nonfinite::LOWER)
            }
            Skipped::Update => {
                (String::new(), format!("{what}, but AdamW's step makes numbers that are not finite"), nonfinite::USUAL)
            }
        };
        match self.skipped {
            nonfinite::LIMIT.. => Err(nonfinite::end(&what, &place, help)),
            _ if place.is_empty() => Ok(format!("{what}: the step is skipped").into()),
            _ => Ok(format!("{place}: {what}: the step is skipped").into()),
        }
    }

    fn learning_rate(&self) -> f64 {
        self.config.optimizer.learning_rate
            * self.config.optimizer.schedule.factor(self.done, self.steps.warmup, self.steps.total)
    }

    /// Leaves the gradient of the next step on the device; returns its loss and its unique tokens.
    fn gradient(&mut self) -> Result<(Step, usize)> {
        let next = self.next_examples();
        let examples = self.examples.gather(next.iter().copied())?;
        let examples: Vec<&Example> = examples.iter().collect();
        let reference = self.reference.gather(&next);
        self.device.set_dropout(Some(mix(self.config.data.seed, self.done)));
        let step = step::gradient(self.group, self.device.as_mut(), &mut self.objective, &examples, reference.as_ref());
        self.device.set_dropout(None);
        Ok((step?, examples.iter().map(|e| e.unique_tokens()).sum()))
    }

    /// The examples of the next step.
    fn next_examples(&self) -> Vec<usize> {
        let (epoch, at) = (self.done / self.steps.per_epoch, (self.done % self.steps.per_epoch) as usize);
        let order = order(self.examples.len(), self.config.data.shuffle, self.config.data.seed, epoch);
        let first = at * self.config.optimizer.batch_size;
        order[first..(first + self.config.optimizer.batch_size).min(order.len())].to_vec()
    }

    fn line(&self, norm: f64, learning_rate: f64) -> Map<String, Value> {
        let mut line = self.place();
        line.extend(self.window.means(""));
        line.insert("grad_norm".into(), json!(norm));
        line.insert("learning_rate".into(), json!(learning_rate));
        line
    }

    fn place(&self) -> Map<String, Value> {
        let epoch = self.done as f64 / self.steps.per_epoch as f64;
        Map::from_iter([("global_step".to_owned(), json!(self.done)), ("epoch".to_owned(), json!(epoch))])
    }

    /// Whether so many evaluations have passed without a better one that the run ends.
    fn lost_patience(&self) -> bool {
        self.config.evaluation.patience.is_some_and(|patience| self.best.waited >= patience)
    }

    /// Whether the time between checkpoints is over, for rank 0, whose clock is everybody's.
    fn is_time_to_save(&mut self, saved: Instant) -> Result<bool> {
        let Some(time) = self.config.output.save_every else { return Ok(false) };
        let over = self.group.is_first() && saved.elapsed() >= time;
        Ok(self.group.all_reduce_max(u64::from(over))? > 0)
    }

    /// Says what evaluations have decided: that the run `stopped`, which was the best, and that the adapter is now that one's.
    fn take_best(&mut self, stopped: bool) -> Result<Option<Remark>> {
        let Some((metric, (step, value))) = self.metric.as_ref().zip(self.best.found) else { return Ok(None) };
        let mut what = format!("{} {value:.4} after step {step} of {}", metric.name, self.done);
        if stopped {
            what += &format!("; ended early, as {} evaluations were no better", self.best.waited);
        }
        if self.config.evaluation.load_best {
            let folder = self.output.join(checkpoint::name(step));
            if step != self.done {
                // Rank 0 has written it; no rank reads it before.
                self.group.barrier()?;
                let [params, _] = self.device.adapter().read(&folder)?;
                let moments =
                    checkpoint::load_moments(&folder, params.len(), checkpoint::load_state(&folder)?.updates)?;
                self.device.restore(&params, moments)?;
            }
            what += &format!("; the adapter is that of {}", folder.display());
        }
        Ok(Some(what.into()))
    }

    /// Writes an evaluation's numbers, what the doctor thinks of them, and the sample examples.
    fn tell_evaluation(
        &self,
        log: &mut Option<Log>,
        doctor: &mut Doctor,
        line: Option<Map<String, Value>>,
        logps: &AnswerLogProbs,
        warn: &dyn Fn(Remark),
        bar: &ProgressBar,
    ) {
        let Some(log) = log else { return };
        if let Some(line) = line {
            log.write(&line, warn);
            show(bar, &line, None);
            for what in doctor.look(&line, false) {
                warn(what.clone());
                log.remark(self.done, "doctor", &what);
            }
        }
        log.samples(&self.samples.line(self.done, logps), warn);
    }

    /// A line about the validation examples, where there are any, and log-probs that begin with those of the samples.
    fn evaluate(&mut self) -> Result<(Option<Map<String, Value>>, AnswerLogProbs)> {
        if self.validation.is_empty() {
            return Ok((None, self.samples.score(self.group, self.device.as_mut(), &self.examples)?));
        }
        let (mut line, mut first) = (self.place(), None);
        for EvalSet { prefix, examples, reference } in &self.validation {
            let examples = examples.all()?;
            let examples: Vec<&Example> = examples.iter().collect();
            let device = self.device.as_mut();
            let (step, logps) = step::evaluate(self.group, device, &mut self.objective, &examples, reference.all())?;
            let mut window = Window::default();
            window.add(step.loss, step.aux_loss, step.sums, 0);
            line.extend(window.means(prefix));
            first.get_or_insert(logps);
        }
        Ok((Some(line), first.unwrap_or_default()))
    }

    /// Every rank has what rank 0 is about to save.
    fn agree(&mut self) -> Result<()> {
        self.device.fetch()?;
        let digest = digest(&self.device.adapter().params, self.device.moments());
        self.group.assert_equal("adapter", &digest).map_err(|e| {
            Error::run(e.message()).help("a device or its memory may be faulty; earlier checkpoints are whole")
        })
    }

    fn save(&mut self) -> Result<()> {
        let state = State {
            global_step: self.done,
            total_steps: self.steps.total,
            epoch: self.done as f64 / self.steps.per_epoch as f64,
            updates: self.device.moments().steps,
            skipped: self.skipped,
            packing: self.device.packing(),
            settings: self.settings.clone(),
            losses: self.objective.states(),
            window: self.window.clone(),
            best: self.best,
        };
        let (adapter, moments) = (self.device.adapter(), self.device.moments());
        let keep = self.config.output.save_total_limit;
        checkpoint::save(&self.output, adapter, &self.base_model, moments, &state, keep)?;
        page::write_report(&self.output)
    }
}

/// The order of examples in an epoch; the same for the same seed, wherever a run begins.
fn order(examples: usize, shuffle: bool, seed: u64, epoch: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..examples).collect();
    if shuffle {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(epoch + 1);
        order.shuffle(&mut rng);
    }
    order
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

/// Puts a line of the log beside the bar, or prints it where there is none: that of a step with the number of all steps and the
/// seconds that are left.
fn show(bar: &ProgressBar, line: &Map<String, Value>, of: Option<(u64, f64)>) {
    let number = |name: &str| line.get(name).and_then(Value::as_f64);
    // Examples of one answer have no accuracy, and where all are of one kind no margin. A step that was skipped has neither.
    let told = |prefix: &str| {
        let own = |name: &str| line.get(&format!("{prefix}{name}")).map(|v| v.as_f64().unwrap_or(f64::NAN));
        let margin = own("rewards/margins").map(|n| format!(" margin {n:.3}")).unwrap_or_default();
        let accuracy = own("rewards/accuracies").map(|n| format!(" accuracy {n:.2}")).unwrap_or_default();
        // Of several evaluation sets each has a name.
        let set = prefix.strip_prefix("eval_").and_then(|p| p.strip_suffix('_')).map(|set| format!("{set} "));
        format!("{}loss {:.4}{margin}{accuracy}", set.unwrap_or_default(), own("loss").unwrap_or(f64::NAN))
    };
    let prefixes = line.keys().filter_map(|k| k.strip_suffix("loss")).filter(|p| !p.ends_with("nll_"));
    let numbers = prefixes.map(told).collect::<Vec<_>>().join(", ");
    let speed = number("tokens_per_second").map(|t| format!(" {t:.0} tokens/s")).unwrap_or_default();
    let text = format!("{numbers}{speed}");
    let step = number("global_step").unwrap_or(0.0);
    let Some((total, left)) = of else {
        console::event("evaluation", line);
        bar.suspend(|| console::step(format!("evaluation {step} {text}")));
        return;
    };
    console::event("step", line);
    if bar.is_hidden() {
        let left = HumanDuration(Duration::from_secs_f64(left.clamp(0.0, 1e9)));
        console::step(format!("step {step}/{total} {text}, {left:#} left"));
    } else {
        bar.set_message(text);
    }
}
