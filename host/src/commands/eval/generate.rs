//! `dpo-host eval --generate`: what a model answers with its adapter and without, side by side, and what a judge says of it.
//!
//! Answers and verdicts stand in one file, which is written anew as they come: a command that is run again goes on where it ended.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Map, Value, json};

use super::EvalOptions;
use crate::args::sampling::DrawArgs;
use crate::{backends, demo};
use dpo_core::cache;
use dpo_core::decoder::{CHUNK, Sequences};
use dpo_core::error::{Error, IoContext, Result};
use dpo_core::lora::Adapter;
use dpo_core::plan::MemoryOptions;
use dpo_core::{console, files};
use dpo_data::{self as data, ChatTokenizer, Prompt, Wanted};
use dpo_generate::judge::{Judge, Outcome, Pair, Tally, Verdict};
use dpo_generate::{Answer, Generator, Sampling, Stop, Variant};
use dpo_hub::Need;
use dpo_hub::model::{self, Model};
use dpo_page as page;
use dpo_plugins::Registry;

#[derive(Args)]
pub(super) struct GenerateArgs {
    /// Answer prompts instead of scoring rows, with the adapter and without: a text (.txt) with a prompt a line, or rows of any known
    /// format, of which the prompts are taken, or with `prompt` or `messages` alone. Answers that are in the file of --output
    /// [default: generated.jsonl in the adapter's folder] already stay; beside it there is a page to read
    #[arg(long, value_name = "PROMPTS[#N]", help_heading = "Answers")]
    pub(super) generate: Option<String>,
    /// Have a model judge which of both answers is better, at an endpoint of OpenAI's chat completions such as
    /// http://127.0.0.1:8000/v1, in both orders; $OPENAI_API_KEY is its key
    #[arg(long, value_name = "URL", requires = "generate", requires = "judge_model", help_heading = "Answers")]
    judge: Option<String>,
    /// The judging model's name at that endpoint
    #[arg(long, value_name = "NAME", requires = "judge", help_heading = "Answers")]
    judge_model: Option<String>,
    #[command(flatten)]
    draw: DrawArgs,
}

/// Flags that say how rows are scored, and how answers are drawn: either has no meaning for the other.
const OF_SCORES: &[&str] = &[
    "loss",
    "loss_weights",
    "beta",
    "label_smoothing",
    "rpo_alpha",
    "ld_alpha",
    "f_divergence",
    "use_weighting",
    "loss_option",
    "dataset",
    "max_length",
    "truncation_strategy",
];
const OF_ANSWERS: &[&str] = &["temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens"];

/// Names of what each model says, in files.
const BASE: &str = Variant::Base.name();
const TUNED: &str = Variant::Tuned.name();

/// How often the file is written while answers come.
const SAVED_EVERY: Duration = Duration::from_secs(5);

impl GenerateArgs {
    /// Refuses flags that would change nothing.
    pub(super) fn refuse_idle(&self, given: &[String]) -> Result<()> {
        let (idle, help) = match &self.generate {
            Some(_) => (OF_SCORES, "leave it out, or leave --generate out to score rows"),
            None => (OF_ANSWERS, "leave it out, or add --generate PROMPTS"),
        };
        match given.iter().find(|name| idle.contains(&name.as_str())) {
            Some(name) => Err(Error::input(if self.generate.is_some() {
                "is for scores, and --generate makes answers"
            } else {
                "is for answers, which --generate makes"
            })
            .at(format!("--{}", name.replace('_', "-")))
            .help(help)),
            None => Ok(()),
        }
    }

    fn judge(&self, adapter: Option<&Path>) -> Result<Option<(Judge, &str)>> {
        let (Some(url), Some(model)) = (&self.judge, &self.judge_model) else { return Ok(None) };
        if adapter.is_none() {
            return Err(Error::input("there is one answer to each prompt, and nothing to compare it with")
                .at("--judge")
                .help("name an adapter with --adapter"));
        }
        let key = std::env::var("OPENAI_API_KEY").ok().filter(|key| !key.trim().is_empty());
        Ok(Some((Judge::new(url, model, key.map(|key| key.trim().to_owned()))?, model)))
    }
}

