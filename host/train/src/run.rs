//! A run in progress: steps, lines of the log, evaluations, checkpoints, until all steps are taken or it is told to end.

use std::path::{Path, PathBuf};
use std::time::Instant;

use indicatif::ProgressBar;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::checkpoint::{self, State};
use super::config::{Steps, TrainConfig};
use super::doctor::Doctor;
use super::log::Log;
use super::metrics::Window;
use super::samples::Samples;
use super::{Objective, Reference, Step, nonfinite, settings, step};
use dpo_core::collective::ProcessGroup;
use dpo_core::console::{self, Remark};
use dpo_core::device::Device;
use dpo_core::error::{Error, Result};
use dpo_core::example::Example;
use dpo_core::files;
use dpo_core::logprobs::AnswerLogProbs;
use dpo_core::lora::Adapter;
use dpo_core::optimizer::{Moments, clip};
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
    pub(super) examples: Vec<Example>,
    pub(super) validation: Vec<Example>,
    pub(super) reference: Reference,
    pub(super) validation_reference: Reference,
    pub(super) steps: Steps,
    pub(super) settings: Map<String, Value>,
    /// What is known before the first step, for those who look at the run.
    pub(super) facts: Value,
    pub(super) samples: Samples,
    pub(super) window: Window,
    /// Steps taken.
    pub(super) done: u64,
    /// The last of them that were skipped, one after the other.
    pub(super) skipped: u64,
}

