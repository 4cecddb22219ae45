//! From files to examples: [`source`] finds files, [`read`] reads their rows, a format plugin makes records of them,
//! [`columns`] sees that nothing of them is lost, [`chat`] renders them, [`tokens`] gives ids, [`report`] says what became of
//! everything.

mod bounded;
pub mod chat;
pub mod columns;
mod jinja;
mod namespace;
mod python;
pub mod read;
pub mod report;
pub mod source;
mod tokenizer;
pub mod tokens;

use std::collections::{HashMap, HashSet};

use dpo_plugin_api::dataset::{Message, Record, RecordAnswer, Row, Text};
use dpo_plugin_api::graph::ModelGraph;
use dpo_plugin_api::loss::{Answers, MAX_ANSWERS};
use indicatif::ProgressBar;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

pub use chat::read_json;
pub use chat::{ChatTemplate, Rendering};
pub use columns::parse_columns;
pub use python::strftime_now;
pub use report::Report;
pub use tokens::{ChatTokenizer, Truncation};

use columns::{Columns, first_columns, misspelt_column, refuse_lost, rename};
use dpo_core::console;
use dpo_core::error::{Error, Kind, Result};
use dpo_core::example::{Answer, Example};
use dpo_core::graph::{refuse_foreign_tokens, vocabulary};
use dpo_plugins::{Format, Registry};
use read::SourceRow;
use report::{FileReport, Joined};
use source::Source;
use tokens::{Encoded, MadeTurns};

/// Rows that are shown to the formats to find out which one it is.
const DETECTION_ROWS: usize = 20;

/// The examples that the losses of a run take.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// How many answers each has.
    pub answers: Answers,
    /// The loss that says so, for messages.
    pub loss: String,
    /// Whether each has, detached, an answer to another prompt.
    pub mismatched: bool,
}

impl Default for Wanted {
    fn default() -> Wanted {
        Wanted { answers: Answers::Pair, loss: "sigmoid".into(), mismatched: false }
    }
}

impl Wanted {
    /// What reports call an example.
    fn noun(&self) -> &'static str {
        if self.answers == Answers::Pair { "pair" } else { "example" }
    }
}

/// What is asked of the data.
#[derive(Clone, Debug)]
pub struct DataOptions {
    /// `--dataset` arguments: `PATH` or `PATH#N`.
    pub paths: Vec<String>,
    /// The format's name; otherwise it is found out, file by file.
    pub format: Option<String>,
    /// What the records of the rows become.
    pub wanted: Wanted,
    /// Examples of a step: a mismatched answer is of another example of so many that follow each other.
    pub batch_size: usize,
    /// Names that formats read for the names in the files.
    pub columns: Columns,
    /// Most tokens of a prompt and an answer; `None` for what the model is made for.
    pub max_length: Option<usize>,
    /// Tokens that the model has: examples with others end everything. `None` where a tokenizer alone is at hand.
    pub vocabulary: Option<usize>,
    /// What happens to longer ones.
    pub truncation: Truncation,
    /// Whether the first bad row ends everything.
    pub strict: bool,
    /// Most rows of each source: the first ones.
    pub max_samples: Option<usize>,
    /// The system message of conversations that have none.
    pub system: Option<String>,
    /// Whether plain text stays as it is, where the checkpoint has a chat template that would make turns of it.
    pub plain_text: bool,
    /// Whether `#N` takes rows at random. Examples always come in the order of their files.
    pub shuffle: bool,
    /// For the sample.
    pub seed: u64,
}

impl DataOptions {
    /// The same for a model: rows are no longer than it takes, and have no token that it does not have.
    #[must_use]
    pub fn of_model(self, graph: &ModelGraph, positions: Option<usize>) -> DataOptions {
        let most = self.max_length.or(positions).unwrap_or(usize::MAX);
        let max_length = Some(most.min(graph.max_positions.unwrap_or(usize::MAX)));
        DataOptions { max_length, vocabulary: Some(vocabulary(graph)), ..self }
    }
}