pub(super) fn generate(registry: &Registry, options: &EvalOptions, prompts: &str) -> Result<()> {
    let adapter_folder = options.adapter.as_deref();
    let judge = options.generate.judge(adapter_folder)?;
    let path = match (&options.output, adapter_folder) {
        (Some(path), _) => path.clone(),
        (None, Some(folder)) => folder.join(page::GENERATED),
        (None, None) => {
            return Err(Error::input("names no file to write answers into")
                .at("--output")
                .help("--output answers.jsonl"));
        }
    };
    let name = demo::or_named(model::named(options.model.as_deref(), adapter_folder)?)?;
    // What can be told without weights is told before they are fetched.
    let folder = model::locate(&name, Need::WeightsToCome)?;
    let model = Model::open(registry, &folder, &options.reading.options())?;
    model.warn();
    let tokenizer = ChatTokenizer::open(&folder, model.family.chat_template.as_deref())?;
    let adapter = adapter_folder.map(|folder| Adapter::load(&model.graph, folder)).transpose()?;
    let sampling = Sampling::of(&options.generate.draw.options(options.data.seed), &folder)?;
    let rows = options.data.options(&[prompts.to_owned()], &Wanted::default())?;
    let prompts = data::prompts(&rows, registry, &tokenizer)?;
    let settings = settings(&folder, adapter_folder, &sampling)?;
    let mut answers = Answers::open(&path, settings, prompts)?;
    if answers.missing() > 0 {
        model::locate(&name, Need::Weights)?;
        let variants: &[Variant] = if adapter.is_some() { &[Variant::Base, Variant::Tuned] } else { &[Variant::Base] };
        let memory = options.storage.on(MemoryOptions::default());
        let backend = backends::open(&options.device, None)?;
        let count = SEQUENCES.min(answers.missing() * variants.len());
        let sequences = Sequences { most: room(&model, &answers, &sampling), ..Sequences::of(count) };
        let mut generator =
            Generator::open(&model, adapter.into_iter().collect(), backend.as_ref(), sequences, memory)?;
        answers.generate(&mut generator, variants, &sampling)?;
    }
    if let Some((judge, name)) = &judge {
        answers.judge(judge, name)?;
    }
    answers.tell(options.json, adapter_folder)
}

/// Answers that go on together.
const SEQUENCES: usize = 16;

/// Tokens of the longest prompt and its answer, as far as the model is made for so many.
fn room(model: &Model<'_>, answers: &Answers, sampling: &Sampling) -> usize {
    let longest = answers.prompts.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0);
    (longest + sampling.max_new_tokens).min(model.positions().unwrap_or(usize::MAX)).max(CHUNK)
}

/// What answers depend on beside their prompts.
fn settings(model: &Path, adapter: Option<&Path>, sampling: &Sampling) -> Result<Value> {
    let weights = |folder: &Path| {
        let path = folder.join("adapter_model.safetensors");
        Ok::<_, Error>(cache::name(&[&std::fs::read(&path).reading(&path)?]))
    };
    let Sampling { temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed, .. } = sampling;
    Ok(json!({
        "model": model,
        "adapter_sha256": adapter.map(weights).transpose()?,
        "temperature": temperature, "top_p": top_p, "top_k": if *top_k == usize::MAX { 0 } else { *top_k },
        "repetition_penalty": repetition_penalty, "max_new_tokens": max_new_tokens, "seed": seed,
    }))
}

/// A prompt with its answers, and what the judge said: `key`, `place`, `prompt`, `base`, `tuned`, `judge`.
type Line = Map<String, Value>;

/// Answers to prompts, as far as they are there.
struct Answers {
    path: PathBuf,
    settings: Value,
    prompts: Vec<Prompt>,
    /// Of each prompt.
    lines: Vec<Option<Line>>,
    saved: Instant,
}