impl Run<'_> {
    pub(super) fn begin(&self) -> Result<()> {
        if !self.group.is_first() {
            return Ok(());
        }
        let args = self.config.args_json(self.device.packing(), &self.facts["package"], &self.settings)?;
        files::write(&self.output.join(page::ARGS), &args)
    }

    pub(super) fn resume(&mut self, folder: &Path) -> Result<()> {
        let state = checkpoint::load_state(folder)?;
        settings::refuse_other(&state.settings, &self.settings, folder)?;
        let adapter = Adapter::load(self.device.graph(), folder)?;
        let moments = checkpoint::load_moments(folder, adapter.params.len(), state.updates)?;
        self.group.assert_equal("checkpoint", &digest(&adapter.params, &moments))?;
        self.device.restore(&adapter.params, moments)?;
        (self.done, self.skipped, self.window) = (state.global_step, state.skipped, state.window);
        self.objective.restore(state.losses);
        Ok(())
    }

    pub(super) fn train(&mut self) -> Result<()> {
        // Rank 0 alone writes; the others wait for it where they next need it.
        let mut doctor = Doctor::default();
        let mut log = match self.group.is_first() {
            true => {
                files::write(&self.output.join(page::FACTS), self.facts.to_string().as_bytes())?;
                let (log, before) = Log::open(&self.output, self.done, self.samples.start())?;
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
        let mut line_start = Instant::now();
        let eval_steps = self.config.output.eval_steps;
        while self.done < self.steps.total {
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
                self.window.add(step.loss, step.sums, tokens);
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
                    show(&bar, &line);
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
            if self.done.is_multiple_of(eval_steps.max(1)) || last {
                let (line, logps) = self.evaluate()?;
                if let Some(log) = &mut log {
                    if let Some(line) = line {
                        log.write(&line, warn);
                        show(&bar, &line);
                        for what in doctor.look(&line, false) {
                            warn(what.clone());
                            log.remark(self.done, "doctor", &what);
                        }
                    }
                    log.samples(&self.samples.line(self.done, &logps), warn);
                }
            }
            let signal = interrupt.on_any(self.group)?.filter(|_| !last);
            if self.done.is_multiple_of(self.config.output.save_steps.max(1)) || last || signal.is_some() {
                self.agree()?;
                match log.as_mut().map_or(Ok(()), |log| log.flush().and_then(|()| self.save())) {
                    Err(e) if !last && signal.is_none() => {
                        let what = Remark::from(&e).help("the run goes on and tries again at the next checkpoint");
                        warn(what.clone());
                        log.iter_mut().for_each(|log| log.remark(self.done, "warning", &what));
                    }
                    saved => saved?,
                }
            }
            if let Some(signal) = signal {
                bar.finish_and_clear();
                self.group.barrier()?;
                return Err(Error::run(format!("ended by {signal} after step {}, which is saved", self.done))
                    .at(self.output.display())
                    .help("the same command with --resume-from-checkpoint latest goes on from there"));
            }
            line_start += pause.elapsed();
        }
        bar.finish_and_clear();
        if let Some([first, last]) = doctor.course() {
            console::line(format!("loss        {first:.4} → {last:.4} in {} steps", self.done));
        }
        self.device.fetch()?;
        if self.device.moments().steps == 0 && self.done > 0 {
            return Err(Error::run("every step was skipped: the adapter is the one of the start")
                .at(self.output.display())
                .help("the warnings above name the rows, or the flags"));
        }
        match log {
            Some(_) => self.device.adapter().save(&self.output, &self.base_model),
            None => Ok(()),
        }
    }

    /// What to say of a step that is skipped; too many in a row are an error.
    fn skip(&mut self, cause: &Skipped, step: &Step, norm: f64) -> Result<Remark> {
        self.skipped += 1;
        let what = format!("step {} has loss {} and a gradient of norm {norm}", self.done + 1, step.loss);
        let (place, what, help) = match cause {
            Skipped::Gradient => {
                let worst = nonfinite::worst_example(self.group, step)?;
                let row = self.next_examples().get(worst).map(|e| self.examples[*e].place.clone());
                (row.unwrap_or_default(), what, nonfinite::LOWER)
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
        let examples: Vec<&Example> = next.iter().map(|i| &self.examples[*i]).collect();
        let reference = self.reference.gather(&next);
        let step =
            step::gradient(self.group, self.device.as_mut(), &mut self.objective, &examples, reference.as_ref())?;
        Ok((step, examples.iter().map(|e| e.unique_tokens()).sum()))
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

    /// A line about the validation examples, where there are any, and log-probs that begin with those of the samples.
    fn evaluate(&mut self) -> Result<(Option<Map<String, Value>>, AnswerLogProbs)> {
        if self.validation.is_empty() {
            return Ok((None, self.samples.score(self.group, self.device.as_mut(), &self.examples)?));
        }
        let examples: Vec<&Example> = self.validation.iter().collect();
        let reference = self.validation_reference.all();
        let (step, logps) =
            step::evaluate(self.group, self.device.as_mut(), &mut self.objective, &examples, reference)?;
        let mut window = Window::default();
        window.add(step.loss, step.sums, 0);
        let mut line = self.place();
        line.extend(window.means("eval_"));
        Ok((Some(line), logps))
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
            epoch: self.done as f64 / self.steps.per_epoch as f64,
            updates: self.device.moments().steps,
            skipped: self.skipped,
            packing: self.device.packing(),
            settings: self.settings.clone(),
            losses: self.objective.states(),
            window: self.window.clone(),
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

/// Puts a line of the log beside the bar, or prints it where there is none.
fn show(bar: &ProgressBar, line: &Map<String, Value>) {
    let number = |name: &str| line.get(name).or_else(|| line.get(&format!("eval_{name}"))).and_then(Value::as_f64);
    let (loss, margin) = (number("loss").unwrap_or(f64::NAN), number("rewards/margins").unwrap_or(f64::NAN));
    let accuracy = number("rewards/accuracies").unwrap_or(f64::NAN);
    let step = number("global_step").unwrap_or(0.0);
    let speed = number("tokens_per_second").map(|t| format!(" {t:.0} tokens/s")).unwrap_or_default();
    let kind = if line.contains_key("eval_loss") { "evaluation" } else { "step" };
    // Examples of one answer have nothing that is compared.
    let compared = if line.keys().any(|k| k.ends_with("rewards/margins")) {
        format!(" margin {margin:.3} accuracy {accuracy:.2}")
    } else {
        String::new()
    };
    let text = format!("loss {loss:.4}{compared}{speed}");
    console::event(kind, line);
    if kind == "step" && !bar.is_hidden() {
        bar.set_message(text);
    } else {
        bar.suspend(|| console::step(format!("{kind} {step} {text}")));
    }
}