impl DataOptions {
    fn most_tokens(&self) -> usize {
        self.max_length.unwrap_or(usize::MAX)
    }
}

/// Examples to train on.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// In the order of their files.
    pub examples: Vec<Example>,
    /// What became of the rows.
    pub report: Report,
}

/// A record on its way, with the number of its file.
struct Item {
    record: Record,
    file: usize,
    place: String,
}

/// Reads, converts and tokenises everything that `options` names.
///
/// # Errors
/// A source that cannot be read, rows of no known format, an example with another number of answers than is wanted, under
/// `strict` the first row that makes no example by its own fault, and data without any example.
pub fn load(options: &DataOptions, registry: &Registry, tokenizer: &ChatTokenizer) -> Result<Dataset> {
    if options.paths.is_empty() {
        return Err(Error::input("no data is named").at("--dataset").help("name rows with --dataset FILE"));
    }
    let mut files = Vec::new();
    for argument in &options.paths {
        let mut left = options.max_samples.unwrap_or(usize::MAX);
        for (path, mut rows) in Source::parse(argument)?.read(options.shuffle, options.seed)? {
            rows.truncate(left);
            left -= rows.len();
            files.push((path, rows));
        }
    }
    rename(&mut files, &options.columns)?;
    let template = tokenizer.template();
    let mut report = Report {
        noun: options.wanted.noun(),
        max_length: options.most_tokens(),
        truncation: options.truncation,
        template: template.map(|t| t.origin.clone()),
        template_is_borrowed: template.is_some_and(ChatTemplate::is_borrowed),
        template_reads_clock: template.is_some_and(|t| t.reads_clock),
        ..Report::default()
    };
    let mut items = Vec::new();
    for (file, (path, rows)) in files.into_iter().enumerate() {
        let format = choose(options, registry, &path, &rows)?;
        let (path, format_name) = (path.display().to_string(), format.name.clone());
        report.files.push(FileReport { path, format: format_name, rows: rows.len(), examples: 0 });
        // Behind broken JSON nothing in the file can be trusted, so it is no matter of one row.
        if let Some(error) = rows.iter().find_map(|r| r.row.as_ref().err()) {
            return Err(error.clone());
        }
        for (place, records) in convert(format, rows) {
            match records {
                Ok(records) => {
                    items.extend(records.into_iter().map(|record| Item { record, file, place: place.clone() }))
                }
                Err(error) => refuse(&mut report, error, &place, options.strict)?,
            }
        }
    }
    if !options.plain_text {
        for item in &mut items {
            match tokenizer.make_turns(&mut item.record) {
                MadeTurns::Made => report.templated += 1,
                MadeTurns::RenderedBefore => report.rendered_before += 1,
                MadeTurns::Not => {}
            }
        }
    }
    if let Some(system) = &options.system {
        items.iter_mut().try_for_each(|item| add_system(item, system))?;
    }
    let items = shape(items, options, &mut report)?;
    let conversations = items.iter().any(|item| matches!(item.record.prompt, Text::Messages(_)));
    if conversations {
        // Without a template every row would fail for the same reason.
        tokenizer.need_template()?;
    }
    report.plain_examples = items.iter().filter(|item| matches!(item.record.prompt, Text::Plain(_))).count();
    let bar = progress(items.len());
    let encode = |item: &Item| {
        bar.inc(1);
        dpo_core::progress::advance();
        match tokenizer.encode_record(&item.record) {
            // What did not come to an end may only have been slow, so it is no matter of one row.
            Err(error) if error.kind == Kind::Run => Err(error.at(&item.place)),
            made => Ok(made),
        }
    };
    let encoded = items.par_iter().map(encode).collect::<Result<Vec<Result<Encoded>>>>();
    bar.finish_and_clear();
    let encoded = encoded?;
    let mut examples = collect(items, encoded, &mut report, options, tokenizer)?;
    if options.wanted.mismatched {
        examples = with_mismatched(examples, options)?;
    }
    report.measure(&examples, options.wanted.answers == Answers::Labelled, tokenizer);
    if examples.is_empty() {
        return Err(no_examples(&report));
    }
    Ok(Dataset { examples, report })
}