impl Answers {
    /// Those of a file, which may not be there.
    ///
    /// # Errors
    /// A file of something else, of other settings or of other prompts: nothing of it would be kept.
    fn open(path: &Path, settings: Value, prompts: Vec<Prompt>) -> Result<Answers> {
        let mut lines = vec![None; prompts.len()];
        if path.exists() {
            let refused = |what: &str| {
                let help = "name another file with --output, or remove that one";
                Err(Error::input(what).at(path.display()).help(help))
            };
            let text = files::read_text(path)?;
            let mut there = text.lines().map(|line| serde_json::from_str::<Line>(line).unwrap_or_default());
            let head = there.next().unwrap_or_default();
            match head.get("settings") {
                None => return refused("is not a file of generated answers"),
                Some(own) if *own != settings => {
                    return refused("holds answers of another model or adapter, or that were drawn in another way");
                }
                Some(_) => {}
            }
            let keys: Vec<String> = prompts.iter().map(key).collect();
            for line in there {
                match keys.iter().position(|key| line.get("key").and_then(Value::as_str) == Some(key)) {
                    Some(at) => lines[at] = Some(line),
                    None => return refused("holds answers to other prompts"),
                }
            }
        }
        Ok(Answers { path: path.to_owned(), settings, prompts, lines, saved: Instant::now() })
    }

    fn missing(&self) -> usize {
        self.lines.iter().filter(|line| line.is_none()).count()
    }

    fn generate(&mut self, generator: &mut Generator, variants: &[Variant], sampling: &Sampling) -> Result<()> {
        let (missing, all) = (self.missing(), self.lines.len());
        if missing < all {
            console::note(format!("{} of {all} prompts are answered already", all - missing));
        }
        let bar = console::bar(missing as u64, "answering   {pos}/{len} {wide_bar} {eta} left");
        // Answers with the adapter go on in one pass, those without in another: some prompts with one, then the same with the other.
        let open: Vec<usize> = (0..all).filter(|at| self.lines[*at].is_none()).collect();
        let of_some = |some: &[usize]| {
            variants
                .iter()
                .flat_map(|variant| some.iter().map(|at| (*at, *variant)).collect::<Vec<_>>())
                .collect::<Vec<_>>()
        };
        let mut waiting: VecDeque<(usize, Variant)> = open.chunks(SEQUENCES).flat_map(of_some).collect();
        let (mut active, mut begun) = (Vec::<(usize, Answer)>::new(), BTreeMap::<usize, Line>::new());
        while !(waiting.is_empty() && active.is_empty()) {
            let next = self.go_on(generator, &mut waiting, &mut active, sampling);
            if let Err(error) = next {
                return self.save().and(Err(error));
            }
            for (at, answer) in active.extract_if(.., |(_, answer)| answer.stop().is_some()) {
                let prompt = &self.prompts[at];
                let line = begun.entry(at).or_insert_with(|| {
                    let facts =
                        [("key", json!(key(prompt))), ("place", json!(prompt.place)), ("prompt", json!(prompt.text))];
                    facts.map(|(name, value)| (name.to_owned(), value)).into_iter().collect()
                });
                let stop = answer.stop().map(Stop::name);
                let said = json!({"text": answer.text(), "tokens": answer.ids().len(), "stop": stop});
                line.insert(answer.variant().name().to_owned(), said);
            }
            let whole = |line: &Line| variants.iter().all(|variant| line.contains_key(variant.name()));
            let done: Vec<usize> = begun.iter().filter(|(_, line)| whole(line)).map(|(at, _)| *at).collect();
            for at in done {
                let mut line = begun.remove(&at).unwrap_or_default();
                // In this order, whichever ended first.
                let tuned = line.shift_remove(TUNED);
                line.extend(tuned.map(|tuned| (TUNED.to_owned(), tuned)));
                self.lines[at] = Some(line);
                bar.inc(1);
            }
            self.save_in_time()?;
        }
        bar.finish_and_clear();
        self.save()
    }

