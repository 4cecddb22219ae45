//! From files to token pairs: [`source`] reads rows, a format plugin makes records of them, [`chat`] renders them,
//! [`tokens`] gives ids, [`report`] says what became of everything.

pub mod chat;
mod python;
pub mod report;
pub mod source;
pub mod tokens;

use std::collections::{HashMap, HashSet};

use dpo_plugin_api::dataset::{Record, Row, Text};
use indicatif::ProgressBar;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

pub use chat::read_json;
pub use chat::{ChatTemplate, Rendering};
pub use report::Report;
pub use source::parse_columns;
pub use tokens::{ChatTokenizer, Truncation};

use dpo_core::console;
use dpo_core::error::{Error, Result};
use dpo_core::pair::TokenPair;
use dpo_plugins::{Format, Registry};
use report::{FileReport, Joined};
use source::{Columns, Source, SourceRow, first_columns, rename};
use tokens::Encoded;

/// Rows that are shown to the formats to find out which one it is.
const DETECTION_ROWS: usize = 20;

/// What is asked of the data.
#[derive(Clone, Debug)]
pub struct DataOptions {
    /// `--dataset` arguments: `PATH` or `PATH#N`.
    pub paths: Vec<String>,
    /// The format's name; otherwise it is found out, file by file.
    pub format: Option<String>,
    /// Names that formats read for the names in the files.
    pub columns: Columns,
    /// Most tokens of a prompt and an answer.
    pub max_length: usize,
    /// What happens to longer ones.
    pub truncation: Truncation,
    /// Whether the first bad row ends everything.
    pub strict: bool,
    /// Whether `#N` takes rows at random. Pairs always come in the order of their files.
    pub shuffle: bool,
    /// For the sample.
    pub seed: u64,
}

/// Pairs to train on.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// In the order of their files.
    pub pairs: Vec<TokenPair>,
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
/// A source that cannot be read, rows of no known format, under `strict` the first row that makes no pair by its own
/// fault, and data without any pair.
pub fn load(options: &DataOptions, registry: &Registry, tokenizer: &ChatTokenizer) -> Result<Dataset> {
    if options.paths.is_empty() {
        return Err(Error::input("no data is named").at("--dataset").help("name rows with --dataset FILE"));
    }
    let mut files = Vec::new();
    for argument in &options.paths {
        files.extend(Source::parse(argument)?.read(options.shuffle, options.seed)?);
    }
    rename(&mut files, &options.columns)?;
    let template = tokenizer.template();
    let mut report = Report {
        max_length: options.max_length,
        truncation: options.truncation,
        template: template.map(|t| t.origin.clone()),
        template_reads_clock: template.is_some_and(|t| t.reads_clock),
        ..Report::default()
    };
    let mut items = Vec::new();
    for (file, (path, rows)) in files.into_iter().enumerate() {
        let format = choose(options, registry, &path, &rows)?;
        let (path, format_name) = (path.display().to_string(), format.name.clone());
        report.files.push(FileReport { path, format: format_name, rows: rows.len(), pairs: 0 });
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
    let items = join(items, &mut report, options.strict)?;
    let conversations = items.iter().any(|item| matches!(item.record.prompt, Text::Messages(_)));
    if conversations {
        // Without a template every row would fail for the same reason.
        tokenizer.need_template()?;
    }
    report.plain_pairs = items.iter().filter(|item| matches!(item.record.prompt, Text::Plain(_))).count();
    let bar = progress(items.len());
    let encoded: Vec<Result<Encoded>> = items
        .par_iter()
        .map(|item| {
            bar.inc(1);
            tokenizer.encode_pair(&item.record)
        })
        .collect();
    bar.finish_and_clear();
    let pairs = collect(items, encoded, &mut report, options, tokenizer)?;
    report.measure(&pairs, tokenizer);
    if pairs.is_empty() {
        return Err(no_pairs(&report));
    }
    Ok(Dataset { pairs, report })
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
            let known: Vec<&str> = registry.formats.iter().map(|f| f.name.as_str()).collect();
            let (columns, known) = (first_columns(rows).join(", "), known.join(", "));
            Err(Error::input(format!("rows of no known dataset format; their columns are {columns}"))
                .at(path.display())
                .help(format!(
                    "a row needs a preferred and a rejected answer; known formats: {known}; `dpo-host describe NAME` shows rows of \
                     each, --columns renames columns"
                )))
        }
    }
}

/// Records of every row, in order.
fn convert(format: &Format, rows: Vec<SourceRow>) -> Vec<(String, Result<Vec<Record>>)> {
    let records = |row: SourceRow| (row.place, row.row.and_then(|row| format.records(&row)));
    rows.into_par_iter().map(records).collect()
}

/// Counts a row that makes no pair by its own fault, or ends everything.
fn refuse(report: &mut Report, error: Error, place: &str, strict: bool) -> Result<()> {
    if strict {
        return Err(error.at(place));
    }
    report.drop(&error, place);
    Ok(())
}