/// The named format, or the one that is surest of the first rows.
fn choose<'a>(
    options: &DataOptions,
    registry: &'a Registry,
    path: &std::path::Path,
    rows: &[SourceRow],
) -> Result<&'a Format> {
    if let Some(name) = &options.format {
        return registry.format(name).map_err(|e| e.at("--dataset-format"));
    }
    let first: Vec<&Row> = rows.iter().filter_map(|r| r.row.as_ref().ok()).take(DETECTION_ROWS).collect();
    if first.is_empty()
        && let Some(Err(error)) = rows.first().map(|r| &r.row)
    {
        return Err(error.clone());
    }
    // A format that fails here is as good as one that says no.
    let sure = |format: &Format| first.iter().map(|row| u32::from(format.recognises(row).unwrap_or(0))).sum::<u32>();
    let best = registry.formats.iter().map(|f| (sure(f), f)).rev().max_by_key(|(sure, _)| *sure);
    match best.filter(|(sure, _)| *sure > 0) {
        Some((_, format)) => Ok(format),
        None => {
            let columns = first_columns(rows);
            let error =
                Error::input(format!("rows of no known dataset format; their columns are {}", columns.join(", ")));
            let error = error.at(path.display());
            if let Some((column, meant)) = misspelt_column(&columns, registry) {
                let rename = format!("--columns '{{\"{column}\": \"{meant}\"}}'");
                return Err(error.help(format!("did you mean '{meant}' for '{column}'? {rename} renames it")));
            }
            let known: Vec<&str> = registry.formats.iter().map(|f| f.name.as_str()).collect();
            let known = known.join(", ");
            Err(error.help(format!(
                    "a row needs a preferred and a rejected answer, or one with a label; known formats: {known}; `dpo-host describe NAME` shows rows of \
                     each, --columns renames columns"
                )))
        }
    }
}

/// Records of every row, in order.
fn convert(format: &Format, rows: Vec<SourceRow>) -> Vec<(String, Result<Vec<Record>>)> {
    let records = |row: Row| {
        let records = format.records(&row)?;
        refuse_lost(&format.name, &row, &records, |other| format.records(other))?;
        Ok(records)
    };
    rows.into_par_iter().map(|row| (row.place, row.row.and_then(records))).collect()
}

/// Counts a row that makes no example by its own fault, or ends everything.
fn refuse(report: &mut Report, error: Error, place: &str, strict: bool) -> Result<()> {
    if strict {
        return Err(error.at(place));
    }
    report.drop(&error, place);
    Ok(())
}

/// Puts a system message before a conversation that has none.
fn add_system(item: &mut Item, system: &str) -> Result<()> {
    match &mut item.record.prompt {
        Text::Messages(messages) if messages.first().is_some_and(|m| m.role == "system") => {}
        Text::Messages(messages) => messages.insert(0, Message::new("system", system)),
        Text::Plain(_) => {
            return Err(Error::input("the prompt is plain text, which takes no system message")
                .at(&item.place)
                .help("leave --system out, or write prompts as messages"));
        }
    }
    Ok(())
}