    /// Begins what there is room for, and goes on with all answers by a token.
    fn go_on(
        &self,
        generator: &mut Generator,
        waiting: &mut VecDeque<(usize, Variant)>,
        active: &mut Vec<(usize, Answer)>,
        sampling: &Sampling,
    ) -> Result<()> {
        while generator.free() > 0
            && let Some((at, variant)) = waiting.pop_front()
        {
            let Prompt { ids, place, .. } = &self.prompts[at];
            let answer = generator.begin(variant.adapter(), ids.clone(), sampling).map_err(|e| e.at(place))?;
            active.push((at, answer));
        }
        let results = generator.step_all(&mut active.iter_mut().map(|(_, answer)| answer).collect::<Vec<_>>());
        for ((at, _), result) in active.iter().zip(results) {
            result.map_err(|e| e.at(&self.prompts[*at].place))?;
        }
        Ok(())
    }

    /// Has a judge compare the answers that it has not compared yet. Those that are the same are a tie, whatever it would say.
    fn judge(&mut self, judge: &Judge, model: &str) -> Result<()> {
        let others = self.lines.iter().flatten().filter_map(|line| line.get("judge")?["model"].as_str());
        if let Some(other) = others.into_iter().find(|other| *other != model) {
            return Err(Error::input(format!("holds verdicts of '{other}'"))
                .at(self.path.display())
                .help("copy it, and name the copy with --output for another judge"));
        }
        let said =
            |line: &Line, name: &str| line.get(name).and_then(|a| a["text"].as_str()).unwrap_or_default().to_owned();
        let mut pairs = Vec::new();
        for (at, line) in self.lines.iter_mut().enumerate() {
            let Some(line) = line else { continue };
            if line.contains_key("judge") {
                continue;
            }
            match (said(line, BASE), said(line, TUNED)) {
                (base, tuned) if base == tuned => {
                    let outcome = json!({"model": model, "same": true, "outcome": Outcome::Tie.name()});
                    drop(line.insert("judge".to_owned(), outcome));
                }
                answers => pairs.push((at, self.prompts[at].text.clone(), answers)),
            }
        }
        let asked: Vec<Pair<'_>> =
            pairs.iter().map(|(_, prompt, (base, tuned))| Pair { prompt, answers: [base, tuned] }).collect();
        let bar = console::bar(asked.len() as u64, "judging     {pos}/{len} {wide_bar} {eta} left");
        let judged = judge.judge(&asked, |i, [order, swapped]| {
            let outcome = Outcome::of_second(order, swapped);
            let better = [who(order, [BASE, TUNED]), who(swapped, [TUNED, BASE])];
            let verdict = json!({"model": model, "better": better, "outcome": outcome.name()});
            if let Some(line) = &mut self.lines[pairs[i].0] {
                line.insert("judge".to_owned(), verdict);
            }
            bar.inc(1);
            self.save_in_time()
        });
        bar.finish_and_clear();
        self.save().and(judged)
    }