/// Makes pairs of judged answers: every liked one with every disliked one to the same prompt. They follow the records that
/// were pairs before.
fn join(items: Vec<Item>, report: &mut Report, strict: bool) -> Result<Vec<Item>> {
    let judged = |item: &Item| item.record.chosen.is_some() != item.record.rejected.is_some();
    let (judged, mut pairs): (Vec<Item>, Vec<Item>) = items.into_iter().partition(judged);
    if judged.is_empty() {
        return Ok(pairs);
    }
    let before = pairs.len();
    let mut groups: Vec<Vec<&Item>> = Vec::new();
    let mut group_of: HashMap<String, usize> = HashMap::new();
    for item in &judged {
        let Record { prompt, tools, template_args, .. } = &item.record;
        let key = serde_json::to_string(&(prompt, tools, template_args)).unwrap_or_default();
        let group = *group_of.entry(key).or_insert_with(|| {
            groups.push(Vec::new());
            groups.len() - 1
        });
        groups[group].push(item);
    }
    for group in groups {
        let (liked, disliked): (Vec<&Item>, Vec<&Item>) = group.into_iter().partition(|i| i.record.chosen.is_some());
        if liked.is_empty() || disliked.is_empty() {
            for item in liked.iter().chain(&disliked) {
                let cause = Error::input("no answer of the other kind to the same prompt");
                refuse(
                    report,
                    cause.help("pairs need a liked and a disliked answer to one prompt"),
                    &item.place,
                    strict,
                )?;
            }
        }
        for (good, bad) in liked.iter().flat_map(|good| disliked.iter().map(move |bad| (good, bad))) {
            let record = Record { rejected: bad.record.rejected.clone(), ..good.record.clone() };
            pairs.push(Item { record, file: good.file, place: format!("{} and {}", good.place, bad.place) });
        }
    }
    report.joined = Some(Joined { answers: judged.len(), pairs: pairs.len() - before });
    Ok(pairs)
}

fn progress(rows: usize) -> ProgressBar {
    console::bar(rows as u64, "tokenising {bar:30} {pos}/{len} rows, {per_sec}, {eta} left")
}

/// The pairs that can be learned, cut to length; the rest is counted.
fn collect(
    items: Vec<Item>,
    encoded: Vec<Result<Encoded>>,
    report: &mut Report,
    options: &DataOptions,
    tokenizer: &ChatTokenizer,
) -> Result<Vec<TokenPair>> {
    let mut pairs = Vec::with_capacity(items.len());
    let mut endings: HashMap<u32, usize> = HashMap::new();
    for (item, encoded) in items.into_iter().zip(encoded) {
        let place = item.place;
        let Encoded { prompt, chosen, rejected, lost } = match encoded {
            Ok(encoded) => encoded,
            Err(error) => {
                refuse(report, error, &place, options.strict)?;
                continue;
            }
        };
        let mut pair = TokenPair { prompt, chosen, rejected, place };
        let same = Error::input("both answers are the same");
        if pair.chosen == pair.rejected {
            refuse(report, same.help("such a pair teaches nothing"), &pair.place, options.strict)?;
            continue;
        }
        let ends = [tokenizer.ending(&pair.chosen), tokenizer.ending(&pair.rejected)];
        match options.truncation.apply(&mut pair, options.max_length) {
            Err(cause) => {
                report.drop(&Error::input(cause), &pair.place);
                continue;
            }
            Ok(cut) => {
                report.truncated += usize::from(cut);
                // Kept, as TRL keeps them, so that steps are made of the same pairs.
                report.cut_alike += usize::from(pair.chosen == pair.rejected);
            }
        }
        for end in ends {
            report.eos.answers += 1;
            match end {
                Some(id) => *endings.entry(id).or_default() += 1,
                None => {
                    report.eos.without += 1;
                    report.eos.first.get_or_insert_with(|| pair.place.clone());
                }
            }
        }
        if !lost.is_empty() {
            report.prompt_prefix.rows += 1;
            report.prompt_prefix.first.get_or_insert_with(|| pair.place.clone());
            report.prompt_prefix.text.get_or_insert_with(|| tokenizer.decode(&lost, true));
        }
        report.files[item.file].pairs += 1;
        pairs.push(pair);
    }
    if let Some((id, _)) = endings.into_iter().max_by_key(|(id, count)| (*count, std::cmp::Reverse(*id))) {
        report.eos.token = tokenizer.token(id);
        report.eos.stops = tokenizer.eos_ids().contains(&id);
    }
    Ok(pairs)
}

/// Why there is nothing to train on.
fn no_pairs(report: &Report) -> Error {
    let rows: usize = report.files.iter().map(|f| f.rows).sum();
    let causes = report.dropped.iter().map(|d| format!("{} ({} rows)", d.cause, d.count));
    let files: Vec<&str> = report.files.iter().map(|f| f.path.as_str()).collect();
    let error = Error::input(format!("no pair is left of {rows} rows: {}", causes.collect::<Vec<_>>().join("; ")));
    let error = error.at(files.join(", "));
    match report.messages.first() {
        Some(first) => {
            let parts: Vec<&str> = first.lines().map(|l| l.trim_start().trim_start_matches("help: ")).collect();
            error.help(format!("the first one: {}", parts.join("; ")))
        }
        None => error,
    }
}

/// Parts pairs into those to train on and those to evaluate on: `ratio` of them, at random by `seed`, and at least one of
/// each where there are two. Both keep their order.
pub fn split(pairs: Vec<TokenPair>, ratio: f64, seed: u64) -> (Vec<TokenPair>, Vec<TokenPair>) {
    let wanted = (pairs.len() as f64 * ratio).round() as usize;
    let wanted = if ratio > 0.0 && pairs.len() > 1 { wanted.clamp(1, pairs.len() - 1) } else { 0 };
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let held: HashSet<usize> = rand::seq::index::sample(&mut random, pairs.len(), wanted).into_iter().collect();
    let (val, train): (Vec<_>, Vec<_>) = pairs.into_iter().enumerate().partition(|(i, _)| held.contains(i));
    (train.into_iter().map(|(_, p)| p).collect(), val.into_iter().map(|(_, p)| p).collect())
}