/// Makes the examples that are wanted of the records that there are.
///
/// # Errors
/// A record with another number of answers: rows and loss do not fit, whatever else is in them.
fn shape(items: Vec<Item>, options: &DataOptions, report: &mut Report) -> Result<Vec<Item>> {
    let Wanted { answers, loss, .. } = &options.wanted;
    if *answers == Answers::Labelled {
        return Ok(items.into_iter().flat_map(each_answer).collect());
    }
    if *answers == Answers::One {
        let mut liked = Vec::new();
        for item in items {
            match learned(&item.record) {
                [only] if only.label <= 0.0 => {
                    let cause = Error::input("the answer is not liked");
                    let cause = cause.help(format!("'{loss}' learns answers that are"));
                    refuse(report, cause, &item.place, options.strict)?;
                }
                _ => liked.push(item),
            }
        }
        return Ok(liked);
    }
    let items = join(items, report, options.strict)?;
    for Item { record, place, .. } in &items {
        let (count, all) = (learned(record).len(), record.answers.len());
        if !answers.takes(count) || all > MAX_ANSWERS {
            let detached = if all > count { format!(" and {} detached ones", all - count) } else { String::new() };
            let what = format!("{count} answers{detached}, and the loss '{loss}' takes {}", answers.describe());
            return Err(Error::input(what).at(place).help(match answers {
                Answers::Pair => {
                    "choose a loss over rankings, such as --loss plackett_luce, or let the format make pairs"
                }
                _ => "`dpo-host describe NAME` says what a loss takes",
            }));
        }
    }
    Ok(items)
}

/// The learned answers of a record, a record each.
fn each_answer(item: Item) -> Vec<Item> {
    let Item { record, file, place } = item;
    let alone = |answer: &RecordAnswer| Record { answers: vec![answer.clone()], ..record.clone() };
    learned(&record).iter().map(|answer| Item { record: alone(answer), file, place: place.clone() }).collect()
}

/// Gives every example, detached, the answer of the one before it among as many as a step has, and the first of them that of the last, as
/// TRL's `KTOTrainer` does; where the last step has one example alone, the answer of the one before it.
fn with_mismatched(examples: Vec<Example>, options: &DataOptions) -> Result<Vec<Example>> {
    let count = examples.len();
    if count == 1 {
        return Err(
            Error::input(format!("'{}' needs two examples and more", options.wanted.loss)).at(&examples[0].place)
        );
    }
    let batch = options.batch_size.max(2);
    let other = |i: usize| match (i % batch, i / batch * batch) {
        (0, first) => Some((first + batch).min(count) - 1).filter(|last| *last != i).unwrap_or(i - 1),
        _ => i - 1,
    };
    let answers: Vec<Vec<u32>> = examples.iter().map(|e| e.answers()[0].ids.clone()).collect();
    let with = |(i, example): (usize, Example)| {
        let mut ids = answers[other(i)].clone();
        ids.truncate(options.most_tokens().saturating_sub(example.prompt().len()).max(1));
        let own = example.answers().iter().cloned();
        let answers = own.chain([Answer { ids, label: 0.0, detached: true }]).collect();
        Example::new(example.prompt().to_vec(), answers, example.place.clone())
    };
    examples.into_iter().enumerate().map(with).collect()
}

/// The answers of a record that are learned, best first; detached ones come behind them.
fn learned(record: &Record) -> &[RecordAnswer] {
    let count = record.answers.iter().position(|a| a.detached).unwrap_or(record.answers.len());
    &record.answers[..count]
}

/// Makes pairs of single answers to the same prompt: the first liked one with the first disliked one, and so on; where one
/// side has fewer, it begins again. So each answer is in a pair, and there are as many as the longer side has. They follow the
/// records that had more answers before.
fn join(items: Vec<Item>, report: &mut Report, strict: bool) -> Result<Vec<Item>> {
    let single = |item: &Item| item.record.answers.len() == 1;
    let (single, mut all): (Vec<Item>, Vec<Item>) = items.into_iter().partition(single);
    if single.is_empty() {
        return Ok(all);
    }
    let before = all.len();
    let mut groups: Vec<Vec<&Item>> = Vec::new();
    let mut group_of: HashMap<String, usize> = HashMap::new();
    for item in &single {
        let Record { prompt, tools, template_args, .. } = &item.record;
        let key = serde_json::to_string(&(prompt, tools, template_args)).unwrap_or_default();
        let group = *group_of.entry(key).or_insert_with(|| {
            groups.push(Vec::new());
            groups.len() - 1
        });
        groups[group].push(item);
    }
    let is_liked = |item: &&Item| item.record.answers.iter().all(|a| a.label > 0.0);
    for group in groups {
        let (liked, disliked): (Vec<&Item>, Vec<&Item>) = group.into_iter().partition(is_liked);
        if liked.is_empty() || disliked.is_empty() {
            for item in liked.iter().chain(&disliked) {
                let cause = Error::input("no answer of the other kind to the same prompt");
                refuse(
                    report,
                    cause.help(
                        "pairs need a liked and a disliked answer to one prompt; --loss kto learns from single answers",
                    ),
                    &item.place,
                    strict,
                )?;
            }
        }
        let count = liked.len().max(disliked.len());
        for (good, bad) in liked.iter().cycle().zip(disliked.iter().cycle()).take(count) {
            let answers = [&good.record, &bad.record].map(|record| record.answers.clone()).concat();
            let record = Record { answers, ..good.record.clone() };
            all.push(Item { record, file: good.file, place: format!("{} and {}", good.place, bad.place) });
        }
    }
    report.joined = Some(Joined { answers: single.len(), pairs: all.len() - before });
    Ok(all)
}