    /// What came of it: numbers, and the same in words.
    fn summary(&self) -> (Value, Vec<String>) {
        let lines: Vec<&Line> = self.lines.iter().flatten().collect();
        let text = |line: &Line, name: &str| line.get(name).map(|a| a["text"].clone());
        let same = lines.iter().filter(|l| text(l, TUNED).is_some() && text(l, BASE) == text(l, TUNED)).count();
        let mut numbers = json!({"prompts": lines.len(), "same": same});
        let mut told = vec![format!("{} prompts", lines.len())];
        for name in [BASE, TUNED] {
            let all: Vec<&Value> = lines.iter().filter_map(|line| line.get(name)).collect();
            if all.is_empty() {
                continue;
            }
            let tokens = all.iter().filter_map(|a| a["tokens"].as_f64()).sum::<f64>() / all.len() as f64;
            let cut = all.iter().filter(|a| a["stop"] == Stop::Limit.name()).count();
            numbers[name] = json!({"mean_tokens": tokens, "ended_at_limit": cut});
            told.push(format!("{name} {tokens:.1} tokens on average"));
            if cut > 0 {
                let limit = &self.settings["max_new_tokens"];
                told.push(format!("{cut} answers of {name} ended at --max-new-tokens {limit}"));
            }
        }
        if same > 0 {
            told.push(format!("{same} answers are the same"));
        }
        let mut told = vec![told.join(", ")];
        let judged: Vec<&Value> = lines.iter().filter_map(|line| line.get("judge")).collect();
        let outcomes = judged.iter().filter_map(|judge| Outcome::named(judge["outcome"].as_str()?));
        let tally = Tally::of(outcomes);
        if let Some(judge) = judged.first() {
            let name = judge["model"].as_str().unwrap_or_default();
            let Tally { wins, ties, losses, unclear } = tally;
            numbers["judge"] = json!({"model": name, "wins": wins, "ties": ties, "losses": losses, "unclear": unclear});
            let mut line = format!("{name} says: {wins} wins of {TUNED}, {ties} ties, {losses} losses");
            if let Some((rate, [low, high])) = tally.rate() {
                numbers["judge"]["win_rate"] = json!(rate);
                numbers["judge"]["interval_95"] = json!([low, high]);
                line +=
                    &format!("; win rate {rate:.3}, 95% interval {low:.3} to {high:.3} (Wilson, a tie is half a win)");
            }
            told.push(line);
            if unclear > 0 {
                told.push(format!("{unclear} pairs have no verdict that could be read, and are not counted"));
            }
        }
        (numbers, told)
    }

    fn save_in_time(&mut self) -> Result<()> {
        if self.saved.elapsed() < SAVED_EVERY { Ok(()) } else { self.save() }
    }

    /// The file's lines: what came of it, then prompts with their answers.
    fn written(&self) -> Vec<Line> {
        let (numbers, told) = self.summary();
        let head = [("settings", self.settings.clone()), ("summary", numbers), ("text", json!(told))];
        let head = head.map(|(name, value)| (name.to_owned(), value)).into_iter().collect();
        std::iter::once(head).chain(self.lines.iter().flatten().cloned()).collect()
    }

    fn save(&mut self) -> Result<()> {
        let text: String = self.written().iter().map(|line| format!("{}\n", json!(line))).collect();
        self.saved = Instant::now();
        files::write(&self.path, text.as_bytes())
    }

    /// Says what came of it, and writes the page to read, and into the report of the run that the adapter is of.
    fn tell(&mut self, as_json: bool, adapter: Option<&Path>) -> Result<()> {
        self.save()?;
        let (numbers, told) = self.summary();
        let shown = self.path.with_extension("html");
        page::write_answers(&shown, "Answers", &self.written())?;
        // The report has what lies in the run's own folder under its own name.
        if let Some(run) = adapter.filter(|run| run.join(page::FACTS).is_file() && run.join(page::GENERATED).is_file())
        {
            page::write_report(run)?;
        }
        if as_json {
            println!("{numbers:#}");
            return Ok(());
        }
        told.iter().for_each(|line| console::result(format!("answers     {line}")));
        console::result(format!("written     {} and {}", self.path.display(), shown.display()));
        Ok(())
    }
}

/// What a prompt is known by: its tokens.
fn key(prompt: &Prompt) -> String {
    let bytes: Vec<u8> = prompt.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    cache::name(&[&bytes])[..16].to_owned()
}

/// Whose answer a verdict prefers, of those that stood first and second.
fn who(verdict: Verdict, [first, second]: [&'static str; 2]) -> &'static str {
    match verdict {
        Verdict::First => first,
        Verdict::Second => second,
        Verdict::Tie => "tie",
        Verdict::Unclear => "unclear",
    }
}