fn progress(rows: usize) -> ProgressBar {
    console::bar(rows as u64, "tokenising {bar:30} {pos}/{len} rows, {per_sec}, {eta} left")
}

/// The examples that can be learned, cut to length; the rest is counted.
fn collect(
    items: Vec<Item>,
    encoded: Vec<Result<Encoded>>,
    report: &mut Report,
    options: &DataOptions,
    tokenizer: &ChatTokenizer,
) -> Result<Vec<Example>> {
    let mut examples = Vec::with_capacity(items.len());
    let mut endings: HashMap<u32, usize> = HashMap::new();
    for (item, encoded) in items.into_iter().zip(encoded) {
        let Item { record, file, place } = item;
        let made = encoded.and_then(|Encoded { prompt, answers, lost }| {
            let answer = |(ids, of): (Vec<u32>, &RecordAnswer)| Answer { ids, label: of.label, detached: of.detached };
            let answers = answers.into_iter().zip(&record.answers).map(answer).collect();
            Ok((Example::new(prompt, answers, place.as_str())?, lost))
        });
        let (mut example, lost) = match made {
            Ok(made) => made,
            Err(error) => {
                refuse(report, error, &place, options.strict)?;
                continue;
            }
        };
        if options.wanted.answers == Answers::One {
            example.keep_best();
        }
        if alike(&example) {
            let which = if example.learned().len() == 2 { "both" } else { "all" };
            let same = Error::input(format!("{which} answers are the same"));
            refuse(report, same.help("such an example teaches nothing"), &place, options.strict)?;
            continue;
        }
        let ends: Vec<Option<u32>> = example.learned().iter().map(|a| tokenizer.ending(&a.ids)).collect();
        match options.truncation.apply(&mut example, options.most_tokens()) {
            Err(cause) => {
                report.drop(&Error::input(cause), &place);
                continue;
            }
            Ok(cut) => {
                report.truncated += usize::from(cut);
                // Kept, as TRL keeps them, so that steps are made of the same examples.
                report.cut_alike += usize::from(alike(&example));
            }
        }
        // No row's fault, but of a tokenizer that is not the model's.
        refuse_foreign_tokens(example.parts().flatten(), options.vocabulary.unwrap_or(usize::MAX))
            .map_err(|e| e.at(&place))?;
        for end in ends {
            report.eos.answers += 1;
            match end {
                Some(id) => *endings.entry(id).or_default() += 1,
                None => {
                    report.eos.without += 1;
                    report.eos.first.get_or_insert_with(|| place.clone());
                }
            }
        }
        if !lost.is_empty() {
            report.prompt_prefix.rows += 1;
            report.prompt_prefix.first.get_or_insert_with(|| place.clone());
            report.prompt_prefix.text.get_or_insert_with(|| tokenizer.decode(&lost, true));
        }
        report.files[file].examples += 1;
        examples.push(example);
    }
    if let Some((id, _)) = endings.into_iter().max_by_key(|(id, count)| (*count, std::cmp::Reverse(*id))) {
        report.eos.token = tokenizer.token(id);
        report.eos.stops = tokenizer.eos_ids().contains(&id);
    }
    Ok(examples)
}

/// Whether there are several answers, which are all the same.
fn alike(example: &Example) -> bool {
    let answers = example.learned();
    answers.len() > 1 && answers.windows(2).all(|two| two[0].ids == two[1].ids)
}

/// Why there is nothing to train on.
fn no_examples(report: &Report) -> Error {
    let rows: usize = report.files.iter().map(|f| f.rows).sum();
    let causes = report.dropped.iter().map(|d| format!("{} ({} rows)", d.cause, d.count));
    let files: Vec<&str> = report.files.iter().map(|f| f.path.as_str()).collect();
    let error =
        Error::input(format!("no {} is left of {rows} rows: {}", report.noun, causes.collect::<Vec<_>>().join("; ")));
    let error = error.at(files.join(", "));
    match report.messages.first() {
        Some(first) => {
            let parts: Vec<&str> = first.lines().map(|l| l.trim_start().trim_start_matches("help: ")).collect();
            error.help(format!("the first one: {}", parts.join("; ")))
        }
        None => error,
    }
}

/// Parts examples into those to train on and those to evaluate on: `ratio` of them, at random by `seed`, and at least one of
/// each where there are two. Both keep their order.
pub fn split(examples: Vec<Example>, ratio: f64, seed: u64) -> (Vec<Example>, Vec<Example>) {
    let wanted = (examples.len() as f64 * ratio).round() as usize;
    let wanted = if ratio > 0.0 && examples.len() > 1 { wanted.clamp(1, examples.len() - 1) } else { 0 };
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let held: HashSet<usize> = rand::seq::index::sample(&mut random, examples.len(), wanted).into_iter().collect();
    let (val, train): (Vec<_>, Vec<_>) = examples.into_iter().enumerate().partition(|(i, _)| held.contains(i));
    (train.into_iter().map(|(_, e)| e).collect(), val.into_iter().map(|(_, e)| e).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use std::path::Path;

    use super::*;

    /// Fewer rows than there are would be another run, and which ones are left would depend on the machine.
    #[test]
    fn a_row_whose_rendering_does_not_end_ends_the_run_and_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/trl/model/tokenizer.json");
        std::fs::copy(golden, dir.path().join("tokenizer.json")).unwrap();
        let template = "{% set n = namespace(a=['x'], b=['x']) %}{% for m in messages %}{% if 'slow' in m.content %}\
            {% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}\
            {% endif %}{{ m.content }}<|im_end|>{% endfor %}";
        let config = serde_json::json!({"eos_token": "<|im_end|>", "chat_template": template}).to_string();
        std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
        let row = |answer: &str| {
            let turns =
                serde_json::json!([{"role": "user", "content": "why?"}, {"role": "assistant", "content": answer}]);
            serde_json::json!({"messages": turns, "rejected_response": "no"}).to_string()
        };
        let path = dir.path().join("rows.jsonl");
        std::fs::write(&path, [row("ok"), row("slow"), row("so")].join("\n")).unwrap();
        let options = DataOptions {
            paths: vec![path.display().to_string()],
            format: None,
            wanted: Wanted::default(),
            batch_size: 16,
            columns: Columns::default(),
            max_length: None,
            vocabulary: None,
            truncation: Truncation::Delete,
            strict: false,
            max_samples: None,
            system: None,
            plain_text: false,
            shuffle: false,
            seed: 0,
        };
        let tokenizer = ChatTokenizer::open(dir.path(), None).unwrap();
        let error = load(&options, &Registry::discover(&[], None), &tokenizer).unwrap_err();
        assert_eq!(error.kind, Kind::Run);
        let expected = format!("{}:2: the chat template does not come to an end within 2 seconds", path.display());
        assert!(error.to_string().starts_with(&expected), "{error}");
    }
}
